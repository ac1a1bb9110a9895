"""How many tokens a second does the whole engine make with each KV cache dtype, and how many tokens fit?

Takes the flags of vLLM's own benchmark of that name, except that --kv-cache-dtype may list several: each gets a process
of its own and a line of the table, which also goes to benchmarks/results/<device>.md. The engine's flags are passed on.
Prompts are random tokens. A decode step is what --output-len tokens take longer than 1 token, over the steps between.

    python benchmarks/benchmark_throughput.py --kv-cache-dtype auto fp8 kivi2 --num-prompts 32 --input-len 8192
    python benchmarks/benchmark_throughput.py --num-prompts 0 --max-num-seqs 256    # as many as the cache holds

Without --model: Llama-3.1-8B's shapes with dummy weights; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import write_section

LLAMA_3_1_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": False,
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """The workload, by vLLM's names and defaults where it has them."""
    parser.add_argument("--input-len", type=int, default=8192)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--num-prompts", type=int, default=32, help="0: as many as the cache holds at --max-model-len")
    parser.add_argument("--num-iters", type=int, default=1, help="times to measure; the fastest counts")


def measure(out: Path, rest: list[str]) -> None:
    """In a process of its own: run one engine and write what was measured as JSON."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()  # before the parser lists the cache dtypes it accepts
    import torch
    from vllm import LLM, SamplingParams, TokensPrompt, __version__
    from vllm.engine.arg_utils import EngineArgs
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    arguments(parser)
    args = EngineArgs.add_cli_args(parser).parse_args(rest)
    full = args.num_prompts == 0
    settings = EngineArgs.from_cli_args(args)
    settings.disable_log_stats = not full  # counts preemptions
    llm = LLM.from_engine_args(settings)
    capacity = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    num_prompts = args.num_prompts or min(capacity // args.max_model_len, args.max_num_seqs)
    vocabulary = llm.llm_engine.model_config.get_vocab_size()
    generator = torch.Generator().manual_seed(0)

    def seconds(count: int, output_len: int) -> float:
        tokens = torch.randint(vocabulary, (count, args.input_len), generator=generator)
        prompts = [TokensPrompt(prompt_token_ids=row) for row in tokens.tolist()]
        sampling = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - start

    seconds(min(2, num_prompts), 4)
    prefill = min(seconds(num_prompts, 1) for _ in range(args.num_iters))
    total = min(seconds(num_prompts, args.output_len) for _ in range(args.num_iters))
    preempted = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions") if full else 0
    step = (total - prefill) / max(args.output_len - 1, 1)
    result = {
        "device": current_platform.get_device_name() if current_platform.is_cuda() else "CPU",
        "versions": f"vLLM {__version__}, torch {torch.__version__}",
        "capacity": capacity,
        "num_prompts": num_prompts,
        "prefill": prefill,
        "step": step,
        "decode": num_prompts / step,
        "total": num_prompts * (args.input_len + args.output_len) / total,
        "preempted": int(preempted),
    }
    out.write_text(json.dumps(result))


def run(dtype: str, common: list[str], folder: Path) -> dict[str, Any]:
    """Measure one cache dtype; what the process printed is shown only if it fails."""
    log, out = folder / f"{dtype}.log", folder / f"{dtype}.json"
    command = [sys.executable, __file__, "--measure", str(out), "--kv-cache-dtype", dtype, *common]
    with log.open("w") as stream:
        failed = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT).returncode
    if failed or not out.exists():
        print(log.read_text()[-6000:], file=sys.stderr)
        raise SystemExit(f"{dtype}: failed, see above")
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help="default: Llama-3.1-8B's shapes, dummy weights")
    parser.add_argument("--kv-cache-dtype", nargs="+", default=["auto", "kivi2"])
    parser.add_argument("--max-num-seqs", type=int, help="default: --num-prompts, or 256")
    parser.add_argument("--max-model-len", type=int, help="default: a request, rounded up to a multiple of 128 tokens")
    parser.add_argument("--num-layers", type=int, default=32, help="of the default model")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>.md")
    arguments(parser)
    args, engine_flags = parser.parse_known_args()
    max_model_len = args.max_model_len or -(-(args.input_len + args.output_len) // 128) * 128
    common = [f"--input-len={args.input_len}", f"--output-len={args.output_len}", f"--num-iters={args.num_iters}"]
    common += [f"--num-prompts={args.num_prompts}", f"--max-num-seqs={args.max_num_seqs or args.num_prompts or 256}"]
    common += [f"--max-model-len={max_model_len}", "--skip-tokenizer-init", "--no-enable-prefix-caching", *engine_flags]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = args.model
        if model is None:
            model = f"Llama-3.1-8B's shapes, {args.num_layers} layers, dummy weights"
            config = LLAMA_3_1_8B | {"num_hidden_layers": args.num_layers}
            (folder / "config.json").write_text(json.dumps(config))
        path = [f"--model={folder}", "--load-format=dummy"] if args.model is None else [f"--model={model}"]
        lines: list[str] = []
        for dtype in args.kv_cache_dtype:
            found = run(dtype, path + common, folder)
            if not lines:
                flags = f" Engine flags: {' '.join(engine_flags)}." if engine_flags else ""
                lines = [
                    f"{model}; {args.input_len:,} tokens in, {args.output_len:,} out, max_model_len {max_model_len:,}. "
                    f"{found['versions']}.{flags} Made by benchmarks/benchmark_throughput.py.",
                    "",
                    "| kv-cache-dtype | KV capacity, tokens | requests | cold prefill, s | ms a decode step "
                    "| decode tokens/s | total tokens/s |",
                    "|---|---|---|---|---|---|---|",
                ]
                print("\n".join(lines), flush=True)
            note = f" ({found['preempted']} preempted)" if found["preempted"] else ""
            lines.append(
                f"| {dtype} | {found['capacity']:,} | {found['num_prompts']}{note} | {found['prefill']:.2f} "
                f"| {found['step'] * 1e3:.2f} | {found['decode']:,.0f} | {found['total']:,.0f} |"
            )
            print(lines[-1], flush=True)
    requests = f"{args.num_prompts} requests" if args.num_prompts else "at full memory"
    title = f"Throughput of the engine, {requests} of {args.input_len:,} tokens"
    write_section(found["device"], title, lines, args.output)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()

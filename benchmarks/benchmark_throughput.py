"""How many tokens a second does the whole engine make with each KV cache dtype, how many tokens fit, and what does a
cached token cost?

Takes the flags of vLLM's own benchmark of that name, except that --kv-cache-dtype, --num-prompts and --input-len may
list several: each dtype gets an engine in a process of its own and a line of the table for each number of requests and
length. With one number and one length --tensor-parallel-size may list several, each with an engine of its own. The
table also goes to benchmarks/results/<device>.md, and with several lengths a second one: the slope of the inter-token
latency, by least squares. The engine's flags are passed on. Prompts are random tokens.

    python benchmarks/benchmark_throughput.py --kv-cache-dtype auto fp8 kivi2 --num-prompts 32 --input-len 8192
    python benchmarks/benchmark_throughput.py --num-prompts 8 32 0              # 0: as many of the longest as fit
    python benchmarks/benchmark_throughput.py --input-len 2048 8192 12288       # the slope
    python benchmarks/benchmark_throughput.py --tensor-parallel-size 1 2        # two GPUs against one

The requests of a line run twice. With 1 token each they give the cold prefill. With more, a decode step is
- what the second run takes longer than the first, over the steps between: also tokens that are decoded beside other
  requests' prefill count, and no step need hold all requests;
- timed alone: the mean of the steps in which every request decodes, at least --output-len of them. The second run makes
  as many more tokens as prefill takes steps, so that the first request is not done before the last begins.

Without --model: Llama-3.1-8B's shapes with dummy weights; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama
from report import Column, Section

COLUMNS = (
    Column("kv_cache_dtype", "kv-cache-dtype"),
    Column("capacity", "KV capacity, tokens", ","),
    Column("requests", "requests"),
    Column("input_len", "tokens of each", ","),
    Column("prefill", "cold prefill, s", ".2f"),
    Column("difference", "ms a decode step, by difference", ".2f"),
    Column("step", "timed alone", ".2f"),
    Column("decode", "decode tokens/s", ",.0f"),
    Column("total", "total tokens/s", ",.0f"),
    Column("preempted", "preemptions"),
)
GPUS = Column("tensor_parallel_size", "GPUs")
SLOPES = (
    Column("kv_cache_dtype", "kv-cache-dtype"),
    Column("slope", "ms a step and cached token", ".3e"),
    Column("of_auto", "of auto's", ".2f"),
    Column("floor", "ms a step with no cache", ".2f"),
    Column("residual", "largest residual, ms", ".2f"),
)
FULL = 0  # --num-prompts: as many as the cache holds
SPARE = 4  # steps: the engine schedules ahead


def arguments(parser: argparse.ArgumentParser) -> None:
    """The workload, by vLLM's names and defaults where it has them."""
    parser.add_argument("--input-len", type=int, nargs="+", default=[8192])
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--num-prompts", type=int, nargs="+", default=[32], help="0: as many of the longest as fit")


def prefill_steps(num_prompts: int, input_len: int, max_num_batched_tokens: int) -> int:
    """At most this many steps prefill all requests, though those that decode already take a token each."""
    return -(-num_prompts * input_len // max(max_num_batched_tokens - num_prompts, 1)) + SPARE


def request_tokens(args: argparse.Namespace, num_prompts: int, input_len: int) -> int:
    """What a request needs of the cache before it ends, in whole pages of any dtype."""
    steps = prefill_steps(num_prompts, input_len, args.max_num_batched_tokens)
    return -(-(input_len + args.output_len + steps) // 128) * 128


def fitting(args: argparse.Namespace, capacity: int, input_len: int) -> int:
    """As many requests as the cache holds until they end."""
    counts = range(1, args.max_num_seqs + 1)
    return max((n for n in counts if n * request_tokens(args, n, input_len) <= capacity), default=1)


class Engine:
    """One engine, and the runs of it."""

    def __init__(self, rest: list[str]) -> None:
        from vllm.plugins import load_general_plugins

        load_general_plugins()  # before the parser lists the cache dtypes it accepts
        from vllm import LLM
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = FlexibleArgumentParser()
        arguments(parser)
        self.args = EngineArgs.add_cli_args(parser).parse_args(rest)
        settings = EngineArgs.from_cli_args(self.args)
        settings.disable_log_stats = False  # counts preemptions
        self.llm = LLM.from_engine_args(settings)
        self.capacity = self.llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
        self.vocabulary = self.llm.llm_engine.model_config.get_vocab_size()
        self.seed = 0

    def run(self, num_prompts: int, input_len: int, output_len: int) -> tuple[list[float], list[int]]:
        """Seconds from the start to each step that made tokens, and how many requests it made them for."""
        import torch
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        self.seed += 1
        tokens = torch.randint(
            self.vocabulary, (num_prompts, input_len), generator=torch.Generator().manual_seed(self.seed)
        ).tolist()
        engine = self.llm.llm_engine
        start = time.perf_counter()
        for index, prompt in enumerate(tokens):
            sampling = SamplingParams(
                temperature=0.0,
                max_tokens=output_len,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            engine.add_request(f"{self.seed}-{index}", TokensPrompt(prompt_token_ids=prompt), sampling)
        times: list[float] = []
        counts: list[int] = []
        while engine.has_unfinished_requests():
            made = sum(len(output.outputs[0].token_ids) for output in engine.step())
            if made:
                times.append(time.perf_counter() - start)
                counts.append(made)
        assert sum(counts) == num_prompts * output_len, (sum(counts), num_prompts, output_len)
        return times, counts

    def preemptions(self) -> int:
        return int(sum(m.value for m in self.llm.get_metrics() if m.name == "vllm:num_preemptions"))


def alone(times: Sequence[float], counts: Sequence[int], num_prompts: int) -> tuple[float | None, float]:
    """Mean seconds of a step among the longest stretch of steps in which every request decodes, the first such step
    apart, since it may have prefilled; and how many tokens a request has made by its middle."""
    best = range(0)
    first = 0
    for index, count in enumerate([*counts, 0]):
        if count != num_prompts:
            best = max(best, range(first, index), key=len)
            first = index + 1
    if len(best) < 2:
        return None, 0.0
    middle = (best[0] + best[-1]) // 2
    return (times[best[-1]] - times[best[0]]) / (len(best) - 1), sum(counts[: middle + 1]) / num_prompts


def measure(out: Path, rest: list[str]) -> None:
    """In a process of its own: run one engine and write what was measured as JSON."""
    import torch
    from vllm import __version__
    from vllm.platforms import current_platform

    engine = Engine(rest)
    args, rows = engine.args, []
    engine.run(2, min(args.input_len), 4)
    for asked in args.num_prompts:
        # What fits is counted in requests of max_model_len: a shorter one needs more than its share, for its window.
        for input_len in args.input_len if asked else [max(args.input_len)]:
            num_prompts = asked or fitting(args, engine.capacity, input_len)
            output_len = args.output_len + prefill_steps(num_prompts, input_len, args.max_num_batched_tokens)
            before = engine.preemptions()
            prefill = engine.run(num_prompts, input_len, 1)[0][-1] if asked else None
            times, counts = engine.run(num_prompts, input_len, output_len)
            step, made = alone(times, counts, num_prompts)
            rows.append(
                {
                    "capacity": engine.capacity,
                    "requests": num_prompts,
                    "input_len": input_len,
                    "full": asked == FULL,
                    "prefill": prefill,
                    "difference": prefill and 1e3 * (times[-1] - prefill) / (output_len - 1),
                    "step": step and 1e3 * step,
                    "decode": step and num_prompts / step,
                    "total": num_prompts * (input_len + output_len) / times[-1],
                    "cached": num_prompts * (input_len + made),
                    "preempted": engine.preemptions() - before,
                }
            )
    device = current_platform.get_device_name() if current_platform.is_cuda() else "CPU"
    versions = f"vLLM {__version__}, torch {torch.__version__}"
    out.write_text(
        json.dumps({"device": device, "versions": versions, "max_num_seqs": args.max_num_seqs, "rows": rows})
    )


def run(dtype: str, size: int, common: list[str], folder: Path) -> dict[str, Any]:
    """Measure one cache dtype on so many GPUs; what the process printed is shown only if it fails."""
    log, out = folder / f"{dtype}-{size}.log", folder / f"{dtype}-{size}.json"
    command = [sys.executable, __file__, "--measure", str(out), "--kv-cache-dtype", dtype]
    command += [f"--tensor-parallel-size={size}", *common]
    with log.open("w") as stream:
        failed = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT).returncode
    if failed or not out.exists():
        print(log.read_text()[-6000:], file=sys.stderr)
        raise SystemExit(f"{dtype}, tensor parallel size {size}: failed, see above")
    return json.loads(out.read_text())


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float, float]:
    """Slope, value at 0 and largest residual of the line through points by least squares."""
    n = len(points)
    mean_x, mean_y = (sum(values) / n for values in zip(*points, strict=True))
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)
    floor = mean_y - slope * mean_x
    return slope, floor, max(abs(y - floor - slope * x) for x, y in points)


def slopes(rows: Sequence[dict[str, Any]], requests: int) -> list[dict[str, Any]]:
    """What a cached token adds to a step of this many requests, for each cache dtype measured at several lengths."""
    found: dict[str, dict[str, Any]] = {}
    for dtype in dict.fromkeys(row["kv_cache_dtype"] for row in rows):
        points = [
            (row["cached"], row["step"])
            for row in rows
            if row["kv_cache_dtype"] == dtype and row["requests"] == requests and row["step"] and not row["full"]
        ]
        if len(points) > 1:
            slope, floor, residual = line(points)
            found[dtype] = {"kv_cache_dtype": dtype, "slope": slope, "floor": floor, "residual": residual}
    for row in found.values():
        row["of_auto"] = row["slope"] / found["auto"]["slope"] if "auto" in found else None
    return list(found.values())


def listed(values: Sequence[object]) -> str:
    texts = [f"{value:,}" if isinstance(value, int) else str(value) for value in values]
    return " and ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))


def plot_of(args: argparse.Namespace) -> dict[str, Any] | None:
    """Latency over cached tokens, or throughput over requests, where the runs differ in one of the two."""
    plot = {"kind": "lines", "by": "kv_cache_dtype"}
    if len(args.input_len) > 1 and len(args.num_prompts) == 1:
        x_label = f"cached tokens of {listed(args.num_prompts)} requests"
        return plot | {"x": "cached", "x_label": x_label, "y_label": "ms a decode step", "series": {"": "step"}}
    if len(args.num_prompts) > 1:
        longest = max(args.input_len)
        plot |= {"x": "requests", "x_label": f"requests of {longest:,} tokens", "only": {"input_len": longest}}
        return plot | {"y_label": "decode tokens/s", "series": {"": "decode"}}
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help="default: Llama-3.1-8B's shapes, dummy weights")
    parser.add_argument("--kv-cache-dtype", nargs="+", default=["auto", "kivi2"])
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, nargs="+", default=[1])
    parser.add_argument("--max-num-seqs", type=int, help="default: the most --num-prompts, or 256")
    parser.add_argument("--max-model-len", type=int, help="default: a request, rounded up to a multiple of 128 tokens")
    parser.add_argument("--max-num-batched-tokens", type=int, default=16384, help="vLLM's default on an H100")
    parser.add_argument("--num-layers", type=int, default=32, help="of the default model")
    parser.add_argument("--append", action="store_true", help="keep the table's lines of other cache dtypes")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>.md")
    arguments(parser)
    args, engine_flags = parser.parse_known_args()
    sizes = args.tensor_parallel_size
    if len(sizes) > 1 and len(args.num_prompts) + len(args.input_len) > 2:
        parser.error("several --tensor-parallel-size take one --num-prompts and one --input-len")
    max_num_seqs = args.max_num_seqs or (256 if FULL in args.num_prompts else max(args.num_prompts))
    longest = max(request_tokens(args, n or max_num_seqs, max(args.input_len)) for n in args.num_prompts)
    max_model_len = args.max_model_len or longest
    common = ["--input-len", *map(str, args.input_len), "--num-prompts", *map(str, args.num_prompts)]
    common += [f"--output-len={args.output_len}", f"--max-num-seqs={max_num_seqs}", f"--max-model-len={max_model_len}"]
    common += [f"--max-num-batched-tokens={args.max_num_batched_tokens}", *engine_flags]
    counts = listed([n for n in args.num_prompts if n] + ["a full cache of"] * (FULL in args.num_prompts))
    workload = f"{counts} requests of {listed(args.input_len)} tokens"
    flags = f" Engine flags: {' '.join(engine_flags)}." if engine_flags else ""
    parallel = "" if sizes == [1] else f", on {listed(sizes)} GPUs"
    columns = (COLUMNS[0], GPUS, *COLUMNS[1:]) if parallel else COLUMNS
    section: Section | None = None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, model_flags = llama.engine_flags(args.model, args.num_layers, folder)
        for dtype, size in itertools.product(args.kv_cache_dtype, sizes):
            found = run(dtype, size, model_flags + common, folder)
            about = (
                f"{model}; at least {args.output_len:,} steps, max_model_len {max_model_len:,}, max_num_batched_tokens "
                f"{args.max_num_batched_tokens:,}. {found['versions']}.{flags} Made by "
                "benchmarks/benchmark_throughput.py."
            )
            if section is None:
                section = Section(f"Throughput of the engine, {workload}{parallel}", about, columns, plot_of(args))
            for row in found["rows"]:
                section.add({"kv_cache_dtype": dtype, "tensor_parallel_size": size} | row)
                if row["full"] and row["requests"] == found["max_num_seqs"]:
                    section.note(f"{dtype}: more requests fit than the engine takes; raise --max-num-seqs.")
    assert section is not None
    keep = "kv_cache_dtype" if args.append else None
    section.write(found["device"], args.output, keep)
    for requests in filter(None, args.num_prompts if len(args.input_len) > 1 else ()):
        rows = slopes(section.rows, requests)
        if rows:
            runs = f"{requests} requests of {listed(args.input_len)} tokens{parallel}"
            table = Section(f"Inter-token latency of a cached token, {runs}", section.about, SLOPES)
            for row in rows:
                table.add(row)
            table.write(found["device"], args.output)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(Path(sys.argv[2]), sys.argv[3:])
    else:
        main()

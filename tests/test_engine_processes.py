"""The engines people start: several processes, tensor parallelism, torch.compile, LoRA, and the OpenAI server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from engines import assert_same, engine, generate, logprobs, prompt, save_tiny_llama, tokens

from vllm_kivi.options import PUBLISHED

SMOLLM2 = Path(__file__).parent.parent / "models" / "smollm2"
PROMPTS = [prompt(40, 1), prompt(700, 2)]
TEXT = Path(__file__).parent / "data" / "persuasion.txt"
PASSAGES = ((0, 150), (300, 300), (0, 60))  # of the text: where, and how many tokens
# Of two ranges that lose the same, a search takes the other one for a difference of one rounding.
UNSEARCHED = {"additional_config": {"kivi": PUBLISHED}}

# A script of its own: vLLM starts its processes by running the main module again.
SCRIPT = """
import json, sys
def main():
    from engines import PROCESS_SETTINGS, generate, logprobs, tokens
    from vllm import LLM
    model, given, out = sys.argv[1:]
    with open(given) as f:
        overrides, prompts, max_tokens = json.load(f)
    llm = LLM(model, **(PROCESS_SETTINGS | overrides))
    outputs = generate(llm, prompts, max_tokens=max_tokens)
    metrics = {} if llm.llm_engine.log_stats is False else {
        m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")
    }
    with open(out, "w") as f:
        json.dump([metrics, [[tokens(o), logprobs(o).tolist()] for o in outputs]], f)
if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def expected(model):
    with engine(model, **UNSEARCHED) as llm:
        return generate(llm, PROMPTS)


def environment(**changes: str) -> dict[str, str]:
    env = {k: v for k, v in os.environ.items() if k not in ("VLLM_ENABLE_V1_MULTIPROCESSING", "OMP_NUM_THREADS")}
    return (
        env | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]), "HF_HUB_OFFLINE": "1"} | changes
    )


def run_elsewhere(
    folder: Path, model: Path, overrides: dict, prompts: list[list[int]], max_tokens: int = 32, **changes: str
) -> tuple[dict[str, float], list[tuple[list[int], torch.Tensor]]]:
    """Metrics, and tokens and their logprobs of each prompt, out of an engine in processes of its own."""
    script, given, out = folder / "run.py", folder / "given.json", folder / "out.json"
    script.write_text(SCRIPT)
    given.write_text(json.dumps([overrides, prompts, max_tokens]))
    command = [sys.executable, str(script), str(model), str(given), str(out)]
    done = subprocess.run(command, env=environment(**changes), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    metrics, outputs = json.loads(out.read_text())
    return metrics, [(chosen, torch.tensor(scores)) for chosen, scores in outputs]


@pytest.mark.parametrize(
    ("overrides", "changes"),
    [
        ({"enforce_eager": True, "tensor_parallel_size": 2}, {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}),
        # vLLM 0.32 has buffers between stages only after torch.compile's warm-up, on a CPU.
        ({"enforce_eager": False, "pipeline_parallel_size": 2}, {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}),
        ({"enforce_eager": False}, {}),
    ],
    ids=["tensor parallel 2", "pipeline parallel 2", "torch.compile"],
)
def test_other_processes_give_the_same_tokens(model, expected, tmp_path, overrides, changes):
    _, outputs = run_elsewhere(tmp_path, model, overrides | UNSEARCHED, PROMPTS, **changes)
    for (actual, scores), wanted in zip(outputs, expected, strict=True):
        assert actual == tokens(wanted)
        torch.testing.assert_close(scores, logprobs(wanted), atol=1e-3, rtol=0)


def test_ngram_speculation_changes_nothing(tmp_path):
    """A real model that copies out of a quantized context. In processes of its own: it loads numba, after which no
    other engine starts in that process on a CPU (vLLM 0.32 looks into every module, and stumbles over numba's)."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(SMOLLM2).encode(TEXT.read_text(encoding="utf-8")[20000:26000])
    prompts = [(ids[start : start + length] * 3)[: 2 * length + 40] for start, length in PASSAGES]
    speculative = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 3, "prompt_lookup_min": 2}
    with engine(SMOLLM2, kv_cache_memory_bytes=256 << 20) as llm:
        expected = generate(llm, prompts, max_tokens=60)
    settings = {"enforce_eager": True, "disable_log_stats": False, "kv_cache_memory_bytes": 256 << 20}
    metrics, outputs = run_elsewhere(tmp_path, SMOLLM2, settings | {"speculative_config": speculative}, prompts, 60)
    drafted, accepted = (metrics[f"vllm:spec_decode_num_{name}_tokens"] for name in ("draft", "accepted"))
    assert 40 < accepted < drafted
    for (actual, scores), wanted in zip(outputs, expected, strict=True):
        assert actual == tokens(wanted)
        torch.testing.assert_close(scores, logprobs(wanted), atol=2e-2, rtol=0)


def test_lora_is_untouched(model, tmp_path):
    """An adapter on the query and value projections: the bypass equals auto with it, and it matters."""
    from safetensors.torch import save_file
    from vllm.lora.request import LoRARequest

    generator = torch.Generator().manual_seed(0)
    weights = {}
    for layer in range(2):
        for name, rows in (("q_proj", 384), ("v_proj", 128)):
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{key}.lora_A.weight"] = torch.randn(8, 384, generator=generator) * 0.1
            weights[f"{key}.lora_B.weight"] = torch.randn(rows, 8, generator=generator) * 0.1
    save_file(weights, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    outputs = {}
    for dtype in ("auto", "kivi2"):
        options = {"kivi": {"full_precision": True}}
        with engine(model, dtype, additional_config=options, enable_lora=True, max_lora_rank=8) as llm:
            plain = generate(llm, PROMPTS)
            outputs[dtype] = generate(llm, PROMPTS, lora=LoRARequest("a", 1, str(tmp_path)))
        assert tokens(plain[1]) != tokens(outputs[dtype][1])
    for actual, wanted in zip(outputs["kivi2"], outputs["auto"], strict=True):
        assert_same(actual, wanted)


def test_the_openai_server_streams():
    """`vllm serve MODEL --kv-cache-dtype kivi2` and an OpenAI client that streams from it."""
    from openai import OpenAI

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(SMOLLM2), "--kv-cache-dtype", "kivi2"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", "2048", "--enforce-eager"]
    command += ["--kv-cache-memory-bytes", str(256 << 20), "--served-model-name", "smollm2"]
    server = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.monotonic() + 400
        while True:
            assert server.poll() is None, server.stdout.read()[-4000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
                break
            except OSError:
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(1)
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        question = [{"role": "user", "content": "What is the capital of France?"}]
        stream = client.chat.completions.create(
            model="smollm2", messages=question, temperature=0, max_tokens=16, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert len(pieces) > 4 and "Paris" in "".join(pieces)
    finally:
        server.terminate()
        server.communicate(timeout=60)

"""The engines people start: several processes, parallelism, a worker that dies, torch.compile and LoRA."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import assert_same, engine, generate, logprobs, prompt, save_tiny_llama, tokens
from processes import PATIENCE, START, assert_gone, environment, family, kill, terminate, until

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
        overrides, prompts, max_tokens, forever = json.load(f)
    llm = LLM(model, **(PROCESS_SETTINGS | overrides))
    outputs = generate(llm, prompts, max_tokens=max_tokens)
    metrics = {} if llm.llm_engine.log_stats is False else {
        m.name: m.value for m in llm.get_metrics() if hasattr(m, "value")
    }
    with open(out, "w") as f:
        json.dump([metrics, [[tokens(o), logprobs(o).tolist()] for o in outputs]], f)
    print("written", flush=True)
    while forever:
        generate(llm, prompts, max_tokens=1000)
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


@contextmanager
def started_elsewhere(
    folder: Path,
    model: Path,
    overrides: dict,
    prompts: list[list[int]],
    max_tokens: int = 32,
    forever: bool = False,
    **changes: str,
) -> Iterator[tuple[subprocess.Popen, Path, Path]]:
    """The main process of an engine that answers and, if `forever`, goes on to generate; its log, and its outputs."""
    script, given, out, log = (folder / name for name in ("run.py", "given.json", "out.json", "log"))
    script.write_text(SCRIPT)
    given.write_text(json.dumps([overrides, prompts, max_tokens, forever]))
    command = [sys.executable, str(script), str(model), str(given), str(out)]
    with log.open("w") as lines:
        process = subprocess.Popen(command, env=environment(**changes), stdout=lines, stderr=subprocess.STDOUT)

    def written() -> bool:
        done = "\nwritten\n" in log.read_text()
        assert done or process.poll() is None, log.read_text()[-4000:]
        return done

    try:
        until(written, "the engine", START)
        yield process, log, out
    finally:
        terminate(process)


def read(out: Path) -> tuple[dict[str, float], list[tuple[list[int], torch.Tensor]]]:
    """Metrics, and tokens and their logprobs of each prompt."""
    metrics, outputs = json.loads(out.read_text())
    return metrics, [(chosen, torch.tensor(scores)) for chosen, scores in outputs]


def assert_expected(outputs: list[tuple[list[int], torch.Tensor]], expected: list[Any], tolerance: float) -> None:
    for (actual, scores), wanted in zip(outputs, expected, strict=True):
        assert actual == tokens(wanted)
        torch.testing.assert_close(scores, logprobs(wanted), atol=tolerance, rtol=0)


def test_pipeline_parallelism_and_torch_compile(model, expected, tmp_path):
    """Together, because vLLM 0.32 has buffers between stages only after torch.compile's warm-up, on a CPU."""
    overrides = {"enforce_eager": False, "pipeline_parallel_size": 2} | UNSEARCHED
    changes = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with started_elsewhere(tmp_path, model, overrides, PROMPTS, **changes) as (process, _, out):
        assert process.wait(timeout=PATIENCE) == 0
        _, outputs = read(out)
    assert_expected(outputs, expected, 1e-3)


def test_tensor_parallelism_and_a_worker_that_dies(model, expected, tmp_path):
    """The same tokens; and when a worker is killed, its engine says so and all its processes end."""
    overrides = {"enforce_eager": True, "tensor_parallel_size": 2} | UNSEARCHED
    changes = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    with started_elsewhere(tmp_path, model, overrides, PROMPTS, forever=True, **changes) as (process, log, out):
        _, outputs = read(out)
        processes = family(process)
        kill(processes, "VLLM::Worker_TP1")
        assert_gone(process, processes)
        assert process.returncode != 0
        assert "EngineDeadError" in log.read_text()
    assert_expected(outputs, expected, 1e-3)


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
    settings |= {"speculative_config": speculative}
    with started_elsewhere(tmp_path, SMOLLM2, settings, prompts, 60) as (_, _, out):
        metrics, outputs = read(out)
    drafted, accepted = (metrics[f"vllm:spec_decode_num_{name}_tokens"] for name in ("draft", "accepted"))
    assert 40 < accepted < drafted
    assert_expected(outputs, expected, 2e-2)


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

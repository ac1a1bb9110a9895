"""A real model with sliding windows, Gemma 3 270M: which layers are quantized, capacity, perplexity and answers.

15 of its 18 layers have a window of 512 tokens, so perplexity changes little and the pool is mostly theirs; the head
size is 256, which SmolLM2 has not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from engines import engine, generate, tokens
from test_plan import planned_pool

pytestmark = pytest.mark.slow  # its model is 238 MB to download

MODEL = Path(__file__).parent.parent / "models" / "gemma3"
TEXT = Path(__file__).parent / "data" / "persuasion.txt"
GLOBAL = [5, 11, 17]
CHUNK = 64
NUMBER = "48213"
FIRST_SCORED = 512  # from where on global layers alone see the start
CONTEXT = 8192
MEMORY = 512 << 20
QUESTION = "Q: What is the capital of Germany?\nA: Berlin\nQ: What is the capital of France?\nA:"
BYPASS = "full_precision"


@dataclass
class Measured:
    groups: list[tuple[str, list[str]]]  # the spec's name, and the layers
    capacity: int
    blocks: int
    planned: Any  # pool
    losses: list[float]  # of the scored tokens
    answer: str
    number: str
    lines: list[str]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    if not MODEL.exists():
        pytest.fail(f"{MODEL} is missing: run `make model`")
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def window(tokenizer: Any) -> list[int]:
    """About 1,100 tokens of prose, with a number before it and the question for it at the end."""
    prose = TEXT.read_text(encoding="utf-8")[22500:27000]
    return tokenizer.encode(f"The secret number is {NUMBER}.\n\n{prose}\n\nThe secret number is")


@pytest.fixture(scope="module")
def measure(tokenizer: Any, window: list[int]) -> Callable[..., Measured]:
    """One engine for each cache, however many tests ask."""
    from vllm_kivi.backend import backend

    @cache
    def run(name: str, dtype: str = "bfloat16") -> Measured:
        lines: list[str] = []
        options = {"additional_config": {"kivi": {"full_precision": True}}} if name == BYPASS else {}
        with pytest.MonkeyPatch.context() as patch:
            for method in ("info", "info_once"):
                patch.setattr(backend.logger, method, lambda message, *values, **_: lines.append(message % values))
            with engine(
                MODEL,
                "kivi2" if name == BYPASS else name,
                dtype=dtype,
                max_model_len=CONTEXT,
                max_num_batched_tokens=CHUNK,
                max_num_seqs=1,
                kv_cache_memory_bytes=MEMORY,
                **options,
            ) as llm:
                config = llm.llm_engine.vllm_config
                pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.kv_cache_config
                planned = planned_pool(llm, MODEL, "kivi2" if name == BYPASS else name, CONTEXT, dtype)
                (scored,) = generate(llm, [window], max_tokens=8, prompt_logprobs=0)
                (answer,) = generate(llm, [tokenizer.encode(QUESTION)], max_tokens=4)
        rows = zip(scored.prompt_logprobs[FIRST_SCORED:], window[FIRST_SCORED:], strict=True)
        return Measured(
            groups=[(type(group.kv_cache_spec).__name__, group.layer_names) for group in pool.kv_cache_groups],
            capacity=config.cache_config.kv_cache_size_tokens,
            blocks=pool.num_blocks,
            planned=planned,
            losses=[-entry[token].logprob for entry, token in rows],
            answer=tokenizer.decode(tokens(answer)),
            number=tokenizer.decode(tokens(scored)),
            lines=lines,
        )

    return run


def perplexity(measured: Measured) -> float:
    return math.exp(sum(measured.losses) / len(measured.losses))


def attention(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.attn"


def test_only_global_layers_are_quantized(measure):
    measured = measure("kivi2")
    of_kind: dict[str, list[str]] = {}
    for kind, names in measured.groups:
        of_kind.setdefault(kind, []).extend(names)
    assert sorted(of_kind["FullAttentionSpec"]) == sorted(map(attention, GLOBAL))
    assert sorted(of_kind["FullPrecisionSpec"]) == sorted(attention(i) + ".full_precision" for i in GLOBAL)
    assert set(of_kind["SlidingWindowSpec"]) == {attention(i) for i in range(18)} - set(map(attention, GLOBAL))
    assert any("sliding-window layers keep their full-precision cache" in line for line in measured.lines)
    skipped = ", ".join(attention(i) for i in range(18) if i not in GLOBAL)
    assert any(f"3 layers quantized, 15 skipped: {skipped}" in line for line in measured.lines)


@pytest.mark.parametrize(("dtype", "least"), [("kivi2", 2.4), ("kivi4", 1.95)])
def test_capacity_is_that_of_the_plan_and_larger(measure, dtype, least):
    auto = measure("auto")
    own = measure(dtype)
    for measured in (auto, own):
        assert MEMORY // measured.planned.block_bytes == measured.blocks
        assert measured.planned.capacity(MEMORY, CONTEXT) == measured.capacity
    assert own.capacity >= least * auto.capacity


def test_perplexity(measure):
    """Prose in chunks of 64, each of which reads what came before from the cache, as `eval ppl` does."""
    auto, four, two = (perplexity(measure(dtype)) for dtype in ("auto", "kivi4", "kivi2"))
    assert 20 < auto < 40
    assert four == pytest.approx(auto, rel=0.01)
    assert two == pytest.approx(auto, rel=0.04)
    assert len({auto, four, two}) == 3


def test_the_bypass_is_auto(measure):
    """Same pages and code path, nothing quantized; in bfloat16 sums round otherwise: as far from float32 as auto."""
    exact, bypass = measure("auto", "float32"), measure(BYPASS, "float32")
    assert perplexity(bypass) == pytest.approx(perplexity(exact), rel=1e-5)
    distances = []
    for name in (BYPASS, "auto"):
        pairs = zip(measure(name).losses, exact.losses, strict=True)
        distances.append(math.sqrt(sum((ours - theirs) ** 2 for ours, theirs in pairs) / len(exact.losses)))
    assert distances[0] < 1.2 * distances[1]
    bypass, auto = measure(BYPASS), measure("auto")
    assert (bypass.answer, bypass.number) == (auto.answer, auto.number)


@pytest.mark.parametrize("dtype", ["auto", "kivi2", "kivi4"])
def test_answers(measure, dtype):
    """A question within the window, and a number that only quantized pages hold."""
    assert measure(dtype).answer.startswith(" Paris")
    assert measure(dtype).number.startswith(f" {NUMBER}")

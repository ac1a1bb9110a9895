"""The promises of the README on a real model: capacity, exactness within the window, and answers."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import assert_same, engine, generate

MODEL = Path(__file__).parent.parent / "models" / "smollm2"
TEXT = Path(__file__).parent / "data" / "persuasion.txt"
QUESTIONS = [
    "What is the capital of France?",
    "Name three fruits.",
    "Write one sentence about the sea.",
    "What is 2 + 2?",
]


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MODEL)


def chat(tokenizer, question):
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)


def capacity(llm):
    """What vLLM logs as 'KV cache size', and the bytes it took for it."""
    return llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens


def test_capacity_is_4_5_times_that_of_auto():
    tokens = {}
    for dtype in ("auto", "kivi2"):
        with engine(MODEL, dtype, dtype="bfloat16", max_model_len=8192, kv_cache_memory_bytes=1 << 30) as llm:
            tokens[dtype] = capacity(llm)
            scheduler = llm.llm_engine.engine_core.engine_core.scheduler
            for group in scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups:
                assert group.kv_cache_spec.page_size_bytes == group.kv_cache_spec.unpadded_page_size_bytes
    assert tokens["kivi2"] >= 4.5 * tokens["auto"]


def test_short_requests_are_exact_and_right(tokenizer):
    prompts = [chat(tokenizer, question) for question in QUESTIONS]
    assert max(map(len, prompts)) + 48 <= 128
    outputs = {}
    for dtype in ("auto", "kivi2"):
        with engine(MODEL, dtype, kv_cache_memory_bytes=256 << 20) as llm:
            outputs[dtype] = generate(llm, prompts, max_tokens=48, ignore_eos=True)
    for actual, wanted in zip(outputs["kivi2"], outputs["auto"], strict=True):
        assert_same(actual, wanted)
    assert "Paris" in tokenizer.decode(outputs["kivi2"][0].outputs[0].token_ids)


def test_perplexity_of_kivi4_is_that_of_auto(tokenizer):
    """One window of prose in chunks of 64 through the real cache: what `eval ppl` does."""
    import math

    window = tokenizer.encode(TEXT.read_text(encoding="utf-8"))[5000:6536]
    perplexity = {}
    for dtype in ("auto", "kivi4"):
        with engine(MODEL, dtype, kv_cache_memory_bytes=256 << 20, max_num_batched_tokens=64, max_num_seqs=1) as llm:
            (output,) = generate(llm, [window], max_tokens=1, prompt_logprobs=0)
        losses = [next(iter(entry.values())).logprob for entry in output.prompt_logprobs[512:]]
        perplexity[dtype] = math.exp(-sum(losses) / len(losses))
    assert perplexity["kivi4"] == pytest.approx(perplexity["auto"], rel=0.005)
    assert perplexity["kivi4"] != perplexity["auto"]

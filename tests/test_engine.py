"""Stock vLLM with our cache: what must be equal is compared token by token, on a model that looks far back."""

from __future__ import annotations

import random

import pytest
import torch
from engines import assert_same, assert_same_bits, engine, generate, logprobs, prompt, save_tiny_llama, tokens

from vllm_kivi.options import PUBLISHED

BYPASS = {"kivi": {"full_precision": True}}
SINKS = {"kivi": {"sink_tokens": 5}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


def scheduler(llm):
    return llm.llm_engine.engine_core.engine_core.scheduler


def block_pool(llm):
    return scheduler(llm).kv_cache_manager.block_pool


def count_preemptions(llm):
    """Count from now on; returns the list that grows."""
    seen, stock = [], scheduler(llm)._preempt_request

    def counting(request, *args, **kwargs):
        seen.append(request.request_id)
        return stock(request, *args, **kwargs)

    scheduler(llm)._preempt_request = counting
    return seen


def test_a_request_within_the_window_equals_auto(model):
    prompts = [prompt(1, 1), prompt(31, 2), prompt(96, 3)]
    with engine(model, "auto") as llm:
        expected = generate(llm, prompts)
    for options in ({}, SINKS):
        with engine(model, additional_config=options) as llm:
            for actual, wanted in zip(generate(llm, prompts), expected, strict=True):
                assert_same(actual, wanted)


def test_quantization_is_real(model):
    """A long request must differ from auto, less with more bits."""
    prompts = [prompt(900, seed) for seed in range(4)]
    with engine(model, "auto") as llm:
        expected = generate(llm, prompts, max_tokens=1, logprobs=20)
        # The second token of a request attends to a quantized prompt.
        forced = [p + tokens(o) for p, o in zip(prompts, expected, strict=True)]
    error = {}
    for dtype in ("auto", "kivi8", "kivi4", "kivi2"):
        with engine(model, dtype, additional_config={"kivi": PUBLISHED}, max_num_batched_tokens=128) as llm:
            outputs = generate(llm, forced, max_tokens=1, prompt_logprobs=0)
        rows = [[next(iter(e.values())).logprob for e in o.prompt_logprobs[1:]] for o in outputs]
        error[dtype] = torch.tensor(rows)
    distance = {d: (error[d] - error["auto"]).abs().mean().item() for d in ("kivi8", "kivi4", "kivi2")}
    assert 0 < distance["kivi8"] < distance["kivi4"] < distance["kivi2"]
    assert distance["kivi8"] < 0.05 * distance["kivi2"]


@pytest.mark.parametrize("batched_tokens", [8192, 160])
def test_the_bypass_equals_auto(model, batched_tokens):
    """Same pages and code path, nothing quantized: mixed prefill and decode, chunks that end anywhere."""
    prompts = [prompt(length, length) for length in (700, 33, 129, 1000, 260, 161)]
    with engine(model, "auto") as llm:
        expected = generate(llm, prompts, max_tokens=80)
    for options in (BYPASS, {"kivi": {**BYPASS["kivi"], "sink_tokens": 3, "residual_length": 40}}):
        with engine(model, additional_config=options, max_num_batched_tokens=batched_tokens) as llm:
            for actual, wanted in zip(generate(llm, prompts, max_tokens=80), expected, strict=True):
                assert_same(actual, wanted)


@pytest.mark.parametrize("options", [{}, SINKS, {"kivi": {"residual_length": 0}}, {"kivi": {"group_size": 64}}])
def test_prefix_hit_equals_cold_at_the_same_boundary(model, options):
    long = prompt(701, 5)
    with engine(model, additional_config=options, enable_prefix_caching=True) as llm:
        generate(llm, [long], max_tokens=4)
        (hit,) = generate(llm, [long], max_tokens=48)
        boundary = hit.num_cached_tokens
    assert boundary >= 576
    with engine(model, additional_config=options, max_num_batched_tokens=boundary) as llm:
        (cold,) = generate(llm, [long], max_tokens=48)
    assert_same(hit, cold)


def test_a_shared_prefix_is_reused(model):
    """System prompt and questions: the second request finds the junction, the third resumes from it."""
    system = prompt(1000, 6)
    prompts = [system + prompt(90, seed) for seed in range(3)]
    with engine(model, enable_prefix_caching=True) as llm:
        hits = [generate(llm, [p], max_tokens=2)[0].num_cached_tokens for p in prompts]
    assert hits[0] == 0
    assert hits[2] >= 960


def test_alone_equals_in_a_batch(model):
    prompts = [prompt(length, length) for length in range(100, 900, 50)]
    with engine(model) as llm:
        alone = [generate(llm, [p])[0] for p in prompts[::5]]
        together = generate(llm, prompts)[::5]
    for actual, wanted in zip(together, alone, strict=True):
        assert_same(actual, wanted)


def test_preemption_changes_nothing(model):
    """Recomputed in one chunk, generated tokens attend as they did when they were decoded."""
    prompts = [prompt(length, length) for length in (100, 101, 170, 190)]
    with engine(model) as llm:
        calm = generate(llm, prompts, max_tokens=500)
    with engine(model, num_gpu_blocks_override=190, max_model_len=1024) as llm:
        preempted = count_preemptions(llm)
        pressed = generate(llm, prompts, max_tokens=500)
    assert preempted
    for actual, wanted in zip(pressed, calm, strict=True):
        assert_same(actual, wanted)


def test_any_block_permutation_gives_the_same_bits(model):
    prompts = [prompt(length, length) for length in (500, 77, 300)]
    with engine(model) as llm:
        expected = generate(llm, prompts)
        queue = block_pool(llm).free_block_queue
        blocks = queue.popleft_n(queue.num_free_blocks)
        random.Random(7).shuffle(blocks)
        queue.append_n(blocks)
        for actual, wanted in zip(generate(llm, prompts), expected, strict=True):
            assert_same_bits(actual, wanted)


def test_every_block_comes_back(model):
    with engine(model, additional_config=SINKS, enable_prefix_caching=True, max_num_batched_tokens=300) as llm:
        free = block_pool(llm).get_num_free_blocks()
        generate(llm, [prompt(length, length) for length in (1, 95, 96, 97, 400, 800, 1200)], max_tokens=70)
        assert block_pool(llm).get_num_free_blocks() == free
        assert llm.reset_prefix_cache()


def test_chunk_sizes(model):
    """Equal where nothing differs: in the window. Elsewhere a chunk reads its own tokens in full precision and earlier
    chunks quantized, so that other chunks are another computation."""
    prompts = [prompt(128, 1), prompt(640, 2)]
    outputs = {}
    for chunk in (128, 320, 8192):
        with engine(model, max_num_batched_tokens=chunk, max_num_seqs=1) as llm:
            outputs[chunk] = generate(llm, prompts, max_tokens=1, logprobs=5)
    for chunk in (320, 8192):
        assert_same(outputs[chunk][0], outputs[128][0])
        assert not torch.equal(logprobs(outputs[chunk][1]), logprobs(outputs[128][1]))


def test_sampling_features(model):
    long = prompt(400, 9)
    with engine(model, enable_prefix_caching=True) as llm:
        (many,) = generate(llm, [long], max_tokens=20, n=4, temperature=1.0, seed=3)
        assert len({tuple(tokens(many, i)) for i in range(4)}) > 1
        (again,) = generate(llm, [long], max_tokens=20, n=4, temperature=1.0, seed=3)
        assert [len(tokens(again, i)) for i in range(4)] == [20] * 4
        (scored,) = generate(llm, [long], max_tokens=2, prompt_logprobs=3)
        assert len(scored.prompt_logprobs) == len(long)


def test_skipped_layers_stay_in_full_precision(model):
    """All layers but one skipped, in the bypass: two page formats, two backends, one pool."""
    prompts = [prompt(700, 1), prompt(90, 2)]
    with engine(model, "auto") as llm:
        expected = generate(llm, prompts, max_tokens=50)
    with engine(model, additional_config=BYPASS, kv_cache_dtype_skip_layers=["0"]) as llm:
        assert {type(group.kv_cache_spec).__name__ for group in groups(llm)} == {
            "FullAttentionSpec",
            "FullPrecisionSpec",
        }
        assert len({group.kv_cache_spec.dtype for group in groups(llm)}) == 2
        for actual, wanted in zip(generate(llm, prompts, max_tokens=50), expected, strict=True):
            assert_same(actual, wanted)


def groups(llm):
    return scheduler(llm).kv_cache_manager.kv_cache_config.kv_cache_groups


def test_a_poisoned_request_stays_alone(tmp_path):
    """NaN keys of one request: every other request keeps its bits."""
    from safetensors.torch import load_file, save_file

    path = save_tiny_llama(tmp_path)
    weights = load_file(path / "model.safetensors")
    weights["model.embed_tokens.weight"][2] = float("nan")
    weights["model.embed_tokens.weight"][3] = float("inf")
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    clean = [[4 + t % 500 for t in prompt(length, length)] for length in (300, 77, 200)]
    never = {"max_tokens": 200, "logit_bias": {2: -100.0, 3: -100.0}}
    with engine(path) as llm:
        expected = generate(llm, [*clean, clean[0][:150]], **never)[:3]
        assert not any(logprobs(output).isnan().any() for output in expected)
        for poison in (2, 3):
            *others, bad = generate(llm, [*clean, [poison, *clean[0][1:150]]], **never)
            assert logprobs(bad)[:10].isnan().all()
            for actual, wanted in zip(others, expected, strict=True):
                assert_same_bits(actual, wanted)

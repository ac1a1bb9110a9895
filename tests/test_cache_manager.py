"""The full-precision group's manager inside vLLM's KVCacheManager, without a model: random schedules, invariants."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request

from vllm_kivi.backend.backend import PAGE_DTYPE, KiviAttentionBackend, full_precision_spec
from vllm_kivi.format import KVFormat

MAX_MODEL_LEN = 1024


def make_manager(num_blocks=400, caching=True, **options):
    fmt = KVFormat("kivi2", 64, 3, "bfloat16", **options)
    config = SimpleNamespace(
        model_config=SimpleNamespace(max_model_len=MAX_MODEL_LEN), num_speculative_tokens=0, max_in_flight_tokens=512
    )
    full = full_precision_spec(config, fmt)
    quantized = KiviAttentionBackend.bind(fmt).customize_spec(
        FullAttentionSpec(block_size=fmt.page_tokens, num_kv_heads=3, head_size=64, dtype=PAGE_DTYPE)
    )
    assert quantized.page_size_bytes == full.page_size_bytes == fmt.page_bytes
    init_none_hash(sha256)
    step = torch.tensor([fmt.page_tokens, fmt.full_page_tokens])
    lcm, gcd = int(torch.lcm(*step)), int(torch.gcd(*step))
    manager = KVCacheManager(
        KVCacheConfig(
            num_blocks=num_blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["a"], quantized), KVCacheGroupSpec(["a.full_precision"], full)],
            prefix_cache_retention_interval=0,
        ),
        max_model_len=MAX_MODEL_LEN,
        scheduler_block_size=lcm,
        hash_block_size=gcd,
        max_in_flight_tokens=512,
        enable_caching=caching,
    )
    return fmt, full, manager, get_request_block_hasher(gcd, sha256), lcm


def new_request(name, token_ids, hasher):
    return Request(name, token_ids, SamplingParams(max_tokens=400), None, block_hasher=hasher)


def held(manager, request):
    return manager.coordinator.get_blocks(request.request_id)


def check_step(fmt, manager, request, start, stop):
    """Every page that the step [start, stop) reads or writes is there, and no page serves two requests' new tokens."""
    quantized, full = held(manager, request)
    assert len(quantized) >= -(-stop // fmt.page_tokens) and not any(b.is_null for b in quantized)
    n = fmt.full_page_tokens
    boundary = min(fmt.boundary(start + 1), start // fmt.group_size * fmt.group_size)
    after = min(fmt.boundary(stop + 1), stop // fmt.group_size * fmt.group_size)
    needed = {
        p // n for p in [*range(boundary, start), *range(max(start, after), stop), *range(min(fmt.sink_tokens, stop))]
    }
    for block in needed:
        assert not full[block].is_null, (start, stop, block)
        assert full[block].ref_cnt > 0


def run(manager, request, start, stop):
    computed = hits = None
    if start == 0:
        hits, start, junction = manager.get_computed_blocks(request)
        request.shared_prefix_boundary = junction
        computed = start
    new = manager.allocate_slots(request, stop - start, computed or 0, hits)
    if new is None:
        return None
    check_args = (request, start, stop)
    request.num_computed_tokens = stop
    return check_args


@pytest.mark.parametrize(
    "options", [{}, {"sink_tokens": 4}, {"residual_length": 0}, {"group_size": 64, "sink_tokens": 30}]
)
@pytest.mark.parametrize("caching", [True, False])
def test_random_schedules(options, caching):
    rng = random.Random(repr(options))
    fmt, spec, manager, hasher, lcm = make_manager(num_blocks=110, caching=caching, **options)
    pool = manager.block_pool
    total = pool.get_num_free_blocks()
    prefixes = [[rng.randrange(1000) for _ in range(600)] for _ in range(3)]
    running, refused, hit_lengths = [], 0, []
    for step in range(1500):
        if len(running) < 6 and rng.random() < 0.3:
            ids = rng.choice(prefixes)[: rng.randrange(1, 600)] + [
                rng.randrange(1000) for _ in range(rng.randrange(1, 200))
            ]
            running.append(new_request(f"r{step}", ids, hasher))
        for request in list(running):
            start = request.num_computed_tokens
            if start < request.num_tokens:
                stop = min(start + rng.choice((1, 40, 300)), request.num_tokens)
                if start == 0:
                    # A hit may already cover the chunk.
                    stop = min(request.num_tokens, stop + manager.get_computed_blocks(request)[1])
            else:
                request.append_output_token_ids(rng.randrange(1000))
                stop = request.num_tokens
            if stop > MAX_MODEL_LEN or rng.random() < 0.02:
                manager.free(request)
                running.remove(request)
                continue
            done = run(manager, request, start, stop)
            if done is None:
                refused += 1
                manager.free(request)
                request.num_computed_tokens = 0
                if start == 0:
                    running.remove(request)
                continue
            if start == 0:
                hit_lengths.append(done[1])
            check_step(fmt, manager, *done)
            full = held(manager, request)[1]
            real = [b.block_id for b in full if not b.is_null]
            assert len(set(real)) == len(real)
            if not caching:
                assert len(real) <= spec.peak_blocks(MAX_MODEL_LEN)
                if stop - start == 1:
                    assert len(real) <= spec.window_blocks(MAX_MODEL_LEN)
        pages = [b.block_id for r in running for g in held(manager, r) for b in g if not b.is_null and b.ref_cnt == 1]
        assert len(set(pages)) == len(pages)
    for request in running:
        manager.free(request)
    assert pool.get_num_free_blocks() == total
    assert refused > 0, "the pool was never under pressure"
    if caching:
        assert any(hit_lengths) and all(length % lcm == 0 for length in hit_lengths)


def test_a_prompt_holds_only_what_stays():
    fmt, spec, manager, hasher, _ = make_manager(caching=False)
    request = new_request("r", list(range(900)), hasher)
    assert run(manager, request, 0, 900)
    real = [i for i, b in enumerate(held(manager, request)[1]) if not b.is_null]
    first = fmt.boundary(901)
    assert real == list(range(first // fmt.full_page_tokens, 150))
    assert len(real) <= spec.window_blocks(MAX_MODEL_LEN) == 28


def test_hits_need_sinks_and_window():
    fmt, _, manager, hasher, lcm = make_manager(sink_tokens=4)
    ids = list(range(800))
    first = new_request("a", ids, hasher)
    assert run(manager, first, 0, 800)
    manager.free(first)
    again = new_request("b", ids, hasher)
    hits, length, _ = manager.get_computed_blocks(again)
    assert length == 768 and length % lcm == 0
    sink = hits.blocks[1][0]
    assert not sink.is_null and not any(b.is_null for b in hits.blocks[1][fmt.boundary(769) // 6 :])
    # Without the sink page there is no hit, however much of the window is cached.
    manager.block_pool.evict_blocks({sink.block_id})
    assert manager.get_computed_blocks(again)[1] == 0


def test_capacity_is_what_fits():
    """As many requests of max_model_len as the spec says run side by side, and one more does not."""
    _, _, manager, hasher, _ = make_manager(num_blocks=1 + 5 * (MAX_MODEL_LEN // 32 + 28), caching=False)
    requests = [new_request(f"r{i}", list(range(i, i + MAX_MODEL_LEN - 1)), hasher) for i in range(6)]
    for request in requests[:5]:
        assert run(manager, request, 0, MAX_MODEL_LEN - 1)
    assert run(manager, requests[5], 0, MAX_MODEL_LEN - 1) is None
    for request in requests[:5]:
        request.append_output_token_ids(1)
        assert run(manager, request, MAX_MODEL_LEN - 1, MAX_MODEL_LEN)


def test_a_pool_too_small_for_one_request_is_refused():
    with pytest.raises(ValueError, match="max-model-len"):
        make_manager(num_blocks=60)


def test_a_runner_leaves_the_block_table_alone():
    """vLLM 0.33 would put the null block below a sliding window, and with it over the sinks."""
    config = SimpleNamespace(model_config=SimpleNamespace(max_model_len=MAX_MODEL_LEN), num_speculative_tokens=0)
    assert full_precision_spec(config, KVFormat("kivi2", 64, 3, "bfloat16", sink_tokens=4)).num_retained_tokens == 0


def test_tokens_that_are_written_get_no_pages_when_they_are_cached_later():
    """A prompt whose caching is delayed, as by KV connectors, then a token that needs no page."""
    _, spec, manager, hasher, _ = make_manager()
    request = new_request("a", list(range(351)), hasher)
    stop = 350
    assert stop % spec.block_size and spec.window_start(stop) > spec.window_start(stop // 96 * 96)
    assert manager.allocate_slots(request, stop, delay_cache_blocks=True) is not None
    request.num_computed_tokens = stop
    before = [block.block_id for block in held(manager, request)[1]]
    assert manager.allocate_slots(request, 1) is not None
    assert [block.block_id for block in held(manager, request)[1]] == before

"""The CUDA ops as torch sees them, and store and gather against the reference, which runs on the CPU on copies of the
same bytes.

store byte for byte over both whole pools: what is not owned stays poison. gather to the rounding of the model's dtype.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from conftest import POISON, Pool, check_op, filled_pool, int32, op_arguments, starts, tokens
from test_gather import (
    assert_gathered,
    assert_largest_is_finite,
    assert_rounded,
    pool_of_all_numbers,
    random_gather,
    rows_of,
)
from test_store import make_hostile, random_case
from torch import Tensor

from vllm_kivi import ops, reference
from vllm_kivi.format import PRESETS, KVFormat

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

DEVICE = "cuda"


def on_device(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def like_on_device(x: Tensor) -> Tensor:
    """With the same strides and the same offset in its memory, which Tensor.to does not keep."""
    memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return memory.to(DEVICE).as_strided(x.shape, x.stride(), x.storage_offset())


def assert_same_bytes(pool: Pool, expected: Pool) -> None:
    for name, ours, theirs in zip(("quantized", "full"), pool.memory(), expected.memory(), strict=True):
        assert torch.equal(ours.cpu(), theirs), f"{name} pages, {pool.fmt}"


def store_both(
    pool: Pool, expected: Pool, key: Tensor, value: Tensor, rows: Sequence[int], seq_lens: Sequence[int]
) -> None:
    """One step on the device into `pool` and by the reference into `expected`, which is on the CPU."""
    layout, batch = pool.fmt.layout(), (starts(rows), int32(seq_lens))
    reference.store(key, value, *expected.pages(), *batch, layout)
    ops.store(*on_device(key, value), *pool.pages(), *on_device(*batch), layout)


@pytest.mark.parametrize("name", ["store", "decode", "gather"])
def test_opcheck(name: str) -> None:
    fmt = KVFormat("kivi2", 64, num_kv_heads=2, dtype="bfloat16", residual_length=32)
    _, given = op_arguments(fmt)
    given = {key: value.to(DEVICE) if isinstance(value, Tensor) else value for key, value in given.items()}
    check_op(name, given | {"workspace": ops.decode_workspace(fmt.layout(), torch.device(DEVICE))})


@pytest.mark.parametrize("seed", range(10))
def test_store_equals_the_reference(seed: int) -> None:
    """20 cases a seed: shapes, presets, dtypes, hostile inputs, padding rows, and requests stored in several steps."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(20):
        fmt = random_case(rng)
        lengths = [rng.choice((1, fmt.group_size - 1, fmt.group_size, rng.randint(1, 150))) for _ in range(3)]
        keys, values = ([tokens(fmt, length, generator) for length in lengths] for _ in range(2))
        for x in (*keys, *values):
            make_hostile(x, rng)
        expected = Pool(fmt, lengths, seed=rng.randrange(1000), padding=rng.choice((0, 32)))
        if rng.random() < 0.3:  # a group without a page is not stored anywhere
            expected.quantized_table[rng.randrange(3), 0] = 0
        pool = expected.to(DEVICE)
        before = [0, 0, 0]
        while before != lengths:
            after = [rng.randint(start, end) for start, end in zip(before, lengths, strict=True)]
            if rng.random() < 0.3:
                after = lengths
            new = [slice(*span) for span in zip(before, after, strict=True)]
            padding = tokens(fmt, rng.choice((0, 5)), generator)
            key, value = (
                torch.cat([*(x[part] for x, part in zip(xs, new, strict=True)), padding]) for xs in (keys, values)
            )
            store_both(pool, expected, key, value, [part.stop - part.start for part in new], after)
            before = after
        assert_same_bytes(pool, expected)


@pytest.mark.parametrize("tuned", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_store_every_value_of_a_16_bit_type(dtype: str, preset: str, tuned: bool) -> None:
    """All 65,536 bit patterns in groups of neighbours, of strangers, and of one magnitude with either sign."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    magnitudes = patterns.view(2, -1).transpose(0, 1).reshape(-1)
    shuffled = patterns[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    fmt = KVFormat(preset, 64, num_kv_heads=1, dtype=dtype, scale_search=tuned, rotate_values=tuned)
    for x in (patterns, magnitudes, shuffled):
        key = x.contiguous().view(getattr(torch, dtype)).view(-1, 1, 64)
        expected = Pool(fmt, [len(key)])
        pool = expected.to(DEVICE)
        store_both(pool, expected, key, key.flip(2), [len(key)], [len(key)])
        assert_same_bytes(pool, expected)


def test_8_bit_codes_are_not_searched() -> None:
    """A group of which a narrower range would lose less: bfloat16 rounds its quotients that much."""
    fmt = KVFormat("kivi8", 128, num_kv_heads=1, dtype="bfloat16", group_size=128, scale_search=True)
    key = torch.full((128, 1, 128), 0.703125, dtype=torch.bfloat16)
    key[0], key[1] = -0.3, 1.0
    expected = Pool(fmt, [128])
    pool = expected.to(DEVICE)
    store_both(pool, expected, key, key.transpose(0, 2).contiguous(), [128], [128])
    assert_same_bytes(pool, expected)


def decode_step(num_reqs: int) -> tuple[list[int], list[int]]:
    """Rows and lengths of a step: mostly one row a request, some that complete a group, some without any."""
    rng = random.Random(num_reqs)
    rows = [rng.choice((1, 1, 1, 1, 0, 2)) for _ in range(num_reqs)]
    return rows, [count + rng.choice((0, 5, 30, 31, 32 - count)) for count in rows]


@pytest.mark.parametrize("preset", ["kivi2", "kivi2_boost"])
@pytest.mark.parametrize(
    ("rows", "seq_lens"),
    [
        ([1000], [1000]),
        ([0, 1, 700, 1, 1, 1200, 0, 2500, 3], [0, 32, 731, 64, 1, 1200, 7, 2600, 65]),
        decode_step(300),
        decode_step(1024),
    ],
    ids=["prefill", "mixed", "decode 300", "decode 1024"],
)
def test_store_many_rows(rows: list[int], seq_lens: list[int], preset: str) -> None:
    """Enough rows for blocks of several rows, up to the most there are, which then belong to many requests."""
    fmt = KVFormat(preset, 64, num_kv_heads=8, dtype="bfloat16")
    generator = torch.Generator().manual_seed(0)
    old = [length - count for length, count in zip(seq_lens, rows, strict=True)]
    expected = Pool(fmt, seq_lens)
    key, value = (tokens(fmt, sum(old), generator) for _ in range(2))
    ops.store(key, value, *expected.pages(), starts(old), int32(old), fmt.layout())
    pool = expected.to(DEVICE)
    key, value = (tokens(fmt, sum(rows) + 9, generator) for _ in range(2))
    store_both(pool, expected, key, value, rows, seq_lens)
    assert_same_bytes(pool, expected)


def test_store_touches_neither_null_block_nor_padding_rows() -> None:
    fmt = KVFormat("kivi2", 64, num_kv_heads=2, dtype="bfloat16", residual_length=0)
    pool = Pool(fmt, [96])
    pool.full_table[:] = 0
    pool.quantized_table[0, 1] = 0
    kept = pool.quantized_table[0, [0, 2]].tolist()
    pool = pool.to(DEVICE)
    key = tokens(fmt, 120, torch.Generator().manual_seed(0)).to(DEVICE)
    ops.store(key, key, *pool.pages(), *on_device(starts([96]), int32([96])), fmt.layout())
    assert (pool.full == POISON).all()
    changed = (pool.quantized != POISON).flatten(1).any(1).nonzero().flatten().tolist()
    assert changed == sorted(kept)


def test_store_skips_a_group_whose_old_tokens_are_gone() -> None:
    fmt = KVFormat("kivi2", 64, num_kv_heads=2, dtype="float16")
    pool = Pool(fmt, [64])
    pool.full_table[0, : 40 // fmt.full_page_tokens] = 0
    pool = pool.to(DEVICE)
    key = tokens(fmt, 24, torch.Generator().manual_seed(0)).to(DEVICE)
    ops.store(key, key, *pool.pages(), *on_device(starts([24]), int32([64])), fmt.layout())
    assert (pool.quantized == POISON).all()
    assert (pool.full != POISON).any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("offset", [0, 1])
def test_store_strided_rows(offset: int, dtype: str) -> None:
    """key and value may be slices of one fused projection, aligned or not."""
    fmt = KVFormat("kivi_k4v2", 80, num_kv_heads=2, dtype=dtype)
    wide = KVFormat("kivi2", 80, num_kv_heads=6, dtype=dtype)
    fused = torch.zeros(70, 6, 80 + 2 * offset, dtype=getattr(torch, dtype))[:, :, offset : 80 + offset]
    fused.copy_(tokens(wide, 70, torch.Generator().manual_seed(0)))
    key, value = fused[:, 2:4], fused[:, 4:6]
    expected = Pool(fmt, [70])
    pool = expected.to(DEVICE)
    rest = starts([70]), int32([70])
    reference.store(key, value, *expected.pages(), *rest, fmt.layout())
    ops.store(*(like_on_device(x) for x in (key, value)), *pool.pages(), *on_device(*rest), fmt.layout())
    assert_same_bytes(pool, expected)


@pytest.mark.parametrize("option", ["", "full_precision", "scale_search", "rotate_values"])
@pytest.mark.parametrize("preset", ["kivi2", "kivi2_boost"])
def test_store_in_a_cuda_graph(preset: str, option: str) -> None:
    """A captured step is replayed with other tokens, lengths and tables; requests come and go, rows are padding."""
    fmt = KVFormat(preset, 128, num_kv_heads=2, dtype="bfloat16", **({option: True} if option else {}))
    rng, generator = random.Random(0), torch.Generator().manual_seed(0)
    max_rows, num_reqs = 24, 5
    expected = Pool(fmt, [200] * num_reqs)
    pool = expected.to(DEVICE)
    key, value = (torch.zeros(max_rows, 2, 128, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    query_start_loc = torch.zeros(num_reqs + 1, dtype=torch.int32, device=DEVICE)
    seq_lens = torch.zeros(num_reqs, dtype=torch.int32, device=DEVICE)
    arguments = key, value, *pool.pages(), query_start_loc, seq_lens, fmt.layout()
    ops.store(*arguments)  # loads the extension; there is no row
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.store(*arguments)
    lengths = [0] * num_reqs
    for step in range(60):
        rows = [0] * num_reqs
        for _ in range(rng.randint(0, max_rows)):
            request = rng.randrange(num_reqs)
            rows[request] += lengths[request] + rows[request] < 200
        lengths = [length + count for length, count in zip(lengths, rows, strict=True)]
        new_key, new_value = (tokens(fmt, max_rows, generator) for _ in range(2))
        if step % 10 == 9:  # as after a preemption: the same request in other blocks, from the start
            for ours, theirs in zip(pool.pages()[2:], expected.pages()[2:], strict=True):
                num_pages = int((theirs[0] != 0).sum())
                theirs[0, :num_pages] = theirs[0, :num_pages].flip(0)
                ours.copy_(theirs)
            lengths[0] = rows[0]
        batch = starts(rows), int32(lengths)
        reference.store(new_key, new_value, *expected.pages(), *batch, fmt.layout())
        for static, new in zip((key, value, query_start_loc, seq_lens), (new_key, new_value, *batch), strict=True):
            static.copy_(new)
        graph.replay()
    assert_same_bytes(pool, expected)


# -------------------------------------------------------------------------------------------------------------- gather


@pytest.mark.parametrize("seed", range(10))
def test_gather_equals_the_reference(seed: int) -> None:
    """20 cases a seed; rows that are not asked for stay poison."""
    rng = random.Random(seed)
    for _ in range(20):
        pool, *asked = random_gather(rng)
        memory = rows_of(pool, sum(asked[0]) + rng.choice((0, 40)), rng.choice((0, 1, 8)), DEVICE)
        batch = starts(asked[0]), int32(asked[1]), int32(asked[2])
        key, value = memory[..., : pool.fmt.head_dim]
        ops.gather(key, value, *pool.to(DEVICE).pages(), *on_device(*batch), pool.fmt.layout())
        assert_gathered(pool, memory, *asked)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gather_of_codes_beyond_the_largest_number(dtype: str) -> None:
    pool = pool_of_all_numbers(dtype)
    memory = rows_of(pool, 32, 0, DEVICE)
    operands = *pool.to(DEVICE).pages(), *on_device(starts([32]), int32([0]), int32([32])), pool.fmt.layout()
    ops.gather(*memory[..., : pool.fmt.head_dim], *operands)
    assert_largest_is_finite(memory)


def test_gather_in_a_cuda_graph() -> None:
    """A captured gather is replayed for other requests and other numbers of rows."""
    fmt = KVFormat("kivi2", 64, num_kv_heads=2, dtype="bfloat16", sink_tokens=4)
    pool, _, _ = filled_pool(fmt, [300, 200])
    on_gpu = pool.to(DEVICE)
    key, value = (torch.zeros(256, 2, 64, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    start_loc = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    first, boundary = (torch.zeros(2, dtype=torch.int32, device=DEVICE) for _ in range(2))
    arguments = key, value, *on_gpu.pages(), start_loc, first, boundary, fmt.layout()
    ops.gather(*arguments)  # loads the extension; there is no row
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.gather(*arguments)
    for counts, firsts, limits in (
        ([256, 0], [0, 0], [160, 64]),
        ([0, 100], [7, 100], [0, 160]),
        ([3, 64], [90, 32], [96, 96]),
    ):
        for static, new in zip(
            (start_loc, first, boundary), (starts(counts), int32(firsts), int32(limits)), strict=True
        ):
            static.copy_(new)
        graph.replay()
        for request, (start, end) in enumerate(itertools.pairwise(starts(counts).tolist())):
            if start == end:
                continue
            tables = pool.quantized_table[request], pool.full_table[request]
            stop = firsts[request] + end - start
            exact = reference.gather_dequantized(fmt, pool.quantized, pool.full, *tables, stop, limits[request])
            for ours, theirs in zip((key, value), exact, strict=True):
                assert_rounded(ours[start:end].cpu(), theirs[firsts[request] :], 0.0, f"request {request}")

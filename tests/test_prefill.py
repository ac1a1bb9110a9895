"""The prefill kernel against float64 attention over what the pages and the chunk hold."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from conftest import MIXTURES, POISON, Pool, assert_as_exact_as_torch, filled_pool, int32, starts
from test_decode import RATIOS, decode, queries
from torch import Tensor

from vllm_kivi import ops, reference
from vllm_kivi.format import ACCEPTED_FRACTIONS, DTYPE_BYTES, GROUP_SIZES, HEAD_DIMS, PRESETS, KVFormat


def chunks(xs: Sequence[Tensor], num_rows: Sequence[int]) -> Tensor:
    """The last rows of each request."""
    return torch.cat([x[len(x) - count :] for x, count in zip(xs, num_rows, strict=True)])


def prefill(
    pool: Pool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_rows: Sequence[int],
    num_prompt: Sequence[int] | None = None,
    soft_cap: float = 0.0,
) -> Tensor:
    output = torch.full_like(query, 7.0)
    batch = starts(num_rows), int32(pool.seq_lens), int32(pool.seq_lens if num_prompt is None else num_prompt)
    rest = query.shape[-1] ** -0.5, soft_cap, pool.fmt.layout()
    ops.prefill(output, query, key, value, *pool.pages(), *batch, *rest)
    return output


def check(
    pool: Pool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_rows: Sequence[int],
    num_prompt: Sequence[int] | None = None,
    soft_cap: float = 0.0,
) -> Tensor:
    """Prefills and compares with the oracle; returns the output."""
    fmt, scale = pool.fmt, query.shape[-1] ** -0.5
    num_prompt = pool.seq_lens if num_prompt is None else num_prompt
    output = prefill(pool, query, key, value, num_rows, num_prompt, soft_cap)
    rest = starts(num_rows), int32(pool.seq_lens), int32(num_prompt), scale, soft_cap, fmt.layout()
    exact = reference.prefill_float64(query, key, value, *pool.pages(), *rest)
    context, first = [], 0
    for request, (count, length) in enumerate(zip(num_rows, pool.seq_lens, strict=True)):
        before = length - count
        tables = pool.quantized_table[request], pool.full_table[request]
        for i in range(count):
            position = before + i
            in_prompt = position < num_prompt[request]
            boundary = min(fmt.boundary(before + 1), before) if in_prompt else fmt.boundary(position + 1)
            chunk = slice(first, first + i + 1)
            context.append(
                reference.gather_dequantized(
                    fmt, pool.quantized, pool.full, *tables, position + 1, boundary, key[chunk], value[chunk]
                )
            )
        first += count
    assert_as_exact_as_torch(output, exact, query, context, scale, soft_cap)
    return output


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_and_shapes(preset: str, head_dim: int, dtype: str) -> None:
    """Every preset, head size and dtype; group sizes, ratios, sinks, windows and chunks take turns."""
    rng = random.Random(f"{preset} {head_dim} {dtype}")
    group_size = rng.choice(GROUP_SIZES)
    fmt = KVFormat(
        preset,
        head_dim,
        num_kv_heads=1,
        dtype=dtype,
        group_size=group_size,
        residual_length=rng.choice((0, 32, 128)),
        sink_tokens=rng.choice((0, 4)),
        page_tokens=group_size * rng.randint(1, 2),
        rotate_values=rng.random() < 0.5,
    )
    lengths = [40, 40 + group_size, 170]
    num_rows = [40, rng.randint(1, 40), rng.randint(1, 40)]
    pool, keys, values = filled_pool(fmt, lengths)
    query = queries(fmt, sum(num_rows), rng.choice(RATIOS))
    check(pool, query, chunks(keys, num_rows), chunks(values, num_rows), num_rows)


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@pytest.mark.parametrize("rotate_values", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_instruction_sets(preset: str, rotate_values: bool, dtype: str, isa: str) -> None:
    fmt = KVFormat(
        preset, 80, num_kv_heads=1, dtype=dtype, residual_length=32, sink_tokens=4, rotate_values=rotate_values
    )
    num_rows = [20, 30]
    pool, keys, values = filled_pool(fmt, [20, 150])
    query = queries(fmt, sum(num_rows), 3)
    check(pool, query, chunks(keys, num_rows), chunks(values, num_rows), num_rows)


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("fraction", ACCEPTED_FRACTIONS)
def test_boosted_channels(fraction: int, head_dim: int, dtype: str, isa: str) -> None:
    fmt = KVFormat(
        "kivi2_boost",
        head_dim,
        num_kv_heads=1,
        dtype=dtype,
        group_size=64,
        residual_length=32,
        rotate_values=True,
        boosted_fraction=fraction,
    )
    pool, keys, values = filled_pool(fmt, [250])
    check(pool, queries(fmt, 9, 2), keys[0][-9:], values[0][-9:], [9])


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("k_bits", "v_bits"), MIXTURES)
def test_mixed_bits(k_bits: int, v_bits: int, group_size: int, isa: str) -> None:
    for dtype, head_dim in (("bfloat16", 80), ("float32", 128)):
        fmt = KVFormat(
            "kivi2",
            head_dim,
            num_kv_heads=1,
            dtype=dtype,
            group_size=group_size,
            residual_length=32,
            sink_tokens=37,
            rotate_values=True,
            k_bits=k_bits,
            v_bits=v_bits,
        )
        num_rows = [5, 9]
        pool, keys, values = filled_pool(fmt, [100, 300])
        check(pool, queries(fmt, 14, 3), chunks(keys, num_rows), chunks(values, num_rows), num_rows)


@pytest.mark.parametrize("residual_length", [0, 32])
@pytest.mark.parametrize("before", [0, 1, 31, 32, 33, 63, 64, 65, 100])
def test_chunk_edges(before: int, residual_length: int) -> None:
    """Chunks that begin at, before and after a group or page edge, with lengths around an edge."""
    fmt = KVFormat(
        "kivi2_boost",
        64,
        num_kv_heads=1,
        dtype="float32",
        residual_length=residual_length,
        sink_tokens=4,
        page_tokens=64,
        rotate_values=True,
    )
    num_rows = [1, 2, 31, 32, 33, 65]
    pool, keys, values = filled_pool(fmt, [before + count for count in num_rows])
    query = queries(fmt, sum(num_rows), 5)
    check(pool, query, chunks(keys, num_rows), chunks(values, num_rows), num_rows)


def test_long_cold_prompt() -> None:
    fmt = KVFormat("kivi2", 64, num_kv_heads=1, dtype="bfloat16")
    pool, keys, values = filled_pool(fmt, [700])
    check(pool, queries(fmt, 700, 3), keys[0], values[0], [700])


def test_many_query_heads() -> None:
    """More query heads a KV head than rows in the kernel's tile."""
    fmt = KVFormat("kivi2", 64, num_kv_heads=1, dtype="float32", residual_length=32)
    pool, keys, values = filled_pool(fmt, [100])
    check(pool, queries(fmt, 3, 100), keys[0][-3:], values[0][-3:], [3])


@pytest.mark.parametrize("residual_length", [0, 32, 128])
def test_recomputed_rows_attend_as_decoded(residual_length: int, isa: str) -> None:
    """A preempted request that comes back in one chunk: rows after the prompt read what they read when decoded."""
    fmt = KVFormat(
        "kivi2_boost",
        64,
        num_kv_heads=2,
        dtype="float32",
        residual_length=residual_length,
        sink_tokens=4,
        rotate_values=True,
    )
    lengths, num_prompt = [300, 90], [150, 20]
    pool, keys, values = filled_pool(fmt, lengths)
    query = queries(fmt, sum(lengths), 3)
    output = check(pool, query, torch.cat(keys), torch.cat(values), lengths, num_prompt)
    for request, first in ((0, 0), (1, 300)):
        for position in (num_prompt[request], num_prompt[request] + 13, lengths[request] - 1):
            shorter = Pool(fmt, [position + 1])
            shorter.quantized_table, shorter.full_table = (
                table[request : request + 1] for table in (pool.quantized_table, pool.full_table)
            )
            shorter.quantized, shorter.full = pool.quantized, pool.full
            decoded = decode(shorter, query[first + position : first + position + 1], [1])
            torch.testing.assert_close(output[first + position], decoded[0], rtol=1e-5, atol=1e-5)


def test_soft_cap(isa: str) -> None:
    for dtype in DTYPE_BYTES:
        fmt = KVFormat("kivi2", 64, num_kv_heads=1, dtype=dtype, residual_length=32, sink_tokens=4)
        num_rows = [20, 50]
        pool, keys, values = filled_pool(fmt, [120, 50])
        query = queries(fmt, sum(num_rows), 4)
        for soft_cap in (0.5, 20.0):
            check(pool, query, chunks(keys, num_rows), chunks(values, num_rows), num_rows, soft_cap=soft_cap)


def test_full_precision_bypass(isa: str) -> None:
    for dtype in DTYPE_BYTES:
        fmt = KVFormat("kivi2", 96, num_kv_heads=2, dtype=dtype, residual_length=32, sink_tokens=4, full_precision=True)
        num_rows = [40, 33]
        pool, keys, values = filled_pool(fmt, [40, 200])
        query = queries(fmt, sum(num_rows), 3)
        check(pool, query, chunks(keys, num_rows), chunks(values, num_rows), num_rows)


def test_bits_do_not_depend_on_the_batch(isa: str) -> None:
    fmt = KVFormat("kivi2", 64, num_kv_heads=2, dtype="bfloat16", residual_length=32)
    lengths, num_rows = [50, 400, 130], [50, 77, 1]
    pool, keys, values = filled_pool(fmt, lengths)
    query, key, value = queries(fmt, sum(num_rows), 3), chunks(keys, num_rows), chunks(values, num_rows)
    together = prefill(pool, query, key, value, num_rows)
    first = 0
    for request, count in enumerate(num_rows):
        rows = slice(first, first + count)
        first += count
        alone = Pool(fmt, [lengths[request]], seed=7)
        rest = starts([lengths[request]]), int32([lengths[request]]), fmt.layout()
        ops.store(keys[request], values[request], *alone.pages(), *rest)
        assert torch.equal(prefill(alone, query[rows], key[rows], value[rows], [count]), together[rows])


def test_bad_tokens_stay_local(isa: str) -> None:
    """inf and NaN reach neither other requests nor rows of the same chunk that come before them."""
    fmt = KVFormat("kivi2", 64, num_kv_heads=2, dtype="bfloat16", residual_length=32)
    lengths = [100, 100]
    pool, keys, values = filled_pool(fmt, lengths)
    query = queries(fmt, 200, 3)
    expected = prefill(pool, query, torch.cat(keys), torch.cat(values), lengths)
    keys[0][70:, :, 5] = float("nan")
    values[0][75:] = float("nan")
    values[0][80:, :, ::2] = float("inf")
    output = prefill(pool, query, torch.cat(keys), torch.cat(values), lengths)
    assert torch.equal(output[:70], expected[:70])
    assert torch.equal(output[100:], expected[100:])
    assert not torch.isfinite(output[75:100]).all()


def test_padding_rows_and_idle_requests() -> None:
    fmt = KVFormat("kivi2", 64, num_kv_heads=1, dtype="float32")
    pool, keys, values = filled_pool(fmt, [50, 0, 70])
    query = queries(fmt, 90, 2)
    num_rows = [5, 0, 70]
    key, value = (torch.cat([chunks(xs, num_rows), torch.zeros(15, 1, 64)]) for xs in (keys, values))
    output = prefill(pool, query, key, value, num_rows)
    assert (output[75:] == 7.0).all()
    check(pool, query[:75], key[:75], value[:75], num_rows)


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_elements_that_a_row_does_not_see(dtype: str, isa: str) -> None:
    """Values of 16 bits in a quantized page may be NaN, where rows of the same tile have other boundaries."""
    fmt = KVFormat("kivi2", 64, num_kv_heads=1, dtype=dtype, residual_length=0, v_bits=16)
    pool, keys, values = filled_pool(fmt, [100])
    query, num_rows = queries(fmt, 40, 1), [40]
    given = keys[0][60:], values[0][60:]
    expected = prefill(pool, query, *given, num_rows, num_prompt=[0])
    first = fmt.v_codes_offset + 31 * 64 * fmt.element_bytes  # of token 95, in a group that rows from it on read
    tile = pool.quantized[pool.quantized_table[0, 2]]
    tile[:, first : first + 64 * fmt.element_bytes] = POISON
    output = prefill(pool, query, *given, num_rows, num_prompt=[0])
    assert torch.equal(output[:35], expected[:35])
    assert output[35:].isnan().all()

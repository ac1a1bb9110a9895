"""The decode kernel against float64 attention over what the pages hold."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from conftest import MIXTURES, POISON, Pool, assert_as_exact_as_torch, filled_pool, int32, starts, tokens
from torch import Tensor

from vllm_kivi import ops, reference
from vllm_kivi.format import ACCEPTED_FRACTIONS, DTYPE_BYTES, GROUP_SIZES, HEAD_DIMS, PRESETS, KVFormat

RATIOS = (1, 3, 4, 5, 7)


def decode(pool: Pool, query: Tensor, num_rows: Sequence[int], soft_cap: float = 0.0) -> Tensor:
    output = torch.full_like(query, 7.0)
    rest = starts(num_rows), int32(pool.seq_lens), query.shape[-1] ** -0.5, soft_cap, pool.fmt.layout()
    ops.decode(output, query, *pool.pages(), *rest)
    return output


def check(pool: Pool, query: Tensor, num_rows: Sequence[int], soft_cap: float = 0.0) -> Tensor:
    """Decodes and compares with the oracle; returns the output."""
    output = decode(pool, query, num_rows, soft_cap)
    assert_exact(pool, query, num_rows, output, soft_cap)
    return output


def assert_exact(pool: Pool, query: Tensor, num_rows: Sequence[int], output: Tensor, soft_cap: float = 0.0) -> None:
    """Compares what decode wrote with the oracle over the pool's pages."""
    fmt, scale = pool.fmt, query.shape[-1] ** -0.5
    rest = starts(num_rows), int32(pool.seq_lens), scale, soft_cap, fmt.layout()
    exact = reference.decode_float64(query, *pool.pages(), *rest)
    context = []
    for request, (count, length) in enumerate(zip(num_rows, pool.seq_lens, strict=True)):
        tables = pool.quantized_table[request], pool.full_table[request]
        for num_tokens in range(length - count + 1, length + 1):
            boundary = fmt.boundary(num_tokens)
            context.append(reference.gather_dequantized(fmt, pool.quantized, pool.full, *tables, num_tokens, boundary))
    assert_as_exact_as_torch(output, exact, query, context, scale, soft_cap)


def queries(fmt: KVFormat, rows: int, ratio: int, seed: int = 0) -> Tensor:
    shape = (rows, fmt.num_kv_heads * ratio, fmt.head_dim)
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(getattr(torch, fmt.dtype))


def edge_lengths(fmt: KVFormat) -> list[int]:
    g, n, r = fmt.group_size, fmt.page_tokens, fmt.residual_length
    return sorted({1, g - 1, g, g + 1, n, n + 1, 2 * n, r + g - 1, r + g, r + g + 1, r + n + 1, 300})


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_and_shapes(preset: str, head_dim: int, dtype: str) -> None:
    """Every preset, head size and dtype; group sizes, ratios, sinks and windows take turns."""
    rng = random.Random(f"{preset} {head_dim} {dtype}")
    group_size = rng.choice(GROUP_SIZES)
    fmt = KVFormat(
        preset,
        head_dim,
        num_kv_heads=rng.randint(1, 2),
        dtype=dtype,
        group_size=group_size,
        residual_length=rng.choice((0, 32, 128)),
        sink_tokens=rng.choice((0, 4)),
        page_tokens=group_size * rng.randint(1, 2),
        rotate_values=rng.random() < 0.5,
    )
    lengths = rng.sample(edge_lengths(fmt), 5)
    pool, _, _ = filled_pool(fmt, lengths, window=fmt.residual_length + group_size)
    check(pool, queries(fmt, 5, rng.choice(RATIOS)), [1] * 5)


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@pytest.mark.parametrize("rotate_values", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_instruction_sets(preset: str, rotate_values: bool, dtype: str, isa: str) -> None:
    fmt = KVFormat(
        preset, 80, num_kv_heads=2, dtype=dtype, residual_length=32, sink_tokens=4, rotate_values=rotate_values
    )
    pool, _, _ = filled_pool(fmt, [1, 64, 97, 200])
    check(pool, queries(fmt, 4, 3), [1] * 4)


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("fraction", ACCEPTED_FRACTIONS)
def test_boosted_channels(fraction: int, head_dim: int, dtype: str, isa: str) -> None:
    """Every number of them, also in several splits and tiles a block; a few channels hold most of the scores."""
    fmt = KVFormat(
        "kivi2_boost",
        head_dim,
        num_kv_heads=2,
        dtype=dtype,
        group_size=random.Random(f"{fraction} {head_dim} {dtype}").choice(GROUP_SIZES),
        residual_length=32,
        sink_tokens=4,
        rotate_values=True,
        boosted_fraction=fraction,
    )
    pool = Pool(fmt, [1300, 555])
    generator = torch.Generator().manual_seed(0)
    key, value = (tokens(fmt, 1855, generator) for _ in range(2))
    key[..., 5::31] *= 3
    ops.store(key, value, *pool.pages(), starts([1300, 555]), int32([1300, 555]), fmt.layout())
    check(pool, queries(fmt, 2, 5), [1, 1])


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("k_bits", "v_bits"), MIXTURES)
def test_mixed_bits(k_bits: int, v_bits: int, group_size: int, isa: str) -> None:
    """Blocks of several tiles, sinks in the first, several rows; head sizes that are no multiple of the unit."""
    for dtype, head_dim, ratio in (("bfloat16", 80, 3), ("float16", 64, 5), ("float32", 128, 1)):
        fmt = KVFormat(
            "kivi2",
            head_dim,
            num_kv_heads=2,
            dtype=dtype,
            group_size=group_size,
            residual_length=32,
            sink_tokens=37,
            page_tokens=2 * group_size,
            rotate_values=True,
            k_bits=k_bits,
            v_bits=v_bits,
        )
        pool, _, _ = filled_pool(fmt, [64, 200, 1500], window=32 + group_size)
        check(pool, queries(fmt, 3, ratio), [1] * 3)


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@pytest.mark.parametrize(("k_bits", "v_bits"), [(16, 2), (2, 16), (16, 16)])
def test_elements_of_sinks_are_not_read(k_bits: int, v_bits: int, dtype: str, isa: str) -> None:
    """What a tile holds for tokens that are read from elsewhere may be anything."""
    fmt = KVFormat("kivi2", 64, 2, dtype, residual_length=32, sink_tokens=40, k_bits=k_bits, v_bits=v_bits)
    pool, _, _ = filled_pool(fmt, [150])
    query = queries(fmt, 1, 3)
    expected = decode(pool, query, [1])
    for page, count in ((0, 32), (1, 8)):
        tile = pool.quantized[pool.quantized_table[0, page]]
        for offset, bits in ((fmt.k_codes_offset, k_bits), (fmt.v_codes_offset, v_bits)):
            if bits == 16:
                tile[:, offset : offset + count * 64 * fmt.element_bytes] = POISON
    assert torch.equal(decode(pool, query, [1]), expected)


def test_unwritten_pages_stay_local(isa: str) -> None:
    """Pages whose scales have any signs, none or all of them: other requests keep their bits."""
    for dtype in ("bfloat16", "float32"):
        fmt = KVFormat("kivi2_boost", 128, num_kv_heads=2, dtype=dtype, residual_length=32)
        lengths = [600, 200, 600]
        pool, _, _ = filled_pool(fmt, lengths)
        query = queries(fmt, 3, 3)
        expected = decode(pool, query, [1, 1, 1])
        blocks = pool.quantized_table[0, : 600 // fmt.page_tokens].long()
        for byte in (0x00, 0x7F, 0x80, 0xFF):
            pool.quantized[blocks] = byte
            assert torch.equal(decode(pool, query, [1, 1, 1])[1:], expected[1:])


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("sink_tokens", [0, 4, 33])
@pytest.mark.parametrize("residual_length", [0, 32, 128])
def test_every_edge(residual_length: int, sink_tokens: int, group_size: int) -> None:
    fmt = KVFormat(
        "kivi2",
        64,
        num_kv_heads=1,
        dtype="float32",
        group_size=group_size,
        residual_length=residual_length,
        sink_tokens=sink_tokens,
        page_tokens=2 * group_size,
    )
    lengths = edge_lengths(fmt)
    pool, _, _ = filled_pool(fmt, lengths, window=residual_length + group_size)
    check(pool, queries(fmt, len(lengths), 3), [1] * len(lengths))


@pytest.mark.parametrize("ratio", [*RATIOS, 8, 9, 16])
def test_ratios(ratio: int, isa: str) -> None:
    fmt = KVFormat("kivi2", 64, num_kv_heads=2, dtype="bfloat16", residual_length=32)
    pool, _, _ = filled_pool(fmt, [150, 600])
    check(pool, queries(fmt, 2, ratio), [1, 1])


@pytest.mark.parametrize("num_rows", [2, 3, 4, 5])
@pytest.mark.parametrize("residual_length", [0, 32])
def test_speculative_rows(residual_length: int, num_rows: int) -> None:
    """Each row has the boundary of its own length, also where one boundary lies between two rows of a step."""
    fmt = KVFormat(
        "kivi2_boost",
        64,
        num_kv_heads=2,
        dtype="float32",
        residual_length=residual_length,
        sink_tokens=4,
        rotate_values=True,
    )
    lengths = [num_rows, 31, 32, 33, 34, 35, 36, 63, 64, 65, 66, 98, 130]
    counts = [min(num_rows, length) for length in lengths]
    counts[3] = 1
    pool, _, _ = filled_pool(fmt, lengths, window=residual_length + fmt.group_size + num_rows)
    check(pool, queries(fmt, sum(counts), 3), counts)


def test_soft_cap(isa: str) -> None:
    for dtype in DTYPE_BYTES:
        fmt = KVFormat("kivi2", 64, num_kv_heads=2, dtype=dtype, residual_length=32, sink_tokens=4)
        pool, _, _ = filled_pool(fmt, [150, 600])
        for soft_cap in (0.5, 20.0):
            check(pool, queries(fmt, 2, 4), [1, 1], soft_cap)


def test_long_context() -> None:
    """131,072 tokens: more splits than the kernel allows a request, so splits get longer."""
    fmt = KVFormat("kivi2", 64, num_kv_heads=1, dtype="bfloat16", page_tokens=96)
    pool, _, _ = filled_pool(fmt, [131072, 33000], window=160)
    check(pool, queries(fmt, 2, 3), [1, 1])


@pytest.mark.parametrize("preset", PRESETS)
def test_full_precision_bypass(preset: str, isa: str) -> None:
    """Nothing is quantized, so the oracle is attention over the tokens themselves."""
    for dtype in DTYPE_BYTES:
        fmt = KVFormat(preset, 96, num_kv_heads=2, dtype=dtype, residual_length=32, sink_tokens=4, full_precision=True)
        pool, keys, values = filled_pool(fmt, [40, 333], window=64)
        query = queries(fmt, 2, 3)
        output = check(pool, query, [1, 1])
        for row, (k, v) in enumerate(zip(keys, values, strict=True)):
            exact = torch.nn.functional.scaled_dot_product_attention(
                query[row, :, None].double(), k.double().transpose(0, 1), v.double().transpose(0, 1), enable_gqa=True
            )[:, 0]
            torch.testing.assert_close(output[row].double(), exact, rtol=0, atol=2e-2 if dtype != "float32" else 2e-6)


def test_bits_do_not_depend_on_the_batch(isa: str) -> None:
    """Alone or among others, on any blocks, with any number of threads: the same bits."""
    fmt = KVFormat(
        "kivi2_boost", 64, num_kv_heads=2, dtype="bfloat16", residual_length=32, sink_tokens=4, rotate_values=True
    )
    lengths = [1, 40, 700, 1500, 4000]
    query = queries(fmt, len(lengths), 3)
    pool, keys, values = filled_pool(fmt, lengths)
    together = decode(pool, query, [1] * len(lengths))
    num_threads = torch.get_num_threads()
    try:
        for seed, threads in ((1, 1), (2, 2), (3, 3)):
            torch.set_num_threads(threads)
            other = Pool(fmt, lengths, seed)
            rest = starts(lengths), int32(lengths), fmt.layout()
            ops.store(torch.cat(keys), torch.cat(values), *other.pages(), *rest)
            assert torch.equal(decode(other, query, [1] * len(lengths)), together)
    finally:
        torch.set_num_threads(num_threads)
    for request, length in enumerate(lengths):
        alone = Pool(fmt, [length], seed=9)
        rest = starts([length]), int32([length]), fmt.layout()
        ops.store(keys[request], values[request], *alone.pages(), *rest)
        assert torch.equal(decode(alone, query[request : request + 1], [1])[0], together[request])


def test_bad_neighbours_stay_local(isa: str) -> None:
    """NaN and inf among a request's tokens leave the bits of the others alone."""
    fmt = KVFormat("kivi2", 64, num_kv_heads=2, dtype="bfloat16", residual_length=32)
    lengths = [200, 200, 200]
    clean, keys, values = filled_pool(fmt, lengths)
    query = queries(fmt, 3, 3)
    expected = decode(clean, query, [1, 1, 1])
    keys[1][::7, :, ::3] = float("nan")
    values[1][3::11] = float("inf")
    pool = Pool(fmt, lengths)
    rest = starts(lengths), int32(lengths), fmt.layout()
    ops.store(torch.cat(keys), torch.cat(values), *pool.pages(), *rest)
    output = decode(pool, query, [1, 1, 1])
    assert torch.equal(output[[0, 2]], expected[[0, 2]])


def test_unused_bytes_are_not_read(isa: str) -> None:
    """Poison in all that no row may read: tokens behind the window, codes and scales past the boundary and of sinks."""
    fmt = KVFormat(
        "kivi2_boost",
        64,
        num_kv_heads=2,
        dtype="bfloat16",
        residual_length=32,
        sink_tokens=4,
        page_tokens=64,
        rotate_values=True,
    )
    lengths = [150, 99]
    pool, _, _ = filled_pool(fmt, lengths)
    query = queries(fmt, 2, 3)
    expected = decode(pool, query, [1, 1])
    for request, length in enumerate(lengths):
        boundary, n = fmt.boundary(length), fmt.full_page_tokens
        for position in range(pool.full_table.shape[1] * n):
            block = pool.full_table[request, position // n]
            if block != 0 and not (position < 4 or boundary <= position < length):
                start = position % n * fmt.full_token_bytes
                pool.full[block, :, start : start + fmt.full_token_bytes] = POISON
        for position in range(0, pool.quantized_table.shape[1] * fmt.page_tokens, fmt.group_size):
            block = pool.quantized_table[request, position // fmt.page_tokens]
            start = position % fmt.page_tokens // fmt.group_size * fmt.tile_bytes
            if block != 0 and position >= boundary:
                pool.quantized[block, :, start : start + fmt.tile_bytes] = POISON
            elif position == 0:
                for offset in (fmt.v_scale_offset, fmt.v_zero_offset):
                    for group in range(fmt.num_value_groups):
                        first = start + offset + group * fmt.group_size * fmt.element_bytes
                        pool.quantized[block, :, first : first + 4 * fmt.element_bytes] = POISON
    pool.quantized[0], pool.full[0] = POISON, POISON
    assert torch.equal(decode(pool, query, [1, 1]), expected)


def test_padding_rows_and_idle_requests() -> None:
    """Rows past query_start_loc are not written; a request without rows costs nothing and may be empty."""
    fmt = KVFormat("kivi2", 64, num_kv_heads=1, dtype="float32")
    pool, _, _ = filled_pool(fmt, [50, 0, 70])
    query = queries(fmt, 5, 2)
    output = decode(pool, query, [1, 0, 1])
    assert (output[2:] == 7.0).all()
    check(pool, query[:2], [1, 0, 1])

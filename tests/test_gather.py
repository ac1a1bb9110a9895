"""gather against the reference, to the rounding of the model's dtype. GPU kernels share the checks."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from conftest import MIXTURES, POISON, Pool, filled_pool, int32, starts, tokens
from test_store import random_case
from torch import Tensor

from vllm_kivi import ops, reference
from vllm_kivi.format import DTYPE_BYTES, GROUP_SIZES, HEAD_DIMS, PRESETS, KVFormat


def assert_rounded(ours: Tensor, exact: Tensor, slack: Tensor | float, message: str) -> None:
    """`ours` is `exact`, float64, computed in float32 with one rounding and a `slack`, then rounded to its dtype."""
    limits = torch.finfo(ours.dtype)
    bound = exact.abs() * (limits.eps / 2 + 2**-24) + limits.smallest_normal * limits.eps + slack
    assert ((ours.double() - exact).abs() <= bound).all(), message


def random_gather(rng: random.Random, mixed: bool = False) -> tuple[Pool, list[int], list[int], list[int]]:
    """A pool, and of each request how many tokens are asked for, from which on, and the boundary.

    Any first token, any boundary, sinks; a page in full precision is there only where it is read.
    """
    fmt = random_case(rng, mixed)
    lengths = [rng.choice((1, fmt.group_size, rng.randint(1, 300))) for _ in range(3)]
    pool, _, _ = filled_pool(fmt, lengths, seed=rng.randrange(1000))
    first = [rng.choice((0, rng.randrange(length))) for length in lengths]
    counts = [
        rng.choice((0, length - start, rng.randint(0, length - start)))
        for start, length in zip(first, lengths, strict=True)
    ]
    boundary = [rng.choice((0, length // fmt.group_size * fmt.group_size)) for length in lengths]
    boundary = [rng.choice((limit, rng.randint(0, limit))) for limit in boundary]
    for row, limit in zip(pool.full_table, boundary, strict=True):
        n = fmt.full_page_tokens
        row[-(-fmt.sink_tokens // n) : limit // n] = 0
    return pool, counts, first, boundary


def rows_of(pool: Pool, num_rows: int, padding: int, device: torch.device | str = "cpu") -> Tensor:
    """Memory for keys and values [2, num_rows, H, D + padding]; every byte is NaN's."""
    shape = 2, num_rows, pool.fmt.num_kv_heads, pool.fmt.head_dim + padding
    return torch.full(shape, float("nan"), dtype=pool.dtype, device=device)


def assert_gathered(
    pool: Pool, memory: Tensor, counts: Sequence[int], first: Sequence[int], boundary: Sequence[int], fused: bool = True
) -> None:
    """What gather wrote to `rows_of`; the rest of it is still NaN. Without `fused` a product is rounded as well."""
    fmt, memory = pool.fmt, memory.cpu()
    assert memory[..., fmt.head_dim :].isnan().all()
    assert memory[:, sum(counts) :].isnan().all()
    for request, (start, end) in enumerate(itertools.pairwise(starts(counts).tolist())):
        if start == end:
            continue
        tables, stop = (pool.quantized_table[request], pool.full_table[request]), first[request] + end - start
        # Tokens from the boundary on are exact, so what lies before `first` need not be there.
        exact = reference.gather_dequantized(fmt, pool.quantized, pool.full, *tables, stop, boundary[request])
        for kind, ours, theirs in zip("kv", memory[..., : fmt.head_dim], exact, strict=True):
            slack = 0.0 if fused else 2**-22 * theirs.abs().max()
            theirs = theirs[first[request] :]
            if kind == "v" and fmt.rotate_values:  # a sum over the vector
                slack = slack + 2**-21 * theirs.norm(dim=-1, keepdim=True)
            assert_rounded(ours[start:end], theirs, slack, f"{kind} of request {request} from {first}, {fmt}")


def gather(
    pool: Pool,
    counts: Sequence[int],
    first: Sequence[int],
    boundary: Sequence[int],
    num_padding_rows: int = 0,
    padding: int = 0,
) -> Tensor:
    memory = rows_of(pool, sum(counts) + num_padding_rows, padding)
    batch = starts(counts), int32(first), int32(boundary)
    ops.gather(*memory[..., : pool.fmt.head_dim], *pool.pages(), *batch, pool.fmt.layout())
    return memory


@pytest.mark.parametrize("seed", range(10))
def test_equals_the_reference(seed: int, isa: str) -> None:
    """20 cases a seed; rows that are not asked for stay poison."""
    rng = random.Random(seed)
    for _ in range(20):
        pool, *asked = random_gather(rng, mixed=True)
        memory = gather(pool, *asked, rng.choice((0, 40)), rng.choice((0, 1, 8)))
        assert_gathered(pool, memory, *asked, fused=isa != "portable")


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_and_shapes(preset: str, head_dim: int, dtype: str, isa: str) -> None:
    fmt = KVFormat(preset, head_dim, 2, dtype, sink_tokens=4, rotate_values=head_dim in (80, 128))
    pool, _, _ = filled_pool(fmt, [100, 70])
    asked = [90, 60], [3, 10], [64, 64]
    assert_gathered(pool, gather(pool, *asked), *asked, fused=isa != "portable")


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize(("k_bits", "v_bits"), MIXTURES)
def test_mixed_bits(k_bits: int, v_bits: int, group_size: int, isa: str) -> None:
    for dtype, head_dim in (("bfloat16", 80), ("float16", 64), ("float32", 128)):
        fmt = KVFormat("kivi2", head_dim, 2, dtype, group_size, sink_tokens=4, k_bits=k_bits, v_bits=v_bits)
        pool, _, _ = filled_pool(fmt, [300])
        asked = [290], [3], [256]
        assert_gathered(pool, gather(pool, *asked), *asked, fused=isa != "portable")


def test_elements_are_copied(isa: str) -> None:
    """16 bits and whatever they hold: NaN with their payload, infinities, -0."""
    fmt = KVFormat("kivi2", 64, 1, "bfloat16", k_bits=16, v_bits=16)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(-1, 1, 64)
    key, pool = patterns.view(torch.bfloat16), Pool(fmt, [len(patterns)])
    ops.store(key, key, *pool.pages(), starts([len(key)]), int32([len(key)]), fmt.layout())
    memory = gather(pool, [len(key)], [0], [len(key)])
    assert all(torch.equal(x.view(torch.int16), patterns) for x in memory)


@pytest.mark.parametrize(("k_bits", "v_bits"), [(2, 2), (2, 16), (16, 2), (16, 16)])
def test_tokens_without_a_page_are_0(k_bits: int, v_bits: int, isa: str) -> None:
    """Of either kind; the null block itself is not read."""
    fmt = KVFormat("kivi2", 64, 2, "bfloat16", sink_tokens=4, k_bits=k_bits, v_bits=v_bits)
    pool, _, _ = filled_pool(fmt, [128])
    n = fmt.full_page_tokens
    complete = gather(pool, [128], [0], [96])
    pool.quantized_table[0, 1] = 0
    pool.full_table[0, 100 // n] = 0
    position = torch.arange(128)
    gone = (position >= 32) & (position < 64) | (position >= 96) & (position // n == 100 // n)
    memory = gather(pool, [128], [0], [96])
    assert (memory[:, gone] == 0).all()
    assert torch.equal(memory[:, ~gone], complete[:, ~gone])


def pool_of_all_numbers(dtype: str) -> Pool:
    """32 tokens whose group reaches from the lowest number to the largest, so that its scale is rounded up."""
    fmt = KVFormat("kivi2", 64, 1, dtype)
    key = tokens(fmt, 32, torch.Generator().manual_seed(0))
    limits = torch.finfo(key.dtype)
    key[:8], key[8:16] = limits.min, limits.max
    pool = Pool(fmt, [32])
    ops.store(key, key.flip(2), *pool.pages(), starts([32]), int32([32]), fmt.layout())
    return pool


def assert_largest_is_finite(memory: Tensor) -> None:
    """What was gathered of `pool_of_all_numbers`: [2, 32, 1, 64 or more]."""
    memory = memory[..., :64]
    assert memory.isfinite().all()
    assert (memory[:, 8:16] > 0.9 * torch.finfo(memory.dtype).max).all()


@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_codes_beyond_the_largest_number(dtype: str, isa: str) -> None:
    assert_largest_is_finite(gather(pool_of_all_numbers(dtype), [32], [0], [32]))


def test_unused_bytes_are_not_read(isa: str) -> None:
    """A page of many tokens whose other tiles, and the tile's padding, are poison."""
    fmt = KVFormat("kivi2", 80, 2, "bfloat16", group_size=128, page_tokens=384)
    pool, _, _ = filled_pool(fmt, [140])
    assert (pool.quantized[pool.quantized_table[0, 0], :, fmt.tile_bytes :] == POISON).all()
    asked = [137], [3], [128]
    assert_gathered(pool, gather(pool, *asked), *asked)


def test_threads_do_not_change_a_bit() -> None:
    pool, *asked = random_gather(random.Random(5))
    num_threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(gather(pool, *asked).view(torch.uint8))
    finally:
        torch.set_num_threads(num_threads)
    assert torch.equal(*results)

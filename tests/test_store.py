"""The store kernel against the reference, byte for byte, over both whole pools: what is not owned stays poison."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from conftest import POISON, Pool, int32, starts, tokens
from torch import Tensor

from vllm_kivi import ops, reference
from vllm_kivi.format import (
    ACCEPTED_BITS,
    ACCEPTED_FRACTIONS,
    BOOSTED_FRACTIONS,
    DTYPE_BYTES,
    GROUP_SIZES,
    HEAD_DIMS,
    PRESETS,
    KVFormat,
)

ISAS = ("avx512", "avx2", "portable")


@pytest.fixture(scope="module")
def isas() -> Any:
    best = ops.set_isa()
    yield ISAS[ISAS.index(best) :]
    ops.set_isa(best)


def make_hostile(x: Tensor, rng: random.Random) -> None:
    """Puts what breaks a careless quantizer into x [T, H, D], in place."""
    limits = torch.finfo(x.dtype)
    specials = (float("nan"), float("inf"), -float("inf"), limits.max, limits.min, limits.tiny, 0.0, -0.0)
    for _ in range(rng.randrange(6)):
        t, h, d = (rng.randrange(size) for size in x.shape)
        where = rng.choice([(t, h, d), (slice(None), h, d), (t, h), (slice(t, t + 40), h, slice(d, d + 40))])
        kind = rng.randrange(5)
        if kind == 0:
            x[where] = rng.choice(specials)
        elif kind == 1:  # subnormals
            x[where] *= limits.tiny
        elif kind == 2:  # a range that overflows
            x[where] *= limits.max / 3
        elif kind == 3:  # a constant with few deviations
            x[where] = rng.random()
            x[t, h, d] = rng.random()
        else:
            x[where] = torch.round(x[where])


def random_case(rng: random.Random, mixed: bool = False) -> KVFormat:
    """`mixed`: with any bits, for which no CUDA kernels are compiled."""
    group_size, preset = rng.choice(GROUP_SIZES), rng.choice(tuple(PRESETS))
    fmt = KVFormat(
        preset,
        rng.choice(HEAD_DIMS),
        num_kv_heads=rng.randint(1, 3),
        dtype=rng.choice(tuple(DTYPE_BYTES)),
        group_size=group_size,
        residual_length=rng.choice((0, 32, 128)),
        sink_tokens=rng.choice((0, 4)),
        page_tokens=group_size * rng.randint(1, 3),
        full_precision=rng.random() < 0.1,
        scale_search=rng.random() < 0.5,
        rotate_values=rng.random() < 0.5,
        boosted_fraction=rng.choice(ACCEPTED_FRACTIONS) if preset in BOOSTED_FRACTIONS else 0,
    )
    if not mixed or fmt.full_precision or rng.random() < 0.5:
        return fmt
    k_bits = fmt.k_bits if preset in BOOSTED_FRACTIONS else rng.choice(ACCEPTED_BITS)
    return dataclasses.replace(fmt, k_bits=k_bits, v_bits=rng.choice(ACCEPTED_BITS), padded_page_bytes=0)


@pytest.mark.parametrize("seed", range(50))
def test_equals_the_reference(seed: int, isas: tuple[str, ...]) -> None:
    """20 cases a seed, 1,000 in all: shapes, bits, dtypes, hostile inputs, and requests stored in several steps."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(20):
        fmt = random_case(rng, mixed=True)
        lengths = [rng.choice((1, fmt.group_size - 1, fmt.group_size, rng.randint(1, 150))) for _ in range(2)]
        keys, values = ([tokens(fmt, length, generator) for length in lengths] for _ in range(2))
        for x in (*keys, *values):
            make_hostile(x, rng)
        expected = Pool(fmt, lengths, seed=rng.randrange(1000), padding=rng.choice((0, 32)))
        if rng.random() < 0.3:  # a group without a page is not stored anywhere
            expected.quantized_table[rng.randrange(2), 0] = 0
        pools = [expected.clone() for _ in isas]
        before = [0, 0]
        while before != lengths:
            after = [rng.randint(start, end) for start, end in zip(before, lengths, strict=True)]
            if rng.random() < 0.3:
                after = lengths
            new = [slice(*span) for span in zip(before, after, strict=True)]
            key, value = (torch.cat([x[part] for x, part in zip(xs, new, strict=True)]) for xs in (keys, values))
            rest = starts([part.stop - part.start for part in new]), int32(after), fmt.layout()
            reference.store(key, value, *expected.pages(), *rest)
            for isa, pool in zip(isas, pools, strict=True):
                ops.set_isa(isa)
                ops.store(key, value, *pool.pages(), *rest)
            before = after
        for isa, pool in zip(isas, pools, strict=True):
            for name, ours, theirs in zip(("quantized", "full"), pool.memory(), expected.memory(), strict=True):
                assert torch.equal(ours, theirs), f"{isa}, {name} pages, {fmt}"


@pytest.mark.parametrize(
    ("preset", "options"),
    [
        ("kivi8", {}),
        ("kivi2", {"scale_search": True}),
        ("kivi4", {"scale_search": True, "rotate_values": True}),
        ("kivi2_boost", {"scale_search": True}),
        ("kivi2_boost", {"rotate_values": True}),
    ],
)
@pytest.mark.parametrize("dtype", DTYPE_BYTES)
def test_every_value_of_a_16_bit_type(dtype: str, preset: str, options: dict[str, bool], isas: tuple[str, ...]) -> None:
    """All 65,536 bit patterns pass through conversion and rounding, in groups of neighbours and of strangers."""
    if dtype == "float32":
        pytest.skip("too many")
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    shuffled = patterns[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    fmt = KVFormat(preset, 64, num_kv_heads=1, dtype=dtype, **options)
    for x in (patterns, shuffled):
        key = x.view(getattr(torch, dtype)).view(-1, 1, 64)
        pools = [Pool(fmt, [len(key)]) for _ in range(len(isas) + 1)]
        rest = starts([len(key)]), int32([len(key)]), fmt.layout()
        reference.store(key, key, *pools[-1].pages(), *rest)
        for isa, pool in zip(isas, pools[:-1], strict=True):
            ops.set_isa(isa)
            ops.store(key, key, *pool.pages(), *rest)
            assert torch.equal(pool.quantized, pools[-1].quantized), isa
            assert torch.equal(pool.full, pools[-1].full), isa


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("fraction", ACCEPTED_FRACTIONS)
def test_which_channels_are_boosted(fraction: int, head_dim: int, isa: str) -> None:
    """The sign bits of the scales, without the reference: the worst channels, then the first of equal ones."""
    fmt = KVFormat("kivi2_boost", head_dim, num_kv_heads=1, dtype="float32", boosted_fraction=fraction)
    # Three of four codes are exact, and what the fourth one loses is the same in all channels.
    key = torch.tensor([0.0, 1.0, 2.25, 3.0]).repeat(8)[:, None, None].repeat(1, 1, head_dim)
    worst = [1, head_dim // 2 + 3, head_dim - 1]
    key[:, :, worst[0]] *= 2
    key[:, :, worst[1]] = torch.linspace(0, 1e6, 32)[:, None]  # a range whose losses are not counted
    key[:, :, worst[2]] *= -3
    key[:, :, 0] = 5.0  # loses nothing
    pool = Pool(fmt, [32])
    ops.store(key, key, *pool.pages(), starts([32]), int32([32]), fmt.layout())
    tile = pool.quantized[pool.quantized_table[0, 0], 0]
    scale = tile[fmt.k_scale_offset : fmt.k_zero_offset].view(torch.float32)
    others = [channel for channel in range(1, head_dim) if channel not in worst]
    expected = sorted([*worst, *others[: fmt.boosted_channels - len(worst)]])
    assert scale.signbit().nonzero().flatten().tolist() == expected

    key[:] = 5.0  # all alike, so that scales are 0 and their signs still count
    ops.store(key, key, *pool.pages(), starts([32]), int32([32]), fmt.layout())
    scale = tile[fmt.k_scale_offset : fmt.k_zero_offset].view(torch.float32)
    assert (scale == 0).all()
    assert scale.signbit().nonzero().flatten().tolist() == list(range(fmt.boosted_channels))


def test_null_block_and_padding_rows(isa: str) -> None:
    """Nothing is written for tokens on the null block, nor for rows past query_start_loc."""
    fmt = KVFormat("kivi2", 64, num_kv_heads=2, dtype="bfloat16", residual_length=0)
    pool = Pool(fmt, [96])
    pool.full_table[:] = 0
    pool.quantized_table[0, 1] = 0
    kept = pool.quantized_table[0, [0, 2]].tolist()
    key = tokens(fmt, 120, torch.Generator().manual_seed(0))
    ops.store(key, key, *pool.pages(), starts([96]), int32([96]), fmt.layout())
    assert (pool.full == POISON).all()
    changed = (pool.quantized != POISON).flatten(1).any(1).nonzero().flatten().tolist()
    assert changed == sorted(kept)


def test_strided_rows(isa: str) -> None:
    """key and value may be slices of one fused projection."""
    fmt = KVFormat("kivi_k4v2", 80, num_kv_heads=2, dtype="float16")
    fused = tokens(KVFormat("kivi2", 80, num_kv_heads=6, dtype="float16"), 70, torch.Generator().manual_seed(0))
    pools = Pool(fmt, [70]), Pool(fmt, [70])
    key, value = fused[:, 2:4], fused[:, 4:6]
    rest = starts([70]), int32([70]), fmt.layout()
    ops.store(key, value, *pools[0].pages(), *rest)
    reference.store(key.contiguous(), value.contiguous(), *pools[1].pages(), *rest)
    assert all(map(torch.equal, pools[0].memory(), pools[1].memory()))


def test_rejected_tokens_are_rewritten(isa: str) -> None:
    """A group that completes twice, as after rejected speculative tokens, holds the second version."""
    fmt = KVFormat("kivi2", 64, num_kv_heads=1, dtype="float32")
    generator = torch.Generator().manual_seed(0)
    kept, rejected, accepted = (tokens(fmt, count, generator) for count in (30, 4, 4))
    once, twice = Pool(fmt, [34]), Pool(fmt, [34])
    for pool, tails in ((once, [accepted]), (twice, [rejected, accepted])):
        ops.store(kept, kept, *pool.pages(), starts([30]), int32([30]), fmt.layout())
        for tail in tails:
            ops.store(tail, tail, *pool.pages(), starts([4]), int32([34]), fmt.layout())
    assert all(map(torch.equal, once.memory(), twice.memory()))

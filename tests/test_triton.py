"""The Triton kernels by the checks of the CUDA kernels: on a GPU as they are, elsewhere in Triton's interpreter.

The interpreter is slow, and chosen before anything imports Triton: without a GPU one test runs this file again in a
process of its own, and the others are skipped. Cases are small, and few: each layout is compiled on its own.
"""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import test_cuda
import test_cuda_decode
import torch
from conftest import POISON, Pool, filled_pool, int32, starts, tokens
from test_decode import queries
from test_gather import assert_gathered, rows_of
from test_store import make_hostile

from vllm_kivi import ops, reference
from vllm_kivi.format import LAYOUT_FIELDS, PRESETS, KVFormat

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

needs_kernels = pytest.mark.skipif(not ON_GPU and not INTERPRETED, reason="run by test_in_the_interpreter")
needs_gpu = pytest.mark.skipif(not ON_GPU or INTERPRETED, reason="needs an NVIDIA GPU")

# preset, head_dim, num_kv_heads, dtype, group_size, residual_length, sink_tokens, groups of a page
SHAPES = (
    ("kivi2", 64, 2, "bfloat16", 32, 32, 4, 1),
    ("kivi2", 128, 1, "float16", 128, 128, 0, 2),
    ("kivi_k4v2", 80, 1, "float16", 64, 0, 33, 1),
    ("kivi4", 96, 2, "bfloat16", 32, 32, 0, 3),
    ("kivi4", 80, 1, "bfloat16", 128, 0, 4, 1),
    ("kivi8", 256, 1, "bfloat16", 32, 128, 4, 1),
    ("kivi8", 64, 1, "float32", 64, 32, 40, 2),
)
FORMATS = [
    KVFormat(preset, d, h, dtype, group_size=g, residual_length=r, sink_tokens=s, page_tokens=g * pages)
    for preset, d, h, dtype, g, r, s, pages in SHAPES
]
FORMATS.append(KVFormat("kivi2", 96, 2, "bfloat16", residual_length=32, sink_tokens=4, full_precision=True))
# preset, head_dim, dtype, group_size, residual_length, sink_tokens, k_bits, v_bits
MIXED_SHAPES = (
    ("kivi2", 80, "float16", 64, 0, 4, 16, 2),
    ("kivi2_boost", 64, "bfloat16", 32, 32, 33, 2, 16),
    ("kivi2", 96, "bfloat16", 128, 32, 4, 8, 2),
    ("kivi2", 64, "float32", 32, 0, 4, 2, 4),
    ("kivi2", 128, "float16", 32, 64, 0, 4, 8),
)
FORMATS += [
    KVFormat(preset, d, 1, dtype, g, r, s, rotate_values=True, k_bits=k_bits, v_bits=v_bits)
    for preset, d, dtype, g, r, s, k_bits, v_bits in MIXED_SHAPES
]
SEARCHING = [dataclasses.replace(fmt, scale_search=True) for fmt in FORMATS[:5]]

# preset, head_dim, num_kv_heads, dtype, group_size, residual_length, sink_tokens, groups of a page; scale_search,
# rotate_values, boosted_fraction
TUNED_SHAPES = (
    ("kivi2_boost", 128, 1, "bfloat16", 64, 32, 4, 1, True, True, 4),
    ("kivi2_boost", 80, 2, "float16", 128, 0, 33, 1, False, True, 4),
    ("kivi2_boost", 256, 1, "bfloat16", 32, 32, 0, 2, False, False, 4),
    ("kivi2_boost", 64, 1, "float32", 32, 64, 4, 3, True, True, 8),  # rounds so little that the order of stages shows
    ("kivi4", 96, 1, "float16", 64, 0, 4, 1, True, True, 0),
)
TUNED = [
    KVFormat(
        preset,
        d,
        h,
        dtype,
        group_size=g,
        residual_length=r,
        sink_tokens=s,
        page_tokens=g * pages,
        scale_search=search,
        rotate_values=rotate,
        boosted_fraction=fraction,
    )
    for preset, d, h, dtype, g, r, s, pages, search, rotate, fraction in TUNED_SHAPES
]


def name_of(fmt: KVFormat) -> str:
    options = ("search" * fmt.scale_search, "rotate" * fmt.rotate_values)
    bits = f"{fmt.k_bits}-{fmt.v_bits}" * ((fmt.k_bits, fmt.v_bits) != PRESETS[fmt.preset])
    return "-".join(map(str, (fmt.preset, fmt.head_dim, fmt.group_size, *filter(None, (*options, bits)))))


all_formats = pytest.mark.parametrize("fmt", FORMATS + TUNED, ids=name_of)


def round_as_gpus_do() -> None:
    """Triton's interpreter truncates to bfloat16 and multiplies matrices of its bits as integers."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def to_float32(x: TensorHandle) -> TensorHandle:
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast_impl(self: InterpreterBuilder, src: TensorHandle, dst_type: tl.dtype) -> TensorHandle:
        kinds = src.dtype.scalar, dst_type.scalar
        if kinds == (tl.bfloat16, tl.float32):
            return to_float32(src)
        if kinds == (tl.float32, tl.bfloat16):
            rounded = torch.from_numpy(np.ascontiguousarray(src.data)).bfloat16().view(torch.uint16).numpy()
            return TensorHandle(rounded.reshape(src.data.shape), tl.bfloat16)
        return cast(self, src, dst_type)

    def create_dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *rest: object) -> TensorHandle:
        a, b = (to_float32(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot


if INTERPRETED:
    round_as_gpus_do()


@pytest.fixture(autouse=True)
def triton_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the CUDA tests call is Triton's, except where they use the CPU's kernels to prepare something."""
    if not ON_GPU and not INTERPRETED:
        return
    from vllm_kivi import triton_ops

    def store(key: torch.Tensor, *rest: Any) -> None:
        (triton_ops.store if key.device.type == DEVICE else ops.store)(key, *rest)

    names = "decode", "decode_workspace", "gather"
    served = SimpleNamespace(store=store, **{name: getattr(triton_ops, name) for name in names})
    for module in (test_cuda, test_cuda_decode):
        monkeypatch.setattr(module, "ops", served)
        monkeypatch.setattr(module, "DEVICE", DEVICE)


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests below run in this process")
def test_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@needs_kernels
def test_layout_fields() -> None:
    from vllm_kivi.triton_ops import layout

    for index, field in enumerate(LAYOUT_FIELDS):
        assert getattr(layout, field.removesuffix("_offset").upper()).value == index


# --------------------------------------------------------------------------------------------------------------- store


@needs_kernels
@pytest.mark.parametrize("fmt", FORMATS + SEARCHING + TUNED, ids=name_of)
def test_store_equals_the_reference(fmt: KVFormat) -> None:
    """Slices of one fused projection, hostile inputs, padding rows, null blocks; a group may have old and new tokens.

    The reference stores most tokens, and the kernel some steps of few rows, of which most complete a group.
    """
    rng, generator = random.Random(str(fmt)), torch.Generator().manual_seed(0)
    g, heads = fmt.group_size, fmt.num_kv_heads
    wide = KVFormat(fmt.preset, fmt.head_dim, 3 * heads, fmt.dtype)
    steps = [([g - 2, 5, 2 * g - 1], None), ([3, 1, 2], [g + 1, 6, 2 * g + 1]), ([0, 2, 1], [g + 1, 8, 2 * g + 2])]
    expected = Pool(fmt, [g + 1, 8, 2 * g + 2])
    expected.full_table[1:, 0] = expected.quantized_table[2, 0] = 0  # tokens that are gone or not kept, a lost group
    pool = expected.to(DEVICE)
    for rows, seq_lens in steps:
        fused = tokens(wide, sum(rows) + 3, generator)
        make_hostile(fused, rng)
        fused[:, :, 3] = fused[:, :, 3].abs() * torch.tensor([-0.0, 1.0, 0.0]).repeat(len(fused))[: len(fused), None]
        key, value = fused[:, heads : 2 * heads], fused[:, 2 * heads :]
        if seq_lens is None:
            reference.store(key, value, *expected.pages(), starts(rows), int32(rows), fmt.layout())
            pool = expected.to(DEVICE)
        else:
            test_cuda.store_both(pool, expected, key, value, rows, seq_lens)
    test_cuda.assert_same_bytes(pool, expected)


@needs_kernels
@pytest.mark.parametrize(("preset", "dtype"), [("kivi8", "bfloat16"), ("kivi_k4v2", "float16")])
def test_store_every_value_of_a_16_bit_type(preset: str, dtype: str) -> None:
    """All 65,536 bit patterns, as in test_cuda; all but the rows that complete a group are there already."""
    fmt = KVFormat(preset, 256, num_kv_heads=1, dtype=dtype, group_size=128)
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    shuffled = patterns[torch.randperm(2**16, generator=torch.Generator().manual_seed(0))]
    for x in (patterns, patterns.view(2, -1).transpose(0, 1).reshape(-1), shuffled):
        key = x.contiguous().view(getattr(torch, dtype)).view(2, 128, 1, 256)
        expected = Pool(fmt, [128, 128])
        old = torch.cat((key[0, :127], key[1, :127]))
        reference.store(old, old.flip(2), *expected.pages(), starts([127, 127]), int32([127, 127]), fmt.layout())
        pool, new = expected.to(DEVICE), key[:, 127]
        test_cuda.store_both(pool, expected, new, new.flip(2), [1, 1], [128, 128])
        test_cuda.assert_same_bytes(pool, expected)


@needs_kernels
def test_store_boosts_the_lower_of_equal_channels() -> None:
    """Channels that come in threes; constants, boosted ones with scale -0.0; ranges that overflow."""
    fmt = KVFormat("kivi2_boost", 64, num_kv_heads=3, dtype="bfloat16")
    key = tokens(fmt, 32, torch.Generator().manual_seed(0))
    key[:, 0] = key[:, 0, torch.arange(64) // 3 * 3]
    key[:, 1] = 0.5
    key[::2, 2], key[1::2, 2] = 3e38, -3e38
    expected = Pool(fmt, [32])
    reference.store(key[:31], key[:31], *expected.pages(), starts([31]), int32([31]), fmt.layout())
    pool = expected.to(DEVICE)
    test_cuda.store_both(pool, expected, key[31:], key[31:], [1], [32])
    test_cuda.assert_same_bytes(pool, expected)


@needs_kernels
def test_store_skips_a_group_whose_old_tokens_are_gone() -> None:
    test_cuda.test_store_skips_a_group_whose_old_tokens_are_gone()


# -------------------------------------------------------------------------------------------------------------- decode


@needs_kernels
@all_formats
def test_decode(fmt: KVFormat) -> None:
    """Lengths at the edges of groups and windows, and one that is split; every ratio of heads in its turn."""
    g, r = fmt.group_size, fmt.residual_length
    index = (FORMATS + TUNED).index(fmt)
    lengths = [(1, g - 1, g, g + 1)[index % 4], r + g + index % 3 - 1, 300 + index]
    pool, _, _ = filled_pool(fmt, lengths, window=r + g)
    test_cuda_decode.check(pool, queries(fmt, 3, (1, 3, 5, 7, 8, 9, 16, 17)[index % 8]), [1] * 3)


@pytest.mark.skipif(not INTERPRETED, reason="test_long_context has more splits")
def test_merge_takes_splits_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_kivi.triton_ops import decode_kernels

    monkeypatch.setattr(decode_kernels, "MERGED", decode_kernels.tl.constexpr(1))
    test_decode(FORMATS[1])


@needs_kernels
def test_speculative_rows() -> None:
    """Each row has the boundary of its own length, also where one boundary lies between two rows of a step."""
    fmt = FORMATS[0]
    lengths, counts = [2, 66, 98], [2, 3, 1]
    pool, _, _ = filled_pool(fmt, lengths, window=fmt.residual_length + fmt.group_size + 4)
    test_cuda_decode.check(pool, queries(fmt, sum(counts), 3), counts)


@needs_kernels
@pytest.mark.parametrize("soft_cap", [0.5, 20.0])
def test_soft_cap(soft_cap: float) -> None:
    pool, _, _ = filled_pool(FORMATS[0], [150])
    test_cuda_decode.check(pool, queries(FORMATS[0], 1, 4), [1], soft_cap)


@needs_kernels
def test_bits_do_not_depend_on_the_blocks() -> None:
    fmt, query = FORMATS[0], queries(FORMATS[0], 1, 3)
    pool, keys, values = filled_pool(fmt, [140])
    other = Pool(fmt, [140], seed=7, padding=96)
    ops.store(keys[0], values[0], *other.pages(), starts([140]), int32([140]), fmt.layout())
    assert torch.equal(*(test_cuda_decode.decode(each, query, [1]) for each in (pool, other)))


@needs_kernels
@pytest.mark.parametrize(
    ("side", "exponent"), [("value", 30), *(pytest.param(side, 12, marks=needs_gpu) for side in ("key", "query"))]
)
def test_magnitudes(side: str, exponent: int) -> None:
    test_cuda_decode.test_magnitudes(side, exponent)


@needs_kernels
@pytest.mark.parametrize("check", ["unused_bytes_are_not_read", "padding_rows_and_idle_requests"])
def test_what_is_not_read(check: str) -> None:
    getattr(test_cuda_decode, f"test_{check}")()


@needs_kernels
@pytest.mark.parametrize("v_bits", [2, 16])
def test_values_of_sinks_are_not_read(v_bits: int) -> None:
    """Nor are they, or their scales, multiplied by 0: they may be anything."""
    fmt = dataclasses.replace(FORMATS[0], v_bits=v_bits, padded_page_bytes=0)
    pool, _, _ = filled_pool(fmt, [100])
    query, clean = queries(fmt, 1, 3), pool.clone()
    tile = pool.quantized[pool.quantized_table[0, 0]]
    if v_bits == 16:
        tile[:, fmt.v_codes_offset : fmt.v_codes_offset + 4 * 64 * fmt.element_bytes] = POISON
    for offset in (fmt.v_scale_offset, fmt.v_zero_offset) * (v_bits < 16):
        for group in range(fmt.num_value_groups):
            first = offset + group * fmt.group_size * fmt.element_bytes
            tile[:, first : first + 4 * fmt.element_bytes] = POISON
    assert torch.equal(*(test_cuda_decode.decode(each, query, [1]) for each in (pool, clean)))


# -------------------------------------------------------------------------------------------------------------- gather


@needs_kernels
@all_formats
def test_gather(fmt: KVFormat) -> None:
    """Any first token, any boundary, sinks; rows that are not asked for stay poison."""
    g = fmt.group_size
    lengths, first, counts, boundary = [2 * g, 40, 50], [2, 0, 7], [g + 10, 0, 30], [g, 0, 0]
    pool, _, _ = filled_pool(fmt, lengths)
    n = fmt.full_page_tokens
    pool.full_table[0, -(-fmt.sink_tokens // n) : boundary[0] // n] = 0
    memory = rows_of(pool, sum(counts) + 9, 1, DEVICE)
    batch = starts(counts), int32(first), int32(boundary)
    operands = *pool.to(DEVICE).pages(), *test_cuda.on_device(*batch), fmt.layout()
    test_cuda.ops.gather(*memory[..., : fmt.head_dim], *operands)
    assert_gathered(pool, memory, counts, first, boundary)


@needs_kernels
def test_gather_of_codes_beyond_the_largest_number() -> None:
    test_cuda.test_gather_of_codes_beyond_the_largest_number("float16")


# --------------------------------------------------------------------------------------------------------- on GPUs only


@needs_gpu
@pytest.mark.parametrize("preset", ["kivi2", "kivi2_boost"])
def test_in_cuda_graphs(preset: str) -> None:
    test_cuda.test_store_in_a_cuda_graph(preset, "")
    test_cuda.test_gather_in_a_cuda_graph()
    test_cuda_decode.test_graph_replay_with_other_lengths()


@needs_gpu
def test_long_context() -> None:
    test_cuda_decode.test_long_context()


@needs_gpu
def test_store_touches_neither_null_block_nor_padding_rows() -> None:
    test_cuda.test_store_touches_neither_null_block_nor_padding_rows()


@needs_gpu
@pytest.mark.parametrize("preset", ["kivi2", "kivi2_boost"])
def test_store_many_rows(preset: str) -> None:
    mixed = [0, 1, 700, 1, 1, 1200, 0, 2500, 3], [0, 32, 731, 64, 1, 1200, 7, 2600, 65]
    for rows, seq_lens in (test_cuda.decode_step(300), mixed):
        test_cuda.test_store_many_rows(rows, seq_lens, preset)

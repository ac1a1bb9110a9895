"""Reading a tile: the order of bits in it, of which store_kernel.py has the reverse."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_kivi.triton_ops.layout import (
    BOOSTED_CHANNELS,
    GROUP_SIZE,
    HEAD_DIM,
    K_BITS,
    K_BOOST,
    K_CODES,
    K_SCALE,
    K_ZERO,
    NUM_VALUE_GROUPS,
    TOKENS,
    V_BITS,
    V_CODES,
    V_SCALE,
    V_ZERO,
    WIDTH,
)
from vllm_kivi.triton_ops.numbers import dequantized


@triton.jit
def read_keys(tile, first, layout: tl.constexpr, dtype: tl.constexpr):
    """Keys of a tile's tokens from `first` on: [WIDTH, TOKENS], 0 from channel head_dim on."""
    bits: tl.constexpr = layout[K_BITS]
    head_dim: tl.constexpr = layout[HEAD_DIM]
    group_size: tl.constexpr = layout[GROUP_SIZE]
    width: tl.constexpr = layout[WIDTH]
    per_word: tl.constexpr = 32 // bits
    channel = tl.arange(0, width)[:, None]
    token = first + tl.arange(0, TOKENS)[None, :]
    is_channel = channel < head_dim
    if bits == 16:
        keys = (tile + layout[K_CODES]).to(tl.pointer_type(dtype))
        return tl.load(keys + token * head_dim + channel, mask=is_channel, other=0.0)
    word = tl.arange(0, width // per_word)[:, None]
    address = (tile + layout[K_CODES]).to(tl.pointer_type(tl.uint32)) + word * group_size + token
    words = tl.load(address, mask=word < head_dim // per_word, other=0)
    codes = (words[:, None, :] >> (bits * tl.arange(0, per_word))[None, :, None]) & (2**bits - 1)
    scale = tl.load((tile + layout[K_SCALE]).to(tl.pointer_type(dtype)) + channel, mask=is_channel, other=0.0)
    zero = tl.load((tile + layout[K_ZERO]).to(tl.pointer_type(dtype)) + channel, mask=is_channel, other=0.0)
    codes, scale = tl.reshape(codes, [width, TOKENS]), scale.to(tl.float32)
    if layout[BOOSTED_CHANNELS] > 0:
        boosted = scale.to(tl.int32, bitcast=True) < 0
        codes = tl.where(boosted, 4 * codes, codes) + _read_low_bits(tile, first, tl.reshape(boosted, [width]), layout)
        scale = tl.abs(scale)
    return dequantized(codes, scale, zero.to(tl.float32), dtype)


@triton.jit
def _read_low_bits(tile, first, boosted, layout: tl.constexpr):
    """What boosted channels [WIDTH] have beside their codes: [WIDTH, TOKENS], 0 elsewhere."""
    half_words = (tile + layout[K_BOOST]).to(tl.pointer_type(tl.uint16))  # two tokens of four channels
    index = tl.cumsum(boosted.to(tl.int32), axis=0) - 1
    quartet, pair = (index // 4)[:, None], first // 2 + tl.arange(0, TOKENS // 2)[None, :]
    address = half_words + (quartet // 2 * (layout[GROUP_SIZE] // 2) + pair) * 2 + quartet % 2
    # A tile that was never written may have any number of signs.
    mask = boosted & (index < layout[BOOSTED_CHANNELS])
    codes = tl.load(address, mask=mask[:, None], other=0).to(tl.uint32)[:, :, None]
    shift = 2 * (index % 4)[:, None, None] + (8 * tl.arange(0, 2))[None, None, :]
    return tl.reshape(codes >> shift & 3, [layout[WIDTH], TOKENS])


@triton.jit
def read_values(tile, first, first_live, layout: tl.constexpr, dtype: tl.constexpr, result: tl.constexpr):
    """Values of a tile's tokens from `first` on: [TOKENS, WIDTH], 0 before `first_live`; with `rotate_values`, rotated.

    They are rounded to `result`, or as they are, in the model's dtype, with 16 bits.
    """
    bits: tl.constexpr = layout[V_BITS]
    head_dim: tl.constexpr = layout[HEAD_DIM]
    group_size: tl.constexpr = layout[GROUP_SIZE]
    width: tl.constexpr = layout[WIDTH]
    slots: tl.constexpr = 16 // bits
    row_words: tl.constexpr = 4 * head_dim // slots
    groups: tl.constexpr = width // group_size if width > group_size else 1
    token = first + tl.arange(0, TOKENS)[:, None]
    is_live = token >= first_live
    if bits == 16:
        channel = tl.arange(0, width)[None, :]
        values = (tile + layout[V_CODES]).to(tl.pointer_type(dtype)) + token * head_dim + channel
        return tl.load(values, mask=is_live & (channel < head_dim), other=0.0)
    octet = first // 8 + tl.arange(0, TOKENS // 8)[:, None]
    word = tl.arange(0, 4 * width // slots)[None, :]
    address = (tile + layout[V_CODES]).to(tl.pointer_type(tl.uint32)) + octet * row_words + word
    words = tl.load(address, mask=word < row_words, other=0)
    codes = (words[:, None, :, None] >> value_shifts(bits)) & (2**bits - 1)  # [octet, half-word, word, slot]
    codes = tl.permute(tl.reshape(codes, [TOKENS // 8, 2, width, 4]), (0, 1, 3, 2))
    group = tl.arange(0, groups)[None, :]
    offset, mask = group * group_size + token, is_live & (group < layout[NUM_VALUE_GROUPS])
    scale = tl.load((tile + layout[V_SCALE]).to(tl.pointer_type(dtype)) + offset, mask=mask, other=0.0)
    zero = tl.load((tile + layout[V_ZERO]).to(tl.pointer_type(dtype)) + offset, mask=mask, other=0.0)
    codes = tl.reshape(codes, [TOKENS, groups, width // groups])
    values = dequantized(codes, scale.to(tl.float32)[:, :, None], zero.to(tl.float32)[:, :, None], result)
    return tl.reshape(values, [TOKENS, width])


@triton.jit
def value_shifts(bits: tl.constexpr):
    """Of [octet, half-word, word, slot]; slots count channels and then the 4 tokens of a half-word."""
    half, slot = tl.arange(0, 2), tl.arange(0, 16 // bits)
    return (16 * half)[None, :, None, None] + (bits * slot)[None, None, None, :]

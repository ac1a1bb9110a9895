"""store: a program for a row and a head. Where the row completes a group it quantizes that."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_kivi.triton_ops.layout import (
    BOOSTED_CHANNELS,
    FULL_PAGE_TOKENS,
    GROUP_SIZE,
    HEAD_DIM,
    K_BITS,
    K_BOOST,
    K_CODES,
    K_SCALE,
    K_ZERO,
    NUM_VALUE_GROUPS,
    PAGE_TOKENS,
    ROTATE_VALUES,
    SCALE_SEARCH,
    TOKENS,
    V_BITS,
    V_CODES,
    V_SCALE,
    V_ZERO,
    WIDTH,
    block_ids,
    full_key_addresses,
    row_address,
    tile_address,
    token_of,
)
from vllm_kivi.triton_ops.numbers import codes_of, finite, group_errors, rotated, rounded
from vllm_kivi.triton_ops.tile import value_shifts

KEY_CHANNELS = tl.constexpr(64)  # that are quantized at a time
BOOSTED_ELEMENTS = tl.constexpr(2048)  # the same with boosted channels, whose code needs more registers


@triton.jit
def _group(rows, row, first_row, head, old, channel, is_channel):
    """Elements of tokens with these rows, or from addresses `old` where the row is before the request's first."""
    is_new = row >= first_row
    new = tl.load(row_address(rows, row, head) + channel, mask=is_new & is_channel, other=0.0)
    return tl.where(is_new, new, tl.load(old + channel, mask=(row < first_row) & is_channel, other=0.0))


@triton.jit
def _channel_errors(key, row, first_row, head, old, channels: tl.constexpr, layout: tl.constexpr, dtype: tl.constexpr):
    """What channels lose at 2 bits: [WIDTH / channels, channels], -1 from channel head_dim on."""
    parts: tl.constexpr = layout[WIDTH] // channels
    errors = tl.full([parts, channels], -1.0, tl.float32)
    for first in range(0, layout[HEAD_DIM], channels):
        channel = first + tl.arange(0, channels)[None, :]
        is_channel = channel < layout[HEAD_DIM]
        x = _group(key, row, first_row, head, old, channel, is_channel)
        error = group_errors(finite(x, dtype), 3.0, dtype, 0)
        errors = tl.where((tl.arange(0, parts)[:, None] == first // channels) & is_channel, error, errors)
    return errors


@triton.jit
def _is_boosted(errors, first, channels: tl.constexpr, layout: tl.constexpr):
    """Whether channels from `first` on are among those that lose most; ties go to the lower."""
    width: tl.constexpr = layout[WIDTH]
    part = tl.arange(0, width // channels)[:, None]
    own = tl.sum(tl.where(part == first // channels, errors, 0.0), axis=0)[:, None]
    channel = first + tl.arange(0, channels)
    other, lower = tl.reshape(errors, [1, width]), tl.arange(0, width)[None, :] < channel[:, None]
    rank = tl.sum(((other > own) | ((other == own) & lower)).to(tl.int32), axis=1)
    return (rank < layout[BOOSTED_CHANNELS]) & (channel < layout[HEAD_DIM])


@triton.jit
def _store_keys(key, row, first_row, head, old, tile, layout: tl.constexpr, dtype: tl.constexpr):
    """Quantizes the keys of a group with these rows [G]; `old` are addresses of those before the request's first."""
    bits: tl.constexpr = layout[K_BITS]
    per_word: tl.constexpr = 32 // bits
    head_dim: tl.constexpr = layout[HEAD_DIM]
    group_size: tl.constexpr = layout[GROUP_SIZE]
    num_boosted: tl.constexpr = layout[BOOSTED_CHANNELS]
    channels: tl.constexpr = BOOSTED_ELEMENTS // group_size if num_boosted > 0 else KEY_CHANNELS
    num_quartets: tl.constexpr = 16 if num_boosted <= 64 else layout[WIDTH] // 4  # that low bits are stored in
    scales = (tile + layout[K_SCALE]).to(tl.pointer_type(dtype))
    zeros = (tile + layout[K_ZERO]).to(tl.pointer_type(dtype))
    row, old, token = row[:, None], old[:, None], tl.arange(0, group_size)[:, None]
    quartet = tl.arange(0, num_quartets)[None, :]
    if num_boosted > 0:
        errors = _channel_errors(key, row, first_row, head, old, channels, layout, dtype)
        low_bits, num_lower = tl.zeros([group_size, num_quartets], tl.float32), 0
    for first in range(0, head_dim, channels):
        channel = first + tl.arange(0, channels)
        is_channel = channel < head_dim
        x = finite(_group(key, row, first_row, head, old, channel[None, :], is_channel[None, :]), dtype)
        if num_boosted > 0:
            boosted = _is_boosted(errors, first, channels, layout)
            codes, scale, zero = codes_of(x, True, tl.where(boosted, 15.0, 3.0)[None, :], dtype, 0, False)
            # A product with powers of two puts the low bits of four boosted channels into one byte.
            index = num_lower + tl.cumsum(boosted.to(tl.int32), axis=0) - 1
            weight = tl.where(boosted[:, None] & (index[:, None] // 4 == quartet), 1 << 2 * (index % 4)[:, None], 0)
            low = tl.where(boosted[None, :], codes & 3, 0)
            low_bits = tl.dot(low.to(tl.float16), weight.to(tl.float16), low_bits)
            num_lower += tl.sum(boosted.to(tl.int32), axis=0)
            codes = tl.where(boosted[None, :], codes >> 2, codes)
            sign = tl.where(boosted, 0x80000000, 0).to(tl.uint32)[None, :]
            scale = (scale.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        else:
            codes, scale, zero = codes_of(x, True, 2.0**bits - 1.0, dtype, 0, False)
        scale, zero = tl.reshape(scale, [channels]), tl.reshape(zero, [channels])
        tl.store(scales + channel, scale.to(dtype), mask=is_channel)
        tl.store(zeros + channel, zero.to(dtype), mask=is_channel)
        codes = tl.reshape(codes, [group_size, channels // per_word, per_word])
        words = tl.sum(codes << (bits * tl.arange(0, per_word))[None, None, :], axis=2)
        word = first // per_word + tl.arange(0, channels // per_word)[None, :]
        address = (tile + layout[K_CODES]).to(tl.pointer_type(tl.uint32)) + word * group_size + token
        tl.store(address, words, mask=word < head_dim // per_word)
    if num_boosted > 0:
        word = quartet // 2 * (group_size // 2) + token // 2
        address = tile + layout[K_BOOST] + word * 4 + quartet % 2 * 2 + token % 2
        tl.store(address, low_bits.to(tl.int32).to(tl.uint8), mask=quartet < num_boosted // 4)


@triton.jit
def _store_values(x, first, tile, layout: tl.constexpr, dtype: tl.constexpr):
    """Quantizes the values x [TOKENS, WIDTH] of a tile's tokens from `first` on."""
    bits: tl.constexpr = layout[V_BITS]
    head_dim: tl.constexpr = layout[HEAD_DIM]
    width: tl.constexpr = layout[WIDTH]
    group_size: tl.constexpr = layout[GROUP_SIZE]
    slots: tl.constexpr = 16 // bits
    row_words: tl.constexpr = 4 * head_dim // slots
    groups: tl.constexpr = width // group_size if width > group_size else 1
    search: tl.constexpr = layout[SCALE_SEARCH] and bits < 8
    x = finite(x, dtype)
    if layout[ROTATE_VALUES]:
        x = finite(rounded(rotated(x, layout), dtype), dtype)
    x = tl.reshape(x, [TOKENS, groups, width // groups])
    counted = tl.reshape(tl.arange(0, width) < head_dim, [1, groups, width // groups])
    codes, scale, zero = codes_of(x, counted, 2.0**bits - 1.0, dtype, 2, search)
    group = tl.arange(0, groups)[None, :]
    offset, mask = group * group_size + first + tl.arange(0, TOKENS)[:, None], group < layout[NUM_VALUE_GROUPS]
    scale, zero = tl.reshape(scale, [TOKENS, groups]), tl.reshape(zero, [TOKENS, groups])
    tl.store((tile + layout[V_SCALE]).to(tl.pointer_type(dtype)) + offset, scale.to(dtype), mask=mask)
    tl.store((tile + layout[V_ZERO]).to(tl.pointer_type(dtype)) + offset, zero.to(dtype), mask=mask)
    codes = tl.permute(tl.reshape(codes, [TOKENS // 8, 2, 4, width]), (0, 1, 3, 2))
    codes = tl.reshape(codes, [TOKENS // 8, 2, 4 * width // slots, slots])
    words = tl.sum(tl.sum(codes << value_shifts(bits), axis=3), axis=1)  # [octet, word]
    octet = first // 8 + tl.arange(0, TOKENS // 8)[:, None]
    word = tl.arange(0, 4 * width // slots)[None, :]
    address = (tile + layout[V_CODES]).to(tl.pointer_type(tl.uint32)) + octet * row_words + word
    tl.store(address, words, mask=word < row_words)


@triton.jit(do_not_specialize=["num_requests"])
def store_kernel(key, value, quantized, full, start_loc, seq_lens, num_requests, layout: tl.constexpr):
    dtype: tl.constexpr = key.data.dtype.element_ty
    group_size: tl.constexpr = layout[GROUP_SIZE]
    head_dim: tl.constexpr = layout[HEAD_DIM]
    row, head = tl.program_id(0), tl.program_id(1)
    request, first_row, position = token_of(start_loc, seq_lens, num_requests, row)
    if position < 0:
        return
    channel = tl.arange(0, layout[WIDTH])
    is_channel = channel < head_dim
    block = block_ids(full, request, position // layout[FULL_PAGE_TOKENS], True)
    if block != 0:
        to = full_key_addresses(full, block, head, position, layout, dtype) + channel
        tl.store(to, tl.load(row_address(key, row, head) + channel, mask=is_channel), mask=is_channel)
        tl.store(to + head_dim, tl.load(row_address(value, row, head) + channel, mask=is_channel), mask=is_channel)

    if (position + 1) % group_size != 0:
        return
    block = block_ids(quantized, request, position // layout[PAGE_TOKENS], True)
    token = tl.arange(0, group_size)
    rows, positions = row + 1 - group_size + token, position + 1 - group_size + token
    is_old = rows < first_row
    blocks = block_ids(full, request, positions // layout[FULL_PAGE_TOKENS], is_old)
    gone = tl.sum((is_old & (blocks == 0)).to(tl.int32), axis=0)
    if (block == 0) | (gone > 0):  # without its tokens the group cannot be what it should
        return
    tile = tile_address(quantized, block, head, position, layout)
    if layout[K_BITS] < 16:
        old = full_key_addresses(full, blocks, head, positions, layout, dtype)
        _store_keys(key, rows, first_row, head, old, tile, layout, dtype)
    channel, is_channel = channel[None, :], is_channel[None, :]
    for first in range(0, group_size, TOKENS):
        t = first + tl.arange(0, TOKENS)[:, None]
        part, at = row + 1 - group_size + t, position + 1 - group_size + t
        pages = block_ids(full, request, at // layout[FULL_PAGE_TOKENS], part < first_row)
        keys = full_key_addresses(full, pages, head, at, layout, dtype)
        offset = t * head_dim + channel
        if layout[K_BITS] == 16:
            x = _group(key, part, first_row, head, keys, channel, is_channel)
            tl.store((tile + layout[K_CODES]).to(tl.pointer_type(dtype)) + offset, x, mask=is_channel)
        x = _group(value, part, first_row, head, keys + head_dim, channel, is_channel)
        if layout[V_BITS] == 16:
            tl.store((tile + layout[V_CODES]).to(tl.pointer_type(dtype)) + offset, x, mask=is_channel)
        else:
            _store_values(x, first, tile, layout, dtype)

"""store, decode and gather in Triton, for GPUs and head sizes that the compiled extension has no code for.

The same arguments and results as in ops.py, which chooses. Beside the quantization tiles of csrc this is the only place
that knows the order of bits in a tile; where sections lie comes from the layout, as everywhere (format.py).

store and gather have a program for a row and a head, or for 32 of them. In decode one is a query row, a KV head with
its query heads, and a split: an equal part of what the row reads. That is a line of units of TOKENS tokens, first of
tiles and then in full precision, cut by lengths on the device. So grids depend on shapes alone, nothing waits for the
device, and nothing is allocated: calls can be captured in CUDA graphs, once a first call has compiled the kernel.

A unit's codes are read once, unpacked in registers and dequantized to the model's dtype, for all query heads of the KV
head: several instructions a code, where csrc has less than one, in exchange for code that fits any shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_kivi.format import LAYOUT_FIELDS, head_bytes

TOKENS = tl.constexpr(32)  # of a unit; it divides every group size
MIN_UNITS = tl.constexpr(4)  # of a split: fewer are not worth a merge
KEY_CHANNELS = tl.constexpr(64)  # that are quantized at a time
MERGED = tl.constexpr(16)  # splits at a time
LOG2E = tl.constexpr(1.4426950408889634)
UNIT_IS_ONE = tl.constexpr(12582912.0)  # 1.5 * 2^23
MAX_SPLITS = 128
MIN_COLUMNS = 16  # rows of a matrix product
PROGRAMS_PER_MULTIPROCESSOR = 8
# A product and a sum round twice unless tl.fma says otherwise: Triton's versions differ in what they do by themselves.
OPTIONS = {"enable_fp_fusion": False}

# A kernel's `layout` is KVFormat.layout() and the head size rounded up to a power of two; these are indices into it.
HEAD_DIM, NUM_KV_HEADS, K_BITS, V_BITS, GROUP_SIZE, PAGE_TOKENS, FULL_PAGE_TOKENS = map(tl.constexpr, range(7))
RESIDUAL_LENGTH, SINK_TOKENS, FULL_PRECISION, SCALE_SEARCH, NUM_VALUE_GROUPS = map(tl.constexpr, range(7, 12))
K_CODES, K_SCALE, K_ZERO, V_CODES, V_SCALE, V_ZERO, TILE_BYTES, WIDTH = map(tl.constexpr, range(12, 20))


class Rows(NamedTuple):
    data: Any  # [num_tokens, heads, head_dim]
    token_stride: Any
    head_stride: Any


class Pages(NamedTuple):
    data: Any  # uint8 [num_blocks, num_kv_heads, ...]
    block_stride: Any  # bytes
    head_stride: Any
    table: Any  # int32 [num_reqs, max_blocks]
    table_stride: Any


# ---------------------------------------------------------------------------------------------------- where things lie


@triton.jit
def _request_of(start_loc, num_requests, row):
    """The request r with start_loc[r] <= row < start_loc[r + 1]; -1 or num_requests if there is none."""
    count = 0
    for first in range(0, num_requests + 1, 1024):
        index = first + tl.arange(0, 1024)
        starts = tl.load(start_loc + index, mask=index <= num_requests, other=2147483647)
        count += tl.sum((starts <= row).to(tl.int32), axis=0)
    return count - 1


@triton.jit
def _token_of(start_loc, seq_lens, num_requests, row):
    """A row's request, the request's first row, and the row's position; that is negative for padding."""
    request = _request_of(start_loc, num_requests, row)
    is_row = (request >= 0) & (request < num_requests)
    first = tl.load(start_loc + request, mask=is_row, other=0)
    end = tl.load(start_loc + request + 1, mask=is_row, other=0)
    length = tl.load(seq_lens + request, mask=is_row, other=0)
    return request, first, tl.where(is_row, length - (end - row), -1)


@triton.jit
def _row(rows, row, head):
    """Addresses of elements 0."""
    return rows.data + row.to(tl.int64) * rows.token_stride + head.to(tl.int64) * rows.head_stride


@triton.jit
def _blocks(pages, request, page, mask):
    return tl.load(pages.table + request.to(tl.int64) * pages.table_stride + page, mask=mask, other=0)


@triton.jit
def _page(pages, block, head):
    return pages.data + block.to(tl.int64) * pages.block_stride + head.to(tl.int64) * pages.head_stride


@triton.jit
def _tile(quantized, block, head, position, layout: tl.constexpr):
    return _page(quantized, block, head) + position % layout[PAGE_TOKENS] // layout[GROUP_SIZE] * layout[TILE_BYTES]


@triton.jit
def _full_keys(full, block, head, position, layout: tl.constexpr, dtype: tl.constexpr):
    """Addresses of tokens' keys in full precision; each value follows its key."""
    keys = _page(full, block, head).to(tl.pointer_type(dtype))
    return keys + position % layout[FULL_PAGE_TOKENS] * (2 * layout[HEAD_DIM])


# ------------------------------------------------------------------------------------------------------- inside a tile


@triton.jit
def _to_float(codes):
    """Of small integers: their bits are the low ones of 2^23, which costs less than a conversion."""
    return (codes | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)


@triton.jit
def _dequantized(codes, scale, zero, dtype: tl.constexpr):
    x = tl.fma(_to_float(codes), scale, zero)
    if dtype == tl.float16:  # the largest code may lie a rounding beyond the largest number
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    return x.to(dtype)


@triton.jit
def _read_keys(tile, first, layout: tl.constexpr, dtype: tl.constexpr):
    """Keys of a tile's tokens from `first` on: [WIDTH, TOKENS], 0 from channel head_dim on."""
    bits: tl.constexpr = layout[K_BITS]
    head_dim: tl.constexpr = layout[HEAD_DIM]
    group_size: tl.constexpr = layout[GROUP_SIZE]
    width: tl.constexpr = layout[WIDTH]
    per_word: tl.constexpr = 32 // bits
    channel = tl.arange(0, width)[:, None]
    token = first + tl.arange(0, TOKENS)[None, :]
    is_channel = channel < head_dim
    if layout[FULL_PRECISION]:
        keys = (tile + layout[K_CODES]).to(tl.pointer_type(dtype))
        return tl.load(keys + token * head_dim + channel, mask=is_channel, other=0.0)
    word = tl.arange(0, width // per_word)[:, None]
    address = (tile + layout[K_CODES]).to(tl.pointer_type(tl.uint32)) + word * group_size + token
    words = tl.load(address, mask=word < head_dim // per_word, other=0)
    codes = (words[:, None, :] >> (bits * tl.arange(0, per_word))[None, :, None]) & (2**bits - 1)
    scale = tl.load((tile + layout[K_SCALE]).to(tl.pointer_type(dtype)) + channel, mask=is_channel, other=0.0)
    zero = tl.load((tile + layout[K_ZERO]).to(tl.pointer_type(dtype)) + channel, mask=is_channel, other=0.0)
    codes = tl.reshape(codes, [width, TOKENS])
    return _dequantized(codes, scale.to(tl.float32), zero.to(tl.float32), dtype)


@triton.jit
def _read_values(tile, first, first_live, layout: tl.constexpr, dtype: tl.constexpr):
    """Values of a tile's tokens from `first` on: [TOKENS, WIDTH], 0 before `first_live`."""
    bits: tl.constexpr = layout[V_BITS]
    head_dim: tl.constexpr = layout[HEAD_DIM]
    group_size: tl.constexpr = layout[GROUP_SIZE]
    width: tl.constexpr = layout[WIDTH]
    slots: tl.constexpr = 16 // bits
    row_words: tl.constexpr = 4 * head_dim // slots
    groups: tl.constexpr = width // group_size if width > group_size else 1
    token = first + tl.arange(0, TOKENS)[:, None]
    is_live = token >= first_live
    if layout[FULL_PRECISION]:
        channel = tl.arange(0, width)[None, :]
        values = (tile + layout[V_CODES]).to(tl.pointer_type(dtype)) + token * head_dim + channel
        return tl.load(values, mask=is_live & (channel < head_dim), other=0.0)
    octet = first // 8 + tl.arange(0, TOKENS // 8)[:, None]
    word = tl.arange(0, 4 * width // slots)[None, :]
    address = (tile + layout[V_CODES]).to(tl.pointer_type(tl.uint32)) + octet * row_words + word
    words = tl.load(address, mask=word < row_words, other=0)
    codes = (words[:, None, :, None] >> _value_shifts(bits)) & (2**bits - 1)  # [octet, half-word, word, slot]
    codes = tl.permute(tl.reshape(codes, [TOKENS // 8, 2, width, 4]), (0, 1, 3, 2))
    group = tl.arange(0, groups)[None, :]
    offset, mask = group * group_size + token, is_live & (group < layout[NUM_VALUE_GROUPS])
    scale = tl.load((tile + layout[V_SCALE]).to(tl.pointer_type(dtype)) + offset, mask=mask, other=0.0)
    zero = tl.load((tile + layout[V_ZERO]).to(tl.pointer_type(dtype)) + offset, mask=mask, other=0.0)
    codes = tl.reshape(codes, [TOKENS, groups, width // groups])
    values = _dequantized(codes, scale.to(tl.float32)[:, :, None], zero.to(tl.float32)[:, :, None], dtype)
    return tl.reshape(values, [TOKENS, width])


@triton.jit
def _value_shifts(bits: tl.constexpr):
    """Of [octet, half-word, word, slot]; slots count channels and then the 4 tokens of a half-word."""
    half, slot = tl.arange(0, 2), tl.arange(0, 16 // bits)
    return (16 * half)[None, :, None, None] + (bits * slot)[None, None, None, :]


@triton.jit
def _finite(x, dtype: tl.constexpr):
    """float32: NaN is 0, infinities are the largest numbers, and there is no -0."""
    x = x.to(tl.float32)
    limit: tl.constexpr = (
        65504.0 if dtype == tl.float16 else (3.3895313892515355e38 if dtype == tl.bfloat16 else 3.4028234663852886e38)
    )
    x = tl.where((x == 0.0) | (x != x), 0.0, x)
    return tl.minimum(tl.maximum(x, -limit), limit)


@triton.jit
def _biased_codes(x, zero, step, bits: tl.constexpr, dtype: tl.constexpr):
    """Codes plus a number beside which the unit is 1: sums round half to even and have the integer in the low bits."""
    distance = _rounded(x - zero, dtype)  # far below 1 where the step is 0: code 0
    quotient = _rounded(tl.div_rn(distance, tl.where(step == 0.0, 1.0, step)), dtype)
    return tl.minimum(tl.maximum(quotient, 0.0), 2.0**bits - 1.0) + UNIT_IS_ONE


@triton.jit
def _squared_error(x, counted, zero, step, units, bits: tl.constexpr, dtype: tl.constexpr, axis: tl.constexpr):
    """Of groups along `axis`: integers, whose sum does not depend on their order."""
    short = (step.to(tl.uint32, bitcast=True) & 0xFFFFFF00).to(tl.float32, bitcast=True)
    error = (x - zero) - (_biased_codes(x, zero, step, bits, dtype) - UNIT_IS_ONE) * short
    error = (error * units + UNIT_IS_ONE) - UNIT_IS_ONE
    square = (error * error + UNIT_IS_ONE).to(tl.int32, bitcast=True) & 0x003FFFFF
    return tl.sum(tl.where(counted, square, 0), axis=axis, keep_dims=True)


@triton.jit
def _quantized(x, counted, bits: tl.constexpr, dtype: tl.constexpr, axis: tl.constexpr, search: tl.constexpr):
    """Codes, scales and zeros of groups along `axis`, every operation rounded to the model's dtype; see reference.py.

    Elements that are not `counted` have codes, and nothing else.
    """
    levels: tl.constexpr = 2.0**bits - 1.0
    low = tl.min(tl.where(counted, x, float("inf")), axis=axis, keep_dims=True)
    high = tl.max(tl.where(counted, x, float("-inf")), axis=axis, keep_dims=True)
    half = tl.where(_rounded(high - low, dtype) == float("inf"), 0.5, 1.0)  # their range overflows
    zero = _rounded(low * half, dtype)
    step = _rounded(tl.div_rn(_rounded(_rounded(high * half, dtype) - zero, dtype), levels), dtype)
    if search and bits < 8:
        span = high - low
        searched = (span >= 2.0**-14) & (span <= 2.0**15)
        units = (0x84800000 - (span.to(tl.uint32, bitcast=True) & 0x7F800000)).to(tl.float32, bitcast=True)
        least = _squared_error(x, counted, zero, step, units, bits, dtype, axis)
        least -= least // 64
        part, cut = tl.div_rn(span, 40.0), span * 0.0
        for _ in range(7):
            cut += part
            narrow_zero = _rounded(low + cut, dtype)
            narrow_zero = tl.where(narrow_zero == 0.0, 0.0, narrow_zero)
            narrow_step = _rounded(tl.div_rn(span - 2.0 * cut, levels), dtype)
            error = _squared_error(x, counted, narrow_zero, narrow_step, units, bits, dtype, axis)
            better = searched & (error < least)
            least = tl.where(better, error, least)
            zero, step = tl.where(better, narrow_zero, zero), tl.where(better, narrow_step, step)
    codes = _biased_codes(_rounded(x * half, dtype), zero, step, bits, dtype).to(tl.uint32, bitcast=True)
    return codes & (2**bits - 1), tl.where(half < 1.0, step * 2.0, step), tl.where(half < 1.0, low, zero)


# --------------------------------------------------------------------------------------------------------------- store


@triton.jit
def _group(rows, row, first_row, head, old, channel, is_channel):
    """Elements of tokens with these rows, or from addresses `old` where the row is before the request's first."""
    is_new = row >= first_row
    new = tl.load(_row(rows, row, head) + channel, mask=is_new & is_channel, other=0.0)
    return tl.where(is_new, new, tl.load(old + channel, mask=(row < first_row) & is_channel, other=0.0))


@triton.jit(do_not_specialize=["num_requests"])
def _store_kernel(key, value, quantized, full, start_loc, seq_lens, num_requests, layout: tl.constexpr):
    dtype: tl.constexpr = key.data.dtype.element_ty
    group_size: tl.constexpr = layout[GROUP_SIZE]
    head_dim: tl.constexpr = layout[HEAD_DIM]
    width: tl.constexpr = layout[WIDTH]
    row, head = tl.program_id(0), tl.program_id(1)
    request, first_row, position = _token_of(start_loc, seq_lens, num_requests, row)
    if position < 0:
        return
    block = _blocks(full, request, position // layout[FULL_PAGE_TOKENS], True)
    if block != 0:
        channel = tl.arange(0, width)
        to, mask = _full_keys(full, block, head, position, layout, dtype) + channel, channel < head_dim
        tl.store(to, tl.load(_row(key, row, head) + channel, mask=mask), mask=mask)
        tl.store(to + head_dim, tl.load(_row(value, row, head) + channel, mask=mask), mask=mask)

    if (position + 1) % group_size != 0:
        return
    block = _blocks(quantized, request, position // layout[PAGE_TOKENS], True)
    token = tl.arange(0, group_size)
    rows, positions = row + 1 - group_size + token, position + 1 - group_size + token
    is_old = rows < first_row
    blocks = _blocks(full, request, positions // layout[FULL_PAGE_TOKENS], is_old)
    gone = tl.sum((is_old & (blocks == 0)).to(tl.int32), axis=0)
    if (block == 0) | (gone > 0):  # without its tokens the group cannot be what it should
        return
    tile = _tile(quantized, block, head, position, layout)
    elements = tile.to(tl.pointer_type(dtype))
    size: tl.constexpr = dtype.primitive_bitwidth // 8

    if not layout[FULL_PRECISION]:
        per_word: tl.constexpr = 32 // layout[K_BITS]
        old = _full_keys(full, blocks, head, positions, layout, dtype)[:, None]
        for first in range(0, head_dim, KEY_CHANNELS):
            channel = first + tl.arange(0, KEY_CHANNELS)
            is_channel = channel < head_dim
            x = _group(key, rows[:, None], first_row, head, old, channel[None, :], is_channel[None, :])
            codes, scale, zero = _quantized(_finite(x, dtype), True, layout[K_BITS], dtype, 0, layout[SCALE_SEARCH])
            scale, zero = tl.reshape(scale, [KEY_CHANNELS]), tl.reshape(zero, [KEY_CHANNELS])
            tl.store(elements + layout[K_SCALE] // size + channel, scale.to(dtype), mask=is_channel)
            tl.store(elements + layout[K_ZERO] // size + channel, zero.to(dtype), mask=is_channel)
            codes = tl.reshape(codes, [group_size, KEY_CHANNELS // per_word, per_word])
            words = tl.sum(codes << (layout[K_BITS] * tl.arange(0, per_word))[None, None, :], axis=2)
            word = first // per_word + tl.arange(0, KEY_CHANNELS // per_word)[None, :]
            address = (tile + layout[K_CODES]).to(tl.pointer_type(tl.uint32)) + word * group_size + token[:, None]
            tl.store(address, words, mask=word < head_dim // per_word)

    v_channel = tl.arange(0, width)[None, :]
    is_v_channel = v_channel < head_dim
    slots: tl.constexpr = 16 // layout[V_BITS]
    row_words: tl.constexpr = 4 * head_dim // slots
    groups: tl.constexpr = width // group_size if width > group_size else 1
    for first in range(0, group_size, TOKENS):
        t = first + tl.arange(0, TOKENS)[:, None]
        part, at = row + 1 - group_size + t, position + 1 - group_size + t
        pages = _blocks(full, request, at // layout[FULL_PAGE_TOKENS], part < first_row)
        keys = _full_keys(full, pages, head, at, layout, dtype)
        x = _group(value, part, first_row, head, keys + head_dim, v_channel, is_v_channel)
        if layout[FULL_PRECISION]:
            offset = t * head_dim + v_channel
            tl.store(elements + layout[V_CODES] // size + offset, x, mask=is_v_channel)
            x = _group(key, part, first_row, head, keys, v_channel, is_v_channel)
            tl.store(elements + layout[K_CODES] // size + offset, x, mask=is_v_channel)
        else:
            x = tl.reshape(_finite(x, dtype), [TOKENS, groups, width // groups])
            counted = tl.reshape(is_v_channel, [1, groups, width // groups])
            codes, scale, zero = _quantized(x, counted, layout[V_BITS], dtype, 2, layout[SCALE_SEARCH])
            group = tl.arange(0, groups)[None, :]
            offset, mask = group * group_size + t, group < layout[NUM_VALUE_GROUPS]
            scale, zero = tl.reshape(scale, [TOKENS, groups]), tl.reshape(zero, [TOKENS, groups])
            tl.store(elements + layout[V_SCALE] // size + offset, scale.to(dtype), mask=mask)
            tl.store(elements + layout[V_ZERO] // size + offset, zero.to(dtype), mask=mask)
            codes = tl.permute(tl.reshape(codes, [TOKENS // 8, 2, 4, width]), (0, 1, 3, 2))
            codes = tl.reshape(codes, [TOKENS // 8, 2, 4 * width // slots, slots])
            words = tl.sum(tl.sum(codes << _value_shifts(layout[V_BITS]), axis=3), axis=1)  # [octet, word]
            octet = first // 8 + tl.arange(0, TOKENS // 8)[:, None]
            word = tl.arange(0, 4 * width // slots)[None, :]
            address = (tile + layout[V_CODES]).to(tl.pointer_type(tl.uint32)) + octet * row_words + word
            tl.store(address, words, mask=word < row_words)


# -------------------------------------------------------------------------------------------------------------- decode


@triton.jit
def _line(num_tokens, num_splits, layout: tl.constexpr):
    """What a row reads: sinks, boundary, units of tiles, all units, and units of a split."""
    groups = tl.maximum(num_tokens - layout[RESIDUAL_LENGTH], 0) // layout[GROUP_SIZE]
    boundary = groups * layout[GROUP_SIZE]
    sinks = tl.minimum(boundary, layout[SINK_TOKENS])
    tiles = boundary // TOKENS - sinks // TOKENS
    units = tiles + tl.cdiv(num_tokens - boundary + sinks, TOKENS)
    return sinks, boundary, tiles, units, tl.maximum(tl.cdiv(units, num_splits), MIN_UNITS)


@triton.jit
def _attend(query, keys, values, is_live, maximum, total, sums, scale, soft_cap, CAPPED: tl.constexpr):
    scores = tl.dot(query, keys, input_precision="ieee") * scale
    if CAPPED:
        scores = soft_cap * (1.0 - 2.0 / (1.0 + tl.exp(scores * (2.0 / soft_cap))))  # tanh
    scores = tl.where(is_live[None, :], scores * LOG2E, float("-inf"))
    high = tl.maximum(maximum, tl.max(scores, axis=1))
    lowered = tl.exp2(maximum - high)
    weights = tl.exp2(scores - high[:, None])
    sums = tl.dot(weights.to(values.dtype), values, sums * lowered[:, None], input_precision="ieee")
    return high, total * lowered + tl.sum(weights, axis=1), sums


@triton.jit(do_not_specialize=["num_requests", "num_splits", "extremes_offset"])
def _decode_kernel(
    output,
    query,
    quantized,
    full,
    start_loc,
    seq_lens,
    num_requests,
    workspace,  # float32: sums [num_tokens, num_heads, num_splits, D], then their maxima and totals [..., 2]
    extremes_offset,
    num_splits,
    scale,
    soft_cap,
    layout: tl.constexpr,
    RATIO: tl.constexpr,
    COLUMNS: tl.constexpr,
    CAPPED: tl.constexpr,
):
    dtype: tl.constexpr = query.data.dtype.element_ty
    head_dim: tl.constexpr = layout[HEAD_DIM]
    width: tl.constexpr = layout[WIDTH]
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    request, _, position = _token_of(start_loc, seq_lens, num_requests, row)
    if position < 0:
        return
    sinks, boundary, tiles, units, part = _line(position + 1, num_splits, layout)
    begin, end = split * part, tl.minimum((split + 1) * part, units)
    if begin >= end:
        return

    column, channel, token = tl.arange(0, COLUMNS), tl.arange(0, width), tl.arange(0, TOKENS)
    is_channel = channel < head_dim
    own = (column < RATIO)[:, None] & is_channel[None, :]
    query_heads = head * RATIO + column[:, None]
    q = tl.load(_row(query, row, query_heads) + channel[None, :], mask=own, other=0.0)
    maximum = tl.full([COLUMNS], float("-inf"), tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    sums = tl.zeros([COLUMNS, width], tl.float32)
    for unit in range(begin, tl.minimum(end, tiles)):
        first = (sinks // TOKENS + unit) * TOKENS
        block = _blocks(quantized, request, first // layout[PAGE_TOKENS], True)
        tile, offset = _tile(quantized, block, head, first, layout), first % layout[GROUP_SIZE]
        keys = _read_keys(tile, offset, layout, dtype)
        values = _read_values(tile, offset, offset + sinks - first, layout, dtype)
        is_live = first + token >= sinks
        maximum, total, sums = _attend(q, keys, values, is_live, maximum, total, sums, scale, soft_cap, CAPPED)
    for unit in range(tl.maximum(begin, tiles), end):
        index = (unit - tiles) * TOKENS + token
        is_live = index < position + 1 - boundary + sinks
        positions = tl.where(index < sinks, index, index - sinks + boundary)
        blocks = _blocks(full, request, positions // layout[FULL_PAGE_TOKENS], is_live)
        tokens = _full_keys(full, blocks, head, positions, layout, dtype)
        keys = tl.load(tokens[None, :] + channel[:, None], mask=is_channel[:, None] & is_live[None, :], other=0.0)
        address = tokens[:, None] + head_dim + channel[None, :]
        values = tl.load(address, mask=is_live[:, None] & is_channel[None, :], other=0.0)
        maximum, total, sums = _attend(q, keys, values, is_live, maximum, total, sums, scale, soft_cap, CAPPED)

    if num_splits == 1:
        address = _row(output, row, query_heads) + channel[None, :]
        tl.store(address, (sums / total[:, None]).to(dtype), mask=own)
    else:
        line = ((row * tl.num_programs(1) * RATIO + head * RATIO + column) * num_splits + split).to(tl.int64)
        tl.store(workspace + line[:, None] * head_dim + channel[None, :], sums, mask=own)
        tl.store(workspace + extremes_offset + 2 * line, maximum, mask=column < RATIO)
        tl.store(workspace + extremes_offset + 2 * line + 1, total, mask=column < RATIO)


@triton.jit(do_not_specialize=["num_requests", "num_splits", "extremes_offset"])
def _merge_kernel(
    output, start_loc, seq_lens, num_requests, workspace, extremes_offset, num_splits, layout: tl.constexpr
):
    row, head = tl.program_id(0), tl.program_id(1)
    _, _, position = _token_of(start_loc, seq_lens, num_requests, row)
    if position < 0:
        return
    _, _, _, units, part = _line(position + 1, num_splits, layout)
    head_dim: tl.constexpr = layout[HEAD_DIM]
    width: tl.constexpr = layout[WIDTH]
    channel = tl.arange(0, width)
    is_channel = channel < head_dim
    maximum = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    sums = tl.zeros([width], tl.float32)
    for first in range(0, tl.cdiv(units, part), MERGED):
        split = first + tl.arange(0, MERGED)
        is_live = split * part < units
        line = ((row * tl.num_programs(1) + head) * num_splits + split).to(tl.int64)
        extreme = workspace + extremes_offset + 2 * line
        maxima = tl.load(extreme, mask=is_live, other=float("-inf"))
        high = tl.maximum(maximum, tl.max(maxima, axis=0))
        weights, lowered = tl.exp2(maxima - high), tl.exp2(maximum - high)
        mask = is_live[:, None] & is_channel[None, :]
        parts = tl.load(workspace + line[:, None] * head_dim + channel[None, :], mask=mask, other=0.0)
        sums = sums * lowered + tl.sum(parts * weights[:, None], axis=0)
        total = total * lowered + tl.sum(weights * tl.load(extreme + 1, mask=is_live, other=0.0), axis=0)
        maximum = high
    tl.store(_row(output, row, head) + channel, (sums / total).to(output.data.dtype.element_ty), mask=is_channel)


# -------------------------------------------------------------------------------------------------------------- gather


@triton.jit(do_not_specialize=["num_requests", "num_rows"])
def _gather_kernel(
    key, value, quantized, full, start_loc, first, boundary, num_requests, num_rows, layout: tl.constexpr
):
    dtype: tl.constexpr = key.data.dtype.element_ty
    head_dim: tl.constexpr = layout[HEAD_DIM]
    width: tl.constexpr = layout[WIDTH]
    row, head = tl.program_id(0) * TOKENS, tl.program_id(1)
    end = tl.minimum(row + TOKENS, num_rows)
    channel = tl.arange(0, width)
    is_channel = channel < head_dim
    while row < end:  # rows of one request and one unit at a time
        request = _request_of(start_loc, num_requests, row)
        is_row = (request >= 0) & (request < num_requests)
        position = tl.load(first + request, mask=is_row, other=0) + row
        position -= tl.load(start_loc + request, mask=is_row, other=0)
        unit = position // TOKENS * TOKENS
        stop = tl.minimum(tl.load(start_loc + request + 1, mask=is_row, other=0), row + TOKENS - (position - unit))
        stop = tl.where(is_row, tl.minimum(stop, end), row)
        positions = unit + tl.arange(0, TOKENS)
        rows = row + positions - position
        is_live = (rows >= row) & (rows < stop)
        limit = tl.load(boundary + request, mask=is_row, other=0)
        is_quantized = is_live & (positions >= layout[SINK_TOKENS]) & (positions < limit)
        is_full = is_live & (is_quantized == 0)
        to_keys, to_values = _row(key, rows, head), _row(value, rows, head)
        if tl.sum(is_quantized.to(tl.int32), axis=0) > 0:
            block = _blocks(quantized, request, unit // layout[PAGE_TOKENS], True)
            tile, offset = _tile(quantized, block, head, unit, layout), unit % layout[GROUP_SIZE]
            mask = is_channel[:, None] & is_quantized[None, :]
            tl.store(to_keys[None, :] + channel[:, None], _read_keys(tile, offset, layout, dtype), mask=mask)
            mask = is_quantized[:, None] & is_channel[None, :]
            tl.store(to_values[:, None] + channel[None, :], _read_values(tile, offset, 0, layout, dtype), mask=mask)
        if tl.sum(is_full.to(tl.int32), axis=0) > 0:
            blocks = _blocks(full, request, positions // layout[FULL_PAGE_TOKENS], is_full)
            tokens = _full_keys(full, blocks, head, positions, layout, dtype)[:, None] + channel[None, :]
            mask = is_full[:, None] & is_channel[None, :]
            tl.store(to_keys[:, None] + channel[None, :], tl.load(tokens, mask=mask), mask=mask)
            tl.store(to_values[:, None] + channel[None, :], tl.load(tokens + head_dim, mask=mask), mask=mask)
        row = tl.maximum(stop, row + 1)


# ----------------------------------------------------------------------------------------------------------------- ops


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise RuntimeError(f"kivi: {message}")


def _rows(rows: Tensor, name: str, shape: Sequence[int], dtype: torch.dtype) -> Rows:
    fits = rows.shape == torch.Size(shape) and rows.dtype == dtype and rows.stride(2) == 1
    _check(fits, f"{name} must be {list(shape)} in {dtype}, its last dimension contiguous")
    return Rows(rows, rows.stride(0), rows.stride(1))


def _pages(pages: Tensor, table: Tensor, name: str, num_requests: int, num_heads: int, head_bytes: int) -> Pages:
    data = pages.view(torch.uint8)
    fits = data.shape[1] == num_heads and data[0, 0].is_contiguous() and data[0, 0].numel() >= head_bytes
    _check(fits, f"{name} must be [num_blocks, {num_heads}, ...] with {head_bytes} bytes a block and head, contiguous")
    fits = table.dtype == torch.int32 and len(table) >= num_requests and table.stride(1) == 1
    _check(fits, f"the block table of {name} must be int32 [num_reqs, max_blocks], rows contiguous")
    return Pages(data, data.stride(0), data.stride(1), table, table.stride(0))


class _Call:
    """What the ops share: the layout, both kinds of pages, and the checks that need not wait for a device."""

    def __init__(self, layout: Sequence[int], rows: Tensor, pages: Sequence[Tensor], *ints: Tensor) -> None:
        _check(len(layout) == len(LAYOUT_FIELDS), f"layout has {len(layout)} entries, not {len(LAYOUT_FIELDS)}")
        fields = dict(zip(LAYOUT_FIELDS, layout, strict=True))
        self.head_dim, self.num_heads = fields["head_dim"], fields["num_kv_heads"]
        self.page_tokens, self.num_requests = fields["page_tokens"], len(ints[0]) - 1
        size = rows.element_size()
        element, quantized_bytes, full_bytes = head_bytes(layout)
        _check(element == size, f"the layout is not for elements of {size} bytes")
        fits = all(x.dtype == torch.int32 and x.is_contiguous() and len(x) >= self.num_requests for x in ints)
        _check(fits, "starts and lengths must be int32 and contiguous, one a request")
        quantized, full, quantized_table, full_table = pages
        shared = self.num_requests, self.num_heads
        self.pages = (
            _pages(quantized, quantized_table, "quantized_pages", *shared, quantized_bytes),
            _pages(full, full_table, "full_pages", *shared, full_bytes),
        )
        self.layout = (*layout, triton.next_power_of_2(self.head_dim))


def store(
    key: Tensor,
    value: Tensor,
    quantized_pages: Tensor,
    full_pages: Tensor,
    quantized_block_table: Tensor,
    full_block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    layout: Sequence[int],
) -> None:
    """See ops.store."""
    pages = quantized_pages, full_pages, quantized_block_table, full_block_table
    call = _Call(layout, key, pages, query_start_loc, seq_lens)
    shape = len(key), call.num_heads, call.head_dim
    rows = _rows(key, "key", shape, key.dtype), _rows(value, "value", shape, key.dtype)
    batch = query_start_loc, seq_lens, call.num_requests
    if len(key):
        with torch.cuda.device_of(key):
            _store_kernel[shape[:2]](*rows, *call.pages, *batch, call.layout, **OPTIONS)


def decode_workspace(layout: Sequence[int], device: torch.device) -> Tensor:
    """See ops.decode_workspace."""
    head_dim, multiprocessors = layout[0], 1
    if device.type == "cuda":
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    num_rows = multiprocessors * PROGRAMS_PER_MULTIPROCESSOR * MIN_COLUMNS
    return torch.zeros(num_rows * (head_dim + 2) * 4, dtype=torch.uint8, device=device)


def decode(
    output: Tensor,
    query: Tensor,
    quantized_pages: Tensor,
    full_pages: Tensor,
    quantized_block_table: Tensor,
    full_block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    logits_soft_cap: float,
    layout: Sequence[int],
    workspace: Tensor | None = None,
) -> None:
    """See ops.decode."""
    if workspace is None:
        raise RuntimeError("kivi: decode on CUDA needs a workspace; see vllm_kivi.ops.decode_workspace")
    pages = quantized_pages, full_pages, quantized_block_table, full_block_table
    call = _Call(layout, query, pages, query_start_loc, seq_lens)
    num_tokens, num_heads = query.shape[:2]
    fits = num_heads > 0 and num_heads % call.num_heads == 0
    _check(fits, f"query has {num_heads} heads, not a multiple of num_kv_heads = {call.num_heads}")
    shape = num_tokens, num_heads, call.head_dim
    rows = _rows(output, "output", shape, query.dtype), _rows(query, "query", shape, query.dtype)
    if num_tokens == 0:
        return
    columns = max(MIN_COLUMNS, triton.next_power_of_2(num_heads // call.num_heads))
    sums = workspace.view(torch.float32)
    capacity = len(sums) // (call.head_dim + 2) // (num_tokens * call.num_heads * columns)
    longest = quantized_block_table.shape[1] * call.page_tokens // (TOKENS.value * MIN_UNITS.value)
    num_splits = max(1, min(capacity, longest, MAX_SPLITS))
    batch = query_start_loc, seq_lens, call.num_requests
    split = sums, num_tokens * num_heads * num_splits * call.head_dim, num_splits
    capped = logits_soft_cap > 0
    constants = call.layout, num_heads // call.num_heads, columns, capped
    with torch.cuda.device_of(query):
        grid = num_tokens, call.num_heads, num_splits
        numbers = scale, logits_soft_cap if capped else 1.0
        _decode_kernel[grid](*rows, *call.pages, *batch, *split, *numbers, *constants, **OPTIONS)
        if num_splits > 1:
            _merge_kernel[shape[:2]](rows[0], *batch, *split, call.layout, **OPTIONS)


def gather(
    key: Tensor,
    value: Tensor,
    quantized_pages: Tensor,
    full_pages: Tensor,
    quantized_block_table: Tensor,
    full_block_table: Tensor,
    start_loc: Tensor,
    first: Tensor,
    boundary: Tensor,
    layout: Sequence[int],
) -> None:
    """See ops.gather."""
    pages = quantized_pages, full_pages, quantized_block_table, full_block_table
    call = _Call(layout, key, pages, start_loc, first, boundary)
    shape = len(key), call.num_heads, call.head_dim
    rows = _rows(key, "key", shape, key.dtype), _rows(value, "value", shape, key.dtype)
    batch = start_loc, first, boundary, call.num_requests, len(key)
    if len(key):
        with torch.cuda.device_of(key):
            grid = triton.cdiv(len(key), TOKENS.value), call.num_heads
            _gather_kernel[grid](*rows, *call.pages, *batch, call.layout, **OPTIONS)

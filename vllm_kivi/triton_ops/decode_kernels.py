"""decode: a program for a query row, a KV head with its query heads, and a split: an equal part of what the row reads.

That is a line of units of TOKENS tokens, first of tiles and then in full precision, cut by lengths on the device. A
unit's codes are read once, unpacked in registers and dequantized to the model's dtype, for all query heads: several
instructions a code, where csrc has less than one, in exchange for code that fits any shape. A
second kernel merges the splits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_kivi.triton_ops.layout import (
    FULL_PAGE_TOKENS,
    GROUP_SIZE,
    HEAD_DIM,
    PAGE_TOKENS,
    RESIDUAL_LENGTH,
    ROTATE_VALUES,
    SINK_TOKENS,
    TOKENS,
    WIDTH,
    block_ids,
    full_key_addresses,
    row_address,
    tile_address,
    token_of,
)
from vllm_kivi.triton_ops.numbers import rotated
from vllm_kivi.triton_ops.tile import read_keys, read_values

MIN_UNITS = tl.constexpr(4)  # of a split: fewer are not worth a merge
MERGED = tl.constexpr(16)  # splits at a time
LOG2E = tl.constexpr(1.4426950408889634)


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
def decode_kernel(
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
    request, _, position = token_of(start_loc, seq_lens, num_requests, row)
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
    q = tl.load(row_address(query, row, query_heads) + channel[None, :], mask=own, other=0.0)
    maximum = tl.full([COLUMNS], float("-inf"), tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    sums = tl.zeros([COLUMNS, width], tl.float32)
    for unit in range(begin, tl.minimum(end, tiles)):
        first = (sinks // TOKENS + unit) * TOKENS
        block = block_ids(quantized, request, first // layout[PAGE_TOKENS], True)
        tile, offset = tile_address(quantized, block, head, first, layout), first % layout[GROUP_SIZE]
        keys = read_keys(tile, offset, layout, dtype)
        values = read_values(tile, offset, offset + sinks - first, layout, dtype, dtype)
        is_live = first + token >= sinks
        maximum, total, sums = _attend(q, keys, values, is_live, maximum, total, sums, scale, soft_cap, CAPPED)
    if layout[ROTATE_VALUES]:  # what follows is not
        sums = rotated(sums, layout)
    for unit in range(tl.maximum(begin, tiles), end):
        index = (unit - tiles) * TOKENS + token
        is_live = index < position + 1 - boundary + sinks
        positions = tl.where(index < sinks, index, index - sinks + boundary)
        blocks = block_ids(full, request, positions // layout[FULL_PAGE_TOKENS], is_live)
        tokens = full_key_addresses(full, blocks, head, positions, layout, dtype)
        keys = tl.load(tokens[None, :] + channel[:, None], mask=is_channel[:, None] & is_live[None, :], other=0.0)
        address = tokens[:, None] + head_dim + channel[None, :]
        values = tl.load(address, mask=is_live[:, None] & is_channel[None, :], other=0.0)
        maximum, total, sums = _attend(q, keys, values, is_live, maximum, total, sums, scale, soft_cap, CAPPED)

    if num_splits == 1:
        address = row_address(output, row, query_heads) + channel[None, :]
        tl.store(address, (sums / total[:, None]).to(dtype), mask=own)
    else:
        line = ((row * tl.num_programs(1) * RATIO + head * RATIO + column) * num_splits + split).to(tl.int64)
        tl.store(workspace + line[:, None] * head_dim + channel[None, :], sums, mask=own)
        tl.store(workspace + extremes_offset + 2 * line, maximum, mask=column < RATIO)
        tl.store(workspace + extremes_offset + 2 * line + 1, total, mask=column < RATIO)


@triton.jit(do_not_specialize=["num_requests", "num_splits", "extremes_offset"])
def merge_kernel(
    output, start_loc, seq_lens, num_requests, workspace, extremes_offset, num_splits, layout: tl.constexpr
):
    row, head = tl.program_id(0), tl.program_id(1)
    _, _, position = token_of(start_loc, seq_lens, num_requests, row)
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
    tl.store(row_address(output, row, head) + channel, (sums / total).to(output.data.dtype.element_ty), mask=is_channel)

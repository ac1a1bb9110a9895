"""gather: a program for TOKENS rows and a head."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_kivi.triton_ops.layout import (
    FULL_PAGE_TOKENS,
    GROUP_SIZE,
    HEAD_DIM,
    PAGE_TOKENS,
    ROTATE_VALUES,
    SINK_TOKENS,
    TOKENS,
    WIDTH,
    block_ids,
    full_key_addresses,
    request_of,
    row_address,
    tile_address,
)
from vllm_kivi.triton_ops.numbers import rotated
from vllm_kivi.triton_ops.tile import read_keys, read_values


@triton.jit(do_not_specialize=["num_requests", "num_rows"])
def gather_kernel(
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
        request = request_of(start_loc, num_requests, row)
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
        to_keys, to_values = row_address(key, rows, head), row_address(value, rows, head)
        if tl.sum(is_quantized.to(tl.int32), axis=0) > 0:
            block = block_ids(quantized, request, unit // layout[PAGE_TOKENS], True)
            tile, offset = tile_address(quantized, block, head, unit, layout), unit % layout[GROUP_SIZE]
            mask = is_channel[:, None] & is_quantized[None, :]
            tl.store(to_keys[None, :] + channel[:, None], read_keys(tile, offset, layout, dtype), mask=mask)
            mask = is_quantized[:, None] & is_channel[None, :]
            if layout[ROTATE_VALUES]:
                values = rotated(read_values(tile, offset, 0, layout, dtype, tl.float32), layout).to(dtype)
            else:
                values = read_values(tile, offset, 0, layout, dtype, dtype)
            tl.store(to_values[:, None] + channel[None, :], values, mask=mask)
        if tl.sum(is_full.to(tl.int32), axis=0) > 0:
            blocks = block_ids(full, request, positions // layout[FULL_PAGE_TOKENS], is_full)
            tokens = full_key_addresses(full, blocks, head, positions, layout, dtype)[:, None] + channel[None, :]
            mask = is_full[:, None] & is_channel[None, :]
            tl.store(to_keys[:, None] + channel[None, :], tl.load(tokens, mask=mask), mask=mask)
            tl.store(to_values[:, None] + channel[None, :], tl.load(tokens + head_dim, mask=mask), mask=mask)
        row = tl.maximum(stop, row + 1)

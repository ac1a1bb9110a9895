"""Where things lie: a kernel's layout, and addresses of rows, pages, tiles and tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

TOKENS = tl.constexpr(32)  # of a unit; it divides every group size

# A kernel's `layout` is KVFormat.layout() and the head size rounded up to a power of two; these are indices into it.
HEAD_DIM, NUM_KV_HEADS, K_BITS, V_BITS, GROUP_SIZE, PAGE_TOKENS, FULL_PAGE_TOKENS = map(tl.constexpr, range(7))
RESIDUAL_LENGTH, SINK_TOKENS, SCALE_SEARCH, ROTATE_VALUES = map(tl.constexpr, range(7, 11))
BOOSTED_CHANNELS, NUM_VALUE_GROUPS, K_CODES, K_BOOST, K_SCALE, K_ZERO = map(tl.constexpr, range(11, 17))
V_CODES, V_SCALE, V_ZERO, TILE_BYTES, WIDTH = map(tl.constexpr, range(17, 22))


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


@triton.jit
def request_of(start_loc, num_requests, row):
    """The request r with start_loc[r] <= row < start_loc[r + 1]; -1 or num_requests if there is none."""
    count = 0
    for first in range(0, num_requests + 1, 1024):
        index = first + tl.arange(0, 1024)
        starts = tl.load(start_loc + index, mask=index <= num_requests, other=2147483647)
        count += tl.sum((starts <= row).to(tl.int32), axis=0)
    return count - 1


@triton.jit
def token_of(start_loc, seq_lens, num_requests, row):
    """A row's request, the request's first row, and the row's position; that is negative for padding."""
    request = request_of(start_loc, num_requests, row)
    is_row = (request >= 0) & (request < num_requests)
    first = tl.load(start_loc + request, mask=is_row, other=0)
    end = tl.load(start_loc + request + 1, mask=is_row, other=0)
    length = tl.load(seq_lens + request, mask=is_row, other=0)
    return request, first, tl.where(is_row, length - (end - row), -1)


@triton.jit
def row_address(rows, row, head):
    """Addresses of elements 0."""
    return rows.data + row.to(tl.int64) * rows.token_stride + head.to(tl.int64) * rows.head_stride


@triton.jit
def block_ids(pages, request, page, mask):
    return tl.load(pages.table + request.to(tl.int64) * pages.table_stride + page, mask=mask, other=0)


@triton.jit
def page_address(pages, block, head):
    return pages.data + block.to(tl.int64) * pages.block_stride + head.to(tl.int64) * pages.head_stride


@triton.jit
def tile_address(quantized, block, head, position, layout: tl.constexpr):
    return (
        page_address(quantized, block, head) + position % layout[PAGE_TOKENS] // layout[GROUP_SIZE] * layout[TILE_BYTES]
    )


@triton.jit
def full_key_addresses(full, block, head, position, layout: tl.constexpr, dtype: tl.constexpr):
    """Addresses of tokens' keys in full precision; each value follows its key."""
    keys = page_address(full, block, head).to(tl.pointer_type(dtype))
    return keys + position % layout[FULL_PAGE_TOKENS] * (2 * layout[HEAD_DIM])

"""store, decode and gather in Triton, for GPUs, head sizes and bits that the compiled extension has no code for.

The same arguments and results as in ops.py, which chooses. This file checks them and launches:

    layout.py                                            where things lie
    numbers.py                                           from numbers to codes and back
    tile.py                                              the order of bits in a tile, for those who read
    store_kernel.py, decode_kernels.py, gather_kernel.py

Beside the quantization tiles of csrc, tile.py and store_kernel.py are the only places that know the order of bits;
where sections lie comes from the layout, as everywhere (format.py).

Grids depend on shapes alone, nothing waits for the device, and nothing is allocated: calls can be captured in CUDA
graphs, once a first call has compiled the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from vllm_kivi.format import LAYOUT_FIELDS, head_bytes
from vllm_kivi.triton_ops.decode_kernels import MIN_UNITS, decode_kernel, merge_kernel
from vllm_kivi.triton_ops.gather_kernel import gather_kernel
from vllm_kivi.triton_ops.layout import TOKENS, Pages, Rows
from vllm_kivi.triton_ops.store_kernel import store_kernel

MAX_SPLITS = 128
MIN_COLUMNS = 16  # rows of a matrix product
PROGRAMS_PER_MULTIPROCESSOR = 8
# A product and a sum round twice unless tl.fma says otherwise: Triton's versions differ in what they do by themselves.
OPTIONS = {"enable_fp_fusion": False}
DEFAULT_WARPS = 4
TUNED_WARPS = 8  # of a store that rotates or boosts, for its registers


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
        self.is_tuned = bool(fields["rotate_values"] or fields["boosted_channels"])
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
            warps = TUNED_WARPS if call.is_tuned else DEFAULT_WARPS
            store_kernel[shape[:2]](*rows, *call.pages, *batch, call.layout, num_warps=warps, **OPTIONS)


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
        decode_kernel[grid](*rows, *call.pages, *batch, *split, *numbers, *constants, **OPTIONS)
        if num_splits > 1:
            merge_kernel[shape[:2]](rows[0], *batch, *split, call.layout, **OPTIONS)


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
            gather_kernel[grid](*rows, *call.pages, *batch, call.layout, **OPTIONS)

"""A step of one token for every row of a layer's pages (pages.py), also as an op that torch.compile takes whole."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vllm_kivi import ops
from vllm_kivi.format import LAYOUT_FIELDS, head_bytes


def page_views(memory: Tensor, num_full: int, layout: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Quantized pages, whose null block is the end of the others, and full-precision pages: uint8 [blocks, H, bytes].

    Args:
        memory: uint8, first `num_full` full-precision pages, then quantized ones.
    """
    num_kv_heads, sizes = layout[LAYOUT_FIELDS.index("num_kv_heads")], head_bytes(layout)
    end, page = num_full * num_kv_heads * sizes.full_page, num_kv_heads * sizes.quantized_page
    shape = (memory.numel() - end) // page + 1, num_kv_heads, sizes.quantized_page
    quantized = memory.as_strided(shape, (page, sizes.quantized_page, 1), end - page)
    return quantized, memory[:end].view(num_full, num_kv_heads, sizes.full_page)


def decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    pages: tuple[Tensor, Tensor],
    tables: tuple[Tensor, Tensor],
    starts: Tensor,
    seq_lens: Tensor,
    workspace: Tensor | None,
    scale: float,
    logits_soft_cap: float,
    layout: Sequence[int],
) -> Tensor:
    """Store a token of each row and attend to it and to what was there.

    Args:
        query: [B, heads, 1, D]; key, value: [B, H, 1, D].
        real: bool [B, 1], False where a row's token is padding, which is not stored; None: none is.
        pages, tables: quantized and full-precision.
        seq_lens: int32 [B], this token included.
        starts, workspace, layout: those of Pages.

    Returns:
        [B, 1, heads, D]; of padding, anything.
    """
    rows, keys, values = (x.squeeze(2) for x in (query, key, value))
    if real is not None:
        # Padding is a request of its own, one token in null blocks.
        tables = tables[0].where(real, 0), tables[1].where(real, 0)
        seq_lens = seq_lens.where(real[:, 0], 1)
    ops.store(keys, values, *pages, *tables, starts, seq_lens, layout)
    output = torch.empty_like(rows)
    ops.decode(output, rows, *pages, *tables, starts, seq_lens, scale, logits_soft_cap, layout, workspace)
    return output[:, None]


@torch.library.custom_op("vllm_kivi::cached_decode", mutates_args=("memory", "workspace"))
def compiled_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor | None,
    memory: Tensor,
    num_full: int,
    quantized_table: Tensor,
    full_table: Tensor,
    starts: Tensor,
    seq_lens: Tensor,
    workspace: Tensor | None,
    scale: float,
    logits_soft_cap: float,
    layout: Sequence[int],
) -> Tensor:
    """`decode` for torch.compile, which wants memory once and not two views of it."""
    pages, tables = page_views(memory, num_full, layout), (quantized_table, full_table)
    return decode(query, key, value, real, pages, tables, starts, seq_lens, workspace, scale, logits_soft_cap, layout)


@compiled_decode.register_fake
def _(query: Tensor, *args: object) -> Tensor:
    return torch.empty_like(query.squeeze(2))[:, None]

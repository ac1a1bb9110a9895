"""Prefill on a GPU: vLLM's FlashAttention over a chunk's own tokens, then over its context piece by piece.

A chunk reads its own tokens in full precision from `key` and `value`. Tokens before it are gathered, dequantized where
the boundary says so, into a buffer of CONTEXT_TOKENS tokens that all layers share; what a piece yields is merged into
the output by log-sum-exp. Rows past the prompt, which a preempted request recomputes, attend as in decode: each run of
rows with one boundary (at most G) is attended on its own, since what it reads quantized may lie in the chunk itself.

What is attended to what is planned once a step on the host, from lengths that vLLM has there: nothing waits for the
device, and nothing grows with max_model_len.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

from vllm_kivi import ops
from vllm_kivi.backend.heuristics import CONTEXT_TOKENS, shared
from vllm_kivi.format import KVFormat


@dataclass
class Run:
    """Rows of one request that share a boundary; they read `context` tokens from pages and the rest from the chunk."""

    request: int
    rows: slice  # in the batch
    boundary: int
    context: int
    keys: slice  # rows of key and value that it reads


@dataclass
class Piece:
    """One call of FlashAttention: the rows of consecutive requests against a stretch of each one's tokens.

    Where `keys` is None they are gathered: of request requests.start + i its tokens from first[i] on, quantized below
    boundary[i].
    """

    rows: slice
    requests: slice
    keys: slice | None
    row_counts: list[int]
    key_counts: list[int]
    first: list[int] = field(default_factory=list)
    boundary: list[int] = field(default_factory=list)
    # int32 [4, num_requests + 1] on the device: starts of rows, starts of keys, first and boundary
    table: Tensor = field(init=False)

    def host_table(self) -> list[list[int]]:
        starts = [list(accumulate(counts, initial=0)) for counts in (self.row_counts, self.key_counts)]
        pad = [0] * (len(self.row_counts) + 1 - len(self.first))
        return [*starts, self.first + pad, self.boundary + pad]


def runs_of(
    fmt: KVFormat, request: int, rows: slice, num_tokens: int, num_prompt_tokens: int
) -> Iterator[tuple[Run, bool]]:
    """The runs of a request whose last rows are `rows`, and whether each belongs to the prompt."""
    start, end = num_tokens - (rows.stop - rows.start), num_tokens

    def row_of(position: int) -> int:
        return rows.start + position - start

    prompt_end = min(max(num_prompt_tokens, start), end)
    if prompt_end > start:
        chunk = slice(rows.start, row_of(prompt_end))
        yield Run(request, chunk, min(fmt.boundary(start + 1), start), start, chunk), True
    position = prompt_end
    while position < end:
        boundary = fmt.boundary(position + 1)
        stop = min(boundary + fmt.group_size + fmt.residual_length - 1, end)
        context = max(boundary, start)
        own = slice(row_of(context), row_of(stop))
        yield Run(request, slice(row_of(position), row_of(stop)), boundary, context, own), False
        position = stop


def plan(
    fmt: KVFormat,
    query_start_loc: Sequence[int],
    seq_lens: Sequence[int],
    num_prompt_tokens: Sequence[int],
    capacity: int = CONTEXT_TOKENS,
) -> list[Piece]:
    """What to call for requests that prefill, in order.

    The first piece is all of the chunks against themselves, as if every row belonged to a prompt. It is followed by
    those that replace it for rows that do not, and by those of the context, which are merged into what is there.

    Args:
        query_start_loc, seq_lens: as the ops take them, of the requests that prefill.
        num_prompt_tokens: where each prompt ends.
        capacity: tokens that fit into the buffer for context.
    """
    bounds = [slice(*pair) for pair in pairwise(query_start_loc)]
    counts = [rows.stop - rows.start for rows in bounds]
    whole = slice(query_start_loc[0], query_start_loc[-1])
    pieces = [Piece(whole, slice(0, len(bounds)), whole, counts, counts)]
    context: list[Piece] = []
    room = 0
    for request, rows in enumerate(bounds):
        for run, in_prompt in runs_of(fmt, request, rows, seq_lens[request], num_prompt_tokens[request]):
            num_rows = run.rows.stop - run.rows.start
            if not in_prompt:
                num_keys = run.keys.stop - run.keys.start
                pieces.append(Piece(run.rows, slice(request, request + 1), run.keys, [num_rows], [num_keys]))
            first = 0
            while first < run.context:
                last = context[-1] if context else None
                if last is None or not room or (last.requests.stop, last.rows.stop) != (request, run.rows.start):
                    last = Piece(slice(run.rows.start, 0), slice(request, 0), None, [], [])
                    context.append(last)
                    room = capacity
                count = min(room, run.context - first)
                last.rows = slice(last.rows.start, run.rows.stop)
                last.requests = slice(last.requests.start, request + 1)
                last.row_counts.append(num_rows)
                last.key_counts.append(count)
                last.first.append(first)
                last.boundary.append(run.boundary)
                room -= count
                first += count
    return pieces + context


def upload(pieces: list[Piece], device: torch.device) -> list[Piece]:
    """Give all pieces their tables in one copy, which nothing waits for."""
    tables = [piece.host_table() for piece in pieces]
    flat = [value for table in tables for row in table for value in row]
    host = torch.tensor(flat, dtype=torch.int32, pin_memory=device.type == "cuda")
    lengths = [4 * len(table[0]) for table in tables]
    for piece, values in zip(pieces, host.to(device, non_blocking=True).split(lengths), strict=True):
        piece.table = values.view(4, -1)
    return pieces


class GpuPrefill:
    """Prefill of one layer.

    Args:
        flash_attention: vLLM's flash_attn_varlen_func for this layer's head size.
        scale, logits_soft_cap: as the ops take them.
    """

    def __init__(
        self,
        fmt: KVFormat,
        scale: float,
        logits_soft_cap: float,
        flash_attention: Callable[..., tuple[Tensor, Tensor]],
        device: torch.device,
    ) -> None:
        shape = (2, CONTEXT_TOKENS, fmt.num_kv_heads, fmt.head_dim)
        dtype = getattr(torch, fmt.dtype)
        self._context = shared(
            ("context", shape, dtype, device), lambda: torch.empty(shape, dtype=dtype, device=device)
        )
        self._layout = fmt.layout()
        self._scale = scale
        self._logits_soft_cap = logits_soft_cap
        self._flash_attention = flash_attention

    def reserve(self, query: Tensor) -> None:
        """Take what a step may take beside the shared buffer, so that vLLM sees it when it measures memory."""
        num_tokens, num_heads, _ = query.shape
        part = torch.empty_like(query)
        lse = torch.empty((3, num_heads, num_tokens), dtype=torch.float32, device=query.device)
        del part, lse

    def _attend(
        self, query: Tensor, keys: Tensor, values: Tensor, piece: Piece, causal: bool, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Rows [num_rows, num_heads, D] and their log-sum-exp, float32 [num_heads, num_rows]."""
        return self._flash_attention(
            q=query,
            k=keys,
            v=values,
            out=out,
            cu_seqlens_q=piece.table[0],
            cu_seqlens_k=piece.table[1],
            max_seqlen_q=max(piece.row_counts),
            max_seqlen_k=max(piece.key_counts),
            softmax_scale=self._scale,
            softcap=self._logits_soft_cap,
            causal=causal,
            return_softmax_lse=True,
        )

    def __call__(
        self,
        output: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        quantized_pages: Tensor,
        full_pages: Tensor,
        quantized_block_table: Tensor,
        full_block_table: Tensor,
        pieces: list[Piece],
    ) -> None:
        """Attend the rows of `pieces`, whose chunks are stored already, and write `output`.

        Args:
            query, output: [num_tokens, num_heads, D]; key, value: [num_tokens, num_kv_heads, D]
            quantized_block_table, full_block_table: of the requests that prefill.
        """
        start = pieces[0].rows.start
        lse = torch.empty(0)
        for piece in pieces:
            rows, own_rows = piece.rows, slice(piece.rows.start - start, piece.rows.stop - start)
            if piece.keys is not None and not piece.key_counts[0]:  # all that the row reads is quantized
                output[rows].zero_()
                lse[:, own_rows] = -torch.inf
                continue
            if piece.keys is not None:
                own = self._attend(query[rows], key[piece.keys], value[piece.keys], piece, True, output[rows])[1]
                if piece is pieces[0]:
                    lse = own
                else:
                    lse[:, own_rows] = own
                continue
            keys, values = self._context.tensors[:, : sum(piece.key_counts)]
            ops.gather(
                keys,
                values,
                quantized_pages,
                full_pages,
                quantized_block_table[piece.requests],
                full_block_table[piece.requests],
                piece.table[1],
                piece.table[2, :-1],
                piece.table[3, :-1],
                self._layout,
            )
            part, part_lse = self._attend(query[rows], keys, values, piece, False)
            merge_attn_states(
                output=output[rows],
                output_lse=lse[:, own_rows],
                prefix_output=output[rows],
                prefix_lse=lse[:, own_rows],
                suffix_output=part,
                suffix_lse=part_lse,
            )

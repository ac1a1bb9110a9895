"""Pages of one layer for a batch of sequences, without an engine that hands them out.

The two page types and the rules of what attends to what are those of docs/DESIGN.md; here a row of the batch simply
owns its pages, and block tables are arithmetic:

    full pages: [1 + B * (S + W)]; a row's first S hold the sinks, the others are a ring of the last tokens: column c of
        the block table is page c where c < S, else page S + c % W.
    quantized pages: [1 + B * Q]; column c of row b is block 1 + b * Q + c. Q grows, or is fixed.

Block 0 is the null block, which nobody reads or writes: that of the quantized pages is the end of the full ones.
Padding never reaches a page: what a step brings is cut into requests of the ops, and those that are padding have block
tables of null blocks.

With a fixed number of tokens nothing is allocated after the first step, and steps of one token (decode.py) know all
lengths on the device alone: torch.compile sees one op, and CUDA graphs can replay it.

Shapes in this file: B rows, q new tokens of each, H KV heads, D head_dim, n tokens of a full-precision page.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_kivi import ops
from vllm_kivi.format import KVFormat
from vllm_kivi.transformers.decode import compiled_decode, decode, page_views
from vllm_kivi.transformers.plain import masked_attention

# A pool that is too small grows by this part of itself: pages that wait for tokens stay below 1 % of the memory, and
# a token is copied so many times on average, at most.
GROWTH = 128
_STATE = ("batch_size", "row_pages", "max_tokens", "max_crop", "memory", "lengths", "longest")
PROMPT = torch.iinfo(torch.int32).max  # as num_prompt_tokens: every row is of the prompt


class Part(NamedTuple):
    """Consecutive tokens of each row of a step, and how long the row is after them, of padding just its length."""

    length: Tensor  # int32 [B]
    seq_lens: Tensor


class Request(NamedTuple):
    """Arguments of the ops."""

    quantized_block_table: Tensor
    full_block_table: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor


class Pages:
    """Keys and values of one layer.

    Args:
        fmt: the layer's byte map.
        batch_size: B.
        max_tokens: of a row; 0: pools grow.
        max_crop: tokens that can be taken from the end of a row without loss.
        workspace: ops.decode_workspace, which layers can share; None on the CPU.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        fmt: KVFormat,
        batch_size: int,
        device: torch.device,
        max_tokens: int = 0,
        max_crop: int = 0,
        workspace: Tensor | None = None,
    ) -> None:
        self.fmt = fmt
        self.layout = fmt.layout()
        self.has_prefill = device.type == "cpu"  # else a chunk's context is dequantized
        self.device = device
        self.max_tokens = max_tokens
        self.max_crop = max_crop
        self.workspace = workspace
        # One more than is read in full precision, so that the tokens of an incomplete group and those that complete it
        # are there together whatever R is.
        window = fmt.residual_length + fmt.group_size + max_crop
        self.sink_pages = math.ceil(fmt.sink_tokens / fmt.full_page_tokens)
        self.ring_pages = math.ceil((window - 1) / fmt.full_page_tokens) + 1
        # Tokens of each row, and at the end those of a row with its padding: int32 [B + 1]
        self.lengths = torch.zeros(1, dtype=torch.int32, device=device)
        # int32 [B]: the most tokens that a row had since its ring was written anew. None: as many as now, because only
        # `crop` makes rows shorter.
        self.longest: Tensor | None = None
        # lengths[-1]. None, which happens with max_tokens alone: only the device knows.
        self._count: int | None = 0
        # A page is needed when its last token comes: N is G here.
        self._allocate(batch_size, max_tokens // fmt.page_tokens)

    @property
    def seq_lens(self) -> Tensor:
        return self.lengths[:-1]

    @property
    def num_positions(self) -> int:
        """Tokens of a row with its padding; waits for the device after steps of one token with max_tokens."""
        if self._count is None:
            self._count = int(self.lengths[-1])
        return self._count

    @property
    def has_padding(self) -> bool:
        """Whether rows were stored without padding that they have; waits for the device."""
        return bool((self.seq_lens != self.lengths[-1]).any())

    @property
    def num_bytes(self) -> int:
        """Memory of the pages and what belongs to them."""
        tensors = self.memory, self.quantized_table, self.full_table, self.starts, self.lengths, self.longest
        return sum({x.data_ptr(): x.untyped_storage().nbytes() for x in tensors if x is not None}.values())

    # ------------------------------------------------------------------------------------------------------- memory

    @torch.inference_mode(False)
    def _allocate(self, batch_size: int, row_pages: int) -> None:
        """Make empty pages and their tables.

        What steps write is of no inference mode, so that a prompt that was cached in one can go on elsewhere.
        """
        fmt = self.fmt
        self.batch_size, self.row_pages = batch_size, row_pages
        self.num_full = 1 + batch_size * (self.sink_pages + self.ring_pages)
        num_bytes = self.num_full * fmt.full_page_bytes + batch_size * row_pages * fmt.page_bytes
        self.memory = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        self.quantized, self.full = page_views(self.memory, self.num_full, self.layout)

        def table(slots: Tensor, row_pages: int) -> Tensor:
            first = 1 + row_pages * torch.arange(batch_size, device=self.device)
            return (first[:, None] + slots).int()

        # A column more for the tokens of a page that is not full yet.
        columns = torch.arange(row_pages, device=self.device)
        self.quantized_table = torch.nn.functional.pad(table(columns, row_pages), (0, 1))
        num_tokens = (row_pages + 1) * fmt.page_tokens
        columns = torch.arange(math.ceil(num_tokens / fmt.full_page_tokens), device=self.device)
        slots = torch.where(columns < self.sink_pages, columns, self.sink_pages + columns % self.ring_pages)
        self.full_table = table(slots, self.sink_pages + self.ring_pages)
        self.starts = torch.arange(batch_size + 1, dtype=torch.int32, device=self.device)  # of steps of one token
        if len(self.lengths) != batch_size + 1:
            self.lengths = self.lengths[-1:].repeat(batch_size + 1)
        if self.max_tokens:
            for x in (self.memory, self.quantized_table, self.full_table, self.starts, self.lengths):
                torch._dynamo.mark_static_address(x)

    def _rows(self) -> tuple[Tensor, Tensor]:
        """Full-precision and quantized pages, uint8 [B, pages of a row, H, bytes]."""
        full, quantized = (
            pages[1:].view(self.batch_size, count, *pages.shape[1:])
            for pages, count in ((self.full, self.sink_pages + self.ring_pages), (self.quantized, self.row_pages))
        )
        return full, quantized

    def _reserve(self, num_new: int) -> None:
        """Make room for so many tokens more in every row.

        Raises:
            ValueError: more than max_tokens.
        """
        if self.max_tokens:
            if self._count is not None and self._count + num_new > self.max_tokens:
                raise ValueError(
                    f"kivi: {self._count + num_new} tokens do not fit a cache of max_cache_len={self.max_tokens}; "
                    "make it larger, or leave it out for a cache that grows"
                )
            return
        needed = (self._most_tokens + num_new) // self.fmt.page_tokens
        if needed <= self.row_pages:
            return
        if self.row_pages:
            needed = max(needed, self.row_pages + max(1, self.row_pages // GROWTH))
        old = self._rows()
        self._allocate(self.batch_size, needed)
        for new, pages in zip(self._rows(), old, strict=True):
            new[:, : pages.shape[1]] = pages

    def __getstate__(self) -> dict[str, Any]:
        # Pickle would make views of the memory tensors of their own.
        return {name: x for name, x in self.__dict__.items() if name not in ("quantized", "full")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.quantized, self.full = page_views(self.memory, self.num_full, self.layout)

    # -------------------------------------------------------------------------------------------------------- steps

    def _request(
        self, parts: list[Part], index: int, quantized_table: Tensor | None = None, full_table: Tensor | None = None
    ) -> Request:
        """Part `index` of each row is a request, and the others are padding: requests of null blocks alone, of which
        nothing is stored and which attend to themselves. The tables are the usual ones where they are None.
        """
        tables = [
            self.quantized_table if quantized_table is None else quantized_table,
            self.full_table if full_table is None else full_table,
        ]
        if len(parts) > 1:
            for i, own in enumerate(tables):
                tables[i] = own.new_zeros(self.batch_size * len(parts), own.shape[1])
                tables[i][index :: len(parts)] = own
        counts = torch.stack([part.length for part in parts], 1).flatten()
        ends = [part.seq_lens if i == index else part.length for i, part in enumerate(parts)]
        starts = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        return Request(tables[0], tables[1], starts, torch.stack(ends, 1).flatten())

    def _parts(self, num_new: int, real: Tensor | None) -> tuple[list[Part], int]:
        """The parts of a step's rows, and which of them is real. The others are empty or padding."""
        if real is None:
            count = torch.full_like(self.seq_lens, num_new)
            return [Part(count, self.seq_lens + count)], 0
        count = real.sum(1, dtype=torch.int32)
        before = real.int().argmax(1).int()
        after = num_new - before - count
        return [Part(before, before), Part(count, self.seq_lens + count), Part(after, after)], 1

    def _complete_groups(self, key: Tensor, value: Tensor, parts: list[Part], index: int) -> tuple[list[Part], int]:
        """Write those tokens of a step that complete groups of older tokens.

        Returns:
            The step's parts without them.
        """
        if self._count == 0:
            return parts, index
        length, seq_lens = parts[index]
        begun = torch.minimum(-self.seq_lens % self.fmt.group_size, length)
        rest = Part(length - begun, seq_lens)
        parts = [*parts[:index], Part(begun, self.seq_lens + begun), rest, *parts[index + 1 :]]
        ops.store(key, value, self.quantized, self.full, *self._request(parts, index), self.layout)
        return parts, index + 1

    def _store(self, key: Tensor, value: Tensor, parts: list[Part], index: int) -> None:
        """Write a step's tokens, key and value [B * q, H, D], and count them."""
        fmt, pages = self.fmt, (self.quantized, self.full)
        seq_lens = parts[index].seq_lens
        num_new = len(key) // self.batch_size
        if num_new + fmt.group_size - 1 <= (self.ring_pages - 1) * fmt.full_page_tokens:
            ops.store(key, value, *pages, *self._request(parts, index), self.layout)
        else:
            # So many tokens meet themselves in the ring: only the last get full-precision pages, after the older tokens
            # of an incomplete group are no longer needed.
            parts, index = self._complete_groups(key, value, parts, index)
            columns = torch.arange(self.full_table.shape[1], device=self.device)
            last = (seq_lens - 1)[:, None] // fmt.full_page_tokens
            kept = (columns < self.sink_pages) | (columns > last - self.ring_pages)
            table = torch.where(kept, self.full_table, 0)
            ops.store(key, value, *pages, *self._request(parts, index, full_table=table), self.layout)
        self.seq_lens.copy_(seq_lens)
        self.lengths[-1:].add_(num_new)
        if self._count is not None:
            self._count += num_new
        if self.longest is not None:
            self.longest.copy_(torch.maximum(self.longest, seq_lens))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, scale: float, logits_soft_cap: float
    ) -> Tensor:
        """Store a step's tokens and attend to them and to what was there.

        Args:
            query: [B, heads, q, D]; key, value: [B, H, q, D].
            real: bool [B, q], False where a token is padding; the others of a row follow each other. None: all are.

        Returns:
            [B, q, heads, D]; where query is padding, anything.
        """
        if query.shape[2] == 1:
            return self._decode(query, key, value, real, scale, logits_soft_cap)
        return self._attend_chunk(query, key, value, real, scale, logits_soft_cap)

    def _decode(
        self, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, scale: float, logits_soft_cap: float
    ) -> Tensor:
        """`attend` for steps of one token."""
        if not self.max_tokens:
            self._reserve(1)
            self._count = self._most_tokens + 1
        else:
            # From here on the host does not know how many tokens there are: it would have to be told at every step.
            self._count = None
        self.lengths.add_(1 if real is None else torch.nn.functional.pad(real[:, 0], (0, 1), value=True))
        if self.longest is not None:
            self.longest.copy_(torch.maximum(self.longest, self.seq_lens))
        starts, seq_lens, workspace, layout = self.starts, self.seq_lens, self.workspace, self.layout
        new, tables = (query, key, value, real), (self.quantized_table, self.full_table)
        if self.max_tokens and torch.compiler.is_compiling():
            memory = self.memory, self.num_full
            return compiled_decode(*new, *memory, *tables, starts, seq_lens, workspace, scale, logits_soft_cap, layout)
        pages = self.quantized, self.full
        return decode(*new, pages, tables, starts, seq_lens, workspace, scale, logits_soft_cap, layout)

    def _attend_chunk(
        self, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, scale: float, logits_soft_cap: float
    ) -> Tensor:
        """`attend` for steps of several tokens."""
        num_new = query.shape[2]
        self._reserve(num_new)
        parts, index = self._parts(num_new, real)
        rows, keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
        # Before the chunk is stored: it takes the place of the window that its rows read.
        self._complete_before(keys, values, parts, index)
        if self._count == 0 and real is None and not logits_soft_cap:
            # There is nothing to dequantize, and nothing is faster.
            output = masked_attention(query, key, value, None, scale, 0.0)
        elif self.has_prefill:
            request = self._request(parts, index)
            prompt = torch.full_like(request.seq_lens, PROMPT)
            output = torch.zeros(rows.shape, dtype=rows.dtype, device=rows.device)
            last = *request, prompt, scale, logits_soft_cap, self.layout
            ops.prefill(output, rows, keys, values, self.quantized, self.full, *last)
            output = output.view(len(query), num_new, *output.shape[1:])
        else:
            output = self._attend_dequantized(query, key, value, real, scale, logits_soft_cap)
        self._store(keys, values, parts, index)
        return output

    def _attend_dequantized(
        self, query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, scale: float, logits_soft_cap: float
    ) -> Tensor:
        """Attention of a chunk that is not stored yet, where ops.prefill has no kernel; as `attend`."""
        num_new, device = key.shape[2], self.device
        causal = torch.ones(num_new, num_new, dtype=torch.bool, device=device).tril().expand(self.batch_size, -1, -1)
        if real is not None:
            # Padding sees itself, so that no row is without anything to attend to. Some kernels hide by large numbers,
            # which what padding holds may exceed.
            causal = causal & (real[:, None] | torch.eye(num_new, dtype=torch.bool, device=device))
            key, value = (x.masked_fill(~real[:, None, :, None], 0) for x in (key, value))
        before = torch.arange(self._most_tokens, device=device) < self.seq_lens[:, None]
        mask = torch.cat((before[:, None].expand(-1, num_new, -1), causal), 2)[:, None]
        keys, values = (torch.cat(pair, 2) for pair in zip(self._context(), (key, value), strict=True))
        return masked_attention(query, keys, values, mask, scale, logits_soft_cap)

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store a step's tokens, and dequantize what its rows attend to.

        Args:
            key, value: [B, H, q, D]; every token counts, padding too.

        Returns:
            Keys and values [B, H, tokens, D].
        """
        num_new = key.shape[2]
        self._count = self.num_positions
        self._reserve(num_new)
        parts, index = self._parts(num_new, None)
        keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (key, value))
        if num_new == 1:
            self._store(keys, values, parts, index)
            return self._dequantized(self._boundary(self.seq_lens))
        self._complete_before(keys, values, parts, index)
        context = self._context()
        self._store(keys, values, parts, index)
        keys, values = (torch.cat(pair, 2) for pair in zip(context, (key, value), strict=True))
        return keys, values

    def _complete_before(self, key: Tensor, value: Tensor, parts: list[Part], index: int) -> None:
        """Without a window, a chunk can read the group quantized that its own first token completes."""
        if not self.fmt.residual_length:
            self._complete_groups(key, value, parts, index)

    def _context(self) -> tuple[Tensor, Tensor]:
        """What rows of a chunk that comes next read of what is there; as `_dequantized`."""
        return self._dequantized(torch.minimum(self._boundary(self.seq_lens + 1), self.seq_lens))

    @property
    def _most_tokens(self) -> int:
        """No row has more tokens."""
        return self.max_tokens if self._count is None else self._count

    def _boundary(self, seq_lens: Tensor) -> Tensor:
        """KVFormat.boundary of rows."""
        group_size = self.fmt.group_size
        return ((seq_lens - self.fmt.residual_length) // group_size * group_size).clamp(min=0)

    def _dequantized(self, boundary: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, H, tokens, D] in the model's dtype, read quantized below each row's boundary; 0 behind
        the end of shorter rows."""
        fmt, length = self.fmt, self._most_tokens
        dtype = getattr(torch, fmt.dtype)
        keys, values = (
            torch.empty(self.batch_size, length, fmt.num_kv_heads, fmt.head_dim, dtype=dtype, device=self.device)
            for _ in range(2)
        )
        tables = self.quantized_table, self.full_table
        starts = length * torch.arange(self.batch_size + 1, dtype=torch.int32, device=self.device)
        first = torch.zeros_like(self.seq_lens)
        rows = keys.flatten(0, 1), values.flatten(0, 1)
        ops.gather(*rows, self.quantized, self.full, *tables, starts, first, boundary, self.layout)
        absent = torch.arange(length, device=self.device) >= self.seq_lens[:, None]
        for x in (keys, values):  # as wide numbers, of which there are few
            x.view(torch.int64).masked_fill_(absent[..., None, None], 0)
        return keys.transpose(1, 2), values.transpose(1, 2)

    # --------------------------------------------------------------------------------------------------------- rows

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order and as often as they are named: int64 [new B]."""
        rows, old = rows.to(self.device), self._rows()
        seq_lens = self.seq_lens[rows]
        if len(rows) == self.batch_size:
            for pages in old:
                pages.copy_(pages[rows])
        else:
            self._allocate(len(rows), self.row_pages)
            for new, pages in zip(self._rows(), old, strict=True):
                torch.index_select(pages, 0, rows, out=new)
        self.lengths[:-1] = seq_lens
        if self.longest is not None:
            self._remember(self.longest[rows])

    @torch.inference_mode(False)
    def _remember(self, longest: Tensor) -> None:
        """What steps write to from now on, as in `_allocate`."""
        if self.longest is None or self.longest.shape != longest.shape:
            self.longest = torch.empty_like(longest)
            if self.max_tokens:
                torch._dynamo.mark_static_address(self.longest)
        self.longest.copy_(longest)

    def crop(self, count: int) -> None:
        """Forget the last `count` tokens of every row; waits for the device.

        Of the tokens that are to be read in full precision then, those that only quantized pages still hold come back
        as these hold them; none does where `count` is at most max_crop.
        """
        if self.longest is None:
            self._remember(self.seq_lens)
        assert self.longest is not None
        lengths = (self.lengths - count).clamp(min=0)
        if (self._boundary(lengths[:-1]) < self._ring_start(self.longest)).any():
            self._restore(lengths[:-1])
        self.lengths.copy_(lengths)
        if self._count is not None:
            self._count = max(self._count - count, 0)

    def _ring_start(self, seq_lens: Tensor) -> Tensor:
        """The first token of the ring's pages of rows that were never longer."""
        n = self.fmt.full_page_tokens
        return (((seq_lens - 1) // n - self.ring_pages + 1) * n).clamp(min=0)

    def _restore(self, seq_lens: Tensor) -> None:
        """Make the rings those of rows that were never longer, from quantized pages."""
        assert self.longest is not None
        fmt, start = self.fmt, self._ring_start(self.longest)
        dequantized = self._dequantized(-(-start // fmt.group_size) * fmt.group_size)
        keys, values = (x.transpose(1, 2).flatten(0, 1) for x in dequantized)
        before = self._ring_start(seq_lens)
        count = torch.minimum(seq_lens, start) - before
        after = keys.shape[0] // self.batch_size - before - count
        parts = [Part(before, before), Part(count, before + count), Part(after, after)]
        ring = self.full_table.clone()
        ring[:, : self.sink_pages] = 0
        tables = torch.zeros_like(self.quantized_table), ring
        ops.store(keys, values, self.quantized, self.full, *self._request(parts, 1, *tables), self.layout)
        self._remember(seq_lens)

    def reset(self) -> None:
        """Forget all tokens and keep the memory."""
        self.lengths.zero_()
        self.longest, self._count = None, 0

    # -------------------------------------------------------------------------------------------------------- files

    def state(self) -> dict[str, Any]:
        """What `restored` needs, tensors and numbers alone."""
        return {"layout": self.layout} | {name: getattr(self, name) for name in _STATE}

    @classmethod
    def restored(cls, fmt: KVFormat, state: dict[str, Any], workspace: Tensor | None = None) -> Pages:
        """Pages from what `state` returned, where its tensors are.

        Raises:
            ValueError: they have another byte map.
        """
        if state["layout"] != fmt.layout():
            raise ValueError("kivi: the file is of another version, whose pages lie otherwise; make the cache again")
        pages = cls(fmt, state["batch_size"], state["memory"].device, state["max_tokens"], state["max_crop"], workspace)
        pages._allocate(state["batch_size"], state["row_pages"])
        for name in ("memory", "lengths"):
            getattr(pages, name).copy_(state[name])
        if state["longest"] is not None:
            pages._remember(state["longest"])
        pages._count = int(pages.lengths[-1])
        return pages

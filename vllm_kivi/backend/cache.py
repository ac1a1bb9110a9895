"""The full-precision cache group: its spec, its manager and the layer that stands for it.

vLLM's allocator owns both page types. Quantized pages are a stock FullAttentionSpec group. Full-precision pages are the
group below: a sliding window whose pages hold the sinks and the tokens that are not read quantized. It differs from
vLLM's own sliding window in three ways:

* The window starts at the quantization boundary, so its length breathes between R and R + G - 1 tokens.
* A prompt's tokens get a page only if they stay: of a chunk, the sinks and the window at the chunk's end. The rest lies
  on the null block and is never written. Stock sliding windows give every token in flight a page, which here would cost
  5.3 times the quantized cache.
* So that a prefix hit finds a window, pages at the positions where a later request can resume (vLLM's reachable
  boundaries) are filled in as long as the pool has room to spare. They are released after the step like any page that
  left the window, and stay in the prefix cache until somebody needs the space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry, register_kv_cache_spec

from vllm_kivi import compat
from vllm_kivi.format import window_pages

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import AttentionBackend
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.request import Request

# The registry fills itself with vLLM's own specs on first use, and only if it is empty: fill it before adding ours.
KVCacheSpecRegistry.check_kv_cache_spec_registry({})


class FullPrecisionManager(SlidingWindowManager):
    """Hands out full-precision pages; block lists hold the null block where no page is needed."""

    kv_cache_spec: FullPrecisionSpec

    def __init__(self, kv_cache_spec: FullPrecisionSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        from vllm_kivi.backend import metrics  # which needs this module

        metrics.extend_scheduler_stats()
        compat.expose_suffix_lookups()
        # request -> first block of the current step: only tokens from there on are still to be written.
        self._step_start: dict[str, int] = {}
        # request -> blocks below it have been released, sinks apart.
        self._released: dict[str, int] = {}
        spec = kv_cache_spec
        needed = ceil(spec.max_model_len / spec.quantized_page_tokens) + spec.peak_blocks(spec.max_model_len)
        available = self.block_pool.num_gpu_blocks - 1
        if available < needed:
            raise ValueError(
                f"kivi: the KV cache, or what it is offloaded to, has {available} blocks; one request of "
                f"max_model_len={spec.max_model_len} tokens needs {needed} while its last chunk is computed. Give it "
                "more memory or lower --max-model-len."
            )

    # -- what to hold ---------------------------------------------------------------------------------------------

    def _needed(self, block: int, first_token: int) -> bool:
        """Whether a block holds sinks, or tokens from `first_token` on."""
        return block < self.kv_cache_spec.sink_blocks or (block + 1) * self.block_size > first_token

    def _count_needed(self, start: int, stop: int, first_token: int) -> int:
        return sum(self._needed(block, first_token) for block in range(start, stop))

    def _first_kept(self, num_tokens_main_model: int) -> int:
        """First window token after a step that ends at `num_tokens_main_model`, if every draft token is rejected."""
        spec = self.kv_cache_spec
        return spec.window_start(max(0, num_tokens_main_model - spec.num_speculative_tokens))

    # -- allocation -----------------------------------------------------------------------------------------------

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        stop = ceil(num_tokens / self.block_size)
        blocks = self.req_to_blocks.get(request_id, ())
        if len(blocks) >= stop and not apply_admission_cap:
            return 0  # most steps of decoding
        hits = [] if blocks else [b for b in new_computed_blocks if not b.is_null]
        evictable = self._get_num_evictable_blocks(hits)
        if apply_admission_cap:
            # The whole request must fit: never more than the blocks it holds at its peak.
            assert self.max_admission_blocks_per_request is not None
            peak = min(stop, self.max_admission_blocks_per_request)
            held = sum(not b.is_null for b in blocks) + len(hits)
            return max(peak - held, 0) + evictable
        start = len(blocks) or len(new_computed_blocks)
        loaded_stop = max(start, ceil(total_computed_tokens / self.block_size))
        loaded = self._count_needed(start, loaded_stop, self.kv_cache_spec.window_start(total_computed_tokens))
        return loaded + self._count_needed(loaded_stop, stop, self._first_kept(num_tokens_main_model)) + evictable

    def _extend(
        self, request_id: str, stop: int, first_token: int, record_for_zeroing: bool = True
    ) -> list[KVCacheBlock]:
        """Append blocks up to `stop`: pages where needed, the null block elsewhere."""
        blocks = self.req_to_blocks[request_id]
        needed = [self._needed(block, first_token) for block in range(len(blocks), stop)]
        pages = self.block_pool.get_new_blocks(sum(needed))
        if self._record_new_block_ids and record_for_zeroing:
            self.new_block_ids.extend(page.block_id for page in pages)
        supply = iter(pages)
        new = [next(supply) if need else self._null_block for need in needed]
        blocks.extend(new)
        return new

    def allocate_new_blocks(self, request_id: str, num_tokens: int, num_tokens_main_model: int) -> list[KVCacheBlock]:
        stop, held = ceil(num_tokens / self.block_size), len(self.req_to_blocks[request_id])
        if held >= stop:  # most steps of decoding
            self._step_start.pop(request_id, None)  # of a step that was not cached: its tokens are written by now
            return []
        self._step_start[request_id] = held
        self._step_blocks = self._extend(request_id, stop, self._first_kept(num_tokens_main_model))
        return self._step_blocks

    def allocate_external_computed_blocks(
        self,
        request_id: str,
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
        record_for_zeroing: bool = True,
    ) -> None:
        total = num_local_computed_tokens + num_external_computed_tokens
        stop = ceil(total / self.block_size)
        self._extend(request_id, stop, self.kv_cache_spec.window_start(total), record_for_zeroing)

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        blocks = self.req_to_blocks[request_id]
        assert not blocks
        first_token = self.kv_cache_spec.window_start(num_local_computed_tokens + num_external_computed_tokens)
        hits = [
            hit if self._needed(block, first_token) else self._null_block
            for block, hit in enumerate(new_computed_blocks)
        ]
        self.block_pool.touch([hit for hit in hits if not hit.is_null])
        blocks.extend(hits)
        self.num_cached_block[request_id] = len(blocks)

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        blocks = self.req_to_blocks.get(request_id)
        if not blocks:
            return
        start = self._released.get(request_id, self.kv_cache_spec.sink_blocks)
        window = self.kv_cache_spec.window_start(processed_computed_tokens)
        stop = min(window // self.block_size, len(blocks))
        if start >= stop:
            return
        # Last first, so that the start of a window outlives its end in the prefix cache.
        freed = [block for block in reversed(blocks[start:stop]) if not block.is_null]
        blocks[start:stop] = [self._null_block] * (stop - start)
        self._released[request_id] = stop
        self.block_pool.free_blocks(freed)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self._step_start.pop(request_id, None)
        self._released.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)

    # -- prefix cache ---------------------------------------------------------------------------------------------

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        self._fill_reachable(request, num_tokens, retention_interval, replay_boundaries)
        super().cache_blocks(request, num_tokens, retention_interval, replay_boundaries=replay_boundaries)

    def _fill_reachable(
        self, request: Request, num_tokens: int, retention_interval: int | None, replay_boundaries: Sequence[int]
    ) -> None:
        """Give pages to this step's tokens that a later request could resume from, if the pool has room to spare.

        Runs inside the step's allocation, after every group got what it must have and before the worker sees the block
        list, which is why the list handed out by allocate_new_blocks is changed in place.
        """
        step_start = self._step_start.pop(request.request_id, None)
        if step_start is None:
            return  # Not in a step's allocation: the tokens are written already.
        blocks = self.req_to_blocks[request.request_id]
        start = max(step_start, self.num_cached_block.get(request.request_id, 0))
        stop = num_tokens // self.block_size
        if start >= stop:
            return
        boundaries = [*replay_boundaries]
        if request.shared_prefix_boundary:
            boundaries.append(request.shared_prefix_boundary)
        mask = self.reachable_block_mask(
            start,
            stop,
            self.cache_hit_alignment_tokens,
            self.kv_cache_spec,
            self.use_eagle,
            retention_interval,
            boundaries,
        )
        assert mask is not None
        missing = [start + i for i, reachable in enumerate(mask) if reachable and blocks[start + i].is_null]
        if not missing or len(missing) > self.block_pool.get_num_free_blocks() // 2:
            return
        pages = self.block_pool.get_new_blocks(len(missing))
        if self._record_new_block_ids:
            self.new_block_ids.extend(page.block_id for page in pages)
        for block, page in zip(missing, pages, strict=True):
            blocks[block] = page
            self._step_blocks[block - step_start] = page

    @classmethod
    def reachable_block_mask(
        cls,
        start_block: int,
        end_block: int,
        alignment_tokens: int | None,
        kv_cache_spec: KVCacheSpec,
        use_eagle: bool,
        retention_interval: int | None = None,
        reachable_boundaries: Sequence[int] = (),
        dcp_world_size: int = 1,
        final_segment_end_block: int | None = None,
    ) -> list[bool] | None:
        """Blocks that a hit can need: sinks, and the window before each position where a request can resume."""
        assert isinstance(kv_cache_spec, FullPrecisionSpec)
        n = kv_cache_spec.block_size
        alignment = alignment_tokens or n
        positions = {position // alignment * alignment for position in reachable_boundaries}
        if (interval := alignment if retention_interval is None else retention_interval) > 0:
            # The last window that reaches back into these blocks belongs to a position at most a window further on.
            last = end_block * n + kv_cache_spec.sliding_window
            positions.update(range(start_block * n // interval * interval, last + 1, interval))
        if use_eagle:
            positions = {position + n for position in positions}
        mask = [block < kv_cache_spec.sink_blocks for block in range(start_block, end_block)]
        for position in positions:
            first = kv_cache_spec.window_start(position - n if use_eagle else position) // n
            for block in range(max(first, start_block), min(position // n, end_block)):
                mask[block - start_block] = True
        return mask

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """The longest aligned prefix whose sinks and window are all cached."""
        assert isinstance(kv_cache_spec, FullPrecisionSpec)
        n = kv_cache_spec.block_size
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, n, alignment_tokens=alignment_tokens)
        extra = 1 if drop_eagle_block else 0
        # A suffix begins at a boundary, so window_start is right for it as well.
        num_sinks = 0 if compat.looks_up_suffix() else kv_cache_spec.sink_blocks
        longest = max(0, min(max_length // n, len(hashes)) - extra) * n // alignment_tokens * alignment_tokens
        for length in range(longest, 0, -alignment_tokens):
            first = kv_cache_spec.window_start(length) // n
            found: dict[int, list[KVCacheBlock]] = {}
            # From the right: the end of the window is what a shorter cached prefix lacks.
            window = range(length // n + extra - 1, max(first, num_sinks) - 1, -1)
            for block in (*window, *range(min(num_sinks, length // n + extra))):
                cached = block_pool.get_cached_block(hashes[block], kv_cache_group_ids)
                if not cached:
                    break
                found[block] = cached
            else:
                hits = tuple(
                    [found[block][group] if block in found else block_pool.null_block for block in range(length // n)]
                    for group in range(len(kv_cache_group_ids))
                )
                return hits, length
        return tuple([] for _ in kv_cache_group_ids), 0


@register_kv_cache_spec(manager_class=FullPrecisionManager)
@dataclass(frozen=True, kw_only=True)
class FullPrecisionSpec(SlidingWindowSpec):
    """Full-precision pages of one layer: the sinks and the last R to R + G - 1 tokens of each request.

    block_size is n, the tokens of a page; state_content_bytes the bytes of a token and KV head; page_size_padded the
    bytes of a quantized page. sliding_window is R + G, the length that stock code sees.
    """

    group_size: int
    residual_length: int
    sink_tokens: int
    quantized_page_tokens: int
    num_speculative_tokens: int
    max_model_len: int

    @property
    def sink_blocks(self) -> int:
        return ceil(self.sink_tokens / self.block_size)

    def window_start(self, num_computed_tokens: int) -> int:
        """First token that must be held when `num_computed_tokens` tokens are computed and the next one attends.

        That is the boundary of KVFormat for one more token, and the start of the incomplete group, whose earlier tokens
        are quantized from here.
        """
        boundary = max(0, (num_computed_tokens + 1 - self.residual_length) // self.group_size * self.group_size)
        return min(boundary, num_computed_tokens // self.group_size * self.group_size)

    @property
    def num_retained_tokens(self) -> int:
        # A runner may put the null block wherever a sliding window does not reach, which would hide the sinks.
        # Our kernels read exactly what they attend to, so nothing has to be hidden from them: 0 turns it off.
        return 0

    def window_blocks(self, max_model_len: int) -> int:
        """Most blocks that one request holds between steps."""
        return window_pages(
            max_model_len,
            self.block_size,
            group_size=self.group_size,
            residual_length=self.residual_length,
            sink_tokens=self.sink_tokens,
            num_speculative_tokens=self.num_speculative_tokens,
        )

    def peak_blocks(self, max_model_len: int) -> int:
        """Most blocks that one request holds in a step: the window before a chunk and the one after it."""
        return min(2 * self.window_blocks(max_model_len), ceil(max_model_len / self.block_size))

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        return self.peak_blocks(max_model_len)

    def max_memory_usage_bytes(self, vllm_config: VllmConfig) -> int:
        # What a request holds while it lives, so that vLLM logs how many requests fit. The second window of a step
        # that computes a chunk exists once per chunk in flight; the manager checks at start that the pool has it.
        return self.window_blocks(vllm_config.model_config.max_model_len) * self.page_size_bytes


class FullPrecisionLayer(AttentionLayerBase):
    """Owns the full-precision pages of one attention layer in vLLM's tables; computes nothing."""

    supports_dcp = False

    def __init__(self, backend: type[AttentionBackend], spec: FullPrecisionSpec, num_heads: int) -> None:
        self._backend = backend
        self._spec = spec
        # vLLM splits attention groups by query heads; equal numbers keep one group.
        self.num_heads = num_heads

    def get_attn_backend(self) -> type[AttentionBackend]:
        return self._backend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return self._spec

"""How vLLM deals pages out to requests, counted without starting it.

The bytes of quantized pages and the number of full-precision pages are KVFormat's. What is added here is what vLLM does
with them: it makes the pages of all layers equal, deals the layers of each kind out to groups of equal size, and gives
every group block ids out of one pool, where a block is a page of each layer of a group. So a request takes the sum of
its pages over all groups, in whole blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_kivi.evaluate.session import Candidate, EvalError
from vllm_kivi.format import DTYPE_BYTES, PRESETS, check_model
from vllm_kivi.options import KiviOptions
from vllm_kivi.plan.model import Shapes
from vllm_kivi.plan.settings import BASELINE, Settings

FP8 = ("fp8", "fp8_e4m3", "fp8_e5m2")
BLOCK_TOKENS = 16  # of vLLM's own caches on GPUs, where --block-size is not given


@dataclass(frozen=True)
class Kind:
    """Layers whose pages are dealt out alike, and how many pages each has for a request of so many tokens."""

    layers: Sequence[int]
    page_tokens: int
    pages: Callable[[int], int]
    whole: bool = True  # holds all tokens of a request, not a window of them


@dataclass(frozen=True)
class Pool:
    """vLLM's block pool on the fullest pipeline stage; a page has `page_bytes` in every layer of every kind.

    Args:
        bits: of an element in the layers that hold all tokens, with scales, zeros and what pads a page.
        stages: layers of each pipeline stage.
    """

    page_bytes: int
    bits: float
    kinds: tuple[Kind, ...]
    stages: tuple[range, ...]

    @property
    def group_layers(self) -> int:
        """vLLM's rule: as few as the smallest kind has, or all of the largest if that is not much more."""
        sizes = [len(kind.layers) for kind in self.kinds]
        return max(sizes) if max(sizes) < 1.5 * min(sizes) else min(sizes)

    def num_groups(self, kind: Kind) -> int:
        return math.ceil(len(kind.layers) / self.group_layers)

    @property
    def block_bytes(self) -> int:
        groups = [kind.layers[i :: self.num_groups(kind)] for kind in self.kinds for i in range(self.num_groups(kind))]
        pages = max(sum(layer in stage for layer in group) for group in groups for stage in self.stages)
        return self.page_bytes * pages

    @property
    def token_bytes(self) -> float:
        """What one more token takes in the layers that hold all of them."""
        return sum(self.num_groups(kind) * self.block_bytes / kind.page_tokens for kind in self.kinds if kind.whole)

    def blocks(self, num_tokens: int) -> int:
        return sum(self.num_groups(kind) * kind.pages(num_tokens) for kind in self.kinds)

    def request_bytes(self, num_tokens: int) -> int:
        return self.blocks(num_tokens) * self.block_bytes

    def requests(self, available: int, num_tokens: int) -> int:
        """How many requests of so many tokens fit into so many bytes, at the most that each holds between steps.

        One block is vLLM's null block. While a chunk of a prompt is computed, kivi takes a second window of pages for
        it, so the last request may have to wait; with windows that happen to be shorter than the longest, one or two
        more may run.
        """
        return max(0, available // self.block_bytes - 1) // self.blocks(num_tokens)

    def capacity(self, available: int, num_tokens: int) -> int:
        """What vLLM logs as 'KV cache size' with a --max-model-len of so many tokens."""
        return int(available // self.block_bytes / self.blocks(num_tokens) * num_tokens)


def _stages(num_layers: int, size: int) -> tuple[range, ...]:
    """Layers of each pipeline stage, as vLLM splits them: the last stage gets none of what is left over."""
    counts = [num_layers // size] * size
    for i in range(num_layers % size):
        counts[-i - 2] += 1
    starts = [sum(counts[:i]) for i in range(size)]
    return tuple(range(start, start + count) for start, count in zip(starts, counts, strict=True))


def check_shapes(shapes: Shapes, preset: str) -> None:
    """Raises ValueError for a model that the engine would refuse with this cache dtype, in its words."""
    check_model(
        preset,
        shapes.head_dim,
        mla=shapes.mla,
        encoder_decoder=shapes.encoder_decoder,
        all_sliding=not shapes.full,
    )


def pool(shapes: Shapes, candidate: Candidate, settings: Settings) -> Pool:
    """The pool of one GPU with this cache.

    Raises:
        ValueError: the cache dtype, an option or the model is not supported; says what is.
    """
    preset = candidate.dtype
    heads = max(1, shapes.num_kv_heads // settings.tensor_parallel_size)
    element_bytes = 1 if preset in FP8 else DTYPE_BYTES[shapes.dtype]
    kinds = []
    if preset in PRESETS:
        check_shapes(shapes, preset)
        KiviOptions.check_entries(settings.additional_config)
        options = KiviOptions.from_additional_config(candidate.additional_config(settings.additional_config))
        fmt = options.format(preset, shapes.head_dim, heads, shapes.dtype, page_tokens=settings.block_size or 0)
        block_tokens = fmt.page_tokens
        if shapes.sliding:
            fmt = fmt.beside_full_precision()
        page_bytes, page_tokens = fmt.padded_page_bytes, fmt.page_tokens
        kinds.append(Kind(shapes.full, fmt.full_page_tokens, fmt.window_pages, whole=False))
    elif preset == BASELINE or preset in (shapes.dtype, *FP8):
        block_tokens = page_tokens = settings.block_size or BLOCK_TOKENS
        page_bytes = heads * page_tokens * 2 * shapes.head_dim * element_bytes
    else:
        accepted = ", ".join((BASELINE, shapes.dtype, *FP8, *PRESETS))
        raise EvalError(f"--kv-cache-dtype {preset} is not known here; accepted: {accepted}")
    kinds.append(Kind(shapes.full, page_tokens, lambda tokens: math.ceil(tokens / page_tokens)))

    def sliding_pages(num_tokens: int) -> int:
        held = min((shapes.window or 0) - 1 + settings.in_flight_tokens, num_tokens)
        return math.ceil(held / block_tokens) + 1  # one more, because a window need not start where a page does

    kinds.append(Kind(shapes.sliding, block_tokens, sliding_pages, whole=False))
    bits = 8 * page_bytes / (heads * page_tokens * 2 * shapes.head_dim) if shapes.full else 8 * element_bytes
    stages = _stages(shapes.num_layers, settings.pipeline_parallel_size)
    return Pool(page_bytes, bits, tuple(kind for kind in kinds if kind.layers), stages)

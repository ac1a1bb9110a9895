"""What the cache of an engine really is, and which tokens read its quantized pages: seen in the engine, not computed
from what was asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from vllm_kivi.format import PRESETS, KVFormat


@dataclass
class Observation:
    """What the scheduler did: of each request, in order of arrival, the (first position, number) of tokens a step."""

    chunks: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    peak_blocks: int = 0

    def largest_chunk(self) -> int:
        return max(count for steps in self.chunks.values() for _, count in steps)


def _scheduler(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core.scheduler


@contextmanager
def observe(llm: Any) -> Iterator[Observation]:
    """Record what an engine of this process does."""
    seen = Observation()
    scheduler = _scheduler(llm)
    pool = scheduler.kv_cache_manager.block_pool
    idle = pool.get_num_free_blocks()
    original = scheduler.schedule

    def schedule(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        cached = output.scheduled_cached_reqs
        starts = {request.req_id: request.num_computed_tokens for request in output.scheduled_new_reqs}
        starts |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for name, count in output.num_scheduled_tokens.items():
            seen.chunks.setdefault(name, []).append((starts[name], count))
        seen.peak_blocks = max(seen.peak_blocks, idle - pool.get_num_free_blocks())
        return output

    scheduler.schedule = schedule
    try:
        yield seen
    finally:
        scheduler.schedule = original


def block_bytes(llm: Any) -> int:
    """What one block of the pool takes in all layers."""
    groups = _scheduler(llm).kv_cache_manager.kv_cache_config.kv_cache_groups
    return max(len(group.layer_names) * group.kv_cache_spec.page_size_bytes for group in groups)


def kv_bytes_and_bits(llm: Any) -> tuple[float, float]:
    """Bytes that one more token takes in the KV cache, and bits per cached element.

    What the engine allocates, scales and padding included. Layers and pages that keep only a window of tokens do not
    grow, so they do not count.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    token_bytes, elements = 0.0, 0
    for specs in llm.collective_rpc("get_kv_cache_spec"):
        for spec in specs.values():
            if isinstance(spec, FullAttentionSpec):
                token_bytes += spec.page_size_bytes / spec.block_size
                elements += spec.num_kv_heads * (spec.head_size + spec.head_size_v)
    return token_bytes, 8 * token_bytes / elements


def layer_dtypes(llm: Any) -> dict[str, int]:
    """How many layers keep their cache in which dtype: some may not be quantized."""
    from vllm.model_executor.layers.attention import Attention

    config = llm.llm_engine.vllm_config
    layers = [x for x in config.compilation_config.static_forward_context.values() if isinstance(x, Attention)]
    own = str(config.model_config.dtype).removeprefix("torch.")
    return dict(Counter(own if layer.kv_cache_dtype == "auto" else layer.kv_cache_dtype for layer in layers))


def kivi_format(llm: Any) -> KVFormat | None:
    """The byte map that quantized layers are bound to; None if there are none. Boundaries are the same in all."""
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    backends = (layer.attn_backend for layer in layers if getattr(layer, "kv_cache_dtype", None) in PRESETS)
    return next((backend.kv_format for backend in backends), None)


def row_boundaries(fmt: KVFormat, start: int, count: int, prompt: int) -> list[int]:
    """Tokens below it are read quantized, sinks apart: for each row of a chunk of a request with `prompt` tokens."""
    if fmt.full_precision:
        return [0] * count
    whole = min(fmt.boundary(start + 1), start)
    return [whole if row < prompt else fmt.boundary(row + 1) for row in range(start, start + count)]


@dataclass
class Reads:
    """Rows that were scored, how many of them attended to quantized pages, and the share of context they read there."""

    rows: int = 0
    quantized_rows: int = 0
    shares: float = 0.0

    def add(self, fmt: KVFormat, chunks: list[tuple[int, int]], prompt: int, first: int, last: int) -> None:
        """Count the rows at positions first to last of one request."""
        for start, count in chunks:
            for row, boundary in enumerate(row_boundaries(fmt, start, count, prompt), start):
                if first <= row <= last:
                    quantized = max(0, boundary - fmt.sink_tokens)
                    self.rows += 1
                    self.quantized_rows += quantized > 0
                    self.shares += quantized / (row + 1)

    def result(self) -> dict[str, float]:
        return {"quantized_tokens": self.quantized_rows / self.rows, "quantized_context": self.shares / self.rows}


# Of vLLM's own caches: a full-precision one has nothing to read, fp8 quantizes by rules that are not known here.
UNKNOWN: dict[str, float | None] = {"quantized_tokens": None, "quantized_context": None}
NOTHING: dict[str, float | None] = {"quantized_tokens": 0.0, "quantized_context": 0.0}


def unquantized(cache: dict[str, Any]) -> bool:
    """Whether a cache as described by `describe` is in full precision throughout."""
    return set(cache["layers"]) <= {"float32", "bfloat16", "float16"}


def describe(llm: Any) -> dict[str, Any]:
    """The cache of this engine, for a report: dtype of its layers, bytes a token, bits an element, options."""
    kv_bytes, bits = kv_bytes_and_bits(llm)
    return {"layers": layer_dtypes(llm), "kv_bytes_per_token": kv_bytes, "bits": bits}

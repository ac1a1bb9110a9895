"""The cache in vLLM's own /metrics: its capacity, its bytes per token, and how much of what it holds is quantized.

The scheduler knows every number on the CPU, so no step waits for a GPU. It lives in the engine's process and /metrics
in that of the API server; what goes from one to the other is vLLM's SchedulerStats, and only if vLLM collects
statistics at all: --disable-log-stats turns these off as well.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from prometheus_client import Gauge
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_kivi import compat
from vllm_kivi.format import PRESETS
from vllm_kivi.options import KiviOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.metrics.stats import IterationStats, MultiModalCacheStats, SchedulerStats

# Keys in SchedulerStats, and what they are called in /metrics.
TOKEN_BYTES, CACHED, QUANTIZED = "kivi_bytes_per_token", "kivi_cached_tokens", "kivi_quantized_tokens"
GAUGES = {
    "kivi_capacity_tokens": "Tokens that the KV cache holds.",
    TOKEN_BYTES: "Bytes that one more token takes in the KV cache of a worker, all layers, full-precision pages apart.",
    CACHED: "Tokens of running requests in the KV cache.",
    QUANTIZED: "Tokens of running requests that their next token reads from quantized pages.",
    "kivi_quantized_share": "kivi_quantized_tokens of kivi_cached_tokens; 0 where nothing runs.",
}

# Seconds between two reports of a scheduler that runs requests: to count hundreds of them takes part of a millisecond.
INTERVAL = 1.0
# scheduler -> when its next report is due.
_due: WeakKeyDictionary[Any, float] = WeakKeyDictionary()


class KiviStatLogger(AggregateStatLoggerBase):
    """Gauges with the labels of vLLM's own, one time series for each engine."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int]) -> None:
        model = vllm_config.model_config.served_model_name
        labels = ["model_name", "engine"]
        gauges = {
            name: Gauge(f"vllm:{name}", text, labelnames=labels, multiprocess_mode="mostrecent")
            for name, text in GAUGES.items()
        }
        self._gauges = {
            index: {name: gauge.labels(model, str(index)) for name, gauge in gauges.items()} for index in engine_indexes
        }
        for own in self._gauges.values():
            own["kivi_capacity_tokens"].set(vllm_config.cache_config.kv_cache_size_tokens or 0)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: IterationStats | None,
        mm_cache_stats: MultiModalCacheStats | None = None,
        engine_idx: int = 0,
    ) -> None:
        if scheduler_stats is None:
            return
        counts = scheduler_stats.num_kv_fetch_reqs_by_stage
        found = {name: counts.pop(name) for name in (TOKEN_BYTES, CACHED, QUANTIZED) if name in counts}
        if not found or engine_idx not in self._gauges:
            return
        own = self._gauges[engine_idx]
        for name, count in found.items():
            own[name].set(count)
        own["kivi_quantized_share"].set(found[QUANTIZED] / found[CACHED] if found[CACHED] else 0)

    def log_engine_initialized(self) -> None:
        """Nothing to say that vLLM does not say."""


def extend_scheduler_stats() -> None:
    """Make a scheduler whose cache is ours report it; called where that cache is built."""
    compat.extend_scheduler_stats(due_counts)


def due_counts(scheduler: Any) -> dict[str, int]:
    """What cache_counts says, now and then, and when nothing runs any more."""
    now = time.monotonic()
    if scheduler.running and now < _due.get(scheduler, 0.0):
        return {}
    _due[scheduler] = now + INTERVAL
    return cache_counts(scheduler)


def cache_counts(scheduler: Any) -> dict[str, int]:
    """What a scheduler knows of our cache; nothing if its cache is not ours."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from vllm_kivi.backend.cache import FullPrecisionSpec

    groups = scheduler.kv_cache_config.kv_cache_groups
    spec = next((g.kv_cache_spec for g in groups if isinstance(g.kv_cache_spec, FullPrecisionSpec)), None)
    if spec is None:
        return {}
    token_bytes = sum(
        len(group.layer_names) * group.kv_cache_spec.page_size_bytes / group.kv_cache_spec.block_size
        for group in groups
        if isinstance(group.kv_cache_spec, FullAttentionSpec)
    )
    lengths = [request.num_computed_tokens for request in scheduler.running]
    bypass = KiviOptions.from_additional_config(scheduler.vllm_config.additional_config).full_precision
    quantized = 0 if bypass else sum(max(0, spec.window_start(length) - spec.sink_tokens) for length in lengths)
    return {TOKEN_BYTES: round(token_bytes), CACHED: sum(lengths), QUANTIZED: quantized}


def add_stat_logger() -> None:
    """Give engines with our cache a stat logger of ours; called where a configuration with it is checked."""
    compat.add_stat_logger(lambda dtype: dtype in PRESETS, KiviStatLogger)

"""Gauges of the cache in vLLM's /metrics: what they count, how they get there, and that other caches have none."""

from __future__ import annotations

import types

import engines
import pytest
from prometheus_client import REGISTRY, generate_latest
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.metrics.prometheus import unregister_vllm_metrics
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from vllm_kivi.backend import metrics


@pytest.fixture
def exposed(monkeypatch):
    """Both hooks, undone afterwards."""
    monkeypatch.setattr(Scheduler, "make_stats", Scheduler.make_stats)
    monkeypatch.setattr(StatLoggerManager, "__init__", StatLoggerManager.__init__)
    for _ in range(2):  # the second time changes nothing
        metrics.extend_scheduler_stats()
        metrics.add_stat_logger()


def gauges():
    samples = [sample for metric in REGISTRY.collect() for sample in metric.samples]
    return {
        sample.name.removeprefix("vllm:"): sample.value
        for sample in samples
        if sample.name.startswith("vllm:kivi_") and sample.labels["engine"] == "0"
    }


def fake_config(**cache):
    return types.SimpleNamespace(
        model_config=types.SimpleNamespace(served_model_name="m"),
        cache_config=types.SimpleNamespace(cache_dtype="kivi2", kv_cache_size_tokens=1000, **cache),
    )


@pytest.fixture
def stat_logger():
    unregister_vllm_metrics()  # those of an engine that another test had in this process
    yield metrics.KiviStatLogger(fake_config(), [0, 1])
    unregister_vllm_metrics()


def test_counts_survive_the_way_from_process_to_process_and_no_other_logger_sees_them(stat_logger):
    own = {metrics.TOKEN_BYTES: 96, metrics.CACHED: 400, metrics.QUANTIZED: 100}
    sent = EngineCoreOutputs(scheduler_stats=SchedulerStats(num_kv_fetch_reqs_by_stage={"in_progress": 3} | own))
    received = MsgpackDecoder(EngineCoreOutputs).decode(MsgpackEncoder().encode(sent)).scheduler_stats
    stat_logger.record(received, None, engine_idx=0)
    assert received.num_kv_fetch_reqs_by_stage == {"in_progress": 3}
    assert gauges() == {"kivi_capacity_tokens": 1000, "kivi_quantized_share": 0.25} | own
    assert 'vllm:kivi_quantized_share{engine="0",model_name="m"} 0.25' in generate_latest().decode()


def test_statistics_without_our_counts_change_nothing(stat_logger):
    for stats in (None, SchedulerStats(), SchedulerStats(num_kv_fetch_reqs_by_stage={"in_progress": 3})):
        stat_logger.record(stats, None, engine_idx=0)
    stat_logger.record(SchedulerStats(num_kv_fetch_reqs_by_stage={metrics.CACHED: 1}), None, engine_idx=7)
    assert gauges()["kivi_cached_tokens"] == 0
    empty = dict.fromkeys((metrics.TOKEN_BYTES, metrics.CACHED, metrics.QUANTIZED), 0)
    stat_logger.record(SchedulerStats(num_kv_fetch_reqs_by_stage=empty), None)
    assert gauges()["kivi_quantized_share"] == 0


def test_other_caches_have_no_gauges(monkeypatch, stat_logger):
    other = types.SimpleNamespace(kv_cache_groups=[types.SimpleNamespace(kv_cache_spec=None)])
    assert metrics.cache_counts(types.SimpleNamespace(kv_cache_config=other)) == {}

    def stock(self, vllm_config, engine_idxs=None):
        self.stat_loggers, self.engine_indexes = ["stock"], [0]

    monkeypatch.setattr(StatLoggerManager, "__init__", stock)
    monkeypatch.setattr(metrics, "KiviStatLogger", lambda *_: stat_logger)
    metrics.add_stat_logger()
    assert StatLoggerManager(vllm_config=fake_config()).stat_loggers == [stat_logger, "stock"]
    auto = fake_config()
    auto.cache_config.cache_dtype = "auto"
    assert StatLoggerManager(auto).stat_loggers == ["stock"]


def test_a_scheduler_counts_now_and_then_and_when_nothing_runs_any_more(monkeypatch):
    class Running:
        def __init__(self):
            self.running = ["a request"]

    monkeypatch.setattr(Scheduler, "make_stats", lambda self: SchedulerStats())
    monkeypatch.setattr(metrics, "cache_counts", lambda scheduler: {metrics.CACHED: len(scheduler.running)})
    metrics.extend_scheduler_stats()
    first, second = Running(), Running()
    counts = [Scheduler.make_stats(x).num_kv_fetch_reqs_by_stage for x in (first, first, second)]
    first.running = []
    counts.append(Scheduler.make_stats(first).num_kv_fetch_reqs_by_stage)
    assert counts == [{metrics.CACHED: 1}, {}, {metrics.CACHED: 1}, {metrics.CACHED: 0}]


def test_an_engine_reports_its_requests(exposed, tmp_path, monkeypatch):
    """Prompts of 300 and 20 tokens, and 9 tokens more: of 308, those below 160 are in quantized pages, sinks apart."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setattr(metrics, "INTERVAL", 0.0)  # every step
    model = engines.save_tiny_llama(tmp_path / "tiny")
    options = {"kivi": {"sink_tokens": 4, "residual_length": 128, "group_size": 32}}
    with engines.engine(model, "kivi2", disable_log_stats=False, additional_config=options) as llm:
        config = llm.llm_engine.vllm_config
        (spec,) = {
            group.kv_cache_spec.page_size_bytes / group.kv_cache_spec.block_size
            for group in llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
            if not hasattr(group.kv_cache_spec, "sliding_window") or group.kv_cache_spec.sliding_window is None
        }
        assert gauges()["kivi_capacity_tokens"] == config.cache_config.kv_cache_size_tokens > 0
        seen = []
        step = llm.llm_engine.step

        def stepping():
            outputs = step()
            seen.append(gauges())
            return outputs

        llm.llm_engine.step = stepping
        engines.generate(llm, [engines.prompt(300, 0), engines.prompt(20, 1)], max_tokens=10)
    # As many computed tokens as both have after a step; the last step has finished them.
    running = [found for found in seen if found["kivi_cached_tokens"]]
    assert [found["kivi_cached_tokens"] for found in running] == [320 + 2 * step for step in range(len(running))]
    assert len(running) >= 9
    for found in running:
        longer = (found["kivi_cached_tokens"] - 320) / 2 + 300
        boundary = (longer + 1 - 128) // 32 * 32
        assert found["kivi_quantized_tokens"] == boundary - 4
        assert found["kivi_quantized_share"] == found["kivi_quantized_tokens"] / found["kivi_cached_tokens"]
        assert found["kivi_bytes_per_token"] == 2 * spec
    assert seen[-1]["kivi_cached_tokens"] == seen[-1]["kivi_quantized_share"] == 0

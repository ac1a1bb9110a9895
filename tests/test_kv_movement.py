"""Pages that leave the engine's cache and come back: offloading, KV connectors, and what is refused.

A hit reads its context quantized, so what came back is compared with a hit that never left, bit by bit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from engines import assert_same_bits, engine, generate, logprobs, prompt, save_tiny_llama, tokens
from test_cache_manager import make_manager
from torch import Tensor
from vllm.distributed.kv_transfer.kv_connector.utils import yield_req_data
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1, KVConnectorRole, SupportsHMA
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes

from vllm_kivi.backend.cache import FullPrecisionSpec

Key = tuple[int, bytes]  # group, hash of all tokens up to the page's end

# Hits on it end at 768 tokens, so that none of its pages is computed twice: the context of a page's tokens is quantized
# where a chunk began, and pages of the same tokens need not be equal.
SHARED = prompt(769, 1)
# Within the window, past it, and one that begins as the last one does.
PROMPTS = [prompt(100, 3), prompt(430, 2), SHARED, SHARED + prompt(400, 4)]


@dataclass
class Transfers(KVConnectorMetadata):
    """What the worker copies in a step: pages by their block ids."""

    stores: list[tuple[Key, int]] = field(default_factory=list)
    loads: list[tuple[Key, int]] = field(default_factory=list)
    loading: set[str] = field(default_factory=set)


class PageStore(KVConnectorBase_V1, SupportsHMA):
    """Keeps every page of every group in this process, where the next engine finds it. Knows no byte of a page."""

    supports_kivi = True
    pages: ClassVar[dict[Key, list[Tensor]]] = {}
    loaded: ClassVar[Counter[str]] = Counter()

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._groups = kv_cache_config.kv_cache_groups
        self._asynchronous = self._kv_transfer_config.get_from_extra_config("asynchronous", False)
        if role == KVConnectorRole.SCHEDULER:
            self._alignment, self._hash_tokens = resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)
        self._requests: dict[str, Any] = {}
        self._computed: dict[str, int] = {}
        self._blocks: dict[str, list[list[int]]] = {}
        self._stored: dict[str, list[int]] = {}
        self._next = Transfers()

    # -- scheduler ------------------------------------------------------------------------------------------------

    def _key(self, request: Any, group: int, block: int) -> Key:
        end = (block + 1) * self._groups[group].kv_cache_spec.block_size
        return group, bytes(request.block_hashes[end // self._hash_tokens - 1])

    def _needed(self, length: int, computed: int) -> Iterator[tuple[int, int]]:
        """Groups and blocks that a request of `length` tokens needs to go on, `computed` of them being there."""
        for group, spec in enumerate(g.kv_cache_spec for g in self._groups):
            n = spec.block_size
            sinks, first = 0, 0
            if isinstance(spec, FullPrecisionSpec):
                sinks, first = spec.sink_blocks, spec.window_start(length) // n
            yield from ((group, b) for b in range(computed // n, length // n) if b < sinks or b >= first)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        self._computed[request.request_id] = num_computed_tokens
        longest = (request.num_tokens - 1) // self._alignment * self._alignment
        for length in range(longest, num_computed_tokens, -self._alignment):
            if all(self._key(request, *need) in self.pages for need in self._needed(length, num_computed_tokens)):
                return length - num_computed_tokens, self._asynchronous
        return 0, False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        self._requests[request.request_id] = request
        if not num_external_tokens:
            return
        computed = self._computed[request.request_id]
        for group, block in self._needed(computed + num_external_tokens, computed):
            page = blocks.blocks[group][block]
            assert not page.is_null
            self._next.loads.append((self._key(request, group, block), page.block_id))
        if self._asynchronous:
            self._next.loading.add(request.request_id)

    def build_connector_meta(self, scheduler_output: Any) -> Transfers:
        cached = scheduler_output.scheduled_cached_reqs
        computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        new = {request.req_id: request.num_computed_tokens for request in scheduler_output.scheduled_new_reqs}
        for name, block_ids, whole in yield_req_data(scheduler_output):
            if whole or name in new:
                self._blocks[name] = [[] for _ in self._groups]
                self._stored[name] = [0] * len(self._groups)
            for group, ids in enumerate(block_ids or ()):
                self._blocks[name][group].extend(ids)
            length = (computed | new)[name] + scheduler_output.num_scheduled_tokens[name]
            for group, ids in enumerate(self._blocks[name]):
                stop = length // self._groups[group].kv_cache_spec.block_size
                for block in range(self._stored[name][group], stop):
                    if ids[block] and (key := self._key(self._requests[name], group, block)) not in self.pages:
                        self._next.stores.append((key, ids[block]))
                self._stored[name][group] = stop
        step, self._next = self._next, Transfers()
        return step

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        return False, None

    # -- worker ---------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        self._caches = [[kv_caches[name] for name in group.layer_names] for group in self._groups]

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        step = self._get_connector_metadata()
        for key, block in step.loads:
            for cache, page in zip(self._caches[key[0]], self.pages[key], strict=True):
                cache[block] = page
            self.loaded[type(self._groups[key[0]].kv_cache_spec).__name__] += 1

    def wait_for_save(self) -> None:
        for key, block in self._get_connector_metadata().stores:
            self.pages[key] = [cache[block].clone() for cache in self._caches[key[0]]]

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, set[str]]:
        return None, self._get_connector_metadata().loading

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(self, layer_name: str, kv_layer: Tensor, attn_metadata: Any, **kwargs: Any) -> None:
        pass


class OneGroupStore(KVConnectorBase_V1):
    """One that says it is fit and is not."""

    supports_kivi = True

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        raise AssertionError("never made")

    start_load_kv = wait_for_layer_load = save_kv_layer = wait_for_save = None  # type: ignore[assignment]
    get_num_new_matched_tokens = update_state_after_alloc = build_connector_meta = None  # type: ignore[assignment]


def connector(name: str, own: bool = False, **extra: Any) -> dict[str, Any]:
    module = {"kv_connector_module_path": __name__} if own else {}
    return {"kv_connector": name, "kv_role": "kv_both", "kv_connector_extra_config": extra} | module


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"), num_hidden_layers=3)


@pytest.fixture(autouse=True)
def empty_store():
    PageStore.pages.clear()
    PageStore.loaded.clear()


def ask(llm: Any, token_ids: list[int]) -> Any:
    return generate(llm, [token_ids], max_tokens=16)[0]


def differs(actual: Any, wanted: Any) -> bool:
    return tokens(actual) != tokens(wanted) or bool((logprobs(actual) != logprobs(wanted)).any())


@pytest.mark.parametrize(
    ("dtype", "asynchronous", "settings"),
    [
        ("kivi2_boost", False, {}),
        # Two more groups, of vLLM's own pages, in the same pool.
        ("kivi2", True, {"kv_cache_dtype_skip_layers": ["1"]}),
    ],
    ids=["kivi2_boost", "skip-async"],
)
def test_a_fresh_engine_goes_on_from_pages_of_another(model, dtype, asynchronous, settings):
    settings = settings | {
        "enable_prefix_caching": True,
        "kv_transfer_config": connector("PageStore", own=True, asynchronous=asynchronous),
    }
    with engine(model, dtype, **settings) as llm:
        cold = [ask(llm, p) for p in PROMPTS]
        hits = [ask(llm, p) for p in PROMPTS]
        assert not PageStore.loaded
    # Long prompts read themselves quantized only on a hit: the comparison below sees which of the two happened.
    assert differs(hits[-1], cold[-1])
    with engine(model, dtype, **settings) as llm:
        for token_ids, hit in zip(PROMPTS, hits, strict=True):
            back = ask(llm, token_ids)
            assert back.num_cached_tokens == hit.num_cached_tokens
            assert_same_bits(back, hit)
    assert PageStore.loaded["FullAttentionSpec"] > 0
    assert PageStore.loaded["FullPrecisionSpec"] > 0


def spoil(which: Callable[[FullPrecisionSpec | None, int], bool], llm: Any) -> None:
    """Change the bytes of stored pages of the last prompt, chosen by spec and number."""
    store = llm.llm_engine.engine_core.engine_core.scheduler.connector
    request = next(r for r in store._requests.values() if r.prompt_token_ids == PROMPTS[-1])
    for group, spec in enumerate(g.kv_cache_spec for g in store._groups):
        for block in range(request.num_prompt_tokens // spec.block_size):
            key = store._key(request, group, block)
            if key in PageStore.pages and which(spec if isinstance(spec, FullPrecisionSpec) else None, block):
                # Low bits alone: other codes and mantissas, and never a NaN.
                PageStore.pages[key] = [page ^ 1 for page in PageStore.pages[key]]


def test_every_kind_of_page_was_loaded_and_is_read(model):
    transfer = connector("PageStore", own=True)
    with engine(model, enable_prefix_caching=True, kv_transfer_config=transfer) as llm:
        ask(llm, PROMPTS[-1])
        hit = ask(llm, PROMPTS[-1])
        for which in (
            lambda full, block: full is None and block == 3,
            lambda full, block: full is not None and block < full.sink_blocks,
            lambda full, block: (
                full is not None and block >= full.window_start(hit.num_cached_tokens) // full.block_size
            ),
        ):
            llm.reset_prefix_cache()
            assert_same_bits(ask(llm, PROMPTS[-1]), hit)
            spoil(which, llm)
            llm.reset_prefix_cache()
            assert differs(ask(llm, PROMPTS[-1]), hit)
            spoil(which, llm)


def test_a_prefix_on_the_spot_and_the_rest_loaded(model):
    transfer = connector("PageStore", own=True)
    with engine(model, enable_prefix_caching=True, kv_transfer_config=transfer) as llm:
        ask(llm, SHARED), ask(llm, PROMPTS[-1])
        hit = ask(llm, PROMPTS[-1])
        llm.reset_prefix_cache()
        start = ask(llm, SHARED)
        PageStore.loaded.clear()
        assert_same_bits(ask(llm, PROMPTS[-1]), hit)
        quantized = (hit.num_cached_tokens - start.num_cached_tokens) // 32
        assert 0 < PageStore.loaded["FullAttentionSpec"] <= quantized


class Done:
    """A CUDA event on a CPU."""

    def record(self, *args: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass


class Copies:
    """vLLM's copies between GPU and CPU, made on the spot; counts pages."""

    counts: ClassVar[Counter[str]] = Counter()
    gpu: ClassVar[dict[str, Tensor]] = {}
    kept: ClassVar[dict[str, Tensor]] = {}

    def init(self, gpu: dict[str, Tensor], cpu: dict[str, Tensor], *args: Any) -> None:
        Copies.gpu, Copies.kept = gpu, cpu
        self.counts.clear()

    def launch_copy(
        self, src: list[int], dst: list[int], is_store: bool, event_idx: int, events_list: list[Any], **kwargs: Any
    ) -> None:
        self.counts["stored" if is_store else "loaded"] += len(src)
        assert 0 not in dst  # the null block belongs to nobody
        for name, gpu in self.gpu.items():
            source, target = (gpu, self.kept[name]) if is_store else (self.kept[name], gpu)
            target[dst] = source[src]
        events_list.append((event_idx, Done()))

    def shutdown(self) -> None:
        pass


@contextmanager
def offloading(monkeypatch, model, dtype, **settings):
    """vLLM's CPU offloading, all of it but streams and copies, which need CUDA."""
    import vllm.v1.simple_kv_offload.worker as worker

    class TorchOnCpu(ModuleType):
        Event = Done
        cuda = SimpleNamespace(
            Stream=type("Stream", (), {"__init__": lambda *a, **k: None, "priority_range": lambda: (0, 0)}),
            current_stream=lambda: None,
        )

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    monkeypatch.setattr(worker, "torch", TorchOnCpu("torch"))
    monkeypatch.setattr(worker, "DmaCopyBackend", Copies)
    with engine(
        model,
        dtype,
        **{"enable_prefix_caching": True, "max_model_len": 1200, "num_gpu_blocks_override": 900} | settings,
    ) as llm:
        yield llm


@pytest.mark.parametrize("settings", [{}, {"kv_cache_dtype_skip_layers": ["1"]}], ids=["all", "skip"])
def test_offloaded_to_the_cpu_and_back(model, monkeypatch, settings):
    with offloading(monkeypatch, model, "kivi2", kv_offloading_size=0.1, **settings) as llm:

        def evict():
            for seed in range(3):
                ask(llm, prompt(1000, 50 + seed))
            for _ in range(20):  # a store that is under way holds its pages
                if llm.reset_prefix_cache():
                    for pages in Copies.gpu.values():
                        pages.fill_(-1)  # NaN in every page: one that is read must have been loaded
                    return
                ask(llm, prompt(3, 3))
            raise AssertionError("pages are still held")

        ask(llm, SHARED), ask(llm, PROMPTS[-1])
        hit = ask(llm, PROMPTS[-1])
        assert not Copies.counts["loaded"]
        for before in ([], [SHARED]):  # all of it from the CPU; the start on the spot and the rest from the CPU
            evict()
            for token_ids in before:
                ask(llm, token_ids)
            loaded = Copies.counts["loaded"]
            back = ask(llm, PROMPTS[-1])
            assert Copies.counts["loaded"] > loaded
            assert back.num_cached_tokens == hit.num_cached_tokens
            assert_same_bits(back, hit)
        evict()
        for pages in Copies.kept.values():
            pages.zero_()
        assert differs(ask(llm, PROMPTS[-1]), hit)


def configure(model, dtype="kivi2", **settings):
    from vllm import EngineArgs

    return EngineArgs(
        model=str(model), kv_cache_dtype=dtype, dtype="bfloat16", skip_tokenizer_init=True, **settings
    ).create_engine_config()


def test_offloading_uses_the_connector_that_moves_all_pages(model):
    transfer = configure(model, kv_offloading_size=0.5).kv_transfer_config
    assert transfer.kv_connector == "SimpleCPUOffloadConnector"
    assert transfer.kv_connector_extra_config == {"cpu_bytes_to_use": 1 << 29}
    assert transfer.is_kv_producer and transfer.is_kv_consumer


def test_offloading_of_other_cache_dtypes_is_left_alone(model):
    transfer = configure(model, "auto", kv_offloading_size=0.5).kv_transfer_config
    assert transfer.kv_connector == "OffloadingConnector"


def test_connectors_that_are_fit(model):
    simple = connector("SimpleCPUOffloadConnector")
    for transfer in (simple, connector("PageStore", own=True), connector("MultiConnector", connectors=[simple])):
        config = configure(model, kv_transfer_config=transfer)
        assert not config.scheduler_config.disable_hybrid_kv_cache_manager


@pytest.mark.parametrize(
    ("transfer", "named"),
    [
        (connector("ExampleConnector"), "ExampleConnector: it does not implement SupportsHMA"),
        (connector("OneGroupStore", own=True), "OneGroupStore: it does not implement SupportsHMA"),
        (connector("OffloadingConnector"), "OffloadingConnector: it is not known to move full-precision pages"),
        (connector("NixlConnector"), "NixlConnector: it is not known to move full-precision pages"),
        (
            connector(
                "MultiConnector", connectors=[connector("SimpleCPUOffloadConnector"), connector("OffloadingConnector")]
            ),
            "OffloadingConnector: it is not known",
        ),
    ],
    ids=["example", "one-group", "offloading", "nixl", "multi"],
)
def test_other_connectors_are_refused(model, transfer, named):
    with pytest.raises(ValueError, match=f"KV connector {named}.*; use SimpleCPUOffloadConnector"):
        configure(model, kv_transfer_config=transfer)
    assert configure(model, "auto", kv_transfer_config=transfer).kv_transfer_config


def test_lmcache_is_refused(model):
    with pytest.raises(ValueError, match=r"kivi: .*--kv-offloading-backend lmcache; use native"):
        configure(model, kv_offloading_size=1, kv_offloading_backend="lmcache")


def test_one_group_for_all_pages_is_refused(model, monkeypatch):
    """vLLM turns its hybrid manager off after platforms have checked a configuration, here as on other platforms."""
    from vllm.platforms import current_platform

    monkeypatch.setattr(type(current_platform), "support_hybrid_kv_cache", classmethod(lambda cls: False))
    with pytest.raises(ValueError, match="hybrid KV cache manager, which vLLM turns off"), engine(model):
        pass


def test_pages_that_a_load_will_write_are_not_zeroed():
    """vLLM zeroes new pages where caches of two precisions share the pool; a load may already be writing these."""
    for zeroed in (True, False):
        *_, manager, _, alignment = make_manager()
        full = manager.coordinator.single_type_managers[1]
        full._record_new_block_ids = True
        full.allocate_external_computed_blocks("a", 0, 4 * alignment, record_for_zeroing=zeroed)
        pages = [block.block_id for block in full.req_to_blocks["a"] if not block.is_null]
        assert len(pages) > 1
        assert full.take_new_block_ids() == (pages if zeroed else [])

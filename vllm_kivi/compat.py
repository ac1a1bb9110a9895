"""Every difference between vLLM versions and every place where stock vLLM has no hook: why, how, remove when."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

if TYPE_CHECKING:
    from vllm.config import KVTransferConfig, VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata
    from vllm.v1.metrics.stats import SchedulerStats

    _PromptLengths = Callable[[Any, CommonAttentionMetadata], torch.Tensor | None]

SUPPORTED = ((0, 32), (0, 33))

# vLLM's own connector that asks the managers of cache groups which pages a hit needs. Others know one group only, or
# work it out from the specs and take ours for a plain sliding window: they miss the sinks, and look for pages before
# the window that nobody keeps.
WHOLE_PAGE_CONNECTOR = "SimpleCPUOffloadConnector"

# Of the runner that builds metadata now.
_prompt_lengths: Callable[[CommonAttentionMetadata], torch.Tensor | None] | None = None

# Whether a lookup that runs now begins behind a local hit.
_suffix_lookup = False


def check_version() -> None:
    """Refuse a vLLM that was never tested.

    Raises:
        RuntimeError: names the version found and the versions supported.
    """
    from vllm.version import __version__, __version_tuple__

    if tuple(__version_tuple__[:2]) not in SUPPORTED:
        accepted = ", ".join(f"{major}.{minor}" for major, minor in SUPPORTED)
        raise RuntimeError(f"vllm-kivi supports vLLM {accepted}, not {__version__}; install one of these")


def register_cache_dtypes(names: Iterable[str], storage: torch.dtype) -> None:
    """Make vLLM accept our --kv-cache-dtype values.

    Why: 0.33 has a hook for it, and 0.32 has none. How: as below. Remove when 0.32 is dropped: then _register_handlers
    is what is left.
    """
    import vllm.config.cache as cache

    if hasattr(cache, "register_kv_cache_dtype"):
        _register_handlers(names, storage)
    else:
        _extend_literal(names, storage)


def _register_handlers(names: Iterable[str], storage: torch.dtype) -> None:
    """0.33. The mode is NONE, as vLLM takes an unknown name on 0.32: CUSTOM, which is meant for plugins, is the same
    number as OCTAVE_K3V4, so that vLLM takes it for that format."""
    import vllm.config.cache as cache
    from vllm.v1.kv_cache_interface import KVQuantMode

    config: Any = cache
    for name in names:
        if config.get_kv_cache_dtype_handler(name) is None:
            methods = {"torch_dtype": lambda self: storage, "quant_mode": lambda self: KVQuantMode.NONE}
            config.register_kv_cache_dtype(name)(type("KiviCacheDType", (), {"name": name, **methods}))


def _extend_literal(names: Iterable[str], storage: torch.dtype) -> None:
    """0.32 checks names against a Literal in pydantic dataclasses: extend it and rebuild what was compiled with it."""
    import vllm.config.cache as cache
    import vllm.config.vllm as config
    import vllm.engine.arg_utils as arg_utils
    import vllm.v1.attention.selector as selector
    from pydantic.dataclasses import rebuild_dataclass
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    known = get_args(cache.CacheDType)
    new = [name for name in names if name not in known]
    STR_DTYPE_TO_TORCH_DTYPE.update(dict.fromkeys(new, storage))
    if not new:
        return
    extended: Any = Literal[(*known, *new)]  # type: ignore[valid-type]
    modules: tuple[Any, ...] = (cache, selector, arg_utils)
    for module in modules:
        module.CacheDType = extended
    cache_config: Any = cache.CacheConfig
    vllm_config: Any = config.VllmConfig
    cache_config.__annotations__["cache_dtype"] = extended
    cache_config.__dataclass_fields__["cache_dtype"].type = extended
    rebuild_dataclass(cache_config, force=True)
    rebuild_dataclass(vllm_config, force=True)


def extend_platform(
    is_ours: Callable[[str | None], bool],
    select: Callable[[Any], str],
    check_config: Callable[[VllmConfig], None],
    finish_pages: Callable[[VllmConfig], None],
) -> None:
    """Let the platform choose our backend for our cache dtypes, and check the configuration.

    Why: a platform picks among backends it knows (the CPU's always CPU_ATTN), and a general plugin is not asked when
    the configuration is checked. How: wrap three class methods of the platform. Remove when vLLM asks registered
    backends.
    """
    from vllm.platforms import current_platform

    platform: Any = type(current_platform)
    if getattr(platform, "_kivi", False):
        return
    stock_select = platform.get_attn_backend_cls.__func__
    stock_check = platform.check_and_update_config.__func__
    stock_block_size = platform.update_block_size_for_backend.__func__

    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
    ) -> str:
        if is_ours(attn_selector_config.kv_cache_dtype):
            return select(attn_selector_config)
        return stock_select(cls, selected_backend, attn_selector_config, *args, **kwargs)

    def check_and_update_config(cls: Any, vllm_config: VllmConfig) -> None:
        stock_check(cls, vllm_config)
        check_config(vllm_config)

    def update_block_size_for_backend(cls: Any, vllm_config: VllmConfig) -> None:
        if not is_ours(vllm_config.cache_config.cache_dtype):
            return stock_block_size(cls, vllm_config)
        # Stock code prefers a size of its own to the one that layers were made for, and makes pages equal by the bytes
        # of one token, which our pages are no multiple of.
        finish_pages(vllm_config)

    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
    platform.check_and_update_config = classmethod(check_and_update_config)
    platform.update_block_size_for_backend = classmethod(update_block_size_for_backend)
    platform._kivi = True


def unfit_connectors(config: KVTransferConfig) -> Iterator[tuple[str, str]]:
    """Names of configured connectors that cannot carry two types of pages, and why.

    A connector from elsewhere is taken at its word: `supports_kivi = True` in its class. The children of a
    MultiConnector count.
    """
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.distributed.kv_transfer.kv_connector.v1 import supports_hma

    name = config.kv_connector
    if name is None:
        return
    if name == "MultiConnector":
        for child in config.kv_connector_extra_config.get("connectors", []):
            yield from unfit_connectors(type(config)(**{"engine_id": config.engine_id, **child}))
        return
    connector = KVConnectorFactory.get_connector_class(config)
    if not supports_hma(connector):
        yield name, "it does not implement SupportsHMA, so it knows one group of pages only"
    elif name != WHOLE_PAGE_CONNECTOR and not getattr(connector, "supports_kivi", False):
        yield name, "it is not known to move full-precision pages, such as those of the sinks"


def offload_whole_pages(vllm_config: VllmConfig) -> None:
    """Make --kv-offloading-size use WHOLE_PAGE_CONNECTOR.

    Why: vLLM would choose OffloadingConnector, unless the environment says otherwise. How: configure the connector as
    vLLM would a moment later, and clear the size, which asks vLLM to do it. Remove when OffloadingConnector asks a
    group's manager what a hit needs.
    """
    from vllm.config import KVTransferConfig

    size = vllm_config.cache_config.kv_offloading_size
    assert size is not None
    transfer = vllm_config.kv_transfer_config or KVTransferConfig()
    transfer.kv_connector, transfer.kv_role = WHOLE_PAGE_CONNECTOR, "kv_both"
    transfer.kv_connector_extra_config.update({"cpu_bytes_to_use": int(size * (1 << 30))})
    vllm_config.kv_transfer_config, vllm_config.cache_config.kv_offloading_size = transfer, None


def expose_suffix_lookups() -> None:
    """Make known to looks_up_suffix what WHOLE_PAGE_CONNECTOR looks up.

    Why: it looks up what follows a local hit as if a prompt began there, and hits need sinks at the start of a prompt
    only. How: remember it while the connector looks up; called by the full-precision manager, when the connector's
    module is loaded, if it will be. Remove when a lookup has an offset.
    """
    module = sys.modules.get("vllm.v1.simple_kv_offload.manager")
    if module is None:
        return
    stock = module.SimpleCPUOffloadScheduler.get_num_new_matched_tokens
    if getattr(stock, "_kivi", False):
        return

    @functools.wraps(stock)
    def get_num_new_matched_tokens(self: Any, request: Any, num_computed_tokens: int) -> Any:
        global _suffix_lookup
        _suffix_lookup = num_computed_tokens > 0
        try:
            return stock(self, request, num_computed_tokens)
        finally:
            _suffix_lookup = False

    get_num_new_matched_tokens._kivi = True  # type: ignore[attr-defined]
    module.SimpleCPUOffloadScheduler.get_num_new_matched_tokens = get_num_new_matched_tokens


def looks_up_suffix() -> bool:
    """Whether the hashes that are looked up now begin behind a local hit, which holds the sinks."""
    return _suffix_lookup


def expose_prompt_lengths() -> None:
    """Make prompt lengths known to num_prompt_tokens.

    Why: a preempted request is recomputed in one chunk, in which generated tokens must attend as they did when they
    were decoded; both model runners tell backends where a prompt ends only for models with R-SWA. How: remember the
    runner while it builds metadata; called by a metadata builder, so that its class is loaded already. Remove when
    CommonAttentionMetadata always has it.
    """
    for module, method, lengths in (
        ("vllm.v1.worker.gpu_model_runner", "_build_attention_metadata", _first_runner_lengths),
        ("vllm.v1.worker.gpu.model_runner", "execute_model", _second_runner_lengths),
    ):
        if module in sys.modules:
            _remember_runner(sys.modules[module].GPUModelRunner, method, lengths)


def _first_runner_lengths(runner: Any, common: CommonAttentionMetadata) -> torch.Tensor:
    return runner.input_batch.num_prompt_tokens_cpu_tensor[: common.num_reqs]


def _second_runner_lengths(runner: Any, common: CommonAttentionMetadata) -> torch.Tensor | None:
    if common.req_idx is None:  # models with Mamba layers
        return None
    return torch.from_numpy(runner.req_states.prompt_len.np[common.req_idx])


def _remember_runner(runner_cls: Any, method: str, lengths: _PromptLengths) -> None:
    stock = getattr(runner_cls, method)
    if getattr(stock, "_kivi", False):
        return

    @functools.wraps(stock)
    def remembering(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _prompt_lengths
        _prompt_lengths = functools.partial(lengths, self)
        try:
            return stock(self, *args, **kwargs)
        finally:
            _prompt_lengths = None

    remembering._kivi = True  # type: ignore[attr-defined]
    setattr(runner_cls, method, remembering)


def give_draft_models_their_pages() -> None:
    """Hand a draft model the block table of its own layers.

    Why: the first model runner hands it that of the first cache group, which here holds quantized pages; other drafters
    get theirs. How: replace it in what _build_attention_metadata returns; called by a metadata builder, as above.
    Remove when the runner asks for a DraftModelProposer's kv_cache_gid too.
    """
    module = sys.modules.get("vllm.v1.worker.gpu_model_runner")
    if module is None or getattr(module.GPUModelRunner, "_kivi_drafts", False):
        return
    stock = module.GPUModelRunner._build_attention_metadata

    @functools.wraps(stock)
    def with_own_pages(self: Any, *args: Any, **kwargs: Any) -> Any:
        metadata, common = stock(self, *args, **kwargs)
        drafter = getattr(self, "drafter", None)
        if common is not None and isinstance(drafter, module.DraftModelProposer) and drafter.kv_cache_gid > 0:
            table = self.input_batch.block_table[drafter.kv_cache_gid]
            common.block_table_tensor = table.get_device_tensor(common.num_reqs)
            common.slot_mapping = table.slot_mapping.gpu[: len(common.slot_mapping)]
        return metadata, common

    module.GPUModelRunner._build_attention_metadata = with_own_pages
    module.GPUModelRunner._kivi_drafts = True


def num_prompt_tokens(common: CommonAttentionMetadata) -> torch.Tensor | None:
    """int32 [num_reqs] on the CPU: where each request's prompt ends. None where it is unknown, as in a drafter's batch
    or in a graph's capture."""
    return None if _prompt_lengths is None else _prompt_lengths(common)


def extend_scheduler_stats(counts: Callable[[Any], dict[str, int]]) -> None:
    """Add `counts` of a scheduler, by names that are ours alone, to what it reports.

    Why: SchedulerStats has no room for plugins, and its encoding drops what is not declared. How: wrap make_stats, and
    put the counts into the one dict of counts by name, from which our stat logger takes them before any other logger
    looks. Remove when SchedulerStats has a field for plugins.
    """
    from vllm.v1.core.sched.scheduler import Scheduler

    stock: Any = Scheduler.make_stats
    if getattr(stock, "_kivi", False):
        return

    @functools.wraps(stock)
    def make_stats(self: Any, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = stock(self, *args, **kwargs)
        if stats is not None:
            stats.num_kv_fetch_reqs_by_stage.update(counts(self))
        return stats

    make_stats._kivi = True  # type: ignore[attr-defined]
    Scheduler.make_stats = make_stats  # type: ignore[method-assign]


def add_stat_logger(is_ours: Callable[[str | None], bool], make: Callable[[VllmConfig, list[int]], Any]) -> None:
    """Put a stat logger that `make` makes, of a configuration and its engines' numbers, before vLLM's own.

    Why: vLLM's plugins for stat loggers (vllm.stat_logger_plugins) load in every server where this package is
    installed, whatever its cache, and switch statistics on where --disable-log-stats switched them off. How: add it to
    the loggers that vLLM made, in front of them. Remove when such plugins can decline.
    """
    from vllm.v1.metrics.loggers import StatLoggerManager

    stock: Any = StatLoggerManager.__init__
    if getattr(stock, "_kivi", False):
        return

    @functools.wraps(stock)
    def init(self: Any, vllm_config: VllmConfig, *args: Any, **kwargs: Any) -> None:
        stock(self, vllm_config, *args, **kwargs)
        if is_ours(vllm_config.cache_config.cache_dtype):
            # vLLM's Prometheus logger, made just now, has unregistered all earlier metrics named vllm:.
            self.stat_loggers.insert(0, make(vllm_config, self.engine_indexes))

    init._kivi = True  # type: ignore[attr-defined]
    StatLoggerManager.__init__ = init  # type: ignore[method-assign]

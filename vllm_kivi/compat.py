"""Every difference between vLLM versions and every place where stock vLLM has no hook: why, how, remove when."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.backend import CommonAttentionMetadata

SUPPORTED = ((0, 32),)

_runner_prompt_tokens: torch.Tensor | None = None


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

    Why: 0.32 checks them against a Literal in pydantic dataclasses. How: extend the Literal and rebuild the dataclasses
    that were compiled with it. Remove when 0.32 is dropped: 0.33 has register_kv_cache_dtype.
    """
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
        # Stock code grows the block size until a quantized page covers a skipped layer's page of as many tokens, which
        # a format that is no power of two smaller never does. Our specs make the pages equal by themselves.
        cache_config = vllm_config.cache_config
        skipped = cache_config.kv_cache_dtype_skip_layers
        if is_ours(cache_config.cache_dtype):
            cache_config.kv_cache_dtype_skip_layers = []
        stock_block_size(cls, vllm_config)
        cache_config.kv_cache_dtype_skip_layers = skipped

    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)
    platform.check_and_update_config = classmethod(check_and_update_config)
    platform.update_block_size_for_backend = classmethod(update_block_size_for_backend)
    platform._kivi = True


def expose_prompt_lengths() -> None:
    """Make prompt lengths known to num_prompt_tokens.

    Why: a preempted request is recomputed in one chunk, in which generated tokens must attend as they did when they
    were decoded; the first model runner tells backends where a prompt ends only for models with R-SWA. How: remember
    the runner's tensor while it builds metadata. Remove when CommonAttentionMetadata always has it, as under the
    second model runner.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    runner: Any = GPUModelRunner
    stock = runner._build_attention_metadata
    if getattr(stock, "_kivi", False):
        return

    def _build_attention_metadata(self: Any, *args: Any, **kwargs: Any) -> Any:
        global _runner_prompt_tokens
        _runner_prompt_tokens = self.input_batch.num_prompt_tokens_cpu_tensor
        try:
            return stock(self, *args, **kwargs)
        finally:
            _runner_prompt_tokens = None

    _build_attention_metadata._kivi = True  # type: ignore[attr-defined]
    runner._build_attention_metadata = _build_attention_metadata


def num_prompt_tokens(common: CommonAttentionMetadata) -> torch.Tensor:
    """int32 [num_reqs] on the batch's device: where each request's prompt ends."""
    lengths = common.rswa_prefix_lens
    if lengths is None:
        if _runner_prompt_tokens is None:
            # A drafter's own batch: it has only decodes, which do not read this.
            return common.seq_lens
        lengths = _runner_prompt_tokens[: common.num_reqs]
    return lengths.to(device=common.seq_lens.device, dtype=torch.int32, non_blocking=True)

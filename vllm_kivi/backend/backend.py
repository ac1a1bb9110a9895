"""What vLLM asks before it runs anything: capabilities, page specs, and whether the configuration can be honoured."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from vllm.logger import init_logger
from vllm.v1.attention.backend import AttentionBackend, AttentionType, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheLayout

from vllm_kivi import compat
from vllm_kivi.backend.heuristics import check_device
from vllm_kivi.format import HEAD_DIMS, PRESETS, KVFormat, check_model
from vllm_kivi.options import KiviOptions

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.attention.selector import AttentionSelectorConfig

    from vllm_kivi.backend.cache import FullPrecisionSpec
    from vllm_kivi.backend.impl import KiviImpl
    from vllm_kivi.backend.metadata import KiviMetadataBuilder

# Under vLLM's own logger, so that its level and handlers apply.
logger = init_logger("vllm.kivi")

NAME = "KIVI"
# What vLLM stores in a spec for our cache dtypes: pages are bytes, whatever the model's dtype.
PAGE_DTYPE = torch.uint8


class KiviAttentionBackend(AttentionBackend):
    """One class for all layers; `bind` makes the subclass that knows a layer's byte map."""

    kv_format: ClassVar[KVFormat | None] = None
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = list(PRESETS)  # type: ignore[assignment]

    @classmethod
    def bind(cls, kv_format: KVFormat) -> type[KiviAttentionBackend]:
        return _bind(kv_format)

    @staticmethod
    def get_name() -> str:
        return NAME

    @staticmethod
    def get_impl_cls() -> type[KiviImpl]:
        from vllm_kivi.backend.impl import KiviImpl

        return KiviImpl

    @staticmethod
    def get_builder_cls() -> type[KiviMetadataBuilder]:
        from vllm_kivi.backend.metadata import KiviMetadataBuilder

        return KiviMetadataBuilder

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return list(HEAD_DIMS)

    @classmethod
    def get_supported_kernel_block_sizes(cls, kv_cache_spec: Any = None) -> list[int | MultipleOf]:  # type: ignore[override]
        if kv_cache_spec is not None:
            return [MultipleOf(kv_cache_spec.block_size)]
        return [MultipleOf(cls.kv_format.group_size if cls.kv_format else 1)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        # A head's tiles must be contiguous; block and head strides are free.
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """Turn an attention layer's spec into that of its quantized pages."""
        fmt = cls.kv_format
        if fmt is None or type(spec) is not FullAttentionSpec or spec.dtype != PAGE_DTYPE:
            return spec
        padded = fmt.padded_page_bytes if fmt.padded_page_bytes > fmt.page_bytes else None
        return replace(spec, block_size=fmt.page_tokens, state_content_bytes=fmt.token_bytes, page_size_padded=padded)


@functools.cache
def _bind(kv_format: KVFormat) -> type[KiviAttentionBackend]:
    # vLLM groups layers by the class's name: it stays the same.
    names = {"__module__": KiviAttentionBackend.__module__, "__qualname__": KiviAttentionBackend.__qualname__}
    return type(KiviAttentionBackend.__name__, (KiviAttentionBackend,), {"kv_format": kv_format, **names})


def layer_format(vllm_config: VllmConfig, preset: str, head_dim: int, num_kv_heads: int) -> KVFormat:
    """The byte map of a layer in this engine; the block size grows with it where layers keep a state of a request."""
    options = KiviOptions.from_additional_config(vllm_config.additional_config)
    dtype = str(vllm_config.model_config.dtype).removeprefix("torch.")
    cache_config = vllm_config.cache_config
    fmt = options.format(preset, head_dim, num_kv_heads, dtype, page_tokens=cache_config.block_size)
    skips_layers = bool(cache_config.kv_cache_dtype_skip_layers)
    token_bytes = num_kv_heads * (fmt.full_token_bytes if skips_layers else fmt.token_bytes)
    # As in stock vLLM, the page that holds a Mamba layer's state of a request is as large as the others.
    least = ceil(_mamba_state_bytes(vllm_config) / (token_bytes * fmt.group_size)) * fmt.group_size
    if cache_config.block_size < least:
        cache_config.block_size = least
        fmt = replace(fmt, page_tokens=least, padded_page_bytes=0)
    if skips_layers:
        fmt = fmt.beside_full_precision()
    if _has_draft_layers(vllm_config.speculative_config):
        fmt = fmt.beside(_draft_page_bytes(vllm_config))
    return fmt


def _mamba_state_bytes(vllm_config: VllmConfig) -> int:
    """What a Mamba or linear-attention layer of this model keeps of a request; 0 if it has none."""
    from vllm.model_executor.layers.mamba.abstract import MambaBase

    layers = vllm_config.compilation_config.static_forward_context.values()
    specs: list[Any] = [layer.get_kv_cache_spec(vllm_config) for layer in layers if isinstance(layer, MambaBase)]
    return max((replace(spec, page_size_padded=None).page_size_bytes for spec in specs if spec), default=0)


def finish_pages(vllm_config: VllmConfig) -> None:
    """When all layers have their byte maps: give the states of Mamba layers pages of the same size.

    Raises:
        ValueError: no layer is quantized, or vLLM has turned off what two types of pages need.
    """
    from vllm.model_executor.layers.attention import Attention

    cache_config = vllm_config.cache_config
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:  # decided after check_config
        raise ValueError(
            f"kivi: --kv-cache-dtype {cache_config.cache_dtype} needs vLLM's hybrid KV cache manager, which vLLM turns "
            "off for this model or platform; use auto or fp8"
        )
    layers = vllm_config.compilation_config.static_forward_context.values()
    backends = [layer.attn_backend for layer in layers if isinstance(layer, Attention)]
    formats = [backend.kv_format for backend in backends if issubclass(backend, KiviAttentionBackend)]
    if not formats:
        if vllm_config.parallel_config.pipeline_parallel_size == 1:
            raise ValueError(
                f"kivi: --kv-cache-dtype {cache_config.cache_dtype} quantizes no layer of this model: all have sliding "
                "windows, are in --kv-cache-dtype-skip-layers, or get no cache dtype from vLLM (Falcon); use "
                "auto or fp8"
            )
    elif _mamba_state_bytes(vllm_config):
        fmt = formats[0]
        assert fmt is not None
        cache_config.mamba_page_size_padded = fmt.padded_page_bytes
        if cache_config.mamba_cache_mode == "align":
            cache_config.mamba_block_size = cache_config.block_size


def _draft_page_bytes(vllm_config: VllmConfig) -> int:
    """Bytes of a page of the drafter's layers, which stay in full precision."""
    speculative: Any = vllm_config.speculative_config
    model = speculative.draft_model_config
    heads = model.get_num_kv_heads(speculative.draft_parallel_config)
    return vllm_config.cache_config.block_size * heads * 2 * model.get_head_size() * model.dtype.itemsize


def full_precision_spec(vllm_config: VllmConfig, fmt: KVFormat) -> FullPrecisionSpec:
    """The spec of the pages that hold the sinks and the window of a layer with this byte map."""
    from vllm_kivi.backend.cache import FullPrecisionSpec

    return FullPrecisionSpec(
        block_size=fmt.full_page_tokens,
        num_kv_heads=fmt.num_kv_heads,
        head_size=fmt.head_dim,
        dtype=PAGE_DTYPE,
        state_content_bytes=fmt.full_token_bytes,
        page_size_padded=fmt.padded_page_bytes,
        sliding_window=fmt.residual_length + fmt.group_size,
        group_size=fmt.group_size,
        residual_length=fmt.residual_length,
        sink_tokens=fmt.sink_tokens,
        quantized_page_tokens=fmt.page_tokens,
        num_speculative_tokens=vllm_config.num_speculative_tokens,
        max_model_len=vllm_config.model_config.max_model_len,
    )


def select(config: AttentionSelectorConfig) -> str:
    """Class path of the backend for a layer with one of our cache dtypes.

    Raises:
        ValueError: the layer cannot be quantized; says why and what to do.
    """
    dtype = config.kv_cache_dtype
    skip = "leave the layer unquantized with --kv-cache-dtype-skip-layers, or use --kv-cache-dtype auto or fp8"
    if config.use_mla or config.use_sparse:
        raise ValueError(f"kivi: --kv-cache-dtype {dtype} does not support MLA or sparse attention; use auto or fp8")
    if config.attn_type != AttentionType.DECODER:
        kind = AttentionType(config.attn_type).value
        raise ValueError(f"kivi: --kv-cache-dtype {dtype} supports decoder self-attention, not {kind}; use auto")
    if config.head_size not in HEAD_DIMS:
        accepted = ", ".join(map(str, HEAD_DIMS))
        raise ValueError(
            f"kivi: --kv-cache-dtype {dtype} does not support head size {config.head_size}; "
            f"accepted: {accepted}; {skip}"
        )
    if config.has_sliding_window:
        raise ValueError(
            f"kivi: --kv-cache-dtype {dtype} does not quantize sliding-window layers; "
            "add --kv-cache-dtype-skip-layers sliding_window"
        )
    if config.has_sink:
        raise ValueError(f"kivi: --kv-cache-dtype {dtype} does not support learned attention sinks; {skip}")
    if config.use_mm_prefix or config.use_non_causal:
        raise ValueError(f"kivi: --kv-cache-dtype {dtype} supports causal attention only; {skip}")
    return f"{KiviAttentionBackend.__module__}.{KiviAttentionBackend.__qualname__}"


def check_config(vllm_config: VllmConfig) -> None:
    """Refuse at start what cannot be honoured, and choose the block size.

    Raises:
        ValueError: names the option and what is accepted.
    """
    cache_config = vllm_config.cache_config
    model_config = vllm_config.model_config
    dtype = cache_config.cache_dtype
    options = KiviOptions.from_additional_config(vllm_config.additional_config)
    if dtype not in PRESETS:
        return
    KiviOptions.check_entries(vllm_config.additional_config)
    flag = f"kivi: --kv-cache-dtype {dtype}"
    if model_config is None:
        return
    head_size = model_config.get_head_size()
    sliding = _sliding_layers(model_config)
    check_model(
        dtype,
        head_size,
        mla=model_config.use_mla,
        encoder_decoder=model_config.is_encoder_decoder,
        all_sliding=sliding == "all",
    )
    model_dtype = str(model_config.dtype).removeprefix("torch.")
    check_device(flag, model_dtype)
    if vllm_config.scheduler_config.disable_hybrid_kv_cache_manager:
        raise ValueError(f"{flag} needs vLLM's hybrid KV cache manager; remove --disable-hybrid-kv-cache-manager")
    _check_connector(flag, vllm_config)
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise ValueError(f"{flag} does not support context parallelism; set both context-parallel sizes to 1")
    # Checks the options, the block size and the dtype.
    fmt = options.format(
        dtype,
        head_size,
        model_config.get_num_kv_heads(parallel),
        model_dtype,
        page_tokens=cache_config.block_size if cache_config.user_specified_block_size else 0,
    )
    cache_config.block_size = fmt.page_tokens
    _check_skip_layers(cache_config.kv_cache_dtype_skip_layers, model_config.get_total_num_hidden_layers())
    if sliding == "some" and "sliding_window" not in cache_config.kv_cache_dtype_skip_layers:
        cache_config.kv_cache_dtype_skip_layers = [*cache_config.kv_cache_dtype_skip_layers, "sliding_window"]
        logger.info("kivi: sliding-window layers keep their full-precision cache: they hold few tokens")
    speculative: Any = vllm_config.speculative_config
    if _has_draft_layers(speculative):
        if speculative.kv_cache_dtype in PRESETS:
            raise ValueError(
                f"kivi: kv_cache_dtype {speculative.kv_cache_dtype} of --speculative-config is not supported: drafters "
                "keep their full-precision cache; leave it out, or use auto or fp8"
            )
        if speculative.kv_cache_dtype is None:
            speculative.kv_cache_dtype = "auto"
            logger.info("kivi: the drafter's layers keep their full-precision cache")
    from vllm_kivi.backend import metrics  # imports vLLM's stat loggers, which not every process needs

    metrics.add_stat_logger()


def _check_skip_layers(skipped: Sequence[str], num_layers: int) -> None:
    """Raises ValueError for what vLLM would pass over in silence: the layer meant would be quantized."""
    for entry in skipped:
        if entry != "sliding_window" and entry not in map(str, range(num_layers)):
            raise ValueError(
                f"kivi: --kv-cache-dtype-skip-layers {entry} names no layer of this model; accepted: 0 to "
                f"{num_layers - 1}, sliding_window"
            )


def _check_connector(flag: str, vllm_config: VllmConfig) -> None:
    """Let pass what moves both types of pages: vLLM's offloading to the CPU, and connectors that say they do.

    Raises:
        ValueError: a connector would leave pages out, such as those of the sinks.
    """
    cache_config = vllm_config.cache_config
    if cache_config.kv_offloading_size is not None:
        if cache_config.kv_offloading_backend != "native":
            raise ValueError(
                f"{flag} does not support --kv-offloading-backend {cache_config.kv_offloading_backend}; use native"
            )
        compat.offload_whole_pages(vllm_config)
        logger.info("kivi: --kv-offloading-size uses %s, which moves both types of pages", compat.WHOLE_PAGE_CONNECTOR)
    if vllm_config.kv_transfer_config is None:
        return
    for name, unfit in compat.unfit_connectors(vllm_config.kv_transfer_config):
        raise ValueError(
            f"{flag} does not support the KV connector {name}: {unfit}; use {compat.WHOLE_PAGE_CONNECTOR}, or see "
            "'Moving pages' in docs/DESIGN.md for what a connector of your own must do"
        )


def _sliding_layers(model_config: Any) -> Literal["none", "some", "all"]:
    """Which attention layers have a sliding window."""
    layer_types = getattr(model_config.hf_text_config, "layer_types", None) or ()
    if model_config.get_sliding_window() is None and "sliding_attention" not in layer_types:
        return "none"
    return "some" if any(kind != "sliding_attention" for kind in layer_types) else "all"


def _has_draft_layers(speculative: Any) -> bool:
    """Whether something drafts that has attention layers of its own."""
    if speculative is None or speculative.draft_model_config is None:
        return False
    return speculative.method not in ("ngram", "ngram_gpu", "suffix", "medusa", "mlp_speculator")

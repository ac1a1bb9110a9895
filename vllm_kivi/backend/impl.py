"""Routes a layer's step: store, then decode and prefill."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType

from vllm_kivi import ops
from vllm_kivi.backend.backend import KiviAttentionBackend, full_precision_spec, layer_format
from vllm_kivi.backend.cache import FullPrecisionLayer
from vllm_kivi.backend.heuristics import device, on_gpu, shared
from vllm_kivi.backend.metadata import KiviMetadata
from vllm_kivi.backend.prefill import GpuPrefill
from vllm_kivi.format import PRESETS, KVFormat

# Under vLLM's own logger, so that its level and handlers apply.
logger = init_logger("vllm.kivi")

# Appended to an attention layer's name: pipeline-parallel ranks merge specs by name.
FULL_PRECISION_SUFFIX = ".full_precision"


class KiviImpl(AttentionImpl[KiviMetadata]):
    """Attention of one layer over quantized and full-precision pages."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **features: Any,
    ) -> None:
        # A few models name further features in every layer, None where a layer does without (Granite: sinks).
        for feature, used in (
            *((f"the attention feature {name!r}", value is not None) for name, value in features.items()),
            ("ALiBi", alibi_slopes is not None),
            ("sliding windows", sliding_window is not None),
            ("layers that share another layer's KV cache", kv_sharing_target_layer_name is not None),
        ):
            if used:
                raise ValueError(f"kivi: --kv-cache-dtype {kv_cache_dtype} does not support {feature}; use auto or fp8")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = float(logits_soft_cap or 0.0)
        self._vllm_config: VllmConfig | None = get_current_vllm_config()
        # On a GPU; found here because it reads the current configuration.
        self._flash_attention = _flash_attention(head_size, bool(logits_soft_cap)) if on_gpu() else None
        self._gpu_prefill: GpuPrefill | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Give this layer its byte map and its full-precision pages: only now is its name known."""
        if self._vllm_config is None:
            return  # Weights were reloaded.
        layers = self._vllm_config.compilation_config.static_forward_context
        name, layer = next((n, x) for n, x in layers.items() if getattr(x, "impl", None) is self)
        if type(layer) is not Attention or layer.head_size_v != layer.head_size:
            # Pages or masks of its own, which ours would replace.
            what = "values of another size than keys" if type(layer) is Attention else type(layer).__name__
            raise ValueError(
                f"kivi: --kv-cache-dtype {self.kv_cache_dtype} does not support {what} (layer {name}); use auto or fp8"
            )
        fmt = layer_format(self._vllm_config, self.kv_cache_dtype, self.head_size, self.num_kv_heads)
        layer.attn_backend = KiviAttentionBackend.bind(fmt)
        self.full_precision_name = name + FULL_PRECISION_SUFFIX
        self.full_precision_layer = FullPrecisionLayer(
            layer.attn_backend, full_precision_spec(self._vllm_config, fmt), self.num_heads
        )
        layers[self.full_precision_name] = self.full_precision_layer
        self._layout = fmt.layout()
        if self._flash_attention is not None:
            self._prepare_gpu(layer, fmt, self._flash_attention)
        _log_once(self._vllm_config, fmt)
        self._vllm_config = None

    def _prepare_gpu(self, layer: torch.nn.Module, fmt: KVFormat, flash_attention: Callable[..., Any]) -> None:
        """Take all memory that steps need now: before vLLM measures what is left for the cache, and before it captures
        graphs."""
        where = device()
        self._workspace = shared(
            ("decode", tuple(self._layout), where), lambda: ops.decode_workspace(self._layout, where)
        )
        # It is zero between calls and must still be so after a sleep of level 2, from which only buffers come back.
        layer.register_buffer("kivi_workspace", self._workspace.tensors, persistent=False)
        self._gpu_prefill = GpuPrefill(fmt, self.scale, self.logits_soft_cap, flash_attention, where)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: KiviMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Store the new tokens, then attend.

        Args:
            query, output: [num_tokens, num_heads, head_size]
            key, value: [num_tokens, num_kv_heads, head_size]
            kv_cache: quantized pages, uint8 [num_blocks, num_kv_heads, page_tokens, token_bytes]
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("kivi: fused output quantization is not supported")
        gpu = self._gpu_prefill
        if attn_metadata is None:  # vLLM measures memory.
            if gpu is not None:
                gpu.reserve(query)
            return output.fill_(0)
        metadata = get_forward_context().attn_metadata
        if isinstance(metadata, list):
            metadata = metadata[0]
        assert isinstance(metadata, dict)
        quantized = attn_metadata
        full = cast(KiviMetadata, metadata[self.full_precision_name])
        pages = kv_cache, self.full_precision_layer.kv_cache
        num_tokens, decodes = quantized.num_actual_tokens, quantized.num_decodes
        query_start_loc, seq_lens = quantized.query_start_loc, quantized.seq_lens
        scale, soft_cap, layout = self.scale, self.logits_soft_cap, self._layout
        ops.store(
            key[:num_tokens],
            value[:num_tokens],
            *pages,
            quantized.block_table,
            full.block_table,
            query_start_loc,
            seq_lens,
            layout,
        )
        if decodes:
            rows = slice(quantized.num_decode_tokens)
            tables = quantized.block_table[:decodes], full.block_table[:decodes]
            batch = (*tables, query_start_loc[: decodes + 1], seq_lens[:decodes])
            workspace = None if gpu is None else self._workspace.tensors
            ops.decode(output[rows], query[rows], *pages, *batch, scale, soft_cap, layout, workspace)
        if quantized.num_prefills:
            tables = quantized.block_table[decodes:], full.block_table[decodes:]
            if gpu is not None:
                gpu(output, query, key, value, *pages, *tables, quantized.pieces)
            else:
                assert quantized.num_prompt_tokens is not None
                batch = (*tables, query_start_loc[decodes:], seq_lens[decodes:])
                prompts = quantized.num_prompt_tokens[decodes:]
                ops.prefill(output, query, key, value, *pages, *batch, prompts, scale, soft_cap, layout)
        return output


def _flash_attention(head_size: int, soft_cap: bool) -> Callable[..., Any]:
    """vLLM's own FlashAttention for prefill, in the version that it would choose itself.

    Raises:
        RuntimeError: it does not load here.
    """
    from vllm.v1.attention.backends import fa_utils

    version = fa_utils.get_flash_attn_version(head_size=head_size, requires_softcap=soft_cap)
    if version is None:
        raise RuntimeError("kivi: prefill on a GPU needs vLLM's FlashAttention, which does not load here")
    return functools.partial(fa_utils.flash_attn_varlen_func, fa_version=version)


def _log_once(vllm_config: VllmConfig, fmt: KVFormat) -> None:
    """One line per model: what the cache really is."""
    names: dict[bool, list[str]] = {True: [], False: []}
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        if isinstance(layer, Attention):
            names[layer.kv_cache_dtype in PRESETS].append(name)
    logger.info_once(
        "kivi: %s%s: keys %d bits%s, values %d bits%s, group %d, residual %d, sinks %d, %s scales%s; "
        "%.2f bits per element; %d bytes per token and layer (%s: %d); page of %d tokens, %d bytes, %d padding; "
        "full-precision page of %d tokens, %d padding; prefix hits every %d tokens; %d layers quantized, %d skipped%s",
        fmt.preset,
        " (full_precision bypass: nothing is quantized)" if fmt.full_precision else "",
        fmt.k_bits,
        f" ({fmt.boosted_channels} of {fmt.head_dim} channels 4)" if fmt.boosted_channels else "",
        fmt.v_bits,
        " rotated" if fmt.rotate_values else "",
        fmt.group_size,
        fmt.residual_length,
        fmt.sink_tokens,
        fmt.dtype,
        " searched" if fmt.scale_search else "",
        fmt.bits_per_element,
        fmt.num_kv_heads * fmt.token_bytes,
        fmt.dtype,
        fmt.num_kv_heads * fmt.full_token_bytes,
        fmt.page_tokens,
        fmt.page_bytes,
        fmt.padded_page_bytes - fmt.page_bytes,
        fmt.full_page_tokens,
        fmt.padded_page_bytes - fmt.full_page_bytes,
        fmt.hit_step,
        len(names[True]),
        len(names[False]),
        ": " + ", ".join(names[False]) if names[False] else "",
    )

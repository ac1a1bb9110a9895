"""Routes a layer's step: store, then decode and prefill."""

from __future__ import annotations

from typing import cast

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionImpl, AttentionLayer, AttentionType

from vllm_kivi import ops
from vllm_kivi.backend.backend import KiviAttentionBackend, full_precision_spec, layer_format
from vllm_kivi.backend.cache import FullPrecisionLayer
from vllm_kivi.backend.metadata import KiviMetadata
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
    ) -> None:
        for feature, used in (
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

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Give this layer its byte map and its full-precision pages: only now is its name known."""
        if self._vllm_config is None:
            return  # Weights were reloaded.
        layers = self._vllm_config.compilation_config.static_forward_context
        name, layer = next((n, x) for n, x in layers.items() if getattr(x, "impl", None) is self)
        fmt = layer_format(self._vllm_config, self.kv_cache_dtype, self.head_size, self.num_kv_heads)
        layer.attn_backend = KiviAttentionBackend.bind(fmt)
        self.full_precision_name = name + FULL_PRECISION_SUFFIX
        self.full_precision_layer = FullPrecisionLayer(
            layer.attn_backend, full_precision_spec(self._vllm_config, fmt), self.num_heads
        )
        layers[self.full_precision_name] = self.full_precision_layer
        self._layout = fmt.layout()
        _log_once(self._vllm_config, fmt)
        self._vllm_config = None

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
        if attn_metadata is None:  # vLLM measures memory.
            return output.fill_(0)
        metadata = get_forward_context().attn_metadata
        if isinstance(metadata, list):
            metadata = metadata[0]
        assert isinstance(metadata, dict)
        quantized = attn_metadata
        full = cast(KiviMetadata, metadata[self.full_precision_name])
        full_pages = self.full_precision_layer.kv_cache
        num_tokens = quantized.num_actual_tokens
        ops.store(
            key[:num_tokens],
            value[:num_tokens],
            kv_cache,
            full_pages,
            quantized.block_table,
            full.block_table,
            quantized.query_start_loc,
            quantized.seq_lens,
            self._layout,
        )
        decodes = quantized.num_decodes
        if decodes:
            ops.decode(
                output,
                query,
                kv_cache,
                full_pages,
                quantized.block_table[:decodes],
                full.block_table[:decodes],
                quantized.query_start_loc[: decodes + 1],
                quantized.seq_lens[:decodes],
                self.scale,
                self.logits_soft_cap,
                self._layout,
            )
        if quantized.num_prefills:
            ops.prefill(
                output,
                query,
                key,
                value,
                kv_cache,
                full_pages,
                quantized.block_table[decodes:],
                full.block_table[decodes:],
                quantized.query_start_loc[decodes:],
                quantized.seq_lens[decodes:],
                quantized.num_prompt_tokens[decodes:],
                self.scale,
                self.logits_soft_cap,
                self._layout,
            )
        return output


def _log_once(vllm_config: VllmConfig, fmt: KVFormat) -> None:
    """One line per model: what the cache really is."""
    names: dict[bool, list[str]] = {True: [], False: []}
    for name, layer in vllm_config.compilation_config.static_forward_context.items():
        if isinstance(layer, Attention):
            names[layer.kv_cache_dtype in PRESETS].append(name)
    logger.info_once(
        "kivi: %s%s: keys %d bits, values %d bits, group %d, residual %d, sinks %d, %s scales; %.2f bits per element; "
        "%d bytes per token and layer (%s: %d); page of %d tokens, %d bytes, %d padding; full-precision page of %d "
        "tokens, %d padding; prefix hits every %d tokens; %d layers quantized, %d skipped%s",
        fmt.preset,
        " (full_precision bypass: nothing is quantized)" if fmt.full_precision else "",
        fmt.k_bits,
        fmt.v_bits,
        fmt.group_size,
        fmt.residual_length,
        fmt.sink_tokens,
        fmt.dtype,
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

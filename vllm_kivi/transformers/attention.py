"""Attention "kivi" of transformers: reads the packed pages of a KiviCache, and is ordinary attention elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from vllm_kivi.transformers.pages import masked_attention

NAME = "kivi"
LAYER = "_kivi_layer"  # of keys that a cache hands to attention: the layer that stores them


def kivi_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """What attention "kivi" gets as its mask.

    Returns:
        None for causal attention without padding; bool [B, kv_length] for causal attention with padding, False where it
        is; for sliding windows and other masks what sdpa gets: bool [B, 1, q_length, kv_length] or None.
    """
    if mask_function is not causal_mask_function:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs | {"allow_is_causal_skip": False},
        )
    if attention_mask is None:
        return None
    if attention_mask.shape[1] < kv_length:
        raise ValueError(
            f"kivi: attention_mask has {attention_mask.shape[1]} columns, but with what is cached there are "
            f"{kv_length} tokens; pass the mask of all tokens"
        )
    attention_mask = attention_mask[:, :kv_length]
    # On a GPU this would wait for it.
    return None if attention_mask.device.type == "cpu" and attention_mask.all() else attention_mask


def kivi_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers' AttentionInterface.

    Args:
        query: [B, heads, q, D]; key, value: [B, H, q or all, D].
        attention_mask: what `kivi_mask` returns.

    Returns:
        [B, q, heads, D], and no attention weights.

    Raises:
        ValueError: attention that packed pages do not support.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = getattr(key, LAYER, None)
    for what, used in (
        ("attention dropout", dropout > 0),
        ("learned attention sinks", s_aux is not None),
        ("sliding windows in a layer whose cache has none", layer is not None and sliding_window is not None),
        ("a mask that is not causal", layer is not None and attention_mask is not None and attention_mask.dim() != 2),
    ):
        if used:
            raise ValueError(f'kivi: attn_implementation="kivi" does not support {what}; use "sdpa" or "eager"')
    if layer is not None:
        return layer.attend(query, key, value, attention_mask, scale, softcap or 0.0), None
    return _plain(query, key, value, attention_mask, scale, softcap or 0.0), None


def _plain(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, soft_cap: float) -> Tensor:
    """Attention over keys and values that no KiviCache stores: of sliding layers, or without a cache."""
    if mask is None or mask.dim() == 2:
        mask = sdpa_mask(
            batch_size=len(query),
            q_length=query.shape[2],
            kv_length=key.shape[2],
            q_offset=key.shape[2] - query.shape[2],
            attention_mask=mask,
            allow_is_causal_skip=not soft_cap and query.shape[2] == key.shape[2],
            device=query.device,
        )
    return masked_attention(query, key, value, mask, scale, soft_cap)


AttentionInterface.register(NAME, kivi_attention)
AttentionMaskInterface.register(NAME, kivi_mask)

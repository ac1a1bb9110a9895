"""Attention "kivi" of transformers: reads the packed pages of a KiviCache, and is ordinary attention elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from vllm_kivi.transformers.plain import masked_attention

NAME = "kivi"
LAYER = "_kivi_layer"  # of keys that a cache hands to attention: the layer that stores them


def kivi_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """What attention "kivi" gets as its mask.

    Args:
        q_offset, kv_offset: int, or a tensor [] of caches that can be compiled.

    Returns:
        For causal attention to new tokens, and to all that a KiviCache holds: bool [B, 1, 1, q_length], False where a
        new token is padding, or None where none is. For other caches, sliding windows and other masks what sdpa gets:
        bool [B, 1, q_length, kv_length] or None.

    Raises:
        ValueError: the mask is shorter than the tokens, or has padding between tokens of a row; on a GPU the latter is
            an assertion there.
    """
    # A tensor: a KiviCache that can be compiled says so where its tokens end. Another cache's keys begin at 0.
    same_offset = isinstance(kv_offset, Tensor) or (not isinstance(q_offset, Tensor) and kv_offset == q_offset)
    if mask_function is not causal_mask_function or kv_length != q_length or not same_offset:
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
    known = attention_mask.device.type == "cpu" and not torch.compiler.is_compiling()  # a GPU would be waited for
    if known:
        kv_offset = int(kv_offset)
    if isinstance(kv_offset, Tensor):
        columns = kv_offset + torch.arange(kv_length, device=attention_mask.device)
        real = attention_mask.index_select(1, columns)
    else:
        if attention_mask.shape[1] < kv_offset + kv_length:
            raise ValueError(
                f"kivi: attention_mask has {attention_mask.shape[1]} columns, but with what is cached there are "
                f"{kv_offset + kv_length} tokens; pass the mask of all tokens"
            )
        real = attention_mask[:, kv_offset : kv_offset + kv_length]
    if known and real.all():
        return None
    if q_length > 1:
        message = (
            "kivi: attention_mask has padding between new tokens of a row; pad at the left or at the right, or, where "
            'the last token of an answer comes before it, use attn_implementation="sdpa" from the first step on'
        )
        contiguous = _is_contiguous(real)
        if not known:
            torch._assert_async(contiguous, message)
        elif not contiguous:
            raise ValueError(message)
    return real[:, None, None]


def _is_contiguous(real: Tensor) -> Tensor:
    """Whether the tokens of each row follow each other: real bool [B, q] -> bool []."""
    begins = (real[:, 1:] & ~real[:, :-1]).sum(1) + real[:, 0]
    return (begins <= 1).all()


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
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers' AttentionInterface.

    Args:
        query: [B, heads, q, D]; key, value: [B, H, q or all, D].
        attention_mask: what `kivi_mask` returns.
        is_causal: of attention without a mask; None: as the module says. Vision towers and encoders are not.

    Returns:
        [B, q, heads, D], and no attention weights.

    Raises:
        ValueError: attention that packed pages do not support.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    layer = getattr(key, LAYER, None)
    for what, used in (
        ("attention dropout", dropout > 0),
        ("learned attention sinks", s_aux is not None),
        ("a position bias", position_bias is not None),
        ("sliding windows in a layer whose cache has none", layer is not None and sliding_window is not None),
        (
            "cross-attention whose cache is a KiviCache and not a DynamicCache",
            layer is not None and key.shape[2] != query.shape[2],
        ),
        ("attention that reads the keys of another layer, or twice", layer is not None and not layer.is_waiting),
        ("a mask that is not causal", layer is not None and not _is_of_new(attention_mask, query.shape[2])),
    ):
        if used:
            raise ValueError(f'kivi: attn_implementation="kivi" does not support {what}; use "sdpa" or "eager"')
    if layer is not None:
        query = query.to(key.dtype)  # under torch.autocast, as the keys
        return layer.attend(query, key, value, attention_mask, scale, softcap or 0.0), None
    return _plain(query, key, value, attention_mask, causal, scale, softcap or 0.0), None


def _is_of_new(mask: Tensor | None, num_new: int) -> bool:
    """Whether `kivi_mask` made it for a KiviCache."""
    return mask is None or (mask.dim() == 4 and mask.shape[1:] == (1, 1, num_new))


def _plain(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float, soft_cap: float
) -> Tensor:
    """Attention over keys and values that no KiviCache stores: of sliding layers, of encoders, or without a cache."""
    q, tokens = query.shape[2], key.shape[2]
    if not causal:
        if mask is None:
            mask = query.new_ones(1, 1, q, tokens, dtype=torch.bool)
    elif q == tokens and _is_of_new(mask, q) and (mask is not None or soft_cap):
        mask = sdpa_mask(
            batch_size=len(query),
            q_length=q,
            kv_length=tokens,
            attention_mask=None if mask is None else mask[:, 0, 0],
            allow_is_causal_skip=False,
            device=query.device,
        )
    return masked_attention(query, key, value, mask, scale, soft_cap)


AttentionInterface.register(NAME, kivi_attention)
AttentionMaskInterface.register(NAME, kivi_mask)

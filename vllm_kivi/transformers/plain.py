"""Attention in PyTorch, over keys and values that are not packed."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, logits_soft_cap: float
) -> Tensor:
    """Query [B, heads, q, D], key and value [B, H, tokens, D] -> [B, q, heads, D].

    Args:
        mask: bool [B, 1, q, tokens], True where a row attends; None: causal, with as many tokens as rows.
        logits_soft_cap: 0 for none; needs a mask.
    """
    shared = query.shape[1] // key.shape[1]
    if mask is not None:
        # With a mask, kernels for grouped queries would make place for all scores.
        key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    if not logits_soft_cap:
        output = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=mask is None
        )
        return output.transpose(1, 2)
    assert mask is not None
    scores = logits_soft_cap * torch.tanh(query @ key.transpose(2, 3) * scale / logits_soft_cap)
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1, dtype=torch.float32)
    return (weights.to(query.dtype) @ value).transpose(1, 2)

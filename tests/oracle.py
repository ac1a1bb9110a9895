"""What a model says with a quantized cache: transformers runs it, and nothing is shared with the engine.

Every row of every layer attends to keys and values that vllm_kivi.reference packed and unpacked, or to the originals,
by the rules of docs/DESIGN.md. The rest is the model's own code in transformers: norms, rotary embeddings, scales, soft
caps and sliding windows reach `attention` as they reach any other attention function.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vllm_kivi import reference
from vllm_kivi.format import KVFormat

NAME = "kivi_oracle"


def dequantized(fmt: KVFormat, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k, v [T, H, D] as quantized pages hold them; tokens of an incomplete last group as they are."""
    k_read, v_read = k.clone(), v.clone()
    for start in range(0, len(k) - fmt.group_size + 1, fmt.group_size):
        group = slice(start, start + fmt.group_size)
        tile = reference.unpack_tile(fmt, reference.pack_tile(fmt, k[group], v[group]))
        k_read[group], v_read[group] = reference.dequantize_tile(fmt, tile)
    return k_read, v_read


def boundary(fmt: KVFormat, row: int, prompt: int, chunk: int) -> int:
    """Tokens below it, sinks apart, are read quantized by this row."""
    if row >= prompt:
        return fmt.boundary(row + 1)
    start = row // chunk * chunk  # a chunk reads its own tokens in full precision
    return min(fmt.boundary(start + 1), start)


def attention(make_format: Callable[[int, int], KVFormat] | None, prompt: int, chunk: int) -> Callable[..., Any]:
    """An attention function for transformers' AttentionInterface.

    Args:
        make_format: the byte map of a layer without a sliding window, from its head_dim and KV heads; None: nothing is
            quantized.
        prompt: rows from here on are tokens that were decoded.
        chunk: prompt tokens that the engine prefills at a time.
    """

    def attend(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        length = key.shape[2]
        k, v = (x[0].transpose(0, 1) for x in (key, value))  # [T, H, D]
        fmt = make_format(k.shape[2], k.shape[1]) if make_format and not sliding_window else None
        boundaries, sinks, read = [0] * length, 0, (k, v)
        if fmt:
            boundaries, sinks = [boundary(fmt, row, prompt, chunk) for row in range(length)], fmt.sink_tokens
            read = dequantized(fmt, k, v)
        outputs = []
        for below, run in itertools.groupby(range(length), boundaries.__getitem__):
            rows = torch.tensor(list(run))
            positions = torch.arange(int(rows[-1]) + 1)
            quantized = (positions < below) & (positions >= sinks)
            keys, values = (
                torch.where(quantized[:, None, None], lossy[: len(positions)], own[: len(positions)])
                .transpose(0, 1)
                .repeat_interleave(query.shape[1] // key.shape[1], 0)
                for lossy, own in zip(read, (k, v), strict=True)
            )
            scores = query[0, :, rows] @ keys.transpose(1, 2) * scaling
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            age = rows[:, None] - positions
            hidden = (age < 0) | (age >= (sliding_window or length))
            outputs.append(scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values)
        return torch.cat(outputs, 1).transpose(0, 1)[None], None

    return attend


def logprobs(
    path: Path, tokens: list[int], prompt: int, chunk: int, make_format: Callable[[int, int], KVFormat] | None
) -> Tensor:
    """Log-probability of each token after the first, float32 [len(tokens) - 1]; arguments as of `attention`."""
    from transformers import AttentionInterface, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    AttentionInterface.register(NAME, attention(make_format, prompt, chunk))
    model.set_attn_implementation(NAME)
    with torch.inference_mode():
        logits = model(torch.tensor([tokens]), use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]

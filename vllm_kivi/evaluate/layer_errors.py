"""What quantization does to one attention layer: errors of its keys, values, scores and outputs.

Keys and values go through the cache's own bytes (reference.py packs and unpacks them), and rows read what they would
read of the cache: sinks and recent tokens in full precision, the rest quantized.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kivi import reference
from vllm_kivi.format import KVFormat


@dataclass(frozen=True)
class LayerInputs:
    """What an attention layer gets for one window of T tokens, keys and queries rotated."""

    query: Tensor  # [T, num_heads, D]
    key: Tensor  # [T, H, D]
    value: Tensor  # [T, H, D]
    scale: float
    logits_soft_cap: float


def through_cache(fmt: KVFormat, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """float32 keys and values [T, H, D] as quantized pages have them; those of an incomplete last group are exact."""
    keys, values = key.to(torch.float32, copy=True), value.to(torch.float32, copy=True)
    groups = len(key) // fmt.group_size
    if groups:
        # Tiles are independent of each other, so all groups of all heads are packed as heads of one tile.
        k, v = (
            x[: groups * fmt.group_size].unflatten(0, (groups, -1)).transpose(0, 1).flatten(1, 2) for x in (key, value)
        )
        tiles = reference.dequantize_tile(fmt, reference.unpack_tile(fmt, reference.pack_tile(fmt, k, v)))
        for whole, tile in zip((keys, values), tiles, strict=True):
            whole[: groups * fmt.group_size] = tile.unflatten(1, (groups, -1)).transpose(0, 1).flatten(0, 1)
    return keys, values


def _squares(x: Tensor, *dims: int) -> Tensor:
    return x.double().square().sum(dims)


def measure(fmt: KVFormat, inputs: LayerInputs, rows: Sequence[int], sinks: Sequence[int]) -> dict[str, Tensor]:
    """Sums of squares over one window, which add up over windows; `ratios` makes errors of them.

    Args:
        rows: positions whose attention is measured, each on its own boundary, as if it were decoded.
        sinks: numbers of first tokens in full precision to measure outputs with.

    Returns:
        On the CPU, H KV heads with their query heads together: key, value and their _error [H, D]; score_error and
        output [H]; output_error [len(sinks), H].
    """
    keys, values = inputs.key.float(), inputs.value.float()
    quantized_keys, quantized_values = through_cache(fmt, inputs.key, inputs.value)
    sums = {
        # A constant in a channel of all keys would add the same to all scores of a row: it is not what must be kept.
        "key": _squares(keys - keys.mean(0), 0),
        "key_magnitude": _squares(keys, 0),
        "key_error": _squares(quantized_keys - keys, 0),
        "value": _squares(values, 0),
        "value_error": _squares(quantized_values - values, 0),
    }
    at = torch.tensor(rows, device=keys.device)
    positions = torch.arange(len(keys), device=keys.device)
    future = positions > at[:, None]  # [rows, T]
    boundaries = torch.tensor([fmt.boundary(row + 1) for row in rows], device=keys.device)
    num_heads = keys.shape[1]
    # [H, query heads of each, rows, D]
    query = inputs.query[at].float().unflatten(1, (num_heads, -1)).permute(1, 2, 0, 3)

    def scores(k: Tensor) -> Tensor:
        found = inputs.scale * query @ k.permute(1, 2, 0)[:, None]
        cap = inputs.logits_soft_cap
        return cap * torch.tanh(found / cap) if cap else found

    def weights(found: Tensor) -> Tensor:
        return found.masked_fill(future, -torch.inf).softmax(-1)

    v, quantized_v = values.transpose(0, 1)[:, None], quantized_values.transpose(0, 1)[:, None]
    exact, approximate = scores(keys), scores(quantized_keys)
    exact_weights = weights(exact)
    output = exact_weights @ v
    sums["output"] = _squares(output, 1, 2, 3)
    errors = []
    for first in sinks:
        quantized = (positions >= first) & (positions < boundaries[:, None])
        mixed = weights(torch.where(quantized, approximate, exact))
        read = (mixed * quantized) @ quantized_v + (mixed * ~quantized) @ v
        errors.append(_squares(read - output, 1, 2, 3))
        if first == fmt.sink_tokens:
            # Softmax ignores what is added to all scores, and barely sees those that have no weight.
            added = torch.where(quantized, approximate - exact, 0)
            mean = (exact_weights * added).sum(-1, keepdim=True)
            sums["score_error"] = (exact_weights * (added - mean).square()).sum((1, 2, 3)).double()
    sums["output_error"] = torch.stack(errors)
    sums["rows"] = torch.tensor(float(query.shape[1] * query.shape[2]))
    return {name: found.cpu() for name, found in sums.items()}


def ratios(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Errors relative to what they are errors of; 0 where nothing is lost.

    Returns:
        key_channels, value_channels, key_outliers, value_outliers [H, D]; keys, values, scores, outputs [H] and
        sinks [len(sinks), H], which are outputs for each number of sinks; layer_outputs [len(sinks)], all heads.
        Scores are a standard deviation in logits; outliers are magnitudes of channels in units of their median.
    """

    def relative(error: Tensor, of: Tensor) -> Tensor:
        return torch.where(error > 0, error / of.clamp(min=1e-30), 0.0).sqrt()

    def outliers(magnitude: Tensor) -> Tensor:
        size = magnitude.sqrt()
        return size / size.median(-1, keepdim=True).values.clamp(min=1e-30)

    return {
        "key_channels": relative(sums["key_error"], sums["key"]),
        "value_channels": relative(sums["value_error"], sums["value"]),
        "key_outliers": outliers(sums["key_magnitude"]),
        "value_outliers": outliers(sums["value"]),
        "keys": relative(sums["key_error"].sum(-1), sums["key"].sum(-1)),
        "values": relative(sums["value_error"].sum(-1), sums["value"].sum(-1)),
        "scores": (sums["score_error"] / sums["rows"]).sqrt(),
        "sinks": relative(sums["output_error"], sums["output"]),
        "layer_outputs": relative(sums["output_error"].sum(-1), sums["output"].sum()),
    }

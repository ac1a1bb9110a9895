"""What a user may set: --additional-config '{"kivi": {...}}'."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_kivi.format import GROUP_SIZES, KVFormat


@dataclass(frozen=True)
class KiviOptions:
    """Settings shared by all layers; the defaults are the published KIVI.

    Args:
        group_size: G, elements that share a scale and zero: 32, 64 or 128.
        residual_length: R, the most recent tokens that are never read quantized; 0 or more.
        sink_tokens: first tokens of every request that are never read quantized; 0 or more.
        full_precision: keep pages and code path but quantize nothing: tells plumbing faults from quantization error.
        scale_search: quantize each group for the narrower range that loses least, instead of for all of its range.
            Set sink_tokens with it: the outliers of a first token that all others attend to must not be clipped.
    """

    group_size: int = 32
    residual_length: int = 128
    sink_tokens: int = 0
    full_precision: bool = False
    scale_search: bool = False

    @classmethod
    def from_additional_config(cls, additional_config: object) -> KiviOptions:
        """Read the "kivi" entry of vLLM's additional_config.

        Raises:
            ValueError: for an unknown key or a bad value, naming it and what is accepted.
        """
        raw = additional_config.get("kivi", {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(raw, Mapping):
            raise ValueError(f'kivi: additional_config["kivi"] must be a mapping of options, not {raw!r}')
        accepted = {field.name: field for field in dataclasses.fields(cls)}
        for name, value in raw.items():
            if name not in accepted:
                raise ValueError(f"kivi: unknown option {name!r}; accepted: {', '.join(accepted)}")
            _check_value(name, value)
        return cls(**raw)

    def format(self, preset: str, head_dim: int, num_kv_heads: int, dtype: str, **page: Any) -> KVFormat:
        """The byte map of a layer under these options; `page` takes KVFormat's page_tokens and padded_page_bytes."""
        return KVFormat(
            preset=preset,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            dtype=dtype,
            **page,
            **dataclasses.asdict(self),
        )


def _check_value(name: str, value: Any) -> None:
    if name in ("full_precision", "scale_search"):
        if not isinstance(value, bool):
            raise ValueError(f"kivi: {name}={value!r} is not supported; accepted: true, false")
    elif isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"kivi: {name}={value!r} is not supported; accepted: an integer of 0 or more")
    elif name == "group_size" and value not in GROUP_SIZES:
        raise ValueError(f"kivi: group_size={value} is not supported; accepted: {', '.join(map(str, GROUP_SIZES))}")

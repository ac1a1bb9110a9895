"""What a user may set: --additional-config '{"kivi": {...}}'."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_kivi.format import ACCEPTED_FRACTIONS, BOOSTED_FRACTIONS, GROUP_SIZES, PRESETS, KVFormat

# The options with which kivi2, kivi_k4v2, kivi4 and kivi8 are published KIVI, bit for bit
PUBLISHED: dict[str, Any] = {
    "group_size": 32,
    "residual_length": 128,
    "sink_tokens": 0,
    "scale_search": False,
    "rotate_values": False,
}
_TUNED = PUBLISHED | {"sink_tokens": 4, "scale_search": True, "rotate_values": True}

# kv_cache_dtype -> the options that nobody set
DEFAULTS: dict[str, dict[str, Any]] = {
    "kivi2": _TUNED,
    "kivi2_boost": _TUNED | {"group_size": 64, "boosted_fraction": BOOSTED_FRACTIONS["kivi2_boost"]},
    "kivi_k4v2": _TUNED,
    "kivi4": _TUNED,
    "kivi8": PUBLISHED,  # for checking the plumbing: nothing between the model and its codes
}


@dataclass(frozen=True)
class KiviOptions:
    """Settings shared by all layers; None is the default of the cache dtype, see DEFAULTS.

    Args:
        group_size: G, elements that share a scale and zero: 32, 64 or 128.
        residual_length: R, the most recent tokens that are never read quantized; 0 or more.
        sink_tokens: first tokens of every request that are never read quantized; 0 or more.
        full_precision: keep pages and code path but quantize nothing: tells plumbing faults from quantization error.
        scale_search: quantize each group of values for the narrower range that loses least, instead of for all of its
            range.
        rotate_values: quantize values after a Hadamard rotation, which spreads outliers over all channels.
        boosted_fraction: one key channel in 4 or in 8 has 4 bits; for kivi2_boost only.
    """

    group_size: int | None = None
    residual_length: int | None = None
    sink_tokens: int | None = None
    full_precision: bool = False
    scale_search: bool | None = None
    rotate_values: bool | None = None
    boosted_fraction: int | None = None

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

    @classmethod
    def check_entries(cls, additional_config: object) -> None:
        """Refuse options beside the "kivi" entry, or under another name of ours; other entries are other plugins'.

        Raises:
            ValueError: names the entry.
        """
        names = {"kivi", "vllm_kivi", *PRESETS, *(field.name for field in dataclasses.fields(cls))}
        for name in additional_config if isinstance(additional_config, Mapping) else ():
            if name != "kivi" and str(name).lower().replace("-", "_") in names:
                raise ValueError(
                    f'kivi: additional_config["{name}"] would have no effect; options go into "kivi", as in '
                    '{"kivi": {"group_size": 64}}'
                )

    def resolved(self, preset: str) -> dict[str, Any]:
        """Every option with its value for a cache dtype; without boosted_fraction where that means nothing."""
        own = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return DEFAULTS[preset] | own

    def format(self, preset: str, head_dim: int, num_kv_heads: int, dtype: str, **others: Any) -> KVFormat:
        """The byte map of a layer under these options; `others` are KVFormat's that are no options: page_tokens,
        padded_page_bytes, k_bits and v_bits."""
        return KVFormat(
            preset=preset,
            head_dim=head_dim,
            num_kv_heads=num_kv_heads,
            dtype=dtype,
            **others,
            **self.resolved(preset),
        )


def _check_value(name: str, value: Any) -> None:
    if name in ("full_precision", "scale_search", "rotate_values"):
        if not isinstance(value, bool):
            raise ValueError(f"kivi: {name}={value!r} is not supported; accepted: true, false")
    elif isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"kivi: {name}={value!r} is not supported; accepted: an integer of 0 or more")
    for one, accepted in (("group_size", GROUP_SIZES), ("boosted_fraction", ACCEPTED_FRACTIONS)):
        if name == one and value not in accepted:
            raise ValueError(f"kivi: {name}={value} is not supported; accepted: {', '.join(map(str, accepted))}")

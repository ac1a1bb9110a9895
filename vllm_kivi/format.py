"""The byte map of the cache: the only place that computes an offset.

Two kinds of pages live in vLLM's block pool (docs/FORMAT.md shows them with pictures):

Quantized page, `page_tokens` (N) tokens of one layer, N a multiple of the group size G:

    page   = [num_kv_heads][N / G] tiles of `tile_bytes`
    tile   = G tokens of one KV head, sections in this order, each a multiple of 16 bytes:

    | section | shape and type                              | bytes                  |
    |---------|---------------------------------------------|------------------------|
    | k_codes | [D / (32 / k_bits)][G] little-endian uint32 | D * G * k_bits / 8     |
    | k_boost | [B / 8][G / 2] uint32                       | B * G / 4              |
    | k_scale | [D] scale type                              | D * scale_bytes        |
    | k_zero  | [D] scale type                              | D * scale_bytes        |
    | v_codes | [G / 8][D * v_bits / 4] uint32              | D * G * v_bits / 8     |
    | v_scale | [V][G] scale type                           | V * G * scale_bytes    |
    | v_zero  | [V][G] scale type                           | V * G * scale_bytes    |
    | padding | never read or written                       | to a multiple of G     |

    D = head_dim; V = ceil(D / G) value groups per token, the last one shorter when G does not divide D.
    B = boosted_channels: key channels of 4 bits among those of 2, in kivi2_boost only; 0 elsewhere.
    The scale type is the model's dtype (bfloat16, float16 or float32): what is stored is what published KIVI computes.

    Key code of token t, channel d:  word (d // C) * G + t, C = 32 / k_bits, at bit k_bits * (d % C).
        A word is one token's C consecutive channels, and words of consecutive tokens follow each other: a vector of
        words holds many tokens of the same channels, on AVX-512 as in a tensor-core operand.
    Key boost: the 4-bit code of a boosted channel is 4 * a + b, and a is in k_codes like any code. b of token t and of
        the j-th boosted channel, in ascending order: word (j // 8) * (G / 2) + t // 2, at bit
        16 * (j % 8 // 4) + 8 * (t % 2) + 2 * (j % 4).
        Exactly B channels of every tile have the sign bit of their scale set, and these are the boosted ones.
    Value code of token t, channel d: with o = t // 8, h = t % 8 // 4, j = t % 4 and S = 16 / v_bits slots a half-word:
        slot s = 4 * d + j;  word o * (4 * D / S) + s // S, at bit 16 * h + v_bits * (s % S).
        The two half-words of a word hold tokens that are 4 apart and otherwise equal, so one mask yields both halves of
        a packed pair; a word never mixes two runs of 8 tokens.

    x ~ code * |scale| + zero. Keys share scale and zero per channel over the tile's G tokens, values per token over G
    channels. With `rotate_values` what is quantized of a value vector is H times it, H a Hadamard matrix on each run of
    `hadamard_size` channels.

    With k_bits 16 k_codes are the keys themselves, [G][D] in the model's dtype (of 4 bytes in a float32 model), and
    k_boost, k_scale and k_zero take no bytes. So with v_bits 16 for the values.

Full-precision page, `full_page_tokens` (n) tokens of one layer:

    page   = [num_kv_heads][n][2][D] in the model's dtype: key then value of each token.

Both pages take the same bytes of vLLM's pool. n is the largest number of tokens that fits and keeps lcm(N, n), the step
at which prefix hits can land, at most MAX_HIT_STEP (or N, if that is more).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

HEAD_DIMS = (64, 80, 96, 128, 256)
GROUP_SIZES = (32, 64, 128)
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}

# Tokens between prefix hits; n gives way where it would be more. At G = 32, n is what fits, and 96 tokens are usual.
MAX_HIT_STEP = 384

# Kernels count tokens in 32 bits, and cut off what is more.
MAX_TOKENS = (1 << 31) - 1

# kv_cache_dtype -> (k_bits, v_bits)
PRESETS = {
    "kivi2": (2, 2),
    "kivi2_boost": (2, 2),
    "kivi_k4v2": (4, 2),
    "kivi4": (4, 4),
    "kivi8": (8, 8),
}

ACCEPTED_BITS = (2, 4, 8, 16)

# kv_cache_dtype -> one key channel in how many has 4 bits, where that is not said
BOOSTED_FRACTIONS = {"kivi2_boost": 4}
ACCEPTED_FRACTIONS = (4, 8)

# The order of the flat list that the ops take; csrc/params.h unpacks it in the same order (test_format compares them).
LAYOUT_FIELDS = (
    "head_dim",
    "num_kv_heads",
    "k_bits",
    "v_bits",
    "group_size",
    "page_tokens",
    "full_page_tokens",
    "residual_length",
    "sink_tokens",
    "scale_search",
    "rotate_values",
    "boosted_channels",
    "num_value_groups",
    "k_codes_offset",
    "k_boost_offset",
    "k_scale_offset",
    "k_zero_offset",
    "v_codes_offset",
    "v_scale_offset",
    "v_zero_offset",
    "tile_bytes",
)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def _check(name: str, value: object, accepted: tuple) -> None:
    if value not in accepted:
        raise ValueError(f"kivi: {name}={value!r} is not supported; accepted: {', '.join(map(str, accepted))}")


def check_model(preset: str, head_dim: int, *, mla: bool, encoder_decoder: bool, all_sliding: bool) -> None:
    """Refuse a model whose cache cannot be quantized. `all_sliding`: every attention layer has a sliding window.

    Raises:
        ValueError: says what to use instead.
    """
    flag = f"kivi: --kv-cache-dtype {preset}"
    if mla:
        raise ValueError(f"{flag} does not support MLA models; use --kv-cache-dtype auto or fp8")
    if encoder_decoder:
        raise ValueError(f"{flag} does not support encoder-decoder models; use --kv-cache-dtype auto")
    if head_dim not in HEAD_DIMS:
        accepted = ", ".join(map(str, HEAD_DIMS))
        raise ValueError(f"{flag} does not support head size {head_dim}; accepted: {accepted}; use auto or fp8")
    if all_sliding:
        raise ValueError(
            f"{flag} would quantize nothing: every attention layer of this model has a sliding window, and these keep "
            "their cache as it is, because they hold few tokens; use auto or fp8"
        )


def window_pages(
    num_tokens: int,
    page_tokens: int,
    *,
    group_size: int,
    residual_length: int,
    sink_tokens: int,
    num_speculative_tokens: int,
) -> int:
    """Most full-precision pages of `page_tokens` tokens that a request of `num_tokens` tokens holds between steps."""
    window = residual_length + group_size + num_speculative_tokens
    # One more, because a window need not start where a page does.
    pages = math.ceil(window / page_tokens) + 1 + math.ceil(sink_tokens / page_tokens)
    return min(pages, math.ceil(num_tokens / page_tokens))


@dataclass(frozen=True)
class KVFormat:
    """Sizes and offsets of one layer's pages. Bytes unless the name says tokens.

    Args:
        preset: a key of PRESETS, the user's --kv-cache-dtype.
        head_dim, num_kv_heads: of this layer, on this tensor-parallel rank.
        dtype: the model's dtype: "bfloat16", "float16" or "float32".
        group_size: G, elements that share a scale.
        residual_length: R, the most recent tokens that are never read quantized.
        sink_tokens: first tokens of a request that are never read quantized.
        page_tokens: N, tokens of a quantized page; 0 means G.
        padded_page_bytes: what the pool gives a page where another layer's page is larger; 0 means no padding.
        full_precision: the bypass, same pages and code path with nothing quantized: k_bits and v_bits are 16.
        scale_search: values' scales and zeros are those of the narrower range that loses least; changes no offset.
        rotate_values: values are rotated before they are quantized; changes no offset. Both are False where v_bits is
            16.
        boosted_fraction: one key channel in 4 or 8 has 4 bits; 0 means the preset's: none at all but in kivi2_boost.
        k_bits, v_bits: of a code, 2, 4 or 8, or 16 for what is not quantized; 0 means the preset's.

    Raises:
        ValueError: names the option and what is accepted.
    """

    preset: str
    head_dim: int
    num_kv_heads: int
    dtype: str
    group_size: int = 32
    residual_length: int = 128
    sink_tokens: int = 0
    page_tokens: int = 0
    padded_page_bytes: int = 0
    full_precision: bool = False
    scale_search: bool = False
    rotate_values: bool = False
    boosted_fraction: int = 0
    k_bits: int = 0
    v_bits: int = 0

    def __post_init__(self) -> None:
        _check("kv_cache_dtype", self.preset, tuple(PRESETS))
        _check("head_dim", self.head_dim, HEAD_DIMS)
        _check("dtype", self.dtype, tuple(DTYPE_BYTES))
        _check("group_size", self.group_size, GROUP_SIZES)
        for name in ("full_precision", "scale_search", "rotate_values"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"kivi: {name}={getattr(self, name)!r} is not supported; accepted: True, False")
        self._choose_bits()
        if self.boosted_fraction == 0:
            object.__setattr__(self, "boosted_fraction", BOOSTED_FRACTIONS.get(self.preset, 0))
        else:
            _check("boosted_fraction", self.boosted_fraction, ACCEPTED_FRACTIONS)
            if self.preset not in BOOSTED_FRACTIONS:
                raise ValueError(
                    f"kivi: boosted_fraction={self.boosted_fraction} is not supported with {self.preset}; "
                    f"leave it out, or use {', '.join(BOOSTED_FRACTIONS)}"
                )
        if self.page_tokens == 0:
            object.__setattr__(self, "page_tokens", self.group_size)
        if self.page_tokens < 0 or self.page_tokens % self.group_size:
            raise ValueError(
                f"kivi: block size {self.page_tokens} is not a multiple of group_size={self.group_size}; "
                f"pass --block-size with a multiple of {self.group_size}, or leave it out"
            )
        if self.padded_page_bytes == 0:
            object.__setattr__(self, "padded_page_bytes", self.page_bytes)
        if self.padded_page_bytes < self.page_bytes:
            raise ValueError(f"kivi: a page of {self.padded_page_bytes} bytes cannot hold {self.page_bytes} bytes")
        if self.num_kv_heads < 1:
            raise ValueError(f"kivi: num_kv_heads={self.num_kv_heads} must be 1 or more")
        for name in ("residual_length", "sink_tokens"):
            if not 0 <= getattr(self, name) <= MAX_TOKENS:
                raise ValueError(f"kivi: {name}={getattr(self, name)} must be 0 to {MAX_TOKENS}")

    def _choose_bits(self) -> None:
        for name, own in zip(("k_bits", "v_bits"), PRESETS[self.preset], strict=True):
            bits = getattr(self, name)
            if bits == 0:
                object.__setattr__(self, name, 16 if self.full_precision else own)
                continue
            _check(name, bits, ACCEPTED_BITS)
            if self.full_precision and bits != 16:
                raise ValueError(
                    f"kivi: {name}={bits} is not supported with full_precision, which is 16 bits for keys and values; "
                    "leave one of the two out"
                )
        object.__setattr__(self, "full_precision", self.k_bits == self.v_bits == 16)
        if self.preset in BOOSTED_FRACTIONS and self.k_bits != 2 and not self.full_precision:
            raise ValueError(
                f"kivi: k_bits={self.k_bits} is not supported with {self.preset}, which boosts keys of 2 bits; leave "
                "it out, or use kivi2"
            )
        if self.v_bits == 16:
            object.__setattr__(self, "scale_search", False)
            object.__setattr__(self, "rotate_values", False)

    @property
    def element_bytes(self) -> int:
        """Bytes of a full-precision element, and of a scale or zero."""
        return DTYPE_BYTES[self.dtype]

    @property
    def num_value_groups(self) -> int:
        return math.ceil(self.head_dim / self.group_size)

    @property
    def hadamard_size(self) -> int:
        """Channels that `rotate_values` mixes: the largest power of two that divides head_dim."""
        return self.head_dim & -self.head_dim

    @property
    def boosted_channels(self) -> int:
        """Key channels of a tile that have 4 bits, a multiple of 8 so that their low bits fill whole words."""
        if self.full_precision or not self.boosted_fraction:
            return 0
        return _round_up(-(-self.head_dim // self.boosted_fraction), 8)

    def _codes_bytes(self, bits: int) -> int:
        """What the codes of a tile's keys, or values, take."""
        elements = self.group_size * self.head_dim
        return elements * self.element_bytes if bits == 16 else elements * bits // 8

    @property
    def _key_scale_bytes(self) -> int:
        return 0 if self.k_bits == 16 else self.head_dim * self.element_bytes

    @property
    def _value_scale_bytes(self) -> int:
        return 0 if self.v_bits == 16 else self.num_value_groups * self.group_size * self.element_bytes

    @property
    def k_codes_offset(self) -> int:
        return 0

    @property
    def k_boost_offset(self) -> int:
        return self._codes_bytes(self.k_bits)

    @property
    def k_scale_offset(self) -> int:
        return self.k_boost_offset + self.boosted_channels * self.group_size // 4

    @property
    def k_zero_offset(self) -> int:
        return self.k_scale_offset + self._key_scale_bytes

    @property
    def v_codes_offset(self) -> int:
        return self.k_zero_offset + self._key_scale_bytes

    @property
    def v_scale_offset(self) -> int:
        return self.v_codes_offset + self._codes_bytes(self.v_bits)

    @property
    def v_zero_offset(self) -> int:
        return self.v_scale_offset + self._value_scale_bytes

    @property
    def tile_bytes(self) -> int:
        """G tokens of one KV head, a multiple of G so that bytes per token are whole."""
        return _round_up(self.v_zero_offset + self._value_scale_bytes, self.group_size)

    @property
    def token_bytes(self) -> int:
        """Quantized bytes of one token and KV head, scales and zeros included."""
        return self.tile_bytes // self.group_size

    @property
    def page_bytes(self) -> int:
        """One layer's quantized page."""
        return self.num_kv_heads * self.page_tokens * self.token_bytes

    @property
    def full_token_bytes(self) -> int:
        """Key and value of one token and KV head in full precision."""
        return 2 * self.head_dim * self.element_bytes

    @property
    def full_page_tokens(self) -> int:
        """n: tokens of a full-precision page."""
        fits = self.padded_page_bytes // (self.num_kv_heads * self.full_token_bytes)
        limit = max(MAX_HIT_STEP, self.page_tokens)
        return next(n for n in range(fits, 0, -1) if math.lcm(self.page_tokens, n) <= limit)

    @property
    def hit_step(self) -> int:
        """Prefix hits land on multiples of this many tokens."""
        return math.lcm(self.page_tokens, self.full_page_tokens)

    @property
    def full_page_bytes(self) -> int:
        """Bytes used of one layer's full-precision page; the pool gives it padded_page_bytes."""
        return self.num_kv_heads * self.full_page_tokens * self.full_token_bytes

    @property
    def bits_per_element(self) -> float:
        return 8 * self.token_bytes / (2 * self.head_dim)

    def boundary(self, num_tokens: int) -> int:
        """Tokens below it are read from quantized pages when a request has `num_tokens` tokens (sinks apart)."""
        return max(0, (num_tokens - self.residual_length) // self.group_size * self.group_size)

    def window_pages(self, num_tokens: int, num_speculative_tokens: int = 0) -> int:
        """Most full-precision pages that a request of `num_tokens` tokens holds between steps."""
        return window_pages(
            num_tokens,
            self.full_page_tokens,
            group_size=self.group_size,
            residual_length=self.residual_length,
            sink_tokens=self.sink_tokens,
            num_speculative_tokens=num_speculative_tokens,
        )

    def beside(self, page_bytes: int) -> KVFormat:
        """The format where other layers share the pool, with pages of so many bytes.

        vLLM makes all pages equal, so a quantized page is filled with as many tokens as the larger page holds.
        """
        if page_bytes <= self.padded_page_bytes:
            return self
        page_tokens = page_bytes // self.num_kv_heads // self.token_bytes // self.group_size * self.group_size
        return replace(self, page_tokens=page_tokens, padded_page_bytes=page_bytes)

    def beside_full_precision(self) -> KVFormat:
        """The format where layers like these that stay in full precision share the pool."""
        return self.beside(self.num_kv_heads * self.page_tokens * self.full_token_bytes)

    def layout(self) -> list[int]:
        """What the ops take: one integer per name in LAYOUT_FIELDS."""
        return [int(getattr(self, name)) for name in LAYOUT_FIELDS]


class HeadBytes(NamedTuple):
    """Of one KV head: a full-precision element, and what a quantized and a full-precision page take."""

    element: int
    quantized_page: int
    full_page: int


def head_bytes(layout: Sequence[int]) -> HeadBytes:
    """What a flat list from `KVFormat.layout` says of sizes, for those who have nothing but the list."""
    fields = dict(zip(LAYOUT_FIELDS, layout, strict=True))
    if fields["k_bits"] == 16:
        vectors_bytes, vectors = fields["k_boost_offset"], fields["group_size"]  # the keys of a tile
    else:
        vectors_bytes, vectors = fields["k_zero_offset"] - fields["k_scale_offset"], 1
    element = vectors_bytes // (vectors * fields["head_dim"])
    tiles = fields["page_tokens"] // fields["group_size"]
    return HeadBytes(
        element, tiles * fields["tile_bytes"], fields["full_page_tokens"] * 2 * fields["head_dim"] * element
    )

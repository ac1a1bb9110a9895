"""What the kernels must compute, in plain PyTorch: quantize, pack, store, attend.

The oracle of every kernel test, so each function says what happens in the shortest way and nothing is tuned. `store`,
`decode` and `prefill` take the same arguments as `torch.ops.vllm_kivi.*`. Offsets come from format.py alone.

Shapes in this file: T tokens, H KV heads, D head_dim, G group_size, V value groups of a token.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vllm_kivi.format import (
    ACCEPTED_BITS,
    ACCEPTED_FRACTIONS,
    DTYPE_BYTES,
    GROUP_SIZES,
    LAYOUT_FIELDS,
    KVFormat,
)

BITS = tuple(bits for bits in ACCEPTED_BITS if bits < 16)
SEARCHED_RANGES = (2.0**-14, 2.0**15)  # that scale_search narrows: no dtype over- or underflows


class Tile(NamedTuple):
    """An unpacked tile. With 16 bits codes are the elements themselves, scale is 1 and zero is 0.

    With `rotate_values` its values are the rotated ones: `dequantize_tile` turns them back.
    """

    k_codes: Tensor  # [G, H, D], of boosted channels all 4 bits
    k_scale: Tensor  # [1, H, D], without the sign that marks boosted channels
    k_zero: Tensor  # [1, H, D]
    v_codes: Tensor  # [G, H, D]
    v_scale: Tensor  # [G, H, V]
    v_zero: Tensor  # [G, H, V]
    k_boosted: Tensor  # [1, H, D] bool


# ------------------------------------------------------------------------------------------------------- quantization


def _codes(x: Tensor, zero: Tensor, step: Tensor, levels: Tensor) -> Tensor:
    """Rounded to x's dtype after each operation; of groups whose step is 0, all 0."""
    codes = (x - zero) / torch.where(step == 0, 1, step)
    return torch.where(step == 0, 0, codes).clamp(0, levels.item()).round().to(torch.uint8)


def _sanitize(x: Tensor) -> Tensor:
    limits = torch.finfo(x.dtype)
    # Adding 0.0 turns -0.0 into 0.0: which of the two a minimum returns depends on the order of the reduction.
    return torch.nan_to_num(x, nan=0.0, posinf=limits.max, neginf=limits.min) + 0.0


def _quantize(x: Tensor, bits: int, dim: int, scale_search: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and zero of groups that lie along `dim`; scale and zero keep it with length 1."""
    x = _sanitize(x)
    # A tensor on x's device: CUDA divides by a Python number (or a CPU scalar) through its reciprocal.
    levels = x.new_full((1,), 2**bits - 1)
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    # Multiplying by 1 is exact, so only groups whose range overflows are computed on halved numbers.
    half = torch.where(torch.isinf(high - low), 0.5, 1.0).to(x.dtype)
    step = (high * half - low * half) / levels
    plain = _codes(x * half, low * half, step, levels), step / half, low
    return _search(x, *plain, levels, dim) if scale_search and bits < 8 else plain


class _Span(NamedTuple):
    """Of groups along a dimension, which is kept with length 1; docs/FORMAT.md has every operation."""

    low: Tensor
    span: Tensor
    measurable: Tensor  # where losses are defined
    unit: Tensor  # a power of two: 2**-12 to 2**-11 of the span

    def loss(self, x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, dim: int) -> Tensor:
        """The integer sum of squared errors in units."""
        short = (scale.float().view(torch.int32) & -256).view(torch.float32)
        error = (x.float() - zero.float()) - codes.float() * short
        return (error * (1 / self.unit)).round().long().square().sum(dim, keepdim=True)


def _span(x: Tensor, dim: int) -> _Span:
    low = x.amin(dim, keepdim=True).float()
    span = x.amax(dim, keepdim=True).float() - low
    measurable = (span >= SEARCHED_RANGES[0]) & (span <= SEARCHED_RANGES[1])
    exponents = torch.where(measurable, span, 1).view(torch.int32) >> 23
    return _Span(low, span, measurable, (exponents - 11 << 23).view(torch.float32))


def _search(
    x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, levels: Tensor, dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Of published quantization and that of narrower ranges, what loses least; docs/FORMAT.md has every operation."""
    group = _span(x, dim)
    least = group.loss(x, codes, scale, zero, dim)
    least -= least // 64
    cut, part = torch.zeros_like(group.span), group.span / group.span.new_full((1,), 40)
    for _ in range(7):
        cut += part
        narrow_zero = (group.low + cut).to(x.dtype) + 0.0
        narrow_scale = ((group.span - 2 * cut) / levels.float()).to(x.dtype)
        narrow_codes = _codes(x, narrow_zero, narrow_scale, levels)
        loss = group.loss(x, narrow_codes, narrow_scale, narrow_zero, dim)
        better = group.measurable & (loss < least)
        least, codes = torch.where(better, loss, least), torch.where(better, narrow_codes, codes)
        scale, zero = torch.where(better, narrow_scale, scale), torch.where(better, narrow_zero, zero)
    return codes, scale, zero


def _most_lossy(k: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, count: int) -> Tensor:
    """Which `count` channels [1, H, D] of one group of keys [G, H, D] lose most by this quantization."""
    k = _sanitize(k)
    group = _span(k, 0)
    error = group.loss(k, codes, scale, zero, 0).float() * group.unit.square()
    error = torch.where(group.span < SEARCHED_RANGES[0], 0.0, error)
    error = torch.where(group.span > SEARCHED_RANGES[1], torch.inf, error)
    mine, other = error[..., :, None], error[..., None, :]
    lower = torch.ones(k.shape[2], k.shape[2], dtype=torch.bool, device=k.device).tril(-1)
    return ((other > mine) | (other == mine) & lower).sum(-1) < count


def _check_quantize(x: Tensor, bits: int, group_size: int) -> None:
    if x.dim() != 3:
        raise ValueError(
            f"kivi: shape {tuple(x.shape)} is not supported; accepted: [num_tokens, num_kv_heads, head_dim]"
        )
    for name, value, accepted in (
        ("bits", bits, BITS),
        ("group_size", group_size, GROUP_SIZES),
        ("dtype", str(x.dtype).removeprefix("torch."), tuple(DTYPE_BYTES)),
    ):
        if value not in accepted:
            raise ValueError(f"kivi: {name}={value!r} is not supported; accepted: {', '.join(map(str, accepted))}")


def quantize_keys(k: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes per channel over groups of `group_size` tokens; a shorter last group is quantized on its own.

    Args:
        k: [T, H, D] in float32, bfloat16 or float16.

    Returns:
        codes uint8 [T, H, D]; scale and zero [ceil(T / G), H, D] in k's dtype.
    """
    _check_quantize(k, bits, group_size)
    codes = torch.empty(k.shape, dtype=torch.uint8, device=k.device)
    scale = k.new_empty(-(-k.shape[0] // group_size), *k.shape[1:])
    zero = torch.empty_like(scale)
    for group, first in enumerate(range(0, k.shape[0], group_size)):
        tokens = slice(first, first + group_size)
        codes[tokens], scale[group : group + 1], zero[group : group + 1] = _quantize(k[tokens], bits, 0)
    return codes, scale, zero


def quantize_boosted_keys(k: Tensor, boosted_channels: int, group_size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`quantize_keys` at 2 bits, but at 4 bits for the channels of each group and head that lose most at 2.

    Returns:
        codes, scale and zero as `quantize_keys`; boosted bool [ceil(T / G), H, D], `boosted_channels` of D are True.
    """
    codes, scale, zero = quantize_keys(k, 2, group_size)
    finer = quantize_keys(k, 4, group_size)
    boosted = torch.zeros(scale.shape, dtype=torch.bool, device=k.device)
    for group, first in enumerate(range(0, k.shape[0], group_size)):
        one, tokens = slice(group, group + 1), slice(first, first + group_size)
        boosted[one] = _most_lossy(k[tokens], codes[tokens], scale[one], zero[one], boosted_channels)
        codes[tokens] = torch.where(boosted[one], finer[0][tokens], codes[tokens])
    return codes, torch.where(boosted, finer[1], scale), torch.where(boosted, finer[2], zero), boosted


def rotate_values(v: Tensor, hadamard_size: int) -> Tensor:
    """What `rotate_values` quantizes instead of v [T, H, D]; in v's dtype."""
    x = _sanitize(v).float()
    half = 1
    while half < hadamard_size:
        a, b = x.unflatten(-1, (-1, 2, half)).unbind(-2)
        x = torch.stack((a + b, a - b), -2).flatten(-3)
        half *= 2
    return (x * x.new_full((1,), hadamard_size**-0.5)).to(v.dtype)


def rotate_back(v: Tensor, hadamard_size: int) -> Tensor:
    """H times each run of `hadamard_size` channels of the last dimension, in v's dtype; H is its own inverse."""
    matrix = v.new_ones(1, 1)
    while len(matrix) < hadamard_size:
        matrix = torch.cat((matrix.repeat(1, 2), torch.cat((matrix, -matrix), 1)))
    return (v.unflatten(-1, (-1, hadamard_size)) @ matrix * hadamard_size**-0.5).flatten(-2)


def quantize_values(v: Tensor, bits: int, group_size: int, scale_search: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Quantizes per token over groups of `group_size` channels, the last one shorter when G does not divide D.

    Args:
        v: [T, H, D] in float32, bfloat16 or float16.
        scale_search: see docs/FORMAT.md; without it, published KIVI.

    Returns:
        codes uint8 [T, H, D]; scale and zero [T, H, ceil(D / G)] in v's dtype.
    """
    _check_quantize(v, bits, group_size)
    codes = torch.empty(v.shape, dtype=torch.uint8, device=v.device)
    scale = v.new_empty(*v.shape[:2], -(-v.shape[2] // group_size))
    zero = torch.empty_like(scale)
    for group, first in enumerate(range(0, v.shape[2], group_size)):
        part = slice(first, first + group_size)
        one = slice(group, group + 1)
        codes[..., part], scale[..., one], zero[..., one] = _quantize(v[..., part], bits, 2, scale_search)
    return codes, scale, zero


def _dequantize(codes: Tensor, scale: Tensor, zero: Tensor, group_size: int, dim: int, dtype: torch.dtype) -> Tensor:
    scale, zero = (
        x.to(dtype).repeat_interleave(group_size, dim).narrow(dim, 0, codes.shape[dim]) for x in (scale, zero)
    )
    return codes.to(dtype) * scale + zero


def dequantize_keys(
    codes: Tensor, scale: Tensor, zero: Tensor, group_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """code * scale + zero, computed in `dtype`: the shapes of `quantize_keys` -> [T, H, D]."""
    return _dequantize(codes, scale, zero, group_size, 0, dtype)


def dequantize_values(
    codes: Tensor, scale: Tensor, zero: Tensor, group_size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """code * scale + zero, computed in `dtype`: the shapes of `quantize_values` -> [T, H, D]."""
    return _dequantize(codes, scale, zero, group_size, 2, dtype)


# -------------------------------------------------------------------------------------------------------------- tiles


def _bytes(x: Tensor) -> Tensor:
    """[..., C] of any dtype -> uint8 [..., C * element size]."""
    return x.contiguous().view(torch.uint8)


def _put(tile: Tensor, offset: int, section: Tensor) -> None:
    data = _bytes(section).flatten(1)  # [H, bytes]
    tile[:, offset : offset + data.shape[1]] = data


def _get(tile: Tensor, offset: int, dtype: torch.dtype, *shape: int) -> Tensor:
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    return tile[:, offset : offset + num_bytes].clone().view(dtype).view(-1, *shape)


def _words(fields: Tensor, shifts: Tensor) -> Tensor:
    """Fields [..., fields of a word] -> uint8 [..., 4], the bytes of a little-endian word."""
    words = (fields.long() << shifts).sum(-1, keepdim=True)
    return (words >> torch.arange(0, 32, 8, device=fields.device) & 0xFF).to(torch.uint8)


def _fields(words: Tensor, shifts: Tensor, bits: int) -> Tensor:
    """uint8 [..., 4] -> the fields of each word, uint8 [..., fields of a word]."""
    number = (words.long() << torch.arange(0, 32, 8, device=words.device)).sum(-1, keepdim=True)
    return (number >> shifts & (1 << bits) - 1).to(torch.uint8)


def _shifts(bits: int, device: torch.device) -> Tensor:
    """Where the fields of a word start."""
    return torch.arange(0, 32, bits, device=device)


def _write_tile(fmt: KVFormat, tile: Tensor, k: Tensor, v: Tensor) -> None:
    """Writes every section of the tile uint8 [H, tile_bytes] and leaves its padding alone."""
    _write_keys(fmt, tile, k)
    _write_values(fmt, tile, v)


def _write_keys(fmt: KVFormat, tile: Tensor, k: Tensor) -> None:
    group_size, num_heads, _ = k.shape
    if fmt.k_bits == 16:
        _put(tile, fmt.k_codes_offset, k.transpose(0, 1))
        return
    if fmt.boosted_channels:
        codes, scale, zero, boosted = quantize_boosted_keys(k, fmt.boosted_channels, fmt.group_size)
        low = (codes & 3).permute(1, 2, 0)[boosted[0]]  # of boosted channels, in ascending order: [H * B, G]
        low = low.view(num_heads, -1, 2, 4, group_size // 2, 2).permute(0, 1, 4, 2, 5, 3)
        _put(tile, fmt.k_boost_offset, _words(low.flatten(3), _shifts(2, k.device)))
        codes, scale = torch.where(boosted, codes >> 2, codes), torch.where(boosted, -scale, scale)
    else:
        codes, scale, zero = quantize_keys(k, fmt.k_bits, fmt.group_size)
    shifts = _shifts(fmt.k_bits, k.device)
    fields = codes.view(group_size, num_heads, -1, len(shifts)).permute(1, 2, 0, 3)  # [H, D / C, G, C]
    _put(tile, fmt.k_codes_offset, _words(fields, shifts))
    _put(tile, fmt.k_scale_offset, scale[0])
    _put(tile, fmt.k_zero_offset, zero[0])


def _write_values(fmt: KVFormat, tile: Tensor, v: Tensor) -> None:
    group_size, num_heads, head_dim = v.shape
    if fmt.v_bits == 16:
        _put(tile, fmt.v_codes_offset, v.transpose(0, 1))
        return
    if fmt.rotate_values:
        v = rotate_values(v, fmt.hadamard_size)
    codes, scale, zero = quantize_values(v, fmt.v_bits, fmt.group_size, fmt.scale_search)
    shifts = _shifts(fmt.v_bits, v.device)
    slots = codes.view(-1, 2, 4, num_heads, head_dim).permute(3, 0, 1, 4, 2)  # [H, o, h, d, j], slot s = 4 * d + j
    fields = slots.reshape(num_heads, group_size // 8, 2, -1, len(shifts) // 2).transpose(
        2, 3
    )  # [H, o, s // S, h, s % S]
    _put(tile, fmt.v_codes_offset, _words(fields.flatten(3), shifts))
    _put(tile, fmt.v_scale_offset, scale.permute(1, 2, 0))  # [H, V, G]
    _put(tile, fmt.v_zero_offset, zero.permute(1, 2, 0))


def pack_tile(fmt: KVFormat, k: Tensor, v: Tensor) -> Tensor:
    """Quantizes and packs the G tokens of one tile: k, v [G, H, D] -> uint8 [H, tile_bytes], padding 0."""
    shape = (fmt.group_size, k.shape[1], fmt.head_dim)
    if k.shape != shape or v.shape != shape or not str(k.dtype) == str(v.dtype) == f"torch.{fmt.dtype}":
        raise ValueError(
            f"kivi: a tile needs keys and values {list(shape)} in {fmt.dtype}; "
            f"got {list(k.shape)} {k.dtype} and {list(v.shape)} {v.dtype}"
        )
    tile = torch.zeros(k.shape[1], fmt.tile_bytes, dtype=torch.uint8, device=k.device)
    _write_tile(fmt, tile, k, v)
    return tile


def unpack_tile(fmt: KVFormat, tile: Tensor) -> Tile:
    """The reverse of `pack_tile` up to quantization: uint8 [H, tile_bytes] -> codes, scales and zeros.

    H may be any number of tiles: each row is unpacked on its own.
    """
    if tile.dim() != 2 or tile.shape[1] != fmt.tile_bytes or tile.dtype != torch.uint8:
        raise ValueError(f"kivi: a tile is uint8 [num_kv_heads, {fmt.tile_bytes}]; got {tile.dtype} {list(tile.shape)}")
    k_codes, k_scale, k_zero = _read_keys(fmt, tile)
    return Tile(k_codes, k_scale.abs(), k_zero, *_read_values(fmt, tile), k_scale.signbit())


def _read_keys(fmt: KVFormat, tile: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales with their signs, and zeros."""
    num_heads, group_size, head_dim, dtype = len(tile), fmt.group_size, fmt.head_dim, getattr(torch, fmt.dtype)
    if fmt.k_bits == 16:
        k = _get(tile, fmt.k_codes_offset, dtype, group_size, head_dim).transpose(0, 1)
        return k, k.new_ones(1, num_heads, head_dim), k.new_zeros(1, num_heads, head_dim)
    shifts = _shifts(fmt.k_bits, tile.device)
    words = _get(tile, fmt.k_codes_offset, torch.uint8, head_dim // len(shifts), group_size, 4)
    codes = _fields(words, shifts, fmt.k_bits).permute(2, 0, 1, 3).reshape(group_size, num_heads, head_dim)
    scale, zero = (
        _get(tile, offset, dtype, 1, head_dim).transpose(0, 1) for offset in (fmt.k_scale_offset, fmt.k_zero_offset)
    )
    if fmt.boosted_channels:
        boosted = scale.signbit()
        words = _get(tile, fmt.k_boost_offset, torch.uint8, fmt.boosted_channels // 8, group_size // 2, 4)
        fields = _fields(words, _shifts(2, tile.device), 2).unflatten(-1, (2, 2, 4))  # [H, B / 8, G / 2, j // 4, t, j]
        low = fields.permute(2, 4, 0, 1, 3, 5).reshape(group_size, num_heads, fmt.boosted_channels)
        # The clamp is for tiles that were never written, as a page may have.
        place = (boosted.cumsum(-1) - 1).clamp(0, fmt.boosted_channels - 1).expand(codes.shape)
        codes = torch.where(boosted, 4 * codes + low.gather(-1, place), codes)
    return codes, scale, zero


def _read_values(fmt: KVFormat, tile: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and zeros."""
    num_heads, group_size, head_dim, dtype = len(tile), fmt.group_size, fmt.head_dim, getattr(torch, fmt.dtype)
    if fmt.v_bits == 16:
        v = _get(tile, fmt.v_codes_offset, dtype, group_size, head_dim).transpose(0, 1)
        shape = group_size, num_heads, fmt.num_value_groups
        return v, v.new_ones(shape), v.new_zeros(shape)
    shifts = _shifts(fmt.v_bits, tile.device)
    words = _get(tile, fmt.v_codes_offset, torch.uint8, group_size // 8, 8 * head_dim // len(shifts), 4)
    fields = _fields(words, shifts, fmt.v_bits).unflatten(-1, (2, -1)).transpose(2, 3)  # [H, o, h, s // S, s % S]
    slots = fields.reshape(num_heads, group_size // 8, 2, head_dim, 4)  # [H, o, h, d, j]
    codes = slots.permute(1, 2, 4, 0, 3).reshape(group_size, num_heads, head_dim)
    scale, zero = (
        _get(tile, offset, dtype, fmt.num_value_groups, group_size).permute(2, 0, 1)
        for offset in (fmt.v_scale_offset, fmt.v_zero_offset)
    )
    return codes, scale, zero


def dequantize_tile(fmt: KVFormat, tile: Tile, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Keys and values [G, H, D] that an unpacked tile stands for, values rotated back; computed in `dtype`."""
    keys = dequantize_keys(tile.k_codes, tile.k_scale, tile.k_zero, fmt.group_size, dtype)
    values = dequantize_values(tile.v_codes, tile.v_scale, tile.v_zero, fmt.group_size, dtype)
    return keys, rotate_back(values, fmt.hadamard_size) if fmt.rotate_values else values


# -------------------------------------------------------------------------------------------------------------- pages


def _format(layout: Sequence[int], dtype: torch.dtype) -> KVFormat:
    """The KVFormat behind a layout list; refuses a list that no KVFormat of this dtype hands out."""
    fields: dict[str, Any] = dict(zip(LAYOUT_FIELDS, layout, strict=True))
    boosted = fields["boosted_channels"]
    same = ("head_dim", "num_kv_heads", "group_size", "residual_length", "sink_tokens", "page_tokens")
    formats = [
        KVFormat(
            "kivi2_boost" if boosted else "kivi2",  # the layout does not tell presets of equal bits apart
            dtype=str(dtype).removeprefix("torch."),
            boosted_fraction=fraction,
            scale_search=bool(fields["scale_search"]),
            rotate_values=bool(fields["rotate_values"]),
            **{name: fields[name] for name in (*same, "k_bits", "v_bits")},
        )
        for fraction in (ACCEPTED_FRACTIONS if boosted else (0,))
    ]
    fmt = next((fmt for fmt in formats if fmt.boosted_channels == boosted), formats[0])
    if fields["full_page_tokens"] > fmt.full_page_tokens:  # the pool pads this layer's pages
        used = fields["full_page_tokens"] * fmt.num_kv_heads * fmt.full_token_bytes
        fmt = dataclasses.replace(fmt, padded_page_bytes=max(used, fmt.page_bytes))
    if fmt.layout() != list(layout):
        raise ValueError(f"kivi: the layout does not belong to {fmt}")
    return fmt


def _page_bytes(pages: Tensor, *shape: int) -> Tensor:
    """A pool's memory as uint8 [num_blocks, H, *shape], whatever the dtype, strides and padding of `pages`."""
    sizes = (pages.shape[0], pages.shape[1], *shape)
    inner = list(itertools.accumulate(reversed(shape), int.__mul__, initial=1))[-2::-1]
    strides = (pages.stride(0) * pages.element_size(), pages.stride(1) * pages.element_size(), *inner)
    memory = torch.empty(0, dtype=torch.uint8, device=pages.device)
    return memory.set_(pages.untyped_storage(), pages.storage_offset() * pages.element_size(), sizes, strides)


def _tiles(fmt: KVFormat, quantized_pages: Tensor) -> Tensor:
    """uint8 [num_blocks, H, N / G, tile_bytes]"""
    return _page_bytes(quantized_pages, fmt.page_tokens // fmt.group_size, fmt.tile_bytes)


def _full_tokens(fmt: KVFormat, full_pages: Tensor) -> Tensor:
    """uint8 [num_blocks, H, n, 2, D * element_bytes]"""
    return _page_bytes(full_pages, fmt.full_page_tokens, 2, fmt.full_token_bytes // 2)


def _requests(query_start_loc: Tensor, seq_lens: Tensor) -> Iterator[tuple[int, slice, int]]:
    """(request, its rows in the batch, tokens before them) of every request that has rows."""
    starts = query_start_loc.tolist()
    for request, (first, end) in enumerate(itertools.pairwise(starts)):
        if end > first:
            yield request, slice(first, end), int(seq_lens[request]) - (end - first)


def _read_full(fmt: KVFormat, full_pages: Tensor, blocks: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [len(positions), H, D] of a request from its full-precision pages, in the model's dtype."""
    block = blocks[positions // fmt.full_page_tokens].long()
    if (block == 0).any():
        raise ValueError(f"kivi: position {int(positions[block == 0][0])} has no full-precision page (null block)")
    tokens = _full_tokens(fmt, full_pages)[block, :, positions % fmt.full_page_tokens]  # [P, H, 2, D * element_bytes]
    keys, values = tokens.view(getattr(torch, fmt.dtype)).unbind(2)
    return keys, values


def _read_quantized(fmt: KVFormat, quantized_pages: Tensor, blocks: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """float64 keys and values [len(positions), H, D] of a request from its quantized pages; positions ascend."""
    first_page = int(positions[0]) // fmt.page_tokens
    block = blocks[first_page : int(positions[-1]) // fmt.page_tokens + 1].long()
    if (block == 0).any():
        raise ValueError(f"kivi: positions from {int(positions[0])} on have no quantized page (null block)")
    tiles = _tiles(fmt, quantized_pages)[block]  # [pages, H, N / G, tile_bytes]
    tile = unpack_tile(fmt, tiles.transpose(1, 2).flatten(0, 2))
    keys, values = dequantize_tile(fmt, tile, torch.float64)
    shape = (fmt.group_size, -1, tiles.shape[1], fmt.head_dim)  # rows of a tile are [groups, H]
    keys, values = (x.reshape(shape).transpose(0, 1).flatten(0, 1) for x in (keys, values))
    positions = positions - first_page * fmt.page_tokens
    return keys[positions], values[positions]


def gather_dequantized(
    fmt: KVFormat,
    quantized_pages: Tensor,
    full_pages: Tensor,
    quantized_blocks: Tensor,
    full_blocks: Tensor,
    num_tokens: int,
    boundary: int,
    key: Tensor | None = None,
    value: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What a row reads of one request: float64 keys and values [num_tokens, H, D].

    Args:
        quantized_blocks, full_blocks: the request's rows of the block tables.
        boundary: tokens below it, sinks apart, come from quantized pages.
        key, value: [q, H, D], the chunk that ends at num_tokens; where given, its tokens that are not read quantized
            come from here and not from full-precision pages.
    """
    chunk = num_tokens - (0 if key is None else len(key))
    shape = (num_tokens, full_pages.shape[1], fmt.head_dim)
    keys, values = (torch.empty(shape, dtype=torch.float64, device=full_pages.device) for _ in range(2))
    if key is not None and value is not None:
        keys[chunk:], values[chunk:] = key.double(), value.double()
    positions = torch.arange(num_tokens, device=full_pages.device)
    quantized = (positions >= fmt.sink_tokens) & (positions < boundary)
    full = ~quantized & (positions < chunk)
    if full.any():
        full_keys, full_values = _read_full(fmt, full_pages, full_blocks, positions[full])
        keys[full], values[full] = full_keys.double(), full_values.double()
    if quantized.any():
        keys[quantized], values[quantized] = _read_quantized(
            fmt, quantized_pages, quantized_blocks, positions[quantized]
        )
    return keys, values


# ---------------------------------------------------------------------------------------------------------------- ops


def store(
    key: Tensor,
    value: Tensor,
    quantized_pages: Tensor,
    full_pages: Tensor,
    quantized_block_table: Tensor,
    full_block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    layout: Sequence[int],
) -> None:
    """Writes new tokens to full-precision pages and quantizes the groups that they complete.

    Nothing is written to block 0 and no byte outside the written sections is touched.
    """
    fmt = _format(layout, key.dtype)
    n, group_size = fmt.full_page_tokens, fmt.group_size
    for request, rows, start in _requests(query_start_loc, seq_lens):
        k, v = key[rows], value[rows]
        positions = start + torch.arange(len(k), device=key.device)
        block = full_block_table[request, positions // n].long()
        kept = block != 0
        tokens = _bytes(torch.stack((k, v), dim=2))  # [q, H, 2, D * element_bytes]
        _full_tokens(fmt, full_pages)[block[kept], :, positions[kept] % n] = tokens[kept]

        for group in range(start // group_size, (start + len(k)) // group_size):
            first = group * group_size
            page = int(quantized_block_table[request, first // fmt.page_tokens])
            if page == 0:
                continue
            before = torch.arange(first, max(first, start), device=key.device)
            old_k, old_v = _read_full(fmt, full_pages, full_block_table[request], before)
            new = slice(max(first, start) - start, first + group_size - start)
            tile = _tiles(fmt, quantized_pages)[page, :, first % fmt.page_tokens // group_size]
            _write_tile(fmt, tile, torch.cat((old_k, k[new])), torch.cat((old_v, v[new])))


def _attend(query: Tensor, keys: Tensor, values: Tensor, scale: float, logits_soft_cap: float) -> Tensor:
    """One row: query [num_heads, D], float64 keys and values [H, T, D] -> float64 [num_heads, D]."""
    grouped = query.double().reshape(len(keys), -1, query.shape[-1])  # [H, num_heads / H, D]
    scores = scale * grouped @ keys.transpose(1, 2)
    if logits_soft_cap > 0:
        scores = logits_soft_cap * torch.tanh(scores / logits_soft_cap)
    return (scores.softmax(-1) @ values).flatten(0, 1)


def _attend_batch(
    output: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    quantized_pages: Tensor,
    full_pages: Tensor,
    quantized_block_table: Tensor,
    full_block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    num_prompt_tokens: Tensor | None,
    scale: float,
    logits_soft_cap: float,
    layout: Sequence[int],
) -> None:
    """Rows of a prompt share a boundary (`prefill` only); every other row has the boundary of its own length."""
    fmt = _format(layout, query.dtype)
    for request, rows, start in _requests(query_start_loc, seq_lens):
        end = int(seq_lens[request])
        prompt_end = 0 if num_prompt_tokens is None else int(num_prompt_tokens[request])
        chunk_boundary = min(fmt.boundary(start + 1), start)

        def boundary_of(p: int, prompt_end: int = prompt_end, chunk_boundary: int = chunk_boundary) -> int:
            return chunk_boundary if p < prompt_end else fmt.boundary(p + 1)

        for boundary, run in itertools.groupby(range(start, end), boundary_of):
            positions = list(run)
            num_tokens = positions[-1] + 1
            chunk = slice(rows.start, rows.start + num_tokens - start)
            keys, values = gather_dequantized(
                fmt,
                quantized_pages,
                full_pages,
                quantized_block_table[request],
                full_block_table[request],
                num_tokens,
                boundary,
                None if key is None else key[chunk],
                None if value is None else value[chunk],
            )
            keys, values = keys.transpose(0, 1).contiguous(), values.transpose(0, 1).contiguous()
            for p in positions:
                row = rows.start + p - start
                # Cut off, not masked: what is behind a row must not reach it, not even NaN times 0.
                output[row] = _attend(query[row], keys[:, : p + 1], values[:, : p + 1], scale, logits_soft_cap)


def decode(
    output: Tensor,
    query: Tensor,
    quantized_pages: Tensor,
    full_pages: Tensor,
    quantized_block_table: Tensor,
    full_block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    scale: float,
    logits_soft_cap: float,
    layout: Sequence[int],
) -> None:
    """Attends rows whose tokens are all stored; the boundary of each is that of its own length."""
    tables = quantized_block_table, full_block_table, query_start_loc, seq_lens
    rest = scale, logits_soft_cap, layout
    _attend_batch(output, query, None, None, quantized_pages, full_pages, *tables, None, *rest)


def prefill(
    output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    quantized_pages: Tensor,
    full_pages: Tensor,
    quantized_block_table: Tensor,
    full_block_table: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    num_prompt_tokens: Tensor,
    scale: float,
    logits_soft_cap: float,
    layout: Sequence[int],
) -> None:
    """Attends a chunk: prompt rows read the chunk's own tokens from key and value, later rows attend as in decode."""
    tables = quantized_block_table, full_block_table, query_start_loc, seq_lens, num_prompt_tokens
    rest = scale, logits_soft_cap, layout
    _attend_batch(output, query, key, value, quantized_pages, full_pages, *tables, *rest)


def decode_float64(query: Tensor, *args, **kwargs) -> Tensor:
    """`decode` without the final rounding: its arguments but output -> float64 like query, rows of padding 0."""
    output = torch.zeros_like(query, dtype=torch.float64)
    decode(output, query, *args, **kwargs)
    return output


def prefill_float64(query: Tensor, *args, **kwargs) -> Tensor:
    """`prefill` without the final rounding: its arguments but output -> float64 like query, rows of padding 0."""
    output = torch.zeros_like(query, dtype=torch.float64)
    prefill(output, query, *args, **kwargs)
    return output

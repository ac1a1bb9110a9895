"""From numbers to codes and back, as docs/FORMAT.md and reference.py have it: to the bit where something is stored."""

from __future__ import annotations

import triton
import triton.language as tl

from vllm_kivi.triton_ops.layout import HEAD_DIM

UNIT_IS_ONE = tl.constexpr(12582912.0)  # 1.5 * 2^23
LEAST_SPAN, LARGEST_SPAN = tl.constexpr(2.0**-14), tl.constexpr(2.0**15)  # of groups whose losses mean something


@triton.jit
def _to_float(codes):
    """Of small integers: their bits are the low ones of 2^23, which costs less than a conversion."""
    return (codes | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def rounded(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)


@triton.jit
def dequantized(codes, scale, zero, dtype: tl.constexpr):
    x = tl.fma(_to_float(codes), scale, zero)
    if dtype == tl.float16:  # the largest code may lie a rounding beyond the largest number
        x = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
    return x.to(dtype)


@triton.jit
def finite(x, dtype: tl.constexpr):
    """float32: NaN is 0, infinities are the largest numbers, and there is no -0."""
    x = x.to(tl.float32)
    limit: tl.constexpr = (
        65504.0 if dtype == tl.float16 else (3.3895313892515355e38 if dtype == tl.bfloat16 else 3.4028234663852886e38)
    )
    x = tl.where((x == 0.0) | (x != x), 0.0, x)
    return tl.minimum(tl.maximum(x, -limit), limit)


@triton.jit
def rotated(x, layout: tl.constexpr):
    """float32 [rows, WIDTH] times the Hadamard matrix of `rotate_values`, stage by stage as docs/FORMAT.md orders them.

    A stage takes the pairs that differ in the lowest bit of the channel and makes that bit the highest, so that
    neighbours are always next and after all stages every channel is in its place.
    """
    rows: tl.constexpr = x.shape[0]
    width: tl.constexpr = x.shape[1]
    size: tl.constexpr = layout[HEAD_DIM] & -layout[HEAD_DIM]
    pairs: tl.constexpr = size // 2
    x = tl.reshape(x, [rows * width // size, pairs, 2])
    for stage in tl.static_range(8):
        if 2**stage < size:
            a, b = tl.split(x)
            x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), [rows * width // size, pairs, 2])
    return tl.reshape(x, [rows, width]) * size**-0.5


@triton.jit
def _biased_codes(x, zero, step, levels, dtype: tl.constexpr):
    """Codes plus a number beside which the unit is 1: sums round half to even and have the integer in the low bits."""
    distance = rounded(x - zero, dtype)  # far below 1 where the step is 0: code 0
    quotient = rounded(tl.div_rn(distance, tl.where(step == 0.0, 1.0, step)), dtype)
    return tl.minimum(tl.maximum(quotient, 0.0), levels) + UNIT_IS_ONE


@triton.jit
def _inverse_units(span):
    """Powers of two: errors are counted in units of which a range has 2,048 to 4,096."""
    return (0x84800000 - (span.to(tl.uint32, bitcast=True) & 0x7F800000)).to(tl.float32, bitcast=True)


@triton.jit
def _squared_error(x, counted, zero, step, inverse_units, levels, dtype: tl.constexpr, axis: tl.constexpr):
    """Of groups along `axis`: integers, whose sum does not depend on their order."""
    short = (step.to(tl.uint32, bitcast=True) & 0xFFFFFF00).to(tl.float32, bitcast=True)
    error = (x - zero) - (_biased_codes(x, zero, step, levels, dtype) - UNIT_IS_ONE) * short
    error = (error * inverse_units + UNIT_IS_ONE) - UNIT_IS_ONE
    square = (error * error + UNIT_IS_ONE).to(tl.int32, bitcast=True) & 0x003FFFFF
    return tl.sum(tl.where(counted, square, 0), axis=axis, keep_dims=True)


@triton.jit
def _chosen(x, counted, levels, dtype: tl.constexpr, axis: tl.constexpr, search: tl.constexpr):
    """Of groups along `axis`: minima, ranges, and what elements are multiplied by, less than 1 where a range overflows;
    zeros and steps of what is multiplied."""
    low = tl.min(tl.where(counted, x, float("inf")), axis=axis, keep_dims=True)
    high = tl.max(tl.where(counted, x, float("-inf")), axis=axis, keep_dims=True)
    half = tl.where(rounded(high - low, dtype) == float("inf"), 0.5, 1.0)
    zero = rounded(low * half, dtype)
    step = rounded(tl.div_rn(rounded(rounded(high * half, dtype) - zero, dtype), levels), dtype)
    span = high - low
    if search:
        searched = (span >= LEAST_SPAN) & (span <= LARGEST_SPAN)
        units = _inverse_units(span)
        least = _squared_error(x, counted, zero, step, units, levels, dtype, axis)
        least -= least // 64
        part, cut = tl.div_rn(span, 40.0), span * 0.0
        for _ in range(7):
            cut += part
            narrow_zero = rounded(low + cut, dtype)
            narrow_zero = tl.where(narrow_zero == 0.0, 0.0, narrow_zero)
            narrow_step = rounded(tl.div_rn(span - 2.0 * cut, levels), dtype)
            error = _squared_error(x, counted, narrow_zero, narrow_step, units, levels, dtype, axis)
            better = searched & (error < least)
            least = tl.where(better, error, least)
            zero, step = tl.where(better, narrow_zero, zero), tl.where(better, narrow_step, step)
    return low, span, half, zero, step


@triton.jit
def codes_of(x, counted, levels, dtype: tl.constexpr, axis: tl.constexpr, search: tl.constexpr):
    """Codes, scales and zeros of groups along `axis`, every operation rounded to the model's dtype; see reference.py.

    Elements that are not `counted` have codes, and nothing else. Groups may differ in `levels`.
    """
    low, _, half, zero, step = _chosen(x, counted, levels, dtype, axis, search)
    codes = _biased_codes(rounded(x * half, dtype), zero, step, levels, dtype).to(tl.uint32, bitcast=True)
    return codes & 0xFF, tl.where(half < 1.0, step * 2.0, step), tl.where(half < 1.0, low, zero)


@triton.jit
def group_errors(x, levels, dtype: tl.constexpr, axis: tl.constexpr):
    """What groups along `axis` lose if they are quantized so: numbers that compare like their squared errors."""
    _, span, _, zero, step = _chosen(x, True, levels, dtype, axis, False)
    inverse_units = _inverse_units(span)
    loss = _squared_error(x, True, zero, step, inverse_units, levels, dtype, axis).to(tl.float32)
    unit = (0x7F000000 - inverse_units.to(tl.uint32, bitcast=True)).to(tl.float32, bitcast=True)
    return tl.where(span > LARGEST_SPAN, float("inf"), tl.where(span < LEAST_SPAN, 0.0, loss * unit * unit))

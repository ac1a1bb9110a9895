"""The reference against code written a second time here: published KIVI, and attention over dense tensors."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from vllm_kivi import reference
from vllm_kivi.format import ACCEPTED_BITS, GROUP_SIZES, HEAD_DIMS, LAYOUT_FIELDS, PRESETS, KVFormat

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SPECIALS = ("nan", "inf", "-inf", "max", "min", "tiny", "-tiny", "normal", "zero", "-zero")
POISON = 0xFF  # NaN in every dtype

quick = settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are small: a second thread costs more than it brings, and a hundredfold on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------ what the tests compare with


def published_kivi(x: torch.Tensor, bits: int, dim: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One group along `dim` as KIVI's repository quantizes it, in x's dtype: codes, scale, zero. May be NaN."""
    mn, mx = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    scale = (mx - mn) / (2**bits - 1)
    return ((x - mn) / scale).clamp(0, 2**bits - 1).round(), scale, mn


def groups_of(x: torch.Tensor, group_size: int, dim: int) -> list[torch.Tensor]:
    return list(x.split(group_size, dim))


def quantize(
    x: torch.Tensor, bits: int, group_size: int, dim: int, scale_search: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if dim == 0:
        return reference.quantize_keys(x, bits, group_size)  # which is never searched
    return reference.quantize_values(x, bits, group_size, scale_search)


def dequantize(codes, scale, zero, group_size: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    function = reference.dequantize_keys if dim == 0 else reference.dequantize_values
    return function(codes, scale, zero, group_size, dtype)


def published_dequantized(x: torch.Tensor, bits: int, group_size: int, dim: int) -> torch.Tensor:
    """float64, for input without degenerate groups."""
    parts = []
    for group in groups_of(x, group_size, dim):
        codes, scale, zero = published_kivi(group, bits, dim)
        parts.append(codes.double() * scale.double() + zero.double())
    return torch.cat(parts, dim)


def finite(x: torch.Tensor) -> torch.Tensor:
    limits = torch.finfo(x.dtype)
    return torch.where(x.isnan(), 0.0, x).clamp(limits.min, limits.max).to(x.dtype)


def run_of(head_dim: int) -> int:
    """Channels that are rotated together."""
    return max(2**i for i in range(9) if head_dim % 2**i == 0)


def hadamard(head_dim: int) -> torch.Tensor:
    """Sylvester's matrix on each run of channels, by its closed form: float64 [D, D], orthonormal."""
    size = run_of(head_dim)

    def sign(i: int, j: int) -> float:
        return (-1.0) ** bin(i % size & j % size).count("1") if i // size == j // size else 0.0

    signs = [[sign(i, j) for j in range(head_dim)] for i in range(head_dim)]
    return torch.tensor(signs, dtype=torch.float64) / math.sqrt(size)


def rotated(v: torch.Tensor) -> torch.Tensor:
    """Pair by pair in the order of docs/FORMAT.md, in numpy's float32."""
    head_dim = v.shape[-1]
    x, half = finite(v).float().numpy().reshape(-1, head_dim).copy(), 1
    with np.errstate(over="ignore", invalid="ignore"):
        while half < run_of(head_dim):
            for i in range(head_dim):
                if i & half == 0:
                    x[:, i], x[:, i + half] = x[:, i] + x[:, i + half], x[:, i] - x[:, i + half]
            half *= 2
        x *= np.float32(1 / math.sqrt(run_of(head_dim)))
    return torch.from_numpy(x).to(v.dtype).view(v.shape)


def channel_errors(k: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> np.ndarray:
    """What each channel of one group of finite keys [G, H, D] loses: [H, D], by the words of docs/FORMAT.md."""
    x, zeros, scales = (t.float().numpy() for t in (k, zero[0], scale[0]))
    errors = np.zeros(x.shape[1:], dtype=np.float32)
    for h, d in itertools.product(*map(range, errors.shape)):
        with np.errstate(over="ignore"):
            span = x[:, h, d].max() - x[:, h, d].min()
        if span < 2**-14 or span > 2**15:
            errors[h, d] = 0 if span < 1 else np.inf
            continue
        exponent = math.frexp(span)[1] - 1
        mantissa, power = math.frexp(scales[h, d])
        short = math.ldexp(math.floor(mantissa * 2**16), power - 16)
        differences = (x[:, h, d] - zeros[h, d]).astype(np.float64) - codes[:, h, d].double().numpy() * short
        units = np.rint(differences.astype(np.float32) * 2.0 ** (11 - exponent))
        errors[h, d] = np.float32(sum(int(unit) ** 2 for unit in units)) * np.float32(4.0 ** (exponent - 11))
    return errors


def most_lossy(errors: np.ndarray, count: int) -> torch.Tensor:
    """The channels with the largest errors, of equal ones the lower: bool [1, H, D]."""
    chosen = torch.zeros(1, *errors.shape, dtype=torch.bool)
    for head, row in enumerate(errors):
        chosen[0, head, sorted(range(len(row)), key=lambda d: (-row[d], d))[:count]] = True
    return chosen


def published_with_boost(k: torch.Tensor, group_size: int, count: int) -> torch.Tensor:
    """float64: published KIVI at 4 bits for `count` channels of each group and at 2 for the rest."""
    parts = []
    for group in groups_of(k, group_size, 0):
        boosted = most_lossy(channel_errors(group, *published_kivi(group, 2, 0)), count)
        two, four = (published_dequantized(group, bits, group_size, 0) for bits in (2, 4))
        parts.append(torch.where(boosted, four, two))
    return torch.cat(parts)


def attend(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, cap: float) -> torch.Tensor:
    """Dense attention of one row, head by head: [num_heads, D], [T, H, D] -> float64 [num_heads, D]."""
    ratio = query.shape[0] // keys.shape[1]
    rows = []
    for head, q in enumerate(query.double()):
        logits = keys[:, head // ratio].double() @ q * scale
        if cap:
            logits = cap * (logits / cap).tanh()
        weights = (logits - logits.max()).exp()
        rows.append(weights @ values[:, head // ratio].double() / weights.sum())
    return torch.stack(rows)


# --------------------------------------------------------------------------------------------------------- quantization


def special(name: str, dtype: torch.dtype) -> float:
    limits = torch.finfo(dtype)
    tiny = limits.smallest_normal * limits.eps
    named = {"max": limits.max, "min": limits.min, "tiny": tiny, "-tiny": -tiny, "normal": limits.smallest_normal}
    return named[name] if name in named else float(name.replace("zero", "0.0"))


@st.composite
def tensors(draw, specials: tuple[str, ...] = SPECIALS):
    """[T, H, D] whose magnitudes differ by channel and token, with constant groups and special values sprinkled in."""
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    group_size = draw(st.sampled_from(GROUP_SIZES))
    num_tokens = draw(st.sampled_from((1, 2, group_size - 1, group_size, group_size + 1, 2 * group_size + 3)))
    shape = (num_tokens, draw(st.integers(1, 3)), draw(st.sampled_from((1, 16, 64, 80))))
    random_bits = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(shape, generator=random_bits, dtype=torch.float64)
    limits = torch.finfo(dtype)
    low = math.log2(limits.smallest_normal) - 12
    exponent = draw(st.one_of(st.just(0.0), st.floats(low, math.log2(limits.max) - 3)))
    spread = draw(st.sampled_from((0, 6)))
    x *= 2.0**exponent
    x *= 2.0 ** (spread * torch.randn(shape[2], generator=random_bits, dtype=torch.float64))
    x = x.clamp(limits.min, limits.max).to(dtype)
    if draw(st.booleans()):
        x[:, 0] = x[0, 0].clone()  # constant along the tokens of a key group
    if draw(st.booleans()):
        x[0] = x[0, :, :1].clone()  # constant along the channels of a value group
    for _ in range(draw(st.integers(0, 4)) if specials else 0):
        place = tuple(draw(st.integers(0, size - 1)) for size in shape)
        x[place] = special(draw(st.sampled_from(specials)), dtype)
    return x, group_size


FINITE = tuple(name for name in SPECIALS if name not in ("nan", "inf", "-inf"))


@quick
@given(tensors(), st.sampled_from(reference.BITS), st.sampled_from((0, 2)))
def test_quantization_is_published_kivi_where_that_is_finite(case, bits, dim):
    x, group_size = case
    codes, scale, zero = quantize(x, bits, group_size, dim)
    assert codes.dtype == torch.uint8 and scale.dtype == zero.dtype == x.dtype
    for index, group in enumerate(groups_of(x, group_size, dim)):
        want_codes, want_scale, want_zero = published_kivi(group, bits, dim)
        usable = want_scale.isfinite() & (want_scale > 0)
        assert torch.equal(scale.narrow(dim, index, 1)[usable], want_scale[usable])
        assert torch.equal(zero.narrow(dim, index, 1)[usable], want_zero[usable])
        got = codes.narrow(dim, index * group_size, group.shape[dim])
        usable = usable.expand_as(got)
        assert torch.equal(got[usable].to(x.dtype), want_codes[usable])


@quick
@given(tensors(), st.sampled_from(reference.BITS), st.sampled_from((0, 2)), st.booleans())
def test_scale_and_zero_are_finite_whatever_the_input(case, bits, dim, scale_search):
    x, group_size = case
    codes, scale, zero = quantize(x, bits, group_size, dim, scale_search)
    assert scale.isfinite().all() and (scale >= 0).all() and zero.isfinite().all()
    assert int(codes.max()) < 2**bits
    # One bit pattern for each value: what a minimum of 0.0 and -0.0 returns depends on the order of the reduction.
    assert not (torch.signbit(scale) & (scale == 0)).any() and not (torch.signbit(zero) & (zero == 0)).any()


@quick
@given(tensors(FINITE), st.sampled_from(reference.BITS), st.sampled_from((0, 2)))
def test_error_is_at_most_half_a_step(case, bits, dim):
    x, group_size = case
    codes, scale, zero = quantize(x, bits, group_size, dim)
    got = dequantize(codes, scale, zero, group_size, dim, torch.float64)
    limits, levels = torch.finfo(x.dtype), 2**bits - 1
    for index, group in enumerate(groups_of(x.double(), group_size, dim)):
        error = (got.narrow(dim, index * group_size, group.shape[dim]) - group).abs()
        span = group.amax(dim, keepdim=True) - group.amin(dim, keepdim=True)
        # Roundings of the input's dtype, each eps / 2 of the span (two subtractions, two divisions, the clamp), and the
        # absolute rounding of a subnormal scale, which counts once a level.
        rounding = 3 * limits.eps * span + (levels + 2) * limits.smallest_normal * limits.eps
        assert (error <= scale.narrow(dim, index, 1).double() / 2 + rounding).all()


@quick
@given(
    tensors(),
    st.sampled_from(reference.BITS),
    st.sampled_from((0, 2)),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_a_bad_group_stays_local(case, bits, dim, scale_search, rng):
    x, group_size = case
    before = quantize(x, bits, group_size, dim, scale_search)
    where = [rng.randrange(size) for size in x.shape]
    bad = [slice(i, i + 1) for i in where]
    group = where[dim] // group_size
    bad[dim] = slice(group * group_size, (group + 1) * group_size)
    damaged = x.clone()
    damaged[tuple(bad)] = torch.tensor([special(rng.choice(SPECIALS), x.dtype) for _ in range(3)])[
        torch.randint(3, damaged[tuple(bad)].shape, generator=torch.Generator().manual_seed(rng.randrange(2**31)))
    ].to(x.dtype)
    after = quantize(damaged, bits, group_size, dim, scale_search)
    one = list(bad)
    one[dim] = slice(group, group + 1)
    for index, area in ((0, bad), (1, one), (2, one)):
        untouched = torch.ones_like(before[index], dtype=torch.bool)
        untouched[tuple(area)] = False
        assert torch.equal(after[index][untouched], before[index][untouched])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("dim", (0, 2))
def test_degenerate_groups(dtype, dim):
    """What the format defines where published KIVI gives NaN."""
    limits = torch.finfo(dtype)
    tiny = limits.smallest_normal * limits.eps
    groups = {
        "constant": ([3.0] * 32, 0.0, 3.0, [0] * 32),
        "negative zero": ([-0.0] * 32, 0.0, 0.0, [0] * 32),
        "nan counts as 0": ([math.nan, 3.0, -3.0] + [math.nan] * 29, 2.0, -3.0, [2, 3, 0] + [2] * 29),
        "only nan": ([math.nan] * 32, 0.0, 0.0, [0] * 32),
        "inf counts as the largest": ([math.inf] * 32, 0.0, limits.max, [0] * 32),
        "the range overflows": ([limits.max, limits.min, math.inf, -math.inf] + [0.0] * 28, None, limits.min, None),
        "the scale underflows": ([tiny] + [0.0] * 31, 0.0, 0.0, [0] * 32),
        "the scale rounds down, the code is clamped": ([4 * tiny, tiny] + [0.0] * 30, tiny, 0.0, [3, 1] + [0] * 30),
    }
    for name, (elements, want_scale, want_zero, want_codes) in groups.items():
        x = torch.tensor(elements, dtype=torch.float64).to(dtype)
        codes, scale, zero = quantize(x.view(32, 1, 1) if dim == 0 else x.view(1, 1, 32), 2, 32, dim)
        if want_scale is None:
            assert codes.flatten().tolist()[:4] == [3, 0, 3, 0] and set(codes.flatten().tolist()[4:]) <= {1, 2}, name
            got = dequantize(codes, scale, zero, 32, dim, torch.float64).flatten()
            assert torch.allclose(got[:4], x[:4].double().clamp(limits.min, limits.max), rtol=2 * limits.eps), name
        else:
            assert scale.item() == want_scale and codes.flatten().tolist() == want_codes, name
        assert zero.item() == want_zero and not (zero.item() == 0 and torch.signbit(zero).item()), name


@settings(quick, max_examples=300)
@given(tensors(FINITE), st.sampled_from(reference.BITS))
def test_scale_search_loses_no_more(case, bits):
    """In any group; and where it keeps the range, or may not touch the group, all is as without it."""
    x, group_size = case
    dim = 2
    plain, searched = (quantize(x, bits, group_size, dim, scale_search) for scale_search in (False, True))
    errors = [
        [e.square().sum(dim) for e in groups_of(dequantize(*q, group_size, dim, torch.float64) - x, group_size, dim)]
        for q in (plain, searched)
    ]
    for index, (group, before, after) in enumerate(zip(groups_of(x, group_size, dim), *errors, strict=True)):
        assert (after <= before).all()
        same = (plain[1] == searched[1]).narrow(dim, index, 1) & (plain[2] == searched[2]).narrow(dim, index, 1)
        span = group.float().amax(dim, keepdim=True) - group.float().amin(dim, keepdim=True)
        assert same[(span < 2**-14) | (span > 2**15)].all()
        codes = [q[0].narrow(dim, index * group_size, group.shape[dim]) for q in (plain, searched)]
        assert torch.equal(*(c[same.expand_as(c)] for c in codes))
        assert bits < 8 or same.all()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize(("bits", "group_size", "at_most"), ((2, 32, 0.68), (2, 128, 0.54), (4, 128, 0.92)))
def test_scale_search_pays(dtype, bits, group_size, at_most):
    """Share of the squared error that is left, of normal numbers with an offset of a head's."""
    x = torch.randn(256, 2, 128, generator=torch.Generator().manual_seed(0))
    x = (x + torch.tensor([0.0, 4.0])[:, None]).to(dtype)
    losses = [
        (dequantize(*quantize(x, bits, group_size, 2, search), group_size, 2, torch.float64) - x).square().sum()
        for search in (False, True)
    ]
    assert losses[1] < at_most * losses[0]


def test_a_last_group_that_is_shorter_is_quantized_on_its_own():
    x = torch.randn(70, 2, 80, generator=torch.Generator().manual_seed(0))
    codes, scale, _ = reference.quantize_keys(x, 2, 32)
    assert scale.shape == (3, 2, 80)
    assert torch.equal(codes[64:], reference.quantize_keys(x[64:], 2, 32)[0])
    codes, scale, _ = reference.quantize_values(x, 2, 32)
    assert scale.shape == (70, 2, 3)
    assert torch.equal(codes[..., 64:], reference.quantize_values(x[..., 64:], 2, 32)[0])
    assert reference.quantize_keys(x[:0], 2, 32)[1].shape == (0, 2, 80)


def test_strides_of_the_input_do_not_matter():
    x = torch.randn(2, 64, 40, generator=torch.Generator().manual_seed(0)).transpose(0, 1)
    for dim in (0, 2):
        for got, want in zip(quantize(x, 4, 32, dim), quantize(x.contiguous(), 4, 32, dim), strict=True):
            assert torch.equal(got, want)


# ------------------------------------------------------------------------------------------------ rotation and boost


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_values_are_rotated_by_an_orthonormal_matrix_that_is_its_own_inverse(head_dim):
    matrix = hadamard(head_dim)
    assert KVFormat("kivi2", head_dim, 1, "float32").hadamard_size == run_of(head_dim)
    torch.testing.assert_close(matrix @ matrix, torch.eye(head_dim).double(), rtol=0, atol=1e-14)
    v = torch.randn(5, 3, head_dim, generator=torch.Generator().manual_seed(0))
    got = reference.rotate_values(v, run_of(head_dim))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), v.double() @ matrix, rtol=0, atol=1e-5)
    back = reference.rotate_back(v.double(), run_of(head_dim))
    torch.testing.assert_close(back, v.double() @ matrix, rtol=0, atol=1e-13)


@quick
@given(st.sampled_from(HEAD_DIMS), st.sampled_from(sorted(DTYPES)), st.sampled_from((-20, 0, 10, 120)), st.randoms())
def test_rotation_is_defined_to_the_bit(head_dim, dtype, exponent, rng):
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    v = finite((torch.randn(7, 2, head_dim, generator=generator) * 2.0**exponent).to(DTYPES[dtype]))
    for _ in range(rng.randrange(5)):
        v[rng.randrange(7), rng.randrange(2), rng.randrange(head_dim)] = special(rng.choice(SPECIALS), v.dtype)
    want = rotated(v)
    got = reference.rotate_values(v, run_of(head_dim))
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(0.0, math.inf, -math.inf), want.nan_to_num(0.0, math.inf, -math.inf))
    _, scale, zero = reference.quantize_values(got, 2, 32)
    assert scale.isfinite().all() and zero.isfinite().all()


def test_rotation_spreads_an_outlier():
    """One large channel costs the others of its group all their codes, unless it is spread."""
    v = torch.randn(64, 2, 128, generator=torch.Generator().manual_seed(0))
    v[..., 77] *= 30
    errors = []
    for rotate in (False, True):
        fmt = KVFormat("kivi2", 128, 2, "float32", group_size=64, rotate_values=rotate)
        tile = reference.unpack_tile(fmt, reference.pack_tile(fmt, v, v))
        errors.append((reference.dequantize_tile(fmt, tile)[1] - v).square().mean())
    assert errors[1] < 0.5 * errors[0]


@quick
@given(tensors(), st.integers(0, 80))
def test_the_channels_that_lose_most_are_boosted(case, count):
    k, group_size = case
    count = min(count, k.shape[2])
    two, four = (reference.quantize_keys(k, bits, group_size) for bits in (2, 4))
    codes, scale, zero, boosted = reference.quantize_boosted_keys(k, count, group_size)
    assert (boosted.sum(-1) == count).all()
    for index, group in enumerate(groups_of(finite(k), group_size, 0)):
        one, tokens = slice(index, index + 1), slice(index * group_size, (index + 1) * group_size)
        want = most_lossy(channel_errors(group, two[0][tokens], two[1][one], two[2][one]), count)
        assert torch.equal(boosted[one], want)
        assert torch.equal(codes[tokens], torch.where(want, four[0][tokens], two[0][tokens]))
        for got, finer, coarse in ((scale, four[1], two[1]), (zero, four[2], two[2])):
            assert torch.equal(got[one], torch.where(want, finer[one], coarse[one]))


def boosted_in(k: torch.Tensor, count: int = 16) -> list[int]:
    (boosted,) = reference.quantize_boosted_keys(k[:, None], count, 32)[3][0]
    return boosted.nonzero().flatten().tolist()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_boost_of_degenerate_channels(dtype):
    limits = torch.finfo(dtype)
    lowest = list(range(16))
    same = torch.randn(32, 1, generator=torch.Generator().manual_seed(0)).to(dtype).expand(32, 64)
    for equal in (same, torch.full_like(same, 3.0), torch.full_like(same, math.nan), torch.full_like(same, math.inf)):
        assert boosted_in(equal) == lowest
    # An error of 0, from codes that are exact or from a small range, is not more than another one.
    exact = torch.arange(32)[:, None].expand(32, 64).remainder(4).to(dtype).clone()
    exact[:, 40:] *= 2.0**-16
    assert boosted_in(exact) == lowest
    # Only what loses something comes first, and a range above 2**15 loses infinitely much.
    k = torch.zeros(32, 64, dtype=dtype)
    k[:, 20:40] = torch.linspace(-1, 1, 32)[:, None].to(dtype)
    assert boosted_in(k) == list(range(20, 36))
    k[0, 50], k[1, 60], k[2, 61], k[3, 62] = 40000, limits.max, math.inf, math.nan
    assert boosted_in(k) == [*range(20, 33), 50, 60, 61]
    k[:, 3] = k[:, 20] * 2.0**-15  # a range of 2**-14 is measured: as many units as another, and far fewer absolutely
    assert boosted_in(k, 24) == [3, *range(20, 40), 50, 60, 61]
    assert boosted_in(k, 23) == [*range(20, 40), 50, 60, 61]


@pytest.mark.parametrize("fraction", (4, 8))
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_exactly_the_boosted_channels_have_signed_scales(head_dim, fraction):
    """In every tile, of whatever keys: -0.0 where the scale is 0."""
    fmt = KVFormat("kivi2_boost", head_dim, 2, "bfloat16", boosted_fraction=fraction)
    k = torch.randn(32, 2, head_dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    k[:, 1] = 3.0
    k[3, 0, 7], k[4, 0, 9] = math.nan, math.inf
    tiles = reference.pack_tile(fmt, k, k)
    stored = tiles[:, fmt.k_scale_offset : fmt.k_zero_offset].contiguous().view(torch.bfloat16)
    assert (stored.signbit().sum(1) == fmt.boosted_channels).all()
    assert (stored[1] == 0).all() and stored[1].signbit().tolist().index(False) == fmt.boosted_channels
    assert stored[0, 9].signbit()
    tile = reference.unpack_tile(fmt, tiles)
    assert torch.equal(tile.k_boosted[0], stored.signbit()) and torch.equal(tile.k_scale[0], stored.abs())
    assert (tile.k_codes[:, ~tile.k_boosted[0]] < 4).all() and (tile.k_codes < 16).all()
    assert (tile.k_codes[:, 0][:, tile.k_boosted[0, 0]] > 3).any()


@pytest.mark.parametrize("function", (reference.quantize_keys, reference.quantize_values))
@pytest.mark.parametrize(
    ("arguments", "message"),
    (
        ((torch.zeros(4, 1, 8), 3, 32), r"bits=3 .*accepted: 2, 4, 8"),
        ((torch.zeros(4, 1, 8), 2, 48), r"group_size=48 .*accepted: 32, 64, 128"),
        ((torch.zeros(4, 1, 8).double(), 2, 32), r"dtype='float64' .*accepted: bfloat16, float16, float32"),
        ((torch.zeros(4, 8), 2, 32), r"shape \(4, 8\) .*accepted: \[num_tokens, num_kv_heads, head_dim\]"),
    ),
)
def test_quantize_says_what_it_accepts(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


# --------------------------------------------------------------------------------------------------------------- tiles


@quick
@given(
    st.sampled_from(sorted(PRESETS)),
    st.sampled_from(HEAD_DIMS),
    st.sampled_from(GROUP_SIZES),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from((0, *ACCEPTED_BITS)),
    st.sampled_from((0, *ACCEPTED_BITS)),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_a_tile_unpacks_to_what_was_packed(
    preset, head_dim, group_size, dtype, k_bits, v_bits, rotate_values, eighth, seed
):
    fmt = KVFormat(
        preset,
        head_dim,
        2,
        dtype,
        group_size=group_size,
        rotate_values=rotate_values,
        boosted_fraction=8 if eighth and preset == "kivi2_boost" else 0,
        k_bits=0 if preset == "kivi2_boost" else k_bits,
        v_bits=v_bits,
    )
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, group_size, 2, head_dim, generator=generator).to(DTYPES[dtype])
    packed = reference.pack_tile(fmt, k, v)
    assert packed.shape == (2, fmt.tile_bytes)
    tile = reference.unpack_tile(fmt, packed)
    got_k, got_v = reference.dequantize_tile(fmt, tile, torch.float64)
    boosted = torch.zeros(1, 2, head_dim).bool()
    if fmt.k_bits == 16:
        assert torch.equal(got_k, k.double()) and torch.equal(tile.k_codes, k)
    else:
        if preset == "kivi2_boost":
            *keys, boosted = reference.quantize_boosted_keys(k, fmt.boosted_channels, group_size)
        else:
            keys = reference.quantize_keys(k, fmt.k_bits, group_size)
        assert all(map(torch.equal, tile[:3], keys))
        assert torch.equal(got_k, reference.dequantize_keys(*keys, group_size, torch.float64))
    assert torch.equal(tile.k_boosted, boosted)
    if fmt.v_bits == 16:
        assert torch.equal(got_v, v.double()) and torch.equal(tile.v_codes, v)
        return
    values = reference.quantize_values(rotated(v) if rotate_values else v, fmt.v_bits, group_size)
    assert all(map(torch.equal, tile[3:6], values))
    want_v = reference.dequantize_values(*values, group_size, torch.float64)
    torch.testing.assert_close(got_v, want_v @ hadamard(head_dim) if rotate_values else want_v, rtol=1e-12, atol=1e-12)


def test_tiles_of_the_wrong_shape_are_refused():
    fmt = KVFormat("kivi2", 64, 2, "bfloat16")
    x = torch.zeros(32, 2, 64, dtype=torch.bfloat16)
    for k, v in ((x[:31], x[:31]), (x, x[..., :32]), (x.float(), x.float()), (x, x.half())):
        with pytest.raises(ValueError, match=r"\[32, 2, 64\] in bfloat16"):
            reference.pack_tile(fmt, k, v)
    with pytest.raises(ValueError, match="uint8"):
        reference.unpack_tile(fmt, torch.zeros(2, fmt.tile_bytes - 1, dtype=torch.uint8))


# --------------------------------------------------------------------------------------------------------------- pages


class Pool:
    """One memory for both page types, as in vLLM: poisoned, block ids permuted, pages padded where asked."""

    def __init__(self, fmt: KVFormat, lengths: list[int], seed: int, padding: int = 0):
        self.fmt, self.lengths = fmt, lengths
        rng = random.Random(seed)
        needed = sum(-(-t // fmt.page_tokens) + -(-t // fmt.full_page_tokens) for t in lengths)
        ids = list(range(1, needed + 5))
        rng.shuffle(ids)
        num_blocks, block_bytes = len(ids) + 1, fmt.padded_page_bytes + padding
        self.memory = torch.full((num_blocks, block_bytes), POISON, dtype=torch.uint8)
        self.quantized = self._view(fmt.page_bytes)
        self.full = self._view(fmt.full_page_bytes)
        self.quantized_table = self._table(ids, fmt.page_tokens)
        self.full_table = self._table(ids, fmt.full_page_tokens)
        generator = torch.Generator().manual_seed(seed)
        dtype = DTYPES[fmt.dtype]
        self.keys, self.values = [], []
        for num_tokens in lengths:
            k, v = torch.randn(2, num_tokens, fmt.num_kv_heads, fmt.head_dim, generator=generator)
            k *= torch.linspace(0.2, 4, fmt.head_dim)  # key channels differ, as in a model
            self.keys.append(k.to(dtype))
            self.values.append(v.to(dtype))

    def _view(self, page_bytes: int) -> torch.Tensor:
        heads = self.fmt.num_kv_heads
        return self.memory[:, :page_bytes].unflatten(1, (heads, page_bytes // heads))

    def _table(self, ids: list[int], page_tokens: int) -> torch.Tensor:
        width = -(-max(self.lengths) // page_tokens) + 1
        wide = torch.zeros(len(self.lengths), width + 3, dtype=torch.int32)  # rows of a larger table, as vLLM has it
        for row, num_tokens in zip(wide, self.lengths, strict=True):
            for page in range(-(-num_tokens // page_tokens)):
                row[page] = ids.pop()
        return wide[:, :width]

    def batch(self, spans: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """query_start_loc and seq_lens of a step that runs positions [start, end) of each request."""
        counts = [end - start for start, end in spans]
        loc = torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32)
        return loc, torch.tensor([end for _, end in spans], dtype=torch.int32)

    def new_tokens(self, spans: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a step, as slices of a fused tensor and with rows of padding behind them."""
        parts = [(k[a:b], v[a:b]) for k, v, (a, b) in zip(self.keys, self.values, spans, strict=True)]
        k, v = (torch.cat([*x, torch.full_like(x[0][:1], torch.nan)]) for x in zip(*parts, strict=True))
        fused = torch.stack((k, v), dim=1)
        return fused[:, 0], fused[:, 1]

    def store(self, spans: list[tuple[int, int]], full_table: torch.Tensor | None = None) -> None:
        table = self.full_table if full_table is None else full_table
        reference.store(
            *self.new_tokens(spans),
            self.quantized,
            self.full,
            self.quantized_table,
            table,
            *self.batch(spans),
            self.fmt.layout(),
        )

    def free_old_tokens(self, request: int, num_tokens: int) -> None:
        """Gives back the full-precision pages that no later step reads, as the manager does, and poisons them."""
        fmt, n = self.fmt, self.fmt.full_page_tokens
        needed = min(fmt.boundary(num_tokens + 1), num_tokens // fmt.group_size * fmt.group_size)
        for page in range(-(-fmt.sink_tokens // n), needed // n):
            block = int(self.full_table[request, page])
            if block:
                self.memory[block] = POISON
                self.full_table[request, page] = 0

    def poison_full(self, request: int, positions: range) -> None:
        tokens = self.full.unflatten(2, (self.fmt.full_page_tokens, -1))
        for p in positions:
            tokens[int(self.full_table[request, p // self.fmt.full_page_tokens]), :, p % tokens.shape[2]] = POISON

    def seen(self, request: int, position: int, boundary: int) -> tuple[torch.Tensor, torch.Tensor]:
        """float64 keys and values of positions 0 to `position` as a row with `boundary` must see them."""
        fmt, stop = self.fmt, -(-boundary // self.fmt.group_size) * self.fmt.group_size
        keys, values = self.keys[request], self.values[request]
        k, v = keys[: position + 1].double(), values[: position + 1].double()
        if boundary > fmt.sink_tokens:
            read = slice(fmt.sink_tokens, boundary)
            if fmt.preset == "kivi2_boost":
                k[read] = published_with_boost(keys[:stop], fmt.group_size, fmt.boosted_channels)[read]
            elif fmt.k_bits < 16:
                k[read] = published_dequantized(keys[:stop], fmt.k_bits, fmt.group_size, 0)[read]
            if fmt.rotate_values:
                back = published_dequantized(rotated(values[:stop]), fmt.v_bits, fmt.group_size, 2)
                v[read] = (back @ hadamard(fmt.head_dim))[read]
            elif fmt.v_bits < 16:
                v[read] = published_dequantized(values[:stop], fmt.v_bits, fmt.group_size, 2)[read]
        return k, v


def chunks(num_tokens: int, rng: random.Random, largest: int) -> list[tuple[int, int]]:
    cuts = [0]
    while cuts[-1] < num_tokens:
        cuts.append(min(num_tokens, cuts[-1] + rng.randint(1, largest)))
    return list(itertools.pairwise(cuts))


@quick
@given(
    st.sampled_from(sorted(PRESETS)),
    st.sampled_from(((64, 32, 1), (64, 32, 3), (80, 32, 1), (80, 128, 1), (128, 64, 2))),
    st.sampled_from(sorted(DTYPES)),
    st.integers(0, 200),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**31),
)
@example("kivi2", (64, 32, 3), "bfloat16", 64, False, False, 0)
def test_store_in_chunks_is_store_at_once(preset, shape, dtype, num_tokens, full_precision, rotate_values, seed):
    head_dim, group_size, pages_of = shape
    fmt = KVFormat(
        preset,
        head_dim,
        2,
        dtype,
        group_size=group_size,
        page_tokens=pages_of * group_size,
        full_precision=full_precision,
        rotate_values=rotate_values,
    )
    rng = random.Random(seed)
    lengths = [num_tokens + 1, rng.randint(1, 2 * group_size)]
    whole, split = (Pool(fmt, lengths, seed, padding=64) for _ in range(2))
    whole.store([(0, t) for t in lengths])
    steps = [chunks(t, rng, group_size + 5) for t in lengths]
    for spans in itertools.zip_longest(*steps):
        # A request that has nothing left to do stays in the batch with no rows.
        split.store([span or (t, t) for span, t in zip(spans, lengths, strict=True)])
    assert torch.equal(whole.memory, split.memory)
    assert (whole.memory[0] == POISON).all()


def test_store_skips_null_blocks_and_touches_nothing_else():
    fmt = KVFormat("kivi2", 64, 2, "bfloat16", page_tokens=64)
    pool = Pool(fmt, [160], seed=1, padding=32)
    first_quantized, first_full = int(pool.quantized_table[0, 0]), int(pool.full_table[0, 0])
    whole = Pool(fmt, [160], seed=1, padding=32)
    whole.store([(0, 160)])
    pool.quantized_table[0, 0] = 0
    pool.full_table[0, 0] = 0
    pool.store([(0, 160)])
    whole.memory[first_quantized] = POISON
    whole.memory[first_full] = POISON
    assert torch.equal(pool.memory, whole.memory)
    # The third page holds one group of two: its second tile and all padding keep the poison.
    tiles = pool.quantized[int(pool.quantized_table[0, 2])]
    assert (tiles[:, : fmt.tile_bytes] != POISON).any() and (tiles[:, fmt.tile_bytes :] == POISON).all()
    assert (pool.memory[:, fmt.page_bytes :] == POISON).all()


def test_store_needs_the_earlier_tokens_of_a_group():
    fmt = KVFormat("kivi2", 64, 1, "bfloat16")
    pool = Pool(fmt, [32], seed=1)
    pool.store([(0, 16)])
    pool.full_table[0, 0] = 0
    with pytest.raises(ValueError, match="position 0 has no full-precision page"):
        pool.store([(16, 32)])


def test_a_rejected_speculative_token_is_quantized_again():
    """Whatever a position held before, the page holds the last tokens that were stored there."""
    fmt = KVFormat("kivi2", 64, 1, "bfloat16")
    pool, clean = Pool(fmt, [40], seed=1), Pool(fmt, [40], seed=1)
    clean.store([(0, 40)])
    pool.store([(0, 30)])
    accepted = pool.keys[0].clone(), pool.values[0].clone()
    pool.keys[0][30:36], pool.values[0][30:36] = 9.0, math.inf
    pool.store([(30, 36)])
    pool.keys[0], pool.values[0] = accepted
    pool.store([(30, 36)])
    pool.store([(36, 40)])
    assert torch.equal(pool.memory, clean.memory)


# ----------------------------------------------------------------------------------------------------------- attention


def edges(fmt: KVFormat) -> list[int]:
    g, r, n = fmt.group_size, fmt.residual_length, fmt.page_tokens
    s = fmt.sink_tokens
    around = {1, g, r, r + g, r + 2 * g, n, fmt.full_page_tokens, r + n, r + n + g, s, s + r + 2 * g}
    return sorted({t + d for t in around for d in (-1, 0, 1) if t + d > 0})


def expected_decode(pool: Pool, query: torch.Tensor, spans, scale: float, cap: float) -> torch.Tensor:
    rows = []
    for request, (start, end) in enumerate(spans):
        for p in range(start, end):
            keys, values = pool.seen(request, p, pool.fmt.boundary(p + 1))
            rows.append(attend(query[len(rows)], keys, values, scale, cap))
    return torch.stack(rows)


def query_for(pool: Pool, spans, num_heads: int, seed: int) -> torch.Tensor:
    """One row more than the requests have: padding."""
    num_rows = sum(end - start for start, end in spans) + 1
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(num_rows, num_heads, pool.fmt.head_dim, generator=generator).to(DTYPES[pool.fmt.dtype])


def run_decode(pool: Pool, query: torch.Tensor, spans, scale: float, cap: float) -> torch.Tensor:
    tables = pool.quantized, pool.full, pool.quantized_table, pool.full_table
    got = reference.decode_float64(query, *tables, *pool.batch(spans), scale, cap, pool.fmt.layout())
    output = torch.full_like(query, 7.0)
    reference.decode(output, query, *tables, *pool.batch(spans), scale, cap, pool.fmt.layout())
    torch.testing.assert_close(output[:-1], got[:-1].to(output.dtype), rtol=0, atol=0, equal_nan=True)
    assert (output[-1] == 7.0).all()
    return got[:-1]


FORMATS = [
    KVFormat("kivi2", 64, 3, "bfloat16", residual_length=32),
    KVFormat("kivi2", 64, 1, "float32", residual_length=0, sink_tokens=4, page_tokens=64),
    KVFormat("kivi_k4v2", 80, 2, "float16", group_size=64, residual_length=128, sink_tokens=4),
    KVFormat("kivi4", 80, 1, "bfloat16", group_size=128, residual_length=40, sink_tokens=37),
    KVFormat("kivi8", 128, 1, "bfloat16", residual_length=31, page_tokens=96, sink_tokens=1),
    KVFormat("kivi2", 64, 2, "bfloat16", residual_length=32, padded_page_bytes=5000),
    KVFormat("kivi2", 64, 1, "float32", residual_length=32, sink_tokens=70),
    KVFormat("kivi2", 64, 2, "bfloat16", residual_length=32, sink_tokens=4, full_precision=True),
    KVFormat("kivi2", 96, 1, "bfloat16", residual_length=32, sink_tokens=4, rotate_values=True),
    KVFormat("kivi4", 80, 2, "float32", residual_length=33, page_tokens=64, rotate_values=True),
    KVFormat("kivi2_boost", 64, 2, "bfloat16", residual_length=32, sink_tokens=4, page_tokens=64, rotate_values=True),
    KVFormat("kivi2_boost", 80, 1, "float16", group_size=64, residual_length=40, boosted_fraction=8),
    KVFormat("kivi2_boost", 64, 1, "bfloat16", residual_length=32, sink_tokens=4, v_bits=16),
    KVFormat("kivi2", 64, 2, "float16", residual_length=32, sink_tokens=4, rotate_values=True, k_bits=16),
    KVFormat("kivi8", 80, 1, "bfloat16", group_size=64, residual_length=32, page_tokens=128, v_bits=2),
    KVFormat("kivi2", 96, 1, "float32", group_size=128, residual_length=0, sink_tokens=1, v_bits=4),
    KVFormat("kivi8", 64, 1, "bfloat16", residual_length=33, k_bits=4),
]


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{f.k_bits}-{f.v_bits}-{f.head_dim}-{f.group_size}-{f.dtype}")
def test_decode_attends_to_the_dequantized_tokens(fmt):
    """Every edge length as one request of a batch, over poisoned and permuted pages whose old tokens were freed."""
    for q in (1, 3):
        lengths = [t for t in edges(fmt) if t >= q]
        pool = Pool(fmt, lengths, seed=q, padding=16)
        before = [(0, t - q) for t in lengths]
        pool.store(before)
        for request, (_, end) in enumerate(before):
            pool.free_old_tokens(request, end)
        spans = [(t - q, t) for t in lengths]
        pool.store(spans)
        query = query_for(pool, spans, 3 * fmt.num_kv_heads, seed=q)
        got = run_decode(pool, query, spans, 0.2, 0.0)
        torch.testing.assert_close(got, expected_decode(pool, query, spans, 0.2, 0.0), rtol=1e-10, atol=1e-10)


def test_decode_caps_its_logits():
    pool = Pool(FORMATS[0], [130], seed=3)
    pool.store([(0, 130)])
    query = query_for(pool, [(129, 130)], 3, seed=3)
    got = run_decode(pool, query, [(129, 130)], 1.0, 5.0)
    torch.testing.assert_close(got, expected_decode(pool, query, [(129, 130)], 1.0, 5.0), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(got, run_decode(pool, query, [(129, 130)], 1.0, 0.0))


def test_a_request_of_up_to_residual_length_tokens_is_exact():
    fmt = dataclasses.replace(FORMATS[0], residual_length=128)
    pool = Pool(fmt, [128], seed=4)
    pool.store([(0, 128)])
    pool.quantized_table[:] = 0  # not even looked at
    query = query_for(pool, [(127, 128)], 3, seed=4)
    want = attend(query[0], pool.keys[0], pool.values[0], 0.2, 0.0)[None]
    torch.testing.assert_close(run_decode(pool, query, [(127, 128)], 0.2, 0.0), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("view", (torch.uint8, torch.bfloat16, torch.float32), ids=str)
def test_the_dtype_and_strides_of_the_views_do_not_matter(view):
    """Pages are memory: vLLM hands them out in its own dtype, strided and padded."""
    fmt = FORMATS[0]
    pool = Pool(fmt, [100], seed=5, padding=48)
    pool.store([(0, 100)])
    query = query_for(pool, [(99, 100)], 3, seed=5)
    want = run_decode(pool, query, [(99, 100)], 0.2, 0.0)
    room = torch.full((pool.memory.shape[0], 2, pool.memory.shape[1]), POISON, dtype=torch.uint8)
    moved = Pool(fmt, [100], seed=5)
    moved.memory = room[:, 1]  # a pool with another layer's pages in between, and not at the start of its storage
    moved.quantized, moved.full = (moved._view(size).view(view) for size in (fmt.page_bytes, fmt.full_page_bytes))
    moved.store([(0, 100)])
    assert torch.equal(moved.memory, pool.memory) and (room[:, 0] == POISON).all()
    assert torch.equal(run_decode(moved, query, [(99, 100)], 0.2, 0.0), want)


def test_decode_does_not_read_the_null_block():
    pool = Pool(FORMATS[0], [130], seed=6)
    pool.store([(0, 130)])
    query = query_for(pool, [(129, 130)], 3, seed=6)
    for table, message in ((pool.quantized_table, "no quantized page"), (pool.full_table, "no full-precision page")):
        kept = table.clone()
        table[:] = 0
        with pytest.raises(ValueError, match=message):
            run_decode(pool, query, [(129, 130)], 0.2, 0.0)
        table[:] = kept


def run_prefill(pool: Pool, query: torch.Tensor, spans, num_prompt_tokens: list[int]) -> torch.Tensor:
    arguments = (
        *pool.new_tokens(spans),
        *(pool.quantized, pool.full, pool.quantized_table, pool.full_table),
        *pool.batch(spans),
        torch.tensor(num_prompt_tokens, dtype=torch.int32),
        *(0.2, 0.0, pool.fmt.layout()),
    )
    got = reference.prefill_float64(query, *arguments)
    output = torch.full_like(query, 7.0)
    reference.prefill(output, query, *arguments)
    torch.testing.assert_close(output[:-1], got[:-1].to(output.dtype), rtol=0, atol=0, equal_nan=True)
    assert (output[-1] == 7.0).all()
    return got[:-1]


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{f.k_bits}-{f.v_bits}-{f.head_dim}-{f.group_size}-{f.dtype}")
def test_prefill_in_chunks(fmt):
    """Two prompts in chunks of many sizes; the pages that the manager would not keep are null."""
    rng = random.Random(fmt.head_dim)
    lengths = [fmt.residual_length + 2 * fmt.group_size + 9, fmt.page_tokens + 1]
    pool = Pool(fmt, lengths, seed=7)
    steps = [chunks(t, rng, 2 * fmt.group_size) for t in lengths]
    for step in itertools.zip_longest(*steps):
        spans = [span or (t, t) for span, t in zip(step, lengths, strict=True)]
        for request, (_, end) in enumerate(spans):
            # Tokens of the chunk that later steps do not read get no page at all.
            start = spans[request][0]
            keep = min(fmt.boundary(end + 1), end // fmt.group_size * fmt.group_size)
            n = fmt.full_page_tokens
            for page in range(max(-(-start // n), -(-fmt.sink_tokens // n)), keep // n):
                pool.full_table[request, page] = 0
        pool.store(spans)
        query = query_for(pool, spans, 2 * fmt.num_kv_heads, seed=7)
        stored = pool.memory.clone()
        for request, span in enumerate(spans):
            pool.poison_full(request, range(*span))  # the chunk's own tokens are not read from pages
        got = run_prefill(pool, query, spans, lengths)
        pool.memory.copy_(stored)
        row = 0
        for request, (start, end) in enumerate(spans):
            boundary = min(fmt.boundary(start + 1), start)
            for p in range(start, end):
                want = attend(query[row], *pool.seen(request, p, boundary), 0.2, 0.0)
                torch.testing.assert_close(got[row], want, rtol=1e-10, atol=1e-10)
                row += 1
        for request, (_, end) in enumerate(spans):
            pool.free_old_tokens(request, end)


def test_a_chunk_never_reads_its_own_tokens_quantized():
    """With R = 0 the first row's group may be complete: its own token is still read from the chunk."""
    fmt = dataclasses.replace(FORMATS[1], sink_tokens=0)
    start, end = 2 * fmt.group_size - 1, 2 * fmt.group_size + 2
    pool = Pool(fmt, [end], seed=11)
    pool.store([(0, start)])
    pool.store([(start, end)])
    query = query_for(pool, [(start, end)], 2, seed=11)
    got = run_prefill(pool, query, [(start, end)], [end])
    for p in range(start, end):
        want = attend(query[p - start], *pool.seen(0, p, start), 0.2, 0.0)
        torch.testing.assert_close(got[p - start], want, rtol=1e-10, atol=1e-10)


def test_a_recomputed_request_attends_as_when_it_was_decoded():
    fmt = dataclasses.replace(FORMATS[0], sink_tokens=4)
    num_tokens, num_prompt, start = 150, 70, 20
    pool = Pool(fmt, [num_tokens], seed=8)
    pool.store([(0, num_tokens)])
    spans = [(start, num_tokens)]
    query = query_for(pool, spans, 3, seed=8)
    got = run_prefill(pool, query, spans, [num_prompt])
    decoded = run_decode(pool, query, spans, 0.2, 0.0)
    assert torch.equal(got[num_prompt - start :], decoded[num_prompt - start :])
    for p in range(start, num_prompt):
        want = attend(query[p - start], pool.keys[0][: p + 1], pool.values[0][: p + 1], 0.2, 0.0)
        torch.testing.assert_close(got[p - start], want, rtol=1e-10, atol=1e-10)


def test_a_row_does_not_see_later_tokens():
    """NaN behind a row's position must not reach it, not even times 0."""
    pool = Pool(FORMATS[0], [50], seed=9)
    pool.keys[0][40:], pool.values[0][40:] = math.nan, math.nan
    pool.store([(0, 50)])
    query = query_for(pool, [(0, 50)], 3, seed=9)
    got = run_prefill(pool, query, [(0, 50)], [50])
    assert got[:40].isfinite().all() and got[40:].isnan().all()


def test_layouts_that_do_not_fit_are_refused():
    pool = Pool(FORMATS[0], [8], seed=10)
    layout = pool.fmt.layout()
    spans = [(0, 8)]
    tables = pool.quantized, pool.full, pool.quantized_table, pool.full_table, *pool.batch(spans)
    k, v = pool.new_tokens(spans)
    for bad, dtype in ((layout[:-1], k.dtype), ([*layout[:-1], layout[-1] + 32], k.dtype), (layout, torch.float32)):
        with pytest.raises(ValueError):
            reference.store(k.to(dtype), v.to(dtype), *tables, bad)
    index = LAYOUT_FIELDS.index("boosted_channels")
    for bad, message in (
        ([*layout[:2], 3, *layout[3:]], "k_bits=3"),
        ([*KVFormat("kivi4", 64, 3, "bfloat16").layout()[:index], 8, *layout[index + 1 :]], "k_bits=4 .*kivi2_boost"),
    ):
        with pytest.raises(ValueError, match=message):
            reference.store(k, v, *tables, bad)
    with pytest.raises(ValueError, match="does not belong"):
        reference.store(k, v, *tables, [*layout[:index], 16, *layout[index + 1 :]])

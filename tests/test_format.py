"""The byte map: golden bytes, every byte accounted for, sizes, and errors that name the option.

`expected_page` is a second packer, written from format.py's docstring in plain Python and bit by bit. It shares no code
with the reference and computes its own offsets, so that a mistake in either shows.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import itertools
import math
import re
import struct
import sys
from pathlib import Path

import pytest
import torch

from vllm_kivi import format as kivi_format
from vllm_kivi import reference
from vllm_kivi.format import (
    ACCEPTED_BITS,
    DTYPE_BYTES,
    GROUP_SIZES,
    HEAD_DIMS,
    LAYOUT_FIELDS,
    MAX_HIT_STEP,
    PRESETS,
    KVFormat,
    head_bytes,
)
from vllm_kivi.options import DEFAULTS, PUBLISHED, KiviOptions

ROOT = Path(__file__).parent.parent
PRECISION = {"bfloat16": 8, "float16": 11, "float32": 24}  # bits of the significand

ALL_FORMATS = [
    KVFormat(preset, head_dim, 2, dtype, group_size=group_size, full_precision=full_precision)
    for preset, head_dim, group_size, dtype, full_precision in itertools.product(
        PRESETS, HEAD_DIMS, GROUP_SIZES, DTYPE_BYTES, (False, True)
    )
]
ALL_FORMATS += [
    KVFormat("kivi2_boost", head_dim, 2, dtype, group_size=group_size, boosted_fraction=8)
    for head_dim, group_size, dtype in itertools.product(HEAD_DIMS, GROUP_SIZES, DTYPE_BYTES)
]
ALL_FORMATS += [
    KVFormat("kivi2", HEAD_DIMS[i % 5], 2, list(DTYPE_BYTES)[i // 3 % 3], group_size, k_bits=k_bits, v_bits=v_bits)
    for i, ((k_bits, v_bits), group_size) in enumerate(
        itertools.product(itertools.permutations(ACCEPTED_BITS, 2), GROUP_SIZES)
    )
]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are small: a second thread costs more than it brings, and a hundredfold on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def name_of(fmt: KVFormat) -> str:
    bypass = "-full" if fmt.full_precision else ""
    eighth = "-eighth" if fmt.boosted_fraction == 8 else ""
    mixed = (fmt.k_bits, fmt.v_bits) != PRESETS[fmt.preset] and not fmt.full_precision
    bits = f"-k{fmt.k_bits}-v{fmt.v_bits}" if mixed else ""
    return f"{fmt.preset}-{fmt.head_dim}-{fmt.group_size}-{fmt.dtype}{bypass}{eighth}{bits}"


# ---------------------------------------------------------------------------------------------------- the second packer


def rounded(x: float, dtype: str) -> float:
    """To the nearest value of the dtype, ties to even; x in its normal range."""
    mantissa, exponent = math.frexp(x)
    bits = PRECISION[dtype]
    return math.ldexp(round(mantissa * 2**bits), exponent - bits)


def encoded(x: float, dtype: str) -> bytes:
    return struct.pack("<e", x) if dtype == "float16" else struct.pack("<f", x)[-DTYPE_BYTES[dtype] :]


def element(which: str, token: int, head: int, channel: int, dtype: str) -> float:
    """The fixed input: no two rows or columns alike, channels of different magnitude."""
    mixed = token * (token + 7 * channel + 37) + channel * (3 * channel + 59) + 101 * head + 13 * (which == "v")
    number = mixed % 251 - 125
    return rounded(number * (1 + channel % 5) / 16, dtype)


def quantized_group(group: list[float], bits: int, dtype: str) -> tuple[list[int], float, float]:
    low, high, levels = min(group), max(group), 2**bits - 1
    scale = rounded(rounded(high - low, dtype) / levels, dtype)
    quotients = (rounded(rounded(x - low, dtype) / scale, dtype) for x in group)
    return [round(min(max(q, 0.0), float(levels))) for q in quotients], scale, low


def f32(x: float) -> float:
    """float64 has room for float32 operations: to round its results is exact."""
    return rounded(x, "float32")


def exponent_of(span: float) -> int:
    return math.frexp(span)[1] - 1


def loss(group: list[float], codes: list[int], scale: float, zero: float) -> int:
    """docs/FORMAT.md, word by word, as all that follows."""
    units = 2.0 ** (11 - exponent_of(f32(max(group) - min(group))))
    mantissa, exponent = math.frexp(scale)
    short = math.ldexp(math.floor(mantissa * 2**16), exponent - 16)
    errors = (f32(f32(x - zero) - code * short) * units for x, code in zip(group, codes, strict=True))
    return sum(round(error) ** 2 for error in errors)


def searched_group(group: list[float], bits: int, dtype: str) -> tuple[list[int], float, float]:
    low, levels = min(group), 2**bits - 1
    span = f32(max(group) - low)
    best = quantized_group(group, bits, dtype)
    if not 2**-14 <= span <= 2**15 or bits == 8:
        return best
    least = loss(group, *best)
    least -= least // 64
    cut, part = 0.0, f32(span / 40)
    for _ in range(7):
        cut = f32(cut + part)
        zero, scale = rounded(f32(low + cut), dtype), rounded(f32(f32(span - 2 * cut) / levels), dtype)
        quotients = (rounded(rounded(x - zero, dtype) / scale, dtype) for x in group)
        narrow = [round(min(max(q, 0.0), float(levels))) for q in quotients], scale, zero
        if loss(group, *narrow) < least:
            best, least = narrow, loss(group, *narrow)
    return best


def boosted_channels_of(fmt: KVFormat, groups: list[list[float]]) -> list[int]:
    """Those that lose most at 2 bits, in ascending order."""
    errors = []
    for group in groups:
        span = f32(max(group) - min(group))
        if 2**-14 <= span <= 2**15:
            unit = 2.0 ** (exponent_of(span) - 11)
            errors.append(f32(loss(group, *quantized_group(group, 2, fmt.dtype))) * unit**2)
        else:
            errors.append(0.0 if span < 1 else math.inf)
    count = -(-len(groups) // {"kivi2_boost": fmt.boosted_fraction}[fmt.preset])
    count += -count % 8
    return sorted(sorted(range(len(groups)), key=lambda d: (-errors[d], d))[:count])


def rotated(vector: list[float], dtype: str) -> list[float]:
    x, size, half = list(vector), 1, 1
    while len(x) % (2 * size) == 0:
        size *= 2
    while half < size:
        for i in range(len(x)):
            if i & half == 0:
                x[i], x[i + half] = f32(x[i] + x[i + half]), f32(x[i] - x[i + half])
        half *= 2
    return [rounded(f32(number * f32(size**-0.5)), dtype) for number in x]


def expected_tile(fmt: KVFormat, first_token: int, head: int) -> bytes:
    dim, group_size, dtype = fmt.head_dim, fmt.group_size, fmt.dtype
    tokens = range(first_token, first_token + group_size)
    k = [[element("k", t, head, d, dtype) for d in range(dim)] for t in tokens]
    v = [[element("v", t, head, d, dtype) for d in range(dim)] for t in tokens]
    tile = expected_keys(fmt, k) + expected_values(fmt, v)
    return tile + bytes(-len(tile) % group_size)


def put(codes: bytearray, word: int, bit: int, code: int) -> None:
    while code:
        if code & 1:
            codes[4 * word + bit // 8] |= 1 << bit % 8  # little-endian: bit 8 is in the second byte
        code, bit = code >> 1, bit + 1


def expected_keys(fmt: KVFormat, k: list[list[float]]) -> bytes:
    dim, group_size, dtype, bits = fmt.head_dim, fmt.group_size, fmt.dtype, fmt.k_bits
    if bits == 16:
        return b"".join(encoded(x, dtype) for row in k for x in row)
    k_codes = bytearray(dim * group_size * bits // 8)
    k_scale = k_zero = b""
    channels_of_word = 32 // bits
    groups = [[k[t][d] for t in range(group_size)] for d in range(dim)]
    boosted = boosted_channels_of(fmt, groups) if fmt.preset == "kivi2_boost" else []
    k_boost = bytearray(len(boosted) * group_size // 4)
    for d in range(dim):
        if d in boosted:
            codes, scale, zero = quantized_group(groups[d], 4, dtype)
            j = boosted.index(d)
            for t, code in enumerate(codes):
                bit = 16 * (j % 8 // 4) + 8 * (t % 2) + 2 * (j % 4)
                put(k_boost, j // 8 * (group_size // 2) + t // 2, bit, code % 4)
            codes, scale = [code // 4 for code in codes], -scale
        else:
            codes, scale, zero = quantized_group(groups[d], bits, dtype)
        k_scale, k_zero = k_scale + encoded(scale, dtype), k_zero + encoded(zero, dtype)
        for t, code in enumerate(codes):
            put(k_codes, d // channels_of_word * group_size + t, bits * (d % channels_of_word), code)
    return bytes(k_codes + k_boost) + k_scale + k_zero


def expected_values(fmt: KVFormat, v: list[list[float]]) -> bytes:
    dim, group_size, dtype, bits = fmt.head_dim, fmt.group_size, fmt.dtype, fmt.v_bits
    if bits == 16:
        return b"".join(encoded(x, dtype) for row in v for x in row)
    quantized_values = searched_group if fmt.scale_search else quantized_group
    if fmt.rotate_values:
        v = [rotated(row, dtype) for row in v]
    v_codes = bytearray(dim * group_size * bits // 8)
    v_scale = v_zero = b""
    slots = 16 // bits
    for first_channel in range(0, dim, group_size):
        for t in range(group_size):
            codes, scale, zero = quantized_values(v[t][first_channel : first_channel + group_size], bits, dtype)
            v_scale, v_zero = v_scale + encoded(scale, dtype), v_zero + encoded(zero, dtype)
            for d, code in enumerate(codes, first_channel):
                s = 4 * d + t % 4
                word = t // 8 * (4 * dim // slots) + s // slots
                put(v_codes, word, 16 * (t % 8 // 4) + bits * (s % slots), code)
    return bytes(v_codes) + v_scale + v_zero


def expected_page(fmt: KVFormat) -> bytes:
    firsts = range(0, fmt.page_tokens, fmt.group_size)
    return b"".join(expected_tile(fmt, first, head) for head in range(fmt.num_kv_heads) for first in firsts)


def expected_full_page(fmt: KVFormat) -> bytes:
    order = itertools.product(range(fmt.num_kv_heads), range(fmt.full_page_tokens), "kv", range(fmt.head_dim))
    return b"".join(encoded(element(which, t, head, d, fmt.dtype), fmt.dtype) for head, t, which, d in order)


def stored_pages(fmt: KVFormat, background: int) -> tuple[bytes, bytes]:
    """One quantized page and the first full-precision page as `reference.store` writes them over `background`."""
    t, h, d = torch.meshgrid(*map(torch.arange, (fmt.page_tokens, fmt.num_kv_heads, fmt.head_dim)), indexing="ij")
    mixed = t * (t + 7 * d + 37) + d * (3 * d + 59) + 101 * h
    key, value = ((((mixed + shift) % 251 - 125) * (1 + d % 5) / 16).to(getattr(torch, fmt.dtype)) for shift in (0, 13))
    pool = torch.full((4, fmt.padded_page_bytes), background, dtype=torch.uint8)
    quantized = pool[:, : fmt.page_bytes].unflatten(1, (fmt.num_kv_heads, -1))
    full = pool[:, : fmt.full_page_bytes].unflatten(1, (fmt.num_kv_heads, -1))
    full_table = torch.zeros(1, -(-fmt.page_tokens // fmt.full_page_tokens), dtype=torch.int32)
    full_table[0, 0] = 3
    reference.store(
        key,
        value,
        quantized,
        full,
        torch.tensor([[1]], dtype=torch.int32),
        full_table,
        torch.tensor([0, fmt.page_tokens], dtype=torch.int32),
        torch.tensor([fmt.page_tokens], dtype=torch.int32),
        fmt.layout(),
    )
    assert (pool[[0, 2]] == background).all()
    return bytes(pool[1].tolist()), bytes(pool[3].tolist())


# --------------------------------------------------------------------------------------------------------- golden bytes

# sha256 of a quantized page of 2 KV heads and 2 groups. A change here changes what is in every cache that exists, also
# in those that were moved to another process: it needs a new layout version, not a new hash.
GOLDEN_PAGES = {
    "kivi2-64-32-bfloat16": "271b15e0c9935db0ca2da582190695a5f67c6391f8b5d43a6866cdf8c9f88460",
    "kivi2-80-128-float16": "3e22b3cc112b73239f1e5f0538580728b8e3723b094858e6d95e3373a5aeb68a",
    "kivi2-96-64-float32": "b9e2735954a9786db89657c4c263288517b5c14b6182bd81039c03a822e5b6a3",
    "kivi2-128-32-float16": "0b28c473ac01d66a3d926152ff985271b0f982fc077c71ed052eb9c3ac9eab84",
    "kivi_k4v2-64-32-bfloat16": "fddc8f6833b6a41ad59a7b2dd129feec34db29fb072c41b8eb893241cf630880",
    "kivi_k4v2-128-32-float16": "95316f64837bc162f529839b3a5c2168b2496e334d6e59b3d278daa0adbb7faa",
    "kivi4-64-32-bfloat16": "f003cfb51b4f455c46d01859f12c920c0f2b1c57a8d21488020a0b6acdf7608d",
    "kivi4-80-128-float16": "e0e29a956a4fa4f77d39a75aca6523ede72cbf086320380f2f9b8d0a80107451",
    "kivi4-128-32-float16": "784f381ab9f1389e442d171b52f04877b6890a111cd8e1bbe4217d2e4edbf08d",
    "kivi8-64-32-bfloat16": "49d8487de750be6f81408e43b0beeed50fa1512e65e18045adfe3efc6962f399",
    "kivi8-96-64-float32": "25bf2f83a3142a4a8a446edfd50d6878b3c4850efc289ca69e035d54b9d842dd",
    "kivi8-128-32-float16": "1a1536b2c03dfa2652fae0de3d005d92dc922357e4f5168badf6e8ccac94ce8e",
    "kivi_k4v2-256-32-bfloat16": "c3cec65bbb0aceb7aaf8c6dad8c66a2910ee98cc5b9f37054e19ea4c132143cd",
    "kivi2-64-32-bfloat16-search": "65ac2edb493f2113d5026dc1b0bb2f13940c981a735f0c59b05286a99016328e",
    "kivi2-128-64-float16-search": "b0aea682c82bd27954d707f43fecb495fcb06b1c0668c78eac10838227c900d6",
    "kivi_k4v2-96-64-float32-search": "caf1996c2e45ee465d39e83396b87a810b48234c050cccb29ef5da964f8fea79",
    "kivi4-80-128-bfloat16-search": "23a88c064bd90f50d0e6c002f8a3249946864c5d211734fbac97fd93e2161927",
    "kivi8-64-32-bfloat16-search": "49d8487de750be6f81408e43b0beeed50fa1512e65e18045adfe3efc6962f399",
    "kivi2-64-32-bfloat16-rotate": "8bf4f593f55d393e42760e346527f54ce0b8f62589e2323cc68e0598a4700de0",
    "kivi2-80-32-float16-search-rotate": "e7e97fe8d8cebade6b685162e5865507c585e2f3d472b4a95804729c70e7cbb4",
    "kivi4-96-64-float32-rotate": "f35ebb360a5727b493046bbb570630c7128060b5668837e99812c585ec9794b6",
    "kivi_k4v2-128-32-bfloat16-search-rotate": "a09329940b78a6e20e35ceb67950bb868b14eb2d3c9a5d4cc0ca22cc6b982366",
    "kivi2_boost-64-32-bfloat16": "2e34ff40b5f26fec379a8793fa7533a75688d6360111dc7e38c3e1dcb535d845",
    "kivi2_boost-128-64-bfloat16-search-rotate": "082e81ff10d0a3455543bc783087cfc083789ae7aebf1068a53585a43cd5f632",
    "kivi2_boost-80-128-float16-search": "e3cd1d2855b54bcf47cf14a9b07a01006efa5e2f13ad6598f0d79fcdc9cc5887",
    "kivi2_boost-96-32-float32-rotate-eighth": "0fa583a2e8be02de2c1a71c92ade3aa6baf43fab58e3415a11f80fc2ff6be0ef",
    "kivi2_boost-256-32-float16-eighth": "f5e92a9bd52c709ef075aa785064ab7628dcc3ddf64a1a4fe14af6c3ad37c4fc",
    "kivi2_boost-64-32-bfloat16-full-rotate": "20ae821349d888aa576279c6003d98a1faee27c345136636d8d788b78e42d438",
    "kivi2-64-32-bfloat16-full": "20ae821349d888aa576279c6003d98a1faee27c345136636d8d788b78e42d438",
    "kivi4-64-32-bfloat16-k16-v16": "20ae821349d888aa576279c6003d98a1faee27c345136636d8d788b78e42d438",
    "kivi2-64-32-bfloat16-k16": "6716ef5a5ffd7aa4c64832287a65d01efc6fd7d5cb67a8a1aa57ac7361abb4af",
    "kivi2-80-128-float16-v16-search-rotate": "2e2fe3ba0cfdbdd48c69536dc12d79891ab4a68264576b3de01a513c5da2b0fc",
    "kivi2-96-64-float32-k16-v4-rotate": "f587bceec31592e6dc4a530cb2da2b8c41da17d53a806f445e46cff6d0781902",
    "kivi2-128-32-float16-k8-search": "3057ad983a2a241732df2800e2123d07e43893c0313ee5ebe32f45a348088bca",
    "kivi2-64-64-bfloat16-v4": "cc2512261d23dd859f742a063860b53b1ec1ca0ac479a471bd45bb8d9988a33b",
    "kivi4-128-32-bfloat16-k4-v8": "57fcd8f4a20e0870f8d0993aa5a01a2b163a7115f61cabb28ba7b7340f10c50e",
    "kivi2_boost-64-32-float32-v16": "ada28aa4e125c0f90edfabbc2331ba51fdfd6da25abd9b7c13f927520c2bf724",
    "kivi2_boost-128-64-float16-v8-rotate": "29d9d1901b4c82867724678cc46aa3c8d1385e8f423a51392f6adc75355c5fa1",
}

# One tile of kivi2, head_dim 64, G = 32, bfloat16, in full, section by section.
GOLDEN_TILE = {
    "k_codes": """
        e4782222 24897498 79d2dd62 8e6776d8 9289d9b2 27226618 7476d886 89d8616c dd61cbd6 62b66dad b718c65b d861adc1
        2dda16ab b66cac56 cbc616fc 185bbcaa a1b15655 c65af0ff 5bac5aaa b1150054 06afaa3f 6b1555e9 f1aafa94 5645954e
        abaa4f39 0150e9e4 9aea9393 ff507a49 55e9e424 ea939ee7 4039799e e997e789 87b506af 61acc5af 185bf0ab c616bcea
        a1c5abea 5bbcaaea c6abaafa bc5a953a 6b55953a 1600557a f03f544e abea534e 56aa534e 45a5429e 3f944e92 ea534ed2
        954e4ee3 544e8e27 4e798e67 3a398d74 e5249d88 94249d99 93279ddd 4ee3dd2d 79e2dd62 64d21db6 27de2186 e2dd611b
        dedd6258 99d9b66d 89d9b6b1 881886c6 ea437a49 fe9492e7 0fe5e479 433979d2 534e9e74 949327dd a4e44977 e525ded9
        29496766 799e89d9 4e272266 9278b7d8 e299d9b2 27226618 7877dbb6 89886d5b dd2d8685 22766868 66cbb6c6 8b6d5bac
        d8b6b116 2d1b5abc 766db16a 86c65a01 185bf0aa 6db15655 b516fc3f 1aab56aa 68050c50 b1aaaa3a 16f040a5 6b55aa53
        2622666c 99d86d1b 66b6181a d96dc7d6 77dbb6c5 1db6a1c1 876d68b0 611b5abc dbc616bf a2adc5ab 185bb0aa c616abaa
        adf1aaaa 1aaf56a9 c55a55a5 a85555a5 560000a5 f1eb3fa5 abaa3aa4 5595eae4 0050e9e4 aa4fe5e4 953ae524 50e9a434
        3ea49774 e9939378 949e9248 5f4a9288 3a799e99 e5799e99 9724dedd 9e27dd2d
    """,
    "k_scale": """
        9e401941 58419b41 cb419a40 22416341 a141cd41 97401d41 5c41a241 cd419840 1b417b41 9c41c541 98401f41 6841a241
        cd419f40 14416341 9b41c441 9d402541 7841a041 cc419540 21417441 9b41c541 a5402641 75419741 d041a140 23416941
        a441cf41 a7401b41 6c41a041 c5419240 1f417941 9f41c541 94401741 68419b41
    """,
    "k_zero": """
        fac074c1 9ac1ecc1 14c2f6c0 6cc1abc1 f4c11ac2 d6c06ac1 b2c1ecc1 1bc2cec0 6ec1bcc1 dac10ec2 e2c06ec1 abc1f4c1
        18c2fac0 58c1a5c1 ecc111c2 e2c07ac1 bcc1fac1 17c2c4c0 78c1b2c1 dac110c2 fac078c1 bac1e8c1 1cc2eec0 76c1a6c1
        f6c11ac2 fac06ec1 a6c1eac1 16c2fac0 74c1bcc1 e2c111c2 d6c062c1 bcc1d6c1
    """,
    "v_codes": """
        55955aa5 6a937993 e45939a6 966969e2 92788923 9645a9a6 528862dd 625987a6 96616918 18c7dac6 a569a5a5 585aadac
        0695afaa 85a1aaaa acbfaaff 9aaaaa5a aa3b4094 0f56d596 55944a92 e539e479 56929a55 247989d2 9e66749a 5599a6d9
        77d8b71d 66959655 62d8d8b6 b2656d56 966186a1 5bc2a85b 65665645 5601e1ef 69a66996 59e79968 9d69e799 a6999966
        7722661d a99a9998 66619a86 2ca9b6a5 9a9aa5a5 868585c5 a5a55555 95d55aaa 0569af95 69a95595 aaffaa03 569595a9
        a53a4695 43a57e96 6a966a96 258e69d3 a6999a56 e6898d6b 27991299 6619aa66 88761dc8 699a9aa6 b6a1a55d 685a5c5a
        d6c55a5a f1fc5a5a a9aa9a9a aaea9aaa 69659a99 a69e7974 89657766 66666666 26226272 6969a696 696d96db 6c655ca9
        a5b5a5c6 c6165aaf 6aa8a556 f455aa01 aaaa96aa 55aa95ea 0f94953e aa94955a 6a97a542 39963996 5ae45979 9e7827d2
        669a9959 89676666 229a2255 998a5919 b6b2181c a6a95959 ad6c69ac aca9b095 a9ad555a f101aaff 9a9a5555 aaffaa03
        a6a69999 e62299dd 226522a9 66a6ba98 86cb1c71 5969a9da a586adc5 1ba95ba5 955659bc ac0155bf aa95a9aa 95fca903
        a556faa9 a5505ae9 fa94a443 9a69a969 a492a593 4d699e96 a6d69a99 9d9c4584 99989595 aab79599 b7a9d866 96966aa2
        da1b8617 9aa866a1 a0c59656 16a9bc56 a855a6b1 99ff56ff 95a9666a 5ea4a54a
    """,
    "v_scale": """
        ab419741 9c41c341 a9417d41 b0419241 8441a841 b841c041 9341cb41 bd41c841 6b41c041 91419441 c4418441 9941b341
        b9419c41 a141b541 9741ad41 83419c41 91419c41 b341a841 a541a541 95419d41 a741c441 93419141 b9419941 9a41ac41
        a141a841 ad41a941 af41b341 93419c41 8a419941 c141a541 ad41a341 b441c541
    """,
    "v_zero": """
        f8c1d6c1 b9c108c2 fac1bec1 10c2eec1 a0c10ec2 1bc21cc2 90c115c2 01c21ac2 a2c10ac2 f8c1e1c1 11c2c6c1 dac116c2
        f6c1dcc1 eec115c2 bec11cc2 f4c110c2 d0c1b2c1 07c2e2c1 fcc1ccc1 a4c10ac2 03c20ec2 dcc1f8c1 1ac204c2 a0c10dc2
        06c20cc2 01c214c2 e1c104c2 bcc1d0c1 a4c1f6c1 10c20dc2 17c2b8c1 11c214c2
    """,
}


def golden_format(name: str) -> KVFormat:
    preset, head_dim, group_size, dtype, *flags = name.split("-")
    bits = {f"{flag[0]}_bits": int(flag[1:]) for flag in flags if flag[1:].isdigit()}
    return KVFormat(
        preset,
        int(head_dim),
        2,
        dtype,
        int(group_size),
        page_tokens=2 * int(group_size),
        full_precision="full" in flags,
        scale_search="search" in flags,
        rotate_values="rotate" in flags,
        boosted_fraction=8 if "eighth" in flags else 0,
        **bits,
    )


@pytest.mark.parametrize("name", GOLDEN_PAGES)
def test_golden_page(name):
    fmt = golden_format(name)
    page, full_page = stored_pages(fmt, background=0)
    assert page == expected_page(fmt)
    assert full_page[: fmt.full_page_bytes] == expected_full_page(fmt)
    assert hashlib.sha256(page).hexdigest() == GOLDEN_PAGES[name]


def test_golden_tile():
    fmt = KVFormat("kivi2", 64, 1, "bfloat16")
    want = bytes.fromhex("".join(GOLDEN_TILE.values()))
    assert [len(bytes.fromhex(section)) for section in GOLDEN_TILE.values()] == [512, 128, 128, 512, 128, 128]
    assert expected_tile(fmt, 0, 0) == want
    assert stored_pages(fmt, background=0)[0] == want


def test_every_preset_has_a_golden_page():
    assert {name.split("-")[0] for name in GOLDEN_PAGES} == set(PRESETS)


# --------------------------------------------------------------------------------------------------- sections and sizes


def sections(fmt: KVFormat) -> dict[str, tuple[int, int]]:
    """Offset and bytes of each section of a tile: offsets from the format, bytes from its docstring's table."""
    dim, group_size, size = fmt.head_dim, fmt.group_size, DTYPE_BYTES[fmt.dtype]
    k_bits, v_bits = (8 * size if bits == 16 else bits for bits in (fmt.k_bits, fmt.v_bits))
    k_scales, v_scales = (0 if fmt.k_bits == 16 else dim), (0 if fmt.v_bits == 16 else -(-dim // group_size))
    return {
        "k_codes": (fmt.k_codes_offset, dim * group_size * k_bits // 8),
        "k_boost": (fmt.k_boost_offset, fmt.boosted_channels * group_size // 4),
        "k_scale": (fmt.k_scale_offset, k_scales * size),
        "k_zero": (fmt.k_zero_offset, k_scales * size),
        "v_codes": (fmt.v_codes_offset, dim * group_size * v_bits // 8),
        "v_scale": (fmt.v_scale_offset, v_scales * group_size * size),
        "v_zero": (fmt.v_zero_offset, v_scales * group_size * size),
    }


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=name_of)
def test_every_byte_has_one_owner(fmt):
    owners = [0] * fmt.tile_bytes
    for offset, size in sections(fmt).values():
        assert offset % 16 == 0 and size % 16 == 0
        for byte in range(offset, offset + size):
            owners[byte] += 1
    used = owners.index(0) if 0 in owners else len(owners)
    assert owners == [1] * used + [0] * (fmt.tile_bytes - used)
    assert fmt.tile_bytes - used < fmt.group_size  # padding only rounds up
    assert fmt.tile_bytes % fmt.group_size == 0
    assert fmt.page_bytes == fmt.num_kv_heads * fmt.page_tokens // fmt.group_size * fmt.tile_bytes
    # One more token a page would not fit, or would put prefix hits too far apart.
    assert fmt.full_page_bytes <= fmt.page_bytes
    fits = fmt.page_bytes // (fmt.num_kv_heads * fmt.full_token_bytes)
    larger = range(fmt.full_page_tokens + 1, fits + 1)
    assert all(math.lcm(fmt.page_tokens, n) > MAX_HIT_STEP for n in larger)
    assert fmt.hit_step <= max(MAX_HIT_STEP, fmt.page_tokens)


@pytest.mark.parametrize(
    "name",
    (
        "kivi2-80-128-bfloat16",
        "kivi_k4v2-64-32-float16",
        "kivi8-80-128-float16",
        "kivi2-64-64-bfloat16-full",
        "kivi2_boost-80-128-bfloat16-rotate",
        "kivi2_boost-128-64-bfloat16-eighth",
        "kivi2-80-128-float16-k16",
        "kivi2_boost-64-64-bfloat16-v16",
    ),
)
def test_store_writes_its_sections_and_nothing_else(name):
    """Over two backgrounds the written bytes agree and the others do not."""
    fmt = golden_format(name)
    pages = [stored_pages(fmt, background) for background in (0x00, 0xFF)]
    tile = [any(o <= byte < o + size for o, size in sections(fmt).values()) for byte in range(fmt.tile_bytes)]
    owned = tile * (fmt.page_bytes // fmt.tile_bytes)
    assert [a == b for a, b in zip(pages[0][0], pages[1][0], strict=True)] == owned
    owned = [byte < fmt.full_page_bytes for byte in range(fmt.padded_page_bytes)]
    assert [a == b for a, b in zip(pages[0][1], pages[1][1], strict=True)] == owned


@pytest.mark.parametrize(
    ("preset", "bits"),
    (("kivi2", 3.0), ("kivi2_boost", 3.25), ("kivi_k4v2", 4.0), ("kivi4", 5.0), ("kivi8", 9.0)),
)
@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_bits_per_element(preset, bits, dtype):
    assert KVFormat(preset, 128, 8, dtype).bits_per_element == bits


@pytest.mark.parametrize(
    ("k_bits", "v_bits", "bits"),
    ((16, 2, 9.5), (2, 16, 9.5), (8, 2, 6.0), (2, 4, 4.0), (4, 8, 7.0), (16, 16, 16.0), (0, 4, 4.0), (16, 0, 9.5)),
)
def test_bits_of_keys_and_values(k_bits, v_bits, bits):
    """Each on its own; 16 bits have neither scale nor zero, and 0 are the preset's."""
    assert KVFormat("kivi2", 128, 8, "float16", k_bits=k_bits, v_bits=v_bits).bits_per_element == bits
    fmt = KVFormat("kivi2", 64, 1, "float32", k_bits=16)
    assert (fmt.v_codes_offset, fmt.tile_bytes) == (32 * 64 * 4, 32 * 64 * 4 + 32 * 64 // 4 + 2 * 2 * 32 * 4)
    fmt = KVFormat("kivi2_boost", 64, 1, "bfloat16", v_bits=16)
    assert (fmt.boosted_channels, fmt.v_codes_offset) == (16, 512 + 128 + 2 * 128)
    assert fmt.tile_bytes == fmt.v_scale_offset == fmt.v_zero_offset == 896 + 32 * 64 * 2


def test_sizes_of_kivi2_boost():
    """A quarter of the channels unless an eighth is asked for, in eights; and what that takes."""
    counts = {
        fraction: [
            KVFormat("kivi2_boost", d, 1, "bfloat16", boosted_fraction=fraction).boosted_channels for d in HEAD_DIMS
        ]
        for fraction in (0, 4, 8)
    }
    assert counts == {0: [16, 24, 24, 32, 64], 4: [16, 24, 24, 32, 64], 8: [8, 16, 16, 16, 32]}
    fmt = KVFormat("kivi2_boost", 128, 8, "bfloat16", group_size=64)
    sizes = [size for _, size in sections(fmt).values()]
    assert sizes == [2048, 512, 256, 256, 2048, 256, 256] and fmt.tile_bytes == 5632
    assert (fmt.token_bytes, fmt.bits_per_element) == (88, 2.75)
    assert dataclasses.replace(fmt, group_size=32, page_tokens=0, padded_page_bytes=0).bits_per_element == 3.25
    assert dataclasses.replace(fmt, boosted_fraction=8, padded_page_bytes=0).bits_per_element == 2.625


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=name_of)
def test_what_is_mixed_or_boosted(fmt):
    size = fmt.hadamard_size
    assert fmt.head_dim % size == 0 and fmt.head_dim // size % 2 == 1 and bin(size).count("1") == 1
    assert (fmt.boosted_channels > 0) == (fmt.preset == "kivi2_boost" and not fmt.full_precision)


@pytest.mark.parametrize(
    ("head_dim", "num_kv_heads", "page_bytes"), ((64, 3, 4608), (128, 8, 24576)), ids=("SmolLM2-135M", "Llama-3.1-8B")
)
def test_both_pages_have_equal_bytes(head_dim, num_kv_heads, page_bytes):
    fmt = KVFormat("kivi2", head_dim, num_kv_heads, "bfloat16")
    assert (fmt.page_tokens, fmt.full_page_tokens) == (32, 6)
    assert fmt.page_bytes == fmt.full_page_bytes == page_bytes


def test_padding_of_the_pool_holds_more_full_precision_tokens():
    fmt = KVFormat("kivi2", 64, 3, "bfloat16")
    padded = KVFormat("kivi2", 64, 3, "bfloat16", padded_page_bytes=2 * fmt.page_bytes + 1)
    assert padded.full_page_tokens == 12 and padded.page_bytes == fmt.page_bytes
    changed = [name for name, a, b in zip(LAYOUT_FIELDS, fmt.layout(), padded.layout(), strict=True) if a != b]
    assert changed == ["full_page_tokens"]


@pytest.mark.parametrize(
    ("residual_length", "group_size", "expected"),
    (
        (128, 32, {0: 0, 1: 0, 128: 0, 159: 0, 160: 32, 191: 32, 192: 64}),
        (0, 32, {0: 0, 31: 0, 32: 32, 33: 32}),
        (31, 64, {31: 0, 94: 0, 95: 64}),
    ),
)
def test_boundary(residual_length, group_size, expected):
    fmt = KVFormat("kivi2", 64, 1, "bfloat16", group_size=group_size, residual_length=residual_length)
    assert {t: fmt.boundary(t) for t in expected} == expected


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"preset": "kivi3"}, "kv_cache_dtype='kivi3' .*accepted: kivi2, kivi2_boost, kivi_k4v2, kivi4, kivi8"),
        ({"head_dim": 72}, "head_dim=72 .*accepted: 64, 80, 96, 128, 256"),
        ({"dtype": "float64"}, "dtype='float64' .*accepted: bfloat16, float16, float32"),
        ({"group_size": 16}, "group_size=16 .*accepted: 32, 64, 128"),
        ({"page_tokens": 48}, "block size 48 .*multiple of group_size=32.*--block-size"),
        ({"page_tokens": 32, "group_size": 64}, "block size 32 .*multiple of group_size=64"),
        ({"page_tokens": -32}, "block size -32"),
        ({"padded_page_bytes": 1535}, "1535 bytes cannot hold 1536 bytes"),
        ({"num_kv_heads": 0}, "num_kv_heads=0 must be 1 or more"),
        ({"residual_length": -1}, "residual_length=-1 must be 0 to 2147483647"),
        ({"sink_tokens": -1}, "sink_tokens=-1 must be 0 to 2147483647"),
        ({"residual_length": 1 << 31}, "residual_length=2147483648 must be 0 to 2147483647"),
        ({"sink_tokens": 1 << 32}, "sink_tokens=4294967296 must be 0 to 2147483647"),
        ({"scale_search": 8}, "scale_search=8 .*accepted: True, False"),
        ({"rotate_values": None}, "rotate_values=None .*accepted: True, False"),
        ({"boosted_fraction": 4}, "boosted_fraction=4 .*kivi2; leave it out, or use kivi2_boost"),
        ({"boosted_fraction": 3, "preset": "kivi2_boost"}, "boosted_fraction=3 .*accepted: 4, 8"),
        ({"k_bits": 3}, "k_bits=3 .*accepted: 2, 4, 8, 16"),
        ({"v_bits": 32}, "v_bits=32 .*accepted: 2, 4, 8, 16"),
        ({"v_bits": 4, "full_precision": True}, "v_bits=4 .*full_precision.*leave one of the two out"),
        ({"k_bits": 4, "preset": "kivi2_boost"}, "k_bits=4 .*kivi2_boost.*leave it out, or use kivi2"),
        ({"k_bits": 16, "preset": "kivi2_boost"}, "k_bits=16 .*kivi2_boost.*leave it out, or use kivi2"),
    ),
)
def test_bad_formats_name_the_option(changes, message):
    arguments = {"preset": "kivi2", "head_dim": 64, "num_kv_heads": 1, "dtype": "bfloat16"} | changes
    with pytest.raises(ValueError, match=message):
        KVFormat(**arguments)


# -------------------------------------------------------------------------------------------------------------- options


def options_of(preset: str, **options: object) -> tuple:
    fmt = KiviOptions.from_additional_config({"kivi": options}).format(preset, 128, 1, "bfloat16")
    names = ("group_size", "residual_length", "sink_tokens", "scale_search", "rotate_values", "boosted_fraction")
    return tuple(getattr(fmt, name) for name in names)


def test_the_defaults_are_those_of_the_cache_dtype():
    assert {preset: options_of(preset) for preset in PRESETS} == {
        "kivi2": (32, 128, 4, True, True, 0),
        "kivi2_boost": (64, 128, 4, True, True, 4),
        "kivi_k4v2": (32, 128, 4, True, True, 0),
        "kivi4": (32, 128, 4, True, True, 0),
        "kivi8": (32, 128, 0, False, False, 0),
    }
    assert set(DEFAULTS) == set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_set_is_taken(preset):
    settings = {
        "group_size": 128,
        "residual_length": 0,
        "sink_tokens": 0,
        "scale_search": False,
        "rotate_values": False,
    }
    others = {"group_size": 32, "residual_length": 1, "sink_tokens": 9, "scale_search": True, "rotate_values": True}
    for chosen in (settings, others):
        assert options_of(preset, **chosen)[:5] == tuple(chosen.values())
        for name in chosen:  # each on its own: the others stay the preset's
            changed = dict(zip(chosen, options_of(preset), strict=False)) | {name: chosen[name]}
            assert options_of(preset, **{name: chosen[name]})[:5] == tuple(changed.values())
    assert options_of("kivi2_boost", boosted_fraction=8)[5] == 8


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset != "kivi2_boost"])
def test_the_published_settings_are_those_of_the_format_itself(preset):
    published = KiviOptions.from_additional_config({"kivi": PUBLISHED}).format(preset, 128, 1, "bfloat16")
    assert published == KVFormat(preset, 128, 1, "bfloat16")
    with pytest.raises(ValueError, match=f"boosted_fraction=4 .*{preset}; leave it out, or use kivi2_boost"):
        options_of(preset, boosted_fraction=4)


@pytest.mark.parametrize("name", ("scale_search", "rotate_values", "full_precision"))
@pytest.mark.parametrize("value", (1, "yes", None))
def test_switches_are_true_or_false(name, value):
    with pytest.raises(ValueError, match=f"{name}={value!r} .*accepted: true, false"):
        KiviOptions.from_additional_config({"kivi": {name: value}})


# ----------------------------------------------------------------------------------------------------- the other copies


def test_layout_fields_are_those_of_params_h():
    source = (ROOT / "csrc" / "params.h").read_text()
    macro = re.search(r"#define KIVI_LAYOUT_FIELDS\(FIELD\)((?:.*\\\n)+.*\n)", source)
    assert macro, "csrc/params.h no longer defines KIVI_LAYOUT_FIELDS"
    assert tuple(re.findall(r"FIELD\((\w+)\)", macro[1])) == LAYOUT_FIELDS


def test_layout_lists_the_fields_in_order():
    fmt = KVFormat("kivi_k4v2", 80, 5, "float32", 64, 96, 4, 128, full_precision=False)
    assert fmt.layout()[:13] == [80, 5, 4, 2, 64, 128, fmt.full_page_tokens, 96, 4, 0, 0, 0, 2]
    assert fmt.layout()[13:] == [offset for offset, _ in sections(fmt).values()] + [fmt.tile_bytes]
    assert all(type(number) is int for number in fmt.layout())
    for index, name in ((9, "scale_search"), (10, "rotate_values")):
        assert KVFormat("kivi2", 64, 1, "bfloat16", **{name: True}).layout()[index] == 1
    boosted = KVFormat("kivi2_boost", 80, 5, "bfloat16", 64)
    assert boosted.layout()[11] == 24
    assert boosted.layout()[13:] == [offset for offset, _ in sections(boosted).values()] + [boosted.tile_bytes]


@pytest.mark.parametrize("name", ("scale_search", "rotate_values"))
def test_these_move_no_byte(name):
    fmt = KVFormat("kivi2", 80, 2, "bfloat16", group_size=64)
    changed = dataclasses.replace(fmt, **{name: True})
    assert [n for n, a, b in zip(LAYOUT_FIELDS, fmt.layout(), changed.layout(), strict=True) if a != b] == [name]
    assert fmt != changed and hash(fmt) != hash(changed)


def test_the_bypass_neither_rotates_nor_boosts():
    bypass = KVFormat("kivi2_boost", 80, 2, "bfloat16", full_precision=True, rotate_values=True)
    assert bypass.layout() == KVFormat("kivi2", 80, 2, "bfloat16", full_precision=True).layout()


def test_the_bypass_is_16_bits():
    bypass = KVFormat("kivi4", 80, 2, "bfloat16", full_precision=True)
    assert bypass == KVFormat("kivi4", 80, 2, "bfloat16", k_bits=16, v_bits=16)
    assert bypass.full_precision and (bypass.k_bits, bypass.v_bits) == (16, 16)
    assert dataclasses.replace(bypass, page_tokens=64, padded_page_bytes=0).full_precision
    assert not KVFormat("kivi4", 80, 2, "bfloat16", k_bits=16).full_precision
    assert KVFormat("kivi2_boost", 80, 2, "bfloat16", k_bits=16, v_bits=16).layout() == bypass.layout()


def test_16_bits_of_values_are_neither_searched_nor_rotated():
    options = {"scale_search": True, "rotate_values": True}
    fmt = KVFormat("kivi2", 80, 2, "bfloat16", v_bits=16, **options)
    assert fmt == KVFormat("kivi2", 80, 2, "bfloat16", v_bits=16)
    other = KVFormat("kivi2", 80, 2, "bfloat16", k_bits=16, **options)
    assert other.scale_search and other.rotate_values


def test_options_pass_bits_on():
    fmt = KiviOptions().format("kivi4", 128, 1, "bfloat16", k_bits=16, v_bits=2)
    assert (fmt.k_bits, fmt.v_bits, fmt.sink_tokens) == (16, 2, 4)


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=name_of)
def test_head_bytes_are_those_of_the_format(fmt):
    whole = fmt.element_bytes, fmt.page_bytes // fmt.num_kv_heads, fmt.full_page_bytes // fmt.num_kv_heads
    assert head_bytes(fmt.layout()) == whole


def documented_table() -> list[list[str]]:
    text = (ROOT / "docs" / "FORMAT.md").read_text()
    rows = re.findall(r"^\| (kivi\w+ .*) \|$", text, re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")] for row in rows]


def computed_table() -> list[list[str]]:
    """The rows of docs/FORMAT.md: bfloat16, 8 KV heads, pages of one group."""
    rows = []
    for preset, group_size, head_dim in itertools.product(PRESETS, GROUP_SIZES, HEAD_DIMS):
        fmt = KVFormat(preset, head_dim, 8, "bfloat16", group_size=group_size)
        compression = fmt.full_token_bytes / fmt.token_bytes
        unused = fmt.page_bytes - fmt.full_page_bytes
        hits = fmt.hit_step
        numbers = (group_size, head_dim, fmt.token_bytes, f"{fmt.bits_per_element:.2f}", f"{compression:.2f}")
        numbers += (fmt.page_bytes, fmt.full_page_tokens, unused, hits)
        rows.append([preset, *map(str, numbers)])
    return rows


def test_the_table_of_the_documentation():
    assert documented_table() == computed_table(), "docs/FORMAT.md is stale: run `python tests/test_format.py`"


def test_the_worked_example_of_the_documentation():
    """Token 5 of a page, KV head 1, channel 20: the only bytes of a page of zeros that are not 0."""
    fmt = KVFormat("kivi2", 64, 3, "bfloat16")
    k = torch.zeros(32, 3, 64, dtype=torch.bfloat16)
    k[5, 1, 20] = 3
    page = reference.pack_tile(fmt, k, k).flatten().tolist()
    key_bits, value_bits = 0b11 << 8 - 8, 0b11 << 18 - 16
    one = dict(enumerate(encoded(1.0, "bfloat16")))
    scales = {2088 + i: byte for i, byte in one.items()} | {2826 + i: byte for i, byte in one.items()}
    assert {i: byte for i, byte in enumerate(page) if byte} == {1685: key_bits, 2346: value_bits} | scales


def test_the_worked_example_of_kivi2_boost():
    """A quarter of the channels lose more than others: 79 to 110, of which channel 100 is j = 21."""
    fmt = KVFormat("kivi2_boost", 128, 1, "bfloat16", group_size=64)
    offsets = [offset for offset, _ in sections(fmt).values()]
    assert offsets == [0, 2048, 2560, 2816, 3072, 5120, 5376] and fmt.tile_bytes == 5632
    k = torch.zeros(64, 1, 128, dtype=torch.bfloat16)
    for d in range(79, 111):
        k[0, 0, d], k[1, 0, d] = 15, 7
    k[7, 0, 100] = 14
    tile = reference.pack_tile(fmt, k, torch.zeros_like(k)).flatten().tolist()
    boosted = [d for d in range(128) if tile[2560 + 2 * d + 1] & 0x80]
    assert boosted == list(range(79, 111)) and boosted.index(100) == 21
    assert tile[4 * 391 : 4 * 392] == [0, 0b11, 0, 0]
    assert tile[2048 + 4 * 67 : 2048 + 4 * 68] == [0, 0, 0, 0b10 << 26 - 24]


def test_format_is_pure_arithmetic():
    """It runs where neither torch nor vLLM is installed."""
    tree = ast.parse(Path(kivi_format.__file__).read_text())
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names


if __name__ == "__main__":
    print("\n".join(f"| {' | '.join(row)} |" for row in computed_table()))

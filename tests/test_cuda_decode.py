"""The CUDA decode kernel against float64 attention over what the pages hold; pages are filled on the CPU."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence

import pytest
import torch
from conftest import POISON, Pool, filled_pool, int32, starts
from test_decode import RATIOS, assert_exact, edge_lengths, queries
from torch import Tensor

from vllm_kivi import ops
from vllm_kivi.format import GROUP_SIZES, PRESETS, KVFormat

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

DEVICE = "cuda"
DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128, 256)


def decode(pool: Pool, query: Tensor, num_rows: Sequence[int], soft_cap: float = 0.0) -> Tensor:
    output = torch.full_like(query, 7.0).to(DEVICE)
    layout = pool.fmt.layout()
    workspace = ops.decode_workspace(layout, output.device)
    batch = starts(num_rows).to(DEVICE), int32(pool.seq_lens).to(DEVICE)
    rest = *pool.to(DEVICE).pages(), *batch, query.shape[-1] ** -0.5, soft_cap, layout, workspace
    ops.decode(output, query.to(DEVICE), *rest)
    first = output.cpu()
    ops.decode(output, query.to(DEVICE), *rest)  # The workspace is as it was.
    assert torch.equal(output.cpu().view(torch.int16), first.view(torch.int16))
    return first


def check(pool: Pool, query: Tensor, num_rows: Sequence[int], soft_cap: float = 0.0) -> Tensor:
    """Decodes and compares with the oracle; returns the output."""
    output = decode(pool, query, num_rows, soft_cap)
    assert_exact(pool, query, num_rows, output, soft_cap)
    return output


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_presets_and_shapes(group_size: int, preset: str, head_dim: int, dtype: str) -> None:
    rng = random.Random(f"{preset} {head_dim} {dtype} {group_size}")
    fmt = KVFormat(
        preset,
        head_dim,
        num_kv_heads=rng.randint(1, 2),
        dtype=dtype,
        group_size=group_size,
        residual_length=rng.choice((0, 32, 128)),
        sink_tokens=rng.choice((0, 4)),
        page_tokens=group_size * rng.randint(1, 2),
        rotate_values=rng.random() < 0.5,
        scale_search=rng.random() < 0.5,
        boosted_fraction=rng.choice((4, 8)) if preset == "kivi2_boost" else 0,
    )
    lengths = [*rng.sample(edge_lengths(fmt), 5), rng.randint(1000, 3000)]
    pool, _, _ = filled_pool(fmt, lengths, window=fmt.residual_length + group_size)
    check(pool, queries(fmt, 6, rng.choice(RATIOS)), [1] * 6)


@pytest.mark.parametrize("sink_tokens", [0, 4, 33])
@pytest.mark.parametrize("residual_length", [0, 32, 128])
def test_every_edge(residual_length: int, sink_tokens: int) -> None:
    fmt = KVFormat(
        "kivi2",
        128,
        num_kv_heads=1,
        dtype="float16",
        residual_length=residual_length,
        sink_tokens=sink_tokens,
        page_tokens=64,
    )
    lengths = edge_lengths(fmt)
    pool, _, _ = filled_pool(fmt, lengths, window=residual_length + fmt.group_size)
    check(pool, queries(fmt, len(lengths), 3), [1] * len(lengths))


@pytest.mark.parametrize("ratio", [*RATIOS, 8, 9, 16])
def test_ratios(ratio: int) -> None:
    fmt = KVFormat("kivi2", 128, num_kv_heads=2, dtype="bfloat16", residual_length=32)
    pool, _, _ = filled_pool(fmt, [150, 600])
    check(pool, queries(fmt, 2, ratio), [1, 1])


@pytest.mark.parametrize("num_rows", [2, 3, 5])
@pytest.mark.parametrize("residual_length", [0, 32])
def test_speculative_rows(residual_length: int, num_rows: int) -> None:
    """Each row has the boundary of its own length, also where one boundary lies between two rows of a step."""
    fmt = KVFormat("kivi2", 64, num_kv_heads=2, dtype="bfloat16", residual_length=residual_length, sink_tokens=4)
    lengths = [num_rows, 31, 32, 33, 34, 35, 36, 63, 64, 65, 66, 98, 130]
    counts = [min(num_rows, length) for length in lengths]
    counts[3] = 1
    pool, _, _ = filled_pool(fmt, lengths, window=residual_length + fmt.group_size + num_rows)
    check(pool, queries(fmt, sum(counts), 3), counts)


@pytest.mark.parametrize("dtype", DTYPES)
def test_soft_cap(dtype: str) -> None:
    fmt = KVFormat("kivi2", 64, num_kv_heads=2, dtype=dtype, residual_length=32, sink_tokens=4)
    pool, _, _ = filled_pool(fmt, [150, 600])
    for soft_cap in (0.5, 20.0):
        check(pool, queries(fmt, 2, 4), [1, 1], soft_cap)


def test_long_context() -> None:
    fmt = KVFormat("kivi2", 64, num_kv_heads=1, dtype="bfloat16", page_tokens=96)
    pool, _, _ = filled_pool(fmt, [131072, 33000], window=160)
    check(pool, queries(fmt, 2, 3), [1, 1])


@pytest.mark.parametrize("preset", ["kivi2", "kivi8"])
def test_full_precision_bypass(preset: str) -> None:
    for dtype in DTYPES:
        fmt = KVFormat(preset, 128, num_kv_heads=2, dtype=dtype, residual_length=32, sink_tokens=4, full_precision=True)
        pool, _, _ = filled_pool(fmt, [40, 333], window=64)
        check(pool, queries(fmt, 2, 3), [1, 1])


@pytest.mark.parametrize(
    ("side", "exponent"), [(side, x) for side in ("key", "value", "query") for x in (-30, -12, 12)] + [("value", 30)]
)
def test_magnitudes(side: str, exponent: int) -> None:
    """Keys, values and queries far from 1, in channels and tokens of very different size."""
    fmt = KVFormat("kivi2", 128, num_kv_heads=1, dtype="bfloat16", residual_length=32)
    pool, keys, values = filled_pool(fmt, [400])
    query = queries(fmt, 1, 4)
    if side == "query":
        query = query * 2.0**exponent
    else:
        x = keys[0] if side == "key" else values[0]
        x *= 2.0**exponent
        x[:, :, ::5] *= 2.0**-6
        rest = starts([400]), int32([400]), fmt.layout()
        ops.store(keys[0], values[0], *pool.pages(), *rest)
    if side == "value":  # relative to the size of values
        check(pool, query, [1])
    else:
        assert torch.isfinite(check(pool, query, [1])).all()


def test_bad_neighbours_stay_local() -> None:
    """NaN and inf among a request's tokens leave the others alone."""
    fmt = KVFormat("kivi2", 64, num_kv_heads=2, dtype="bfloat16", residual_length=32)
    lengths = [200, 200, 200]
    clean, keys, values = filled_pool(fmt, lengths)
    query = queries(fmt, 3, 3)
    expected = decode(clean, query, [1, 1, 1])
    keys[1][::7, :, ::3] = float("nan")
    values[1][3::11] = float("inf")
    pool = Pool(fmt, lengths)
    ops.store(torch.cat(keys), torch.cat(values), *pool.pages(), starts(lengths), int32(lengths), fmt.layout())
    output = decode(pool, query, [1, 1, 1])
    assert torch.equal(output[[0, 2]], expected[[0, 2]])


def test_unused_bytes_are_not_read() -> None:
    """Poison in all that no row may read: tokens behind the window and tiles past the boundary."""
    fmt = KVFormat("kivi2", 64, num_kv_heads=2, dtype="bfloat16", residual_length=32, sink_tokens=4, page_tokens=64)
    lengths = [150, 99]
    pool, _, _ = filled_pool(fmt, lengths)
    query = queries(fmt, 2, 3)
    expected = decode(pool, query, [1, 1])
    for request, length in enumerate(lengths):
        boundary, n = fmt.boundary(length), fmt.full_page_tokens
        for position in range(pool.full_table.shape[1] * n):
            block = pool.full_table[request, position // n]
            if block != 0 and not (position < 4 or boundary <= position < length):
                start = position % n * fmt.full_token_bytes
                pool.full[block, :, start : start + fmt.full_token_bytes] = POISON
        for position in range(0, pool.quantized_table.shape[1] * fmt.page_tokens, fmt.group_size):
            block = pool.quantized_table[request, position // fmt.page_tokens]
            start = position % fmt.page_tokens // fmt.group_size * fmt.tile_bytes
            if block != 0 and position >= boundary:
                pool.quantized[block, :, start : start + fmt.tile_bytes] = POISON
    pool.quantized[0], pool.full[0] = POISON, POISON
    assert torch.equal(decode(pool, query, [1, 1]), expected)


def test_sinks_are_not_read_quantized() -> None:
    """Of sinks, tile 0 may hold anything that store writes: codes, and the scales and zeros of values."""
    fmt = KVFormat("kivi2", 64, num_kv_heads=2, dtype="bfloat16", residual_length=32, sink_tokens=4)
    pool, keys, values = filled_pool(fmt, [150])
    outputs, tiles = [], []
    for other in (4, 8):  # the sinks as other tokens of their group, which leaves the scales of keys as they are
        quantized = Pool(fmt, [150])
        for x in (*keys, *values):
            x[:4] = x[other : other + 4]
        ops.store(keys[0], values[0], *quantized.pages(), starts([150]), int32([150]), fmt.layout())
        quantized.full = pool.full
        tiles.append(quantized.quantized[quantized.quantized_table[0, 0]])
        outputs.append(check(quantized, queries(fmt, 1, 3), [1]))
    assert not torch.equal(*tiles)
    assert torch.equal(*outputs)


@pytest.mark.parametrize(("num_requests", "num_kv_heads", "longest"), [(40, 2, 0), (150, 8, 90), (300, 1, 40)])
def test_many_requests(num_requests: int, num_kv_heads: int, longest: int) -> None:
    """More than a lane looks at, of equal and of other lengths; more items than a GPU has warps, which then share."""
    rng = random.Random(num_requests * num_kv_heads)
    fmt = KVFormat("kivi2", 64, num_kv_heads=num_kv_heads, dtype="bfloat16", residual_length=32)
    lengths = [rng.randint(1, longest) if longest else 200 for _ in range(num_requests)]
    pool, _, _ = filled_pool(fmt, lengths)
    check(pool, queries(fmt, num_requests, 2), [1] * num_requests)


def test_padding_rows_and_idle_requests() -> None:
    fmt = KVFormat("kivi2", 64, num_kv_heads=1, dtype="bfloat16")
    pool, _, _ = filled_pool(fmt, [50, 0, 70])
    query = queries(fmt, 5, 2)
    output = decode(pool, query, [1, 0, 1])
    assert (output[2:] == 7.0).all()
    check(pool, query[:2], [1, 0, 1])


def test_graph_replay_with_other_lengths() -> None:
    """One captured launch serves every later step."""
    fmt = KVFormat("kivi2", 128, num_kv_heads=2, dtype="bfloat16")
    lengths = [3000, 40, 700]
    pool, _, _ = filled_pool(fmt, lengths)
    query, layout, pages = queries(fmt, 3, 4).to(DEVICE), fmt.layout(), pool.to(DEVICE).pages()
    workspace = ops.decode_workspace(layout, query.device)
    output = torch.empty_like(query)
    start_loc, seq_lens = starts([1, 1, 1]).to(DEVICE), int32([0, 0, 0]).to(DEVICE)

    def run() -> None:
        ops.decode(output, query, *pages, start_loc, seq_lens, 128**-0.5, 0.0, layout, workspace)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for now in ([3000, 40, 700], [17, 1, 130], [2999, 39, 0]):
        seq_lens.copy_(int32(now))
        graph.replay()
        replayed = output.clone()
        run()
        kept = torch.tensor(now) > 0
        assert torch.equal(output[kept], replayed[kept])
        shorter = copy.copy(pool)
        shorter.seq_lens = now
        rows = int(kept.sum())  # those without tokens come last
        assert_exact(shorter, query[:rows].cpu(), kept.int().tolist(), output[:rows].cpu())

"""How a GPU prefills, on the CPU: the plan and the routing are our own, FlashAttention and the gather kernel are
stood in for by plain PyTorch, and the oracle is float64 attention over what the pages and the chunk hold."""

from __future__ import annotations

import random
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import Pool, filled_pool, int32, starts
from engines import assert_same, engine, generate, prompt, save_tiny_llama
from test_decode import queries
from test_prefill import chunks
from torch import Tensor

from vllm_kivi import ops, reference
from vllm_kivi.backend import heuristics, impl
from vllm_kivi.backend.prefill import GpuPrefill, plan, upload
from vllm_kivi.format import KVFormat
from vllm_kivi.options import PUBLISHED


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    softmax_scale: float,
    softcap: float,
    causal: bool,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """What flash_attn_varlen_func does: a causal mask is aligned to the last row and key of each sequence."""
    out = torch.empty_like(q) if out is None else out
    lse = torch.empty(q.shape[1], q.shape[0])
    for (a, b), (c, d) in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
        keys, values = (x[c:d].transpose(0, 1).repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (k, v))
        scores = q[a:b].transpose(0, 1).double() @ keys.double().transpose(1, 2) * softmax_scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        if causal:
            hidden = torch.ones(b - a, d - c, dtype=torch.bool).triu(d - c - (b - a) + 1)
            scores = scores.masked_fill(hidden, -torch.inf)
        out[a:b] = (scores.softmax(-1).nan_to_num(0) @ values.double()).transpose(0, 1).to(out.dtype)
        lse[:, a:b] = scores.logsumexp(-1)
    return out, lse


def gather(
    key: Tensor,
    value: Tensor,
    quantized_pages: Tensor,
    full_pages: Tensor,
    quantized_table: Tensor,
    full_table: Tensor,
    start_loc: Tensor,
    first: Tensor,
    boundary: Tensor,
    layout: list[int],
) -> None:
    """ops.gather by the reference, which refuses to read the null block."""
    fmt = reference._format(layout, key.dtype)
    for r, (a, b) in enumerate(pairwise(start_loc.tolist())):
        end, tables = int(first[r]) + b - a, (quantized_table[r], full_table[r])
        keys, values = reference.gather_dequantized(fmt, quantized_pages, full_pages, *tables, end, int(boundary[r]))
        key[a:b], value[a:b] = keys[end - (b - a) :].to(key.dtype), values[end - (b - a) :].to(value.dtype)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM on this CPU takes the route of a GPU."""
    platform = SimpleNamespace(is_cuda=lambda: True, get_device_capability=lambda: (9, 0), device_type="cpu")
    monkeypatch.setattr(heuristics, "current_platform", platform)
    monkeypatch.setattr(heuristics, "CUDA_DTYPES", ("float32",))
    monkeypatch.setattr(impl, "_flash_attention", lambda *_: flash_attention)
    monkeypatch.setattr(ops, "gather", gather)
    monkeypatch.setattr(ops, "decode_workspace", lambda *_: None)


def attend(
    pool: Pool, query: Tensor, key: Tensor, value: Tensor, num_rows: list[int], prompts: list[int], **how
) -> Any:
    fmt, capacity = pool.fmt, how.get("capacity", 1000)
    pieces = upload(plan(fmt, starts(num_rows).tolist(), pool.seq_lens, prompts, capacity), torch.device("cpu"))
    output = torch.full_like(query, 7.0)
    attention = GpuPrefill(fmt, 0.1, how.get("soft_cap", 0.0), flash_attention, torch.device("cpu"))
    attention(output, query, key, value, *pool.pages(), pieces)
    return output, pieces


@pytest.mark.parametrize("residual_length", [0, 5, 40, 128])
@pytest.mark.parametrize("seed", range(8))
def test_plan_against_float64(gpu: None, residual_length: int, seed: int) -> None:
    """Any mix of whole prompts, later chunks and recomputed tokens, cut at any place by the buffer's size."""
    rng = random.Random(f"{residual_length} {seed}")
    group_size = rng.choice((32, 64))
    sinks = rng.choice((0, 3, 40))
    fmt = KVFormat(
        "kivi2",
        64,
        num_kv_heads=2,
        dtype="float32",
        group_size=group_size,
        residual_length=residual_length,
        sink_tokens=sinks,
        page_tokens=group_size * rng.randint(1, 2),
    )
    lengths = [rng.choice((1, 31, 32, 33, 64, 95, 150, 290, 333)) for _ in range(rng.randint(1, 5))]
    num_rows = [rng.choice((length, rng.randint(1, length))) for length in lengths]
    prompts = [rng.choice((length, rng.randint(1, length))) for length in lengths]
    pool, keys, values = filled_pool(fmt, lengths, seed)
    n = fmt.full_page_tokens
    for row, length, count in zip(pool.full_table, lengths, num_rows, strict=True):
        # In a step a request has pages for its sinks and for the window before the chunk: all else is unreadable.
        before = length - count
        row[-(-max(before, sinks) // n) :] = 0
        row[-(-sinks // n) : min(fmt.boundary(before + 1), before) // n] = 0
    key, value = chunks(keys, num_rows), chunks(values, num_rows)
    query = queries(fmt, sum(num_rows), 3)
    soft_cap = rng.choice((0.0, 2.0))
    capacity = rng.choice((7, 64, 1000))
    output, pieces = attend(pool, query, key, value, num_rows, prompts, capacity=capacity, soft_cap=soft_cap)
    assert all(sum(piece.key_counts) <= capacity for piece in pieces if piece.keys is None)
    batch = starts(num_rows), int32(lengths), int32(prompts), 0.1, soft_cap, fmt.layout()
    exact = reference.prefill_float64(query, key, value, *pool.pages(), *batch)
    torch.testing.assert_close(output.double(), exact, atol=2e-5, rtol=0)


def test_a_cold_prefill_is_one_call() -> None:
    fmt = KVFormat("kivi2", 128, num_kv_heads=8, dtype="bfloat16")
    (piece,) = plan(fmt, [3, 1003, 9195], [1000, 8192], [1000, 8192])
    assert (piece.rows, piece.keys, piece.row_counts) == (slice(3, 9195), slice(3, 9195), [1000, 8192])


def test_pieces_of_context_fill_the_buffer() -> None:
    """Requests share a piece, and a long context takes several; one without context parts its neighbours."""
    fmt = KVFormat("kivi2", 128, num_kv_heads=8, dtype="bfloat16")
    lengths = [5000, 5000, 40_000, 100, 300]
    _, *context = plan(fmt, [0, 100, 200, 300, 400, 500], lengths, lengths)
    assert [sum(piece.key_counts) for piece in context] == [16_384] * 3 + [2 * 4900 + 39_900 - 3 * 16_384, 200]
    assert [piece.row_counts for piece in context] == [[100] * 3, [100], [100], [100], [100]]
    assert [piece.first for piece in context] == [[0, 0, 0], [6584], [22_968], [39_352], [0]]
    assert [piece.boundary[-1] for piece in context] == [fmt.boundary(39_901)] * 4 + [fmt.boundary(201)]
    assert [piece.requests.start for piece in context] == [0, 2, 2, 2, 4]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_llama(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("capacity", [100, 16_384])
def test_engine_equals_the_cpu_route(model, monkeypatch, request, capacity):
    """Chunked prefill, mixed batches, prefix hits and preemption: the same numbers on both routes."""
    settings = {
        "max_num_batched_tokens": 160,
        "num_gpu_blocks_override": 190,
        "max_model_len": 1024,
        "enable_prefix_caching": True,
        # Without a search, which takes another range for a difference of one rounding.
        "additional_config": {"kivi": PUBLISHED | {"sink_tokens": 5}},
    }
    prompts = [prompt(length, length) for length in (100, 101, 170, 190, 700, 700)]

    def run():
        with engine(model, **settings) as llm:
            scheduler = llm.llm_engine.engine_core.engine_core.scheduler
            preempted, stock = [], scheduler._preempt_request
            scheduler._preempt_request = lambda r, *args, **kwargs: (preempted.append(r), stock(r, *args, **kwargs))[1]
            return generate(llm, prompts, max_tokens=300), len(preempted)

    expected, preemptions = run()
    assert preemptions
    request.getfixturevalue("gpu")
    monkeypatch.setattr(plan, "__defaults__", (capacity,))
    outputs, again = run()
    assert again == preemptions
    for actual, wanted in zip(outputs, expected, strict=True):
        assert_same(actual, wanted)


def test_layers_share_what_they_take_in_turns() -> None:
    fmt, cpu = KVFormat("kivi2", 64, num_kv_heads=1, dtype="float32"), torch.device("cpu")
    first, second = (GpuPrefill(fmt, 1.0, 0.0, flash_attention, cpu) for _ in range(2))
    assert first._context is second._context
    key = next(key for key, value in heuristics._shared.items() if value is first._context)
    del first, second
    assert key not in heuristics._shared

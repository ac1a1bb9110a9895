"""Requests in pages, built the way vLLM would not: permuted blocks, strided pools, poison where nothing may be read."""

from __future__ import annotations

import copy
import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import support
import torch
from torch import Tensor

from vllm_kivi import ops
from vllm_kivi.format import KVFormat

# Engines of the tests run in this process: a start takes seconds instead of half a minute, and tests can look inside.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

# Bits of keys and values that are no preset's, but for the last: the bypass.
MIXTURES = ((16, 2), (2, 16), (8, 2), (2, 4), (4, 8), (16, 16))

POISON = 0xFF  # as bytes; as float32, bfloat16 and float16 it is NaN


@dataclass
class Pool:
    """Pages of both types for a few requests, whose tokens are stored by `store`.

    Every unused byte is poison, block ids are shuffled, and blocks and heads are further apart than they need to be.
    Full-precision pages hold the sinks and, with `window`, the last so many tokens, else all tokens.
    """

    fmt: KVFormat
    seq_lens: Sequence[int]
    seed: int = 0
    window: int | None = None
    padding: int = 32
    quantized: Tensor = field(init=False)  # uint8 [num_blocks, num_kv_heads, bytes]
    full: Tensor = field(init=False)
    quantized_table: Tensor = field(init=False)  # int32 [num_reqs, max_blocks]
    full_table: Tensor = field(init=False)

    def __post_init__(self) -> None:
        fmt, generator = self.fmt, torch.Generator().manual_seed(self.seed)

        def make(page_tokens: int, head_bytes: int) -> tuple[Tensor, Tensor]:
            pages = [-(-length // page_tokens) for length in self.seq_lens]
            num_blocks = sum(pages) + 3
            ids = (torch.randperm(num_blocks - 1, generator=generator) + 1).to(torch.int32)
            # A stride between rows that is not their length, as in a slice of vLLM's table.
            table = torch.zeros(len(pages), max([*pages, 1]) + 5, dtype=torch.int32)[:, :-3]
            for row, start, count in zip(table, [sum(pages[:i]) for i in range(len(pages))], pages, strict=True):
                row[:count] = ids[start : start + count]
            bytes_ = torch.full((num_blocks, fmt.num_kv_heads, head_bytes + self.padding), POISON, dtype=torch.uint8)
            return bytes_[:, :, :head_bytes], table

        self.quantized, self.quantized_table = make(fmt.page_tokens, fmt.page_tokens // fmt.group_size * fmt.tile_bytes)
        self.full, self.full_table = make(fmt.full_page_tokens, fmt.full_page_tokens * fmt.full_token_bytes)
        if self.window is not None:
            n = fmt.full_page_tokens
            for row, length in zip(self.full_table, self.seq_lens, strict=True):
                row[-(-fmt.sink_tokens // n) : max(length - self.window, 0) // n] = 0

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.fmt.dtype)

    def pages(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.quantized, self.full, self.quantized_table, self.full_table

    def to(self, device: torch.device | str) -> Pool:
        """A copy on that device, with every byte and every stride."""
        other = copy.copy(self)
        for name in ("quantized", "full", "quantized_table", "full_table"):
            tensor = getattr(self, name)
            copied = _memory(tensor).to(device, copy=True)
            setattr(other, name, copied.as_strided(tensor.shape, tensor.stride()))
        return other

    def clone(self) -> Pool:
        return self.to(self.full.device)

    def memory(self) -> tuple[Tensor, Tensor]:
        """Every byte of both pools, padding included."""
        return _memory(self.quantized), _memory(self.full)


def _memory(pages: Tensor) -> Tensor:
    return pages.as_strided((pages.shape[0] * pages.stride(0),), (1,), 0)


def starts(lengths: Sequence[int]) -> Tensor:
    """query_start_loc of requests with so many rows."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)


def int32(values: Sequence[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.int32)


def tokens(fmt: KVFormat, count: int, generator: torch.Generator) -> Tensor:
    """[count, num_kv_heads, head_dim] with channels of different size and offset, as keys have them."""
    shape = (count, fmt.num_kv_heads, fmt.head_dim)
    spread = torch.rand(shape[1:], generator=generator) * 2 + 0.2
    offset = torch.randn(shape[1:], generator=generator)
    return (torch.randn(shape, generator=generator) * spread + offset).to(getattr(torch, fmt.dtype))


def filled_pool(
    fmt: KVFormat, seq_lens: Sequence[int], seed: int = 0, window: int | None = None
) -> tuple[Pool, list[Tensor], list[Tensor]]:
    """A pool with all tokens stored by the kernel, and each request's keys and values."""
    generator = torch.Generator().manual_seed(seed + 1)
    pool = Pool(fmt, seq_lens, seed, window)
    keys = [tokens(fmt, length, generator) for length in seq_lens]
    values = [tokens(fmt, length, generator) for length in seq_lens]
    ops.store(torch.cat(keys), torch.cat(values), *pool.pages(), starts(seq_lens), int32(seq_lens), fmt.layout())
    return pool, keys, values


def op_arguments(fmt: KVFormat) -> tuple[Pool, dict[str, Any]]:
    """Two requests that prefill all they have, and by name what every op of torch.ops.vllm_kivi takes for them."""
    pool, keys, values = filled_pool(fmt, [70, 40])
    query = torch.randn(110, 3 * fmt.num_kv_heads, fmt.head_dim).to(pool.dtype)
    return pool, {
        "key": torch.cat(keys),
        "value": torch.cat(values),
        "output": torch.empty_like(query),
        "query": query,
        "quantized_pages": pool.quantized,
        "full_pages": pool.full,
        "quantized_block_table": pool.quantized_table,
        "full_block_table": pool.full_table,
        "query_start_loc": starts([70, 40]),
        "seq_lens": int32([70, 40]),
        "num_prompt_tokens": int32([70, 40]),
        "start_loc": starts([70, 40]),
        "first": int32([0, 0]),
        "boundary": int32([32, 0]),
        "scale": 0.125,
        "logits_soft_cap": 0.0,
        "layout": fmt.layout(),
        "workspace": None,
    }


def check_op(name: str, given: dict[str, Any]) -> None:
    """torch's own check of an op: schema (what is written to), fake implementation, and what torch.compile needs."""
    op = getattr(ops.load_extension(), name).default
    torch.library.opcheck(op, tuple(given[argument.name] for argument in op._schema.arguments))


def assert_as_exact_as_torch(
    output: Tensor,
    exact: Tensor,
    query: Tensor,
    context: Sequence[tuple[Tensor, Tensor]],
    scale: float,
    soft_cap: float = 0.0,
) -> None:
    """The error of `output` is at most twice that of PyTorch's own computation in the same dtype.

    Args:
        output, exact: [rows, num_heads, D] of the kernel and in float64.
        query: [rows, num_heads, D].
        context: of each row, the float64 keys and values [T, H, D] that it reads. PyTorch gets them in query's dtype
            and does every operation in it. What quantization lost is lost in them too, so no tolerance hides it.
    """
    own = torch.zeros_like(exact)
    for row, (keys, values) in enumerate(context):
        ratio = query.shape[1] // keys.shape[1]
        k, v = (x.to(query.dtype).transpose(0, 1).repeat_interleave(ratio, 0) for x in (keys, values))
        scores = (k @ query[row, :, :, None])[..., 0] * scale
        if soft_cap > 0:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        own[row] = (scores.softmax(-1)[:, None] @ v)[:, 0].double()
    assert torch.isfinite(output).all()
    for name, norm in (("largest", torch.max), ("mean", torch.mean)):
        error, bound = norm((output.double() - exact).abs()), 2 * norm((own - exact).abs())
        # A row of one token is exact in PyTorch; a rounding or two of float32 is not an error of the kernel.
        assert error <= bound + 2e-7 * norm(exact.abs()), f"{name} error {error:.3g}, PyTorch's own {bound / 2:.3g}"


# Files that take longest begin first: `make test` runs two side by side, and a long one should not be left alone.
LONGEST = tuple(
    f"test_{name}.py"
    for name in (
        "engine_processes",
        "models",
        "server",
        "ray",
        "engine",
        "cli",
        "decoding",
        "drafters",
        "triton",
        "transformers",
    )
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(ranks)))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that the README's support matrix names fails where it is skipped."""
    report = yield
    test = f"{item.path.name}::{item.name}"
    if report.skipped and not {test, test.partition("[")[0]}.isdisjoint(support.claimed()):
        report.outcome = "failed"
        report.longrepr = f"README's support matrix names {test}, which was skipped: {report.longrepr}"
    return report


@pytest.fixture(params=["avx512", "avx2", "portable"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test with each set of CPU kernels that this machine can run."""
    best = ops.set_isa()
    try:
        ops.set_isa(request.param)
    except RuntimeError:
        pytest.skip(f"no {request.param} on this CPU")
    yield request.param
    ops.set_isa(best)


__all__ = [
    "MIXTURES",
    "POISON",
    "Pool",
    "assert_as_exact_as_torch",
    "check_op",
    "filled_pool",
    "int32",
    "op_arguments",
    "starts",
    "tokens",
]

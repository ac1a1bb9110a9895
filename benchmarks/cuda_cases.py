"""What the CUDA benchmarks share: cases, requests in pages, and times of calls that are captured in one graph."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vllm_kivi import ops
from vllm_kivi.format import PRESETS, KVFormat
from vllm_kivi.options import KiviOptions

DEVICE = torch.device("cuda")


def add_format_arguments(parser: argparse.ArgumentParser) -> None:
    """The cache, by the names of vLLM's and this plugin's options."""
    parser.add_argument("--preset", choices=PRESETS, default="kivi2")
    parser.add_argument(
        "--additional-config",
        type=json.loads,
        default={},
        metavar="JSON",
        help="""as for vllm serve, e.g. '{"kivi": {"group_size": 64}}'; what is not named has the preset's default""",
    )


def format_of(args: argparse.Namespace, head_dim: int, num_kv_heads: int) -> tuple[KVFormat, str]:
    """A bfloat16 layer of it, and what to call it in a title: G, R and S are group, residual and sinks in tokens."""
    fmt = KiviOptions.from_additional_config(args.additional_config).format(
        args.preset, head_dim, num_kv_heads, "bfloat16"
    )
    parts = [fmt.preset, f"G {fmt.group_size}", f"R {fmt.residual_length}", f"S {fmt.sink_tokens}"]
    parts += [f"1/{fmt.boosted_fraction} boosted"] * bool(fmt.boosted_channels)
    parts += ["searched"] * fmt.scale_search + ["rotated"] * fmt.rotate_values
    return fmt, " ".join(parts)


@dataclass(frozen=True)
class Case:
    """One call of attention: every request has `rows` new tokens, the last of its `tokens`."""

    requests: int
    tokens: int
    rows: int = 1
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128

    def __str__(self) -> str:
        return f"{self.requests} x {self.tokens:,}"

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values [requests * tokens, kv_heads, head_dim], queries [requests * rows, heads, head_dim]."""
        key, value = (
            torch.randn(self.requests * self.tokens, self.kv_heads, self.head_dim, dtype=torch.bfloat16, device=DEVICE)
            for _ in "kv"
        )
        query = torch.randn(self.requests * self.rows, self.heads, self.head_dim, dtype=torch.bfloat16, device=DEVICE)
        return key, value, query

    def sample(self) -> list[int]:
        """Some rows of a request: both ends and the middle."""
        return sorted({0, self.rows // 3, self.rows // 2, self.rows - 1})


def relative_error(output: Tensor, query: Tensor, key: Tensor, value: Tensor, case: Case) -> float:
    """How far sampled rows of the last request are from float64 attention: the largest ||difference|| / ||exact|| of a
    row and head.

    Args:
        output, query: [requests * rows, heads, head_dim].
        key, value: of the last request, [tokens, kv_heads, head_dim].
    """
    worst = 0.0
    query, keys, values = (x.float().double() for x in (query, key, value))  # all dtypes convert to float32
    for row in case.sample():
        index = len(query) - case.rows + row
        length = case.tokens - case.rows + row + 1
        grouped = query[index].unflatten(0, (case.kv_heads, -1))
        scores = torch.einsum("hrd,thd->hrt", grouped, keys[:length]) * case.scale
        exact = torch.einsum("hrt,thd->hrd", scores.softmax(-1), values[:length]).flatten(0, 1)
        difference = (output[index].double() - exact).norm(dim=-1) / exact.norm(dim=-1)
        worst = max(worst, difference.max().nan_to_num(torch.inf).item())
    return worst


def table_of(num_requests: int, pages: int) -> Tensor:
    """A shuffled block table, int32 [num_requests, pages]; block 0 stays unused."""
    blocks = torch.randperm(num_requests * pages, device=DEVICE) + 1
    return blocks.to(torch.int32).view(num_requests, pages)


class Pages:
    """Requests of equal length whose tokens are stored, with full-precision pages for sinks and windows only: the last,
    and that before a chunk of `chunk` tokens."""

    def __init__(self, fmt: KVFormat, num_requests: int, num_tokens: int, chunk: int = 0) -> None:
        n, window = fmt.full_page_tokens, fmt.residual_length + fmt.group_size
        self.fmt, self.num_requests, self.num_tokens = fmt, num_requests, num_tokens
        self.quantized_table = table_of(num_requests, -(-num_tokens // fmt.page_tokens))
        parts = [(0, min(fmt.sink_tokens, num_tokens))]
        parts += [(max(end - window, 0), end) for end in (num_tokens - chunk, num_tokens)]
        kept = sorted({page for start, end in parts for page in range(start // n, -(-end // n))})
        self.full_table = torch.zeros(num_requests, -(-num_tokens // n), dtype=torch.int32, device=DEVICE)
        self.full_table[:, kept] = table_of(num_requests, len(kept))
        head_bytes = fmt.page_bytes // fmt.num_kv_heads
        self.quantized, self.full = (
            torch.zeros(count + 1, fmt.num_kv_heads, head_bytes, dtype=torch.uint8, device=DEVICE)
            for count in (self.quantized_table.numel(), self.full_table.count_nonzero().item())
        )
        self.seq_lens = torch.full((num_requests,), num_tokens, dtype=torch.int32, device=DEVICE)
        self.query_start_loc = torch.arange(num_requests + 1, dtype=torch.int32, device=DEVICE)

    def pages(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.quantized, self.full, self.quantized_table, self.full_table

    def fill(self, key: Tensor, value: Tensor) -> None:
        """key, value: [num_requests * num_tokens, num_kv_heads, head_dim]"""
        starts = self.query_start_loc * self.num_tokens
        ops.store(key, value, *self.pages(), starts, self.seq_lens, self.fmt.layout())

    def bytes_read(self) -> int:
        boundary = self.fmt.boundary(self.num_tokens)
        quantized = max(boundary - self.fmt.sink_tokens, 0)
        token = quantized * self.fmt.token_bytes + (self.num_tokens - quantized) * self.fmt.full_token_bytes
        return self.num_requests * self.fmt.num_kv_heads * token


def microseconds(call: Callable[[], object], calls: int = 10, repeats: int = 25) -> float:
    """Median time of a call among `calls` in one CUDA graph, which begins with other data in the L2 cache."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # what the call reads may still be being written
    with torch.cuda.stream(stream):
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                call()
    other = torch.empty(64 << 20, dtype=torch.int32, device=DEVICE)
    times = []
    for _ in range(repeats):
        other.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / calls)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes a microsecond, read and written, of a kernel that streams through memory."""
    source = torch.ones(1 << 28, dtype=torch.float32, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / microseconds(lambda: torch.neg(source, out=target), calls=3, repeats=10)

"""What the CUDA benchmarks share: requests in pages, and times of calls that are captured in one graph."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from vllm_kivi import ops
from vllm_kivi.format import KVFormat

DEVICE = torch.device("cuda")


def table_of(num_requests: int, pages: int) -> Tensor:
    """A shuffled block table, int32 [num_requests, pages]; block 0 stays unused."""
    blocks = torch.randperm(num_requests * pages, device=DEVICE) + 1
    return blocks.to(torch.int32).view(num_requests, pages)


class Pages:
    """Requests of equal length whose tokens are stored, with full-precision pages for the window only."""

    def __init__(self, fmt: KVFormat, num_requests: int, num_tokens: int) -> None:
        n, window = fmt.full_page_tokens, fmt.residual_length + fmt.group_size
        self.fmt, self.num_requests, self.num_tokens = fmt, num_requests, num_tokens
        self.quantized_table = table_of(num_requests, -(-num_tokens // fmt.page_tokens))
        pages = -(-num_tokens // n)
        kept = min(pages, -(-window // n) + 1)
        self.full_table = torch.zeros(num_requests, pages, dtype=torch.int32, device=DEVICE)
        self.full_table[:, pages - kept :] = table_of(num_requests, kept)
        head_bytes = fmt.page_bytes // fmt.num_kv_heads
        self.quantized, self.full = (
            torch.zeros(count + 1, fmt.num_kv_heads, head_bytes, dtype=torch.uint8, device=DEVICE)
            for count in (self.quantized_table.numel(), num_requests * kept)
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
        token = boundary * self.fmt.token_bytes + (self.num_tokens - boundary) * self.fmt.full_token_bytes
        return self.num_requests * self.fmt.num_kv_heads * token


def microseconds(call: Callable[[], object], calls: int = 10, repeats: int = 25) -> float:
    """Median time of a call among `calls` in one CUDA graph, which begins with other data in the L2 cache."""
    stream = torch.cuda.Stream()
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

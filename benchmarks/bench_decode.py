"""Is decode attention over kivi pages faster than vLLM's own over a bfloat16 cache, on this CPU?

Runs torch.ops.vllm_kivi.decode and vLLM's CPU_ATTN kernel on the same requests and prints one table, which also goes to
benchmarks/results/<machine>.md. As between the layers of a model, every call reads another cache, and all of them are
larger together than the last-level cache, so both kernels read from memory. Calls of the two alternate: what disturbs
one disturbs the other. Both are compared with float64 attention before anything is timed.

    python benchmarks/bench_decode.py [--preset kivi2] [--tokens 2048 8192] [--requests 1 8] [--threads 2] ...
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from report import cpu_info
from torch import Tensor
from vllm import __version__ as vllm_version
from vllm import _custom_ops as vllm_ops
from vllm.platforms import current_platform
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_kivi import ops, reference
from vllm_kivi.format import PRESETS, KVFormat

BLOCK_SIZE = 128  # vLLM's default on the CPU
MIN_LAYERS = 30


def table_of(num_requests: int, pages: int) -> Tensor:
    """A shuffled block table, int32 [num_requests, pages]; block 0 stays unused."""
    return (torch.randperm(num_requests * pages) + 1).to(torch.int32).view(num_requests, pages)


class Case:
    """`requests` requests of `tokens` tokens, and one decode call of either kernel on layer i."""

    def __init__(self, args: argparse.Namespace, tokens: int, requests: int, cache_bytes: int) -> None:
        fmt = KVFormat(
            args.preset,
            args.head_dim,
            args.kv_heads,
            "bfloat16",
            group_size=args.group_size,
            residual_length=args.residual_length,
            sink_tokens=args.sink_tokens,
        )
        self.fmt, self.tokens, self.requests = fmt, tokens, requests
        read_quantized = max(fmt.boundary(tokens) - fmt.sink_tokens, 0)
        self.kivi_bytes = (
            requests
            * fmt.num_kv_heads
            * (read_quantized * fmt.token_bytes + (tokens - read_quantized) * fmt.full_token_bytes)
        )
        self.bf16_bytes = requests * fmt.num_kv_heads * tokens * fmt.full_token_bytes
        self.layers = max(MIN_LAYERS, -(-2 * cache_bytes // self.kivi_bytes))
        self.scale = args.head_dim**-0.5
        self.query = torch.randn(requests, args.heads, args.head_dim).bfloat16()
        self.output = torch.empty_like(self.query)
        self.query_start_loc = torch.arange(requests + 1, dtype=torch.int32)
        self.seq_lens = torch.full((requests,), tokens, dtype=torch.int32)
        shape = (requests * tokens, args.kv_heads, args.head_dim)
        key, value = torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()
        rows = self.query_start_loc * tokens
        self.build_kivi(key, value, rows)
        self.build_bf16(key, value, rows)
        self.keys, self.values = (x[:tokens].double() for x in (key, value))

    def build_kivi(self, key: Tensor, value: Tensor, rows: Tensor) -> None:
        fmt = self.fmt
        self.tables = [table_of(self.requests, -(-self.tokens // n)) for n in (fmt.page_tokens, fmt.full_page_tokens)]
        pools = []
        for table in self.tables:
            shape = (table.numel() + 1, fmt.num_kv_heads, fmt.page_bytes // fmt.num_kv_heads)
            pools.append(torch.zeros(shape, dtype=torch.uint8))
        ops.store(key, value, *pools, *self.tables, rows, self.seq_lens, fmt.layout())
        # As in the engine, only sinks and the window keep their pages, so layers share a pool of the rest.
        self.pools = [(pools[0].clone(), pools[1].clone()) for _ in range(self.layers)]

    def build_bf16(self, key: Tensor, value: Tensor, rows: Tensor) -> None:
        fmt = self.fmt
        self.isa = _get_attn_isa(torch.bfloat16, BLOCK_SIZE, fmt.head_dim)
        self.block_table = table_of(self.requests, -(-self.tokens // BLOCK_SIZE))
        shape = (self.block_table.numel() + 1, fmt.num_kv_heads, 2 * BLOCK_SIZE, fmt.head_dim)
        cache = torch.zeros(shape, dtype=torch.bfloat16)
        position = torch.arange(self.tokens)
        slots = self.block_table[:, position // BLOCK_SIZE].long() * BLOCK_SIZE + position % BLOCK_SIZE
        vllm_ops.cpu_attn_reshape_and_cache(key, value, *cache.chunk(2, dim=2), slots.flatten(), self.isa)
        self.caches = [cache.clone().chunk(2, dim=2) for _ in range(self.layers)]
        self.metadata = vllm_ops.cpu_attn_get_scheduler_metadata(
            num_reqs=self.requests,
            num_heads=self.query.shape[1],
            num_kv_heads=fmt.num_kv_heads,
            head_dim=fmt.head_dim,
            seq_lens=self.seq_lens,
            dtype=torch.bfloat16,
            query_start_loc=self.query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=True,
        )

    def kivi(self, layer: int) -> None:
        batch = self.query_start_loc, self.seq_lens, self.scale, 0.0, self.fmt.layout()
        ops.decode(self.output, self.query, *self.pools[layer], *self.tables, *batch)

    def bf16(self, layer: int) -> None:
        vllm_ops.cpu_attention_with_kv_cache(
            query=self.query,
            key_cache=self.caches[layer][0],
            value_cache=self.caches[layer][1],
            output=self.output,
            query_start_loc=self.query_start_loc,
            seq_lens=self.seq_lens,
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self.block_table,
            softcap=0,
            scheduler_metadata=self.metadata,
            s_aux=None,
        )

    def check(self) -> None:
        """The first request of both kernels against float64 attention over what each one reads."""
        tables = [table[:1] for table in self.tables]
        batch = self.query_start_loc[:2], self.seq_lens[:1], self.scale, 0.0, self.fmt.layout()
        self.kivi(0)
        exact = reference.decode_float64(self.query[:1], *self.pools[0], *tables, *batch)
        torch.testing.assert_close(self.output[:1].double(), exact, rtol=2e-2, atol=2e-3)
        self.bf16(0)
        query = self.query[:1].double().transpose(0, 1)
        keys, values = self.keys.transpose(0, 1), self.values.transpose(0, 1)
        exact = torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
        torch.testing.assert_close(self.output[:1].double(), exact.transpose(0, 1), rtol=2e-2, atol=2e-3)

    def seconds(self, budget: float) -> tuple[float, float]:
        """Median time of one call of each kernel."""
        times: tuple[list[float], list[float]] = ([], [])
        end = time.perf_counter() + budget
        while not times[0] or time.perf_counter() < end:
            for layer in range(self.layers):
                for kernel, record in zip((self.kivi, self.bf16), times, strict=True):
                    record.append(timed(kernel, layer))
        return statistics.median(times[0]), statistics.median(times[1])


def timed(kernel: Callable[[int], None], layer: int) -> float:
    start = time.perf_counter()
    kernel(layer)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="kivi2")
    parser.add_argument("--heads", type=int, default=9, help="query heads; the defaults are SmolLM2-135M's")
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--residual-length", type=int, default=128)
    parser.add_argument("--sink-tokens", type=int, default=0)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=5.0, help="time to measure each case")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<machine>.md")
    args = parser.parse_args()
    current_platform.import_kernels()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)

    name, cache_bytes = cpu_info()
    lines = [
        f"# Decode attention on {name}, {args.threads} threads",
        "",
        f"{args.heads} query heads, {args.kv_heads} KV heads, head_dim {args.head_dim}, bfloat16; {args.preset} with "
        f"group_size {args.group_size}, residual_length {args.residual_length}, sink_tokens {args.sink_tokens}, "
        f"{ops.set_isa()} kernels. torch {torch.__version__}, vLLM {vllm_version}. Made by benchmarks/bench_decode.py.",
        "",
        f"| requests x tokens | CPU_ATTN bf16, us | GB/s | {args.preset}, us | GB/s | times faster |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for requests in args.requests:
        for tokens in args.tokens:
            case = Case(args, tokens, requests, cache_bytes)
            case.check()
            kivi, bf16 = case.seconds(args.seconds)
            lines.append(
                f"| {requests} x {tokens:,} | {bf16 * 1e6:,.0f} | {case.bf16_bytes / bf16 / 1e9:.1f} "
                f"| {kivi * 1e6:,.0f} | {case.kivi_bytes / kivi / 1e9:.1f} | {bf16 / kivi:.2f} |"
            )
            print(lines[-1], flush=True)
    machine = re.sub(r"[^a-z0-9]+", "-", f"{name} {args.threads} threads".lower()).strip("-")
    output = args.output or Path(__file__).parent / "results" / f"{machine}.md"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

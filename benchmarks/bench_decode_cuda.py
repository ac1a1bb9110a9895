"""How close is decode over kivi pages to the memory limit of this GPU, and how much faster than FlashAttention?

Runs torch.ops.vllm_kivi.decode, and vLLM's FlashAttention over bfloat16 and fp8 pages, on the same requests; prints one
table, which also goes to benchmarks/results/<device>.md. The limit is the bytes that decode must read at the bandwidth
of a large copy. Decode is compared with float64 attention over its dequantized pages before it is timed.

    python benchmarks/bench_decode_cuda.py [--preset kivi2] [--head-dim 128] [--output FILE]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from cuda_cases import DEVICE, Pages, copy_bandwidth, microseconds, table_of
from report import write_section
from torch import Tensor
from vllm import __version__ as vllm_version
from vllm.vllm_flash_attn import flash_attn_varlen_func

from vllm_kivi import ops
from vllm_kivi.format import PRESETS, KVFormat

# requests, tokens, query heads, KV heads
CASES = (
    (32, 8192, 32, 8),
    (8, 32768, 32, 8),
    (64, 2048, 32, 8),
    (64, 512, 32, 8),
    (1, 131072, 32, 8),
    (32, 8192, 28, 4),
    (8, 8192, 32, 32),
)
BLOCK_SIZE = 16  # vLLM's default


def check(pages: Pages, query: Tensor, output: Tensor, scale: float) -> None:
    """The last request against float64 attention over what its pages hold."""
    fmt, length = pages.fmt, pages.num_tokens
    key, value = (torch.empty(length, fmt.num_kv_heads, fmt.head_dim, dtype=query.dtype, device=DEVICE) for _ in "kv")
    last = slice(pages.num_requests - 1, pages.num_requests)
    tables = pages.quantized_table[last], pages.full_table[last]
    one = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in ([0, length], [0], [fmt.boundary(length)])]
    ops.gather(key, value, pages.quantized, pages.full, *tables, *one, fmt.layout())
    grouped = query[-1].double().unflatten(0, (fmt.num_kv_heads, -1))
    scores = torch.einsum("hrd,thd->hrt", grouped, key.double()) * scale
    exact = torch.einsum("hrt,thd->hrd", scores.softmax(-1), value.double()).flatten(0, 1)
    torch.testing.assert_close(output[-1].double(), exact, rtol=2e-2, atol=4e-3)


def inputs(case: tuple[int, int, int, int], head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [requests * tokens, num_kv_heads, head_dim] and queries [requests, num_heads, head_dim]."""
    num_requests, num_tokens, num_heads, num_kv_heads = case
    shapes = [(num_requests * num_tokens, num_kv_heads)] * 2 + [(num_requests, num_heads)]
    key, value, query = (torch.randn(*shape, head_dim, dtype=torch.bfloat16, device=DEVICE) for shape in shapes)
    return key, value, query


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, num_requests: int, dtype: torch.dtype
) -> Callable[[], None]:
    """A call of FlashAttention over pages of this dtype."""
    num_tokens = len(key) // num_requests
    pages = -(-num_tokens // BLOCK_SIZE)
    table = table_of(num_requests, pages)
    key_cache, value_cache = (
        torch.zeros(table.numel() + 1, BLOCK_SIZE, *x.shape[1:], dtype=dtype, device=DEVICE) for x in (key, value)
    )
    blocks = table.flatten().long()
    for cache, x in ((key_cache, key), (value_cache, value)):
        cache[blocks] = x.view(-1, BLOCK_SIZE, *x.shape[1:]).to(dtype)
    starts = torch.arange(num_requests + 1, dtype=torch.int32, device=DEVICE)
    lengths = torch.full((num_requests,), num_tokens, dtype=torch.int32, device=DEVICE)
    output = torch.empty_like(query)
    descale = torch.ones(num_requests, key.shape[1], device=DEVICE) if dtype != query.dtype else None
    given = query if descale is None else query.to(dtype)

    def call() -> None:
        flash_attn_varlen_func(
            q=given,
            k=key_cache,
            v=value_cache,
            out=output,
            cu_seqlens_q=starts,
            max_seqlen_q=1,
            seqused_k=lengths,
            max_seqlen_k=num_tokens,
            softmax_scale=query.shape[-1] ** -0.5,
            causal=True,
            block_table=table,
            fa_version=3,
            q_descale=descale,
            k_descale=descale,
            v_descale=descale,
        )

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="kivi2")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--residual-length", type=int, default=128)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>.md")
    args = parser.parse_args()
    torch.manual_seed(0)
    device = torch.cuda.get_device_name()
    bandwidth = copy_bandwidth()
    rows = []
    for case in CASES:
        num_requests, num_tokens, num_heads, num_kv_heads = case
        fmt = KVFormat(
            args.preset,
            args.head_dim,
            num_kv_heads,
            "bfloat16",
            group_size=args.group_size,
            residual_length=args.residual_length,
        )
        key, value, query = inputs(case, args.head_dim)
        pages = Pages(fmt, num_requests, num_tokens)
        pages.fill(key, value)
        output, layout, scale = torch.empty_like(query), fmt.layout(), args.head_dim**-0.5
        workspace = ops.decode_workspace(layout, DEVICE)
        batch = pages.query_start_loc, pages.seq_lens, scale, 0.0, layout, workspace

        def kivi(output: Tensor = output, query: Tensor = query, pages: Pages = pages, batch: tuple = batch) -> None:
            ops.decode(output, query, *pages.pages(), *batch)

        kivi()
        check(pages, query, output, scale)
        own, bf16 = microseconds(kivi), microseconds(flash_attention(query, key, value, num_requests, torch.bfloat16))
        rows.append([own, bf16, None, pages.bytes_read()])
        print(f"{case}: {own:.1f} us, FA3 bf16 {bf16:.1f} us", flush=True)
    for case, row in zip(CASES, rows, strict=True):
        key, value, query = inputs(case, args.head_dim)
        try:  # last, since a kernel that a build of FlashAttention lacks ends the process' use of the GPU
            row[2] = microseconds(flash_attention(query, key, value, case[0], torch.float8_e4m3fn))
        except RuntimeError as error:
            print(f"fp8 at {case}: {error}")
            break
    lines = [
        f"{args.preset}, head_dim {args.head_dim}, group_size {args.group_size}, residual_length "
        f"{args.residual_length}, bfloat16 queries; the limit is at {bandwidth / 1e3:,.0f} GB/s. torch "
        f"{torch.__version__}, vLLM {vllm_version}. Made by benchmarks/bench_decode_cuda.py.",
        "",
        f"| requests x tokens | heads | FA3 bf16, us | FA3 fp8, us | {args.preset}, us | limit, us | GB/s "
        "| faster than bf16 | than fp8 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (num_requests, num_tokens, num_heads, num_kv_heads), (own, bf16, fp8, num_bytes) in zip(
        CASES, rows, strict=True
    ):
        fp8_time, fp8_ratio = ("-", "-") if fp8 is None else (f"{fp8:.0f}", f"{fp8 / own:.2f}")
        lines.append(
            f"| {num_requests} x {num_tokens:,} | {num_heads}/{num_kv_heads} | {bf16:.0f} | {fp8_time} | {own:.1f} "
            f"| {num_bytes / bandwidth:.1f} | {num_bytes / own / 1e3:,.0f} | {bf16 / own:.2f} | {fp8_ratio} |"
        )
    print("\n".join([device, *lines]))
    write_section(device, f"Decode attention, {args.preset}", lines, args.output)


if __name__ == "__main__":
    main()

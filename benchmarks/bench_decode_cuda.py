"""How close is decode over kivi pages to the memory limit of this GPU, and how much faster than other kernels?

Runs torch.ops.vllm_kivi.decode, vLLM's FlashAttention 3 over bfloat16 and fp8 pages, and xformers' triton_splitk over
int4 pages if xformers is installed, on requests of the same sizes; prints one table, which also goes to
benchmarks/results/<device>.md. The limit is the bytes that decode must read at the bandwidth of a large copy. Every
kernel is compared with float64 attention over what its pages hold before it is timed.

    python benchmarks/bench_decode_cuda.py [--preset kivi2] [--head-dim 128] [--output FILE]
    python benchmarks/bench_decode_cuda.py --sweep 512 2048 8192 32768 131072 --requests 32    # a plot against context
"""

from __future__ import annotations

import argparse
from pathlib import Path

import baselines
import torch
from cuda_cases import DEVICE, Case, Pages, add_format_arguments, copy_bandwidth, format_of, microseconds
from report import Column, Section
from torch import Tensor
from vllm import __version__ as vllm_version

from vllm_kivi import ops

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
BASELINES = {"bfloat16": "FA3 bf16", "fp8": "FA3 fp8", "int4": "triton_splitk int4"}


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


def measure(case: Case, args: argparse.Namespace) -> tuple[float, int]:
    """Time in us of a call of decode, and the bytes that it reads."""
    fmt, _ = format_of(args, case.head_dim, case.kv_heads)
    key, value, query = case.inputs()
    pages = Pages(fmt, case.requests, case.tokens)
    pages.fill(key, value)
    del key, value
    output, layout = torch.empty_like(query), fmt.layout()
    batch = pages.query_start_loc, pages.seq_lens, case.scale, 0.0, layout, ops.decode_workspace(layout, DEVICE)

    def decode() -> None:
        ops.decode(output, query, *pages.pages(), *batch)

    decode()
    check(pages, query, output, case.scale)
    return microseconds(decode), pages.bytes_read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_format_arguments(parser)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--sweep", type=int, nargs="+", metavar="TOKENS", help="contexts, instead of the usual cases")
    parser.add_argument("--requests", type=int, default=32, help="of each context of --sweep")
    parser.add_argument("--baselines", nargs="*", choices=BASELINES, default=list(BASELINES))
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>.md")
    args = parser.parse_args()
    sizes = [(args.requests, tokens, 32, 8) for tokens in args.sweep] if args.sweep else CASES
    cases = [Case(n, tokens, 1, heads, kv_heads, args.head_dim) for n, tokens, heads, kv_heads in sizes]
    others = {name: baselines.measure(cases, name) for name in args.baselines}
    torch.manual_seed(0)
    bandwidth = copy_bandwidth()
    _, name = format_of(args, args.head_dim, num_kv_heads=8)
    variant = "" if args.head_dim == 128 else f", head_dim {args.head_dim}"
    against = f" against context, {args.requests} requests" if args.sweep else ""
    section = Section(
        f"Decode attention{against}, {name}{variant}",
        f"{name}, head_dim {args.head_dim}, bfloat16 queries; the limit is at {bandwidth / 1e3:,.0f} GB/s. torch "
        f"{torch.__version__}, vLLM {vllm_version}. Made by benchmarks/bench_decode_cuda.py.",
        (
            Column("name", "requests x tokens"),
            Column("heads", "heads"),
            *(Column(name, f"{BASELINES[name]}, us", ".0f") for name in args.baselines),
            Column("kivi", f"{args.preset}, us", ".1f"),
            Column("limit", "limit, us", ".1f"),
            Column("gb_per_s", "GB/s", ",.0f"),
            *(Column(f"over_{name}", f"faster than {BASELINES[name]}", ".2f") for name in args.baselines),
        ),
        {
            "kind": "lines",
            "x": "tokens",
            "x_label": f"tokens of context, {args.requests} requests",
            "y_label": "us a layer for one token of each request",
            "series": {BASELINES[name]: name for name in args.baselines}
            | {args.preset: "kivi", "memory limit": "limit"},
            "log": True,
        }
        if args.sweep
        else None,
    )
    for index, case in enumerate(cases):
        own, num_bytes = measure(case, args)
        row = {
            "name": str(case),
            "tokens": case.tokens,
            "heads": f"{case.heads}/{case.kv_heads}",
            "kivi": own,
            "limit": num_bytes / bandwidth,
            "gb_per_s": num_bytes / own / 1e3,
        }
        for name, found in others.items():
            row[name] = time = found[index].attention
            row[f"over_{name}"] = None if time is None else time / own
        section.add(row)
        torch.cuda.empty_cache()
    for name, found in others.items():
        for note in baselines.notes(BASELINES[name], cases, found):
            section.note(note)
    section.write(torch.cuda.get_device_name(), args.output)


if __name__ == "__main__":
    main()

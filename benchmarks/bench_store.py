"""What does writing the cache cost on this GPU: in a decode step, when groups complete, and in prefill?

Runs torch.ops.vllm_kivi.store on rows of a Llama-3.1-8B layer and prints one table, which also goes to
benchmarks/results/<device>.md. Before it is timed, what it wrote is compared with the reference, byte for byte.

    python benchmarks/bench_store.py [--preset kivi2] [--additional-config JSON] [--output FILE]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from cuda_cases import DEVICE, Pages, add_format_arguments, format_of, microseconds
from report import Column, Section

from vllm_kivi import ops, reference

# title, requests, rows of each, tokens of each with them
CASES = (
    ("decode, no group completes", 32, 1, 8193),
    ("decode, 1 of 32 requests completes a group", 32, 1, None),
    ("decode, all requests complete a group", 32, 1, 8192),
    ("prefill of 8,192 tokens", 1, 8192, 8192),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_format_arguments(parser)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>.md")
    args = parser.parse_args()
    torch.manual_seed(0)
    fmt, name = format_of(args, head_dim=128, num_kv_heads=8)
    section = Section(
        f"Store, {name}",
        f"{name}, 8 KV heads of 128, bfloat16. Made by benchmarks/bench_store.py.",
        (Column("rows", "rows"), Column("us", "us", ".1f"), Column("gb_per_s", "GB/s read and written", ",.0f")),
    )
    for title, num_requests, num_rows, num_tokens in CASES:
        pages = Pages(fmt, num_requests, num_tokens or 8192)
        if num_tokens is None:
            pages.seq_lens = (8192 - torch.arange(num_requests, device=DEVICE)).int()
        rows = num_requests * num_rows
        key, value = (torch.randn(rows, 8, 128, dtype=torch.bfloat16, device=DEVICE) for _ in "kv")
        batch = pages.query_start_loc * num_rows, pages.seq_lens, fmt.layout()
        copies = [x.cpu() for x in pages.pages()]
        ops.store(key, value, *pages.pages(), *batch)
        reference.store(key.cpu(), value.cpu(), *copies, *(x.cpu() for x in batch[:2]), batch[2])
        assert torch.equal(pages.quantized.cpu(), copies[0]) and torch.equal(pages.full.cpu(), copies[1])

        def store(key=key, value=value, pages=pages, batch=batch) -> None:
            ops.store(key, value, *pages.pages(), *batch)

        time = microseconds(store)
        moved = rows * 8 * (2 * fmt.full_token_bytes + (fmt.token_bytes if num_rows > 1 else 0))
        section.add({"rows": title, "us": time, "gb_per_s": moved / time / 1e3})
    section.write(torch.cuda.get_device_name(), args.output)


if __name__ == "__main__":
    main()

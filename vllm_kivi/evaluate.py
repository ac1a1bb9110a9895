"""Perplexity read through the real cache: what `vllm-kivi eval ppl` runs.

Scoring a whole prompt at once would say nothing about the cache: a prefill attends to its own tokens in full precision.
So the text goes through the engine in windows, each prefilled in small chunks that attend to what earlier chunks left
in the pages, and the engine's own prompt logprobs are the score. Nothing is simulated. All cache dtypes score the same
tokens, so their difference is a paired one.
"""

from __future__ import annotations

import gc
import logging
import math
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, cast

from vllm_kivi import __version__
from vllm_kivi.format import PRESETS, KVFormat
from vllm_kivi.options import KiviOptions

BASELINE = "auto"


class EvalError(ValueError):
    """A request that cannot be carried out; the message says what to change."""


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

    @property
    def first_scored(self) -> int:
        """Position in a window of the first token that counts. The very first token of a window has no prediction."""
        return max(1, math.ceil(self.skip * self.window))


def cut_windows(tokens: Sequence[int], prefix: Sequence[int], window: int, limit: int | None) -> list[list[int]]:
    """Whole windows of `window` tokens, each beginning with `prefix` (the tokenizer's BOS, if it has one)."""
    body = window - len(prefix)
    available = len(tokens) if limit is None else min(limit, len(tokens))
    return [[*prefix, *tokens[start : start + body]] for start in range(0, available - body + 1, body)]


def batch_sizes(num_windows: int, parallel: int) -> list[int]:
    """Windows that run side by side: about `parallel`, and never a lone one beside larger batches.

    vLLM's scheduler lifts the chunk limit from a request that is alone, up to the whole token budget.
    """
    count = math.ceil(num_windows / parallel)
    if parallel > 1:
        count = min(count, max(1, num_windows // 2))
    base, extra = divmod(num_windows, count)
    return [base + 1] * extra + [base] * (count - extra)


def quantized_context(fmt: KVFormat, window: int, chunk: int, first_scored: int) -> tuple[float, float]:
    """Share of the scored tokens that attended to quantized pages, and the mean share of context they read there."""
    touched, context = 0, 0.0
    for position in range(first_scored - 1, window - 1):  # this row predicts the token after it
        start = position // chunk * chunk
        quantized = max(0, min(fmt.boundary(start + 1), start) - fmt.sink_tokens)
        touched += quantized > 0
        context += quantized / (position + 1)
    scored = window - first_scored
    return touched / scored, context / scored


def paired_difference(nll: list[list[float]], baseline: list[list[float]], block: int) -> tuple[float, float]:
    """Mean difference of two runs over the same tokens, and its standard error.

    Tokens that follow each other err together, so the error is that of the means of blocks of `block` tokens.
    """
    means, sizes = [], []
    for ours, theirs in zip(nll, baseline, strict=True):
        difference = [a - b for a, b in zip(ours, theirs, strict=True)]
        for start in range(0, len(difference), block):
            part = difference[start : start + block]
            means.append(fmean(part))
            sizes.append(len(part))
    mean = sum(m * n for m, n in zip(means, sizes, strict=True)) / sum(sizes)
    return mean, stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan


def score(llm: Any, windows: Sequence[Sequence[int]], chunk: int, progress: Any) -> list[list[float]]:
    """Negative log-likelihood of every token but the first of each window, which all run side by side.

    Raises:
        RuntimeError: the engine took larger chunks than asked for, so the tokens did not attend as reported.
    """
    from vllm import SamplingParams, TokensPrompt

    params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    llm.enqueue([TokensPrompt(prompt_token_ids=list(window)) for window in windows], params, use_tqdm=False)
    finished: list[Any] = []
    longest = max(map(len, windows))
    steps = 0
    while llm.llm_engine.has_unfinished_requests():
        finished += [output for output in llm.llm_engine.step() if output.finished]
        progress.update(len(windows) * max(0, min(chunk, longest - steps * chunk)))
        steps += 1
    if steps < math.ceil(longest / chunk):
        raise RuntimeError(f"the engine prefilled {longest} tokens in {steps} steps, so not in chunks of {chunk}")
    finished.sort(key=lambda output: int(output.request_id))
    return [
        [-entry[token].logprob for entry, token in zip(output.prompt_logprobs[1:], window[1:], strict=True)]
        for output, window in zip(finished, windows, strict=True)
    ]


def kv_bytes_and_bits(llm: Any) -> tuple[float, float]:
    """Bytes that one more token takes in the KV cache, and bits per cached element.

    What the engine allocates, scales and padding included. Layers and pages that keep only a window of tokens do not
    grow, so they do not count.
    """
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    token_bytes, elements = 0.0, 0
    for specs in llm.collective_rpc("get_kv_cache_spec"):
        for spec in specs.values():
            if isinstance(spec, FullAttentionSpec):
                token_bytes += spec.page_size_bytes / spec.block_size
                elements += spec.num_kv_heads * (spec.head_size + spec.head_size_v)
    return token_bytes, 8 * token_bytes / elements


@contextmanager
def engine(**arguments: Any) -> Iterator[Any]:
    """vLLM in this process, all of it gone afterwards, so that the next one finds the memory free.

    Raises:
        EvalError: vLLM refuses the arguments; its own message.
    """
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        llm = LLM(distributed_executor_backend="uni", disable_log_stats=True, use_tqdm_on_load=False, **arguments)
    except ValueError as error:
        raise EvalError(_reason(error)) from error
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def quiet_vllm() -> None:
    """Run vLLM in this process and keep stdout for the result. Must come before vLLM is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_LOGGING_STREAM"] = "ext://sys.stderr"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # vLLM reads its level when it configures logging, which comes after its first warnings.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    warnings.filterwarnings("ignore", category=FutureWarning)


def _reason(error: Exception) -> str:
    """What went wrong, without the frame that pydantic puts around its messages."""
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        return "; ".join(detail["msg"] for detail in error.errors())
    return str(error)


def _check_settings(settings: Settings) -> None:
    if not settings.text.is_file():
        raise EvalError(f"--text {settings.text}: no such file")
    if settings.model.startswith(("/", "./", "../")) and not Path(settings.model).exists():
        raise EvalError(f"model {settings.model}: no such folder")
    if settings.chunk >= settings.window:
        raise EvalError(f"--chunk {settings.chunk} must be smaller than --window {settings.window}")
    if settings.first_scored >= settings.window:
        raise EvalError(f"--skip {settings.skip} leaves no token of a window of {settings.window} to score")
    KiviOptions.from_additional_config(settings.additional_config)


def _model_config(settings: Settings) -> Any:
    """vLLM's view of the model, without starting an engine.

    Raises:
        EvalError: no such model, or something vLLM does not accept.
    """
    from vllm import EngineArgs
    from vllm.config import CacheConfig

    try:
        config = EngineArgs(model=settings.model, dtype=cast(Any, settings.dtype)).create_model_config()
    except (ValueError, OSError) as error:
        raise EvalError(f"cannot load model {settings.model}: {_reason(error)}") from error
    for name in settings.kv_cache_dtypes:
        try:
            CacheConfig(cache_dtype=cast(Any, name))
        except ValueError as error:
            raise EvalError(f"--kv-cache-dtype {name}: {_reason(error)}") from error
    # One more position, for the token that the engine samples after the prompt.
    if settings.window >= config.max_model_len:
        raise EvalError(f"--window {settings.window} must be less than the model's {config.max_model_len} positions")
    return config


def _read_windows(settings: Settings, model_config: Any) -> list[list[int]]:
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer = cached_tokenizer_from_config(model_config)
    try:
        text = settings.text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise EvalError(f"--text {settings.text} is not UTF-8: {error}") from None
    tokens = tokenizer.encode(text, add_special_tokens=False)
    windows = cut_windows(tokens, tokenizer.encode(""), settings.window, settings.tokens)
    if not windows:
        used = len(tokens) if settings.tokens is None else min(len(tokens), settings.tokens)
        raise EvalError(f"{used} tokens of {settings.text} do not fill one --window of {settings.window}")
    return windows


def _quantized_share(settings: Settings, model_config: Any, kv_cache_dtype: str) -> tuple[float | None, float | None]:
    """quantized_context of a KIVI cache dtype; for vLLM's own, which quantize by other rules, not known."""
    if kv_cache_dtype not in PRESETS:
        return None, None
    fmt = KiviOptions.from_additional_config(settings.additional_config).format(
        kv_cache_dtype,
        model_config.get_head_size(),
        model_config.get_total_num_kv_heads(),
        str(model_config.dtype).removeprefix("torch."),
    )
    return quantized_context(fmt, settings.window, settings.chunk, settings.first_scored)


def _measure(settings: Settings, model_config: Any, windows: list[list[int]], kv_cache_dtype: str) -> dict[str, Any]:
    """One engine with one cache dtype: its score of every token, and what its cache holds."""
    from tqdm import tqdm

    sizes = batch_sizes(len(windows), settings.parallel)
    heads = model_config.get_total_num_kv_heads() * model_config.get_total_num_hidden_layers()
    token_bytes = 2 * heads * model_config.get_head_size() * model_config.dtype.itemsize
    arguments = {
        "model": settings.model,
        "dtype": settings.dtype,
        "kv_cache_dtype": kv_cache_dtype,
        "additional_config": settings.additional_config,
        "max_model_len": settings.window + 1,
        "max_num_seqs": max(sizes),
        "max_num_batched_tokens": max(sizes) * settings.chunk,
        "long_prefill_token_threshold": settings.chunk,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        # Twice what the model's own cache takes, so that no window is ever preempted.
        "kv_cache_memory_bytes": 2 * max(sizes) * (settings.window + 1) * token_bytes + (64 << 20),
    }
    nll: list[list[float]] = []
    total = sum(map(len, windows))
    bar = tqdm(total=total, desc=f"{kv_cache_dtype}: starting", unit="tok", file=sys.stderr, disable=None)
    with bar, engine(**arguments) as llm:
        kv_bytes, bits = kv_bytes_and_bits(llm)
        bar.set_description(kv_cache_dtype)
        bar.unpause()
        start = time.monotonic()
        for size in sizes:
            nll += score(llm, windows[len(nll) : len(nll) + size], settings.chunk, bar)
        seconds = time.monotonic() - start
    scored = [losses[settings.first_scored - 1 :] for losses in nll]
    return {"nll": scored, "seconds": seconds, "kv_bytes_per_token": kv_bytes, "bits": bits}


def _compare(own: dict[str, Any], auto: dict[str, Any], block: int) -> dict[str, Any]:
    difference, error = paired_difference(own["nll"], auto["nll"], block)
    return {
        "perplexity": math.exp(fmean(loss for window in own["nll"] for loss in window)),
        "perplexity_change": math.expm1(difference),
        "nll_difference": difference,
        "nll_standard_error": error,
    }


def run(settings: Settings) -> dict[str, Any]:
    """Measure `auto` and every cache dtype asked for, one engine after the other.

    Returns:
        What was measured, ready for json.dumps: "results" has one entry per cache dtype, auto first. nll in nats per
        token, shares from 0 to 1 (None where not known), sizes in bytes and bits.

    Raises:
        EvalError: says what to change.
    """
    _check_settings(settings)
    quiet_vllm()
    import vllm
    from vllm.platforms import current_platform

    model_config = _model_config(settings)
    windows = _read_windows(settings, model_config)
    names = list(dict.fromkeys((BASELINE, *settings.kv_cache_dtypes)))
    measured = {name: _measure(settings, model_config, windows, name) for name in names}
    results = []
    for name, own in measured.items():
        tokens, context = _quantized_share(settings, model_config, name)
        result = {"kv_cache_dtype": name, "quantized_tokens": tokens, "quantized_context": context}
        result |= _compare(own, measured[BASELINE], settings.chunk)
        results.append(result | {key: value for key, value in own.items() if key != "nll"})
    return {
        "model": Path(settings.model).name if Path(settings.model).is_dir() else settings.model,
        "text": settings.text.name,
        "dtype": str(model_config.dtype).removeprefix("torch."),
        "device": current_platform.device_type,
        "vllm": vllm.__version__,
        "vllm_kivi": __version__,
        "additional_config": settings.additional_config,
        "windows": len(windows),
        "window": settings.window,
        "chunk": settings.chunk,
        "scored_tokens": len(windows) * (settings.window - settings.first_scored),
        "results": results,
    }


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table, with a line above it that says what was measured."""
    titles = "kv-cache-dtype,bits,KV bytes/token,perplexity,against auto,nll difference,tokens that read,context read"
    rows = [tuple(titles.split(","))]
    for result in report["results"]:
        baseline = result["kv_cache_dtype"] == BASELINE
        error = result["nll_standard_error"]
        rows.append(
            (
                result["kv_cache_dtype"],
                f"{result['bits']:.2f}",
                f"{result['kv_bytes_per_token']:,.0f}",
                f"{result['perplexity']:.3f}",
                "" if baseline else f"{100 * result['perplexity_change']:+.2f} %",
                "" if baseline else f"{result['nll_difference']:+.4f} ± {error:.4f}",
                _percent(result["quantized_tokens"]),
                _percent(result["quantized_context"]),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    summary = (
        f"{report['model']} on {report['text']}: {report['scored_tokens']:,} scored tokens in {report['windows']} "
        f"windows of {report['window']:,}, prefilled in chunks of {report['chunk']}; {report['dtype']}, "
        f"vLLM {report['vllm']} on {report['device']}."
    )
    note = (
        "nll difference: nats per token, with the standard error over chunks. Tokens that read: scored tokens that "
        "attended to quantized pages. Context read: mean share of a scored token's context that was read there."
    )
    return "\n".join([summary, "", *lines, "", note])

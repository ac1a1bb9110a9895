"""lm-eval's WikiText, GSM8K and LongBench through the real cache: `vllm-kivi eval tasks`.

Prompts and metrics are lm-eval's, documents come from local files, and every prompt is prefilled in small chunks, so
that what is scored or answered reads quantized pages. All caches get the same prompts, so differences are paired ones.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_kivi.evaluate import report
from vllm_kivi.evaluate.cache import NOTHING, UNKNOWN, Reads, block_bytes, describe, kivi_format, observe, unquantized
from vllm_kivi.evaluate.harness import HarnessTask, load
from vllm_kivi.evaluate.session import (
    Candidate,
    EvalError,
    candidates,
    check_before_vllm,
    chunks_of,
    engine,
    engine_arguments,
    model_config,
    quiet_vllm,
    tokenizer_of,
)
from vllm_kivi.evaluate.task_data import parse_tasks

# lm-eval's own default, for tasks that do not say.
ANSWER_TOKENS = 256


@dataclass(frozen=True)
class Settings:
    """What to measure; every field is an option of `vllm-kivi eval tasks`."""

    model: str
    tasks: tuple[str, ...]
    kv_cache_dtypes: tuple[str, ...]
    limit: int | None = None
    shots: int | None = None
    max_length: int | None = None
    chunk: int = 64
    parallel: int = 8
    dtype: str = "auto"
    additional_config: dict[str, Any] = field(default_factory=dict)
    baseline: str = "auto"


@dataclass(frozen=True)
class Request:
    """What the engine gets for a document, or for a window of one: its last `scored` tokens, or an answer, count."""

    document: int
    tokens: list[int]
    scored: int = 0
    answer_tokens: int = 1
    stop: tuple[str, ...] = ()
    cut: bool = False


def rolling_windows(tokens: Sequence[int], prefix: int, length: int) -> list[tuple[list[int], int]]:
    """lm-eval's windows of a document: at most `length` tokens and one more, and how many of the last ones count.

    Every token counts once, and the last window reaches back as far as it can.
    """
    windows = [([prefix, *tokens[:length]], len(tokens[:length]))]
    for start in range(length, len(tokens), length):
        stop = min(start + length, len(tokens))
        windows.append((list(tokens[stop - length - 1 : stop]), stop - start))
    return windows


def cut_middle(tokens: Sequence[int], length: int) -> list[int]:
    """At most `length` tokens, from the start and from the end alike, as LongBench does it."""
    if len(tokens) <= length:
        return list(tokens)
    return [*tokens[: length // 2], *tokens[len(tokens) - (length - length // 2) :]]


def build_requests(task: HarnessTask, tokenizer: Any, length: int) -> list[Request]:
    """All requests of a task, none of more than `length` tokens with its answer.

    Raises:
        EvalError: `length` leaves no room for a prompt.
    """
    requests = []
    for document, arguments in enumerate(task.arguments()):
        if task.rolling:
            special = tokenizer.bos_token_id
            prefix = tokenizer.eos_token_id if special is None else special
            tokens = tokenizer.encode(arguments[0], add_special_tokens=False)
            # A token is sampled after each window.
            windows = rolling_windows(tokens, prefix, length - 2)
            requests += [Request(document, window, scored) for window, scored in windows if scored]
            continue
        prompt, generation = arguments
        answer = generation.get("max_gen_toks", ANSWER_TOKENS)
        if length <= answer:
            raise EvalError(
                f"--max-length {length} leaves no room beside the {answer} tokens of an answer: {task.name}"
            )
        stop = generation.get("until") or ()
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        tokens = tokenizer.encode(prompt)
        kept = cut_middle(tokens, length - answer)
        requests.append(Request(document, kept, 0, answer, stop, len(kept) < len(tokens)))
    return requests


def _sampling(request: Request) -> Any:
    from vllm import SamplingParams

    if request.scored:
        return SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    return SamplingParams(temperature=0, max_tokens=request.answer_tokens, stop=list(request.stop))


@dataclass
class _Answers:
    """What one cache made of one task: by document, answers or likelihoods; by request, the nll of scored tokens."""

    answers: list[Any]
    nll: list[list[float]]
    shares: dict[str, float | None]
    peak_blocks: int
    seconds: float


def ask(llm: Any, requests: Sequence[Request], chunk: int, progress: Any) -> tuple[list[Any], Any]:
    """Outputs of all requests, in their order, and what the engine did.

    Raises:
        RuntimeError: the engine took larger chunks than asked for.
    """
    from vllm import TokensPrompt

    prompts = [TokensPrompt(prompt_token_ids=request.tokens) for request in requests]
    outputs: list[Any] = []
    with observe(llm) as seen, chunks_of(llm, chunk):
        llm.enqueue(prompts, [_sampling(request) for request in requests], use_tqdm=False)
        while llm.llm_engine.has_unfinished_requests():
            finished = [output for output in llm.llm_engine.step() if output.finished]
            outputs += finished
            progress.update(len(finished))
    if seen.largest_chunk() > chunk:
        raise RuntimeError(f"the engine prefilled {seen.largest_chunk()} tokens at once, so not in chunks of {chunk}")
    return sorted(outputs, key=lambda output: int(output.request_id)), seen


def _answer(
    llm: Any, requests: Sequence[Request], chunk: int, shares: dict[str, float | None], progress: Any
) -> _Answers:
    start = time.monotonic()
    outputs, seen = ask(llm, requests, chunk, progress)
    answers: list[Any] = [None] * (1 + max(request.document for request in requests))
    nll, reads, fmt = [], Reads(), kivi_format(llm)
    for request, output, chunks in zip(requests, outputs, seen.chunks.values(), strict=True):
        last = len(request.tokens) - 1
        if request.scored:
            entries = zip(output.prompt_logprobs[-request.scored :], request.tokens[-request.scored :], strict=True)
            nll.append([-entry[token].logprob for entry, token in entries])
            answers[request.document] = (answers[request.document] or 0.0) - math.fsum(nll[-1])
            rows = last - request.scored, last - 1  # the row before a token predicts it
        else:
            answers[request.document] = output.outputs[0].text
            rows = last, last + max(1, len(output.outputs[0].token_ids)) - 1
        if fmt is not None:
            reads.add(fmt, chunks, len(request.tokens), *rows)
    shares = {**reads.result()} if fmt is not None else shares
    return _Answers(answers, nll, shares, seen.peak_blocks, time.monotonic() - start)


def _measure(
    settings: Settings, config: Any, tasks: list[HarnessTask], requests: list[list[Request]], candidate: Candidate
) -> tuple[dict[str, Any], list[_Answers]]:
    """One engine with one cache: what its cache is, and what it made of each task."""
    from tqdm import tqdm

    every = [request for of_task in requests for request in of_task]
    length = max(len(request.tokens) + request.answer_tokens for request in every)
    side_by_side = min(settings.parallel, max(map(len, requests)))
    arguments = engine_arguments(settings, candidate, config, length, side_by_side, side_by_side * settings.chunk)
    bar = tqdm(total=len(every), desc=f"{candidate.label}: starting", unit="prompt", file=sys.stderr, disable=None)
    found = []
    with bar, engine(**arguments) as llm:
        cache = describe(llm)
        for task, of_task in zip(tasks, requests, strict=True):
            bar.set_description(f"{candidate.label}, {task.name}")
            bar.unpause()
            shares = NOTHING if unquantized(cache) else UNKNOWN
            found.append(_answer(llm, of_task, settings.chunk, shares, bar))
        cache["block_bytes"] = block_bytes(llm)
    return cache, found


def _scores(
    task: HarnessTask, own: _Answers, baseline: _Answers, chunk: int, words: Sequence[int]
) -> list[dict[str, Any]]:
    """Each metric over all documents, with the paired difference to the baseline and its standard error."""
    ours, theirs = task.scores(own.answers), task.scores(baseline.answers)
    if task.rolling:
        # Tokens that follow each other err together: blocks of them, as in `eval ppl`, and nats a word of each token's.
        difference, error = report.paired_difference(own.nll, baseline.nll, chunk)
        scale = sum(map(len, own.nll)) / sum(words)
        value = task.value("word_perplexity", ours["word_perplexity"])
        return [{"metric": "word_perplexity", "value": value, "difference": scale * difference} | _error(scale * error)]
    scores = []
    for metric, values in ours.items():
        difference, error = report.paired_difference([values], [theirs[metric]], 1)
        scores.append({"metric": metric, "value": task.value(metric, values), "difference": difference} | _error(error))
    return scores


def _error(error: float) -> dict[str, float | None]:
    """None where one document alone says nothing of it; JSON has no NaN."""
    return {"standard_error": None if math.isnan(error) else error}


def run(settings: Settings) -> dict[str, Any]:
    """Run all tasks on the baseline and on every cache, one engine after the other.

    Returns:
        What was measured, ready for json.dumps: "results" has one entry per cache and task, the baseline first, each
        with its "scores". Differences are of the metric, or of the logarithm of word perplexity, in nats a word.

    Raises:
        EvalError: says what to change.
    """
    paths = parse_tasks(settings.tasks)
    check_before_vllm(settings)
    tasks = load(paths, settings.shots, settings.limit)
    quiet_vllm()
    config = model_config(settings)
    length = min(settings.max_length or config.max_model_len, config.max_model_len)
    tokenizer = tokenizer_of(config)
    requests = [build_requests(task, tokenizer, length) for task in tasks]
    measured = {x.label: _measure(settings, config, tasks, requests, x) for x in candidates(settings)}
    baselines = measured[settings.baseline][1]
    results = []
    for label, (cache, found) in measured.items():
        cache = dict(cache)
        bytes_of_block = cache.pop("block_bytes")
        for task, of_task, own, baseline in zip(tasks, requests, found, baselines, strict=True):
            words = [count for _, count in task.scores(own.answers).get("word_perplexity", ())]
            results.append(
                {"kv_cache_dtype": label, **cache, "task": task.name}
                | own.shares
                | {
                    "documents": len(own.answers),
                    "shots": task.shots,
                    "cut_prompts": sum(request.cut for request in of_task),
                    "longest_prompt": max(len(request.tokens) for request in of_task),
                    "peak_kv_bytes": own.peak_blocks * bytes_of_block,
                    "scores": _scores(task, own, baseline, settings.chunk, words),
                    "seconds": own.seconds,
                }
            )
    return report.header(settings.model, config, settings.additional_config) | {
        "baseline": settings.baseline,
        "chunk": settings.chunk,
        "max_length": length,
        "limit": settings.limit,
        "parallel": settings.parallel,
        "results": results,
    }


def _texts(score: dict[str, Any]) -> tuple[str, str]:
    """The value and the difference of a metric: perplexity and its logarithm, or percent and points."""
    value, difference, error = score["value"], score["difference"], score["standard_error"]
    if score["metric"] == "word_perplexity":
        return f"{value:.3f}", f"{difference:+.4f}" + ("" if error is None else f" ± {error:.4f}") + " nats"
    return report.percent(value, 1), f"{100 * difference:+.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def table(measured: dict[str, Any]) -> str:
    """The report in Markdown, task by task, a row for each metric of each cache."""
    baseline = measured["baseline"]
    rows = []
    names = dict.fromkeys(result["task"] for result in measured["results"])
    for name in names:
        of_task = [result for result in measured["results"] if result["task"] == name]
        for metric in (score["metric"] for score in of_task[0]["scores"]):
            for result in of_task:
                score = next(score for score in result["scores"] if score["metric"] == metric)
                value, difference = _texts(score)
                rows.append(
                    (
                        name,
                        metric,
                        f"{result['documents']:,}",
                        result["kv_cache_dtype"],
                        report.layers_text(result["layers"]),
                        f"{result['bits']:.2f}",
                        f"{result['kv_bytes_per_token']:,.0f}",
                        f"{result['peak_kv_bytes'] / 2**20:.2f}",
                        value,
                        "" if result["kv_cache_dtype"] == baseline else difference,
                        report.percent(result["quantized_tokens"]),
                        report.percent(result["quantized_context"]),
                    )
                )
    titles = (
        f"task,metric,documents,kv-cache-dtype,layers,bits,KV bytes/token,MiB at most,score,against {baseline},"
        "tokens that read,context read"
    )
    first = [result for result in measured["results"] if result["kv_cache_dtype"] == baseline]
    cut = {result["task"]: result["cut_prompts"] for result in first if result["cut_prompts"]}
    shots = {result["task"]: result["shots"] for result in first if result["shots"]}
    notes = [
        *(f"{name}: {count} examples a prompt." for name, count in shots.items()),
        *(
            f"{name}: {count} prompts were longer than {measured['max_length']:,} tokens and lost their middle."
            for name, count in cut.items()
        ),
        f"Against {baseline}: paired by document, in points, with the standard error; word perplexity: its logarithm, "
        f"in nats a word, with the standard error over blocks of {measured['chunk']} tokens. Bits: per cached element, "
        f"scales included. MiB at most: what {measured['parallel']} prompts side by side held, full-precision pages "
        "included. Tokens that read: scored tokens, or tokens of answers, that attended to quantized pages. Context "
        "read: mean share of their context that they read there. Both are what the engine did, - where not known.",
    ]
    summary = (
        f"lm-eval's tasks on {measured['model']}, prompts prefilled in chunks of {measured['chunk']}, greedy; "
        f"{measured['dtype']}, vLLM {measured['vllm']} on {measured['device']}."
    )
    return "\n".join([summary, "", *report.markdown(titles, rows), "", " ".join(notes)])

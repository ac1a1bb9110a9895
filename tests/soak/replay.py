"""Computes a finished request again, alone, and compares.

A request that ran through in one go is generated again with the same seed and the same chunks. One that was preempted,
or sampled without a seed, is scored, run by run: its prompt and its answer are a prompt whose chunks give every row the
boundary that it had, and whose logprobs are compared with those of the answer. That does not depend on penalties or on
the state of a random generator, so it also decides where generation took another token: if scoring finds all logprobs
as they were, two candidates were close.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm import SamplingParams, TokensPrompt
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from .journal import Journal, Run, changes
from .workload import Job

# What a flipped code may do to a logprob.
FLIP = {"float32": 0.5, "bfloat16": 1.0}


@dataclass
class Finished:
    job: Job
    index: int  # of n answers
    token_ids: list[int]
    logprobs: list[float]
    prompt_logprobs: list[float]
    runs: list[Run]

    def kinds(self) -> list[str]:
        sampling = self.job.sampling
        first = self.runs[0]
        kinds = {
            "greedy": not sampling["temperature"],
            "seeded": "seed" in sampling and not sampling.get("n"),
            "n > 1": "n" in sampling,
            "prefix hit": first.hit > 0,
            "preempted": len(self.runs) > 1,
            "chunked": first.chunks > 1,
            "prompt logprobs": "prompt_logprobs" in sampling,
            "long": len(self.job.ids) > 2000,
        }
        return [kind for kind, is_one in kinds.items() if is_one]


def chosen(entries: Any, token_ids: list[int]) -> list[float]:
    """Logprobs of the tokens in vLLM's list of mappings."""
    return [entry[token].logprob for entry, token in zip(entries, token_ids, strict=True)]


def prompt_logprobs(output: Any) -> list[float]:
    if output.prompt_logprobs is None:
        return []
    return chosen(output.prompt_logprobs[1:], output.prompt_token_ids[1:])


def differences(actual: list[float], expected: list[float]) -> list[float]:
    return [abs(a - b) for a, b in zip(actual, expected, strict=True)]


@dataclass
class Verdict:
    """tie: another token was as good. flip: a few tokens differ, as where rounding made another code of a key or value;
    only queries that look at that token see it."""

    difference: float  # the largest of logprobs
    tie: bool = False
    flip: bool = False
    wrong: str = ""


class Replayer:
    """Replays in an engine that has nothing else to do."""

    def __init__(self, llm_engine: Any, journal: Journal, tolerance: float, flip: float) -> None:
        self._engine, self._journal, self._tolerance, self._flip = llm_engine, journal, tolerance, flip
        self._count = 0
        # Also where requests are served in one go: a prefix hit is replayed as the chunks that it stands for.
        journal.scheduler.scheduler_config.enable_chunked_prefill = True

    def _alone(self, ids: list[int], run: Run, sampling: dict[str, Any]) -> Any:
        assert self._engine.reset_prefix_cache()
        assert run.edges is not None
        self._journal.forced = [row for row, _ in run.edges if row < len(ids)]
        params = SamplingParams(**sampling, output_kind=RequestOutputKind.FINAL_ONLY)
        name = self._engine.add_request(f"replay{self._count}", TokensPrompt(prompt_token_ids=ids), params)
        self._count += 1
        outputs: list[Any] = []
        for _ in range(2 * (len(ids) + sampling["max_tokens"])):
            outputs += self._engine.step()
            if not self._engine.has_unfinished_requests():
                break
        self._journal.forced = ()
        (again,) = self._journal.runs.pop(name)
        assert again.edges is not None
        wanted, got = changes(run.edges, len(ids)), changes(again.edges, len(ids))
        assert got == wanted, f"replayed with boundaries {got}, not {wanted}"
        (output,) = outputs
        return output

    def _generates_again(self, finished: Finished) -> bool:
        if len(finished.runs) > 1:
            return False
        if not finished.job.sampling["temperature"]:
            return True
        # See Workload: on a CPU a seed and more than one chunk exclude each other.
        chunks = sum(row < len(finished.job.ids) for row, _ in finished.runs[0].edges or ())
        return "seed" in finished.job.sampling and (chunks == 1 or current_platform.is_cuda())

    def replay(self, finished: Finished) -> Verdict:
        if not self._generates_again(finished):
            return self._score(finished)
        sampling = {k: v for k, v in finished.job.sampling.items() if k != "n"}
        if "seed" in sampling and "n" in finished.job.sampling:
            sampling["seed"] += finished.index
        output = self._alone(finished.job.ids, finished.runs[0], sampling)
        tokens, expected = list(output.outputs[0].token_ids), finished.token_ids
        same = 0
        while same < min(len(tokens), len(expected)) and tokens[same] == expected[same]:
            same += 1
        again = chosen(output.outputs[0].logprobs, tokens)
        if tokens != expected:
            verdict = self._score(finished, same + 1)
            verdict.tie = True
            if not verdict.wrong and same >= min(len(tokens), len(expected)):
                verdict.wrong = f"ends after {len(tokens)} tokens, not {len(expected)}"
            return verdict
        found = differences(again, finished.logprobs)
        if finished.prompt_logprobs:
            found += differences(prompt_logprobs(output), finished.prompt_logprobs)
        return self._judge(found)

    def _judge(self, found: list[float]) -> Verdict:
        # Written so that NaN is wrong.
        off = sum(not difference <= self._tolerance for difference in found)
        largest = max(found, default=0.0)
        few = off <= max(2, 0.05 * len(found)) and all(difference <= self._flip for difference in found)
        wrong = "" if few else f"{off} of {len(found)} logprobs differ, by up to {largest:.4f}"
        return Verdict(largest, flip=off > 0, wrong=wrong)

    def _score(self, finished: Finished, count: int | None = None) -> Verdict:
        """Logprobs of the answer's first `count` tokens, each in the run that it was sampled in."""
        prompt, tokens = finished.job.ids, finished.token_ids[:count]
        # A prompt must leave room for a token.
        tokens = tokens[: self._journal.scheduler.max_model_len - 1 - len(prompt)]
        bounds = [run.first_output for run in finished.runs] + [len(tokens)]
        found: list[float] = []
        for run, start, stop in zip(finished.runs, bounds, bounds[1:], strict=False):
            stop = min(stop, len(tokens))
            if start >= stop:
                continue
            sampling = {"max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0, "detokenize": False}
            output = self._alone(prompt + tokens[:stop], run, sampling)
            if len(prompt) + start == 0:
                continue
            again = prompt_logprobs(output)[len(prompt) + start - 1 :]
            found += differences(again, finished.logprobs[start:stop])
        return self._judge(found)

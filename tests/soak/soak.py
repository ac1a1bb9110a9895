"""Random requests, by the ten thousand, against stock vLLM with our cache; a sample is replayed alone and must match.

    python tests/soak/soak.py --requests 20000
    python tests/soak/soak.py --seconds 300

A tiny random Llama, in float32 on a CPU and in bfloat16 on a GPU. An engine serves some hundred requests under random
settings and with a pool that is often too small; then it is closed and another one starts. What is checked: every
request ends as it should, every logprob is finite, every page comes back, memory does not grow, and requests of every
kind give the same when nothing else runs (tests/soak/replay.py). Exit code 1 if anything was wrong. The same --seed and
options give the same engines and requests.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # read when vLLM is imported: engines in this process

from engines import engine, save_tiny_llama
from tqdm import tqdm
from vllm import SamplingParams, TokensPrompt
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind

from soak.journal import Journal
from soak.replay import FLIP, Finished, Replayer, chosen, prompt_logprobs
from soak.workload import EOS, HEAD_DIM, KV_HEADS, MAX_MODEL_LEN, MOST_OUTPUT, VOCAB, Job, Workload, random_engine

SAMPLE = 6  # requests of every kind that an engine replays
MODEL = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": MAX_MODEL_LEN,
    "initializer_range": 0.25,
}
# Largest difference of a logprob when a request runs alone, where no code differs. Other shapes of products round
# differently; where that moves a key or value across the edge between two codes, or a search to another range, the code
# changes (Verdict.flip). It does so seldom: RARE is the most replays that may show it.
RARE = 0.03
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5}
# What may be taken while an engine serves the second half of its requests, and from halfway to the end of all engines.
# Not less: allocators keep fragments, and the CPU's libraries keep a compiled product for every shape they have seen.
GROWTH_MB = 128
# What Python may keep of an engine that is closed; a single request with its blocks is more.
GROWTH_OBJECTS = 500
# Steps in which some request must end: several times what the longest takes in the smallest chunks.
STUCK = 1000


def resident_mb() -> float:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def faults_of(job: Job, output: Any) -> list[str]:
    """How a request's end differs from what it asked for."""
    faults = []
    sampling = job.sampling
    if len(output.outputs) != sampling.get("n", 1):
        faults.append(f"{len(output.outputs)} answers, not {sampling.get('n', 1)}")
    for answer in output.outputs:
        count, reason = len(answer.token_ids), answer.finish_reason
        stops = {EOS, *sampling.get("stop_token_ids", ())}
        if reason == "length":
            if count != sampling["max_tokens"]:
                faults.append(f"{count} tokens, not {sampling['max_tokens']}")
        elif reason != "stop" or answer.token_ids[-1] not in stops or count <= sampling.get("min_tokens", 0):
            faults.append(f"ended by {reason!r} after {count} tokens, the last {answer.token_ids[-1:]}")
        if len(answer.logprobs) != count:
            faults.append(f"{len(answer.logprobs)} logprobs for {count} tokens")
        if not all(math.isfinite(logprob.logprob) for entry in answer.logprobs for logprob in entry.values()):
            faults.append("a logprob is not finite")
    if "prompt_logprobs" in sampling:
        scores = prompt_logprobs(output)
        if len(scores) != len(job.ids) - 1 or not all(map(math.isfinite, scores)):
            faults.append("prompt logprobs are missing or not finite")
    return faults


class Soak:
    def __init__(self, model: Path, seed: int, dtype: str) -> None:
        self.model, self.seed, self.dtype = model, seed, dtype
        self.counts: Counter[str] = Counter()
        self.replays: Counter[str] = Counter()
        self.faults: list[str] = []
        self.largest_difference = 0.0
        self.resident: list[float] = []  # MB after each engine
        self.objects: list[int] = []  # that Python tracks after each engine
        self.kept = 0  # of them, since the third engine; not by engines that compile, for torch keeps what it compiled

    def fault(self, text: str) -> None:
        self.faults.append(text)
        tqdm.write(f"FAULT: {text}")

    def run_engine(self, number: int, num_requests: int, deadline: float, progress: tqdm[Any]) -> None:
        """Serve requests, check, replay a sample, check again. Everything random comes from the seed and the number."""
        rng = random.Random(f"{self.seed}/{number}")
        settings = random_engine(rng, self.dtype)
        if current_platform.is_cuda():
            settings["enforce_eager"] = rng.random() < 0.5
        self.settings = f"--seed {self.seed}, engine {number}: {settings}"
        with engine(self.model, dtype=self.dtype, **settings) as llm:
            self.llm_engine = llm.llm_engine
            scheduler = self.llm_engine.engine_core.engine_core.scheduler
            self.pool = scheduler.kv_cache_manager.block_pool
            self.free_blocks = self.pool.get_num_free_blocks()
            self.journal = Journal(scheduler)
            self.sample: dict[str, list[Finished]] = {}
            self.seen: Counter[str] = Counter()
            seeds = current_platform.is_cuda() or not settings["enable_chunked_prefill"]
            workload = Workload(rng, settings["max_model_len"] - MOST_OUTPUT, seeds)
            self._serve(rng, workload, num_requests, settings["max_num_seqs"], deadline, progress)
            self._check_pages("after all requests")
            self._replay()
            self._check_pages("after replays")
            self.counts["preemptions"] += self.journal.preemptions
            self.counts["prefix hits"] += self.journal.hits
            del self.llm_engine, self.pool, self.journal, scheduler, llm
        self.counts["engines"] += 1
        self.resident.append(resident_mb())
        self.objects.append(len(gc.get_objects()))
        # The first engines import what is needed and fill caches.
        if len(self.objects) > 3 and settings.get("enforce_eager", True):
            self.kept += self.objects[-1] - self.objects[-2]
            if self.kept > GROWTH_OBJECTS * len(self.objects):
                self.fault(f"Python keeps {self.kept:,} objects more than after the third engine; {self.settings}")
        half = self.resident[len(self.resident) // 2]
        if len(self.resident) >= 8 and self.resident[-1] > half + GROWTH_MB:
            self.fault(f"memory grew from {half:.0f} MB halfway to {self.resident[-1]:.0f} MB; {self.settings}")

    def _serve(
        self, rng: random.Random, workload: Workload, num_requests: int, width: int, deadline: float, progress: Any
    ) -> None:
        active: dict[str, tuple[Job, list[str], int]] = {}
        step = added = last_end = 0
        resident = None
        while active or (added < num_requests and time.monotonic() < deadline):
            room = min(2 * width - len(active), num_requests - added)
            if room > 0 and rng.random() < 0.4 and time.monotonic() < deadline:
                for _ in range(rng.randint(1, min(room, 8))):
                    job = workload.next()
                    active[job.name] = (job, self._add(job), step)
                    added += 1
                progress.set_postfix(
                    tokens=self.counts["tokens"], preempted=self.journal.preemptions, faults=len(self.faults)
                )
            for output in self.llm_engine.step():
                job, ids, _ = active.pop(output.request_id)
                self._end(rng, job, ids, output)
                progress.update()
                last_end = step
            step += 1
            if not active:
                last_end = step
            if step - last_end > STUCK:
                self.fault(f"no request ended in {STUCK} steps: {sorted(active)}; {self.settings}")
                self.llm_engine.abort_request([*active])
                break
            for job, ids, start in [*active.values()]:
                if job.ends_after is not None and step - start >= job.ends_after:
                    self.llm_engine.abort_request([job.name])
                    del active[job.name]
                    for name in ids:
                        self.journal.runs.pop(name, None)
                    self.counts["aborts"] += 1
                    progress.update()
            if resident is None and added >= num_requests // 2:
                resident = resident_mb()
        self.counts["requests"] += added
        self.counts["steps"] += step
        if resident is not None and self.resident and resident_mb() - resident > GROWTH_MB:
            self.fault(f"memory grew from {resident:.0f} to {resident_mb():.0f} MB; {self.settings}")
        if self.journal.runs:
            self.fault(f"{sorted(self.journal.runs)} were scheduled and never ended; {self.settings}")

    def _add(self, job: Job) -> list[str]:
        """Ids that the scheduler has for it."""
        params = SamplingParams(**job.sampling, output_kind=RequestOutputKind.FINAL_ONLY)
        name = self.llm_engine.add_request(job.name, TokensPrompt(prompt_token_ids=job.ids), params)
        return [f"{i}_{name}" for i in range(job.sampling["n"])] if "n" in job.sampling else [name]

    def _end(self, rng: random.Random, job: Job, ids: list[str], output: Any) -> None:
        for fault in faults_of(job, output):
            self.fault(f"{job.name}: {fault}; {job.sampling}, prompt of {len(job.ids)} tokens; {self.settings}")
        for answer, name in zip(output.outputs, ids, strict=True):
            tokens = list(answer.token_ids)
            runs = self.journal.runs.pop(name)
            self.counts["tokens"] += len(job.ids) + len(tokens)
            finished = Finished(
                job, answer.index, tokens, chosen(answer.logprobs, tokens), prompt_logprobs(output), runs
            )
            self.counts["of mixed history"] += any(run.edges is None for run in runs)
            if any(run.edges is None for run in runs):
                continue
            for kind in finished.kinds():
                self.seen[kind] += 1
                kept = self.sample.setdefault(kind, [])
                if len(kept) < SAMPLE:
                    kept.append(finished)
                elif rng.random() < SAMPLE / self.seen[kind]:
                    kept[rng.randrange(SAMPLE)] = finished

    def _replay(self) -> None:
        replayer = Replayer(self.llm_engine, self.journal, TOLERANCE[self.dtype], FLIP[self.dtype])
        for kind, kept in self.sample.items():
            for finished in kept:
                verdict = replayer.replay(finished)
                self.replays[kind] += 1
                self.counts["ties"] += verdict.tie
                self.counts["flips"] += verdict.flip
                self.largest_difference = max(self.largest_difference, verdict.difference)
                if verdict.wrong:
                    job = finished.job
                    self.fault(
                        f"{job.name} ({', '.join(finished.kinds())}) alone: {verdict.wrong}; {job.sampling}, "
                        f"prompt of {len(job.ids)} tokens, runs {finished.runs}; {self.settings}"
                    )

    def _check_pages(self, when: str) -> None:
        free = self.pool.get_num_free_blocks()
        if free != self.free_blocks:
            self.fault(f"{self.free_blocks - free} pages are lost {when}; {self.settings}")
        elif not self.llm_engine.reset_prefix_cache():
            self.fault(f"the prefix cache cannot be reset {when}; {self.settings}")

    def table(self) -> str:
        lines = [(name, f"{self.counts[name]:,}") for name in ("engines", "requests", "tokens", "steps")]
        lines += [(name, f"{self.counts[name]:,}") for name in ("preemptions", "prefix hits", "aborts")]
        lines += [("answers that no schedule alone can repeat", f"{self.counts['of mixed history']:,}")]
        lines += [(f"replayed: {kind}", f"{count:,}") for kind, count in sorted(self.replays.items())]
        lines += [("replays in which another token was as good", f"{self.counts['ties']:,}")]
        lines += [("replays in which rounding changed a code", f"{self.counts['flips']:,}")]
        lines += [("largest difference of a logprob", f"{self.largest_difference:.5f}")]
        halves = self.resident[0], self.resident[len(self.resident) // 2], self.resident[-1]
        lines += [("MB after the first, middle and last engine", ", ".join(f"{mb:,.0f}" for mb in halves))]
        lines += [("Python objects kept since the third engine", f"{self.kept:,}")]
        lines += [("faults", f"{len(self.faults):,}")]
        return "\n".join(["| what | count |", "|---|---|", *(f"| {name} | {value} |" for name, value in lines)])


def soak(requests: int, seconds: float, per_engine: int, seed: int, first_engine: int = 0) -> Soak:
    deadline = time.monotonic() + seconds
    dtype = "bfloat16" if current_platform.is_cuda() else "float32"
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=None if math.isinf(requests) else requests, unit="request", smoothing=0.05) as progress,
    ):
        run = Soak(save_tiny_llama(Path(folder) / "model", **MODEL), seed, dtype)
        number = first_engine
        while run.counts["requests"] < requests and time.monotonic() < deadline:
            run.run_engine(number, min(per_engine, requests - run.counts["requests"]), deadline, progress)
            number += 1
    if run.counts["flips"] > max(3, RARE * run.replays.total()):
        run.fault(
            f"a few tokens differ in {run.counts['flips']} of {run.replays.total()} replays, too many for rounding"
        )
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, help="stop after so many (default: 20000, or no limit with --seconds)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="add no request after so long")
    parser.add_argument("--requests-per-engine", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first-engine", type=int, default=0, help="begin with this one, to repeat what it found")
    args = parser.parse_args()
    requests = args.requests or (20_000 if math.isinf(args.seconds) else 10**9)
    run = soak(requests, args.seconds, args.requests_per_engine, args.seed, args.first_engine)
    print(run.table())
    for fault in run.faults:
        print(f"\n{fault}")
    sys.exit(bool(run.faults))


if __name__ == "__main__":
    main()

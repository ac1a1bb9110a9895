"""The engine on a GPU, checked end to end: one table, and an exit code of 1 if a line of it fails.

    python tests/gpu/engine_check.py [--only auto,kivi,bypass] [--dtype kivi2]

A random Llama with Llama-3.1-8B's attention (32 query heads, 8 KV heads of 128) and weights large enough that what it
says depends on what is far back. Engines run one after another in this process, with CUDA graphs unless a check says
otherwise. A distance is the mean difference of the likeliest tokens' log probabilities wherever two runs have the same
past. What may differ is bounded by what bfloat16 does: by the distance between it and float16 on vLLM's own cache.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent.parent)]
from engines import engine, generate, prompt, save_tiny_llama, tokens  # noqa: E402
from results import Results  # noqa: E402

MODEL = {
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 16384,
    "initializer_range": 0.05,
}
ENGINE = {
    "dtype": "bfloat16",
    "max_model_len": 4096,
    "enforce_eager": False,
    "kv_cache_memory_bytes": 1 << 30,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 4096,
}
SHORT = [prompt(length, length) for length in (1, 2, 17, 31, 32, 64, 80, 96)]
LONG = [prompt(length, length) for length in (200, 320, 700, 1000, 1500, 2200, 3000, 3500)]
CACHED = LONG[4:5]
FORCED = 7
SCHEDULES = (("whole prompts", 4096), ("chunks of 512", 512))


def capacity(llm: Any) -> int:
    """Tokens that fit, as vLLM logs them."""
    return llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens


def forced(llm: Any) -> list[Any]:
    """What the model thinks of 48 tokens after long prompts; the tokens are always the same, so pasts never part."""
    return generate(llm, LONG, max_tokens=48, logprobs=5, allowed_token_ids=[FORCED])


def answers(llm: Any, prompts: list[list[int]], max_tokens: int = 32) -> list[Any]:
    return generate(llm, prompts, max_tokens=max_tokens, logprobs=5)


def same_past(a: Any, b: Any) -> int:
    """How many tokens of two answers follow the same tokens."""
    pairs = list(zip(tokens(a), tokens(b), strict=True))
    return next((i + 1 for i, (x, y) in enumerate(pairs) if x != y), len(pairs))


def logprob_differences(outputs: list[Any], wanted: list[Any]) -> list[float]:
    """Of every token that both sides list, wherever they have the same past."""
    differences = []
    for a, b in zip(outputs, wanted, strict=True):
        count = same_past(a, b)
        for x, y in zip(a.outputs[0].logprobs[:count], b.outputs[0].logprobs[:count], strict=True):
            differences += [abs(x[token].logprob - y[token].logprob) for token in x.keys() & y.keys()]
    return differences


def distance(outputs: list[Any], wanted: list[Any]) -> tuple[float, str]:
    """Mean difference of log probabilities, and how it was found."""
    differences = logprob_differences(outputs, wanted)
    mean = sum(differences) / len(differences)
    return mean, f"{mean:.4f} ({sum(map(same_past, outputs, wanted))} tokens)"


class Checks(Results):
    """Runs checks in order, each on engines of its own."""

    def __init__(self, model: Path, dtype: str) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def engine(self, cache: str | None = None, **settings: Any) -> Any:
        return engine(self.model, cache or self.dtype, **(ENGINE | settings))

    def close(self, what: str, outputs: list[Any], wanted: list[Any], bound: float) -> float:
        mean, found = distance(outputs, wanted)
        self.add(what, found, f"at most {bound:.4f}", mean <= bound)
        return mean

    def auto(self) -> None:
        """vLLM's own cache: what to compare with, and how much bfloat16 alone moves results."""
        with self.engine("auto") as llm:
            self.auto_tokens = capacity(llm)
            self.short, self.long, self.forced_auto = answers(llm, SHORT), answers(llm, LONG), forced(llm)
        with self.engine("auto", dtype="float16") as llm:
            self.noise, found = distance(answers(llm, LONG), self.long)
        self.add("auto: float16 against bfloat16", found, "what bfloat16 does", True)

    def kivi(self) -> None:
        """Graphs, capacity, requests within the window, alone against in a batch, prefix hits."""
        with self.engine(enable_prefix_caching=True) as llm:
            mode = llm.llm_engine.vllm_config.compilation_config.cudagraph_mode.name
            self.add("CUDA graphs", mode, "FULL_AND_PIECEWISE", mode == "FULL_AND_PIECEWISE")
            ratio = capacity(llm) / self.auto_tokens
            self.add("capacity", f"{capacity(llm):,} tokens, {ratio:.2f}x auto", "more than auto", ratio > 1)
            self.close("up to 128 tokens against auto", answers(llm, SHORT), self.short, self.noise)
            self.long_kivi = answers(llm, LONG)
            self.loss, found = distance(self.long_kivi, self.long)
            self.add("longer against auto", found, "quantized: more than 0", self.loss > 0)
            llm.reset_prefix_cache()
            self.forced = forced(llm)
            self.forced_loss, _ = distance(self.forced, self.forced_auto)
            llm.reset_prefix_cache()
            alone = [answers(llm, [p])[0] for p in LONG]
            # What bfloat16 changes, quantization can amplify: a value at the edge of a code takes the other one.
            noise = self.close("alone against in a batch", alone, self.long_kivi, max(self.noise, self.loss / 2))
            self.bound = 2 * max(noise, self.noise)
            self.hit = answers(llm, CACHED)
            self.cached = self.hit[0].num_cached_tokens
            self.add("prefix hit", f"{self.cached} of {len(CACHED[0])} tokens", "at least 1,248", self.cached >= 1248)

    def chunks(self) -> None:
        """A prompt cut where the hit resumed is the same computation."""
        with self.engine(max_num_batched_tokens=self.cached) as llm:
            self.close("prefix hit against cold, cut there", self.hit, answers(llm, CACHED), self.bound)

    def graphs(self) -> None:
        """Compiled alike, graphs change nothing. Without compilation every layer rounds otherwise; codes that flip by
        it cost a part of what quantization costs."""
        with self.engine(compilation_config={"cudagraph_mode": "NONE"}) as llm:
            largest = max(logprob_differences(forced(llm), self.forced))
            self.add("without graphs against with", f"{largest:.2g}", "0, to the last bit", largest == 0)
        with self.engine(enforce_eager=True) as llm:
            self.close("not compiled against compiled", forced(llm), self.forced, self.forced_loss / 3)

    def preemption(self) -> None:
        """Recomputed in one chunk, generated tokens attend as they did when they were decoded."""
        prompts = [prompt(length, length) for length in (100, 101, 170, 190)]
        with self.engine() as llm:
            calm = answers(llm, prompts, max_tokens=400)
        with self.engine(num_gpu_blocks_override=140, max_model_len=1024) as llm:
            scheduler = llm.llm_engine.engine_core.engine_core.scheduler
            preempted, stock = [], scheduler._preempt_request
            scheduler._preempt_request = lambda r, *args, **kwargs: (preempted.append(r), stock(r, *args, **kwargs))[1]
            pressed = answers(llm, prompts, max_tokens=400)
        self.add("preemptions", str(len(preempted)), "at least 1", bool(preempted))
        self.close("preempted against not", pressed, calm, self.bound)

    def more_bits(self) -> None:
        """At 8 bits quantization is no larger than rounding, so that a wrong code, scale or boundary shows."""
        for name, batched in SCHEDULES:
            with self.engine("kivi8", max_num_batched_tokens=batched) as llm:
                self.close(f"kivi8 against auto, {name}", answers(llm, LONG), self.long, 2 * self.noise)

    def bypass(self) -> None:
        """Same pages and code path with nothing quantized: equal to auto, whatever the chunks."""
        options = {"kivi": {"full_precision": True, "sink_tokens": 5}}
        for name, batched in SCHEDULES:
            with self.engine(additional_config=options, max_num_batched_tokens=batched) as llm:
                self.close(f"bypass against auto, {name}", answers(llm, LONG), self.long, self.noise)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("auto", "kivi", "more_bits", "chunks", "preemption", "graphs", "bypass")
    parser.add_argument("--only", default=",".join(names), help="auto and kivi come first: others compare with them")
    parser.add_argument("--dtype", default="kivi2")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checks = Checks(save_tiny_llama(Path(folder), **MODEL), args.dtype)
        for name in args.only.split(","):
            start = time.perf_counter()
            try:
                getattr(checks, name)()
            except Exception as error:  # the next check may still tell something
                logging.getLogger("vllm").exception("%s failed", name)
                checks.add(name, f"{type(error).__name__}: {error}"[:200], "no error", False)
                torch.accelerator.empty_cache()
            print(f"---- {name}: {time.perf_counter() - start:.0f} s", flush=True)
    return checks.finish()


if __name__ == "__main__":
    sys.exit(main())

"""Random engines and random requests."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

from vllm_kivi.options import PUBLISHED, KiviOptions

VOCAB, EOS = 256, 1
HEAD_DIM, KV_HEADS = 64, 2
LONGEST = (400, 1500, 8000)  # prompts of an engine
MOST_OUTPUT = 320
MAX_MODEL_LEN = LONGEST[-1] + MOST_OUTPUT

# Coarse codes show an error that fine ones hide.
PRESETS = ("kivi2", "kivi2", "kivi2", "kivi2_boost", "kivi2_boost", "kivi_k4v2", "kivi4", "kivi8")
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {},
    PUBLISHED,
    {"sink_tokens": 9, "residual_length": 100},
    {"group_size": 64},
    {"residual_length": 32},
    {"full_precision": True},
)


def random_engine(rng: random.Random, dtype: str) -> dict[str, Any]:
    """Arguments of an engine whose pool has room for the longest request and, often, little more."""
    max_model_len = rng.choice(LONGEST) + MOST_OUTPUT
    preset = rng.choice(PRESETS)
    options = dict(rng.choice(OPTIONS))
    fmt = KiviOptions(**options).format(preset, HEAD_DIM, KV_HEADS, dtype)
    window = fmt.window_pages(max_model_len)
    blocks = math.ceil(max_model_len / fmt.page_tokens) + 2 * window + 1
    chunked = rng.random() < 0.75
    return {
        "kv_cache_dtype": preset,
        "additional_config": {"kivi": options},
        "num_gpu_blocks_override": blocks + rng.choice((0, 0, 2 * window, 5 * window)),
        "enable_chunked_prefill": chunked,
        "max_num_batched_tokens": rng.choice((128, 256, 1000, 2048, 8192)) if chunked else MAX_MODEL_LEN,
        "long_prefill_token_threshold": rng.choice((0, 0, 200)) if chunked else 0,
        "scheduler_reserve_full_isl": rng.random() < 0.5,
        "max_num_seqs": rng.choice((8, 24, 48)),
        "async_scheduling": rng.random() < 0.5,
        "enable_prefix_caching": rng.random() < 0.85,
        "max_model_len": max_model_len,
    }


@dataclass
class Job:
    """A request: `ends_after` steps of the engine it is aborted, by the client or for its deadline."""

    name: str
    ids: list[int]
    sampling: dict[str, Any]
    ends_after: int | None


def log_uniform(rng: random.Random, low: int, high: int) -> int:
    return round(math.exp(rng.uniform(math.log(low), math.log(high + 0.49))))


class Workload:
    """Requests in turn; some begin like earlier ones.

    longest: tokens of a prompt. seeds: whether sampling may have a seed. After a chunk that is not the last of its
    prompt, vLLM's runner takes back what a request's generator drew; with a seed on a CPU it stops there with "CPU
    Generator does not use offset".
    """

    def __init__(self, rng: random.Random, longest: int, seeds: bool) -> None:
        self._rng, self._longest, self._seeds = rng, longest, seeds
        self._prefixes: list[list[int]] = []
        self._count = 0

    def _tokens(self, count: int) -> list[int]:
        return [self._rng.randrange(2, VOCAB) for _ in range(count)]

    def _ids(self) -> list[int]:
        rng = self._rng
        length = log_uniform(rng, 1, self._longest if rng.random() < 0.1 else min(700, self._longest))
        if rng.random() < 0.45 and self._prefixes:
            prefix = rng.choice(self._prefixes)
            if len(prefix) < self._longest:
                return prefix + self._tokens(min(log_uniform(rng, 1, 200), self._longest - len(prefix)))
        ids = self._tokens(length)
        if length > 150:
            # System prompts come and go.
            self._prefixes.append(ids)
            del self._prefixes[:-12]
        return ids

    def next(self) -> Job:
        rng = self._rng
        ids = self._ids()
        sampling: dict[str, Any] = {
            "max_tokens": log_uniform(rng, 1, MOST_OUTPUT if rng.random() < 0.2 else 60),
            "logprobs": rng.choice((0, 0, 0, 3)),
            "detokenize": False,
            "temperature": 0.0,
        }
        if rng.random() < 0.5:
            sampling |= {
                "temperature": rng.uniform(0.3, 1.5),
                "top_k": rng.choice((0, 0, 1, 20)),
                "top_p": rng.choice((1.0, 1.0, 0.9)),
                "min_p": rng.choice((0.0, 0.0, 0.05)),
            }
            if self._seeds and rng.random() < 0.8:
                sampling["seed"] = rng.randrange(1 << 30)
        if rng.random() < 0.15:
            sampling |= {
                "repetition_penalty": rng.choice((1.0, 1.2)),
                "presence_penalty": rng.choice((0.0, 0.5)),
                "frequency_penalty": rng.choice((0.0, -0.3)),
            }
        if rng.random() < 0.4:
            sampling["stop_token_ids"] = self._tokens(3)
            sampling["min_tokens"] = rng.choice((0, sampling["max_tokens"] // 2))
        if sampling["temperature"] and rng.random() < 0.15 and len(ids) <= 700:
            sampling["n"] = rng.randrange(2, 5)
        if rng.random() < 0.06 and len(ids) <= 1500:
            sampling["prompt_logprobs"] = rng.choice((0, 2))
        self._count += 1
        ends_after = log_uniform(rng, 1, 100) if rng.random() < 0.1 else None
        return Job(f"r{self._count}", ids, sampling, ends_after)

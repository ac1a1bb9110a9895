"""Engines for measurements: which cache dtypes to compare, and vLLM in this process, one engine after the other."""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from vllm_kivi.format import PRESETS
from vllm_kivi.options import KiviOptions


class EvalError(ValueError):
    """A request that cannot be carried out; the message says what to change."""


class Settings(Protocol):
    """What every measurement needs to start an engine."""

    @property
    def model(self) -> str: ...
    @property
    def kv_cache_dtypes(self) -> tuple[str, ...]: ...
    @property
    def baseline(self) -> str: ...
    @property
    def parallel(self) -> int: ...
    @property
    def dtype(self) -> str: ...
    @property
    def additional_config(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Candidate:
    """One cache to measure: a --kv-cache-dtype, with options of its own after a colon."""

    label: str
    dtype: str
    options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Candidate:
        """Read NAME or NAME:option=value,..., e.g. kivi2:group_size=64,sink_tokens=4.

        Raises:
            EvalError: an option without a value, or options of a cache dtype that has none.
        """
        dtype, colon, rest = text.partition(":")
        options = {}
        for part in rest.split(",") if colon else []:
            name, _, value = part.partition("=")
            try:
                options[name.strip()] = json.loads(value)
            except json.JSONDecodeError:
                raise EvalError(f"--kv-cache-dtype {text}: {part!r} is not option=value") from None
        if options and dtype not in PRESETS:
            raise EvalError(f"--kv-cache-dtype {text}: only {', '.join(PRESETS)} take options")
        return cls(text, dtype, options)

    def additional_config(self, common: dict[str, Any]) -> dict[str, Any]:
        """vLLM's additional_config: what is common to all, under the options of this one."""
        if not self.options:
            return common
        return common | {"kivi": {**common.get("kivi", {}), **self.options}}


def candidates(settings: Settings) -> list[Candidate]:
    """What to measure, the baseline first, nothing twice."""
    return [Candidate.parse(text) for text in dict.fromkeys((settings.baseline, *settings.kv_cache_dtypes))]


def batch_sizes(count: int, parallel: int) -> list[int]:
    """How many of `count` requests run side by side: at most `parallel`, in batches that are as equal as can be."""
    batches = math.ceil(count / parallel)
    base, extra = divmod(count, batches)
    return [base + 1] * extra + [base] * (batches - extra)


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


def check_before_vllm(settings: Settings) -> None:
    """What can be seen to be wrong without importing vLLM, which takes seconds.

    Raises:
        EvalError, ValueError: name the option.
    """
    if settings.model.startswith(("/", "./", "../")) and not Path(settings.model).exists():
        raise EvalError(f"model {settings.model}: no such folder")
    KiviOptions.check_entries(settings.additional_config)
    for candidate in candidates(settings):
        KiviOptions.from_additional_config(candidate.additional_config(settings.additional_config))


def read_text(path: Path) -> str:
    """The whole file.

    Raises:
        EvalError: there is none, or it is not UTF-8.
    """
    if not path.is_file():
        raise EvalError(f"--text {path}: no such file")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise EvalError(f"--text {path} is not UTF-8: {error}") from None


def model_config(settings: Settings) -> Any:
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
    for candidate in candidates(settings):
        try:
            CacheConfig(cache_dtype=cast(Any, candidate.dtype))
        except ValueError as error:
            raise EvalError(f"--kv-cache-dtype {candidate.dtype}: {_reason(error)}") from error
    return config


def tokenizer_of(config: Any) -> Any:
    from vllm.tokenizers import cached_tokenizer_from_config

    return cached_tokenizer_from_config(config)


def engine_arguments(
    settings: Settings, candidate: Candidate, config: Any, length: int, requests: int, budget: int
) -> dict[str, Any]:
    """For `requests` side by side of at most `length` tokens, none ever preempted; at most `budget` tokens a step."""
    heads = config.get_total_num_kv_heads() * config.get_total_num_hidden_layers()
    token_bytes = 2 * heads * config.get_head_size() * config.dtype.itemsize
    return {
        "model": settings.model,
        "dtype": settings.dtype,
        "kv_cache_dtype": candidate.dtype,
        "additional_config": candidate.additional_config(settings.additional_config),
        "max_model_len": length,
        "max_num_seqs": requests,
        "max_num_batched_tokens": budget,
        "enable_prefix_caching": False,
        "enforce_eager": True,
        # Twice what the model's own cache takes.
        "kv_cache_memory_bytes": 2 * requests * length * token_bytes + (64 << 20),
    }


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


@contextmanager
def chunks_of(llm: Any, chunk: int) -> Iterator[None]:
    """Prefill in chunks of at most `chunk` tokens.

    Set in the scheduler itself, so that one engine can do both small chunks and whole prompts, and anew in each step:
    vLLM lifts the limit from a request that is alone, up to the token budget of all.
    """
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    config, original = scheduler.scheduler_config, scheduler.schedule
    before = scheduler.max_num_scheduled_tokens, config.long_prefill_token_threshold

    def schedule(*args: Any, **kwargs: Any) -> Any:
        scheduler.max_num_scheduled_tokens = min(before[0], max(1, sum(scheduler.get_request_counts())) * chunk)
        return original(*args, **kwargs)

    config.long_prefill_token_threshold, scheduler.schedule = chunk, schedule
    try:
        yield
    finally:
        scheduler.schedule = original
        scheduler.max_num_scheduled_tokens, config.long_prefill_token_threshold = before

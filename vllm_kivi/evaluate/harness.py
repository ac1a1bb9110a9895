"""lm-eval's tasks over local documents: their prompts, filters and metrics, as published; the only part that needs it.

lm-eval's own evaluator is not used. Prompts are made once, so that all caches get the same ones and the engine's size
is known before it starts; and lm-eval never sees a model, so scores of each document come back for paired differences.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_kivi.evaluate.session import EvalError
from vllm_kivi.evaluate.task_data import Document, read, sources

FEWSHOT_SEED = 1234  # lm-eval's own default, so that examples are those of other people's runs
SPLITS = ("training_split", "validation_split", "fewshot_split")


class HarnessTask:
    """One of lm-eval's tasks: a prompt for each document, and what answers to them score."""

    def __init__(self, name: str, task: Any, shots: int | None, limit: int | None) -> None:
        self.name = name
        self._task = task
        task.set_fewshot_seed(FEWSHOT_SEED)
        if shots is not None:
            task.set_config("num_fewshot", shots)
        self.shots = task.config.num_fewshot or 0
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be turned off
            task.build_all_requests(limit=limit)
        self._instances = sorted(task.instances, key=lambda instance: instance.doc_id)

    @property
    def rolling(self) -> bool:
        """Whether whole documents are scored by their likelihood; answers are generated otherwise."""
        return self._task.OUTPUT_TYPE == "loglikelihood_rolling"

    def arguments(self) -> list[tuple[Any, ...]]:
        """Of each document: its text where it is scored, else the prompt and settings of generation."""
        return [instance.args for instance in self._instances]

    def scores(self, answers: Sequence[Any]) -> dict[str, list[Any]]:
        """What each document scores, by metric; `answers` are texts, or log-likelihoods of whole documents."""
        for instance, answer in zip(self._instances, answers, strict=True):
            instance.resps, instance.filtered_resps = [answer], {}
        self._task.apply_filters()
        scores: dict[str, list[Any]] = {}
        filters = list(self._instances[0].filtered_resps)
        for name in filters:
            for instance in self._instances:
                found = self._task.process_results(instance.doc, [instance.filtered_resps[name]])
                for metric, score in found.items():
                    scores.setdefault(metric if len(filters) == 1 else f"{metric} ({name})", []).append(score)
        # "score" repeats the metric of each part of LongBench under one name.
        return {metric: found for metric, found in scores.items() if metric != "score"}

    def value(self, metric: str, scores: Sequence[Any]) -> float:
        """All documents together, as lm-eval aggregates them."""
        return float(self._task.aggregation()[metric.split(" (")[0]](scores))


def load(tasks: dict[str, Path], shots: int | None, limit: int | None) -> list[HarnessTask]:
    """lm-eval's definitions of these tasks, with documents from local files.

    Raises:
        EvalError: lm-eval is missing, or documents are; says what to do.
    """
    documents = {name: _documents(name, path, shots) for name, path in tasks.items()}
    try:
        import datasets
        import lm_eval.tasks
        from lm_eval.api.task import ConfigurableTask
        from lm_eval.tasks._yaml_loader import load_yaml
    except ImportError as error:
        raise EvalError(f"{error}; tasks need lm-eval: pip install 'vllm-kivi[eval]'") from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    root = Path(lm_eval.tasks.__file__).parent
    loaded = []
    for name, splits in documents.items():
        folder, _, part = name.partition("_")
        try:
            with warnings.catch_warnings(action="ignore"):  # of metrics, about optional packages that make them fast
                config = load_yaml(root / folder / f"{part or folder}.yaml", resolve_func=True)
        except ImportError as error:  # what LongBench's metrics need
            raise EvalError(f"--task {name}: {error}; pip install 'vllm-kivi[eval]'") from None
        datasets_of_splits = {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
        # In place of a name on the hub: nothing can be downloaded.
        config |= {key: None for key in SPLITS if config.get(key) not in splits}
        config["custom_dataset"] = lambda local=datasets_of_splits, **_: local
        loaded.append(HarnessTask(name, ConfigurableTask(config=config), shots, limit))
    return loaded


def _documents(name: str, path: Path, shots: int | None) -> dict[str, list[Document]]:
    """By split; examples only where prompts have any."""
    return {split: read(name, split, path) for split in sources(name) if split == "test" or shots != 0}

"""Data sets of `vllm-kivi eval tasks`: local files in the formats that they are published in. Nothing is downloaded."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_kivi.evaluate.session import EvalError

Document = dict[str, Any]

LONGBENCH = (
    "narrativeqa",
    "qasper",
    "multifieldqa_en",
    "multifieldqa_zh",
    "hotpotqa",
    "2wikimqa",
    "musique",
    "dureader",
    "gov_report",
    "qmsum",
    "multi_news",
    "vcsum",
    "trec",
    "triviaqa",
    "samsum",
    "lsht",
    "passage_count",
    "passage_retrieval_en",
    "passage_retrieval_zh",
    "lcc",
    "repobench-p",
)


@dataclass(frozen=True)
class Source:
    """Where the documents of one split come from.

    Args:
        names: of files below a folder, as published; those of the first that is there are read, in order.
        origin: the data set that has them, for people.
        fields: that each document must have.
        convert: makes what lm-eval's task reads of the documents of a file.
    """

    names: tuple[str, ...]
    origin: str
    fields: tuple[str, ...]
    convert: Callable[[list[Document]], list[Document]] = lambda documents: documents


def pages(lines: list[Document]) -> list[Document]:
    """WikiText's pages: {"page": text} each. Files have a line of text, or a page already, in each document.

    A page begins with its title, = Title =, where a section has two = or more.
    """
    if "page" in lines[0]:
        return lines
    found: list[list[str]] = []
    for line in (document["text"] for document in lines):
        if not found or re.fullmatch(r" = [^=\n](?:.*[^=])? = \n?", line):
            found.append([])
        found[-1].append(line if line.endswith("\n") else f"{line}\n")
    return [{"page": text} for text in map("".join, found) if text.strip()]


def _question(documents: list[Document]) -> list[Document]:
    """LongBench's own files call the question input; lm-eval's tasks, made for a copy of them, question."""
    return [{"question": document.get("input", ""), **document} for document in documents]


WIKITEXT = Source(
    ("wiki.test.raw", "wiki.test.tokens", "test-*.parquet", "wikitext-2-raw-v1/test-*.parquet", "*test*.parquet"),
    'WikiText ("text": a line of a page each, or "page": a whole one)',
    (),
    pages,
)
GSM8K = {
    split: Source(
        (f"{split}.jsonl", f"{split}-*.parquet", f"main/{split}-*.parquet", f"*{split}*.parquet"),
        f'GSM8K ("question" and "answer"), its {split} split',
        ("question", "answer"),
    )
    for split in ("test", "train")
}


def _longbench(name: str) -> Source:
    files = (f"{name}.jsonl", f"data/{name}.jsonl", f"{name}/test-*.parquet", f"{name}.parquet")
    fields = ("context", "answers", "all_classes")
    return Source(files, 'LongBench ("input", "context", "answers" and "all_classes")', fields, _question)


def sources(task: str) -> dict[str, Source]:
    """What a task of lm-eval reads, by split.

    Raises:
        EvalError: no such task.
    """
    if task == "wikitext":
        return {"test": WIKITEXT}
    if task == "gsm8k":
        return GSM8K
    name = task.removeprefix("longbench_")
    if name != task and name in LONGBENCH:
        return {"test": _longbench(name)}
    known = f"wikitext, gsm8k, longbench for all of LongBench, or longbench_ and one of {', '.join(LONGBENCH)}"
    raise EvalError(f"--task {task}: no such task; accepted: {known}")


def _find(path: Path, names: tuple[str, ...]) -> list[Path]:
    return next((found for name in names if (found := sorted(path.glob(name)))), [])


def parse_tasks(texts: tuple[str, ...]) -> dict[str, Path]:
    """NAME=PATH of each --task; longbench stands for all parts of it that are in its folder.

    Raises:
        EvalError: no such task, no such file or folder.
    """
    tasks: dict[str, Path] = {}
    for text in texts:
        name, _, rest = text.partition("=")
        path = Path(rest)
        if name == "longbench":
            parts = {f"longbench_{part}": path for part in LONGBENCH if _find(path, _longbench(part).names)}
            if not parts:
                raise EvalError(_missing("longbench", path, _longbench("hotpotqa")))
            tasks |= parts
            continue
        splits = sources(name)
        if not rest or not path.exists():
            raise EvalError(_missing(name, path if rest else None, splits["test"]))
        tasks[name] = path
    return tasks


def _missing(task: str, path: Path | None, source: Source) -> str:
    where = "no file or folder is given" if path is None else f"nothing to read at {path}"
    return (
        f"--task {task}=PATH: {where}; expected a file of {source.origin} as .jsonl, .json or .parquet"
        f"{', or plain text as .raw, .tokens or .txt' if task == 'wikitext' else ''}, or a folder with "
        f"{' or '.join(source.names)}. Nothing is downloaded: get the data set first"
    )


def _rows(path: Path) -> list[Document]:
    """Documents of one file, by its suffix."""
    if path.suffix == ".parquet":
        from pyarrow import parquet

        return parquet.read_table(path).to_pylist()
    with path.open(encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in file if line.strip()]
        if path.suffix == ".json":
            return json.load(file)
        return [{"text": line} for line in file]


def read(task: str, split: str, path: Path) -> list[Document]:
    """The documents of one split; `path` is a folder, or the file of the test split, with other splits beside it.

    Raises:
        EvalError: the file is missing, is not what its name says, or lacks a field; says what is expected.
    """
    source = sources(task)[split]
    if path.is_file():
        files = [path] if split == "test" else _find(path.parent, source.names)
    else:
        files = _find(path, source.names)
    if not files:
        raise EvalError(_missing(task, path, source))
    documents: list[Document] = []
    for file in files:
        try:
            rows = _rows(file)
        except (OSError, ValueError) as error:  # among them bad JSON, bad UTF-8 and bad parquet
            raise EvalError(f"--task {task}: cannot read {file}: {error}") from None
        # Pages may be in lines; every other file has its fields.
        fields = source.fields or (("page",) if rows and "page" in rows[0] else ("text",))
        for number, row in enumerate(rows, 1):
            if not isinstance(row, dict) or (lacking := [name for name in fields if name not in row]):
                what = "no JSON object" if not isinstance(row, dict) else f"no {' and no '.join(map(repr, lacking))}"
                raise EvalError(f"--task {task}: document {number} of {file} has {what}; expected {source.origin}")
        documents += rows
    documents = source.convert(documents) if documents else []
    if not documents:
        raise EvalError(f"--task {task}: {', '.join(map(str, files))} has no documents; expected {source.origin}")
    return documents

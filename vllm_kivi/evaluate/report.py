"""Statistics and tables that all measurements share."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from vllm_kivi import __version__


def paired_difference(
    ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], block: int
) -> tuple[float, float]:
    """Mean difference of two runs over the same items, and its standard error.

    Items that follow each other err together, so the error is that of the means of blocks of `block` items.
    """
    means, sizes = [], []
    for own, other in zip(ours, theirs, strict=True):
        difference = [a - b for a, b in zip(own, other, strict=True)]
        for start in range(0, len(difference), block):
            part = difference[start : start + block]
            means.append(fmean(part))
            sizes.append(len(part))
    mean = sum(m * n for m, n in zip(means, sizes, strict=True)) / sum(sizes)
    return mean, stdev(means) / math.sqrt(len(means)) if len(means) > 1 else math.nan


def header(model: str, config: Any, additional_config: dict[str, Any]) -> dict[str, Any]:
    """What was run on what: the first fields of every report."""
    import vllm
    from vllm.platforms import current_platform

    return {
        "model": Path(model).name if Path(model).is_dir() else model,
        "dtype": str(config.dtype).removeprefix("torch."),
        "device": current_platform.device_type,
        "vllm": vllm.__version__,
        "vllm_kivi": __version__,
        "additional_config": additional_config,
    }


def percent(share: float | None, digits: int = 0) -> str:
    return "-" if share is None else f"{100 * share:.{digits}f} %"


def layers_text(layers: dict[str, int]) -> str:
    return ", ".join(f"{name} x {count}" for name, count in layers.items())


def markdown(titles: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table; `titles` are separated by commas."""
    cells = [titles.split(","), *rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def save(folder: Path, measure: str, report: dict[str, Any], table: str) -> Path:
    """Write <measure>-<model>.md and .json; returns their path without the suffix."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9.]+", "-", f"{measure}-{report['model']}".lower()).strip("-")
    folder.joinpath(f"{name}.md").write_text(table + "\n", encoding="utf-8")
    folder.joinpath(f"{name}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return folder / name

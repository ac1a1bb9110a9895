"""Draws the plots of benchmarks/results as PNG files from the figures that the benchmarks left in JSON files.

    python benchmarks/plots.py [benchmarks/results/<device>.json ...]

Benchmarks call it themselves; run it where they were run without matplotlib, or after changing how a plot looks. Needs
matplotlib: pip install 'vllm-kivi[bench]'.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
SIZE = (7.0, 4.2)  # inches
MISSING = "no matplotlib here, so nothing was drawn: pip install 'vllm-kivi[bench]', then python benchmarks/plots.py {}"


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def picture_of(data_path: Path, title: str) -> Path:
    """Where the plot of a section goes."""
    return data_path.with_name(f"{data_path.stem}-{slug(title)}.png")


def _known(rows: Iterable[dict[str, Any]], *keys: str) -> list[tuple[Any, ...]]:
    """What rows have under these keys, where it is a finite number under all of them, in order."""
    found = (tuple(row.get(key) for key in keys) for row in rows)
    return sorted(values for values in found if all(value is not None and math.isfinite(value) for value in values))


def _lines(axes: Any, rows: list[dict[str, Any]], plot: dict[str, Any]) -> None:
    """y over x: one line for each of `series` (label -> key), of each value of the key `by`, of rows with `only`."""
    by = plot.get("by", "")
    rows = [row for row in rows if all(row[key] == value for key, value in plot.get("only", {}).items())]
    for group in dict.fromkeys(row.get(by) for row in rows):
        members = [row for row in rows if row.get(by) == group]
        for label, key in plot["series"].items():
            points = _known(members, plot["x"], key)
            if points:
                name = label if group is None else " ".join(filter(None, (str(group), label)))
                axes.plot(*zip(*points, strict=True), marker="o", label=name)
    if plot.get("log"):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({row[plot["x"]] for row in rows})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    else:
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)


def _bars(axes: Any, rows: list[dict[str, Any]], plot: dict[str, Any]) -> None:
    """One bar a row, stacked from `series` (label -> key)."""
    names = [" ".join(format(row[key], form) for key, form in plot["names"].items()) for row in rows]
    bottom = [0.0] * len(rows)
    for label, key in plot["series"].items():
        heights = [row.get(key) or 0.0 for row in rows]
        axes.barh(names, heights, left=bottom, label=label)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    axes.invert_yaxis()


def draw(data_path: Path, titles: Iterable[str] | None = None) -> None:
    """Draw the plots of these sections, or of all, beside the data."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print(MISSING.format(data_path), flush=True)
        return
    data = json.loads(data_path.read_text())
    for title in titles or data:
        plot, rows = data[title]["plot"], data[title]["rows"]
        if not plot:
            continue
        figure = Figure(figsize=SIZE, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        (_bars if plot["kind"] == "bars" else _lines)(axes, rows, plot)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel(plot["x_label"])
        axes.set_ylabel(plot.get("y_label", ""))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        picture = picture_of(data_path, title)
        figure.savefig(picture, dpi=130)
        print(picture, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="*", help="default: all of benchmarks/results")
    for path in parser.parse_args().data or sorted(RESULTS.glob("*.json")):
        draw(path)


if __name__ == "__main__":
    main()

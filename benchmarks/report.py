"""Where benchmarks write: one file a device, one section a table, and beside it the same figures as JSON for plots.py.

A section of an earlier run with the same title is replaced, whatever else the files hold stays.
"""

from __future__ import annotations

import json
import platform
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import plots


def cpu_info() -> tuple[str, int]:
    """Model name and bytes of the last-level cache."""
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = re.search(r"model name\s*:\s*(.*)", text)[1]
        size = re.search(r"cache size\s*:\s*(\d+) KB", text)
        return name, int(size[1]) * 1024 if size else 32 << 20
    except (OSError, TypeError):
        return platform.processor() or platform.machine(), 32 << 20


@dataclass(frozen=True)
class Column:
    """A key of the rows, its heading, and how its values are written: a format specification."""

    key: str
    heading: str
    form: str = ""

    def text(self, row: dict[str, Any]) -> str:
        value = row.get(self.key)
        return "-" if value is None else format(value, self.form)


@dataclass
class Section:
    """A table that is printed as it grows.

    Args:
        about: the sentence above the table: what was run, on which versions, by which script.
        columns: what the table shows; rows may hold more, which only the JSON keeps. A value of None becomes "-".
        plot: what plots.py draws of the rows, if anything.
        notes: what is written below the table.
    """

    title: str
    about: str
    columns: tuple[Column, ...]
    plot: dict[str, Any] | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        print("\n".join([f"\n## {self.title}\n", *self._head()]), flush=True)

    def _head(self) -> list[str]:
        headings = "".join(f" {column.heading} |" for column in self.columns)
        return [self.about, "", f"|{headings}", "|" + "---|" * len(self.columns)]

    def _line(self, row: dict[str, Any]) -> str:
        return "|" + "".join(f" {column.text(row)} |" for column in self.columns)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        print(self._line(row), flush=True)

    def note(self, text: str) -> None:
        self.notes.append(text)
        print(text, flush=True)

    def write(self, device: str, path: Path | None = None, keep: str | None = None) -> None:
        """Put the section into benchmarks/results/<device>.md, or `path`, and into the .json beside it; draw its plot.

        Args:
            keep: a key of the rows; rows of an earlier run of the same sentence stay where this key has another value.

        Raises:
            SystemExit: there is something to keep, and it was measured otherwise.
        """
        path = path or Path(__file__).parent / "results" / f"{plots.slug(device)}.md"
        data_path = path.with_suffix(".json")
        data = json.loads(data_path.read_text()) if data_path.exists() else {}
        old = data.get(self.title)
        if keep and old:
            if old["about"] != self.about:
                raise SystemExit(
                    f"{data_path}: its section was measured otherwise, so nothing is added to it and nothing written"
                )
            measured = {row[keep] for row in self.rows}
            self.rows[:0] = [row for row in old["rows"] if row[keep] not in measured]
            self.notes[:0] = [note for note in old["notes"] if note not in self.notes]
        data[self.title] = {"about": self.about, "rows": self.rows, "notes": self.notes, "plot": self.plot}
        lines = [f"## {self.title}\n", *self._head(), *map(self._line, self.rows)]
        if self.notes:
            lines += ["", "\n\n".join(self.notes)]
        if self.plot:
            picture = plots.picture_of(data_path, self.title).name
            lines += ["", f"Plot: [{picture}]({picture})"]
        text = path.read_text() if path.exists() else f"# {device}\n"
        sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)
        kept = [section.rstrip() for section in sections if not section.startswith(f"## {self.title}\n")]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join([*kept, "\n".join(lines)]) + "\n")
        data_path.write_text(json.dumps(data, indent=1) + "\n")
        if self.plot:
            plots.draw(data_path, [self.title])

"""Where benchmarks write: one file a device, one section a table."""

from __future__ import annotations

import re
from pathlib import Path


def write_section(device: str, title: str, lines: list[str], path: Path | None = None) -> None:
    """Puts a section into benchmarks/results/<device>.md, or `path`, in place of an older one of the same title."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    path = path or Path(__file__).parent / "results" / f"{name}.md"
    text = path.read_text() if path.exists() else f"# {device}\n"
    sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    kept = [section.rstrip() for section in sections if not section.startswith(f"## {title}\n")]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join([*kept, f"## {title}\n\n" + "\n".join(lines)]) + "\n")

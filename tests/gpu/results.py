"""What the checks of this folder found: a line for each, and a table of all."""

from __future__ import annotations


class Results:
    def __init__(self) -> None:
        self.lines: list[tuple[str, str, str, bool]] = []

    def add(self, what: str, found: str, wanted: str, passed: bool) -> None:
        self.lines.append((what, found, wanted, passed))
        print(f"{'ok  ' if passed else 'FAIL'} {what}: {found} (wanted: {wanted})", flush=True)

    def finish(self) -> int:
        """Prints the table; returns the exit code."""
        print("\n| check | found | wanted | |\n|---|---|---|---|")
        for what, found, wanted, passed in self.lines:
            print(f"| {what} | {found} | {wanted} | {'ok' if passed else '**FAIL**'} |")
        return 0 if all(passed for *_, passed in self.lines) else 1

"""Tables of the documentation that a test run writes, and that every other one is held against."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"
_WRITE = os.environ.get("QUANTDEBUG_GOLDEN") == "write"


class Table:
    """The rows of one run, one for each of ``names``, beneath ``head`` in ``docs/<file>``.

    With ``QUANTDEBUG_GOLDEN=write`` the run, in one process and with every case, writes the file. What that machine can
    not run stays as another one has written it.
    """

    def __init__(self, file: str, head: str, names: Sequence[str]) -> None:
        self.path, self.head, self.names = DOCS / file, head, names
        self.rows: dict[str, str] = {}

    def add(self, *cells: str) -> None:
        """Take a row in, whose first cell is its name; it must stand in the file."""
        self.rows[cells[0]] = f"| {' | '.join(cells)} |"
        if not _WRITE:
            assert self.rows[cells[0]] in self.path.read_text().splitlines()

    def finish(self) -> None:
        """Write the file, if it is to be written."""
        if _WRITE:
            before = self.path.read_text().splitlines() if self.path.exists() else []
            kept = {name: line for name in self.names for line in before if line.startswith(f"| {name} |")}
            lines = [self.rows.get(name) or kept[name] for name in self.names]
            self.path.write_text("\n".join([self.head, *lines, ""]))

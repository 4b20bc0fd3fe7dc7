"""Rows and sentences as a terminal or a file shows them; nothing in them can steer the terminal.

Whatever comes from the user's model passes :func:`~lightning_quantdebug.short_names.printable`, so that it holds no
escape sequence, and stands in Rich's ``Text``, which reads no markup.
"""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import TextIO

import rich
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lightning_quantdebug.short_names import printable

WIDTH = 100
"""Columns of plain text: a file has no width of its own."""


def terminal(stream: TextIO | None = None) -> Console | None:
    """The Rich console of a stream that can show colours and boxes.

    Args:
        stream: Where to write; ``None``: standard output, or the cell of a notebook.

    Returns:
        ``None`` where plain text is to be written: the stream is a file or a pipe, has no ``isatty``, is a terminal
        without any abilities (``TERM=dumb``) or one that can not show Unicode.

    Examples:
        >>> import io
        >>> terminal(io.StringIO()) is None
        True
    """
    # The shared console knows of a live display that Lightning holds open, and prints above it.
    console = rich.get_console() if stream is None else Console(file=stream)
    return console if console.is_jupyter or _shows_boxes(console.file) else None


def _shows_boxes(stream: object) -> bool:
    """Whether a stream is a terminal with the usual abilities."""
    # A stream of text in memory has no encoding: it can hold everything.
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return is_terminal(stream) and os.environ.get("TERM") not in ("dumb", "unknown") and encoding.lower()[:3] == "utf"


def is_terminal(stream: object) -> bool:
    """Whether a stream is a terminal; one that can not tell is none.

    Examples:
        >>> is_terminal(object())
        False
    """
    isatty = getattr(stream, "isatty", None)
    return isatty is not None and bool(isatty())


def write_plain(text: str, stream: TextIO | None = None) -> None:
    """Write text and a line break; characters that the stream's encoding lacks become question marks.

    Args:
        text: Any text.
        stream: Where to write; ``None``: standard output.

    Examples:
        >>> write_plain("quantdebug: accepted")
        quantdebug: accepted
    """
    encoding = getattr(sys.stdout if stream is None else stream, "encoding", None) or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), file=stream, flush=True)


def wrapped(text: str, first: str = "", rest: str = "") -> list[str]:
    """Lines of at most 100 columns.

    Args:
        text: Any text; control characters become spaces.
        first: What the first line begins with.
        rest: What the others begin with.

    Examples:
        >>> wrapped("a" + chr(27) + "b", "* ")
        ['* a b']
    """
    return textwrap.wrap(printable(text), WIDTH, initial_indent=first, subsequent_indent=rest)


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> list[str]:
    """Rows with columns of equal width, as lines of text.

    Args:
        rows: Cells, as many in each row.
        left: How many columns are aligned to the left; the others are to the right.

    Examples:
        >>> aligned([("a", "1"), ("bc", "10")])
        ['a    1', 'bc  10']
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def colored(text: str, styles: Mapping[str, str]) -> Text:
    """A text in the style that is given for just this text, if one is.

    Examples:
        >>> colored("failed", {"failed": "red"}).style
        'red'
    """
    return Text(printable(text), style=styles.get(text, ""))


def rich_table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    styles: Mapping[str, str],
    *,
    texts: Sequence[int] = (0,),
) -> Table:
    """Rows as a Rich table that fits the terminal.

    Args:
        header: Names of the columns.
        rows: Cells, as many in each row as there are columns; no markup in them is read.
        styles: The style of cells that are just one of these words.
        texts: The columns that hold texts and stand to the left; the others hold numbers or words. Where the terminal
            is too narrow the widest columns are broken first.

    Examples:
        >>> len(rich_table(("step", "score"), [("weights", "0.5")], {}).columns)
        2
    """
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for column, name in enumerate(header):
        table.add_column(Text(printable(name)), justify="left" if column in texts else "right", overflow="fold")
    for row in rows:
        table.add_row(*(colored(cell, styles) for cell in row))
    return table

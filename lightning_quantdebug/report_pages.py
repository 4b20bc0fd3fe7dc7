"""Write what a person reads of a report: the pages, and the pictures as files.

The callback writes the pages at the end of a walk, the command line writes them anew from ``report.json``. What draws
is imported when it is needed: plotly and matplotlib take longer to import than the rest of this package.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_quantdebug.report import Report, write_atomically
from lightning_quantdebug.report_markdown import to_markdown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGES = ("report.md", "report.html")

LONGEST_NAME = 100
"""Of a picture's file, in characters, all of them ASCII: file systems take 255 bytes, archives often less."""

_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


def page_files(directory: str | Path) -> dict[str, str]:
    """Role and path of each page that :func:`write_pages` writes to a directory.

    Args:
        directory: Where they are, or will be.

    Examples:
        >>> page_files("quantdebug")["report.md"]
        'quantdebug/report.md'
    """
    return {name: str(Path(directory) / name) for name in PAGES}


def write_pages(report: Report, directory: str | Path) -> dict[str, str]:
    """Write ``report.md`` and ``report.html``, each whole or not at all.

    Args:
        report: The report; the files that it names in ``final.files`` are what the pages name.
        directory: Where to write; it is made if it does not exist.

    Returns:
        Role and path of each page, as :func:`page_files` has them.

    Raises:
        ReportError: If a page can not be written.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = write_pages(Report(), folder)
        ...     sorted(path.name for path in Path(folder).iterdir())
        ['report.html', 'report.md']
    """
    from lightning_quantdebug.html_report import to_html

    files = page_files(directory)
    # Both are made before either is written: a report that can not be drawn leaves the pages as they were.
    texts = {"report.md": to_markdown(report), "report.html": to_html(report)}
    for name, text in texts.items():
        write_atomically(files[name], text)
    return files


def write_pictures(report: Report, directory: str | Path) -> list[Path]:
    """Write every picture of a report as PNG.

    Args:
        report: The report.
        directory: Where to write; pictures of an earlier time stay.

    Returns:
        The files: the overview of the walk, then each guilty tensor, numbered in the report's order.

    Raises:
        ReportError: If a file can not be written.

    Examples:
        >>> write_pictures(Report(), "pictures")
        []
    """
    from lightning_quantdebug.figure_style import png

    pictures = list(_pictures(report))
    names = file_names([name for name, _ in pictures])
    return [
        _write(Path(directory) / f"{name}.png", png(figure)) for name, (_, figure) in zip(names, pictures, strict=True)
    ]


def _write(path: Path, content: bytes) -> Path:
    """Write bytes atomically."""
    return write_atomically(path, lambda file: file.write(content))


def file_names(names: Sequence[str]) -> list[str]:
    """A file's name without its ending for each name: safe on every file system, and no two alike.

    Letters and digits of ASCII, ``.``, ``_`` and ``-`` stay; a run of others becomes one ``_``. Names that differ only
    in what was replaced, cut or written in capitals get a number.

    Args:
        names: Any texts, such as names of quantizers.

    Examples:
        >>> file_names(["conv/1", "../../etc/passwd", "conv 1", ""])
        ['conv_1', 'etc_passwd', 'conv_1-2', 'picture']
    """
    taken: set[str] = set()
    safe = []
    for name in names:
        # No name begins with a dot or a dash: such files are hidden, or read as options of commands.
        stem = _UNSAFE.sub("_", name).strip("._-")[:LONGEST_NAME] or "picture"
        found, count = stem, 1
        while found.casefold() in taken:
            count += 1
            found = f"{stem[: LONGEST_NAME - 8]}-{count}"
        taken.add(found.casefold())
        safe.append(found)
    return safe


def _pictures(report: Report) -> Iterator[tuple[str, Figure]]:
    """Every picture with its name."""
    from lightning_quantdebug.figures import overview
    from lightning_quantdebug.tensor_figures import of_tensor

    yield from ((f"overview-{name}", figure) for name, figure in overview(report).items())
    for number, view in enumerate(report.visuals.tensors, 1):
        for name, figure in of_tensor(view).items():
            yield f"tensor-{number:02d}-{name}-{view.quantizer}", figure


def with_files(report: Report, files: dict[str, str]) -> Report:
    """The report with other places of its files; a place that is the same, written otherwise, stays as it was.

    Args:
        report: The report; files that are not mentioned stay.
        files: Role and path of each.

    Examples:
        >>> with_files(Report(), {"report.md": "a/report.md"}).final.files
        {'report.md': 'a/report.md'}
    """
    known = report.final.files
    moved = {
        role: path
        for role, path in files.items()
        if role not in known or os.path.abspath(known[role]) != os.path.abspath(path)
    }
    return replace(report, final=replace(report.final, files={**known, **moved}))

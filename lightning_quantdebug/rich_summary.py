"""The summary of a report for a terminal: the words of :mod:`~lightning_quantdebug.summary_rows`, drawn with Rich.

Colours are the sixteen that every terminal has and that its theme makes legible on light and on dark; a word stands
beside each, so that nothing is told by colour alone. ``NO_COLOR`` is Rich's own business.
"""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from lightning_quantdebug import summary_rows as rows
from lightning_quantdebug.report import Report, StepVerdict, Verdict
from lightning_quantdebug.short_names import printable
from lightning_quantdebug.terminal_text import rich_table

_STYLES = {
    StepVerdict.PASSED.value: "green",
    StepVerdict.FAILED.value: "red",
    StepVerdict.BROKEN.value: "bold red",
    StepVerdict.NOISE.value: "magenta",
    "kept": "green",
    "undone": "dim",
}
_VERDICT_STYLES = {
    Verdict.ACCEPTED: "green",
    Verdict.REPAIRED: "green",
    Verdict.REPAIRED_BY_QAT: "green",
    None: "magenta",
}


def print_rich(report: Report, console: Console) -> None:
    """Print the summary of a report.

    Args:
        report: A report at any moment of the walk.
        console: A terminal or a notebook.

    Examples:
        >>> import io
        >>> console = Console(file=io.StringIO(), width=60)
        >>> print_rich(Report(verdict=Verdict.ACCEPTED), console)
        >>> "ACCEPTED" in console.file.getvalue()
        True
    """
    console.print(_panel(report), *_sections(report), highlight=False)
    # Neither wrapped nor cut, whatever the width: what is copied from here is to work.
    for line in rows.names_and_texts(rows.file_rows(report)):
        console.print(Text(line), highlight=False, soft_wrap=True)
    command = rows.tensorboard_command(report)
    if command is not None:
        console.print(Text(command, style="bold"), highlight=False, soft_wrap=True)


def _panel(report: Report) -> Panel:
    """The verdict, what it means, and what stopped the walk."""
    verdict, scores = rows.title(report)
    style = _VERDICT_STYLES.get(report.verdict, "red")
    lines = [scores, *rows.outcome_texts(report)]
    text = Text("\n").join(Text(printable(line)) for line in lines if line)
    return Panel(text, title=Text(f"quantdebug: {printable(verdict)}", f"bold {style}"), border_style=style)


def _sections(report: Report) -> list[RenderableType]:
    """The walk, remedies, findings and what to do next, as far as there are any."""
    steps, remedies = rows.step_rows(report), rows.remedy_rows(report)
    walk: list[RenderableType] = [rich_table(rows.STEP_HEADER, steps, _STYLES)] if steps else []
    walk += [Text(printable(text)) for text in rows.step_texts(report)]
    tried: list[RenderableType] = []
    if remedies:
        tried.append(rich_table(rows.REMEDY_HEADER, remedies, _STYLES, texts=(0, 4)))
    todo = [_item("  *", Text(printable(text))) for text in rows.next_texts(report)]
    exported = [_item("  *", Text(text)) for text in rows.export_texts(report)]
    parts = [walk, tried, _titled("Findings", _findings(report)), _titled("Next", todo), _titled("Exported", exported)]
    # An empty line above each part, and one above the files.
    return [*(Padding(Group(*part), (1, 0, 0, 0)) for part in parts if part), Text()]


def _titled(title: str, items: list[RenderableType]) -> list[RenderableType]:
    """Items under a title; nothing where there are none."""
    return [Text(title, "bold"), *items] if items else []


def _findings(report: Report) -> list[RenderableType]:
    """Cause and evidence of each finding, and its advice below them."""
    items: list[RenderableType] = []
    for place, evidence, advice in rows.finding_texts(report):
        items.append(_item("  *", Text.assemble((printable(place), "bold"), f": {printable(evidence)}")))
        items.append(_item("    ->", Text(printable(advice), "cyan")))
    more = rows.more_findings(report)
    return [*items, *([Text(f"  {more}")] if more else [])]


def _item(mark: str, text: Text) -> RenderableType:
    """A text with a mark before it; lines that follow are indented as the first one is."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text(mark), text)
    return grid

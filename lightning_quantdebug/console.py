"""What the user sees in the terminal: a summary of the report, and the progress of the walk."""

from __future__ import annotations

import math
import sys
import time
from contextlib import suppress
from types import TracebackType
from typing import Any, TextIO

from rich.markup import escape
from rich.text import Text
from tqdm import tqdm

from lightning_quantdebug import summary_rows as rows
from lightning_quantdebug.report import Report
from lightning_quantdebug.rich_summary import print_rich
from lightning_quantdebug.short_names import printable
from lightning_quantdebug.terminal_text import WIDTH, aligned, is_terminal, terminal, wrapped, write_plain

# Often enough to see that the walk lives, seldom enough not to fill a log file.
SECONDS_BETWEEN_LINES = 10.0
# As often as tqdm itself draws a bar, by default.
SECONDS_BETWEEN_FRAMES = 0.1


def summary(report: Report) -> str:
    """The report as plain text for a terminal, at most 100 columns wide.

    Args:
        report: A report at any moment of the walk.

    Returns:
        Verdict, steps, findings, what to do next, where the files are and how to open TensorBoard. Control characters
        in names are left out, so that no name can steer the terminal.

    Examples:
        >>> from lightning_quantdebug.report import Verdict
        >>> print(summary(Report(verdict=Verdict.ACCEPTED)).splitlines()[1])
        quantdebug: ACCEPTED
    """
    verdict, scores = rows.title(report)
    texts = [f"quantdebug: {verdict}{f': {scores}' if scores else ''}", *rows.outcome_texts(report)]
    lines = ["-" * WIDTH, *(line for text in texts for line in wrapped(text))]
    lines += _steps(report) + _remedies(report) + _findings(report) + _next(report)
    lines += _exports(report) + _files(report)
    return "\n".join([*lines, "-" * WIDTH])


def print_summary(report: Report, stream: TextIO | None = None) -> None:
    """Print the summary: with colours and boxes in a terminal or a notebook, as plain text elsewhere.

    Args:
        report: A report at any moment of the walk.
        stream: Where to write; ``None``: standard output.

    Examples:
        >>> import io
        >>> file = io.StringIO()
        >>> print_summary(Report(), file)
        >>> file.getvalue() == summary(Report()) + chr(10)
        True
    """
    console = terminal(stream)
    if console is None:
        write_plain(summary(report), stream)
    else:
        print_rich(report, console)


def _steps(report: Report) -> list[str]:
    """The walk as an aligned table, then what it does not say."""
    steps = rows.step_rows(report)
    lines = ["", *aligned([rows.STEP_HEADER, *steps])] if steps else []
    return [*lines, *(line for text in rows.step_texts(report) for line in wrapped(text))]


def _remedies(report: Report) -> list[str]:
    """What was tried, with the score before and after."""
    tried = rows.remedy_rows(report)
    if not tried:
        return []
    table = [rows.REMEDY_HEADER, *tried]
    lines = [f"{line}  {row[-1]}" for line, row in zip(aligned([row[:-1] for row in table]), table, strict=True)]
    return ["", *(line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..." for line in lines)]


def _findings(report: Report) -> list[str]:
    """The most important findings, each with its advice."""
    lines: list[str] = []
    for place, evidence, advice in rows.finding_texts(report):
        lines += wrapped(f"{place}: {evidence}", "  * ", "    ") + wrapped(advice, "    -> ", "       ")
    more = rows.more_findings(report)
    return ["", "Findings", *lines, *([f"  {more}"] if more else [])] if lines else []


def _next(report: Report) -> list[str]:
    """What to do next."""
    lines = [line for text in rows.next_texts(report) for line in wrapped(text, "  * ", "    ")]
    return ["", "Next", *lines] if lines else []


def _exports(report: Report) -> list[str]:
    """What runs elsewhere, and whether it was proven."""
    lines = [line for text in rows.export_texts(report) for line in wrapped(text, "  * ", "    ")]
    return ["", "Exported", *lines] if lines else []


def _files(report: Report) -> list[str]:
    """Where the files are; a path is never broken, so that it can be copied."""
    lines, command = rows.names_and_texts(rows.file_rows(report)), rows.tensorboard_command(report)
    lines += [command] if command is not None else []
    return ["", *lines] if lines else []


def in_words(seconds: float) -> str:
    """A duration, as exact as it is of use.

    Examples:
        >>> in_words(72.4), in_words(600), in_words(5400)
        ('72 s', '10 min', '1 h 30 min')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def time_left(seconds: float, done: float, total: float) -> str:
    """About how long the rest will take, in words, if it goes on as it went so far; empty where that is not known.

    Args:
        seconds: How long what is done has taken.
        done: How much is done.
        total: How much there is to do.

    Examples:
        >>> time_left(10.0, 2, 6), time_left(0.0, 0, 6), time_left(9.0, 6, 6)
        (', ~20 s left', '', '')
    """
    return f", ~{in_words(seconds / done * (total - done))} left" if 0 < done < total else ""


class _Patient:
    """A column of Lightning's display that goes on showing what it last showed while it can not be asked.

    The column of the metrics wants RichProgressBar among the Trainer's callbacks, which an extra validation pass leaves
    out: it would end Lightning's drawing thread, or the walk.
    """

    def __init__(self, column: Any) -> None:
        self.get_table_column = column.get_table_column
        self._column = column
        self._last: dict[int, Any] = {}

    def __call__(self, task: Any) -> Any:
        """What the column shows of a task."""
        # Lightning asserts; with Python's -O it finds no attribute of None.
        with suppress(AssertionError, AttributeError):
            self._last[task.id] = self._column(task)
        return self._last.get(task.id, "")


class _LiveBar:
    """A bar on the live display that Lightning's RichProgressBar has open, with the calls that tqdm's has."""

    def __init__(self, live: Any, total: int | None) -> None:
        self.total = total
        self._live = live
        self._columns = live.columns
        live.columns = tuple(column if isinstance(column, str) else _Patient(column) for column in live.columns)
        # Lightning's display wants infinity where Rich wants None.
        self._task = live.add_task("quantdebug", total=math.inf if total is None else total)

    def set_description(self, text: str) -> None:
        """Say what runs now; names in it are no markup."""
        self._live.update(self._task, description=escape(text))
        self._draw()

    def update(self, evaluations: int) -> None:
        """Count evaluations that are done."""
        self._live.update(self._task, advance=evaluations)
        self._draw()

    def write(self, text: str, file: TextIO) -> None:
        """Print a line that stays above the bars."""
        self._live.console.print(Text(text), highlight=False)

    def refresh(self) -> None:
        """Show another total."""
        self._live.update(self._task, total=self.total)
        self._draw()

    def close(self) -> None:
        """Remove the bar."""
        self._live.remove_task(self._task)
        self._live.columns = self._columns
        self._draw()

    def _draw(self) -> None:
        """Ask for another frame: Lightning's display draws none by itself."""
        getattr(self._live, "soft_refresh", self._live.refresh)()


class Progress:
    """Progress of the walk, with the time that is left: a bar in a terminal, lines elsewhere, nothing when silent.

    Where a step counts runs of its own, the time left is that of the step; else it is that of the walk, as far as its
    evaluations foretell it.

    Args:
        total: Number of evaluations to come, or ``None`` where it is not known.
        verbose: ``False``: write nothing.
        rank_zero: Whether this process speaks for all of them; the others write nothing.
        stream: Where to write; default: standard error.
        position: Row of the bar, below the bars that Lightning holds open.
        live: The live display of Lightning's RichProgressBar, if one is open: the bar is drawn there.

    Examples:
        >>> with Progress(total=2, verbose=False) as progress:
        ...     progress.describe("weights")
        ...     progress.advance()
    """

    def __init__(
        self,
        total: int | None,
        *,
        verbose: bool = True,
        rank_zero: bool = True,
        stream: TextIO | None = None,
        position: int = 0,
        live: Any = None,
    ) -> None:
        """Remember how to show it; nothing is shown before the walk is entered."""
        self.total = total
        self.done = 0
        self._stream = sys.stderr if stream is None else stream
        self._speaks = verbose and rank_zero
        self._position = position
        self._live = live
        self._bar: tqdm[None] | _LiveBar | None = None
        self._step = self._runs = ""
        self._started = self._said = self._runs_started = time.monotonic()
        self._first_run = self._last_run = 0

    def __enter__(self) -> Progress:
        """Open the bar, where there is a terminal."""
        self._started = self._said = time.monotonic()
        if self._speaks and self._live is not None:
            self._bar = _LiveBar(self._live, self.total)
        elif self._speaks and is_terminal(self._stream):
            self._bar = tqdm(
                total=self.total,
                desc="quantdebug",
                unit="evaluation",
                file=self._stream,
                position=self._position,
                leave=False,
                dynamic_ncols=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the bar, also when the walk failed."""
        self.close()

    def describe(self, step: str) -> None:
        """Say what runs now."""
        self._step, self._runs, self._last_run = printable(step), "", 0
        self._say()

    def tell(self, text: str) -> None:
        """Print a line that stays."""
        line = f"quantdebug: {printable(text)}"
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        elif self._speaks:
            write_plain(line, self._stream)

    def expect(self, evaluations: int) -> None:
        """Count on evaluations that were not foreseen when the bar was opened."""
        if self.total is None:
            return
        self.total += evaluations
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.refresh()

    def advance(self, evaluations: int = 1) -> None:
        """Count evaluations that are done; where there are more than were foreseen, the total grows."""
        self.done += evaluations
        if self.total is not None and self.done > self.total:
            self.expect(self.done - self.total)
        if self._bar is not None:
            self._bar.update(evaluations)
        self._say(every=SECONDS_BETWEEN_LINES if self._bar is None else 0.0)

    def runs(self, done: int, total: int, unit: str = "runs") -> None:
        """Show how many of the runs of one group are done, and about how long the others will take.

        Args:
            done: How many are done; fewer than before begin a new group.
            total: How many there will be.
            unit: What they are.
        """
        now = time.monotonic()
        if not self._last_run or done < self._last_run:
            # Where the clock starts: what is done by now does not count.
            self._runs_started, self._first_run = now, done
        self._last_run = done
        left = time_left(now - self._runs_started, done - self._first_run, total - self._first_run)
        self._runs = f", {done}/{total} {unit}{left}" if 1 < done < total else ""
        self._say(every=SECONDS_BETWEEN_LINES if self._bar is None else SECONDS_BETWEEN_FRAMES)

    def close(self) -> None:
        """Remove the bar; calling it again does nothing."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _say(self, every: float = 0.0) -> None:
        """Show what runs now, unless something was shown less than ``every`` seconds ago."""
        now = time.monotonic()
        if not self._speaks or now - self._said < every:
            return
        self._said = now
        if self._bar is not None:
            # tqdm tells the time left itself. Rich forgets its speed after 30 s without an evaluation.
            left = self._left() if isinstance(self._bar, _LiveBar) else ""
            self._bar.set_description(f"quantdebug {self._step}{self._runs or left}")
            return
        of_total = "" if self.total is None else f" of {self.total}"
        line = f"quantdebug {self._step}: {self.done}{of_total} evaluations, {in_words(now - self._started)}"
        write_plain(f"{line}{self._runs or self._left()}", self._stream)

    def _left(self) -> str:
        """The time that the walk still takes, in words."""
        return time_left(time.monotonic() - self._started, self.done, self.total or 0)

"""What the user sees in the terminal: a summary of the report as plain text, and the progress of the walk."""

from __future__ import annotations

import shlex
import sys
import textwrap
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from lightning_quantdebug.report import Report, StepName, StepVerdict
from lightning_quantdebug.report_markdown import (
    headline,
    interaction,
    interval,
    next_steps,
    not_walked,
    number,
    outcome,
    walked,
)

WIDTH = 100
MAX_FINDINGS = 5
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
    verdict, _, rest = headline(report).partition(":")
    lines = ["-" * WIDTH, *_wrapped(f"quantdebug: {verdict.upper()}{':' if rest else ''}{rest}")]
    lines += _wrapped(outcome(report))
    if report.error:
        lines += _wrapped(f"The walk stopped with: {report.error}")
    lines += _steps(report) + _remedies(report) + _findings(report) + _next(report) + _files(report)
    return "\n".join([*lines, "-" * WIDTH])


def _clean(text: str) -> str:
    """The text on one line, without characters that a terminal would obey."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def _wrapped(text: str, first: str = "", rest: str = "") -> list[str]:
    """Lines of at most 100 columns."""
    return textwrap.wrap(_clean(text), WIDTH, initial_indent=first, subsequent_indent=rest)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows with columns of equal width: the first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _steps(report: Report) -> list[str]:
    """The walk as an aligned table, then the steps that did not run."""
    rows = [("step", "score", "loss", "95 % interval", "verdict", "seconds")]
    for step in walked(report):
        numbers = (number(step.score), number(step.loss), interval(step.interval))
        rows.append((step.step.value, *numbers, step.verdict.value, f"{step.seconds or 0.0:.1f}"))
    lines = ["", *_aligned(rows)] if len(rows) > 1 else []
    both = interaction(report)
    lines += _wrapped(both) if both else []
    of_quantizers = (report.step(StepName.PER_QUANTIZER), report.step(StepName.FIX_QUANTIZERS))
    for step in walked(report):
        lines += _wrapped(f"{step.step.value}: {step.advice}") if step in of_quantizers and step.advice else []
    for verdict, text in ((StepVerdict.SKIPPED, "skipped"), (StepVerdict.NOT_RUN, "not run by this version")):
        names = not_walked(report, verdict)
        lines += _wrapped(f"{text}: {', '.join(names)}") if names else []
    return lines


def _remedies(report: Report) -> list[str]:
    """What was tried, with the score before and after."""
    if not report.remedies:
        return []
    rows = [("remedy", "before", "after", "", "why")]
    for item in report.remedies:
        fate = "kept" if item.kept else "undone"
        rows.append((_clean(item.title), number(item.before), number(item.after), fate, _clean(item.reason)))
    table = _aligned([row[:-1] for row in rows])
    lines = [f"{line}  {row[-1]}" for line, row in zip(table, rows, strict=True)]
    return ["", *(line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..." for line in lines)]


def _findings(report: Report) -> list[str]:
    """The most important findings, each with its advice."""
    if not report.findings:
        return []
    lines = ["", "Findings"]
    for finding in report.findings[:MAX_FINDINGS]:
        where = f" at {finding.quantizer}" if finding.quantizer else ""
        lines += _wrapped(f"{finding.cause.value}{where}: {finding.evidence}", "  * ", "    ")
        lines += _wrapped(finding.advice, "    -> ", "       ")
    left = len(report.findings) - MAX_FINDINGS
    return [*lines, f"  and {left} more in the report"] if left > 0 else lines


def _next(report: Report) -> list[str]:
    """What to do next, without what the findings have said already."""
    said = {finding.advice for finding in report.findings[:MAX_FINDINGS]}
    steps = [step for step in next_steps(report) if step not in said]
    if not steps:
        return []
    return ["", "Next", *(line for step in steps for line in _wrapped(step, "  * ", "    "))]


def _files(report: Report) -> list[str]:
    """Where the files are; a path is never broken, so that it can be copied."""
    files = {_clean(role): _clean(path) for role, path in report.final.files.items()}
    logdir = files.pop("tensorboard", None)
    width = max((len(role) for role in files), default=0)
    lines = [f"{role.ljust(width)}  {path}" for role, path in files.items()]
    if logdir is not None:
        lines.append(f"tensorboard --logdir {shlex.quote(logdir)}")
    return ["", *lines] if lines else []


class _LiveBar:
    """A bar on the live display that Lightning's RichProgressBar has open, with the calls that tqdm's has."""

    def __init__(self, live: Any, total: int | None) -> None:
        self.total = total
        self._live = live
        self._task = live.add_task("quantdebug", total=total)

    def set_description(self, text: str) -> None:
        """Say what runs now."""
        self._live.update(self._task, description=text)

    def update(self, evaluations: int) -> None:
        """Count evaluations that are done."""
        self._live.update(self._task, advance=evaluations)

    def write(self, text: str, file: TextIO) -> None:
        """Print a line that stays above the bars."""
        self._live.console.print(text, markup=False, highlight=False)

    def refresh(self) -> None:
        """Show another total."""
        self._live.update(self._task, total=self.total)

    def close(self) -> None:
        """Remove the bar."""
        self._live.remove_task(self._task)


class Progress:
    """Progress of the walk: a bar in a terminal, lines elsewhere, nothing when silent.

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
        self._step = self._detail = ""
        self._started = self._said = self._runs_started = time.monotonic()

    def __enter__(self) -> Progress:
        """Open the bar, where there is a terminal."""
        self._started = self._said = time.monotonic()
        if self._speaks and self._live is not None:
            self._bar = _LiveBar(self._live, self.total)
        elif self._speaks and self._stream.isatty():
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
        """Say which step runs now."""
        self._step, self._detail = step, ""
        if self._bar is not None:
            self._bar.set_description(f"quantdebug {step}")
        elif self._speaks:
            self._say()

    def tell(self, text: str) -> None:
        """Print a line that stays."""
        if self._bar is not None:
            self._bar.write(f"quantdebug: {text}", file=self._stream)
        elif self._speaks:
            print(f"quantdebug: {text}", file=self._stream, flush=True)

    def expect(self, evaluations: int) -> None:
        """Count on evaluations that were not foreseen when the bar was opened."""
        if self.total is None:
            return
        self.total += evaluations
        if self._bar is not None:
            self._bar.total = self.total
            self._bar.refresh()

    def advance(self, evaluations: int = 1) -> None:
        """Count evaluations that are done."""
        self.done += evaluations
        if self._bar is not None:
            self._bar.update(evaluations)
        elif self._speaks and time.monotonic() - self._said >= SECONDS_BETWEEN_LINES:
            self._say()

    def runs(self, done: int, total: int) -> None:
        """Show how many of the runs of one group are done, and about how long the others will take."""
        now = time.monotonic()
        if done <= 1 or now < self._runs_started:
            self._runs_started = now
        left = (now - self._runs_started) / max(1, done - 1) * max(0, total - done)
        self._detail = f", {done} of {total} runs, about {left:.0f} s left" if 1 < done < total else ""
        if self._bar is not None and now - self._said >= SECONDS_BETWEEN_FRAMES:
            self._said = now
            self._bar.set_description(f"quantdebug {self._step}{self._detail}")
        elif self._bar is None and self._speaks and now - self._said >= SECONDS_BETWEEN_LINES:
            self._say()

    def close(self) -> None:
        """Remove the bar; calling it again does nothing."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _say(self) -> None:
        """Write one line of progress."""
        self._said = time.monotonic()
        of_total = "" if self.total is None else f" of {self.total}"
        seconds = self._said - self._started
        print(
            f"quantdebug {self._step}: {self.done}{of_total} evaluations, {seconds:.0f} s{self._detail}",
            file=self._stream,
            flush=True,
        )

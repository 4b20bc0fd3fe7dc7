"""The comparison of two runs for a person: tables in a terminal, aligned text elsewhere, the same words in both."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from rich.console import Console
from rich.padding import Padding
from rich.panel import Panel
from rich.text import Text

from lightning_quantdebug.loss_change import Loss, LossChange, Outcome
from lightning_quantdebug.markdown_text import number
from lightning_quantdebug.report import Finding, StepVerdict, Verdict
from lightning_quantdebug.report_diff import Comparison, Measurement
from lightning_quantdebug.short_names import printable, short_names
from lightning_quantdebug.terminal_text import WIDTH, aligned, rich_table, terminal, wrapped, write_plain

NAME_WIDTH = 40
"""Columns of a quantizer's or a setting's name: the whole one is in the JSON."""

MOST_ROWS = 20
"""Of bit-widths and of settings: what differs in more places is better read in the JSON."""

_STYLES = {
    "worse": "bold red",
    "better": "green",
    "noise": "dim",
    **{verdict.value: "green" for verdict in (Verdict.ACCEPTED, Verdict.REPAIRED, Verdict.REPAIRED_BY_QAT)},
    **{verdict.value: "red" for verdict in (Verdict.NOT_ACCEPTED, Verdict.BROKEN_PIPELINE, StepVerdict.BROKEN)},
    StepVerdict.PASSED.value: "green",
    StepVerdict.FAILED.value: "red",
}


@dataclass(frozen=True)
class Part:
    """One part of what is printed.

    Attributes:
        title: Its heading.
        header: Names of the columns, where it has a table.
        rows: Cells of the table.
        texts: Lines below the table.
        left: How many columns hold texts; the others hold numbers and words.
    """

    title: str
    header: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    texts: tuple[str, ...] = ()
    left: int = 1


def print_comparison(found: Comparison, stream: TextIO | None = None) -> None:
    """Print a comparison: with colours and boxes in a terminal, as plain text elsewhere.

    Args:
        found: What two runs differ in.
        stream: Where to write; ``None``: standard output.

    Examples:
        >>> from lightning_quantdebug.report import Final, Report
        >>> from lightning_quantdebug.report_diff import compare
        >>> print_comparison(compare(Report(final=Final(loss=0.1)), Report(final=Final(loss=0.1))))
        NO REGRESSION: The loss of final is the same. Neither an interval nor ...
    """
    console = terminal(stream)
    if console is None:
        write_plain("\n".join(_plain_lines(found)), stream)
    else:
        _print_rich(found, console)


def comparison_json(found: Comparison) -> str:
    """A comparison as JSON for CI.

    Examples:
        >>> from lightning_quantdebug.report import Final, Report
        >>> from lightning_quantdebug.report_diff import compare
        >>> same = compare(Report(final=Final(loss=0.1)), Report(final=Final(loss=0.1)))
        >>> json.loads(comparison_json(same))["regression"]
        False
    """
    return json.dumps(found.to_dict(), indent=2, allow_nan=False, ensure_ascii=True)


def _head(found: Comparison) -> str:
    """The decision in one word or two."""
    return "REGRESSION" if found.regression else "NO REGRESSION"


def _plain_lines(found: Comparison) -> list[str]:
    """All of it as text."""
    lines = wrapped(f"{_head(found)}: {found.reason}")
    lines += [line for note in found.notes for line in wrapped(note, "* ", "  ")]
    for part in parts(found):
        lines += ["", part.title]
        lines += aligned([part.header, *part.rows], part.left) if part.rows else []
        lines += [line for text in part.texts for line in wrapped(text)]
    return [line.rstrip() for line in lines]


def _print_rich(found: Comparison, console: Console) -> None:
    """All of it in colours."""
    style = "red" if found.regression else "green"
    text = Text("\n").join(Text(printable(line)) for line in (found.reason, *found.notes))
    console.print(Panel(text, title=Text(_head(found), f"bold {style}"), border_style=style), highlight=False)
    for part in parts(found):
        console.print(Padding(Text(part.title, "bold"), (1, 0, 0, 0)))
        if part.rows:
            console.print(rich_table(part.header, part.rows, _STYLES, texts=range(part.left)), highlight=False)
        for line in part.texts:
            console.print(Text(printable(line)), highlight=False)


def parts(found: Comparison) -> list[Part]:
    """What is printed below the decision; a part without content is left out.

    Examples:
        >>> from lightning_quantdebug.report import Final, Report
        >>> from lightning_quantdebug.report_diff import compare
        >>> same = compare(Report(final=Final(loss=0.1)), Report(final=Final(loss=0.1)))
        >>> [part.title for part in parts(same)]
        ['Verdicts', 'score (min), and its loss against FP32']
    """
    every = [_verdicts(found), _losses(found), _findings(found), _sqnr(found), _bit_widths(found), _settings(found)]
    return [part for part in every if part.rows or part.texts]


def _losses(found: Comparison) -> Part:
    """Scores and losses of the boxes; FP32 first, the end last."""
    header = ("", "score A", "score B", "loss A", "loss B", "change", "noise", "so it is")
    fp32 = [("fp32", *map(number, found.baselines), *("-",) * 5)] if found.baselines != (None, None) else []
    rows = (*fp32, *(_measured(item) for item in found.measurements if item.losses != (Loss(), Loss())))
    unknown = [item.name for item in found.measurements if _lacks_interval(item.change)]
    texts = (f"No interval, and so no noise, is known of {', '.join(unknown)}.",) if unknown else ()
    return Part(f"{printable(found.monitor)} ({found.mode}), and its loss against FP32", header, rows, texts)


def _measured(item: Measurement) -> tuple[str, ...]:
    """One box."""
    change = item.change
    losses = (number(loss.value) for loss in item.losses)
    noise = number(change.noise, 2)
    return item.name, *map(number, item.scores), *losses, _signed(change.value), noise, _so_it_is(change)


def _so_it_is(change: LossChange) -> str:
    """What a change is, in one word."""
    return "same" if change.value == 0 else "-" if change.outcome is Outcome.UNKNOWN else change.outcome.value


def _verdicts(found: Comparison) -> Part:
    """How both runs ended, and the boxes that ended otherwise."""
    *steps, end = found.measurements
    shown = [*(item for item in steps if item.verdicts[0] != item.verdicts[1]), end]
    return Part("Verdicts", ("", "A", "B"), tuple((item.name, *map(_or_dash, item.verdicts)) for item in shown))


def _lacks_interval(change: LossChange) -> bool:
    """Whether a change is known, but not its noise."""
    return change.value is not None and change.interval is None


def _signed(value: float | None) -> str:
    """A change with its sign."""
    return "-" if value is None else f"{'+' if value > 0 else ''}{number(value)}"


def _findings(found: Comparison) -> Part:
    """What B has and A has not, and the other way round."""
    rows = [*_finding_rows("new in B", found.new_findings), *_finding_rows("gone in B", found.gone_findings)]
    return Part("Findings", ("", "cause", "where", "evidence"), *_cut(rows), left=4)


def _finding_rows(word: str, findings: Iterable[Finding]) -> list[tuple[str, ...]]:
    """Cause, place and evidence of each."""
    listed = list(findings)
    names = short_names([finding.quantizer or "" for finding in listed], NAME_WIDTH)
    return [(word, item.cause.value, names[item.quantizer or ""] or "-", _short(item.evidence)) for item in listed]


def _sqnr(found: Comparison) -> Part:
    """Quantizers whose SQNR changed."""
    names = short_names([item.quantizer for item in found.sqnr], NAME_WIDTH)
    rows = tuple(
        (names[item.quantizer], f"{item.a:.1f}", f"{item.b:.1f}", f"{item.b - item.a:+.1f}") for item in found.sqnr
    )
    more = (f"and {found.more_sqnr} more that changed by more than 1 dB",) if found.more_sqnr else ()
    return Part("SQNR of the output with one quantizer on, in dB", ("quantizer", "A", "B", "change"), rows, more)


def _bit_widths(found: Comparison) -> Part:
    """Quantizers whose final bits differ."""
    names = short_names([item.quantizer for item in found.bit_widths], NAME_WIDTH)
    rows = [(names[item.quantizer], _or_dash(item.a), _or_dash(item.b)) for item in found.bit_widths]
    return Part("Final bit-widths that differ", ("quantizer", "A", "B"), *_cut(rows))


def _settings(found: Comparison) -> Part:
    """Settings and versions that differ."""
    names = short_names([item.name for item in found.settings], NAME_WIDTH)
    rows = [(names[item.name], _or_dash(item.a), _or_dash(item.b)) for item in found.settings]
    return Part("Settings that differ", ("setting", "A", "B"), *_cut(rows), left=3)


def _cut(rows: Sequence[tuple[str, ...]]) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """The first rows, and how many more there are."""
    more = len(rows) - MOST_ROWS
    return tuple(rows[:MOST_ROWS]), (f"and {more} more (--json has them all)",) if more > 0 else ()


def _or_dash(value: Any) -> str:
    """A value as text."""
    return "-" if value is None else _short(str(value))


def _short(text: str) -> str:
    """A text that fits beside others, on one line."""
    flat = printable(text)
    return flat if len(flat) <= WIDTH // 2 else f"{flat[: WIDTH // 2 - 3]}..."

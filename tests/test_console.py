"""The summary fits a terminal and can not steer it; progress closes whatever happens."""

import io
from dataclasses import replace
from pathlib import Path

import pytest

from lightning_quantdebug import console
from lightning_quantdebug.console import Progress, summary
from lightning_quantdebug.report import Cause, Final, Finding, Report
from tests.report_examples import full_report, hostile_report

GOLDEN = Path(__file__).parent / "golden" / "summary.txt"


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def test_the_summary_is_the_golden_one() -> None:
    assert summary(full_report()) + "\n" == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize("report", [Report(), full_report(), hostile_report()], ids=["empty", "full", "hostile"])
def test_the_summary_fits_a_terminal_and_can_not_steer_it(report: Report) -> None:
    text = summary(report)
    assert all(len(line) <= 100 for line in summary(replace(report, final=Final())).splitlines())
    assert all(char.isprintable() or char == "\n" for char in text)


def test_the_columns_are_aligned() -> None:
    lines = summary(full_report()).splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith("step "))
    assert len({len(line) for line in lines[start : start + 5]}) == 1


def test_the_tensorboard_command_can_be_pasted() -> None:
    assert "tensorboard --logdir 'runs/my logs'" in summary(full_report()).splitlines()


def test_a_long_path_is_not_broken() -> None:
    report = full_report()
    path = "/very/long" * 15
    files = replace(report, final=replace(report.final, files={"report.md": path}))
    assert f"report.md  {path}" in summary(files).splitlines()


def test_findings_beyond_the_first_are_counted() -> None:
    findings = tuple(Finding(Cause.NON_FINITE, f"evidence {index}") for index in range(8))
    text = summary(Report(findings=findings))
    assert "evidence 4" in text
    assert "evidence 5" not in text
    assert "and 3 more in the report" in text


def test_a_bar_in_a_terminal_shows_step_and_count_and_is_removed() -> None:
    stream = Terminal()
    with Progress(4, stream=stream) as progress:
        progress.describe("weights")
        progress.advance(3)
        progress.describe("quantize_model")
    shown = stream.getvalue()
    assert "quantdebug weights" in shown
    assert "3/4" in shown
    assert progress._bar is None


def test_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    with Progress(4, stream=stream) as progress:
        progress.describe("weights")
        now[0] += 9.0
        progress.advance()
        assert stream.getvalue() == "quantdebug weights: 0 of 4 evaluations, 0 s\n"
        now[0] += 2.0
        progress.advance()
    assert stream.getvalue().splitlines()[1:] == ["quantdebug weights: 2 of 4 evaluations, 11 s"]


def test_an_unknown_total_is_not_shown() -> None:
    stream = io.StringIO()
    with Progress(None, stream=stream) as progress:
        progress.describe("weights")
    assert stream.getvalue() == "quantdebug weights: 0 evaluations, 0 s\n"


@pytest.mark.parametrize("silent", [{"verbose": False}, {"rank_zero": False}])
@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "file"])
def test_nothing_is_written_when_silent(silent: dict[str, bool], stream: io.StringIO) -> None:
    with Progress(4, stream=stream, **silent) as progress:
        progress.describe("weights")
        progress.advance()
    assert stream.getvalue() == ""
    assert progress.done == 1


def test_the_bar_is_closed_when_the_walk_fails() -> None:
    stream = Terminal()
    progress = Progress(4, stream=stream)

    def walk() -> None:
        with progress:
            assert progress._bar is not None
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        walk()
    assert progress._bar is None
    progress.close()


def test_the_bar_is_drawn_on_lightnings_own_live_display() -> None:
    from rich.progress import Progress as RichProgress

    with RichProgress(disable=False, console=None, transient=True) as live:
        with Progress(4, live=live) as progress:
            progress.describe("weights")
            progress.advance()
            progress.expect(2)
            progress.runs(1, 10)
            progress.runs(5, 10)
            progress.tell("a line [that] stays")
            (task,) = live.tasks
            assert (task.completed, task.total) == (1, 6)
            assert task.description.startswith("quantdebug weights")
        assert live.tasks == []
        with Progress(4, live=live, verbose=False) as progress:
            progress.advance()
            assert live.tasks == []


def test_runs_of_a_group_are_told_with_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("lightning_quantdebug.console.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    with Progress(10, stream=stream) as progress:
        progress.describe("per_quantizer")
        for done in range(1, 8):
            now[0] += 4.0
            progress.runs(done, 21)
        progress.describe("causes")
        progress.tell("predicted")
    lines = stream.getvalue().splitlines()
    assert lines.pop() == "quantdebug: predicted"
    assert lines[0] == "quantdebug per_quantizer: 0 of 10 evaluations, 0 s"
    assert lines[1] == "quantdebug per_quantizer: 0 of 10 evaluations, 12 s, 3 of 21 runs, about 72 s left"
    assert lines[2] == "quantdebug per_quantizer: 0 of 10 evaluations, 24 s, 6 of 21 runs, about 60 s left"
    assert lines[3] == "quantdebug causes: 0 of 10 evaluations, 28 s"
    terminal = Terminal()
    with Progress(10, stream=terminal) as progress:
        for done in (1, 2, 3):
            now[0] += 4.0
            progress.runs(done, 21)
        progress.tell("predicted")
    assert "quantdebug: predicted\n" in terminal.getvalue()
    assert "3 of 21 runs, about 72 s left" in terminal.getvalue()

"""The summary fits a terminal and can not steer it; progress closes whatever happens."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.callbacks.progress.rich_progress import CustomProgress, CustomTimeColumn
from rich.console import Console
from rich.progress import Progress as RichProgress
from rich.progress import TextColumn

from lightning_quantdebug import console
from lightning_quantdebug.console import Progress, in_words, summary, time_left
from lightning_quantdebug.report import Cause, Final, Finding, Report
from tests.report_examples import full_report, hostile_report
from tests.terminals import LINK, STEERING, Terminal

GOLDEN = Path(__file__).parent / "golden" / "summary.txt"


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
    assert stream.getvalue().splitlines()[1:] == ["quantdebug weights: 2 of 4 evaluations, 11 s, ~11 s left"]


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
    assert lines[1] == "quantdebug per_quantizer: 0 of 10 evaluations, 12 s, 3/21 runs, ~72 s left"
    assert lines[2] == "quantdebug per_quantizer: 0 of 10 evaluations, 24 s, 6/21 runs, ~60 s left"
    assert lines[3] == "quantdebug causes: 0 of 10 evaluations, 28 s"
    terminal = Terminal()
    with Progress(10, stream=terminal) as progress:
        for done in (1, 2, 3):
            now[0] += 4.0
            progress.runs(done, 21)
        progress.tell("predicted")
    assert "quantdebug: predicted\n" in terminal.getvalue()
    assert "3/21 runs, ~72 s left" in terminal.getvalue()


# The time that is left.


def test_durations_are_as_exact_as_is_of_use() -> None:
    assert [in_words(seconds) for seconds in (0, 119.4, 120, 3540, 3600, 9000)] == [
        "0 s",
        "119 s",
        "2 min",
        "59 min",
        "1 h 0 min",
        "2 h 30 min",
    ]
    assert time_left(30, 3, 12) == ", ~90 s left"
    assert time_left(30, 0, 12) == time_left(30, 12, 12) == time_left(30, 13, 12) == ""


class Live:
    """A live display that notes what it is told."""

    def __init__(self, **more: Any) -> None:
        self.updates: list[dict[str, Any]] = []
        self.columns: tuple[Any, ...] = ()
        self.frames = 0
        vars(self).update(more)

    def add_task(self, description: str, total: float) -> int:
        self.updates.append({"total": total})
        return 7

    def update(self, task: int, **values: Any) -> None:
        assert task == 7
        self.updates.append(values)

    def remove_task(self, task: int) -> None:
        self.updates.append({"removed": task})

    def refresh(self) -> None:
        self.frames += 1


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    return now


def test_a_live_display_shows_the_time_left_of_the_walk_and_of_a_group(clock: list[float]) -> None:
    live = Live()
    with Progress(10, live=live) as progress:
        progress.describe("weights")
        clock[0] += 40.0
        progress.advance(2)
        assert live.updates[-1] == {"description": "quantdebug weights, ~3 min left"}
        progress.describe("per_quantizer")
        progress.runs(1, 21)
        clock[0] += 6.0
        progress.runs(4, 21)
        assert live.updates[-1] == {"description": "quantdebug per_quantizer, 4/21 runs, ~34 s left"}
        progress.runs(1, 5, "layers")
        clock[0] += 6.0
        progress.runs(3, 5, "layers")
        assert live.updates[-1] == {"description": "quantdebug per_quantizer, 3/5 layers, ~6 s left"}
        frames = live.frames
        clock[0] += 6.0
        progress.runs(5, 5, "layers")
        # The group is done: the walk's own time left is shown again.
        assert live.updates[-1] == {"description": "quantdebug per_quantizer, ~4 min left"}
        assert live.frames == frames + 1
    assert live.updates[-1] == {"removed": 7}


def test_a_live_display_without_a_total_is_told_so(clock: list[float]) -> None:
    live = Live()
    with Progress(None, live=live) as progress:
        progress.describe("weights")
        progress.advance()
    assert live.updates[0] == {"total": float("inf")}
    assert live.updates[1] == {"description": "quantdebug weights"}


def test_frames_are_asked_for_softly_where_lightning_can() -> None:
    asked: list[int] = []
    live = Live(soft_refresh=lambda: asked.append(1))
    with Progress(2, live=live) as progress:
        progress.describe("weights")
    assert len(asked) == 2
    assert live.frames == 0


@pytest.mark.parametrize("total", [4, None])
def test_lightnings_own_display_draws_each_change(total: int | None) -> None:
    stream = Terminal()
    shared = Console(file=stream, force_terminal=True, width=100)
    layout = [TextColumn("{task.description}"), CustomTimeColumn("")]
    name = "[link=file:///etc]x[/link][red]y"
    with (
        CustomProgress(*layout, auto_refresh=True, refresh_per_second=1000, console=shared) as live,
        Progress(total, live=live) as progress,
    ):
        progress.describe(f"fix_quantizers: {name}")
        for _ in range(200):
            if name in stream.getvalue():
                break
            console.time.sleep(0.01)
        # Lightning's display draws nothing that it was not asked to draw.
        assert name in stream.getvalue()
        progress.tell(LINK + STEERING)
    text = stream.getvalue()
    assert f"quantdebug fix_quantizers: {name}" in text
    assert f"quantdebug: {LINK}" in text
    assert "\x1b]8" not in text
    assert "\x1b[2J" not in text


def test_names_in_what_is_told_can_not_steer_a_terminal_or_a_log() -> None:
    for stream in (Terminal(), io.StringIO()):
        with Progress(4, stream=stream) as progress:
            progress.describe(LINK + STEERING)
            progress.tell(LINK + STEERING + "\nforged: line")
        text = stream.getvalue()
        assert f"quantdebug: {LINK}" in text
        assert "\x1b]8" not in text
        assert "\x1b[2J" not in text
        assert "\nforged" not in text


def test_a_bar_in_a_terminal_shows_the_time_left_of_a_group(clock: list[float]) -> None:
    stream = Terminal()
    with Progress(10, stream=stream) as progress:
        progress.describe("fix_weights: adaround")
        progress.runs(1, 21, "layers")
        clock[0] += 8.0
        progress.runs(5, 21, "layers")
    assert "quantdebug fix_weights: adaround, 5/21 layers, ~32 s left" in stream.getvalue()


def test_more_evaluations_than_were_foreseen_raise_the_total(clock: list[float]) -> None:
    stream = io.StringIO()
    with Progress(2, stream=stream) as progress:
        progress.advance(2)
        clock[0] += 11.0
        progress.advance()
    assert progress.total == progress.done == 3
    assert stream.getvalue() == "quantdebug : 3 of 3 evaluations, 11 s\n"


@pytest.mark.parametrize("silent", [{"verbose": False}, {"rank_zero": False}])
def test_a_silent_rank_opens_no_bar_on_a_live_display(silent: dict[str, bool]) -> None:
    live = Live()
    with Progress(4, live=live, **silent) as progress:
        progress.describe("weights")
        progress.advance()
        progress.runs(2, 3)
        progress.tell("x")
    assert live.updates == []


class Demanding(TextColumn):
    """A column like that of Lightning's metrics, which wants its bar among the Trainer's callbacks."""

    error: Exception | None = None

    def render(self, task: Any) -> Any:
        if self.error is not None:
            raise self.error
        return super().render(task)


@pytest.mark.parametrize("error", [AssertionError(), AttributeError("None has no id")])
def test_a_column_that_can_not_be_asked_shows_what_it_last_showed(error: Exception) -> None:
    stream = Terminal()
    column = Demanding("accuracy {task.description}")
    with RichProgress("{task.total}", column, auto_refresh=False, console=Console(file=stream, width=60)) as live:
        live.add_task("0.75", total=7)
        with Progress(4, live=live) as progress:
            progress.describe("weights")
            column.error = error
            progress.describe("activations")
            drawn = stream.getvalue().splitlines()[-2:]
            column.error = KeyError("another")
            with pytest.raises(KeyError):
                live.refresh()
            column.error = None
        assert live.columns == ("{task.total}", column)
    assert "7 accuracy 0.75" in drawn[0]
    assert "4 accuracy quantdebug weights" in drawn[1]


def test_a_group_may_count_in_leaps_and_another_one_begins_with_each_description(clock: list[float]) -> None:
    live = Live()

    def shown_after(seconds: float, done: int) -> str:
        clock[0] += seconds
        progress.runs(done, 100)
        return str(live.updates[-1]["description"])

    with Progress(None, live=live) as progress:
        progress.describe("plain")
        assert shown_after(50.0, 20) == "quantdebug plain, 20/100 runs"
        assert shown_after(10.0, 40) == "quantdebug plain, 40/100 runs, ~30 s left"
        # Another group of the same step.
        assert shown_after(99.0, 10) == "quantdebug plain, 10/100 runs"
        assert shown_after(3.0, 40) == "quantdebug plain, 40/100 runs, ~6 s left"
        progress.describe("off")
        assert shown_after(99.0, 50) == "quantdebug off, 50/100 runs"
        assert shown_after(5.0, 75) == "quantdebug off, 75/100 runs, ~5 s left"

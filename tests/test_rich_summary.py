"""The summary in a terminal: the words of the plain text, in colours, whatever the names try."""

import io
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from lightning_quantdebug import summary_rows, terminal_text
from lightning_quantdebug.console import print_summary
from lightning_quantdebug.report import Cause, Final, Finding, Report, Step, StepName, StepVerdict, Verdict
from tests.report_examples import full_report, hostile_report
from tests.terminals import LINK, STEERING, Encoded, Terminal, shown
from tests.visual_examples import image_report, sentence_report

GOLDEN = Path(__file__).parent / "golden" / "summary.txt"
MANY = Report(findings=tuple(Finding(Cause.NON_FINITE, f"evidence {index}") for index in range(8)))
REPORTS = [Report(), MANY, full_report(), hostile_report(), image_report(), sentence_report()]
IDS = ["empty", "many", "full", "hostile", "image", "sentence"]


@pytest.fixture
def columns(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A terminal of 80 columns with colours; others can be set."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def in_terminal(report: Report) -> str:
    stream = Terminal()
    print_summary(report, stream)
    return stream.getvalue()


@pytest.mark.parametrize("stream", [io.StringIO(), Encoded()], ids=["file", "ascii"])
def test_elsewhere_the_plain_text_is_printed(stream: io.StringIO, columns: pytest.MonkeyPatch) -> None:
    print_summary(full_report(), stream)
    assert stream.getvalue() == GOLDEN.read_text(encoding="utf-8")


def test_standard_output_without_a_terminal_gets_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(full_report())
    assert capsys.readouterr().out == GOLDEN.read_text(encoding="utf-8")


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("report", REPORTS, ids=IDS)
def test_a_terminal_shows_the_same_words(report: Report, width: int, columns: pytest.MonkeyPatch) -> None:
    columns.setenv("COLUMNS", str(width))
    flat = re.sub(r"[^\w.=\[\]']+", "", shown(in_terminal(report)))
    texts = [*summary_rows.outcome_texts(report), *summary_rows.step_texts(report), *summary_rows.next_texts(report)]
    texts += [text for row in summary_rows.finding_texts(report) for text in row]
    texts += [summary_rows.more_findings(report), *summary_rows.title(report)]
    texts += [text for row in summary_rows.file_rows(report) for text in row]
    for text in texts:
        assert re.sub(r"[^\w.=\[\]']+", "", terminal_text.printable(text)) in flat


def test_the_walk_and_the_remedies_are_tables(columns: pytest.MonkeyPatch) -> None:
    columns.setenv("COLUMNS", "120")
    rows = [" ".join(line.split()) for line in shown(in_terminal(full_report())).splitlines()]
    for row in [*summary_rows.step_rows(full_report()), *summary_rows.remedy_rows(full_report())]:
        assert " ".join(row) in rows
    assert " ".join(summary_rows.STEP_HEADER) in rows


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("report", REPORTS, ids=IDS)
def test_the_summary_fits_the_terminal(report: Report, width: int, columns: pytest.MonkeyPatch) -> None:
    columns.setenv("COLUMNS", str(width))
    without_files = replace(report, final=replace(report.final, files={}))
    assert max(map(len, shown(in_terminal(without_files)).splitlines())) <= width


@pytest.mark.parametrize(
    ("verdict", "color"),
    [
        (Verdict.ACCEPTED, 32),
        (Verdict.REPAIRED, 32),
        (Verdict.REPAIRED_BY_QAT, 32),
        (Verdict.NOT_ACCEPTED, 31),
        (Verdict.BROKEN_PIPELINE, 31),
        (Verdict.FAILED, 31),
        (None, 35),
    ],
)
def test_the_verdict_has_its_colour_and_its_word(
    verdict: Verdict | None, color: int, columns: pytest.MonkeyPatch
) -> None:
    text = in_terminal(Report(verdict=verdict))
    word = "UNFINISHED" if verdict is None else verdict.value.replace("_", " ").upper()
    assert f"\x1b[1;{color}m quantdebug: {word} \x1b[0m" in text


@pytest.mark.parametrize(
    ("verdict", "color"), [(StepVerdict.PASSED, "32"), (StepVerdict.FAILED, "31"), (StepVerdict.NOISE, "35")]
)
def test_a_step_has_the_colour_of_its_verdict(verdict: StepVerdict, color: str, columns: pytest.MonkeyPatch) -> None:
    text = in_terminal(Report(steps=(Step(StepName.WEIGHTS, verdict),)))
    assert re.search(rf"\x1b\[{color}m *{verdict.value}\x1b\[0m", text)


def test_no_color_is_respected(columns: pytest.MonkeyPatch) -> None:
    columns.setenv("NO_COLOR", "1")
    text = in_terminal(full_report())
    assert not re.findall(r"\x1b\[[\d;]*3\d", text)
    assert "NOT ACCEPTED" in text


def test_paths_and_the_command_are_neither_wrapped_nor_cut(columns: pytest.MonkeyPatch) -> None:
    path = "/very long/" * 30
    report = Report(final=Final(files={"report.md": path, "fp32.ckpt": "b", "tensorboard": path}))
    lines = shown(in_terminal(report)).splitlines()
    assert f"report.md  {path}" in lines
    assert "fp32.ckpt  b" in lines
    assert f"tensorboard --logdir '{path}'" in lines


@pytest.mark.parametrize("report", REPORTS, ids=IDS)
def test_the_terminal_obeys_colours_only(report: Report, columns: pytest.MonkeyPatch) -> None:
    assert all(char.isprintable() or char == "\n" for char in shown(in_terminal(report)))


def test_markup_and_escape_sequences_in_names_are_not_obeyed(columns: pytest.MonkeyPatch) -> None:
    columns.setenv("COLUMNS", "500")
    name = LINK + STEERING
    hostile = hostile_report()
    report = replace(
        hostile,
        settings={"monitor": name, "tolerance": name},
        steps=tuple(replace(step, advice=name) for step in hostile.steps),
        remedies=tuple(replace(item, remedy=name, reason=name) for item in hostile.remedies),
        findings=(Finding(Cause.NON_FINITE, name, name, name, name),),
        final=replace(hostile.final, files={name: name, "tensorboard": name}),
        error=name,
    )
    text = in_terminal(report)
    assert shown(text).count(LINK) == text.count(LINK) == 13
    assert "\x1b]" not in text
    assert "\x1b[2J" not in text
    assert "\x07" not in text


def test_a_notebook_shows_the_summary_as_html(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Any] = []
    fake = ModuleType("IPython.display")
    fake.display = found.append  # type: ignore[attr-defined] # what Rich calls
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    monkeypatch.setattr(terminal_text.rich, "get_console", lambda: Console(force_jupyter=True))
    print_summary(hostile_report())
    html = "".join(item._repr_mimebundle_([], [])["text/html"] for item in found)
    assert "FAILED" in html
    assert "<script>" not in html

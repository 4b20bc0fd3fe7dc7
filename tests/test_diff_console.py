"""A comparison reads the same in a terminal and in a file, and CI gets all of it."""

import io
import json
import re
from dataclasses import replace

import pytest

from lightning_quantdebug.diff_console import comparison_json, parts, print_comparison
from lightning_quantdebug.report import Cause, Final, Finding, Report, Verdict
from lightning_quantdebug.report_diff import compare
from lightning_quantdebug.run_differences import BitWidthChange, SettingChange, SqnrChange
from tests.report_examples import HOSTILE
from tests.terminals import Terminal, shown
from tests.test_report_diff import run
from tests.visual_examples import image_report, sentence_report

LINK = "[link=file:///etc]x[/link]\x1b[2J"


@pytest.fixture(autouse=True)
def terminal_of_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)


def both(a: Report, b: Report) -> tuple[str, str]:
    """A comparison as text and as a terminal shows it."""
    found, file, terminal = compare(a, b), io.StringIO(), Terminal()
    print_comparison(found, file)
    print_comparison(found, terminal)
    return file.getvalue(), terminal.getvalue()


def lost() -> Report:
    """A run that lost a tenth more than that of the pictures' network, measured step by step."""
    report = image_report()
    final = replace(report.final, score=0.824, loss=0.106, interval=(0.1, 0.112))
    return replace(report, final=final, verdict=Verdict.NOT_ACCEPTED, findings=sentence_report().findings)


def test_the_plain_text_of_a_regression() -> None:
    text, _ = both(image_report(), lost())
    lines = text.splitlines()
    assert lines[0] == (
        "REGRESSION: The loss of final rose by 0.1, beyond the noise of 0.0085 (95 % interval of the change"
    )
    assert "* The quantized score goes from 0.924 to 0.824." in lines
    table = [line.split() for line in lines[lines.index("val_acc (max), and its loss against FP32") :]]
    assert table[2] == ["fp32", "0.93", "0.93", "-", "-", "-", "-", "-"]
    assert ["weights", "0.5", "0.5", "0.43", "0.43", "0", "0.042", "same"] in table
    assert ["final", "0.924", "0.824", "0.006", "0.106", "+0.1", "0.0085", "worse"] in table
    assert not [row for row in table if row[:1] == ["per_quantizer"]]
    verdicts = [line.split() for line in lines[lines.index("Verdicts") :]]
    assert verdicts[1:4] == [["A", "B"], ["final", "repaired", "not_accepted"], []]
    assert all(line == line.rstrip() for line in lines)


def test_the_terminal_has_the_same_words_in_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    _, narrow = both(image_report(), lost())
    assert max(map(len, shown(narrow).splitlines())) <= 80
    monkeypatch.setenv("COLUMNS", "200")
    text, colours = both(image_report(), lost())
    assert re.search(r"\x1b\[1;31m *worse\x1b\[0m", colours)
    assert re.search(r"\x1b\[31m *not_accepted\x1b\[0m", colours)
    assert "REGRESSION" in colours
    words = {*shown(colours).split(), "REGRESSION:", "*"}
    assert [word for word in text.split() if word not in words] == []


def test_no_regression_is_green_and_said() -> None:
    text, colours = both(image_report(), image_report())
    assert text.startswith("NO REGRESSION: The loss of final is the same")
    assert "\x1b[1;32m NO REGRESSION " in colours
    assert [part.title for part in parts(compare(image_report(), image_report()))] == [
        "Verdicts",
        "val_acc (max), and its loss against FP32",
    ]


def test_missing_intervals_are_named() -> None:
    text, colours = both(run(0.02, None), run(0.02))
    assert "No interval, and so no noise, is known of final." in text
    assert "No interval, and so no noise, is known of final." in shown(colours)


def test_what_else_differs_is_listed() -> None:
    found = replace(
        compare(run(0.02), run(0.02)),
        new_findings=(Finding(Cause.WEIGHT_OUTLIERS, "60 sigma", "conv"),),
        gone_findings=(Finding(Cause.TOO_FEW_SAMPLES, "500"),),
        sqnr=(SqnrChange("features.0.conv", 30.0, 20.5),),
        more_sqnr=2,
        bit_widths=(BitWidthChange("head", 8, None),),
        settings=(SettingChange("target.name", "int8", None), SettingChange("exclude", [], ["a"])),
    )
    stream = io.StringIO()
    print_comparison(found, stream)
    rows = [line.split() for line in stream.getvalue().splitlines()]
    for row in (
        "new in B weight_outliers conv 60 sigma",
        "gone in B too_few_samples - 500",
        "features.0.conv 30.0 20.5 -9.5",
        "and 2 more that changed by more than 1 dB",
        "head 8 -",
        "target.name int8 -",
        "exclude [] ['a']",
    ):
        assert row.split() in rows


def test_long_lists_are_cut_and_counted() -> None:
    widths = tuple(BitWidthChange(f"q{index}", 8, 4) for index in range(25))
    found = replace(compare(run(0.02), run(0.02)), bit_widths=widths)
    (part,) = (part for part in parts(found) if part.title.startswith("Final"))
    assert (len(part.rows), part.rows[-1][0]) == (20, "q19")
    assert part.texts == ("and 5 more (--json has them all)",)
    assert len(json.loads(comparison_json(found))["bit_widths"]) == 25


@pytest.mark.parametrize("name", [LINK, HOSTILE, "x" * 3000, "\ud800"])
def test_hostile_names_are_shown_and_not_obeyed(name: str) -> None:
    settings = {"monitor": name, "mode": "max", name: name}
    a = replace(run(0.02), settings=settings)
    b = replace(a, settings={**settings, name: name + "!"}, findings=(Finding(Cause.NON_FINITE, name, name),))
    text, colours = both(a, b)
    for written in (text, shown(colours)):
        assert all(char.isprintable() or char == "\n" for char in written)
    if name == LINK:
        assert "[link=file:///etc]x[/link]" in text
        assert "[link=file:///etc]x[/link]" in shown(colours)
    json.loads(comparison_json(compare(a, b)))


def test_the_json_is_the_comparison() -> None:
    found = compare(image_report(), lost(), strict=True)
    values = json.loads(comparison_json(found))
    assert values["regression"] is True
    assert values["verdicts"] == ["repaired", "not_accepted"]
    assert values["measurements"][-1]["change"]["outcome"] == "worse"
    assert values["measurements"][-1]["losses"][1] == {"value": 0.106, "interval": [0.1, 0.112]}
    assert [item["quantizer"] for item in values["new_findings"]] == [sentence_report().findings[0].quantizer]


def test_a_run_without_a_score_has_no_fp32_row() -> None:
    a = Report(final=Final(loss=0.1))
    part = parts(compare(a, a))[1]
    assert [row[0] for row in part.rows] == ["final"]

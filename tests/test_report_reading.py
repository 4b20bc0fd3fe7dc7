"""A report of somebody else is read whole or refused with the field's name, whatever it holds."""

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_quantdebug.errors import ReportError
from lightning_quantdebug.report import Baseline, Report
from lightning_quantdebug.report_reading import misfits_told, read_report, report_path
from lightning_quantdebug.visuals import Visuals
from tests.report_examples import full_report, hostile_report
from tests.visual_examples import hostile_visuals, image_report, sentence_report

REPORTS = [Report, full_report, hostile_report, image_report, sentence_report]


def written(values: Any, directory: Path) -> Path:
    path = directory / "report.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return path


@pytest.mark.parametrize("make", REPORTS)
def test_what_was_written_is_read(make: Any, tmp_path: Path) -> None:
    report = make()
    path = report.to_json(tmp_path / "report.json")
    assert read_report(path).to_dict() == report.to_dict()


def test_a_directory_and_a_file_lead_to_the_same_report(tmp_path: Path) -> None:
    path = Report().to_json(tmp_path / "report.json")
    assert report_path(tmp_path) == report_path(str(path)) == path
    other = path.rename(tmp_path / "kept.txt")
    assert report_path(other) == other


@pytest.mark.parametrize("path", ["missing", "missing/report.json", "a" * 5000, "a\0b"])
def test_a_missing_report_is_told(path: str, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"There is no report at|Can not read the report"):
        report_path(tmp_path / path)
    with pytest.raises(ReportError, match=r"There is no report at .*report\.json"):
        report_path(tmp_path)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "Can not read"),
        ("{", "Can not read"),
        ("[]", "must hold a JSON object, got list"),
        ("7", "must hold a JSON object, got int"),
        ("{}", "schema version None"),
        ('{"schema_version": 99}', "schema version 99"),
        ('{"schema_version": 1}', "does not follow schema version 1"),
        ("[" * 100_000 + "]" * 100_000, "Can not read"),
        ("1" * 5000, "Can not read"),
    ],
    ids=["empty", "cut", "list", "number", "bare", "newer", "fields", "deep", "digits"],
)
def test_what_is_no_report_is_refused(text: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=match):
        read_report(written(text, tmp_path))


def test_bytes_that_are_no_text_and_directories_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ReportError, match="Can not read"):
        read_report(path)
    with pytest.raises(ReportError, match="Can not read"):
        read_report(tmp_path)


@pytest.mark.parametrize(
    ("place", "value", "match"),
    [
        (("baseline", "score"), "high", r"`report.baseline.score` .* JSON number, got 'high'"),
        (("baseline", "score"), True, r"`report.baseline.score` .* JSON number, got True"),
        (("baseline", "samples"), 1.5, r"`report.baseline.samples` .* JSON whole number, got 1.5"),
        (("steps", 1, "seconds"), [], r"`report.steps\[1\].seconds`"),
        (("steps", 1, "advice"), None, r"`report.steps\[1\].advice` .* JSON string, got None"),
        (("steps", 1, "details"), [], r"`report.steps\[1\].details` .* JSON object"),
        (("steps", 1, "interval"), "ab", r"`report.steps\[1\].interval\[0\]`"),
        (("steps", 1, "verdict"), "splendid", "does not follow schema version 1: 'splendid'"),
        (("sensitivity", 0, "guilty"), 1, r"`report.sensitivity\[0\].guilty` .* JSON true or false"),
        (("sensitivity", 0, "counterfactuals"), {"now": "x"}, r"counterfactuals\['now'\]"),
        (("final", "files"), {"report.md": 3}, r"`report.final.files\['report.md'\]` .* JSON string"),
        (("final", "settings", "conv", "bit_width"), "8", r"`report.final.settings\['conv'\].bit_width`"),
        (("settings",), 4, r"`report.settings` .* JSON object"),
        (("environment",), {"seed": 10**400}, "more than 300 digits"),
        (("steps", 1, "details"), {"a": [{"b": -(10**400)}]}, "more than 300 digits"),
        (("coverage", "quantized"), [1], r"`report.coverage.quantized\[0\]`"),
        (("visuals", "tensors", 0, "heat_map"), 5, "does not follow schema version 1"),
        (("visuals", "tensors", 0, "states", 0, "low"), [["x"]], r"states\[0\].low\[0\]"),
        (("visuals", "tensors", 0, "states", 0, "low"), 3, r"states\[0\].low` .* JSON list"),
    ],
)
def test_a_field_of_another_type_is_named(place: tuple[Any, ...], value: Any, match: str, tmp_path: Path) -> None:
    values = replace(full_report(), visuals=hostile_visuals()).to_dict()
    owner: Any = values
    for key in place[:-1]:
        owner = owner[key]
    owner[place[-1]] = value
    with pytest.raises(ReportError, match=match):
        read_report(written(values, tmp_path))


def test_a_number_that_is_not_finite_may_stand_for_a_missing_one(tmp_path: Path) -> None:
    text = json.dumps(replace(Report(), baseline=Baseline(0.5)).to_dict()).replace("0.5", "NaN")
    assert str(read_report(written(text, tmp_path)).baseline) == "Baseline(score=nan, samples=None)"


def places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where anything stands in a JSON value."""
    yield path
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in inner:
        yield from places(value, (*path, key))


def test_whatever_stands_in_the_place_of_a_value_nothing_but_our_error_is_raised(tmp_path: Path) -> None:
    whole = replace(full_report(), visuals=Visuals()).to_dict()
    refused = 0
    for place in list(places(whole))[1:]:
        for value in (None, 5, "x", [], {}, [[]], True, float("nan"), 10**400):
            values = copy.deepcopy(whole)
            owner: Any = values
            for key in place[:-1]:
                owner = owner[key]
            owner[place[-1]] = value
            try:
                read_report(written(values, tmp_path))
            except ReportError:
                refused += 1
    assert refused > 1000


def test_errors_of_our_own_pass_and_bugs_elsewhere_too() -> None:
    with pytest.raises(ReportError, match="mine"), misfits_told("x"):
        raise ReportError("mine")
    with pytest.raises(NotImplementedError), misfits_told("x"):
        raise NotImplementedError
    told = r"'x' does not hold what a report holds: ZeroDivisionError: no\."
    with pytest.raises(ReportError, match=told), misfits_told("x"):
        raise ZeroDivisionError("no")

"""Reports turn into JSON and back, follow their schema, and refuse what is no report."""

import json
import os
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from lightning_quantdebug.errors import ReportError
from lightning_quantdebug.report import (
    SCHEMA_VERSION,
    Cause,
    Finding,
    QuantizerSetting,
    Report,
    Step,
    StepName,
    StepVerdict,
    Verdict,
    write_atomically,
)
from tests.report_examples import full_report
from tests.visual_examples import image_report, sentence_report


@pytest.fixture(scope="module")
def schema() -> Any:
    text = files("lightning_quantdebug").joinpath("report_schema.json").read_text(encoding="utf-8")
    schema = json.loads(text)
    jsonschema.Draft202012Validator.check_schema(schema)
    return schema


@pytest.mark.parametrize("report", [Report(), full_report()], ids=["empty", "full"])
def test_a_report_survives_json_and_follows_the_schema(report: Report, schema: Any, tmp_path: Path) -> None:
    path = report.to_json(tmp_path / "deep" / "report.json")
    jsonschema.validate(json.loads(path.read_text(encoding="utf-8")), schema, jsonschema.Draft202012Validator)
    assert Report.from_json(path) == report


def test_the_records_come_back_with_their_types(tmp_path: Path) -> None:
    back = Report.from_json(full_report().to_json(tmp_path / "report.json"))
    assert isinstance(back.final.settings["conv.weight"], QuantizerSetting)
    assert back.steps[0].interval == (0.0, 0.0)
    assert back.steps[0].verdict is StepVerdict.PASSED
    assert back.steps[0].verdict.advice == StepVerdict.PASSED.advice != ""
    assert back.findings[0].cause is Cause.WEIGHT_OUTLIERS
    assert back.verdict is Verdict.NOT_ACCEPTED
    assert back.sensitivity[0].interval == (0.01, 0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values["steps"][0].update(step="coffee"), "'coffee' is not one of"),
        (lambda values: values["steps"][0].update(interval=[0.0]), "is too short"),
        (lambda values: values["findings"][0].update(cause="bad luck"), "'bad luck' is not one of"),
        (lambda values: values["final"]["settings"]["conv.weight"].pop("scale"), "'scale' is a required property"),
        (lambda values: values.update(extra=1), "Additional properties are not allowed"),
        (lambda values: values.update(schema_version=2), "1 was expected"),
    ],
)
def test_the_schema_refuses_what_is_no_report(schema: Any, change: Any, message: str) -> None:
    values = full_report().to_dict()
    change(values)
    with pytest.raises(jsonschema.ValidationError, match=message):
        jsonschema.validate(values, schema, jsonschema.Draft202012Validator)


def test_the_schema_knows_every_word(schema: Any) -> None:
    properties = schema["properties"]
    step = properties["steps"]["items"]["properties"]
    assert step["step"]["enum"] == [member.value for member in StepName]
    assert step["verdict"]["enum"] == [member.value for member in StepVerdict]
    assert properties["findings"]["items"]["properties"]["cause"]["enum"] == [member.value for member in Cause]
    assert properties["verdict"]["oneOf"][1]["enum"] == [member.value for member in Verdict]
    assert properties["schema_version"]["const"] == SCHEMA_VERSION


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_written_as_null(value: float, schema: Any, tmp_path: Path) -> None:
    report = Report(
        steps=(Step(StepName.WEIGHTS, StepVerdict.FAILED, value, value, (value, 1.0), details={"x": [value]}),)
    )
    path = report.to_json(tmp_path / "report.json")
    step = json.loads(path.read_text(encoding="utf-8"))["steps"][0]
    assert (step["score"], step["loss"], step["interval"], step["details"]) == (None, None, [None, 1.0], {"x": [None]})
    jsonschema.validate(report.to_dict(), schema, jsonschema.Draft202012Validator)
    assert Report.from_json(path).steps[0].interval == (None, 1.0)


@pytest.mark.parametrize("version", [None, 0, 2, "1"])
def test_another_schema_version_is_refused(version: object) -> None:
    values = {**full_report().to_dict(), "schema_version": version}
    with pytest.raises(ReportError, match=rf"The report has schema version {version!r}, this version reads 1"):
        Report.from_dict(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop("steps"), "'steps'"),
        (lambda values: values.update(extra=1), r"unknown fields \['extra'\]"),
        (lambda values: values.update(baseline=3), "must be a mapping"),
        (lambda values: values["steps"][0].update(step="coffee"), "'coffee' is not a valid StepName"),
        (lambda values: values["steps"][0].update(interval=[]), "index out of range"),
        (lambda values: values["findings"][0].pop("evidence"), "evidence"),
        (lambda values: values["final"].update(settings=[1]), "cannot convert dictionary"),
        (lambda values: values["final"]["settings"]["conv.weight"].update(bits=4), "bits"),
        (lambda values: values.update(verdict="fine"), "'fine' is not a valid Verdict"),
    ],
)
def test_a_report_of_another_shape_is_refused(change: Any, message: str) -> None:
    values = full_report().to_dict()
    change(values)
    with pytest.raises(ReportError, match=rf"The report does not follow schema version 1: .*{message}"):
        Report.from_dict(values)


@pytest.mark.parametrize("text", ["", "{", "\ufeff{}"])
def test_a_file_that_is_not_json_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ReportError, match=r"Can not read the report '.*report.json': "):
        Report.from_json(path)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=r"Can not read the report '.*none.json': .*No such file"):
        Report.from_json(tmp_path / "none.json")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ReportError, match=r"Can not read the report '.*binary.json': .*decode"):
        Report.from_json(tmp_path / "binary.json")


def test_json_that_is_no_object_is_refused(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(ReportError, match=r"The report '.*list.json' must hold a JSON object, got list"):
        Report.from_json(tmp_path / "list.json")


def test_an_unwritable_directory_is_said_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ReportError, match=r"Can not write '.*report.json': .*Give `dirpath` a writable directory"):
        Report().to_json(tmp_path / "file" / "report.json")


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_atomically(tmp_path / "report.md", "old")

    def full_disk(descriptor: int) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(ReportError, match="No space left on device"):
        write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["report.md"]


def test_the_latest_record_of_a_step_counts() -> None:
    report = full_report()
    assert report.step(StepName.QAT) is None
    again = replace(report.steps[2], score=0.8)
    assert report.with_step(again).step(StepName.WEIGHTS) is again
    assert report.step(StepName.WEIGHTS) is report.steps[2]


def test_findings_are_appended_and_their_cause_gives_advice() -> None:
    finding = Finding(Cause.NON_FINITE, "NaN in head")
    assert finding.advice == Cause.NON_FINITE.advice
    assert Finding(Cause.NON_FINITE, "NaN in head", advice="mend it").advice == "mend it"
    assert full_report().with_findings(finding).findings[-1] is finding


@pytest.mark.parametrize("enum", [StepVerdict, Verdict, Cause])
def test_every_outcome_carries_its_advice(enum: Any) -> None:
    assert all(member.advice.endswith(".") for member in enum)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"schema_version": 1, "steps": ' + "[" * 5000 + "]" * 5000 + "}"], ids=["open", "closed"]
)
def test_a_file_that_is_nested_without_end_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ReportError, match=r"Can not read the report|does not follow schema"):
        Report.from_json(path)


def test_a_list_in_the_place_of_a_record_is_refused() -> None:
    values = full_report().to_dict()
    values["final"]["settings"] = {"conv": []}
    with pytest.raises(ReportError, match="does not follow schema version 1"):
        Report.from_dict(values)
    values = image_report().to_dict()
    values["visuals"]["tensors"] = ["conv"]
    with pytest.raises(ReportError, match="does not follow schema version 1"):
        Report.from_dict(values)


def test_what_pictures_are_drawn_from_survives_json_and_follows_the_schema(schema: Any, tmp_path: Path) -> None:
    for report in (image_report(), sentence_report()):
        path = report.to_json(tmp_path / "report.json")
        jsonschema.validate(json.loads(path.read_text(encoding="utf-8")), schema, jsonschema.Draft202012Validator)
        assert Report.from_json(path).visuals == report.visuals
        assert Report.from_json(path).remedies == report.remedies


def test_a_report_of_before_there_were_pictures_is_read() -> None:
    values = full_report().to_dict()
    del values["visuals"]
    for remedy in values["remedies"]:
        del remedy["whole"]
    assert Report.from_dict(values) == Report.from_dict(full_report().to_dict())

"""Two processes walk the same way to the same report, write it once, and never wait for each other in vain."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightning_quantdebug.report import Report
from tests.torture import loader

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.filterwarnings("ignore")


def run(root: Path, kinds: str, check: bool = True) -> tuple[dict[str, list[dict[str, Any]]], str]:
    """What the ranks found in each fit and what was printed; the time limit turns a deadlock into a failure."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.callback_ddp_script", str(root), kinds]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, timeout=100, check=False, capture_output=True, text=True
    )
    assert not check or result.returncode == 0, result.stderr[-3000:]
    found = {}
    for kind in kinds.split(","):
        files = [root / kind / f"rank{rank}.json" for rank in (0, 1)]
        found[kind] = [json.loads(file.read_text()) for file in files if file.exists()]
    return found, result.stdout + result.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]], str]:
    root = tmp_path_factory.mktemp("ddp")
    return root, *run(root, "walk,plain,late,unwritable,repair,analysis")


def without_seconds(value: Any) -> Any:
    """A report without what differs from rank to rank: times, and the files that one rank has written."""
    if isinstance(value, dict):
        return {key: without_seconds(item) for key, item in value.items() if key not in ("seconds", "files")}
    return [without_seconds(item) for item in value] if isinstance(value, list) else value


def test_the_table_of_quantizers_is_that_of_validations_in_full_on_all_ranks(runs: Any) -> None:
    first, second = runs[1]["analysis"]
    assert first["alone"] == second["alone"]
    assert len(first["alone"]) >= 5
    for side_by_side, in_full, divergence in first["alone"].values():
        assert side_by_side == in_full
        assert divergence is not None
    assert without_seconds(first["report"]) == without_seconds(second["report"])
    report = Report.from_dict(first["report"])
    assert {row.samples for row in report.sensitivity} == {32}
    assert all(row.loss_when_off is not None and row.task_loss is not None for row in report.sensitivity)
    assert (runs[0] / "analysis" / "quantdebug" / "analysis.json").exists()


def test_both_ranks_have_the_same_report(runs: Any) -> None:
    first, second = runs[1]["walk"]
    assert without_seconds(first["report"]) == without_seconds(second["report"])
    report = Report.from_dict(first["report"])
    assert report.baseline is not None
    assert report.baseline.samples == 32, "31, padded"
    assert report.verdict is not None
    assert [step.step.value for step in report.steps if step.score is not None] == [
        "fp32_check",
        "activations",
        "weights",
        "quantize_model",
    ]


def test_both_ranks_measure_what_rank_zero_made_of_its_batches(runs: Any) -> None:
    first, second = runs[1]["repair"]
    assert without_seconds(first["report"]) == without_seconds(second["report"])
    report = Report.from_dict(first["report"])
    measured = {item.remedy for item in report.remedies if item.after is not None}
    assert measured & {"bias_correction", "adaround", "range_setting"}, "remedies that depend on each rank's data"


def test_ranges_come_from_what_both_ranks_saw(runs: Any) -> None:
    setting = runs[1]["walk"][0]["report"]["final"]["settings"]["input"]
    inputs = loader().dataset.tensors[0]  # type: ignore[attr-defined] # a TensorDataset has them
    assert setting["observed_min"] == inputs.min().item()
    assert setting["observed_max"] == inputs.max().item()
    assert runs[1]["walk"][0]["report"]["settings"]["calibration_samples"] == 44


def test_the_report_is_written_and_said_once(runs: Any) -> None:
    root, found, output = runs
    root, (first, second) = root / "walk", found["walk"]
    assert output.count("quantdebug: NOT ACCEPTED: loss") == 1
    written = Report.from_json(root / "quantdebug" / "report.json")
    assert written.to_dict() == first["report"]
    assert first["report"]["final"]["files"]
    assert not second["report"]["final"]["files"]
    # One for the watch of each epoch, one for the walk.
    assert len(list((root / "quantdebug").glob("events*"))) == 3


def test_the_weights_are_those_of_a_run_without(runs: Any) -> None:
    for with_callback, plain in zip(runs[1]["walk"], runs[1]["plain"], strict=True):
        assert (with_callback["weights"], with_callback["random"]) == (plain["weights"], plain["random"])


def test_a_time_budget_ends_both_ranks_at_the_same_step(runs: Any) -> None:
    first, second = runs[1]["late"]
    assert without_seconds(first["report"]) == without_seconds(second["report"])
    verdicts = {step["step"]: step["verdict"] for step in first["report"]["steps"]}
    assert verdicts["fp32_check"] == "passed"
    assert verdicts["quantize_model"] == "not_run"


def test_a_directory_that_rank_zero_can_not_write_is_refused_on_both(runs: Any) -> None:
    errors = [result["error"] for result in runs[1]["unwritable"]]
    assert len(errors) == 2
    assert all(error.startswith("ReportError: Can not write to '/dev/null/below'") for error in errors)


def test_a_failure_of_one_rank_is_raised_though_failures_are_to_be_warnings(tmp_path: Path) -> None:
    found, output = run(tmp_path, "fails", check=False)
    errors = [result.get("error") for result in found["fails"]]
    assert "ZeroDivisionError: only here" in errors or "ZeroDivisionError: only here" in output


def test_spawned_processes_leave_the_report_on_disk(tmp_path: Path) -> None:
    found, output = run(tmp_path, "spawn")
    assert "report" not in found["spawn"][0], "the callback of the main process has not walked"
    report = Report.from_json(tmp_path / "spawn" / "quantdebug" / "report.json")
    assert report.baseline is not None
    assert report.baseline.samples == 32
    assert output.count("quantdebug: NOT ACCEPTED: loss") == 1

"""The examples run as a user runs them, refuse bad data, and train a network that knows nothing of quantization."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch.cli
import numpy as np
import pytest
import pytorch_lightning.cli
import torch

from lightning_quantdebug import QuantDebug
from lightning_quantdebug.report import Report, StepName, StepVerdict, Verdict
from lightning_quantdebug.settings import Direction

ROOT = Path(__file__).parent.parent
BOXES = (StepName.FIX_WEIGHTS, StepName.FIX_ACTIVATIONS, StepName.FIX_QUANTIZERS, StepName.QAT)
RUN_HERE = [StepName.FP32_CHECK, StepName.ACTIVATIONS, StepName.WEIGHTS, StepName.QUANTIZE_MODEL]


def run_example(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run an example in a process of its own."""
    result = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result


def cifar_like(path: Path, **changes: Any) -> Path:
    """A file with a few images of random pixels."""
    random = np.random.default_rng(0)
    arrays: dict[str, Any] = {}
    for name, count in (("train", 64), ("test", 32)):
        arrays[f"x_{name}"] = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        arrays[f"y_{name}"] = (np.arange(count) % 10).astype(np.uint8)
    arrays.update(changes)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def check_what_was_written(output: str, directory: Path) -> Report:
    """The last line of the output is the path of the page; the report beside it went through the steps."""
    page = Path(output.strip().splitlines()[-1])
    assert page.name == "report.md"
    assert directory in page.parents
    assert page.read_text(encoding="utf-8").startswith("# Quantization: ")
    report = Report.from_json(page.with_name("report.json"))
    assert [step.step for step in report.steps if step.score is not None and step.step not in BOXES] == RUN_HERE
    assert report.verdict is not None
    assert report.verdict.value in ("accepted", "repaired", "repaired_by_qat", "not_accepted")
    assert list(page.parent.parent.glob("events.out.tfevents.*"))
    assert "tensorboard --logdir" in output
    return report


@pytest.mark.parametrize("name", ["quickstart.py", "transformer.py"])
def test_an_example_trains_walks_and_says_where_the_report_is(name: str, tmp_path: Path) -> None:
    result = run_example(name, "--epochs", "3", "--output", str(tmp_path))
    report = check_what_was_written(result.stdout, tmp_path)
    assert report.baseline is not None
    assert report.baseline.score > 0.5
    assert report.baseline.samples == 450


@pytest.mark.parametrize(
    ("target", "guilty", "innocent"),
    [("w2a8_per_tensor", StepName.WEIGHTS, StepName.ACTIVATIONS), ("w8a2", StepName.ACTIVATIONS, StepName.WEIGHTS)],
)
def test_of_a_target_that_is_too_narrow_the_guilty_half_is_named_and_remedies_are_tried(
    target: str, guilty: StepName, innocent: StepName, tmp_path: Path
) -> None:
    result = run_example("quickstart.py", "--epochs", "3", "--target", target, "--output", str(tmp_path))
    report = check_what_was_written(result.stdout, tmp_path)
    verdicts = {step.step: step.verdict for step in report.steps}
    assert report.verdict in (Verdict.REPAIRED, Verdict.REPAIRED_BY_QAT, Verdict.NOT_ACCEPTED)
    assert verdicts[guilty] is StepVerdict.FAILED
    assert verdicts[innocent] is StepVerdict.PASSED
    box = {StepName.WEIGHTS: StepName.FIX_WEIGHTS, StepName.ACTIVATIONS: StepName.FIX_ACTIVATIONS}[guilty]
    assert any(item.step == box.value and item.after is not None for item in report.remedies)


def test_where_repair_suffices_nothing_is_trained_and_where_it_does_not_training_brings_the_score_back(
    tmp_path: Path,
) -> None:
    result = run_example("qat_fallback.py", "--output", str(tmp_path))
    found = [Path(line) for line in result.stdout.splitlines() if line.endswith("report.md") and line.startswith("/")]
    easy, hard = (Report.from_json(page.with_name("report.json")) for page in found)
    assert easy.verdict in (Verdict.ACCEPTED, Verdict.REPAIRED)
    assert easy.steps[-1].verdict is StepVerdict.SKIPPED
    training = hard.steps[-1]
    assert training.step is StepName.QAT
    assert hard.verdict is Verdict.REPAIRED_BY_QAT
    assert hard.baseline is not None
    assert hard.baseline.score > 0.95
    assert training.details["start_score"] < hard.baseline.score - 0.02
    # Within two points of FP32.
    assert training.score is not None
    assert training.score > hard.baseline.score - 0.02
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("Best checkpoint, quantized: ")]
    assert float(line.split()[3].rstrip(";")) == pytest.approx(training.score, abs=6e-4)


def test_colour_images_are_read_from_an_npz(tmp_path: Path) -> None:
    path = cifar_like(tmp_path / "cifar10.npz")
    arguments = ("--data", "cifar10", "--root", str(path), "--epochs", "1", "--output", str(tmp_path))
    report = check_what_was_written(run_example("quickstart.py", *arguments).stdout, tmp_path)
    assert report.baseline is not None
    assert report.baseline.samples == 32


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The quick start as a module, without a process of its own."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module("quickstart")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y_test": None}, "--root must be an .npz file with the plain arrays x_train, y_train, x_test, y_test; got"),
        ({"x_train": np.array([{}], dtype=object)}, "Object arrays cannot be loaded when allow_pickle=False"),
        (
            {"x_train": np.zeros((4, 32, 32, 3))},
            "Images must be uint8 of shape (N, 32, 32, 3) with N labels, got float64",
        ),
        ({"y_train": np.zeros(5)}, "with (5,) labels"),
    ],
)
def test_a_file_with_other_arrays_is_refused(
    changes: dict[str, Any], message: str, quickstart: Any, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit, match=re.escape(message)):
        quickstart.cifar10(cifar_like(tmp_path / "cifar10.npz", **changes))


def test_a_pickle_is_refused_and_never_run(quickstart: Any, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    path = tmp_path / "data_batch_1"
    path.write_bytes(f"cos\nmkdir\n(S'{proof}'\ntR.".encode())
    with pytest.raises(SystemExit, match="File is not a zip file"):
        quickstart.cifar10(path)
    assert not proof.exists()


def test_cifar10_without_a_file_says_what_is_missing(
    quickstart: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["quickstart.py", "--data", "cifar10"])
    with pytest.raises(SystemExit, match="2"):
        quickstart.main()
    assert "--data cifar10 needs --root, an .npz file; see --help" in capsys.readouterr().err


@pytest.mark.parametrize("namespace", [pytorch_lightning, lightning.pytorch], ids=lambda module: module.__name__)
def test_the_yaml_example_configures_the_callback(namespace: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tiny(namespace.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(2, 2)

    arguments = ["--config", str(ROOT / "examples" / "lightning_cli.yaml"), "--trainer.logger", "false"]
    cli = namespace.cli.LightningCLI(Tiny, args=arguments, run=False, save_config_callback=None)
    (callback,) = [item for item in cli.trainer.callbacks if isinstance(item, QuantDebug)]
    assert callback.monitor == "val_acc"
    assert callback.settings.direction is Direction.MAX
    assert callback.settings.watch_every_n_epochs == 5
    assert callback.settings.target.weights.bit_width == 4
    plain = json.loads(json.dumps(cli.parser.parse_args(arguments).as_dict(), default=str))
    assert plain["trainer"]["callbacks"][0]["init_args"]["tolerance"] == "1%"

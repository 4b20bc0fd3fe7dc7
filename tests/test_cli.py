"""The callback from LightningCLI's YAML, in both namespaces."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_quantdebug import QuantDebug
from lightning_quantdebug.report import Report
from lightning_quantdebug.settings import OnError
from tests.torture import NAMESPACES, lightning, loader, simple_class

pytestmark = pytest.mark.filterwarnings("ignore")

CONFIG = """
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  default_root_dir: {root}
  callbacks:
    - class_path: lightning_quantdebug.QuantDebug
      init_args:
        monitor: accuracy
        mode: max
        tolerance: 1%
        target:
          preset: int8
          name: mine
          weights:
            bit_width: 4
        exclude: ['net.0*']
        calibration: val
        calibration_batches: 2
        limit_batches: 0.5
        max_time:
          minutes: 30
        watch_every_n_epochs: 1
        on_error: raise
        verbose: false
"""


def cli(namespace: str, arguments: list[str], run: bool = True) -> Any:
    """A LightningCLI with a module and data of its namespace."""

    class Data(lightning(namespace).LightningDataModule):  # type: ignore[misc] # the base is chosen at run time
        def train_dataloader(self) -> Any:
            return loader()

        def val_dataloader(self) -> Any:
            return loader(31, 1)

    kind = importlib.import_module(f"{namespace}.cli").LightningCLI
    return kind(simple_class(namespace), Data, args=arguments, run=run, save_config_callback=None)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(root=tmp_path))
    return path


def callback_of(command: Any) -> QuantDebug:
    return next(callback for callback in command.trainer.callbacks if isinstance(callback, QuantDebug))


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("subcommand", ["fit", "validate"])
def test_yaml_runs_a_walk(config: Path, tmp_path: Path, namespace: str, subcommand: str) -> None:
    command = cli(namespace, [subcommand, "--config", str(config)])
    callback = callback_of(command)
    settings = callback.settings
    assert str(settings.tolerance) == "1%"
    assert settings.tolerance.relative
    assert (settings.target.name, settings.target.weights.bit_width, settings.target.activations.bit_width) == (
        "mine",
        4,
        8,
    )
    assert settings.exclude == ("net.0*",)
    assert settings.max_time is not None
    assert settings.max_time.total_seconds() == 1800
    assert settings.on_error is OnError.RAISE
    assert callback.report is not None
    report = Report.from_json(tmp_path / "quantdebug" / "report.json")
    assert report.settings["target"]["weights"]["bit_width"] == 4
    assert not [name for name in report.coverage.quantized if name.startswith("net.0")]


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_printed_config_gives_the_same_callback(
    config: Path, tmp_path: Path, namespace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli(namespace, ["fit", "--config", str(config), "--print_config"])
    printed = capsys.readouterr().out
    again = tmp_path / "again.yaml"
    again.write_text(printed)
    assert yaml.safe_load(printed)["trainer"]["callbacks"][0]["init_args"]["tolerance"] == "1%"
    first = callback_of(cli(namespace, ["--config", str(config)], run=False))
    trimmed = {key: value for key, value in yaml.safe_load(printed).items() if key in ("trainer", "model", "data")}
    again.write_text(yaml.safe_dump(trimmed))
    second = callback_of(cli(namespace, ["--config", str(again)], run=False))
    assert first.settings == second.settings


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_help_describes_each_argument(namespace: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli(namespace, ["fit", "--trainer.callbacks.help", "lightning_quantdebug.QuantDebug"])
    text = " ".join(capsys.readouterr().out.split())
    assert "Permitted loss of score against FP32" in text
    assert "Name patterns of quantizers that stay in FP32" in text


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--trainer.callbacks.tolerance=-1"], "`tolerance` must be a finite number that is not negative"),
        (["--trainer.callbacks.target=int9"], "`target` must be one of"),
        (["--trainer.callbacks.mode=maximum"], "`mode` must be one of"),
    ],
)
def test_wrong_values_are_refused_with_our_message(
    config: Path, arguments: list[str], match: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((SystemExit, ValueError)) as caught:
        cli("pytorch_lightning", ["--config", str(config), *arguments], run=False)
    assert match in str(caught.value) + capsys.readouterr().err

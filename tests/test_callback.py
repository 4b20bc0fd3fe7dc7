"""A fit with the callback is the fit without it, its checkpoints are those without it, and the report is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_quantdebug import QuantDebug
from lightning_quantdebug.report import Report, StepName, Verdict
from tests.callback_runs import debugger, fingerprint, fit, random_states, weights
from tests.torture import lightning, loader, simple_class, torture_class, trainer

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return fingerprint(fit(tmp_path_factory.mktemp("plain")))


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in expected:
        assert found[name] == expected[name], name


def test_two_fits_without_the_callback_are_the_same_and_another_seed_is_not(
    plain: dict[str, Any], tmp_path: Path
) -> None:
    running = fit(tmp_path)
    assert_same(fingerprint(running), plain)
    with torch.no_grad():
        running.lightning_module.net[0].weight[0, 0] += 1e-6
    assert weights(running.lightning_module) != plain["weights"]


@pytest.mark.parametrize(
    "settings",
    [
        {"when": "never"},
        {"when": "never", "watch_every_n_epochs": 1},
        {"when": "fit_start"},
        {},
        {"restore_best": True, "calibration": "val", "limit_batches": 2, "target": "w2a8_per_tensor"},
    ],
    ids=["idle", "watching", "fit_start", "fit_end", "restore_best"],
)
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_fit_with_the_callback_is_bit_identical(
    plain: dict[str, Any], tmp_path: Path, settings: dict[str, Any], place: str
) -> None:
    callback = debugger(**settings)
    running = fit(tmp_path, **{place: [callback]})
    assert_same(fingerprint(running), plain)
    assert (callback.report is None) is (callback.settings.when.value == "never")


def test_a_fit_with_two_targets_and_the_watch_is_bit_identical_and_keeps_them_apart(
    plain: dict[str, Any], tmp_path: Path
) -> None:
    fine, coarse = debugger(watch_every_n_epochs=2), debugger(target="w2a8_per_tensor", monitor="loss", mode="min")
    running = fit(tmp_path, first=[fine], last=[coarse])
    assert_same(fingerprint(running), plain)
    assert fine.state_key != coarse.state_key
    assert fine.report is not None
    assert coarse.report is not None
    folder = Path(running.log_dir) / "quantdebug"
    assert sorted(path.name for path in folder.iterdir()) == ["int8", "w2a8_per_tensor"]
    for callback, name in ((fine, "int8"), (coarse, "w2a8_per_tensor")):
        assert Report.from_json(folder / name / "report.json").settings["target"]["name"] == name
        assert Path(callback.report.final.files["report.md"]).parent == folder / name
    with (Path(running.logger.log_dir) / "metrics.csv").open() as file:
        header = file.readline()
    for column in (
        "quantdebug/int8/loss/weights",
        "quantdebug/w2a8_per_tensor/loss/weights",
        "quantdebug/int8/watch/accuracy",
    ):
        assert column in header


def test_two_callbacks_with_unnamed_targets_have_different_keys_and_folders(tmp_path: Path) -> None:
    targets = [{"weights": {"bit_width": width}} for width in (4, 6)]
    callbacks = [debugger(target=target, dirpath=tmp_path / "here") for target in targets]
    assert callbacks[0].state_key != callbacks[1].state_key
    running = trainer(tmp_path, callbacks=callbacks)
    running.fit(simple_class()(), loader(), loader(31, 1))
    for index, width in enumerate((4, 6)):
        report = Report.from_json(tmp_path / "here" / f"custom_{index}" / "report.json")
        assert report.settings["target"]["weights"]["bit_width"] == width


def test_checkpoints_load_with_and_without_the_callback(tmp_path: Path) -> None:
    with_callback = fit(tmp_path / "with", last=[debugger(watch_every_n_epochs=1)], max_epochs=2)
    without = fit(tmp_path / "without", max_epochs=2)
    kind = type(with_callback.lightning_module)
    for running in (with_callback, without):
        path = running.checkpoint_callback.best_model_path
        saved = torch.load(path, weights_only=True)
        assert not [key for key in saved["callbacks"] if "QuantDebug" in key]
        loaded = kind.load_from_checkpoint(path, strict=True, weights_only=True)
        assert list(loaded.state_dict()) == list(kind().state_dict())
    # And the other way round.
    resumed = fit(tmp_path / "resumed", ckpt_path=with_callback.checkpoint_callback.last_model_path)
    other = fit(tmp_path / "other", [debugger()], ckpt_path=without.checkpoint_callback.last_model_path)
    assert weights(resumed.lightning_module) == weights(other.lightning_module)


def test_state_in_checkpoints_is_plain() -> None:
    assert debugger().state_dict() == {}


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_resumed_fit_ends_like_an_uninterrupted_one(plain: dict[str, Any], tmp_path: Path, epoch: int) -> None:
    settings: dict[str, Any] = {"watch_every_n_epochs": 1, "when": "fit_start"}
    first = fit(tmp_path / "first", last=[debugger(**settings)], max_epochs=epoch + 1)
    path = str(Path(first.checkpoint_callback.dirpath) / f"epoch={epoch}.ckpt")
    baseline = fit(tmp_path / "baseline", ckpt_path=path)
    callback = debugger(**settings)
    resumed = fit(tmp_path / "resumed", last=[callback], ckpt_path=path)
    assert resumed.global_step == 18
    for name in ("weights", "random", "metrics", "loops", "early_stopping", "best", "csv", "attributes"):
        assert fingerprint(resumed)[name] == fingerprint(baseline)[name], name
    assert callback.report is not None


def test_fit_twice_with_another_module_each_time(tmp_path: Path) -> None:
    callback = debugger(watch_every_n_epochs=1)
    reports = []
    for width in (12, 20):
        torch.manual_seed(0)
        module = simple_class()()
        module.net[0], module.net[1] = torch.nn.Linear(8, width), torch.nn.BatchNorm1d(width)
        module.net[3] = torch.nn.Linear(width, 3)
        running = trainer(tmp_path / str(width), callbacks=callback)
        running.fit(module, loader(), loader(31, 1))
        reports.append(callback.report)
        assert callback.report is not None
        assert callback.report.final.settings["net.0.weight"].channels == width
    assert reports[0] is not reports[1]


def test_the_same_trainer_fits_and_validates_again(tmp_path: Path) -> None:
    callback = debugger(calibration="val")
    running, module = trainer(tmp_path, callbacks=callback, max_epochs=1), simple_class()()
    running.fit(module, loader(), loader(31, 1))
    first = callback.report
    running.fit_loop.max_epochs = 2
    running.fit(module, loader(), loader(31, 1))
    second = callback.report
    before = weights(module), random_states()
    running.validate(module, loader(31, 1), verbose=False)
    assert len({id(report) for report in (first, second, callback.report)}) == 3
    assert weights(module) == before[0]
    assert second is not None
    assert callback.report is not None
    assert callback.report.baseline == second.baseline


def test_a_watch_interrupted_by_an_error_does_not_reach_into_the_next_fit(tmp_path: Path) -> None:
    class Failing(simple_class()):  # type: ignore[misc] # the base is made at run time
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                raise RuntimeError("mine")

    callback = debugger(watch_every_n_epochs=1, when="never")
    with pytest.raises(RuntimeError, match="mine"):
        trainer(tmp_path, callbacks=callback, max_epochs=2).fit(Failing(), loader(), loader(31, 1))
    module = simple_class()()
    watched: list[float] = []

    class Note(lightning().Callback):  # type: ignore[misc] # the base is chosen at run time
        def on_train_epoch_end(self, running: Any, pl_module: Any) -> None:
            assert callback._watched is not None
            watched.append(callback._watched.root is pl_module)

    trainer(tmp_path, callbacks=[callback, Note()]).fit(module, loader(), loader(31, 1))
    assert watched == [True]
    assert callback._watched is None


def scalars(running: Any, tag: str) -> list[tuple[str, float]]:
    """The values of one column of metrics.csv by their step."""
    import csv

    with (Path(running.logger.log_dir) / "metrics.csv").open(newline="") as file:
        return [(row["step"], float(row[tag])) for row in csv.DictReader(file) if row.get(tag)]


def test_the_watch_logs_each_epoch_what_a_walk_would_find_then(tmp_path: Path) -> None:
    target = "w3a4_per_tensor"
    settings: dict[str, Any] = {"target": target, "calibration_batches": 4, "monitor": "loss", "mode": "min"}
    callback = debugger(when="never", watch_every_n_epochs=1, **settings)
    running = fit(tmp_path / "watch", last=[callback])
    watched = scalars(running, "quantdebug/watch/loss")
    assert [step for step, _ in watched] == ["6", "12", "18"]
    for epoch, (_, score) in enumerate(watched):
        module = torture_class().load_from_checkpoint(
            Path(running.checkpoint_callback.dirpath) / f"epoch={epoch}.ckpt", weights_only=True
        )
        walker = debugger(calibration=loader(32), **settings)
        trainer(tmp_path / "walk", callbacks=walker).validate(module, loader(31, 1), verbose=False)
        assert walker.report is not None
        step = walker.report.step(StepName.WEIGHTS)
        assert step is not None
        # The watch calibrates on shuffled training batches, the walk on the first in order.
        assert score == pytest.approx(step.details["both"]["score"], rel=0.15)
        assert abs(score - walker.report.baseline.score) > 0.001  # type: ignore[union-attr] # there is one


@pytest.mark.parametrize(("every", "steps"), [(1, ["6", "12", "18"]), (2, ["12"]), (4, [])])
def test_the_watch_runs_every_n_epochs(tmp_path: Path, every: int, steps: list[str]) -> None:
    running = fit(tmp_path, last=[debugger(when="never", watch_every_n_epochs=every)])
    assert [step for step, _ in scalars(running, "quantdebug/watch/accuracy")] == steps


def test_the_walk_logs_score_and_loss_of_each_step(tmp_path: Path) -> None:
    callback = debugger(target="w2a8_per_tensor")
    running = fit(tmp_path, last=[callback])
    assert callback.report is not None
    for step in callback.report.steps:
        for word, value in (("score", step.score), ("loss", step.loss)):
            logged = scalars(running, f"quantdebug/{word}/{step.step.value}")
            assert logged == ([] if value is None else [("18", value)])


def test_without_a_logger_report_and_event_files_are_written(tmp_path: Path) -> None:
    callback = debugger(watch_every_n_epochs=1)
    trainer(tmp_path, callbacks=callback).fit(simple_class()(), loader(), loader(31, 1))
    folder = tmp_path / "quantdebug"
    names = sorted(path.name.split(".")[0] for path in folder.iterdir())
    assert names == ["events", "events", "recipe", "report", "report", "report"]
    assert callback.report is not None
    assert Report.from_json(folder / "report.json").to_dict() == callback.report.to_dict()
    assert (folder / "report.md").read_text().startswith("# Quantization: ")
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert callback.report.final.files["report.html"] == str(folder / "report.html")
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    assert "quantdebug/pictures/1_flow_chart" in events.Tags()["images"]
    assert callback.report.final.files["tensorboard"] == str(folder)


def test_dirpath_is_where_everything_goes(tmp_path: Path) -> None:
    callback = debugger(dirpath=str(tmp_path / "a" / "b"))
    trainer(tmp_path, callbacks=callback).fit(simple_class()(), loader(), loader(31, 1))
    assert (tmp_path / "a" / "b" / "report.json").exists()
    assert not (tmp_path / "quantdebug").exists()


def test_summary_and_progress_only_if_verbose(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verbose in (True, False):
        callback = debugger(verbose=verbose)
        trainer(tmp_path, callbacks=callback).fit(simple_class()(), loader(), loader(31, 1))
        output = capsys.readouterr()
        assert ("quantdebug: " in output.out) is verbose
        assert ("quantdebug fp32_check" in output.err) is verbose


def test_restore_best_diagnoses_the_best_weights_and_gives_back_the_last(tmp_path: Path) -> None:
    class Worse(simple_class()):  # type: ignore[misc] # the base is made at run time
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 2:
                with torch.no_grad():
                    self.net[3].weight.mul_(-20)

        def state_dict(self, *args: Any, **settings: Any) -> Any:
            # Saves part of the module only: what is not saved must be given back all the same.
            full = super().state_dict(*args, **settings)
            return {name: value for name, value in full.items() if not name.startswith("net.1.running")}

        def load_state_dict(self, saved: Any, strict: bool = True, assign: bool = False) -> Any:
            with torch.no_grad():
                self.net[1].running_mean.zero_()
            return super().load_state_dict(saved, strict=False, assign=assign)

    from pytorch_lightning.callbacks import ModelCheckpoint

    states: list[str] = []
    for restore_best in (False, True):
        torch.manual_seed(0)
        module = Worse()
        keep = ModelCheckpoint(monitor="accuracy", mode="max")
        callback = debugger(restore_best=restore_best)
        running = trainer(tmp_path, callbacks=[callback, keep], max_epochs=3, enable_checkpointing=True)
        running.fit(module, loader(), loader(31, 1))
        states.append(weights(module))
        assert callback.report is not None
        assert callback.report.baseline is not None
        best, last = float(keep.best_model_score), running.callback_metrics["accuracy"].item()
        assert best > last + 0.1
        assert (callback.report.baseline.score == last) is not restore_best
    assert states[0] == states[1]


def test_best_weights_of_an_averaged_model_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint

    class Worse(simple_class()):  # type: ignore[misc] # the base is made at run time
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 2:
                with torch.no_grad():
                    self.net[3].weight.mul_(-20)

    keep = ModelCheckpoint(monitor="loss", mode="min")
    callback = debugger(restore_best=True, monitor="loss", mode="min")
    averaging = EMAWeightAveraging(decay=0.5)
    module = Worse()
    running = trainer(
        tmp_path, callbacks=[callback, averaging, keep], max_epochs=3, enable_checkpointing=True, logger=False
    )
    running.fit(module, loader(), loader(31, 1))
    assert callback.report is not None
    assert callback.report.baseline is not None
    assert callback.report.baseline.score == pytest.approx(float(keep.best_model_score), rel=1e-5)


def test_callback_is_found_in_trainers_of_both_namespaces_by_its_attributes() -> None:
    callback = QuantDebug("val_acc", "max", tolerance=0.5)
    assert callback.monitor == "val_acc"
    assert callback.settings.tolerance.value == 0.5
    assert callback.state_key.startswith("QuantDebug{'monitor': 'val_acc', 'mode': 'max', 'target': {'name': 'int8'")
    assert Verdict.ACCEPTED.value == "accepted"

"""QAT epochs in the fit that is running: how they begin and end, and what everybody else sees of them."""

from __future__ import annotations

import importlib
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quantdebug.errors import SettingsError
from lightning_quantdebug.report import Cause, StepName, StepVerdict, Verdict
from tests.qat_runs import debugger, equal, fit, learner_class, loader, model_checkpoint, qat_step, tensors
from tests.torture import NAMESPACES, calling, lightning, trainer


class Diary:
    """What a callback of the user's sees of a fit."""

    def __init__(self, namespace: str = "pytorch_lightning") -> None:
        self.events: list[str] = []
        self.epochs: list[int] = []
        self.steps: list[int] = []
        self.rates: list[list[float]] = []
        self.scores: list[float] = []
        self.callback = calling(
            namespace,
            on_train_start=lambda *_: self.events.append("train start"),
            on_train_end=lambda *_: self.events.append("train end"),
            on_train_epoch_start=self.begin,
            on_train_epoch_end=self.end,
            on_train_batch_start=lambda *_: None,
        )

    def begin(self, running: Any, module: Any) -> None:
        self.epochs.append(running.current_epoch)

    def end(self, running: Any, module: Any) -> None:
        self.steps.append(running.global_step)
        self.rates.append([group["lr"] for item in running.optimizers for group in item.param_groups])
        self.scores.append(float(running.callback_metrics.get("loss", math.nan)))


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_epochs_go_on_in_one_training(tmp_path: Path, namespace: str) -> None:
    diary, callback = Diary(namespace), debugger()
    running = fit(tmp_path, callback, others=[diary.callback], namespace=namespace)
    assert diary.events == ["train start", "train end"]
    assert diary.epochs == [0, 1, 2, 3]
    assert diary.steps == [6, 12, 18, 24]
    assert (running.current_epoch, running.global_step) == (4, 24)
    step = qat_step(callback)
    assert step.details["epochs"] == step.details["epochs_allowed"] == 2
    # What validation logs in these epochs is the quantized score.
    assert step.details["scores"] == pytest.approx(diary.scores[2:], rel=1e-6)
    assert step.details["start_score"] == callback.report.step(StepName.QUANTIZE_MODEL).score
    assert step.score == pytest.approx(min(step.details["scores"]), rel=1e-6)
    assert step.score < step.details["start_score"]


def test_fp32_training_is_that_of_a_fit_without(tmp_path: Path) -> None:
    plain = fit(tmp_path / "plain", None)
    callback = debugger()
    fit(tmp_path / "with", callback)
    saved = torch.load(qat_step(callback).details["fp32_checkpoint"], weights_only=True)
    own = plain.lightning_module.state_dict()
    assert list(saved["state_dict"]) == list(own)
    assert all(torch.equal(saved["state_dict"][name], value) for name, value in own.items())
    assert (saved["epoch"], saved["global_step"]) == (2, 12)
    # It is a whole checkpoint: training in FP32 goes on from it.
    resumed = fit(tmp_path / "on", None, ckpt_path=qat_step(callback).details["fp32_checkpoint"], max_epochs=3)
    longer = fit(tmp_path / "longer", None, max_epochs=3)
    assert equal(tensors(resumed.lightning_module), tensors(longer.lightning_module))


def stopping(how: str) -> tuple[list[Any], dict[str, Any]]:
    """Callbacks and settings of a fit that ends in some way."""
    callbacks = importlib.import_module("pytorch_lightning.callbacks")

    def stop(running: Any, module: Any) -> None:
        running.should_stop = running.should_stop or running.global_step == 12

    endings: dict[str, tuple[list[Any], dict[str, Any]]] = {
        "max_epochs": ([], {}),
        "max_steps": ([], {"max_epochs": -1, "max_steps": 12}),
        "max_steps in an epoch": ([], {"max_epochs": -1, "max_steps": 9}),
        "early stopping in validation": (
            [callbacks.EarlyStopping("loss", patience=1, min_delta=100.0)],
            {"max_epochs": 50, "min_epochs": 2},
        ),
        "early stopping in training": (
            [callbacks.EarlyStopping("train_loss", patience=1, min_delta=100.0, check_on_train_epoch_end=True)],
            {"max_epochs": 50},
        ),
        "should_stop": ([calling(on_train_epoch_end=stop)], {"max_epochs": 50}),
        "should_stop in an epoch": ([calling(on_before_zero_grad=stop)], {"max_epochs": 50}),
    }
    return endings[how]


@pytest.mark.parametrize(
    "how",
    [
        "max_epochs",
        "max_steps",
        "max_steps in an epoch",
        "early stopping in validation",
        "early stopping in training",
        "should_stop",
    ],
)
def test_it_follows_however_training_ended(tmp_path: Path, how: str) -> None:
    others, settings = stopping(how)
    plain = fit(tmp_path / "plain", None, others=stopping(how)[0], **settings)
    callback, diary = debugger(), Diary()
    running = fit(tmp_path / "with", callback, others=[*others, diary.callback], **settings)
    # EarlyStopping of the user's ends QAT after its own patience too, but never by what FP32 has scored.
    assert 1 <= len(qat_step(callback).details["scores"]) <= 2
    assert running.global_step == plain.global_step + 6 * len(qat_step(callback).details["scores"])
    assert running.current_epoch == plain.current_epoch + len(qat_step(callback).details["scores"])
    assert (running.max_epochs, running.max_steps, running.min_epochs) == (
        plain.max_epochs,
        plain.max_steps,
        plain.min_epochs,
    )


def test_a_trained_model_is_trained_with_quantizers_at_once(tmp_path: Path) -> None:
    module = fit(tmp_path / "first", None).lightning_module
    before = tensors(module)
    callback = debugger()
    running = fit(tmp_path / "second", callback, module, max_epochs=0)
    assert len(qat_step(callback).details["scores"]) == 2
    assert (running.current_epoch, running.global_step) == (2, 12)
    saved = torch.load(qat_step(callback).details["fp32_checkpoint"], weights_only=True)["state_dict"]
    assert equal([saved[name].cpu() for name in saved], [value.cpu() for value in _named(module, before)])


def _named(module: nn.Module, values: list[Tensor]) -> list[Tensor]:
    """Values of parameters and buffers in the order of the state_dict."""
    names = [name for name, _ in (*module.named_parameters(), *module.named_buffers())]
    known = dict(zip(names, values, strict=True))
    return [known[name] for name in module.state_dict()]


def test_where_repair_suffices_no_epoch_follows(tmp_path: Path) -> None:
    callback, diary = debugger(target="int8", tolerance=0.1, remedies=None), Diary()
    plain = fit(tmp_path / "plain", None)
    running = fit(tmp_path / "with", callback, others=[diary.callback])
    assert callback.report.verdict in (Verdict.ACCEPTED, Verdict.REPAIRED)
    assert qat_step(callback).verdict is StepVerdict.SKIPPED
    assert diary.epochs == [0, 1]
    assert equal(tensors(running.lightning_module), tensors(plain.lightning_module))
    assert not (tmp_path / "with" / "quantdebug" / "fp32.ckpt").exists()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"qat_epochs": 0}, "`qat_epochs` is 0"),
        ({"max_time": {"microseconds": 1}}, "time budget"),
    ],
)
def test_why_no_epochs_follow(tmp_path: Path, settings: dict[str, Any], reason: str) -> None:
    callback = debugger(**settings)
    running = fit(tmp_path, callback)
    assert running.current_epoch == 2
    assert qat_step(callback).verdict is StepVerdict.NOT_RUN
    assert reason in qat_step(callback).advice


def test_a_dry_run_trains_no_further(tmp_path: Path) -> None:
    callback = debugger()
    running = fit(tmp_path, callback, fast_dev_run=True)
    assert running.global_step == 1
    assert "fast_dev_run" in qat_step(callback).advice


def test_a_walk_before_training_is_followed_by_that_training_alone(tmp_path: Path) -> None:
    module = fit(tmp_path / "first", None).lightning_module
    callback = debugger(when="fit_start")
    running = fit(tmp_path / "second", callback, module)
    assert running.current_epoch == 2
    assert qat_step(callback).verdict is StepVerdict.NOT_RUN
    assert "QAT follows a walk at the end of training" in qat_step(callback).advice


def test_validate_says_that_training_is_for_fit(tmp_path: Path) -> None:
    module = fit(tmp_path, None).lightning_module
    callback = debugger(calibration="val")
    trainer(tmp_path, callbacks=[callback]).validate(module, loader(512, 1), verbose=False)
    assert qat_step(callback).verdict is StepVerdict.NOT_RUN
    assert "`trainer.fit`" in qat_step(callback).advice


def test_a_spent_max_time_of_the_trainer_is_a_hard_budget(tmp_path: Path) -> None:
    callback = debugger()

    def wait(running: Any, module: Any) -> None:
        if running.current_epoch == 1:
            time.sleep(1.1)

    running = fit(
        tmp_path, callback, others=[calling(on_train_epoch_start=wait)], max_time={"seconds": 1}, max_epochs=50
    )
    assert running.current_epoch <= 2
    assert "`max_time` is spent" in qat_step(callback).advice
    assert callback.report.verdict is Verdict.NOT_ACCEPTED


def test_a_budget_that_ends_in_training_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = debugger(qat_epochs=9, max_time={"hours": 1}, qat_early_stop=False)

    def late(running: Any, module: Any) -> None:
        if running.current_epoch == 3:
            monkeypatch.setattr(time, "monotonic", lambda: now() + 3600)

    now = time.monotonic
    running = fit(tmp_path, callback, others=[calling(on_train_epoch_start=late)])
    assert running.current_epoch == 4
    assert "time budget" in qat_step(callback).details["stopped"]
    assert callback.report.verdict is not None


def test_it_stops_once_the_tolerance_is_met_with_margin(tmp_path: Path) -> None:
    kept = debugger(qat_epochs=6, qat_lr_factor=1.0, qat_early_stop=False)
    fit(tmp_path / "kept", kept)
    scores, fp32 = qat_step(kept).details["scores"], kept.report.baseline.score
    # The second epoch meets the tolerance, but not with margin.
    permitted = scores[1] - fp32 + 1e-6
    assert scores[2] - fp32 < permitted / 2
    stopped = debugger(tolerance=permitted, qat_epochs=6, qat_lr_factor=1.0)
    fit(tmp_path / "stopped", stopped)
    assert qat_step(stopped).details["scores"] == scores[:3]
    assert "with margin after epoch 3" in qat_step(stopped).details["stopped"]
    assert stopped.report.verdict is Verdict.REPAIRED_BY_QAT
    assert stopped.report.final.score == qat_step(stopped).score


def test_the_best_epoch_remains(tmp_path: Path) -> None:
    weights: list[list[Tensor]] = []
    spoil = calling(
        # The last epoch harms.
        on_train_epoch_end=lambda running, module: weights.append(tensors(module)),
        on_train_batch_start=lambda *_: None,
    )

    class Spoiled(learner_class()):  # type: ignore[misc] # the base is chosen at run time
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return -loss if self.current_epoch == 4 else loss

    callback = debugger(qat_epochs=3, qat_lr_factor=1.0)
    running = fit(tmp_path, callback, Spoiled, others=[spoil])
    step = qat_step(callback)
    best = step.details["best_epoch"]
    assert best < 3
    assert step.details["scores"][2] > step.details["scores"][best - 1]
    assert equal(tensors(running.lightning_module), weights[1 + best])
    assert step.score == pytest.approx(step.details["scores"][best - 1], rel=1e-6)


def test_a_training_that_only_harms_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    class Harmed(learner_class()):  # type: ignore[misc] # as above
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return -loss if self.current_epoch >= 2 else loss

    plain = fit(tmp_path / "plain", None, Harmed)
    callback = debugger(qat_lr_factor=1.0)
    running = fit(tmp_path / "with", callback, Harmed)
    assert qat_step(callback).details["best_epoch"] == 0
    assert qat_step(callback).score == callback.report.step(StepName.QUANTIZE_MODEL).score
    assert equal(tensors(running.lightning_module), tensors(plain.lightning_module))
    assert callback.report.final.module_state.startswith("unchanged")
    assert "none scored better" in qat_step(callback).advice


@pytest.mark.parametrize("manual", [False, True])
def test_a_loss_that_is_no_number_ends_it(tmp_path: Path, manual: bool) -> None:
    class Diverging(learner_class()):  # type: ignore[misc] # as above
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = not manual

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            loss = loss * math.nan if self.global_step == 20 else loss
            if not manual:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None

    callback = debugger(qat_epochs=5)
    running = fit(tmp_path, callback, Diverging)
    step = qat_step(callback)
    assert len(step.details["scores"]) == 1
    assert "NaN or infinite in epoch 2" in step.details["stopped"]
    assert all(bool(value.isfinite().all()) for value in tensors(running.lightning_module))
    (finding,) = [finding for finding in callback.report.findings if finding.cause is Cause.NON_FINITE]
    assert "epoch 2" in finding.evidence
    assert "qat_lr_factor" in finding.advice
    assert step.details["best_epoch"] == 1
    assert step.score == pytest.approx(step.details["scores"][0], rel=1e-6)


def test_everything_is_given_back(tmp_path: Path) -> None:
    module = learner_class()()
    names = [name for name, _ in module.named_parameters()], list(module.state_dict()), set(vars(module))
    callback = debugger()
    running = fit(tmp_path, callback, module)
    loop = type(running.fit_loop)
    assert loop.__name__ == "_FitLoop"
    assert loop.__module__.startswith("pytorch_lightning")
    after = set(vars(module)) - names[2]
    assert not {"training_step", "validation_step", "test_step", "predict_step"} & set(vars(module))
    assert all(name.startswith("_") or name in {"training_type"} for name in after)
    assert ([name for name, _ in module.named_parameters()], list(module.state_dict())) == names[:2]
    assert all(part.training for part in module.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert running.max_epochs == 2


class PlantedError(Exception):
    pass


@pytest.mark.parametrize("error", [PlantedError, KeyboardInterrupt])
def test_an_exception_while_it_trains_gives_module_and_trainer_back(tmp_path: Path, error: type[BaseException]) -> None:
    def fail(running: Any, module: Any) -> None:
        if running.current_epoch == 3:
            raise error

    module, callback = learner_class()(), debugger()
    with pytest.raises((error, SystemExit)):
        fit(tmp_path, callback, module, others=[calling(on_train_epoch_end=fail)])
    assert not {"training_step", "validation_step"} & set(vars(module))
    assert all(part.training for part in module.modules())
    assert (tmp_path / "quantdebug" / "fp32.ckpt").exists()
    assert callback.report.verdict is Verdict.NOT_ACCEPTED


def test_a_second_fit_trains_nothing_more_and_a_longer_one_trains_in_fp32_again(tmp_path: Path) -> None:
    callback = debugger()
    running = fit(tmp_path, callback)
    module, report = running.lightning_module, callback.report
    before = tensors(module)
    running.fit(module, loader(), loader(512, 1))
    assert callback.report is report
    assert equal(tensors(module), before)
    diary, held = Diary(), []
    noting = calling(on_train_epoch_end=lambda *_: held.append(bool(callback.state_dict())))
    running.callbacks += [diary.callback, noting]
    running.fit_loop.epoch_progress.current.processed = running.fit_loop.epoch_progress.current.completed = 0
    running.fit(module, loader(), loader(512, 1))
    assert diary.epochs == [0, 1, 2, 3]
    # Checkpoints of FP32 epochs hold no quantizers, also after a fit with QAT.
    assert held == [False, False, True, True]
    assert callback.report is not report
    assert len(qat_step(callback).details["scores"]) == 2


@pytest.mark.parametrize(
    "settings",
    [
        {"limit_train_batches": 2},
        {"num_sanity_val_steps": 2},
        {"check_val_every_n_epoch": 2},
        {"check_val_every_n_epoch": 3},
        {"val_check_interval": 0.5},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.5},
        {"precision": "64-true"},
        {"precision": "bf16-mixed"},
        {"reload_dataloaders_every_n_epochs": 1},
        {"limit_val_batches": 12},
        {"log_every_n_steps": 1},
    ],
)
def test_under_other_settings_of_the_trainer(tmp_path: Path, settings: dict[str, Any]) -> None:
    callback = debugger()
    running = fit(tmp_path, callback, **settings)
    step = qat_step(callback)
    assert len(step.details["scores"]) == 2
    assert step.score < step.details["start_score"]
    assert step.score == pytest.approx(min(step.details["scores"]), rel=1e-6)
    each = 2 if "limit_train_batches" in settings else 3 if "accumulate_grad_batches" in settings else 6
    assert running.global_step == 4 * each


def test_worker_processes_that_persist(tmp_path: Path) -> None:
    data = loader(num_workers=1, persistent_workers=True), loader(512, 1, num_workers=1, persistent_workers=True)
    callback, plain = debugger(), debugger()
    fit(tmp_path / "workers", callback, data=data)
    fit(tmp_path / "plain", plain)
    assert qat_step(callback).details["scores"] == qat_step(plain).details["scores"]


def test_early_stopping_starts_anew_and_checkpoints_of_both_trainings_remain(tmp_path: Path) -> None:
    callbacks = importlib.import_module("pytorch_lightning.callbacks")
    early, best = callbacks.EarlyStopping("loss", patience=2), model_checkpoint(tmp_path, save_top_k=1, save_last=True)
    callback = debugger(qat_epochs=3)
    running = fit(tmp_path, callback, others=[early, best])
    assert len(qat_step(callback).details["scores"]) == 3
    fp32, quantized = Path(callback.fp32_best_model_path), Path(best.best_model_path)
    assert fp32.name == "epoch=1.ckpt"
    assert quantized.name == f"epoch={1 + qat_step(callback).details['best_epoch']}.ckpt"
    assert fp32.exists()
    assert quantized.exists()
    assert callback.fp32_best_model_score == pytest.approx(callback.report.baseline.score, rel=1e-6)
    assert float(best.best_model_score) == pytest.approx(qat_step(callback).score, rel=1e-6)
    assert float(early.best_score) == pytest.approx(qat_step(callback).score, rel=1e-6)
    assert running.current_epoch == 5


def test_a_checkpoint_that_keeps_only_the_newest_does_not_remove_that_of_fp32(tmp_path: Path) -> None:
    newest = model_checkpoint(tmp_path, monitor=None, save_top_k=1)
    fit(tmp_path, debugger(), others=[newest])
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["epoch=1.ckpt", "epoch=3.ckpt"]


def test_a_best_file_that_would_be_written_over_is_copied(tmp_path: Path) -> None:
    best = model_checkpoint(tmp_path, filename="best", save_top_k=1, enable_version_counter=False)
    callback = debugger()
    fit(tmp_path, callback, others=[best])
    kept = torch.load(callback.fp32_best_model_path, weights_only=True)
    assert Path(callback.fp32_best_model_path).parent == tmp_path / "quantdebug"
    assert kept["epoch"] == 1
    assert [path.name for path in (tmp_path / "saved").iterdir()] == ["best.ckpt"]
    assert torch.load(best.best_model_path, weights_only=True)["epoch"] == 1 + qat_step(callback).details["best_epoch"]


def test_the_best_weights_of_fp32_are_what_it_starts_from_if_wanted(tmp_path: Path) -> None:
    class Worse(learner_class()):  # type: ignore[misc] # as above
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            return -loss if self.current_epoch == 1 else loss

    best = model_checkpoint(tmp_path, save_top_k=1)
    callback = debugger(restore_best=True)
    fit(tmp_path, callback, Worse, others=[best])
    assert Path(callback.fp32_best_model_path).name == "epoch=0.ckpt"
    wanted = torch.load(callback.fp32_best_model_path, weights_only=True)["state_dict"]
    saved = torch.load(qat_step(callback).details["fp32_checkpoint"], weights_only=True)["state_dict"]
    last = torch.load(tmp_path / "quantdebug" / "fp32_last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(saved[name], wanted[name]) for name in wanted)
    assert not all(torch.equal(last[name], wanted[name]) for name in wanted)


def test_stochastic_weight_averaging_is_refused_by_name(tmp_path: Path) -> None:
    callbacks = importlib.import_module("pytorch_lightning.callbacks")
    swa = callbacks.StochasticWeightAveraging(1e-2)
    with pytest.raises(SettingsError, match=r"StochasticWeightAveraging.*qat_epochs=0"):
        fit(tmp_path, debugger(), others=[swa])
    fit(tmp_path, debugger(qat_epochs=0), others=[callbacks.StochasticWeightAveraging(1e-2)], max_epochs=3)


def test_moving_averages_are_what_is_trained_on_and_what_remains(tmp_path: Path) -> None:
    callbacks = importlib.import_module("pytorch_lightning.callbacks")
    averaging = callbacks.EMAWeightAveraging(decay=0.5)
    callback = debugger(qat_epochs=3)
    running = fit(tmp_path, callback, others=[averaging])
    plain = fit(tmp_path / "plain", None, others=[callbacks.EMAWeightAveraging(decay=0.5)])
    saved = torch.load(qat_step(callback).details["fp32_checkpoint"], weights_only=True)["state_dict"]
    averaged = plain.lightning_module.state_dict()
    assert all(torch.equal(saved[name], averaged[name]) for name in averaged)
    step = qat_step(callback)
    assert step.details["best_epoch"] > 0
    running.callbacks = [item for item in running.callbacks if item is not averaging]
    (metrics,) = running.validate(running.lightning_module, loader(512, 1), verbose=False)
    assert metrics["loss"] == pytest.approx(step.score, rel=1e-6)


def test_averages_start_anew_with_the_training(tmp_path: Path) -> None:
    callbacks = importlib.import_module("pytorch_lightning.callbacks")
    averaging = callbacks.WeightAveraging()
    fit(tmp_path, debugger(qat_epochs=3), others=[averaging])
    # Of three epochs of six steps, without the twelve of FP32.
    assert int(averaging._average_model.n_averaged) == 18


def test_tuners_do_not_train_with_quantizers(tmp_path: Path) -> None:
    callbacks = importlib.import_module("pytorch_lightning.callbacks")
    callback, diary = debugger(), Diary()
    finder = callbacks.LearningRateFinder(num_training_steps=5, update_attr=False)
    running = fit(tmp_path, callback, others=[finder, diary.callback])
    assert diary.epochs == [0, 1, 2, 3]
    assert running.global_step == 24


def test_the_learning_rate_monitor_names_the_new_groups(tmp_path: Path) -> None:
    callbacks = importlib.import_module("pytorch_lightning.callbacks")
    loggers = importlib.import_module("pytorch_lightning.loggers")
    logger = loggers.CSVLogger(tmp_path, name="csv", version=0)
    monitor = callbacks.LearningRateMonitor()
    fit(tmp_path, debugger(), others=[monitor], logger=logger, log_every_n_steps=1)
    assert sorted(monitor.lrs) == ["lr-SGD/pg1", "lr-SGD/pg2"]


def test_the_score_of_each_epoch_is_logged(tmp_path: Path) -> None:
    loggers = importlib.import_module("pytorch_lightning.loggers")
    logger = loggers.CSVLogger(tmp_path, name="csv", version=0)
    callback = debugger()
    fit(tmp_path, callback, logger=logger, log_every_n_steps=1)
    lines = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    columns = lines[0].split(",")
    rows = [dict(zip(columns, line.split(","), strict=True)) for line in lines[1:]]
    logged = [float(row["quantdebug/qat/loss"]) for row in rows if row.get("quantdebug/qat/loss")]
    own = [float(row["loss"]) for row in rows if row.get("loss")]
    assert logged == pytest.approx(qat_step(callback).details["scores"], rel=1e-6)
    assert own[2:] == pytest.approx(logged, rel=1e-6)


def test_operations_of_the_step_itself_are_quantized_in_training_too(tmp_path: Path) -> None:
    class Step(lightning().LightningModule):  # type: ignore[misc] # as above
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 24), nn.Linear(24, 3)

        def outputs(self, x: Tensor) -> Tensor:
            return self.second(nn.functional.gelu(self.first(x)))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self.outputs(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("loss", nn.functional.cross_entropy(self.outputs(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.3)

    callback = debugger(qat_lr_factor=1.0)
    fit(tmp_path, callback, Step, max_epochs=4)
    step = qat_step(callback)
    names = list(callback.report.final.settings)
    assert "gelu" in names
    assert step.score < step.details["start_score"]
    assert step.details["notes"] == []
    assert step.details["learned_scales"] == len(names)
    calibrated = debugger(qat_epochs=0)
    fit(tmp_path / "calibrated", calibrated, Step, max_epochs=4)
    before = {name: setting.scale for name, setting in calibrated.report.final.settings.items()}
    assert all(callback.report.final.settings[name].scale != scale for name, scale in before.items())


def test_compiled_parts_are_trained_with_quantizers(tmp_path: Path) -> None:
    class Compiled(learner_class()):  # type: ignore[misc] # as above
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.compile(self.net, backend="eager")

    callback = debugger()
    fit(tmp_path, callback, Compiled)
    assert qat_step(callback).score < qat_step(callback).details["start_score"]


def test_distillation_draws_the_logits_to_those_of_fp32(tmp_path: Path) -> None:
    plain, distilled = debugger(qat_epochs=3), debugger(qat_epochs=3, qat_distillation=1.0)
    fit(tmp_path / "plain", plain)
    fit(tmp_path / "distilled", distilled)
    assert qat_step(distilled).details["notes"] == []
    assert qat_step(distilled).details["scores"] != qat_step(plain).details["scores"]
    assert qat_step(distilled).score < qat_step(distilled).details["start_score"]


def test_the_guilty_tensors_are_seen_after_training_too(tmp_path: Path) -> None:
    callback = debugger(tolerance=0.001)
    fit(tmp_path, callback)
    report = callback.report
    assert report is not None
    assert qat_step(callback).details["best_epoch"] > 0
    assert report.visuals.tensors
    for view in report.visuals.tensors:
        steps = [state.step for state in view.states]
        assert (steps[0], steps[-1]) == ("fp32_check", "qat")
        final = report.final.settings[view.quantizer]
        assert view.states[-1].bit_width == final.bit_width
        assert view.states[-1].scale == pytest.approx(final.scale)
        assert view.states[-1].scale != view.states[-2].scale

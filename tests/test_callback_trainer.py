"""The callback behind Trainers of every kind: namespaces, validate, limits, precisions, other callbacks, modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from pytorch_lightning import callbacks
from torch import Tensor, nn

from lightning_quantdebug import QuantDebug, diagnose
from lightning_quantdebug.errors import QuantDebugError
from lightning_quantdebug.report import Report, StepName, Verdict
from tests.callback_runs import debugger, random_states, weights
from tests.torture import NAMESPACES, lightning, loader, simple_class, torture_class, trainer

pytestmark = pytest.mark.filterwarnings("ignore")

WALKED = [StepName.FP32_CHECK, StepName.ACTIVATIONS, StepName.WEIGHTS, StepName.QUANTIZE_MODEL]


def walked(report: Report | None) -> Report:
    """The report, after a look at whether the walk came to its end."""
    assert report is not None
    assert report.verdict in (Verdict.ACCEPTED, Verdict.REPAIRED, Verdict.NOT_ACCEPTED), report.findings
    boxes = (StepName.FIX_WEIGHTS, StepName.FIX_ACTIVATIONS)
    assert [step.step for step in report.steps if step.score is not None and step.step not in boxes] == WALKED
    return report


def fit(root: Path, module: Any, callback: QuantDebug, *others: Any, **settings: Any) -> Any:
    running = trainer(root, callbacks=[callback, *others], **settings)
    running.fit(module, loader(), loader(31, 1))
    return running


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("as_list", [True, False])
def test_both_namespaces_take_the_callback_alone_and_in_a_list(tmp_path: Path, namespace: str, as_list: bool) -> None:
    callback = debugger(watch_every_n_epochs=1)
    running = trainer(tmp_path, namespace, callbacks=[callback] if as_list else callback)
    running.fit(simple_class(namespace)(), loader(), loader(31, 1))
    report = walked(callback.report)
    assert report.baseline is not None
    assert report.baseline.score == running.callback_metrics["accuracy"].item()
    assert report.baseline.samples == 31


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("inference_mode", [True, False])
def test_validate_without_fit(tmp_path: Path, namespace: str, inference_mode: bool) -> None:
    module = torture_class(namespace)()
    callback = debugger(calibration=loader(40, 7))
    plain = trainer(tmp_path, namespace, inference_mode=inference_mode)
    expected = plain.validate(torture_class(namespace)(), loader(31, 1), verbose=False)[0].keys()
    before = weights(module)
    running = trainer(tmp_path, namespace, callbacks=callback, inference_mode=inference_mode)
    logged = running.validate(module, loader(31, 1), verbose=False)[0]
    report = walked(callback.report)
    assert report.baseline is not None
    assert report.baseline.score == logged["accuracy"]
    assert logged.keys() == expected
    assert report.settings["calibration_samples"] == 40
    # The validation itself changes a buffer of this module, the parameters stay.
    module.seen_mean.zero_()
    fresh = torture_class(namespace)()
    fresh.load_state_dict(module.state_dict())
    assert weights(fresh) == weights(module) == before
    assert (module.epochs, len(module._private["batches"])) == (1, 4)
    # What was made inside may be used by autograd.
    fit_again = trainer(tmp_path / "again", namespace)
    fit_again.fit(module, loader(), loader(31, 1))


def test_validate_with_nothing_to_train_on_calibrates_on_validation_and_says_so(tmp_path: Path) -> None:
    class Untrainable(torture_class()):  # type: ignore[misc] # the base is made at run time
        train_dataloader = lightning().LightningModule.train_dataloader

    callback = debugger(calibration="train")
    running = trainer(tmp_path, callbacks=[callback])
    with pytest.warns(UserWarning, match="ranges were set on validation batches"):
        running.validate(Untrainable(), loader(31, 1), verbose=False)
    report = walked(callback.report)
    assert report.settings["calibration_samples"] == 31
    assert "given no training data" in Path(report.final.files["report.md"]).read_text(encoding="utf-8")


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("kind", ["datamodule", "loaders", "module"])
def test_diagnose_leaves_the_trainer_without_the_callback(tmp_path: Path, namespace: str, kind: str) -> None:
    class Data(lightning(namespace).LightningDataModule):  # type: ignore[misc] # the base is chosen at run time
        def train_dataloader(self) -> Any:
            return loader()

        def val_dataloader(self) -> Any:
            return loader(31, 1)

    class WithData(simple_class(namespace)):  # type: ignore[misc] # as above
        train_dataloader, val_dataloader = Data.train_dataloader, Data.val_dataloader

    running = trainer(tmp_path, namespace)
    module = WithData() if kind == "module" else simple_class(namespace)()
    data = {"datamodule": Data(), "loaders": loader(31, 1), "module": None}[kind]
    settings: dict[str, Any] = {"calibration": "val"} if kind == "loaders" else {}
    before = list(running.callbacks)
    report = diagnose(running, module, data, monitor="accuracy", mode="max", verbose=False, **settings)
    assert walked(report).baseline.samples == 31  # type: ignore[union-attr] # a walk that ended has one
    assert running.callbacks == before


def test_diagnose_takes_the_callback_out_after_an_error(tmp_path: Path) -> None:
    running = trainer(tmp_path)
    with pytest.raises(QuantDebugError, match=r"monitor='missing'. is not available as a scalar"):
        diagnose(running, simple_class()(), loader(31, 1), monitor="missing", calibration="val", verbose=False)
    assert not [callback for callback in running.callbacks if isinstance(callback, QuantDebug)]


def test_diagnose_without_validation_batches_says_so(tmp_path: Path) -> None:
    with pytest.raises(QuantDebugError, match=r"trainer.validate ended without a walk"):
        diagnose(trainer(tmp_path), simple_class()(), loader(0), monitor="loss", verbose=False)


def test_walk_of_the_second_validation_loader(tmp_path: Path) -> None:
    class TwoLoaders(simple_class()):  # type: ignore[misc] # the base is made at run time
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def on_validation_epoch_end(self) -> None:
            pass

    callback = debugger(monitor="loss/dataloader_idx_1", mode="min")
    running = trainer(tmp_path, callbacks=callback)
    running.fit(TwoLoaders(), loader(), [loader(31, 1), loader(20, 2)])
    report = walked(callback.report)
    assert report.baseline is not None
    assert report.baseline.score == running.callback_metrics["loss/dataloader_idx_1"].item()
    other = running.callback_metrics["loss/dataloader_idx_0"].item()
    assert report.baseline.score != other


@pytest.mark.parametrize(
    ("settings", "limits", "step_samples", "final_samples"),
    [
        ({}, {}, 31, 31),
        ({"limit_batches": 2}, {}, 16, 31),
        ({"limit_batches": 0.5}, {}, 16, 31),
        ({}, {"limit_val_batches": 3}, 24, 24),
        ({"limit_batches": 1}, {"limit_val_batches": 3}, 8, 24),
        ({}, {"fast_dev_run": True}, 8, 8),
        ({}, {"max_steps": 4, "max_epochs": -1}, 31, 31),
        ({}, {"max_steps": 2, "val_check_interval": 2, "max_epochs": -1}, 31, 31),
    ],
)
def test_limits(
    tmp_path: Path, settings: dict[str, Any], limits: dict[str, Any], step_samples: int, final_samples: int
) -> None:
    class Counting(simple_class()):  # type: ignore[misc] # the base is made at run time
        def on_validation_epoch_end(self) -> None:
            self.log("samples", 8.0 * len(self.losses))
            super().on_validation_epoch_end()

    callback = debugger(monitor="samples", target="w2a2", **settings)
    fit(tmp_path, Counting(), callback, **limits)
    report = walked(callback.report)
    scores = {step.step: step.score for step in report.steps if step.score is not None}
    up = 8 * -(-step_samples // 8), 8 * -(-final_samples // 8)
    assert [scores[step] for step in WALKED] == [up[0], up[0], up[0], up[1]]
    assert report.baseline is not None
    assert (report.baseline.score, report.baseline.samples) == (up[1], final_samples)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(tmp_path: Path, precision: str) -> None:
    torch.manual_seed(0)
    module = simple_class()()
    callback = debugger(monitor="loss", mode="min", target="w2a8_per_tensor")
    running = fit(tmp_path, module, callback, precision=precision)
    report = walked(callback.report)
    assert report.baseline is not None
    assert report.baseline.score == running.callback_metrics["loss"].item()
    step = report.step(StepName.WEIGHTS)
    assert step is not None
    assert abs(step.loss or 0.0) > 0.005
    kind = {"bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}[precision]
    assert {parameter.dtype for parameter in module.parameters()} == {kind}


def test_beside_weight_averaging_the_average_is_diagnosed(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"monitor": "loss", "mode": "min"}
    states = []
    for with_callback in (False, True):
        torch.manual_seed(0)
        module = simple_class()()
        callback = debugger(watch_every_n_epochs=1, **settings)
        averaging = callbacks.EMAWeightAveraging(decay=0.9)
        running = trainer(tmp_path, callbacks=[callback, averaging] if with_callback else [averaging], max_epochs=2)
        running.fit(module, loader(), loader(31, 1))
        states.append(weights(module))
    assert states[0] == states[1]
    report = walked(callback.report)
    assert report.baseline is not None
    assert report.baseline.score == running.callback_metrics["loss"].item()


@pytest.mark.parametrize("automatic", [True, False])
def test_a_module_without_forward_whose_step_calls_parts_and_functions(tmp_path: Path, automatic: bool) -> None:
    class Step(lightning().LightningModule):  # type: ignore[misc] # the base is chosen at run time
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = automatic
            self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 3)

        def outputs(self, x: Tensor) -> Tensor:
            hidden = nn.functional.gelu(self.first(x))
            return self.second(hidden + hidden.mean(0, keepdim=True))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
            loss = nn.functional.cross_entropy(self.outputs(batch[0]), batch[1])
            if automatic:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", nn.functional.cross_entropy(self.outputs(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    callback = debugger(monitor="val_loss", mode="min", target="w2a8_per_tensor")
    module = Step()
    fit(tmp_path, module, callback)
    report = walked(callback.report)
    assert {"first.weight", "second.weight", "gelu"} <= set(report.coverage.quantized)
    step = report.step(StepName.WEIGHTS)
    assert step is not None
    assert abs(step.loss or 0.0) > 0.005
    assert "forward" not in vars(module)


def test_metrics_and_criteria_are_not_quantized(tmp_path: Path) -> None:
    class Criterion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weigh = nn.Linear(3, 3)

        def forward(self, outputs: Tensor, classes: Tensor) -> Tensor:
            return nn.functional.cross_entropy(outputs * 1.5, classes)

    class Judged(simple_class()):  # type: ignore[misc] # the base is made at run time
        def __init__(self) -> None:
            super().__init__()
            self.criterion = Criterion()
            self.error = torchmetrics.MeanSquaredError()
            accuracy = torchmetrics.classification.MulticlassAccuracy(3)
            self.metrics = torchmetrics.MetricCollection(
                {"acc": accuracy, "f1": torchmetrics.F1Score("multiclass", num_classes=3)}, prefix="val_"
            )

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            outputs = self(batch[0])
            self.log("criterion", self.criterion(outputs, batch[1]))
            self.error(outputs.softmax(-1), nn.functional.one_hot(batch[1], 3).float())
            self.log("error", self.error)
            self.metrics(outputs, batch[1])
            self.log_dict(self.metrics)

        def on_validation_epoch_end(self) -> None:
            pass

    for monitor, mode in (("criterion", "min"), ("val_f1", "max"), ("error", "min")):
        callback = debugger(monitor=monitor, mode=mode)
        running = fit(tmp_path / monitor, Judged(), callback)
        report = walked(callback.report)
        assert report.baseline is not None
        assert report.baseline.score == running.callback_metrics[monitor].item()
        strays = [name for name in report.coverage.quantized if not name.startswith(("net", "input"))]
        assert strays == []


def test_idle_in_test_and_predict(tmp_path: Path) -> None:
    class Module(simple_class()):  # type: ignore[misc] # the base is made at run time
        test_step = predict_step = lambda self, batch, batch_idx: None

    callback = debugger(monitor="never logged")
    running = trainer(tmp_path, callbacks=callback)
    running.test(Module(), loader(), verbose=False)
    running.predict(Module(), loader())
    assert callback.report is None
    assert list(tmp_path.glob("quantdebug*")) == []


def test_only_the_named_module_is_quantized(tmp_path: Path) -> None:
    callback = debugger(module="net.3", exclude=["*.weight"])
    fit(tmp_path, simple_class()(), callback)
    report = walked(callback.report)
    assert all(name.startswith(("net.3", "input")) for name in report.coverage.quantized)
    assert "net.3.weight" not in report.coverage.quantized


def test_max_time_ends_the_walk_with_what_is_known(tmp_path: Path) -> None:
    class Slow(simple_class()):  # type: ignore[misc] # the base is made at run time
        pass

    callback = debugger(max_time={"milliseconds": 1})
    fit(tmp_path, Slow(), callback)
    report = callback.report
    assert report is not None
    assert report.verdict is Verdict.NOT_ACCEPTED
    assert [step.step for step in report.steps if step.score is not None] == [StepName.FP32_CHECK]
    step = report.step(StepName.QUANTIZE_MODEL)
    assert step is not None
    assert step.verdict.value == "not_run"
    assert step.advice.startswith("The time budget max_time=0:00:00.001000 was spent before this step")
    page = (tmp_path / "quantdebug" / "report.md").read_text()
    assert "loses more score" not in page
    assert "Raise `max_time`" in page.replace("\\", "")


def test_max_time_that_suffices_changes_nothing(tmp_path: Path) -> None:
    callback = debugger(max_time="00:01:00:00")
    fit(tmp_path, simple_class()(), callback)
    assert walked(callback.report).settings["max_time"] == 3600.0


MACHINERY: dict[str, Any] = {
    "weight averaging": lambda: ([callbacks.StochasticWeightAveraging(1e-2)], {}),
    "accumulation": lambda: ([callbacks.GradientAccumulationScheduler({0: 2})], {}),
    "pruning": lambda: ([callbacks.ModelPruning("l1_unstructured", amount=0.2)], {}),
    "reloading": lambda: ([], {"reload_dataloaders_every_n_epochs": 1, "val_check_interval": 0.5}),
    "seldom": lambda: ([], {"check_val_every_n_epoch": 2}),
    "accumulated": lambda: ([], {"accumulate_grad_batches": 4, "gradient_clip_val": 0.5, "profiler": "simple"}),
}


@pytest.mark.parametrize("name", MACHINERY)
def test_beside_other_machinery_the_weights_are_those_without(tmp_path: Path, name: str) -> None:
    states = []
    for with_callback in (False, True):
        others, settings = MACHINERY[name]()
        lightning().seed_everything(2, verbose=False)
        callback = debugger(watch_every_n_epochs=1)
        running = trainer(
            tmp_path, callbacks=[callback, *others] if with_callback else others, max_epochs=2, **settings
        )
        module = simple_class()()
        running.fit(module, loader(shuffle=True), loader(31, 1))
        states.append((weights(module), random_states(), repr(running.fit_loop.state_dict())))
    assert states[0] == states[1]
    walked(callback.report)


def test_persistent_workers(tmp_path: Path) -> None:
    callback = debugger(calibration_batches=2)
    settings: dict[str, Any] = {"num_workers": 1, "persistent_workers": True}
    running = trainer(tmp_path, callbacks=callback)
    running.fit(simple_class()(), loader(**settings), loader(31, 1, **settings))
    report = walked(callback.report)
    assert report.baseline is not None
    assert report.baseline.score == running.callback_metrics["accuracy"].item()


def test_compiled_parts_are_quantized_and_stay_compiled(tmp_path: Path) -> None:
    module = simple_class()()
    plain = module.net
    module.net = torch.compile(plain, backend="eager")
    callback = debugger(target="w2a8_per_tensor", monitor="loss", mode="min")
    fit(tmp_path, module, callback)
    report = walked(callback.report)
    assert {"net.0.weight", "net.3.weight"} <= set(report.coverage.quantized)
    step = report.step(StepName.WEIGHTS)
    assert step is not None
    assert abs(step.loss or 0.0) > 0.005
    assert module.net is not plain


def test_the_users_own_quantizers_are_bypassed_in_watch_and_walk_and_stay_on(tmp_path: Path) -> None:
    class Own(nn.Module):
        enabled, bit_width = True, 2

        def forward(self, x: Tensor) -> Tensor:
            if not self.enabled:
                return x
            step = 4.0 / (2**self.bit_width - 1)
            return x + ((x / step).round() * step - x).detach()

    class Quantized(simple_class()):  # type: ignore[misc] # the base is made at run time
        def __init__(self) -> None:
            super().__init__()
            self.net.append(Own())

    class Note(lightning().loggers.CSVLogger):  # type: ignore[misc] # as above
        watched: list[float] = []  # noqa: RUF012 - read once, below

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.watched.extend(value for name, value in metrics.items() if "watch" in name)

    torch.manual_seed(0)
    module = Quantized()
    callback = debugger(monitor="loss", mode="min", target="w16a16", watch_every_n_epochs=1)
    running = fit(tmp_path, module, callback, logger=Note(tmp_path))
    report = walked(callback.report)
    assert report.baseline is not None
    assert Note.watched == pytest.approx([report.baseline.score], rel=1e-3)
    assert abs(running.callback_metrics["loss"].item() - report.baseline.score) > 0.01
    assert module.net[4].enabled


def test_tuners_trials_are_not_walked(tmp_path: Path) -> None:
    from pytorch_lightning.tuner import Tuner

    class Tuned(simple_class()):  # type: ignore[misc] # the base is made at run time
        lr = 0.01

    callback = debugger(watch_every_n_epochs=1, when="fit_start")
    running = trainer(tmp_path, callbacks=callback)
    Tuner(running).lr_find(Tuned(), loader(), loader(31, 1), num_training=4)
    random_states()
    assert callback.report is None

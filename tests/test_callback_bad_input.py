"""Each wrong input gets a message that says what to do, before any long work, and neither run nor model is harmed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quantdebug import QuantDebug, diagnose
from lightning_quantdebug.errors import CaptureError, EvaluationError, QuantDebugError, ReportError, SettingsError
from lightning_quantdebug.report import Report, Verdict
from lightning_quantdebug.settings import REMEDIES
from tests.callback_runs import debugger, random_states, weights
from tests.torture import NAMESPACES, calling, lightning, loader, simple_class, trainer

pytestmark = pytest.mark.filterwarnings("ignore")


class Counted(simple_class()):  # type: ignore[misc] # the base is made at run time
    """Counts its training steps."""

    trained = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.trained += 1
        return super().training_step(batch, batch_idx)


def fit(
    root: Path, callback: Any, module: Any = None, train: Any = None, validation: Any = None, **settings: Any
) -> Any:
    """A seeded fit; the Trainer afterwards."""
    lightning().seed_everything(5, verbose=False)
    callbacks = [callback, *settings.pop("others", ())] if callback is not None else settings.pop("others", [])
    running = trainer(root, callbacks=callbacks, **settings)
    validation = {} if validation is False else {"val_dataloaders": validation or loader(31, 1)}
    running.fit(
        (module or Counted)() if module is None or isinstance(module, type) else module,
        train or loader(shuffle=True),
        **validation,
    )
    return running


def unharmed(root: Path, running: Any) -> None:
    """The fit ended as it does without the callback."""
    found = weights(running.lightning_module), random_states()
    modes = [part.training for part in running.lightning_module.modules()]
    plain = fit(root / "plain", None, type(running.lightning_module))
    assert (weights(plain.lightning_module), random_states()) == found
    assert [part.training for part in plain.lightning_module.modules()] == modes
    assert not [name for name in ("forward", "validation_step") if name in vars(running.lightning_module)]


def refused_before_training(
    root: Path, error: type[Exception], match: str, callback: QuantDebug, **settings: Any
) -> None:
    """The fit is refused before a step was trained, also where failures are to be warnings."""
    module = settings.pop("module", None) or Counted()
    before = weights(module)
    with pytest.raises(error, match=match):
        fit(root, callback, module, **settings)
    assert getattr(module, "trained", 0) == 0
    assert weights(module) == before
    assert callback.report is None


# What the constructor refuses.


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"mode": "maximum"}, r"`mode` must be one of \['min', 'max'\], got 'maximum'"),
        ({"tolerance": -0.1}, r"`tolerance` must be a finite number that is not negative, got -0.1"),
        ({"tolerance": "lots"}, r"`tolerance` must be a number in the metric's units.*'1%', got 'lots'"),
        ({"target": {"weights": {"bit_width": 1}}}, r"`bit_width` must be .*got 1"),
        ({"target": {"activations": {"bit_width": 33}}}, r"`bit_width` must be .*got 33"),
        ({"target": "int9000"}, r"`target` must be one of \[.*'int8'.*got 'int9000'"),
        ({"export": ["tflite"]}, r"`export` may hold \['onnx', 'encodings', 'pt2'\], got \['tflite'\]"),
        ({"remedies": ["cle", "prayer"]}, r"`remedies` may hold \['cle', 'per_channel', .*got \['prayer'\]"),
        ({"max_time": "soon"}, r"`max_time` must be a positive duration"),
        ({"monitor": ""}, r"`monitor` must be the name of a metric"),
        ({"when": "later"}, r"`when` must be one of"),
        ({"calibration": "test"}, r"`calibration` must be one of"),
        ({"watch_every_n_epochs": 0}, r"`watch_every_n_epochs` must be an integer of at least 1"),
        ({"limit_batches": 2.0}, r"`limit_batches` must be a number of batches"),
    ],
)
def test_the_constructor_refuses(settings: dict[str, Any], match: str) -> None:
    with pytest.raises(SettingsError, match=match):
        debugger(**settings)


def test_every_remedy_is_accepted_by_its_word() -> None:
    assert debugger(remedies=list(REMEDIES)).settings.remedies == REMEDIES
    assert {"cle", "bias_correction", "adaround", "per_channel", "bit_width"} <= set(REMEDIES)


# What is refused before training.


@pytest.mark.parametrize("on_error", ["warn", "raise"])
@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"limit_val_batches": 0}, EvaluationError, r"`Trainer\(limit_val_batches=0\)` turns validation off"),
        ({"validation": False}, EvaluationError, "There is no validation DataLoader. Define `val_dataloader`"),
    ],
)
def test_a_trainer_without_validation(
    tmp_path: Path, settings: dict[str, Any], error: type[Exception], match: str, on_error: str
) -> None:
    refused_before_training(tmp_path, error, match, debugger(on_error=on_error), **settings)


def test_validate_with_limit_val_batches_0_is_refused_too(tmp_path: Path) -> None:
    running = trainer(tmp_path, callbacks=debugger(on_error="warn"), limit_val_batches=0)
    with pytest.raises(EvaluationError, match=r"`Trainer\(limit_val_batches=0\)` turns validation off"):
        running.validate(simple_class()(), loader(), verbose=False)


def test_an_idle_callback_refuses_nothing(tmp_path: Path) -> None:
    fit(tmp_path, debugger(when="never", module="no such", dirpath="/dev/null/x"), limit_val_batches=0)


def test_a_module_without_validation_step(tmp_path: Path) -> None:
    class Blind(lightning().LightningModule):  # type: ignore[misc] # the base is chosen at run time
        training_step, configure_optimizers = Counted.training_step, Counted.configure_optimizers

    match = "`Blind` has no `validation_step`, which is what gives the score `accuracy`"
    refused_before_training(tmp_path, EvaluationError, match, debugger(), module=Blind())


@pytest.mark.parametrize("in_validate", [False, True])
def test_an_unknown_module(tmp_path: Path, in_validate: bool) -> None:
    callback = debugger(module="net.9", on_error="warn")
    match = r"`module` must name a sub-module of \w+, got 'net.9'; it has \['net', 'accuracy'\]"
    if not in_validate:
        refused_before_training(tmp_path, SettingsError, match, callback)
        return
    with pytest.raises(SettingsError, match=match):
        trainer(tmp_path, callbacks=callback).validate(simple_class()(), loader(), verbose=False)
    assert callback.report is None


@pytest.mark.parametrize("in_validate", [False, True])
def test_a_directory_that_can_not_be_written(tmp_path: Path, in_validate: bool) -> None:
    (tmp_path / "file").write_text("here")
    directory = tmp_path / "file" / "below"
    callback = debugger(dirpath=directory, on_error="warn")
    match = f"Can not write to '{directory}': .*Give `dirpath` a writable directory"
    if not in_validate:
        refused_before_training(tmp_path, ReportError, match, callback)
        return
    with pytest.raises(ReportError, match=match):
        trainer(tmp_path, callbacks=callback).validate(simple_class()(), loader(), verbose=False)
    assert (tmp_path / "file").read_text() == "here"


def test_a_probe_for_writing_leaves_nothing(tmp_path: Path) -> None:
    fit(tmp_path, debugger(when="never", watch_every_n_epochs=9))
    assert [path.name for path in tmp_path.iterdir()] == ["quantdebug"]
    assert list((tmp_path / "quantdebug").iterdir()) == []


def test_restore_best_without_a_checkpoint_callback(tmp_path: Path) -> None:
    match = "`restore_best=True` needs a ModelCheckpoint among the callbacks, there is none"
    refused_before_training(tmp_path, SettingsError, match, debugger(restore_best=True))


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_a_sharded_strategy(tmp_path: Path, namespace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = debugger(on_error="warn")
    running = trainer(tmp_path, namespace, callbacks=callback)
    refused = lightning(f"{namespace}.strategies").FSDPStrategy
    # Lightning itself can not make one without a GPU.
    stand_in = type("Mine", (refused,), {"__init__": lambda self: None, "precision_plugin": None})()
    monkeypatch.setattr(running._accelerator_connector, "strategy", stand_in)
    with pytest.raises(EvaluationError, match=r"`Trainer\(strategy=...\)` uses FSDPStrategy, which is not supported"):
        callback.setup(running, simple_class(namespace)(), "fit")


# What warns early.


def test_the_sanity_check_warns_of_a_monitor_that_is_not_logged(tmp_path: Path) -> None:
    match = (
        r"QuantDebug\(monitor='acc'\): the sanity check of validation did not log this metric. "
        r"It logged \['accuracy', 'loss', 'mean_loss'\]"
    )
    with pytest.warns(UserWarning, match=match) as caught:
        fit(tmp_path, debugger(monitor="acc", on_error="warn"), num_sanity_val_steps=1)
    warned = [index for index, warning in enumerate(caught) if "sanity check" in str(warning.message)]
    failed = [index for index, warning in enumerate(caught) if "is not available as a scalar" in str(warning.message)]
    assert len(warned) == len(failed) == 1
    assert warned < failed


def test_no_early_warning_for_a_monitor_that_is_logged(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    fit(tmp_path, debugger(when="never"), num_sanity_val_steps=1)
    assert not [warning for warning in recwarn if "QuantDebug" in str(warning.message)]


@pytest.mark.parametrize("wanted", ["onnx", "encodings"])
def test_a_missing_extra_is_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if name == "onnxruntime" else found(name, *a))
    started: list[int] = []
    text = rf"`export=\['{wanted}'\]` needs .*onnxruntime.*: pip install 'lightning-quantdebug\[onnx\]'"
    with pytest.raises(SettingsError, match=text):
        fit(tmp_path, debugger(export=[wanted, "pt2"]), others=[calling(on_train_start=lambda *_: started.append(1))])
    assert not started


# What the walk finds out: a warning by default, an error on demand; the fit has succeeded in both cases.


def failing_walks() -> Iterator[Any]:
    class NothingToQuantize(Counted):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Dropout(0.0))
            self.unused = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :3]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.trained += 1
            return self.unused**2

    class Fails(Counted):
        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            # The walk comes after training, and its passes stand in for the step.
            if self.trained == 6 and "validation_step" in vars(self):
                raise ZeroDivisionError("mine")
            return super().validation_step(batch, batch_idx)

    listed = (
        r"monitor='acc'. is not available as a scalar after validation. Use any of the following: `accuracy`, `loss`"
    )
    yield pytest.param(Counted, {"monitor": "acc"}, EvaluationError, listed, id="monitor")
    yield pytest.param(NothingToQuantize, {}, CaptureError, "Nothing in NothingToQuantize can be quantized", id="empty")
    yield pytest.param(Counted, {"exclude": ["*"]}, CaptureError, "Nothing in Counted can be quantized", id="excluded")
    yield pytest.param(Fails, {}, ZeroDivisionError, "mine", id="step")


@pytest.mark.parametrize(("kind", "settings", "error", "match"), list(failing_walks()))
def test_a_failing_walk_warns_or_raises_and_harms_nothing(
    tmp_path: Path, kind: Any, settings: dict[str, Any], error: type[Exception], match: str
) -> None:
    with pytest.raises(error, match=match):
        fit(tmp_path / "raise", debugger(on_error="raise", **settings), kind)
    callback = debugger(on_error="warn", **settings)
    with pytest.warns(
        UserWarning, match=rf"QuantDebug failed, your run and your model are unharmed: {error.__name__}: .*{match}"
    ):
        running = fit(tmp_path / "warn", callback, kind)
    for name, report in (("raise", None), ("warn", callback.report)):
        written = Report.from_json(tmp_path / name / "quantdebug" / "report.json")
        assert written.verdict is Verdict.FAILED
        assert written.error is not None
        assert written.error.startswith("Traceback")
        assert error.__name__ in written.error
        assert report is None or report.to_dict() == written.to_dict()
        assert (tmp_path / name / "quantdebug" / "report.md").exists()
    unharmed(tmp_path, running)


def test_a_failing_watch_warns_each_time_and_harms_nothing(tmp_path: Path) -> None:
    callback = debugger(on_error="warn", when="never", watch_every_n_epochs=1, monitor="acc")
    with pytest.warns(UserWarning, match="QuantDebug failed, your run and your model are unharmed"):
        running = fit(tmp_path, callback)
    assert running.lightning_module.trained == 6
    unharmed(tmp_path, running)
    with pytest.raises(EvaluationError, match="monitor='acc'"):
        fit(tmp_path, debugger(when="never", watch_every_n_epochs=1, monitor="acc"))


def test_restore_best_without_a_saved_checkpoint(tmp_path: Path) -> None:
    from pytorch_lightning.callbacks import ModelCheckpoint

    keep = ModelCheckpoint(monitor="accuracy", save_top_k=0)
    with pytest.raises(EvaluationError, match="ModelCheckpoint has saved no checkpoint yet"):
        fit(tmp_path, debugger(restore_best=True), others=[keep], enable_checkpointing=True)
    assert Report.from_json(tmp_path / "quantdebug" / "report.json").verdict is Verdict.FAILED


@pytest.mark.parametrize("content", [None, b"no checkpoint"])
def test_restore_best_with_a_checkpoint_that_can_not_be_read(tmp_path: Path, content: bytes | None) -> None:
    from pytorch_lightning.callbacks import ModelCheckpoint

    keep = ModelCheckpoint(monitor="accuracy")

    def spoil(running: Any, pl_module: Any) -> None:
        path = Path(keep.best_model_path)
        path.unlink() if content is None else path.write_bytes(content)

    callback = debugger(restore_best=True)
    with pytest.raises(EvaluationError, match=r"`restore_best=True`, but the best checkpoint '.*ckpt' can not be read"):
        fit(tmp_path, callback, others=[keep, calling(on_train_end=spoil)], enable_checkpointing=True)


def test_training_batches_that_the_validation_step_can_not_take(tmp_path: Path) -> None:
    class Pairs(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 16

        def __getitem__(self, index: int) -> Any:
            return dict(zip("xy", loader(16).dataset[index], strict=True))

    class Other(Counted):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return super().training_step((batch["x"], batch["y"]), batch_idx)

    train = torch.utils.data.DataLoader(Pairs(), batch_size=4)
    match = r"`validation_step` failed on a calibration batch: KeyError: .*pass calibration='val' or a DataLoader"
    with pytest.raises(EvaluationError, match=match):
        fit(tmp_path, debugger(), Other(), train)
    callback = debugger(calibration="val")
    fit(tmp_path, callback, Other(), train)
    assert callback.report is not None
    assert callback.report.verdict in (Verdict.ACCEPTED, Verdict.REPAIRED, Verdict.NOT_ACCEPTED)


@pytest.mark.parametrize(
    ("monitor", "mode", "warned"),
    [("accuracy", "min", True), ("accuracy", "max", False), ("loss", "max", False)],
)
def test_a_mode_that_contradicts_the_metric(
    tmp_path: Path, monitor: str, mode: str, warned: bool, recwarn: pytest.WarningsRecorder
) -> None:
    callback = debugger(monitor=monitor, mode=mode)
    fit(tmp_path, callback, max_epochs=3)
    messages = [str(warning.message) for warning in recwarn if "contradicts" in str(warning.message)]
    expected = (
        "QuantDebug: mode='min' contradicts the metric behind 'accuracy', whose `higher_is_better` is True: "
        "pass mode='max', or losses count as gains."
    )
    assert messages == ([expected] if warned else [])
    assert ("contradicts the metric" in (tmp_path / "quantdebug" / "report.md").read_text()) is warned


@pytest.mark.parametrize("trained", [True, False])
def test_a_score_at_chance(tmp_path: Path, trained: bool, recwarn: pytest.WarningsRecorder) -> None:
    torch.manual_seed(0)
    module = simple_class()()
    with torch.no_grad():
        module.net[3].weight.zero_()
        module.net[3].bias.zero_()
    callback = debugger(monitor="loss", mode="min")
    running = trainer(
        tmp_path, callbacks=callback, max_epochs=20 if trained else 1, limit_train_batches=None if trained else 0
    )
    if trained:
        running.fit(module, loader(), loader(31, 1))
    else:
        diagnose(trainer(tmp_path), module, loader(31, 1), monitor="loss", calibration="val", verbose=False)
    messages = [str(warning.message) for warning in recwarn if "by guessing" in str(warning.message)]
    assert bool(messages) is not trained
    if not trained:
        assert "The FP32 score loss = 1.099 is about what guessing gives (ln(3) = 1.1 by guessing)" in messages[0]
        assert "was the model trained, and were its weights loaded?" in messages[0]


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_inside_the_walk_gives_the_model_back_and_is_reported(tmp_path: Path, kind: Any) -> None:
    class Interrupted(Counted):
        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            # Not an attribute of the module's: a pass would set it back.
            left[0] -= 1
            if left[0] == 0:
                raise kind
            return super().validation_step(batch, batch_idx)

    for steps in (2, 20, 40):
        left = [0]
        module = Interrupted()
        states: list[Any] = []

        def arm(
            running: Any, pl_module: Any, left: list[int] = left, steps: int = steps, states: list[Any] = states
        ) -> None:
            states.append((weights(pl_module), random_states(), [part.training for part in pl_module.modules()]))
            left[0] = steps

        callback = debugger(on_error="warn")
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            fit(tmp_path, callback, module, others=[calling(on_train_end=arm)])
        after = (weights(module), random_states(), [part.training for part in module.modules()])
        assert after == states[0]
        assert "validation_step" not in vars(module)
        assert not module._forward_hooks
        report = Report.from_json(tmp_path / "quantdebug" / "report.json")
        assert report.verdict is Verdict.FAILED
        assert report.error is not None
        assert kind.__name__ in report.error


def test_errors_are_all_of_one_family() -> None:
    assert all(
        issubclass(error, QuantDebugError) for error in (SettingsError, EvaluationError, CaptureError, ReportError)
    )

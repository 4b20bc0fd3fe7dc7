"""Checkpoints of fits with QAT epochs: loaded with and without the callback, and resumed from each of them."""

from __future__ import annotations

import copy
import importlib
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quantdebug import QuantDebug
from lightning_quantdebug.errors import SettingsError
from lightning_quantdebug.report import StepVerdict, Verdict
from tests.qat_runs import debugger, equal, fit, learner_class, loader, model_checkpoint, qat_step, tensors
from tests.torture import lightning, trainer

SAFE = (float, int, str, bool, type(None), Tensor, torch.dtype)


def run(root: Path, callback: QuantDebug, **settings: Any) -> tuple[Any, Any]:
    """A fit whose every epoch is saved: the Trainer, and its ModelCheckpoint."""
    saving = model_checkpoint(root, save_last=True)
    return fit(root, callback, others=[saving], **settings), saving


def saved(root: Path) -> dict[int, str]:
    """Checkpoint of each epoch."""
    return {int(path.stem.split("=")[1]): str(path) for path in (root / "saved").glob("epoch=*.ckpt")}


def score(module: Any, callback: QuantDebug | None, ckpt_path: str | None = None, tmp: Any = "/tmp") -> float:
    """What a Trainer of its own validates."""
    callbacks = [] if callback is None else [callback]
    running = trainer(tmp, callbacks=callbacks)
    (metrics,) = running.validate(module, loader(512, 1), ckpt_path=ckpt_path, verbose=False)
    return float(metrics["loss"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A fit of two FP32 and three QAT epochs with all its checkpoints."""
    root = tmp_path_factory.mktemp("whole")
    callback = debugger(qat_epochs=3, qat_lr_factor=0.5)
    running, saving = run(root, callback)
    return root, callback, running, saving


def test_the_keys_of_every_checkpoint_are_those_of_the_float_model(whole: Any) -> None:
    root, _, _, _ = whole
    names = list(learner_class()().state_dict())
    assert sorted(saved(root)) == [0, 1, 2, 3, 4]
    for path in saved(root).values():
        assert list(torch.load(path, weights_only=True)["state_dict"]) == names
        learner_class().load_from_checkpoint(path, strict=True, weights_only=True)


def test_only_checkpoints_of_qat_hold_quantizers(whole: Any) -> None:
    root, callback, _, _ = whole
    for epoch, path in saved(root).items():
        state = torch.load(path, weights_only=True)["callbacks"].get(callback.state_key)
        assert bool(state) is (epoch >= 2)


def plain_types(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, (str, int)) and plain_types(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(plain_types, value))
    return type(value) in SAFE


def test_the_state_is_of_types_that_can_be_loaded_safely(whole: Any) -> None:
    _, callback, _, _ = whole
    assert plain_types(callback.state_dict())
    assert callback.state_dict()


def test_the_same_process_validates_the_best_checkpoint_quantized(whole: Any) -> None:
    _, callback, running, saving = whole
    step = qat_step(callback)
    report = callback.report
    (metrics,) = running.validate(ckpt_path="best", dataloaders=loader(512, 1), verbose=False)
    assert float(metrics["loss"]) == pytest.approx(step.score, rel=1e-6)
    assert saving.best_model_path == saved(whole[0])[1 + step.details["best_epoch"]]
    # What was trained is evaluated, not walked through anew.
    assert callback.report is report
    assert not {"validation_step", "training_step"} & set(vars(running.lightning_module))


def test_another_process_validates_tests_and_predicts_quantized(whole: Any, tmp_path: Path) -> None:
    root, callback, _, _ = whole
    for number, path in saved(root).items():
        if number < 2:
            continue
        expected = qat_step(callback).details["scores"][number - 2]
        fresh = debugger(qat_epochs=3, qat_lr_factor=0.5)
        assert score(learner_class()(), fresh, path) == pytest.approx(expected, rel=1e-6)
    path, expected = saved(root)[4], qat_step(callback).details["scores"][2]
    running = trainer(tmp_path, callbacks=[debugger()])
    (metrics,) = running.test(learner_class()(), loader(512, 1), ckpt_path=path, verbose=False)
    assert float(metrics["test_loss"]) == pytest.approx(expected, rel=1e-6)
    logits = torch.cat(running.predict(learner_class()(), loader(512, 1), ckpt_path=path))
    classes = torch.cat([batch[1] for batch in loader(512, 1)])
    assert float(nn.functional.cross_entropy(logits, classes)) == pytest.approx(expected, rel=1e-5)


def test_without_the_callback_the_float_weights_are_validated(whole: Any, tmp_path: Path) -> None:
    root, callback, _, _ = whole
    module = learner_class().load_from_checkpoint(saved(root)[4], weights_only=True)
    path = saved(root)[4]
    plain = score(learner_class()(), None, path)
    module.eval()
    with torch.no_grad():
        losses = [float(nn.functional.cross_entropy(module(x), y)) for x, y in loader(512, 1)]
    assert plain == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert plain != pytest.approx(qat_step(callback).details["scores"][2], rel=1e-3)


def test_a_checkpoint_of_fp32_is_walked_as_fp32_by_a_callback_that_has_trained(whole: Any, tmp_path: Path) -> None:
    root, callback, _, _ = whole
    copied = debugger(qat_epochs=3, qat_lr_factor=0.5, calibration="val")
    copied._training.load(callback.state_dict())
    running = trainer(tmp_path, callbacks=[copied])
    running.validate(learner_class()(), loader(512, 1), ckpt_path=saved(root)[1], verbose=False)
    assert qat_step(copied).verdict is StepVerdict.NOT_RUN
    assert copied.report.baseline.score == pytest.approx(callback.report.baseline.score, rel=1e-6)


def test_weights_alone_load_as_float_weights(tmp_path: Path) -> None:
    callback = debugger()
    saving = model_checkpoint(tmp_path, save_weights_only=True)
    fit(tmp_path, callback, others=[saving])
    module = learner_class().load_from_checkpoint(saved(tmp_path)[3], strict=True, weights_only=True)
    assert "callbacks" not in torch.load(saved(tmp_path)[3], weights_only=True)
    assert isinstance(module, nn.Module)


@pytest.mark.parametrize("epoch", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("where", ["validation", "epoch end"])
def test_a_resumed_fit_ends_like_an_uninterrupted_one(tmp_path: Path, epoch: int, where: str) -> None:
    extra = {"save_on_train_epoch_end": where == "epoch end"}
    one, other = (debugger(qat_epochs=3, qat_lr_factor=0.5) for _ in range(2))
    first = fit(tmp_path / "first", one, others=[model_checkpoint(tmp_path / "first", **extra)])
    second = fit(
        tmp_path / "second",
        other,
        others=[model_checkpoint(tmp_path / "second", **extra)],
        ckpt_path=saved(tmp_path / "first")[epoch],
    )
    assert equal(tensors(first.lightning_module), tensors(second.lightning_module))
    assert (first.current_epoch, first.global_step) == (second.current_epoch, second.global_step)
    assert qat_step(one).details["scores"] == qat_step(other).details["scores"]
    assert (qat_step(one).score, qat_step(one).interval) == (qat_step(other).score, qat_step(other).interval)
    assert one.report.final.settings == other.report.final.settings
    assert one.report.verdict is other.report.verdict
    assert one.fp32_best_model_path.endswith(Path(other.fp32_best_model_path).name)


def test_the_schedule_and_momenta_go_on_where_they_were(tmp_path: Path) -> None:
    rates: dict[str, list[list[float]]] = {"first": [], "second": []}

    def noting(name: str) -> Any:
        base = lightning().Callback

        class Noting(base):  # type: ignore[misc, valid-type] # the base is chosen at run time
            def on_train_batch_start(self, running: Any, *_: Any) -> None:
                rates[name].append([group["lr"] for group in running.optimizers[0].param_groups])

        return Noting()

    saving = model_checkpoint(tmp_path / "first")
    fit(tmp_path / "first", debugger(qat_epochs=3), others=[saving, noting("first")])
    fit(tmp_path / "second", debugger(qat_epochs=3), others=[noting("second")], ckpt_path=saved(tmp_path / "first")[3])
    assert rates["first"][-6:] == rates["second"]
    own = [group[0] for group in rates["first"]]
    assert own[:12] == [0.2] * 12
    assert own[12] == pytest.approx(0.02)
    assert own[13:] == sorted(own[13:], reverse=True)
    assert own[12 + 9] == pytest.approx(0.01)
    # The scales have a group and a rate of their own.
    assert [len(group) for group in rates["first"]] == [1] * 12 + [2] * 18


def test_resumed_where_the_best_state_is_gone_it_says_so(tmp_path: Path) -> None:
    saving = model_checkpoint(tmp_path / "first", save_on_train_epoch_end=False)
    fit(tmp_path / "first", debugger(qat_epochs=3), others=[saving])
    for name in ("qat_best.ckpt", "qat_start.ckpt"):
        (tmp_path / "first" / "quantdebug" / name).unlink()
    callback = debugger(qat_epochs=3)
    fit(tmp_path / "second", callback, ckpt_path=saved(tmp_path / "first")[3])
    assert any("is gone" in note for note in qat_step(callback).details["notes"])
    assert callback.report.verdict in (Verdict.NOT_ACCEPTED, Verdict.REPAIRED_BY_QAT)


def test_an_epoch_behind_the_checkpoint_is_not_what_a_resumed_fit_ends_with(tmp_path: Path) -> None:
    class Harmed(learner_class()):  # type: ignore[misc] # the base is chosen at run time
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return -5 * super().training_step(batch, batch_idx)

    first = debugger(qat_epochs=3, qat_lr_factor=0.5)
    fit(tmp_path / "first", first, others=[model_checkpoint(tmp_path / "first")])
    assert qat_step(first).details["best_epoch"] == 3
    assert qat_step(first).details["scores"][1] < qat_step(first).details["start_score"]
    callback = debugger(qat_epochs=3, qat_lr_factor=0.5)
    running = fit(tmp_path / "second", callback, Harmed, ckpt_path=saved(tmp_path / "first")[3])
    step = qat_step(callback)
    assert step.details["best_epoch"] == 2
    expected = torch.load(saved(tmp_path / "first")[3], weights_only=True)["state_dict"]
    found = running.lightning_module.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert step.score == pytest.approx(step.details["scores"][1], rel=1e-6)


def test_a_checkpoint_of_qat_is_not_resumed_without_it(whole: Any, tmp_path: Path) -> None:
    path = saved(whole[0])[3]
    with pytest.raises(SettingsError, match=r"written while QAT ran.*qat_epochs.*fp32.ckpt"):
        fit(tmp_path, debugger(qat_epochs=0), ckpt_path=path)


def test_a_finished_fit_is_resumed_to_its_end_at_once(whole: Any, tmp_path: Path) -> None:
    root, callback, running, _ = whole
    final = tmp_path / "final.ckpt"
    module = learner_class()()
    fresh = debugger(qat_epochs=3, qat_lr_factor=0.5)
    torch.save({**torch.load(saved(root)[4], weights_only=True)}, final)
    contents = torch.load(final, weights_only=True)
    contents["callbacks"][callback.state_key] = callback.state_dict()
    torch.save(contents, final)
    again = fit(tmp_path, fresh, module, ckpt_path=str(final))
    assert again.current_epoch == running.current_epoch
    assert fresh.report.verdict is callback.report.verdict


def test_module_and_callback_can_be_copied_and_pickled_after_a_fit(whole: Any) -> None:
    _, _, running, _ = whole
    module = running.lightning_module
    module.trainer = None
    twin = copy.deepcopy(module)
    assert equal(tensors(twin), tensors(module))
    assert equal(tensors(pickle.loads(pickle.dumps(module.net))), tensors(module.net))
    module.trainer = running


def test_distillation_is_resumed_with_the_teacher_of_before(tmp_path: Path) -> None:
    one, other = (debugger(qat_epochs=3, qat_distillation=1.0) for _ in range(2))
    first = fit(tmp_path / "first", one, others=[model_checkpoint(tmp_path / "first")])
    second = fit(tmp_path / "second", other, ckpt_path=saved(tmp_path / "first")[3])
    assert equal(tensors(first.lightning_module), tensors(second.lightning_module))


def test_averages_are_resumed(tmp_path: Path) -> None:
    callbacks = importlib.import_module("pytorch_lightning.callbacks")
    one, other = (debugger(qat_epochs=3) for _ in range(2))
    averaging = [callbacks.EMAWeightAveraging(decay=0.5) for _ in range(2)]
    first = fit(tmp_path / "first", one, others=[averaging[0], model_checkpoint(tmp_path / "first")])
    second = fit(tmp_path / "second", other, others=[averaging[1]], ckpt_path=saved(tmp_path / "first")[3])
    assert qat_step(one).details["scores"] == pytest.approx(qat_step(other).details["scores"], rel=1e-6)
    assert equal(tensors(first.lightning_module), tensors(second.lightning_module))

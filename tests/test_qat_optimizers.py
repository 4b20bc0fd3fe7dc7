"""Optimizers and schedules of QAT epochs, and the module's that can not be trained, told before training starts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from lightning_quantdebug import QuantDebug
from lightning_quantdebug.adjustment import Adjustment
from lightning_quantdebug.errors import SettingsError
from lightning_quantdebug.report import StepVerdict
from tests.qat_runs import debugger, fit, learner_class, qat_step, tensors
from tests.torture import lightning

STEPS = 6


def noting(rates: list[list[float]]) -> Any:
    class Noting(lightning().Callback):  # type: ignore[misc] # the base is chosen at run time
        def on_train_batch_start(self, running: Any, *_: Any) -> None:
            rates.append([group["lr"] for item in running.optimizers for group in item.param_groups])

    return Noting()


def with_schedule(make: Any) -> Any:
    class Scheduled(learner_class()):  # type: ignore[misc] # as above
        asked: list[tuple[int, float]] = []  # noqa: RUF012 - what every instance was asked

        def configure_optimizers(self) -> Any:
            self.asked.append((self.trainer.max_epochs, self.trainer.estimated_stepping_batches))
            optimizer = torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9)
            return make(optimizer, self.trainer)

    Scheduled.asked = []
    return Scheduled


SCHEDULES: dict[str, Any] = {
    "none": lambda optimizer, _: optimizer,
    "step": lambda optimizer, _: ([optimizer], [lr_scheduler.StepLR(optimizer, 1, 0.1)]),
    "cosine": lambda optimizer, running: ([optimizer], [lr_scheduler.CosineAnnealingLR(optimizer, running.max_epochs)]),
    "onecycle": lambda optimizer, running: {
        "optimizer": optimizer,
        "lr_scheduler": {
            "scheduler": lr_scheduler.OneCycleLR(optimizer, 0.2, total_steps=running.estimated_stepping_batches),
            "interval": "step",
        },
    },
    "plateau": lambda optimizer, _: {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": lr_scheduler.ReduceLROnPlateau(optimizer), "monitor": "loss"},
    },
    "warm-up": lambda optimizer, _: {
        "optimizer": optimizer,
        "lr_scheduler": {
            "scheduler": lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 10)),
            "interval": "step",
        },
    },
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_starts_at_its_share_and_falls_to_nothing(tmp_path: Path, name: str) -> None:
    rates: list[list[float]] = []
    module = with_schedule(SCHEDULES[name])
    callback = debugger(qat_lr_factor=0.25)
    fit(tmp_path, callback, module, others=[noting(rates)])
    trained = rates[2 * STEPS :]
    cosine = [0.05 * 0.5 * (1 + math.cos(math.pi * step / (2 * STEPS))) for step in range(2 * STEPS)]
    assert [group[0] for group in trained] == pytest.approx(cosine)
    assert [group[1] for group in trained] == pytest.approx(cosine)
    assert qat_step(callback).details["learning_rate"] == pytest.approx(0.05)
    # The first was Lightning's, the second found out whether a third is possible, which was told of QAT's length.
    assert module.asked[0] == (2, 2 * STEPS)
    assert module.asked[-1] == (2, 2 * STEPS)
    assert len(module.asked) == 3


def test_the_users_schedule_is_told_of_the_length_of_qat(tmp_path: Path) -> None:
    module = with_schedule(SCHEDULES["cosine"])
    fit(tmp_path, debugger(qat_epochs=3), module)
    assert [asked[0] for asked in module.asked] == [2, 2, 3]
    assert module.asked[-1] == (3, 3 * STEPS)


def test_groups_keep_their_proportions_and_scales_have_their_own_without_decay(tmp_path: Path) -> None:
    groups: list[Any] = []

    class Grouped(learner_class()):  # type: ignore[misc] # as above
        def configure_optimizers(self) -> Any:
            first, second = list(self.net[:3].parameters()), list(self.net[3:].parameters())
            return torch.optim.AdamW(
                [{"params": first, "lr": 0.01}, {"params": second, "lr": 0.02, "weight_decay": 0.3}], weight_decay=0.1
            )

    class Looking(lightning().Callback):  # type: ignore[misc] # as above
        def on_train_epoch_start(self, running: Any, module: Any) -> None:
            groups.append([dict(group) for group in running.optimizers[0].param_groups])

    callback = debugger(qat_lr_factor=0.5, qat_epochs=1)
    fit(tmp_path, callback, Grouped, others=[Looking()])
    first, second, scales = groups[2]
    assert [group["lr"] for group in (first, second, scales)] == pytest.approx([0.005, 0.01, 0.01])
    assert [group["weight_decay"] for group in (first, second, scales)] == [0.1, 0.3, 0.0]
    learned = qat_step(callback).details["learned_scales"]
    assert len(scales["params"]) == learned == len(callback.report.final.settings)
    assert all(parameter.dtype == torch.float32 for parameter in scales["params"])


class Manual(learner_class()):  # type: ignore[misc] # as above
    """Two optimizers and a schedule that the module steps itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        first.zero_grad()
        second.zero_grad()
        self.manual_backward(loss)
        first.step()
        second.step()
        if self.trainer.is_last_batch:
            self.lr_schedulers().step()

    def configure_optimizers(self) -> Any:
        first = torch.optim.SGD(self.net[:2].parameters(), lr=0.2)
        second = torch.optim.SGD(self.net[2:].parameters(), lr=0.2, momentum=0.9)
        return [first, second], [lr_scheduler.StepLR(second, 1, 0.5)]


def test_manual_optimization_with_two_optimizers(tmp_path: Path) -> None:
    rates: list[list[float]] = []
    callback = debugger(qat_lr_factor=0.5, qat_epochs=3, qat_early_stop=False)
    running = fit(tmp_path, callback, Manual, others=[noting(rates)])
    step = qat_step(callback)
    assert step.score < step.details["start_score"]
    assert len(step.details["scores"]) == 3
    assert running.global_step == 2 * 5 * STEPS
    starts = rates[::STEPS][:5]
    assert starts[0] == pytest.approx([0.2, 0.2])
    assert starts[1] == pytest.approx([0.2, 0.1])
    # The module's own schedule, built anew; the scales are trained beside most of the quantized weights.
    assert [rate for start in starts[2:] for rate in start] == pytest.approx(
        [0.1, 0.1, 0.1, 0.1, 0.05, 0.05, 0.1, 0.025, 0.025]
    )


def test_scales_move_and_stay_put_if_they_shall(tmp_path: Path) -> None:
    learned, fixed = debugger(), debugger(qat_learn_scales=False)
    for name, callback in (("learned", learned), ("fixed", fixed)):
        fit(tmp_path / name, callback)
    before = {name: setting.scale for name, setting in _calibrated(tmp_path).items()}
    after = [{name: s.scale for name, s in callback.report.final.settings.items()} for callback in (learned, fixed)]
    assert all(after[0][name] != scale for name, scale in before.items())
    assert after[1]["input"] == before["input"]
    assert qat_step(fixed).details["learned_scales"] == 0
    assert qat_step(fixed).score < qat_step(fixed).details["start_score"]


def _calibrated(root: Path) -> Any:
    callback = debugger(qat_epochs=0)
    fit(root / "calibrated", callback)
    return callback.report.final.settings


@pytest.mark.parametrize(
    ("share", "frozen"), [(0.0, [True] * 4), (0.5, [False, False, True, True]), (1.0, [False] * 4)]
)
def test_batch_normalizations_are_frozen_after_their_share(tmp_path: Path, share: float, frozen: list[bool]) -> None:
    modes: list[bool] = []
    statistics: list[Tensor] = []

    class Looking(lightning().Callback):  # type: ignore[misc] # as above
        def on_train_batch_end(self, running: Any, module: Any, *_: Any) -> None:
            if running.current_epoch >= 2 and running.is_last_batch:
                modes.append(not module.net[1].training)
                statistics.append(module.net[1].running_mean.clone())

    callback = debugger(qat_epochs=4, qat_freeze_batchnorm=share, qat_early_stop=False)
    running = fit(tmp_path, callback, others=[Looking()])
    assert modes == frozen
    saved = torch.load(qat_step(callback).details["fp32_checkpoint"], weights_only=True)["state_dict"]
    moves = [
        not torch.equal(*pair) for pair in zip([saved["net.1.running_mean"], *statistics], statistics, strict=False)
    ]
    assert moves == [not still for still in frozen]
    assert running.lightning_module.net[1].training


def test_statistics_are_taken_anew_only_where_that_helps(tmp_path: Path) -> None:
    class Lagging(learner_class()):  # type: ignore[misc] # as above
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            # In QAT the running statistics hardly follow.
            self.net[1].momentum = 0.1 if self.current_epoch < 2 else 1e-4
            return super().training_step(batch, batch_idx)

    lagging, following = (debugger(qat_freeze_batchnorm=1.0, qat_lr_factor=1.0, qat_early_stop=False) for _ in range(2))
    running = fit(tmp_path / "lagging", lagging, Lagging)
    step = qat_step(lagging)
    assert any("taken anew" in note for note in step.details["notes"])
    assert step.score < min(step.details["scores"])
    norm = running.lightning_module.net[1]
    assert norm.momentum == 1e-4
    assert norm.training
    fit(tmp_path / "following", following)
    assert qat_step(following).score <= min(qat_step(following).details["scores"]) + 1e-6


def test_normalizations_of_equalized_layers_stay_as_they_are(tmp_path: Path) -> None:
    class Equalizing(lightning().Callback):  # type: ignore[misc] # as above
        def on_train_epoch_start(self, running: Any, module: Any) -> None:
            if running.current_epoch == 2:
                session = callback._training._qat.session
                first = session.layers[0]
                session.adjust({first.key: Adjustment(weight_scale=torch.ones(24, 1), bias_scale=torch.ones(24))})

    callback = debugger(qat_freeze_batchnorm=1.0, qat_lr_factor=1.0, qat_early_stop=False)
    running = fit(tmp_path, callback, others=[Equalizing()])
    assert qat_step(callback).details["best_epoch"] > 0
    saved = torch.load(qat_step(callback).details["fp32_checkpoint"], weights_only=True)["state_dict"]
    assert torch.equal(running.lightning_module.net[1].running_mean, saved["net.1.running_mean"])
    assert torch.equal(running.lightning_module.net[1].running_var, saved["net.1.running_var"])
    assert any("1 of 1 batch normalizations" in note for note in qat_step(callback).details["notes"])


def refused(tmp_path: Path, callback: QuantDebug, module: Any, **settings: Any) -> str:
    """Why a fit is refused; nothing was trained then."""
    lightning().seed_everything(3, verbose=False)
    made = module()
    before = tensors(made)
    with pytest.raises(SettingsError) as caught:
        fit(tmp_path, callback, made, **settings)
    assert all(torch.equal(one, other) for one, other in zip(before, tensors(made), strict=True))
    return str(caught.value)


class WithLbfgs(learner_class()):  # type: ignore[misc] # as above
    def configure_optimizers(self) -> Any:
        # Larger steps diverge on some CPUs, or leave a model whose loss can not be told from zero.
        return torch.optim.LBFGS(self.parameters(), lr=0.05, max_iter=5)


class Untrained(learner_class()):  # type: ignore[misc] # as above
    def configure_optimizers(self) -> Any:
        return None


class Once(learner_class()):  # type: ignore[misc] # as above
    made = 0

    def configure_optimizers(self) -> Any:
        self.made += 1
        if self.made > 1:
            raise RuntimeError("made before")
        return super().configure_optimizers()


class OnceThenNothing(Once):
    def configure_optimizers(self) -> Any:
        try:
            return super().configure_optimizers()
        except RuntimeError:
            return None


@pytest.mark.parametrize(
    ("module", "settings", "words"),
    [
        (WithLbfgs, {}, ("LBFGS", "`qat_learn_scales=False`", "`qat_epochs=0`")),
        (Untrained, {}, ("returns none", "`qat_epochs=0`")),
        (Once, {}, ("RuntimeError: made before", "anew each time", "`qat_epochs=0`")),
        (OnceThenNothing, {}, ("returns None when it is called again", "`qat_epochs=0`")),
        (Manual, {"qat_distillation": 0.5}, ("manual optimization", "`qat_distillation=0`")),
    ],
)
def test_what_can_not_be_trained_is_refused_before_anything_is(
    tmp_path: Path, module: Any, settings: dict[str, Any], words: tuple[str, ...]
) -> None:
    message = refused(tmp_path, debugger(**settings), module)
    for word in words:
        assert word in message


def test_the_question_leaves_no_trace_in_the_module(tmp_path: Path) -> None:
    class Counting(learner_class()):  # type: ignore[misc] # as above
        def __init__(self) -> None:
            super().__init__()
            self.made = 0
            self.drawn: list[float] = []

        def configure_optimizers(self) -> Any:
            self.made += 1
            self.drawn.append(float(torch.rand(())))
            return super().configure_optimizers()

    plain, callback = fit(tmp_path / "plain", None, Counting), debugger(target="int8", tolerance=1.0)
    running = fit(tmp_path / "with", callback, Counting)
    one, other = plain.lightning_module, running.lightning_module
    assert (one.made, one.drawn) == (other.made, other.drawn) == (1, one.drawn)
    assert all(torch.equal(*pair) for pair in zip(tensors(one), tensors(other), strict=True))


def test_lbfgs_trains_with_fixed_ranges(tmp_path: Path) -> None:
    callback = debugger(qat_learn_scales=False, qat_lr_factor=1.0)
    fit(tmp_path, callback, WithLbfgs)
    assert qat_step(callback).verdict in (StepVerdict.PASSED, StepVerdict.FAILED)
    details = qat_step(callback).details
    assert len(details["scores"]) == details["epochs"] >= 1
    assert details["scores"][0] != details["start_score"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"qat_epochs": -1}, "`qat_epochs` must be an integer of at least 0, got -1"),
        ({"qat_epochs": 1.5}, "`qat_epochs` must be an integer"),
        ({"qat_lr_factor": 0.0}, "`qat_lr_factor` must be positive, got 0.0"),
        ({"qat_lr_factor": "fast"}, "`qat_lr_factor` must be positive, got 'fast'"),
        ({"qat_lr_factor": math.inf}, "`qat_lr_factor` must be positive, got inf"),
        ({"qat_lr_factor": math.nan}, "`qat_lr_factor` must be positive, got nan"),
        ({"qat_freeze_batchnorm": 1.5}, "`qat_freeze_batchnorm` must be a share from 0 to 1, got 1.5"),
        ({"qat_freeze_batchnorm": True}, "`qat_freeze_batchnorm` must be a share from 0 to 1, got True"),
        ({"qat_distillation": -0.1}, "`qat_distillation` must be 0 or a positive weight, got -0.1"),
        ({"qat_learn_scales": 1}, "`qat_learn_scales` must be True or False, got 1"),
        ({"qat_early_stop": None}, "`qat_early_stop` must be True or False, got None"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        debugger(**settings)
    assert message in str(caught.value)

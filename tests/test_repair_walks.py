"""Whole walks with remedies on models and data of every kind: repaired, or undone with a reason, never harmed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quantdebug.diagnosis import Diagnosis
from lightning_quantdebug.evaluation import Evaluator
from lightning_quantdebug.model_loan import call_with
from lightning_quantdebug.report import Cause, StepName
from lightning_quantdebug.settings import make_settings
from tests.walks import Judged, in_validation, state_of, walk

pytestmark = pytest.mark.filterwarnings("ignore")

# Two bits lose so much that both boxes run; a tolerance of 0 lets every remedy have its turn.
NARROW = {"weights": {"bit_width": 2, "granularity": "per_tensor"}, "activations": {"bit_width": 2}}


class Against(Judged):
    """Judged by how far its output is from what it was in FP32, so that every loss is one."""

    def __init__(self, net: nn.Module, batches: Any, calibration: Any = None) -> None:
        super().__init__(net, batches, calibration)
        with torch.no_grad():
            known = [*self.batches, *self.calibration]
            self.exact = {first_value(batch): call_with(net, batch) for batch in known}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        error = (call_with(self.net, batch) - self.exact[first_value(batch)].to(self.device)).square()
        self.log("loss", error.nanmean(), batch_size=len(error))


def first_value(batch: Any) -> float:
    """What tells a batch from the others."""
    if isinstance(batch, dict):
        batch = batch["left"]
    elif isinstance(batch, (list, tuple)):
        batch = batch[0]
    return float(batch.flatten()[-1])


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


class Keyed(nn.Module):
    """Takes its inputs by name."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 8), nn.Linear(4, 8)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.one(left).relu() + self.other(right)


class Recurrent(nn.Module):
    """No convolution, and recurrent weights that no remedy changes."""

    def __init__(self) -> None:
        super().__init__()
        self.gru, self.out = nn.GRU(6, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gru(x)[0])


def dead() -> nn.Module:
    """A channel whose weights are all 0, and one that nobody reads."""
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        net[0].weight[2], net[0].bias[2] = 0, 0
        net[2].weight[:, 5] = 0
    return net


def vectors(*sizes: int) -> list[Tensor]:
    source = generator()
    return [torch.randn(size, 6, generator=source) for size in sizes]


def with_nan() -> list[Tensor]:
    batches = vectors(4, 4, 4)
    batches[1][0, 0] = torch.nan
    return batches


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]], Callable[[], list[Any]] | None]] = {
    "dicts": (Keyed, lambda: [{"left": torch.randn(4, 6), "right": torch.randn(4, 4)} for _ in range(3)], None),
    "several inputs": (Keyed, lambda: [(torch.randn(4, 6), torch.randn(4, 4)) for _ in range(3)], None),
    "a ragged last batch": (dead, lambda: vectors(8, 8, 3), None),
    "NaN in calibration": (dead, lambda: vectors(8, 8), with_nan),
    "no convolution": (Recurrent, lambda: [torch.randn(4, 5, 6) for _ in range(3)], None),
    "one batch": (dead, lambda: vectors(8), None),
}


@pytest.mark.parametrize("name", sorted(CASES))
def test_remedies_on_any_data(name: str) -> None:
    torch.manual_seed(0)
    make, batches, calibration = CASES[name]
    module = Against(make().eval(), batches(), calibration() if calibration else None)
    report = walk(module, target=NARROW, tolerance=0.0, calibration="train")
    assert report.remedies
    of_boxes = [item for item in report.remedies if item.step != StepName.FIX_QUANTIZERS.value]
    assert len({(item.remedy, item.variant) for item in of_boxes}) == len(of_boxes)
    assert all(item.reason for item in report.remedies)
    for item in of_boxes:
        assert item.kept is False or (item.gain is not None and item.gain > 0)
    assert report.step(StepName.QUANTIZE_MODEL) is not None
    if name == "NaN in calibration":
        assert Cause.NON_FINITE in [finding.cause for finding in report.findings]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_at_any_evaluation_of_a_repair_gives_everything_back(error: type[BaseException]) -> None:
    left = [0]

    class Failing(Against):
        """Raises in the step of a chosen pass."""

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            left[0] -= batch_idx == 0
            if left[0] == 0 and batch_idx == 0:
                raise error("planted")
            super().validation_step(batch, batch_idx)

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Linear(8, 3)).eval()
    module = Failing(net, vectors(8, 8, 8, 8))
    remedies = ["cle", "bias_correction", "range_setting"]
    settings = make_settings(monitor="loss", calibration="val", target=NARROW, tolerance=0.0, remedies=remedies)

    def fails_at(evaluation: int, running: Any) -> bool:
        evaluator = Evaluator(running, module, "loss")
        before = (state_of(module), torch.get_rng_state().tolist())
        left[:] = [evaluation]
        diagnosis = Diagnosis(evaluator, evaluator, settings)
        try:
            diagnosis.walk()
            failed = False
        except error:
            failed = True
        assert (state_of(module), torch.get_rng_state().tolist()) == before
        return failed

    def action(running: Any) -> int:
        evaluation = 1
        while fails_at(evaluation, running):
            # From the first evaluation of the repair on, each third is enough: they repeat themselves.
            evaluation += 1 if evaluation < 18 else 3
        return evaluation

    assert in_validation(module, action) > 24


def test_the_whole_model_is_measured_with_each_remedy_that_was_kept_and_tensors_are_seen_at_its_moments() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)).eval()
    with torch.no_grad():
        net[0].weight[3] *= 40
        net[2].weight[:, 3] /= 40
    user = Against(net, [torch.randn(32, 8, generator=generator()) for _ in range(10)])
    report = walk(user, monitor="loss", target=NARROW, tolerance=0.0, calibration="val", analysis="estimate")
    kept = [item for item in report.remedies if item.kept and item.step != StepName.FIX_QUANTIZERS.value]
    assert len(kept) > 1
    assert all(item.whole is None for item in report.remedies if not item.kept)
    for item in kept:
        assert item.whole is not None
        # Weights alone are on while their remedies are judged: the whole model loses more.
        assert item.step != StepName.FIX_WEIGHTS.value or item.whole > (item.after or 0.0)
    for box in (StepName.FIX_WEIGHTS, StepName.FIX_ACTIVATIONS):
        of_box = [item for item in kept if item.step == box.value]
        step = report.step(box)
        if of_box:
            assert step is not None
            # What the last remedy of a box left is what the box ends with.
            assert step.details["both"]["score"] == of_box[-1].whole
    boxes = {item.step for item in report.remedies if item.kept}
    assert report.visuals.tensors
    for view in report.visuals.tensors:
        assert [state.step for state in view.states] == ["fp32_check", *(s.value for s in StepName if s.value in boxes)]
        final = report.final.settings[view.quantizer]
        assert view.states[-1].bit_width == final.bit_width
        assert view.states[-1].scale == pytest.approx(final.scale)

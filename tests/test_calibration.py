"""Ranges are those of exactly the calibration batches, in eval mode, whatever is validated afterwards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quantdebug import calibration
from lightning_quantdebug.calibration import CalibrationRuns, calibration_loader, capture, set_ranges
from lightning_quantdebug.errors import CaptureError, EvaluationError
from lightning_quantdebug.evaluation import Evaluator
from lightning_quantdebug.instrument import Instrumentation
from lightning_quantdebug.settings import make_settings
from lightning_quantdebug.target import Mode, QuantTarget
from tests import zoo
from tests.walks import Judged, in_validation, walked

pytestmark = pytest.mark.filterwarnings("ignore")


def images(count: int, scale: float = 1.0, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [scale * (1 + index) * torch.randn(2, 3, 6, 6, generator=generator) for index in range(count)]


def convnet() -> nn.Module:
    torch.manual_seed(0)
    layers = [*zoo.conv_bn(3, 4, 3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 3)]
    return zoo._trained_looking(nn.Sequential(*layers)).eval()


def calibrated(module: Judged, loader: Any = "train", batches: int = 16, **settings: Any) -> tuple[Any, int]:
    """An instrumentation with ranges, and the number of samples seen."""

    def action(running: Any) -> tuple[Any, int]:
        evaluator = Evaluator(running, module, "loss")
        session = Instrumentation(module, QuantTarget(), **settings)
        capture(session, evaluator, loader)
        return session, set_ranges(session, evaluator, loader, batches)

    result: tuple[Any, int] = in_validation(module, action)
    return result


def extremes(function: Callable[[Tensor], Tensor], batches: list[Tensor]) -> tuple[float, float]:
    with torch.no_grad():
        values = torch.cat([function(batch).flatten() for batch in batches])
    return values.min().item(), values.max().item()


def observed(session: Any) -> dict[str, tuple[float, float]]:
    return {name: (q.observer.range_min, q.observer.range_max) for name, q in session.quantizers.items()}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("batches", [1, 3])
def test_ranges_are_those_of_exactly_the_calibration_batches_in_eval_mode(batches: int, training: bool) -> None:
    net, data = convnet(), images(4)
    module = Judged(net, images(2, seed=9), data).train(training)
    session, samples = calibrated(module, batches=batches)
    net.eval()
    seen = data[:batches]
    found = observed(session)
    assert samples == 2 * batches
    assert found["input"] == extremes(lambda x: x, seen)
    assert found["net.2"] == extremes(net[:3], seen)
    assert found["net.5"] == extremes(net, seen)
    assert found["net.5.weight"] == extremes(lambda _: net[5].weight, seen)
    encoding = session.quantizers["net.5"].encoding
    low, high = extremes(net, seen)
    assert encoding.scale.item() == pytest.approx((max(high, 0) - min(low, 0)) / 255, rel=1e-6)


def test_the_weight_that_is_observed_is_the_folded_one() -> None:
    net = convnet()
    session, _ = calibrated(Judged(net, images(1)))
    norm = net[1]
    folded = net[0].weight * (norm.weight / (norm.running_var + norm.eps).sqrt()).reshape(-1, 1, 1, 1)
    scales = session.quantizers["net.0.weight"].encoding.scale
    largest = torch.maximum(folded.amax((1, 2, 3)) / 127, folded.amin((1, 2, 3)) / -128)
    torch.testing.assert_close(scales, largest.detach(), rtol=1e-6, atol=0)


def test_two_calibrations_in_a_row_give_the_same_ranges_and_forget_the_last_one() -> None:
    module = Judged(convnet(), images(1), images(3))

    def action(running: Any) -> list[Any]:
        evaluator, session = Evaluator(running, module, "loss"), Instrumentation(module, QuantTarget())
        capture(session, evaluator, "train")
        found = []
        for loader in ("train", images(3, 50.0), "train"):
            set_ranges(session, evaluator, loader, 3)
            found.append((observed(session), {n: q.encoding.scale.tolist() for n, q in session.quantizers.items()}))
        return found

    first, other, again = in_validation(module, action)
    assert first == again
    assert other[0]["input"][1] > 10 * first[0]["input"][1]


def test_validation_does_not_move_the_ranges() -> None:
    data = images(2)
    module = Judged(convnet(), images(2, 10.0), data)
    report = walked(module, calibration="train").report
    low, high = extremes(lambda x: x, data)
    setting = report.final.settings["input"]
    assert (setting.observed_min, setting.observed_max) == (low, high)
    assert setting.scale == pytest.approx((high - low) / 255, rel=1e-6)


class Forked(nn.Module):
    """Which way depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else self.b(x)


def signs(*values: float) -> list[Tensor]:
    return [torch.full((2, 4), value) for value in values]


def test_a_branch_that_only_a_later_calibration_batch_takes_is_found_by_recording_again() -> None:
    module = Judged(Forked(), signs(1.0), signs(1.0, 1.0, 2.0, -3.0))
    session, samples = calibrated(module)
    assert samples == 8
    assert {"net.a", "net.a.weight", "net.b", "net.b.weight"} <= set(session.quantizers)
    assert session.coverage.unseen == ()
    assert all(quantizer.is_calibrated for quantizer in session.quantizers.values())
    assert observed(session)["input"] == (-3.0, 2.0)


def test_a_branch_that_no_calibration_batch_takes_is_not_found() -> None:
    session, _ = calibrated(Judged(Forked(), signs(1.0), signs(1.0, 1.0, 2.0, -3.0)), batches=3)
    assert not {"net.b", "net.b.weight"} & set(session.quantizers)


def test_the_modes_are_as_before_and_nothing_is_trained() -> None:
    module = Judged(convnet(), images(1))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    session, _ = calibrated(module)
    assert all(quantizer.mode is Mode.BYPASS for quantizer in session.quantizers.values())
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_which_loader_a_setting_means() -> None:
    given = object()
    assert calibration_loader(make_settings(monitor="a", calibration="train"), None) == "train"
    assert calibration_loader(make_settings(monitor="a", calibration="val"), None) is None
    assert calibration_loader(make_settings(monitor="a", calibration=[1]), given) is given


@pytest.mark.parametrize(
    ("source", "expected"),
    [("val", 1.0), ("train", 2.0), ([torch.full((2, 4), 3.0)], 3.0)],
    ids=["val", "train", "own"],
)
def test_ranges_come_from_the_chosen_loader(source: Any, expected: float) -> None:
    module = Judged(nn.Linear(4, 4), signs(1.0), signs(2.0))
    settings = walked(module, calibration=source).report.final.settings
    assert settings["input"].observed_max == expected


def test_calibration_batches_that_the_step_can_not_take() -> None:
    module = Judged(nn.Linear(4, 4), signs(1.0), [torch.ones(2, 5)])
    with pytest.raises(
        EvaluationError,
        match=r"`validation_step` failed on a calibration batch: RuntimeError: .* pass calibration='val' or a Data",
    ):
        calibrated(module)


@pytest.mark.parametrize(("loader", "expected"), [(None, ValueError), ("train", EvaluationError)])
def test_only_on_other_batches_than_those_of_validation_is_the_loader_to_blame(loader: Any, expected: Any) -> None:
    class Moody(Judged):
        def score_of(self, output: Any) -> Tensor:
            if self.out_of_turn:
                raise ValueError("not now")
            return super().score_of(output)

    module = Moody(nn.Linear(4, 4), signs(1.0))
    module.out_of_turn = False

    def action(running: Any) -> None:
        module.out_of_turn = True
        with pytest.raises(expected, match="not now") as raised:
            capture(Instrumentation(module, QuantTarget()), Evaluator(running, module, "loss"), loader)
        assert type(raised.value) is expected

    in_validation(module, action)


def test_nothing_to_quantize_is_said_as_it_is() -> None:
    with pytest.raises(CaptureError, match="Nothing in Judged can be quantized"):
        calibrated(Judged(nn.Linear(4, 4), signs(1.0)), exclude=["*"])


def test_ranks_that_ran_different_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "gather", lambda value: [value, [*value[1:], "net.other"]])
    with pytest.raises(
        CaptureError, match=r"disagree on the quantizers \['input', 'net.other'\]. Raise `calibration_batches`"
    ):
        calibrated(Judged(nn.Linear(4, 4), signs(1.0)))


def test_every_rank_gets_the_statistics_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_two_ranks(value: Any) -> list[Any]:
        if not isinstance(value, dict):
            return [value, value]
        return [value, {name: {**state, "range_max": 7.0} for name, state in value.items()}]

    monkeypatch.setattr(calibration, "gather", of_two_ranks)
    session, _ = calibrated(Judged(nn.Linear(4, 4), signs(1.0)))
    quantizer = session.quantizers["input"]
    assert (quantizer.observer.range_max, quantizer.observer.count) == (7.0, 16)
    assert quantizer.encoding.scale.item() == pytest.approx(7.0 / 255, rel=1e-6)


def test_remedies_load_no_more_batches_than_they_ask_for() -> None:
    loaded: list[int] = []

    class Counted(torch.utils.data.Dataset):  # type: ignore[type-arg] # of tensors
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> Tensor:
            loaded.append(index)
            return images(6)[index]

    module = Judged(convnet(), images(2))
    loader = torch.utils.data.DataLoader(Counted(), batch_size=None)

    def action(running: Any) -> list[list[int]]:
        evaluator = Evaluator(running, module, "loss")
        session = Instrumentation(module, QuantTarget())
        capture(session, evaluator, loader)
        found = []
        for batches, most in ((4, None), (4, 2), (4, 9), (9, None)):
            visited: list[int] = []
            loaded.clear()
            runs = CalibrationRuns(session, evaluator, loader, batches)
            runs(lambda run, index, visited=visited: visited.append(index), most)
            found.append([len(visited), len(set(loaded))])
        return found

    assert in_validation(module, action) == [[4, 4], [2, 2], [4, 4], [6, 6]]


@pytest.mark.parametrize("hook", [False, True])
def test_a_batch_of_which_no_run_came_to_its_end_is_run_where_it_would_be_missed(hook: bool) -> None:
    outputs: list[Any] = []

    class Returns(Judged):
        """Returns its score, which a hook may read."""

        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            super().validation_step(batch, batch_idx)
            return self.score_of(self.net(batch))

    if hook:
        Returns.on_validation_batch_end = lambda self, *arguments: outputs.append(arguments[0])  # type: ignore[method-assign] # a hook of the user's
    module = Returns(convnet(), images(3))
    stopped: list[bool] = []

    def action(running: Any) -> None:
        evaluator = Evaluator(running, module, "loss")
        session = Instrumentation(module, QuantTarget())
        capture(session, evaluator, "train")
        outputs.clear()
        runs = CalibrationRuns(session, evaluator, "train", 3)
        runs(lambda run, index: stopped.append(session.run_until(run, session.layers[0].key)))

    in_validation(module, action)
    assert stopped == [True] * 3
    assert [output is not None for output in outputs[:3]] == [True] * 3 * hook

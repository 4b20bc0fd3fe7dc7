"""Range setting as a remedy: the range that each method must give, what it must leave alone, and that it stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_quantdebug.activation_ranges import set_activation_ranges, set_weight_ranges
from lightning_quantdebug.batchnorm_statistics import batchnorm_ranges
from lightning_quantdebug.encoding import Encoding, encoding_from_range
from lightning_quantdebug.errors import SettingsError
from lightning_quantdebug.instrument import Instrumentation, batch_runs, instrument
from lightning_quantdebug.layers import Visit
from lightning_quantdebug.output_cross_entropy import LogitRows, range_from_logits
from lightning_quantdebug.target import QuantSpec, RangeSetting


def mlp(*tail: nn.Module, classes: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, classes), *tail)


def batches(count: int = 4, size: int = 16, features: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(size, features, generator=generator).pow(3) for _ in range(count)]


def no_runs(visit: Visit) -> None:
    raise AssertionError("this method needs no run")


def ends(encoding: Encoding | None) -> tuple[float, float]:
    assert encoding is not None
    return encoding.range_min.item(), encoding.range_max.item()


def expected(low: Any, high: Any, spec: QuantSpec) -> tuple[float, float]:
    return ends(encoding_from_range(torch.as_tensor(low), torch.as_tensor(high), spec))


def reasons(skipped: tuple[tuple[str, str], ...]) -> dict[str, str]:
    assert len(dict(skipped)) == len(skipped)
    return dict(skipped)


def test_percentiles_are_those_of_what_calibration_saw_and_need_no_run() -> None:
    model, data = mlp(), batches(size=500)
    with torch.no_grad():
        values = {"input": torch.cat(data), "1": model[:2](torch.cat(data)), "2": model(torch.cat(data))}
    with instrument(model, data[0]) as q:
        q.calibrate(data)
        whole = {name: ends(q.quantizers[name].encoding) for name in values}
        applied = set_activation_ranges(q, no_runs, "percentile", 97)
        assert applied.changed == tuple(values)
        assert applied.skipped == ()
        for name, tensor in values.items():
            quantizer = q.quantizers[name]
            assert quantizer.spec == QuantSpec(8, range_setting=RangeSetting.PERCENTILE, percentile=97)
            low, high = np.quantile(tensor.numpy(), [0.03, 0.97])
            width = quantizer.observer.histogram.bin_width
            assert ends(quantizer.encoding) == pytest.approx(expected(low, high, QuantSpec(8)), abs=0.02 * (high - low))
            assert width < 0.02 * (high - low)
        shares = [
            (high - low) / (whole[name][1] - whole[name][0])
            for name, (low, high) in {name: ends(q.quantizers[name].encoding) for name in values}.items()
        ]
        assert applied.note == (
            f"percentile for 3 activations: ranges {min(shares):.2f} to {max(shares):.2f} times as wide, "
            f"median {sorted(shares)[1]:.2f}"
        )


@pytest.mark.parametrize("method", ["min_max", "percentile", "mse"])
def test_the_method_survives_another_calibration_and_gives_what_a_target_with_it_gives(method: str) -> None:
    model, data = mlp(), batches()
    spec = {"bit_width": 4, "range_setting": method, "percentile": 99}
    with instrument(model, data[0], {"activations": spec}) as q:
        q.calibrate(data)
        wanted = {name: ends(q.quantizers[name].encoding) for name in ("input", "1", "2")}
    with instrument(model, data[0], "w8a4") as q:
        q.calibrate(data[:1])
        set_activation_ranges(q, no_runs, method, 99)
        q.calibrate(data)
        assert {name: ends(q.quantizers[name].encoding) for name in wanted} == wanted


def test_weights_and_the_model_are_left_as_they_are() -> None:
    model, data = mlp(), batches()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with instrument(model, data[0]) as q:
        q.calibrate(data)
        weights = {name: quantizer.encoding for name, quantizer in q.quantizers.items() if name.endswith("weight")}
        for method in RangeSetting:
            set_activation_ranges(q, batch_runs(q, data), method)
        assert all(q.quantizers[name].encoding is encoding for name, encoding in weights.items())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_restored_session_has_every_range_as_it_was() -> None:
    model, data = mlp(), batches()
    with instrument(model, data[0]) as q:
        q.calibrate(data)
        q.set_mode("quantize")
        state, before = q.state(), model(data[0])
        set_activation_ranges(q, batch_runs(q, data), "cross_entropy")
        set_activation_ranges(q, no_runs, "percentile", 90)
        assert not torch.equal(model(data[0]), before)
        q.restore(state)
        assert torch.equal(model(data[0]), before)


def test_what_must_stay_stays_and_is_told() -> None:
    model, data = mlp(nn.Softmax(1)), batches()
    with instrument(model, data[0]) as q:
        q.calibrate(data)
        q.quantizers["1"].freeze()
        q.quantizers["2"].reset()
        before = {name: q.quantizers[name].encoding for name in ("1", "3")}
        applied = set_activation_ranges(q, no_runs, "percentile", 90)
        assert applied.changed == ("input",)
        assert reasons(applied.skipped) == {
            "1": "its encoding is frozen",
            "2": "calibration gave it no range: it runs in FP32",
            "3": "its range is fixed by what it computes",
        }
        assert all(q.quantizers[name].encoding is encoding for name, encoding in before.items())
        assert not q.quantizers["2"].is_calibrated
        again = set_activation_ranges(q, no_runs, RangeSetting.PERCENTILE, 90)
        assert (again.changed, again.note) == ((), "")
        assert reasons(again.skipped)["input"] == "has that range already"


def test_a_method_or_percentile_that_there_is_not_is_refused_before_anything_changes() -> None:
    model, data = mlp(), batches()
    with instrument(model, data[0]) as q:
        q.calibrate(data)
        before = {name: quantizer.encoding for name, quantizer in q.quantizers.items()}
        with pytest.raises(SettingsError, match=r"`method` must be one of \['min_max', 'percentile', .*got 'entropy'"):
            set_activation_ranges(q, no_runs, "entropy")
        with pytest.raises(SettingsError, match=r"`percentile` must be a number above 50 and at most 100, got 0.99"):
            set_activation_ranges(q, no_runs, "percentile", 0.99)
        with pytest.raises(SettingsError, match=r"`method` must be one of \['min_max', 'percentile', .*got 'entropy'"):
            set_weight_ranges(q, lambda: model(data[0]), "entropy")
        message = r"`method` of weights must be 'min_max', 'percentile' or 'mse', got 'batchnorm'.*`set_activation_ran"
        with pytest.raises(SettingsError, match=message):
            set_weight_ranges(q, lambda: model(data[0]), "batchnorm")
        assert {name: quantizer.encoding for name, quantizer in q.quantizers.items()} == before


# Cross-entropy.


class Flattened(nn.Module):
    """A convolution as classifier: the logits get their shape (N, C) behind the quantizer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).flatten(1)


def check_cross_entropy(q: Instrumentation, name: str, logits: Tensor, data: list[Any]) -> None:
    rows = LogitRows()
    rows.add(logits)
    spec = q.quantizers[name].spec
    applied = set_activation_ranges(q, batch_runs(q, data), "cross_entropy")
    quantizer = q.quantizers[name]
    assert applied.changed == (name,)
    assert ends(quantizer.encoding) == pytest.approx(expected(*range_from_logits(rows.logits, spec), spec), rel=1e-4)
    assert quantizer.spec.range_setting is RangeSetting.CROSS_ENTROPY
    others = set(reasons(applied.skipped).values())
    assert others <= {"is not the network's last output", "its range is fixed by what it computes"}
    before = quantizer.encoding
    q.calibrate(data[:1])
    assert quantizer.encoding is before


@pytest.mark.parametrize("target", ["w8a4", {"activations": {"bit_width": 4, "symmetric": True}}])
@pytest.mark.parametrize("tail", [(), (nn.Softmax(1),), (nn.LogSoftmax(1),), (nn.Identity(),)])
def test_the_logits_get_the_range_of_least_cross_entropy(target: Any, tail: tuple[nn.Module, ...]) -> None:
    model, data = mlp(*tail), batches()
    with torch.no_grad():
        logits = model[:3](torch.cat(data))
        name = "2"
        if tail and isinstance(tail[0], nn.LogSoftmax):
            logits, name = model(torch.cat(data)), "3"
    with instrument(model, data[0], target) as q:
        q.calibrate(data)
        q.set_mode("quantize")  # the logits are those of FP32 all the same
        check_cross_entropy(q, name, logits, data)


def test_logits_that_are_flattened_behind_their_quantizer_are_found() -> None:
    model = Flattened()
    data = [x.view(4, 3, 8, 8) for x in batches(3, 4, 192)]
    with instrument(model, data[0], "w8a4") as q:
        q.calibrate(data)
        with torch.no_grad(), q.reference():
            logits = model(torch.cat(data))
        check_cross_entropy(q, "net.3", logits, data)


class Outputs(nn.Module):
    """Returns what ``make`` makes of the logits."""

    def __init__(self, make: Callable[[Tensor], Any], classes: int = 5) -> None:
        super().__init__()
        self.net = mlp(classes=classes)
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.net(x))


@pytest.mark.parametrize(
    ("make", "classes", "name", "reason"),
    [
        (
            lambda y: y,
            1,
            "net.2",
            "Logits must be floating-point of shape (N, C) with two classes or more, got float32",
        ),
        (lambda y: y.view(4, 4, 5), 5, "net.2", "got float32 of shape (4, 4, 5)."),
        (lambda y: -y, 5, "neg", "the network's last output has no quantizer of its own"),
        (lambda y: y.argmax(1), 5, "output", "the network returns no floating-point tensor that was computed from"),
        (lambda y: y.split(3, 1), 5, "split", "the network's last output has no quantizer of its own"),
        (lambda y: torch.cat([y, 2 * y.relu()], 1), 5, "cat", "is shared by other tensors"),
        (lambda y: y * float("nan"), 5, "mul", "must have logits without NaN or infinity, got none"),
    ],
)
def test_an_output_without_logits_is_left_alone_and_the_reason_is_told(
    make: Callable[[Tensor], Any], classes: int, name: str, reason: str
) -> None:
    model, data = Outputs(make, classes), batches()
    with instrument(model, data[0], "w8a4") as q:
        q.calibrate(data)
        before = {key: quantizer.encoding for key, quantizer in q.quantizers.items()}
        applied = set_activation_ranges(q, batch_runs(q, data), "cross_entropy")
        assert applied.changed == ()
        assert reason in reasons(applied.skipped)[name]
        assert {key: quantizer.encoding for key, quantizer in q.quantizers.items()} == before


class Recurrent(nn.Module):
    """Returns what a recurrent layer does: a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(6, 4)

    def forward(self, x: Tensor) -> Any:
        return self.lstm(x)


def test_a_last_operation_with_several_results_is_left_alone() -> None:
    model, data = Recurrent(), batches(2)
    with instrument(model, data[0]) as q:
        q.calibrate(data)
        applied = set_activation_ranges(q, batch_runs(q, data), "cross_entropy")
        assert applied.changed == ()
        assert applied.skipped[0][1] == "the network's last output has no quantizer of its own"


def test_of_several_outputs_the_last_is_taken() -> None:
    model, data = Outputs(lambda y: (y.relu(), y.tanh(), y.exp())), batches()
    with instrument(model, data[0], "w8a4") as q:
        q.calibrate(data)
        assert set_activation_ranges(q, batch_runs(q, data), "cross_entropy").changed == ("exp",)


def test_a_frozen_or_fixed_last_output_needs_no_run() -> None:
    model, data = mlp(), batches()
    with instrument(model, data[0]) as q:
        q.calibrate(data)
        q.quantizers["2"].freeze()
        assert reasons(set_activation_ranges(q, no_runs, "cross_entropy").skipped)["2"] == "its encoding is frozen"
    model = mlp(nn.Sigmoid())
    with instrument(model, data[0]) as q:
        q.calibrate(data)
        assert "fixed" in reasons(set_activation_ranges(q, no_runs, "cross_entropy").skipped)["3"]


def test_all_processes_set_the_range_of_all_their_logits() -> None:
    model, data = mlp(), batches(6)
    found = []

    def parts_of(q: Instrumentation, own: list[Tensor]) -> list[Any]:
        kept: list[Any] = []
        set_activation_ranges(
            q, batch_runs(q, own), "cross_entropy", gather=lambda value: kept.append(value) or [value]
        )
        return kept

    with instrument(model, data[0], "w8a4") as q:
        q.calibrate(data)
        state = q.state()
        shared = []
        for own in (data[:2], data[2:]):
            shared += parts_of(q, own)
            q.restore(state)
        for own in (data[:2], data[2:], data):
            gather = (lambda _: shared) if own is not data else (lambda value: [value])
            set_activation_ranges(q, batch_runs(q, own), "cross_entropy", gather=gather)
            found.append(ends(q.quantizers["2"].encoding))
            q.restore(state)
    assert found[0] == found[1] == found[2]


# Batch normalization.


def test_ranges_behind_batch_normalizations_need_no_data_and_are_kept() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    model[1].weight.data.uniform_(0.5, 2.0)
    model[1].bias.data.normal_()
    data = [x.view(4, 3, 8, 8) for x in batches(2, 4, 192)]
    with instrument(model, data[0]) as q:
        q.calibrate(data)
        applied = set_activation_ranges(q, no_runs, "batchnorm")
        assert applied.changed == ("2",)
        low, high = batchnorm_ranges(q)["2"]
        sigma = (model[1].running_var / (model[1].running_var + model[1].eps)).sqrt() * model[1].weight
        assert (low, high) == pytest.approx((0.0, (model[1].bias + 6 * sigma).max().item()))
        assert ends(q.quantizers["2"].encoding) == expected(low, high, QuantSpec(8))
        unknown = "no batch normalization ahead of it tells its range"
        assert reasons(applied.skipped) == {"input": unknown, "3": unknown}
        before = q.quantizers["2"].encoding
        q.calibrate(data)
        assert q.quantizers["2"].encoding is before
        assert q.quantizers["2"].spec.range_setting is RangeSetting.BATCHNORM


# Weights.


@pytest.mark.parametrize("target", ["int8", "int8_per_tensor"])
def test_weights_get_the_range_of_what_quantization_sees_and_keep_the_method(target: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
    model[1].weight.data.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(0))
    data = [torch.randn(2, 3, 8, 8)]
    folded = model[0].weight * (model[1].weight / (model[1].running_var + model[1].eps).sqrt()).view(-1, 1, 1, 1)
    rows = folded.detach().numpy().reshape(4 if target == "int8" else 1, -1)
    end = np.quantile(np.abs(rows), 0.9, axis=1)
    scale = np.maximum(np.minimum(end, rows.max(1)) / 127, np.minimum(end, -rows.min(1)) / 128)
    with instrument(model, data[0], target) as q:
        q.calibrate(data)
        applied = set_weight_ranges(q, lambda: model(data[0]), "percentile", 90)
        assert applied.changed == ("0.weight",)
        quantizer = q.quantizers["0.weight"]
        for _ in range(2):
            assert quantizer.encoding is not None
            np.testing.assert_allclose(quantizer.encoding.scale.numpy().ravel(), scale, rtol=1e-5)
            q.calibrate(data)
        again = set_weight_ranges(q, lambda: model(data[0]), "percentile", 90)
        assert reasons(again.skipped) == {"0.weight": "has that range already"}
        assert "percentile for 1 weights: ranges 0." in applied.note


class Branch(nn.Module):
    """Takes its second layer for positive input only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.always, self.sometimes = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.always(x)
        return self.sometimes(y) if x.sum() > 0 else y


def test_weights_that_a_run_does_not_reach_or_that_are_frozen_stay() -> None:
    model, data = Branch(), torch.ones(2, 4)
    with instrument(model, data) as q:
        q.calibrate([data])
        unreached = q.quantizers["sometimes.weight"]
        before, spec = unreached.encoding, unreached.spec
        applied = set_weight_ranges(q, lambda: model(-data), "percentile", 80)
        assert applied.changed == ("always.weight",)
        assert reasons(applied.skipped) == {"sometimes.weight": "the calibration batch does not reach it"}
        assert (unreached.encoding, unreached.spec) == (before, spec)
        q.quantizers["always.weight"].freeze()
        kept = q.quantizers["always.weight"].encoding
        applied = set_weight_ranges(q, lambda: model(data), "percentile", 90)
        assert applied.changed == ("sometimes.weight",)
        assert "rounding was learned" in reasons(applied.skipped)["always.weight"]
        assert q.quantizers["always.weight"].encoding is kept


def test_mse_weights_at_4_bits_have_less_error_than_min_max() -> None:
    model, data = mlp(), batches(1)
    model[0].weight.data[0, 0] = 4.0
    with instrument(model, data[0], {"preset": "w4a8_per_tensor", "weights": {"range_setting": "min_max"}}) as q:
        q.calibrate(data)
        scale = q.quantizers["0.weight"].encoding.scale.item()  # type: ignore[union-attr]
        set_weight_ranges(q, lambda: model(data[0]), "mse")
        assert q.quantizers["0.weight"].encoding.scale.item() < 0.8 * scale  # type: ignore[union-attr]

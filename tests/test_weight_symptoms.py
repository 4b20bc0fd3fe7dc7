"""What is measured of weights, against the same sums in plain float64 numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_quantdebug.adjustment import Adjustment
from lightning_quantdebug.instrument import batch_runs, instrument
from lightning_quantdebug.operations import positions_of
from lightning_quantdebug.weight_symptoms import MOST_BATCHES, WeightSymptoms, decibels, weight_symptoms

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def measured(net: nn.Module, batches: list[Tensor], target: object = "int8_per_tensor") -> dict[str, WeightSymptoms]:
    net.eval()
    with instrument(net, batches[0], target) as session:  # type: ignore[arg-type]
        session.calibrate(batches)
        return {found.quantizer: found for found in weight_symptoms(session, batch_runs(session, batches))}


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Sequential:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(torch.zeros(len(weight)) if bias is None else bias)
    return nn.Sequential(layer)


def on_grid(weight: np.ndarray, bits: int, scale: np.ndarray | float | None = None) -> np.ndarray:
    """Symmetric min-max rounding."""
    most = 2 ** (bits - 1)
    if scale is None:
        scale = max(weight.max() / (most - 1), -weight.min() / most)
    return np.clip(np.round(weight / scale), -most, most - 1) * scale


def mean_db(signal: np.ndarray, error: np.ndarray) -> float:
    """SQNR of the average channel; channels along the last axis."""
    shares = (error**2).mean(0) / (signal**2).mean(0)
    return float(-10 * np.log10(np.minimum(shares, 1).mean()))


def test_each_gain_is_that_of_the_weight_with_one_thing_healed():
    weight = normal(6, 10) * torch.logspace(-1, 1, 6)[:, None] * torch.logspace(0, 1.2, 10)
    bias, x = normal(6, seed=1), normal(64, 10, seed=2) + 1.0
    (found,) = measured(linear(weight, bias), list(x.split(16))).values()
    exact = weight.double().numpy()
    inputs = x.double().numpy()
    outputs = inputs @ exact.T + bias.double().numpy()

    def sqnr(quantized: np.ndarray) -> float:
        return mean_db(outputs, inputs @ (quantized - exact).T)

    now = on_grid(exact, 8)
    columns = np.abs(exact).max(0)
    factors = columns * np.abs(exact / columns).max(1, keepdims=True)
    even = on_grid(exact / factors, 8) * factors
    error = inputs @ (now - exact).T
    unbiased = mean_db(outputs, error - error.mean(0))
    assert found.sqnr_db == pytest.approx(sqnr(now), abs=0.01)
    assert found.even_gain == pytest.approx(sqnr(even) - sqnr(now), abs=0.05)
    assert found.even_gain > 10
    assert found.unbiased_gain == pytest.approx(unbiased - sqnr(now), abs=0.01)
    magnitude = np.abs(exact)
    assert found.output_ratio == pytest.approx(magnitude.max() / np.sort(magnitude.max(1))[3], rel=1e-6)
    assert found.input_ratio == pytest.approx(magnitude.max() / np.sort(magnitude.max(0))[5], rel=1e-6)
    narrowest = magnitude.max(1).argmin() if found.output_ratio >= found.input_ratio else magnitude.max(0).argmin()
    assert found.narrowest == narrowest
    assert found.peak == pytest.approx(magnitude.max() / np.sqrt((exact**2).mean()), rel=1e-6)
    assert (found.quantizer, found.bit_width, found.dead) == ("0.weight", 8, ())


def test_a_clipped_range_gains_what_an_outlier_costs():
    weight = normal(64, 64)
    weight[3, 5] = 12.0
    target = {"preset": "w4a8_per_tensor", "weights": {"range_setting": "min_max"}}
    x = normal(32, 64, seed=1)
    x[:, 5] = 0.0  # The outlier itself must not matter, or clipping it would cost.
    (found,) = measured(linear(weight), [x], target).values()
    assert found.clipping_gain > 6.0
    assert found.peak == pytest.approx(12.0 / weight.square().mean().sqrt().item(), rel=1e-5)
    (by_mse,) = measured(linear(weight), [x], "w4a8_per_tensor").values()
    assert by_mse.clipping_gain == 0.0
    assert by_mse.sqnr_db == pytest.approx(found.sqnr_db + found.clipping_gain, abs=0.01)


def test_random_signs_gain_where_errors_add_up_over_inputs_that_go_together():
    steps = torch.randint(-126, 126, (8, 64), generator=torch.Generator().manual_seed(0)).float()
    weight = (steps + 0.45) / 127
    weight[:, 0] = 1.0
    together = normal(256, 1, seed=1).expand(256, 64).contiguous()
    alone = normal(256, 64, seed=2)
    (found,) = measured(linear(weight), [together], "int8").values()
    assert found.sign_gain > 6.0
    # A shift of every sample is no such error: it is the bias that is to be corrected.
    for inputs in (alone, alone + 3.0):
        (found,) = measured(linear(weight), [inputs], "int8").values()
        assert abs(found.sign_gain) < 1.5


def test_a_custom_quantizer_is_measured_as_it_is_and_no_other_range_is_foretold():
    weight = normal(64, 64)
    weight[3, 5] = 12.0
    x = normal(32, 64, seed=1)
    target = {"preset": "w4a8_per_tensor", "weights": {"range_setting": "min_max"}}
    (ours,) = measured(linear(weight), [x], target).values()
    custom = {**target, "quantizer": "tests.faulty_quantizers.Flooring"}
    (theirs,) = measured(linear(weight), [x], custom).values()
    assert theirs.sqnr_db < ours.sqnr_db - 1
    assert (ours.clipping_gain != 0, theirs.clipping_gain) == (True, 0.0)


def test_the_error_of_one_layer_is_not_that_of_the_layers_before():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    x = normal(64, 8)
    both = measured(net, [x])
    with torch.no_grad():
        net[0].weight.mul_(torch.logspace(-2, 2, 8)[:, None])
        hidden = net[1](net[0](x))
    spoilt = measured(net, [x])["2.weight"]
    (alone,) = measured(nn.Sequential(net[2]), [hidden]).values()
    assert spoilt.sqnr_db == pytest.approx(alone.sqnr_db, abs=1e-4)
    assert both["2.weight"].output_ratio == spoilt.output_ratio


def test_folded_weights_are_measured_against_folded_weights():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    with torch.no_grad():
        net[1].weight.copy_(torch.logspace(-3, 3, 6))
        net[1].running_var.copy_(torch.rand(6) + 0.5)
    x = normal(4, 3, 8, 8)
    found = measured(net, [x])["0.weight"]
    assert found.output_ratio > 50
    assert found.even_gain > 20
    # The batch normalization undoes nothing: without folding there would be no unevenness at all.
    assert measured(nn.Sequential(net[0]), [x])["0.weight"].output_ratio < 2


@pytest.mark.parametrize(
    ("layer", "shape", "outputs", "inputs"),
    [
        (nn.Conv1d(4, 6, 3), (5, 4, 9), True, True),
        (nn.Conv3d(4, 4, 2), (3, 4, 4, 4, 4), True, True),
        (nn.ConvTranspose2d(4, 6, 2), (3, 4, 5, 5), True, True),
        (nn.Conv2d(6, 6, 3, groups=6), (3, 6, 5, 5), True, False),
        (nn.Conv2d(6, 4, 3, groups=2), (3, 6, 5, 5), True, False),
        (nn.Linear(5, 6), (3, 7, 5), True, True),
    ],
)
def test_output_and_input_channels_are_found_in_every_layer(layer, shape, outputs, inputs):
    x = normal(*shape)
    transposed = isinstance(layer, nn.ConvTranspose2d)
    with torch.no_grad():
        layer.weight.copy_(normal(*layer.weight.shape, seed=1).sign())
        rows = layer.weight.movedim(1 if transposed else 0, 0)
        rows.mul_(torch.logspace(-2, 2, len(rows)).view(-1, *[1] * (rows.ndim - 1)))
    (found,) = measured(nn.Sequential(layer), [x]).values()
    assert (found.output_ratio > 10) == outputs
    assert (found.even_gain > 6) == outputs
    assert found.input_ratio == pytest.approx(1.0)
    with torch.no_grad():
        layer.weight.copy_(normal(*layer.weight.shape, seed=1).sign())
        columns = layer.weight.movedim(0 if transposed else 1, 0)
        columns.mul_(torch.logspace(2, -2, len(columns)).view(-1, *[1] * (columns.ndim - 1)))
    (found,) = measured(nn.Sequential(layer), [x]).values()
    assert (found.input_ratio > 5) == inputs
    if inputs:
        assert found.narrowest == len(columns) - 1


def test_a_recurrent_layer_has_its_weights_measured_one_by_one():
    net = nn.LSTM(4, 8, batch_first=True)
    found = measured(net, [normal(3, 6, 4)], "int8")
    assert set(found) == {"weight_ih_l0", "weight_hh_l0"}
    assert all(20 < item.sqnr_db < 80 for item in found.values())
    assert len({item.sqnr_db for item in found.values()}) == 2


def test_a_weight_that_two_layers_use_has_the_worse_result():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x) * 3)

    net = Twice()
    x = normal(32, 6)
    (found,) = measured(net, [x]).values()
    with torch.no_grad():
        second = net.layer(x) * 3
    alone = [next(iter(measured(nn.Sequential(net.layer), [inputs]).values())).sqnr_db for inputs in (x, second)]
    assert found.sqnr_db == pytest.approx(min(alone), abs=1e-3)


def test_dead_channels_are_named_and_count_for_nothing():
    weight = normal(5, 8)
    weight[[1, 3]] = 0.0
    weight[2] *= 0.1
    weight[4] *= 10
    (found,) = measured(linear(weight), [normal(32, 8, seed=1)]).values()
    assert found.dead == (1, 3)
    (without,) = measured(linear(weight[[0, 2, 4]]), [normal(32, 8, seed=1)]).values()
    assert found.sqnr_db == pytest.approx(without.sqnr_db, abs=1e-4)
    assert found.narrowest == 2


def test_a_lost_channel_does_no_more_harm_than_that():
    weight = normal(4, 16)
    weight[0] *= 1e-4  # All of it rounds to 0: as much noise as signal.
    (found,) = measured(linear(weight), [normal(64, 16, seed=1)]).values()
    assert found.sqnr_db == pytest.approx(10 * math.log10(4), abs=0.1)
    # Of ten inputs that are all about 1, four times 0.6 and six times -0.4 steps make nothing; rounded, they make 4.
    weight = normal(4, 10)
    weight[1] *= 1 / weight[1].abs().max()
    weight /= weight.abs().max()
    weight[0] = torch.tensor([0.6] * 4 + [-0.4] * 6) / 127
    (found,) = measured(linear(weight), [1 + 0.01 * normal(64, 10, seed=1)]).values()
    assert found.sqnr_db == pytest.approx(10 * math.log10(4), abs=0.5)


def test_what_remedies_correct_while_a_weight_is_quantized_counts():
    net, x = linear(normal(4, 8)), normal(64, 8, seed=1) + 1.0
    with instrument(net, x, "w4a8") as session:
        session.calibrate([x])
        runs, (layer,) = batch_runs(session, [x]), session.layers
        (before,) = weight_symptoms(session, runs)
        with torch.no_grad():
            exact = net(x)
            with session.modes("quantize", kind="weight"):
                shift = (net(x) - exact).mean(0)
        session.adjust({layer.key: Adjustment(bias_correction=-shift)})
        (unbiased,) = weight_symptoms(session, runs)
        session.adjust({layer.key: Adjustment(weight_correction=0.5 * normal(4, 8, seed=2))})
        (spoilt,) = weight_symptoms(session, runs)
    assert before.unbiased_gain > 0.5
    assert unbiased.sqnr_db == pytest.approx(before.sqnr_db + before.unbiased_gain, abs=1e-3)
    assert unbiased.unbiased_gain == pytest.approx(0.0, abs=1e-3)
    assert spoilt.sqnr_db < before.sqnr_db - 3


def test_only_the_first_batches_are_run_and_nothing_of_the_session_changes():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    batches = list(normal(64, 4).split(8))
    with instrument(net, batches[0], "int8") as session:
        session.calibrate(batches)
        session.set_mode("quantize", kind="weight")
        before = {name: (q.mode, q.encoding, q.observer.count) for name, q in session.quantizers.items()}
        ran: list[int] = []

        def runs(visit, most=None):
            batch_runs(session, batches)(lambda run, index: visit(lambda: (ran.append(index), run())[1], index), most)

        weight_symptoms(session, runs)
        assert ran == list(range(MOST_BATCHES))
        assert {name: (q.mode, q.encoding, q.observer.count) for name, q in session.quantizers.items()} == before


def test_what_is_not_finite_in_an_output_is_left_out():
    weight, x = normal(4, 8), normal(32, 8, seed=1)
    x[5, 2] = torch.inf
    (found,) = measured(linear(weight), [x]).values()
    (without,) = measured(linear(weight), [torch.cat([x[:5], x[6:]])]).values()
    assert found.sqnr_db == pytest.approx(without.sqnr_db, abs=1e-6)


@pytest.mark.parametrize(
    ("power", "other", "expected"),
    [(100.0, 1.0, 20), (1.0, 100.0, -20), (0.0, 0.0, 0), (1.0, 0.0, 200), (0.0, 1.0, -200), (1.0, 1e-30, 200)],
)
def test_decibels_stay_numbers(power, other, expected):
    assert decibels(power, other) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("op", "axis"), [("conv2d", -3), ("conv_transpose1d", -2), ("conv3d", -4), ("linear", -1), ("embedding", -1)]
)
def test_channels_of_a_result(op, axis):
    assert -1 - positions_of(op) == axis

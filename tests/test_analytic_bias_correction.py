"""Bias correction without data against the formulas of the paper, and on data that are as normal as it assumes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quantdebug.adjustment import Adjustment
from lightning_quantdebug.bias_correction import correct_bias_analytically
from lightning_quantdebug.instrument import instrument
from lightning_quantdebug.layers import Visit
from tests.mean_errors import (
    W4,
    analytic,
    calibrate_on,
    corrections,
    empirical,
    mean_errors,
    off_grid,
    quantized_in_numpy,
    recorded_on,
    runs_of,
)


def behind_norm(layer: nn.Module, activation: nn.Module, gamma: list[float], beta: list[float]) -> nn.Sequential:
    """Standard normal channels, a normalization, an activation and a layer."""
    channels = len(gamma)
    unit = nn.Conv2d(channels, channels, 1, bias=False)
    nn.init.dirac_(unit.weight)
    norm = nn.BatchNorm2d(channels, eps=1e-20)
    norm.weight.data, norm.bias.data = torch.tensor(gamma), torch.tensor(beta)
    return nn.Sequential(unit, norm, activation, layer).eval()


GAMMA, BETA = [1.0, -0.8, 2.0, 0.5], [0.2, 0.5, -1.0, -2.0]


def expected_input(activation: str) -> np.ndarray:
    """Nagel et al. 2019, appendix C, written with the error function."""
    found = []
    for gamma, beta in zip(np.abs(GAMMA), BETA, strict=True):

        def density(t: float) -> float:
            return math.exp(-t * t / 2) / math.sqrt(2 * math.pi)

        def below(t: float) -> float:
            return (1 + math.erf(t / math.sqrt(2))) / 2

        low, high = -beta / gamma, (6 - beta) / gamma
        relu = gamma * density(low) + beta * (1 - below(low))
        relu6 = gamma * (density(low) - density(high)) + beta * (below(high) - below(low)) + 6 * (1 - below(high))
        found.append({"identity": beta, "relu": relu, "relu6": relu6, "leaky": relu + 0.1 * (beta - relu)}[activation])
    return np.array(found)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky": lambda: nn.LeakyReLU(0.1),
}


def weight_error(layer: nn.Module) -> np.ndarray:
    return quantized_in_numpy(layer.weight) - layer.weight.detach().double().numpy()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["conv", "depthwise", "grouped", "transposed"])
def test_the_expected_error_is_the_formula(activation: str, kind: str) -> None:
    torch.manual_seed(0)
    layer = {
        "conv": nn.Conv2d(4, 6, 3),
        "depthwise": nn.Conv2d(4, 4, 3, groups=4, bias=False),
        "grouped": nn.Conv2d(4, 6, 3, groups=2),
        "transposed": nn.ConvTranspose2d(4, 6, 2, stride=2),
    }[kind]
    model, x = behind_norm(layer, ACTIVATIONS[activation](), GAMMA, BETA), torch.randn(2, 4, 8, 8)
    with instrument(model, x, W4) as session:
        session.calibrate([x])
        done = analytic(session, [x])
        found = corrections(session)["3"]
    error, mean = weight_error(layer), expected_input(activation)
    if kind == "transposed":
        # Stride and kernel are equal: each position of the output sees one tap of each input.
        expected = np.einsum("iokl,i->o", error, mean) / 4
    else:
        inputs, outputs = error.shape[1], error.shape[0]
        group = np.arange(outputs) // (outputs // layer.groups)
        expected = np.array(
            [error[o, i].sum() * mean[group[o] * inputs + i] for o in range(outputs) for i in range(inputs)]
        )
        expected = expected.reshape(outputs, inputs).sum(1)
    np.testing.assert_allclose(found, -expected, rtol=1e-4, atol=1e-6)
    assert done.changed == ("3",)
    assert done.skipped == (("0", "no batch normalization is ahead of it, but input"),)


def test_at_a_border_of_zeros_fewer_taps_see_the_input() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 3, 3, stride=2, padding=1)
    model, x = behind_norm(layer, nn.ReLU(), GAMMA, BETA), torch.randn(2, 4, 7, 5)
    with instrument(model, x, W4) as session:
        session.calibrate([x])
        analytic(session, [x])
        found = corrections(session)["3"]
    error, mean = weight_error(layer), expected_input("relu")
    expected, positions = np.zeros(3), 0
    for row in range(-1, 7 - 1, 2):
        for column in range(-1, 5 - 1, 2):
            positions += 1
            for i in range(3):
                for j in range(3):
                    if 0 <= row + i < 7 and 0 <= column + j < 5:
                        expected += error[:, :, i, j] @ mean
    np.testing.assert_allclose(found, -expected / positions, rtol=1e-4, atol=1e-6)


def test_a_linear_layer_behind_flattening() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(4 * 6, 5)
    model = behind_norm(nn.Sequential(nn.Flatten(), layer), nn.ReLU(), GAMMA, BETA)
    x = torch.randn(2, 4, 2, 3)
    with instrument(model, x, W4) as session:
        session.calibrate([x])
        analytic(session, [x])
        found = corrections(session)["3.1"]
    expected = weight_error(layer) @ np.repeat(expected_input("relu"), 6)
    np.testing.assert_allclose(found, -expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky"])
def test_a_planted_bias_is_removed_without_data(activation: str) -> None:
    """On data that are as normal as assumed; what is left is the noise of the sample."""
    layer = nn.Conv2d(4, 6, 3)
    layer.weight.data = off_grid(layer.weight)
    model = behind_norm(layer, ACTIVATIONS[activation](), GAMMA, BETA)
    x = torch.randn(3000, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    # The layer ahead is exact, so that the input is as normal when quantized.
    with instrument(model, x[:2], W4, exclude=["0.weight"]) as session:
        session.calibrate([x])
        before = mean_errors(session, [x])["3"]
        analytic(session, [x[:2]])
        after = mean_errors(session, [x])["3"]
        analytic_correction = corrections(session)["3"]
        empirical(session, [x])
        np.testing.assert_allclose(corrections(session)["3"], analytic_correction, atol=0.03 * np.abs(before).max())
    assert np.abs(before[1:]).min() > 0.3
    assert np.abs(after).max() < 0.03 * np.abs(before).max()


def test_a_second_analytic_correction_replaces_the_first() -> None:
    model, x = behind_norm(nn.Conv2d(4, 6, 3), nn.ReLU(), GAMMA, BETA), torch.randn(8, 4, 6, 6)
    with instrument(model, x, W4) as session:
        session.calibrate([x])
        analytic(session, [x])
        first = corrections(session)["3"]
        analytic(session, [x])
        np.testing.assert_allclose(corrections(session)["3"], first, rtol=1e-6)
        empirical(session, [x])
        assert not np.allclose(corrections(session)["3"], first, rtol=1e-3)
        analytic(session, [x])
        np.testing.assert_allclose(corrections(session)["3"], first, rtol=1e-5, atol=1e-7)


def test_of_an_equalized_pair_the_scaled_mean_counts() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3)
    model, x = behind_norm(layer, nn.ReLU(), GAMMA, BETA), torch.randn(8, 4, 6, 6)
    scale = torch.tensor([2.0, 0.5, 4.0, 0.25])
    with instrument(model, x, W4) as session:
        head, follower = session.layers
        session.adjust(
            {
                head.key: Adjustment(weight_scale=1 / scale.view(-1, 1, 1, 1), bias_scale=1 / scale),
                follower.key: Adjustment(weight_scale=scale.view(1, -1, 1, 1)),
            }
        )
        session.calibrate([x])
        analytic(session, [x])
        found = corrections(session)["3"]
    scaled = nn.Conv2d(4, 6, 3)
    scaled.weight.data = layer.weight.data * scale.view(1, -1, 1, 1)
    expected = weight_error(scaled).sum((2, 3)) @ (expected_input("relu") / scale.double().numpy())
    np.testing.assert_allclose(found, -expected, rtol=1e-4, atol=1e-6)


def test_a_normalization_that_is_folded_into_the_layer_behind_it() -> None:
    """The layer then reads what went into the normalization: its running mean."""
    torch.manual_seed(0)
    norm, layer = nn.BatchNorm2d(4, eps=1e-20), nn.Conv2d(4, 6, 3, bias=False)
    norm.running_mean, norm.running_var = torch.tensor([0.5, -1.0, 2.0, 0.0]), torch.tensor([1.0, 4.0, 0.25, 1.0])
    norm.weight.data, norm.bias.data = torch.tensor(GAMMA), torch.tensor(BETA)
    model, x = nn.Sequential(norm, layer).eval(), torch.randn(8, 4, 6, 6)
    with instrument(model, x, W4) as session:
        assert session.layers[0].fold is not None
        assert session.layers[0].fold.forward
        session.calibrate([x])
        state = session.state()
        analytic(session, [x])
        found = corrections(session)["1"]
        session.restore(state)
        session.adjust({session.layers[0].key: Adjustment(weight_scale=torch.tensor(2.0))})
        assert analytic(session, [x]).skipped == (("1", "what goes into 0 was rescaled by a remedy"),)
    folded = nn.Conv2d(4, 6, 3)
    folded.weight.data = layer.weight.data * (norm.weight.data / norm.running_var.sqrt()).view(1, -1, 1, 1)
    expected = weight_error(folded).sum((2, 3)) @ norm.running_mean.double().numpy()
    np.testing.assert_allclose(found, -expected, rtol=1e-4, atol=1e-6)


def test_without_batch_normalization_every_layer_says_why() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)).eval()
    x = torch.rand(4, 2, 6, 6)
    with instrument(model, x, W4) as session:
        session.calibrate([x])
        done = correct_bias_analytically(session, lambda visit: pytest.fail("it ran"))
        assert session.adjustments == {}
    assert done.changed == ()
    assert done.note == ""
    assert [name for name, _ in done.skipped] == ["0", "4"]
    assert dict(done.skipped)["0"] == "no batch normalization is ahead of it, but input"
    assert dict(done.skipped)["4"] == "the mean behind 2 (max_pool2d) has no closed form"


class OnTokens(nn.Module):
    """A linear layer along another axis than that of the channels, and one that is called on two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)
        self.along, self.twice = nn.Linear(6, 2), nn.Conv1d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        one, other = self.twice(x), self.twice(F.relu(x))
        return self.along(one + other)


def test_channels_that_can_not_be_followed_are_left_alone() -> None:
    model, x = OnTokens().eval(), torch.rand(5, 3, 6)
    with instrument(model, x, W4) as session:
        session.calibrate([x])
        done = analytic(session, [x])
        found = corrections(session)
    assert done.changed == ("twice", "twice@1")
    np.testing.assert_array_equal(found["twice"], found["twice@1"])
    # Of the two tensors the first has mean 0, the second is its positive part.
    mean = 0.5 / math.sqrt(2 * math.pi * (1 + model.norm.eps))
    np.testing.assert_allclose(found["twice"], -weight_error(model.twice).sum((1, 2)) * mean, rtol=1e-4, atol=1e-7)
    reasons = dict(done.skipped)
    assert reasons["along"] == "the channels of the input of along are not those of a normalization"
    assert done.note.startswith("2 of 4 layers have an input whose mean is known without data; the largest correction")


class Rounds(nn.Module):
    """A layer that goes round once or twice, each time on something else."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.layer = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1)
        self.second = nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        norms = [self.norm, self.second] if x.sum() > 0 else [self.norm]
        x = self.conv(x)
        for norm in norms:
            x = self.layer(F.relu(norm(x)))
        return x


def test_a_layer_that_reads_another_tensor_each_time_is_left_alone() -> None:
    model = Rounds()
    nn.init.ones_(model.second.bias)
    batches = (torch.rand(2, 2, 3, 3), -torch.rand(2, 2, 3, 3))
    session = recorded_on(model, W4, *batches)
    calibrate_on(session, *batches)
    done = correct_bias_analytically(session, lambda visit: pytest.fail("it ran"))
    assert ("layer", "layer reads another tensor each time") in done.skipped


def test_several_batches_are_used_until_every_layer_was_reached() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = behind_norm(nn.Identity(), nn.ReLU(), GAMMA, BETA)
            self.one, self.other = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(self.body(x)) if x.sum() > 0 else self.other(self.body(x))

    batches = (torch.rand(2, 4, 3, 3), -torch.rand(2, 4, 3, 3))
    session = recorded_on(Either(), W4, *batches)
    calibrate_on(session, *batches)
    state = session.state()
    runs, numbers = runs_of(session, *batches, *batches), []

    def counted(visit: Visit) -> None:
        def visit_and_count(run: Callable[[], Any], index: int) -> None:
            visit(lambda: (numbers.append(index), run()), index)

        runs(visit_and_count)

    assert correct_bias_analytically(session, counted).changed == ("one", "other")
    assert set(numbers) == {0, 1}
    session.restore(state)
    done = correct_bias_analytically(session, runs_of(session, batches[0]))
    assert done.changed == ("one",)
    assert ("other", "no calibration batch reached it") in done.skipped

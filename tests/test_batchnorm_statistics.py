"""Statistics behind batch normalizations against large samples of normal channels."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quantdebug.adjustment import Adjustment
from lightning_quantdebug.batchnorm_statistics import BatchNormStatistics, UnknownStatisticsError, batchnorm_ranges
from lightning_quantdebug.instrument import instrument

GAMMA = [1.0, -0.5, 2.0, 0.0, -3.0]
BETA = [0.3, 1.0, -1.0, 2.0, 4.0]
EPS = 1e-5


def unit_conv(channels: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, channels, 1, bias=False)
    nn.init.dirac_(conv.weight)
    return conv


def norm(channels: int = 5) -> nn.BatchNorm2d:
    """A normalization whose input is standard normal."""
    found = nn.BatchNorm2d(channels, eps=EPS)
    found.weight.data = torch.tensor(GAMMA[:channels])
    found.bias.data = torch.tensor(BETA[:channels])
    return found


class Behind(nn.Module):
    """Standard normal channels, a normalization that is folded, and any operation."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm = unit_conv(5), norm()
        self.other, self.other_norm = unit_conv(5), norm()
        self.other_norm.bias.data.neg_()
        self.prelu = nn.PReLU(5)
        self.prelu.weight.data = torch.tensor([-0.5, 0.2, 0.3, 0.4, 1.5])
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        own = self.norm(self.conv(x))
        if self.operation == "prelu":
            return self.prelu(own)
        if self.operation in ("add", "add_relu", "cat", "cat_last", "add_alpha"):
            other = self.other_norm(self.other(x.flip(0)))
            if self.operation == "add_alpha":
                return torch.add(own, other, alpha=2)
            if self.operation.startswith("cat"):
                return torch.cat([own, F.relu(other)], dim=1 if self.operation == "cat" else 3)
            return F.relu(own + other) if self.operation == "add_relu" else own + other
        return self.operation(own)


KNOWN: dict[str, Callable[[Tensor], Tensor] | str] = {
    "identity": lambda x: x.contiguous(),
    "relu": F.relu,
    "relu_": lambda x: F.relu_(x),
    "relu6": F.relu6,
    "hardtanh": lambda x: F.hardtanh(x, -0.5, 1.5),
    "hardtanh by name": lambda x: F.hardtanh(x, max_val=1.5),
    "clamp": lambda x: torch.clamp(x, -0.5, 2),
    "clamp by name": lambda x: x.clamp(min=-0.5),
    "clamp half by name": lambda x: x.clamp(-0.5, max=2),
    "clamp_min": lambda x: torch.clamp_min(x, 0.25),
    "clamp_max": lambda x: x.clamp_max(0.25),
    "leaky": lambda x: F.leaky_relu(x, 0.2),
    "leaky by default": F.leaky_relu,
    "prelu": "prelu",
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "avg_pool": lambda x: F.avg_pool2d(F.relu(x), 2),
    "adaptive": lambda x: F.adaptive_avg_pool2d(F.relu6(x), 1),
    "mean": lambda x: F.relu(x).mean((2, 3)),
    "mean keeping axes": lambda x: x.mean((2, 3), keepdim=True),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2),
    "pad by reflection": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "two activations": lambda x: F.relu(x).contiguous(),
    "add": "add",
    "cat": "cat",
}


def last_statistics(model: nn.Module, batch: Tensor) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, np.ndarray]:
    """Mean, variance and range of what the network returns."""
    with instrument(model.eval(), batch) as session:
        value = session.topology.runs[0][-1].outputs[0]
        found = BatchNormStatistics(session).of(value)
        variance = None if found.variance is None else found.variance.numpy()
        return found.mean.numpy(), variance, found.low.numpy(), found.high.numpy()


def channels_of(x: Tensor) -> np.ndarray:
    """Every sample of each channel, ``(C, samples)``."""
    return x.detach().double().transpose(0, 1).flatten(1).numpy()


@pytest.mark.parametrize("name", KNOWN)
def test_statistics_are_those_of_a_large_sample(name: str) -> None:
    torch.manual_seed(0)
    model = Behind(KNOWN[name]).eval()
    x = torch.randn(6000, 5, 4, 4)
    mean, variance, low, high = last_statistics(model, x[:2])
    with torch.no_grad():
        sample = channels_of(model(x))
    spread = 3.0 / math.sqrt(6000 * 16)
    np.testing.assert_allclose(mean, sample.mean(1), atol=6 * spread)
    assert (low <= sample.min(1) + 1e-5).all()
    assert (high >= sample.max(1) - 1e-5).all()
    if variance is not None:
        np.testing.assert_allclose(variance, sample.var(1), rtol=0.03, atol=1e-3)
    assert (variance is None) == (name in ("avg_pool", "adaptive", "mean", "mean keeping axes", "interpolate"))


def test_flattening_repeats_each_channel() -> None:
    mean, variance, _, _ = last_statistics(Behind(lambda x: F.relu(x).flatten(1)), torch.randn(2, 5, 2, 3))
    alone, spread, _, _ = last_statistics(Behind(F.relu), torch.randn(2, 5, 2, 3))
    assert variance is not None
    np.testing.assert_array_equal(mean, np.repeat(alone, 6))
    np.testing.assert_array_equal(variance, np.repeat(spread, 6))
    squeezed, _, _, _ = last_statistics(Behind(lambda x: F.relu(x).view(2, 5, -1)), torch.randn(2, 5, 2, 3))
    np.testing.assert_array_equal(squeezed, alone)


def test_a_sum_is_taken_as_normal_behind_an_activation() -> None:
    mean, _, low, high = last_statistics(Behind("add_relu"), torch.randn(2, 5, 4, 4))
    means = np.array(BETA) - np.array(BETA)
    spreads = np.sqrt(2) * np.abs(GAMMA) / math.sqrt(1 + EPS)
    np.testing.assert_allclose(mean, means + spreads / math.sqrt(2 * math.pi), rtol=1e-6)
    np.testing.assert_allclose(low, 0)
    np.testing.assert_allclose(high, 6 * spreads, rtol=1e-6)


def test_the_range_of_a_sum_is_no_wider_than_its_parts() -> None:
    """What is never negative adds up to what is never negative, whatever six deviations reach."""
    _, _, low, _ = last_statistics(Behind(lambda x: F.relu(x) + F.relu(x)), torch.randn(2, 5, 4, 4))
    np.testing.assert_array_equal(low, [0, 0, 0, 4, 0])  # The fourth channel is constant: gamma is 0.


def test_gamma_may_be_negative_and_a_channel_may_hardly_vary() -> None:
    model = Behind(lambda x: x.contiguous())
    model.norm.running_var = torch.tensor([1.0, 1e-9, 0.5, 1.0, 1e-5])
    mean, variance, low, high = last_statistics(model, torch.randn(2, 5, 4, 4))
    running = model.norm.running_var.double().numpy()
    std = np.abs(GAMMA) * np.sqrt(running / (running + EPS))
    np.testing.assert_allclose(mean, BETA, rtol=1e-6)
    np.testing.assert_allclose(variance, std**2, rtol=1e-6)
    np.testing.assert_allclose(low, np.array(BETA) - 6 * std, rtol=1e-6)
    np.testing.assert_allclose(high, np.array(BETA) + 6 * std, rtol=1e-6)


class Standing(nn.Module):
    """A normalization that follows nothing it could be folded into, by any way of calling it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.norm, self.how = norm(), how
        self.norm.eps = 0.5
        self.conv = nn.Conv2d(5, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        if self.how == "function":
            x = F.batch_norm(x, n.running_mean, n.running_var, n.weight, bias=n.bias, eps=n.eps)
        elif self.how == "builtin":
            x = torch.batch_norm(x, n.weight, n.bias, n.running_mean, n.running_var, False, 0.1, n.eps, True)
        else:
            x = n(x)
        return self.conv(F.relu(x))


@pytest.mark.parametrize("how", ["module", "function", "builtin"])
def test_a_normalization_that_stays_tells_as_much(how: str) -> None:
    torch.manual_seed(0)
    model, x = Standing(how).eval(), torch.randn(4000, 5, 4, 4)
    with instrument(model, x[:2]) as session:
        value = next(op for op in session.topology if op.op == "relu").outputs[0]
        found = BatchNormStatistics(session).of(value).mean.numpy()
    np.testing.assert_allclose(found, channels_of(F.relu(model.norm(x))).mean(1), atol=0.05)


def test_without_affine_there_is_no_shift() -> None:
    model = Behind(lambda x: x.contiguous())
    model.norm = nn.BatchNorm2d(5, affine=False, eps=EPS)
    mean, variance, _, _ = last_statistics(model, torch.randn(2, 5, 4, 4))
    np.testing.assert_array_equal(mean, 0)
    np.testing.assert_allclose(variance, 1 / (1 + EPS), rtol=1e-6)


UNKNOWN: dict[str, tuple[Callable[[Tensor], Tensor] | str, str]] = {
    "max_pool": (lambda x: F.max_pool2d(x, 2), r"the mean behind .*max_pool2d.* has no closed form"),
    "gelu": (F.gelu, r"the mean behind gelu \(gelu\) has no closed form"),
    "zero padding": (lambda x: F.pad(x, (1, 1, 1, 1)), r"the mean behind pad \(pad\) has no closed form"),
    "activation behind an average": (
        lambda x: F.relu(F.avg_pool2d(x, 2)),
        "the spread of what goes into relu is not known behind an average",
    ),
    "leaky behind an average": (
        lambda x: F.leaky_relu(F.avg_pool2d(x, 2)),
        "the spread of what goes into leaky_relu is not known behind an average",
    ),
    "padded average": (
        lambda x: F.avg_pool2d(x, 3, 2, 1),
        "avg_pool2d averages zeros of its padding as well",
    ),
    "average of channels": (lambda x: x.mean(1), "mean averages over something else than positions"),
    "average of samples": (lambda x: x.mean(0, keepdim=True).mean(1, keepdim=True), "over something else than"),
    "transposed": (lambda x: x.transpose(1, 2), r"the mean behind transpose"),
    "taken apart": (lambda x: x.reshape(10, 40), "reshape takes the channels apart"),
    "flattened whole": (lambda x: x.flatten(), "the result of flatten has no channels that could be followed"),
    "sum with a constant": (lambda x: x + torch.ones(5, 1, 1), "add adds something of which nothing is known"),
    "scaled sum": ("add_alpha", "add adds something of which nothing is known"),
    "sum of shapes": (lambda x: x + x.mean((2, 3), keepdim=True), "add adds tensors of different shapes"),
    "clip to a tensor": (lambda x: x.clamp(torch.zeros(())), "clamp clips to tensors"),
    "joined positions": ("cat_last", "cat joins something else than channels"),
    "input": (lambda x: torch.ones(3).sum() * x, r"the mean behind mul"),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_says_why(name: str) -> None:
    operation, reason = UNKNOWN[name]
    with pytest.raises(UnknownStatisticsError, match=reason):
        last_statistics(Behind(operation), torch.randn(2, 5, 4, 10))


def test_as_many_positions_as_channels_could_be_either() -> None:
    with pytest.raises(UnknownStatisticsError, match="mean averages over something else than positions"):
        last_statistics(Behind(lambda x: x.mean((1, 3))), torch.randn(2, 5, 5, 4))


def test_an_input_has_no_statistics() -> None:
    with pytest.raises(UnknownStatisticsError, match="no batch normalization is ahead of it, but input"):
        last_statistics(nn.Sequential(nn.ReLU()), torch.randn(2, 5, 4, 4))


def test_a_normalization_of_the_batch_has_no_statistics() -> None:
    model = nn.Sequential(nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5, track_running_stats=False))
    with pytest.raises(UnknownStatisticsError, match="1 computes the statistics of each batch"):
        last_statistics(model, torch.randn(2, 5, 4, 4))


class Moved(nn.Module):
    """A normalization whose statistics are computed in the network."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = unit_conv(5), norm()

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        return F.batch_norm(self.conv(x), n.running_mean * 2, n.running_var, n.weight, n.bias)


def test_computed_statistics_are_not_looked_up() -> None:
    with pytest.raises(UnknownStatisticsError, match="computes the statistics of each batch"):
        last_statistics(Moved(), torch.randn(2, 5, 4, 4))


def test_an_equalized_layer_is_read_as_it_is_now() -> None:
    model = Behind(F.relu6)
    scale, shift = torch.tensor([0.5, 2.0, 4.0, 1.0, 0.25]), torch.tensor([0.0, 0.1, -0.2, 0.0, 1.0])
    with instrument(model.eval(), torch.randn(2, 5, 4, 4)) as session:
        layer = session.layers[0]
        clip = session.topology.runs[0][-1]
        session.adjust(
            {
                layer.key: Adjustment(
                    weight_scale=scale.view(-1, 1, 1, 1),
                    bias_scale=scale,
                    bias_offset=shift,
                    bias_correction=torch.full((5,), 100.0),
                ),
                clip.key: Adjustment(bounds_scale=scale.view(-1, 1, 1)),
            }
        )
        found = BatchNormStatistics(session).of(clip.outputs[0])
        ahead = BatchNormStatistics(session).of(clip.inputs[0][1])
        ranges = batchnorm_ranges(session)
    beta, gamma = np.array(BETA) * scale.numpy() + shift.numpy(), np.abs(GAMMA) * scale.numpy() / math.sqrt(1 + EPS)
    np.testing.assert_allclose(ahead.mean.numpy(), beta, rtol=1e-6)
    np.testing.assert_allclose(ahead.variance.numpy(), gamma**2, rtol=1e-6)
    np.testing.assert_allclose(found.high.numpy(), np.clip(beta + 6 * gamma, 0, 6 * scale.numpy()), rtol=1e-6)
    generator = np.random.default_rng(0)
    drawn = np.clip(generator.normal(beta, gamma, (200_000, 5)), 0, 6 * scale.numpy())
    np.testing.assert_allclose(found.mean.numpy(), drawn.mean(0), atol=0.05)
    assert ranges["relu6"] == pytest.approx((0.0, float(np.clip(beta + 6 * gamma, 0, 6 * scale.numpy()).max())))


def test_bounds_that_differ_by_position_are_not_followed() -> None:
    with instrument(Behind(F.relu6).eval(), torch.randn(2, 5, 4, 4)) as session:
        clip = session.topology.runs[0][-1]
        session.adjust({clip.key: Adjustment(bounds_scale=torch.ones(5, 4, 4))})
        with pytest.raises(UnknownStatisticsError, match="relu6 clips each position of a channel to another range"):
            BatchNormStatistics(session).of(clip.outputs[0])


def test_ranges_of_activations_come_from_gamma_and_beta() -> None:
    model = nn.Sequential(
        unit_conv(5), norm(), nn.ReLU(), unit_conv(5), norm(), nn.ReLU6(), nn.AvgPool2d(2), unit_conv(5), norm()
    ).eval()
    std = np.abs(GAMMA) / math.sqrt(1 + EPS)
    high, low = (np.array(BETA) + 6 * std).max(), (np.array(BETA) - 6 * std).min()
    with instrument(model, torch.randn(2, 5, 4, 4)) as session:
        ranges = batchnorm_ranges(session)
        narrow = batchnorm_ranges(session, deviations=1.0)
        assert set(session.quantizers) - set(ranges) == {"input", "0.weight", "3.weight", "7.weight"}
    assert ranges["2"] == pytest.approx((0.0, high))
    assert ranges["5"] == (0.0, 6.0)
    assert ranges["6"] == (0.0, 6.0)
    assert ranges["8"] == pytest.approx((low, high))
    assert narrow["8"] == pytest.approx(((np.array(BETA) - std).min(), (np.array(BETA) + std).max()))


def test_a_joined_range_holds_every_part() -> None:
    with instrument(Behind("cat").eval(), torch.randn(2, 5, 4, 4)) as session:
        ranges = batchnorm_ranges(session)
        assert len([name for name in ranges if name == "cat"]) == 1
    std = np.abs(GAMMA) / math.sqrt(1 + EPS)
    assert ranges["cat"] == pytest.approx(((np.array(BETA) - 6 * std).min(), (np.array(BETA) + 6 * std).max()))


def test_a_range_by_definition_is_left_alone() -> None:
    with instrument(Behind(torch.sigmoid).eval(), torch.randn(2, 5, 4, 4)) as session:
        assert "sigmoid" in session.quantizers
        assert "sigmoid" not in batchnorm_ranges(session)


def test_ranges_hold_what_the_network_gives_on_normal_data() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 5, 4, 4)
    model = nn.Sequential(unit_conv(5), norm(), nn.ReLU6(), nn.Flatten(), nn.Linear(80, 3)).eval()
    with instrument(model, x) as session:
        session.calibrate([x])
        for name, (low, high) in batchnorm_ranges(session).items():
            observer = session.quantizers[name].observer
            assert low - 1e-5 <= observer.range_min, name
            assert observer.range_max <= high + 1e-5, name

"""What is measured of activations, against plain sums over the values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_quantdebug.activation_symptoms import (
    ActivationSymptoms,
    activation_symptoms,
    bulk_range,
    channel_axis,
    damage,
    outlier_channels,
    width_gain,
)
from lightning_quantdebug.instrument import batch_runs, instrument
from lightning_quantdebug.layers import Runs, Visit
from lightning_quantdebug.observer import Histogram, Observer
from lightning_quantdebug.weight_symptoms import MOST_BATCHES

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Scaled(nn.Module):
    """Inputs times fixed factors, and back: the quantizer of the product is the only one that can do harm."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(len(factors), len(factors), False), nn.Linear(len(factors), len(factors), False)
        with torch.no_grad():
            self.up.weight.copy_(torch.diag(factors))
            self.down.weight.copy_(torch.diag(1 / factors))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


def measured(
    net: nn.Module, batches: list[Tensor], target: object = "int8", most: int = 9
) -> dict[str, ActivationSymptoms]:
    net.eval()
    with instrument(net, batches[0], target) as session:  # type: ignore[arg-type]
        session.calibrate(batches)
        found = activation_symptoms(session, batch_runs(session, batches), most)
        return {item.quantizer: item for item in found}


# Damage.


def test_damage_is_its_definition():
    exact, moved = normal(16, 5), normal(16, 5) + 0.3 * normal(16, 5, seed=1)
    ours = damage(exact, moved)
    y, z = exact.double().numpy(), moved.double().numpy()
    unit = np.sort(np.abs(y - np.roll(y, 1, axis=0)), axis=None)[39]
    assert ours == pytest.approx(np.minimum(np.abs(z - y) / unit, 1).mean(), rel=1e-9)


def test_neither_a_huge_output_nor_a_few_spoilt_ones_decide():
    exact = normal(64, 10)
    moved = exact + 0.1 * normal(64, 10, seed=1)
    plain = damage(exact, moved)
    huge = torch.cat([exact, 1000 * normal(64, 1, seed=2)], 1)
    assert damage(huge, torch.cat([moved, huge[:, 10:] + 1.0], 1)) < 3 * plain
    spoilt = moved.clone()
    spoilt[0, 0] = 1e6
    assert damage(exact, spoilt) < plain + 2 / 640


@pytest.mark.parametrize(
    ("exact", "moved", "expected"),
    [
        (torch.zeros(3, 2), torch.zeros(3, 2), 0.0),
        (torch.zeros(3, 2), torch.ones(3, 2), 1.0),
        (torch.tensor([4.0]), torch.tensor([5.0]), 0.25),
        (torch.tensor(4.0), torch.tensor(3.0), 0.25),
        (torch.tensor([[1.0], [2.0]]), torch.tensor([[torch.nan], [torch.inf]]), 1.0),
        (torch.tensor([0.0, 0.0, 0.0, 3.0]), torch.tensor([0.0, 0.0, 0.0, 3.3]), 0.05),
        (torch.tensor([torch.inf, 1.0]), torch.tensor([1.0, 1.0]), 1.0),
        (torch.empty(0, 2), torch.empty(0, 2), 0.0),
    ],
)
def test_damage_at_the_ends(exact, moved, expected):
    assert damage(exact, moved) == pytest.approx(expected)


# Pure parts.


def test_the_bulk_leaves_out_one_in_a_thousand():
    values = normal(200_000)
    values[:20] = 8.0
    observer = Observer(values_per_sample=None)
    observer.observe(values)
    low, high = bulk_range(observer.histogram, observer.range_min, observer.range_max)
    width = observer.histogram.bin_width
    exact = np.quantile(values.numpy(), [0.0005, 0.9995])
    assert low == pytest.approx(exact[0], abs=2 * width)
    assert high == pytest.approx(exact[1], abs=2 * width)


def test_the_bulk_does_not_reach_beyond_what_was_seen():
    histogram = Histogram(torch.tensor([5, 5]), 0.0, 2.0)
    assert bulk_range(histogram, 0.25, 1.5) == (0.25, 1.5)


@pytest.mark.parametrize(
    ("whole", "part", "expected"),
    [
        ((-1, 3), (-1, 1), 6.02),
        ((0, 8), (2, 4), 6.02),
        ((-8, -1), (-2, -1), 12.04),
        ((0, 1), (0, 2), 0),
        ((0, 1), (0, 0), 0),
    ],
)
def test_half_a_range_is_worth_six_decibels(whole, part, expected):
    assert width_gain(whole, part) == pytest.approx(expected, abs=0.01)


def test_outlier_channels_are_those_before_the_greatest_drop():
    low, high = [0.0] * 32, [1.0] * 32
    high[7], high[20], low[3] = 50.0, 60.0, -40.0
    channels, gain = outlier_channels(low, high)
    assert channels == (3, 7, 20)
    assert gain == pytest.approx(20 * math.log10(100.0))


def test_at_most_an_eighth_of_the_channels_are_outliers():
    high = [1.0] * 8 + [100.0] * 8
    channels, gain = outlier_channels([0.0] * 16, high)
    assert len(channels) <= 2
    assert gain == 0.0


@pytest.mark.parametrize(("low", "high"), [([0.0], [5.0]), ([0.0, 0.0], [0.0, 0.0]), ([], [])])
def test_one_channel_or_none_has_no_outlier(low, high):
    assert outlier_channels(low, high) == ((), 0.0)


# Symptoms of a network.


def test_the_channel_that_carries_the_range_is_found_and_its_cost():
    factors = torch.ones(12)
    factors[5] = 100.0
    x = normal(64, 12)
    found = measured(Scaled(factors), list(x.split(16)))["up"]
    scaled = (x * factors).numpy()
    others = np.delete(scaled, 5, axis=1)
    assert found.outlier_channels == (5,)
    assert found.outlier_gain == pytest.approx(20 * np.log10(np.ptp(scaled) / np.ptp(others)), abs=0.01)
    assert found.uneven_gain > 30
    assert found.channels == 12
    assert found.observed == pytest.approx((scaled.min(), scaled.max()))
    assert not found.is_output
    assert found.damage > 0.2


def test_the_median_channel_tells_unevenness():
    factors = torch.logspace(-2, 0, 9)
    x = torch.rand(256, 9, generator=torch.Generator().manual_seed(0))
    found = measured(Scaled(factors), [x])["up"]
    assert found.uneven_gain == pytest.approx(20.0, abs=0.2)


def test_the_noise_is_split_and_a_better_range_found():
    x = normal(256, 64)
    x[0, 0] = 40.0
    layer = nn.Linear(64, 8)
    target = {"preset": "w8a4", "activations": {"range_setting": "min_max"}}
    found = measured(nn.Sequential(layer), [x], target)["input"]
    assert found.clipping_share < 0.1
    assert found.range_gain > 6.0
    assert found.bulk_gain > 15.0
    (by_mse,) = (item for name, item in measured(nn.Sequential(layer), [x], "w8a4").items() if name == "input")
    assert by_mse.range_gain == pytest.approx(0.0, abs=1e-6)
    assert by_mse.clipping_share > found.clipping_share


def test_a_grid_that_is_not_used_and_a_side_with_few_levels():
    x = torch.rand(256, 16, generator=torch.Generator().manual_seed(0))
    symmetric = {"preset": "int8", "activations": {"symmetric": True}}
    found = measured(nn.Sequential(nn.Linear(16, 4)), [x], symmetric)["input"]
    assert found.unused_gain == pytest.approx(6.02, abs=0.1)
    assert measured(nn.Sequential(nn.Linear(16, 4)), [x])["input"].unused_gain == pytest.approx(0.0, abs=0.05)
    lopsided = torch.where(x < 0.5, -0.04 * x, 2 * x)
    found = measured(nn.Sequential(nn.Linear(16, 4)), [lopsided])["input"]
    assert found.short_levels in (2, 3)
    assert found.short_share == pytest.approx(0.5, abs=0.02)
    mirrored = measured(nn.Sequential(nn.Linear(16, 4)), [-lopsided])["input"]
    assert mirrored.short_levels in (2, 3)
    assert mirrored.short_share == pytest.approx(0.5, abs=0.02)


def test_dead_channels_are_counted():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with torch.no_grad():
        net[0].bias.copy_(torch.tensor([1.0, -99.0, 1.0, -99.0, -99.0, 1.0]))
    assert measured(net, [normal(32, 4)])["1"].dead == (1, 3, 4)


def test_the_guiltiest_come_first_and_the_innocent_are_left_out():
    factors = torch.ones(12)
    factors[5] = 100.0
    net = nn.Sequential(Scaled(factors), nn.Linear(12, 4))
    x = normal(64, 12)
    found = measured(net, [x])
    damages = [item.damage for item in found.values()]
    assert next(iter(found)) == "0.up"
    assert damages == sorted(damages, reverse=True)
    assert min(damages) >= damages[0] / 4
    assert "input" not in found
    assert len(measured(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)), [normal(8, 4)], most=2)) == 2


def test_a_tensor_with_one_number_for_each_sample_has_no_channels():
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).mean((1, 2, 3)) * 2.0

    found = measured(Mean(), [normal(8, 3, 6, 6)])["mean"]
    assert (found.channels, found.outlier_channels) == (1, ())


def test_each_quantizer_is_judged_alone():
    net, x = (
        nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(),
        normal(32, 8),
    )
    found = measured(net, [x], "w8a4")
    assert len(found) == 4
    with instrument(net, x, "w8a4") as session, torch.no_grad():
        session.calibrate([x])
        exact = net(x)
        for name, item in found.items():
            with session.modes("quantize", name):
                assert item.damage == pytest.approx(damage(exact, net(x)), rel=1e-6)


def test_of_joined_tensors_the_one_with_most_values_is_looked_at():
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.head = nn.Linear(4, 8), nn.Linear(4, 2), nn.Linear(10, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.cat([self.one(x), self.two(x)], 1))

    assert measured(Joined(), [normal(32, 4)])["cat"].channels == 10


def test_only_what_nothing_reads_any_more_is_an_output():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.one(x)
            return y, self.two(y)

    found = measured(Both(), [normal(32, 4)])
    assert {name: item.is_output for name, item in found.items()} == {"input": False, "one": False, "two": True}


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x)) + 1.0
        z = self.norm(y.flatten(2).transpose(1, 2))
        return torch.sigmoid(self.head(z))


def test_the_axis_of_the_channels_follows_the_layers():
    net, x = Mixed().eval(), normal(2, 3, 6, 6)
    with instrument(net, x) as session:
        axes = {name: channel_axis(session, name) for name in session.quantizers}
    assert axes["input"] == 1
    assert axes["add"] == 1
    assert axes["norm"] == axes["head"] == axes["sigmoid"] == -1


def test_a_sum_of_inputs_alone_has_its_channels_last():
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x * 2.0

    net, x = Sum(), normal(4, 3)
    with instrument(net, x) as session:
        assert {channel_axis(session, name) for name in session.quantizers} == {-1}


def test_nothing_of_the_session_changes_also_after_an_exception():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    batches = list(normal(64, 4).split(8))
    with instrument(net, batches[0], "int8") as session:
        session.calibrate(batches)
        session.set_mode("quantize", kind="weight")
        before = {name: (q.mode, q.encoding, q.observer) for name, q in session.quantizers.items()}
        plain = batch_runs(session, batches)
        ran: list[int] = []

        def breaking(after: int) -> Runs:
            def runs(visit: Visit, most: int | None = None) -> None:
                def watched(run: Callable[[], Any], index: int) -> None:
                    def counted() -> Any:
                        ran.append(index)
                        if len(ran) > after:
                            raise KeyboardInterrupt
                        return run()

                    visit(counted, index)

                plain(watched, most)

            return runs

        activation_symptoms(session, breaking(1000), 5)
        assert {name: (q.mode, q.encoding, q.observer) for name, q in session.quantizers.items()} == before
        # FP32 and each of the three quantizers alone on the first batch; then the channels on the first few.
        assert ran == [0] * 4 + list(range(MOST_BATCHES))
        for after in (0, 2, 6):
            ran.clear()
            with pytest.raises(KeyboardInterrupt):
                activation_symptoms(session, breaking(after), 5)
            assert {name: (q.mode, q.encoding, q.observer) for name, q in session.quantizers.items()} == before

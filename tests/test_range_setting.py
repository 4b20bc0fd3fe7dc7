"""Range setting against brute force over float64 ranges, and its worth where min-max fails."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from lightning_quantdebug.encoding import encoding_from_range
from lightning_quantdebug.errors import CalibrationError, SettingsError
from lightning_quantdebug.fake_quantize import fake_quantize
from lightning_quantdebug.observer import Observer
from lightning_quantdebug.range_setting import range_from_observer, range_from_tensor
from lightning_quantdebug.target import Granularity, QuantSpec, RangeSetting

MSE = RangeSetting.MSE


def sample(name: str, count: int = 40_000, seed: int = 0) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    gauss = generator.normal(size=count)
    if name == "gauss_outliers":
        gauss[:: count // 10] = generator.normal(size=gauss[:: count // 10].size) * 30
    values = {
        "gauss": gauss,
        "relu_gauss": np.maximum(gauss, 0),
        "silu": 2 * gauss / (1 + np.exp(-2 * gauss)),
        "laplace": generator.laplace(size=count),
        "lognormal": generator.lognormal(0, 1.0, size=count),
        "gauss_outliers": gauss,
    }[name]
    return torch.from_numpy(values).float()


SHAPES = ["gauss", "relu_gauss", "silu", "laplace", "lognormal", "gauss_outliers"]


class SortedValues:
    """The slow twin: exact float64 error of a grid, from cumulative sums over the sorted values."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = np.sort(x.double().numpy().ravel())
        self.first = np.concatenate([[0], np.cumsum(self.x)])
        self.second = np.concatenate([[0], np.cumsum(self.x**2)])

    def error(self, scale: float, zero_point: int, quant_min: int, quant_max: int) -> float:
        steps = np.arange(quant_min - zero_point, quant_max - zero_point + 1, dtype=np.float64)
        cuts = np.searchsorted(self.x, (steps[:-1] + 0.5) * scale)
        cuts = np.concatenate([[0], cuts, [self.x.size]])
        level = steps * scale
        count, first = np.diff(cuts), np.diff(self.first[cuts])
        return float((np.diff(self.second[cuts]) - 2 * level * first + level**2 * count).sum() / self.x.size)

    def best(self, spec: QuantSpec, scales: int) -> float:
        """Least error over scales and, up to 4 bits all, above some, zero points."""
        low, high = min(self.x[0], 0.0), max(self.x[-1], 0.0)
        zero_points = [0]
        whole = max(high / spec.quant_max, low / spec.quant_min) if spec.symmetric else (high - low) / spec.quant_max
        if not spec.symmetric:
            zero_points = range(spec.quant_max + 1)
            if low == 0:
                zero_points = [0]
            elif spec.bit_width > 4:
                zero_points = range(0, spec.quant_max + 1, 2 ** (spec.bit_width - 5))
        shares = np.geomspace(1 / 100, 1, scales)
        return min(
            self.error(whole * share, zero, spec.quant_min, spec.quant_max) for zero in zero_points for share in shares
        )


def own_error(x: torch.Tensor, spec: QuantSpec, ends: tuple[torch.Tensor, torch.Tensor]) -> float:
    error = fake_quantize(x, encoding_from_range(*ends, spec)) - x
    return float(error.double().square().mean())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("bit_width", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_from_the_histogram_is_as_good_as_brute_force(name, bit_width, symmetric):
    x = sample(name)
    spec = QuantSpec(bit_width, symmetric=symmetric, range_setting=MSE)
    observer = Observer(values_per_sample=None)
    observer.observe(x)
    ends = range_from_observer(observer, spec)
    assert own_error(x, spec, ends) <= 1.005 * SortedValues(x).best(spec, 300 if bit_width < 8 else 100)
    if bit_width == 4:
        assert range_from_tensor(x, spec) == ends


def test_rare_outliers_on_both_sides_need_both_ends_at_once():
    x = sample("gauss")
    x[:25], x[25:50] = -20.0, 20.0
    spec = QuantSpec(4, range_setting=MSE)
    whole = own_error(x, spec, (x.min(), x.max()))
    one_end = (torch.tensor(-3.0), x.max())
    assert own_error(x, spec, one_end) > own_error(x, spec, range_from_tensor(x, spec))
    assert own_error(x, spec, range_from_tensor(x, spec)) <= 1.005 * SortedValues(x).best(spec, 300) < 0.9 * whole


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bit_width", [2, 4, 8])
@pytest.mark.parametrize("shape", [(6, 9), (6, 64), (3, 100_000)])
def test_mse_of_each_channel_is_near_brute_force(symmetric, bit_width, shape):
    x = torch.cat([sample(name, shape[0] * shape[1] // 3, 1) for name in ("gauss", "laplace", "relu_gauss")])
    x = x.view(shape) * torch.logspace(-3, 2, shape[0])[:, None]
    spec = QuantSpec(bit_width, symmetric=symmetric, granularity=Granularity.PER_CHANNEL, range_setting=MSE)
    low, high = range_from_tensor(x, spec, 0)
    alone = QuantSpec(bit_width, symmetric=symmetric)
    for row, *ends in zip(x, low, high, strict=True):
        brute_force = SortedValues(row).best(alone, 200)
        slack = 1e-9 * float(row.square().mean())
        # Few values have a ragged error, which the coarser search for weights follows less closely.
        assert own_error(row, alone, ends) <= {9: 1.6, 64: 1.1, 100_000: 1.02}[shape[1]] * brute_force + slack
        assert own_error(row, alone, ends) <= own_error(row, alone, row.aminmax()) * (1 + 1e-6)


@pytest.mark.parametrize("range_setting", list(RangeSetting))
@pytest.mark.parametrize("symmetric", [False, True])
def test_channels_and_groups_are_the_rows_of_the_weight(range_setting, symmetric):
    x = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    fields = {"bit_width": 4, "symmetric": symmetric, "range_setting": range_setting}
    per_channel = QuantSpec(granularity=Granularity.PER_CHANNEL, **fields)
    first = range_from_tensor(x.transpose(0, 1), per_channel, 0)
    assert torch.equal(torch.stack(first), torch.stack(range_from_tensor(x, per_channel, 1)))
    per_group = QuantSpec(granularity=Granularity.PER_GROUP, group_size=9, **fields)
    grouped = range_from_tensor(x.flatten(1), per_group, 0)
    flat = range_from_tensor(x.reshape(24, 9), per_channel, 0)
    assert grouped[0].shape == (4, 6)
    assert torch.equal(torch.stack(grouped).flatten(1), torch.stack(flat))


def test_min_max_is_the_default_from_8_bits_up():
    x = sample("gauss_outliers")
    observer = Observer(values_per_sample=None)
    observer.observe(x)
    whole = tuple(x.aminmax())
    for bit_width, expected in [(8, True), (16, True), (32, True), (7, False), (4, False)]:
        spec = QuantSpec(bit_width, symmetric=True)
        assert (range_from_observer(observer, spec) == whole) is expected
        assert (range_from_tensor(x, spec) == whole) is expected


def test_mse_never_widens_the_range_and_keeps_a_grid_that_fits():
    x = torch.tensor([-1.0, 0.0, 1.0, 2.0])  # four levels, exactly the grid of two bits
    spec = QuantSpec(2, range_setting=MSE)
    low, high = range_from_tensor(x, spec)
    assert torch.equal(fake_quantize(x, encoding_from_range(low, high, spec)), x)


@pytest.mark.parametrize("constant", [0.0, 1e-30, -4.0, 7.0])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("granularity", [Granularity.PER_TENSOR, Granularity.PER_CHANNEL])
def test_constant_tensors_stay_what_they_are(constant, symmetric, granularity):
    x = torch.full((3, 5), constant)
    axis = 0 if granularity is Granularity.PER_CHANNEL else None
    spec = QuantSpec(4, symmetric=symmetric, granularity=granularity, range_setting=MSE)
    result = fake_quantize(x, encoding_from_range(*range_from_tensor(x, spec, axis), spec, axis))
    torch.testing.assert_close(result, x, rtol=1e-3, atol=1e-18)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weight_that_is_not_finite_is_refused(value):
    message = "must have finite values to be given a range, got shape (2, 2) with 1 that are NaN or infinite"
    with pytest.raises(CalibrationError, match=re.escape(message)):
        range_from_tensor(torch.tensor([[1.0, value], [0.0, 1.0]]), QuantSpec(8))


def test_empty_weight_is_refused():
    with pytest.raises(CalibrationError, match=re.escape("got shape (0, 3) with 0 that are NaN")):
        range_from_tensor(torch.empty(0, 3), QuantSpec(8))


def test_observer_without_values_is_refused():
    with pytest.raises(CalibrationError, match="must see finite values"):
        range_from_observer(Observer(), QuantSpec(4))


@pytest.mark.parametrize("axis", [None, -1, 2])
def test_wrong_axis_is_refused(axis):
    with pytest.raises(SettingsError, match=re.escape(f"counted from the front, got {axis} for shape (2, 3)")):
        range_from_tensor(torch.ones(2, 3), QuantSpec(8, granularity=Granularity.PER_CHANNEL), axis)


@pytest.mark.parametrize(("shape", "axis"), [((2, 3), 0), ((2, 4), 1), ((2, 4, 1), 0)])
def test_wrong_groups_are_refused(shape, axis):
    spec = QuantSpec(4, granularity=Granularity.PER_GROUP, group_size=4)
    with pytest.raises(SettingsError, match=re.escape("Groups of 4 must divide axis 1 of a weight of shape (C, K)")):
        range_from_tensor(torch.ones(shape), spec, axis)

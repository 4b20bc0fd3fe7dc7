"""Range setting against brute force over float64 ranges, and its worth where min-max fails."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from lightning_quantdebug.encoding import encoding_from_range
from lightning_quantdebug.errors import CalibrationError, SettingsError
from lightning_quantdebug.fake_quantize import fake_quantize
from lightning_quantdebug.observer import Observer
from lightning_quantdebug.range_setting import range_from_observer, range_from_tensor
from lightning_quantdebug.target import Granularity, QuantSpec, RangeSetting

MSE = RangeSetting.MSE
PERCENTILE = RangeSetting.PERCENTILE
LOCAL = [RangeSetting.MIN_MAX, RangeSetting.PERCENTILE, RangeSetting.MSE]


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


@pytest.mark.parametrize("range_setting", LOCAL)
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


# Percentile.


def ends_by_quantiles(values: np.ndarray, share: float, symmetric: bool) -> tuple[float, float]:
    """The twin: the float64 quantiles of the values, or of their magnitudes."""
    values = values.astype(np.float64)
    if symmetric:
        end = np.quantile(np.abs(values), share / 100)
        return max(-end, values.min()), min(end, values.max())
    return np.quantile(values, 1 - share / 100), np.quantile(values, share / 100)


def test_the_definition_of_a_percentile_in_plain_numbers():
    x = torch.arange(101.0)  # 0 .. 100: the p-th percentile is p
    spec = QuantSpec(8, range_setting=PERCENTILE, percentile=90)
    low, high = range_from_tensor(x, spec)
    assert (low.item(), high.item()) == pytest.approx((10.0, 90.0))
    low, high = range_from_tensor(x - 20, QuantSpec(8, symmetric=True, range_setting=PERCENTILE, percentile=90))
    assert (low.item(), high.item()) == pytest.approx((-20.0, 70.0))  # 90 % of the magnitudes are below 70
    low, high = range_from_tensor(50 - x, QuantSpec(8, symmetric=True, range_setting=PERCENTILE, percentile=80))
    assert (low.item(), high.item()) == pytest.approx((-40.0, 40.0))


@settings(max_examples=60, deadline=None)
@given(
    values=arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 30)), elements=st.floats(-50, 50, width=32)),
    share=st.one_of(st.floats(50.001, 100), st.just(100.0), st.just(99.99)),
    symmetric=st.booleans(),
)
def test_percentiles_of_weights_are_the_quantiles_of_each_row(values, share, symmetric):
    spec = QuantSpec(
        4, symmetric=symmetric, granularity=Granularity.PER_CHANNEL, range_setting=PERCENTILE, percentile=share
    )
    low, high = range_from_tensor(torch.from_numpy(values), spec, 0)
    for row, *ends in zip(values, low.tolist(), high.tolist(), strict=True):
        np.testing.assert_allclose(ends, ends_by_quantiles(row, share, symmetric), rtol=1e-5, atol=1e-5)
    alone = replace(spec, granularity=Granularity.PER_TENSOR)
    ends = [end.item() for end in range_from_tensor(torch.from_numpy(values), alone)]
    np.testing.assert_allclose(ends, ends_by_quantiles(values, share, symmetric), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("share", [60, 99, 99.9, 99.99, 100])
@pytest.mark.parametrize("name", SHAPES)
def test_percentiles_from_the_histogram_are_the_quantiles_up_to_a_bin(name, share, symmetric):
    for x in (sample(name), -sample(name), sample(name) - 3):
        observer = Observer(values_per_sample=None)
        observer.observe(x)
        spec = QuantSpec(8, symmetric=symmetric, range_setting=PERCENTILE, percentile=share)
        low, high = (end.item() for end in range_from_observer(observer, spec))
        values, width = np.sort(x.double().numpy()), observer.histogram.bin_width
        exact = ends_by_quantiles(values, share, symmetric)
        # A quantile is between two values; where they lie far apart, the histogram may say either.
        near = values if not symmetric else np.sort(np.concatenate([values, -values]))
        for end, expected in zip((low, high), exact, strict=True):
            at = np.searchsorted(near, expected)
            gap = near[min(at + 1, near.size - 1)] - near[max(at - 2, 0)]
            assert abs(end - expected) <= width + gap
        assert x.min().item() <= low <= high <= x.max().item()


def quantile_of_bins(histogram, share: float, magnitudes: bool) -> float:
    """The twin: the piecewise linear distribution function of the bins, turned round by interpolation."""
    edges = histogram.range_min + histogram.bin_width * np.arange(histogram.counts.numel() + 1)
    rising = np.concatenate([[0], np.cumsum(histogram.counts.numpy())]) / histogram.counts.sum().item()
    if not magnitudes:
        return float(np.interp(share, rising, edges))
    points = np.unique(np.abs(edges))
    return float(np.interp(share, np.interp(points, edges, rising) - np.interp(-points, edges, rising), points))


@settings(max_examples=100, deadline=None)
@given(
    values=st.lists(st.floats(-8, 8, width=16), min_size=1, max_size=40),
    share=st.floats(50.01, 100),
)
def test_inside_a_bin_a_percentile_is_linear(values, share):
    x = torch.tensor(values)
    observer = Observer(values_per_sample=None)
    observer.observe(x)
    spec = QuantSpec(8, range_setting=PERCENTILE, percentile=share)
    low, high = (end.item() for end in range_from_observer(observer, spec))
    least, most = min(values), max(values)
    close = {"rel": 1e-5, "abs": observer.histogram.bin_width * 1e-3}
    # On the verge of an empty bin both of its edges are the quantile: ask a little to each side.
    sides = [quantile_of_bins(observer.histogram, share / 100 + d, False) for d in (-1e-9, 1e-9)]
    assert any(high == pytest.approx(np.clip(side, least, most), **close) for side in sides)
    sides = [quantile_of_bins(observer.histogram, 1 - share / 100 + d, False) for d in (-1e-9, 1e-9)]
    assert any(low == pytest.approx(np.clip(side, least, most), **close) for side in sides)
    low, high = (end.item() for end in range_from_observer(observer, replace(spec, symmetric=True)))
    sides = [quantile_of_bins(observer.histogram, share / 100 + d, True) for d in (-1e-9, 1e-9)]
    assert any(high == pytest.approx(np.clip(side, least, most), **close) for side in sides)
    assert any(low == pytest.approx(np.clip(-side, least, most), **close) for side in sides)


@pytest.mark.parametrize("symmetric", [False, True])
def test_the_hundredth_percentile_is_the_whole_range(symmetric):
    x = sample("gauss_outliers")
    spec = QuantSpec(8, symmetric=symmetric, range_setting=PERCENTILE, percentile=100)
    observer = Observer()  # draws some values only; the extremes are exact all the same
    observer.observe(x.view(4, -1))
    for ends in (range_from_observer(observer, spec), range_from_tensor(x, spec)):
        assert [end.item() for end in ends] == [x.min().item(), x.max().item()]


def test_percentiles_cut_what_is_rare_and_leave_the_bulk():
    x = sample("gauss")
    x[:2], x[2:4] = 1000.0, -700.0
    spec = QuantSpec(8, range_setting=PERCENTILE)
    for low, high in (range_from_tensor(x, spec), range_from_tensor(x, replace(spec, symmetric=True))):
        assert -5 < low.item() < -3
        assert 3 < high.item() < 5


def test_a_tensor_of_which_no_finite_value_was_drawn_keeps_its_whole_range():
    observer = Observer(values_per_sample=1)
    observer.observe(torch.tensor([[float("inf"), -2.0, 3.0]]))
    for range_setting in LOCAL:
        for symmetric in (False, True):
            spec = QuantSpec(4, symmetric=symmetric, range_setting=range_setting)
            assert [end.item() for end in range_from_observer(observer, spec)] == [-2.0, 3.0]


@pytest.mark.parametrize("range_setting", [RangeSetting.CROSS_ENTROPY, RangeSetting.BATCHNORM])
def test_settings_of_single_activations_are_refused_for_weights_and_provisional_for_activations(range_setting):
    spec = QuantSpec(4, range_setting=range_setting)
    message = f"must be 'min_max', 'percentile' or 'mse', got '{range_setting.value}', which is for activations"
    with pytest.raises(SettingsError, match=re.escape(message)):
        range_from_tensor(torch.ones(2, 2), spec)
    observer = Observer()
    observer.observe(torch.tensor([-1.0, 2.0]))
    assert [end.item() for end in range_from_observer(observer, spec)] == [-1.0, 2.0]


# Streams: the same values give the same range, however they come.


def cuts(x: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    shuffled = x[torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(1))]
    return {
        "one batch": [x],
        "batches of 8": list(x.split(8)),
        "one by one": list(x.split(1)),
        "ragged": list(x.split([1, 13, 5, 11, 2])),
        "in another order": list(shuffled.split(8)),
    }


@pytest.mark.parametrize("range_setting", LOCAL)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", [(32, 7), (32, 5, 9, 9), (32, 11, 3), (32, 3, 2, 40, 40)])
def test_ranges_depend_neither_on_batch_size_nor_on_order(range_setting, symmetric, shape):
    generator = torch.Generator().manual_seed(0)
    # Later batches are wider and off-centre, so that the bins of an observer grow on the way.
    x = torch.randn(shape, generator=generator) * torch.logspace(-2, 2, 32).view(-1, *[1] * (len(shape) - 1)) + 0.3
    spec = QuantSpec(4, symmetric=symmetric, range_setting=range_setting, percentile=99)
    found = {}
    for name, batches in cuts(x).items():
        observer = Observer()
        for batch in batches:
            observer.observe(batch)
        found[name] = [end.item() for end in range_from_observer(observer, spec)]
        merged = Observer()
        for batch in batches:
            part = Observer()
            part.observe(batch)
            merged.merge(part)
        found[f"{name}, merged"] = [end.item() for end in range_from_observer(merged, spec)]
    assert all(ends == found["one batch"] for ends in found.values()), found


def test_channels_that_differ_a_hundredfold_are_not_mixed_from_the_second_batch_on():
    # Three channels of [0, 1], [0, 10], [0, 100] times 0.9: an observer that took channels for samples once there is a
    # second batch would blend them. Here all of them are one tensor's values, of which a third each.
    x = torch.rand(50, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 10, 100.0]).view(3, 1, 1)
    observer = Observer(values_per_sample=None)
    for batch in x.split(10):
        observer.observe(batch)
    _, high = range_from_observer(observer, QuantSpec(8, range_setting=PERCENTILE, percentile=90))
    assert high.item() == pytest.approx(np.quantile(x.numpy(), 0.9), abs=2 * observer.histogram.bin_width)


@pytest.mark.parametrize("range_setting", LOCAL)
@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_any_axis_can_be_that_of_the_channels(range_setting, axis):
    x = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(axis))
    x = x * torch.logspace(-1, 1, x.shape[axis]).view([-1 if at == axis else 1 for at in range(4)])
    spec = QuantSpec(4, symmetric=True, granularity=Granularity.PER_CHANNEL, range_setting=range_setting, percentile=95)
    low, high = range_from_tensor(x, spec, axis)
    assert low.shape == high.shape == (x.shape[axis],)
    for channel in range(x.shape[axis]):
        row = np.take(x.numpy(), channel, axis).ravel()
        ends = (low[channel], high[channel])
        if range_setting is MSE:
            best = SortedValues(torch.from_numpy(row)).best(QuantSpec(4, symmetric=True), 300)
            assert own_error(torch.from_numpy(row), QuantSpec(4, symmetric=True), ends) <= 1.15 * best
        else:
            expected = ends_by_quantiles(row, 95 if range_setting is PERCENTILE else 100, True)
            np.testing.assert_allclose([end.item() for end in ends], expected, rtol=1e-5)

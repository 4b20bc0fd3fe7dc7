"""Statistics of channels against plain float64 numpy, and the noise split against its sum over the values."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_quantdebug.distribution import ChannelStatistics, clipping_and_rounding, range_ratios
from lightning_quantdebug.encoding import encoding_from_range
from lightning_quantdebug.errors import CalibrationError, SettingsError
from lightning_quantdebug.fake_quantize import BLOCK_SIZE, fake_quantize
from lightning_quantdebug.observer import Observer
from lightning_quantdebug.target import Granularity, QuantSpec

FIELDS = ("count", "non_finite", "range_min", "range_max", "mean", "mean_square", "variance", "skewness", "kurtosis")
VALUES = st.lists(st.floats(-1e3, 1e3, width=32), min_size=3, max_size=3)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def seen(axis: int, *batches: Tensor) -> ChannelStatistics:
    statistics = ChannelStatistics(axis)
    for batch in batches:
        statistics.observe(batch)
    return statistics


def values_of(statistics: ChannelStatistics) -> dict[str, np.ndarray]:
    return {name: getattr(statistics, name).numpy() for name in (*FIELDS, "zero_share")}


def by_hand(values: np.ndarray) -> dict[str, float]:
    """What one channel's values give, each from its definition."""
    finite = values[np.isfinite(values)].astype(np.float64)
    spread = np.sqrt(np.mean((finite - finite.mean()) ** 2))
    with np.errstate(invalid="ignore"):
        standard = (finite - finite.mean()) / spread
    return {
        "count": len(finite),
        "non_finite": len(values) - len(finite),
        "range_min": finite.min(),
        "range_max": finite.max(),
        "mean": finite.mean(),
        "mean_square": np.mean(finite**2),
        "variance": spread**2,
        "skewness": np.mean(standard**3),
        "kurtosis": np.mean(standard**4),
        "zero_share": np.mean(finite == 0),
    }


@pytest.mark.parametrize(
    ("shape", "axis"), [((5, 3, 4, 6), 1), ((5, 7, 3), -1), ((3, 40), 0), ((6, 3), 1), ((2, 3, 5), -2), ((3,), 0)]
)
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_each_number_is_its_definition(shape, axis, offset):
    x = normal(*shape).exp() + offset
    x[x < offset + 0.5] = 0.0
    found = values_of(seen(axis, x))
    rows = np.moveaxis(x.numpy(), axis, 0).reshape(3, -1)
    for channel, row in enumerate(rows):
        for name, expected in by_hand(row).items():
            assert found[name][channel] == pytest.approx(expected, rel=1e-9, abs=1e-12, nan_ok=True), name


@given(st.lists(VALUES, min_size=2, max_size=24), st.integers(1, 7), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_how_the_values_were_cut_does_not_matter(rows, batch_size, split):
    x = torch.tensor(rows)
    whole = values_of(seen(1, x))
    in_batches = seen(1, *x.split(batch_size))
    merged = ChannelStatistics(1)
    for part in (x[::split], *(x[start::split] for start in range(1, split))):
        merged.merge(seen(1, part))
    for other in (values_of(in_batches), values_of(merged)):
        for name, expected in whole.items():
            # A spread of rounding alone has no shape.
            if name in ("skewness", "kurtosis"):
                expected = np.where(whole["variance"] > 1e-6 * whole["mean_square"], expected, other[name])
            np.testing.assert_allclose(other[name], expected, rtol=1e-9, atol=1e-9 * 1e3, err_msg=name)


def test_ragged_batches_and_large_ones_count_every_value():
    x = normal(5, 2, BLOCK_SIZE // 5)
    x[4, 1, -1] = 99.0
    found = values_of(seen(1, x, x[:1, :, :7]))
    for channel in range(2):
        values = torch.cat([x[:, channel].flatten(), x[0, channel, :7]]).numpy()
        for name, expected in by_hand(values).items():
            assert found[name][channel] == pytest.approx(expected, rel=1e-9), name


def test_values_that_are_not_finite_are_counted_and_ignored():
    x = torch.tensor([[1.0, torch.nan, torch.inf], [-3.0, torch.nan, 2.0], [0.0, torch.nan, 4.0]])
    found = values_of(seen(1, x[:2], x[2:]))
    assert found["count"].tolist() == [3, 0, 2]
    assert found["non_finite"].tolist() == [0, 3, 1]
    assert found["range_min"][[0, 2]].tolist() == [-3.0, 2.0]
    assert found["range_max"][[0, 2]].tolist() == [1.0, 4.0]
    assert found["mean"][[0, 2]] == pytest.approx([-2 / 3, 3.0])
    assert found["zero_share"][[0, 2]] == pytest.approx([1 / 3, 0.0])
    assert found["variance"][[0, 2]] == pytest.approx([np.var([1, -3, 0]), 1.0])
    assert found["kurtosis"][2] == pytest.approx(1.0)
    assert all(np.isnan(found[name][1]) for name in ("range_min", "range_max", "mean", "variance", "zero_share"))


def test_the_moments_of_known_distributions():
    generator = torch.Generator().manual_seed(0)
    uniform, exponential = (torch.rand(200_000, 1, generator=generator) for _ in range(2))
    normals = torch.randn(200_000, 1, generator=generator)
    found = seen(1, torch.cat([uniform, normals, -(1 - exponential).log()], 1))
    assert found.kurtosis.tolist() == pytest.approx([1.8, 3.0, 9.0], rel=0.05)
    assert found.skewness.tolist() == pytest.approx([0.0, 0.0, 2.0], abs=0.05)


def test_memory_does_not_grow_with_the_batches():
    statistics = ChannelStatistics(1)
    sizes = set()
    for _ in range(5):
        statistics.observe(normal(50, 4))
        sizes.add(sum(value.numel() for value in vars(statistics._moments).values()))
    assert sizes == {5 * 4}


@pytest.mark.parametrize(("shape", "axis"), [((8, 3, 64, 64), 1), ((3, 100_000), 0), ((100_000, 3), 1)])
def test_a_large_batch_is_taken_in_parts(shape, axis, monkeypatch):
    monkeypatch.setattr("lightning_quantdebug.distribution.BLOCK_SIZE", 2**14)
    sizes = []
    take = ChannelStatistics._take
    monkeypatch.setattr(ChannelStatistics, "_take", lambda self, rows: (sizes.append(rows.numel()), take(self, rows)))
    x = normal(*shape)
    found = seen(axis, x)
    assert max(sizes) <= 2**14
    assert sum(sizes) == x.numel()
    assert found.count.tolist() == [x.numel() // 3] * 3


def test_the_observed_tensor_is_left_alone_and_may_need_gradients():
    x = normal(4, 3).requires_grad_()
    before = x.detach().clone()
    with torch.inference_mode():
        statistics = seen(1, x)
    statistics.observe(x)
    assert torch.equal(x, before)
    assert statistics.count.tolist() == [8, 8, 8]
    assert not statistics.mean.requires_grad


def test_empty_batches_and_empty_statistics_add_nothing():
    statistics = seen(1, torch.empty(0, 3), normal(2, 3))
    statistics.merge(ChannelStatistics(1))
    assert statistics.count.tolist() == [2, 2, 2]
    fresh = ChannelStatistics(1)
    fresh.merge(statistics)
    assert fresh.count.tolist() == [2, 2, 2]


def test_what_does_not_fit_is_refused():
    message = "`channel_axis` must be an axis of the tensor, got 2 for shape (4, 3)."
    with pytest.raises(SettingsError, match=re.escape(message)):
        ChannelStatistics(2).observe(torch.zeros(4, 3))
    with pytest.raises(SettingsError, match=re.escape("got -3 for shape (4, 3)")):
        ChannelStatistics(-3).observe(torch.zeros(4, 3))
    message = "Every batch must have the same channels, got 3 along axis 1 at first and now 5."
    with pytest.raises(SettingsError, match=re.escape(message)):
        seen(1, torch.zeros(4, 3), torch.zeros(4, 5))
    with pytest.raises(SettingsError, match=re.escape(message)):
        seen(1, torch.zeros(4, 3)).merge(seen(1, torch.zeros(4, 5)))
    message = "Only statistics with the same `channel_axis` can be merged, got 1 and 0."
    with pytest.raises(SettingsError, match=re.escape(message)):
        seen(1, torch.zeros(4, 3)).merge(seen(0, torch.zeros(3, 4)))


@pytest.mark.parametrize("name", [*FIELDS, "zero_share"])
def test_nothing_can_be_read_before_values_were_seen(name):
    with pytest.raises(CalibrationError, match="Statistics must see values before they can be read, got none"):
        getattr(ChannelStatistics(0), name)


# Ranges of channels.


def test_the_ratio_of_ranges_is_that_of_the_grids_steps():
    low, high = torch.tensor([-1.0, 0.5, -0.25, 0.0]), torch.tensor([0.5, 4.0, -0.125, 0.0])
    for symmetric in (False, True):
        spec = QuantSpec(8, symmetric=symmetric)
        whole = encoding_from_range(low.min(), high.max(), spec).scale
        own = encoding_from_range(low, high, QuantSpec(8, symmetric, Granularity.PER_CHANNEL), 0).scale
        # A symmetric grid has one more step below zero than above: half a percent at 8 bits.
        ratios = range_ratios(low, high, symmetric)
        assert ratios[:3].tolist() == pytest.approx((whole / own)[:3].tolist(), rel=0.01)
        assert ratios[3] == torch.inf


# Clipping and rounding.


@pytest.mark.parametrize("ends", [(-1.0, 0.7), (-5.0, 5.0), (0.0, 2.0), (-0.3, 6.0), (-200.0, 200.0)])
@pytest.mark.parametrize(("bit_width", "symmetric"), [(3, False), (4, True), (8, False), (8, True)])
def test_both_noises_are_those_of_the_values(ends, bit_width, symmetric):
    x = normal(40_000) * 1.5 + 0.5
    observer = Observer(values_per_sample=None)
    observer.observe(x)
    encoding = encoding_from_range(torch.tensor(ends[0]), torch.tensor(ends[1]), QuantSpec(bit_width, symmetric))
    exact = x.double().numpy()
    error = (exact - fake_quantize(x, encoding).double().numpy()) ** 2
    outside = (exact < encoding.range_min.item()) | (exact > encoding.range_max.item())
    expected = (np.where(outside, error, 0).mean(), np.where(outside, 0, error).mean())
    found = clipping_and_rounding(observer.histogram, encoding)
    largest = max(expected)
    assert found == pytest.approx(expected, rel=0.02, abs=0.01 * largest)


def test_a_grid_finer_than_the_bins_rounds_by_a_twelfth_of_a_squared_step():
    observer = Observer(values_per_sample=None)
    observer.observe(torch.rand(10_000, generator=torch.Generator().manual_seed(0)))
    encoding = encoding_from_range(torch.tensor(0.0), torch.tensor(1.0), QuantSpec(16))
    _, rounding = clipping_and_rounding(observer.histogram, encoding)
    assert rounding == pytest.approx(encoding.scale.item() ** 2 / 12, rel=1e-3)


def test_a_grid_per_channel_is_refused():
    spec = QuantSpec(8, granularity=Granularity.PER_CHANNEL)
    encoding = encoding_from_range(-torch.ones(3), torch.ones(3), spec, 0)
    observer = Observer()
    observer.observe(torch.ones(3))
    with pytest.raises(SettingsError, match=re.escape("The noise is split for one encoding, got 3 scales.")):
        clipping_and_rounding(observer.histogram, encoding)

"""Encodings: every range of every grid, against arithmetic done by hand in float64."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_quantdebug.encoding import (
    SMALLEST_SCALE,
    Encoding,
    encoding_from_range,
    unclipped_interval,
)
from lightning_quantdebug.errors import SettingsError
from lightning_quantdebug.target import ALLOWED_BIT_WIDTHS, Granularity, QuantSpec

FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
PER_CHANNEL = QuantSpec(8, granularity=Granularity.PER_CHANNEL)


def tensor(value: float) -> torch.Tensor:
    return torch.tensor(value)


@pytest.mark.parametrize(
    ("spec", "low", "high", "scale", "zero_point", "range_min", "range_max"),
    [
        (QuantSpec(4), -1.0, 2.0, 0.2, 5, -1.0, 2.0),
        (QuantSpec(4), 0.5, 3.0, 0.2, 0, 0.0, 3.0),  # zero is included from below
        (QuantSpec(4), -3.0, -0.5, 0.2, 15, -3.0, 0.0),  # and from above
        (QuantSpec(2), -1.0, 2.0, 1.0, 1, -1.0, 2.0),
        (QuantSpec(8), -1.0, 1.0, 2 / 255, 127, -254 / 255, 256 / 255),  # float32(2 / 255) is a little above 2 / 255
        (QuantSpec(4, symmetric=True), -1.0, 2.0, 2 / 7, 0, -16 / 7, 2.0),
        (QuantSpec(4, symmetric=True), -8.0, 2.0, 1.0, 0, -8.0, 7.0),  # the lowest level is used
        (QuantSpec(4, symmetric=True, narrow_range=True), -8.0, 2.0, 8 / 7, 0, -8.0, 8.0),
        (QuantSpec(2, symmetric=True), -1.0, 0.0, 0.5, 0, -1.0, 0.5),
    ],
)
def test_encoding_from_range_by_hand(spec, low, high, scale, zero_point, range_min, range_max):
    encoding = encoding_from_range(tensor(low), tensor(high), spec)
    assert encoding.scale.item() == pytest.approx(scale, rel=1e-7)
    assert encoding.zero_point.item() == zero_point
    assert encoding.range_min.item() == pytest.approx(range_min, rel=1e-6)
    assert encoding.range_max.item() == pytest.approx(range_max, rel=1e-6)


@given(FLOAT32, FLOAT32, st.sampled_from(ALLOWED_BIT_WIDTHS), st.booleans())
def test_every_finite_range_gives_a_grid_with_zero(first, second, bit_width, symmetric):
    low, high = tensor(min(first, second)), tensor(max(first, second))
    encoding = encoding_from_range(low, high, QuantSpec(bit_width, symmetric=symmetric))
    assert encoding.scale.item() >= SMALLEST_SCALE
    assert encoding.spec.quant_min <= encoding.zero_point.item() <= encoding.spec.quant_max
    assert encoding.range_min.isfinite()
    assert encoding.range_max.isfinite()
    assert encoding.range_min <= 0 <= encoding.range_max
    if max(abs(first), abs(second)) < 1e37:  # beyond it the grid is clipped to what float32 holds
        step = encoding.scale.item() * (1 + 1e-6) + 2.0**-22 * max(abs(first), abs(second))
        assert encoding.range_min.item() <= low.item() + step / 2
        assert encoding.range_max.item() >= high.item() - step / 2


@pytest.mark.parametrize("bit_width", [2, 8, 16, 32])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("share", [0.0, 1e-37, 1.0])
def test_range_of_lowest_float_keeps_a_finite_grid(bit_width, symmetric, share):
    """Attention masks are filled with the lowest float."""
    lowest, highest = torch.finfo(torch.float32).min, share * torch.finfo(torch.float32).max
    encoding = encoding_from_range(tensor(lowest), tensor(highest), QuantSpec(bit_width, symmetric=symmetric))
    assert encoding.range_min.isfinite()
    assert encoding.range_max.isfinite()
    assert encoding.range_min.item() < 0.49 * lowest


def test_all_zero_tensor_gets_the_smallest_scale_whose_square_is_a_normal_float():
    encoding = encoding_from_range(tensor(0.0), tensor(0.0), QuantSpec(8))
    assert encoding.scale.item() == SMALLEST_SCALE
    assert (encoding.scale * encoding.scale).item() == torch.finfo(torch.float32).tiny


def test_32_bit_zero_point_leaves_the_short_side_of_the_range():
    encoding = encoding_from_range(tensor(-1e3), tensor(1e-3), QuantSpec(32))
    assert encoding.range_max.item() >= 1e-3
    assert encoding.range_min.item() == pytest.approx(-1e3, rel=2e-7)


def test_per_channel_and_per_group_are_the_scalar_case_for_each():
    low, high = -torch.rand(3, 4), torch.rand(3, 4)
    grouped = encoding_from_range(low, high, QuantSpec(4, granularity=Granularity.PER_GROUP, group_size=2), 0)
    for row in range(3):
        for column in range(4):
            alone = encoding_from_range(low[row, column], high[row, column], QuantSpec(4))
            assert grouped.scale[row, column] == alone.scale
            assert grouped.zero_point[row, column] == alone.zero_point
    channels = encoding_from_range(low[:, 0], high[:, 0], PER_CHANNEL, 1)
    assert channels.scale[2] == encoding_from_range(low[2, 0], high[2, 0], QuantSpec(8)).scale
    assert channels.channel_axis == 1
    assert channels.num_levels == 256


def test_arithmetic_gives_numbers_where_all_channels_share_them():
    spec = QuantSpec(4, symmetric=True, narrow_range=True, granularity=Granularity.PER_CHANNEL)
    scale, low, high = encoding_from_range(-torch.ones(3), torch.ones(3), spec, 0).arithmetic
    assert (low, high) == (-7.0, 7.0)
    assert isinstance(scale, torch.Tensor)
    assert encoding_from_range(tensor(-1.0), tensor(2.0), QuantSpec(2)).arithmetic == (1.0, -1.0, 2.0)


def test_to_keeps_the_values_and_the_object_where_nothing_moves():
    encoding = encoding_from_range(tensor(-1.0), tensor(2.0), QuantSpec(4))
    assert encoding.to("cpu") is encoding
    assert encoding.to(torch.device("cpu")).zero_point.item() == 5


def test_encoding_is_detached_and_float32():
    high = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    encoding = encoding_from_range(-high, high, QuantSpec(8))
    assert not encoding.scale.requires_grad
    assert encoding.scale.dtype == encoding.zero_point.dtype == torch.float32


def _first_clipped_slowly(scale: torch.Tensor, step: float) -> torch.Tensor:
    """Bisection over floats by their distance from 0."""
    low, high = scale * 0, scale * (step + 2)
    while low.nextafter(high) != high:
        middle = (low + high) / 2
        middle = middle if low < middle < high else low.nextafter(high)
        low, high = (middle, high) if (middle / scale).round() <= step else (low, middle)
    return high


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_unclipped_interval_is_exact_to_the_last_float(dtype):
    generator = torch.Generator().manual_seed(0)
    for case in range(150):
        scale = torch.rand((), generator=generator).mul(20).sub(10).exp()
        levels = 2 ** (2 + case % 15) - 1
        zero_point = int(torch.randint(levels + 1, (), generator=generator))
        low, high = unclipped_interval(scale, tensor(-float(zero_point)), tensor(float(levels - zero_point)), dtype)
        assert high == _first_clipped_slowly(scale.to(dtype), levels - zero_point)
        assert -low == _first_clipped_slowly(scale.to(dtype), zero_point)


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [
        (float("nan"), 1.0, "must be finite and have range_min <= range_max, got [nan, 1.0] at index 0"),
        (0.0, float("inf"), "got [0.0, inf] at index 0. Find where NaN or infinity arises"),
        (1.0, -1.0, "got [1.0, -1.0]"),
    ],
)
def test_impossible_range_is_refused(low, high, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        encoding_from_range(tensor(low), tensor(high), QuantSpec(8))


def test_ranges_of_different_shapes_are_refused():
    with pytest.raises(SettingsError, match=re.escape("must have one shape, got (2,) and (3,)")):
        encoding_from_range(torch.zeros(2), torch.zeros(3), PER_CHANNEL, 0)


@pytest.mark.parametrize(
    ("spec", "shape", "axis", "message"),
    [
        (QuantSpec(8), (3,), None, "With granularity 'per_tensor' scale and zero_point must have 0 dimensions"),
        (PER_CHANNEL, (), 0, "With granularity 'per_channel' scale and zero_point must have 1 dimensions"),
        (QuantSpec(8), (), 0, "`channel_axis` must be None with granularity 'per_tensor'"),
        (PER_CHANNEL, (3,), None, "got None with 'per_channel'"),
        (PER_CHANNEL, (3,), -1, "an axis counted from the front (0, 1, ...), got -1"),
        (QuantSpec(8, granularity=Granularity.PER_GROUP, group_size=2), (3, 2), 1, "Groups run along axis 1"),
    ],
)
def test_shape_and_axis_must_fit_the_granularity(spec, shape, axis, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        Encoding(spec, torch.ones(shape), torch.zeros(shape), axis)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scale_must_be_positive(scale):
    with pytest.raises(SettingsError, match="`scale` must be positive and finite"):
        Encoding(QuantSpec(8), tensor(scale), tensor(0.0))


@pytest.mark.parametrize("zero_point", [-1.0, 16.0, 0.5, float("nan")])
def test_zero_point_must_be_a_level(zero_point):
    message = "`zero_point` must be an integer in [0, 15], the grid of 4 bits"
    with pytest.raises(SettingsError, match=re.escape(message)):
        Encoding(QuantSpec(4), tensor(1.0), tensor(zero_point))

"""The distribution of a tensor, channel by channel, and what an encoding does to it.

:class:`ChannelStatistics` sees any number of batches and keeps a few numbers for each channel. Moments are kept about
the mean and joined by the formulas of Pebay, 2008 (Sandia report SAND2008-6212, equations 2.1 and 3.1), so that a large
mean costs no digits. How the values were cut into batches changes nothing but the rounding of float64.

:func:`clipping_and_rounding` splits the noise of one quantizer, and :func:`range_ratios` says how much of a shared grid
each channel is left with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_quantdebug.encoding import Encoding
from lightning_quantdebug.errors import CalibrationError, SettingsError
from lightning_quantdebug.fake_quantize import BLOCK_SIZE
from lightning_quantdebug.observer import Histogram


@dataclass(frozen=True, eq=False)
class _Moments:
    """Count, mean and sums of the second to fourth powers of the deviations from it; float64, shape ``(C,)`` each."""

    count: Tensor
    mean: Tensor
    second: Tensor
    third: Tensor
    fourth: Tensor

    def joined(self, other: _Moments) -> _Moments:
        """The moments of both samples together."""
        n_a, n_b = self.count, other.count
        n = n_a + n_b
        share_a, share_b = (part / n.clamp(min=1.0) for part in (n_a, n_b))
        step = other.mean - self.mean
        product = n * share_a * share_b
        return _Moments(
            n,
            self.mean + step * share_b,
            self.second + other.second + step**2 * product,
            self.third
            + other.third
            + step**3 * product * (share_a - share_b)
            + 3 * step * (share_a * other.second - share_b * self.second),
            self.fourth
            + other.fourth
            + step**4 * product * (share_a**2 - share_a * share_b + share_b**2)
            + 6 * step**2 * (share_a**2 * other.second + share_b**2 * self.second)
            + 4 * step * (share_a * other.third - share_b * self.third),
        )


class ChannelStatistics:
    """Count, range, moments and zeros of each channel of a tensor, in float64 and bounded memory.

    NaN and infinities are counted and else ignored. A channel without a finite value has NaN everywhere but in its
    counts.

    Args:
        channel_axis: Axis of the ``C`` channels; a negative one counts from the end, for tensors whose leading axes
            differ from batch to batch.

    Attributes:
        channel_axis: As given.

    Examples:
        >>> statistics = ChannelStatistics(1)
        >>> statistics.observe(torch.tensor([[0.0, -1.0], [4.0, float("nan")]]))
        >>> statistics.mean.tolist(), statistics.range_max.tolist(), statistics.zero_share.tolist()
        ([2.0, -1.0], [4.0, -1.0], [0.5, 0.0])
    """

    def __init__(self, channel_axis: int) -> None:
        """Begin with nothing seen."""
        self.channel_axis = channel_axis
        self._moments: _Moments | None = None
        self._low = self._high = self._zeros = self._non_finite = torch.empty(0, dtype=torch.float64)

    @torch.no_grad()
    def observe(self, x: Tensor) -> None:
        """Take in one batch.

        Args:
            x: Values, any shape that has the channel axis.

        Raises:
            SettingsError: If ``x`` has no such axis or another number of channels than before.
        """
        if not -x.ndim <= self.channel_axis < x.ndim:
            raise SettingsError(
                f"`channel_axis` must be an axis of the tensor, got {self.channel_axis} for shape {tuple(x.shape)}."
            )
        values = x.detach().movedim(self.channel_axis, 0)
        self._check_channels(values.shape[0])
        if values.numel() == 0:
            return
        # Some rows of one other axis at a time: a float64 copy of a whole batch would be twice its size.
        axis = 1 if values.ndim > 1 else 0
        rows = max(1, BLOCK_SIZE * values.shape[axis] // values.numel()) if axis else values.shape[0]
        for part in torch.split(values, rows, dim=axis):
            self._take(part.reshape(values.shape[0], -1).double())

    def merge(self, other: ChannelStatistics) -> None:
        """Take in all that ``other`` has seen, as if it had been observed here.

        Raises:
            SettingsError: If ``other`` has another channel axis or another number of channels.
        """
        if self.channel_axis != other.channel_axis:
            raise SettingsError(
                "Only statistics with the same `channel_axis` can be merged, got "
                f"{self.channel_axis} and {other.channel_axis}."
            )
        if other._moments is None:
            return
        self._check_channels(other._low.numel())
        self._join(other._moments, other._low, other._high, other._zeros, other._non_finite)

    def _check_channels(self, channels: int) -> None:
        """Raise unless the number of channels is the one seen before."""
        if self._moments is not None and self._low.numel() != channels:
            raise SettingsError(
                f"Every batch must have the same channels, got {self._low.numel()} along axis {self.channel_axis} at "
                f"first and now {channels}."
            )

    def _take(self, rows: Tensor) -> None:
        """Take in values of shape ``(C, K)``, float64."""
        finite = rows.isfinite()
        count = finite.double().sum(1)
        kept = rows.where(finite, 0.0)
        mean = kept.sum(1) / count.clamp(min=1.0)
        apart = (kept - mean[:, None]).where(finite, 0.0)
        square = apart.square()
        moments = _Moments(count, mean, square.sum(1), (square * apart).sum(1), square.square().sum(1))
        low = rows.where(finite, torch.inf).amin(1)
        high = rows.where(finite, -torch.inf).amax(1)
        self._join(moments, low, high, (rows == 0.0).double().sum(1), (~finite).double().sum(1))

    def _join(self, moments: _Moments, low: Tensor, high: Tensor, zeros: Tensor, non_finite: Tensor) -> None:
        """Add what another part of the values gave."""
        if self._moments is None:
            self._moments, self._low, self._high, self._zeros, self._non_finite = moments, low, high, zeros, non_finite
            return
        self._moments = self._moments.joined(moments)
        self._low, self._high = torch.minimum(self._low, low), torch.maximum(self._high, high)
        self._zeros, self._non_finite = self._zeros + zeros, self._non_finite + non_finite

    def _seen(self) -> _Moments:
        """The moments, once there are any."""
        if self._moments is None:
            raise CalibrationError(
                "Statistics must see values before they can be read, got none. Calibrate on batches that reach this "
                "tensor."
            )
        return self._moments

    def _per_value(self, total: Tensor) -> Tensor:
        """A sum by the count; NaN for a channel without values."""
        count = self._seen().count
        return (total / count).where(count > 0, torch.nan)

    @property
    def count(self) -> Tensor:
        """Finite values of each channel, float64 integers, shape ``(C,)``."""
        return self._seen().count

    @property
    def non_finite(self) -> Tensor:
        """NaN and infinities of each channel."""
        self._seen()
        return self._non_finite

    @property
    def range_min(self) -> Tensor:
        """The least finite value of each channel, in units of the tensor."""
        return self._low.where(self.count > 0, torch.nan)

    @property
    def range_max(self) -> Tensor:
        """The greatest finite value of each channel."""
        return self._high.where(self.count > 0, torch.nan)

    @property
    def mean(self) -> Tensor:
        """Mean of each channel."""
        return self._seen().mean.where(self.count > 0, torch.nan)

    @property
    def variance(self) -> Tensor:
        """Mean square deviation from the mean of each channel."""
        return self._per_value(self._seen().second)

    @property
    def mean_square(self) -> Tensor:
        """Mean of the squares of each channel."""
        return self.variance + self.mean**2

    @property
    def skewness(self) -> Tensor:
        """Third standardized moment of each channel, 0 for a symmetric one; NaN where a channel is constant."""
        return self._per_value(self._seen().third) / self.variance**1.5

    @property
    def kurtosis(self) -> Tensor:
        """Fourth standardized moment of each channel: 1.8 if uniform, 3 if normal, 6 if Laplace; NaN if constant."""
        return self._per_value(self._seen().fourth) / self.variance**2

    @property
    def zero_share(self) -> Tensor:
        """Share of the finite values of each channel that are exactly 0."""
        return self._per_value(self._zeros)


def range_ratios(range_min: Tensor, range_max: Tensor, symmetric: bool) -> Tensor:
    """How many times wider the range of the whole tensor is than that of each channel.

    A channel with ratio ``r`` is left with ``log2(r)`` bits fewer on a grid per tensor than on one of its own.

    Args:
        range_min: Least value of each channel, shape ``(C,)``.
        range_max: Greatest value of each channel, shape ``(C,)``.
        symmetric: Whether the grid is symmetric, so that only magnitudes count. Every grid contains 0.

    Returns:
        Ratios of at least 1, shape ``(C,)``; infinite for a channel of zeros.

    Source: Nagel et al., 2019, Data-Free Quantization, equation 7 (the inverse: the precision of a channel).

    Examples:
        >>> range_ratios(torch.tensor([-1.0, -4.0]), torch.tensor([0.5, 2.0]), symmetric=False).tolist()
        [4.0, 1.0]
    """
    low, high = range_min.double().clamp(max=0.0), range_max.double().clamp(min=0.0)
    if symmetric:
        widths = torch.maximum(high, -low)
        whole = widths.max()
    else:
        widths = high - low
        whole = high.max() - low.min()
    return (whole / widths).where(widths > 0, torch.inf)


def clipping_and_rounding(histogram: Histogram, encoding: Encoding) -> tuple[float, float]:
    """Split the mean squared error of a quantizer in what clipping and what rounding costs.

    A value beyond an end of the grid is clipped to that end, and all of its error is clipping noise; the error of every
    other value is rounding noise, so that the two add up to the whole. Values are taken to be spread evenly within a
    bin, over which both errors are integrated exactly: right also where a step of the grid is narrower than a bin.

    Args:
        histogram: Counts of the values, from an observer.
        encoding: A grid per tensor.

    Returns:
        Clipping noise and rounding noise, each a mean square in squared units of the tensor.

    Raises:
        SettingsError: If the encoding has more than one scale.

    Source: Nagel et al., 2021, A White Paper on Neural Network Quantization, section 2.1 (clipping against rounding).

    Examples:
        >>> from lightning_quantdebug.target import QuantSpec
        >>> encoding = Encoding(QuantSpec(2), scale=torch.tensor(1.0), zero_point=torch.tensor(0.0))
        >>> clipping, rounding = clipping_and_rounding(Histogram(torch.tensor([1, 1]), 0.0, 6.0), encoding)
        >>> round(clipping, 4), round(rounding, 4)  # the grid ends at 3, where the second bin begins
        (1.5, 0.0417)
    """
    if encoding.scale.numel() != 1:
        raise SettingsError(f"The noise is split for one encoding, got {encoding.scale.numel()} scales.")
    filled = histogram.counts > 0
    counts = histogram.counts[filled].double()
    width = histogram.bin_width
    low = histogram.lower_edges[filled]
    high = low + width
    scale = encoding.scale.double().cpu().reshape(())
    first, last = (end.double().cpu().reshape(()) * scale for end in (encoding.lowest_step, encoding.highest_step))
    beyond = _cubes((low - last).clamp(min=0.0), (high - last).clamp(min=0.0))
    below = _cubes((first - high).clamp(min=0.0), (first - low).clamp(min=0.0))
    inside = _rounding_up_to(high.clamp(first, last) / scale) - _rounding_up_to(low.clamp(first, last) / scale)
    total = counts.sum() * width
    clipping = (counts @ (beyond + below) / total).item()
    return clipping, (counts @ inside * scale**3 / total).item()


def _cubes(near: Tensor, far: Tensor) -> Tensor:
    """The integral of the square between two distances."""
    return (far**3 - near**3) / 3.0


def _rounding_up_to(steps: Tensor) -> Tensor:
    """The integral of the squared rounding error from 0 to a number of steps, in steps: 1/12 for each whole step."""
    whole = steps.round()
    return whole / 12.0 + (steps - whole) ** 3 / 3.0

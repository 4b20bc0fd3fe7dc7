"""Range setting: from observed values to the clipping range of an encoding.

Min-max takes the whole range (Nagel et al., 2021, section 3.1, "Min-max"). Percentile leaves out a share of the values
at both ends (McKinstry et al., 2018). MSE takes the range whose grid has the least mean squared error, clipping rare
large values in favour of a finer step (Sung et al., 2015; Choukroun et al., 2019, OMSE; Nagel et al., 2021, section
3.1, "MSE"). As ``SQNR = 10 log10(E[x^2] / E[(x - x_hat)^2])`` has a numerator that no range changes, this is
also the range of greatest SQNR. Each candidate is judged by the encoding and the fake-quantize that will be used, zero
point rounding included.

Cross-entropy and BN-based range setting need more than one tensor's values:
:mod:`lightning_quantdebug.activation_ranges`.

An asymmetric range has two ends that depend on each other: searched one at a time they get stuck far from the best pair
when both tails have outliers. So pairs are tried: all of a coarse grid of shares of the whole range, a constant ratio
apart, then finer and finer around the best. A symmetric grid has one end, and pairs become a line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from lightning_quantdebug.encoding import encoding_from_range
from lightning_quantdebug.errors import CalibrationError, SettingsError
from lightning_quantdebug.fake_quantize import BLOCK_SIZE, fake_quantize
from lightning_quantdebug.observer import Histogram, Observer
from lightning_quantdebug.target import OF_SINGLE_QUANTIZERS, Granularity, QuantSpec, RangeSetting


@dataclass(frozen=True)
class Search:
    """How the shares of the whole range are searched.

    Attributes:
        ratio: From one share to the next on the coarse grid.
        count: Shares on the coarse grid, from 1 down.
        refinements: How often the ratio is brought down to its ``reach``-th root.
        reach: Shares tried to each side of the best at each refinement.
    """

    ratio: float
    count: int
    refinements: int
    reach: int


# Shares down to 2^-9: at 8 bits, a bulk that is narrower still falls on a single level of the whole range.
OF_HISTOGRAM = {False: Search(2**0.5, 19, 3, 3), True: Search(2**0.125, 73, 2, 4)}
# Weights have shorter tails, and each candidate is a pass over all of them: shares down to 1/8 and 1/20.
_OF_WEIGHTS = {False: Search(1.3, 9, 2, 2), True: Search(1.08, 40, 1, 4)}
"""By whether the grid is symmetric."""


def range_from_observer(observer: Observer, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The clipping range of an activation, by ``spec.effective_range_setting``.

    ``cross_entropy`` and ``batchnorm`` can not be told from one observer: they give the range of ``min_max`` here,
    until :func:`lightning_quantdebug.activation_ranges.set_activation_ranges` sets the encoding and freezes it.

    Args:
        observer: What calibration saw.
        spec: The grid; its granularity is not looked at, as activations have one encoding.

    Returns:
        ``range_min`` and ``range_max``, float32, shape ``()``, for :func:`encoding_from_range`.

    Raises:
        CalibrationError: If the observer saw no finite value.

    Examples:
        >>> observer = Observer()
        >>> observer.observe(torch.tensor([-1.0, 0.5, 2.0]))
        >>> range_from_observer(observer, QuantSpec(8))
        (tensor(-1.), tensor(2.))
    """
    low, high = torch.tensor(observer.range_min), torch.tensor(observer.range_max)
    histogram = observer.histogram
    filled = histogram.counts > 0
    if not bool(filled.any()):
        # Only a sample of the values is counted, and that can have been of infinities alone.
        return low, high
    if spec.effective_range_setting is RangeSetting.PERCENTILE and spec.percentile < 100:
        return _clipped(low, high, *_percentile_of_histogram(histogram, spec))
    if spec.effective_range_setting is not RangeSetting.MSE:
        return low, high
    edges = histogram.lower_edges[filled]
    # A bin stands for its middle. It is off by at most half a bin, at 8 bits a sixteenth of a step or less.
    points = (edges + histogram.bin_width / 2).float().clamp(low, high)
    errors = partial(_errors, points[None], histogram.counts[filled].float(), spec)
    best = search_ranges(low[None], high[None], spec, OF_HISTOGRAM[spec.symmetric], errors)
    return best[0][0], best[1][0]


def range_from_tensor(x: Tensor, spec: QuantSpec, channel_axis: int | None = None) -> tuple[Tensor, Tensor]:
    """The clipping ranges of a weight, by ``spec.effective_range_setting``.

    Args:
        x: The weight: any shape per tensor; ``C`` channels at ``channel_axis`` per channel; ``(C, K)`` per group.
        spec: The grid and its granularity.
        channel_axis: Axis of the channels, counted from the front; ``None`` per tensor.

    Returns:
        ``range_min`` and ``range_max``, float32, of the shape that the scale of an encoding of ``spec`` has.

    Raises:
        CalibrationError: If ``x`` is empty or has values that are not finite.
        SettingsError: If ``channel_axis`` or the shape do not fit the granularity, or the range setting is one of
            activations.

    Examples:
        >>> weight = torch.tensor([[-1.0, 0.5], [0.25, 2.0]])
        >>> range_from_tensor(weight, QuantSpec(8, granularity=Granularity.PER_CHANNEL), 0)
        (tensor([-1.0000,  0.2500]), tensor([0.5000, 2.0000]))
    """
    if spec.effective_range_setting in OF_SINGLE_QUANTIZERS:
        raise SettingsError(
            f"A weight's `range_setting` must be 'min_max', 'percentile' or 'mse', got "
            f"{spec.effective_range_setting.value!r}, which is for activations."
        )
    x = x.detach().float()
    if x.numel() == 0 or not bool(x.isfinite().all()):
        raise CalibrationError(
            f"A weight must have finite values to be given a range, got shape {tuple(x.shape)} with "
            f"{int((~x.isfinite()).sum())} that are NaN or infinite. Mend the weight, or exclude it by its name."
        )
    rows, shape = _rows(x, spec, channel_axis)
    low, high = rows.aminmax(dim=1)
    if spec.effective_range_setting is RangeSetting.PERCENTILE:
        low, high = _clipped(low, high, *_percentile_of_rows(rows, spec))
    elif spec.effective_range_setting is RangeSetting.MSE:
        if rows.shape[0] == 1:
            observer = Observer(values_per_sample=None)
            observer.observe(rows)
            low, high = (end[None].to(x.device) for end in range_from_observer(observer, spec))
        else:
            low, high = _least_error(rows, low, high, spec)
    return low.view(shape), high.view(shape)


def quantized_anew(x: Tensor, spec: QuantSpec, channel_axis: int | None = None) -> Tensor:
    """A weight on the grid that it would get from its own values; arguments as :func:`range_from_tensor` has them.

    Examples:
        >>> quantized_anew(torch.tensor([0.0, 0.4, 3.0]), QuantSpec(2, range_setting="min_max"))
        tensor([0., 0., 3.])
    """
    return fake_quantize(x, encoding_from_range(*range_from_tensor(x, spec, channel_axis), spec, channel_axis))


def _clipped(low: Tensor, high: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Both of ``lower`` and ``upper``, inside the whole range ``[low, high]``."""
    return lower.to(low).clamp(low, high), upper.to(low).clamp(low, high)


def _percentile_of_histogram(histogram: Histogram, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The ends between which a histogram has its values but for the share at each end, float64, shape ``()``.

    Inside a bin the values are taken to lie evenly.
    """
    share = spec.percentile / 100
    counts, first = histogram.counts.double(), round(histogram.range_min / histogram.bin_width)
    if spec.symmetric:
        # A bin's edges are multiples of its width, so that [-(i + 1), -i) mirrored is the bin [i, i + 1).
        bins = torch.arange(first, first + counts.numel())
        mirrored = torch.where(bins < 0, -1 - bins, bins)
        least = mirrored.min()
        end = (least + _below(torch.bincount(mirrored - least, weights=counts), share)) * histogram.bin_width
        return -end, end
    lower = first + counts.numel() - _below(counts.flip(0), share)
    upper = first + _below(counts, share)
    return lower * histogram.bin_width, upper * histogram.bin_width


def _below(counts: Tensor, share: float) -> Tensor:
    """How many bins, with a fraction of the last, hold the ``share`` of all counts."""
    cumulative = counts.cumsum(0)
    wanted = share * cumulative[-1]
    last = torch.searchsorted(cumulative, wanted).clamp(max=counts.numel() - 1)
    missing = cumulative[last] - wanted
    return last + 1 - missing / counts[last]


def _percentile_of_rows(rows: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """For each row, shape ``(R, P)``, the ends beyond which the shares of its values lie, float64, shape ``(R,)``."""
    share = spec.percentile / 100
    if spec.symmetric:
        end = _quantile(rows.abs(), share)
        return -end, end
    return -_quantile(-rows, share), _quantile(rows, share)


def _quantile(rows: Tensor, share: float) -> Tensor:
    """The quantile of each row, linear between two values (as numpy's default), float64, shape ``(R,)``."""
    # Not `torch.quantile`, which takes no more than 16 million values.
    position = share * (rows.shape[1] - 1)
    index = min(int(position), rows.shape[1] - 1)
    below = rows.kthvalue(index + 1, dim=1).values.double()
    above = rows.kthvalue(min(index + 2, rows.shape[1]), dim=1).values.double()
    return below + (above - below) * (position - index)


def _rows(x: Tensor, spec: QuantSpec, channel_axis: int | None) -> tuple[Tensor, tuple[int, ...]]:
    """``x`` as ``(R, P)`` with one row for each encoding, and the shape of the encodings."""
    if spec.granularity is Granularity.PER_TENSOR:
        return x.reshape(1, -1), ()
    if channel_axis is None or not 0 <= channel_axis < x.ndim:
        raise SettingsError(
            f"`channel_axis` must be an axis of the weight counted from the front, got {channel_axis!r} for shape "
            f"{tuple(x.shape)} with granularity {spec.granularity.value!r}."
        )
    if spec.group_size is None:
        return x.movedim(channel_axis, 0).reshape(x.shape[channel_axis], -1), (x.shape[channel_axis],)
    if x.ndim != 2 or channel_axis != 0 or x.shape[1] % spec.group_size:
        raise SettingsError(
            f"Groups of {spec.group_size} must divide axis 1 of a weight of shape (C, K) with channels along axis 0, "
            f"got shape {tuple(x.shape)} with channels along axis {channel_axis}."
        )
    return x.reshape(-1, spec.group_size), (x.shape[0], x.shape[1] // spec.group_size)


def _least_error(rows: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """For each row, shape ``(R, P)``, of values in ``[low, high]`` the range with the least squared error."""
    # Some rows at a time, so that they stay in the cache while all candidates are tried.
    size = max(1, BLOCK_SIZE // rows.shape[1])
    found = [
        search_ranges(least, most, spec, _OF_WEIGHTS[spec.symmetric], partial(_errors, part, None, spec))
        for part, least, most in zip(*(torch.split(each, size) for each in (rows, low, high)), strict=True)
    ]
    lower, upper = zip(*found, strict=True)
    return torch.cat(lower), torch.cat(upper)


def search_ranges(
    low: Tensor, high: Tensor, spec: QuantSpec, search: Search, errors: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """For each of ``R`` tensors the range with the least error among those tried.

    Args:
        low: Least value of each tensor, shape ``(R,)``.
        high: Greatest value of each tensor.
        spec: The grid.
        search: How to search.
        errors: From ranges, shape ``(R, M, 2)``, to the error in each of them, shape ``(R, M)``.

    Returns:
        Lower and upper ends, shape ``(R,)``; of equal errors that which was tried first, the wider one.
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if spec.symmetric:
        scale = torch.maximum(high / spec.quant_max, low / spec.quant_min)
        low, high = scale * spec.quant_min, scale * spec.quant_max
    whole = torch.stack([low, high], -1)[:, None]
    coarse = torch.tensor([search.ratio**-index for index in range(search.count)], device=low.device)
    shares = _pairs(coarse, whole, spec.symmetric).expand(low.shape[0], -1, -1)
    found = errors(shares * whole)
    ratio = search.ratio
    for _ in range(search.refinements):
        best = shares.take_along_dim(found.argmin(1)[:, None, None], 1)
        ratio **= 1 / search.reach
        factors = torch.tensor([ratio**index for index in range(-search.reach, search.reach + 1)], device=low.device)
        finer = (best[:, :, None] * _pairs(factors, whole, spec.symmetric)).flatten(1, 2).clamp(max=1.0)
        shares = torch.cat([best, finer], 1)
        found = errors(shares * whole)
    low, high = (shares * whole).take_along_dim(found.argmin(1)[:, None, None], 1).unbind(-1)
    return low.squeeze(1), high.squeeze(1)


def _pairs(values: Tensor, whole: Tensor, symmetric: bool) -> Tensor:
    """All pairs of ``values`` for both ends, shape ``(M, 2)``; the same for both, or for the only end there is."""
    if symmetric or not bool((whole[..., 0] < 0).any() and (whole[..., 1] > 0).any()):
        return values[:, None].expand(-1, 2)
    return torch.cartesian_prod(values, values)


def _errors(rows: Tensor, weights: Tensor | None, spec: QuantSpec, ranges: Tensor) -> Tensor:
    """Squared error of each row, shape ``(R, P)``, in each of its ``M`` ranges, shape ``(R, M, 2)``: ``(R, M)``.

    ``weights``, shape ``(P,)``, says how often each value counts; ``None``: once.
    """
    spec = replace(spec, granularity=Granularity.PER_CHANNEL, group_size=None)
    if rows.shape[0] == 1:
        # One row in many ranges: as many channels with the same values, some at a time.
        size = max(1, BLOCK_SIZE // rows.shape[1])
        return torch.cat([_error(rows, weights, part, spec) for part in torch.split(ranges[0], size)])[None]
    return torch.stack([_error(rows, weights, part, spec) for part in ranges.unbind(1)], 1)


def _error(rows: Tensor, weights: Tensor | None, ranges: Tensor, spec: QuantSpec) -> Tensor:
    """Squared error of rows, shape ``(R, P)`` or ``(1, P)``, each in its range, shape ``(R, 2)``: ``(R,)``."""
    encoding = encoding_from_range(ranges[:, 0], ranges[:, 1], spec, 0)
    squared = (fake_quantize(rows.expand(ranges.shape[0], -1), encoding) - rows).square_()
    return squared.sum(1) if weights is None else squared @ weights

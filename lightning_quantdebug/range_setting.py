"""Range setting: from observed values to the clipping range of an encoding.

Min-max takes the whole range. MSE takes the range whose grid has the least mean squared error, clipping rare large
values in favour of a finer step (Sung et al., 2015; Choukroun et al., 2019, OMSE). Each candidate is judged by the
encoding and the fake-quantize that will be used, zero point rounding included.

An asymmetric range has two ends that depend on each other: searched one at a time they get stuck far from the best pair
when both tails have outliers. So pairs are tried: all of a coarse grid of shares of the whole range, a constant ratio
apart, then finer and finer around the best. A symmetric grid has one end, and pairs become a line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lightning_quantdebug.encoding import encoding_from_range
from lightning_quantdebug.errors import CalibrationError, SettingsError
from lightning_quantdebug.fake_quantize import BLOCK_SIZE, fake_quantize
from lightning_quantdebug.observer import Observer
from lightning_quantdebug.target import Granularity, QuantSpec, RangeSetting


@dataclass(frozen=True)
class _Search:
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
_OF_HISTOGRAM = {False: _Search(2**0.5, 19, 3, 3), True: _Search(2**0.125, 73, 2, 4)}
# Weights have shorter tails, and each candidate is a pass over all of them: shares down to 1/8 and 1/20.
_OF_WEIGHT = {False: _Search(1.3, 9, 2, 2), True: _Search(1.08, 40, 1, 4)}
"""By whether the grid is symmetric."""


def range_from_observer(observer: Observer, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The clipping range of an activation, by ``spec.effective_range_setting``.

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
    if spec.effective_range_setting is RangeSetting.MIN_MAX:
        return low, high
    histogram = observer.histogram
    filled = histogram.counts > 0
    edges = histogram.lower_edges[filled]
    # A bin stands for its middle. It is off by at most half a bin, at 8 bits a sixteenth of a step or less.
    points = (edges + histogram.bin_width / 2).float().clamp(low, high)
    best = _least_error(points[None], histogram.counts[filled].float(), low[None], high[None], spec, _OF_HISTOGRAM)
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
        SettingsError: If ``channel_axis`` or the shape do not fit the granularity.

    Examples:
        >>> weight = torch.tensor([[-1.0, 0.5], [0.25, 2.0]])
        >>> range_from_tensor(weight, QuantSpec(8, granularity=Granularity.PER_CHANNEL), 0)
        (tensor([-1.0000,  0.2500]), tensor([0.5000, 2.0000]))
    """
    x = x.detach().float()
    if x.numel() == 0 or not bool(x.isfinite().all()):
        raise CalibrationError(
            f"A weight must have finite values to be given a range, got shape {tuple(x.shape)} with "
            f"{int((~x.isfinite()).sum())} that are NaN or infinite. Mend the weight, or exclude it by its name."
        )
    rows, shape = _rows(x, spec, channel_axis)
    low, high = rows.aminmax(dim=1)
    if spec.effective_range_setting is RangeSetting.MSE:
        if rows.shape[0] == 1:
            observer = Observer(values_per_sample=None)
            observer.observe(rows)
            low, high = (end[None].to(x.device) for end in range_from_observer(observer, spec))
        else:
            # Some rows at a time, so that they stay in the cache while all candidates are tried.
            size = max(1, BLOCK_SIZE // rows.shape[1])
            parts = zip(*(torch.split(each, size) for each in (rows, low, high)), strict=True)
            found = [_least_error(part, None, least, most, spec, _OF_WEIGHT) for part, least, most in parts]
            low, high = (torch.cat(ends) for ends in zip(*found, strict=True))
    return low.view(shape), high.view(shape)


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


def _least_error(
    rows: Tensor, weights: Tensor | None, low: Tensor, high: Tensor, spec: QuantSpec, searches: dict[bool, _Search]
) -> tuple[Tensor, Tensor]:
    """For each of ``R`` rows the range with the least squared error.

    Args:
        rows: Values, shape ``(R, P)``.
        weights: How often each value counts, shape ``(P,)``; ``None``: once.
        low: Least value of each row, shape ``(R,)``.
        high: Greatest value of each row.
        spec: The grid.
        searches: How to search, by whether the grid is symmetric.

    Returns:
        Lower and upper ends, shape ``(R,)``.
    """
    search = searches[spec.symmetric]
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if spec.symmetric:
        scale = torch.maximum(high / spec.quant_max, low / spec.quant_min)
        low, high = scale * spec.quant_min, scale * spec.quant_max
    whole = torch.stack([low, high], -1)[:, None]
    coarse = torch.tensor([search.ratio**-index for index in range(search.count)], device=rows.device)
    shares = _pairs(coarse, whole, spec.symmetric).expand(rows.shape[0], -1, -1)
    errors = _errors(rows, weights, shares * whole, spec)
    ratio = search.ratio
    for _ in range(search.refinements):
        best = shares.take_along_dim(errors.argmin(1)[:, None, None], 1)
        ratio **= 1 / search.reach
        factors = torch.tensor([ratio**index for index in range(-search.reach, search.reach + 1)], device=rows.device)
        finer = (best[:, :, None] * _pairs(factors, whole, spec.symmetric)).flatten(1, 2).clamp(max=1.0)
        shares = torch.cat([best, finer], 1)
        errors = _errors(rows, weights, shares * whole, spec)
    low, high = (shares * whole).take_along_dim(errors.argmin(1)[:, None, None], 1).unbind(-1)
    return low.squeeze(1), high.squeeze(1)


def _pairs(values: Tensor, whole: Tensor, symmetric: bool) -> Tensor:
    """All pairs of ``values`` for both ends, shape ``(M, 2)``; the same for both, or for the only end there is."""
    if symmetric or not bool((whole[..., 0] < 0).any() and (whole[..., 1] > 0).any()):
        return values[:, None].expand(-1, 2)
    return torch.cartesian_prod(values, values)


def _errors(rows: Tensor, weights: Tensor | None, ranges: Tensor, spec: QuantSpec) -> Tensor:
    """Squared error of each row, shape ``(R, P)``, in each of its ``M`` ranges, shape ``(R, M, 2)``: ``(R, M)``."""
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

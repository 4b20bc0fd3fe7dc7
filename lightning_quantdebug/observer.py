"""Observers: what is kept of an activation while calibration runs, in bounded memory.

Kept are the least and the greatest finite value, both exact, counts, and a histogram. All of it is a function of the
observed values alone, not of their order or of how they were cut into batches, so the observers of several processes
merge without loss. The histogram has that property because its bins are fixed in advance: a bin is
``[i * 2^k, (i + 1) * 2^k)`` for integers ``i``, and ``k`` is the smallest integer for which ``[range_min, range_max]``
lies in 4096 such bins. A wider range has a greater ``k``, for which bins are joined in pairs; multiplying by a power of
two and flooring are exact, so joining gives what counting anew would give.

Counting costs 5 to 10 ns a value, tens of times a ReLU. So of each sample (a row along the first axis) only about
``values_per_sample`` values are counted, evenly spaced, the first included. The choice depends on the shape of a sample
and not on the batch. Where the first axis is not the batch, extremes and counts are as exact as ever, but which values
are drawn may depend on the batch size. Positions are counted in the order of memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_quantdebug.errors import CalibrationError, SettingsError
from lightning_quantdebug.fake_quantize import dense_view

NUM_BINS = 4096
"""At 8 bits 8 to 16 bins to a step of the grid: fine enough to tell rounding noise, in 32 KiB."""

VALUES_PER_SAMPLE = 1024
"""A calibration of 512 samples draws about 500,000 values of each tensor. See ``benchmarks/fake_quantize.py``."""

_FINEST_BIN = 30
"""Bins are no finer than 2^-30 of the greatest magnitude, beyond the 24 bits of float32, so that ``i`` stays small."""

_SMALLEST_EXPONENT = -1000
"""For tensors of zeros, for which any bin would do: the reciprocal of the bin width is still a float64."""


@dataclass(frozen=True, eq=False)
class Histogram:
    """Counts of equally wide bins.

    Attributes:
        counts: int64, shape ``(B,)`` with ``B`` at most 4096.
        range_min: Lower edge of the first bin, in units of the tensor.
        range_max: Upper edge of the last bin.
    """

    counts: Tensor
    range_min: float
    range_max: float

    @property
    def bin_width(self) -> float:
        """Width of a bin, a power of two, in units of the tensor."""
        return (self.range_max - self.range_min) / self.counts.numel()

    @property
    def lower_edges(self) -> Tensor:
        """Lower edge of each bin, float64, shape ``(B,)``."""
        return self.range_min + self.bin_width * torch.arange(self.counts.numel(), dtype=torch.float64)


class Observer:
    """Range, counts and histogram of all values seen.

    Args:
        values_per_sample: How many values of each row along the first axis enter the histogram, at the most (up to
            rounding); ``None`` for all of them. The range is always exact.

    Raises:
        SettingsError: If ``values_per_sample`` is not a positive integer.

    Examples:
        >>> observer = Observer()
        >>> observer.observe(torch.tensor([[0.5, -1.0], [float("nan"), 3.0]]))
        >>> observer.range_min, observer.range_max, observer.count, observer.non_finite
        (-1.0, 3.0, 3, 1)
    """

    def __init__(self, values_per_sample: int | None = VALUES_PER_SAMPLE) -> None:
        """Begin with nothing seen."""
        if values_per_sample is not None and values_per_sample < 1:
            raise SettingsError(f"`values_per_sample` must be a positive integer or None, got {values_per_sample!r}.")
        self.values_per_sample = values_per_sample
        self.count = 0
        self.non_finite = 0
        self._low = math.inf
        self._high = -math.inf
        self._exponent = _SMALLEST_EXPONENT
        self._first = 0
        # In numpy: a tensor made under inference_mode could not be added to afterwards.
        self._counts: NDArray[np.int64] = np.zeros(NUM_BINS, dtype=np.int64)

    @property
    def range_min(self) -> float:
        """The least finite value seen.

        Raises:
            CalibrationError: If none was seen.
        """
        self._require_values()
        return self._low

    @property
    def range_max(self) -> float:
        """The greatest finite value seen.

        Raises:
            CalibrationError: If none was seen.
        """
        self._require_values()
        return self._high

    @property
    def histogram(self) -> Histogram:
        """The histogram of the values drawn; its bins cover ``[range_min, range_max]``.

        Raises:
            CalibrationError: If no finite value was seen.
        """
        self._require_values()
        bins = _bin_of(self._high, self._exponent) - self._first + 1
        edges = (math.ldexp(edge, self._exponent) for edge in (self._first, self._first + bins))
        return Histogram(torch.from_numpy(self._counts[:bins].copy()), *edges)

    def observe(self, x: Tensor) -> None:
        """Take in a tensor of any shape; NaN and infinities are counted and else ignored.

        Args:
            x: Values, shape ``(N, *)`` with the samples along the first axis.
        """
        x = x.detach()
        if x.numel() == 0:
            return
        values = dense_view(x)
        low, high = _extremes(x.reshape(-1) if values is None else values)
        drawn = _drawn(x, self.values_per_sample)
        finite = x.numel()
        if not (math.isfinite(low) and math.isfinite(high)):
            # The extremes were not finite, so they tell nothing of the others: look again without the culprits.
            rest = x[x.isfinite()]
            finite = rest.numel()
            self.non_finite += x.numel() - finite
            if finite == 0:
                return
            low, high = _extremes(rest)
            drawn = drawn[drawn.isfinite()]
        self.count += finite
        self._widen(low, high)
        self._counts += _counted(drawn, self._exponent, self._first)

    def merge(self, other: Observer) -> None:
        """Take in all that ``other`` has seen, as if it had been observed here.

        Raises:
            SettingsError: If ``other`` draws another number of values.
        """
        if self.values_per_sample != other.values_per_sample:
            raise SettingsError(
                "Only observers with the same `values_per_sample` can be merged, got "
                f"{self.values_per_sample!r} and {other.values_per_sample!r}."
            )
        self.non_finite += other.non_finite
        if other.count == 0:
            return
        self.count += other.count
        self._widen(other._low, other._high)
        self._counts += _rebinned(other._counts, other._first, other._exponent, self._first, self._exponent)

    def state_dict(self) -> dict[str, Any]:
        """All that was seen, as numbers and one tensor."""
        return {
            "values_per_sample": self.values_per_sample,
            "count": self.count,
            "non_finite": self.non_finite,
            "range_min": self._low,
            "range_max": self._high,
            "exponent": self._exponent,
            "first": self._first,
            "counts": torch.from_numpy(self._counts.copy()),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become the observer that ``state`` was taken from."""
        self.values_per_sample = state["values_per_sample"]
        self.count, self.non_finite = state["count"], state["non_finite"]
        self._low, self._high = state["range_min"], state["range_max"]
        self._exponent, self._first = state["exponent"], state["first"]
        self._counts = state["counts"].cpu().numpy().copy()

    def _widen(self, low: float, high: float) -> None:
        """Make the range include ``[low, high]`` and the bins fit it."""
        self._low, self._high = min(self._low, low), max(self._high, high)
        exponent = _bin_exponent(self._low, self._high)
        first = _bin_of(self._low, exponent)
        if (exponent, first) != (self._exponent, self._first):
            self._counts = _rebinned(self._counts, self._first, self._exponent, first, exponent)
            self._exponent, self._first = exponent, first

    def _require_values(self) -> None:
        """Raise if there is nothing to tell a range from."""
        if self.count == 0:
            raise CalibrationError(
                f"An observer must see finite values before its range is known, got none (and {self.non_finite} that "
                "are NaN or infinite). Calibrate on batches that reach this tensor."
            )


def _extremes(values: Tensor) -> tuple[float, float]:
    """Least and greatest value, in one wait for the device; NaN if any value is."""
    low, high = torch.stack(torch.aminmax(values)).tolist()
    return low, high


def _drawn(x: Tensor, values_per_sample: int | None) -> Tensor:
    """The values of ``x`` that enter the histogram, about ``values_per_sample`` of each row along the first axis."""
    if values_per_sample is None or x.ndim < 2:
        return x
    size = x.numel() // x.shape[0]
    step = -(-size // values_per_sample)
    # A step that shares a factor with the size would visit the same columns or channels over and over.
    while math.gcd(step, size) > 1:
        step += 1
    strides = x.stride()
    # Rows in the order of memory are a view also of channels-last and transposed tensors.
    axes = sorted(range(1, x.ndim), key=lambda axis: strides[axis], reverse=True)
    return x.permute(0, *axes).flatten(1)[:, ::step]


def _bin_exponent(low: float, high: float) -> int:
    """The least ``k`` for which ``[low, high]`` lies in :data:`NUM_BINS` bins of width ``2^k``."""
    largest = max(-low, high)
    exponent = max(_SMALLEST_EXPONENT, math.frexp(largest)[1] - _FINEST_BIN if largest else _SMALLEST_EXPONENT)
    if high > low:
        exponent = max(exponent, math.frexp(high - low)[1] - NUM_BINS.bit_length() + 1)
    while _bin_of(high, exponent) - _bin_of(low, exponent) >= NUM_BINS:
        exponent += 1
    return exponent


def _bin_of(value: float, exponent: int) -> int:
    """Number of the bin of width ``2^exponent`` that has ``value``."""
    return math.floor(math.ldexp(value, -exponent))


def _counted(values: Tensor, exponent: int, first: int) -> NDArray[np.int64]:
    """Counts of ``values`` in the bins from ``first`` on."""
    bins = (values.double() * math.ldexp(1.0, -exponent)).floor_().sub_(first).long()
    counts: NDArray[np.int64] = torch.bincount(bins.flatten(), minlength=NUM_BINS).cpu().numpy()
    return counts


def _rebinned(
    counts: NDArray[np.int64], first: int, exponent: int, new_first: int, new_exponent: int
) -> NDArray[np.int64]:
    """The same counts in bins that are as wide or wider and begin elsewhere."""
    (filled,) = counts.nonzero()
    joined = (filled + first) >> (new_exponent - exponent)
    rebinned = np.zeros_like(counts)
    np.add.at(rebinned, joined - new_first, counts[filled])
    return rebinned

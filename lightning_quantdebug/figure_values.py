"""What can be drawn of a report's values: those that are finite numbers. JSON holds ``null`` for the others."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_quantdebug.visuals import TensorState


def finite(values: Iterable[float | None]) -> list[float]:
    """Those that are finite numbers.

    Examples:
        >>> finite([1.0, None, math.nan, 2.0])
        [1.0, 2.0]
    """
    return [value for value in values if value is not None and math.isfinite(value)]


def aligned(values: Sequence[float | None], size: int) -> NDArray[np.float64]:
    """As many values, in their places, with NaN for each that is missing or no finite number.

    Args:
        values: Values of channels, bins or the like.
        size: How many there shall be.

    Returns:
        Shape ``(size,)``.

    Examples:
        >>> aligned([1.0, None], 3).tolist()
        [1.0, nan, nan]
    """
    known = [math.nan if value is None or not math.isfinite(value) else value for value in values[:size]]
    return np.array([*known, *[math.nan] * (size - len(known))], dtype=np.float64)


def noise_of(state: TensorState) -> tuple[float, float]:
    """Mean squared error of rounding and of clipping; 0 for what is no number.

    Args:
        state: The tensor at one moment.

    Examples:
        >>> state = TensorState("qat", 8, "per_tensor", *[()] * 5, None, math.nan, 0.25, *[()] * 4, 0.1, 0)
        >>> noise_of(state)
        (0.25, 0.0)
    """
    rounding, clipping = (max([0.0, *finite([value])]) for value in (state.rounding, state.clipping))
    return rounding, clipping

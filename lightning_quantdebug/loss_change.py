"""Whether the loss of one run differs from that of another beyond noise.

Each run measured its loss against its own FP32, batch by batch, with a 95 % interval (paired within the run). Between
two runs nothing is paired: other weights, perhaps other samples. They are treated as independent. Where both validated
on the same samples their losses move together, so that the interval here is rather too wide than too narrow: what it
calls a regression is one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

LEAST_SHARE = 0.1
"""Without an interval a change counts from this share of the permitted loss on, as a gain does in the flow chart."""

ROUNDING = 1e-6
"""Of a score: metrics are sums in float32, whose last digits depend on the order of the samples."""

Interval = tuple[float, float]


class Outcome(str, Enum):
    """How a loss changed."""

    WORSE = "worse"
    BETTER = "better"
    NOISE = "noise"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Loss:
    """A loss of score against FP32 as one run measured it, positive is worse.

    Attributes:
        value: In the metric's units; ``None`` where it was not measured.
        interval: Its 95 % interval; ``None`` where there is none.
    """

    value: float | None = None
    interval: Interval | None = None

    @classmethod
    def of(cls, value: float | None, interval: tuple[float | None, float | None] | None) -> Loss:
        """The loss with what of it is finite.

        Examples:
            >>> Loss.of(0.1, (0.05, float("nan")))
            Loss(value=0.1, interval=None)
        """
        low, high = (None, None) if interval is None else map(finite, interval)
        return cls(finite(value), None if low is None or high is None else (low, high))


@dataclass(frozen=True)
class LossChange:
    """How a loss changed from run A to run B.

    Attributes:
        value: ``L_B - L_A`` in the metric's units, positive is worse; ``None`` where either was not measured.
        interval: Its 95 % interval; ``None`` where either loss has none.
        outcome: Whether it is beyond noise.
        least: Without an interval: from which change on it counts; ``None`` where any does.
    """

    value: float | None
    interval: Interval | None
    outcome: Outcome
    least: float | None = None

    @property
    def noise(self) -> float | None:
        """How far the interval reaches from the change towards no change; a change beyond that counts."""
        if self.value is None or self.interval is None:
            return None
        return self.value - self.interval[0] if self.value >= 0 else self.interval[1] - self.value


def finite(value: float | None) -> float | None:
    """The number, or ``None`` where it is none.

    Examples:
        >>> finite(0.5), finite(float("inf"))
        (0.5, None)
    """
    return value if value is not None and math.isfinite(value) else None


def difference_interval(first: float, of_first: Interval, second: float, of_second: Interval) -> Interval:
    """The interval of the difference ``second - first`` of two independent estimates, from their own intervals (MOVER).

    With ``x`` in ``[l_x, u_x]`` first and ``y`` in ``[l_y, u_y]`` second::

        low  = y - x - sqrt((y - l_y)^2 + (u_x - x)^2)
        high = y - x + sqrt((u_y - y)^2 + (x - l_x)^2)

    The difference is small where ``y`` is near its low end and ``x`` near its high end: those two halves make its low
    end. With symmetrical intervals both halves are ``sqrt(h_x^2 + h_y^2)``, as for two normal estimates.

    Args:
        first: ``x``.
        of_first: Its interval, both ends finite; an end beyond ``x`` counts as ``x``.
        second: ``y``.
        of_second: Its interval, of the same confidence.

    Returns:
        Low and high end, in the same units and with the same confidence.

    Source: Zou and Donner 2008, "Construction of confidence limits about effect measures: A general approach",
    Statistics in Medicine 27, section 2, for estimates without correlation.

    Examples:
        >>> [round(end, 3) for end in difference_interval(0.10, (0.06, 0.13), 0.20, (0.16, 0.29))]
        [0.05, 0.198]
    """
    value = second - first
    below = math.hypot(max(0.0, second - of_second[0]), max(0.0, of_first[1] - first))
    above = math.hypot(max(0.0, of_second[1] - second), max(0.0, first - of_first[0]))
    return value - below, value + above


def loss_change(a: Loss, b: Loss, permitted: float | None = None, scale: float = 0.0) -> LossChange:
    """Compare the losses of two runs.

    A loss got worse if the whole interval of its change (:func:`difference_interval`) lies above 0, and better if it
    lies below. Where either run knows no interval, a change counts from a tenth of the permitted loss on.

    Args:
        a: Of run A.
        b: Of run B.
        permitted: The permitted loss in the metric's units; where it is not known any change counts.
        scale: A score of these runs: a change of less than a millionth of it is rounding.

    Examples:
        >>> loss_change(Loss(0.01, (0.0, 0.02)), Loss(0.03, (0.02, 0.04))).outcome.value
        'worse'
        >>> loss_change(Loss(0.01, (0.0, 0.02)), Loss(0.02, (0.01, 0.03))).outcome.value
        'noise'
    """
    if a.value is None or b.value is None:
        return LossChange(None, None, Outcome.UNKNOWN)
    value, rounding = b.value - a.value, ROUNDING * max(abs(scale), abs(a.value), abs(b.value))
    if not math.isfinite(value):
        return LossChange(None, None, Outcome.UNKNOWN)
    if a.interval is None or b.interval is None:
        least = None if permitted is None else LEAST_SHARE * permitted
        counts = abs(value) > rounding and abs(value) >= (least or 0.0) - rounding
        return LossChange(value, None, _direction(value) if counts else Outcome.NOISE, least)
    low, high = difference_interval(a.value, a.interval, b.value, b.interval)
    if not math.isfinite(high - low):
        return LossChange(None, None, Outcome.UNKNOWN)
    counts = low > rounding or high < -rounding
    return LossChange(value, (low, high), _direction(value) if counts else Outcome.NOISE)


def _direction(value: float) -> Outcome:
    """What a change that counts is."""
    return Outcome.WORSE if value > 0 else Outcome.BETTER

"""Which quantizers the exact measurement goes on with: those that may still be among the worst.

Pure functions. Measuring a quantizer on a few dozen samples tells its damage with an error bar; one whose bar ends
below those of the ten worst is dropped, and only the others are measured on everything (successive elimination:
Even-Dar et al. 2006, Action Elimination and Stopping Conditions, section 3.1, with normal intervals instead of
Hoeffding's).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

MOST_GUILTY = 10
"""How many of the worst quantizers shall be known exactly: more than a person repairs one by one."""

CERTAINTY = 3.0
"""Standard errors of a bar's half width. Each bar misses its mean with probability 0.0027, so that with the 134
quantizers of MobileNetV2 one race in three has such a bar; a wrong one is dropped only where two bars change places."""

FIRST_SAMPLES = 64
"""Samples of the first round. With 32 the order of the output's noise agrees with that of 1,000 samples at Spearman
0.94, with 128 at 0.98 (CIFAR-10, 54 quantizers)."""

GROWTH = 4
"""How many times more batches each round has than the last, at least: all earlier rounds together cost a third of the
last one at most, even if nothing were dropped."""


class Bar(Protocol):
    """A mean with its standard error."""

    @property
    def damage(self) -> float:
        """Mean damage of a sample."""
        ...

    @property
    def standard_error(self) -> float:
        """Standard error of the mean."""
        ...


def rounds(batches: int, batch_size: float) -> list[int]:
    """Numbers of batches that the rounds of a race have, the last one all of them.

    Args:
        batches: How many batches there are.
        batch_size: Mean number of samples in one.

    Examples:
        >>> rounds(40, 32), rounds(3, 100), rounds(1, 8)
        ([2, 8, 40], [3], [1])
    """
    limits = []
    limit = max(1, math.ceil(FIRST_SAMPLES / max(batch_size, 1.0)))
    while limit * GROWTH <= batches:
        limits.append(limit)
        limit *= GROWTH
    return [*limits, batches]


def contenders(bars: Mapping[str, Bar], most: int = MOST_GUILTY) -> list[str]:
    """The quantizers that may be among the worst.

    Args:
        bars: Damage of each quantizer with its standard error.
        most: How many are looked for.

    Returns:
        Those whose bar reaches as high as the low end of the ``most``-th highest bar, in the order of ``bars``; all of
        them where there are no more.

    Examples:
        >>> from types import SimpleNamespace as Bar
        >>> bars = {name: Bar(damage=mean, standard_error=0.1) for name, mean in (("a", 5), ("b", 1), ("c", 4.9))}
        >>> contenders(bars, most=1)
        ['a', 'c']
    """
    ends = {name: _ends(bar) for name, bar in bars.items()}
    lows = sorted((low for low, _ in ends.values()), reverse=True)
    if len(lows) <= most:
        return list(bars)
    return [name for name, (_, high) in ends.items() if high >= lows[most - 1]]


def _ends(bar: Bar) -> tuple[float, float]:
    """Both ends of a bar; what is not finite may be anything."""
    if not math.isfinite(bar.damage):
        return math.inf, math.inf
    if not math.isfinite(bar.standard_error):
        return 0.0, math.inf
    reach = CERTAINTY * bar.standard_error
    return bar.damage - reach, bar.damage + reach

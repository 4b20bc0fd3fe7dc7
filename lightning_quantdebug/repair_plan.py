"""The order in which single quantizers are repaired, as pure functions: what to try next, and what is kept.

Worst first. The few suspects get every remedy that promises something, one at a time; after them bit-widths are raised
in groups that double, as hundreds of quantizers can not be measured one at a time. At the end bits are given back, the
least needed first, by halving: every group that can be lowered as a whole costs one measurement.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from lightning_quantdebug.report import Sensitivity

LEAST_GAIN_DB = 1.0
"""What a remedy must promise at the quantizer itself to be tried: less than a sixth of a bit is no validation worth."""

MOST_SINGLES = 5
"""Quantizers that are repaired one at a time: as many as their causes are looked for."""


@dataclass(frozen=True)
class SingleTry:
    """One remedy for one quantizer or for several.

    Attributes:
        remedy: ``custom_range``, ``granularity`` or ``bit_width``.
        quantizers: Names.
        variant: The range setting, the granularity, or the bit-widths.
        widths: The bit-width that each quantizer is raised to.
    """

    remedy: str
    quantizers: tuple[str, ...]
    variant: str
    widths: tuple[int, ...] = ()

    @property
    def title(self) -> str:
        """For the report."""
        named = self.quantizers[0] if len(self.quantizers) == 1 else f"{len(self.quantizers)} quantizers"
        return f"{named}: {self.variant}"


def single_tries(row: Sensitivity, widths: Sequence[int], granularities: Sequence[str]) -> list[SingleTry]:
    """What to try at one quantizer, in order: another range, a finer granularity, more bits.

    Args:
        row: The quantizer, with what other settings would give at it.
        widths: Bit-widths that it may be raised to, the narrowest first.
        granularities: Granularities that it may have.

    Examples:
        >>> row = Sensitivity("relu", "activation", 8, None, None, None, 20.0, "exact",
        ...     counterfactuals={"now": 20.0, "mse": 31.0, "percentile_99": 28.0, "bits_16": 68.0})
        >>> [(item.remedy, item.variant) for item in single_tries(row, [16], [])]
        [('custom_range', 'mse'), ('bit_width', '16 bits')]
    """
    tries = [SingleTry("custom_range", (row.quantizer,), name) for name in _ranges(row)]
    tries += [SingleTry("granularity", (row.quantizer,), name) for name in granularities if _gain(row, name) > 0]
    return tries + [raising({row.quantizer: width}) for width in widths[:1]]


def _ranges(row: Sensitivity) -> list[str]:
    """The range that promises most for all values, and the one that does for the bulk of them.

    An outlier that no later layer looks at is most of the signal: only the bulk tells what clipping it is worth.
    """
    names = [name for name in row.counterfactuals if name == "mse" or name.startswith("percentile_")]
    best = [max(names, key=lambda name: _gain(row, name, prefix), default="") for prefix in ("", "bulk_")]
    gains = [_gain(row, name, prefix) for name, prefix in zip(best, ("", "bulk_"), strict=True)]
    return list(dict.fromkeys(name for name, gain in zip(best, gains, strict=True) if gain > 0))


def _gain(row: Sensitivity, name: str, prefix: str = "") -> float:
    """What a setting promises in dB; 0 where that is not worth a try."""
    now, then = (row.counterfactuals.get(f"{prefix}{key}") for key in ("now", name))
    gain = 0.0 if now is None or then is None else then - now
    return gain if gain >= LEAST_GAIN_DB else 0.0


def raising(widths: Mapping[str, int]) -> SingleTry:
    """Raise some quantizers, each to its bit-width.

    Examples:
        >>> raising({"conv.weight": 8, "relu": 16}).title
        '2 quantizers: 8 and 16 bits'
    """
    text = " and ".join(str(width) for width in sorted(set(widths.values())))
    return SingleTry("bit_width", tuple(widths), f"{text} bits", tuple(widths.values()))


def growing_groups(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Names in groups of 1, 1, 2, 4, 8 and so on.

    Examples:
        >>> [len(group) for group in growing_groups([str(number) for number in range(20)])]
        [1, 1, 2, 4, 8, 4]
    """
    start, size = 0, 1
    while start < len(names):
        yield tuple(names[start : start + size])
        start, size = start + size, max(1, start + size)


def give_back(names: Sequence[str], can_lower: Callable[[tuple[str, ...]], bool]) -> list[str]:
    """Lower as many quantizers as may be lowered, the first ones first.

    Args:
        names: The raised quantizers, the least needed first.
        can_lower: Lowers some and says whether that is good; if it is not, it raises them again.

    Returns:
        Those that were lowered. No single one of the others can be lowered after them, as far as it was tried.

    Examples:
        >>> needed = {"c"}
        >>> give_back(["a", "b", "c", "d"], lambda group: not needed & set(group))
        ['a', 'b', 'd']
    """
    if not names:
        return []
    if can_lower(tuple(names)):
        return list(names)
    if len(names) == 1:
        return []
    half = (len(names) + 1) // 2
    lowered = give_back(names[:half], can_lower)
    return lowered + give_back(names[half:], can_lower)


def noise_gain(before: Sequence[float], after: Sequence[float]) -> tuple[float, tuple[float, float] | None]:
    """How far the output's damage has fallen, sample by sample, with its confidence interval (95 %).

    Samples are paired, as what makes one sample fragile does so before and after; batches would be too few.

    Args:
        before: Damage of each sample.
        after: Of the same samples.

    Returns:
        Mean difference, positive is better, and its normal interval; ``None`` where there is none.

    Examples:
        >>> noise_gain([1.0, 2.0, 3.0, 4.0], [0.5, 1.5, 2.5, 3.0])[0]
        0.625
    """
    count = len(before)
    if count != len(after) or count == 0:
        return 0.0, None
    differences = [old - new for old, new in zip(before, after, strict=True)]
    mean = math.fsum(differences) / count
    if count < 2 or not math.isfinite(mean):
        return mean, None
    variance = math.fsum((difference - mean) ** 2 for difference in differences) / (count - 1)
    reach = NormalDist().inv_cdf(0.975) * math.sqrt(variance / count)
    return mean, (mean - reach, mean + reach)


def judge_single(
    remedy: str,
    score_gain: float,
    score_interval: tuple[float, float] | None,
    fallen: float,
    fallen_interval: tuple[float, float] | None,
) -> tuple[bool, str]:
    """Whether the remedy of a single quantizer is kept.

    One quantizer moves the score by less than its noise; how far it moves the output is known much better. So it is
    kept if the score rises beyond noise, or if the output's damage falls beyond noise and the score does not fall
    beyond noise. More bits bring every value nearer to its own, so that they are kept unless something shows the
    contrary: what turns out not to be needed is given back at the end.

    Args:
        remedy: Its name.
        score_gain: Score gained, positive is better.
        score_interval: Its confidence interval, ``None`` where none is known.
        fallen: How far the output's damage has fallen.
        fallen_interval: Its confidence interval.

    Examples:
        >>> judge_single("custom_range", 0.0, (-0.01, 0.01), 0.3, (0.2, 0.4))
        (True, 'the output moved less, beyond noise')
        >>> judge_single("custom_range", -0.02, (-0.03, -0.01), 0.3, (0.2, 0.4))
        (False, 'the score fell beyond noise')
    """
    if score_interval is not None and score_interval[0] > 0:
        return True, "the score rose beyond noise"
    if score_interval is not None and score_interval[1] < 0:
        return False, "the score fell beyond noise"
    if score_interval is None and score_gain < 0 and fallen <= 0:
        return False, "the score fell (no interval is known)"
    if fallen_interval is not None and fallen_interval[0] > 0:
        return True, "the output moved less, beyond noise"
    if remedy != "bit_width":
        return False, "neither score nor output gained beyond noise"
    if fallen_interval is not None and fallen_interval[1] < 0:
        return False, "the output moved more, beyond noise"
    return True, "more bits, and nothing got worse beyond noise"


@dataclass(frozen=True)
class SettingPoint:
    """One setting that was measured.

    Attributes:
        title: What was tried.
        size_bytes: See :class:`lightning_quantdebug.setting_cost.SettingCost`.
        bit_operations: Likewise.
        raised: Likewise.
        score: The monitored score, ``None`` where it is no number.
        loss: Loss of score against FP32.
        interval: Its confidence interval.
    """

    title: str
    size_bytes: float
    bit_operations: float
    raised: int
    score: float | None
    loss: float | None
    interval: tuple[float, float] | None


def on_front(points: Sequence[SettingPoint]) -> list[bool]:
    """Which settings no other one beats: none is as cheap in bytes and bit-operations and as good, and better in one.

    Examples:
        >>> points = [SettingPoint("", size, size, 0, 0.0, loss, None) for size, loss in ((1, 3), (2, 4), (3, 1))]
        >>> on_front(points)
        [True, False, True]
    """

    def beats(one: SettingPoint, other: SettingPoint) -> bool:
        if one.loss is None:
            return False
        if other.loss is None:
            return True
        pairs = ((one.loss, other.loss), (one.size_bytes, other.size_bytes), (one.bit_operations, other.bit_operations))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    return [point.loss is not None and not any(beats(other, point) for other in points) for point in points]


def allowed_tries(tries: Sequence[SingleTry], remedies: Sequence[str] | None) -> list[SingleTry]:
    """Those that the user's choice of remedies allows."""
    return [item for item in tries if remedies is None or item.remedy in remedies]

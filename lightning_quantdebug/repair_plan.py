"""The order in which single quantizers are repaired, as pure functions: what to try next, and what is kept.

Worst first. The few suspects get every remedy that promises something, one at a time; after them bit-widths are raised
in groups that double, as hundreds of quantizers can not be measured one at a time. At the end bits are given back, the
least needed first, by halving: every group that can be lowered as a whole costs one measurement, and after a number of
refusals that grows with the logarithm the rest stays raised.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from lightning_quantdebug.report import Sensitivity

LEAST_GAIN_DB = 1.0
"""What a remedy must promise at the quantizer itself to be tried: less than a sixth of a bit is no validation worth."""

MOST_SINGLES = 5
"""Quantizers that are repaired one at a time: as many as their causes are looked for."""

_LET_RAISE = "let `remedies` have 'bit_width'"


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


def refusals_allowed(count: int) -> int:
    """How many groups may turn out to be needed before the rest is taken to be needed as well.

    All of them up to 8 quantizers. Simulated with costs that spread by a factor of 7 (one standard deviation), a
    ranking that errs by as much, and tolerances of 5 to 70 % of all costs: of 16 to 256 quantizers at least 97 % of
    what could be lowered was, with 39 measurements instead of 396 in the worst case.

    Examples:
        >>> [refusals_allowed(count) for count in (1, 8, 128)]
        [8, 14, 22]
    """
    return 8 + 2 * max(0, count - 1).bit_length()


def give_back(names: Sequence[str], can_lower: Callable[[tuple[str, ...]], bool]) -> list[str]:
    """Lower as many quantizers as may be lowered, the first ones first.

    Args:
        names: The raised quantizers, the least needed first.
        can_lower: Lowers some and says whether that is good; if it is not, it raises them again.

    Returns:
        Those that were lowered. No single one of the others can be lowered after them, unless more groups were refused
        than :func:`refusals_allowed` allows.

    Examples:
        >>> needed = {"c"}
        >>> give_back(["a", "b", "c", "d"], lambda group: not needed & set(group))
        ['a', 'b', 'd']
    """
    left = refusals_allowed(len(names))

    def lowered(group: Sequence[str], is_known_bad: bool) -> list[str]:
        nonlocal left
        if not group or left <= 0:
            return []
        if not is_known_bad:
            if can_lower(tuple(group)):
                return list(group)
            left -= 1
        if len(group) == 1:
            return []
        half = (len(group) + 1) // 2
        first = lowered(group[:half], False)
        # With all of the first half the second half is the whole, which is known.
        return first + lowered(group[half:], len(first) == half)

    return lowered(names, False)


def blocking(names: Sequence[str], repaired: Collection[str]) -> list[str]:
    """The worst quantizers that nothing has helped; where something has helped all of them, the worst.

    Args:
        names: The quantizers, worst first.
        repaired: Those with a remedy that was kept.

    Examples:
        >>> blocking(["a", "b", "c"], {"a"}), blocking(["a", "b"], {"a", "b"})
        (['b', 'c'], ['a', 'b'])
    """
    left = [name for name in names if name not in repaired]
    return (left or list(names))[:MOST_SINGLES]


def next_to_try(is_late: bool, may_raise: bool, can_raise: bool) -> str:
    """The cheapest thing to try where single repairs did not suffice.

    Args:
        is_late: Whether time ran out.
        may_raise: Whether the user's choice of remedies has ``bit_width``.
        can_raise: Whether the engine has more bits for any quantizer as it is now.

    Examples:
        >>> next_to_try(False, may_raise=False, can_raise=True)
        "let `remedies` have 'bit_width'"
    """
    if is_late:
        return "more time (`max_time`), or fewer validation batches (`limit_batches`)"
    if can_raise:
        return "more calibration batches; more bits were tried and did harm" if may_raise else _LET_RAISE
    return "training with quantizers (QAT), or an engine with more bits (`weight_bit_widths`, `activation_bit_widths`)"


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

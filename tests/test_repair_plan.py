"""What to try next and what is kept: pure functions, against simulated losses."""

from __future__ import annotations

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_quantdebug.repair_plan import (
    SettingPoint,
    allowed_tries,
    blocking,
    give_back,
    growing_groups,
    judge_single,
    noise_gain,
    on_front,
    raising,
    refusals_allowed,
    single_tries,
)
from lightning_quantdebug.report import Sensitivity


def row(kind: str = "weight", **counterfactuals: float) -> Sensitivity:
    return Sensitivity("q", kind, 8, None, None, None, 20.0, "exact", counterfactuals=counterfactuals)


def test_only_what_promises_a_decibel_is_tried_and_the_best_range_first() -> None:
    found = single_tries(row(now=20.0, mse=20.9, percentile_99=24.0, per_channel=40.0), [16], ["per_channel"])
    assert [(item.remedy, item.variant) for item in found] == [
        ("custom_range", "percentile_99"),
        ("granularity", "per_channel"),
        ("bit_width", "16 bits"),
    ]
    found = single_tries(
        row(now=20.0, mse=25.0, percentile_99=24.0, per_channel=20.5), [8, 16], ["per_channel", "per_group"]
    )
    assert [item.variant for item in found] == ["mse", "8 bits"]
    assert found[-1].widths == (8,)
    assert single_tries(row(), [], ["per_channel"]) == []


def test_a_range_that_is_better_for_all_but_the_outliers_is_tried_too() -> None:
    values = {"now": 30.0, "mse": 32.0, "percentile_99": 5.0, "percentile_99.9": 6.0}
    bulk = {"bulk_now": 0.0, "bulk_mse": 0.5, "bulk_percentile_99": 40.0, "bulk_percentile_99.9": 30.0}
    found = single_tries(row(**values, **bulk), [], [])
    assert [item.variant for item in found] == ["mse", "percentile_99"]
    assert single_tries(row(now=30.0, mse=30.5, bulk_now=20.0, bulk_mse=20.5), [], []) == []


def test_the_users_choice_of_remedies_holds() -> None:
    tries = single_tries(row(now=20.0, mse=25.0), [16], [])
    assert [item.remedy for item in allowed_tries(tries, ["bit_width"])] == ["bit_width"]
    assert allowed_tries(tries, ()) == []
    assert allowed_tries(tries, None) == tries


def test_raising_names_each_width_once() -> None:
    assert raising({"a": 16, "b": 8, "c": 16}).variant == "8 and 16 bits"
    assert raising({"a": 16, "b": 8, "c": 16}).widths == (16, 8, 16)
    assert raising({"a": 16}).title == "a: 16 bits"


@given(st.integers(0, 200))
def test_groups_have_all_names_once_and_grow(count: int) -> None:
    names = [str(number) for number in range(count)]
    groups = list(growing_groups(names))
    assert [name for group in groups for name in group] == names
    assert len(groups) <= 2 + max(0, count).bit_length()
    sizes = [len(group) for group in groups][:-1]
    assert sizes == sorted(sizes)


@given(st.integers(0, 2**31), st.integers(1, 40), st.floats(0.0, 2.0))
def test_giving_back_never_leaves_the_tolerance_and_leaves_nothing_to_lower(
    seed: int, count: int, tolerance: float
) -> None:
    """Losses add up; what is lowered costs its own. The order is from the least needed to the most."""
    draw = random.Random(seed)
    costs = {str(number): draw.random() ** 4 for number in range(count)}
    names = sorted(costs, key=lambda name: costs[name])
    lowered: set[str] = set()
    measured: list[frozenset[str]] = []
    refused = 0

    def can_lower(group: tuple[str, ...]) -> bool:
        nonlocal refused
        measured.append(frozenset(lowered | set(group)))
        if sum(costs[name] for name in measured[-1]) > tolerance:
            refused += 1
            return False
        lowered.update(group)
        return True

    assert set(give_back(names, can_lower)) == lowered
    assert sum(costs[name] for name in lowered) <= tolerance
    assert len(set(measured)) == len(measured), "no setting is measured twice"
    assert refused <= refusals_allowed(count)
    if refused < refusals_allowed(count):
        left = set(names) - lowered
        assert all(sum(costs[n] for n in lowered) + costs[name] > tolerance for name in left)


def test_halving_takes_few_measurements_where_few_are_needed() -> None:
    measured = 0

    def can_lower(group: tuple[str, ...]) -> bool:
        nonlocal measured
        measured += 1
        return "127" not in group

    assert len(give_back([str(number) for number in range(128)], can_lower)) == 127
    assert measured == 1 + 7
    assert give_back([], can_lower) == []


@pytest.mark.parametrize(("count", "refusals"), [(1, 1), (2, 3), (8, 14), (9, 16), (256, 24)])
def test_where_all_are_needed_few_refusals_are_enough_to_see_it(count: int, refusals: int) -> None:
    seen: list[int] = []
    assert give_back([str(number) for number in range(count)], lambda group: bool(seen.append(len(group)))) == []
    assert len(seen) == refusals
    assert seen[0] == count


def test_what_nothing_has_helped_blocks_the_way() -> None:
    names = [str(number) for number in range(9)]
    assert blocking(names, {"1", "8"}) == ["0", "2", "3", "4", "5"]
    assert blocking(names, set(names)) == ["0", "1", "2", "3", "4"]
    assert blocking([], set()) == []


BEYOND, WITHIN, BELOW = (0.1, 0.9), (-0.1, 0.9), (-0.9, -0.1)


@pytest.mark.parametrize(
    ("remedy", "score", "score_interval", "fallen", "fallen_interval", "kept", "reason"),
    [
        ("custom_range", 0.1, BEYOND, -1.0, BELOW, True, "the score rose beyond noise"),
        ("custom_range", 0.0, WITHIN, 0.5, BEYOND, True, "the output moved less, beyond noise"),
        ("custom_range", 0.0, WITHIN, 0.5, WITHIN, False, "neither score nor output gained beyond noise"),
        ("custom_range", -0.1, BELOW, 0.5, BEYOND, False, "the score fell beyond noise"),
        ("custom_range", -0.1, None, -0.5, BEYOND, False, "the score fell (no interval is known)"),
        ("custom_range", -0.1, None, 0.5, BEYOND, True, "the output moved less, beyond noise"),
        ("granularity", 0.0, None, 0.5, None, False, "neither score nor output gained beyond noise"),
        ("bit_width", 0.0, WITHIN, 0.5, WITHIN, True, "more bits, and nothing got worse beyond noise"),
        ("bit_width", 0.0, WITHIN, 0.5, None, True, "more bits, and nothing got worse beyond noise"),
        ("bit_width", 0.0, WITHIN, -0.5, BELOW, False, "the output moved more, beyond noise"),
        ("bit_width", -0.1, BELOW, 0.5, BEYOND, False, "the score fell beyond noise"),
    ],
)
def test_a_single_repair_is_kept_for_its_score_or_its_output(
    remedy: str, score: float, score_interval: object, fallen: float, fallen_interval: object, kept: bool, reason: str
) -> None:
    assert judge_single(remedy, score, score_interval, fallen, fallen_interval) == (kept, reason)  # type: ignore[arg-type]


def test_noise_gain_is_paired() -> None:
    draw = random.Random(0)
    before = [10 * draw.random() for _ in range(400)]
    after = [value - 0.1 + 0.5 * (draw.random() - 0.5) for value in before]
    gain, interval = noise_gain(before, after)
    differences = [a - b for a, b in zip(before, after, strict=True)]
    assert gain == pytest.approx(statistics.mean(differences))
    reach = 1.959964 * statistics.stdev(differences) / 20
    assert interval == pytest.approx((gain - reach, gain + reach))
    assert interval[0] > 0
    assert noise_gain(before, after[:2]) == (0.0, None)
    assert noise_gain([], []) == (0.0, None)
    assert noise_gain([1.0], [0.5]) == (0.5, None)
    assert noise_gain([float("inf"), 1.0], [0.5, 0.5])[1] is None


def point(size: float, operations: float, loss: float | None) -> SettingPoint:
    return SettingPoint("", size, operations, 0, None if loss is None else 1.0 - loss, loss, None)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 4)), max_size=8))
def test_the_front_is_what_nobody_beats(values: list[tuple[int, int, int]]) -> None:
    points = [point(*value) for value in values]
    for own, on in zip(values, on_front(points), strict=True):
        beaten = any(all(a <= b for a, b in zip(other, own, strict=True)) and other != own for other in values)
        assert on is not beaten


def test_a_setting_without_a_score_is_on_no_front() -> None:
    assert on_front([point(1, 1, None), point(2, 2, 0.5)]) == [False, True]

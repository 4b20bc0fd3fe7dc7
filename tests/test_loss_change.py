"""The rule of regression, by numbers computed by hand, and how often it cries wolf."""

import math

import numpy as np
import pytest

from lightning_quantdebug.loss_change import Loss, LossChange, Outcome, difference_interval, finite, loss_change


def test_each_end_takes_the_halves_that_make_it() -> None:
    # B's lower half 0.04 with A's upper half 0.03, B's upper half 0.12 with A's lower half 0.05.
    low, high = difference_interval(0.10, (0.05, 0.13), 0.20, (0.16, 0.32))
    assert low == pytest.approx(0.10 - 0.05)
    assert high == pytest.approx(0.10 + 0.13)


def test_symmetrical_intervals_add_up_as_squares() -> None:
    low, high = difference_interval(0.1, (0.07, 0.13), 0.1, (0.06, 0.14))
    assert (low, high) == (pytest.approx(-0.05), pytest.approx(0.05))


def test_an_end_beyond_the_estimate_narrows_nothing() -> None:
    assert difference_interval(0.1, (0.05, 0.08), 0.2, (0.22, 0.3)) == (
        pytest.approx(0.1),
        pytest.approx(0.1 + math.hypot(0.1, 0.05)),
    )


@pytest.mark.parametrize(
    ("loss_b", "outcome"),
    [(0.1501, Outcome.WORSE), (0.1499, Outcome.NOISE), (0.0501, Outcome.NOISE), (0.0499, Outcome.BETTER)],
)
def test_a_change_counts_beyond_the_half_width_of_the_difference(loss_b: float, outcome: Outcome) -> None:
    change = loss_change(Loss(0.1, (0.07, 0.13)), Loss(loss_b, (loss_b - 0.04, loss_b + 0.04)))
    assert change.outcome is outcome
    assert change.noise == pytest.approx(0.05)
    assert change.value == pytest.approx(loss_b - 0.1)


def test_the_noise_is_that_towards_no_change() -> None:
    assert LossChange(0.1, (0.04, 0.3), Outcome.WORSE).noise == pytest.approx(0.06)
    assert LossChange(-0.1, (-0.4, -0.02), Outcome.BETTER).noise == pytest.approx(0.08)
    assert LossChange(0.1, None, Outcome.WORSE).noise is None


@pytest.mark.parametrize("missing", ["a", "b", "both"])
@pytest.mark.parametrize(
    ("loss_b", "outcome"),
    [(0.0209, Outcome.NOISE), (0.021, Outcome.WORSE), (0.0191, Outcome.NOISE), (0.019, Outcome.BETTER)],
)
def test_without_an_interval_a_tenth_of_the_permitted_loss_counts(
    missing: str, loss_b: float, outcome: Outcome
) -> None:
    a = Loss(0.02, None if missing in ("a", "both") else (0.02, 0.02))
    b = Loss(loss_b, None if missing in ("b", "both") else (loss_b, loss_b))
    change = loss_change(a, b, permitted=0.01)
    assert (change.outcome, change.interval, change.least) == (outcome, None, pytest.approx(0.001))


def test_without_interval_and_tolerance_any_change_counts_but_rounding() -> None:
    assert loss_change(Loss(0.1), Loss(0.1001)).outcome is Outcome.WORSE
    assert loss_change(Loss(0.1), Loss(0.1001)).least is None
    assert loss_change(Loss(0.1), Loss(0.1 + 1e-9)).outcome is Outcome.NOISE
    assert loss_change(Loss(0.1), Loss(0.1), permitted=0.0).outcome is Outcome.NOISE


def test_rounding_is_no_change_where_intervals_have_no_width() -> None:
    a, b = Loss(0.0, (0.0, 0.0)), Loss(5e-7, (5e-7, 5e-7))
    assert loss_change(a, b, scale=0.9).outcome is Outcome.NOISE
    assert loss_change(a, b, scale=0.09).outcome is Outcome.WORSE


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_what_was_not_measured_can_not_be_compared(value: float | None) -> None:
    known = Loss(0.1, (0.0, 0.2))
    for a, b in ((Loss.of(value, (0.0, 1.0)), known), (known, Loss.of(value, None))):
        assert loss_change(a, b) == LossChange(None, None, Outcome.UNKNOWN)
    assert finite(value) is None


def test_numbers_too_large_to_subtract_are_not_compared() -> None:
    huge = 1.7e308
    assert loss_change(Loss(-huge), Loss(huge)).outcome is Outcome.UNKNOWN
    assert loss_change(Loss(0.0, (-huge, huge)), Loss(0.0, (-huge, huge))).outcome is Outcome.UNKNOWN


def test_an_interval_with_one_end_is_none() -> None:
    assert Loss.of(0.1, (None, 0.2)) == Loss.of(0.1, (0.0, math.nan)) == Loss(0.1)
    assert Loss.of(0.1, (0.0, 0.2)) == Loss(0.1, (0.0, 0.2))


def test_one_in_forty_runs_that_are_alike_is_called_a_regression() -> None:
    random = np.random.default_rng(0)
    spread_a, spread_b, runs = 0.01, 0.03, 20_000
    found = dict.fromkeys(Outcome, 0)
    for x, y in zip(random.normal(0, spread_a, runs), random.normal(0, spread_b, runs), strict=True):
        a = Loss(x, (x - 1.96 * spread_a, x + 1.96 * spread_a))
        b = Loss(y, (y - 1.96 * spread_b, y + 1.96 * spread_b))
        found[loss_change(a, b).outcome] += 1
    assert found[Outcome.WORSE] / runs == pytest.approx(0.025, abs=0.004)
    assert found[Outcome.BETTER] / runs == pytest.approx(0.025, abs=0.004)

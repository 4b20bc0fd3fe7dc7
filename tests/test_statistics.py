"""Intervals: their coverage in simulations, exact cases, and that no global random state is touched."""

from __future__ import annotations

import math
import random
import re
from statistics import NormalDist

import numpy as np
import pytest
import torch

from lightning_quantdebug import statistics
from lightning_quantdebug.errors import SettingsError
from lightning_quantdebug.statistics import paired_interval, samples_to_resolve


def coverage(batches: int, draw, runs: int = 600, confidence: float = 0.95) -> float:
    """Share of simulated validations whose interval has the true difference, 0; the last batch is a small one."""
    generator = np.random.default_rng(1)
    weights = [32.0] * (batches - 1) + [8.0]
    hits = 0
    for run in range(runs):
        differences = [draw(generator, int(weight)) for weight in weights]
        low, high = paired_interval(differences, weights, confidence, resamples=500, seed=run)
        hits += low <= 0.0 <= high
    return hits / runs


def normal(generator: np.random.Generator, samples: int) -> float:
    return generator.normal() / math.sqrt(samples)


def skewed(generator: np.random.Generator, samples: int) -> float:
    return generator.exponential(size=samples).mean() - 1.0


def flips(generator: np.random.Generator, samples: int) -> float:
    """Accuracy: of 100 samples, two become wrong and two become right."""
    return generator.choice([-1.0, 0.0, 1.0], p=[0.02, 0.96, 0.02], size=samples).mean()


@pytest.mark.parametrize("draw", [normal, skewed, flips])
@pytest.mark.parametrize("batches", [4, 8, 30])
def test_95_percent_intervals_hold_the_truth_95_times_in_100(batches, draw):
    assert 0.91 <= coverage(batches, draw) <= 0.985


def test_wanted_confidence_is_had():
    assert 0.76 <= coverage(12, normal, confidence=0.8) <= 0.84


def test_plain_percentiles_would_cover_less():
    """What the widening is for: without it, one interval in six misses with five batches."""
    generator = np.random.default_rng(2)
    hits = 0
    for _ in range(600):
        values = generator.normal(size=5)
        means = values[generator.integers(5, size=(500, 5))].mean(1)
        low, high = np.quantile(means, [0.025, 0.975])
        hits += low <= 0.0 <= high
    assert hits / 600 < 0.88 < coverage(5, normal)


def test_many_batches_give_the_normal_interval():
    generator = np.random.default_rng(3)
    values, weights = generator.normal(0.3, 2.0, size=2000), generator.integers(1, 40, size=2000).astype(float)
    low, high = paired_interval(values.tolist(), weights.tolist(), resamples=4000)
    mean = np.average(values, weights=weights)
    error = math.sqrt(np.sum(weights**2 * (values - mean) ** 2)) / weights.sum()
    assert (low + high) / 2 == pytest.approx(mean, abs=0.1 * error)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.05)


@pytest.mark.parametrize(("batches", "quantile"), [(3, 4.303), (4, 3.182), (6, 2.571), (31, 2.042)])
def test_widening_is_student_over_normal_and_bessel(batches, quantile):
    generator = np.random.default_rng(4)
    values, weights = generator.normal(size=batches), generator.integers(1, 40, size=batches).astype(float)
    low, high = paired_interval(values.tolist(), weights.tolist(), resamples=3000, seed=7)
    drawn = np.random.default_rng(7).integers(batches, size=(3000, batches))
    plain = np.quantile([np.average(values[row], weights=weights[row]) for row in drawn], [0.025, 0.975])
    mean = np.average(values, weights=weights)
    widening = quantile / 1.95996 * math.sqrt(batches / (batches - 1))
    assert high - mean == pytest.approx((plain[1] - mean) * widening, rel=0.01)
    assert mean - low == pytest.approx((mean - plain[0]) * widening, rel=0.01)


def test_weights_count():
    even = paired_interval([1.0, 3.0, 2.0], [5.0, 5.0, 5.0])
    assert even == pytest.approx(paired_interval([1.0, 3.0, 2.0], [1.0, 1.0, 1.0]), rel=1e-12)
    assert paired_interval([1.0, 3.0, 99.0], [1.0, 1.0, 0.0]) == paired_interval([1.0, 3.0], [1.0, 1.0])


def test_equal_differences_have_an_interval_of_no_width():
    assert paired_interval([0.25] * 5, [3.0, 1.0, 2.0, 2.0, 2.0]) == pytest.approx((0.25, 0.25))


@pytest.mark.parametrize(
    ("differences", "weights"),
    [([], []), ([1.0], [4.0]), ([1.0, 2.0], [4.0, 0.0]), ([1.0, float("nan")], [1.0, 1.0]), ([1.0, math.inf], [1, 1])],
)
def test_no_interval_from_too_little(differences, weights):
    assert paired_interval(differences, weights) is None


def test_same_seed_same_interval_and_no_global_random_state():
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    numpy_state = np.random.get_state()[1].copy()
    values = [0.1, 0.4, -0.2, 0.3, 0.0]
    first = paired_interval(values, [1.0] * 5)
    assert first == paired_interval(values, [1.0] * 5)
    assert first != paired_interval(values, [1.0] * 5, resamples=300, seed=1)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert python_state == random.getstate()
    assert (numpy_state == np.random.get_state()[1]).all()


def test_samples_to_resolve_makes_the_interval_fit():
    assert samples_to_resolve(100, (-0.02, 0.02), 0.01) == 400
    assert samples_to_resolve(100, (0.01, 0.05), 0.02) == 100
    assert samples_to_resolve(1000, (0.0, 0.002), 0.01) == 10
    assert samples_to_resolve(50, (0.3, 0.3), 0.01) == 1
    generator = np.random.default_rng(5)
    values = generator.normal(size=100)
    needed = samples_to_resolve(100, paired_interval(values.tolist(), [1.0] * 100), 0.05)
    low, high = paired_interval(generator.normal(size=needed).tolist(), [1.0] * needed)
    assert (high - low) / 2 == pytest.approx(0.05, rel=0.2)


@pytest.mark.parametrize(
    ("samples", "interval", "tolerance"),
    [(100, (0.0, 1.0), 0.0), (100, (0.0, 1.0), -0.1), (0, (0.0, 1.0), 0.1), (100, (0.0, math.inf), 0.1)],
)
def test_samples_that_can_not_be_foretold_are_refused(samples, interval, tolerance):
    with pytest.raises(SettingsError, match=re.escape(f"got tolerance {tolerance!r}, {samples!r} samples")):
        samples_to_resolve(samples, interval, tolerance)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1.0], [1.0, 2.0]), "Each difference must have a weight, got 1 and 2."),
        (([1.0, 2.0], [1.0, -2.0]), "`weights` must be finite and at least 0, got [1.0, -2.0]."),
        (([1.0, 2.0], [1.0, math.nan]), "`weights` must be finite and at least 0, got [1.0, nan]."),
        (([1.0, 2.0], [1.0, 2.0], 1.0), "`confidence` must be in (0, 1) and `resamples` at least 1, got 1.0 and 2000."),
        (([1.0, 2.0], [1.0, 2.0], 0.9, 0), "got 0.9 and 0."),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(SettingsError, match=re.escape(message)):
        paired_interval(*arguments)


@pytest.mark.parametrize("confidence", [0.95, 0.99, 1 - 0.05 / 134])
def test_student_quantile_is_that_of_scipy(confidence: float) -> None:
    from scipy import stats

    upper = 1 - (1 - confidence) / 2
    for freedom in (*range(1, 12), 50, 99, 100, 101, 500):
        found = statistics._student_quantile(NormalDist().inv_cdf(upper), freedom)
        assert found == pytest.approx(stats.t.ppf(upper, freedom), rel=1e-4)

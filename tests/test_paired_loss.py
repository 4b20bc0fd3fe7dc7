"""Losses and interactions against a plain bootstrap."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lightning_quantdebug.evaluation import BatchScore, Evaluation
from lightning_quantdebug.paired_loss import interaction, loss_interval
from lightning_quantdebug.settings import Direction


def test_the_interval_is_that_of_a_plain_bootstrap_centred_on_the_loss_of_the_whole() -> None:
    random = np.random.default_rng(0)
    before, after = random.uniform(0.7, 0.9, 40), random.uniform(0.6, 0.8, 40)
    weights = random.integers(1, 9, 40)
    differences = before - after
    drawn = random.integers(40, size=(20000, 40))
    means = (differences * weights)[drawn].sum(1) / weights[drawn].sum(1)
    mean = float((differences * weights).sum() / weights.sum())

    def evaluation(values: Any, score: float) -> Evaluation:
        pairs = (BatchScore(float(value), float(weight)) for value, weight in zip(values, weights, strict=True))
        return Evaluation(score, {}, tuple(pairs), 200, 0.0)

    for loss in (mean, 0.3):
        interval = loss_interval(evaluation(before, 0.9), evaluation(after, 0.9 - loss), Direction.MAX)
        assert interval is not None
        expected = np.quantile(means, [0.025, 0.975]) + loss - mean
        assert interval == pytest.approx(tuple(expected), abs=0.08 * float(expected[1] - expected[0]))
        mirrored = loss_interval(evaluation(-before, -0.9), evaluation(-after, loss - 0.9), Direction.MIN)
        assert mirrored == pytest.approx(interval)


@pytest.mark.parametrize(
    ("before", "after"),
    [(None, (BatchScore(1.0, 1.0),) * 2), ((BatchScore(1.0, 1.0),) * 2, None), ((BatchScore(1.0, 1.0),) * 3,) * 2],
)
def test_no_interval_without_corresponding_batches(before: Any, after: Any) -> None:
    if before is not None and after is not None:
        after = after[:2]
    first, second = (Evaluation(0.5, {}, batches, 2, 0.0) for batches in (before, after))
    assert loss_interval(first, second, Direction.MIN) is None


def with_batches(values: Any, score: float) -> Evaluation:
    return Evaluation(score, {}, tuple(BatchScore(float(value), 10.0) for value in values), 200, 0.0)


def test_the_interaction_is_what_both_cost_beyond_the_sum() -> None:
    random = np.random.default_rng(1)
    fp32, activations, weights, both = (random.uniform(0.6, 0.9, 20) for _ in range(4))
    evaluations = [with_batches(values, float(values.mean())) for values in (fp32, both, activations, weights)]
    value, interval = interaction(evaluations[0], evaluations[1:], Direction.MAX)
    extra = activations + weights - both - fp32
    assert value == pytest.approx(extra.mean())
    means = extra[random.integers(20, size=(20000, 20))].mean(1)
    expected = np.quantile(means, [0.025, 0.975])
    assert interval == pytest.approx(tuple(expected), abs=0.1 * float(expected[1] - expected[0]))
    worse, _ = interaction(evaluations[0], evaluations[1:], Direction.MIN)
    assert worse == pytest.approx(-extra.mean())


def test_without_one_of_the_three_there_is_no_interaction() -> None:
    one = with_batches([0.5, 0.5], 0.5)
    assert interaction(one, [one, None, one], Direction.MAX) == (None, None)


def test_without_batches_the_interaction_has_no_interval() -> None:
    one, bare = with_batches([0.5, 0.5], 0.5), Evaluation(0.4, {}, None, 2, 0.0)
    value, interval = interaction(one, [bare, one, one], Direction.MAX)
    assert value == pytest.approx(0.1)
    assert interval is None

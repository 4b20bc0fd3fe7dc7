from __future__ import annotations

import numpy as np
import pytest

from lightning_quantdebug.batch_scores import BatchScore
from lightning_quantdebug.evaluation import Evaluation
from lightning_quantdebug.selection import LEAST_BATCHES, Difference, Split
from lightning_quantdebug.settings import Direction


def evaluation(values: list[float], weights: list[float] | None = None, score: float | None = None) -> Evaluation:
    weights = weights or [4.0] * len(values)
    batches = tuple(BatchScore(value, weight) for value, weight in zip(values, weights, strict=True))
    mean = float(np.average(values, weights=weights)) if score is None else score
    return Evaluation(mean, {}, batches, int(sum(weights)), 0.0)


RNG = np.random.default_rng(0)
BEFORE = list(RNG.uniform(0.3, 0.6, 11))
AFTER = [value + 0.1 * (index % 2 == 0) for index, value in enumerate(BEFORE)]
WEIGHTS = [8.0] * 10 + [3.0]


def test_even_batches_choose_and_odd_ones_judge() -> None:
    before, after = evaluation(BEFORE, WEIGHTS), evaluation(AFTER, WEIGHTS)
    split = Split.of(before)
    gain = split.gain(before, after, Direction.MAX)
    assert gain.value == pytest.approx(0.1)
    assert gain.interval is not None
    assert gain.interval[0] <= gain.value <= gain.interval[1]
    assert gain.samples == 8 * 5 + 3
    held_out = split.held_out_loss(before, after, Direction.MAX)
    assert held_out is not None
    assert held_out.value == pytest.approx(0.0)
    assert held_out.samples == 8 * 5


@pytest.mark.parametrize("direction", list(Direction))
def test_a_gain_is_a_loss_with_the_other_sign(direction: Direction) -> None:
    before, after = evaluation(BEFORE, WEIGHTS), evaluation(list(RNG.uniform(0.3, 0.6, 11)), WEIGHTS)
    split = Split.of(before)
    gain, loss = split.gain(before, after, direction), split.held_out_loss(before, after, direction)
    assert loss is not None
    sign = 1 if direction is Direction.MAX else -1
    moved = sign * (np.array([b.value for b in after.batches or ()]) - np.array(BEFORE)) * np.array(WEIGHTS)
    assert gain.value == pytest.approx(moved[::2].sum() / (8 * 5 + 3))
    assert loss.value == pytest.approx(-moved[1::2].sum() / 40)
    assert gain.interval is not None
    assert gain.interval[0] < gain.value < gain.interval[1]


def test_batches_that_the_walk_did_not_see_chose_nothing() -> None:
    walked = evaluation(BEFORE[:8])
    whole, quantized = evaluation(BEFORE), evaluation([value - 0.2 * (i >= 8) for i, value in enumerate(BEFORE)])
    held_out = Split.of(walked).held_out_loss(whole, quantized, Direction.MAX)
    assert held_out is not None
    assert held_out.samples == 4 * (4 + 3)
    assert held_out.value == pytest.approx(0.2 * 3 / 7)


def test_on_several_ranks_batches_beyond_the_walks_can_not_be_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_quantdebug.selection.rank_count", lambda: 2)
    split, whole = Split.of(evaluation(BEFORE[:8])), evaluation(BEFORE)
    assert split.held_out_loss(whole, whole, Direction.MAX) is None
    assert split.held_out_loss(evaluation(BEFORE[:8]), evaluation(BEFORE[:8]), Direction.MAX) is not None


def test_few_batches_choose_and_judge_alike() -> None:
    few = evaluation(BEFORE[: LEAST_BATCHES - 1])
    assert Split.of(few) == Split(None)
    assert Split.of(evaluation(BEFORE[:LEAST_BATCHES])) != Split(None)
    better = evaluation([value + 0.1 for value in BEFORE[: LEAST_BATCHES - 1]])
    gain = Split.of(few).gain(few, better, Direction.MAX)
    assert gain.value == pytest.approx(0.1)
    assert gain.interval == pytest.approx((0.1, 0.1))
    assert Split.of(few).held_out_loss(few, better, Direction.MAX) is None


def test_a_metric_without_batches_chooses_by_its_score() -> None:
    before, after = Evaluation(0.5, {}, None, 9, 0.0), Evaluation(0.7, {}, None, 9, 0.0)
    split = Split.of(before)
    assert split.gain(before, after, Direction.MIN) == Difference(pytest.approx(-0.2), None, 9)
    assert split.held_out_loss(before, after, Direction.MIN) is None

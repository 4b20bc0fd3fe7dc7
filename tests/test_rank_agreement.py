from __future__ import annotations

import math

from lightning_quantdebug.batch_scores import BatchScore
from lightning_quantdebug.rank_agreement import gather, joined_batches, mean_metrics, total_samples


def test_one_process_has_its_own_value() -> None:
    assert gather("mine") == ["mine"]


def test_equal_values_do_not_round() -> None:
    value = 0.1
    assert (value + value + value) / 3 != value
    assert mean_metrics([{"a": value}] * 3) == {"a": value}


def test_values_that_differ_are_averaged_over_those_that_have_them() -> None:
    assert mean_metrics([{"a": 1.0, "b": 2.0}, {"a": 3.0}, {"c": 5.0}]) == {"a": 2.0, "b": 2.0, "c": 5.0}
    assert math.isnan(mean_metrics([{"a": math.nan}, {"a": 1.0}])["a"])


def test_batches_follow_the_ranks() -> None:
    first, second = (BatchScore(1.0, 1.0),), (BatchScore(2.0, 1.0), BatchScore(3.0, 1.0))
    assert joined_batches([first, second]) == first + second
    assert joined_batches([first, None]) is None


def test_samples_add_up() -> None:
    assert total_samples([3, 4]) == 7
    assert total_samples([3, None]) is None

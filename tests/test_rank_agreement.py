from __future__ import annotations

import math
from typing import Any

import pytest

from lightning_quantdebug import rank_agreement
from lightning_quantdebug.batch_scores import BatchScore
from lightning_quantdebug.errors import CalibrationError
from lightning_quantdebug.rank_agreement import (
    _Pass,
    gather,
    joined_batches,
    led_by_rank_zero,
    mean_metrics,
    total_samples,
)


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


class _Ranks:
    """What one of two ranks says and hears; messages stand in for the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rank: int, heard: list[Any] | None = None) -> None:
        self.said: list[Any] = []
        self.passes: list[int | None] = []
        answers = iter(heard or ())
        monkeypatch.setattr(rank_agreement, "rank_count", lambda: 2)
        monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)
        monkeypatch.setattr(rank_agreement, "gather", lambda value: [self._say(value) if rank == 0 else next(answers)])

    def _say(self, value: Any) -> Any:
        self.said.append(value)
        return value

    def runs(self, visit: Any, most: int | None = None) -> None:
        self.passes.append(most)
        visit(lambda: None, 0)


def _two_passes(runs: Any) -> str:
    runs(lambda run, index: run(), 2)
    runs(lambda run, index: run())
    return "found"


def test_rank_zero_tells_of_each_pass_and_of_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = _Ranks(monkeypatch, 0)
    assert led_by_rank_zero(ranks.runs, _two_passes) == "found"
    assert ranks.said == [_Pass(2), _Pass(None), None, "found"]
    assert ranks.passes == [2, None]


def test_the_others_pass_as_often_and_over_as_many_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = _Ranks(monkeypatch, 1, [_Pass(2), _Pass(None), None, "found"])
    assert led_by_rank_zero(ranks.runs, pytest.fail) == "found"
    assert ranks.passes == [2, None]


@pytest.mark.parametrize("rank", [0, 1])
def test_what_the_work_raised_is_raised_on_every_rank(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    error = CalibrationError("a weight must be finite.")
    ranks = _Ranks(monkeypatch, rank, [None, error])

    def work(runs: Any) -> str:
        raise error

    with pytest.raises(CalibrationError, match="a weight must be finite"):
        led_by_rank_zero(ranks.runs, work)
    assert ranks.said == ([None, error] if rank == 0 else [])

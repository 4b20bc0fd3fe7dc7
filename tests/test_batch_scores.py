from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torchmetrics

from lightning_quantdebug.batch_scores import BatchRecorder, BatchScore
from lightning_quantdebug.lightning_compat import LoggedValue


def recorder() -> BatchRecorder:
    return BatchRecorder("score", lambda batch: batch)


def logged(value: Any, batch_size: int = 1, is_mean: bool = True, name: str = "score") -> LoggedValue:
    return LoggedValue((name, f"{name}_epoch"), value, batch_size, is_mean)


def batch(listening: BatchRecorder, size: int | None, *values: LoggedValue) -> None:
    listening.start_batch()
    for value in values:
        listening.on_log(value)
    listening.end_batch(size)


def test_values_weighted_by_what_lightning_weighs_them() -> None:
    listening = recorder()
    batch(listening, 4, logged(torch.tensor(0.5), 4))
    batch(listening, 4, logged(torch.tensor(1.0), 1), logged(torch.tensor(4.0), 2), logged(torch.tensor(9.0), name="x"))
    assert listening.batches() == (BatchScore(0.5, 4.0), BatchScore(3.0, 3.0))
    assert listening.samples() == 8


def test_value_is_that_of_the_moment_and_in_single_precision_at_least() -> None:
    listening = recorder()
    value = torch.tensor(60000.0, dtype=torch.float16)
    listening.start_batch()
    listening.on_log(logged(value, 8))
    listening.end_batch(8)
    value.zero_()
    double = torch.tensor(1 / 3, dtype=torch.float64)
    batch(listening, 8, logged(double, 8))
    assert listening.batches() == (BatchScore(60000.0, 8.0), BatchScore(1 / 3, 8.0))


def test_repeated_step_starts_anew() -> None:
    listening = recorder()
    listening.start_batch()
    listening.on_log(logged(torch.tensor(7.0)))
    listening.start_batch()
    listening.on_log(logged(torch.tensor(1.0)))
    listening.end_batch(1)
    assert listening.batches() == (BatchScore(1.0, 1.0),)


def test_additive_metric_gives_its_value_on_each_batch() -> None:
    metric, listening = torchmetrics.MeanSquaredError(), recorder()
    generator = torch.Generator().manual_seed(0)
    expected = []
    for size in (3, 5, 2):
        outputs, targets = torch.rand(2, size, generator=generator)
        metric.update(outputs, targets)
        expected.append(float((outputs - targets).square().mean()))
        state = copy.deepcopy(metric.metric_state)
        batch(listening, size, logged(metric))
        assert all(torch.equal(value, state[name]) for name, value in metric.metric_state.items())
    scores = listening.batches()
    assert scores is not None
    assert [score.value for score in scores] == pytest.approx(expected, rel=1e-5)
    assert [score.weight for score in scores] == [3.0, 5.0, 2.0]
    assert listening.higher_is_better == {"score": False, "score_epoch": False}


def test_other_metrics_give_what_forward_returned_or_nothing() -> None:
    forwarded, updated = torchmetrics.MaxMetric(), torchmetrics.MaxMetric()
    with_forward, without = recorder(), recorder()
    for value in (3.0, 1.0):
        forwarded(value)
        updated.update(value)
        batch(with_forward, 1, logged(forwarded))
        batch(without, 1, logged(updated))
    assert with_forward.batches() == (BatchScore(3.0, 1.0), BatchScore(1.0, 1.0))
    assert without.batches() is None


def test_metric_without_a_scalar_per_batch() -> None:
    metric, listening = torchmetrics.classification.MulticlassAccuracy(3, average=None), recorder()
    metric.update(torch.tensor([0, 1]), torch.tensor([0, 2]))
    batch(listening, 2, logged(metric))
    assert listening.batches() is None


def test_sums_and_extremes_have_no_batches() -> None:
    listening = recorder()
    batch(listening, 4, logged(torch.tensor(0.5), 1, is_mean=False))
    assert listening.batches() is None
    assert listening.samples() == 4


def test_only_batches_that_logged_count() -> None:
    listening = recorder()
    batch(listening, 4)
    batch(listening, 3, logged(torch.tensor(0.5), 3))
    assert listening.batches() == (BatchScore(0.5, 3.0),)
    assert listening.samples() == 3


def test_logged_at_the_end_of_the_epoch_only() -> None:
    listening = recorder()
    batch(listening, 4)
    batch(listening, 3)
    listening.on_log(logged(torch.tensor(0.5), 1))
    assert listening.batches() is None
    assert listening.samples() == 7


@pytest.mark.parametrize("sizes", [(None, 3), ()])
def test_sizes_that_can_not_be_told(sizes: tuple[int | None, ...]) -> None:
    listening = recorder()
    for size in sizes:
        batch(listening, size)
    assert listening.samples() is None


def test_metric_object_on_batches_of_unknown_size() -> None:
    metric, listening = torchmetrics.MeanMetric(), recorder()
    metric.update(1.0)
    batch(listening, None, logged(metric))
    assert listening.batches() is None

"""Losses of score with their intervals, from evaluations that saw the same batches."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_quantdebug.evaluation import Evaluation
from lightning_quantdebug.flowchart import judge
from lightning_quantdebug.report import Step, StepName
from lightning_quantdebug.settings import Direction, Settings
from lightning_quantdebug.statistics import paired_interval


def loss_interval(
    reference: Evaluation,
    evaluation: Evaluation,
    direction: Direction,
    confidence: float = 0.95,
    resamples: int = 2000,
) -> tuple[float, float] | None:
    """Confidence interval of the loss from the batches' paired differences.

    Args:
        reference: FP32.
        evaluation: The same batches, quantized.
        direction: Whether a small or a large score is good.
        confidence: Probability that the interval is to have.
        resamples: Bootstrap samples.

    Returns:
        The interval, centred so that it belongs to the loss of the whole score; ``None`` where the metric has no value
        per batch or the batches do not correspond.
    """
    if reference.batches is None or evaluation.batches is None or len(reference.batches) != len(evaluation.batches):
        return None
    pairs = list(zip(reference.batches, evaluation.batches, strict=True))
    differences = [direction.loss(before.value, after.value) for before, after in pairs]
    weights = [after.weight for _, after in pairs]
    interval = paired_interval(differences, weights, confidence, resamples)
    if interval is None:
        return None
    # A score that is no plain mean over samples (macro averages, say) differs from the mean over batches.
    mean = sum(d * w for d, w in zip(differences, weights, strict=True)) / sum(weights)
    shift = direction.loss(reference.score, evaluation.score) - mean
    return interval[0] + shift, interval[1] + shift


def judged_step(name: StepName, reference: Evaluation, evaluation: Evaluation, settings: Settings) -> Step:
    """A step of the report from its score.

    Args:
        name: The step.
        reference: FP32.
        evaluation: The same batches, quantized.
        settings: Direction of the score and tolerance.
    """
    direction = settings.direction
    loss = direction.loss(reference.score, evaluation.score)
    interval = loss_interval(reference, evaluation, direction)
    permitted = settings.tolerance.permitted_loss(reference.score)
    return Step(name, judge(loss, interval, permitted), evaluation.score, loss, interval)


def interaction(
    reference: Evaluation, measured: Sequence[Evaluation | None], direction: Direction
) -> tuple[float | None, tuple[float, float] | None]:
    """What weights and activations cost together beyond the sum of what each costs alone.

    Args:
        reference: FP32.
        measured: Both quantized, only the activations, only the weights.
        direction: Whether a small or a large score is good.

    Returns:
        The difference and its confidence interval, each ``None`` where it can not be told.
    """
    known = [evaluation for evaluation in measured if evaluation is not None]
    if len(known) < 3:
        return None, None
    losses = [direction.loss(reference.score, evaluation.score) for evaluation in known]
    value = losses[0] - losses[1] - losses[2]
    if reference.batches is None or any(len(e.batches or ()) != len(reference.batches) for e in known):
        return value, None
    batches = zip(reference.batches, *(evaluation.batches or () for evaluation in known), strict=True)
    differences = [
        direction.loss(fp32.value, both.value)
        - direction.loss(fp32.value, activations.value)
        - direction.loss(fp32.value, weights.value)
        for fp32, both, activations, weights in batches
    ]
    return value, paired_interval(differences, [batch.weight for batch in reference.batches])

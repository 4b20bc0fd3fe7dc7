"""What was measured of one quantizer, as plain numbers, and what it is worth among all that were tested."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_quantdebug.evaluation import Evaluation
from lightning_quantdebug.output_meter import NoiseSums
from lightning_quantdebug.paired_loss import loss_interval
from lightning_quantdebug.settings import Direction

LEAST_SHARE = 0.5
"""Share of the permitted loss from which on a loss is called guilt. A paired loss may be certain and yet small: on a
healthy perceptron (digits, W8A8, a cross-entropy of 0.18 with a tolerance of 1 %) one weight certainly costs 0.27 of
what is permitted, and the model passes as a whole."""

ERROR_RATE = 0.05
"""Probability that on a healthy model any quantizer at all is called guilty: 0.05 as of every interval here."""


@dataclass(frozen=True)
class Measurement:
    """One quantizer alone, the rest in FP32.

    Attributes:
        score: The monitored score; ``None`` where it is no finite number.
        loss: Loss of score against FP32 on the same samples; ``None`` where the score is none.
        interval: Its confidence interval (95 %).
        least_loss: What the loss is at least, with as many quantizers tested as there are; ``None``: not known.
        sqnr_db: SQNR of the output.
        kl: Mean divergence of the output's classes, in nats.
        damage: What the ranking goes by, see :class:`lightning_quantdebug.output_meter.BatchNoise`.
        standard_error: Of the damage.
        samples: Samples behind all of this.
        whole: Whether these are all samples.
    """

    score: float | None
    loss: float | None
    interval: tuple[float, float] | None
    least_loss: float | None
    sqnr_db: float
    kl: float | None
    damage: float
    standard_error: float
    samples: int
    whole: bool


def measurement(
    reference: Evaluation, evaluation: Evaluation, noise: NoiseSums, direction: Direction, tested: int, whole: bool
) -> Measurement:
    """Put together what one quantizer's evaluation and outputs say.

    Args:
        reference: FP32 on the same batches.
        evaluation: The quantizer alone.
        noise: Of the outputs of the same batches, those of all ranks.
        direction: Whether a small or a large score is good.
        tested: How many quantizers are tested together.
        whole: Whether these are all batches.
    """
    finite = math.isfinite(evaluation.score) and math.isfinite(reference.score)
    interval = loss_interval(reference, evaluation, direction) if finite else None
    least = None
    if interval is not None and interval[0] > 0:
        # Bonferroni; tails this thin need more draws than the usual interval.
        confidence = 1.0 - ERROR_RATE / max(1, tested)
        certain = loss_interval(reference, evaluation, direction, confidence, resamples=20_000)
        least = None if certain is None else certain[0]
    return Measurement(
        score=evaluation.score if finite else None,
        loss=direction.loss(reference.score, evaluation.score) if finite else None,
        interval=interval,
        least_loss=least,
        sqnr_db=noise.sqnr_db,
        kl=noise.mean_kl,
        damage=noise.damage,
        standard_error=noise.standard_error,
        samples=noise.samples or evaluation.samples or 0,
        whole=whole,
    )


def is_guilty(found: Measurement, permitted: float) -> bool:
    """Whether a quantizer alone costs score: certainly, and enough to matter; or it makes the score no number.

    Args:
        found: What was measured.
        permitted: The tolerance in the metric's units.
    """
    if found.score is None:
        return True
    assert found.loss is not None
    return found.least_loss is not None and found.least_loss > 0 and found.loss >= LEAST_SHARE * permitted


def worst_first(found: Mapping[str, Measurement]) -> list[str]:
    """Names of the quantizers: those without a score first, then by damage, SQNR, and as given."""
    order = {name: index for index, name in enumerate(found)}

    def rank(name: str) -> tuple[bool, float, float, int]:
        one = found[name]
        damage = one.damage if math.isfinite(one.damage) else math.inf
        return one.score is not None, -damage, one.sqnr_db, order[name]

    return sorted(found, key=rank)

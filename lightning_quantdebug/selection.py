"""Which validation batches choose between remedies, and which judge the model that was chosen.

A remedy that was chosen because it did well on some samples does better there than elsewhere (Stone 1974,
cross-validatory choice). So the batches are split by turns: those with an even number choose, the others judge. Both
halves come out of one evaluation, and all batches are the same in every evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_quantdebug.batch_scores import BatchScore
from lightning_quantdebug.evaluation import Evaluation
from lightning_quantdebug.paired_loss import loss_interval
from lightning_quantdebug.rank_agreement import rank_count
from lightning_quantdebug.settings import Direction
from lightning_quantdebug.statistics import paired_interval

LEAST_BATCHES = 8
"""With fewer, a half has three batches or less, whose interval is so wide that no gain could be told from noise."""


@dataclass(frozen=True)
class Difference:
    """A difference of scores with its confidence interval (95 %) and the samples behind it."""

    value: float
    interval: tuple[float, float] | None
    samples: float | None


@dataclass(frozen=True)
class Split:
    """Which batches choose.

    Attributes:
        chooses: For each batch of the walk's evaluations, whether it chooses; ``None``: there is nothing to split, so
            that everything chooses and judges.
    """

    chooses: tuple[bool, ...] | None = None

    @classmethod
    def of(cls, reference: Evaluation) -> Split:
        """The split of the batches that ``reference`` saw.

        Examples:
            >>> batches = tuple(BatchScore(0.5, 32.0) for _ in range(8))
            >>> Split.of(Evaluation(0.5, {}, batches, 256, 1.0)).chooses[:3]
            (True, False, True)
        """
        if reference.batches is None or len(reference.batches) < LEAST_BATCHES:
            return cls()
        return cls(tuple(index % 2 == 0 for index in range(len(reference.batches))))

    def gain(self, before: Evaluation, after: Evaluation, direction: Direction) -> Difference:
        """Score gained from ``before`` to ``after`` on the batches that choose; positive is better."""
        if self.chooses is None:
            gain = -direction.loss(before.score, after.score)
            interval = loss_interval(before, after, direction)
            flipped = None if interval is None else (-interval[1], -interval[0])
            return Difference(gain, flipped, after.samples)
        loss = _difference(before, after, self.chooses, direction)
        interval = None if loss.interval is None else (-loss.interval[1], -loss.interval[0])
        return Difference(-loss.value, interval, loss.samples)

    def held_out_loss(self, reference: Evaluation, evaluation: Evaluation, direction: Direction) -> Difference | None:
        """Loss on the batches that chose nothing; ``None`` if there are none.

        Both evaluations may have seen more batches than the walk's: those chose nothing.
        """
        if self.chooses is None or reference.batches is None:
            return None
        more = len(reference.batches) - len(self.chooses)
        if more and rank_count() > 1:
            # The batches of several ranks stand one rank after the other: which of them chose can not be told.
            return None
        return _difference(
            reference, evaluation, [not chose for chose in self.chooses] + [True] * max(0, more), direction
        )


def _difference(
    reference: Evaluation, evaluation: Evaluation, wanted: Sequence[bool], direction: Direction
) -> Difference:
    """Loss from ``reference`` to ``evaluation`` on some batches."""
    pairs = _chosen(reference, evaluation, wanted)
    losses = [direction.loss(before.value, after.value) for before, after in pairs]
    weights = [after.weight for _, after in pairs]
    value = sum(loss * weight for loss, weight in zip(losses, weights, strict=True)) / sum(weights)
    return Difference(value, paired_interval(losses, weights), sum(weights))


def _chosen(
    reference: Evaluation, evaluation: Evaluation, wanted: Sequence[bool]
) -> list[tuple[BatchScore, BatchScore]]:
    """The wanted batches of two evaluations, in pairs."""
    assert reference.batches is not None
    assert evaluation.batches is not None
    triples = zip(reference.batches, evaluation.batches, wanted, strict=True)
    return [(before, after) for before, after, is_wanted in triples if is_wanted]

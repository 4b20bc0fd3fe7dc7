"""What the ranks of a distributed run found, put together so that all of them go on with the same numbers.

A metric that the user logs without ``sync_dist`` differs from rank to rank. Were each rank to decide by its own value,
one could start another pass while the other stops, and both would wait for ever.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch.distributed

from lightning_quantdebug.batch_scores import BatchScore
from lightning_quantdebug.errors import QuantDebugError
from lightning_quantdebug.layers import Runs, Visit

T = TypeVar("T")


def gather(value: T) -> list[T]:
    """The values of all ranks in order of rank; of one process just its own."""
    if rank_count() == 1:
        return [value]
    gathered: list[T | None] = [None] * rank_count()
    torch.distributed.all_gather_object(gathered, value)
    return gathered  # type: ignore[return-value] # every place was filled


def is_spent(budget: timedelta | None, started: float) -> bool:
    """Whether a time budget is spent on any rank, as all must take the same way.

    Args:
        budget: ``None``: there is none, and no rank is asked.
        started: When it began to run, in seconds of ``time.monotonic``.
    """
    return budget is not None and any(gather(time.monotonic() - started >= budget.total_seconds()))


def rank_count() -> int:
    """The number of processes that walk together; asking waits for nobody."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size()


def is_rank_zero() -> bool:
    """Whether this process leads, or is alone."""
    return rank_count() == 1 or torch.distributed.get_rank() == 0


def from_rank_zero(value: T) -> T:
    """The value that rank zero has; of one process just its own."""
    return gather(value)[0]


def led_by_rank_zero(runs: Runs, work: Callable[[Runs], T]) -> T:
    """What rank zero makes of its batches, on every rank.

    How often work goes over the batches may depend on what it finds there, and each pass ends with all ranks together.
    So rank zero works, and the others go over their batches as often as it does.

    Args:
        runs: The batches of this rank.
        work: Takes the batches, and returns what can be pickled.

    Raises:
        QuantDebugError: What the work raised, on every rank.
    """
    if rank_count() == 1:
        return work(runs)
    if torch.distributed.get_rank() > 0:
        while (asked := from_rank_zero(cast("_Pass | None", None))) is not None:
            runs(lambda run, index: None, asked.most)
        found: T | QuantDebugError = from_rank_zero(cast(T, None))
    else:
        found = from_rank_zero(_led(runs, work))
    if isinstance(found, QuantDebugError):
        raise found
    return found


@dataclass(frozen=True)
class _Pass:
    """Word that rank zero goes over its batches once more, over how many at the most."""

    most: int | None


def _led(runs: Runs, work: Callable[[Runs], T]) -> T | QuantDebugError:
    """Work on rank zero, with a word to the others ahead of each pass and after the last."""

    def led(visit: Visit, most: int | None = None) -> None:
        from_rank_zero(_Pass(most))
        runs(visit, most)

    try:
        return work(led)
    except QuantDebugError as error:
        return error
    finally:
        from_rank_zero(None)


def mean_metrics(metrics: Sequence[dict[str, float]]) -> dict[str, float]:
    """Mean over the ranks that have a metric; ranks that agree keep their value to the last bit.

    Example:
        >>> mean_metrics([{"a": 1.0, "b": 0.1}, {"a": 2.0}])
        {'a': 1.5, 'b': 0.1}
    """
    names = dict.fromkeys(name for one in metrics for name in one)
    return {name: _mean([one[name] for one in metrics if name in one]) for name in names}


def _mean(values: list[float]) -> float:
    """Mean that does not round when all values are equal."""
    return values[0] if all(value == values[0] for value in values) else sum(values) / len(values)


def joined_batches(batches: Sequence[tuple[BatchScore, ...] | None]) -> tuple[BatchScore, ...] | None:
    """The batches of all ranks one rank after the other, ``None`` if a rank has none to show."""
    present = [part for part in batches if part is not None]
    return tuple(batch for part in present for batch in part) if len(present) == len(batches) else None


def total_samples(samples: Sequence[int | None]) -> int | None:
    """Number of samples over all ranks, ``None`` if a rank can not tell."""
    known = [count for count in samples if count is not None]
    return sum(known) if len(known) == len(samples) else None

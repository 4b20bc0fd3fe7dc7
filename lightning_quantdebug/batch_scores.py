"""The score of each batch, gathered while the user's loop runs, so that two configurations can be compared in pairs.

What a metric is worth on one batch follows from what was logged: a float or tensor *is* the batch's value; of a metric
object whose states are sums (accuracy, mean error ...) the difference of the states before and after the batch is
computed; of other metric objects the value that ``forward`` returned is taken. A score that only comes to be at the
end of the epoch has no batches, and none are invented.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_sum

from lightning_quantdebug.lightning_compat import LoggedValue


@dataclass(frozen=True)
class BatchScore:
    """Value of the monitored metric on one batch, and how much it counts: the number of samples."""

    value: float
    weight: float


class BatchRecorder:
    """Listens to what a pass logs under ``monitor`` and keeps it batch by batch.

    Args:
        monitor: Name of the monitored metric.
        batch_size_of: Number of samples in a batch, ``None`` where it can not be told.
    """

    def __init__(self, monitor: str, batch_size_of: Callable[[Any], int | None]) -> None:
        """Start with no batches."""
        self.higher_is_better: dict[str, bool | None] = {}
        self._monitor = monitor
        self._batch_size_of = batch_size_of
        self._logged: list[LoggedValue] | None = None
        self._entries: list[tuple[Tensor | float | None, int | None]] = []
        self._sizes: list[int | None] = []
        self._counted: list[int | None] = []
        self._previous: dict[int, dict[str, Any]] = {}

    def start_batch(self) -> None:
        """Forget what was logged for the current batch, if anything; a repeated step starts anew."""
        self._logged = []

    def on_log(self, logged: LoggedValue) -> None:
        """Take note of one call of ``self.log``."""
        if isinstance(logged.value, Metric):
            self.higher_is_better.update(dict.fromkeys(logged.names, logged.value.higher_is_better))
        if self._logged is not None and self._monitor in logged.names:
            self._logged.append(logged)

    def end_batch(self, batch: Any) -> None:
        """Reduce what was logged for this batch to one value and a weight."""
        logged, self._logged = self._logged or [], None
        size = self._batch_size_of(batch)
        self._sizes.append(size)
        if not logged:
            return
        self._counted.append(size)
        if isinstance(logged[0].value, Metric):
            self._entries.append((self._metric_value(logged[-1].value), size))
        elif all(item.is_mean for item in logged):
            self._entries.append(_weighted_mean(logged))
        else:
            self._entries.append((None, size))

    def batches(self) -> tuple[BatchScore, ...] | None:
        """The batches' scores in the order of the loader, or ``None`` if the metric has none."""
        known = [
            BatchScore(float(value), float(weight))
            for value, weight in self._entries
            if value is not None and weight is not None
        ]
        return tuple(known) if known and len(known) == len(self._entries) else None

    @property
    def count(self) -> int:
        """Number of batches, whether they logged the metric or not."""
        return len(self._sizes)

    def samples(self) -> int | None:
        """Number of samples behind the score: of the batches that logged it, or of all if none did."""
        sizes = self._counted or self._sizes
        return None if not sizes or None in sizes else sum(size for size in sizes if size is not None)

    def _metric_value(self, metric: Metric) -> Tensor | None:
        """Value of a metric object on this batch alone."""
        if not _is_additive(metric):
            cached = metric._forward_cache
            return cached.detach().clone() if isinstance(cached, Tensor) and cached.numel() == 1 else None
        states = {name: getattr(metric, name).detach().clone() for name in metric._defaults}
        before = self._previous.get(id(metric), metric._defaults)
        self._previous[id(metric)] = states
        return _compute_from(metric, {name: states[name] - _on(before[name], states[name]) for name in states})


def _weighted_mean(logged: list[LoggedValue]) -> tuple[Tensor, int]:
    """Mean and weight of what one batch logged, in single precision at least, as Lightning averages."""
    weight = sum(item.batch_size for item in logged)
    values = [item.value.detach() for item in logged]
    values = [value if value.dtype == torch.float64 else value.float() for value in values]
    total = sum((value * item.batch_size for value, item in zip(values, logged, strict=True)), torch.zeros(()))
    return total / weight, weight


def _is_additive(metric: Metric) -> bool:
    """Whether every state of a metric is a tensor that sums over batches."""
    reductions = metric._reductions
    tensors = all(isinstance(default, Tensor) for default in metric._defaults.values())
    return bool(metric._defaults) and tensors and all(reduce is dim_zero_sum for reduce in reductions.values())


def _on(default: Any, state: Tensor) -> Any:
    """A default state on the device of the live one."""
    return default.to(state.device) if isinstance(default, Tensor) else default


def _compute_from(metric: Metric, states: dict[str, Tensor]) -> Tensor | None:
    """Value of a copy of ``metric`` that has the given states, without asking other ranks."""
    alone = copy.deepcopy(metric)
    for name, state in states.items():
        setattr(alone, name, state)
    alone._update_count, alone._computed, alone._to_sync = 1, None, False
    with torch.no_grad():
        value = alone.compute()
    return value.detach() if isinstance(value, Tensor) and value.numel() == 1 else None

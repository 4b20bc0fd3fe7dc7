"""Several evaluations side by side in one pass: each batch is loaded once and goes through every lane.

A lane is one evaluation of its own: all that a batch changes, in the user's module (metric objects, lists, counters),
in Lightning's loop and in its log, is given to the lane before its batch and taken from it afterwards. At the end of
the loop each lane goes through the user's own hooks and Lightning's, with what it has gathered. So a lane ends with
the numbers of a pass of its own, also of metrics that only come to be at the end of the epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from torch import Tensor

from lightning_quantdebug import lightning_compat as compat
from lightning_quantdebug.batch_scores import BatchRecorder
from lightning_quantdebug.errors import LanesError, TooManyLanesError
from lightning_quantdebug.module_state import StateSnapshot
from lightning_quantdebug.operations import tensors_in
from lightning_quantdebug.random_state import RandomState

MOST_BYTES = 1 << 30
"""What all lanes together may hold of metrics and lists. A classification of 50,000 samples and 1,000 classes whose
AUROC keeps every probability holds 0.4 GB: a few lanes fit, a hundred do not, and are then run in smaller groups."""


class Schedule(Protocol):
    """Which lanes a pass has, and which of them see a batch."""

    def lanes(self) -> Sequence[str]:
        """The lanes that the next batch goes through, in order: the first one sees every batch."""
        ...

    def enter(self, lane: str) -> None:
        """Make everything ready for one lane's batch."""
        ...

    def left(self, lane: str) -> None:
        """Called after a lane's batch."""
        ...


class Lanes:
    """Runs the batches of a validation loop through several lanes.

    Args:
        loop: The loop, before it runs.
        roots: What a batch may change besides the loop: the user's module.
        schedule: Which lanes there are.
        new_recorder: Makes what listens to a lane's log.

    Attributes:
        metrics: What each lane has logged in the end, by its name.
        recorders: What listened to each lane.
    """

    def __init__(
        self, loop: Any, roots: Sequence[Any], schedule: Schedule, new_recorder: Callable[[], BatchRecorder]
    ) -> None:
        """Nothing ran yet."""
        self.metrics: dict[str, dict[str, Tensor]] = {}
        self.recorders: dict[str, BatchRecorder] = {}
        self._loop = loop
        self._roots = roots
        self._schedule = schedule
        self._new_recorder = new_recorder
        self._skip = compat.bare_module_attributes(loop.trainer)
        self._states: dict[str, StateSnapshot] = {}
        self._start: StateSnapshot | None = None
        self._current: BatchRecorder | None = None

    @property
    def recorder(self) -> BatchRecorder:
        """What listens to the lane that is at work."""
        assert self._current is not None
        return self._current

    def on_log(self, logged: compat.LoggedValue) -> None:
        """Tell the lane that is at work what was logged."""
        if self._current is not None:
            self._current.on_log(logged)

    def batch(self, evaluate: Callable[[], None], batch: Any) -> None:
        """Run one batch through its lanes.

        Raises:
            LanesError: If the lanes can not be kept apart, or (``TooManyLanesError``) hold too much.
        """
        if self._start is None:
            self._start = self._snapshot()
        transferred: list[tuple[Any, list[int]]] = []
        before = RandomState()
        with compat.transferred_once(self._loop.trainer, lambda moved: transferred.append((moved, _versions(moved)))):
            for lane in self._schedule.lanes():
                self._current = self.recorders.setdefault(lane, self._new_recorder())
                self._states.get(lane, self._start).restore()
                # Each lane draws the numbers that the first one draws, and the loaders go on behind them.
                before.restore()
                self._schedule.enter(lane)
                evaluate()
                self._current.end_batch(batch)
                self._schedule.left(lane)
                self._states[lane] = self._snapshot()
                self._check(lane, any(versions != _versions(moved) for moved, versions in transferred))

    def store(self, store_outputs: Callable[[], None]) -> None:
        """Let every lane end a loader."""
        before = RandomState()
        for lane in self._in_order():
            self._states[lane].restore()
            before.restore()
            store_outputs()
            self._states[lane] = self._snapshot()

    def end(self, end_run: Callable[[], Any]) -> Any:
        """Let every lane end the epoch; the first lane's result is returned."""
        result, before = None, RandomState()
        for lane in self._in_order():
            self._states[lane].restore()
            before.restore()
            self._current = self.recorders[lane]
            result = end_run()
            self.metrics[lane] = dict(self._loop.trainer._logger_connector._callback_metrics)
        return result

    def _in_order(self) -> list[str]:
        """The lanes, the first one last, so that what remains is as after a pass of its own."""
        return [*reversed(self._states)]

    def _snapshot(self) -> StateSnapshot:
        """All that a batch may change, as it is now."""
        return StateSnapshot(*self._roots, *compat.batch_state(self._loop), skip=self._skip, passive=True)

    def _check(self, lane: str, wrote: bool) -> None:
        """Raise if lanes disturb each other or hold too much."""
        if wrote:
            raise LanesError("`validation_step` writes into its batch, so that a second run would get another one")
        if sum(state.num_bytes for state in self._states.values()) > MOST_BYTES:
            raise TooManyLanesError(
                f"what validation gathers takes {self._states[lane].num_bytes / 2**20:.0f} MiB for each quantizer"
            )


def _versions(batch: Any) -> list[int]:
    """How often each tensor of a batch was written into."""
    return [0 if tensor.is_inference() else tensor._version for _, tensor in tensors_in((batch,), {})]

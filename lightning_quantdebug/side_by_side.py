"""Measure many settings of the quantizers in one pass of validation, batch by batch.

For each batch FP32 is run once and recorded; every other setting is a lane (:mod:`lightning_quantdebug.lanes`) that
computes only what differs from it (:mod:`lightning_quantdebug.replay`). A control lane, FP32 once more after all
others, shows that they did not disturb each other. Where validation can not go through lanes, each setting gets a pass
of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from lightning_quantdebug.errors import LanesError
from lightning_quantdebug.evaluation import Evaluation, Evaluator
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.output_meter import NoiseSums, OutputMeter
from lightning_quantdebug.rank_agreement import gather
from lightning_quantdebug.replay import Memo

Setting = Callable[[], Any]
"""Makes the context in which the quantizers are as a setting has them, all others bypassed or not as it likes."""

_RECORDED, _CONTROL = "recorded", "control"

SAME_SCORE = 1e-5
"""Relative difference up to which two runs of FP32 agree: on a CPU they are equal bit for bit; kernels of accelerators
that add in another order each time differ by about 1e-7."""


@dataclass(frozen=True, eq=False)
class Measured:
    """One setting on the batches that it saw: the user's evaluation, and the noise of the outputs (of all ranks)."""

    evaluation: Evaluation
    noise: NoiseSums


@dataclass(frozen=True, eq=False)
class SideBySide:
    """What one pass found.

    Attributes:
        reference: The recorded setting on the same batches.
        found: The other settings by name.
        seconds: Seconds that the recorded setting and the mean other one took for a batch.
        whole: Whether they saw all batches: time may have run out.
    """

    reference: Evaluation
    found: Mapping[str, Measured]
    seconds: tuple[float, float]
    whole: bool


class _Work:
    """The schedule of one pass, and what happens in each of its lanes."""

    def __init__(
        self,
        session: Instrumentation,
        recorded: Setting,
        settings: Mapping[str, Setting],
        visit: Setting | None,
        is_late: Callable[[], bool],
        ran: Callable[[], None],
        in_full: Sequence[str],
    ) -> None:
        self._in_full = in_full
        self.was_cut = False
        self.sums: dict[str, NoiseSums] = {name: NoiseSums() for name in settings}
        self.seconds: dict[str, list[float]] = {}
        self._session = session
        self._recorded = recorded
        self._settings = settings
        self._visit = visit
        self._is_late = is_late
        self._ran = ran
        self._memo = Memo()
        self._meter = OutputMeter(session)
        self._lane = _RECORDED
        self._entered = 0.0

    def lanes(self) -> Sequence[str]:
        """FP32, the settings, and FP32 again; nothing any more once it is late, but the first batch is for all."""
        self.was_cut = self.was_cut or (bool(self.seconds) and self._is_late())
        if self.was_cut:
            return ()
        return [_RECORDED, *self._settings, _CONTROL]

    def enter(self, lane: str) -> None:
        """Note which lane is at work."""
        self._lane, self._entered = lane, time.perf_counter()

    def left(self, lane: str) -> None:
        """Note how long it took; after the last one the batch's results are let go of."""
        self.seconds.setdefault(lane, []).append(time.perf_counter() - self._entered)
        self._ran()
        if lane == _CONTROL:
            self._memo.clear()

    def around(self, call: Callable[[], Any], batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        """Run the step in the lane that is at work."""
        session, memo = self._session, self._memo

        def run() -> Any:
            return session.run(call, step=True)

        if self._lane == _RECORDED:
            with self._recorded(), session.memoized(memo, record=True):
                return self._meter.reference(run)
        if self._lane == _CONTROL:
            with self._recorded(), self._visited(batch_idx), session.memoized(memo):
                return run()
        replays = nullcontext() if self._lane in self._in_full else session.memoized(memo)
        with self._settings[self._lane](), replays:
            result, noise = self._meter.compare(run)
        self.sums[self._lane].add(noise)
        return result

    @contextmanager
    def _visited(self, batch_idx: int) -> Iterator[None]:
        """Let the visitor of the first batch see every tensor of FP32 as the control lane passes."""
        if self._visit is None or batch_idx > 0:
            yield
            return
        with self._visit():
            yield


def side_by_side(
    session: Instrumentation,
    evaluator: Evaluator,
    recorded: Setting,
    settings: Mapping[str, Setting],
    *,
    limit: int | float | None = None,
    visit: Setting | None = None,
    is_late: Callable[[], bool] = lambda: False,
    ran: Callable[[], None] = lambda: None,
    in_full: Sequence[str] = (),
) -> SideBySide:
    """Measure several settings of the quantizers in one pass.

    Args:
        session: Calibrated.
        evaluator: Runs the user's validation.
        recorded: The setting that the others are compared with and computed from: FP32.
        settings: The others, by name. What they have in common with ``recorded`` is computed once.
        limit: Number or share of validation batches.
        visit: Context for the run of FP32 that ends the first batch, to look at tensors without running anything.
        is_late: Asked ahead of each batch but the first: whether to leave the rest of them out.
        ran: Called after each run of a batch.
        in_full: Names of settings that change more than quantizers, so that nothing recorded may be taken for them.

    Raises:
        LanesError: If the settings can not be told apart in one pass: take :func:`one_by_one`.
    """
    work = _Work(session, recorded, settings, visit, is_late, ran, in_full)
    evaluations = evaluator.run_lanes(work, work.around, limit=limit)
    reference, control = evaluations[_RECORDED], evaluations[_CONTROL]
    _check_alike(reference, control, "validation keeps something that can not be given back between two runs")
    sums = gather(work.sums)
    found = {name: Measured(evaluations[name], _merged([rank[name] for rank in sums])) for name in settings}
    own = [sum(work.seconds[name]) / len(work.seconds[name]) for name in settings] or [0.0]
    own_recorded = sum(work.seconds[_RECORDED]) / len(work.seconds[_RECORDED])
    return SideBySide(reference, found, (own_recorded, sum(own) / len(own)), not work.was_cut)


def _merged(sums: Sequence[NoiseSums]) -> NoiseSums:
    """The noise of all ranks."""
    merged = NoiseSums()
    for one in sums:
        merged = merged.merged(one)
    return merged


def _check_alike(one: Evaluation, other: Evaluation, why: str) -> None:
    """Raise, on all ranks alike, unless two runs of FP32 have logged the same."""
    same = one.metrics.keys() == other.metrics.keys() and all(
        abs(value - other.metrics[name]) <= SAME_SCORE * abs(value) or value != value  # NaN is like NaN
        for name, value in one.metrics.items()
    )
    if not all(gather(same)):
        different = [name for name, value in one.metrics.items() if value != other.metrics.get(name)]
        raise LanesError(f"{why} ({', '.join(different[:3]) or 'the names of the metrics'} came out differently)")


def check_reference(found: SideBySide, reference: Evaluation) -> None:
    """Raise unless FP32 in a pass of lanes has logged what it had in a pass of its own on the same batches.

    Raises:
        LanesError: If it has not.
    """
    _check_alike(reference, found.reference, "validation comes out differently in a pass that several runs share")


class OutputCache:
    """FP32 outputs of each batch, within bounded memory; of batches that do not fit FP32 is run again.

    Args:
        session: Runs the network.
        recorded: The FP32 setting.
        most_bytes: What may be kept.

    Attributes:
        sums: The noise of the pass that ran last.
    """

    def __init__(self, session: Instrumentation, recorded: Setting, most_bytes: int = 1 << 28) -> None:
        """Nothing is kept yet."""
        self.sums = NoiseSums()
        self._session = session
        self._recorded = recorded
        self._left = most_bytes
        self._kept: dict[tuple[int, int], Any] = {}
        self._meter = OutputMeter(session)

    def around(self, setting: Setting) -> Callable[[Callable[[], Any], Any, int, int], Any]:
        """What runs the step of each batch with a setting of the quantizers, and adds up its noise."""
        self.sums = NoiseSums(keeps_samples=True)

        def around(call: Callable[[], Any], batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
            def run() -> Any:
                return self._session.run(call, step=True)

            key = (dataloader_idx, batch_idx)
            if key in self._kept:
                self._meter.restore(self._kept[key])
            else:
                with self._recorded():
                    self._meter.reference(run)
                self._keep(key)
            with setting():
                result, noise = self._meter.compare(run)
            self.sums.add(noise)
            return result

        return around

    def _keep(self, key: tuple[int, int]) -> None:
        """Keep the reference's outputs, if they fit."""
        outputs = self._meter.kept()
        size = sum(tensor.nbytes for tensor in outputs.values())
        if size <= self._left:
            self._left -= size
            self._kept[key] = outputs


def one_by_one(
    evaluator: Evaluator, cache: OutputCache, setting: Setting, *, limit: int | float | None = None
) -> Measured:
    """Measure one setting in a pass of its own; its score may be NaN."""
    evaluation = evaluator.run_unchecked(cache.around(setting), limit=limit)
    return Measured(evaluation, _merged(gather(cache.sums)))

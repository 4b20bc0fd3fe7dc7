"""Tries remedies one after the other: apply, measure with the user's own score, keep what helps, undo what does not.

What is tried and kept is decided by pure functions of :mod:`~lightning_quantdebug.flowchart`, and done here.
A remedy changes the session alone, never the model, so that undoing it is going back to the session's earlier state.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from lightning_quantdebug.activation_equalization import equalize_activations
from lightning_quantdebug.activation_ranges import set_activation_ranges
from lightning_quantdebug.adaround import adaround
from lightning_quantdebug.adjustment import Applied
from lightning_quantdebug.bias_correction import correct_bias
from lightning_quantdebug.equalization import equalize
from lightning_quantdebug.errors import CalibrationError, NonFiniteScoreError
from lightning_quantdebug.evaluation import Evaluation
from lightning_quantdebug.flowchart import Try, judge, judge_gain, next_try
from lightning_quantdebug.granularity import refine
from lightning_quantdebug.high_bias_absorption import absorb_high_bias
from lightning_quantdebug.instrumentation import Instrumentation, SessionState
from lightning_quantdebug.layers import Runs
from lightning_quantdebug.paired_loss import loss_interval
from lightning_quantdebug.rank_agreement import from_rank_zero, gather, led_by_rank_zero, rank_count
from lightning_quantdebug.report import Remedy, Report, StepName, StepVerdict
from lightning_quantdebug.selection import Difference, Split
from lightning_quantdebug.settings import Settings
from lightning_quantdebug.target import Granularity, RangeSetting

# Remedies after which activations have other values, so that their ranges are to be set anew.
_MOVES_ACTIVATIONS = frozenset({"cle", "high_bias_absorption", "bias_correction", "activation_cle"})


@dataclass(frozen=True)
class Workbench:
    """What remedies work on and are measured with.

    Attributes:
        session: The instrumentation; remedies change it and nothing else.
        runs: The calibration batches.
        recalibrate: Sets all ranges anew from the calibration batches.
        measure: The user's score with the quantizers of the box on.
        settings: The settings of the walk.
        split: Which validation batches choose.
        is_late: Whether the time budget is spent.
        describe: Called with what is being tried.
        progress: Told how many layers AdaRound has done, of how many, and that they are layers.
        measure_whole: The user's score with all quantizers on, where ``measure`` has only some of them on.
    """

    session: Instrumentation
    runs: Runs
    recalibrate: Callable[[], None]
    measure: Callable[[], Evaluation]
    settings: Settings
    split: Split
    is_late: Callable[[], bool]
    describe: Callable[[str], None]
    progress: Callable[[int, int, str], None] = lambda done, total, unit: None
    measure_whole: Callable[[], float | None] | None = None


class Repair:
    """One box of remedies.

    Args:
        bench: What remedies work on.
        step: ``FIX_WEIGHTS`` or ``FIX_ACTIVATIONS``.
        reference: FP32.
        evaluation: The score as it is before the first remedy.

    Attributes:
        evaluation: The score with the remedies that were kept.
        is_late: Whether the time budget ended the box.
    """

    def __init__(self, bench: Workbench, step: StepName, reference: Evaluation, evaluation: Evaluation) -> None:
        """Nothing is tried yet."""
        self.bench = bench
        self.step = step
        self.reference = reference
        self.evaluation = evaluation
        self.is_late = False

    def walk(self, report: Report) -> Report:
        """Try remedies until the loss is good or none is left.

        Returns:
            The report with every try and what was found on the way.
        """
        remedies = self.bench.settings.remedies
        while (item := next_try(report, self.step, self.verdict, remedies)) is not None:
            if self.bench.is_late():
                self.is_late = True
                break
            self.bench.describe(f"{self.step.value}: {item.remedy} {item.variant}".rstrip())
            remedy, applied = self._try(item)
            known = [finding for finding in applied.findings if finding not in report.findings]
            report = report.with_remedy(remedy).with_findings(*known)
        return report

    @property
    def permitted(self) -> float:
        """The tolerance in the metric's units."""
        return self.bench.settings.tolerance.permitted_loss(self.reference.score)

    @property
    def verdict(self) -> StepVerdict:
        """How the box stands now."""
        return judge(self.loss, self.interval, self.permitted)

    @property
    def loss(self) -> float:
        """Loss of score against FP32 as it stands now."""
        return self.bench.settings.direction.loss(self.reference.score, self.evaluation.score)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Confidence interval of the loss."""
        return loss_interval(self.reference, self.evaluation, self.bench.settings.direction)

    def _try(self, item: Try) -> tuple[Remedy, Applied]:
        """Apply one remedy, measure, keep or undo it."""
        started, bench = time.monotonic(), self.bench
        before, state = self.evaluation, bench.session.state()
        kept = False
        after: Evaluation | None = None
        gain: Difference | None = None
        applied = Applied()
        try:
            applied = self._apply(item)
            if not applied.changed:
                reason = _why_nothing(applied)
            else:
                after = bench.measure()
                gain = bench.split.gain(before, after, bench.settings.direction)
                kept, reason = judge_gain(gain.value, gain.interval, self.permitted)
        except NonFiniteScoreError:
            reason = "the score became NaN or infinite"
        except CalibrationError as error:
            reason = f"it could not be applied: {error}"
        finally:
            if not kept:
                bench.session.restore(state)
        whole: float | None = None
        if kept and after is not None:
            self.evaluation = after
            whole = after.score if bench.measure_whole is None else bench.measure_whole()
        remedy = Remedy(
            remedy=item.remedy,
            before=before.score,
            after=None if after is None else after.score,
            kept=kept,
            reason=reason,
            seconds=time.monotonic() - started,
            step=self.step.value,
            variant=item.variant,
            gain=None if gain is None else gain.value,
            interval=None if gain is None else gain.interval,
            note=applied.note,
            skipped=dict(applied.skipped),
            whole=whole,
        )
        return remedy, applied

    def _apply(self, item: Try) -> Applied:
        """Apply one remedy to the session."""
        session, runs = self.bench.session, self.bench.runs
        if item.remedy == "range_setting":
            return set_activation_ranges(session, runs, RangeSetting(item.variant), gather=gather)
        remedies: Mapping[str, Callable[[Runs], Applied]] = {
            "cle": partial(equalize, session),
            "per_channel": partial(refine, session, granularity=Granularity.PER_CHANNEL),
            "per_group": partial(refine, session, granularity=Granularity.PER_GROUP),
            "bias_correction": partial(correct_bias, session),
            "adaround": partial(adaround, session, is_late=self._is_late_here, advance=self._layer_done),
            "high_bias_absorption": partial(absorb_high_bias, session),
            "activation_cle": partial(equalize_activations, session),
        }
        applied = led_by_rank_zero(runs, remedies[item.remedy])
        follow_rank_zero(session)
        if applied.changed and item.remedy in _MOVES_ACTIVATIONS:
            self.bench.recalibrate()
        return applied

    def _is_late_here(self) -> bool:
        """Whether the time budget is spent; several ranks answer that together, and so only between remedies."""
        return rank_count() == 1 and self.bench.is_late()

    def _layer_done(self, done: int, total: int) -> None:
        """Say how far a remedy is that goes layer by layer."""
        self.bench.progress(done, total, "layers")


def follow_rank_zero(session: Instrumentation) -> None:
    """Give every rank what a remedy made of rank zero's batches: all must measure one and the same network."""
    if rank_count() == 1:
        return
    names = {key: name for name, key in session.keys_by_name.items()}
    state = session.state()
    named = {names[key]: adjustment for key, adjustment in state.adjustments.items()}
    found, quantizers = from_rank_zero((named, dict(state.quantizers)))
    session.restore(SessionState({session.keys_by_name[name]: one for name, one in found.items()}, quantizers))


def _why_nothing(applied: Applied) -> str:
    """Why a remedy changed nothing."""
    if applied.findings:
        return applied.findings[0].evidence
    reasons = list(dict.fromkeys(reason for _, reason in applied.skipped))
    return "; ".join(reasons[:2]) if reasons else "it found nothing to change"

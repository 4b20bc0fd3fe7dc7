"""Walks through the flow chart: does what :mod:`~lightning_quantdebug.flowchart` decides, notes what it learned.

The report is the only memory: each step takes what it needs from it and adds one record.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lightning_quantdebug.advice import after_repair, on_failure
from lightning_quantdebug.calibration import CalibrationRuns, calibration_loader, capture, recalibrate, set_ranges
from lightning_quantdebug.causes import activation_causes, weight_causes
from lightning_quantdebug.draw_scores import draws_report
from lightning_quantdebug.environment import environment
from lightning_quantdebug.errors import NonFiniteScoreError, NoTrainingDataError
from lightning_quantdebug.evaluation import Evaluation, Evaluator
from lightning_quantdebug.final_settings import setting_of
from lightning_quantdebug.flowchart import final_verdict, judge, next_step, objective, tries_of
from lightning_quantdebug.fp32_check import Fp32Check, Reference, first_non_finite
from lightning_quantdebug.gallery import Gallery
from lightning_quantdebug.instrument import Instrumentation
from lightning_quantdebug.own_quantizers import find_own_quantizers, own_quantizers
from lightning_quantdebug.paired_loss import interaction, judged_step
from lightning_quantdebug.plausibility import (
    chance_warning,
    direction_warning,
    non_finite,
    not_simulated,
    too_few_samples,
)
from lightning_quantdebug.quantizer_steps import QuantizerWork, fix_quantizers, per_quantizer
from lightning_quantdebug.rank_agreement import gather, is_spent, led_by_rank_zero
from lightning_quantdebug.repair import Repair, Workbench
from lightning_quantdebug.report import (
    Baseline,
    Cause,
    Final,
    Finding,
    Report,
    Step,
    StepName,
    StepVerdict,
)
from lightning_quantdebug.selection import Split
from lightning_quantdebug.settings import Settings
from lightning_quantdebug.target import Kind, Mode

# Evaluations of one walk, for the progress bar: FP32 twice, recording, observing, six runs of one batch, two full runs
# of the sanity check, activations, weights, both, the whole model, and a look at its classes.
EVALUATIONS = 17
# Causes that make every other finding meaningless stand first in the report, the others in the order of discovery.
_FIRST = (Cause.BROKEN_PIPELINE, Cause.NONDETERMINISTIC_MODEL, Cause.NON_FINITE)

_CALIBRATED_ON_VALIDATION = (
    "`trainer.validate` was given no training data, so ranges were set on validation batches: the score that accepts "
    "is measured on the data that chose them. Give a datamodule with a `train_dataloader`, or pass a DataLoader as "
    "`calibration`."
)

TRAINED_IN_FIT = "QAT runs in `trainer.fit`: add the callback to the Trainer that trains the model."


class Diagnosis:
    """One walk on one model.

    Args:
        evaluator: Runs the user's validation; made with ``limit_batches``.
        acceptance: Runs the user's validation in full, for the last word.
        settings: The settings.
        given_loader: The calibration loader, where the user gave one.
        describe: Called with the name of each step as it begins.
        advance: Called after each evaluation.
        expect: Called with the number of evaluations that turn out to be needed as well.
        progress: Called with the number of runs of a batch that are done and of those that there will be; and with
            what they are where they are something else.
        directory: Where a killed analysis leaves what it has measured; ``None``: nowhere.
        tell: Called with what the user shall be able to read afterwards too.
        reason_not_to_train: Says why no QAT may follow, ``None`` if it may.

    Attributes:
        report: What is known so far; of use also after an exception.
        session: The instrumentation, once the model was captured.
        wants_training: Whether the walk has ended before QAT, which shall follow.
        started: When the walk began, in seconds of ``time.monotonic``.
        accepted: FP32 and the quantized model on the data that accepts, once both were measured.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        acceptance: Evaluator,
        settings: Settings,
        given_loader: Any = None,
        describe: Callable[[str], None] = lambda step: None,
        advance: Callable[[], None] = lambda: None,
        expect: Callable[[int], None] = lambda evaluations: None,
        progress: Callable[..., None] = lambda *counts: None,
        directory: Path | None = None,
        tell: Callable[[str], None] = lambda text: None,
        reason_not_to_train: Callable[[], str | None] = lambda: TRAINED_IN_FIT,
    ) -> None:
        """Nothing runs yet."""
        self.evaluator = evaluator
        self.acceptance = acceptance
        self.settings = settings
        self.loader = calibration_loader(settings, given_loader)
        self.describe = describe
        self.advance = advance
        self.expect = expect
        self.progress = progress
        self.directory = directory
        self.tell = tell
        self.reason_not_to_train = reason_not_to_train
        self.wants_training = False
        self.accepted: tuple[Evaluation, Evaluation | None] | None = None
        self.root: torch.nn.Module = evaluator.pl_module
        self.report = Report(settings=settings.to_dict(), environment=environment(self.root, evaluator.seed))
        self.session: Instrumentation | None = None
        self._reference: Evaluation | None = None
        self._warnings: list[str] = []
        self._measured: dict[Kind | None, Evaluation] = {}
        self._gallery = Gallery(evaluator)
        self._own = find_own_quantizers(self.root)
        self.started = time.monotonic()
        self._steps: dict[StepName, Callable[[], Step]] = {
            StepName.FP32_CHECK: self._fp32_check,
            StepName.ACTIVATIONS: self._activations,
            StepName.WEIGHTS: self._weights,
            StepName.FIX_WEIGHTS: lambda: self._fix(StepName.FIX_WEIGHTS),
            StepName.FIX_ACTIVATIONS: lambda: self._fix(StepName.FIX_ACTIVATIONS),
            StepName.PER_QUANTIZER: self._per_quantizer,
            StepName.VISUALIZE: self._visualize,
            StepName.FIX_QUANTIZERS: self._fix_quantizers,
            StepName.QUANTIZE_MODEL: self._quantize_model,
        }

    def walk(self) -> Report:
        """Walk to the end of the chart.

        Returns:
            The report with its verdict; files and TensorBoard are the caller's business.
        """
        self.evaluator.check()
        self.started = time.monotonic()
        with own_quantizers(self._own, enabled=False):
            while (decision := next_step(self.report, frozenset((*self._steps, StepName.QAT)))) is not None:
                reason = self._reason_not_to(decision.step) if decision.runs else None
                if reason is not None:
                    decision = replace(decision, runs=False, verdict=StepVerdict.NOT_RUN, advice=reason)
                elif decision.runs and decision.step is StepName.QAT:
                    self.wants_training = True
                    break
                if decision.runs:
                    self._do(decision.step)
                else:
                    self.report = self.report.with_step(Step(decision.step, decision.verdict, advice=decision.advice))
        self._finish()
        return self.report

    def _reason_not_to(self, step: StepName) -> str | None:
        """Why a step that has its turn is not run, the same on every rank; ``None`` if it is."""
        if self.is_late:
            return self._too_late()
        if step is not StepName.QAT:
            return None
        return next((reason for reason in gather(self.reason_not_to_train()) if reason is not None), None)

    @property
    def is_late(self) -> bool:
        """Whether the time budget is spent, on any rank: all must take the same way."""
        return is_spent(self.settings.max_time, self.started)

    def _too_late(self) -> str:
        """Why a step was not run, and what to do."""
        return (
            f"The time budget max_time={self.settings.max_time} was spent before this step, so nothing is known about "
            "it. Raise `max_time`, or lower `limit_batches`."
        )

    def _do(self, step: StepName) -> None:
        """Carry out one step and record it."""
        self.describe(step.value)
        started = time.monotonic()
        record = self._steps[step]()
        advice = record.advice or record.verdict.advice
        self.report = self.report.with_step(replace(record, advice=advice, seconds=time.monotonic() - started))

    # The steps.

    def _fp32_check(self) -> Step:
        """FP32 twice, then record, calibrate and check the pipeline."""
        try:
            reference = self._measure(None)
            repeated = self._measure(None, model_seed=1)
        except NonFiniteScoreError:
            culprit = first_non_finite(self.evaluator)
            self.report = self.report.with_findings(culprit)
            return Step(StepName.FP32_CHECK, StepVerdict.BROKEN, advice=culprit.evidence)
        self._reference = reference
        self.report = replace(self.report, baseline=Baseline(reference.score, reference.samples))
        self.session = self._calibrated_session()
        floor = abs(reference.score - repeated.score)
        check = Fp32Check(self.session, self.evaluator, self._own, self.advance)
        finding = check.run(Reference(reference, floor))
        warnings = [
            *self._warnings,
            *self.session.plan.idle,
            *chance_warning(self.session, self.settings, reference),
            *direction_warning(self.settings, self.evaluator.higher_is_better()),
        ]
        details: dict[str, Any] = {
            "repeated_score": repeated.score,
            "warnings": warnings,
        }
        if finding is None:
            advice = "Bypassed or at 32 bits the model scores as in FP32: the pipeline can be trusted."
            return Step(StepName.FP32_CHECK, StepVerdict.PASSED, reference.score, 0.0, None, advice, details=details)
        self.report = self.report.with_findings(finding)
        return Step(
            StepName.FP32_CHECK, StepVerdict.BROKEN, reference.score, None, None, finding.evidence, details=details
        )

    def _calibrated_session(self) -> Instrumentation:
        """Quantizers on the model, in bypass, with ranges."""
        settings = self.settings
        session = Instrumentation(self.root, settings.target, module=settings.module, exclude=settings.exclude)
        try:
            capture(session, self.evaluator, self.loader)
        except NoTrainingDataError:
            if self.evaluator.trainer.state.fn == "fit":
                raise
            self.loader = None
            self._warnings.append(_CALIBRATED_ON_VALIDATION)
            capture(session, self.evaluator, self.loader)
        self.advance()
        samples = set_ranges(session, self.evaluator, self.loader, settings.calibration_batches)
        self.advance()
        self.report = replace(
            self.report, coverage=session.coverage, settings={**self.report.settings, "calibration_samples": samples}
        )
        self._note_coverage(session)
        self._gallery.keep(StepName.FP32_CHECK, session)
        return session

    def _note_coverage(self, session: Instrumentation) -> None:
        """Findings on what can not be simulated."""
        own = [quantizer.path for quantizer in self._own]
        self.report = self.report.with_findings(*not_simulated(session, own), *non_finite(session))

    def _activations(self) -> Step:
        """Only the activations quantized."""
        return self._quantized_step(StepName.ACTIVATIONS, Kind.ACTIVATION)

    def _weights(self) -> Step:
        """Only the weights quantized; then both, so that the interaction shows."""
        step = self._quantized_step(StepName.WEIGHTS, Kind.WEIGHT)
        both = self._quantized_step(StepName.QUANTIZE_MODEL, None)
        details: dict[str, Any] = {"both": _standing_of(both)}
        _, reference = self._needs_session()
        measured = [self._measured.get(kind) for kind in (None, Kind.ACTIVATION, Kind.WEIGHT)]
        value, interval = interaction(reference, measured, self.settings.direction)
        if value is not None:
            details |= {"interaction": value, "interaction_interval": interval}
        return replace(step, details=details)

    def _quantized_step(self, name: StepName, kind: Kind | None) -> Step:
        """The quantizers of one kind on, the others bypassed."""
        session, reference = self._needs_session()
        if not session.select(kind=kind):
            self._measured[kind] = reference
            advice = f"The target quantizes no {kind.value if kind else 'tensor'}: nothing to measure."
            return Step(name, StepVerdict.PASSED, reference.score, 0.0, (0.0, 0.0), advice)
        with session.modes(Mode.QUANTIZE, kind=kind):
            try:
                evaluation = self._measure(session)
            except NonFiniteScoreError:
                return self._without_score(name, self.evaluator)
        self._measured[kind] = evaluation
        return judged_step(name, reference, evaluation, self.settings)

    def _fix(self, name: StepName) -> Step:
        """Try the remedies of a box; at its end, know again how weights and activations stand together."""
        session, reference = self._needs_session()
        kind = objective(self.report, name)
        try:
            before = self._evaluation_of(kind)
        except NonFiniteScoreError:
            with session.modes(Mode.QUANTIZE, kind=kind):
                return self._without_score(name, self.evaluator)
        details: dict[str, Any] = {"objective": kind.value if kind is not None else "both"}
        bench = self._workbench(kind)
        causes = weight_causes if name is StepName.FIX_WEIGHTS else activation_causes
        self.report = self.report.with_findings(*led_by_rank_zero(bench.runs, partial(causes, session)))
        if name is StepName.FIX_ACTIVATIONS:
            samples = int(self.report.settings.get("calibration_samples") or 0)
            details["calibration_draws"] = draws_report(session, bench.runs, bench.measure, samples)
        # Each try measures once and may set the ranges anew; two more tell how weights and activations stand.
        self.expect(2 * len(tries_of(name, self.settings.remedies)) + 2)
        repair = Repair(bench, name, reference, before)
        self.report = repair.walk(self.report)
        if repair.evaluation is not before:
            # That of the whole model was measured with the last remedy that was kept.
            whole = self._measured.get(None)
            self._measured = {kind: repair.evaluation}
            if whole is not None:
                self._measured.setdefault(None, whole)
            self._gallery.keep(name, session)
        details |= self._standing()
        advice = self._too_late() if repair.is_late else after_repair(self.report, name, repair.verdict)
        return Step(
            name, repair.verdict, repair.evaluation.score, repair.loss, repair.interval, advice, details=details
        )

    def _workbench(self, kind: Kind | None) -> Workbench:
        """What remedies work on, judged with the quantizers of ``kind`` on."""
        session, reference = self._needs_session()
        batches = self.settings.calibration_batches

        def measure() -> Evaluation:
            with session.modes(Mode.QUANTIZE, kind=kind):
                return self._measure(session)

        def recalibrated() -> None:
            recalibrate(session, self.evaluator, self.loader, batches)
            self.advance()

        return Workbench(
            session=session,
            runs=CalibrationRuns(session, self.evaluator, self.loader, batches),
            recalibrate=recalibrated,
            measure=measure,
            settings=self.settings,
            split=Split.of(reference),
            is_late=lambda: self.is_late,
            describe=self.describe,
            progress=self.progress,
            measure_whole=None if kind is None else self._score_of_whole,
        )

    def _score_of_whole(self) -> float | None:
        """The score with all quantizers on after a change; ``None`` if it is no number."""
        self._measured.pop(None, None)
        try:
            return self._evaluation_of(None).score
        except NonFiniteScoreError:
            return None

    def _evaluation_of(self, kind: Kind | None) -> Evaluation:
        """The score with the quantizers of one kind on, as the session is now."""
        session, reference = self._needs_session()
        if not session.select(kind=kind):
            return reference
        if kind not in self._measured:
            with session.modes(Mode.QUANTIZE, kind=kind):
                self._measured[kind] = self._measure(session)
        return self._measured[kind]

    def _standing(self) -> dict[str, Any]:
        """How both together stand, and each alone where the two fail and it was not measured since the last change."""
        _, reference = self._needs_session()
        standing: dict[str, Any] = {}
        for key, kind in (("both", None), ("weights", Kind.WEIGHT), ("activations", Kind.ACTIVATION)):
            if kind is not None and standing["both"]["verdict"] != StepVerdict.FAILED.value:
                break
            try:
                step = judged_step(StepName.QUANTIZE_MODEL, reference, self._evaluation_of(kind), self.settings)
            except NonFiniteScoreError:
                step = Step(StepName.QUANTIZE_MODEL, StepVerdict.FAILED)
            standing[key] = _standing_of(step)
        return standing

    def _per_quantizer(self) -> Step:
        """Each quantizer alone: which of them are to blame, and why."""
        step, self.report = per_quantizer(self._quantizer_work(), self.report, self.progress)
        return step

    def _fix_quantizers(self) -> Step:
        """Repair single quantizers; at its end, know again how weights and activations stand together."""
        step, self.report, evaluation = fix_quantizers(self._quantizer_work(), self.report)
        if evaluation is None:
            return step
        self._measured = {None: evaluation}
        if any(item.kept and item.step == StepName.FIX_QUANTIZERS.value for item in self.report.remedies):
            self._gallery.keep(StepName.FIX_QUANTIZERS, self._needs_session()[0])
        return replace(step, details={**step.details, **self._standing()})

    def _visualize(self) -> Step:
        """Look at the tensors that are to blame."""
        session, _ = self._needs_session()
        step, self.report = self._gallery.visualize(session, self.report)
        self.advance()
        return step

    def _look_again(self) -> None:
        """Look at tensors and classes as the walk leaves them."""
        session, reference = self._needs_session()
        if self.is_late:
            return
        if self.report.visuals.tensors:
            self.report = self._gallery.look(session, self.report)
        self.report = self._gallery.predict(session, self.report, reference)
        self.advance()

    def _quantizer_work(self) -> QuantizerWork:
        """What both work on."""
        session, reference = self._needs_session()
        return QuantizerWork(
            session=session,
            evaluator=self.evaluator,
            settings=self.settings,
            reference=reference,
            calibration=self.loader,
            directory=self.directory,
            is_late=lambda: self.is_late,
            describe=self.describe,
            tell=self.tell,
            advance=self.advance,
        )

    def _quantize_model(self) -> Step:
        """The whole model at its final settings, on the full validation set."""
        session, reference = self._needs_session()
        limit = self.settings.limit_batches
        if isinstance(limit, int) or limit < 1.0:
            reference = self.acceptance.run()
            self.report = replace(self.report, baseline=Baseline(reference.score, reference.samples))
            self._measured.clear()
        evaluation = self._measured.get(None)
        if evaluation is None:
            with session.modes(Mode.QUANTIZE):
                try:
                    evaluation = self.acceptance.run(session.around_step)
                except NonFiniteScoreError:
                    self.accepted = (reference, None)
                    return self._without_score(StepName.QUANTIZE_MODEL, self.acceptance)
        self.accepted = (reference, evaluation)
        self.advance()
        self._look_again()
        step = judged_step(StepName.QUANTIZE_MODEL, reference, evaluation, self.settings)
        step = self._accepted(step, reference, evaluation)
        few = too_few_samples(self.report, step, evaluation.samples, self.settings)
        self.report = self.report.with_findings(*few)
        if step.verdict is StepVerdict.NOISE:
            advice = (
                "The loss exceeds the tolerance, but with these samples it can not be told from zero. Validate on more "
                "samples before you accept or repair."
            )
            return replace(step, advice=advice)
        if step.verdict is StepVerdict.FAILED:
            return replace(step, advice=on_failure(self.report))
        return step

    def _accepted(self, step: Step, reference: Evaluation, evaluation: Evaluation) -> Step:
        """The whole model's step; where remedies were chosen, also judged on the batches that chose nothing."""
        if not any(remedy.kept for remedy in self.report.remedies):
            return step
        _, walked = self._needs_session()
        held_out = Split.of(walked).held_out_loss(reference, evaluation, self.settings.direction)
        if held_out is None:
            return replace(step, details={**step.details, "held_out": None})
        verdict = judge(held_out.value, held_out.interval, self.settings.tolerance.permitted_loss(reference.score))
        details = {
            "loss": held_out.value,
            "interval": held_out.interval,
            "samples": held_out.samples,
            "verdict": verdict.value,
        }
        step = replace(step, details={**step.details, "held_out": details})
        return replace(step, verdict=verdict) if verdict is StepVerdict.FAILED else step

    # Numbers.

    def _measure(self, session: Instrumentation | None, model_seed: int = 0) -> Evaluation:
        """One evaluation, in FP32 without a session."""
        around = session.around_step if session is not None else None
        evaluation = self.evaluator.run(around, model_seed=model_seed)
        self.advance()
        return evaluation

    def _needs_session(self) -> tuple[Instrumentation, Evaluation]:
        """What the sanity check left behind."""
        assert self.session is not None
        assert self._reference is not None
        return self.session, self._reference

    def _without_score(self, name: StepName, evaluator: Evaluator) -> Step:
        """A step whose score, with the quantizers as they are, is NaN or infinite."""
        session, _ = self._needs_session()
        finding = first_non_finite(evaluator, session.around_step)
        if finding not in self.report.findings:
            self.report = self.report.with_findings(finding)
        advice = (
            f"Quantized, {finding.evidence}: a logarithm, a division or an exponential has met a value that rounding "
            "turned into 0. Leave the tensors before it in FP32 (`exclude`), or give them more bits."
        )
        return Step(name, StepVerdict.FAILED, advice=advice)

    # The end.

    def _finish(self) -> None:
        """Coverage, final settings and verdict."""
        verdict = final_verdict(self.report)
        whole = self.report.step(StepName.QUANTIZE_MODEL)
        final = Final()
        if self.session is not None:
            self._note_unseen(self.session)
            settings = {name: setting_of(quantizer) for name, quantizer in self.session.quantizers.items()}
            final = Final(settings=settings)
            if whole is not None:
                final = replace(final, score=whole.score, loss=whole.loss, interval=whole.interval)
        findings = sorted(self.report.findings, key=lambda finding: finding.cause not in _FIRST)
        self.report = replace(self.report, verdict=verdict, final=final, findings=tuple(findings))

    def _note_unseen(self, session: Instrumentation) -> None:
        """Coverage at the end, with what ran without having been recorded."""
        coverage = session.coverage
        self.report = replace(self.report, coverage=coverage)
        if coverage.unseen:
            evidence = f"operations ran in validation that calibration never met, in FP32: {list(coverage.unseen[:10])}"
            self.report = self.report.with_findings(Finding(Cause.NOT_QUANTIZED, evidence))


def _standing_of(step: Step) -> dict[str, Any]:
    """What the details of another step tell of one."""
    return {"score": step.score, "loss": step.loss, "interval": step.interval, "verdict": step.verdict.value}

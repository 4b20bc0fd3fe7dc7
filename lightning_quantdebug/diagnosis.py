"""Walks through the flow chart: does what :mod:`~lightning_quantdebug.flowchart` decides, notes what it learned.

The report is the only memory: each step takes what it needs from it and adds one record.
"""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from lightning_quantdebug.calibration import calibration_loader, capture, set_ranges
from lightning_quantdebug.errors import NonFiniteScoreError, NoTrainingDataError
from lightning_quantdebug.evaluation import Evaluation, Evaluator
from lightning_quantdebug.flowchart import final_verdict, judge, next_step
from lightning_quantdebug.fp32_check import Fp32Check, Reference, first_non_finite
from lightning_quantdebug.instrument import Instrumentation
from lightning_quantdebug.observer import Histogram
from lightning_quantdebug.own_quantizers import find_own_quantizers, own_quantizers
from lightning_quantdebug.paired_loss import interaction, loss_interval
from lightning_quantdebug.plausibility import chance_warning, direction_warning, not_run
from lightning_quantdebug.quantizer import Quantizer
from lightning_quantdebug.rank_agreement import gather
from lightning_quantdebug.report import (
    Baseline,
    Cause,
    Final,
    Finding,
    QuantizerSetting,
    Report,
    Step,
    StepName,
    StepVerdict,
)
from lightning_quantdebug.settings import Settings
from lightning_quantdebug.statistics import samples_to_resolve
from lightning_quantdebug.target import Kind, Mode

# Evaluations of one walk, for the progress bar: FP32 twice, recording, observing, six runs of one batch, two full runs
# of the sanity check, activations, weights, both, and the whole model.
EVALUATIONS = 16
# Causes that make every other finding meaningless stand first in the report, the others in the order of discovery.
_FIRST = (Cause.BROKEN_PIPELINE, Cause.NONDETERMINISTIC_MODEL, Cause.NON_FINITE)

_CALIBRATED_ON_VALIDATION = (
    "`trainer.validate` was given no training data, so ranges were set on validation batches: the score that accepts "
    "is measured on the data that chose them. Give a datamodule with a `train_dataloader`, or pass a DataLoader as "
    "`calibration`."
)


class Diagnosis:
    """One walk on one model.

    Args:
        evaluator: Runs the user's validation; made with ``limit_batches``.
        acceptance: Runs the user's validation in full, for the last word.
        settings: The settings.
        given_loader: The calibration loader, where the user gave one.
        describe: Called with the name of each step as it begins.
        advance: Called after each evaluation.

    Attributes:
        report: What is known so far; of use also after an exception.
        session: The instrumentation, once the model was captured.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        acceptance: Evaluator,
        settings: Settings,
        given_loader: Any = None,
        describe: Callable[[str], None] = lambda step: None,
        advance: Callable[[], None] = lambda: None,
    ) -> None:
        """Nothing runs yet."""
        self.evaluator = evaluator
        self.acceptance = acceptance
        self.settings = settings
        self.loader = calibration_loader(settings, given_loader)
        self.describe = describe
        self.advance = advance
        self.root: torch.nn.Module = evaluator.pl_module
        self.report = Report(settings=settings.to_dict(), environment=environment(self.root, evaluator.seed))
        self.session: Instrumentation | None = None
        self._reference: Evaluation | None = None
        self._warnings: list[str] = []
        self._measured: dict[Kind | None, Evaluation] = {}
        self._own = find_own_quantizers(self.root)
        self._steps: dict[StepName, Callable[[], Step]] = {
            StepName.FP32_CHECK: self._fp32_check,
            StepName.ACTIVATIONS: self._activations,
            StepName.WEIGHTS: self._weights,
            StepName.QUANTIZE_MODEL: self._quantize_model,
        }

    def walk(self) -> Report:
        """Walk to the end of the chart.

        Returns:
            The report with its verdict; files and TensorBoard are the caller's business.
        """
        self.evaluator.check()
        started = time.monotonic()
        with own_quantizers(self._own, enabled=False):
            while (decision := next_step(self.report, frozenset(self._steps))) is not None:
                if decision.runs and self._is_late(started):
                    decision = replace(decision, runs=False, verdict=StepVerdict.NOT_RUN, advice=self._too_late())
                if decision.runs:
                    self._do(decision.step)
                else:
                    self.report = self.report.with_step(Step(decision.step, decision.verdict, advice=decision.advice))
        self._finish()
        return self.report

    def _is_late(self, started: float) -> bool:
        """Whether the time budget is spent, on any rank: all must take the same way."""
        budget = self.settings.max_time
        return budget is not None and any(gather(time.monotonic() - started >= budget.total_seconds()))

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
            "not_run": not_run(self.settings),
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
        return session

    def _note_coverage(self, session: Instrumentation) -> None:
        """Findings on what can not be simulated."""
        own = [quantizer.path for quantizer in self._own]
        if own:
            self.report = self.report.with_findings(
                Finding(Cause.NOT_QUANTIZED, f"the model's own quantizers are bypassed during the walk: {own}")
            )
        for path in session.topology.opaque_modules:
            self.report = self.report.with_findings(
                Finding(Cause.NOT_QUANTIZED, f"the operations inside {path} can not be seen, so they run in FP32", path)
            )
        for quantizer in session.quantizers.values():
            if quantizer.observer.non_finite:
                count = quantizer.observer.non_finite
                evidence = f"calibration saw {count} values that are NaN or infinite; ranges ignore them"
                self.report = self.report.with_findings(Finding(Cause.NON_FINITE, evidence, quantizer.name))

    def _activations(self) -> Step:
        """Only the activations quantized."""
        return self._quantized_step(StepName.ACTIVATIONS, Kind.ACTIVATION)

    def _weights(self) -> Step:
        """Only the weights quantized; then both, so that the interaction shows."""
        step = self._quantized_step(StepName.WEIGHTS, Kind.WEIGHT)
        both = self._quantized_step(StepName.QUANTIZE_MODEL, None)
        details: dict[str, Any] = {
            "both": {
                "score": both.score,
                "loss": both.loss,
                "interval": both.interval,
                "verdict": both.verdict.value,
            }
        }
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
        return self._judged(name, reference, evaluation)

    def _quantize_model(self) -> Step:
        """The whole model at its final settings, on the full validation set."""
        session, reference = self._needs_session()
        limit = self.settings.limit_batches
        if isinstance(limit, int) or limit < 1.0:
            reference = self.acceptance.run()
            self.report = replace(self.report, baseline=Baseline(reference.score, reference.samples))
            self._measured.clear()
        evaluation = self._measured.get(None)
        if evaluation is None or any(remedy.kept for remedy in self.report.remedies):
            with session.modes(Mode.QUANTIZE):
                try:
                    evaluation = self.acceptance.run(session.around_step)
                except NonFiniteScoreError:
                    return self._without_score(StepName.QUANTIZE_MODEL, self.acceptance)
        self.advance()
        step = self._judged(StepName.QUANTIZE_MODEL, reference, evaluation)
        self._note_samples(step, evaluation)
        if step.verdict is StepVerdict.NOISE:
            advice = (
                "The loss exceeds the tolerance, but with these samples it can not be told from zero. Validate on more "
                "samples before you accept or repair."
            )
            return replace(step, advice=advice)
        if step.verdict is StepVerdict.FAILED:
            return replace(step, advice=self._advice_on_failure())
        return step

    def _advice_on_failure(self) -> str:
        """Which box costs the score, and the cheapest thing to try next."""
        weights, activations = (self.report.step(name) for name in (StepName.WEIGHTS, StepName.ACTIVATIONS))
        guilty = [
            step.step.value
            for step in (weights, activations)
            if step is not None and step.verdict is StepVerdict.FAILED
        ]
        where = " and ".join(guilty) or "the two together, neither of them alone"
        tries = {
            "weights": "per-channel weights, or more weight bits",
            "activations": "calibrate on more batches, range setting 'mse', or more activation bits",
        }
        advice = "; ".join(tries[name] for name in guilty) or "more bits for weights or for activations"
        return f"The loss exceeds the tolerance; it comes from {where}. The next cheapest thing to try: {advice}."

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

    def _judged(self, name: StepName, reference: Evaluation, evaluation: Evaluation) -> Step:
        """A step from its score."""
        direction = self.settings.direction
        loss = direction.loss(reference.score, evaluation.score)
        interval = loss_interval(reference, evaluation, direction)
        permitted = self.settings.tolerance.permitted_loss(reference.score)
        return Step(name, judge(loss, interval, permitted), evaluation.score, loss, interval)

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

    def _note_samples(self, step: Step, evaluation: Evaluation) -> None:
        """Say when the validation set is too small to resolve the tolerance, and which size would do."""
        reference = self.report.baseline
        if reference is None or step.interval is None or not evaluation.samples:
            return
        permitted = self.settings.tolerance.permitted_loss(reference.score)
        half_width = (step.interval[1] - step.interval[0]) / 2
        is_open = step.interval[0] <= permitted < step.interval[1]
        if permitted > 0 and half_width > permitted and is_open:
            needed = samples_to_resolve(evaluation.samples, step.interval, permitted)
            evidence = (
                f"the loss is known to ±{half_width:.3g} with {evaluation.samples} samples, the tolerance is "
                f"{permitted:.3g}; about {needed} samples would resolve it"
            )
            self.report = self.report.with_findings(Finding(Cause.TOO_FEW_SAMPLES, evidence))

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

    def histograms(self, kind: Kind) -> Mapping[str, Histogram]:
        """Histogram of each tensor that calibration saw."""
        if self.session is None:
            return {}
        return {q.name: q.observer.histogram for q in self.session.select(kind=kind) if q.observer.count}


def setting_of(quantizer: Quantizer) -> QuantizerSetting:
    """Plain numbers of a quantizer's final setting."""
    encoding, spec = quantizer.encoding, quantizer.spec
    seen = quantizer.observer.count > 0
    zero_points = set() if encoding is None else set(encoding.zero_point.flatten().tolist())
    return QuantizerSetting(
        name=quantizer.name,
        kind=quantizer.kind.value,
        bit_width=spec.bit_width,
        symmetric=spec.symmetric,
        granularity=spec.granularity.value,
        range_min=None if encoding is None else float(encoding.range_min.min()),
        range_max=None if encoding is None else float(encoding.range_max.max()),
        scale=None if encoding is None else float(encoding.scale.max()),
        zero_point=zero_points.pop() if len(zero_points) == 1 else None,
        observed_min=quantizer.observer.range_min if seen else None,
        observed_max=quantizer.observer.range_max if seen else None,
        channels=1 if encoding is None else encoding.scale.numel(),
    )


def environment(root: torch.nn.Module, seed: int) -> dict[str, Any]:
    """Versions, device and seed of the walk."""
    packages = ("lightning-quantdebug", "torch", "pytorch-lightning", "lightning", "torchmetrics", "numpy")
    versions = {name: version for name in packages if (version := _version(name)) is not None}
    device = next((parameter.device for parameter in root.parameters()), torch.device("cpu"))
    return {
        "versions": versions,
        "python": platform.python_version(),
        "device": str(device),
        "seed": seed,
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

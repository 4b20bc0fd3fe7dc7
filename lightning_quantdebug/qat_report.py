"""What a quantization-aware training came to, as a step of the report."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lightning_quantdebug.evaluation import Evaluation
from lightning_quantdebug.final_settings import setting_of
from lightning_quantdebug.flowchart import final_verdict
from lightning_quantdebug.paired_loss import judged_step
from lightning_quantdebug.qat import Qat
from lightning_quantdebug.quantizer import Quantizer
from lightning_quantdebug.report import Cause, Finding, QuantizerSetting, Report, Step, StepName, StepVerdict
from lightning_quantdebug.settings import Settings


def with_training(
    report: Report, settings: Settings, reference: Evaluation, evaluation: Evaluation | None, qat: Qat, seconds: float
) -> Report:
    """The report with the step of a training that has ended, and with the verdict that it leads to.

    Args:
        report: Up to the training.
        settings: The settings.
        reference: FP32, on the data that accepts.
        evaluation: The trained model, quantized, on the same data; ``None`` where its score is no number.
        qat: The training.
        seconds: Its wall time.
    """
    step = replace(_step(settings, reference, evaluation, qat), seconds=seconds)
    step = replace(step, advice=_advice(step, qat))
    report = report.with_step(step)
    if qat.course.diverged:
        evidence = f"in QAT {qat.course.stopped}; the best state before it was put back"
        advice = "Lower `qat_lr_factor`, or clip gradients (`Trainer(gradient_clip_val=...)`)."
        report = report.with_findings(Finding(Cause.NON_FINITE, evidence, advice=advice))
    known = report.final.settings
    settings_of = {name: _setting(quantizer, known.get(name)) for name, quantizer in qat.session.quantizers.items()}
    state = module_state(qat)
    final = replace(report.final, score=step.score, loss=step.loss, interval=step.interval, settings=settings_of)
    report = replace(report, final=replace(final, module_state=state))
    return replace(report, verdict=final_verdict(report))


def _step(settings: Settings, reference: Evaluation, evaluation: Evaluation | None, qat: Qat) -> Step:
    """The numbers."""
    course = qat.course
    details: dict[str, Any] = {
        "epochs": len(course.scores),
        "epochs_allowed": course.epochs,
        "start_score": qat.aim.start,
        "scores": [course.scores[number] for number in sorted(course.scores)],
        "best_epoch": qat.best.epoch,
        "learning_rate": course.rate,
        "learned_scales": course.scales,
        "stopped": course.stopped,
        "notes": list(course.notes),
        "fp32_checkpoint": str(qat.fp32_checkpoint),
    }
    if evaluation is None:
        return Step(StepName.QAT, StepVerdict.FAILED, details=details)
    return replace(judged_step(StepName.QAT, reference, evaluation, settings), details=details)


def _setting(quantizer: Quantizer, before: QuantizerSetting | None) -> QuantizerSetting:
    """The final setting of a quantizer; what calibration saw is known from before, where a fit was resumed."""
    setting = setting_of(quantizer)
    if before is None or quantizer.observer.count:
        return setting
    return replace(setting, observed_min=before.observed_min, observed_max=before.observed_max)


def _advice(step: Step, qat: Qat) -> str:
    """What the user reads."""
    course, best = qat.course, qat.best
    trained = f"{len(course.scores)} of {course.epochs} epochs"
    stopped = f", stopped because {course.stopped}" if course.stopped else ""
    if best.epoch == 0:
        return (
            f"{trained} were trained{stopped}, and none scored better than the model before them, which was put back. "
            "Try another `qat_lr_factor`."
        )
    kept = f"{trained} were trained{stopped}; the weights of epoch {best.epoch} were kept"
    if step.verdict is StepVerdict.PASSED:
        return f"{kept}: the loss is within the tolerance."
    if step.verdict is StepVerdict.NOISE:
        return f"{kept}. {StepVerdict.NOISE.advice}"
    rising = best.epoch == max(course.scores, default=0)
    more = "It was still rising: raise `qat_epochs`." if rising else "Try another `qat_lr_factor`, or more bits."
    return f"{kept}, and the loss still exceeds the tolerance. {more}"


def module_state(qat: Qat) -> str:
    """In which state the module is left, and how to get the other."""
    if qat.best.epoch == 0:
        return "unchanged: the float weights as they were before QAT"
    return (
        f"trained: the float weights of QAT epoch {qat.best.epoch}, which give the quantized score on the grid of "
        f"`final.settings`; the FP32 model before QAT is {str(qat.fp32_checkpoint)!r} (`load_from_checkpoint`)"
    )

"""The flow chart, as pure functions from what is known to what comes next.

Nagel et al., "A White Paper on Neural Network Quantization" (2021), section 3.6 and figure 3.5; AIMET's guidebook draws
the same chart. Nothing here runs anything: :mod:`lightning_quantdebug.diagnosis` does what :func:`next_step` decides.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from lightning_quantdebug.report import Report, StepName, StepVerdict, Verdict

_GOOD = (StepVerdict.PASSED, StepVerdict.NOISE)


@dataclass(frozen=True)
class Decision:
    """What to do with the next box of the chart.

    Attributes:
        step: The box.
        runs: Whether it is carried out; else it is recorded with ``verdict`` and ``advice``.
        verdict: Why it is not carried out.
        advice: The sentence that the user reads.
    """

    step: StepName
    runs: bool = True
    verdict: StepVerdict = StepVerdict.SKIPPED
    advice: str = ""


def judge(loss: float, interval: tuple[float, float] | None, permitted: float) -> StepVerdict:
    """Judge a loss of score.

    Args:
        loss: Loss against FP32, positive is worse.
        interval: Its confidence interval, ``None`` where none is known.
        permitted: The tolerance in the metric's units.

    Returns:
        Passed within the tolerance. Beyond it: failed, or noise where the interval reaches down to no loss at all.

    Examples:
        >>> judge(0.02, (0.01, 0.03), permitted=0.01).value, judge(0.02, (-0.01, 0.05), permitted=0.01).value
        ('failed', 'noise')
    """
    if loss <= permitted:
        return StepVerdict.PASSED
    if interval is not None and interval[0] <= 0:
        return StepVerdict.NOISE
    return StepVerdict.FAILED


def next_step(report: Report, available: Set[StepName]) -> Decision | None:
    """The next box of the chart, or ``None`` at its end.

    Args:
        report: What is known so far; a step without a record has not been walked through.
        available: The steps that this version can carry out.

    Returns:
        The decision on the first box without a record.
    """
    for step in StepName:
        if report.step(step) is not None:
            continue
        check = report.step(StepName.FP32_CHECK)
        if check is not None and check.verdict is StepVerdict.BROKEN:
            return None
        reason = _reason_to_skip(report, step)
        if reason is not None:
            return Decision(step, runs=False, verdict=StepVerdict.SKIPPED, advice=reason)
        if step not in available:
            return Decision(step, runs=False, verdict=StepVerdict.NOT_RUN, advice=StepVerdict.NOT_RUN.advice)
        return Decision(step)
    return None


def _reason_to_skip(report: Report, step: StepName) -> str | None:
    """Why a box has nothing to do, ``None`` if it has."""
    if step is StepName.FIX_WEIGHTS and _is_good(report, StepName.WEIGHTS):
        return "The quantized weights alone stay within the tolerance."
    if step is StepName.FIX_ACTIVATIONS and _is_good(report, StepName.ACTIVATIONS):
        return "The quantized activations alone stay within the tolerance."
    if step in (StepName.PER_QUANTIZER, StepName.VISUALIZE, StepName.FIX_QUANTIZERS) and _both_pass(report):
        return "Weights and activations together stay within the tolerance: no quantizer is to blame."
    if step is StepName.QAT and _is_good(report, StepName.QUANTIZE_MODEL):
        return "The quantized model is accepted: there is nothing to train."
    return None


def _is_good(report: Report, step: StepName) -> bool:
    """Whether a step ended well."""
    record = report.step(step)
    return record is not None and record.verdict in _GOOD


def _both_pass(report: Report) -> bool:
    """Whether weights and activations, quantized together, were within the tolerance."""
    record = report.step(StepName.WEIGHTS)
    both = record.details.get("both") if record is not None else None
    return both is not None and both["verdict"] in [verdict.value for verdict in _GOOD]


def final_verdict(report: Report) -> Verdict:
    """The verdict on the whole walk.

    Examples:
        >>> final_verdict(Report()).value
        'failed'
    """
    check, whole = report.step(StepName.FP32_CHECK), report.step(StepName.QUANTIZE_MODEL)
    if check is not None and check.verdict is StepVerdict.BROKEN:
        return Verdict.BROKEN_PIPELINE
    if whole is None:
        return Verdict.FAILED
    if whole.verdict is not StepVerdict.PASSED:
        return Verdict.NOT_ACCEPTED
    qat = report.step(StepName.QAT)
    if qat is not None and qat.verdict is StepVerdict.PASSED:
        return Verdict.REPAIRED_BY_QAT
    return Verdict.REPAIRED if any(remedy.kept for remedy in report.remedies) else Verdict.ACCEPTED

"""The flow chart, as pure functions from what is known to what comes next.

Nagel et al., "A White Paper on Neural Network Quantization" (2021), section 3.6 and figure 3.5; AIMET's guidebook draws
the same chart. Nothing here runs anything: :mod:`lightning_quantdebug.diagnosis` does what :func:`next_step` decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import islice
from typing import Any

from lightning_quantdebug.report import Report, StepName, StepVerdict, Verdict
from lightning_quantdebug.settings import Analysis
from lightning_quantdebug.target import Kind, RangeSetting

_GOOD = (StepVerdict.PASSED, StepVerdict.NOISE)


# The remedies of each box, in the guidebook's order. High-bias absorption follows CLE in the paper; as it changes the
# ranges of activations and of no weight, only their box can tell whether it helps.
REMEDIES_OF: Mapping[StepName, tuple[str, ...]] = {
    StepName.FIX_WEIGHTS: ("cle", "per_channel", "per_group", "bias_correction", "adaround"),
    StepName.FIX_ACTIVATIONS: ("range_setting", "high_bias_absorption", "activation_cle"),
    StepName.FIX_QUANTIZERS: ("custom_range", "granularity", "bit_width"),
}
# Methods that the remedy `range_setting` tries one after the other.
RANGE_SETTINGS = (
    RangeSetting.MSE,
    RangeSetting.PERCENTILE,
    RangeSetting.MIN_MAX,
    RangeSetting.CROSS_ENTROPY,
    RangeSetting.BATCHNORM,
)
MOST_BLAMED = 6
"""Tensors that are looked at: four pictures of each are what a person can take in."""

# Without an interval a gain counts from this share of the permitted loss on: a tenth of what is asked for is progress,
# less than that is what another order of the sums could give.
_LEAST_GAIN = 0.1


@dataclass(frozen=True)
class Try:
    """One remedy to try, and which of its variants."""

    remedy: str
    variant: str = ""


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


def tries_of(step: StepName, remedies: Sequence[str] | None) -> tuple[Try, ...]:
    """What a box may try, in order.

    Args:
        step: ``FIX_WEIGHTS`` or ``FIX_ACTIVATIONS``.
        remedies: The user's choice and order, ``None`` for all in the guidebook's order.

    Examples:
        >>> [item.remedy for item in tries_of(StepName.FIX_WEIGHTS, ["adaround", "cle", "range_setting"])]
        ['adaround', 'cle']
    """
    own = REMEDIES_OF[step]
    chosen = own if remedies is None else [name for name in remedies if name in own]
    return tuple(
        Try(name, variant)
        for name in dict.fromkeys(chosen)
        for variant in ([method.value for method in RANGE_SETTINGS] if name == "range_setting" else [""])
    )


def next_try(report: Report, step: StepName, verdict: StepVerdict, remedies: Sequence[str] | None) -> Try | None:
    """The next remedy of a box, or ``None`` if its loss is good or nothing is left to try.

    Args:
        report: What was tried so far.
        step: The box.
        verdict: How the box stands with the remedies that were kept.
        remedies: See :func:`tries_of`.
    """
    if verdict in _GOOD:
        return None
    tried = {(item.remedy, item.variant) for item in report.remedies if item.step == step.value}
    return next((item for item in tries_of(step, remedies) if (item.remedy, item.variant) not in tried), None)


def judge_gain(gain: float, interval: tuple[float, float] | None, permitted: float) -> tuple[bool, str]:
    """Whether a remedy is kept: only if it helps beyond noise.

    Args:
        gain: Score gained, positive is better.
        interval: Its confidence interval, ``None`` where none is known.
        permitted: The tolerance in the metric's units.

    Returns:
        Whether to keep it, and why.

    Examples:
        >>> judge_gain(0.02, (-0.01, 0.05), permitted=0.01)
        (False, 'the gain can not be told from noise')
    """
    if gain <= 0:
        return False, "the score did not rise" if gain == 0 else "the score got worse"
    if interval is None:
        kept = gain > _LEAST_GAIN * permitted
        return (
            kept,
            "the score rose (no interval is known)" if kept else "the gain is negligible (no interval is known)",
        )
    return (True, "the score rose beyond noise") if interval[0] > 0 else (False, "the gain can not be told from noise")


def objective(report: Report, step: StepName) -> Kind | None:
    """Which quantizers are on while a box measures its remedies.

    Those of its own kind; all of them where each kind alone is good and only the two together lose.
    """
    kind = Kind.WEIGHT if step is StepName.FIX_WEIGHTS else Kind.ACTIVATION
    alone = _latest(report, "weights" if kind is Kind.WEIGHT else "activations")
    return None if _passes(alone) else kind


def _reason_to_skip(report: Report, step: StepName) -> str | None:
    """Why a box has nothing to do, ``None`` if it has."""
    weights, activations, both = (_latest(report, name) for name in ("weights", "activations", "both"))
    if step is StepName.FIX_WEIGHTS and _passes(weights) and (_passes(both) or not _passes(activations)):
        return "The quantized weights alone stay within the tolerance."
    if step is StepName.FIX_ACTIVATIONS:
        if _passes(activations) and (_passes(both) or not _passes(weights)):
            return "The quantized activations alone stay within the tolerance."
        if _passes(both):
            return "Weights and activations together stay within the tolerance."
    if step is StepName.PER_QUANTIZER and report.settings.get("analysis") == Analysis.EXHAUSTIVE.value:
        return None
    if step is StepName.VISUALIZE:
        return None if to_blame(report) else "No quantizer is to blame: there is no tensor to look at."
    if step in (StepName.PER_QUANTIZER, StepName.FIX_QUANTIZERS) and _passes(both):
        return "Weights and activations together stay within the tolerance: no quantizer is to blame."
    if step is StepName.QAT:
        whole = report.step(StepName.QUANTIZE_MODEL)
        if whole is not None and whole.verdict is StepVerdict.NOISE:
            return "The loss can not be told from zero with these samples: training could not be judged either."
        if whole is not None and whole.verdict is StepVerdict.PASSED:
            return "The quantized model is accepted: there is nothing to train."
    return None


def to_blame(report: Report, most: int = MOST_BLAMED) -> dict[str, str]:
    """The quantizers whose tensors are worth a look, the most important first, each with the reason.

    Those that a finding names, with its cause, then those that the analysis calls guilty.

    Examples:
        >>> from lightning_quantdebug.report import Cause, Coverage, Finding
        >>> finding = Finding(Cause.WEIGHT_OUTLIERS, "60 sigma", "conv.weight")
        >>> to_blame(Report(coverage=Coverage(("conv.weight", "conv")), findings=(finding,)))
        {'conv.weight': 'weight_outliers'}
    """
    blamed: dict[str, str] = {}
    for item in report.findings:
        if item.quantizer in report.coverage.quantized:
            blamed.setdefault(item.quantizer, item.cause.value)
    for row in report.sensitivity:
        if row.guilty:
            blamed.setdefault(row.quantizer, "guilty")
    return dict(islice(blamed.items(), most))


def _latest(report: Report, name: str) -> str | None:
    """The last verdict on ``weights``, ``activations`` or ``both``: steps of that name, or details of later steps."""
    for step in reversed(report.steps):
        if step.step.value == name:
            return str(step.verdict.value)
        details: Any = step.details.get(name)
        if details is not None:
            return str(details["verdict"])
    return None


def _passes(verdict: str | None) -> bool:
    """Whether a verdict is a good one."""
    return verdict in [good.value for good in _GOOD]


def final_verdict(report: Report) -> Verdict:
    """The verdict on the whole walk.

    Examples:
        >>> final_verdict(Report()).value
        'failed'
    """
    check, whole = report.step(StepName.FP32_CHECK), report.step(StepName.QUANTIZE_MODEL)
    if check is not None and check.verdict is StepVerdict.BROKEN:
        return Verdict.BROKEN_PIPELINE
    qat = report.step(StepName.QAT)
    if qat is not None and qat.verdict is StepVerdict.PASSED:
        return Verdict.REPAIRED_BY_QAT
    if whole is None:
        return Verdict.FAILED
    if whole.verdict is not StepVerdict.PASSED:
        return Verdict.NOT_ACCEPTED
    return Verdict.REPAIRED if any(remedy.kept for remedy in report.remedies) else Verdict.ACCEPTED

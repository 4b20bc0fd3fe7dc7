"""Compare the reports of two runs: is the second one worse than the first, and what else differs.

Pure: from two reports to one record of plain values, for a person (:mod:`~lightning_quantdebug.diff_console`) and, as
JSON, for CI. The losses of the last box decide; what counts as noise is in :mod:`~lightning_quantdebug.loss_change`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_quantdebug.errors import ReportError
from lightning_quantdebug.loss_change import Loss, LossChange, Outcome, finite, loss_change
from lightning_quantdebug.markdown_text import interval, number
from lightning_quantdebug.report import Final, Finding, Report, Step, StepName, Verdict
from lightning_quantdebug.report_markdown import walked
from lightning_quantdebug.review_data import direction_of, good, permitted_loss
from lightning_quantdebug.run_differences import (
    BitWidthChange,
    SettingChange,
    SqnrChange,
    bit_width_changes,
    findings_of_one,
    setting_changes,
    sqnr_changes,
)

FINAL = "final"
MOST_SQNR = 10
_BAD_ENDS = (Verdict.BROKEN_PIPELINE, Verdict.FAILED)


@dataclass(frozen=True)
class Measurement:
    """One box of the chart, or the end, in both runs.

    Attributes:
        name: The step, or ``final``.
        scores: The score in A and in B; ``None`` where it was not measured.
        losses: The loss of score in A and in B.
        verdicts: How it ended in A and in B; ``None`` where it was not walked.
        change: How the loss changed.
    """

    name: str
    scores: tuple[float | None, float | None]
    losses: tuple[Loss, Loss]
    verdicts: tuple[str | None, str | None]
    change: LossChange


@dataclass(frozen=True)
class Comparison:
    """What two runs differ in.

    Attributes:
        monitor: The metric.
        mode: ``min`` or ``max``.
        verdicts: How A and B ended; ``None``: not at all.
        baselines: The FP32 scores of A and of B.
        measurements: The boxes that either run walked, in the chart's order, and the end.
        decided_by: Name of the one whose loss decides.
        regression: Whether B is worse than A.
        reason: Why, in words.
        notes: What else one must know to judge.
        new_findings: Findings of B that A has not.
        gone_findings: Findings of A that B has not.
        sqnr: Quantizers whose SQNR changed by more than 1 dB, at most ten, those that fell most first.
        more_sqnr: How many more there are.
        bit_widths: Quantizers whose final bits differ.
        settings: Settings and parts of the environment that differ.
    """

    monitor: str
    mode: str
    verdicts: tuple[str | None, str | None]
    baselines: tuple[float | None, float | None]
    measurements: tuple[Measurement, ...]
    decided_by: str
    regression: bool
    reason: str
    notes: tuple[str, ...]
    new_findings: tuple[Finding, ...]
    gone_findings: tuple[Finding, ...]
    sqnr: tuple[SqnrChange, ...]
    more_sqnr: int
    bit_widths: tuple[BitWidthChange, ...]
    settings: tuple[SettingChange, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them; every number is finite."""
        return asdict(self)


def compare(a: Report, b: Report, *, step: StepName | None = None, strict: bool = False) -> Comparison:
    """Compare two runs; B is a regression if its loss is worse than that of A beyond noise.

    An end in ``broken_pipeline`` or ``failed`` in B alone is a regression whatever the losses. An end in
    ``not_accepted`` of B alone, without a loss that is worse beyond noise, is a note: tolerance or chance may have made
    the difference.

    Args:
        a: The run to compare with.
        b: The run that is judged.
        step: The box whose loss decides; ``None``: the end.
        strict: Count an end in ``not_accepted`` of B alone as a regression too.

    Raises:
        ReportError: If the runs have another monitor or mode, or the loss that decides is missing where it is needed.

    Examples:
        >>> settings = {"monitor": "val_acc", "mode": "max", "tolerance": "1%"}
        >>> a, b = (Report(settings, final=Final(0.9, loss, (loss - 0.01, loss + 0.01))) for loss in (0.02, 0.06))
        >>> compare(a, b).regression, compare(b, a).regression
        (True, False)
    """
    _check_comparable(a, b)
    measurements = _measurements(a, b)
    decided_by = FINAL if step is None else step.value
    deciding = next((item for item in measurements if item.name == decided_by), None)
    regression, reason = _judged(a, b, decided_by, measurements)
    worsened = _lost_acceptance(a, b) and not regression
    sqnr = sqnr_changes(a, b)
    return Comparison(
        monitor=_monitor(a),
        mode=direction_of(a).value,
        verdicts=(_value(a.verdict), _value(b.verdict)),
        baselines=(_baseline(a), _baseline(b)),
        measurements=measurements,
        decided_by=decided_by,
        regression=regression or (strict and worsened),
        reason=f"{reason} {_of_acceptance(a, b)} (--strict)" if strict and worsened else reason,
        notes=tuple(_notes(a, b, deciding, worsened and not strict)),
        new_findings=findings_of_one(b, a),
        gone_findings=findings_of_one(a, b),
        sqnr=sqnr[:MOST_SQNR],
        more_sqnr=max(0, len(sqnr) - MOST_SQNR),
        bit_widths=bit_width_changes(a, b),
        settings=setting_changes(a, b),
    )


# Whether B is worse.


def _check_comparable(a: Report, b: Report) -> None:
    """Raise if the scores of the two runs mean something else."""
    for name, of_a, of_b in (
        ("monitor", _monitor(a), _monitor(b)),
        ("mode", direction_of(a).value, direction_of(b).value),
    ):
        if of_a != of_b:
            raise ReportError(f"The runs can not be compared: `{name}` is {of_a!r} in A and {of_b!r} in B.")


def _judged(a: Report, b: Report, name: str, measurements: Sequence[Measurement]) -> tuple[bool, str]:
    """Whether B is a regression, and why; raise where that can not be told."""
    deciding = next((item for item in measurements if item.name == name), None)
    if b.verdict in _BAD_ENDS and a.verdict not in _BAD_ENDS:
        return True, f"B ended in {_value(b.verdict)}, A did not."
    change = None if deciding is None else deciding.change
    if change is not None and change.value is not None:
        return change.outcome is Outcome.WORSE, _reason(name, change)
    if a.verdict in _BAD_ENDS and b.verdict not in _BAD_ENDS:
        return False, f"A ended in {_value(a.verdict)}, B did not: there is no loss of A to compare with."
    raise ReportError(_why_not(name, deciding, measurements))


def _why_not(name: str, deciding: Measurement | None, measurements: Sequence[Measurement]) -> str:
    """That the loss which decides is missing, and which ones are not."""
    losses = (Loss(), Loss()) if deciding is None else deciding.losses
    missing = [run for run, loss in zip("AB", losses, strict=True) if loss.value is None]
    known = [item.name for item in measurements if item.change.value is not None]
    return (
        f"The runs can not be compared: {' and '.join(missing)} measured no loss of `{name}`. Both measured that of "
        f"{', '.join(known) or 'nothing'}."
    )


def _reason(name: str, change: LossChange) -> str:
    """How the loss that decides changed, in words."""
    value, noise = change.value, change.noise
    assert value is not None
    text = f"The loss of {name} {'rose' if value > 0 else 'fell'} by {number(abs(value))}"
    text = text if value else f"The loss of {name} is the same"
    if noise is not None:
        where, ends = "within" if change.outcome is Outcome.NOISE else "beyond", interval(change.interval)
        return f"{text}, {where} the noise of {number(noise, 2)} (95 % interval of the change {ends})."
    if change.least is None:
        return f"{text}. Neither an interval nor the permitted loss is known, so that any change counts."
    counts = "does not count" if change.outcome is Outcome.NOISE else "counts"
    return (
        f"{text}. No interval is known, so its noise is not: a change counts from {number(change.least)} on, a tenth "
        f"of the permitted loss. This one {counts}."
    )


def _lost_acceptance(a: Report, b: Report) -> bool:
    """Whether A ended with a model that can be used and B without one."""
    return good(a.verdict) and b.verdict is Verdict.NOT_ACCEPTED


def _of_acceptance(a: Report, b: Report) -> str:
    """That B is not accepted any more, in words."""
    return f"A was {_value(a.verdict)} and B is {_value(b.verdict)}."


def _notes(a: Report, b: Report, deciding: Measurement | None, worsened: bool) -> Iterator[str]:
    """What the decision leaves open."""
    if worsened:
        yield f"{_of_acceptance(a, b)} The loss is not worse beyond noise, so this is no regression (--strict: it is)."
    before, after = _baseline(a), _baseline(b)
    if before is not None and after is not None and loss_change(Loss(before), Loss(after)).outcome is not Outcome.NOISE:
        moved = direction_of(a).loss(before, after)
        yield (
            f"FP32 itself scores {number(before)} in A and {number(after)} in B, {number(abs(moved))} "
            f"{'worse' if moved > 0 else 'better'}: the reports do not tell how much of that is noise. Losses are each "
            "against their own FP32, so this is not part of them."
        )
    scores = (None, None) if deciding is None else deciding.scores
    if scores[0] is not None and scores[1] is not None and scores[0] != scores[1]:
        yield f"The quantized score goes from {number(scores[0])} to {number(scores[1])}."
    samples = [None if run.baseline is None else run.baseline.samples for run in (a, b)]
    if samples[0] != samples[1]:
        yield f"FP32 was measured on {number(samples[0])} samples in A and on {number(samples[1])} in B."


# What both runs measured.


def _measurements(a: Report, b: Report) -> tuple[Measurement, ...]:
    """Every box that either run walked, and the end."""
    permitted = [limit for limit in (_permitted(a), _permitted(b)) if limit is not None]
    # Of two tolerances the smaller one: whoever made it so wants smaller losses to count.
    limit, scale = min(permitted, default=None), max(abs(_baseline(run) or 0.0) for run in (a, b))
    before, after = ({step.step: step for step in walked(run)} for run in (a, b))
    records: list[tuple[str, Step | Final | None, Step | Final | None]] = [
        (name.value, before.get(name), after.get(name)) for name in StepName if name in before or name in after
    ]
    ends = {FINAL: (_value(a.verdict), _value(b.verdict))}
    return tuple(
        Measurement(
            name,
            (_score(x), _score(y)),
            (_loss(x), _loss(y)),
            ends.get(name, (_end(x), _end(y))),
            loss_change(_loss(x), _loss(y), limit, scale),
        )
        for name, x, y in (*records, (FINAL, a.final, b.final))
    )


def _end(record: Step | Final | None) -> str | None:
    """How a box ended."""
    return _value(record.verdict) if isinstance(record, Step) else None


def _loss(record: Step | Final | None) -> Loss:
    """The loss of a box or of the end."""
    return Loss() if record is None else Loss.of(record.loss, record.interval)


def _score(record: Step | Final | None) -> float | None:
    """The score of a box or of the end."""
    return None if record is None else finite(record.score)


def _baseline(report: Report) -> float | None:
    """The FP32 score."""
    return None if report.baseline is None else finite(report.baseline.score)


def _permitted(report: Report) -> float | None:
    """The permitted loss."""
    return None if _baseline(report) is None else finite(permitted_loss(report))


def _monitor(report: Report) -> str:
    """Name of the metric."""
    return str(report.settings.get("monitor", "score"))


def _value(verdict: Any) -> str | None:
    """A verdict as a plain string."""
    return None if verdict is None else str(verdict.value)

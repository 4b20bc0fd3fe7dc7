"""What differs between two runs besides their scores: findings, quantizers, settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_quantdebug.loss_change import finite
from lightning_quantdebug.report import Finding, Report

LEAST_SQNR_CHANGE_DB = 1.0
"""A bit is worth 6 dB; between two runs of the same model other batches make less than 1 dB."""


@dataclass(frozen=True)
class SqnrChange:
    """SQNR of the output with one quantizer alone on, in dB, in A and in B."""

    quantizer: str
    a: float
    b: float


@dataclass(frozen=True)
class BitWidthChange:
    """Final bits of one quantizer in A and in B; ``None`` where the run has no such quantizer."""

    quantizer: str
    a: int | None
    b: int | None


@dataclass(frozen=True)
class SettingChange:
    """A setting, or a part of the environment, by its path, in A and in B; ``None`` where the run has none."""

    name: str
    a: Any
    b: Any


def findings_of_one(report: Report, other: Report) -> tuple[Finding, ...]:
    """Findings that another run has not, by cause and place: evidence differs from run to run.

    Args:
        report: Whose findings.
        other: The other run.

    Examples:
        >>> from lightning_quantdebug.report import Cause
        >>> one = Report(findings=(Finding(Cause.NON_FINITE, "NaN"), Finding(Cause.DEAD_CHANNELS, "2 of 8", "conv")))
        >>> [finding.quantizer for finding in findings_of_one(one, Report(findings=one.findings[:1]))]
        ['conv']
    """
    left = Counter((finding.cause, finding.quantizer) for finding in other.findings)
    missing = []
    for finding in report.findings:
        key = finding.cause, finding.quantizer
        left[key] -= 1
        if left[key] < 0:
            missing.append(finding)
    return tuple(missing)


def sqnr_changes(a: Report, b: Report) -> tuple[SqnrChange, ...]:
    """Quantizers whose SQNR changed by more than 1 dB, those that fell most first.

    Examples:
        >>> from lightning_quantdebug.report import Sensitivity
        >>> a, b = (
        ...     Report(sensitivity=(Sensitivity("conv", "weight", 8, None, None, None, db, "exact"),))
        ...     for db in (30.0, 20.0)
        ... )
        >>> sqnr_changes(a, b)
        (SqnrChange(quantizer='conv', a=30.0, b=20.0),)
    """
    before, after = ({row.quantizer: finite(row.sqnr_db) for row in run.sensitivity} for run in (a, b))
    both = [(name, x, after.get(name)) for name, x in before.items()]
    known = [SqnrChange(name, x, y) for name, x, y in both if x is not None and y is not None]
    changed = [item for item in known if abs(item.b - item.a) > LEAST_SQNR_CHANGE_DB]
    return tuple(sorted(changed, key=lambda item: item.b - item.a))


def bit_width_changes(a: Report, b: Report) -> tuple[BitWidthChange, ...]:
    """Quantizers whose final bits differ, in order of execution; none where a run has no final settings.

    Examples:
        >>> bit_width_changes(Report(), Report())
        ()
    """
    before, after = ({name: one.bit_width for name, one in run.final.settings.items()} for run in (a, b))
    if not before or not after:
        return ()
    changes = (BitWidthChange(name, before.get(name), after.get(name)) for name in {**before, **after})
    return tuple(item for item in changes if item.a != item.b)


def setting_changes(a: Report, b: Report) -> tuple[SettingChange, ...]:
    """Settings and parts of the environment that differ, by their paths.

    Examples:
        >>> setting_changes(Report({"target": {"name": "int8"}}), Report({"target": {"name": "w4a8"}}))
        (SettingChange(name='target.name', a='int8', b='w4a8'),)
    """
    before, after = (dict(_flat(run.settings)) | dict(_flat(run.environment, "environment.")) for run in (a, b))
    changes = (SettingChange(name, before.get(name), after.get(name)) for name in {**before, **after})
    return tuple(item for item in changes if item.a != item.b)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every value that is no mapping, with its path."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", _plain(value)


def _plain(value: Any) -> Any:
    """A value without numbers that are not finite, which JSON can not hold."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return finite(value) if isinstance(value, float) else value

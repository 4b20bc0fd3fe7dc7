"""What is said of exported files: on a terminal, in the pages, and as the next thing to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lightning_quantdebug.report import Agreement, Comparison, Export

EXPORT_HEADER = (
    "format",
    "agreement",
    "score",
    "simulated",
    "most steps apart",
    "the simulation itself",
    "equal",
    "why",
)
"""Columns of :func:`export_rows`."""


def export_rows(exports: Sequence[Export]) -> list[tuple[str, ...]]:
    """One row for each format, with the way of running it that differs most; texts are as they are, not escaped.

    Examples:
        >>> rows = export_rows([Export("pt2", Agreement.NOT_WRITTEN, "the disk is full")])
        >>> rows[0][0], rows[0][1], rows[0][-1]
        ('pt2', 'not_written', 'the disk is full')
    """
    return [_row(export) for export in exports]


def _row(export: Export) -> tuple[str, ...]:
    """One format."""
    worst = max(export.comparisons, key=lambda comparison: comparison.rms, default=None)
    apart = ("", "", "") if worst is None else (f"{worst.largest:.3g}", f"{worst.floor_largest:.3g}", _share(worst))
    scores = (_number(export.score), _number(export.simulated_score))
    return (export.name, export.agreement.value, *scores, *apart, export.reason)


def _number(value: float | None) -> str:
    """A score, or nothing."""
    return "" if value is None else f"{value:.6g}"


def _share(comparison: Comparison) -> str:
    """Share of equal predictions."""
    return f"{comparison.equal_predictions:.2%}"


def export_lines(export: Export) -> list[str]:
    """One line for the format and one for each way in which it was run.

    Examples:
        >>> export_lines(Export("pt2", Agreement.NOT_WRITTEN, "the disk is full"))
        ['pt2: not_written (the disk is full)']
    """
    files = ", ".join(Path(path).name for path in export.files)
    reason = f" ({export.reason})" if export.reason else ""
    first = f"{export.name}: {export.agreement.value}{f' {files}' if files else ''}{reason}"
    return [first, *(f"  {comparison_line(comparison)}" for comparison in export.comparisons)]


def comparison_line(comparison: Comparison) -> str:
    """How a file compares with the simulation, in one line."""
    return (
        f"{comparison.runtime}: {comparison.samples} samples, at most {comparison.largest:.3g} steps apart (the "
        f"simulation itself: {comparison.floor_largest:.3g}), {_share(comparison)} equal"
    )


def export_text(export: Export) -> str:
    """One format in a sentence, for a summary.

    Examples:
        >>> export_text(Export("onnx", Agreement.VERIFIED, score=0.931, simulated_score=0.93))
        'onnx verified: score 0.931 (simulated 0.93)'
    """
    said = [f"score {export.score:.4g} (simulated {export.simulated_score:.4g})"] if export.score is not None else []
    worst = max(export.comparisons, key=lambda comparison: comparison.rms, default=None)
    said += [f"at most {worst.largest:.3g} steps apart"] if worst is not None else []
    said += [export.reason] if export.reason else []
    return f"{export.name} {export.agreement.value}{': ' if said else ''}{', '.join(said)}"


def next_on_device(exports: Sequence[Export]) -> str:
    """What to do next with a model that is good enough.

    Examples:
        >>> next_on_device([Export("onnx", Agreement.VERIFIED, files=("out/model.onnx",))])
        'Measure model.onnx on the device: it is verified, and this report simulates the arithmetic in float.'
    """
    asked = [export for export in exports if export.name != "recipe"]
    verified = [export for export in asked if export.agreement is Agreement.VERIFIED]
    if verified:
        names = ", ".join(Path(path).name for path in verified[0].files[:1])
        return f"Measure {names} on the device: it is verified, and this report simulates the arithmetic in float."
    if asked:
        return f"See why no exported file is verified before you ship one: {asked[0].name}: {asked[0].reason}"
    return (
        "Write a file that runs elsewhere, proven to match: export=('onnx',), and measure it on the device: this "
        "report simulates the arithmetic in float."
    )

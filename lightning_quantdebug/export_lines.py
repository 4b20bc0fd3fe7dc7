"""What is said of an exported file on a terminal."""

from __future__ import annotations

from pathlib import Path

from lightning_quantdebug.report import Comparison, Export


def export_lines(export: Export) -> list[str]:
    """One line for the format and one for each way in which it was run.

    Examples:
        >>> from lightning_quantdebug.report import Agreement
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
        f"simulation itself: {comparison.floor_largest:.3g}), {comparison.equal_predictions:.2%} equal"
    )

"""Tables of single quantizers for a person: how sensitive each is, what was raised, and what settings cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_quantdebug.markdown_text import code, escape, number, table
from lightning_quantdebug.markdown_text import interval as interval_text
from lightning_quantdebug.report import Report, Sensitivity, StepName

MAX_ROWS = 8
"""Of the table on the page; the whole one stands in TensorBoard's ``table_of_quantizers`` and in report.json."""

_INSTEAD = {
    "bits_16": "16 bits",
    "bits_plus_4": "4 more bits",
    "per_channel": "per channel",
    "per_group": "per group",
    "mse": "MSE range",
}


def sensitivity_table(rows: Sequence[Sensitivity]) -> str:
    """Every quantizer alone at its bit-width, the rest in FP32, as a Markdown table.

    Args:
        rows: Worst first.

    Examples:
        >>> row = Sensitivity("conv", "activation", 8, 0.9, 0.03, (0.01, 0.05), 31.5, "exact", 0.2, 512, guilty=True)
        >>> print(sensitivity_table([row]).splitlines()[2])
        | `conv` | 8 | 31.5 | 0.2 | 0.03 [0.01, 0.05] | guilty | - | - | exact 512 |
    """
    with_off = any(row.loss_when_off is not None for row in rows)
    header = ["quantizer", "bits", "SQNR, dB", "KL, nats", "loss of score [95 %]", "so it is"]
    header += ["loss if only this is off"] if with_off else []
    header += ["task loss, estimate", "what helps the tensor", "samples"]
    return table(header, [_row(row, with_off) for row in rows])


def _row(row: Sensitivity, with_off: bool) -> list[str]:
    """The cells of one quantizer."""
    ends = "" if row.interval is None else f" [{number(row.interval[0], 2)}, {number(row.interval[1], 2)}]"
    cells = [code(row.quantizer), str(row.bit_width), _decibels(row.sqnr_db), number(row.kl, 3)]
    cells += [f"{number(row.loss, 2)}{ends}", judgement(row)]
    cells += [number(row.loss_when_off, 2)] if with_off else []
    samples = "" if row.samples is None else f" {row.samples}"
    return [*cells, number(row.task_loss, 2), helps(row.counterfactuals), escape(f"{row.method}{samples}")]


def _decibels(value: float | None) -> str:
    """A number of decibels with one digit behind the point."""
    return "-" if value is None else f"{value:.1f}"


def judgement(row: Sensitivity) -> str:
    """What the score says of a quantizer."""
    if row.guilty:
        return "guilty"
    if row.interval is None:
        return "-"
    return "noise" if row.interval[0] <= 0 <= row.interval[1] else "small"


def helps(counterfactuals: Mapping[str, float | None]) -> str:
    """The settings that would gain most at the tensor, in dB against now, other than 16 bits, which always do.

    Examples:
        >>> helps({"now": 20.0, "bits_16": 70.0, "per_channel": 31.0, "mse": 24.2, "percentile_99.9": 18.0})
        'per channel +11.0, MSE range +4.2'
    """
    now = counterfactuals.get("now")
    if now is None:
        return "-"
    found = [(value - now, name) for name, value in counterfactuals.items() if value is not None and name in _INSTEAD]
    found += [(v - now, n) for n, v in counterfactuals.items() if v is not None and n.startswith("percentile_")]
    best = sorted((gain, name) for gain, name in found if gain >= 1.0 and not name.startswith("bits_"))[::-1]
    return ", ".join(f"{_name(name)} {gain:+.1f}" for gain, name in best[:2]) or "more bits only"


def _name(counterfactual: str) -> str:
    """A setting in words."""
    return _INSTEAD.get(counterfactual) or f"{counterfactual.removeprefix('percentile_')} % range"


def quantizers_section(report: Report) -> str:
    """The worst quantizers, for the page; empty where none was looked at."""
    if not report.sensitivity:
        return ""
    rows = report.sensitivity[:MAX_ROWS]
    left = len(report.sensitivity) - len(rows)
    more = f"\n\n{left} more in report.json and in TensorBoard." if left > 0 else ""
    step = report.step(StepName.PER_QUANTIZER)
    notes = [] if step is None else [step.details[name] for name in ("way", "predicted") if name in step.details]
    text = "".join(f"\n\n{escape(note[:1].upper() + note[1:])}." for note in notes)
    return f"## Quantizers, each alone\n\n{sensitivity_table(rows)}{more}{text}"


def settings_section(report: Report) -> str:
    """What single repairs came to: the quantizers that differ from the target, and what the settings cost."""
    step = report.step(StepName.FIX_QUANTIZERS)
    points = [] if step is None else step.details.get("pareto", [])
    if step is None or not points:
        return ""
    changed = step.details.get("changed", {})
    lines = [f"- {code(name)}: {escape(text)}" for name, text in list(changed.items())[:MAX_ROWS]]
    lines += [f"- and {len(changed) - MAX_ROWS} more in report.json"] if len(changed) > MAX_ROWS else []
    differs = "\n".join(lines) if lines else "No quantizer differs from the target."
    front = [point for point in points if point["on_front"]][:MAX_ROWS]
    header = ("setting", "raised", "weights, kB", "bit-operations, millions", "score", "loss", "95 % interval")
    shown = table(header, [_point(point) for point in front]) if front else ""
    why = f"Of {len(points)} settings that were measured, those that no other beats:"
    return "\n\n".join(part for part in ("## Single quantizers repaired", differs, why if shown else "", shown) if part)


def _point(point: Mapping[str, Any]) -> tuple[str, ...]:
    """The cells of one measured setting."""
    ends = point["interval"]
    return (
        escape(point["title"]),
        str(point["raised"]),
        number(point["size_bytes"] / 1000),
        number(point["bit_operations"] / 1e6),
        number(point["score"]),
        number(point["loss"]),
        interval_text(None if ends is None else (ends[0], ends[1])),
    )

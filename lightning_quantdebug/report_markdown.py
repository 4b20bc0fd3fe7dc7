"""The report for a person: one page of Markdown, verdict first.

The page is read in three places: as a file in an editor, on a forge, and in TensorBoard's Text dashboard, which keeps
tables, lists, code spans and emphasis and shows any HTML escaped. So there is no HTML here, and whatever comes from the
user's model (layer names, evidence, error texts) is escaped: no name can end a table cell or start a tag.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_quantdebug.export_lines import EXPORT_HEADER, comparison_line, export_rows, next_on_device
from lightning_quantdebug.markdown_text import code, escape, interval, number, table
from lightning_quantdebug.quantizer_tables import quantizers_section, settings_section
from lightning_quantdebug.report import (
    Cause,
    Coverage,
    Finding,
    QuantizerSetting,
    Report,
    Step,
    StepName,
    StepVerdict,
    Verdict,
)

# One page: what does not fit is counted and left to report.json.
MAX_FINDINGS = 10
MAX_RANGES = 20
MAX_NAMES = 4
MAX_REASONS = 8

__all__ = ["code", "escape", "interval", "number", "table", "to_markdown"]


def walked(report: Report) -> list[Step]:
    """The steps that this walk ran, in its order."""
    return [step for step in report.steps if step.verdict not in (StepVerdict.NOT_RUN, StepVerdict.SKIPPED)]


def not_walked(report: Report, verdict: StepVerdict) -> list[str]:
    """Names of the steps that were skipped, or that this version does not run; not those that time ran out for."""
    return [step.step.value for step in report.steps if step.verdict is verdict and step not in left_undone(report)]


def left_undone(report: Report) -> list[Step]:
    """The steps that this version runs but this walk did not; their advice says why."""
    return [
        step
        for step in report.steps
        if step.verdict is StepVerdict.NOT_RUN and step.advice not in ("", StepVerdict.NOT_RUN.advice)
    ]


def outcome(report: Report) -> str:
    """What the verdict means for this walk, in one sentence."""
    if report.verdict is None:
        return "The walk has not come to its end."
    whole = report.step(StepName.QUANTIZE_MODEL)
    if whole is not None and report.verdict is Verdict.NOT_ACCEPTED and whole.verdict is not StepVerdict.FAILED:
        # It is not known that the model loses too much: noise, or a step that was not reached.
        return whole.advice or whole.verdict.advice
    return report.verdict.advice


def headline(report: Report) -> str:
    """The verdict with the score against FP32, in one line of plain text."""
    verdict = "unfinished" if report.verdict is None else report.verdict.value.replace("_", " ")
    monitor = str(report.settings.get("monitor", "score"))
    if report.baseline is None or report.final.score is None:
        return verdict
    line = f"{verdict}: {monitor} {number(report.baseline.score)} in FP32, {number(report.final.score)} quantized"
    return f"{line}, loss {number(report.final.loss)} (permitted: {report.settings.get('tolerance', '-')})"


def reasons(report: Report) -> list[str]:
    """Why the verdict is what it is: one plain sentence for each thing that decided it."""
    lines = [outcome(report)]
    if report.error:
        lines.append(f"The walk stopped with: {report.error}")
    shown = [*walked(report), *left_undone(report)]
    lines += [f"{step.step.value}: {step.advice or step.verdict.advice}" for step in shown]
    for step in report.steps:
        lines += [*step.details.get("warnings", ()), *step.details.get("not_run", ())]
    return lines


def interaction(report: Report) -> str | None:
    """How the losses of weights and activations add up, or ``None`` where that was not measured."""
    weights, activations = report.step(StepName.WEIGHTS), report.step(StepName.ACTIVATIONS)
    if weights is None or activations is None or weights.loss is None or activations.loss is None:
        return None
    both = weights.details.get("both")
    both_loss = both.get("loss") if isinstance(both, Mapping) else both
    if not isinstance(both_loss, (int, float)):
        return None
    return (
        f"Weights alone lose {number(weights.loss)}, activations alone {number(activations.loss)}, both together "
        f"{number(both_loss)}: {_against_the_sum(both_loss - weights.loss - activations.loss)}"
        f"{_of_interaction(weights.details.get('interaction_interval'))}."
    )


def _against_the_sum(extra: float) -> str:
    """How much more than the sum of its parts a loss is; rounding of the subtraction is no difference."""
    if abs(extra) < 1e-6:
        return "the sum of both"
    return f"{number(abs(extra))} {'more' if extra > 0 else 'less'} than the sum"


def _of_interaction(found: Any) -> str:
    """The interval of the interaction, and whether it is noise."""
    if found is None or found[0] == found[1]:
        return ""
    noise = " (noise)" if found[0] <= 0 <= found[1] else ""
    return f", 95 % interval {interval((found[0], found[1]))}{noise}"


def next_steps(report: Report) -> list[str]:
    """What the user can do now: plain sentences, the most useful first."""
    steps = list(dict.fromkeys(finding.advice for finding in report.findings if finding.advice))[:MAX_NAMES]
    if report.verdict in (Verdict.ACCEPTED, Verdict.REPAIRED, Verdict.REPAIRED_BY_QAT):
        return [next_on_device(report.final.exports), *steps]
    if report.verdict is Verdict.NOT_ACCEPTED:
        undone = [step.advice for step in left_undone(report)[:1]]
        return steps + (undone or _wider_targets(report))
    if report.verdict is Verdict.FAILED:
        return [*steps, "Set `on_error` to 'raise' to see where the walk failed."]
    return steps or ["Run the walk again to its end."]


def _wider_targets(report: Report) -> list[str]:
    """Cheaper targets to try, for the half of the model that loses the score."""
    target = report.settings.get("target")
    weights = target.get("weights", {}) if isinstance(target, Mapping) else {}
    tries = []
    if _lost(report, StepName.WEIGHTS):
        if weights.get("granularity") == "per_tensor":
            tries.append("Try weights per channel: target={'weights': {'granularity': 'per_channel'}}.")
        tries.append("See what more bits for the weights would do: target={'weights': {'bit_width': 16}}.")
    if _lost(report, StepName.ACTIVATIONS):
        tries.append("See what more bits for the activations would do: target={'activations': {'bit_width': 16}}.")
    return tries or ["Try a target with more bits, or give `tolerance` the loss that you can live with."]


def _lost(report: Report, name: StepName) -> bool:
    """Whether this step exceeded the tolerance."""
    step = report.step(name)
    return step is not None and step.verdict is StepVerdict.FAILED


def ranges_table(settings: Iterable[QuantizerSetting]) -> str:
    """Every quantizer's observed values, clipping range and grid as a Markdown table.

    Args:
        settings: The settings in the order in which they shall be shown; ranges are in units of the tensor.
    """
    header = ("quantizer", "bits", "granularity", "observed", "range", "scale", "zero point")
    return table(header, (_range_row(setting) for setting in settings))


def _range_row(setting: QuantizerSetting) -> tuple[str, ...]:
    """The cells of one quantizer."""
    granularity = escape(setting.granularity.replace("_", " "))
    shared = "" if setting.channels == 1 else f" ({setting.channels})"
    return (
        code(setting.name),
        f"{setting.bit_width} {'symmetric' if setting.symmetric else 'asymmetric'}",
        f"{granularity}{shared}",
        interval((setting.observed_min, setting.observed_max)),
        interval((setting.range_min, setting.range_max)),
        number(setting.scale),
        number(setting.zero_point),
    )


def to_markdown(report: Report) -> str:
    """The whole report as one page of Markdown.

    Args:
        report: A report at any moment of the walk.

    Returns:
        Markdown without HTML: verdict, why, the walk, findings, coverage, ranges, what to do next.

    Examples:
        >>> print(to_markdown(Report(verdict=Verdict.ACCEPTED)).splitlines()[0])
        # Quantization: accepted
    """
    sections = [
        f"# Quantization: {escape(headline(report))}",
        _bullets(escape(line) for line in reasons(report)),
        _walk(report),
        _findings(report.findings),
        quantizers_section(report),
        _remedies(report),
        settings_section(report),
        _coverage(report.coverage),
        _ranges(report),
        "## What to do next\n\n" + _bullets(escape(line) for line in next_steps(report)),
        _exported(report),
        _written(report),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _bullets(lines: Iterable[str]) -> str:
    """A list; empty without lines."""
    return "\n".join(f"- {line}" for line in lines)


def _walk(report: Report) -> str:
    """The steps as a table, with how weights and activations interact."""
    rows = [
        (
            code(step.step.value),
            number(step.score),
            number(step.loss),
            interval(step.interval),
            escape(step.verdict.value),
            f"{step.seconds or 0.0:.1f}",
        )
        for step in walked(report)
    ]
    parts = ["## The walk"]
    if rows:
        parts.append(table(("step", "score", "loss", "95 % interval of the loss", "verdict", "seconds"), rows))
    parts += [text for text in (interaction(report), _on_empty_intervals(report)) if text]
    for verdict, text in (
        (StepVerdict.SKIPPED, "Skipped, because an earlier step passed"),
        (StepVerdict.NOT_RUN, "Not run by this version"),
    ):
        names = not_walked(report, verdict)
        if names:
            parts.append(f"{text}: {', '.join(code(name) for name in names)}.")
    return "\n\n".join(parts)


def _on_empty_intervals(report: Report) -> str | None:
    """What an interval without width leaves open (rule of three: Hanley and Lippman-Hand, 1983)."""
    samples = report.baseline.samples if report.baseline is not None else None
    if not samples or not any(s.interval is not None and s.interval[0] == s.interval[1] for s in walked(report)):
        return None
    return (
        f"An interval without width: no batch changed its score. In {samples} samples a change of up to "
        f"{number(3 / samples)} of them can stay unseen."
    )


def _findings(findings: Sequence[Finding]) -> str:
    """Cause, place, evidence and advice of each finding."""
    if not findings:
        return ""
    rows = [
        (
            _cause(finding.cause),
            code(finding.quantizer) if finding.quantizer else "-",
            escape(finding.evidence),
            escape(finding.advice),
        )
        for finding in findings[:MAX_FINDINGS]
    ]
    return (
        "## Findings\n\n" + table(("cause", "where", "evidence", "advice"), rows) + _more(len(findings), MAX_FINDINGS)
    )


def _cause(cause: Cause) -> str:
    """A cause in words."""
    return str(cause.value).replace("_", " ")


def _remedies(report: Report) -> str:
    """What was tried, kept or not."""
    if not report.remedies:
        return ""
    rows = [
        (
            code(item.step),
            escape(item.title),
            number(item.before),
            number(item.after),
            interval(item.interval),
            "kept" if item.kept else "undone",
            escape(". ".join(text for text in (item.reason, item.note) if text)),
            f"{item.seconds or 0.0:.1f}",
        )
        for item in report.remedies
    ]
    header = ("step", "remedy", "before", "after", "95 % interval of the gain", "kept", "why", "seconds")
    return "\n\n".join(["## Remedies tried", table(header, rows), *_on_choosing(report)])


def _on_choosing(report: Report) -> list[str]:
    """Which samples judged the model that remedies were chosen for, and how far ranges depend on the calibration."""
    texts = []
    whole = report.step(StepName.QUANTIZE_MODEL)
    held_out = whole.details.get("held_out") if whole is not None else None
    if held_out is not None:
        texts.append(
            f"Half of the batches chose the remedies; on {number(held_out['samples'])} samples that chose nothing the "
            f"loss is {number(held_out['loss'])} {interval(held_out['interval'])}."
        )
    elif any(item.kept for item in report.remedies):
        texts.append(
            "The samples that chose the remedies also judge the model: there are too few batches to part them."
        )
    box = report.step(StepName.FIX_ACTIVATIONS)
    draws = box.details.get("calibration_draws") if box is not None else None
    return texts if draws is None else [*texts, escape(draws["advice"])]


def _coverage(coverage: Coverage) -> str:
    """How many tensors are quantized, and the reasons why others are not."""
    total = len(coverage.quantized)
    lines = [f"{total} quantizer{'' if total == 1 else 's'}."]
    grouped = sorted(names_by_reason(coverage).items(), key=lambda item: -len(item[1]))
    for reason, names in grouped[:MAX_REASONS]:
        lines.append(f"Not quantized, {escape(reason)}: {_names(names)}.")
    if len(grouped) > MAX_REASONS:
        left = sum(len(names) for _, names in grouped[MAX_REASONS:])
        lines.append(f"Not quantized for other reasons: {left}, in report.json.")
    if coverage.unseen:
        lines.append(f"Ran in FP32, because calibration did not see it: {_names(coverage.unseen)}.")
    return "## Coverage\n\n" + _bullets(lines)


def names_by_reason(coverage: Coverage) -> dict[str, list[str]]:
    """Names that share a reason, where reasons that differ only in a name they mention are one."""
    known = {*coverage.quantized, *(item.name for item in coverage.unquantized)}
    grouped: dict[str, list[str]] = {}
    for item in coverage.unquantized:
        reason = " ".join("..." if word in known else word for word in item.reason.split())
        grouped.setdefault(reason, []).append(item.name)
    return grouped


def _names(names: Sequence[str]) -> str:
    """The first names and how many more there are."""
    shown = ", ".join(code(name) for name in names[:MAX_NAMES])
    return shown if len(names) <= MAX_NAMES else f"{shown} and {len(names) - MAX_NAMES} more"


def _ranges(report: Report) -> str:
    """The final ranges, as many as fit on the page."""
    settings = list(report.final.settings.values())
    if not settings:
        return ""
    return "## Ranges\n\n" + ranges_table(settings[:MAX_RANGES]) + _more(len(settings), MAX_RANGES)


def _more(count: int, shown: int) -> str:
    """A line that says what the page left out."""
    return "" if count <= shown else f"\n\n{count - shown} more in report.json."


def _exported(report: Report) -> str:
    """What runs elsewhere, and how far it was proven."""
    exports = report.final.exports
    if not exports:
        return ""
    rows = [[escape(text) for text in row] for row in export_rows(exports)]
    lines = [escape(f"{export.name}, {comparison_line(one)}") for export in exports for one in export.comparisons]
    return "## Exported files\n\n" + table(EXPORT_HEADER, rows) + ("\n\n" + _bullets(lines) if lines else "")


def _written(report: Report) -> str:
    """Where the files are and in which state the model is."""
    lines = [f"{escape(role)}: {code(path)}" for role, path in report.final.files.items()]
    lines.append(f"The model is {escape(report.final.module_state)}.")
    return "## What was written\n\n" + _bullets(lines)

"""What the charts of a review show, as plain rows: the same for TensorBoard's pictures and for the page.

Everything is read from the report, so that a review can be drawn again from ``report.json`` alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from lightning_quantdebug.errors import SettingsError
from lightning_quantdebug.report import Remedy, Report, Sensitivity, Step, StepName, StepVerdict, Verdict
from lightning_quantdebug.settings import Direction, Tolerance
from lightning_quantdebug.target import Kind

# Okabe and Ito, Color Universal Design (2008): eight colours that the colour-blind tell apart. They differ in
# lightness, and no chart tells anything by colour alone.
FP32_COLOR = "#0072B2"
QUANTIZED_COLOR = "#D55E00"
REPAIRED_COLOR = "#009E73"
NEUTRAL_COLOR = "#7F7F7F"
TOLERANCE_COLOR = "#CC79A7"

MOST_ROWS = 12
"""Rows of a ranking that are legible in a picture of TensorBoard's default size."""


@dataclass(frozen=True)
class Box:
    """One box of the flow chart.

    Attributes:
        step: Its name.
        taken: Whether the walk went through it.
        verdict: How it ended; ``None`` where it was not reached.
        score: Its score, where it has one.
        loss: Its loss of score.
    """

    step: StepName
    taken: bool
    verdict: StepVerdict | None = None
    score: float | None = None
    loss: float | None = None


def boxes(report: Report) -> tuple[Box, ...]:
    """Every box of the flow chart in its order, with what the walk learned there."""
    return tuple(_box(name, report.step(name)) for name in StepName)


def _box(name: StepName, step: Step | None) -> Box:
    """One box."""
    if step is None:
        return Box(name, False)
    taken = step.verdict not in (StepVerdict.SKIPPED, StepVerdict.NOT_RUN)
    return Box(name, taken, step.verdict, step.score, step.loss)


@dataclass(frozen=True)
class Stage:
    """One bar of the waterfall.

    Attributes:
        label: What happened here.
        score: The score of the whole model after it.
        change: Change of the score by it, in the metric's units; ``None`` for the first and the last bar, which stand
            on the axis.
        better: Whether the change is an improvement.
    """

    label: str
    score: float
    change: float | None = None
    better: bool = False


def waterfall(report: Report) -> tuple[Stage, ...]:
    """The score of the whole model from FP32 through quantization and each remedy that was kept to the end.

    Returns:
        At least two bars, or none where the whole model was never measured.
    """
    known = [(label, score) for label, score in _whole_scores(report) if score is not None]
    first = report.step(StepName.FP32_CHECK)
    start = first.score if first is not None and first.score is not None else fp32_score(report)
    if report.baseline is None or start is None or not known:
        return ()
    falls = direction_of(report) is Direction.MIN
    stages = [Stage("FP32", start)]
    for label, score in known:
        change = score - stages[-1].score
        stages.append(Stage(label, score, change, (change < 0) == falls and change != 0))
    end = report.final.score
    return (*stages, Stage("final", known[-1][1] if end is None else end))


def _whole_scores(report: Report) -> list[tuple[str, float | None]]:
    """The score of the whole model wherever it was measured and something had changed since."""
    weights, whole, qat = (report.step(name) for name in (StepName.WEIGHTS, StepName.QUANTIZE_MODEL, StepName.QAT))
    both = weights.details.get("both") if weights is not None else None
    first = both["score"] if both is not None else None if whole is None else whole.score
    found: list[tuple[str, float | None]] = [("quantized", first)]
    kept = [item for item in report.remedies if item.kept]
    for (step, _, title), group in groupby(kept, _title_of):
        items = list(group)
        label = title if len(items) == 1 else f"{len(items)} x {title}"
        found.append((f"{label} (single)" if step == _SINGLE else label, whole_score(items[-1])))
    return [*found, *([("QAT", qat.score)] if qat is not None else [])]


_SINGLE = StepName.FIX_QUANTIZERS.value


def _title_of(remedy: Remedy) -> tuple[str, str, str]:
    """What tells bars apart: repairs of single quantizers that follow each other and are alike share one."""
    if remedy.step != _SINGLE:
        return remedy.step, remedy.title, remedy.title
    gives_back = remedy.variant.startswith("give back")
    return remedy.step, remedy.remedy + str(gives_back), "give back" if gives_back else remedy.remedy


def whole_score(remedy: Remedy) -> float | None:
    """The score of the whole model with a remedy that was kept; ``None`` where it was not measured."""
    return remedy.after if remedy.step == _SINGLE else remedy.whole


@dataclass(frozen=True)
class Ranking:
    """The worst quantizers of one kind.

    Attributes:
        kind: Weights or activations.
        rows: Worst first.
        total: How many there are.
        permitted: The tolerance in the metric's units; ``None`` where it is not known.
    """

    kind: Kind
    rows: tuple[Sensitivity, ...]
    total: int
    permitted: float | None


def ranking(report: Report, kind: Kind, most: int = MOST_ROWS) -> Ranking:
    """The worst quantizers of one kind, as the analysis ranks them."""
    rows = [row for row in report.sensitivity if row.kind == kind.value]
    return Ranking(kind, tuple(rows[:most]), len(rows), permitted_loss(report))


def fp32_score(report: Report) -> float | None:
    """The score of the baseline; ``None`` where there is none, or where it was no number when it was written."""
    score: float | None = None if report.baseline is None else report.baseline.score
    return score


def permitted_loss(report: Report) -> float | None:
    """The tolerance in the metric's units, or ``None`` where the report does not say it."""
    reference = fp32_score(report)
    if reference is None:
        return None
    try:
        return Tolerance.parse(report.settings.get("tolerance", "")).permitted_loss(reference)
    except SettingsError:
        return None


def worst_permitted_score(report: Report) -> float | None:
    """The score at the tolerance, or ``None`` where the report does not say it."""
    permitted, reference = permitted_loss(report), fp32_score(report)
    if permitted is None or reference is None:
        return None
    return reference + (permitted if direction_of(report) is Direction.MIN else -permitted)


def direction_of(report: Report) -> Direction:
    """Whether a small or a large score is good."""
    return Direction.MAX if report.settings.get("mode") == Direction.MAX.value else Direction.MIN


@dataclass(frozen=True)
class Depth:
    """One quantizer by its place in the network.

    Attributes:
        depth: Its place in the order of execution, from 0.
        name: Its name.
        kind: Weight or activation.
        bit_width: Its final bits.
        target_bits: The bits that the target gives to its kind; ``None`` where the report does not say it.
    """

    depth: int
    name: str
    kind: Kind
    bit_width: int
    target_bits: int | None


def bits_over_depth(report: Report) -> tuple[Depth, ...]:
    """The final bit-width of every quantizer, in order of execution."""
    return tuple(
        Depth(depth, name, Kind(setting.kind), setting.bit_width, target_bits(report, Kind(setting.kind)))
        for depth, (name, setting) in enumerate(report.final.settings.items())
    )


def target_bits(report: Report, kind: Kind) -> int | None:
    """The bits that the target gives to weights or to activations."""
    target = report.settings.get("target")
    part = target.get("weights" if kind is Kind.WEIGHT else "activations") if isinstance(target, dict) else None
    bits = part.get("bit_width") if isinstance(part, dict) else None
    return bits if isinstance(bits, int) else None


def good(verdict: Verdict | None) -> bool:
    """Whether a walk ended with a model that can be used.

    Examples:
        >>> good(Verdict.REPAIRED), good(Verdict.FAILED), good(None)
        (True, False, False)
    """
    return verdict in (Verdict.ACCEPTED, Verdict.REPAIRED, Verdict.REPAIRED_BY_QAT)


def step_titles(steps: Sequence[str]) -> list[str]:
    """What a tensor is at moments of the walk, in words: the first as quantized, the last as the walk left it.

    Examples:
        >>> step_titles(["fp32_check", "fix_weights", "quantize_model"])
        ['as quantized', 'after fix_weights', 'final']
        >>> step_titles(["fp32_check"])
        ['as quantized']
    """
    known = {StepName.FP32_CHECK.value: "as quantized", StepName.QUANTIZE_MODEL.value: "final"}
    known[StepName.QAT.value] = "after QAT"
    return [known.get(step, f"after {step}") for step in steps]

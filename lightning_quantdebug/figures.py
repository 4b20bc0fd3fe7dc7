"""The pictures that tell the whole walk at a glance: TensorBoard shows them in the order of reading.

Each is drawn from the report alone, with the rows of :mod:`lightning_quantdebug.review_data`, and is left out where the
report has nothing to draw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from lightning_quantdebug import figure_style as style
from lightning_quantdebug.bits_figure import draw_bits
from lightning_quantdebug.figure_values import finite
from lightning_quantdebug.flow_chart_figure import flow_chart
from lightning_quantdebug.prediction_figures import class_shift, flipped_samples
from lightning_quantdebug.report import Report, Sensitivity
from lightning_quantdebug.review_data import (
    FP32_COLOR,
    NEUTRAL_COLOR,
    QUANTIZED_COLOR,
    REPAIRED_COLOR,
    TOLERANCE_COLOR,
    Ranking,
    Stage,
    bits_over_depth,
    direction_of,
    ranking,
    waterfall,
    worst_permitted_score,
)
from lightning_quantdebug.settings import Direction
from lightning_quantdebug.short_names import short_names
from lightning_quantdebug.target import Kind

_WIDE = 30.0
# Scores that differ by this factor go on a logarithmic axis: on a straight one the smaller half is a line.

_NAME_WIDTH = 26
# Characters of a quantizer's name: a third of the picture.


def overview(report: Report) -> dict[str, Figure]:
    """Every picture of a walk that the report has data for.

    Args:
        report: Of a walk, also one that was broken off.

    Returns:
        The pictures by their names, in the order of reading.

    Examples:
        >>> overview(Report())
        {}
    """
    with style.house_style():
        drawn = {
            "flow_chart": flow_chart(report),
            "waterfall": draw_waterfall(report),
            "ranking_weights": draw_ranking(ranking(report, Kind.WEIGHT)),
            "ranking_activations": draw_ranking(ranking(report, Kind.ACTIVATION)),
            "bits_over_depth": draw_bits(bits_over_depth(report)),
            "class_shift": class_shift(report.visuals.predictions),
            "flipped_samples": flipped_samples(report.visuals.predictions),
        }
        return {name: style.settle(figure) for name, figure in drawn.items() if figure is not None}


# The waterfall.


def draw_waterfall(report: Report) -> Figure | None:
    """Draw how the score of the whole model falls with quantization and rises with each remedy that was kept.

    Args:
        report: Read by :func:`lightning_quantdebug.review_data.waterfall`.

    Returns:
        The picture; ``None`` where the whole model was never measured.

    Examples:
        >>> draw_waterfall(Report()) is None
        True
    """
    stages = _in_few_bars(report, waterfall(report))
    scores = finite(stage.score for stage in stages)
    if not scores:
        return None
    limit = worst_permitted_score(report)
    figure = style.new_figure("From FP32 to the final model")
    axes = figure.subplots()
    begin = _score_axis(axes, [*scores, *finite([limit])])
    level = math.nan
    for row, stage in enumerate(stages):
        _draw_stage(axes, row, stage, level, begin, _bar_height(stages))
        level = stage.score
    _name_rows(axes, [style.fitted(stage.label, 118) for stage in stages])
    _tolerance_line(axes, limit, "tolerated", stages)
    label = _score_label(report, begin, axes.get_xscale() == "log")
    figure.supxlabel(style.fitted(label, 340), fontsize=style.SMALL)
    return figure


_MOST_BARS = 13


def _in_few_bars(report: Report, stages: Sequence[Stage]) -> list[Stage]:
    """As many bars as are legible: where there are more, those in the middle become one."""
    if len(stages) <= _MOST_BARS:
        return list(stages)
    ahead, behind = list(stages[: _MOST_BARS // 2]), list(stages[-(_MOST_BARS // 2) :])
    between = stages[len(ahead) : -len(behind)]
    change = between[-1].score - ahead[-1].score
    falls = direction_of(report) is Direction.MIN
    return [
        *ahead,
        Stage(f"{len(between)} more", between[-1].score, change, change != 0 and (change < 0) == falls),
        *behind,
    ]


def _score_axis(axes: Axes, values: Sequence[float]) -> float:
    """Cut the axis around the scores, with room for text at the right, and tell where it begins."""
    low, high = min(values), max(values)
    if low > 0 and high / low > _WIDE:
        axes.set_xscale("log")
        begin, end = low / 2, high * (high / low) ** 0.6
        axes.xaxis.set_major_locator(LogLocator(numticks=5))
    else:
        span = high - low or abs(high) / 10 or 1.0
        begin, end = low - span / 4, high + span * 0.5
        if low >= 0 and (begin < 0 or low < high / 2):
            begin = 0.0
        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlim(begin, end)
    style.plain_numbers(axes.xaxis)
    return begin


def _score_label(report: Report, begin: float, logarithmic: bool) -> str:
    """The metric, which direction is good, and what is special about the axis."""
    better = "lower" if direction_of(report) is Direction.MIN else "higher"
    axis = ", log scale" if logarithmic else f", axis begins at {style.brief(begin)}" if begin else ""
    return f"{report.settings.get('monitor', 'score')} ({better} is better{axis})"


def _draw_stage(axes: Axes, row: int, stage: Stage, level: float, begin: float, height: float) -> None:
    """A bar from the level before to the score, or from the axis, with what it says and a line from the bar above."""
    if math.isfinite(level) and math.isfinite(stage.score):
        axes.plot([level, level], [row - 1, row], color=style.GREY, linewidth=0.8, zorder=1)
    if not math.isfinite(stage.score):
        _write(axes, begin, row, "not a number", QUANTIZED_COLOR)
        return
    floats = stage.change is not None and math.isfinite(level)
    start = level if floats else begin
    color, word = _stage_look(stage, row, floats)
    axes.barh(row, stage.score - start, left=start, height=height, color=color, zorder=2)
    _write(axes, max(start, stage.score), row, word, style.INK)


def _stage_look(stage: Stage, row: int, floats: bool) -> tuple[str, str]:
    """Colour and text of a bar; the sign says what the colour says."""
    if not floats or stage.change is None:
        return FP32_COLOR if row == 0 else NEUTRAL_COLOR, style.brief(stage.score, 4)
    if stage.change == 0:
        return NEUTRAL_COLOR, "= 0"
    color, sign = (REPAIRED_COLOR, "✓") if stage.better else (QUANTIZED_COLOR, "✗")
    return color, f"{sign} {'+' if stage.change > 0 else ''}{style.brief(stage.change)}"


def _bar_height(rows: Sequence[object]) -> float:
    """Height of a bar, in rows: few bars are not thicker than many."""
    return min(0.66, 0.1 * len(rows))


def _write(axes: Axes, x: float, row: int, text: str, color: str) -> None:
    """Text right of a place, legible also on a line."""
    box = {"facecolor": style.PAPER, "edgecolor": "none", "pad": 0.6}
    axes.annotate(
        text, (x, row), (3.5, 0), textcoords="offset points", va="center", color=color, bbox=box, zorder=4
    ).set_in_layout(False)


def _strip_of(rows: Sequence[object]) -> float:
    """The height above the rows, in rows, where text about the panel stands."""
    return -0.55 - 0.05 * len(rows)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Rows from the top with their names, and a strip above them."""
    axes.set_ylim(len(names) - 0.4, 2 * _strip_of(names) + 0.55)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    style.only_ticks(axes.yaxis, [float(row) for row in range(len(names))], list(names))


def _tolerance_line(axes: Axes, place: float | None, word: str, rows: Sequence[object]) -> None:
    """A dashed line with its value, in the strip above the rows."""
    if place is None or not math.isfinite(place):
        return
    axes.plot(
        [place, place], [-0.5, len(rows) - 0.4], color=TOLERANCE_COLOR, linewidth=1.6, linestyle=(0, (4, 2)), zorder=3
    )
    share = axes.transAxes.inverted().transform(axes.transData.transform((place, 0)))[0]
    side = "left" if share < 0.3 else "right" if share > 0.7 else "center"
    # The text of a line near the border begins or ends at the line.
    axes.text(place, _strip_of(rows), f"{word} {style.brief(place)}", ha=side, va="center", color=style.INK)


# The rankings.


def draw_ranking(worst: Ranking) -> Figure | None:
    """Draw the worst quantizers of one kind: loss of score with its interval, or the SQNR where no loss was measured.

    Args:
        worst: Rows, worst first.

    Returns:
        The picture; ``None`` without rows.

    Examples:
        >>> draw_ranking(Ranking(Kind.WEIGHT, (), 0, None)) is None
        True
    """
    if not worst.rows:
        return None
    kind = "Weights" if worst.kind is Kind.WEIGHT else "Activations"
    figure = style.new_figure(f"{kind}: the worst {len(worst.rows)} of {worst.total}")
    axes = figure.subplots()
    names = short_names([row.quantizer for row in worst.rows], _NAME_WIDTH)
    _name_rows(axes, [style.legible(names[row.quantizer]) for row in worst.rows])
    if finite(row.loss for row in worst.rows):
        _draw_losses(figure, axes, worst)
    else:
        _draw_ratios(figure, axes, worst.rows)
    return figure


def _draw_losses(figure: Figure, axes: Axes, worst: Ranking) -> None:
    """Loss of score with its interval, the tolerance, and the SQNR at the right."""
    ends = [end for row in worst.rows for end in (row.loss, *(row.interval or ()))]
    values = [0.0, *finite([*ends, worst.permitted])]
    span = max(values) - min(values) or 1.0
    axes.set_xlim(min(values) - 0.06 * span, max(values) + 0.06 * span)
    axes.axvline(0, color=style.GREY, linewidth=0.7, zorder=1)
    for place, row in enumerate(worst.rows):
        _draw_loss(axes, place, row)
    _tolerance_line(axes, worst.permitted, "tolerance", worst.rows)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    style.plain_numbers(axes.xaxis)
    guilty = any(row.guilty for row in worst.rows)
    label = "loss of score alone, 95 % interval" + (" (● guilty, ○ not)" if guilty else "")
    figure.supxlabel(label, fontsize=style.SMALL)
    _ratios_beside(axes, worst.rows)


def _draw_loss(axes: Axes, place: int, row: Sensitivity) -> None:
    """One loss: filled if the quantizer is guilty."""
    if row.loss is None or not math.isfinite(row.loss):
        return
    color = QUANTIZED_COLOR if row.guilty else FP32_COLOR
    if row.interval is not None and len(finite(row.interval)) == 2:
        axes.plot(row.interval, [place, place], color=color, linewidth=1.4, zorder=2)
    face = color if row.guilty else style.PAPER
    axes.plot([row.loss], [place], "o", color=color, markerfacecolor=face, markersize=5, markeredgewidth=1.3, zorder=4)


def _ratios_beside(axes: Axes, rows: Sequence[Sensitivity]) -> None:
    """The SQNR of each row at the right edge."""
    beside = axes.twinx()
    beside.set_ylim(axes.get_ylim())
    beside.spines[:].set_visible(False)
    beside.tick_params(axis="y", length=0)
    words = [f"{row.sqnr_db:.1f}" if finite([row.sqnr_db]) else "-" for row in rows]
    style.only_ticks(
        beside.yaxis, [_strip_of(rows), *(float(place) for place in range(len(rows)))], ["SQNR dB", *words]
    )


def _draw_ratios(figure: Figure, axes: Axes, rows: Sequence[Sensitivity]) -> None:
    """The SQNR of each row as a bar: the shorter, the worse."""
    known = finite([0.0, *(row.sqnr_db for row in rows)])
    span = max(known) - min(known) or 1.0
    axes.set_xlim(min(known), max(known) + 0.2 * span)
    for place, row in enumerate(rows):
        if row.sqnr_db is None or not math.isfinite(row.sqnr_db):
            _write(axes, 0, place, "-", style.INK)
            continue
        color = QUANTIZED_COLOR if row.guilty else FP32_COLOR
        axes.barh(place, row.sqnr_db, height=_bar_height(rows), color=color)
        word = f"{row.sqnr_db:.1f}" + (" guilty" if row.guilty else "")
        _write(axes, max(0.0, row.sqnr_db), place, word, style.INK)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    style.plain_numbers(axes.xaxis)
    figure.supxlabel("SQNR of the output in dB, each alone (lower is worse)", fontsize=style.SMALL)

"""The flow chart as a picture: every box, and the way that the walk took through them.

The chart of AIMET's guidebook and of Nagel et al., "A White Paper on Neural Network Quantization" (2021), figure 3.5,
with the boxes and arrows of the README. The way leads through boxes that had nothing to do, as the walk does: they stay
pale and say ``skipped``.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Polygon

from lightning_quantdebug import figure_style as style
from lightning_quantdebug.report import Report, StepVerdict, Verdict
from lightning_quantdebug.review_data import (
    FP32_COLOR,
    NEUTRAL_COLOR,
    QUANTIZED_COLOR,
    REPAIRED_COLOR,
    Box,
    boxes,
    good,
)

_BROKEN, _ACCEPTED, _TRAINED, _REFUSED, _BROKE_OFF = (
    "broken_pipeline",
    "accepted",
    "repaired_by_qat",
    "not_accepted",
    "",
)
# The ends of the chart; that of a walk which failed itself is no part of it and is drawn only then.

PLACES: dict[str, tuple[int, int]] = {
    "fp32_check": (0, 0),
    "activations": (1, 0),
    "weights": (2, 0),
    _BROKEN: (0, 1),
    "fix_activations": (1, 1),
    "fix_weights": (2, 1),
    "visualize": (0, 2),
    "per_quantizer": (1, 2),
    _BROKE_OFF: (2, 2),
    _TRAINED: (0, 3),
    "fix_quantizers": (1, 3),
    "quantize_model": (2, 3),
    _REFUSED: (0, 4),
    "qat": (1, 4),
    _ACCEPTED: (2, 4),
}
"""Column and row of each box."""

Way = tuple[tuple[float, float], ...]
"""Corners of an arrow in columns and rows, from inside a box to inside another one."""

_BESIDE = 2.52  # The lane at the right of the last column.

ARROWS: dict[tuple[str, str], Way] = {
    ("fp32_check", "activations"): ((0, 0), (1, 0)),
    ("fp32_check", _BROKEN): ((0, 0), (0, 1)),
    ("activations", "weights"): ((1, 0), (2, 0)),
    ("weights", "quantize_model"): ((2, 0), (_BESIDE, 0), (_BESIDE, 3), (2, 3)),
    ("weights", "fix_weights"): ((2, 0), (2, 1)),
    ("weights", "fix_activations"): ((1.7, 0), (1.7, 0.5), (1, 0.5), (1, 1)),
    ("fix_weights", "fix_activations"): ((2, 1), (1, 1)),
    ("fix_activations", "quantize_model"): ((1.3, 1), (1.3, 1.5), (1.5, 1.5), (1.5, 2.5), (2, 2.5), (2, 3)),
    ("fix_activations", "per_quantizer"): ((1, 1), (1, 2)),
    ("per_quantizer", "visualize"): ((1, 2), (0, 2)),
    ("visualize", "fix_quantizers"): ((0, 2), (0, 2.5), (0.7, 2.5), (0.7, 3)),
    ("fix_quantizers", "quantize_model"): ((1, 3), (2, 3)),
    ("quantize_model", _ACCEPTED): ((2, 3), (2, 4)),
    ("quantize_model", "qat"): ((1.7, 3), (1.7, 3.5), (1, 3.5), (1, 4)),
    ("qat", _TRAINED): ((1, 3.8), (0.5, 3.8), (0.5, 3), (0, 3)),
    ("qat", _REFUSED): ((1, 4), (0, 4)),
}
"""The arrows of the README's chart."""

_BREAKS: dict[str, Way] = {
    "fp32_check": ((0.3, 0), (0.3, 0.5), (1.5, 0.5), (1.5, 2), (2, 2)),
    "activations": ((1.3, 0), (1.3, 0.5), (1.5, 0.5), (1.5, 2), (2, 2)),
    "weights": ((1.7, 0), (1.7, 0.5), (1.5, 0.5), (1.5, 2), (2, 2)),
    "fix_weights": ((2, 1), (2, 2)),
    "fix_activations": ((1.3, 1), (1.3, 1.5), (2, 1.5), (2, 2)),
    "per_quantizer": ((1, 2), (2, 2)),
    "visualize": ((0.3, 2), (0.3, 2.5), (2, 2.5), (2, 2)),
    "fix_quantizers": ((1.3, 3), (1.3, 2.5), (2, 2.5), (2, 2)),
    "quantize_model": ((2.3, 3), (2.3, 2)),
    "qat": ((1, 4), (1.5, 4), (1.5, 2), (2, 2)),
}
# From the box where a walk broke off to its end.

_END_OF = {
    Verdict.ACCEPTED: _ACCEPTED,
    Verdict.REPAIRED: _ACCEPTED,
    Verdict.REPAIRED_BY_QAT: _TRAINED,
    Verdict.NOT_ACCEPTED: _REFUSED,
    Verdict.BROKEN_PIPELINE: _BROKEN,
    Verdict.FAILED: _BROKE_OFF,
}
_WORDS = {
    StepVerdict.PASSED: ("✓ passed", REPAIRED_COLOR),
    StepVerdict.FAILED: ("✗ failed", QUANTIZED_COLOR),
    StepVerdict.NOISE: ("≈ noise", NEUTRAL_COLOR),
    StepVerdict.BROKEN: ("✗ broken", QUANTIZED_COLOR),
    StepVerdict.SKIPPED: ("skipped", style.PALE),
    StepVerdict.NOT_RUN: ("not run", style.PALE),
}

# In points: the sides of a box, the distance from one to the next, and the centre of the first.
_BOX_WIDTH, _BOX_HEIGHT = 104.0, 35.0
_ACROSS, _DOWN = 118.5, 48.5
_LEFT, _TOP = 57.0, 214.0
_INSIDE = _BOX_WIDTH - 6


def way_through(report: Report) -> list[tuple[str, str]]:
    """The arrows that the walk went along, in its order; the last one leads to its end.

    Between two boxes that were walked through it is the shortest way through boxes that were not.

    Examples:
        >>> from lightning_quantdebug.report import Step, StepName
        >>> names = (StepName.FP32_CHECK, StepName.ACTIVATIONS)
        >>> way_through(Report(steps=tuple(Step(name, StepVerdict.PASSED) for name in names)))
        [('fp32_check', 'activations')]
    """
    taken = [box.step.value for box in boxes(report) if box.taken]
    end = _end(report)
    stops = [*taken, *([end] if taken and end is not None else [])]
    ways = [_shortest(here, there) for here, there in pairwise(stops)]
    return [arrow for way in ways for arrow in way]


def _end(report: Report) -> str | None:
    """The end that the walk came to; ``None`` while it is on its way."""
    return None if report.verdict is None else _END_OF[report.verdict]


def _shortest(here: str, there: str) -> list[tuple[str, str]]:
    """The way with the fewest arrows; empty if there is none."""
    if there == _BROKE_OFF:
        return [(here, there)]
    queue: deque[list[str]] = deque([[here]])
    while queue:
        way = queue.popleft()
        if way[-1] == there:
            return list(pairwise(way))
        reach = [to for begin, to in ARROWS if begin == way[-1]]
        queue.extend([*way, to] for to in reach)
    return []


def flow_chart(report: Report) -> Figure | None:
    """Draw the flow chart with the way of the walk.

    Args:
        report: Of a walk, also one that is not at its end.

    Returns:
        The picture; ``None`` where no box was walked through.

    Examples:
        >>> flow_chart(Report()) is None
        True
    """
    if not any(box.taken for box in boxes(report)):
        return None
    figure = style.new_figure(_title(report))
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 72 * style.WIDTH), ylim=(0, 72 * style.HEIGHT))
    axes.set_axis_off()
    way = way_through(report)
    for arrow in [*(each for each in ARROWS if each not in way), *way]:
        _draw_arrow(axes, arrow, arrow in way)
    for box in boxes(report):
        _draw_step(axes, box)
    for end in _ends(report):
        _draw_end(axes, end, report)
    return figure


def _title(report: Report) -> str:
    """The score that the chart is about."""
    monitor = report.settings.get("monitor")
    return f"Flow chart: {monitor} in each box" if monitor else "Flow chart"


def _ends(report: Report) -> Iterable[str]:
    """The ends that are drawn."""
    chart = (_BROKEN, _ACCEPTED, _TRAINED, _REFUSED)
    return (*chart, _BROKE_OFF) if _end(report) == _BROKE_OFF else chart


# Drawing, in points from the lower left corner.


def _at(column: float, row: float) -> tuple[float, float]:
    """A place of the chart."""
    return _LEFT + _ACROSS * column, _TOP - _DOWN * row


def _draw_arrow(axes: Axes, arrow: tuple[str, str], taken: bool) -> None:
    """An arrow whose tip touches its box: thick and coloured if the walk went along it."""
    way = _BREAKS[arrow[0]] if arrow[1] == _BROKE_OFF else ARROWS[arrow]
    corners = [_at(*corner) for corner in way]
    tip, side = _tip(corners[-2], corners[-1], _at(*PLACES[arrow[1]]))
    color, width, size = (FP32_COLOR, 2.4, 6.0) if taken else (style.PALE, 1.0, 4.0)
    foot = (tip[0] - side[0] * size, tip[1] - side[1] * size)
    order = 3 if taken else 1
    x, y = zip(*corners[:-1], foot, strict=True)
    axes.plot(x, y, color=color, linewidth=width, zorder=order, solid_capstyle="butt", gid=f"{arrow[0]}>{arrow[1]}")
    wing = (side[1] * size * 0.6, side[0] * size * 0.6)
    ends = [(foot[0] + wing[0], foot[1] + wing[1]), tip, (foot[0] - wing[0], foot[1] - wing[1])]
    axes.add_patch(Polygon(ends, closed=True, color=color, linewidth=0, zorder=order))


def _tip(
    before: tuple[float, float], inside: tuple[float, float], centre: tuple[float, float]
) -> tuple[tuple[float, float], tuple[int, int]]:
    """Where an arrow's last leg meets the box, and the direction of that leg."""
    if before[0] == inside[0]:
        down = 1 if inside[1] > before[1] else -1
        return (inside[0], centre[1] - down * _BOX_HEIGHT / 2), (0, down)
    right = 1 if inside[0] > before[0] else -1
    return (centre[0] - right * _BOX_WIDTH / 2, inside[1]), (right, 0)


@dataclass(frozen=True)
class _Look:
    """How a box is drawn."""

    edge: str
    face: str
    text: str
    width: float


_FAINT = _Look(style.PALE, "#F4F4F4", style.GREY, 0.9)


def _draw_step(axes: Axes, box: Box) -> None:
    """A box with its name, its verdict and its score."""
    word, color = _WORDS[box.verdict] if box.verdict is not None else ("", style.PALE)
    look = _Look(color, "#FFFFFF", style.INK, 2.0) if box.taken else _FAINT
    score = _score_line(box.score, box.loss) if box.taken else ""
    _draw_box(axes, box.step.value, [box.step.value, score, word], look, rounding=2.0)


def _draw_end(axes: Axes, end: str, report: Report) -> None:
    """An end of the chart, round; the one that was reached says the verdict."""
    reached = end == _end(report) and any(box.taken for box in boxes(report))
    if not reached or report.verdict is None:
        return _draw_box(axes, end, [end], _FAINT, rounding=_BOX_HEIGHT / 2)
    color, face = (REPAIRED_COLOR, "#CFEFE4") if good(report.verdict) else (QUANTIZED_COLOR, "#FBDCC6")
    score = _score_line(report.final.score, report.final.loss)
    sign = "✓" if good(report.verdict) else "✗"
    name = "walk failed" if end == _BROKE_OFF else report.verdict.value
    return _draw_box(axes, end, [f"{sign} {name}", score], _Look(color, face, style.INK, 2.6), _BOX_HEIGHT / 2)


def _score_line(score: float | None, loss: float | None) -> str:
    """The score with its loss, as far as they are known and fit."""
    known = [] if score is None or not math.isfinite(score) else [style.brief(score)]
    lost = [] if loss is None or not math.isfinite(loss) else [f"loss {style.brief(loss, 2)}"]
    both = ", ".join(known + lost)
    return both if style.text_width(both) <= _INSIDE else "".join(lost or known)


def _draw_box(axes: Axes, name: str, lines: Sequence[str], look: _Look, rounding: float) -> None:
    """A box at its place with lines of text in its middle, the first of them bold."""
    x, y = _at(*PLACES[name])
    corner = (x - _BOX_WIDTH / 2, y - _BOX_HEIGHT / 2)
    shape = f"round,pad=0,rounding_size={rounding}"
    patch = FancyBboxPatch(
        corner,
        _BOX_WIDTH,
        _BOX_HEIGHT,
        boxstyle=shape,
        edgecolor=look.edge,
        facecolor=look.face,
        linewidth=look.width,
        zorder=4,
        gid=f"box {name}",
    )
    axes.add_patch(patch)
    shown = [line for line in lines if line]
    for index, line in enumerate(shown):
        bold = index == 0
        down = (index - (len(shown) - 1) / 2) * 10.3
        text = style.fitted(line, _INSIDE, bold=bold)
        words: dict[str, Any] = {"ha": "center", "va": "center", "zorder": 5, "gid": f"text {name}"}
        axes.text(x, y - down, text, color=look.text, fontweight="bold" if bold else "normal", **words)

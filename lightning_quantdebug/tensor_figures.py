"""Pictures of one guilty tensor: its channels and its noise.

The first look at it and the last one stand below each other, so that the effect of the remedies shows. The histogram
and what is drawn by token have files of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from lightning_quantdebug import figure_style as style
from lightning_quantdebug.figure_values import aligned, finite, noise_of
from lightning_quantdebug.heat_map_figure import heat_map
from lightning_quantdebug.histogram_figure import histogram
from lightning_quantdebug.review_data import FP32_COLOR, NEUTRAL_COLOR, QUANTIZED_COLOR, REPAIRED_COLOR, step_titles
from lightning_quantdebug.short_names import short_names
from lightning_quantdebug.visuals import TensorState, TensorView

_UNEVEN = 8.0
# Ranges whose greatest end is this many times the median width go on a symlog axis: on a straight one the median
# channel would be a tenth of a panel, a dozen pixels in TensorBoard's card.

_MOST_STATES = 6
_NAME_WIDTH = 30
_CLIPPING: dict[str, Any] = {
    "facecolor": QUANTIZED_COLOR,
    "hatch": "////",
    "edgecolor": style.PAPER,
    "linewidth": 0,
}


def of_tensor(view: TensorView) -> dict[str, Figure]:
    """Every picture of a tensor that there is data for.

    Args:
        view: The tensor at moments of the walk.

    Returns:
        The pictures by their names, in the order of reading; none where the tensor was never looked at.

    Examples:
        >>> of_tensor(TensorView("conv.weight", "weight", "guilty", "output channel", (), 0, ()))
        {}
    """
    with style.house_style():
        drawn = {
            "channel_ranges": channel_ranges(view),
            "histogram": histogram(_name(view), _ends(view)),
            "noise": noise(view),
            "heat_map": None if view.heat_map is None else heat_map(_name(view), view.heat_map),
        }
        return {name: style.settle(figure) for name, figure in drawn.items() if figure is not None}


def _name(view: TensorView) -> str:
    """The tensor's name, cut so that there is room behind it."""
    return short_names([view.quantizer], _NAME_WIDTH)[view.quantizer]


def _ends(view: TensorView) -> list[tuple[str, TensorState]]:
    """The first and the last look with their titles, or the only one."""
    titled = list(zip(step_titles([state.step for state in view.states]), view.states, strict=True))
    return [*titled[:1], *titled[1:][-1:]]


def _name_channels(axes: Axes, view: TensorView) -> None:
    """Indices of channels below the panel, as many as fit, and what a channel is."""
    size = len(view.channels)
    widest = max(style.text_width(str(index)) for index in view.channels) + 6
    step = max(1, math.ceil(size * widest / 280))
    places = range(0, size, step)
    style.only_ticks(axes.xaxis, [float(place) for place in places], [str(view.channels[place]) for place in places])
    axes.set_xlim(-0.7, size - 0.3)
    part = "" if size == view.total_channels else f" ({size} of {view.total_channels} shown)"
    axes.set_xlabel(style.fitted(view.channel_axis, 150) + part)


# Ranges.


def channel_ranges(view: TensorView) -> Figure | None:
    """Draw the values of each channel from the least to the greatest, and the clipping range over them.

    Args:
        view: The first and the last look are drawn.

    Returns:
        The picture; ``None`` where no channel was seen.

    Examples:
        >>> channel_ranges(TensorView("conv.weight", "weight", "guilty", "output channel", (), 0, ())) is None
        True
    """
    looks = _ends(view)
    if not any(finite(state.low) and finite(state.high) for _, state in looks):
        return None
    figure = style.new_figure(f"{_name(view)}: {view.why.replace('_', ' ')}")
    panels = figure.subplots(len(looks), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (title, state) in zip(panels, looks, strict=True):
        _draw_ranges(axes, state, len(view.channels))
        axes.set_title(_setting(title, state), loc="left")
    _name_channels(panels[-1], view)
    _value_axis(panels, [state for _, state in looks], len(view.channels))
    shown = [
        Patch(color=FP32_COLOR, label="values in FP32"),
        Line2D([], [], color=QUANTIZED_COLOR, label="clipping range"),
    ]
    figure.legend(handles=shown, loc="outside lower center", ncols=2)
    return figure


def _setting(title: str, state: TensorState) -> str:
    """When it was looked at, and how it was quantized then."""
    return style.fitted(f"{title}: {state.bit_width} bits, {state.granularity.replace('_', ' ')}", 290)


def _draw_ranges(axes: Axes, state: TensorState, size: int) -> None:
    """A bar for each channel, and both ends of the clipping range as steps over them."""
    low, high = aligned(state.low, size), aligned(state.high, size)
    axes.bar(np.arange(size), high - low, bottom=low, width=0.74, color=FP32_COLOR, edgecolor=FP32_COLOR, linewidth=0.4)
    axes.axhline(0, color=style.GREY, linewidth=0.5)
    edges = np.arange(size + 1) - 0.5
    for end in (state.clip_low, state.clip_high):
        axes.stairs(aligned(end, size), edges, baseline=None, color=QUANTIZED_COLOR, linewidth=1.5)


def _value_axis(panels: Sequence[Axes], states: Sequence[TensorState], size: int) -> None:
    """One axis for all panels: straight, or symlog where a straight one would hide the narrow channels."""
    widths = np.concatenate([aligned(each.high, size) - aligned(each.low, size) for each in states])
    ends = [each for state in states for each in (state.low, state.high, state.clip_low, state.clip_high)]
    values = np.concatenate([aligned(end, size) for end in ends])
    least, greatest = min(0.0, _least(values)), max(0.0, -_least(-values))
    median = float(np.median(widths[widths > 0])) if (widths > 0).any() else 0.0
    reach = max(-least, greatest)
    label = "value"
    if median and reach > _UNEVEN * median:
        panels[0].set_yscale("symlog", linthresh=median / 2)
        label = "value (symlog)"
    span = greatest - least or 1.0
    panels[0].set_ylim(
        *((1.3 * least, 1.3 * greatest) if "symlog" in label else (least - 0.06 * span, greatest + 0.06 * span))
    )
    for axes in panels:
        axes.set_ylabel(label)
        style.plain_numbers(axes.yaxis)
    if "symlog" in label:
        places = _decades(panels[0], median / 2, reach, 165 / len(panels))
        style.only_ticks(panels[0].yaxis, places, [style.brief(place) for place in places])
    else:
        panels[0].yaxis.set_major_locator(MaxNLocator(4))


def _least(values: NDArray[np.float64]) -> float:
    """The least finite value, 0 if there is none."""
    return float(np.nanmin(values)) if np.isfinite(values).any() else 0.0


def _decades(axes: Axes, inner: float, reach: float, height: float) -> list[float]:
    """Zero and powers of ten to both sides, from the outermost inwards, those that have room for their label."""
    exponents = range(math.floor(math.log10(reach)), math.ceil(math.log10(inner)) - 1, -1)
    to_share = axes.transScale + axes.transLimits
    kept: dict[float, float] = {}
    for value in (0.0, *(sign * 10.0**exponent for exponent in exponents for sign in (1, -1))):
        place = float(to_share.transform((0, value))[1]) * height
        if 0 <= place <= height and all(abs(place - other) > 1.3 * style.SMALL for other in kept.values()):
            kept[value] = place
    return sorted(kept)


# Noise.


def noise(view: TensorView) -> Figure | None:
    """Draw clipping against rounding noise at each look, and the SQNR of each channel at the first and the last.

    Args:
        view: The tensor at moments of the walk.

    Returns:
        The picture; ``None`` where the tensor was never looked at.

    Examples:
        >>> noise(TensorView("conv.weight", "weight", "guilty", "output channel", (), 0, ())) is None
        True
    """
    if not any(finite([state.rounding, state.clipping, state.sqnr_db]) for state in view.states):
        return None
    titled = list(zip(step_titles([state.step for state in view.states]), view.states, strict=True))
    shown = titled if len(titled) <= _MOST_STATES else [titled[0], *titled[1 - _MOST_STATES :]]
    figure = style.new_figure(f"{_name(view)}: noise")
    looks = _ends(view)
    by_channel = len(view.channels) > 1 and any(finite(state.channel_sqnr_db) for _, state in looks)
    heights = [len(shown) + 2.5, 8.5] if by_channel else [1]
    # Each part has margins of its own: the names of the looks shall not narrow the channels.
    parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    _draw_noise(parts[0].subplots(), shown)
    if by_channel:
        _draw_channels(parts[1].subplots(), view, looks)
    return figure


def _draw_noise(axes: Axes, looks: Sequence[tuple[str, TensorState]]) -> None:
    """A stacked bar for each look, with its SQNR."""
    parts = [noise_of(state) for _, state in looks]
    most = max(sum(each) for each in parts) or 1.0
    for row, ((_, state), (rounding, clipping)) in enumerate(zip(looks, parts, strict=True)):
        axes.barh(row, rounding, height=0.64, color=FP32_COLOR)
        axes.barh(row, clipping, left=rounding, height=0.64, **_CLIPPING)
        ratio = f"SQNR {state.sqnr_db:.1f} dB at " if finite([state.sqnr_db]) else ""
        axes.annotate(
            f"{ratio}{state.bit_width} bits",
            (rounding + clipping, row),
            (3, 0),
            textcoords="offset points",
            va="center",
        )
    axes.set(xlim=(0, 1.9 * most), ylim=(len(looks) - 0.4, -0.6))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    style.plain_numbers(axes.xaxis)
    axes.tick_params(axis="y", length=0)
    names = [style.fitted(title, 110) for title, _ in looks]
    style.only_ticks(axes.yaxis, [float(row) for row in range(len(looks))], names)
    kinds = [Patch(color=FP32_COLOR, label="rounding"), Patch(**_CLIPPING, label="clipping")]
    axes.legend(handles=kinds, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    axes.set_title("mean squared error", loc="left")


def _draw_channels(axes: Axes, view: TensorView, looks: Sequence[tuple[str, TensorState]]) -> None:
    """The SQNR of each channel: hollow at the first look, filled at the last, with a line from one to the other."""
    size = len(view.channels)
    ratios = [aligned(state.channel_sqnr_db, size) for _, state in looks]
    places = np.arange(size)
    if len(looks) == 2:
        axes.vlines(places, ratios[0], ratios[1], color=NEUTRAL_COLOR, linewidth=0.8)
    marks = [("o", style.PAPER, QUANTIZED_COLOR, "○"), ("o", REPAIRED_COLOR, REPAIRED_COLOR, "●")]
    for ratio, (mark, face, edge, _) in zip(ratios, marks, strict=False):
        axes.plot(places, ratio, mark, markersize=3.6, markerfacecolor=face, markeredgecolor=edge, markeredgewidth=1.1)
    words = ", ".join(f"{sign} {title}" for (title, _), (_, _, _, sign) in zip(looks, marks, strict=False))
    axes.set_title(style.fitted(f"SQNR of each channel: {words}", 300), loc="left")
    axes.set_ylabel("dB")
    axes.yaxis.set_major_locator(MaxNLocator(4))
    style.plain_numbers(axes.yaxis)
    axes.grid(axis="y")
    _name_channels(axes, view)

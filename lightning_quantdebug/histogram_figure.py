"""The histogram of a guilty tensor, in FP32 and on the grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator
from numpy.typing import NDArray

from lightning_quantdebug import figure_style as style
from lightning_quantdebug.figure_values import aligned, finite, noise_of
from lightning_quantdebug.review_data import QUANTIZED_COLOR
from lightning_quantdebug.visuals import TensorState

_VALUES = "#9CC4E4"
# FP32_COLOR made light: what lies on it must show.


def histogram(name: str, looks: Sequence[tuple[str, TensorState]]) -> Figure | None:
    """Draw the counts of the values in FP32 and on the grid, with the clipping range and the grid's levels.

    Args:
        name: Name of the tensor.
        looks: One or two looks with their titles; those that saw no value are left out.

    Returns:
        The picture; ``None`` where no value was seen.

    Examples:
        >>> histogram("conv.weight", []) is None
        True
    """
    seen = [look for look in looks if len(finite(look[1].edges)) == len(look[1].edges) > 1 and any(look[1].fp32)]
    if not seen:
        return None
    figure = style.new_figure(f"{name}: histogram")
    panels = figure.subplots(len(seen), 1, squeeze=False)[:, 0]
    for axes, (title, state) in zip(panels, seen, strict=True):
        _draw_histogram(axes, state)
        axes.set_title(style.fitted(f"{title}, {state.bit_width} bits: {_noise_words(state)}", 310), loc="left")
        axes.set_ylabel("values")
    shown = [
        Patch(color=_VALUES, label="FP32"),
        Line2D([], [], color=QUANTIZED_COLOR, label="quantized"),
        Line2D([], [], color=style.INK, linestyle=(0, (4, 2)), label="clipping range"),
    ]
    if any(state.grid for _, state in seen):
        shown.append(Line2D([], [], color=style.INK, marker="|", linestyle="none", markersize=5, label="grid"))
    figure.legend(handles=shown, loc="outside lower center", ncols=len(shown))
    return figure


def _noise_words(state: TensorState) -> str:
    """Which share of the noise is rounding, and which clipping."""
    rounding, clipping = noise_of(state)
    total = rounding + clipping
    if total <= 0:
        return "no noise"
    share = 100 * clipping / total
    return f"noise {100 - share:.0f} % rounding, {share:.0f} % clipping"


def _draw_histogram(axes: Axes, state: TensorState) -> None:
    """One look: counts on a logarithmic axis, the clipping range over them."""
    edges = np.asarray(state.edges, dtype=np.float64)
    size = len(edges) - 1
    fp32, quantized = (np.maximum(aligned(counts, size), 0.5) for counts in (state.fp32, state.quantized))
    axes.stairs(fp32, edges, baseline=0.5, fill=True, color=_VALUES)
    axes.stairs(quantized, edges, baseline=0.5, color=QUANTIZED_COLOR, linewidth=1.2)
    most = float(np.nanmax([*fp32, *quantized]))
    # The labels of the clipping range stand above the highest count.
    axes.set(yscale="log", ylim=(0.5, most * (most / 0.5) ** 0.35))
    axes.yaxis.set_major_locator(LogLocator(numticks=4))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _count(value)))
    axes.yaxis.set_minor_locator(LogLocator(subs=(), numticks=4))
    _show_around(axes, edges, state)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    style.plain_numbers(axes.xaxis)
    inside = [level for level in finite(state.grid) if axes.get_xlim()[0] <= level <= axes.get_xlim()[1]]
    rug = axes.get_xaxis_transform()
    axes.plot(inside, [0.04] * len(inside), "|", color=style.INK, markersize=5, markeredgewidth=0.8, transform=rug)


def _count(value: float) -> str:
    """A count in few letters."""
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"


def _show_around(axes: Axes, edges: NDArray[np.float64], state: TensorState) -> None:
    """Limit the axis to the values and the clipping range around them, and mark that range.

    A range much wider than the values would squeeze them to a line: then only its end's value is written at the border.
    """
    low = min(finite(state.clip_low), default=None)
    high = max(finite(state.clip_high), default=None)
    span = float(edges[-1] - edges[0])
    near = [end for end in (low, high) if end is not None and edges[0] - span / 2 <= end <= edges[-1] + span / 2]
    begin, stop = min([float(edges[0]), *near]) - 0.03 * span, max([float(edges[-1]), *near]) + 0.03 * span
    axes.set_xlim(begin, stop)
    for end, outward in ((low, -1), (high, 1)):
        if end is not None:
            _mark_end(axes, end, outward)


def _mark_end(axes: Axes, end: float, outward: int) -> None:
    """A dashed line at an end of the clipping range with its value, or an arrow where the end lies out of sight."""
    begin, stop = axes.get_xlim()
    share = (end - begin) / (stop - begin)
    across = axes.get_xaxis_transform()
    if not 0 <= share <= 1:
        word = f"clip {style.brief(end)} →" if share > 1 else f"← clip {style.brief(end)}"
        axes.text(
            min(1.0, max(0.0, share)),
            0.9,
            word,
            ha="right" if share > 1 else "left",
            va="center",
            transform=axes.transAxes,
        )
        return
    axes.plot([end, end], [0, 1], color=style.INK, linestyle=(0, (4, 2)), linewidth=1.1, transform=across)
    # Outwards, or inwards where there is no room for it.
    room = share if outward < 0 else 1 - share
    left = (outward < 0) == (room >= 0.25)
    axes.annotate(
        f"clip {style.brief(end)}",
        (end, 0.9),
        (-3 if left else 3, 0),
        xycoords=across,
        textcoords="offset points",
        ha="right" if left else "left",
        va="center",
    )

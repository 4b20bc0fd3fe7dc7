"""A guilty tensor by tokens and channels, or by embeddings and dimensions: what stands out is named."""

from __future__ import annotations

import math
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lightning_quantdebug import figure_style as style
from lightning_quantdebug.review_data import QUANTIZED_COLOR
from lightning_quantdebug.visuals import HeatMap

_STANDS_OUT = 6.0
# Times the median peak. Of single Gaussian values among 48, one in 2000 reaches it (and one in 90 reaches 4 times).

_MOST_NAMED = 3
_DECADES = 4
# Of the colours: what is smaller than a ten-thousandth of the greatest value costs no accuracy.


def heat_map(name: str, values: HeatMap) -> Figure | None:
    """Draw the magnitudes of a tensor by two of its axes, and the noise below them.

    Args:
        name: Name of the tensor.
        values: Rows by columns.

    Returns:
        The picture; ``None`` where no cell has a value.

    Examples:
        >>> from lightning_quantdebug.visuals import HeatMap
        >>> heat_map("norm", HeatMap("token", "channel", (), (), (), (), 0, 0)) is None
        True
    """
    peaks, noise = (_matrix(each, values) for each in (values.values, values.noise))
    if not peaks.any():
        return None
    rows, columns = outstanding(peaks.max(axis=1)), outstanding(peaks.max(axis=0))
    figure = style.new_figure(f"{name}: by {values.rows} and {values.columns}")
    panels = figure.subplots(2, 1, sharex=True)
    titles = (_headline(values, rows, columns), "root mean squared error of quantizing")
    for axes, cells, title in zip(panels, (peaks, noise), titles, strict=True):
        _draw_map(figure, axes, cells)
        axes.set_title(style.fitted(title, 300), loc="left")
        axes.set_ylabel(style.fitted(values.rows, 70))
        _name_some(axes.yaxis, values.row_indices, rows, 78.0, 1.25 * style.SMALL)
    if rows or columns:
        _ring(panels[0], peaks)
    widest = max(style.text_width(str(index), bold=True) for index in values.column_indices) + 4
    _name_some(panels[1].xaxis, values.column_indices, columns, 280.0, widest)
    panels[1].set_xlabel(style.fitted(f"{values.columns}{_left_out(values)}", 320))
    return figure


def _ring(axes: Axes, peaks: NDArray[np.float64]) -> None:
    """A ring around the greatest value: a single cell is easily overlooked."""
    row, column = np.unravel_index(int(peaks.argmax()), peaks.shape)
    axes.plot(
        [int(column)],
        [int(row)],
        "o",
        markersize=9,
        markerfacecolor="none",
        markeredgecolor=QUANTIZED_COLOR,
        markeredgewidth=1.6,
        clip_on=False,
    )


def outstanding(peaks: NDArray[np.float64]) -> list[int]:
    """Places of the peaks that stand out from the others, the greatest first, three at most.

    Args:
        peaks: The greatest magnitude of each row or column, shape ``(N,)``.

    Examples:
        >>> outstanding(np.array([1.0, 9.0, 1.0, 1.2]))
        [1]
    """
    middle = float(np.median(peaks))
    order = [int(place) for place in np.argsort(-peaks, kind="stable")[:_MOST_NAMED]]
    return [place for place in order if peaks[place] > _STANDS_OUT * middle]


def _matrix(cells: Sequence[Sequence[float]], values: HeatMap) -> NDArray[np.float64]:
    """The cells of all named rows and columns; 0 for what is no number."""
    shape = (len(values.row_indices), len(values.column_indices))
    full = np.zeros(shape)
    for place, row in enumerate(cells[: shape[0]]):
        full[place, : len(row[: shape[1]])] = [value or 0.0 for value in row[: shape[1]]]
    return np.nan_to_num(full, nan=0.0, posinf=0.0, neginf=0.0)


def _headline(values: HeatMap, rows: Sequence[int], columns: Sequence[int]) -> str:
    """Which rows and columns stand out, in words."""
    named = [(values.rows, values.row_indices, rows), (values.columns, values.column_indices, columns)]
    words = [
        f"{word} {', '.join(str(indices[place]) for place in places)}" for word, indices, places in named if places
    ]
    return f"greatest magnitude: {' and '.join(words)}" if words else "greatest magnitude: nothing stands out"


def _left_out(values: HeatMap) -> str:
    """How much of the tensor is shown, where it is not all."""
    pairs = [
        (len(values.column_indices), values.total_columns, values.columns),
        (len(values.row_indices), values.total_rows, values.rows),
    ]
    cut = [f"{shown} of {total} {word}s" for shown, total, word in pairs if shown < total]
    return f" ({', '.join(cut)} shown)" if cut else ""


def _draw_map(figure: Figure, axes: Axes, cells: NDArray[np.float64]) -> None:
    """Cells on a logarithmic scale of colours that the colour-blind can read, and the scale."""
    colors = matplotlib.colormaps["cividis"]
    known = cells[cells > 0]
    if not known.size:
        axes.imshow(cells, cmap=colors, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
        return
    norm = _scale_of(known)
    image = axes.imshow(np.maximum(cells, norm.vmin), cmap=colors, norm=norm, aspect="auto", interpolation="nearest")
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.015)
    low, high = float(norm.vmin or 0.0), float(norm.vmax or 0.0)
    places = [low, math.sqrt(low * high), high]
    style.only_ticks(
        bar.ax.yaxis, places, [f"{'≤' if place == low else ''}{style.brief(place, 2)}" for place in places]
    )
    bar.outline.set_visible(False)


def _scale_of(known: NDArray[np.float64]) -> LogNorm:
    """From a third of the median up: the bulk is dark, what stands out bright, and an even map in the middle."""
    middle, high = float(np.median(known)), float(known.max())
    return LogNorm(max(middle / 3, high / 10**_DECADES), max(high, 3 * middle))


def _name_some(axis: Axis, indices: Sequence[int], named: Sequence[int], room: float, needed: float) -> None:
    """Label what stands out in bold, and the first and the last one where they are not in its way."""
    places: list[int] = []
    for place in (*named, 0, len(indices) - 1):
        if all(abs(place - other) * room / len(indices) >= needed for other in places):
            places.append(place)
    style.only_ticks(axis, [float(place) for place in places], [str(indices[place]) for place in places])
    for label, place in zip(axis.get_ticklabels(), places, strict=True):
        if place in named:
            label.set(color=QUANTIZED_COLOR, fontweight="bold")

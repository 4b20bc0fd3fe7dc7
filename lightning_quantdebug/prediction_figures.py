"""Pictures of the predictions that quantization changes: from which class to which, and the samples themselves."""

from __future__ import annotations

import base64
import binascii
import io
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from PIL import Image

from lightning_quantdebug import figure_style as style
from lightning_quantdebug.review_data import FP32_COLOR, QUANTIZED_COLOR, REPAIRED_COLOR, step_titles
from lightning_quantdebug.visuals import Flip, Predictions

_MOST_COUNTED = 12
# Classes whose cells have room for a number.

_FLIPS = LinearSegmentedColormap.from_list("flips", [style.PAPER, "#F3B78A", QUANTIZED_COLOR])
# One hue that darkens evenly: it can be read without telling colours apart.

_DIAGONAL = "#E4E4E4"


def class_shift(predictions: Sequence[Predictions]) -> Figure | None:
    """Draw which classes flip to which: as first quantized and as the walk left the model.

    Args:
        predictions: At moments of the walk; the first and the last one are drawn.

    Returns:
        The picture; ``None`` where no class was predicted.

    Examples:
        >>> class_shift(()) is None
        True
    """
    shown = [each for each in dict.fromkeys((*predictions[:1], *predictions[-1:])) if each.classes and each.samples]
    if not shown:
        return None
    figure = style.new_figure(changed(shown[-1]))
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    most = max(1, *(int(_flips_of(each).max()) for each in shown))
    titles = step_titles([each.step for each in shown])
    for axes, each, title in zip(panels, shown, titles, strict=True):
        image = _draw_matrix(axes, each, most, len(shown))
        axes.set_title(style.fitted(f"{title}: {each.flipped} changed", 330 / len(shown) - 30))
    panels[0].set_ylabel(_class_label("FP32 class", shown[-1]))
    if not all(_has_room(each, len(shown)) for each in shown):
        _add_scale(figure, panels, image)
    return figure


def changed(predictions: Predictions) -> str:
    """In words, how many predictions have changed.

    Examples:
        >>> changed(Predictions("qat", 450, 14, 400, 394, 10, 4, (), 10, ()))
        '14 of 450 predictions changed: 10 lost, 4 won'
    """
    text = f"{predictions.flipped} of {predictions.samples} predictions changed"
    known = predictions.lost is not None and predictions.won is not None
    return f"{text}: {predictions.lost} lost, {predictions.won} won" if known else text


def _class_label(word: str, predictions: Predictions) -> str:
    """The axis, with how many classes are left out."""
    shown = len(predictions.classes)
    return word if shown == predictions.total_classes else f"{word} ({shown} of {predictions.total_classes} shown)"


def _all_of(predictions: Predictions) -> NDArray[np.float64]:
    """The matrix of the shown classes."""
    size = len(predictions.classes)
    matrix = np.zeros((size, size))
    for row, counts in enumerate(predictions.shift[:size]):
        matrix[row, : len(counts[:size])] = counts[:size]
    return matrix


def _flips_of(predictions: Predictions) -> NDArray[np.float64]:
    """The matrix without the samples that stayed."""
    matrix = _all_of(predictions)
    np.fill_diagonal(matrix, 0)
    return matrix


def _draw_matrix(axes: Axes, predictions: Predictions, most: int, panels: int) -> AxesImage:
    """One matrix: the darker a cell, the more samples have moved there; counts where the cells have room."""
    flips = _flips_of(predictions)
    size = len(flips)
    cells = np.ma.masked_array(flips, np.eye(size, dtype=bool))
    colors = _FLIPS.with_extremes(bad=_DIAGONAL)
    image = axes.imshow(cells, cmap=colors, vmin=0, vmax=most, aspect="auto", interpolation="nearest")
    axes.spines[:].set_visible(True)
    axes.set_xlabel("quantized class")
    _name_classes(axes, predictions.classes, 330 / panels - 30)
    if size <= _MOST_COUNTED:
        edges = np.arange(-0.5, size)
        axes.hlines(edges, -0.5, size - 0.5, color="#E6E6E6", linewidth=0.5)
        axes.vlines(edges, -0.5, size - 0.5, color="#E6E6E6", linewidth=0.5)
    if _has_room(predictions, panels):
        _write_counts(axes, predictions)
    return image


def _has_room(predictions: Predictions, panels: int, stayed: bool = False) -> bool:
    """Whether the cells are wide enough for their counts, those of the diagonal or the others."""
    counts = _all_of(predictions) if stayed else _flips_of(predictions)
    cell = (330 / panels - 22) / len(counts)
    return len(counts) <= _MOST_COUNTED and style.text_width(f"{int(counts.max())}") + 2 <= cell


def _write_counts(axes: Axes, predictions: Predictions) -> None:
    """The number of samples in each cell that has some."""
    panels = len(axes.figure.axes)
    counts = _all_of(predictions) if _has_room(predictions, panels, stayed=True) else _flips_of(predictions)
    for row, column in zip(*np.nonzero(counts), strict=True):
        color = style.GREY if row == column else style.INK
        axes.text(column, row, f"{int(counts[row, column])}", ha="center", va="center", color=color)


def _name_classes(axes: Axes, classes: Sequence[int], width: float) -> None:
    """The classes' indices at both axes, as many as fit."""
    widest = max(style.text_width(str(index)) for index in classes)
    across, down = width / len(classes), 170 / len(classes)
    upright = widest + 4 > across
    _name_some(axes, "x", classes, across, style.SMALL if upright else widest + 4)
    _name_some(axes, "y", classes, down, style.SMALL)
    axes.tick_params(axis="x", rotation=90 if upright else 0)
    axes.tick_params(length=0)


def _name_some(axes: Axes, side: str, classes: Sequence[int], room: float, needed: float) -> None:
    """Each n-th class at one axis."""
    step = max(1, math.ceil(needed / room))
    places = range(0, len(classes), step)
    axis = axes.xaxis if side == "x" else axes.yaxis
    style.only_ticks(axis, [float(place) for place in places], [str(classes[place]) for place in places])


def _add_scale(figure: Figure, panels: Sequence[Axes], image: AxesImage) -> None:
    """What the colours stand for, where cells have no room for numbers."""
    bar = figure.colorbar(image, ax=list(panels), fraction=0.04, pad=0.02)
    bar.set_label("samples")
    bar.locator = MaxNLocator(4, integer=True)
    bar.update_ticks()


# The samples.


def flipped_samples(predictions: Sequence[Predictions]) -> Figure | None:
    """Draw samples whose class has changed, those that FP32 was surest of first: as pictures, or as a table.

    Args:
        predictions: At moments of the walk; the last one is drawn.

    Returns:
        The picture; ``None`` where nothing has flipped.

    Examples:
        >>> flipped_samples(()) is None
        True
    """
    if not predictions or not predictions[-1].flips:
        return None
    last = predictions[-1]
    flips = last.flips[:_MOST_FLIPS]
    figure = style.new_figure(f"{len(flips)} of {last.flipped} changed samples: FP32 → quantized")
    pictures = [_picture(flip.picture) for flip in flips]
    if any(picture is not None for picture in pictures):
        _draw_grid(figure, flips, pictures)
    else:
        _draw_table(figure, flips)
    return figure


_MOST_FLIPS = 12


def _picture(encoded: str) -> NDArray[np.uint8] | None:
    """The pixels of a PNG in base64, ``(H, W, 3)``; ``None`` where there are none."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(encoded, validate=True))) as image:
            return np.asarray(image.convert("RGB"))
    except (binascii.Error, ValueError, OSError, SyntaxError, Image.DecompressionBombError):
        # A report is a file that anyone can have written: a damaged picture is none.
        return None


def _draw_grid(figure: Figure, flips: Sequence[Flip], pictures: Sequence[NDArray[np.uint8] | None]) -> None:
    """Each sample with its classes beside it, where text is legible that would be cut off below it."""
    columns = min(3, len(flips))
    rows = math.ceil(len(flips) / columns)
    figure.set_layout_engine("none")
    top, gap = 0.92, 0.012
    width, height = (1 - gap) / columns, (top - gap) / rows
    for index, (flip, picture) in enumerate(zip(flips, pictures, strict=True)):
        left, low = gap + width * (index % columns), top - height * (index // columns + 1) + gap
        words = _words_of(flip)
        needed = max(style.text_width(text, bold=bold) for text, _, bold in words) / (72 * style.WIDTH) + gap
        room = max(0.2 * width, min(width - gap - needed, (height - gap) * style.HEIGHT / style.WIDTH))
        if picture is not None:
            axes = figure.add_axes((left, low, room, height - gap))
            axes.imshow(picture, interpolation="nearest")
            axes.set_axis_off()
        _write_lines(figure, left + room + gap, low + (height - gap) / 2, words)


def _words_of(flip: Flip) -> list[tuple[str, str, bool]]:
    """The lines beside a sample, each with its colour and whether it is bold."""
    before = (f"{flip.fp32} ({_share(flip.fp32_probability)})", FP32_COLOR, True)
    after = (f"→ {flip.quantized} ({_share(flip.quantized_probability)})", QUANTIZED_COLOR, True)
    if flip.label is None:
        return [(f"sample {flip.sample}", style.INK, False), before, after]
    return [(f"label {flip.label}{_outcome(flip)}", style.INK, False), before, after]


def _outcome(flip: Flip) -> str:
    """Whether a right answer was lost or won."""
    return " ✗" if flip.label == flip.fp32 else " ✓" if flip.label == flip.quantized else ""


def _share(probability: float | None) -> str:
    """A probability with two digits."""
    return "-" if probability is None or not math.isfinite(probability) else f"{probability:.2f}"


def _write_lines(figure: Figure, x: float, y: float, lines: Sequence[tuple[str, str, bool]]) -> None:
    """Lines around a height, in shares of the figure."""
    step = 1.25 * style.SMALL / (72 * style.HEIGHT)
    for index, (text, color, bold) in enumerate(lines):
        place = y + step * ((len(lines) - 1) / 2 - index)
        figure.text(x, place, text, color=color, fontweight="bold" if bold else "normal", va="center")


def _draw_table(figure: Figure, flips: Sequence[Flip]) -> None:
    """The samples as rows."""
    figure.set_layout_engine("none")
    heads = ("sample", "label", "FP32", "quantized", "")
    rows = [_row_of(flip) for flip in flips]
    places = (0.16, 0.32, 0.55, 0.80, 0.84)
    down = min(0.1, 0.86 / (len(rows) + 1))
    for row, cells in enumerate([heads, *rows]):
        for column, (x, text) in enumerate(zip(places, cells, strict=True)):
            color = _cell_color(flips[row - 1], column) if row else style.GREY
            side = "left" if column == len(heads) - 1 else "right"
            figure.text(x, 0.86 - row * down, text, ha=side, va="center", color=color)


def _row_of(flip: Flip) -> tuple[str, ...]:
    """The cells of a sample."""
    outcome = {" ✗": "✗ lost", " ✓": "✓ won"}.get(_outcome(flip), "") if flip.label is not None else ""
    return (
        str(flip.sample),
        "-" if flip.label is None else str(flip.label),
        f"{flip.fp32} ({_share(flip.fp32_probability)})",
        f"→ {flip.quantized} ({_share(flip.quantized_probability)})",
        outcome,
    )


def _cell_color(flip: Flip, column: int) -> str:
    """The colour of a column's text."""
    if column < 2:
        return style.INK
    if column == 4:
        return REPAIRED_COLOR if flip.label == flip.quantized else QUANTIZED_COLOR
    return FP32_COLOR if column == 2 else QUANTIZED_COLOR

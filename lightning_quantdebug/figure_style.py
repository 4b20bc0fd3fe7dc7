"""How every picture looks: its size, its fonts, its paper, and how it becomes pixels.

TensorBoard's Images dashboard shows a picture 350 pixels wide whatever the window's size, in its Time Series dashboard
about 300, and both take the nearest pixel of ours for each of theirs (``image-rendering: pixelated``). So a picture has
three pixels for each of the card's, and is smoothed a little over three of them: the card shows the mean of nine, where
it would else show every third pixel of a letter. Pictures are opaque: a dark page does not shine through.

Nothing of the user's matplotlib is touched: figures are built without ``pyplot``, and the settings that they are built
and drawn with are put back.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.textpath import TextToPath
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator
from numpy.typing import NDArray
from PIL import Image

from lightning_quantdebug.short_names import ELLIPSIS, printable

CARD_PIXELS = 350
"""Width of a picture in TensorBoard's Images dashboard (2.21)."""

WIDTH, HEIGHT = 5.0, 3.5
"""Of a picture, in inches."""

DPI = 3 * CARD_PIXELS / WIDTH

SMALL = 8.3
"""Size of the smallest text, in points: 8 pixels in TensorBoard's card."""

TITLE = 9.6

PAPER, INK, PALE, GREY = "#FCFCFC", "#1A1A1A", "#C4C4C4", "#767676"
"""The background, text and lines, lines of little weight, and text of little weight (contrast 4.4 to the paper)."""

_FONT = "DejaVu Sans"
# It comes with matplotlib, so that a picture looks the same everywhere.

_MOST_CHARACTERS = 400
# Of a text that is measured: no picture holds more.

_TAPS = (3, 4, 3)
# Weights of the three pixels that become one: hardly softer than their mean at full size, and as smooth in the card.

_SETTINGS: dict[Any, Any] = {
    "text.parse_math": False,
    "text.usetex": False,
    "font.family": _FONT,
    "font.size": SMALL,
    "axes.titlesize": SMALL,
    "axes.labelsize": SMALL,
    "axes.titlepad": 3.0,
    "axes.labelpad": 2.0,
    "axes.linewidth": 0.7,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.facecolor": PAPER,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.facecolor": PAPER,
    "figure.dpi": DPI,
    "text.color": INK,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.major.pad": 2.0,
    "ytick.major.pad": 2.0,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "legend.handlelength": 1.4,
    "legend.borderpad": 0.0,
    "legend.borderaxespad": 0.2,
    "legend.columnspacing": 1.4,
}


@contextmanager
def house_style() -> Iterator[None]:
    """Matplotlib's settings are its own defaults and ours while the block runs, and the user's again behind it.

    Backend and interactivity are not among them.

    Examples:
        >>> import matplotlib
        >>> before = matplotlib.rcParams["font.size"]
        >>> with house_style():
        ...     matplotlib.rcParams["font.size"]
        8.3
        >>> matplotlib.rcParams["font.size"] == before
        True
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        yield


def new_figure(title: str) -> Figure:
    """An empty picture with a title at its left, whose parts find their places themselves.

    Args:
        title: On one line; it is cut where it is too long.

    Examples:
        >>> with house_style():
        ...     new_figure("Weights").get_suptitle()
        'Weights'
    """
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    FigureCanvasAgg(figure)
    engine: Any = figure.get_layout_engine()
    engine.set(w_pad=4 / 72, h_pad=3 / 72, wspace=0.03, hspace=0.03)
    shown = fitted(title, 72 * WIDTH - 12, TITLE, bold=True)
    figure.suptitle(shown, x=6 / (72 * WIDTH), ha="left", fontsize=TITLE, fontweight="bold")
    return figure


def settle(figure: Figure) -> Figure:
    """Lay the picture out once and for all: what is drawn later, and by whom, does not move it.

    Examples:
        >>> with house_style():
        ...     settle(new_figure("Weights")).get_layout_engine().adjust_compatible
        False
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def legible(text: str) -> str:
    r"""The text on one line with the characters that the font has; a box stands for each other one.

    Examples:
        >>> legible("conv\n" + chr(0x5377))
        'conv □'
    """
    known = get_font(findfont(FontProperties(family=_FONT)))
    return "".join(char if known.get_char_index(ord(char)) else "□" for char in printable(text))


def text_width(text: str, size: float = SMALL, bold: bool = False) -> float:
    """Width of a line of text in points.

    Examples:
        >>> 18 < text_width("conv") < text_width("conv", bold=True) < 26
        True
    """
    font = FontProperties(family=_FONT, size=size, weight="bold" if bold else "normal")
    width, _, _ = TextToPath().get_text_width_height_descent(text, font, False)
    return float(width)


def fitted(text: str, width: float, size: float = SMALL, bold: bool = False) -> str:
    """The legible text, cut at its end until it is at most ``width`` points wide.

    Examples:
        >>> fitted("features.3.conv.0.weight", 60)
        'features.3.c…'
    """
    shown = legible(text[:_MOST_CHARACTERS])
    if text_width(shown, size, bold) <= width and len(text) <= _MOST_CHARACTERS:
        return shown
    lengths = range(len(shown))
    fits = bisect_right(lengths, width, key=lambda length: text_width(shown[:length] + ELLIPSIS, size, bold))
    return shown[: max(0, fits - 1)] + ELLIPSIS


def brief(value: float, digits: int = 3) -> str:
    """A number with a few significant digits, and without an exponent where it is not long.

    Examples:
        >>> brief(0.012345), brief(-4321.0), brief(1e6), brief(-0.0)
        ('0.0123', '-4321', '1e+06', '0')
    """
    short = f"{value + 0.0:.{digits}g}"
    return f"{value:.0f}" if "e+" in short and abs(value) < 100_000 else short


def plain_numbers(axis: Axis, digits: int = 3) -> None:
    """Write an axis' numbers one by one, without a common offset or factor beside the axis.

    Examples:
        >>> with house_style():
        ...     axes = new_figure("").subplots()
        ...     plain_numbers(axes.xaxis)
        ...     axes.xaxis.get_major_formatter()(0.12345, 0)
        '0.123'
    """
    axis.set_major_formatter(FuncFormatter(lambda value, _: brief(value, digits)))
    axis.set_minor_formatter(NullFormatter())


def only_ticks(axis: Axis, places: list[float], labels: list[str]) -> None:
    """Ticks at these places alone, with these labels.

    Examples:
        >>> with house_style():
        ...     axes = new_figure("").subplots()
        ...     only_ticks(axes.xaxis, [0.5], ["half"])
        ...     [label.get_text() for label in axes.get_xticklabels()]
        ['half']
    """
    axis.set_major_locator(FixedLocator(places))
    axis.set_minor_locator(NullLocator())
    axis.set_ticks(places, labels)


def in_points(axes: Axes) -> tuple[float, float]:
    """Width and height of a panel as it is laid out now, in points.

    Examples:
        >>> with house_style():
        ...     figure = new_figure("")
        ...     axes = figure.add_axes((0, 0, 0.5, 1))
        ...     [round(side) for side in in_points(axes)]
        [180, 252]
    """
    figure = axes.get_figure()
    assert figure is not None
    box = axes.get_window_extent()
    return box.width * 72 / figure.dpi, box.height * 72 / figure.dpi


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """Draw a picture for TensorBoard, which leaves out pixels where it shows a picture small: so it is smoothed.

    Args:
        figure: Any figure; it is drawn without a display.

    Returns:
        Red, green and blue, shape ``(H, W, 3)``; ours are 1050 pixels wide and 735 high.

    Examples:
        >>> with house_style():
        ...     figure = new_figure("Weights")
        >>> pixels(figure).shape
        (735, 1050, 3)
    """
    return _smoothed(_smoothed(_drawn(figure), 0), 1)


def _drawn(figure: Figure) -> NDArray[np.uint8]:
    """The picture as it is drawn, sharp."""
    canvas: Any = figure.canvas if isinstance(figure.canvas, FigureCanvasAgg) else FigureCanvasAgg(figure)
    with house_style():
        canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def _smoothed(drawn: NDArray[np.uint8], axis: int) -> NDArray[np.uint8]:
    """Each pixel as the weighted mean of itself and its two neighbours along one axis."""
    wide = np.pad(drawn, [(1, 1) if each == axis else (0, 0) for each in range(3)], mode="edge").astype(np.uint16)
    size = drawn.shape[axis]
    total = sum(weight * np.take(wide, range(at, at + size), axis) for at, weight in enumerate(_TAPS))
    half = sum(_TAPS) // 2
    return np.asarray((total + half) // sum(_TAPS), dtype=np.uint8)


def png(figure: Figure) -> bytes:
    """Draw a picture as a PNG file, sharp: whoever shows a file scales it better than TensorBoard does.

    Examples:
        >>> with house_style():
        ...     figure = new_figure("Weights")
        >>> png(figure)[1:4]
        b'PNG'
    """
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(_drawn(figure))).save(buffer, format="PNG")
    return buffer.getvalue()

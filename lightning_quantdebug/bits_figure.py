"""The final bit-width of every quantizer over the depth of the network."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lightning_quantdebug import figure_style as style
from lightning_quantdebug.review_data import FP32_COLOR, QUANTIZED_COLOR, TOLERANCE_COLOR, Depth
from lightning_quantdebug.short_names import short_names
from lightning_quantdebug.target import Kind

_NAME_WIDTH = 26
# Characters of a quantizer's name: a third of the picture.

_APART = 10.0
# Points from one marker to the next: with less between them none could say whose a name is.

_Rectangle = tuple[float, float, float, float]
# Left, lower, right and upper side, in points from the panel's lower left corner.


def draw_bits(places: Sequence[Depth]) -> Figure | None:
    """Draw the final bit-width of every quantizer in order of execution; those off the target are named.

    Args:
        places: Of weights and activations.

    Returns:
        The picture; ``None`` without quantizers.

    Examples:
        >>> draw_bits(()) is None
        True
    """
    kinds = [kind for kind in Kind if any(item.kind is kind for item in places)]
    if not kinds:
        return None
    figure = style.new_figure("Final bit-widths over depth")
    panels = figure.subplots(len(kinds), 1, sharex=True, squeeze=False)[:, 0]
    for axes, kind in zip(panels, kinds, strict=True):
        _draw_kind(axes, kind, [item for item in places if item.kind is kind])
    panels[-1].set_xlabel("depth: quantizers in order of execution")
    panels[-1].set_xlim(-0.5 - len(places) * 0.02, len(places) * 1.02 - 0.5)
    panels[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    style.settle(figure)
    for axes, kind in zip(panels, kinds, strict=True):
        _name_strays(axes, [item for item in places if item.kind is kind])
    return figure


def _strays(places: Sequence[Depth]) -> list[Depth]:
    """Those with other bits than the target gives."""
    return [item for item in places if item.target_bits is not None and item.bit_width != item.target_bits]


def _levels(places: Sequence[Depth]) -> dict[int, int]:
    """The row of each bit-width, from the fewest bits up."""
    bits = {item.bit_width for item in places} | {item.target_bits for item in places if item.target_bits is not None}
    return {bit_width: row for row, bit_width in enumerate(sorted(bits))}


def _draw_kind(axes: Axes, kind: Kind, places: Sequence[Depth]) -> None:
    """Markers of one kind, the target as a line."""
    levels, strays = _levels(places), _strays(places)
    same = [item for item in places if item not in strays]
    size = min(4.5, max(1.6, 160 / len(places)))
    target = places[0].target_bits
    if target is not None:
        axes.axhline(levels[target], color=TOLERANCE_COLOR, linewidth=1.4, linestyle=(0, (4, 2)), zorder=1)
    for group, mark, color in ((same, "o", FP32_COLOR), (strays, "D", QUANTIZED_COLOR)):
        rows = [levels[item.bit_width] for item in group]
        axes.plot([item.depth for item in group], rows, mark, color=color, markersize=size, zorder=3)
    words = [f"target {bits}" if bits == target else f"{bits}" for bits in levels]
    style.only_ticks(axes.yaxis, [float(row) for row in levels.values()], words)
    axes.set_ylim(-0.7, len(levels) - 0.2)
    axes.set_ylabel("bits")
    name = "Weights" if kind is Kind.WEIGHT else "Activations"
    off = f"{len(strays)} of {len(places)} off the target (◆)" if strays else "all at the target"
    axes.set_title(f"{name}: {off}" if target is not None else f"{name}, {len(places)}", loc="left")


def _name_strays(axes: Axes, places: Sequence[Depth]) -> None:
    """Write the names beside the markers where nothing lies in their way; those that do not fit are left out."""
    strays = _strays(places)
    names = short_names([item.name for item in strays], _NAME_WIDTH)
    levels = _levels(places)
    width, height = style.in_points(axes)
    to_points = axes.transData + axes.transAxes.inverted()
    spots = {
        item.depth: _in_panel(to_points.transform((item.depth, levels[item.bit_width])), width, height)
        for item in places
    }
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in spots.values()]
    for item in strays:
        x, y = spots[item.depth]
        if any(depth != item.depth and abs(x - a) < _APART and abs(y - b) < 1 for depth, (a, b) in spots.items()):
            continue
        text = style.legible(names[item.name])
        box = _free_place(x, y, style.text_width(text) + 2, (width, height), taken)
        if box is None:
            continue
        taken.append(box)
        where = (box[0] + 1 - x, (box[1] + box[3]) / 2 - y)
        note = axes.annotate(text, (item.depth, levels[item.bit_width]), where, textcoords="offset points", va="center")
        note.set_in_layout(False)


def _in_panel(share: Sequence[float], width: float, height: float) -> tuple[float, float]:
    """A place in points from the panel's lower left corner."""
    return share[0] * width, share[1] * height


def _free_place(
    x: float, y: float, wide: float, panel: tuple[float, float], taken: Sequence[_Rectangle]
) -> _Rectangle | None:
    """The first place for a text beside a marker that lies in the panel and on nothing; ``None`` if there is none."""
    tall = style.SMALL * 1.2
    beside, above, below = y - tall / 2, y + 4, y - 4 - tall
    offers = [(x + 5, beside), (x - 5 - wide, beside)]
    offers += [(left, down) for down in (below, above) for left in (x - wide / 2, x - 3, x + 3 - wide)]
    for left, down in offers:
        box = (left, down, left + wide, down + tall)
        inside = left >= 0 and down >= 1 and box[2] <= panel[0] and box[3] <= panel[1]
        if inside and not any(_meets(box, other) for other in taken):
            return box
    return None


def _meets(one: _Rectangle, other: _Rectangle) -> bool:
    """Whether two rectangles overlap."""
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]

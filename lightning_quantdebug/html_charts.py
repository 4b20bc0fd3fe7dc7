"""The charts of the page, as the plain JSON that plotly.js draws: hovering tells full names and exact numbers.

plotly.js reads some HTML in its texts (bold, links). So every text that comes from the user's model is escaped
(:func:`shown`): it can neither become a tag nor a link. Colours of text and grid are the page's, which follows the
reader's light or dark scheme.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_quantdebug.markdown_text import interval, number
from lightning_quantdebug.report import Report, Sensitivity
from lightning_quantdebug.review_data import (
    FP32_COLOR,
    NEUTRAL_COLOR,
    QUANTIZED_COLOR,
    REPAIRED_COLOR,
    TOLERANCE_COLOR,
    bits_over_depth,
    ranking,
    step_titles,
    waterfall,
    worst_permitted_score,
)
from lightning_quantdebug.short_names import printable, short_names
from lightning_quantdebug.target import Kind
from lightning_quantdebug.visuals import HeatMap, Predictions, TensorState, TensorView

MOST_BARS = 40
"""Quantizers of a ranking; the table below it holds all."""

_LABEL_WIDTH = 34
_ROW_HEIGHT = 22
_STATE_COLORS = (FP32_COLOR, REPAIRED_COLOR)


@dataclass(frozen=True)
class Chart:
    """One chart of the page.

    Attributes:
        name: Its name in the page, unique.
        label: What it shows, for those who do not see it.
        data: The traces of plotly.js.
        layout: Its layout.
        height: In pixels.
    """

    name: str
    label: str
    data: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]
    height: int = 320


def shown(text: str) -> str:
    """A text as plotly.js shows it literally.

    Examples:
        >>> shown("a<b>&")
        'a&lt;b&gt;&amp;'
    """
    return printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def overview_charts(report: Report) -> list[Chart]:
    """The charts of the whole walk that have data.

    Examples:
        >>> overview_charts(Report())
        []
    """
    found = [
        waterfall_chart(report),
        *(ranking_chart(report, kind) for kind in Kind),
        bits_chart(report),
        *(shift_chart(one, place) for place, one in enumerate(report.visuals.predictions)),
    ]
    return [chart for chart in found if chart is not None]


def tensor_charts(view: TensorView, place: int) -> list[Chart]:
    """The charts of one guilty tensor.

    Args:
        view: The tensor.
        place: Its place in the report, which tells its charts from those of others.
    """
    if not view.states:
        return []
    found = [channels_chart(view, place), histogram_chart(view, place), noise_chart(view, place)]
    maps = [] if view.heat_map is None else [heat_chart(view.heat_map, view, place)]
    return [*found, *maps]


def _axis(title: str = "", **settings: Any) -> dict[str, Any]:
    """An axis with a title that makes room for itself."""
    return {"title": {"text": title}, "automargin": True, "zeroline": False, **settings}


def _names_axis(labels: Sequence[str], **settings: Any) -> dict[str, Any]:
    """A vertical axis of names, the first on top; names that are alike stay apart."""
    places = list(range(len(labels)))
    return _axis(tickmode="array", tickvals=places, ticktext=[shown(label) for label in labels], **settings) | {
        "autorange": False,
        "range": [len(labels) - 0.5, -0.5],
        "ticklabelstandoff": 6,
    }


def _line(value: float, text: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A dashed vertical line across the chart, and its label above it."""
    shape = {
        "type": "line",
        "x0": value,
        "x1": value,
        "y0": 0,
        "y1": 1,
        "yref": "paper",
        "line": {"color": TOLERANCE_COLOR, "dash": "dash", "width": 2},
    }
    label = {"x": value, "y": 1.0, "yref": "paper", "text": shown(text), "showarrow": False, "yanchor": "bottom"}
    return shape, label


# The walk.


def waterfall_chart(report: Report) -> Chart | None:
    """The score from FP32 through quantization and each remedy that was kept to the end."""
    stages = waterfall(report)
    if not stages:
        return None
    scores = [stage.score for stage in stages]
    spread = max(scores) - min(scores) or abs(scores[0]) or 1.0
    floor = min(scores) - 0.15 * spread
    # Bars go to the right, so that their texts stand where there is room.
    bases = [floor if s.change is None else min(s.score, s.score - s.change) for s in stages]
    widths = [s.score - floor if s.change is None else abs(s.change) for s in stages]
    ends = {0: FP32_COLOR, len(stages) - 1: NEUTRAL_COLOR}
    colors = [
        ends[place] if stage.change is None else REPAIRED_COLOR if stage.better else QUANTIZED_COLOR
        for place, stage in enumerate(stages)
    ]
    texts = [number(s.score) if s.change is None else f"{'✓' if s.better else '✗'} {s.change:+.4g}" for s in stages]
    bar = {
        "type": "bar",
        "orientation": "h",
        "y": list(range(len(stages))),
        "base": bases,
        "x": widths,
        "marker": {"color": colors},
        "text": [shown(text) for text in texts],
        "textposition": "outside",
        "cliponaxis": False,
        "hoverinfo": "text",
        "hovertext": [f"{shown(stage.label)}: {number(stage.score, 6)}" for stage in stages],
    }
    monitor = str(report.settings.get("monitor", "score"))
    layout = _marked(
        {
            "xaxis": _axis(shown(monitor), range=[floor, max(scores) + 0.25 * spread]),
            "yaxis": _names_axis([stage.label for stage in stages]),
        },
        worst_permitted_score(report),
        "tolerated",
    )
    return Chart("waterfall", "Score from FP32 to the final model", [bar], layout, 120 + 34 * len(stages))


def _marked(layout: dict[str, Any], value: float | None, text: str) -> dict[str, Any]:
    """A layout with a labelled line at a value of the horizontal axis; as it is, where the value is not known."""
    if value is None:
        return layout
    shape, label = _line(value, f"{text} {number(value)}")
    return {**layout, "shapes": [shape], "annotations": [label]}


def ranking_chart(report: Report, kind: Kind) -> Chart | None:
    """The worst quantizers of one kind: loss of score with its interval; the SQNR where no loss was measured."""
    found = ranking(report, kind, MOST_BARS)
    if not found.rows:
        return None
    labels = list(short_names([row.quantizer for row in found.rows], _LABEL_WIDTH).values())
    label = f"{kind.value.capitalize()}s, each alone: the worst {len(found.rows)} of {found.total}"
    height = 110 + _ROW_HEIGHT * len(found.rows)
    if all(row.loss is None for row in found.rows):
        return Chart(f"ranking_{kind.value}", label, [_sqnr_bars(found.rows)], _of_sqnr(labels), height)
    layout = _marked(
        {"xaxis": _axis("loss of score (95 %)"), "yaxis": _names_axis(labels)},
        found.permitted,
        "tolerance",
    )
    return Chart(f"ranking_{kind.value}", label, [_loss_points(found.rows)], layout, height)


def _of_sqnr(labels: Sequence[str]) -> dict[str, Any]:
    """The layout of a ranking by the SQNR."""
    return {"xaxis": _axis("SQNR of the output, dB"), "yaxis": _names_axis(labels)}


def _sqnr_bars(rows: Sequence[Sensitivity]) -> dict[str, Any]:
    """Bars of the SQNR."""
    return {
        "type": "bar",
        "orientation": "h",
        "x": [row.sqnr_db for row in rows],
        "y": list(range(len(rows))),
        "marker": {"color": FP32_COLOR},
        "hoverinfo": "text",
        "hovertext": [_about(row) for row in rows],
    }


def _loss_points(rows: Sequence[Sensitivity]) -> dict[str, Any]:
    """Points of the loss with their intervals; the guilty ones are filled diamonds."""
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [row.loss for row in rows],
        "y": list(range(len(rows))),
        "error_x": {
            "type": "data",
            "symmetric": False,
            "array": [_reach(row, 1) for row in rows],
            "arrayminus": [_reach(row, 0) for row in rows],
            "color": FP32_COLOR,
            "thickness": 1.5,
        },
        "marker": {
            "size": 9,
            "line": {"width": 2},
            "symbol": ["diamond" if row.guilty else "circle-open" for row in rows],
            "color": [QUANTIZED_COLOR if row.guilty else FP32_COLOR for row in rows],
        },
        "hoverinfo": "text",
        "hovertext": [_about(row) for row in rows],
    }


def _reach(row: Sensitivity, end: int) -> float:
    """How far the interval of a loss reaches beyond it, below (0) or above (1)."""
    if row.loss is None or row.interval is None:
        return 0.0
    return max(0.0, abs(row.interval[end] - row.loss))


def _about(row: Sensitivity) -> str:
    """What hovering over a quantizer tells."""
    guilty = ", guilty" if row.guilty else ""
    lines = [
        f"{row.quantizer} ({row.bit_width} bits{guilty})",
        f"loss {number(row.loss)} {interval(row.interval)}",
        f"SQNR {number(row.sqnr_db)} dB, divergence {number(row.kl)} nats",
        f"{row.method}, {number(row.samples)} samples",
    ]
    return "<br>".join(shown(line) for line in lines)


def bits_chart(report: Report) -> Chart | None:
    """The final bit-width of every quantizer over the depth of the network."""
    depths = bits_over_depth(report)
    if not depths:
        return None
    traces = []
    for kind, symbol, color in ((Kind.WEIGHT, "square", FP32_COLOR), (Kind.ACTIVATION, "circle", QUANTIZED_COLOR)):
        mine = [depth for depth in depths if depth.kind is kind]
        if not mine:
            continue
        changed = [depth.target_bits not in (None, depth.bit_width) for depth in mine]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": f"{kind.value}s",
                "x": [depth.depth for depth in mine],
                "y": [depth.bit_width for depth in mine],
                "marker": {
                    "color": color,
                    "size": [11 if one else 7 for one in changed],
                    "symbol": [symbol if one else f"{symbol}-open" for one in changed],
                },
                "hoverinfo": "text",
                "hovertext": [f"{shown(d.name)}: {d.bit_width} bits (target: {d.target_bits})" for d in mine],
            }
        )
    widths = sorted({depth.bit_width for depth in depths})
    layout = {
        "xaxis": _axis("depth: quantizers in order of execution"),
        "yaxis": _axis("bits", tickvals=widths, range=[widths[0] - 1, widths[-1] + 1]),
        "showlegend": True,
    }
    return Chart(
        "bits_over_depth", "Final bit-widths over depth; filled where they differ from the target", traces, layout
    )


def shift_chart(predictions: Predictions, place: int) -> Chart | None:
    """Which classes quantization moves into which others; samples that stay are left out of the colours."""
    if not predictions.classes or not predictions.shift:
        return None
    names = [str(name) for name in predictions.classes]
    moved = [
        [None if row == column else count for column, count in enumerate(counts)]
        for row, counts in enumerate(predictions.shift)
    ]
    hover = [
        [f"FP32 class {names[row]}, quantized {names[column]}: {count}" for column, count in enumerate(counts)]
        for row, counts in enumerate(predictions.shift)
    ]
    trace = {
        "type": "heatmap",
        "z": moved,
        "x": names,
        "y": names,
        "text": [["" if not count else str(count) for count in row] for row in moved],
        "texttemplate": "%{text}" if len(names) <= 12 else "",
        "hoverinfo": "text",
        "hovertext": hover,
        "colorscale": "Cividis",
        "reversescale": True,
        "zmin": 0,
        "zmax": max((count for row in moved for count in row if count is not None), default=0) or 1,
        "colorbar": {"title": {"text": "samples"}},
    }
    layout = {
        "xaxis": _axis("quantized class", type="category"),
        "yaxis": _axis("FP32 class", type="category", autorange="reversed"),
    }
    (title,) = step_titles([predictions.step])
    label = f"Classes {title}: {predictions.flipped} of {predictions.samples} predictions changed"
    return Chart(f"class_shift_{place}", label, [trace], layout, 420)


# One tensor.


def _panels(view: TensorView, kind: str, x_title: str, y_title: str) -> tuple[list[TensorState], dict[str, Any]]:
    """The first and the last state, and the layout of a panel for each, the first on top."""
    states = [view.states[0], *view.states[1:][-1:]]
    titles = [
        f"{title}, {s.bit_width} bits" for title, s in zip(step_titles([s.step for s in states]), states, strict=True)
    ]
    layout: dict[str, Any] = {"annotations": [], "showlegend": True, "xaxis": _axis(x_title)}
    for place, title in enumerate(titles):
        top = 1.0 - place * 0.54 if len(states) > 1 else 1.0
        axis = "yaxis" if place == 0 else "yaxis2"
        layout[axis] = _axis(y_title, domain=[top - (0.42 if len(states) > 1 else 0.96), top - 0.04], type=kind)
        layout["annotations"].append(
            {
                "text": shown(title),
                "x": 0,
                "xref": "paper",
                "y": top,
                "yref": "paper",
                "showarrow": False,
                "xanchor": "left",
                "yanchor": "bottom",
            }
        )
    layout["xaxis"]["anchor"] = "y2" if len(states) > 1 else "y"
    return states, layout


def channels_chart(view: TensorView, place: int) -> Chart:
    """The range of each channel and the clipping range, before and after."""
    of_all = "" if len(view.channels) == view.total_channels else f" ({len(view.channels)} of {view.total_channels})"
    states, layout = _panels(view, "linear", f"{shown(view.channel_axis)}{of_all}", "value")
    x = [str(channel) for channel in view.channels]
    layout["xaxis"] |= {"type": "category"}
    traces: list[dict[str, Any]] = []
    for panel, (state, color) in enumerate(zip(states, _STATE_COLORS, strict=False)):
        axis = {"yaxis": "y" if panel == 0 else "y2"}
        hover = [
            f"{shown(view.channel_axis)} {name}: [{number(low)}, {number(high)}], SQNR {number(sqnr)} dB"
            for name, low, high, sqnr in zip(x, state.low, state.high, state.channel_sqnr_db, strict=True)
        ]
        reach = [high - low for low, high in zip(state.low, state.high, strict=True)]
        traces.append(
            {
                "type": "bar",
                "name": "values in FP32",
                "x": x,
                "base": list(state.low),
                "y": reach,
                "marker": {"color": color},
                "hoverinfo": "text",
                "hovertext": hover,
                "showlegend": panel == 0,
                **axis,
            }
        )
        for end, word in ((state.clip_low, "low"), (state.clip_high, "high")):
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "line": {"shape": "hvh", "color": QUANTIZED_COLOR, "width": 2},
                    "name": "clipping range",
                    "x": x,
                    "y": list(end),
                    "showlegend": panel == 0 and word == "high",
                    **axis,
                }
            )
    return Chart(f"channels_{place}", "Range of each channel, and the clipping range", traces, layout, 460)


def histogram_chart(view: TensorView, place: int) -> Chart:
    """The values in FP32 and quantized, with the clipping range and the grid, before and after."""
    states, layout = _panels(view, "log", "value", "values")
    layout["shapes"] = []
    traces: list[dict[str, Any]] = []
    for panel, state in enumerate(states):
        axis = "y" if panel == 0 else "y2"
        centres = [(a + b) / 2 for a, b in zip(state.edges, state.edges[1:], strict=False)]
        width = state.edges[1] - state.edges[0] if len(state.edges) > 1 else 1.0
        common = {"x": centres, "yaxis": axis, "showlegend": panel == 0}
        traces += [
            {
                "type": "bar",
                "name": "FP32",
                "y": _positive(state.fp32),
                "width": width,
                "marker": {"color": FP32_COLOR, "opacity": 0.45},
                **common,
            },
            {
                "type": "scatter",
                "mode": "lines",
                "line": {"shape": "hvh", "color": QUANTIZED_COLOR, "width": 1.5},
                "name": "quantized",
                "y": _positive(state.quantized),
                **common,
            },
        ]
        if state.grid:
            traces.append(_rug(state, axis, panel == 0))
        ends = (min(state.clip_low, default=None), max(state.clip_high, default=None))
        layout["shapes"] += [_clip(end, axis) for end in ends if end is not None]
        noise = state.clipping + state.rounding
        share = f", {state.clipping / noise:.0%} of the noise is clipping" if noise > 0 else ""
        layout["annotations"][panel]["text"] += f", SQNR {number(state.sqnr_db)} dB{share}"
    return Chart(f"histogram_{place}", "Values in FP32 and quantized, clipping range, grid", traces, layout, 460)


def _positive(counts: Iterable[int]) -> list[int | None]:
    """Counts for a logarithmic axis, which knows no 0."""
    return [count or None for count in counts]


def _rug(state: TensorState, axis: str, in_legend: bool) -> dict[str, Any]:
    """The levels of the grid as ticks at the bottom."""
    inside = [level for level in state.grid if state.edges[0] <= level <= state.edges[-1]]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "grid",
        "x": inside,
        "y": [1] * len(inside),
        "yaxis": axis,
        "marker": {"symbol": "line-ns-open", "size": 9, "color": NEUTRAL_COLOR, "line": {"width": 1.5}},
        "hoverinfo": "x",
        "showlegend": in_legend,
    }


def _clip(value: float, axis: str) -> dict[str, Any]:
    """A dashed line at an end of the clipping range."""
    return {
        "type": "line",
        "x0": value,
        "x1": value,
        "y0": 0,
        "y1": 1,
        "yref": f"{axis} domain",
        "line": {"color": QUANTIZED_COLOR, "dash": "dash", "width": 1.5},
    }


def noise_chart(view: TensorView, place: int) -> Chart:
    """Rounding and clipping noise at all moments of the walk."""
    titles = [
        f"{title}, {state.bit_width} bits"
        for title, state in zip(step_titles([state.step for state in view.states]), view.states, strict=True)
    ]
    parts: tuple[tuple[str, Callable[[TensorState], float], str, str], ...] = (
        ("rounding", lambda state: state.rounding, FP32_COLOR, ""),
        ("clipping", lambda state: state.clipping, QUANTIZED_COLOR, "/"),
    )
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": name,
            "y": list(range(len(titles))),
            "x": [value(state) for state in view.states],
            "marker": {"color": color, "pattern": {"shape": shape}},
            "hoverinfo": "x+name",
        }
        for name, value, color, shape in parts
    ]
    notes = [
        {
            "x": state.rounding + state.clipping,
            "y": place_of,
            "text": f" SQNR {number(state.sqnr_db)} dB",
            "showarrow": False,
            "xanchor": "left",
        }
        for place_of, state in enumerate(view.states)
    ]
    most = max(state.rounding + state.clipping for state in view.states)
    layout = {
        "barmode": "stack",
        "showlegend": True,
        "xaxis": _axis("mean squared error", range=[0, 1.35 * most or 1.0]),
        "yaxis": _names_axis(titles),
        "annotations": notes,
    }
    return Chart(f"noise_{place}", "Rounding and clipping noise over the walk", traces, layout, 150 + 34 * len(titles))


def heat_chart(found: HeatMap, view: TensorView, place: int) -> Chart:
    """Greatest magnitude by two axes of the tensor, and the noise below."""
    rows, columns = [str(index) for index in found.row_indices], [str(index) for index in found.column_indices]
    traces = []
    for panel, (name, values) in enumerate((("greatest magnitude", found.values), ("noise (rms)", found.noise))):
        axis = "" if panel == 0 else "2"
        traces.append(
            {
                "type": "heatmap",
                "z": [list(row) for row in values],
                "x": columns,
                "y": rows,
                "yaxis": f"y{axis}",
                "colorscale": "Cividis",
                "colorbar": {"title": {"text": name}, "len": 0.46, "y": 0.77 - 0.54 * panel},
                "hovertemplate": f"{found.rows} %{{y}}, {found.columns} %{{x}}: %{{z:.4g}}<extra>{name}</extra>",
            }
        )
    some = (
        f"{found.rows} ({len(rows)} of {found.total_rows})",
        f"{found.columns} ({len(columns)} of {found.total_columns})",
    )
    layout = {
        "xaxis": _axis(some[1], type="category", anchor="y2"),
        "yaxis": _axis(some[0], type="category", autorange="reversed", domain=[0.54, 1.0]),
        "yaxis2": _axis(some[0], type="category", autorange="reversed", domain=[0.0, 0.46]),
    }
    return Chart(f"heat_map_{place}", f"By {found.rows} and {found.columns}", traces, layout, 560)

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

from lightning_quantdebug import figure_style as style
from lightning_quantdebug.heat_map_figure import heat_map, outstanding
from lightning_quantdebug.report import Report
from lightning_quantdebug.review_data import FP32_COLOR, QUANTIZED_COLOR, REPAIRED_COLOR
from lightning_quantdebug.tensor_figures import of_tensor
from lightning_quantdebug.visuals import TensorView
from tests.drawn import LONG, MATH, clipped_tensor, flaws, massive_activation, wide_channel, words
from tests.report_examples import HOSTILE
from tests.visual_examples import hostile_visuals, image_report, sentence_report

NAN = float("nan")


def cnn() -> TensorView:
    return image_report().visuals.tensors[0]


def transformer() -> TensorView:
    return sentence_report().visuals.tensors[0]


VIEWS: dict[str, Callable[[], TensorView]] = {
    "cnn": cnn,
    "transformer": transformer,
    "hostile": lambda: hostile_visuals().tensors[0],
    "wide": wide_channel,
    "massive": massive_activation,
    "clipped": clipped_tensor,
    "long": lambda: replace(wide_channel(1e6), quantizer=LONG, why=LONG, channel_axis=LONG),
    "one value": lambda: replace(cnn(), channels=(0,), total_channels=1, channel_axis="value"),
}


@cache
def pictures_of(name: str) -> dict[str, Figure]:
    return of_tensor(VIEWS[name]())


def panels(name: str, key: str) -> list[Axes]:
    return pictures_of(name)[key].axes


# All pictures.


@pytest.mark.parametrize("name", VIEWS)
def test_every_text_lies_on_the_paper_is_large_enough_and_lies_on_no_other_text(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {key: list(flaws(figure)) for key, figure in pictures_of(name).items()}
        assert all(style.pixels(figure).shape == (735, 1050, 3) for figure in pictures_of(name).values())
    assert found == {key: [] for key in found}


def test_pictures_come_in_the_order_of_reading_and_those_without_data_are_left_out() -> None:
    assert list(pictures_of("cnn")) == ["channel_ranges", "histogram", "noise"]
    assert list(pictures_of("transformer")) == ["channel_ranges", "histogram", "noise", "heat_map"]
    assert of_tensor(replace(cnn(), states=())) == {}


def test_names_are_printed_as_they_are() -> None:
    assert f"{MATH}: histogram" in words(pictures_of("massive")["histogram"])
    title = pictures_of("hostile")["histogram"].get_suptitle()
    assert title.endswith(": histogram")
    assert title.isprintable()
    assert HOSTILE not in title


def test_numbers_that_json_could_not_hold_are_left_out() -> None:
    def lost(values: tuple) -> tuple:
        return (NAN, *values[1:])

    view = transformer()
    assert view.heat_map is not None
    state = view.states[0]
    state = replace(
        state,
        low=lost(state.low),
        clip_high=lost(state.clip_high),
        channel_sqnr_db=lost(state.channel_sqnr_db),
        sqnr_db=None,
        clipping=NAN,
    )
    cells = replace(view.heat_map, values=(lost(view.heat_map.values[0]), *view.heat_map.values[1:]))
    report = replace(
        image_report(),
        visuals=replace(image_report().visuals, tensors=(replace(view, states=(state,), heat_map=cells),)),
    )
    read = Report.from_dict(report.to_dict()).visuals.tensors[0]
    assert read.states[0].low[0] is None
    figures = of_tensor(read)
    assert list(figures) == ["channel_ranges", "histogram", "noise", "heat_map"]
    assert "8 bits" in words(figures["noise"])
    assert figures["heat_map"].axes[0].images[0].get_array()[0, 0] == pytest.approx(scale_of(figures["heat_map"]).vmin)
    broken = replace(state, low=(NAN,) * 48, edges=(NAN,) * 65, rounding=NAN)
    assert of_tensor(replace(view, states=(broken,), heat_map=None)) == {}


def scale_of(figure: Figure) -> LogNorm:
    return figure.axes[0].images[0].norm


# Ranges.


def test_bars_reach_from_the_least_value_to_the_greatest_under_the_clipping_range() -> None:
    view = cnn()
    axes = panels("cnn", "channel_ranges")
    assert len(axes) == 2
    for panel, state in zip(axes, (view.states[0], view.states[-1]), strict=True):
        bars = [patch for patch in panel.patches if not isinstance(patch, StepPatch)]
        assert np.allclose([bar.get_x() + bar.get_width() / 2 for bar in bars], range(24))
        assert np.allclose([bar.get_y() for bar in bars], state.low)
        assert np.allclose([bar.get_y() + bar.get_height() for bar in bars], state.high)
        low, high = [patch for patch in panel.patches if isinstance(patch, StepPatch)]
        assert np.allclose(low.get_data().values, state.clip_low)
        assert np.allclose(high.get_data().values, state.clip_high)
        assert to_hex(low.get_edgecolor()).upper() == QUANTIZED_COLOR
    assert [panel.get_title(loc="left") for panel in axes] == [
        "as quantized: 8 bits, per tensor",
        "final: 4 bits, per tensor",
    ]
    assert axes[0].get_ylim() == axes[1].get_ylim()
    assert {"values in FP32", "clipping range", "channel", "value"} <= set(words(pictures_of("cnn")["channel_ranges"]))
    assert pictures_of("cnn")["channel_ranges"].get_suptitle() == "features.1.conv.1: uneven channel ranges"


def test_only_one_look_is_one_panel() -> None:
    assert len(panels("transformer", "channel_ranges")) == 1
    assert len(panels("transformer", "histogram")) == 1


def test_beside_a_channel_a_hundred_times_wider_the_others_are_legible() -> None:
    figure = pictures_of("wide")["channel_ranges"]
    for panel, state in zip(figure.axes, wide_channel().states, strict=True):
        assert panel.get_yscale() == "symlog"
        assert panel.get_ylabel() == "value (symlog)"
        ends = panel.transData.transform([(0, state.low[5]), (0, state.high[5])])[:, 1]
        # In the card each of its pixels is three of ours.
        assert (ends[1] - ends[0]) / 3 > 12
        assert panel.get_ylim()[0] < min(state.clip_low)
        assert max(state.clip_high) < panel.get_ylim()[1]
    assert {"100", "10", "0", "-10", "-100"} <= set(words(figure))
    assert panels("cnn", "channel_ranges")[0].get_yscale() == "linear"


def test_channels_have_their_own_indices_and_those_left_out_are_counted() -> None:
    view = wide_channel()
    view = replace(view, channels=tuple(range(100, 148)))
    panel = of_tensor(view)["channel_ranges"].axes[-1]
    assert panel.get_xlabel() == "output channel (48 of 960 shown)"
    labels = [int(label.get_text()) - 100 for label in panel.get_xticklabels()]
    assert labels == list(panel.get_xticks())
    assert len(labels) > 8
    assert panels("cnn", "channel_ranges")[-1].get_xlabel() == "channel"


# The histogram.


def test_counts_stand_over_their_bins() -> None:
    view = cnn()
    for panel, state in zip(panels("cnn", "histogram"), (view.states[0], view.states[-1]), strict=True):
        exact, quantized = [patch for patch in panel.patches if isinstance(patch, StepPatch)]
        for steps, counts in ((exact, state.fp32), (quantized, state.quantized)):
            data = steps.get_data()
            assert np.allclose(data.edges, state.edges)
            assert np.allclose(data.values, np.maximum(counts, 0.5))
        assert exact.get_fill()
        assert not quantized.get_fill()
        assert panel.get_yscale() == "log"
        assert panel.get_ylim()[1] > max(state.quantized)


def test_the_clipping_range_is_marked_with_its_values() -> None:
    panel = panels("cnn", "histogram")[0]
    state = cnn().states[0]
    dashed = [line for line in panel.lines if line.is_dashed()]
    assert [line.get_xdata()[0] for line in dashed] == [min(state.clip_low), max(state.clip_high)]
    assert [text.get_text() for text in panel.texts] == ["clip -9.08", "clip 9.01"]
    assert [text.xy[0] for text in panel.texts] == [min(state.clip_low), max(state.clip_high)]
    assert panel.get_xlim()[0] < min(state.clip_low)
    assert max(state.clip_high) < panel.get_xlim()[1]


def test_labels_stand_outside_a_narrow_range_and_inside_a_wide_one() -> None:
    sides = [[text.get_ha() for text in panel.texts] for panel in panels("clipped", "histogram")]
    assert sides == [["right", "left"], ["left", "right"]]
    assert [text.get_ha() for text in panels("cnn", "histogram")[0].texts] == ["left", "right"]


def test_a_range_much_wider_than_the_values_is_written_at_the_border() -> None:
    panel = panels("clipped", "histogram")[1]
    assert [text.get_text() for text in panel.texts] == ["← clip -500", "clip 800 →"]
    assert not [line for line in panel.lines if line.is_dashed()]
    edges = clipped_tensor().states[-1].edges
    assert panel.get_xlim() == pytest.approx((edges[0], edges[-1]), abs=0.1 * (edges[-1] - edges[0]))


def test_the_grid_is_a_rug_where_it_is_known() -> None:
    eight, four = panels("cnn", "histogram")
    marks = [line for line in four.lines if line.get_marker() == "|"]
    inside = [level for level in cnn().states[-1].grid if four.get_xlim()[0] <= level <= four.get_xlim()[1]]
    assert len(inside) == 16
    assert list(marks[0].get_xdata()) == inside
    assert [len(line.get_xdata()) for line in eight.lines if line.get_marker() == "|"] == [0]
    assert "grid" in words(pictures_of("cnn")["histogram"])
    assert "grid" not in words(pictures_of("transformer")["histogram"])


def test_shares_of_the_noise_are_said() -> None:
    titles = [panel.get_title(loc="left") for panel in panels("clipped", "histogram")]
    assert titles == [
        "as quantized, 4 bits: noise 5 % rounding, 95 % clipping",
        "final, 8 bits: noise 100 % rounding, 0 % clipping",
    ]
    state = replace(cnn().states[0], rounding=0.0, clipping=0.0)
    figure = of_tensor(replace(cnn(), states=(state,)))["histogram"]
    assert figure.axes[0].get_title(loc="left") == "as quantized, 8 bits: no noise"


def test_a_tensor_without_counts_has_no_histogram() -> None:
    state = replace(cnn().states[0], fp32=(0,) * 64)
    assert "histogram" not in of_tensor(replace(cnn(), states=(state,)))
    assert "histogram" not in of_tensor(replace(cnn(), states=(replace(state, edges=()),)))


# Noise.


def test_clipping_stands_behind_rounding_at_each_look() -> None:
    view = cnn()
    panel = panels("cnn", "noise")[0]
    bars = panel.patches
    for row, state in enumerate(view.states):
        rounding, clipping = bars[2 * row], bars[2 * row + 1]
        assert (rounding.get_x(), rounding.get_width()) == (0, pytest.approx(state.rounding))
        assert (clipping.get_x(), clipping.get_width()) == (
            pytest.approx(state.rounding),
            pytest.approx(state.clipping),
        )
        assert rounding.get_y() + rounding.get_height() / 2 == pytest.approx(row)
        assert to_hex(rounding.get_facecolor()).upper() == FP32_COLOR
        assert clipping.get_hatch()
        assert not rounding.get_hatch()
    assert [text.get_text() for text in panel.texts] == [
        f"SQNR {state.sqnr_db:.1f} dB at {state.bit_width} bits" for state in view.states
    ]
    names = [label.get_text() for label in panel.get_yticklabels()]
    assert names == ["as quantized", "after fix_weights", "final"]
    assert panel.get_ylim()[0] > panel.get_ylim()[1]
    assert {"rounding", "clipping", "mean squared error"} <= set(words(pictures_of("cnn")["noise"]))


def test_of_many_looks_the_first_and_the_last_five_are_drawn() -> None:
    panel = panels("clipped", "noise")[0]
    assert len(clipped_tensor().states) == 7
    assert [label.get_text() for label in panel.get_yticklabels()] == [
        "as quantized",
        "after fix_activations",
        "after fix_quantizers",
        "final",
        "after QAT",
        "final",
    ]
    assert panel.texts[0].get_text() == "SQNR 36.0 dB at 4 bits"


def test_the_sqnr_of_each_channel_moves_from_hollow_to_filled() -> None:
    view = cnn()
    panel = panels("cnn", "noise")[1]
    before, after = panel.lines
    assert np.allclose(before.get_ydata(), view.states[0].channel_sqnr_db)
    assert np.allclose(after.get_ydata(), view.states[-1].channel_sqnr_db)
    assert (before.get_markerfacecolor(), after.get_markerfacecolor()) == (style.PAPER, REPAIRED_COLOR)
    assert panel.get_title(loc="left") == "SQNR of each channel: ○ as quantized, ● final"
    segments = panel.collections[0].get_segments()
    assert np.allclose(segments[3], [(3, before.get_ydata()[3]), (3, after.get_ydata()[3])])


def test_a_channel_without_sqnr_is_left_out_and_a_tensor_without_channels_has_one_panel() -> None:
    view = cnn()
    state = replace(view.states[0], channel_sqnr_db=(None, *view.states[0].channel_sqnr_db[1:]))
    panel = of_tensor(replace(view, states=(state,)))["noise"].axes[1]
    assert np.isnan(panel.lines[0].get_ydata()[0])
    assert not np.isnan(panel.lines[0].get_ydata()[1:]).any()
    assert len(panels("one value", "noise")) == 1


# Tokens and channels.


def test_what_stands_out_is_named_and_ringed() -> None:
    view = transformer()
    figure = pictures_of("transformer")["heat_map"]
    above, below = figure.axes[:2]
    assert view.heat_map is not None
    shown = np.asarray(above.images[0].get_array())
    values = np.array(view.heat_map.values)
    norm = scale_of(figure)
    assert np.allclose(shown, np.maximum(values, norm.vmin))
    assert np.asarray(below.images[0].get_array()).shape == values.shape
    assert above.get_title(loc="left") == "greatest magnitude: token 0 and channel 14"
    bold = {
        (axis, label.get_text()): position
        for axis, labels, positions in (
            ("token", above.get_yticklabels(), above.get_yticks()),
            ("channel", below.get_xticklabels(), below.get_xticks()),
        )
        for label, position in zip(labels, positions, strict=True)
        if label.get_fontweight() == "bold"
    }
    assert bold == {("token", "0"): 0, ("channel", "14"): 7}
    assert [label.get_text() for label in below.get_xticklabels()] == ["14", "0", "94"]
    row, column = np.unravel_index(values.argmax(), values.shape)
    assert above.lines[0].get_xydata().tolist() == [[column, row]]
    assert below.get_xlabel() == "channel (48 of 96 channels shown)"


def test_colours_are_logarithmic_readable_by_the_colour_blind_and_dark_for_the_bulk() -> None:
    figure = pictures_of("massive")["heat_map"]
    image = figure.axes[0].images[0]
    assert image.get_cmap().name == "cividis"
    assert isinstance(scale_of(figure), LogNorm)
    cells = massive_activation().heat_map
    assert cells is not None
    median = float(np.median(np.array(cells.values)))
    assert scale_of(figure)(median) < 0.2
    assert scale_of(figure)(2000.0) == pytest.approx(1.0)
    assert [label.get_text() for label in figure.axes[2].get_yticklabels()][-1] == "2000"
    assert figure.axes[1].get_xlabel() == "channel (64 of 3072 channels, 32 of 512 tokens shown)"


def test_an_even_map_is_in_the_middle_of_the_scale_and_has_no_ring() -> None:
    view = transformer()
    assert view.heat_map is not None
    even = replace(view.heat_map, values=view.heat_map.noise)
    figure = heat_map("norm", even)
    assert figure is not None
    assert scale_of(figure)(0.02) == pytest.approx(0.5)
    assert figure.axes[0].get_title(loc="left") == "greatest magnitude: nothing stands out"
    assert not figure.axes[0].lines


def test_values_far_below_the_greatest_share_a_colour() -> None:
    view = transformer()
    assert view.heat_map is not None
    values = tuple(tuple(1e-9 for _ in row) for row in view.heat_map.values)
    values = ((5.0, *values[0][1:]), *values[1:])
    figure = heat_map("norm", replace(view.heat_map, values=values))
    assert figure is not None
    assert scale_of(figure).vmin == pytest.approx(5e-4)


def test_zeros_alone_are_no_map() -> None:
    view = transformer()
    assert view.heat_map is not None
    zeros = tuple((0.0,) * 48 for _ in range(24))
    assert heat_map("norm", replace(view.heat_map, values=zeros)) is None
    assert heat_map("norm", replace(view.heat_map, noise=zeros)) is not None


def test_at_most_three_peaks_stand_out_and_gaussian_ones_hardly_ever() -> None:
    random = np.random.default_rng(0)
    peaks = np.abs(random.normal(size=(200, 48)))
    assert sum(len(outstanding(row)) for row in peaks) <= 200 * 48 / 1000
    assert outstanding(np.array([1, 30, 1, 1, 20, 1, 40, 1, 50, 1, 1, 1.0])) == [8, 6, 1]
    assert outstanding(np.ones(4)) == []

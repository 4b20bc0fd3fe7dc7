import io
import itertools
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from lightning_quantdebug import figure_style as style
from lightning_quantdebug import flow_chart_figure as chart
from lightning_quantdebug.figures import overview
from lightning_quantdebug.report import Final, QuantizerSetting, Report, Step, StepName, StepVerdict, Verdict
from lightning_quantdebug.review_data import (
    FP32_COLOR,
    NEUTRAL_COLOR,
    QUANTIZED_COLOR,
    REPAIRED_COLOR,
    permitted_loss,
    waterfall,
    worst_permitted_score,
)
from lightning_quantdebug.short_names import short_names
from lightning_quantdebug.tensor_figures import of_tensor
from lightning_quantdebug.visuals import Flip, Predictions, Visuals
from tests.drawn import HARD_REPORTS, MATH, drawn_texts, flaws, many_remedies, with_visuals, words
from tests.report_examples import full_report, hostile_report
from tests.visual_examples import hostile_visuals, image_report, picture, sentence_report

KEYS = [
    "flow_chart",
    "waterfall",
    "ranking_weights",
    "ranking_activations",
    "bits_over_depth",
    "class_shift",
    "flipped_samples",
]
REPORTS: dict[str, Callable[[], Report]] = {
    **HARD_REPORTS,
    "image": image_report,
    "sentence": sentence_report,
    "full": full_report,
    "hostile": hostile_report,
    "hostile_visuals": lambda: replace(image_report(), visuals=hostile_visuals()),
}


@cache
def pictures_of(name: str) -> dict[str, Figure]:
    """The pictures of a report, drawn once: for tests that only look at them."""
    return overview(REPORTS[name]())


def hexes(colors: list) -> list[str]:
    return [to_hex(color).upper() for color in colors]


# All pictures.


@pytest.mark.parametrize("name", REPORTS)
def test_every_text_lies_on_the_paper_is_large_enough_and_lies_on_no_other_text(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = {key: list(flaws(figure)) for key, figure in pictures_of(name).items()}
    assert found == {key: [] for key in found}


def test_pictures_come_in_the_order_of_reading_and_those_without_data_are_left_out() -> None:
    assert list(pictures_of("image")) == KEYS
    assert list(pictures_of("full")) == [*KEYS[:2], *KEYS[3:5]]
    assert list(pictures_of("bare")) == KEYS[:1]
    assert overview(Report()) == {}
    nothing = Step(StepName.QAT, StepVerdict.SKIPPED)
    assert overview(Report(steps=(nothing,), final=Final(0.5))) == {}


def test_a_report_that_was_written_and_read_gives_the_same_pictures() -> None:
    report = image_report()
    again = Report.from_dict(report.to_dict())
    for one, other in zip(pictures_of("image").values(), overview(again).values(), strict=True):
        assert words(one) == words(other)


def test_a_report_whose_numbers_are_all_lost_is_drawn_as_far_as_possible() -> None:
    report = HARD_REPORTS["not_a_number"]()
    report = replace(report, baseline=replace(report.baseline, score=float("nan")))
    assert list(overview(Report.from_dict(report.to_dict()))) == KEYS
    without_check = replace(report, steps=report.steps[1:])
    assert list(overview(Report.from_dict(without_check.to_dict()))) == [KEYS[0], *KEYS[2:]]


def test_names_are_no_formulas() -> None:
    report = image_report()
    row = replace(report.sensitivity[0], quantizer=MATH)
    settings = {**report.settings, "monitor": MATH}
    figures = overview(replace(report, sensitivity=(row, *report.sensitivity[1:]), settings=settings))
    assert f"Flow chart: {MATH} in each box" in words(figures["flow_chart"])
    assert MATH in words(figures["ranking_activations"])


def test_all_pictures_of_a_walk_take_less_than_20_seconds_on_one_core() -> None:
    report = image_report()
    view = replace(sentence_report().visuals.tensors[0], states=report.visuals.tensors[0].states)
    begin = time.process_time()
    drawn = [*overview(report).values(), *itertools.chain(*(of_tensor(view).values() for _ in range(6)))]
    assert len(drawn) == 7 + 6 * 4
    assert all(style.png(figure) for figure in drawn)
    assert time.process_time() - begin < 20


# The style.


def test_a_picture_has_three_opaque_pixels_for_each_of_tensorboards() -> None:
    for figure in pictures_of("image").values():
        pixels = style.pixels(figure)
        assert pixels.shape == (735, 1050, 3)
        assert pixels.dtype == np.uint8
        assert to_hex(pixels[0, -1] / 255).upper() == style.PAPER
        assert to_hex(pixels[-1, 0] / 255).upper() == style.PAPER


def test_each_pixel_is_the_weighted_mean_of_nine() -> None:
    figure = pictures_of("image")["flow_chart"]
    smooth = style.pixels(figure)
    sharp = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(float)
    for row, column in ((100, 30), (300, 517), (610, 800)):
        around = sharp[row - 1 : row + 2, column - 1 : column + 2]
        weights = np.outer([3, 4, 3], [3, 4, 3])[..., None] / 100
        assert np.abs((around * weights).sum((0, 1)) - smooth[row, column]).max() <= 1
    assert (smooth != sharp).any()


def test_the_png_holds_the_picture_as_it_is_drawn() -> None:
    figure = pictures_of("image")["waterfall"]
    with Image.open(io.BytesIO(style.png(figure))) as image:
        assert image.mode == "RGB"
        sharp = np.asarray(figure.canvas.buffer_rgba())[..., :3]  # type: ignore[attr-defined] # png has made it Agg's
        assert (np.asarray(image) == sharp).all()
        assert (np.asarray(image) != style.pixels(figure)).any()


def test_any_figure_can_be_drawn() -> None:
    assert style.pixels(Figure(figsize=(2, 1), dpi=50)).shape == (50, 100, 3)


def test_the_users_matplotlib_is_untouched() -> None:
    with matplotlib.rc_context({"font.size": 33, "text.color": "red"}):
        mine = plt.figure()
        before, backend = dict(matplotlib.rcParams), matplotlib.get_backend()
        figures = [*overview(image_report()).values(), *of_tensor(image_report().visuals.tensors[0]).values()]
        for figure in figures:
            style.png(figure)
        assert dict(matplotlib.rcParams) == before
        assert matplotlib.get_backend() == backend
        assert plt.get_fignums() == [mine.number]
        assert plt.gcf() is mine
        plt.close(mine)


def test_settings_are_given_back_when_drawing_fails() -> None:
    before = dict(matplotlib.rcParams)
    with pytest.raises(RuntimeError, match="stop"), style.house_style():
        raise RuntimeError("stop")
    assert dict(matplotlib.rcParams) == before


def test_the_users_settings_do_not_show_in_the_pictures() -> None:
    report = image_report()
    expected = {name: style.pixels(figure) for name, figure in pictures_of("image").items()}
    theirs = {
        "text.usetex": True,
        "font.size": 30,
        "font.family": "serif",
        "figure.facecolor": "black",
        "axes.facecolor": "black",
        "axes.grid": True,
        "lines.linewidth": 9,
        "figure.dpi": 33,
        "savefig.transparent": True,
        "figure.constrained_layout.h_pad": 1.0,
    }
    with matplotlib.rc_context(theirs):
        for name, figure in overview(report).items():
            assert (style.pixels(figure) == expected[name]).all(), name


def test_text_is_cut_to_a_width() -> None:
    assert style.fitted("abc", 100) == "abc"
    for text in ("features.3.conv.0.weight", "W" * 1000, "i" * 1000):
        shown = style.fitted(text, 60)
        assert shown.endswith("…")
        assert style.text_width(shown) <= 60
        longer = text[: len(shown)] + "…"
        assert style.text_width(longer) > 60
    assert style.fitted("abc", 1) == "…"


# The flow chart.


def walk(report: Report, verdict: Verdict | None, *steps: str, skipped: tuple[str, ...] = ()) -> Report:
    taken = [Step(StepName(name), StepVerdict.PASSED, 0.5, 0.1) for name in steps]
    left = [Step(StepName(name), StepVerdict.SKIPPED) for name in skipped]
    return replace(report, steps=(*taken, *left), verdict=verdict)


def highlighted(figure: Figure) -> list[str]:
    return [line.get_gid() for line in figure.axes[0].lines if line.get_linewidth() > 2]


HEALTHY = ("fp32_check", "activations", "weights", "quantize_model")
WALKS = {
    "accepted": (Verdict.ACCEPTED, HEALTHY, "fp32_check>activations>weights>quantize_model>accepted"),
    "broken": (Verdict.BROKEN_PIPELINE, HEALTHY[:1], "fp32_check>broken_pipeline"),
    "weights cured": (
        Verdict.REPAIRED,
        (*HEALTHY[:3], "fix_weights", "quantize_model"),
        "fp32_check>activations>weights>fix_weights>fix_activations>quantize_model>accepted",
    ),
    "activations cured": (
        Verdict.REPAIRED,
        (*HEALTHY[:3], "fix_activations", "quantize_model"),
        "fp32_check>activations>weights>fix_activations>quantize_model>accepted",
    ),
    "exhaustive": (
        Verdict.ACCEPTED,
        (*HEALTHY[:3], "per_quantizer", "quantize_model"),
        "fp32_check>activations>weights>fix_activations>per_quantizer>visualize>fix_quantizers>quantize_model>accepted",
    ),
    "all": (
        Verdict.REPAIRED_BY_QAT,
        tuple(name.value for name in StepName),
        "fp32_check>activations>weights>fix_weights>fix_activations>per_quantizer>visualize>fix_quantizers"
        ">quantize_model>qat>repaired_by_qat",
    ),
    "no pictures": (
        Verdict.NOT_ACCEPTED,
        tuple(name.value for name in StepName if name.value not in ("visualize", "qat")),
        "fp32_check>activations>weights>fix_weights>fix_activations>per_quantizer>visualize>fix_quantizers"
        ">quantize_model>qat>not_accepted",
    ),
    "broke off": (Verdict.FAILED, HEALTHY[:2], "fp32_check>activations>"),
    "under way": (None, HEALTHY[:2], "fp32_check>activations"),
}


@pytest.mark.parametrize("name", WALKS)
def test_the_way_of_the_walk_is_highlighted(name: str) -> None:
    verdict, steps, way = WALKS[name]
    figure = overview(walk(image_report(), verdict, *steps))["flow_chart"]
    stops = way.split(">")
    assert highlighted(figure) == [f"{here}>{there}" for here, there in itertools.pairwise(stops)]
    assert not list(flaws(figure))


def test_the_chart_has_the_boxes_and_arrows_of_the_readme() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    block = readme.split("flowchart TD\n")[1].split("```")[0]
    arrows = []
    for line in block.splitlines():
        names = [part.strip() for part in re.split(r"-->|-\.->", re.sub(r'\[".*?"\]|\|.*?\|', "", line))]
        arrows += itertools.pairwise(names)
    renamed = [tuple("broken_pipeline" if name == "broken" else name for name in arrow) for arrow in arrows]
    assert len(renamed) == 16
    assert set(chart.ARROWS) == set(renamed)


def test_every_box_tells_what_its_step_found() -> None:
    figure = pictures_of("image")["flow_chart"]
    told: dict[str, list[str]] = {}
    for text in figure.axes[0].texts:
        told.setdefault(text.get_gid().removeprefix("text "), []).append(text.get_text())
    assert told["weights"] == ["weights", "0.5, loss 0.43", "✗ failed"]
    assert told["activations"] == ["activations", "0.926, loss 0.004", "✓ passed"]
    assert told["visualize"] == ["visualize", "✓ passed"]
    assert told["qat"] == ["qat", "skipped"]
    assert told["accepted"] == ["✓ repaired", "0.924, loss 0.006"]
    assert told["not_accepted"] == ["not_accepted"]
    assert set(told) == {name.value for name in StepName} | {
        "broken_pipeline",
        "accepted",
        "repaired_by_qat",
        "not_accepted",
    }


def test_noise_broken_and_failed_walks_are_said_in_words() -> None:
    report = walk(image_report(), Verdict.FAILED, "fp32_check", "activations")
    steps = (replace(report.steps[0], verdict=StepVerdict.NOISE), replace(report.steps[1], verdict=StepVerdict.BROKEN))
    figure = overview(replace(report, steps=steps))["flow_chart"]
    assert {"≈ noise", "✗ broken", "✗ walk failed"} <= set(words(figure))
    assert "✗ walk failed" not in words(pictures_of("image")["flow_chart"])


def boxes_of(figure: Figure) -> dict[str, tuple[float, float, float, float]]:
    patches = [patch for patch in figure.axes[0].patches if (patch.get_gid() or "").startswith("box ")]
    return {patch.get_gid().removeprefix("box "): patch.get_path().get_extents().extents for patch in patches}


def test_boxes_taken_are_thick_and_the_others_pale() -> None:
    figure = pictures_of("image")["flow_chart"]
    edges = {
        patch.get_gid()[4:]: (to_hex(patch.get_edgecolor()).upper(), patch.get_linewidth())
        for patch in figure.axes[0].patches
        if patch.get_gid()
    }
    assert edges["weights"] == (QUANTIZED_COLOR, 2.0)
    assert edges["activations"] == (REPAIRED_COLOR, 2.0)
    assert edges["qat"] == edges["not_accepted"] == edges["broken_pipeline"] == (style.PALE, 0.9)
    assert edges["accepted"] == (REPAIRED_COLOR, 2.6)


@pytest.mark.parametrize("step", [name.value for name in StepName])
def test_no_text_leaves_its_box_no_box_meets_another_and_no_arrow_crosses_a_box(step: str) -> None:
    steps = [name.value for name in StepName]
    report = walk(image_report(), Verdict.FAILED, *steps[: steps.index(step) + 1])
    steps_with_long_numbers = [replace(each, score=-123456.789, loss=-0.000123456) for each in report.steps]
    figure = overview(replace(report, steps=tuple(steps_with_long_numbers)))["flow_chart"]
    boxes = boxes_of(figure)
    assert len(boxes) == 15
    assert highlighted(figure)[-1] == f"{step}>"
    for _, extent, text in drawn_texts(figure):
        if text.get_gid():
            left, low, right, high = boxes[text.get_gid().removeprefix("text ")]
            inside = extent.transformed(figure.axes[0].transData.inverted())
            assert left + 1 < inside.x0
            assert inside.x1 < right - 1
            assert low < inside.y0
            assert inside.y1 < high
    for one, other in itertools.combinations(boxes.values(), 2):
        assert one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
    for line in figure.axes[0].lines:
        here, there = line.get_gid().split(">")
        for begin, end in itertools.pairwise(zip(*line.get_data(), strict=True)):
            for name, box in boxes.items():
                assert name in (here, there) or not crosses(begin, end, box), (line.get_gid(), name)


def crosses(begin: tuple[float, float], end: tuple[float, float], box: tuple[float, float, float, float]) -> bool:
    low, high = np.minimum(begin, end), np.maximum(begin, end)
    return bool(low[0] < box[2] and box[0] < high[0] + 1e-9 and low[1] < box[3] and box[1] < high[1] + 1e-9)


def test_arrows_begin_in_their_box_and_their_tips_touch_the_next() -> None:
    figure = pictures_of("image")["flow_chart"]
    boxes = boxes_of(figure)
    tips = [patch.get_xy()[1] for patch in figure.axes[0].patches if not patch.get_gid()]
    lines = figure.axes[0].lines
    assert len(tips) == len(lines) == len(chart.ARROWS)
    for line, tip in zip(lines, tips, strict=True):
        here, there = (boxes[name] for name in line.get_gid().split(">"))
        x, y = (data[0] for data in line.get_data())
        assert here[0] <= x <= here[2]
        assert here[1] <= y <= here[3]
        gaps = (abs(tip[0] - there[0]), abs(tip[0] - there[2]), abs(tip[1] - there[1]), abs(tip[1] - there[3]))
        assert min(gaps) < 1e-6


# The waterfall.


def bars_of(figure: Figure) -> list[tuple[float, float]]:
    return [(bar.get_x(), bar.get_x() + bar.get_width()) for bar in figure.axes[0].patches]


def test_bars_float_from_one_score_to_the_next() -> None:
    report = image_report()
    figure = pictures_of("image")["waterfall"]
    axes = figure.axes[0]
    begin = axes.get_xlim()[0]
    scores = [stage.score for stage in waterfall(report)]
    assert scores == [0.93, 0.48, 0.74, 0.82, 0.84, 0.925, 0.924]
    expected = [(begin, 0.93), *itertools.pairwise(scores[:-1]), (begin, 0.924)]
    assert np.allclose(bars_of(figure), expected)
    colors = [FP32_COLOR, QUANTIZED_COLOR, *[REPAIRED_COLOR] * 4, NEUTRAL_COLOR]
    assert hexes([bar.get_facecolor() for bar in axes.patches]) == colors
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [stage.label for stage in waterfall(report)]
    assert [axes.get_ylim()[0] > row for row in range(7)] == [True] * 7
    shown = [text.get_text() for text in axes.texts]
    assert shown == ["0.93", "✗ -0.45", "✓ +0.26", "✓ +0.08", "✓ +0.02", "✓ +0.085", "0.924", "tolerated 0.921"]
    assert "val_acc (higher is better, axis begins at 0.367)" in words(figure)


def test_lines_connect_the_bars_and_the_tolerance_is_dashed() -> None:
    report = image_report()
    lines = pictures_of("image")["waterfall"].axes[0].lines
    scores = [stage.score for stage in waterfall(report)]
    assert [tuple(line.get_xdata()) for line in lines[:-1]] == [(score, score) for score in scores[:-1]]
    assert [tuple(line.get_ydata()) for line in lines[:-1]] == [(row, row + 1) for row in range(len(scores) - 1)]
    assert tuple(lines[-1].get_xdata()) == (worst_permitted_score(report),) * 2
    assert lines[-1].is_dashed()


def test_where_lower_is_better_a_rise_is_bad() -> None:
    figure = pictures_of("lower_is_better")["waterfall"]
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts[:3]] == ["2", "✗ +1.5", "✓ -0.5"]
    assert hexes([bar.get_facecolor() for bar in axes.patches][1:3]) == [QUANTIZED_COLOR, REPAIRED_COLOR]
    assert axes.texts[-1].get_text() == "tolerated 2.02"
    assert "val_loss (lower is better, axis begins at 1.62)" in words(figure)


def test_the_axis_begins_at_zero_where_that_is_near_and_is_logarithmic_where_scores_are_far_apart() -> None:
    report = image_report()
    steps = tuple(
        replace(step, details={"both": {"score": 0.1}}) if step.step is StepName.WEIGHTS else step
        for step in report.steps
    )
    figure = overview(replace(report, steps=steps))["waterfall"]
    assert figure.axes[0].get_xlim()[0] == 0
    assert "val_acc (higher is better)" in words(figure)
    far = pictures_of("perplexity")["waterfall"]
    assert far.axes[0].get_xscale() == "log"
    assert far.axes[0].get_xlim()[0] == pytest.approx(1.0)
    assert "val_loss (lower is better, log scale)" in words(far)
    assert "✗ +6000" in words(far)


def test_many_remedies_share_a_bar() -> None:
    report = many_remedies()
    figure = overview(report)["waterfall"]
    stages = waterfall(report)
    assert len(stages) == 43
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert len(labels) == 13
    assert labels[6] == "31 more"
    assert labels[-1] == "final"
    assert bars_of(figure)[6] == pytest.approx((stages[5].score, stages[36].score))
    assert figure.axes[0].texts[6].get_text() == "✓ +0.31"
    fallen = replace(report, settings={**report.settings, "mode": "min"})
    assert overview(fallen)["waterfall"].axes[0].texts[6].get_text() == "✗ +0.31"


def test_a_score_that_is_no_number_is_said() -> None:
    axes = pictures_of("not_a_number")["waterfall"].axes[0]
    assert [text.get_text() for text in axes.texts[:3]] == ["0.93", "not a number", "0.74"]
    assert axes.patches[1].get_x() == axes.get_xlim()[0]
    assert len(axes.patches) == 6


def test_nothing_changed_is_neither_good_nor_bad() -> None:
    report = image_report()
    kept = (replace(report.remedies[0], whole=0.48),)
    axes = overview(replace(report, remedies=kept))["waterfall"].axes[0]
    assert axes.texts[2].get_text() == "= 0"
    assert hexes([axes.patches[2].get_facecolor()]) == [NEUTRAL_COLOR]


# The rankings.


@pytest.mark.parametrize(("key", "kind"), [("ranking_weights", "weight"), ("ranking_activations", "activation")])
def test_the_worst_stand_on_top_with_loss_interval_and_sqnr(key: str, kind: str) -> None:
    report = image_report()
    figure = pictures_of("image")[key]
    axes, beside = figure.axes
    rows = [row for row in report.sensitivity if row.kind == kind][:12]
    assert figure.get_suptitle() == f"{'Weights' if kind == 'weight' else 'Activations'}: the worst 12 of 26"
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    markers = [line for line in axes.lines if line.get_marker() == "o"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in markers] == [
        (row.loss, place) for place, row in enumerate(rows)
    ]
    assert [line.get_markerfacecolor() for line in markers] == [
        QUANTIZED_COLOR if row.guilty else style.PAPER for row in rows
    ]
    whiskers = [tuple(line.get_xdata()) for line in axes.lines if line.get_marker() == "None"]
    assert all(row.interval in whiskers for row in rows)
    permitted = permitted_loss(report)
    assert (permitted, permitted) in whiskers
    assert "tolerance 0.0093" in words(figure)
    assert "loss of score alone, 95 % interval (● guilty, ○ not)" in words(figure)
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [row.quantizer for row in rows]
    assert [label.get_text() for label in beside.get_yticklabels()] == [
        "SQNR dB",
        *(f"{row.sqnr_db:.1f}" for row in rows),
    ]
    assert list(beside.get_yticks()[1:]) == list(range(12))
    assert beside.get_ylim() == axes.get_ylim()


def test_every_loss_interval_and_the_tolerance_lie_in_the_panel() -> None:
    for name in ("image", "many_quantizers", "full"):
        axes = pictures_of(name)["ranking_activations"].axes[0]
        low, high = axes.get_xlim()
        for line in axes.lines:
            assert low <= min(line.get_xdata())
            assert max(line.get_xdata()) <= high


def test_without_losses_the_sqnr_is_drawn() -> None:
    report = REPORTS["estimated"]()
    figure = pictures_of("estimated")["ranking_weights"]
    axes = figure.axes[0]
    rows = [row for row in report.sensitivity if row.kind == "weight"][:12]
    known = [row.sqnr_db for row in rows if row.sqnr_db is not None]
    assert [bar.get_width() for bar in axes.patches] == known
    assert -4.5 in known
    assert len(known) == 11
    assert axes.texts[0].get_text() == "13.5 guilty"
    assert [text.get_text() for text in axes.texts[1:4]] == ["-4.5", "-", "21.0"]
    assert "SQNR of the output in dB, each alone (lower is worse)" in words(figure)
    assert axes.get_xlim()[0] <= -4.5


def test_a_loss_that_is_no_number_leaves_its_row_empty() -> None:
    axes, beside = pictures_of("not_a_number")["ranking_activations"].axes
    markers = [line.get_ydata()[0] for line in axes.lines if line.get_marker() == "o"]
    assert markers == list(range(3, 12))
    assert [label.get_text() for label in beside.get_yticklabels()[1:5]] == ["-", "-", "-", "22.5"]


# Bits over depth.


def test_bits_stand_over_depth_and_those_off_the_target_are_named() -> None:
    report = image_report()
    figure = pictures_of("image")["bits_over_depth"]
    names = list(report.final.settings)
    for axes, kind, strays in zip(figure.axes, ("weight", "activation"), ([8], [3]), strict=True):
        target, same, off = axes.lines
        assert set(target.get_ydata()) == {0}
        assert target.is_dashed()
        depths = [index for index, name in enumerate(names) if report.final.settings[name].kind == kind]
        assert list(same.get_xdata()) == [depth for depth in depths if depth not in strays]
        assert set(same.get_ydata()) == {0}
        assert list(off.get_xdata()) == strays
        assert set(off.get_ydata()) == {1}
        assert [label.get_text() for label in axes.get_yticklabels()] == ["target 8", "16"]
        assert [text.get_text() for text in axes.texts] == [short_names([names[strays[0]]], 26)[names[strays[0]]]]
        assert axes.texts[0].xy == (strays[0], 1)
    assert figure.axes[0].get_title(loc="left") == "Weights: 1 of 26 off the target (◆)"


def test_names_lie_on_no_marker_and_in_their_panel() -> None:
    base = image_report()
    names = list(base.final.settings)
    for seed in range(4):
        chosen = np.random.default_rng(seed).choice(len(names), 9, replace=False)
        bits = {names[index]: int(4 * (1 + order % 4)) for order, index in enumerate(chosen)}
        settings = {name: replace(item, bit_width=bits.get(name, 8)) for name, item in base.final.settings.items()}
        figure = overview(replace(base, final=replace(base.final, settings=settings)))["bits_over_depth"]
        assert not list(flaws(figure))
        extents = {id(text): extent for _, extent, text in drawn_texts(figure)}
        assert sum(len(axes.texts) for axes in figure.axes) >= 5
        for axes in figure.axes:
            points = [point for line in axes.lines[1:] for point in line.get_xydata()]
            spots = axes.transData.transform(points)
            for text in axes.texts:
                box, panel = extents[id(text)], axes.get_window_extent()
                assert panel.x0 - 1 <= box.x0
                assert box.x1 <= panel.x1 + 1
                assert not any(box.contains(*spot) for spot in spots)


def test_among_500_only_names_that_belong_to_one_marker_are_written() -> None:
    figure = pictures_of("many_quantizers")["bits_over_depth"]
    assert figure.axes[0].get_title(loc="left") == "Weights: 43 of 250 off the target (◆)"
    for axes in figure.axes:
        off = axes.lines[2].get_xydata()
        step = axes.transData.transform((1, 0))[0] - axes.transData.transform((0, 0))[0]
        for text in axes.texts:
            near = [x for x, y in off if y == text.xy[1] and x != text.xy[0] and abs(x - text.xy[0]) * step < 29]
            assert not near


def test_without_a_target_the_bits_alone_are_drawn() -> None:
    settings = {"conv": QuantizerSetting("conv", "activation", 8, False, "per_tensor", 0.0, 1.0, 0.1, 0.0)}
    (axes,) = overview(Report(final=Final(settings=settings)))["bits_over_depth"].axes
    assert axes.get_title(loc="left") == "Activations, 1"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["8"]
    assert [list(line.get_xdata()) for line in axes.lines] == [[0], []]


# Predictions.


def test_flips_stand_out_of_the_greyed_diagonal() -> None:
    report = image_report()
    figure = pictures_of("image")["class_shift"]
    assert figure.get_suptitle() == "14 of 409 predictions changed: 10 lost, 4 won"
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["as quantized: 40 changed", "final: 14 changed"]
    for axes, seen in zip(figure.axes, report.visuals.predictions, strict=True):
        shown = axes.images[0].get_array()
        shift = np.array(seen.shift)
        assert shown.mask.tolist() == np.eye(10, dtype=bool).tolist()
        assert (shown.filled(0) == shift - np.diag(np.diag(shift))).all()
        counts = {tuple(map(int, text.get_position())): text for text in axes.texts}
        assert {(column, row): int(text.get_text()) for (column, row), text in counts.items()} == {
            (column, row): shift[row, column] for row in range(10) for column in range(10) if shift[row, column]
        }
        assert counts[0, 0].get_color() == style.GREY
        assert {text.get_color() for place, text in counts.items() if place[0] != place[1]} == {style.INK}
        assert [label.get_text() for label in axes.get_yticklabels()] == [str(index) for index in seen.classes]
    assert figure.axes[0].get_ylabel() == "FP32 class"
    assert {axes.get_xlabel() for axes in figure.axes} == {"quantized class"}
    assert figure.axes[0].images[0].get_clim() == figure.axes[1].images[0].get_clim() == (0, 2)


def test_one_look_is_one_panel_and_labels_may_lack() -> None:
    seen = replace(image_report().visuals.predictions[1], lost=None, won=None)
    figure = overview(with_visuals(image_report(), seen))["class_shift"]
    assert len(figure.axes) == 1
    assert figure.get_suptitle() == "14 of 409 predictions changed"


def test_of_many_classes_those_shown_are_named_and_colours_have_a_scale() -> None:
    report = REPORTS["many_classes"]()
    figure = pictures_of("many_classes")["class_shift"]
    left, _, scale = figure.axes
    assert left.get_ylabel() == "FP32 class (20 of 1000 shown)"
    assert [label.get_text() for label in left.get_yticklabels()] == [
        str(index) for index in report.visuals.predictions[0].classes
    ]
    assert scale.get_ylabel() == "samples"
    assert not left.texts


def test_counts_too_wide_for_their_cells_become_a_scale() -> None:
    first, last = image_report().visuals.predictions
    crowded = tuple(tuple(12_345 if row != column else 1 for column in range(10)) for row in range(10))
    figure = overview(with_visuals(image_report(), first, replace(last, shift=crowded)))["class_shift"]
    assert not figure.axes[1].texts
    assert figure.axes[2].get_ylabel() == "samples"


def test_samples_are_shown_as_they_are_with_their_classes() -> None:
    report = image_report()
    figure = pictures_of("image")["flipped_samples"]
    flips = report.visuals.predictions[-1].flips
    assert figure.get_suptitle() == "12 of 14 changed samples: FP32 → quantized"
    assert len(figure.axes) == len(flips) == 12
    for index, axes in enumerate(figure.axes):
        shown = np.asarray(axes.images[0].get_array())
        random = np.random.default_rng(index).integers(0, 256, (8, 8), dtype=np.uint8)
        assert (shown == random[..., None]).all()
        assert axes.images[0].get_interpolation() == "nearest"
        assert axes.get_window_extent().width == pytest.approx(axes.get_window_extent().height)
    lines = [text.get_text() for text in figure.texts[1:7]]
    assert lines == ["label 1 ✓", "5 (0.90)", "→ 1 (0.60)", "label 6 ✗", "6 (0.88)", "→ 0 (0.60)"]


def test_the_text_stands_beside_its_own_sample() -> None:
    figure = pictures_of("image")["flipped_samples"]
    beside = [each for each in drawn_texts(figure) if not each[0].startswith("12 of")]
    for index, axes in enumerate(figure.axes):
        panel = axes.get_window_extent()
        for _, extent, _ in beside[3 * index : 3 * index + 3]:
            assert panel.x1 < extent.x0 < panel.x1 + 30
            assert panel.y0 <= extent.y0
            assert extent.y1 <= panel.y1


def test_without_pictures_the_samples_are_a_table() -> None:
    report = sentence_report()
    figure = pictures_of("sentence")["flipped_samples"]
    assert not figure.axes
    texts = [text.get_text() for text in figure.texts[1:]]
    assert texts[:5] == ["sample", "label", "FP32", "quantized", ""]
    flips = report.visuals.predictions[-1].flips
    assert texts[5:15] == [
        *("0", f"{flips[0].label}", f"{flips[0].fp32} (0.90)", f"→ {flips[0].quantized} (0.60)", "✓ won"),
        *("17", f"{flips[1].label}", f"{flips[1].fp32} (0.88)", f"→ {flips[1].quantized} (0.60)", "✗ lost"),
    ]


@pytest.mark.parametrize("broken", ["no base64!", "AAAA", picture()[:40]])
def test_a_damaged_picture_is_none(broken: str) -> None:
    seen = image_report().visuals.predictions[-1]
    mixed = (replace(seen.flips[0], picture=broken), *seen.flips[1:3])
    figure = overview(with_visuals(image_report(), replace(seen, flips=mixed)))["flipped_samples"]
    assert len(figure.axes) == 2
    assert len(figure.texts) == 9 + 1
    alone = replace(seen, flips=mixed[:1])
    assert not overview(with_visuals(image_report(), alone))["flipped_samples"].axes


def test_a_sample_without_label_or_probability_has_its_place() -> None:
    flip = Flip(34, None, 1, 2, float("nan"), None, picture())  # type: ignore[arg-type]
    seen = Predictions("qat", 10, 1, None, None, None, None, (0, 1, 2), 3, ((1, 0, 0),) * 3, (flip,))
    figures = overview(Report(visuals=Visuals((), (seen,))))
    assert [text.get_text() for text in figures["flipped_samples"].texts[1:4]] == ["sample 34", "1 (-)", "→ 2 (-)"]
    bare = replace(seen, flips=(replace(flip, picture=""),))
    table = overview(Report(visuals=Visuals((), (bare,))))["flipped_samples"]
    assert [text.get_text() for text in table.texts[1:]][5:10] == ["34", "-", "1 (-)", "→ 2 (-)", ""]

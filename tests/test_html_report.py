"""The page holds what the report holds, escaped, and nothing that could load or run what comes from the user."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from lightning_quantdebug.html_charts import overview_charts, tensor_charts
from lightning_quantdebug.html_report import to_html
from lightning_quantdebug.report import Baseline, Report, Sensitivity, Step, StepName, StepVerdict, Verdict
from lightning_quantdebug.review_data import permitted_loss, waterfall, worst_permitted_score
from lightning_quantdebug.short_names import printable
from tests.report_examples import HOSTILE, full_report, hostile_report
from tests.visual_examples import hostile_visuals, image_report, picture, sentence_report

VOID = {"meta", "img", "br", "input", "link"}


class Page(HTMLParser):
    """Tags with their attributes, texts outside of scripts and styles, and the cells of each table."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._open: list[str] = []
        self._table = ""
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self._table = str(dict(attributes).get("id", len(self.tables)))
            self.tables[self._table] = []
        elif tag == "tr":
            self.tables[self._table].append([])
        elif tag in ("td", "th"):
            self.tables[self._table][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self._open:
            self.scripts.append(data)
        elif "style" not in self._open:
            self.texts.append(data)
            if self._open and "table" in self._open and self.tables[self._table] and self.tables[self._table][-1]:
                self.tables[self._table][-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def cells(self, table: str) -> list[list[str]]:
        return [[" ".join(cell.split()) for cell in row] for row in self.tables[table]]


def drawn(page: Page) -> dict[str, Any]:
    """The charts that the page's script draws."""
    (script,) = [script for script in page.scripts if "const CHARTS" in script]
    found: dict[str, Any] = json.JSONDecoder().raw_decode(script[script.index("CHARTS = ") + 9 :])[0]
    return found


@pytest.mark.parametrize("make", [full_report, image_report, sentence_report])
def test_everything_that_the_report_says_is_on_the_page(make: Any) -> None:
    report = make()
    page = Page(to_html(report))
    steps = {row[0]: row for row in page.cells("steps")[1:]}
    for step in report.steps:
        row = steps[step.step.value]
        assert row[1] == step.verdict.value.replace("_", " ")
        assert (row[2] == "-") is (step.score is None)
        assert row[2] == "-" or float(row[2]) == pytest.approx(step.score, rel=1e-3)
        assert row[3] == "-" or float(row[3]) == pytest.approx(step.loss, rel=1e-3)
        assert row[6] == (step.advice or step.verdict.advice)
    for finding in report.findings:
        assert finding.cause.value.replace("_", " ") in page.text
        assert finding.evidence in page.text
        assert finding.advice in page.text
    for item in report.remedies:
        assert item.title in page.text
        assert item.reason in page.text
    rows = page.cells("sensitivity")[1:]
    assert [row[1] for row in rows] == [row.quantizer for row in report.sensitivity]
    for shown, row in zip(rows, report.sensitivity, strict=True):
        assert shown[2:4] == [row.kind, str(row.bit_width)]
        assert float(shown[4]) == pytest.approx(row.sqnr_db, rel=1e-3)
        assert shown[8] == ("guilty" if row.guilty else shown[8])
    ranges = page.cells("ranges")[1:]
    assert [row[0] for row in ranges] == list(report.final.settings)
    for name in report.coverage.quantized:
        assert name in page.text
    for item in report.coverage.unquantized:
        assert item.name in page.text
    for role, path in report.final.files.items():
        assert f"{role}: {path}" in page.text
    assert "tolerance" in page.text


def test_the_verdict_stands_first_with_a_word_and_what_to_do() -> None:
    page = Page(to_html(image_report()))
    assert page.text.index("✓ repaired") < page.text.index("The walk")
    assert "val_acc 0.93 in FP32, 0.924 quantized, loss 0.006 (permitted: 1%) ; 95 % interval" in page.text
    assert "of the loss [0, 0.012]" in page.text
    assert "What to do next: Write a file that runs elsewhere" in page.text
    assert "✗ not accepted" in Page(to_html(full_report())).text


def test_a_page_says_what_a_report_without_anything_says() -> None:
    page = Page(to_html(Report()))
    assert "Quantization: unfinished" in page.text
    assert "Plotly" not in to_html(Report())
    assert len(to_html(Report())) < 20_000


@pytest.mark.parametrize(
    "report",
    [
        Report(baseline=Baseline(0.5), steps=(Step(StepName.WEIGHTS, StepVerdict.FAILED),)),
        Report(sensitivity=(Sensitivity("a", "weight", 8, None, None, None, None, "estimate"),)),
        Report(verdict=Verdict.FAILED, error="Traceback\n  line"),
        replace(image_report(), baseline=None),
        replace(image_report(), settings={}),
        replace(image_report(), visuals=replace(image_report().visuals, tensors=())),
    ],
)
def test_whatever_a_report_lacks_is_left_out(report: Report) -> None:
    Page(to_html(report))


def hostile() -> Report:
    report = hostile_report()
    return replace(
        report,
        settings={**report.settings, HOSTILE: HOSTILE},
        environment={HOSTILE: {HOSTILE: [HOSTILE]}},
        visuals=hostile_visuals(),
    )


def test_nothing_of_an_enemys_becomes_a_tag_an_attribute_or_an_address() -> None:
    page = Page(to_html(hostile()))
    names = {tag for tag, _ in page.tags}
    assert len(page.scripts) == 3
    assert "alert" not in names
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("href", "src"):
            value = attributes.get(name) or ""
            assert value == "" or value.startswith(("#", "data:image/png;base64,"))
        assert tag not in ("iframe", "object", "embed", "form", "base", "link")
    assert printable(HOSTILE) in page.text
    # Neither in what the script draws: as text it is escaped once more, as plotly.js reads HTML.
    code = next(script for script in page.scripts if "const CHARTS" in script)
    assert "<" not in code[code.index("CHARTS = ") : code.index("const dark")]
    texts = json.dumps(drawn(page))
    assert "<script" not in texts
    assert "&lt;script&gt;alert(1)" in texts
    for ours in (page.text, *(script for script in page.scripts if len(script) < 1_000_000)):
        assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\u202e]", ours)


def test_the_page_may_load_nothing() -> None:
    page = Page(to_html(image_report()))
    (policy,) = [a["content"] for t, a in page.tags if t == "meta" and a.get("http-equiv")]
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:")
    assert "http" not in policy


def test_pictures_that_are_no_png_are_dropped() -> None:
    report = image_report()
    flips = report.visuals.predictions[-1].flips
    bad = ('"><script>alert(1)</script>', base64.b64encode(b"<svg onload=alert(1)>").decode(), "no base64!", "")
    changed = (*(replace(flip, picture=text) for flip, text in zip(flips, bad, strict=False)), *flips[4:])
    last = replace(report.visuals.predictions[-1], flips=changed)
    report = replace(report, visuals=replace(report.visuals, predictions=(last,)))
    page = Page(to_html(report))
    shown = [a["src"] for t, a in page.tags if t == "img" and (a.get("alt") or "").startswith("sample")]
    assert shown == [f"data:image/png;base64,{flip.picture}" for flip in flips[4:]]
    assert picture(5) in (shown[1] or "")
    assert f"sample {flips[0].sample}" in page.text


def test_every_chart_has_a_place_and_every_place_a_chart() -> None:
    page = Page(to_html(sentence_report()))
    places = [a["id"] for t, a in page.tags if t == "div" and a.get("class") == "plot"]
    assert sorted(str(place) for place in places) == sorted(drawn(page))
    assert "heat_map_0" in places


# What the charts show.


def chart(report: Report, name: str) -> Any:
    return next(one for one in overview_charts(report) if one.name == name)


def test_the_waterfall_goes_from_score_to_score() -> None:
    report = image_report()
    found = chart(report, "waterfall")
    (bar,) = found.data
    stages = waterfall(report)
    for base, width, stage in zip(bar["base"], bar["x"], stages, strict=True):
        ends = {round(base, 9), round(base + width, 9)}
        assert round(stage.score, 9) in ends
        if stage.change is not None:
            assert round(stage.score - stage.change, 9) in ends
    assert found.layout["shapes"][0]["x0"] == worst_permitted_score(report)
    assert found.layout["yaxis"]["ticktext"] == [stage.label for stage in stages]
    assert [text[0] for text in bar["text"][1:-1]] == ["✗", "✓", "✓", "✓", "✓"]


def test_rankings_show_losses_with_their_intervals_and_the_tolerance() -> None:
    report = image_report()
    for kind in ("weight", "activation"):
        found = chart(report, f"ranking_{kind}")
        rows = [row for row in report.sensitivity if row.kind == kind]
        (points,) = found.data
        assert points["x"] == [row.loss for row in rows]
        assert points["error_x"]["array"] == pytest.approx([0.02] * len(rows))
        assert points["error_x"]["arrayminus"] == pytest.approx([0.02] * len(rows))
        assert [symbol == "diamond" for symbol in points["marker"]["symbol"]] == [row.guilty for row in rows]
        assert found.layout["shapes"][0]["x0"] == permitted_loss(report)
        assert found.layout["yaxis"]["range"] == [len(rows) - 0.5, -0.5]
        assert rows[0].quantizer in points["hovertext"][0]


def test_where_no_loss_was_measured_the_ratio_ranks() -> None:
    report = image_report()
    rows = tuple(replace(row, loss=None, interval=None) for row in report.sensitivity)
    (bars,) = chart(replace(report, sensitivity=rows), "ranking_weight").data
    assert bars["x"] == [row.sqnr_db for row in rows if row.kind == "weight"]


def test_bit_widths_are_filled_where_they_differ_from_the_target() -> None:
    report = image_report()
    found = chart(report, "bits_over_depth")
    depths = {name: depth for depth, name in enumerate(report.final.settings)}
    for trace, kind in zip(found.data, ("weight", "activation"), strict=True):
        mine = [setting for setting in report.final.settings.values() if setting.kind == kind]
        assert trace["x"] == [depths[setting.name] for setting in mine]
        assert trace["y"] == [setting.bit_width for setting in mine]
        assert ["open" not in s for s in trace["marker"]["symbol"]] == [setting.bit_width != 8 for setting in mine]


def test_class_shifts_leave_the_diagonal_out() -> None:
    report = image_report()
    found = chart(report, "class_shift_1")
    (heat,) = found.data
    shift = report.visuals.predictions[1].shift
    for row, counts in enumerate(heat["z"]):
        for column, count in enumerate(counts):
            assert count == (None if row == column else shift[row][column])
    assert "14 of" in found.label


def test_a_tensor_is_shown_before_and_after() -> None:
    view = image_report().visuals.tensors[0]
    channels, histogram, noise = tensor_charts(view, 3)
    assert (channels.name, histogram.name, noise.name) == ("channels_3", "histogram_3", "noise_3")
    first, last = view.states[0], view.states[-1]
    bars = [trace for trace in channels.data if trace["type"] == "bar"]
    for bar, state in zip(bars, (first, last), strict=True):
        assert bar["base"] == list(state.low)
        assert [b + w for b, w in zip(bar["base"], bar["y"], strict=True)] == pytest.approx(list(state.high))
    clips = [trace["y"] for trace in channels.data if trace["type"] == "scatter"]
    assert clips == [list(end) for state in (first, last) for end in (state.clip_low, state.clip_high)]
    counts = [trace["y"] for trace in histogram.data if trace.get("name") in ("FP32", "quantized")]
    assert counts == [[n or None for n in part] for s in (first, last) for part in (s.fp32, s.quantized)]
    shapes = [(shape["x0"], shape["yref"]) for shape in histogram.layout["shapes"]]
    assert shapes == [
        (end, f"{axis} domain")
        for state, axis in ((first, "y"), (last, "y2"))
        for end in (min(state.clip_low), max(state.clip_high))
    ]
    assert [trace["name"] for trace in histogram.data].count("grid") == 1
    assert [trace["x"] for trace in noise.data] == [
        [state.rounding for state in view.states],
        [state.clipping for state in view.states],
    ]
    assert noise.layout["yaxis"]["ticktext"] == ["as quantized, 8 bits", "after fix_weights, 8 bits", "final, 4 bits"]


def test_a_map_shows_magnitudes_and_noise() -> None:
    view = sentence_report().visuals.tensors[0]
    assert view.heat_map is not None
    heat = tensor_charts(view, 0)[-1]
    magnitudes, noise = heat.data
    assert magnitudes["z"] == [list(row) for row in view.heat_map.values]
    assert noise["z"] == [list(row) for row in view.heat_map.noise]
    assert magnitudes["x"] == [str(index) for index in view.heat_map.column_indices]
    assert heat.layout["yaxis"]["title"]["text"] == "token (24 of 24)"

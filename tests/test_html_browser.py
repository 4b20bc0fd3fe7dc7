"""The page in a real browser, opened from disk: it draws, sorts and filters, and loads nothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lightning_quantdebug.html_report import to_html
from lightning_quantdebug.report import Report
from tests.browsers import Watched, browser_page, needs_browser
from tests.report_examples import hostile_report
from tests.visual_examples import image_report, sentence_report

pytestmark = needs_browser
ATTACK = "<script>window.owned=1</script><img src=x onerror=window.owned=1><a href='javascript:window.owned=1'>x</a>"


@pytest.fixture
def watched() -> Iterator[Watched]:
    with browser_page() as found:
        yield found


def opened(watched: Watched, report: Report, folder: Path) -> Any:
    """The page of a report, scrolled through so that every chart is drawn."""
    path = folder / "report.html"
    path.write_text(to_html(report), encoding="utf-8")
    page = watched.page
    page.goto(path.as_uri())
    for plot in page.locator(".plot").all():
        plot.scroll_into_view_if_needed()
        plot.locator(".main-svg").first.wait_for(timeout=30_000)
    return page


@pytest.mark.parametrize("make", [image_report, sentence_report])
def test_every_chart_is_drawn_without_an_error_or_a_request(make: Any, watched: Watched, tmp_path: Path) -> None:
    page = opened(watched, make(), tmp_path)
    # plotly.js itself says of each trace and layout whether it knows what it is asked for.
    complaints = page.evaluate(
        "Object.entries(CHARTS).map(([name, c]) => [name, Plotly.validate(c.data, c.layout)]).filter(([, e]) => e)"
    )
    assert complaints == []
    assert page.locator(".plot").count() == page.evaluate("Object.keys(CHARTS).length") > 8
    for plot in page.locator(".plot").all():
        assert plot.locator("g.trace, g.hm, g.heatmaplayer image, path.point").count() > 0
    assert watched.errors == []
    assert [url for url in watched.requests if not url.startswith(("file:", "data:"))] == []
    labels = page.locator("#ranking_weight .ytick text").all_text_contents()
    assert len(labels) == 26


def column(page: Any, place: int) -> list[str]:
    return [
        " ".join(text.split())
        for text in page.locator(f"#sensitivity tbody tr td:nth-child({place + 1})").all_text_contents()
    ]


def key(text: str) -> tuple[bool, Any]:
    """What Python sorts by: numbers by value, intervals by their lower end, nothing last."""
    if text == "-":
        return True, 0
    try:
        return False, float(text.strip("[").split(",")[0])
    except ValueError:
        return False, text.lower()


def test_each_heading_sorts_up_and_down_with_nothing_last(watched: Watched, tmp_path: Path) -> None:
    report = image_report()
    rows = [
        replace(row, sqnr_db=None if place % 5 == 0 else row.sqnr_db, kl=None if place % 7 == 0 else row.kl)
        for place, row in enumerate(report.sensitivity)
    ]
    page = opened(watched, replace(report, sensitivity=tuple(rows)), tmp_path)
    headings = page.locator("#sensitivity thead th")
    assert headings.count() == 14
    for place in range(headings.count()):
        before = column(page, place)
        headings.nth(place).locator("button").click()
        up = column(page, place)
        assert up == sorted(before, key=key)
        assert headings.nth(place).get_attribute("aria-sort") == "ascending"
        headings.nth(place).locator("button").press("Enter")
        down = [text for text in column(page, place) if text != "-"]
        assert [key(text) for text in down] == sorted([key(text) for text in up if text != "-"], reverse=True)
        assert column(page, place)[len(down) :] == ["-"] * (len(up) - len(down))
        assert headings.nth(place).get_attribute("aria-sort") == "descending"
    assert page.locator("#sensitivity th[aria-sort='descending']").count() == 1
    assert sorted(column(page, 1)) == sorted(row.quantizer for row in rows)


def test_the_filters_leave_what_fits(watched: Watched, tmp_path: Path) -> None:
    report = image_report()
    page = opened(watched, report, tmp_path)
    page.locator("#filter-name").fill("FEATURES.2.")
    visible = page.locator("#sensitivity tbody tr:visible td:nth-child(2)").all_text_contents()
    assert sorted(visible) == sorted(row.quantizer for row in report.sensitivity if "features.2." in row.quantizer)
    page.locator("#filter-kind").select_option("weight")
    assert page.locator("#sensitivity tbody tr:visible").count() == 1
    assert page.locator("#filter-count").inner_text() == f"1 of {len(report.sensitivity)} shown"


def test_an_enemys_names_run_nothing(watched: Watched, tmp_path: Path) -> None:
    report = image_report()
    names = {row.quantizer: f"{ATTACK}{place}" for place, row in enumerate(report.sensitivity)}
    views = tuple(replace(view, quantizer=ATTACK, why=ATTACK) for view in report.visuals.tensors)
    report = replace(
        report,
        settings={**report.settings, "monitor": ATTACK},
        sensitivity=tuple(replace(row, quantizer=names[row.quantizer]) for row in report.sensitivity),
        findings=tuple(replace(f, evidence=ATTACK, advice=ATTACK, quantizer=ATTACK) for f in report.findings),
        remedies=tuple(replace(item, variant=ATTACK) for item in report.remedies),
        visuals=replace(report.visuals, tensors=views),
        error=ATTACK,
    )
    page = opened(watched, report, tmp_path)
    page.locator("#ranking_weight .point").first.hover(force=True)
    page.wait_for_timeout(300)
    assert page.evaluate("window.owned") is None
    assert page.locator(".plot a, td a").count() == 0
    assert page.locator("img[src='x']").count() == 0
    assert ATTACK in page.locator("#sensitivity tbody tr").first.inner_text()
    assert (
        "<script>"
        in page.locator("#ranking_weight .ytick text").first.text_content()
        + " ".join(page.locator("#ranking_weight .hoverlayer").all_text_contents())
        or "owned" in page.locator("#ranking_weight").text_content()
    )
    assert watched.errors == []
    opened(watched, hostile_report(), tmp_path)
    assert watched.errors == []


def test_dark_follows_the_reader_and_narrow_fits(tmp_path: Path) -> None:
    with browser_page(color_scheme="dark", viewport={"width": 400, "height": 900}) as watched:
        page = opened(watched, image_report(), tmp_path)
        dark = page.locator("#waterfall text").first.evaluate("text => getComputedStyle(text).fill")
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        page.emulate_media(color_scheme="light")
        page.wait_for_timeout(500)
        light = page.locator("#waterfall text").first.evaluate("text => getComputedStyle(text).fill")
        assert (dark, light) == ("rgb(230, 237, 243)", "rgb(27, 31, 36)")
        assert background != page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert watched.errors == []

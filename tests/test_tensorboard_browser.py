"""TensorBoard's dashboards in a real browser, on the quickstart's run: each shows what the report says, no error."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightning_quantdebug.report import Report
from lightning_quantdebug.tensorboard import layout
from tests.browsers import Watched, browser_page, needs_browser, tensorboard_server

pytestmark = needs_browser
ROOT = Path(__file__).parents[1]
TARGET = "w2a2_per_tensor"
# Two bits: every box of the chart has something to do, training with quantizers among them.
PATIENCE = 60_000
# Milliseconds: software rendering on a busy machine.


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the quickstart's run."""
    folder = tmp_path_factory.mktemp("run")
    arguments = ["--target", TARGET, "--epochs", "3", "--output", str(folder)]
    subprocess.run(
        [sys.executable, str(ROOT / "examples" / "quickstart.py"), *arguments],
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=600,
    )
    return folder / "digits" / "version_0"


@pytest.fixture(scope="module")
def report(run: Path) -> Report:
    found = Report.from_json(run / "quantdebug" / "report.json")
    assert found.sensitivity
    assert found.visuals.tensors
    assert found.visuals.predictions
    return found


@pytest.fixture(scope="module")
def address(run: Path) -> Iterator[str]:
    with tensorboard_server(run) as found:
        yield found


@pytest.fixture
def watched() -> Iterator[Watched]:
    with browser_page() as found:
        yield found
        assert found.errors == []


def opened(watched: Watched, address: str, dashboard: str) -> Any:
    """The page with a dashboard open."""
    watched.page.goto(f"{address}/#{dashboard}")
    return watched.page


def test_text_shows_the_verdict_first(watched: Watched, address: str, report: Report) -> None:
    page = opened(watched, address, "text")
    page.locator("tf-text-loader h1").wait_for(timeout=PATIENCE)
    loader = page.locator("tf-text-loader").first
    assert report.verdict is not None
    assert loader.locator("h1").inner_text().startswith(f"Quantization: {report.verdict.value.replace('_', ' ')}")
    headings = [heading.inner_text() for heading in loader.locator("h2").all()]
    assert headings[:2] == ["The walk", "Findings"]
    assert "What to do next" in headings
    assert "Coverage" in headings
    walk = loader.locator("table").first.inner_text()
    assert all(step.step.value in walk for step in report.steps if step.score is not None)
    assert any("quantdebug/table_of_quantizers" in text for text in watched.texts("tf-text-loader"))
    assert any("quantdebug/table_of_ranges" in text for text in watched.texts("tf-text-loader"))


def test_images_show_every_picture(watched: Watched, address: str, report: Report) -> None:
    page = opened(watched, address, "images")
    overview = page.locator("tf-image-loader img")
    overview.first.wait_for(timeout=PATIENCE)
    expected = ["flow_chart", "waterfall", "ranking_weights", "ranking_activations", "bits_over_depth", "class_shift"]
    shown = " ".join(watched.texts("tf-image-loader"))
    for place, name in enumerate(expected, 1):
        assert f"quantdebug/pictures/{place}_{name}" in shown
    sizes = overview.evaluate_all("images => images.map(image => [image.naturalWidth, image.width])")
    assert all(natural > 600 and 250 < width < 600 for natural, width in sizes)
    # The tensors are a group of their own, closed at first.
    page.get_by_text("quantdebug_tensors", exact=True).first.click()
    page.wait_for_timeout(3000)
    shown = " ".join(watched.texts("tf-image-loader"))
    pictures = {
        f"quantdebug_tensors/{view.quantizer}/{name}"
        for view in report.visuals.tensors
        for name in ("channel_ranges", "histogram", "noise")
    }
    # A page of the dashboard holds twelve.
    assert sum(f"{tag} " in shown for tag in pictures) >= min(12, len(pictures)) - 1


def test_histograms_show_the_guilty_tensors(watched: Watched, address: str, report: Report) -> None:
    page = opened(watched, address, "histograms")
    page.locator("tf-histogram-loader").first.wait_for(timeout=PATIENCE)
    shown = " ".join(watched.texts("tf-histogram-loader"))
    named = [view.quantizer for view in report.visuals.tensors if f"quantdebug_tensors/{view.quantizer}/" in shown]
    # Twelve cards are on the first page: FP32 and quantized of six tensors.
    assert named == [view.quantizer for view in report.visuals.tensors]
    assert page.locator("vz-histogram-timeseries svg path").count() > 0


def test_scalars_show_the_score_of_each_step(watched: Watched, address: str, report: Report) -> None:
    page = opened(watched, address, "timeseries")
    page.get_by_text("quantdebug", exact=True).first.wait_for(timeout=PATIENCE)
    page.locator("tb-filter-input[placeholder*='tags' i] input").first.fill("quantdebug/score/")
    for step in report.steps:
        if step.score is not None:
            page.get_by_text(f"quantdebug/score/{step.step.value}", exact=False).first.wait_for(timeout=PATIENCE)


def test_hparams_show_a_row_for_the_run(watched: Watched, run: Path, report: Report) -> None:
    # Of several runs with hyperparameters TensorBoard shows the columns of the one that it finds first, and the
    # quickstart has some of its own.
    with tensorboard_server(run / "quantdebug") as beneath:
        page = opened(watched, beneath, "hparams")
        page.locator("tf-hparams-table-view").get_by_text("Target").first.wait_for(timeout=PATIENCE)
        (text,) = watched.texts("tf-hparams-table-view")
    assert report.verdict is not None
    for shown in ("Target", "Tolerance", "Verdict", report.verdict.value, TARGET, "outcome/loss"):
        assert shown in text


def test_custom_scalars_draw_every_chart(watched: Watched, address: str, report: Report) -> None:
    page = opened(watched, address, "custom_scalars")
    page.get_by_text("score over the walk", exact=False).first.wait_for(timeout=PATIENCE)
    page.get_by_text("loss over the walk", exact=False).first.wait_for(timeout=PATIENCE)
    page.get_by_text("Matches (", exact=False).first.wait_for(timeout=PATIENCE)
    page.wait_for_timeout(3000)
    matches = page.get_by_text("Matches (", exact=False).all_inner_texts()
    assert len(matches) == len(layout(report, "quantdebug")["quantdebug"]) >= 4
    assert not any("(0)" in text for text in matches)
    assert page.get_by_text("do not match", exact=False).count() == 0

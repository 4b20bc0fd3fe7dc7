"""Pages and pictures land where they shall, whole, under names that no quantizer can choose."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lightning_quantdebug import report_pages
from lightning_quantdebug.errors import ReportError
from lightning_quantdebug.report import Final, Report
from lightning_quantdebug.report_markdown import to_markdown
from lightning_quantdebug.report_pages import file_names, page_files, with_files, write_pages, write_pictures
from tests.report_examples import HOSTILE, full_report, hostile_report
from tests.visual_examples import hostile_visuals, image_report

SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def stand_in(monkeypatch: pytest.MonkeyPatch, module: str, **names: Any) -> None:
    """A module of ours that does something simple."""
    made = ModuleType(f"lightning_quantdebug.{module}")
    vars(made).update(names)
    monkeypatch.setitem(sys.modules, made.__name__, made)


@pytest.fixture
def html(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "html_report", to_html=lambda report: f"<p>{report.verdict}</p>")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures that are the bytes of their names."""
    stand_in(monkeypatch, "figures", overview=lambda report: {"chart": b"chart", "losses": b"losses"})
    stand_in(monkeypatch, "tensor_figures", of_tensor=lambda view: {"ranges": view.quantizer.encode()})
    stand_in(monkeypatch, "figure_style", png=lambda figure: b"PNG " + figure)


@pytest.mark.usefixtures("html")
@pytest.mark.parametrize("report", [Report(), full_report(), hostile_report()], ids=["empty", "full", "hostile"])
def test_both_pages_are_written(report: Report, tmp_path: Path) -> None:
    directory = tmp_path / "not" / "yet"
    files = write_pages(report, directory)
    assert files == page_files(directory) == {n: str(directory / n) for n in ("report.md", "report.html")}
    assert Path(files["report.md"]).read_text(encoding="utf-8") == to_markdown(report)
    assert Path(files["report.html"]).read_text(encoding="utf-8") == f"<p>{report.verdict}</p>"
    assert sorted(path.name for path in directory.iterdir()) == ["report.html", "report.md"]


def test_a_page_that_can_not_be_drawn_leaves_the_old_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(report: Report) -> str:
        raise KeyError("both")

    stand_in(monkeypatch, "html_report", to_html=fail)
    (tmp_path / "report.md").write_text("old")
    with pytest.raises(KeyError):
        write_pages(full_report(), tmp_path)
    assert (tmp_path / "report.md").read_text() == "old"


@pytest.mark.usefixtures("html")
def test_a_place_that_can_not_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="Can not write"):
        write_pages(Report(), tmp_path / "file")


@pytest.mark.usefixtures("drawn")
def test_every_picture_is_written_in_the_reports_order(tmp_path: Path) -> None:
    report = image_report()
    files = write_pictures(report, tmp_path / "pictures")
    names = [view.quantizer for view in report.visuals.tensors]
    assert [path.name for path in files] == [
        "overview-chart.png",
        "overview-losses.png",
        *(f"tensor-{number:02d}-ranges-{name}.png" for number, name in enumerate(names, 1)),
    ]
    assert files[0].read_bytes() == b"PNG chart"
    assert files[3].read_bytes() == b"PNG " + names[1].encode()
    assert {path.parent for path in files} == {tmp_path / "pictures"}


@pytest.mark.usefixtures("drawn")
def test_hostile_names_stay_in_the_directory(tmp_path: Path) -> None:
    (view,) = hostile_visuals().tensors
    names = [HOSTILE, "../../../etc/passwd", "/etc/passwd", "..", "a\0b", "x" * 5000, "C:\\x", "é" * 300, ""]
    views = tuple(replace(view, quantizer=name) for name in names)
    files = write_pictures(replace(image_report(), visuals=replace(hostile_visuals(), tensors=views)), tmp_path / "p")
    assert len(set(files)) == len(names) + 2
    assert sorted(files) == sorted((tmp_path / "p").iterdir())
    assert all(SAFE.fullmatch(path.name) and len(path.name) <= 104 for path in files)
    assert [path.name for path in tmp_path.iterdir()] == ["p"]


def test_names_that_become_alike_get_numbers() -> None:
    assert file_names(["a/b", "a b", "A_B", "a_b-2", "a\nb"]) == ["a_b", "a_b-2", "A_B-3", "a_b-2-2", "a_b-4"]
    long = file_names(["x" * 200 + str(index) for index in range(12)])
    assert len(set(long)) == 12
    assert max(map(len, long)) == 100
    assert file_names(["...", "-rf", ".hidden", "_"]) == ["picture", "rf", "hidden", "picture-2"]


def test_places_that_are_the_same_stay_as_they_were_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    report = Report(final=Final(files={"report.md": "a/../report.md", "tensorboard": "logs", "report.html": "x"}))
    moved = with_files(report, {"report.md": str(tmp_path / "report.md"), "report.html": "y", "report.json": "z"})
    assert moved.final.files == {
        "report.md": "a/../report.md",
        "tensorboard": "logs",
        "report.html": "y",
        "report.json": "z",
    }
    assert report_pages.with_files(report, {}) == report

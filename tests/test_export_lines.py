"""What is said of exported files, in every place where a report is read."""

from __future__ import annotations

import io
from dataclasses import replace

from lightning_quantdebug.console import print_summary
from lightning_quantdebug.export_lines import export_lines, export_rows, export_text, next_on_device
from lightning_quantdebug.html_report import to_html
from lightning_quantdebug.report import Agreement, Export, Final, Report, Verdict
from lightning_quantdebug.report_markdown import to_markdown
from lightning_quantdebug.tensorboard import step_scalars
from tests.report_examples import _exports

EXPORTS = _exports("the disk is full")
REPORT = Report(verdict=Verdict.ACCEPTED, final=Final(0.48, exports=EXPORTS))


def test_a_row_shows_the_way_that_differs_most() -> None:
    assert export_rows(EXPORTS) == [
        ("onnx", "verified", "0.4775", "0.48", "2", "3", "99.22%", ""),
        ("pt2", "not_written", "", "", "", "", "", "the disk is full"),
    ]
    assert export_text(EXPORTS[0]) == "onnx verified: score 0.4775 (simulated 0.48), at most 2 steps apart"
    assert export_text(EXPORTS[1]) == "pt2 not_written: the disk is full"
    assert export_lines(EXPORTS[0])[1:] == [
        "  onnxruntime, optimizations off: 128 samples, at most 1 steps apart (the simulation itself: 3), "
        "100.00% equal",
        "  onnxruntime, as usual: 128 samples, at most 2 steps apart (the simulation itself: 3), 99.22% equal",
    ]


def test_every_page_shows_them_and_none_where_there_are_none() -> None:
    stream = io.StringIO()
    print_summary(REPORT, stream)
    for text in (to_markdown(REPORT), to_html(REPORT), stream.getvalue()):
        for word in ("onnx", "verified", "0.4775", "pt2", "the disk is full"):
            assert word in text
    assert "| onnx | verified | 0.4775 | 0.48 | 2 | 3 | 99.22% |" in to_markdown(REPORT).replace("\\", "")
    assert "onnx, onnxruntime, as usual: 128 samples" in to_markdown(REPORT).replace("\\", "")
    bare = Report(verdict=Verdict.ACCEPTED)
    assert "Exported" not in to_markdown(bare) + to_html(bare)


def test_the_score_of_each_file_is_a_scalar() -> None:
    assert step_scalars(REPORT, "quantdebug") == {"quantdebug/export/onnx": 0.4775}


def test_what_to_do_next_depends_on_what_was_proven() -> None:
    assert next_on_device(EXPORTS).startswith("Measure model.onnx on the device: it is verified")
    assert "export=('onnx',)" in next_on_device([Export("recipe", Agreement.VERIFIED)])
    unsure = replace(EXPORTS[0], agreement=Agreement.UNVERIFIED, reason="it differs")
    assert next_on_device([unsure]) == ("See why no exported file is verified before you ship one: onnx: it differs")
    assert next_on_device(EXPORTS) in to_markdown(REPORT)

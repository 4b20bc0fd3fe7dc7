"""The walk on each patient: it names the disease, and the first remedy that it keeps is the one that cures it.

The golden reports are written anew with ``QUANTDEBUG_GOLDEN=write``. Numbers in them may differ by a few percent, as
sums do from machine to machine.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lightning_quantdebug.report import Report, Verdict
from lightning_quantdebug.report_markdown import to_markdown
from tests.patients import PATIENTS, Patient
from tests.walks import walk

torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"
NUMBER = re.compile(r"[-+]?\d+\.?\d*(?:e[-+]?\d+)?")


def without_times(report: Report) -> Report:
    steps = tuple(replace(step, seconds=0.0) for step in report.steps)
    return replace(report, steps=steps, remedies=tuple(replace(remedy, seconds=0.0) for remedy in report.remedies))


def assert_alike(page: str, golden: str) -> None:
    """The same words, and numbers that differ by a few percent at most."""
    assert NUMBER.sub("#", page) == NUMBER.sub("#", golden)
    numbers, expected = ([float(number) for number in NUMBER.findall(text)] for text in (page, golden))
    assert numbers == pytest.approx(expected, rel=0.05, abs=1e-4)


@pytest.mark.parametrize("patient", PATIENTS, ids=lambda patient: patient.name)
def test_the_walk_names_the_disease_and_keeps_its_cure_first(patient: Patient) -> None:
    report = walk(patient.build(), monitor="acc", mode="max", tolerance=0.02, target=patient.target)
    page = to_markdown(without_times(report))
    path = GOLDEN / f"patient_{patient.name}.md"
    if os.environ.get("QUANTDEBUG_GOLDEN") == "write":
        path.write_text(page, encoding="utf-8")
    assert report.baseline is not None
    assert report.baseline.score == 1.0
    kept = [remedy.remedy for remedy in report.remedies if remedy.kept]
    if patient.cause is None:
        assert (report.verdict, report.remedies, report.findings) == (Verdict.ACCEPTED, (), ())
    else:
        assert report.verdict is Verdict.REPAIRED
        assert kept[0] == patient.remedy
        assert (report.findings[0].cause, report.findings[0].remedy) == (patient.cause, patient.remedy)
    assert report.final.loss is not None
    assert report.final.loss <= 0.02
    assert_alike(page, path.read_text(encoding="utf-8"))


def test_other_words_and_other_numbers_are_told_from_the_golden_ones() -> None:
    golden = "scale 0.5, 3 of 8 in [-1.5, 2e-07]"
    assert_alike("scale 0.51, 3 of 8 in [-1.52, 3e-06]", golden)
    for other in ("scale 0.55, 3 of 8 in [-1.5, 2e-07]", "scales 0.5, 3 of 8 in [-1.5, 2e-07]", "scale 0.5, 3 of 8"):
        with pytest.raises(AssertionError):
            assert_alike(other, golden)

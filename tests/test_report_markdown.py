"""The page for a person: verdict first, complete, on one page, and nothing in it can break out of its place."""

import re
from dataclasses import replace
from pathlib import Path

import markdown
import pytest

from lightning_quantdebug.report import (
    Baseline,
    Cause,
    Coverage,
    Finding,
    Report,
    Step,
    StepName,
    StepVerdict,
    Unquantized,
    Verdict,
)
from lightning_quantdebug.report_markdown import code, escape, interaction, next_steps, to_markdown
from tests.report_examples import HOSTILE, full_report, hostile_report

GOLDEN = Path(__file__).parent / "golden" / "report.md"


def rendered(text: str) -> str:
    """HTML as TensorBoard's Text dashboard makes it, before it removes tags."""
    return markdown.markdown(text, extensions=["tables", "fenced_code"])


def test_the_page_is_the_golden_one() -> None:
    assert to_markdown(full_report()) == GOLDEN.read_text(encoding="utf-8")


def test_the_page_says_the_verdict_first_and_what_to_do_last_but_files() -> None:
    sections = re.findall(r"^#+ (.*)$", to_markdown(full_report()), re.MULTILINE)
    assert sections[0].startswith("Quantization: not accepted: val_acc 0.93 in FP32, 0.48 quantized, loss 0.45")
    assert sections[1:] == [
        "The walk",
        "Findings",
        "Quantizers, each alone",
        "Remedies tried",
        "Single quantizers repaired",
        "Coverage",
        "Ranges",
        "What to do next",
        "What was written",
    ]


def test_hostile_names_stay_text() -> None:
    page = to_markdown(hostile_report())
    html = rendered(page)
    assert not re.search(r"[<>]", page)
    assert "<script" not in html
    assert "<a " not in html
    assert "<img" not in html
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert html.count("<h1>") == 1
    assert "owned</h" not in html


def test_hostile_names_can_not_add_a_cell_to_a_table() -> None:
    html = rendered(to_markdown(hostile_report()))
    tables = re.findall(r"<table>.*?</table>", html, re.DOTALL)
    assert len(tables) == 7
    for text in tables:
        rows = re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)
        assert len({len(re.findall(r"<t[hd]\b", row)) for row in rows}) == 1
        assert len(rows) == (4 if "verdict" in rows[0] else 3 if "agreement" in rows[0] else 2)


def test_a_hostile_name_is_still_readable() -> None:
    html = rendered(f"| x |\n| --- |\n| {code(HOSTILE)} |")
    cell = re.findall(r"<td>(.*?)</td>", html)
    assert cell == ["a|b`c`&lt;script&gt;alert(1)&lt;/script&gt; ## owned [31m *_[x](http://e.vil)!"]


@pytest.mark.parametrize("name", ["a|b", "a`b", "<b>", "a\nb", " a", "", "a\\b", "*a*", "a" * 500])
def test_a_name_that_a_code_span_could_not_hold_is_escaped(name: str) -> None:
    assert code(name) == escape(name)
    assert "\n" not in code(name)
    assert len(code(name)) <= 2 * 400


@pytest.mark.parametrize("name", ["layer1.0.conv.weight", "lstm@1", "__init__", "a b", "net[0]"])
def test_an_honest_name_is_a_code_span(name: str) -> None:
    assert code(name) == f"`{name}`"


def test_a_page_stays_one_page() -> None:
    report = full_report()
    setting = report.final.settings["conv"]
    settings = {f"q{index}": replace(setting, name=f"q{index}") for index in range(300)}
    findings = tuple(Finding(Cause.NON_FINITE, f"evidence {index}") for index in range(40))
    page = to_markdown(replace(report, findings=findings, final=replace(report.final, settings=settings)))
    assert "280 more in report.json" in page
    assert "30 more in report.json" in page
    assert len(page.splitlines()) < 125


def test_reasons_that_differ_only_in_a_name_are_one_line() -> None:
    folded = tuple(Unquantized(f"bn{index}", f"folded into conv{index}.weight") for index in range(6))
    coverage = Coverage(tuple(f"conv{index}.weight" for index in range(6)), folded)
    page = to_markdown(Report(coverage=coverage))
    assert "- Not quantized, folded into ...: `bn0`, `bn1`, `bn2`, `bn3` and 2 more.\n" in page
    assert page.count("Not quantized") == 1


def test_reasons_beyond_the_most_frequent_are_counted() -> None:
    rare = tuple(Unquantized(f"op{index}", f"reason {index}") for index in range(11))
    often = (Unquantized("a", "often"), Unquantized("b", "often"))
    page = to_markdown(Report(coverage=Coverage((), (*rare, *often))))
    assert page.index("often: `a`, `b`") < page.index("reason 0: `op0`")
    assert "- Not quantized for other reasons: 4, in report.json." in page


def test_an_empty_report_says_that_the_walk_is_unfinished() -> None:
    page = to_markdown(Report())
    assert page.startswith("# Quantization: unfinished\n")
    assert "The walk has not come to its end." in page
    assert "Run the walk again" in page


@pytest.mark.parametrize(
    ("both", "text"),
    [
        ({"both": {"loss": 0.6}}, "both together 0.6: 0.11 more than the sum"),
        ({"both": 0.4}, "both together 0.4: 0.09 less than the sum"),
        ({"both": 0.06 + 0.43}, "both together 0.49: the sum of both"),
    ],
)
def test_the_interaction_of_weights_and_activations(both: object, text: str) -> None:
    weights = Step(StepName.WEIGHTS, StepVerdict.FAILED, 0.5, 0.43, details=both)  # type: ignore[arg-type]
    assert text in (interaction(full_report().with_step(weights)) or "")


def test_an_interval_without_width_says_what_it_leaves_open() -> None:
    step = Step(StepName.ACTIVATIONS, StepVerdict.PASSED, 0.9, 0.0, (0.0, 0.0))
    report = Report(baseline=Baseline(0.9, 600), steps=(step,))
    assert "In 600 samples a change of up to 0.005 of them can stay unseen." in to_markdown(report)
    open_ended = replace(report, steps=(replace(step, interval=(0.0, 0.1)),))
    for other in (open_ended, replace(report, baseline=Baseline(0.9)), replace(report, baseline=None)):
        assert "can stay unseen" not in to_markdown(other)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ([-0.1, 0.3], "than the sum, 95 % interval [-0.1, 0.3] (noise)."),
        ([0.1, 0.3], "than the sum, 95 % interval [0.1, 0.3]."),
        ([0.0, 0.0], "than the sum."),
    ],
)
def test_an_interaction_inside_its_interval_is_called_noise(found: list[float], text: str) -> None:
    details = {"both": {"loss": 0.6}, "interaction_interval": found}
    weights = Step(StepName.WEIGHTS, StepVerdict.FAILED, 0.5, 0.43, details=details)
    assert (interaction(full_report().with_step(weights)) or "").endswith(text)


def test_without_both_losses_there_is_no_interaction() -> None:
    report = full_report()
    assert interaction(replace(report, steps=report.steps[:1])) is None
    assert interaction(report.with_step(Step(StepName.WEIGHTS, StepVerdict.FAILED, 0.5, 0.43))) is None
    assert interaction(report.with_step(Step(StepName.ACTIVATIONS, StepVerdict.BROKEN))) is None


@pytest.mark.parametrize("verdict", list(Verdict))
def test_every_verdict_says_what_to_do(verdict: Verdict) -> None:
    page = to_markdown(Report(verdict=verdict))
    assert escape(verdict.advice) in page
    assert next_steps(Report(verdict=verdict))


def test_advice_follows_what_lost_the_score() -> None:
    assert any("'granularity': 'per_channel'" in line for line in next_steps(full_report()))
    passed = Step(StepName.WEIGHTS, StepVerdict.PASSED, 0.93, 0.0)
    lines = next_steps(full_report().with_step(passed))
    assert any("bits for the activations" in line for line in lines)
    assert not any("weights" in line for line in lines)

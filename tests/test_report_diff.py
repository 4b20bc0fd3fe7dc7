"""Two runs compared: what is a regression, what is only told, and what can not be compared."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from lightning_quantdebug.errors import ReportError
from lightning_quantdebug.loss_change import Outcome
from lightning_quantdebug.report import (
    Baseline,
    Cause,
    Final,
    Finding,
    QuantizerSetting,
    Report,
    Sensitivity,
    Step,
    StepName,
    StepVerdict,
    Verdict,
)
from lightning_quantdebug.report_diff import Comparison, compare
from lightning_quantdebug.run_differences import (
    BitWidthChange,
    SettingChange,
    SqnrChange,
    bit_width_changes,
    findings_of_one,
    setting_changes,
    sqnr_changes,
)
from tests.report_examples import full_report, hostile_report
from tests.visual_examples import image_report, sentence_report

GOOD = [Verdict.ACCEPTED, Verdict.REPAIRED, Verdict.REPAIRED_BY_QAT]
BAD = [Verdict.BROKEN_PIPELINE, Verdict.FAILED]


def run(
    loss: float | None,
    half: float | None = 0.01,
    verdict: Verdict | None = Verdict.ACCEPTED,
    mode: str = "max",
    baseline: float = 0.9,
    **more: Any,
) -> Report:
    """A run that lost so much, with a symmetrical interval."""
    interval = None if half is None or loss is None else (loss - half, loss + half)
    score = None if loss is None else baseline - loss if mode == "max" else baseline + loss
    settings = {"monitor": "val", "mode": mode, "tolerance": "1%"}
    final = Final(score, loss, interval)
    return replace(Report(settings, {}, Baseline(baseline, 500), verdict=verdict, final=final), **more)


def notes(found: Comparison) -> str:
    return " ".join(found.notes)


@pytest.mark.parametrize("mode", ["max", "min"])
@pytest.mark.parametrize(("loss", "expected"), [(0.0342, True), (0.0340, False), (0.0, False)])
def test_the_loss_of_the_end_decides(mode: str, loss: float, expected: bool) -> None:
    # Two half-widths of 0.01 make 0.01414.
    found = compare(run(0.02, mode=mode), run(loss, mode=mode))
    assert found.regression is expected
    assert (found.decided_by, found.mode, found.monitor) == ("final", mode, "val")


def test_the_reason_says_change_noise_and_interval() -> None:
    assert compare(run(0.02), run(0.06)).reason == (
        "The loss of final rose by 0.04, beyond the noise of 0.014 (95 % interval of the change [0.02586, 0.05414])."
    )
    assert compare(run(0.02), run(0.01)).reason == (
        "The loss of final fell by 0.01, within the noise of 0.014 (95 % interval of the change [-0.02414, 0.004142])."
    )
    assert compare(run(0.02), run(0.02)).reason.startswith("The loss of final is the same, within the noise of 0.014")


def test_an_unknown_noise_is_told() -> None:
    # 1 % of 0.9 is permitted, a tenth of that is 0.0009.
    found = compare(run(0.02, None), run(0.0208))
    assert not found.regression
    assert "No interval is known, so its noise is not: a change counts from 0.0009 on" in found.reason
    assert found.reason.endswith("This one does not count.")
    found = compare(run(0.02), run(0.0210, None))
    assert found.regression
    assert found.reason.endswith("This one counts.")


def test_of_two_tolerances_the_smaller_one_says_what_counts() -> None:
    wide, narrow = run(0.02, None), run(0.025, None)
    wide = replace(wide, settings={**wide.settings, "tolerance": "10%"})
    for a, b in ((wide, narrow), (replace(narrow, final=wide.final), replace(wide, final=narrow.final))):
        found = compare(a, b)
        assert found.regression
        assert found.measurements[-1].change.least == pytest.approx(0.0009)


def test_without_a_tolerance_any_change_counts() -> None:
    a, b = (replace(run(loss, None), settings={"monitor": "val", "mode": "max"}) for loss in (0.02, 0.0201))
    found = compare(a, b)
    assert found.regression
    assert found.reason.endswith("Neither an interval nor the permitted loss is known, so that any change counts.")


@pytest.mark.parametrize("of_b", BAD)
@pytest.mark.parametrize("of_a", [*GOOD, Verdict.NOT_ACCEPTED, None])
def test_a_bad_end_of_b_alone_is_a_regression(of_a: Verdict | None, of_b: Verdict) -> None:
    for b in (run(None, verdict=of_b), run(0.0, verdict=of_b)):
        found = compare(run(0.02, verdict=of_a), b)
        assert found.regression
        assert found.reason == f"B ended in {of_b.value}, A did not."


@pytest.mark.parametrize("of_a", BAD)
def test_a_bad_end_of_a_alone_is_none(of_a: Verdict) -> None:
    found = compare(run(None, verdict=of_a), run(0.5, verdict=Verdict.NOT_ACCEPTED))
    assert not found.regression
    assert "there is no loss of A to compare with" in found.reason
    # Where A has a loss it is compared, whatever A's end.
    assert compare(run(0.02, verdict=of_a), run(0.5)).regression


@pytest.mark.parametrize("of_a", BAD)
@pytest.mark.parametrize("of_b", BAD)
def test_two_bad_ends_are_compared_by_their_losses_or_not_at_all(of_a: Verdict, of_b: Verdict) -> None:
    assert compare(run(0.02, verdict=of_a), run(0.06, verdict=of_b)).regression
    with pytest.raises(ReportError, match=r"A and B measured no loss of `final`. Both measured that of nothing."):
        compare(run(None, verdict=of_a), run(None, verdict=of_b))


def test_a_missing_loss_can_not_be_compared() -> None:
    steps = (Step(StepName.WEIGHTS, StepVerdict.PASSED, 0.89, 0.01),)
    with pytest.raises(ReportError, match=r"compared: B measured no loss of `final`. Both measured that of weights."):
        compare(run(0.02, steps=steps), run(None, verdict=None, steps=steps))
    with pytest.raises(ReportError, match=r"compared: A measured no loss"):
        compare(run(math.nan, verdict=None), run(0.02))
    with pytest.raises(ReportError, match=r"A and B measured no loss"):
        compare(Report(), Report())


@pytest.mark.parametrize("of_a", GOOD)
def test_a_lost_acceptance_is_a_note_and_with_strict_a_regression(of_a: Verdict) -> None:
    a, b = run(0.008, verdict=of_a), run(0.0095, verdict=Verdict.NOT_ACCEPTED)
    found = compare(a, b)
    assert not found.regression
    assert f"A was {of_a.value} and B is not_accepted." in notes(found)
    strict = compare(a, b, strict=True)
    assert strict.regression
    assert strict.reason.endswith(f"A was {of_a.value} and B is not_accepted. (--strict)")
    assert "--strict" not in notes(strict)


def test_strict_changes_nothing_else() -> None:
    for a, b in ((run(0.02), run(0.02)), (run(0.02, verdict=Verdict.NOT_ACCEPTED), run(0.02))):
        assert not compare(a, b, strict=True).regression
    lost = run(0.06, verdict=Verdict.NOT_ACCEPTED)
    assert compare(run(0.0), lost, strict=True).reason == compare(run(0.0), lost).reason
    assert "--strict" not in notes(compare(run(0.0), lost))


@pytest.mark.parametrize(("mode", "word"), [("max", "worse"), ("min", "better")])
def test_a_change_of_fp32_is_told_apart(mode: str, word: str) -> None:
    found = compare(run(0.02, mode=mode, baseline=0.9), run(0.02, mode=mode, baseline=0.85))
    assert not found.regression
    assert f"FP32 itself scores 0.9 in A and 0.85 in B, 0.05 {word}" in notes(found)
    scores = ("0.88", "0.83") if mode == "max" else ("0.92", "0.87")
    assert f"The quantized score goes from {scores[0]} to {scores[1]}." in notes(found)


def test_the_same_fp32_is_not_told() -> None:
    assert compare(run(0.02), run(0.02)).notes == ()
    assert "FP32" not in notes(compare(run(0.02), run(0.02, baseline=0.9 + 1e-8)))
    more = replace(run(0.02), baseline=Baseline(0.9, 400))
    assert "FP32 was measured on 500 samples in A and on 400 in B." in notes(compare(run(0.02), more))


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"monitor": "val_loss"}, "`monitor` is 'val' in A and 'val_loss' in B"), ({"mode": "min"}, "`mode` is 'max'")],
)
def test_another_metric_can_not_be_compared(settings: dict[str, str], match: str) -> None:
    a, b = run(0.02), run(0.02)
    with pytest.raises(ReportError, match=match):
        compare(a, replace(b, settings={**b.settings, **settings}))


def test_steps_are_compared_and_one_of_them_may_decide() -> None:
    def with_steps(weights: float, activations: float | None) -> Report:
        steps = [Step(StepName.WEIGHTS, StepVerdict.FAILED, 0.9 - weights, weights, (weights - 0.01, weights + 0.01))]
        if activations is not None:
            steps.append(Step(StepName.ACTIVATIONS, StepVerdict.PASSED, 0.9 - activations, activations))
        steps.append(Step(StepName.QAT, StepVerdict.SKIPPED))
        return run(0.02, steps=tuple(steps))

    a, b = with_steps(0.1, 0.02), with_steps(0.2, None)
    found = compare(a, b)
    assert [item.name for item in found.measurements] == ["activations", "weights", "final"]
    activations, weights, final = found.measurements
    assert (weights.change.outcome, final.change.outcome) == (Outcome.WORSE, Outcome.NOISE)
    assert (activations.change.outcome, activations.verdicts) == (Outcome.UNKNOWN, ("passed", None))
    assert weights.scores == (pytest.approx(0.8), pytest.approx(0.7))
    assert not found.regression
    by_weights = compare(a, b, step=StepName.WEIGHTS)
    assert by_weights.regression
    assert by_weights.decided_by == "weights"
    assert by_weights.reason.startswith("The loss of weights rose by 0.1,")
    with pytest.raises(ReportError, match=r"B measured no loss of `activations`. Both measured that of weights, final"):
        compare(a, b, step=StepName.ACTIVATIONS)
    with pytest.raises(ReportError, match="A and B measured no loss of `qat`"):
        compare(a, b, step=StepName.QAT)


def test_findings_are_told_apart_by_cause_and_place() -> None:
    here = Finding(Cause.WEIGHT_OUTLIERS, "60 sigma", "conv")
    again = replace(here, evidence="61 sigma")
    there = replace(here, quantizer="head")
    a, b = Report(findings=(here, here)), Report(findings=(again, there))
    assert findings_of_one(b, a) == (there,)
    assert findings_of_one(a, b) == (here,)
    found = compare(run(0.0, findings=a.findings), run(0.0, findings=b.findings))
    assert (found.new_findings, found.gone_findings) == ((there,), (here,))


def sensitivity(**decibels: float | None) -> Report:
    rows = (Sensitivity(name, "weight", 8, None, None, None, value, "exact") for name, value in decibels.items())
    return run(0.0, sensitivity=tuple(rows))


def test_sqnr_changes_of_more_than_a_decibel_are_listed_the_deepest_fall_first() -> None:
    a = sensitivity(same=30.0, little=30.0, fell=30.0, rose=30.0, crashed=30.0, gone=30.0, unknown=None, nan=math.nan)
    b = sensitivity(same=30.0, little=29.0, fell=28.9, rose=31.5, crashed=5.0, new=1.0, unknown=3.0, nan=3.0)
    assert sqnr_changes(a, b) == (
        SqnrChange("crashed", 30.0, 5.0),
        SqnrChange("fell", 30.0, 28.9),
        SqnrChange("rose", 30.0, 31.5),
    )


def test_ten_quantizers_are_listed_and_the_others_counted() -> None:
    a = sensitivity(**{f"q{index}": 40.0 for index in range(13)})
    b = sensitivity(**{f"q{index}": 38.0 - index for index in range(13)})
    found = compare(a, b)
    assert [item.quantizer for item in found.sqnr] == [f"q{index}" for index in range(12, 2, -1)]
    assert found.more_sqnr == 3


def settings_of(**bits: int) -> Report:
    made = {
        name: QuantizerSetting(name, "weight", width, True, "per_tensor", 0.0, 1.0, 0.1, 0.0)
        for name, width in bits.items()
    }
    return Report(final=Final(settings=made))


def test_bit_widths_that_differ_are_listed() -> None:
    found = bit_width_changes(settings_of(a=8, b=8, c=8), settings_of(a=8, b=16, d=4))
    assert found == (BitWidthChange("b", 8, 16), BitWidthChange("c", 8, None), BitWidthChange("d", None, 4))
    assert bit_width_changes(settings_of(a=8), Report()) == ()


def test_settings_and_versions_that_differ_are_listed() -> None:
    a = Report({"target": {"name": "int8", "weights": {"bit_width": 8}}, "exclude": ("a",), "x": math.nan}, {"seed": 1})
    b = Report({"target": {"name": "int8", "weights": {"bit_width": 4}}, "exclude": ["a"], "x": math.nan}, {"seed": 2})
    assert setting_changes(a, b) == (
        SettingChange("target.weights.bit_width", 8, 4),
        SettingChange("environment.seed", 1, 2),
    )


REPORTS = [full_report, hostile_report, image_report, sentence_report]


@pytest.mark.parametrize("make_b", REPORTS)
@pytest.mark.parametrize("make_a", REPORTS)
def test_every_comparison_is_strict_json(make_a: Any, make_b: Any) -> None:
    a, b = make_a(), replace(make_b(), settings={**make_b().settings, "monitor": "m", "mode": "max"})
    a = replace(a, settings={**a.settings, "monitor": "m", "mode": "max", "x": [math.inf, {"y": math.nan}]})
    found = compare(a, b)
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["regression"] is found.regression
    assert plain["measurements"][-1]["name"] == "final"
    assert [item["cause"] for item in plain["new_findings"]] == [item.cause.value for item in found.new_findings]

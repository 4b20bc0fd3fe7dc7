"""Every path through the chart, decided from records alone."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_quantdebug.flowchart import (
    REMEDIES_OF,
    Decision,
    Try,
    final_verdict,
    judge,
    judge_gain,
    next_step,
    next_try,
    objective,
    to_blame,
    tries_of,
)
from lightning_quantdebug.report import (
    Cause,
    Coverage,
    Finding,
    Remedy,
    Report,
    Sensitivity,
    Step,
    StepName,
    StepVerdict,
    Verdict,
)
from lightning_quantdebug.settings import REMEDIES
from lightning_quantdebug.target import Kind

NOW = frozenset({StepName.FP32_CHECK, StepName.ACTIVATIONS, StepName.WEIGHTS, StepName.QUANTIZE_MODEL})
ALL = frozenset(StepName)
PASSED, FAILED, NOISE, BROKEN = StepVerdict.PASSED, StepVerdict.FAILED, StepVerdict.NOISE, StepVerdict.BROKEN
SKIPPED, NOT_RUN = StepVerdict.SKIPPED, StepVerdict.NOT_RUN


def outcome(step: StepName, verdict: StepVerdict, both: StepVerdict = PASSED) -> Step:
    details = {"both": {"verdict": both.value}} if step is StepName.WEIGHTS else {}
    return Step(step, verdict, details=details)


NOTHING_KNOWN = Report()
BLAMED = Report(
    coverage=Coverage(("conv.weight", "conv", "head")),
    findings=(
        Finding(Cause.TOO_FEW_SAMPLES, "500"),
        Finding(Cause.WEIGHT_OUTLIERS, "60 sigma", "conv.weight"),
        Finding(Cause.BIASED_ERROR, "a shift", "conv.weight"),
        Finding(Cause.NOT_QUANTIZED, "in FP32", "pool"),
    ),
    sensitivity=tuple(
        Sensitivity(name, "activation", 8, None, None, None, None, "exact", guilty=name != "head")
        for name in ("conv.weight", "conv", "head")
    ),
)


def path(
    available: frozenset[StepName], both: StepVerdict = PASSED, report: Report = NOTHING_KNOWN, **verdicts: StepVerdict
) -> list[tuple[str, str]]:
    """Each box with what became of it, when those that run end with the given verdicts (default: passed)."""
    walked = []
    while (decision := next_step(report, available)) is not None:
        name = decision.step.value
        verdict = verdicts.get(name, PASSED) if decision.runs else decision.verdict
        walked.append((name, verdict.value if decision.runs else f"{verdict.value}: {decision.advice}"))
        done = outcome(decision.step, verdict, both) if decision.runs else Step(decision.step, verdict)
        report = report.with_step(done)
    return walked


WEIGHTS_FINE = "skipped: The quantized weights alone stay within the tolerance."
ACTIVATIONS_FINE = "skipped: The quantized activations alone stay within the tolerance."
BOTH_FINE = "skipped: Weights and activations together stay within the tolerance: no quantizer is to blame."
NOTHING_TO_SEE = "skipped: No quantizer is to blame: there is no tensor to look at."
NOTHING_TO_TRAIN = "skipped: The quantized model is accepted: there is nothing to train."
NOTHING_TO_JUDGE_BY = (
    "skipped: The loss can not be told from zero with these samples: training could not be judged either."
)
LATER = "not_run: This version does not run this step."


def test_all_well() -> None:
    assert path(NOW) == path(ALL) == [
        ("fp32_check", "passed"),
        ("activations", "passed"),
        ("weights", "passed"),
        ("fix_weights", WEIGHTS_FINE),
        ("fix_activations", ACTIVATIONS_FINE),
        ("per_quantizer", BOTH_FINE),
        ("visualize", NOTHING_TO_SEE),
        ("fix_quantizers", BOTH_FINE),
        ("quantize_model", "passed"),
        ("qat", NOTHING_TO_TRAIN),
    ]  # fmt: skip


def test_all_ill_in_this_version() -> None:
    ill = path(NOW, FAILED, activations=FAILED, weights=FAILED, quantize_model=FAILED)
    assert ill == [
        ("fp32_check", "passed"),
        ("activations", "failed"),
        ("weights", "failed"),
        ("fix_weights", LATER),
        ("fix_activations", LATER),
        ("per_quantizer", LATER),
        ("visualize", NOTHING_TO_SEE),
        ("fix_quantizers", LATER),
        ("quantize_model", "failed"),
        ("qat", LATER),
    ]


def test_all_ill_runs_every_box_in_order_where_all_exist() -> None:
    ill = path(ALL, FAILED, BLAMED, **{step.value: FAILED for step in StepName if step is not StepName.FP32_CHECK})
    assert [name for name, _ in ill] == [step.value for step in StepName]
    assert [verdict for _, verdict in ill] == ["passed", *["failed"] * 9]
    later = dict(path(NOW, FAILED, BLAMED, activations=FAILED, weights=FAILED))
    assert later["visualize"] == LATER


def test_a_broken_pipeline_ends_the_walk() -> None:
    assert path(ALL, fp32_check=BROKEN) == [("fp32_check", "broken")]


@pytest.mark.parametrize("good", [PASSED, NOISE])
def test_only_the_remedies_of_what_is_ill_run(good: StepVerdict) -> None:
    weights_ill = dict(path(ALL, FAILED, activations=good, weights=FAILED))
    assert (weights_ill["fix_weights"], weights_ill["fix_activations"]) == ("passed", ACTIVATIONS_FINE)
    activations_ill = dict(path(ALL, FAILED, activations=FAILED, weights=good))
    assert (activations_ill["fix_weights"], activations_ill["fix_activations"]) == (WEIGHTS_FINE, "passed")


@pytest.mark.parametrize("both", [FAILED, NOISE, PASSED])
def test_the_quantizers_are_searched_where_the_two_together_fail(both: StepVerdict) -> None:
    found = dict(path(ALL, both))
    expected = "passed" if both is FAILED else BOTH_FINE
    assert [found[name] for name in ("per_quantizer", "fix_quantizers")] == [expected] * 2


@pytest.mark.parametrize("both", [FAILED, PASSED])
def test_tensors_to_blame_are_looked_at_also_where_a_remedy_has_cured_them(both: StepVerdict) -> None:
    assert dict(path(ALL, both))["visualize"] == NOTHING_TO_SEE
    assert dict(path(ALL, both, BLAMED))["visualize"] == "passed"


def test_to_blame_are_the_quantizers_of_findings_and_then_the_guilty_ones() -> None:
    assert to_blame(BLAMED) == {"conv.weight": "weight_outliers", "conv": "guilty"}
    assert to_blame(BLAMED, most=1) == {"conv.weight": "weight_outliers"}
    assert to_blame(Report()) == {}


@pytest.mark.parametrize(
    ("verdict", "qat"), [(PASSED, NOTHING_TO_TRAIN), (NOISE, NOTHING_TO_JUDGE_BY), (FAILED, "passed")]
)
def test_training_is_for_what_failed(verdict: StepVerdict, qat: str) -> None:
    assert dict(path(ALL, quantize_model=verdict))["qat"] == qat


def test_a_step_that_did_not_run_is_no_success() -> None:
    found = dict(path(ALL - {StepName.ACTIVATIONS, StepName.WEIGHTS, StepName.QUANTIZE_MODEL}))
    assert found["activations"] == found["weights"] == found["quantize_model"] == LATER
    assert [found[name] for name in ("fix_weights", "fix_activations", "per_quantizer", "qat")] == ["passed"] * 4


def test_a_decision_speaks_for_itself() -> None:
    assert next_step(Report(), NOW) == Decision(StepName.FP32_CHECK)
    assert Decision(StepName.QAT).runs
    assert next_step(Report(), frozenset()) == Decision(
        StepName.FP32_CHECK, runs=False, verdict=NOT_RUN, advice=NOT_RUN.advice
    )


def test_the_next_step_is_taken_from_the_report_alone() -> None:
    report = Report().with_step(outcome(StepName.FP32_CHECK, PASSED)).with_step(outcome(StepName.WEIGHTS, FAILED))
    assert next_step(report, NOW) == next_step(report, NOW) == Decision(StepName.ACTIVATIONS)


@pytest.mark.parametrize(
    ("loss", "interval", "expected"),
    [
        (-0.5, None, PASSED),
        (0.0, None, PASSED),
        (0.01, None, PASSED),
        (0.01, (-1.0, 1.0), PASSED),
        (0.010001, None, FAILED),
        (0.02, (0.001, 0.04), FAILED),
        (0.02, (0.0, 0.04), NOISE),
        (0.02, (-0.01, 0.04), NOISE),
        (float("inf"), None, FAILED),
        (float("nan"), None, FAILED),
        (float("nan"), (float("nan"), float("nan")), FAILED),
    ],
)
def test_judge(loss: float, interval: Any, expected: StepVerdict) -> None:
    assert judge(loss, interval, permitted=0.01) is expected


@pytest.mark.parametrize(
    ("steps", "kept", "expected"),
    [
        ({}, None, Verdict.FAILED),
        ({StepName.FP32_CHECK: BROKEN}, None, Verdict.BROKEN_PIPELINE),
        ({StepName.FP32_CHECK: BROKEN, StepName.QUANTIZE_MODEL: PASSED}, None, Verdict.BROKEN_PIPELINE),
        ({StepName.FP32_CHECK: PASSED}, None, Verdict.FAILED),
        ({StepName.QUANTIZE_MODEL: PASSED}, None, Verdict.ACCEPTED),
        ({StepName.QUANTIZE_MODEL: PASSED}, False, Verdict.ACCEPTED),
        ({StepName.QUANTIZE_MODEL: PASSED}, True, Verdict.REPAIRED),
        ({StepName.QUANTIZE_MODEL: PASSED, StepName.QAT: SKIPPED}, True, Verdict.REPAIRED),
        ({StepName.QUANTIZE_MODEL: PASSED, StepName.QAT: PASSED}, True, Verdict.REPAIRED_BY_QAT),
        ({StepName.QUANTIZE_MODEL: FAILED}, True, Verdict.NOT_ACCEPTED),
        ({StepName.QUANTIZE_MODEL: NOISE}, None, Verdict.NOT_ACCEPTED),
        ({StepName.QUANTIZE_MODEL: FAILED, StepName.QAT: NOT_RUN}, None, Verdict.NOT_ACCEPTED),
        ({StepName.QUANTIZE_MODEL: NOT_RUN, StepName.QAT: NOT_RUN}, None, Verdict.NOT_ACCEPTED),
    ],
)
def test_final_verdict(steps: dict[StepName, StepVerdict], kept: bool | None, expected: Verdict) -> None:
    report = Report(remedies=() if kept is None else (Remedy("cle", 0.5, 0.8, kept, "", 0.0),))
    for step, verdict in steps.items():
        report = report.with_step(outcome(step, verdict))
    assert final_verdict(report) is expected


def standing(step: StepName, verdict: StepVerdict, **details: StepVerdict) -> Step:
    return Step(step, verdict, details={name: {"verdict": value.value} for name, value in details.items()})


def test_where_only_the_two_together_lose_both_boxes_are_walked_with_all_quantizers_on() -> None:
    report = Report().with_step(outcome(StepName.FP32_CHECK, PASSED)).with_step(outcome(StepName.ACTIVATIONS, PASSED))
    report = report.with_step(standing(StepName.WEIGHTS, PASSED, both=FAILED))
    assert next_step(report, ALL) == Decision(StepName.FIX_WEIGHTS)
    assert objective(report, StepName.FIX_WEIGHTS) is None
    report = report.with_step(standing(StepName.FIX_WEIGHTS, FAILED, both=FAILED, weights=PASSED, activations=PASSED))
    assert next_step(report, ALL) == Decision(StepName.FIX_ACTIVATIONS)
    assert objective(report, StepName.FIX_ACTIVATIONS) is None


def test_a_box_measures_with_the_quantizers_of_its_own_kind() -> None:
    report = Report().with_step(outcome(StepName.ACTIVATIONS, FAILED)).with_step(outcome(StepName.WEIGHTS, FAILED))
    assert objective(report, StepName.FIX_WEIGHTS) is Kind.WEIGHT
    assert objective(report, StepName.FIX_ACTIVATIONS) is Kind.ACTIVATION


def test_what_a_repair_of_weights_does_to_activations_is_seen() -> None:
    report = Report().with_step(outcome(StepName.FP32_CHECK, PASSED)).with_step(outcome(StepName.ACTIVATIONS, PASSED))
    report = report.with_step(standing(StepName.WEIGHTS, FAILED, both=FAILED))
    spoilt = standing(StepName.FIX_WEIGHTS, PASSED, both=FAILED, weights=PASSED, activations=FAILED)
    assert next_step(report.with_step(spoilt), ALL) == Decision(StepName.FIX_ACTIVATIONS)
    assert objective(report.with_step(spoilt), StepName.FIX_ACTIVATIONS) is Kind.ACTIVATION


def test_a_repair_that_mends_both_ends_the_search() -> None:
    report = Report().with_step(outcome(StepName.FP32_CHECK, PASSED)).with_step(outcome(StepName.ACTIVATIONS, FAILED))
    report = report.with_step(standing(StepName.WEIGHTS, FAILED, both=FAILED))
    report = report.with_step(standing(StepName.FIX_WEIGHTS, PASSED, both=PASSED))
    decision = next_step(report, ALL)
    assert decision is not None
    assert (decision.step, decision.runs) == (StepName.FIX_ACTIVATIONS, False)
    assert decision.advice == "Weights and activations together stay within the tolerance."
    decision = next_step(report.with_step(Step(StepName.FIX_ACTIVATIONS, SKIPPED)), ALL)
    assert decision is not None
    assert (decision.step, decision.runs) == (StepName.PER_QUANTIZER, False)


def test_every_remedy_of_a_box_is_one_that_the_user_can_name() -> None:
    assert {name for box in REMEDIES_OF.values() for name in box} <= set(REMEDIES)
    order = [name for name in REMEDIES if any(name in box for box in REMEDIES_OF.values())]
    assert order == [name for box in REMEDIES_OF.values() for name in box]


def test_remedies_come_in_the_order_of_the_chart_or_of_the_user() -> None:
    assert [item.remedy for item in tries_of(StepName.FIX_WEIGHTS, None)] == list(REMEDIES_OF[StepName.FIX_WEIGHTS])
    mine = ["activation_cle", "adaround", "range_setting", "cle", "adaround"]
    assert tries_of(StepName.FIX_WEIGHTS, mine) == (Try("adaround"), Try("cle"))
    activations = tries_of(StepName.FIX_ACTIVATIONS, mine)
    assert activations[0] == Try("activation_cle")
    assert [item.variant for item in activations[1:]] == ["mse", "percentile", "min_max", "cross_entropy", "batchnorm"]
    assert tries_of(StepName.FIX_ACTIVATIONS, []) == ()


def tried(*remedies: str, step: StepName = StepName.FIX_WEIGHTS, variant: str = "") -> Report:
    return Report(
        remedies=tuple(Remedy(name, 0.5, 0.6, True, "", 0.0, step=step.value, variant=variant) for name in remedies)
    )


def test_a_box_goes_on_until_it_is_good_or_has_nothing_left() -> None:
    weights = StepName.FIX_WEIGHTS
    assert next_try(Report(), weights, FAILED, None) == Try("cle")
    assert next_try(tried("cle"), weights, FAILED, None) == Try("per_channel")
    assert next_try(tried("cle"), weights, PASSED, None) is None
    assert next_try(tried("cle"), weights, NOISE, None) is None
    assert next_try(tried(*REMEDIES_OF[weights]), weights, FAILED, None) is None
    assert next_try(tried("cle", step=StepName.FIX_ACTIVATIONS), weights, FAILED, None) == Try("cle")
    ranges = tried("range_setting", step=StepName.FIX_ACTIVATIONS, variant="mse")
    assert next_try(ranges, StepName.FIX_ACTIVATIONS, FAILED, None) == Try("range_setting", "percentile")


@pytest.mark.parametrize(
    ("gain", "interval", "kept", "reason"),
    [
        (0.1, (0.05, 0.15), True, "the score rose beyond noise"),
        (0.1, (0.0, 0.2), False, "the gain can not be told from noise"),
        (0.0, (0.0, 0.0), False, "the score did not rise"),
        (-0.1, (-0.2, 0.0), False, "the score got worse"),
        (float("nan"), None, False, "the gain is negligible (no interval is known)"),
        (0.0011, None, True, "the score rose (no interval is known)"),
        (0.0009, None, False, "the gain is negligible (no interval is known)"),
    ],
)
def test_judge_gain(gain: float, interval: Any, kept: bool, reason: str) -> None:
    assert judge_gain(gain, interval, permitted=0.01) == (kept, reason)

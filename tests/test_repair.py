"""The loop of remedies: what is kept stays, what is undone leaves nothing, and every try is in the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

from lightning_quantdebug import repair
from lightning_quantdebug.adjustment import Adjustment, Applied
from lightning_quantdebug.advice import after_repair, on_failure
from lightning_quantdebug.batch_scores import BatchScore
from lightning_quantdebug.draw_scores import SCORED_DRAWS, draws_report
from lightning_quantdebug.errors import CalibrationError, NonFiniteScoreError
from lightning_quantdebug.evaluation import Evaluation
from lightning_quantdebug.instrument import Instrumentation, batch_runs, instrument
from lightning_quantdebug.repair import Repair, Workbench, follow_rank_zero
from lightning_quantdebug.report import Cause, Finding, Remedy, Report, Step, StepName, StepVerdict
from lightning_quantdebug.selection import Split
from lightning_quantdebug.settings import make_settings
from lightning_quantdebug.target import Mode
from tests.test_instrumentation import everything

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
WEIGHTS, ACTIVATIONS = StepName.FIX_WEIGHTS, StepName.FIX_ACTIVATIONS


def score(value: float, batches: int = 10) -> Evaluation:
    """An evaluation whose batches differ a little, in the same way each time."""
    parts = tuple(BatchScore(value + 0.001 * (index % 3 - 1), 8.0) for index in range(batches))
    return Evaluation(value, {}, parts, 8 * batches, 0.0)


class Bench:
    """A workbench on a real session, with scores and remedies that the test decides."""

    def __init__(self, session: Instrumentation, scores: Sequence[Any], **settings: Any) -> None:
        self.session = session
        self.scores = list(scores)
        self.recalibrated = 0
        self.said: list[str] = []
        self.late: Callable[[], bool] = lambda: False
        self.settings = make_settings(monitor="acc", mode="max", tolerance=0.01, **settings)

    def measure(self) -> Evaluation:
        found = self.scores.pop(0)
        if isinstance(found, Exception):
            raise found
        return score(found)

    def recalibrate(self) -> None:
        self.recalibrated += 1

    def repair(self, step: StepName = WEIGHTS, before: float = 0.5) -> Repair:
        bench = Workbench(
            self.session, batch_runs(self.session, [X]), self.recalibrate, self.measure, self.settings,
            Split.of(score(1.0)), lambda: self.late(), self.said.append,
        )  # fmt: skip
        return Repair(bench, step, score(1.0), score(before))


@pytest.fixture
def session() -> Iterator[Instrumentation]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    with instrument(model, X, {"preset": "w4a8", "weights": {"granularity": "per_tensor"}}) as q:
        q.calibrate([X])
        yield q


def shifting(name: str = "0", **outcome: Any) -> Callable[..., Applied]:
    """A remedy that visibly changes the session."""

    def remedy(session: Instrumentation, *_: Any, **__: Any) -> Applied:
        session.adjust({session.layers[0].key: Adjustment(bias_offset=torch.ones(4))})
        for quantizer in session.quantizers.values():
            quantizer.freeze()
        return Applied(**{"changed": (name,), "note": "shifted", **outcome})

    return remedy


@contextmanager
def planted(monkeypatch: pytest.MonkeyPatch, **remedies: Callable[..., Applied]) -> Iterator[None]:
    with monkeypatch.context() as patch:
        for name, remedy in remedies.items():
            patch.setattr(repair, name, remedy)
        yield


def test_what_helps_is_kept_and_the_next_starts_from_there(
    session: Instrumentation, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = Bench(session, [0.8, 0.995], remedies=["cle", "bias_correction", "adaround"])
    loop = bench.repair()
    followed: list[int] = []
    monkeypatch.setattr(repair, "follow_rank_zero", lambda session: followed.append(len(session.adjustments)))
    with planted(monkeypatch, equalize=shifting(), correct_bias=shifting(), adaround=shifting()):
        report = loop.walk(Report())
    assert followed == [1, 1], "each remedy once it is applied, on all ranks"
    assert [(item.remedy, item.before, item.after, item.kept) for item in report.remedies] == [
        ("cle", 0.5, 0.8, True), ("bias_correction", 0.8, 0.995, True),
    ]  # fmt: skip
    assert {item.reason for item in report.remedies} == {"the score rose beyond noise"}
    assert report.remedies[0].gain == pytest.approx(0.3)
    assert report.remedies[0].note == "shifted"
    assert report.remedies[0].step == "fix_weights"
    assert (loop.verdict, loop.evaluation.score) == (StepVerdict.PASSED, 0.995)
    (adjustment,) = session.adjustments.values()
    assert adjustment.bias_offset is not None
    assert adjustment.bias_offset.tolist() == [2.0] * 4, "both are in force"
    assert bench.recalibrated == 2
    assert bench.said == ["fix_weights: cle", "fix_weights: bias_correction"]


@pytest.mark.parametrize(
    ("found", "reason", "after"),
    [
        (0.5, "the score did not rise", 0.5),
        (0.4, "the score got worse", 0.4),
        (NonFiniteScoreError("nan"), "the score became NaN or infinite", None),
    ],
)
def test_what_does_not_help_is_undone_bit_for_bit(
    session: Instrumentation, monkeypatch: pytest.MonkeyPatch, found: Any, reason: str, after: float | None
) -> None:
    session.set_mode("quantize", kind="weight")
    before = everything(session)
    loop = Bench(session, [found], remedies=["cle"]).repair()
    with planted(monkeypatch, equalize=shifting()):
        report = loop.walk(Report())
    (item,) = report.remedies
    assert (item.kept, item.reason, item.after, item.before) == (False, reason, after, 0.5)
    assert everything(session) == before
    assert loop.evaluation.score == 0.5
    assert loop.verdict is StepVerdict.FAILED


def test_a_gain_that_may_be_noise_is_undone(session: Instrumentation, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(session, [], remedies=["cle"])
    noisy = [0.4 + 0.3 * (index % 4 == 0) for index in range(10)]
    after = Evaluation(0.52, {}, tuple(BatchScore(value, 8.0) for value in noisy), 80, 0.0)
    monkeypatch.setattr(bench, "measure", lambda: after)
    with planted(monkeypatch, equalize=shifting()):
        (item,) = bench.repair().walk(Report()).remedies
    assert (item.kept, item.reason) == (False, "the gain can not be told from noise")
    assert item.interval is not None
    assert item.gain is not None
    assert item.interval[0] <= 0 < item.gain
    assert not session.adjustments


@pytest.mark.parametrize(
    ("outcome", "reason"),
    [
        ({}, "it found nothing to change"),
        ({"skipped": (("a", "is shared"), ("b", "is shared"), ("c", "is tied"), ("d", "x"))}, "is shared; is tied"),
        ({"findings": (Finding(Cause.CHANGED_FUNCTION, "the outputs parted by 0.1"),)}, "the outputs parted by 0.1"),
    ],
)
def test_what_changed_nothing_is_not_measured(
    session: Instrumentation, monkeypatch: pytest.MonkeyPatch, outcome: dict[str, Any], reason: str
) -> None:
    before = everything(session)
    bench = Bench(session, [], remedies=["cle"])
    with planted(monkeypatch, equalize=shifting(changed=(), **outcome)):
        report = bench.repair().walk(Report())
    (item,) = report.remedies
    assert (item.after, item.kept, item.reason, item.gain) == (None, False, reason, None)
    assert item.skipped == dict(outcome.get("skipped", ()))
    assert everything(session) == before
    assert report.findings == outcome.get("findings", ())
    assert bench.recalibrated == 0


def test_a_finding_is_reported_once(session: Instrumentation, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = Finding(Cause.NON_FINITE, "a batch has NaN")
    bench = Bench(session, [0.4, 0.4], remedies=["cle", "adaround"])
    with planted(monkeypatch, equalize=shifting(findings=(finding,)), adaround=shifting(findings=(finding,))):
        assert bench.repair().walk(Report()).findings == (finding,)


def test_a_remedy_that_can_not_be_applied_is_undone(session: Instrumentation, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(session: Instrumentation, *_: Any) -> Applied:
        shifting()(session)
        raise CalibrationError("a weight must be finite.")

    before = everything(session)
    with planted(monkeypatch, equalize=fail):
        (item,) = Bench(session, [], remedies=["cle"]).repair().walk(Report()).remedies
    assert item.reason == "it could not be applied: a weight must be finite."
    assert (item.kept, item.after) == (False, None)
    assert everything(session) == before


def test_an_interrupt_undoes_what_was_being_tried(session: Instrumentation, monkeypatch: pytest.MonkeyPatch) -> None:
    before = everything(session)
    bench = Bench(session, [], remedies=["cle"])
    monkeypatch.setattr(bench, "measure", interrupted)
    with planted(monkeypatch, equalize=shifting()), pytest.raises(KeyboardInterrupt):
        bench.repair().walk(Report())
    assert everything(session) == before


def interrupted() -> Evaluation:
    raise KeyboardInterrupt


def test_a_spent_time_budget_ends_the_box(session: Instrumentation, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(session, [0.8], remedies=["cle", "adaround"])
    bench.late = lambda: not bench.scores
    loop = bench.repair()
    with planted(monkeypatch, equalize=shifting(), adaround=shifting()):
        report = loop.walk(Report())
    assert [item.remedy for item in report.remedies] == ["cle"]
    assert loop.is_late


def test_every_method_of_range_setting_is_a_try_of_its_own(session: Instrumentation) -> None:
    session.calibrate([torch.randn(4096, 6, generator=torch.Generator().manual_seed(1))])
    bench = Bench(session, [0.5, 0.6, 0.6, 0.6], remedies=["range_setting"])
    report = bench.repair(ACTIVATIONS).walk(Report())
    by_variant = {item.variant: item for item in report.remedies}
    assert list(by_variant) == ["mse", "percentile", "min_max", "cross_entropy", "batchnorm"]
    assert by_variant["percentile"].kept
    assert by_variant["percentile"].title == "range_setting (percentile)"
    assert session.quantizers["1"].spec.range_setting is not None
    assert session.quantizers["1"].spec.range_setting.value == "percentile"
    assert by_variant["batchnorm"].after is None
    assert bench.recalibrated == 0


def test_smaller_granularity_needs_no_calibration(session: Instrumentation) -> None:
    bench = Bench(session, [0.8], remedies=["per_channel", "per_group"])
    report = bench.repair().walk(Report())
    assert [(item.remedy, item.kept) for item in report.remedies] == [("per_channel", True), ("per_group", False)]
    assert report.remedies[0].note == "2 weights per channel"
    assert report.remedies[1].reason.startswith("its shape (4, 6) can not be quantized per_group")
    assert bench.recalibrated == 0


def test_all_ranks_go_on_with_what_rank_zero_found(session: Instrumentation, monkeypatch: pytest.MonkeyPatch) -> None:
    follow_rank_zero(session)
    shifting()(session)
    mine = everything(session)
    sent: list[Any] = []
    monkeypatch.setattr(repair, "rank_count", lambda: 2)
    monkeypatch.setattr(repair, "from_rank_zero", lambda value: (sent.append(value), value)[1])
    follow_rank_zero(session)
    assert list(sent[0][0]) == ["0"], "keys differ from process to process, names do not"
    torch.save(sent[0], "/dev/null")
    kept = sent[0]
    for quantizer in session.quantizers.values():
        quantizer.frozen = False
    session.adjust({session.layers[1].key: Adjustment(bias_offset=torch.ones(3))})
    monkeypatch.setattr(repair, "from_rank_zero", lambda value: kept)
    follow_rank_zero(session)
    assert [name for name, key in session.keys_by_name.items() if key in session.adjustments] == ["0"]
    assert everything(session)[1:] == mine[1:]


# Draws of the calibration set.


def test_the_score_of_a_few_draws(session: Instrumentation) -> None:
    batches = list(torch.randn(8, 4, 6, generator=torch.Generator().manual_seed(3)))
    seen: list[list[float]] = []

    def measure() -> Evaluation:
        seen.append([float(q.encoding.range_max) for q in session.select(kind="activation") if q.encoding is not None])
        return score(0.5 + 0.1 * len(seen))

    session.calibrate(batches)
    before = everything(session)
    found = draws_report(session, batch_runs(session, batches), measure, 32)
    assert found is not None
    assert everything(session) == before
    assert found["scores"] == pytest.approx([0.6, 0.7, 0.8])
    assert len(seen) == SCORED_DRAWS
    assert seen[0] != seen[1], "each draw has ranges of its own"
    assert "3 random halves of the calibration batches the score is 0.7 on average, from 0.6 to 0.8" in found["advice"]
    assert [size["samples"] for size in found["spread"]["sizes"]] == [4, 8, 16]
    assert draws_report(session, batch_runs(session, batches[:1]), measure, 4) is None


def test_the_session_is_as_before_when_a_draw_can_not_be_scored(session: Instrumentation) -> None:
    before = everything(session)
    with pytest.raises(KeyboardInterrupt):
        draws_report(session, batch_runs(session, [X, 2 * X]), interrupted, 8)
    assert everything(session) == before
    assert all(quantizer.mode is Mode.BYPASS for quantizer in session.quantizers.values())


# Advice.


def tries(*kept: bool, step: StepName = WEIGHTS) -> Report:
    names = ("cle", "adaround", "bias_correction")
    pairs = zip(names, kept, strict=False)
    return Report(remedies=tuple(Remedy(name, 0.5, 0.6, one, "", 0.0, step=step.value) for name, one in pairs))


@pytest.mark.parametrize(
    ("report", "verdict", "text"),
    [
        (tries(True, False), "passed", "Repaired by cle: the loss is within the tolerance."),
        (tries(True, True), "noise", "cle, adaround helped. The loss can not be told from zero with these samples."),
        (tries(False), "noise", "The loss can not be told from zero with these samples."),
        (tries(), "passed", "The loss is within the tolerance: nothing to repair here."),
        (tries(True, False), "failed", "cle helped, but the loss still exceeds the tolerance; it stays with"),
        (tries(False, False), "failed", "None of 2 remedies helped beyond noise, so all of them were undone."),
        (tries(True, step=ACTIVATIONS), "failed", "No remedy of the weights may be tried: `remedies` names none of"),
    ],
)  # fmt: skip
def test_advice_after_a_box(report: Report, verdict: str, text: str) -> None:
    assert after_repair(report, WEIGHTS, StepVerdict(verdict)).startswith(text)


def test_the_last_advice_is_about_the_model_as_it_was_repaired() -> None:
    standing = {"weights": {"verdict": "passed"}, "activations": {"verdict": "failed"}}
    report = Report(
        steps=(
            Step(StepName.ACTIVATIONS, StepVerdict.PASSED), Step(StepName.WEIGHTS, StepVerdict.FAILED),
            Step(WEIGHTS, StepVerdict.PASSED, details=standing),
        )
    )  # fmt: skip
    assert "it comes from activations. The next" in on_failure(report)
    assert "it comes from weights. The next" in on_failure(Report(steps=report.steps[:2]))

"""The repair of single quantizers on real sessions with scores that the test decides: it ends well, cheaply, exactly.

Walks on trained networks are in ``test_quantizer_walks``.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_quantdebug.activation_ranges import set_activation_ranges
from lightning_quantdebug.adjustment import Adjustment
from lightning_quantdebug.advice import after_single_repairs
from lightning_quantdebug.batch_scores import BatchScore
from lightning_quantdebug.bias_correction import correct_bias
from lightning_quantdebug.errors import CalibrationError
from lightning_quantdebug.evaluation import Evaluation
from lightning_quantdebug.instrument import Instrumentation, batch_runs, instrument
from lightning_quantdebug.output_meter import NoiseSums
from lightning_quantdebug.quantizer_repair import QuantizerRepair, RepairBench
from lightning_quantdebug.repair_plan import MOST_SINGLES, SingleTry, raising, refusals_allowed
from lightning_quantdebug.report import Report, Sensitivity, StepVerdict
from lightning_quantdebug.settings import make_settings
from lightning_quantdebug.side_by_side import Measured
from lightning_quantdebug.target import Kind, RangeSetting
from tests.test_instrumentation import everything

X = torch.rand(32, 8, generator=torch.Generator().manual_seed(0))
TOLERANCE = 0.01


def chain(layers: int = 2, width: int = 8) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*[part for _ in range(layers) for part in (nn.Linear(width, width), nn.ReLU())]).eval()


@contextmanager
def session_of(
    target: Any = "w4a4_per_tensor", net: nn.Module | None = None, x: Tensor = X
) -> Iterator[Instrumentation]:
    with torch.no_grad(), instrument(chain() if net is None else net, x, target) as q:
        q.calibrate([x])
        yield q


def evaluation(score: float) -> Evaluation:
    """Ten batches that differ a little, in the same way each time."""
    parts = tuple(BatchScore(score + 0.001 * (index % 3 - 1), 8.0) for index in range(10))
    return Evaluation(score, {}, parts, 80, 0.0)


def measured(score: float, damage: float = 1.0) -> Measured:
    return Measured(evaluation(score), NoiseSums(True, [damage + 0.01 * index for index in range(40)]))


class World:
    """A session whose score is what the bits of its quantizers cost, each its own, all added up."""

    def __init__(self, session: Instrumentation, costs: Mapping[str, float], **given: Any) -> None:
        self.session = session
        self.costs = costs
        self.plain = {name: quantizer.bit_width for name, quantizer in session.quantizers.items()}
        self.measurements = 0
        self.late: Callable[[], bool] = lambda: False
        self.said: list[str] = []
        self.settings = make_settings(monitor="acc", mode="max", tolerance=TOLERANCE, **given)

    def loss(self, widths: Mapping[str, int] | None = None) -> float:
        """A quarter of a cost is left with each further bit-width that is allowed."""
        have = widths or {name: quantizer.bit_width for name, quantizer in self.session.quantizers.items()}
        steps = {name: self.steps(name, width) for name, width in have.items()}
        return sum(cost * 0.25 ** steps[name] for name, cost in self.costs.items())

    def steps(self, name: str, width: int) -> int:
        wider = self.session.target.wider(self.session.quantizers[name].kind, self.plain[name])
        return sum(width >= other for other in wider)

    def measure(self) -> Measured:
        self.measurements += 1
        return measured(1.0 - self.loss(), 1.0 + self.loss())

    def repair(self, **counterfactuals: float) -> QuantizerRepair:
        order = sorted(self.costs, key=lambda name: -self.costs[name])
        rows = [row(self.session, name, **counterfactuals) for name in order]
        return QuantizerRepair(self.bench(self.measure), rows)

    def bench(self, measure: Callable[[], Measured]) -> RepairBench:
        runs = batch_runs(self.session, [X])
        return RepairBench(
            self.session, runs, measure, self.settings, evaluation(1.0), lambda: self.late(), self.said.append
        )


def row(session: Instrumentation, name: str, **counterfactuals: float) -> Sensitivity:
    quantizer = session.quantizers[name]
    kind, width = quantizer.kind.value, quantizer.bit_width
    return Sensitivity(name, kind, width, None, None, None, 20.0, "exact", counterfactuals=counterfactuals)


def scripted(world: World, scores: Sequence[float]) -> QuantizerRepair:
    """A repair of the first activation whose measurements are given one after the other."""
    left = list(scores)
    rows = [row(world.session, "1", now=20.0, mse=30.0)]
    return QuantizerRepair(world.bench(lambda: measured(left.pop(0))), rows)


# It ends well, and cheaply.


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12), st.sampled_from([(8,), (8, 16), (5, 6, 8, 16)]))
def test_it_ends_within_the_tolerance_if_all_raised_are_and_no_single_one_can_be_lowered(
    seed: int, layers: int, widths: tuple[int, ...]
) -> None:
    target = {"preset": "w4a4_per_tensor", "weight_bit_widths": widths, "activation_bit_widths": widths}
    with session_of(target, chain(layers)) as session:
        draw = random.Random(seed)
        costs = {name: 0.03 * draw.random() ** 6 for name in session.quantizers}
        world = World(session, costs)
        started = everything(session)
        repair = world.repair()
        report = repair.walk(Report())
        best = world.loss(dict.fromkeys(costs, 16))
        final = {name: quantizer.bit_width for name, quantizer in session.quantizers.items()}
        assert (repair.verdict is StepVerdict.PASSED) == (best <= TOLERANCE)
        assert repair.loss == pytest.approx(world.loss(final))
        assert world.measurements == len(repair.points) == 1 + len(report.remedies)
        names, levels = len(costs), len(widths)
        allowed = refusals_allowed(names)
        refused = sum(not remedy.kept for remedy in report.remedies)
        assert refused <= levels * allowed
        assert world.measurements <= MOST_SINGLES + levels * (2 + names.bit_length() + 2 * allowed)
        if best > TOLERANCE:
            assert set(final.values()) == {max(widths)}
        elif refused < allowed:
            for name, width in final.items():
                narrower = [other for other in (4, *widths) if other < width]
                assert all(world.loss({**final, name: other}) > TOLERANCE - 1e-12 for other in narrower)
        if world.loss(world.plain) <= TOLERANCE:
            assert everything(session) == started
            assert world.measurements == 1


def test_bits_are_given_back_only_as_far_as_is_good() -> None:
    """Five must have 16 bits for it to be good; all others were raised to 8 on the way."""
    with session_of("w4a4_per_tensor", chain(6)) as session:
        names = list(session.quantizers)
        costs = dict.fromkeys(names, 1e-6) | dict.fromkeys(names[5:9], 0.03) | {names[0]: 0.02}
        world = World(session, costs)
        repair = world.repair()
        report = repair.walk(Report())
        widths = {name: quantizer.bit_width for name, quantizer in session.quantizers.items()}
        # 4 * 0.03 / 16 is 0.0075, which leaves room for 0.02 / 16 and not for 0.02 / 4.
        assert [widths.pop(name) for name in (names[0], *names[5:9])] == [16] * 5
        assert set(widths.values()) == {4}
        assert repair.verdict is StepVerdict.PASSED
        returned = [remedy for remedy in report.remedies if remedy.variant.startswith("give back: ")]
        assert {(remedy.kept, remedy.reason) for remedy in returned} == {
            (True, "the loss stays within the tolerance"),
            (False, "the loss would exceed the tolerance"),
        }
        assert returned[0].variant == f"give back: {len(names)} quantizers"
        assert repair.details()["changed"] == dict.fromkeys((names[0], *names[5:9]), "16 bits")
        assert repair.details()["cost"]["raised"] == 5
        assert "blocking" not in repair.details()


def test_what_was_raised_twice_may_keep_the_width_between() -> None:
    """Third and fourth get 16 bits together: the third needs them, for the fourth 8 are enough and 4 are not."""
    with session_of("w4a4_per_tensor", chain(4)) as session:
        names = list(session.quantizers)
        costs = dict.fromkeys(names, 1e-6) | dict(zip(names[2:6], (0.1, 0.021, 0.02, 0.004), strict=True))
        world = World(session, costs)
        repair = world.repair()
        report = repair.walk(Report())
        widths = {name: quantizer.bit_width for name, quantizer in session.quantizers.items()}
        assert [widths.pop(name) for name in names[2:6]] == [16, 16, 16, 8]
        assert set(widths.values()) == {4}
        last = [remedy for remedy in report.remedies if remedy.kept][-1]
        assert (last.remedy, last.variant) == ("bit_width", f"give back: {names[5]}: 8 bits")
        assert last.reason == "the loss stays within the tolerance"
        assert world.said[-1] == f"fix_quantizers: give back: {names[2]}: 8 bits"
        assert repair.loss == pytest.approx(world.loss())
        assert (repair.verdict, repair.evaluation.score) == (StepVerdict.PASSED, last.after)


def test_what_is_good_already_is_measured_once_and_left_alone() -> None:
    with session_of() as session:
        before = everything(session)
        world = World(session, dict.fromkeys(session.quantizers, 0.001))
        repair = world.repair(now=20.0, mse=30.0)
        assert repair.walk(Report()).remedies == ()
        assert (world.measurements, repair.verdict) == (1, StepVerdict.PASSED)
        assert everything(session) == before


def test_time_that_is_up_ends_it_between_two_tries_with_what_was_kept() -> None:
    with session_of("w4a4_per_tensor", chain(4)) as session:
        world = World(session, dict.fromkeys(session.quantizers, 0.1))
        world.late = lambda: world.measurements >= 3
        repair = world.repair()
        report = repair.walk(Report())
        assert repair.is_late
        assert [remedy.kept for remedy in report.remedies] == [True, True]
        assert sum(quantizer.bit_width == 8 for quantizer in session.quantizers.values()) == 2
        assert repair.details()["next"].startswith("more time (`max_time`)")


def test_success_is_tested_before_time_and_nothing_is_given_back_when_it_is_up() -> None:
    with session_of("w4a4_per_tensor", chain(4)) as session:
        names = list(session.quantizers)
        world = World(session, dict.fromkeys(names, 1e-6) | {names[0]: 0.012, names[1]: 0.012})
        repair = world.repair()
        world.late = lambda: repair.verdict is StepVerdict.PASSED
        report = repair.walk(Report())
        assert [remedy.variant for remedy in report.remedies] == [f"{names[0]}: 8 bits", f"{names[1]}: 8 bits"]
        assert (repair.verdict, repair.is_late) == (StepVerdict.PASSED, True)


# What is kept, and what is undone.


def test_a_score_that_becomes_no_number_is_undone_bit_for_bit() -> None:
    with session_of() as session:
        world = World(session, {})
        before = everything(session)
        repair = scripted(world, [0.5, math.nan, math.nan, math.inf])
        report = repair.walk(Report())
        assert {remedy.reason for remedy in report.remedies} == {"the score became NaN or infinite"}
        assert {(remedy.kept, remedy.after, remedy.gain, remedy.interval) for remedy in report.remedies} == {
            (False, None, None, None)
        }
        assert everything(session) == before
        assert repair.evaluation.score == 0.5
        points = repair.details()["pareto"]
        assert [(point["score"], point["on_front"]) for point in points] == [(0.5, True), *[(None, False)] * 3]


def test_a_score_that_is_no_number_at_first_may_become_one() -> None:
    with session_of("w8a8_per_tensor") as session:
        repair = scripted(World(session, {}), [math.nan, math.nan, 0.999, math.nan])
        assert repair.verdict is StepVerdict.FAILED
        report = repair.walk(Report())
        assert [remedy.reason for remedy in report.remedies] == [
            "the score became NaN or infinite",
            "the score is a number again",
            "the loss would exceed the tolerance",
        ]
        assert report.to_dict()["remedies"][0]["before"] is None
        assert repair.verdict is StepVerdict.PASSED
        assert session.quantizers["1"].bit_width == 16


def test_an_interrupt_undoes_what_was_being_tried() -> None:
    with session_of() as session:
        world, calls = World(session, {}), [0]
        before = everything(session)

        def measure() -> Measured:
            calls[0] += 1
            if calls[0] > 1:
                raise KeyboardInterrupt
            return measured(0.5)

        repair = QuantizerRepair(world.bench(measure), [row(session, "1", now=20.0, mse=30.0)])
        with pytest.raises(KeyboardInterrupt):
            repair.walk(Report())
        assert everything(session) == before


def test_what_can_not_be_applied_is_undone_and_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise CalibrationError("a weight must be finite.")

    with session_of() as session:
        world = World(session, {"0.weight": 0.1})
        before = everything(session)
        repair = world.repair()
        monkeypatch.setattr("lightning_quantdebug.quantizer_repair.reset_weight_ranges", fails)
        report = repair.walk(Report())
        assert {remedy.reason for remedy in report.remedies} == {"it could not be applied: a weight must be finite."}
        assert world.measurements == 1
        assert everything(session) == before


def test_a_weight_that_no_calibration_batch_reaches_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with session_of() as session:
        world = World(session, {"0.weight": 0.1})
        before = everything(session)
        repair = world.repair()
        monkeypatch.setattr("lightning_quantdebug.quantizer_repair.reset_weight_ranges", lambda *_: None)
        report = repair.walk(Report())
        assert {remedy.reason for remedy in report.remedies} == {"0.weight got no range"}
        assert (world.measurements, everything(session)) == (1, before)


def test_a_quantizer_without_a_range_is_left_out() -> None:
    with session_of() as session:
        world = World(session, dict.fromkeys(session.quantizers, 0.1))
        session.quantizers["1"].encoding = None
        report = world.repair().walk(Report())
        assert session.quantizers["1"].bit_width == 4
        assert not [remedy for remedy in report.remedies if remedy.variant.startswith("1:")]


# What other remedies have left behind.


def test_a_finer_granularity_drops_what_made_up_for_the_coarse_one() -> None:
    net = chain()
    with torch.no_grad():
        net[0].weight[0] *= 60.0
    with session_of({"preset": "w4a8_per_tensor", "finest_granularity": "per_channel"}, net) as session:
        runs = batch_runs(session, [X])
        assert correct_bias(session, runs).changed == ("0", "2")
        key, other = (layer.key for layer in session.layers)
        session.adjust({key: Adjustment(bias_offset=torch.zeros(8))})
        repair = World(session, {"0.weight": 0.1}).repair()
        assert repair._apply(SingleTry("granularity", ("0.weight",), "per_channel")) == ""
        assert session.quantizers["0.weight"].spec.granularity.value == "per_channel"
        assert session.quantizers["2.weight"].spec.granularity.value == "per_tensor"
        assert session.adjustments[key].bias_correction is None
        assert session.adjustments[key].bias_offset is not None, "only what makes up for rounding is dropped"
        assert session.adjustments[other].bias_correction is not None

        def result(mode: str) -> Tensor:
            found: list[Tensor] = []
            with session.modes(mode, kind="weight"), session.tapped({key: lambda call: found.append(call.result)}):
                net(X)
            return found[0]

        # The channels that one range for all had rounded away; the mean error with the old correction was 0.4.
        assert float((result("quantize") - result("bypass")).mean(0).abs()[1:].max()) < 0.05


def test_a_range_that_no_observer_gives_is_kept_when_bits_are_added() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)).eval()
    x = torch.randn(8, 3, 8, 8)
    with session_of("w8a4", net, x) as session:
        assert set_activation_ranges(session, batch_runs(session, [x]), "batchnorm").changed == ("2",)
        quantizer = session.quantizers["2"]
        before = quantizer.encoding
        assert before is not None
        assert float(before.range_max) > 1.5 * quantizer.observer.range_max
        world = World(session, {"2": 0.02}, remedies=["bit_width"])
        repair = QuantizerRepair(
            RepairBench(session, batch_runs(session, [x]), world.measure, world.settings, evaluation(1.0)),
            [row(session, "2", now=20.0, mse=40.0)],
        )
        assert repair._apply(raising({"2": 8})) == ""
        after = quantizer.encoding
        assert after is not None
        assert (quantizer.bit_width, quantizer.frozen, quantizer.spec.range_setting) == (
            8,
            True,
            RangeSetting.BATCHNORM,
        )
        assert float(after.range_max) == pytest.approx(float(before.range_max), rel=0.01)
        assert float(after.scale) == pytest.approx(float(before.scale) * 15 / 255, rel=0.01)


def test_only_bits_are_tried_where_the_encoding_was_chosen() -> None:
    with session_of({"preset": "w4a8_per_tensor", "finest_granularity": "per_channel"}) as session:
        for name in ("0.weight", "1"):
            session.quantizers[name].freeze()
        world = World(session, {"0.weight": 0.1, "1": 0.1})
        report = world.repair(now=20.0, mse=30.0, per_channel=40.0).walk(Report())
        assert {remedy.remedy for remedy in report.remedies} == {"bit_width"}


# What is said.


def test_every_remedy_is_tried_in_order_and_told() -> None:
    target = {"preset": "w4a8_per_tensor", "finest_granularity": "per_channel", "activation_bit_widths": [8]}
    with session_of(target) as session:
        world = World(session, {"0.weight": 0.03, "1": 0.02})
        repair = world.repair(now=20.0, percentile_99=30.0, per_channel=40.0)
        report = repair.walk(Report())
        assert [(remedy.remedy, remedy.variant) for remedy in report.remedies[:4]] == [
            ("custom_range", "0.weight: percentile_99"),
            ("granularity", "0.weight: per_channel"),
            ("bit_width", "0.weight: 8 bits"),
            ("custom_range", "1: percentile_99"),
        ]
        assert {remedy.step for remedy in report.remedies} == {"fix_quantizers"}
        first = report.remedies[2]
        assert (first.kept, first.reason) == (True, "the score rose beyond noise")
        assert (first.before, first.after) == pytest.approx((0.95, 0.9725))
        assert first.gain == pytest.approx(0.0225)
        assert first.interval is not None
        assert first.interval[0] > 0
        assert world.said[:2] == ["fix_quantizers: 0.weight: percentile_99", "fix_quantizers: 0.weight: per_channel"]
        details = repair.details()
        assert details["changed"] == {"0.weight": "16 bits"}
        assert details["blocking"] == ["1"]
        assert details["next"].startswith("training with quantizers (QAT)")
        assert [point["raised"] for point in details["pareto"]] == [0, 0, 0, 1, 1, 1]
        assert details["pareto"][0] | {"interval": None} == {
            "title": "as it is", "size_bytes": 72.0, "bit_operations": 2 * 64 * 32.0, "raised": 0,
            "score": 0.95, "loss": pytest.approx(0.05), "interval": None, "on_front": True,
        }  # fmt: skip
        advice = after_single_repairs(report.remedies, repair.verdict, details)
        assert advice.startswith(
            f"{len(report.remedies)} repairs of single quantizers did not suffice; the worst remain 1."
        )
        assert advice.endswith("The next cheapest thing to try: " + details["next"] + ".")


def test_the_cost_of_the_target_is_that_of_its_granularity() -> None:
    target = {"preset": "w4a8_per_tensor", "finest_granularity": "per_channel"}
    with session_of(target) as session:
        repair = World(session, {"0.weight": 0.03}).repair()
        plain = repair.details()["cost"]
        assert repair._apply(SingleTry("granularity", ("0.weight",), "per_channel")) == ""
        details = repair.details()
        assert details["cost_of_target"] == plain
        assert details["cost"]["size_bytes"] == plain["size_bytes"] + 7 * 4
        assert details["cost_of_next_width"]["size_bytes"] == 2 * 64 + 2 * 4
        assert details["cost_of_next_width"]["bit_operations"] == 2 * 64 * 8 * 16
        assert details["changed"] == {"0.weight": "per_channel"}


@pytest.mark.parametrize(
    ("remedies", "target", "text"),
    [
        (["custom_range"], "w4a4_per_tensor", "let `remedies` have 'bit_width'"),
        (
            None,
            {"weight_bit_widths": [8], "activation_bit_widths": [8]},
            "training with quantizers (QAT), or an engine",
        ),
        ([], {"weight_bit_widths": [8], "activation_bit_widths": [8]}, "training with quantizers (QAT), or an engine"),
    ],
)
def test_what_to_try_next_is_told(remedies: Any, target: Any, text: str) -> None:
    with session_of(target) as session:
        world = World(session, dict.fromkeys(session.quantizers, 0.1), remedies=remedies)
        repair = world.repair()
        before = everything(session)
        assert repair.walk(Report()).remedies == ()
        assert everything(session) == before
        assert repair.details()["next"].startswith(text)
        assert repair.details()["blocking"] == list(session.quantizers)[:MOST_SINGLES]


def test_more_bits_that_did_harm_are_no_advice() -> None:
    with session_of() as session:
        repair = scripted(World(session, {}), [0.5, *[0.2] * 5])
        report = repair.walk(Report())
        assert {remedy.reason for remedy in report.remedies} == {"the score fell beyond noise"}
        assert repair.details()["next"].endswith("more bits were tried and did harm")
        assert session.select(kind=Kind.WEIGHT)[0].bit_width == 4

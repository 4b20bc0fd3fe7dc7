"""Walks on networks trained on real data with one planted fragile quantizer: named, explained, repaired alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_quantdebug.quantizer_analysis import Analysed, analyse
from lightning_quantdebug.report import Cause, Remedy, Report, StepName, StepVerdict, Verdict
from lightning_quantdebug.sensitivity import Bench, Sensitivities
from lightning_quantdebug.settings import REMEDIES
from tests.analyses import analysed
from tests.walks import Classifier, walk, walked

pytestmark = pytest.mark.filterwarnings("ignore")
torch.set_num_threads(1)

SINGLE = ("custom_range", "granularity", "bit_width")


class Glare(nn.Module):
    """Adds a huge value at one place of a batch, which the squashing behind it takes away again."""

    def __init__(self, height: float) -> None:
        super().__init__()
        self.height = height

    def forward(self, x: Tensor) -> Tensor:
        glare = torch.zeros_like(x)
        # Somewhere else in each batch.
        glare.view(-1)[int(1000 * x.sum()) % x.numel()] = self.height
        return 8.0 * torch.tanh((x + glare) / 8.0)


class Network(nn.Module):
    """A perceptron on digits with room for one disease."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(64, 96), nn.Linear(96, 32), nn.Linear(32, 10)
        self.glare = Glare(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.second(self.glare(F.relu(self.first(x))))))


@pytest.fixture(scope="module")
def trained() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    data = load_digits()
    x, y = torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target)
    torch.manual_seed(0)
    net = Network()
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(12):
        for chosen in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[chosen]), y[chosen]).backward()
            optimizer.step()
    return net.state_dict(), x[1200:], y[1200:]


def module_of(trained: Any, samples: int = 512, height: float = 0.0, column: float = 0.0) -> Classifier:
    state, x, y = trained
    net = Network()
    net.load_state_dict(state)
    net.glare.height = height
    if column:
        # The corner of a digit is always empty: what its weights are does not matter in FP32.
        with torch.no_grad():
            net.first.weight[:, 0] = column * torch.tensor([1.0, -1.0]).repeat(48)
    return Classifier(net.eval(), list(zip(x[:samples].split(32), y[:samples].split(32), strict=True)))


def kept_in(report: Report) -> list[Remedy]:
    return [remedy for remedy in report.remedies if remedy.kept]


def test_a_fragile_activation_is_named_explained_and_repaired_alone(trained: Any) -> None:
    module = module_of(trained, height=2000.0)
    report = walk(module, monitor="acc", mode="max", tolerance=0.01, target="int8", remedies=SINGLE)
    first = report.sensitivity[0]
    assert (first.quantizer, first.kind, first.guilty) == ("net.glare.add", "activation", True)
    assert [row.quantizer for row in report.sensitivity if row.guilty] == ["net.glare.add"]
    finding = next(finding for finding in report.findings if finding.quantizer == "net.glare.add")
    assert finding.cause is Cause.ACTIVATION_OUTLIERS
    step = report.step(StepName.PER_QUANTIZER)
    assert step is not None
    assert step.verdict is StepVerdict.FAILED
    assert step.advice.startswith("Alone these cost score beyond noise: net.glare.add.")
    assert report.verdict is Verdict.REPAIRED
    (remedy,) = kept_in(report)
    assert remedy.remedy == "custom_range"
    assert remedy.variant.startswith("net.glare.add: ")
    widths = {name: setting.bit_width for name, setting in report.final.settings.items()}
    assert set(widths.values()) == {8}
    fixed = report.step(StepName.FIX_QUANTIZERS)
    assert fixed is not None
    assert fixed.details["changed"].keys() == {"net.glare.add"}
    assert fixed.details["cost"] == fixed.details["cost_of_target"]
    assert report.final.loss is not None
    assert report.final.loss <= 0.01


def test_a_fragile_weight_is_named_explained_and_raised_alone(trained: Any) -> None:
    module = module_of(trained, column=80.0)
    report = walk(module, monitor="acc", mode="max", tolerance=0.01, target="int8_per_tensor", remedies=SINGLE)
    first = report.sensitivity[0]
    assert (first.quantizer, first.kind, first.guilty, first.method) == ("net.first.weight", "weight", True, "exact")
    finding = next(finding for finding in report.findings if finding.quantizer == "net.first.weight")
    assert finding.cause is Cause.UNEVEN_CHANNEL_RANGES
    assert report.verdict is Verdict.REPAIRED
    kept = kept_in(report)
    assert [(remedy.remedy, remedy.variant) for remedy in kept] == [("bit_width", "net.first.weight: 16 bits")]
    widths = {name: setting.bit_width for name, setting in report.final.settings.items()}
    assert widths.pop("net.first.weight") == 16
    assert set(widths.values()) == {8}
    fixed = report.step(StepName.FIX_QUANTIZERS)
    assert fixed is not None
    assert fixed.details["cost"]["raised"] == 1
    plain = fixed.details["cost_of_target"]
    assert fixed.details["cost"]["size_bytes"] == plain["size_bytes"] + 64 * 96
    assert fixed.details["cost"]["bit_operations"] == plain["bit_operations"] + 64 * 96 * 8 * 8
    assert fixed.details["cost_of_next_width"]["bit_operations"] == 4 * plain["bit_operations"]
    titles = [point["title"] for point in fixed.details["pareto"]]
    assert titles[0] == "as it is"
    assert titles[-1] == "give back: net.first.weight"
    assert any(point["on_front"] and point["raised"] == 1 for point in fixed.details["pareto"])


@pytest.mark.parametrize("samples", [256])
def test_on_a_healthy_network_nobody_is_called_guilty(trained: Any, samples: int) -> None:
    module = module_of(trained, samples)
    for monitor, mode, tolerance in (("acc", "max", "1%"), ("loss", "min", "5%")):
        report = walk(module, monitor=monitor, mode=mode, tolerance=tolerance, target="int8", analysis="exhaustive")
        assert report.verdict is Verdict.ACCEPTED
        assert len(report.sensitivity) == len(report.coverage.quantized)
        assert {row.method for row in report.sensitivity} == {"exact"}
        assert {row.samples for row in report.sensitivity} == {samples}
        assert not [row for row in report.sensitivity if row.guilty]
        step = report.step(StepName.PER_QUANTIZER)
        assert step is not None
        assert "No single quantizer costs score beyond noise" in step.advice
        assert report.step(StepName.FIX_QUANTIZERS).verdict is StepVerdict.SKIPPED


def test_too_few_samples_are_said_with_the_number_that_would_do(trained: Any) -> None:
    report = walk(
        module_of(trained, 96),
        monitor="acc",
        mode="max",
        tolerance=0.001,
        target="w3a3",
        analysis="exhaustive",
        remedies=(),
    )
    step = report.step(StepName.PER_QUANTIZER)
    assert step is not None
    needed = step.details["samples_to_resolve"]
    assert needed > 96
    assert f"about {needed} samples would do" in step.advice


def test_an_estimate_alone_orders_without_measuring(trained: Any) -> None:
    module = module_of(trained, column=80.0)
    report = walk(
        module, monitor="acc", mode="max", tolerance=0.01, target="int8_per_tensor", remedies=(), analysis="estimate"
    )
    assert {row.method for row in report.sensitivity} == {"estimate"}
    assert report.sensitivity[0].quantizer == "net.first.weight"
    assert {(row.score, row.loss, row.interval) for row in report.sensitivity} == {(None, None, None)}
    assert all(row.kl is not None and row.task_loss is not None for row in report.sensitivity)
    assert report.sensitivity[0].samples == 128


def test_the_reverse_table_is_made_on_request(trained: Any) -> None:
    module = module_of(trained, 128, column=80.0)
    settings: dict[str, Any] = {"monitor": "acc", "mode": "max", "tolerance": 0.01, "target": "int8_per_tensor"}
    report = walk(module, **settings, remedies=(), analysis="exhaustive", reverse_analysis=True)
    by_name = {row.quantizer: row for row in report.sensitivity}
    assert all(row.loss_when_off is not None for row in report.sensitivity)
    # With the guilty one off hardly anything is lost; with any other off nearly all.
    assert by_name["net.first.weight"].loss_when_off < 0.05
    assert min(row.loss_when_off for name, row in by_name.items() if name != "net.first.weight") > 0.2
    assert {row.loss_when_off for row in walk(module, **settings, remedies=()).sensitivity} == {None}


def test_every_row_tells_what_other_settings_would_give(trained: Any) -> None:
    report = walk(module_of(trained, height=2000.0), monitor="acc", mode="max", tolerance=0.01, remedies=())
    rows = {row.quantizer: row.counterfactuals for row in report.sensitivity}
    assert all(values["bits_16"] > values["now"] + 30 for values in rows.values())
    # The outlier is nearly all of the signal, so that only the bulk tells what it costs.
    fragile = rows["net.glare.add"]
    assert fragile["bulk_percentile_99.9"] > fragile["bulk_now"] + 20
    assert fragile["percentile_99.9"] < fragile["now"]
    healthy = rows["net.first.weight"]
    assert healthy["bulk_percentile_99.9"] < healthy["bulk_now"] + 5


def analysis_of(module: Any, **settings: Any) -> Analysed:
    def action(_: Sensitivities, bench: Bench) -> Analysed:
        return analyse(bench, bench.settings.tolerance.permitted_loss(bench.reference.score))

    return analysed(module, action, "acc", mode="max", **settings)


def test_a_network_that_is_not_deterministic_is_analysed_on_fixed_seeds(trained: Any) -> None:
    module = module_of(trained, 128, column=80.0)
    module.net.first = nn.Sequential(module.net.first, nn.Dropout(0.1))
    module.net.first[1].train()

    class Noisy(Classifier):
        def on_validation_model_eval(self) -> None:
            self.eval()
            self.net.first[1].train()

    noisy = Noisy(module.net, module.batches)
    report = walk(noisy, monitor="acc", mode="max", target="int8_per_tensor", remedies=())
    assert report.findings[0].cause is Cause.NONDETERMINISTIC_MODEL
    once, again = (analysis_of(noisy, target="int8_per_tensor", analysis="exhaustive") for _ in range(2))
    assert once.rows == again.rows
    assert once.rows[0].quantizer == "net.first.0.weight"


def test_a_step_that_can_not_be_run_with_gradients_is_analysed_without_an_estimate(trained: Any) -> None:
    class Numbers(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            logits = self.net(batch[0])
            right = logits.argmax(-1).cpu().numpy() == batch[1].cpu().numpy()
            self.log("acc", float(right.mean() + 0.0 * logits.numpy().sum()), batch_size=len(batch[1]))

    made = module_of(trained, 128, column=80.0)
    found = analysis_of(Numbers(made.net, made.batches), target="int8_per_tensor")
    assert "numpy()" in found.details["no_estimate"]
    assert found.rows[0].quantizer == "net.first.weight"
    assert {row.task_loss for row in found.rows} == {None}


def test_the_walk_says_why_nothing_is_analysed_where_the_score_says_nothing(trained: Any) -> None:
    class Constant(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.log("constant", 0.5, batch_size=len(batch[1]))

    made = module_of(trained, 128)
    report = walk(Constant(made.net, made.batches), monitor="constant", mode="max", analysis="exhaustive")
    step = report.step(StepName.PER_QUANTIZER)
    assert step is not None
    assert step.verdict is StepVerdict.NOT_RUN
    assert "Monitor a metric that depends on the output" in step.advice


def test_single_repairs_can_be_left_out_or_be_all_that_is_tried(trained: Any) -> None:
    module = module_of(trained, column=80.0)
    settings: dict[str, Any] = {"monitor": "acc", "mode": "max", "tolerance": 0.01, "target": "int8_per_tensor"}
    without = walk(module, **settings, remedies=("custom_range",))
    assert without.verdict is Verdict.NOT_ACCEPTED
    assert {remedy.remedy for remedy in without.remedies} <= {"custom_range"}
    step = without.step(StepName.FIX_QUANTIZERS)
    assert step is not None
    assert step.details["blocking"][0] == "net.first.weight"
    none = walk(module, **settings, remedies=())
    fixed = none.step(StepName.FIX_QUANTIZERS)
    assert fixed is not None
    assert (none.remedies, fixed.verdict) == ((), StepVerdict.FAILED)
    assert fixed.advice == "There was nothing to try: no quantizer may have another range or more bits."
    assert set(SINGLE) <= set(REMEDIES)


def test_an_engine_without_wider_kernels_is_given_none(trained: Any) -> None:
    module = module_of(trained, column=80.0)
    target = {"preset": "int8_per_tensor", "weight_bit_widths": [8], "activation_bit_widths": [8]}
    report = walk(module, monitor="acc", mode="max", tolerance=0.01, target=target, remedies=SINGLE)
    assert not [remedy for remedy in report.remedies if remedy.remedy == "bit_width"]


def test_bits_are_given_back_where_several_were_raised(trained: Any) -> None:
    """Three bits everywhere: growing groups are raised until it is good, and then most are lowered again."""
    report = walk(
        module_of(trained), monitor="acc", mode="max", tolerance=0.02, target="w2a2_per_tensor", remedies=("bit_width",)
    )
    assert report.verdict is Verdict.REPAIRED
    fixed = report.step(StepName.FIX_QUANTIZERS)
    assert fixed is not None
    widths = {name: setting.bit_width for name, setting in report.final.settings.items()}
    raised = {name for name, width in widths.items() if width > 2}
    assert fixed.details["cost"]["raised"] == len(raised) < len(widths)
    assert fixed.details["changed"] == {name: f"{widths[name]} bits" for name in raised}
    lowered = [r for r in report.remedies if r.variant.startswith("give back") and r.kept]
    assert lowered or len(raised) < len(widths)
    whole = report.step(StepName.QUANTIZE_MODEL)
    assert whole is not None
    assert whole.verdict is StepVerdict.PASSED


def test_a_learned_rounding_is_given_up_for_more_bits_and_comes_back_with_the_old_ones(trained: Any) -> None:
    """AdaRound is kept first; raised, the weight is nearer to FP32 than before; undone, everything is as it was."""
    from lightning_quantdebug.adaround import adaround
    from lightning_quantdebug.calibration import CalibrationRuns
    from lightning_quantdebug.quantizer_repair import QuantizerRepair, RepairBench
    from lightning_quantdebug.repair_plan import raising
    from lightning_quantdebug.side_by_side import OutputCache, one_by_one
    from lightning_quantdebug.target import Mode

    def action(_: Sensitivities, bench: Bench) -> None:
        session, evaluator = bench.session, bench.evaluator
        runs = CalibrationRuns(session, evaluator, None, 4)
        assert adaround(session, runs).changed
        cache = OutputCache(session, lambda: session.modes(Mode.BYPASS))
        measure = lambda: one_by_one(evaluator, cache, lambda: session.modes(Mode.QUANTIZE))  # noqa: E731
        rows = analyse(bench, 0.01).rows
        repair = QuantizerRepair(RepairBench(session, runs, measure, bench.settings, bench.reference), rows)
        layer = next(layer for layer in session.layers if layer.quantizer.name == "net.first.weight")
        before = session.state()

        def error() -> float:
            kept: list[Tensor] = []

            def visit(run: Any, index: int) -> None:
                taps = {layer.key: lambda call: kept.append(call.args[1]) or None}
                with session.modes(Mode.QUANTIZE, kind="weight"), session.tapped(taps):
                    run()

            runs(visit, 1)
            return float((kept[0] - dict(session.root.named_parameters())["net.first.weight"]).abs().max())

        rounded = error()
        assert session.adjustments[layer.key].rounded
        assert repair._apply(raising({"net.first.weight": 8})) == ""
        assert not session.adjustments[layer.key].rounded
        assert not layer.quantizer.frozen
        assert error() < rounded / 8
        session.restore(before)
        assert error() == rounded
        assert session.adjustments[layer.key].rounded
        assert layer.quantizer.frozen

    analysed(module_of(trained, 128), action, "acc", mode="max", target="w3a8")


def test_what_does_not_help_is_undone_bit_for_bit(trained: Any) -> None:
    """Every measurement after the first one is bad: nothing is kept, and nothing is left of it."""
    from lightning_quantdebug.calibration import CalibrationRuns
    from lightning_quantdebug.quantizer_repair import QuantizerRepair, RepairBench
    from lightning_quantdebug.side_by_side import Measured, OutputCache, one_by_one
    from lightning_quantdebug.target import Mode

    def action(_: Sensitivities, bench: Bench) -> None:
        session, evaluator = bench.session, bench.evaluator
        cache = OutputCache(session, lambda: session.modes(Mode.BYPASS))
        measured: list[Measured] = []

        def measure() -> Measured:
            found = one_by_one(evaluator, cache, lambda: session.modes(Mode.QUANTIZE))
            if measured:
                batches = tuple(replace(batch, value=0.0) for batch in found.evaluation.batches or ())
                found = replace(found, evaluation=replace(found.evaluation, score=0.0, batches=batches))
            measured.append(found)
            return found

        rows = analyse(bench, 0.01).rows
        runs = CalibrationRuns(session, evaluator, None, 4)
        before = {name: (q.spec, q.encoding, q.frozen) for name, q in session.quantizers.items()}
        repair = QuantizerRepair(RepairBench(session, runs, measure, bench.settings, bench.reference), rows)
        report = repair.walk(Report())
        assert len(measured) == len(repair.points) > 5
        assert not kept_in(report)
        assert {remedy.reason for remedy in report.remedies} == {"the score fell beyond noise"}
        assert {name: (q.spec, q.encoding, q.frozen) for name, q in session.quantizers.items()} == before
        assert repair.now is measured[0]
        assert repair.details()["changed"] == {}

    analysed(module_of(trained, 256, column=80.0), action, "acc", mode="max", target="w3a3_per_tensor", tolerance=0.0)


def test_time_that_runs_out_leaves_the_best_so_far(trained: Any) -> None:
    asked: list[int] = []

    def late(self: Any) -> bool:
        asked.append(1)
        return len(asked) > 12

    from lightning_quantdebug.diagnosis import Diagnosis

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Diagnosis, "is_late", property(late))
        diagnosis = walked(
            module_of(trained, column=80.0),
            "acc",
            mode="max",
            tolerance=0.01,
            target="w2a2_per_tensor",
            remedies=SINGLE,
        )
    report = diagnosis.report
    verdicts = {step.step: step for step in report.steps}
    assert report.verdict is Verdict.NOT_ACCEPTED
    late_steps = [s for s in verdicts.values() if "Time ran out" in s.advice or "time budget" in s.advice.lower()]
    assert late_steps
    assert report.sensitivity

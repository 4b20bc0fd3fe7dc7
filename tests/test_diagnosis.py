"""A walk's numbers are those that one gets by hand, and its words are true."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_quantdebug.advice import on_failure
from lightning_quantdebug.diagnosis import EVALUATIONS, Diagnosis
from lightning_quantdebug.encoding import encoding_from_range
from lightning_quantdebug.environment import environment
from lightning_quantdebug.evaluation import Evaluator
from lightning_quantdebug.final_settings import setting_of
from lightning_quantdebug.instrument import instrument
from lightning_quantdebug.quantizer import Quantizer
from lightning_quantdebug.report import Cause, Report, Step, StepName, StepVerdict, Verdict
from lightning_quantdebug.settings import make_settings
from lightning_quantdebug.target import Granularity, Kind, Mode, QuantSpec
from tests.walks import Classifier, Judged, in_validation, state_of
from tests.walks import walk_unrepaired as walk

pytestmark = pytest.mark.filterwarnings("ignore")


def points(count: int, seed: int, batch: int = 16) -> list[tuple[Tensor, Tensor]]:
    """Batches of points in three classes."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 8, generator=generator)
    classes = (inputs[:, :3] ** 2).argmax(1)
    return list(zip(inputs.split(batch), classes.split(batch), strict=True))


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """A small network that has learned to tell the classes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    inputs, classes = points(1024, 1, 1024)[0]
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(inputs), classes).backward()
        optimizer.step()
    return net.eval()


def classifier(net: nn.Module, count: int = 200) -> Classifier:
    return Classifier(net, points(count, 2), points(96, 3))


def step_of(report: Report, name: StepName) -> Step:
    found = report.step(name)
    assert found is not None
    return found


def by_hand(net: nn.Module, module: Judged, target: str, kind: str | None, metric: Any) -> float:
    """The score without a Trainer: the same ranges, the same batches, averaged as ``self.log`` does."""
    total, samples = torch.zeros(()), 0
    with torch.no_grad(), instrument(net, module.calibration[0][0], target) as q:
        q.calibrate([inputs for inputs, _ in module.calibration])
        q.set_mode("quantize", kind=kind)
        for inputs, classes in module.batches:
            total += metric(net(inputs), classes) * len(classes)
            samples += len(classes)
    return (total / samples).item()


def accuracy(logits: Tensor, classes: Tensor) -> Tensor:
    return (logits.argmax(-1) == classes).float().mean()


@pytest.mark.parametrize("target", ["int8", "w4a8", "w3a3_per_tensor", "tensorrt"])
@pytest.mark.parametrize(
    ("monitor", "mode", "metric"), [("acc", "max", accuracy), ("loss", "min", nn.functional.cross_entropy)]
)
def test_scores_are_those_measured_by_hand(
    trained: nn.Module, target: str, monitor: str, mode: str, metric: Any
) -> None:
    module = classifier(trained)
    report = walk(module, monitor=monitor, mode=mode, target=target, calibration="train")
    activations, weights = step_of(report, StepName.ACTIVATIONS), step_of(report, StepName.WEIGHTS)
    both, whole = weights.details["both"], step_of(report, StepName.QUANTIZE_MODEL)
    assert activations.score == by_hand(trained, module, target, "activation", metric)
    assert weights.score == by_hand(trained, module, target, "weight", metric)
    assert both["score"] == whole.score == by_hand(trained, module, target, None, metric)
    assert report.baseline is not None
    sign = -1 if mode == "max" else 1
    for step in (activations, weights, whole):
        assert step.score is not None
        assert step.loss == sign * (step.score - report.baseline.score)
    assert weights.details["interaction"] == both["loss"] - activations.loss - weights.loss
    assert (report.final.score, report.final.loss, report.final.interval) == (whole.score, whole.loss, whole.interval)
    assert report.baseline.samples == 200
    assert report.settings["calibration_samples"] == 96


def test_a_model_that_really_fails(trained: nn.Module) -> None:
    report = walk(classifier(trained), monitor="acc", mode="max", target="w2a8_per_tensor", tolerance=0.01)
    assert report.baseline is not None
    assert report.baseline.score > 0.85
    assert report.verdict is Verdict.NOT_ACCEPTED
    assert [(step.step.value, step.verdict.value) for step in report.steps] == [
        ("fp32_check", "passed"),
        ("activations", "passed"),
        ("weights", "failed"),
        ("fix_weights", "failed"),
        ("fix_activations", "skipped"),
        ("per_quantizer", "noise"),
        ("visualize", "passed"),
        ("fix_quantizers", "failed"),
        ("quantize_model", "failed"),
        ("qat", "not_run"),
    ]
    single = step_of(report, StepName.PER_QUANTIZER)
    assert re.search(r"the worst are net\.\d\.weight, net\.\d\.weight, 9\d% of all damage", single.advice)
    whole = step_of(report, StepName.QUANTIZE_MODEL)
    assert whole.advice == (
        "The loss exceeds the tolerance; it comes from weights. The next cheapest thing to try: more weight bits, or "
        "a finer granularity if the engine has it."
    )
    assert whole.interval is not None
    assert 0 < whole.interval[0] < whole.loss < whole.interval[1]  # type: ignore[operator] # a loss was measured


@pytest.mark.parametrize(
    ("activations", "weights", "where"),
    [
        ("failed", "passed", "it comes from activations. The next cheapest thing to try: calibrate on more batches"),
        ("failed", "failed", "it comes from weights and activations. The next"),
        (
            "noise",
            "passed",
            "it comes from the two together, neither of them alone. The next cheapest thing to try: more",
        ),
    ],
)
def test_advice_names_the_box(activations: str, weights: str, where: str) -> None:
    report = Report(
        steps=(Step(StepName.ACTIVATIONS, StepVerdict(activations)), Step(StepName.WEIGHTS, StepVerdict(weights)))
    )
    assert where in on_failure(report)


def test_a_loss_that_can_not_be_told_from_zero(trained: nn.Module) -> None:
    report = walk(classifier(trained, 64), monitor="acc", mode="max", target="w3a3", tolerance=0.0)
    whole = step_of(report, StepName.QUANTIZE_MODEL)
    assert whole.interval is not None
    assert whole.loss is not None
    assert whole.loss > 0 >= whole.interval[0]
    assert whole.verdict.value == "noise"
    assert whole.advice.startswith("The loss exceeds the tolerance, but with these samples it can not be told from")
    assert report.verdict is Verdict.NOT_ACCEPTED


def test_too_few_samples_are_told_with_the_number_that_would_do(trained: nn.Module) -> None:
    report = walk(classifier(trained, 64), monitor="acc", mode="max", target="w3a3", tolerance=0.005)
    (finding,) = [finding for finding in report.findings if finding.cause is Cause.TOO_FEW_SAMPLES]
    low, high = step_of(report, StepName.QUANTIZE_MODEL).interval or (0, 0)
    half = (high - low) / 2
    assert finding.evidence == (
        f"the loss is known to ±{half:.3g} with 64 samples, the tolerance is 0.005; about "
        f"{int(np.ceil(64 * (half / 0.005) ** 2))} samples would resolve it"
    )
    enough = walk(classifier(trained, 64), monitor="acc", mode="max", target="w3a3", tolerance=half)
    assert not [finding for finding in enough.findings if finding.cause is Cause.TOO_FEW_SAMPLES]


# The acceptance uses all.


@pytest.mark.parametrize(("limit", "batches"), [(1, 1), (3, 3), (0.5, 6)])
def test_the_acceptance_uses_the_whole_validation_set(trained: nn.Module, limit: Any, batches: int) -> None:
    module = classifier(trained)
    settings: dict[str, Any] = {"monitor": "loss", "target": "w3a8", "calibration": "train"}
    whole, part = walk(module, **settings), walk(module, limit_batches=limit, **settings)
    first = Classifier(trained, module.batches[:batches], module.calibration)
    assert step_of(part, StepName.FP32_CHECK).score == step_of(walk(first, **settings), StepName.FP32_CHECK).score
    assert step_of(part, StepName.WEIGHTS).score == by_hand(
        trained, first, "w3a8", "weight", nn.functional.cross_entropy
    )
    assert part.baseline == whole.baseline
    for name in ("score", "loss", "interval", "verdict"):
        ours, full = (getattr(step_of(report, StepName.QUANTIZE_MODEL), name) for report in (part, whole))
        assert ours == full


@pytest.mark.parametrize(
    ("exclude", "step", "kind"),
    [
        (["*.weight"], StepName.WEIGHTS, "weight"),
        (["input", "net.1", "net.2", "net.3"], StepName.ACTIVATIONS, "activation"),
    ],
)
def test_a_target_without_weights_or_without_activations(
    trained: nn.Module, exclude: list[str], step: StepName, kind: str
) -> None:
    report = walk(classifier(trained, 64), target="w3a3", exclude=exclude)
    assert {setting.kind for setting in report.final.settings.values()} == {"weight", "activation"} - {kind}
    nothing = step_of(report, step)
    assert (nothing.loss, nothing.verdict.value) == (0.0, "passed")
    assert nothing.advice == f"The target quantizes no {kind}: nothing to measure."
    other = step_of(report, StepName.ACTIVATIONS if step is StepName.WEIGHTS else StepName.WEIGHTS)
    assert other.loss == step_of(report, StepName.WEIGHTS).details["both"]["loss"]
    assert step_of(report, StepName.WEIGHTS).details["interaction"] == 0.0


# What could not be simulated.


class Forked(nn.Module):
    """Another layer for great inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(x) if x.amax() > 10 else self.a(x)


def test_what_validation_alone_has_met_is_told() -> None:
    module = Judged(Forked(), [torch.ones(2, 4), torch.full((2, 4), 20.0)], [torch.ones(2, 4)])
    report = walk(module, calibration="train")
    assert report.coverage.unseen == ("net.b.linear",)
    (finding,) = [finding for finding in report.findings if finding.cause is Cause.NOT_QUANTIZED]
    assert finding.evidence == "operations ran in validation that calibration never met, in FP32: ['net.b.linear']"


def test_what_can_not_be_seen_is_told() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Tanh()))
    report = walk(Judged(nn.Sequential(nn.Linear(4, 4), scripted), [torch.ones(2, 4)]))
    assert [(finding.cause, finding.quantizer) for finding in report.findings] == [(Cause.NOT_QUANTIZED, "net.1")]
    assert report.findings[0].evidence == "the operations inside net.1 can not be seen, so they run in FP32"


def test_non_finite_values_in_calibration_are_told() -> None:
    data = torch.ones(2, 4)
    data[0, 0] = float("inf")
    report = walk(Judged(nn.Linear(4, 4), [torch.ones(2, 4)], [torch.ones(2, 4), data]), calibration="train")
    (finding,) = [f for f in report.findings if f.cause is Cause.NON_FINITE and f.quantizer == "input"]
    assert finding.evidence == "calibration saw 1 values that are NaN or infinite; ranges ignore them"


# Records.


def test_setting_of_a_quantizer_per_channel() -> None:
    spec = QuantSpec(4, symmetric=True, granularity=Granularity.PER_CHANNEL)
    quantizer = Quantizer("conv.weight", Kind.WEIGHT, spec, 0)
    empty = setting_of(quantizer)
    assert (empty.range_min, empty.scale, empty.zero_point, empty.observed_min, empty.channels) == (None,) * 4 + (1,)
    quantizer.observe(torch.tensor([[-0.8, 0.2], [0.1, 1.4]]))
    quantizer.encoding = encoding_from_range(torch.tensor([-0.8, 0.0]), torch.tensor([0.2, 1.4]), spec, 0)
    setting = setting_of(quantizer)
    assert (setting.name, setting.kind, setting.bit_width, setting.symmetric) == ("conv.weight", "weight", 4, True)
    assert (setting.granularity, setting.channels, setting.zero_point) == ("per_channel", 2, 0.0)
    assert setting.range_min == pytest.approx(-8 * 0.2)
    assert setting.range_max == pytest.approx(1.4)
    assert setting.scale == pytest.approx(0.2)
    assert (setting.observed_min, setting.observed_max) == pytest.approx((-0.8, 1.4))


def test_a_zero_point_is_given_only_where_all_channels_share_it() -> None:
    spec = QuantSpec(8, granularity=Granularity.PER_CHANNEL)
    quantizer = Quantizer("conv.weight", Kind.WEIGHT, spec, 0)
    quantizer.encoding = encoding_from_range(torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 1.0]), spec, 0)
    assert setting_of(quantizer).zero_point is None
    quantizer.encoding = encoding_from_range(torch.tensor([-1.0, -2.0]), torch.tensor([4.0, 8.0]), spec, 0)
    assert setting_of(quantizer).zero_point == 51.0


def test_environment() -> None:
    found = environment(nn.Linear(2, 2), seed=3)
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert {"pytorch-lightning", "torchmetrics", "numpy"} <= set(found["versions"])
    assert (found["device"], found["seed"], found["threads"]) == ("cpu", 3, torch.get_num_threads())
    assert environment(nn.Identity(), 0)["device"] == "cpu"
    assert environment(nn.Linear(2, 2, device="meta"), 0)["device"] == "meta"


# The course of a walk.


def test_every_step_is_announced_and_every_evaluation_counted(trained: nn.Module) -> None:
    module, settings = classifier(trained, 32), make_settings(monitor="loss", calibration="val")
    steps: list[str] = []
    count: list[int] = []

    def action(running: Any) -> None:
        evaluator = Evaluator(running, module, "loss")
        diagnosis = Diagnosis(evaluator, evaluator, settings, None, steps.append, lambda: count.append(1))
        report = diagnosis.walk()
        assert report is diagnosis.report
        assert all(step.seconds > 0 for step in report.steps if step.score is not None)

    in_validation(module, action)
    assert steps == ["fp32_check", "activations", "weights", "quantize_model"]
    assert len(count) == EVALUATIONS


def test_the_acceptance_measures_anew_only_what_was_measured_on_fewer_batches(trained: nn.Module) -> None:
    module = classifier(trained, 64)
    accepted: list[int] = []

    def action(running: Any) -> None:
        for limit in (1.0, 1):
            settings = make_settings(monitor="loss", calibration="val", limit_batches=limit)
            acceptance = Evaluator(running, module, "loss")
            runs: list[Any] = []
            run = acceptance.run
            acceptance.run = lambda *args, runs=runs, run=run, **kwargs: (runs.append(1), run(*args, **kwargs))[1]
            report = Diagnosis(Evaluator(running, module, "loss", limit_batches=limit), acceptance, settings).walk()
            assert step_of(report, StepName.QUANTIZE_MODEL).score is not None
            accepted.append(len(runs))

    in_validation(module, action)
    assert accepted == [0, 2]


def test_a_pattern_that_excludes_nothing_is_told_and_stops_nothing(trained: nn.Module) -> None:
    report = walk(classifier(trained, 64), target="int8", exclude=["net.0.wieght"])
    (warning,) = step_of(report, StepName.FP32_CHECK).details["warnings"]
    assert warning.startswith("`exclude` has the pattern 'net.0.wieght', which fits none of ['input', 'net.")
    assert report.verdict is Verdict.ACCEPTED


def test_no_samples_are_asked_for_where_the_loss_is_certain(trained: nn.Module) -> None:
    report = walk(classifier(trained, 64), monitor="acc", mode="max", target="w2a2", tolerance=0.001)
    whole = step_of(report, StepName.QUANTIZE_MODEL)
    assert whole.interval is not None
    assert whole.interval[0] > 0.001
    assert whole.interval[1] - whole.interval[0] > 0.002
    assert not [finding for finding in report.findings if finding.cause is Cause.TOO_FEW_SAMPLES]


def test_what_is_known_stays_in_the_report_when_a_walk_ends_in_an_error(trained: nn.Module) -> None:
    class Failing(Classifier):
        """Stopped once the network gives other outputs than in FP32."""

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if not torch.allclose(self.net(batch[0]).cpu(), expected[batch_idx], rtol=1e-3):
                raise KeyboardInterrupt
            super().validation_step(batch, batch_idx)

    data = points(32, 2)
    expected = [trained(inputs).detach() for inputs, _ in data]
    module = Failing(trained, data)
    kept: list[Diagnosis] = []

    def action(running: Any) -> None:
        settings = make_settings(monitor="loss", calibration="val", target="w2a2")
        kept.append(Diagnosis(Evaluator(running, module, "loss"), Evaluator(running, module, "loss"), settings))
        before = state_of(module)
        with pytest.raises(KeyboardInterrupt):
            kept[0].walk()
        assert state_of(module) == before

    in_validation(module, action)
    assert [step.step for step in kept[0].report.steps] == [StepName.FP32_CHECK]
    assert kept[0].report.verdict is None
    assert kept[0].session is not None
    assert all(quantizer.mode is Mode.BYPASS for quantizer in kept[0].session.quantizers.values())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_at_any_evaluation_of_any_step_gives_everything_back(
    trained: nn.Module, error: type[BaseException]
) -> None:
    # Outside the module, whose own attributes are given back after each evaluation.
    left = [0]

    class Failing(Classifier):
        """Raises inside its network at a chosen evaluation."""

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            left[0] -= batch_idx == 0
            if left[0] or batch_idx:
                super().validation_step(batch, batch_idx)
                return
            with self.net[-1].register_forward_pre_hook(stop):
                super().validation_step(batch, batch_idx)

    def stop(*_: Any) -> None:
        raise error("planted")

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(inplace=True), nn.Linear(8, 3)).eval()
    module = Failing(net, points(32, 2))
    settings = make_settings(monitor="loss", calibration="val")
    steps: list[str] = []

    def walk_with_error_at(evaluation: int, running: Any) -> bool:
        evaluator = Evaluator(running, module, "loss")
        before = (state_of(module), torch.get_rng_state().tolist(), global_hooks(), modes(module))
        left[:] = [evaluation]
        try:
            Diagnosis(evaluator, evaluator, settings, None, steps.append).walk()
            failed = False
        except error:
            failed = True
        assert (state_of(module), torch.get_rng_state().tolist(), global_hooks(), modes(module)) == before
        return failed

    reached: list[str] = []

    def action(running: Any) -> None:
        evaluation = 1
        while walk_with_error_at(evaluation, running):
            reached.append(steps[-1])
            evaluation += 1

    in_validation(module, action)
    # The last two look at the classes of the model that is accepted, and of FP32.
    assert list(dict.fromkeys(reached)) == ["fp32_check", "activations", "weights", "quantize_model"]
    assert len(reached) == 17


def global_hooks() -> tuple[int, int, int]:
    hooks = nn.modules.module
    modes_active = torch.overrides._get_current_function_mode_stack()
    return len(hooks._global_forward_hooks), len(hooks._global_forward_pre_hooks), len(modes_active)


def modes(module: nn.Module) -> list[bool]:
    return [part.training for part in module.modules()]

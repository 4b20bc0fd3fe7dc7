"""Planted faults: each is caught, with its cause and the first operation named, and the walk stops there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quantdebug import fp32_check
from lightning_quantdebug.calibration import capture, set_ranges
from lightning_quantdebug.evaluation import Evaluator
from lightning_quantdebug.instrument import Instrumentation
from lightning_quantdebug.own_quantizers import find_own_quantizers, own_quantizers
from lightning_quantdebug.report import Cause, Report, StepName, Verdict
from lightning_quantdebug.runner import Runner
from lightning_quantdebug.target import QuantTarget
from lightning_quantdebug.traces import Parting
from tests import zoo
from tests.test_own_quantizers import OwnQuantizer
from tests.walks import Judged, broken, convnet, images, in_validation, walk, walked

pytestmark = pytest.mark.filterwarnings("ignore")


def custom(name: str, net: nn.Module | None = None) -> Report:
    target = {"quantizer": f"tests.faulty_quantizers.{name}"}
    return walk(Judged(net or convnet(), images()), target=target)


class Applied(nn.Module):
    """Any function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


# Healthy networks.


@pytest.mark.parametrize(
    ("name", "precision"),
    [(name, "32-true") for name in zoo.ZOO] + [(name, "bf16-mixed") for name in ("mobilenet", "bert", "lstm")],
)
def test_a_healthy_network_passes(name: str, precision: str) -> None:
    network, _ = zoo.make(name)
    module = Judged(network, [zoo.ZOO[name].batch() for _ in range(2)])
    report = walk(module, trainer_settings={"precision": precision})
    assert report.steps[0].verdict.value == "passed"
    assert report.steps[0].loss == 0.0
    assert not [finding for finding in report.findings if finding.cause is not Cause.TOO_FEW_SAMPLES]


@pytest.mark.parametrize("target", ["w4a8", "w2a2_per_tensor", "tensorrt", "qnn", "xnnpack"])
def test_no_target_makes_a_healthy_network_look_broken(target: str) -> None:
    network, _ = zoo.make("mobilenet")
    report = walk(Judged(network, [zoo.ZOO["mobilenet"].batch() for _ in range(2)]), target=target)
    assert report.steps[0].verdict.value == "passed"


def test_validation_beyond_the_range_of_calibration_is_no_fault_of_the_pipeline() -> None:
    report = walk(Judged(convnet(), [10 * batch for batch in images()], images()), calibration="train")
    assert report.steps[0].verdict.value == "passed"


def test_batch_norm_without_running_statistics_is_not_called_broken() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten())
    assert walk(Judged(net, images())).steps[0].verdict.value == "passed"


def test_a_network_that_amplifies_float_noise_is_not_called_broken() -> None:
    # The difference of two branches that are equal to five digits: a rounding in the seventh is a change in the second.
    class Near(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Sequential(*zoo.conv_bn(3, 4, 3)), nn.Sequential(*zoo.conv_bn(3, 4, 3))

        def forward(self, x: Tensor) -> Tensor:
            return (self.a(x) - self.b(x)).mean((2, 3)) * 1e5

    torch.manual_seed(0)
    net = zoo._trained_looking(Near())
    net.b.load_state_dict(net.a.state_dict())
    net.b[0].weight.data.mul_(1 + 2e-6 * torch.randn_like(net.b[0].weight))

    class Coarse(Judged):
        def score_of(self, output: Any) -> Tensor:
            return output.abs().mean().log10().round()

    report = walk(Coarse(net, images()))
    assert report.steps[0].verdict.value == "passed"
    # The amplification excuses float noise, not a fault.
    assert broken(custom("WeightsWrongAt32", net=net)).quantizer == "net.a.1"


def test_state_in_the_module_is_given_back_before_each_pass_and_disturbs_nothing() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.register_buffer("sum", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.sum += x.mean().abs()
            return x * (1 + 0.5 * self.calls) + self.sum

    assert walk(Judged(convnet(Counting()), images())).verdict is not Verdict.BROKEN_PIPELINE


# The user's quantizer class.


def test_a_correct_class_passes() -> None:
    assert custom("Correct").verdict is Verdict.ACCEPTED


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("HalfAStepOff", "is off by up to"),
        ("Flooring", "where rounding to nearest is off by 0.5 at most"),
        ("LosingZero", "turns 0 into"),
        ("NotClipping", "does not clip to its range"),
        ("Flattening", "must return a tensor of torch.float32 (3, 4001), got torch.float32 (12003,)"),
        ("Doubling", "got torch.float64 (4001,)"),
    ],
)
def test_a_class_with_wrong_arithmetic(name: str, words: str) -> None:
    finding = broken(custom(name))
    assert finding.cause is Cause.BROKEN_PIPELINE
    # The first in order of execution; flattening a row that is flat already is no fault.
    first = "net.0.weight" if name == "Flattening" else "input"
    assert finding.quantizer == first
    assert finding.evidence.startswith(f"the quantizer {first} ")
    assert words in finding.evidence


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        # The input has a quantizer, so that the first convolution is the first to see a wrong tensor; it is folded, so
        # its own output is not compared, and the batch normalization behind it is where outputs part.
        ("OverflowingAt32", "net.1"),
        ("HalfPrecision", "net.1"),
        ("WeightsWrongAt32", "net.1"),
    ],
)
def test_a_class_that_is_wrong_at_32_bits_only(name: str, operation: str) -> None:
    finding = broken(custom(name))
    assert finding.cause is Cause.BROKEN_PIPELINE
    assert finding.quantizer == operation
    assert f"with every quantizer at 32 bits the outputs first part at {operation}: relative error" in finding.evidence


# The model itself.


class DroppingFunction(nn.Module):
    """Dropout that nothing switches off."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(F.relu(x), 0.1, training=True)


class TorchNoise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.abs() + 0.01 * torch.randn_like(x)


class NumpyNoise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + float(np.random.randn()))


class Restless(nn.Module):
    """State outside the module: nothing gives it back."""

    calls: list[int] = []  # noqa: RUF012 - shared by every instance on purpose

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(1)
        return x * len(Restless.calls)


@pytest.mark.parametrize(
    ("fault", "operation"),
    [
        (DroppingFunction, "net.3.dropout"),
        (TorchNoise, "net.3.randn_like"),
        (NumpyNoise, "net.3.add"),
        (Restless, "net.3.mul"),
    ],
)
def test_a_nondeterministic_model(fault: Any, operation: str) -> None:
    finding = broken(walk(Judged(convnet(fault()), images())))
    assert finding.cause is Cause.NONDETERMINISTIC_MODEL
    assert finding.quantizer == operation
    assert f"two runs of the same data first part at {operation} (relative error " in finding.evidence


@pytest.mark.parametrize("batch", [1, 2])
def test_randomness_in_a_later_batch_only(batch: int) -> None:
    data = images(4)
    data[batch] = data[batch] + 100

    class Sometimes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (1 + 0.1 * torch.rand(())) if x.mean() > 5 else x * 2

    finding = broken(walk(Judged(convnet(Sometimes()), data)))
    assert finding.cause is Cause.NONDETERMINISTIC_MODEL
    assert finding.quantizer is not None
    assert finding.quantizer.startswith("net.3.")
    assert f"first part at {finding.quantizer} on batch {batch} (relative error" in finding.evidence


def test_randomness_in_the_validation_step_alone() -> None:
    class Careless(Judged):
        def score_of(self, output: Any) -> Tensor:
            return super().score_of(output) * (1 + torch.rand(()))

    finding = broken(walk(Careless(convnet(), images())))
    assert (finding.cause, finding.quantizer) == (Cause.NONDETERMINISTIC_MODEL, None)
    assert "in score although every operation agrees: look for randomness in the validation step" in finding.evidence


class InTrainMode(Judged):
    """Puts a part of the network into train mode where validation starts."""

    culprit: Any = nn.Dropout

    def on_validation_start(self) -> None:
        for part in self.net.modules():
            if isinstance(part, self.culprit):
                part.train()


def test_dropout_in_train_mode() -> None:
    finding = broken(walk(InTrainMode(convnet(nn.Dropout(0.1)), images())))
    assert finding.cause is Cause.NONDETERMINISTIC_MODEL
    assert finding.quantizer == "net.3"


def test_batch_norm_in_train_mode() -> None:
    class Module(InTrainMode):
        culprit = nn.BatchNorm2d

    finding = broken(walk(Module(convnet(), images())))
    assert finding.cause is Cause.BROKEN_PIPELINE
    assert finding.quantizer == "net.1"
    assert "the batch normalization net.1 uses the statistics of the batch during validation" in finding.evidence


@pytest.mark.parametrize("builtin", [False, True])
def test_functional_batch_norm_in_train_mode(builtin: bool) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mu", torch.zeros(4))
            self.register_buffer("var", torch.ones(4))

        def forward(self, x: Tensor) -> Tensor:
            if builtin:
                return torch.batch_norm(x, None, None, self.mu, self.var, True, 0.1, 1e-5, False)
            return F.batch_norm(x, self.mu, self.var, training=True)

    assert broken(walk(Judged(convnet(Own()), images()))).quantizer == "net.3.batch_norm"


@pytest.mark.parametrize(
    ("function", "culprit", "words"),
    [
        (lambda x: (x - 100).sqrt(), "net.3", "NaN first comes out of net.3"),
        (lambda x: (x * 1e38).exp(), "net.5", "NaN first comes out of net.5, after infinity out of net.3"),
        (lambda x: (x[:, :, :1, :1] * 1e38).exp().amin((2, 3)), "net.3", "infinity first comes out of net.3"),
    ],
)
def test_a_score_that_is_no_number(function: Any, culprit: str, words: str) -> None:
    net = convnet(Applied(function))
    if culprit == "net.3":
        net = net[:4]
    finding = broken(walk(Judged(net, images())))
    assert (finding.cause, finding.quantizer) == (Cause.NON_FINITE, culprit)
    assert finding.evidence == f"the score is no finite number; {words}"


def test_a_score_that_is_no_number_though_the_network_is_healthy() -> None:
    class Module(Judged):
        def score_of(self, output: Any) -> Tensor:
            return super().score_of(output) / 0

    finding = broken(walk(Module(convnet(), images())))
    assert (finding.cause, finding.quantizer) == (Cause.NON_FINITE, None)
    assert "look at the validation step and the metric" in finding.evidence


def test_nan_that_does_not_reach_the_score_is_a_finding_and_no_end() -> None:
    def masked(x: Tensor) -> Tensor:
        return ((x - 1).sqrt() * 2).nan_to_num()

    report = walk(Judged(convnet(Applied(masked)), images()))
    assert report.verdict is not Verdict.BROKEN_PIPELINE
    assert {finding.quantizer for finding in report.findings if finding.cause is Cause.NON_FINITE} >= {"net.3.sqrt"}


def test_a_quantized_score_that_is_no_number_fails_its_step_and_names_where() -> None:
    class Shares(nn.Module):
        """Of a sample with small values the grid keeps nothing, and nothing over nothing is NaN."""

        def forward(self, x: Tensor) -> Tensor:
            powers = (4 * x).exp()
            return powers / powers.sum(-1, keepdim=True)

    net = nn.Sequential(nn.Linear(4, 4, bias=False), Shares())
    net[0].weight.data = torch.eye(4)
    report = walk(Judged(net, [torch.tensor([[1.0] * 4, [-1.0] * 4]), torch.ones(2, 4)]))
    assert report.verdict is Verdict.NOT_ACCEPTED
    step = report.step(StepName.ACTIVATIONS)
    assert step is not None
    assert (step.verdict.value, step.score, step.loss) == ("failed", None, None)
    assert step.advice.startswith("Quantized, the score is no finite number; NaN first comes out of net.1")
    weights = report.step(StepName.WEIGHTS)
    assert weights is not None
    assert weights.score is not None
    assert "interaction" not in weights.details
    assert [finding.cause for finding in report.findings].count(Cause.NON_FINITE) == 1


def test_the_first_score_is_the_one_that_counts_and_both_are_told() -> None:
    diagnosis = walked(Judged(convnet(), images()))
    step = diagnosis.report.steps[0]
    assert step.score == diagnosis.report.baseline.score  # type: ignore[union-attr] # a walk measures one
    assert step.details["repeated_score"] == step.score


@pytest.mark.parametrize(("name", "score"), [("NanInLaterBatches", "nan"), ("WrongInLaterBatches", "")])
def test_what_goes_wrong_at_32_bits_on_a_later_batch_only_shows_in_the_score(name: str, score: str) -> None:
    data = images(2)
    data[1] = data[1] + 50
    report = walk(Judged(convnet(), data), target={"quantizer": f"tests.faulty_quantizers.{name}"})
    finding = broken(report)
    assert (finding.cause, finding.quantizer) == (Cause.BROKEN_PIPELINE, None)
    assert f"with every quantizer at 32 bits the score is {score}" in finding.evidence
    assert f", in FP32 {report.steps[0].score:.6g}" in finding.evidence


# Several ranks: each pass waits for all of them, so that all must make the same passes.


def on_one_of_two_ranks(monkeypatch: pytest.MonkeyPatch, net: nn.Module, other: Any, check: str) -> tuple[Any, int]:
    """What a check finds when the other rank says ``other`` wherever ranks are asked; and the number of passes."""
    module = Judged(net, images())

    def action(running: Any) -> tuple[Any, int]:
        evaluator, session = Evaluator(running, module, "loss"), Instrumentation(module, QuantTarget())
        capture(session, evaluator, None)
        set_ranges(session, evaluator, None, 2)
        own, passes = find_own_quantizers(module), []
        monkeypatch.setattr(fp32_check, "gather", lambda value: [value, other])
        checks = fp32_check.Fp32Check(session, evaluator, own, lambda: passes.append(1))
        with own_quantizers(own, enabled=False):
            return getattr(checks, check)(), len(passes)

    result: tuple[Any, int] = in_validation(module, action)
    return result


def test_a_rank_without_a_fault_follows_one_with_a_fault_into_the_next_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    assert on_one_of_two_ranks(monkeypatch, convnet(), False, "_at_32_bits") == (None, 2)
    assert on_one_of_two_ranks(monkeypatch, convnet(), True, "_at_32_bits") == (None, 3)


def test_a_fault_of_an_own_quantizer_on_one_rank_ends_the_check_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    net = convnet(OwnQuantizer())
    assert on_one_of_two_ranks(monkeypatch, net, None, "_own_quantizers") == (None, 2)
    finding, passes = on_one_of_two_ranks(monkeypatch, net, Parting("net.9", 0.5), "_own_quantizers")
    assert (finding.quantizer, passes) == ("net.9", 1)


# Our own part: a runner that is not faithful.


@pytest.mark.parametrize("later", [False, True])
def test_a_network_that_differs_with_every_quantizer_bypassed(monkeypatch: pytest.MonkeyPatch, later: bool) -> None:
    original = Runner.run_planned

    def unfaithful(self: Any, planned: Any, *arguments: Any) -> Any:
        result = original(self, planned, *arguments)
        if planned.name != "net.2":
            return result
        return result * (1.5 if float(result.max()) > 20 else 1.0) if later else result * (1 + 1e-6)

    data = images(2)
    data[1] = data[1] + 50
    monkeypatch.setattr(Runner, "run_planned", unfaithful)
    report = walk(Judged(convnet(), data))
    finding = broken(report)
    assert finding.cause is Cause.BROKEN_PIPELINE
    assert finding.quantizer == (None if later else "net.2")
    expected = "the score is " if later else "the output of net.2 differs from FP32 by 9.6e-07 (relative)"
    assert f"with every quantizer bypassed {expected}" in finding.evidence
    assert report.coverage.unseen == ()


def test_nan_at_32_bits_on_the_first_batch_names_the_operation() -> None:
    data = [images()[0] + 50]
    report = walk(Judged(convnet(), data), target={"quantizer": "tests.faulty_quantizers.NanInLaterBatches"})
    finding = broken(report)
    assert finding.quantizer == "net.1"
    assert "the outputs first part at net.1: relative error inf" in finding.evidence

"""One planted disease each, and the cause that is named; healthy quantizers have none that is specific."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quantdebug import quantizer_symptoms
from lightning_quantdebug.activation_symptoms import ActivationSymptoms
from lightning_quantdebug.instrument import batch_runs, instrument
from lightning_quantdebug.quantizer import Quantizer
from lightning_quantdebug.quantizer_causes import _token, quantizer_causes
from lightning_quantdebug.quantizer_symptoms import Seen, seen_in_validation
from lightning_quantdebug.report import Cause, Finding
from lightning_quantdebug.target import Kind, Mode, QuantSpec

torch.set_num_threads(1)


def causes(
    net: nn.Module,
    batches: Sequence[Any],
    names: Sequence[str] | None = None,
    calibration: Any = None,
    target: Any = "int8",
) -> dict[str, Finding]:
    net.eval()
    with instrument(net, batches[0], target) as q:
        q.calibrate(batches if calibration is None else calibration)
        q.set_mode("bypass")
        wanted = list(q.quantizers) if names is None else list(names)
        modes = [quantizer.mode for quantizer in q.quantizers.values()]
        found = quantizer_causes(q, batch_runs(q, list(batches)), wanted)
        assert [finding.quantizer for finding in found] == wanted
        assert modes == [quantizer.mode for quantizer in q.quantizers.values()]
        assert all(quantizer.probe is None for quantizer in q.quantizers.values())
    return {str(finding.quantizer): finding for finding in found}


def mlp(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(widths[0], widths[1]), nn.ReLU(), nn.Linear(widths[1], widths[2]))


def test_healthy_quantizers_have_nothing_but_their_bits() -> None:
    torch.manual_seed(0)
    found = causes(mlp(16, 32, 8), [torch.randn(64, 16) for _ in range(4)])
    assert {finding.cause for finding in found.values()} <= {
        Cause.TOO_FEW_BITS,
        Cause.ROUNDING_DOMINATES,
        Cause.CLIPPING_DOMINATES,
    }
    assert "rmse is 0.2" in found["1"].evidence
    assert "steps (rounding alone: 0.289), 0% of it clipping" in found["1"].evidence


def test_values_that_calibration_did_not_see() -> None:
    torch.manual_seed(0)
    bright = [torch.randn(64, 16) for _ in range(4)]
    found = causes(mlp(16, 32, 8), bright, ["1"], calibration=[0.5 * batch for batch in bright])["1"]
    assert (found.cause, found.remedy) == (Cause.RANGE_UNSEEN, "custom_range")
    share = float(found.evidence.split("%")[0])
    with torch.no_grad():
        net = mlp(16, 32, 8)
        values = torch.cat([net[1](net[0](batch)).flatten() for batch in bright])
        ceiling = max(net[1](net[0](0.5 * batch)).max() for batch in bright)
    assert share == pytest.approx(100 * float((values > ceiling * (1 + 0.5 / 255)).float().mean()), abs=0.01)
    assert f"{float(ceiling):.4g}" in found.evidence


class Sequence3d(nn.Module):
    """A linear layer over tokens, after what ``plant`` does to its input."""

    def __init__(self, plant: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)
        self.plant = plant or (lambda x: x)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.second.weight.mean()) + self.plant(F.relu(self.first(x)))).mean(1)


def test_a_token_that_carries_the_range() -> None:
    class Sink(Sequence3d):
        def forward(self, x: Tensor) -> Tensor:
            factors = torch.ones(x.shape[1], 1)
            factors[3] = 50.0
            return self.second(F.relu(self.first(x) * factors)).mean(1)

    found = causes(Sink(), [torch.randn(8, 12, 8) for _ in range(3)], ["relu"])["relu"]
    assert (found.cause, found.remedy) == (Cause.OUTLIER_TOKEN, "bit_width")
    assert found.evidence.startswith("token 3 of 12 carries the range")


def test_a_channel_that_carries_the_range_is_told_from_a_token() -> None:
    net = Sequence3d()
    with torch.no_grad():
        net.first.weight[5] *= 100
    (name,) = [n for n in causes(net, [torch.randn(8, 12, 8)]) if n == "relu"]
    found = causes(net, [torch.randn(8, 12, 8) for _ in range(3)], [name])[name]
    assert (found.cause, found.quantizer) == (Cause.OUTLIER_CHANNEL, "relu")
    assert "channel 5 of 16" in found.evidence
    assert "kurtosis" in found.evidence


def test_of_a_token_and_a_channel_the_one_that_costs_more_is_named() -> None:
    seen = Seen(low=torch.zeros(12), high=torch.cat([torch.full((1,), 30.0), torch.ones(11)]))
    assert seen.outlier_tokens == ((0,), pytest.approx(20 * math.log10(30.0)))
    known = ActivationSymptoms("q", 8, 0.5, observed=(0.0, 30.0))
    named = [
        _token(replace(known, outlier_gain=gain, is_output=last), seen)
        for gain, last in ((40, False), (20, False), (20, True))
    ]
    assert [finding is not None for finding in named] == [False, True, False]
    assert _token(known, Seen(low=torch.zeros(1), high=torch.ones(1))) is None


def test_rare_values_that_carry_the_range() -> None:
    batches = [torch.randn(64, 128).clamp(-1, 1) for _ in range(3)]
    batches[1][3, 7] = 500.0
    found = causes(nn.Sequential(nn.Hardtanh(), nn.Linear(128, 8)), batches, ["input"])["input"]
    assert (found.cause, found.remedy) == (Cause.ACTIVATION_OUTLIERS, "custom_range")
    assert "kurtosis" in found.evidence


class Meeting(nn.Module):
    """Two branches of unlike magnitude that meet."""

    def __init__(self, join: str, factor: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16 if join == "add" else 32, 4)
        self.join, self.factor = join, factor
        with torch.no_grad():
            self.b.weight *= factor
            self.b.bias *= factor

    def forward(self, x: Tensor) -> Tensor:
        parts = self.a(x), self.b(x)
        return self.head(parts[0] + parts[1] if self.join == "add" else torch.cat(parts, 1))


@pytest.mark.parametrize("join", ["add", "cat"])
def test_operands_of_unlike_magnitude(join: str) -> None:
    batches = [torch.randn(32, 8) for _ in range(3)]
    with instrument(Meeting(join, 100.0).eval(), batches[0]) as q:
        (name,) = [
            site.name
            for site in q.plan.sites
            for spot in site.places
            if spot.slot is None and spot.key.func in (torch.cat, Tensor.add, torch.add)
        ]
    found = causes(Meeting(join, 100.0), batches, [name])[name]
    assert (found.cause, found.remedy) == (Cause.UNBALANCED_JOIN, "bit_width")
    assert "times fewer levels" in found.evidence
    even = causes(Meeting(join, 2.0), batches, [name])[name]
    assert even.cause is not Cause.UNBALANCED_JOIN


def test_a_function_that_is_at_its_ends() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Linear(16, 4))
    with torch.no_grad():
        net[0].bias.fill_(-12.0)
    found = causes(net, [torch.randn(64, 8) for _ in range(2)], ["1"])["1"]
    assert (found.cause, found.remedy) == (Cause.SATURATED_ACTIVATION, "bit_width")
    with torch.no_grad():
        net[0].bias.fill_(0.0)
    assert causes(net, [torch.randn(64, 8) for _ in range(2)], ["1"])["1"].cause is not Cause.SATURATED_ACTIVATION


def test_a_weight_with_one_huge_channel() -> None:
    net = mlp(16, 32, 8)
    with torch.no_grad():
        net[0].weight[5] *= 60.0
        net[0].bias[5] *= 60.0
        net[2].weight[:, 5] /= 60.0
    names = ["0.weight", "1"]
    found = causes(net, [torch.randn(64, 16) for _ in range(3)], names, target="int8_per_tensor")
    assert (found["0.weight"].cause, found["0.weight"].remedy) == (Cause.UNEVEN_CHANNEL_RANGES, "cle")
    assert found["1"].cause is Cause.OUTLIER_CHANNEL


def seen_by(quantizer: Quantizer, batches: Sequence[Tensor]) -> Seen:
    seen = Seen()
    for batch in batches:
        seen.take(batch, quantizer)
    return seen


def test_sums_do_not_depend_on_how_values_are_cut() -> None:
    torch.manual_seed(0)
    quantizer = Quantizer("x", Kind.ACTIVATION, QuantSpec(4))
    quantizer.observe(torch.randn(1000))
    quantizer.set_range()
    quantizer.mode = Mode.QUANTIZE
    x = 2 * torch.randn(12, 5, 7)
    x[0, 0, 0] = float("nan")
    whole, parts = seen_by(quantizer, [x]), seen_by(quantizer, list(x.split(5)))
    for name in ("count", "outside", "clipping", "unseen_clipping", "noise", "at_ends", "unseen_gain", "end_share"):
        assert getattr(whole, name) == pytest.approx(getattr(parts, name)), name
    assert torch.equal(whole.low, parts.low)
    assert torch.equal(whole.high, parts.high)
    values = x[x.isfinite()].double()
    encoding = quantizer.encoding
    assert encoding is not None
    low, high, scale = float(encoding.range_min), float(encoding.range_max), float(encoding.scale)
    errors = values - values.clamp(low, high)
    assert whole.count == len(values) == 12 * 5 * 7 - 1
    assert whole.clipping == pytest.approx(float(errors.square().sum()))
    assert whole.noise == pytest.approx(float((quantizer(values.float()).double() - values).square().sum()))
    new = (values < quantizer.observer.range_min) | (values > quantizer.observer.range_max)
    assert bool((values[new] < 0).any() and (values[new] > 0).any())
    assert whole.unseen_clipping == pytest.approx(float(errors[new].square().sum()))
    assert whole.outside == int((errors.abs() > scale / 2).sum())
    assert whole.relative_rmse(scale) == pytest.approx(math.sqrt(whole.noise / whole.count) / scale)


def test_tokens_are_bounded_and_may_differ_in_number(monkeypatch: pytest.MonkeyPatch) -> None:
    quantizer = Quantizer("x", Kind.ACTIVATION, QuantSpec(8))
    quantizer.observe(torch.tensor([-9.0, 9.0]))
    quantizer.set_range()
    short, long = torch.ones(2, 3, 4), -2 * torch.ones(2, 6, 4)
    seen = seen_by(quantizer, [short, long, short * 3])
    assert seen.low.tolist() == [-2.0] * 6
    assert seen.high.tolist() == [3.0] * 3 + [0.0] * 3
    monkeypatch.setattr(quantizer_symptoms, "MOST_TOKENS", 2)
    x = torch.arange(5.0).repeat(1, 2, 1).transpose(1, 2)
    assert seen_by(quantizer, [x]).high.tolist() == [0.0, 4.0]


def test_operands_are_the_greatest_of_all_batches() -> None:
    net, batches = Meeting("add", 3.0).eval(), [torch.randn(32, 8) for _ in range(3)]
    with instrument(net, batches[0]) as q:
        q.calibrate(batches)
        q.set_mode("bypass")
        name = next(n for n in q.quantizers if "add" in n)
        seen = seen_in_validation(q, batch_runs(q, batches), [name])[name]
    with torch.no_grad():
        expected = [max(float(part(batch).abs().max()) for batch in batches) for part in (net.a, net.b)]
    assert seen.operands == pytest.approx(expected)
    assert seen.imbalance == pytest.approx(max(expected) / min(expected))

"""Quantizers that the user's model brings along are found, bypassed, checked like ours, and given back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quantdebug.own_quantizers import IdentityCheck, find_own_quantizers, own_quantizers
from lightning_quantdebug.report import Cause, Verdict
from tests.walks import Judged, broken, convnet, images, walk

pytestmark = pytest.mark.filterwarnings("ignore")


class OwnQuantizer(nn.Module):
    """The small protocol: ``enabled`` and ``bit_width``."""

    def __init__(self, bypassed: float = 1.0, at_32_bits: float = 1.0) -> None:
        super().__init__()
        self.enabled, self.bit_width = True, 4
        self.bypassed, self.at_32_bits = bypassed, at_32_bits

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x * self.bypassed
        step = 8.0 / 2.0**self.bit_width
        return (x / step).round() * step * (self.at_32_bits if self.bit_width == 32 else 1.0)


class TorchLike(nn.Module):
    """The interface of torch's FakeQuantize: switches that are buffers."""

    def __init__(self, bypassed: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("fake_quant_enabled", torch.ones(1, dtype=torch.uint8))
        self.register_buffer("observer_enabled", torch.ones(1, dtype=torch.uint8))
        self.register_buffer("scale", torch.tensor([0.5]))
        self.bypassed = bypassed

    def forward(self, x: Tensor) -> Tensor:
        if self.observer_enabled[0] == 1:
            self.scale.copy_(x.abs().max() / 3)
        if self.fake_quant_enabled[0] == 1:
            return (x / self.scale).round() * self.scale
        return x * self.bypassed


@pytest.mark.parametrize("make", [OwnQuantizer, TorchLike])
def test_own_quantizers_are_bypassed_and_said(make: Any) -> None:
    report = walk(Judged(convnet(make()), images()))
    plain = walk(Judged(convnet(), images()))
    assert report.verdict is Verdict.ACCEPTED
    assert report.baseline == plain.baseline
    assert report.findings[0].cause is Cause.NOT_QUANTIZED
    assert report.findings[0].evidence == "the model's own quantizers are bypassed during the walk: ['net.3']"


@pytest.mark.parametrize(
    ("faulty", "words"),
    [
        (OwnQuantizer(bypassed=1.001), "changes its tensor by 0.001 (relative) though it is bypassed"),
        (TorchLike(bypassed=1.0 + 1e-6), "(relative) though it is bypassed"),
        (OwnQuantizer(at_32_bits=1.01), "changes its tensor by 0.01 (relative) though it is at 32 bits"),
    ],
)
def test_own_quantizers_that_are_wrong(faulty: nn.Module, words: str) -> None:
    finding = broken(walk(Judged(convnet(OwnQuantizer(), faulty, OwnQuantizer()), images())))
    assert (finding.cause, finding.quantizer) == (Cause.BROKEN_PIPELINE, "net.4")
    assert finding.evidence.startswith("the model's own quantizer net.4 ")
    assert words in finding.evidence


def test_own_quantizers_are_given_back_after_an_error() -> None:
    net = convnet(OwnQuantizer(), TorchLike())
    found = find_own_quantizers(net)
    assert [quantizer.path for quantizer in found] == ["3", "4"]
    inside: list[Any] = []

    def interrupted() -> None:
        with own_quantizers(found, enabled=False, bit_width=32):
            inside.append((net[3].enabled, net[3].bit_width, net[4].fake_quant_enabled.item()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert inside == [(False, 32, 0)]
    assert (net[3].enabled, net[3].bit_width, net[4].fake_quant_enabled.item()) == (True, 4, 1)


# Without a walk.


class Torchs(nn.Module):
    """Torch's interface."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fake_quant_enabled", torch.tensor([1], dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        return x.round() if self.fake_quant_enabled[0] else x


class HandWritten(nn.Module):
    """The small protocol; off by half a step where ``shift`` is set."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.enabled, self.bit_width, self.shift = True, 4, shift

    def forward(self, x: Tensor) -> Tensor:
        return (x * 2**self.bit_width).round() / 2**self.bit_width + self.shift if self.enabled else x + self.shift


class Switch(nn.Identity):
    """Has a switch, but no bit-width: any module of the user's might."""

    enabled = True


def network(shift: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), Torchs(), nn.Sequential(HandWritten(shift), Switch()))


def test_both_interfaces_are_found_and_nothing_else() -> None:
    found = find_own_quantizers(network())
    assert [quantizer.path for quantizer in found] == ["1", "2.0"]
    assert [quantizer.has_bit_width for quantizer in found] == [False, True]
    assert find_own_quantizers(nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2))) == []


def test_names_are_without_the_compilers_level() -> None:
    assert [q.path for q in find_own_quantizers(torch.compile(network(), backend="eager"))] == ["1", "2.0"]


def state(model: nn.Sequential) -> tuple[Any, ...]:
    return (model[1].fake_quant_enabled.tolist(), model[2][0].enabled, model[2][0].bit_width, model[2][1].enabled)


@pytest.mark.parametrize("fails", [False, True], ids=["", "after_an_error"])
def test_they_are_switched_and_given_back(fails: bool) -> None:
    model = network()
    buffer = model[1].fake_quant_enabled
    found = find_own_quantizers(model)
    before = state(model)
    try:
        with own_quantizers(found, enabled=False):
            assert state(model) == ([0], False, 4, True)
            with own_quantizers(found, enabled=True, bit_width=16):
                assert state(model) == ([1], True, 16, True)
            assert state(model) == ([0], False, 4, True)
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert state(model) == before
    assert model[1].fake_quant_enabled is buffer


def test_the_identity_check_names_the_first_that_changes_its_tensor() -> None:
    model = network(shift=0.5)
    found = find_own_quantizers(model)
    check = IdentityCheck(found)
    with own_quantizers(found, enabled=False), check.watching():
        model(torch.randn(3, 2))
    assert [parting.name for parting in check.errors] == ["1", "2.0"]
    first = check.first_beyond(1e-4)
    assert first is not None
    assert first.name == "2.0"
    assert first.error > 0.01
    assert not any(module._forward_hooks for module in model.modules())
    count = len(check.errors)
    model(torch.randn(3, 2))
    assert len(check.errors) == count


def test_the_identity_check_is_content_with_identities() -> None:
    model = network()
    found = find_own_quantizers(model)
    check = IdentityCheck(found)
    with own_quantizers(found, enabled=False), check.watching():
        model(torch.randn(3, 2))
    assert check.first_beyond(1e-7) is None
    assert len(check.errors) == 2


def test_nan_is_beyond_every_bound() -> None:
    class Nan(HandWritten):
        def forward(self, x: Tensor) -> Tensor:
            return x * float("nan")

    model = nn.Sequential(Nan())
    check = IdentityCheck(find_own_quantizers(model))
    with check.watching():
        model(torch.ones(1, 2))
    assert check.first_beyond(1e9) is not None

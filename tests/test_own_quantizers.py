"""Quantizers that the user's model brings along are found, bypassed, checked like ours, and given back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quantdebug.own_quantizers import find_own_quantizers, own_quantizers
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

"""Tiny networks with one planted disease each, the target under which they are sick, and what must cure them.

Every patient is right about all of its data in FP32: labels are what the network says, and samples of which it is not
sure are left out. So whatever a quantized patient gets wrong is due to its disease.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quantdebug.report import Cause
from tests.walks import Classifier

BATCHES, BATCH_SIZE = 8, 32


@dataclass(frozen=True)
class Patient:
    """A network in its LightningModule, and what the walk on it must find and do.

    Attributes:
        name: As in the golden report's file name.
        build: Makes the module anew.
        target: What it is quantized to.
        cause: The cause that must be named first, ``None`` for a healthy one.
        remedy: The remedy that must be kept first.
    """

    name: str
    build: Callable[[], Classifier]
    target: Any
    cause: Cause | None = None
    remedy: str | None = None


def _sure(net: nn.Module, x: Tensor) -> Classifier:
    """The network with the samples of ``x`` that it is most sure of, labelled as it sees them."""
    net.eval()
    with torch.no_grad():
        logits = net(x)
    best = logits.topk(2, dim=1).values
    order = (best[:, 0] - best[:, 1]).argsort(descending=True)[: BATCHES * BATCH_SIZE]
    chosen = order.sort().values
    x, labels = x[chosen], logits[chosen].argmax(1)
    return Classifier(net, list(zip(x.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True)))


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _mlp(*widths: int) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def healthy() -> Classifier:
    """Nothing planted."""
    return _sure(_mlp(16, 32, 8), torch.randn(1024, 16, generator=_generator()))


def uneven_channels() -> Classifier:
    """Hidden channels rescaled by factors from 1/32 to 32, which ReLU passes on: the function is the same."""
    net = _mlp(16, 32, 8)
    factors = 2.0 ** torch.linspace(-5, 5, 32)
    with torch.no_grad():
        net[0].weight *= factors[:, None]
        net[0].bias *= factors
        net[2].weight /= factors
    return _sure(net, torch.randn(1024, 16, generator=_generator()))


def biased_error() -> Classifier:
    """Weights just below the middle between two levels, inputs that are all positive: each error shifts its output."""
    classes, inputs, bits = 8, 64, 4
    steps = torch.randint(-6, 6, (classes, inputs), generator=_generator()).float()
    off = torch.tensor([0.45, -0.45]).repeat(classes // 2)[:, None]
    weight = (steps + off) / (2 ** (bits - 1) - 1)
    weight[:, 0] = 1.0  # The range, on the grid.
    net = nn.Sequential(nn.Linear(inputs, classes))
    x = 2.0 + 0.5 * torch.randn(1024, inputs, generator=_generator(1))
    with torch.no_grad():
        net[0].weight.copy_(weight)
        net[0].bias.copy_(-(weight * 2.0).sum(1))
    return _sure(net, x)


class _Clipping(nn.Module):
    """Clips its inputs, so that it does not matter how far beyond 1 they are."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(128, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.hardtanh(x))


def activation_outliers() -> Classifier:
    """Three of 32,768 inputs are huge; the network clips them."""
    torch.manual_seed(0)
    x = torch.randn(1024, 128, generator=_generator()).clamp(-1, 1)
    module = _sure(_Clipping(), x)
    for index in (0, 3, 5):
        inputs = module.batches[index][0]
        inputs[index, 7 * index + 1] = 1000.0 * inputs[index, 7 * index + 1].sign()
    return module


def outlier_channel() -> Classifier:
    """One hidden channel is a hundred times greater than the others, and the next layer makes up for it.

    A class is a level (0 to 3), told by the great channel, and which of the four small channels is the greatest. The
    great channel sums a hundred inputs, so that its weights are as great as all others: weights alone do not show it.
    """
    copies, small, levels = 100, 4, 4
    level = torch.randint(0, levels, (1024, 1), generator=_generator())
    noise = 0.2 * torch.rand(1024, 1, generator=_generator(2)) - 0.1
    values = torch.rand(1024, small, generator=_generator(1)) / 2
    first, second = nn.Linear(copies + small, 1 + small), nn.Linear(1 + small, levels * small)
    # -(h - t)^2 / 2 is greatest for the nearest level t; without h^2, which all have, it is linear in h. The slope puts
    # the weights on the 8-bit grid: they are not ill.
    slope, goals = 2 / 127, torch.arange(levels).repeat_interleave(small)
    with torch.no_grad():
        first.weight.copy_(torch.block_diag(torch.ones(1, copies), torch.eye(small)))
        first.bias.zero_()
        second.weight.copy_(torch.cat([slope * goals[:, None], torch.eye(small).repeat(levels, 1)], 1))
        second.bias.copy_(-copies * slope * goals**2 / 2)
    x = torch.cat([(level + noise).clamp(min=0.0).expand(-1, copies), values], 1)
    return _sure(nn.Sequential(first, nn.ReLU(), second), x)


def wide_last_layer() -> Classifier:
    """A ninth logit far below the others: the class never occurs, but its range makes the others one."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 9))
    with torch.no_grad():
        net[0].weight[8] *= 200
        net[0].bias[8] = -800.0
    return _sure(net, torch.randn(1024, 16, generator=_generator()))


def correlated_inputs() -> Classifier:
    """Inputs that go together, so that few bits do if weights are rounded to make up for each other."""
    classes, inputs, rank = 16, 64, 4
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(inputs, classes))
    basis = torch.randn(rank, inputs, generator=_generator(1))
    together = torch.randn(300, rank, generator=_generator(2)) @ basis
    return _sure(net, together + 0.1 * torch.randn(300, inputs, generator=_generator(3)))


PATIENTS = (
    Patient("healthy", healthy, "int8"),
    Patient("uneven_channels", uneven_channels, "int8_per_tensor", Cause.UNEVEN_CHANNEL_RANGES, "cle"),
    Patient(
        "biased_error",
        biased_error,
        {"preset": "w4a8", "weights": {"range_setting": "min_max"}},
        Cause.BIASED_ERROR,
        "bias_correction",
    ),
    Patient("activation_outliers", activation_outliers, "int8", Cause.ACTIVATION_OUTLIERS, "range_setting"),
    Patient("outlier_channel", outlier_channel, "int8", Cause.OUTLIER_CHANNEL, "activation_cle"),
    Patient("wide_last_layer", wide_last_layer, "int8", Cause.ROUNDING_DOMINATES, "range_setting"),
    Patient("correlated_inputs", correlated_inputs, "w3a8", Cause.ROUNDING_DOMINATES, "adaround"),
)

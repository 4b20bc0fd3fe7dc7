"""Equalization undoes a rescaling that was planted in a network trained on real images, as in the DFQ paper.

Nagel et al. 2019, table 1: MobileNetV2 falls to 0.1 % with weights at W8 per tensor and comes back to within a point.
"""

from __future__ import annotations

import copy

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_quantdebug.causes import weight_causes
from lightning_quantdebug.equalization import equalize
from lightning_quantdebug.instrument import batch_runs, instrument
from lightning_quantdebug.report import Cause

torch.set_num_threads(1)


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images).float().div(16.0).sub(0.5).view(-1, 1, 8, 8), torch.from_numpy(labels)


def layer(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


@pytest.fixture(scope="module")
def trained() -> nn.Sequential:
    """A MobileNet-like network after five epochs over 1,200 digits."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *layer(1, 16, 3),
        *layer(16, 16, 3, groups=16),
        *layer(16, 32, 1),
        *layer(32, 32, 3, 2, groups=32),
        *layer(32, 64, 1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(256, 10),
    )
    x, y = (part[:1200] for part in digits())
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for epoch in range(5):
        for batch in torch.randperm(1200, generator=torch.Generator().manual_seed(epoch)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    return net.eval()


@torch.no_grad()
def rescaled(net: nn.Sequential) -> nn.Sequential:
    """The same function, with each channel of a batch normalization times 10^u and the next weights divided by it."""
    net, generator = copy.deepcopy(net), torch.Generator().manual_seed(0)
    norms = [part for part in net if isinstance(part, nn.BatchNorm2d)]
    followers = [part for part in net if isinstance(part, (nn.Conv2d, nn.Linear))][1:]
    for norm, follower in zip(norms, followers, strict=True):
        factors = 10.0 ** (3 * torch.rand(norm.num_features, generator=generator) - 1.5)
        norm.weight *= factors
        norm.bias *= factors
        if isinstance(follower, nn.Linear):
            follower.weight /= factors.repeat_interleave(4)  # Four pooled positions of each channel.
        else:
            follower.weight /= factors.view((-1, 1, 1, 1) if follower.groups > 1 else (1, -1, 1, 1))
    return net


@torch.no_grad()
def accuracy(net: nn.Module) -> float:
    x, y = (part[1200:] for part in digits())
    return float((net(x).argmax(1) == y).double().mean())


def test_a_planted_rescaling_ruins_weights_per_tensor_and_equalization_brings_them_back(trained: nn.Sequential) -> None:
    fp32, sick = accuracy(trained), rescaled(trained)
    x = digits()[0]
    assert fp32 > 0.9
    torch.testing.assert_close(sick(x[:64]), trained(x[:64]), rtol=1e-3, atol=1e-3)
    batches = list(x[:256].split(32))
    with instrument(sick, batches[0], "int8_per_tensor") as session:
        session.calibrate(batches)
        with session.modes("quantize", kind="weight"):
            ruined = accuracy(sick)
        found = weight_causes(session, batch_runs(session, batches))
        applied = equalize(session, batch_runs(session, batches))
        session.calibrate(batches)
        with session.modes("quantize", kind="weight"):
            weights = accuracy(sick)
        with session.modes("quantize"):
            both = accuracy(sick)
    assert ruined < 0.25
    assert {(finding.cause, finding.remedy) for finding in found} == {(Cause.UNEVEN_CHANNEL_RANGES, "cle")}
    assert len(applied.changed) == 6
    assert weights >= fp32 - 0.005
    assert both >= fp32 - 0.005

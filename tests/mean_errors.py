"""Mean errors of layers, measured by taking everything apart: what bias correction is held against."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_quantdebug.adjustment import Applied
from lightning_quantdebug.bias_correction import correct_bias, correct_bias_analytically
from lightning_quantdebug.instrument import batch_runs
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.layers import Runs, Visit
from lightning_quantdebug.target import Granularity, QuantSpec, QuantTarget, RangeSetting

W4 = QuantTarget(
    "w4",
    weights=QuantSpec(4, symmetric=True, granularity=Granularity.PER_TENSOR, range_setting=RangeSetting.MIN_MAX),
    activations=QuantSpec(16),
)
"""Weights with a coarse grid, activations with one that is as good as none."""


def three_layers() -> nn.Module:
    """A folded normalization, a depthwise and a linear layer."""
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8),
        nn.ReLU6(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    )
    model[1].running_mean.normal_(0, 0.3)
    model[1].running_var.uniform_(0.5, 2)
    model[1].weight.data.uniform_(0.5, 1.5)
    return model.eval()


def images(*counts: int, seed: int = 0, size: int = 6) -> list[Tensor]:
    """Batches of so many images, none of whose values is negative."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(count, 2, size, size, generator=generator) + 0.3 for count in counts]


def empirical(session: Instrumentation, batches: Iterable[Any]) -> Applied:
    return correct_bias(session, batch_runs(session, list(batches)))


def analytic(session: Instrumentation, batches: Iterable[Any]) -> Applied:
    return correct_bias_analytically(session, batch_runs(session, list(batches)))


def results(session: Instrumentation, batches: Iterable[Any], quantized: bool) -> dict[str, list[np.ndarray]]:
    """What each layer gives for each batch, in FP32 or quantized, with all corrections that are there."""
    found: dict[str, list[np.ndarray]] = {}

    def visit(run: Callable[[], Any], index: int) -> None:
        taps = {
            layer.key: lambda call, name=layer.name: found.setdefault(name, []).append(call.result.double().numpy())
            for layer in session.layers
        }
        with session.tapped(taps), session.modes("quantize") if quantized else session.reference():
            run()

    batch_runs(session, list(batches))(visit)
    return found


def mean_errors(session: Instrumentation, batches: list[Any], axis: int = 1) -> dict[str, np.ndarray]:
    """Mean error of every channel of each layer, over all batches and positions."""
    exact, rounded = results(session, batches, False), results(session, batches, True)

    def rows(arrays: list[np.ndarray]) -> np.ndarray:
        return np.concatenate([np.moveaxis(each, axis, 0).reshape(each.shape[axis], -1) for each in arrays], axis=1)

    return {name: (rows(rounded[name]) - rows(exact[name])).mean(1) for name in exact}


def corrections(session: Instrumentation) -> dict[str, np.ndarray]:
    """What was added to the bias of each layer."""
    found = {layer.name: session.adjustments.get(layer.key) for layer in session.layers}
    return {
        name: adjustment.bias_correction.double().numpy()
        for name, adjustment in found.items()
        if adjustment is not None and adjustment.bias_correction is not None
    }


def off_grid(weight: Tensor) -> Tensor:
    """A weight that rounds down everywhere by 0.4 steps of a 4-bit grid whose step is 0.1."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randint(-7, 7, weight.shape, generator=generator).double()
    planted = (whole + 0.4) * 0.1
    planted.view(-1)[0] = 0.7
    return planted.float()


def quantized_in_numpy(weight: Tensor) -> np.ndarray:
    exact = weight.detach().double().numpy()
    step = max(exact.max() / 7, -exact.min() / 8)
    return np.clip(np.round(exact / step), -8, 7) * step


def recorded_on(model: nn.Module, target: QuantTarget, *batches: Tensor) -> Instrumentation:
    """A network that takes other ways for other batches, with all of them recorded."""
    session = Instrumentation(model.eval(), target)
    for batch in batches:
        session.record(functools.partial(model, batch), batch)
    session.place()
    return session


def runs_of(session: Instrumentation, *batches: Tensor) -> Runs:
    """Calibration data of such a network."""

    def runs(visit: Visit, most: int | None = None) -> None:
        with torch.no_grad():
            for index, batch in enumerate(batches[:most]):
                visit(functools.partial(session.run, functools.partial(session.root, batch)), index)

    return runs


def calibrate_on(session: Instrumentation, *batches: Tensor) -> None:
    """Set the ranges of such a network."""
    with session.observing():
        runs_of(session, *batches)(lambda run, index: run())

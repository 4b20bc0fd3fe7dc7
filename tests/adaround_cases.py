"""Small networks with data on which AdaRound has something to gain, and a look at what it does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quantdebug import adaround as module
from lightning_quantdebug.adaround import adaround
from lightning_quantdebug.adjustment import Applied
from lightning_quantdebug.instrument import batch_runs, instrument
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.layer_samples import Samples
from lightning_quantdebug.layers import Layer
from lightning_quantdebug.learned_rounding import AdaRoundSettings, RoundingProblem

FAST = AdaRoundSettings(iterations=100, batch_size=64, learning_rate=0.15)


def images(count: int = 12, channels: int = 4, size: int = 6, seed: int = 0) -> Tensor:
    """Inputs of which neighbours are alike."""
    noise = torch.randn(count, channels, size + 2, size + 2, generator=torch.Generator().manual_seed(seed))
    return F.avg_pool2d(noise, 3, 1) + 0.1 * noise[:, :, 1:-1, 1:-1]


def tokens(count: int, width: int, seed: int = 0) -> Tensor:
    """Vectors of a few directions."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, 4, generator=generator) @ torch.randn(4, width, generator=generator)
    return mixed + 0.2 * torch.randn(count, width, generator=generator)


@contextmanager
def quantized(model: nn.Module, batches: list[Any], target: Any = "w3a8") -> Iterator[Instrumentation]:
    """The model calibrated on its batches."""
    with instrument(model.eval(), batches[0], target) as session:
        session.calibrate(batches)
        yield session


def learn(session: Instrumentation, batches: list[Any], settings: AdaRoundSettings = FAST, **watch: Any) -> Applied:
    return adaround(session, batch_runs(session, batches), settings, **watch)


def weight_in_use(session: Instrumentation, layer: Layer, run: Callable[[], Any]) -> Tensor:
    """The weight that the operation really gets while everything is quantized."""
    seen: list[Tensor] = []
    with session.tapped({layer.key: lambda call: seen.append(call.args[1].clone())}), session.modes("quantize"):
        run()
    return seen[0]


def with_spec(bit_width: int = 3, **fields: Any) -> dict[str, Any]:
    weights = {"bit_width": bit_width, "symmetric": True, "granularity": "per_tensor", **fields}
    return {"weights": weights, "activations": {"bit_width": 8}}


def output_error(session: Instrumentation, model: nn.Module, x: Tensor, kind: str | None = None) -> float:
    """Mean squared difference of the quantized network's output from the FP32 one's."""
    with torch.no_grad(), session.reference():
        exact = model(x)
    with torch.no_grad(), session.modes("quantize", kind=kind):
        return float((model(x) - exact).double().square().mean())


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        nn.ReLU6(),
        nn.Conv2d(12, 12, 3, padding=1, groups=12),
        nn.ReLU(),
        nn.Conv2d(12, 8, 1),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


def corrections(session: Instrumentation) -> list[Tensor]:
    found = [adjustment.weight_correction for adjustment in session.adjustments.values()]
    return [correction for correction in found if correction is not None]


class Learning:
    """Stands in for learning: keeps what it is given and hands out the weights rounded down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.problems: list[RoundingProblem] = []
        self.samples: list[Samples] = []
        monkeypatch.setattr(module, "learn_rounding", self)
        # Whatever it is, it is kept.
        monkeypatch.setattr(RoundingProblem, "error", lambda problem, samples, weight: self.error(problem, weight))

    def error(self, problem: RoundingProblem, weight: Tensor) -> float:
        return 1.0 if weight is self.result else 2.0

    def __call__(self, problem: RoundingProblem, samples: Samples, settings: Any, is_late: Any) -> Tensor:
        self.problems.append(problem)
        self.samples.append(samples)
        self.result = problem.on_grid(torch.zeros_like(problem.weight))
        return self.result

"""Scores that guessing gives are told, and those of a trained model are not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quantdebug.evaluation import Evaluation
from lightning_quantdebug.instrument import Instrumentation
from lightning_quantdebug.plausibility import chance_warning, direction_warning, output_width
from lightning_quantdebug.settings import make_settings
from lightning_quantdebug.target import QuantTarget
from tests.walks import Classifier, walk


def session_on(net: nn.Module, batch: Tensor) -> Instrumentation:
    session = Instrumentation(net, QuantTarget())
    session.record(lambda: net(batch), batch)
    session.place()
    return session


def warned(monitor: str, mode: str, score: float, classes: int = 4, samples: int | None = 1000) -> list[str]:
    session = session_on(nn.Linear(8, classes), torch.randn(2, 8))
    return chance_warning(session, make_settings(monitor=monitor, mode=mode), Evaluation(score, {}, None, samples, 0.0))


MARGIN = 3 * math.sqrt(0.25 * 0.75 / 1000)


@pytest.mark.parametrize(
    ("monitor", "mode", "score", "guess"),
    [
        ("val_acc", "max", 0.25, "1/4 by guessing"),
        ("Accuracy", "max", 0.25 + 0.99 * MARGIN, "1/4 by guessing"),
        ("val_f1", "max", 0.0, "1/4 by guessing"),
        ("val_auroc", "max", 0.1, "1/4 by guessing"),
        ("val_loss", "min", math.log(4), "ln(4) = 1.39 by guessing"),
        ("cross_entropy", "min", 1.015 * math.log(4), "ln(4) = 1.39 by guessing"),
        ("val_ce", "min", 0.985 * math.log(4), "ln(4) = 1.39 by guessing"),
    ],
)
def test_guessing_is_told(monitor: str, mode: str, score: float, guess: str) -> None:
    (text,) = warned(monitor, mode, score)
    assert f"The FP32 score {monitor} = {score:.4g} is about what guessing gives ({guess}): was the model" in text


@pytest.mark.parametrize(
    ("monitor", "mode", "score", "settings"),
    [
        ("val_acc", "max", 0.25 + 1.01 * MARGIN, {}),
        ("val_acc", "max", -0.1, {}),
        ("val_acc", "min", 0.25, {}),
        ("val_loss", "min", 1.03 * math.log(4), {}),
        ("val_loss", "min", 0.2, {}),
        ("val_loss", "min", 0.0, {"classes": 1}),
        ("val_psnr", "max", 0.1, {}),
        ("val_acc", "max", 0.25, {"samples": None}),
    ],
)
def test_all_else_is_not(monitor: str, mode: str, score: float, settings: Any) -> None:
    assert warned(monitor, mode, score, **settings) == []


def test_one_output_is_taken_for_two_classes() -> None:
    assert "1/2 by guessing" in warned("val_acc", "max", 0.5, classes=1)[0]


@pytest.mark.parametrize(
    ("net", "batch", "width"),
    [
        (nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)), torch.randn(2, 8), 5),
        (nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5), nn.Softmax(-1)), torch.randn(2, 8), 5),
        (nn.Conv2d(3, 7, 1), torch.randn(2, 3, 4, 4), None),
    ],
)
def test_output_width(net: nn.Module, batch: Tensor, width: int | None) -> None:
    assert output_width(session_on(net, batch)) == width


@pytest.mark.filterwarnings("ignore")
def test_a_walk_on_an_untrained_model_warns() -> None:
    torch.manual_seed(0)
    data = [(torch.randn(50, 8), torch.arange(50) % 4) for _ in range(2)]
    report = walk(Classifier(nn.Linear(8, 4), data), monitor="acc", mode="max")
    (text,) = report.steps[0].details["warnings"]
    assert text.startswith("The FP32 score acc = ")


@pytest.mark.parametrize(
    ("mode", "higher", "right"),
    [("min", True, "max"), ("max", False, "min"), ("min", False, None), ("max", None, None)],
)
def test_the_wrong_direction_is_told(mode: str, higher: bool | None, right: str | None) -> None:
    warnings = direction_warning(make_settings(monitor="val_acc", mode=mode), higher)
    assert len(warnings) == (right is not None)
    if right is not None:
        assert warnings[0].startswith(
            f"mode='{mode}' contradicts the metric behind 'val_acc', whose `higher_is_better`"
        )
        assert f"is {higher}: pass mode='{right}'" in warnings[0]

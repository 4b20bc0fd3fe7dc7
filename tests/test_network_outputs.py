"""What counts as an output, and which axis of it is taken for classes, in every way in which users use it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn

from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.network_outputs import Output, network_outputs
from lightning_quantdebug.target import QuantTarget

torch.set_num_threads(1)


class Step(nn.Module):
    """A network and what a step does with its output."""

    def __init__(self, net: nn.Module, use: Callable[[Any], Any]) -> None:
        super().__init__()
        self.net = net
        self.use = use
        self.criterion, self.likelihood, self.mean = nn.CrossEntropyLoss(), nn.NLLLoss(), nn.MSELoss()
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(3)
        self.binary = torchmetrics.classification.BinaryAccuracy()


def outputs_of(net: nn.Module, use: Callable[[Any, Any], Any], x: Tensor | None = None) -> list[Output]:
    """The outputs of a network that a step uses as ``use(step, net(x))``."""
    torch.manual_seed(0)
    step = Step(net.eval(), use)  # type: ignore[arg-type]
    batch = torch.randn(4, 6) if x is None else x
    session = Instrumentation(step, QuantTarget.from_value("int8"))
    session.record(lambda: use(step, step.net(batch)), batch, step=True)
    session.place()
    return network_outputs(session)


def linear(classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, classes))


LABELS = torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    "use",
    [
        lambda step, y: F.cross_entropy(y, LABELS),
        lambda step, y: step.criterion(y, LABELS),
        lambda step, y: F.nll_loss(y.log_softmax(1), LABELS),
        lambda step, y: y.argmax(1),
        lambda step, y: y.argmax(dim=-1),
        lambda step, y: torch.argmax(y, dim=1),
        lambda step, y: y.softmax(-1),
        lambda step, y: F.softmax(y, dim=1),
        lambda step, y: step.accuracy(y, LABELS),
        lambda step, y: F.cross_entropy(y.float().contiguous(), LABELS),
        lambda step, y: step.criterion(y.view(-1, 3), LABELS),
    ],
)
def test_an_output_that_is_treated_as_classes_is_classes(use: Callable[..., Any]) -> None:
    assert [(output.name, output.class_axis, output.is_probability) for output in outputs_of(linear(), use)] == [
        ("net.2", 1, False)
    ]


@pytest.mark.parametrize(
    ("use", "classes"),
    [
        (lambda step, y: step.mean(y, torch.zeros(4, 3)), 3),
        (lambda step, y: y.square().mean(), 3),
        (lambda step, y: F.binary_cross_entropy_with_logits(y, torch.ones(4, 3)), 3),
        (lambda step, y: step.binary(y[:, 0], LABELS > 0), 3),
        (lambda step, y: F.cross_entropy(y, torch.zeros(4, dtype=torch.long)), 1),
        (lambda step, y: y.argmax(), 3),
    ],
)
def test_an_output_that_nobody_treats_as_classes_is_none(use: Callable[..., Any], classes: int) -> None:
    assert [output.class_axis for output in outputs_of(linear(classes), use)] == [None]


def test_classes_of_tokens_and_of_pixels() -> None:
    tokens = nn.Linear(6, 5)
    x = torch.randn(4, 7, 6)
    flat = outputs_of(tokens, lambda step, y: F.cross_entropy(y.view(-1, 5), torch.zeros(28, dtype=torch.long)), x)
    turned = outputs_of(
        tokens, lambda step, y: F.cross_entropy(y.transpose(1, 2), torch.zeros(4, 7, dtype=torch.long)), x
    )
    assert [output.class_axis for output in (*flat, *turned)] == [2, 2]
    pixels = outputs_of(
        nn.Conv2d(3, 5, 1),
        lambda step, y: F.cross_entropy(y, torch.zeros(4, 8, 8, dtype=torch.long)),
        torch.randn(4, 3, 8, 8),
    )
    assert [output.class_axis for output in pixels] == [1]


def test_a_softmax_at_the_end_gives_probabilities_and_a_log_softmax_does_not() -> None:
    for layer, expected in ((nn.Softmax(1), True), (nn.Softmax(-1), True), (nn.LogSoftmax(1), False)):
        net = nn.Sequential(nn.Linear(6, 3), layer)
        assert outputs_of(net, lambda step, y: y.mean())[0].class_axis == 1
        assert outputs_of(net, lambda step, y: y.mean())[0].is_probability is expected
        # What is read as classes is a probability all the same.
        (read,) = outputs_of(net, lambda step, y: y.argmax(1))
        assert (read.class_axis, read.is_probability) == (1, expected)


@dataclass
class Both:
    """What a detector returns."""

    boxes: Tensor
    logits: Tensor


class TwoHeads(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.boxes, self.logits, self.kind = nn.Linear(6, 4), nn.Linear(6, 3), kind

    def forward(self, x: Tensor) -> Any:
        boxes, logits = self.boxes(x), self.logits(x)
        if self.kind == "loss":
            return F.cross_entropy(logits, LABELS)
        return {"dict": {"boxes": boxes, "logits": logits}, "tuple": (boxes, logits), "record": Both(boxes, logits)}[
            self.kind
        ]


@pytest.mark.parametrize("kind", ["dict", "tuple", "record"])
def test_several_outputs_in_any_container(kind: str) -> None:
    def use(step: Any, y: Any) -> Tensor:
        boxes, logits = (y["boxes"], y["logits"]) if kind == "dict" else y if kind == "tuple" else (y.boxes, y.logits)
        return F.cross_entropy(logits, LABELS) + boxes.abs().mean()

    found = {output.name: output.class_axis for output in outputs_of(TwoHeads(kind), use)}
    assert found == {"net.boxes": None, "net.logits": 1}


def test_of_a_network_that_returns_its_loss_the_output_is_what_the_loss_reads() -> None:
    found = outputs_of(TwoHeads("loss"), lambda step, y: y * 2.0)
    assert ("net.logits", 1) in {(output.name, output.class_axis) for output in found}

"""Distillation adds the divergence from FP32 to the loss of the user's own step, and leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quantdebug import instrument
from lightning_quantdebug.distillation import Teacher, copies_of, kl_divergence

CLASSES = torch.tensor([0, 2, 1, 2])


class Net(nn.Module):
    """A classifier that wraps its logits as told."""

    def __init__(self, form: str = "tensor") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form = form
        self.body = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Any:
        logits = self.body(x)
        if self.form == "dict":
            return {"features": x, "logits": logits}
        return (x.sum(), logits) if self.form == "tuple" else logits


def logits_of(output: Any) -> Tensor:
    if isinstance(output, dict):
        return output["logits"]
    return output[1] if isinstance(output, tuple) else output


class Whole(nn.Module):
    """A network with its loss, as a LightningModule has it."""

    def __init__(self, form: str = "tensor", returns: str = "tensor") -> None:
        super().__init__()
        self.net = Net(form)
        self.returns = returns

    def forward(self, x: Tensor) -> Any:
        loss = F.cross_entropy(logits_of(self.net(x)), CLASSES)
        return {"loss": loss, "more": x} if self.returns == "dict" else loss


@pytest.mark.parametrize("shape", [(4, 3), (2, 5, 3), (3,)])
def test_divergence_is_that_of_the_distributions(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    teacher, student = torch.randn(shape), torch.randn(shape)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=teacher.double()),
        torch.distributions.Categorical(logits=student.double()),
    ).mean()
    assert kl_divergence(teacher, student, len(shape) - 1).item() == pytest.approx(expected.item(), rel=1e-5)
    moved = kl_divergence(teacher.movedim(-1, 0), student.movedim(-1, 0), 0)
    assert moved.item() == pytest.approx(expected.item(), rel=1e-5)
    assert kl_divergence(teacher.bfloat16(), student.bfloat16(), len(shape) - 1).dtype == torch.float32


def step_with(
    form: str, returns: str = "tensor", mode: str = "quantize", weight: float = 0.7
) -> tuple[Whole, Any, Any, dict[str, Tensor]]:
    """The outcome of one step with and without the teacher, and the teacher's tensors."""
    model, x = Whole(form, returns).eval(), torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    tensors = copies_of(model)
    with instrument(model, x, "w2a4_per_tensor") as session:
        session.calibrate([x])
        session.set_mode(mode)
        teacher = Teacher(session, weight, tensors)
        model.train()
        model.net.body[3].eval()
        model.net.body[1].eval()
        step = lambda: session.run(lambda: model(x), step=True)  # noqa: E731 - as short as it can be
        plain = step()
        outcome = teacher(step)
        assert teacher.refusal == ""
        again = teacher(step)
    assert torch.equal(_loss(outcome), _loss(again))
    return model, plain, outcome, tensors


def _loss(outcome: Any) -> Tensor:
    return outcome["loss"] if isinstance(outcome, dict) else outcome


@pytest.mark.parametrize("form", ["tensor", "dict", "tuple"])
@pytest.mark.parametrize("returns", ["tensor", "dict"])
def test_the_loss_gets_the_weighted_divergence_from_fp32(form: str, returns: str) -> None:
    model, plain, outcome, _ = step_with(form, returns)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    seen: list[Tensor] = []
    hook = model.net.register_forward_hook(lambda module, args, output: seen.append(logits_of(output)))
    with instrument(model.eval(), x, "w2a4_per_tensor") as session, torch.no_grad():
        session.calibrate([x])
        model(x)
        session.set_mode("quantize")
        model(x)
    hook.remove()
    fp32, quantized = seen[-2:]
    expected = 0.7 * kl_divergence(fp32, quantized, 1)
    assert expected > 0.001
    assert (_loss(outcome) - _loss(plain)).item() == pytest.approx(expected.item(), rel=1e-3)
    if returns == "dict":
        assert set(outcome) == {"loss", "more"}


def test_gradients_reach_the_student_and_no_teacher() -> None:
    model, plain, outcome, tensors = step_with("tensor")
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    (outcome - plain).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert any(bool(parameter.grad.abs().sum() > 0) for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) and tensor.grad is None for name, tensor in tensors.items())
    assert all(not tensor.requires_grad for tensor in tensors.values())


def test_unquantized_the_student_is_the_teacher() -> None:
    _, plain, outcome, _ = step_with("tensor", mode="bypass")
    assert (outcome - plain).item() == pytest.approx(0.0, abs=1e-7)


def test_modes_buffers_and_hooks_are_as_they_were() -> None:
    model, x = Whole(), torch.randn(4, 6)
    with instrument(model.eval(), x) as session:
        session.calibrate([x])
        session.set_mode("quantize")
        tensors = copies_of(model)
        teacher = Teacher(session, 1.0, tensors)
        model.train()
        modes = [part.training for part in model.modules()]

        def step() -> Any:
            return session.run(lambda: model(x), step=True)

        step()
        counted = int(model.net.body[1].num_batches_tracked)
        for _ in range(2):
            teacher(step)
        assert int(model.net.body[1].num_batches_tracked) == counted + 2
        assert int(tensors["net.body.1.num_batches_tracked"]) == 0
        assert [part.training for part in model.modules()] == modes

        def broken() -> Any:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            teacher(broken)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


def test_without_classes_there_is_nothing_to_distil() -> None:
    model, x = nn.Linear(4, 2).eval(), torch.randn(3, 4)
    with instrument(model, x) as session:
        session.calibrate([x])
        teacher = Teacher(session, 1.0, copies_of(model))
        assert "treated as the logits" in teacher.refusal
        assert teacher(lambda: "outcome") == "outcome"


def test_logits_that_no_module_returns_are_not_distilled() -> None:
    class Inline(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.weight = nn.Linear(6, 8), nn.Parameter(torch.randn(3, 8))

        def forward(self, x: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(self.first(x).relu(), self.weight), CLASSES)

    model, x = Inline().eval(), torch.randn(4, 6)
    with instrument(model, x) as session:
        session.calibrate([x])
        teacher = Teacher(session, 1.0, copies_of(model))
        assert teacher.refusal == ""
        plain = model(x)
        assert torch.equal(teacher(lambda: session.run(lambda: model(x), step=True)), plain)
    assert "no module" in teacher.refusal

"""Distillation: while a quantized network trains, its logits are also drawn to those of the FP32 network.

    ``loss + weight * KL(FP32 || quantized)``, the mean over all positions of the output, at temperature 1

(Hinton et al. 2015; for quantization Polino et al. 2018, Mishra & Marr 2018). The FP32 network is kept as tensors on
the side and run by the module that returns the logits, with the very inputs that it got: no second copy of the user's
code, no second step, and nothing is logged twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.model_loan import eval_mode
from lightning_quantdebug.network_outputs import network_outputs
from lightning_quantdebug.traces import tensors_of


class Teacher:
    """The FP32 network beside one that trains.

    Args:
        session: The instrumentation that training steps run in.
        weight: Weight of the divergence in the loss.
        tensors: Parameters and buffers of the FP32 network by name, as in :func:`copies_of`.

    Attributes:
        refusal: Why there is nothing to distil, ``""`` if there is: no output is a set of classes, or no module that a
            step calls returns it. What only a step can tell is known after the first.
    """

    def __init__(self, session: Instrumentation, weight: float, tensors: Mapping[str, Tensor]) -> None:
        """Find the logits; the module that returns them is found in the first step."""
        self.session = session
        self.weight = weight
        self.tensors = dict(tensors)
        found = [output for output in network_outputs(session) if output.class_axis is not None]
        logits = [output for output in found if not output.is_probability]
        self.refusal = "" if logits else "no output of the network is treated as the logits of classes"
        self._output = logits[0] if logits else None
        self._owner: nn.Module | None = None
        self._path = ""

    def __call__(self, step: Callable[[], Any]) -> Any:
        """Run a training step and add the divergence to its loss."""
        if self._output is None or self.refusal:
            return step()
        logits: list[Tensor] = []
        calls: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any], Any]] = []

        def trace(name: str, result: Any) -> None:
            if self._output is not None and name == self._output.name and isinstance(result, Tensor):
                logits.append(result)

        def note(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            calls.append((module, args, kwargs, result))

        watched = self.session.root.modules() if self._owner is None else [self._owner]
        hooks = [module.register_forward_hook(note, with_kwargs=True) for module in watched]
        try:
            with self.session.traced(trace):
                outcome = step()
        finally:
            for hook in hooks:
                hook.remove()
        call = self._find(calls, logits)
        if call is None:
            return outcome
        return self._with_divergence(outcome, call, logits[-1])

    def _find(self, calls: list[Any], logits: list[Tensor]) -> Any:
        """The outermost call that returned the logits; it returned last."""
        found = logits[-1] if logits else None
        returned = [call for call in calls if any(item is found for item in tensors_of(call[3]))]
        if not returned:
            if self._owner is None:
                self.refusal = "no module that the training step calls returns the logits"
            return None
        if self._owner is None:
            self._owner = returned[-1][0]
            paths = {id(module): path for path, module in self.session.root.named_modules()}
            self._path = paths[id(self._owner)]
        return returned[-1]

    def _with_divergence(self, outcome: Any, call: Any, logits: Tensor) -> Any:
        """The step's outcome with the divergence in its loss."""
        module, args, kwargs, result = call
        position = next(index for index, item in enumerate(tensors_of(result)) if item is logits)
        prefix = f"{self._path}." if self._path else ""
        own = {name.removeprefix(prefix): value for name, value in self.tensors.items() if name.startswith(prefix)}
        with torch.no_grad(), eval_mode(module):
            taught = torch.func.functional_call(module, own, args, kwargs)
        teacher = list(tensors_of(taught))[position]
        assert self._output is not None
        divergence = self.weight * kl_divergence(teacher, logits, self._output.class_axis or 0)
        if isinstance(outcome, Mapping):
            return {**outcome, "loss": outcome["loss"] + divergence}
        return outcome if outcome is None else outcome + divergence


def kl_divergence(teacher: Tensor, student: Tensor, axis: int) -> Tensor:
    """Mean over positions of ``KL(softmax(teacher) || softmax(student))``, in nats, float32.

    Args:
        teacher: Logits, any shape.
        student: Logits, the same shape.
        axis: Axis of the classes.

    Examples:
        >>> kl_divergence(torch.tensor([[2.0, 0.0]]), torch.tensor([[2.0, 0.0]]), 1)
        tensor(0.)
    """
    expected, found = (F.log_softmax(logits.float(), axis) for logits in (teacher, student))
    return F.kl_div(found, expected, reduction="none", log_target=True).sum(axis).mean()


def copies_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers by name."""
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {name: tensor.detach().clone() for name, tensor in named}

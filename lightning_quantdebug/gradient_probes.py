"""A run of a network with probes in it: what gradients say of the errors of its quantizers, place by place.

A probe is a node of autograd's graph that lets a tensor pass and, on the way back, takes the inner product of the
gradient there with the error that a quantizer would make. It sits at the quantized tensor itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_quantdebug.errors import EstimateError
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.interception import OpKey
from lightning_quantdebug.layers import Call, Layer, Tap
from lightning_quantdebug.network_outputs import Output
from lightning_quantdebug.operations import (
    Category,
    argument,
    category_of,
    put_argument,
    tensors_in,
    value_at,
    with_argument,
)
from lightning_quantdebug.quantizer import Quantizer
from lightning_quantdebug.target import Kind, Mode


class Probed:
    """A run that was made with probes in it.

    Args:
        wanted: The outputs by name.
        sequence_first: See :func:`batch_axis`.

    Attributes:
        result: What the run returned.
        outputs: The outputs by name, with their graphs.
    """

    def __init__(self, wanted: dict[str, Output], sequence_first: bool) -> None:
        """Nothing ran yet."""
        self._sequence_first = sequence_first
        self._mask: Tensor | None = None
        self.result: Any = None
        self.outputs: dict[str, Tensor] = {}
        self.watch = _LossWatch()
        self._wanted = wanted
        self._anchor = torch.zeros((), requires_grad=True)
        self._values: dict[str, list[Tensor]] = defaultdict(list)
        self._is_summed: set[str] = set()

    @property
    def samples(self) -> int:
        """Number of samples: the rows of the first output."""
        first = next(iter(self.outputs.values()))
        return first.shape[0] if first.ndim else 1

    @property
    def loss(self) -> Tensor | None:
        """The task's loss: what the step returns, else the last loss that it computed."""
        returned = self.result.get("loss") if isinstance(self.result, dict) else self.result
        is_loss = isinstance(returned, Tensor) and returned.numel() == 1 and returned.requires_grad
        return returned if is_loss else self.watch.last

    def check(self) -> None:
        """Raise unless there is something to differentiate."""
        if not self.outputs or not all(y.requires_grad for y in self.outputs.values()):
            raise EstimateError(
                "The network's output has no gradient, as `validation_step` or the network itself forbids it "
                "(`torch.no_grad`, `detach`), so that nothing can be estimated. Use analysis='exhaustive'."
            )

    def trace(self, name: str, result: Any) -> None:
        """Keep the outputs."""
        if name in self._wanted:
            found = next((tensor for _, tensor in tensors_in((result,), {}) if tensor.is_floating_point()), None)
            if found is not None:
                self.outputs[name] = found

    # Probes.

    def activation_probe(self, quantizer: Quantizer) -> Callable[[Tensor], Tensor]:
        """Lets an activation pass, and asks in backward what its error would do."""

        def probe(x: Tensor) -> Tensor:
            kept, mask = x.detach(), self._mask
            self._mask = None

            def error() -> list[Tensor]:
                rounded = quantizer.quantized(kept) - kept
                return [rounded if mask is None else rounded * mask]

            return self._attached(quantizer.name, [x], error)[0]

        return probe

    def join_tap(self, call: Call) -> None:
        """Note which parts of what is joined have passed their quantizer already: these are on the grid of the result.

        Everything that has passed one needs gradients.
        """
        args, kwargs = call.args, call.kwargs
        for slot, tensor in tensors_in(args, kwargs):
            fresh = torch.zeros_like(tensor) if tensor.requires_grad else torch.ones_like(tensor)
            args, kwargs = with_argument(args, kwargs, slot, fresh.detach())
        self._mask = call.func(*args, **kwargs)

    def weight_tap(self, errors: Sequence[WeightError]) -> Tap:
        """Lets the result of a layer pass, and asks in backward what the error of its weights would do to it."""

        def tap(call: Call) -> Any:
            is_tensor = isinstance(call.result, Tensor)
            results = [call.result] if is_tensor else list(call.result)
            indices = [i for i, item in enumerate(results) if isinstance(item, Tensor) and item.is_floating_point()]
            for error in errors:
                kept = [results[index].detach() for index in indices]

                def of_result(error: WeightError = error, kept: list[Tensor] = kept) -> list[Tensor]:
                    wrong = error.result(call)
                    wrong_tensors = [wrong] if isinstance(wrong, Tensor) else [wrong[index] for index in indices]
                    return [there - here for there, here in zip(wrong_tensors, kept, strict=True)]

                passed = self._attached(error.name, [results[index] for index in indices], of_result)
                for index, tensor in zip(indices, passed, strict=True):
                    results[index] = tensor
            if is_tensor:
                return results[0]
            return type(call.result)(results) if isinstance(call.result, (list, tuple)) else call.result

        return tap

    def _attached(self, name: str, tensors: list[Tensor], errors: Callable[[], list[Tensor]]) -> list[Tensor]:
        """The tensors with a node behind them that takes inner products of their gradients and errors."""
        cached: list[list[Tensor]] = []

        def sink(gradients: Sequence[Tensor | None]) -> None:
            if not cached:
                with torch.no_grad():
                    cached.append(errors())
            for gradient, error in zip(gradients, cached[0], strict=True):
                if gradient is not None:
                    self._take(name, gradient, error)

        return list(_Pass.apply(self._anchor, sink, *tensors))  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def _take(self, name: str, gradient: Tensor, error: Tensor) -> None:
        """Add the inner product of one tensor, sample by sample where that can be told."""
        axis = batch_axis(gradient.shape, self.samples, self._sequence_first)
        if axis is None:
            self._is_summed.add(name)
        rows = 1 if axis is None else self.samples
        g, e = (x.float().movedim(axis or 0, 0).reshape(rows, 1, -1) for x in (gradient, error))
        # One product of matrices a sample: nothing as large as the tensor is made.
        self._values[name].append(torch.bmm(g, e.transpose(1, 2)).reshape(rows))

    # Backward.

    def backward(self, vectors: Sequence[Tensor]) -> dict[str, float]:
        """Sum over the samples of the squared inner products, for random vectors at the outputs."""
        values = self._backward(list(self.outputs.values()), vectors)
        return {name: float(each.square().sum()) for name, each in values.items()}

    def backward_loss(self) -> dict[str, float]:
        """Change of the loss, to first order."""
        assert self.loss is not None
        values = self._backward([self.loss.reshape(())], [torch.ones_like(self.loss).reshape(())])
        return {name: float(each.sum()) for name, each in values.items()}

    def _backward(self, outputs: Sequence[Tensor], vectors: Sequence[Tensor]) -> dict[str, Tensor]:
        """Inner products of each quantizer, all its places added up."""
        self._values.clear()
        torch.autograd.grad(outputs, [self._anchor], vectors, retain_graph=True, allow_unused=True)
        return {name: self._added(name, parts) for name, parts in self._values.items()}

    def _added(self, name: str, parts: list[Tensor]) -> Tensor:
        """All places of one quantizer together: sample by sample, if each place tells its samples apart."""
        if name in self._is_summed:
            return torch.stack([part.sum() for part in parts]).sum().reshape(1)
        return torch.stack(parts).sum(0)


class _Pass(torch.autograd.Function):
    """Lets tensors pass, and shows their gradients to somebody."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, sink: Callable[..., None], *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors themselves; the anchor makes them need gradients."""
        ctx.sink = sink
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """The gradients themselves."""
        ctx.sink(gradients)
        return (None, None, *gradients)


class _LossWatch(TorchFunctionMode):
    """Notices losses, also those of criteria.

    Attributes:
        last: The last loss of one number that has a graph.
    """

    def __init__(self) -> None:
        super().__init__()
        self.last: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if category_of(func) is Category.LOSS and isinstance(result, Tensor) and result.numel() == 1:
            self.last = result if result.requires_grad else self.last
        return result


@dataclass(frozen=True, eq=False)
class WeightError:
    """The weight and bias that one layer has when its weight's quantizer is on."""

    name: str
    layer: Layer
    weight: Tensor
    bias: Tensor | None
    has_bias: bool

    def result(self, call: Call) -> Any:
        """What the layer would give with them."""
        args, kwargs = with_argument(call.args, call.kwargs, self.layer.weight_slot, self.weight)
        if self.has_bias:
            args, kwargs = put_argument(args, kwargs, 2, "bias", self.bias)
        return call.func(*args, **kwargs)


def weight_errors(session: Instrumentation, run: Callable[[], Any]) -> dict[OpKey, list[WeightError]]:
    """Quantized weight and bias of every layer that one run reaches."""
    found: dict[OpKey, list[WeightError]] = defaultdict(list)
    layers: dict[OpKey, list[Layer]] = defaultdict(list)
    for layer in session.layers:
        if layer.quantizer.is_calibrated:
            layers[layer.key].append(layer)

    def tap_of(several: list[Layer]) -> Tap:
        def tap(call: Call) -> None:
            for layer in several:
                folds = layer.fold is not None or layer.key in session.adjustments
                bias = argument(call.args, call.kwargs, 2, "bias") if folds else None
                weight = value_at(call.args, call.kwargs, layer.weight_slot)
                found[layer.key].append(WeightError(layer.quantizer.name, layer, weight.detach(), bias, folds))

        return tap

    with session.modes(Mode.QUANTIZE, kind=Kind.WEIGHT), session.tapped({k: tap_of(v) for k, v in layers.items()}):
        run()
    return {key: errors[: len(layers[key])] for key, errors in found.items()}


def batch_axis(shape: Sequence[int], samples: int, sequence_first: bool = False) -> int | None:
    """The axis of a tensor that holds the samples, ``None`` where that can not be told.

    Args:
        shape: Of the tensor.
        samples: Number of samples.
        sequence_first: Whether the network has tensors ``(L, N, E)``: only what has one row a sample is clear then.

    Returns:
        Axis 0 where it has as many entries as there are samples, or a multiple (windows or heads of one sample next to
        each other); axis 1 of what has the samples there.

    Examples:
        >>> batch_axis((8, 3, 5), 8), batch_axis((16, 5), 8), batch_axis((5, 8, 3), 8), batch_axis((5, 3), 8)
        (0, 0, 1, None)
        >>> batch_axis((8, 8, 5), 8, sequence_first=True), batch_axis((16, 5), 8, sequence_first=True)
        (None, None)
    """
    if not shape:
        return None
    at_first, at_second = shape[0] == samples, len(shape) == 3 and shape[1] == samples
    if at_first:
        return None if at_second and sequence_first else 0
    if at_second:
        return 1
    return None if sequence_first or shape[0] == 0 or shape[0] % samples else 0

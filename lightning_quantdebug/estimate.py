"""Predict what every quantizer alone would do, all at once, from a few gradients.

A quantizer changes its tensor ``z`` by an error ``e``, and to first order the output by ``J e`` with ``J`` the Jacobian
from ``z`` to the output. For a random vector ``r`` at the output the gradient at ``z`` is ``g = J^T r``, so that
``v = <g, e> = <r, J e>`` costs one inner product a quantizer and one backward pass for all of them:

- ``r`` standard normal: ``E[v^2] = |J e|^2``, the noise power of the output (Hutchinson 1990).
- ``r = sqrt(p) xi - p <sqrt(p), xi>`` with ``p`` the probabilities of the classes and ``xi`` standard normal has the
  covariance ``diag(p) - p p^T``, the Fisher information of the logits: ``E[v^2] / 2`` is the divergence of the classes
  to second order (Martens 2020, New Insights and Perspectives on the Natural Gradient Method, section 5).
- ``r`` the gradient of the task's own loss: ``v`` is the change of the loss to first order. It is signed and small, and
  means something on the samples that it was computed on alone; with the divergence added, which is the second order for
  a cross-entropy, it is right to that order.

``v`` is taken sample by sample where the samples of a tensor can be told apart, else for the batch: as ``r`` is drawn
for each sample anew, the square of the sum is right on average too, only noisier. Gradients are taken at the quantized
tensors themselves, inside the run, so that functional calls and reused modules count as modules do.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_quantdebug.errors import EstimateError
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.interception import OpKey
from lightning_quantdebug.layers import Call, Layer, Tap
from lightning_quantdebug.network_outputs import Output, network_outputs
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
from lightning_quantdebug.replay import Memo
from lightning_quantdebug.target import Kind, Mode


@dataclass(frozen=True)
class Estimate:
    """What one quantizer alone is predicted to do.

    Attributes:
        quantizer: Its name.
        noise: Noise power of the output over its signal power; of several outputs the mean.
        kl: Mean divergence of the output's classes, in nats; ``None`` where no output is classes.
        task_loss: Change of the task's loss, signed; ``None`` where the step has no loss.
        samples: Samples that were looked at.
    """

    quantizer: str
    noise: float
    kl: float | None
    task_loss: float | None
    samples: int

    @property
    def sqnr_db(self) -> float:
        """SQNR of the output in dB; infinite where there is no noise."""
        return math.inf if self.noise <= 0.0 else -10.0 * math.log10(self.noise)


class Estimator:
    """Looks at some batches, one forward and a few backward passes each.

    Args:
        session: Calibrated; modes, encodings and the network are as before after each batch.
        probes: Random vectors of each sort for a batch; the error falls with their square root. Each costs about two
            forward passes.
        seed: Of a generator of its own.

    Attributes:
        samples: Samples that were looked at.

    Examples:
        >>> from torch import nn
        >>> from lightning_quantdebug.instrument import instrument
        >>> model, batch = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), torch.randn(64, 8)
        >>> with instrument(model, batch, "w2a8") as q:
        ...     q.calibrate([batch])
        ...     q.set_mode("bypass")
        ...     estimator = Estimator(q)
        ...     _ = estimator.observe(lambda: model(batch))
        >>> worst = max(estimator.estimates().values(), key=lambda estimate: estimate.noise)
        >>> worst.quantizer in ("0.weight", "2.weight"), estimator.samples
        (True, 64)
    """

    def __init__(self, session: Instrumentation, probes: int = 2, seed: int = 0) -> None:
        """Nothing is seen yet."""
        self.samples = 0
        self._session = session
        self._probes = probes
        self._seed = seed
        self._outputs = {output.name: output for output in network_outputs(session)}
        self._weights: dict[OpKey, list[_WeightError]] = {}
        self._noise: dict[str, float] = defaultdict(float)
        self._kl: dict[str, float] = defaultdict(float)
        self._first: dict[str, float] = defaultdict(float)
        self._has_classes = any(output.class_axis is not None for output in self._outputs.values())
        self._has_loss = True
        self._sequence_first = is_sequence_first(session)
        self._joins = _shared_joins(session)

    def observe(self, run: Callable[[], Any]) -> Any:
        """Run the network on one batch, and look at what gradients say of each quantizer.

        Args:
            run: Runs it once; it must not forbid gradients. What it returned is returned.

        Raises:
            EstimateError: If the output has no gradient.
        """
        layers = {layer.key for layer in self._session.layers if layer.quantizer.is_calibrated}
        if not layers <= self._weights.keys():
            with torch.no_grad():
                self._weights = {**_weight_errors(self._session, run), **self._weights}
        generator = torch.Generator().manual_seed(self._seed + self.samples)
        with self._probed(run) as probed:
            samples = probed.samples
            for _ in range(self._probes):
                squares = probed.backward([_over_signal(y, generator) for y in probed.outputs.values()])
                _add(self._noise, squares, samples / (self._probes * len(probed.outputs)))
                if self._has_classes:
                    fisher = [self._fisher(name, y, generator) for name, y in probed.outputs.items()]
                    _add(self._kl, probed.backward(fisher), 0.5 / self._probes)
            if probed.loss is None:
                self._has_loss = False
            else:
                _add(self._first, probed.backward_loss(), samples)
            self.samples += samples
            return probed.result

    def estimates(self) -> dict[str, Estimate]:
        """The estimates by the quantizers' names; of those that no batch has reached there is none.

        Raises:
            EstimateError: If no batch was looked at.
        """
        if not self.samples:
            raise EstimateError("Nothing can be estimated before a batch was looked at: call `observe` first.")
        found = {}
        for name in self._session.quantizers:
            if name not in self._noise:
                continue
            kl = self._kl[name] / self.samples if self._has_classes else None
            first = self._first[name] / self.samples + (kl or 0.0) if self._has_loss else None
            found[name] = Estimate(name, self._noise[name] / self.samples, kl, first, self.samples)
        return found

    def _fisher(self, name: str, y: Tensor, generator: torch.Generator) -> Tensor:
        """A random vector whose covariance is the Fisher information of the classes; 0 where there are none."""
        output = self._outputs[name]
        if output.class_axis is None:
            return torch.zeros_like(y)
        count = sum(other.class_axis is not None for other in self._outputs.values())
        positions = y.numel() // (y.shape[0] * y.shape[output.class_axis]) if y.ndim > 1 else 1
        return fisher_vector(y.detach(), output, generator) / math.sqrt(count * max(1, positions))

    @contextmanager
    def _probed(self, run: Callable[[], Any]) -> Iterator[_Probed]:
        """One run whose quantizers' tensors can be asked for gradients while the block runs."""
        session, assembled = self._session, _Probed(self._outputs, self._sequence_first)
        activations = [quantizer for quantizer in session.select(kind=Kind.ACTIVATION) if quantizer.is_calibrated]
        taps: dict[OpKey, Tap] = {key: assembled.weight_tap(errors) for key, errors in self._weights.items()}
        taps |= dict.fromkeys(self._joins, assembled.join_tap)
        with ExitStack() as stack:
            for parameter in session.root.parameters():
                if parameter.requires_grad:
                    stack.callback(parameter.requires_grad_, True)
                    parameter.requires_grad_(False)
            stack.enter_context(session.reference())
            for quantizer in activations:
                stack.callback(setattr, quantizer, "probe", None)
                quantizer.probe = assembled.activation_probe(quantizer)
                quantizer.mode = Mode.OBSERVE
            with session.tapped(taps), session.traced(assembled.trace), session.memoized(Memo()), assembled.watch:
                assembled.result = run()
            assembled.check()
            yield assembled


class _Probed:
    """A run that was made with probes in it.

    Attributes:
        result: What the run returned.
        outputs: The outputs by name, with their graphs.
    """

    def __init__(self, wanted: dict[str, Output], sequence_first: bool) -> None:
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

    def weight_tap(self, errors: Sequence[_WeightError]) -> Tap:
        """Lets the result of a layer pass, and asks in backward what the error of its weights would do to it."""

        def tap(call: Call) -> Any:
            is_tensor = isinstance(call.result, Tensor)
            results = [call.result] if is_tensor else list(call.result)
            indices = [i for i, item in enumerate(results) if isinstance(item, Tensor) and item.is_floating_point()]
            for error in errors:
                kept = [results[index].detach() for index in indices]

                def of_result(error: _WeightError = error, kept: list[Tensor] = kept) -> list[Tensor]:
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
class _WeightError:
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


def _weight_errors(session: Instrumentation, run: Callable[[], Any]) -> dict[OpKey, list[_WeightError]]:
    """Quantized weight and bias of every layer that one run reaches."""
    found: dict[OpKey, list[_WeightError]] = defaultdict(list)
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
                found[layer.key].append(_WeightError(layer.quantizer.name, layer, weight.detach(), bias, folds))

        return tap

    with session.modes(Mode.QUANTIZE, kind=Kind.WEIGHT), session.tapped({k: tap_of(v) for k, v in layers.items()}):
        run()
    return {key: errors[: len(layers[key])] for key, errors in found.items()}


def _shared_joins(session: Instrumentation) -> set[OpKey]:
    """Joins (concatenations) whose operands have the quantizer of the result."""
    shared = session.topology.shared_keys()
    joins = {shared[operation.key] for operation in session.topology if operation.category is Category.JOIN}
    sites = [site for site in session.plan.sites if site.kind is Kind.ACTIVATION and len(site.places) > 1]
    return {spot.key for site in sites for spot in site.places if spot.key in joins and spot.slot is None}


def is_sequence_first(session: Instrumentation) -> bool:
    """Whether some tensors have their samples at axis 1, so that rows of others can not be told to be samples."""
    outputs = session.topology.output_operations()
    samples = {value.shape[0] for operation in outputs for value in operation.outputs if value.shape}
    shapes = {value.shape for operation in session.topology for value in operation.outputs if len(value.shape) == 3}
    by_shape = any(shape[1] in samples and shape[0] not in samples for shape in shapes)
    return by_shape or any(getattr(module, "batch_first", True) is False for module in session.root.modules())


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


def fisher_vector(y: Tensor, output: Output, generator: torch.Generator) -> Tensor:
    """A random vector with the Fisher information of the classes as its covariance.

    Args:
        y: Logits, log-probabilities or probabilities, any shape.
        output: Says which, and which axis the classes have.
        generator: Draws it.

    Returns:
        Of the shape and dtype of ``y``.
    """
    assert output.class_axis is not None
    xi = _normal(y, generator)
    if output.is_probability:
        return xi / y.clamp(min=torch.finfo(torch.float32).eps).sqrt()
    p = y.float().softmax(output.class_axis)
    root = p.sqrt()
    return (root * xi - p * (root * xi).sum(output.class_axis, keepdim=True)).to(y.dtype)


def _over_signal(y: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers over the root of the whole signal, so that noise comes out as a share of it."""
    signal = float(y.detach().double().square().sum())
    return _normal(y, generator) / math.sqrt(signal) if signal > 0 else _normal(y, generator)


def _normal(y: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers in the form of ``y``."""
    return torch.randn(y.shape, generator=generator).to(y)


def _add(sums: dict[str, float], values: dict[str, float], factor: float) -> None:
    """Add values times a factor."""
    for name, value in values.items():
        sums[name] += value * factor

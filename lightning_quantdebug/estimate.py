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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_quantdebug.errors import EstimateError
from lightning_quantdebug.gradient_probes import Probed, WeightError, weight_errors
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.interception import OpKey
from lightning_quantdebug.layers import Tap
from lightning_quantdebug.network_outputs import Output, network_outputs
from lightning_quantdebug.operations import Category
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
        self._weights: dict[OpKey, list[WeightError]] = {}
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
                self._weights = {**weight_errors(self._session, run), **self._weights}
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
    def _probed(self, run: Callable[[], Any]) -> Iterator[Probed]:
        """One run whose quantizers' tensors can be asked for gradients while the block runs."""
        session, assembled = self._session, Probed(self._outputs, self._sequence_first)
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

"""How far quantizers move what the network returns: output SQNR, and the divergence of its classes.

A single quantizer at 8 bits moves a score by less than the noise of a few thousand samples. How far it moves the output
itself is known from a few dozen: of a regression or an embedding the noise power, of classes the Kullback-Leibler
divergence ``KL(p || q)`` of the quantized distribution ``q`` from that of FP32, which weighs every logit by what it
means for the prediction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.network_outputs import Output, network_outputs
from lightning_quantdebug.operations import tensors_in


@dataclass(frozen=True)
class BatchNoise:
    """What quantizers did to the outputs of one batch.

    Attributes:
        samples: Number of samples.
        signal: Sum of squares of each output in FP32.
        noise: Sum of squared differences of each output.
        kl: Sum over the samples of the divergence of the classes, in nats; ``None`` where no output is classes.
        damage: Of each sample, what it adds to the ranking: its divergence, else its noise over the mean signal.
    """

    samples: int
    signal: tuple[float, ...]
    noise: tuple[float, ...]
    kl: float | None
    damage: tuple[float, ...]


@dataclass
class NoiseSums:
    """The noise of any number of batches.

    Attributes:
        batches: What each batch was like: mean damage and number of samples.
        each: The damage of each sample, where ``keeps_samples`` says so.
    """

    keeps_samples: bool = False
    each: list[float] = field(default_factory=list)
    samples: int = 0
    signal: list[float] = field(default_factory=list)
    noise: list[float] = field(default_factory=list)
    kl: float | None = None
    batches: list[tuple[float, int]] = field(default_factory=list)
    _damage: float = 0.0
    _square: float = 0.0

    def add(self, batch: BatchNoise) -> None:
        """Take in one more batch."""
        first = not self.batches
        self.samples += batch.samples
        self.signal = [*batch.signal] if first else [a + b for a, b in zip(self.signal, batch.signal, strict=True)]
        self.noise = [*batch.noise] if first else [a + b for a, b in zip(self.noise, batch.noise, strict=True)]
        if batch.kl is not None:
            self.kl = (self.kl or 0.0) + batch.kl
        if self.keeps_samples:
            self.each += batch.damage
        self._damage += math.fsum(batch.damage)
        self._square += math.fsum(value**2 for value in batch.damage)
        self.batches.append((math.fsum(batch.damage) / max(1, batch.samples), batch.samples))

    def merged(self, other: NoiseSums) -> NoiseSums:
        """The sums over the batches of both."""
        if not (self.batches and other.batches):
            return self if self.batches else other
        kl = None if self.kl is None or other.kl is None else self.kl + other.kl
        return NoiseSums(
            self.keeps_samples,
            [*self.each, *other.each],
            self.samples + other.samples,
            [a + b for a, b in zip(self.signal, other.signal, strict=True)],
            [a + b for a, b in zip(self.noise, other.noise, strict=True)],
            kl,
            [*self.batches, *other.batches],
            self._damage + other._damage,
            self._square + other._square,
        )

    @property
    def mean_kl(self) -> float | None:
        """Mean divergence of the classes, in nats."""
        return None if self.kl is None or not self.samples else self.kl / self.samples

    @property
    def ratio(self) -> float:
        """Noise power over signal power, the mean over the outputs."""
        ratios = [_ratio(noise, signal) for noise, signal in zip(self.noise, self.signal, strict=True)]
        return math.fsum(ratios) / len(ratios) if ratios else 0.0

    @property
    def sqnr_db(self) -> float:
        """SQNR of the output in dB; of several outputs, of their mean ratio. Infinite where nothing differs."""
        ratio = self.ratio
        if math.isnan(ratio):
            return math.nan
        return math.inf if ratio == 0.0 else -math.inf if math.isinf(ratio) else -10.0 * math.log10(ratio)

    @property
    def damage(self) -> float:
        """Mean damage of a sample, for the ranking."""
        return self._damage / self.samples if self.samples else 0.0

    @property
    def standard_error(self) -> float:
        """Standard error of :attr:`damage`; infinite with fewer than two samples."""
        if self.samples < 2:
            return math.inf
        variance = (self._square - self.samples * self.damage**2) / (self.samples - 1)
        return math.sqrt(max(0.0, variance) / self.samples) if math.isfinite(variance) else math.inf


def _ratio(noise: float, signal: float) -> float:
    """Noise over signal; 0 where there is no noise, infinite where there is nothing else."""
    if noise == 0.0:
        return 0.0
    return noise / signal if signal > 0.0 else math.inf


class OutputMeter:
    """Compares the outputs of a batch with those of FP32.

    Args:
        session: Runs the network.

    Examples:
        >>> from torch import nn
        >>> from lightning_quantdebug.instrument import instrument
        >>> model, batch = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(64, 4)
        >>> with torch.no_grad(), instrument(model, batch, "w4a8") as q:
        ...     q.calibrate([batch])
        ...     meter = OutputMeter(q)
        ...     with q.modes("bypass"):
        ...         _ = meter.reference(lambda: model(batch))
        ...     with q.modes("quantize", kind="weight"):
        ...         _, noise = meter.compare(lambda: model(batch))
        >>> noise.samples, 0.0 < noise.noise[0] < 0.1 * noise.signal[0]
        (64, True)
    """

    def __init__(self, session: Instrumentation) -> None:
        """Find out what the network returns."""
        self._session = session
        self._outputs = {output.name: output for output in network_outputs(session)}
        self._exact: dict[str, Tensor] = {}

    @property
    def has_classes(self) -> bool:
        """Whether an output is classes, so that a divergence can be told."""
        return any(output.class_axis is not None for output in self._outputs.values())

    def reference(self, run: Callable[[], Any]) -> Any:
        """Run the network and keep its outputs; what ``run`` returned is returned."""
        self._exact = {}

        def keep(name: str, result: Any) -> None:
            tensor = self._tensor(name, result)
            if tensor is not None:
                self._exact[name] = tensor.detach().clone()

        with self._session.traced(keep):
            return run()

    def kept(self) -> dict[str, Tensor]:
        """The outputs of :meth:`reference`, for :meth:`restore` before a later run on the same batch."""
        return dict(self._exact)

    def restore(self, exact: dict[str, Tensor]) -> None:
        """Compare with the outputs of an earlier reference."""
        self._exact = dict(exact)

    def compare(self, run: Callable[[], Any]) -> tuple[Any, BatchNoise]:
        """Run the network and say how far its outputs are from those of the reference.

        An output that is missing now, or has another shape, counts as lost: its noise is as great as its signal.
        """
        found: dict[str, _Difference] = {}

        def measure(name: str, result: Any) -> None:
            tensor = self._tensor(name, result)
            if tensor is not None and name in self._exact:
                found[name] = _difference(self._exact[name], tensor.detach(), self._outputs[name])

        with self._session.traced(measure):
            result = run()
        differences = [found.get(name) or _lost(exact) for name, exact in self._exact.items()]
        return result, _joined(differences)

    def _tensor(self, name: str, result: Any) -> Tensor | None:
        """The first real tensor of an output."""
        if name not in self._outputs:
            return None
        return next((tensor for _, tensor in tensors_in((result,), {}) if tensor.is_floating_point()), None)


@dataclass(frozen=True)
class _Difference:
    """What became of one output of one batch."""

    signal: float
    noise: float
    noise_of_samples: Tensor
    kl: Tensor | None


def _difference(exact: Tensor, quantized: Tensor, output: Output) -> _Difference:
    """Signal and noise of one output, and the divergence of its classes."""
    if exact.shape != quantized.shape:
        return _lost(exact)
    exact, quantized = exact.double(), quantized.double()
    noise = (quantized - exact).square()
    rows = noise.reshape(exact.shape[0], -1).sum(1) if exact.ndim else noise.reshape(1)
    kl = None if output.class_axis is None else divergence(exact, quantized, output.class_axis, output.is_probability)
    return _Difference(float(exact.square().sum()), float(noise.sum()), rows, kl)


def _lost(exact: Tensor) -> _Difference:
    """An output of which nothing is left."""
    square = exact.double().square()
    rows = square.reshape(exact.shape[0], -1).sum(1) if exact.ndim else square.reshape(1)
    return _Difference(float(square.sum()), float(square.sum()), rows, None)


def divergence(exact: Tensor, quantized: Tensor, class_axis: int, is_probability: bool = False) -> Tensor:
    """Kullback-Leibler divergence of each sample's classes from those of FP32.

    Args:
        exact: Logits (or log-probabilities, or probabilities) in FP32, shape ``(N, *)``.
        quantized: The same with quantizers on.
        class_axis: Axis of the classes.
        is_probability: Whether the values are probabilities.

    Returns:
        Nats, float64, shape ``(N,)``; of several positions of a sample, their mean. Never below 0.

    Examples:
        >>> p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
        >>> [round(float(divergence(a, b, 1, True)), 4) for a, b in ((p, p), (p, q))]
        [0.0, 0.1438]
    """
    logs = [_log_probabilities(values.double(), class_axis, is_probability) for values in (exact, quantized)]
    probabilities = logs[0].exp()
    terms = torch.where(probabilities > 0, probabilities * (logs[0] - logs[1]), 0.0).sum(class_axis)
    if exact.ndim == 1:
        return terms.reshape(1).clamp(min=0.0)
    return terms.reshape(exact.shape[0], -1).mean(1).clamp(min=0.0)


def _log_probabilities(values: Tensor, class_axis: int, is_probability: bool) -> Tensor:
    """Logarithms of the probabilities of the classes."""
    if not is_probability:
        return values.log_softmax(class_axis)
    # A probability that rounding has turned into 0 shall cost much, but not everything.
    smallest = torch.finfo(torch.float32).tiny
    return (values.clamp(min=smallest) / values.clamp(min=smallest).sum(class_axis, keepdim=True)).log()


def _joined(differences: Sequence[_Difference]) -> BatchNoise:
    """The outputs of one batch together; samples are the rows of the output that has most."""
    samples = max((len(each.noise_of_samples) for each in differences), default=0)
    divergences = [each.kl for each in differences if each.kl is not None]
    kl = None
    if divergences:
        kl = math.fsum(float(each.sum()) * samples / len(each) for each in divergences) / len(divergences)
        rows = divergences
    else:
        rows = [
            each.noise_of_samples * len(each.noise_of_samples) / max(each.signal, torch.finfo(torch.float64).tiny)
            for each in differences
        ]
    return BatchNoise(
        samples,
        tuple(each.signal for each in differences),
        tuple(each.noise for each in differences),
        kl,
        _mean_of_rows(rows, samples),
    )


def _mean_of_rows(rows: Sequence[Tensor], samples: int) -> tuple[float, ...]:
    """Mean over the outputs, sample by sample; an output with other rows than samples gives each its mean."""
    if not rows:
        return ()
    spread = [row if len(row) == samples else row.mean().expand(samples) for row in rows]
    return tuple(torch.stack(spread).mean(0).nan_to_num(math.inf, math.inf).tolist())

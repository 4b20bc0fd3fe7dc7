"""The mean error of layers: how far quantization moves the mean of each output channel, batch after batch.

Only sums over batch, positions and tokens are kept, in float64, so that nothing grows with the data. FP32 and quantized
network run on the same batch, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.interception import OpKey
from lightning_quantdebug.layers import Call, Layer, Tap
from lightning_quantdebug.operations import operation_name, positions_of
from lightning_quantdebug.target import Mode

Run = Callable[[], Any]


@dataclass(frozen=True)
class ChannelSums:
    """Sums over everything but the channels of results, float64.

    Attributes:
        values: Sum of each channel, ``(C,)``.
        squares: Sum of squares over all channels, ``()``.
        count: Elements of one channel.
    """

    values: Tensor
    squares: Tensor
    count: int

    @property
    def mean(self) -> Tensor:
        """Mean of each channel, ``(C,)``."""
        return self.values / self.count

    def plus(self, others: Iterable[ChannelSums]) -> ChannelSums:
        """The sums over these and other results."""
        total = self
        for other in others:
            total = ChannelSums(total.values + other.values, total.squares + other.squares, total.count + other.count)
        return total

    def is_like(self, other: ChannelSums) -> bool:
        """Whether both are of results of one size."""
        return self.count == other.count and self.values.shape == other.values.shape


Shown = dict[OpKey, list[ChannelSums]]


@dataclass
class BiasError:
    """One bias, the layers that have it, and what was measured of them.

    Attributes:
        layers: More than one where a module is called several times.
        batches: Numbers of the batches that count.
        exact: Of the FP32 results.
        rounded: Of the quantized results with everything ahead corrected.
        before: Of the quantized results as they were.
        after: Of the quantized results with all corrections.
        non_finite: How many batches were left out as they gave NaN or infinity.
        unmatched: How many were left out as FP32 and quantized network ran the layer differently.
    """

    layers: list[Layer]
    batches: set[int] = field(default_factory=set)
    exact: ChannelSums | None = None
    rounded: ChannelSums | None = None
    before: ChannelSums | None = None
    after: ChannelSums | None = None
    non_finite: int = 0
    unmatched: int = 0

    @property
    def name(self) -> str:
        """The name of the first layer."""
        return self.layers[0].name

    @property
    def correction(self) -> Tensor:
        """``E[y_hat - y]`` of each channel, ``(C,)``."""
        assert self.exact is not None
        assert self.rounded is not None
        return self.rounded.mean - self.exact.mean

    def error_share(self, quantized: ChannelSums | None) -> float | None:
        """Root mean square over channels of the mean error, relative to that of the FP32 result; ``None``: unknown."""
        exact = self.exact
        if exact is None or quantized is None or quantized.count != exact.count or not bool(exact.squares > 0):
            return None
        mean_square = exact.squares / (exact.count * exact.values.numel())
        return float(((quantized.mean - exact.mean).square().mean() / mean_square).sqrt())

    def take_in(self, index: int, exact: Shown, rounded: Shown, before: Shown) -> None:
        """Add batch ``index``, unless it is of no use."""
        right, wrong = self.of(exact), self.of(rounded)
        if not any(sums.count for sums in (*right, *wrong)):
            return
        if len(right) != len(wrong) or not all(map(ChannelSums.is_like, right, wrong)):
            self.unmatched += 1
            return
        if not all(bool(sums.squares.isfinite()) for sums in (*right, *wrong)):
            self.non_finite += 1
            return
        self.batches.add(index)
        self.exact = _added(self.exact, right)
        self.rounded = _added(self.rounded, wrong)
        self.before = _added(self.before, self.of(before))

    def take_in_corrected(self, index: int, after: Shown) -> None:
        """Add batch ``index`` as it is with all corrections."""
        if index in self.batches:
            self.after = _added(self.after, self.of(after))

    def of(self, shown: Shown) -> list[ChannelSums]:
        """The sums of all layers of the bias."""
        return [sums for layer in self.layers for sums in shown.get(layer.key, ())]


def measure(session: Instrumentation, biases: list[BiasError], run: Run, index: int) -> None:
    """Take one batch into account: in FP32, quantized as it is, and quantized with each layer put right.

    Args:
        session: The network, calibrated.
        biases: What is measured.
        run: Runs the network on the batch.
        index: The number of the batch.
    """
    with session.reference():
        exact = shown(session, biases, run)
    rounded: Shown = {}
    taps = {
        layer.key: _keep_and_correct(rounded, layer.key, exact.get(layer.key, ()))
        for bias in biases
        for layer in bias.layers
    }
    with session.modes(Mode.QUANTIZE):
        before = shown(session, biases, run)
        with session.tapped(taps):
            run()
    for bias in biases:
        bias.take_in(index, exact, rounded, before)


def measure_corrected(session: Instrumentation, biases: list[BiasError], run: Run, index: int) -> None:
    """Take one batch into account that runs quantized with all corrections; arguments as :func:`measure` has them."""
    with session.modes(Mode.QUANTIZE):
        after = shown(session, biases, run)
    for bias in biases:
        bias.take_in_corrected(index, after)


def shown(session: Instrumentation, biases: Iterable[BiasError], run: Run) -> Shown:
    """The sums of every run of each layer while the network runs once."""
    found: Shown = {}
    with session.tapped({layer.key: _keep(found, layer.key) for bias in biases for layer in bias.layers}):
        run()
    return found


def channel_sums(call: Call) -> ChannelSums:
    """The sums of the result of a convolution or linear layer, whose channels stand ahead of the positions or last."""
    result = call.result.detach()
    channels = _channel_axis(call) % result.ndim
    others = [axis for axis in range(result.ndim) if axis != channels]
    values = result.sum(others, dtype=torch.float64) if others else result.double()
    squares = torch.linalg.vector_norm(result, dtype=torch.float64).square()
    return ChannelSums(values, squares, result.numel() // max(1, values.numel()))


def _channel_axis(call: Call) -> int:
    """The axis of the channels of a layer's result, counted from the back, so that a batch axis may be missing."""
    return -1 - positions_of(operation_name(call.func))


def _keep(found: Shown, key: OpKey) -> Tap:
    """A tap that keeps the sums of every run of a layer."""

    def tap(call: Call) -> None:
        found.setdefault(key, []).append(channel_sums(call))

    return tap


def _keep_and_correct(found: Shown, key: OpKey, exact: Sequence[ChannelSums]) -> Tap:
    """A tap that keeps the sums as they are, and gives the result the mean that it has in FP32."""

    def tap(call: Call) -> Tensor | None:
        runs = found.setdefault(key, [])
        runs.append(channel_sums(call))
        if len(runs) > len(exact) or not runs[-1].is_like(exact[len(runs) - 1]):
            return None
        error = runs[-1].mean - exact[len(runs) - 1].mean
        if not bool(error.isfinite().all()):
            return None
        shape = [1] * call.result.ndim
        shape[_channel_axis(call)] = -1
        corrected: Tensor = call.result - error.view(shape).to(call.result.dtype)
        return corrected

    return tap


def _added(total: ChannelSums | None, more: list[ChannelSums]) -> ChannelSums | None:
    """The sums over earlier and later results."""
    if not more:
        return total
    return more[0].plus(more[1:]) if total is None else total.plus(more)

"""What ails the weights: how much each possible cause costs at the output of each layer, in dB.

A cause is measured by taking it away. Each layer sees its FP32 input and runs with its weight as the target quantizes
it, and then with weights quantized as if one thing were healed: all input and output channels of one range, a clipped
range, rounding errors with random signs. What that gains in SQNR of the layer's output is what the cause costs, on one
scale for all layers, bit-widths and networks. The layers' errors are apart, as no layer gets an input that another has
spoilt, and a batch is run once, with nothing kept of it.

SQNR is that of the average channel: ``-10 * log10(mean over c of min(1, noise_c / signal_c))``. The next layer may make
a small channel as important as a large one (equalization lives on that), so that sums over all channels would hide a
lost one behind the largest; and a channel that is lost already can do no more harm.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_quantdebug.adjustment import Adjustment
from lightning_quantdebug.distribution import ChannelStatistics, range_ratios
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.interception import OpKey
from lightning_quantdebug.layers import Call, Layer, Runs, Tap
from lightning_quantdebug.operations import argument, positions_of, put_argument, value_at, with_argument
from lightning_quantdebug.quantizer import Quantizer
from lightning_quantdebug.range_setting import quantized_anew
from lightning_quantdebug.target import Granularity, RangeSetting

MOST_BATCHES = 4
"""Calibration batches that are looked at: gains are ratios of sums over thousands of outputs, and settle early."""

# As quantized now, and with one thing healed each.
_NOW, _EVEN, _CLIPPED, _RANDOM = "now", "even", "clipped", "random"


@dataclass(frozen=True)
class WeightSymptoms:
    """What was measured of one layer. Gains are in dB of the output's SQNR, 0 where nothing would be gained.

    Attributes:
        quantizer: Name of the weight's quantizer.
        bit_width: Its bits.
        sqnr_db: SQNR of the output's average channel with the weight quantized and everything else in FP32.
        even_gain: With every input and every output channel brought to one range.
        clipping_gain: With the range of least squared error.
        unbiased_gain: With the mean error of each output channel taken away.
        sign_gain: With random signs of the rounding errors, the mean errors taken away from both: above 0 the errors
            add up, because the inputs go together.
        output_ratio: Whole range over the median range of an output channel.
        input_ratio: Whole range over the median range of an input channel.
        narrowest: Output or input channel, whichever ratio is greater, with the least range that is not 0.
        peak: Greatest magnitude over the root mean square.
        dead: Output channels whose weights are all 0.
    """

    quantizer: str
    bit_width: int
    sqnr_db: float
    even_gain: float = 0.0
    clipping_gain: float = 0.0
    unbiased_gain: float = 0.0
    sign_gain: float = 0.0
    output_ratio: float = 1.0
    input_ratio: float = 1.0
    narrowest: int | None = None
    peak: float = 1.0
    dead: tuple[int, ...] = ()


def weight_symptoms(session: Instrumentation, runs: Runs) -> list[WeightSymptoms]:
    """Measure every layer with a quantized weight, in one run of each of the first batches.

    Args:
        session: With ranges set. Modes do not matter and stay as they are.
        runs: The calibration batches.

    Returns:
        The layers that ran, in order of execution; of one weight that several layers use, the worst.
    """
    measured: dict[OpKey, list[_Measured]] = defaultdict(list)
    for layer in session.layers:
        if layer.quantizer.is_calibrated:
            measured[layer.key].append(_Measured(layer, session.adjustments.get(layer.key, Adjustment())))

    def tap_of(layers: list[_Measured]) -> Tap:
        def tap(call: Call) -> None:
            for layer in layers:
                layer.observe(call)

        return tap

    taps = {key: tap_of(layers) for key, layers in measured.items()}

    def visit(run: Callable[[], Any], index: int) -> None:
        with session.reference(), session.tapped(taps):
            run()

    runs(visit, MOST_BATCHES)
    worst: dict[str, WeightSymptoms] = {}
    for each in (each for layers in measured.values() for each in layers if each.weight is not None):
        found = each.symptoms()
        known = worst.get(found.quantizer)
        if known is None or found.sqnr_db < known.sqnr_db:
            worst[found.quantizer] = found
    return list(worst.values())


class _Measured:
    """Signal and noise of one layer, summed over the batches."""

    def __init__(self, layer: Layer, adjustment: Adjustment) -> None:
        self.layer = layer
        self.adjustment = adjustment
        self.weight: Tensor | None = None
        self._variants: dict[str, Tensor] = {}
        self._axis = -1 - positions_of(layer.op)
        self._signal: Tensor | float = 0.0
        self._noise: dict[str, Tensor | float] = defaultdict(float)
        self._errors = {name: ChannelStatistics(self._axis) for name in (_NOW, _RANDOM)}

    def observe(self, call: Call) -> None:
        """Take in one run of the layer in FP32, and run it again with each form of the weight."""
        if self.weight is None:
            self.weight = value_at(call.args, call.kwargs, self.layer.weight_slot).detach().clone()
            self._variants = _variants(self.layer, self.weight, self.adjustment)
        exact = _finite(_first(call.result))
        self._signal = self._signal + channel_power(exact, self._axis)
        for name, weight in self._variants.items():
            args, kwargs = with_argument(call.args, call.kwargs, self.layer.weight_slot, weight)
            if self.adjustment.bias_correction is not None:
                bias = argument(args, kwargs, 2, "bias")
                correction = self.adjustment.bias_correction
                args, kwargs = put_argument(args, kwargs, 2, "bias", correction if bias is None else bias + correction)
            error = _finite(_first(call.func(*args, **kwargs))) - exact
            self._noise[name] = self._noise[name] + channel_power(error, self._axis)
            if name in self._errors:
                self._errors[name].observe(error)

    def symptoms(self) -> WeightSymptoms:
        """What the sums say."""
        assert self.weight is not None
        sqnr = {name: self._sqnr_db(noise) for name, noise in self._noise.items()}
        spread = {name: self._sqnr_db(_spread(errors)) for name, errors in self._errors.items()}
        gains = {name: found - sqnr[_NOW] for name, found in sqnr.items()}
        by_output, by_input = (_axis_ranges(self.weight, axis) for axis in _axes(self.layer, self.weight))
        ratios = [1.0 if found is None else _median_ratio(*found) for found in (by_output, by_input)]
        more_uneven = by_output if ratios[0] >= ratios[1] else by_input
        return WeightSymptoms(
            quantizer=self.layer.quantizer.name,
            bit_width=self.layer.quantizer.bit_width,
            sqnr_db=sqnr[_NOW],
            even_gain=gains.get(_EVEN, 0.0),
            clipping_gain=gains.get(_CLIPPED, 0.0),
            unbiased_gain=spread[_NOW] - sqnr[_NOW],
            sign_gain=spread[_RANDOM] - spread[_NOW],
            output_ratio=ratios[0],
            input_ratio=ratios[1],
            narrowest=None if more_uneven is None else _narrowest(*more_uneven),
            peak=_peak(self.weight),
            dead=() if by_output is None else _dead(*by_output),
        )

    def _sqnr_db(self, noise: Tensor | float) -> float:
        """SQNR of the average channel, channels without a signal left out."""
        assert isinstance(self._signal, Tensor)
        shares = (noise / self._signal)[self._signal > 0].clamp(max=1.0)
        return decibels(1.0, float(shares.mean())) if shares.numel() else 0.0


def channel_power(x: Tensor, axis: int) -> Tensor:
    """Sum of the squares of each channel.

    Examples:
        >>> channel_power(torch.tensor([[1.0, 3.0], [2.0, 4.0]]), -1)
        tensor([ 5., 25.])
    """
    return x.movedim(axis, 0).reshape(x.shape[axis], -1).square().sum(1)


def decibels(power: float, other: float) -> float:
    """``10 * log10(power / other)``, within 200 dB, so that what is exact stays a number."""
    if power <= 0.0 or other <= 0.0:
        return 0.0 if power <= 0.0 and other <= 0.0 else math.copysign(200.0, power - other)
    return max(-200.0, min(200.0, 10.0 * math.log10(power / other)))


def _first(result: Any) -> Tensor:
    """The result, or the first of several."""
    found = result if isinstance(result, Tensor) else result[0]
    assert isinstance(found, Tensor)
    return found.detach()


def _finite(x: Tensor) -> Tensor:
    """The values in float64, with 0 for what is not finite."""
    return x.double().nan_to_num(0.0, 0.0, 0.0)


def _variants(layer: Layer, weight: Tensor, adjustment: Adjustment) -> dict[str, Tensor]:
    """The weight as it is quantized now, and with one thing healed each."""
    quantizer, correction = layer.quantizer, adjustment.weight_correction
    found = {_NOW: quantizer.quantized(weight if correction is None else weight + correction)}
    axes = [axis for axis in _axes(layer, weight) if axis is not None]
    if axes and quantizer.spec.granularity is not Granularity.PER_GROUP and quantizer.factory is None:
        found[_EVEN] = _equalized(quantizer, weight, axes)
    if quantizer.spec.effective_range_setting is not RangeSetting.MSE and quantizer.factory is None:
        clipped = replace(quantizer.spec, range_setting=RangeSetting.MSE)
        found[_CLIPPED] = quantized_anew(weight, clipped, quantizer.channel_axis)
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(0, 2, weight.shape, generator=generator).mul_(2).sub_(1).to(weight)
    found[_RANDOM] = weight + (found[_NOW] - weight) * signs
    return found


def _equalized(quantizer: Quantizer, weight: Tensor, axes: Sequence[int]) -> Tensor:
    """The weight on the quantizer's kind of grid after the channels along each axis were brought to one magnitude."""
    even, factor = weight, torch.ones_like(weight)
    for axis in reversed(axes):
        others = tuple(other for other in range(weight.ndim) if other != axis)
        magnitude = even.abs().amax(others, keepdim=True)
        magnitude = magnitude.where(magnitude > 0, 1.0)
        even, factor = even / magnitude, factor * magnitude
    return quantized_anew(even, quantizer.spec, quantizer.channel_axis) * factor


def _axes(layer: Layer, weight: Tensor) -> tuple[int | None, int | None]:
    """Axes of the weight's output and input channels; ``None`` where there is no single one with several channels."""
    outputs = layer.channel_axis
    if outputs is None or weight.ndim < 2:
        return None, None
    inputs = 1 - outputs if outputs in (0, 1) and layer.groups == 1 else None
    return tuple(axis if axis is not None and weight.shape[axis] > 1 else None for axis in (outputs, inputs))  # type: ignore[return-value]  # two of them


def _axis_ranges(weight: Tensor, axis: int | None) -> tuple[Tensor, Tensor] | None:
    """Least and greatest weight of each channel along an axis."""
    if axis is None:
        return None
    rows = weight.movedim(axis, 0).flatten(1)
    return rows.amin(1), rows.amax(1)


def _median_ratio(low: Tensor, high: Tensor) -> float:
    """Whole range over that of the median channel, dead ones left out."""
    ratios = range_ratios(low, high, symmetric=True)
    alive = ratios[ratios.isfinite()]
    return float(alive.median()) if alive.numel() else 1.0


def _narrowest(low: Tensor, high: Tensor) -> int:
    """The channel with the least range that is not 0."""
    ratios = range_ratios(low, high, symmetric=True)
    return int(ratios.where(ratios.isfinite(), 0.0).argmax())


def _dead(low: Tensor, high: Tensor) -> tuple[int, ...]:
    """Channels whose weights are all 0."""
    return tuple(((low == 0) & (high == 0)).nonzero().flatten().tolist())


def _peak(weight: Tensor) -> float:
    """Greatest magnitude over the root mean square."""
    rms = weight.double().square().mean().sqrt().item()
    return float(weight.abs().max()) / rms if rms > 0 else 1.0


def _spread(errors: ChannelStatistics) -> Tensor:
    """Sum of the squared errors of each channel with its mean error taken away."""
    return (errors.variance * errors.count).nan_to_num()

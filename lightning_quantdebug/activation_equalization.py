"""Activation-aware equalization: move outlier channels of activations into weights, as far as that pays.

SmoothQuant (Xiao et al. 2023, arXiv:2211.10438, section 4 and equation 4) divides channel ``j`` of an activation by
``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)``, multiplies column ``j`` of the weights that read it by ``s_j`` and lets
the layer ahead, a LayerNorm, take up the division. ``alpha = 1`` makes all channels of the activation equally wide,
``alpha = 0`` all columns of the weights.

Here that is done for every class of channels (:mod:`.channel_groups`), whatever produces it. Where that is a layer with
a quantized weight, its rows get wider as the columns get narrower, and equation 11 of Nagel et al. 2019
(arXiv:1906.04721) takes the place of ``1 / max|W_j|``. With ``a`` the range of the activation, ``w`` that of the
columns and ``p`` that of the rows of a class:

    ``s = a^alpha * b^(1 - alpha)``, with ``b = sqrt(p / w)``, or ``1 / w`` where no quantized weight produces it,

divided by its geometric mean over the stage, as a common factor helps nothing. The exponent is found for each stage on
calibration data: that of least error of the layers' outputs, or no change.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_quantdebug.adjustment import Applied
from lightning_quantdebug.channel_groups import (
    FIXED,
    ChannelGroups,
    LayerChannels,
    effective_weights,
    find_channel_groups,
    magnitudes_of,
)
from lightning_quantdebug.encoding import Encoding, encoding_from_range
from lightning_quantdebug.equalization import LARGEST_LOG2_SCALE
from lightning_quantdebug.fake_quantize import fake_quantize
from lightning_quantdebug.function_check import adjust_exactly
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.interception import OpKey
from lightning_quantdebug.layers import Call, Layer, Runs, Tap
from lightning_quantdebug.observer import Observer
from lightning_quantdebug.operations import argument, positions_of, put_argument, value_at, with_argument
from lightning_quantdebug.range_setting import quantized_anew, range_from_observer
from lightning_quantdebug.target import QuantSpec

# Xiao et al. 2023 found 0.4 to 0.6 good for most networks and 0.75 where outliers are stronger.
EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Errors are measured on two batches. Of the 43 stages of a MobileNetV2 with random weights, half had errors on two
# batches of 4 that differed by less than 0.01 %, the worst by 8 %: less than 2 % is no gain to count on.
_WORTHWHILE = 0.98
_BATCHES = 2


def equalize_activations(session: Instrumentation, runs: Runs) -> Applied:
    """Choose the scales of all classes of channels from the ranges of activations and weights together.

    The error of a stage is the sum over its layers of ``|y_q - y|^2 / |y|^2``, with ``y`` the layer's FP32 output and
    ``y_q`` that with its input and its weight quantized as the target says; rows are compared in the units that they
    had before scaling, so that scaling itself is no gain. The FP32 outputs of the network are measured before and
    after; if they part, nothing is changed (see :func:`~lightning_quantdebug.function_check.adjust_exactly`).

    Args:
        session: The instrumented network; calibrated.
        runs: Goes over the calibration batches.

    Returns:
        The layers that were scaled, those that could not be and why, and the exponents.

    Examples:
        >>> from lightning_quantdebug.instrument import batch_runs, instrument
        >>> norm, batch = torch.nn.LayerNorm(8), torch.randn(64, 8)
        >>> _ = norm.weight.data[0].mul_(100)  # an outlier channel
        >>> model = torch.nn.Sequential(norm, torch.nn.Linear(8, 4)).eval()
        >>> with instrument(model, batch) as q:
        ...     q.calibrate([batch])
        ...     equalize_activations(q, batch_runs(q, [batch])).changed
        ('1',)
    """
    groups = find_channel_groups(session, runs)
    if groups.count == 0:
        return Applied(skipped=groups.left, note="no channels were found whose scale can change")
    ranges = _Ranges(groups, effective_weights(session, runs), _activation_ranges(session, runs, groups))
    unchanged = _errors(session, runs, groups, torch.ones(groups.count, dtype=torch.float64))
    best, exponents = unchanged, torch.full_like(unchanged, torch.nan)
    for exponent in EXPONENTS:
        error = _errors(session, runs, groups, ranges.scale(torch.full_like(unchanged, exponent)))
        better = error < best
        exponents[better], best = exponent, torch.where(better, error, best)
    # Stages that share a layer were judged with the same exponent in both; what does not hold together is given up.
    together = _errors(session, runs, groups, ranges.scale(exponents))
    exponents[~(together < unchanged * _WORTHWHILE)] = torch.nan
    changes = groups.adjustments(ranges.scale(exponents))
    if not changes:
        return Applied(skipped=groups.left, note="no exponent lowers the error of any layer's output by 2 %")
    changed = groups.names_of(changes)
    applied = Applied(changed, groups.left, _note(exponents, together, unchanged))
    return adjust_exactly(session, runs, changes, "activation-aware equalization", applied)


def _note(exponents: Tensor, together: Tensor, unchanged: Tensor) -> str:
    """What was chosen, in one sentence."""
    chosen = exponents.isfinite()
    counts = [(exponent, int((exponents == exponent).sum())) for exponent in EXPONENTS]
    parts = ", ".join(f"{exponent:g} in {count}" for exponent, count in counts if count)
    gain = 10 * float((unchanged[chosen].sum() / together[chosen].sum()).log10())
    return f"exponent {parts} of {len(exponents)} stages; there the error of the layers' outputs fell by {gain:.1f} dB"


class ActivationRanges:
    """The largest magnitude of each input channel of layers over many batches, in little memory.

    Attributes:
        largest: By layer, ``(C_in,)``, float64.
    """

    def __init__(self) -> None:
        """Nothing was seen yet."""
        self.largest: dict[OpKey, Tensor] = {}

    def observe(self, layer: Layer, x: Tensor) -> None:
        """Take in one input of a layer, ``(*, C_in)``, of a convolution ``(*, C_in, *)``."""
        if x.numel() == 0:
            return
        magnitudes = x.detach().movedim(-1 - positions_of(layer.op), 0).flatten(1).abs().amax(1).double().cpu()
        self.largest[layer.key] = torch.maximum(magnitudes, self.largest.get(layer.key, magnitudes))


def _activation_ranges(session: Instrumentation, runs: Runs, groups: ChannelGroups) -> ActivationRanges:
    """The ranges of what every layer reads, in FP32, over all calibration batches."""
    ranges = ActivationRanges()

    def tap_of(layer: Layer) -> Tap:
        return lambda call: ranges.observe(layer, _input_of(call))

    taps = {found.layer.key: tap_of(found.layer) for found in groups.layers}

    def visit(run: Callable[[], Any], index: int) -> None:
        run()

    with session.reference(), session.tapped(taps):
        runs(visit)
    return ranges


class _Ranges:
    """``log2`` of the ranges that belong to each class."""

    def __init__(
        self,
        groups: ChannelGroups,
        weights: dict[OpKey, tuple[Tensor, Tensor | None]],
        activations: ActivationRanges,
    ) -> None:
        """Take the widest channel of each class on each side."""
        self._groups = groups
        rows, columns, read = [], [], []
        for found in groups.layers:
            magnitudes = magnitudes_of(weights[found.layer.key][0])
            rows.append((found.rows, found.row_ranges(magnitudes)))
            columns.append((found.columns, found.column_ranges(magnitudes)))
            read.append((found.columns, activations.largest[found.layer.key]))
        self._activation = _widest(groups.count, read).log2()
        produced, consumed = _widest(groups.count, rows).log2(), _widest(groups.count, columns).log2()
        has_rows = torch.zeros(groups.count, dtype=torch.bool)
        for classes, _ in rows:
            has_rows[classes[classes != FIXED]] = True
        self._weight = torch.where(has_rows, (produced - consumed) / 2, -consumed)

    def scale(self, exponents: Tensor) -> Tensor:
        """The scales for an exponent of each stage, ``(stages,)``, NaN for no change: ``(count,)``."""
        stages = self._groups.stages
        alpha = exponents[stages]
        log2 = alpha * self._activation + (1 - alpha) * self._weight
        usable = log2.isfinite() & self._activation.isfinite() & self._weight.isfinite()
        log2 = torch.where(usable, log2, 0.0)
        total = torch.zeros_like(exponents).scatter_add_(0, stages, log2)
        number = torch.zeros_like(exponents).scatter_add_(0, stages, usable.double())
        log2 = torch.where(usable, log2 - (total / number.clamp(min=1))[stages], 0.0)
        return log2.clamp(-LARGEST_LOG2_SCALE, LARGEST_LOG2_SCALE).exp2()


def _widest(count: int, sides: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The largest range of each class, ``(count,)``, over pairs of classes and ranges of channels, ``(C,)``; else 0."""
    widest = torch.zeros(count, dtype=torch.float64)
    for classes, ranges in sides:
        inside = classes != FIXED
        widest.scatter_reduce_(0, classes[inside], ranges[inside], "amax")
    return widest


def _errors(session: Instrumentation, runs: Runs, groups: ChannelGroups, scale: Tensor) -> Tensor:
    """The error of each stage with given scales, float64, ``(stages,)``; the session is then as before."""
    taps = {found.layer.key: _OutputError(found, scale, session.target.activations) for found in groups.layers}
    state = session.state()

    def visit(run: Callable[[], Any], index: int) -> None:
        run()

    try:
        session.adjust(groups.adjustments(scale))
        with session.reference(), session.tapped(dict(taps)):
            runs(visit, _BATCHES)
    finally:
        session.restore(state)
    errors: dict[int, float] = defaultdict(float)
    for found in groups.layers:
        for stage in _stages_of(groups, found):
            errors[stage] += taps[found.layer.key].relative
    return torch.tensor([errors[stage] for stage in range(groups.stage_count)], dtype=torch.float64)


def _stages_of(groups: ChannelGroups, found: LayerChannels) -> set[int]:
    """The stages that a layer reads or writes."""
    classes = torch.cat([found.rows, found.columns])
    return set(groups.stages[classes[classes != FIXED]].tolist())


class _OutputError:
    """A tap that measures what quantizing the input and the weight does to a layer's output.

    Args:
        found: The layer and its classes.
        scale: The scales that the layer runs with now.
        spec: The grid of activations.
    """

    def __init__(self, found: LayerChannels, scale: Tensor, spec: QuantSpec) -> None:
        """Nothing was measured yet."""
        self._layer = found.layer
        self._rows = found.row_scale(scale).float()
        self._spec = spec
        self._weight: Tensor | None = None
        self._noise = self._power = 0.0

    def __call__(self, call: Call) -> None:
        """Run the layer again, quantized, and compare."""
        if call.result.numel() == 0:
            return
        if self._weight is None:
            weight, quantizer = value_at(call.args, call.kwargs, self._layer.weight_slot), self._layer.quantizer
            self._weight = quantized_anew(weight, quantizer.spec, quantizer.channel_axis)
        args, kwargs = with_argument(call.args, call.kwargs, self._layer.weight_slot, self._weight)
        x = _input_of(call)
        args, kwargs = put_argument(args, kwargs, 0, "input", _quantized_activation(x, self._spec))
        quantized = call.func(*args, **kwargs)
        rows = self._rows.to(quantized.device).reshape(-1, *(1,) * positions_of(self._layer.op))
        self._noise += float(((quantized - call.result) * rows).double().square().sum())
        self._power += float((call.result * rows).double().square().sum())

    @property
    def relative(self) -> float:
        """Noise power over signal power; 0 for an output without signal."""
        return self._noise / self._power if self._power > 0 else 0.0


def _quantized_activation(x: Tensor, spec: QuantSpec) -> Tensor:
    """An activation on the grid that its own values would get."""
    observer = Observer()
    observer.observe(x)
    encoding: Encoding = encoding_from_range(*range_from_observer(observer, spec), spec)
    return fake_quantize(x, encoding.to(x.device))


def _input_of(call: Call) -> Tensor:
    """What a layer reads."""
    x: Tensor = argument(call.args, call.kwargs, 0, "input")
    return x

"""What other settings would give at one quantizer: the SQNR of its tensor, from values that were kept, without any run.

The noise that a quantizer adds to the output grows with that which it adds to its tensor, as long as both are small.
So a setting that gains some decibels here gains about as many in what the quantizer costs; whether that suffices only
the score can tell, and the repair of single quantizers asks it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_quantdebug.activation_symptoms import channel_axis
from lightning_quantdebug.adjustment import Adjustment
from lightning_quantdebug.encoding import Encoding, encoding_from_range
from lightning_quantdebug.errors import CalibrationError
from lightning_quantdebug.fake_quantize import fake_quantize
from lightning_quantdebug.granularity import GROUP_SIZE
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.layers import Layer
from lightning_quantdebug.noise import sqnr_db
from lightning_quantdebug.quantizer import Quantizer
from lightning_quantdebug.range_setting import quantized_anew, range_from_observer
from lightning_quantdebug.target import Granularity, Kind, QuantSpec, RangeSetting
from lightning_quantdebug.weight_placement import fitting_spec

MOST_VALUES = 1 << 16
"""Of one tensor: at 8 bits 256 values a level, so that the SQNR is off by 0.1 dB, where rare values are clipped by up
to 1 dB (measured in the tests); of 134 quantizers together 35 MB."""


PERCENTILES = (99.99, 99.9, 99.0)
"""Ranges that leave out one value in 10,000, 1,000 and 100: beyond that clipping is rarely worth its noise."""

_BULK = 0.999
# Share of the values, those of least magnitude, whose SQNR is looked at apart: one outlier may be all of the signal.


class TensorSamples:
    """A bounded sample of the FP32 tensor that each activation's quantizer sees.

    Whole channels are kept: the same positions, drawn at random with a fixed seed, of each.

    Args:
        session: Knows which axis of a tensor is its channels.

    Attributes:
        names: The quantizers with a sample.
    """

    def __init__(self, session: Instrumentation) -> None:
        """Nothing is kept yet."""
        self._session = session
        self._kept: dict[str, Tensor] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The quantizers with a sample."""
        return tuple(self._kept)

    def keep(self, name: str, x: Tensor) -> None:
        """Keep some values of a tensor; of a quantizer with several tensors, of the first one."""
        if name in self._kept or x.numel() == 0 or not x.is_floating_point():
            return
        values = x.detach().reshape(1) if x.ndim == 0 else x.detach()
        axis = channel_axis(self._session, name)
        rows = values.movedim(axis if values.ndim > 1 else 0, 0).reshape(
            values.shape[axis] if values.ndim > 1 else 1, -1
        )
        most = max(1, MOST_VALUES // rows.shape[0])
        if rows.shape[1] > most:
            generator = torch.Generator().manual_seed(0)
            chosen = torch.randint(0, rows.shape[1], (most,), generator=generator).to(rows.device)
            rows = rows[:, chosen]
        self._kept[name] = rows.float().nan_to_num(0.0, 0.0, 0.0).clone()

    def of(self, name: str) -> Tensor | None:
        """The sample of one quantizer, shape ``(C, K)``; ``None`` if its tensor was never seen."""
        return self._kept.get(name)


def all_counterfactuals(
    session: Instrumentation, samples: TensorSamples, run: Callable[[], Any]
) -> dict[str, dict[str, float]]:
    """The counterfactuals of every calibrated quantizer.

    Args:
        session: Calibrated; nothing of it changes.
        samples: Of the activations.
        run: Runs the network once, so that weights are seen as quantization sees them.

    Returns:
        By the quantizer's name, SQNR in dB of its tensor: ``now``; with ``bits_16`` and with 4 more bits
        (``bits_plus_4``); ``per_channel``, ``per_group``; with the range of ``mse`` or of a percentile, such as
        ``percentile_99.9``. What makes no sense for a quantizer is left out. Of ranges, ``bulk_now`` and so on are the
        SQNR without the one value in a thousand that is greatest.
    """
    found: dict[str, dict[str, float]] = {}
    for quantizer in session.select(kind=Kind.ACTIVATION):
        sample = samples.of(quantizer.name)
        if sample is not None and quantizer.is_calibrated and quantizer.factory is None:
            found[quantizer.name] = activation_counterfactuals(quantizer, sample)
    weights = session.effective_weights(run)
    tensors = session.tensors
    for layer in session.layers:
        quantizer = layer.quantizer
        if quantizer.name in found or not quantizer.is_calibrated or quantizer.factory is not None:
            continue
        weight = weights[layer.key][0] if layer.key in weights else tensors.get(quantizer.name)
        if weight is not None and bool(weight.isfinite().all()):
            found[quantizer.name] = weight_counterfactuals(layer, weight, session.adjustments.get(layer.key))
    return found


def activation_counterfactuals(quantizer: Quantizer, sample: Tensor) -> dict[str, float]:
    """What other settings would give at one activation.

    Args:
        quantizer: Calibrated; its observer knows the whole range.
        sample: Values of its tensor, shape ``(C, K)``.
    """
    encoding, spec = quantizer.encoding, quantizer.spec
    assert encoding is not None
    found = _both("now", sample, fake_quantize(sample, encoding.to(sample.device)))
    for name, width in _wider(spec.bit_width):
        found[name] = _sqnr(sample, _anew(quantizer, replace(spec, bit_width=width), sample))
    if sample.shape[0] > 1:
        own = replace(spec, granularity=Granularity.PER_CHANNEL)
        found["per_channel"] = _sqnr(sample, encoding_from_range(*sample.aminmax(dim=1), own, 0))
    if quantizer.fixed_range is None and not quantizer.frozen:
        for name, other in _ranges(spec):
            found |= _both(name, sample, fake_quantize(sample, _anew(quantizer, other, sample)))
    return found


def weight_counterfactuals(layer: Layer, weight: Tensor, adjustment: Adjustment | None) -> dict[str, float]:
    """What other settings would give at one weight.

    Args:
        layer: The layer, with the weight's quantizer.
        weight: As the quantizer sees it, in FP32.
        adjustment: What remedies have changed; a learned rounding counts as it is now, and other settings round to
            the nearest.
    """
    quantizer, spec = layer.quantizer, layer.quantizer.spec
    corrected = weight if adjustment is None else adjustment_corrected(weight, adjustment)
    found = _both("now", weight, quantizer.quantized(corrected))
    changes: list[tuple[str, QuantSpec]] = [(n, replace(spec, bit_width=w)) for n, w in _wider(spec.bit_width)]
    changes += _ranges(spec)
    axes = [quantizer.channel_axis] * len(changes)
    for granularity in _finer(spec.granularity):
        asked = replace(
            spec, granularity=granularity, group_size=GROUP_SIZE if granularity is Granularity.PER_GROUP else None
        )
        fitting = fitting_spec(asked, granularity, layer.channel_axis, layer.shape)
        if fitting.granularity is granularity:
            changes.append((granularity.value, fitting))
            axes.append(layer.channel_axis)
    for (name, changed), axis in zip(changes, axes, strict=True):
        try:
            quantized = quantized_anew(weight, changed, axis)
            found |= _both(name, weight, quantized) if _is_range(name) else {name: sqnr_db(weight, quantized)}
        except CalibrationError:
            continue
    return found


def adjustment_corrected(weight: Tensor, adjustment: Adjustment) -> Tensor:
    """An effective FP32 weight with what was learned of its rounding."""
    correction = adjustment.weight_correction
    return weight if correction is None else weight + correction.to(weight)


def _wider(bit_width: int) -> Sequence[tuple[str, int]]:
    """Names and bit-widths of the wider grids that are looked at."""
    return [
        (name, width) for name, width in (("bits_16", 16), ("bits_plus_4", bit_width + 4)) if bit_width < width <= 16
    ]


def _ranges(spec: QuantSpec) -> list[tuple[str, QuantSpec]]:
    """Names and specs of the other range settings that are looked at."""
    changes = [("mse", replace(spec, range_setting=RangeSetting.MSE))]
    changes += [
        (percentile_name(p), replace(spec, range_setting=RangeSetting.PERCENTILE, percentile=p)) for p in PERCENTILES
    ]
    return [(name, other) for name, other in changes if not _sets_same_range(spec, other)]


def _sets_same_range(spec: QuantSpec, other: QuantSpec) -> bool:
    """Whether two specs give the same range."""
    method = spec.effective_range_setting
    same = method is other.effective_range_setting
    return same and (method is not RangeSetting.PERCENTILE or spec.percentile == other.percentile)


def percentile_name(percentile: float) -> str:
    """What a percentile is called.

    Examples:
        >>> percentile_name(99.9), percentile_name(99.0)
        ('percentile_99.9', 'percentile_99')
    """
    return f"percentile_{percentile:g}"


def _is_range(name: str) -> bool:
    """Whether a counterfactual is that of another range."""
    return name == "mse" or name.startswith("percentile_")


def _both(name: str, exact: Tensor, quantized: Tensor) -> dict[str, float]:
    """SQNR of all values, and of the bulk of them."""
    magnitude = exact.abs().flatten()
    ceiling = magnitude.kthvalue(max(1, int(_BULK * magnitude.numel()))).values
    bulk = (magnitude <= ceiling).reshape(exact.shape)
    return {name: sqnr_db(exact, quantized), f"bulk_{name}": sqnr_db(exact[bulk], quantized[bulk])}


def _finer(granularity: Granularity) -> list[Granularity]:
    """The granularities that are finer."""
    order = list(Granularity)
    return order[order.index(granularity) + 1 :]


def _anew(quantizer: Quantizer, spec: QuantSpec, sample: Tensor) -> Encoding:
    """The encoding that the quantizer would have on another grid or with another range setting."""
    if quantizer.fixed_range is not None:
        low, high = (torch.tensor(end) for end in quantizer.fixed_range)
    else:
        low, high = range_from_observer(quantizer.observer, spec)
    return encoding_from_range(low, high, spec).to(sample.device)


def _sqnr(sample: Tensor, encoding: Encoding) -> float:
    """SQNR of a sample on a grid, in dB."""
    return sqnr_db(sample, fake_quantize(sample, encoding))

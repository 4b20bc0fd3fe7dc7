"""Encodings: the scale and zero point that put a tensor on the grid of a :class:`QuantSpec`.

One internal format, for every bit-width and granularity. A real value ``x`` and its integer ``q`` are related by

    ``q = clamp(round(x / scale) + zero_point, quant_min, quant_max)``    ``x_hat = (q - zero_point) * scale``

with round half to even, as ONNX ``QuantizeLinear`` has it. The grid therefore runs from
``(quant_min - zero_point) * scale`` to ``(quant_max - zero_point) * scale`` and always contains 0. Examples at 4 bits:

    asymmetric, range [-1, 2]: scale 0.2, zero_point 5, levels 0..15, grid -1.0 .. 2.0
    symmetric, range [-1, 2]: scale 2/7, zero_point 0, levels -8..7, grid -16/7 .. 2.0

``scale`` is float32; ``zero_point`` is float32 too and holds integers, so that no arithmetic has to convert it.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_quantdebug.errors import SettingsError
from lightning_quantdebug.target import Granularity, QuantSpec

SMALLEST_SCALE = 2.0**-63
"""Floor of a scale, for constant and all-zero tensors. The scale of an int32 bias is the product of an input's and a
weight's scale; at this floor that product is still the smallest normal float32, so no engine divides by zero."""

LARGEST_FLOAT = float(torch.finfo(torch.float32).max)


@dataclass(frozen=True, eq=False)
class Encoding:
    """A tensor's place on the grid of ``spec``.

    Args:
        spec: Bit-width, symmetry and granularity.
        scale: Grid step in units of the tensor, float32, positive. Shape ``()`` per tensor, ``(C,)`` per channel,
            ``(C, K // group_size)`` per group of a ``(C, K)`` weight.
        zero_point: The integer that stands for 0, as float32, of the same shape.
        channel_axis: Axis of the tensor that has the ``C`` channels, counted from the front; ``None`` per tensor.

    Raises:
        SettingsError: If shapes, axis and granularity disagree, a scale is not positive and finite, or a zero point is
            not an integer of the grid.

    Examples:
        >>> encoding = Encoding(QuantSpec(4), torch.tensor(0.5), torch.tensor(5.0))
        >>> encoding.range_min.item(), encoding.range_max.item(), encoding.num_levels
        (-2.5, 5.0, 16)
    """

    spec: QuantSpec
    scale: Tensor
    zero_point: Tensor
    channel_axis: int | None = None

    def __post_init__(self) -> None:
        """Refuse what is no grid."""
        object.__setattr__(self, "scale", self.scale.detach().to(torch.float32))
        object.__setattr__(self, "zero_point", self.zero_point.detach().to(torch.float32))
        _check_shapes(self.spec, self.scale, self.zero_point, self.channel_axis)
        if not bool(((self.scale > 0) & self.scale.isfinite()).all()):
            raise SettingsError(f"`scale` must be positive and finite, got {self.scale.tolist()}.")
        zero = self.zero_point
        if not bool(((zero == zero.round()) & (zero >= self.spec.quant_min) & (zero <= self.spec.quant_max)).all()):
            raise SettingsError(
                f"`zero_point` must be an integer in [{self.spec.quant_min}, {self.spec.quant_max}], the grid of "
                f"{self.spec.bit_width} bits, got {zero.tolist()}."
            )

    def with_scale(self, scale: Tensor) -> Encoding:
        """The same grid with other steps, unchecked: ``scale`` must be positive and finite, of the same shape.

        The levels in steps from zero are those of this encoding, so that on an accelerator nothing waits for them.
        """
        other = copy.copy(self)
        for name in ("arithmetic", "unclipped_float32", "unclipped_float64"):
            vars(other).pop(name, None)
        object.__setattr__(other, "scale", scale)
        if scale.device.type != "cpu":
            vars(other)["arithmetic"] = (scale, *self.arithmetic[1:])
        return other

    @property
    def num_levels(self) -> int:
        """How many values the grid has."""
        return self.spec.quant_max - self.spec.quant_min + 1

    @cached_property
    def lowest_step(self) -> Tensor:
        """``quant_min - zero_point``: the lowest level in steps from zero, float32, of ``scale``'s shape."""
        return (self.spec.quant_min - self.zero_point.double()).float()

    @cached_property
    def highest_step(self) -> Tensor:
        """``quant_max - zero_point``: the highest level in steps from zero, float32, of ``scale``'s shape."""
        return (self.spec.quant_max - self.zero_point.double()).float()

    @cached_property
    def arithmetic(self) -> tuple[float | Tensor, float | Tensor, float | Tensor]:
        """Scale, lowest and highest step for arithmetic: floats where all channels share one, read once and kept.

        A float costs no broadcast, and on an accelerator no wait for the device at each call.
        """
        if self.scale.ndim == 0:
            return self.scale.item(), self.lowest_step.item(), self.highest_step.item()
        if self.spec.symmetric:
            return self.scale, float(self.spec.quant_min), float(self.spec.quant_max)
        return self.scale, self.lowest_step, self.highest_step

    @cached_property
    def unclipped_float32(self) -> tuple[float, float]:
        """The :func:`unclipped_interval` of float32 values, of a tensor with one encoding."""
        return self._unclipped(torch.float32)

    @cached_property
    def unclipped_float64(self) -> tuple[float, float]:
        """The :func:`unclipped_interval` of float64 values, of a tensor with one encoding."""
        return self._unclipped(torch.float64)

    def _unclipped(self, dtype: torch.dtype) -> tuple[float, float]:
        """The interval as two numbers."""
        low, high = unclipped_interval(self.scale, self.lowest_step, self.highest_step, dtype)
        return low.item(), high.item()

    @property
    def range_min(self) -> Tensor:
        """Lower end of the grid in units of the tensor, of ``scale``'s shape."""
        return self.lowest_step * self.scale

    @property
    def range_max(self) -> Tensor:
        """Upper end of the grid in units of the tensor, of ``scale``'s shape."""
        return self.highest_step * self.scale

    def to(self, device: torch.device | str) -> Encoding:
        """The same encoding with its tensors on ``device``; itself if they are there."""
        if self.scale.device == torch.device(device):
            return self
        return Encoding(self.spec, self.scale.to(device), self.zero_point.to(device), self.channel_axis)


def _check_shapes(spec: QuantSpec, scale: Tensor, zero_point: Tensor, channel_axis: int | None) -> None:
    """Raise unless the shapes and the axis are those of the spec's granularity."""
    dims = {Granularity.PER_TENSOR: 0, Granularity.PER_CHANNEL: 1, Granularity.PER_GROUP: 2}[spec.granularity]
    if scale.ndim != dims or scale.shape != zero_point.shape:
        raise SettingsError(
            f"With granularity {spec.granularity.value!r} scale and zero_point must have {dims} dimensions and one "
            f"shape, got {tuple(scale.shape)} and {tuple(zero_point.shape)}."
        )
    if (channel_axis is None) != (dims == 0) or (channel_axis is not None and channel_axis < 0):
        raise SettingsError(
            f"`channel_axis` must be None with granularity 'per_tensor' and else an axis counted from the front "
            f"(0, 1, ...), got {channel_axis!r} with {spec.granularity.value!r}."
        )
    if dims == 2 and channel_axis != 0:
        raise SettingsError(f"Groups run along axis 1, so `channel_axis` must be 0, got {channel_axis!r}.")


def encoding_from_range(
    range_min: Tensor, range_max: Tensor, spec: QuantSpec, channel_axis: int | None = None
) -> Encoding:
    """The encoding whose grid covers ``[range_min, range_max]`` and 0.

    Asymmetric (Jacob et al., 2018, section 3): ``scale = (max - min) / (levels - 1)`` and ``zero_point`` rounded, so
    that 0 is a level. Symmetric: ``scale = max(max / quant_max, min / quant_min)``, so that the lowest level is used.

    Args:
        range_min: Lower ends, of the shape that ``scale`` is to have. Values above 0 count as 0.
        range_max: Upper ends, likewise. Values below 0 count as 0.
        spec: The grid.
        channel_axis: As in :class:`Encoding`.

    Returns:
        The encoding, on the device of ``range_min``. Constant and all-zero tensors get :data:`SMALLEST_SCALE` at least.

    Raises:
        SettingsError: If a range is not finite, is the wrong way round, or does not fit the granularity.

    Examples:
        >>> encoding_from_range(torch.tensor(-1.0), torch.tensor(2.0), QuantSpec(4)).zero_point.item()
        5.0
    """
    low, high = range_min.detach().double(), range_max.detach().double()
    _check_range(low, high)
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    if spec.symmetric:
        exact = torch.maximum(high / spec.quant_max, low / spec.quant_min)
    else:
        exact = (high - low) / (spec.quant_max - spec.quant_min)
    # Attention masks are filled with the lowest float: clip such ranges, so that no end of the grid is infinite.
    scale = exact.clamp(SMALLEST_SCALE, LARGEST_FLOAT / 2**spec.bit_width).float()
    if spec.symmetric:
        return Encoding(spec, scale, torch.zeros_like(scale), channel_axis)
    zero_point = (-low / scale.double()).round().clamp(spec.quant_min, spec.quant_max)
    return Encoding(spec, scale, _truncated(zero_point), channel_axis)


def _truncated(zero_point: Tensor) -> Tensor:
    """Float64 integers of at least 0 as float32, towards zero where float32 has not all of them (32 bits).

    Rounding up would take steps from the upper end of the grid, where at 32 bits there may be few; taken from the
    lower end they are at most one part in 2^23 of it.
    """
    rounded = zero_point.float()
    return torch.where(rounded.double() > zero_point, rounded.nextafter(torch.zeros_like(rounded)), rounded)


def _check_range(low: Tensor, high: Tensor) -> None:
    """Raise unless all ranges are finite and the right way round."""
    if low.shape != high.shape:
        raise SettingsError(
            f"`range_min` and `range_max` must have one shape, got {tuple(low.shape)} and {tuple(high.shape)}."
        )
    wrong = ~((low <= high) & low.isfinite() & high.isfinite())
    if bool(wrong.any()):
        first = int(wrong.flatten().nonzero()[0])
        raise SettingsError(
            f"A range must be finite and have range_min <= range_max, got [{low.flatten()[first].item()}, "
            f"{high.flatten()[first].item()}] at index {first}. Find where NaN or infinity arises in FP32."
        )


def unclipped_interval(
    scale: Tensor, lowest_step: Tensor, highest_step: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The open interval of values that stay on the grid.

    For every float ``x`` of ``dtype``, ``low < x < high`` holds exactly if ``lowest_step <= round(x / scale) <=
    highest_step`` with the division done in ``dtype``. Comparing ``x`` with it gives the straight-through gradient.

    Args:
        scale: Grid steps, of any shape.
        lowest_step: ``quant_min - zero_point``, of the same shape.
        highest_step: ``quant_max - zero_point``, of the same shape.
        dtype: The type of the arithmetic, ``torch.float32`` or ``torch.float64``.

    Returns:
        ``low`` and ``high``, of the same shape and of ``dtype``.

    Examples:
        >>> one = torch.tensor(1.0)  # 1.5 rounds to 2, off the grid; -2.5 rounds to -2, on the grid
        >>> low, high = unclipped_interval(one, -2 * one, one, torch.float64)
        >>> low.item(), high.item()
        (-2.5000000000000004, 1.5)
    """
    scale = scale.to(dtype)
    return -_first_clipped(scale, -lowest_step.to(dtype)), _first_clipped(scale, highest_step.to(dtype))


def _first_clipped(scale: Tensor, step: Tensor) -> Tensor:
    """The smallest float whose quotient by ``scale`` rounds to more than ``step``."""
    # (step + 1/2) * scale is off by a few roundings, each of at most one float, so the answer is close by.
    candidates = [(step + 0.5) * scale]
    for _ in range(8):
        candidates.append(candidates[-1].nextafter(torch.full_like(scale, torch.inf)))
        candidates.insert(0, candidates[0].nextafter(torch.full_like(scale, -torch.inf)))
    floats = torch.stack(candidates)
    unclipped = ((floats / scale).round() <= step).sum(0, keepdim=True)
    return floats.gather(0, unclipped).squeeze(0)

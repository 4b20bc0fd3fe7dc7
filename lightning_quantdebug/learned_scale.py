"""Learned step size quantization (LSQ): a scale that is trained together with the weights.

    ``x_hat = clamp(round(x / s), low, high) * s``   ``low = quant_min - zero_point``, ``high = quant_max - zero_point``

The gradient for ``x`` is the straight-through one; the gradient for the scale ``s`` is that of the definition with the
rounding passed straight through (Esser et al. 2020, equation 3):

    ``d x_hat / d s = round(x / s) - x / s``  where ``x`` is not clipped, ``low`` or ``high`` where it is,

times the gradient scale ``1 / sqrt(N * Q)`` of their section 2.2. The zero point stays, so that 0 remains a level.

What is trained is the *ratio* ``r`` of the scale to the one that it started from, ``s = s_0 * r``, and its gradient is
``dL/ds / s_0``. With plain SGD, momentum or not, ``s`` then moves exactly as in the paper; with Adam and its kin, whose
steps know no units, a learning rate of 1e-3 is a change of the scale by 0.1 % for every tensor, whatever its range.

On a CPU the backward pass goes block after block, as :mod:`lightning_quantdebug.fake_quantize` does: each block is
quantized anew, which in the cache costs less than to keep and read the result, and lets later in-place operations be.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quantdebug.encoding import Encoding
from lightning_quantdebug.fake_quantize import (
    BLOCK_SIZE,
    broadcast_operands,
    dense_view,
    fake_quantize,
    grouped,
    is_transformed,
)

SMALLEST_RATIO = 2.0**-10
"""A scale is never less than this share of the one that it started from, so that no step can turn its sign."""


class LearnedScale:
    """The scale of one quantizer while it is trained.

    Args:
        start: The encoding to start from.

    Attributes:
        start: The encoding to start from.
        ratio: What is trained: the scale in units of the first one, of the shape of ``start.scale``.
        count: Number of values that share one scale, ``N`` of the gradient scale; ``None`` before the first call. Of an
            activation those of one sample count, so that the batch size has no say.

    Examples:
        >>> from lightning_quantdebug.target import QuantSpec
        >>> scale = LearnedScale(Encoding(QuantSpec(4), torch.tensor(0.5), torch.tensor(0.0)))
        >>> scale(torch.tensor([[0.4, 9.0]]), per_sample=True).sum().backward()
        >>> scale.ratio.grad  # (0.2 + 15) / sqrt(2 * 15) / 0.5
        tensor(5.5503)
    """

    @torch.inference_mode(False)
    def __init__(self, start: Encoding) -> None:
        """Start from a scale; it is trained from the first call on."""
        self.start = start
        self.ratio = nn.Parameter(torch.ones_like(start.scale))
        self.count: int | None = None
        self._known: tuple[int, torch.device, Encoding] | None = None
        self._unit: Tensor | None = None

    @property
    def version(self) -> int:
        """Counts every change of the scale, for caches."""
        return self.ratio._version

    @property
    def encoding(self) -> Encoding:
        """The encoding with the scale as it is now, made once per change."""
        version, device = self.ratio._version, self.ratio.device
        if self._known is None or self._known[:2] != (version, device):
            with torch.inference_mode(False), torch.no_grad():
                start = self.start = self.start.to(device)
                scale = start.scale * self.ratio.detach().clamp(min=SMALLEST_RATIO)
                self._known = (version, device, start.with_scale(scale))
        return self._known[2]

    def load(self, ratio: Tensor, count: int | None) -> None:
        """Go on from a ratio that was trained before, and the number of values that its gradient was scaled with."""
        with torch.no_grad():
            self.ratio.copy_(ratio)
        self.count, self._unit = count, None

    def gradient_scale(self) -> float:
        """``1 / sqrt(N * Q)``: ``Q`` is the highest level in steps from zero (of an asymmetric grid the farther end).

        Source: Esser et al. 2020, section 2.2.
        """
        spec, (_, low, high) = self.start.spec, self.start.arithmetic
        ends = [float(end.abs().max()) if isinstance(end, Tensor) else abs(end) for end in (low, high)]
        steps = ends[1] if spec.symmetric else max(ends)
        return 1.0 / math.sqrt(max(self.count or 1, 1) * max(steps, 1.0))

    def __call__(self, x: Tensor, per_sample: bool) -> Tensor:
        """Fake-quantize ``x`` with a gradient for ``x`` and for the scale.

        Args:
            x: As in :func:`~lightning_quantdebug.fake_quantize.fake_quantize`.
            per_sample: Whether the first axis of ``x`` has samples, which do not count as values that share the scale.

        Raises:
            SettingsError: If ``x`` has no float dtype, or not the channels or groups of the encoding.
        """
        if self.ratio.device != x.device:
            self.ratio.data = self.ratio.data.to(x.device)
        if self.count is None:
            shared = x.numel() // max(self.start.scale.numel(), 1)
            self.count = max(1, shared // len(x)) if per_sample and x.ndim and len(x) else max(1, shared)
        encoding = self.encoding
        if not torch.is_grad_enabled() or is_transformed(x):
            return fake_quantize(x, encoding)
        if self._unit is None or self._unit.device != x.device:
            self._unit = self.gradient_scale() / self.start.scale
        arguments = (x, self.ratio, encoding, self._unit)
        quantized: Tensor = _Learned.apply(*arguments)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return quantized


class _Learned(torch.autograd.Function):
    """Fake-quantize with the gradients of LSQ."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ratio: Tensor, encoding: Encoding, unit: Tensor) -> Tensor:
        """Quantize, and keep ``x``."""
        ctx.encoding, ctx.unit = encoding, unit
        ctx.save_for_backward(x)
        with torch.no_grad():
            return fake_quantize(x, encoding)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """The straight-through gradient, and that of the ratio."""
        for_x, for_scale = scale_gradients(gradients[0], ctx.saved_tensors[0], ctx.encoding)
        return for_x, for_scale.to(ctx.unit.dtype) * ctx.unit, None, None


def scale_gradients(gradient: Tensor, x: Tensor, encoding: Encoding) -> tuple[Tensor, Tensor]:
    """The gradients of fake quantization for its input and its scale, without the gradient scale.

    Args:
        gradient: Of the loss for the result, of the shape and dtype of ``x``.
        x: What was quantized.
        encoding: With what.

    Returns:
        The gradient for ``x``, and that for the scale, float32, of the scale's shape.

    Source: Esser et al. 2020, equations 3 and 5.
    """
    is_plain = (
        type(x) in (Tensor, nn.Parameter) and x.dtype in (torch.float32, torch.float64) and x.device.type == "cpu"
    )
    if is_plain and encoding.channel_axis is None and gradient.dtype == x.dtype:
        if x.stride() != gradient.stride():
            gradient = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(gradient)
        values, slopes = dense_view(x), dense_view(gradient)
        if values is not None and slopes is not None:
            return _in_blocks(slopes, values, gradient, encoding)
    return _at_once(gradient, x, encoding)


def _in_blocks(slopes: Tensor, values: Tensor, gradient: Tensor, encoding: Encoding) -> tuple[Tensor, Tensor]:
    """The gradients of a tensor with one scale; each block is read from memory once."""
    scale, low, high = encoding.arithmetic
    assert isinstance(scale, float)
    assert isinstance(low, float)
    assert isinstance(high, float)
    # Rounded values are integers: half a step of slack; where float32 has no half steps, a few of its own.
    slack = max(0.5, encoding.num_levels * 2.0**-20)
    ends = low - slack, high + slack
    result = torch.empty_like(gradient)
    target = dense_view(result)
    assert target is not None
    size = BLOCK_SIZE * torch.get_num_threads()
    by_scale = 0.0
    for x, slope, place in zip(*(torch.split(part, size) for part in (values, slopes, target)), strict=True):
        # The quantized value in steps, less the value itself in steps where it is not clipped: small differences are
        # summed, as a difference of large sums would have nothing but noise at 16 bits.
        steps = x.div(scale)
        rounded = steps.round()
        torch.ops.aten.hardtanh_backward.grad_input(slope, rounded, *ends, grad_input=place)
        torch.ops.aten.hardtanh_backward.grad_input(steps, rounded, *ends, grad_input=steps)
        by_scale += float(torch.dot(slope, rounded.clamp_(low, high).sub_(steps)))
    return result, torch.tensor(by_scale)


def _at_once(gradient: Tensor, x: Tensor, encoding: Encoding) -> tuple[Tensor, Tensor]:
    """The gradients of any tensor, for each channel or group."""
    exact = torch.promote_types(x.dtype, torch.float32)
    scale, low, high = broadcast_operands(x, encoding)
    values, slopes = grouped(x, encoding).to(exact), grouped(gradient, encoding).to(exact)
    steps = values / scale
    rounded = steps.round()
    # As in `fake_quantize`, a NaN is not clipped.
    is_clipped = (rounded < low) | (rounded > high)
    # torch's stub wants two numbers or two tensors and can not be told that they are of one kind.
    nearest = rounded.clamp(low, high)  # type: ignore[arg-type]
    difference = nearest - steps.masked_fill(is_clipped, 0.0)
    for_x = slopes.masked_fill(is_clipped, 0.0).reshape(x.shape).to(gradient.dtype)
    products = slopes * difference
    if encoding.channel_axis is None:
        return for_x, products.sum().float()
    if encoding.spec.group_size is not None:
        return for_x, products.sum(-1).float()
    axes = [axis for axis in range(products.ndim) if axis != encoding.channel_axis]
    return for_x, (products.sum(axes) if axes else products).float()

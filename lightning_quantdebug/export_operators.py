"""Two operators that a traced network carries where its quantizers sit, until an exporter replaces them.

``quantdebug::fake_quantize`` stands for an activation quantizer and ``quantdebug::dequantize`` for a stored integer
weight. As torch operators they compute what the simulation computes, so that a traced network can be run and compared.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_quantdebug.encoding import Encoding

# Untyped, as torch leaves the class.
_LIBRARY: Any = vars(torch.library)["Library"]("quantdebug", "FRAGMENT")
_LIBRARY.define(
    "fake_quantize(Tensor x, float scale, int zero_point, int quant_min, int quant_max, str name) -> Tensor"
)
_LIBRARY.define("dequantize(Tensor integers, Tensor scale, Tensor zero_point, int axis, int group_size) -> Tensor")


def fake_quantized(x: Tensor, scale: float, zero_point: int, quant_min: int, quant_max: int, name: str = "") -> Tensor:
    """Put ``x`` on a grid and back with plain torch operations, in the order of the simulation.

    Examples:
        >>> fake_quantized(torch.tensor([0.3, 9.0]), 0.5, 5, 0, 15)
        tensor([0.5000, 5.0000])
    """
    return x.div(scale).round().clamp(quant_min - zero_point, quant_max - zero_point).mul(scale)


def dequantized(integers: Tensor, scale: Tensor, zero_point: Tensor, axis: int, group_size: int) -> Tensor:
    """The weight that stored integers stand for.

    Args:
        integers: Of the weight's shape, any integer dtype.
        scale: Shape ``()``, ``(C,)`` with the channels at ``axis``, or ``(C, G)`` with groups of ``group_size``.
        zero_point: Of the shape of ``scale``, any dtype.
        axis: Axis of the channels; of no meaning per tensor.
        group_size: Values that share a scale along axis 1; 0: no groups.

    Examples:
        >>> dequantized(torch.tensor([[3, -2]], dtype=torch.int8), torch.tensor([0.5]), torch.tensor([0]), 0, 0)
        tensor([[ 1.5000, -1.0000]])
    """
    values, zero = integers.to(torch.float32), zero_point.to(torch.float32)
    if scale.ndim == 0:
        return (values - zero) * scale
    if group_size:
        groups = values.reshape(*scale.shape, group_size)
        return ((groups - zero.unsqueeze(-1)) * scale.unsqueeze(-1)).reshape(integers.shape)
    shape = [1] * integers.ndim
    shape[axis] = -1
    return (values - zero.reshape(shape)) * scale.reshape(shape)


_LIBRARY.impl("fake_quantize", fake_quantized, "CompositeExplicitAutograd")
_LIBRARY.impl("dequantize", dequantized, "CompositeExplicitAutograd")

FAKE_QUANTIZE = torch.ops.quantdebug.fake_quantize.default
DEQUANTIZE = torch.ops.quantdebug.dequantize.default


def integers_of(weight: Tensor, encoding: Encoding) -> Tensor:
    """The integers of a weight that is on the grid of its encoding, in the smallest dtype that holds the grid.

    Args:
        weight: Fake-quantized with ``encoding``, of any shape that fits it.
        encoding: Scale and zero point.

    Returns:
        int8, uint8, int16 or int32, of the weight's shape.

    Examples:
        >>> from lightning_quantdebug.target import QuantSpec
        >>> encoding = Encoding(QuantSpec(4, symmetric=True), torch.tensor(0.5), torch.tensor(0.0))
        >>> integers_of(torch.tensor([1.5, -1.0]), encoding)
        tensor([ 3, -2], dtype=torch.int8)
    """
    spec, scale, zero_point = encoding.spec, encoding.scale, encoding.zero_point
    if spec.group_size is not None:
        values = weight.reshape(*scale.shape, spec.group_size)
        scale, zero_point = scale.unsqueeze(-1), zero_point.unsqueeze(-1)
    else:
        values = weight
        if encoding.channel_axis is not None:
            shape = [1] * weight.ndim
            shape[encoding.channel_axis] = -1
            scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
    integers = (values / scale).round() + zero_point
    return integers.reshape(weight.shape).to(storage_dtype(spec.quant_min, spec.quant_max))


def storage_dtype(quant_min: int, quant_max: int) -> torch.dtype:
    """The smallest of torch's common integer dtypes that holds a grid."""
    for dtype in (torch.int8, torch.uint8, torch.int16):
        if torch.iinfo(dtype).min <= quant_min and quant_max <= torch.iinfo(dtype).max:
            return dtype
    return torch.int32

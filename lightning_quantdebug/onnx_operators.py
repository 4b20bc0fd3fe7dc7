"""How ``torch.onnx.export`` writes the operators of :mod:`lightning_quantdebug.export_operators`, and linear layers.

Written for opset 21, the first with 4-bit and 16-bit integers and with groups. Weights of 4 bits and fewer are stored
with 4 bits. Activations have 8 or 16: another width, such as 6, is a ``Clip`` ahead of the next wider type, as what
lies on the wider grid and inside the bounds is the grid. (Activations of 4 bits have a type too, but ONNX Runtime's own
optimizer then builds operations that it has no kernel for.)

Linear layers become ``Gemm``, over any number of axes: it takes the bias in, as integer kernels of ONNX Runtime do, and
it keeps the weight as torch has it, so that a weight per channel has its channels along axis 0 as in a convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset21

from lightning_quantdebug.export_operators import DEQUANTIZE, FAKE_QUANTIZE

OPSET = 21
# While torch's exporter traces, an operator takes and gives values of the graph, which its annotations do not say.
op: Any = opset21
QUANTIZER = "lightning_quantdebug.quantizer"
"""Key of a node's metadata that holds the name of the quantizer that the node is."""

ENDS = "lightning_quantdebug.ends"
"""Key of a node's metadata that holds the lowest and the highest integer, where they are not those of its type."""
NARROWS = "lightning_quantdebug.narrows"
"""Key of the metadata of a node that clips because a grid is narrower than its type."""

_GRIDS = {
    (0, 255): ir.DataType.UINT8,
    (-128, 127): ir.DataType.INT8,
    (0, 65535): ir.DataType.UINT16,
    (-32768, 32767): ir.DataType.INT16,
}


def onnx_type(quant_min: int, quant_max: int) -> tuple[ir.DataType, bool]:
    """The ONNX integer type for a grid, and whether the grid is all of it; where not, a ``Clip`` is put in later.

    Examples:
        >>> [(dtype.name, is_whole) for dtype, is_whole in (onnx_type(0, 255), onnx_type(-31, 31))]
        [('UINT8', True), ('INT8', False)]
    """
    exact = _GRIDS.get((quant_min, quant_max))
    if exact is not None:
        return exact, True
    wide = [(low, high) for low, high in _GRIDS if low <= quant_min and quant_max <= high]
    return _GRIDS[min(wide, key=lambda ends: (ends[1] - ends[0], -ends[0]))], False


def _fake_quantize(x: Any, scale: float, zero_point: int, quant_min: int, quant_max: int, name: str) -> Any:
    """Quantize and dequantize."""
    dtype, is_whole = onnx_type(quant_min, quant_max)
    scales = op.Constant(value=ir.tensor(np.array(scale, np.float32)))
    zero_points = op.Constant(value=ir.tensor(np.array(zero_point).astype(dtype.numpy()), dtype))
    integers = op.QuantizeLinear(x, scales, zero_points)
    integers.producer().metadata_props[QUANTIZER] = name
    if not is_whole:
        integers.producer().metadata_props[ENDS] = f"{quant_min} {quant_max}"
    return op.DequantizeLinear(integers, scales, zero_points)


def _dequantize(integers: Any, scale: Any, zero_point: Any, axis: int, group_size: int) -> Any:
    """Dequantize a weight."""
    if group_size:
        return op.DequantizeLinear(integers, scale, zero_point, axis=1, block_size=group_size)
    return op.DequantizeLinear(integers, scale, zero_point, axis=axis)


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """A linear layer as ``Gemm``."""
    given = [x, weight] if bias is None else [x, weight, bias]
    shape = list(x.shape)
    if len(shape) == 2:
        return op.Gemm(*given, transB=1)
    rows = op.Reshape(x, op.Constant(value_ints=[-1, int(shape[-1])]))
    result = op.Gemm(rows, *given[1:], transB=1)
    # The result has the axes of x, but for the last: at most one size may be left open.
    outer = [size if isinstance(size, int) else -1 for size in shape[:-1]]
    width = int(weight.shape[0])
    if outer.count(-1) <= 1:
        return op.Reshape(result, op.Constant(value_ints=[*outer, width]))
    sizes = op.Concat(op.Shape(x, start=0, end=-1), op.Constant(value_ints=[width]), axis=0)
    return op.Reshape(result, sizes)


TABLE: dict[Callable[..., Any], Callable[..., Any]] = {
    FAKE_QUANTIZE: _fake_quantize,
    DEQUANTIZE: _dequantize,
    torch.ops.aten.linear.default: _linear,
}

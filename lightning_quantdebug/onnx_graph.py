"""What is done to a quantized ONNX graph so that integer kernels can take it over, and people can read it.

Nothing here changes what the graph computes, but for one thing that is named: biases become int32 with the product of
the scales of input and weight, as integer kernels add them to their sums. Everything else is exact: a tensor that lies
on a grid is quantized on the same grid again, behind operations that move values, and clipping that the grid does by
itself is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from lightning_quantdebug.onnx_operators import ENDS, NARROWS, QUANTIZER

# Operations that move or choose values of their first input and make no new ones: their output is on its grid.
_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather", "MaxPool", "Identity", "Expand")
_WITH_BIAS = ("Conv", "ConvTranspose", "Gemm")


@dataclass(frozen=True, eq=False)
class Grid:
    """A grid with one scale, as a pair of nodes has it."""

    scale: ir.Value
    zero_point: ir.Value

    @property
    def step(self) -> float:
        """The scale as a number."""
        return float(array_of(self.scale))

    @property
    def ends(self) -> tuple[float, float]:
        """Lowest and highest value."""
        dtype, zero = self.zero_point.dtype, int(array_of(self.zero_point))
        assert dtype is not None
        low, high = integer_ends(dtype)
        return (low - zero) * self.step, (high - zero) * self.step


@dataclass(frozen=True, eq=False)
class StoredBias:
    """A bias that became int32.

    Attributes:
        value: What it stands for now, float32.
        before: What it was.
    """

    value: np.ndarray
    before: np.ndarray


def pairs(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Node]]:
    """Every activation quantizer: the node that quantizes and the one that dequantizes."""
    for node in graph:
        if node.op_type == "QuantizeLinear":
            for user in node.outputs[0].consumers():
                if user.op_type == "DequantizeLinear":
                    yield node, user


def grid_of(value: ir.Value | None) -> Grid | None:
    """The grid that a value lies on because a node has just dequantized it; ``None`` if it has none of one scale."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None:
        return None
    quantizes = node.inputs[0].producer()
    if quantizes is None or quantizes.op_type != "QuantizeLinear":
        return None
    scale, zero_point = node.inputs[1], node.inputs[2]
    if scale is None or zero_point is None or scale.const_value is None or array_of(scale).ndim:
        return None
    return Grid(scale, zero_point)


def grid_behind(value: ir.Value | None) -> Grid | None:
    """The grid that a value lies on although operations have moved it since; ``None`` if it has none of one scale."""
    while value is not None and grid_of(value) is None:
        node = value.producer()
        if node is None or node.op_type not in _MOVES:
            return None
        value = node.inputs[0]
    return grid_of(value)


def array_of(value: ir.Value) -> np.ndarray:
    """The numbers of a constant."""
    assert value.const_value is not None
    return value.const_value.numpy()


def integer_ends(dtype: ir.DataType) -> tuple[int, int]:
    """Lowest and highest number of an integer type."""
    bits = round(dtype.itemsize * 8)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dtype.is_signed() else (0, 2**bits - 1)


def constants_as_initializers(graph: ir.Graph) -> None:
    """Constants of quantizers where every engine looks for them: among the initializers."""
    for node in list(graph):
        tensor = ir.convenience.get_const_tensor(node.outputs[0]) if node.op_type == "Constant" else None
        if tensor is None:
            continue
        old = node.outputs[0]
        tensor.name = old.name
        array = tensor.numpy()
        new = ir.Value(name=old.name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        ir.convenience.replace_all_uses_with(old, new)
        graph.remove(node, safe=True)
        graph.register_initializer(new)


def narrow_grids(graph: ir.Graph) -> None:
    """Clip ahead of each grid that is narrower than its integer type, such as one of 6 bits.

    Not while the graph is traced: optimizers would put the clipping and a ReLU ahead of it into one.
    """
    for node in list(graph):
        ends = node.metadata_props.get(ENDS) if node.op_type == "QuantizeLinear" else None
        if ends is None:
            continue
        source, scale, zero_point = node.inputs
        assert source is not None
        assert scale is not None
        assert zero_point is not None
        step, zero = np.float32(array_of(scale)), int(array_of(zero_point))
        bounds = [ir.tensor(np.float32(int(end) - zero) * step) for end in ends.split()]
        names = (f"{source.name}.lowest", f"{source.name}.highest")
        values = [_initializer(graph, name, bound) for name, bound in zip(names, bounds, strict=True)]
        clip = ir.node("Clip", [source, *values])
        clip.metadata_props[NARROWS] = "1"
        clip.outputs[0].name = _free(graph, f"{source.name}.clipped")
        clip.outputs[0].type, clip.outputs[0].shape = source.type, source.shape
        graph.insert_before(node, clip)
        node.replace_input_with(0, clip.outputs[0])


def quantize_biases(graph: ir.Graph) -> tuple[dict[str, StoredBias], list[str]]:
    """Store biases as int32 with the scale of the sums, where input and weight are dequantized.

    Returns:
        What became of each, by the name of the initializer; and the names of those that stay in float because they do
        not fit into int32, as where the values that a layer is given hardly vary.
    """
    changed: dict[str, StoredBias] = {}
    too_large: list[str] = []
    for node in list(graph):
        if node.op_type not in _WITH_BIAS or len(node.inputs) < 3 or node.inputs[2] is None:
            continue
        bias, grid, weight = node.inputs[2], grid_behind(node.inputs[0]), node.inputs[1]
        dequantizes = weight.producer() if weight is not None else None
        if grid is None or bias.const_value is None or dequantizes is None:
            continue
        if dequantizes.op_type != "DequantizeLinear" or _has_groups(dequantizes):
            continue
        scale_of_weight = dequantizes.inputs[1]
        assert scale_of_weight is not None
        values = array_of(bias)
        scale = (np.float32(grid.step) * array_of(scale_of_weight).astype(np.float32)).astype(np.float32)
        integers = np.rint(values.astype(np.float64) / scale.astype(np.float64))
        if scale.ndim and scale.shape != values.shape:
            continue
        if np.abs(integers).max(initial=0) >= 2**31:
            too_large.append(str(bias.name))
            continue
        stored = integers.astype(np.int32)
        name = str(bias.name)
        _put_bias(graph, node, name, stored, scale)
        changed[name] = StoredBias(stored.astype(np.float32) * scale, values)
    return changed, too_large


def _has_groups(dequantizes: ir.Node) -> bool:
    """Whether a weight has a scale for each group."""
    size = dequantizes.attributes.get("block_size")
    return size is not None and size.as_int() != 0


def _put_bias(graph: ir.Graph, node: ir.Node, name: str, integers: np.ndarray, scale: np.ndarray) -> None:
    """Let a node read a bias that is dequantized from int32."""
    stored = _initializer(graph, f"{name}.quantized", ir.tensor(integers))
    steps = _initializer(graph, f"{name}.scale", ir.tensor(scale))
    attributes = {"axis": 0} if scale.ndim else {}
    dequantizes = ir.node("DequantizeLinear", [stored, steps], attributes=attributes)
    dequantizes.outputs[0].name = _free(graph, f"{name}.dequantized")
    dequantizes.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    dequantizes.outputs[0].shape = ir.Shape(integers.shape)
    graph.insert_before(node, dequantizes)
    node.replace_input_with(2, dequantizes.outputs[0])


def drop_clipping(graph: ir.Graph) -> int:
    """Leave out ReLU and clipping ahead of a grid that ends where they clip.

    ``max(x, 0)`` ahead of a grid whose lowest level is 0, and ``min(x, c)`` ahead of one whose highest level is reached
    at ``c`` or below, change no integer. What is left is a layer right ahead of its quantizer, which is what integer
    kernels are made of.

    Returns:
        How many were left out.
    """
    dropped = 0
    for node in list(graph):
        if node.op_type not in ("Relu", "Clip") or node.inputs[0] is None:
            continue
        users = list(node.outputs[0].consumers())
        if node.outputs[0].is_graph_output() or len(users) != 1 or users[0].op_type != "QuantizeLinear":
            continue
        scale, zero_point = users[0].inputs[1], users[0].inputs[2]
        if scale is None or zero_point is None or scale.const_value is None or array_of(scale).ndim:
            continue
        if not _grid_clips(node, Grid(scale, zero_point)):
            continue
        ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])
        graph.remove(node, safe=True)
        dropped += 1
    return dropped


def _grid_clips(node: ir.Node, grid: Grid) -> bool:
    """Whether a grid clips at least as much as a node does."""
    low, high = grid.ends
    if node.op_type == "Relu":
        return low == 0.0
    bounds = [None if value is None else value.const_value for value in (*node.inputs[1:], None, None)[:2]]
    if any(value is not None and value.const_value is None for value in node.inputs[1:]):
        return False
    # Half a step beyond the last level still rounds to it; a tenth keeps away from the tie.
    room = 0.4 * grid.step
    keeps_low = bounds[0] is None or float(bounds[0].numpy()) <= low + room
    keeps_high = bounds[1] is None or float(bounds[1].numpy()) >= high - room
    return keeps_low and keeps_high


def spread_grids(graph: ir.Graph) -> int:
    """Quantize again behind operations that move values, on the same grid: integer kernels can then do the moving.

    Returns:
        How many pairs were put in.
    """
    added = 0
    for node in list(graph):
        if node.op_type not in _MOVES or len(node.outputs) != 1:
            continue
        grid, output = grid_of(node.inputs[0]), node.outputs[0]
        users = list(output.consumers())
        if grid is None or output.is_graph_output() or not users:
            continue
        if all(user.op_type == "QuantizeLinear" for user in users):
            continue
        _put_pair(graph, node, grid)
        added += 1
    return added


def hoist_grids(graph: ir.Graph) -> int:
    """Quantize ahead of a reshape as well as behind it: the layer ahead then stands right ahead of its quantizer.

    Returns:
        How many pairs were put in.
    """
    added = 0
    for node in list(graph):
        if node.op_type != "Reshape" or node.inputs[0] is None:
            continue
        source = node.inputs[0].producer()
        users = list(node.outputs[0].consumers())
        if source is None or source.op_type != "Gemm" or len(list(node.inputs[0].consumers())) != 1:
            continue
        if node.outputs[0].is_graph_output() or not users or users[0].op_type != "QuantizeLinear" or len(users) != 1:
            continue
        scale, zero_point = users[0].inputs[1], users[0].inputs[2]
        if scale is None or zero_point is None or scale.const_value is None or array_of(scale).ndim:
            continue
        _put_pair(graph, source, Grid(scale, zero_point))
        added += 1
    return added


def sink_clipping(graph: ir.Graph) -> None:
    """Clip ahead of a reshape instead of behind it: both touch each value alone."""
    for node in list(graph):
        if node.op_type not in ("Relu", "Clip") or node.inputs[0] is None:
            continue
        reshape = node.inputs[0].producer()
        if reshape is None or reshape.op_type != "Reshape" or len(list(reshape.outputs[0].consumers())) != 1:
            continue
        source, output = reshape.inputs[0], node.outputs[0]
        if source is None or source.producer() is None or output.is_graph_output():
            continue
        _moves_alone = len(list(source.consumers())) == 1
        if not _moves_alone or reshape.outputs[0].is_graph_output():
            continue
        ir.convenience.replace_all_uses_with(output, reshape.outputs[0])
        node.replace_input_with(0, source)
        reshape.replace_input_with(0, output)
        output.shape = source.shape
        graph.remove(node)
        graph.insert_before(reshape, node)


def _put_pair(graph: ir.Graph, node: ir.Node, grid: Grid) -> None:
    """A pair of nodes behind ``node``, which all its readers read."""
    output = node.outputs[0]
    users = [(user, index) for user, index in output.uses()]
    quantizes = ir.node("QuantizeLinear", [output, grid.scale, grid.zero_point])
    dequantizes = ir.node("DequantizeLinear", [quantizes.outputs[0], grid.scale, grid.zero_point])
    dtype = grid.zero_point.dtype
    assert dtype is not None
    quantizes.outputs[0].type = ir.TensorType(dtype)
    dequantizes.outputs[0].type = output.type
    for pair, suffix in ((quantizes, "quantized"), (dequantizes, "dequantized")):
        pair.outputs[0].shape = output.shape
        pair.outputs[0].name = _free(graph, f"{output.name}.{suffix}")
    graph.insert_after(node, [quantizes, dequantizes])
    for user, index in users:
        user.replace_input_with(index, dequantizes.outputs[0])


def store_four_bits(graph: ir.Graph, signed: Mapping[str, bool]) -> None:
    """Store integer initializers, which hold 8 bits each, with 4 bits each; their zero points too.

    Args:
        graph: The graph.
        signed: Names of the initializers, and whether their integers have a sign.
    """
    for name, has_sign in signed.items():
        value = graph.initializers.get(name)
        if value is None or value.dtype not in (ir.DataType.INT8, ir.DataType.UINT8):
            continue
        dtype = ir.DataType.INT4 if has_sign else ir.DataType.UINT4
        for user in value.consumers():
            zero_point = user.inputs[2]
            assert zero_point is not None
            if zero_point.dtype is not dtype:
                stored = ir.tensor(array_of(zero_point).astype(dtype.numpy()), dtype)
                user.replace_input_with(2, _initializer(graph, f"{name}.zero_point", stored))
        value.const_value = ir.tensor(array_of(value).astype(dtype.numpy()), dtype, name=name)
        value.type = ir.TensorType(dtype)


def name_quantizers(graph: ir.Graph) -> dict[str, str]:
    """Call tensors after the quantizers that read them, as the report does.

    Returns:
        The name of the tensor that each quantizer reads, by the name of the quantizer.
    """
    named: dict[str, str] = {}
    kept = {value.name for value in (*graph.inputs, *graph.outputs)}
    for quantizes, dequantizes in list(pairs(graph)):
        name = quantizes.metadata_props.get(QUANTIZER, "")
        tensor = quantizes.inputs[0]
        if not name or tensor is None:
            continue
        if tensor.name not in kept and tensor.name not in named.values():
            tensor.name = _free(graph, name)
        named.setdefault(name, str(tensor.name))
        quantizes.outputs[0].name = _free(graph, f"{name}.quantized")
        if dequantizes.outputs[0].name not in kept:
            dequantizes.outputs[0].name = _free(graph, f"{name}.dequantized")
    return named


def rename(graph: ir.Graph, names: dict[str, str]) -> None:
    """Give initializers other names."""
    for old, new in names.items():
        value = graph.initializers.get(old)
        if value is not None:
            free = _free(graph, new)
            value.name = free
            if value.const_value is not None:
                value.const_value.name = free


def in_order(graph: ir.Graph, passes: Sequence[Callable[[ir.Graph], object]]) -> None:
    """Run passes, then put the nodes into an order in which each stands behind what it reads."""
    for each in passes:
        each(graph)
    graph.sort()


def _initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A new initializer."""
    free = _free(graph, name)
    tensor.name = free
    value = ir.Value(
        name=free, shape=ir.Shape(tensor.numpy().shape), type=ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def _free(graph: ir.Graph, name: str) -> str:
    """The name, or the name with a number if something has it."""
    taken = {value.name for node in graph for value in node.outputs}
    taken |= {*graph.initializers, *(value.name for value in graph.inputs)}
    free, number = name, 0
    while free in taken:
        number += 1
        free = f"{name}.{number}"
    return free

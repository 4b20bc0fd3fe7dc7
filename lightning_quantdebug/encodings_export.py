"""AIMET's encodings beside a float ONNX model, for the converters of QNN and SNPE and for AI Hub.

Those converters take a float model and a JSON file that says for each tensor, by its name, on which grid it shall lie
(``--quantization_overrides``). Both are made from the quantized ONNX graph: each pair of nodes goes away, the tensor
ahead of it keeps its name and gets the encoding, and weights are the float numbers that their integers stand for. So
every name in the JSON is a tensor of the model, quantizing the weights again gives the same integers, and quantizing
each tensor as the JSON says gives the quantized network.

Two schemas of AIMET (Docs/techniques/encoding_spec):

* 1.0.0: ``real = (q + offset) * scale`` with unsigned ``q``: of an asymmetric grid ``offset = -zero_point``, of a
  symmetric one ``offset = -2 ** (bit_width - 1)``.
* 2.0.0: the parameters of ONNX ``QuantizeLinear``; int32 biases are listed too. (Integers above 2^24, which biases
  beside activations of 16 bits can have, are no float32: quantizing such a bias again gives a neighbor.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript.optimizer import remove_unused_nodes

from lightning_quantdebug.encoding import Encoding
from lightning_quantdebug.errors import ExportError
from lightning_quantdebug.exported_network import StoredWeight
from lightning_quantdebug.onnx_export import OnnxNetwork, copy_of
from lightning_quantdebug.onnx_graph import array_of, grid_behind, grid_of, pairs, rename
from lightning_quantdebug.onnx_operators import NARROWS, QUANTIZER
from lightning_quantdebug.recipe import own_version
from lightning_quantdebug.target import Granularity

_TYPES = {
    Granularity.PER_TENSOR: "PER_TENSOR",
    Granularity.PER_CHANNEL: "PER_CHANNEL",
    Granularity.PER_GROUP: "PER_BLOCK",
}


@dataclass(frozen=True, eq=False)
class FloatTwin:
    """A float model and the encodings of its tensors.

    Attributes:
        model: Without any quantizer; weights are on their grids.
        activations: Encoding of each activation, by the name of its tensor.
        parameters: Encoding of each weight, by the name of its initializer.
        biases: Scale of each int32 bias, by the name of its initializer.
    """

    model: ir.Model
    activations: dict[str, Encoding]
    parameters: dict[str, Encoding]
    biases: dict[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class _Pair:
    """An activation quantizer in the graph.

    Attributes:
        nodes: Those that stand for it, in order: one that clips where its grid is narrower than its integer type, one
            that quantizes, one that dequantizes.
        encoding: What it does.
    """

    nodes: tuple[ir.Node, ...]
    encoding: Encoding

    @property
    def source(self) -> ir.Value:
        """The tensor that it reads."""
        value = self.nodes[0].inputs[0]
        assert value is not None
        return value

    @property
    def output(self) -> ir.Value:
        """What it gives."""
        return self.nodes[-1].outputs[0]


def float_twin(network: OnnxNetwork, quantizers: Mapping[str, Encoding]) -> FloatTwin:
    """Take the quantizers out of a quantized ONNX model, and note their encodings.

    A tensor has one encoding at most: where a quantizer is not the only one to read a tensor, it gets an ``Identity``
    node of its own, unless the tensor lies on its grid anyway.

    Args:
        network: The quantized model; it is not changed.
        quantizers: The encoding of each activation quantizer by its name; others are left aside.

    Returns:
        The float model with the encoding of each tensor that a quantizer reads, and of those that are made from such
        a tensor by moving its values: converters want an encoding on them, too.

    Raises:
        ExportError: If an encoding is missing, or is not the one that is in the model.
    """
    model = copy_of(network.model)
    graph = model.graph
    found = [_pair_of(*nodes, quantizers) for nodes in pairs(graph)]
    _separate(graph, found)
    encoded = _moved(graph, found)
    for pair in found:
        # Where both have a word, such as behind a reshape whose result is quantized anew, the quantizer has the last.
        encoded[pair.source] = pair.encoding
        _stand_in(graph, pair.output, pair.source)
    parameters, biases = _take_parameters(graph, network.weights)
    remove_unused_nodes(model)
    graph.sort()
    activations = {str(value.name): encoded[value] for value in _tensors(graph) if value in encoded}
    return FloatTwin(model, activations, parameters, biases)


def encodings_1_0_0(twin: FloatTwin) -> dict[str, Any]:
    """The encodings in AIMET's schema 1.0.0, as plain values.

    The schema does not name the axis of channels: it is the one of a weight's output channels.
    """
    return {
        "version": "1.0.0",
        "activation_encodings": [_entry_1_0_0(name, encoding) for name, encoding in twin.activations.items()],
        "param_encodings": [_entry_1_0_0(name, encoding) for name, encoding in twin.parameters.items()],
        "excluded_layers": [],
        "quantizer_args": {
            "activation_bitwidth": _usual_width(twin.activations.values()),
            "dtype": "int",
            "is_symmetric": all(encoding.spec.symmetric for encoding in twin.parameters.values()),
            "param_bitwidth": _usual_width(twin.parameters.values()),
            "per_channel_quantization": any(item.channel_axis is not None for item in twin.parameters.values()),
            "quant_scheme": "min_max",
        },
        "producer": _producer(),
    }


def encodings_2_0_0(twin: FloatTwin) -> dict[str, Any]:
    """The encodings in AIMET's schema 2.0.0, as plain values."""
    entries = [_entry_2_0_0(name, item) for name, item in (*twin.activations.items(), *twin.parameters.items())]
    for name, scale in twin.biases.items():
        entry: dict[str, Any] = {"name": name, "output_dtype": "int32", "y_scale": scale.tolist()}
        entries.append({**entry, "axis": 0} if scale.ndim else entry)
    return {"version": "2.0.0", "encodings": entries, "producer": _producer()}


def _pair_of(quantizes: ir.Node, dequantizes: ir.Node, quantizers: Mapping[str, Encoding]) -> _Pair:
    """The quantizer that two nodes are."""
    name, grid = quantizes.metadata_props.get(QUANTIZER, ""), grid_of(dequantizes.outputs[0])
    encoding = quantizers.get(name)
    if encoding is None:
        raise ExportError(f"`quantizers` must have an encoding of {name!r}, which is in the model; has {[*quantizers]}")
    step, zero = (None, None) if grid is None else (grid.step, int(array_of(grid.zero_point)))
    if (float(encoding.scale), int(encoding.zero_point)) != (step, zero):
        raise ExportError(
            f"The encoding of {name!r} must be that of the model, scale {step} and zero point {zero}, got "
            f"{float(encoding.scale)} and {int(encoding.zero_point)}. Calibrate before, not after, the export."
        )
    clips = quantizes.inputs[0].producer() if quantizes.inputs[0] is not None else None
    # The bit-width says that a grid is narrower than its type, but no schema has a word for one without lowest level.
    if clips is None or NARROWS not in clips.metadata_props or encoding.spec.narrow_range:
        return _Pair((quantizes, dequantizes), encoding)
    return _Pair((clips, quantizes, dequantizes), encoding)


def _separate(graph: ir.Graph, found: Sequence[_Pair]) -> None:
    """Give quantizers an ``Identity`` node each where a tensor is read in several ways."""
    grids = {_grid_key(pair.output): pair.encoding for pair in found}
    readers: dict[ir.Value, list[_Pair]] = {}
    for pair in found:
        readers.setdefault(pair.source, []).append(pair)
    for source, group in readers.items():
        lies_on = grids.get(_grid_key(source))
        ways = _by_encoding(group)
        # What a quantizer has given is read on its grid first, and on another one after that.
        is_given = any(pair.output is source for pair in found)
        if len(ways) == 1 and not is_given and not _is_read_in_float(source, group):
            continue
        for way in ways:
            if lies_on is None or not _is_same(way[0].encoding, lies_on):
                _put_identity(graph, source, way)


def _grid_key(value: ir.Value) -> tuple[ir.Value, ir.Value] | None:
    """Scale and zero point of the grid that a value lies on."""
    grid = grid_behind(value)
    return None if grid is None else (grid.scale, grid.zero_point)


def _by_encoding(group: Sequence[_Pair]) -> list[list[_Pair]]:
    """Quantizers that do the same, together."""
    ways: list[list[_Pair]] = []
    for pair in group:
        same = next((way for way in ways if _is_same(way[0].encoding, pair.encoding)), None)
        if same is None:
            ways.append([pair])
        else:
            same.append(pair)
    return ways


def _is_same(one: Encoding, other: Encoding) -> bool:
    """Whether two encodings of activations have the same levels."""
    levels = [(item.spec.quant_min, item.spec.quant_max) for item in (one, other)]
    same_grid = torch.equal(one.scale, other.scale) and torch.equal(one.zero_point, other.zero_point)
    return same_grid and levels[0] == levels[1]


def _is_read_in_float(source: ir.Value, group: Sequence[_Pair]) -> bool:
    """Whether anything but the given quantizers needs the values of a tensor."""
    heads = [pair.nodes[0] for pair in group]
    others = [node for node in source.consumers() if node not in heads and node.op_type != "Shape"]
    return source.is_graph_output() or bool(others)


def _put_identity(graph: ir.Graph, source: ir.Value, way: Sequence[_Pair]) -> None:
    """Another name for a tensor, which the given quantizers read."""
    heads = [pair.nodes[0] for pair in way]
    node = _identity(source, _free(graph, str(source.name)))
    graph.insert_before(next(node for node in graph if node in heads), node)
    for head in heads:
        head.replace_input_with(0, node.outputs[0])


def _identity(source: ir.Value, name: str) -> ir.Node:
    """A node that gives what it is given."""
    node = ir.node("Identity", [source])
    node.outputs[0].name = name
    node.outputs[0].type, node.outputs[0].shape = source.type, source.shape
    return node


def _free(graph: ir.Graph, name: str) -> str:
    """The name with the first number that makes a new one."""
    taken = {value.name for value in _tensors(graph)}
    return next(free for free in (f"{name}.{number}" for number in range(1, len(taken) + 2)) if free not in taken)


def _tensors(graph: ir.Graph) -> Iterable[ir.Value]:
    """Every tensor, in order."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _moved(graph: ir.Graph, found: Sequence[_Pair]) -> dict[ir.Value, Encoding]:
    """Encodings of tensors that lie on a grid because operations have moved values of it."""
    grids = {_grid_key(pair.output): pair.encoding for pair in found}
    # Only first outputs: a second one is another thing, such as the places of the greatest values.
    firsts = [node.outputs[0] for node in graph]
    keys = {value: _grid_key(value) for value in firsts}
    return {value: grids[key] for value, key in keys.items() if key is not None}


def _stand_in(graph: ir.Graph, output: ir.Value, source: ir.Value) -> None:
    """Let all that reads ``output`` read ``source``; where the model returns the one, it returns the other."""
    for index, value in enumerate(graph.outputs):
        if value is output:
            graph.outputs[index] = _as_output(graph, output, source)
    ir.convenience.replace_all_uses_with(output, source)


def _as_output(graph: ir.Graph, output: ir.Value, source: ir.Value) -> ir.Value:
    """What the model returns now, by the name it had."""
    name, output.name = output.name, f"{output.name}.dequantized"
    if source.is_graph_input() or source.is_graph_output() or source.is_initializer():
        node = _identity(source, str(name))
        graph.append(node)
        source = node.outputs[0]
    source.name, source.type, source.shape = name, output.type, output.shape
    return source


def _take_parameters(
    graph: ir.Graph, weights: Mapping[str, StoredWeight]
) -> tuple[dict[str, Encoding], dict[str, np.ndarray]]:
    """Turn stored integers into float initializers; returns the encodings of weights and the scales of biases."""
    readers: dict[ir.Value, list[ir.Node]] = {}
    for node in graph:
        stored = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if stored is not None and stored.is_initializer():
            readers.setdefault(stored, []).append(node)
    parameters: dict[str, Encoding] = {}
    biases: dict[str, np.ndarray] = {}
    for stored, nodes in readers.items():
        scale, weight = nodes[0].inputs[1], weights.get(str(stored.name))
        assert scale is not None
        _store_floats(graph, stored, nodes)
        if weight is not None and weight.encoding is not None:
            parameters[str(stored.name)] = weight.encoding
        else:
            rename(graph, {str(stored.name): str(stored.name).removesuffix(".quantized")})
            biases[str(stored.name)] = array_of(scale)
    return parameters, biases


def _store_floats(graph: ir.Graph, stored: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """Turn one initializer into what nodes make of it, and let their readers read it."""
    stored.const_value = ir.tensor(_dequantized(nodes[0]), name=stored.name)
    stored.type = ir.TensorType(ir.DataType.FLOAT)
    for node in nodes:
        _stand_in(graph, node.outputs[0], stored)
        graph.remove(node, safe=True)


def _dequantized(node: ir.Node) -> np.ndarray:
    """The numbers that stored integers stand for, as ONNX ``DequantizeLinear`` defines them, float32."""
    integers, scale, zero_point = (*node.inputs, None)[:3]
    assert integers is not None
    assert scale is not None
    values, steps = array_of(integers).astype(np.float32), array_of(scale)
    zeros = np.zeros_like(steps) if zero_point is None else array_of(zero_point).astype(np.float32)
    attributes = {name: attribute.as_int() for name, attribute in node.attributes.items()}
    axis, size = attributes.get("axis", 1), attributes.get("block_size", 0)
    if steps.ndim == 1:
        shape = [-1 if each == axis else 1 for each in range(values.ndim)]
        steps, zeros = steps.reshape(shape), zeros.reshape(shape)
    elif size:
        steps, zeros = np.repeat(steps, size, axis), np.repeat(zeros, size, axis)
    result: np.ndarray = (values - zeros) * steps
    return result


def _usual_width(encodings: Iterable[Encoding]) -> int:
    """The bit-width that most have; 8 where there are none."""
    counted = Counter(encoding.spec.bit_width for encoding in encodings)
    return max(counted, key=lambda width: counted[width], default=8)


def _entry_1_0_0(name: str, encoding: Encoding) -> dict[str, Any]:
    """One tensor in schema 1.0.0.

    Examples:
        >>> from lightning_quantdebug.target import QuantSpec
        >>> entry = _entry_1_0_0("x", Encoding(QuantSpec(4), torch.tensor(0.5), torch.tensor(5.0)))
        >>> entry["enc_type"], entry["bw"], entry["is_sym"], entry["scale"], entry["offset"]
        ('PER_TENSOR', 4, False, [0.5], [-5])
    """
    spec = encoding.spec
    # The lowest integer of a symmetric grid is not that of the spec where it leaves it out.
    shift = 1 << (spec.bit_width - 1) if spec.symmetric else 0
    entry = {
        "name": name,
        "enc_type": _TYPES[spec.granularity],
        "dtype": "INT",
        "bw": spec.bit_width,
        "is_sym": spec.symmetric,
        "scale": encoding.scale.flatten().tolist(),
        "offset": [-int(zero) - shift for zero in encoding.zero_point.flatten().tolist()],
    }
    return entry if spec.group_size is None else {**entry, "block_size": spec.group_size}


def _entry_2_0_0(name: str, encoding: Encoding) -> dict[str, Any]:
    """One tensor in schema 2.0.0.

    Examples:
        >>> from lightning_quantdebug.target import QuantSpec
        >>> _entry_2_0_0("x", Encoding(QuantSpec(4), torch.tensor(0.5), torch.tensor(5.0)))
        {'name': 'x', 'output_dtype': 'uint4', 'y_scale': 0.5, 'y_zero_point': 5}
    """
    spec = encoding.spec
    dtype = f"{'int' if spec.symmetric else 'uint'}{spec.bit_width}"
    entry: dict[str, Any] = {"name": name, "output_dtype": dtype, "y_scale": encoding.scale.tolist()}
    if bool(encoding.zero_point.any()):
        entry["y_zero_point"] = encoding.zero_point.long().tolist()
    if spec.group_size is not None:
        return {**entry, "axis": 1, "block_size": spec.group_size}
    return entry if encoding.channel_axis is None else {**entry, "axis": encoding.channel_axis}


def _producer() -> dict[str, str]:
    """What wrote the file."""
    return {"package": "lightning-quantdebug", "version": own_version()}

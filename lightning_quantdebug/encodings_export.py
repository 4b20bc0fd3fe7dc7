"""AIMET's encodings beside a float ONNX model, for the converters of QNN and SNPE and for AI Hub.

Those converters take a float model and a JSON file that says for each tensor, by its name, on which grid it shall lie
(``--quantization_overrides``). Both are made from the quantized ONNX graph: each pair of nodes goes away, the tensor
ahead of it keeps its name and gets the encoding, and weights are the float numbers that their integers stand for. So
every name in the JSON is a tensor of the model, and quantizing the weights again gives the same integers.

Two schemas of AIMET (Docs/techniques/encoding_spec):

* 1.0.0: ``real = (q + offset) * scale`` with unsigned ``q``: of an asymmetric grid ``offset = -zero_point``, of a
  symmetric one ``offset = -2 ** (bit_width - 1)``.
* 2.0.0: the parameters of ONNX ``QuantizeLinear``; int32 biases are listed too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.optimizer import remove_unused_nodes

from lightning_quantdebug.encoding import Encoding
from lightning_quantdebug.onnx_export import OnnxNetwork, copy_of
from lightning_quantdebug.onnx_graph import array_of, grid_of, pairs, spread_grids
from lightning_quantdebug.onnx_operators import NARROWS, QUANTIZER
from lightning_quantdebug.recipe import own_version
from lightning_quantdebug.target import Granularity

_MATCHES = {
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
    activations: dict[str, Encoding] = field(default_factory=dict)
    parameters: dict[str, Encoding] = field(default_factory=dict)
    biases: dict[str, np.ndarray] = field(default_factory=dict)


def float_twin(network: OnnxNetwork, quantizers: Mapping[str, Encoding]) -> FloatTwin:
    """Take the quantizers out of a quantized ONNX model, and note their encodings.

    Args:
        network: The quantized model; it is not changed.
        quantizers: The encoding of each quantizer by its name.

    Returns:
        The float model with encodings for each tensor that a quantizer reads, and for what only moves such a tensor.
    """
    twin = FloatTwin(copy_of(network.model))
    graph = twin.model.graph
    # Converters want an encoding for each tensor, also for those that reshapes and the like give.
    spread_grids(graph)
    _take_pairs(graph, quantizers, twin)
    _take_parameters(graph, network, twin)
    # What nobody reads any more: the nodes of quantizers, and the constants that they had.
    remove_unused_nodes(twin.model)
    graph.sort()
    return twin


def _take_pairs(graph: ir.Graph, quantizers: Mapping[str, Encoding], twin: FloatTwin) -> None:
    """Leave out each activation quantizer; the tensor ahead of it gets the encoding."""
    grids: dict[tuple[float, int], Encoding] = {}
    found = [(q, d, _encoding_of(q, d, quantizers, grids)) for q, d in list(pairs(graph))]
    for quantizes, dequantizes, encoding in found:
        source = quantizes.inputs[0]
        assert source is not None
        clip = source.producer()
        narrows = clip is not None and NARROWS in clip.metadata_props
        if clip is not None and narrows:
            # The encoding says by its bit-width that the grid is narrower than its type.
            assert clip.inputs[0] is not None
            source = clip.inputs[0]
        if str(source.name) in twin.activations:
            source = _put_identity(graph, quantizes, source)
        output = dequantizes.outputs[0]
        _keep_output(graph, output, source)
        ir.convenience.replace_all_uses_with(output, source)
        if encoding is not None:
            twin.activations[str(source.name)] = encoding


def _encoding_of(
    quantizes: ir.Node,
    dequantizes: ir.Node,
    quantizers: Mapping[str, Encoding],
    grids: dict[tuple[float, int], Encoding],
) -> Encoding | None:
    """The encoding of a pair: that of its quantizer, or of the quantizer whose grid it repeats."""
    grid = grid_of(dequantizes.outputs[0])
    assert grid is not None
    key = (grid.step, int(array_of(grid.zero_point)))
    name = quantizes.metadata_props.get(QUANTIZER, "")
    if name in quantizers:
        grids[key] = quantizers[name]
    return grids.get(key)


def _put_identity(graph: ir.Graph, before: ir.Node, source: ir.Value) -> ir.Value:
    """A second name for a tensor that is read through two quantizers."""
    node = ir.node("Identity", [source])
    taken = {value.name for each in graph for value in each.outputs}
    number = 1
    while f"{source.name}_{number}" in taken:
        number += 1
    node.outputs[0].name = f"{source.name}_{number}"
    node.outputs[0].type, node.outputs[0].shape = source.type, source.shape
    graph.insert_before(before, node)
    return node.outputs[0]


def _keep_output(graph: ir.Graph, output: ir.Value, source: ir.Value) -> None:
    """Let the tensor ahead take over where a quantizer gives what the model returns, with the name of that."""
    for index, value in enumerate(graph.outputs):
        if value is not output:
            continue
        name = output.name
        if source.is_graph_input() or source.is_graph_output():
            node = ir.node("Identity", [source])
            node.outputs[0].type, node.outputs[0].shape = source.type, source.shape
            graph.append(node)
            source = node.outputs[0]
        output.name = f"{name}.before"
        source.name = name
        if source.shape is None:
            source.shape = output.shape
        graph.outputs[index] = source


def _take_parameters(graph: ir.Graph, network: OnnxNetwork, twin: FloatTwin) -> None:
    """Turn stored integers into float initializers."""
    for node in list(graph):
        stored = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if stored is None or stored.const_value is None:
            continue
        values, scale = _dequantized(node), node.inputs[1]
        assert scale is not None
        name = str(stored.name)
        if name in network.weights:
            encoding = network.weights[name].encoding
            assert encoding is not None
            twin.parameters[name] = encoding
        else:
            name = name.removesuffix(".quantized")
            twin.biases[name] = array_of(scale)
        _replace_by_float(graph, node, stored, name, values)


def _replace_by_float(graph: ir.Graph, node: ir.Node, stored: ir.Value, name: str, values: np.ndarray) -> None:
    """An initializer in place of a node that dequantizes."""
    known = graph.initializers.get(name)
    if known is None or known is stored:
        graph.initializers.pop(str(stored.name), None)
        stored.name = f"{name}.integers"
        tensor = ir.tensor(values, name=name)
        known = ir.Value(
            name=name, shape=ir.Shape(values.shape), type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor
        )
        graph.register_initializer(known)
    ir.convenience.replace_all_uses_with(node.outputs[0], known)


def _dequantized(node: ir.Node) -> np.ndarray:
    """The numbers that stored integers stand for, as ONNX ``DequantizeLinear`` defines them, float32."""
    integers, scale = node.inputs[0], node.inputs[1]
    assert integers is not None
    assert scale is not None
    values, steps = array_of(integers).astype(np.float32), array_of(scale)
    zero = node.inputs[2] if len(node.inputs) > 2 else None
    zeros = np.zeros_like(steps) if zero is None else array_of(zero).astype(np.float32)
    block = node.attributes.get("block_size")
    if steps.ndim == 0:
        return (values - zeros) * steps
    if block is not None and block.as_int():
        size = block.as_int()
        return (values - np.repeat(zeros, size, 1)) * np.repeat(steps, size, 1)
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    shape = [1] * values.ndim
    shape[axis] = -1
    return (values - zeros.reshape(shape)) * steps.reshape(shape)


def encodings_1_0_0(twin: FloatTwin) -> dict[str, Any]:
    """The encodings in AIMET's schema 1.0.0, as plain values."""
    some = next(iter(twin.activations.values()), None)
    weight = next(iter(twin.parameters.values()), None)
    return {
        "version": "1.0.0",
        "activation_encodings": [_entry_1_0_0(name, encoding) for name, encoding in twin.activations.items()],
        "param_encodings": [_entry_1_0_0(name, encoding) for name, encoding in twin.parameters.items()],
        "excluded_layers": [],
        "quantizer_args": {
            "activation_bitwidth": 8 if some is None else some.spec.bit_width,
            "dtype": "int",
            "is_symmetric": True if weight is None else weight.spec.symmetric,
            "param_bitwidth": 8 if weight is None else weight.spec.bit_width,
            "per_channel_quantization": weight is not None and weight.channel_axis is not None,
            "quant_scheme": "min_max",
        },
        "producer": _producer(),
    }


def _entry_1_0_0(name: str, encoding: Encoding) -> dict[str, Any]:
    """One tensor in schema 1.0.0."""
    spec = encoding.spec
    scale, zero = encoding.scale.flatten().tolist(), encoding.zero_point.flatten().tolist()
    symmetric = -(1 << (spec.bit_width - 1))
    entry = {
        "name": name,
        "enc_type": _MATCHES[spec.granularity],
        "dtype": "INT",
        "bw": spec.bit_width,
        "is_sym": spec.symmetric,
        "scale": scale,
        "offset": [symmetric if spec.symmetric else -int(value) for value in zero],
    }
    return entry if spec.group_size is None else {**entry, "block_size": spec.group_size}


def encodings_2_0_0(twin: FloatTwin) -> dict[str, Any]:
    """The encodings in AIMET's schema 2.0.0, as plain values."""
    entries = [_entry_2_0_0(name, item) for name, item in (*twin.activations.items(), *twin.parameters.items())]
    for name, scale in twin.biases.items():
        entry: dict[str, Any] = {"name": name, "output_dtype": "int32", "y_scale": scale.tolist()}
        entries.append({**entry, "axis": 0} if scale.ndim else entry)
    return {"version": "2.0.0", "encodings": entries, "producer": _producer()}


def _entry_2_0_0(name: str, encoding: Encoding) -> dict[str, Any]:
    """One tensor in schema 2.0.0."""
    spec = encoding.spec
    entry: dict[str, Any] = {
        "name": name,
        "output_dtype": f"{'' if spec.symmetric else 'u'}int{spec.bit_width}",
        "y_scale": encoding.scale.tolist(),
    }
    if bool(encoding.zero_point.any()):
        integers = encoding.zero_point.int().tolist()
        entry["y_zero_point"] = integers
    if spec.group_size is not None:
        return {**entry, "axis": 1, "block_size": spec.group_size}
    return entry if encoding.channel_axis is None else {**entry, "axis": encoding.channel_axis}


def _producer() -> dict[str, str]:
    """What wrote the file."""
    return {"package": "lightning-quantdebug", "version": own_version()}

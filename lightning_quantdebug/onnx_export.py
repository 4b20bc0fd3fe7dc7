"""The quantized network as an ONNX file with ``QuantizeLinear`` and ``DequantizeLinear``.

torch's exporter writes what :mod:`lightning_quantdebug.exported_network` traces: weights stored as integers, an
operator pair where a quantizer sits. :mod:`lightning_quantdebug.onnx_graph` then makes it fit for integer kernels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript.optimizer import fold_constants_ir, remove_unused_nodes
from onnxscript.rewriter import rewrite

from lightning_quantdebug.errors import ExportError
from lightning_quantdebug.exported_network import ExportedNetwork, StoredWeight, Traced, chained, quiet, trace
from lightning_quantdebug.network import NetworkCall, argument_names
from lightning_quantdebug.onnx_graph import (
    StoredBias,
    constants_as_initializers,
    drop_clipping,
    hoist_grids,
    in_order,
    name_quantizers,
    narrow_grids,
    quantize_biases,
    rename,
    sink_clipping,
    spread_grids,
    store_four_bits,
)
from lightning_quantdebug.onnx_operators import OPSET, TABLE


@dataclass(frozen=True, eq=False)
class OnnxNetwork:
    """A quantized network as ONNX.

    Attributes:
        model: With a pair of nodes at each quantizer, and nothing else changed.
        traced: What it was made of.
        tensors: Name of the tensor that each quantizer reads, by the name of the quantizer.
        weights: The weights by the name of their initializer.
        biases: What became of the biases that are int32 now, by the name of the operation.
        too_large: Biases that do not fit into int32 and stay in float.
    """

    model: ir.Model
    traced: Traced
    tensors: dict[str, str]
    weights: dict[str, StoredWeight]
    biases: dict[str, StoredBias]
    too_large: tuple[str, ...] = ()

    def fused(self) -> ir.Model:
        """A copy that integer kernels can take over; see :mod:`lightning_quantdebug.onnx_graph`."""
        model = copy_of(self.model)
        in_order(model.graph, (sink_clipping, drop_clipping, hoist_grids, spread_grids))
        return model


def to_onnx(exported: ExportedNetwork, call: NetworkCall, others: Sequence[NetworkCall] = ()) -> OnnxNetwork:
    """Write a quantized network as ONNX, in memory.

    Args:
        exported: The network.
        call: A call of it, with two samples at least.
        others: Further calls, which show what varies besides the batch.

    Raises:
        ExportError: If the network can not be traced or written; the message says where.
    """
    traced = trace(exported, call, plain=False, others=others)
    try:
        with quiet():
            program = torch.onnx.export(
                traced.program,
                (),
                dynamo=True,
                custom_translation_table=dict(TABLE),
                opset_version=OPSET,
                optimize=False,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError, ValueError, TypeError) as error:
        raise ExportError(f"torch.onnx can not write the network: {_cause_of(error)}") from error
    assert program is not None
    model: ir.Model = program.model
    graph = model.graph
    # Not torch's own `optimize`: it puts equal initializers together, such as those of two layers that started alike,
    # and which layer a bias belongs to could not be told any more.
    with quiet():
        fold_constants_ir(model)
        rewrite(model)
        fold_constants_ir(model)
        remove_unused_nodes(model)
    _name_ends(graph, argument_names(exported.network, call), exported.output_names)
    constants_as_initializers(graph)
    weights = _name_weights(graph, exported.weights)
    owners = _name_biases(graph, exported.biases)
    tensors = name_quantizers(graph)
    narrow_grids(graph)
    encodings = {name: weight.encoding for name, weight in weights.items() if weight.encoding is not None}
    four = {name: each.spec.symmetric for name, each in encodings.items() if each.spec.bit_width <= 4}
    store_four_bits(graph, four)
    stored, too_large = quantize_biases(graph)
    biases = {owners[name]: bias for name, bias in stored.items() if name in owners}
    graph.sort()
    _drop_unused(graph)
    model.producer_name = "lightning-quantdebug"
    model.graph.name = type(exported.network.module).__name__
    return OnnxNetwork(model, traced, tensors, weights, biases, tuple(too_large))


def _cause_of(error: BaseException) -> str:
    """What torch's exporter stumbled over, in one line: the operation, and the first of its chained errors."""
    chain = list(chained(error))
    operation = re.search(r"target=([\w.]+)", " ".join(str(link) for link in chain))
    lines = str(chain[-1]).strip().splitlines()
    words = f"{type(chain[-1]).__name__}: {lines[0]}" if lines else type(chain[-1]).__name__
    return words if operation is None else f"{operation[1].removeprefix('torch.ops.')}: {words}"


def to_proto(model: ir.Model) -> Any:
    """The model as a protocol buffer, checked.

    Raises:
        ExportError: If it is not valid ONNX.
    """
    proto = ir.to_proto(model)
    try:
        onnx.checker.check_model(proto, full_check=False)
    except onnx.checker.ValidationError as error:
        raise ExportError(f"The exported model is not valid ONNX: {error}.") from error
    return proto


def copy_of(model: ir.Model) -> ir.Model:
    """A model that shares nothing with the given one."""
    return ir.from_proto(ir.to_proto(model))


def _name_ends(graph: ir.Graph, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Names of what goes in and comes out."""
    for value, name in zip(graph.inputs, inputs, strict=True):
        value.name = name
    for index, name in enumerate(outputs):
        value = graph.outputs[index]
        if value in graph.inputs or value in graph.outputs[:index]:
            # A tensor that comes out twice, or as it went in.
            node = ir.node("Identity", [value])
            graph.append(node)
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            graph.outputs[index] = value = node.outputs[0]
        value.name = name if name not in inputs else f"{name}_out"
    _name_sizes(graph)


def _name_sizes(graph: ir.Graph) -> None:
    """Call the size that all batches share ``batch``, and others after their place."""
    names: dict[str, str] = {}
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is None:
            continue
        for axis, size in enumerate(value.shape):
            if isinstance(size, ir.SymbolicDim) and size.value is not None and size.value not in names:
                wanted = "batch" if axis == 0 and "batch" not in names.values() else f"size_{len(names)}"
                names[size.value] = wanted
    for node_values in (graph.inputs, *(node.outputs for node in graph)):
        for value in node_values:
            if value.shape is None:
                continue
            sizes = [size.value if isinstance(size, ir.SymbolicDim) else size for size in value.shape]
            value.shape = ir.Shape([names.get(size, size) if isinstance(size, str) else size for size in sizes])


def _name_weights(graph: ir.Graph, weights: Sequence[StoredWeight]) -> dict[str, StoredWeight]:
    """Call initializers after the quantizers whose weights they hold; returns the weights by those names."""
    counted: dict[str, int] = {}
    named: dict[str, StoredWeight] = {}
    for index, weight in enumerate(weights):
        count = counted[weight.name] = counted.get(weight.name, -1) + 1
        name = f"{weight.name}@{count}" if count else weight.name
        parts = {"weight": name, "scale": f"{name}.scale", "zero_point": f"{name}.zero_point"}
        rename(graph, {f"{part}_{index}": new for part, new in parts.items()})
        named[name] = weight
    others = [name for name in graph.initializers if name.startswith("network_root.")]
    rename(graph, {name: name.removeprefix("network_root.") for name in others})
    return named


def _name_biases(graph: ir.Graph, operations: Sequence[str]) -> dict[str, str]:
    """Call biases after their operations; returns the operations by those names."""
    owners: dict[str, str] = {}
    for index, operation in enumerate(operations):
        value = graph.initializers.get(f"bias_{index}")
        if value is not None:
            rename(graph, {f"bias_{index}": f"{operation}.bias"})
            owners[str(value.name)] = operation
    return owners


def _drop_unused(graph: ir.Graph) -> None:
    """Leave out initializers that nobody reads."""
    for name, value in list(graph.initializers.items()):
        if not list(value.uses()) and not value.is_graph_output():
            del graph.initializers[name]

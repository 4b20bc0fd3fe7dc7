"""A float ONNX model and AIMET's encodings: both together are the quantized network.

The proof reads nothing but the two files that a converter reads: quantizers are put back where the JSON has an entry,
by code that knows ONNX and AIMET's documentation and nothing of this package.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from lightning_quantdebug import ExportError, export_encodings, instrument
from lightning_quantdebug.encoding import Encoding
from lightning_quantdebug.encodings_export import FloatTwin, encodings_1_0_0, encodings_2_0_0, float_twin
from lightning_quantdebug.onnx_export import OnnxNetwork, to_proto
from lightning_quantdebug.onnx_operators import NARROWS, QUANTIZER
from lightning_quantdebug.recipe import call_of
from lightning_quantdebug.report import Agreement
from lightning_quantdebug.target import Kind, Mode, QuantSpec
from tests.encodings_schemas import SCHEMA_1_0_0, SCHEMA_2_0_0
from tests.exporting import EXPORTABLE, PER_GROUP, TARGETS, exporter_of, quantized, ran

_UNSIGNED = {8: TensorProto.UINT8, 16: TensorProto.UINT16}
_SIGNED = {8: TensorProto.INT8, 16: TensorProto.INT16, 32: TensorProto.INT32}


class Mixed(nn.Module):
    """Linear layers of 8 inputs, with groups of 4 in ``PER_GROUP``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)).reshape(-1, 16)).flatten(1)


class Grid:
    """The grid of an entry: real = (q - zero) * scale for integers q from ``low`` to ``high``."""

    def __init__(self, scale: Any, zero: Any, bits: int, signed: bool, axis: int | None, block: int) -> None:
        self.scale, self.zero, self.bits, self.signed = np.array(scale, np.float32), np.array(zero), bits, signed
        self.low = -(2 ** (bits - 1)) if signed else 0
        self.high = self.low + 2**bits - 1
        self.attributes = {name: value for name, value in (("axis", axis), ("block_size", block)) if value is not None}
        if not block:
            self.attributes.pop("block_size", None)

    @property
    def type(self) -> int:
        """The narrowest ONNX type that both nodes take."""
        types = _SIGNED if self.signed else _UNSIGNED
        return types[min(width for width in types if width >= self.bits)]

    def integers(self, values: np.ndarray) -> np.ndarray:
        """The integers of a constant."""
        scale, zero = self.spread(self.scale, values), self.spread(self.zero, values)
        return np.clip(np.rint(values / scale) + zero, self.low, self.high)

    def real(self, values: np.ndarray) -> np.ndarray:
        """The constant on the grid."""
        return (self.integers(values) - self.spread(self.zero, values)).astype(np.float32) * self.spread(
            self.scale, values
        )

    def spread(self, numbers: np.ndarray, values: np.ndarray) -> np.ndarray:
        """Numbers of channels or blocks beside each value."""
        if numbers.ndim == 2:
            return np.repeat(numbers, self.attributes["block_size"], self.attributes["axis"])
        if numbers.ndim == 1:
            return numbers.reshape([-1 if axis == self.attributes["axis"] else 1 for axis in range(values.ndim)])
        return numbers


def _grids_1_0_0(encodings: dict[str, Any], model: onnx.ModelProto) -> dict[str, Grid]:
    """Grids by the rule of schema 1.0.0: all integers are unsigned, the axis is that of the output channels."""
    shapes = {item.name: list(item.dims) for item in model.graph.initializer}
    grids = {}
    for entry in (*encodings["activation_encodings"], *encodings["param_encodings"]):
        scale, zero, axis, block = np.array(entry["scale"]), -np.array(entry["offset"]), None, 0
        if entry["enc_type"] == "PER_TENSOR":
            scale, zero = scale[0], zero[0]
        elif entry["enc_type"] == "PER_CHANNEL":
            axis = _output_axis(entry["name"], model)
            assert shapes[entry["name"]][axis] == len(scale)
        else:
            axis, block = 1, entry["block_size"]
            shape = shapes[entry["name"]]
            scale, zero = (numbers.reshape(shape[0], shape[1] // block) for numbers in (scale, zero))
        grids[entry["name"]] = Grid(scale, zero, entry["bw"], False, axis, block)
    return grids


def _output_axis(name: str, model: onnx.ModelProto) -> int:
    """Axis of the output channels of a weight, from the operation that reads it."""
    operations = {node.op_type for node in model.graph.node if name in node.input}
    return 1 if operations & {"ConvTranspose", "MatMul"} else 0


def _grids_2_0_0(encodings: dict[str, Any], model: onnx.ModelProto) -> dict[str, Grid]:
    """Grids by the rule of schema 2.0.0, which is that of ``QuantizeLinear``."""
    grids = {}
    for entry in encodings["encodings"]:
        scale, dtype = np.array(entry["y_scale"]), entry["output_dtype"]
        zero = np.array(entry.get("y_zero_point", np.zeros_like(scale, int)))
        bits = int(dtype.removeprefix("u").removeprefix("int"))
        grids[entry["name"]] = Grid(
            scale, zero, bits, not dtype.startswith("u"), entry.get("axis"), entry.get("block_size", 0)
        )
    return grids


def _rebuilt(model: onnx.ModelProto, grids: dict[str, Grid]) -> bytes:
    """The quantized model: a pair of nodes behind each tensor that has a grid, constants as integers."""
    model = onnx.ModelProto.FromString(model.SerializeToString())
    graph = model.graph
    constants = {item.name: item for item in graph.initializer}
    nodes, heads = list(graph.node), []
    for name, grid in grids.items():
        raw = f"{name}/raw"
        inputs = {item.name for item in graph.input}
        if name in constants:
            values = numpy_helper.to_array(constants[name])
            graph.initializer.remove(constants[name])
            _add(graph, f"{name}/q", grid.integers(values), grid.type)
            heads.append(_dequantize(graph, name, grid, name))
            continue
        # What a model is given keeps its name, what it returns as well: the raw tensor is renamed, or the readers are.
        source, result = (name, f"{name}/dq") if name in inputs else (raw, name)
        for node in nodes:
            node.output[:] = [source if value == name else value for value in node.output]
            if name in inputs:
                node.input[:] = [result if value == name else value for value in node.input]
        heads.extend(_quantize(graph, source, grid, name))
        heads.append(_dequantize(graph, name, grid, result))
    del graph.node[:], graph.value_info[:]
    graph.node.extend(_in_order([*heads, *nodes], {item.name for item in (*graph.input, *graph.initializer)}))
    onnx.checker.check_model(model)
    return model.SerializeToString()


def _add(graph: onnx.GraphProto, name: str, values: np.ndarray, dtype: int) -> str:
    """A constant."""
    array = np.asarray(values).astype(helper.tensor_dtype_to_np_dtype(dtype))
    graph.initializer.append(numpy_helper.from_array(array, name))
    return name


def _quantize(graph: onnx.GraphProto, source: str, grid: Grid, name: str) -> list[onnx.NodeProto]:
    """Clip to a grid that is narrower than its type, and quantize."""
    scale = _add(graph, f"{name}/scale.q", grid.scale, TensorProto.FLOAT)
    zero = _add(graph, f"{name}/zero.q", grid.zero, grid.type)
    nodes = []
    if grid.bits not in _UNSIGNED:
        ends = [np.float32(end - grid.zero) * grid.scale for end in (grid.low, grid.high)]
        bounds = [_add(graph, f"{name}/end{index}", end, TensorProto.FLOAT) for index, end in enumerate(ends)]
        nodes.append(helper.make_node("Clip", [source, *bounds], [f"{name}/clipped"]))
        source = f"{name}/clipped"
    return [*nodes, helper.make_node("QuantizeLinear", [source, scale, zero], [f"{name}/q"])]


def _dequantize(graph: onnx.GraphProto, name: str, grid: Grid, result: str) -> onnx.NodeProto:
    """Dequantize."""
    scale = _add(graph, f"{name}/scale", grid.scale, TensorProto.FLOAT)
    zero = [] if grid.type == TensorProto.INT32 else [_add(graph, f"{name}/zero", grid.zero, grid.type)]
    return helper.make_node("DequantizeLinear", [f"{name}/q", scale, *zero], [result], **grid.attributes)


def _in_order(nodes: list[onnx.NodeProto], known: set[str]) -> list[onnx.NodeProto]:
    """Nodes behind what they read."""
    ordered: list[onnx.NodeProto] = []
    while nodes:
        ready = [node for node in nodes if all(not name or name in known for name in node.input)]
        assert ready, [list(node.input) for node in nodes]
        for node in ready:
            nodes.remove(node)
            known.update(node.output)
        ordered += ready
    return ordered


def _encodings_of(session: Any) -> dict[str, Encoding]:
    return {name: item.encoding for name, item in session.quantizers.items() if item.encoding is not None}


def _both(twin: FloatTwin) -> list[dict[str, Any]]:
    """Both files as a reader of JSON gets them, validated."""
    found = []
    for values, schema in ((encodings_1_0_0(twin), SCHEMA_1_0_0), (encodings_2_0_0(twin), SCHEMA_2_0_0)):
        read = json.loads(json.dumps(values, allow_nan=False))
        jsonschema.validate(read, schema, cls=jsonschema.Draft202012Validator)
        found.append(read)
    return found


def _check(network: OnnxNetwork, twin: FloatTwin, tensors: list[Tensor]) -> None:
    """The float model and each of the two files are the quantized model."""
    model = to_proto(twin.model)
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in model.graph.node}
    _check_names(model, twin)
    expected = ran(to_proto(network.model).SerializeToString(), tensors)
    first, second = _both(twin)
    for grids in (_grids_1_0_0(first, model), _grids_2_0_0(second, model)):
        found = ran(_rebuilt(model, grids), tensors)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert np.array_equal(one, other)
        _check_constants(model, network, grids)


def _check_constants(model: onnx.ModelProto, network: OnnxNetwork, grids: dict[str, Grid]) -> None:
    """Weights are what the simulation computes with, exactly on their grid: quantizing them changes no bit."""
    for item in model.graph.initializer:
        values = numpy_helper.to_array(item)
        if item.name in network.weights:
            assert np.array_equal(values, network.weights[item.name].weight.numpy())
        if item.name in grids:
            assert values.dtype == np.float32
            wrong = values != grids[item.name].real(values)
            # Integers that are no float32, such as those of some biases beside 16 bits, are off by their rounding.
            assert not wrong[np.abs(grids[item.name].integers(values)) < 2**22].any()
            np.testing.assert_allclose(values, grids[item.name].real(values), rtol=2**-22)


def _check_names(model: onnx.ModelProto, twin: FloatTwin) -> None:
    """Every entry is of a tensor, and no tensor has two."""
    constants = {item.name for item in model.graph.initializer}
    made = {name for node in model.graph.node for name in node.output} | {item.name for item in model.graph.input}
    first, second = _both(twin)
    activations = [entry["name"] for entry in first["activation_encodings"]]
    parameters = [entry["name"] for entry in first["param_encodings"]]
    assert set(activations) <= made | constants
    assert set(parameters) <= constants
    names = [entry["name"] for entry in second["encodings"]]
    assert names == [*activations, *parameters, *twin.biases]
    assert set(twin.biases) <= constants
    assert len(set(names)) == len(names)


def _check_quantizers(network: OnnxNetwork, twin: FloatTwin, encodings: dict[str, Encoding]) -> None:
    """Every activation quantizer of the model has an entry, at the tensor that it reads, with its clipping range."""
    first, _ = _both(twin)
    entries = {entry["name"]: entry for entry in first["activation_encodings"]}
    outputs = _names_of_outputs(network.model)
    for name, tensor in network.tensors.items():
        entry, encoding = entries[outputs.get(tensor, tensor)], encodings[name]
        scale, offset = np.float32(entry["scale"][0]), entry["offset"][0]
        assert entry["bw"] == encoding.spec.bit_width
        assert np.float32(0 + offset) * scale == float(encoding.range_min)
        assert np.float32(2 ** entry["bw"] - 1 + offset) * scale == float(encoding.range_max)


def _names_of_outputs(model: ir.Model) -> dict[str, str]:
    """Names that tensors get whose quantizer gives what the model returns."""
    found = {}
    for value in model.graph.outputs:
        node = value.producer()
        while node is not None and node.op_type in ("DequantizeLinear", "QuantizeLinear", "Clip"):
            found[str(node.inputs[0].name)] = str(value.name)
            node = node.inputs[0].producer()
    return found


@pytest.mark.parametrize(
    ("name", "target"),
    [
        *((name, "int8") for name in EXPORTABLE),
        *((name, "tensorrt") for name in EXPORTABLE),
        *(("mobilenet", target) for target in TARGETS if target not in ("int8", "tensorrt")),
        *((name, target) for name in ("resnet", "transformer_encoder", "bert") for target in ("w6a6", "w8a16", "qnn")),
        *((name, "w4a8") for name in ("inception", "transformer_encoder", "lstm", "weight_norm", "functional")),
    ],
)
def test_float_model_and_encodings_are_the_quantized_network(name: str, target: str) -> None:
    with quantized(name, target) as (session, batch):
        network, encodings = exporter_of(session, batch).onnx, _encodings_of(session)
        twin = float_twin(network, encodings)
        _check(network, twin, call_of(batch).tensors)
        _check_quantizers(network, twin, encodings)
        activations = {name for name, item in session.quantizers.items() if item.kind is Kind.ACTIVATION}
        assert set(network.tensors) == activations


@pytest.mark.parametrize(
    "target",
    [
        PER_GROUP,
        {"preset": "w8a8", "weights": {"granularity": "per_group", "group_size": 2, "symmetric": False}},
        {"preset": "w3a8", "weights": {"granularity": "per_group", "group_size": 8, "symmetric": False}},
        {"preset": "int8", "weights": {"symmetric": False}},
        {"preset": "w6a6", "activations": {"symmetric": True}},
        {"preset": "w6a6", "activations": {"symmetric": True, "narrow_range": True}},
        {"preset": "int8", "activations": {"symmetric": True, "narrow_range": True}},
        {"preset": "w8a16", "activations": {"symmetric": True}},
        "w3a5",
        "w2a12",
    ],
)
def test_any_grid_is_found_again(target: Any) -> None:
    torch.manual_seed(0)
    model, batch = Mixed().eval(), torch.randn(6, 8)
    with instrument(model, batch, target) as session:
        session.calibrate([batch])
        session.set_mode("quantize")
        network, encodings = exporter_of(session, batch).onnx, _encodings_of(session)
        twin = float_twin(network, encodings)
        _check(network, twin, [3 * batch])
        assert "relu" in twin.activations or any("relu" in name for name in twin.activations)


def test_a_session_with_some_quantizers_off_is_exported_as_it_is() -> None:
    for off in ("resnet", "transformer_encoder", "bert"):
        with quantized(off, "int8") as (session, batch):
            for quantizer in list(session.quantizers.values())[::3]:
                quantizer.mode = Mode.BYPASS
            assert {quantizer.kind for quantizer in session.quantizers.values() if quantizer.mode is Mode.BYPASS} == {
                *Kind
            }
            network, encodings = exporter_of(session, batch).onnx, _encodings_of(session)
            twin = float_twin(network, encodings)
            _check(network, twin, call_of(batch).tensors)
            assert set(twin.parameters) <= {k for k, q in session.quantizers.items() if q.mode is Mode.QUANTIZE}


class InAndOut(nn.Module):
    """What goes in comes out, too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.relu(self.layer(x)), x.reshape(-1, 2, 2), x


def test_what_goes_in_may_come_out() -> None:
    torch.manual_seed(0)
    model, batch = InAndOut().eval(), torch.randn(6, 4)
    with instrument(model, batch) as session:
        session.calibrate([batch])
        session.set_mode("quantize")
        network = exporter_of(session, batch).onnx
        _check(network, float_twin(network, _encodings_of(session)), [2 * batch])


def test_files_are_written_and_the_float_one_is_compared(tmp_path: Path) -> None:
    with quantized("resnet") as (session, batch):
        export = export_encodings(session, tmp_path, batch)
        twin = float_twin(exporter_of(session, batch).onnx, _encodings_of(session))
    assert export.agreement is Agreement.VERIFIED
    names = ["model_float.onnx", "model.encodings", "model_2.0.0.encodings"]
    assert [Path(path).name for path in export.files] == names
    assert [json.loads((tmp_path / name).read_text()) for name in names[1:]] == _both(twin)
    assert onnx.load(tmp_path / names[0]) == to_proto(twin.model)


def test_entries_say_what_the_target_says() -> None:
    with quantized("mobilenet", "w4a8") as (session, batch):
        twin = float_twin(exporter_of(session, batch).onnx, _encodings_of(session))
        first, second = _both(twin)
        stem = session.quantizers["features.0.0.weight"].encoding
    assert first["quantizer_args"] == {
        "activation_bitwidth": 8,
        "dtype": "int",
        "is_symmetric": True,
        "param_bitwidth": 4,
        "per_channel_quantization": True,
        "quant_scheme": "min_max",
    }
    entry = next(entry for entry in first["param_encodings"] if entry["name"] == "features.0.0.weight")
    assert (entry["enc_type"], entry["bw"], entry["is_sym"], set(entry["offset"])) == ("PER_CHANNEL", 4, True, {-8})
    assert entry["scale"] == stem.scale.tolist()
    entries = {entry["name"]: entry for entry in second["encodings"]}
    assert entries["features.0.0.weight"] == {
        "name": "features.0.0.weight",
        "output_dtype": "int4",
        "y_scale": stem.scale.tolist(),
        "axis": 0,
    }
    bias = entries["features.0.0.bias"]
    step = np.float32(entries["x"]["y_scale"])
    assert np.array_equal(np.float32(bias.pop("y_scale")), step * stem.scale.numpy())
    assert bias == {"name": "features.0.0.bias", "output_dtype": "int32", "axis": 0}
    assert entries["x"]["output_dtype"] == "uint8"


def test_a_network_without_quantizers_has_no_entries() -> None:
    with quantized("mobilenet") as (session, batch):
        session.set_mode("bypass")
        network = exporter_of(session, batch).onnx
        twin = float_twin(network, {})
        first, second = _both(twin)
        _check(network, twin, call_of(batch).tensors)
    assert not first["activation_encodings"] + first["param_encodings"] + second["encodings"]


def test_every_tensor_between_layers_has_an_entry() -> None:
    # All but what integer engines fuse: a layer and what stands between it and its quantizer.
    with quantized("inception") as (session, batch):
        model = float_twin(exporter_of(session, batch).onnx, _encodings_of(session))
    bare = [n.op_type for n in model.model.graph if n.outputs[0].name not in model.activations]
    assert sorted(bare) == ["Conv", "Conv", "Conv"]
    assert "max_pool2d" in model.activations


# What networks of the zoo do not have, as graphs written by hand.


def _network(text: str, names: list[str]) -> OnnxNetwork:
    """A quantized network from ONNX's own notation; ``names`` are those of its quantizers, in order."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\nagraph {text}')
    model = ir.from_proto(proto)
    nodes = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    for node, name in zip(nodes, names, strict=True):
        node.metadata_props[QUANTIZER] = name
        if node.inputs[0].producer() is not None and node.inputs[0].producer().op_type == "Clip":
            node.inputs[0].producer().metadata_props[NARROWS] = "1"
    return OnnxNetwork(model, None, {}, {}, {})  # type: ignore[arg-type]


A = Encoding(QuantSpec(8), torch.tensor(0.5), torch.tensor(100.0))
B = Encoding(QuantSpec(8), torch.tensor(0.375), torch.tensor(120.0))
# As A but for the bit-width, the scale, the zero point.
C = Encoding(QuantSpec(7), torch.tensor(0.5), torch.tensor(100.0))
D = Encoding(QuantSpec(8), torch.tensor(0.375), torch.tensor(100.0))
E = Encoding(QuantSpec(8), torch.tensor(0.5), torch.tensor(120.0))
_CONSTANTS = (
    "<float sa = {0.5}, uint8 za = {100}, float sb = {0.375}, uint8 zb = {120}, float low = {-50}, float high = {13.5}>"
)
_X = [torch.linspace(-70, 90, 161).reshape(1, -1)]
HEAD = f"(float[1, n] x) => (float[1, n] y) {_CONSTANTS}"


@pytest.mark.parametrize(
    ("text", "quantizers", "names"),
    [
        pytest.param(
            HEAD + "{ t = Neg(x) q = QuantizeLinear(t, sa, za) d = DequantizeLinear(q, sa, za)"
            " r = QuantizeLinear(t, sb, zb) e = DequantizeLinear(r, sb, zb) y = Sub(d, e) }",
            "ab",
            {"t.1": A, "t.2": B},
            id="two quantizers of one tensor",
        ),
        pytest.param(
            HEAD + "{ t = Neg(x) q = QuantizeLinear(t, sa, za) d = DequantizeLinear(q, sa, za)"
            " r = QuantizeLinear(t, sa, za) e = DequantizeLinear(r, sa, za) y = Add(d, e) }",
            "af",
            {"t": A},
            id="two quantizers that do the same",
        ),
        pytest.param(
            HEAD + "{ t = Neg(x) q = QuantizeLinear(t, sa, za) d = DequantizeLinear(q, sa, za)"
            " r = QuantizeLinear(t, sb, za) e = DequantizeLinear(r, sb, za) y = Sub(d, e) }",
            "ad",
            {"t.1": A, "t.2": D},
            id="two quantizers with one zero point",
        ),
        pytest.param(
            HEAD + "{ t = Neg(x) q = QuantizeLinear(t, sa, za) d = DequantizeLinear(q, sa, za)"
            " r = QuantizeLinear(t, sa, zb) e = DequantizeLinear(r, sa, zb) y = Sub(d, e) }",
            "ae",
            {"t.1": A, "t.2": E},
            id="two quantizers with one scale",
        ),
        pytest.param(
            HEAD + "{ t = Neg(x) q = QuantizeLinear(t, sa, za) d = DequantizeLinear(q, sa, za)"
            " c = Clip(t, low, high) r = QuantizeLinear(c, sa, za) e = DequantizeLinear(r, sa, za) y = Sub(d, e) }",
            "ac",
            {"t.1": A, "t.2": C},
            id="two quantizers with one scale and zero point, and other bit-widths",
        ),
        pytest.param(
            HEAD + "{ t = Neg(x) q = QuantizeLinear(t, sa, za) d = DequantizeLinear(q, sa, za) y = Sub(d, t) }",
            "a",
            {"t.1": A},
            id="a tensor that is read in float too",
        ),
        pytest.param(
            HEAD + "{ t = Neg(x) q = QuantizeLinear(t, sa, za) d = DequantizeLinear(q, sa, za)"
            " r = QuantizeLinear(d, sb, zb) e = DequantizeLinear(r, sb, zb) y = Neg(e) }",
            "ab",
            {"t": A, "d.1": B},
            id="one quantizer behind another",
        ),
        pytest.param(
            HEAD + "{ t = Neg(x) q = QuantizeLinear(t, sa, za) d = DequantizeLinear(q, sa, za)"
            " r = QuantizeLinear(d, sa, za) e = DequantizeLinear(r, sa, za) y = Sub(d, e) }",
            "af",
            {"t": A},
            id="one quantizer behind another that does the same",
        ),
        pytest.param(
            HEAD + "{ t = Neg(x) q = QuantizeLinear(t, sa, za) d = DequantizeLinear(q, sa, za) m = Transpose(d)"
            " w = Transpose(m) r = QuantizeLinear(w, sb, zb) e = DequantizeLinear(r, sb, zb) y = Sub(w, e) }",
            "ab",
            {"t": A, "m": A, "w": A, "w.1": B},
            id="moved values that are quantized anew and read as they are",
        ),
        pytest.param(
            HEAD + "{ t = Neg(x) q = QuantizeLinear(t, sa, za) d = DequantizeLinear(q, sa, za) m = Identity(d)"
            " r = QuantizeLinear(m, sb, zb) y = DequantizeLinear(r, sb, zb) }",
            "ab",
            {"t": A, "y": B},
            id="moved values that are only quantized anew",
        ),
        pytest.param(
            HEAD + "{ q = QuantizeLinear(x, sa, za) y = DequantizeLinear(q, sa, za) }",
            "a",
            {"x": A},
            id="an input that comes out",
        ),
        pytest.param(
            f"(float[1, n] x) => (float[1, n] t, float[1, n] y) {_CONSTANTS}"
            "{ t = Neg(x) q = QuantizeLinear(t, sa, za) y = DequantizeLinear(q, sa, za) }",
            "a",
            {"y": A},
            id="a tensor that comes out with and without quantizer",
        ),
        pytest.param(
            f"(float[1, n] x) => (float[1, n] y, int64[2] size) {_CONSTANTS}"
            "{ t = Neg(x) q = QuantizeLinear(t, sa, za) d = DequantizeLinear(q, sa, za) size = Shape(t) y = Neg(d) }",
            "a",
            {"t": A},
            id="a tensor whose shape is read",
        ),
        pytest.param(
            f"(float[1, n] x) => (float[n, 1] y) {_CONSTANTS}"
            "{ t = Neg(x) q = QuantizeLinear(t, sa, za) d = DequantizeLinear(q, sa, za) y = Transpose(d) }",
            "a",
            {"t": A, "y": A},
            id="moved values that come out",
        ),
    ],
)
def test_each_tensor_has_one_encoding(text: str, quantizers: str, names: dict[str, Encoding]) -> None:
    network = _network(text, list(quantizers))
    before = ir.to_proto(network.model).SerializeToString()
    twin = float_twin(network, {"a": A, "b": B, "c": C, "d": D, "e": E, "f": A})
    assert twin.activations == names
    _check(network, twin, _X)
    assert [value.name for value in twin.model.graph.outputs] == [value.name for value in network.model.graph.outputs]
    assert ir.to_proto(network.model).SerializeToString() == before


def test_a_bias_does_not_take_the_name_of_another_tensor() -> None:
    constants = "<float sa = {0.5}, uint8 za = {100}, int32 b.quantized = {7}, float b.scale = {0.25}, float b = {3}>"
    text = f"(float[1, n] x) => (float[1, n] y) {constants}" + (
        "{ q = QuantizeLinear(x, sa, za) d = DequantizeLinear(q, sa, za) c = DequantizeLinear(b.quantized, b.scale)"
        " t = Add(d, c) y = Mul(t, b) }"
    )
    network = _network(text.replace("b.", "b_"), ["a"])
    for value in list(network.model.graph.initializers.values()):
        if value.name.startswith("b_"):
            value.name = value.name.replace("b_", "b.")
    twin = float_twin(network, {"a": A})
    assert {name: float(scale) for name, scale in twin.biases.items()} == {"b.1": 0.25}
    _check(network, twin, _X)


def test_an_encoding_that_is_not_in_the_model_is_refused() -> None:
    text = HEAD + "{ q = QuantizeLinear(x, sa, za) y = DequantizeLinear(q, sa, za) }"
    with pytest.raises(ExportError, match="must have an encoding of 'a'"):
        float_twin(_network(text, ["a"]), {"b": A})
    with pytest.raises(ExportError, match=r"must be that of the model, scale 0\.5 and zero point 100, got 0\.375"):
        float_twin(_network(text, ["a"]), {"a": B})


def test_the_schemas_refuse_what_is_not_in_them() -> None:
    network = _network(HEAD + "{ q = QuantizeLinear(x, sa, za) y = DequantizeLinear(q, sa, za) }", ["a"])
    first, second = _both(float_twin(network, {"a": A}))
    first["activation_encodings"][0]["block_size"] = 4
    second["encodings"][0]["block_size"] = 4
    for values, schema in ((first, SCHEMA_1_0_0), (second, SCHEMA_2_0_0)):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(values, schema)

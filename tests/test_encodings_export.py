"""Encodings and float model together are the quantized model: put together again by hand, and run by ONNX Runtime."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from lightning_quantdebug import export_encodings, instrument
from lightning_quantdebug.encodings_export import FloatTwin, encodings_1_0_0, encodings_2_0_0, float_twin
from lightning_quantdebug.onnx_export import to_proto
from lightning_quantdebug.recipe import call_of
from lightning_quantdebug.report import Agreement
from tests.exporting import PER_GROUP, exporter_of, quantized, ran

_NUMBERS = {"type": "array", "items": {"type": "number"}, "minItems": 1}
_PRODUCER = {
    "type": "object",
    "properties": {"package": {"type": "string"}, "version": {"type": "string"}},
    "required": ["package", "version"],
    "additionalProperties": False,
}
_ENTRY_1 = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "enc_type": {"enum": ["PER_TENSOR", "PER_CHANNEL", "PER_BLOCK"]},
        "dtype": {"const": "INT"},
        "bw": {"type": "integer", "minimum": 2, "maximum": 32},
        "is_sym": {"type": "boolean"},
        "scale": _NUMBERS,
        "offset": {"type": "array", "items": {"type": "integer", "maximum": 0}, "minItems": 1},
        "block_size": {"type": "integer", "minimum": 1},
    },
    "required": ["name", "enc_type", "dtype", "bw", "is_sym", "scale", "offset"],
    "additionalProperties": False,
}
SCHEMA_1_0_0 = {
    "type": "object",
    "properties": {
        "version": {"const": "1.0.0"},
        "activation_encodings": {"type": "array", "items": _ENTRY_1},
        "param_encodings": {"type": "array", "items": _ENTRY_1},
        "excluded_layers": {"type": "array", "items": {"type": "string"}},
        "quantizer_args": {
            "type": "object",
            "properties": {
                "activation_bitwidth": {"type": "integer"},
                "dtype": {"const": "int"},
                "is_symmetric": {"type": "boolean"},
                "param_bitwidth": {"type": "integer"},
                "per_channel_quantization": {"type": "boolean"},
                "quant_scheme": {"type": "string"},
            },
            "additionalProperties": False,
        },
        "producer": _PRODUCER,
    },
    "required": ["version", "activation_encodings", "param_encodings", "excluded_layers", "quantizer_args", "producer"],
    "additionalProperties": False,
}
_NESTED = {"anyOf": [{"type": "number"}, {"type": "array"}]}
SCHEMA_2_0_0 = {
    "type": "object",
    "properties": {
        "version": {"const": "2.0.0"},
        "producer": _PRODUCER,
        "encodings": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "minLength": 1},
                    "output_dtype": {"type": "string", "pattern": "^u?int[0-9]+$"},
                    "y_scale": _NESTED,
                    "y_zero_point": _NESTED,
                    "axis": {"type": "integer"},
                    "block_size": {"type": "integer", "minimum": 1},
                },
                "required": ["name", "output_dtype", "y_scale"],
                "additionalProperties": False,
            },
        },
    },
    "required": ["version", "encodings"],
    "additionalProperties": False,
}

CASES: list[tuple[str, Any]] = [
    ("mobilenet", "int8"),
    ("mobilenet", "w6a6"),
    ("mobilenet", "w8a16"),
    ("resnet", "tensorrt"),
    ("inception", "w4a8"),
    ("inception", "qnn"),
    ("transformer_encoder", "int8"),
    ("reused", "w4a4"),
    ("bert", "int8"),
]


def _twin(session: Any, batch: Any) -> tuple[Any, FloatTwin]:
    network = exporter_of(session, batch).onnx
    encodings = {name: q.encoding for name, q in session.quantizers.items() if q.encoding is not None}
    return network, float_twin(network, encodings)


def _on_grid(values: np.ndarray, entry: dict[str, Any]) -> np.ndarray:
    """Quantize and dequantize as ONNX defines it, from an entry of schema 1.0.0, in float64 but for the division."""
    scale, offset = np.array(entry["scale"], np.float32), np.array(entry["offset"], np.float64)
    if entry["enc_type"] == "PER_BLOCK":
        scale = np.repeat(scale.reshape(len(values), -1), entry["block_size"], 1)
        offset = np.repeat(offset.reshape(len(values), -1), entry["block_size"], 1)
    elif entry["enc_type"] == "PER_CHANNEL":
        shape = (-1,) + (1,) * (values.ndim - 1)
        scale, offset = scale.reshape(shape), offset.reshape(shape)
    q = np.clip(np.rint((values / scale).astype(np.float64)) - offset, 0, 2.0 ** entry["bw"] - 1)
    return ((q + offset).astype(np.float32) * scale).astype(np.float32)


def _requantized(proto: Any, encodings: dict[str, Any]) -> Any:
    """The float model with a pair of nodes behind each tensor that has an activation encoding of schema 2.0.0."""
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    nodes, renamed = [], {}
    entries = {e["name"]: e for e in encodings["encodings"] if not isinstance(e["y_scale"], list)}
    constants = {item.name for item in model.graph.initializer}

    def pair(name: str) -> None:
        entry = entries[name]
        signed, bits = entry["output_dtype"][0] == "i", int(entry["output_dtype"].lstrip("uint"))
        dtype = np.dtype(f"{'' if signed else 'u'}int{8 if bits <= 8 else 16}")
        zero, step = entry.get("y_zero_point", 0), np.float32(entry["y_scale"])
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        for suffix, value in (
            ("s", step),
            ("z", np.array(zero, dtype)),
            ("lo", np.float32(low - zero) * step),
            ("hi", np.float32(high - zero) * step),
        ):
            model.graph.initializer.append(numpy_helper.from_array(np.array(value), f"{name}/{suffix}"))
        nodes.append(helper.make_node("Clip", [name, f"{name}/lo", f"{name}/hi"], [f"{name}/c"]))
        nodes.append(helper.make_node("QuantizeLinear", [f"{name}/c", f"{name}/s", f"{name}/z"], [f"{name}/q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}/q", f"{name}/s", f"{name}/z"], [f"{name}/dq"]))
        renamed[name] = f"{name}/dq"

    for item in model.graph.input:
        if item.name in entries:
            pair(item.name)
    for node in proto.graph.node:
        copied = onnx.NodeProto()
        copied.CopyFrom(node)
        copied.input[:] = [renamed.get(name, name) for name in node.input]
        nodes.append(copied)
        for name in node.output:
            if name in entries and name not in constants:
                pair(name)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for item in model.graph.output:
        item.name = renamed.get(item.name, item.name)
    return model


@pytest.mark.parametrize(("name", "target"), CASES)
def test_float_model_and_encodings_are_the_quantized_model(name: str, target: str) -> None:
    with quantized(name, target) as (session, batch):
        network, twin = _twin(session, batch)
        tensors = call_of(batch).tensors
        expected = ran(to_proto(network.model).SerializeToString(), tensors)
        activations = {q.name: q for q in session.select(kind="activation") if q.encoding is not None}
        weights = {q.name for q in session.select(kind="weight")}
    proto, first, second = to_proto(twin.model), encodings_1_0_0(twin), encodings_2_0_0(twin)
    jsonschema.validate(json.loads(json.dumps(first)), SCHEMA_1_0_0)
    jsonschema.validate(json.loads(json.dumps(second)), SCHEMA_2_0_0)
    assert not [node for node in proto.graph.node if "quantize" in node.op_type.lower()]
    # Put together again, they compute what the quantized model computes.
    found = ran(_requantized(proto, second).SerializeToString(), tensors)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    # Each name is a tensor of the model, and each quantizer has an entry.
    known = {value for node in proto.graph.node for value in (*node.input, *node.output)}
    known |= {item.name for item in (*proto.graph.input, *proto.graph.output)}
    names = [entry["name"] for entry in (*first["activation_encodings"], *first["param_encodings"])]
    assert len(names) == len(set(names))
    assert set(names) <= known
    assert {entry["name"] for entry in second["encodings"]} == {*names, *twin.biases}
    assert weights <= set(names)
    # Weights quantize to themselves, and ranges are those of the quantizers.
    stored = {item.name: numpy_helper.to_array(item) for item in proto.graph.initializer}
    for entry in first["param_encodings"]:
        np.testing.assert_array_equal(_on_grid(stored[entry["name"]], entry), stored[entry["name"]])
    entries = {entry["name"]: entry for entry in first["activation_encodings"]}
    for quantizer, tensor in network.tensors.items():
        encoding = activations[quantizer].encoding
        # What the model returns is called after that.
        outputs = [entries[item.name] for item in proto.graph.output if item.name in entries]
        same = [entry for entry in outputs if entry["scale"] == [float(encoding.scale)]]
        entry = entries[tensor] if tensor in entries else same[0]
        low, high = (
            entry["offset"][0] * entry["scale"][0],
            (2 ** entry["bw"] - 1 + entry["offset"][0]) * entry["scale"][0],
        )
        assert entry["bw"] == encoding.spec.bit_width
        assert (low, high) == pytest.approx((float(encoding.range_min), float(encoding.range_max)), rel=1e-6)


def test_blocks() -> None:
    model, batch = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), torch.randn(6, 8)
    with instrument(model, batch, PER_GROUP) as session:
        session.calibrate([batch])
        session.set_mode("quantize")
        network, twin = _twin(session, batch)
        expected = ran(to_proto(network.model).SerializeToString(), [batch])
    first, second = encodings_1_0_0(twin), encodings_2_0_0(twin)
    jsonschema.validate(first, SCHEMA_1_0_0)
    jsonschema.validate(second, SCHEMA_2_0_0)
    entry = first["param_encodings"][0]
    assert (entry["enc_type"], entry["block_size"], entry["bw"], len(entry["scale"])) == ("PER_BLOCK", 4, 4, 32)
    stored = {item.name: numpy_helper.to_array(item) for item in to_proto(twin.model).graph.initializer}
    np.testing.assert_array_equal(_on_grid(stored["0.weight"], entry), stored["0.weight"])
    found = ran(_requantized(to_proto(twin.model), second).SerializeToString(), [batch])
    np.testing.assert_array_equal(found[0], expected[0])
    entry = next(e for e in second["encodings"] if e["name"] == "0.weight")
    assert (entry["output_dtype"], entry["axis"], entry["block_size"]) == ("int4", 1, 4)
    assert np.array(entry["y_scale"]).shape == (16, 2)


def test_biases_have_the_product_of_the_scales() -> None:
    with quantized("mobilenet") as (session, batch):
        _, twin = _twin(session, batch)
    entries = {entry["name"]: entry for entry in encodings_2_0_0(twin)["encodings"]}
    for bias, layer, source in (
        ("features.0.0.bias", "features.0.0.weight", "x"),
        ("classifier.1.bias", "classifier.1.weight", "adaptive_avg_pool2d"),
    ):
        assert entries[bias]["output_dtype"] == "int32"
        products = np.float32(entries[source]["y_scale"]) * np.array(entries[layer]["y_scale"], np.float32)
        np.testing.assert_array_equal(np.array(entries[bias]["y_scale"], np.float32), products)


class _ReadTwice(nn.Module):
    """What goes in comes out, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.relu(self.a(x)), x.reshape(-1, 2, 2)


def test_what_goes_in_may_come_out() -> None:
    model, batch = _ReadTwice().eval(), torch.randn(6, 4)
    with instrument(model, batch) as session:
        session.calibrate([batch])
        session.set_mode("quantize")
        network, twin = _twin(session, batch)
        expected = ran(to_proto(network.model).SerializeToString(), [batch])
    found = ran(_requantized(to_proto(twin.model), encodings_2_0_0(twin)).SerializeToString(), [batch])
    np.testing.assert_array_equal(found[0], expected[0])


def test_files_are_written_and_the_float_one_is_compared(tmp_path: Path) -> None:
    with quantized("resnet") as (session, batch):
        export = export_encodings(session, tmp_path, batch)
    assert export.agreement is Agreement.VERIFIED
    assert [Path(path).name for path in export.files] == [
        "model_float.onnx",
        "model.encodings",
        "model_2.0.0.encodings",
    ]
    jsonschema.validate(json.loads((tmp_path / "model.encodings").read_text()), SCHEMA_1_0_0)
    jsonschema.validate(json.loads((tmp_path / "model_2.0.0.encodings").read_text()), SCHEMA_2_0_0)
    assert export.comparisons[0].rms <= 1e-5

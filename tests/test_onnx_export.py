"""The exported ONNX file against the simulation, run by ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from lightning_quantdebug import ExportError, export_onnx, instrument
from lightning_quantdebug.adaround import AdaRoundSettings, adaround
from lightning_quantdebug.bias_correction import correct_bias
from lightning_quantdebug.encoding import encoding_from_range
from lightning_quantdebug.equalization import equalize
from lightning_quantdebug.instrument import batch_runs
from lightning_quantdebug.onnx_export import to_proto
from lightning_quantdebug.onnx_parting import first_parting
from lightning_quantdebug.recipe import call_of, network_of
from lightning_quantdebug.report import Agreement
from tests import zoo
from tests.exporting import EXPORTABLE, PER_GROUP, TARGETS, exporter_of, operations, quantized, ran, simulated


def _bytes(exporter: Any) -> bytes:
    return to_proto(exporter.onnx.fused()).SerializeToString()


@pytest.mark.parametrize(
    ("name", "target"),
    [
        *((name, "int8") for name in EXPORTABLE),
        *((name, target) for name in ("mobilenet", "reused") for target in TARGETS if target != "int8"),
        *(("inception", target) for target in ("w4a4", "w8a16", "tensorrt")),
        *(("transformer_encoder", target) for target in ("w4a8", "tensorrt", "qnn")),
    ],
)
def test_the_file_gives_what_the_simulation_gives_with_integer_biases(name: str, target: str) -> None:
    with quantized(name, TARGETS[target]) as (session, batch):
        exporter = exporter_of(session, batch)
        found = ran(_bytes(exporter), call_of(batch).tensors)
        floor = exporter._floor
        with exporter._integer_biases():
            expected = simulated(session, batch)
            units = exporter.simulation.units([[t.cpu() for t in expected]])
    for one, other, unit in zip(found, expected, units, strict=True):
        step = unit or float(other.square().mean().sqrt())
        assert one.dtype == np.float32
        # Where no sum is reordered nothing differs; the floor of these small networks is 0 or a step.
        assert np.abs(one - other.numpy()).max() / step <= max(floor[0], 1e-4 if unit is None else 0.0) * 1.001


def test_int32_biases_move_outputs_by_no_more_than_a_step() -> None:
    for name in EXPORTABLE:
        with quantized(name) as (session, batch):
            exporter = exporter_of(session, batch)
            accepted = simulated(session, batch)
            with exporter._integer_biases():
                moved = simulated(session, batch)
            for one, other, unit in zip(accepted, moved, exporter.simulation.units([accepted]), strict=True):
                assert (one - other).abs().max() <= 1.001 * (unit or 1e-3), name
            assert torch.equal(simulated(session, batch)[0], accepted[0])


@pytest.mark.parametrize("name", ["mobilenet", "transformer_encoder", "lstm", "bert"])
def test_the_batch_may_have_another_size(name: str) -> None:
    with quantized(name) as (session, batch):
        exporter = exporter_of(session, batch)
        content = _bytes(exporter)
        call = call_of(batch)
        more = call.with_tensors([torch.cat([tensor, tensor.flip(0), tensor[:1]]) for tensor in call.tensors])
        found = ran(content, more.tensors)
        with exporter._integer_biases():
            expected = simulated(session, more.kwargs or more.args)
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one, other.numpy())
    shape = onnx.load_from_string(content).graph.input[0].type.tensor_type.shape.dim[0]
    assert shape.dim_param == "batch"


def test_a_batch_of_one_is_as_good_an_example() -> None:
    model, batch = zoo.make("mobilenet")
    with instrument(model, batch[:1]) as session:
        session.calibrate([batch])
        session.set_mode("quantize")
        exporter = exporter_of(session, batch[:1])
        found = ran(_bytes(exporter), [batch])
        with exporter._integer_biases():
            assert np.array_equal(found[0], simulated(session, batch)[0].numpy())


def test_per_group_weights_are_blocks_of_four_bits() -> None:
    model, batch = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval(), torch.randn(6, 8)
    with instrument(model, batch, PER_GROUP) as session:
        session.calibrate([batch])
        session.set_mode("quantize")
        exporter = exporter_of(session, batch)
        content = _bytes(exporter)
        assert np.array_equal(ran(content, [batch])[0], simulated(session, batch)[0].numpy())
    graph = onnx.load_from_string(content).graph
    stored = {item.name: item for item in graph.initializer}
    assert stored["0.weight"].data_type == onnx.TensorProto.INT4
    assert len(stored["0.weight"].raw_data) == 16 * 8 // 2
    blocks = [a.i for node in graph.node for a in node.attribute if a.name == "block_size" and a.i]
    assert blocks == [4, 4]


@pytest.mark.parametrize(
    ("target", "weight", "activation"),
    [
        ("int8", "INT8", "UINT8"),
        ("w4a8", "INT4", "UINT8"),
        ("w8a16", "INT8", "UINT16"),
        ("w16a16", "INT16", "UINT16"),
        ("tensorrt", "INT8", "INT8"),
        ("w4a4", "INT4", "UINT8"),
        ({"preset": "int8", "weights": {"symmetric": False}}, "UINT8", "UINT8"),
        ({"preset": "w4a8", "weights": {"symmetric": False}}, "UINT4", "UINT8"),
    ],
)
def test_integers_are_stored_as_such(target: Any, weight: str, activation: str) -> None:
    with quantized("mobilenet", target) as (session, batch):
        exporter = exporter_of(session, batch)
        proto = to_proto(exporter.onnx.fused())
        found = ran(proto.SerializeToString(), [batch])
        with exporter._integer_biases():
            assert np.array_equal(found[0], simulated(session, batch)[0].numpy())
    stored = {item.name: item for item in proto.graph.initializer}
    types = {stored[node.input[2]].data_type for node in proto.graph.node if node.op_type == "QuantizeLinear"}
    assert types == {onnx.TensorProto.DataType.Value(activation)}
    weights = [stored[name] for name in session.quantizers if name.endswith("weight")]
    assert {item.data_type for item in weights} == {onnx.TensorProto.DataType.Value(weight)}
    # Nothing of the float weights is left in the file.
    in_float = [i for i in proto.graph.initializer if i.data_type == onnx.TensorProto.FLOAT and len(i.dims) > 1]
    assert not in_float


def test_biases_are_int32_with_the_product_of_the_scales() -> None:
    with quantized("mobilenet") as (session, batch):
        proto = to_proto(exporter_of(session, batch).onnx.fused())
    stored = {item.name: onnx.numpy_helper.to_array(item) for item in proto.graph.initializer}
    makers = {node.output[0]: node for node in proto.graph.node}
    seen = 0
    for node in proto.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            x, w, b = (makers[name] for name in node.input)
            assert stored[b.input[0]].dtype == np.int32
            np.testing.assert_array_equal(stored[b.input[1]], stored[x.input[1]] * stored[w.input[1]])
            seen += 1
    assert seen == 8


def test_a_bias_that_does_not_fit_into_int32_stays_in_float_and_is_named(tmp_path: Path) -> None:
    model, batch = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)).eval(), torch.randn(8, 4)
    with torch.no_grad():
        model[0].weight.mul_(1e-12)
        model[0].bias.zero_()
    with instrument(model, batch) as session:
        session.calibrate([batch])
        session.set_mode("quantize")
        exporter = exporter_of(session, batch)
        assert exporter.onnx.too_large == ("2.bias",)
        found = ran(_bytes(exporter), [batch])
        assert np.array_equal(found[0], simulated(session, batch)[0].numpy())


def test_tensors_are_called_as_in_the_report() -> None:
    with quantized("mobilenet") as (session, batch):
        network = exporter_of(session, batch).onnx
        proto = to_proto(network.model)
        activations = [q.name for q in session.select(kind="activation")]
        weights = [q.name for q in session.select(kind="weight")]
    assert list(network.tensors) == activations
    tensors = {name for node in proto.graph.node for name in (*node.input, *node.output)}
    assert set(network.tensors.values()) <= tensors
    assert network.tensors["features.2.conv.0.2"] == "features.2.conv.0.2"
    assert set(weights) <= {item.name for item in proto.graph.initializer}
    assert [item.name for item in proto.graph.input] == ["x"]
    assert [item.name for item in proto.graph.output] == ["output"]


def test_inputs_and_outputs_are_called_as_in_the_code() -> None:
    with quantized("bert") as (session, batch):
        proto = to_proto(exporter_of(session, batch).onnx.fused())
    assert [item.name for item in proto.graph.input] == ["input_ids", "attention_mask"]
    assert [item.name for item in proto.graph.output] == ["logits", "hidden_0", "hidden_1"]


@pytest.mark.parametrize(
    ("name", "integer", "in_float"),
    [
        ("mobilenet", {"QLinearConv": 7, "QLinearAdd": 1, "QGemm": 1}, ("Conv", "Clip", "Gemm", "Add", "FusedConv")),
        ("resnet", {"QLinearConv": 6, "QLinearAdd": 2, "QGemm": 1}, ("Conv", "Relu", "Gemm", "Add", "MaxPool")),
        ("transformer_encoder", {"QGemm": 9, "QLinearAdd": 4}, ("Gemm", "Add", "Relu")),
        ("bert", {"QGemm": 5, "QLinearMatMul": 2}, ("Gemm", "MatMul")),
    ],
)
def test_onnx_runtime_runs_it_as_integers(
    name: str, integer: dict[str, int], in_float: tuple[str, ...], tmp_path: Path
) -> None:
    with quantized(name) as (session, batch):
        counts = operations(_bytes(exporter_of(session, batch)), lambda: str(tmp_path / "o.onnx"))
    assert {op: counts.get(op, 0) for op in integer} == integer
    assert not [op for op in in_float if counts.get(op) and not (name == "bert" and op == "Add")]


@pytest.mark.parametrize("name", EXPORTABLE)
def test_what_makes_it_fit_for_integer_kernels_changes_nothing(name: str) -> None:
    with quantized(name) as (session, batch):
        network = exporter_of(session, batch).onnx
        tensors = call_of(batch).tensors
        plain = ran(to_proto(network.model).SerializeToString(), tensors)
        fused = ran(to_proto(network.fused()).SerializeToString(), tensors)
    for one, other in zip(plain, fused, strict=True):
        assert np.array_equal(one, other)


def test_after_equalization_bias_correction_and_learned_rounding() -> None:
    model, batch = zoo.make("mobilenet")[0], torch.randn(32, 3, 16, 16)
    with instrument(model, batch, "w4a8_per_tensor") as session:
        session.calibrate([batch])
        runs = batch_runs(session, [batch])
        assert equalize(session, runs).changed
        session.calibrate([batch])
        assert correct_bias(session, runs).changed
        assert adaround(session, runs, AdaRoundSettings(iterations=200)).changed
        session.set_mode("quantize")
        exporter = exporter_of(session, batch)
        assert any(a.bounds_scale is not None for a in session.adjustments.values())
        assert any(a.weight_correction is not None for a in session.adjustments.values())
        found = ran(_bytes(exporter), [batch])
        with exporter._integer_biases():
            expected = simulated(session, batch)
        assert np.array_equal(found[0], expected[0].numpy())


def test_scales_that_were_trained() -> None:
    with quantized("mobilenet") as (session, batch):
        for quantizer in session.quantizers.values():
            learned = quantizer.learn()
            with torch.no_grad():
                learned.ratio.mul_(1.1)
        exporter = exporter_of(session, batch)
        found = ran(_bytes(exporter), [batch])
        with exporter._integer_biases():
            assert np.array_equal(found[0], simulated(session, batch)[0].numpy())


def test_single_quantizers_at_other_bit_widths_or_off() -> None:
    with quantized("mobilenet") as (session, batch):
        for name, width in (("features.1.add", 16), ("features.2.conv.0.2", 5), ("features.0.0.weight", 3)):
            session.quantizers[name].set_bit_width(width)
        session.set_mode("bypass", "features.1.conv.3")
        session.set_mode("bypass", "classifier.1.weight")
        exporter = exporter_of(session, batch)
        content = _bytes(exporter)
        with exporter._integer_biases():
            expected = simulated(session, batch)
        assert np.array_equal(ran(content, [batch])[0], expected[0].numpy())
    assert "features.1.conv.3" not in exporter.onnx.tensors
    stored = {item.name: item.data_type for item in onnx.load_from_string(content).graph.initializer}
    assert stored["features.0.0.weight"] == onnx.TensorProto.INT4
    assert stored["classifier.1.weight"] == onnx.TensorProto.FLOAT


class _TwoAlike(nn.Module):
    """Two layers with equal weights and biases, whose inputs have other scales; one of them is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.load_state_dict(self.a.state_dict())

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = torch.relu(self.a(x))
        return x, {"twice": self.b(7 * x) + self.b(x)}


def test_equal_layers_keep_biases_of_their_own() -> None:
    torch.manual_seed(0)
    model, batch = _TwoAlike().eval(), torch.randn(16, 4)
    with instrument(model, batch) as session:
        session.calibrate([batch])
        session.set_mode("quantize")
        exporter = exporter_of(session, batch)
        found = ran(_bytes(exporter), [batch])
        names = [item.name for item in to_proto(exporter.onnx.model).graph.output]
        with exporter._integer_biases():
            expected = simulated(session, batch)
    assert names == ["output_0", "output_1_twice"]
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one, other.numpy())


def test_a_planted_fault_is_found_and_named() -> None:
    with quantized("mobilenet") as (session, batch):
        exporter = exporter_of(session, batch)
        network, call = exporter.onnx, call_of(batch)
        with exporter._integer_biases():
            assert first_parting(network, session, exporter.network, call) is None
            scale = network.model.graph.initializers["features.2.conv.0.0.weight.scale"]
            scale.const_value = ir.tensor(scale.const_value.numpy() * np.float32(1.5), name=scale.name)
            parting = first_parting(network, session, exporter.network, call)
    assert parting is not None
    assert "'features.2.conv.0.2'" in parting


def test_data_dependent_code_is_refused_with_its_line() -> None:
    line = next(
        index for index, text in enumerate(Path(zoo.__file__).read_text().splitlines(), 1) if "if x.sum() > 0" in text
    )
    with quantized("branching") as (session, batch), pytest.raises(ExportError, match=rf"zoo.py:{line} .*depends on"):
        _ = exporter_of(session, batch).onnx
    assert "forward" not in session.root.__dict__


def test_code_that_fixes_the_batch_is_said(tmp_path: Path) -> None:
    with quantized("vision_transformer") as (session, batch):
        export = export_onnx(session, tmp_path / "m.onnx", batch)
        assert export.agreement is Agreement.VERIFIED
        assert "the code of the network fixes the batch" in export.reason
        from lightning_quantdebug.onnx_runtime import OnnxFile

        more = torch.cat([batch, batch.flip(0), batch[:1]])
        exporter = exporter_of(session, batch)
        with exporter._integer_biases():
            expected = simulated(session, more)[0]
        assert torch.equal(OnnxFile(tmp_path / "m.onnx")([more])[0], expected)


def test_what_is_no_float32_is_refused(tmp_path: Path) -> None:
    model, batch = nn.Sequential(nn.Linear(4, 4)).double(), torch.randn(2, 4, dtype=torch.float64)
    with instrument(model, batch) as session:
        session.calibrate([batch])
        session.set_mode("quantize")
        with pytest.raises(ExportError, match=r"'0.weight' is torch.float64, only float32 .*model.float\(\)"):
            export_onnx(session, tmp_path / "m.onnx", batch)


def test_a_float_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"Linear has no quantizers. Give what `apply_recipe"):
        export_onnx(nn.Linear(2, 2), tmp_path / "m.onnx", torch.zeros(1, 2))
    model, batch = nn.Linear(2, 2), torch.zeros(1, 2)
    with instrument(model, batch), pytest.raises(ExportError, match="No quantizer has a range yet: call `calibrate`"):
        export_onnx(model, tmp_path / "m.onnx", batch)


def test_the_model_is_as_it_was(tmp_path: Path) -> None:
    model, batch = zoo.make("mobilenet")
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    with instrument(model, batch) as session:
        session.calibrate([batch])
        session.set_mode("quantize")
        export_onnx(model, tmp_path / "m.onnx", batch)
        assert session.adjustments == {}
        assert network_of(session, call_of(batch)).path == ""
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), random)
    assert "forward" not in model.__dict__
    assert not model._forward_hooks


@pytest.mark.parametrize(("top", "kept"), [(12.0, True), (6.0, False), (3.0, False)])
def test_clipping_stays_where_the_grid_goes_further(top: float, kept: bool) -> None:
    model, batch = nn.Sequential(nn.Linear(4, 8), nn.ReLU6(), nn.Linear(8, 2)).eval(), 20 * torch.randn(32, 4)
    with instrument(model, batch) as session:
        session.calibrate([batch])
        quantizer = session.quantizers["1"]
        quantizer.encoding = encoding_from_range(torch.tensor(0.0), torch.tensor(top), quantizer.spec)
        session.set_mode("quantize")
        exporter = exporter_of(session, batch)
        proto = to_proto(exporter.onnx.fused())
        found = ran(proto.SerializeToString(), [batch])
        with exporter._integer_biases():
            assert np.array_equal(found[0], simulated(session, batch)[0].numpy())
    assert ("Clip" in {node.op_type for node in proto.graph.node}) is kept

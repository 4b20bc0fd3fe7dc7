"""What proves or explains a difference, against slow float64 twins and planted faults."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_quantdebug import export_onnx, export_pt2
from lightning_quantdebug import onnx_runtime as runtime
from lightning_quantdebug.export_check import (
    compare,
    difference,
    equal_predictions,
    full_precision,
    in_parts,
    is_within_floor,
)
from lightning_quantdebug.report import Agreement, Comparison
from tests.exporting import exporter_of, quantized, simulated


def _twin(reference: list[list[Tensor]], found: list[list[Tensor]], units: list[float | None]) -> tuple[float, float]:
    """The definition, value by value."""
    gaps = []
    for index, unit in enumerate(units):
        ones = [float(v) for batch in reference for v in batch[index].flatten()]
        others = [float(v) for batch in found for v in batch[index].flatten()]
        step = unit or math.sqrt(sum(v * v for v in ones) / len(ones))
        gaps += [abs(a - b) / step for a, b in zip(ones, others, strict=True)]
    return max(gaps), math.sqrt(sum(g * g for g in gaps) / len(gaps))


def test_differences_equal_their_definition() -> None:
    torch.manual_seed(0)
    reference = [[torch.randn(3, 4), torch.randn(3)], [torch.randn(2, 4), torch.randn(2)]]
    found = [[tensor + 0.1 * torch.randn_like(tensor) for tensor in batch] for batch in reference]
    for units in ([0.5, 0.25], [0.5, None], [None, None]):
        assert difference(reference, found, units) == pytest.approx(_twin(reference, found, units), rel=1e-9)


def test_other_shapes_and_nan_differ_infinitely_and_equal_nan_do_not() -> None:
    one, nan = torch.ones(2), torch.tensor([1.0, math.nan])
    assert difference([[one]], [[torch.ones(3)]], [1.0]) == (math.inf, math.inf)
    assert difference([[one]], [[nan]], [1.0])[0] == math.inf
    assert difference([[nan]], [[nan.clone()]], [1.0]) == (0.0, 0.0)
    assert difference([[torch.tensor([math.inf])]], [[torch.tensor([math.inf])]], [1.0]) == (0.0, 0.0)


def test_equal_predictions_count_samples_or_values() -> None:
    one = torch.tensor([[0.0, 2.0, 1.0], [5.0, 1.0, 1.0]])
    other = torch.tensor([[0.0, 2.0, 3.0], [4.0, 1.0, 1.0]])
    assert equal_predictions([one], [other], 1) == 0.5
    assert equal_predictions([one], [other], None) == pytest.approx(4 / 6)
    assert equal_predictions([one], [other[:, :2]], 1) == 0.0


@pytest.mark.parametrize(
    ("largest", "rms", "floor_rms", "on_grid", "good"),
    [
        (0.0, 0.0, 0.0, True, True),
        (3.0, 0.5, 0.25, True, True),
        (3.0, 0.51, 0.25, True, False),
        (1.0, 0.1, 0.0, True, True),
        (1.0, 0.11, 0.0, True, False),
        (2.0, 0.05, 0.0, True, False),
        (2.0, 1e-4, 0.0, False, True),
        (2.0, 1.1e-4, 0.0, False, False),
    ],
)
def test_what_counts_as_agreement(largest: float, rms: float, floor_rms: float, on_grid: bool, good: bool) -> None:
    comparison = Comparison("", 1, largest, rms, 4 * floor_rms, floor_rms, 1.0)
    assert is_within_floor(comparison, on_grid) is good


def test_the_floor_is_what_a_part_in_a_million_does() -> None:
    with quantized("mobilenet", "w8a16") as (session, batch):
        simulation = exporter_of(session, batch).simulation
        reference = simulation.outputs()
        floor = simulation.floor(reference, simulation.units(reference))
        again = simulation.floor(reference, simulation.units(reference))
    # 16 bits: steps so fine that a part in a million moves some values by a step, and none by many.
    assert floor == again
    assert 0.0 < floor[1] < 1.0 <= floor[0] <= 3.0


def test_outputs_that_lie_on_no_grid_have_no_step() -> None:
    with quantized("mobilenet") as (session, batch):
        simulation = exporter_of(session, batch).simulation
        step = float(session.quantizers["classifier.1"].encoding.scale)
        assert simulation.units(simulation.outputs()) == [step]
        session.set_mode("bypass", "classifier.1")
        assert simulation.units(simulation.outputs()) == [None]


@pytest.mark.parametrize("fault", [lambda x: x + 0.05, lambda x: 1.05 * x, lambda x: x.roll(1, 0), torch.zeros_like])
def test_planted_faults_are_no_noise(fault: Any) -> None:
    with quantized("mobilenet") as (session, batch):
        exporter = exporter_of(session, batch)
        found = compare(exporter.simulation, lambda tensors: [fault(simulated(session, tensors[0])[0])], "faulty")
    assert not is_within_floor(found, on_grid=True)


def _saturating(monkeypatch: pytest.MonkeyPatch, ways: tuple[runtime.Way, ...]) -> None:
    """ONNX Runtime as on a CPU whose kernels cut sums off, in some of the ways in which it can be run."""
    plain = runtime.OnnxFile.__call__
    made = runtime.OnnxFile.__init__

    def init(self: Any, model: Any, way: runtime.Way = runtime.Way.USUAL, threads: int = 0) -> None:
        self.way = way
        made(self, model, way, threads)

    def call(self: Any, tensors: Any) -> list[Tensor]:
        results = plain(self, tensors)
        return [r.clamp(max=float(r.median())) for r in results] if self.way in ways else results

    monkeypatch.setattr(runtime.OnnxFile, "__init__", init)
    monkeypatch.setattr(runtime.OnnxFile, "__call__", call)


def test_saturation_is_told_from_other_changes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with quantized("mobilenet") as (session, batch):
        _saturating(monkeypatch, (runtime.Way.USUAL,))
        export = export_onnx(session, tmp_path / "m.onnx", batch)
        assert export.agreement is Agreement.UNVERIFIED
        assert "U8S8 saturation: this CPU has no VNNI" in export.reason
        assert [c.runtime for c in export.comparisons] == [way.value for way in runtime.Way]
    with quantized("mobilenet") as (session, batch):
        monkeypatch.undo()
        _saturating(monkeypatch, (runtime.Way.USUAL, runtime.Way.PRECISE))
        export = export_onnx(session, tmp_path / "m.onnx", batch)
        assert (
            export.reason
            == "ONNX Runtime's graph optimizations change what the file computes; without them it is right"
        )


def test_a_file_that_is_wrong_by_itself_names_where_it_parts(tmp_path: Path) -> None:
    with quantized("mobilenet") as (session, batch):
        exporter = exporter_of(session, batch)
        assert exporter.onnx
        # What is simulated changes after the file was made.
        with torch.no_grad():
            session.root.features[1].conv[1][0].weight.mul_(-1.3)
        export = exporter.write_onnx(tmp_path / "m.onnx")
    assert export.agreement is Agreement.UNVERIFIED
    assert (
        "it differs from the simulation by itself: the first quantizer to differ is 'features.1.conv" in export.reason
    )


@pytest.mark.parametrize("name", ["mobilenet", "resnet", "transformer_encoder", "lstm", "bert", "functional", "reused"])
def test_pt2_gives_what_the_simulation_gives_bit_for_bit(name: str, tmp_path: Path) -> None:
    with quantized(name) as (session, batch):
        export = export_pt2(session, tmp_path / "m.pt2", batch)
        expected = simulated(session, batch)
        call = exporter_of(session, batch).calls[0]
    assert export.agreement is Agreement.VERIFIED
    assert export.comparisons[0].largest == 0.0
    module = torch.export.load(str(tmp_path / "m.pt2")).module()
    with torch.no_grad():
        for one, other in zip(module(*call.tensors), expected, strict=True):
            assert torch.equal(one, other)
        more = [torch.cat([tensor, tensor[:1]]) for tensor in call.tensors]
        assert torch.equal(module(*more)[0][: len(expected[0])], expected[0])


def test_pt2_holds_integers_and_no_float_weights(tmp_path: Path) -> None:
    with quantized("mobilenet") as (session, batch):
        export_pt2(session, tmp_path / "m.pt2", batch)
    program = torch.export.load(str(tmp_path / "m.pt2"))
    large = [tensor for tensor in program.state_dict.values() if tensor.ndim > 1]
    assert {tensor.dtype for tensor in large} == {torch.int8}
    namespaces = {str(node.target).split(".")[0] for node in program.graph.nodes if node.op == "call_function"}
    assert namespaces == {"aten"}


def test_a_fixed_batch_is_run_part_by_part() -> None:
    sizes = []

    def run(tensors: Any) -> list[Tensor]:
        sizes.append(len(tensors[0]))
        return [tensors[0] * 2]

    x = torch.arange(7.0).view(7, 1)
    assert torch.equal(in_parts(run, 3)([x])[0], 2 * x)
    assert sizes == [3, 3, 3]


def test_tf32_is_off_only_inside() -> None:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = True
    try:
        with full_precision():
            assert not matmul.allow_tf32
        assert matmul.allow_tf32
    finally:
        matmul.allow_tf32 = before


def test_a_broken_file_is_an_error_of_ours(tmp_path: Path) -> None:
    from lightning_quantdebug import ExportError

    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(ExportError, match="ONNX Runtime can not load the exported model"):
        runtime.OnnxFile(tmp_path / "m.onnx")

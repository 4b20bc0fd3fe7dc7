from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_quantdebug.granularity import refine
from lightning_quantdebug.instrument import Instrumentation, batch_runs, instrument
from lightning_quantdebug.layers import Visit
from lightning_quantdebug.target import Granularity, QuantTarget
from tests import zoo

PER_TENSOR = {"weights": {"granularity": "per_tensor"}}
FOUR_BITS = {"preset": "w4a8", "weights": {"granularity": "per_tensor", "range_setting": "min_max"}}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.Flatten(1),
        nn.Linear(4 * 49, 64), nn.ReLU(), nn.Linear(64, 5),
    ).eval()  # fmt: skip


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def refined(model: nn.Module, target: Any, granularity: Granularity, batch: Any = X) -> tuple[Any, Any, Any]:
    """What was applied, the specs by name, and the scales by name."""
    with instrument(model, batch, target) as q:
        q.calibrate([batch])
        applied = refine(q, batch_runs(q, [batch]), granularity)
        weights = {layer.quantizer.name: layer.quantizer for layer in q.layers}
        return applied, {n: w.spec for n, w in weights.items()}, {n: w.encoding for n, w in weights.items()}


def test_every_weight_gets_one_scale_for_each_output_channel() -> None:
    model = net()
    model[0].weight.data[3] *= 40
    applied, specs, encodings = refined(model, PER_TENSOR, Granularity.PER_CHANNEL)
    assert applied.changed == ("0.weight", "3.weight", "5.weight", "7.weight")
    assert applied.skipped == ()
    assert applied.note == "4 weights per channel"
    assert {spec.granularity for spec in specs.values()} == {Granularity.PER_CHANNEL}
    norm = model[1]
    folded = model[0].weight * (norm.weight / (norm.running_var + norm.eps).sqrt()).view(-1, 1, 1, 1)
    # Twin: the widest value of each channel over the highest level.
    values = folded.detach().double().numpy().reshape(8, -1)
    twin = np.maximum(values.max(1) / 127, -values.min(1) / 128)
    np.testing.assert_allclose(encodings["0.weight"].scale.numpy(), twin, rtol=1e-6)
    transposed = model[3].weight.detach().double().numpy().transpose(1, 0, 2, 3).reshape(4, -1)
    np.testing.assert_allclose(
        encodings["3.weight"].scale.numpy(), np.maximum(transposed.max(1) / 127, -transposed.min(1) / 128), rtol=1e-6
    )


def test_linear_layers_get_one_scale_for_each_group_of_inputs() -> None:
    applied, specs, encodings = refined(net(), FOUR_BITS, Granularity.PER_GROUP)
    assert applied.changed == ("7.weight",), "196 inputs are no multiple of 32, and a convolution has no groups"
    assert {reason for _, reason in applied.skipped} == {
        "its shape (8, 3, 3, 3) can not be quantized per_group",
        "its shape (8, 4, 2, 2) can not be quantized per_group",
        "its shape (64, 196) can not be quantized per_group",
    }
    assert specs["7.weight"].group_size == 32
    assert encodings["7.weight"].scale.shape == (5, 2)
    weight = net()[7].weight.detach().double().numpy().reshape(5, 2, 32)
    twin = np.maximum(weight.max(2) / 7, -weight.min(2) / 8)
    np.testing.assert_allclose(encodings["7.weight"].scale.numpy(), twin, rtol=1e-6)


@pytest.mark.parametrize("target", ["int8_per_tensor", "qnn", "w4a8_per_tensor"])
def test_a_target_that_forbids_it_is_respected(target: str) -> None:
    applied, specs, _ = refined(net(), target, Granularity.PER_CHANNEL)
    assert applied.changed == ()
    assert applied.skipped == (
        (
            target,
            "the target allows no finer granularity than per_tensor; set `finest_granularity` if your engine does",
        ),
    )
    assert {spec.granularity for spec in specs.values()} == {Granularity.PER_TENSOR}


def test_what_is_fine_enough_stays() -> None:
    applied, _, _ = refined(net(), "int8", Granularity.PER_CHANNEL)
    assert applied.changed == ()
    assert {reason for _, reason in applied.skipped} == {"is per_channel already"}
    assert applied.note == ""


def test_what_the_engine_quantizes_per_tensor_stays_so() -> None:
    applied, specs, _ = refined(net(), {"preset": "xnnpack", **PER_TENSOR}, Granularity.PER_CHANNEL)
    assert applied.changed == ("0.weight", "3.weight")
    reason = "xnnpack quantizes weights of this kind per_tensor"
    assert applied.skipped == (("5.weight", reason), ("7.weight", reason))
    assert [spec.granularity.value for spec in specs.values()] == [*["per_channel"] * 2, *["per_tensor"] * 2]


def test_a_learned_rounding_keeps_its_encoding() -> None:
    model = net()
    with instrument(model, X, PER_TENSOR) as q:
        q.calibrate([X])
        q.quantizers["0.weight"].freeze()
        before = q.quantizers["0.weight"].encoding
        applied = refine(q, batch_runs(q, [X]), Granularity.PER_CHANNEL)
        assert ("0.weight", "its rounding was learned for the encoding that it has") in applied.skipped
        assert q.quantizers["0.weight"].encoding is before


@pytest.mark.parametrize("name", sorted(zoo.ZOO))
def test_any_network_quantizes_at_least_as_well_per_channel(name: str) -> None:
    model, batch = zoo.make(name)
    with instrument(model, batch, PER_TENSOR) as q:
        q.calibrate([batch])

        def visit(run: Any, index: int) -> None:
            weights = q.effective_weights(run)
            errors = []
            for refined_now in (False, True):
                if refined_now:
                    refine(q, batch_runs(q, [batch]), Granularity.PER_CHANNEL)
                with q.modes("quantize", kind="weight"):
                    pairs = [(weights[x.key][0], x.quantizer(weights[x.key][0])) for x in q.layers if x.key in weights]
                errors.append(sum(float((exact - rounded).square().sum()) for exact, rounded in pairs))
            # No step is wider than before. Rounding is partly luck, of which there is little in many weights.
            assert errors[1] <= 1.1 * errors[0]

        batch_runs(q, [batch])(visit)


class Branching(nn.Module):
    """Takes one of two layers, as the data decides."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if float(x.sum()) > 0 else self.other(x)


def test_a_weight_that_the_first_batch_does_not_reach_is_not_left_without_a_range() -> None:
    model, batches = Branching().eval(), [torch.ones(2, 4), -torch.ones(2, 4)]
    session = Instrumentation(model, QuantTarget.from_value(PER_TENSOR))
    for batch in batches:
        session.record(lambda batch=batch: model(batch))
    session.place()

    def runs(visit: Visit, most: int | None = None) -> None:
        with torch.no_grad():
            for index, batch in enumerate(batches[:most]):
                visit(lambda batch=batch: session.run(lambda: model(batch)), index)

    with session.observing():
        runs(lambda run, index: run())
    assert refine(session, runs, Granularity.PER_CHANNEL).changed == ("one.weight", "other.weight")
    assert all(layer.quantizer.is_calibrated for layer in session.layers)

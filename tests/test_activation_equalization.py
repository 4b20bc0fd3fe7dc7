"""Activation-aware equalization: its scales, the error it goes by, and what it gains."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quantdebug import activation_equalization, channel_rules
from lightning_quantdebug.activation_equalization import ActivationRanges, equalize_activations
from lightning_quantdebug.channel_groups import ChannelGroups, effective_weights, find_channel_groups
from lightning_quantdebug.instrument import Instrumentation, batch_runs, instrument
from lightning_quantdebug.layers import Runs
from lightning_quantdebug.report import Cause
from lightning_quantdebug.traces import relative_error, tensors_of
from tests import zoo
from tests.channel_cases import CASES, make
from tests.channel_networks import Experts, Net, conv

torch.set_num_threads(1)

PER_TENSOR = {"preset": "int8", "weights": {"granularity": "per_tensor"}}


def largest(values: Tensor, axis: int) -> np.ndarray[Any, Any]:
    """Largest magnitude of each channel, by loops, in float64."""
    moved = np.moveaxis(values.detach().numpy().astype(np.float64), axis, 0)
    return np.array([max(abs(value) for value in channel.ravel()) for channel in moved])


def quantize(values: np.ndarray[Any, Any], low: float, high: float, signed: bool) -> np.ndarray[Any, Any]:
    """Fake-quantization to 8 bits, per tensor."""
    if signed:
        scale = max(high / 127, -low / 128)
        return np.clip(np.round(values / scale), -128, 127) * scale
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255
    zero = np.round(-low / scale)
    return (np.clip(np.round(values / scale) + zero, 0, 255) - zero) * scale


def with_outlier(seed: int = 0) -> tuple[nn.Module, Tensor]:
    """A LayerNorm with one channel a hundred times as large as the others, read by two layers."""
    torch.manual_seed(seed)
    model = Net(lambda m, x: m.a(y := m.n(x)) + m.b(y), n=nn.LayerNorm(8), a=nn.Linear(8, 6), b=nn.Linear(8, 6)).eval()
    with torch.no_grad():
        nn.init.uniform_(model.n.weight, 0.5, 2.0)
        model.n.weight[3] = 100.0
        model.a.weight[:, 3] *= 0.01
        model.b.weight[:, 3] *= 0.02
    return model, torch.randn(64, 8)


def _changes_are_good(session: Instrumentation, runs: Runs, groups: ChannelGroups, scale: Tensor) -> Tensor:
    """Errors by which the first exponent is taken in every stage."""
    return torch.full((groups.stage_count,), 1.0 if bool((scale == 1).all()) else 0.5, dtype=torch.float64)


def scale_of(session: Instrumentation, operation: str, name: str = "weight_scale") -> Tensor:
    """What an operation is scaled by."""
    return next(getattr(adjustment, name) for key, adjustment in session.adjustments.items() if key.path == operation)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_scales_behind_a_normalization_are_those_of_smoothquant(alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_equalization, "EXPONENTS", (alpha,))
    monkeypatch.setattr(activation_equalization, "_errors", _changes_are_good)
    model, batch = with_outlier()
    with instrument(model, batch) as session, torch.no_grad():
        session.calibrate([batch])
        equalize_activations(session, batch_runs(session, [batch[:32], batch[32:]]))
        x = largest(model.n(batch), 1)
        w = np.maximum(largest(model.a.weight, 1), largest(model.b.weight, 1))
        s = x**alpha / w ** (1 - alpha)
        s /= np.exp(np.log(s).mean())
        np.testing.assert_allclose(scale_of(session, "a")[0], s, rtol=1e-5)
        np.testing.assert_allclose(scale_of(session, "n"), 1 / s, rtol=1e-5)
        np.testing.assert_allclose(scale_of(session, "n", "bias_scale"), 1 / s, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 1.0])
def test_scales_between_two_weights_balance_all_three(alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activation_equalization, "EXPONENTS", (alpha,))
    monkeypatch.setattr(activation_equalization, "_errors", _changes_are_good)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 1)).eval()
    batch = torch.randn(4, 3, 6, 6)
    with torch.no_grad():
        a = largest(F.relu(model[0](batch)), 1)
    s = a**alpha * np.sqrt(largest(model[0].weight, 0) / largest(model[2].weight, 1)) ** (1 - alpha)
    s /= np.exp(np.log(s).mean())
    with instrument(model, batch) as session:
        session.calibrate([batch])
        equalize_activations(session, batch_runs(session, [batch]))
        np.testing.assert_allclose(scale_of(session, "2")[0].flatten(), s, rtol=1e-5)
        np.testing.assert_allclose(scale_of(session, "0")[:, 0].flatten(), 1 / s, rtol=1e-5)


def test_the_error_of_a_stage_is_that_of_its_layers_with_quantized_input_and_weight() -> None:
    model, batch = with_outlier()
    with instrument(model, batch, PER_TENSOR) as session:
        session.calibrate([batch])
        runs = batch_runs(session, [batch])
        groups = find_channel_groups(session, runs)
        scale = torch.linspace(0.5, 3.0, 8, dtype=torch.float64)
        got = activation_equalization._errors(session, runs, groups, scale)
        assert dict(session.adjustments) == {}
    with torch.no_grad():
        x = (model.n(batch).double() / scale).numpy()
    wanted = 0.0
    for layer in (model.a, model.b):
        w = (layer.weight.detach().double() * scale).numpy()
        y = x @ w.T + layer.bias.detach().numpy()
        x_q, w_q = quantize(x, x.min(), x.max(), False), quantize(w, w.min(), w.max(), True)
        wanted += ((x_q @ w_q.T + layer.bias.detach().numpy() - y) ** 2).sum() / (y**2).sum()
    assert got.tolist() == pytest.approx([wanted], rel=1e-3)


def test_the_error_of_rows_counts_in_the_units_before_scaling() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    batch = torch.randn(32, 4)
    with instrument(model, batch, PER_TENSOR) as session:
        session.calibrate([batch])
        runs = batch_runs(session, [batch])
        groups = find_channel_groups(session, runs)
        scale = torch.tensor([1.0, 1.0, 8.0, 1.0, 1.0, 1.0], dtype=torch.float64)
        got = float(activation_equalization._errors(session, runs, groups, scale))
    x, wanted = batch.double().numpy(), 0.0
    for layer, rows, columns in ((model[0], scale.numpy(), np.ones(4)), (model[2], np.ones(3), scale.numpy())):
        bias = layer.bias.detach().double().numpy() / rows
        w = layer.weight.detach().double().numpy() * columns / rows[:, None]
        y = x @ w.T + bias
        y_q = quantize(x, x.min(), x.max(), False) @ quantize(w, w.min(), w.max(), True).T + bias
        wanted += (((y_q - y) * rows) ** 2).sum() / ((y * rows) ** 2).sum()
        x = np.maximum(y, 0.0)
    assert got == pytest.approx(wanted, rel=1e-3)


def output_error(session: Instrumentation, model: nn.Module, batch: Tensor) -> float:
    """The relative error of the whole network's output, quantized."""
    session.calibrate([batch])
    with torch.no_grad():
        session.set_mode("bypass")
        reference = model(batch)
        session.set_mode("quantize")
        quantized = model(batch)
        session.set_mode("bypass")
    return relative_error(quantized, reference)


def test_an_outlier_channel_is_moved_into_the_weights() -> None:
    model, batch = with_outlier()
    with instrument(model, batch) as session:
        before = output_error(session, model, batch)
        applied = equalize_activations(session, batch_runs(session, [batch]))
        assert applied.changed == ("a", "b")
        assert applied.findings == ()
        assert applied.note.startswith("exponent ")
        assert " in 1 of 1 stages; there the error of the layers' outputs fell by " in applied.note
        assert output_error(session, model, batch) < before / 3


def test_what_is_even_stays() -> None:
    torch.manual_seed(0)
    model = Net(lambda m, x: m.a(m.n(x)), n=nn.LayerNorm(8), a=nn.Linear(8, 8)).eval()
    with torch.no_grad():
        model.a.weight.copy_(torch.eye(8))
    batch = torch.cat([torch.eye(8), -torch.eye(8)])
    with instrument(model, batch) as session:
        session.calibrate([batch])
        applied = equalize_activations(session, batch_runs(session, [batch]))
        assert applied.changed == ()
        assert applied.note == "no exponent lowers the error of any layer's output by 2 %"
        assert dict(session.adjustments) == {}


def test_stages_choose_their_own_exponents() -> None:
    torch.manual_seed(0)
    model = Net(
        lambda m, x: m.d(m.c(torch.tanh(m.a(m.n(x))))),
        n=nn.LayerNorm(8),
        a=nn.Linear(8, 6),
        c=nn.Linear(6, 6),
        d=nn.Linear(6, 3),
    ).eval()
    with torch.no_grad():
        model.n.weight[3] = 100.0
        model.c.weight.copy_(torch.eye(6))
        model.c.bias.zero_()
        model.d.weight.copy_(torch.eye(6)[:3] + torch.eye(6)[3:])
    batch = torch.randn(64, 8)
    with instrument(model, batch) as session:
        session.calibrate([batch])
        applied = equalize_activations(session, batch_runs(session, [batch]))
        assert applied.changed == ("a",)
        assert " of 2 stages" in applied.note


def test_stages_that_get_worse_together_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = with_outlier()
    errors = iter([torch.tensor([1.0]), *(torch.tensor([0.5]) for _ in activation_equalization.EXPONENTS)])
    monkeypatch.setattr(
        activation_equalization, "_errors", lambda *_: next(errors, torch.tensor([1.0], dtype=torch.float64)).double()
    )
    with instrument(model, batch) as session:
        session.calibrate([batch])
        assert equalize_activations(session, batch_runs(session, [batch])).changed == ()


def test_ranges_stream_over_batches_of_any_size() -> None:
    torch.manual_seed(0)
    model, batch = make("functional relu")
    with instrument(model, batch) as session:
        layer = session.layers[1]
    x = torch.randn(7, 4, 5, 5)
    whole, parts = ActivationRanges(), ActivationRanges()
    whole.observe(layer, x)
    for part in (*x.split([1, 4, 2]), x[:0]):
        parts.observe(layer, part)
    assert torch.equal(whole.largest[layer.key], parts.largest[layer.key])
    np.testing.assert_allclose(whole.largest[layer.key], largest(x, 1))


@pytest.mark.parametrize("broken", ["dead", "nan"])
def test_dead_and_broken_channels_keep_their_scale(broken: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2)).eval()
    batch = torch.randn(8, 3, 4, 4)
    with torch.no_grad():
        model[0].weight[0] *= 50
        model[0].weight[1] = 0.0
        model[0].bias[1] = -1.0 if broken == "dead" else float("nan")
    with instrument(model, batch, PER_TENSOR) as session:
        session.calibrate([batch])
        runs = batch_runs(session, [batch])
        groups = find_channel_groups(session, runs)
        ranges = activation_equalization._Ranges(
            groups,
            effective_weights(session, runs),
            activation_equalization._activation_ranges(session, runs, groups),
        )
        scale = ranges.scale(torch.tensor([0.5], dtype=torch.float64))
    assert scale[1] == 1
    assert bool((scale[[0, 2, 3]] != 1).all())
    assert float(scale[[0, 2, 3]].log().sum()) == pytest.approx(0.0, abs=1e-9)


def test_an_expert_without_data_is_no_harm() -> None:
    torch.manual_seed(0)
    model, batch = Experts().eval(), torch.randn(6, 4)
    with instrument(model, batch) as session:
        session.calibrate([batch])
        assert equalize_activations(session, batch_runs(session, [batch])).changed == ()


def test_layers_with_learned_rounding_are_left_alone() -> None:
    model, batch = with_outlier()
    with instrument(model, batch) as session:
        session.calibrate([batch])
        session.quantizers["a.weight"].freeze()
        applied = equalize_activations(session, batch_runs(session, [batch]))
        assert applied.changed == ()
        assert dict(applied.skipped)["a"] == "the rounding of its weight was learned"


@pytest.mark.parametrize("name", [*zoo.ZOO, "residual stage", "swiglu", "attention by hand", "group norm"])
def test_no_function_changes(name: str) -> None:
    model, batch = zoo.make(name) if name in zoo.ZOO else make(name)
    call = (lambda: model(**batch)) if isinstance(batch, dict) else (lambda: model(batch))
    with torch.no_grad():
        before = [tensor.clone() for tensor in tensors_of(call())]
        with instrument(model, batch) as session:
            session.calibrate([batch])
            applied = equalize_activations(session, batch_runs(session, [batch]))
            after = list(tensors_of(call()))
    assert applied.findings == ()
    assert bool(applied.changed) == (name not in ("lstm", "branching", "reused", "functional", "weight_norm"))
    assert all(relative_error(b, a) <= 1e-5 for a, b in zip(before, after, strict=True))


def test_an_inexact_rule_is_found_out_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(channel_rules.RULES, "tanh", lambda tracker, op: tracker.numbers(op.x))
    model, batch = make("tanh")
    with torch.no_grad():
        model.a.weight[0] *= 100
    with instrument(model, batch) as session:
        session.calibrate([batch])
        encodings = {name: quantizer.encoding for name, quantizer in session.quantizers.items()}
        applied = equalize_activations(session, batch_runs(session, [batch]))
        assert [finding.cause for finding in applied.findings] == [Cause.CHANGED_FUNCTION]
        assert applied.note.startswith("activation-aware equalization changed the FP32 output 'b' by ")
        assert dict(session.adjustments) == {}
        assert {name: quantizer.encoding for name, quantizer in session.quantizers.items()} == encodings


def test_a_network_without_classes_says_so() -> None:
    model, batch = make("gelu")
    with instrument(model, batch) as session:
        session.calibrate([batch])
        applied = equalize_activations(session, batch_runs(session, [batch]))
    assert (applied.changed, applied.note) == ((), "no channels were found whose scale can change")
    assert dict(applied.skipped)["a"] == "gelu reads it"
    assert CASES["gelu"].classes == 0

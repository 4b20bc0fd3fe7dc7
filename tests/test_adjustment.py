"""Adjusting operations: each kind of operation against the same network with its parameters changed by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quantdebug.adjustment import Adjustment
from lightning_quantdebug.errors import SettingsError
from lightning_quantdebug.instrument import Instrumentation, batch_runs, instrument
from lightning_quantdebug.interception import OpKey
from lightning_quantdebug.operations import argument, put_argument

X = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(1))
SCALE = torch.tensor([0.5, 2.0, 3.0, 0.25])
SHIFT = torch.tensor([1.0, -1.0, 0.5, 2.0])


def keys(session: Instrumentation) -> dict[str, OpKey]:
    shared = session.topology.shared_keys()
    return {operation.name: shared[operation.key] for operation in session.topology}


def visited(session: Instrumentation, batch: Any, action: Callable[[Callable[[], Any]], Any]) -> Any:
    found: list[Any] = []
    batch_runs(session, [batch])(lambda run, index: found.append(action(run)))
    return found[0]


def adjusted_output(model: nn.Module, batch: Any, changes: dict[str, Adjustment]) -> Tensor:
    with instrument(model, batch) as q:
        q.calibrate([batch])
        q.adjust({keys(q)[name]: change for name, change in changes.items()})
        output: Tensor = visited(q, batch, lambda run: run())
        return output


def changed(model: nn.Module, edit: Callable[[Any], None]) -> nn.Module:
    twin = copy.deepcopy(model)
    with torch.no_grad():
        edit(twin)
    return twin


class Functional(nn.Module):
    """A product and a sum with parameters, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.randn(6))
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.shift + x * self.gain)


def scale_rows(layer: Any) -> None:
    layer.weight.mul_(SCALE.view(-1, *[1] * (layer.weight.ndim - 1)))
    layer.bias.mul_(SCALE).add_(SHIFT)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "conv1d": (lambda: nn.Conv1d(4, 4, 3), X),
    "conv2d, grouped": (lambda: nn.Conv2d(4, 4, 3, groups=2, padding=1), X[None].transpose(1, 2)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 1), torch.randn(1, 2, 3, 3, 3)),
    "linear": (lambda: nn.Linear(6, 4), X),
}


@pytest.mark.parametrize("name", sorted(LAYERS))
def test_a_layer_with_another_weight_and_bias(name: str) -> None:
    make, x = LAYERS[name]
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.ReLU()).eval()
    rows = SCALE.view(-1, *[1] * (next(model.parameters()).ndim - 1))
    change = Adjustment(weight_scale=rows, bias_scale=SCALE, bias_offset=SHIFT)
    twin = changed(model, lambda m: scale_rows(m[0]))
    torch.testing.assert_close(adjusted_output(model, x, {"0": change}), twin(x))


def test_a_layer_without_a_bias_gets_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4, bias=False), nn.ReLU()).eval()
    output = adjusted_output(model, X, {"0": Adjustment(bias_offset=SHIFT, bias_scale=SCALE)})
    torch.testing.assert_close(output, F.relu(F.linear(X, model[0].weight, SHIFT)))


def test_a_transposed_convolution() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose1d(4, 2, 3), nn.ReLU()).eval()
    twin = changed(model, lambda m: m[0].weight.mul_(SCALE.view(-1, 1, 1)))
    torch.testing.assert_close(adjusted_output(model, X, {"0": Adjustment(weight_scale=SCALE.view(-1, 1, 1))}), twin(X))


def test_a_batch_normalization_is_folded_before_a_layer_is_adjusted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 4, 3, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 2, 1)).eval()
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    change = Adjustment(weight_scale=SCALE.view(-1, 1, 1), bias_scale=SCALE)
    back = Adjustment(weight_scale=1 / SCALE.view(1, -1, 1))
    torch.testing.assert_close(adjusted_output(model, X, {"0": change, "3": back}), model(X))
    assert not torch.allclose(adjusted_output(model, X, {"0": change}), model(X), atol=1e-3)


NORMS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "layer_norm": (lambda: nn.LayerNorm(6), True),
    "group_norm": (lambda: nn.GroupNorm(2, 4), True),
    "rms_norm": (lambda: nn.RMSNorm(6), False),
}


@pytest.mark.parametrize("name", sorted(NORMS))
def test_a_normalization(name: str) -> None:
    make, has_bias = NORMS[name]
    model = nn.Sequential(make(), nn.Linear(6, 3)).eval()
    size = model[0].weight.numel()
    scale, shift = torch.rand(size) + 0.5, torch.randn(size)

    def edit(twin: Any) -> None:
        twin[0].weight.mul_(scale)
        if has_bias:
            twin[0].bias.mul_(scale).add_(shift)

    change = Adjustment(weight_scale=scale, bias_scale=scale, bias_offset=shift if has_bias else None)
    torch.testing.assert_close(adjusted_output(model, X, {"0": change}), changed(model, edit)(X))


def test_a_normalization_without_gamma_gets_one() -> None:
    model = nn.Sequential(nn.LayerNorm(6, elementwise_affine=False), nn.Linear(6, 3)).eval()
    scale = torch.rand(6) + 0.5
    output = adjusted_output(model, X, {"0": Adjustment(weight_scale=scale, bias_scale=scale)})
    torch.testing.assert_close(output, model[1](model[0](X) * scale))


def test_a_parameter_in_a_product_and_in_a_sum() -> None:
    torch.manual_seed(0)
    model = Functional().eval()
    scale = torch.rand(6) + 0.5
    changes = {"mul": Adjustment(weight_scale=scale), "add": Adjustment(weight_scale=scale)}
    twin = changed(model, lambda m: (m.gain.mul_(scale), m.shift.mul_(scale)))
    torch.testing.assert_close(adjusted_output(model, X, changes), twin(X))


class Clipped(nn.Module):
    """One clipped activation, called in one of many ways."""

    def __init__(self, clip: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.clip = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 2, 1), clip

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.clip(4 * self.first(x)))


CLIPS: dict[str, tuple[Callable[[Tensor], Tensor], float | None, float | None]] = {
    "relu6": (F.relu6, 0.0, 6.0),
    "relu6 in place": (lambda x: F.relu6(x, inplace=True), 0.0, 6.0),
    "hardtanh": (lambda x: F.hardtanh(x, -1.5, 2.0), -1.5, 2.0),
    "hardtanh with its defaults": (F.hardtanh, -1.0, 1.0),
    "clamp": (lambda x: x.clamp(-1, 2), -1.0, 2.0),
    "clamp by name": (lambda x: torch.clamp(x, max=2.0), None, 2.0),
    "clamp_": (lambda x: x.clamp_(-1, 2), -1.0, 2.0),
    "clamp_min": (lambda x: x.clamp_min(-0.5), -0.5, None),
    "clamp_max": (lambda x: torch.clamp_max(x, 0.5), None, 0.5),
}


@pytest.mark.parametrize("name", sorted(CLIPS))
@pytest.mark.parametrize("mode", ["bypass", "quantize"])
def test_a_clipped_activation_with_bounds_of_each_channel(name: str, mode: str) -> None:
    clip, low, high = CLIPS[name]
    torch.manual_seed(0)
    model = Clipped(clip).eval()
    scale = SCALE.view(-1, 1)
    with instrument(model, X) as q:
        q.calibrate([X])
        found = next(key for key in keys(q) if key not in ("first", "last") and "mul" not in key)
        q.adjust({keys(q)[found]: Adjustment(bounds_scale=scale)})
        with q.observing():
            visited(q, X, lambda run: run())
        seen: list[Tensor] = []
        with q.traced(lambda name, result: seen.append(result.clone()) if name == found else None):
            q.set_mode(mode)
            visited(q, X, lambda run: run())
    z = 4 * model.first(X)
    expected = torch.maximum(z, low * scale) if low is not None else z
    expected = torch.minimum(expected, high * scale) if high is not None else expected
    torch.testing.assert_close(
        seen[0], expected, atol=1e-6 if mode == "bypass" else 0.2, rtol=1e-5 if mode == "bypass" else 0.1
    )


class Looked(nn.Module):
    """Writes into a tensor that it goes on to use under its old name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        F.relu6(x, inplace=True)
        return self.last(x)


@pytest.mark.parametrize("grad", [False, True])
def test_a_clipping_that_must_write_writes(grad: bool) -> None:
    torch.manual_seed(0)
    model = Looked().eval()
    with instrument(model, X) as q:
        q.calibrate([X])
        name = next(key for key in keys(q) if key not in ("first", "last"))
        q.adjust({keys(q)[name]: Adjustment(bounds_scale=SCALE.view(-1, 1) / 6)})
        with torch.set_grad_enabled(grad):
            output = model(X)
        if grad:
            output.sum().backward()
            assert model.first.weight.grad is not None
    expected = model.last(torch.minimum(F.relu(model.first(X)), SCALE.view(-1, 1)))
    torch.testing.assert_close(output, expected)


def test_corrections_are_there_while_the_weight_is_quantized_and_only_then() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU()).eval()
    with instrument(model, X) as q:
        q.calibrate([X])
        q.set_mode("quantize", kind="weight")
        plain = visited(q, X, lambda run: run())
        weight = q.quantizers["0.weight"](model[0].weight)
        q.adjust({keys(q)["0"]: Adjustment(bias_correction=SHIFT)})
        corrected = visited(q, X, lambda run: run())
        torch.testing.assert_close(corrected, F.relu(F.linear(X, weight, model[0].bias + SHIFT)))
        assert not torch.equal(corrected, plain)
        step = q.quantizers["0.weight"].encoding.scale[:, None]  # type: ignore[union-attr] # calibrated
        q.adjust({keys(q)["0"]: Adjustment(weight_correction=step.expand(4, 6).clone())})
        shifted = q.quantizers["0.weight"](model[0].weight + step)
        torch.testing.assert_close(
            visited(q, X, lambda run: run()), F.relu(F.linear(X, shifted, model[0].bias + SHIFT))
        )
        q.set_mode("bypass")
        assert torch.equal(visited(q, X, lambda run: run()), model[1](F.linear(X, model[0].weight, model[0].bias)))
        q.set_mode("observe")
        assert torch.equal(visited(q, X, lambda run: run()), model[1](F.linear(X, model[0].weight, model[0].bias)))


def test_composition_is_doing_one_after_the_other() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(4, 6), torch.randn(4)
    parts = [torch.rand(4) + 0.5 for _ in range(8)]
    one = Adjustment(parts[0][:, None], parts[1][:, None].expand(4, 6), parts[2], parts[3], parts[4], parts[5])
    other = Adjustment(parts[6][:, None], parts[7][:, None].expand(4, 6), parts[1], parts[0], parts[2], parts[7])
    both = one.then(other)
    torch.testing.assert_close(both.weight(weight), other.weight(one.weight(weight)))
    torch.testing.assert_close(both.bias(bias), other.bias(one.bias(bias)))
    torch.testing.assert_close(both.bounds_scale, parts[5] * parts[7])
    torch.testing.assert_close(both.weight(weight, corrected=True), other.weight(one.weight(weight, True), True))
    # Offsets that keep the function are scaled apart from those that make up for quantization.
    torch.testing.assert_close(
        both.bias(bias, corrected=True), other.bias(one.bias(bias, corrected=True), corrected=True)
    )
    assert Adjustment().then(Adjustment()).weight(weight).equal(weight)
    assert Adjustment(bias_offset=bias).then(Adjustment(bias_scale=parts[0])).bias(None).equal(bias * parts[0])  # type: ignore[union-attr] # an offset is there
    assert Adjustment(weight_correction=weight).rounded
    assert not one.then(Adjustment()).rounded or one.rounded
    assert not Adjustment(bias_correction=bias).rescales
    assert Adjustment(bias_correction=bias).moves_bias
    assert not Adjustment(weight_scale=bias).moves_bias


def test_what_can_not_be_adjusted_is_refused() -> None:
    model = nn.Sequential(nn.LSTM(6, 4, batch_first=True)).eval()
    with (
        instrument(model, X) as q,
        pytest.raises(SettingsError, match="has 2 quantized weights and no parameter"),
    ):
        q.adjust({q.layers[0].key: Adjustment(weight_scale=SCALE)})
    relu = nn.Sequential(nn.Linear(6, 4), nn.ReLU()).eval()
    with instrument(relu, X) as q, pytest.raises(SettingsError, match=r"1 \(relu\) has 0 quantized weights"):
        q.adjust({keys(q)["1"]: Adjustment(weight_scale=SCALE)})
    with instrument(relu, X) as q:
        unknown = keys(q)["1"]._replace(path="elsewhere")
        with pytest.raises(SettingsError, match="No operation 'elsewhere' 'relu' with this key was recorded"):
            q.adjust({unknown: Adjustment(weight_scale=SCALE)})


def test_optional_arguments_by_position_and_by_name() -> None:
    assert argument((1, 2, 3), {}, 2, "bias") == 3
    assert argument((1, 2), {"bias": 4}, 2, "bias") == 4
    assert argument((1, 2), {}, 2, "bias") is None
    assert put_argument((1, 2, 3), {}, 2, "bias", 5) == ((1, 2, 5), {})
    assert put_argument((1, 2), {}, 2, "bias", 5) == ((1, 2), {"bias": 5})

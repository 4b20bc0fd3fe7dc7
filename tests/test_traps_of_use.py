"""Traps 8 to 16 of intercepting operations; the others are in ``test_traps`` and ``_of_values``."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quantdebug.instrument import Instrumentation, instrument
from lightning_quantdebug.target import QuantTarget
from tests import zoo
from tests.grids import grid, quantized, reasons

torch.set_num_threads(1)


# 8. Copies of an instrumented network.


def through_deepcopy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("way", [through_deepcopy, through_pickle, through_torch_save])
def test_trap_08_a_copy_is_a_plain_network_of_its_own(way: Callable[[nn.Module], nn.Module]) -> None:
    model, batch = zoo.make("resnet")
    with torch.no_grad():
        plain = model(batch)
        with instrument(model, batch) as q:
            quantized(q, batch)
            copied = way(model)
            assert not torch.equal(model(batch), plain)
            assert torch.equal(copied(batch), plain)
            assert copied.forward.__self__ is copied
            copied.fc.weight.zero_()
            copied.fc.bias.fill_(3.0)
            assert torch.equal(copied(batch), torch.full_like(plain, 3.0))
            again = way(copied)
            assert torch.equal(again(batch), torch.full_like(plain, 3.0))
            assert again.forward.__self__ is again
        assert torch.equal(model(batch), plain)


def test_trap_08_a_forward_of_the_users_own_travels_with_the_copy() -> None:
    model = nn.Linear(2, 2)
    model.forward = own_forward
    batch = torch.randn(1, 2)
    with instrument(model, batch, exclude=()) as q:
        assert q.quantizers
        assert torch.equal(copy.deepcopy(model)(batch), own_forward(batch))
        assert torch.equal(through_pickle(model)(batch), own_forward(batch))
    assert model.__dict__["forward"] is own_forward


_MATRIX = torch.eye(2) * 3


def own_forward(x: Tensor) -> Tensor:
    return F.linear(x, _MATRIX) + 1.0


# 9. A wrapped forward hides its signature.


def test_trap_09_the_signature_stays() -> None:
    model, batch = zoo.make("bert")
    before = inspect.signature(model.forward)
    assert list(before.parameters) == ["input_ids", "attention_mask"]
    with instrument(model, batch):
        assert inspect.signature(model.forward) == before
        assert model.forward.__name__ == "forward"
        assert model.forward.__doc__ == type(model).forward.__doc__


# 10. Code with a backward of its own, and tensors without memory.


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2 + torch.sin(x) * 0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 7


class OwnBackward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Doubled.apply(self.layer(x)))


def test_trap_10_an_autograd_function_is_opaque_and_reported() -> None:
    torch.manual_seed(0)
    model = OwnBackward().eval()
    batch = torch.randn(3, 4)
    with instrument(model, batch) as q:
        assert list(q.quantizers) == ["input", "layer.weight", "layer", "head.input", "head.weight", "head"]
        assert "autograd.Function" in reasons(q)["sin"]
        quantized(q, batch)
        model(batch).sum().backward()
        assert q.coverage.unseen == ()
        weight = grid(q, "head.weight", model.head.weight.detach())
        assert torch.allclose(model.layer.bias.grad, 3 * 7 * weight.sum(0), atol=1e-4)


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.func.vmap(lambda row: torch.tanh(self.layer(row)))(x))


def test_trap_10_vmap_runs_and_is_reported() -> None:
    torch.manual_seed(0)
    model = Mapped().eval()
    batch = torch.randn(3, 4)
    plain = model(batch)
    with instrument(model, batch) as q:
        assert torch.equal(model(batch), plain)
        assert list(q.quantizers) == ["head.input", "head.weight", "head"]
        assert "torch.func" in reasons(q)["layer.linear"]
        assert "torch.func" in reasons(q)["tanh"]
        quantized(q, batch)
        hidden = grid(q, "head.input", torch.tanh(model.layer(batch)))
        expected = grid(q, "head", F.linear(hidden, grid(q, "head.weight", model.head.weight), model.head.bias))
        assert torch.allclose(model(batch), expected, atol=1e-6)
        assert q.coverage.unseen == ()


def test_trap_10_per_sample_gradients_through_an_instrumented_network() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1)).eval()
    batch = torch.randn(3, 4)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, values, (x,)).sum()

    with instrument(model, batch) as q:
        q.calibrate([batch])
        per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, batch)
    assert per_sample["0.weight"].shape == (3, 4, 4)


# 11. Other tensors stand where the parameters stood.


def test_trap_11_functional_call_quantizes_the_parameters_it_is_given() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).eval()
    batch = torch.randn(3, 4)
    with torch.no_grad(), instrument(model, batch) as q:
        quantized(q, batch)
        q.set_mode("bypass", kind="activation")
        own = model(batch)
        for factor in (0.5, 0.25, 0.75):
            given = {name: value * factor for name, value in model.named_parameters()}
            first, second = (grid(q, f"{index}.weight", given[f"{index}.weight"]) for index in (0, 2))
            hidden = torch.tanh(F.linear(batch, first, given["0.bias"]))
            expected = F.linear(hidden, second, given["2.bias"])
            del first, second, hidden
            got = torch.func.functional_call(model, given, (batch,))
            assert torch.allclose(got, expected, atol=1e-6)
        assert torch.equal(model(batch), own)


def test_trap_11_recorded_through_functional_call_it_has_the_same_names() -> None:
    model, batch = zoo.make("mobilenet")
    given = {name: value.clone() for name, value in (*model.named_parameters(), *model.named_buffers())}
    session = Instrumentation(model, QuantTarget.from_value("int8"))
    session.record(lambda: torch.func.functional_call(model, given, (batch,)), batch)
    session.place()
    with instrument(model, batch) as q:
        assert list(session.quantizers) == list(q.quantizers)


# 12. Quantized weights are kept; everything that they depend on must be noticed.


class ConvNorm(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(*zoo.conv_bn(2, 3, 3))
        nn.init.uniform_(self[1].running_var, 0.5, 2.0)


def under_no_grad(tensor: Tensor) -> None:
    with torch.no_grad():
        tensor.mul_(1.5).add_(0.1)


def under_inference_mode(tensor: Tensor) -> None:
    with torch.inference_mode():
        tensor.mul_(1.5).add_(0.1)


def through_data(tensor: Tensor) -> None:
    tensor.data.mul_(1.5).add_(0.1)


def by_a_new_tensor(tensor: Tensor) -> None:
    tensor.data = tensor.data * 1.5 + 0.1


CHANGES = [under_no_grad, under_inference_mode, through_data, by_a_new_tensor]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["0.weight", "1.weight", "1.bias", "1.running_mean", "1.running_var"])
@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
def test_trap_12_a_changed_tensor_is_noticed(name: str, change: Callable[[Tensor], None], inference: bool) -> None:
    torch.manual_seed(0)
    model = ConvNorm().eval()
    batch = torch.randn(2, 2, 5, 5)
    with torch.inference_mode(inference), torch.no_grad(), instrument(model, batch) as q:
        quantized(q, batch)
        q.set_mode("bypass", kind="activation")
        before = model(batch)
        assert torch.equal(model(batch), before)
        change(model.get_parameter(name) if "running" not in name else model.get_buffer(name))
        conv, norm = model
        factor = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        weight = grid(q, "0.weight", conv.weight * factor.view(-1, 1, 1, 1))
        expected = F.conv2d(batch, weight, norm.bias - norm.running_mean * factor, padding=1)
        got = model(batch)
        assert torch.allclose(got, expected, atol=1e-5)
        assert not torch.equal(got, before)


def test_trap_12_bit_width_and_encoding_are_noticed() -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 8).eval()
    batch = torch.randn(3, 8)
    with torch.no_grad(), instrument(model, batch) as q:
        quantized(q, batch)
        q.set_mode("bypass", kind="activation")
        outputs = [model(batch)]
        q.quantizers["weight"].set_bit_width(3)
        outputs.append(model(batch))
        other = copy.deepcopy(model)
        other.weight.mul_(3)
        q.quantizers["weight"].observe(other.weight)
        q.quantizers["weight"].set_range()
        outputs.append(model(batch))
        for first, second in ((0, 1), (1, 2), (0, 2)):
            assert not torch.equal(outputs[first], outputs[second])
        assert torch.allclose(outputs[2], F.linear(batch, grid(q, "weight", model.weight), model.bias), atol=1e-6)


def test_trap_12_a_weight_computed_in_the_network_is_never_stale() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(16, 16, bias=False))).eval()
    batch = torch.randn(3, 16)
    with torch.no_grad(), instrument(model, batch) as q:
        quantized(q, batch)
        q.set_mode("bypass", kind="activation")
        for _ in range(20):
            model[0].parametrizations.weight.original0.mul_(0.9)
            assert torch.allclose(model(batch), F.linear(batch, grid(q, "0.weight", model[0].weight)), atol=1e-6)


# 13. Axes that are counted from the end.


class FromTheEnd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 3))
        self.up = nn.ConvTranspose1d(3, 5, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.chunk(x @ self.matrix, 2, dim=-2)
        joined = torch.cat([torch.softmax(a, dim=-1), F.relu(b)], dim=-2)
        return self.up(joined.transpose(-1, -2)).mean(-1)


def test_trap_13_axes_are_counted_from_the_front() -> None:
    torch.manual_seed(0)
    model = FromTheEnd().eval()
    batch = torch.randn(2, 6, 4)
    with torch.no_grad(), instrument(model, batch) as q:
        plain = model(batch)
        quantized(q, batch)
        assert (q.quantizers["matrix"].channel_axis, q.quantizers["up.weight"].channel_axis) == (1, 1)
        assert q.quantizers["matrix"].encoding.scale.shape == (3,)
        assert q.quantizers["up.weight"].encoding.scale.shape == (5,)
        assert float((model(batch) - plain).norm() / plain.norm()) < 0.03


# 14. What fails without us fails with us, and in the same way.


def test_trap_14_bf16_autocast_of_an_lstm_is_as_without_us() -> None:
    model, batch = zoo.make("lstm")

    def outcome() -> Any:
        try:
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                return model(batch)
        except RuntimeError as error:
            return str(error)

    plain = outcome()
    with instrument(model, batch) as q:
        with_us = outcome()
        if isinstance(plain, str):
            assert with_us == plain
            return
        assert torch.equal(with_us, plain)
        quantized(q, batch)
        got = outcome()
    assert got.dtype == plain.dtype
    assert float((got - plain).norm() / plain.norm()) < 0.1


# 15. Random operations.


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        noise = [torch.randn_like(x) for _ in range(2)]
        drop = F.dropout(x, 0.5, training=True) + F.dropout(x, 0.5, training=True)
        return self.head(x + noise[0] - noise[1] + drop + torch.rand(4))


def test_trap_15_random_operations_draw_as_without_us() -> None:
    torch.manual_seed(0)
    model = Noisy().eval()
    batch = torch.randn(3, 4)

    def draw() -> tuple[Tensor, Tensor]:
        torch.manual_seed(5)
        with torch.no_grad():
            return model(batch), torch.get_rng_state()

    plain, state = draw()
    before = torch.get_rng_state()
    with instrument(model, batch) as q:
        assert torch.equal(torch.get_rng_state(), before)
        for mode in ("bypass", "observe", "quantize"):
            if mode == "quantize":
                q.calibrate([batch])
            q.set_mode(mode)
            got, after = draw()
            assert torch.equal(after, state)
            assert torch.equal(got, plain) == (mode != "quantize")
        random = [operation for operation in q.topology if operation.op == "randn_like"]
        assert len({operation.key for operation in random}) == 2
        assert not any("rand" in name or "dropout" in name for name in q.quantizers)


# 16. One convolution ahead of several batch normalizations.


class SharedConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(self.conv(x)))
        return self.second(self.conv(x))


def test_trap_16_a_shared_convolution_is_not_folded() -> None:
    torch.manual_seed(0)
    model = zoo._trained_looking(SharedConvolution()).eval()
    batch = torch.randn(2, 3, 6, 6)
    with torch.no_grad(), instrument(model, batch) as q:
        plain = model(batch)
        assert not q.plan.folds
        assert "several places" in reasons(q)["first (folding)"]
        assert "several places" in reasons(q)["second (folding)"]
        quantized(q, batch)
        x, weight = grid(q, "input", batch), grid(q, "conv.weight", model.conv.weight)
        x = grid(q, "conv", F.conv2d(x, weight, padding=1))
        x = grid(q, "first.relu" if "first.relu" in q.quantizers else "relu", F.relu(model.first(x)))
        x = grid(q, "conv@1", F.conv2d(x, weight, padding=1))
        assert torch.allclose(model(batch), grid(q, "second", model.second(x)), atol=1e-5)
        assert float((model(batch) - plain).norm() / plain.norm()) < 0.05

"""The sixteen traps of intercepting operations: 1 to 5; then ``test_traps_of_values`` and ``test_traps_of_use``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_quantdebug.instrument import Instrumentation, instrument
from lightning_quantdebug.interception import exact_kernels
from lightning_quantdebug.target import QuantTarget
from tests import zoo
from tests.grids import grid, quantized, reasons

torch.set_num_threads(1)


# 1. The fast path of attention hides its operations and differs by 1e-7.


def test_trap_01_attention_fast_path() -> None:
    model, batch = zoo.make("transformer_encoder")
    with torch.inference_mode():
        fast = model(batch)
        with exact_kernels():
            reference = model(batch)
    assert not torch.equal(fast, reference), "the fast path makes no difference here: the test shows nothing"
    with instrument(model, batch) as q:
        with torch.inference_mode():
            assert torch.equal(model(batch), reference)
        assert torch.backends.mha.get_fastpath_enabled()
        layer = "encoder.layers.0.self_attn"
        assert {f"{layer}.in_proj_weight", f"{layer}.out_proj.weight"} <= set(q.quantizers)
        assert any(name.startswith(f"{layer}.") and not name.endswith("weight") for name in q.quantizers)
    assert torch.backends.mha.get_fastpath_enabled()


# 2. In-place operations: what autograd saved is overwritten, or what a view should see is lost.


class InPlaceResidual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(*zoo.conv_bn(3, 4, 3), nn.ReLU6(inplace=True))
        self.second = nn.Sequential(*zoo.conv_bn(4, 4, 3), nn.Hardswish(inplace=True))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.second(x)
        y += x
        F.relu(y, inplace=True)
        F.hardtanh(y, -2.0, 2.0, inplace=True)
        y.mul_(0.5).sub_(x.mean())
        return self.head(y.mean((2, 3)))


class OutOfPlaceResidual(InPlaceResidual):
    def __init__(self) -> None:
        super().__init__()
        self.first[2].inplace = self.second[2].inplace = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = F.hardtanh(F.relu(self.second(x) + x), -2.0, 2.0)
        return self.head((y * 0.5 - x.mean()).mean((2, 3)))


def quantized_gradients(model: nn.Module, batch: Tensor) -> tuple[Tensor, list[Tensor]]:
    with instrument(model, batch) as q:
        quantized(q, batch)
        out = model(batch)
        out.pow(2).sum().backward()
        assert not q.coverage.unseen
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in gradients)
    return out.detach(), gradients


def test_trap_02_in_place_operations_train() -> None:
    torch.manual_seed(0)
    model = InPlaceResidual().eval()
    twin = OutOfPlaceResidual().eval()
    twin.load_state_dict(model.state_dict())
    batch = torch.randn(2, 3, 6, 6)
    out, gradients = quantized_gradients(model, batch)
    expected_out, expected = quantized_gradients(twin, batch)
    assert torch.allclose(out, expected_out, atol=1e-6)
    for got, wanted in zip(gradients, expected, strict=True):
        assert torch.allclose(got, wanted, atol=1e-5)


class WritesThroughViews(nn.Module):
    """Relies on the effect of in-place operations: through a view, an alias, a slice, and in the input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        kept = self.layer(x)
        view = kept.view(-1)
        view.add_(1.0)
        alias = kept
        alias.relu_()
        kept[:, 0] = 2.0
        kept[:, 1:3].mul_(x[:, 1:3])
        return self.head(kept)


@pytest.mark.parametrize("grad", [False, True])
def test_trap_02_effects_through_views_are_kept(grad: bool) -> None:
    torch.manual_seed(0)
    model = WritesThroughViews().eval()
    batch = torch.randn(5, 4)
    with torch.set_grad_enabled(grad):
        plain = model(batch)
        with instrument(model, batch) as q:
            assert torch.equal(model(batch), plain)
            quantized(q, batch)
            got = model(batch)
            assert not q.coverage.unseen
    assert 0 < float((got - plain).detach().norm() / plain.detach().norm()) < 0.03
    if grad:
        got.sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


class WritesIntoItsInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x.view(-1).add_(1.0)
        return self.head(x)


def test_trap_02_an_input_that_is_written_into() -> None:
    torch.manual_seed(0)
    model = WritesIntoItsInput().eval()
    batch = torch.randn(5, 4)
    with torch.no_grad(), instrument(model, batch.clone()) as q:
        plain = model(batch.clone())
        quantized(q, batch.clone())
        assert 0 < float((model(batch.clone()) - plain).norm() / plain.norm()) < 0.03
        assert "writes into it" in reasons(q)["input"]


def scale_by_two(x: Any, encoding: Any) -> Tensor:
    return x * 2


def test_trap_02_a_custom_quantizer_reaches_the_aliases_too() -> None:
    class Alias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            y.add_(1.0)
            y.view(-1).sub_(0.5)
            return y

    model = Alias().eval()
    batch = torch.randn(3, 2)
    target = QuantTarget(quantizer="tests.test_traps.make_doubling")
    with torch.no_grad(), instrument(model, batch, target) as q:
        q.calibrate([batch])
        q.set_mode("quantize", "sub")
        assert torch.allclose(model(batch), 2 * (model.layer.weight @ batch.T).T + 2 * model.layer.bias + 1.0)


def make_doubling(spec: Any) -> Any:
    return scale_by_two


def test_trap_02_a_result_that_is_a_view_is_not_overwritten() -> None:
    class Einsum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y, torch.einsum("ij->ji", y), y.clone()

    model = Einsum().eval()
    batch = torch.randn(2, 3)
    with torch.no_grad(), instrument(model, batch, {"activations": {"bit_width": 2}}) as q:
        q.calibrate([batch])
        q.set_mode("quantize", "einsum")
        first, moved, after = model(batch)
        assert torch.equal(first, after)
        assert torch.equal(first, model.layer(batch))
        assert not torch.equal(moved.T, first)


# 3. Activation checkpointing recomputes in the backward pass, outside every mode.


class Checkpointed(nn.Module):
    """Two blocks, with one set of weights or two, checkpointed in a way or not at all."""

    def __init__(self, how: bool | None, shared: bool) -> None:
        super().__init__()
        self.how = how
        self.stem = nn.Linear(6, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6)) for _ in range(2 - shared)
        )

    def part(self, x: Tensor, block: nn.Module) -> Tensor:
        return F.gelu(torch.tanh(block(x)) + 0.5 * x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index in range(2):
            block = self.blocks[index % len(self.blocks)]
            x = self.part(x, block) if self.how is None else checkpoint(self.part, x, block, use_reentrant=self.how)
            x = F.silu(x)
        return x


def checkpointed_gradients(how: bool | None, shared: bool) -> list[Tensor]:
    torch.manual_seed(0)
    model = Checkpointed(how, shared).eval()
    batch = torch.randn(4, 6)
    with instrument(model, batch) as q:
        quantized(q, batch)
        model(batch).pow(2).sum().backward()
        assert not q.coverage.unseen
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # calibration needs no gradients
@pytest.mark.parametrize("how", [False, True], ids=["plain", "reentrant"])
@pytest.mark.parametrize("shared", [False, True], ids=["own_weights", "shared_weights"])
def test_trap_03_checkpointing_has_the_gradients_of_the_same_network_without(how: bool, shared: bool) -> None:
    expected = checkpointed_gradients(None, shared)
    assert all(gradient.abs().sum() > 0 for gradient in expected)
    for got, wanted in zip(checkpointed_gradients(how, shared), expected, strict=True):
        # Reentrant checkpointing adds the gradients of a shared weight up in another order, with or without us.
        assert torch.allclose(got, wanted, atol=1e-6) if how and shared else torch.equal(got, wanted)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # likewise
def test_trap_03_torchs_own_functions_are_back_afterwards() -> None:
    module = torch.utils.checkpoint
    before = (module._checkpoint_without_reentrant_generator, "apply" in module.CheckpointFunction.__dict__)
    checkpointed_gradients(True, shared=False)
    assert before == (module._checkpoint_without_reentrant_generator, "apply" in module.CheckpointFunction.__dict__)


# 4. Control flow that depends on the data.


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(4, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.new_zeros(len(x), 6)
        for step in range(x.shape[1]):
            hidden = self.cell(x[:, step], hidden)
        return self.head(hidden)


class Loop(nn.Module):
    """A loop of functional operations whose length depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(4, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3 if float(x[0, 0]) > 0 else 1):
            x = F.gelu(torch.tanh(F.linear(x, self.matrix)) + 1.0)
            x.mul_(0.5).add_(0.1)
        return self.head(x)


def recorded(model: nn.Module, *batches: Any) -> Instrumentation:
    session = Instrumentation(model, QuantTarget.from_value("int8"))
    for batch in batches:
        session.record(lambda batch=batch: model(batch), batch)
    session.place()
    with torch.no_grad(), session.observing():
        for batch in batches:
            session.run(lambda batch=batch: model(batch))
    return session


def test_trap_04_a_loop_that_grows_shares_one_quantizer_across_calls() -> None:
    torch.manual_seed(0)
    model = Recurrent().eval()
    short, long, longer = torch.randn(2, 5, 4), torch.randn(2, 9, 4), torch.randn(2, 12, 4)
    session = recorded(model, short, long)
    assert list(session.quantizers) == ["input", "cell.weight_ih", "cell.weight_hh", "cell", "head.weight", "head"]
    assert all(quantizer.is_calibrated for quantizer in session.quantizers.values())
    session.run(lambda: model(longer))
    assert session.coverage.unseen == ()


def test_trap_04_calls_beyond_the_recorded_ones_are_counted() -> None:
    torch.manual_seed(0)
    model = Recurrent().eval()
    session = recorded(model, torch.randn(2, 5, 4))
    assert "cell@4" in session.quantizers
    session.run(lambda: model(torch.randn(2, 9, 4)))
    assert session.coverage.unseen == ("cell.gru_cell",)


def test_trap_04_rounds_of_a_functional_loop_share_one_quantizer() -> None:
    torch.manual_seed(0)
    model = Loop().eval()
    many, one = torch.randn(3, 4).abs(), -torch.randn(3, 4).abs()
    session = recorded(model, many, one)
    assert list(session.quantizers) == [
        "input",
        "matrix",
        "linear",
        "tanh",
        "add",
        "gelu",
        "add.1",
        "head.weight",
        "head",
    ]
    assert all(quantizer.is_calibrated for quantizer in session.quantizers.values())
    session.set_mode("quantize")
    with torch.no_grad():
        plain = model(many)
        got = session.run(lambda: model(many))
    assert 0 < float((got - plain).norm() / plain.norm()) < 0.03
    assert session.coverage.unseen == ()


def test_trap_04_a_branch_that_was_not_recorded_shifts_no_key() -> None:
    model, _ = zoo.make("branching")
    positive, negative = torch.full((2, 8), 0.1), torch.full((2, 8), -0.1)
    session = recorded(model, positive)
    session.set_mode("quantize")
    with torch.no_grad():
        session.run(lambda: model(negative))
    assert session.coverage.unseen == ("add", "b.linear", "tanh")
    both = recorded(model, positive, negative)
    assert set(session.quantizers) < set(both.quantizers)
    assert {"a.weight", "b.weight", "tanh", "add", "head"} <= set(both.quantizers)
    both.run(lambda: model(negative))
    assert both.coverage.unseen == ()


# 5. Scripted and compiled sub-modules.


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # it still is in use
def test_trap_05_a_scripted_module_is_reported_and_its_border_quantized() -> None:
    torch.manual_seed(0)
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    model = nn.Sequential(nn.Linear(4, 4), scripted, nn.Linear(4, 2)).eval()
    batch = torch.randn(3, 4)
    with instrument(model, batch) as q:
        assert list(q.quantizers) == ["input", "0.weight", "0", "1", "2.weight", "2"]
        assert "can not be seen" in reasons(q)["1 (inside)"]
        quantized(q, batch)
        weights = [grid(q, f"{index}.weight", model[index].weight) for index in (0, 2)]
        hidden = grid(q, "0", F.linear(grid(q, "input", batch), weights[0], model[0].bias))
        expected = F.linear(grid(q, "1", scripted(hidden)), weights[1], model[2].bias)
        assert torch.allclose(model(batch), grid(q, "2", expected), atol=1e-6)


@pytest.mark.filterwarnings("ignore:Using `torch.compile")  # our global hooks are meant to see every module
@pytest.mark.parametrize("whole", [False, True], ids=["part", "all"])
def test_trap_05_a_compiled_module_is_seen_under_its_plain_name(whole: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2)).eval()
    batch = torch.randn(3, 4)
    with instrument(plain, batch) as q:
        names = list(q.quantizers)
        quantized(q, batch)
        expected = plain(batch)
    model: Any = copy.deepcopy(plain)
    if whole:
        model = torch.compile(model, backend="eager")
    else:
        model[1] = torch.compile(model[1], backend="eager")
    with instrument(model, batch) as q:
        assert list(q.quantizers) == names
        assert not any("_orig_mod" in name for name in (*q.quantizers, *reasons(q)))
        quantized(q, batch)
        assert torch.equal(model(batch), expected)
    assert torch.allclose(model(batch), plain(batch))

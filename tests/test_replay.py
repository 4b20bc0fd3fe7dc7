"""Replayed runs against full ones, bit for bit, on networks of every kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quantdebug.instrument import Instrumentation, batch_runs, instrument
from lightning_quantdebug.layers import Call
from lightning_quantdebug.model_loan import call_with
from lightning_quantdebug.recorder import plain_containers
from lightning_quantdebug.replay import Memo
from lightning_quantdebug.target import Mode
from tests import zoo

torch.set_num_threads(1)


def flat(value: Any) -> list[Tensor]:
    value = plain_containers(value)
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [tensor for item in items for tensor in flat(item)]


def outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    torch.manual_seed(7)
    return [tensor.clone() for tensor in flat(call_with(model, batch))]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(some, others, strict=True)
    )


def only(q: Instrumentation, name: str) -> None:
    for quantizer in q.quantizers.values():
        quantizer.mode = Mode.QUANTIZE if quantizer.name == name else Mode.BYPASS


def all_but(q: Instrumentation, name: str) -> None:
    for quantizer in q.quantizers.values():
        quantizer.mode = Mode.BYPASS if quantizer.name == name else Mode.QUANTIZE


def assert_replays(
    model: nn.Module, batch: Any, target: str = "w4a4", switch: Callable[[Instrumentation, str], None] = only
) -> Memo:
    """Every quantizer switched alone: replayed as computed in full, also in two rounds and after one another."""
    memo = Memo()
    with torch.no_grad(), instrument(model, batch, target) as q:
        q.calibrate([batch])
        q.set_mode("bypass" if switch is only else "quantize")
        plain = outputs(model, batch)
        with q.memoized(memo, record=True):
            assert same(outputs(model, batch), plain)
        with q.memoized(memo):
            assert same(outputs(model, batch), plain)
        changed = 0
        for _ in range(2):
            for name in q.quantizers:
                switch(q, name)
                with q.memoized(memo):
                    replayed = outputs(model, batch)
                full = outputs(model, batch)
                assert same(replayed, full), name
                changed += not same(full, plain)
        assert changed
        q.set_mode("bypass" if switch is only else "quantize")
        with q.memoized(memo):
            assert same(outputs(model, batch), plain)
    return memo


@pytest.mark.parametrize("name", zoo.ZOO)
@pytest.mark.parametrize("switch", [only, all_but])
def test_every_network_replays_bit_for_bit(name: str, switch: Callable[[Instrumentation, str], None]) -> None:
    model, batch = zoo.make(name)
    memo = assert_replays(model, batch, switch=switch)
    assert memo.reused > 0


class Writing(nn.Module):
    """Writes into views, into its own results, and into a tensor that it made; reads what it wrote."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        half = y[:, :3]
        half.mul_(2.0)
        y += x
        z = self.b(y)
        out = torch.zeros(len(x), 12)
        out[:, :6] = z
        out[:, 6:] = self.c(y.relu_())
        z.add_(1.0)
        # What was written into `y` shows in its view as well.
        return out + torch.cat([z, y], 1) + half.mean()


class Viewed(nn.Module):
    """Writes into a result of which it holds a view, and goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        half = y[:, :3]
        y += x
        return self.c(torch.tanh(self.b(y))) + half.mean()


class Transposed(nn.Module):
    """Properties that are tensors, numbers that are read, and an expansion."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        scores = y @ y.T
        z = self.b(scores @ x) * float(y.abs().max())
        return z.mT.sum(0).expand(2, -1) if z.mean().item() > 1e9 else z


class Random(nn.Module):
    """Dropout that was left on, on both sides of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        side = F.dropout(self.c(x), 0.5)
        return self.b(F.dropout(F.relu(self.a(x)), 0.5)) + side * torch.rand(1)


class Outside(nn.Module):
    """Goes through NumPy, which shares memory, and through an operation of its own class."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        array = y.detach().numpy()
        array *= 2.0
        return self.b(torch.from_numpy(array.copy())) + y


@pytest.mark.parametrize("network", [Writing, Viewed, Transposed, Random, Outside])
@pytest.mark.parametrize("switch", [only, all_but])
def test_networks_that_write_read_and_draw_replay_bit_for_bit(
    network: type[nn.Module], switch: Callable[[Instrumentation, str], None]
) -> None:
    torch.manual_seed(0)
    assert_replays(network().eval(), torch.randn(5, 6), switch=switch)


class Branch(nn.Module):
    """Turns another way when one quantizer moves a sum, and then meets operations that were not recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.bound = 0.0

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        if y.sum().item() != self.bound:
            y = torch.tanh(y) * 2.0
        return self.b(y)


def test_a_branch_that_turns_another_way_is_computed() -> None:
    torch.manual_seed(0)
    model, batch = Branch().eval(), torch.randn(3, 4)
    with torch.no_grad():
        model.bound = F.relu(model.a(batch)).sum().item()
    assert_replays(model, batch)


def test_only_what_stands_behind_the_switched_quantizer_is_computed() -> None:
    model = nn.Sequential(*[layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.ReLU())]).eval()
    batch, calls = torch.randn(4, 8), []

    def tap(call: Call) -> None:
        calls.append(call.name)

    memo = Memo()
    with torch.no_grad(), instrument(model, batch) as q:
        q.calibrate([batch])
        q.set_mode("bypass")
        with q.tapped({layer.key: tap for layer in q.layers}):
            with q.memoized(memo, record=True):
                model(batch)
            assert calls == ["0", "2", "4", "6"]
            counts = {}
            for name in ("0.weight", "4.weight", "3", "7"):
                calls.clear()
                only(q, name)
                with q.memoized(memo):
                    model(batch)
                counts[name] = list(calls)
    # A quantizer on a result needs no operation to be run but those behind it.
    assert counts == {"0.weight": ["0", "2", "4", "6"], "4.weight": ["4", "6"], "3": ["4", "6"], "7": []}


def test_what_is_computed_anew_from_recorded_inputs_counts_as_recorded() -> None:
    """Only what is written into, its view, the writing itself, and what reads the view are computed again."""
    torch.manual_seed(0)
    model, batch, memo = Viewed().eval(), torch.randn(5, 6), Memo()
    with torch.no_grad(), instrument(model, batch) as q:
        q.calibrate([batch])
        q.set_mode("bypass")
        with q.memoized(memo, record=True):
            model(batch)
        with q.memoized(memo):
            model(batch)
    assert (memo.computed, memo.reused) == (5, 3)


def test_a_quantized_result_leaves_the_recorded_one_alone() -> None:
    model, batch = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(3, 4)
    memo = Memo()
    with torch.no_grad(), instrument(model, batch, "w2a2") as q:
        q.calibrate([batch])
        q.set_mode("bypass")
        with q.memoized(memo, record=True):
            kept = model(batch)
        before = kept.clone()
        only(q, "1")
        with q.memoized(memo):
            assert not torch.equal(model(batch), before)
        assert torch.equal(kept, before)


def test_a_new_recording_forgets_the_old_one_and_a_cleared_memo_all() -> None:
    model, batch = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(3, 4)
    other = torch.randn(3, 4)
    memo = Memo()
    with torch.no_grad(), instrument(model, batch) as q:
        q.calibrate([batch])
        q.set_mode("bypass")
        for x in (batch, other):
            with q.memoized(memo, record=True):
                model(x)
        with q.memoized(memo):
            assert torch.equal(model(other), nn.Sequential.forward(model, other))
            assert memo.reused == 2
            model(batch)
        assert memo.computed == 2
        memo.clear()
        with q.memoized(memo):
            model(other)
        assert memo.computed == 4


def test_changed_weights_and_batches_are_computed() -> None:
    model, batch = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(3, 4)
    memo = Memo()
    with torch.no_grad(), instrument(model, batch) as q:
        q.calibrate([batch])
        q.set_mode("bypass")
        with q.memoized(memo, record=True):
            model(batch)
        model[0].weight.mul_(2.0)
        with q.memoized(memo):
            assert torch.equal(model(batch), F.relu(F.linear(batch, model[0].weight, model[0].bias)))
        batch.mul_(3.0)
        with q.memoized(memo):
            assert torch.equal(model(batch), F.relu(F.linear(batch, model[0].weight, model[0].bias)))


def test_the_memo_is_let_go_of_after_an_exception() -> None:
    model, batch = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(3, 4)
    memo = Memo()
    with torch.no_grad(), instrument(model, batch) as q:
        q.calibrate([batch])
        q.set_mode("bypass")
        with pytest.raises(RuntimeError, match="mat1"), q.memoized(memo, record=True):
            model(torch.randn(3, 5))
        assert torch.equal(model(batch), nn.Sequential.forward(model, batch))
        assert (memo.computed, memo.reused) == (0, 0)


def test_calibration_batches_can_be_replayed() -> None:
    model, batch = zoo.make("resnet")
    with instrument(model, batch) as q:
        q.calibrate([batch])
        q.set_mode("bypass")
        memo, found = Memo(), []

        def visit(run: Callable[[], Any], index: int) -> None:
            with q.memoized(memo, record=True):
                found.append(run().clone())
            with q.memoized(memo):
                found.append(run().clone())

        batch_runs(q, [batch])(visit)
    assert torch.equal(*found)
    assert memo.computed == 0

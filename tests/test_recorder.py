"""Recording a run: values by identity, constants, in-place operations, names, several runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quantdebug.recorder import Recorder, plain_containers
from lightning_quantdebug.topology import Operation, Run, Topology
from tests import zoo

torch.set_num_threads(1)


def record(model: nn.Module, *inputs: Any, call: Callable[..., Any] | None = None, step: bool = False) -> Run:
    names = {id(tensor): f"input.{index}" for index, tensor in enumerate(inputs)}
    recorder = Recorder(model, inputs=names)
    with torch.no_grad(), recorder.active(step):
        result = (call or model)(*inputs)
    recorder.escaped(result)
    return recorder.run


def topology(*runs: Run) -> Topology:
    found = Topology()
    for run in runs:
        found.add(run)
    return found


def function(body: Callable[..., Any], **tensors: Tensor) -> nn.Module:
    """A module whose forward is ``body(module, x)``."""

    class Made(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, tensor in tensors.items():
                self.register_parameter(name, nn.Parameter(tensor))
            self.register_buffer("buffer", torch.ones(2))

        def forward(self, *args: Tensor) -> Any:
            return body(self, *args)

    return Made()


def by_op(run: Run, name: str) -> Operation:
    found = [operation for operation in run.operations if operation.op == name]
    assert len(found) == 1, (name, [operation.op for operation in run.operations])
    return found[0]


def test_values_are_followed_from_producer_to_consumer() -> None:
    x = torch.ones(2)
    run = record(function(lambda m, x: torch.exp(torch.sin(x)) + torch.sin(x).mul(2.0)), x)
    sines = [operation for operation in run.operations if operation.op == "sin"]
    assert [value.name for _, value in sines[0].inputs] == ["input.0"]
    assert sines[0].inputs[0][1] is sines[1].inputs[0][1]
    assert by_op(run, "exp").inputs[0][1] is sines[0].outputs[0]
    assert [user.op for user, _ in sines[0].outputs[0].consumers] == ["exp"]
    add = by_op(run, "add")
    assert [value.producer.op for _, value in add.inputs] == ["exp", "mul"]
    assert add.outputs[0].escapes
    assert not sines[0].outputs[0].escapes
    assert by_op(run, "mul").arguments == {"1": 2.0}


@pytest.mark.parametrize(
    ("body", "constant", "from_parameter"),
    [
        (lambda m, x: m.w * 2 + x, True, True),
        (lambda m, x: m.buffer * 2 + x, True, True),
        (lambda m, x: torch.arange(2.0) * 2 + x, True, False),
        (lambda m, x: torch.zeros_like(x) * 2 + x, True, False),
        (lambda m, x: x.new_full((2,), 3.0) * 2 + x, True, False),
        (lambda m, x: torch.rand(2) * 2 + x, False, False),
        (lambda m, x: torch.from_numpy(x.numpy().copy()) * 2 + x, False, False),
        (lambda m, x: torch.from_numpy(np.ones(2, dtype=np.float32)) * 2 + x, False, False),
        (lambda m, x: (m.w + x) * 2 + x, False, False),
        (lambda m, x: torch.rand_like(m.w) * 2 + x, False, False),
    ],
    ids=["parameter", "buffer", "arange", "zeros_like", "new_full", "rand", "numpy", "numpy_constant", "data", "noise"],
)
def test_what_is_constant(body: Any, constant: bool, from_parameter: bool) -> None:
    run = record(function(body, w=torch.ones(2)), torch.ones(2))
    product = by_op(run, "mul")
    assert (product.outputs[0].constant, product.outputs[0].from_parameter) == (constant, from_parameter)
    assert product.constant == constant


def test_a_number_is_remembered_where_it_is_constant() -> None:
    run = record(function(lambda m, x: x * torch.full((1,), 0.25) + x.mean(), w=torch.ones(2)), torch.ones(2))
    assert [value.number for _, value in by_op(run, "mul").inputs] == [None, 0.25]
    assert [value.number for _, value in by_op(run, "add").inputs] == [None, None]


def test_numbers_from_integers_alone_are_discrete() -> None:
    ids = torch.ones(2, 2, dtype=torch.long)
    run = record(
        function(lambda m, ids: (ids.float() * 2 + torch.arange(2.0), F.embedding(ids, m.w) - 1.0), w=torch.ones(3, 2)),
        ids,
    )
    assert by_op(run, "add").outputs[0].discrete
    assert by_op(run, "mul").outputs[0].discrete
    assert not by_op(run, "embedding").outputs[0].discrete
    assert not by_op(run, "sub").outputs[0].discrete


def test_what_leaves_torch_escapes() -> None:
    run = record(function(lambda m, x: torch.from_numpy(torch.sin(x).numpy()) + 1.0), torch.ones(2))
    assert by_op(run, "sin").outputs[0].escapes


def test_reading_one_number_is_no_escape() -> None:
    run = record(function(lambda m, x: x * torch.sin(x).sum().item()), torch.ones(2))
    assert not by_op(run, "sum").outputs[0].escapes
    assert [user.op for user, _ in by_op(run, "sum").outputs[0].consumers] == ["item"]


# In place.


def chained(m: Any, x: Tensor) -> Tensor:
    y = torch.sin(x)
    y += 1.0
    return F.relu(y, inplace=True)


def discarded(m: Any, x: Tensor) -> Tensor:
    y = torch.sin(x)
    y.add_(1.0)
    return y


def through_a_view(m: Any, x: Tensor) -> Tensor:
    y = torch.sin(x)
    y[:1].add_(1.0)
    return y


def kept_view(m: Any, x: Tensor) -> Tensor:
    y = torch.sin(x)
    view = y.view(-1)
    y.add_(1.0)
    return view * 2


@pytest.mark.parametrize(("body", "unsafe"), [(chained, 0), (discarded, 1), (through_a_view, 1), (kept_view, 1)])
def test_in_place_operations_whose_effect_is_used_are_found(body: Any, unsafe: int) -> None:
    model, x = function(body), torch.ones(2)
    run = record(model, x.clone())
    assert len(run.unsafe) == unsafe
    recorder = Recorder(model, real=frozenset(run.unsafe))
    with torch.no_grad(), recorder.active():
        result = model(x.clone())
    assert recorder.run.unsafe == run.unsafe
    assert torch.equal(result, model(x.clone()))


def test_after_a_real_write_every_view_holds_the_result() -> None:
    model, x = function(kept_view), torch.ones(2)
    first = record(model, x)
    recorder = Recorder(model, real=frozenset(first.unsafe))
    with torch.no_grad(), recorder.active():
        model(x)
    added = by_op(recorder.run, "add")
    assert by_op(recorder.run, "mul").inputs[0][1] is added.outputs[0]


def test_writing_into_a_constant_makes_it_data() -> None:
    def fill(m: Any, x: Tensor) -> Tensor:
        y = torch.zeros(2)
        y[:] = x
        return y * 2

    run = record(function(fill), torch.ones(2))
    assert not by_op(run, "mul").outputs[0].constant
    assert by_op(run, "mul").inputs[0][1].producer.op == "setitem"


# Names and several runs.


def test_operations_are_named_after_their_modules() -> None:
    model, x = zoo.make("resnet")
    names = [operation.name for operation in topology(record(model, x))]
    assert names[:4] == ["conv1", "bn1", "relu", "maxpool"]
    assert {"layer1.0.relu", "layer1.0.relu@1", "layer1.0.add", "layer1.1.downsample.0", "flatten"} <= set(names)
    assert len(names) == len(set(names))


def test_names_are_the_same_in_every_run_and_order() -> None:
    model, _ = zoo.make("branching")
    positive, negative = torch.full((2, 8), 0.1), torch.full((2, 8), -0.1)
    runs = [record(model, positive), record(model, negative), record(model, positive)]
    names = [[operation.name for operation in run] for run in topology(*runs).runs]
    assert names[0] == names[2]
    assert {"a", "relu"} <= set(names[0]) - set(names[1])
    assert {"b", "tanh", "add"} <= set(names[1]) - set(names[0])
    keys = [{operation.name: operation.key for operation in run} for run in topology(*runs).runs]
    assert all(keys[0][name] == keys[1][name] for name in keys[0].keys() & keys[1].keys())


def test_keys_are_shared_where_counts_differ_and_only_there() -> None:
    class Loops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.often, self.once = nn.Tanh(), nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(len(x)):
                x = torch.sin(self.often(x))
            return torch.cos(torch.cos(self.once(self.once(x))))

    model = Loops()
    found = topology(record(model, torch.ones(2)), record(model, torch.ones(3)))
    shared = found.shared_keys()
    assert {(key.path, key.call, key.occurrence) for key in shared.values() if key.path == "often"} == {
        ("often", None, 0)
    }
    assert {(key.call, key.occurrence) for key in shared.values() if key.path == "once"} == {(0, 0), (1, 0)}
    sines = {key for key in shared.values() if key.func is torch.sin}
    assert [(key.call, key.occurrence) for key in sines] == [(0, None)]
    assert all(key.occurrence == 0 for key in shared.values() if key.func is torch.cos)
    assert len(found.runs) == 2


def test_what_a_step_does_behind_the_network_is_dropped() -> None:
    class Step(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)

        def step(self, x: Tensor) -> Tensor:
            x = x * 3.0
            hidden = torch.sigmoid(self.first(x))
            out = self.second(hidden)
            penalty = sum(parameter.pow(2).mean() for parameter in self.parameters())
            return (
                F.cross_entropy(out, torch.zeros(len(x), dtype=torch.long)) + penalty + (out.abs() > 1).float().mean()
            )

    model = Step()
    run = record(model, torch.ones(3, 2), call=model.step, step=True)
    assert [operation.name for operation in topology(run)] == ["mul", "first", "sigmoid", "second"]
    assert next(operation for operation in topology(run) if operation.name == "second").outputs[0].escapes


@dataclass
class Output:
    logits: Any
    _hidden: int = 0


def test_containers_become_plain() -> None:
    x = torch.ones(1)
    assert plain_containers(Output([x, (x, "a")])) == {"logits": [x, [x, "a"]]}
    assert plain_containers({"a": Output(None)}) == {"a": {"logits": None}}
    assert plain_containers(3) == 3

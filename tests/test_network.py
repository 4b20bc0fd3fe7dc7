"""A network's arguments and results by name, in every structure, and its operations in another order."""

from __future__ import annotations

import json
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quantdebug import Instrumentation, QuantTarget
from lightning_quantdebug.errors import CaptureError
from lightning_quantdebug.network import (
    Network,
    NetworkCall,
    Wiring,
    argument_names,
    named_outputs,
    output_tensors,
    sites_of_runs,
    with_output_tensors,
)

torch.set_num_threads(1)


class Takes(nn.Module):
    """A module with every kind of parameter."""

    def forward(self, x: Any, /, sizes: Any = None, *rest: Any, mask: Any = None, **more: Any) -> Any:
        return x


def tensors(count: int) -> list[Tensor]:
    return [torch.full((1,), float(index)) for index in range(count)]


def names_of(*args: Any, **kwargs: Any) -> list[str]:
    return argument_names(Network(Takes()), NetworkCall(args, kwargs))


def test_arguments_are_called_as_the_parameters_are() -> None:
    a, b, c, d = tensors(4)
    assert names_of(a, b, mask=c) == ["x", "sizes", "mask"]
    assert names_of(a, mask=c, sizes=b) == ["x", "mask", "sizes"]
    assert names_of(a, [b, {"low": c, "high": 3}]) == ["x", "sizes_0", "sizes_1_low"]
    assert names_of(a, 3, b, c, other=d) == ["x", "rest_0", "rest_1", "more_other"]
    assert names_of(None, a) == ["sizes"]


def test_arguments_that_can_not_be_told_apart_are_numbered() -> None:
    a, b = tensors(2)
    assert names_of(a, a) == ["sizes_0", "sizes_1"]
    # No such call is possible: nothing is known of it.
    assert names_of(sizes=a, mask=b) == ["input_0", "input_1"]


def test_a_compiled_module_has_the_names_of_what_it_was_made_of() -> None:
    call = NetworkCall((torch.ones(1),), {})
    assert argument_names(Network(torch.compile(Takes())), call) == ["x"]  # type: ignore[arg-type] # it is a module


@dataclass
class Record:
    """A result."""

    logits: Tensor
    hidden: tuple[Tensor, ...] = ()
    loss: Tensor | None = None
    _private: Tensor | None = None


@dataclass(frozen=True)
class Frozen:
    scores: Any


@dataclass(slots=True)
class Slotted:
    boxes: Any
    label: str = "cat"


class Own:
    """No dataclass."""

    def __init__(self, value: Any) -> None:
        self.value = value


Pair = namedtuple("Pair", "left right")  # what users write


def structures() -> dict[str, tuple[Any, list[str]]]:
    a, b, c = tensors(3)
    return {
        "tensor": (a, ["output"]),
        "tuple": ((a, None, b), ["output_0", "output_2"]),
        "list": ([a, [b, c]], ["output_0", "output_1_0", "output_1_1"]),
        "dict": ({"x": a, "y": {"z": b}}, ["x", "y_z"]),
        "ordered": (OrderedDict(second=a, first=b), ["second", "first"]),
        "namedtuple": (Pair(a, b), ["output_0", "output_1"]),
        "dataclass": (Record(a, (b, c)), ["logits", "hidden_0", "hidden_1"]),
        "frozen": (Frozen({"x": a, "y": None}), ["scores_x"]),
        "slots": (Slotted([a, b]), ["boxes_0", "boxes_1"]),
        "own": (Own(Own((a, 3, "text"))), ["value_value_0"]),
        "mixed": ([{"x": Pair(a, Record(b))}, c], ["output_0_x_0", "output_0_x_1_logits", "output_1"]),
        "maximum": (torch.max(torch.ones(2, 2), 1), ["output_0", "output_1"]),
        "nothing": ((None, "text", 3), []),
    }


@pytest.mark.parametrize("name", structures())
def test_results_are_taken_out_and_put_back(name: str) -> None:
    output, names = structures()[name]
    assert [key for key, _ in named_outputs(output)] == names
    found = output_tensors(output)
    assert len(found) == len(names)
    other = [tensor + 10 for tensor in found]
    changed = with_output_tensors(output, other)
    assert type(changed) is type(output)
    assert all(one is two for one, two in zip(output_tensors(changed), other, strict=True))
    # What was given is as it was, and everything but tensors is in the other too.
    assert all(one is two for one, two in zip(output_tensors(output), found, strict=True))
    assert all(one is two for one, two in zip(output_tensors(with_output_tensors(changed, found)), found, strict=True))
    if not names:
        assert changed == output
    if name == "slots":
        assert changed.label == "cat"


def test_what_is_private_and_what_is_a_module_is_no_result() -> None:
    (a,) = tensors(1)
    assert list(named_outputs(Record(a, (), None, a + 1))) == [("logits", a)]
    assert output_tensors(nn.Linear(2, 2)) == []


def test_a_path_that_leads_nowhere_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert Network(model, "0").module is model[0]
    with pytest.raises(CaptureError, match="Sequential has no module 'net', which is the network"):
        Network(model, "net")


def test_a_call_is_copied_with_its_structure() -> None:
    a, b = tensors(2)
    call = NetworkCall(([a, 3],), {"y": b}, output=(a.requires_grad_(),))
    copied = call.copied()
    assert copied.args[0][1] == 3
    assert [tensor.item() for tensor in copied.tensors] == [0.0, 1.0]
    assert all(one is not two for one, two in zip(copied.tensors, call.tensors, strict=True))
    assert copied.results == []
    assert not call.results[0].requires_grad


# Operations in another order.


class Alike(nn.Module):
    """Branches of operations of one kind, and a loop."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor, first: bool, rounds: int) -> Tensor:
        x = torch.tanh(x) if first else F.relu(torch.tanh(x * 2))
        for _ in range(rounds):
            x = F.relu(self.lin(x))
        return x * 3


def recorded(model: Alike, calls: list[tuple[bool, int]], session: Instrumentation | None = None) -> Instrumentation:
    session = session or Instrumentation(model, QuantTarget.from_value("int8"))
    for first, rounds in calls:
        args = (torch.ones(2, 4), first, rounds)
        Network(model, "", ("input",)).record(session, args, {})
    session.place()
    return session


def kinds(session: Instrumentation) -> dict[str, set[tuple[int, ...]]]:
    """The instruction behind each name."""
    return {op.name: {tuple(op.key.site[1::2])} for op in session.topology}


FIRST, SECOND, LOOP = (True, 1), (False, 1), (False, 3)


@pytest.mark.parametrize("lost", [None, "at", "after"])
@pytest.mark.parametrize("calls", [[FIRST, SECOND, LOOP], [LOOP, FIRST, SECOND], [SECOND, FIRST], [LOOP, FIRST]])
def test_operations_have_their_names_in_any_order(lost: str | None, calls: list[tuple[bool, int]]) -> None:
    model = Alike()
    session = recorded(model, calls)
    wiring = Wiring.of(session, Network(model))
    values = json.loads(json.dumps(wiring.to_dict()))
    if lost is not None:
        for item in values["operations"].values():
            item[lost] = []
    wiring = Wiring.from_dict(values)
    expected = kinds(session)
    other = Instrumentation(model, QuantTarget.from_value("int8"))
    other.topology = wiring.topology()
    for call in reversed(calls):
        recorded(model, [call], other)
        assert other.quantizers.keys() <= session.quantizers.keys()
    assert kinds(other) == expected
    assert sorted(other.quantizers) == sorted(session.quantizers)
    assert set.union(*sites_of_runs(other)) == set(session.quantizers)


class Looped(nn.Module):
    """A module called in a loop, each call of which has a quantizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor, rounds: int) -> Tensor:
        for _ in range(rounds):
            x = torch.sigmoid(self.lin(x))
        return x


@pytest.mark.parametrize("first", [1, 3])
def test_calls_and_rounds_share_quantizers_from_the_first_on(first: int) -> None:
    model = Looped()
    network = Network(model, "", ("input",))
    session = Instrumentation(model, QuantTarget.from_value("int8"))
    for rounds in (1, 3):
        network.record(session, (torch.ones(2, 4), rounds), {})
    session.place()
    other = Instrumentation(model, QuantTarget.from_value("int8"))
    other.topology = Wiring.of(session, network).topology()
    network.record(other, (torch.ones(2, 4), first), {})
    other.place()
    assert list(other.quantizers) == list(session.quantizers) == ["input", "lin.weight", "lin", "sigmoid"]


def test_other_operations_get_names_that_are_not_taken() -> None:
    model = Alike()
    wiring = Wiring.of(recorded(model, [FIRST]), Network(model))
    other = Instrumentation(model, QuantTarget.from_value("int8"))
    other.topology = wiring.topology(taken=("relu.1", "mul.1"))
    recorded(model, [SECOND], other)
    known = [op.name for op in other.topology if op.name in wiring.after]
    assert known == ["lin", "relu", "mul"]
    assert [op.name for op in other.topology if op.name not in wiring.after] == ["mul.2", "tanh.1", "relu.2"]


def test_what_is_made_outside_the_network_comes_from_nowhere() -> None:
    model = nn.Sequential(nn.ReLU(), nn.Linear(4, 4))
    session = Instrumentation(model, QuantTarget.from_value("int8"))
    Network(model).record(session, (torch.ones(2, 4),), {})
    session.place()
    assert Wiring.of(session, Network(model)).after["1"] == {("0", "1.weight", "1.bias")}
    inner = Wiring.of(session, Network(model, "1"))
    assert inner.after == {"1": {("", "1.weight", "1.bias")}}
    assert inner.quantizers["1"] == {"1.weight", "1"}

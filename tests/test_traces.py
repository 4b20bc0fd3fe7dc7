"""Two runs are compared output by output, and the first that differs is named."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quantdebug.traces import OutputTrace, Parting, SizeTrace, module_outputs, relative_error, tensors_of

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("value", "reference", "expected"),
    [
        ([3.0, 4.0], [3.0, 4.0], 0.0),
        ([3.0, 4.5], [3.0, 4.0], 0.1),
        ([1.0, NAN, INF, -INF], [1.0, NAN, INF, -INF], 0.0),
        ([3.0, 4.5, INF], [3.0, 4.0, INF], 0.1),
        ([1.0, NAN], [1.0, 1.0], INF),
        ([1.0, 1.0], [1.0, NAN], INF),
        ([1.0, INF], [1.0, -INF], INF),
        ([1e-30], [0.0], INF),
        ([1.0], [1.0, 1.0], INF),
    ],
)
def test_relative_error(value: list[float], reference: list[float], expected: float) -> None:
    assert relative_error(torch.tensor(value), torch.tensor(reference)) == pytest.approx(expected)


def test_half_precision_does_not_overflow_in_the_comparison() -> None:
    value = torch.full((1000,), 60000.0, dtype=torch.float16)
    assert relative_error(value * 0, value) == 1.0


@pytest.mark.parametrize("make", [OutputTrace, SizeTrace])
def test_the_first_parting_is_named(make: Any) -> None:
    trace, generator = make(), torch.Generator().manual_seed(0)
    first = [(name, torch.randn(50, 4, generator=generator)) for name in "abcd"]
    for name, output in first:
        trace.keep(name, {"out": output, "index": torch.arange(3)})
    for name, output in first:
        noise = {"b": 1e-6, "c": 1e-2, "d": 1.0}.get(name, 0.0) * torch.randn(50, 4, generator=generator)
        trace.compare(name, {"out": output + noise, "index": torch.arange(3) + 1})
    assert [parting.name for parting in trace.errors] == list("abcd")
    assert trace.errors[0].error == 0.0
    assert trace.first_beyond(1e-4).name == "c"
    assert trace.first_beyond(1e-9).name == "b"
    assert trace.first_beyond(0.0).name == "b"
    assert trace.first_beyond(1e3) is None
    assert 1e-3 < trace.errors[2].error < 1e-1


@pytest.mark.parametrize("make", [OutputTrace, SizeTrace])
def test_runs_of_other_operations_part_where_they_do(make: Any) -> None:
    trace = make()
    trace.keep("a", torch.ones(2))
    trace.keep("b", torch.ones(2))
    for name in ("a", "c", "d"):
        trace.compare(name, torch.ones(2))
    assert trace.first_beyond(0.5) == Parting("c", INF)
    assert trace.errors[-1] == Parting("d", INF)


def test_the_size_of_what_is_not_finite_or_nothing() -> None:
    trace = SizeTrace()
    for name, value in (("nan", NAN), ("inf", INF), ("zero", 0.0)):
        trace.keep(name, torch.tensor([value]))
    for name, value in (("nan", NAN), ("inf", INF), ("zero", 1e-9)):
        trace.compare(name, torch.tensor([value]))
    assert [parting.error for parting in trace.errors] == [0.0, 0.0, INF]


def test_a_permutation_and_a_softmax_have_another_size() -> None:
    rows = torch.arange(12.0).reshape(4, 3)
    for first, second in ((rows, rows.flip(0)), (rows.softmax(1), (rows * 2).softmax(1))):
        trace = SizeTrace()
        trace.keep("a", first)
        trace.compare("a", second)
        assert trace.errors[0].error > 1e-3


def test_each_output_may_have_a_bound_of_its_own() -> None:
    trace = OutputTrace(frozenset("s"))
    for name in "asb":
        trace.keep(name, torch.ones(4))
    for name, factor in (("a", 1.1), ("s", 9.0), ("b", 1.2)):
        trace.compare(name, factor * torch.ones(4))
    assert [parting.name for parting in trace.errors] == ["a", "b"]
    assert trace.first_beyond(0.05, [0.15, 0.15]) == trace.errors[1]
    assert trace.first_beyond(0.05, [0.15, 0.25]) is None
    assert trace.first_beyond(0.05, [0.15]) == trace.errors[1]
    assert trace.first_beyond(0.15, [0.0, 0.0]) == trace.errors[1]
    assert trace.worst() == trace.errors[1]
    assert OutputTrace().worst() is None


def test_a_trace_can_be_compared_with_again() -> None:
    trace = OutputTrace()
    trace.keep("a", torch.ones(4))
    trace.compare("a", 2 * torch.ones(4))
    other = trace.again()
    other.compare("a", torch.ones(4))
    assert (trace.errors[0].error, other.errors[0].error) == (1.0, 0.0)


def test_what_is_kept_is_not_written_into_later() -> None:
    trace, tensor = OutputTrace(), torch.ones(2)
    trace.keep("a", tensor)
    tensor.mul_(2)
    trace.compare("a", torch.ones(2))
    assert trace.errors[0].error == 0.0


@pytest.mark.parametrize(("dtype", "half"), [(torch.float32, False), (torch.bfloat16, True), (torch.float16, True)])
def test_half_precision_is_noticed(dtype: torch.dtype, half: bool) -> None:
    trace = OutputTrace()
    trace.keep("a", torch.ones(2, dtype=dtype))
    trace.compare("a", torch.ones(2, dtype=dtype))
    assert trace.in_half_precision is half


def test_only_real_numbers_are_compared() -> None:
    output = [torch.ones(1), torch.ones(1, dtype=torch.int64), {"x": torch.zeros(2)}, None, torch.ones(2).to_sparse()]
    assert [tensor.shape[0] for tensor in tensors_of(output)] == [1, 2]


def test_module_outputs_come_from_the_inside_out_and_leave_no_hook() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.ReLU()
            self.loss = nn.MSELoss()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.loss(x, x)

    block, seen = nn.Sequential(Block()), []
    with module_outputs(block, lambda name, output: seen.append((name, output.sum().item()))):
        block(torch.ones(2))
        nn.ReLU()(torch.ones(2))
    block(torch.ones(2))
    assert seen == [("0.inner", 2.0), ("0", 2.0), ("Sequential", 2.0)]
    assert math.isfinite(seen[0][1])

"""The table of operations: one name for every way of calling, in-place and functional forms, slots."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quantdebug.operations import (
    CATEGORY_OF,
    NO_ARITHMETIC,
    Category,
    category_of,
    functional_call,
    in_place_target,
    operation_name,
    parameters_of,
    replace_slot,
    tensors_in,
    value_at,
    with_argument,
)

X = torch.tensor([-1.0, 2.0])

SAME_NAME = {
    "add": [torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__, torch.ops.aten.add],
    "sub": [torch.sub, Tensor.sub_, Tensor.__sub__, Tensor.__isub__],
    "rsub": [torch.rsub, Tensor.__rsub__],
    "mul": [torch.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__, torch.ops.aten.mul.Tensor],
    "div": [torch.div, Tensor.__truediv__, Tensor.__itruediv__],
    "matmul": [torch.matmul, Tensor.__matmul__, Tensor.__rmatmul__],
    "relu": [torch.relu, torch.relu_, F.relu, Tensor.relu, Tensor.relu_],
    "sigmoid": [torch.sigmoid, torch.sigmoid_, F.sigmoid, Tensor.sigmoid],
    "conv2d": [F.conv2d, torch.conv2d],
    "getitem": [Tensor.__getitem__],
    "setitem": [Tensor.__setitem__],
    "T": [Tensor.T.__get__],
    "copy_": [Tensor.copy_],
    "scaled_dot_product_attention": [F.scaled_dot_product_attention],
}


@pytest.mark.parametrize(("name", "func"), [(name, func) for name, funcs in SAME_NAME.items() for func in funcs])
def test_one_name_whatever_the_call(name: str, func: Any) -> None:
    assert operation_name(func) == name


@pytest.mark.parametrize(
    ("func", "category"),
    [
        (F.conv_transpose2d, Category.CONVOLUTION),
        (F.linear, Category.LINEAR),
        (torch.bmm, Category.MATMUL),
        (F.embedding, Category.LOOKUP),
        (torch.lstm, Category.RECURRENT),
        (Tensor.__isub__, Category.ADD),
        (Tensor.__rtruediv__, Category.MULTIPLY),
        (F.batch_norm, Category.BATCH_NORM),
        (F.layer_norm, Category.NORM),
        (F.relu6, Category.PIECEWISE_LINEAR),
        (F.gelu, Category.NONLINEAR),
        (F.softmax, Category.BOUNDED),
        (F.adaptive_avg_pool2d, Category.AVERAGE),
        (Tensor.permute, Category.PASS_THROUGH),
        (torch.cat, Category.JOIN),
        (F.cross_entropy, Category.LOSS),
        (torch.randn_like, Category.RANDOM),
        (Tensor.new_zeros, Category.CREATION),
        (torch.argmax, Category.NOT_ARITHMETIC),
        (Tensor.shape.__get__, Category.NOT_ARITHMETIC),
        (Tensor.T.__get__, Category.PASS_THROUGH),
        (torch.fft.fft, Category.OTHER),
        (torch.cumprod, Category.OTHER),
    ],
)
def test_categories(func: Any, category: Category) -> None:
    assert category_of(func) is category


def test_no_name_is_in_two_categories() -> None:
    from lightning_quantdebug import operations

    names = [name for row in operations._CATEGORIES.values() for name in row.split()]
    assert len(names) == len(set(names)) == len(CATEGORY_OF)


def test_what_has_no_arithmetic_has_no_weight_and_no_sum() -> None:
    arithmetic = set(Category) - set(NO_ARITHMETIC)
    assert {Category.CONVOLUTION, Category.ADD, Category.NONLINEAR, Category.OTHER, Category.JOIN} <= arithmetic
    assert Category.PASS_THROUGH not in arithmetic


# Writing in place.


def other() -> Tensor:
    return torch.ones(2)


IN_PLACE: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = [
    (Tensor.add_, (X, 1.0), {}),
    (Tensor.__iadd__, (X, 1.0), {}),
    (Tensor.__imul__, (X, other()), {}),
    (Tensor.relu_, (X,), {}),
    (torch.relu_, (X,), {}),
    (F.relu, (X,), {"inplace": True}),
    (F.relu, (X, True), {}),
    (F.hardtanh, (X, -1.0, 1.0, True), {}),
    (F.leaky_relu, (X, 0.1), {"inplace": True}),
    (F.dropout, (X, 0.5, False, True), {}),
    (Tensor.clamp_, (X, 0.0), {}),
    (Tensor.masked_fill_, (X, X > 0, 3.0), {}),
    (F.elu_, (X,), {}),
]


@pytest.mark.parametrize(("func", "args", "kwargs"), IN_PLACE)
def test_in_place_calls_are_seen_and_have_a_functional_form(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    copied = (X.clone(), *args[1:])
    assert in_place_target(func, copied, kwargs) is copied[0]
    form = functional_call(func, copied, kwargs)
    assert form is not None
    result = form[0](*form[1], **form[2])
    assert torch.equal(copied[0], X), "the functional form wrote into its argument"
    written = func(*copied, **kwargs)
    assert written is copied[0]
    assert torch.equal(written, result)


@pytest.mark.parametrize(
    ("func", "args", "kwargs"),
    [
        (Tensor.copy_, (X, other()), {}),
        (Tensor.zero_, (X,), {}),
        (Tensor.fill_, (X, 1.0), {}),
        (Tensor.__setitem__, (X, 0, 1.0), {}),
        (torch.add, (other(), 1.0), {"out": X}),
        (torch.ops.aten.add_.Tensor, (X, other()), {}),
    ],
)
def test_some_have_none(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert in_place_target(func, args, kwargs) is X
    assert functional_call(func, args, kwargs) is None


@pytest.mark.parametrize(
    ("func", "args", "kwargs"),
    [
        (Tensor.add, (X, 1.0), {}),
        (F.relu, (X,), {}),
        (F.relu, (X, False), {}),
        (F.hardtanh, (X, -1.0, 1.0), {"inplace": False}),
        (Tensor.__invert__, (X > 0,), {}),
        (Tensor.__int__, (X[0],), {}),
        (Tensor.__index__, (X[0],), {}),
        (Tensor.__init__, (X,), {}),
        (Tensor.requires_grad_, (X,), {}),
        (torch.arange, (3,), {}),
        (Tensor.T.__get__, (X,), {}),
        (torch._weight_norm, (X, X), {}),
    ],
)
def test_what_writes_nothing(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    assert in_place_target(func, args, kwargs) is None


# Slots.


class Pair(NamedTuple):
    first: Any
    second: Any


def test_slots_name_every_tensor_and_lead_back_to_it() -> None:
    a, b, c, d = (torch.full((1,), float(number)) for number in range(4))
    args: tuple[Any, ...] = (a, [b, 1], Pair(2, c), None)
    kwargs = {"other": d, "more": {"x": [a]}, "text": "b"}
    found = dict(tensors_in(args, kwargs))
    assert list(found) == [(0,), (1, 0), (2, 1), ("other",), ("more", "x", 0)]
    for slot, tensor in found.items():
        assert value_at(args, kwargs, slot) is tensor
        new = object()
        new_args, new_kwargs = with_argument(args, kwargs, slot, new)
        assert value_at(new_args, new_kwargs, slot) is new
        assert value_at(args, kwargs, slot) is tensor, "the original was changed"
        assert [type(value) for value in new_args[1:]] == [list, Pair, type(None)]


def test_replacing_keeps_the_container() -> None:
    assert replace_slot((1, 2), (1,), 5) == (1, 5)
    assert replace_slot([1, [2, 3]], (1, 0), 5) == [1, [5, 3]]
    assert replace_slot(Pair(1, 2), (0,), 5) == Pair(5, 2)
    assert replace_slot(7, (), 5) == 5


def test_parameters_of_functions_and_of_builtins() -> None:
    assert parameters_of(F.relu) == ("input", "inplace")
    assert parameters_of(torch.conv2d) == ()

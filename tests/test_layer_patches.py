"""Layers as regressions: patches against torch's own kernels and against loops."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quantdebug.instrument import instrument
from lightning_quantdebug.layer_patches import (
    Geometry,
    LayerArguments,
    Patches,
    from_rows,
    layer_arguments,
    pick_outputs,
    to_rows,
)

torch.set_num_threads(1)

SIZES = {1: (11,), 2: (7, 6), 3: (5, 6, 4)}
KERNELS = {1: (3,), 2: (3, 2), 3: (2, 3, 1)}


def read(func: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[LayerArguments, Tensor]:
    """The arguments of a layer as we read them, and its result."""
    found = layer_arguments(func, args, kwargs)
    assert found is not None
    return found, func(*args, **kwargs)


def product(found: LayerArguments, result: Tensor) -> tuple[Tensor, Tensor]:
    """Our product at every position of the output, and torch's output there."""
    patches = Patches(found.x, found.geometry, result.shape)
    positions = torch.arange(patches.count)
    rows = to_rows(found.weight, found.geometry)
    ours = torch.einsum("pgk,gok->pgo", patches.pick(positions), rows)
    if found.bias is not None:
        ours = ours + found.bias.reshape(rows.shape[:2])
    return ours, pick_outputs(result, found.geometry, positions)


def assert_is_the_layer(func: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    found, result = read(func, *args, **kwargs)
    ours, theirs = product(found, result)
    assert ours.numel() == result.numel()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    # `theirs` is the whole result in its order: nothing is left out, repeated or moved.
    axis = 1 if found.geometry.kernel and result.ndim == len(found.geometry.kernel) + 2 else 0
    moved = result.movedim(axis, -1) if found.geometry.kernel else result
    assert torch.equal(theirs.flatten(), moved.flatten())
    rows = to_rows(found.weight, found.geometry)
    assert torch.equal(from_rows(rows, found.geometry, found.weight.shape), found.weight)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_convolution_is_a_product_with_its_patches(dims: int, groups: int) -> None:
    function = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    x, weight, bias = random(3, 4, *SIZES[dims]), random(8, 4 // groups, *KERNELS[dims]), random(8)
    for stride, padding, dilation in itertools.product((1, 2, 3), (0, 1, 2), (1, 2)):
        assert_is_the_layer(function, x, weight, bias, stride, padding, dilation, groups)
    for padding in ("same", "valid"):
        assert_is_the_layer(function, x, weight, None, padding=padding, dilation=2, groups=groups)
    uneven = tuple(range(1, dims + 1))
    assert_is_the_layer(function, x, weight, stride=uneven, padding=uneven[::-1], dilation=uneven, groups=groups)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_transposed_convolution_is_a_product_with_its_patches(dims: int, groups: int) -> None:
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
    x, weight, bias = random(2, 4, *SIZES[dims]), random(4, 6, *KERNELS[dims]), random(6 * groups)
    for stride, padding, dilation in itertools.product((1, 2, 3), (0, 1), (1, 2)):
        assert_is_the_layer(function, x, weight, bias, stride, padding, 0, groups, dilation)
    assert_is_the_layer(function, x, weight, stride=3, padding=1, output_padding=2, groups=groups)
    uneven = tuple(range(1, dims + 1))
    assert_is_the_layer(function, x, weight, stride=uneven, padding=uneven[::-1], dilation=2, groups=groups)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_an_even_kernel_with_padding_same_has_the_odd_zero_behind() -> None:
    for size, dilation in itertools.product((2, 3, 4, 5), (1, 2, 3)):
        assert_is_the_layer(F.conv1d, random(2, 3, 16), random(4, 3, size), padding="same", dilation=dilation)


def test_an_input_without_an_axis_of_samples_is_one_sample() -> None:
    assert_is_the_layer(F.conv2d, random(4, 6, 5), random(8, 4, 3, 3), random(8), 2, 1)
    found, result = read(F.conv2d, random(4, 6, 5), random(8, 4, 3, 3))
    assert Patches(found.x, found.geometry, result.shape).per_sample == 12


@pytest.mark.parametrize("leading", [(5,), (5, 3), (2, 3, 4), ()])
def test_a_linear_layer_has_a_position_for_each_leading_index(leading: tuple[int, ...]) -> None:
    assert_is_the_layer(F.linear, random(*leading, 6), random(4, 6), random(4))
    assert_is_the_layer(torch.matmul, random(*leading, 6), random(6, 4))


def test_products_with_a_weight_on_the_right() -> None:
    assert_is_the_layer(torch.mm, random(5, 6), random(6, 4))
    assert_is_the_layer(torch.addmm, random(4), random(5, 6), random(6, 4))
    assert_is_the_layer(torch.Tensor.__matmul__, random(5, 6), other=random(6, 4))


def test_what_is_no_product_with_one_weight_is_not_read() -> None:
    x, weight, bias = random(5, 6), random(6, 4), random(4)
    assert layer_arguments(torch.addmm, (bias, x, weight), {"alpha": 2}) is None
    assert layer_arguments(torch.addmm, (bias, x, weight), {"beta": 0.5}) is None
    assert layer_arguments(torch.addmm, (random(5, 4), x, weight), {}) is None
    assert layer_arguments(torch.matmul, (x, random(2, 6, 4)), {}) is None
    assert layer_arguments(F.linear, (x, random(6)), {}) is None
    assert layer_arguments(F.bilinear, (x, x, random(2, 6, 6)), {}) is None
    assert layer_arguments(F.embedding, (torch.tensor([1]), weight), {}) is None


def test_patches_against_a_loop() -> None:
    x, geometry = random(2, 4, 6, 5), Geometry((2, 3), (2, 1), (1, 2), (1, 2), groups=2)
    weight = random(6, 2, 2, 3)
    result = F.conv2d(x, weight, None, geometry.stride, geometry.padding, geometry.dilation, 2)
    patches = Patches(x, geometry, result.shape)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (1, 1), (2, 2)))
    position = 0
    for n, i, j in np.ndindex(2, *result.shape[2:]):
        for group in range(2):
            expected = [
                padded[n, 2 * group + channel, 2 * i + a, j + 2 * b]
                for a in range(2)
                for b in range(3)
                for channel in range(2)
            ]
            assert patches.pick(torch.tensor([position]))[0, group].tolist() == expected
        position += 1
    assert position == patches.count
    assert patches.per_sample == position // 2


def test_a_transposed_patch_is_that_of_the_zero_stuffed_input_and_the_flipped_kernel() -> None:
    x, weight = random(1, 1, 4), random(1, 1, 3)
    stuffed = np.zeros(10)  # stride 3: 4 + 3 * 2 values
    stuffed[::3] = x.numpy()[0, 0]
    padded = np.pad(stuffed, 2)  # kernel - 1 - padding, padding 0
    flipped = weight.numpy()[0, 0, ::-1]
    found, result = read(F.conv_transpose1d, x, weight, stride=3)
    patches = Patches(x, found.geometry, result.shape)
    for place in range(result.shape[-1]):
        patch = patches.pick(torch.tensor([place]))[0, 0].numpy()
        assert (patch[::-1] == padded[place : place + 3]).all()
        assert result[0, 0, place].item() == pytest.approx(float(padded[place : place + 3] @ flipped))


@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular", "replicate"])
@pytest.mark.parametrize("padding", [2, "same"])
def test_other_paddings_come_as_an_operation_of_their_own(mode: str, padding: int | str) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=padding, dilation=2, padding_mode=mode)).double()
    x = random(2, 2, 8, 8)
    calls = []
    with instrument(model, x) as session:
        session.calibrate([x])
        (layer,) = session.layers
        with session.tapped({layer.key: calls.append}), session.reference():
            session.run_until(lambda: model(x), layer.key)
    assert_is_the_layer(calls[0].func, *calls[0].args, **calls[0].kwargs)
    assert torch.equal(calls[0].result, model(x))


def test_infinity_outside_the_patch_does_not_leak_into_padding() -> None:
    x = torch.tensor([[[1.0, 2.0, float("inf")]]])
    patches = Patches(x, Geometry((3,), (1,), (1,), (1,)), (1, 1, 3))
    assert patches.pick(torch.tensor([0])).tolist() == [[[0.0, 1.0, 2.0]]]
    assert patches.pick(torch.tensor([2])).tolist() == [[[2.0, float("inf"), 0.0]]]

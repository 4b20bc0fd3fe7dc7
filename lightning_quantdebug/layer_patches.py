"""A layer as a regression: each output position and the patch of the input that it is computed from.

Whatever a convolution, transposed convolution or linear layer is, each of its outputs is a product ``W x + b`` of a
weight row and a patch of the input. Taken position by position,

    ``Y[p, g, o] = sum over k of X[p, g, k] * W[g, o, k] + b[g, o]``

with ``p`` a position (sample and place in the output), ``g`` a group, ``o`` an output channel of the group and ``k`` an
input of it.

``k`` runs over the kernel first and over the group's input channels second: the input is laid out with its channels
last, so a patch is a handful of whole rows. Rows outside the input are zero. A transposed convolution is read the same
way: the output at ``o`` takes tap ``j`` from the input at ``(o + padding - j * dilation) / stride`` where that is
whole, which is a convolution of the zero-stuffed input with the flipped kernel without making either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_quantdebug.operations import operation_name

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_ARGUMENTS: dict[str, tuple[str, ...]] = {
    **{f"conv{dims}d": _CONVOLUTION for dims in (1, 2, 3)},
    **{f"conv_transpose{dims}d": _TRANSPOSED for dims in (1, 2, 3)},
    "linear": ("input", "weight", "bias"),
    "matmul": ("input", "other"),
    "mm": ("input", "mat2"),
    "addmm": ("input", "mat1", "mat2"),
}


@dataclass(frozen=True)
class Geometry:
    """How a layer reads its input.

    Attributes:
        kernel: Size of the kernel along each spatial axis; ``()`` for linear layers.
        stride: Along each spatial axis, as all that follow.
        padding: Zeros ahead of the first input; those behind follow from the size of the output.
        dilation: Distance of two taps of the kernel.
        groups: Groups of channels.
        transposed: Whether it is a transposed convolution, with a weight ``(C_in, C_out / groups, *kernel)``.
        multiplied: Whether the weight is ``(K, C_out)``, as in ``x @ W``.
    """

    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    multiplied: bool = False


@dataclass(frozen=True, eq=False)
class LayerArguments:
    """The arguments of one run of a layer by what they are.

    Attributes:
        x: Its input: ``(N, C_in, *)`` or ``(C_in, *)`` of a convolution, ``(*, C_in)`` of a linear layer.
        weight: Its weight, in its own layout.
        bias: ``(C_out,)`` or ``None``.
        geometry: How it reads its input.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    geometry: Geometry


def layer_arguments(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerArguments | None:
    """Tell the arguments of a layer apart.

    Args:
        func: The operation: a convolution, transposed convolution, ``linear``, ``matmul``, ``mm`` or ``addmm``.
        args: Its arguments, as it ran.
        kwargs: Its named arguments.

    Returns:
        The arguments, or ``None`` where the operation is no product of its input with one weight: another operation,
        a product of the weight from the left, ``addmm`` with factors or with a bias that is no vector.

    Examples:
        >>> layer = layer_arguments(torch.conv1d, (torch.ones(1, 2, 9), torch.ones(4, 2, 3), None, 2), {})
        >>> layer.geometry.kernel, layer.geometry.stride, layer.geometry.padding
        ((3,), (2,), (0,))
    """
    name = operation_name(func)
    if name not in _ARGUMENTS:
        return None
    given = {**dict(zip(_ARGUMENTS[name], args, strict=False)), **kwargs}
    if name in ("matmul", "mm"):
        given = {"input": given["input"], "weight": given[_ARGUMENTS[name][1]]}
    elif name == "addmm":
        if given.get("alpha", 1) != 1 or given.get("beta", 1) != 1 or given["input"].ndim != 1:
            return None
        given = {"input": given["mat1"], "weight": given["mat2"], "bias": given["input"]}
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    if name.startswith("conv"):
        return LayerArguments(x, weight, bias, _convolution_geometry(given, weight, "transpose" in name))
    if weight.ndim != 2:
        return None
    return LayerArguments(x, weight, bias, Geometry(multiplied=name != "linear"))


def _convolution_geometry(given: dict[str, Any], weight: Tensor, transposed: bool) -> Geometry:
    """The geometry of a convolution from its named arguments."""
    kernel = tuple(weight.shape[2:])
    dims = len(kernel)
    dilation = _per_axis(given.get("dilation", 1), dims)
    padding = given.get("padding", 0)
    if padding == "same":
        # An odd number of zeros in all: the one too many goes behind.
        padding = [step * (size - 1) // 2 for step, size in zip(dilation, kernel, strict=True)]
    elif padding == "valid":
        padding = 0
    stride, groups = _per_axis(given.get("stride", 1), dims), int(given.get("groups", 1))
    return Geometry(kernel, stride, _per_axis(padding, dims), dilation, groups, transposed)


def _per_axis(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """One number for each spatial axis, as torch expands it."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def to_rows(weight: Tensor, geometry: Geometry) -> Tensor:
    """A weight, or anything of its shape, as ``(groups, C_out / groups, K)``.

    Args:
        weight: In the layer's own layout.
        geometry: How the layer reads its input.

    Examples:
        >>> to_rows(torch.zeros(8, 2, 3, 3), Geometry((3, 3), (1, 1), (0, 0), (1, 1), groups=4)).shape
        torch.Size([4, 2, 18])
    """
    if geometry.multiplied:
        return weight.T[None]
    if not geometry.kernel:
        return weight[None]
    grouped = weight.reshape(geometry.groups, -1, weight.shape[1], *geometry.kernel).flatten(3)
    outputs, inputs = (2, 1) if geometry.transposed else (1, 2)
    return grouped.permute(0, outputs, 3, inputs).flatten(2)


def from_rows(rows: Tensor, geometry: Geometry, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`to_rows`.

    Args:
        rows: ``(groups, C_out / groups, K)``.
        geometry: How the layer reads its input.
        shape: Shape of the weight.

    Returns:
        A contiguous tensor in the layer's own layout.

    Examples:
        >>> geometry, weight = Geometry((3,), (1,), (0,), (1,), groups=2, transposed=True), torch.randn(4, 5, 3)
        >>> torch.equal(from_rows(to_rows(weight, geometry), geometry, weight.shape), weight)
        True
    """
    if geometry.multiplied:
        return rows[0].T.contiguous()
    if not geometry.kernel:
        return rows[0].contiguous()
    grouped = rows.reshape(geometry.groups, rows.shape[1], math.prod(geometry.kernel), -1)
    order = (0, 3, 1, 2) if geometry.transposed else (0, 1, 3, 2)
    return grouped.permute(order).reshape(tuple(shape)).contiguous()


class Patches:
    """The patches of one input, ready to be picked.

    Args:
        x: The layer's input; a convolution's may lack the axis of samples.
        geometry: How the layer reads it.
        output_shape: Shape of the layer's result.

    Attributes:
        count: Number of output positions: samples times places, the channels left out.
        per_sample: How many of them each sample has (each entry of the first axis of a linear layer).

    Examples:
        >>> x = torch.arange(5.0).view(1, 1, 5)
        >>> patches = Patches(x, Geometry((3,), (2,), (1,), (1,)), (1, 1, 3))
        >>> patches.pick(torch.tensor([0, 2])).squeeze(1)
        tensor([[0., 0., 1.],
                [3., 4., 0.]])
    """

    def __init__(self, x: Tensor, geometry: Geometry, output_shape: Sequence[int]) -> None:
        """Lay the input out in rows of channels, with a row of zeros behind the last."""
        self._geometry = geometry
        dims = len(geometry.kernel)
        if not dims:
            self.count, self.per_sample = _positions_and_share(tuple(output_shape[:-1]))
            self._table = x.reshape(-1, x.shape[-1])
            return
        batched = x.ndim == dims + 2
        x = x if batched else x[None]
        self._sizes, self._places = tuple(x.shape[2:]), tuple(output_shape[-dims:])
        self.count, self.per_sample = _positions_and_share((x.shape[0], *self._places))
        rows = x.movedim(1, -1).reshape(-1, x.shape[1])
        self._table = torch.cat([rows, rows.new_zeros(1, x.shape[1])])

    def pick(self, positions: Tensor) -> Tensor:
        """The patches of some output positions, in the dtype of the input.

        Args:
            positions: Numbers of positions in the order of memory of ``(N, *places)``, int64, shape ``(P,)``.

        Returns:
            ``(P, groups, K)``.
        """
        if not self._geometry.kernel:
            return self._table[positions][:, None]
        rows = self._rows(positions)
        groups = self._geometry.groups
        grouped = self._table[rows].reshape(*rows.shape, groups, self._table.shape[1] // groups)
        return grouped.transpose(1, 2).flatten(2)

    def _rows(self, positions: Tensor) -> Tensor:
        """Which row of the table each tap of each position reads, ``(P, taps)``."""
        sample, *places = torch.unravel_index(positions, (self.count // self.per_sample, *self._places))
        rows = sample[:, None]
        inside = torch.ones_like(rows, dtype=torch.bool)
        for axis, place in enumerate(places):
            index, valid = self._along(axis, place)
            rows = (rows[:, :, None] * self._sizes[axis] + index[:, None]).flatten(1)
            inside = (inside[:, :, None] & valid[:, None]).flatten(1)
        return torch.where(inside, rows, self._table.shape[0] - 1)

    def _along(self, axis: int, place: Tensor) -> tuple[Tensor, Tensor]:
        """Where the taps read along one axis, ``(P, kernel)``, and whether there is an input."""
        layout = self._geometry
        taps = torch.arange(layout.kernel[axis], device=place.device) * layout.dilation[axis]
        stride, padding = layout.stride[axis], layout.padding[axis]
        if not layout.transposed:
            index = place[:, None] * stride - padding + taps
            return index, (index >= 0) & (index < self._sizes[axis])
        stuffed = place[:, None] + padding - taps
        index = stuffed.div(stride, rounding_mode="floor")
        return index, (stuffed % stride == 0) & (index >= 0) & (index < self._sizes[axis])


def _positions_and_share(shape: tuple[int, ...]) -> tuple[int, int]:
    """The number of positions in all, and of one sample."""
    return math.prod(shape), math.prod(shape[1:])


def pick_outputs(result: Tensor, geometry: Geometry, positions: Tensor) -> Tensor:
    """The outputs of a layer at some positions.

    Args:
        result: What the layer returned.
        geometry: How it reads its input.
        positions: As in :meth:`Patches.pick`.

    Returns:
        ``(P, groups, C_out / groups)`` in the dtype of ``result``.

    Examples:
        >>> pick_outputs(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), Geometry(), torch.tensor([1]))
        tensor([[[3., 4.]]])
    """
    dims = len(geometry.kernel)
    if not dims:
        return result.reshape(-1, result.shape[-1])[positions][:, None]
    result = result if result.ndim == dims + 2 else result[None]
    shape = (result.shape[0], *result.shape[2:])
    found = result.movedim(1, -1)[torch.unravel_index(positions, shape)]
    return found.reshape(len(positions), geometry.groups, found.shape[1] // geometry.groups)

"""Fake-quantize: put a tensor on the grid of an encoding and back, in float, with a straight-through gradient.

    ``x_hat = clamp(round(x / scale), quant_min - zero_point, quant_max - zero_point) * scale``

``x`` is divided by the scale, as ONNX ``QuantizeLinear`` does; torch's ``fake_quantize_*`` kernels multiply by its
reciprocal, which sends some values halfway between two levels to the other one. They also turn NaN into the lowest
level, where we let it show. In all else the results are equal.

On CPU torch's kernels take about 20 times as long as a ReLU. Four in-place operations, block after block so that each
block stays in the cache, take about 2 times as long (``benchmarks/fake_quantize.py``).

The gradient is the straight-through one (Bengio et al., 2013): 1 where ``x`` is not clipped, else 0. No mask is kept:
the interval of values that are not clipped is found once per encoding, and the backward pass compares ``x`` with it.
"""

from __future__ import annotations

from itertools import repeat
from typing import Any

import torch
from torch import Tensor

from lightning_quantdebug.encoding import Encoding
from lightning_quantdebug.errors import SettingsError

BLOCK_SIZE = 2**18
"""Values per block and thread: 1 MiB of float32. ``benchmarks/fake_quantize.py`` compares 2^14 to 2^22: smaller blocks
pay for more calls; larger ones gain nothing with a large cache and fall out of a small one."""

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_Operand = float | Tensor
_Operands = tuple[_Operand, _Operand, _Operand]


def fake_quantize(x: Tensor, encoding: Encoding) -> Tensor:
    """Put ``x`` on the grid of ``encoding`` and back.

    Computes in float32, and for float64 in float64. NaN stays NaN, infinities are clipped.

    Args:
        x: Shape ``(*)`` per tensor; with ``C`` channels at ``encoding.channel_axis`` per channel; ``(C, K)`` per group.
            float16, bfloat16, float32 or float64; any strides.
        encoding: Scale and zero point, on the device of ``x``.

    Returns:
        A new tensor of the shape, dtype and memory format of ``x``. Its gradient for ``x`` is 1 where ``x`` is not
        clipped, else 0.

    Raises:
        SettingsError: If ``x`` has no float dtype, or not the channels or groups of the encoding.

    Source: Jacob et al., 2018, equation 12; ONNX operators ``QuantizeLinear`` and ``DequantizeLinear``.

    Examples:
        >>> from lightning_quantdebug.target import QuantSpec
        >>> encoding = Encoding(QuantSpec(4), scale=torch.tensor(0.5), zero_point=torch.tensor(5.0))
        >>> fake_quantize(torch.tensor([-9.0, -0.2, 0.3, 0.75, 9.0]), encoding)
        tensor([-2.5000, -0.0000,  0.5000,  1.0000,  5.0000])
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        return _quantize(x, encoding)
    # Private, as there is no public way to ask; torch's own Function.apply asks the same, since 2.0.
    function = _TransformedStraightThrough if torch._C._are_functorch_transforms_active() else _StraightThrough
    quantized: Tensor = function.apply(x, encoding)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return quantized


def fake_quantize_(x: Tensor, encoding: Encoding) -> Tensor:
    """As :func:`fake_quantize`, written into ``x``: no second tensor has to be found for a result of the same size.

    On a CPU the pages of a fresh large tensor cost as much as the arithmetic. Gradients do not pass.

    Args:
        x: As in :func:`fake_quantize`; it must not be needed as it was.
        encoding: As in :func:`fake_quantize`.

    Returns:
        ``x``.

    Examples:
        >>> from lightning_quantdebug.target import QuantSpec
        >>> encoding = Encoding(QuantSpec(4), scale=torch.tensor(0.5), zero_point=torch.tensor(5.0))
        >>> fake_quantize_(torch.tensor([0.3, 9.0]), encoding)
        tensor([0.5000, 5.0000])
    """
    with torch.no_grad():
        plain = type(x) is Tensor and not is_transformed(x) and dense_view(x) is not None
        if plain and x.dtype in (torch.float32, torch.float64) and encoding.channel_axis is None:
            operands = broadcast_operands(x, encoding)
            if x.numel() > BLOCK_SIZE and x.device.type == "cpu":
                return _quantize_blocks(x, encoding, operands, x)
            return on_grid_(x.div_(operands[0]), *operands)
        return x.copy_(_quantize(x, encoding))


def dense_view(x: Tensor) -> Tensor | None:
    """All values of ``x`` in the order of memory, as a view of shape ``(x.numel(),)``; ``None`` if there is none.

    There is one for contiguous, channels-last and transposed tensors; there is none for tensors with gaps or repeats.

    Examples:
        >>> dense_view(torch.arange(6).view(2, 3).T)
        tensor([0, 1, 2, 3, 4, 5])
        >>> dense_view(torch.arange(6)[::2]) is None
        True
    """
    if x.is_contiguous():
        return x.view(-1)
    strides = x.stride()
    ordered = x.permute(sorted(range(x.ndim), key=lambda axis: strides[axis], reverse=True))
    return ordered.view(-1) if ordered.is_contiguous() else None


class _StraightThrough(torch.autograd.Function):
    """Fake-quantize with the gradient of a clamp."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, encoding: Encoding) -> Tensor:
        """Quantize, and keep ``x``, which the backward pass compares with the ends of the grid."""
        ctx.encoding = encoding
        ctx.save_for_backward(x)
        return _quantize(x, encoding)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Let the gradient through where ``x`` was not clipped."""
        return _unclipped_gradient(gradients[0], ctx.saved_tensors[0], ctx.encoding), None


class _TransformedStraightThrough(torch.autograd.Function):
    """The same in the form that ``torch.func`` can transform; apart, because each call takes 15 us longer."""

    generate_vmap_rule = True
    backward = _StraightThrough.backward

    @staticmethod
    def forward(x: Tensor, encoding: Encoding) -> Tensor:
        """Quantize."""
        return _quantize(x, encoding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Encoding], output: Tensor) -> None:
        """Keep ``x``."""
        ctx.encoding = inputs[1]
        ctx.save_for_backward(inputs[0])


def _unclipped_gradient(gradient: Tensor, x: Tensor, encoding: Encoding) -> Tensor:
    """``gradient`` where ``x`` is not clipped, else 0; differentiable in ``gradient``."""
    if encoding.channel_axis is None:
        low, high = encoding.unclipped_float64 if x.dtype == torch.float64 else encoding.unclipped_float32
        return _between(gradient, x, low, high)
    scale, lowest_step, _ = broadcast_operands(x, encoding)
    values = grouped(x, encoding)
    steps = (values.float() if _is_half(x) else values).div(scale).round_().sub_(lowest_step).reshape(x.shape)
    # Steps count from 0. Half a step of slack; at 32 bits, where float32 has no half steps, a few of its own.
    slack = max(0.5, encoding.num_levels * 2.0**-20)
    return _between(gradient.to(steps.dtype), steps, -slack, encoding.num_levels - 1 + slack).to(gradient.dtype)


def _between(gradient: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """``gradient`` where ``low < x < high``, else 0: the gradient of a clamp, which torch has as one pass."""
    masked: Tensor = torch.ops.aten.hardtanh_backward(gradient, x, low, high)
    return masked


def _quantize(x: Tensor, encoding: Encoding) -> Tensor:
    """The arithmetic without a gradient."""
    if x.dtype not in FLOAT_DTYPES:
        raise SettingsError(
            f"Only float tensors can be quantized ({', '.join(map(str, FLOAT_DTYPES))}), got {x.dtype}. Convert the "
            "tensor, or exclude it by its name."
        )
    operands = broadcast_operands(x, encoding)
    values = grouped(x, encoding)
    if type(x) not in (Tensor, torch.nn.Parameter) or is_transformed(x):
        return _on_grid(values.float() if _is_half(x) else values, *operands).reshape(x.shape).to(x.dtype)
    if x.numel() > BLOCK_SIZE and x.device.type == "cpu" and dense_view(x) is not None:
        return _quantize_blocks(x, encoding, operands, torch.empty_like(x))
    if _is_half(x):
        return on_grid_(values.float().div_(operands[0]), *operands).reshape(x.shape).to(x.dtype)
    result = on_grid_(values.div(operands[0]), *operands)
    return result if values is x else result.reshape(x.shape)


def _quantize_blocks(x: Tensor, encoding: Encoding, operands: _Operands, result: Tensor) -> Tensor:
    """The arithmetic, block after block, so that all operations but the first find the block in the cache."""
    axis = encoding.channel_axis or 0
    if encoding.channel_axis is None:
        source, target = x.as_strided((x.numel(),), (1,)), result.as_strided((x.numel(),), (1,))
    else:
        source, target = grouped(x, encoding), grouped(result, encoding)
    rows = max(1, BLOCK_SIZE * torch.get_num_threads() * source.shape[axis] // source.numel())
    splits = [repeat(value) if isinstance(value, float) else torch.split(value, rows, axis) for value in operands]
    places = torch.split(target, rows, axis)
    for values, place, scale, low, high in zip(torch.split(source, rows, axis), places, *splits, strict=False):
        if _is_half(x):
            place.copy_(on_grid_(values.float().div_(scale), scale, low, high))
        else:
            on_grid_(torch.div(values, scale, out=place), scale, low, high)
    return result


def _on_grid(x: Tensor, scale: _Operand, low: _Operand, high: _Operand) -> Tensor:
    """The definition, for tensors that may not be written in place: subclasses, and those of ``torch.func``."""
    # torch's stub wants two numbers or two tensors and can not be told that they are of one kind.
    return x.div(scale).round().clamp(low, high).mul(scale)  # type: ignore[arg-type]


def on_grid_(quotient: Tensor, scale: _Operand, low: _Operand, high: _Operand) -> Tensor:
    """From ``x / scale`` to the value on the grid, in place."""
    # As above.
    return quotient.round_().clamp_(low, high).mul_(scale)  # type: ignore[arg-type]


def broadcast_operands(x: Tensor, encoding: Encoding) -> _Operands:
    """Scale, lowest and highest step as numbers or as tensors that broadcast over :func:`grouped` ``x``."""
    scale, low, high = encoding.arithmetic
    if x.device.type != "cpu":
        # Accelerators divide by a number by multiplying with its reciprocal; by a tensor of theirs they divide.
        scale = encoding.scale.to(x.device)
    if encoding.channel_axis is None:
        return scale, low, high
    return _broadcast(scale, x, encoding), _broadcast(low, x, encoding), _broadcast(high, x, encoding)


def _broadcast(value: _Operand, x: Tensor, encoding: Encoding) -> _Operand:
    """``value`` with axes of length 1 such that it broadcasts over :func:`grouped` ``x``."""
    if isinstance(value, float):
        return value
    if encoding.spec.group_size is not None:
        return value.unsqueeze(-1)
    axis = encoding.channel_axis or 0
    return value.view((1,) * axis + (-1,) + (1,) * (x.ndim - axis - 1))


def grouped(x: Tensor, encoding: Encoding) -> Tensor:
    """``x`` itself, or with groups as ``(C, G, group_size)``; raise unless it has the encoding's channels."""
    if encoding.channel_axis is None:
        return x
    expected = tuple(encoding.scale.shape)
    if encoding.spec.group_size is None:
        if x.ndim <= encoding.channel_axis or (x.shape[encoding.channel_axis],) != expected:
            raise SettingsError(
                f"The encoding has {expected[0]} channels along axis {encoding.channel_axis}, got a tensor of shape "
                f"{tuple(x.shape)}."
            )
        return x
    size = encoding.spec.group_size
    if x.ndim != 2 or (x.shape[0], x.shape[1] / size) != expected:
        raise SettingsError(
            f"The encoding has {expected} groups of {size} values, got a tensor of shape {tuple(x.shape)}: a weight "
            f"of shape {(expected[0], expected[1] * size)} fits."
        )
    return x.unfold(1, size, size)


def _is_half(x: Tensor) -> bool:
    """Whether the dtype is too coarse to compute in."""
    return x.dtype in (torch.float16, torch.bfloat16)


def is_transformed(x: Tensor) -> bool:
    """Whether ``x`` stands for a tensor inside ``torch.func.vmap``, ``grad`` and the like: such have no memory."""
    # The one question that torch has no public function for; it has had this one since 2.1.
    return torch._C._functorch.is_functorch_wrapped_tensor(x)

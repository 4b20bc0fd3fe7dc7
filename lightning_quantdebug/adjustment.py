"""What a remedy changes of one operation, kept beside the model and applied while the operation runs.

Nothing of the user's is written into: an :class:`Adjustment` scales and shifts the weight and the bias that an
operation gets, after batch normalization is folded into them, and ahead of their quantizer. Undoing a remedy is
dropping its adjustments, so that it is exact; two remedies on one operation compose (:meth:`Adjustment.then`). Scales
and offsets are affine in the user's own parameters, which can therefore be trained through them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from lightning_quantdebug.operations import argument, operation_name, put_argument
from lightning_quantdebug.report import Finding

# Where the weight and the bias of an operation stand: their position, and the name under which they may be passed.
PARAMETERS: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d", "linear"), (1, 2)),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), (1, 2)),
    **dict.fromkeys(("layer_norm", "group_norm", "rms_norm"), (2, 3)),
}
HAS_BIAS = frozenset(PARAMETERS) - {"rms_norm"}
"""The operations that take a bias, whether they were given one or not."""


@dataclass(frozen=True, eq=False)
class Adjustment:
    """What remedies change of one operation besides its quantizers; all ``None``: nothing.

    With ``W`` and ``b`` the weight and bias after folding, the operation computes in FP32 with ``W * weight_scale`` and
    ``b * bias_scale + bias_offset``: together with the operations around it that is the function that the network
    always had. Only while the weight's quantizer is on, ``weight_correction`` and ``bias_correction`` are added: they
    make up for what quantization does, and would be wrong without it.

    Attributes:
        weight_scale: Broadcastable to the weight. Of a normalization the weight is gamma; of a multiplication or an
            addition of a parameter it is that parameter.
        weight_correction: Of the weight's shape: puts it on the grid of its quantizer, whose encoding is frozen
            (AdaRound).
        bias_scale: ``(C_out,)``.
        bias_offset: ``(C_out,)``; it is the bias where the operation has none (high-bias absorption).
        bias_correction: ``(C_out,)``; likewise (bias correction).
        bounds_scale: Of a clipped activation (``relu6``, ``hardtanh``, ``clamp`` with numbers), whose bounds are
            multiplied by it; broadcastable to its output, such as ``(C, 1, 1)``.
    """

    weight_scale: Tensor | None = None
    weight_correction: Tensor | None = None
    bias_scale: Tensor | None = None
    bias_offset: Tensor | None = None
    bias_correction: Tensor | None = None
    bounds_scale: Tensor | None = None

    def then(self, later: Adjustment) -> Adjustment:
        """The adjustment that does what this one does and then what ``later`` does.

        Examples:
            >>> one = Adjustment(bias_scale=torch.tensor([2.0]), bias_offset=torch.tensor([1.0]))
            >>> both = one.then(Adjustment(bias_scale=torch.tensor([3.0])))
            >>> both.bias(torch.tensor([10.0]), corrected=False)  # (10 * 2 + 1) * 3
            tensor([63.])
        """
        return Adjustment(
            weight_scale=_product(self.weight_scale, later.weight_scale),
            weight_correction=_sum(_scaled(self.weight_correction, later.weight_scale), later.weight_correction),
            bias_scale=_product(self.bias_scale, later.bias_scale),
            bias_offset=_sum(_scaled(self.bias_offset, later.bias_scale), later.bias_offset),
            bias_correction=_sum(_scaled(self.bias_correction, later.bias_scale), later.bias_correction),
            bounds_scale=_product(self.bounds_scale, later.bounds_scale),
        )

    def weight(self, weight: Tensor, corrected: bool = False) -> Tensor:
        """The effective weight, in the dtype and shape of ``weight``."""
        return _affine(weight, self.weight_scale, self.weight_correction if corrected else None)

    def bias(self, bias: Tensor | None, corrected: bool = False) -> Tensor | None:
        """The effective bias; ``None`` where there is neither a bias nor anything to add."""
        offset = _sum(self.bias_offset, self.bias_correction if corrected else None)
        return offset if bias is None else _affine(bias, self.bias_scale, offset)

    @property
    def rounded(self) -> bool:
        """Whether the rounding of the weight was learned for the encoding that it has."""
        return self.weight_correction is not None

    @property
    def rescales(self) -> bool:
        """Whether the operation computes with another weight or bias also in FP32."""
        return any(part is not None for part in (self.weight_scale, self.bias_scale, self.bias_offset))

    @property
    def moves_bias(self) -> bool:
        """Whether the operation gets another bias."""
        return any(part is not None for part in (self.bias_scale, self.bias_offset, self.bias_correction))

    def to(self, device: torch.device) -> Adjustment:
        """The same adjustment with its tensors on ``device``; itself if they are there."""
        tensors = {item.name: getattr(self, item.name) for item in fields(self)}
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        if all(tensor.device == device for tensor in present.values()):
            return self
        return replace(self, **{name: tensor.to(device) for name, tensor in present.items()})


@dataclass(frozen=True)
class Applied:
    """What a remedy did.

    Attributes:
        changed: Names of the layers or quantizers that it changed; empty: it did nothing.
        skipped: What it left alone, each with the reason.
        note: One sentence with numbers, for the report.
        findings: What was learned on the way.
    """

    changed: tuple[str, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()
    note: str = ""
    findings: tuple[Finding, ...] = ()


def adjusted_parameters(
    adjustment: Adjustment, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of an operation without a quantized weight, with its parameters adjusted.

    A normalization without gamma gets ``weight_scale`` as its gamma.
    """
    weight_position, bias_position = PARAMETERS[operation_name(func)]
    weight = argument(args, kwargs, weight_position, "weight")
    new = adjustment.weight_scale if weight is None else adjustment.weight(weight)
    args, kwargs = put_argument(args, kwargs, weight_position, "weight", new)
    if operation_name(func) not in HAS_BIAS:
        return args, kwargs
    bias = adjustment.bias(argument(args, kwargs, bias_position, "bias"))
    return put_argument(args, kwargs, bias_position, "bias", bias)


def clipped(x: Tensor, bounds: tuple[float | None, float | None], scale: Tensor) -> Tensor:
    """``x`` of any shape, clipped to ``[low * scale, high * scale]``; a bound of ``None`` is none."""
    scale = scale.to(x.dtype)
    low, high = (None if bound is None else bound * scale for bound in bounds)
    return torch.clamp(x, low, high)


def _affine(x: Tensor, scale: Tensor | None, offset: Tensor | None) -> Tensor:
    """``x * scale + offset`` in float32 at least, in the dtype of ``x``."""
    result = x.to(torch.promote_types(x.dtype, torch.float32))
    if scale is not None:
        result = result * scale
    if offset is not None:
        result = result + offset
    return result.to(x.dtype)


def _product(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The product of two factors, ``None`` standing for 1."""
    if one is None or other is None:
        return one if other is None else other
    return one * other


def _scaled(offset: Tensor | None, scale: Tensor | None) -> Tensor | None:
    """A scaled offset, ``None`` standing for the offset 0."""
    return offset if offset is None or scale is None else offset * scale


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two offsets, ``None`` standing for 0."""
    if one is None or other is None:
        return one if other is None else other
    return one + other

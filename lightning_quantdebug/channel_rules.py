"""How each operation treats scaled channels: what it does to the numbers of :mod:`.channel_classes`.

Every rule gets an operation that has run and gives back the numbers of its result: for one tensor a tensor, for
several a list. ``None`` means that scales do not pass through; what goes in is then pinned.

Scaling is safe through what is positively homogeneous, ``f(x / s) = f(x) / s`` for ``s > 0`` (Nagel et al. 2019,
arXiv:1906.04721, section 4.1.1); a clipped activation is when its bounds are scaled too. Whether a constant passes as
well, as high-bias absorption needs it, is noted on the way: all but activations with slope 1 above 0, moves, maxima and
averages stop it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quantdebug.channel_classes import PINNED, ZERO, ChannelClasses, compact, expanded
from lightning_quantdebug.interception import OpKey
from lightning_quantdebug.operations import (
    Slot,
    argument,
    clip_bounds,
    positions_of,
    replace_slot,
    tensors_in,
    value_at,
)

Numbers = Tensor | list[Tensor | None] | None


@dataclass
class Ran:
    """An operation that has run.

    Attributes:
        key: Its identity in the plan, ``None`` if the plan does not know it.
        name: Its canonical name.
        parameter: The argument that is a parameter, in a sum or product of data and a parameter.
    """

    key: OpKey | None
    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any
    parameter: Slot | None = None

    @property
    def x(self) -> Any:
        """The first argument."""
        return self.argument(0, "input")

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument that is passed by position or by name."""
        return argument(self.args, self.kwargs, position, name, default)


class Tracker(Protocol):
    """What a rule may ask and tell."""

    classes: ChannelClasses

    def numbers(self, tensor: Tensor) -> Tensor:
        """The numbers of a tensor's elements."""
        ...

    def clips(self, op: Ran, numbers: Tensor) -> None:
        """Note an activation whose bounds are to be scaled."""
        ...

    def adds_parameter(self, op: Ran, numbers: Tensor) -> None:
        """Note a parameter that is to be scaled like what it is added to."""
        ...

    def multiplies_parameter(self, op: Ran) -> Tensor | None:
        """New numbers for what a parameter multiplies, ``None`` if the parameter can not be scaled."""
        ...


Rule = Callable[[Tracker, Ran], Numbers]


def _keep(tracker: Tracker, op: Ran) -> Numbers:
    """Element by element, and positively homogeneous."""
    is_real = isinstance(op.result, Tensor) and op.result.is_floating_point() and op.result.shape == op.x.shape
    return tracker.numbers(op.x) if is_real else None


def _keep_centred(tracker: Tracker, op: Ran) -> Numbers:
    """Positively homogeneous, but a constant does not pass."""
    tracker.classes.mark(tracker.numbers(op.x), f"{op.name} does not pass a constant on")
    return _keep(tracker, op)


def _clip(tracker: Tracker, op: Ran) -> Numbers:
    """A clipped activation: ``clip(x / s, a / s, b / s) = clip(x, a, b) / s``."""
    bounds = clip_bounds(op.func, op.args, op.kwargs)
    numbers = tracker.numbers(op.x)
    if bounds is None or tracker.classes.is_pinned(numbers):
        return None
    low, high = bounds
    if low in (0.0, None) and high is None:
        return numbers
    if op.key is None or (low is not None and low > 0) or (high is not None and high < 0):
        return None
    tracker.classes.mark(numbers, f"{op.name} clips from above")
    tracker.clips(op, numbers)
    return numbers


def _reshape(tracker: Tracker, op: Ran) -> Numbers:
    """The same elements in the same order."""
    numbers = tracker.numbers(op.x)
    return compact(numbers.reshape(op.result.shape)) if op.result.numel() == numbers.numel() else None


def _move(tracker: Tracker, op: Ran) -> Numbers:
    """The operation itself, done to the numbers: it copies, selects or orders elements."""
    args, kwargs = op.args, op.kwargs
    for slot, tensor in tensors_in(args, kwargs):
        new = tracker.numbers(tensor) if tensor.is_floating_point() else tensor.cpu()
        if isinstance(slot[0], str):
            kwargs = replace_slot(kwargs, slot, new)
        else:
            args = replace_slot(args, slot, new)
    moved = op.func(*args, **kwargs)
    if isinstance(moved, Tensor):
        return compact(moved)
    return [compact(part) for part in moved]


def _mark_zeros(tracker: Tracker, op: Ran, numbers: Tensor) -> None:
    """Zeros that were put in do not take part in a constant."""
    if bool((numbers == ZERO).any()):
        tracker.classes.mark(numbers, f"{op.name} puts zeros in")


def _pad(tracker: Tracker, op: Ran) -> Numbers:
    """Padding with zeros fits every scale, with another constant none."""
    mode = op.argument(2, "mode", "constant") if op.name == "pad" else "constant"
    if mode != "constant":
        return _move(tracker, op)
    value = op.argument(3, "value") if op.name == "pad" else op.argument(2, "value")
    moved = F.pad(tracker.numbers(op.x), op.argument(1, "pad"), value=PINNED if value else ZERO)
    _mark_zeros(tracker, op, moved)
    return compact(moved)


def _mask(tracker: Tracker, op: Ran) -> Numbers:
    """Some elements are replaced by a constant."""
    value = op.argument(2, "value")
    moved = tracker.numbers(op.x).masked_fill(op.argument(1, "mask").cpu(), PINNED if float(value) else ZERO)
    _mark_zeros(tracker, op, moved)
    return compact(moved)


def _unfold(tracker: Tracker, op: Ran) -> Numbers:
    """Windows along one axis, or patches of an image as columns (which torch does not do to integers)."""
    if op.func is not F.unfold:
        return _move(tracker, op)
    moved = F.unfold(
        tracker.numbers(op.x).double(), *op.args[1:], **{k: v for k, v in op.kwargs.items() if k != "input"}
    )
    _mark_zeros(tracker, op, moved)
    return compact(moved.long())


def _reduce(tracker: Tracker, op: Ran) -> Numbers:
    """A sum, average or extreme value along axes that must have one scale."""
    axes = op.argument(1, "dim", op.kwargs.get("axis"))
    if isinstance(axes, Tensor):
        return None
    numbers = tracker.numbers(op.x)
    if op.name == "sum":
        tracker.classes.mark(numbers, "sum multiplies a constant")
    if axes is None:
        axes = range(numbers.ndim)
    merged = tracker.classes.merged(numbers, (axes,) if isinstance(axes, int) else axes)
    values = op.result if isinstance(op.result, Tensor) else op.result[0]
    moved = merged.reshape(values.shape)
    return moved if isinstance(op.result, Tensor) else [moved, None]


def _extreme(tracker: Tracker, op: Ran) -> Numbers:
    """``max`` and ``min``: along an axis, of everything, or of two tensors."""
    both = isinstance(op.argument(1, "other"), Tensor)
    return _sum_of(tracker, op) if both else _reduce(tracker, op)


def _spatial(tracker: Tracker, op: Ran) -> Numbers:
    """Pooling and resizing: each result depends on one channel of one sample."""
    numbers = tracker.numbers(op.x)
    values = op.result if isinstance(op.result, Tensor) else op.result[0]
    axes = [axis for axis in range(numbers.ndim) if axis >= numbers.ndim - _spatial_axes(op, numbers.ndim)]
    if not _passes_constants(op):
        tracker.classes.mark(numbers, f"{op.name} does not pass a constant on at the borders")
    merged = tracker.classes.merged(numbers, axes).expand(values.shape)
    return merged if isinstance(op.result, Tensor) else [merged, None]


def _spatial_axes(op: Ran, ndim: int) -> int:
    """How many of the last axes are spatial."""
    digits = [letter for letter in op.name if letter.isdigit()]
    return int(digits[-1]) if digits else ndim - 2


def _passes_constants(op: Ran) -> bool:
    """Whether a constant input gives the same constant everywhere: no zeros at the borders, no overshooting."""
    if "max_pool" in op.name or "adaptive" in op.name:
        return True
    return "avg_pool" in op.name and not _is_padded(op.argument(3, "padding", 0))


def _is_padded(padding: Any) -> bool:
    """Whether a padding argument puts anything in."""
    if isinstance(padding, str):
        return padding != "valid"
    return any(padding) if isinstance(padding, (tuple, list)) else bool(padding)


def _sum_of(tracker: Tracker, op: Ran) -> Numbers:
    """A sum, difference or maximum of two tensors: what meets must have one scale."""
    one, other = op.x, op.argument(1, "other")
    for x, number in ((one, other), (other, one)):
        if not isinstance(number, Tensor):
            return tracker.numbers(x) if number == 0 else None
    shape = op.result.shape
    a, b = tracker.numbers(one).expand(shape), tracker.numbers(other).expand(shape)
    tracker.classes.mark(a, f"{op.name} joins it with another tensor")
    tracker.classes.mark(b, f"{op.name} joins it with another tensor")
    if op.key is not None and op.parameter is not None and op.name in ("add", "sub", "rsub"):
        x = b if value_at(op.args, op.kwargs, op.parameter) is one else a
        if tracker.classes.is_pinned(x):
            return None
        tracker.adds_parameter(op, x)
        return x
    tracker.classes.unify(a, b, f"{op.name} joins it with a tensor that can not be scaled")
    return torch.maximum(a, b)


def _product(tracker: Tracker, op: Ran) -> Numbers:
    """A product or quotient: the scale of one factor passes where the other has none."""
    one, other = op.x, op.argument(1, "other")
    if not isinstance(other, Tensor):
        return _keep_centred(tracker, op)
    if not isinstance(one, Tensor):
        return tracker.numbers(other) if op.name in ("mul", "multiply") else None
    shape = op.result.shape
    a, b = tracker.numbers(one).expand(shape), tracker.numbers(other).expand(shape)
    tracker.classes.mark(a, "a product does not pass a constant on")
    tracker.classes.mark(b, "a product does not pass a constant on")
    if tracker.classes.is_pinned(b):
        scaled = tracker.classes.is_pinned(a) and op.name in ("mul", "multiply") and op.parameter is not None
        return tracker.multiplies_parameter(op) if scaled else a
    return b if tracker.classes.is_pinned(a) and op.name in ("mul", "multiply") else None


def _matrix_product(tracker: Tracker, op: Ran) -> Numbers:
    """``A @ V``: the last axis of V passes where A has no scale, as in attention; else rows of A may."""
    one, other = op.x, op.argument(1, "mat2", op.kwargs.get("other"))
    a, b = tracker.numbers(one), tracker.numbers(other)
    if a.ndim < 2 or b.ndim < 2:
        return None
    for numbers in (a, b):
        tracker.classes.mark(numbers, "a matrix product does not pass a constant on")
    if tracker.classes.is_pinned(a) and not tracker.classes.varies(b, -2):
        return tracker.classes.merged(b, (-2,)).expand(op.result.shape)
    if tracker.classes.is_pinned(b) and not tracker.classes.varies(a, -1):
        return tracker.classes.merged(a, (-1,)).expand(op.result.shape)
    return None


def _attention(tracker: Tracker, op: Ran) -> Numbers:
    """Scaled dot product attention: the result is an average of rows of V; Q and K are in a softmax."""
    value = tracker.numbers(op.argument(2, "value"))
    for slot, tensor in tensors_in(op.args, op.kwargs):
        if slot not in ((2,), ("value",)) and tensor.is_floating_point():
            tracker.classes.pin(tracker.numbers(tensor), "attention computes a softmax of it")
    tracker.classes.mark(value, "attention does not pass a constant on")
    merged = tracker.classes.merged(value, (-2,))
    if merged.shape[:-2] != op.result.shape[:-2]:
        # Grouped queries: each head of V serves as many heads as there are more queries.
        merged = merged.repeat_interleave(op.result.shape[-3] // merged.shape[-3], -3)
    return merged.expand(op.result.shape)


_RULES: Mapping[Rule, str] = {
    _keep: (
        "relu leaky_relu prelu rrelu contiguous clone detach to float half double bfloat16 type type_as cpu cuda "
        "dropout dropout1d dropout2d dropout3d feature_dropout identity alias data requires_grad_ lift_fresh"
    ),
    _keep_centred: "abs neg negative",
    _clip: "relu6 hardtanh clamp clip clamp_min clamp_max",
    _reshape: "reshape view view_as reshape_as flatten unflatten ravel squeeze unsqueeze",
    _move: (
        "transpose permute t swapaxes swapdims movedim moveaxis getitem chunk split tensor_split hsplit vsplit "
        "unsafe_chunk unsafe_split unbind expand expand_as repeat repeat_interleave tile broadcast_to pixel_shuffle "
        "pixel_unshuffle channel_shuffle roll flip fliplr flipud select index_select narrow gather take_along_dim "
        "masked_select T mT H mH adjoint rot90 diagonal cat concat concatenate stack hstack vstack dstack "
        "column_stack"
    ),
    _pad: "pad constant_pad_nd",
    _mask: "masked_fill",
    _unfold: "unfold",
    _reduce: "mean sum amax amin",
    _extreme: "max min",
    _spatial: (
        "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d max_pool1d "
        "max_pool2d max_pool3d max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices "
        "adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d interpolate upsample"
    ),
    _sum_of: "add sub subtract rsub maximum minimum",
    _product: "mul multiply div divide true_divide",
    _matrix_product: "matmul mm bmm",
    _attention: "scaled_dot_product_attention",
}
RULES: dict[str, Rule] = {name: rule for rule, names in _RULES.items() for name in names.split()}

CHANGES_SHAPE = frozenset(name for rule in (_reshape, _move, _pad, _unfold) for name in _RULES[rule].split()) | {
    "setitem",
    "resize",
    "set",
}
"""Operations whose in-place form would change the shape of what others hold."""

_SHAPE_ONLY = (
    "size dim numel ndimension nelement stride is_contiguous element_size is_floating_point is_complex is_same_size "
    "dim_order get_device has_names len zeros_like ones_like empty_like full_like rand_like randn_like new_zeros "
    "new_ones new_full new_empty hash"
)
TELLS_SHAPE = frozenset(_SHAPE_ONLY.split())
"""Operations that tell the shape of a tensor and nothing of its values."""


# `2 / x` arrives as a division of x by 2 under a name of its own.
_REFLECTED = frozenset(("__rdiv__", "__rtruediv__", "__rmatmul__"))


def rule_of(op: Ran) -> Rule | None:
    """The rule for an operation, ``None`` if nothing is known of it."""
    return None if getattr(op.func, "__name__", "") in _REFLECTED else RULES.get(op.name)


def padded_with_zeros(op: Ran) -> bool:
    """Whether a convolution sees zeros at its borders, so that a constant input gives no constant output."""
    if op.name == "linear":
        return False
    if "transpose" in op.name:
        return True
    weight, padding = op.argument(1, "weight"), op.argument(4, "padding", 0)
    return _is_padded(padding) and (padding != "same" or any(size > 1 for size in weight.shape[2:]))


def channel_axis(op: Ran) -> int:
    """The axis of the output channels of a layer: the last one, or the one ahead of the spatial ones."""
    ndim: int = op.result.ndim
    return ndim - 1 - positions_of(op.name)


def along(vector: Tensor, op: Ran) -> Tensor:
    """New numbers ``(C,)`` laid along the output channels of a layer."""
    return expanded(vector, channel_axis(op), op.result.shape)

"""What each torch operation is to a quantizer: its category, its weight, its in-place and its functional form.

Pure tables over operation *names*. An operation reaches us as whatever callable torch hands to
``__torch_function__`` (a builtin, a method descriptor, a Python function of ``torch.nn.functional``, an overload of
``torch.ops.aten``); :func:`operation_name` gives all of them one name, so that ``x + y``, ``x.add(y)``, ``x += y`` and
``torch.ops.aten.add.Tensor(x, y)`` are one row here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from enum import Enum
from functools import lru_cache
from types import MethodWrapperType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Slot = tuple[int | str, ...]


class Category(str, Enum):
    """What an operation does to the grid of its input."""

    CONVOLUTION = "convolution"
    LINEAR = "linear"
    MATMUL = "matmul"
    LOOKUP = "embedding"
    RECURRENT = "recurrent layer"
    ATTENTION = "fused attention"
    ADD = "addition"
    MULTIPLY = "multiplication"
    BATCH_NORM = "batch normalization"
    NORM = "normalization"
    PIECEWISE_LINEAR = "piecewise linear activation"
    NONLINEAR = "non-linear function"
    BOUNDED = "function with a bounded output"
    AVERAGE = "average"
    PASS_THROUGH = "pass-through"
    JOIN = "join"
    LOSS = "loss"
    RANDOM = "random numbers"
    CREATION = "creation of a constant"
    NOT_ARITHMETIC = "not arithmetic"
    OTHER = "other operation"


_CATEGORIES: dict[Category, str] = {
    Category.CONVOLUTION: (
        "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d conv_tbc"
    ),
    Category.LINEAR: ("linear bilinear addmm addmv addbmm"),
    Category.MATMUL: ("matmul mm bmm mv dot einsum baddbmm tensordot chain_matmul multi_dot inner vdot"),
    Category.LOOKUP: ("embedding embedding_bag"),
    Category.RECURRENT: ("lstm gru rnn_tanh rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell"),
    Category.ATTENTION: ("scaled_dot_product_attention multi_head_attention_forward"),
    Category.ADD: ("add sub rsub subtract addcmul addcdiv lerp"),
    Category.MULTIPLY: ("mul div multiply divide true_divide outer"),
    Category.BATCH_NORM: ("batch_norm native_batch_norm"),
    Category.NORM: (
        "layer_norm group_norm instance_norm rms_norm local_response_norm normalize native_layer_norm native_group_norm"
    ),
    Category.PIECEWISE_LINEAR: (
        "relu relu6 hardtanh clamp clamp_min clamp_max clip leaky_relu prelu rrelu threshold maximum minimum"
    ),
    Category.NONLINEAR: (
        "gelu silu hardswish elu celu selu mish softplus logsigmoid log_sigmoid glu exp log log_softmax sqrt "
        "rsqrt pow square reciprocal abs sin cos tan erf softsign tanhshrink hardshrink softshrink atan asin "
        "log1p expm1 exp2 log2"
    ),
    Category.BOUNDED: ("softmax sigmoid tanh hardsigmoid gumbel_softmax softmin"),
    Category.AVERAGE: (
        "avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d mean "
        "interpolate upsample grid_sample lp_pool1d lp_pool2d"
    ),
    Category.PASS_THROUGH: (
        "reshape view view_as reshape_as flatten unflatten ravel transpose permute t swapaxes swapdims "
        "movedim moveaxis contiguous max_pool1d max_pool2d max_pool3d max_pool1d_with_indices "
        "max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d adaptive_max_pool2d "
        "adaptive_max_pool3d dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout "
        "feature_alpha_dropout getitem chunk split tensor_split unsafe_chunk unsafe_split unbind squeeze "
        "unsqueeze expand expand_as repeat repeat_interleave tile broadcast_to pad constant_pad_nd "
        "pixel_shuffle pixel_unshuffle channel_shuffle clone detach to float half bfloat16 double type "
        "type_as cpu cuda roll flip select index_select narrow gather take take_along_dim masked_select "
        "unfold fold amax amin max min topk sort msort nan_to_num identity alias data T mT H mH adjoint rot90 "
        "diagonal as_strided requires_grad_ where masked_fill setitem copy_ index_copy index_put "
        "masked_scatter scatter index_fill slice_scatter select_scatter select_backward resolve_conj "
        "resolve_neg nonzero_pad lift_fresh pad_packed_sequence pack_padded_sequence packed_sequence neg "
        "negative cummax cummin tensor_data subclass_as"
    ),
    Category.JOIN: ("cat concat concatenate stack hstack vstack dstack column_stack block_diag"),
    Category.LOSS: (
        "cross_entropy nll_loss nll_loss2d mse_loss l1_loss smooth_l1_loss huber_loss kl_div "
        "binary_cross_entropy binary_cross_entropy_with_logits bce_loss gaussian_nll_loss poisson_nll_loss "
        "ctc_loss margin_ranking_loss triplet_margin_loss triplet_margin_with_distance_loss "
        "cosine_embedding_loss hinge_embedding_loss multi_margin_loss multilabel_margin_loss "
        "multilabel_soft_margin_loss soft_margin_loss"
    ),
    Category.RANDOM: (
        "rand randn rand_like randn_like randint randint_like randperm normal bernoulli multinomial uniform "
        "normal_ uniform_ bernoulli_ exponential_ log_normal_ cauchy_ geometric_ random_ poisson kaiming_uniform"
    ),
    Category.CREATION: (
        "zeros ones full empty arange linspace logspace eye tensor zeros_like ones_like full_like empty_like "
        "new_zeros new_ones new_full new_empty new_tensor scalar_tensor tril triu tril_indices triu_indices "
        "meshgrid cartesian_prod one_hot empty_strided new_empty_strided constant"
    ),
    Category.NOT_ARITHMETIC: (
        "argmax argmin argsort eq ne lt le gt ge equal allclose isclose isnan isinf isfinite any all "
        "logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not size dim numel "
        "item tolist numpy is_floating_point is_contiguous stride storage_offset data_ptr element_size "
        "nelement len bool int long short untyped_storage storage nonzero bincount unique histc searchsorted "
        "bucketize set_grad_enabled float_power_ is_complex is_same_size is_nonzero contains dim_order sign "
        "floor ceil round trunc floor_divide remainder fmod index_is_int retain_grad register_hook backward "
        "has_names iter repr format hash dir reduce_ex deepcopy count_nonzero cdist norm vector_norm cumsum "
        "zero_ fill_ has_compatible_shallow_copy_type"
    ),
}
CATEGORY_OF: dict[str, Category] = {name: kind for kind, names in _CATEGORIES.items() for name in names.split()}

# What puts values on a grid although none of our quantizers is there.
QUANTIZING = {
    "fake_quantize_per_tensor_affine",
    "fake_quantize_per_channel_affine",
    "fused_moving_avg_obs_fake_quant",
    "quantize_per_tensor",
    "quantize_per_channel",
    "quantize_per_tensor_dynamic",
    "linear_dynamic",
    "linear_dynamic_fp16",
}

# What gives memory as it was found: its values mean nothing.
UNINITIALIZED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}

# What puts no new real numbers on a grid, so that nothing is lost where it has no quantizer.
NO_ARITHMETIC = (
    Category.PASS_THROUGH,
    Category.LOSS,
    Category.RANDOM,
    Category.CREATION,
    Category.NOT_ARITHMETIC,
)

_BINARY = {"add", "sub", "mul", "truediv", "div", "matmul", "pow", "floordiv", "mod", "and", "or", "xor"}
_ALIASES = {"truediv": "div", "floordiv": "floor_divide", "mod": "remainder", "and": "bitwise_and"}
# In-place names that are their own row above: they have no functional twin with the same arguments.
_ONLY_IN_PLACE = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "requires_grad_", "random_"}


@lru_cache(maxsize=4096)
def _name_of(func: Callable[..., Any]) -> str:
    """The name of a callable that is not a property getter."""
    name = str(getattr(func, "__name__", type(func).__name__)).split(".")[0]
    if name.startswith("__") and name.endswith("__"):
        inner = name.strip("_")
        if inner[:1] in "ri" and inner[1:] in _BINARY:
            inner = ("r" if inner == "rsub" else "") + inner[1:]
        return _ALIASES.get(inner, inner)
    if name in _ONLY_IN_PLACE:
        return name
    return name.strip("_")


def operation_name(func: Callable[..., Any]) -> str:
    """The one name of an operation, whatever way it was called.

    Args:
        func: The callable that ``__torch_function__`` received.

    Examples:
        >>> operation_name(torch.Tensor.add_), operation_name(torch.Tensor.__radd__), operation_name(F.relu)
        ('add', 'add', 'relu')
    """
    if isinstance(func, MethodWrapperType):
        return str(getattr(getattr(func, "__self__", None), "__name__", "property"))
    return _name_of(func)


@lru_cache(maxsize=4096)
def category_of(func: Callable[..., Any]) -> Category:
    """The category of an operation; a property that yields no tensor is not arithmetic.

    Examples:
        >>> category_of(torch.conv2d).value, category_of(torch.relu_).value
        ('convolution', 'piecewise linear activation')
    """
    name = operation_name(func)
    unknown = Category.NOT_ARITHMETIC if isinstance(func, MethodWrapperType) else Category.OTHER
    return CATEGORY_OF.get(name, unknown)


def tensors_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[Slot, Tensor]]:
    """Every tensor among the arguments with the slot it stands in; lists and tuples are looked into."""
    for index, value in enumerate(args):
        yield from _tensors_at((index,), value)
    for name, value in kwargs.items():
        yield from _tensors_at((name,), value)


def _tensors_at(slot: Slot, value: Any) -> Iterator[tuple[Slot, Tensor]]:
    """The tensors in one argument."""
    if isinstance(value, Tensor):
        yield slot, value
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tensors_at((*slot, index), item)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _tensors_at((*slot, name), item)


def replace_slot(value: Any, slot: Slot, new: Any) -> Any:
    """A copy of nested arguments with the value at ``slot`` replaced."""
    if not slot:
        return new
    head, rest = slot[0], slot[1:]
    if isinstance(value, dict):
        return {**value, head: replace_slot(value[head], rest, new)}
    items = list(value)
    items[int(head)] = replace_slot(items[int(head)], rest, new)
    if isinstance(value, list):
        return items
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)


def value_at(args: tuple[Any, ...], kwargs: dict[str, Any], slot: Slot) -> Any:
    """The argument at ``slot``."""
    value: Any = kwargs[slot[0]] if isinstance(slot[0], str) else args[slot[0]]
    for part in slot[1:]:
        value = value[part]
    return value


def with_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], slot: Slot, new: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with the one at ``slot`` replaced; the originals are left alone."""
    if isinstance(slot[0], str):
        return args, replace_slot(kwargs, slot, new)
    return replace_slot(args, slot, new), kwargs


def argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, default: Any = None) -> Any:
    """An argument, passed by position or by name; ``default`` where it was left out."""
    return args[position] if len(args) > position else kwargs.get(name, default)


def put_argument(
    args: tuple[Any, ...], kwargs: dict[str, Any], position: int, name: str, value: Any
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments with an optional one replaced, or added by name where it was left out."""
    if len(args) > position:
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: value}


def positions_of(op: str) -> int:
    """Number of axes behind the channels of what a convolution reads and gives, 0 of a linear layer.

    The channels of its input and its output are at axis ``-1 - positions_of(op)``, with and without a batch.

    Examples:
        >>> positions_of("conv2d"), positions_of("conv_transpose1d"), positions_of("linear")
        (2, 1, 0)
    """
    return int(op[-2]) if op.startswith("conv") and op.endswith("d") else 0


@lru_cache(maxsize=1024)
def parameters_of(func: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the positional parameters of a Python-level operation, empty for builtins."""
    try:
        return tuple(inspect.signature(func).parameters)
    except (TypeError, ValueError):
        return ()


# Name, position and default of each bound of a clipping operation.
_Bound = tuple[str, int, float | None] | None
_BOUNDS: dict[str, tuple[_Bound, _Bound]] = {
    "hardtanh": (("min_val", 1, -1.0), ("max_val", 2, 1.0)),
    "clamp": (("min", 1, None), ("max", 2, None)),
    "clip": (("min", 1, None), ("max", 2, None)),
    "clamp_min": (("min", 1, None), None),
    "clamp_max": (None, ("max", 1, None)),
}


def clip_bounds(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[float | None, float | None] | None:
    """The bounds that a call clips to where they are plain numbers, ``None`` for a bound that is not there.

    Returns:
        Lower and upper bound, or ``None`` if the operation clips to tensors or is no clipping at all.

    Examples:
        >>> clip_bounds(F.relu6, (torch.zeros(1),), {}), clip_bounds(torch.clamp, (torch.zeros(1),), {"max": 2.0})
        ((0.0, 6.0), (None, 2.0))
    """
    name = operation_name(func)
    if name == "relu6":
        return 0.0, 6.0
    if name not in _BOUNDS:
        return None
    found = [None if bound is None else argument(args, kwargs, bound[1], bound[0], bound[2]) for bound in _BOUNDS[name]]
    if any(isinstance(bound, Tensor) for bound in found):
        return None
    low, high = (None if bound is None else float(bound) for bound in found)
    return low, high


def in_place_target(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor that this call writes into, or ``None`` if it writes into none."""
    out = kwargs.get("out")
    if isinstance(out, Tensor):
        return out
    if isinstance(func, MethodWrapperType) or not args or not isinstance(args[0], Tensor):
        return None
    raw = str(getattr(func, "__name__", "")).split(".")[0]
    if raw == "requires_grad_" or raw.startswith("_") != raw.startswith("__"):
        return None
    writes = raw == "__setitem__" or (raw.endswith("_") and not raw.endswith("__")) or _has_inplace(func, args, kwargs)
    return args[0] if writes or (raw.startswith("__i") and raw.strip("_")[1:] in _BINARY) else None


def _has_inplace(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the call passes ``inplace=True``, by name or by position."""
    if "inplace" in kwargs:
        return bool(kwargs["inplace"])
    names = parameters_of(func) if len(args) > 1 else ()
    return "inplace" in names and names.index("inplace") < len(args) and bool(args[names.index("inplace")])


def functional_call(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None:
    """The same computation without writing into an argument, or ``None`` where torch has no such form."""
    if _has_inplace(func, args, kwargs):
        if "inplace" in kwargs:
            return func, args, {**kwargs, "inplace": False}
        index = parameters_of(func).index("inplace")
        return func, (*args[:index], False, *args[index + 1 :]), kwargs
    raw = str(getattr(func, "__name__", ""))
    if "out" in kwargs or raw in _ONLY_IN_PLACE or raw == "__setitem__":
        return None
    twin = _functional_twin(func)
    return None if twin is None else (twin, args, kwargs)


@lru_cache(maxsize=1024)
def _functional_twin(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """``add`` for ``add_``, ``__add__`` for ``__iadd__``; looked up where the in-place form lives."""
    raw = str(getattr(func, "__name__", ""))
    if raw.startswith("__i") and raw.endswith("__"):
        found = getattr(Tensor, f"__{raw.strip('_')[1:]}__", None)
    elif raw.endswith("_") and not raw.startswith("_"):
        name = raw[:-1]
        homes = (Tensor, torch, F) if getattr(Tensor, raw, None) is func else (F, torch, Tensor)
        found = next((getattr(home, name) for home in homes if hasattr(home, name)), None)
    else:
        found = None
    return found if callable(found) else None

"""Runs a network with quantizers in it: looks each operation up in the plan and does what stands there.

In bypass nothing is changed: every operation gets its own arguments and runs as it is, so outputs are bit-identical to
those of the plain network. A weight with a batch normalization behind it is folded while its quantizer is on
(``W * gamma / sigma``, the tensor that the hardware sees), and the normalization then passes its input on; the model
itself is never changed (Jacob et al. 2018, section 3.2; Nagel et al. 2021, section 3.2).
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MethodWrapperType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quantdebug.interception import Frame, Interception, OpKey, call_site, clean_path, is_batched
from lightning_quantdebug.operations import (
    NO_ARITHMETIC,
    Category,
    Slot,
    category_of,
    functional_call,
    in_place_target,
    operation_name,
    tensors_in,
    value_at,
    with_argument,
)
from lightning_quantdebug.plan import BatchNormFold, Plan
from lightning_quantdebug.quantizer import Quantizer
from lightning_quantdebug.target import Kind, Mode

# Operations whose result is a tensor of its own that nobody else holds: a quantizer may write into it.
_MAKES_NEW = (
    Category.CONVOLUTION,
    Category.LINEAR,
    Category.MATMUL,
    Category.ATTENTION,
    Category.ADD,
    Category.MULTIPLY,
    Category.NORM,
    Category.BATCH_NORM,
    Category.PIECEWISE_LINEAR,
    Category.NONLINEAR,
    Category.BOUNDED,
)
# Products that may hand back one of their factors, or a view of it.
_MAY_BE_VIEWS = ("einsum", "chain_matmul", "multi_dot", "tensordot")
Trace = Callable[[str, Any], None]


class _Sources:
    """What a weight was computed from: an owner (an encoding's version, an observer) and tensors, as they were.

    The tensors are held, so that no other one can take their identity. Writing through ``.data``, as weight averaging
    does, changes no version: on CPU some values are compared as well (under 10 us a tensor). On an accelerator that
    would wait for the device at each weight, so that it is left out.
    """

    def __init__(self, owner: object, tensors: tuple[Tensor | None, ...]) -> None:
        self._owner = owner
        self._tensors = tensors
        self._versions = [None if t is None or t.is_inference() else t._version for t in tensors]
        self._values = [None if t is None else _some_values(t).clone() for t in tensors]

    def are_still(self, owner: object, tensors: tuple[Tensor | None, ...]) -> bool:
        """Whether the owner is equal, and the tensors are the same ones and were not written into since."""
        return owner == self._owner and all(map(self._is_still, tensors, self._tensors, self._versions, self._values))

    @staticmethod
    def _is_still(tensor: Tensor | None, before: Tensor | None, version: int | None, values: Tensor | None) -> bool:
        """Whether one tensor is the same and was not written into since; of an inference tensor that is not known."""
        if tensor is None or tensor is not before or values is None or version is None:
            return tensor is None and before is None
        return tensor._version == version and (tensor.device.type != "cpu" or torch.equal(_some_values(tensor), values))


def _some_values(tensor: Tensor) -> Tensor:
    """About eight values along each axis of a tensor, as a view."""
    return tensor.detach()[tuple(slice(None, None, max(1, size // 8)) for size in tensor.shape)]


@dataclass
class WeightPlace:
    """A weight argument of an operation, its quantizer and the batch normalization folded into it."""

    slot: Slot
    quantizer: Quantizer
    fold: BatchNormFold | None = None
    cached: tuple[_Sources, Tensor, Tensor | None] | None = None
    observed: _Sources | None = None


@dataclass
class OpPlan:
    """What happens at one operation."""

    name: str
    weights: list[WeightPlace] = field(default_factory=list)
    inputs: list[tuple[Slot, Quantizer]] = field(default_factory=list)
    output: Quantizer | None = None
    positions: tuple[int, ...] = ()
    folded_into: Quantizer | None = None
    fold: BatchNormFold | None = None
    unsafe: bool = False
    makes_new: bool = False


class Runner(Interception):
    """Runs the network with its quantizers.

    Args:
        root: The network, or the LightningModule that holds it.
        plan: Where quantizers sit.
        quantizers: The quantizers by name.
        names: Display name of each recorded operation.
        unsafe: In-place operations that must write into their argument.
        scope: See :class:`Interception`.

    Attributes:
        unseen: How often operations ran that recording had not met; they run in FP32.
        trace: Called with the name and the result of each recorded operation; ``None``: nothing is traced.
    """

    def __init__(
        self,
        root: nn.Module,
        plan: Plan,
        quantizers: Mapping[str, Quantizer],
        names: Mapping[OpKey, str],
        unsafe: set[OpKey],
        scope: str = "",
    ) -> None:
        """Turn the plan into one look-up table."""
        super().__init__(root, scope)
        self.unseen: dict[str, int] = defaultdict(int)
        self.trace: Trace | None = None
        self._criteria = plan.criteria
        self._owners = {clean_path(path): module for path, module in root.named_modules()}
        self._table: dict[tuple[str, int | None], dict[Any, dict[int | None, OpPlan]]] = {}
        for key in plan.known:
            self._entry(key, names, key in unsafe)
        for site in plan.sites:
            for spot in site.places:
                entry = self._entry(spot.key, names, spot.key in unsafe)
                quantizer = quantizers[site.name]
                if site.kind is Kind.WEIGHT:
                    assert spot.slot is not None
                    entry.weights.append(WeightPlace(spot.slot, quantizer, plan.folds.get(spot.key)))
                elif spot.slot is not None:
                    entry.inputs.append((spot.slot, quantizer))
                else:
                    entry.output, entry.positions = quantizer, spot.outputs
        folds = {
            site.name: plan.folds[spot.key] for site in plan.sites for spot in site.places if spot.key in plan.folds
        }
        for key, name in plan.folded_into.items():
            if name in quantizers:
                entry = self._entry(key, names, False)
                entry.folded_into, entry.fold = quantizers[name], folds[name]

    def _entry(self, key: OpKey, names: Mapping[OpKey, str], unsafe: bool) -> OpPlan:
        """The plan of one operation, made on first use."""
        sites = self._table.setdefault((key.path, key.call), {})
        rounds = sites.setdefault((key.func, key.site), {})
        makes_new = category_of(key.func) in _MAKES_NEW and operation_name(key.func) not in _MAY_BE_VIEWS
        return rounds.setdefault(key.occurrence, OpPlan(names.get(key, key.path), unsafe=unsafe, makes_new=makes_new))

    def plan_for(self, path: str, call: int) -> Any:
        """The plans of a module's operations: of this call, or those that all calls share."""
        return self._table.get((path, call)) or self._table.get((path, None))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look the operation up and run it as planned."""
        frame = self.stack[-1]
        if frame.muted or type(func) is MethodWrapperType:
            return func(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:
            return self.call_decomposed(args, kwargs or {})
        site = call_site(sys._getframe(1))
        if site is None:
            return func(*args, **(kwargs or {}))
        rounds = frame.plan.get((func, site)) if frame.plan is not None else None
        if rounds is None:
            self._count_unseen(func, frame, args, kwargs)
            return func(*args, **(kwargs or {}))
        occurrence = frame.seen.get((func, site), 0)
        frame.seen[(func, site)] = occurrence + 1
        planned = rounds.get(occurrence) or rounds.get(None)
        if planned is None:
            self._count_unseen(func, frame, args, kwargs)
            return func(*args, **(kwargs or {}))
        result = self._run(planned, func, args, kwargs or {})
        if self.trace is not None:
            self.trace(planned.name, result)
        return result

    def _count_unseen(
        self, func: Callable[..., Any], frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any] | None
    ) -> None:
        """Note an operation with arithmetic that recording had not met; what the step does itself is its own."""
        if frame.module is None or category_of(func) in NO_ARITHMETIC or self._is_criterion(frame.path):
            return
        tensors = [tensor for _, tensor in tensors_in(args, kwargs or {})]
        if any(tensor.is_floating_point() for tensor in tensors) and not any(map(is_batched, tensors)):
            self.unseen[f"{frame.path}.{operation_name(func)}".lstrip(".")] += 1

    def _is_criterion(self, path: str) -> bool:
        """Whether a module judges the network."""
        return any(path == criterion or path.startswith(f"{criterion}.") for criterion in self._criteria)

    def _run(self, planned: OpPlan, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation with the quantizers that are on."""
        if planned.folded_into is not None and _is_on(planned.folded_into) and not self._is_training(planned.fold):
            result = args[0] if args else kwargs["input"]
            if planned.output is None:
                return result
            return self._put_on_grid(planned, result, overwrite=not torch.is_grad_enabled())
        for slot, quantizer in planned.inputs:
            if quantizer.mode is not Mode.BYPASS:
                args, kwargs = with_argument(args, kwargs, slot, quantizer(value_at(args, kwargs, slot)))
        for spot in planned.weights:
            if spot.quantizer.mode is not Mode.BYPASS:
                args, kwargs = self._with_weight(spot, args, kwargs)
        if planned.output is None or planned.output.mode is Mode.BYPASS:
            return func(*args, **kwargs)
        return self._run_quantized(planned, func, args, kwargs)

    def _run_quantized(
        self, planned: OpPlan, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run an operation whose result is quantized or observed."""
        target = in_place_target(func, args, kwargs)
        nobody_looks_back = not torch.is_grad_enabled()
        if target is None:
            return self._put_on_grid(planned, func(*args, **kwargs), nobody_looks_back and planned.makes_new)
        form = None if planned.unsafe else functional_call(func, args, kwargs)
        if form is None:
            return self._run_written(planned, func, target, args, kwargs)
        if nobody_looks_back:
            return self._put_on_grid(planned, func(*args, **kwargs), overwrite=True)
        return self._put_on_grid(planned, form[0](*form[1], **form[2]).to(target.dtype))

    def _run_written(
        self, planned: OpPlan, func: Callable[..., Any], target: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run an operation that must write its quantized result into ``target``, where others look for it."""
        form = functional_call(func, args, kwargs)
        if form is None or not torch.is_grad_enabled():
            result = func(*args, **kwargs)
            target.copy_(self._put_on_grid(planned, target.clone(), overwrite=not torch.is_grad_enabled()))
            return result
        # Autograd has saved what goes in or what comes out: neither may be the tensor that is written into.
        result = form[0](target.clone(), *form[1][1:], **form[2])
        return target.copy_(self._put_on_grid(planned, result))

    def _put_on_grid(self, planned: OpPlan, result: Any, overwrite: bool = False) -> Any:
        """The result with its tensors quantized."""
        assert planned.output is not None
        if isinstance(result, Tensor):
            return planned.output(result, overwrite)
        items = [
            planned.output(item) if index in planned.positions and isinstance(item, Tensor) else item
            for index, item in enumerate(result)
        ]
        if isinstance(result, list):
            return items
        return type(result)(*items) if hasattr(result, "_fields") else tuple(items)

    def _with_weight(
        self, spot: WeightPlace, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with the weight (and, where folded, the bias) replaced by what the hardware sees."""
        weight = value_at(args, kwargs, spot.slot)
        by_name = len(args) < 3
        bias = None
        if spot.fold is not None:
            bias = kwargs.get("bias") if by_name else args[2]
        if spot.quantizer.mode is Mode.OBSERVE:
            self._observe_weight(spot, weight, bias)
            return args, kwargs
        if not spot.quantizer.is_calibrated:
            return args, kwargs
        quantized, folded_bias = self._quantized_weight(spot, weight, bias)
        args, kwargs = with_argument(args, kwargs, spot.slot, quantized)
        if spot.fold is None:
            return args, kwargs
        if by_name:
            return args, {**kwargs, "bias": folded_bias}
        return with_argument(args, kwargs, (2,), folded_bias)

    def _observe_weight(self, spot: WeightPlace, weight: Tensor, bias: Tensor | None) -> None:
        """Let the quantizer see the weight, once for as long as it does not change."""
        sources = self._sources(spot, weight, bias)
        observer = spot.quantizer.observer
        if observer.count and spot.observed is not None and spot.observed.are_still(observer, sources):
            return
        with torch.no_grad():
            folded, _ = self._folded(spot, weight, bias)
            spot.quantizer.observe(folded)
        spot.observed = _Sources(spot.quantizer.observer, sources)

    def _sources(self, spot: WeightPlace, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
        """What the weight that the hardware sees depends on."""
        return (weight, bias, *(self._norm_tensors(spot.fold) if spot.fold is not None else ()))

    def _quantized_weight(self, spot: WeightPlace, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The quantized weight and folded bias, computed once for as long as nothing that they depend on changes."""
        sources = self._sources(spot, weight, bias)
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in sources):
            return self._newly_quantized(spot, weight, bias)
        state = (spot.quantizer.version, self._is_training(spot.fold))
        if spot.cached is None or not spot.cached[0].are_still(state, sources):
            # Kept beyond the block: an inference tensor could not take part in training later.
            with torch.inference_mode(False), torch.no_grad():
                spot.cached = (_Sources(state, sources), *self._newly_quantized(spot, weight, bias))
        return spot.cached[1], spot.cached[2]

    def _newly_quantized(self, spot: WeightPlace, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The quantized weight and folded bias.

        While the normalization trains, it stays and computes the statistics of its batch; the weight is then folded
        with the running statistics, quantized and unfolded again (Krishnamoorthi 2018, section 3.2.2).
        """
        folded, folded_bias = self._folded(spot, weight, bias)
        quantized = spot.quantizer(folded)
        if spot.fold is None or not self._is_training(spot.fold):
            return quantized, folded_bias
        _, variance, gamma, _ = self._norm_tensors(spot.fold)
        assert variance is not None
        factor = _norm_factor(variance, gamma, spot.fold, quantized.dtype)
        return _scale_channels(quantized, 1 / torch.where(factor == 0, 1.0, factor), spot.fold), bias

    def _is_training(self, fold: BatchNormFold | None) -> bool:
        """Whether the normalization computes the statistics of its batch now."""
        return fold is not None and self._owners[fold.running_mean.rpartition(".")[0]].training

    def forget_weights(self) -> None:
        """Drop every cached quantized weight."""
        for sites in self._table.values():
            for rounds in sites.values():
                for planned in rounds.values():
                    for spot in planned.weights:
                        spot.cached = None

    def _folded(self, spot: WeightPlace, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight and bias with the batch normalization folded in, if there is one."""
        if spot.fold is None:
            return weight, bias
        mean, variance, gamma, beta = self._norm_tensors(spot.fold)
        assert mean is not None
        assert variance is not None
        return fold_batch_norm(weight, bias, mean, variance, gamma, beta, spot.fold)

    def _norm_tensors(self, fold: BatchNormFold) -> tuple[Tensor | None, ...]:
        """Mean, variance, gamma and beta as the module has them now."""
        return tuple(self._tensor(name) for name in (fold.running_mean, fold.running_var, fold.weight, fold.bias))

    def _tensor(self, name: str | None) -> Tensor | None:
        """A parameter or buffer by name."""
        if name is None:
            return None
        path, _, leaf = name.rpartition(".")
        found = getattr(self._owners[path], leaf)
        assert isinstance(found, Tensor)
        return found


def _is_on(quantizer: Quantizer) -> bool:
    """Whether a quantizer changes its tensor now."""
    return quantizer.mode is Mode.QUANTIZE and quantizer.is_calibrated


def fold_batch_norm(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    fold: BatchNormFold,
) -> tuple[Tensor, Tensor]:
    """Fold a batch normalization into the layer ahead of it (Jacob et al. 2018, equation 14).

    ``W' = W * gamma / sqrt(variance + eps)`` and ``b' = beta + (b - mean) * gamma / sqrt(variance + eps)``.

    Args:
        weight: ``(C_out, *)``, or ``(C_in, C_out / groups, *)`` for a transposed convolution.
        bias: ``(C_out,)`` or ``None``.
        mean: Running mean, ``(C_out,)``.
        variance: Running variance, ``(C_out,)``.
        gamma: Scale of the normalization, ``(C_out,)`` or ``None`` for 1.
        beta: Shift of the normalization, ``(C_out,)`` or ``None`` for 0.
        fold: Axis and groups of the layer, and eps.

    Returns:
        The folded weight and bias, in the dtype of ``weight``; computed in float32 at least.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    factor = _norm_factor(variance, gamma, fold, wide)
    shift = -mean.to(wide) if bias is None else bias.to(wide) - mean.to(wide)
    new_bias = shift * factor + (beta.to(wide) if beta is not None else 0.0)
    scaled = _scale_channels(weight.to(wide), factor, fold)
    return scaled.to(weight.dtype), new_bias.to(weight.dtype)


def _norm_factor(variance: Tensor, gamma: Tensor | None, fold: BatchNormFold, dtype: torch.dtype) -> Tensor:
    """What a normalization multiplies each channel by."""
    wide = torch.promote_types(dtype, torch.float32)
    factor = torch.rsqrt(variance.to(wide) + fold.eps)
    return factor if gamma is None else factor * gamma.to(wide)


def _scale_channels(weight: Tensor, factor: Tensor, fold: BatchNormFold) -> Tensor:
    """A weight with each output channel multiplied by its factor."""
    if fold.channel_axis == 0:
        return (weight * factor.reshape(-1, *(1,) * (weight.ndim - 1))).to(weight.dtype)
    grouped = weight.reshape(fold.groups, -1, *weight.shape[1:])
    scaled = grouped * factor.reshape(fold.groups, 1, -1, *(1,) * (weight.ndim - 2))
    return scaled.reshape(weight.shape).to(weight.dtype)

"""Runs a network with quantizers in it: looks each operation up in the plan and does what stands there.

In bypass nothing is changed: every operation gets its own arguments and runs as it is, so outputs are bit-identical to
those of the plain network. A weight with a batch normalization behind it is folded while its quantizer is on
(``W * gamma / sigma``, the tensor that the hardware sees), and the normalization then passes its input on; the model
itself is never changed (Jacob et al. 2018, section 3.2; Nagel et al. 2021, section 3.2).
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MethodWrapperType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quantdebug.adjustment import (
    PARAMETERS,
    Adjustment,
    adjusted_parameters,
    clipped,
)
from lightning_quantdebug.effective_weight import EffectiveWeights, WeightPlace
from lightning_quantdebug.errors import SettingsError
from lightning_quantdebug.interception import Frame, Interception, OpKey, call_site, clean_path, is_batched
from lightning_quantdebug.layers import Call, Tap
from lightning_quantdebug.operations import (
    NO_ARITHMETIC,
    UNINITIALIZED,
    Category,
    Slot,
    argument,
    category_of,
    clip_bounds,
    functional_call,
    in_place_target,
    operation_name,
    put_argument,
    tensors_in,
    value_at,
    with_argument,
)
from lightning_quantdebug.plan import Plan
from lightning_quantdebug.quantizer import Quantizer
from lightning_quantdebug.replay import Memo
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


class Reached(BaseException):
    """Ends a run at the operation that it was for; no error, so that no code of the user's catches it."""


@dataclass
class OpPlan:
    """What happens at one operation.

    ``folds_into`` is the operation that takes this batch normalization in, ``parameter`` the argument that a remedy
    scales where the operation has no quantized weight.
    """

    name: str
    weights: list[WeightPlace] = field(default_factory=list)
    inputs: list[tuple[Slot, Quantizer]] = field(default_factory=list)
    output: Quantizer | None = None
    positions: tuple[int, ...] = ()
    folds_into: OpPlan | None = None
    adjustment: Adjustment | None = None
    parameter: Slot | None = None
    tap: Tap | None = None
    stops: bool = False
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
        memo: What a run on the same batch has computed; ``None``: everything is computed.
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
        self.memo: Memo | None = None
        self._criteria = plan.criteria
        self.weights = EffectiveWeights({clean_path(path): module for path, module in root.named_modules()})
        self._table: dict[tuple[str, int | None], dict[Any, dict[int | None, OpPlan]]] = {}
        for key in plan.known:
            self._entry(key, names, key in unsafe).parameter = plan.parameters.get(key)
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
        for key, head in plan.folded_into.items():
            if head in plan.folds:
                self._entry(key, names, False).folds_into = self._entry(head, names, False)

    def set_adjustments(self, adjustments: Mapping[OpKey, Adjustment]) -> None:
        """Let the named operations run adjusted, and all others as they are.

        Raises:
            SettingsError: If an operation is unknown or has nothing that can be adjusted.
        """
        for entry in self._entries():
            entry.adjustment = None
            for spot in entry.weights:
                spot.adjustment = None
        for key, adjustment in adjustments.items():
            self._adjust(key, adjustment)

    def _adjust(self, key: OpKey, adjustment: Adjustment) -> None:
        """Let one operation run adjusted."""
        entry = self.planned(key)
        name = operation_name(key.func)
        if len(entry.weights) == 1:
            entry.weights[0].adjustment = adjustment
        elif not entry.weights and (adjustment.bounds_scale is not None or name in PARAMETERS or entry.parameter):
            entry.adjustment = adjustment
        else:
            raise SettingsError(
                f"{entry.name} ({name}) has {len(entry.weights)} quantized weights and no parameter that can be "
                "adjusted: only layers with one weight, normalizations, clipped activations and operations with a "
                "parameter can."
            )

    def _entries(self) -> Iterator[OpPlan]:
        """The plans of all operations."""
        for sites in self._table.values():
            for rounds in sites.values():
                yield from rounds.values()

    def planned(self, key: OpKey) -> OpPlan:
        """What happens at a known operation.

        Raises:
            SettingsError: If it is not known.
        """
        rounds = self._table.get((key.path, key.call), {}).get((key.func, key.site), {})
        if key.occurrence not in rounds:
            raise SettingsError(f"No operation {key.path!r} {operation_name(key.func)!r} with this key was recorded.")
        return rounds[key.occurrence]

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
        if frame.muted:
            return func(*args, **(kwargs or {}))
        if type(func) is MethodWrapperType:
            return func(*args, **(kwargs or {})) if self.memo is None else self.memo.getter(func, args, kwargs or {})
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
        result = self._outcome(planned, (frame.path, frame.call, func, site, occurrence), args, kwargs or {})
        if self.trace is not None and operation_name(func) not in UNINITIALIZED:
            self.trace(planned.name, result)
        return result

    def _outcome(self, planned: OpPlan, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation, or take from an earlier run on the same batch what it gave there."""
        if self.memo is None:
            return self.run_planned(planned, key[2], args, kwargs)
        return self.memo.run(self, key, planned, args, kwargs)

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

    def run_planned(
        self, planned: OpPlan, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run one operation with the quantizers that are on."""
        if planned.folds_into is not None and self.weights.is_folded(planned.folds_into.weights[0]):
            result = argument(args, kwargs, 0, "input")
            if planned.output is None:
                return result
            return self.put_on_grid(planned, result, overwrite=not torch.is_grad_enabled() and self.memo is None)
        for slot, quantizer in planned.inputs:
            if quantizer.mode is not Mode.BYPASS:
                args, kwargs = with_argument(args, kwargs, slot, quantizer(value_at(args, kwargs, slot)))
        for spot in planned.weights:
            if spot.quantizer.mode is not Mode.BYPASS or self.weights.changes(spot):
                args, kwargs = self._with_weight(spot, args, kwargs)
        if planned.adjustment is not None and not planned.weights:
            func, args, kwargs = _adjusted(planned, planned.adjustment, func, args, kwargs)
        if planned.output is None or planned.output.mode is Mode.BYPASS:
            return _call(planned, func, args, kwargs)
        return self._run_quantized(planned, func, args, kwargs)

    def _run_quantized(
        self, planned: OpPlan, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run an operation whose result is quantized or observed."""
        target = in_place_target(func, args, kwargs)
        nobody_looks_back = not torch.is_grad_enabled()
        if target is None:
            return self.put_on_grid(
                planned, _call(planned, func, args, kwargs), nobody_looks_back and planned.makes_new
            )
        form = None if planned.unsafe else functional_call(func, args, kwargs)
        if form is None:
            return self._run_written(planned, func, target, args, kwargs)
        if nobody_looks_back:
            return self.put_on_grid(planned, _call(planned, func, args, kwargs), overwrite=True)
        return self.put_on_grid(planned, _call(planned, form[0], form[1], form[2]).to(target.dtype))

    def _run_written(
        self, planned: OpPlan, func: Callable[..., Any], target: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run an operation that must write its quantized result into ``target``, where others look for it."""
        form = functional_call(func, args, kwargs)
        if form is None or not torch.is_grad_enabled():
            result = _call(planned, func, args, kwargs)
            target.copy_(self.put_on_grid(planned, target.clone(), overwrite=not torch.is_grad_enabled()))
            return result
        # Autograd has saved what goes in or what comes out: neither may be the tensor that is written into.
        result = form[0](target.clone(), *form[1][1:], **form[2])
        return target.copy_(self.put_on_grid(planned, result))

    def put_on_grid(self, planned: OpPlan, result: Any, overwrite: bool = False) -> Any:
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
        has_bias = spot.fold is not None or (spot.adjustment is not None and spot.adjustment.moves_bias)
        bias = argument(args, kwargs, 2, "bias") if has_bias else None
        if spot.quantizer.mode is Mode.OBSERVE:
            self.weights.observe(spot, weight, bias)
        if not self.weights.changes(spot):
            return args, kwargs
        effective, effective_bias = self.weights.get(spot, weight, bias)
        args, kwargs = with_argument(args, kwargs, spot.slot, effective)
        return put_argument(args, kwargs, 2, "bias", effective_bias) if has_bias else (args, kwargs)

    def forget_weights(self) -> None:
        """Drop every cached quantized weight."""
        for entry in self._entries():
            for spot in entry.weights:
                spot.cached.clear()
                spot.observed = None


def _call(planned: OpPlan, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation and show it to the tap, if one listens; a tap may put another result in its place."""
    result = func(*args, **kwargs)
    if planned.tap is not None:
        replaced = planned.tap(Call(planned.name, func, args, kwargs, result))
        result = result if replaced is None else replaced
    if planned.stops:
        raise Reached
    return result


def _adjusted(
    planned: OpPlan,
    adjustment: Adjustment,
    func: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The call of an operation without a quantized weight, as remedies have changed it."""
    if adjustment.bounds_scale is not None:
        bounds = clip_bounds(func, args, kwargs)
        x = argument(args, kwargs, 0, "input")
        assert bounds is not None, f"{planned.name} has no bounds to scale"
        scale = adjustment.bounds_scale.to(x.device)
        writes = planned.unsafe and in_place_target(func, args, kwargs) is not None
        return _clipped_in_place if writes else clipped, (x, bounds, scale), {}
    if planned.parameter is None:
        args, kwargs = adjusted_parameters(adjustment, func, args, kwargs)
        return func, args, kwargs
    parameter = value_at(args, kwargs, planned.parameter)
    args, kwargs = with_argument(args, kwargs, planned.parameter, adjustment.to(parameter.device).weight(parameter))
    return func, args, kwargs


def _clipped_in_place(x: Tensor, bounds: tuple[float | None, float | None], scale: Tensor) -> Tensor:
    """The in-place form of :func:`clipped`."""
    # Autograd keeps what goes into the clipping: it may not be the tensor that is written into.
    return x.copy_(clipped(x.clone(), bounds, scale))

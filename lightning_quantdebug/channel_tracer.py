"""Follows every channel of a network through one run, by execution.

:class:`ChannelTracer` watches a run as the recorder does and keeps, beside each tensor, the numbers of the channels
that its elements belong to. Convolutions, linear layers and the gains of normalizations *produce* channels,
convolutions and linear layers *consume* them; :mod:`.channel_rules` says what happens between. Whatever is not known to
be safe pins what it reads: unknown operations, what the network returns, what a loss reads, what torch can not see.
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

from lightning_quantdebug.adjustment import HAS_BIAS, PARAMETERS
from lightning_quantdebug.channel_classes import PINNED, ChannelClasses, expanded, pinned
from lightning_quantdebug.channel_rules import (
    CHANGES_SHAPE,
    TELLS_SHAPE,
    Numbers,
    Ran,
    along,
    channel_axis,
    padded_with_zeros,
    rule_of,
)
from lightning_quantdebug.interception import Frame, Interception, OpKey, is_batched
from lightning_quantdebug.layers import Layer
from lightning_quantdebug.operations import in_place_target, operation_name, tensors_in, value_at
from lightning_quantdebug.plan import Plan
from lightning_quantdebug.recorder import plain_containers

_NORMS = ("layer_norm", "group_norm", "rms_norm")
_RETURNED = "the network returns it"


@dataclass
class Traced:
    """What the operations of all runs do with channels, as numbers of :class:`ChannelClasses`.

    Attributes:
        produced: Output channels of each layer, ``(C_out,)``.
        consumed: Input channels of each layer, ``(C_in,)``.
        parameters: Elements of each parameter that is added, of its shape, each gain of a normalization, ``(C,)``, and
            each parameter that is multiplied with.
        clipped: Elements of the output of each clipped activation, of a shape that broadcasts to it.
        has_bias: The operations of ``parameters`` that have a bias which grows along.
    """

    produced: dict[OpKey, Tensor] = field(default_factory=dict)
    consumed: dict[OpKey, Tensor] = field(default_factory=dict)
    parameters: dict[OpKey, Tensor] = field(default_factory=dict)
    clipped: dict[OpKey, Tensor] = field(default_factory=dict)
    has_bias: set[OpKey] = field(default_factory=set)


class ChannelTracer(Interception):
    """Follows channels through runs of a network.

    Args:
        root: The network, or the LightningModule that holds it.
        plan: Where quantizers sit; it says which operations can be adjusted.
        layers: The layers whose rows and columns may be scaled, by key.
        fixed: Why other layers may not, by key.
        scope: See :class:`Interception`.

    Attributes:
        classes: Which channels must share a scale.
        traced: Which channels each operation produces and consumes.
    """

    def __init__(
        self,
        root: nn.Module,
        plan: Plan,
        layers: Mapping[OpKey, Layer],
        fixed: Mapping[OpKey, str],
        scope: str = "",
    ) -> None:
        """Start without a run."""
        super().__init__(root, scope)
        self.classes = ChannelClasses()
        self.traced = Traced()
        self._plan = plan
        self._layers = layers
        self._fixed = fixed
        self._numbers: dict[int, Tensor] = {}
        self._kept: list[Tensor] = []
        self._storages: dict[int, list[Tensor]] = defaultdict(list)
        self._constants = {id(tensor) for tensor in (*root.parameters(), *root.buffers())}
        self._users: dict[int, set[OpKey]] = defaultdict(set)

    # Runs.

    def begin(self) -> None:
        """Forget the tensors of the last run; the channels stay."""
        self._numbers.clear()
        self._kept.clear()
        self._storages.clear()
        self._users.clear()

    def returned(self, output: Any) -> None:
        """Fix the scale of what the network returned, and of parameters that several operations scale."""
        self._pin_tensors((plain_containers(output),), {}, _RETURNED)
        for users in self._users.values():
            for key in users if len(users) > 1 else ():
                self.classes.pin(self.traced.parameters[key], "its parameter is used in several places")
        self.begin()

    def module_left(self, frame: Frame, args: Any, output: Any) -> None:
        """Fix what user code of a step gets to see, and everything where a module's inside can not be seen."""
        if len(self.stack) == 1 and self.stack[0].module is None:
            self._pin_tensors((plain_containers(output),), {}, "the step itself gets it")
        given = {id(tensor) for _, tensor in tensors_in((args,), {})}
        for _, tensor in tensors_in((output,), {}):
            known = id(tensor) in self._numbers or id(tensor) in self._constants or id(tensor) in given
            if tensor.is_floating_point() and not known:
                self.classes.pin_all(f"it runs ahead of {frame.path}, whose inside can not be seen")
                self._hold(tensor, pinned(tensor.shape))

    # Operations.

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run each operation and carry the numbers of its arguments to its result."""
        frame, kwargs = self.stack[-1], kwargs or {}
        if frame.muted:
            return self._run_pinning(func, args, kwargs, "a loss, a metric or code outside the module reads it")
        if func is F.multi_head_attention_forward:
            return self.call_decomposed(args, kwargs)
        key = self.key_of(func, frame, sys._getframe(1))
        if key is None:
            return self._run_pinning(func, args, kwargs, "a torch.autograd.Function reads it")
        return self.operation(key, frame, args, kwargs)

    def operation(self, key: OpKey, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation and apply its rule."""
        tensors = [tensor for _, tensor in tensors_in(args, kwargs)]
        if any(map(is_batched, tensors)):
            self.classes.pin_all("torch.func runs behind it")
            return key.func(*args, **kwargs)
        name = operation_name(key.func)
        if not any(tensor.is_floating_point() for tensor in tensors) or name in TELLS_SHAPE:
            result = key.func(*args, **kwargs)
            self._give(result, None)
            return result
        target = in_place_target(key.func, args, kwargs)
        if "out" in kwargs or _sets_attribute(key.func) or (target is not None and name in CHANGES_SHAPE):
            return self._run_pinning(key.func, args, kwargs, f"{name} writes it into another tensor")
        planned = self._planned(key)
        parameter = None if planned is None else self._plan.parameters.get(planned)
        before = None if target is None else self.numbers(target)
        result = key.func(*args, **kwargs)
        if type(key.func) is MethodWrapperType and not isinstance(result, Tensor):
            return result
        ran = Ran(planned, name, key.func, args, kwargs, result, parameter)
        numbers = self._apply(ran)
        if numbers is None:
            self._pin_tensors(args, kwargs, f"{name} reads it")
        elif any(tensor.numel() == 0 for _, tensor in tensors_in((result,), {})):
            # Elements that are not there have no numbers: what reads them with other data would go unnoticed.
            self._pin_tensors(args, kwargs, f"{name} gave an empty tensor")
        if target is not None and before is not None and not self._fits(before, numbers):
            self._overwrite(target, numbers, f"{name} writes into a tensor that is read elsewhere")
            numbers = None
        self._give(result, numbers)
        return result

    def _apply(self, ran: Ran) -> Numbers:
        """The numbers of an operation's result."""
        if ran.key is not None and ran.key in self._plan.folded_into:
            return self.numbers(ran.x)
        if ran.key is not None and (ran.key in self._layers or ran.key in self._fixed):
            return self._layer(ran, ran.key)
        if ran.name in _NORMS:
            return self._norm(ran)
        rule = rule_of(ran)
        return None if rule is None else rule(self, ran)

    def _fits(self, before: Tensor, numbers: Numbers) -> bool:
        """Whether a tensor that was written into holds the channels that it held before."""
        if not isinstance(numbers, Tensor) or numbers.shape != before.shape:
            return False
        return self.classes.same(before, numbers)

    def _run_pinning(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> Any:
        """Run an operation that nothing is known of."""
        self._pin_tensors(args, kwargs, reason)
        target = args[0] if _sets_attribute(func) else in_place_target(func, args, kwargs)
        outputs = [tensor for _, tensor in tensors_in((kwargs.get("out"), target), {})]
        for tensor in outputs:
            self._overwrite(tensor, None, reason)
        result = func(*args, **kwargs)
        self._give(result, None)
        return result

    # Tensors.

    def numbers(self, tensor: Tensor) -> Tensor:
        """The numbers of a tensor's elements; a tensor that no operation of this run made can not be scaled."""
        known = self._numbers.get(id(tensor))
        if known is not None and known.shape != tensor.shape:
            self.classes.pin(known, "its shape was changed out of sight")
            known = None
        return pinned(tensor.shape) if known is None else known

    def _give(self, result: Any, numbers: Numbers) -> None:
        """Keep the numbers of each tensor of a result."""
        if isinstance(result, Tensor):
            self._hold(result, numbers if isinstance(numbers, Tensor) else pinned(result.shape))
            return
        parts = list(result) if isinstance(result, (list, tuple)) else []
        known = numbers if isinstance(numbers, list) else [None] * len(parts)
        for part, of_part in zip(parts, known, strict=True):
            if isinstance(part, Tensor):
                self._hold(part, pinned(part.shape) if of_part is None else of_part)
            else:
                self._give(part, None)

    def _hold(self, tensor: Tensor, numbers: Tensor) -> None:
        """Keep the numbers of a tensor, and the tensor, so that its identity stays its own for the whole run."""
        if not tensor.is_floating_point():
            return
        if id(tensor) not in self._numbers:
            self._kept.append(tensor)
            storage = _storage_of(tensor)
            if storage is not None:
                self._storages[storage].append(tensor)
        self._numbers[id(tensor)] = numbers

    def _overwrite(self, target: Tensor, numbers: Numbers, reason: str) -> None:
        """Fix the scale of what was in a tensor and its views and of what is there now."""
        if isinstance(numbers, Tensor):
            self.classes.pin(numbers, reason)
        storage = _storage_of(target)
        for tensor in (target, *(self._storages[storage] if storage is not None else ())):
            self.classes.pin(self.numbers(tensor), reason)
            if id(tensor) in self._numbers:
                self._numbers[id(tensor)] = pinned(tensor.shape)

    def _pin_tensors(self, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> None:
        """Fix the scale of every tensor among some arguments."""
        for _, tensor in tensors_in(args, kwargs):
            known = self._numbers.get(id(tensor))
            if known is not None:
                self.classes.pin(known, reason)

    def _planned(self, key: OpKey) -> OpKey | None:
        """The identity that the plan has for an operation, ``None`` if it was not recorded."""
        keys = (key, key._replace(occurrence=None), key._replace(call=None), key._replace(call=None, occurrence=None))
        return next((planned for planned in keys if planned in self._plan.known), None)

    # What produces, consumes and grows along.

    def _layer(self, ran: Ran, key: OpKey) -> Numbers:
        """A layer: columns take up the scales of its input, rows give new ones to its output."""
        others = ran.args[1:] if ran.args else ()
        self._pin_tensors(others, {k: v for k, v in ran.kwargs.items() if k != "input"}, "it is a weight or bias")
        numbers = self.numbers(ran.x)
        if key in self._fixed:
            self.classes.pin(numbers, self._fixed[key])
            return None
        axis = channel_axis(ran)
        rows = self._produced(key, ran.result.shape[axis])
        if numbers.numel() == 0:
            self.traced.consumed.setdefault(key, pinned(numbers.shape[axis : axis + 1]))
            self.classes.pin(torch.cat([rows, self.traced.consumed[key]]), "it got an empty tensor")
            return None
        columns = self.classes.merged(numbers, [other for other in range(numbers.ndim) if other != axis]).reshape(-1)
        self._same_each_time(self.traced.consumed, key, columns)
        if padded_with_zeros(ran):
            self.classes.mark(columns, f"{self._layers[key].name} sees zeros at its borders")
        return along(rows, ran)

    def _produced(self, key: OpKey, count: int) -> Tensor:
        """The numbers of an operation's output channels, the same in every run."""
        known = self.traced.produced.get(key)
        if known is None:
            known = self.traced.produced[key] = self.classes.fresh(count)
        return known

    def _norm(self, ran: Ran) -> Numbers:
        """A normalization pins its input; its gain, a vector, gives new scales to its output."""
        self._pin_tensors(ran.args, ran.kwargs, f"{ran.name} normalizes it")
        weight = ran.argument(PARAMETERS[ran.name][0], "weight")
        if ran.key is None or weight is None or weight.ndim != 1:
            return None
        numbers = self._gain(ran.key, weight)
        if ran.name in HAS_BIAS:
            self.traced.has_bias.add(ran.key)
        return expanded(numbers, 1 if ran.name == "group_norm" else -1, ran.result.shape)

    def multiplies_parameter(self, op: Ran) -> Tensor | None:
        """New numbers for what a vector, such as the gain of a hand-written normalization, multiplies."""
        assert op.parameter is not None
        weight = value_at(op.args, op.kwargs, op.parameter)
        if op.key is None or weight.numel() not in weight.shape:
            return None
        numbers = self._gain(op.key, weight)
        return numbers.reshape(weight.shape).expand(op.result.shape)

    def _gain(self, key: OpKey, weight: Tensor) -> Tensor:
        """The numbers of the channels that a vector scales, the same in every run, of the vector's shape."""
        self._users[id(weight)].add(key)
        if key not in self.traced.parameters:
            self.traced.parameters[key] = self.classes.fresh(weight.numel()).reshape(weight.shape)
        return self.traced.parameters[key]

    def adds_parameter(self, op: Ran, numbers: Tensor) -> None:
        """A parameter that is added grows along with what it is added to."""
        assert op.key is not None
        assert op.parameter is not None
        parameter = value_at(op.args, op.kwargs, op.parameter)
        self._users[id(parameter)].add(op.key)
        missing = numbers.ndim - parameter.ndim
        sizes = (1,) * missing + tuple(parameter.shape)
        merged = self.classes.merged(numbers, [axis for axis, size in enumerate(sizes) if size == 1])
        self._same_each_time(self.traced.parameters, op.key, merged.reshape(parameter.shape))

    def clips(self, op: Ran, numbers: Tensor) -> None:
        """The bounds of a clipped activation grow along; they are the same for every sample."""
        assert op.key is not None
        merged = self.classes.merged(numbers, [axis for axis in range(numbers.ndim) if numbers.stride(axis) == 0])
        shape = list(merged.shape)
        while len(shape) > 1 and shape[0] == 1:
            shape.pop(0)
        self._same_each_time(self.traced.clipped, op.key, merged.reshape(shape))

    def _same_each_time(self, table: dict[OpKey, Tensor], key: OpKey, numbers: Tensor) -> None:
        """What one operation scales must have one scale in all of its calls and in all runs."""
        before = table.setdefault(key, numbers)
        if before.shape == numbers.shape:
            self.classes.unify(before, numbers)
            table[key] = torch.maximum(before, numbers)
            return
        self.classes.pin(torch.cat([before.reshape(-1), numbers.reshape(-1)]), "its shape differs from run to run")
        table[key] = torch.full_like(numbers, PINNED)


def _sets_attribute(func: Callable[..., Any]) -> bool:
    """Whether this is an assignment such as ``x.data = y``."""
    return type(func) is MethodWrapperType and func.__name__ == "__set__"


def _storage_of(tensor: Tensor) -> int | None:
    """Identity of a tensor's memory, ``None`` where it has none."""
    if tensor.layout is not torch.strided or type(tensor) not in (Tensor, nn.Parameter) or is_batched(tensor):
        return None
    return tensor.untyped_storage().data_ptr() or None

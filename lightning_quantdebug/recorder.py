"""Records one run of a network as operations and values, by the identity of its tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quantdebug.interception import Frame, Interception, OpKey, clean_path, is_batched
from lightning_quantdebug.operations import (
    NO_ARITHMETIC,
    Category,
    Slot,
    category_of,
    functional_call,
    in_place_target,
    operation_name,
    parameters_of,
    tensors_in,
)
from lightning_quantdebug.topology import Operation, Run, Value

# Operations that give no tensor but let the numbers out.
_READS = ("item", "tolist", "numpy", "array")
_LEAVES_TORCH = ("tolist", "numpy", "array")


# Operations that treat their input as classes, and the axis that they take where none is given.
_READS_CLASSES: dict[str, int | None] = {
    "cross_entropy": 1,
    "nll_loss": 1,
    "nll_loss2d": 1,
    "softmax": None,
    "log_softmax": None,
    "argmax": None,
}
# Criteria and metrics that do, by parts of their names: those of torch and of torchmetrics.
_CLASS_JUDGES = (
    *("CrossEntropyLoss", "NLLLoss", "Accuracy", "F1Score", "FBeta", "AUROC", "AveragePrecision", "Precision"),
    *("Recall", "ConfusionMatrix", "CohenKappa", "JaccardIndex", "MatthewsCorrCoef", "StatScores", "CalibrationError"),
)


class Recorder(Interception):
    """Records one run.

    In-place operations are carried out on a copy, so that a quantizer can later sit on their result without writing
    into what autograd has saved. Where the network goes on to use the tensor it wrote into, that is not the same; such
    operations are collected in ``run.unsafe`` and the run is to be recorded again with them in ``real``.

    Args:
        root: The module that is recorded.
        scope: See :class:`Interception`.
        real: Keys of in-place operations that must be carried out as they are.
        inputs: Names of the tensors that the caller passes in, by identity.
    """

    def __init__(
        self,
        root: nn.Module,
        scope: str = "",
        real: frozenset[OpKey] = frozenset(),
        inputs: dict[int, str] | None = None,
    ) -> None:
        """Start an empty run."""
        super().__init__(root, scope)
        self.real = real
        self.run = Run(unsafe=set(real))
        self._inputs = inputs or {}
        self._known: dict[int, str] = {}
        for name, tensor in (*root.named_parameters(), *root.named_buffers()):
            self._known.setdefault(id(tensor), clean_path(name))
        self._values: dict[int, Value] = {}
        self._kept: list[Tensor] = []
        self._aliases: dict[int, list[int]] = defaultdict(list)
        self._stale: dict[int, OpKey] = {}
        self._stale_storages: dict[int, OpKey] = {}

    def operation(self, key: OpKey, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation and note what went in and out."""
        arguments = list(tensors_in(args, kwargs))
        if any(is_batched(tensor) for _, tensor in arguments):
            self.out_of_reach(key.func, frame, "inside torch.func: its tensors have no memory of their own")
            return key.func(*args, **kwargs)
        target = in_place_target(key.func, args, kwargs)
        form = functional_call(key.func, args, kwargs) if target is not None and key not in self.real else None
        if target is None or form is None:
            result = key.func(*args, **kwargs)
        else:
            result = form[0](*form[1], **form[2]).to(target.dtype)
        outputs = [tensor for _, tensor in tensors_in((result,), {})]
        if target is not None and form is None and all(tensor is not target for tensor in outputs):
            outputs.append(target)
        if not outputs and operation_name(key.func) not in _READS:
            return result
        if not outputs and operation_name(key.func) in _LEAVES_TORCH:
            self.escaped([tensor for _, tensor in arguments])
        operation = self._describe(key, frame, args, kwargs, arguments)
        if form is not None and target is not None:
            self._mark_stale(target, key)
        self.run.operations.append(operation)
        operation.outputs = tuple(
            self._produced(operation, position, tensor) for position, tensor in enumerate(outputs)
        )
        if target is not None and form is None:
            self._overwritten(target, operation)
        return result

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        """What a metric or a loss is given leaves the network there."""
        muted_before = bool(self.stack) and self.stack[-1].muted
        super()._enter_module(module, args)
        if self.stack and self.stack[-1].muted and not muted_before:
            self.escaped(args)
            if _judges_classes(module) and args and isinstance(args[0], Tensor) and id(args[0]) in self._values:
                _note_classes(self._values[id(args[0])], 1)

    def out_of_reach(self, func: Callable[..., Any], frame: Frame, why: str) -> None:
        """Note that an operation can get no quantizer."""
        if category_of(func) not in NO_ARITHMETIC:
            self.run.out_of_reach[f"{frame.path}.{operation_name(func)}".lstrip(".")] = why

    def _describe(
        self,
        key: OpKey,
        frame: Frame,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        arguments: list[tuple[Slot, Tensor]],
    ) -> Operation:
        """The operation with its inputs."""
        module = frame.module
        leaf = module is not None and _is_leaf_of_torch(module)
        inputs = []
        for slot, tensor in arguments:
            self._check_stale(tensor)
            inputs.append((slot, self._value(tensor, frame)))
        operation = Operation(
            key,
            operation_name(key.func),
            category_of(key.func),
            tuple(inputs),
            direct=module is None,
            leaf=leaf,
            arguments=_plain_arguments(key.func, args, kwargs),
        )
        for slot, value in inputs:
            value.consumers.append((operation, slot))
        if operation.op in _READS_CLASSES and inputs:
            plain = operation.arguments
            _note_classes(inputs[0][1], plain.get("dim", plain.get("1", _READS_CLASSES[operation.op])))
        return operation

    def _value(self, tensor: Tensor, frame: Frame) -> Value:
        """The value of an argument; one that no recorded operation made comes from outside."""
        known = self._values.get(id(tensor))
        if known is not None:
            return known
        name = self._known.get(id(tensor)) or _own_tensor(frame, tensor)
        if name is not None:
            value = self._new_value(tensor, None, 0, name, constant=True, from_parameter=True)
        else:
            outside = self._inputs.get(id(tensor), "")
            value = self._new_value(tensor, None, 0, outside, constant=False, from_parameter=False)
        self._remember(tensor, value)
        return value

    def _produced(self, operation: Operation, position: int, tensor: Tensor) -> Value:
        """The value of a result."""
        data = operation.data_inputs
        constant = operation.category is Category.CREATION or not data
        from_parameter = constant and any(value.from_parameter for _, value in operation.inputs)
        if operation.category is Category.RANDOM:
            constant = from_parameter = False
        value = self._new_value(tensor, operation, position, "", constant, from_parameter)
        value.discrete = not constant and _is_discrete(operation)
        self._remember(tensor, value)
        return value

    def _new_value(
        self, tensor: Tensor, producer: Operation | None, position: int, name: str, constant: bool, from_parameter: bool
    ) -> Value:
        """A value that describes ``tensor``."""
        number = float(tensor) if constant and tensor.numel() == 1 and tensor.is_floating_point() else None
        return Value(
            name,
            producer,
            position,
            constant,
            from_parameter,
            tensor.is_floating_point(),
            tuple(tensor.shape),
            number=number,
        )

    def _remember(self, tensor: Tensor, value: Value) -> None:
        """Hold the tensor, so that its identity stays its own for the whole run."""
        self._values[id(tensor)] = value
        self._kept.append(tensor)
        storage = _storage_of(tensor)
        if storage is not None:
            self._aliases[storage].append(id(tensor))

    def _overwritten(self, target: Tensor, operation: Operation) -> None:
        """Every other view of what was written into now holds the operation's result."""
        written = operation.outputs[-1]
        storage = _storage_of(target)
        for alias in self._aliases.get(storage, ()) if storage is not None else ():
            self._values[alias].written = True
            self._values[alias] = written

    def _mark_stale(self, target: Tensor, key: OpKey) -> None:
        """Note that ``target`` should have been written into, but was not."""
        self._stale[id(target)] = key
        storage = _storage_of(target)
        if storage is not None:
            self._stale_storages[storage] = key

    def _check_stale(self, tensor: Tensor) -> None:
        """Find the in-place operation whose effect is missing in ``tensor``."""
        key = self._stale.get(id(tensor)) or self._stale_storages.get(_storage_of(tensor) or 0)
        if key is not None:
            self.run.unsafe.add(key)

    def module_left(self, frame: Frame, args: Any, output: Any) -> None:
        """Name the results of modules whose inside can not be seen, and notice criteria."""
        for _, tensor in tensors_in((output,), {}):
            self._check_stale(tensor)
            if id(tensor) not in self._values:
                self._remember(
                    tensor, self._new_value(tensor, None, 0, frame.path, constant=False, from_parameter=False)
                )
                if frame.path not in self.run.opaque_modules:
                    self.run.opaque_modules.append(frame.path)
        if len(self.stack) == 1 and frame.module is not None and _looks_like_criterion(frame.module, output):
            self.run.scalar_modules.add(frame.path)

    def escaped(self, output: Any) -> None:
        """Mark what the network returns."""
        for _, tensor in tensors_in((plain_containers(output),), {}):
            self._check_stale(tensor)
            if id(tensor) in self._values:
                self._values[id(tensor)].escapes = True


def _is_leaf_of_torch(module: nn.Module) -> bool:
    """Whether a module is one of torch's own, with no children but parametrizations of its weights."""
    children = [name for name, _ in module.named_children() if name != "parametrizations"]
    return type(module).__module__.startswith("torch.nn") and not children


def _is_discrete(operation: Operation) -> bool:
    """Whether a result is computed from integers (and constants that nobody trains) alone."""
    inputs = [value for _, value in operation.inputs]
    from_integers = all(value.discrete or not value.floating for value in inputs if not value.constant)
    return from_integers and operation.category is not Category.RANDOM and not any(v.from_parameter for v in inputs)


def _judges_classes(module: nn.Module) -> bool:
    """Whether a criterion or a metric takes classes; binary and multi-label ones take one number for each."""
    name = type(module).__name__
    return any(part in name for part in _CLASS_JUDGES) and not name.startswith(("Binary", "Multilabel", "BCE"))


def _note_classes(value: Value, axis: int | None) -> None:
    """Note the axis of a value's classes, also of what it was made from number by number."""
    if axis is None or isinstance(axis, bool) or not value.floating or len(value.shape) < 2:
        return
    at: int | None = axis % len(value.shape)
    source: Value | None = value
    while source is not None and at is not None and source.shape[at] > 1:
        source.class_axis = at
        producer = source.producer
        if producer is None or producer.category is not Category.PASS_THROUGH or not producer.data_inputs:
            return
        before = producer.data_inputs[0][1]
        at = _same_axis(source.shape, at, before.shape)
        source = before


def _same_axis(shape: tuple[int, ...], axis: int, before: tuple[int, ...]) -> int | None:
    """The axis of a tensor that became ``axis`` of another view of it, ``None`` where that can not be told."""
    if shape == before:
        return axis
    candidates = [index for index, size in enumerate(before) if size == shape[axis]]
    if len(candidates) == 1:
        return candidates[0]
    is_last = axis == len(shape) - 1 and bool(before) and before[-1] == shape[axis]
    return len(before) - 1 if is_last else None


def _own_tensor(frame: Frame, tensor: Tensor) -> str | None:
    """Name of a parameter or buffer that was put into the running module for this call only."""
    if frame.module is None:
        return None
    owned = {**frame.module._parameters, **frame.module._buffers}
    return next((f"{frame.path}.{name}".lstrip(".") for name, own in owned.items() if own is tensor), None)


def _storage_of(tensor: Tensor) -> int | None:
    """Identity of a tensor's memory, ``None`` where it has none."""
    if tensor.layout is not torch.strided or type(tensor) not in (Tensor, nn.Parameter) or is_batched(tensor):
        return None
    return tensor.untyped_storage().data_ptr() or None


def _looks_like_criterion(module: nn.Module, output: Any) -> bool:
    """Whether a module that the step calls returns one number and has no weights: it judges, it is not judged."""
    scalar = isinstance(output, Tensor) and output.ndim == 0
    return scalar and not any(parameter.ndim > 1 for parameter in module.parameters())


def plain_containers(output: Any) -> Any:
    """Model outputs as dicts, lists and tuples: dataclass-like objects become dicts."""
    if isinstance(output, (Tensor, str, bytes)) or output is None:
        return output
    if isinstance(output, dict):
        return {key: plain_containers(value) for key, value in output.items()}
    if isinstance(output, (list, tuple)):
        return [plain_containers(value) for value in output]
    if hasattr(output, "__dict__"):
        return {key: plain_containers(value) for key, value in vars(output).items() if not key.startswith("_")}
    return output


def _plain_arguments(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments that are no tensors, by name where the function tells its names, else by position."""
    names = parameters_of(func)
    plain: dict[str, Any] = {}
    for index, value in enumerate(args):
        name = names[index] if index < len(names) else str(index)
        if _is_plain(value):
            plain[name] = value
    plain.update({name: value for name, value in kwargs.items() if _is_plain(value)})
    return plain


def _is_plain(value: Any) -> bool:
    """Whether an argument is a number, a string, or several numbers such as a padding."""
    if isinstance(value, (tuple, list)):
        return all(isinstance(item, int) for item in value)
    return isinstance(value, (bool, int, float, str))


def input_names(inputs: Any) -> dict[int, str]:
    """Names of a batch's tensors: ``input`` for the first floating-point one, then ``input.1``; dicts by key."""
    names: dict[int, str] = {}
    for path, tensor in _leaves(plain_containers(inputs), ""):
        if tensor.is_floating_point() or path:
            names.setdefault(id(tensor), path or "input")
    return names


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a batch with their names."""
    if isinstance(value, Tensor):
        yield path or "input", value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path or 'input'}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(item, path if index == 0 else f"{path or 'input'}.{index}")

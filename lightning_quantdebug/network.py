"""The network that leaves the LightningModule: which module is called, with which tensors, and what it returns.

A quantized model is rebuilt and exported as one call of one module. :class:`Network` names that module and the
quantizers that its tensors come from; :class:`NetworkCall` is one recorded call. Arguments and results may have any
structure: tensors are taken out in a fixed order and put back in the same one.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from lightning_quantdebug.errors import CaptureError
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.model_loan import BorrowedForward


@dataclass(frozen=True, eq=False)
class Network:
    """One module that is called as a whole.

    Args:
        root: The module whose sub-modules give quantizers their names.
        path: Path of the module that is called; ``""``: the root itself.
        inputs: For each tensor among the arguments, in order, the name that a quantizer of it has; ``""``: it has none.

    Raises:
        CaptureError: If the root has no module of this path.
    """

    root: nn.Module
    path: str = ""
    inputs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a path that leads nowhere."""
        if self.path not in dict(self.root.named_modules()):
            raise CaptureError(f"{type(self.root).__name__} has no module {self.path!r}, which is the network.")

    @property
    def module(self) -> nn.Module:
        """The module that is called."""
        return self.root.get_submodule(self.path)

    def call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call it as it is, past a session that has borrowed its ``forward``."""
        return self.module(*args, **kwargs) if self.path else plain_forward(self.root)(*args, **kwargs)

    def run(self, session: Instrumentation, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Call it with the quantizers of ``session`` in their modes."""
        return session.run(lambda: self.call(args, kwargs), step=bool(self.path))

    def record(self, session: Instrumentation, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Record one call of it."""
        given = tensors_of((args, kwargs))
        names = {id(tensor): name for tensor, name in zip(given, self.inputs, strict=False)}
        return session.record(lambda: self.call(args, kwargs), (args, kwargs), step=bool(self.path), names=names)


@dataclass(frozen=True, eq=False)
class NetworkCall:
    """One call of a network: what went in, and what came out with the quantizers on."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, in order."""
        return tensors_of((self.args, self.kwargs))

    @property
    def results(self) -> list[Tensor]:
        """The tensors of the output, in order, detached."""
        return [tensor.detach() for tensor in output_tensors(self.output)]

    def with_tensors(self, tensors: Sequence[Tensor]) -> NetworkCall:
        """The same call with other tensors as arguments, and no output."""
        args, kwargs = with_tensors((self.args, self.kwargs), tensors)
        return NetworkCall(args, kwargs)

    def copied(self) -> NetworkCall:
        """The same call with arguments that nobody else writes into."""
        with torch.inference_mode(False), torch.no_grad():
            return self.with_tensors([tensor.detach().clone() for tensor in self.tensors])


def argument_names(network: Network, call: NetworkCall) -> list[str]:
    """Names of the tensors among the arguments, in order: those of the parameters of ``forward``.

    Examples:
        >>> network = Network(nn.Linear(2, 2))
        >>> argument_names(network, NetworkCall((torch.zeros(1, 2),), {}))
        ['input']
    """
    try:
        bound = inspect.signature(plain_forward(network.module)).bind(*call.args, **call.kwargs)
        names = {id(tensor): name for key, item in bound.arguments.items() for name, tensor in _named(key, item)}
    except (TypeError, ValueError):
        names = {}
    found = [names.get(id(tensor), f"input_{index}") for index, tensor in enumerate(call.tensors)]
    return [name if found.count(name) == 1 else f"{name}_{index}" for index, name in enumerate(found)]


def _named(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of one argument with names."""
    leaves = [(path, leaf) for path, leaf in pytree.tree_leaves_with_path(value) if isinstance(leaf, Tensor)]
    for path, leaf in leaves:
        yield "_".join([name, *(re.sub(r"\W+", "", str(key)) for key in path)]), leaf


def plain_forward(module: nn.Module) -> Callable[..., Any]:
    """A module's own ``forward``, also while a session has borrowed it."""
    forward = module.forward
    return forward.original if isinstance(forward, BorrowedForward) else forward


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in nested arguments, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def with_tensors(value: Any, tensors: Sequence[Tensor]) -> Any:
    """Nested arguments with other tensors in the places of theirs, in order."""
    leaves, spec = pytree.tree_flatten(value)
    rest = iter(tensors)
    return pytree.tree_unflatten([next(rest) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)


def output_tensors(output: Any) -> list[Tensor]:
    """The tensors of what a network returns, whatever holds them, in order."""
    return [tensor for _, tensor in named_outputs(output)]


def named_outputs(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of what a network returns with names: ``output``, its keys or attributes, ``output_1`` and so on."""
    if isinstance(output, Tensor):
        yield name or "output", output
    elif isinstance(output, Mapping):
        for key, item in output.items():
            yield from named_outputs(item, f"{name}_{key}".lstrip("_"))
    elif isinstance(output, (list, tuple)):
        for index, item in enumerate(output):
            yield from named_outputs(item, f"{name or 'output'}_{index}")
    elif _has_fields(output):
        for key, item in vars(output).items():
            if not key.startswith("_"):
                yield from named_outputs(item, f"{name}_{key}".lstrip("_"))


def with_output_tensors(output: Any, tensors: Sequence[Tensor]) -> Any:
    """What a network returns, with other tensors in the places of its own, in the order of :func:`named_outputs`."""
    return _rebuilt(output, iter(tensors))


def _rebuilt(output: Any, tensors: Iterator[Tensor]) -> Any:
    """The same structure with the next tensors."""
    if isinstance(output, Tensor):
        return next(tensors)
    if isinstance(output, Mapping):
        items = {key: _rebuilt(item, tensors) for key, item in output.items()}
        if type(output) is dict:
            return items
        other = copy.copy(output)
        for key, item in items.items():
            other[key] = item  # type: ignore[index]  # mappings that networks return can be written
        return other
    if isinstance(output, (list, tuple)):
        parts = [_rebuilt(item, tensors) for item in output]
        return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    if _has_fields(output):
        other = copy.copy(output)
        for key, item in vars(output).items():
            if not key.startswith("_"):
                object.__setattr__(other, key, _rebuilt(item, tensors))
        return other
    return output


def _has_fields(output: Any) -> bool:
    """Whether an output is a record of the user's."""
    return hasattr(output, "__dict__") and not isinstance(output, (str, bytes, type, nn.Module))

"""A snapshot of everything in a user's module that a validation pass can change, and the way back.

A validation step may do more than compute: fill lists, count, keep the best value in a metric, update running
statistics, cache. The snapshot goes through the module tree and through what the user's attributes hold (lists, dicts,
sets, deques, arrays, tensors, metrics, plain objects such as meters) and keeps, for each, the references *and* the
contents; :meth:`StateSnapshot.restore` puts both back in place, so that whoever else holds the same list sees it as it
was. Parameters are left alone unless asked for: a validation that writes to them is rare, and their copies are large.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset, Sampler

# What these packages define is no user state: a Trainer, a compiled function, a thread. Namespaces and containers of
# the standard library are.
_FOREIGN = (sys.stdlib_module_names - {"argparse", "collections", "types"}) | {
    "lightning",
    "lightning_fabric",
    "lightning_quantdebug",
    "lightning_utilities",
    "numpy",
    "pytorch_lightning",
    "torch",
}
_SCALARS = (str, bytes, int, float, complex, bool, type(None))
_OPAQUE = (type, ModuleType, FunctionType, MethodType, Enum, Dataset, DataLoader, Sampler)


class StateSnapshot:
    """References and contents of what ``roots`` hold, to be put back by :meth:`restore` as often as wanted.

    Args:
        roots: Modules, containers or objects.
        skip: Attribute names of modules whose reference is kept but not looked into (Lightning's own).
        parameters: Keep the values of parameters as well.
        passive: Leave torch's own layers in eval mode out: nothing that they hold changes when they run.

    Attributes:
        num_bytes: Size of the tensors and arrays that were copied.

    Example:
        >>> seen = []
        >>> snapshot = StateSnapshot(seen)
        >>> seen.append(1)
        >>> snapshot.restore()
        >>> seen
        []
    """

    def __init__(
        self, *roots: Any, skip: frozenset[str] = frozenset(), parameters: bool = False, passive: bool = False
    ) -> None:
        """Take the snapshot."""
        self._leaves_passive = passive
        self._skip = skip | frozenset(vars(nn.Module()))
        self._parameters = parameters
        self.num_bytes = 0
        self._undo: list[Callable[[], None]] = []
        self._seen: dict[int, Any] = {}
        self._pending: list[Any] = []
        for root in roots:
            self._take(root, is_root=True)
            while self._pending:
                self._take(self._pending.pop())

    def restore(self) -> None:
        """Put everything back; if one piece resists, the others are still restored before its error is raised."""
        with ExitStack() as stack:
            for undo in self._undo:
                stack.callback(undo)

    def _take(self, value: Any, is_root: bool = False) -> None:
        """Keep one value and queue what it holds."""
        if id(value) in self._seen or isinstance(value, _SCALARS):
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self._take_tensor(value)
        elif isinstance(value, nn.Module):
            self._take_module(value)
        elif isinstance(value, dict):
            self._take_mapping(value)
        elif isinstance(value, (list, deque, set, tuple)):
            self._take_collection(value)
        elif isinstance(value, np.ndarray):
            self.num_bytes += value.nbytes
            self._undo.append(partial(_restore_array, value, value.copy()))
        elif is_root or _is_plain_object(value):
            self._take_mapping(vars(value))

    def _take_tensor(self, tensor: Tensor) -> None:
        """Keep the values of a tensor that can be written to; parameters only when asked for."""
        if isinstance(tensor, nn.Parameter) and not self._parameters:
            return
        # Outside inference mode nobody can write to an inference tensor; `_take_mapping` lends a copy instead.
        if not is_lazy(tensor) and not tensor.is_inference():
            self.num_bytes += tensor.nbytes
            self._undo.append(partial(_restore_tensor, tensor, tensor.detach().clone()))

    def _take_module(self, module: nn.Module) -> None:
        """Keep a module's attributes, buffers, children and mode. Our own quantizers keep what they calibrate."""
        if type(module).__module__.partition(".")[0] == "lightning_quantdebug":
            return
        if self._leaves_passive and not module.training and type(module).__module__.startswith("torch.nn.modules."):
            self._pending += module._modules.values()
            return
        if isinstance(module, torch.jit.ScriptModule):
            self._undo += [partial(setattr, part, "training", part.training) for part in module.modules()]
            self._pending += [*module.buffers(), *(module.parameters() if self._parameters else ())]
            return
        attributes = vars(module)
        self._take_mapping(attributes, skip=self._skip)
        for registry in ("_buffers", "_modules", "_parameters"):
            self._take_mapping(attributes[registry])

    def _take_mapping(self, mapping: dict[Any, Any], skip: frozenset[str] = frozenset()) -> None:
        """Keep the references in a mapping and queue its values."""
        self._undo.append(partial(_restore_mapping, mapping, dict(mapping)))
        if _holds_scalars(mapping.values()):
            return
        self._pending += [value for key, value in mapping.items() if not (isinstance(key, str) and key in skip)]
        for key, value in list(mapping.items()):
            if _is_frozen(value):
                mapping[key] = value.clone()

    def _take_collection(self, collection: Any) -> None:
        """Keep the references in a list, deque, set or tuple and queue its items."""
        items = list(collection)
        if not _holds_scalars(items):
            self._pending += items
        if isinstance(collection, list):
            self._undo.append(partial(_restore_sequence, collection, items))
            if not _holds_scalars(items) and any(_is_frozen(item) for item in items):
                collection[:] = [item.clone() if _is_frozen(item) else item for item in items]
        elif not isinstance(collection, tuple):
            self._undo.append(partial(_restore_bag, collection, items))


@contextmanager
def preserved(*roots: Any, skip: frozenset[str] = frozenset(), parameters: bool = False) -> Iterator[None]:
    """Give ``roots`` back as they were, whichever way the body is left; arguments as :class:`StateSnapshot`."""
    snapshot = StateSnapshot(*roots, skip=skip, parameters=parameters)
    try:
        yield
    finally:
        snapshot.restore()


def _holds_scalars(values: Iterable[Any]) -> bool:
    """Whether there is nothing to look into; a vocabulary of a million words must not cost a second per pass."""
    return set(map(type, values)) <= set(_SCALARS)


def _is_frozen(value: Any) -> bool:
    """Whether a tensor was made under ``inference_mode`` and would refuse to be written to outside it."""
    if not isinstance(value, Tensor) or is_lazy(value):
        return False
    return value.is_inference() and not torch.is_inference_mode_enabled()


def _is_plain_object(value: Any) -> bool:
    """Whether a value is an instance of a class of the user's, such as a meter."""
    package = type(value).__module__.partition(".")[0]
    return hasattr(value, "__dict__") and package not in _FOREIGN and not isinstance(value, _OPAQUE)


def _restore_tensor(tensor: Tensor, saved: Tensor) -> None:
    """Write the saved values bit for bit, through ``data``, so that autograd's version counter does not move."""
    if tensor.shape == saved.shape and tensor.dtype == saved.dtype and tensor.device == saved.device:
        tensor.data.copy_(saved)
    else:
        tensor.data = saved.clone()


def _restore_array(array: np.ndarray[Any, Any], saved: np.ndarray[Any, Any]) -> None:
    """Write the saved values into the array."""
    array.resize(saved.shape, refcheck=False)
    array[...] = saved


def _restore_mapping(mapping: dict[Any, Any], saved: dict[Any, Any]) -> None:
    """Drop new keys and put back the objects that were there; what did not change is not written to."""
    for key in [key for key in mapping if key not in saved]:
        del mapping[key]
    for key, value in saved.items():
        if key not in mapping or mapping[key] is not value:
            mapping[key] = value


def _restore_sequence(sequence: list[Any], saved: list[Any]) -> None:
    """Put back the items of a list, in place."""
    if len(sequence) != len(saved) or any(now is not then for now, then in zip(sequence, saved, strict=True)):
        sequence[:] = saved


def _restore_bag(bag: set[Any] | deque[Any], saved: list[Any]) -> None:
    """Put back the items of a set or deque, in place."""
    bag.clear()
    if isinstance(bag, deque):
        bag.extend(saved)
    else:
        bag.update(saved)

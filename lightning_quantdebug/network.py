"""The network that leaves the LightningModule: which module is called, with which tensors, and what it returns.

A quantized model is rebuilt and exported as one call of one module. :class:`Network` names that module and the
quantizers that its tensors come from; :class:`NetworkCall` is one recorded call. Arguments and results may have any
structure: tensors are taken out in a fixed order and put back in the same one. :class:`Wiring` is what tells its
operations apart in another process, where they may run in another order.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from lightning_quantdebug.errors import CaptureError
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.interception import OpKey
from lightning_quantdebug.model_loan import BorrowedForward
from lightning_quantdebug.topology import Names, Operation, Topology


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

    def holds(self, operation: Operation) -> bool:
        """Whether an operation runs inside it."""
        path = operation.key.path
        return path == self.path or path.startswith(f"{self.path}.") if self.path else not operation.direct

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


@dataclass(frozen=True, eq=False)
class Wiring:
    """What tells a network's operations apart in another process.

    Operations of one kind in one module are numbered as they first run, which on other data is another order, and
    whether a loop's rounds share a quantizer is only known once two numbers of rounds were seen. Both are kept here.

    Attributes:
        after: For each operation by name, what its arguments come from: operations, parameters, ``""`` for the rest.
        at: For each operation by name, the instructions that call it, which other versions of Python number otherwise.
        quantizers: Names of the quantizers that sit at each operation.
        calls: Paths of modules all calls of which share their quantizers.
        rounds: Names of operations in loops all rounds of which do.
    """

    after: Mapping[str, frozenset[tuple[str, ...]]] = field(default_factory=dict)
    at: Mapping[str, frozenset[tuple[int, ...]]] = field(default_factory=dict)
    quantizers: Mapping[str, frozenset[str]] = field(default_factory=dict)
    calls: frozenset[str] = frozenset()
    rounds: frozenset[str] = frozenset()

    @classmethod
    def of(cls, session: Instrumentation, network: Network) -> Wiring:
        """The wiring of a session's network, as far as it was recorded."""
        operations = [operation for operation in session.topology if network.holds(operation)]
        after: dict[str, set[tuple[str, ...]]] = {}
        at: dict[str, set[tuple[int, ...]]] = {}
        for operation in operations:
            after.setdefault(operation.name, set()).add(_after(operation, network))
            at.setdefault(operation.name, set()).add(_at(operation))
        shared = session.topology.shared_keys()
        return cls(
            {name: frozenset(found) for name, found in after.items()},
            {name: frozenset(found) for name, found in at.items()},
            {name: found for name, found in sites_at(session).items() if name in after},
            frozenset(op.key.path for op in operations if shared[op.key].call is None),
            frozenset(op.name for op in operations if shared[op.key].occurrence is None),
        )

    def topology(self, taken: Iterable[str] = ()) -> Topology:
        """An empty topology in which operations get the names that they have here, and others none that is taken."""
        return _Wired(names=_WiredNames(self, taken), wiring=self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as :meth:`from_dict` takes them."""
        operations = {
            name: {
                "after": sorted(map(list, self.after[name])),
                "at": sorted(map(list, self.at[name])),
                "quantizers": sorted(self.quantizers.get(name, ())),
            }
            for name in self.after
        }
        return {"operations": operations, "calls": sorted(self.calls), "rounds": sorted(self.rounds)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Wiring:
        """What :meth:`to_dict` was taken of."""
        operations = values["operations"]
        return cls(
            {name: frozenset(map(tuple, item["after"])) for name, item in operations.items()},
            {name: frozenset(map(tuple, item["at"])) for name, item in operations.items()},
            {name: frozenset(item["quantizers"]) for name, item in operations.items()},
            frozenset(values["calls"]),
            frozenset(values["rounds"]),
        )


def sites_at(session: Instrumentation) -> dict[str, frozenset[str]]:
    """Names of the quantizers at each recorded operation, by its name."""
    shared, sites = session.topology.shared_keys(), _names_by_key(session)
    return {operation.name: frozenset(sites.get(shared[operation.key], ())) for operation in session.topology}


def sites_of_runs(session: Instrumentation) -> list[set[str]]:
    """Names of the quantizers that each recorded run reaches."""
    shared, sites = session.topology.shared_keys(), _names_by_key(session)
    return [{name for op in run for name in sites.get(shared[op.key], ())} for run in session.topology.runs]


def _names_by_key(session: Instrumentation) -> dict[OpKey, list[str]]:
    """Names of the quantizers at each identity."""
    found: dict[OpKey, list[str]] = {}
    for site in session.plan.sites:
        for spot in site.places:
            found.setdefault(spot.key, []).append(site.name)
    return found


def _after(operation: Operation, network: Network | None = None) -> tuple[str, ...]:
    """What the arguments of an operation come from; what is made outside the network comes from nowhere."""
    return tuple(
        (value.name if value.constant else "")
        if value.producer is None
        else ("" if network is not None and not network.holds(value.producer) else value.producer.name)
        for _, value in operation.inputs
    )


def _at(operation: Operation) -> tuple[int, ...]:
    """The instructions that call an operation, without the addresses of their code."""
    return tuple(operation.key.site[1::2])


class _WiredNames(Names):
    """Names that operations have in a wiring; others get names that are not taken."""

    def __init__(self, wiring: Wiring, taken: Iterable[str]) -> None:
        """Start with no operation."""
        super().__init__()
        self._taken = {*taken, *wiring.after}
        self._after: dict[str, set[tuple[str, ...]]] = {}
        self._at: dict[str, set[tuple[int, ...]]] = {}
        self._numbered: dict[str, list[tuple[int, str]]] = {}
        self._named: tuple[tuple[str, ...], tuple[int, ...]] = ((), ())
        for name in wiring.after:
            # Calls of one module differ in what stands behind "@", which is added to the name of the first one.
            base = name.split("@")[0]
            self._after.setdefault(base, set()).update(wiring.after[name])
            self._at.setdefault(base, set()).update(wiring.at[name])
        for base in self._after:
            self._numbered.setdefault(base, []).append((0, base))
            stem, _, number = base.rpartition(".")
            if number.isdecimal():
                self._numbered.setdefault(stem, []).append((int(number), base))

    def name(self, operation: Operation, is_main: bool) -> str:
        """The name of an operation; ``is_main``: it is what its torch module is there for."""
        self._named = _after(operation), _at(operation)
        return super().name(operation, is_main)

    def _unused(self, base: str, identity: tuple[Any, ...]) -> str:
        """The name in the wiring that fits best, else one that is not taken."""
        known = [name for _, name in sorted(self._numbered.get(base, ()))]
        free = [name for name in known if self._owners.get(name, identity) == identity]
        best = max(free, key=self._fit, default="")
        if not best or not self._fit(best):
            number, best = 0, base
            while best in self._taken or self._owners.get(best, identity) != identity:
                number += 1
                best = f"{base}.{number}"
        self._owners[best] = identity
        return best

    def _fit(self, name: str) -> int:
        """How well the operation that is named fits; the instruction says more than what it works on."""
        after, at = self._named
        return 2 * (at in self._at[name]) + (after in self._after[name])


@dataclass(eq=False)
class _Wired(Topology):
    """A topology whose calls and rounds share what a wiring says."""

    wiring: Wiring = field(default_factory=Wiring)

    def shared_keys(self) -> dict[OpKey, OpKey]:
        """Each recorded key with the parts left out whose number depends on the data, here or in the wiring."""
        wiring = self.wiring
        rounds = {(op.key.path, op.key.func, op.key.site) for op in self if op.name in wiring.rounds}
        return {
            key: shared._replace(
                call=None if key.path in wiring.calls else shared.call,
                occurrence=None if (key.path, key.func, key.site) in rounds else shared.occurrence,
            )
            for key, shared in super().shared_keys().items()
        }


def argument_names(network: Network, call: NetworkCall) -> list[str]:
    """Names of the tensors among the arguments, in order: those of the parameters of ``forward``.

    Examples:
        >>> network = Network(nn.Linear(2, 2))
        >>> argument_names(network, NetworkCall((torch.zeros(1, 2),), {}))
        ['input']
    """
    try:
        # What `torch.compile` makes of a module tells no names.
        module = getattr(network.module, "_orig_mod", network.module)
        bound = inspect.signature(plain_forward(module)).bind(*call.args, **call.kwargs)
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
    else:
        for key, item in _fields_of(output).items():
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
    own = _fields_of(output)
    if not own:
        return output
    other = copy.copy(output)
    for key, item in own.items():
        object.__setattr__(other, key, _rebuilt(item, tensors))
    return other


def _fields_of(output: Any) -> dict[str, Any]:
    """What a record of the user's holds, also one with slots; nothing for all else."""
    if isinstance(output, (str, bytes, type, nn.Module)):
        return {}
    own = dict(getattr(output, "__dict__", {}))
    if is_dataclass(output):
        own |= {item.name: getattr(output, item.name) for item in fields(output) if item.name not in own}
    return {key: item for key, item in own.items() if not key.startswith("_")}

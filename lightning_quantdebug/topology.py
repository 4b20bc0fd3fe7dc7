"""The dataflow of a network, recorded by running it.

One run gives a list of :class:`Operation`, each with the :class:`Value` of every tensor that goes in and out. Values
are followed by tensor identity, so functional calls, reused modules, tied weights and views are what they are. The
union of several runs (:class:`Topology`) covers data-dependent branches and loops. It serves placement, BN folding,
equalization and the names in every report.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from lightning_quantdebug.interception import OpKey
from lightning_quantdebug.operations import (
    Category,
    Slot,
)


@dataclass(eq=False)
class Value:
    """One tensor of a run.

    Attributes:
        name: Name of the parameter, buffer, input or opaque module it comes from; ``""`` for results of operations.
        producer: The operation that made it, ``None`` for everything that comes from outside.
        position: Which of the producer's outputs it is.
        constant: Whether it depends on no data.
        from_parameter: Whether it is a parameter or buffer or computed from one.
        floating: Whether it holds real floating-point numbers.
        discrete: Whether it is computed from integers alone, as masks and positions are.
        shape: Its shape.
        number: Its value, where it is a constant of one element.
        written: Whether the network writes into it, through itself or a view, and relies on that.
        class_axis: Axis of its classes, where a loss, a metric or an ``argmax`` treats it as classes.
    """

    name: str
    producer: Operation | None
    position: int
    constant: bool
    from_parameter: bool
    floating: bool
    shape: tuple[int, ...]
    discrete: bool = False
    number: float | None = None
    written: bool = False
    class_axis: int | None = None
    consumers: list[tuple[Operation, Slot]] = field(default_factory=list)
    escapes: bool = False


@dataclass(eq=False)
class Operation:
    """One operation of a run.

    Attributes:
        key: Its identity at run time.
        op: Its canonical name, such as ``conv2d``.
        category: What it does to a grid.
        inputs: Every tensor argument with its slot.
        outputs: Every tensor result.
        direct: Whether it stands in no module, but in the step itself.
        leaf: Whether the module is one of torch's own without children, so that the operation takes its name.
        arguments: The plain arguments that placement needs, by name (``training``, ``scalar``, ``groups``).
    """

    key: OpKey
    op: str
    category: Category
    inputs: tuple[tuple[Slot, Value], ...]
    direct: bool
    leaf: bool
    arguments: dict[str, Any]
    outputs: tuple[Value, ...] = ()
    name: str = ""

    @property
    def data_inputs(self) -> list[tuple[Slot, Value]]:
        """The inputs that depend on data."""
        return [(slot, value) for slot, value in self.inputs if not value.constant]

    @property
    def constant(self) -> bool:
        """Whether the result depends on no data."""
        return bool(self.outputs) and all(value.constant for value in self.outputs)


@dataclass
class Run:
    """What one recorded run found.

    Attributes:
        operations: Every operation, in order of execution.
        unsafe: In-place operations whose effect the network relies on.
        opaque_modules: Modules whose inside can not be seen.
        scalar_modules: Modules without weights that return one number to the step.
        out_of_reach: Operations that ran where nothing can be inserted, and why.
    """

    operations: list[Operation] = field(default_factory=list)
    unsafe: set[OpKey] = field(default_factory=set)
    opaque_modules: list[str] = field(default_factory=list)
    scalar_modules: set[str] = field(default_factory=set)
    out_of_reach: dict[str, str] = field(default_factory=dict)


class Names:
    """Stable display names, the same in every run of one network.

    An operation is called after its module: ``features.3`` for the one operation of a torch module,
    ``layer1.0.add`` for one inside a module of the user's, ``.1`` for the second addition there, ``@1`` for the second
    call of the module.
    """

    def __init__(self) -> None:
        """Start with no names."""
        self._bases: dict[tuple[Any, ...], str] = {}
        self._owners: dict[str, tuple[Any, ...]] = {}

    def name(self, operation: Operation, is_main: bool) -> str:
        """The name of an operation; ``is_main``: it is what its torch module is there for."""
        key = operation.key
        # The code of the step itself has call -1: a function that both it and `forward` call has two names.
        identity = (key.path, key.func, key.site, key.occurrence, key.call == -1)
        if identity not in self._bases:
            base = key.path if is_main and key.path else f"{key.path}.{operation.op}".lstrip(".")
            self._bases[identity] = self._unused(base, identity)
        return self._bases[identity] + (f"@{key.call}" if key.call and key.call > 0 else "")

    def _unused(self, base: str, identity: tuple[Any, ...]) -> str:
        """``base``, or ``base.1`` and so on if another operation has it."""
        name, number = base, 0
        while self._owners.setdefault(name, identity) != identity:
            number += 1
            name = f"{base}.{number}"
        return name


@dataclass(eq=False)
class Topology:
    """The union of several recorded runs.

    Attributes:
        runs: The operations of each run, in order of execution.
        unsafe: In-place operations that must be carried out as they are.
        opaque_modules: Modules whose inside can not be seen (TorchScript, NumPy, custom C++).
        criteria: Modules without weights that return one number to the step.
        out_of_reach: Operations that ran where nothing can be inserted, and why.
    """

    runs: list[list[Operation]] = field(default_factory=list)
    unsafe: set[OpKey] = field(default_factory=set)
    opaque_modules: list[str] = field(default_factory=list)
    criteria: set[str] = field(default_factory=set)
    out_of_reach: dict[str, str] = field(default_factory=dict)
    names: Names = field(default_factory=Names)

    def add(self, run: Run) -> None:
        """Add a finished run: name its operations and drop what belongs to no network."""
        self.unsafe |= run.unsafe
        self.opaque_modules += [path for path in run.opaque_modules if path not in self.opaque_modules]
        self.criteria |= run.scalar_modules
        self.out_of_reach |= run.out_of_reach
        operations = [operation for operation in run.operations if not self._in_criterion(operation)]
        operations = _reaching_the_network(operations)
        main = _main_operations(operations)
        for operation in operations:
            operation.name = self.names.name(operation, id(operation) in main)
        _forget_consumers(run.operations, {id(operation) for operation in operations})
        self.runs.append(operations)

    def _in_criterion(self, operation: Operation) -> bool:
        """Whether the operation runs inside a criterion."""
        path = operation.key.path
        return any(path == criterion or path.startswith(f"{criterion}.") for criterion in self.criteria)

    def __iter__(self) -> Iterator[Operation]:
        """Every operation of every run."""
        for run in self.runs:
            yield from run

    def batches_to_reach_all(self, usual: int = 1) -> int | None:
        """How many batches reach every operation: ``usual``, or all (``None``) where they differ from run to run."""
        recorded = [{operation.key for operation in run} for run in self.runs]
        return None if any(keys != recorded[0] for keys in recorded) else usual

    def output_operations(self) -> list[Operation]:
        """The operations whose results leave the network; if none is known to, those whose results nobody reads."""
        found = [operation for operation in self if any(map(_leaves_network, operation.outputs))]
        return found or [op for op in self if any(v.floating and not v.consumers for v in op.outputs)]

    def shared_keys(self) -> dict[OpKey, OpKey]:
        """Each recorded key with the parts left out (``None``) whose number depends on the data.

        A module that is called five times in one run and nine times in another has one quantizer for all calls; a loop
        inside one ``forward`` alike.
        """
        modules = _varying([{(op.key.path, op.key.call) for op in run} for run in self.runs])
        sites = _varying([{(_site(op.key), (op.key.call, op.key.occurrence)) for op in run} for run in self.runs])
        return {
            key: key._replace(
                call=None if key.path in modules else key.call,
                occurrence=None if _site(key) in sites and key.path not in modules else key.occurrence,
            )
            for key in (op.key for op in self)
        }


def _leaves_network(value: Value) -> bool:
    """Whether a value depends on data, holds real numbers and is returned or read outside the network."""
    return value.escapes and value.floating and not value.constant


def _site(key: OpKey) -> tuple[Any, ...]:
    """Where an operation stands, whatever round of a loop it is."""
    return key.path, key.func, key.site


def _varying(runs: list[set[tuple[Any, Any]]]) -> set[Any]:
    """Things that occur a different number of times in those runs in which they occur."""
    counts: dict[Any, set[int]] = defaultdict(set)
    for run in runs:
        tally: dict[Any, int] = defaultdict(int)
        for thing, _ in run:
            tally[thing] += 1
        for thing, count in tally.items():
            counts[thing].add(count)
    return {thing for thing, seen in counts.items() if len(seen) > 1}


def _reaching_the_network(operations: list[Operation]) -> list[Operation]:
    """Leave out operations of the step itself whose results reach no module: metrics, losses, penalties."""
    wanted: set[int] = set()
    for operation in reversed(operations):
        own_weight = operation.category in (Category.CONVOLUTION, Category.LINEAR, Category.MATMUL) and any(
            value.from_parameter and len(value.shape) > 1 for _, value in operation.inputs
        )
        reaches = any(id(user) in wanted for value in operation.outputs for user, _ in value.consumers)
        if not operation.direct or own_weight or reaches:
            wanted.add(id(operation))
    return [operation for operation in operations if id(operation) in wanted]


def _forget_consumers(operations: list[Operation], kept: set[int]) -> None:
    """Values used by operations that were dropped leave the network there: they escape."""
    for operation in operations:
        for value in (*operation.outputs, *(value for _, value in operation.inputs)):
            inside = [(user, slot) for user, slot in value.consumers if id(user) in kept]
            value.escapes = value.escapes or len(inside) < len(value.consumers)
            value.consumers = inside


def _main_operations(operations: list[Operation]) -> set[int]:
    """For each call of a torch module, the operation that the module is there for."""
    calls: dict[tuple[str, int | None], list[Operation]] = defaultdict(list)
    for operation in operations:
        if operation.leaf:
            calls[operation.key.path, operation.key.call].append(operation)
    minor = (Category.CREATION, Category.NOT_ARITHMETIC, Category.RANDOM)
    main = set()
    for run in calls.values():
        candidates = [op for op in run if op.category not in (*minor, Category.PASS_THROUGH)]
        candidates = candidates or [op for op in run if op.category not in minor] or run
        main.add(id(candidates[-1]))
    return main

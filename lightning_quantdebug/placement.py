"""From a topology and a table of rules to the list of quantizers, each with its place and its reason.

Weights first, because a weight decides whether the batch normalization behind it can be folded; then chains of
operations that run as one kernel; then one quantizer for every output that a rule names; then joins, whose inputs and
output share one. What gets no quantizer is listed with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from lightning_quantdebug.dataflow import IGNORED, Flow, starts_from_integers
from lightning_quantdebug.interception import OpKey
from lightning_quantdebug.operations import Category, Slot
from lightning_quantdebug.placement_rules import RULES, Action, Rules
from lightning_quantdebug.plan import Place, Plan, Site
from lightning_quantdebug.report import Unquantized
from lightning_quantdebug.target import Kind, QuantTarget
from lightning_quantdebug.topology import Operation, Topology, Value
from lightning_quantdebug.weight_placement import WeightPlacer


def place(topology: Topology, target: QuantTarget, exclude: Iterable[str] = ()) -> Plan:
    """Decide which tensors get a quantizer.

    Args:
        topology: Recorded runs of the network.
        target: Grids and the name of the placement table.
        exclude: Name patterns (``fnmatch``) of quantizers that are left out.

    Returns:
        The plan; every name in it is unique.
    """
    return _Placer(topology, target, tuple(exclude)).plan()


class _Placer:
    """The working state of one call of :func:`place`."""

    def __init__(self, topology: Topology, target: QuantTarget, exclude: tuple[str, ...]) -> None:
        self.topology = topology
        self.target = target
        self.exclude = exclude
        self.rules: Rules = RULES[target.placement]
        self.flow = Flow(self.rules)
        self.keys = topology.shared_keys()
        self.result = Plan()
        self.sites: dict[str, Site] = {}
        self.reasons: dict[str, str] = {}
        self.chain_end: dict[int, Operation] = {}
        self.chain_head: dict[int, Operation] = {}
        self.groups: dict[str, str] = {}
        self.names: dict[OpKey, str] = {}

    def plan(self) -> Plan:
        """Run the passes in order."""
        WeightPlacer(self.topology, self.target, self.flow, self.keys, self.result, self.sites, self.reasons).place()
        for run in self.topology.runs:
            self._find_chains(run)
        fused = self._always_fused()
        for run in self.topology.runs:
            for operation in run:
                self._place_inputs(operation)
                self._place_outputs(operation, fused)
        self._share_joins()
        self._leave_out()
        self._explain_modules()
        self.result.known = set(self.keys.values())
        self.result.parameters = self._parameters()
        self.result.criteria = set(self.topology.criteria)
        self.result.sites = self._in_order_of_execution()
        self.result.unquantized = [Unquantized(name, reason) for name, reason in self.reasons.items()]
        return self.result

    def _in_order_of_execution(self) -> list[Site]:
        """The quantizers as a batch meets them: at one operation its inputs, its weights, its outputs."""
        first: dict[OpKey, int] = {}
        for index, operation in enumerate(self.topology):
            first.setdefault(self.keys[operation.key], index)

        def rank(site: Site) -> tuple[int, int]:
            of_kind = 1 if site.kind is Kind.WEIGHT else 0
            return min((first[spot.key], 2 if spot.slot is None else of_kind) for spot in site.places)

        return sorted(self.sites.values(), key=rank)

    def _parameters(self) -> dict[OpKey, Slot]:
        """The parameter in each sum or product of data and a parameter."""
        found: dict[OpKey, Slot] = {}
        for operation in self.topology:
            if operation.category in (Category.ADD, Category.MULTIPLY) and len(operation.data_inputs) == 1:
                slots = [slot for slot, value in operation.inputs if value.constant and value.from_parameter]
                if len(slots) == 1:
                    found[self.keys[operation.key]] = slots[0]
        return found

    # Chains: operations that run as one kernel.

    def _find_chains(self, run: list[Operation]) -> None:
        """For each operation that an engine runs together with a later one, the last of that chain."""
        taken: set[int] = set()
        for operation in run:
            if id(operation) in taken or operation.constant:
                continue
            members = self._chain_from(operation, taken)
            taken |= {id(member) for member in members}
            for member in members[:-1]:
                self.chain_end[id(member)] = members[-1]
            for member in members:
                self.chain_head[id(member)] = members[0]

    def _chain_from(self, head: Operation, taken: set[int]) -> list[Operation]:
        """The longest chain that starts at ``head``."""
        chain = next((chain for chain in self.rules.chains if head.category in chain.heads), None)
        members = [head]
        for stage in chain.stages if chain is not None else ():
            follower = self.flow.only_user(members[-1])
            if follower is None or follower.op not in stage or id(follower) in taken:
                continue
            if follower.category is Category.BATCH_NORM and not self._is_folded(follower, forward=False):
                break
            if len(follower.data_inputs) > 1 and follower.category is Category.PIECEWISE_LINEAR:
                break
            members.append(follower)
        return members

    def _is_folded(self, norm: Operation, forward: bool) -> bool:
        """Whether a batch normalization is folded into the layer behind it (``forward``) or ahead of it."""
        layer = self.result.folded_into.get(self.keys[norm.key])
        return layer is not None and self.result.folds[layer].forward is forward

    def _always_fused(self) -> set[OpKey]:
        """Identities that end no chain in any run; one that does in some run keeps its quantizer."""
        fused: set[OpKey] = set()
        alone: set[OpKey] = set()
        for operation in self.topology:
            (fused if id(operation) in self.chain_end else alone).add(self.keys[operation.key])
        return fused - alone

    # Activations.

    def _place_inputs(self, operation: Operation) -> None:
        """Put a quantizer on every tensor that comes from outside, at the operation that reads it first."""
        for slot, value in operation.inputs:
            if value.producer is not None or value.constant or operation.category in IGNORED:
                continue
            name = value.name or f"{operation.name}.input"
            if not value.floating:
                self.reasons.setdefault(name, "integers: nothing to quantize")
            elif value.written:
                self.reasons.setdefault(name, "the network writes into it: what it writes is quantized instead")
            elif self.flow.is_mask(value) or not any(self.flow.real_uses(value)):
                self.reasons.setdefault(name, "a mask, or read by no arithmetic")
            elif self.rules.inputs and any(self._reads_integers(use) for use, _ in self.flow.real_uses(value)):
                self._activation(name)
                self._put(name, Place(self.keys[operation.key], slot))

    def _place_outputs(self, operation: Operation, fused: set[OpKey]) -> None:
        """Put a quantizer on an operation's outputs, or say why not."""
        key = self.keys[operation.key]
        name = self._name(operation)
        floating = [value for value in operation.outputs if value.floating and not value.constant]
        rule = self.rules.rule(operation.op, operation.category)
        if not floating or operation.category in IGNORED or self._is_folded(operation, forward=True):
            return
        if id(operation) in self.chain_end:
            if key in fused:
                self.reasons.setdefault(name, f"one kernel with {self._name(self.chain_end[id(operation)])}")
                return
        elif self.flow.keeps_grid(operation) and not starts_from_integers(operation):
            self.reasons.setdefault(name, self.flow.reason_of_passing(operation))
            return
        if rule.action is Action.NONE:
            self.reasons.setdefault(name, rule.reason)
            return
        if all(value.discrete for value in floating) and not self.flow.is_data(floating[0]):
            self.reasons.setdefault(name, "computed from integers alone (a mask or positions)")
            return
        if self.flow.decides_only(floating):
            self.reasons.setdefault(name, "only decides which way the network goes")
            return
        if not self._is_wanted(operation, rule.action):
            self.reasons.setdefault(name, rule.reason or "read by no integer operation")
            return
        self.reasons.pop(name, None)
        self._activation(name, self.rules.fixed_ranges.get(operation.op) if rule.action is Action.FIXED else None)
        self._put(name, Place(key, None, _quantized_outputs(operation)))
        if operation.category is Category.RECURRENT and len(operation.outputs) > 2:
            self.reasons.setdefault(f"{name} (cell state)", "stays inside the recurrent kernel")
        if operation.category in (Category.RECURRENT, Category.ATTENTION):
            self.reasons.setdefault(f"{name} (inside)", "one fused kernel: what happens inside it is not simulated")

    def _is_wanted(self, operation: Operation, action: Action) -> bool:
        """Whether an output is on a grid in this engine."""
        if action in (Action.QUANTIZE, Action.FIXED) or (
            action is Action.SHARE and Category.JOIN in self.rules.integer
        ):
            return True
        uses = (use for value in operation.outputs for use in self.flow.real_uses(value))
        return any(self._reads_integers(user) for user, _ in uses)

    def _reads_integers(self, operation: Operation) -> bool:
        """Whether an operation, or the kernel that it is a part of, computes in integers."""
        head = self.chain_head.get(id(operation), operation)
        return operation.category in self.rules.integer or head.category in self.rules.integer

    # Joins: concatenation has one grid for everything that it joins.

    def _share_joins(self) -> None:
        """Let the inputs and the output of each join share one quantizer, named after the join."""
        for operation in self.topology:
            if self.rules.rule(operation.op, operation.category).action is not Action.SHARE:
                continue
            name = self._find(self._name(operation))
            if name not in self.sites:
                continue
            for _, value in operation.data_inputs:
                source = self._source(value)
                other = self._find(source) if source is not None else None
                if other is not None and other != name and self._can_share(other):
                    self._merge(other, name)

    def _source(self, value: Value) -> str | None:
        """Name of the quantizer whose grid a value is on."""
        while value.producer is not None and self.flow.keeps_grid(value.producer) and value.producer.data_inputs:
            if value.producer.category is Category.LOOKUP:
                return None
            value = value.producer.data_inputs[0][1]
        if value.producer is not None:
            return self._name(value.producer)
        if value.name:
            return value.name
        return next((f"{user.name}.input" for user, _ in value.consumers if f"{user.name}.input" in self.sites), None)

    def _can_share(self, name: str) -> bool:
        """Whether a quantizer exists and its range is not fixed by definition."""
        return name in self.sites and self.sites[name].kind is Kind.ACTIVATION and self.sites[name].fixed_range is None

    def _find(self, name: str) -> str:
        """The quantizer that ``name`` was merged into."""
        while name in self.groups:
            name = self.groups[name]
        return name

    def _merge(self, other: str, name: str) -> None:
        """Let the quantizer ``name`` take over every place of ``other``."""
        self.groups[other] = name
        for spot in self.sites.pop(other).places:
            self._put(name, spot)
        self.reasons[other] = f"shares the quantizer {name}"

    # What stays out.

    def _leave_out(self) -> None:
        """Remove the quantizers that the user excluded."""
        for pattern in self.exclude:
            if not any(fnmatchcase(name, pattern) for name in (*self.sites, *self.reasons)):
                found = sorted(self.sites)
                self.result.idle.append(f"`exclude` has the pattern {pattern!r}, which fits none of {found}.")
            for name in [name for name in self.sites if fnmatchcase(name, pattern)]:
                del self.sites[name]
                self.reasons[name] = f"excluded by the pattern {pattern!r}"
        self.result.folds = {
            key: fold
            for key, fold in self.result.folds.items()
            if any(spot.key == key for site in self.sites.values() for spot in site.places if site.kind is Kind.WEIGHT)
        }

    def _explain_modules(self) -> None:
        """List what can not be seen or does not belong to the network."""
        for path in self.topology.opaque_modules:
            self.reasons[f"{path} (inside)"] = (
                "its operations can not be seen (TorchScript, NumPy or a custom extension)"
            )
        for name, why in self.topology.out_of_reach.items():
            self.reasons.setdefault(name, f"stays in FP32: it runs {why}")
        for path in sorted(self.topology.criteria):
            self.reasons[path] = "returns one number and has no weights: taken for a criterion"

    def _name(self, operation: Operation) -> str:
        """The operation's name; where all calls or all rounds of a loop share a quantizer, that of the first."""
        key = self.keys[operation.key]
        name = operation.name if key.call is not None else operation.name.split("@")[0]
        return self.names.setdefault(key, name)

    def _activation(self, name: str, fixed_range: tuple[float, float] | None = None) -> None:
        """Make sure that the activation quantizer ``name`` exists."""
        if name not in self.sites:
            self.sites[name] = Site(name, Kind.ACTIVATION, self.target.activations, None, fixed_range)

    def _put(self, name: str, spot: Place) -> None:
        """Add a place to a quantizer, once."""
        if spot not in self.sites[name].places:
            self.sites[name].places.append(spot)


def _quantized_outputs(operation: Operation) -> tuple[int, ...]:
    """Positions of the outputs that leave the operation on a grid."""
    if operation.category is Category.RECURRENT:
        return (0,) if operation.op.endswith("cell") else (0, 1)
    return tuple(index for index, value in enumerate(operation.outputs) if value.floating)

"""Which weights get a quantizer, at which granularity, and which batch normalizations are folded into them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lightning_quantdebug.dataflow import Flow
from lightning_quantdebug.interception import OpKey
from lightning_quantdebug.operations import Category, Slot
from lightning_quantdebug.plan import BatchNormFold, Place, Plan, Site
from lightning_quantdebug.target import Granularity, Kind, QuantSpec, QuantTarget
from lightning_quantdebug.topology import Operation, Topology, Value

_WEIGHTED = (Category.CONVOLUTION, Category.LINEAR, Category.MATMUL, Category.LOOKUP, Category.RECURRENT)
_FOLDABLE = ("conv1d", "conv2d", "conv3d", "linear", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_BATCH_NORM_SLOTS: dict[str, tuple[str, ...]] = {
    "function": ("input", "running_mean", "running_var", "weight", "bias"),
    "builtin": ("input", "weight", "bias", "running_mean", "running_var"),
}
_Use = tuple[Operation, Operation | None, BatchNormFold | None]


class WeightPlacer:
    """Places the quantizers of weights into a plan.

    Args:
        topology: Recorded runs of the network.
        target: Grids and placement.
        flow: The dataflow as the engine sees it.
        keys: Run-time identity of each recorded operation.
        plan: Receives the folds.
        sites: Receives the quantizers, by name.
        reasons: Receives why something has none, by name.
    """

    def __init__(
        self,
        topology: Topology,
        target: QuantTarget,
        flow: Flow,
        keys: dict[OpKey, OpKey],
        plan: Plan,
        sites: dict[str, Site],
        reasons: dict[str, str],
    ) -> None:
        """Keep what is read and what is filled."""
        self.topology = topology
        self.target = target
        self.flow = flow
        self.rules = flow.rules
        self.keys = keys
        self.plan = plan
        self.sites = sites
        self.reasons = reasons

    def place(self) -> None:
        """Give every weight one quantizer, whatever the number of places that use it."""
        users: dict[str, list[_Use]] = defaultdict(list)
        derived: dict[tuple[Any, ...], str] = {}
        for operation in self.topology:
            for slot, value in self._weights_of(operation):
                name = value.name or self._derived_name(operation, slot, derived)
                self._add_weight(name, operation, slot, value)
                norm = self._batch_norm_behind(operation)
                users[name].append((operation, norm, None if norm is None else self._fold(operation, norm)))
            self._explain_vectors(operation)
        for name, uses in users.items():
            folds = {fold for _, _, fold in uses}
            if name in self.sites and len(folds) == 1 and None not in folds:
                self._fold_all(name, uses)
            elif any(norm is not None for _, norm, _ in uses):
                self._explain_unfolded(name, uses, len(folds))
        for name, uses in users.items():
            if name in self.sites and len(uses) == 1 and self.keys[uses[0][0].key] not in self.plan.folds:
                self._fold_forward(name, uses[0][0])

    def _fold_all(self, name: str, uses: list[_Use]) -> None:
        """Fold the one batch normalization behind every use of a weight."""
        for operation, norm, fold in uses:
            assert norm is not None
            assert fold is not None
            self.plan.folds[self.keys[operation.key]] = fold
            self.plan.folded_into[self.keys[norm.key]] = self.keys[operation.key]
            self.reasons[norm.name] = f"folded into {name}"

    def _fold_forward(self, name: str, operation: Operation) -> None:
        """Fold the batch normalization ahead of a layer without padding into it, where that is exact."""
        ahead = next((value.producer for slot, value in operation.inputs if slot[0] in (0, "input")), None)
        if ahead is None or ahead.category is not Category.BATCH_NORM or Category.BATCH_NORM not in self.rules.integer:
            return
        if self.keys[ahead.key] in self.plan.folded_into or self.flow.only_user(ahead) is not operation:
            return
        if "transpose" in operation.op or _pads(operation):
            return
        fold = self._fold(operation, ahead)
        if fold is not None:
            self.plan.folds[self.keys[operation.key]] = replace(fold, groups=groups_of(operation), forward=True)
            self.plan.folded_into[self.keys[ahead.key]] = self.keys[operation.key]
            self.reasons[ahead.name] = f"folded into {name}"

    def _explain_unfolded(self, name: str, uses: list[_Use], different: int) -> None:
        """Say why a batch normalization stays."""
        why = (
            "its weight is used in several places"
            if different > 1
            else "it has no fixed statistics, no fixed weights, or works on another axis"
        )
        for _, norm, _ in uses:
            if norm is not None:
                self.reasons[f"{norm.name} (folding)"] = f"not folded into {name}: {why}"

    def _weights_of(self, operation: Operation) -> Iterator[tuple[Slot, Value]]:
        """The weights of an operation: constant arguments with at least two axes where weights stand."""
        if operation.category not in _WEIGHTED or operation.constant:
            return
        for slot, value in operation.inputs:
            if value.constant and value.floating and len(value.shape) > 1 and _holds_weight(operation, slot, value):
                yield slot, value

    def _derived_name(self, operation: Operation, slot: Slot, derived: dict[tuple[Any, ...], str]) -> str:
        """Name of a weight that is computed in the network (weight normalization, slices of a parameter)."""
        identity = (self.keys[operation.key]._replace(call=None), slot)
        if identity not in derived:
            base = f"{operation.key.path}.weight".lstrip(".")
            taken = set(derived.values()) | set(self.sites)
            names = (base if number == 0 else f"{base}.{number}" for number in range(len(taken) + 1))
            derived[identity] = next(name for name in names if name not in taken)
        return derived[identity]

    def _add_weight(self, name: str, operation: Operation, slot: Slot, value: Value) -> None:
        """Add one place of a weight's quantizer, or the reason why it has none."""
        granularity = self.rules.weights.get(operation.category, self.target.weights.granularity)
        if granularity is None:
            if name not in self.sites:
                engine = self.target.placement.value
                self.reasons[name] = f"{engine} leaves weights of this kind ({operation.category.value}) in FP32"
            return
        if name not in self.sites:
            axis = _channel_axis(operation, slot, value)
            spec = fitting_spec(self.target.weights, granularity, axis, value.shape)
            encoded = None if spec.granularity is Granularity.PER_TENSOR else axis
            self.sites[name] = Site(name, Kind.WEIGHT, spec, encoded, axis=axis)
            self.reasons.pop(name, None)
        self._put(name, Place(self.keys[operation.key], slot))

    def _explain_vectors(self, operation: Operation) -> None:
        """List the parameters that stay in FP32 by design."""
        for _, value in operation.inputs:
            if not value.name or not value.constant or not value.floating or value.name in self.sites:
                continue
            if operation.category in _WEIGHTED and len(value.shape) == 1:
                self.reasons[value.name] = "a bias: in FP32 here, int32 with the product of the scales in export"
            elif operation.category in (Category.BATCH_NORM, Category.NORM):
                self.reasons[value.name] = "a vector of a normalization: stays in FP32 or is folded"
            elif operation.category is Category.PASS_THROUGH:
                self.reasons.setdefault(
                    value.name, "a constant that is moved here: on a grid where it is computed with"
                )
            else:
                self.reasons.setdefault(value.name, f"a constant operand ({operation.category.value}): stays in FP32")

    def _batch_norm_behind(self, operation: Operation) -> Operation | None:
        """The batch normalization that alone reads the result of a convolution or linear layer."""
        if operation.category not in (Category.CONVOLUTION, Category.LINEAR):
            return None
        follower = self.flow.only_user(operation)
        return follower if follower is not None and follower.category is Category.BATCH_NORM else None

    def _fold(self, operation: Operation, norm: Operation) -> BatchNormFold | None:
        """How ``norm`` folds into ``operation``, ``None`` where that would not be exact."""
        kind = "builtin" if not hasattr(norm.key.func, "__code__") else "function"
        roles = {name: (index,) for index, name in enumerate(_BATCH_NORM_SLOTS[kind])}
        named = dict(norm.inputs)
        tensors = {role: named.get(slot) or named.get((role,)) for role, slot in roles.items()}
        statistics = (tensors["running_mean"], tensors["running_var"])
        training = norm.arguments.get("training", norm.arguments.get("5", False))
        if training or norm.op != "batch_norm" or None in statistics or operation.op not in _FOLDABLE:
            return None
        if any(value is not None and role != "input" and not value.name for role, value in tensors.items()):
            return None
        if operation.op == "linear" and len(operation.outputs[0].shape) != 2:
            return None
        names = {role: value.name if value is not None else None for role, value in tensors.items()}
        mean, variance = names["running_mean"], names["running_var"]
        assert mean is not None
        assert variance is not None
        eps = float(norm.arguments.get("eps", norm.arguments.get("7", 1e-5)))
        groups = groups_of(operation) if "transpose" in operation.op else 1
        out_axis = 1 if "transpose" in operation.op else 0
        return BatchNormFold(mean, variance, names["weight"], names["bias"], eps, out_axis, groups)

    def _put(self, name: str, spot: Place) -> None:
        """Add a place to a quantizer, once."""
        if spot not in self.sites[name].places:
            self.sites[name].places.append(spot)


def _holds_weight(operation: Operation, slot: Slot, value: Value) -> bool:
    """Whether an argument of an operation is its weight, not its bias or its initial state."""
    if operation.category is Category.CONVOLUTION or operation.op == "linear":
        return slot[0] in (1, "weight")
    if operation.category is Category.RECURRENT:
        return len(value.shape) == 2 and value.from_parameter
    return slot[0] not in ("bias", "input") or operation.category is not Category.LINEAR


def groups_of(operation: Operation) -> int:
    """The number of groups of a convolution, 1 for every other operation."""
    if not operation.op.startswith("conv"):
        return 1
    return int(operation.arguments.get("groups", operation.arguments.get("6", 1)))


def _pads(operation: Operation) -> bool:
    """Whether a convolution puts zeros around its input."""
    padding = operation.arguments.get("padding", operation.arguments.get("4", 0))
    if isinstance(padding, str):
        return padding != "valid"
    return padding != 0 and (isinstance(padding, int) or any(padding))


def _channel_axis(operation: Operation, slot: Slot, weight: Value) -> int | None:
    """The axis of a weight's output channels, ``None`` where it has no single one."""
    if operation.category is Category.MATMUL or operation.op in ("addmm", "addmv", "addbmm"):
        if len(weight.shape) != 2 or operation.op in ("einsum", "tensordot", "chain_matmul", "multi_dot"):
            return None
        right = slot[0] == (2 if operation.op in ("addmm", "addmv", "addbmm") else 1) or slot[0] in ("mat2", "other")
        return 1 if right else 0
    if "transpose" in operation.op:
        return 1 if groups_of(operation) == 1 else (0 if weight.shape[1] == 1 else None)
    return 0


def fitting_spec(spec: QuantSpec, granularity: Granularity, axis: int | None, shape: tuple[int, ...]) -> QuantSpec:
    """The spec with the finest granularity that a weight of this shape allows, none finer than asked."""
    grouped = granularity is Granularity.PER_GROUP
    fits = spec.group_size is not None and len(shape) == 2 and axis == 0 and shape[1] % spec.group_size == 0
    if grouped and not fits:
        granularity = Granularity.PER_CHANNEL
    if axis is None:
        granularity = Granularity.PER_TENSOR
    return replace(
        spec, granularity=granularity, group_size=spec.group_size if granularity is Granularity.PER_GROUP else None
    )

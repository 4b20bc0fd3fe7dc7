"""What remedies see of a network: its layers with a quantized weight, and the runs of an operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from lightning_quantdebug.interception import OpKey
from lightning_quantdebug.operations import Slot
from lightning_quantdebug.plan import BatchNormFold, Plan
from lightning_quantdebug.quantizer import Quantizer
from lightning_quantdebug.target import Kind
from lightning_quantdebug.topology import Operation, Topology
from lightning_quantdebug.weight_placement import groups_of

Visit = Callable[[Callable[[], Any], int], None]


class Runs(Protocol):
    """Goes over the calibration batches.

    ``run()`` runs the network once on a batch with the quantizers in their present modes, in eval mode without
    gradients, and returns the output. It may be called several times in one visit, so that FP32 and quantized runs of
    one batch can be compared without keeping anything.
    """

    def __call__(self, visit: Visit, most: int | None = None) -> None:
        """Call ``visit(run, index)`` for each batch, or for the first ``most`` of them; no others are loaded."""
        ...


@dataclass(frozen=True, eq=False)
class Layer:
    """One operation with a weight that has a quantizer.

    Attributes:
        key: Its identity in the plan.
        name: Its display name.
        op: Its canonical name, such as ``conv2d``.
        weight_slot: The argument that is the weight.
        quantizer: The weight's quantizer.
        shape: The weight's shape.
        channel_axis: Axis of the weight's output channels whatever its granularity; ``None``: it has no single one.
        groups: Groups of a convolution, else 1.
        fold: The batch normalization that is folded into it.
        shared: Whether its weight, or the operation itself, is used in several places.
    """

    key: OpKey
    name: str
    op: str
    weight_slot: Slot
    quantizer: Quantizer
    shape: tuple[int, ...]
    channel_axis: int | None
    groups: int
    fold: BatchNormFold | None
    shared: bool


@dataclass(frozen=True, eq=False)
class Call:
    """One run of an operation, as it really ran: weights and inputs after their quantizers and adjustments.

    Attributes:
        name: Display name of the operation.
        func: What was called.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        result: What it returned, ahead of the output's quantizer.
    """

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any


Tap = Callable[[Call], Any]
"""Called after an operation has run; what it returns takes the place of the result, unless it is ``None``."""


def find_layers(topology: Topology, plan: Plan, quantizers: dict[str, Quantizer]) -> list[Layer]:
    """Every operation with a quantized weight, in order of execution."""
    operations: dict[OpKey, Operation] = {}
    shared_keys = topology.shared_keys()
    for operation in topology:
        operations.setdefault(shared_keys[operation.key], operation)
    order = {key: index for index, key in enumerate(operations)}
    layers = []
    for site in plan.sites:
        if site.kind is not Kind.WEIGHT:
            continue
        for spot in site.places:
            operation = operations[spot.key]
            assert spot.slot is not None
            several = len(site.places) > 1 or spot.key.call is None or spot.key.occurrence is None
            layers.append(
                Layer(
                    key=spot.key,
                    name=operation.name,
                    op=operation.op,
                    weight_slot=spot.slot,
                    quantizer=quantizers[site.name],
                    shape=dict(operation.inputs)[spot.slot].shape,
                    channel_axis=site.axis,
                    groups=groups_of(operation),
                    fold=plan.folds.get(spot.key),
                    shared=several,
                )
            )
    return sorted(layers, key=lambda layer: order[layer.key])

"""What a network returns, and which axis of it holds classes.

Outputs are known by values, not by containers: dicts, tuples, dataclasses and results that the step merely reads are
all alike. Of a network that returns nothing but its loss, the output is what the loss reads. That an output is classes
is not guessed from its shape: somebody must treat it as classes, a cross-entropy, a softmax, an ``argmax`` or a metric
of classification (noted while recording, :mod:`lightning_quantdebug.recorder`).
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.interception import OpKey
from lightning_quantdebug.operations import Category
from lightning_quantdebug.topology import Operation


@dataclass(frozen=True)
class Output:
    """One result that leaves the network.

    Attributes:
        key: Identity of its operation in the plan.
        name: Display name of the operation.
        class_axis: Axis of the classes, counted from the front; ``None``: it is no set of classes.
        is_probability: Whether it holds probabilities rather than logits or log-probabilities.
    """

    key: OpKey
    name: str
    class_axis: int | None = None
    is_probability: bool = False


def network_outputs(session: Instrumentation) -> list[Output]:
    """The results that leave the network, in order of execution.

    Args:
        session: A captured instrumentation.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_quantdebug.instrument import instrument
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Softmax(dim=1)).eval()
        >>> with instrument(model, torch.randn(2, 4)) as q:
        ...     [(output.name, output.class_axis, output.is_probability) for output in network_outputs(q)]
        [('1', 1, True)]
    """
    shared = session.topology.shared_keys()
    names = {key: name for name, key in session.keys_by_name.items()}
    found: dict[OpKey, Output] = {}
    for operation in session.topology.output_operations():
        source = _ahead_of_loss(operation)
        if source is None:
            continue
        key = shared[source.key]
        axis, is_probability = _classes(source)
        known = found.get(key)
        if known is None or known.class_axis is None:
            found[key] = Output(key, names[key], axis, is_probability)
    return list(found.values())


def _ahead_of_loss(operation: Operation) -> Operation | None:
    """The operation itself, or the one whose result a loss reads first."""
    if operation.category is not Category.LOSS:
        return operation
    return next((value.producer for _, value in operation.data_inputs if value.producer is not None), None)


def _classes(operation: Operation) -> tuple[int | None, bool]:
    """Axis of the classes in an operation's result, and whether they are probabilities."""
    value = next((value for value in operation.outputs if value.floating), None)
    if value is None:
        return None, False
    noted = value.class_axis
    if operation.op not in ("softmax", "log_softmax"):
        return noted, False
    axis = operation.arguments.get("dim", operation.arguments.get("1", -1)) % len(value.shape)
    return axis if noted is None else noted, operation.op == "softmax" and noted in (None, axis)

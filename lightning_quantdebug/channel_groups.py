"""Channels that can be scaled without changing what the network computes, found by running it.

A *class* is a set of channels that must share one positive scale ``s``: all layers of a residual stage, the parts of a
concatenation, V and what attention makes of it. Dividing by ``s`` the rows and biases of every layer that produces
channels of the class, and multiplying by ``s`` the columns of every layer that consumes them, leaves the network's
function as it is (Nagel et al. 2019, arXiv:1906.04721, section 4.1.1, there for two layers with a ReLU between).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_quantdebug.adjustment import Adjustment
from lightning_quantdebug.channel_classes import PINNED, ChannelClasses, each_once
from lightning_quantdebug.channel_tracer import ChannelTracer, Traced
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.interception import OpKey
from lightning_quantdebug.layers import Layer, Runs
from lightning_quantdebug.operations import positions_of

FIXED = -1
"""Stands for a channel that is in no class: its scale is 1."""

_SCALABLE = frozenset(f"{name}{axes}d" for name in ("conv", "conv_transpose") for axes in (1, 2, 3)) | {"linear"}
# Two batches catch shapes that differ; a network whose operations differ from batch to batch is traced on all of them.
_BATCHES = 2


@dataclass(frozen=True, eq=False)
class LayerChannels:
    """The classes of one layer's channels.

    Attributes:
        layer: The layer.
        rows: Class of each output channel, ``(C_out,)``, or :data:`FIXED`.
        columns: Class of each input channel, ``(C_in,)``, or :data:`FIXED`.
    """

    layer: Layer
    rows: Tensor
    columns: Tensor

    def row_scale(self, scale: Tensor) -> Tensor:
        """The scale that each output channel is divided by, ``(C_out,)``."""
        return _scale_of(self.rows, scale)

    def column_scale(self, scale: Tensor) -> Tensor:
        """The scale that each input channel is multiplied by, ``(C_in,)``."""
        return _scale_of(self.columns, scale)

    def weight_scale(self, scale: Tensor) -> Tensor:
        """What the weight is multiplied by, ``(C_out, C_in / groups)``, transposed ``(C_in, C_out / groups)``."""
        rows, columns = 1 / self.row_scale(scale), self.column_scale(scale)
        groups = self.layer.groups
        outer, inner = (columns, rows) if self.is_transposed else (rows, columns)
        spread = inner.view(groups, 1, -1).expand(-1, len(outer) // groups, -1)
        return outer[:, None] * spread.reshape(len(outer), -1)

    def row_ranges(self, magnitudes: Tensor) -> Tensor:
        """Largest magnitude of each output channel, ``(C_out,)``, of those of :func:`magnitudes_of`."""
        return self._inner(magnitudes) if self.is_transposed else magnitudes.amax(1)

    def column_ranges(self, magnitudes: Tensor) -> Tensor:
        """Largest magnitude of each input channel, ``(C_in,)``, of those of :func:`magnitudes_of`."""
        return magnitudes.amax(1) if self.is_transposed else self._inner(magnitudes)

    def _inner(self, magnitudes: Tensor) -> Tensor:
        """Largest magnitude of each channel of the weight's second axis, over all groups."""
        return magnitudes.view(self.layer.groups, -1, magnitudes.shape[1]).amax(1).flatten()

    @property
    def is_transposed(self) -> bool:
        """Whether the weight's first axis is that of the input channels."""
        return "transpose" in self.layer.op


def magnitudes_of(weight: Tensor) -> Tensor:
    """Largest magnitude of each kernel of a weight, in float64: the first two axes of the weight.

    Examples:
        >>> magnitudes_of(torch.tensor([[[1.0, -2.0], [0.5, 0.0]]]))
        tensor([[2.0000, 0.5000]], dtype=torch.float64)
    """
    return weight.detach().double().cpu().abs().reshape(*weight.shape[:2], -1).amax(2)


@dataclass(frozen=True, eq=False)
class ChannelGroups:
    """What can be scaled in a network.

    Attributes:
        count: Number of classes.
        layers: The layers that produce or consume channels of a class, in order of execution.
        parameters: For each normalization, sum and product with a vector to scale, the class of each element.
        clipped: For each clipped activation whose bounds are to be scaled, the class of each element.
        stages: The stage of each class, ``(count,)``, in order of execution: classes of which one operation produces,
            consumes or clips channels are in one stage.
        has_bias: The operations of ``parameters`` that have a bias to scale as well.
        stuck: Why no constant can be taken out of a class, ``""`` where one can; by class.
        left: Layers of which no channel is in a class, with the reason.
    """

    count: int
    layers: tuple[LayerChannels, ...]
    parameters: Mapping[OpKey, Tensor]
    clipped: Mapping[OpKey, Tensor]
    stages: Tensor
    has_bias: frozenset[OpKey]
    stuck: tuple[str, ...]
    left: tuple[tuple[str, str], ...]

    def adjustments(self, scale: Tensor) -> dict[OpKey, Adjustment]:
        """The adjustments that give each class its scale.

        Args:
            scale: ``(count,)``, positive, float64.
        """
        changes: dict[OpKey, Adjustment] = {}
        for found in self.layers:
            factor = found.weight_scale(scale)
            if bool((factor != 1).any()):
                ones = (1,) * positions_of(found.layer.op)
                bias_scale = 1 / found.row_scale(scale)
                changes[found.layer.key] = Adjustment(
                    weight_scale=factor.float().reshape(*factor.shape, *ones), bias_scale=bias_scale.float()
                )
        for key, classes in self.parameters.items():
            factor = (1 / _scale_of(classes, scale)).float()
            if bool((factor != 1).any()):
                changes[key] = Adjustment(weight_scale=factor, bias_scale=factor if key in self.has_bias else None)
        for key, classes in self.clipped.items():
            factor = (1 / _scale_of(classes, scale)).float()
            if bool((factor != 1).any()):
                changes[key] = Adjustment(bounds_scale=factor)
        return changes

    def names_of(self, changes: Mapping[OpKey, Adjustment]) -> tuple[str, ...]:
        """Names of the layers among some operations, in order of execution."""
        return tuple(found.layer.name for found in self.layers if found.layer.key in changes)

    @property
    def stage_count(self) -> int:
        """Number of stages."""
        return int(self.stages.max()) + 1 if self.count else 0


def find_channel_groups(session: Instrumentation, runs: Runs) -> ChannelGroups:
    """Run the network on some calibration batches and find what can be scaled.

    Args:
        session: The instrumented network.
        runs: Goes over the calibration batches.

    Examples:
        >>> from lightning_quantdebug.instrument import batch_runs, instrument
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> batch = torch.randn(16, 4)
        >>> with instrument(model, batch) as q:
        ...     groups = find_channel_groups(q, batch_runs(q, [batch]))
        >>> groups.count, [(each.layer.name, int(each.rows.max()), int(each.columns.max())) for each in groups.layers]
        (8, [('0', 7, -1), ('2', -1, 7)])
    """
    layers, fixed = _scalable_layers(session)
    tracer = ChannelTracer(session.root, session.plan, layers, fixed, session.scope)

    def visit(run: Any, index: int) -> None:
        with session.watched_by(tracer):
            tracer.begin()
            tracer.returned(run())

    runs(visit, session.topology.batches_to_reach_all(_BATCHES))
    return _groups(session, layers, fixed, tracer.classes, tracer.traced)


def effective_weights(session: Instrumentation, runs: Runs) -> dict[OpKey, tuple[Tensor, Tensor | None]]:
    """FP32 weight and bias of every layer that the calibration batches reach, after folding and adjusting."""
    found: dict[OpKey, tuple[Tensor, Tensor | None]] = {}

    def visit(run: Any, index: int) -> None:
        found.update(session.effective_weights(run))

    runs(visit, session.topology.batches_to_reach_all())
    return found


def _scalable_layers(session: Instrumentation) -> tuple[dict[OpKey, Layer], dict[OpKey, str]]:
    """The layers whose rows and columns may be scaled, and why others may not."""
    layers: dict[OpKey, Layer] = {}
    fixed: dict[OpKey, str] = {}
    seen: set[OpKey] = set()
    for layer in session.layers:
        adjustment = session.adjustments.get(layer.key)
        if layer.op not in _SCALABLE or layer.key in seen:
            fixed[layer.key] = f"the weight of {layer.op} can not be scaled channel by channel"
        elif layer.shared:
            fixed[layer.key] = "its weight is used in several places"
        elif layer.quantizer.frozen or (adjustment is not None and adjustment.rounded):
            fixed[layer.key] = "the rounding of its weight was learned"
        else:
            layers[layer.key] = layer
        seen.add(layer.key)
    return {key: layer for key, layer in layers.items() if key not in fixed}, fixed


def _groups(
    session: Instrumentation,
    layers: Mapping[OpKey, Layer],
    fixed: Mapping[OpKey, str],
    classes: ChannelClasses,
    traced: Traced,
) -> ChannelGroups:
    """What was traced, with classes numbered from 0 and only those that a layer consumes."""
    read = _labels_of(classes, traced.consumed.values())
    kept = read[read > PINNED]
    index = torch.full((len(classes.labels),), FIXED)
    index[kept] = torch.arange(len(kept))

    def numbered(numbers: Tensor) -> Tensor:
        return index[classes.labels[numbers]]

    found, left = [], []
    for key, layer in layers.items():
        if key not in traced.produced:
            left.append((layer.name, "no calibration batch reached it"))
            continue
        rows, columns = numbered(traced.produced[key]), numbered(traced.consumed[key])
        if bool((rows != FIXED).any() | (columns != FIXED).any()):
            found.append(LayerChannels(layer, rows, columns))
        else:
            why = classes.reason(traced.produced[key]) or "no layer that can be scaled reads its output"
            left.append((layer.name, why))
    names = {layer.key: layer.name for layer in session.layers}
    left += [(names[key], why) for key, why in fixed.items()]
    stuck = tuple(classes.marks(kept))
    parameters = {key: part for key, n in traced.parameters.items() if (part := numbered(n)).ge(0).any()}
    clipped = {key: part for key, n in traced.clipped.items() if (part := numbered(n)).ge(0).any()}
    sides = [side for each in found for side in (each.rows, each.columns)]
    return ChannelGroups(
        count=len(kept),
        layers=tuple(found),
        parameters=parameters,
        clipped=clipped,
        stages=_stages(len(kept), [*sides, *parameters.values(), *clipped.values()]),
        has_bias=frozenset(traced.has_bias),
        stuck=stuck,
        left=tuple(left),
    )


def _stages(count: int, sides: list[Tensor]) -> Tensor:
    """The number of the stage of each class, ``(count,)``: all classes on one side of an operation are in one."""
    classes = ChannelClasses()
    numbers = classes.fresh(count)
    for side in sides:
        present = numbers[side[side != FIXED]]
        if present.numel():
            classes.unify(present, present[:1].expand_as(present))
    labels = classes.labels[numbers]
    return torch.searchsorted(each_once(labels), labels)


def _labels_of(classes: ChannelClasses, numbers: Any) -> Tensor:
    """The sets of all channels in some tables, each once."""
    parts = [classes.labels[part.reshape(-1)] for part in numbers]
    return each_once(torch.cat([*parts, torch.empty(0, dtype=torch.int64)]))


def _scale_of(classes: Tensor, scale: Tensor) -> Tensor:
    """The scale of each of some channels, 1 where they are in no class; of the shape of ``classes``."""
    return torch.cat([scale, scale.new_ones(1)])[classes]

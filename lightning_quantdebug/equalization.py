"""Cross-layer equalization: even out the ranges of a weight's channels by moving scales between layers.

Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and Bias Correction" (arXiv:1906.04721), sections
4.1.1 and 4.1.2 and appendix A. Where the output of one layer, through a positively homogeneous activation, is the input
of another, channel ``i`` can be divided by ``s_i`` in the first and multiplied by ``s_i`` in the second. With ``r1_i``
the range of row ``i`` of the first weight and ``r2_i`` that of column ``i`` of the second, both are even for
``s_i = sqrt(r1_i / r2_i)`` (equation 11: ``s_i = sqrt(r1_i * r2_i) / r2_i``), as then
``r1_i / s_i = r2_i * s_i = sqrt(r1_i * r2_i)``.

Here a class of channels (:mod:`.channel_groups`) may have several layers on either side: the mean of ``log r`` over
the rows that produce it and over the columns that consume it takes the place of ``log r1`` and ``log r2``. Layers that
are on both sides of something, as a depthwise convolution between two others, couple the classes; they are solved one
stage after the other until nothing moves. For three layers in a row that is ``r1 = r2 = r3 = (r1 r2 r3)^(1/3)``.

All of that is up to one common factor of each stage, which does nothing to the quantization of any weight. It is chosen
so that the geometric mean of ``s`` over a stage is 1 and activations stay as large as they were; to even out whole
layers as well, as the formulas would, takes sweeps in proportion to the square of the depth. Where some channels of a
weight are fixed, such as those of Q and K in the packed weight of an attention, the factor does matter: the widest
channel that can be scaled becomes as wide as the widest that can not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_quantdebug.adjustment import Applied
from lightning_quantdebug.channel_groups import (
    FIXED,
    ChannelGroups,
    LayerChannels,
    effective_weights,
    find_channel_groups,
    magnitudes_of,
)
from lightning_quantdebug.function_check import adjust_exactly
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.interception import OpKey
from lightning_quantdebug.layers import Runs

# Scales are known to 0.07 %: a range that is off by that moves no weight by a hundredth of a step at 8 bits.
_TOLERANCE = 1e-3
# The 53 convolutions of a MobileNetV2 take 21 sweeps, with factors of 10^-1.5 to 10^1.5 planted in every channel 19.
_MOST_SWEEPS = 100
# s = 2^12 balances ranges that differ by 2^24, the precision of float32: a channel beyond that is as good as dead.
LARGEST_LOG2_SCALE = 12.0


def equalize(session: Instrumentation, runs: Runs) -> Applied:
    """Equalize the weights of every class of channels that has quantized weights on both sides.

    The FP32 outputs are measured before and after; if they part, nothing is changed (see
    :func:`~lightning_quantdebug.function_check.adjust_exactly`).

    Args:
        session: The instrumented network; calibrated.
        runs: Goes over the calibration batches.

    Returns:
        The layers that were scaled, those that could not be and why, and how far scales reached.

    Examples:
        >>> from lightning_quantdebug.instrument import batch_runs, instrument
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> batch = torch.randn(16, 4)
        >>> with instrument(model, batch) as q:
        ...     q.calibrate([batch])
        ...     equalize(q, batch_runs(q, [batch])).changed
        ('0', '2')
    """
    groups = find_channel_groups(session, runs)
    weights = effective_weights(session, runs)
    magnitudes = {found.layer.key: magnitudes_of(weights[found.layer.key][0]) for found in groups.layers}
    solution = equalizing_scales(groups, magnitudes)
    scale = torch.where(solution.log2.abs() > _TOLERANCE, solution.log2, 0.0).exp2()
    changes = groups.adjustments(scale)
    if not changes:
        return Applied(skipped=groups.left, note=_nothing_to_do(groups))
    changed = groups.names_of(changes)
    moved = int((scale != 1).sum())
    note = (
        f"{moved} of {groups.count} classes of channels in {len(changed)} layers were scaled, by factors of up to "
        f"{float(solution.log2.abs().max().exp2()):.3g}, in {solution.sweeps} sweeps"
    )
    return adjust_exactly(session, runs, changes, "cross-layer equalization", Applied(changed, groups.left, note))


@dataclass(frozen=True, eq=False)
class Scales:
    """The scales that even out ranges.

    Attributes:
        log2: ``log2 s`` of each class, float64, ``(count,)``.
        sweeps: How often all stages were gone over.
    """

    log2: Tensor
    sweeps: int


def equalizing_scales(groups: ChannelGroups, magnitudes: Mapping[OpKey, Tensor]) -> Scales:
    """The scales of Nagel et al. 2019, equation 11, generalized to classes, iterated until they stand still.

    A class with ranges of 0 only, or with one that is not finite, on either side keeps ``s = 1``; so does one without
    a quantized weight on either side. Scales stay within ``2^-12`` and ``2^12``.

    Args:
        groups: What can be scaled.
        magnitudes: For each layer :func:`~lightning_quantdebug.channel_groups.magnitudes_of` its weight.

    Examples:
        >>> from lightning_quantdebug.instrument import batch_runs, instrument
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.ReLU(), torch.nn.Linear(2, 1)).eval()
        >>> batch = torch.randn(16, 1)
        >>> with instrument(model, batch) as q:
        ...     groups = find_channel_groups(q, batch_runs(q, [batch]))
        >>> weights = torch.tensor([[16.0], [1.0]]), torch.tensor([[1.0, 1.0]])  # s = 4 and 1, over their mean 2
        >>> layers = [each.layer.key for each in groups.layers]
        >>> equalizing_scales(groups, {key: magnitudes_of(w) for key, w in zip(layers, weights)}).log2.exp2()
        tensor([2.0000, 0.5000], dtype=torch.float64)
    """
    log2 = torch.zeros(groups.count, dtype=torch.float64)
    if groups.count == 0:
        return Scales(log2, 0)
    stages = [_Stage(groups, magnitudes, stage) for stage in range(groups.stage_count)]
    moving = set(range(len(stages)))
    sweeps = 0
    while moving and sweeps < _MOST_SWEEPS:
        sweeps += 1
        for index in sorted(moving):
            moving.discard(index)
            step = stages[index].step(log2)
            log2 += step
            if float(step.abs().max()) > _TOLERANCE:
                moving |= {other for other, stage in enumerate(stages) if stage.shares_layers_with(stages[index])}
    return Scales(log2, sweeps)


class _Stage:
    """The classes that the same layers produce and consume."""

    def __init__(self, groups: ChannelGroups, magnitudes: Mapping[OpKey, Tensor], number: int) -> None:
        """Find the layers on each side."""
        self.inside = groups.stages == number
        self.writing = [found for found in groups.layers if self._has(found.rows)]
        self.reading = [found for found in groups.layers if self._has(found.columns)]
        self._magnitudes = magnitudes
        # A layer that reads and writes the same stage, as in x + conv(x), would overshoot. With whole steps a stage of
        # 4 such layers was measured to take 37 sweeps, one of 16 more than 100; with half steps they take 5 and 4.
        self._damping = 0.5 if set(map(id, self.writing)) & set(map(id, self.reading)) else 1.0

    def _has(self, side: Tensor) -> bool:
        """Whether a side of a layer has channels of this stage."""
        return bool(self.inside[side[side != FIXED]].any())

    def shares_layers_with(self, other: _Stage) -> bool:
        """Whether scales of the other stage change ranges in this one."""
        layers = {id(found) for found in (*other.writing, *other.reading)}
        return any(id(found) in layers for found in (*self.writing, *self.reading))

    def step(self, log2: Tensor) -> Tensor:
        """How far ``log2 s`` of each class is from even ranges, 0 outside the stage, ``(count,)``."""
        rows = [(found.rows, found.row_ranges(self._scaled(found, log2)).log2()) for found in self.writing]
        columns = [(found.columns, found.column_ranges(self._scaled(found, log2)).log2()) for found in self.reading]
        step = (_mean_of_classes(log2, rows) - _mean_of_classes(log2, columns)) / 2
        movable = step.isfinite()
        step = torch.where(movable, step, 0.0)
        above, below = _excess(step, rows, -1), _excess(step, columns, 1)
        if (above is None) == (below is None):
            common = -float((log2 + step)[movable].mean()) if bool(movable.any()) else 0.0
        else:
            common = above if above is not None else -below if below is not None else 0.0
        step = torch.where(movable, step + common, 0.0)
        moved = log2 + step * self._damping
        return moved.clamp(-LARGEST_LOG2_SCALE, LARGEST_LOG2_SCALE) - log2

    def _scaled(self, found: LayerChannels, log2: Tensor) -> Tensor:
        """The magnitudes of a layer's weight with the scales of now."""
        return self._magnitudes[found.layer.key] * found.weight_scale(log2.exp2())


def _mean_of_classes(like: Tensor, sides: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Mean of ``log2 range`` of each class over some channels; ranges of 0 do not count.

    Args:
        like: ``(count,)``, float64.
        sides: Pairs of the class and the ``log2 range`` of channels, both ``(C,)``.

    Returns:
        ``(count,)``; not finite where there is no channel with a range, or one without a finite range.
    """
    total, number = torch.zeros_like(like), torch.zeros_like(like)
    for classes, ranges in sides:
        counts = (classes != FIXED) & (ranges != -torch.inf)
        total.scatter_add_(0, classes[counts], ranges[counts])
        number.scatter_add_(0, classes[counts], torch.ones_like(ranges[counts]))
    return total / number


def _excess(step: Tensor, sides: list[tuple[Tensor, Tensor]], sign: int) -> float | None:
    """How much wider, in ``log2``, the widest scaled channels will be than the widest fixed ones beside them.

    Args:
        step: What is about to be added to ``log2 s`` of each class, ``(count,)``.
        sides: Pairs of the class and the ``log2 range`` of channels, both ``(C,)``.
        sign: 1 for columns, which grow with ``s``, -1 for rows.

    Returns:
        The mean over layers, ``None`` if no layer has fixed channels.
    """
    found = []
    for classes, ranges in sides:
        fixed = ranges[(classes == FIXED) & ranges.isfinite()]
        free = (classes != FIXED) & ranges.isfinite()
        if fixed.numel() and bool(free.any()):
            found.append(float((ranges[free] + sign * step[classes[free]]).max() - fixed.max()))
    return sum(found) / len(found) if found else None


def _nothing_to_do(groups: ChannelGroups) -> str:
    """Why nothing was scaled."""
    if groups.count == 0:
        return "no channels were found whose scale can change without changing the function"
    return f"the ranges of all {groups.count} classes of channels are even already, or have no weight on one side"

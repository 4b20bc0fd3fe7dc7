"""High-bias absorption: move what every sample has in common from one layer's output into the next layer's bias.

Nagel et al. 2019 (arXiv:1906.04721), section 4.1.3. Equalization can leave channels with large biases and so with large
activations. Where a channel's pre-activation is never less than ``c >= 0``, a ReLU passes the constant on,
``relu(W1 x + b1 - c) = relu(W1 x + b1) - c``, so that ``b1' = b1 - c`` and ``b2' = b2 + W2 c``, with ``W2`` summed over
the kernel, leave the function as it is and the activation's range smaller by ``c``.

The paper takes ``c = max(0, beta - 3 * |gamma|)`` from the batch normalization, which is wrong for 0.13 % of Gaussian
values and for kernels that see padding. Here ``c`` is at most the mean less three standard deviations of what
calibration saw, at most the least value that it saw and, where a batch normalization is folded in, at most what the
paper takes; channels that padding, a sum, a clip or anything else stops are left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lightning_quantdebug.adjustment import Adjustment, Applied
from lightning_quantdebug.channel_classes import each_once
from lightning_quantdebug.channel_groups import (
    FIXED,
    ChannelGroups,
    LayerChannels,
    effective_weights,
    find_channel_groups,
)
from lightning_quantdebug.distribution import ChannelStatistics
from lightning_quantdebug.function_check import adjust_exactly
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.interception import OpKey
from lightning_quantdebug.layers import Layer, Runs, Tap
from lightning_quantdebug.operations import positions_of

# Of a Gaussian 0.13 % lie below its mean less three standard deviations (Nagel et al. 2019, section 4.1.3).
_DEVIATIONS = 3.0


def absorb_high_bias(session: Instrumentation, runs: Runs) -> Applied:
    """Absorb high biases wherever that is exact on everything that calibration sees.

    The FP32 outputs are measured before and after; if they part, nothing is changed (see
    :func:`~lightning_quantdebug.function_check.adjust_exactly`).

    Args:
        session: The instrumented network; calibrated.
        runs: Goes over the calibration batches.

    Returns:
        The layers whose bias was reduced or took the rest in, and why others were left alone.

    Examples:
        >>> from lightning_quantdebug.instrument import batch_runs, instrument
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
        >>> _ = torch.nn.init.constant_(model[0].bias, 50.0)
        >>> batch = torch.randn(16, 4)
        >>> with instrument(model, batch) as q:
        ...     q.calibrate([batch])
        ...     absorb_high_bias(q, batch_runs(q, [batch])).changed
        ('0', '2')
    """
    groups = find_channel_groups(session, runs)
    candidates, why = _single_producers(groups)
    floors = _floors(session, runs, [found.layer for found in candidates])
    absorbed = torch.zeros(groups.count)
    for found in candidates:
        constant = _constants(session, found, floors[found.layer.key])
        free = found.rows != FIXED
        absorbed[found.rows[free]] = constant[free]
    absorbed[torch.tensor([bool(reason) for reason in why], dtype=torch.bool)] = 0.0
    changes = _changes(groups, absorbed, effective_weights(session, runs))
    skipped = _skipped(groups, why)
    if not changes:
        return Applied(skipped=skipped, note="no channel has a bias that could be absorbed")
    changed = groups.names_of(changes)
    note = f"{int((absorbed > 0).sum())} channels gave up to {float(absorbed.max()):.3g} of their bias"
    return adjust_exactly(session, runs, changes, "high-bias absorption", Applied(changed, skipped, note))


def _single_producers(groups: ChannelGroups) -> tuple[list[LayerChannels], list[str]]:
    """The layers that produce channels, and for each class why nothing can be absorbed from it, or ``""``."""
    rows = torch.cat([*(found.rows for found in groups.layers), torch.empty(0, dtype=torch.int64)])
    number = torch.bincount(rows[rows != FIXED], minlength=groups.count)
    alone = (number == 1).tolist()
    why = [
        stuck or ("" if one else "not one layer alone makes it") for stuck, one in zip(groups.stuck, alone, strict=True)
    ]
    return [found for found in groups.layers if bool((found.rows != FIXED).any())], why


def _floors(session: Instrumentation, runs: Runs, layers: list[Layer]) -> dict[OpKey, Tensor]:
    """What hardly any FP32 output is below, the mean less three standard deviations, and none that was seen.

    By layer, for each output channel, ``(C_out,)``; NaN for all of them where a value was NaN or infinite.
    """
    seen = {layer.key: ChannelStatistics(-1 - positions_of(layer.op)) for layer in layers}

    def tap_of(statistics: ChannelStatistics) -> Tap:
        return lambda call: statistics.observe(call.result)

    def visit(run: Callable[[], Any], index: int) -> None:
        run()

    with session.reference(), session.tapped({key: tap_of(statistics) for key, statistics in seen.items()}):
        runs(visit)
    return {key: _floor(statistics) for key, statistics in seen.items()}


def _floor(seen: ChannelStatistics) -> Tensor:
    """The floor of one layer's channels."""
    floor = torch.minimum(seen.range_min, seen.mean - _DEVIATIONS * seen.variance.sqrt()).float()
    return floor.where(seen.non_finite == 0, torch.nan).cpu()


def _constants(session: Instrumentation, found: LayerChannels, floor: Tensor) -> Tensor:
    """What can be taken out of each output channel of a layer, ``(C_out,)``; NaN, seen or computed, gives 0."""
    constant, fold = floor, found.layer.fold
    adjustment = session.adjustments.get(found.layer.key, Adjustment())
    if fold is not None and not fold.forward:
        if adjustment.bias_offset is not None:
            # What was absorbed and what was taken in can not be told apart: the normalization says nothing any more.
            return torch.zeros_like(floor)
        scale = torch.ones(()) if adjustment.bias_scale is None else adjustment.bias_scale.cpu()
        beta = torch.zeros(()) if fold.bias is None else session.tensors[fold.bias].cpu().float()
        gamma = torch.ones(()) if fold.weight is None else session.tensors[fold.weight].cpu().float()
        constant = torch.minimum(constant, (beta - _DEVIATIONS * gamma.abs()) * scale)
    return constant.clamp(min=0.0).nan_to_num(nan=0.0, posinf=0.0)


def _changes(
    groups: ChannelGroups, absorbed: Tensor, weights: dict[OpKey, tuple[Tensor, Tensor | None]]
) -> dict[OpKey, Adjustment]:
    """The biases that give up and take in what is absorbed from each class, ``(count,)``."""
    of_class = torch.cat([absorbed, torch.zeros(1)])
    changes = {}
    for found in groups.layers:
        given, taken = of_class[found.rows], of_class[found.columns]
        if not bool((given > 0).any() | (taken > 0).any()):
            continue
        weight = weights[found.layer.key][0]
        offset = -given.double()
        if bool((taken > 0).any()):
            offset = offset + _through(weight, taken, found.layer.groups)
        changes[found.layer.key] = Adjustment(bias_offset=offset.to(weight.device, weight.dtype))
    return changes


def _through(weight: Tensor, constant: Tensor, groups: int) -> Tensor:
    """What a layer makes of constant input channels, ``W2 c`` summed over the kernel, float64, ``(C_out,)``.

    Args:
        weight: ``(C_out, C_in / groups, *)``.
        constant: ``(C_in,)``.
        groups: Groups of the layer.
    """
    sums = weight.detach().double().cpu().flatten(2).sum(2) if weight.ndim > 2 else weight.detach().double().cpu()
    per_group = constant.double().view(groups, 1, -1).expand(-1, len(sums) // groups, -1)
    return (sums * per_group.reshape(sums.shape)).sum(1)


def _skipped(groups: ChannelGroups, why: list[str]) -> tuple[tuple[str, str], ...]:
    """Layers none of whose channels can give up a constant, with the reason of the first."""
    found = []
    for each in groups.layers:
        reasons = [why[number] for number in each_once(each.rows[each.rows != FIXED]).tolist()]
        if reasons and all(reasons):
            found.append((each.layer.name, reasons[0]))
    return (*groups.left, *found)

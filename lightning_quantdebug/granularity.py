"""Smaller granularity of weights: one encoding for each output channel, or for each group of inputs of a channel.

Per channel, a layer whose channels differ in range no longer rounds the small ones away (Krishnamoorthi 2018, section
3.1.3; Nagel et al. 2021, section 2.4.2). Per group, each channel of a linear layer is cut along its inputs (Shen et al.
2020, Q-BERT, section 3.3). Both cost scales, and need an engine with kernels for them: what the target and its table of
placement rules do not allow is left alone.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from lightning_quantdebug.adjustment import Applied
from lightning_quantdebug.function_check import reset_weight_ranges
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.layers import Layer, Runs
from lightning_quantdebug.operations import CATEGORY_OF
from lightning_quantdebug.placement_rules import RULES
from lightning_quantdebug.target import Granularity, QuantSpec
from lightning_quantdebug.weight_placement import fitting_spec

GROUP_SIZE = 32
"""Inputs that share a scale. Kernels for 4-bit weights take 16, 32, 64 or 128; 32 costs half a bit per weight."""


def refine(
    session: Instrumentation, runs: Runs, granularity: Granularity, names: Collection[str] | None = None
) -> Applied:
    """Quantize weights per channel or per group.

    Args:
        session: A calibrated instrumentation; its specs and weight ranges change, nothing else.
        runs: Goes over the calibration batches, so that the ranges can be set.
        granularity: ``PER_CHANNEL``, or ``PER_GROUP`` for linear layers whose inputs :data:`GROUP_SIZE` divides.
        names: Which quantizers; ``None``: those of all weights.

    Returns:
        The quantizers that were refined, and for the others the reason.
    """
    if not session.target.allows(granularity):
        finest = session.target.effective_finest_granularity.value
        reason = f"the target allows no finer granularity than {finest}; set `finest_granularity` if your engine does"
        return Applied(skipped=((session.target.name, reason),))
    changed, skipped = [], []
    for layer in session.layers:
        name = layer.quantizer.name
        if name in changed or (names is not None and name not in names):
            continue
        spec = _refined(session, layer, granularity)
        if isinstance(spec, str):
            skipped.append((name, spec))
            continue
        layer.quantizer.respecify(spec, layer.channel_axis)
        changed.append(name)
    if changed:
        reset_weight_ranges(session, runs)
    note = f"{len(changed)} weights {granularity.value.replace('_', ' ')}"
    return Applied(tuple(changed), tuple(skipped), note if changed else "")


def _refined(session: Instrumentation, layer: Layer, granularity: Granularity) -> QuantSpec | str:
    """The finer spec of one weight, or why it stays as it is."""
    order = list(Granularity)
    spec = layer.quantizer.spec
    ruled = RULES[session.target.placement].weights.get(CATEGORY_OF[layer.op])
    if order.index(spec.granularity) >= order.index(granularity):
        return f"is {spec.granularity.value} already"
    if layer.quantizer.frozen:
        return "its rounding was learned for the encoding that it has"
    if ruled is not None and order.index(ruled) < order.index(granularity):
        return f"{session.target.placement.value} quantizes weights of this kind {ruled.value}"
    asked = replace(
        spec, granularity=granularity, group_size=GROUP_SIZE if granularity is Granularity.PER_GROUP else None
    )
    found = fitting_spec(asked, granularity, layer.channel_axis, layer.shape)
    if found.granularity is not granularity:
        return f"its shape {layer.shape} can not be quantized {granularity.value}"
    return found

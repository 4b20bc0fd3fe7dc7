"""AdaRound on a network: layer after layer learns to round its weight so that its output stays what it was in FP32.

Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", section 3.4. Layers are taken in
order of execution. Each is learned on inputs as they are in the network quantized so far, activations included and all
earlier layers with their learned rounding, and on the outputs that the FP32 network has for the same samples
(asymmetric reconstruction), so that a layer also makes up for errors ahead of it. The clipping activation (ReLU, ReLU6,
hardtanh, clamp) that alone reads a layer's output counts as part of it. The arithmetic and what it was measured to
need are in :mod:`lightning_quantdebug.learned_rounding`.

A layer keeps nearest rounding unless its error falls on samples that were held out. What is learned lies in the session
as a correction of the weight that puts it on its grid, whose encoding is then frozen; the model is not touched.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lightning_quantdebug.adjustment import Adjustment, Applied
from lightning_quantdebug.dataflow import Flow
from lightning_quantdebug.encoding import Encoding
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.interception import OpKey
from lightning_quantdebug.layer_patches import LayerArguments, from_rows, layer_arguments, to_rows
from lightning_quantdebug.layer_samples import LayerSampler, Samples
from lightning_quantdebug.layers import Call, Layer, Runs
from lightning_quantdebug.learned_rounding import AdaRoundSettings, RoundingProblem, learn_rounding
from lightning_quantdebug.operations import CATEGORY_OF, Category, clip_bounds, value_at
from lightning_quantdebug.placement_rules import RULES
from lightning_quantdebug.target import Granularity
from lightning_quantdebug.topology import Operation

_TOO_LATE = "time budget: the time was over before its rounding was learned"


@dataclass(frozen=True, eq=False)
class _Observed:
    """What a layer was seen to do: its FP32 weight with the bias it has quantized, and its samples."""

    arguments: LayerArguments
    training: Samples
    held_out: Samples


@dataclass(frozen=True)
class _Outcome:
    """What became of a layer: the reason why it was left alone, or its error in that of nearest rounding."""

    reason: str = ""
    ratio: float = math.nan
    late: bool = False


def adaround(
    session: Instrumentation,
    runs: Runs,
    settings: AdaRoundSettings | None = None,
    is_late: Callable[[], bool] = lambda: False,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> Applied:
    """Learn the rounding of every layer's weight.

    Args:
        session: A calibrated network. It receives the learned weights; their encodings are frozen.
        runs: Calibration data. It is gone over once for each layer, up to that layer, in FP32 and quantized.
        settings: How; ``None`` for the defaults.
        is_late: Asked between layers and while one is learned; once it is true, all that is left stays as it is.
        advance: Called after each layer with the number of layers that are done and that of all.

    Returns:
        The layers whose rounding was learned, and why others were left alone.

    Source: Nagel et al. 2020, sections 3.3 and 3.4.

    Examples:
        >>> from lightning_quantdebug.instrument import batch_runs, instrument
        >>> _ = torch.manual_seed(0)
        >>> model, batch = torch.nn.Linear(16, 4), torch.randn(64, 2) @ torch.randn(2, 16)
        >>> with instrument(model, batch, "w3a8") as session:
        ...     session.calibrate([batch])
        ...     adaround(session, batch_runs(session, [batch]), AdaRoundSettings(iterations=200)).changed
        ('linear',)
    """
    settings = settings if settings is not None else AdaRoundSettings()
    layers = session.layers
    outcomes: dict[str, _Outcome] = {}
    late = False
    for done, layer in enumerate(layers, 1):
        late = late or is_late()
        reason = _reason_to_skip(session, layer) or (_TOO_LATE if late else "")
        outcome = _Outcome(reason) if reason else _learn_layer(session, runs, layer, settings, is_late)
        outcomes[layer.name] = outcome
        late = late or outcome.late
        advance(done, len(layers))
    return _summary(outcomes)


def _summary(outcomes: dict[str, _Outcome]) -> Applied:
    """What was done, in words and numbers."""
    changed = {name: outcome.ratio for name, outcome in outcomes.items() if not outcome.reason}
    skipped = tuple((name, outcome.reason) for name, outcome in outcomes.items() if outcome.reason)
    nearest = sum(not math.isnan(outcome.ratio) for outcome in outcomes.values()) - len(changed)
    note = f"AdaRound learned the rounding of {len(changed)} of {len(outcomes)} weights"
    if changed:
        note += f"; the median error of their layers is {statistics.median(changed.values()):.2f} of nearest rounding's"
    if nearest:
        note += f"; {nearest} kept nearest rounding, which did as well on held-out samples"
    return Applied(tuple(changed), skipped, f"{note}.")


def _reason_to_skip(session: Instrumentation, layer: Layer) -> str:
    """Why a layer is left alone whatever the data; ``""`` if it is not."""
    category = CATEGORY_OF.get(layer.op)
    if layer.shared:
        return "its weight is used in several places, which need not agree on a rounding"
    if category is Category.RECURRENT:
        return "a recurrent layer has several weights in one operation and feeds back its errors"
    if category is Category.LOOKUP:
        return "an embedding adds up no products: nearest rounding is best"
    if layer.quantizer.factory is not None:
        return "a custom quantizer decides itself how it rounds"
    if layer.quantizer.encoding is None:
        return "its weight has no range"
    if layer.quantizer.bit_width == 32:
        return "32 bits leave nothing to round"
    adjustment = session.adjustments.get(layer.key)
    if adjustment is not None and adjustment.rounded:
        return "its rounding was learned before"
    return ""


@torch.inference_mode(False)
@torch.no_grad()
def _learn_layer(
    session: Instrumentation, runs: Runs, layer: Layer, settings: AdaRoundSettings, is_late: Callable[[], bool]
) -> _Outcome:
    """Learn the rounding of one layer and keep it if the layer's error falls."""
    observed = _observe(session, runs, layer, settings)
    if isinstance(observed, str):
        return _Outcome(observed)
    arguments, encoding = observed.arguments, layer.quantizer.encoding
    assert encoding is not None
    encoding = encoding.to(arguments.weight.device)
    outputs = observed.training.y[0].numel()
    problem = _problem(arguments, encoding, activation_bounds(session, layer, outputs))
    learned = learn_rounding(problem, observed.training, settings, is_late)
    if learned is None:
        return _Outcome(_TOO_LATE, late=True)
    nearest = problem.error(observed.held_out, problem.nearest)
    error = problem.error(observed.held_out, learned)
    if not error < nearest:
        ratio = error / nearest if nearest else 1.0
        return _Outcome(f"on held-out samples its error was {ratio:.3g} of nearest rounding's: kept nearest", ratio)
    weight = arguments.weight.detach()
    # What float32 and coarser types lose of the sum is less than half a step: the quantizer finds the same levels.
    correction = from_rows(learned, arguments.geometry, weight.shape) - weight.float()
    session.adjust({layer.key: Adjustment(weight_correction=correction)})
    layer.quantizer.freeze()
    return _Outcome(ratio=error / nearest)


def _observe(session: Instrumentation, runs: Runs, layer: Layer, settings: AdaRoundSettings) -> _Observed | str:
    """Samples of a layer: inputs of the network quantized so far, outputs of FP32; or why there are none."""
    sampler = LayerSampler(settings.memory_limit, settings.seed, settings.positions)
    seen: list[LayerArguments | None] = []

    def visit(run: Callable[[], Any], index: int) -> None:
        with session.reference():
            reference = _call_of(session, run, layer.key)
        with session.modes("quantize"):
            quantized = _call_of(session, run, layer.key)
        if reference is None or quantized is None or reference.result.shape != quantized.result.shape:
            return
        fp32, now = _read(reference, layer), _read(quantized, layer)
        if fp32 is not None and now is not None:
            sampler.add(now.x, reference.result, now.geometry)
            # Only while it is quantized has the layer the bias that was corrected for it.
            fp32 = replace(fp32, bias=now.bias)
        if not seen:
            seen.append(fp32)

    runs(visit)
    if not seen:
        return "no calibration batch reached it"
    arguments, samples = seen[0], sampler.samples
    if arguments is None:
        return f"{layer.op} does not multiply its input by one weight as a layer does"
    if not bool(arguments.weight.isfinite().all()):
        return "its weight is not finite"
    if samples is None:
        return "calibration gave too few positions with finite numbers to learn from and to judge by"
    return _Observed(arguments, *samples)


def _call_of(session: Instrumentation, run: Callable[[], Any], key: OpKey) -> Call | None:
    """The call of an operation in one run, which ends there; ``None`` if it is not reached."""
    calls: list[Call] = []
    with session.tapped({key: calls.append}):
        session.run_until(run, key)
    return calls[0] if calls else None


def _read(call: Call, layer: Layer) -> LayerArguments | None:
    """The arguments of a layer's call, ``None`` where its quantized weight is not what multiplies the input."""
    found = layer_arguments(call.func, call.args, call.kwargs)
    if found is None or found.weight is not value_at(call.args, call.kwargs, layer.weight_slot):
        return None
    return found


def _problem(arguments: LayerArguments, encoding: Encoding, bounds: tuple[Tensor, Tensor] | None) -> RoundingProblem:
    """A layer in rows, in float32."""
    weight, geometry = arguments.weight.detach().float(), arguments.geometry
    rows = to_rows(weight, geometry).contiguous()
    outputs = rows.shape[:2]
    bias = rows.new_zeros(outputs) if arguments.bias is None else arguments.bias.detach().float().reshape(outputs)
    low, high = (torch.full_like(bias, end) for end in (-math.inf, math.inf))
    if bounds is not None:
        low, high = (end.to(bias).reshape(outputs) for end in bounds)

    def in_rows(value: Tensor) -> Tensor:
        return to_rows(_of_each_weight(value, weight, encoding), geometry).contiguous()

    return RoundingProblem(
        weight=rows,
        scale=in_rows(encoding.scale),
        lowest=in_rows(encoding.lowest_step),
        highest=in_rows(encoding.highest_step),
        bias=bias,
        low=low,
        high=high,
    )


def _of_each_weight(value: Tensor, weight: Tensor, encoding: Encoding) -> Tensor:
    """A value of each encoding, such as its scale, for each weight."""
    if encoding.spec.granularity is Granularity.PER_GROUP:
        assert encoding.spec.group_size is not None
        return value.repeat_interleave(encoding.spec.group_size, 1)
    if encoding.channel_axis is not None:
        value = value.reshape([-1 if axis == encoding.channel_axis else 1 for axis in range(weight.ndim)])
    return value.expand_as(weight)


def activation_bounds(session: Instrumentation, layer: Layer, outputs: int) -> tuple[Tensor, Tensor] | None:
    """What the clipping activation that alone reads a layer's output clips to.

    Args:
        session: The network.
        layer: The layer.
        outputs: Number of its output channels.

    Returns:
        The lower and the upper end of each channel, ``(outputs,)``, infinite where there is none; ``None`` where no
        such activation follows in every recorded run.

    Examples:
        >>> from lightning_quantdebug.instrument import instrument
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU6())
        >>> with instrument(model, torch.ones(1, 4)) as session:
        ...     activation_bounds(session, session.layers[0], 2)
        (tensor([0., 0.]), tensor([6., 6.]))
    """
    shared = session.topology.shared_keys()
    found = {_clip_behind(session, op, shared) for op in session.topology if shared[op.key] == layer.key}
    clip = found.pop() if len(found) == 1 else None
    if clip is None:
        return None
    key, low, high = clip
    adjustment = session.adjustments.get(key)
    scale = torch.ones(1) if adjustment is None or adjustment.bounds_scale is None else adjustment.bounds_scale
    if scale.numel() not in (1, outputs):
        return None
    scale = scale.detach().flatten().expand(outputs)
    return scale * low, scale * high


def _clip_behind(
    session: Instrumentation, operation: Operation, shared: dict[OpKey, OpKey]
) -> tuple[OpKey, float, float] | None:
    """The clipping that alone reads the result of an operation, looking through a folded normalization."""
    flow = Flow(RULES[session.target.placement])
    follower = flow.only_user(operation)
    if follower is not None and session.plan.folded_into.get(shared[follower.key]) == shared[operation.key]:
        follower = flow.only_user(follower)
    if follower is None or len(follower.inputs) != 1:
        return None
    if follower.op == "relu":
        return shared[follower.key], 0.0, math.inf
    # Builtins tell their arguments by position alone.
    positions = (follower.arguments.get(str(index)) for index in (1, 2))
    given = [value for value in positions if value is not None]
    named = {name: value for name, value in follower.arguments.items() if not name.isdecimal()}
    bounds = clip_bounds(follower.key.func, (None, *given), named)
    if bounds is None:
        return None
    low, high = bounds
    return shared[follower.key], -math.inf if low is None else low, math.inf if high is None else high

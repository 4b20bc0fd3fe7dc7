"""The remedy of range setting: other clipping ranges, of activations from what calibration left, or of weights.

Min-max, percentile and MSE need nothing but the observers, which keep a histogram: no batch is run again. Cross-entropy
needs the logits of the calibration batches and is for the network's last output alone; BN-based ranges need no data and
are for activations behind a batch normalization (Nagel et al., 2021, section 3.1). A quantizer keeps its method:
calibrating anew sets the range by it again. Ranges that no observer can give are frozen.

All quantizers get the same method. The method of least squared error for each quantizer would be MSE everywhere, by
definition; which one is best for the score only the score can tell, quantizer by quantizer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lightning_quantdebug.adjustment import Applied
from lightning_quantdebug.batchnorm_statistics import batchnorm_ranges
from lightning_quantdebug.encoding import Encoding, encoding_from_range
from lightning_quantdebug.errors import CalibrationError, SettingsError
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.interception import OpKey
from lightning_quantdebug.layers import Call, Runs
from lightning_quantdebug.output_cross_entropy import LogitRows, range_from_logits
from lightning_quantdebug.plan import Site
from lightning_quantdebug.quantizer import Quantizer
from lightning_quantdebug.target import OF_SINGLE_QUANTIZERS, Kind, QuantSpec, RangeSetting, parse_choice
from lightning_quantdebug.topology import Operation

# Operations whose result holds the very numbers of their input.
_SAME_NUMBERS = (
    *("reshape", "reshape_as", "view", "view_as", "flatten", "unflatten", "ravel", "squeeze", "unsqueeze"),
    *("contiguous", "clone", "detach", "alias", "identity", "to", "float", "double", "dropout"),
)

Gather = Callable[[Any], list[Any]]
"""From the value of one process to the values of all, in the same order everywhere."""

_Range = tuple[Tensor, Tensor]
_Skipped = list[tuple[str, str]]
_SAME = "has that range already"


def _alone(value: Any) -> list[Any]:
    """:data:`Gather` where there is one process."""
    return [value]


def set_activation_ranges(
    session: Instrumentation,
    runs: Runs,
    method: RangeSetting | str,
    percentile: float | None = None,
    gather: Gather = _alone,
) -> Applied:
    """Set the range of every activation by one method, as far as the method reaches.

    Ranges that are fixed by what an operation computes, and frozen ones, stay.

    Args:
        session: A calibrated instrumentation; specs and encodings of activation quantizers change, nothing else.
        runs: Goes over the calibration batches; only ``cross_entropy`` needs it.
        method: ``min_max``, ``percentile`` and ``mse`` for all activations; ``cross_entropy`` for the network's last
            output, where that is logits ``(N, C)``; ``batchnorm`` for activations behind a batch normalization.
        percentile: With ``percentile``, as in :class:`lightning_quantdebug.target.QuantSpec`; ``None``: as it is there.
        gather: Collects the logits of all processes, so that all of them set the same range.

    Returns:
        The quantizers whose encoding is another one now; the note says how wide their ranges are against before.

    Raises:
        SettingsError: If the method or the percentile can not be used.

    Examples:
        >>> from torch import nn
        >>> from lightning_quantdebug.instrument import batch_runs, instrument
        >>> model, batch = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(64, 4)
        >>> with instrument(model, batch) as q:
        ...     q.calibrate([batch])
        ...     set_activation_ranges(q, batch_runs(q, [batch]), "percentile", 99).changed
        ('input', '1')
    """
    chosen = parse_choice(RangeSetting, method, "method")
    activations = session.select(kind=Kind.ACTIVATION)
    specs = {quantizer.name: _with_method(quantizer.spec, chosen, percentile) for quantizer in activations}
    found: dict[str, _Range | None]
    if chosen is RangeSetting.CROSS_ENTROPY:
        found, skipped = _of_last_output(session, runs, gather, specs)
    elif chosen is RangeSetting.BATCHNORM:
        ends = batchnorm_ranges(session)
        found, skipped = {name: (torch.tensor(low), torch.tensor(high)) for name, (low, high) in ends.items()}, []
    else:
        found, skipped = dict.fromkeys(specs), []
    explained = {name for name, _ in skipped}
    widths: dict[str, float] = {}
    for quantizer in activations:
        reason = _why_not(quantizer, chosen, found)
        if reason is None:
            before = quantizer.encoding
            set_range(quantizer, specs[quantizer.name], found[quantizer.name])
            wider = _widening(before, quantizer.encoding)
            reason = _SAME if wider is None else None
            widths |= {} if wider is None else {quantizer.name: wider}
        if reason is not None and quantizer.name not in explained:
            skipped.append((quantizer.name, reason))
    return Applied(tuple(widths), tuple(skipped), _note(f"{chosen.value} for {len(widths)} activations", widths))


def _with_method(spec: QuantSpec, method: RangeSetting, percentile: float | None) -> QuantSpec:
    """The same grid with another range setting."""
    return replace(spec, range_setting=method, percentile=spec.percentile if percentile is None else percentile)


def _why_not(quantizer: Quantizer, method: RangeSetting, found: dict[str, _Range | None]) -> str | None:
    """Why an activation's range stays as it is; ``None`` if it need not."""
    if quantizer.fixed_range is not None:
        return "its range is fixed by what it computes"
    if quantizer.frozen:
        return "its encoding is frozen"
    if not quantizer.is_calibrated:
        return "calibration gave it no range: it runs in FP32"
    if quantizer.name in found:
        return None
    if method is RangeSetting.CROSS_ENTROPY:
        return "is not the network's last output"
    return "no batch normalization ahead of it tells its range"


@torch.inference_mode(False)
def set_range(quantizer: Quantizer, spec: QuantSpec, ends: _Range | None) -> None:
    """Give an activation a grid, and where its range is none of an observer that range as well, frozen.

    Args:
        quantizer: Of an activation.
        spec: The grid.
        ends: ``range_min`` and ``range_max``; ``None``: from what was observed.
    """
    quantizer.respecify(spec, quantizer.channel_axis)
    if ends is not None:
        quantizer.encoding = encoding_from_range(*ends, spec)
        quantizer.freeze()


def _widening(before: Encoding | None, after: Encoding | None) -> float | None:
    """How many times as wide the ranges of an encoding are, ``None`` if it is the same encoding."""
    assert before is not None
    assert after is not None
    scales, zeros = (before.scale, after.scale.to(before.scale)), (before.zero_point, after.zero_point.to(before.scale))
    return None if torch.equal(*scales) and torch.equal(*zeros) else _width(after) / _width(before)


def _width(encoding: Encoding) -> float:
    """Mean width of the ranges of an encoding, in units of the tensor."""
    return float((encoding.range_max - encoding.range_min).double().mean())


def _note(what: str, widths: dict[str, float]) -> str:
    """One sentence on how wide the ranges are against before; empty if none changed."""
    if not widths:
        return ""
    shares = widths.values()
    return f"{what}: ranges {min(shares):.2f} to {max(shares):.2f} times as wide, median {median(shares):.2f}"


# Cross-entropy: the logits.


def _of_last_output(
    session: Instrumentation, runs: Runs, gather: Gather, specs: dict[str, QuantSpec]
) -> tuple[dict[str, _Range | None], _Skipped]:
    """The range of the logits by cross-entropy, by the name of their quantizer, or why there is none."""
    operation = _last_logits(session)
    if operation is None:
        return {}, [("output", "the network returns no floating-point tensor that was computed from its input")]
    site = _site_of(session, operation)
    if site is None:
        return {}, [(operation.name, "the network's last output has no quantizer of its own")]
    quantizer = session.quantizers[site.name]
    if quantizer.fixed_range is not None or quantizer.frozen:
        return {}, []
    if len(site.places) > 1:
        return {}, [(site.name, "the quantizer of the network's last output is shared by other tensors")]
    rows, reasons = LogitRows(), []
    for part, reason in gather(_logits(session, runs, session.topology.shared_keys()[operation.key])):
        rows.merge(part)
        reasons += [reason] if reason else []
    if reasons:
        return {}, [(site.name, reasons[0])]
    try:
        return {site.name: range_from_logits(rows.logits, specs[site.name])}, []
    except CalibrationError as error:
        return {}, [(site.name, str(error))]


def _last_logits(session: Instrumentation) -> Operation | None:
    """The operation whose result is the network's last output, or what a softmax at its end reads."""
    outputs = session.topology.output_operations()
    operation = outputs[-1] if outputs else None
    # Logits and log-probabilities have the same softmax, so that a log-softmax may stay.
    while operation is not None and operation.op == "softmax":
        operation = operation.data_inputs[0][1].producer
    return operation


def _site_of(session: Instrumentation, operation: Operation) -> Site | None:
    """The quantizer on whose grid an operation's result is, if that holds the very same numbers."""
    keys = session.topology.shared_keys()
    sites: dict[OpKey, Site] = {}
    for site in session.plan.sites:
        if site.kind is Kind.ACTIVATION:
            sites.update({spot.key: site for spot in site.places if spot.slot is None})
    source: Operation | None = operation
    while source is not None and keys[source.key] not in sites:
        source = source.data_inputs[0][1].producer if source.op in _SAME_NUMBERS else None
    return sites[keys[source.key]] if source is not None and len(source.outputs) == 1 else None


def _logits(session: Instrumentation, runs: Runs, key: OpKey) -> tuple[LogitRows, str]:
    """A sample of the FP32 results of one operation, and why they are no logits if they are none."""
    rows, reasons = LogitRows(), []

    def tap(call: Call) -> None:
        try:
            rows.add(call.result)
        except CalibrationError as error:
            reasons.append(str(error))

    def visit(run: Callable[[], Any], index: int) -> None:
        with session.reference(), session.tapped({key: tap}):
            run()

    runs(visit)
    return rows, reasons[0] if reasons else ""


# Weights.


def set_weight_ranges(
    session: Instrumentation, run: Callable[[], Any], method: RangeSetting | str, percentile: float | None = None
) -> Applied:
    """Set the range of every weight by one method.

    Args:
        session: A calibrated instrumentation; specs and encodings of weight quantizers change, nothing else.
        run: Runs the network once, so that the weights are seen as quantization sees them. Those that it does not
            reach stay as they are, and so do frozen ones.
        method: ``min_max``, ``percentile`` or ``mse``.
        percentile: As in :func:`set_activation_ranges`.

    Returns:
        The quantizers whose encoding is another one now; the note says how wide their ranges are against before.

    Raises:
        SettingsError: If the method or the percentile can not be used.

    Examples:
        >>> from torch import nn
        >>> from lightning_quantdebug.instrument import instrument
        >>> model, batch = nn.Sequential(nn.Linear(64, 4), nn.ReLU()), torch.randn(8, 64)
        >>> with instrument(model, batch, "w8a8") as q:
        ...     q.calibrate([batch])
        ...     set_weight_ranges(q, lambda: model(batch), "percentile", 95).changed
        ('0.weight',)
    """
    chosen = parse_choice(RangeSetting, method, "method")
    if chosen in OF_SINGLE_QUANTIZERS:
        raise SettingsError(
            f"`method` of weights must be 'min_max', 'percentile' or 'mse', got {chosen.value!r}, which is for "
            "activations: see `set_activation_ranges`."
        )
    weights = session.select(kind=Kind.WEIGHT)
    skipped = [(q.name, "its rounding was learned for the encoding that it has") for q in weights if q.frozen]
    before = {q.name: q.state() for q in weights if q.is_calibrated and not q.frozen}
    for quantizer in _named(session, before):
        quantizer.respecify(_with_method(quantizer.spec, chosen, percentile), quantizer.channel_axis)
        quantizer.reset()
    session.reset_weight_ranges(run)
    widths: dict[str, float] = {}
    for quantizer in _named(session, before):
        if not quantizer.is_calibrated:
            quantizer.restore(before[quantizer.name])
            skipped.append((quantizer.name, "the calibration batch does not reach it"))
            continue
        wider = _widening(before[quantizer.name].encoding, quantizer.encoding)
        skipped += [(quantizer.name, _SAME)] if wider is None else []
        widths |= {} if wider is None else {quantizer.name: wider}
    return Applied(tuple(widths), tuple(skipped), _note(f"{chosen.value} for {len(widths)} weights", widths))


def _named(session: Instrumentation, names: Iterable[str]) -> list[Quantizer]:
    """Quantizers by name."""
    return [session.quantizers[name] for name in names]

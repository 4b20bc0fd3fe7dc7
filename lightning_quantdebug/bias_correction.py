"""Bias correction: what quantization adds to the mean of a layer's output is taken from its bias.

Rounding a weight moves every product with its input the same way, so that the error of an output channel has a mean
that does not vanish over samples: ``E[y_hat - y] = (W_hat - W) E[x]`` (Nagel et al. 2019, Data-Free Quantization,
section 4.2; Finkelstein et al. 2019, Fighting Quantization Bias With Bias). A bias holds one number per channel and
costs nothing to change. :func:`correct_bias` measures that mean on calibration data, :func:`correct_bias_analytically`
computes it from batch normalizations without data.

Both must run once: a second run would count what the first has corrected as a property of the FP32 network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lightning_quantdebug.adjustment import HAS_BIAS, Adjustment, Applied, argument, put_argument
from lightning_quantdebug.batchnorm_statistics import BatchNormStatistics, UnknownStatisticsError
from lightning_quantdebug.instrument import Instrumentation
from lightning_quantdebug.interception import OpKey
from lightning_quantdebug.layers import Call, Layer, Runs, Tap
from lightning_quantdebug.operations import value_at, with_argument
from lightning_quantdebug.report import Cause, Finding
from lightning_quantdebug.target import Mode
from lightning_quantdebug.topology import Operation


@dataclass(frozen=True)
class _Sums:
    """Float64 sums over everything but the channels of results: values ``(C,)``, squares, elements of a channel."""

    values: Tensor
    squares: Tensor
    count: int

    @property
    def mean(self) -> Tensor:
        """Mean of each channel."""
        return self.values / self.count

    def plus(self, others: Iterable[_Sums]) -> _Sums:
        """The sums over these and other results."""
        total = self
        for other in others:
            total = _Sums(total.values + other.values, total.squares + other.squares, total.count + other.count)
        return total


_Shown = dict[OpKey, list[_Sums]]


@dataclass
class _Bias:
    """One bias, the layers that have it, and what was measured of them.

    Attributes:
        layers: More than one where a module is called several times.
        batches: Numbers of the batches that count.
        exact: Of the FP32 results.
        rounded: Of the quantized results with everything ahead corrected.
        before: Of the quantized results without any correction.
        after: Of the quantized results with all corrections.
        non_finite: How many batches were left out as they gave NaN or infinity.
        unmatched: How many were left out as FP32 and quantized network ran the layer differently.
    """

    layers: list[Layer]
    batches: set[int] = field(default_factory=set)
    exact: _Sums | None = None
    rounded: _Sums | None = None
    before: _Sums | None = None
    after: _Sums | None = None
    non_finite: int = 0
    unmatched: int = 0

    @property
    def name(self) -> str:
        """The name of the first layer."""
        return self.layers[0].name

    @property
    def correction(self) -> Tensor:
        """``E[y_hat - y]`` of each channel, ``(C,)``."""
        assert self.exact is not None
        assert self.rounded is not None
        return self.rounded.mean - self.exact.mean

    def error_share(self, quantized: _Sums | None) -> float | None:
        """Root mean square over channels of the mean error, relative to that of the FP32 result; ``None``: unknown."""
        exact = self.exact
        if exact is None or quantized is None or quantized.count != exact.count or not bool(exact.squares > 0):
            return None
        mean_square = exact.squares / (exact.count * exact.values.numel())
        return float(((quantized.mean - exact.mean).square().mean() / mean_square).sqrt())


def correct_bias(session: Instrumentation, runs: Runs) -> Applied:
    """Take the measured mean error of each output channel from the bias: empirical bias correction.

    ``b -= E[y_hat - y]`` with ``y`` the FP32 result of the layer and ``y_hat`` that of the quantized network (weights
    and activations) with all layers ahead corrected; the mean is over samples, positions and tokens (Nagel et al.
    2019, appendix D; Finkelstein et al. 2019, section 3). They go through the network layer by layer. Here each batch
    goes through it once in FP32 and once quantized: while it does, the result of each layer is put right by the mean
    error of that batch, so that the layers behind see a corrected input, and the mean over all batches, weighted by
    their elements, is the correction. For one batch the two are the same; for several the input of a layer is right
    on the mean of each batch instead of all.

    A module that is called several times has one bias, which gets the mean over its calls. Tokens that are padding
    count like all others. All channels are corrected, also those whose mean error is within its standard error over
    batches. On a trained network with depthwise layers, at 3, 4 and 8 bits, means over 6 draws: leaving out what is
    within 1 to 2 standard errors left 0 to 21 % more mean error in new data where 8 to 128 samples were calibrated on,
    and up to 7 % less with 384, where next to nothing was left either way.

    Args:
        session: The network, calibrated.
        runs: Goes over the calibration batches, twice: to correct and to measure what is left.

    Returns:
        What was changed. The note has the root mean square of the mean errors over channels, relative to that of the
        layer's result, for the median layer.

    Raises:
        SettingsError: If the session was not calibrated.
    """
    biases, skipped = _biases(session)
    if not biases:
        return Applied(skipped=tuple(skipped))
    numbers: list[int] = []

    def visit(run: Callable[[], Any], index: int) -> None:
        numbers.append(index)
        _measure(session, biases, run, index)

    runs(visit)
    corrected = [bias for bias in biases if bias.batches]
    skipped += [(layer.name, _why_not(bias)) for bias in biases if not bias.batches for layer in bias.layers]
    for bias in corrected:
        _adjust(session, bias, bias.correction)
    runs(lambda run, index: _measure_again(session, corrected, run, index))
    return Applied(
        changed=tuple(layer.name for bias in corrected for layer in bias.layers),
        skipped=tuple(skipped),
        note=_note(corrected, len(numbers)),
        findings=_findings(biases, len(numbers)),
    )


def _biases(session: Instrumentation) -> tuple[list[_Bias], list[tuple[str, str]]]:
    """The biases of a network in order of execution, and the layers that have none."""
    operations = _operations(session)
    found: dict[tuple[str, str], _Bias] = {}
    skipped: dict[str, str] = {}
    for layer in session.layers:
        if layer.op not in HAS_BIAS:
            skipped[layer.name] = f"{layer.op} takes no bias"
            continue
        inputs = dict(operations[layer.key][0].inputs)
        given = inputs.get((2,)) or inputs.get(("bias",))
        # Without a bias of its own a module will get one; the same weight in two modules may get two.
        own = given.name if given is not None and given.name else layer.key.path
        found.setdefault((layer.quantizer.name, own), _Bias([])).layers.append(layer)
    return list(found.values()), list(skipped.items())


def _operations(session: Instrumentation) -> dict[OpKey, list[Operation]]:
    """The recorded operations of each key."""
    keys = session.topology.shared_keys()
    found: dict[OpKey, list[Operation]] = {}
    for operation in session.topology:
        found.setdefault(keys[operation.key], []).append(operation)
    return found


def _channel_axis(call: Call) -> int:
    """The axis of the channels of a layer's result: the last of a linear layer, else that ahead of the positions."""
    weight = argument(call.args, call.kwargs, 1, "weight")
    return -1 if weight.ndim == 2 else 1 - weight.ndim


def _sums(call: Call) -> _Sums:
    """The sums of a layer's result."""
    result = call.result.detach()
    others = [axis for axis in range(result.ndim) if axis != _channel_axis(call) % result.ndim]
    values = result.sum(others, dtype=torch.float64) if others else result.double()
    squares = torch.linalg.vector_norm(result, dtype=torch.float64).square()
    return _Sums(values, squares, result.numel() // max(1, values.numel()))


def _shift(call: Call, by: Tensor) -> Tensor:
    """A layer's result minus one number for each channel."""
    shape = [1] * call.result.ndim
    shape[_channel_axis(call)] = -1
    shifted: Tensor = call.result - by.view(shape).to(call.result.dtype)
    return shifted


def _keep(shown: _Shown, key: OpKey) -> Tap:
    """A tap that keeps the sums of every run of a layer."""

    def tap(call: Call) -> None:
        shown.setdefault(key, []).append(_sums(call))

    return tap


def _keep_and_correct(shown: _Shown, key: OpKey, reference: Sequence[_Sums]) -> Tap:
    """A tap that keeps the sums as they are, and gives the result the mean that it has in FP32."""

    def tap(call: Call) -> Tensor | None:
        runs = shown.setdefault(key, [])
        found = _sums(call)
        runs.append(found)
        if len(runs) > len(reference) or not _are_alike(found, reference[len(runs) - 1]):
            return None
        by = found.mean - reference[len(runs) - 1].mean
        return _shift(call, by) if bool(by.isfinite().all()) else None

    return tap


def _are_alike(one: _Sums, other: _Sums) -> bool:
    """Whether two results have the same size."""
    return one.count == other.count and one.values.shape == other.values.shape


def _shown(session: Instrumentation, biases: Iterable[_Bias], run: Callable[[], Any]) -> _Shown:
    """The sums of every layer in one run."""
    shown: _Shown = {}
    with session.tapped({layer.key: _keep(shown, layer.key) for bias in biases for layer in bias.layers}):
        run()
    return shown


def _measure(session: Instrumentation, biases: list[_Bias], run: Callable[[], Any], index: int) -> None:
    """Take one batch into account: in FP32, quantized as it is, and quantized with each layer put right."""
    with session.reference():
        reference = _shown(session, biases, run)
    corrected: _Shown = {}
    taps = {
        layer.key: _keep_and_correct(corrected, layer.key, reference.get(layer.key, ()))
        for bias in biases
        for layer in bias.layers
    }
    with session.modes(Mode.QUANTIZE):
        before = _shown(session, biases, run)
        with session.tapped(taps):
            run()
    for bias in biases:
        _take_in(bias, reference, before, corrected, index)


def _take_in(bias: _Bias, reference: _Shown, before: _Shown, corrected: _Shown, index: int) -> None:
    """Add one batch to a bias, unless it is of no use."""
    exact, rounded, uncorrected = (_of(bias, shown) for shown in (reference, corrected, before))
    if not any(sums.count for sums in (*exact, *rounded)):
        return
    if len(exact) != len(rounded) or not all(map(_are_alike, exact, rounded)):
        bias.unmatched += 1
        return
    if not all(bool(sums.squares.isfinite()) for sums in (*exact, *rounded)):
        bias.non_finite += 1
        return
    bias.batches.add(index)
    bias.exact = _added(bias.exact, exact)
    bias.rounded = _added(bias.rounded, rounded)
    bias.before = _added(bias.before, uncorrected)


def _of(bias: _Bias, shown: _Shown) -> list[_Sums]:
    """The sums of all layers of a bias."""
    return [sums for layer in bias.layers for sums in shown.get(layer.key, ())]


def _added(total: _Sums | None, more: list[_Sums]) -> _Sums | None:
    """The sums over earlier and later results."""
    if not more:
        return total
    return more[0].plus(more[1:]) if total is None else total.plus(more)


def _measure_again(session: Instrumentation, biases: list[_Bias], run: Callable[[], Any], index: int) -> None:
    """Take one batch into account that runs with all corrections."""
    with session.modes(Mode.QUANTIZE):
        shown = _shown(session, biases, run)
    for bias in biases:
        if index in bias.batches:
            bias.after = _added(bias.after, _of(bias, shown))


def _adjust(session: Instrumentation, bias: _Bias, by: Tensor) -> None:
    """Take a number for each channel from one bias, wherever it is used."""
    offset = -by.float()
    session.adjust({layer.key: Adjustment(bias_offset=offset) for layer in bias.layers})


def _why_not(bias: _Bias) -> str:
    """Why a bias has no correction."""
    if bias.non_finite:
        return "every calibration batch that reached it gave NaN or infinity"
    if bias.unmatched:
        return "the quantized network runs it on other data than the FP32 network"
    return "no calibration batch reached it"


def _note(biases: list[_Bias], batches: int) -> str:
    """What was measured, in one sentence."""
    shares = [(bias.error_share(bias.before), bias.error_share(bias.after)) for bias in biases]
    known = [(one, other) for one, other in shares if one is not None and other is not None]
    if not known:
        return ""
    before, after = (median(each) for each in zip(*known, strict=True))
    fell = sum(one > other for one, other in known)
    return (
        f"The mean error of the median layer went from {before:.2%} to {after:.2%} of its result (root mean squares) "
        f"on {batches} calibration batches; it fell in {fell} of {len(known)} layers."
    )


def _findings(biases: list[_Bias], batches: int) -> tuple[Finding, ...]:
    """The first layer where NaN or infinity came up."""
    hit = [bias for bias in biases if bias.non_finite]
    if not hit:
        return ()
    where = f" and {len(hit) - 1} more" if len(hit) > 1 else ""
    evidence = (
        f"{hit[0].non_finite} of {batches} calibration batches gave NaN or infinity at {hit[0].name}{where}; bias "
        "correction left them out there."
    )
    return (Finding(Cause.NON_FINITE, evidence, hit[0].layers[0].quantizer.name),)


# From batch normalizations.


def correct_bias_analytically(session: Instrumentation, runs: Runs) -> Applied:
    """Take the expected mean error of each output channel from the bias, without data: analytic bias correction.

    ``b -= sum over inputs and kernel of (W_hat - W) * E[x]`` (Nagel et al. 2019, section 4.2 and appendix C). ``E[x]``
    of each input channel comes from the batch normalizations ahead, see
    :class:`~lightning_quantdebug.batchnorm_statistics.BatchNormStatistics`. The layer itself is run once on ``E[x]``
    with the error of its weight, so that zero padding, stride, groups and transposition count exactly: at the border
    fewer taps see the input, and the mean over positions is lower than the sum over the kernel.

    The error of activations is not corrected, as nothing is known of it.

    Args:
        session: The network, calibrated.
        runs: Goes over the calibration batches; of each only the shapes are used, until every layer was reached.

    Returns:
        What was changed, and for each other layer why its input is not known.

    Raises:
        SettingsError: If the session was not calibrated.
    """
    biases, skipped = _biases(session)
    statistics, operations = BatchNormStatistics(session), _operations(session)
    expected: dict[OpKey, Tensor] = {}
    known = []
    for bias in biases:
        try:
            inputs = {layer.key: _expected_input(statistics, operations[layer.key]) for layer in bias.layers}
        except UnknownStatisticsError as error:
            skipped += [(layer.name, str(error)) for layer in bias.layers]
            continue
        expected |= inputs
        known.append(bias)
    errors = _mean_errors(session, runs, expected) if known else {}
    corrected = [bias for bias in known if all(layer.key in errors for layer in bias.layers)]
    skipped += [(layer.name, _why_not(bias)) for bias in known if bias not in corrected for layer in bias.layers]
    for bias in corrected:
        _adjust(session, bias, torch.stack([errors[layer.key] for layer in bias.layers]).mean(0))
    changed = tuple(layer.name for bias in corrected for layer in bias.layers)
    largest = max((float(error.abs().max()) for error in errors.values()), default=0.0)
    note = f"{len(changed)} of {len(changed) + len(skipped)} layers have an input whose mean is known without data; "
    return Applied(changed, tuple(skipped), f"{note}the largest correction is {largest:.3g}." if changed else "")


def _expected_input(statistics: BatchNormStatistics, operations: list[Operation]) -> Tensor:
    """The mean of each input channel of a layer, ``(C_in,)``."""
    found = []
    for operation in operations:
        value = dict(operation.inputs).get((0,)) or dict(operation.inputs)[("input",)]
        if operation.op == "linear" and len(value.shape) != 2:
            raise UnknownStatisticsError(
                f"the channels of the input of {operation.name} are not those of a normalization"
            )
        found.append(statistics.of(value).mean)
    if any(not torch.equal(found[0], other) for other in found[1:]):
        raise UnknownStatisticsError(f"{operations[0].name} reads another tensor each time")
    return found[0]


def _mean_errors(session: Instrumentation, runs: Runs, expected: dict[OpKey, Tensor]) -> dict[OpKey, Tensor]:
    """The expected mean error of each layer that a batch reaches, ``(C_out,)``."""
    errors: dict[OpKey, Tensor] = {}
    slots = {layer.key: layer.weight_slot for layer in session.layers}

    def visit(run: Callable[[], Any], index: int) -> None:
        missing = [key for key in expected if key not in errors]
        if not missing:
            return
        exact = {key: weight for key, (weight, _) in session.effective_weights(run).items()}

        def tap_of(key: OpKey) -> Tap:
            def tap(call: Call) -> None:
                error = value_at(call.args, call.kwargs, slots[key]) - exact[key]
                errors.setdefault(key, _mean_result(call, error, expected[key]))

            return tap

        with session.modes(Mode.QUANTIZE), session.tapped({key: tap_of(key) for key in missing if key in exact}):
            run()

    runs(visit)
    return errors


def _mean_result(call: Call, weight: Tensor, mean: Tensor) -> Tensor:
    """What a layer without bias gives on the mean over positions, if its input is constant on each channel.

    Args:
        call: A run of the layer; its input is ``(N, C_in, *)`` or ``(C_in, *)``, that of a linear layer ``(N, C_in)``.
        weight: The weight to use in place of its own.
        mean: The constant of each channel, ``(C_in,)``.

    Returns:
        Float64, ``(C_out,)``.
    """
    x = call.args[0] if call.args else call.kwargs["input"]
    positions = x.shape[x.ndim - (weight.ndim - 2) :] if weight.ndim > 2 else ()
    constant = mean.to(weight).view(1, -1, *(1,) * len(positions)).expand(1, -1, *positions)
    slot = (0,) if call.args else ("input",)
    args, kwargs = with_argument(call.args, call.kwargs, slot, constant)
    args, kwargs = put_argument(args, kwargs, 1, "weight", weight)
    args, kwargs = put_argument(args, kwargs, 2, "bias", None)
    result: Tensor = call.func(*args, **kwargs)
    return result[0].flatten(1).double().mean(1) if result.ndim > 2 else result[0].double()

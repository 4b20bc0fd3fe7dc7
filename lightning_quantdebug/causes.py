"""From what was measured of sick weights and activations to their causes: pure rules, each with its evidence.

A cause is named where taking it away would be worth a bit or two of the grid (6 dB a bit: Jayant and Noll, Digital
Coding of Waveforms, 1984, section 4.2), beyond what healthy networks show, so that nothing is named that all have.
Greatest values of four networks trained on handwritten digits (``benchmarks/healthy_symptoms.py``) at W8A8, W4A8, W4A4
and W8A4, per tensor and per channel, all within 2.5 points of FP32; beside them the patients (``tests/patients.py``):

===================================  =======  =======  =======================
gain in dB                           healthy  patient  cause
===================================  =======  =======  =======================
channels of one range                    7.8     41.1  uneven channel ranges
no mean error                            8.8     18.0  biased error
clipped range of a weight                5.4           weight outliers
random signs of the errors               3.4           rounding dominates
range of the bulk of an activation       4.2     58.1  activation outliers
range without a few channels             2.7     48.5  outlier channel
range of the median channel             10.7     28.4  uneven channel ranges
range of least squared error             1.1           clipping, rounding
===================================  =======  =======  =======================
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from lightning_quantdebug.activation_symptoms import BULK, ActivationSymptoms, activation_symptoms
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.layers import Runs
from lightning_quantdebug.report import Cause, Finding
from lightning_quantdebug.target import Kind
from lightning_quantdebug.weight_symptoms import WeightSymptoms, weight_symptoms

MOST_FINDINGS = 5
"""Of one box, so that the report stays one page: the guiltiest are named, and their cure is tried on all."""

ONE_BIT, TWO_BITS, THREE_BITS = 6.02, 12.04, 18.06
"""What so many bits more would be worth, in dB."""

_UNEVEN_RATIO = 4.0
"""The ranges must show it themselves, as another grid can be better by luck. Healthy: up to 2.2; patient: 22.5."""

_PEAK = 6.0
"""Greatest weight in root mean squares, likewise. Healthy: up to 4.3; patients with other diseases: up to 5.4."""

_WORST = 6.0
"""Layers whose SQNR is at most this many dB above the worst are looked at: they make up most of the noise."""

_HOPELESS = 3.0
"""SQNR in dB, half as much noise as signal, below which rounding alone is not said to be to blame. At 2 bits the layers
of the network of ``benchmarks/remedies.py`` have 6.1 dB and more, and AdaRound takes it from 10.0 to 55.2 % (FP32:
58.2 %)."""

_QUIET_DB, _QUIET_DAMAGE = 30.0, 0.02
"""A layer with more SQNR, and a quantizer with less damage, is not to blame. Healthy ones have 39 dB or more
and at most 0.01 with 8 bits, 18 to 24 dB and up to 0.14 with 4."""

_CLIPPING = 0.8
"""Share of the noise. At the range of least squared error it is below a half for bell-shaped tensors."""

_SHORT_SIDE, _SHORT_SHARE = 16, 0.25
"""A side of 0 with fewer than one level in 16, and that share of the values: the negative tail of GELU and SiLU."""


def weight_causes(session: Instrumentation, runs: Runs) -> list[Finding]:
    """Why quantized weights cost score: the worst layers and what ails them.

    Args:
        session: Calibrated; nothing of it changes.
        runs: The calibration batches.

    Returns:
        At most five findings, the layer with the least output SQNR first.
    """
    return weight_findings(weight_symptoms(session, runs))


def activation_causes(session: Instrumentation, runs: Runs) -> list[Finding]:
    """Why quantized activations cost score: the quantizers that spoil the output most and what ails them.

    Args:
        session: Calibrated; nothing of it changes.
        runs: The calibration batches.

    Returns:
        At most five findings, the quantizer with the greatest damage first.
    """
    constant = [
        quantizer.name
        for quantizer in session.select(kind=Kind.ACTIVATION)
        if quantizer.observer.count and quantizer.observer.range_min == quantizer.observer.range_max
    ]
    return activation_findings(activation_symptoms(session, runs, MOST_FINDINGS), constant)


def weight_findings(layers: Iterable[WeightSymptoms]) -> list[Finding]:
    """The causes that the symptoms of layers speak for.

    Args:
        layers: Symptoms of each layer, in any order.

    Returns:
        At most five findings: the causes of the worst layers, greatest gain first, then dead channels.

    Examples:
        >>> layer = WeightSymptoms("conv.weight", 8, sqnr_db=9.0, even_gain=38.0, input_ratio=25.0, narrowest=3)
        >>> [(finding.cause.value, finding.remedy) for finding in weight_findings([layer])]
        [('uneven_channel_ranges', 'cle')]
    """
    ranked = sorted(layers, key=lambda layer: layer.sqnr_db)
    guilty = [layer for layer in ranked if layer.sqnr_db <= min(_QUIET_DB, ranked[0].sqnr_db + _WORST)]
    found = _merged([finding for layer in guilty for finding in _of_weight(layer)])
    dead = [_dead_weights(layer) for layer in ranked if layer.dead]
    return _shortened(found, dead)


def activation_findings(quantizers: Sequence[ActivationSymptoms], constant: Sequence[str] = ()) -> list[Finding]:
    """The causes that the symptoms of guilty quantizers speak for.

    Args:
        quantizers: Symptoms of the guilty ones, the guiltiest first.
        constant: Names of quantizers whose tensor never changes.

    Returns:
        At most five findings.

    Examples:
        >>> symptoms = ActivationSymptoms("relu", 8, damage=0.4, bulk_gain=40.0, bulk=(0.0, 1.0), observed=(0.0, 100.0))
        >>> [(finding.cause.value, finding.remedy) for finding in activation_findings([symptoms])]
        [('activation_outliers', 'range_setting')]
    """
    found = _merged([activation_cause(symptoms) for symptoms in quantizers if symptoms.damage >= _QUIET_DAMAGE])
    still = [Finding(Cause.CONSTANT_TENSOR, "every value that calibration saw is the same", name) for name in constant]
    return _shortened(found, still)


def _merged(found: list[Finding]) -> list[Finding]:
    """One finding for all quantizers that have nothing but too few bits; it speaks of the first."""
    merged: list[Finding] = []
    for finding in found:
        alike = [other.quantizer for other in found if _is_plain(other) and other.cause is finding.cause]
        if not _is_plain(finding) or len(alike) == 1:
            merged.append(finding)
        elif finding.quantizer == alike[0]:
            names = ", ".join(str(name) for name in alike[1:4]) + (f" and {len(alike) - 4} more" if alike[4:] else "")
            merged.append(replace(finding, evidence=f"{finding.evidence}; likewise {names}"))
    return merged


def _is_plain(finding: Finding) -> bool:
    """Whether nothing but the bits is to blame."""
    return finding.remedy in ("bit_width", "adaround")


def _shortened(found: list[Finding], asides: list[Finding]) -> list[Finding]:
    """What fits on the page; the last place is kept for an aside where there is one."""
    return [*found[: MOST_FINDINGS - bool(asides)], *asides][:MOST_FINDINGS]


# Weights.


def _of_weight(layer: WeightSymptoms) -> list[Finding]:
    """The causes of one layer, the one that costs most first; the bits where there is no other."""
    found = []
    if layer.even_gain >= TWO_BITS and max(layer.output_ratio, layer.input_ratio) >= _UNEVEN_RATIO:
        found.append((layer.even_gain, _uneven(layer)))
    if layer.unbiased_gain >= TWO_BITS:
        found.append((layer.unbiased_gain, _biased(layer)))
    if layer.clipping_gain >= ONE_BIT and layer.peak >= _PEAK:
        found.append((layer.clipping_gain, _with_outliers(layer)))
    found.sort(key=lambda item: -item[0])
    return [finding for _, finding in found] or [_rounded(layer)]


def weight_cause(layer: WeightSymptoms) -> Finding:
    """The cause of one layer that costs most; the bits where there is no other."""
    return _of_weight(layer)[0]


def _uneven(layer: WeightSymptoms) -> Finding:
    """Channels of one tensor have unlike ranges."""
    by_input = layer.input_ratio > layer.output_ratio
    ratio, axis = (layer.input_ratio, "input") if by_input else (layer.output_ratio, "output")
    evidence = (
        f"the range of the weight is {ratio:.3g} times that of its median {axis} channel (the least range has channel "
        f"{layer.narrowest}); with even channels the SQNR of the output would be "
        f"{layer.sqnr_db + layer.even_gain:.1f} dB instead of {layer.sqnr_db:.1f} dB"
    )
    return Finding(Cause.UNEVEN_CHANNEL_RANGES, evidence, layer.quantizer, "cle")


def _biased(layer: WeightSymptoms) -> Finding:
    """The error has a mean."""
    share = 1.0 - 10.0 ** (-layer.unbiased_gain / 10.0)
    evidence = (
        f"{share:.1%} of the output's error is the same for every sample, a shift of the channels; without it the SQNR "
        f"of the output would be {layer.sqnr_db + layer.unbiased_gain:.1f} dB instead of {layer.sqnr_db:.1f} dB"
    )
    return Finding(Cause.BIASED_ERROR, evidence, layer.quantizer, "bias_correction")


def _with_outliers(layer: WeightSymptoms) -> Finding:
    """A few weights set the range."""
    evidence = (
        f"the greatest weight is {layer.peak:.1f} times the root mean square; with a clipped range the SQNR of the "
        f"output would be {layer.sqnr_db + layer.clipping_gain:.1f} dB instead of {layer.sqnr_db:.1f} dB"
    )
    return Finding(Cause.WEIGHT_OUTLIERS, evidence, layer.quantizer, "range_setting")


def _rounded(layer: WeightSymptoms) -> Finding:
    """Nothing is wrong with the weight but its rounding."""
    at = f"{layer.bit_width} bits: the SQNR of the output is {layer.sqnr_db:.1f} dB"
    if layer.sign_gain >= ONE_BIT:
        evidence = (
            f"{at}, as the rounding errors add up over inputs that go together; with random signs it would be "
            f"{layer.sqnr_db + layer.sign_gain:.1f} dB"
        )
    elif layer.sqnr_db < _HOPELESS:
        evidence = f"{at}, and neither even channels nor a clipped range nor unbiased errors would make up for it"
        return Finding(Cause.TOO_FEW_BITS, evidence, layer.quantizer, "bit_width")
    else:
        evidence = f"{at}, with even channels, without outliers, and with errors that are no shift"
    advice = "Learn the rounding (AdaRound), use a finer granularity or more bits."
    return Finding(Cause.ROUNDING_DOMINATES, evidence, layer.quantizer, "adaround", advice)


def _dead_weights(layer: WeightSymptoms) -> Finding:
    """Output channels without a weight."""
    return Finding(Cause.DEAD_CHANNELS, f"all weights are 0 in {_channels(layer.dead)} of the outputs", layer.quantizer)


def _channels(indices: Sequence[int]) -> str:
    """Some channels by number."""
    shown = ", ".join(map(str, indices[:4]))
    more = f" and {len(indices) - 4} more" if len(indices) > 4 else ""
    return f"channel{'s' if len(indices) > 1 else ''} {shown}{more}"


# Activations.


def activation_cause(symptoms: ActivationSymptoms) -> Finding:
    """The cause of one guilty quantizer: rare values, then channels, then the ends of the range, then the bits."""
    rules = (
        (_has_outliers, _outliers),
        (_has_outlier_channel, _outlier_channel),
        (_is_uneven, _uneven_activation),
        (_has_poor_range, _poor_range),
        (_is_skewed, _skewed),
        (_is_mostly_dead, _dead_activations),
    )
    rule = next((name for applies, name in rules if applies(symptoms)), _few_bits)
    return rule(symptoms)


def harm(symptoms: ActivationSymptoms) -> str:
    """What the quantizer does to the output."""
    return f"alone it moves the output by {symptoms.damage:.1%} of what two samples differ by"


def _has_outliers(symptoms: ActivationSymptoms) -> bool:
    """Whether rare values set the range."""
    return symptoms.bulk_gain >= TWO_BITS


def _outliers(symptoms: ActivationSymptoms) -> Finding:
    """Rare values set the range."""
    low, high = symptoms.bulk
    evidence = (
        f"{BULK:.1%} of the values lie in [{low:.4g}, {high:.4g}], the range is [{symptoms.observed[0]:.4g}, "
        f"{symptoms.observed[1]:.4g}]: the few others cost {symptoms.bulk_gain:.1f} dB of rounding noise; "
        f"{harm(symptoms)}"
    )
    return Finding(Cause.ACTIVATION_OUTLIERS, evidence, symptoms.quantizer, "range_setting")


def _has_outlier_channel(symptoms: ActivationSymptoms) -> bool:
    """Whether a few channels set the range, and the others are less uneven among themselves than that."""
    return symptoms.outlier_gain >= TWO_BITS and symptoms.uneven_gain < symptoms.outlier_gain + TWO_BITS


def _outlier_channel(symptoms: ActivationSymptoms) -> Finding:
    """A few channels set the range; behind the last layer nothing can take their scale over."""
    few = f"{_channels(symptoms.outlier_channels)} of {symptoms.channels}"
    evidence = (
        f"{few} carr{'y' if len(symptoms.outlier_channels) > 1 else 'ies'} the range [{symptoms.observed[0]:.4g}, "
        f"{symptoms.observed[1]:.4g}], which costs the others {symptoms.outlier_gain:.1f} dB of rounding noise; "
        f"{harm(symptoms)}"
    )
    if symptoms.is_output:
        advice = "Narrow the range of the output to what decides (cross-entropy), or leave it in FP32."
        return Finding(Cause.ROUNDING_DOMINATES, evidence, symptoms.quantizer, "range_setting", advice)
    return Finding(Cause.OUTLIER_CHANNEL, evidence, symptoms.quantizer, "activation_cle")


def _is_uneven(symptoms: ActivationSymptoms) -> bool:
    """Whether most channels are much smaller than the range, and a later layer could make up for that."""
    return symptoms.uneven_gain >= THREE_BITS and not symptoms.is_output


def _uneven_activation(symptoms: ActivationSymptoms) -> Finding:
    """Channels of one tensor have unlike ranges."""
    evidence = (
        f"the range of the median channel is {10 ** (symptoms.uneven_gain / 20):.3g} times narrower than the whole "
        f"[{symptoms.observed[0]:.4g}, {symptoms.observed[1]:.4g}], which costs it {symptoms.uneven_gain:.1f} dB of "
        f"rounding noise; {harm(symptoms)}"
    )
    return Finding(Cause.UNEVEN_CHANNEL_RANGES, evidence, symptoms.quantizer, "activation_cle")


def _has_poor_range(symptoms: ActivationSymptoms) -> bool:
    """Whether another range would do, or most of the noise is clipping."""
    return symptoms.range_gain >= ONE_BIT or symptoms.clipping_share >= _CLIPPING


def _poor_range(symptoms: ActivationSymptoms) -> Finding:
    """The range is too narrow or too wide."""
    clipped = symptoms.clipping_share > 0.5
    evidence = (
        f"{symptoms.clipping_share:.0%} of the noise is clipping, the rest rounding; the range of least squared error "
        f"would have {symptoms.range_gain:.1f} dB less; {harm(symptoms)}"
    )
    cause = Cause.CLIPPING_DOMINATES if clipped else Cause.ROUNDING_DOMINATES
    return Finding(cause, evidence, symptoms.quantizer, "range_setting")


def _is_skewed(symptoms: ActivationSymptoms) -> bool:
    """Whether much of the grid is not used, or many values share few levels."""
    few = symptoms.short_levels * _SHORT_SIDE < 2**symptoms.bit_width
    return symptoms.unused_gain >= ONE_BIT - 0.5 or (few and symptoms.short_share >= _SHORT_SHARE)


def _skewed(symptoms: ActivationSymptoms) -> Finding:
    """The grid does not fit a lopsided tensor."""
    if symptoms.unused_gain >= ONE_BIT - 0.5:
        detail = f"the grid is wider than the values by {symptoms.unused_gain:.1f} dB"
    else:
        detail = f"{symptoms.short_share:.0%} of the values share {symptoms.short_levels} levels on one side of 0"
    evidence = f"{detail}, as the values reach from {symptoms.observed[0]:.4g} to {symptoms.observed[1]:.4g}"
    return Finding(Cause.SKEWED_TAIL, f"{evidence}; {harm(symptoms)}", symptoms.quantizer, "range_setting")


def _is_mostly_dead(symptoms: ActivationSymptoms) -> bool:
    """Whether most channels are 0 throughout."""
    return 2 * len(symptoms.dead) > symptoms.channels


def _dead_activations(symptoms: ActivationSymptoms) -> Finding:
    """Most channels are 0 throughout."""
    evidence = f"{_channels(symptoms.dead)} of {symptoms.channels} are 0 throughout; {harm(symptoms)}"
    return Finding(Cause.DEAD_CHANNELS, evidence, symptoms.quantizer)


def _few_bits(symptoms: ActivationSymptoms) -> Finding:
    """Nothing is wrong with the tensor but its bits."""
    evidence = (
        f"{symptoms.bit_width} bits: neither rare values nor single channels nor the ends of the range are to blame; "
        f"{harm(symptoms)}"
    )
    return Finding(Cause.TOO_FEW_BITS, evidence, symptoms.quantizer, "bit_width")

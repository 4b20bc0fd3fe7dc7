"""Why single quantizers cost what they cost: for each named one the cause that tells most, with its evidence.

What weights and activations can be ill of in themselves stands in :mod:`~lightning_quantdebug.causes`. Here come the
causes that need more than the tensor: what validation brings that calibration did not see, token positions, the
operands of a sum, and functions that are at their ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from lightning_quantdebug.activation_symptoms import ActivationSymptoms, damages_of, symptoms_of
from lightning_quantdebug.causes import TWO_BITS, activation_cause, harm, weight_cause
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.layers import Runs
from lightning_quantdebug.operations import Category
from lightning_quantdebug.quantizer import Quantizer
from lightning_quantdebug.quantizer_symptoms import Seen, seen_in_validation
from lightning_quantdebug.report import Cause, Finding
from lightning_quantdebug.target import Kind
from lightning_quantdebug.weight_symptoms import weight_symptoms

# Greatest values of six healthy networks of ``benchmarks/healthy_symptoms.py`` at six targets: values that calibration
# did not see would save 8.2 dB (at 8 bits, where one new extreme outweighs the rounding noise), token positions 0.8 dB.
# Both are held against two bits, 12 dB, as other causes are.

UNBALANCED = 8.0
"""Greatest magnitude of one operand over that of another: the smaller one is left with three bits fewer. Healthy sums
and joins: up to 2.0."""

SATURATED = 0.95
"""Share of the values within one step of an end. Healthy softmax and sigmoid: up to 0.59 at 8 bits, 0.78 at 4."""

_RULED_OUT = (Cause.TOO_FEW_BITS, Cause.ROUNDING_DOMINATES, Cause.CLIPPING_DOMINATES)
# Causes that say that nothing else was found: a more telling one takes their place, and they are told with numbers.

_OUTLIERS = (Cause.ACTIVATION_OUTLIERS, Cause.OUTLIER_CHANNEL, Cause.WEIGHT_OUTLIERS)


def quantizer_causes(session: Instrumentation, runs: Runs, names: Sequence[str]) -> list[Finding]:
    """The cause of each of some quantizers.

    Args:
        session: Calibrated; nothing of it changes.
        runs: Batches of validation.
        names: Names of calibrated quantizers, the worst first.

    Returns:
        One finding for each that was reached, in the order of ``names``.
    """
    found: dict[str, Finding] = {}
    weights = [name for name in names if session.quantizers[name].kind is Kind.WEIGHT]
    if weights:
        layers = {layer.quantizer: layer for layer in weight_symptoms(session, runs)}
        found |= {name: weight_cause(layers[name]) for name in weights if name in layers}
    activations = [name for name in names if session.quantizers[name].kind is Kind.ACTIVATION]
    if activations:
        damages = damages_of(session, runs, activations)
        seen = seen_in_validation(session, runs, activations)
        ordered = {name: damages.get(name, 0.0) for name in activations}
        for symptoms in symptoms_of(session, runs, ordered):
            found[symptoms.quantizer] = _of_activation(session, symptoms, seen[symptoms.quantizer])
    return [found[name] for name in names if name in found]


def _of_activation(session: Instrumentation, symptoms: ActivationSymptoms, seen: Seen) -> Finding:
    """The cause of one activation: what validation shows, then what the tensor itself shows."""
    quantizer = session.quantizers[symptoms.quantizer]
    finding = (
        _unseen(quantizer, symptoms, seen)
        or _token(symptoms, seen)
        or _unbalanced(symptoms, seen)
        or _saturated(session, quantizer, symptoms, seen)
        or _cured_by_single(activation_cause(symptoms))
    )
    return _with_numbers(finding, quantizer, symptoms, seen)


def _cured_by_single(finding: Finding) -> Finding:
    """The finding with the remedy of a single quantizer in place of that of a whole network."""
    return replace(finding, remedy="custom_range") if finding.remedy == "range_setting" else finding


def _unseen(quantizer: Quantizer, symptoms: ActivationSymptoms, seen: Seen) -> Finding | None:
    """Validation brings values that calibration never saw."""
    if quantizer.fixed_range is not None or seen.unseen_gain < TWO_BITS:
        return None
    evidence = (
        f"{seen.outside / seen.count:.2%} of the values in validation lie outside the range, which calibration set "
        f"from [{quantizer.observer.range_min:.4g}, {quantizer.observer.range_max:.4g}]; clipping what calibration "
        f"never saw is {seen.unseen_share:.0%} of the noise; {harm(symptoms)}"
    )
    return Finding(Cause.RANGE_UNSEEN, evidence, symptoms.quantizer, "custom_range")


def _token(symptoms: ActivationSymptoms, seen: Seen) -> Finding | None:
    """A few token positions set the range, more than any channel does."""
    tokens, gain = seen.outlier_tokens
    if gain < TWO_BITS or gain <= symptoms.outlier_gain or symptoms.is_output:
        return None
    evidence = (
        f"token {', '.join(map(str, tokens[:4]))} of {len(seen.low)} carries the range "
        f"[{symptoms.observed[0]:.4g}, {symptoms.observed[1]:.4g}], which costs the others {gain:.1f} dB of rounding "
        f"noise; {harm(symptoms)}"
    )
    return Finding(Cause.OUTLIER_TOKEN, evidence, symptoms.quantizer, "bit_width")


def _unbalanced(symptoms: ActivationSymptoms, seen: Seen) -> Finding | None:
    """One operand of a sum or a join is much smaller than another."""
    if seen.imbalance < UNBALANCED:
        return None
    evidence = (
        f"the operands that meet here reach {', '.join(f'{value:.3g}' for value in seen.operands)}: on one grid the "
        f"smallest is left with {seen.imbalance:.3g} times fewer levels; {harm(symptoms)}"
    )
    return Finding(Cause.UNBALANCED_JOIN, evidence, symptoms.quantizer, "bit_width")


def _saturated(
    session: Instrumentation, quantizer: Quantizer, symptoms: ActivationSymptoms, seen: Seen
) -> Finding | None:
    """A function with bounds is almost always at one of them."""
    shared = session.topology.shared_keys()
    bounded = {shared[op.key] for op in session.topology if op.category is Category.BOUNDED}
    places = {spot.key for site in session.plan.sites if site.name == quantizer.name for spot in site.places}
    if not places & bounded or seen.end_share < SATURATED:
        return None
    evidence = (
        f"{seen.end_share:.1%} of the values lie within one step of an end of the function, and what tells them apart "
        f"is lost; {harm(symptoms)}"
    )
    return Finding(Cause.SATURATED_ACTIVATION, evidence, symptoms.quantizer, "bit_width")


def _with_numbers(finding: Finding, quantizer: Quantizer, symptoms: ActivationSymptoms, seen: Seen) -> Finding:
    """The finding with the numbers that say how the tensor is shaped and what its noise is made of."""
    if finding.cause in _OUTLIERS and symptoms.kurtosis is not None:
        return replace(finding, evidence=f"{finding.evidence}; kurtosis {symptoms.kurtosis:.3g} (normal: 3)")
    encoding = quantizer.encoding
    assert encoding is not None
    scale = float(encoding.scale)
    if finding.cause in _RULED_OUT and seen.noise > 0:
        clipped = seen.clipping / seen.noise
        numbers = f"rmse is {seen.relative_rmse(scale):.3f} steps (rounding alone: 0.289), {clipped:.0%} of it clipping"
        return replace(finding, evidence=f"{finding.evidence}; {numbers}")
    return finding

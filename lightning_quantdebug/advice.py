"""What the user reads when a box of the chart ends badly: where the loss comes from, and what to try next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_quantdebug.report import Remedy, Report, StepName, StepVerdict

_TRIES = {
    "weights": "more weight bits, or a finer granularity if the engine has it",
    "activations": "calibrate on more batches, or more activation bits",
}
_NOUN = {StepName.FIX_WEIGHTS: "weights", StepName.FIX_ACTIVATIONS: "activations"}


def after_repair(report: Report, step: StepName, verdict: StepVerdict) -> str:
    """What a box of remedies came to.

    Args:
        report: With every try of the box.
        step: ``FIX_WEIGHTS`` or ``FIX_ACTIVATIONS``.
        verdict: How it ended.
    """
    tried = [item for item in report.remedies if item.step == step.value]
    kept = ", ".join(item.title for item in tried if item.kept)
    if verdict is StepVerdict.PASSED:
        return f"Repaired by {kept}: the loss is within the tolerance." if kept else verdict.advice
    if verdict is StepVerdict.NOISE:
        return f"{kept} helped. {verdict.advice}" if kept else verdict.advice
    if kept:
        return f"{kept} helped, but the loss still exceeds the tolerance; it stays with what helped."
    if not tried:
        return f"No remedy of the {_NOUN[step]} may be tried: `remedies` names none of this box."
    return f"None of {len(tried)} remedies helped beyond noise, so all of them were undone."


def after_single_repairs(remedies: Sequence[Remedy], verdict: StepVerdict, details: Mapping[str, Any]) -> str:
    """What the repair of single quantizers came to.

    Args:
        remedies: Every try.
        verdict: How it ended.
        details: The step's details, with the setting and its cost.
    """
    changed = details["changed"]
    named = ", ".join(f"{name} ({text})" for name, text in list(changed.items())[:5])
    more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
    cost, plain = details["cost"], details["cost_of_target"]
    price = (
        f"{cost['raised']} of all quantizers have more bits, which costs "
        f"{_share(cost['size_bytes'], plain['size_bytes'])} of size and "
        f"{_share(cost['bit_operations'], plain['bit_operations'])} of bit-operations"
    )
    if verdict is StepVerdict.PASSED and any(item.kept for item in remedies):
        return f"Repaired: {named}{more}. {price}."
    if verdict is StepVerdict.FAILED and remedies:
        blocking = ", ".join(details.get("blocking", ()))
        what_next = f" The next cheapest thing to try: {details['next']}." if details.get("next") else ""
        text = f"{len(remedies)} repairs of single quantizers did not suffice; the worst remain {blocking}. {price}."
        return f"{text}{what_next}"
    return "There was nothing to try: no quantizer may have another range or more bits." if not remedies else price


def _share(value: float, base: float) -> str:
    """The increase over a base, in percent."""
    return f"{100 * (value / base - 1):+.1f} %" if base else "0 %"


def on_failure(report: Report) -> str:
    """Which box costs the score at the end, and the cheapest thing to try next."""
    guilty = [noun for noun in _TRIES if _ends_badly(report, noun)]
    where = " and ".join(guilty) or "the two together, neither of them alone"
    advice = "; ".join(_TRIES[noun] for noun in guilty) or "more bits for weights or for activations"
    return f"The loss exceeds the tolerance; it comes from {where}. The next cheapest thing to try: {advice}."


def _ends_badly(report: Report, noun: str) -> bool:
    """Whether weights or activations alone exceed the tolerance in the end."""
    for step in reversed(report.steps):
        if step.step.value == noun:
            return step.verdict is StepVerdict.FAILED
        if noun in step.details:
            return bool(step.details[noun]["verdict"] == StepVerdict.FAILED.value)
    return False

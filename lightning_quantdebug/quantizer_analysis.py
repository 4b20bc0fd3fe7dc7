"""The step `per_quantizer`: which quantizers are to blame, how sure that is, why, and what would help.

Puts together what other rooms know: the estimate from gradients, the exact table, the causes of the guilty ones, and
what other settings would give at each quantizer, from tensors that were kept on the way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from lightning_quantdebug.calibration import CalibrationRuns
from lightning_quantdebug.counterfactuals import TensorSamples, all_counterfactuals
from lightning_quantdebug.errors import QuantDebugError
from lightning_quantdebug.estimate import Estimate, Estimator
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.measurement import Measurement, is_guilty
from lightning_quantdebug.quantizer_causes import quantizer_causes
from lightning_quantdebug.rank_agreement import from_rank_zero, led_by_rank_zero
from lightning_quantdebug.report import Cause, Finding, Sensitivity, StepVerdict
from lightning_quantdebug.sensitivity import Bench, Sensitivities, Table
from lightning_quantdebug.settings import Analysis
from lightning_quantdebug.statistics import samples_to_resolve
from lightning_quantdebug.target import Kind, Mode
from lightning_quantdebug.tensor_probes import shown

ESTIMATE_SAMPLES = 128
"""Enough to order quantizers by the noise of the output: Spearman 0.98 with the order of 1,000 samples (capture notes:
32 samples 0.94 to 0.97)."""

MOST_SUSPECTS = 5
"""Quantizers whose causes are looked for, so that the report stays one page."""

LEAST_DAMAGE = 0.1
"""Share of all damage from which on a quantizer is looked at although its loss can not be told from noise: with less,
taking it away would move the output's SQNR by less than half a decibel."""

_ESTIMATION_FAILS = (QuantDebugError, RuntimeError, TypeError, ValueError)
# A step that is run with gradients may meet what it never does in validation, such as `.numpy()` on such a tensor.


@dataclass(frozen=True)
class Analysed:
    """What the step came to.

    Attributes:
        rows: Every quantizer, worst first.
        findings: Why the suspects are what they are.
        verdict: Whether single quantizers are to blame.
        advice: The sentence that the user reads.
        details: Further plain values.
    """

    rows: tuple[Sensitivity, ...]
    findings: tuple[Finding, ...]
    verdict: StepVerdict
    advice: str
    details: dict[str, Any] = field(default_factory=dict)


def analyse(bench: Bench, permitted: float) -> Analysed:
    """Analyse every quantizer of a calibrated network.

    Args:
        bench: What to work on.
        permitted: The tolerance in the metric's units.

    Raises:
        EvaluationError: If the score is the same whatever the network returns.
    """
    session, settings = bench.session, bench.settings
    names = [name for name, quantizer in session.quantizers.items() if quantizer.is_calibrated]
    bench.describe("per_quantizer: estimate")
    estimates, why_not = estimated(bench)
    order = sorted(names, key=lambda name: -_weight(estimates.get(name)))
    samples = TensorSamples(session)
    bench.visit = lambda: _kept(session, samples)
    table = Table()
    if settings.analysis is not Analysis.ESTIMATE:
        work = Sensitivities(bench, order)
        work.dry_run()
        table = work.exhaust() if settings.analysis is Analysis.EXHAUSTIVE else work.race()
        if settings.reverse_analysis:
            table = work.reverse()
    bench.describe("per_quantizer: causes")
    runs = CalibrationRuns(session, bench.evaluator, None, settings.calibration_batches)
    instead = led_by_rank_zero(runs, lambda led: _counterfactuals(session, samples, led))
    rows = _rows(session, table, estimates, permitted, instead)
    suspects = _suspects(rows)
    causes = led_by_rank_zero(runs, lambda led: quantizer_causes(session, led, [row.quantizer for row in suspects]))
    findings = [*_without_score(table), *causes]
    needed, few = _unresolved(bench, table, permitted)
    details = {**_details(table, estimates, why_not), **({"samples_to_resolve": needed} if needed else {})}
    guilty = [row for row in rows if row.guilty]
    verdict = StepVerdict.FAILED if guilty else StepVerdict.NOISE if suspects else StepVerdict.PASSED
    return Analysed(tuple(rows), tuple(findings), verdict, _advice(rows, suspects, table) + few, details)


def estimated(bench: Bench) -> tuple[dict[str, Estimate], str]:
    """The estimates of all quantizers by name, or none and the reason."""
    session = bench.session
    estimator = Estimator(session)

    def around(call: Callable[[], Any], *_: Any) -> Any:
        def run() -> Any:
            return session.run(call, step=True)

        with torch.enable_grad():
            estimator.observe(run)
        # What counts is logged without a graph behind it.
        with session.modes(Mode.BYPASS):
            return run()

    batches = max(1, bench.reference.count)
    size = max(1.0, (bench.reference.samples or batches) / batches)
    found: dict[str, Estimate] = {}
    why_not = ""
    try:
        bench.evaluator.run_unchecked(around, limit=min(batches, math.ceil(ESTIMATE_SAMPLES / size)))
        found = estimator.estimates()
    except _ESTIMATION_FAILS as error:
        why_not = f"{type(error).__name__}: {error}"
    return from_rank_zero((found, why_not))


def _weight(estimate: Estimate | None) -> float:
    """What orders the work: the worst first, and what was not estimated before all others."""
    if estimate is None:
        return math.inf
    return estimate.noise if estimate.kl is None else estimate.kl


# Tensors that are looked at on the way.


def _kept(session: Instrumentation, samples: TensorSamples) -> AbstractContextManager[None]:
    """Every quantizer of an activation shows its tensor to be sampled while the block runs."""
    names = [quantizer.name for quantizer in session.select(kind=Kind.ACTIVATION)]
    return shown(session, {name: partial(samples.keep, name) for name in names})


def _counterfactuals(session: Instrumentation, samples: TensorSamples, runs: Any) -> dict[str, dict[str, float]]:
    """What other settings would give at each quantizer, from the kept tensors and the weights."""
    found: dict[str, dict[str, float]] = {}

    def visit(run: Callable[[], Any], index: int) -> None:
        if not samples.names:
            with _kept(session, samples):
                run()
        found.update(all_counterfactuals(session, samples, run))

    runs(visit, 1)
    return found


# The table.


def _rows(
    session: Instrumentation,
    table: Table,
    estimates: Mapping[str, Estimate],
    permitted: float,
    instead: Mapping[str, Mapping[str, float]],
) -> list[Sensitivity]:
    """Every quantizer, those that were measured first, worst first among them."""
    measured = [
        *table.alone,
        *sorted((n for n in estimates if n not in table.alone), key=lambda n: -_weight(estimates[n])),
    ]
    rows = []
    for name in measured:
        quantizer = session.quantizers[name]
        row = Sensitivity(name, quantizer.kind.value, quantizer.bit_width, None, None, None, None, "estimate")
        estimate, found = estimates.get(name), table.alone.get(name)
        if estimate is not None:
            row = replace(row, sqnr_db=estimate.sqnr_db, kl=estimate.kl, samples=estimate.samples)
            row = replace(row, task_loss=estimate.task_loss)
        if found is not None:
            row = _measured_row(row, found, permitted)
        off = table.off.get(name)
        rows.append(
            replace(row, loss_when_off=None if off is None else off.loss, counterfactuals=dict(instead.get(name, {})))
        )
    return rows


def _measured_row(row: Sensitivity, found: Measurement, permitted: float) -> Sensitivity:
    """A row with the exact numbers."""
    return replace(
        row,
        score=found.score,
        loss=found.loss,
        interval=found.interval,
        sqnr_db=found.sqnr_db,
        kl=found.kl,
        samples=found.samples,
        method="exact" if found.whole else "race",
        guilty=is_guilty(found, permitted),
    )


def damage_of(row: Sensitivity) -> float:
    """How far a quantizer moves the output: the divergence of its classes, else its noise over the signal."""
    if row.kl is not None:
        return row.kl
    return 0.0 if row.sqnr_db is None else 10.0 ** (-row.sqnr_db / 10.0)


def _suspects(rows: Sequence[Sensitivity]) -> list[Sensitivity]:
    """The guilty ones; where there are none, those that do most of the damage."""
    guilty = [row for row in rows if row.guilty]
    total = math.fsum(damage_of(row) for row in rows)
    if not guilty and math.isfinite(total) and total > 0:
        guilty = [row for row in rows if damage_of(row) >= LEAST_DAMAGE * total]
    return guilty[:MOST_SUSPECTS]


# What is said.


def _without_score(table: Table) -> list[Finding]:
    """Quantizers that alone make the score no number."""
    return [
        Finding(Cause.NON_FINITE, "alone it makes the score NaN or infinite", name)
        for name, found in table.alone.items()
        if found.score is None
    ]


def _unresolved(bench: Bench, table: Table, permitted: float) -> tuple[int, str]:
    """How many samples would tell single losses as well as the tolerance asks for, in numbers and words; 0: enough."""
    widths = sorted(
        (found.interval[1] - found.interval[0]) / 2
        for found in table.alone.values()
        if found.whole and found.interval is not None
    )
    half, samples = (widths[len(widths) // 2] if widths else 0.0), bench.reference.samples
    if not (permitted > 0 and samples and half > permitted):
        return 0, ""
    needed = samples_to_resolve(samples, (-half, half), permitted)
    return needed, (
        f" With {samples} samples the loss of a single quantizer is known to ±{half:.3g}, the tolerance is "
        f"{permitted:.3g}: about {needed} samples would do. The order by the output needs no more."
    )


def _advice(rows: Sequence[Sensitivity], suspects: Sequence[Sensitivity], table: Table) -> str:
    """What the step came to, in one or two sentences."""
    names = ", ".join(row.quantizer for row in suspects)
    total = math.fsum(damage_of(row) for row in rows)
    share = math.fsum(damage_of(row) for row in suspects) / total if total > 0 and math.isfinite(total) else 1.0
    many = sum(row.guilty for row in rows)
    if many:
        more = f" (the worst of {many})" if many > len(suspects) else ""
        text = f"Alone these cost score beyond noise{more}: {names}."
    elif suspects:
        text = (
            f"No single quantizer costs score beyond noise. By how far they move the output the worst are {names}, "
            f"{share:.0%} of all damage."
        )
    else:
        text = "No single quantizer costs score beyond noise, and none does much more damage than the others."
    if table.left_out:
        text += f" Time ran out for {len(table.left_out)} of them: the rest of the order is a first look."
    return text


def _details(table: Table, estimates: Mapping[str, Estimate], why_not: str) -> dict[str, Any]:
    """What the numbers are made of."""
    found = table.alone.values()
    details: dict[str, Any] = {
        "quantizers": len(table.alone) or len(estimates),
        "exact": sum(one.whole for one in found),
        "ranked_by": "divergence" if any(one.kl is not None for one in found) else "output noise",
        "estimate_samples": max((estimate.samples for estimate in estimates.values()), default=0),
        "left_out": list(table.left_out),
    }
    if why_not:
        details["no_estimate"] = why_not
    if table.way:
        details["way"] = table.way
    if table.cost is not None:
        details["predicted"] = table.cost.text
    return details

"""The steps `per_quantizer` and `fix_quantizers` of a walk: what they work on, and what the report learns from them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lightning_quantdebug.advice import after_single_repairs
from lightning_quantdebug.analysis_store import AnalysisStore, analysis_key
from lightning_quantdebug.calibration import CalibrationRuns
from lightning_quantdebug.errors import EvaluationError
from lightning_quantdebug.evaluation import Evaluation, Evaluator
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.quantizer_analysis import analyse
from lightning_quantdebug.quantizer_repair import QuantizerRepair, RepairBench
from lightning_quantdebug.report import Report, Step, StepName, StepVerdict
from lightning_quantdebug.sensitivity import Bench
from lightning_quantdebug.settings import Settings
from lightning_quantdebug.side_by_side import Measured, OutputCache, one_by_one
from lightning_quantdebug.target import Mode

_TOO_LATE = "Time ran out: what was kept so far stays. Raise `max_time`, or lower `limit_batches`."
_NO_RANKING = "No quantizer was measured, so that none can be called the worst."


@dataclass(frozen=True)
class QuantizerWork:
    """What both steps work on.

    Attributes:
        session: Calibrated.
        evaluator: Runs the user's validation.
        settings: The settings of the walk.
        reference: FP32 on all of the evaluator's batches.
        calibration: The loader of calibration batches, see ``calibration_loader``.
        directory: Where a killed analysis leaves what it has measured; ``None``: nowhere.
        is_late: Whether the time budget is spent.
        describe: Told what happens, in words.
        tell: Told what the user shall be able to read afterwards too.
        advance: Called after each evaluation.
    """

    session: Instrumentation
    evaluator: Evaluator
    settings: Settings
    reference: Evaluation
    calibration: Any = None
    directory: Path | None = None
    is_late: Callable[[], bool] = lambda: False
    describe: Callable[[str], None] = lambda text: None
    tell: Callable[[str], None] = lambda text: None
    advance: Callable[[], None] = lambda: None


def per_quantizer(
    work: QuantizerWork, report: Report, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[Step, Report]:
    """Each quantizer alone: which of them are to blame, and why.

    Returns:
        The step, and the report with the table and the findings.
    """
    path = None if work.directory is None else work.directory / "analysis.json"
    store = AnalysisStore(path, analysis_key(work.session, work.settings, work.reference))
    bench = Bench(
        work.session,
        work.evaluator,
        work.settings,
        work.reference,
        store,
        is_late=work.is_late,
        describe=work.describe,
        tell=work.tell,
        progress=progress,
    )
    try:
        found = analyse(bench, work.settings.tolerance.permitted_loss(work.reference.score))
    except EvaluationError as error:
        return Step(StepName.PER_QUANTIZER, StepVerdict.NOT_RUN, advice=str(error)), report
    told = {(finding.cause, finding.quantizer) for finding in report.findings}
    new = [finding for finding in found.findings if (finding.cause, finding.quantizer) not in told]
    report = replace(report.with_findings(*new), sensitivity=found.rows)
    return Step(StepName.PER_QUANTIZER, found.verdict, advice=found.advice, details=found.details), report


def fix_quantizers(work: QuantizerWork, report: Report) -> tuple[Step, Report, Evaluation | None]:
    """Repair single quantizers, worst first.

    Returns:
        The step, the report with every try, and the evaluation with all quantizers on as they are now, where the score
        is a number.
    """
    if not report.sensitivity:
        return Step(StepName.FIX_QUANTIZERS, StepVerdict.NOT_RUN, advice=_NO_RANKING), report, None
    session = work.session
    cache = OutputCache(session, partial(session.modes, Mode.BYPASS))

    def measure() -> Measured:
        found = one_by_one(work.evaluator, cache, partial(session.modes, Mode.QUANTIZE))
        work.advance()
        return found

    runs = CalibrationRuns(session, work.evaluator, work.calibration, work.settings.calibration_batches)
    bench = RepairBench(session, runs, measure, work.settings, work.reference, work.is_late, work.describe)
    repair = QuantizerRepair(bench, report.sensitivity)
    report = repair.walk(report)
    details = repair.details()
    advice = _TOO_LATE if repair.is_late else after_single_repairs(repair.remedies, repair.verdict, details)
    evaluation = repair.evaluation
    if not math.isfinite(evaluation.score):
        return Step(StepName.FIX_QUANTIZERS, repair.verdict, advice=advice, details=details), report, None
    step = Step(
        StepName.FIX_QUANTIZERS,
        repair.verdict,
        evaluation.score,
        repair.loss,
        repair.interval,
        advice,
        details=details,
    )
    return step, report, evaluation

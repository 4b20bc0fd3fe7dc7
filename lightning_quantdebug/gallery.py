"""What a walk keeps for its pictures: the moments that it went through, and what was seen at them."""

from __future__ import annotations

from dataclasses import replace

from lightning_quantdebug.calibration import CalibrationRuns
from lightning_quantdebug.class_shift import predictions
from lightning_quantdebug.evaluation import Evaluation, Evaluator
from lightning_quantdebug.flowchart import to_blame
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.rank_agreement import led_by_rank_zero
from lightning_quantdebug.report import Report, Step, StepName, StepVerdict
from lightning_quantdebug.tensor_views import Moment, tensor_views
from lightning_quantdebug.weight_symptoms import MOST_BATCHES


class Gallery:
    """The moments of one walk.

    Args:
        evaluator: Runs the user's validation, whose batches are looked at.

    Attributes:
        moments: The session's states, after calibration and after each box that has changed it.
    """

    def __init__(self, evaluator: Evaluator) -> None:
        """Nothing is kept yet."""
        self.evaluator = evaluator
        self.moments: list[Moment] = []
        self._seen = 0

    def keep(self, step: StepName, session: Instrumentation) -> None:
        """Keep the session's state after a step; it holds the small tensors of encodings and adjustments."""
        self.moments.append(Moment(step, session.state()))

    def visualize(self, session: Instrumentation, report: Report) -> tuple[Step, Report]:
        """Look at the tensors that are to blame, as they are now and as they were before.

        Returns:
            The step, and the report with what was seen.
        """
        report = self.look(session, report)
        shown = [view.quantizer for view in report.visuals.tensors]
        advice = f"Look at the pictures of {', '.join(shown)}." if shown else "No tensor to blame was reached."
        return Step(StepName.VISUALIZE, StepVerdict.PASSED, advice=advice, details={"tensors": shown}), report

    def look(self, session: Instrumentation, report: Report) -> Report:
        """The report with the tensors to blame at the moments that were not looked at yet."""
        new, self._seen = self.moments[self._seen :], len(self.moments)
        blamed = to_blame(report)
        if not new or not blamed:
            return report
        runs = CalibrationRuns(session, self.evaluator, None, MOST_BATCHES)
        known = report.visuals.tensors
        views = led_by_rank_zero(runs, lambda led: tensor_views(session, led, blamed, new, known))
        return replace(report, visuals=replace(report.visuals, tensors=views))

    def predict(self, session: Instrumentation, report: Report, reference: Evaluation) -> Report:
        """The report with the classes as first quantized and as the walk leaves them."""
        ends = [self.moments[0], *self.moments[1:][-1:]]
        found = predictions(session, self.evaluator, reference, ends)
        return replace(report, visuals=replace(report.visuals, predictions=found))


def after_training(session: Instrumentation, evaluator: Evaluator, report: Report) -> Report:
    """The report with the tensors that it shows, as QAT has left them.

    Args:
        session: With the trained scales, on the trained weights; left as it was.
        evaluator: Runs the user's validation; all ranks must call this together.
        report: Of the walk ahead of the training.
    """
    known = report.visuals.tensors
    if not known:
        return report
    names, moment = {view.quantizer: view.why for view in known}, Moment(StepName.QAT, session.state())
    runs = CalibrationRuns(session, evaluator, None, MOST_BATCHES)
    views = led_by_rank_zero(runs, lambda led: tensor_views(session, led, names, [moment], known))
    return replace(report, visuals=replace(report.visuals, tensors=views))

"""What other calibration sets would have given: the spread of the ranges, and the score of a few random draws."""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean
from typing import Any

from lightning_quantdebug.calibration_draws import draw, random_orders, range_spread, record_draws
from lightning_quantdebug.evaluation import Evaluation
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.layers import Runs
from lightning_quantdebug.rank_agreement import gather
from lightning_quantdebug.target import Kind

SCORED_DRAWS = 3
"""Each costs an evaluation. Three tell whether the score depends on the draw at all, not by how much on average."""

SPREAD_DRAWS = 4
"""Of each size. A range of least squared error is searched for each draw and each quantizer."""


def draws_report(
    session: Instrumentation, runs: Runs, measure: Callable[[], Evaluation], samples: int
) -> dict[str, Any] | None:
    """How far ranges and score depend on which calibration batches were drawn.

    Args:
        session: A calibrated instrumentation; it is left as it was.
        runs: The calibration batches.
        measure: The score with the session as it is then.
        samples: Samples of all calibration batches, 0 where it is not known.

    Returns:
        Plain values: ``spread`` (see :class:`~lightning_quantdebug.calibration_draws.Spread`), ``scores`` of draws of
        half the batches, and ``advice``; ``None`` where there are fewer than two batches.
    """
    recorded = [one for rank in gather(record_draws(session, runs)) for one in rank]
    if len(recorded) < 2 or not recorded[0]:
        return None
    specs = {q.name: q.spec for q in session.select(kind=Kind.ACTIVATION) if q.name in recorded[0]}
    spread = range_spread(recorded, specs, max(1, samples // len(recorded)), SPREAD_DRAWS)
    state, scores = session.state(), []
    try:
        for order in random_orders(len(recorded), SCORED_DRAWS):
            draw(session, recorded, order[: len(recorded) // 2])
            scores.append(measure().score)
    finally:
        session.restore(state)
    advice = (
        f"{spread.advice} With ranges from {SCORED_DRAWS} random halves of the calibration batches the score is "
        f"{fmean(scores):.4g} on average, from {min(scores):.4g} to {max(scores):.4g}."
    )
    return {"spread": spread.to_dict(), "scores": scores, "advice": advice}

"""Keeps a remedy that claims to leave the FP32 function as it is only if it does, measured on the network itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_quantdebug.adjustment import Adjustment, Applied
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.interception import OpKey
from lightning_quantdebug.layers import Runs
from lightning_quantdebug.report import Cause, Finding
from lightning_quantdebug.traces import relative_error

# Rescaling changes each FP32 product by about 1e-7 of itself: networks of 2 to 53 layers were measured at 5e-8 to 3e-7.
# A rule that is wrong for one channel of a hundred shows as 1e-3 and more.
EXACTNESS = 1e-5
_BATCHES = 2


def adjust_exactly(
    session: Instrumentation, runs: Runs, changes: Mapping[OpKey, Adjustment], remedy: str, applied: Applied
) -> Applied:
    """Adjust operations; keep that only if no output of the network changes.

    The outputs ``y`` and ``y'`` before and after, in FP32 with batch normalizations folded, are compared on up to two
    batches: ``|y' - y| / |y|`` in the Euclidean norm must be at most 1e-5 for every output. Else the session's state
    is restored bit for bit.

    Args:
        session: The instrumented network.
        runs: Goes over the calibration batches.
        changes: What to adjust.
        remedy: Name of the remedy, as the report has it.
        applied: What to tell if the adjustments are kept.

    Returns:
        ``applied`` with the measured change in its note, or what was skipped and a finding.

    Examples:
        >>> import torch
        >>> from lightning_quantdebug.instrument import batch_runs, instrument
        >>> model, batch = torch.nn.Linear(2, 2).eval(), torch.randn(4, 2)
        >>> with instrument(model, batch) as q:
        ...     q.calibrate([batch])
        ...     doubled = {q.layers[0].key: Adjustment(weight_scale=torch.tensor(2.0))}
        ...     told = adjust_exactly(q, batch_runs(q, [batch]), doubled, "doubling", Applied(("weight",)))
        ...     told.changed, [finding.cause.value for finding in told.findings], dict(q.adjustments)
        ((), ['changed_function'], {})
    """
    state = session.state()
    before = _outputs(session, runs)
    session.adjust(changes)
    after = _outputs(session, runs)
    errors = [
        (relative_error(new[name], tensor) if name in new else float("inf"), name)
        for old, new in zip(before, after, strict=True)
        for name, tensor in old.items()
    ]
    worst, name = max(errors, default=(0.0, ""))
    if not worst <= EXACTNESS:
        session.restore(state)
        evidence = (
            f"{remedy} changed the FP32 output {name!r} by {worst:.1e} of its norm, where {EXACTNESS:.0e} is rounding; "
            "it was undone"
        )
        return Applied(skipped=applied.skipped, note=evidence, findings=(Finding(Cause.CHANGED_FUNCTION, evidence),))
    reset_weight_ranges(session, runs)
    note = f"{applied.note}; FP32 outputs changed by at most {worst:.1e}"
    return Applied(applied.changed, applied.skipped, note, applied.findings)


def reset_weight_ranges(session: Instrumentation, runs: Runs) -> None:
    """Set the range of every weight anew, from what it is now; frozen ones stay."""

    def visit(run: Callable[[], Any], index: int) -> None:
        session.reset_weight_ranges(run)

    runs(visit, session.topology.batches_to_reach_all())


def _outputs(session: Instrumentation, runs: Runs) -> list[dict[str, Tensor]]:
    """What the network returns in FP32 on the first batches."""
    found: list[dict[str, Tensor]] = []

    def visit(run: Callable[[], Any], index: int) -> None:
        found.append(session.outputs(run))

    with session.reference():
        runs(visit, _BATCHES)
    return found

"""Record the network on calibration batches, place quantizers and set their ranges, inside a running Trainer.

Everything goes through the user's own ``validation_step`` in eval mode without gradients, because that is what the
score is measured with; only the batches are those of the calibration loader.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_quantdebug.errors import CaptureError, EvaluationError
from lightning_quantdebug.evaluation import Evaluator
from lightning_quantdebug.instrument import Instrumentation
from lightning_quantdebug.layers import Visit
from lightning_quantdebug.lightning_compat import is_overridden
from lightning_quantdebug.observer import Observer
from lightning_quantdebug.rank_agreement import gather
from lightning_quantdebug.settings import CalibrationSource, Settings
from lightning_quantdebug.target import Kind

# Batches that are recorded before the first placement. A branch that none of them takes is found while observing, and
# all calibration batches are then recorded.
RECORDED_BATCHES = 2


def calibration_loader(settings: Settings, given: Any) -> Any:
    """The loader argument of :meth:`Evaluator.run` for the calibration source: ``"train"``, ``None`` or a loader."""
    if settings.calibration is CalibrationSource.VAL:
        return None
    return "train" if settings.calibration is CalibrationSource.TRAIN else given


def capture(session: Instrumentation, evaluator: Evaluator, loader: Any, batches: int = RECORDED_BATCHES) -> None:
    """Record some batches and place quantizers.

    Args:
        session: The instrumentation of the LightningModule.
        evaluator: Runs the user's validation step.
        loader: See :func:`calibration_loader`.
        batches: Number of batches to record.

    Raises:
        CaptureError: If nothing can be quantized, or the ranks of a distributed run recorded different networks.
        EvaluationError: If the validation step can not run on a calibration batch; the way out is named.
    """
    _run(evaluator, session.record_step, loader, batches)
    session.place()
    _check_ranks(session)


def set_ranges(session: Instrumentation, evaluator: Evaluator, loader: Any, batches: int) -> int:
    """Observe calibration batches and set every range.

    Args:
        session: A captured instrumentation.
        evaluator: Runs the user's validation step.
        loader: See :func:`calibration_loader`.
        batches: Number of calibration batches on each rank.

    Returns:
        The number of samples seen, 0 where it can not be told.
    """
    samples = _observe(session, evaluator, loader, batches)
    if any(gather(bool(session.coverage.unseen))):
        capture(session, evaluator, loader, batches)
        samples = _observe(session, evaluator, loader, batches)
    return samples


def recalibrate(session: Instrumentation, evaluator: Evaluator, loader: Any, batches: int) -> None:
    """Set every range anew after a remedy has moved activations; the network itself is the one that was recorded."""
    _observe(session, evaluator, loader, batches)


class CalibrationRuns:
    """The calibration batches as remedies take them (:data:`lightning_quantdebug.layers.Runs`).

    Each run goes through the user's own ``validation_step``. What it returns and logs is that of the last run of a
    batch; batches of which no run came to its end are run once more in FP32 where somebody would miss them.

    Args:
        session: A captured instrumentation.
        evaluator: Runs the user's validation step.
        loader: See :func:`calibration_loader`.
        batches: Number of calibration batches on each rank.
    """

    def __init__(self, session: Instrumentation, evaluator: Evaluator, loader: Any, batches: int) -> None:
        """Nothing runs yet."""
        self.session = session
        self.evaluator = evaluator
        self.loader = loader
        self.batches = batches

    def __call__(self, visit: Visit, most: int | None = None) -> None:
        """Call ``visit(run, index)`` for each calibration batch, or for the first ``most`` of them."""
        trainer, module = self.evaluator.trainer, self.evaluator.pl_module
        outputs_are_read = is_overridden(trainer, "on_validation_batch_end", module)
        count = 0

        def around_step(call: Callable[[], Any], batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
            nonlocal count
            last: list[Any] = []

            def run() -> Any:
                last.clear()
                last.append(self.session.run(call, step=True))
                return last[0]

            visit(run, count)
            count += 1
            # A run that was cut short has logged and returned nothing, which the end of an epoch could not bear for all
            # batches, nor the user's own hook for any.
            if not last and (count == 1 or outputs_are_read):
                return call()
            return last[0] if last else None

        _run(self.evaluator, around_step, self.loader, self.batches if most is None else min(most, self.batches))


def _observe(session: Instrumentation, evaluator: Evaluator, loader: Any, batches: int) -> int:
    """One pass over the calibration batches; the ranks' statistics are merged."""
    with session.observing():
        samples = _run(evaluator, session.around_step, loader, batches)
        _merge_ranks(session)
    return samples


def _run(evaluator: Evaluator, around_step: Any, loader: Any, batches: int) -> int:
    """Run the validation step over calibration batches."""
    try:
        return evaluator.run(around_step, loader=loader, limit=batches).samples or 0
    except (TypeError, ValueError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        if isinstance(error, (CaptureError, EvaluationError)) or loader is None:
            raise
        raise EvaluationError(
            f"`validation_step` failed on a calibration batch: {type(error).__name__}: {error}. Ranges are set by "
            "running it on training batches; if those look different, pass calibration='val' or a DataLoader of "
            "batches that `validation_step` takes."
        ) from error


def _check_ranks(session: Instrumentation) -> None:
    """Raise if the ranks of a distributed run placed different quantizers."""
    names = gather(sorted(session.quantizers))
    different = sorted({name for rank in names for name in rank} - set(names[0]).intersection(*names))
    if different:
        raise CaptureError(
            f"The ranks ran different parts of the network, so that they disagree on the quantizers {different[:5]}. "
            "Raise `calibration_batches`, so that every rank sees every branch, or diagnose on one device."
        )


def _merge_ranks(session: Instrumentation) -> None:
    """Give every rank the statistics of all ranks."""
    activations = {q.name: q for q in session.select(kind=Kind.ACTIVATION)} if session.quantizers else {}
    ranks = gather({name: quantizer.observer.state_dict() for name, quantizer in activations.items()})
    if len(ranks) == 1:
        return
    for name, quantizer in activations.items():
        merged = Observer()
        for rank in ranks:
            other = Observer()
            other.load_state_dict(rank[name])
            merged.merge(other)
        quantizer.observer = merged

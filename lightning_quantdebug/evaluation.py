"""The user's own validation, run out of turn: their step, hooks, metrics and DataLoaders, for one score.

A pass puts a fresh validation loop where the running Trainer looks for it, runs it, reads the monitored metric and
puts everything back: loop, loggers, callbacks, logged metrics, random state, and whatever the user's module counted or
collected meanwhile. Calling ``trainer.validate`` inside a fit would destroy the fit, re-running the Trainer's own loop
leaves traces in its progress and checkpoints, and a loop written by hand would have to copy how ``self.log`` names,
averages and synchronises; a fresh loop of Lightning's own has none of these faults.

Passes may run in every hook in which no validation of the Trainer's own is under way, and in ``on_validation_end``.
"""

from __future__ import annotations

import math
import time
import weakref
from dataclasses import dataclass, replace
from typing import Any

from lightning_quantdebug import lightning_compat as compat
from lightning_quantdebug.batch_scores import BatchRecorder, BatchScore
from lightning_quantdebug.errors import EvaluationError, LanesError, NonFiniteScoreError, SettingsError
from lightning_quantdebug.evaluation_data import EvaluationData
from lightning_quantdebug.lanes import Schedule
from lightning_quantdebug.lightning_compat import ModuleLike, TrainerLike
from lightning_quantdebug.loader_copies import check_limit
from lightning_quantdebug.random_state import isolated_random_state
from lightning_quantdebug.rank_agreement import gather, joined_batches, mean_metrics, total_samples
from lightning_quantdebug.validation_pass import AroundStep, Outcome, PassRequest, neutral_torch, run_pass

__all__ = ["AroundStep", "BatchScore", "Evaluation", "Evaluator"]

# Sharded weights, or batches that do not come through `validation_step` as ordinary tensors.
_REFUSED_STRATEGIES = (
    "DeepSpeedStrategy",
    "FSDPStrategy",
    "ModelParallelStrategy",
    "SingleDeviceXLAStrategy",
    "XLAFSDPStrategy",
    "XLAStrategy",
)
# Weights that are quantized already.
_REFUSED_PRECISIONS = ("BitsandbytesPrecision", "TransformerEnginePrecision")

# Trainers that a pass is running in now.
_running: weakref.WeakSet[Any] = weakref.WeakSet()


@dataclass(frozen=True)
class Evaluation:
    """Outcome of one pass.

    Args:
        score: Value of the monitored metric, the same on every rank (their mean, where they did not agree). ``nan`` if
            the pass ran over a loader other than validation's and the metric is not defined there.
        metrics: Every scalar that was logged, by the names that callbacks see.
        batches: Score of each batch, those of all ranks in order of rank; ``None`` if the metric has none.
        samples: Number of samples behind the score, over all ranks; ``None`` if it can not be told.
        seconds: Wall time of the pass.
        count: Number of batches that this rank has run.
    """

    score: float
    metrics: dict[str, float]
    batches: tuple[BatchScore, ...] | None
    samples: int | None
    seconds: float
    count: int = 0


class Evaluator:
    """Runs validation passes inside a running Trainer and leaves no trace of them.

    Args:
        trainer: A Trainer inside ``fit`` or ``validate``.
        pl_module: Its LightningModule.
        monitor: Name of the metric, as in ModelCheckpoint; of several validation loaders with its
            ``/dataloader_idx_<i>``.
        limit_batches: Share (float) or number (int) of each validation loader's batches, within what the Trainer's
            own ``limit_val_batches`` leaves.
        seed: Fixes the order of shuffled loaders, so that every pass sees the same batches.
    """

    def __init__(
        self,
        trainer: TrainerLike,
        pl_module: ModuleLike,
        monitor: str,
        *,
        limit_batches: int | float = 1.0,
        seed: int = 0,
    ) -> None:
        """Keep the settings; nothing is asked of the Trainer yet."""
        check_limit("limit_batches", limit_batches)
        self.trainer = trainer
        self.pl_module = pl_module
        self.monitor = monitor
        self.limit_batches = limit_batches
        self.seed = seed
        self._keeps_user_callbacks = False
        self._higher_is_better: dict[str, bool | None] = {}
        self._data = EvaluationData(trainer)

    def check(self) -> None:
        """Find out, before any work, whether passes can run.

        Raises:
            EvaluationError: If this Trainer, module or Lightning release can not be validated out of turn.
        """
        trainer, pl_module = self.trainer, self.pl_module
        compat.check_lightning(trainer)
        if trainer.barebones:
            raise EvaluationError("`Trainer(barebones=True)` logs no metrics. Remove `barebones` to get a score.")
        _check_plugins(trainer)
        if not compat.is_overridden(trainer, "validation_step", pl_module):
            raise EvaluationError(
                f"`{type(pl_module).__name__}` has no `validation_step`, which is what gives the score "
                f"`{self.monitor}`. Define one that logs it."
            )
        if compat.takes_iterator(pl_module.validation_step):
            raise EvaluationError(
                "`validation_step(self, dataloader_iter)` is not supported: batches must be seen one by one. "
                "Use `validation_step(self, batch, batch_idx)`."
            )
        if trainer.limit_val_batches == 0:
            raise EvaluationError("`Trainer(limit_val_batches=0)` turns validation off, so there is no score.")
        if trainer.state.fn in ("fit", "validate") and not _validation_loop(trainer)._data_source.is_defined():
            raise EvaluationError(
                "There is no validation DataLoader. Define `val_dataloader` or pass one to the Trainer's method."
            )

    def higher_is_better(self, monitor: str | None = None) -> bool | None:
        """Direction that the torchmetrics object behind a metric of the last passes declares, if it is one."""
        return self._higher_is_better.get(self.monitor if monitor is None else monitor)

    def run(
        self,
        around_step: AroundStep | None = None,
        *,
        loader: Any = None,
        limit: int | float | None = None,
        model_seed: int = 0,
    ) -> Evaluation:
        """Run one pass through the user's ``validation_step``.

        Args:
            around_step: Called for each batch as ``around_step(call, batch, batch_idx, dataloader_idx)`` inside the
                Trainer's precision and parallel context. ``call()`` runs the user's step once; when it is called
                again for the same batch, what the earlier call logged and changed in the module is undone first, so
                that the last call counts. Returns what the step returned.
            loader: ``None`` for the validation loaders, ``"train"`` for the training loader, a DataLoader (divided
                among the ranks of a distributed run), or any other iterable of batches (seen whole by each rank).
            limit: Number (int) or share (float) of batches; default: ``limit_batches`` in validation, else all.
            model_seed: Seed of what is random in the step itself (dropout left on, say): each batch draws the same
                numbers in every pass that has the same ``model_seed``.

        Returns:
            The score, the logged metrics and the score of each batch.

        Raises:
            EvaluationError: If the monitored metric is not logged or is no finite number, if the loader can not be
                had, or if the Trainer is at a place where no pass can run.
            SettingsError: If ``loader`` or ``limit`` is none of the above.
        """
        evaluation = self.run_unchecked(around_step, loader=loader, limit=limit, model_seed=model_seed)
        if loader is None:
            self._check_score(evaluation)
        return evaluation

    def run_unchecked(
        self,
        around_step: AroundStep | None = None,
        *,
        loader: Any = None,
        limit: int | float | None = None,
        model_seed: int = 0,
    ) -> Evaluation:
        """Run one pass as :meth:`run` does, whose score may be missing, NaN or infinite (it is NaN if missing).

        Raises:
            EvaluationError: If no pass can run.
            SettingsError: If ``loader`` or ``limit`` can not be used.
        """
        if limit is not None:
            check_limit("limit", limit)
        is_name = isinstance(loader, str)
        if (
            (is_name and loader != "train")
            or isinstance(loader, dict)
            or not (loader is None or hasattr(loader, "__iter__"))
        ):
            raise SettingsError(f"`loader` must be None, 'train' or a DataLoader, got {loader!r}.")
        if self.trainer in _running:
            raise EvaluationError("A validation pass was started inside another one. Start it after the first ended.")
        if compat.outer_validation(self.trainer) == "iterating":
            raise EvaluationError(
                "The Trainer's own validation is under way, and a pass inside it would disturb it. Start the pass in "
                "`on_validation_end` or in a hook of training."
            )
        _running.add(self.trainer)
        try:
            return self._evaluate(around_step, loader, limit, model_seed)
        finally:
            _running.discard(self.trainer)

    def run_lanes(
        self, schedule: Schedule, around_step: AroundStep, *, limit: int | float | None = None
    ) -> dict[str, Evaluation]:
        """Run several evaluations side by side in one pass of validation.

        Each ends with the numbers of a pass of its own (:class:`lightning_quantdebug.lanes.Lanes`).

        Args:
            schedule: Says which evaluations there are, and is told which of them is at work.
            around_step: As in :meth:`run`, called for each batch of each evaluation; it may call its ``call`` once.
            limit: As in :meth:`run`.

        Returns:
            The evaluations by their lanes' names. Their scores are not checked: they may be NaN.

        Raises:
            LanesError: If they must be run one after the other, and why.
            EvaluationError: If no pass can run now.
        """
        if self._keeps_user_callbacks:
            raise LanesError("the metric is logged by a callback")
        if self.trainer in _running or compat.outer_validation(self.trainer) == "iterating":
            raise EvaluationError("Lanes can not be run inside a validation. Start them after it ended.")
        _running.add(self.trainer)
        try:
            request = PassRequest(around_step, self.seed, 0, False, schedule)
            return self._pass(None, self.limit_batches if limit is None else limit, request)
        finally:
            _running.discard(self.trainer)

    def _evaluate(self, around_step: AroundStep | None, loader: Any, limit: Any, model_seed: int) -> Evaluation:
        """One pass, or two where the metric turns out to be logged by one of the user's callbacks."""
        if limit is None:
            limit = self.limit_batches if loader is None else 1.0
        request = PassRequest(around_step, self.seed, model_seed, self._keeps_user_callbacks)
        (evaluation,) = self._pass(loader, limit, request).values()
        if loader is not None:
            return evaluation
        if self.monitor not in evaluation.metrics and not self._keeps_user_callbacks:
            (evaluation,) = self._pass(loader, limit, replace(request, keeps_user_callbacks=True)).values()
            self._keeps_user_callbacks = self.monitor in evaluation.metrics
        return evaluation

    def _pass(self, loader: Any, limit: int | float, request: PassRequest) -> dict[str, Evaluation]:
        """Run the loop once and put together what the ranks found, lane by lane."""
        started = time.monotonic()

        def recorder() -> BatchRecorder:
            return BatchRecorder(self.monitor, lambda batch: compat.batch_size_of(self.trainer, batch))

        with neutral_torch(), isolated_random_state():
            data = self._data.get(loader, limit)
            outcomes = run_pass(self.trainer, self.pl_module, data, recorder, request)
        seconds = time.monotonic() - started
        return {lane: self._evaluation(outcome, seconds) for lane, outcome in outcomes.items()}

    def _evaluation(self, outcome: Outcome, seconds: float) -> Evaluation:
        """What the ranks have found in one lane."""
        logged, recorder = outcome.logged, outcome.recorder
        self._higher_is_better.update(recorder.higher_is_better)
        scalars = {name: value.item() for name, value in logged.items() if value.numel() == 1}
        ranks = gather((scalars, recorder.batches(), recorder.samples()))
        metrics = mean_metrics([rank[0] for rank in ranks])
        return Evaluation(
            score=metrics.get(self.monitor, math.nan),
            metrics=metrics,
            batches=joined_batches([rank[1] for rank in ranks]),
            samples=total_samples([rank[2] for rank in ranks]),
            seconds=seconds,
            count=recorder.count,
        )

    def _check_score(self, evaluation: Evaluation) -> None:
        """Raise unless validation gave the monitored score as a finite number."""
        if self.monitor not in evaluation.metrics:
            available = "`, `".join(evaluation.metrics)
            raise EvaluationError(
                f"`monitor={self.monitor!r}` is not available as a scalar after validation. "
                + (f"Use any of the following: `{available}`." if available else "Validation logs no metric at all.")
            )
        if not math.isfinite(evaluation.score):
            raise NonFiniteScoreError(
                f"The score `{self.monitor}` is {evaluation.score}, where a finite number is needed to compare "
                "configurations. Look at the validation of the FP32 model first."
            )


def _validation_loop(trainer: TrainerLike) -> Any:
    """The Trainer's own validation loop."""
    return getattr(*compat.validation_slot(trainer))


def _check_plugins(trainer: TrainerLike) -> None:
    """Raise for strategies and precisions whose weights can not be fake-quantized in place."""
    for what, plugin, refused in (
        ("strategy", trainer.strategy, _REFUSED_STRATEGIES),
        ("precision", trainer.precision_plugin, _REFUSED_PRECISIONS),
    ):
        found = next((name for name in refused if compat.foreign_isinstance(plugin, name)), None)
        if found is not None:
            raise EvaluationError(
                f"`Trainer({what}=...)` uses {found}, which is not supported. Supported are one device, `ddp` and its "
                "variants, with 32, 64, 16 or bf16 precision, true or mixed."
            )

"""When a callback trains: after a walk that was not enough, in the same fit, or in a fit that is resumed.

A fit is in one of two phases, float and quantized; it changes once, at its end, where Lightning asks whether it is
over (:func:`~lightning_quantdebug.fit_compat.asked_at_the_end`).
"""

from __future__ import annotations

import functools
import math
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from lightning_quantdebug import fit_compat
from lightning_quantdebug import lightning_compat as compat
from lightning_quantdebug.batch_scores import BatchScore
from lightning_quantdebug.best_weights import checkpoint_callback
from lightning_quantdebug.calibration import RECORDED_BATCHES, calibration_loader, capture
from lightning_quantdebug.diagnosis import Diagnosis
from lightning_quantdebug.errors import SettingsError
from lightning_quantdebug.evaluation import Evaluation, Evaluator
from lightning_quantdebug.gallery import after_training
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.qat import Aim, Course, Qat
from lightning_quantdebug.qat_checks import check_callbacks, check_training, reason_never_to_train
from lightning_quantdebug.qat_report import with_training
from lightning_quantdebug.quantized_steps import CoveredSteps, LoadedQuantizers
from lightning_quantdebug.rank_agreement import gather, is_spent
from lightning_quantdebug.report import Report
from lightning_quantdebug.settings import Settings
from lightning_quantdebug.tensorboard import ReviewWriter

if TYPE_CHECKING:
    from lightning_quantdebug.callback import QuantDebug


class TrainingPhase:
    """The training of one callback.

    Args:
        callback: Whose settings, report and files these are.

    Attributes:
        has_walked: Whether this fit has come to its walk, or needs none.
        is_evaluating: Whether the Trainer evaluates a model that was trained with QAT.
    """

    def __init__(self, callback: QuantDebug) -> None:
        """Nothing is trained."""
        self.callback = callback
        self.has_walked = False
        self.is_evaluating = False
        self._qat: Qat | None = None
        self._reference: Evaluation | None = None
        self._state: dict[str, Any] = {}
        self._walked_after: int | None = None
        self._started = self._budget_from = 0.0
        self._steps: CoveredSteps | None = None

    @property
    def settings(self) -> Settings:
        """The callback's."""
        return self.callback.settings

    @property
    def runs(self) -> bool:
        """Whether the epochs of now are trained with quantizers."""
        return self._qat is not None

    def _may_follow(self, trainer: Any) -> bool:
        """Whether training may follow a walk in this fit."""
        return reason_never_to_train(trainer, self.settings) is None

    # Around a fit.

    def attend(self, trainer: Any, pl_module: Any) -> None:
        """Be asked at the end of the fit, if training may follow.

        Raises:
            SettingsError: If training can not follow in this Trainer.
        """
        self._qat, self.has_walked = None, False
        if self._may_follow(trainer):
            check_callbacks(trainer)
            fit_compat.asked_at_the_end(trainer, functools.partial(self._is_over, trainer, pl_module))

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check what training will need; go on with it, if the checkpoint that is resumed is one of it.

        Raises:
            SettingsError: If it can not train, or the checkpoint is one of a training that may not go on.
        """
        if not self._may_follow(trainer):
            if self._state and trainer.ckpt_path is not None:
                raise SettingsError(
                    f"The checkpoint {str(trainer.ckpt_path)!r} was written while QAT ran, whose optimizer trains "
                    "scales as well. Resume it with `qat_epochs` above 0 and when='fit_end', or go on from the FP32 "
                    f"checkpoint {self._state['fp32_checkpoint']!r}."
                )
            return
        check_training(trainer, pl_module, self.settings)
        if self._state and trainer.ckpt_path is not None:
            self._resume(trainer, pl_module)

    def let_go(self, trainer: Any) -> None:
        """Give module and Trainer back."""
        if self._qat is not None:
            self._qat.release()
        if self._steps is not None:
            self._steps.remove()
        self._steps, self.is_evaluating = None, False
        fit_compat.no_more_asked(trainer)

    # The end of a fit.

    def _is_over(self, trainer: Any, pl_module: Any, done: bool) -> bool:
        """Whether the fit is over, where Lightning says ``done``."""
        if self.callback not in trainer.callbacks or not fit_compat.ends_by_itself(trainer):
            return done
        if self._qat is not None:
            if not (done or self._qat.is_over):
                return False
            self._finish(trainer)
            return True
        if not done or self.has_walked:
            return done
        self.has_walked = True
        if self._walked_after == fit_compat.processed_epochs(trainer):
            return True
        self._walked_after = fit_compat.processed_epochs(trainer)
        diagnosis = self.callback.walk(trainer, pl_module)
        if diagnosis is not None and diagnosis.wants_training:
            with self.callback.harmless(trainer):
                self._start(trainer, pl_module, diagnosis)
        return self._qat is None

    def _start(self, trainer: Any, pl_module: Any, diagnosis: Diagnosis) -> None:
        """Train from the next epoch on."""
        assert diagnosis.accepted is not None
        assert diagnosis.session is not None
        reference, quantized = diagnosis.accepted
        direction = self.settings.direction
        worst = math.inf if direction.loss(0.0, math.inf) > 0 else -math.inf
        permitted = self.settings.tolerance.permitted_loss(reference.score)
        aim = Aim(reference.score, permitted, quantized.score if quantized is not None else worst)
        self._keep_fp32_best(trainer)
        qat = Qat(trainer, pl_module, self.settings, diagnosis.session, aim, self.callback.directory(trainer))
        with ExitStack() as undo:
            undo.callback(qat.release)
            qat.start()
            undo.pop_all()
        self._qat, self._reference, self._started = qat, reference, time.monotonic()
        self._budget_from = diagnosis.started
        self._tell(
            trainer,
            f"QuantDebug: repair was not enough (loss {direction.loss(reference.score, aim.start):.4g}, permitted "
            f"{permitted:.4g}). Up to {qat.course.epochs} QAT epochs follow in this fit; the FP32 model is kept as "
            f"{str(qat.fp32_checkpoint)!r}.",
        )

    def _keep_fp32_best(self, trainer: Any) -> None:
        """Note what ModelCheckpoint calls the best, and copy it where QAT would write over it."""
        model_checkpoint = checkpoint_callback(trainer)
        if model_checkpoint is None:
            return
        path, score = model_checkpoint.best_model_path, model_checkpoint.best_model_score
        if path and fit_compat.writes_over(model_checkpoint):
            kept = self.callback.directory(trainer) / "fp32_best.ckpt"
            if trainer.is_global_zero:
                shutil.copy2(path, kept)
            path = str(kept)
        self.callback.fp32_best_model_path = path
        self.callback.fp32_best_model_score = None if score is None else float(score)

    def _finish(self, trainer: Any) -> None:
        """Take the best state, judge it, and write what came out."""
        qat, reference, report = self._qat, self._reference, self.callback.report
        assert qat is not None
        assert reference is not None
        assert report is not None
        self.has_walked = True
        with self.callback.harmless(trainer):
            evaluation = qat.finish()
            seconds = time.monotonic() - self._started
            trained = with_training(report, self.settings, reference, evaluation, qat, seconds)
            if qat.best.epoch:
                evaluator = Evaluator(trainer, qat.pl_module, self.settings.monitor)
                trained = after_training(qat.session, evaluator, trained)
            self.callback.report = trained
            self.callback.deploy(trainer, qat.session, qat.evaluator, evaluation)
            self.callback.write(trainer, qat.directory)
        self._walked_after = fit_compat.processed_epochs(trainer)
        self._state = self._state_of(qat, report) if qat.best.epoch else {}
        self._qat = None
        self.callback.say(trainer)

    def _tell(self, trainer: Any, text: str) -> None:
        """Print on the first process, if anything is to be printed."""
        if self.settings.verbose and trainer.is_global_zero:
            print(text, flush=True)

    # While it trains.

    def on_epoch_start(self) -> None:
        """An epoch begins."""
        if self._qat is not None:
            self._qat.on_epoch_start()
        else:
            self._state = {}

    def on_after_backward(self) -> None:
        """Gradients were computed."""
        if self._qat is not None:
            self._qat.on_after_backward()

    def on_batch_end(self, outputs: Any, batch_idx: int) -> None:
        """A training step was done."""
        if self._qat is not None:
            self._qat.on_batch_end(outputs, batch_idx)

    def on_validation_end(self) -> None:
        """Lightning has validated."""
        if self._qat is not None:
            self._qat.on_validation_end()

    def on_epoch_end(self, trainer: Any) -> None:
        """Log the quantized score of the epoch, and stop where it is good enough or time is up."""
        assert self._qat is not None
        score = self._qat.on_epoch_end()
        budget = self.settings.max_time
        if is_spent(budget, self._budget_from) and not self._qat.is_over:
            self._qat.course.stopped = f"the time budget max_time={budget} was spent"
        if score is None or not trainer.is_global_zero:
            return
        with ReviewWriter(trainer, self._qat.directory, self.callback.tag(trainer)) as writer:
            writer.write_training(self.settings.monitor, score, trainer.global_step)

    # Checkpoints.

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints hold; empty where nothing was trained with quantizers."""
        if self._qat is None:
            return self._state
        assert self.callback.report is not None
        return self._state_of(self._qat, self.callback.report)

    def _state_of(self, qat: Qat, report: Report) -> dict[str, Any]:
        """The state of a training, with the report up to it, in types that ``torch.load(weights_only=True)`` reads."""
        assert self._reference is not None
        return {
            **qat.state_dict(),
            "report": report.to_dict(),
            "reference": asdict(self._reference),
            "fp32_best": (self.callback.fp32_best_model_path, self.callback.fp32_best_model_score),
        }

    def load(self, state: Mapping[str, Any] | None) -> None:
        """Take the state of a checkpoint; ``None``: it holds none."""
        self._state = dict(state or {})

    def _resume(self, trainer: Any, pl_module: Any) -> None:
        """Go on with the training that a checkpoint was taken of."""
        state, settings = self._state, self.settings
        session = Instrumentation(pl_module, settings.target, module=settings.module, exclude=settings.exclude)
        evaluator = Evaluator(trainer, pl_module, settings.monitor)
        loader = calibration_loader(settings, self.callback.given_loader)
        capture(session, evaluator, loader, RECORDED_BATCHES)
        if any(gather(not set(state["session"]["quantizers"]) <= set(session.quantizers))):
            capture(session, evaluator, loader, settings.calibration_batches)
        directory = self.callback.directory(trainer)
        qat = Qat(trainer, pl_module, settings, session, Aim(**state["aim"]), directory, Course(**state["course"]))
        qat.resume(state)
        batches = state["reference"]["batches"]
        scores = None if batches is None else tuple(BatchScore(**batch) for batch in batches)
        self._reference = Evaluation(**{**state["reference"], "batches": scores})
        self.callback.report = Report.from_dict(state["report"])
        self.callback.fp32_best_model_path, self.callback.fp32_best_model_score = state["fp32_best"]
        self._qat, self._started = qat, time.monotonic()
        self._budget_from = self._started
        self._tell(trainer, f"QuantDebug: QAT goes on after {len(qat.course.scores)} of {qat.course.epochs} epochs.")

    # Evaluation of what was trained.

    def evaluates(self, trainer: Any, pl_module: Any) -> bool:
        """Let the Trainer evaluate a model that was trained with QAT with its quantizers; whether it is one."""
        if not self._state:
            return False
        quantizers = LoadedQuantizers(trainer, pl_module, self.settings, self._state["session"])
        self._steps = CoveredSteps(trainer, pl_module, quantizers)
        self._steps.install()
        self.is_evaluating = True
        compat.rank_zero_info(trainer, "QuantDebug: the model was trained with QAT and is evaluated quantized.")
        return True

"""Quantization-aware training: epochs with the quantizers on, in the fit that is running.

The model starts from its best post-training state: folded, equalized, calibrated. The user's own ``training_step``,
loss, optimizer class, data, callbacks and loggers go on; what is added are the quantizers and, beside the user's
parameters, their scales (LSQ, :mod:`lightning_quantdebug.learned_scale`). Scales are parameters of no module: float
checkpoints stay loadable without the plugin at every moment, weight averaging and the user's own grouping of
parameters see what they always saw, and on several devices their gradients are averaged here.

Batch normalizations are frozen from the start and folded, as the engine will run them. In ``benchmarks/qat.py`` that
scores within noise of letting them follow (62.5 % against 63.2 %, one seed) and costs a third less: with the statistics
of a batch, each weight is folded, quantized and unfolded again in every step.

Weights that a training ends with are those of the epoch with the best quantized score; the state before the first
epoch counts as one, so that a training that only harms leaves the model as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quantdebug import fit_compat
from lightning_quantdebug.best_state import Best
from lightning_quantdebug.best_weights import load_best_weights
from lightning_quantdebug.distillation import Teacher, copies_of
from lightning_quantdebug.errors import NonFiniteScoreError, QuantDebugError
from lightning_quantdebug.evaluation import Evaluation, Evaluator
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.interception import clean_path
from lightning_quantdebug.quantized_steps import CoveredSteps, training_session, untrained
from lightning_quantdebug.rank_agreement import gather
from lightning_quantdebug.session_state import load_state, state_of
from lightning_quantdebug.settings import Settings
from lightning_quantdebug.target import Kind, Mode
from lightning_quantdebug.trained_norms import TrainedNorms

# With `qat_early_stop` the loss must be at most this share of the permitted one: another set of samples shall pass too.
MARGIN = 0.5
# The loss is asked for NaN every so many batches: on an accelerator each question waits for the device.
_NAN_EVERY = 16


@dataclass(frozen=True)
class Aim:
    """What a training is judged by.

    Attributes:
        reference: The FP32 score, on the data that accepts.
        permitted: The permitted loss, in the metric's units.
        start: The quantized score before the first epoch.
    """

    reference: float
    permitted: float
    start: float


@dataclass
class Course:
    """How a training went.

    Attributes:
        first: Number of epochs that the fit had trained before.
        epochs: Most epochs.
        steps_per_epoch: Optimizer steps of each; ``None`` where the training loader has no length.
        scores: The quantized score after each epoch, by its number from 1 on.
        rate: Learning rate at the start, the highest of all groups.
        scales: Number of quantizers whose scale is trained.
        stopped: Why it ended before its last epoch, ``""`` if it did not.
        diverged: Whether that was a loss that is no number.
        notes: What the reader must know.
    """

    first: int
    epochs: int
    steps_per_epoch: int | None = None
    scores: dict[int, float] = field(default_factory=dict)
    rate: float = 0.0
    scales: int = 0
    stopped: str = ""
    diverged: bool = False
    notes: list[str] = field(default_factory=list)


class Qat:
    """One quantization-aware training.

    Args:
        trainer: The Trainer, inside ``fit``.
        pl_module: Its LightningModule.
        settings: The settings.
        session: The captured instrumentation in its best post-training state.
        aim: What it is judged by.
        directory: Where files are kept.
        course: How it went so far; ``None``: it begins.
    """

    def __init__(
        self,
        trainer: Any,
        pl_module: Any,
        settings: Settings,
        session: Instrumentation,
        aim: Aim,
        directory: Path,
        course: Course | None = None,
    ) -> None:
        """Nothing is changed yet."""
        self.trainer = trainer
        self.pl_module = pl_module
        self.settings = settings
        self.session = session
        self.aim = aim
        self.directory = directory
        self.course = course or Course(
            fit_compat.processed_epochs(trainer), settings.qat_epochs, fit_compat.steps_per_epoch(trainer)
        )
        self.fp32_checkpoint = directory / "fp32.ckpt"
        self._best: Best | None = None
        self.evaluator = Evaluator(trainer, pl_module, settings.monitor)
        self._training = session
        self._teacher: Teacher | None = None
        self._steps = CoveredSteps(trainer, pl_module, self._around)
        self._limits = fit_compat.Limits.of(trainer)
        self._norms = TrainedNorms(pl_module)
        self._finite: Tensor | None = None
        self._validated: tuple[int, float] | None = None
        self._scored_at = -1

    # Beginning.

    def start(self) -> None:
        """Switch the running fit to training with quantizers, from its next epoch on."""
        trainer, restores = self.trainer, self.settings.restore_best
        if restores:
            trainer.save_checkpoint(self.directory / "fp32_last.ckpt")
            load_best_weights(trainer, self.pl_module)
        fit_compat.use_averages(trainer, self.pl_module, copy=not restores)
        trainer.save_checkpoint(self.fp32_checkpoint)
        self._take_best(self._now(0, self.aim.start))
        self._learn()
        self._switch(copies_of(self.pl_module) if self.settings.qat_distillation else {})
        fit_compat.forget_history(trainer)
        fit_compat.rename_rates(trainer)
        fit_compat.complete_epochs(trainer)

    def resume(self, state: Mapping[str, Any]) -> None:
        """Go on in a new process, before Lightning restores progress and optimizers.

        Args:
            state: What :meth:`state_dict` returned.
        """
        self.fp32_checkpoint = Path(state["fp32_checkpoint"])
        load_state(self.session, state["session"], learn=True)
        self._learn()
        self._take_best(self._known_best(Path(state["best_file"]), state["is_scored"]))
        tensors = self._fp32_tensors() if self.settings.qat_distillation else {}
        self._switch(tensors)

    def _switch(self, teacher: Mapping[str, Tensor]) -> None:
        """Loop, optimizers and steps as training with quantizers needs them."""
        trainer, settings, course = self.trainer, self.settings, self.course
        self._training = training_session(self.evaluator, self.pl_module, settings, self.session)
        missing = untrained(self.session, self._training)
        if missing:
            course.notes.append(
                f"The training step does not run what {missing[:5]} quantize in validation: they are not trained."
            )
        fit_compat.train_until(trainer, course.first + course.epochs)
        fit_compat.rebuild_optimizers(trainer, course.epochs)
        self._set_rates()
        if teacher:
            self._teacher = Teacher(self._training, settings.qat_distillation, teacher)
        self.session.set_mode(Mode.QUANTIZE)
        self._steps.install()

    def _set_rates(self) -> None:
        """Learning rates of the training, and the scales among what is trained."""
        trainer, factor = self.trainer, self.settings.qat_lr_factor
        optimizers = [getattr(item, "optimizer", item) for item in trainer.optimizers]
        rates = [[factor * rate for rate in fit_compat.base_rates(optimizer)] for optimizer in optimizers]
        self.course.rate = max(max(group) for group in rates)
        automatic = self.pl_module.automatic_optimization
        if not automatic:
            fit_compat.scale_rates(trainer, factor)
        ratios = self._ratios()
        if ratios:
            owner = max(range(len(optimizers)), key=lambda index: self._weights_in(optimizers[index]))
            rates[owner].append(max(rates[owner]))
            fit_compat.add_parameters(optimizers[owner], ratios, rates[owner][-1])
        if automatic:
            fit_compat.decay(trainer, optimizers[0], rates[0], self.course.epochs, self.course.steps_per_epoch)

    def _weights_in(self, optimizer: torch.optim.Optimizer) -> int:
        """How many of the quantized weights an optimizer trains."""
        own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        quantized = {q.name for q in self.session.select(kind=Kind.WEIGHT)}
        named = self.pl_module.named_parameters()
        return sum(clean_path(name) in quantized and id(parameter) in own for name, parameter in named)

    def _learn(self) -> None:
        """Train the scales from now on, if they shall be; of a training that has ended they start where they are."""
        if not self.settings.qat_learn_scales:
            return
        found = [quantizer for quantizer in self.session.quantizers.values() if quantizer.is_learnable]
        for quantizer in found:
            if quantizer.learned is None:
                quantizer.learn()
        self.course.scales = len(found)

    def _ratios(self) -> list[nn.Parameter]:
        """What is trained of the scales."""
        learned = (quantizer.learned for quantizer in self.session.quantizers.values())
        return [item.ratio for item in learned if item is not None]

    # While it trains.

    def _around(self, call: Callable[[], Any], name: str, batch: Any) -> Any:
        """One step of the user's with the quantizers on."""
        if name != "training_step":
            return self.session.run(call, step=True)
        if self._teacher is None:
            return self._training.run(call, step=True)
        teacher = self._teacher
        outcome = teacher(lambda: self._training.run(call, step=True))
        if teacher.refusal:
            self.course.notes.append(f"Nothing was distilled: {teacher.refusal}.")
            self._teacher = None
        return outcome

    @property
    def epoch(self) -> int:
        """Number of epochs that were trained with quantizers."""
        return fit_compat.processed_epochs(self.trainer) - self.course.first

    def on_epoch_start(self) -> None:
        """Freeze batch normalizations once their share of the epochs is over."""
        if self.epoch >= self.settings.qat_freeze_batchnorm * self.course.epochs:
            self._norms.freeze()

    def on_after_backward(self) -> None:
        """Average the gradients of the scales over the ranks, as DDP does those of the model's parameters."""
        ratios = self._ratios()
        if self.trainer.world_size == 1 or not ratios:
            return
        gradients = [ratio.grad if ratio.grad is not None else torch.zeros_like(ratio) for ratio in ratios]
        joined = torch.cat([gradient.flatten() for gradient in gradients])
        mean = self.trainer.strategy.reduce(joined, reduce_op="mean")
        for ratio, part in zip(ratios, mean.split([ratio.numel() for ratio in ratios]), strict=True):
            ratio.grad = part.view_as(ratio).clone()

    def on_batch_end(self, outputs: Any, batch_idx: int) -> None:
        """Stop at once where the loss is no number any more."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(loss, Tensor) or self.course.stopped:
            return
        finite = torch.isfinite(loss.detach()).all()
        self._finite = finite if self._finite is None else self._finite & finite
        # Ranks may not stop each for itself: on several devices the end of the epoch is waited for.
        now = loss.device.type == "cpu" or batch_idx % _NAN_EVERY == 0
        if now and self.trainer.world_size == 1 and not bool(self._finite):
            self._diverged(self.epoch + 1)

    def on_validation_end(self) -> None:
        """Note the score that Lightning's own validation has logged."""
        value = self.trainer.callback_metrics.get(self.settings.monitor)
        if value is not None and value.numel() == 1:
            self._validated = (self.trainer.global_step, float(value))

    def on_epoch_end(self) -> float | None:
        """Note how the epoch ended; returns the quantized score."""
        if self.course.stopped:
            return None
        if any(gather(not self._is_finite())):
            self._diverged(self.epoch)
            return None
        score = self._score()
        # The hook runs when the epoch was counted, but before it was completed.
        self.course.scores[self.epoch], self._scored_at = score, self.trainer.global_step
        direction = self.settings.direction
        if math.isfinite(score) and direction.loss(self.best.score, score) < 0:
            self._take_best(self._now(self.epoch, score))
        loss = direction.loss(self.aim.reference, score)
        if self.settings.qat_early_stop and loss <= MARGIN * self.aim.permitted:
            self.course.stopped = f"the tolerance was met with margin after epoch {self.epoch}"
        return score

    def _is_finite(self) -> bool:
        """Whether the losses of the epoch and what was trained are numbers."""
        seen = self._finite is None or bool(self._finite)
        return seen and all(bool(p.isfinite().all()) for p in (*self.pl_module.parameters(), *self._ratios()))

    def _score(self) -> float:
        """The quantized score of the epoch, the same on every rank: Lightning's own, or one of a pass."""
        known = self._validated
        values = gather(known[1] if known is not None and known[0] == self.trainer.global_step else None)
        numbers = [value for value in values if value is not None]
        if len(numbers) == len(values):
            return sum(numbers) / len(numbers)
        try:
            return self.evaluator.run().score
        except NonFiniteScoreError:
            return math.nan

    def _diverged(self, epoch: int) -> None:
        """Go back to the best state and train no more."""
        self.course.stopped = f"the loss became NaN or infinite in epoch {epoch}"
        self.course.diverged = True
        self.restore_best()
        self.trainer.should_stop = True

    @property
    def is_over(self) -> bool:
        """Whether it has ended before its last epoch."""
        return bool(self.course.stopped)

    # The best state.

    @property
    def best(self) -> Best:
        """The state with the best quantized score so far."""
        assert self._best is not None
        return self._best

    def _now(self, epoch: int, score: float) -> Best:
        """The state as it is now."""
        return Best.of(epoch, score, self.trainer, self.pl_module, self.session)

    def _take_best(self, best: Best) -> None:
        """Remember a state, here and in a file for a fit that is resumed; the one before training in a second file."""
        self._best = best
        names = ["qat_best.ckpt"] if best.epoch else ["qat_best.ckpt", "qat_start.ckpt"]
        for name in names if self.trainer.is_global_zero else []:
            best.write(self.directory / name)

    def restore_best(self) -> None:
        """Give the module the weights of the best state, and the quantizers their scales."""
        self.best.restore(self.trainer, self.pl_module, self.session)

    def _known_best(self, path: Path, is_scored: bool) -> Best:
        """The best state up to the checkpoint that is resumed.

        Where a later epoch has become the best, which will be trained again, it is the state before the first one, or
        that of the checkpoint if the last score is its own and a better one; where the files are gone, the latter.
        """
        scores, direction = self.course.scores, self.settings.direction
        last = max(scores, default=0)
        score = scores.get(last, self.aim.start)
        is_better = is_scored and direction.loss(self.aim.start, score) < 0
        for file in (path, path.with_name("qat_start.ckpt")):
            best = Best.read(file, self.pl_module.device)
            if best is not None and best.epoch <= last and not (best.epoch == 0 and is_better):
                return best
        if not is_better or any(direction.loss(score, other) < 0 for other in scores.values()):
            self.course.notes.append(f"The best state before the fit was resumed, {str(path)!r}, is gone.")
        return self._now(max(last, 1), score)

    def _fp32_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of the FP32 model, from its checkpoint."""
        try:
            state = torch.load(self.fp32_checkpoint, map_location=self.pl_module.device, weights_only=True)
        except OSError as error:
            raise QuantDebugError(
                f"Distillation needs the FP32 weights, and {str(self.fp32_checkpoint)!r} can not be read: {error}. Put "
                "the file back, or resume with qat_distillation=0."
            ) from error
        return {**copies_of(self.pl_module), **state["state_dict"]}

    # The end.

    def finish(self) -> Evaluation | None:
        """Take the best state, and evaluate the quantized model on all of the validation data.

        Returns:
            The evaluation; ``None`` where the score is no number.
        """
        self.restore_best()
        self._norms.freeze()
        try:
            evaluation = self.evaluator.run()
            if self.best.epoch and self.settings.qat_freeze_batchnorm > 0:
                evaluation, notes = self._norms.renew(self.evaluator, evaluation, self.settings.direction)
                self.course.notes += notes
        except NonFiniteScoreError:
            return None
        finally:
            self.release()
        return evaluation

    def release(self) -> None:
        """Give module and Trainer back: own steps, modes and limits; weights and scales stay as they are."""
        self._steps.remove()
        self._norms.release()
        self._limits.set(self.trainer)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed fit needs, in types that ``torch.load(weights_only=True)`` reads."""
        return {
            "session": state_of(self.session),
            "aim": asdict(self.aim),
            "course": asdict(self.course),
            "is_scored": self._scored_at == self.trainer.global_step,
            "best_file": str((self.directory / "qat_best.ckpt").absolute()),
            "fp32_checkpoint": str(self.fp32_checkpoint.absolute()),
        }

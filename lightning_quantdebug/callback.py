"""The callback: one more entry in ``Trainer(callbacks=[...])``.

It holds no arithmetic. It decides *when* to walk, hands the Trainer to
:class:`~lightning_quantdebug.diagnosis.Diagnosis`, and writes what came out. The Trainer, the LightningModule and
everything that they own are given back as they were.
"""

from __future__ import annotations

import os
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning_quantdebug import lightning_compat as compat
from lightning_quantdebug.best_weights import best_weights, checkpoint_callback
from lightning_quantdebug.calibration import calibration_loader, capture, set_ranges
from lightning_quantdebug.console import Progress, print_summary
from lightning_quantdebug.deployment import Deployment, is_deployable
from lightning_quantdebug.diagnosis import EVALUATIONS, Diagnosis
from lightning_quantdebug.errors import QuantDebugError, ReportError, SettingsError
from lightning_quantdebug.evaluation import Evaluation, Evaluator
from lightning_quantdebug.instrument import Instrumentation
from lightning_quantdebug.lightning_compat import CallbackBase
from lightning_quantdebug.own_quantizers import find_own_quantizers, own_quantizers
from lightning_quantdebug.plausibility import missing_extras
from lightning_quantdebug.qat_checks import reason_not_to_train
from lightning_quantdebug.rank_agreement import gather
from lightning_quantdebug.report import Report, Verdict
from lightning_quantdebug.report_pages import page_files, write_pages
from lightning_quantdebug.settings import OnError, Settings, When, make_settings
from lightning_quantdebug.target import Mode, QuantTarget
from lightning_quantdebug.tensorboard import ReviewWriter
from lightning_quantdebug.training_phase import TrainingPhase

# The watch is to be cheap: few calibration batches suffice to see a drift.
WATCH_BATCHES = 4


class QuantDebug(CallbackBase):
    """Find out whether a model survives quantization, what breaks it, and where.

    Add it to the Trainer's callbacks. At the end of ``trainer.fit``, or of ``trainer.validate``, it walks through the
    flow chart of quantization debugging (Nagel et al. 2021, section 3.6), judged by your own ``validation_step`` and
    metric, and writes ``report.html``, ``report.json``, ``report.md`` and TensorBoard pages. Your model is left as it
    was.

    Args:
        monitor: Name of the metric that validation logs, as in ModelCheckpoint.
        mode: ``"min"`` or ``"max"``: whether a small or a large score is good.
        tolerance: Permitted loss of score against FP32: a number in the metric's units, or a share such as ``"1%"``.
        target: What to quantize to: a preset (``"int8"``, ``"w4a8"``, ``"tensorrt"``, ``"xnnpack"``, ``"qnn"``) or a
            mapping of fields.
        when: Where in ``fit`` the walk runs: ``"fit_end"``, ``"fit_start"`` or ``"never"``. ``validate`` always walks.
        restore_best: Diagnose the best weights of ModelCheckpoint instead of the last ones.
        module: Path of the sub-module to quantize; default: everything that the validation step runs.
        exclude: Name patterns of quantizers that stay in FP32.
        remedies: Names of the remedies that may be tried, in order; default: all that the target allows, in the
            guidebook's order: ``"cle"``, ``"per_channel"``, ``"per_group"``, ``"bias_correction"``, ``"adaround"`` for
            weights, ``"range_setting"``, ``"high_bias_absorption"``, ``"activation_cle"`` for activations.
        analysis: How much work the per-quantizer analysis may do: ``"estimate"`` (from gradients, seconds), ``"race"``
            (exact for those that may be among the worst), ``"exhaustive"`` (exact for all, also if the model passes).
        reverse_analysis: Measure as well what is lost with all quantizers on but one, for each of them.
        calibration: Where ranges are set: ``"train"``, ``"val"`` or a DataLoader.
        calibration_batches: Number of calibration batches, on each device.
        limit_batches: Number (int) or share (float) of validation batches for the walk; the acceptance uses all.
        qat_epochs: Most epochs of quantization-aware training, which follow in the same fit where repair was not
            enough; 0: none.
        qat_lr_factor: Learning rate at the start of QAT as a share of what ``configure_optimizers`` starts with (of a
            schedule that rises first, of its peak); it falls to 0 along half a cosine.
        qat_learn_scales: Whether QAT trains the scales of the quantizers too (LSQ); else ranges stay as calibrated.
        qat_freeze_batchnorm: Share of the QAT epochs after which batch normalizations keep their statistics and are
            folded: 0 from the start, 1 never.
        qat_early_stop: Whether QAT ends as soon as the loss is at most half of the permitted one.
        qat_distillation: Weight of the divergence of the logits from those of FP32 in the loss of QAT; 0: none.
        watch_every_n_epochs: While training, log every so many epochs what the score would be if the model were
            quantized now.
        max_time: Time budget of the walk, as in Trainer.
        dirpath: Where to write; default: ``quantdebug`` under the logger's directory. Several callbacks that would
            share a directory write to sub-folders named after their targets.
        export: Formats to write besides the recipe, each proven to do what was simulated: ``"onnx"``, ``"encodings"``
            (AIMET's, for QNN and SNPE), ``"pt2"`` (torch.export).
        on_error: ``"warn"``: a failure of the tool never fails your run; ``"raise"``: it does. A failure that the
            processes of a distributed run may not share is always raised, as the others would wait for ever.
        verbose: Whether to print progress and a summary.
        quantizer: Import path of your own quantizer class, to debug your own pipeline.

    Raises:
        SettingsError: If a value can not be used; the message lists those that can.

    Attributes:
        report: The report of the last walk, ``None`` before.
        fp32_best_model_path: What ModelCheckpoint called its best file before QAT, which starts its ranking anew.
        fp32_best_model_score: Its score.

    Examples:
        >>> callback = QuantDebug(monitor="val_acc", mode="max", tolerance="1%", target="int8")
        >>> callback.report is None
        True
    """

    def __init__(
        self,
        monitor: str,
        mode: str = "min",
        tolerance: float | str = "1%",
        target: str | dict[str, Any] | QuantTarget = "int8",
        *,
        when: str = "fit_end",
        restore_best: bool = False,
        module: str | None = None,
        exclude: Sequence[str] = (),
        remedies: Sequence[str] | None = None,
        analysis: str = "race",
        reverse_analysis: bool = False,
        calibration: Any = "train",
        calibration_batches: int = 16,
        limit_batches: int | float = 1.0,
        qat_epochs: int = 10,
        qat_lr_factor: float = 0.1,
        qat_learn_scales: bool = True,
        qat_freeze_batchnorm: float = 0.0,
        qat_early_stop: bool = True,
        qat_distillation: float = 0.0,
        watch_every_n_epochs: int | None = None,
        max_time: str | dict[str, int] | timedelta | None = None,
        dirpath: str | Path | None = None,
        export: Sequence[str] = (),
        on_error: str = "warn",
        verbose: bool = True,
        quantizer: str | None = None,
    ) -> None:
        """Check the settings; nothing else happens before the Trainer calls."""
        super().__init__()
        self.settings: Settings = make_settings(
            monitor=monitor,
            mode=mode,
            tolerance=tolerance,
            target=target,
            when=when,
            exclude=exclude,
            remedies=remedies,
            analysis=analysis,
            calibration=calibration,
            max_time=max_time,
            export=export,
            on_error=on_error,
            restore_best=restore_best,
            reverse_analysis=reverse_analysis,
            module=module,
            calibration_batches=calibration_batches,
            limit_batches=limit_batches,
            qat_epochs=qat_epochs,
            qat_lr_factor=qat_lr_factor,
            qat_learn_scales=qat_learn_scales,
            qat_freeze_batchnorm=qat_freeze_batchnorm,
            qat_early_stop=qat_early_stop,
            qat_distillation=qat_distillation,
            watch_every_n_epochs=watch_every_n_epochs,
            verbose=verbose,
        )
        if quantizer is not None:
            self.settings = replace(self.settings, target=replace(self.settings.target, quantizer=quantizer))
        self.monitor = monitor
        self.dirpath = None if dirpath is None else Path(dirpath)
        self.report: Report | None = None
        self.given_loader = calibration if self.settings.calibration is None else None
        self.fp32_best_model_path = ""
        self.fp32_best_model_score: float | None = None
        self._watched: Instrumentation | None = None
        self._training = TrainingPhase(self)

    @property
    def state_key(self) -> str:
        """Key of this callback's state in checkpoints, so that two targets can be diagnosed side by side."""
        settings = self.settings
        key: str = self._generate_state_key(
            monitor=settings.monitor, mode=settings.direction.value, target=settings.target.to_dict()
        )
        return key

    # When to walk.

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Refuse Trainers that could never be walked in, before devices and data are set up."""
        self._watched = None
        if not self._has_work(stage):
            return
        self._evaluator(trainer, pl_module).check()
        if stage == "fit":
            self._training.attend(trainer, pl_module)
        if self.settings.restore_best and stage == "fit" and checkpoint_callback(trainer) is None:
            raise SettingsError("`restore_best=True` needs a ModelCheckpoint among the callbacks, there is none.")
        missing = missing_extras(self.settings)
        if missing is not None:
            raise SettingsError(missing)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check what can be checked before training; walk, if it is to run before training."""
        if self._has_work("fit"):
            self._check_before_work(trainer, pl_module)
        self._training.on_fit_start(trainer, pl_module)
        if self.settings.when is When.FIT_START:
            self.walk(trainer, pl_module)

    def on_sanity_check_end(self, trainer: Any, pl_module: Any) -> None:
        """Warn early if validation does not log the monitored metric."""
        logged = trainer.callback_metrics
        if logged and self.monitor not in logged:
            compat.rank_zero_warn(
                trainer,
                f"QuantDebug(monitor={self.monitor!r}): the sanity check of validation did not log this metric. It "
                f"logged {sorted(logged)}.",
            )

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Log what the score would be if the model were quantized now."""
        if self._training.runs:
            self._training.on_epoch_end(trainer)
            return
        every = self.settings.watch_every_n_epochs
        if every is not None and (trainer.current_epoch + 1) % every == 0 and not trainer.fast_dev_run:
            with self.harmless(trainer):
                self._watch(trainer, pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Walk after training, when every other callback has done its last work on the weights.

        Where QAT may follow, the walk was when the last epoch had ended.
        """
        if self.settings.when is When.FIT_END and not trainer.interrupted and not self._training.has_walked:
            self.walk(trainer, pl_module)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Check what can be checked before ``trainer.validate`` validates."""
        if trainer.state.fn == "validate" and not self._training.evaluates(trainer, pl_module):
            self._check_before_work(trainer, pl_module)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Walk after the validation of ``trainer.validate``, unless that was one of a model trained with QAT."""
        if trainer.state.fn == "validate" and not self._training.is_evaluating:
            self.walk(trainer, pl_module)
        elif trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._training.on_validation_end()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Let go of the module and the Trainer."""
        self._watched = None
        self._training.let_go(trainer)

    # Training with quantizers.

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Test a model that was trained with QAT as it will run: quantized."""
        self._training.evaluates(trainer, pl_module)

    def on_predict_start(self, trainer: Any, pl_module: Any) -> None:
        """Predict with a model that was trained with QAT as it will run: quantized."""
        self._training.evaluates(trainer, pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Freeze batch normalizations when it is time."""
        self._training.on_epoch_start()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        """Average the gradients of scales over the ranks."""
        self._training.on_after_backward()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Notice a loss that is no number."""
        self._training.on_batch_end(outputs, batch_idx)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Give module and Trainer back; what was trained stays, and the state that a checkpoint needs."""
        self._training.let_go(trainer)

    def state_dict(self) -> dict[str, Any]:
        """What checkpoints hold of a training with quantizers; empty before."""
        return self._training.state_dict()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Take what a checkpoint holds of a training with quantizers; nothing, if it is one of FP32."""
        self._training.load(checkpoint.get("callbacks", {}).get(self.state_key))

    def _has_work(self, stage: str) -> bool:
        """Whether this callback does anything in ``fit`` or ``validate``."""
        idle = self.settings.when is When.NEVER and self.settings.watch_every_n_epochs is None
        return stage == "validate" or (stage == "fit" and not idle)

    def _check_before_work(self, trainer: Any, pl_module: Any) -> None:
        """Raise for settings that could never work, before anything was trained or measured."""
        # The constructor refuses a `module` that does not exist and a `quantizer` that can not be imported.
        Instrumentation(pl_module, self.settings.target, module=self.settings.module)
        directory = self.directory(trainer)
        refusals = gather(_refusal(directory) if trainer.is_global_zero else None)
        if refusals[0] is not None:
            raise ReportError(refusals[0])

    # The walk.

    def walk(self, trainer: Any, pl_module: Any) -> Diagnosis | None:
        """Walk, write what came out, and say it; a failure of the tool, ``None``, is no failure of the run."""
        with self.harmless(trainer):
            return self._diagnose(trainer, pl_module)
        return None

    def _diagnose(self, trainer: Any, pl_module: Any) -> Diagnosis:
        """One walk with progress, whatever it ends with."""
        directory = self.directory(trainer)
        rank_zero = trainer.is_global_zero
        verbose, live = self.settings.verbose, compat.live_progress(trainer)
        with Progress(EVALUATIONS, verbose=verbose, rank_zero=rank_zero, position=1, live=live) as progress:
            diagnosis = Diagnosis(
                self._evaluator(trainer, pl_module),
                self._evaluator(trainer, pl_module, limit_batches=1.0),
                self.settings,
                self.given_loader,
                progress.describe,
                progress.advance,
                progress.expect,
                progress.runs,
                directory,
                progress.tell,
                lambda: reason_not_to_train(trainer, self.settings),
            )
            try:
                # Once for all passes: remedies hold tensors of the module from one pass to the next.
                with (
                    compat.module_on_device(trainer, pl_module),
                    best_weights(trainer, pl_module, self.settings.restore_best),
                ):
                    self.report = diagnosis.walk()
                    self._export(trainer, diagnosis)
            # Raised again: these are all the ways in which a walk may end, Ctrl-C and SIGTERM among them.
            except (Exception, KeyboardInterrupt, SystemExit):
                error = traceback.format_exc()
                self.report = replace(diagnosis.report, verdict=Verdict.FAILED, error=error)
                raise
            finally:
                self.write(trainer, directory)
        if not diagnosis.wants_training:
            self.say(trainer)
        return diagnosis

    def _export(self, trainer: Any, diagnosis: Diagnosis) -> None:
        """Write what a walk that is followed by no training leaves."""
        if diagnosis.wants_training or diagnosis.session is None or diagnosis.accepted is None:
            return
        self.deploy(trainer, diagnosis.session, diagnosis.acceptance, diagnosis.accepted[1], diagnosis.describe)

    def deploy(
        self,
        trainer: Any,
        session: Instrumentation,
        evaluator: Evaluator,
        accepted: Evaluation | None,
        describe: Callable[[str], None] = lambda step: None,
    ) -> None:
        """Write recipe and exports and put them into the report; a failure of that is none of the walk."""
        assert self.report is not None
        if not is_deployable(self.report):
            return
        directory = self.directory(trainer)
        with self.harmless(trainer):
            deployment = Deployment(
                session, evaluator, self.settings, directory, accepted, trainer.is_global_zero, describe
            )
            self.report = deployment.run(self.report)

    def _evaluator(self, trainer: Any, pl_module: Any, limit_batches: int | float | None = None) -> Evaluator:
        """What runs the user's validation."""
        limit = self.settings.limit_batches if limit_batches is None else limit_batches
        return Evaluator(trainer, pl_module, self.monitor, limit_batches=limit)

    def write(self, trainer: Any, directory: Path) -> None:
        """Write the report's files and the TensorBoard pages on rank zero."""
        assert self.report is not None
        if not trainer.is_global_zero:
            return
        with ReviewWriter(trainer, directory, self.tag(trainer)) as writer:
            files = {
                **self.report.final.files,
                "report.json": str(directory / "report.json"),
                **page_files(directory),
                "tensorboard": writer.log_dir,
            }
            kept = directory / "fp32.ckpt"
            files |= {kept.name: str(kept)} if self._training.runs and kept.exists() else {}
            self.report = replace(self.report, final=replace(self.report.final, files=files))
            self.report.to_json(files["report.json"])
            write_pages(self.report, directory)
            writer.write_report(self.report, trainer.global_step)

    def say(self, trainer: Any) -> None:
        """Print the summary and the warnings."""
        assert self.report is not None
        check = self.report.steps[0] if self.report.steps else None
        for warning in check.details.get("warnings", []) if check is not None else []:
            compat.rank_zero_warn(trainer, f"QuantDebug: {warning}")
        if self.settings.verbose and trainer.is_global_zero:
            print_summary(self.report)

    def directory(self, trainer: Any) -> Path:
        """Where this callback writes; called on every rank, as ``trainer.log_dir`` asks the others."""
        log_dir = trainer.log_dir
        directory = self.dirpath or Path(log_dir or trainer.default_root_dir) / "quantdebug"
        shared = [peer for peer in self._peers(trainer) if peer.dirpath == self.dirpath]
        return directory / self._label(trainer) if len(shared) > 1 else directory

    def _peers(self, trainer: Any) -> list[QuantDebug]:
        """All QuantDebug callbacks of the Trainer, this one among them."""
        return [callback for callback in trainer.callbacks if isinstance(callback, QuantDebug)]

    def _label(self, trainer: Any) -> str:
        """What tells this callback's files and tags from those of the others in the same Trainer."""
        name = self.settings.target.name
        namesakes = [peer for peer in self._peers(trainer) if peer.settings.target.name == name]
        return name if len(namesakes) < 2 else f"{name}_{namesakes.index(self)}"

    def tag(self, trainer: Any) -> str:
        """First part of this callback's tags in TensorBoard and other loggers."""
        return "quantdebug" if len(self._peers(trainer)) < 2 else f"quantdebug/{self._label(trainer)}"

    @contextmanager
    def harmless(self, trainer: Any) -> Iterator[None]:
        """Turn a failure of the tool into a warning, unless the user wants it raised."""
        if self.settings.on_error is OnError.RAISE:
            yield
            return
        try:
            yield
        except Exception as error:
            if trainer.world_size > 1 and not isinstance(error, QuantDebugError):
                # One rank alone may have failed: were it to go on, the others would wait for it for ever.
                raise
            compat.rank_zero_warn(
                trainer,
                f"QuantDebug failed, your run and your model are unharmed: {type(error).__name__}: {error} "
                "(on_error='raise' shows the traceback; so does report.json).",
            )

    # The watch.

    def _watch(self, trainer: Any, pl_module: Any) -> None:
        """Set ranges on few batches, evaluate the quantized model, and log the score."""
        evaluator = self._evaluator(trainer, pl_module)
        with own_quantizers(find_own_quantizers(pl_module), enabled=False):
            score = self._quantized_score(evaluator, pl_module)
        with ReviewWriter(trainer, self.directory(trainer), self.tag(trainer)) as writer:
            writer.write_watch(self.monitor, score, trainer.global_step)

    def _quantized_score(self, evaluator: Evaluator, pl_module: Any) -> float:
        """The score of the model, quantized as it is now."""
        loader = calibration_loader(self.settings, self.given_loader)
        settings = self.settings
        if self._watched is None:
            session = Instrumentation(pl_module, settings.target, module=settings.module, exclude=settings.exclude)
            capture(session, evaluator, loader)
            self._watched = session
        set_ranges(self._watched, evaluator, loader, min(WATCH_BATCHES, settings.calibration_batches))
        with self._watched.modes(Mode.QUANTIZE):
            return evaluator.run(self._watched.around_step).score


def _refusal(directory: Path) -> str | None:
    """Why no files can be made in ``directory``, which is made if it does not exist; ``None`` if they can."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=directory, prefix=".quantdebug")
        os.close(handle)
        os.unlink(name)
    except OSError as error:
        return f"Can not write to {str(directory)!r}: {error}. Give `dirpath` a writable directory."
    return None


def diagnose(trainer: Any, model: Any, datamodule: Any = None, **settings: Any) -> Report:
    """Diagnose an existing model with ``trainer.validate``, without adding the callback to the Trainer for good.

    Args:
        trainer: A Trainer that is not running.
        model: The LightningModule.
        datamodule: Its data, where the module does not bring it: a LightningDataModule or validation DataLoaders.
        settings: Those of :class:`QuantDebug`; ``monitor`` is required.

    Returns:
        The report.

    Raises:
        SettingsError: If a setting can not be used.
        EvaluationError: If the model can not be evaluated.
    """
    callback = QuantDebug(**{"on_error": "raise", **settings})
    trainer.callbacks.append(callback)
    is_datamodule = hasattr(datamodule, "val_dataloader")
    try:
        trainer.validate(
            model, datamodule=datamodule if is_datamodule else None, dataloaders=None if is_datamodule else datamodule
        )
    finally:
        trainer.callbacks.remove(callback)
    if callback.report is None:
        raise QuantDebugError("trainer.validate ended without a walk: does the Trainer run validation at all?")
    return callback.report

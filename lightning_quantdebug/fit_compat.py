"""What appended epochs need of a running fit: its end, its limits, its optimizers, and the callbacks that keep count.

A fit ends where ``FitLoop.done`` says so: after all hooks of an epoch, those of EarlyStopping and ModelCheckpoint
among them, whatever the reason (``max_epochs``, ``max_steps`` in the middle of an epoch, EarlyStopping, a Timer, the
user's ``should_stop``), and also where a finished checkpoint is resumed. :func:`asked_at_the_end` lets a callback
answer in its place; while it answers ``False``, Lightning's own loop goes on, so that every callback sees ordinary
epochs. As in :mod:`~lightning_quantdebug.lightning_compat`, everything that Lightning does not promise to keep is here.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_quantdebug import lightning_compat as compat
from lightning_quantdebug.lightning_compat import ModuleLike, TrainerLike, foreign_isinstance

# Limits of a group of parameters that a learning rate may not leave; they are scaled with it.
_RATES = ("lr", "initial_lr", "max_lr", "min_lr")


def asked_at_the_end(trainer: TrainerLike, is_over: Callable[[bool], bool]) -> None:
    """Ask ``is_over(done)`` whether the fit is over, each time that Lightning asks its loop; ``done`` is its answer."""
    loop = trainer.fit_loop
    own = type(loop)

    def done(self: Any) -> bool:
        # Lightning asks by the class: the answer of the class that it was.
        return is_over(bool(own.done.fget(self)))

    loop.__class__ = type(own.__name__, (own,), {"done": property(done), "_quantdebug_own": own})


def no_more_asked(trainer: TrainerLike) -> None:
    """Let the loop answer for itself again."""
    own = getattr(type(trainer.fit_loop), "_quantdebug_own", None)
    if own is not None:
        trainer.fit_loop.__class__ = own


def ends_by_itself(trainer: TrainerLike) -> bool:
    """Whether the fit runs to an end of its own: no Ctrl-C, no signal to leave."""
    return not (trainer.interrupted or trainer.received_sigterm or trainer.sanity_checking)


def processed_epochs(trainer: TrainerLike) -> int:
    """Number of epochs that were trained, the running one included once its batches are done."""
    return int(trainer.fit_loop.epoch_progress.current.processed)


def complete_epochs(trainer: TrainerLike) -> None:
    """Count the epochs that were trained as complete, as Lightning does where it starts a run."""
    progress = trainer.fit_loop.epoch_progress.current
    progress.completed = progress.processed


@dataclass(frozen=True)
class Limits:
    """Where a fit ends."""

    max_epochs: int | None
    min_epochs: int | None
    max_steps: int
    min_steps: int | None

    @classmethod
    def of(cls, trainer: TrainerLike) -> Limits:
        """As they are now."""
        loop = trainer.fit_loop
        return cls(loop.max_epochs, loop.min_epochs, loop.epoch_loop.max_steps, loop.epoch_loop.min_steps)

    def set(self, trainer: TrainerLike) -> None:
        """Let the fit end here."""
        loop = trainer.fit_loop
        loop.max_epochs, loop.min_epochs = self.max_epochs, self.min_epochs
        loop.epoch_loop.max_steps, loop.epoch_loop.min_steps = self.max_steps, self.min_steps


def train_until(trainer: TrainerLike, epochs: int) -> None:
    """Let the fit go on until ``epochs`` epochs were trained in all, and nothing else end it."""
    Limits(epochs, 0, -1, None).set(trainer)
    trainer.should_stop = False


def steps_per_epoch(trainer: TrainerLike) -> int | None:
    """Optimizer steps of an epoch with automatic optimization; ``None`` where the loader has no length."""
    batches = trainer.num_training_batches
    return None if batches == math.inf else max(1, math.ceil(batches / trainer.accumulate_grad_batches))


def rebuild_optimizers(trainer: TrainerLike, epochs: int) -> None:
    """Ask ``configure_optimizers`` again; what it reads of the Trainer tells it of a training of ``epochs`` epochs."""
    loop = trainer.fit_loop
    with compat.replaced(loop, "max_epochs", epochs), compat.replaced(loop.epoch_loop, "max_steps", -1):
        trainer.strategy.setup_optimizers(trainer)
        trainer.strategy.setup_precision_plugin()


def base_rates(optimizer: Optimizer) -> list[float]:
    """The learning rate of each group before a schedule moves it; of a schedule that rises first, where it rises to."""
    return [float(_first(group, ("max_lr", "initial_lr", "lr"))) for group in optimizer.param_groups]


def _first(group: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The first of some entries that is there."""
    return next(group[name] for name in names if name in group)


def decay(
    trainer: TrainerLike, optimizer: Optimizer, rates: list[float], epochs: int, steps_per_epoch: int | None
) -> None:
    """Let the groups start at ``rates`` and fall to 0 along half a cosine, in place of the user's schedules."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        for name in _RATES[1:]:
            group.pop(name, None)
        group["lr"] = torch.tensor(rate) if isinstance(group["lr"], torch.Tensor) else rate
    share = functools.partial(_half_cosine, epochs * (steps_per_epoch or 1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
    interval = "epoch" if steps_per_epoch is None else "step"
    trainer.strategy.lr_scheduler_configs = [compat.scheduler_config(trainer, scheduler, interval)]


def _half_cosine(total: int, step: int) -> float:
    """From 1 at step 0 to 0 at step ``total``."""
    return 0.5 * (1.0 + math.cos(math.pi * min(step, total) / total))


def scale_rates(trainer: TrainerLike, factor: float) -> None:
    """Multiply the learning rates of all optimizers and of the schedules that the user steps himself."""
    for optimizer in trainer.optimizers:
        for group in optimizer.param_groups:
            for name in _RATES:
                if name in group:
                    group[name] = group[name] * factor
    for config in trainer.lr_scheduler_configs:
        scheduler = config.scheduler
        for name in ("base_lrs", "_last_lr", "max_lrs", "min_lrs"):
            if isinstance(getattr(scheduler, name, None), list):
                setattr(scheduler, name, [rate * factor for rate in getattr(scheduler, name)])
        if isinstance(getattr(scheduler, "eta_min", None), float):
            scheduler.eta_min = scheduler.eta_min * factor


def add_parameters(optimizer: Optimizer, parameters: list[torch.nn.Parameter], rate: float) -> None:
    """Train more parameters, in a group of their own without weight decay."""
    group: dict[str, Any] = {"params": parameters, "lr": rate}
    if "weight_decay" in optimizer.defaults:
        group["weight_decay"] = 0.0
    optimizer.add_param_group(group)


def rename_rates(trainer: TrainerLike) -> None:
    """Let LearningRateMonitor find the names of the new groups."""
    for callback in trainer.callbacks:
        if foreign_isinstance(callback, "LearningRateMonitor"):
            callback.on_train_start(trainer)


def time_is_up(trainer: TrainerLike) -> bool:
    """Whether a Timer (``Trainer(max_time=...)``) has ended the fit."""
    timers = (callback for callback in trainer.callbacks if foreign_isinstance(callback, "Timer"))
    return any(left is not None and left <= 0.0 for left in (timer.time_remaining() for timer in timers))


def forget_history(trainer: TrainerLike) -> None:
    """Let EarlyStopping and ModelCheckpoint start anew, so that no score of FP32 is what QAT is measured by.

    Files that ModelCheckpoint has written are no longer its own: it neither ranks nor removes them.
    """
    for callback in trainer.callbacks:
        if foreign_isinstance(callback, "EarlyStopping"):
            worst = torch.inf if callback.monitor_op is torch.lt else -torch.inf
            callback.best_score = torch.tensor(worst)
            callback.wait_count = callback.stopped_epoch = 0
        elif foreign_isinstance(callback, "ModelCheckpoint"):
            callback.best_k_models, callback.kth_best_model_path = {}, ""
            callback.best_model_path, callback.best_model_score, callback.current_score = "", None, None
            callback.kth_value = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)


def writes_over(model_checkpoint: Any) -> bool:
    """Whether a ModelCheckpoint writes over a file of an earlier epoch instead of numbering its own."""
    return not getattr(model_checkpoint, "_enable_version_counter", True)


def use_averages(trainer: TrainerLike, pl_module: ModuleLike, copy: bool = True) -> None:
    """Give the module the weights that weight averaging has found, and let the averages start anew from there.

    Args:
        trainer: The Trainer.
        pl_module: Its LightningModule.
        copy: Whether the module gets them; else the averages start from the weights that it has.
    """
    for callback in _averaging(trainer):
        if copy:
            callback._copy_average_to_current(pl_module)
        callback.setup(trainer, pl_module, "fit")


def averages(trainer: TrainerLike) -> list[torch.nn.Module]:
    """The averaged copies of the module, which are what validation sees and what a fit ends with."""
    return [callback._average_model for callback in _averaging(trainer)]


def _averaging(trainer: TrainerLike) -> list[Any]:
    """Weight-averaging callbacks that hold averages now."""
    found = [callback for callback in trainer.callbacks if foreign_isinstance(callback, "WeightAveraging")]
    return [callback for callback in found if callback._average_model is not None]


def configured_again(pl_module: ModuleLike) -> Any:
    """What ``configure_optimizers`` returns when it is asked once more, the module's hook name being set for it."""
    with compat.replaced(pl_module, "_current_fx_name", "configure_optimizers"):
        return pl_module.configure_optimizers()

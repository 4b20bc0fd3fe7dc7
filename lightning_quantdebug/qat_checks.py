"""Whether a Trainer and a module can be trained with quantizers, found out before anything is trained."""

from __future__ import annotations

from typing import Any

import torch

from lightning_quantdebug import fit_compat
from lightning_quantdebug import lightning_compat as compat
from lightning_quantdebug.diagnosis import TRAINED_IN_FIT
from lightning_quantdebug.errors import SettingsError
from lightning_quantdebug.module_state import preserved
from lightning_quantdebug.random_state import isolated_random_state
from lightning_quantdebug.settings import Settings, When

_WAY_OUT = "or set `qat_epochs=0` to diagnose and repair without training."


def check_callbacks(trainer: Any) -> None:
    """Refuse callbacks beside which QAT epochs would be other epochs than they seem.

    Raises:
        SettingsError: If there is one; the message names it and the way out.
    """
    if any(compat.foreign_isinstance(callback, "StochasticWeightAveraging") for callback in trainer.callbacks):
        raise SettingsError(
            "StochasticWeightAveraging can not be combined with QAT: it changes the last epochs of the fit and goes on "
            "doing so in those that QAT appends (one optimizer step for a whole epoch). Use EMAWeightAveraging, "
            f"{_WAY_OUT}"
        )


def check_training(trainer: Any, pl_module: Any, settings: Settings) -> None:
    """Refuse optimizers that can not be made anew or can not train scales.

    Raises:
        SettingsError: If QAT could not train; the message says why and the way out.
    """
    optimizers = [getattr(item, "optimizer", item) for item in trainer.optimizers]
    real = [item for item in optimizers if isinstance(item, torch.optim.Optimizer) and item.param_groups]
    if not real or type(real[0]).__name__ == "_MockOptimizer":
        raise SettingsError(f"QAT needs an optimizer, and `configure_optimizers` returns none. Return one, {_WAY_OUT}")
    lbfgs = [type(item).__name__ for item in real if isinstance(item, torch.optim.LBFGS)]
    if lbfgs and settings.qat_learn_scales:
        raise SettingsError(
            "LBFGS trains one group of parameters, so that the scales of QAT can have none of their own. Set "
            f"`qat_learn_scales=False`, use another optimizer, {_WAY_OUT}"
        )
    if settings.qat_distillation and not pl_module.automatic_optimization:
        raise SettingsError(
            "`qat_distillation` adds to the loss that `training_step` returns, and with manual optimization there is "
            f"none. Set `qat_distillation=0`, {_WAY_OUT}"
        )
    _check_rebuilding(trainer, pl_module, len(real))


def _check_rebuilding(trainer: Any, pl_module: Any, count: int) -> None:
    """Ask ``configure_optimizers`` once more, as QAT will, and leave no trace of it."""
    skip = compat.bare_module_attributes(trainer)
    try:
        with preserved(pl_module, skip=skip), isolated_random_state():
            again = fit_compat.configured_again(pl_module)
    except Exception as error:
        raise SettingsError(
            f"QAT starts with new optimizers, and `configure_optimizers` fails when it is called again: "
            f"{type(error).__name__}: {error}. Let it make its optimizers anew each time, {_WAY_OUT}"
        ) from error
    if again is None:
        raise SettingsError(
            f"QAT starts with new optimizers, and `configure_optimizers` returns None when it is called again (it "
            f"returned {count} before). Let it make its optimizers anew each time, {_WAY_OUT}"
        )


def reason_never_to_train(trainer: Any, settings: Settings) -> str | None:
    """Why no QAT epochs may follow in what the Trainer runs, known before it starts; ``None`` if they may."""
    if settings.qat_epochs == 0:
        return "`qat_epochs` is 0: no QAT is wanted."
    if trainer.state.fn != "fit":
        return TRAINED_IN_FIT
    if settings.when is not When.FIT_END:
        return "QAT follows a walk at the end of training: use when='fit_end', with `max_epochs=0` for a trained model."
    if trainer.fast_dev_run:
        return "`fast_dev_run` trains no further epochs."
    return None


def reason_not_to_train(trainer: Any, settings: Settings) -> str | None:
    """Why no QAT epochs may follow a walk at this moment, ``None`` if they may."""
    reason = reason_never_to_train(trainer, settings)
    if reason is not None:
        return reason
    if trainer.limit_train_batches == 0 or trainer.fit_loop.max_batches == 0:
        return "There are no training batches, so there is nothing to train on."
    if fit_compat.time_is_up(trainer):
        return "The Trainer's `max_time` is spent, so no QAT was run. Raise `max_time` to let it follow."
    return None

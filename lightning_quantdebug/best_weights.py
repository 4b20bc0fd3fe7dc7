"""The best weights of a training run, lent to the module for the time of a walk."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightning_quantdebug import lightning_compat as compat
from lightning_quantdebug.errors import EvaluationError
from lightning_quantdebug.module_state import preserved
from lightning_quantdebug.validation_pass import averages_weights


def checkpoint_callback(trainer: Any) -> Any:
    """The first ModelCheckpoint of the Trainer, ``None`` if there is none."""
    return next((c for c in trainer.callbacks if compat.foreign_isinstance(c, "ModelCheckpoint")), None)


@contextmanager
def best_weights(trainer: Any, pl_module: Any, wanted: bool) -> Iterator[None]:
    """The best weights of ModelCheckpoint in the module until the block ends; then the module has its own back.

    Raises:
        EvaluationError: If there is no best checkpoint or it can not be read.
    """
    if not wanted or trainer.state.fn != "fit":
        yield
        return
    checkpoint = _best_checkpoint(trainer)
    # A checkpoint holds averaged weights already; an averaging callback would validate those of the last epoch.
    callbacks = [callback for callback in trainer.callbacks if not averages_weights(callback)]
    with (
        preserved(pl_module, skip=compat.bare_module_attributes(trainer), parameters=True),
        compat.replaced(trainer, "callbacks", callbacks),
    ):
        _load(checkpoint, pl_module)
        yield


def load_best_weights(trainer: Any, pl_module: Any) -> None:
    """Give the module the best weights of ModelCheckpoint for good.

    Raises:
        EvaluationError: If there is no best checkpoint or it can not be read.
    """
    _load(_best_checkpoint(trainer), pl_module)


def _best_checkpoint(trainer: Any) -> dict[str, Any]:
    """The checkpoint that ModelCheckpoint calls the best."""
    path = checkpoint_callback(trainer).best_model_path
    if not path:
        raise EvaluationError("`restore_best=True`, but ModelCheckpoint has saved no checkpoint yet.")
    try:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise EvaluationError(
            f"`restore_best=True`, but the best checkpoint {path!r} can not be read: {error}."
        ) from error
    return checkpoint


def _load(checkpoint: dict[str, Any], pl_module: Any) -> None:
    """Give the module what a checkpoint holds of it, as Lightning does."""
    pl_module.on_load_checkpoint(checkpoint)
    pl_module.load_state_dict(checkpoint["state_dict"], strict=pl_module.strict_loading)

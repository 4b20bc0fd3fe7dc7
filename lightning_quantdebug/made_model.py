"""The user's model for the command line: made by a function of theirs, with weights from a file."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_quantdebug.errors import SettingsError


def made_model(path: str, checkpoint: str | Path | None = None) -> nn.Module:
    """Make a model, in eval mode.

    Args:
        path: ``"package.module:name"`` of a function or class that makes it without arguments.
        checkpoint: A checkpoint of Lightning or a ``state_dict``; only tensors and plain values are read of it.

    Raises:
        SettingsError: If the model can not be made, or the checkpoint can not be read or does not fit.

    Examples:
        >>> made_model("torch.nn:Identity")
        Identity()
    """
    module, _, name = path.partition(":")
    if not module or not name:
        raise SettingsError(f"`--model` must be like 'package.module:name', got {path!r}.")
    if os.getcwd() not in sys.path:
        # As `python -m` has it, which a script that is installed does not.
        sys.path.insert(0, os.getcwd())
    try:
        make = getattr(importlib.import_module(module), name)
    except Exception as error:  # the user's code may raise anything
        raise SettingsError(f"`--model {path}` can not be imported: {_told(error)}.") from error
    try:
        model = make() if callable(make) and not isinstance(make, nn.Module) else make
    except Exception as error:  # likewise
        if not _needs_arguments(make):
            raise SettingsError(f"`--model {path}` can not make the model: {_told(error)}.") from error
        raise SettingsError(
            f"`--model {path}` must make the model without arguments: {error}. Write a function that passes them."
        ) from error
    if not isinstance(model, nn.Module):
        raise SettingsError(f"`--model {path}` must make a torch module, got {type(model).__name__}.")
    if checkpoint is not None:
        _load(model, checkpoint)
    return model.eval()


def _needs_arguments(make: Any) -> bool:
    """Whether a function or class can not be called without arguments."""
    try:
        inspect.signature(make).bind()
    except (TypeError, ValueError):
        return True
    return False


def _told(error: Exception) -> str:
    """An error of somebody else's code, which may have no text."""
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _load(model: nn.Module, checkpoint: str | Path) -> None:
    """Give a model the weights of a file."""
    try:
        state: Any = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(state.get("state_dict", state), strict=True)
    except Exception as error:  # a file may hold anything
        raise SettingsError(f"The checkpoint {str(checkpoint)!r} can not be loaded: {_told(error)}.") from error

"""The best state of a training: weights and scales to go back to, and files of them for a fit that is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quantdebug import fit_compat
from lightning_quantdebug.distillation import copies_of
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.report import write_atomically
from lightning_quantdebug.session_state import load_state, state_of
from lightning_quantdebug.target import Mode


@dataclass(frozen=True, eq=False)
class Best:
    """A state of a training.

    Attributes:
        epoch: Number of epochs that it was trained for; 0: it is the state before the first.
        score: Its quantized score.
        state_dict: Parameters and buffers of the module, also of those that a checkpoint leaves out.
        averages: Those of each averaged copy.
        session: Scales, as :func:`~lightning_quantdebug.session_state.state_of` has them.
    """

    epoch: int
    score: float
    state_dict: Mapping[str, Tensor]
    averages: tuple[Mapping[str, Tensor], ...]
    session: Mapping[str, Any]

    @classmethod
    def of(cls, epoch: int, score: float, trainer: Any, pl_module: nn.Module, session: Instrumentation) -> Best:
        """The state as it is now."""
        averages = tuple(copies_of(module) for module in fit_compat.averages(trainer))
        return cls(epoch, score, copies_of(pl_module), averages, state_of(session))

    def restore(self, trainer: Any, pl_module: nn.Module, session: Instrumentation) -> None:
        """Give the module its weights and the quantizers their scales, which are trained no more."""
        _copy(self.state_dict, pl_module)
        for tensors, module in zip(self.averages, fit_compat.averages(trainer), strict=False):
            _copy(tensors, module)
        load_state(session, self.session)
        session.set_mode(Mode.QUANTIZE)

    def write(self, path: Path) -> None:
        """Write a file of the state.

        Raises:
            ReportError: If it can not be written.
        """
        write_atomically(path, partial(torch.save, vars(self)))

    @classmethod
    def read(cls, path: Path, device: Any) -> Best | None:
        """The state in a file; ``None`` if the file is gone."""
        try:
            return cls(**torch.load(path, map_location=device, weights_only=True))
        except OSError:
            return None


@torch.no_grad()
def _copy(tensors: Mapping[str, Tensor], module: nn.Module) -> None:
    """Write tensors into the parameters and buffers of a module."""
    for name, target in (*module.named_parameters(), *module.named_buffers()):
        target.copy_(tensors[name])

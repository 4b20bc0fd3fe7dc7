"""The engine without a Trainer: quantizers on any module until a block ends."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_quantdebug.errors import CaptureError, SettingsError
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.layers import Runs, Visit
from lightning_quantdebug.model_loan import (
    BorrowedForward,
    call_with,
    eval_mode,
    forward_replaced,
    lent,
    undisturbed,
)
from lightning_quantdebug.target import QuantTarget

__all__ = ["Instrumentation", "batch_runs", "instrument"]


@contextmanager
def instrument(
    model: nn.Module,
    example_batch: Any,
    target: str | Mapping[str, Any] | QuantTarget = "int8",
    *,
    module: str | None = None,
    exclude: Sequence[str] = (),
) -> Iterator[Instrumentation]:
    """Put quantizers on a model until the block ends; the model is then as it was, whatever happened inside.

    Args:
        model: Any module. It is run as it is: control flow, functional calls and any output type are fine.
        example_batch: What ``forward`` takes: a tensor, a tuple of arguments or a dict of keyword arguments.
        target: Preset name, fields, or a :class:`QuantTarget`.
        module: Path of the sub-module to quantize; ``None``: all of it.
        exclude: Name patterns of quantizers that are left out.

    Yields:
        The instrumentation: ``quantizers``, ``coverage``, ``calibrate(batches)``, ``set_mode(mode, pattern, kind)``.

    Raises:
        CaptureError: If nothing in the model can be quantized.
        SettingsError: If the target or a pattern can not be used.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
        >>> batch = torch.randn(2, 1, 8, 8)
        >>> with instrument(model, batch) as q:
        ...     q.calibrate([batch])
        ...     q.set_mode("quantize")
        ...     print(sorted(q.quantizers), torch.equal(model(batch), model(batch)))
        ['0.weight', '1', 'input'] True
    """
    if "forward" in model.__dict__ and isinstance(model.__dict__["forward"], BorrowedForward):
        raise CaptureError(
            f"{type(model).__name__} is instrumented already: leave the first `with instrument(...)` block."
        )
    session = Instrumentation(model, QuantTarget.from_value(target), module=module, exclude=exclude)
    with eval_mode(model), undisturbed(model), torch.inference_mode(False):
        session.record(functools.partial(call_with, model.forward, example_batch), example_batch)
    session.place()
    if session.plan.idle:
        raise SettingsError(" ".join(session.plan.idle))
    with forward_replaced(model, session.run):
        yield session


def batch_runs(session: Instrumentation, batches: Iterable[Any]) -> Runs:
    """The calibration data of a model without a Trainer, as remedies take it.

    Args:
        session: What :func:`instrument` yields; the runs are valid inside its block.
        batches: Each is what ``forward`` takes: a tensor, a tuple of arguments or a dict of keyword arguments.

    Examples:
        >>> model, batch = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(8, 4)
        >>> with instrument(model, batch) as q:
        ...     batch_runs(q, [batch])(lambda run, index: print(index, tuple(run().shape)))
        0 (8, 2)
    """
    kept = list(batches)

    def runs(visit: Visit, most: int | None = None) -> None:
        with lent(session.root):
            for index, batch in enumerate(kept[:most]):
                visit(functools.partial(call_with, session.root, batch), index)

    return runs

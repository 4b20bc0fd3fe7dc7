"""What it takes to run a model that is somebody else's and give it back as it was: modes, buffers, ``forward``."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def call_with(model: Callable[..., Any], batch: Any) -> Any:
    """Call a model with a batch: a tuple or list gives arguments, a dict keyword arguments, all else one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode until the block ends; then each module has its own mode back."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Give back buffers and random numbers as they were: runs of ours count for nothing."""
    kept = [
        (module._buffers, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    random_state = torch.get_rng_state()
    on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    devices = torch.cuda.get_rng_state_all() if on_gpu else []
    try:
        yield
    finally:
        torch.set_rng_state(random_state)
        if devices:
            torch.cuda.set_rng_state_all(devices)
        for owner, name, buffer, values in kept:
            owner[name] = buffer
            if not buffer.is_inference() and not torch.equal(buffer, values):
                if buffer.shape != values.shape:
                    # Observers of torch.ao size their buffers in forward.
                    buffer.data = values
                else:
                    buffer.detach().copy_(values)


@contextmanager
def lent(model: nn.Module) -> Iterator[None]:
    """A model for runs of ours that leave no trace: in eval mode, without gradients, with tensors that can be kept."""
    with eval_mode(model), undisturbed(model), torch.inference_mode(False), torch.no_grad():
        yield


class BorrowedForward:
    """The ``forward`` of an instrumented module: the original one, run with the quantizers.

    Copies and pickles of the module get its plain ``forward``, bound to the copy.

    Attributes:
        original: The plain ``forward``.
        run: What each call goes through.
    """

    def __init__(self, original: Callable[..., Any], run: Callable[[Callable[[], Any]], Any]) -> None:
        """Stand in for ``original``, each call of which goes through ``run``."""
        functools.update_wrapper(self, original)
        self.original = original
        self.run = run

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the original with the quantizers in their modes."""
        return self.run(functools.partial(self.original, *args, **kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The plain ``forward`` of the copy."""
        return copy.deepcopy(self.original, memo)

    def __reduce__(self) -> Any:
        """Pickle as the plain ``forward``, such that it can be read without this package."""
        return copy.copy, (self.original,)


@contextmanager
def forward_replaced(model: nn.Module, run: Callable[[Callable[[], Any]], Any]) -> Iterator[None]:
    """``model(...)`` and ``model.forward(...)`` run with the quantizers until the block ends."""
    had_own = "forward" in model.__dict__
    original = model.forward
    model.__dict__["forward"] = BorrowedForward(original, run)
    try:
        yield
    finally:
        if had_own:
            model.__dict__["forward"] = original
        else:
            del model.__dict__["forward"]

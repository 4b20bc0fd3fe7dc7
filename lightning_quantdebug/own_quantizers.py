"""Quantizers that the user's model brings along: found, bypassed, and checked like ours.

Two kinds are known: modules with torch's fake-quantize interface (a ``fake_quant_enabled`` buffer, as in
``torch.ao.quantization.FakeQuantize`` and its successors), and modules that follow this small protocol, which any
hand-written quantizer can: a boolean attribute ``enabled`` and an integer attribute ``bit_width``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quantdebug.interception import clean_path
from lightning_quantdebug.traces import Parting, relative_error


@dataclass(frozen=True)
class OwnQuantizer:
    """One quantizer of the user's."""

    path: str
    module: nn.Module

    @property
    def has_bit_width(self) -> bool:
        """Whether its bit-width can be set."""
        return isinstance(getattr(self.module, "bit_width", None), int)


def find_own_quantizers(root: nn.Module) -> list[OwnQuantizer]:
    """The quantizers among a network's modules.

    Examples:
        >>> find_own_quantizers(nn.Linear(2, 2))
        []
    """
    return [OwnQuantizer(clean_path(path), module) for path, module in root.named_modules() if _is_quantizer(module)]


def _is_quantizer(module: nn.Module) -> bool:
    """Whether a module has one of the two interfaces."""
    if isinstance(getattr(module, "fake_quant_enabled", None), Tensor):
        return True
    return isinstance(getattr(module, "enabled", None), bool) and isinstance(getattr(module, "bit_width", None), int)


@contextmanager
def own_quantizers(found: list[OwnQuantizer], enabled: bool, bit_width: int | None = None) -> Iterator[None]:
    """Switch the user's quantizers until the block ends; then they are as before.

    Args:
        found: The quantizers.
        enabled: Whether they quantize.
        bit_width: Their bit-width, for those whose bit-width can be set; ``None`` leaves it.
    """
    before: list[tuple[nn.Module, str, Any]] = []
    try:
        for quantizer in found:
            module: Any = quantizer.module
            switch = getattr(module, "fake_quant_enabled", None)
            if isinstance(switch, Tensor):
                before.append((module, "fake_quant_enabled", switch.clone()))
                with torch.no_grad():
                    switch.fill_(int(enabled))
            else:
                before.append((module, "enabled", module.enabled))
                module.enabled = enabled
            if bit_width is not None and quantizer.has_bit_width:
                before.append((module, "bit_width", module.bit_width))
                module.bit_width = bit_width
        yield
    finally:
        for module, name, value in reversed(before):
            if isinstance(value, Tensor):
                with torch.no_grad():
                    getattr(module, name).copy_(value)
            else:
                setattr(module, name, value)


class IdentityCheck:
    """Compares what goes into the user's quantizers with what comes out, while a block runs."""

    def __init__(self, found: list[OwnQuantizer]) -> None:
        """Start without a run."""
        self._found = found
        self.errors: list[Parting] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Compare until the block ends."""
        handles = [quantizer.module.register_forward_hook(self._hook(quantizer.path)) for quantizer in self._found]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, path: str) -> Any:
        """A forward hook that compares input and output."""

        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                self.errors.append(Parting(path, relative_error(output.detach(), args[0].detach())))

        return hook

    def first_beyond(self, bound: float) -> Parting | None:
        """The first quantizer that changed its tensor by more than ``bound``."""
        return next((parting for parting in self.errors if not parting.error <= bound), None)

"""Compare two runs of a network operation by operation, and name the first one where they part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from lightning_quantdebug.fake_quantize import is_transformed
from lightning_quantdebug.interception import clean_path
from lightning_quantdebug.operations import tensors_in
from lightning_quantdebug.recorder import plain_containers


@dataclass(frozen=True)
class Parting:
    """Where two runs part.

    Attributes:
        name: The operation or module.
        error: Relative error of its output, ``|a - b| / |b|`` in the Euclidean norm; infinite if the shapes differ.
    """

    name: str
    error: float


class OutputTrace:
    """Outputs of one run, in order, and the comparison of a later run with them.

    The first run is kept (the outputs of one batch, in memory); a second one is compared on the fly.

    Args:
        skip: Names that are not compared.
    """

    def __init__(self, skip: frozenset[str] = frozenset()) -> None:
        """Start without a run."""
        self.skip = skip
        self.kept: list[tuple[str, Tensor]] = []
        self.errors: list[Parting] = []
        self._position = 0
        self._half = False

    def keep(self, name: str, output: Any) -> None:
        """Take in one output of the first run."""
        self.kept += [(name, tensor.detach().clone()) for tensor in tensors_of(output)]

    def compare(self, name: str, output: Any) -> None:
        """Compare one output of the second run."""
        for tensor in tensors_of(output):
            if self._position >= len(self.kept):
                self.errors.append(Parting(name, float("inf")))
                return
            kept_name, kept = self.kept[self._position]
            self._position += 1
            self._half = self._half or tensor.dtype in (torch.float16, torch.bfloat16)
            if kept_name != name:
                self.errors.append(Parting(name, float("inf")))
            elif name not in self.skip:
                self.errors.append(Parting(name, relative_error(tensor.detach(), kept)))

    @property
    def in_half_precision(self) -> bool:
        """Whether any compared output was float16 or bfloat16."""
        return self._half

    def first_beyond(self, bound: float, bounds: Sequence[float] = ()) -> Parting | None:
        """The first output whose error exceeds ``bound`` and, where given, the bound of its own."""
        pairs = zip(self.errors, chain(bounds, repeat(0.0)), strict=False)
        return next((parting for parting, own in pairs if not parting.error <= max(bound, own)), None)

    def again(self) -> OutputTrace:
        """A trace that compares another run with the one kept here."""
        other = OutputTrace(self.skip)
        other.kept = self.kept
        return other

    def worst(self) -> Parting | None:
        """The output with the largest error."""
        return max(self.errors, key=lambda parting: parting.error, default=None)


class SizeTrace:
    """Of each output of a long run two numbers, so that a second run can be compared with it in little memory.

    The two are a weighted sum (weights 0.5 to 1.5, so that a softmax and a permutation show) and the Euclidean norm.
    Independent noise of relative size ``e`` in every value moves the sum by about ``e`` times the norm.
    """

    def __init__(self) -> None:
        """Start without a run."""
        self.errors: list[Parting] = []
        self._kept: list[tuple[str, float, float]] = []
        self._position = 0

    def keep(self, name: str, output: Any) -> None:
        """Take in one output of the first run."""
        self._kept += [(name, *_size(tensor)) for tensor in tensors_of(output)]

    def compare(self, name: str, output: Any) -> None:
        """Compare one output of the second run."""
        for tensor in tensors_of(output):
            kept = self._kept[self._position] if self._position < len(self._kept) else ("", 0.0, 0.0)
            self._position += 1
            total, _ = _size(tensor)
            same = total == kept[1] or (math.isnan(total) and math.isnan(kept[1]))
            error = 0.0 if same else abs(total - kept[1]) / kept[2] if kept[2] > 0 else math.inf
            self.errors.append(Parting(name, error if kept[0] == name else math.inf))

    def first_beyond(self, bound: float) -> Parting | None:
        """The first output whose error exceeds ``bound``."""
        return next((parting for parting in self.errors if not parting.error <= bound), None)


def _size(tensor: Tensor) -> tuple[float, float]:
    """Weighted sum and Euclidean norm in float64."""
    values = tensor.detach().double().flatten()
    weights = torch.linspace(0.5, 1.5, values.numel(), dtype=torch.float64, device=values.device)
    return float(values @ weights), float(values.norm())


def tensors_of(output: Any) -> Iterator[Tensor]:
    """The tensors of an output that hold real numbers."""
    for _, tensor in tensors_in((plain_containers(output),), {}):
        # Tensors inside `torch.func` have no memory of their own, and none of their values outside it.
        if tensor.is_floating_point() and tensor.layout is torch.strided and not is_transformed(tensor):
            yield tensor


def relative_error(value: Tensor, reference: Tensor) -> float:
    """``|value - reference| / |reference|`` in the Euclidean norm, in float64; equal infinities count as equal.

    Args:
        value: Any shape.
        reference: The same shape; another one gives infinity.

    Examples:
        >>> relative_error(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1.0]))
        0.0
    """
    if value.shape != reference.shape:
        return float("inf")
    if torch.equal(value, reference):
        return 0.0
    a, b = value.double().flatten(), reference.double().flatten()
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, 0.0, a - b)
    if not bool(difference.isfinite().all()):
        return float("inf")
    norm = torch.where(b.isfinite(), b, 0.0).norm()
    return float(difference.norm() / norm) if float(norm) > 0 else float("inf")


@contextmanager
def module_outputs(root: nn.Module, take: Callable[[str, Any], None]) -> Iterator[None]:
    """Call ``take`` with the path and output of every module of ``root`` that runs in the block.

    Only global hooks are used, so that nothing is attached to the network.
    """
    paths = {id(module): clean_path(path) or type(module).__name__ for path, module in root.named_modules()}

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if id(module) in paths and not isinstance(module, nn.modules.loss._Loss):
            take(paths[id(module)], output)

    handle = register_module_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()

"""Quantizer classes, right and wrong ones, that targets name by their import path."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_quantdebug.encoding import Encoding
from lightning_quantdebug.target import QuantSpec


class Correct:
    """The definition, as a user would write it."""

    def __init__(self, spec: QuantSpec) -> None:
        self.spec = spec

    def round(self, steps: Tensor) -> Tensor:
        return steps.round()

    def levels(self, x: Tensor, encoding: Encoding) -> tuple[Tensor, Tensor]:
        shape = [1] * x.ndim
        if encoding.channel_axis is not None:
            shape[encoding.channel_axis] = -1
        scale, zero = encoding.scale.reshape(shape), encoding.zero_point.reshape(shape)
        return scale, (self.round(x / scale) + zero).clamp(self.spec.quant_min, self.spec.quant_max) - zero

    def __call__(self, x: Tensor, encoding: Encoding) -> Tensor:
        scale, levels = self.levels(x, encoding)
        return (levels * scale).to(x.dtype)


class Flooring(Correct):
    def round(self, steps: Tensor) -> Tensor:
        return steps.floor()


class HalfAStepOff(Correct):
    def __call__(self, x: Tensor, encoding: Encoding) -> Tensor:
        scale, levels = self.levels(x, encoding)
        return ((levels + 0.5) * scale).to(x.dtype)


class LosingZero(Correct):
    """Off by less than half a step, so that only zero tells."""

    def __call__(self, x: Tensor, encoding: Encoding) -> Tensor:
        scale, _ = self.levels(x, encoding)
        return torch.where(x == 0, 0.25 * scale, super().__call__(x, encoding))


class NotClipping(Correct):
    def __call__(self, x: Tensor, encoding: Encoding) -> Tensor:
        scale, _ = self.levels(x, encoding)
        return self.round(x / scale) * scale


class OneScaleForAll(Correct):
    """Takes the first channel's scale for every channel."""

    def levels(self, x: Tensor, encoding: Encoding) -> tuple[Tensor, Tensor]:
        scale, zero = encoding.scale.flatten()[0], encoding.zero_point.flatten()[0]
        return scale, (self.round(x / scale) + zero).clamp(self.spec.quant_min, self.spec.quant_max) - zero


class OverflowingAt32(Correct):
    """Keeps its levels in int16."""

    def round(self, steps: Tensor) -> Tensor:
        return steps.round().to(torch.int64).to(torch.int16).float()


class HalfPrecision(Correct):
    """Right at 8 bits; at 32 bits its result has no more than float16's eleven bits."""

    def __call__(self, x: Tensor, encoding: Encoding) -> Tensor:
        return (
            super().__call__(x, encoding).half().to(x.dtype)
            if self.spec.bit_width == 32
            else super().__call__(x, encoding)
        )


class WeightsWrongAt32(Correct):
    def __call__(self, x: Tensor, encoding: Encoding) -> Tensor:
        wrong = self.spec.bit_width == 32 and self.spec.symmetric
        return super().__call__(x, encoding) * (1.01 if wrong else 1.0)


class Flattening(Correct):
    def __call__(self, x: Tensor, encoding: Encoding) -> Tensor:
        return super().__call__(x, encoding).flatten()


class Doubling(Correct):
    def __call__(self, x: Tensor, encoding: Encoding) -> Tensor:
        return super().__call__(x, encoding).double()


class WrongInLaterBatches(Correct):
    """At 32 bits wrong where a tensor has great values."""

    factor = 2.0

    def __call__(self, x: Tensor, encoding: Encoding) -> Tensor:
        wrong = self.spec.bit_width == 32 and float(x.mean()) > 20
        return super().__call__(x, encoding) * (self.factor if wrong else 1.0)


class NanInLaterBatches(WrongInLaterBatches):
    factor = float("nan")

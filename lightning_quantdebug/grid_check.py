"""Whether a quantizer does what a uniform quantizer must do, and what float noise alone would do in its place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_quantdebug.encoding import Encoding, encoding_from_range
from lightning_quantdebug.errors import CaptureError
from lightning_quantdebug.instrument import Instrumentation
from lightning_quantdebug.quantizer import Quantizer
from lightning_quantdebug.target import Granularity, Kind, Mode, QuantSpec

# Values across the range of each encoding: 4001 are 15 in each step at 8 bits. Multiples of the golden ratio, modulo 1,
# are spread evenly however many there are, and fall on no level.
_VALUES = 4001
_GOLDEN = 0.6180339887498949


def grid_fault(quantizer: Quantizer) -> str | None:
    """What is wrong with a quantizer's arithmetic, ``None`` if nothing.

    Values over the clipping range must come back within half a step (rounding to nearest), zero as zero, and values
    outside at the ends of the range. This is the definition of uniform quantization (white paper, equations 2.4 to
    2.7), so it holds for any correct quantizer class. Quantizers with several channels or groups are tried with a range
    of its own for each, so that mixing them up shows.

    Args:
        quantizer: A calibrated quantizer; it is checked at its own bit-width with ranges of its own.

    Examples:
        >>> grid_fault(Quantizer("relu", Kind.ACTIVATION, QuantSpec(8))) is None
        True
    """
    probe = Quantizer(quantizer.name, quantizer.kind, quantizer.spec, quantizer.channel_axis, None, quantizer.factory)
    probe.encoding = _uneven_encoding(quantizer.spec, quantizer.channel_axis)
    probe.mode = Mode.QUANTIZE
    try:
        return _fault(probe, probe.encoding)
    except CaptureError as error:
        return f"does not return what it must: {error}"


def _fault(probe: Quantizer, encoding: Encoding) -> str | None:
    """The first of the three properties that does not hold."""
    size = encoding.spec.group_size or _VALUES
    low, high, step = (end.unsqueeze(-1) for end in (encoding.range_min, encoding.range_max, encoding.scale))

    def apply(values: Tensor) -> Tensor:
        return _as_probed(probe(_as_tensor(values, encoding).clone()), values.shape, encoding)

    count = encoding.scale.numel() * size
    share = (torch.arange(count, dtype=torch.float64) * _GOLDEN % 1).float().reshape(*encoding.scale.shape, size)
    ramp = low + (high - low) * share
    steps = ((apply(ramp) - ramp).double().abs() / step).max().item()
    # Above 12 bits the roundings of float32 itself are no longer small beside half a step.
    if not steps <= 0.5 + 1e-3 + 1e-6 / float(step.min()):
        return f"is off by up to {steps:.3g} steps inside its range, where rounding to nearest is off by 0.5 at most"
    zero = apply(torch.zeros_like(ramp)).abs().max().item()
    if zero != 0.0:
        return f"turns 0 into {zero:.3g}: zero must stay zero, as padding and ReLU rely on it"
    for end, beyond in ((low, low - 10 * step), (high, high + 10 * step)):
        got = apply(beyond.expand_as(ramp))
        if not bool(((got - end).abs() <= step * 1e-3 + 1e-6).all()):
            ends = f"[{float(low.flatten()[0]):.3g}, {float(high.flatten()[0]):.3g}]"
            return f"does not clip to its range {ends}: it turns {float(beyond.flatten()[0]):.3g} into " + (
                f"{float(got.flatten()[0]):.3g}"
            )
    return None


def _uneven_encoding(spec: QuantSpec, channel_axis: int | None) -> Encoding:
    """An encoding with a range of its own for each of three channels and two groups."""
    shape = {Granularity.PER_TENSOR: (), Granularity.PER_CHANNEL: (3,), Granularity.PER_GROUP: (3, 2)}[spec.granularity]
    count = int(torch.tensor(shape).prod()) if shape else 1
    factor = (2.0 ** torch.arange(count)).reshape(shape)
    return encoding_from_range(-0.75 * factor, 1.25 * factor, spec, channel_axis)


def _as_tensor(values: Tensor, encoding: Encoding) -> Tensor:
    """Values of shape ``(*scale.shape, N)`` as a tensor whose channels stand where the encoding has them."""
    if encoding.spec.granularity is Granularity.PER_GROUP:
        return values.flatten(1)
    return values.movedim(0, encoding.channel_axis or 0)


def _as_probed(tensor: Tensor, shape: torch.Size, encoding: Encoding) -> Tensor:
    """The way back of :func:`_as_tensor`."""
    if encoding.spec.granularity is Granularity.PER_GROUP:
        return tensor.reshape(shape)
    return tensor.movedim(encoding.channel_axis or 0, 0)


class _FloatNoise:
    """In place of a quantizer: each value moves by about one unit in the last place of float32; 0 stays 0."""

    def __init__(self, spec: QuantSpec) -> None:
        """Seed a generator of its own, on the CPU, so that each run has the same noise."""
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, x: Tensor, encoding: Encoding) -> Tensor:
        """``x`` with noise, in its shape and dtype; the noise of a 32-bit grid over the tensor's range included."""
        noise = (2 * torch.rand(x.shape, generator=self._generator) - 1).to(x.device)
        return torch.where(x == 0, x, x + noise * (x.abs() * 2.0**-23 + encoding.scale)).to(x.dtype)


@contextmanager
def noisy_activations(session: Instrumentation) -> Iterator[None]:
    """Float noise in place of every activation quantizer, at 32 bits, until the block ends.

    Args:
        session: A calibrated instrumentation; its modes are left to the caller.
    """
    before = [(quantizer, quantizer.factory) for quantizer in session.select(kind=Kind.ACTIVATION)]

    def give_back() -> None:
        for quantizer, factory in before:
            quantizer.factory = factory

    try:
        for quantizer, _ in before:
            quantizer.factory = _FloatNoise
        with session.bit_width(32):
            try:
                yield
            finally:
                # Before the bit-width goes back, because that makes the quantizers' arithmetic anew.
                give_back()
    finally:
        give_back()

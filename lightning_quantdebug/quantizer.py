"""One quantizer: the place where one tensor, weight or activation, is put on a grid.

A quantizer has a mode (bypass, observe, quantize), an observer while it is calibrated and an encoding afterwards. It
is no ``nn.Module`` and is attached to nothing: :mod:`lightning_quantdebug.instrument` calls it.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lightning_quantdebug.encoding import Encoding, encoding_from_range
from lightning_quantdebug.errors import CaptureError, SettingsError
from lightning_quantdebug.fake_quantize import fake_quantize, fake_quantize_
from lightning_quantdebug.learned_scale import LearnedScale
from lightning_quantdebug.observer import Observer
from lightning_quantdebug.range_setting import range_from_observer, range_from_tensor
from lightning_quantdebug.target import Kind, Mode, QuantSpec, RangeSetting

# At 32 bits the range is widened on both sides by this many times its width, so that data which calibration has not
# seen is not clipped: the check is about the pipeline, not about ranges. With 16 there are 2^32 / 33 = 2^27 levels in
# the range that was seen, still eight times finer than float32 at its ends.
_HEADROOM = 16.0


class CustomQuantizer(Protocol):
    """What a user's own quantizer class must look like; ``QuantTarget.quantizer`` names it.

    It is made once per quantizer and bit-width from the spec, and called with the tensor and its encoding.
    """

    def __call__(self, x: Tensor, encoding: Encoding) -> Tensor:
        """Fake-quantize ``x`` (any shape) with ``encoding``; the result has the shape and dtype of ``x``."""
        ...


QuantizerFactory = Callable[[QuantSpec], CustomQuantizer]


def load_custom_quantizer(path: str | None) -> QuantizerFactory | None:
    """Import the class that ``QuantTarget.quantizer`` names.

    Raises:
        SettingsError: If the path has no dot, or the module or the class does not exist.
    """
    if path is None:
        return None
    module, _, name = path.rpartition(".")
    if not module:
        raise SettingsError(f"`quantizer` must be an import path such as 'package.module.Class', got {path!r}.")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"`quantizer` names {path!r}, which can not be imported: {error}.") from error
    if not callable(found):
        raise SettingsError(f"`quantizer` must name a class or function, {path!r} is a {type(found).__name__}.")
    factory: QuantizerFactory = found
    return factory


@dataclass(frozen=True, eq=False)
class QuantizerState:
    """A quantizer at one moment, to go back to."""

    spec: QuantSpec
    channel_axis: int | None
    mode: Mode
    encoding: Encoding | None
    frozen: bool
    observer: Observer
    ranges: tuple[tuple[Tensor, Tensor] | None, tuple[Tensor, Tensor] | None]


class Quantizer:
    """One quantizer.

    Args:
        name: As in every report.
        kind: Weight or activation.
        spec: The grid.
        channel_axis: Axis of the channels of a per-channel weight, else ``None``.
        fixed_range: Clipping range that no calibration changes, such as that of a softmax.
        factory: Class of a custom quantizer, ``None`` for ours.

    Attributes:
        mode: What it does now.
        observer: What calibration saw of an activation or a weight.
        encoding: Scale and zero point, ``None`` before calibration.
        factory: Class of a custom quantizer, ``None`` for ours.
        version: Counts every change of the encoding, for caches.
        learned: What trains the scale, ``None`` while it is not trained.
        probe: Called in mode observe in place of the observer; its result takes the tensor's place.
        frozen: Whether the encoding survives calibration, as that of a weight whose rounding was learned must.
    """

    def __init__(
        self,
        name: str,
        kind: Kind,
        spec: QuantSpec,
        channel_axis: int | None = None,
        fixed_range: tuple[float, float] | None = None,
        factory: QuantizerFactory | None = None,
    ) -> None:
        """Start in bypass without a range."""
        self.name = name
        self.kind = kind
        self.channel_axis = channel_axis
        self.fixed_range = fixed_range
        self.observer = Observer()
        self.learned: LearnedScale | None = None
        self.frozen = False
        self._changes = 0
        self.mode = Mode.BYPASS
        self.probe: Callable[[Tensor], Tensor] | None = None
        self._spec = spec
        self._encoding: Encoding | None = None
        self._range: tuple[Tensor, Tensor] | None = None
        self._whole_range: tuple[Tensor, Tensor] | None = None
        self.factory = factory
        self._custom = factory(spec) if factory is not None else None

    def __repr__(self) -> str:
        """Name, grid and mode."""
        return f"Quantizer({self.name!r}, {self.kind.value}, {self.bit_width} bits, {self.mode.value})"

    @property
    def spec(self) -> QuantSpec:
        """The grid."""
        return self._spec

    @property
    def bit_width(self) -> int:
        """Bits of one value."""
        return self._spec.bit_width

    @property
    def encoding(self) -> Encoding | None:
        """Scale and zero point, ``None`` before calibration."""
        return self._encoding if self.learned is None else self.learned.encoding

    @encoding.setter
    def encoding(self, encoding: Encoding | None) -> None:
        self._encoding, self.learned = encoding, None
        self._changes += 1

    @property
    def version(self) -> int:
        """Counts every change of the encoding, for caches."""
        return self._changes + (0 if self.learned is None else self.learned.version)

    @property
    def is_learnable(self) -> bool:
        """Whether the scale can be trained: no range that is fixed, no class of the user's, and fewer than 32 bits."""
        has_range = self._encoding is not None and self.fixed_range is None
        return has_range and self._custom is None and self.bit_width < 32

    def learn(self) -> LearnedScale:
        """Train the scale from now on, starting from the present encoding.

        Raises:
            CaptureError: If there is no encoding to start from, or a user's class quantizes.
        """
        if not self.is_learnable or self._encoding is None:
            raise CaptureError(
                f"The scale of {self.name!r} can not be trained: it has no range, or not one of its own."
            )
        self.learned = LearnedScale(self._encoding)
        return self.learned

    def settle(self) -> None:
        """Keep the scale as it was trained, and train it no more."""
        if self.learned is not None:
            self.encoding = self.learned.encoding

    @property
    def is_calibrated(self) -> bool:
        """Whether the quantizer has an encoding."""
        return self._encoding is not None

    def reset(self) -> None:
        """Forget what was observed."""
        self.observer = Observer()
        if self.frozen:
            return
        self._range = self._whole_range = None
        self.encoding = None

    def freeze(self) -> None:
        """Keep the present encoding, whatever calibration sees from now on.

        Raises:
            CaptureError: If there is no encoding to keep.
        """
        if self._encoding is None:
            raise CaptureError(f"{self.name!r} has no encoding that could be kept: calibrate before `freeze`.")
        self.frozen = True

    def respecify(self, spec: QuantSpec, channel_axis: int | None) -> None:
        """Take another grid: bit-width, granularity, range setting; a frozen encoding is given up.

        An activation gets its range from what was observed at once, a weight when it is observed again.

        Args:
            spec: The grid.
            channel_axis: Axis of the channels, ``None`` per tensor.
        """
        self._spec, self.channel_axis, self.frozen = spec, channel_axis, False
        self._custom = self.factory(spec) if self.factory is not None else None
        self._range = self._whole_range = None
        self.encoding = None
        if self.kind is Kind.ACTIVATION:
            self.set_range()
        else:
            self.observer = Observer()

    def state(self) -> QuantizerState:
        """Everything that makes the quantizer what it is now."""
        return QuantizerState(
            self._spec,
            self.channel_axis,
            self.mode,
            self.encoding,
            self.frozen,
            copy.deepcopy(self.observer),
            (self._range, self._whole_range),
        )

    def restore(self, state: QuantizerState) -> None:
        """Become what :meth:`state` was taken of."""
        if state.spec is not self._spec:
            self._spec = state.spec
            self._custom = self.factory(state.spec) if self.factory is not None else None
        self.channel_axis, self.mode, self.frozen = state.channel_axis, state.mode, state.frozen
        self.observer = copy.deepcopy(state.observer)
        self._range, self._whole_range = state.ranges
        self.encoding = state.encoding

    def observe(self, x: Tensor) -> None:
        """Take in one batch of the tensor; a weight counts as it is now, whatever was seen of it before."""
        if self.kind is Kind.WEIGHT:
            self.observer = Observer()
            self._range = range_from_tensor(x.detach(), self._spec, self.channel_axis)
            unclipped = replace(self._spec, range_setting=RangeSetting.MIN_MAX)
            self._whole_range = range_from_tensor(x.detach(), unclipped, self.channel_axis)
        self.observer.observe(x)

    @torch.inference_mode(False)
    def set_range(self) -> None:
        """Turn what was observed into an encoding; where no finite number was observed there is none."""
        if self.fixed_range is not None:
            low, high = (torch.tensor(end) for end in self.fixed_range)
            self._range = (low, high)
        elif self.observer.count == 0 or self.frozen:
            return
        elif self.kind is Kind.ACTIVATION:
            self._range = range_from_observer(self.observer, self._spec)
        assert self._range is not None
        self.encoding = encoding_from_range(*self._range, self._spec, self.channel_axis)

    @torch.inference_mode(False)
    def set_bit_width(self, bit_width: int) -> None:
        """Change the bit-width and set the range anew from what was observed; 32 bits clip nothing."""
        self._spec = replace(self._spec, bit_width=bit_width)
        self._custom = self.factory(self._spec) if self.factory is not None else None
        if self._range is None:
            return
        if bit_width < 32:
            self.set_range()
            return
        if self._whole_range is not None:
            self.encoding = encoding_from_range(*self._whole_range, self._spec, self.channel_axis)
            return
        low, high = self.fixed_range or (self.observer.range_min, self.observer.range_max)
        margin = 0.0 if self.fixed_range else _HEADROOM * max(high - low, 1e-6)
        ends = (torch.tensor(low - margin), torch.tensor(high + margin))
        self.encoding = encoding_from_range(*ends, self._spec)

    def __call__(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """Do what the mode says; the result has the shape and dtype of ``x``.

        Args:
            x: The tensor.
            overwrite: Whether the result may be written into ``x``, which saves memory and time.

        Raises:
            CaptureError: If a custom quantizer changes the shape or the dtype.
        """
        if self.mode is Mode.BYPASS or not x.is_floating_point():
            return x
        if self.mode is Mode.OBSERVE:
            if self.probe is not None:
                return self.probe(x)
            self.observe(x)
            return x
        return self.quantized(x, overwrite)

    def quantized(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """The tensor on the grid, whatever the mode; arguments and errors as of a call."""
        if self._encoding is None:
            return x
        if self.learned is not None:
            return self.learned(x, per_sample=self.kind is Kind.ACTIVATION)
        if self._encoding.scale.device != x.device:
            self._encoding = self._encoding.to(x.device)
        if self._custom is None:
            return (fake_quantize_ if overwrite else fake_quantize)(x, self._encoding)
        result = self._custom(x, self._encoding)
        if not isinstance(result, Tensor) or result.shape != x.shape or result.dtype != x.dtype:
            got = f"{result.dtype} {tuple(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise CaptureError(
                f"The custom quantizer of {self.name!r} must return a tensor of {x.dtype} {tuple(x.shape)}, got {got}."
            )
        return result

"""The weight that the hardware sees: folded, adjusted by remedies, quantized; computed once for as long as it holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_quantdebug.adjustment import Adjustment
from lightning_quantdebug.batchnorm_folding import fold_batch_norm, norm_factor, scale_inputs, scale_outputs
from lightning_quantdebug.operations import Slot
from lightning_quantdebug.plan import BatchNormFold
from lightning_quantdebug.quantizer import Quantizer
from lightning_quantdebug.target import Mode

Parameters = tuple[Tensor, Tensor | None]
"""A weight and its bias, if there is one."""


class Sources:
    """What a weight was computed from: an owner (an encoding's version, an observer) and tensors, as they were.

    The tensors are held, so that no other one can take their identity. Writing through ``.data``, as weight averaging
    does, changes no version: on CPU some values are compared as well (under 10 us a tensor). On an accelerator that
    would wait for the device at each weight, so that it is left out.
    """

    def __init__(self, owner: object, tensors: tuple[Tensor | None, ...]) -> None:
        """Note the tensors as they are."""
        self._owner = owner
        self._tensors = tensors
        self._versions = [None if t is None or t.is_inference() else t._version for t in tensors]
        self._values = [None if t is None else _some_values(t).clone() for t in tensors]

    def are_still(self, owner: object, tensors: tuple[Tensor | None, ...]) -> bool:
        """Whether the owner is equal, and the tensors are the same ones and were not written into since."""
        return owner == self._owner and all(map(self._is_still, tensors, self._tensors, self._versions, self._values))

    @staticmethod
    def _is_still(tensor: Tensor | None, before: Tensor | None, version: int | None, values: Tensor | None) -> bool:
        """Whether one tensor is the same and was not written into since; of an inference tensor that is not known."""
        if tensor is None or tensor is not before or values is None or version is None:
            return tensor is None and before is None
        return tensor._version == version and (tensor.device.type != "cpu" or torch.equal(_some_values(tensor), values))


def _some_values(tensor: Tensor) -> Tensor:
    """About eight values along each axis of a tensor, as a view."""
    return tensor.detach()[tuple(slice(None, None, max(1, size // 8)) for size in tensor.shape)]


@dataclass
class WeightPlace:
    """A weight argument of an operation, its quantizer, its folded batch normalization and its adjustment.

    ``cached`` holds what was computed last, without and with the quantizer.
    """

    slot: Slot
    quantizer: Quantizer
    fold: BatchNormFold | None = None
    adjustment: Adjustment | None = None
    cached: dict[bool, tuple[Sources, Tensor, Tensor | None]] = field(default_factory=dict)
    observed: Sources | None = None


class EffectiveWeights:
    """Computes effective weights and keeps them.

    Args:
        owners: The modules of the network by path, which hold the tensors of batch normalizations.

    Attributes:
        folds_always: Whether batch normalizations are folded also where the weight is not quantized, so that FP32
            results can be compared with quantized ones.
    """

    def __init__(self, owners: Mapping[str, nn.Module]) -> None:
        """Nothing is kept yet."""
        self._owners = owners
        self.folds_always = False

    def is_folded(self, spot: WeightPlace) -> bool:
        """Whether the batch normalization of a weight is a part of it now, and does nothing itself."""
        if spot.fold is None:
            return False
        if spot.adjustment is not None and spot.adjustment.rescales:
            return True
        return (is_on(spot.quantizer) or self.folds_always) and not self._keeps_norm(spot)

    def changes(self, spot: WeightPlace) -> bool:
        """Whether the operation gets another weight than its own now."""
        rescales = spot.adjustment is not None and spot.adjustment.rescales
        return is_on(spot.quantizer) or rescales or self.is_folded(spot)

    def observe(self, spot: WeightPlace, weight: Tensor, bias: Tensor | None) -> None:
        """Let the quantizer see the weight, once for as long as it does not change."""
        sources = self._sources(spot, weight, bias)
        observer = spot.quantizer.observer
        state = (observer, spot.adjustment)
        if observer.count and spot.observed is not None and spot.observed.are_still(state, sources):
            return
        with torch.no_grad():
            spot.quantizer.observe(self._in_float(spot, weight, bias)[0])
        spot.observed = Sources((spot.quantizer.observer, spot.adjustment), sources)

    def get(self, spot: WeightPlace, weight: Tensor, bias: Tensor | None) -> Parameters:
        """The weight and bias, computed once for as long as nothing that they depend on changes."""
        sources = self._sources(spot, weight, bias)
        if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in sources):
            return self._newly(spot, weight, bias)
        on = is_on(spot.quantizer)
        state = (spot.quantizer.version if on else None, self._is_training(spot.fold), spot.adjustment)
        kept = spot.cached.get(on)
        if kept is None or not kept[0].are_still(state, sources):
            # Kept beyond the block: an inference tensor could not take part in training later.
            with torch.inference_mode(False), torch.no_grad():
                kept = spot.cached[on] = (Sources(state, sources), *self._newly(spot, weight, bias))
        return kept[1], kept[2]

    def _newly(self, spot: WeightPlace, weight: Tensor, bias: Tensor | None) -> Parameters:
        """The weight and bias, quantized if the quantizer is on.

        While the normalization trains, it stays and computes the statistics of its batch; the weight is then folded
        with the running statistics, quantized and unfolded again (Krishnamoorthi 2018, section 3.2.2). An adjusted
        weight stays folded with the running statistics.
        """
        effective, effective_bias = self._in_float(spot, weight, bias)
        quantized = spot.quantizer(effective) if is_on(spot.quantizer) else effective
        if spot.fold is None or not self._keeps_norm(spot):
            return quantized, effective_bias
        _, variance, gamma, _ = self._norm_tensors(spot.fold)
        assert variance is not None
        factor = norm_factor(variance, gamma, spot.fold, quantized.dtype)
        inverse = 1 / torch.where(factor == 0, 1.0, factor)
        # What makes up for quantization counts here too: else the running mean would take the error in that the
        # correction takes out, and the folded layer would correct it twice.
        correction = spot.adjustment.bias_correction if spot.adjustment is not None and is_on(spot.quantizer) else None
        if correction is not None:
            unfolded = correction if spot.fold.forward else correction * inverse
            bias = Adjustment(bias_correction=unfolded).bias(bias, corrected=True)
        if not spot.fold.forward:
            return scale_outputs(quantized, inverse, spot.fold), bias
        # Of an input that gamma = 0 makes constant the folded weight keeps nothing, but its constant counts.
        constant = scale_inputs(weight, (factor == 0).to(weight.dtype), spot.fold)
        return scale_inputs(quantized, inverse, spot.fold) + constant, bias

    def _in_float(self, spot: WeightPlace, weight: Tensor, bias: Tensor | None) -> Parameters:
        """The weight and bias after folding and adjusting."""
        if spot.fold is not None:
            mean, variance, gamma, beta = self._norm_tensors(spot.fold)
            assert mean is not None
            assert variance is not None
            weight, bias = fold_batch_norm(weight, bias, mean, variance, gamma, beta, spot.fold)
        if spot.adjustment is None:
            return weight, bias
        spot.adjustment = spot.adjustment.to(weight.device)
        on = is_on(spot.quantizer)
        return spot.adjustment.weight(weight, corrected=on), spot.adjustment.bias(bias, corrected=on)

    def _keeps_norm(self, spot: WeightPlace) -> bool:
        """Whether the normalization trains and therefore stays."""
        rescales = spot.adjustment is not None and spot.adjustment.rescales
        return not rescales and self._is_training(spot.fold)

    def _is_training(self, fold: BatchNormFold | None) -> bool:
        """Whether the normalization computes the statistics of its batch now."""
        return fold is not None and self._owners[fold.running_mean.rpartition(".")[0]].training

    def _sources(self, spot: WeightPlace, weight: Tensor, bias: Tensor | None) -> tuple[Tensor | None, ...]:
        """What the weight that the hardware sees depends on."""
        return (weight, bias, *(self._norm_tensors(spot.fold) if spot.fold is not None else ()))

    def _norm_tensors(self, fold: BatchNormFold) -> tuple[Tensor | None, ...]:
        """Mean, variance, gamma and beta as the module has them now."""
        return tuple(self._tensor(name) for name in (fold.running_mean, fold.running_var, fold.weight, fold.bias))

    def _tensor(self, name: str | None) -> Tensor | None:
        """A parameter or buffer by name."""
        if name is None:
            return None
        path, _, leaf = name.rpartition(".")
        found = getattr(self._owners[path], leaf)
        assert isinstance(found, Tensor)
        return found


def is_on(quantizer: Quantizer) -> bool:
    """Whether a quantizer changes its tensor now."""
    return quantizer.mode is Mode.QUANTIZE and quantizer.is_calibrated

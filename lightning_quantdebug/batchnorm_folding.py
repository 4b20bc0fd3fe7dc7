"""BN folding: a batch normalization with fixed statistics becomes a part of the layer beside it.

Backward (Jacob et al. 2018, section 3.2 and equation 14; Nagel et al. 2021, section 3.2) the normalization stands
behind the layer, ``y = gamma * (W x + b - mean) / sigma + beta``. Forward it stands ahead of it, ``y = W (gamma *
(x - mean) / sigma + beta) + b``, which is exact only where no padding puts zeros between the two. Nothing is written
into the model: the folded tensors are what the hardware sees, and they are computed while the layer runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_quantdebug.plan import BatchNormFold


def fold_batch_norm(
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    fold: BatchNormFold,
) -> tuple[Tensor, Tensor]:
    """Fold a batch normalization into the layer behind or ahead of which it stands.

    With ``f = gamma / sqrt(variance + eps)``, backward: ``W' = W * f`` along the output channels and
    ``b' = beta + (b - mean) * f``; forward: ``W' = W * f`` along the input channels and
    ``b' = b + sum over inputs and kernel of W * (beta - mean * f)``.

    Args:
        weight: ``(C_out, C_in / groups, *)``, or ``(C_in, C_out / groups, *)`` for a transposed convolution.
        bias: ``(C_out,)`` or ``None``.
        mean: Running mean of the normalization, ``(C,)``.
        variance: Running variance, ``(C,)``.
        gamma: Scale of the normalization, ``(C,)`` or ``None`` for 1.
        beta: Shift of the normalization, ``(C,)`` or ``None`` for 0.
        fold: Direction, axis and groups of the layer, and eps.

    Returns:
        The folded weight and bias, in the dtype of ``weight``; computed in float32 at least.
    """
    wide = torch.promote_types(weight.dtype, torch.float32)
    factor = norm_factor(variance, gamma, fold, wide)
    if fold.forward:
        shift = -mean.to(wide) * factor if beta is None else beta.to(wide) - mean.to(wide) * factor
        new_bias = _kernel_sums(weight.to(wide), shift, fold)
        new_bias = new_bias if bias is None else new_bias + bias.to(wide)
        return scale_inputs(weight.to(wide), factor, fold).to(weight.dtype), new_bias.to(weight.dtype)
    shift = -mean.to(wide) if bias is None else bias.to(wide) - mean.to(wide)
    new_bias = shift * factor + (beta.to(wide) if beta is not None else 0.0)
    scaled = scale_outputs(weight.to(wide), factor, fold)
    return scaled.to(weight.dtype), new_bias.to(weight.dtype)


def norm_factor(variance: Tensor, gamma: Tensor | None, fold: BatchNormFold, dtype: torch.dtype) -> Tensor:
    """What a normalization multiplies each channel by, ``(C,)``."""
    wide = torch.promote_types(dtype, torch.float32)
    factor = torch.rsqrt(variance.to(wide) + fold.eps)
    return factor if gamma is None else factor * gamma.to(wide)


def scale_outputs(weight: Tensor, factor: Tensor, fold: BatchNormFold) -> Tensor:
    """A weight with each output channel multiplied by its factor, ``(C_out,)``."""
    if fold.channel_axis == 0:
        return (weight * factor.reshape(-1, *(1,) * (weight.ndim - 1))).to(weight.dtype)
    grouped = weight.reshape(fold.groups, -1, *weight.shape[1:])
    scaled = grouped * factor.reshape(fold.groups, 1, -1, *(1,) * (weight.ndim - 2))
    return scaled.reshape(weight.shape).to(weight.dtype)


def scale_inputs(weight: Tensor, factor: Tensor, fold: BatchNormFold) -> Tensor:
    """A weight ``(C_out, C_in / groups, *)`` with each input channel multiplied by its factor, ``(C_in,)``."""
    grouped = weight.reshape(fold.groups, -1, *weight.shape[1:])
    scaled = grouped * factor.reshape(fold.groups, 1, -1, *(1,) * (weight.ndim - 2))
    return scaled.reshape(weight.shape).to(weight.dtype)


def _kernel_sums(weight: Tensor, shift: Tensor, fold: BatchNormFold) -> Tensor:
    """What a constant ``(C_in,)`` at the input adds to each output channel, ``(C_out,)``."""
    return scale_inputs(weight, shift, fold).flatten(1).sum(1)

"""Noise: how much of a tensor is lost by quantizing it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lightning_quantdebug.errors import SettingsError
from lightning_quantdebug.fake_quantize import BLOCK_SIZE


def sqnr_db(reference: Tensor, quantized: Tensor) -> float:
    """Signal-to-quantization-noise ratio, ``10 * log10(E[x^2] / E[(x - x_hat)^2])``, in dB.

    Summed in float64, block after block, so that neither the size of a tensor nor its dtype limits it.

    Args:
        reference: FP32 values ``x``, any shape.
        quantized: The values ``x_hat`` that stand for them, of the same shape.

    Returns:
        dB. Infinite where nothing differs, minus infinity where only the reference is 0 everywhere, NaN where a value
        is not finite.

    Raises:
        SettingsError: If the shapes differ.

    Source: Jayant and Noll, Digital Coding of Waveforms, 1984..

    Examples:
        >>> round(sqnr_db(torch.tensor([3.0, -4.0]), torch.tensor([3.0, -3.5])), 6)
        20.0
    """
    if reference.shape != quantized.shape:
        raise SettingsError(
            f"`reference` and `quantized` must have one shape, got {tuple(reference.shape)} and "
            f"{tuple(quantized.shape)}."
        )
    signal = noise = 0.0
    blocks = (torch.split(each.detach().reshape(-1), BLOCK_SIZE) for each in (reference, quantized))
    for exact, rounded in zip(*blocks, strict=True):
        exact = exact.double()
        sums = torch.stack([exact.square().sum(), (exact - rounded.double()).square_().sum()])
        block_signal, block_noise = sums.tolist()
        signal, noise = signal + block_signal, noise + block_noise
    if not (math.isfinite(signal) and math.isfinite(noise)):
        return math.nan
    if noise == 0.0:
        return math.inf
    return 10.0 * math.log10(signal / noise) if signal > 0.0 else -math.inf

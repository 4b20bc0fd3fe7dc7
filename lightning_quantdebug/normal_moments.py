"""Mean and variance of a normal variable behind an activation.

A batch normalization makes each channel about normal with known mean and spread; what the activation behind it passes
on has moments in closed form. That is all that bias correction needs to know of data (Nagel et al. 2019, Data-Free
Quantization, section 4.2 and appendix C).

Everything is computed from the distance to the nearest bound in units of the standard deviation and from the tail
beyond it, so that nothing cancels where a channel is nearly always or nearly never clipped. Symbols: ``Z`` standard
normal, ``phi`` its density, ``Phi`` its distribution, ``a`` and ``b`` the bounds, ``A = (a - mu) / sigma`` and
``B = (b - mu) / sigma``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# exp(-x^2 / 2) is 0 in float64 from 38.6 on: a bound further away is as good as none.
_NO_TAIL = 40.0


class Moments(NamedTuple):
    """Mean and variance of each channel, float64, of one shape."""

    mean: Tensor
    variance: Tensor


def clipped_moments(moments: Moments, low: float | Tensor = -math.inf, high: float | Tensor = math.inf) -> Moments:
    """Moments of ``clip(X, a, b)`` for ``X ~ N(mu, sigma^2)``: the clipped normal distribution.

    With ``c = clip(mu, a, b)`` and ``g(t) = E[max(0, Z - t)] = phi(t) - t Phi(-t)``, the mean is
    ``c + sigma * (g(|A|) - g(|B|))``: the formula of Nagel et al. 2019, appendix C, without
    its differences of large terms. The variance is ``E[(Y - c)^2] - E[Y - c]^2``. ReLU is ``a = 0``, ReLU6 is
    ``a = 0, b = 6``.

    Args:
        moments: ``mu`` and ``sigma^2``, any shape; a variance of 0 is a constant.
        low: ``a``, a number or broadcastable to ``mu``; minus infinity: no bound.
        high: ``b``, at least ``a``; infinity: no bound.

    Returns:
        Mean and variance, float64, of the shape that all broadcast to.

    Examples:
        >>> half = clipped_moments(Moments(torch.zeros(1), torch.ones(1)), 0.0)
        >>> round(half.mean.item(), 6), round(half.variance.item(), 6)
        (0.398942, 0.340845)
    """
    mean, variance = moments.mean.double(), moments.variance.double()
    low, high = (torch.as_tensor(bound, dtype=torch.float64, device=mean.device) for bound in (low, high))
    spread = variance.sqrt()
    unit = torch.where(spread > 0, spread, 1.0)
    below = ((low - mean) / unit).clamp(-_NO_TAIL, _NO_TAIL)
    above = ((high - mean) / unit).clamp(-_NO_TAIL, _NO_TAIL)
    shift = _excess(below.abs()) - _excess(above.abs())
    # A mean beyond the upper bound is the mirror image of one beyond the lower bound.
    near = torch.where(above < 0, -above, below)
    far = torch.where(above < 0, -below, above)
    beyond = _excess_squared(near.abs()) - _excess_squared(far.abs()) - 2 * (far - near) * _excess(far.abs())
    within = 1.0 - _lost_square(near.abs()) - _lost_square(far.abs())
    square = torch.where(near > 0, beyond, within)
    clipped = torch.minimum(torch.maximum(mean, low), high)
    return Moments(clipped + spread * shift, variance * (square - shift.square()).clamp_min(0.0))


def leaky_moments(moments: Moments, slope: float | Tensor) -> Moments:
    """Moments of ``max(0, X) + s * min(0, X)`` for ``X ~ N(mu, sigma^2)``: leaky ReLU, PReLU.

    With ``P = max(0, X)`` and ``N = max(0, -X)``, of which one is always 0: mean ``E[P] - s E[N]``, variance
    ``Var[P] + s^2 Var[N] + 2 s E[P] E[N]``.

    Args:
        moments: ``mu`` and ``sigma^2``, any shape.
        slope: ``s``, a number or broadcastable to ``mu``.

    Returns:
        Mean and variance, float64, of the shape that all broadcast to.

    Examples:
        >>> same = leaky_moments(Moments(torch.tensor(0.5), torch.tensor(4.0)), 1.0)
        >>> round(same.mean.item(), 6), round(same.variance.item(), 6)
        (0.5, 4.0)
    """
    slope = torch.as_tensor(slope, dtype=torch.float64, device=moments.mean.device)
    positive = clipped_moments(moments, 0.0)
    negative = clipped_moments(Moments(-moments.mean, moments.variance), 0.0)
    spread = positive.variance + slope.square() * negative.variance
    return Moments(positive.mean - slope * negative.mean, spread + 2 * slope * positive.mean * negative.mean)


def _tail(t: Tensor) -> tuple[Tensor, Tensor]:
    """``phi(t)`` and ``Phi(-t)`` for ``t >= 0``."""
    density = torch.exp(-t.square() / 2) / math.sqrt(2 * math.pi)
    return density, torch.special.erfc(t / math.sqrt(2)) / 2


def _excess(t: Tensor) -> Tensor:
    """``E[max(0, Z - t)]`` for ``t >= 0``."""
    density, tail = _tail(t)
    return (density - t * tail).clamp_min(0.0)


def _excess_squared(t: Tensor) -> Tensor:
    """``E[max(0, Z - t)^2]`` for ``t >= 0``."""
    density, tail = _tail(t)
    return ((t.square() + 1) * tail - t * density).clamp_min(0.0)


def _lost_square(t: Tensor) -> Tensor:
    """``E[max(0, Z^2 - t^2); Z > 0]`` for ``t >= 0``: what a bound at ``t`` takes from ``E[Z^2]``."""
    density, tail = _tail(t)
    return (1 - t.square()) * tail + t * density

"""Moments of clipped normal variables against quadrature and against drawn samples."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from lightning_quantdebug.normal_moments import Moments, clipped_moments, leaky_moments

NODES, WEIGHTS = np.polynomial.legendre.leggauss(12)
ENDLESS = math.inf


def integrated(function, mean: float, std: float, cuts: list[float]) -> tuple[float, float]:
    """Mean and variance of ``function(X)`` by Gauss-Legendre on panels that begin anew at every kink."""
    inside = sorted({mean - 40 * std, mean + 40 * std, *(cut for cut in cuts if abs(cut - mean) < 40 * std)})
    edges = np.unique(np.concatenate([np.linspace(low, high, 200) for low, high in itertools.pairwise(inside)]))
    half = np.diff(edges)[:, None] / 2
    x = edges[:-1, None] + half * (1 + NODES)
    density = np.exp(-(((x - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))
    share = half * WEIGHTS * density
    y = function(x)
    center = float(function(np.array(mean)))
    first = float(((y - center) * share).sum())
    return center + first, float(((y - center - first) ** 2 * share).sum())


def moments(mean: float, std: float) -> Moments:
    return Moments(torch.tensor([mean], dtype=torch.float64), torch.tensor([std**2], dtype=torch.float64))


BOUNDS = [(0.0, ENDLESS), (0.0, 6.0), (-1.0, 1.0), (-ENDLESS, 2.0), (-ENDLESS, ENDLESS), (0.5, 0.75), (-3.0, -2.0)]


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@pytest.mark.parametrize("mean", [-30.0, -7.0, -2.5, -0.4, 0.0, 0.6, 3.0, 5.9, 6.0, 8.0, 40.0])
@pytest.mark.parametrize("std", [0.05, 1.0, 4.0])
def test_clipped_moments_are_the_integrals(mean: float, std: float, bounds: tuple[float, float]) -> None:
    low, high = bounds
    expected = integrated(lambda x: np.clip(x, low, high), mean, std, [low, high])
    found = clipped_moments(moments(mean, std), low, high)
    assert found.mean.item() == pytest.approx(expected[0], rel=1e-10, abs=1e-15)
    assert found.variance.item() == pytest.approx(expected[1], rel=1e-8, abs=1e-100)


@pytest.mark.parametrize("distance", [3.0, 8.0, 15.0, 25.0, 36.0])
def test_the_tail_keeps_its_digits(distance: float) -> None:
    """A channel that is hardly ever on has a mean of 1e-20 and less, not 0 and not the rounding error of something."""
    expected = integrated(lambda x: np.maximum(x, 0), -distance, 1.0, [0.0])
    found = clipped_moments(moments(-distance, 1.0), 0.0)
    assert found.mean.item() == pytest.approx(expected[0], rel=1e-9, abs=0)
    assert found.variance.item() == pytest.approx(expected[1], rel=1e-6, abs=0)
    assert found.mean.item() > 0


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.25, 1.0, 1.5, -0.5])
@pytest.mark.parametrize("mean", [-6.0, -0.7, 0.0, 0.3, 5.0])
@pytest.mark.parametrize("std", [0.1, 1.0, 3.0])
def test_leaky_moments_are_the_integrals(mean: float, std: float, slope: float) -> None:
    expected = integrated(lambda x: np.where(x > 0, x, slope * x), mean, std, [0.0])
    found = leaky_moments(moments(mean, std), slope)
    assert found.mean.item() == pytest.approx(expected[0], rel=1e-10, abs=1e-14)
    assert found.variance.item() == pytest.approx(expected[1], rel=1e-9)


def test_drawn_samples_agree() -> None:
    generator = np.random.default_rng(0)
    mean, std = np.array([-1.0, 0.5, 5.0]), np.array([0.5, 2.0, 1.5])
    drawn = generator.normal(mean, std, size=(400_000, 3))
    given = Moments(torch.from_numpy(mean), torch.from_numpy(std**2))
    for found, sample in (
        (clipped_moments(given, 0.0), np.maximum(drawn, 0)),
        (clipped_moments(given, 0.0, 6.0), np.clip(drawn, 0, 6)),
        (leaky_moments(given, 0.1), np.where(drawn > 0, drawn, 0.1 * drawn)),
    ):
        np.testing.assert_allclose(found.mean.numpy(), sample.mean(0), atol=5 * std.max() / math.sqrt(len(drawn)))
        np.testing.assert_allclose(found.variance.numpy(), sample.var(0), rtol=0.03, atol=1e-4)


@pytest.mark.parametrize("mean", [-2.0, 0.0, 3.0, 9.0])
def test_a_constant_is_clipped_and_varies_not(mean: float) -> None:
    found = clipped_moments(moments(mean, 0.0), 0.0, 6.0)
    assert (found.mean.item(), found.variance.item()) == (min(max(mean, 0.0), 6.0), 0.0)
    leaky = leaky_moments(moments(mean, 0.0), 0.1)
    assert leaky.mean.item() == pytest.approx(mean if mean > 0 else 0.1 * mean)
    assert leaky.variance.item() == 0.0


def test_each_channel_has_its_own_bounds_and_slope() -> None:
    given = Moments(torch.tensor([0.5, 0.5, 0.5]), torch.tensor([1.0, 1.0, 1.0]))
    high, slope = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.0, 0.5, 1.0])
    together, leaky = clipped_moments(given, 0.0, high), leaky_moments(given, slope)
    for channel in range(3):
        alone = clipped_moments(moments(0.5, 1.0), 0.0, high[channel].item())
        assert together.mean[channel].item() == pytest.approx(alone.mean.item())
        assert together.variance[channel].item() == pytest.approx(alone.variance.item())
        assert leaky.mean[channel].item() == pytest.approx(
            leaky_moments(moments(0.5, 1.0), slope[channel].item()).mean.item()
        )
    assert together.mean.dtype is together.variance.dtype is leaky.mean.dtype is torch.float64

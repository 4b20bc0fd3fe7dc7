"""AdaRound's arithmetic against float64 twins, finite differences and every rounding there is."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_quantdebug.encoding import encoding_from_range
from lightning_quantdebug.errors import SettingsError
from lightning_quantdebug.fake_quantize import fake_quantize
from lightning_quantdebug.layer_samples import Samples
from lightning_quantdebug.learned_rounding import (
    AdaRoundSettings,
    RoundingProblem,
    _minibatches,
    inverse_rectified_sigmoid,
    learn_rounding,
    rectified_sigmoid,
    rectified_sigmoid_slope,
    regularizer,
    regularizer_slope,
)
from lightning_quantdebug.target import QuantSpec

torch.set_num_threads(1)


def never() -> bool:
    return False


def problem_of(weight: Tensor, step: float, levels: tuple[int, int] = (-8, 7), **fields: Any) -> RoundingProblem:
    """A layer whose weights ``(groups, C_out / groups, K)`` have one scale, without bias and activation."""
    ends = [torch.full(weight.shape[:2], end, dtype=weight.dtype) for end in (-torch.inf, torch.inf)]
    given = {
        "scale": torch.full_like(weight, step),
        "lowest": torch.full_like(weight, levels[0]),
        "highest": torch.full_like(weight, levels[1]),
        "bias": torch.zeros(weight.shape[:2], dtype=weight.dtype),
        "low": ends[0],
        "high": ends[1],
    }
    return RoundingProblem(weight, **{**given, **fields})


def samples_of(problem: RoundingProblem, x: Tensor) -> Samples:
    """Inputs with the outputs that the FP32 weight gives."""
    return Samples(x, problem.outputs(x, problem.weight))


def numpy_h(v: np.ndarray) -> np.ndarray:
    return np.minimum(1, np.maximum(0, 1.2 / (1 + np.exp(-v)) - 0.1))


def difference(function: Callable[[np.ndarray], float], at: np.ndarray, step: float = 1e-6) -> np.ndarray:
    """The gradient of a function by central differences, one coordinate at a time."""
    gradient = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        up, down = at.copy(), at.copy()
        up[index] += step
        down[index] -= step
        gradient[index] = (function(up) - function(down)) / (2 * step)
    return gradient


def test_the_rectified_sigmoid_its_slope_and_its_inverse() -> None:
    v = torch.linspace(-6, 6, 400, dtype=torch.float64)
    np.testing.assert_allclose(rectified_sigmoid(v).numpy(), numpy_h(v.numpy()), atol=1e-12)
    slope = [(numpy_h(x + 1e-6) - numpy_h(x - 1e-6)) / 2e-6 for x in v.numpy()]
    np.testing.assert_allclose(rectified_sigmoid_slope(v).numpy(), slope, atol=1e-8)
    assert (rectified_sigmoid(v) == 0).any()
    assert (rectified_sigmoid(v) == 1).any()
    h = torch.linspace(0, 1, 101, dtype=torch.float64)
    np.testing.assert_allclose(numpy_h(inverse_rectified_sigmoid(h).numpy()), h.numpy(), atol=1e-12)


@pytest.mark.parametrize("beta", [20.0, 7.3, 2.0])
def test_the_regularizer_and_its_slope(beta: float) -> None:
    def twin(h: np.ndarray) -> float:
        return float(sum(1 - abs(2 * value - 1) ** beta for value in h))

    h = torch.linspace(0.01, 0.99, 37, dtype=torch.float64)
    assert regularizer(h, beta).item() == pytest.approx(twin(h.numpy()))
    np.testing.assert_allclose(regularizer_slope(h, beta).numpy(), difference(twin, h.numpy()), atol=1e-6)


def random_problem() -> tuple[RoundingProblem, Samples, Tensor]:
    """Two groups of three outputs, some weights off the grid, clipped outputs, and some rounding in between."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    weight, bias = draw(2, 3, 5), draw(2, 3)
    low = torch.tensor([[0.0, -torch.inf, -0.5], [0.0, -1.0, 0.0]], dtype=torch.float64)
    high = torch.tensor([[torch.inf, torch.inf, 0.7], [1.0, 1.5, 6.0]], dtype=torch.float64)
    scale = draw(2, 3, 5).abs() + 0.2
    fields = {"bias": bias, "low": low, "high": high, "scale": scale}
    problem = problem_of(weight, 1.0, (-2, 1), **fields)
    rounding = torch.rand(2, 3, 5, dtype=torch.float64, generator=generator)
    return problem, Samples(draw(40, 2, 5), draw(40, 2, 3)), rounding


def twin_error(problem: RoundingProblem, samples: Samples, rounding: np.ndarray) -> float:
    """The error, one product at a time."""
    fields = ("weight", "scale", "lowest", "highest", "bias", "low", "high")
    weight, scale, lowest, highest, bias, low, high = (getattr(problem, name).numpy() for name in fields)
    total = 0.0
    for x, y in zip(samples.x.numpy(), samples.y.numpy(), strict=True):
        for g, o in np.ndindex(weight.shape[:2]):
            output = bias[g, o]
            for k in range(weight.shape[2]):
                steps = np.floor(weight[g, o, k] / scale[g, o, k]) + rounding[g, o, k]
                output += min(max(steps, lowest[g, o, k]), highest[g, o, k]) * scale[g, o, k] * x[g, k]
            clipped, wanted = (min(max(value, low[g, o]), high[g, o]) for value in (output, y[g, o]))
            total += (clipped - wanted) ** 2
    return total / len(samples)


def test_the_error_and_its_slope_against_sums_and_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, samples, rounding = random_problem()
    assert not problem.free.all()
    expected = twin_error(problem, samples, rounding.numpy())
    assert problem.error(samples, problem.on_grid(rounding)) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr("lightning_quantdebug.learned_rounding._CHUNK", 7)
    assert problem.error(samples, problem.on_grid(rounding)) == pytest.approx(expected, rel=1e-12)
    slope = difference(lambda h: twin_error(problem, samples, h), rounding.numpy())
    np.testing.assert_allclose(problem.slope(samples.x, samples.y, rounding).numpy(), slope, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bit_width", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_levels_are_those_of_the_quantizer(bit_width: int, symmetric: bool) -> None:
    spec = QuantSpec(bit_width, symmetric=symmetric)
    encoding = encoding_from_range(torch.tensor(-1.3), torch.tensor(0.9), spec)
    # Levels, halves between them, and values on both sides and far outside.
    steps = torch.arange(-20, 21) / 2
    weight = torch.cat([steps, steps + 0.2, steps - 0.2])[None, None] * encoding.scale
    levels = (int(encoding.lowest_step), int(encoding.highest_step))
    problem = problem_of(weight, float(encoding.scale), levels)
    assert torch.equal(problem.nearest, fake_quantize(weight, encoding))
    for rounding in (torch.zeros_like(weight), torch.ones_like(weight)):
        found = problem.on_grid(rounding)
        assert torch.equal(fake_quantize(found, encoding), found)
        inside = problem.free
        exact = (torch.floor(weight / encoding.scale) + rounding) * encoding.scale
        assert torch.equal(found[inside], exact[inside])


def correlated(count: int, width: int, seed: int, groups: int = 1) -> Tensor:
    """Inputs like those behind a ReLU, of which neighbours are alike, ``(count, groups, width)``."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, groups, width + 16, generator=generator)
    for place in range(1, width + 16):
        noise[..., place] = 0.9 * noise[..., place - 1] + 0.19**0.5 * noise[..., place]
    return noise[..., 16:].relu()


def test_nearly_the_best_of_all_roundings_is_found() -> None:
    weight = torch.randn(24, 1, 8, generator=torch.Generator().manual_seed(0))
    problem = problem_of(weight, 0.3)
    samples = samples_of(problem, correlated(512, 8, 0, groups=24))
    learned = learn_rounding(problem, samples, AdaRoundSettings(), never)
    assert learned is not None
    # Each channel has 2^8 roundings, and channels do not depend on each other.
    choices = [torch.tensor(choice).expand_as(weight) for choice in itertools.product((0.0, 1.0), repeat=8)]
    outputs = [problem.outputs(samples.x, problem.on_grid(choice)) - samples.y for choice in choices]
    best = torch.stack([output.square().mean(0) for output in outputs]).amin(0).sum().item()
    # Measured: 1.05 of the best, where nearest rounding has 5.2.
    assert best * 0.9999 <= problem.error(samples, learned) <= 1.08 * best
    assert problem.error(samples, problem.nearest) > 4 * best


def test_inputs_that_move_together_gain_much_and_independent_ones_little() -> None:
    weight = torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0))
    problem = problem_of(weight, 0.4)
    together, apart = correlated(2048, 64, 1), torch.randn(2048, 1, 64, generator=torch.Generator().manual_seed(2))
    ratios = []
    for x in (together, apart):
        samples = samples_of(problem, x)
        learned = learn_rounding(problem, samples, AdaRoundSettings(iterations=500), never)
        assert learned is not None
        ratios.append(problem.error(samples, learned) / problem.error(samples, problem.nearest))
    assert ratios[0] < 0.3
    assert 0.9 < ratios[1] <= 1.0


def test_an_error_that_is_there_already_is_made_up_for() -> None:
    problem = problem_of(torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(0)), 0.4)
    x = correlated(512, 32, 1)
    samples, larger = samples_of(problem, x), Samples(x, problem.outputs(1.2 * x, problem.weight))
    found = [learn_rounding(problem, given, AdaRoundSettings(iterations=500), never) for given in (samples, larger)]
    errors = [[problem.error(given, weight) for weight in found if weight is not None] for given in (samples, larger)]
    assert errors[0][0] < 0.7 * errors[0][1]
    assert errors[1][1] < 0.7 * errors[1][0]


def test_behind_an_activation_only_what_passes_counts() -> None:
    weight, x = torch.randn(1, 32, 48, generator=torch.Generator().manual_seed(0)), correlated(1024, 48, 3)
    bias = torch.full((1, 32), -2.0)
    plain = problem_of(weight, 0.5, bias=bias)
    clipped = problem_of(weight, 0.5, bias=bias, low=torch.zeros(1, 32), high=torch.full((1, 32), 2.0))
    samples = samples_of(plain, x)
    errors = []
    for problem in (plain, clipped):
        learned = learn_rounding(problem, samples, AdaRoundSettings(iterations=500), never)
        assert learned is not None
        errors.append((plain.error(samples, learned), clipped.error(samples, learned)))
    assert errors[1][1] < 0.95 * errors[0][1]
    assert errors[0][0] < 0.95 * errors[1][0]


def test_neither_units_nor_batch_size_decide() -> None:
    weight, x = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0)), correlated(512, 16, 2)
    settings = AdaRoundSettings(iterations=300, batch_size=512)
    results = []
    for of_weight, of_x in ((1.0, 1.0), (1024.0, 1.0), (1.0, 2.0**-20)):
        problem = problem_of(of_weight * weight, of_weight * 0.4)
        learned = learn_rounding(problem, samples_of(problem, of_x * x), settings, never)
        assert learned is not None
        results.append(learned / of_weight)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    problem = problem_of(weight, 0.4)
    twice = learn_rounding(problem, samples_of(problem, x.repeat(8, 1, 1)), replaced(settings, batch_size=4096), never)
    assert torch.equal(results[0], twice)


def replaced(settings: AdaRoundSettings, **changes: Any) -> AdaRoundSettings:
    return AdaRoundSettings(**{**vars(settings), **changes})


def test_regularization_is_what_decides() -> None:
    problem = problem_of(torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(0)), 0.4)
    samples = samples_of(problem, correlated(1024, 64, 1))
    errors = {}
    for strength in (0.0, 10.0):
        settings = AdaRoundSettings(iterations=500, regularization=strength)
        learned = learn_rounding(problem, samples, settings, never)
        assert learned is not None
        errors[strength] = problem.error(samples, learned)
    assert errors[10.0] < 0.5 * errors[0.0]


def test_channels_of_zeros_and_weights_on_the_grid() -> None:
    weight = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))
    weight[0, 1] = 0
    scale = torch.full_like(weight, 0.3)
    scale[0, 1] = 2.0**-63
    problem = problem_of(weight, 0.3, scale=scale)
    learned = learn_rounding(
        problem, samples_of(problem, correlated(64, 8, 0)), AdaRoundSettings(iterations=200), never
    )
    assert learned is not None
    assert learned.isfinite().all()
    assert not learned[0, 1].any()
    on_grid = problem_of(problem.nearest, 0.3, scale=scale)
    kept = learn_rounding(on_grid, samples_of(on_grid, correlated(64, 8, 0)), AdaRoundSettings(), never)
    assert torch.equal(kept, on_grid.weight)


def learn_watched(iterations: int, late_at: int | None = None, regularization: float = 10.0) -> tuple[Any, int]:
    """What is learned of a small layer, and how often the clock was looked at."""
    problem = problem_of(torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(0)), 0.4)
    looks = 0

    def is_late() -> bool:
        nonlocal looks
        looks += 1
        return looks == late_at

    settings = AdaRoundSettings(iterations=iterations, regularization=regularization)
    return learn_rounding(problem, samples_of(problem, correlated(64, 8, 0)), settings, is_late), looks


def test_the_clock_is_looked_at_now_and_then_and_lateness_gives_nothing() -> None:
    assert learn_watched(400, regularization=0.0)[1] == 7
    learned, looks = learn_watched(1000, late_at=2)
    assert learned is None
    assert looks == 2


def test_it_ends_once_every_weight_is_decided() -> None:
    learned, looks = learn_watched(1500)
    assert learned is not None
    assert 6 <= looks < 29
    # Had it been late when all was decided, that would have made no difference.
    late, _ = learn_watched(1500, late_at=looks + 1)
    assert torch.equal(late, learned)


def test_learning_repeats_and_leaves_random_numbers_and_gradient_modes_alone() -> None:
    before = torch.get_rng_state()
    first, _ = learn_watched(300)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.is_grad_enabled()
    with torch.inference_mode():
        second, _ = learn_watched(300)
    assert torch.equal(first, second)
    assert not second.is_inference()
    assert not second.requires_grad


@pytest.mark.parametrize(("count", "size", "steps"), [(10, 3, 3), (9, 3, 3), (2, 5, 1)])
def test_minibatches_take_every_position_in_turn(count: int, size: int, steps: int) -> None:
    drawn = _minibatches(count, AdaRoundSettings(batch_size=size), torch.device("cpu"))
    rounds = [torch.cat([next(drawn) for _ in range(steps)]) for _ in range(2)]
    for numbers in rounds:
        assert len(numbers) == len(set(numbers.tolist())) == min(count, steps * size)
        assert set(numbers.tolist()) <= set(range(count))
    assert count == 2 or not torch.equal(*rounds)


def test_the_exponent_falls_on_half_a_cosine_after_the_warm_start() -> None:
    settings = AdaRoundSettings(iterations=200, warm_start=0.25, beta=(12.0, 4.0))
    exponents = [settings.beta_at(iteration) for iteration in range(200)]
    assert exponents[:50] == [None] * 50
    expected = [4 + 4 * (1 + np.cos(np.pi * share)) for share in np.arange(150) / 150]
    assert exponents[50:] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"iterations": 0}, "`iterations` must be a positive integer, got 0"),
        ({"batch_size": 2.5}, "`batch_size` must be a positive integer, got 2.5"),
        ({"positions": True}, "`positions` must be a positive integer, got True"),
        ({"memory_limit": -1}, "`memory_limit` must be a positive integer, got -1"),
        ({"learning_rate": 0.0}, "`learning_rate` must be a positive number"),
        ({"regularization": -0.1}, "`regularization` one that is not negative, got 0.05 and -0.1"),
        ({"warm_start": 1.0}, "`warm_start` must be a share from 0 to below 1, got 1.0"),
        ({"beta": (2.0, 20.0)}, "`beta` must be two numbers of at least 1"),
        ({"beta": (2.0,)}, "`beta` must be two numbers"),
        ({"beta": (2.0, 0.5)}, "`beta` must be two numbers of at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        AdaRoundSettings(**changes)


def test_what_is_not_decided_in_the_end_goes_to_the_nearer_level() -> None:
    weight = torch.randn(4, 1, 8, generator=torch.Generator().manual_seed(0))
    problem = problem_of(weight, 0.3)
    samples = samples_of(problem, correlated(512, 8, 0, groups=4))
    settings = AdaRoundSettings(iterations=1, learning_rate=1e-6)
    learned = learn_rounding(problem, samples, settings, never)
    assert learned is not None
    # One step of next to no length moves nothing over the middle.
    assert torch.equal(learned, problem.nearest)

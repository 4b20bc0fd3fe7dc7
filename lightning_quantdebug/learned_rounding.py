"""AdaRound's arithmetic: which of its two neighbours on the grid each weight goes to, learned from a layer's outputs.

Rounding a weight to the nearest level is best for the weight and not for the output: errors of weights whose inputs
move together add up or cancel. AdaRound (Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training
Quantization", section 3.3, equations 16 to 24) lets each weight be

    ``W_hat = s * clamp(floor(W / s) + h(V), low, high)``    ``h(V) = clamp(sigmoid(V) * (zeta - gamma) + gamma, 0, 1)``

with one ``V`` per weight, ``zeta = 1.1`` and ``gamma = -0.1``, starts at ``W_hat = W`` and minimizes

    ``mean over positions of sum over outputs (act(W_hat x_hat + b) - act(y))^2 + lambda sum (1 - |2 h(V) - 1|^beta)``

where ``x_hat`` are inputs as the network quantized so far has them, ``y`` is what the FP32 network has in the same
place, and ``act`` the clipping behind the layer (asymmetric reconstruction). ``beta`` falls from 20 to 2: the
regularizer first leaves all alone that is not nearly decided, and in the end pulls every weight to a level.

What differs from the paper and from AIMET, which take the error as it is:

* The error counts in units of the error that nearest rounding makes on the same inputs, times the number of weights, so
  that one ``lambda`` holds for outputs of any range, any layer size, batch size and number of tokens. A planted factor
  of 1000 in the outputs changes nothing.
* Steps are fifty times as large and fifteen times as few, which costs nothing (figures below).
* It ends once every weight is decided, after about nine tenths of the steps. There is no earlier plateau to stop at:
  the error after hard rounding falls in the last third of the schedule, when ``beta`` gets low.
* The gradient is written out: it takes ten lines, and neither gradient mode nor inference mode matters.

Measured on nine layers of a small MobileNet at 4 bits per tensor, as error on held-out samples in that of nearest
rounding, geometric mean: 0.476 with AIMET's 15,000 steps at 1e-3, 0.475 with our 1000 at 0.05; 0.486 with 500, 0.474
with 2000, 0.490 with 1000 at 0.01. ``lambda`` from 3 to 20 gives 0.474 to 0.476; 1 leaves weights undecided that hard
rounding then spoils, 60 decides too early (0.477, 0.480). 512 positions give 0.492, 2048 0.481, 8192 0.475. The
activation in the loss is worth 1 to 13 % of a layer's error. On depthwise layers, where each channel's 2^9 roundings
can all be tried, the result is within 0.2 to 2.2 % of the best. It is a local search all the same: eight weights whose
inputs have two directions and little else can end at ten times the best, with AIMET's settings as with ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lightning_quantdebug.errors import SettingsError
from lightning_quantdebug.layer_samples import Samples

ZETA, GAMMA = 1.1, -0.1

# Steps between two looks at the clock and at whether all is decided: on an accelerator each look waits for the device.
_CHECK_EVERY = 50
# A weight is decided when rounding it moves it by less than this share of a grid step.
_DECIDED = 0.01
# Positions that are multiplied at a time where an error is measured on all of them.
_CHUNK = 8192


@dataclass(frozen=True)
class AdaRoundSettings:
    """How rounding is learned.

    Args:
        iterations: Steps of Adam for each layer, at most.
        batch_size: Positions in each step.
        positions: Positions that are drawn of each layer to learn from, at most.
        learning_rate: Of Adam.
        regularization: ``lambda``, in units of the error of nearest rounding per weight.
        beta: First and last exponent of the regularizer.
        warm_start: Share of the iterations ahead of the regularizer.
        memory_limit: Bytes that the positions of one layer may take.
        seed: Decides which positions are drawn.

    Raises:
        SettingsError: If a value is out of its range.

    Examples:
        >>> AdaRoundSettings(iterations=500).learning_rate
        0.05
    """

    iterations: int = 1000
    batch_size: int = 256
    positions: int = 16384
    learning_rate: float = 0.05
    regularization: float = 10.0
    beta: tuple[float, float] = (20.0, 2.0)
    warm_start: float = 0.2
    memory_limit: int = 256 * 2**20
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field."""
        for name in ("iterations", "batch_size", "positions", "memory_limit"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise SettingsError(f"AdaRound's `{name}` must be a positive integer, got {value!r}.")
        if not (0 < self.learning_rate < math.inf and 0 <= self.regularization < math.inf):
            raise SettingsError(
                "AdaRound's `learning_rate` must be a positive number and `regularization` one that is not negative, "
                f"got {self.learning_rate!r} and {self.regularization!r}."
            )
        if not 0 <= self.warm_start < 1:
            raise SettingsError(f"AdaRound's `warm_start` must be a share from 0 to below 1, got {self.warm_start!r}.")
        if len(self.beta) != 2 or not 1 <= self.beta[1] <= self.beta[0] < math.inf:
            raise SettingsError(
                f"AdaRound's `beta` must be two numbers of at least 1, of which the second is not greater than the "
                f"first, got {self.beta!r}."
            )

    def beta_at(self, iteration: int) -> float | None:
        """The exponent at an iteration, on half a cosine from first to last; ``None`` during the warm start.

        Examples:
            >>> settings = AdaRoundSettings(iterations=100)
            >>> settings.beta_at(19), settings.beta_at(20), settings.beta_at(60)
            (None, 20.0, 11.0)
        """
        start = int(self.warm_start * self.iterations)
        if iteration < start:
            return None
        share = (iteration - start) / (self.iterations - start)
        first, last = self.beta
        return last + (first - last) * (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True, eq=False)
class RoundingProblem:
    """One layer whose rounding is to be learned.

    Attributes:
        weight: FP32 weight in rows, ``(groups, C_out / groups, K)``; see
            :func:`lightning_quantdebug.layer_patches.to_rows`.
        scale: Grid step of each weight, of the same shape.
        lowest: Lowest level of each weight's grid, in steps from zero, of the same shape.
        highest: Highest level, likewise.
        bias: ``(groups, C_out / groups)``; zeros where there is none.
        low: What the activation behind the layer clips to, ``(groups, C_out / groups)``; infinite where it does not.
        high: Likewise from above.
    """

    weight: Tensor
    scale: Tensor
    lowest: Tensor
    highest: Tensor
    bias: Tensor
    low: Tensor
    high: Tensor

    @cached_property
    def floor(self) -> Tensor:
        """The level below each weight, in steps from zero."""
        return (self.weight / self.scale).floor()

    @cached_property
    def free(self) -> Tensor:
        """Which weights have both neighbours on the grid; all others are clipped whatever is learned."""
        return (self.floor >= self.lowest) & (self.floor < self.highest)

    def on_grid(self, rounding: Tensor) -> Tensor:
        """The weight with each value ``rounding`` steps above the level below it, clipped to the grid."""
        return (self.floor + rounding).clamp(self.lowest, self.highest) * self.scale

    @property
    def nearest(self) -> Tensor:
        """The weight rounded to the nearest level, half to even."""
        return (self.weight / self.scale).round().clamp(self.lowest, self.highest) * self.scale

    def outputs(self, x: Tensor, weight: Tensor) -> Tensor:
        """Outputs of a weight ahead of the activation: ``(P, groups, C_out / groups)``."""
        return torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1) + self.bias

    def error(self, samples: Samples, weight: Tensor) -> float:
        """The mean over positions of the squared error behind the activation, summed over output channels."""
        total = 0.0
        for x, y in zip(torch.split(samples.x, _CHUNK), torch.split(samples.y, _CHUNK), strict=True):
            found = self.outputs(x, weight).clamp(self.low, self.high)
            total += float((found - y.clamp(self.low, self.high)).double().square().sum())
        return total / len(samples)

    def slope(self, x: Tensor, y: Tensor, rounding: Tensor) -> Tensor:
        """The gradient of the error for ``rounding``, of its shape.

        Args:
            x: Patches, ``(P, groups, K)``.
            y: Outputs that they should give, ``(P, groups, C_out / groups)``.
            rounding: ``h``, from 0 to 1, of the weight's shape.
        """
        found = self.outputs(x, self.on_grid(rounding))
        passed = (found > self.low) & (found < self.high)
        difference = (found.clamp(self.low, self.high) - y.clamp(self.low, self.high)) * passed
        by_weight = torch.bmm(difference.permute(1, 2, 0), x.transpose(0, 1)) * (2 / len(x))
        return by_weight * self.scale * self.free


def rectified_sigmoid(v: Tensor) -> Tensor:
    """``h(V)``: reaches 0 and 1, where its gradient is 0 (Louizos et al. 2018; Nagel et al. 2020, equation 23).

    Examples:
        >>> rectified_sigmoid(torch.tensor([-9.0, 0.0, 9.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def rectified_sigmoid_slope(v: Tensor) -> Tensor:
    """The derivative of :func:`rectified_sigmoid`.

    Examples:
        >>> rectified_sigmoid_slope(torch.tensor([0.0, 9.0]))
        tensor([0.3000, 0.0000])
    """
    sigmoid = torch.sigmoid(v)
    stretched = sigmoid * (ZETA - GAMMA) + GAMMA
    return sigmoid * (1 - sigmoid) * (ZETA - GAMMA) * ((stretched > 0) & (stretched < 1))


def inverse_rectified_sigmoid(h: Tensor) -> Tensor:
    """The ``V`` with ``h(V) = h``, for ``h`` from 0 to 1.

    Examples:
        >>> rectified_sigmoid(inverse_rectified_sigmoid(torch.tensor([0.25, 0.75])))
        tensor([0.2500, 0.7500])
    """
    return torch.logit((h - GAMMA) / (ZETA - GAMMA))


def regularizer(h: Tensor, beta: float) -> Tensor:
    """``sum (1 - |2 h - 1|^beta)``: 0 where every weight is on a level (Nagel et al. 2020, equation 24).

    Examples:
        >>> regularizer(torch.tensor([0.0, 0.5, 0.75, 1.0]), 2.0)
        tensor(1.7500)
    """
    return (1 - (2 * h - 1).abs() ** beta).sum()


def regularizer_slope(h: Tensor, beta: float) -> Tensor:
    """The gradient of :func:`regularizer` for ``h``.

    Examples:
        >>> regularizer_slope(torch.tensor([0.5, 0.75, 1.0]), 2.0)
        tensor([-0., -2., -4.])
    """
    away = 2 * h - 1
    return away.abs().pow(beta - 1) * away.sign() * (-2 * beta)


@torch.inference_mode(False)
@torch.no_grad()
def learn_rounding(
    problem: RoundingProblem, samples: Samples, settings: AdaRoundSettings, is_late: Callable[[], bool]
) -> Tensor | None:
    """Learn which level each weight goes to.

    Args:
        problem: The layer.
        samples: Positions to learn from.
        settings: How.
        is_late: Asked now and then; once it is true, nothing more is learned.

    Returns:
        The weight on its grid, in rows; ``None`` if the time was over before every weight was decided. It is the
        nearest rounding where that adds no error.
    """
    nearest = problem.nearest
    some = Samples(samples.x[:_CHUNK], problem.outputs(samples.x[:_CHUNK], problem.weight))
    unit = problem.error(some, nearest)
    if unit == 0:
        return nearest
    v = inverse_rectified_sigmoid(problem.weight / problem.scale - problem.floor)
    adam = torch.optim.Adam([v], lr=settings.learning_rate)
    drawn = _minibatches(len(samples), settings, v.device)
    for iteration in range(settings.iterations):
        beta = settings.beta_at(iteration)
        h = rectified_sigmoid(v)
        if iteration % _CHECK_EVERY == 0 and iteration:
            decided = beta is not None and _all_decided(h)
            if decided or is_late():
                return problem.on_grid((h >= 0.5).float()) if decided else None
        positions = next(drawn)
        x, y = samples.x.index_select(0, positions), samples.y.index_select(0, positions)
        slope = problem.slope(x, y, h) * (v.numel() / unit)
        if beta is not None:
            slope += settings.regularization * regularizer_slope(h, beta)
        v.grad = slope * rectified_sigmoid_slope(v)
        adam.step()
    return problem.on_grid((rectified_sigmoid(v) >= 0.5).float())


def _all_decided(h: Tensor) -> bool:
    """Whether hard rounding moves no weight any more."""
    return bool(((h - h.round()).abs() < _DECIDED).all())


def _minibatches(count: int, settings: AdaRoundSettings, device: torch.device) -> Iterator[Tensor]:
    """Numbers of the positions of each step: all of them in random order, then all again in another one."""
    generator = torch.Generator().manual_seed(settings.seed)
    while True:
        order = torch.randperm(count, generator=generator).to(device)
        whole = max(settings.batch_size, count - count % settings.batch_size)
        yield from torch.split(order[:whole], settings.batch_size)

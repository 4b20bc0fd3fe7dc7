"""The scales that equalization solves for: balance, convergence, limits, and what has no range."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quantdebug import equalization
from lightning_quantdebug.channel_groups import FIXED, effective_weights, find_channel_groups, magnitudes_of
from lightning_quantdebug.equalization import LARGEST_LOG2_SCALE, equalize, equalizing_scales
from lightning_quantdebug.instrument import batch_runs, instrument
from tests.channel_cases import CASES, make
from tests.channel_networks import conv

torch.set_num_threads(1)


def solved(model: nn.Module, batch: Tensor) -> equalization.Scales:
    """The scales of a network."""
    with instrument(model, batch) as session:
        runs = batch_runs(session, [batch])
        groups = find_channel_groups(session, runs)
        magnitudes = {key: magnitudes_of(weight) for key, (weight, _) in effective_weights(session, runs).items()}
        return equalizing_scales(groups, magnitudes)


def balance(name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Mean log2 range of the rows and of the columns of each class after equalization, by loops, and its stage."""
    model, batch = make(name)
    with instrument(model, batch) as session:
        session.calibrate([batch])
        runs = batch_runs(session, [batch])
        equalize(session, runs)
        groups = find_channel_groups(session, runs)
        found = effective_weights(session, runs)
        sides: list[list[list[float]]] = [[[] for _ in range(groups.count)] for _ in range(2)]
        for each in groups.layers:
            weight, axis = found[each.layer.key][0], 1 if "transpose" in each.layer.op else 0
            assert each.layer.groups in (1, weight.shape[0])
            for index, number in enumerate(each.rows.tolist()):
                if number != FIXED:
                    sides[0][number].append(np.log2(np.abs(weight.select(axis, index).numpy()).max()))
            for index, number in enumerate(each.columns.tolist()):
                if number != FIXED:
                    part = weight[index] if each.layer.groups > 1 else weight.select(1 - axis, index)
                    sides[1][number].append(np.log2(np.abs(part.numpy()).max()))
    rows, columns = ([np.mean(of_class) if of_class else np.nan for of_class in side] for side in sides)
    return np.array(rows), np.array(columns), groups.stages.numpy()


@pytest.mark.parametrize(
    "name",
    [
        "residual stage",
        "branches",
        "flatten to linear",
        "depthwise triplet with relu6",
        "sum of a list",
        "pixel shuffle",
    ],
)
def test_classes_of_many_layers_are_balanced_in_the_mean(name: str) -> None:
    rows, columns, stages = balance(name)
    assert len(rows) == CASES[name].classes
    for stage in range(stages.max() + 1):
        difference = (rows - columns)[stages == stage]
        np.testing.assert_allclose(difference, difference.mean(), atol=5e-3)


@pytest.mark.parametrize(
    ("side", "value"), [("a", 0.0), ("b", 0.0), ("a", float("nan")), ("b", float("inf")), ("a", float("inf"))]
)
def test_dead_and_broken_channels_keep_their_scale(side: str, value: float) -> None:
    model, batch = make("functional relu")
    with instrument(model, batch) as session:
        runs = batch_runs(session, [batch])
        groups = find_channel_groups(session, runs)
        weights = {key: weight.clone() for key, (weight, _) in effective_weights(session, runs).items()}
        for found in groups.layers:
            if found.layer.name == side:
                channel = weights[found.layer.key][1] if side == "a" else weights[found.layer.key][:, 1]
                channel.fill_(value)
        magnitudes = {key: magnitudes_of(weight) for key, weight in weights.items()}
        log2 = equalizing_scales(groups, magnitudes).log2
    assert log2[1] == 0
    assert bool((log2[[0, 2, 3]] != 0).all())
    assert bool(log2.isfinite().all())


def test_scales_are_bounded() -> None:
    model, batch = make("functional relu")
    with torch.no_grad():
        model.a.weight[0] *= 1e-20
    solution = solved(model, batch)
    assert float(solution.log2[0]) == -LARGEST_LOG2_SCALE
    assert solution.sweeps < 5


class Blocks(nn.Module):
    """A stage of residual blocks with one convolution each."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.stem, self.head = conv(3, 2), conv(2, 2)
        self.blocks = nn.ModuleList(conv(2, 2) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(F.relu(x))
        return self.head(x)


def test_layers_that_feed_themselves_do_not_swing() -> None:
    torch.manual_seed(0)
    model = Blocks(16).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.weight.copy_(torch.tensor([[0.0, 1.0], [100.0, 0.0]])[:, :, None, None])
    solution = solved(model, torch.randn(2, 3, 4, 4))
    assert solution.sweeps < 10
    # Each block asks for s1 / s0 = 10; stem and head pull a little towards what they have.
    assert float(solution.log2[1] - solution.log2[0]) == pytest.approx(np.log2(10), abs=0.3)


def test_a_channel_without_range_in_one_of_several_layers_does_not_count() -> None:
    model, batch = make("sum of a list")
    with torch.no_grad():
        model.a.weight[1] = 0.0
        wanted = [
            np.log2(float(model.b.weight[k].abs().max())) / 2 - np.log2(float(model.c.weight[:, k].abs().max())) / 2
            if k == 1
            else (np.log2(float(model.a.weight[k].abs().max())) + np.log2(float(model.b.weight[k].abs().max()))) / 4
            - np.log2(float(model.c.weight[:, k].abs().max())) / 2
            for k in range(4)
        ]
    log2 = solved(model, batch).log2.numpy()
    np.testing.assert_allclose(log2, np.array(wanted) - np.mean(wanted), atol=2e-3)

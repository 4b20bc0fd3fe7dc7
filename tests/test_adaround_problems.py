"""What each layer's rounding is learned on: samples, weights, grids, biases and the clipping behind it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quantdebug import adaround as module
from lightning_quantdebug.adaround import activation_bounds, adaround
from lightning_quantdebug.adjustment import Adjustment
from lightning_quantdebug.fake_quantize import fake_quantize
from lightning_quantdebug.instrument import batch_runs
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.layers import Layer
from lightning_quantdebug.learned_rounding import AdaRoundSettings
from tests.adaround_cases import (
    Learning,
    images,
    learn,
    quantized,
    tokens,
    with_spec,
)

torch.set_num_threads(1)


def layer_named(session: Instrumentation, name: str) -> Layer:
    (found,) = [layer for layer in session.layers if layer.name == name]
    return found


def test_a_layer_learns_on_quantized_inputs_behind_rounded_layers_and_on_fp32_outputs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), tokens(10, 6)
    learning = Learning(monkeypatch)
    with quantized(model, [x], "w3a4") as session:
        grids = {name: quantizer.encoding for name, quantizer in session.quantizers.items()}
        assert all(grid is not None for grid in grids.values())
        learn(session, [x])
    first, second = model[0], model[2]
    seen = torch.tensor([0, 2, 3, 4, 5, 7, 8, 9])
    x_hat = fake_quantize(x, grids["input"])
    assert torch.equal(learning.samples[0].x[:, 0], x_hat[seen])
    torch.testing.assert_close(learning.samples[0].y[:, 0], first(x)[seen])
    grid = grids["0.weight"]
    steps = (first.weight / grid.scale[:, None]).floor().clamp(-4, 3)
    hidden = fake_quantize(F.linear(x_hat, steps * grid.scale[:, None], first.bias).relu(), grids["1"])
    torch.testing.assert_close(learning.samples[1].x[:, 0], hidden[seen])
    assert not torch.equal(hidden, fake_quantize(F.linear(x_hat, first.weight, first.bias).relu(), grids["1"]))
    torch.testing.assert_close(learning.samples[1].y[:, 0], second(first(x).relu())[seen])
    assert torch.equal(learning.problems[0].weight[0], first.weight)
    assert torch.equal(learning.problems[0].bias[0], first.bias)


def test_what_is_learned_is_the_folded_scaled_weight_with_the_bias_of_the_quantized_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Conv1d(2, 4, 3, bias=False), nn.BatchNorm1d(4)), torch.randn(10, 2, 8)
    nn.init.uniform_(model[1].running_var, 0.2, 3.0)
    nn.init.normal_(model[1].running_mean)
    learning = Learning(monkeypatch)
    scale, offset, correction = torch.rand(4, 1, 1) + 0.5, torch.randn(4), torch.randn(4)
    with quantized(model, [x]) as session:
        (layer,) = session.layers
        session.adjust({layer.key: Adjustment(weight_scale=scale, bias_offset=offset, bias_correction=correction)})
        learn(session, [x])
    norm: Any = model[1]
    factor = 1 / torch.sqrt(norm.running_var + norm.eps)
    folded = model[0].weight * factor[:, None, None] * scale
    rows = folded.detach().permute(0, 2, 1).flatten(1)
    torch.testing.assert_close(learning.problems[0].weight[0], rows)
    bias = -norm.running_mean * factor + offset
    torch.testing.assert_close(learning.problems[0].bias[0], bias + correction)
    exact = F.conv1d(x, folded, bias)
    seen = exact[torch.tensor([0, 2, 3, 4, 5, 7, 8, 9])].detach().movedim(1, -1).reshape(-1, 4)
    torch.testing.assert_close(learning.samples[0].y[:, 0], seen)


def test_grids_of_groups_and_channels_reach_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    learning = Learning(monkeypatch)
    model, x = nn.Linear(6, 2), tokens(10, 6)
    with quantized(model, [x], with_spec(3, granularity="per_group", group_size=2)) as session:
        learn(session, [x])
        encoding = layer_named(session, "linear").quantizer.encoding
    assert encoding is not None
    for row, group in np.ndindex(2, 3):
        assert (learning.problems[0].scale[0, row, 2 * group : 2 * group + 2] == encoding.scale[row, group]).all()
    model, x = nn.ConvTranspose1d(3, 4, 2), torch.randn(10, 3, 5)
    with quantized(model, [x], with_spec(3, symmetric=False, granularity="per_channel")) as session:
        (layer,) = session.layers
        encoding = layer.quantizer.encoding
        learn(session, [x])
    assert encoding is not None
    assert encoding.channel_axis == 1
    problem = learning.problems[1]
    assert problem.weight.shape == (1, 4, 6)
    for channel in range(4):
        assert (problem.scale[0, channel] == encoding.scale[channel]).all()
        assert (problem.lowest[0, channel] == -encoding.zero_point[channel]).all()
        assert (problem.highest[0, channel] == 7 - encoding.zero_point[channel]).all()


class Behind(nn.Module):
    """A layer and what stands behind it."""

    def __init__(self, behind: Callable[[Tensor], Any], norm: bool = False) -> None:
        super().__init__()
        self.layer = nn.Conv2d(4, 3, 1)
        self.norm = nn.BatchNorm2d(3) if norm else nn.Identity()
        self.behind = behind

    def forward(self, x: Tensor) -> Any:
        return self.behind(self.norm(self.layer(x)))


CLIPS: dict[str, tuple[Callable[[Tensor], Any], tuple[float, float] | None]] = {
    "relu": (F.relu, (0, math.inf)),
    "relu_in_place": (lambda x: x.relu_() * 1, (0, math.inf)),
    "relu6": (nn.ReLU6(), (0, 6)),
    "relu6_in_place": (nn.ReLU6(inplace=True), (0, 6)),
    "hardtanh": (nn.Hardtanh(-0.5, 2.0), (-0.5, 2)),
    "clamp": (lambda x: x.clamp(-1, 2), (-1, 2)),
    "clamp_by_name": (lambda x: torch.clamp(x, max=2.5), (-math.inf, 2.5)),
    "clamp_min": (lambda x: x.clamp_min(0.25), (0.25, math.inf)),
    "behind_dropout": (nn.Sequential(nn.Dropout(), nn.ReLU()), (0, math.inf)),
    "clamp_to_a_tensor": (lambda x: torch.clamp(x, torch.zeros(3, 1, 1)), None),
    "leaky_relu": (nn.LeakyReLU(), None),
    "gelu": (nn.GELU(), None),
    "nothing": (lambda x: x, None),
    "two_readers": (lambda x: x.relu() + x, None),
    "returned_as_well": (lambda x: (x.relu(), x), None),
}


@pytest.mark.parametrize("norm", [False, True], ids=["plain", "folded"])
@pytest.mark.parametrize("name", CLIPS)
def test_the_clipping_behind_a_layer_is_found(name: str, norm: bool) -> None:
    behind, expected = CLIPS[name]
    model, x = Behind(behind, norm), images(2)
    with quantized(model, [x]) as session:
        bounds = activation_bounds(session, layer_named(session, "layer"), 3)
    assert (bounds is None) == (expected is None)
    if bounds is not None and expected is not None:
        assert [end.tolist() for end in bounds] == [[end] * 3 for end in expected]


def test_a_clipping_that_was_scaled_counts_as_it_is_now() -> None:
    model, x = Behind(nn.ReLU6()), images(2)
    with quantized(model, [x]) as session:
        (clip,) = [operation.key for operation in session.topology if operation.op in ("relu6", "hardtanh")]
        layer = layer_named(session, "layer")
        session.adjust({clip: Adjustment(bounds_scale=torch.tensor([0.5, 1.0, 2.0])[:, None, None])})
        bounds = activation_bounds(session, layer, 3)
        assert bounds is not None
        assert [end.tolist() for end in bounds] == [[0, 0, 0], [3, 6, 12]]
        session.adjust({clip: Adjustment(bounds_scale=torch.ones(6))})
        assert activation_bounds(session, layer, 3) is None


def test_the_clipping_is_part_of_what_is_learned(monkeypatch: pytest.MonkeyPatch) -> None:
    learning = Learning(monkeypatch)
    model, x = Behind(nn.ReLU6()), images(8)
    with quantized(model, [x]) as session:
        learn(session, [x])
    assert (learning.problems[0].low == 0).all()
    assert (learning.problems[0].high == 6).all()


def test_default_settings_are_used_where_none_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[AdaRoundSettings] = []
    monkeypatch.setattr(module, "learn_rounding", lambda problem, samples, settings, late: seen.append(settings))
    model, x = nn.Linear(6, 3), tokens(20, 6)
    with quantized(model, [x]) as session:
        adaround(session, batch_runs(session, [x]))
    assert seen == [AdaRoundSettings()]


def test_samples_stay_within_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    learning = Learning(monkeypatch)
    model, x = nn.Linear(6, 2), tokens(400, 6)
    for settings, count in (
        (AdaRoundSettings(positions=30), 30),
        (AdaRoundSettings(memory_limit=100 * 4 * 8), 80),
        (AdaRoundSettings(), 320),
    ):
        with quantized(model, [x]) as session:
            learn(session, [x], settings)
        assert len(learning.samples[-1]) == count

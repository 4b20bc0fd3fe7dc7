"""What is seen of a tensor, against numpy on the same tensor in float64; the session is as it was afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_quantdebug import tensor_views as module
from lightning_quantdebug.adaround import adaround
from lightning_quantdebug.equalization import equalize
from lightning_quantdebug.instrument import batch_runs, instrument
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.report import StepName
from lightning_quantdebug.target import Granularity, Mode
from lightning_quantdebug.tensor_views import Moment, tensor_views
from lightning_quantdebug.visuals import TensorState, TensorView

torch.set_num_threads(1)


def seen(
    net: nn.Module, batches: Sequence[Tensor], names: Sequence[str], target: Any = "w4a4_per_tensor"
) -> tuple[dict[str, TensorView], dict[str, tuple[Any, ...]]]:
    """The views of one moment, and scale, lowest and highest level of each quantizer."""
    net.eval()
    with torch.no_grad(), instrument(net, batches[0], target) as q:
        q.calibrate(batches)
        views = tensor_views(
            q, batch_runs(q, list(batches)), dict.fromkeys(names, "guilty"), [Moment(StepName.FP32_CHECK, q.state())]
        )
        grids = {name: grid(q, name) for name in names if name in q.quantizers}
    return {view.quantizer: view for view in views}, grids


def grid(q: Instrumentation, name: str) -> tuple[Any, ...]:
    encoding = q.quantizers[name].encoding
    assert encoding is not None
    return tuple(
        each.double().numpy() for each in (encoding.scale, encoding.range_min / encoding.scale, encoding.highest_step)
    )


def quantized(x: np.ndarray, scale: Any, low: Any, high: Any) -> np.ndarray:
    """The twin of fake quantization."""
    return np.asarray(np.clip(np.round(x / scale), np.round(low), high) * scale)


def check(state: TensorState, rows: np.ndarray, scale: Any, low: Any, high: Any) -> None:
    """A state of a tensor of shape ``(C, K)`` that was looked at in full; the grid per tensor or ``(C, 1)``."""
    on_grid = quantized(rows, scale, low, high)
    error = (on_grid - rows) ** 2
    outside = (rows < low * scale) | (rows > high * scale)
    assert state.values == rows.size
    np.testing.assert_allclose(state.low, rows.min(1), rtol=1e-4)
    np.testing.assert_allclose(state.high, rows.max(1), rtol=1e-4)
    ones = np.ones((len(rows), 1))
    np.testing.assert_allclose(state.clip_low, (low * scale * ones)[:, 0], rtol=1e-4)
    np.testing.assert_allclose(state.clip_high, (high * scale * ones)[:, 0], rtol=1e-4)
    assert state.clipping == pytest.approx((error * outside).sum() / rows.size, rel=1e-4, abs=1e-12)
    assert state.rounding == pytest.approx((error * ~outside).sum() / rows.size, rel=1e-4)
    assert state.sqnr_db == pytest.approx(10 * np.log10((rows**2).sum() / error.sum()), abs=0.01)
    of_channels = 10 * np.log10((rows**2).sum(1) / error.sum(1))
    np.testing.assert_allclose(np.array(state.channel_sqnr_db, dtype=float), of_channels, atol=0.01)
    edges = np.linspace(min(rows.min(), on_grid.min()), max(rows.max(), on_grid.max()), module.MOST_BINS + 1)
    np.testing.assert_allclose(state.edges, edges, rtol=1e-4, atol=1e-6)
    assert sum(state.fp32) == sum(state.quantized) == rows.size
    # A value on an edge may fall to either side in another precision.
    assert np.abs(np.array(state.fp32) - np.histogram(rows, edges)[0]).sum() <= 2
    cumulative = np.abs(np.cumsum(state.quantized) - np.cumsum(np.histogram(on_grid, edges)[0]))
    assert (cumulative > 0).mean() < 0.3


def linear(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))
    with torch.no_grad():
        net[0].weight[3] *= 20
    return net


def test_a_weight_is_seen_as_it_is() -> None:
    net = linear()
    views, grids = seen(net, [torch.randn(32, 6)], ["0.weight"])
    (state,) = views["0.weight"].states
    check(state, net[0].weight.detach().double().numpy(), *grids["0.weight"])
    assert (state.step, state.bit_width, state.granularity) == ("fp32_check", 4, "per_tensor")
    scale, low, high = grids["0.weight"]
    np.testing.assert_allclose(state.grid, np.arange(low, high + 1) * scale, rtol=1e-4)
    assert state.scale == pytest.approx(float(scale))
    view = views["0.weight"]
    assert (view.kind, view.why, view.channel_axis) == ("weight", "guilty", "output channel")
    assert (view.channels, view.total_channels, view.heat_map) == (tuple(range(10)), 10, None)


def test_a_weight_per_channel_has_the_clipping_range_of_each() -> None:
    net = linear()
    views, grids = seen(net, [torch.randn(32, 6)], ["0.weight"], "w4a8")
    (state,) = views["0.weight"].states
    check(state, net[0].weight.detach().double().numpy(), *(np.reshape(each, (-1, 1)) for each in grids["0.weight"]))
    assert state.granularity == "per_channel"
    assert state.grid == ()
    assert len(set(state.clip_high)) == 10


def test_a_weight_per_group_clips_by_group_and_shows_the_widest_range_of_a_channel() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 3))
    with torch.no_grad():
        net[0].weight[:, 32:] *= 8
    batch = torch.randn(16, 64)
    target = {"preset": "w4a8", "weights": {"granularity": "per_group", "group_size": 32, "range_setting": "mse"}}
    with torch.no_grad(), instrument(net.eval(), batch, target) as q:
        q.calibrate([batch])
        encoding = q.quantizers["0.weight"].encoding
        assert encoding is not None
        assert encoding.spec.granularity is Granularity.PER_GROUP
        (view,) = tensor_views(q, batch_runs(q, [batch]), {"0.weight": "x"}, [Moment(StepName.FP32_CHECK, q.state())])
        x = net[0].weight.double().numpy()
        spread = [np.repeat(e.double().numpy(), 32, 1) for e in (encoding.range_min, encoding.range_max)]
        outside = (x < spread[0]) | (x > spread[1])
        error = (q.quantizers["0.weight"].quantized(net[0].weight).double().numpy() - x) ** 2
    (state,) = view.states
    assert 0 < outside.sum() < x.size
    assert state.clipping == pytest.approx((error * outside).sum() / x.size, rel=1e-4)
    np.testing.assert_allclose(state.clip_high, encoding.range_max.amax(1), rtol=1e-4)
    np.testing.assert_allclose(state.clip_low, encoding.range_min.amin(1), rtol=1e-4)


def test_an_activation_is_seen_over_all_batches() -> None:
    net = linear()
    batches = [torch.randn(16, 6) * factor for factor in (1.0, 3.0, 0.5)]
    views, grids = seen(net, batches, ["1"])
    with torch.no_grad():
        rows = torch.cat([net[1](net[0](batch)) for batch in batches]).double().numpy().T
    (state,) = views["1"].states
    # Channels that are dead have no SQNR, and are not compared.
    alive = np.flatnonzero((rows != 0).any(1))
    assert views["1"].channel_axis == "channel"
    np.testing.assert_allclose(state.high, rows.max(1), rtol=1e-4)
    scale, low, high = grids["1"]
    error = (quantized(rows, scale, low, high) - rows) ** 2
    assert state.rounding + state.clipping == pytest.approx(error.mean(), rel=1e-4)
    assert [state.channel_sqnr_db[i] is not None for i in alive] == [True] * len(alive)


def test_channels_of_an_image_are_its_second_axis() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU(), nn.Conv2d(5, 3, 1))
    batch = torch.randn(4, 2, 6, 6)
    views, grids = seen(net, [batch], ["1", "0.weight"])
    with torch.no_grad():
        rows = net[1](net[0](batch)).transpose(0, 1).reshape(5, -1).double().numpy()
    check(views["1"].states[0], rows, *grids["1"])
    check(views["0.weight"].states[0], net[0].weight.detach().reshape(5, -1).double().numpy(), *grids["0.weight"])


def test_a_folded_weight_is_seen_folded() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU())
    net[1].running_var.copy_(torch.rand(5) + 0.1)
    views, _ = seen(net, [torch.randn(4, 2, 6, 6)], ["0.weight"])
    factor = (net[1].weight / (net[1].running_var + net[1].eps).sqrt()).detach()
    rows = (net[0].weight.detach() * factor[:, None, None, None]).reshape(5, -1).double().numpy()
    np.testing.assert_allclose(views["0.weight"].states[0].high, rows.max(1), rtol=1e-4)


def test_the_transposed_convolution_has_its_channels_on_the_second_axis() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.ConvTranspose2d(2, 5, 3))
    views, _ = seen(net, [torch.randn(4, 2, 6, 6)], ["0.weight"])
    np.testing.assert_allclose(
        views["0.weight"].states[0].high, net[0].weight.detach().transpose(0, 1).reshape(5, -1).amax(1), rtol=1e-4
    )


class Sentences(nn.Module):
    """An embedding and a layer, on words."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(50, 8)
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(self.words(x)))


def test_tokens_and_channels_make_a_map_with_its_noise() -> None:
    net = Sentences()
    with torch.no_grad():
        net.layer.bias[2] = 30.0
    batches = [torch.randint(50, (4, 7)), torch.randint(50, (4, 5))]
    views, grids = seen(net, batches, ["relu"])
    with torch.no_grad():
        outputs = [net(batch).double().numpy() for batch in batches]
    peak = np.zeros((7, 8))
    squares, count = np.zeros((7, 8)), np.zeros((7, 8))
    for y in outputs:
        peak[: y.shape[1]] = np.maximum(peak[: y.shape[1]], np.abs(y).max(0))
        squares[: y.shape[1]] += ((quantized(y, *grids["relu"]) - y) ** 2).sum(0)
        count[: y.shape[1]] += len(y)
    found = views["relu"].heat_map
    assert found is not None
    assert (found.rows, found.columns, found.total_rows, found.total_columns) == ("token", "channel", 7, 8)
    np.testing.assert_allclose(found.values, peak, rtol=1e-4)
    np.testing.assert_allclose(found.noise, np.sqrt(squares / count), rtol=1e-3, atol=1e-7)
    assert np.argmax(np.array(found.values).max(0)) == 2


def test_an_embedding_is_a_map_of_words_and_dimensions_the_most_extreme_of_them() -> None:
    net = Sentences()
    with torch.no_grad():
        net.words.weight[17] = 9.0
    views, _ = seen(net, [torch.randint(50, (4, 7))], ["words.weight"])
    view = views["words.weight"]
    found = view.heat_map
    assert found is not None
    assert (found.rows, found.columns, found.total_rows, found.total_columns) == ("embedding", "dimension", 50, 8)
    assert len(found.row_indices) == module.MOST_ROWS
    assert 17 in found.row_indices
    weight = net.words.weight.detach().abs()
    assert set(found.row_indices) == set(weight.amax(1).topk(module.MOST_ROWS).indices.tolist())
    np.testing.assert_allclose(found.values, weight[list(found.row_indices)].numpy(), rtol=1e-4)
    assert view.channel_axis == "dimension"
    np.testing.assert_allclose(view.states[0].high, net.words.weight.detach().amax(0), rtol=1e-4)


def test_of_many_channels_the_widest_and_some_of_the_narrowest_are_shown() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 200))
    with torch.no_grad():
        net[0].weight.copy_(torch.linspace(1, 3, 200)[torch.randperm(200)][:, None] * torch.tensor([-1, 0, 0.5, 1]))
    views, _ = seen(net, [torch.randn(8, 4)], ["0.weight"])
    view = views["0.weight"]
    order = net[0].weight.detach().amax(1).argsort().tolist()
    narrow = module.MOST_CHANNELS // 4
    assert view.total_channels == 200
    assert view.channels == tuple(sorted([*order[:narrow], *order[-(module.MOST_CHANNELS - narrow) :]]))
    np.testing.assert_allclose(view.states[0].high, net[0].weight.detach().amax(1)[list(view.channels)], rtol=1e-4)


def test_before_and_after_remedies_are_seen_on_the_same_channels_and_the_session_is_given_back() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 60), nn.ReLU(), nn.Linear(60, 4)).eval()
    with torch.no_grad():
        net[0].weight[3] *= 50
    batch = torch.randn(64, 6)
    with torch.no_grad(), instrument(net, batch, "w4a8_per_tensor") as q:
        q.calibrate([batch])
        runs = batch_runs(q, [batch])
        moments = [Moment(StepName.FP32_CHECK, q.state())]
        equalize(q, runs)
        q.calibrate([batch])
        moments.append(Moment(StepName.FIX_WEIGHTS, q.state()))
        q.set_mode("quantize")
        expected = q.quantizers["0.weight"].encoding
        (view,) = tensor_views(q, runs, {"0.weight": "uneven"}, moments)
        (first,) = tensor_views(q, runs, {"0.weight": "uneven"}, moments[:1])
        (both,) = tensor_views(q, runs, {"0.weight": "uneven"}, moments[1:], [first])
        assert q.quantizers["0.weight"].encoding is expected
        assert all(quantizer.mode is Mode.QUANTIZE for quantizer in q.quantizers.values())
        assert all(quantizer.probe is None for quantizer in q.quantizers.values())
        assert q.adjustments == moments[1].state.adjustments
    assert both == view
    before, after = view.states
    assert [state.step for state in view.states] == ["fp32_check", "fix_weights"]
    at = view.channels.index(3)
    assert before.high[at] - before.low[at] > 20 * np.median(np.subtract(before.high, before.low))
    assert after.high[at] - after.low[at] < 10 * np.median(np.subtract(after.high, after.low))
    assert before.sqnr_db is not None
    assert after.sqnr_db is not None


def test_the_fp32_weight_has_no_learned_rounding_and_its_quantized_values_have() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    mixed = torch.randn(3, 8)
    batches = [torch.randn(256, 3) @ mixed for _ in range(2)]
    with torch.no_grad(), instrument(net, batches[0], "w3a8_per_tensor") as q:
        q.calibrate(batches)
        adaround(q, batch_runs(q, batches))
        (view,) = tensor_views(q, batch_runs(q, batches), {"0.weight": "x"}, [Moment(StepName.FIX_WEIGHTS, q.state())])
        (layer,) = [layer for layer in q.layers if layer.quantizer.name == "0.weight"]
        correction = q.adjustments[layer.key].weight_correction
        assert correction is not None
        learned = q.quantizers["0.weight"].quantized(net[0].weight + correction)
    np.testing.assert_allclose(view.states[0].high, net[0].weight.detach().amax(1), rtol=1e-4)
    error = (learned - net[0].weight).square().mean().item()
    assert view.states[0].clipping + view.states[0].rounding == pytest.approx(error, rel=1e-4)


def test_large_tensors_are_sampled_with_ranges_of_all_values(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_VALUES", 400)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(500, 4))
    with torch.no_grad():
        net[0].weight[2, 499] = 7.0
    views, _ = seen(net, [torch.randn(8, 500)], ["0.weight"])
    (state,) = views["0.weight"].states
    assert state.values == 400
    assert state.high[2] == 7.0
    assert sum(state.fp32) == 400


def test_what_was_never_reached_or_does_not_exist_has_no_view() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if x.shape[0] > 4 else self.b(x)

    net = Branch().eval()
    with torch.no_grad(), instrument(net, torch.randn(8, 4), "int8") as q:
        q.calibrate([torch.randn(8, 4)])
        moment = Moment(StepName.FP32_CHECK, q.state())
        views = tensor_views(q, batch_runs(q, [torch.randn(2, 4)]), {"a": "x", "none": "y"}, [moment])
    assert views == ()


def test_nan_and_constants_do_no_harm() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.fill_(-1.0)
    batch = torch.randn(8, 4)
    views, _ = seen(net, [batch], ["1", "0.weight"])
    for view in views.values():
        (state,) = view.states
        assert state.sqnr_db is None
        assert state.channel_sqnr_db == (None,) * 3
        assert sum(state.fp32) == state.values
        assert state.edges[0] < 0 < state.edges[-1]


def test_tokens_are_told_from_samples_where_attention_has_turned_them() -> None:
    class Turned(nn.Module):
        """Samples second, as ``nn.MultiheadAttention`` computes."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.b(self.a(x).transpose(0, 1))).transpose(0, 1)

    net = Turned()
    batches = [torch.randn(5, 3, 6), torch.randn(4, 3, 6)]
    views, _ = seen(net, batches, ["relu"])
    found = views["relu"].heat_map
    assert found is not None
    assert (found.total_rows, found.total_columns) == (3, 8)
    with torch.no_grad():
        peak = torch.cat([net(batch) for batch in batches]).abs().amax(0)
    np.testing.assert_allclose(found.values, peak, rtol=1e-4)

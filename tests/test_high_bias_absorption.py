"""High-bias absorption: what is taken out, what takes it in, and where it must not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quantdebug import high_bias_absorption
from lightning_quantdebug.adjustment import Applied
from lightning_quantdebug.channel_groups import effective_weights
from lightning_quantdebug.equalization import equalize
from lightning_quantdebug.high_bias_absorption import absorb_high_bias
from lightning_quantdebug.instrument import batch_runs, instrument
from lightning_quantdebug.report import Cause
from lightning_quantdebug.traces import relative_error
from tests.channel_networks import Experts, Net, conv, norm

torch.set_num_threads(1)

Biases = dict[str, Tensor | None]


def absorbed(model: nn.Module, *batches: Tensor, first: bool = False) -> tuple[Applied, Biases, Biases, float]:
    """What was done, the effective biases before and after, and how much the output changed."""
    with instrument(model, batches[0]) as session, torch.no_grad():
        session.calibrate(batches)
        runs = batch_runs(session, batches)
        names = {layer.key: layer.name for layer in session.layers}
        if first:
            equalize(session, runs)
        before = {names[key]: bias for key, (_, bias) in effective_weights(session, runs).items()}
        outputs = [model(batch) for batch in batches]
        applied = absorb_high_bias(session, runs)
        after = {names[key]: bias for key, (_, bias) in effective_weights(session, runs).items()}
        error = max(relative_error(model(batch), out) for batch, out in zip(batches, outputs, strict=True))
        return applied, before, after, error


def raised(layer: Any, by: float = 20.0) -> Any:
    """A layer with a large bias, different for each channel; the last channel has none."""
    with torch.no_grad():
        layer.bias.copy_(by + torch.arange(len(layer.bias)))
        layer.bias[-1] = 0.0
    return layer


def floors(outputs: Tensor, axis: int) -> np.ndarray[Any, Any]:
    """What may be taken out of each channel, by loops, in float64: least value, mean less three deviations, 0."""
    values = np.moveaxis(outputs.detach().double().numpy(), axis, 0)
    return np.array([max(0.0, min(c.min(), c.mean() - 3 * c.std())) for c in values.reshape(len(values), -1)])


@pytest.mark.parametrize("activation", [F.relu, F.leaky_relu, lambda x: x, lambda x: F.max_pool2d(F.relu(x), 3, 1, 1)])
def test_what_every_sample_has_moves_to_the_next_bias(activation: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    model = Net(lambda m, x: m.b(activation(m.a(x))), a=raised(conv(3, 4, 3)), b=nn.Conv2d(4, 5, 3)).eval()
    batches = torch.randn(2, 3, 3, 8, 8).unbind()
    with torch.no_grad():
        c = floors(model.a(torch.cat(batches)), 1)
    applied, before, after, error = absorbed(model, *batches)
    assert applied.changed == ("a", "b")
    assert applied.note.startswith(
        f"3 channels gave up to {c.max():.3g} of their bias; FP32 outputs changed by at most"
    )
    assert (c[:3] > 15).all()
    assert c[3] == 0
    np.testing.assert_allclose(before["a"] - after["a"], c, rtol=1e-5)
    taken = (model.b.weight.detach().double().numpy() * c[None, :, None, None]).sum((1, 2, 3))
    np.testing.assert_allclose(after["b"] - before["b"], taken, rtol=1e-4)
    assert error <= 1e-5


def test_one_unusual_sample_bounds_what_is_taken() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(raised(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 3)).eval()
    batch = torch.randn(512, 4)
    with torch.no_grad():
        away = model[0].weight[0]
        batch[7] = -20 * away / away.square().sum()
        outputs = model[0](batch)
    assert outputs[7, 0] == pytest.approx(0.0, abs=1e-4)
    _, before, after, error = absorbed(model, batch[:100], batch[100:])
    np.testing.assert_allclose(before["0"] - after["0"], floors(outputs, 1), rtol=1e-5, atol=1e-5)
    assert float(after["0"][0]) == pytest.approx(float(before["0"][0]), abs=1e-3)
    assert error <= 1e-5


@pytest.mark.parametrize("equalized", [False, True])
def test_batch_normalization_bounds_what_is_taken(equalized: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 4), norm(4), nn.ReLU(), conv(4, 2)).eval()
    with torch.no_grad():
        model[1].running_mean.zero_()
        model[1].bias.copy_(torch.tensor([10.0, 10.0, 10.0, -10.0]))
        model[1].weight.copy_(torch.tensor([1.0, -3.0, 4.0, 1.0]))
        # The data vary less than the normalization says, so that it alone bounds channels 1 and 2.
        batch = 0.01 * torch.randn(2, 3, 6, 6)
    with instrument(model, batch) as session:
        session.calibrate([batch])
        runs = batch_runs(session, [batch])
        scale = torch.ones(4)
        if equalized:
            equalize(session, runs)
            scale = next(iter(session.adjustments.values())).bias_scale
    _, before, after, error = absorbed(model, batch, first=equalized)
    np.testing.assert_allclose((before["0"] - after["0"]) / scale, [7.0, 1.0, 0.0, 0.0], rtol=1e-4, atol=1e-5)
    assert error <= 1e-5


def test_what_a_normalization_permits_is_taken_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(conv(3, 4), norm(4), nn.ReLU(), conv(4, 2)).eval()
    with torch.no_grad():
        model[1].bias.fill_(10.0)
    batch = 0.01 * torch.randn(2, 3, 6, 6)
    with instrument(model, batch) as session:
        session.calibrate([batch])
        runs = batch_runs(session, [batch])
        assert absorb_high_bias(session, runs).changed == ("0", "3")
        assert absorb_high_bias(session, runs).changed == ()


def test_a_normalization_ahead_of_a_layer_says_nothing_of_its_output() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(norm(4), raised(conv(4, 4)), nn.ReLU(), conv(4, 2)).eval()
    batch = torch.randn(2, 4, 6, 6)
    with instrument(model, batch) as session:
        fold = session.layers[0].fold
        assert fold is not None
        assert fold.forward
    with torch.no_grad():
        c = floors(model[:2](batch), 1)
    _, before, after, error = absorbed(model, batch)
    np.testing.assert_allclose(before["1"] - after["1"], c, rtol=1e-4)
    assert c.max() > 10
    assert error <= 1e-5


def test_depthwise_and_grouped_layers_take_their_own_channels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        raised(conv(3, 4)), nn.ReLU(), raised(nn.Conv2d(4, 4, 3, groups=4)), nn.ReLU(), nn.Conv2d(4, 6, 1, groups=2)
    ).eval()
    batch = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        first = floors(model[0](batch), 1)
        second = floors(model[:3](batch), 1)
    _, before, after, error = absorbed(model, batch)
    depthwise = model[2].weight.detach().double().numpy().sum((1, 2, 3))
    np.testing.assert_allclose(after["2"] - before["2"], depthwise * first - second, rtol=1e-3, atol=1e-4)
    grouped = model[4].weight.detach().double().numpy()[:, :, 0, 0]
    taken = [sum(grouped[o, j] * second[2 * (o // 3) + j] for j in range(2)) for o in range(6)]
    np.testing.assert_allclose(after["4"] - before["4"], taken, rtol=1e-3, atol=1e-4)
    assert second.max() > 1
    assert error <= 1e-5


def test_a_layer_without_a_bias_gets_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(raised(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 3, bias=False)).eval()
    applied, before, after, error = absorbed(model, torch.randn(8, 5, 4))
    assert applied.changed == ("0", "2")
    assert before["2"] is None
    assert after["2"] is not None
    assert error <= 1e-5


@pytest.mark.parametrize(
    ("forward", "name", "reason"),
    [
        (lambda m, x: m.b(F.relu(m.a(x))), "a", "b sees zeros at its borders"),
        (lambda m, x: m.c(F.relu6(m.a(x))), "a", "relu6 clips from above"),
        (lambda m, x: m.c(F.relu(m.a(x)) + F.relu(m.d(x))), "a", "add joins it with another tensor"),
        (lambda m, x: m.c(torch.sigmoid(m.a(x))), "a", "sigmoid reads it"),
        (lambda m, x: m.c(F.pad(F.relu(m.a(x)), (1, 1))), "a", "pad puts zeros in"),
        (lambda m, x: m.c(m.a(x).mean(1, keepdim=True).expand(-1, 4, -1, -1)), "a", "not one layer alone makes it"),
    ],
)
def test_where_a_constant_does_not_pass_nothing_is_taken(forward: Any, name: str, reason: str) -> None:
    torch.manual_seed(0)
    layers = {"a": raised(conv(3, 4)), "b": conv(4, 2, 3), "c": conv(4, 2), "d": conv(3, 4)}
    applied, before, after, error = absorbed(Net(forward, **layers).eval(), torch.randn(2, 3, 6, 6))
    assert applied.changed == ()
    assert applied.note == "no channel has a bias that could be absorbed"
    assert dict(applied.skipped)[name] == reason
    assert error == 0
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_one_of_two_readers_at_a_border_is_enough() -> None:
    torch.manual_seed(0)
    model = Net(
        lambda m, x: m.c(y := F.relu(m.a(x))) + m.b(y), a=raised(conv(3, 4)), b=conv(4, 2, 3), c=conv(4, 2)
    ).eval()
    assert dict(absorbed(model, torch.randn(2, 3, 6, 6))[0].skipped)["a"] == "b sees zeros at its borders"


def test_low_biases_stay() -> None:
    torch.manual_seed(0)
    applied, _, _, _ = absorbed(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2)).eval(), torch.randn(2, 3, 6, 6))
    assert applied.changed == ()


def test_an_expert_without_data_is_left_alone() -> None:
    torch.manual_seed(0)
    model = Experts().eval()
    raised(model.a)
    applied, _, _, error = absorbed(model, torch.randn(6, 4))
    assert (applied.changed, error) == ((), 0)


def test_not_a_number_is_no_floor() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(raised(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 3)).eval()
    batch = torch.randn(8, 4)
    batch[0, 0] = float("nan")
    applied, _, _, _ = absorbed(model, torch.randn(8, 4), batch)
    assert applied.changed == ()


def test_one_channel_that_is_not_a_number_keeps_none_of_the_others_from_giving() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(raised(conv(3, 4)), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4)).eval()
    with torch.no_grad():
        model[0].bias[1] = float("nan")
    applied, before, after, _ = absorbed(model, torch.randn(2, 3, 6, 6))
    assert applied.changed == ("0", "2")
    assert applied.note.startswith("2 channels gave up to 2")
    assert float(before["0"][0] - after["0"][0]) > 10


def test_too_much_is_found_out_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(raised(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 3)).eval()
    monkeypatch.setattr(high_bias_absorption, "_floor", lambda seen: torch.full((6,), 30.0))
    applied, before, after, error = absorbed(model, torch.randn(8, 4))
    assert [finding.cause for finding in applied.findings] == [Cause.CHANGED_FUNCTION]
    assert applied.findings[0].evidence.startswith("high-bias absorption changed the FP32 output '2' by ")
    assert error == 0
    assert all(torch.equal(before[key], after[key]) for key in before)

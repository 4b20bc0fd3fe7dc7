"""Bias correction against literal implementations in float64, planted biases, and networks of every kind."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quantdebug.adjustment import Adjustment, Applied
from lightning_quantdebug.bias_correction import correct_bias
from lightning_quantdebug.instrument import batch_runs, instrument
from lightning_quantdebug.instrumentation import Instrumentation
from tests.mean_errors import (
    W4,
    analytic,
    calibrate_on,
    corrections,
    empirical,
    images,
    mean_errors,
    off_grid,
    quantized_in_numpy,
    recorded_on,
    results,
    runs_of,
    three_layers,
)
from tests.zoo import Branching, Reused, make


def test_a_planted_bias_is_removed() -> None:
    model = nn.Sequential(nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 4))
    for layer in (model[0], model[2]):
        layer.weight.data = off_grid(layer.weight)
    batches = [torch.rand(count, 16, generator=torch.Generator().manual_seed(count)) for count in (32, 32, 9)]
    with instrument(model, batches[0], W4) as session:
        session.calibrate(batches)
        before = mean_errors(session, batches)
        assert before["0"][1:] == pytest.approx(-0.04 * 16 * 0.5, rel=0.2)
        done = empirical(session, batches)
        after = mean_errors(session, batches)
    assert done.changed == ("0", "2")
    assert done.skipped == ()
    for name in before:
        assert np.abs(after[name]).max() < 0.01 * np.abs(before[name]).max()


def test_it_is_the_formula_in_float64() -> None:
    """The literal method, layer by layer, on plain matrices."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8, bias=False), nn.ReLU(), nn.Linear(8, 3))
    for name in ("0", "2", "4"):
        layer = model[int(name)]
        layer.weight.data = off_grid(layer.weight)
    x = torch.rand(40, 12)
    with instrument(model, x, W4) as session:
        session.calibrate([x])
        done = empirical(session, [x])
        found = corrections(session)
    exact = rounded = x.double().numpy()
    for name in ("0", "2", "4"):
        layer = model[int(name)]
        bias = layer.bias.detach().double().numpy() if layer.bias is not None else 0.0
        exact = exact @ layer.weight.detach().double().numpy().T + bias
        rounded = rounded @ quantized_in_numpy(layer.weight).T + bias
        error = (rounded - exact).mean(0)
        np.testing.assert_allclose(found[name], -error, atol=2e-3 * np.abs(error).max())
        assert np.abs(error).max() > 0.01
        rounded = rounded - error
        exact, rounded = np.maximum(exact, 0), np.maximum(rounded, 0)
    assert done.changed == ("0", "2", "4")


def one_after_the_other(session: Instrumentation, batches: list[Tensor]) -> None:
    """The literal method with two runs through everything for each layer."""
    for layer in session.layers:
        error = torch.from_numpy(mean_errors(session, batches)[layer.name])
        session.adjust({layer.key: Adjustment(bias_correction=-error.float())})


@pytest.mark.parametrize("counts", [(24,), (8, 8, 8), (11, 4, 9)])
def test_one_pass_gives_what_two_runs_for_each_layer_give(counts: tuple[int, ...]) -> None:
    """Not exactly for several batches: there the input of a layer has the right mean in each batch, not in all."""
    batches = images(*counts)
    with instrument(three_layers(), batches[0], "w4a8_per_tensor") as session:
        session.calibrate(batches)
        state = session.state()
        one_after_the_other(session, batches)
        slow = corrections(session)
        session.restore(state)
        empirical(session, batches)
        fast = corrections(session)
    assert list(fast) == list(slow) == ["0", "3", "7"]
    for name in slow:
        size = np.abs(slow[name]).max()
        np.testing.assert_allclose(fast[name], slow[name], atol=(1e-5 if len(counts) == 1 else 0.03) * size)


def test_the_mean_does_not_depend_on_how_data_is_split() -> None:
    x = images(12)[0]
    found = []
    for splits in ([12], [5, 7], [1] * 12, [10, 2]):
        with instrument(nn.Sequential(three_layers()[0]), x, "w4a8_per_tensor") as session:
            session.calibrate([x])
            empirical(session, torch.split(x, splits))
            found.append(corrections(session)["0"])
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-5, atol=1e-8)


def test_every_token_counts_the_same() -> None:
    torch.manual_seed(0)
    batches = [torch.rand(2, 3, 8), torch.rand(3, 11, 8) + 1]
    with instrument(nn.Sequential(nn.Linear(8, 5)), batches[0], W4) as session:
        session.calibrate(batches)
        expected = mean_errors(session, batches, axis=2)
        empirical(session, batches)
        np.testing.assert_allclose(corrections(session)["0"], -expected["0"], rtol=1e-4, atol=1e-7)


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (5, 4, 9)),
    "conv2d without bias": (lambda: nn.Conv2d(4, 6, 3, stride=2, bias=False), (5, 4, 9, 9)),
    "conv3d": (lambda: nn.Conv3d(4, 6, 2), (3, 4, 4, 4, 4)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (5, 4, 6, 6)),
    "reflected": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (5, 4, 6, 6)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=2), (5, 4, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (5, 4, 5, 5)),
    "transposed and grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False), (5, 4, 5, 5)),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 6, 2), (2, 4, 3, 3, 3)),
    "without a batch": (lambda: nn.Conv2d(4, 6, 3), (4, 7, 7)),
    "linear": (lambda: nn.Linear(4, 6), (7, 4)),
    "linear without a batch": (lambda: nn.Linear(4, 6, bias=False), (4,)),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_layer_is_corrected(name: str) -> None:
    torch.manual_seed(1)
    make_layer, shape = KINDS[name]
    model, x = nn.Sequential(make_layer()), torch.rand(shape)
    axis = len(shape) - 1 if "linear" in name else (0 if "without a batch" in name else 1)
    with instrument(model, x, W4) as session:
        session.calibrate([x])
        before = mean_errors(session, [x], axis)["0"]
        assert empirical(session, [x]).changed == ("0",)
        after = mean_errors(session, [x], axis)["0"]
        np.testing.assert_allclose(corrections(session)["0"], -before, rtol=1e-4, atol=1e-6)
    assert after.shape == (6,)
    assert np.abs(before).max() > 1e-3
    assert np.abs(after).max() < 1e-5


def test_a_second_time_there_is_nothing_left_to_correct() -> None:
    batches = images(16)
    with instrument(three_layers(), batches[0], "w4a8_per_tensor") as session:
        session.calibrate(batches)
        empirical(session, batches)
        first = corrections(session)
        empirical(session, batches)
        for name, second in corrections(session).items():
            np.testing.assert_allclose(second, first[name], atol=1e-5)


def test_neither_the_model_nor_its_fp32_function_changes() -> None:
    batches = images(6, 3)
    model = three_layers()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = model(batches[0])
    with instrument(model, batches[0], "w4a8_per_tensor") as session:
        session.calibrate(batches)
        exact = results(session, batches, False)
        encodings = {name: q.encoding for name, q in session.quantizers.items()}
        for correct in (empirical, analytic):
            state = session.state()
            correct(session, batches)
            for name, arrays in results(session, batches, False).items():
                for one, other in zip(arrays, exact[name], strict=True):
                    np.testing.assert_array_equal(one, other)
            for adjustment in session.adjustments.values():
                assert adjustment.bias_correction is not None
                assert adjustment.weight_scale is adjustment.bias_offset is adjustment.bias_scale is None
            assert torch.equal(model(batches[0]), plain)
            assert all(q.encoding is encodings[name] for name, q in session.quantizers.items())
            assert all(q.mode.value == "bypass" for q in session.quantizers.values())
            session.restore(state)
            assert session.adjustments == {}
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_module_that_is_called_three_times_has_one_bias() -> None:
    torch.manual_seed(0)
    model, x = Reused(), torch.rand(20, 8)
    model.layer.weight.data = off_grid(model.layer.weight)
    with instrument(model, x, W4) as session:
        session.calibrate([x])
        done = empirical(session, [x])
        found = corrections(session)
    exact = rounded = x.double().numpy()
    errors = []
    for _ in range(3):
        bias = model.layer.bias.detach().double().numpy()
        exact = exact @ model.layer.weight.detach().double().numpy().T + bias
        rounded = rounded @ quantized_in_numpy(model.layer.weight).T + bias
        errors.append((rounded - exact).mean(0))
        exact, rounded = np.maximum(exact, 0), np.maximum(rounded - errors[-1], 0)
    assert done.changed == ("layer", "layer@1", "layer@2")
    for correction in found.values():
        np.testing.assert_allclose(correction, -np.mean(errors, axis=0), atol=1e-3)
    assert np.ptp(errors, axis=0).max() > 0.05


class Tied(nn.Module):
    """Two layers with one weight, each with its own bias, or two calls of a function on them."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.one, self.other, self.functional = nn.Linear(6, 6), nn.Linear(6, 6), functional
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        if not self.functional:
            return self.other(F.relu(self.one(x)) * 5)
        hidden = F.relu(F.linear(x, self.one.weight, self.one.bias)) * 5
        return F.linear(hidden, self.one.weight, bias=self.other.bias)


@pytest.mark.parametrize("functional", [False, True])
def test_a_tied_weight_may_have_two_biases(functional: bool) -> None:
    torch.manual_seed(0)
    model, x = Tied(functional), torch.rand(30, 6)
    with instrument(model, x, W4) as session:
        session.calibrate([x])
        before = mean_errors(session, [x])
        empirical(session, [x])
        after, (one, other) = mean_errors(session, [x]), corrections(session).values()
    assert not np.allclose(one, other, atol=1e-3)
    assert len(before) == 2
    for name in before:
        assert np.abs(after[name]).max() < 1e-3 * np.abs(before[name]).max()


def test_a_loop_of_any_length_has_one_correction() -> None:
    torch.manual_seed(0)
    long, short = torch.full((2, 8), 3.0) + torch.rand(2, 8), torch.full((2, 8), 0.01)
    session = recorded_on(Branching(), W4, long, short)
    cell = next(layer for layer in session.layers if layer.name.startswith("cell"))
    assert cell.key.call is None
    calibrate_on(session, long, short)
    done = correct_bias(session, runs_of(session, long, short))
    assert sorted(done.changed) == ["a", "cell", "head"]
    assert set(corrections(session)) == {"a", "cell", "head"}


def test_dicts_embeddings_and_attention() -> None:
    model, batch = make("bert")
    with instrument(model, batch, "w4a8_per_tensor") as session:
        session.calibrate([batch])
        done = empirical(session, [batch])
    assert set(done.changed) == {"query", "key", "value", "output", "decoder"}
    assert ("words", "embedding takes no bias") in done.skipped


def test_products_and_recurrent_layers_take_no_bias() -> None:
    model, batch = make("functional")
    with instrument(model, batch, "w4a8_per_tensor") as session:
        session.calibrate([batch])
        done = empirical(session, [batch])
    assert done.changed == ("conv2d",)
    assert done.skipped == (("matmul", "matmul takes no bias"),)
    model, batch = make("lstm")
    with instrument(model, batch, "w4a8_per_tensor") as session:
        session.calibrate([batch])
        done = empirical(session, [batch])
    assert done.changed == ("fc",)
    assert dict(done.skipped)["lstm"] == "lstm takes no bias"


def test_without_a_layer_that_takes_a_bias_nothing_runs() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.rand(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.matrix

    with instrument(Product(), torch.rand(2, 4)) as session:
        session.calibrate([torch.rand(2, 4)])
        done = correct_bias(session, lambda visit: pytest.fail("it ran"))
    assert done == Applied(skipped=(("matmul", "matmul takes no bias"),))


@pytest.mark.parametrize("name", ["mobilenet", "resnet", "inception", "vision_transformer", "weight_norm"])
def test_the_error_falls_on_networks_of_every_family(name: str) -> None:
    model, batch = make(name)
    with instrument(model, batch, "w4a8_per_tensor") as session:
        session.calibrate([batch])
        note = empirical(session, [batch]).note
    before, after = (float(share) for share in re.findall(r"([\d.]+)%", note))
    assert after < 0.05 * before


def test_the_note_has_the_numbers() -> None:
    torch.manual_seed(0)
    batches = list(torch.rand(20, 16).split([12, 8]))
    with instrument(nn.Sequential(nn.Linear(16, 6)), batches[0], "w3a8_per_tensor") as session:
        session.calibrate(batches)
        exact = np.concatenate(results(session, batches, False)["0"])
        before = mean_errors(session, batches)["0"]
        note = empirical(session, batches).note
        after = mean_errors(session, batches)["0"]
    shares = [np.sqrt((error**2).mean() / (exact**2).mean()) for error in (before, after)]
    assert note == (
        f"The mean error of the median layer went from {shares[0]:.2%} to {shares[1]:.2%} of its result (root mean "
        "squares) on 2 calibration batches; it fell in 1 of 1 layers."
    )


def test_statistics_that_follow_in_training_do_not_correct_a_second_time() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
    x = torch.randn(64, 3, 8, 8) + 1.0
    with torch.no_grad():
        for _ in range(60):
            model.train()(x)
        fp32 = model.eval()(x)
        with instrument(model, x, "w2a8_per_tensor") as session:
            session.calibrate([x])
            session.set_mode("quantize", kind="weight")
            plain = (model(x) - fp32).mean((0, 2, 3)).abs().mean()
            session.set_mode("bypass")
            correct_bias(session, batch_runs(session, [x]))
            session.set_mode("quantize", kind="weight")
            corrected = (model(x) - fp32).mean((0, 2, 3)).abs().mean()
            for _ in range(100):
                model.train()(x)
            followed = (model.eval()(x) - fp32).mean((0, 2, 3)).abs().mean()
    assert corrected < 0.1 * plain
    assert followed < 0.2 * plain

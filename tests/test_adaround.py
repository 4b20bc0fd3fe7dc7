"""AdaRound on networks: what ends up on the grid, what it is worth, when a layer is left alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quantdebug.fake_quantize import fake_quantize
from lightning_quantdebug.instrument import instrument
from lightning_quantdebug.learned_rounding import AdaRoundSettings
from tests.adaround_cases import (
    Learning,
    corrections,
    images,
    learn,
    network,
    output_error,
    quantized,
    tokens,
    weight_in_use,
    with_spec,
)

torch.set_num_threads(1)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "conv_strided_same_reflect": lambda: nn.Conv2d(4, 6, 3, padding="same", dilation=2, padding_mode="reflect"),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1),
    "transposed_grouped": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False),
    "linear_of_tokens": lambda: nn.Sequential(nn.Flatten(2), nn.Linear(36, 6)),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(144, 6)),
}


GRIDS: dict[str, dict[str, Any]] = {
    "2_bits": with_spec(2),
    "3_bits_asymmetric": with_spec(3, symmetric=False),
    "4_bits_per_channel": with_spec(4, granularity="per_channel"),
    "4_bits_asymmetric_per_channel": with_spec(4, symmetric=False, granularity="per_channel"),
    "3_bits_per_group": with_spec(3, granularity="per_group", group_size=12),
    "8_bits_narrow": with_spec(8, narrow_range=True),
}


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", LAYERS)
def test_the_quantizer_gives_exactly_the_learned_levels(name: str, grid: str) -> None:
    torch.manual_seed(0)
    model, x = LAYERS[name](), images()
    with quantized(model, [x], GRIDS[grid]) as session:
        (layer,) = session.layers
        encoding = layer.quantizer.encoding
        assert encoding is not None
        nearest = weight_in_use(session, layer, lambda: model(x))
        done = learn(session, [x])
        if not done.changed:
            assert done.skipped[0][1].startswith("on held-out samples its error was")
            assert not session.adjustments
            assert torch.equal(weight_in_use(session, layer, lambda: model(x)), nearest)
            return
        assert done.changed == (layer.name,)
        correction = session.adjustments[layer.key].weight_correction
        assert correction is not None
        weight = next(p for p in model.parameters() if p.ndim > 1).detach()
        learned = weight_in_use(session, layer, lambda: model(x))
        # The levels in use are the weight with its correction, and a neighbour of the weight on its grid.
        torch.testing.assert_close(learned, weight + correction, rtol=0, atol=1e-6)
        assert torch.equal(fake_quantize(learned, encoding), learned)
        assert not torch.equal(learned, nearest)
        step = fake_quantize(torch.full_like(weight, 1e9), encoding) - fake_quantize(
            torch.full_like(weight, -1e9), encoding
        )
        step = step / (encoding.num_levels - 1)
        unclipped = (nearest - weight).abs() <= 0.5001 * step
        assert ((learned - weight).abs() < 1.0001 * step)[unclipped].all()
        assert layer.quantizer.frozen


def test_a_network_comes_closer_to_fp32_on_data_that_it_was_not_learned_on() -> None:
    model, batches = network(), [images(16, seed=seed) for seed in range(3)]
    unseen = images(64, seed=9)
    with quantized(model, batches, "w3a8_per_tensor") as session:
        before = output_error(session, model, unseen)
        done = learn(session, batches)
        after = output_error(session, model, unseen)
    assert done.changed == ("0", "3", "5", "8")
    assert done.skipped == ()
    assert after < 0.5 * before
    assert "rounding of 4 of 4 weights; the median error of their layers is 0." in done.note


def test_a_frozen_rounding_survives_calibration_and_can_be_undone() -> None:
    model, batches = network(), [images()]
    with quantized(model, batches) as session:
        before, state = output_error(session, model, batches[0]), session.state()
        learn(session, batches)
        learned = output_error(session, model, batches[0], "weight")
        session.calibrate([images(8, seed=3)])
        session.reset_weight_ranges(lambda: model(batches[0]))
        assert output_error(session, model, batches[0], "weight") == learned
        session.restore(state)
        assert output_error(session, model, batches[0]) == before


def test_the_model_gradients_and_random_numbers_are_left_alone() -> None:
    model, batches = network(), [images()]
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    with quantized(model, batches) as session:
        learn(session, batches)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_learning_repeats_whatever_the_gradient_mode() -> None:
    results = []
    for mode in (torch.enable_grad, torch.inference_mode, torch.no_grad):
        torch.manual_seed(0)
        model, batches = nn.Sequential(nn.Linear(24, 8), nn.ReLU(), nn.Linear(8, 6)), [tokens(40, 24), tokens(7, 24)]
        with quantized(model, batches) as session, mode():
            learn(session, batches)
            results.append(corrections(session))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert not any(correction.is_inference() or correction.requires_grad for correction in results[1])


def test_tokens_that_are_repeated_change_nothing() -> None:
    x = tokens(60, 24)
    found = []
    # All positions in each step: which ones are drawn together would make a difference.
    settings = AdaRoundSettings(iterations=150, batch_size=10_000, learning_rate=0.1)
    for batch in (x, x[:, None], x[:, None].expand(-1, 8, -1)):
        torch.manual_seed(0)
        model = nn.Linear(24, 6)
        with quantized(model, [batch]) as session:
            learn(session, [batch], settings)
            found += corrections(session)
    assert len(found) == 3
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_what_does_not_hold_on_held_out_samples_is_not_kept() -> None:
    """Eight samples of 64 independent inputs can be fitted by heart."""
    torch.manual_seed(0)
    model, x = nn.Linear(64, 4), torch.randn(10, 64)
    with quantized(model, [x]) as session:
        done = learn(session, [x])
        (layer,) = session.layers
        assert not layer.quantizer.frozen
        assert not session.adjustments
    assert done.changed == ()
    ((name, reason),) = done.skipped
    assert name == "linear"
    assert re.fullmatch(r"on held-out samples its error was [1-9]\.\d+ of nearest rounding's: kept nearest", reason)
    assert done.note == (
        "AdaRound learned the rounding of 0 of 1 weights; 1 kept nearest rounding, which did as well on held-out "
        "samples."
    )


def reasons(
    model: nn.Module, batches: list[Any], target: Any = "w3a8", data: list[Any] | None = None
) -> dict[str, str]:
    """Why layers are left alone."""
    with quantized(model, batches, target) as session:
        done = learn(session, batches if data is None else data)
        assert set(done.changed) == {layer.name for layer in session.layers if layer.quantizer.frozen}
        return dict(done.skipped)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.lstm = nn.LSTM(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(self.embedding(x))[0]


class FromTheLeft(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight @ x


class Choosing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if len(x) > 5 else self.other(x)


def test_layers_that_rounding_can_not_be_learned_of_are_left_alone() -> None:
    x = tokens(20, 6)
    shared = reasons(Twice(), [x])
    assert len(shared) == 2
    assert all("used in several places" in reason for reason in shared.values())
    words = reasons(Words(), [torch.randint(0, 9, (5, 7))])
    assert "an embedding adds up no products: nearest rounding is best" in words.values()
    assert any("a recurrent layer has several weights" in reason for reason in words.values())
    (left,) = reasons(FromTheLeft(), [torch.randn(6, 8)]).values()
    assert left == "matmul does not multiply its input by one weight as a layer does"
    own = {"quantizer": "tests.faulty_quantizers.Correct", "weights": {"bit_width": 3}}
    assert reasons(nn.Linear(6, 3), [x], own) == {"linear": "a custom quantizer decides itself how it rounds"}
    assert reasons(nn.Linear(6, 3), [x], "w32a32") == {"linear": "32 bits leave nothing to round"}
    assert reasons(nn.Linear(6, 3), [x], data=[x[:1]]) == {
        "linear": "calibration gave too few positions with finite numbers to learn from and to judge by"
    }
    assert reasons(nn.Linear(6, 3), [x], data=[x * math.nan]).popitem()[1].startswith("calibration gave too few")


def test_a_layer_that_no_batch_reaches_is_left_alone() -> None:
    model, many, few = Choosing(), tokens(20, 6), tokens(4, 6)
    with instrument(model, many, "w3a8") as session:
        session.calibrate([many])
        assert [layer.name for layer in session.layers] == ["one"]
        assert dict(learn(session, [few]).skipped) == {"one": "no calibration batch reached it"}


def test_a_weight_without_a_range_and_one_that_is_not_finite() -> None:
    model, x = nn.Linear(6, 3), tokens(20, 6)
    with quantized(model, [x]) as session:
        (layer,) = session.layers
        with torch.no_grad():
            model.weight[0, 0] = math.nan
        assert dict(learn(session, [x]).skipped) == {"linear": "its weight is not finite"}
        layer.quantizer.reset()
        assert dict(learn(session, [x]).skipped) == {"linear": "its weight has no range"}


def test_a_rounding_is_not_learned_twice() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(24, 6), tokens(60, 24)
    with quantized(model, [x]) as session:
        assert learn(session, [x]).changed == ("linear",)
        kept = corrections(session)
        assert dict(learn(session, [x]).skipped) == {"linear": "its rounding was learned before"}
        assert torch.equal(corrections(session)[0], kept[0])


@pytest.mark.parametrize("bit_width", [2, 8, 12])
def test_levels_of_a_half_precision_weight(bit_width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    learning = Learning(monkeypatch)
    torch.manual_seed(0)
    model, x = nn.Linear(24, 6).bfloat16(), tokens(60, 24).bfloat16()
    with quantized(model, [x], with_spec(bit_width)) as session:
        assert learn(session, [x]).changed == ("linear",)
        learned = weight_in_use(session, session.layers[0], lambda: model(x))
    assert torch.equal(learned, learning.result[0].bfloat16())


def test_channels_of_zeros_ragged_batches_and_half_of_the_data_spoiled() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1))
    with torch.no_grad():
        model[0].weight[2] = 0
        model[2].weight[1] = 0
    batches = [images(20), images(3, seed=1), images(7, size=8, seed=2)]
    with quantized(model, batches, "w3a8") as session:
        spoiled = [*batches, images(4) * math.nan]
        done = learn(session, spoiled)
        assert done.changed == ("0", "2")
        assert all(correction.isfinite().all() for correction in corrections(session))
        learned = weight_in_use(session, session.layers[0], lambda: model(batches[0]))
    assert not learned[2].any()


def test_lateness_leaves_the_rest_alone() -> None:
    model, batches = network(), [images()]
    late = "time budget: the time was over before its rounding was learned"
    with quantized(model, batches) as session:
        done = learn(session, batches, is_late=lambda: True)
        assert done.skipped == tuple((layer.name, late) for layer in session.layers)
        assert done.changed == ()
        assert done.note == "AdaRound learned the rounding of 0 of 4 weights."
        assert not session.adjustments


def test_lateness_while_a_layer_is_learned() -> None:
    model, batches, looks = network(), [images()], 0

    def is_late() -> bool:
        nonlocal looks
        looks += 1
        # The first layer asks before it starts and twice while it learns 150 iterations; the second asks once.
        return looks == 5

    steps: list[tuple[int, int]] = []
    with quantized(model, batches) as session:
        settings = AdaRoundSettings(iterations=150)
        done = learn(session, batches, settings, is_late=is_late, advance=lambda *step: steps.append(step))
        assert [layer.quantizer.frozen for layer in session.layers] == [True, False, False, False]
    assert done.changed == ("0",)
    assert [name for name, _ in done.skipped] == ["3", "5", "8"]
    assert {reason.partition(":")[0] for _, reason in done.skipped} == {"time budget"}
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert looks == 5


def test_products_with_a_weight_from_the_right_are_layers_too() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(24, 6)), nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x, self.weight)

    torch.manual_seed(0)
    model, x = Product(), tokens(60, 24)
    with quantized(model, [x], with_spec(3, granularity="per_channel")) as session:
        before = output_error(session, model, x, "weight")
        assert len(learn(session, [x]).changed) == 1
        assert output_error(session, model, x, "weight") < 0.6 * before

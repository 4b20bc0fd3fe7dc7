"""Counterfactuals against slow float64 twins, and against quantizing for real."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_quantdebug import counterfactuals
from lightning_quantdebug.adaround import adaround
from lightning_quantdebug.counterfactuals import TensorSamples, activation_counterfactuals, all_counterfactuals
from lightning_quantdebug.instrument import Instrumentation, batch_runs, instrument
from lightning_quantdebug.noise import sqnr_db
from lightning_quantdebug.quantizer import Quantizer
from lightning_quantdebug.target import Kind, Mode, QuantSpec
from tests import zoo

torch.set_num_threads(1)


def calibrated(x: Tensor, **spec: object) -> Quantizer:
    quantizer = Quantizer("x", Kind.ACTIVATION, QuantSpec(**spec))
    quantizer.observe(x)
    quantizer.set_range()
    return quantizer


def twin(x: np.ndarray, low: np.ndarray, high: np.ndarray, bit_width: int) -> float:
    """SQNR of min-max quantization of rows, each with its range widened to 0, in float64."""
    low, high = np.minimum(low, 0.0)[:, None], np.maximum(high, 0.0)[:, None]
    scale = (high - low) / (2**bit_width - 1)
    zero = np.round(-low / scale)
    quantized = (np.clip(np.round(x / scale) + zero, 0, 2**bit_width - 1) - zero) * scale
    return float(10 * np.log10((x**2).sum() / ((x - quantized) ** 2).sum()))


def test_an_activation_with_other_bits_and_per_channel() -> None:
    x = torch.randn(8, 500, generator=torch.Generator().manual_seed(0)) * (2.0 ** torch.arange(8))[:, None]
    found = activation_counterfactuals(calibrated(x, bit_width=6), x)
    rows = x.double().numpy()
    whole = np.full(8, rows.min()), np.full(8, rows.max())
    assert found["now"] == pytest.approx(twin(rows, np.full(8, float(x.min())), whole[1], 6), abs=0.6)
    assert found["bits_16"] == pytest.approx(twin(rows, *whole, 16), abs=0.01)
    assert found["bits_plus_4"] == pytest.approx(twin(rows, *whole, 10), abs=0.6)
    assert found["per_channel"] == pytest.approx(twin(rows, rows.min(1), rows.max(1), 6), abs=0.01)
    assert found["per_channel"] > found["now"] + 3


RANGES = {"mse", "percentile_99.99", "percentile_99.9", "percentile_99"}
BULK = {"bulk_now", *(f"bulk_{name}" for name in RANGES)}


@pytest.mark.parametrize(
    ("name", "settings"),
    [("mse", {"range_setting": "mse"}), ("percentile_99", {"range_setting": "percentile", "percentile": 99.0})],
)
def test_a_range_setting_is_that_which_calibration_would_give(name: str, settings: dict[str, object]) -> None:
    x = torch.randn(4, 5000, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 100.0
    quantizer = calibrated(x, bit_width=8)
    found = activation_counterfactuals(quantizer, x)
    other = calibrated(x, bit_width=8, **settings)
    assert other.encoding is not None
    other.mode = Mode.QUANTIZE
    assert found[name] == pytest.approx(sqnr_db(x, other(x)))
    assert found[name] != found["now"]
    assert name not in activation_counterfactuals(other, x)
    few = x.abs() <= x.abs().flatten().sort().values[int(0.999 * x.numel()) - 1]
    assert found[f"bulk_{name}"] == pytest.approx(sqnr_db(x[few], other(x)[few]))
    assert found["bulk_percentile_99"] > found["bulk_now"] + 5


def test_what_makes_no_sense_is_left_out() -> None:
    x = torch.rand(1, 100)
    assert set(activation_counterfactuals(calibrated(x, bit_width=16), x)) == {"now", *RANGES, *BULK}
    assert set(activation_counterfactuals(calibrated(x, bit_width=13), x)) == {"now", "bits_16", *RANGES, *BULK}
    fixed = Quantizer("x", Kind.ACTIVATION, QuantSpec(8), fixed_range=(0.0, 1.0))
    fixed.set_range()
    assert set(activation_counterfactuals(fixed, x)) == {"now", "bulk_now", "bits_16", "bits_plus_4"}
    frozen = calibrated(x)
    frozen.freeze()
    assert set(activation_counterfactuals(frozen, x)) == {"now", "bulk_now", "bits_16", "bits_plus_4"}


def counterfactuals_of(q: Instrumentation, model: nn.Module, batch: Tensor) -> dict[str, dict[str, float]]:
    samples = TensorSamples(q)

    def probe_of(name: str):
        return lambda x: (samples.keep(name, x), x)[1]

    with torch.no_grad(), q.modes("observe", kind="activation"):
        for quantizer in q.select(kind=Kind.ACTIVATION):
            quantizer.probe = probe_of(quantizer.name)
        model(batch)
        for quantizer in q.select(kind=Kind.ACTIVATION):
            quantizer.probe = None
    with torch.no_grad():
        return all_counterfactuals(q, samples, lambda: model(batch))


def test_weights_are_seen_folded_and_measured_for_real() -> None:
    model, batch = zoo.make("resnet")
    with instrument(model, batch, "w4a8_per_tensor") as q:
        q.calibrate([batch])
        q.set_mode("bypass")
        found = counterfactuals_of(q, model, batch)
        assert set(found) == set(q.quantizers)
        with torch.no_grad():
            weights = q.effective_weights(lambda: model(batch))
        layer = next(layer for layer in q.layers if layer.fold is not None)
        weight, quantizer = weights[layer.key][0], layer.quantizer
        assert found[quantizer.name]["now"] == pytest.approx(sqnr_db(weight, quantizer.quantized(weight)))
        for name, change in (
            ("bits_16", {"bit_width": 16}),
            ("bits_plus_4", {"bit_width": 8}),
            ("per_channel", {"granularity": "per_channel"}),
            ("percentile_99.9", {"range_setting": "percentile", "percentile": 99.9}),
        ):
            state = q.state()
            quantizer.respecify(replace(quantizer.spec, **change), 0 if name == "per_channel" else None)
            with torch.no_grad():
                q.reset_weight_ranges(lambda: model(batch))
            real = sqnr_db(weight, quantizer.quantized(weight))
            q.restore(state)
            assert found[quantizer.name][name] == pytest.approx(real), name
        assert "mse" not in found[quantizer.name]
        assert "per_group" in found["fc.weight"] or layer.shape[1] % 32


def test_a_learned_rounding_counts_as_it_is() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 8)).eval(), torch.randn(64, 4) @ torch.randn(4, 16)
    with instrument(model, x, "w3a8") as q:
        q.calibrate([x])
        before = counterfactuals_of(q, model, x)["0.weight"]
        assert adaround(q, batch_runs(q, [x])).changed
        after = counterfactuals_of(q, model, x)["0.weight"]
        # Rounding that makes up for itself at the output is further away from the weight than the nearest one.
        assert after["now"] < before["now"]
        assert after["bits_16"] == pytest.approx(before["bits_16"])


def test_recurrent_and_tied_weights_have_counterfactuals() -> None:
    for name in ("lstm", "bert"):
        model, batch = zoo.make(name)
        with instrument(model, batch, "int8") as q:
            q.calibrate([batch])
            q.set_mode("bypass")
            samples = TensorSamples(q)
            run = (lambda: model(**batch)) if isinstance(batch, dict) else (lambda: model(batch))  # noqa: B023
            with torch.no_grad():
                found = all_counterfactuals(q, samples, run)
            assert set(found) == {quantizer.name for quantizer in q.select(kind=Kind.WEIGHT)}
            assert all(values["bits_16"] > values["now"] + 20 for values in found.values())


def test_samples_are_bounded_and_keep_channels_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 2)).eval()
    batch = torch.randn(4, 3, 8, 8)
    with instrument(model, batch) as q:
        q.calibrate([batch])
        samples = TensorSamples(q)
        y = torch.relu(model[0](batch))
        samples.keep("1", y)
        whole = samples.of("1")
        assert torch.equal(whole, y.movedim(1, 0).reshape(4, -1))
        samples.keep("1", y * 0)
        assert samples.of("1") is whole
        monkeypatch.setattr(counterfactuals, "MOST_VALUES", 64)
        few = TensorSamples(q)
        few.keep("1", y)
        assert few.of("1").shape == (4, 16)
        columns = {tuple(column.tolist()) for column in whole.T}
        assert all(tuple(column.tolist()) in columns for column in few.of("1").T)
        assert not torch.equal(few.of("1"), whole[:, :16])
        few.keep("3", torch.tensor(2.0))
        assert few.of("3").tolist() == [[2.0]]
        few.keep("input", torch.ones(3, dtype=torch.long))
        assert few.names == ("1", "3")


def test_a_sample_tells_the_sqnr_of_the_whole() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(32, 32 * 1024, generator=generator).relu()
    quantizer = calibrated(x)
    chosen = x[:, torch.randint(0, x.shape[1], (counterfactuals.MOST_VALUES // 32,), generator=generator)]
    whole, part = (activation_counterfactuals(quantizer, values) for values in (x, chosen))
    for name in ("now", "bits_16", "mse"):
        assert part[name] == pytest.approx(whole[name], abs=1.0 if name == "mse" else 0.2)
    assert math.isfinite(part["per_channel"])

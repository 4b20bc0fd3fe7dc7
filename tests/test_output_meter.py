"""How far outputs move, against slow twins in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quantdebug.batch_scores import BatchScore
from lightning_quantdebug.evaluation import Evaluation
from lightning_quantdebug.instrument import instrument
from lightning_quantdebug.measurement import Measurement, is_guilty, measurement, worst_first
from lightning_quantdebug.output_meter import BatchNoise, NoiseSums, OutputMeter, divergence
from lightning_quantdebug.race import contenders, rounds
from lightning_quantdebug.settings import Direction
from lightning_quantdebug.target import Mode

torch.set_num_threads(1)


def twin(p: np.ndarray, q: np.ndarray) -> float:
    """Divergence of two distributions."""
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def softmax(x: np.ndarray) -> np.ndarray:
    values = np.exp(x - x.max())
    return values / values.sum()


def test_divergence_of_logits_and_of_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, 4, generator=generator) for _ in range(2))
    expected = [twin(softmax(p), softmax(q)) for p, q in zip(a.double().numpy(), b.double().numpy(), strict=True)]
    assert divergence(a, b, 1).tolist() == pytest.approx(expected)
    assert divergence(a.softmax(1), b.softmax(1), 1, True).tolist() == pytest.approx(expected, rel=1e-5)
    assert divergence(a, a, 1).tolist() == [0.0] * 5
    assert divergence(a[0], b[0], 0).tolist() == pytest.approx(expected[:1])


def test_divergence_of_positions_is_their_mean() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 4, 5, generator=generator) for _ in range(2))
    x, y = a.double().numpy(), b.double().numpy()
    by_pixel = [np.mean([twin(softmax(x[n, :, k]), softmax(y[n, :, k])) for k in range(5)]) for n in range(3)]
    by_token = [np.mean([twin(softmax(x[n, k]), softmax(y[n, k])) for k in range(4)]) for n in range(3)]
    assert divergence(a, b, 1).tolist() == pytest.approx(by_pixel)
    assert divergence(a, b, 2).tolist() == pytest.approx(by_token)


def test_a_lost_probability_costs_much_but_not_everything() -> None:
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    assert 30 < float(divergence(p, q, 1, True)) < 60


def metered(
    model: nn.Module, batches: list[Tensor], target: str = "w3a3"
) -> tuple[NoiseSums, list[tuple[Tensor, Tensor]]]:
    sums, pairs = NoiseSums(), []
    with torch.no_grad(), instrument(model.eval(), batches[0], target) as q:
        q.calibrate(batches)
        meter = OutputMeter(q)
        for batch in batches:
            with q.modes(Mode.BYPASS):
                exact = meter.reference(lambda: model(batch))  # noqa: B023  # called at once
            with q.modes(Mode.QUANTIZE):
                moved, noise = meter.compare(lambda: model(batch))  # noqa: B023  # likewise
            sums.add(noise)
            pairs.append((exact, moved))
    return sums, pairs


def test_sums_are_those_of_all_batches_at_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), nn.LogSoftmax(1))
    sums, pairs = metered(model, [torch.randn(n, 6) for n in (8, 5, 8)])
    exact, moved = (torch.cat([pair[index] for pair in pairs]).double() for index in (0, 1))
    signal, noise = float(exact.square().sum()), float((moved - exact).square().sum())
    kl = F.kl_div(moved.log_softmax(1), exact.log_softmax(1), log_target=True, reduction="none").sum(1)
    assert sums.samples == 21
    assert sums.ratio == pytest.approx(noise / signal)
    assert sums.sqnr_db == pytest.approx(10 * math.log10(signal / noise))
    assert sums.mean_kl == pytest.approx(float(kl.mean()), rel=1e-6)
    assert sums.damage == pytest.approx(float(kl.mean()), rel=1e-6)
    assert sums.standard_error == pytest.approx(float(kl.std() / 21**0.5), rel=1e-6)
    assert [samples for _, samples in sums.batches] == [8, 5, 8]
    assert sum(mean * samples for mean, samples in sums.batches) / 21 == pytest.approx(sums.damage)


def test_without_classes_damage_is_the_share_of_noise() -> None:
    torch.manual_seed(0)
    sums, pairs = metered(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), [torch.randn(16, 6)])
    exact, moved = (tensor.double() for tensor in pairs[0])
    assert sums.kl is None
    assert sums.mean_kl is None
    assert sums.damage == pytest.approx(float((moved - exact).square().sum() / exact.square().sum()))
    shares = (moved - exact).square().sum(1) / exact.square().sum() * 16
    assert sums.standard_error == pytest.approx(float(shares.std() / 4))


def test_merged_sums_are_those_of_both() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3), nn.LogSoftmax(1))
    batches = [torch.randn(8, 6) for _ in range(3)]
    whole, pairs = metered(model, batches)
    parts = [NoiseSums() for _ in range(3)]
    with torch.no_grad(), instrument(model, batches[0], "w3a3") as q:
        q.calibrate(batches)
        meter = OutputMeter(q)
        for batch, part in zip(batches, parts, strict=True):
            with q.modes(Mode.BYPASS):
                meter.reference(lambda: model(batch))  # noqa: B023  # called at once
            with q.modes(Mode.QUANTIZE):
                part.add(meter.compare(lambda: model(batch))[1])  # noqa: B023  # likewise
    merged = parts[0].merged(parts[1]).merged(parts[2])
    for name in ("samples", "ratio", "mean_kl", "damage", "standard_error"):
        assert getattr(merged, name) == pytest.approx(getattr(whole, name)), name
    assert NoiseSums().merged(whole) is whole
    assert whole.merged(NoiseSums()) is whole
    assert len(pairs) == 3


class TwoOutputs(nn.Module):
    """The second output is a thousand times greater than the first, and may go missing or change its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)
        self.way = "both"

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        first = self.a(x)
        if self.way == "missing":
            return (first,)
        second = 1000.0 * self.b(x if self.way == "both" else x[:2])
        return first, second


def test_each_output_counts_alike_and_a_lost_one_wholly() -> None:
    torch.manual_seed(0)
    model, x = TwoOutputs().eval(), torch.randn(8, 6)
    with torch.no_grad(), instrument(model, x, "w4a4") as q:
        q.calibrate([x])
        meter = OutputMeter(q)
        with q.modes(Mode.BYPASS):
            exact = meter.reference(lambda: model(x))
        with q.modes(Mode.QUANTIZE):
            moved, noise = meter.compare(lambda: model(x))
        ratios = [float((b - a).square().sum() / a.square().sum()) for a, b in zip(exact, moved, strict=True)]
        sums = NoiseSums()
        sums.add(noise)
        assert sums.ratio == pytest.approx(sum(ratios) / 2, rel=1e-5)
        assert sums.damage == pytest.approx(sum(ratios) / 2, rel=1e-5)
        kept = meter.kept()
        for way in ("missing", "short"):
            model.way = way
            meter.restore(kept)
            with q.modes(Mode.BYPASS):
                _, noise = meter.compare(lambda: model(x))
            assert noise.noise == (0.0, pytest.approx(noise.signal[1]))
            assert noise.samples == 8


def test_exact_lost_and_broken_outputs_have_their_decibels() -> None:
    def sums(signal: float, noise: float) -> NoiseSums:
        found = NoiseSums()
        found.add(BatchNoise(1, (signal,), (noise,), None, (noise,)))
        return found

    assert sums(1.0, 0.0).sqnr_db == math.inf
    assert sums(0.0, 1.0).sqnr_db == -math.inf
    assert math.isnan(sums(1.0, math.nan).sqnr_db)
    assert sums(1.0, 0.1).sqnr_db == pytest.approx(10.0)
    assert sums(1.0, 0.1).standard_error == math.inf
    assert (NoiseSums().damage, NoiseSums().ratio) == (0.0, 0.0)


# The race.


def bar(damage: float, error: float) -> Measurement:
    return Measurement(1.0, 0.0, None, None, 0.0, None, damage, error, 64, False)


def test_a_bar_that_reaches_the_worst_stays_in_the_race() -> None:
    bars = {
        "a": bar(10, 0.1),
        "b": bar(5, 0.1),
        "c": bar(4.5, 0.1),
        "d": bar(4.3, 0.1),
        "e": bar(1, 2.0),
        "f": bar(0, 0),
    }
    assert contenders(bars, most=2) == ["a", "b", "c", "e"]
    assert contenders(bars, most=6) == list(bars)
    assert contenders({}, most=2) == []
    assert contenders({**bars, "g": bar(math.inf, math.nan), "h": bar(0, math.inf)}, most=2) == ["a", "g", "h"]


def test_rounds_grow_and_end_with_everything() -> None:
    assert rounds(1000, 16) == [4, 16, 64, 1000]
    assert rounds(2, 1000) == [2]
    assert rounds(5, 0) == [5]


# What is worth what.


def evaluation(values: list[float]) -> Evaluation:
    batches = tuple(BatchScore(value, 32.0) for value in values)
    return Evaluation(sum(values) / len(values), {}, batches, 32 * len(values), 0.0, len(values))


def noise(damage: float = 0.1) -> NoiseSums:
    found = NoiseSums()
    found.add(BatchNoise(2, (1.0,), (0.01,), None, (damage, damage)))
    return found


def test_guilt_considers_how_many_were_tested() -> None:
    reference = evaluation([0.9] * 8)
    shaky = evaluation([0.88, 0.9, 0.87, 0.9, 0.89, 0.88, 0.9, 0.86])
    one, many = (measurement(reference, shaky, noise(), Direction.MAX, tested, True) for tested in (1, 200))
    assert one.interval == many.interval
    assert one.interval is not None
    assert one.interval[0] > 0
    assert is_guilty(one, permitted=0.01)
    assert many.least_loss is not None
    assert many.least_loss < 0
    assert not is_guilty(many, permitted=0.01)


def test_guilt_needs_a_loss_that_matters() -> None:
    reference, worse = evaluation([0.9] * 8), evaluation([0.896] * 8)
    found = measurement(reference, worse, noise(), Direction.MAX, 100, True)
    assert found.least_loss == pytest.approx(0.004)
    assert is_guilty(found, permitted=0.005)
    assert not is_guilty(found, permitted=0.01)
    better = measurement(reference, evaluation([0.92] * 8), noise(), Direction.MAX, 1, True)
    assert (better.least_loss, is_guilty(better, 0.001)) == (None, False)
    without = Evaluation(0.5, {}, None, 100, 0.0, 4)
    assert not is_guilty(measurement(reference, without, noise(), Direction.MAX, 1, True), 0.01)


def test_a_score_that_is_no_number_is_guilt_and_comes_first() -> None:
    broken = measurement(evaluation([0.9] * 4), evaluation([math.nan] * 4), noise(), Direction.MAX, 1, True)
    assert (broken.score, broken.loss, broken.interval) == (None, None, None)
    assert is_guilty(broken, 1e9)
    found = {"a": bar(1, 0), "b": bar(3, 0), "c": broken, "d": bar(3, 0), "e": bar(math.inf, 0)}
    assert worst_first(found) == ["c", "e", "b", "d", "a"]

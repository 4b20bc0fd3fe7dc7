"""Estimates against exact Jacobians, against brute force, and against the exact table of a trained network."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_quantdebug.errors import EstimateError
from lightning_quantdebug.estimate import Estimate, Estimator, fisher_vector
from lightning_quantdebug.gradient_probes import Probed, batch_axis
from lightning_quantdebug.instrument import Instrumentation, instrument
from lightning_quantdebug.model_loan import call_with
from lightning_quantdebug.network_outputs import Output
from lightning_quantdebug.output_meter import NoiseSums, OutputMeter
from lightning_quantdebug.target import Mode
from tests import zoo
from tests.walks import state_of

torch.set_num_threads(1)


def estimates(
    model: nn.Module, batches: list[Any], target: str = "w4a4", probes: int = 1, run: Callable[..., Any] | None = None
) -> tuple[dict[str, Estimate], dict[str, NoiseSums]]:
    """The estimates, and what each quantizer alone really does on the same batches."""
    step = run or call_with
    with instrument(model, batches[0], target) as q:
        q.calibrate(batches)
        q.set_mode("bypass")
        q.record(lambda: step(model.__dict__["forward"].original, batches[0]), batches[0]) if run else None
        estimator = Estimator(q, probes)
        for batch in batches:
            estimator.observe(lambda: step(model, batch))  # noqa: B023  # called at once
        return estimator.estimates(), truth(q, model, batches)


def truth(q: Instrumentation, model: nn.Module, batches: list[Any]) -> dict[str, NoiseSums]:
    meter, found = OutputMeter(q), {name: NoiseSums() for name in q.quantizers}
    with torch.no_grad():
        for batch in batches:
            q.set_mode("bypass")
            meter.reference(lambda: call_with(model, batch))  # noqa: B023  # called at once
            for name, quantizer in q.quantizers.items():
                quantizer.mode = Mode.QUANTIZE
                found[name].add(meter.compare(lambda: call_with(model, batch))[1])  # noqa: B023  # likewise
                quantizer.mode = Mode.BYPASS
    return found


def spearman(some: list[float], others: list[float]) -> float:
    ranks = [np.argsort(np.argsort(values)) for values in (some, others)]
    return float(np.corrcoef(*ranks)[0, 1])


def test_of_a_linear_network_the_noise_is_exact_up_to_the_probes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).eval()
    found, real = estimates(model, [torch.randn(64, 6)], probes=200)
    assert set(found) == set(real)
    for name, estimate in found.items():
        assert estimate.noise == pytest.approx(real[name].ratio, rel=0.1), name
        assert estimate.samples == 64
        assert estimate.sqnr_db == pytest.approx(-10 * math.log10(estimate.noise))


def test_of_small_errors_the_divergence_is_exact_up_to_the_probes() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), nn.LogSoftmax(1)).eval()
    found, real = estimates(model, [torch.randn(64, 6)], "w8a8", probes=200)
    assert {"1", "0.weight", "2.weight"} <= set(found)
    for name, estimate in found.items():
        if real[name].mean_kl:
            assert estimate.kl == pytest.approx(real[name].mean_kl, rel=0.15), name


def test_inner_products_are_those_of_autograd_sample_by_sample() -> None:
    """One probe, against the gradient of ``<r, y>`` at each tensor, in a network written out by hand."""
    torch.manual_seed(0)
    first, second = nn.Linear(6, 5), nn.Linear(5, 4)
    model, x = nn.Sequential(first, nn.ReLU(), second).eval(), torch.randn(16, 6)
    with instrument(model, x, "w3a3") as q:
        q.calibrate([x])
        q.set_mode("bypass")
        estimator = Estimator(q, probes=1, seed=5)
        estimator.observe(lambda: model(x))
        found = estimator.estimates()
        encodings = {name: quantizer.quantized for name, quantizer in q.quantizers.items()}
    z = F.relu(first(x)).detach().requires_grad_()
    y = second(z)
    r = (
        torch.randn(y.shape, generator=torch.Generator().manual_seed(5))
        / y.detach().double().square().sum().sqrt().float()
    )
    (g,) = torch.autograd.grad(y, z, r)
    expected = {
        "1": (g * (encodings["1"](z.detach()) - z.detach())).sum(1),
        "2.weight": (r * F.linear(z, encodings["2.weight"](second.weight.detach()) - second.weight)).sum(1),
    }
    for name, v in expected.items():
        assert found[name].noise == pytest.approx(float(v.square().sum()), rel=1e-4)


def test_the_first_order_of_the_loss_is_that_of_autograd() -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(6, 5), nn.Linear(5, 3)
    model, x, labels = nn.Sequential(first, nn.ReLU(), second).eval(), torch.randn(16, 6), torch.randint(0, 3, (16,))
    criterion = nn.CrossEntropyLoss()
    for step in (
        lambda net, batch: F.cross_entropy(net(batch), labels),
        lambda net, batch: {"loss": F.cross_entropy(net(batch), labels)},
        lambda net, batch: criterion(net(batch), labels) and None,
    ):
        with instrument(model, x, "w3a3") as q:
            q.calibrate([x])
            q.set_mode("bypass")
            estimator = Estimator(q)
            estimator.observe(lambda: step(model, x))  # noqa: B023  # called at once
            found = estimator.estimates()
            quantized = q.quantizers["1"].quantized
        z = F.relu(first(x)).detach().requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(second(z), labels), z)
        expected = float((g * (quantized(z.detach()) - z.detach())).sum())
        assert found["1"].kl is None
        assert found["1"].task_loss == pytest.approx(expected, rel=1e-4)


def test_without_a_loss_none_is_estimated() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(8, 4)
    found, _ = estimates(model, [x])
    assert {estimate.task_loss for estimate in found.values()} == {None}


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_network_is_estimated_and_left_as_it_was(name: str) -> None:
    model, batch = zoo.make(name)
    state, random_state = state_of(model), torch.get_rng_state()
    with instrument(model, batch, "w8a8") as q:
        q.calibrate([batch])
        q.set_mode("bypass")
        modes = {name: quantizer.mode for name, quantizer in q.quantizers.items()}
        estimator = Estimator(q, probes=32)
        result = estimator.observe(lambda: call_with(model, batch))
        assert result is not None
        found = estimator.estimates()
        assert set(found) == {name for name, quantizer in q.quantizers.items() if quantizer.is_calibrated}
        assert modes == {name: quantizer.mode for name, quantizer in q.quantizers.items()}
        assert all(quantizer.probe is None for quantizer in q.quantizers.values())
        real = truth(q, model, [batch])
    assert state_of(model) == state
    assert torch.equal(torch.get_rng_state(), random_state)
    pairs = [(found[name].noise, real[name].ratio) for name in found if real[name].ratio > 0]
    assert pairs
    # 32 probes on two or three samples: the sum over all quantizers is right to a third.
    assert sum(a for a, _ in pairs) == pytest.approx(sum(b for _, b in pairs), rel=0.35)


class SequenceFirst(nn.Module):
    """Attention over (L, B, E)."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(0, 1)
        return self.head(self.attention(y, y, y)[0].mean(0))


class Windows(nn.Module):
    """Attention within windows: the samples' windows stand one after the other in the batch axis."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        windows = x.reshape(-1, 2, 8)
        scores = F.softmax(self.mix(windows) @ windows.transpose(1, 2), -1)
        return self.head((scores @ windows).reshape(len(x), -1, 8).mean(1))


class Flattened(nn.Module):
    """Loses track of the samples in between."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x)).permute(1, 2, 0).contiguous() * 1.5
        return self.b(torch.tanh(y).permute(2, 0, 1)).mean(1)


@pytest.mark.parametrize("network", [SequenceFirst, Windows, Flattened])
def test_samples_are_told_apart_wherever_they_stand(network: type[nn.Module]) -> None:
    torch.manual_seed(0)
    found, real = estimates(network().eval(), [torch.randn(32, 4, 8)], "w8a8", probes=100)
    assert len(found) >= 5
    for name, estimate in found.items():
        if real[name].ratio > 0:
            assert estimate.noise == pytest.approx(real[name].ratio, rel=0.4), name


def test_batch_axes() -> None:
    assert batch_axis((), 4) is None
    assert batch_axis((7, 4), 4) is None
    assert batch_axis((4, 4, 2), 4) == 0
    assert batch_axis((4, 4, 2, 2), 4, sequence_first=True) == 0
    assert batch_axis((4, 4, 2), 4, sequence_first=True) is None
    assert batch_axis((8, 2), 4, sequence_first=True) is None


def test_places_of_one_quantizer_are_added_before_they_are_squared() -> None:
    probed = Probed({}, sequence_first=False)
    parts = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])]
    assert probed._added("q", parts).tolist() == [4.0, 1.0]
    probed._is_summed.add("q")
    assert probed._added("q", [*parts, torch.tensor([0.5])]).tolist() == [5.5]
    assert batch_axis((0, 3), 4) is None


def test_the_fisher_vector_has_the_covariance_of_the_classes() -> None:
    logits = torch.tensor([[1.0, -0.5, 0.3, 2.0]])
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([fisher_vector(logits, Output(None, "y", 1), generator)[0] for _ in range(20_000)])
    p = logits[0].softmax(0)
    assert torch.allclose(draws.T @ draws / len(draws), torch.diag(p) - torch.outer(p, p), atol=0.01)
    draws = torch.stack([fisher_vector(p[None], Output(None, "y", 1, True), generator)[0] for _ in range(20_000)])
    assert torch.allclose(draws.T @ draws / len(draws), torch.diag(1 / p), rtol=0.05, atol=0.3)


def test_a_network_that_forbids_gradients_is_refused() -> None:
    class Forbids(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return self.layer(x)

    model, x = Forbids().eval(), torch.randn(4, 4)
    with instrument(model, x) as q:
        q.calibrate([x])
        q.set_mode("bypass")
        estimator = Estimator(q)
        with pytest.raises(EstimateError, match="has no gradient"):
            estimator.observe(lambda: model(x))
        with pytest.raises(EstimateError, match="before a batch was looked at"):
            estimator.estimates()
    assert model.layer.weight.requires_grad


def test_an_exception_leaves_gradients_modes_and_probes_as_they_were() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), torch.randn(4, 4)
    model[0].bias.requires_grad_(False)
    with instrument(model, x) as q:
        q.calibrate([x])
        q.set_mode("bypass")

        def run() -> Any:
            model(x)
            if torch.is_grad_enabled():
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Estimator(q).observe(run)
        assert {quantizer.mode for quantizer in q.quantizers.values()} == {Mode.BYPASS}
        assert all(quantizer.probe is None for quantizer in q.quantizers.values())
    assert model[0].weight.requires_grad
    assert not model[0].bias.requires_grad
    assert model[0].weight.grad is None


@pytest.fixture(scope="module")
def digits_network() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    y = torch.tensor(data.target)
    layers: list[nn.Module] = []
    channels = 1
    for width in (16, 16, 24, 24, 32):
        layers += [*zoo.conv_bn(channels, width, 3), nn.ReLU(), *zoo.conv_bn(width, width, 3, groups=width), nn.ReLU()]
        channels = width
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for _ in range(3):
        for chosen in torch.randperm(1400).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[chosen]), y[chosen]).backward()
            optimizer.step()
    return net.eval(), x, y


@pytest.mark.parametrize(("target", "least"), [("int8", 0.97), ("w4a4", 0.95)])
def test_the_order_is_that_of_the_exact_table(digits_network: Any, target: str, least: float) -> None:
    net, x, _ = digits_network
    batches = list(x[1400:1528].split(64))

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.act = nn.LogSoftmax(1)

        def forward(self, batch: Tensor) -> Tensor:
            return self.act(self.net(batch))

    found, real = estimates(Classifier().eval(), batches, target, probes=4)
    names = [name for name in found if real[name].ratio > 0]
    assert len(names) >= 20
    assert spearman([found[n].noise for n in names], [real[n].ratio for n in names]) >= least
    kls = [(found[n].kl, real[n].mean_kl) for n in names]
    assert spearman([a for a, _ in kls], [b for _, b in kls]) >= least
    worst = sorted(names, key=lambda n: -real[n].damage)[:5]
    assert set(worst) <= set(sorted(names, key=lambda n: -found[n].kl)[:10])

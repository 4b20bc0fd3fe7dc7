"""Quantizers that are right pass at every grid; each fault is told."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from lightning_quantdebug.encoding import encoding_from_range
from lightning_quantdebug.grid_check import grid_fault, noisy_activations
from lightning_quantdebug.instrument import Instrumentation
from lightning_quantdebug.quantizer import Quantizer
from lightning_quantdebug.target import Granularity, Kind, Mode, QuantSpec, QuantTarget
from tests import faulty_quantizers as faulty
from tests import zoo

SPECS = [
    (QuantSpec(bits, symmetric=symmetric, granularity=granularity, group_size=size), axis)
    for bits in (*range(2, 17), 32)
    for symmetric in (True, False)
    for granularity, size, axis in (
        (Granularity.PER_TENSOR, None, None),
        (Granularity.PER_CHANNEL, None, 0),
        (Granularity.PER_CHANNEL, None, 1),
        (Granularity.PER_GROUP, 16, 0),
    )
]


def quantizer(factory: Any, spec: QuantSpec, axis: int | None = None) -> Quantizer:
    return Quantizer("conv.weight", Kind.WEIGHT, spec, axis, factory=factory)


@pytest.mark.parametrize(("spec", "axis"), SPECS)
def test_ours_passes_on_every_grid(spec: QuantSpec, axis: int | None) -> None:
    assert grid_fault(quantizer(None, spec, axis)) is None


@pytest.mark.parametrize(("spec", "axis"), [(spec, axis) for spec, axis in SPECS if spec.group_size is None])
def test_a_correct_class_of_the_users_passes_on_every_grid(spec: QuantSpec, axis: int | None) -> None:
    if spec.bit_width < 32:
        assert grid_fault(quantizer(faulty.Correct, spec, axis)) is None


def test_a_narrow_range_is_no_fault() -> None:
    assert grid_fault(quantizer(faulty.Correct, QuantSpec(4, symmetric=True, narrow_range=True))) is None


@pytest.mark.parametrize("bits", [2, 4, 8, 12, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (
            faulty.Flooring,
            r"is off by up to (1|0\.9\d*) steps inside its range, where rounding to nearest is off by 0.5",
        ),
        (faulty.HalfAStepOff, r"is off by up to (1|0\.9\d*) steps inside its range"),
        (faulty.LosingZero, r"turns 0 into [0-9.e-]+: zero must stay zero"),
        (faulty.NotClipping, r"does not clip to its range \[-[0-9.]+, [0-9.]+\]: it turns -[0-9.]+ into -[0-9.]+"),
        (faulty.Flattening, r"does not return what it must: The custom quantizer of 'conv.weight'"),
        (faulty.Doubling, r"must return a tensor of torch.float32"),
    ],
)
def test_each_fault_is_told(factory: Any, words: str, bits: int, symmetric: bool) -> None:
    fault = grid_fault(quantizer(factory, QuantSpec(bits, symmetric=symmetric, granularity=Granularity.PER_CHANNEL), 0))
    assert fault is not None
    assert re.search(words, fault)


@pytest.mark.parametrize("axis", [0, 1])
def test_channels_that_are_mixed_up_are_told(axis: int) -> None:
    spec = QuantSpec(8, symmetric=True, granularity=Granularity.PER_CHANNEL)
    assert "steps inside its range" in str(grid_fault(quantizer(faulty.OneScaleForAll, spec, axis)))
    assert grid_fault(quantizer(faulty.OneScaleForAll, QuantSpec(8, symmetric=True))) is None


def test_the_quantizer_itself_is_not_touched() -> None:
    checked = quantizer(None, QuantSpec(8))
    checked.encoding = encoding_from_range(torch.tensor(-1.0), torch.tensor(1.0), QuantSpec(8))
    version = checked.version
    assert grid_fault(checked) is None
    assert (checked.version, checked.mode, checked.observer.count) == (version, Mode.BYPASS, 0)


def test_float_noise_is_float_noise_and_is_given_back() -> None:
    network, batch = zoo.make("mobilenet")
    session = Instrumentation(network, QuantTarget())
    session.record(lambda: network(batch), batch)
    session.place()
    with session.observing():
        session.run(lambda: network(batch))
    encodings = {name: quantizer.encoding for name, quantizer in session.quantizers.items()}
    plain = network(batch)
    seen = []
    for _ in range(2):
        with noisy_activations(session), session.modes(Mode.QUANTIZE, kind=Kind.ACTIVATION):
            seen.append(session.run(lambda: network(batch)))
    assert torch.equal(*seen)
    assert 0 < (seen[0] - plain).norm() / plain.norm() < 1e-5
    with pytest.raises(KeyboardInterrupt), noisy_activations(session):
        raise KeyboardInterrupt
    for name, quantizer in session.quantizers.items():
        assert quantizer.factory is None
        assert quantizer.bit_width == 8
        assert quantizer.encoding is encodings[name]
    with session.modes(Mode.QUANTIZE):
        assert (session.run(lambda: network(batch)) - plain).norm() / plain.norm() > 1e-4

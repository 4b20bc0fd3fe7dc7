"""Positions of layers: reservoirs, what is kept under a memory limit, what is held out to judge by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_quantdebug.layer_patches import Geometry
from lightning_quantdebug.layer_samples import LayerSampler, Reservoir

torch.set_num_threads(1)


def test_a_reservoir_keeps_everything_that_fits() -> None:
    reservoir = Reservoir(7, torch.Generator().manual_seed(0))
    assert [tensor.tolist() for tensor in reservoir.choose(4)] == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert [tensor.tolist() for tensor in reservoir.choose(3)] == [[0, 1, 2], [4, 5, 6]]
    assert reservoir.size == 7
    assert [tensor.tolist() for tensor in reservoir.choose(0)] == [[], []]


def kept_by(batches: list[int], capacity: int, seed: int) -> list[int]:
    """The numbers of the stream's positions that a reservoir keeps."""
    reservoir, places, first = Reservoir(capacity, torch.Generator().manual_seed(seed)), [-1] * capacity, 0
    for count in batches:
        for chosen, place in zip(*(tensor.tolist() for tensor in reservoir.choose(count)), strict=True):
            assert 0 <= chosen < count
            places[place] = first + chosen
        first += count
    assert reservoir.size == min(first, capacity)
    return places


def test_a_reservoir_keeps_the_lowest_random_numbers_of_the_stream() -> None:
    for batches in ([30], [10, 10, 10], [3, 27], [29, 1]):
        generator = torch.Generator().manual_seed(5)
        numbers = torch.cat([torch.rand(count, generator=generator, dtype=torch.float64) for count in batches])
        assert sorted(kept_by(batches, 8, seed=5)) == sorted(numbers.argsort()[:8].tolist())


def test_every_position_of_the_stream_has_the_same_chance() -> None:
    counts = np.zeros(20)
    for seed in range(2000):
        for position in kept_by([3, 10, 7], 5, seed):
            counts[position] += 1
    # Each of 20 is kept with probability 1/4: 500 times, with a standard deviation of 19.
    assert abs(counts - 500).max() < 4 * 19


def batches_of(count: int, size: int, places: int = 4) -> list[Tensor]:
    """Inputs whose two channels tell the number of the sample and of the place."""
    numbers = torch.arange(count * size, dtype=torch.float32).reshape(count, size, 1, 1).expand(-1, -1, 1, places)
    return list(torch.cat([numbers, torch.arange(float(places)).expand(count, size, 1, -1)], 2))


def sampled(batches: list[Tensor], memory_limit: int = 1 << 20, seed: int = 0, most: int = 10**6) -> Any:
    """What is sampled of a layer that takes each place as it is."""
    sampler = LayerSampler(memory_limit, seed, most)
    for x in batches:
        sampler.add(x, 10 * x[:, :1] + x[:, 1:], Geometry((1,), (1,), (0,), (1,)))
    return sampler.samples


def test_all_positions_are_taken_where_they_fit_and_each_fifth_sample_is_held_out() -> None:
    for count, size in ((3, 4), (12, 1), (1, 12)):
        training, held_out = sampled(batches_of(count, size))
        assert sorted(held_out.x[:, 0].tolist()) == [[n, place] for n in (1, 6, 11) for place in range(4)]
        assert len(training) == 4 * 9
        assert not {n for n, _ in training.x[:, 0].tolist()} & {1, 6, 11}
        for part in (training, held_out):
            assert torch.equal(part.y[:, 0, 0], 10 * part.x[:, 0, 0] + part.x[:, 0, 1])
            assert part.x.dtype is part.y.dtype is torch.float32


def test_a_single_sample_is_split_by_positions() -> None:
    training, held_out = sampled(batches_of(1, 1, 10))
    assert [len(training), len(held_out)] == [8, 2]
    assert sorted(torch.cat([training.x, held_out.x])[:, 0, 1].tolist()) == list(range(10))


def test_too_little_to_learn_from_and_to_judge_by() -> None:
    assert sampled([]) is None
    assert sampled([torch.zeros(0, 2, 4)]) is None
    assert sampled(batches_of(1, 1, 1)) is None
    assert sampled(batches_of(1, 2, 1)) is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_positions_that_are_not_finite_are_left_out(value: float) -> None:
    batches = [x.clone() for x in batches_of(2, 10)]
    batches[0][3, 1, 2] = value  # one input of one position to learn from
    training, held_out = sampled(batches)
    assert [len(training), len(held_out)] == [4 * 16 - 1, 4 * 4]
    batches[1][:, 0] = value
    training, held_out = sampled(batches)
    assert [len(training), len(held_out)] == [4 * 8 - 1, 4 * 2]
    assert sampled([torch.full((4, 2, 3), value)]) is None
    sampler = LayerSampler(1 << 20, 0, 100)
    sampler.add(torch.zeros(5, 3), torch.tensor([0.0, 1.0, value, 3.0, 4.0])[:, None], Geometry())
    assert sampler.samples is not None
    assert sampler.samples[0].y.flatten().tolist() == [0.0, 3.0, 4.0]


def test_memory_is_bounded_and_more_batches_replace_earlier_positions() -> None:
    position = 4 * 3
    training, held_out = sampled(batches_of(50, 20), memory_limit=500 * position)
    assert [len(training), len(held_out)] == [400, 100]
    assert len({tuple(row) for row in training.x[:, 0].tolist()}) == 400
    assert torch.equal(training.y[:, 0, 0], 10 * training.x[:, 0, 0] + training.x[:, 0, 1])
    assert training.x[:, 0, 0].mean().item() == pytest.approx(500, abs=4 * 289 / 20)
    training, held_out = sampled(batches_of(50, 20), memory_limit=1)
    assert [len(training), len(held_out)] == [8, 2]
    training, held_out = sampled(batches_of(50, 20), most=40)
    assert [len(training), len(held_out)] == [40, 10]


def test_the_seed_decides_and_torchs_own_random_numbers_are_left_alone() -> None:
    before = torch.get_rng_state()
    one, two, other = (sampled(batches_of(9, 9), 900, seed)[0].x for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_patches_of_one_batch_in_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = sampled(batches_of(2, 30), 3000)
    monkeypatch.setattr("lightning_quantdebug.layer_samples._CHUNK", 7)
    parts = sampled(batches_of(2, 30), 3000)
    assert all(torch.equal(a.x, b.x) and torch.equal(a.y, b.y) for a, b in zip(whole, parts, strict=True))


def test_inference_tensors_give_plain_samples() -> None:
    with torch.inference_mode():
        training, _ = sampled(batches_of(2, 4))
    assert not training.x.is_inference()
    assert not training.y.is_inference()


def test_half_precision_is_sampled_as_float32() -> None:
    sampler = LayerSampler(1 << 20, 0, 100)
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    sampler.add(x, F.linear(x, torch.ones(2, 3, dtype=torch.bfloat16)), Geometry())
    assert sampler.samples is not None
    assert sampler.samples[0].x.dtype is sampler.samples[0].y.dtype is torch.float32

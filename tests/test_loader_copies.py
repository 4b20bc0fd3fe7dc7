from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, SequentialSampler

from lightning_quantdebug.errors import SettingsError
from lightning_quantdebug.loader_copies import check_limit, copy_loader, limited, seeded_generators


class Stateful(Sampler[int]):
    """A sampler that goes on where it stopped."""

    def __init__(self, inner: Sampler[int]) -> None:
        self.sampler = inner
        self.epoch = 0

    def __iter__(self) -> Any:
        self.epoch += 1
        return iter(self.sampler)

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type] # those that are given here have a length


def test_a_copy_shares_nothing_that_moves() -> None:
    loader = DataLoader(range(6), batch_size=2, num_workers=1, persistent_workers=True)
    next(iter(loader))
    running = loader._iterator
    copied = copy_loader(loader)
    assert not copied.persistent_workers
    assert [batch.tolist() for batch in copied] == [[0, 1], [2, 3], [4, 5]]
    assert loader._iterator is running
    assert loader.persistent_workers
    running._shutdown_workers()


def test_samplers_are_copied_once_and_deeply() -> None:
    sampler = Stateful(SequentialSampler(range(6)))
    loader = DataLoader(range(6), batch_sampler=BatchSampler(sampler, 3, drop_last=False))
    copied = copy_loader(loader)
    list(copied)
    assert sampler.epoch == 0
    assert copied.batch_sampler is not loader.batch_sampler
    assert copied.batch_sampler.sampler.epoch == 1
    assert copied.batch_sampler.sampler.sampler is not sampler.sampler
    plain = copy_loader(DataLoader(range(6), sampler=sampler))
    assert plain.sampler is plain.batch_sampler.sampler


def test_lists_as_samplers_and_other_iterables() -> None:
    batches = [[0, 1], [4]]
    assert [batch.tolist() for batch in copy_loader(DataLoader(range(6), batch_sampler=batches))] == batches
    assert copy_loader(batches) is batches
    unsized = DataLoader(torch.utils.data.ChainDataset([]))
    assert list(copy_loader(unsized)) == []


@pytest.mark.parametrize("place", ["loader", "sampler"])
def test_generators_are_seeded_and_given_back(place: str) -> None:
    generator = torch.Generator().manual_seed(1)
    if place == "loader":
        loader = DataLoader(range(20), shuffle=True, generator=generator)
    else:
        loader = DataLoader(range(20), sampler=Stateful(RandomSampler(range(20), generator=generator)))
    state = generator.get_state()

    def order(seed: int) -> list[int]:
        with seeded_generators([copy_loader(loader), copy_loader(loader)], seed):
            return [int(batch) for batch in copy_loader(loader)]

    first = order(3)
    assert torch.equal(generator.get_state(), state)
    list(loader)
    assert order(3) == first != order(4)


def fail_inside(loader: Any) -> None:
    with seeded_generators([loader], 0):
        torch.rand(1, generator=loader.generator)
        raise KeyboardInterrupt


def test_generators_come_back_after_an_exception() -> None:
    loader = DataLoader(range(4), shuffle=True, generator=torch.Generator().manual_seed(1))
    state = loader.generator.get_state()
    with pytest.raises(KeyboardInterrupt):
        fail_inside(loader)
    assert torch.equal(loader.generator.get_state(), state)


@pytest.mark.parametrize("value", [1, 7, 0.1, 1.0])
def test_limits_that_are_accepted(value: float) -> None:
    check_limit("limit", value)


@pytest.mark.parametrize("value", [0, -1, 0.0, 1.1, True, "3", None, float("nan")])
def test_limits_that_are_refused(value: object) -> None:
    with pytest.raises(SettingsError, match=r"`limit` must be a number of batches .*\(float in \(0, 1\]\), got"):
        check_limit("limit", value)


@pytest.mark.parametrize(
    ("batches", "limit", "left"),
    [(10, 1.0, 10), (10, 0.55, 5), (3, 0.1, 1), (0, 0.5, 0), (10, 20, 10), (float("inf"), 4, 4)],
)
def test_what_limits_leave(batches: float, limit: float, left: float) -> None:
    assert limited(batches, limit) == left


def test_share_of_an_unknown_number() -> None:
    assert limited(float("inf"), 1.0) == float("inf")
    with pytest.raises(SettingsError, match=r"A share of 0.5 .* does not know its length. Give a number"):
        limited(float("inf"), 0.5)

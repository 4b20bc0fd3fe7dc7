"""Sets of channels against a plain union-find over Python numbers."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from torch import Tensor

from lightning_quantdebug.channel_classes import PINNED, ZERO, ChannelClasses, compact, expanded, pinned

torch.set_num_threads(1)


class Twin:
    """Disjoint sets as a list of sets."""

    def __init__(self, count: int) -> None:
        self.sets = [{number} for number in range(1, count)]

    def unify(self, one: int, other: int) -> None:
        if ZERO in (one, other):
            return
        joined = [each for each in self.sets if one in each or other in each]
        self.sets = [each for each in self.sets if each not in joined] + [set().union(*joined)]

    def labels(self, count: int) -> list[int]:
        return [0, *(min(next(each for each in self.sets if number in each)) for number in range(1, count))]


@pytest.mark.parametrize("seed", range(8))
def test_sets_are_those_of_a_plain_union_find(seed: int) -> None:
    rng = random.Random(seed)
    classes = ChannelClasses()
    classes.fresh(30)
    twin = Twin(32)
    for _ in range(rng.randint(1, 5)):
        one = [rng.choice([ZERO, PINNED, *range(2, 32)]) for _ in range(6)]
        other = [rng.choice([ZERO, *range(2, 32)]) for _ in range(6)]
        classes.unify(torch.tensor(one).view(2, 3), torch.tensor(other).view(2, 3))
        for a, b in zip(one, other, strict=True):
            twin.unify(a, b)
    assert classes.labels.tolist() == twin.labels(32)


def test_a_chain_of_pairs_becomes_one_set() -> None:
    classes = ChannelClasses()
    numbers = classes.fresh(100)
    order = torch.randperm(99, generator=torch.Generator().manual_seed(0))
    classes.unify(numbers[:-1][order], numbers[1:][order])
    assert classes.labels[numbers].unique().tolist() == [2]


@pytest.mark.parametrize("axes", [(), (0,), (1,), (0, 2), (-1,), (0, 1, 2)])
def test_merging_joins_what_differs_along_the_axes_alone(axes: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(len(axes))
    classes = ChannelClasses()
    classes.fresh(40)
    values = torch.randint(0, 42, (2, 3, 4), generator=generator)
    twin = Twin(42)
    kept = [axis for axis in range(3) if axis not in {axis % 3 for axis in axes}]
    for one, other in itertools.combinations(itertools.product(range(2), range(3), range(4)), 2):
        if all(one[axis] == other[axis] for axis in kept):
            twin.unify(int(values[one]), int(values[other]))
    merged = classes.merged(values, axes)
    assert classes.labels.tolist() == twin.labels(42)
    assert merged.shape == tuple(values.shape[axis] if axis in kept else 1 for axis in range(3))
    # Where anything but zeros was merged, what stands for it is of the set that it was merged into.
    labels = classes.labels[values]
    wanted = labels.amax(tuple({axis % 3 for axis in axes}), keepdim=True) if axes else labels
    assert torch.equal(classes.labels[merged], wanted)


def test_merging_without_memory_joins_as_well() -> None:
    classes = ChannelClasses()
    vector = classes.fresh(3)
    merged = classes.merged(expanded(vector, 1, torch.Size([5, 3, 2])), (1, 2))
    assert classes.labels[vector].unique().numel() == 1
    assert merged.shape == (5, 1, 1)


def test_zero_fits_every_set_and_joins_none() -> None:
    classes = ChannelClasses()
    a, b = classes.fresh(2)
    classes.unify(torch.stack([a, torch.tensor(ZERO)]), torch.stack([torch.tensor(ZERO), b]))
    assert classes.labels.tolist() == [0, 1, 2, 3]
    assert classes.is_pinned(torch.tensor([ZERO, PINNED]))
    assert not classes.is_pinned(a)


def test_pinning_fixes_the_whole_set_and_says_why_first() -> None:
    classes = ChannelClasses()
    numbers = classes.fresh(4)
    classes.unify(numbers[:1], numbers[1:2])
    classes.pin(numbers[1], "one")
    classes.pin(numbers[:3], "two")
    assert classes.labels.tolist() == [0, 1, 1, 1, 1, 5]
    assert [classes.reason(number[None]) for number in numbers] == ["one", "one", "two", ""]


def test_meeting_something_pinned_pins_and_says_why() -> None:
    classes = ChannelClasses()
    numbers = classes.fresh(3)
    classes.unify(numbers[:1], numbers[1:2])
    classes.unify(numbers[1:2], torch.tensor([PINNED]), "joined")
    classes.unify(numbers[2:], numbers[:1])
    assert classes.is_pinned(numbers)
    assert classes.reason(numbers[:1]) == classes.reason(numbers[1:2]) == "joined"
    assert classes.reason(numbers[2:]) == "meets a tensor whose scale can not change"


def test_pinning_everything_leaves_later_numbers_free() -> None:
    classes = ChannelClasses()
    before = classes.fresh(2)
    classes.pin_all("all")
    after = classes.fresh(2)
    assert classes.is_pinned(before)
    assert not classes.is_pinned(after)
    assert classes.labels[ZERO] == ZERO


def test_marks_belong_to_sets_also_when_they_are_joined_later() -> None:
    classes = ChannelClasses()
    numbers = classes.fresh(3)
    classes.mark(numbers[:1], "border")
    classes.unify(numbers[:1], numbers[1:2])
    assert classes.marks(numbers) == ["border", "border", ""]
    classes.mark(numbers, "second")
    assert classes.marks(numbers.flip(0)) == ["second", "border", "border"]


def test_whether_numbers_vary_is_about_sets() -> None:
    classes = ChannelClasses()
    numbers = classes.fresh(4).view(2, 2)
    classes.unify(numbers[:, 0], numbers[:, 1])
    assert not classes.varies(numbers, 1)
    assert classes.varies(numbers, 0)
    assert not classes.same(numbers, torch.full((2, 2), ZERO))


@pytest.mark.parametrize("shape", [(2, 3, 4), (0, 3), (), (1, 3)])
def test_compact_numbers_are_the_same_in_less_memory(shape: tuple[int, ...]) -> None:
    values = torch.arange(3).expand(*shape[:-1], 3).clone() if shape[-1:] == (3,) else pinned(torch.Size(shape)).clone()
    small = compact(values)
    assert torch.equal(small, values)
    assert all(stride == 0 for stride, size in zip(small.stride()[:-1], shape[:-1], strict=True) if size > 1)


def test_compact_keeps_axes_that_vary_together() -> None:
    values: Tensor = torch.eye(3, dtype=torch.int64)
    assert torch.equal(compact(values), values)


def test_a_vector_is_laid_along_any_axis() -> None:
    numbers = expanded(torch.tensor([5, 6]), -1, torch.Size([3, 2]))
    assert numbers.tolist() == [[5, 6]] * 3
    assert expanded(torch.tensor([5, 6]), 0, torch.Size([2, 3])).tolist() == [[5] * 3, [6] * 3]

"""Which channels must share one scale: sets of channels that grow together while a network runs.

Every output channel of every layer has a number. Beside each tensor of a run lies a tensor of the same shape with the
number of the channel that each element belongs to, made by ``expand``, so that it costs no memory until the network
mixes its axes. Two numbers that meet, as the summands of an addition do, must share one scale: their sets are joined.
A set that meets anything whose scale can not change is joined with the pinned one.

Two numbers are special: :data:`ZERO` marks elements that are exactly zero, such as padding, which fit every scale;
:data:`PINNED` marks elements whose scale is 1 for ever.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

ZERO = 0
PINNED = 1
_JOINED = "meets a tensor whose scale can not change"


class ChannelClasses:
    """Disjoint sets of channels.

    Attributes:
        labels: For each number the least number of its set, ``(count,)``; that of everything pinned is ``PINNED``.
    """

    def __init__(self) -> None:
        """Start with the two special numbers."""
        self.labels = torch.tensor([ZERO, PINNED])
        self._reasons = torch.zeros(2, dtype=torch.int64)
        self._marks = torch.zeros(2, dtype=torch.int64)
        self._texts: list[str] = [""]

    def fresh(self, count: int) -> Tensor:
        """New numbers, each a set of its own, ``(count,)``."""
        start = len(self.labels)
        new = torch.arange(start, start + count)
        self.labels = torch.cat([self.labels, new])
        self._reasons = torch.cat([self._reasons, torch.zeros(count, dtype=torch.int64)])
        self._marks = torch.cat([self._marks, torch.zeros(count, dtype=torch.int64)])
        return new

    def unify(self, one: Tensor, other: Tensor, reason: str = "") -> None:
        """Join the sets of elements that stand at the same place.

        Args:
            one: Numbers, any shape.
            other: Numbers, of the same shape.
            reason: Why a set would be pinned by this, for reports.
        """
        one, other = _without_repetition(one, other)
        known = (one != ZERO) & (other != ZERO)
        pairs = torch.stack([self.labels[one[known]], self.labels[other[known]]])
        pairs = pairs[:, pairs[0] != pairs[1]]
        if pairs.numel() == 0:
            return
        before = self.labels
        count = len(self.labels)
        once = each_once(pairs.amin(0) * count + pairs.amax(0))
        pairs = torch.stack([once // count, once % count])
        # Least labels spread until both sides of every pair have the same; each round joins at least one more pair.
        while pairs.numel():
            low, high = pairs.amin(0), pairs.amax(0)
            self.labels = self.labels.scatter_reduce(0, high, low, "amin")
            self._shorten()
            pairs = self.labels[pairs]
            pairs = pairs[:, pairs[0] != pairs[1]]
        newly = before[(self.labels == PINNED) & (before != PINNED)]
        self._explain(newly, self._reasons, reason or _JOINED, before)

    def pin(self, numbers: Tensor, reason: str) -> None:
        """Fix the scale of the sets of some numbers at 1."""
        found = self._sets_of(numbers)
        if found.numel() == 0:
            return
        self._explain(found, self._reasons, reason)
        self.labels[torch.isin(self.labels, found)] = PINNED

    def pin_all(self, reason: str) -> None:
        """Fix the scale of every set that there is."""
        self.pin(self.labels, reason)

    def mark(self, numbers: Tensor, reason: str) -> None:
        """Note of the sets of some numbers that a constant can not be taken out of them, and why."""
        self._explain(self._sets_of(numbers), self._marks, reason)

    def is_pinned(self, numbers: Tensor) -> bool:
        """Whether no element's scale can change."""
        return bool((self.labels[_once(numbers)] <= PINNED).all())

    def same(self, one: Tensor, other: Tensor) -> bool:
        """Whether elements at the same place are in the same set; zero is the same as zero only."""
        one, other = _without_repetition(one, other)
        return bool((self.labels[one] == self.labels[other]).all())

    def merged(self, numbers: Tensor, axes: Iterable[int], reason: str = "") -> Tensor:
        """Join the sets of elements that differ in their place along ``axes`` alone.

        Args:
            numbers: Any shape.
            axes: The axes along which there must be one scale.
            reason: Why a set would be pinned by this.

        Returns:
            The numbers with those axes of size 1.
        """
        axes = tuple(axis % numbers.ndim for axis in axes) if numbers.ndim else ()
        if not axes or numbers.numel() == 0:
            return numbers
        # The largest number is that of an element which is not exactly zero, if there is one.
        first = _cut((numbers,))[0].amax(axes, keepdim=True)
        self.unify(first.expand_as(numbers), numbers, reason)
        return first.expand([1 if axis in axes else size for axis, size in enumerate(numbers.shape)])

    def varies(self, numbers: Tensor, axis: int) -> bool:
        """Whether elements that differ in their place along ``axis`` alone are in different sets."""
        return not self.same(numbers.narrow(axis, 0, 1).expand_as(numbers), numbers)

    def reason(self, numbers: Tensor) -> str:
        """Why the first of some numbers that is pinned is; empty if none is or nothing was said."""
        found = self._reasons[numbers[self.labels[numbers] == PINNED]]
        found = found[found > 0]
        return self._texts[int(found[0])] if found.numel() else ""

    def marks(self, numbers: Tensor) -> list[str]:
        """For each of some numbers, ``(C,)``, why no constant can be taken out of its set; empty where one can."""
        never = len(self._texts)
        noted = torch.where(self._marks > 0, self._marks, never)
        first = torch.full_like(noted, never).scatter_reduce_(0, self.labels, noted, "amin")
        texts = [*self._texts, ""]
        return [texts[code] for code in first[self.labels[numbers]].tolist()]

    def _explain(self, sets: Tensor, codes: Tensor, reason: str, labels: Tensor | None = None) -> None:
        """Note a text for every number of some sets, by the present or by given labels, that has none yet."""
        if sets.numel() == 0:
            return
        if reason not in self._texts:
            self._texts.append(reason)
        members = torch.isin(self.labels if labels is None else labels, sets) & (codes == 0)
        codes[members] = self._texts.index(reason)

    def _sets_of(self, numbers: Tensor) -> Tensor:
        """The labels of the sets of some numbers that can still be scaled, each once."""
        found = each_once(self.labels[_once(numbers)])
        return found[found > PINNED]

    def _shorten(self) -> None:
        """Let every number point at the least one of its set."""
        while True:
            shorter = self.labels[self.labels]
            if torch.equal(shorter, self.labels):
                return
            self.labels = shorter


def each_once(labels: Tensor) -> Tensor:
    """The different values of a tensor in ascending order, ``(count,)``.

    Examples:
        >>> each_once(torch.tensor([3, 1, 3]))
        tensor([1, 3])
    """
    found: Tensor = torch.unique(labels)
    return found


def expanded(vector: Tensor, axis: int, shape: torch.Size) -> Tensor:
    """A vector laid along one axis of a tensor of numbers, ``(C,)`` to ``shape``, in no memory of its own.

    Examples:
        >>> numbers = expanded(torch.tensor([2, 3]), 1, torch.Size([8, 2, 32, 32]))
        >>> numbers.shape, numbers.stride()
        (torch.Size([8, 2, 32, 32]), (0, 1, 0, 0))
    """
    axis = axis % len(shape)
    return vector.view(*(1,) * axis, -1, *(1,) * (len(shape) - axis - 1)).expand(shape)


def pinned(shape: torch.Size) -> Tensor:
    """The numbers of a tensor whose scale can not change.

    Examples:
        >>> pinned(torch.Size([2, 2]))
        tensor([[1, 1],
                [1, 1]])
    """
    return torch.tensor(PINNED).expand(shape)


def compact(numbers: Tensor) -> Tensor:
    """The same numbers, in no memory along the axes along which they are all alike.

    Examples:
        >>> compact(torch.tensor([[2, 3], [2, 3]])).stride()
        (0, 1)
    """
    if numbers.numel() == 0:
        return numbers
    kept = numbers
    for axis in range(numbers.ndim):
        first = kept.narrow(axis, 0, 1)
        if numbers.stride(axis) == 0 or bool((kept == first).all()):
            kept = first
    return kept.expand(numbers.shape)


def _without_repetition(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors, flat, without places that only repeat others."""
    a, b = _cut((one, other))
    return a.reshape(-1), b.reshape(-1)


def _once(numbers: Tensor) -> Tensor:
    """A tensor, flat, without places that only repeat others."""
    return _cut((numbers,))[0].reshape(-1)


def _cut(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Tensors of one shape, cut to size 1 along the axes along which none has memory."""
    for axis in range(tensors[0].ndim):
        if tensors[0].shape[axis] > 1 and all(tensor.stride(axis) == 0 for tensor in tensors):
            tensors = tuple(tensor.narrow(axis, 0, 1) for tensor in tensors)
    return tensors

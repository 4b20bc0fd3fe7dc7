"""Positions of a layer drawn over batches, with bounded memory: some to learn from, others to judge by.

Neighbouring positions of a feature map share most of their patch, so that a few thousand drawn over all samples say as
much about a layer as all of them. A method that learns from them costs a small matrix product where the layer itself
costs a whole feature map.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_quantdebug.layer_patches import Geometry, Patches, pick_outputs

# Positions that are unfolded at a time: patches of a 3x3 convolution of 256 channels are then 36 MB.
_CHUNK = 4096
# Each fifth sample is held out, from the second on, so that two samples are enough for both.
_HELD_OUT_EVERY, _HELD_OUT_AT = 5, 1


class Reservoir:
    """Draws a fixed number of positions from a stream of unknown length, each with the same chance.

    Every position gets a random number and those with the lowest stay (bottom-k sampling). What is kept therefore does
    not depend on how the stream is cut into batches beyond the numbers drawn, and a later batch is asked for few.

    Args:
        capacity: How many are kept; of a shorter stream all are.
        generator: Source of the numbers; torch's own is left alone.

    Attributes:
        size: How many are kept by now.

    Examples:
        >>> reservoir = Reservoir(3, torch.Generator().manual_seed(0))
        >>> [len(reservoir.choose(2)[0]) for _ in range(2)], reservoir.size
        ([2, 2], 3)
    """

    def __init__(self, capacity: int, generator: torch.Generator) -> None:
        """Start empty."""
        self._capacity = capacity
        self._generator = generator
        self._keys = torch.empty(0, dtype=torch.float64)

    @property
    def size(self) -> int:
        """How many are kept by now."""
        return len(self._keys)

    def choose(self, count: int) -> tuple[Tensor, Tensor]:
        """Take in the next ``count`` positions of the stream.

        Args:
            count: How many there are.

        Returns:
            Numbers, from 0 to ``count - 1``, of those that stay, and the places ``0 .. capacity - 1`` where each
            belongs, taken from others that go where all are full; both int64 on the CPU.
        """
        keys = torch.cat([self._keys, torch.rand(count, generator=self._generator, dtype=torch.float64)])
        kept = min(len(keys), self._capacity)
        stays = torch.zeros(len(keys), dtype=torch.bool)
        stays[keys.topk(kept, largest=False).indices] = True
        chosen = stays[self.size :].nonzero()[:, 0]
        free = torch.cat([(~stays[: self.size]).nonzero()[:, 0], torch.arange(self.size, kept)])
        grown = torch.cat([self._keys, self._keys.new_empty(kept - self.size)])
        grown[free] = keys[self.size + chosen]
        self._keys = grown
        return chosen, free


@dataclass(frozen=True, eq=False)
class Samples:
    """Positions of a layer.

    Attributes:
        x: Patches of the input, float32, ``(P, groups, K)``.
        y: Outputs that belong to them, float32, ``(P, groups, C_out / groups)``.
    """

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        """Number of positions."""
        return len(self.x)

    def part(self, positions: Tensor) -> Samples:
        """Some of the positions: their numbers, or a mask over all."""
        return Samples(self.x[positions], self.y[positions])


class _Kept:
    """Kept positions of one purpose and the reservoir that decides about them."""

    def __init__(self, capacity: int, samples: Samples, generator: torch.Generator) -> None:
        """Make room for ``capacity`` positions like those in ``samples``."""
        self._reservoir = Reservoir(capacity, generator)
        self._x = samples.x.new_empty(capacity, *samples.x.shape[1:])
        self._y = samples.y.new_empty(capacity, *samples.y.shape[1:])

    def add(self, positions: Tensor, pick: Callable[[Tensor], Samples]) -> None:
        """Keep some of these positions."""
        chosen, places = self._reservoir.choose(len(positions))
        parts = torch.split(positions[chosen], _CHUNK), torch.split(places, _CHUNK)
        for some, where in zip(*parts, strict=True):
            picked, where = pick(some.to(self._x.device)), where.to(self._x.device)
            self._x[where], self._y[where] = picked.x, picked.y

    @property
    def samples(self) -> Samples:
        """What is kept by now."""
        size = self._reservoir.size
        return Samples(self._x[:size], self._y[:size])


class LayerSampler:
    """Collects positions of one layer over batches, to learn from and to judge by.

    Every fifth sample (entry of the first axis) is held out to judge by, counted over all batches; where there is only
    one sample, every fifth position that was kept is.

    Args:
        memory_limit: Bytes that the positions may take, all together; never fewer than ten positions are kept.
        seed: Decides which positions are taken.
        most: Never more positions than this to learn from, and a quarter of it to judge by.
    """

    def __init__(self, memory_limit: int, seed: int, most: int) -> None:
        """Start empty."""
        self._memory_limit = memory_limit
        self._most = most
        self._generator = torch.Generator().manual_seed(seed)
        self._first_sample = 0
        self._sets: tuple[_Kept, _Kept] | None = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor, geometry: Geometry) -> None:
        """Take in one batch.

        Args:
            x: The layer's input.
            y: A result of the layer for the same samples, such as that of the FP32 network.
            geometry: How the layer reads its input.
        """
        patches = Patches(x, geometry, y.shape)
        if not patches.count:
            return

        def pick(positions: Tensor) -> Samples:
            return Samples(patches.pick(positions).float(), pick_outputs(y, geometry, positions).float())

        if self._sets is None:
            self._sets = self._room(pick(torch.zeros(1, dtype=torch.int64, device=x.device)))
        sample = torch.arange(patches.count) // patches.per_sample + self._first_sample
        self._first_sample += patches.count // patches.per_sample
        held_out = sample % _HELD_OUT_EVERY == _HELD_OUT_AT
        self._sets[0].add((~held_out).nonzero()[:, 0], pick)
        self._sets[1].add(held_out.nonzero()[:, 0], pick)

    def _room(self, first: Samples) -> tuple[_Kept, _Kept]:
        """Room for positions like the first one, as many as may be kept."""
        fitting = self._memory_limit // (4 * (first.x.numel() + first.y.numel()))
        training = min(max(fitting, 2 * _HELD_OUT_EVERY) * (_HELD_OUT_EVERY - 1) // _HELD_OUT_EVERY, self._most)
        held_out = max(1, training // (_HELD_OUT_EVERY - 1))
        return _Kept(training, first, self._generator), _Kept(held_out, first, self._generator)

    @property
    def samples(self) -> tuple[Samples, Samples] | None:
        """The positions to learn from and those to judge by; ``None`` where there is none for one of the two.

        Positions that NaN or infinity has reached are left out.
        """
        if self._sets is None:
            return None
        training, held_out = (_finite(kept.samples) for kept in self._sets)
        if not len(held_out):
            judging = torch.arange(len(training), device=training.x.device) % _HELD_OUT_EVERY == _HELD_OUT_AT
            training, held_out = training.part(~judging), training.part(judging)
        return (training, held_out) if len(training) and len(held_out) else None


def _finite(samples: Samples) -> Samples:
    """The positions whose inputs and outputs are all finite."""
    good = samples.x.isfinite().all(-1).all(-1) & samples.y.isfinite().all(-1).all(-1)
    return samples if bool(good.all()) else samples.part(good)

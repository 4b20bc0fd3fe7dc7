"""Copies of DataLoaders that can be iterated without the originals noticing, in an order that a seed fixes.

Iterating a DataLoader of the running Trainer would restart its persistent workers under the outer iteration and draw
from its random generators. A pass therefore iterates a shallow copy: same dataset, same settings, own iterator, own
sampler objects, no persistent workers. Generators are shared by the copies, so their state is saved, seeded and given
back.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader

from lightning_quantdebug.errors import SettingsError

_SAMPLERS = ("sampler", "batch_sampler")


class Batches:
    """Batches in a list or another collection, as one loader: Lightning would take a list for several loaders."""

    def __init__(self, batches: Iterable[Any]) -> None:
        """Keep the collection, which is iterated anew in each pass."""
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        """Go through the batches."""
        return iter(self._batches)

    def __len__(self) -> int:
        """Number of batches; a ``TypeError`` where the collection does not know it."""
        return len(self._batches)  # type: ignore[arg-type] # the TypeError is what callers expect


def copy_loader(loader: Any) -> Any:
    """A DataLoader that shares the dataset and nothing that moves; other iterables are returned as they are.

    Example:
        >>> loader = DataLoader(range(4), batch_size=2)
        >>> copied = copy_loader(loader)
        >>> copied is loader, copied.dataset is loader.dataset, len(copied)
        (False, True, 2)
    """
    if not isinstance(loader, DataLoader):
        return loader
    copied = copy.copy(loader)
    # DataLoader forbids setting these attributes after construction.
    vars(copied).update(_iterator=None, persistent_workers=False, **_copied_samplers(loader, {}))
    return copied


def _copied_samplers(holder: Any, done: dict[int, Any]) -> dict[str, Any]:
    """Copies of the samplers that an object holds; one that is held twice stays one."""
    attributes = getattr(holder, "__dict__", {})
    return {name: _copy_sampler(attributes[name], done) for name in _SAMPLERS if attributes.get(name) is not None}


def _copy_sampler(sampler: Any, done: dict[int, Any]) -> Any:
    """A shallow copy of a sampler and of the samplers inside it. Plain lists of indices are shared."""
    if not hasattr(sampler, "__dict__"):
        return sampler
    if id(sampler) not in done:
        done[id(sampler)] = copied = copy.copy(sampler)
        vars(copied).update(_copied_samplers(sampler, done))
    return done[id(sampler)]


@contextmanager
def seeded_generators(loaders: list[Any], seed: int) -> Iterator[None]:
    """Seed every ``torch.Generator`` of the loaders and their samplers, and give each its state back."""
    generators = {id(found): found for loader in loaders for found in _generators(loader)}.values()
    states = [(generator, generator.get_state()) for generator in generators]
    try:
        for generator in generators:
            generator.manual_seed(seed)
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def _generators(loader: Any) -> Iterator[torch.Generator]:
    """The generators of a loader or sampler and of the samplers inside it."""
    pending, seen = [loader], set[int]()
    while pending:
        holder = pending.pop()
        attributes = getattr(holder, "__dict__", None)
        if attributes is None or id(holder) in seen:
            continue
        seen.add(id(holder))
        yield from (value for value in attributes.values() if isinstance(value, torch.Generator))
        pending += [attributes[name] for name in _SAMPLERS if name in attributes]


def check_limit(name: str, value: object) -> None:
    """Raise unless ``value`` limits batches as Lightning's Trainer does.

    Raises:
        SettingsError: If it is neither a count of at least 1 nor a share in (0, 1].
    """
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not is_count and not (isinstance(value, float) and 0.0 < value <= 1.0):
        raise SettingsError(
            f"`{name}` must be a number of batches (int, at least 1) or a share (float in (0, 1]), got {value!r}."
        )


def limited(batches: int | float, limit: int | float) -> int | float:
    """Number of batches that ``limit`` leaves of ``batches``; a share leaves at least one.

    Raises:
        SettingsError: If a share is asked of a loader whose length is unknown.

    Example:
        >>> limited(10, 0.25), limited(10, 3), limited(2, 0.1)
        (2, 3, 1)
    """
    if isinstance(limit, int):
        return min(batches, limit)
    if batches == float("inf"):
        if limit < 1.0:
            raise SettingsError(
                f"A share of {limit:g} of the batches was asked for, but the loader does not know its length. "
                "Give a number of batches (int)."
            )
        return batches
    return max(1, int(batches * limit)) if batches else 0

"""Random state of torch (all devices), numpy and Python: isolated, and seeded step by step."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


class RandomState:
    """The state of every global generator at one moment."""

    def __init__(self) -> None:
        """Take the states as they are."""
        self._python, self._numpy, self._host = random.getstate(), np.random.get_state(), torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        self._mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None

    def restore(self) -> None:
        """Give the generators these states, as often as wanted."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._host)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        if self._mps is not None:
            torch.mps.set_rng_state(self._mps)


@contextmanager
def isolated_random_state() -> Iterator[None]:
    """Give every global generator its state back, also after an exception (which Lightning's own guard does not).

    Example:
        >>> torch.manual_seed(0) is None
        False
        >>> with isolated_random_state():
        ...     first = torch.rand(1)
        >>> bool(torch.rand(1) == first)
        True
    """
    before = RandomState()
    try:
        yield
    finally:
        before.restore()


def seed_all(*parts: int) -> None:
    """Seed every global generator from several numbers: equal numbers, equal draws; any other number, other draws.

    Args:
        parts: Numbers that are not negative.
    """
    words = np.random.SeedSequence(parts).generate_state(4)
    seed = int(words[0]) << 32 | int(words[1])
    # `torch.manual_seed` would note a stack trace for each accelerator that was not used yet: 2 ms every time.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)
    if torch.backends.mps.is_available():
        torch.mps.manual_seed(seed)
    random.seed(int(words[2]))
    np.random.seed(int(words[3]))

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from lightning_quantdebug.random_state import isolated_random_state, seed_all


def draws() -> tuple[float, float, float]:
    return (random.random(), float(np.random.rand()), float(torch.rand(())))


def fail_inside() -> None:
    with isolated_random_state():
        draws()
        raise KeyboardInterrupt


@pytest.mark.parametrize("fails", [True, False])
def test_states_come_back(fails: bool) -> None:
    with isolated_random_state():
        expected = draws()
    if fails:
        with pytest.raises(KeyboardInterrupt):
            fail_inside()
    got = draws()
    assert got == expected
    assert draws() != got


def test_seeds_of_several_numbers() -> None:
    def drawn(*parts: int) -> tuple[float, float, float]:
        seed_all(*parts)
        return draws()

    with isolated_random_state():
        first = drawn(1, 2, 3, 0)
        assert drawn(1, 2, 3, 0) == first
        for other in ((2, 2, 3, 0), (1, 3, 3, 0), (1, 2, 4, 0), (1, 2, 3, 1), (2, 1, 3, 0)):
            assert all(a != b for a, b in zip(drawn(*other), first, strict=True))

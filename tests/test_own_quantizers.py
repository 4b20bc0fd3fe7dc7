"""Quantizers that the user's model brings along."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quantdebug.own_quantizers import IdentityCheck, find_own_quantizers, own_quantizers


class Torchs(nn.Module):
    """Torch's interface."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("fake_quant_enabled", torch.tensor([1], dtype=torch.uint8))

    def forward(self, x: Tensor) -> Tensor:
        return x.round() if self.fake_quant_enabled[0] else x


class HandWritten(nn.Module):
    """The small protocol; off by half a step where ``shift`` is set."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.enabled, self.bit_width, self.shift = True, 4, shift

    def forward(self, x: Tensor) -> Tensor:
        return (x * 2**self.bit_width).round() / 2**self.bit_width + self.shift if self.enabled else x + self.shift


class Switch(nn.Identity):
    """Has a switch, but no bit-width: any module of the user's might."""

    enabled = True


def network(shift: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), Torchs(), nn.Sequential(HandWritten(shift), Switch()))


def test_both_interfaces_are_found_and_nothing_else() -> None:
    found = find_own_quantizers(network())
    assert [quantizer.path for quantizer in found] == ["1", "2.0"]
    assert [quantizer.has_bit_width for quantizer in found] == [False, True]
    assert find_own_quantizers(nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.BatchNorm1d(2))) == []


def test_names_are_without_the_compilers_level() -> None:
    assert [q.path for q in find_own_quantizers(torch.compile(network(), backend="eager"))] == ["1", "2.0"]


def state(model: nn.Sequential) -> tuple[Any, ...]:
    return (model[1].fake_quant_enabled.tolist(), model[2][0].enabled, model[2][0].bit_width, model[2][1].enabled)


@pytest.mark.parametrize("fails", [False, True], ids=["", "after_an_error"])
def test_they_are_switched_and_given_back(fails: bool) -> None:
    model = network()
    buffer = model[1].fake_quant_enabled
    found = find_own_quantizers(model)
    before = state(model)
    try:
        with own_quantizers(found, enabled=False):
            assert state(model) == ([0], False, 4, True)
            with own_quantizers(found, enabled=True, bit_width=16):
                assert state(model) == ([1], True, 16, True)
            assert state(model) == ([0], False, 4, True)
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert state(model) == before
    assert model[1].fake_quant_enabled is buffer


def test_the_identity_check_names_the_first_that_changes_its_tensor() -> None:
    model = network(shift=0.5)
    found = find_own_quantizers(model)
    check = IdentityCheck(found)
    with own_quantizers(found, enabled=False), check.watching():
        model(torch.randn(3, 2))
    assert [parting.name for parting in check.errors] == ["1", "2.0"]
    first = check.first_beyond(1e-4)
    assert first is not None
    assert first.name == "2.0"
    assert first.error > 0.01
    assert not any(module._forward_hooks for module in model.modules())
    count = len(check.errors)
    model(torch.randn(3, 2))
    assert len(check.errors) == count


def test_the_identity_check_is_content_with_identities() -> None:
    model = network()
    found = find_own_quantizers(model)
    check = IdentityCheck(found)
    with own_quantizers(found, enabled=False), check.watching():
        model(torch.randn(3, 2))
    assert check.first_beyond(1e-7) is None
    assert len(check.errors) == 2


def test_nan_is_beyond_every_bound() -> None:
    class Nan(HandWritten):
        def forward(self, x: Tensor) -> Tensor:
            return x * float("nan")

    model = nn.Sequential(Nan())
    check = IdentityCheck(find_own_quantizers(model))
    with check.watching():
        model(torch.ones(1, 2))
    assert check.first_beyond(1e9) is not None

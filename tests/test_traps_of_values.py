"""Traps 6 and 7 of intercepting operations: where values come from, and which of them only mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_quantdebug.instrument import instrument
from tests.grids import quantized, reasons

torch.set_num_threads(1)


# 6. What leaves torch comes back unknown; what only looks at data is constant.


class LeavesTorch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.from_numpy(self.layer(x).detach().numpy() * 2)
        mask = x.new_zeros(4) + torch.zeros_like(x) + torch.arange(4.0)
        return self.head(y + mask)


def test_trap_06_unknown_is_data_and_new_zeros_are_constant() -> None:
    torch.manual_seed(0)
    model = LeavesTorch().eval()
    batch = torch.randn(3, 4)
    with instrument(model, batch) as q:
        assert list(q.quantizers) == ["input", "layer.weight", "layer", "add.2.input", "add.2", "head.weight", "head"]
        quantized(q, batch)
        assert q.quantizers["add.2.input"].observer.count == 12


# 7. Additive masks ahead of a softmax.


class WindowAttention(nn.Module):
    """Swin's attention: a relative position table and a mask of -100 that is built from the shape of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(9, 2))
        self.register_buffer("index", torch.randint(0, 9, (16,)))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(len(x), 4, 3, 2, 4).permute(2, 0, 3, 1, 4)
        scores = (q * 0.5) @ k.transpose(-2, -1)
        scores = scores + self.table[self.index].view(4, 4, 2).permute(2, 0, 1)
        region = x.new_zeros(4)
        region[2:] = 1
        mask = region[:, None] - region[None, :]
        mask = mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)
        weights = torch.softmax(scores + mask, dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(len(x), 4, 8))


def test_trap_07_masks_widen_no_range() -> None:
    torch.manual_seed(0)
    model = WindowAttention().eval()
    batch = torch.randn(3, 4, 8)
    with torch.no_grad(), instrument(model, batch) as q:
        plain = model(batch)
        quantized(q, batch)
        for quantizer in q.quantizers.values():
            assert quantizer.encoding is not None
            assert float(quantizer.encoding.range_min.min()) > -50, quantizer
        softmax = q.quantizers["softmax"]
        assert softmax.fixed_range == (0.0, 1.0)
        assert (softmax.encoding.range_min.item(), softmax.encoding.range_max.item()) == pytest.approx((0.0, 1.0))
        assert "masked_fill" not in q.quantizers
        assert any("mask" in reason for name, reason in reasons(q).items() if name.startswith("add"))
        assert float((model(batch) - plain).norm() / plain.norm()) < 0.03


def test_trap_07_infinite_masks_are_no_range_and_no_error() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            scores = self.layer(x).masked_fill(torch.eye(4, dtype=torch.bool), float("-inf"))
            return self.head(torch.softmax(scores, -1))

    torch.manual_seed(0)
    model = Masked().eval()
    batch = torch.randn(2, 4, 4)
    with torch.no_grad(), instrument(model, batch) as q:
        plain = model(batch)
        quantized(q, batch)
        assert float((model(batch) - plain).norm() / plain.norm()) < 0.03

"""Costs against counts by hand and against a count of the multiplications that layers really do."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lightning_quantdebug.instrument import Instrumentation, instrument
from lightning_quantdebug.setting_cost import CostModel, SettingCost
from tests import zoo


def model_of(net: nn.Module, batch: Tensor, target: str = "w4a8_per_tensor") -> tuple[CostModel, Instrumentation]:
    with instrument(net.eval(), batch, target) as q:
        q.calibrate([batch])
        return CostModel(q), q


def test_a_linear_layer_by_hand() -> None:
    costs, q = model_of(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(5, 8))
    assert costs.cost() == SettingCost(40 * 4 / 8 + 2 * 4, (8 * 4 + 4 * 2) * 4 * 8, 0)
    raised = costs.cost({"0.weight": 8, "1": 16})
    assert raised == SettingCost(32 + 4 + 8, 8 * 4 * 8 * 8 + 4 * 2 * 4 * 16, 2)
    assert costs.raised({"0.weight": 8, "1": 8, "2.weight": 4}) == ["0.weight"]
    q.quantizers["1"].respecify(type(q.quantizers["1"].spec)(16), None)
    assert costs.cost().raised == 1


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, groups=2), nn.ConvTranspose2d(4, 6, 3, 2), nn.Conv1d(4, 8, 3, 2)])
def test_convolutions_against_the_products_of_a_matrix(layer: nn.Module) -> None:
    """A convolution is a matrix; its entries that are not 0 for weights of 1 are its multiplications."""
    shape = (1, 4, 9) if isinstance(layer, nn.Conv1d) else (1, 4, 6, 6)
    costs, _ = model_of(nn.Sequential(layer), torch.randn(3, *shape[1:]))
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.zero_()
        entries = sum(
            int((layer(torch.eye(math.prod(shape))[index].reshape(shape)) != 0).sum())
            for index in range(math.prod(shape))
        )
    assert costs.cost().bit_operations == entries * 4 * 8


def test_a_network_against_a_count_of_its_layers() -> None:
    for name in ("resnet", "mobilenet"):
        model, batch = zoo.make(name)
        costs, q = model_of(model, batch, "int8")
        counted = 0.0

        def count(module: nn.Module, args: tuple[Tensor], result: Tensor) -> None:
            nonlocal counted
            counted += result.numel() / len(result) * module.weight[0].numel()

        hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        with torch.no_grad():
            model(batch)
        for hook in hooks:
            hook.remove()
        assert costs.cost().bit_operations == pytest.approx(counted * 64)
        sizes = [tensor.numel() for name, tensor in q.tensors.items() if name in q.quantizers]
        scales = sum(q.quantizers[name].encoding.scale.numel() for name in q.tensors if name in q.quantizers)
        assert costs.cost().size_bytes == sum(sizes) + 4 * scales


class Scores(nn.Module):
    """A product of two activations."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) @ self.b(x).transpose(1, 2)


def test_products_of_activations_count_with_the_bits_of_both() -> None:
    costs, _ = model_of(Scores(), torch.randn(2, 5, 8))
    assert costs.cost().bit_operations == 2 * 5 * 8 * 8 * 4 * 8 + 5 * 5 * 8 * 8 * 8
    assert costs.cost({"a": 16}).bit_operations == 2 * 5 * 8 * 8 * 4 * 8 + 5 * 5 * 8 * 16 * 8


def test_recurrent_layers_count_each_step() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.GRU(4, 6, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    costs, _ = model_of(Last(), torch.randn(2, 5, 4))
    # The hidden state has no quantizer.
    assert costs.cost().bit_operations == pytest.approx(5 * (18 * 4 * 4 * 8 + 18 * 6 * 4 * 32))


def test_what_has_no_quantizer_counts_with_32_bits() -> None:
    net, batch = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(5, 8)
    with instrument(net, batch, "w4a8_per_tensor", exclude=["input"]) as q:
        q.calibrate([batch])
        assert CostModel(q).cost().bit_operations == 8 * 4 * 4 * 32 + 4 * 2 * 4 * 8

"""Costs against counts by hand and against a count of the multiplications that layers really do."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lightning_quantdebug.granularity import refine
from lightning_quantdebug.instrument import Instrumentation, batch_runs, instrument
from lightning_quantdebug.setting_cost import CostModel, SettingCost
from lightning_quantdebug.target import Granularity
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


class Applies(nn.Module):
    """Applies a function to what a linear layer makes of its input, ``(N, 5, 8)``, and to a parameter."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor], *shape: int) -> None:
        super().__init__()
        self.function = function
        self.linear, self.other = nn.Linear(8, 8), nn.Parameter(torch.randn(shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.linear(x), self.other)


def heads(x: Tensor) -> Tensor:
    return x.reshape(len(x), 5, 2, 4).transpose(1, 2)


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda y, w: y @ w, (8, 3)),
        (lambda y, w: torch.einsum("ntc, cd -> ntd", y, w), (8, 3)),
        (lambda y, w: torch.einsum("nkc,kcd->nd", y, w), (5, 8, 3)),
        (lambda y, w: torch.einsum("...c,cd->...d", y, w), (8, 3)),
        (lambda y, w: torch.einsum("n...c,...cd->n...d", y, w), (5, 8, 3)),
        (lambda y, w: torch.einsum("nhqd,nhkd->nhqk", heads(y), heads(2 * y)), (1,)),
        (lambda y, w: torch.tensordot(y, w, dims=([1, 2], [0, 1])), (5, 8, 3)),
        (lambda y, w: torch.addmm(y[:, 0, :3], y[:, 0], w), (8, 3)),
        (lambda y, w: torch.addmm(w[0], y[:, 0], w), (8, 3)),
        (lambda y, w: torch.baddbmm(y[:, :, :5], y, y.transpose(1, 2)), (1,)),
        (lambda y, w: torch.bmm(y, y.transpose(1, 2)), (1,)),
        (lambda y, w: F.scaled_dot_product_attention(heads(y), heads(y)[:, :, :3], heads(y)[:, :, :3]), (1,)),
        (lambda y, w: F.scaled_dot_product_attention(heads(y), heads(y), heads(y)[..., :3]), (1,)),
        (lambda y, w: F.conv1d(y, w, groups=5), (10, 1, 3)),
        (lambda y, w: F.conv_transpose1d(y, w, stride=2), (5, 4, 3)),
        (lambda y, w: F.conv3d(y.reshape(-1, 5, 2, 2, 2), w, padding=1), (3, 5, 3, 3, 3)),
        (lambda y, w: (y * w).relu(), (5, 1)),
    ],
)
def test_multiplications_against_those_that_torch_counts(
    function: Callable[[Tensor, Tensor], Tensor], shape: tuple[int, ...]
) -> None:
    net, batch = Applies(function, *shape).eval(), torch.randn(3, 5, 8)
    costs, _ = model_of(net, batch)
    # Its fused attention for CPUs counts nothing.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(batch)
    counted = sum(product.multiplications for product in costs._products)
    assert counted * 3 == pytest.approx(counter.get_total_flops() / 2)


def test_the_products_of_all_pairs_are_added_up() -> None:
    """By hand, as torch does not count it: of each of 3 pairs every entry ``(5, 4)`` takes 8."""
    net = Applies(lambda y, w: torch.addbmm(w, y, y.transpose(1, 2)[:, :, :4])[None].expand(3, -1, -1), 5, 4)
    costs, _ = model_of(net, torch.randn(3, 5, 8))
    assert [product.multiplications for product in costs._products] == [5 * 8 * 8, 5 * 4 * 8]


def test_fused_attention_multiplies_its_values_with_what_nobody_sees() -> None:
    net = Applies(lambda y, w: F.scaled_dot_product_attention(heads(y), heads(y), heads(y)), 1)
    costs, _ = model_of(net, torch.randn(3, 5, 8))
    own = 5 * 8 * 8 * 4 * 8
    assert costs.cost().bit_operations == own + 2 * 5 * 5 * 4 * 8 * (8 + 32)
    assert costs.cost({"linear": 16}).bit_operations == own + 2 * 5 * 5 * 4 * 16 * (16 + 32)


def test_the_operands_of_a_sum_with_a_product_are_the_product() -> None:
    net = Applies(lambda y, w: torch.baddbmm(w, y, y.transpose(1, 2)), 3, 5, 5)
    costs, _ = model_of(net, torch.randn(3, 5, 8))
    assert costs.cost().bit_operations == 5 * 8 * 8 * 4 * 8 + 5 * 5 * 8 * 8 * 8


def test_a_tied_weight_has_one_size_and_what_is_looked_up_its_bits() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(10, 8)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.table(x), self.table.weight)

    costs, _ = model_of(Tied(), torch.arange(10).reshape(2, 5))
    assert costs.cost() == SettingCost(80 * 4 / 8 + 4, 5 * 10 * 8 * 4 * 4, 0)
    assert costs.cost({"table.weight": 8}) == SettingCost(80 + 4, 5 * 10 * 8 * 8 * 8, 1)


@pytest.mark.parametrize("target", ["w4a8", "w4a8_per_tensor"])
def test_the_scales_of_the_target_are_those_it_had_at_first(target: str) -> None:
    net, batch = (
        nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4)).eval(),
        torch.rand(2, 4, 18),
    )
    with instrument(net, batch, {"preset": target, "finest_granularity": "per_group"}) as q:
        q.calibrate([batch])
        costs = CostModel(q)
        first = costs.cost()
        assert costs.cost(as_placed=True) == first
        refine(q, batch_runs(q, [batch]), Granularity.PER_CHANNEL)
        refine(q, batch_runs(q, [batch]), Granularity.PER_GROUP)
        # 6 channels of the convolution; 4 channels of 96 / 32 groups.
        assert costs.cost().size_bytes == (72 + 384) / 2 + 4 * (6 + 12)
        assert costs.cost(as_placed=True) == first


def test_the_scales_of_groups_are_counted_from_the_target() -> None:
    spec = {"granularity": "per_group", "group_size": 16, "bit_width": 4}
    net, batch = nn.Linear(64, 4).eval(), torch.rand(2, 64)
    with instrument(net, batch, {"weights": spec}) as q:
        q.calibrate([batch])
        assert CostModel(q).cost(as_placed=True) == CostModel(q).cost()
        assert CostModel(q).cost().size_bytes == 64 * 4 / 2 + 4 * 16


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

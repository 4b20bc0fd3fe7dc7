"""BN folding in both directions, against the unfolded network in float64, over every layer that can be folded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quantdebug.instrument import batch_runs, instrument


def shaken(model: nn.Module) -> nn.Module:
    """Statistics as of a trained network, gammas of both signs and of 0 among them."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None:
                module.running_mean.normal_()
                assert module.running_var is not None
                module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, -1, 2)
                module.weight.data[0] = 0
                nn.init.normal_(module.bias)
    return model.eval()


def folded(model: nn.Module, x: Tensor) -> tuple[int, bool | None]:
    """How many batch normalizations were folded and whether forward; checks that the function is the same."""
    with instrument(model, x) as q:
        q.calibrate([x])
        errors: list[Tensor] = []

        def visit(run: Callable[[], Any], index: int) -> None:
            plain = run()
            with q.reference():
                errors.append((run() - plain).norm() / plain.norm())
            with q.bit_width(32), q.modes("quantize"):
                errors.append((run() - plain).norm() / plain.norm())

        batch_runs(q, [x])(visit)
        assert max(errors) < 1e-5
        directions = {fold.forward for fold in q.plan.folds.values()}
        assert set(q.plan.folded_into.values()) == set(q.plan.folds)
        return len(q.plan.folds), directions.pop() if len(directions) == 1 else None


CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def image(dims: int, channels: int = 4) -> Tensor:
    return torch.randn(2, channels, *[5] * dims, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_backward_into_a_convolution(dims: int, groups: int, bias: bool) -> None:
    net = nn.Sequential(CONV[dims](4, 8, 3, padding=1, groups=groups, bias=bias), NORM[dims](8), nn.ReLU())
    assert folded(shaken(net), image(dims)) == (1, False)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_backward_into_a_transposed_convolution(dims: int, groups: int) -> None:
    net = nn.Sequential(TRANSPOSED[dims](4, 8, 2, stride=2, groups=groups), NORM[dims](8), nn.ReLU())
    assert folded(shaken(net), image(dims)) == (1, False)


@pytest.mark.parametrize("affine", [False, True])
def test_backward_into_a_linear_layer(affine: bool) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8, affine=affine), nn.ReLU())
    assert folded(shaken(net), torch.randn(5, 6)) == (1, False)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("affine", [False, True])
def test_forward_into_a_convolution_without_padding(dims: int, groups: int, bias: bool, affine: bool) -> None:
    net = nn.Sequential(NORM[dims](4, affine=affine), CONV[dims](4, 8, 3, groups=groups, bias=bias), nn.ReLU())
    assert folded(shaken(net), image(dims)) == (1, True)


@pytest.mark.parametrize("bias", [False, True])
def test_forward_into_a_linear_layer(bias: bool) -> None:
    net = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 8, bias=bias), nn.ReLU())
    assert folded(shaken(net), torch.randn(5, 6)) == (1, True)


def test_a_normalization_that_is_folded_forward_has_no_quantizer_of_its_own() -> None:
    net = shaken(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3)))
    with instrument(net, image(2)) as q:
        assert set(q.quantizers) == {"input", "0.weight", "1", "3.weight", "3"}
        assert ("2", "folded into 3.weight") in [(item.name, item.reason) for item in q.coverage.unquantized]


def test_between_two_layers_the_one_ahead_takes_the_normalization() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3))
    assert folded(shaken(net), image(2)) == (1, False)


def test_one_layer_takes_one_normalization() -> None:
    net = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
    assert folded(shaken(net), image(2)) == (1, False)


class Call(nn.Module):
    """A batch normalization that is called as a function, subclassed, and followed by an activation of its own."""

    def __init__(self) -> None:
        super().__init__()

        class BatchNormAct(nn.BatchNorm2d):
            def forward(self, x: Tensor) -> Tensor:
                x = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
                return F.relu(x)

        class OwnConv(nn.Conv2d):
            def forward(self, x: Tensor) -> Tensor:
                return F.conv2d(x, self.weight, stride=2)

        self.conv, self.norm = OwnConv(4, 8, 3, bias=False), BatchNormAct(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def test_functional_calls_and_subclasses() -> None:
    assert folded(shaken(Call()), image(2)) == (1, False)


class Twice(nn.Module):
    """One convolution for two inputs, each with a normalization of its own."""

    def __init__(self, same: bool) -> None:
        super().__init__()
        self.conv, self.one = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)
        self.other = self.one if same else nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(self.conv(x)).relu() + self.other(self.conv(x + 1)).relu()


class Used(nn.Module):
    """A convolution whose output is also used without the normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y + self.norm(y)


class Returned(nn.Module):
    """A normalization whose output is returned as well as read by the layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.cat([y, self.conv(y)], 1)


LEFT: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "a shared convolution": (lambda: Twice(same=False), image(2)),
    "an output that is used twice": (Used, image(2)),
    "a normalization that is used twice": (Returned, image(2)),
    "no running statistics": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8, track_running_stats=False)),
        image(2),
    ),
    "forward with padding": (lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, padding=1)), image(2)),
    "forward with same padding": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, padding="same")),
        image(2),
    ),
    "forward into a transposed convolution": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 8, 3)),
        image(2),
    ),
    "another axis": (lambda: nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(4)), image(1)),
    "another axis, forward": (lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(5, 5)), image(1)),
}


@pytest.mark.parametrize("name", sorted(LEFT))
def test_where_it_would_not_be_exact_nothing_is_folded(name: str) -> None:
    make, x = LEFT[name]
    assert folded(shaken(make()), x) == (0, None)


def test_forward_with_valid_padding() -> None:
    net = nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3, padding="valid"))
    assert folded(shaken(net), image(2)) == (1, True)


def test_one_normalization_behind_every_use_of_a_shared_convolution() -> None:
    assert folded(shaken(Twice(same=True)), image(2)) == (2, False)


@pytest.mark.parametrize("forward", [False, True])
def test_a_normalization_that_trains_keeps_its_own_statistics(forward: bool) -> None:
    # Ranges hold for the statistics of calibration, which therefore stay as they are.
    layers = [nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, momentum=0.0)]
    net = shaken(nn.Sequential(*(layers[::-1] if forward else layers)))
    x = image(2)
    with instrument(net, x) as q:
        q.calibrate([x])
        assert [fold.forward for fold in q.plan.folds.values()] == [forward]
        with q.bit_width(32), q.modes("quantize", kind="weight"):
            net.train()
            output = net(x)
            output.sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    net.zero_grad()
    torch.testing.assert_close(output, net(x), rtol=1e-4, atol=1e-4)

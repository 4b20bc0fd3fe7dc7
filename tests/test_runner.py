"""The run with quantizers: batch normalization folded while simulating, and a forward written out by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from lightning_quantdebug.batchnorm_folding import fold_batch_norm
from lightning_quantdebug.effective_weight import Sources
from lightning_quantdebug.instrument import Instrumentation, instrument
from lightning_quantdebug.plan import BatchNormFold
from lightning_quantdebug.target import QuantTarget
from tests import zoo
from tests.grids import grid, quantized

torch.set_num_threads(1)


def convolution(dims: int, groups: int = 1, transposed: bool = False, bias: bool = True) -> nn.Module:
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    return kind(4, 6, 3, groups=groups, bias=bias)


LAYERS: dict[str, Callable[[bool], nn.Module]] = {
    "linear": lambda bias: nn.Linear(4, 6, bias=bias),
    **{f"conv{d}d": lambda bias, d=d: convolution(d, bias=bias) for d in (1, 2, 3)},
    "conv2d_groups": lambda bias: convolution(2, 2, bias=bias),
    **{f"transposed{d}d": lambda bias, d=d: convolution(d, 1, True, bias) for d in (1, 2, 3)},
    "transposed2d_groups": lambda bias: convolution(2, 2, True, bias),
}


def norm_for(layer: nn.Module, affine: bool) -> Any:
    dims = layer.weight.ndim - 2
    norm = (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims](6, eps=1e-3, affine=affine)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.3, 3.0)
    if affine:
        nn.init.uniform_(norm.weight, -1.5, 1.5)
        nn.init.normal_(norm.bias)
    return norm.eval()


def twin(layer: Any, norm: Any, transposed: bool, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """The folded weight and bias, channel by channel, in float64."""
    weight = layer.weight.detach().double().numpy().copy()
    mean, variance = norm.running_mean.double().numpy(), norm.running_var.double().numpy()
    gamma = norm.weight.detach().double().numpy() if norm.affine else np.ones(6)
    beta = norm.bias.detach().double().numpy() if norm.affine else np.zeros(6)
    old = layer.bias.detach().double().numpy() if layer.bias is not None else np.zeros(6)
    bias = np.empty(6)
    for channel in range(6):
        factor = gamma[channel] / np.sqrt(variance[channel] + norm.eps)
        bias[channel] = beta[channel] + (old[channel] - mean[channel]) * factor
        if not transposed:
            weight[channel] *= factor
            continue
        group, within = divmod(channel, 6 // groups)
        for row in range(group * 4 // groups, (group + 1) * 4 // groups):
            weight[row, within] *= factor
    return weight, bias


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
def test_folding_against_the_formula_torch_and_the_function(name: str, bias: bool, affine: bool) -> None:
    torch.manual_seed(0)
    layer: Any = LAYERS[name](bias)
    norm = norm_for(layer, affine)
    transposed, groups = "transposed" in name, getattr(layer, "groups", 1)
    fold = BatchNormFold("m", "v", "w", "b", norm.eps, int(transposed), groups if transposed else 1)
    tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    weight, new_bias = fold_batch_norm(layer.weight, layer.bias, *tensors, fold)
    expected = twin(layer, norm, transposed, groups)
    for got, wanted in zip((weight, new_bias), expected, strict=True):
        assert np.abs(got.detach().numpy() - wanted).max() < 1e-6
    gamma = norm.weight if affine else torch.ones(6)
    beta = norm.bias if affine else torch.zeros(6)
    old = layer.bias if bias else torch.zeros(6)
    arguments = (layer.weight, old, norm.running_mean, norm.running_var, norm.eps, gamma, beta)
    if groups == 1 or not transposed:  # torch's own does not know the groups of a transposed convolution
        torchs = (
            fuse_linear_bn_weights(*arguments) if name == "linear" else fuse_conv_bn_weights(*arguments, transposed)
        )
        assert torch.allclose(weight, torchs[0], atol=1e-6)
        assert torch.allclose(new_bias, torchs[1], atol=1e-6)
    with torch.no_grad():
        x = torch.randn(2, 4, *(5,) * (layer.weight.ndim - 2))
        plain = norm(layer(x))
        layer.weight.copy_(weight)
        layer.bias = nn.Parameter(new_bias)
        assert torch.allclose(layer(x), plain, atol=1e-5)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
@pytest.mark.parametrize("affine", [False, True], ids=["plain", "affine"])
def test_the_quantized_run_sees_the_folded_weight(name: str, bias: bool, affine: bool) -> None:
    torch.manual_seed(0)
    layer: Any = LAYERS[name](bias)
    norm = norm_for(layer, affine)
    model = nn.Sequential(layer, norm).eval()
    batch = torch.randn(2, 4, *(5,) * (layer.weight.ndim - 2))
    transposed, groups = "transposed" in name, getattr(layer, "groups", 1)
    weight, new_bias = (torch.from_numpy(array).float() for array in twin(layer, norm, transposed, groups))
    with torch.no_grad(), instrument(model, batch) as q:
        quantized(q, batch)
        assert q.plan.folds
        spec = q.quantizers["0.weight"].spec
        axis = q.quantizers["0.weight"].channel_axis
        if transposed and groups == 2:
            assert axis is None, "the columns of two groups share an axis: no axis has the channels"
        else:
            assert (axis, spec.granularity.value) == (int(transposed), "per_channel")
        physical: Any = LAYERS[name](True)
        physical.weight.copy_(grid(q, "0.weight", weight))
        physical.bias.copy_(new_bias)
        expected = grid(q, "1", physical(grid(q, "input", batch)))
        step = float(q.quantizers["1"].encoding.scale)
        difference = (model(batch) - expected).abs()
        # Folding in float64 or float32 may tip a value that lies between two levels; nothing else may differ.
        assert float((difference > 1e-5).float().mean()) < 0.05
        assert float(difference.max()) < 2.1 * step


def test_what_a_kept_weight_was_computed_from_is_told_by_identity_version_and_value() -> None:
    a = torch.zeros(64, 64)
    sources = Sources(1, (a, None))
    assert sources.are_still(1, (a, None))
    assert not sources.are_still(2, (a, None))
    assert not sources.are_still(1, (a.clone(), None))
    assert not sources.are_still(1, (a, a))
    assert not sources.are_still(1, (None, None))
    a[1, 1] = 1.0
    assert not sources.are_still(1, (a, None)), "a write that only the version tells of"
    sources = Sources(1, (a, None))
    a.data += 1.0
    assert not sources.are_still(1, (a, None)), "a write that only the values tell of"
    with torch.inference_mode():
        b = torch.zeros(2)
    assert not Sources(1, (b,)).are_still(1, (b,)), "of an inference tensor nobody knows"


class SmallNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = zoo.conv_bn(3, 4, 3)
        self.deep = nn.Conv2d(4, 4, 3, padding=1, groups=4)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn(self.conv(x)))
        x = F.max_pool2d(self.deep(x) + x, 2)
        return self.head(x.mean((2, 3)))


def torchs_grid(q: Instrumentation, name: str, x: Tensor) -> Tensor:
    """``x`` on the grid of a quantizer by torch's own kernels."""
    encoding = q.quantizers[name].encoding
    assert encoding is not None
    low, high = encoding.spec.quant_min, encoding.spec.quant_max
    if encoding.channel_axis is None:
        return torch.fake_quantize_per_tensor_affine(x, encoding.scale, encoding.zero_point.int(), low, high)
    zero = encoding.zero_point.int()
    return torch.fake_quantize_per_channel_affine(x, encoding.scale, zero, encoding.channel_axis, low, high)


def test_a_small_network_equals_the_forward_written_out_by_hand() -> None:
    torch.manual_seed(0)
    model = zoo._trained_looking(SmallNet()).eval()
    batch = torch.randn(2, 3, 8, 8)
    with torch.no_grad(), instrument(model, batch) as q:
        assert list(q.quantizers) == [
            "input", "conv.weight", "relu6", "deep.weight", "deep", "add", "mean", "head.weight", "head",
        ]  # fmt: skip
        quantized(q, batch)
        norm = model.bn
        folded = fuse_conv_bn_weights(
            model.conv.weight, None, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        x = F.conv2d(torchs_grid(q, "input", batch), torchs_grid(q, "conv.weight", folded[0]), folded[1], padding=1)
        x = torchs_grid(q, "relu6", F.relu6(x))
        deep = F.conv2d(x, torchs_grid(q, "deep.weight", model.deep.weight), model.deep.bias, padding=1, groups=4)
        x = torchs_grid(q, "add", torchs_grid(q, "deep", deep) + x)
        x = torchs_grid(q, "mean", F.max_pool2d(x, 2).mean((2, 3)))
        x = F.linear(x, torchs_grid(q, "head.weight", model.head.weight), model.head.bias)
        assert torch.allclose(model(batch), torchs_grid(q, "head", x), atol=1e-6)
        for alone in q.quantizers:
            with q.modes("quantize", alone):
                assert not torch.equal(model(batch), torchs_grid(q, "head", x)), alone


def test_while_the_normalization_trains_it_keeps_its_own_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*zoo.conv_bn(3, 4, 3)).eval()
    zoo._trained_looking(model)
    batch = torch.randn(4, 3, 6, 6) * 2 + 1
    reference = nn.Sequential(*zoo.conv_bn(3, 4, 3))
    reference.load_state_dict(model.state_dict())
    with instrument(model, batch) as q:
        q.calibrate([batch])
        q.set_mode("quantize", kind="weight")
        norm = reference[1]
        factor = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach().view(-1, 1, 1, 1)
        with torch.no_grad():
            reference[0].weight.copy_(grid(q, "0.weight", reference[0].weight * factor) / factor)
        model.train()
        reference.train()
        expected = reference(batch)
        before = {name: tensor.clone() for name, tensor in model[1].state_dict().items()}
        for mode in (torch.enable_grad, torch.no_grad):
            model[1].load_state_dict(before)
            with mode():
                assert torch.allclose(model(batch), expected, atol=1e-5)
            for name in ("running_mean", "running_var", "num_batches_tracked"):
                assert torch.allclose(getattr(model[1], name), getattr(reference[1], name), atol=1e-5), name
    assert q.plan.folds


def test_every_parameter_trains_also_with_a_dead_channel() -> None:
    torch.manual_seed(0)
    model, batch = zoo.make("mobilenet")
    with torch.no_grad():
        model.features[0][1].weight[2] = 0.0
    with instrument(model, batch) as q:
        quantized(q, batch)
        model.train()
        model.classifier[0].eval()
        model(batch).pow(2).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_a_normalization_that_was_recorded_training_is_not_folded() -> None:
    model = nn.Sequential(*zoo.conv_bn(3, 4, 3)).train()
    session = Instrumentation(model, QuantTarget())
    batch = torch.randn(2, 3, 5, 5)
    session.record(lambda: model(batch), batch)
    session.place()
    assert not session.plan.folds
    reasons = {item.name: item.reason for item in session.coverage.unquantized}
    assert "no fixed statistics" in reasons["1 (folding)"]
    assert "1" in session.quantizers


def test_a_linear_layer_on_sequences_is_not_folded() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5)).eval()
    with instrument(model, torch.randn(2, 5, 4)) as q:
        assert not q.plan.folds


def test_an_excluded_weight_leaves_its_normalization() -> None:
    torch.manual_seed(0)
    model = zoo._trained_looking(nn.Sequential(*zoo.conv_bn(3, 4, 3))).eval()
    batch = torch.randn(2, 3, 5, 5)
    with torch.no_grad(), instrument(model, batch, exclude=["0.weight"]) as q:
        quantized(q, batch)
        assert torch.equal(model(batch), grid(q, "1", model[1](model[0](grid(q, "input", batch)))))


def test_a_trace_names_every_operation() -> None:
    model, batch = zoo.make("resnet")
    seen: list[str] = []
    with torch.no_grad(), instrument(model, batch) as q:
        with q.traced(lambda name, result: seen.append(name)):
            model(batch)
        assert [name for name in seen if name in q.keys_by_name] == list(q.keys_by_name)
        count = len(seen)
        model(batch)
        assert len(seen) == count


class Contrastive(nn.Module):
    """A criterion of the user's own: no weights, one number."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.sigmoid((a - b) @ (a - b).T).mean()


class Task(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.criterion = nn.Linear(4, 4), Contrastive()

    def step(self, batch: Tensor) -> Tensor:
        return self.criterion(self.net(batch), batch) + F.mse_loss(self.net(batch), batch)


def test_criteria_and_losses_of_a_step_are_neither_quantized_nor_unseen() -> None:
    model, batch = Task().eval(), torch.randn(3, 4)
    session = Instrumentation(model, QuantTarget())
    session.record_step(lambda: model.step(batch), batch, 0, 0)
    session.place()
    assert set(session.quantizers) == {"net.weight", "input", "net", "net@1"}
    plain = model.step(batch)
    assert torch.equal(session.around_step(lambda: model.step(batch), batch, 0, 0), plain)
    assert session.coverage.unseen == ()
    reasons = {item.name: item.reason for item in session.coverage.unquantized}
    assert "taken for a criterion" in reasons["criterion"]

"""The gradients of LSQ against autograd of the float64 definition, and what a learned scale does in a quantizer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quantdebug import instrument, learned_scale
from lightning_quantdebug.encoding import Encoding, encoding_from_range
from lightning_quantdebug.errors import CaptureError, SettingsError
from lightning_quantdebug.fake_quantize import fake_quantize
from lightning_quantdebug.learned_scale import SMALLEST_RATIO, LearnedScale, scale_gradients
from lightning_quantdebug.quantizer import Quantizer
from lightning_quantdebug.target import Granularity, Kind, Mode, QuantSpec
from tests.faulty_quantizers import Correct


def made(bits: int = 4, symmetric: bool = False, low: float = -1.0, high: float = 2.0) -> Encoding:
    return encoding_from_range(torch.tensor(low), torch.tensor(high), QuantSpec(bits, symmetric=symmetric))


def per_channel(x: Tensor, axis: int, bits: int = 4) -> Encoding:
    ends = x.detach().float().transpose(0, axis).reshape(x.shape[axis], -1)
    spec = QuantSpec(bits, symmetric=True, granularity=Granularity.PER_CHANNEL)
    return encoding_from_range(0.7 * ends.amin(1), 0.7 * ends.amax(1), spec, axis)


def per_group(x: Tensor, size: int, bits: int = 4) -> Encoding:
    groups = x.detach().unfold(1, size, size)
    spec = QuantSpec(bits, symmetric=True, granularity=Granularity.PER_GROUP, group_size=size)
    return encoding_from_range(0.7 * groups.amin(-1), 0.7 * groups.amax(-1), spec, 0)


def asymmetric(x: Tensor, granularity: Granularity, bits: int) -> Encoding:
    """Groups are of four values."""
    size = 4 if granularity is Granularity.PER_GROUP else None
    spec = QuantSpec(bits, granularity=granularity, group_size=size)
    parts = {Granularity.PER_TENSOR: x.reshape(-1), Granularity.PER_CHANNEL: x}.get(granularity, x.unfold(1, 4, 4))
    axis = None if granularity is Granularity.PER_TENSOR else 0
    return encoding_from_range(0.7 * parts.amin(-1), 0.7 * parts.amax(-1), spec, axis)


def spread(value: Tensor, x: Tensor, encoding: Encoding) -> Tensor:
    """A value of each encoding for each element of the tensor."""
    if encoding.spec.group_size is not None:
        return value.repeat_interleave(encoding.spec.group_size, 1)
    if encoding.channel_axis is None:
        return value
    return value.reshape([-1 if axis == encoding.channel_axis else 1 for axis in range(x.ndim)])


def by_autograd(gradient: Tensor, x: Tensor, encoding: Encoding) -> tuple[Tensor, Tensor]:
    """Gradients for the input and the scale of the definition in float64, whose rounding is passed straight through."""
    values = x.detach().double().requires_grad_()
    scale = encoding.scale.double().clone().requires_grad_()
    low, high = (spread(end.double(), x, encoding) for end in (encoding.lowest_step, encoding.highest_step))
    steps = values / spread(scale, x, encoding)
    rounded = steps + (steps.round() - steps).detach()
    clipped = torch.where(rounded < low, low, torch.where(rounded > high, high, rounded))
    (clipped * spread(scale, x, encoding) * gradient.double()).sum().backward()
    assert values.grad is not None
    assert scale.grad is not None
    return values.grad, scale.grad


def check(gradient: Tensor, x: Tensor, encoding: Encoding, tolerance: float = 1e-5) -> None:
    found, expected = scale_gradients(gradient, x, encoding), by_autograd(gradient, x, encoding)
    assert found[0].shape == x.shape
    assert found[0].dtype == x.dtype
    assert found[1].shape == encoding.scale.shape
    # The twin multiplies by the scale and divides by it again.
    torch.testing.assert_close(found[0].double(), expected[0].to(x.dtype).double(), rtol=1e-14, atol=0)
    # Of a sum of random signs only the size of its parts says how exact it can be.
    parts = spread(encoding.highest_step.abs().max() * torch.ones_like(encoding.scale), x, encoding).double()
    size = float((gradient.double().abs() * parts).sum())
    torch.testing.assert_close(
        found[1].double(), expected[1], rtol=0, atol=tolerance * size / max(expected[1].numel(), 1)
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_a_tensor_with_one_scale(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(bits)
    x, gradient = 2 * torch.randn(5, 7, 3, dtype=dtype), torch.randn(5, 7, 3, dtype=dtype)
    check(gradient, x, made(bits, symmetric))


@pytest.mark.parametrize("count", [1, 63, 64, 65, 1000])
def test_blocks_add_up(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(learned_scale, "BLOCK_SIZE", 64)
    torch.manual_seed(count)
    check(torch.randn(count), 2 * torch.randn(count), made(4))


@pytest.mark.parametrize("lay", ["contiguous", "channels last", "transposed", "with gaps"])
@pytest.mark.parametrize("like", ["the input", "contiguous", "expanded"])
def test_any_layout_of_input_and_gradient(monkeypatch: pytest.MonkeyPatch, lay: str, like: str) -> None:
    monkeypatch.setattr(learned_scale, "BLOCK_SIZE", 50)
    torch.manual_seed(0)
    x = 2 * torch.randn(4, 6, 5, 5)
    x = {
        "contiguous": x,
        "channels last": x.contiguous(memory_format=torch.channels_last),
        "transposed": x.transpose(1, 2),
        "with gaps": (2 * torch.randn(4, 6, 5, 10))[..., ::2],
    }[lay]
    gradient = {
        "the input": torch.empty_like(x).copy_(torch.randn(x.shape)),
        "contiguous": torch.randn(x.shape),
        "expanded": torch.randn(1, 1, 1, 1).expand(x.shape),
    }[like]
    check(gradient, x, made(3))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3, 3)])
def test_gradients_of_each_channel(axis: int, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    check(torch.randn(shape), x, per_channel(x, axis))


def test_a_channel_for_each_value() -> None:
    x = torch.randn(6)
    check(torch.randn(6), x, per_channel(x, 0))


def test_gradients_of_each_group() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 16)
    check(torch.randn(3, 16), x, per_group(x, 4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_coarse_types_are_computed_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, gradient = (2 * torch.randn(64)).to(dtype), torch.randn(64).to(dtype)
    encoding = made(4)
    found, expected = scale_gradients(gradient, x, encoding), scale_gradients(gradient.float(), x.float(), encoding)
    assert found[0].dtype == dtype
    torch.testing.assert_close(found[0].float(), expected[0], rtol=0, atol=0)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_clipped_values_move_the_scale_by_the_end_of_the_grid(per: str) -> None:
    spec = QuantSpec(4, symmetric=True, granularity=Granularity.PER_CHANNEL if per == "channel" else "per_tensor")
    scale = torch.tensor(0.5) if per == "tensor" else torch.tensor([0.5, 0.5])
    encoding = Encoding(spec, scale, torch.zeros_like(scale), 0 if per == "channel" else None)
    x = torch.tensor([[100.0, 50.0], [-100.0, -50.0]])
    for_x, for_scale = scale_gradients(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), x, encoding)
    assert for_x.tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert for_scale.sum().item() == 7 * 3 - 8 * 7


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_many_bits_leave_no_noise_of_large_sums(bits: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(200_000).relu()
    gradient = torch.randn(200_000) + 0.3
    encoding = made(bits, low=0.0, high=float(x.max()))
    # In steps as the forward has them, in float32; float64 would round some the other way.
    steps = x / encoding.scale
    assert float(steps.round().max()) <= float(encoding.highest_step)
    expected = float(((steps.round() - steps).double() * gradient.double()).sum())
    assert float(scale_gradients(gradient, x, encoding)[1]) == pytest.approx(expected, rel=2e-3)


def test_infinite_values_are_clipped() -> None:
    x, gradient = torch.tensor([0.4, -math.inf, math.inf, 1.0]), torch.ones(4)
    encoding = made(4)
    for_x, for_scale = scale_gradients(gradient, x, encoding)
    assert for_x.tolist() == [1.0, 0.0, 0.0, 1.0]
    inside = scale_gradients(torch.ones(2), x[[0, 3]], encoding)[1]
    assert float(for_scale) == pytest.approx(float(inside) + 10 - 5, rel=1e-6)


def test_what_is_on_the_grid_moves_the_scale_by_nothing() -> None:
    encoding = Encoding(QuantSpec(4), torch.tensor(0.5), torch.tensor(5.0))
    x = 0.5 * torch.arange(-5.0, 11.0)
    for_x, for_scale = scale_gradients(torch.ones(16), x, encoding)
    assert for_x.tolist() == [1.0] * 16
    assert for_scale.item() == 0.0


@pytest.mark.parametrize("granularity", [Granularity.PER_CHANNEL, Granularity.PER_GROUP])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_asymmetric_grids_each_with_its_own_zero_point(granularity: Granularity, bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(bits)
    x = torch.randn(3, 12, dtype=dtype) + torch.tensor([[-0.5], [0.0], [0.5]], dtype=dtype)
    check(torch.randn(3, 12, dtype=dtype), x, asymmetric(x, granularity, bits))


@pytest.mark.parametrize("size", [0.0, 0.3, 1e4])
@pytest.mark.parametrize("granularity", list(Granularity))
def test_none_and_all_clipped(size: float, granularity: Granularity) -> None:
    torch.manual_seed(0)
    signs = torch.tensor([1.0, -1.0]).repeat(3, 6)
    encoding = asymmetric(signs * (torch.rand(3, 12) + 0.5), granularity, 4)
    x, gradient = size * signs, torch.randn(3, 12)
    for_x, _ = scale_gradients(gradient, x, encoding)
    assert torch.equal(for_x, torch.zeros(3, 12) if size > 1 else gradient)
    check(gradient, x, encoding)


@pytest.mark.parametrize("granularity", list(Granularity))
def test_without_a_gradient_nothing_moves(granularity: Granularity) -> None:
    x = 3 * torch.randn(3, 12)
    encoding = asymmetric(x / 2, granularity, 4)
    for_x, for_scale = scale_gradients(torch.zeros(3, 12), x, encoding)
    assert torch.equal(for_x, torch.zeros(3, 12))
    assert torch.equal(for_scale, torch.zeros_like(encoding.scale))


@pytest.mark.parametrize("granularity", [Granularity.PER_CHANNEL, Granularity.PER_GROUP])
def test_a_nan_shows_in_its_own_scale_alone(granularity: Granularity) -> None:
    torch.manual_seed(0)
    x, gradient = torch.randn(3, 12), torch.randn(3, 12)
    encoding = asymmetric(x, granularity, 4)
    x[1, 5] = math.nan
    for_x, for_scale = scale_gradients(gradient, x, encoding)
    assert for_x[1, 5] == gradient[1, 5]
    assert for_scale.isnan().flatten().nonzero().flatten().tolist() == [1 if for_scale.ndim == 1 else 4]


def test_a_nan_of_one_block_lets_its_own_gradient_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_scale, "BLOCK_SIZE", 4)
    x, gradient = torch.tensor([0.3] * 6 + [math.nan] + [9.0] * 3), torch.randn(10)
    for_x, for_scale = scale_gradients(gradient, x, made())
    assert for_x.tolist() == [*gradient[:7].tolist(), 0.0, 0.0, 0.0]
    assert for_scale.isnan()


@pytest.mark.parametrize("value", [0.33, 9.0, -9.0])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_tensor_without_axes(value: float, symmetric: bool) -> None:
    check(torch.tensor(1.5), torch.tensor(value), made(4, symmetric))


def test_channels_without_values() -> None:
    encoding = asymmetric(torch.randn(3, 12), Granularity.PER_CHANNEL, 4)
    for_x, for_scale = scale_gradients(torch.ones(3, 0), torch.ones(3, 0), encoding)
    assert for_x.shape == (3, 0)
    assert for_scale.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_mask_is_that_of_fake_quantization_at_the_ends_of_the_grid(dtype: torch.dtype) -> None:
    for symmetric in (False, True):
        encoding = made(4, symmetric)
        for step in (encoding.lowest_step, encoding.highest_step):
            middle = (step + 0.5 * step.sign()).to(dtype) * encoding.scale.to(dtype)
            x = (middle + torch.arange(-20, 21) * (middle.abs() * torch.finfo(dtype).eps / 2)).requires_grad_()
            gradient = torch.randn(41, dtype=dtype)
            (expected,) = torch.autograd.grad(fake_quantize(x, encoding), x, gradient)
            assert torch.equal(scale_gradients(gradient, x.detach(), encoding)[0], expected)
            assert 0 < int((expected == 0).sum()) < 41


def test_a_parameter_and_a_view_of_it_get_the_same_gradient() -> None:
    torch.manual_seed(0)
    weight, gradient = nn.Parameter(torch.randn(30, 7)), torch.randn(30, 7)
    one, other = LearnedScale(made()), LearnedScale(made())
    one(weight, False).mul(gradient).sum().backward()
    view = weight.detach().view(30, 7).requires_grad_()
    other(view, False).mul(gradient).sum().backward()
    assert torch.equal(weight.grad, view.grad)
    torch.testing.assert_close(one.ratio.grad, other.ratio.grad)


def test_nan_shows_and_empty_tensors_pass() -> None:
    x = torch.tensor([math.nan, 1.0])
    assert math.isnan(scale_gradients(torch.ones(2), x, made())[1].item())
    for_x, for_scale = scale_gradients(torch.ones(0, 3), torch.ones(0, 3), made())
    assert for_x.shape == (0, 3)
    assert for_scale.item() == 0.0
    assert scale_gradients(torch.tensor(1.0), torch.tensor(0.33), made())[0].item() == 1.0


@pytest.mark.parametrize("rows", [4, 400])
@pytest.mark.parametrize(("symmetric", "levels"), [(True, 7), (False, 10)])
def test_the_gradient_scale_is_that_of_the_paper(rows: int, symmetric: bool, levels: int) -> None:
    # -1 to 2 at 4 bits: zero is level 5 of 15, so that the farther end is 10 steps away; a symmetric grid has 7.
    torch.manual_seed(0)
    x, gradient, encoding = torch.randn(rows, 6), torch.randn(rows, 6), made(4, symmetric)
    scale = LearnedScale(encoding)
    (scale(x, per_sample=True) * gradient).sum().backward()
    assert scale.count == 6
    expected = scale_gradients(gradient, x, encoding)[1] / encoding.scale / math.sqrt(6 * levels)
    torch.testing.assert_close(scale.ratio.grad, expected)


def test_of_weights_all_values_of_a_channel_share_the_scale() -> None:
    weight = torch.randn(6, 4, 3, 3)
    scale = LearnedScale(per_channel(weight, 0))
    scale(weight, per_sample=False).sum().backward()
    assert scale.count == 36
    assert scale.gradient_scale() == pytest.approx(1 / math.sqrt(36 * 7))


@pytest.mark.parametrize("granularity", list(Granularity))
def test_the_farther_end_of_any_grid_counts(granularity: Granularity) -> None:
    x = torch.tensor([[-3.0, 1.0, 2.0, 0.0], [-1.0, 14.0, 0.0, 0.0]])
    encoding = asymmetric(x, granularity, 4)
    farther = max(float(encoding.highest_step.max()), -float(encoding.lowest_step.min()))
    scale = LearnedScale(encoding)
    scale(x, per_sample=False)
    count = 8 if granularity is Granularity.PER_TENSOR else 4
    assert farther > 8
    assert (scale.count, scale.gradient_scale()) == (count, pytest.approx(1 / math.sqrt(count * farther)))


@pytest.mark.parametrize(
    ("shape", "per_sample", "count"),
    [((5,), True, 1), ((5,), False, 5), ((), True, 1), ((2, 3, 4), True, 12), ((0, 3), True, 1), ((0, 3), False, 1)],
)
def test_values_that_share_a_scale(shape: tuple[int, ...], per_sample: bool, count: int) -> None:
    scale = LearnedScale(made())
    assert scale.count is None
    with torch.no_grad():
        scale(torch.ones(shape), per_sample)
    assert scale.count == count
    scale(torch.ones(7, 9), per_sample)
    assert scale.count == count


def test_the_grid_of_weights_counts_their_channels_and_groups_apart() -> None:
    weight = torch.randn(6, 12)
    counts = []
    for encoding in (per_channel(weight, 0), per_channel(weight, 1), per_group(weight, 4), made()):
        scale = LearnedScale(encoding)
        assert scale.ratio.shape == encoding.scale.shape
        scale(weight, per_sample=False).sum().backward()
        assert scale.ratio.grad.shape == encoding.scale.shape
        expected = scale_gradients(torch.ones_like(weight), weight, encoding)[1] / encoding.scale
        torch.testing.assert_close(scale.ratio.grad, expected * scale.gradient_scale())
        counts.append(scale.count)
    assert counts == [12, 6, 4, 72]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_gradient_of_the_input_is_that_of_fake_quantization(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    gradient = torch.randn(4, 20, dtype=dtype)
    one, other = ((2 * torch.randn(4, 20)).to(dtype).requires_grad_() for _ in range(2))
    other.data.copy_(one.data)
    scale = LearnedScale(made())
    with torch.no_grad():
        scale.ratio.mul_(0.8)
    scale(one, True).mul(gradient).sum().backward()
    fake_quantize(other, scale.encoding).mul(gradient).sum().backward()
    assert torch.equal(one.grad, other.grad)
    assert scale.ratio.grad.dtype == torch.float32


def test_inside_a_transform_the_input_gets_the_straight_through_gradient() -> None:
    scale, x = LearnedScale(made()), 2 * torch.randn(3, 5)
    found = torch.func.grad(lambda value: (scale(value, True) * 3).sum())(x)
    assert torch.equal(found, 3 * scale_gradients(torch.ones_like(x), x, made())[0])
    assert torch.equal(torch.func.vmap(lambda row: scale(row, False))(x), fake_quantize(x, made()))


def test_without_gradients_no_graph_is_kept() -> None:
    scale = LearnedScale(made())
    with torch.no_grad():
        assert scale(torch.randn(2, 3), True).grad_fn is None
    assert scale(torch.randn(2, 3), True).requires_grad


def test_two_runs_are_equal_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learned_scale, "BLOCK_SIZE", 64)
    torch.manual_seed(0)
    x, gradient = 2 * torch.randn(10, 50), torch.randn(10, 50)
    found = []
    for _ in range(2):
        scale = LearnedScale(made())
        scale(x, True).mul(gradient).sum().backward()
        found.append(scale.ratio.grad)
    assert torch.equal(found[0], found[1])


def test_the_result_is_that_of_fake_quantization_with_the_scale_of_now() -> None:
    x, encoding = torch.randn(3, 50), made(4)
    scale = LearnedScale(encoding)
    assert torch.equal(scale(x, True), fake_quantize(x, encoding))
    with torch.no_grad():
        scale.ratio.mul_(1.25)
    moved = Encoding(encoding.spec, encoding.scale * 1.25, encoding.zero_point)
    assert torch.equal(scale(x, True), fake_quantize(x, moved))
    assert torch.equal(scale(x, True), scale(x.clone().requires_grad_(), True))
    with torch.no_grad():
        assert torch.equal(scale(x, True), fake_quantize(x, moved))
    assert not scale(x, True).detach().requires_grad


def test_an_encoding_is_made_once_for_each_change() -> None:
    scale = LearnedScale(made())
    first = scale.encoding
    assert scale.encoding is first
    with torch.no_grad():
        scale.ratio.mul_(2.0)
    assert scale.encoding is not first
    assert (scale.encoding.lowest_step, scale.encoding.num_levels) == (first.lowest_step, first.num_levels)
    assert scale.encoding.unclipped_float32 == pytest.approx([2 * end for end in first.unclipped_float32])
    assert scale.encoding.arithmetic[0] == pytest.approx(2 * first.arithmetic[0])


def test_sgd_moves_the_scale_as_the_paper_does() -> None:
    torch.manual_seed(0)
    data = [(torch.randn(8, 5), torch.randn(8, 5)) for _ in range(20)]
    start = made(4)
    scale = LearnedScale(start)
    optimizer = torch.optim.SGD([scale.ratio], lr=0.05, momentum=0.9)
    own, momentum = float(start.scale), 0.0
    for x, gradient in data:
        optimizer.zero_grad()
        (scale(x, True) * gradient).sum().backward()
        optimizer.step()
        encoding = Encoding(start.spec, torch.tensor(own), start.zero_point)
        slope = float(by_autograd(gradient, x, encoding)[1]) / math.sqrt(5 * 10)
        momentum = 0.9 * momentum + slope
        own -= 0.05 * momentum
    assert own != pytest.approx(float(start.scale), rel=0.05)
    assert float(scale.encoding.scale) == pytest.approx(own, rel=1e-3)


def test_sgd_moves_the_scale_of_each_channel_as_the_paper_does() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 8) * torch.tensor([[0.01], [1.0], [100.0]])
    start = per_channel(weight, 0)
    scale = LearnedScale(start)
    # Each scale has steps of its own size, as the paper's s has: the twin's are those of the paper, in float64.
    optimizer = torch.optim.SGD([scale.ratio], lr=1e-3, momentum=0.9, nesterov=True)
    own = start.scale.double().clone().requires_grad_()
    paper = torch.optim.SGD([own], lr=1e-3, momentum=0.9, nesterov=True)
    low, high = (spread(end.double(), weight, start) for end in (start.lowest_step, start.highest_step))
    for _ in range(6):
        gradient = torch.randn(3, 8)
        optimizer.zero_grad()
        (scale(weight, False) * gradient).sum().backward()
        optimizer.step()
        paper.zero_grad()
        steps = weight.double() / own[:, None]
        rounded = (steps + (steps.round() - steps).detach()).clamp(low, high)
        (rounded * own[:, None] * gradient.double()).sum().backward()
        # The ratio moves by dL/ds / s_0, so that s moves by dL/ds.
        own.grad.div_(math.sqrt(8 * 7))
        paper.step()
        torch.testing.assert_close(scale.encoding.scale.double(), own.detach(), rtol=1e-4, atol=0)
    assert float((own.detach() / start.scale - 1).abs().max()) > 0.05


@pytest.mark.parametrize("foreach", [False, True])
def test_a_step_of_an_optimizer_is_seen(foreach: bool) -> None:
    scale, x = LearnedScale(made()), torch.full((1, 3), 9.0)
    before = scale(x, True)
    before.sum().backward()
    torch.optim.Adam([scale.ratio], lr=0.01, foreach=foreach).step()
    torch.testing.assert_close(scale(x, True), 0.99 * before)


def test_adam_moves_every_scale_by_the_same_share() -> None:
    scales = [LearnedScale(made(4, low=-width, high=2 * width)) for width in (1e-3, 1.0, 1e3)]
    optimizer = torch.optim.Adam([scale.ratio for scale in scales], lr=0.01, eps=0)
    for scale, width in zip(scales, (1e-3, 1.0, 1e3), strict=True):
        scale(width * torch.tensor([[0.3, 9.0]]), True).sum().backward()
    optimizer.step()
    assert [scale.ratio.item() for scale in scales] == pytest.approx([0.99] * 3)


def test_no_step_turns_a_scale_negative_and_the_next_can_bring_it_back() -> None:
    scale = LearnedScale(made(4))
    with torch.no_grad():
        scale.ratio.fill_(-3.0)
    assert float(scale.encoding.scale) == pytest.approx(float(scale.start.scale) * SMALLEST_RATIO)
    x = torch.full((1, 4), 5.0)
    scale(x, True).sum().backward()
    assert float(scale.ratio.grad) > 0


def test_an_absurd_step_is_made_good_by_the_next_ones() -> None:
    torch.manual_seed(0)
    scale, x = LearnedScale(made(4)), torch.rand(4, 20) * 3 - 1
    with torch.no_grad():
        scale.ratio.fill_(-0.5)
    optimizer = torch.optim.Adam([scale.ratio], lr=0.05)
    errors = []
    for _ in range(100):
        optimizer.zero_grad()
        error = (scale(x, True) - x).square().sum()
        error.backward()
        optimizer.step()
        errors.append(float(error))
        assert float(scale.encoding.scale) >= float(scale.start.scale) * SMALLEST_RATIO
    assert scale.ratio.item() == pytest.approx(1.0, abs=0.3)
    assert errors[-1] < 0.02 * errors[0]


def test_training_goes_on_from_a_ratio() -> None:
    scale, version = LearnedScale(made()), LearnedScale(made()).version
    ratio = torch.tensor(1.7)
    first = scale.encoding
    scale.load(ratio, 33)
    assert scale.version > version
    assert scale.encoding is not first
    assert (scale.count, scale.ratio.item(), scale.ratio.requires_grad) == (33, pytest.approx(1.7), True)
    assert torch.equal(scale.encoding.scale, made().scale * 1.7)
    scale(torch.ones(4, 5), True).sum().backward()
    assert scale.count == 33
    with torch.no_grad():
        scale.ratio.add_(1.0)
    assert float(ratio) == pytest.approx(1.7)


def test_a_scale_that_is_used_twice_gets_both_gradients() -> None:
    x = torch.randn(4, 6)
    once, twice = LearnedScale(made()), LearnedScale(made())
    once(x, True).sum().backward()
    (twice(x, True) + 2 * twice(x, True)).sum().backward()
    torch.testing.assert_close(twice.ratio.grad, 3 * once.ratio.grad)


def test_later_in_place_operations_do_no_harm() -> None:
    x = torch.randn(4, 6, requires_grad=True)
    one, other = LearnedScale(made()), LearnedScale(made())
    one(x, True).add_(1.0).mul_(2.0).sum().backward()
    ((other(x, True) + 1.0) * 2.0).sum().backward()
    torch.testing.assert_close(one.ratio.grad, other.ratio.grad)


def test_made_under_inference_mode_it_can_be_trained() -> None:
    with torch.inference_mode():
        scale = LearnedScale(made())
        assert torch.equal(scale(torch.ones(1, 2), True), fake_quantize(torch.ones(1, 2), made()))
    scale(torch.randn(2, 3), True).sum().backward()
    assert scale.ratio.grad is not None


def test_only_float_tensors() -> None:
    with pytest.raises(SettingsError, match="Only float tensors"):
        LearnedScale(made())(torch.ones(2, dtype=torch.complex64), True)


# In a quantizer.


def quantizer(**settings: Any) -> Quantizer:
    found = Quantizer("q", Kind.ACTIVATION, QuantSpec(4), **settings)
    found.encoding = made()
    found.mode = Mode.QUANTIZE
    return found


def test_a_quantizer_learns_and_settles() -> None:
    found = quantizer()
    before, version = found.encoding, found.version
    learned = found.learn()
    assert found.learned is learned
    with torch.no_grad():
        learned.ratio.mul_(1.5)
    assert found.version > version
    assert found.encoding is learned.encoding
    x = torch.randn(3, 4)
    moved = found(x)
    found.settle()
    assert found.learned is None
    assert float(found.encoding.scale) == pytest.approx(1.5 * float(before.scale))
    assert torch.equal(found(x), moved)
    found.settle()
    assert torch.equal(found(x), moved)


def test_another_encoding_ends_learning() -> None:
    found = quantizer()
    found.learn()
    found.encoding = made(4, low=-2.0)
    assert found.learned is None
    assert found.encoding.scale == made(4, low=-2.0).scale


ENDS: dict[str, Callable[[Quantizer], Any]] = {
    "bit-width": lambda found: found.set_bit_width(3),
    "range": lambda found: found.set_range(),
    "reset": lambda found: found.reset(),
    "other grid": lambda found: found.respecify(QuantSpec(5, range_setting="min_max"), None),
    "no encoding": lambda found: setattr(found, "encoding", None),
}


@pytest.mark.parametrize("way", sorted(ENDS))
def test_a_new_range_ends_learning(way: str) -> None:
    found = Quantizer("q", Kind.ACTIVATION, QuantSpec(4, range_setting="min_max"))
    found.observe(torch.tensor([-1.0, 2.0]))
    found.set_range()
    version = found.version
    with torch.no_grad():
        found.learn().ratio.mul_(1.5)
    ENDS[way](found)
    assert found.learned is None
    assert found.version > version
    assert found.encoding is None or float(found.encoding.scale) == pytest.approx(3 / (2**found.bit_width - 1))


@pytest.mark.parametrize("kind", [Kind.ACTIVATION, Kind.WEIGHT])
def test_only_activations_have_samples(kind: Kind) -> None:
    found = Quantizer("q", kind, QuantSpec(4))
    found.encoding = made()
    learned = found.learn()
    found.quantized(torch.ones(5, 3))
    assert learned.count == (3 if kind is Kind.ACTIVATION else 15)


def test_a_quantizer_that_learns_heeds_its_mode_and_spares_its_input() -> None:
    found, x = quantizer(), torch.randn(3, 4)
    learned, before = found.learn(), x.clone()
    assert found.is_calibrated
    with torch.no_grad():
        assert not torch.equal(found(x, overwrite=True), x)
    assert torch.equal(x, before)
    found.mode = Mode.BYPASS
    assert found(x) is x
    found.mode = Mode.QUANTIZE
    found(x).sum().backward()
    assert learned.ratio.grad is not None
    assert found.encoding is learned.encoding


def test_a_frozen_encoding_can_be_learned_and_stays_frozen() -> None:
    found = quantizer()
    found.freeze()
    found.learn()
    found.reset()
    assert found.learned is not None
    found.settle()
    assert found.frozen


def test_a_state_has_the_scale_of_its_moment() -> None:
    found = quantizer()
    learned = found.learn()
    with torch.no_grad():
        learned.ratio.mul_(1.5)
    state = found.state()
    with torch.no_grad():
        learned.ratio.mul_(1.5)
    version = found.version
    found.restore(state)
    assert float(found.encoding.scale) == pytest.approx(1.5 * float(made().scale))
    assert found.learned is None
    assert found.version != version


def test_what_can_not_be_learned_is_refused() -> None:
    fixed, custom, wide = quantizer(fixed_range=(0.0, 1.0)), quantizer(factory=Correct), quantizer()
    wide.set_bit_width(32)
    empty = Quantizer("q", Kind.ACTIVATION, QuantSpec(4))
    for found in (fixed, custom, wide, empty):
        assert not found.is_learnable
        with pytest.raises(CaptureError, match="can not be trained"):
            found.learn()
    assert quantizer().is_learnable


def test_weights_are_quantized_anew_after_each_change_of_their_scale() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.randn(2, 3, 6, 6)
    with instrument(model, x, "w4a8") as session, torch.no_grad():
        session.calibrate([x])
        session.set_mode("quantize", kind="weight")
        before = model(x)
        learned = session.quantizers["0.weight"].learn()
        assert torch.equal(model(x), before)
        learned.ratio.mul_(1.3)
        after = model(x)
        assert not torch.equal(after, before)
        assert torch.equal(model(x), after)


def test_a_scale_of_a_folded_weight_is_trained_and_seen_while_its_normalization_trains() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.randn(2, 3, 6, 6)
    with instrument(model, x, "w4a8") as session:
        session.calibrate([x])
        session.set_mode("quantize", kind="weight")
        learned = session.quantizers["0.weight"].learn()
        model.train()
        outputs = []
        for _ in range(2):
            out = model(x)
            out.square().sum().backward()
            assert learned.ratio.grad.shape == (4,)
            assert bool((learned.ratio.grad != 0).all())
            outputs.append(out.detach())
            with torch.no_grad():
                learned.ratio.mul_(1.3)
        assert not torch.allclose(outputs[0], outputs[1])


def test_a_linear_layer_computes_with_the_scale_of_now() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 4)).eval(), torch.randn(3, 6)
    with instrument(model, x, "w4a8") as session, torch.no_grad():
        session.calibrate([x])
        session.set_mode("quantize", kind="weight")
        found = session.quantizers["0.weight"]
        learned = found.learn()
        for factor in (1.0, 1.3, 0.7):
            learned.ratio.mul_(factor)
            start = learned.start
            now = Encoding(start.spec, start.scale * learned.ratio, start.zero_point, start.channel_axis)
            expected = nn.functional.linear(x, fake_quantize(model[0].weight, now), model[0].bias)
            torch.testing.assert_close(model(x), expected)
        last = model(x)
        found.settle()
        assert torch.equal(model(x), last)


@pytest.mark.parametrize("training", [False, True])
def test_gradients_through_a_network_are_those_of_the_definition(training: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double().train(training)
    x = torch.randn(4, 6, dtype=torch.float64)
    with instrument(model, x, "w3a4_per_tensor") as session:
        session.calibrate([x])
        session.set_mode("quantize")
        learned = {name: item.learn() for name, item in session.quantizers.items()}
        model(x).square().sum().backward()
        scales = {name: item.encoding.scale.double().clone().requires_grad_() for name, item in learned.items()}
        ends = {name: (item.encoding.lowest_step, item.encoding.highest_step) for name, item in learned.items()}

    def definition(value: Tensor, name: str) -> Tensor:
        steps = value / scales[name]
        rounded = steps + (steps.round() - steps).detach()
        low, high = (end.double() for end in ends[name])
        clipped = torch.where(rounded < low, low, torch.where(rounded > high, high, rounded))
        return clipped * scales[name]

    twin = copy.deepcopy(model)
    twin.zero_grad()
    hidden = definition(x, "input") @ definition(twin[0].weight, "0.weight").T + twin[0].bias
    hidden = definition(hidden.relu(), "1")
    out = definition(hidden @ definition(twin[2].weight, "2.weight").T + twin[2].bias, "2")
    out.square().sum().backward()
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-6, atol=1e-9)
    for name, item in learned.items():
        unit = item.gradient_scale() / float(item.start.scale)
        assert float(item.ratio.grad) == pytest.approx(float(scales[name].grad) * unit, rel=1e-4, abs=1e-6)

"""Fake-quantize against a slow float64 twin, torch's own kernels and autograd."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from lightning_quantdebug.encoding import Encoding, encoding_from_range
from lightning_quantdebug.errors import SettingsError
from lightning_quantdebug.fake_quantize import BLOCK_SIZE, dense_view, fake_quantize, fake_quantize_
from lightning_quantdebug.target import Granularity, QuantSpec

PER_CHANNEL = Granularity.PER_CHANNEL


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def slow_fake_quantize(x: np.ndarray, scale: float, zero_point: int, quant_min: int, quant_max: int) -> np.ndarray:
    """The definition, one value after the other: the quotient in float32, all else in float64."""
    result = np.empty(x.shape)
    for index, value in np.ndenumerate(x):
        quotient = np.float64(np.float32(value) / np.float32(scale))
        integer = min(max(np.rint(quotient) + zero_point, quant_min), quant_max)
        result[index] = value if np.isnan(value) else (integer - zero_point) * np.float64(np.float32(scale))
    return result


def random_encoding(spec: QuantSpec, generator: torch.Generator, shape: tuple[int, ...] = ()) -> Encoding:
    scale = torch.rand(shape, generator=generator).mul(8).sub(6).exp()
    zero_point = torch.zeros(shape)
    if not spec.symmetric:
        zero_point = torch.randint(spec.quant_max + 1, shape, generator=generator).float()
    axis = None if spec.granularity is Granularity.PER_TENSOR else 0
    return Encoding(spec, scale, zero_point, axis)


def values_around(encoding: Encoding, count: int, generator: torch.Generator) -> torch.Tensor:
    """Values on both sides of the grid, some of them exactly halfway between two levels."""
    span = encoding.num_levels * encoding.scale
    x = torch.rand(count, generator=generator).mul(2).sub(1) * span
    ties = torch.randint(-encoding.num_levels, encoding.num_levels, (count // 10,), generator=generator) + 0.5
    x[: count // 10] = ties * encoding.scale
    return x


@pytest.mark.parametrize("bit_width", [2, 3, 4])
@pytest.mark.parametrize("scale", [0.25, 0.1, 3.0])
def test_whole_small_grids_equal_the_slow_twin(bit_width, scale):
    specs = [QuantSpec(bit_width), QuantSpec(bit_width, symmetric=True)]
    specs.append(QuantSpec(bit_width, symmetric=True, narrow_range=True))
    steps = np.arange(-2 * 2**bit_width, 2 * 2**bit_width + 0.01, 1 / 8)
    x = np.concatenate([steps * scale, [np.inf, -np.inf, np.nan, 0.0]]).astype(np.float32)
    for spec in specs:
        for zero_point in [0] if spec.symmetric else range(spec.quant_max + 1):
            encoding = Encoding(spec, torch.tensor(scale), torch.tensor(float(zero_point)))
            ours = fake_quantize(torch.from_numpy(x), encoding)
            slow = slow_fake_quantize(x, scale, zero_point, spec.quant_min, spec.quant_max)
            np.testing.assert_array_equal(ours.numpy(), slow.astype(np.float32))
            levels = np.unique(ours.numpy()[:-2] + 0.0)
            assert len(levels) == encoding.num_levels
            assert levels[0] == encoding.range_min.item()
            assert levels[-1] == encoding.range_max.item()
            assert 0.0 in levels


def assert_differs_only_at_ties(ours: torch.Tensor, kernel: torch.Tensor, x: torch.Tensor, scale: torch.Tensor) -> int:
    """Every difference is one step, at a value halfway between two levels as exactly as float32 tells."""
    wrong = ours != kernel
    scale = scale.expand_as(x)[wrong].double()
    quotient = x[wrong].double() / scale
    assert ((quotient - quotient.floor() - 0.5).abs() <= 2.0**-23 * quotient.abs()).all()
    step = (ours[wrong].double() - kernel[wrong].double()).abs()
    assert ((step - scale).abs() <= 2.0**-23 * x[wrong].abs()).all()
    return int(wrong.sum())


@pytest.mark.parametrize("symmetric", [False, True])
def test_per_tensor_equals_torch_but_for_ties(symmetric):
    generator = torch.Generator().manual_seed(1)
    different = 0
    for case in range(300):
        encoding = random_encoding(QuantSpec(2 + case % 15, symmetric=symmetric), generator)
        x = values_around(encoding, 2000, generator)
        kernel = torch.fake_quantize_per_tensor_affine(
            x, encoding.scale, encoding.zero_point.int(), encoding.spec.quant_min, encoding.spec.quant_max
        )
        different += assert_differs_only_at_ties(fake_quantize(x, encoding), kernel, x, encoding.scale)
    assert 0 < different < 300 * 200  # of the planted ties only some, and of the 540,000 other values none


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("axis", [0, 1, 3])
def test_per_channel_equals_torch_but_for_ties(symmetric, axis):
    generator = torch.Generator().manual_seed(2)
    for case in range(30):
        spec = QuantSpec(2 + case % 15, symmetric=symmetric, granularity=PER_CHANNEL)
        shape = [6, 5, 4, 3]
        encoding = random_encoding(spec, generator, (shape[axis],))
        encoding = Encoding(spec, encoding.scale, encoding.zero_point, axis)
        broadcast = encoding.scale.view([-1 if i == axis else 1 for i in range(4)])
        x = torch.rand(shape, generator=generator).mul(2).sub(1) * broadcast * encoding.num_levels
        kernel = torch.fake_quantize_per_channel_affine(
            x, encoding.scale, encoding.zero_point, axis, spec.quant_min, spec.quant_max
        )
        assert_differs_only_at_ties(fake_quantize(x, encoding), kernel, x, broadcast)


def test_ties_follow_division_as_onnx_quantize_linear():
    x, scale = torch.tensor([0.35]), torch.tensor(0.1)  # 0.35 / 0.1 is 3.5 in float32 and rounds to 4, evenly
    ours = fake_quantize(x, Encoding(QuantSpec(8), scale, torch.tensor(0.0)))
    assert ours.item() == pytest.approx(np.rint(np.float32(0.35) / np.float32(0.1)) * 0.1)


@pytest.mark.parametrize("bit_width", [2, 4, 8])
def test_per_group_is_per_tensor_for_each_group(bit_width):
    generator = torch.Generator().manual_seed(3)
    spec = QuantSpec(bit_width, granularity=Granularity.PER_GROUP, group_size=3)
    encoding = random_encoding(spec, generator, (4, 5))
    x = torch.randn(4, 15, generator=generator) * 5
    for weight in (x, x.T.contiguous().T):
        ours = fake_quantize(weight, encoding)
        for row in range(4):
            for group in range(5):
                place = (row, slice(3 * group, 3 * group + 3))
                scale, zero_point = encoding.scale[row, group], encoding.zero_point[row, group]
                alone = Encoding(QuantSpec(bit_width), scale, zero_point)
                assert torch.equal(ours[place], fake_quantize(x[place], alone))


def definition_gradient(x: torch.Tensor, encoding: Encoding, scale: torch.Tensor, zero: torch.Tensor) -> torch.Tensor:
    """Autograd of the float64 definition: rounding is passed straight through, clamping is differentiated."""
    x = x.detach().double().requires_grad_()
    quotient = x / scale.double()
    rounded = quotient + (quotient.round() - quotient).detach()
    clipped = (rounded + zero).clamp(encoding.spec.quant_min, encoding.spec.quant_max)
    (gradient,) = torch.autograd.grad(((clipped - zero) * scale.double()).sum(), x)
    return gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("granularity", list(Granularity))
def test_gradient_is_autograd_of_the_definition_and_torch_mask(dtype, symmetric, granularity):
    generator = torch.Generator().manual_seed(4)
    for case in range(20):
        size = 4 if granularity is Granularity.PER_GROUP else None
        spec = QuantSpec(2 + case % 7, symmetric=symmetric, granularity=granularity, group_size=size)
        shape = {Granularity.PER_TENSOR: (), PER_CHANNEL: (6,), Granularity.PER_GROUP: (6, 10)}[granularity]
        encoding = random_encoding(spec, generator, shape)
        # Scales that are powers of two: all quotients, and so all ties, are exact in every dtype.
        encoding = Encoding(spec, encoding.scale.log2().round().exp2(), encoding.zero_point, encoding.channel_axis)
        expand = {0: lambda t: t, 1: lambda t: t[:, None], 2: lambda t: t.repeat_interleave(4, 1)}[len(shape)]
        scale, zero = expand(encoding.scale), expand(encoding.zero_point)
        quotient = torch.randint(-4 * encoding.num_levels, 4 * encoding.num_levels, (6, 40), generator=generator) / 4
        x = (quotient * scale).to(dtype).requires_grad_()
        incoming = torch.randn(6, 40, generator=generator).to(dtype)
        (gradient,) = torch.autograd.grad(fake_quantize(x, encoding), x, incoming)
        expected = definition_gradient(x, encoding, scale, zero)
        assert gradient.dtype == dtype
        assert torch.equal(gradient, (incoming.double() * expected).to(dtype))
        if granularity is Granularity.PER_TENSOR and dtype == torch.float32:
            kernel = torch.fake_quantize_per_tensor_affine(
                x, encoding.scale, encoding.zero_point.int(), spec.quant_min, spec.quant_max
            )
            assert torch.equal(gradient, torch.autograd.grad(kernel, x, incoming)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gradient_mask_is_that_of_the_forward_pass_for_any_scale(symmetric, dtype):
    generator = torch.Generator().manual_seed(5)
    for case in range(100):
        encoding = random_encoding(QuantSpec(2 + case % 15, symmetric=symmetric), generator)
        for step in (encoding.lowest_step, encoding.highest_step):
            middle = ((step + 0.5 * step.sign()) * encoding.scale).to(dtype)
            x = middle + torch.arange(-20, 21) * (middle.abs() * torch.finfo(dtype).eps / 2)
            steps = (x / encoding.scale).round()
            expected = (steps >= encoding.lowest_step) & (steps <= encoding.highest_step)
            x.requires_grad_()
            (gradient,) = torch.autograd.grad(fake_quantize(x, encoding).sum(), x)
            assert torch.equal(gradient, expected.to(dtype))


@pytest.mark.parametrize("axis", [None, 0])
def test_second_derivative_goes_through_the_mask(axis):
    spec = QuantSpec(4, symmetric=True, granularity=PER_CHANNEL if axis == 0 else Granularity.PER_TENSOR)
    encoding = encoding_from_range(*torch.tensor([[-1.0], [1.0]] if axis == 0 else [-1.0, 1.0]), spec, axis)
    x = torch.tensor([[0.5, 2.0]], requires_grad=True)
    y = torch.tensor([[3.0, 3.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(fake_quantize(x * y / 3, encoding).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), y)
    torch.testing.assert_close(second, torch.tensor([[1 / 3, 0.0]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("symmetric", [False, True])
def test_32_bits_change_nothing_but_the_last_digit(dtype, symmetric):
    generator = torch.Generator().manual_seed(6)
    for low, high in [(-1.0, 1.0), (0.0, 6.0), (-1e3, 1e-3), (-1e-3, 1e3), (-1e-6, 0.0)]:
        encoding = encoding_from_range(torch.tensor(low), torch.tensor(high), QuantSpec(32, symmetric=symmetric))
        x = torch.rand(10_000, generator=generator, dtype=dtype) * (high - low) + low
        x[:3] = torch.tensor([low, 0.0, high])
        x.clamp_(low, high)
        error = (fake_quantize(x, encoding) - x).abs()
        # Two roundings of float32 and, for values near 0, half a step of 2^-32 of the range.
        assert (error <= 2.4e-7 * x.abs() + 0.51 * encoding.scale).all()
        assert error.max() <= 1.3e-7 * max(-low, high)
        assert fake_quantize(x, encoding)[1] == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("granularity", [Granularity.PER_TENSOR, PER_CHANNEL])
@pytest.mark.parametrize("shape", [(3, 7), (3, BLOCK_SIZE), (700, 1001)])
def test_blocks_and_dtypes_compute_as_one_block_in_float32(dtype, granularity, shape):
    generator = torch.Generator().manual_seed(7)
    spec = QuantSpec(8, granularity=granularity)
    encoding = random_encoding(spec, generator, () if granularity is Granularity.PER_TENSOR else (shape[0],))
    scale, zero = encoding.scale.view(-1, 1), encoding.zero_point.view(-1, 1)
    x = (torch.randn(shape, generator=generator) * 100 * scale).to(dtype)
    before = x.clone()
    work = x if dtype == torch.float64 else x.float()
    expected = ((work / scale).round() + zero).clamp(0, 255).sub(zero).mul(scale).to(dtype)
    ours = fake_quantize(x, encoding)
    assert ours.dtype == dtype
    assert torch.equal(ours, expected)
    assert torch.equal(x, before)
    assert torch.equal(fake_quantize(x.clone().requires_grad_(), encoding), expected)


@pytest.mark.parametrize("size", [8, 96])
@pytest.mark.parametrize("granularity", [Granularity.PER_TENSOR, PER_CHANNEL])
def test_memory_format_is_kept_and_any_strides_are_right(size, granularity):
    generator = torch.Generator().manual_seed(8)
    encoding = random_encoding(
        QuantSpec(8, granularity=granularity), generator, () if granularity is Granularity.PER_TENSOR else (16,)
    )
    x = torch.randn(16, 3, size, size, generator=generator).mul_(20)
    expected = fake_quantize(x, encoding)
    channels_last = x.to(memory_format=torch.channels_last)
    ours = fake_quantize(channels_last, encoding)
    assert ours.stride() == channels_last.stride()
    assert torch.equal(ours, expected)
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    assert fake_quantize(transposed, encoding).stride() == transposed.stride()
    gaps = torch.stack([x, x + 1], -1)[..., 0]
    offset = torch.cat([x[:1], x])[1:]
    for strided in (transposed, gaps, offset):
        assert torch.equal(fake_quantize(strided, encoding), expected)
    row = x[:, :, :1].expand_as(x)
    assert torch.equal(fake_quantize(row, encoding), expected[:, :, :1].expand_as(x))


@pytest.mark.parametrize("shape", [(), (0,), (0, 3, 4), (1,)])
def test_empty_and_single_values(shape):
    encoding = encoding_from_range(torch.tensor(-1.0), torch.tensor(2.0), QuantSpec(4))
    x = torch.full(shape, 0.55, requires_grad=True)
    result = fake_quantize(x, encoding)
    assert result.shape == shape
    assert torch.equal(result, torch.full(shape, 0.6))
    assert torch.equal(torch.autograd.grad(result.sum(), x)[0], torch.ones(shape))


def test_nan_shows_and_infinity_is_clipped():
    encoding = encoding_from_range(torch.tensor(-1.0), torch.tensor(2.0), QuantSpec(4))
    big = torch.zeros(BLOCK_SIZE + 3)
    for x in (torch.zeros(3), big):
        x[-3:] = torch.tensor([float("nan"), float("inf"), -float("inf")])
        last = fake_quantize(x, encoding)[-3:]
        assert last[0].isnan()
        assert last[1:].tolist() == pytest.approx([2.0, -1.0])


@pytest.mark.parametrize("constant", [0.0, 1e-30, 5.0, -5.0, 3e38])
def test_constant_tensor_stays_what_it_is(constant):
    x = torch.full((4,), constant)
    result = fake_quantize(x, encoding_from_range(x.min(), x.max(), QuantSpec(8)))
    torch.testing.assert_close(result, x, rtol=5e-3, atol=1e-19)


@pytest.mark.filterwarnings("error")  # torch warns where it has to loop over the batch
def test_vmap_and_func_grad_agree_with_loops():
    encoding = encoding_from_range(torch.tensor(-1.0), torch.tensor(2.0), QuantSpec(4))
    x = torch.randn(3, BLOCK_SIZE + 1)
    assert torch.equal(torch.func.vmap(lambda row: fake_quantize(row, encoding))(x), fake_quantize(x, encoding))
    loss = torch.func.grad(lambda row: (fake_quantize(row, encoding) * 3).sum())
    expected = 3.0 * ((x / encoding.scale).round().clamp(-5, 10) == (x / encoding.scale).round())
    assert torch.equal(torch.func.vmap(loss)(x), expected)
    weight = torch.randn(5, requires_grad=True)  # not wrapped, but used inside a transform
    inside = torch.func.vmap(lambda row: fake_quantize(weight, encoding) * row[0])(x)
    assert torch.equal(inside, fake_quantize(weight, encoding) * x[:, :1])


class _Labelled(torch.Tensor):
    """A subclass, as users have them; it refuses to be written in place."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        assert func.__name__ not in ("div_", "round_", "clamp_", "mul_")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_subclass_is_kept_and_not_written_in_place():
    encoding = encoding_from_range(torch.tensor(-1.0), torch.tensor(2.0), QuantSpec(4))
    x = torch.randn(BLOCK_SIZE + 1)
    result = fake_quantize(x.as_subclass(_Labelled), encoding)
    assert isinstance(result, _Labelled)
    assert torch.equal(result.as_subclass(torch.Tensor), fake_quantize(x, encoding))


def test_inference_mode_and_trainable_afterwards():
    x = torch.randn(10)
    with torch.inference_mode():
        encoding = encoding_from_range(x.min(), x.max(), QuantSpec(8))
        inference = fake_quantize(x, encoding)
    trained = x.clone().requires_grad_()
    fake_quantize(trained, encoding).sum().backward()
    assert torch.equal(inference, fake_quantize(x, encoding))
    assert trained.grad is not None


@pytest.mark.parametrize(
    ("x", "order"),
    [
        (torch.arange(24).view(1, 2, 3, 4).to(memory_format=torch.channels_last), "memory"),
        (torch.arange(24).view(2, 3, 4).transpose(0, 2), "memory"),
        (torch.arange(6).expand(4, 6), None),
        (torch.arange(24).view(4, 6)[:, :3], None),
    ],
)
def test_dense_view_shares_memory_or_is_none(x, order):
    view = dense_view(x)
    if order is None:
        assert view is None
    else:
        assert view is not None
        assert view.data_ptr() == x.data_ptr()
        assert view.shape == (24,)


def test_integers_are_refused():
    encoding = encoding_from_range(torch.tensor(-1.0), torch.tensor(2.0), QuantSpec(4))
    with pytest.raises(SettingsError, match=re.escape("Only float tensors can be quantized (torch.float16,")):
        fake_quantize(torch.arange(3), encoding)


@pytest.mark.parametrize("shape", [(4, 3), (3,), ()])
def test_wrong_channels_are_refused(shape):
    encoding = Encoding(QuantSpec(8, granularity=PER_CHANNEL), torch.ones(5), torch.zeros(5), 1)
    message = f"The encoding has 5 channels along axis 1, got a tensor of shape {shape}"
    with pytest.raises(SettingsError, match=re.escape(message)):
        fake_quantize(torch.zeros(shape), encoding)


@pytest.mark.parametrize("shape", [(4, 7), (4, 8, 1), (3, 8), (4, 12)])
def test_wrong_groups_are_refused(shape):
    spec = QuantSpec(4, granularity=Granularity.PER_GROUP, group_size=4)
    encoding = Encoding(spec, torch.ones(4, 2), torch.zeros(4, 2), 0)
    with pytest.raises(SettingsError, match=re.escape("groups of 4 values, got a tensor of shape " + str(shape))):
        fake_quantize(torch.zeros(shape), encoding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (), (0, 3), (3, 5, 6, 4), (3, 400, 30, 20)])
@pytest.mark.parametrize("form", ["contiguous", "channels_last", "strided", "requires_grad"])
def test_writing_into_the_tensor_gives_the_same(dtype: torch.dtype, shape: tuple[int, ...], form: str) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    if form == "channels_last" and len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    elif form == "strided" and len(shape) > 1:
        x = x.transpose(0, 1)[:, ::2]
    encoding = encoding_from_range(torch.tensor(-1.0), torch.tensor(2.0), QuantSpec(4))
    expected = fake_quantize(x, encoding)
    target = (x.clone(memory_format=torch.preserve_format) if form != "strided" else x).requires_grad_(
        form == "requires_grad"
    )
    place, strides = target.data_ptr(), target.stride()
    result = fake_quantize_(target, encoding)
    assert result is target
    assert (target.data_ptr(), target.stride()) == (place, strides)
    assert torch.equal(target, expected)


def test_writing_into_a_tensor_per_channel() -> None:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(4, symmetric=True, granularity=Granularity.PER_CHANNEL)
    encoding = encoding_from_range(-torch.ones(3), torch.tensor([0.5, 1.0, 2.0]), spec, 0)
    expected = fake_quantize(x, encoding)
    assert torch.equal(fake_quantize_(x, encoding), expected)
    assert torch.equal(x, expected)

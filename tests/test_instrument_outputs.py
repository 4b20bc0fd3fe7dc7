"""What comes out of an instrumented network: every network of the zoo, every form of output, precision and memory."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lightning_quantdebug.instrument import instrument
from lightning_quantdebug.interception import exact_kernels
from lightning_quantdebug.model_loan import call_with
from lightning_quantdebug.operations import tensors_in
from lightning_quantdebug.recorder import plain_containers
from tests import zoo
from tests.grids import grid, quantized

torch.set_num_threads(1)


def tensors(output: Any) -> list[Tensor]:
    return [tensor for _, tensor in tensors_in((plain_containers(output),), {})]


@pytest.mark.parametrize("name", zoo.ZOO)
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
def test_bypassed_it_is_bit_identical_and_at_32_bits_equal(name: str, grad: bool) -> None:
    model, batch = zoo.make(name)
    with torch.set_grad_enabled(grad):
        with exact_kernels():
            plain = tensors(call_with(model, batch))
        with instrument(model, batch) as q:
            for got, wanted in zip(tensors(call_with(model, batch)), plain, strict=True):
                assert torch.equal(got, wanted)
            q.calibrate([batch])
            with q.bit_width(32), q.modes("quantize"):
                for got, wanted in zip(tensors(call_with(model, batch)), plain, strict=True):
                    assert (got - wanted).detach().norm() <= 1e-4 * wanted.detach().norm()
            q.set_mode("quantize")
            pairs = list(zip(tensors(call_with(model, batch)), plain, strict=True))
            assert all((got - wanted).detach().norm() < 0.3 * wanted.detach().norm() for got, wanted in pairs)
            assert any(not torch.equal(got, wanted) for got, wanted in pairs)
            assert q.coverage.unseen == ()


@pytest.mark.parametrize("name", zoo.ZOO)
def test_everything_that_runs_is_quantized_or_explained(name: str) -> None:
    model, batch = zoo.make(name)
    with instrument(model, batch) as q:
        q.calibrate([batch])
        explained = {item.name: item.reason for item in q.coverage.unquantized}
        assert all(reason for reason in explained.values())
        assert not any("never reached" in reason for reason in explained.values())
        for operation in q.topology:
            real = any(value.floating and not value.constant for value in operation.outputs)
            if real and operation.category.value not in ("not arithmetic", "creation of a constant", "random numbers"):
                assert operation.name in q.quantizers or operation.name in explained, operation.name
        for path, parameter in model.named_parameters():
            if parameter.ndim == 1:
                continue
            assert path in q.quantizers or path in explained or "parametrizations" in path, path


def test_a_dataclass_comes_back_as_it_is() -> None:
    model, batch = zoo.make("bert")
    with instrument(model, batch) as q:
        quantized(q, batch)
        output = model(**batch)
        assert isinstance(output, zoo.BertOutput)
        assert output.pooled is None
        assert isinstance(output.hidden, tuple)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor, *, scale: Tensor, names: list[str]) -> dict[str, Any]:
        y = self.layer(x) * scale
        return {"out": (y, [y + 1.0]), "names": names}


def test_keyword_arguments_and_nested_outputs() -> None:
    model = Nested()
    batch = {"x": torch.randn(3, 2), "scale": torch.rand(3, 1), "names": ["a"]}
    with torch.no_grad(), instrument(model, batch) as q:
        assert {"input.x", "input.scale"} <= set(q.quantizers)
        quantized(q, batch)
        output = model(**batch)
        assert output["names"] is batch["names"]
        assert torch.equal(output["out"][1][0], grid(q, "add", output["out"][0] + 1.0))


# Choosing.


def test_excluded_quantizers_are_left_out_and_listed() -> None:
    model, batch = zoo.make("mobilenet")
    with torch.no_grad(), instrument(model, batch) as full:
        names = list(full.quantizers)
    with torch.no_grad(), instrument(model, batch, exclude=["features.0.*", "classifier*"]) as q:
        left_out = [name for name in names if name not in q.quantizers]
        assert left_out == [name for name in names if name.startswith(("features.0.", "classifier"))]
        explained = {item.name: item.reason for item in q.coverage.unquantized}
        assert explained["features.0.0.weight"] == "excluded by the pattern 'features.0.*'"
        plain = model(batch)
        quantized(q, batch)
        assert float((model(batch) - plain).norm() / plain.norm()) < 0.1


def test_only_one_module_is_quantized() -> None:
    model, batch = zoo.make("mobilenet")
    with torch.no_grad(), instrument(model, batch, module="features.1") as q:
        plain = model(batch)
        assert q.quantizers
        assert all(name.startswith("features.1.") for name in q.quantizers)
        assert torch.equal(model(batch), plain)
        quantized(q, batch)
        assert not torch.equal(model(batch), plain)


def test_groups_and_their_fallback() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 6), nn.Conv1d(2, 3, 1))
    model.forward = lambda x: model[2](model[1](model[0](x)))
    batch = torch.randn(3, 2, 8)
    target = {"weights": {"granularity": "per_group", "group_size": 8}}
    with torch.no_grad(), instrument(model, batch, target) as q:
        shapes = {}
        quantized(q, batch)
        for name in ("0.weight", "1.weight", "2.weight"):
            shapes[name] = tuple(q.quantizers[name].encoding.scale.shape)
        assert shapes == {"0.weight": (4, 1), "1.weight": (6,), "2.weight": (3,)}


class Rounds:
    """A custom quantizer: rounds to whole numbers and remembers what it was made with."""

    made: ClassVar[list[Any]] = []

    def __init__(self, spec: Any) -> None:
        self.made.append(spec)

    def __call__(self, x: Tensor, encoding: Any) -> Tensor:
        return x.round()


def test_a_custom_quantizer_is_used() -> None:
    model = nn.Linear(4, 4)
    batch = torch.randn(3, 4) * 5
    Rounds.made.clear()
    with torch.no_grad(), instrument(model, batch, {"quantizer": "tests.test_instrument_outputs.Rounds"}) as q:
        assert len(Rounds.made) == len(q.quantizers) == 3
        quantized(q, batch)
        assert torch.equal(model(batch), nn.functional.linear(batch.round(), model.weight.round(), model.bias).round())


# Precisions and memory formats.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    model, batch = zoo.make("mobilenet")
    model, batch = model.to(dtype), batch.to(dtype)
    with torch.no_grad():
        plain = model(batch)
        with instrument(model, batch) as q:
            assert torch.equal(model(batch), plain)
            quantized(q, batch)
            got = model(batch)
    assert got.dtype == dtype
    assert float((got - plain).double().norm() / plain.double().norm()) < 0.15


@pytest.mark.parametrize("name", ["mobilenet", "bert", "vision_transformer", "reused"])
def test_bf16_autocast(name: str) -> None:
    model, batch = zoo.make(name)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = tensors(call_with(model, batch))
        with instrument(model, batch) as q:
            for got, wanted in zip(tensors(call_with(model, batch)), plain, strict=True):
                assert torch.equal(got, wanted)
            quantized(q, batch)
            for got, wanted in zip(tensors(call_with(model, batch)), plain, strict=True):
                assert got.dtype == wanted.dtype
                assert float((got - wanted).float().norm() / wanted.float().norm()) < 0.3
            assert q.coverage.unseen == ()


def test_channels_last_stays_channels_last() -> None:
    model = nn.Sequential(*zoo.conv_bn(3, 4, 3), nn.ReLU6(inplace=True), nn.Conv2d(4, 4, 1)).eval()
    batch = torch.randn(2, 3, 6, 6)
    with torch.no_grad(), instrument(model, batch) as q:
        quantized(q, batch)
        expected = model(batch)
        got = model(batch.to(memory_format=torch.channels_last))
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert float((got - expected).norm() / expected.norm()) < 0.02


def test_it_runs_under_inference_mode() -> None:
    model, batch = zoo.make("mobilenet")
    with torch.inference_mode(), instrument(model, batch) as q:
        plain = model(batch)
        quantized(q, batch)
        in_inference = model(batch)
        assert not torch.equal(in_inference, plain)
        assert all(not quantizer.encoding.scale.is_inference() for quantizer in q.quantizers.values())


def test_calibrated_under_inference_mode_it_trains() -> None:
    model, batch = zoo.make("mobilenet")
    with instrument(model, batch) as q:
        with torch.inference_mode():
            q.calibrate([batch])
            q.set_mode("quantize")
            expected = model(batch)
        out = model(batch)
        assert torch.allclose(out, expected, atol=1e-6)
        out.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_frozen_weight_quantized_under_inference_mode_takes_part_in_training() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].requires_grad_(False)
    batch = torch.randn(3, 4)
    with instrument(model, batch) as q:
        with torch.inference_mode():
            quantized(q, batch)
            model(batch)
        model(batch).sum().backward()
    assert model[0].weight.grad.abs().sum() > 0

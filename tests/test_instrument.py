"""Quantizers on a network and off again: what it gives back, what can be switched, what comes out."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_quantdebug.errors import CaptureError, SettingsError
from lightning_quantdebug.instrument import Instrumentation, instrument
from lightning_quantdebug.model_loan import eval_mode
from lightning_quantdebug.target import Kind, Mode, QuantTarget
from tests import zoo
from tests.grids import quantized

torch.set_num_threads(1)


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything of a network and its surroundings that must be as before."""
    module_hooks = nn.modules.module
    found: dict[str, Any] = {
        "random": torch.get_rng_state().tolist(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
        "global hooks": [len(getattr(module_hooks, name)) for name in dir(module_hooks) if name.startswith("_global_")
                         and name.endswith("hooks")],
        "modes": torch._C._len_torch_function_stack(),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "grad": torch.is_grad_enabled(),
        "checkpoint": torch.utils.checkpoint._checkpoint_without_reentrant_generator,
    }  # fmt: skip
    for path, module in model.named_modules():
        found[f"{path}|training"] = module.training
        found[f"{path}|attributes"] = [
            (name, id(value)) for name, value in module.__dict__.items() if name != "training"
        ]
        for name, value in module.__dict__.items():
            if "hooks" in name:
                found[f"{path}|{name}"] = list(value)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found[f"{name}|tensor"] = (id(tensor), tensor.requires_grad, tensor._version, tensor.data_ptr(), tensor.grad)
        found[f"{name}|value"] = tensor.detach().numpy().tobytes()
    return found


def as_trained() -> tuple[nn.Module, Tensor]:
    """A network with a mixture of modes, frozen parameters, a hook and its own random state."""
    model, batch = zoo.make("resnet")
    model.train()
    model.layer1[0].bn1.eval()
    model.fc.weight.requires_grad_(False)
    model.layer1.register_forward_hook(lambda module, args, output: None)
    return model, batch


class StopError(Exception):
    pass


@contextmanager
def failing(model: nn.Module, error: type[BaseException]) -> Iterator[None]:
    """A network whose last layer raises, from inside its forward."""

    def hook(module: nn.Module, args: Any) -> None:
        raise error("stop")

    handle = model.fc.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def leave_at_once(q: Instrumentation, model: nn.Module, batch: Tensor) -> None:
    """Nothing happens inside."""


def use(q: Instrumentation, model: nn.Module, batch: Tensor) -> None:
    quantized(q, batch)
    with torch.no_grad(), eval_mode(model):
        model(batch)


def fail_in_forward(q: Instrumentation, model: nn.Module, batch: Tensor) -> None:
    quantized(q, batch)
    with eval_mode(model), torch.no_grad(), failing(model, StopError):
        model(batch)


def fail_in_calibrate(q: Instrumentation, model: nn.Module, batch: Tensor) -> None:
    with failing(model, StopError):
        q.calibrate([batch])


def fail_in_the_batches(q: Instrumentation, model: nn.Module, batch: Tensor) -> None:
    def batches() -> Iterator[Tensor]:
        yield batch
        raise StopError

    q.calibrate(batches())


def fail_in_set_mode(q: Instrumentation, model: nn.Module, batch: Tensor) -> None:
    q.set_mode("quantise")


def interrupt_in_forward(q: Instrumentation, model: nn.Module, batch: Tensor) -> None:
    with eval_mode(model), torch.no_grad(), failing(model, KeyboardInterrupt):
        model(batch)


def interrupt_in_calibrate(q: Instrumentation, model: nn.Module, batch: Tensor) -> None:
    with failing(model, KeyboardInterrupt):
        q.calibrate([batch])


WAYS_OUT: list[tuple[Callable[..., None], type[BaseException] | None]] = [
    (leave_at_once, None),
    (use, None),
    (fail_in_forward, StopError),
    (fail_in_calibrate, StopError),
    (fail_in_the_batches, StopError),
    (fail_in_set_mode, SettingsError),
    (interrupt_in_forward, KeyboardInterrupt),
    (interrupt_in_calibrate, KeyboardInterrupt),
]


@pytest.mark.parametrize(("body", "error"), WAYS_OUT, ids=lambda value: getattr(value, "__name__", "-"))
def test_everything_is_given_back(body: Callable[..., None], error: type[BaseException] | None) -> None:
    model, batch = as_trained()
    before = fingerprint(model)
    if error is None:
        with instrument(model, batch) as q:
            body(q, model, batch)
    else:
        with pytest.raises(error), instrument(model, batch) as q:
            body(q, model, batch)
    after = fingerprint(model)
    assert {name for name in before if before[name] != after.get(name)} == set()
    assert set(after) == set(before)


def test_everything_is_given_back_when_recording_fails() -> None:
    model, batch = as_trained()
    with failing(model, StopError):
        before = fingerprint(model)
        with pytest.raises(StopError), instrument(model, batch):
            pass
        assert fingerprint(model) == before


def test_after_an_exception_inside_the_instrumentation_still_works() -> None:
    model, batch = zoo.make("resnet")
    with torch.no_grad(), instrument(model, batch) as q:
        quantized(q, batch)
        expected = model(batch)
        for error in (StopError, KeyboardInterrupt):
            with failing(model, error), pytest.raises(error):
                model(batch)
            assert torch.equal(model(batch), expected)
        assert q.coverage.unseen == ()


class Counting(nn.Module):
    """Counts its calls in a buffer, also in eval mode, and draws from every source of random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean.lerp_(x.mean(0), 0.1)
        return self.layer(x + torch.rand(2))


def test_recording_and_calibrating_leave_no_trace_in_buffers_or_random_numbers() -> None:
    model = Counting().eval()
    batch = torch.randn(3, 2)
    before = fingerprint(model)
    with instrument(model, batch) as q:
        q.calibrate([batch, batch])
    after = fingerprint(model)
    changed = {name for name in before if before[name] != after[name]}
    assert {name for name in changed if not name.endswith("|tensor")} == set()


def test_the_forward_of_the_class_is_back() -> None:
    model, batch = zoo.make("reused")
    with instrument(model, batch):
        assert "forward" in model.__dict__
    assert "forward" not in model.__dict__


# Refusals.


def test_a_nested_block_is_refused() -> None:
    model, batch = zoo.make("reused")
    with instrument(model, batch) as q:
        quantized(q, batch)
        expected = model(batch)
        with (
            pytest.raises(CaptureError, match="Reused is instrumented already: leave the first"),
            instrument(model, batch),
        ):
            pass
        assert torch.equal(model(batch), expected)
    with instrument(model, batch):
        pass


def test_a_network_without_anything_to_quantize_is_refused() -> None:
    model, batch = nn.Flatten(), torch.randn(2, 2)
    before = fingerprint(model)
    with pytest.raises(CaptureError, match=r"Nothing in Flatten can be quantized \(.*check `module` and `exclude`"):
        instrument(model, batch).__enter__()
    assert fingerprint(model) == before


def test_an_unknown_module_is_refused() -> None:
    model, batch = zoo.make("mobilenet")
    with pytest.raises(SettingsError, match=r"`module` must name a sub-module of MobileNet, got 'feature'; it has"):
        instrument(model, batch, module="feature").__enter__()


def test_an_exclude_pattern_that_fits_nothing_is_refused() -> None:
    model, batch = zoo.make("reused")
    with pytest.raises(SettingsError, match=r"`exclude` has the pattern 'layer.wieght', which fits none of \['act'"):
        instrument(model, batch, exclude=["layer.wieght"]).__enter__()
    with instrument(model, batch, exclude=["layer.bias", "layer.weight"]) as q:
        assert "layer.weight" not in q.quantizers


def test_no_batches_are_refused() -> None:
    model, batch = zoo.make("reused")
    with instrument(model, batch) as q, pytest.raises(SettingsError, match="`batches` must give at least one batch"):
        q.calibrate([])


def test_running_before_placing_is_refused() -> None:
    session = Instrumentation(nn.Linear(2, 2), QuantTarget())
    with pytest.raises(CaptureError, match="No quantizers yet: record a batch and call `place` first"):
        session.run(lambda: None)


class Restless(nn.Module):
    """Writes in place at a place that moves: each run has a new operation that must write."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.run = 0

    def forward(self, x: Tensor) -> Tensor:
        self.run += 1
        y = self.layer(x)
        for index in range(self.run):
            y.view(-1).add_(index)
        return y


def test_a_network_that_never_runs_twice_alike_is_refused() -> None:
    model = Restless()
    session = Instrumentation(model, QuantTarget())
    with pytest.raises(CaptureError, match="Restless runs other operations each time, so that it can not be recorded"):
        session.record(lambda: model(torch.randn(1, 2)))


# Modes.


def test_modes_are_switched_by_pattern_and_kind() -> None:
    model, batch = zoo.make("mobilenet")
    with instrument(model, batch) as q:
        q.calibrate([batch])
        q.set_mode("quantize", "features.0.*")
        on = {name for name, quantizer in q.quantizers.items() if quantizer.mode is Mode.QUANTIZE}
        assert on == {name for name in q.quantizers if name.startswith("features.0.")}
        assert len(on) == 2
        q.set_mode("bypass")
        q.set_mode(Mode.QUANTIZE, kind="weight")
        on = {name for name, quantizer in q.quantizers.items() if quantizer.mode is Mode.QUANTIZE}
        assert on == {name for name, quantizer in q.quantizers.items() if quantizer.kind is Kind.WEIGHT}
        assert on == {name for name in q.quantizers if name.endswith(".weight")}
        q.set_mode("bypass", "*classifier*", Kind.WEIGHT)
        assert q.quantizers["classifier.1.weight"].mode is Mode.BYPASS


def test_wrong_modes_are_refused_and_change_nothing() -> None:
    model, batch = zoo.make("reused")
    with instrument(model, batch) as q:
        with pytest.raises(SettingsError, match="has no range yet: call `calibrate` before mode 'quantize'"):
            q.set_mode("quantize")
        q.calibrate([batch])
        with pytest.raises(SettingsError, match=r"`mode` must be one of \['bypass', 'observe', 'quantize'\], got 'on'"):
            q.set_mode("on")
        with pytest.raises(SettingsError, match=r"`kind` must be one of \['weight', 'activation'\], got 'bias'"):
            q.set_mode("quantize", kind="bias")
        with pytest.raises(SettingsError, match=r"No quantizer fits the pattern 'head\*' \(kind None\); there are \["):
            q.set_mode("quantize", "head*")
        assert {quantizer.mode for quantizer in q.quantizers.values()} == {Mode.BYPASS}


def test_temporary_modes_and_bit_widths_end_also_after_an_error() -> None:
    model, batch = zoo.make("mobilenet")
    with torch.no_grad(), instrument(model, batch) as q:
        quantized(q, batch)
        expected = model(batch)
        encodings = {name: quantizer.encoding for name, quantizer in q.quantizers.items()}
        with pytest.raises(StopError), q.bit_width(3), q.modes("quantize", kind="weight"):  # noqa: PT012 - the way out
            assert {quantizer.bit_width for quantizer in q.quantizers.values()} == {3}
            assert {n for n, quantizer in q.quantizers.items() if quantizer.mode is Mode.QUANTIZE} == {
                n for n in q.quantizers if n.endswith(".weight")
            }
            assert not torch.equal(model(batch), expected)
            raise StopError
        assert torch.equal(model(batch), expected)
        assert all(quantizer.encoding is encodings[name] for name, quantizer in q.quantizers.items())


def test_quantizing_observes_nothing() -> None:
    model, batch = zoo.make("mobilenet")
    with torch.no_grad(), instrument(model, batch) as q:
        quantized(q, batch)
        seen = {name: (q.quantizers[name].observer.count, q.quantizers[name].encoding) for name in q.quantizers}
        model(batch * 100)
        q.set_mode("bypass")
        model(batch * 100)
        assert seen == {name: (q.quantizers[name].observer.count, q.quantizers[name].encoding) for name in q.quantizers}
        q.set_mode("observe")
        model(batch * 100)
        assert q.quantizers["input"].observer.count == 2 * batch.numel()


def test_coverage_tells_why_a_quantizer_has_no_range() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.rare = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x: Tensor, again: bool) -> Tensor:
            x = self.layer(x)
            return torch.log(-x.abs()) + (self.rare(x) if again else 0.0)

    model = Net()
    batch = torch.randn(3, 2)
    with torch.no_grad(), instrument(model, (batch, True)) as q:
        assert not any("calibration" in item.reason for item in q.coverage.unquantized)
        q.calibrate([(batch, False)])
        reasons = {item.name: item.reason for item in q.coverage.unquantized}
        assert reasons["rare"] == "calibration never reached it: it runs in FP32"
        assert reasons["rare.weight"] == "calibration never reached it: it runs in FP32"
        assert reasons["log"] == "calibration saw nothing but NaN and infinity there: it runs in FP32"


@pytest.mark.parametrize(("reciprocal", "quantized"), [(True, True), (False, False)])
def test_a_number_over_a_tensor_is_no_change_of_scale(reciprocal: bool, quantized: bool) -> None:
    class Divides(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x).relu() + 1
            return 2 / y if reciprocal else y / 2

    with instrument(Divides(), torch.randn(2, 4)) as q:
        assert ("div" in q.quantizers) is quantized

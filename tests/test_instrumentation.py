"""What remedies get from a session: layers, taps, FP32 references, effective weights, and the way back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quantdebug.adjustment import Adjustment
from lightning_quantdebug.instrument import Instrumentation, batch_runs, instrument
from lightning_quantdebug.layers import Call
from lightning_quantdebug.observer import Observer
from lightning_quantdebug.runner import Reached
from lightning_quantdebug.target import Granularity, Mode, QuantSpec
from tests import zoo

# Float noise of folding, as in the sanity check.
NOISE = 1e-5


def visited(session: Instrumentation, batch: Any, action: Callable[[Callable[[], Any]], Any]) -> Any:
    found: list[Any] = []
    batch_runs(session, [batch])(lambda run, index: found.append(action(run)))
    return found[0]


def image_net() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True),
        nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(1), nn.Linear(8 * 16, 5),
    )  # fmt: skip
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, -1, 2)
            nn.init.normal_(module.bias)
    return net.eval()


X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def everything(session: Instrumentation) -> list[Any]:
    """All that a remedy can change, in a form that can be compared."""
    found: list[Any] = [dict(session.adjustments)]
    for quantizer in session.quantizers.values():
        encoding = quantizer.encoding
        tensors = None if encoding is None else (encoding.scale.tolist(), encoding.zero_point.tolist())
        observed = {key: getattr(value, "tolist", lambda value=value: value)() for key, value in
                    quantizer.observer.state_dict().items()}  # fmt: skip
        found.append((quantizer.spec, quantizer.channel_axis, quantizer.mode, quantizer.frozen, tensors, observed))
    return found


def test_the_layers_of_a_network() -> None:
    with instrument(image_net(), X) as q:
        first, depthwise, last = q.layers
        assert [layer.name for layer in q.layers] == ["0", "3", "7"]
        assert [layer.op for layer in q.layers] == ["conv2d", "conv2d", "linear"]
        assert [layer.shape for layer in q.layers] == [(8, 3, 3, 3), (8, 1, 3, 3), (5, 128)]
        assert [layer.groups for layer in q.layers] == [1, 8, 1]
        assert [layer.channel_axis for layer in q.layers] == [0, 0, 0]
        assert [layer.quantizer.name for layer in q.layers] == ["0.weight", "3.weight", "7.weight"]
        assert first.fold is not None
        assert depthwise.fold is not None
        assert last.fold is None
        assert not any(layer.shared for layer in q.layers)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.turned = nn.Linear(6, 6), nn.Linear(6, 6), nn.ConvTranspose1d(4, 6, 3, groups=2)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.turned(self.other(self.one(x)))


def test_a_weight_in_several_places_is_shared() -> None:
    with instrument(Tied().eval(), torch.randn(2, 4, 6)) as q:
        assert [(layer.name, layer.shared, layer.channel_axis, layer.groups) for layer in q.layers] == [
            ("one", True, 0, 1), ("other", True, 0, 1), ("turned", False, None, 2)
        ]  # fmt: skip


@pytest.mark.parametrize("name", sorted(zoo.ZOO))
def test_every_network_is_given_back_bit_for_bit(name: str) -> None:
    model, batch = zoo.make(name)
    with instrument(model, batch, "w4a8") as q:
        q.calibrate([batch])
        q.set_mode("quantize", kind="activation")
        before, state = everything(q), q.state()

        def upset(run: Callable[[], Any]) -> tuple[Any, Any]:
            outputs = q.outputs(run)
            for quantizer in q.quantizers.values():
                if quantizer.kind.value == "weight":
                    quantizer.respecify(QuantSpec(3, symmetric=True), None)
            q.reset_weight_ranges(run)
            for layer in q.layers:
                if layer.op in ("linear", "conv2d"):
                    q.adjust({layer.key: Adjustment(bias_offset=torch.ones(layer.shape[0]))})
                if layer.quantizer.encoding is not None:
                    layer.quantizer.freeze()
            with q.observing():
                run()
            q.set_mode("quantize")
            assert everything(q) != before
            q.restore(state)
            assert everything(q) == before
            return outputs, q.outputs(run)

        outputs, again = visited(q, batch, upset)
        assert outputs.keys() == again.keys()
        assert outputs
        assert all(torch.equal(outputs[key], again[key]) for key in outputs)


def test_a_state_can_be_gone_back_to_more_than_once() -> None:
    with instrument(image_net(), X) as q:
        q.calibrate([X])
        state, before = q.state(), everything(q)
        for _ in range(2):
            for quantizer in q.quantizers.values():
                quantizer.observe(torch.full((2, 2), 77.0))
            q.restore(state)
            assert everything(q) == before


@pytest.mark.parametrize("name", sorted(zoo.ZOO))
def test_the_reference_is_the_network_with_its_batch_normalizations_folded(name: str) -> None:
    model, batch = zoo.make(name)
    with instrument(model, batch) as q:
        q.calibrate([batch])
        q.set_mode("quantize")

        def compare(run: Callable[[], Any]) -> None:
            with q.modes("bypass"):
                plain = q.outputs(run)
            with q.reference():
                assert all(quantizer.mode is Mode.BYPASS for quantizer in q.quantizers.values())
                folded = q.outputs(run)
            assert all(quantizer.mode is Mode.QUANTIZE for quantizer in q.quantizers.values())
            for key in plain:
                assert (folded[key] - plain[key]).norm() <= NOISE * plain[key].norm()
                assert torch.equal(folded[key], plain[key]) or q.plan.folds

        visited(q, batch, compare)


def test_a_layer_computes_the_same_folded_in_fp32_and_at_32_bits() -> None:
    model = image_net()
    with instrument(model, X) as q:
        q.calibrate([X])
        key = q.layers[0].key
        results: list[Tensor] = []
        tap = {key: lambda call: results.append(call.result.clone())}

        def compare(run: Callable[[], Any]) -> None:
            with q.tapped(tap), q.reference():
                run()
            with q.tapped(tap), q.bit_width(32), q.modes("quantize", kind="weight"):
                run()

        visited(q, X, compare)
        expected = model[1](model[0](X))
        for result in results:
            assert (result - expected).norm() <= NOISE * expected.norm()


def test_a_tap_sees_the_call_as_it_ran_and_may_replace_the_result() -> None:
    model = image_net()
    with instrument(model, X) as q:
        q.calibrate([X])
        last = q.layers[-1]
        seen: list[Call] = []

        def double(call: Call) -> Tensor:
            seen.append(call)
            return 2 * call.result

        def compare(run: Callable[[], Any]) -> tuple[Tensor, Tensor]:
            plain = run()
            with q.tapped({last.key: double}):
                return plain, run()

        plain, doubled = visited(q, X, compare)
        assert torch.equal(doubled, 2 * plain)
        (call,) = seen
        assert call.name == "7"
        assert torch.equal(call.func(*call.args, **call.kwargs), plain)
        with q.tapped({last.key: lambda call: None}):
            assert torch.equal(visited(q, X, lambda run: run()), plain)
        # The output's quantizer stands behind the tap.
        q.set_mode("quantize", "7")
        with q.tapped({last.key: lambda call: torch.full_like(call.result, 1e6)}):
            top = visited(q, X, lambda run: run())
        assert torch.equal(top, torch.full_like(top, float(q.quantizers["7"].encoding.range_max)))  # type: ignore[union-attr] # calibrated


def test_a_tap_ends_with_its_block_also_after_an_error() -> None:
    def fail(call: Call) -> None:
        raise ZeroDivisionError

    with instrument(image_net(), X) as q:
        q.calibrate([X])
        with pytest.raises(ZeroDivisionError), q.tapped({q.layers[0].key: fail}):
            visited(q, X, lambda run: run())
        visited(q, X, lambda run: run())
        with pytest.raises(ZeroDivisionError), q.reference():
            raise ZeroDivisionError
        q.set_mode("quantize")
        assert not torch.equal(visited(q, X, lambda run: run()), image_net()(X))


def test_a_run_ends_at_the_operation_that_it_is_for() -> None:
    model = image_net()
    with instrument(model, X) as q:
        q.calibrate([X])
        reached: list[str] = []
        taps = {layer.key: lambda call: reached.append(call.name) for layer in q.layers}

        def stop(run: Callable[[], Any]) -> bool:
            return q.run_until(run, q.layers[1].key)

        with q.tapped(taps):
            assert visited(q, X, stop)
        assert reached == ["0", "3"]
        with q.tapped(taps):
            visited(q, X, lambda run: run())
        assert reached == ["0", "3", "0", "3", "7"], "the stop is gone"
        assert not q.run_until(lambda: None, q.layers[1].key)
        assert not issubclass(Reached, Exception), "code of the user's that catches exceptions must not catch it"


def test_effective_weights_are_folded_adjusted_and_not_quantized() -> None:
    model = image_net()
    with instrument(model, X, "w4a8") as q:
        q.calibrate([X])
        q.set_mode("quantize")
        first, depthwise, last = q.layers
        scale = torch.arange(1.0, 9.0)
        corrections = {"weight_correction": torch.ones(8, 3, 3, 3), "bias_correction": torch.ones(8)}
        q.adjust({first.key: Adjustment(weight_scale=scale.view(-1, 1, 1, 1), bias_scale=scale, **corrections)})
        q.adjust({last.key: Adjustment(weight_correction=torch.ones(5, 128), bias_correction=torch.ones(5))})
        found = visited(q, X, q.effective_weights)
        norm = model[1]
        factor = (norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()).detach()
        weight, bias = found[first.key]
        torch.testing.assert_close(
            weight.double(), model[0].weight.detach().double() * (factor * scale).view(-1, 1, 1, 1)
        )
        torch.testing.assert_close(bias.double(), (norm.bias - norm.running_mean * factor).detach().double() * scale)
        assert torch.equal(found[last.key][0], model[7].weight.detach())
        assert torch.equal(found[last.key][1], model[7].bias.detach())
        assert set(found) == {first.key, depthwise.key, last.key}
        assert not weight.requires_grad


def test_weight_ranges_follow_the_effective_weight_and_frozen_ones_stay() -> None:
    model = image_net()
    with instrument(model, X, "int8_per_tensor") as q:
        q.calibrate([X])
        first, _, last = q.layers
        activations = {name: x.encoding for name, x in q.quantizers.items() if x.kind.value == "activation"}
        frozen = last.quantizer.encoding
        last.quantizer.freeze()
        before = first.quantizer.encoding
        assert before is not None
        q.adjust({layer.key: Adjustment(weight_scale=torch.full((1,), 3.0)) for layer in (first, last)})
        visited(q, X, q.reset_weight_ranges)
        assert first.quantizer.encoding is not None
        torch.testing.assert_close(first.quantizer.encoding.scale, 3 * before.scale)
        assert last.quantizer.encoding is frozen
        assert {name: q.quantizers[name].encoding for name in activations} == activations
        assert all(quantizer.mode is Mode.BYPASS for quantizer in q.quantizers.values())


class Outputs(nn.Module):
    """Returns an intermediate tensor beside the last one, and hands a third to a metric alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.loss = nn.MSELoss()

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        hidden = self.a(x).relu()
        third = self.b(hidden)
        self.loss(third, torch.zeros_like(third))
        return hidden, {"out": self.c(hidden)}


def test_the_outputs_of_a_network_are_all_that_leaves_it() -> None:
    x = torch.randn(3, 6)
    model = Outputs().eval()
    with instrument(model, x) as q:
        q.calibrate([x])
        found = visited(q, x, q.outputs)
        hidden, rest = model(x)
        assert set(found) == {"relu", "b", "c"}
        assert torch.equal(found["relu"], hidden)
        assert torch.equal(found["c"], rest["out"])
        assert torch.equal(found["b"], model.b(hidden))


def test_runs_are_in_eval_mode_without_gradients_and_leave_nothing_behind() -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    x = torch.randn(8, 6)
    with instrument(model, x) as q:
        torch.manual_seed(3)
        expected = torch.rand(2)
        torch.manual_seed(3)
        states: list[Any] = []
        batch_runs(q, [x, x])(
            lambda run, index: states.append((index, model.training, torch.is_grad_enabled(), run().requires_grad))
        )
        assert states == [(0, False, False, False), (1, False, False, False)]
        assert model.training
        assert torch.equal(torch.rand(2), expected)
        assert model[1].num_batches_tracked == 0


def test_a_frozen_encoding_survives_calibration_and_a_new_grid_ends_it() -> None:
    model = image_net()
    with instrument(model, X) as q:
        q.calibrate([X])
        quantizer, activation = q.quantizers["0.weight"], q.quantizers["5"]
        encodings = (quantizer.encoding, activation.encoding)
        quantizer.freeze()
        activation.freeze()
        q.calibrate([3 * X])
        assert (quantizer.encoding, activation.encoding) == encodings
        activation.respecify(QuantSpec(4), None)
        assert not activation.frozen
        assert activation.encoding is not None
        # An activation has its new range at once, from what was observed.
        observer: Observer = activation.observer
        assert observer.range_max >= float(activation.encoding.range_max) > 0
        assert activation.bit_width == 4
        quantizer.respecify(QuantSpec(8, symmetric=True, granularity=Granularity.PER_TENSOR), None)
        assert quantizer.encoding is None, "a weight is to be observed again"
        quantizer.set_range()
        assert quantizer.encoding is None, "what a run does not reach has nothing to be set from"

"""What checkpoints hold of quantizers and adjustments makes another instrumentation of the same network equal."""

from __future__ import annotations

import copy
import io
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_quantdebug import instrument
from lightning_quantdebug.adjustment import Adjustment
from lightning_quantdebug.equalization import equalize
from lightning_quantdebug.errors import CaptureError
from lightning_quantdebug.instrument import batch_runs
from lightning_quantdebug.model_loan import call_with
from lightning_quantdebug.session_state import load_state, state_of
from lightning_quantdebug.target import Granularity
from tests import zoo

NAMES = ("mobilenet", "resnet", "transformer_encoder", "lstm")


def through_a_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def change(session: Any) -> None:
    """Everything that remedies and training can change."""
    weights = [q for q in session.select(kind="weight") if q.encoding is not None]
    first, last = weights[0], weights[-1]
    session.adjust(
        {
            layer.key: Adjustment(bias_correction=torch.full((1,), 0.01))
            for layer in session.layers
            if layer.quantizer is last and layer.op in ("linear", "conv2d")
        }
    )
    last.freeze()
    learned = first.learn()
    with torch.no_grad():
        learned.ratio.mul_(1.1)
    learned.count = 17
    raised = session.select(kind="activation")[1]
    raised.respecify(replace(raised.spec, bit_width=6), None)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("learn", [False, True])
def test_another_instrumentation_becomes_equal(name: str, learn: bool) -> None:
    model, batch = zoo.make(name)
    twin = copy.deepcopy(model)
    with torch.no_grad(), instrument(model, batch, "w4a8_per_tensor") as session:
        session.calibrate([batch])
        equalize(session, batch_runs(session, [batch]))
        session.reset_weight_ranges(lambda: call_with(model, batch))
        change(session)
        session.set_mode("quantize")
        expected = call_with(model, batch)
        state = through_a_file(state_of(session))
    with torch.no_grad(), instrument(twin, batch, "w4a8_per_tensor") as session:
        assert load_state(session, state, learn) == ()
        session.set_mode("quantize")
        found = call_with(twin, batch)
        first = next(q for q in session.select(kind="weight") if q.encoding is not None)
        frozen = [q for q in session.quantizers.values() if q.frozen]
        assert len(frozen) == 1
        if learn:
            assert first.learned is not None
            assert first.learned.count == 17
            assert first.learned.ratio.unique().item() == pytest.approx(1.1)
        else:
            assert first.learned is None
        again = state_of(session)
    assert torch.equal(torch.as_tensor(_first(found)), torch.as_tensor(_first(expected)))
    assert set(again["quantizers"]) == set(state["quantizers"])
    assert set(again["adjustments"]) == set(state["adjustments"])


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def test_granularity_and_axis_are_part_of_the_state() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(2, 8)
    with torch.no_grad(), instrument(model, x, "w4a8_per_tensor") as session:
        session.calibrate([x])
        weight = session.quantizers["0.weight"]
        weight.respecify(replace(weight.spec, granularity=Granularity.PER_CHANNEL), 0)
        session.reset_weight_ranges(lambda: model(x))
        state = state_of(session)
    with torch.no_grad(), instrument(model, x, "w4a8_per_tensor") as session:
        load_state(session, through_a_file(state))
        weight = session.quantizers["0.weight"]
        assert (weight.spec.granularity, weight.channel_axis) == (Granularity.PER_CHANNEL, 0)
        assert torch.equal(weight.encoding.scale, state["quantizers"]["0.weight"]["scale"])


def test_what_the_network_does_not_have_is_named() -> None:
    model, x = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(2, 8)
    with instrument(model, x) as session:
        session.calibrate([x])
        state = state_of(session)
    with instrument(model[:2], x) as session:
        assert load_state(session, state) == ("2.weight", "2")
    with instrument(nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Sigmoid(), nn.Softmax(1), nn.Tanh()), x) as session:
        state = {**state, "quantizers": {name: state["quantizers"][name] for name in ("0.weight", "2.weight")}}
        with pytest.raises(CaptureError, match="quantizers of another network"):
            load_state(session, state)


def test_a_state_shares_no_memory_with_the_session() -> None:
    model, x = nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(2, 8)
    with instrument(model, x) as session:
        session.calibrate([x])
        learned = session.quantizers["input"].learn()
        state = state_of(session)
        with torch.no_grad():
            learned.ratio.mul_(3.0)
    assert state["quantizers"]["input"]["ratio"].item() == 1.0

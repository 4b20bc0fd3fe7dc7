from __future__ import annotations

import argparse
import collections
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn
from torch.utils.data import TensorDataset

from lightning_quantdebug.module_state import StateSnapshot, preserved
from tests.torture import Meter


def test_containers_come_back_in_place_and_in_depth() -> None:
    inner = [1]
    state: dict[str, Any] = {
        "list": [inner, 2],
        "set": {1, 2},
        "deque": collections.deque([1, 2], maxlen=2),
        "counter": collections.Counter("ab"),
        "tuple": (inner, {"deep": [3]}),
        "default": collections.defaultdict(list, {"a": [1]}),
    }
    expected = repr(state)
    identities = {name: id(value) for name, value in state.items()}
    snapshot = StateSnapshot(state)
    inner.append(5)
    state["list"].reverse()
    state["set"].add(9)
    state["deque"].append(9)
    state["counter"].update("zz")
    state["tuple"][1]["deep"].clear()
    state["default"]["new"].append(1)
    state["default"]["a"] = []
    state["more"] = 1
    for _ in range(2):
        snapshot.restore()
        assert repr(state) == expected
        assert {name: id(value) for name, value in state.items()} == identities
        inner.append(6)


def test_container_that_holds_itself() -> None:
    loop: list[Any] = [1]
    loop.append(loop)
    with preserved(loop):
        loop.clear()
    assert loop[1] is loop


def test_tensors_and_arrays_come_back_bit_for_bit() -> None:
    tensor = torch.tensor([1.0, float("nan"), -0.0])
    reshaped = torch.zeros(2)
    array, grown = np.arange(3.0), np.zeros(2)
    version = tensor._version
    with preserved([tensor, reshaped, array, grown]):
        tensor.data.zero_()
        reshaped.resize_(5)
        array += 1
        grown.resize(4, refcheck=False)
    assert tensor.numpy().tobytes() == np.array([1.0, np.nan, -0.0], dtype=np.float32).tobytes()
    assert tensor._version == version
    assert reshaped.tolist() == [0.0, 0.0]
    assert array.tolist() == [0.0, 1.0, 2.0]
    assert grown.tolist() == [0.0, 0.0]


def test_modules_come_back_with_attributes_buffers_children_and_modes() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Sequential(nn.Dropout()))
    module[2].eval()
    module.notes = {"a": [1]}
    before = {name: value.clone() for name, value in module.state_dict().items()}
    children, statistics, weight = list(module), module[1].running_mean, module[0].weight
    with preserved(module):
        module(torch.randn(4, 2))
        module.eval()
        module[1].running_mean = torch.ones(2)
        module.append(nn.ReLU())
        module[0].weight = nn.Parameter(torch.zeros(2, 2))
        module.notes["a"].append(2)
        module.fresh = 1
        del module[1]._buffers["num_batches_tracked"]
    assert list(module) == children
    assert module[1].running_mean is statistics
    assert module[0].weight is weight
    assert module.notes == {"a": [1]}
    assert not hasattr(module, "fresh")
    assert [part.training for part in module.modules()] == [True, True, True, False, False]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("parameters", [True, False])
def test_parameters_are_kept_when_asked_for(parameters: bool) -> None:
    layer = nn.Linear(2, 2)
    version, before = layer.weight._version, layer.weight.detach().clone()
    with preserved(layer, parameters=parameters):
        layer.weight.data.zero_()
    assert torch.equal(layer.weight, before) is parameters
    assert layer.weight._version == version


def test_metrics_and_collections_come_back() -> None:
    holder = nn.Module()
    holder.single = torchmetrics.MeanMetric()
    holder.listing = torchmetrics.CatMetric()
    holder.many = torchmetrics.MetricCollection(
        [torchmetrics.classification.BinaryPrecision(), torchmetrics.classification.BinaryRecall()]
    )
    holder.hidden = [torchmetrics.MaxMetric()]
    outputs, targets = torch.tensor([0.9, 0.1, 0.8]), torch.tensor([1, 0, 0])

    def update() -> None:
        holder.single.update(outputs)
        holder.listing.update(outputs)
        holder.many.update(outputs, targets)
        holder.hidden[0].update(outputs)

    def values() -> str:
        listed = holder.listing.compute().tolist()
        return str((holder.single.compute(), listed, holder.many.compute(), holder.hidden[0].compute()))

    update()
    expected = values()
    with preserved(holder):
        outputs = 2 - outputs
        update()
        assert values() != expected
        holder.many.reset()
    assert values() == expected
    assert holder.single._update_count == 1


def test_plain_objects_of_the_user_are_looked_into() -> None:
    meter, options = Meter(), argparse.Namespace(seen=[])
    with preserved({"meter": meter, "options": options}):
        meter.count += 1
        meter.values.append(1.0)
        options.seen.append(2)
        options.more = 3
    assert vars(meter) == {"count": 0, "values": []}
    assert vars(options) == {"seen": []}


def test_foreign_objects_are_left_alone() -> None:
    dataset = TensorDataset(torch.zeros(2))
    with preserved([dataset]):
        dataset.tensors = (torch.ones(2),)
    assert dataset.tensors[0].tolist() == [1.0, 1.0]


def test_skipped_attributes_keep_their_reference_only() -> None:
    module = nn.Module()
    module.mine, module.theirs = [1], [1]
    theirs = module.theirs
    with preserved(module, skip=frozenset({"theirs"})):
        module.mine.append(2)
        module.theirs.append(2)
        module.theirs = None
    assert module.mine == [1]
    assert module.theirs is theirs
    assert theirs == [1, 2]


def test_scripted_modules_keep_buffers_and_mode() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm1d(2), nn.ReLU()))
    holder = nn.Sequential(scripted)
    with preserved(holder):
        scripted(torch.randn(4, 2))
        scripted.eval()
    assert getattr(scripted, "0").running_mean.tolist() == [0.0, 0.0]
    assert all(part.training for part in scripted.modules())


def test_lazy_parameters_are_no_obstacle() -> None:
    lazy = nn.LazyBatchNorm1d()
    with preserved(lazy, parameters=True):
        pass
    assert lazy.training


def test_tensors_made_in_inference_mode_are_lent_as_ordinary_ones() -> None:
    module = nn.Module()
    with torch.inference_mode():
        module.total, module.totals = torch.zeros(2), [torch.zeros(2)]
        module.register_buffer("mean", torch.zeros(2))
    kept = (module.total, module.totals[0], module.mean)
    with preserved(module):
        for tensor in (module.total, module.totals[0], module.mean):
            tensor += 1
    now = (module.total, module.totals[0], module.mean)
    assert all(one is other for one, other in zip(now, kept, strict=True))
    assert all(tensor.is_inference() and tensor.tolist() == [0.0, 0.0] for tensor in kept)


def test_our_own_quantizers_keep_what_they_calibrated() -> None:
    ours = type("Quantizer", (nn.Module,), {"__module__": "lightning_quantdebug.quantizer"})()
    ours.calibrated = False
    with preserved(nn.Sequential(ours)):
        ours.calibrated = True
    assert ours.calibrated


class Stubborn(list[int]):
    def __setitem__(self, *arguments: Any) -> None:
        raise ValueError("no")


def test_one_piece_that_resists_does_not_keep_the_others_from_coming_back() -> None:
    first, stubborn, last = [1], Stubborn([1]), [1]
    snapshot = StateSnapshot(first, stubborn, last)
    for values in (first, stubborn, last):
        values.append(2)
    with pytest.raises(ValueError, match="no"):
        snapshot.restore()
    assert first == last == [1]


def fail_inside(values: list[int]) -> None:
    with preserved(values):
        values.append(2)
        raise KeyboardInterrupt


def test_an_exception_restores_too() -> None:
    values = [1]
    with pytest.raises(KeyboardInterrupt):
        fail_inside(values)
    assert values == [1]


def test_layers_of_torch_in_eval_mode_are_left_out_where_that_is_asked_for() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.eager, self.quiet = nn.BatchNorm1d(3), nn.BatchNorm1d(3).eval()
            self.register_buffer("seen", torch.zeros(2))
            self.inner = nn.Sequential(nn.Linear(3, 3))
            self.inner[0].eval()

    module = Own()
    snapshot = StateSnapshot(module, passive=True)
    assert snapshot.num_bytes == sum(buffer.nbytes for buffer in module.eager.buffers()) + module.seen.nbytes
    module.eager(torch.randn(4, 3))
    module.seen += 1.0
    snapshot.restore()
    assert module.eager.running_mean.tolist() == [0.0] * 3
    assert module.seen.tolist() == [0.0] * 2
    assert StateSnapshot(module).num_bytes > snapshot.num_bytes

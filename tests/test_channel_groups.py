"""Which channels can be scaled, on every topology, and that scaling them by anything changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quantdebug.channel_groups import FIXED, ChannelGroups, LayerChannels, find_channel_groups, magnitudes_of
from lightning_quantdebug.instrument import Instrumentation, batch_runs, instrument
from lightning_quantdebug.layers import Runs, Visit
from lightning_quantdebug.target import QuantTarget
from tests.channel_cases import CASES, make
from tests.channel_networks import DataDependent, Net, conv, pair

torch.set_num_threads(1)

MATRIX = "a matrix product does not pass a constant on"
ATTENTION = "attention does not pass a constant on"


def counts(groups: ChannelGroups) -> dict[str, tuple[int, int]]:
    """How many rows and columns of each layer can be scaled."""
    sides = {found.layer.name: (found.rows, found.columns) for found in groups.layers}
    return {name: tuple(int((side != FIXED).sum()) for side in both) for name, both in sides.items()}  # type: ignore[misc]


def change(session: Instrumentation, runs: Runs, groups: ChannelGroups) -> float:
    """The relative change of the FP32 outputs when each class gets a scale of its own between 1/8 and 8 or so."""
    outputs: list[dict[str, Tensor]] = []
    scale = torch.randn(groups.count, generator=torch.Generator().manual_seed(1), dtype=torch.float64).exp2()
    with session.reference():
        runs(lambda run, index: outputs.append(session.outputs(run)))
        session.adjust(groups.adjustments(scale))
        runs(lambda run, index: outputs.append(session.outputs(run)))
    half = len(outputs) // 2
    return max(
        float((after[name] - before[name]).norm() / before[name].norm())
        for before, after in zip(outputs[:half], outputs[half:], strict=True)
        for name in before
    )


@contextmanager
def traced(model: nn.Module, *batches: Any, **options: Any) -> Iterator[tuple[Instrumentation, Runs, ChannelGroups]]:
    """An instrumented network and its groups."""
    with instrument(model, batches[0], **options) as session:
        runs = batch_runs(session, batches)
        yield session, runs, find_channel_groups(session, runs)


@pytest.mark.parametrize("name", CASES)
def test_every_topology(name: str) -> None:
    case = CASES[name]
    model, batch = make(name)
    smaller = batch[:1] if batch.ndim > 3 else batch
    with traced(model, batch, smaller, exclude=case.exclude) as (session, runs, groups):
        assert (groups.count, counts(groups)) == (case.classes, case.scaled)
        changes = groups.adjustments(2.0 + torch.arange(groups.count, dtype=torch.float64))
        assert {found.layer.key for found in groups.layers} <= set(changes)
        assert change(session, runs, groups) <= 1e-5


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        ("gelu", "a", "gelu reads it"),
        ("relu module", "2", None),
        ("single layer", "0", "the network returns it"),
        ("returned", "a", "the network returns it"),
        ("tied", "b", "its weight is used in several places"),
        ("layer norm", "a", "layer_norm normalizes it"),
        ("sum with the input", "a", "add joins it with a tensor that can not be scaled"),
        ("autograd function", "a", "a torch.autograd.Function reads it"),
        ("loss inside", "a", "a loss, a metric or code outside the module reads it"),
        ("script", "a", "it runs ahead of s, whose inside can not be seen"),
        ("vmap", "a", "torch.func runs behind it"),
        ("empty expert", "a", "getitem gave an empty tensor"),
        ("set by index", "a", "setitem writes it into another tensor"),
        ("written through a view", "a", "add reads it"),
        ("copied into a view", "a", "copy_ reads it"),
        ("gru", "a", "the weight of gru can not be scaled channel by channel"),
        ("lstm", "r", "the weight of lstm can not be scaled channel by channel"),
        ("parameter by matmul", "matmul", "the weight of matmul can not be scaled channel by channel"),
    ],
)
def test_what_can_not_be_scaled_has_its_reason(name: str, layer: str, reason: str | None) -> None:
    model, batch = make(name)
    with traced(model, batch) as (_, _, groups):
        assert dict(groups.left).get(layer) == reason


def test_groups_hold_on_both_batches() -> None:
    positive = torch.ones(3, 4)
    with traced(DataDependent().eval(), positive, positive) as (_, _, groups):
        assert groups.count == 6
    with traced(DataDependent().eval(), positive, -positive) as (_, _, groups):
        assert groups.count == 0


def _turned(m: Net, x: Tensor) -> Tensor:
    """The columns of b read other channels of a where the input is negative."""
    y = m.a(x)
    return m.b(F.relu(y) if float(x.sum()) > 0 else F.relu(y).flip(1))


def _turned_and_back(m: Net, x: Tensor) -> Tensor:
    """The bounds of one activation hold for other channels where the input is negative."""
    turn, y = float(x.sum()) > 0, m.a(x)
    y = F.relu6(y.flip(1) if turn else y)
    return m.b(y.flip(1) if turn else y)


@pytest.mark.parametrize("forward", [_turned, _turned_and_back])
def test_what_meets_in_different_runs_has_one_scale(forward: Callable[..., Tensor]) -> None:
    positive = torch.rand(2, 3, 4, 4)
    model = Net(forward, a=conv(3, 4), b=conv(4, 2)).eval()
    with torch.no_grad():
        model.a.weight.mul_(20)
    with traced(model, positive) as (_, _, groups):
        assert groups.count == 4
    with traced(model, positive, -positive) as (session, runs, groups):
        assert groups.count == 2
        assert change(session, runs, groups) <= 1e-5


def test_a_network_that_differs_is_traced_on_every_batch() -> None:
    model, positive = DataDependent().eval(), torch.ones(3, 4)
    session = Instrumentation(model, QuantTarget())
    for batch in (positive, -positive):
        session.record(lambda batch=batch: model(batch))
    session.place()

    def runs(visit: Visit, most: int | None = None) -> None:
        for index, batch in enumerate((positive, positive, -positive)[:most]):
            with torch.no_grad():
                visit(lambda batch=batch: session.run(lambda: model(batch)), index)

    assert find_channel_groups(session, runs).count == 0


def test_parameters_whose_shape_differs_are_left_alone() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.b(F.relu(m.a(x) + m.p[:, : x.shape[1]]))

    model = Net(forward, a=nn.Linear(4, 6), b=nn.Linear(6, 3), p=nn.Parameter(torch.randn(1, 5, 6)))
    with traced(model, torch.randn(2, 5, 4), torch.randn(2, 5, 4)) as (session, runs, groups):
        assert groups.count == 6
        assert change(session, runs, groups) <= 1e-5
    with traced(model, torch.randn(2, 5, 4), torch.randn(2, 3, 4)) as (_, _, groups):
        assert groups.count == 0
        assert dict(groups.left)["a"] == "its shape differs from run to run"


def test_what_a_step_gets_to_see_is_left_alone() -> None:
    inner = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4))
    model, batch = Net(lambda m, x: x, inner=inner, last=conv(4, 2)).eval(), torch.randn(2, 3, 4, 4)
    session = Instrumentation(model, QuantTarget())

    def step() -> Tensor:
        return model.last(F.relu(model.inner(batch)))

    session.record(step, step=True)
    session.place()

    def runs(visit: Visit, most: int | None = None) -> None:
        with torch.no_grad():
            visit(lambda: session.run(step, step=True), 0)

    groups = find_channel_groups(session, runs)
    assert counts(groups) == {"inner.0": (4, 0), "inner.2": (0, 4)}
    assert dict(groups.left)["last"] == "the step itself gets it"


def test_only_the_chosen_module_is_followed() -> None:
    model = nn.Sequential(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4)), nn.ReLU(), conv(4, 2))
    with traced(model.eval(), torch.randn(2, 3, 4, 4), module="0") as (_, _, groups):
        assert counts(groups) == {"0.0": (4, 0), "0.2": (0, 4)}


def test_a_layer_whose_rounding_was_learned_is_left_alone() -> None:
    model, batch = make("functional relu")
    with instrument(model, batch) as session:
        session.calibrate([batch])
        session.quantizers["b.weight"].freeze()
        groups = find_channel_groups(session, batch_runs(session, [batch]))
        assert groups.count == 0
        assert dict(groups.left)["b"] == "the rounding of its weight was learned"


def test_a_module_that_a_batch_does_not_reach_is_left_alone() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = conv(3, 4), conv(4, 2), conv(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.a(x))
            return self.b(y) if float(x.sum()) > 0 else self.c(y)

    model, batch = Two().eval(), torch.ones(1, 3, 2, 2)
    session = Instrumentation(model, QuantTarget())
    for each in (batch, -batch):
        session.record(lambda each=each: model(each))
    session.place()

    def runs(visit: Visit, most: int | None = None) -> None:
        with torch.no_grad():
            visit(lambda: session.run(lambda: model(batch)), 0)

    assert dict(find_channel_groups(session, runs).left)["c"] == "no calibration batch reached it"


def test_the_runner_is_back_also_after_an_exception() -> None:
    model, batch = make("functional relu")

    def failing(visit: Visit, most: int | None = None) -> None:
        visit(lambda: 1 / 0, 0)

    with instrument(model, batch) as session:
        with pytest.raises(ZeroDivisionError):
            find_channel_groups(session, failing)
        assert session._watcher is None
        assert model(batch).shape == (2, 2, 6, 6)


def test_stages_are_what_layers_share() -> None:
    model, batch = make("depthwise triplet")
    with traced(model, batch) as (_, _, groups):
        assert groups.stages.tolist() == [0] * 4 + [1] * 4
        assert groups.stage_count == 2
    model, batch = make("single layer")
    with traced(model, batch) as (_, _, groups):
        assert groups.stage_count == 0


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_scales_and_ranges_of_grouped_weights(groups: int, transposed: bool) -> None:
    inputs, outputs = 4, 8
    shape = (inputs, outputs // groups, 2, 3) if transposed else (outputs, inputs // groups, 2, 3)
    weight = torch.randn(*shape, generator=torch.Generator().manual_seed(groups))
    channels = LayerChannels(
        SimpleNamespace(op="conv_transpose2d" if transposed else "conv2d", groups=groups),  # type: ignore[arg-type]
        torch.tensor([0, 1, 2, FIXED, 4, 5, 6, 7]),
        torch.tensor([3, 2, FIXED, 0]),
    )
    scale = torch.tensor([2.0, 3.0, 5.0, 7.0, 11.0, 13.0, 17.0, 19.0], dtype=torch.float64)
    got = channels.weight_scale(scale)
    row_ranges, column_ranges = np.zeros(outputs), np.zeros(inputs)
    row_of = [2, 3, 5, 1, 11, 13, 17, 19]
    column_of = [7, 5, 1, 2]
    for o in range(outputs):
        for i in range(inputs):
            if o // (outputs // groups) != i // (inputs // groups):
                continue
            place = (i, o % (outputs // groups)) if transposed else (o, i % (inputs // groups))
            assert got[place] == pytest.approx(column_of[i] / row_of[o])
            largest = np.abs(weight.double().numpy()[place]).max()
            row_ranges[o] = max(row_ranges[o], largest)
            column_ranges[i] = max(column_ranges[i], largest)
    magnitudes = magnitudes_of(weight)
    np.testing.assert_allclose(channels.row_ranges(magnitudes), row_ranges)
    np.testing.assert_allclose(channels.column_ranges(magnitudes), column_ranges)


@pytest.mark.parametrize(
    ("between", "stuck"),
    [
        (F.relu, ""),
        (lambda x: F.max_pool2d(F.leaky_relu(x), 3, 1, 1), ""),
        (lambda x: F.avg_pool2d(F.relu(x), 2), ""),
        (lambda x: F.adaptive_avg_pool2d(x, 1).flatten(2).unflatten(2, (1, 1)), ""),
        (lambda x: x.clamp(min=0).mean((2, 3), keepdim=True), ""),
        (lambda x: F.avg_pool2d(x, 3, padding=1), "avg_pool2d does not pass a constant on at the borders"),
        (lambda x: F.interpolate(x, scale_factor=2), "interpolate does not pass a constant on at the borders"),
        (F.relu6, "relu6 clips from above"),
        (torch.abs, "abs does not pass a constant on"),
        (lambda x: x * 2, "mul does not pass a constant on"),
        (lambda x: x.sum((2, 3), keepdim=True), "sum multiplies a constant"),
        (lambda x: x + x, "add joins it with another tensor"),
        (lambda x: x * torch.ones(1), "a product does not pass a constant on"),
        (lambda x: F.pad(x, (1, 1)), "pad puts zeros in"),
        (lambda x: x.masked_fill(torch.eye(6) > 0, 0), "masked_fill puts zeros in"),
    ],
)
def test_what_stops_a_constant(between: Callable[[Tensor], Tensor], stuck: str) -> None:
    with traced(pair(between)().eval(), torch.randn(2, 3, 6, 6)) as (_, _, groups):
        assert groups.stuck == (stuck,) * 4


@pytest.mark.parametrize(
    ("forward", "stuck"),
    [
        (lambda m, x: m.b(m.a(x) @ (x @ x)), (MATRIX,) * 4),
        (lambda m, x: m.b(((x @ x) @ m.a(x).mT).mT), (MATRIX,) * 4),
        (lambda m, x: m.b(torch.bmm(x, m.a(x).mT).mT), (MATRIX,) * 4),
        (
            lambda m, x: m.b(F.scaled_dot_product_attention(x, x, m.a(x).mT).mT),
            (ATTENTION,) * 4,
        ),
        # What is summed over are channels.
        (lambda m, x: m.b(x @ m.a(x)), ()),
        (lambda m, x: m.b(m.a(x).mT @ x), ()),
        (lambda m, x: m.b(m.a(x) @ m.a2(x)), ()),
        (lambda m, x: m.b(F.scaled_dot_product_attention(m.a2(x), m.a(x), x)), ()),
    ],
)
def test_products_with_matrices_of_data(forward: Callable[..., Tensor], stuck: tuple[str, ...]) -> None:
    model = Net(forward, a=nn.Conv1d(4, 4, 1), a2=nn.Conv1d(4, 4, 1), b=nn.Conv1d(4, 4, 1))
    with traced(model.eval(), torch.randn(3, 4, 4)) as (session, runs, groups):
        assert groups.stuck == stuck
        assert change(session, runs, groups) <= 1e-5


@pytest.mark.parametrize(
    ("second", "stuck"),
    [
        (nn.Conv2d(4, 2, 3), ""),
        (nn.Conv2d(4, 2, 3, padding="valid"), ""),
        (nn.Conv2d(4, 2, 1, padding="same"), ""),
        (nn.Conv2d(4, 2, 3, padding="same"), "b sees zeros at its borders"),
        (nn.Conv2d(4, 2, 1, padding=1), "b sees zeros at its borders"),
        (nn.Conv2d(4, 2, 3, padding=(0, 1)), "b sees zeros at its borders"),
        (nn.ConvTranspose2d(4, 2, 3), "b sees zeros at its borders"),
    ],
)
def test_borders_of_zeros_stop_a_constant(second: nn.Module, stuck: str) -> None:
    model = Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(3, 4), b=second)
    with traced(model.eval(), torch.randn(2, 3, 6, 6)) as (_, _, groups):
        assert groups.stuck == (stuck,) * 4

"""Cross-layer equalization: its formulas, its limits, and that it changes no function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_quantdebug import channel_rules
from lightning_quantdebug.adjustment import Applied
from lightning_quantdebug.channel_groups import FIXED, effective_weights, find_channel_groups
from lightning_quantdebug.equalization import equalize
from lightning_quantdebug.instrument import Instrumentation, batch_runs, instrument
from lightning_quantdebug.layers import Runs, Visit
from lightning_quantdebug.report import Cause
from lightning_quantdebug.target import QuantTarget
from lightning_quantdebug.traces import relative_error, tensors_of
from tests import zoo
from tests.channel_cases import CASES, make
from tests.channel_networks import Net, conv, norm, tied

torch.set_num_threads(1)

PER_TENSOR = {"preset": "int8", "weights": {"granularity": "per_tensor"}}


def ranges(weight: Tensor, axis: int) -> np.ndarray[Any, Any]:
    """Largest magnitude of each channel, by loops, in float64."""
    values = np.moveaxis(weight.detach().numpy().astype(np.float64), axis, 0)
    return np.array([max(abs(value) for value in channel.ravel()) for channel in values])


def even(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Values over their geometric mean: what is left when a common factor does not count."""
    return values / np.exp(np.log(values).mean())


def weights_of(session: Instrumentation, runs: Runs) -> dict[str, Tensor]:
    """The effective weights by the name of the layer."""
    names = {layer.key: layer.name for layer in session.layers}
    return {names[key]: weight for key, (weight, _) in effective_weights(session, runs).items()}


def equalized(
    model: nn.Module, batch: Any, target: Any = "int8"
) -> tuple[Applied, dict[str, Tensor], dict[str, Tensor]]:
    """What equalization did, and the weights before and after."""
    with instrument(model, batch, target) as session:
        session.calibrate([batch])
        runs = batch_runs(session, [batch])
        before = weights_of(session, runs)
        applied = equalize(session, runs)
        return applied, before, weights_of(session, runs)


def test_a_pair_is_scaled_as_the_paper_says() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.Conv2d(5, 4, 3)).eval()
    with torch.no_grad():
        model[0].weight.mul_(torch.logspace(-2, 2, 5).view(-1, 1, 1, 1))
    applied, before, after = equalized(model, torch.randn(2, 3, 8, 8))
    r1, r2 = ranges(before["0"], 0), ranges(before["2"], 1)
    s = even(np.sqrt(r1 * r2) / r2)
    np.testing.assert_allclose(after["0"], before["0"].numpy() / s[:, None, None, None], rtol=2e-3)
    np.testing.assert_allclose(after["2"], before["2"].numpy() * s[None, :, None, None], rtol=2e-3)
    np.testing.assert_allclose(even(ranges(after["0"], 0)), even(np.sqrt(r1 * r2)), rtol=2e-3)
    np.testing.assert_allclose(even(ranges(after["2"], 1)), even(np.sqrt(r1 * r2)), rtol=2e-3)
    assert applied.changed == ("0", "2")
    assert applied.findings == ()
    assert applied.note.startswith("5 of 5 classes of channels in 2 layers were scaled, by factors of up to ")


def test_a_depthwise_triplet_becomes_the_geometric_mean() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        conv(3, 6), norm(6), nn.ReLU(), conv(6, 6, 3, groups=6), norm(6), nn.ReLU(), conv(6, 4), norm(4)
    ).eval()
    with torch.no_grad():
        model[3].weight.mul_(torch.logspace(-1.5, 1.5, 6).view(-1, 1, 1, 1))
    _, before, after = equalized(model, torch.randn(2, 3, 8, 8))
    r = [ranges(before["0"], 0), ranges(before["3"], 0), ranges(before["6"], 1)]
    mean = np.cbrt(r[0] * r[1] * r[2])
    np.testing.assert_allclose(even(ranges(after["0"], 0)), even(mean), rtol=2e-3)
    np.testing.assert_allclose(even(ranges(after["3"], 0)), even(mean), rtol=2e-3)
    np.testing.assert_allclose(even(ranges(after["6"], 1)), even(mean), rtol=2e-3)
    # The paper's s of a triplet, s12 = r1 / (r1 r2 r3)^(1/3), over its geometric mean.
    np.testing.assert_allclose(ranges(before["0"], 0) / ranges(after["0"], 0), even(r[0] / mean), rtol=2e-3)


def test_fixed_channels_of_a_layer_are_as_wide_as_the_scaled_ones() -> None:
    model, batch = zoo.make("vision_transformer")
    with torch.no_grad():
        model.qkv.weight.data[32:].mul_(torch.logspace(-2, 0, 16)[:, None])
        model.proj.weight.data.mul_(50)
    _, before, after = equalized(model, batch)
    q_and_k, v, columns = after["qkv"][:32], after["qkv"][32:], after["proj"]
    assert float(v.abs().max()) == pytest.approx(float(q_and_k.abs().max()), rel=1e-3)
    assert torch.equal(q_and_k, before["qkv"][:32])
    # Rows and columns are even but for one common factor.
    ratio = ranges(v, 0) / ranges(columns, 1)
    np.testing.assert_allclose(ratio, ratio[0], rtol=2e-3)


def test_fixed_columns_are_matched_as_well() -> None:
    torch.manual_seed(0)
    model = Net(lambda m, x: m.b(torch.cat([F.relu(m.a(x)), x], 1)), a=conv(3, 4), b=conv(7, 2)).eval()
    with torch.no_grad():
        model.a.weight.mul_(100)
    _, _, after = equalized(model, torch.randn(2, 3, 4, 4))
    assert float(after["b"][:, :4].abs().max()) == pytest.approx(float(after["b"][:, 4:].abs().max()), rel=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_no_function_changes(name: str) -> None:
    case = CASES[name]
    model, batch = make(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        before = [tensor.clone() for tensor in tensors_of(model(batch))]
    with instrument(model, batch, exclude=case.exclude) as session:
        session.calibrate([batch])
        applied = equalize(session, batch_runs(session, [batch]))
        # The quantizers are in bypass: the network runs adjusted, but in FP32.
        session.set_mode("bypass")
        with torch.no_grad():
            after = list(tensors_of(model(batch)))
    assert applied.findings == ()
    assert bool(applied.changed) == any(rows and columns for rows, columns in _sides(name))
    assert all(relative_error(b, a) <= 1e-5 for a, b in zip(before, after, strict=True))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def _sides(name: str) -> list[tuple[int, int]]:
    """Of each stage with several classes, how many rows and columns of weights there are: normalizations have none."""
    model, batch = make(name)
    with instrument(model, batch, exclude=CASES[name].exclude) as session:
        groups = find_channel_groups(session, batch_runs(session, [batch]))
    found = []
    for stage in range(groups.stage_count):
        inside = groups.stages == stage
        sides = [torch.cat([getattr(each, side) for each in groups.layers]) for side in ("rows", "columns")]
        if int(inside.sum()) > 1:
            found.append(tuple(int(inside[side[side != FIXED]].sum()) for side in sides))
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_zoo_keeps_its_function(name: str) -> None:
    model, batch = zoo.make(name)
    with torch.no_grad():
        before = [tensor.clone() for tensor in tensors_of(zoo_call(model, batch))]
        with instrument(model, batch) as session:
            session.calibrate([batch])
            assert equalize(session, batch_runs(session, [batch])).findings == ()
            session.set_mode("bypass")
            after = list(tensors_of(zoo_call(model, batch)))
    assert all(relative_error(b, a) <= 1e-5 for a, b in zip(before, after, strict=True))


def zoo_call(model: nn.Module, batch: Any) -> Any:
    return model(**batch) if isinstance(batch, dict) else model(batch)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.PReLU])
def test_a_rescaled_network_comes_back(activation: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(conv(3, 16), activation()),
        nn.Sequential(conv(16, 16, 3, groups=16), activation()),
        conv(16, 8),
    ).eval()
    batch = torch.randn(4, 3, 8, 8) * 2

    def error(planted: bool, treated: bool) -> float:
        factors = 10 ** (3 * torch.rand(16, generator=torch.Generator().manual_seed(1)) - 1.5)
        with instrument(model, batch, PER_TENSOR) as session, torch.no_grad():
            session.calibrate([batch])
            reference = model(batch)
            if planted:
                groups = find_channel_groups(session, batch_runs(session, [batch]))
                session.adjust(groups.adjustments(torch.cat([factors, factors.flip(0)]).double()))
                session.calibrate([batch])
            if treated:
                assert equalize(session, batch_runs(session, [batch])).findings == ()
            with session.modes("quantize", kind="weight"):
                return relative_error(model(batch), reference)

    healthy, sick, cured = error(False, False), error(True, False), error(True, True)
    assert sick > 10 * healthy
    # Whatever was planted, even ranges are the same ones.
    assert cured == pytest.approx(error(False, True), rel=0.05)
    assert cured < 2 * healthy


def test_weights_get_their_ranges_anew() -> None:
    model, batch = make("functional relu")
    with torch.no_grad():
        model.a.weight[0] *= 100
    with instrument(model, batch, PER_TENSOR) as session:
        session.calibrate([batch])
        before = float(session.quantizers["a.weight"].encoding.scale)
        equalize(session, batch_runs(session, [batch]))
        after = weights_of(session, batch_runs(session, [batch]))["a"]
        assert float(session.quantizers["a.weight"].encoding.scale) < before / 5
        assert float(session.quantizers["a.weight"].encoding.range_max) == pytest.approx(
            float(after.abs().max()), rel=1e-2
        )


def test_equalizing_twice_changes_nothing_more() -> None:
    model, batch = make("depthwise triplet")
    with instrument(model, batch) as session:
        session.calibrate([batch])
        runs = batch_runs(session, [batch])
        equalize(session, runs)
        once = weights_of(session, runs)
        again = equalize(session, runs)
        twice = weights_of(session, runs)
    assert all(relative_error(twice[name], once[name]) < 5e-3 for name in once)
    assert "sweeps" in again.note or again.changed == ()


def test_a_layer_without_any_range_is_left_alone() -> None:
    model, batch = make("functional relu")
    with torch.no_grad():
        model.b.weight.zero_()
    applied, before, after = equalized(model, batch)
    assert applied.changed == ()
    assert applied.note == "the ranges of all 4 classes of channels are even already, or have no weight on one side"
    assert torch.equal(before["a"], after["a"])


def test_what_is_even_to_a_hundredth_of_a_step_stays() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(3))
        model[2].weight.copy_(torch.eye(3) * torch.tensor([1.0, 1.0, 1.001]))
    applied, _, _ = equalized(model, torch.randn(4, 3))
    assert applied.changed == ()


def test_a_network_without_classes_says_so() -> None:
    model, batch = make("gelu")
    applied, _, _ = equalized(model, batch)
    assert applied.changed == ()
    assert applied.note == "no channels were found whose scale can change without changing the function"
    assert dict(applied.skipped) == {"a": "gelu reads it", "b": "the network returns it"}


class Branch(nn.Module):
    """One of two layers reads the first, as the data say."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 4), conv(4, 2), conv(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        return self.b(y) if float(x.sum()) > 0 else self.c(y)


def test_layers_that_only_some_batches_reach_are_scaled_as_well() -> None:
    torch.manual_seed(0)
    model, batches = Branch().eval(), [torch.rand(2, 3, 4, 4), -torch.rand(2, 3, 4, 4)]
    session = Instrumentation(model, QuantTarget.from_value(PER_TENSOR))
    for batch in batches:
        session.record(lambda batch=batch: model(batch))
    session.place()

    def runs(visit: Visit, most: int | None = None) -> None:
        for index, batch in enumerate(batches[:most]):
            with torch.no_grad():
                visit(lambda batch=batch: session.run(lambda: model(batch)), index)

    with session.observing():
        runs(lambda run, index: run())
    before = {name: float(session.quantizers[name].encoding.scale) for name in ("a.weight", "b.weight", "c.weight")}
    applied = equalize(session, runs)
    assert applied.changed == ("a", "b", "c")
    assert applied.findings == ()
    assert all(float(session.quantizers[name].encoding.scale) != scale for name, scale in before.items())


def test_a_long_chain_converges() -> None:
    torch.manual_seed(0)
    layers = [nn.Sequential(conv(4, 4, groups=4), nn.ReLU()) for _ in range(6)]
    model = nn.Sequential(conv(3, 4), nn.ReLU(), *layers, conv(4, 2)).eval()
    with torch.no_grad():
        for layer in layers:
            layer[0].weight.mul_(10 ** torch.empty(4, 1, 1, 1).uniform_(-1.5, 1.5))
    _, before, after = equalized(model, torch.randn(2, 3, 4, 4))
    names = ["0", *(f"{index}.0" for index in range(2, 8)), "8"]
    product = np.ones(4)
    for name in names:
        product *= ranges(before[name], 1 if name == "8" else 0)
    for name in names:
        np.testing.assert_allclose(
            even(ranges(after[name], 1 if name == "8" else 0)), even(product ** (1 / 8)), rtol=0.02
        )


def test_an_inexact_rule_is_found_out_and_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(channel_rules.RULES, "gelu", lambda tracker, op: tracker.numbers(op.x))
    model, batch = make("gelu")
    with instrument(model, batch, PER_TENSOR) as session:
        session.calibrate([batch])
        session.set_mode("quantize")
        runs = batch_runs(session, [batch])
        state = session.state()
        with torch.no_grad():
            before = model(batch)
        applied = equalize(session, runs)
        assert applied.changed == ()
        assert [finding.cause for finding in applied.findings] == [Cause.CHANGED_FUNCTION]
        assert applied.findings[0].evidence.startswith("cross-layer equalization changed the FP32 output 'b' by ")
        assert applied.findings[0].evidence.endswith(" of its norm, where 1e-05 is rounding; it was undone")
        assert applied.note == applied.findings[0].evidence
        assert dict(session.adjustments) == dict(state.adjustments) == {}
        for name, quantizer in session.quantizers.items():
            now, then = quantizer.state(), state.quantizers[name]
            assert (now.spec, now.channel_axis, now.mode, now.frozen) == (
                then.spec,
                then.channel_axis,
                then.mode,
                then.frozen,
            )
            assert now.encoding is then.encoding
            assert now.observer.state_dict().keys() == then.observer.state_dict().keys()
        with torch.no_grad():
            assert torch.equal(model(batch), before)


def test_what_was_adjusted_before_survives_an_undone_equalization(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = Net(lambda m, x: m.c(F.gelu(m.b(F.relu(m.a(x))))), a=conv(3, 4), b=conv(4, 4), c=conv(4, 2)).eval()
    batch = torch.randn(2, 3, 4, 4)
    with instrument(model, batch) as session:
        session.calibrate([batch])
        runs = batch_runs(session, [batch])
        assert equalize(session, runs).changed == ("a", "b")
        kept = dict(session.adjustments)
        monkeypatch.setitem(channel_rules.RULES, "gelu", lambda tracker, op: tracker.numbers(op.x))
        assert equalize(session, runs).findings
        assert dict(session.adjustments) == kept


def test_tied_convolutions_are_left_alone() -> None:
    torch.manual_seed(0)
    applied, before, after = equalized(tied().eval(), torch.randn(2, 4, 6, 6))
    assert applied.changed == ()
    assert all(torch.equal(before[name], after[name]) for name in before)

"""The spread of ranges over calibration draws: against calibrating anew on each draw, and against fresh data."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_quantdebug.calibration_draws import Spread, draw, random_orders, range_spread, record_draws
from lightning_quantdebug.errors import SettingsError
from lightning_quantdebug.instrument import batch_runs, instrument
from lightning_quantdebug.observer import Observer
from lightning_quantdebug.target import QuantSpec, RangeSetting

P90 = QuantSpec(8, range_setting=RangeSetting.PERCENTILE, percentile=90)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3), nn.Sigmoid())


def batches(count: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(5, 3, 6, 6, generator=generator) * (1 + index) for index in range(count)]


def recorded(data: list[Tensor], name: str = "x") -> list[dict[str, Observer]]:
    found = []
    for batch in data:
        found.append({name: Observer()})
        found[-1][name].observe(batch)
    return found


# One pass.


def test_each_batch_is_observed_by_itself_and_together_they_are_the_calibration() -> None:
    net, data = model().eval(), batches()
    with instrument(net, data[0]) as q:
        q.calibrate(data)
        found = record_draws(q, batch_runs(q, data))
        assert [sorted(batch) for batch in found] == [["2", "4", "input"]] * 6  # the sigmoid's range is fixed
        assert [batch["input"].range_max for batch in found] == [x.max().item() for x in data]
        for name in found[0]:
            merged = Observer()
            for batch in found:
                merged.merge(batch[name])
            state, wanted = merged.state_dict(), q.quantizers[name].observer.state_dict()
            assert torch.equal(state.pop("counts"), wanted.pop("counts"))
            assert state == wanted


def test_the_session_is_left_as_it_was_also_when_a_run_fails() -> None:
    net, data = model().eval(), batches()
    with instrument(net, data[0]) as q:
        q.calibrate(data[:2])
        q.set_mode("quantize", kind="weight")
        before = {
            name: (quantizer.observer, quantizer.encoding, quantizer.mode) for name, quantizer in q.quantizers.items()
        }
        record_draws(q, batch_runs(q, data))
        assert before == {name: (x.observer, x.encoding, x.mode) for name, x in q.quantizers.items()}
        with pytest.raises(RuntimeError):
            record_draws(q, batch_runs(q, [data[0], torch.ones(2, 2)]))
        assert before == {name: (x.observer, x.encoding, x.mode) for name, x in q.quantizers.items()}
        assert before["input"][0].count == q.quantizers["input"].observer.count == 2 * data[0].numel()


def test_no_more_batches_are_run_than_are_kept() -> None:
    net, data = model().eval(), batches()
    count = 0

    def counted(module: nn.Module, args: tuple[Tensor]) -> None:
        nonlocal count
        count += 1

    with instrument(net, data[0]) as q:
        runs = batch_runs(q, data)
        handle = net[0].register_forward_pre_hook(counted)
        assert len(record_draws(q, runs, most_batches=2)) == count == 2
        handle.remove()


def test_a_network_without_activation_quantizers_has_nothing_to_draw() -> None:
    net = nn.Sequential(nn.Linear(4, 2))
    with instrument(net, torch.ones(1, 4), exclude=["input", "0"]) as q:
        assert record_draws(q, batch_runs(q, [torch.ones(1, 4)])) == []


# The spread.


@pytest.mark.parametrize("method", ["min_max", "percentile", "mse"])
def test_the_spread_is_that_of_calibrating_anew_on_each_draw(method: str) -> None:
    net, data = model().eval(), batches(7)
    target = {"activations": {"bit_width": 4, "range_setting": method, "percentile": 95}}
    with instrument(net, data[0], target) as q:
        found = record_draws(q, batch_runs(q, data))
        specs = {name: q.quantizers[name].spec for name in found[0]}
        spread = range_spread(found, specs, samples_per_batch=5, draws=3, seed=4)
        orders = random_orders(7, 3, seed=4)
        assert [(size.batches, size.samples) for size in spread.sizes] == [(1, 5), (2, 10)]
        for size in spread.sizes:
            widths: dict[str, list[float]] = {name: [] for name in specs}
            for order in orders:
                q.calibrate([data[index] for index in order[: size.batches]])
                for name, found_widths in widths.items():
                    encoding = q.quantizers[name].encoding
                    assert encoding is not None
                    found_widths.append((encoding.range_max - encoding.range_min).item())
            twin = {name: np.std(w, ddof=1) / np.mean(w) / np.sqrt(1 - size.batches / 7) for name, w in widths.items()}
            assert size.worst == pytest.approx(max(twin.values()), rel=1e-5)
            assert size.median == pytest.approx(np.median(list(twin.values())), rel=1e-5)
            assert twin[size.quantizer] == max(twin.values())
            assert size.unseen == 0
        assert dict(spread.quantizers) == pytest.approx(twin, rel=1e-5)
        assert [name for name, _ in spread.quantizers] == sorted(twin, key=lambda name: -twin[name])


@pytest.mark.parametrize("spec", [P90, QuantSpec(8)])
def test_overlapping_draws_tell_the_spread_of_independent_ones(spec: QuantSpec) -> None:
    generator = torch.Generator().manual_seed(0)

    def fresh(count: int) -> list[Tensor]:
        # Batches differ in scale, as those of a loader do: what is measured is the spread between batches.
        return [(1 + torch.rand(1, generator=generator)) * torch.randn(64, generator=generator) for _ in range(count)]

    estimates = [
        [size.worst for size in range_spread(recorded(fresh(8)), {"x": spec}, 64, seed=seed).sizes]
        for seed in range(25)
    ]
    estimate = np.sqrt(np.square(estimates).mean(0))
    for at, count in enumerate((1, 2, 4)):
        # Of one draw of `count` fresh batches each: independent of all others.
        independent = []
        for _ in range(150):
            observer = Observer()
            for batch in fresh(count):
                observer.observe(batch)
            low, high = observer.range_min, observer.range_max
            if spec is P90:
                histogram = observer.histogram
                points = np.repeat(histogram.lower_edges.numpy(), histogram.counts.numpy())
                low, high = np.quantile(points, [0.1, 0.9])
            independent.append(high - low)
        assert estimate[at] == pytest.approx(np.std(independent) / np.mean(independent), rel=0.25)


def spread_of(values: Tensor, spec: QuantSpec = P90, **settings: float) -> Spread:
    return range_spread(recorded(list(values.unbind())), {"x": spec}, values.shape[1], **settings)  # type: ignore[arg-type]


def test_ranges_settle_where_enough_samples_are_alike() -> None:
    values = torch.randn(32, 100, generator=torch.Generator().manual_seed(0))
    spread = spread_of(values)
    assert [size.samples for size in spread.sizes] == [100, 200, 400, 800, 1600]
    assert spread.sizes[0].worst > spread.bound == 0.05 > spread.sizes[-1].worst
    over = [size.samples for size in spread.sizes if size.worst > 0.05]
    assert spread.settled_at == 2 * over[-1]
    assert spread.advice == (
        f"Ranges vary by 5% or less between calibration sets of {spread.settled_at} samples or more."
    )
    assert spread_of(values, bound=10.0).settled_at == 100


def test_ranges_of_rare_giants_do_not_settle_and_the_advice_says_so() -> None:
    values = torch.distributions.Cauchy(0.0, 1.0).icdf(torch.rand(32, 100, generator=torch.Generator().manual_seed(0)))
    spread = spread_of(values, QuantSpec(8))
    assert spread.settled_at is None
    last = spread.sizes[-1]
    assert last.worst > 0.05
    assert spread.advice == (
        f"Between calibration sets of 1600 samples the range of 'x' still varies by {last.worst:.0%}: calibrate on "
        "more samples, or set ranges by percentile, which single values hardly move."
    )
    assert spread_of(values).sizes[-1].worst < last.worst / 5


def test_small_draws_that_are_alike_by_chance_do_not_count_as_settled() -> None:
    values = torch.ones(8, 4)
    values[5] = 3.0  # one batch is another
    seed = next(
        seed
        for seed in range(100)
        if all(order[0] != 5 for order in random_orders(8, 3, seed))
        and 0 < sum(5 in order[:2] for order in random_orders(8, 3, seed)) < 3
        and 0 < sum(5 in order[:4] for order in random_orders(8, 3, seed)) < 3
    )
    spread = spread_of(values, QuantSpec(8), draws=3, seed=seed)
    assert spread.sizes[0].worst == 0.0
    assert spread.sizes[1].worst > 0.05
    assert spread.settled_at is None


def test_a_quantizer_that_some_draws_do_not_reach_is_not_settled() -> None:
    found = recorded(list(torch.ones(8, 4)))
    for index, batch in enumerate(found):
        batch["branch"] = Observer()
        if index == 0:
            batch["branch"].observe(torch.ones(3))
    spread = range_spread(found, {"x": QuantSpec(8), "branch": QuantSpec(8)}, 4)
    assert [size.unseen for size in spread.sizes] == [1, 1, 1]
    assert dict(spread.quantizers) == {"x": 0.0}
    assert spread.settled_at is None
    assert spread.advice.startswith("1 quantizers are not reached by every 16 samples: calibrate on more, so that")
    never = range_spread([{"branch": Observer()} for _ in range(2)], {"branch": QuantSpec(8)}, 4)
    assert (never.sizes[0].unseen, never.sizes[0].quantizer, never.settled_at) == (1, "", None)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_batches_tell_nothing(count: int) -> None:
    spread = range_spread(recorded(batches(count)), {"x": QuantSpec(8)}, 4)
    assert (spread.sizes, spread.quantizers, spread.settled_at) == ((), (), None)
    assert spread.advice == "One batch tells nothing of how much ranges vary: calibrate on 8 batches or more."


def test_one_draw_has_no_spread() -> None:
    with pytest.raises(SettingsError, match="`draws` must be at least 2, as one draw has no spread, got 1"):
        range_spread(recorded(batches(2)), {"x": QuantSpec(8)}, 4, draws=1)


def test_the_spread_is_plain_values() -> None:
    spread = spread_of(torch.randn(8, 50, generator=torch.Generator().manual_seed(0)))
    values = spread.to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["sizes"][0] == {
        "batches": 1,
        "samples": 50,
        "median": spread.sizes[0].median,
        "worst": spread.sizes[0].worst,
        "quantizer": "x",
        "unseen": 0,
    }
    assert values["quantizers"] == {"x": spread.sizes[-1].worst}


def test_orders_are_of_their_own_generator_and_depend_on_the_seed() -> None:
    np.random.seed(0)
    state = torch.get_rng_state()
    orders = random_orders(10, 5, 3)
    assert torch.equal(torch.get_rng_state(), state)
    assert np.random.get_state()[2] == 624  # numpy's own generator was not asked either
    assert orders == random_orders(10, 5, 3) != random_orders(10, 5, 4)
    assert all(sorted(order) == list(range(10)) for order in orders)
    assert len(set(orders)) == 5


# A draw put to use.


@pytest.mark.parametrize("indices", [(0,), (4, 1), (5, 0, 3, 2)])
def test_a_draw_sets_the_ranges_that_calibrating_on_its_batches_sets(indices: tuple[int, ...]) -> None:
    net, data = model().eval(), batches()
    with instrument(net, data[0]) as q:
        q.calibrate([data[index] for index in indices])
        q.set_mode("quantize")
        wanted = net(data[0])
        q.calibrate(data)
        found = record_draws(q, batch_runs(q, data))
        state, before = q.state(), net(data[0])
        draw(q, found, indices)
        assert torch.equal(net(data[0]), wanted)
        assert not torch.equal(before, wanted)
        draw(q, found, indices)  # again gives the same: observers do not pile up
        assert torch.equal(net(data[0]), wanted)
        q.restore(state)
        assert torch.equal(net(data[0]), before)


def test_a_draw_leaves_frozen_ranges_and_gives_none_to_what_it_does_not_reach() -> None:
    net, data = model().eval(), batches()
    with instrument(net, data[0]) as q:
        q.calibrate(data)
        q.quantizers["2"].freeze()
        kept = {name: q.quantizers[name].encoding for name in ("2", "5", "0.weight")}
        found = record_draws(q, batch_runs(q, data))
        assert sorted(found[0]) == ["4", "input"]
        found[0]["4"] = Observer()
        draw(q, found, [0])
        assert {name: q.quantizers[name].encoding for name in kept} == kept
        assert not q.quantizers["4"].is_calibrated
        assert q.quantizers["input"].is_calibrated


def test_a_draw_of_nothing_is_refused() -> None:
    net, data = model().eval(), batches()
    with (
        instrument(net, data[0]) as q,
        pytest.raises(SettingsError, match="`indices` must name one batch at least, got none"),
    ):
        draw(q, [], [])

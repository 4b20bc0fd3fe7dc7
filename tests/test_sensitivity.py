"""The table of all quantizers against validations in full, number by number."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_quantdebug import lanes, sensitivity
from lightning_quantdebug.errors import EvaluationError
from lightning_quantdebug.evaluation import Evaluation
from lightning_quantdebug.measurement import Measurement
from lightning_quantdebug.noise import sqnr_db
from lightning_quantdebug.paired_loss import loss_interval
from lightning_quantdebug.sensitivity import Bench, Sensitivities, Table
from lightning_quantdebug.target import Mode
from lightning_quantdebug.tensor_probes import shown
from tests import zoo
from tests.analyses import Everything, analysed, module_of
from tests.walks import Classifier, Judged

pytestmark = pytest.mark.filterwarnings("ignore")
torch.set_num_threads(1)

TOPOLOGIES = ("resnet", "mobilenet", "inception", "reused", "transformer_encoder", "lstm", "branching", "bert")


def alone(bench: Bench, name: str, **settings: Any) -> Evaluation:
    """The plain way: switch one quantizer on and run the validation loop in full."""
    with bench.session.modes(Mode.BYPASS):
        bench.session.quantizers[name].mode = Mode.QUANTIZE
        return bench.evaluator.run_unchecked(bench.session.around_step, **settings)


def all_but(bench: Bench, name: str) -> Evaluation:
    with bench.session.modes(Mode.QUANTIZE):
        bench.session.quantizers[name].mode = Mode.BYPASS
        return bench.evaluator.run_unchecked(bench.session.around_step)


def outputs(bench: Bench, name: str | None) -> list[Tensor]:
    """What the network returns for each batch, in FP32 or with one quantizer on."""
    found: list[Tensor] = []

    def around(call: Any, *_: Any) -> Any:
        kept: list[Any] = []
        found.extend(bench.session.outputs(lambda: kept.append(bench.session.run(call, step=True))).values())
        return kept[0]

    with bench.session.modes(Mode.BYPASS):
        if name is not None:
            bench.session.quantizers[name].mode = Mode.QUANTIZE
        bench.evaluator.run_unchecked(around)
    return found


def assert_is(found: Measurement, evaluation: Evaluation, reference: Evaluation, bench: Bench) -> None:
    direction = bench.settings.direction
    if math.isfinite(evaluation.score):
        assert found.score == evaluation.score
        assert found.loss == direction.loss(reference.score, evaluation.score)
        assert found.interval == loss_interval(reference, evaluation, direction)
    else:
        assert (found.score, found.loss, found.interval) == (None, None, None)


@pytest.mark.parametrize("name", TOPOLOGIES)
@pytest.mark.parametrize("monitor", ["loss", "spearman", "spread"])
def test_every_number_is_that_of_a_validation_in_full(name: str, monitor: str) -> None:
    def action(sensitivities: Sensitivities, bench: Bench) -> None:
        sensitivities.dry_run()
        table = sensitivities.exhaust()
        assert table.way == ""
        assert set(table.alone) == {name for name, q in bench.session.quantizers.items() if q.is_calibrated}
        exact = outputs(bench, None)
        for quantizer, found in table.alone.items():
            assert_is(found, alone(bench, quantizer), bench.reference, bench)
            assert found.whole
            if len(bench.session.topology.output_operations()) == len(bench.session.topology.runs):
                moved = outputs(bench, quantizer)
                whole = [torch.cat([x.flatten() for x in each]) for each in (exact, moved)]
                assert found.sqnr_db == pytest.approx(sqnr_db(*whole), rel=1e-9)
        assert any(one.loss for one in table.alone.values())
        damages = [one.damage for one in table.alone.values()]
        assert damages == sorted(damages, reverse=True)

    analysed(module_of(name), action, monitor)


@pytest.mark.parametrize("name", ["resnet", "branching", "bert"])
def test_the_reverse_table_is_that_of_validations_in_full(name: str) -> None:
    def action(sensitivities: Sensitivities, bench: Bench) -> None:
        table = sensitivities.reverse()
        for quantizer, found in table.off.items():
            assert_is(found, all_but(bench, quantizer), bench.reference, bench)
        assert len({one.score for one in table.off.values()}) > 1

    analysed(module_of(name), action)


def rows(table: Table) -> dict[str, tuple[Any, ...]]:
    return {
        name: (one.score, one.loss, one.interval, one.sqnr_db, one.kl, one.samples) for name, one in table.alone.items()
    }


def test_where_lanes_can_not_carry_validation_the_plain_way_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    class Exchanging(Everything):
        def on_validation_start(self) -> None:
            pass

    def action(sensitivities: Sensitivities, bench: Bench) -> Table:
        sensitivities.dry_run()
        table = sensitivities.exhaust()
        for quantizer, found in table.alone.items():
            assert_is(found, alone(bench, quantizer), bench.reference, bench)
        return table

    side = analysed(module_of("resnet"), action)
    made = module_of("resnet")
    plain = analysed(Exchanging(made.net, made.batches), action)
    assert "each quantizer in a validation of its own, as weights are exchanged" in plain.way
    assert rows(plain) == rows(side)
    # Lanes that hold too much go in smaller groups first, and one by one in the end.
    monkeypatch.setattr(lanes, "MOST_BYTES", 200_000)
    smaller = analysed(module_of("resnet"), action)
    assert smaller.way == ""
    assert rows(smaller) == rows(side)
    monkeypatch.setattr(lanes, "MOST_BYTES", 1)
    one_by_one = analysed(module_of("resnet"), action)
    assert "MiB for each quantizer" in one_by_one.way
    assert rows(one_by_one) == rows(side)


class Hoarding(Everything):
    """Keeps what its steps saw where no snapshot can find it."""

    def __init__(self, net: nn.Module, batches: Any) -> None:
        super().__init__(net, batches)
        kept: list[Tensor] = []
        self.hoard = lambda value: kept.append(value)
        self.total = lambda: torch.stack(kept).sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.hoard(torch.ones(()))
        self.log("hoarded", self.total())


def test_what_validation_hides_from_lanes_is_noticed() -> None:
    def action(sensitivities: Sensitivities, bench: Bench) -> Table:
        sensitivities.dry_run()
        return sensitivities.exhaust()

    made = module_of("reused")
    table = analysed(Hoarding(made.net, made.batches), action)
    assert "keeps something that can not be given back" in table.way
    assert "(hoarded came out differently)" in table.way


def test_fp32_that_comes_out_otherwise_in_a_shared_pass_is_noticed() -> None:
    def action(sensitivities: Sensitivities, bench: Bench) -> Table:
        metrics = {**bench.reference.metrics, "loss": bench.reference.metrics["loss"] * 1.001}
        bench.reference = replace(bench.reference, metrics=metrics)
        return sensitivities.exhaust()

    table = analysed(module_of("reused"), action)
    assert "comes out differently in a pass that several runs share (loss came out differently)" in table.way


def test_the_race_finds_the_worst_and_measures_them_in_full() -> None:
    """Many batches, so that there are rounds; the ten worst of the whole table are exact in the race's."""
    net, _ = zoo.make("mobilenet")
    torch.manual_seed(1)
    module = Judged(net, [torch.randn(8, 3, 16, 16) for _ in range(40)])

    def race(sensitivities: Sensitivities, bench: Bench) -> Table:
        sensitivities.dry_run()
        return sensitivities.race()

    def exhaust(sensitivities: Sensitivities, bench: Bench) -> Table:
        return sensitivities.exhaust()

    raced, whole = analysed(module, race), analysed(module, exhaust)
    assert set(raced.alone) == set(whole.alone)
    assert list(raced.alone)[:10] == list(whole.alone)[:10]
    for name in list(whole.alone)[:10]:
        assert rows(raced)[name] == rows(whole)[name]
        assert raced.alone[name].whole
    early = [one for one in raced.alone.values() if not one.whole]
    assert len(early) >= 5
    assert {one.samples for one in early} <= {64, 256}
    assert raced.left_out == ()


def test_a_quantizer_that_the_score_speaks_against_stays_in_the_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if its output did not: nobody is among the worst here."""
    net, _ = zoo.make("mobilenet")
    torch.manual_seed(1)
    module = Judged(net, [torch.randn(8, 3, 16, 16) for _ in range(40)])
    monkeypatch.setattr(sensitivity, "contenders", lambda bars: [])
    table = analysed(module, lambda sensitivities, bench: sensitivities.race())
    whole = [one for one in table.alone.values() if one.whole]
    assert 0 < len(whole) < len(table.alone)
    early = [one for one in table.alone.values() if not one.whole and one.interval is not None]
    assert early
    assert all(one.interval[0] <= 0 for one in early)


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "analysis.json"

    class Killed(BaseException):
        pass

    def killed(sensitivities: Sensitivities, bench: Bench) -> None:
        sensitivities._lanes = 4
        add, groups = bench.store.add, []

        def add_and_die(*arguments: Any) -> None:
            add(*arguments)
            groups.append(1)
            if len(groups) == 3:
                raise Killed

        bench.store.add = add_and_die
        with pytest.raises(Killed):
            sensitivities.exhaust()

    runs: list[int] = []

    def resumed(sensitivities: Sensitivities, bench: Bench) -> Table:
        bench.progress = lambda done, total: runs.append(total)
        return sensitivities.exhaust()

    analysed(module_of("resnet"), killed, path=path)
    table = analysed(module_of("resnet"), resumed, path=path)
    whole = analysed(module_of("resnet"), lambda sensitivities, bench: sensitivities.exhaust())
    assert rows(table) == rows(whole)
    assert runs[0] == (len(whole.alone) - 12 + 2) * 3
    runs.clear()
    # Another network, another target, other data: nothing of the file is used.
    analysed(module_of("resnet", batches=2), resumed, path=path)
    assert runs[0] == (len(whole.alone) + 2) * 2
    again = module_of("resnet")
    with torch.no_grad():
        next(again.net.parameters()).mul_(1.01)
    runs.clear()
    analysed(again, resumed, path=path)
    assert runs[0] == (len(whole.alone) + 2) * 3
    runs.clear()
    analysed(module_of("resnet"), resumed, path=path, target="w4a5")
    assert runs[0] == (len(whole.alone) + 2) * 3


def test_a_spent_budget_leaves_what_was_measured_so_far() -> None:
    asked: list[int] = []

    def late() -> bool:
        asked.append(1)
        return len(asked) > 3

    def action(sensitivities: Sensitivities, bench: Bench) -> Table:
        sensitivities._lanes = 8
        table = sensitivities.exhaust()
        for name, found in table.alone.items():
            if not found.whole:
                assert_is(
                    found,
                    alone(bench, name, limit=found.samples // 2),
                    bench.evaluator.run(limit=found.samples // 2),
                    bench,
                )
        return table

    table = analysed(module_of("resnet", batches=3), action, bench_settings={"is_late": late})
    whole = [name for name, found in table.alone.items() if found.whole]
    assert len(whole) == 8
    assert len(table.alone) == 16
    assert len(table.left_out) == len(analysed(module_of("resnet"), lambda s, _: s._order)) - 8


def test_a_score_that_says_nothing_is_refused_before_the_long_run() -> None:
    class Constant(Judged):
        def score_of(self, output: Any) -> Tensor:
            return torch.tensor(0.25)

    net, _ = zoo.make("mobilenet")
    module = Constant(net, [torch.randn(2, 3, 16, 16) for _ in range(4)])
    with pytest.raises(EvaluationError, match=r"`loss` is 0\.25 on every batch, also with the sign"):
        analysed(module, lambda sensitivities, bench: sensitivities.dry_run())


def test_a_score_that_does_not_see_the_sign_is_no_constant() -> None:
    class Squared(Judged):
        def score_of(self, output: Any) -> Tensor:
            return output.square().mean()

    net, _ = zoo.make("resnet")
    module = Squared(net, [torch.randn(2, 3, 16, 16) for _ in range(3)])
    assert analysed(module, lambda sensitivities, bench: sensitivities.dry_run()).batches == 3


def test_a_quantizer_that_makes_the_score_no_number_is_the_worst() -> None:
    class Logarithm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = torch.sigmoid(self.a(x)) * 1e-3 + (self.b(x).abs() * 1e3)[:, :1]
            return torch.log(torch.sigmoid(self.a(x)) + y * 0.0 - 1e-4)

    torch.manual_seed(0)
    net = Logarithm()
    with torch.no_grad():
        net.a.bias.fill_(-5.0)

    def action(sensitivities: Sensitivities, bench: Bench) -> Table:
        return sensitivities.exhaust()

    table = analysed(Judged(net, [torch.randn(8, 4) for _ in range(3)]), action, target="w8a4")
    first = next(iter(table.alone.values()))
    assert (first.score, first.loss, first.interval) == (None, None, None)
    assert table.guilty(permitted=1e9) == [name for name, one in table.alone.items() if one.score is None]


def test_the_dry_run_foretells_the_cost() -> None:
    told: list[str] = []

    def action(sensitivities: Sensitivities, bench: Bench) -> None:
        cost = sensitivities.dry_run()
        assert cost.batches == 3
        assert cost.quantizers == len(sensitivities._order)
        assert cost.lane_seconds > 0
        assert cost.seconds(10, 2) == pytest.approx(10 * cost.lane_seconds + 6 * cost.recorded_seconds)

    analysed(module_of("resnet"), action, bench_settings={"tell": told.append})
    assert "quantizers on 3 batches: all of them exactly would take about" in told[0]


def test_divergence_ranks_classes() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    batches = [(torch.randn(16, 6), torch.randint(0, 3, (16,))) for _ in range(3)]

    def action(sensitivities: Sensitivities, bench: Bench) -> None:
        table = sensitivities.exhaust()
        exact = outputs(bench, None)
        for name, found in table.alone.items():
            moved = outputs(bench, name)
            terms = [
                torch.nn.functional.kl_div(
                    q.double().log_softmax(1), p.double().log_softmax(1), log_target=True, reduction="sum"
                )
                for p, q in zip(exact, moved, strict=True)
            ]
            assert found.kl == pytest.approx(float(sum(terms)) / 48, rel=1e-6, abs=1e-12)
            assert found.damage == pytest.approx(found.kl)

    analysed(Classifier(net, batches), action, "acc", mode="max")


class Heads(nn.Module):
    """Two heads whose results are returned in a container, or only as a loss."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.boxes, self.logits = nn.Linear(6, 8), nn.Linear(8, 4), nn.Linear(8, 3)
        self.kind = kind

    def forward(self, x: Tensor, y: Tensor) -> Any:
        z = torch.relu(self.body(x))
        boxes, logits = self.boxes(z), self.logits(z)
        if self.kind == "loss":
            return nn.functional.cross_entropy(logits, y)
        if self.kind == "tuple":
            return boxes, logits
        return {"boxes": boxes, "logits": logits} if self.kind == "dict" else zoo.BertOutput(logits, (boxes,))


class HeadsModule(Judged):
    """Judges each kind of output by what is in it."""

    def score_of(self, output: Any) -> Tensor:
        if isinstance(output, Tensor):
            return output
        if isinstance(output, tuple):
            boxes, logits = output
        elif isinstance(output, dict):
            boxes, logits = output["boxes"], output["logits"]
        else:
            boxes, logits = output.hidden[0], output.logits
        return boxes.square().mean() - logits.softmax(1).max(1).values.mean()


@pytest.mark.parametrize("kind", ["tuple", "dict", "dataclass", "loss"])
def test_outputs_of_every_form_are_analysed(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    batches = [
        (torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(3)
    ]

    def action(sensitivities: Sensitivities, bench: Bench) -> None:
        sensitivities.dry_run()
        table = sensitivities.exhaust()
        for quantizer, found in table.alone.items():
            assert_is(found, alone(bench, quantizer), bench.reference, bench)
            assert found.kl is not None
            assert found.samples == 24
        assert table.alone["net.logits.weight"].kl > 0
        assert len(table.alone) >= 6

    analysed(HeadsModule(Heads(kind), batches), action)


def test_tensors_of_the_first_batch_are_looked_at_without_a_run_of_their_own() -> None:
    seen: dict[str, int] = {}

    def action(sensitivities: Sensitivities, bench: Bench) -> None:
        def keep(name: str, x: Tensor) -> None:
            seen[name] = seen.get(name, 0) + 1

        names = [quantizer.name for quantizer in bench.session.select(kind="activation")]
        bench.visit = lambda: shown(bench.session, {name: partial(keep, name) for name in names})
        runs: list[int] = []
        bench.progress = lambda done, total: runs.append(done)
        sensitivities.exhaust()
        assert len(runs) == (len(sensitivities._order) + 2) * 3
        assert set(seen) == set(names)
        assert all(quantizer.probe is None for quantizer in bench.session.quantizers.values())

    analysed(module_of("mobilenet"), action)
    assert set(seen.values()) == {1}

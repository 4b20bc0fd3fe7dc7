"""Several evaluations in one pass: each ends with the numbers of a pass of its own, whatever validation does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torchmetrics
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_quantdebug import lanes
from lightning_quantdebug.errors import EvaluationError, LanesError
from lightning_quantdebug.evaluation import Evaluation, Evaluator
from tests.torture import NAMESPACES, calling, lightning, loader, simple_class, torture_class, trainer

pytestmark = pytest.mark.filterwarnings("ignore")

FACTORS = {"reference": 1.0, "half": 0.5, "none": 0.0, "turned": -1.0}


class Table:
    """Runs fixed lanes, each with the last layer's weights times its own factor."""

    def __init__(self, module: Any, names: Sequence[str] = tuple(FACTORS), skips: int = 0) -> None:
        self.module = module
        self.names = list(names)
        self.factor = 1.0
        self.seen: list[str] = []
        self.batches = 0
        self.skips = skips

    def lanes(self) -> Sequence[str]:
        self.batches += 1
        return self.names if self.batches <= 2 or not self.skips else self.names[: -self.skips]

    def enter(self, lane: str) -> None:
        self.factor = FACTORS[lane]
        self.seen.append(lane)

    def left(self, lane: str) -> None:
        self.seen.append(f"{lane} left")

    def around(self, call: Callable[[], Any], *_: Any) -> Any:
        weight = self.module.net[-1 if len(self.module.net) == 4 else -2].weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(self.factor)
        try:
            return call()
        finally:
            weight.data.copy_(before)


def in_validation(module: Any, data: Any, action: Callable[[Any], Any], root: Any, **settings: Any) -> Any:
    results: list[Any] = []
    namespace = settings.pop("namespace", "pytorch_lightning")
    callback = calling(namespace, on_validation_end=lambda running, _: results.append(action(running)))
    trainer(root, namespace, callbacks=[callback, *settings.pop("callbacks", [])], **settings).validate(
        module, data, verbose=False
    )
    return results[0]


def plain(running: Any, module: Any, monitor: str, lane: str, **settings: Any) -> Evaluation:
    table = Table(module)
    table.factor = FACTORS[lane]
    return Evaluator(running, module, monitor, **settings).run(table.around)


def assert_equal(found: Evaluation, expected: Evaluation, without: str = "") -> None:
    values = [{name: x for name, x in one.metrics.items() if name != without} for one in (found, expected)]
    assert values[0] == values[1]
    assert (found.score, found.batches, found.samples) == (expected.score, expected.batches, expected.samples)


class Gathering(torture_class()):  # type: ignore[misc] # the base is made at run time
    """Keeps every probability for the end of the epoch, and does something after each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.auroc = torchmetrics.classification.MulticlassAUROC(3)
        self.kept: list[Tensor] = []
        self.after: list[float] = []

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        loss = super().validation_step(batch, batch_idx)
        outputs = self(batch[0])
        self.auroc(outputs.softmax(1), batch[1])
        self.log("auroc", self.auroc)
        self.kept.append(outputs)
        return loss

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.after.append(float(outputs) + float(torch.rand(())))

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.log("spread", torch.cat(self.kept).std())
        self.log("after", sum(self.after) / len(self.after))
        self.log("drawn", torch.rand(()))


@pytest.mark.parametrize("monitor", ["accuracy", "auroc", "spread", "after", "worst", "best"])
def test_lanes_end_with_the_numbers_of_passes_of_their_own(tmp_path: Any, monitor: str) -> None:
    module = Gathering()

    def action(running: Any) -> None:
        table = Table(module)
        found = Evaluator(running, module, monitor).run_lanes(table, table.around)
        assert list(found) == list(reversed(FACTORS))
        for lane, evaluation in found.items():
            assert_equal(evaluation, plain(running, module, monitor, lane))
        assert len({evaluation.metrics["loss"] for evaluation in found.values()}) == 4

    in_validation(module, loader(), action, tmp_path)


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("loaders", [1, 2])
def test_lanes_inside_a_fit_with_several_loaders(tmp_path: Any, namespace: str, loaders: int) -> None:
    class Module(torture_class(namespace)):  # type: ignore[misc] # the base is made at run time
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return super().validation_step(batch, batch_idx)

    module, monitor = Module(), "loss" if loaders == 1 else "loss/dataloader_idx_1"
    checked: list[str] = []

    def hook(running: Any, _: Any) -> None:
        table = Table(module)
        found = Evaluator(running, module, monitor).run_lanes(table, table.around)
        for lane, evaluation in found.items():
            assert_equal(evaluation, plain(running, module, monitor, lane))
            checked.append(lane)

    def run(hooks: dict[str, Any]) -> Any:
        lightning(namespace).seed_everything(0)
        fitted = Module()
        nonlocal module
        module = fitted
        data = [loader(30, seed, shuffle=True) for seed in range(loaders)]
        running = trainer(tmp_path, namespace, max_epochs=2, callbacks=[calling(namespace, **hooks)])
        running.fit(fitted, loader(shuffle=True), data)
        return [value.clone() for value in fitted.state_dict().values()], vars(fitted)["epochs"], fitted.total

    with_lanes = run({"on_train_epoch_end": hook, "on_validation_end": hook})
    without = run({})
    assert len(checked) == 4 * 2 * 2
    assert all(map(torch.equal, with_lanes[0], without[0]))
    assert with_lanes[1] == without[1]
    assert torch.equal(with_lanes[2], without[2])


def test_a_lane_that_leaves_early_has_the_numbers_of_the_batches_that_it_saw(tmp_path: Any) -> None:
    module = Gathering()

    def action(running: Any) -> None:
        table = Table(module, skips=2)
        found = Evaluator(running, module, "auroc").run_lanes(table, table.around)
        for lane, evaluation in found.items():
            limit = 2 if lane in ("none", "turned") else 6
            # What is drawn at the end of the epoch depends on how many batches have drawn before.
            assert_equal(evaluation, plain(running, module, "auroc", lane, limit_batches=limit), without="drawn")
        assert table.seen[:4] == ["reference", "reference left", "half", "half left"]

    in_validation(module, loader(), action, tmp_path)


def test_limits_and_seeds_are_those_of_the_evaluator(tmp_path: Any) -> None:
    module = Gathering()

    def action(running: Any) -> None:
        for settings, limit in (({"limit_batches": 3, "seed": 5}, None), ({"seed": 5}, 0.5)):
            table = Table(module)
            found = Evaluator(running, module, "loss", **settings).run_lanes(table, table.around, limit=limit)
            own = plain(running, module, "loss", "half", seed=5, limit_batches=3)
            assert_equal(found["half"], own)

    in_validation(module, loader(shuffle=True), action, tmp_path)


class Drawing(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Samples with random noise, from the generator that the user's hooks draw from too."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        inputs, label = loader().dataset[index]
        return inputs + 0.1 * torch.randn(8), label


def test_random_data_is_that_of_a_pass_of_its_own(tmp_path: Any) -> None:
    module = Gathering()

    def action(running: Any) -> None:
        table = Table(module)
        found = Evaluator(running, module, "loss").run_lanes(table, table.around)
        for lane, evaluation in found.items():
            assert_equal(evaluation, plain(running, module, "loss", lane))

    in_validation(module, DataLoader(Drawing(), 8), action, tmp_path)


def test_a_batch_is_transferred_once(tmp_path: Any) -> None:
    seen: dict[int, list[Tensor]] = {}

    class Module(simple_class()):  # type: ignore[misc] # the base is made at run time
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] * 2.0, batch[1]]

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            seen.setdefault(batch_idx, []).append(batch[0])
            return super().validation_step(batch, batch_idx)

    module = Module()

    def action(running: Any) -> None:
        seen.clear()
        table = Table(module)
        Evaluator(running, module, "loss").run_lanes(table, table.around)
        assert "batch_to_device" not in vars(running.strategy)

    in_validation(module, loader(16), action, tmp_path)
    assert {batch: len({id(x) for x in inputs}) for batch, inputs in seen.items()} == {0: 1, 1: 1}
    assert [len(inputs) for inputs in seen.values()] == [4, 4]


def test_lanes_that_can_not_be_kept_apart_are_refused(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Writes(simple_class()):  # type: ignore[misc] # the base is made at run time
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            batch[0].add_(1.0)
            return super().validation_step(batch, batch_idx)

    class Exchanges(simple_class()):  # type: ignore[misc] # as above
        def on_validation_start(self) -> None:
            pass

    def refusal(module: Any) -> str:
        def action(running: Any) -> str:
            table = Table(module)
            with pytest.raises(LanesError) as caught:
                Evaluator(running, module, "loss").run_lanes(table, table.around)
            return str(caught.value)

        return str(in_validation(module, DataLoader(loader().dataset, 8), action, tmp_path))

    assert "writes into its batch" in refusal(Writes())
    assert "weights are exchanged" in refusal(Exchanges())
    monkeypatch.setattr(lanes, "MOST_BYTES", 100)
    assert "MiB for each quantizer" in refusal(Gathering())


def test_a_metric_of_a_callback_is_refused(tmp_path: Any) -> None:
    module = simple_class()()
    refused: list[str] = []

    class Logs(lightning().Callback):  # type: ignore[misc] # the base is chosen at run time
        ran = False

        def on_validation_epoch_end(self, running: Any, pl_module: Any) -> None:
            pl_module.log("theirs", 1.0)

        def on_validation_end(self, running: Any, pl_module: Any) -> None:
            if self.ran:
                return
            self.ran = True
            evaluator, table = Evaluator(running, module, "theirs"), Table(module)
            evaluator.run()
            with pytest.raises(LanesError) as caught:
                evaluator.run_lanes(table, table.around)
            refused.append(str(caught.value))

    trainer(tmp_path, callbacks=[Logs()]).validate(module, loader(), verbose=False)
    assert refused == ["the metric is logged by a callback"]


def test_lanes_do_not_run_inside_a_pass(tmp_path: Any) -> None:
    module = simple_class()()

    def action(running: Any) -> None:
        evaluator, table = Evaluator(running, module, "loss"), Table(module)

        def around(call: Any, *_: Any) -> Any:
            evaluator.run_lanes(table, table.around)

        with pytest.raises(EvaluationError, match="inside a validation"):
            evaluator.run(around)

    in_validation(module, loader(), action, tmp_path)


def test_an_exception_in_a_lane_leaves_no_trace(tmp_path: Any) -> None:
    module = Gathering()

    def action(running: Any) -> None:
        table = Table(module)

        def around(call: Any, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
            if batch_idx == 2 and table.factor == 0.0:
                raise KeyboardInterrupt
            return table.around(call)

        before = (module.epochs, module.total.clone(), list(module.kept), module.meter.count)
        with pytest.raises(KeyboardInterrupt):
            Evaluator(running, module, "loss").run_lanes(table, around)
        after = (module.epochs, module.total, module.kept, module.meter.count)
        assert before[0] == after[0]
        assert torch.equal(before[1], after[1])
        assert (len(before[2]), before[3]) == (len(after[2]), after[3])
        assert "batch_to_device" not in vars(running.strategy)
        assert_equal(plain(running, module, "loss", "half"), plain(running, module, "loss", "half"))

    in_validation(module, loader(), action, tmp_path)

"""The score of an extra pass is the score that the Trainer itself would log."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_quantdebug.evaluation import BatchScore, Evaluator
from tests.torture import NAMESPACES, calling, lightning, loader, simple_class, torture_class, trainer

pytestmark = pytest.mark.filterwarnings("ignore")


def passes(results: list[Any], monitor: str = "accuracy", **settings: Any) -> Any:
    """A hook that runs one pass and keeps its result beside what the Trainer logged."""

    def hook(running: Any, pl_module: Any) -> None:
        arguments = dict(settings)
        made = {name: arguments.pop(name) for name in ("limit_batches", "seed") if name in arguments}
        evaluation = Evaluator(running, pl_module, monitor, **made).run(**arguments)
        results.append((evaluation, {name: value.item() for name, value in running.callback_metrics.items()}))

    return hook


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("hook", ["on_train_epoch_end", "on_train_end", "on_fit_end", "on_validation_end"])
def test_nested_scores_are_those_that_the_trainer_logged(tmp_path: Any, namespace: str, hook: str) -> None:
    results: list[Any] = []
    running = trainer(tmp_path, namespace, callbacks=[calling(namespace, **{hook: passes(results)})])
    running.fit(simple_class(namespace)(), loader(), loader(30, 1))
    ((evaluation, logged),) = results
    assert evaluation.metrics == {name: logged[name] for name in ("accuracy", "loss", "mean_loss")}
    assert evaluation.score == logged["accuracy"]


@pytest.mark.parametrize("inference_mode", [True, False])
@pytest.mark.parametrize("loaders", [1, 2])
def test_inside_trainer_validate(tmp_path: Any, inference_mode: bool, loaders: int) -> None:
    class Module(torture_class()):  # type: ignore[misc] # the base is made at run time
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
            return super().validation_step(batch, batch_idx)

    results: list[Any] = []
    monitor = "loss" if loaders == 1 else "loss/dataloader_idx_1"
    callback = calling(on_validation_end=passes(results, monitor))
    running = trainer(tmp_path, callbacks=[callback], inference_mode=inference_mode)
    module = Module().train()
    returned = running.validate(module, [loader(30, seed) for seed in range(loaders)], verbose=False)
    ((evaluation, _),) = results
    assert evaluation.score == returned[-1][monitor]
    assert {key: value for key, value in evaluation.metrics.items() if "loss" in key} == {
        key: value for one in returned for key, value in one.items() if "loss" in key
    }
    assert module.training
    assert module.epochs == 1
    assert module.losses == []
    assert torch.equal(
        module.total, sum(torch.bincount(loader(30, seed).dataset.tensors[1]) for seed in range(loaders))
    )


def test_what_a_pass_made_in_validate_can_be_used_with_autograd(tmp_path: Any) -> None:
    kept: list[Any] = []

    def around(call: Any, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        kept.append(call())
        return kept[-1]

    def hook(running: Any, pl_module: Any) -> None:
        assert torch.is_inference_mode_enabled()
        Evaluator(running, pl_module, "loss").run(around)
        assert torch.is_inference_mode_enabled()

    trainer(tmp_path, callbacks=[calling(on_validation_end=hook)]).validate(simple_class()(), loader(), verbose=False)
    (kept[0] * torch.ones((), requires_grad=True)).backward()


@pytest.mark.parametrize(
    "settings",
    [
        {"limit_val_batches": 2},
        {"limit_val_batches": 0.5},
        {"precision": "bf16-mixed"},
        {"precision": "64-true"},
        {"num_sanity_val_steps": 0},
        {"reload_dataloaders_every_n_epochs": 1, "max_epochs": 2},
    ],
    ids=str,
)
def test_trainer_settings_hold_in_a_pass(tmp_path: Any, settings: dict[str, Any]) -> None:
    results: list[Any] = []
    running = trainer(tmp_path, callbacks=[calling(on_train_epoch_end=passes(results, "mean_loss"))], **settings)
    running.fit(simple_class()(), loader(), loader(30, 1))
    assert len(results) == settings.get("max_epochs", 1)
    for evaluation, logged in results:
        assert evaluation.score == logged["mean_loss"]


@pytest.mark.parametrize("hook", ["on_fit_start", "on_train_start", "on_train_epoch_start", "on_train_batch_end"])
def test_passes_in_earlier_hooks_see_the_model_of_that_moment(tmp_path: Any, hook: str) -> None:
    results: list[Any] = []
    module = simple_class()()
    expected = []

    def by_hand(running: Any, pl_module: Any) -> None:
        inputs, targets = loader(30, 1).dataset.tensors
        pl_module.eval()
        expected.append(float((pl_module(inputs).argmax(1) == targets).float().mean()))
        pl_module.train()

    callbacks = [calling(**{hook: passes(results)}), calling(**{hook: by_hand})]
    trainer(tmp_path, callbacks=callbacks, max_steps=1).fit(module, loader(), loader(30, 1))
    assert [evaluation.score for evaluation, _ in results] == pytest.approx(expected)


def test_two_validation_loaders(tmp_path: Any) -> None:
    class Module(simple_class()):  # type: ignore[misc] # the base is made at run time
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
            self.places.append((batch_idx, dataloader_idx))
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.log("loss", loss)

        def on_validation_epoch_end(self) -> None:
            pass

    seen: list[Any] = []

    def hook(running: Any, pl_module: Any) -> None:
        evaluator = Evaluator(running, pl_module, "loss/dataloader_idx_1", limit_batches=2)
        places: list[Any] = []
        evaluation = evaluator.run(lambda call, batch, *place: (places.append(place), call())[1])
        seen.append((evaluation, places))
        training = Evaluator(running, pl_module, "loss/dataloader_idx_0").run(loader="train", limit=3)
        seen.append((training, [batch.weight for batch in training.batches or ()]))

    module = Module()
    module.places = []
    running = trainer(tmp_path, callbacks=[calling(on_train_epoch_end=hook)])
    running.fit(module, loader(), [loader(30, 1), loader(20, 2, batch_size=5)])
    (evaluation, places), (training, weights) = seen
    assert places == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [batch.weight for batch in evaluation.batches] == [5.0, 5.0]
    assert evaluation.samples == 10
    assert set(evaluation.metrics) == {"loss/dataloader_idx_0", "loss/dataloader_idx_1"}
    assert weights == [8.0, 8.0, 8.0]
    assert math.isfinite(training.score)


def test_names_of_forked_and_unlogged_metrics(tmp_path: Any) -> None:
    results: list[Any] = []
    callbacks = [calling(on_train_epoch_end=passes(results, name)) for name in ("both_epoch", "both", "quiet", "best")]
    trainer(tmp_path, callbacks=callbacks).fit(torture_class()(), loader(), loader(30, 1))
    for (evaluation, logged), name in zip(results, ("both_epoch", "both", "quiet", "best"), strict=True):
        assert evaluation.score == logged[name]


def test_metric_that_only_a_callback_logs(tmp_path: Any) -> None:
    class Logs(lightning().Callback):  # type: ignore[misc] # the base is chosen at run time
        calls = 0

        def on_validation_batch_end(self, running: Any, pl_module: Any, outputs: Any, *args: Any) -> None:
            self.calls += 1
            pl_module.log("from_callback", outputs * 2)

    results: list[Any] = []
    callback = Logs()
    running = trainer(tmp_path, callbacks=[callback, calling(on_train_epoch_end=passes(results, "from_callback"))])
    running.fit(simple_class()(), loader(), loader(30, 1))
    ((evaluation, logged),) = results
    assert evaluation.score == logged["from_callback"]
    assert evaluation.batches is not None
    assert callback.calls == 2 + 4, "the sanity check and the Trainer's validation, nothing else"


def test_weight_averaging_takes_part(tmp_path: Any) -> None:
    results: list[Any] = []
    average = lightning().callbacks.EMAWeightAveraging(decay=0.5)
    hooks = {"on_train_epoch_end": passes(results, "loss"), "on_validation_end": passes(results, "loss")}
    running = trainer(tmp_path, callbacks=[calling(**hooks), average], max_epochs=2)
    running.fit(simple_class()(), loader(), loader(30, 1))
    assert len(results) == 4
    for evaluation, logged in results:
        assert evaluation.score == logged["loss"]


def test_shuffled_loader_gives_the_same_batches_in_every_pass(tmp_path: Any) -> None:
    orders: dict[Any, list[Any]] = {}

    def hook(running: Any, pl_module: Any) -> None:
        for key, seed, model_seed in (("a", 0, 0), ("b", 0, 1), ("c", 1, 0)):
            batches = orders.setdefault((running.current_epoch, key), [])
            evaluator = Evaluator(running, pl_module, "loss", limit_batches=2, seed=seed)
            evaluator.run(lambda call, batch, *_: (batches.append(batch[0]), call())[1], model_seed=model_seed)  # noqa: B023 # called before the loop goes on

    own = torch.Generator()
    for generator in (None, own):
        orders.clear()
        validation = loader(40, 1, shuffle=True, generator=generator)
        running = trainer(tmp_path, callbacks=[calling(on_train_epoch_end=hook)], max_epochs=2, limit_val_batches=3)
        running.fit(simple_class()(), loader(), validation)
        first = torch.stack(orders[0, "a"])
        for same in ((0, "b"), (1, "a"), (1, "b")):
            assert torch.equal(first, torch.stack(orders[same]))
        assert not torch.equal(first, torch.stack(orders[0, "c"]))


def test_dropout_left_on_draws_by_model_seed(tmp_path: Any) -> None:
    class Module(simple_class()):  # type: ignore[misc] # the base is made at run time
        def forward(self, x: Any) -> Any:
            return nn.functional.dropout(super().forward(x), 0.5, training=True)

    scores = []

    def hook(running: Any, pl_module: Any) -> None:
        evaluator = Evaluator(running, pl_module, "loss")
        scores.extend(evaluator.run(model_seed=seed) for seed in (3, 3, 4))
        scores.append(evaluator.run(lambda call, *_: (torch.rand(7), call())[1], model_seed=3))

    trainer(tmp_path, callbacks=[calling(on_train_epoch_end=hook)]).fit(Module(), loader(), loader(30, 1))
    first, same, other, drawn = scores
    assert first.batches == same.batches == drawn.batches
    assert first.score != other.score
    assert len({batch.value for batch in first.batches}) == len(first.batches)


def test_random_numbers_of_the_step_and_of_the_data_are_apart(tmp_path: Any) -> None:
    class Module(simple_class()):  # type: ignore[misc] # the base is made at run time
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("noise", torch.rand(()) + float(np.random.rand()) + random.random())
            self.log("data", batch[0].mean())

        def on_validation_epoch_end(self) -> None:
            pass

    class Augmented(TensorDataset):
        def __getitem__(self, index: int) -> Any:
            return torch.rand(8), self.tensors[1][index]

    results: dict[Any, Any] = {}

    def hook(running: Any, pl_module: Any) -> None:
        for seeds in ((0, 0), (0, 1), (1, 0)):
            for name in ("noise", "data"):
                evaluator = Evaluator(running, pl_module, name, seed=seeds[0])
                results[name, seeds] = evaluator.run(model_seed=seeds[1]).batches

    validation = DataLoader(Augmented(*loader(30, 1).dataset.tensors), batch_size=8)
    trainer(tmp_path, callbacks=[calling(on_train_epoch_end=hook)]).fit(Module(), loader(), validation)
    noise = [batch.value for batch in results["noise", (0, 0)]]
    assert len(set(noise)) == len(noise)
    assert results["noise", (0, 0)] == results["noise", (1, 0)] != results["noise", (0, 1)]
    assert results["data", (0, 0)] == results["data", (0, 1)] != results["data", (1, 0)]


def test_a_repeated_call_counts_once_and_the_last_one_counts(tmp_path: Any) -> None:
    results: list[Any] = []

    def hook(running: Any, pl_module: Any) -> None:
        def around(call: Any, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
            batch[0].mul_(-1)
            wrong = call()
            batch[0].mul_(-1)
            right = call()
            assert wrong != right
            return right

        for monitor in ("best", "accuracy", "loss"):
            evaluator = Evaluator(running, pl_module, monitor)
            results.append((evaluator.run(), evaluator.run(around)))

    trainer(tmp_path, callbacks=[calling(on_train_epoch_end=hook)]).fit(torture_class()(), loader(), loader(30, 1))
    for plain, repeated in results:
        assert repeated.metrics == plain.metrics
        assert repeated.batches == plain.batches
        assert repeated.samples == plain.samples == 30


def test_score_changes_with_the_model_and_the_model_comes_back(tmp_path: Any) -> None:
    results: list[Any] = []

    def hook(running: Any, pl_module: Any) -> None:
        def around(call: Any, *_: Any) -> Any:
            handle = pl_module.net[0].register_forward_hook(lambda module, inputs, output: output.round())
            try:
                return call()
            finally:
                handle.remove()

        evaluator = Evaluator(running, pl_module, "loss")
        results.extend((evaluator.run(), evaluator.run(around), evaluator.run()))

    trainer(tmp_path, callbacks=[calling(on_train_epoch_end=hook)]).fit(simple_class()(), loader(), loader(30, 1))
    before, rounded, after = results
    assert before.score == after.score != rounded.score


@pytest.mark.parametrize(("monitor", "direction"), [("accuracy", True), ("loss", None)])
def test_batches_average_to_the_score(tmp_path: Any, monitor: str, direction: bool | None) -> None:
    results: list[Any] = []

    def hook(running: Any, pl_module: Any) -> None:
        evaluator = Evaluator(running, pl_module, monitor)
        results.append(evaluator.run())
        assert evaluator.higher_is_better() is direction
        assert evaluator.higher_is_better("accuracy") is True

    trainer(tmp_path, callbacks=[calling(on_train_epoch_end=hook)]).fit(simple_class()(), loader(), loader(30, 1))
    (evaluation,) = results
    assert [batch.weight for batch in evaluation.batches] == [8.0, 8.0, 8.0, 6.0]
    mean = sum(batch.value * batch.weight for batch in evaluation.batches) / 30
    assert mean == pytest.approx(evaluation.score, rel=1e-6)
    assert len({batch.value for batch in evaluation.batches}) > 1


@pytest.mark.parametrize("monitor", ["mean_loss", "worst", "correct", "best"])
def test_scores_without_batches_have_none(tmp_path: Any, monitor: str) -> None:
    results: list[Any] = []
    running = trainer(tmp_path, callbacks=[calling(on_train_epoch_end=passes(results, monitor))])
    running.fit(torture_class()(), loader(), loader(30, 1))
    ((evaluation, _),) = results
    assert evaluation.batches is None
    assert evaluation.samples == 30


def test_calibration_loaders(tmp_path: Any) -> None:
    inputs: dict[str, Any] = {}
    given = loader(20, 5, batch_size=4)

    def hook(running: Any, pl_module: Any) -> None:
        def see(name: str, **arguments: Any) -> None:
            batches = inputs.setdefault(name, [])
            result = Evaluator(running, pl_module, "mean_loss").run(
                lambda call, batch, *_: (batches.append(batch[0]), call())[1], **arguments
            )
            assert math.isfinite(result.score)

        see("train", loader="train", limit=2)
        see("train again", loader="train", limit=2)
        see("given", loader=given)
        see("share", loader=given, limit=0.4)
        see("list", loader=list(given), limit=3)

    callbacks = [calling(on_fit_start=hook)]
    trainer(tmp_path, callbacks=callbacks, max_steps=1, limit_train_batches=3).fit(
        simple_class()(), loader(shuffle=True), loader(30, 1)
    )
    everything = samples_of(loader())
    assert all(row in everything for row in rows(inputs["train"]))
    assert len(rows(inputs["train"])) == 16
    assert rows(inputs["train"]) == rows(inputs["train again"])
    assert rows(inputs["given"]) == samples_of(given)
    assert rows(inputs["list"]) == samples_of(given)[:12]
    assert rows(inputs["share"]) == samples_of(given)[:8]


def rows(batches: list[torch.Tensor]) -> list[tuple[float, ...]]:
    return [tuple(row.tolist()) for batch in batches for row in batch]


def samples_of(source: Any) -> list[tuple[float, ...]]:
    return rows([source.dataset.tensors[0]])


def test_training_loader_in_validate_comes_from_the_datamodule(tmp_path: Any) -> None:
    class Data(lightning().LightningDataModule):  # type: ignore[misc] # the base is chosen at run time
        asked = 0

        def train_dataloader(self) -> Any:
            self.asked += 1
            return loader(24, 3)

        def val_dataloader(self) -> Any:
            return loader(30, 1)

    weights: list[Any] = []

    def hook(running: Any, pl_module: Any) -> None:
        evaluator = Evaluator(running, pl_module, "loss")
        for _ in range(2):
            weights.append(sum(batch.weight for batch in evaluator.run(loader="train").batches))

    data = Data()
    trainer(tmp_path, callbacks=[calling(on_validation_end=hook)]).validate(simple_class()(), data, verbose=False)
    assert weights == [24.0, 24.0]
    assert data.asked == 1


@pytest.mark.parametrize("hook", ["on_validation_end", "on_train_epoch_end"])
def test_a_pass_starts_from_clean_metrics_and_lists(tmp_path: Any, hook: str) -> None:
    class Module(simple_class()):  # type: ignore[misc] # the base is made at run time
        """Tidies up as late as it can."""

        def on_validation_epoch_end(self) -> None:
            self.log("mean_loss", torch.stack(self.losses).mean())

        def on_validation_end(self) -> None:
            assert "mean_loss" in self.trainer.callback_metrics
            self.losses.clear()

    results: list[Any] = []
    expected: list[float] = []

    def by_hand(running: Any, pl_module: Any) -> None:
        modes = [part.training for part in pl_module.modules()]
        inputs, targets = next(iter(loader(30, 1)))
        expected.append(float((pl_module.eval()(inputs).argmax(1) == targets).float().mean()))
        for part, mode in zip(pl_module.modules(), modes, strict=True):
            part.training = mode

    def run(*place: Any) -> None:
        for name in ("accuracy", "mean_loss", "loss"):
            passes(results, name, limit=1)(*place)
        by_hand(*place)

    trainer(tmp_path, callbacks=[calling(**{hook: run})]).fit(Module(), loader(), loader(30, 1))
    accuracy, mean_loss, loss = (evaluation for evaluation, _ in results)
    assert accuracy.score == expected[0]
    assert mean_loss.score == loss.score


def test_metric_objects_of_every_kind_in_batches(tmp_path: Any) -> None:
    class Module(simple_class()):  # type: ignore[misc] # the base is made at run time
        def __init__(self) -> None:
            super().__init__()
            self.squared = torchmetrics.MeanSquaredError()
            self.ranked = torchmetrics.classification.MulticlassAUROC(3)
            self.updated = torchmetrics.classification.MulticlassAUROC(3)
            self.many = torchmetrics.MetricCollection(
                {
                    "precision": torchmetrics.classification.MulticlassPrecision(3, average="micro"),
                    "recall": torchmetrics.classification.MulticlassRecall(3, average="micro"),
                }
            )

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            outputs = self(batch[0]).softmax(1)
            self.squared.update(outputs[:, 0], (batch[1] == 0).float())
            self.ranked(outputs, batch[1])
            self.updated.update(outputs, batch[1])
            self.many.update(outputs, batch[1])
            self.log("squared", self.squared)
            self.log("ranked", self.ranked)
            self.log("updated", self.updated)
            self.log_dict(self.many)

        def on_validation_epoch_end(self) -> None:
            pass

    results: dict[str, Any] = {}

    def hook(running: Any, pl_module: Any) -> None:
        for name in ("squared", "ranked", "updated", "recall"):
            results[name] = Evaluator(running, pl_module, name).run()
        pl_module.eval()
        for batch in loader(30, 1):
            outputs = pl_module(batch[0]).softmax(1)
            error = (outputs[:, 0] - (batch[1] == 0).float()).square().mean()
            expected.append((float(error), float((outputs.argmax(1) == batch[1]).float().mean())))
        pl_module.train()

    expected: list[tuple[float, float]] = []
    trainer(tmp_path, callbacks=[calling(on_train_epoch_end=hook)]).fit(Module(), loader(), loader(30, 1))
    squared = [batch.value for batch in results["squared"].batches]
    assert squared == pytest.approx([error for error, _ in expected], rel=1e-4)
    assert [batch.value for batch in results["recall"].batches] == pytest.approx([recall for _, recall in expected])
    assert len(results["ranked"].batches) == 4
    assert results["updated"].batches is None
    assert isinstance(results["ranked"].batches[0], BatchScore)

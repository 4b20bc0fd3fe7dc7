"""A fit with passes in it is, to the last bit, the fit without them."""

from __future__ import annotations

import copy
import hashlib
import pickle
import random
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_quantdebug.errors import EvaluationError
from lightning_quantdebug.evaluation import Evaluator
from tests.torture import NAMESPACES, calling, lightning, loader, samples, simple_class, torture_class, trainer

pytestmark = pytest.mark.filterwarnings("ignore")

HOOKS = (
    "on_fit_start",
    "on_train_start",
    "on_train_epoch_start",
    "on_train_batch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_train_end",
    "on_fit_end",
)


def disturb(running: Any, pl_module: Any) -> None:
    """Two passes over validation, the second with other weights, and one over the training data."""

    def around(call: Any, *_: Any) -> Any:
        weight = pl_module.net[0].weight.data
        kept = weight.clone()
        weight.mul_(-1)
        try:
            return call()
        finally:
            weight.copy_(kept)

    monitor = "loss" if running.state.fn == "fit" else "accuracy"
    evaluator = Evaluator(running, pl_module, monitor)
    validated = getattr(running, "_last_val_time", None)
    first = evaluator.run().score
    assert evaluator.run(around).score != first
    evaluator.run(loader="train", limit=1)
    assert getattr(running, "_last_val_time", None) == validated
    running.counted = getattr(running, "counted", 0) + 1


def random_state() -> str:
    states = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    return hashlib.sha256(pickle.dumps(states)).hexdigest()


def digest(state: dict[str, Any]) -> str:
    """Hash of every bit of a state_dict."""
    content = [(name, str(value.dtype), value.numpy(force=True).tobytes()) for name, value in state.items()]
    return hashlib.sha256(pickle.dumps(content)).hexdigest()


def attributes_of(module: Any) -> dict[str, Any]:
    """What the user's own attributes hold."""
    names = ("epochs", "total", "_private", "kinds", "recent", "table", "losses")
    values = {name: getattr(module, name) for name in names}
    metrics = {
        name: vars(metric)["_update_count"] for name, metric in module.named_modules() if hasattr(metric, "reset")
    }
    plain = {
        "meter": vars(module.meter),
        "best": module.best.max_value,
        "metrics": metrics,
        "names": sorted(vars(module)),
    }
    return {name: str(value) for name, value in {**values, **plain}.items()}


def fit(root: Path, hook: str | None, namespace: str = "pytorch_lightning", **settings: Any) -> dict[str, Any]:
    """All that a fit leaves behind, with ``disturb`` in one of its hooks."""
    package = lightning(namespace)
    package.seed_everything(7, workers=True)
    module = torture_class(namespace)()
    records: list[Any] = []

    def record(running: Any, pl_module: Any) -> None:
        metrics = {name: value.item() for name, value in running.callback_metrics.items()}
        modes = [part.training for part in pl_module.modules()]
        records.append((metrics, random_state(), modes, str(running.progress_bar_metrics), str(running.logged_metrics)))

    checkpoint = package.callbacks.ModelCheckpoint(root / "files", "{epoch}-{step}", monitor="loss", save_top_k=2)
    stopping = package.callbacks.EarlyStopping("loss", patience=2)
    records_each = calling(namespace, on_train_epoch_end=record, on_validation_end=record, on_train_batch_end=record)
    callbacks = [checkpoint, stopping, records_each]
    if hook is not None:
        callbacks.insert(1, calling(namespace, **{hook: disturb}))
    logger = package.loggers.CSVLogger(root, name="", version="csv")
    profiler = package.profilers.SimpleProfiler(root, "profile")
    defaults = {"max_epochs": 2, "enable_checkpointing": True, "log_every_n_steps": 1, "limit_train_batches": 4}
    running = trainer(
        root, namespace, callbacks=callbacks, logger=logger, profiler=profiler, **{**defaults, **settings}
    )
    calls = {"train": 0, "val": 0}
    module.train_dataloader = counted(calls, "train", lambda: loader(shuffle=True))
    module.val_dataloader = counted(calls, "val", lambda: loader(30, 1, shuffle=True))
    running.fit(module)
    assert hook is None or running.counted
    return {
        "weights": digest(module.state_dict()),
        "attributes": attributes_of(module),
        "records": records,
        "csv": (root / "csv" / "metrics.csv").read_text(),
        "files": sorted(path.name for path in (root / "files").iterdir()),
        "checkpoint": str(checkpoint.state_dict()).replace(str(root), "ROOT"),
        "stopping": stopping.state_dict(),
        "loops": (running.fit_loop.state_dict(), running.validate_loop.state_dict()),
        "random": random_state(),
        "calls": calls,
        "actions": {
            name: len(times)
            for name, times in profiler.recorded_durations.items()
            if not re.search("Calling|_dataloader", name)
        },
    }


def counted(calls: dict[str, int], name: str, make: Any) -> Any:
    def dataloader() -> Any:
        calls[name] += 1
        return make()

    return dataloader


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return fit(tmp_path_factory.mktemp("reference"), None)


@pytest.mark.parametrize("hook", HOOKS)
def test_fit_with_passes_is_the_fit_without(tmp_path: Path, reference: dict[str, Any], hook: str) -> None:
    disturbed = fit(tmp_path, hook)
    # Calibrating before the training loader exists asks for it once more, with the random state isolated.
    reference["calls"]["train"] = 2 if hook == "on_fit_start" else 1
    for name, expected in reference.items():
        assert disturbed[name] == expected, name


@pytest.mark.parametrize(
    "settings",
    [
        {"num_sanity_val_steps": 0},
        {"val_check_interval": 2},
        {"limit_val_batches": 2},
        {"precision": "bf16-mixed"},
        {"reload_dataloaders_every_n_epochs": 1},
        {"check_val_every_n_epoch": 2},
        {"check_val_every_n_epoch": 2, "reload_dataloaders_every_n_epochs": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("hook", ["on_fit_start", "on_validation_end"])
def test_also_under_other_settings(tmp_path: Path, hook: str, settings: dict[str, Any]) -> None:
    plain, disturbed = fit(tmp_path / "a", None, **settings), fit(tmp_path / "b", hook, **settings)
    calls = {run["calls"]["val"] for run in (plain, disturbed)}
    # Without a sanity check, or if it reloads, the fit asks for the loaders at its own times.
    asks_itself = settings.keys() & {"num_sanity_val_steps", "reload_dataloaders_every_n_epochs"}
    assert len(calls) == (2 if hook == "on_fit_start" and asks_itself else 1)
    for name in plain.keys() - {"calls"}:
        assert disturbed[name] == plain[name], name


def test_in_the_other_namespace(tmp_path: Path) -> None:
    plain, disturbed = (fit(tmp_path / str(hook), hook, NAMESPACES[1]) for hook in (None, "on_validation_end"))
    assert disturbed == plain


def test_with_weight_averaging_beside(tmp_path: Path) -> None:
    def train(root: Path, **hooks: Any) -> tuple[str, str]:
        lightning().seed_everything(7)
        average = lightning().callbacks.EMAWeightAveraging(decay=0.5)
        module = torture_class()()
        trainer(root, callbacks=[average, calling(**hooks)], max_epochs=2).fit(
            module, loader(shuffle=True), loader(30, 1)
        )
        return digest(module.state_dict()), digest(average._average_model.state_dict())

    assert train(tmp_path, on_validation_end=disturb, on_train_epoch_end=disturb) == train(tmp_path)


class PlantedError(Exception):
    pass


@pytest.mark.parametrize("error", [PlantedError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["step", "around_step", "on_validation_epoch_end", "loader"])
@pytest.mark.parametrize("averaging", [False, True])
def test_an_exception_in_a_pass_gives_everything_back(
    tmp_path: Path, error: type[BaseException], place: str, averaging: bool
) -> None:
    class Module(torture_class()):  # type: ignore[misc] # the base is made at run time
        fails = False

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().validation_step(batch, batch_idx)
            if self.fails and place == "step" and batch_idx == 1:
                self.net.train()
                raise error("planted")
            return loss

        def on_validation_epoch_end(self) -> None:
            if self.fails and place == "on_validation_epoch_end":
                raise error("planted")
            super().on_validation_epoch_end()

    class Data(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 30

        def __getitem__(self, index: int) -> Any:
            if Module.fails and place == "loader" and index == 9:
                raise error("planted")
            return samples(30)[index]

    states: list[Any] = []

    def state(running: Any, pl_module: Any) -> dict[str, Any]:
        return {
            "weights": digest(pl_module.state_dict()),
            "attributes": attributes_of(pl_module),
            "random": random_state(),
            "modes": [part.training for part in pl_module.modules()],
            "trainer": [
                id(value) for value in (*running.loggers, running.callbacks, running.profiler, running.fit_loop)
            ],
            "loop": (id(running.fit_loop.epoch_loop.val_loop), running.fit_loop.state_dict()),
            "connector": id(running._logger_connector),
            "metrics": {name: value.item() for name, value in running.callback_metrics.items()},
            "stage": (running.state.stage, running.should_stop),
            "module": ("validation_step" in vars(pl_module), pl_module._current_fx_name),
            "torch": (torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled()),
        }

    def hook(running: Any, pl_module: Any) -> None:
        def around(call: Any, batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
            call()
            if place == "around_step" and batch_idx == 1:
                raise error("planted")
            return call()

        before = state(running, pl_module)
        Module.fails = True
        with pytest.raises(error, match="planted"):
            Evaluator(running, pl_module, "loss").run(around)
        Module.fails = False
        states.append((before, state(running, pl_module)))
        assert np.isfinite(Evaluator(running, pl_module, "loss").run().score)

    averages = [lightning().callbacks.EMAWeightAveraging(decay=0.5)] if averaging else []
    validation = DataLoader(Data(), batch_size=8)
    trainer(tmp_path, callbacks=[*averages, calling(on_train_epoch_end=hook)]).fit(Module(), loader(), validation)
    ((before, after),) = states
    for name, expected in before.items():
        assert after[name] == expected, name


def test_sigterm_in_a_pass_is_passed_on(tmp_path: Path) -> None:
    exception = pytest.importorskip("pytorch_lightning.utilities.exceptions").SIGTERMException
    loops: list[Any] = []

    def hook(running: Any, pl_module: Any) -> None:
        def around(call: Any, *_: Any) -> Any:
            signal.raise_signal(signal.SIGTERM)
            return call()

        loop = running.fit_loop.epoch_loop.val_loop
        with pytest.raises(exception):
            Evaluator(running, pl_module, "loss").run(around)
        loops.append(running.fit_loop.epoch_loop.val_loop is loop)
        running._signal_connector.received_sigterm = False
        raise PlantedError

    module = simple_class()()
    with pytest.raises(PlantedError):
        trainer(tmp_path, callbacks=[calling(on_train_epoch_end=hook)]).fit(module, loader(), loader(30, 1))
    assert loops == [True]


def test_persistent_workers_of_the_outer_run_go_on(tmp_path: Path) -> None:
    seen: dict[str, list[Any]] = {}

    def train(name: str, **hooks: Any) -> str:
        lightning().seed_everything(3)
        module = simple_class()()
        batches = seen.setdefault(name, [])
        see = calling(on_train_batch_end=lambda running, pl_module: batches.append(random_state()))
        train_loader = loader(num_workers=1, persistent_workers=True, shuffle=True)
        validation = loader(16, 1, num_workers=1, persistent_workers=True)
        running = trainer(tmp_path, callbacks=[see, calling(**hooks)], max_epochs=2)
        running.fit(module, train_loader, validation)
        return digest(module.state_dict())

    workers: list[Any] = []

    def hook(running: Any, pl_module: Any) -> None:
        def alive() -> list[int]:
            loaders = (running.train_dataloader, running.val_dataloaders)
            return [worker.pid for one in loaders for worker in getattr(one._iterator, "_workers", ())]

        before = alive()
        Evaluator(running, pl_module, "loss").run()
        Evaluator(running, pl_module, "loss").run(loader="train", limit=1)
        workers.append((before, alive()))

    assert train("with", on_train_epoch_end=hook) == train("without")
    assert seen["with"] == seen["without"]
    assert len(workers[0][0]) == 2
    assert all(before == after for before, after in workers)


def test_generators_of_the_users_loaders_go_on(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    validation = loader(30, 1, shuffle=True, generator=generator)
    states: list[Any] = []

    def hook(running: Any, pl_module: Any) -> None:
        before = generator.get_state()
        Evaluator(running, pl_module, "loss").run()
        states.append(torch.equal(before, generator.get_state()))

    trainer(tmp_path, callbacks=[calling(on_train_epoch_end=hook)]).fit(simple_class()(), loader(), validation)
    assert states == [True]


def test_module_left_in_train_mode_gets_its_statistics_back(tmp_path: Path) -> None:
    class Module(simple_class()):  # type: ignore[misc] # the base is made at run time
        def on_validation_model_eval(self) -> None:
            self.net[1].train()

        def on_validation_model_train(self) -> None:
            pass

    states: list[Any] = []

    def hook(running: Any, pl_module: Any) -> None:
        pl_module.net[0].eval()
        before = copy.deepcopy(pl_module.state_dict()), [part.training for part in pl_module.modules()]
        inside: list[Any] = []
        Evaluator(running, pl_module, "loss").run(
            lambda call, *_: (call(), inside.append(pl_module.net[1].num_batches_tracked.item()))
        )
        states.append((before, (pl_module.state_dict(), [part.training for part in pl_module.modules()]), inside))

    trainer(tmp_path, callbacks=[calling(on_train_epoch_end=hook)]).fit(Module(), loader(), loader(30, 1))
    (((weights, modes), (weights_after, modes_after), inside),) = states
    assert digest(weights) == digest(weights_after)
    assert modes == modes_after
    assert inside == [int(weights["net.1.num_batches_tracked"]) + count for count in (1, 2, 3, 4)]


def test_compiled_parts_run_eagerly_and_attention_without_its_fast_path(tmp_path: Path) -> None:
    states: list[Any] = []

    class Module(simple_class()):  # type: ignore[misc] # the base is made at run time
        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            states.append((torch.backends.mha.get_fastpath_enabled(), self.compiled(batch[0])))
            return super().validation_step(batch, batch_idx)

    module = Module()
    traced: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        traced.append(1)
        return graph.forward

    module.__dict__["compiled"] = torch.compile(torch.nn.Linear(8, 8), backend=backend)

    def hook(running: Any, pl_module: Any) -> None:
        states.clear()
        Evaluator(running, pl_module, "loss").run()
        assert [fast_path for fast_path, _ in states] == [False] * 4
        assert torch.backends.mha.get_fastpath_enabled()
        assert not traced

    settings: dict[str, Any] = {
        "callbacks": [calling(on_fit_start=hook)],
        "num_sanity_val_steps": 0,
        "limit_train_batches": 1,
    }
    trainer(tmp_path, **settings, limit_val_batches=4).fit(module, loader(), loader(30, 1))
    assert traced, "outside of passes the module is compiled"


def test_a_validation_that_stops_the_training_does_not_in_a_pass(tmp_path: Path) -> None:
    class Module(simple_class()):  # type: ignore[misc] # the base is made at run time
        stops = False

        def on_validation_epoch_end(self) -> None:
            super().on_validation_epoch_end()
            self.trainer.should_stop = self.stops

    def hook(running: Any, pl_module: Any) -> None:
        pl_module.stops = True
        Evaluator(running, pl_module, "loss").run()
        pl_module.stops = False

    running = trainer(tmp_path, callbacks=[calling(on_train_epoch_end=hook)], max_epochs=2)
    running.fit(Module(), loader(), loader(30, 1))
    assert running.current_epoch == 2


def test_a_pass_inside_a_pass_is_refused(tmp_path: Path) -> None:
    def hook(running: Any, pl_module: Any) -> None:
        evaluator = Evaluator(running, pl_module, "loss")
        with pytest.raises(EvaluationError, match="started inside another one"):
            evaluator.run(lambda call, *_: evaluator.run())
        assert np.isfinite(evaluator.run().score)

    running = trainer(tmp_path, callbacks=[calling(on_train_epoch_end=hook)])
    running.fit(simple_class()(), loader(), loader(30, 1))

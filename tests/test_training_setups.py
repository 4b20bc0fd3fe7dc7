"""However a Trainer is set up, the walk finds the score of the run, and the run ends as without the callback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import callbacks as cb
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from lightning_quantdebug.report import Verdict
from tests.callback_runs import debugger, random_states, weights
from tests.documented import Table
from tests.torture import lightning, loader, samples, simple_class, torture_class, trainer

pytestmark = pytest.mark.filterwarnings("ignore")

HEAD = """# Training set-ups

What was tried and what happened: written by `tests/test_training_setups.py`. Each set-up is fitted twice, with and
without the callback. Weights, buffers, optimizer states, random numbers, loop progress and logged metrics at the end
are equal to the last bit, and the walk's FP32 score is the one that Lightning logged.
`16-mixed` needs CUDA: it was run on an NVIDIA H100 with torch 2.11, and so was everything else here, with the same
results.

| set-up | walk | FP32 score | equal without the callback |
| --- | --- | --- | --- |"""


class Endless(IterableDataset[Any]):
    """Samples without a length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter([samples()[index : index + 8] for index in range(0, 40, 8)])


class TwoOptimizers(simple_class()):  # type: ignore[misc] # the base is made at run time
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        parts = self.net[:2].parameters(), self.net[2:].parameters()
        return [torch.optim.SGD(part, lr=0.1) for part in parts]


class Scheduled(simple_class()):  # type: ignore[misc] # as above
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": plateau, "monitor": "loss"}}


class TwoLoaders(simple_class()):  # type: ignore[misc] # as above
    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean(), batch_size=len(batch[0]))
        return torch.zeros(())

    def on_validation_epoch_end(self) -> None:
        pass


class InDict(simple_class()):  # type: ignore[misc] # as above
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return super().training_step(batch["one"], batch_idx) + super().training_step(batch["two"], batch_idx)


def checkpoint(root: Path) -> Any:
    return cb.ModelCheckpoint(root / "saved", monitor="loss", save_top_k=2, save_last=True)


Setup = tuple[Any, dict[str, Any], Callable[[Path], list[Any]]]


def setup(module: Any = None, others: Callable[[Path], list[Any]] | None = None, **settings: Any) -> Setup:
    return module or simple_class(), settings, others or (lambda root: [])


SETUPS: dict[str, Setup] = {
    "plain": setup(),
    "every habit at once": setup(torture_class()),
    "bf16-mixed": setup(precision="bf16-mixed"),
    "bf16-true": setup(precision="bf16-true"),
    "64-true": setup(precision="64-true"),
    "16-mixed": setup(precision="16-mixed"),
    "accumulate_grad_batches=3": setup(accumulate_grad_batches=3),
    "gradient_clip_val": setup(gradient_clip_val=0.1),
    "two optimizers, manual": setup(TwoOptimizers),
    "scheduler on a monitor": setup(Scheduled),
    "two validation loaders": setup(TwoLoaders),
    "training loaders in a dict": setup(InDict),
    "limit_val_batches=2": setup(limit_val_batches=2),
    "limit_val_batches=0.5": setup(limit_val_batches=0.5),
    "val_check_interval=0.5": setup(val_check_interval=0.5),
    "check_val_every_n_epoch=None": setup(check_val_every_n_epoch=None, val_check_interval=4),
    "check_val_every_n_epoch=2": setup(check_val_every_n_epoch=2),
    "no length": setup(limit_train_batches=5),
    "overfit_batches=2": setup(overfit_batches=2),
    "fast_dev_run=2": setup(fast_dev_run=2),
    "inference_mode=False": setup(inference_mode=False),
    "num_sanity_val_steps=0": setup(num_sanity_val_steps=0),
    "num_sanity_val_steps=-1": setup(num_sanity_val_steps=-1),
    "deterministic": setup(deterministic="warn"),
    "detect_anomaly": setup(detect_anomaly=True),
    "ModelCheckpoint": setup(others=lambda root: [checkpoint(root)]),
    "EarlyStopping": setup(others=lambda root: [cb.EarlyStopping("loss", patience=1)]),
    "StochasticWeightAveraging": setup(others=lambda root: [cb.StochasticWeightAveraging(1e-2)]),
    "ModelPruning": setup(others=lambda root: [cb.ModelPruning("l1_unstructured", amount=0.2)]),
    "Timer, ModelSummary": setup(others=lambda root: [cb.Timer(), cb.ModelSummary()]),
    "max_steps": setup(max_steps=7, max_epochs=-1),
    "reload_dataloaders_every_n_epochs": setup(reload_dataloaders_every_n_epochs=1),
}


def state(running: Any, module: Any) -> list[Any]:
    """Everything that a run leaves behind."""
    optimizers = [optimizer.state_dict() for optimizer in running.optimizers]
    metrics = {key: float(value) for key, value in running.callback_metrics.items() if not key.startswith("quant")}
    schedulers = [config.scheduler.state_dict() for config in running.lr_scheduler_configs]
    return [
        weights(module),
        random_states(),
        repr(running.fit_loop.state_dict()),
        repr(optimizers),
        metrics,
        repr(schedulers),
    ]


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    table = Table("training_setups.md", HEAD, list(SETUPS))
    yield table
    table.finish()


@pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize("name", SETUPS)
def test_a_run_is_what_it_is_without(name: str, first: bool, table: Table, tmp_path: Path) -> None:
    kind, settings, others = SETUPS[name]
    if name == "16-mixed" and not torch.cuda.is_available():
        pytest.skip("float16 needs CUDA")
    monitor = "accuracy/dataloader_idx_1" if kind is TwoLoaders else "accuracy"
    # A dict of training batches is nothing that the validation step could take: the message says what to pass.
    calibration = "val" if kind is InDict else "train"
    states, reports = [], []
    for callback in (debugger(monitor=monitor, calibration=calibration), None):
        root = tmp_path / str(callback is None)
        beside = others(root)
        ours = [] if callback is None else [callback]
        lightning().seed_everything(2, verbose=False)
        module = kind()
        running = trainer(
            root,
            **{
                "callbacks": [*ours, *beside] if first else [*beside, *ours],
                "max_epochs": 2,
                "enable_checkpointing": any(isinstance(item, cb.ModelCheckpoint) for item in beside),
                **settings,
            },
        )
        training: Any = loader(shuffle=True)
        if name == "no length":
            training = torch.utils.data.DataLoader(Endless(), batch_size=None)
        if kind is InDict:
            training = {"one": loader(shuffle=True), "two": loader(20, 3)}
        running.fit(module, training, [loader(31, 1), loader(20, 4)] if kind is TwoLoaders else loader(31, 1))
        states.append(state(running, module))
        if callback is not None:
            if name == "ModelPruning":
                # It prunes after the last validation: what is walked through is what the fit leaves.
                again = trainer(tmp_path).validate(module, loader(31, 1), verbose=False)[0]
                running.callback_metrics["accuracy"] = torch.tensor(again["accuracy"])
            reports.append((callback.report, running.callback_metrics[monitor].item()))
    for one, other in zip(*states, strict=True):
        assert one == other
    report, logged = reports[0]
    assert report is not None
    assert report.baseline is not None
    assert report.baseline.score == pytest.approx(logged, abs=0)
    assert report.verdict in (Verdict.ACCEPTED, Verdict.REPAIRED, Verdict.NOT_ACCEPTED), report.findings
    table.add(name, "finished", "as logged", "yes")

"""A LightningModule that does everything a validation may do, in either Lightning namespace."""

from __future__ import annotations

import collections
import importlib
import os
from typing import Any

import numpy as np
import torch
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

torch.set_num_threads(1)

# Set to "gpu" where one is at hand: the same tests then show that nothing depends on the device.
ACCELERATOR = os.environ.get("QUANTDEBUG_ACCELERATOR", "cpu")

NAMESPACES = ("pytorch_lightning", "lightning.pytorch")


def lightning(namespace: str = "pytorch_lightning") -> Any:
    return importlib.import_module(namespace)


def samples(count: int = 44, seed: int = 0) -> TensorDataset:
    """Three classes that a linear layer can nearly tell apart."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 8, generator=generator)
    return TensorDataset(inputs, (inputs[:, :3] + 0.3 * torch.randn(count, 3, generator=generator)).argmax(1))


def loader(count: int = 44, seed: int = 0, **settings: Any) -> DataLoader[Any]:
    return DataLoader(samples(count, seed), **{"batch_size": 8, **settings})


class Meter:
    """A plain object of the user's."""

    def __init__(self) -> None:
        self.count = 0
        self.values: list[float] = []


def simple_class(namespace: str = "pytorch_lightning") -> Any:
    """A module that logs a torchmetrics object, a float and an aggregate of the epoch."""

    class Simple(lightning(namespace).LightningModule):  # type: ignore[misc] # the base is chosen at run time
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 3))
            self.accuracy = torchmetrics.classification.MulticlassAccuracy(3, average="micro")
            self.losses: list[Tensor] = []

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            outputs = self(batch[0])
            loss = nn.functional.cross_entropy(outputs, batch[1])
            self.accuracy(outputs, batch[1])
            self.log("accuracy", self.accuracy, prog_bar=True)
            self.log("loss", loss)
            self.losses.append(loss)
            return loss

        def on_validation_epoch_end(self) -> None:
            self.log("mean_loss", torch.stack(self.losses).mean())
            self.losses.clear()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    return Simple


def torture_class(namespace: str = "pytorch_lightning") -> Any:
    """:func:`simple_class` with all the habits that an extra pass must not be noticed by."""

    class Torture(simple_class(namespace)):  # type: ignore[misc] # as above
        def __init__(self) -> None:
            super().__init__()
            self.net.append(nn.Dropout(0.2))
            self.best = torchmetrics.MaxMetric()
            self.register_buffer("seen_mean", torch.zeros(8))
            self.epochs = 0
            self.total = torch.zeros(3)
            self._private: dict[str, list[int]] = {"batches": []}
            self.kinds: set[int] = set()
            self.recent: collections.deque[float] = collections.deque(maxlen=3)
            self.table = np.zeros((3, 3), dtype=np.int64)
            self.meter = Meter()

        def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
            noise = torch.rand(()) + float(np.random.rand())
            loss = super().validation_step(batch, batch_idx)
            self.log("worst", loss, reduce_fx="max")
            self.log("correct", (self(batch[0]).argmax(1) == batch[1]).sum().float(), reduce_fx="sum")
            self.log("both", loss, on_step=True, on_epoch=True)
            self.log("quiet", loss, logger=False)
            self.log("noise", noise)
            self.seen_mean.mul_(0.9).add_(0.1 * batch[0].mean(0))
            self.total += torch.bincount(batch[1], minlength=3).cpu()
            self._private["batches"].append(batch_idx)
            self.kinds.add(batch_idx + 100 * self.epochs)
            self.recent.append(float(loss))
            np.add.at(self.table, (batch[1].cpu().numpy(), self(batch[0]).argmax(1).cpu().numpy()), 1)
            self.meter.count += 1
            self.meter.values.append(float(loss))
            if self.logger is not None:
                _ = self.logger.experiment
                self.logger.log_metrics({"mine": float(loss)}, step=self.meter.count)
                assert isinstance(self.logger.log_dir, str)
            return loss

        def on_validation_epoch_end(self) -> None:
            super().on_validation_epoch_end()
            self.best(self.accuracy.compute())
            self.log("best", self.best.compute())
            self.epochs += 1

    return Torture


def trainer(root: Any, namespace: str = "pytorch_lightning", **settings: Any) -> Any:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    defaults = {
        "accelerator": ACCELERATOR,
        "devices": 1,
        "logger": False,
        "max_epochs": 1,
        "default_root_dir": str(root),
    }
    return lightning(namespace).Trainer(**{**quiet, **defaults, **settings})


def calling(namespace: str = "pytorch_lightning", **hooks: Any) -> Any:
    """A callback whose hooks are the given functions of (trainer, pl_module), out of the sanity check."""

    def guarded(function: Any) -> Any:
        def hook(self: Any, trainer: Any, pl_module: Any, *args: Any, **kwargs: Any) -> None:
            if not trainer.sanity_checking:
                function(trainer, pl_module)

        return hook

    attributes = {name: guarded(function) for name, function in hooks.items()}
    return type("Calling", (lightning(namespace).Callback,), attributes)()

"""Fits in which repair is not enough, so that QAT epochs follow."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_quantdebug import QuantDebug
from lightning_quantdebug.report import Step, StepName
from tests.torture import lightning, trainer

# Four levels for each activation and weight of the network: no remedy saves it.
TARGET = "w2a2_per_tensor"
BATCH = 32


def points(count: int, seed: int) -> TensorDataset:
    """Three classes that a small network learns in two epochs."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 8, generator=generator)
    return TensorDataset(inputs, (inputs[:, :3] + 0.2 * torch.randn(count, 3, generator=generator)).argmax(1))


def loader(count: int = 192, seed: int = 0, **settings: Any) -> DataLoader[Any]:
    """Not shuffled: Lightning does not save the order of data, which a resumed fit would then draw anew."""
    return DataLoader(points(count, seed), **{"batch_size": BATCH, **settings})


def learner_class(namespace: str = "pytorch_lightning") -> Any:
    class Learner(lightning(namespace).LightningModule):  # type: ignore[misc] # the base is chosen at run time
        def __init__(self, lr: float = 0.2) -> None:
            super().__init__()
            self.lr = lr
            self.net = nn.Sequential(
                nn.Linear(8, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3)
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            logits = self(batch[0])
            self.log("loss", nn.functional.cross_entropy(logits, batch[1]))
            self.log("accuracy", (logits.argmax(1) == batch[1]).float().mean())

        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.log("test_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

        def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self(batch[0])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    return Learner


def debugger(**settings: Any) -> QuantDebug:
    """A callback that trains for two epochs."""
    defaults = {
        "monitor": "loss",
        "mode": "min",
        "tolerance": 0.0,
        "target": TARGET,
        "remedies": (),
        "qat_epochs": 2,
        "verbose": False,
        "on_error": "raise",
    }
    return QuantDebug(**{**defaults, **settings})


def fit(
    root: Path,
    callback: QuantDebug | None,
    module: Any = None,
    others: Sequence[Any] = (),
    namespace: str = "pytorch_lightning",
    ckpt_path: str | None = None,
    data: tuple[Any, Any] | None = None,
    **settings: Any,
) -> Any:
    """The Trainer after a fit of two FP32 epochs and those that followed."""
    lightning(namespace).seed_everything(3, verbose=False)
    module = learner_class(namespace) if module is None else module
    module = module() if isinstance(module, type) else module
    callbacks = [*([] if callback is None else [callback]), *others]
    saves = any(type(item).__name__ == "ModelCheckpoint" for item in callbacks)
    defaults = {"callbacks": callbacks, "max_epochs": 2, "enable_checkpointing": saves}
    running = trainer(root, namespace, **{**defaults, **settings})
    train, validation = (loader(), loader(512, 1)) if data is None else data
    running.fit(module, train, validation, ckpt_path=ckpt_path)
    return running


def model_checkpoint(root: Path, namespace: str = "pytorch_lightning", **settings: Any) -> Any:
    callbacks = importlib.import_module(f"{namespace}.callbacks")
    defaults = {"monitor": "loss", "mode": "min", "filename": "{epoch}", "save_top_k": -1}
    return callbacks.ModelCheckpoint(root / "saved", **{**defaults, **settings})


def qat_step(callback: QuantDebug) -> Step:
    """The step of the training."""
    assert callback.report is not None
    step = callback.report.step(StepName.QAT)
    assert step is not None
    return step


def tensors(module: nn.Module) -> list[Tensor]:
    return [tensor.detach().cpu().clone() for tensor in (*module.parameters(), *module.buffers())]


def equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))

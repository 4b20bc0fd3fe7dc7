"""The same callback on a transformer: digits read as a text of eight rows, one token for each row of pixels.

    python examples/transformer.py

`nn.TransformerEncoderLayer` hides its operations in a fused kernel when it evaluates, and attention is made of
functions and not of modules; nothing in the model has to be rewritten for that.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_quantdebug import QuantDebug


class RowReader(nn.Module):
    """A transformer encoder over the rows of an image, ``(N, rows, pixels)`` to ``(N, classes)``."""

    def __init__(self, rows: int = 8, pixels: int = 8, width: int = 48, classes: int = 10) -> None:
        super().__init__()
        self.embed = nn.Linear(pixels, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, rows, width))
        layer = nn.TransformerEncoderLayer(
            width, nhead=4, dim_feedforward=2 * width, dropout=0.1, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, rows: Tensor) -> Tensor:
        tokens = self.encoder(self.embed(rows) + self.position)
        return self.head(self.norm(tokens).mean(dim=1))


class Classifier(pl.LightningModule):
    """An ordinary LightningModule around the transformer."""

    def __init__(self, lr: float = 3e-3) -> None:
        super().__init__()
        self.lr = lr
        self.net = RowReader()
        self.val_acc = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, rows: Tensor) -> Tensor:
        return self.net(rows)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        rows, labels = batch
        return F.cross_entropy(self(rows), labels)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        rows, labels = batch
        self.val_acc(self(rows), labels)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def digits() -> tuple[TensorDataset, TensorDataset]:
    """The handwritten digits of scikit-learn (UCI), ``(N, 8, 8)``; every fourth image is for validation."""
    images, labels = load_digits(return_X_y=True)
    rows = torch.from_numpy(images).float().div(16.0).sub(0.5).reshape(-1, 8, 8)
    classes = torch.from_numpy(labels).long()
    held_out = torch.arange(len(classes)) % 4 == 0
    return TensorDataset(rows[~held_out], classes[~held_out]), TensorDataset(rows[held_out], classes[held_out])


def main() -> None:
    """Train, and let the callback walk at the end of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="int8", help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=15, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("logs"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    arguments = parser.parse_args()
    pl.seed_everything(arguments.seed, verbose=False)
    train, validation = digits()
    callback = QuantDebug(monitor="val_acc", mode="max", tolerance="1%", target=arguments.target)
    trainer = pl.Trainer(
        max_epochs=arguments.epochs,
        accelerator="cpu",
        logger=TensorBoardLogger(arguments.output, name="transformer"),
        callbacks=[callback],
        log_every_n_steps=10,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), DataLoader(train, batch_size=32, shuffle=True), DataLoader(validation, batch_size=100))
    if callback.report is not None:
        print(callback.report.final.files.get("report.md", "No report was written."))


if __name__ == "__main__":
    main()

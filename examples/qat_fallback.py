"""Repair where it suffices, training where it does not: one network, two targets, the same `trainer.fit`.

    python examples/qat_fallback.py
    python examples/qat_fallback.py --targets w3a4_per_tensor --distillation 1

Digits are learned in FP32. At the first target repair is enough, and no further epoch is run. At the second one it is
not: QAT epochs follow in the same fit, with the module's own loss, data, optimizer and callbacks. The checkpoint that
ModelCheckpoint calls the best is then one of those epochs, and `trainer.validate` scores it quantized.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateMonitor, ModelCheckpoint
from pytorch_lightning.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_quantdebug import QuantDebug
from lightning_quantdebug.report import StepName, StepVerdict


def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """A depthwise separable convolution, as networks for phones have it."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU6(),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(),
    )


class Classifier(pl.LightningModule):
    """An ordinary LightningModule; nothing in it knows of quantization."""

    def __init__(self, lr: float = 4e-3) -> None:
        super().__init__()
        self.lr = lr
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU6(),
            block(16, 32, stride=2),
            block(32, 64, stride=2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )
        self.val_acc = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        self.val_acc(self(images), labels)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 12)}


def digits() -> tuple[TensorDataset, TensorDataset]:
    """The handwritten digits of scikit-learn (UCI), ``(N, 1, 8, 8)``; every third image is for validation."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).float().div(16.0).sub(0.5).reshape(-1, 1, 8, 8)
    classes = torch.from_numpy(labels).long()
    held_out = torch.arange(len(classes)) % 3 == 0
    return TensorDataset(pixels[~held_out], classes[~held_out]), TensorDataset(pixels[held_out], classes[held_out])


def run(target: str, arguments: argparse.Namespace) -> None:
    """One fit, and what it came to."""
    pl.seed_everything(arguments.seed, verbose=False)
    train, validation = digits()
    loaders = DataLoader(train, batch_size=32, shuffle=True), DataLoader(validation, batch_size=100)
    callback = QuantDebug(
        monitor="val_acc",
        mode="max",
        tolerance="2%",
        target=target,
        # More bits for single tensors would be the other way out; this engine has none.
        remedies=["cle", "bias_correction", "adaround", "range_setting"],
        qat_epochs=arguments.qat_epochs,
        qat_lr_factor=arguments.lr_factor,
        qat_distillation=arguments.distillation,
    )
    checkpoint = ModelCheckpoint(monitor="val_acc", mode="max")
    logger = TensorBoardLogger(arguments.output, name=f"qat_fallback_{target}")
    trainer = pl.Trainer(
        max_epochs=arguments.epochs,
        accelerator="cpu",
        logger=logger,
        callbacks=[callback, checkpoint, LearningRateMonitor()],
        log_every_n_steps=10,
        enable_model_summary=False,
    )
    model = Classifier()
    trainer.fit(model, *loaders)
    report = callback.report
    assert report is not None
    training = report.step(StepName.QAT)
    assert training is not None
    print(f"{target}: {report.verdict.value if report.verdict else None}; the module is {report.final.module_state}")
    if training.verdict is not StepVerdict.SKIPPED and "scores" in training.details:
        scores = ", ".join(f"{score:.3f}" for score in training.details["scores"])
        print(
            f"FP32 {report.baseline.score if report.baseline else 0:.3f}, repaired "
            f"{training.details['start_score']:.3f}, after each QAT epoch {scores}"
        )
        (metrics,) = trainer.validate(ckpt_path="best", dataloaders=loaders[1], verbose=False)
        print(f"Best checkpoint, quantized: {metrics['val_acc']:.3f}; before QAT: {callback.fp32_best_model_path}")
    print(report.final.files.get("report.md", "No report was written."))


def main() -> None:
    """Train once for each target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", default=["int8", "w3a4_per_tensor"], help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=12, help="default: %(default)s")
    parser.add_argument("--qat-epochs", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--lr-factor", type=float, default=0.3, help="default: %(default)s")
    parser.add_argument("--distillation", type=float, default=0.0, help="default: %(default)s")
    parser.add_argument("--output", type=Path, default=Path("logs"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    arguments = parser.parse_args()
    for target in arguments.targets:
        run(target, arguments)


if __name__ == "__main__":
    main()

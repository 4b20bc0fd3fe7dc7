"""Train a small network on real images, and let one more callback say whether it survives quantization.

    python examples/quickstart.py
    python examples/quickstart.py --target w4a8
    python examples/quickstart.py --data cifar10 --root path/to/cifar10.npz

The LightningModule below knows nothing of quantization. Everything that this package adds is the `QuantDebug` entry in
the Trainer's callbacks.
"""

from __future__ import annotations

import argparse
import zipfile
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

from lightning_quantdebug import QuantDebug

CIFAR10_ARRAYS = ("x_train", "y_train", "x_test", "y_test")


class Separable(nn.Module):
    """A depthwise and a pointwise convolution, with a shortcut where the shapes allow one."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(inputs)
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.pointwise_norm = nn.BatchNorm2d(outputs)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.depthwise_norm(self.depthwise(x)))
        y = self.pointwise_norm(self.pointwise(y))
        return F.relu(x + y) if self.shortcut else F.relu(y)


class SmallNet(nn.Module):
    """A depthwise-separable network for images of any size, ``(N, C, H, W)`` to ``(N, classes)``."""

    def __init__(self, channels: int, classes: int = 10, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.Sequential(
            Separable(width, width),
            Separable(width, 2 * width, stride=2),
            Separable(2 * width, 2 * width),
            Separable(2 * width, 4 * width, stride=2),
            Separable(4 * width, 4 * width),
        )
        self.head = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.stem(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Classifier(pl.LightningModule):
    """An ordinary LightningModule: a network, a loss, a metric, an optimizer."""

    def __init__(self, channels: int = 1, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = SmallNet(channels)
        self.val_acc = MulticlassAccuracy(num_classes=10, average="micro")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        self.val_acc(logits, labels)
        self.log("val_loss", F.cross_entropy(logits, labels), prog_bar=True)
        self.log("val_acc", self.val_acc, prog_bar=True)

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"], weight_decay=1e-2)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=self.hparams["lr"], total_steps=max(steps, 2))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def digits() -> tuple[TensorDataset, TensorDataset]:
    """The 1797 handwritten digits of scikit-learn (UCI), 8 by 8 pixels; every fourth image is for validation."""
    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images).float().div(16.0).sub(0.5).reshape(-1, 1, 8, 8)
    y = torch.from_numpy(labels).long()
    held_out = torch.arange(len(y)) % 4 == 0
    return TensorDataset(x[~held_out], y[~held_out]), TensorDataset(x[held_out], y[held_out])


def cifar10(path: Path) -> tuple[TensorDataset, TensorDataset]:
    """CIFAR-10 from an ``.npz`` with uint8 images ``(N, 32, 32, 3)`` and their labels.

    Raises:
        SystemExit: If the file is missing, holds other arrays, or would need pickle to be read.
    """
    try:
        with zipfile.ZipFile(path), np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in CIFAR10_ARRAYS}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise SystemExit(
            f"--root must be an .npz file with the plain arrays {', '.join(CIFAR10_ARRAYS)}; got {str(path)!r}: {error}"
        ) from error
    return _images(arrays["x_train"], arrays["y_train"]), _images(arrays["x_test"], arrays["y_test"])


def _images(images: np.ndarray, labels: np.ndarray) -> TensorDataset:
    """Images as ``(N, 3, 32, 32)`` in [-0.5, 0.5] with their labels."""
    if images.dtype != np.uint8 or images.shape[1:] != (32, 32, 3) or labels.shape != images.shape[:1]:
        raise SystemExit(
            f"Images must be uint8 of shape (N, 32, 32, 3) with N labels, got {images.dtype} {images.shape} with "
            f"{labels.shape} labels."
        )
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float().div(255.0).sub(0.5)
    return TensorDataset(x.contiguous(), torch.from_numpy(labels.astype(np.int64)))


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", choices=("digits", "cifar10"), default="digits", help="default: %(default)s")
    parser.add_argument(
        "--root",
        type=Path,
        help="for cifar10: an .npz file with x_train and x_test (uint8, N x 32 x 32 x 3), y_train and y_test. Pickled "
        "batches are refused, because unpickling a file can run any code: convert them once, from a source you trust",
    )
    parser.add_argument(
        "--target", default="int8", help="int8, w4a8, tensorrt, xnnpack, qnn, ...; default: %(default)s"
    )
    parser.add_argument("--epochs", type=int, help="default: 20 for digits, 5 for cifar10")
    parser.add_argument("--output", type=Path, default=Path("logs"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    arguments = parser.parse_args()
    if arguments.data == "cifar10" and arguments.root is None:
        parser.error("--data cifar10 needs --root, an .npz file; see --help")
    return arguments


def main() -> None:
    """Train, and let the callback walk at the end of it."""
    arguments = parse_arguments()
    pl.seed_everything(arguments.seed, verbose=False)
    train, validation = digits() if arguments.data == "digits" else cifar10(arguments.root)
    default_epochs = 20 if arguments.data == "digits" else 5
    callback = QuantDebug(monitor="val_acc", mode="max", tolerance="1%", target=arguments.target)
    trainer = pl.Trainer(
        max_epochs=default_epochs if arguments.epochs is None else arguments.epochs,
        accelerator="cpu",
        logger=TensorBoardLogger(arguments.output, name=arguments.data),
        callbacks=[callback],
        log_every_n_steps=10,
        enable_model_summary=False,
    )
    trainer.fit(
        Classifier(channels=train.tensors[0].shape[1]),
        DataLoader(train, batch_size=32 if arguments.data == "digits" else 128, shuffle=True),
        DataLoader(validation, batch_size=100),
    )
    if callback.report is not None:
        print(callback.report.final.files.get("report.md", "No report was written."))


if __name__ == "__main__":
    main()

"""A MobileNet-like network trained on the CIFAR-10 subset, and the rescaling that ruins its weights.

Nothing is kept on disk: training takes about two minutes on one core and repeats bit for bit on one machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "cifar10_small.npz"
# Channels and strides of the separable blocks; the stem has the channels of the first.
BLOCKS = ((32, 64, 1), (64, 128, 2), (128, 128, 1), (128, 256, 2), (256, 256, 1))


@dataclass(frozen=True, eq=False)
class Images:
    """Training and test images ``(N, 3, 32, 32)``, scaled to mean 0 and standard deviation 1, and their labels."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor


def load_images(path: Path = DATA) -> Images:
    """Read the ``.npz`` with uint8 images ``(N, 32, 32, 3)``."""
    with np.load(path, allow_pickle=False) as arrays:
        pixels = {part: torch.from_numpy(arrays[f"x_{part}"]).permute(0, 3, 1, 2).float() for part in ("train", "test")}
        labels = {part: torch.from_numpy(arrays[f"y_{part}"]).long() for part in ("train", "test")}
    mean, spread = pixels["train"].mean((0, 2, 3), keepdim=True), pixels["train"].std((0, 2, 3), keepdim=True)
    scaled = {part: ((values - mean) / spread).contiguous() for part, values in pixels.items()}
    return Images(scaled["train"], labels["train"], scaled["test"], labels["test"])


def _layer(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution, batch normalization, ReLU."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


class MobileNet(nn.Module):
    """Depthwise-separable network after Howard et al. 2017, table 1, for images of 32 by 32 pixels."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        layers = _layer(3, BLOCKS[0][0], 3, 2)
        for inputs, outputs, stride in BLOCKS:
            layers += [*_layer(inputs, inputs, 3, stride, groups=inputs), *_layer(inputs, outputs, 1)]
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(BLOCKS[-1][1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


def train(images: Images, epochs: int = 5, seed: int = 0) -> MobileNet:
    """A network after some epochs over the training images, each flipped at random and shifted by up to 3 pixels."""
    torch.manual_seed(seed)
    net = MobileNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=4e-3, weight_decay=1e-2)
    batches = -(-len(images.y_train) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=epochs * batches)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images.y_train)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(moved(images.x_train[chosen])), images.y_train[chosen]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


def moved(x: Tensor) -> Tensor:
    """The batch, flipped at random and shifted by up to 3 pixels."""
    flipped = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x, x.flip(3))
    row, column = torch.randint(0, 7, (2,)).tolist()
    return F.pad(flipped, (3, 3, 3, 3))[:, :, row : row + 32, column : column + 32]


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the images that the network is right about."""
    parts = zip(x.split(250), y.split(250), strict=True)
    right = sum(int((net(part).argmax(1) == labels).sum()) for part, labels in parts)
    return right / len(y)


@torch.no_grad()
def plant_rescaling(net: MobileNet, exponent: float = 1.5, seed: int = 0) -> None:
    """Multiply each channel between two layers by a factor and divide the next layer's weights by it.

    ReLU passes a positive factor on, so that the function stays what it is; the weights of both layers get channels of
    unlike ranges (the inverse of cross-layer equalization: Nagel et al. 2019, equation 8).

    Args:
        net: The network, changed in place.
        exponent: Factors are ``10^u`` with ``u`` uniform in ``[-exponent, exponent]``.
        seed: Of the factors.
    """
    generator = torch.Generator().manual_seed(seed)
    convolutions = [layer for layer in net.features if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in net.features if isinstance(layer, nn.BatchNorm2d)]
    for norm, follower in zip(norms, [*convolutions[1:], net.head], strict=True):
        factors = 10.0 ** (exponent * (2 * torch.rand(norm.num_features, generator=generator) - 1))
        norm.weight.mul_(factors)
        norm.bias.mul_(factors)
        depthwise = isinstance(follower, nn.Conv2d) and follower.groups > 1
        shape = (-1, *[1] * (follower.weight.ndim - 1)) if depthwise else (1, -1, *[1] * (follower.weight.ndim - 2))
        follower.weight.div_(factors.view(shape))

"""The symptoms of healthy networks, beyond which a cause is named: the limits of `lightning_quantdebug/causes.py`.

    python benchmarks/healthy_symptoms.py

Six networks are trained on scikit-learn's handwritten digits in some seconds each, and quantized as engines and
4-bit research do. Printed is the greatest value of each symptom over all their layers, and the accuracy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_quantdebug import instrument
from lightning_quantdebug.activation_symptoms import ActivationSymptoms, activation_symptoms
from lightning_quantdebug.instrument import batch_runs
from lightning_quantdebug.quantizer_symptoms import seen_in_validation
from lightning_quantdebug.weight_symptoms import WeightSymptoms, weight_symptoms

TARGETS = ("int8", "int8_per_tensor", "w4a8", "w4a8_per_tensor", "w4a4_per_tensor", "w8a4")
WEIGHT_GAINS = ("even_gain", "clipping_gain", "unbiased_gain", "sign_gain")
WEIGHT_RATIOS = ("output_ratio", "input_ratio", "peak")
SEEN = ("unseen gain", "token gain", "imbalance", "end share")
ACTIVATION_GAINS = ("damage", "bulk_gain", "outlier_gain", "uneven_gain", "range_gain", "unused_gain")


def _block(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    """Convolution, batch normalization, ReLU."""
    return [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU()]


def _separable(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    """Depthwise and pointwise convolution, each with batch normalization and ReLU6."""
    depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
    pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
    return [depthwise, nn.BatchNorm2d(inputs), nn.ReLU6(), pointwise, nn.BatchNorm2d(outputs), nn.ReLU6()]


class _Encoder(nn.Module):
    """A transformer encoder over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 32), nn.Linear(32, 10)
        self.positions = nn.Parameter(0.1 * torch.randn(8, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x.squeeze(1)) + self.positions).mean(1))


class _Residual(nn.Module):
    """Convolutions around which their input is added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Sequential(*_block(channels, channels))
        self.second = nn.Sequential(*_block(channels, channels)[:2])

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


class _Branches(nn.Module):
    """Two branches that are concatenated."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Sequential(*_block(inputs, outputs // 2))
        self.second = nn.Sequential(nn.Conv2d(inputs, outputs // 2, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first(x), self.second(x)], 1)


class _Attention(nn.Module):
    """Attention over the rows of an image written out with its softmax, and a sigmoid gate over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.gate = nn.Linear(8, 32), nn.Linear(32, 96), nn.Linear(32, 32)
        self.positions, self.head = nn.Parameter(0.1 * torch.randn(8, 32)), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x.squeeze(1)) + self.positions
        q, k, v = self.qkv(y).chunk(3, -1)
        y = y + F.softmax(q @ k.transpose(1, 2) / 32**0.5, -1) @ v
        return self.head((y * torch.sigmoid(self.gate(y))).mean(1))


def _mlp() -> nn.Module:
    """Three linear layers."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def _pooled(*layers: nn.Module, channels: int) -> nn.Module:
    """Layers, global average, head."""
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mlp": _mlp,
    "convolutions": lambda: _pooled(*_block(1, 16), *_block(16, 32, 2), *_block(32, 64, 2), channels=64),
    "depthwise": lambda: _pooled(
        *_block(1, 32), *_separable(32, 64, 2), *_separable(64, 64), *_separable(64, 128, 2), channels=128
    ),
    "residual": lambda: _pooled(*_block(1, 32), _Residual(32), _Branches(32, 64), _Residual(64), channels=64),
    "transformer": _Encoder,
    "attention": _Attention,
}


def digits() -> tuple[Tensor, Tensor]:
    """Images ``(1797, 1, 8, 8)`` in [-0.5, 0.5] and their labels."""
    images, labels = load_digits(return_X_y=True)
    return torch.from_numpy(images).float().div(16.0).sub(0.5).view(-1, 1, 8, 8), torch.from_numpy(labels)


def trained(make: Callable[[], nn.Module], x: Tensor, y: Tensor, epochs: int = 15) -> nn.Module:
    """A network after some epochs."""
    torch.manual_seed(0)
    net = make()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * -(-len(y) // 64))
    for _ in range(epochs):
        for chosen in torch.randperm(len(y)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[chosen]), y[chosen]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of the images that the network is right about."""
    return float((net(x).argmax(1) == y).double().mean())


def symptoms(
    net: nn.Module, batches: list[Tensor], target: str, x: Tensor, y: Tensor
) -> tuple[list[WeightSymptoms], list[ActivationSymptoms], float]:
    """Symptoms of all weights and all activations, and the accuracy with both quantized."""
    with instrument(net, batches[0], target) as session:
        session.calibrate(batches)
        runs = batch_runs(session, batches)
        of_weights = weight_symptoms(session, runs)
        of_activations = activation_symptoms(session, runs, most=999, least_share=0.0)
        with session.modes("quantize"):
            return of_weights, of_activations, accuracy(net, x, y)


def seen_symptoms(net: nn.Module, batches: list[Tensor], held_out: list[Tensor], target: str) -> list[float]:
    """Greatest symptom of each sort that shows in validation: unseen values, tokens, operands, ends of softmax."""
    with instrument(net, batches[0], target) as session:
        session.calibrate(batches)
        names = [quantizer.name for quantizer in session.select(kind="activation") if quantizer.is_calibrated]
        seen = seen_in_validation(session, batch_runs(session, held_out), names)
        ends = [seen[name].end_share for name in names if session.quantizers[name].fixed_range is not None]
        unseen = [seen[name].unseen_gain for name in names if session.quantizers[name].fixed_range is None]
        found = seen.values()
        return [
            max(unseen),
            max(s.outlier_tokens[1] for s in found),
            max(s.imbalance for s in found),
            max([0.0, *ends]),
        ]


def greatest(found: list[Any], name: str) -> str:
    """Greatest value of one symptom."""
    return f"{max(getattr(item, name) for item in found):.2f}"


def main() -> None:
    """Train, quantize, print."""
    torch.set_num_threads(1)
    x, y = digits()
    held_out = torch.arange(len(y)) % 4 == 0
    validation = list(x[held_out].split(32))
    header = ["network", "target", "accuracy", "least SQNR", *WEIGHT_GAINS, *WEIGHT_RATIOS, *ACTIVATION_GAINS, *SEEN]
    print(f"| {' | '.join(header)} |\n| {' | '.join(['---'] * len(header))} |")
    for name, make in NETWORKS.items():
        net = trained(make, x[~held_out], y[~held_out])
        print(f"| {name} | FP32 | {accuracy(net, x[held_out], y[held_out]):.3f} |")
        for target in TARGETS:
            batches = list(x[~held_out][:512].split(32))
            weights, activations, share = symptoms(net, batches, target, x[held_out], y[held_out])
            row = [name, target, f"{share:.3f}", f"{min(item.sqnr_db for item in weights):.1f}"]
            row += [greatest(weights, key) for key in (*WEIGHT_GAINS, *WEIGHT_RATIOS)]
            row += [greatest(activations, key) for key in ACTIVATION_GAINS]
            row += [f"{value:.2f}" for value in seen_symptoms(net, batches, validation, target)]
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()

"""Tiny networks of every family that the engine must cover, each with a batch. Weights are random but fixed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _trained_looking(model: nn.Module) -> nn.Module:
    """Give batch normalizations statistics that are not their defaults."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, std=0.3)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.3)
    return model


def conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Convolution and batch normalization."""
    padding = kernel // 2
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]


class InvertedResidual(nn.Module):
    """MobileNetV2's block."""

    def __init__(self, channels: int, outputs: int, expand: int) -> None:
        super().__init__()
        hidden = channels * expand
        self.use_residual = channels == outputs
        self.conv = nn.Sequential(
            nn.Sequential(*conv_bn(channels, hidden, 1), nn.ReLU6(inplace=True)),
            nn.Sequential(*conv_bn(hidden, hidden, 3, groups=hidden), nn.ReLU6(inplace=True)),
            *conv_bn(hidden, outputs, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_residual else self.conv(x)


class MobileNet(nn.Module):
    """BN, depthwise, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Sequential(*conv_bn(3, 8, 3, stride=2), nn.ReLU6(inplace=True)),
            InvertedResidual(8, 8, 2),
            InvertedResidual(8, 12, 2),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(12, 10))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = F.adaptive_avg_pool2d(x, (1, 1))
        return self.classifier(torch.flatten(x, 1))


class BasicBlock(nn.Module):
    """ResNet's block: one ReLU module used twice, in place."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(inputs, outputs, 3, stride)
        self.conv2, self.bn2 = conv_bn(outputs, outputs, 3)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(*conv_bn(inputs, outputs, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    """Stem, max-pool, two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv_bn(3, 8, 3)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(BasicBlock(8, 8, 1), BasicBlock(8, 16, 2))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        return self.fc(self.avgpool(self.layer1(x)).flatten(1))


class Inception(nn.Module):
    """Branches that are concatenated, one through a max-pool, with functional activations."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = conv_bn(3, 8, 3)
        self.a = nn.Conv2d(8, 4, 1)
        self.b = nn.Conv2d(8, 4, 3, padding=1)
        self.head = nn.Conv2d(16, 10, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        pooled = F.max_pool2d(F.leaky_relu(self.b(x), 0.1), 3, 1, 1)
        x = torch.cat([F.relu(self.a(x)), pooled, x], dim=1)
        return self.head(x).mean((2, 3))


class Encoder(nn.Module):
    """torch's own transformer encoder."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class VisionTransformer(nn.Module):
    """Patches, class token, positions, pre-norm blocks with scaled dot product attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16) * 0.1)
        self.positions = nn.Parameter(torch.randn(1, 17, 16) * 0.1)
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 10)

    def attention(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(x[:, 0])


class LSTMClassifier(nn.Module):
    """Embedding, LSTM, last state."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 12, num_layers=2, batch_first=True)
        self.fc = nn.Linear(12, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(self.embedding(tokens))
        return self.fc(hidden[-1])


@dataclass
class BertOutput:
    """What BERT-like modules return."""

    logits: Tensor
    hidden: tuple[Tensor, ...]
    pooled: Tensor | None = None


class Bert(nn.Module):
    """Attention spelled out, additive mask, tied decoder, dict input, dataclass output."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 16)
        self.positions = nn.Embedding(10, 16)
        self.norm = nn.LayerNorm(16)
        self.query, self.key, self.value = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.output = nn.Linear(16, 16)
        self.output_norm = nn.LayerNorm(16)
        self.decoder = nn.Linear(16, 20, bias=False)
        self.decoder.weight = self.words.weight

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], 2, 8).transpose(1, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> BertOutput:
        mask = (1.0 - attention_mask[:, None, None, :].to(torch.float32)) * torch.finfo(torch.float32).min
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = embedded = self.norm(self.words(input_ids) + self.positions(positions))
        q, k, v = self.heads(self.query(x)), self.heads(self.key(x)), self.heads(self.value(x))
        scores = torch.matmul(q, k.transpose(-1, -2)) / 8**0.5
        weights = F.softmax(scores + mask, dim=-1)
        context = torch.matmul(weights, v).transpose(1, 2).reshape(x.shape)
        x = self.output_norm(self.output(context) + x)
        return BertOutput(self.decoder(x), (embedded, x))


class Branching(nn.Module):
    """A data-dependent branch and a data-dependent loop."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.cell = nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x)) if x.sum() > 0 else torch.tanh(self.b(x)) + x
        for _ in range(1 + int(x.abs().max().item() > 1.5)):
            x = F.relu(self.cell(x))
        return self.head(x)


class Reused(nn.Module):
    """One layer called three times, one activation between."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.act(self.layer(x))
        return x


class Functional(nn.Module):
    """No sub-module at all: functional operations on own parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, 3, 3, 3) * 0.2)
        self.matrix = nn.Parameter(torch.randn(6, 5) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(F.conv2d(x, self.kernel, padding=1))
        x = F.hardswish(F.avg_pool2d(x, 2)).amax((2, 3))
        return torch.sigmoid(x @ self.matrix)


class WeightNormed(nn.Module):
    """A parametrized weight, a transposed convolution and group normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 6, 2, stride=2)
        self.norm = nn.GroupNorm(2, 6)
        self.conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(6, 4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.gelu(self.norm(self.up(x))))


@dataclass
class Patient:
    """A network with a batch and how to make another one."""

    make: Callable[[], nn.Module]
    batch: Callable[[], Any]


def _image(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape)


def _bert_batch() -> dict[str, Tensor]:
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, 4:] = 0
    return {"input_ids": torch.randint(0, 20, (2, 6)), "attention_mask": mask}


ZOO: dict[str, Patient] = {
    "mobilenet": Patient(MobileNet, _image(2, 3, 16, 16)),
    "resnet": Patient(ResNet, _image(2, 3, 16, 16)),
    "inception": Patient(Inception, _image(2, 3, 8, 8)),
    "transformer_encoder": Patient(Encoder, _image(2, 5, 16)),
    "vision_transformer": Patient(VisionTransformer, _image(2, 3, 16, 16)),
    "lstm": Patient(LSTMClassifier, lambda: torch.randint(0, 20, (3, 7))),
    "bert": Patient(Bert, _bert_batch),
    "branching": Patient(Branching, _image(2, 8)),
    "reused": Patient(Reused, _image(2, 8)),
    "functional": Patient(Functional, _image(2, 3, 8, 8)),
    "weight_norm": Patient(WeightNormed, _image(2, 3, 6, 6)),
}


def make(name: str, seed: int = 0) -> tuple[nn.Module, Any]:
    """A network of the zoo in eval mode and its batch, both fixed by ``seed``."""
    torch.manual_seed(seed)
    model = _trained_looking(ZOO[name].make()).eval()
    return model, ZOO[name].batch()

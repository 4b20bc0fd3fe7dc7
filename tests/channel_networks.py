"""Tiny networks of the topologies that scales must be followed through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Net(nn.Module):
    """Modules by name and a function that is the ``forward``."""

    def __init__(self, forward: Callable[..., Any], **modules: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.run = forward

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def conv(inputs: int, outputs: int, kernel: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **options)


def norm(channels: int) -> nn.BatchNorm2d:
    made = nn.BatchNorm2d(channels)
    nn.init.uniform_(made.weight, 0.5, 1.5)
    nn.init.normal_(made.bias, std=0.3)
    nn.init.normal_(made.running_mean, std=0.3)
    nn.init.uniform_(made.running_var, 0.5, 2.0)
    return made


def image(channels: int = 3, size: int = 6) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, channels, size, size)


def rows(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*(shape or (5, 4)))


@dataclass
class Case:
    """A network and what must be found.

    Attributes:
        make: Makes the network.
        batch: Makes a batch.
        classes: How many classes of channels.
        scaled: For each layer with channels in a class, how many of its rows and how many of its columns are.
        exclude: Name patterns of quantizers that are left out.
    """

    make: Callable[[], nn.Module]
    batch: Callable[[], Any]
    classes: int
    scaled: dict[str, tuple[int, int]] = field(default_factory=dict)
    exclude: tuple[str, ...] = ()


def pair(between: Callable[[Tensor], Tensor], **more: nn.Module) -> Callable[[], nn.Module]:
    """Two 1x1 convolutions with a function between them."""
    return lambda: Net(lambda m, x: m.b(between(m.a(x))), a=conv(3, 4), b=conv(4, 2), **more)


def linear_pair(between: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return lambda: Net(lambda m, x: m.b(between(m.a(x))), a=nn.Linear(4, 6), b=nn.Linear(6, 3))


class Residual(nn.Module):
    """A stem, two residual blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.head = conv(3, 4, 3), conv(4, 4, 3), conv(4, 4), conv(4, 2)
        self.inner = conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.inner(F.relu(self.a(x)))
        x += self.b(F.relu(x))
        return self.head(x)


class Attention(nn.Module):
    """Attention spelled out, or with torch's fused one."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.fused = fused

    def heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], 2, 4).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        q, k, v = self.heads(self.q(x)), self.heads(self.k(x)), self.heads(self.v(x))
        if self.fused:
            context = F.scaled_dot_product_attention(q, k, v)
        else:
            context = torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v
        return self.out(context.transpose(1, 2).flatten(2))


class GroupedQueries(nn.Module):
    """Two heads of V for four of Q."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(8, 16), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.view(*x.shape[:2], -1, 4).transpose(1, 2) for y in (self.q(x), self.k(x), self.v(x)))
        return self.out(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


class MultiHead(nn.Module):
    """torch's own attention."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=self.need_weights)[0]


class RootMeanSquare(nn.Module):
    """A hand-written RMS normalization."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class SwiGLU(nn.Module):
    """The feed-forward block of most language models."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RootMeanSquare(4)
        self.gate, self.up, self.down = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class SqueezeExcite(nn.Module):
    """Channels weighted by what their averages say."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 4), conv(4, 2)
        self.down, self.up = nn.Linear(4, 2), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        return self.b(x * gate[:, :, None, None])


class Shuffle(nn.Module):
    """ShuffleNet's unit: split, convolve one half, join, shuffle by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 8), conv(4, 4), conv(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.a(x).chunk(2, 1)
        x = torch.cat([left, F.relu(self.b(right))], 1)
        n, c, h, w = x.shape
        return self.c(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


class Square(torch.autograd.Function):
    """A function with its own backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Returned(nn.Module):
    """What is between its layers is an output as well."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 4), conv(4, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = F.relu(self.a(x))
        return {"logits": self.b(features), "features": features.flatten(1)}


class DataDependent(nn.Module):
    """One way is safe, the other is not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(F.relu(y) if float(x.sum()) > 0 else torch.sigmoid(y))


class Experts(nn.Module):
    """Rows go to one of two layers; the second gets none."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        chosen = x[:, 0] > 100
        return torch.cat([self.b(y[~chosen]), self.c(y[chosen])])


class Views(nn.Module):
    """Writes into a tensor through one view and reads another."""

    def __init__(self, write: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.write = conv(3, 4), conv(4, 2), write

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        flat = y.view(len(x), -1)
        self.write(flat, x)
        return self.b(y)


def scripted() -> nn.Module:
    return Net(lambda m, x: m.b(m.s(m.a(x))), a=conv(3, 4), s=torch.jit.script(nn.Hardtanh(-0.1, 0.1)), b=conv(4, 2))


def write_largest(flat: Tensor, x: Tensor) -> None:
    """Writes into a part of a tensor as one of two results."""
    found = (flat[:, :108], torch.empty(2, 108, dtype=torch.int64))
    torch.max(x.flatten(1).unsqueeze(2), 2, out=found)


def product_in_place(m: Net, x: Tensor) -> Tensor:
    """Scales get into a tensor that had none, and are read through a view that was made before."""
    y = x * 1
    view = y.view(len(x), -1)
    y.mul_(m.a(x))
    return m.b(y) + m.c(view.view_as(y))


def leaves_torch(x: Tensor) -> Tensor:
    return torch.from_numpy(x.detach().numpy() + 1)


def triplet(activation: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """MobileNet's expansion, depthwise and projection with batch normalizations."""

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Sequential(conv(3, 4), norm(4), activation()),
            nn.Sequential(conv(4, 4, 3, groups=4), norm(4), activation()),
            nn.Sequential(conv(4, 2), norm(2)),
        )

    return make


def tied() -> nn.Module:
    net = Net(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))), a=conv(4, 4), b=conv(4, 4), c=conv(4, 2))
    net.b.weight = net.a.weight
    return net


def in_loop(m: Net, x: Tensor) -> Tensor:
    for _ in range(2):
        x = m.act(m.a(x))
    return m.b(x)

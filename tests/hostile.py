"""Models that other tools crash on, leave out or change: each with a batch, and what is right for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.nn import qat
from torch.ao.quantization import get_default_qat_qconfig
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint


def images(batch: int = 8, channels: int = 3, size: int = 8) -> Tensor:
    return torch.randn(batch, channels, size, size)


def rows(batch: int = 16, width: int = 8) -> Tensor:
    return torch.randn(batch, width)


def tokens(batch: int = 8, length: int = 6, width: int = 16) -> Tensor:
    return torch.randn(batch, length, width)


@dataclasses.dataclass
class Case:
    """A model, a batch and how many weights must have a quantizer."""

    model: Callable[[], nn.Module]
    batch: Callable[[], Any]
    weights: int
    named: tuple[str, ...] = ()  # in the coverage: what can not be quantized
    finding: str = ""  # the cause of one that the walk must have
    pt2: str = "verified"
    noise: float = 0.04  # of the quantized outputs, relative
    copies: bool = True  # whether `deepcopy` can copy it


CASES: dict[str, Case] = {}


def case(batch: Callable[[], Any], weights: int, **expected: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    def register(model: type[nn.Module]) -> type[nn.Module]:
        name = "".join(f" {c.lower()}" if c.isupper() else c for c in model.__name__).strip()
        CASES[name] = Case(model, batch, weights, **expected)
        return model

    return register


@case(images, 3)
class InPlaceActivations(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1)
        self.relu = nn.ReLU6(inplace=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv(x))
        x = F.hardswish(self.deep(x), inplace=True)
        x += 1.0
        x.mul_(0.5)
        return self.head(x.mean((2, 3)))


@case(rows, 2)
class ReusedModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.act, self.head = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.act(self.layer(x))
        return self.head(x)


@case(lambda: torch.randint(0, 20, (8, 6)), 1)
class TiedWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(20, 16), nn.Linear(16, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(x)))


@case(images, 2)
class SharedConvolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        large, small = self.conv(x), self.conv(F.avg_pool2d(x, 2))
        return self.head(torch.cat([large.mean((2, 3)), small.mean((2, 3))], 1))


@case(rows, 2, finding="not_exportable", pt2="not_written")
class DataDependentBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        high = x[:, 0] > 0
        out = x.new_zeros(len(x), 4)
        if high.any():
            out[high] = self.one(x[high])
        if (~high).any():
            out[~high] = self.other(x[~high])
        return out


@case(rows, 1, finding="not_exportable", pt2="not_written")
class DataDependentLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        steps = 0
        while x.abs().max() > 0.5 and steps < 5:
            x, steps = torch.tanh(self.layer(x)) * 0.7, steps + 1
        return x


@dataclasses.dataclass
class Result:
    logits: Tensor
    hidden: Tensor | None = None
    name: str = "result"


@case(rows, 2)
class DataclassOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Result:
        hidden = torch.relu(self.body(x))
        return Result(self.head(hidden), hidden)


@case(rows, 2)
class DictWithNoneOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = torch.relu(self.body(x))
        return {"logits": self.head(hidden), "loss": None, "states": (hidden, None), "kind": "classifier"}


@case(lambda: (rows(16, 8), rows(16, 4)), 3)
class SeveralInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = nn.Linear(8, 8), nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(torch.relu(self.left(x) + self.right(y)))


@case(lambda: (torch.randint(0, 20, (8, 6)), torch.randint(0, 20, (12,)), torch.tensor([0, 2, 3, 7])), 3)
class IntegersAndEmbeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.bag, self.head = (
            nn.Embedding(20, 8, padding_idx=0),
            nn.EmbeddingBag(20, 8),
            nn.Linear(16, 4),
        )

    def forward(self, x: Tensor, bagged: Tensor, offsets: Tensor) -> Tensor:
        bags = self.bag(bagged, offsets).mean(0, keepdim=True).expand(len(x), -1)
        return self.head(torch.cat([self.embedding(x).mean(1), bags], 1))


@case(lambda: (tokens(), torch.tensor([6, 5, 5, 4, 4, 3, 2, 2])), 5, finding="not_exportable", pt2="not_written")
class PackedLstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(16, 8, batch_first=True, bidirectional=True), nn.Linear(16, 4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        out, _ = self.lstm(packed)
        unpacked, _ = nn.utils.rnn.pad_packed_sequence(out, batch_first=True)
        return self.head(unpacked.mean(1))


@case(tokens, 3)
class PlainGru(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru, self.head = nn.GRU(16, 8, batch_first=True), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gru(x)[0][:, -1])


@case(tokens, 2)
class GruCellLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 8)
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return state


@case(tokens, 2)
class MultiheadAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


@case(tokens, 9)
class TransformerEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
        mask[:, -1] = True
        return self.head(self.encoder(x, src_key_padding_mask=mask)[:, 0])


@case(tokens, 2)
class ScaledDotProductAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))


@case(images, 3)
class TransposedConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 8, 3, 2, 1), nn.ConvTranspose2d(8, 4, 4, 2, 1)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.up(torch.relu(self.down(x)))))


@case(images, 3, noise=0.2)
class OtherNorms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 4)
        self.group, self.instance, self.layer = nn.GroupNorm(2, 8), nn.InstanceNorm2d(8, affine=True), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.group(self.one(x)))
        x = torch.relu(self.instance(self.two(x)))
        return self.head(self.layer(x.mean((2, 3))))


@case(images, 3)
class Parametrized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = parametrizations.weight_norm(nn.Conv2d(3, 8, 3))
        self.two = parametrizations.spectral_norm(nn.Conv2d(8, 8, 3))
        self.head = nn.utils.weight_norm(nn.Linear(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.two(torch.relu(self.one(x)))).mean((2, 3)))


class Lora(nn.Module):
    def __init__(self, layer: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.layer = layer.requires_grad_(False)
        self.a, self.b = (
            nn.Parameter(torch.randn(rank, layer.in_features)),
            nn.Parameter(torch.randn(layer.out_features, rank)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + F.linear(F.linear(x, self.a), self.b) * 0.1


@case(rows, 4)
class LoraWrapper(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = Lora(nn.Linear(8, 8)), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


@case(tokens, 2)
class ComplexPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
        self.filter = nn.Parameter(torch.randn(4, 16, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(self.body(x), dim=1)
        return self.head(torch.fft.irfft(spectrum * self.filter, n=x.shape[1], dim=1))


@case(rows, 2, finding="not_exportable", pt2="not_written")
class Float64Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.exact = nn.Linear(8, 8), nn.Linear(8, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.exact(torch.relu(self.body(x)).double()).float()


@case(rows, 2)
class BufferWrittenInForward(nn.Module):
    count: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        x = self.body(x)
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.head(torch.relu(x))


@case(rows, 2, finding="not_exportable", pt2="not_written")
class ModuleMadeInForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        act = nn.PReLU().to(x.device)
        return self.head(act(self.body(x)))


@case(rows, 3)
class ModuleKeptInForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.LazyLinear(4)
        self.late: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.late is None:
            self.late = nn.Linear(8, 8)
        return self.head(torch.relu(self.late(torch.relu(self.body(x)))))


@case(rows, 3)
class CompiledPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), backend="eager")
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


@case(rows, 1, named=("body (inside)",), finding="not_quantized", pt2="not_written")
class ScriptedPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU()))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight).relu().square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        inner = 2 * F.linear(x, weight).relu() * grad
        return inner @ weight, inner.T @ x


@case(rows, 2)
class CustomAutograd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 4)
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(Squared.apply(self.body(x), self.weight))


@case(tokens, 2)
class Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(16, 4, 8) / 4), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        heads = torch.einsum("btd,dhe->bhte", x, self.weight)
        scores = torch.einsum("bhte,bhse->bhts", heads, heads).softmax(-1)
        mixed = torch.einsum("bhts,bhse->bthe", scores, heads)
        return self.head(mixed.flatten(2))


@case(rows, 2)
class InPlaceSlicing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        y[:, :4] = torch.relu(y[:, :4])
        y[:, 4:] += 1.0
        y[y > 2.0] = 2.0
        return self.head(y)


@case(rows, 3)
class CheckpointedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(checkpoint(self.body, x, use_reentrant=False)))


@case(rows, 3)
class FrozenLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8)).requires_grad_(False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.body(x)
        return self.head(torch.relu(x))


@case(lambda: images().to(memory_format=torch.channels_last), 3)
class ChannelsLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))
        self.head = nn.Linear(8, 4)
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)).mean((2, 3)))


class OwnFakeQuantize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(x, 0.05, 0, -128, 127)


@case(rows, 2, finding="already_quantized", pt2="not_written")
class AlreadyFakeQuantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.quantize, self.head = nn.Linear(8, 8), OwnFakeQuantize(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.quantize(torch.relu(self.body(x))))


@case(rows, 2, finding="not_quantized")
class QuantizedByTorch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = qat.Linear(8, 8, qconfig=get_default_qat_qconfig("x86"))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


@case(rows, 1, finding="already_quantized", pt2="not_written", copies=False)
class DynamicallyQuantized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.ao.nn.quantized.dynamic.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


@case(lambda: torch.randn(0, 8), 2, finding="non_finite")
class EmptyBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


@case(rows, 1, named=("body (inside)", "body.weight"), finding="not_quantized")
class Vmapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.vmap(lambda row: torch.relu(self.body(row)))(x))


@case(rows, 2, finding="not_exportable", pt2="not_written")
class ThroughNumpy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.from_numpy(self.body(x).detach().numpy().clip(0))
        return self.head(y)


@case(rows, 2)
class FunctionalCall(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: value * 1.0 for name, value in self.body.named_parameters()}
        return self.head(torch.relu(torch.func.functional_call(self.body, weights, (x,))))


@case(lambda: torch.full((4, 8), float("nan")), 2, finding="non_finite")
class NanInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x)))


@case(lambda: torch.randn(4, 8), 0)
class NothingToQuantize(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)

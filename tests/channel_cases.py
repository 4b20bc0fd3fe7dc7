"""Every topology that scales must be followed through, or not, with the channels that can be scaled."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tests.channel_networks import (
    Attention,
    Case,
    Experts,
    GroupedQueries,
    MultiHead,
    Net,
    Residual,
    Returned,
    RootMeanSquare,
    Shuffle,
    Square,
    SqueezeExcite,
    SwiGLU,
    Views,
    conv,
    image,
    in_loop,
    leaves_torch,
    linear_pair,
    norm,
    pair,
    product_in_place,
    rows,
    scripted,
    tied,
    triplet,
    write_largest,
)

PAIR = {"a": (4, 0), "b": (0, 4)}
TRIPLET = {"0.0": (4, 0), "1.0": (4, 4), "2.0": (0, 4)}
QKV = {"q": (0, 8), "k": (0, 8), "v": (8, 8), "out": (0, 8)}

CASES: dict[str, Case] = {
    # Through activations.
    "relu module": Case(
        lambda: nn.Sequential(conv(3, 4, 3), nn.ReLU(), conv(4, 2)), image(), 4, {"0": (4, 0), "2": (0, 4)}
    ),
    "functional relu": Case(pair(F.relu), image(), 4, PAIR),
    "no activation": Case(pair(lambda x: x), image(), 4, PAIR),
    "tensor method": Case(pair(lambda x: x.relu().contiguous()), image(), 4, PAIR),
    "in place": Case(pair(lambda x: F.relu_(x).mul_(2.0)), image(), 4, PAIR),
    "reused in-place module": Case(
        lambda: Net(lambda m, x: m.c(m.r(m.b(m.r(m.a(x))))), a=conv(3, 4), b=conv(4, 5), c=conv(5, 2), r=nn.ReLU(True)),
        image(),
        9,
        {"a": (4, 0), "b": (5, 4), "c": (0, 5)},
    ),
    "leaky relu": Case(pair(lambda x: F.leaky_relu(x, 0.2)), image(), 4, PAIR),
    "prelu per channel": Case(
        lambda: nn.Sequential(conv(3, 4), nn.PReLU(4), conv(4, 2)), image(), 4, {"0": (4, 0), "2": (0, 4)}
    ),
    "abs and negation": Case(pair(lambda x: -x.abs() / 3), image(), 4, PAIR),
    "hardtanh": Case(pair(lambda x: F.hardtanh(x, -0.3, 0.2)), image(), 4, PAIR),
    "clamp from below": Case(pair(lambda x: x.clamp(min=0)), image(), 4, PAIR),
    "clamp from above": Case(pair(lambda x: x.clamp_max(0.1)), image(), 4, PAIR),
    "clamp away from zero": Case(pair(lambda x: x.clamp(0.1, 0.5)), image(), 0),
    "clamp to tensors": Case(pair(lambda x: x.clamp(torch.zeros(1), torch.ones(1))), image(), 0),
    "gelu": Case(pair(F.gelu), image(), 0),
    "silu": Case(pair(F.silu), image(), 0),
    "tanh": Case(pair(torch.tanh), image(), 0),
    "softmax": Case(pair(lambda x: x.softmax(1)), image(), 0),
    "dropout": Case(
        lambda: nn.Sequential(conv(3, 4), nn.Dropout2d(), conv(4, 2)), image(), 4, {"0": (4, 0), "2": (0, 4)}
    ),
    "conversions": Case(pair(lambda x: x.double().to(torch.float32)), image(), 4, PAIR),
    "conversion to integers": Case(
        lambda: Net(
            lambda m, x: m.b(y := m.a(x)) + (10 * y).to(torch.int32).float().mean(), a=conv(3, 4), b=conv(4, 2)
        ),
        image(),
        0,
    ),
    # Batch normalization.
    "batch norm": Case(
        lambda: nn.Sequential(conv(3, 4, 3), norm(4), nn.ReLU(), conv(4, 2)), image(), 4, {"0": (4, 0), "3": (0, 4)}
    ),
    "batch norm that is not folded": Case(
        lambda: nn.Sequential(conv(3, 4), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), conv(4, 2)),
        image(),
        0,
    ),
    "depthwise triplet": Case(triplet(nn.ReLU), image(), 8, TRIPLET),
    "depthwise triplet with relu6": Case(triplet(lambda: nn.ReLU6(inplace=True)), image(), 8, TRIPLET),
    # Layers.
    "linear": Case(linear_pair(lambda x: x), rows(), 6, {"a": (6, 0), "b": (0, 6)}),
    "mlp": Case(linear_pair(F.relu), rows(2, 5, 4), 6, {"a": (6, 0), "b": (0, 6)}),
    "grouped": Case(
        lambda: Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(4, 6, 3, groups=2), b=conv(6, 4, groups=2)),
        image(4),
        6,
        {"a": (6, 0), "b": (0, 6)},
    ),
    "transposed": Case(
        lambda: Net(
            lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))),
            a=nn.ConvTranspose2d(4, 6, 2, 2, groups=2),
            b=nn.ConvTranspose2d(6, 4, 3, groups=2),
            c=conv(4, 2),
        ),
        image(4),
        10,
        {"a": (6, 0), "b": (4, 6), "c": (0, 4)},
    ),
    "one dimension": Case(
        lambda: nn.Sequential(nn.Conv1d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv1d(4, 2, 1)),
        rows(2, 3, 8),
        4,
        {"0": (4, 0), "2": (0, 4)},
    ),
    "three dimensions": Case(
        lambda: nn.Sequential(nn.Conv3d(2, 4, 1), nn.ReLU(), nn.ConvTranspose3d(4, 2, 1)),
        rows(1, 2, 3, 3, 3),
        4,
        {"0": (4, 0), "2": (0, 4)},
    ),
    "one sample without a batch axis": Case(pair(F.relu), rows(3, 6, 6), 4, PAIR),
    "circular padding": Case(
        lambda: nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2, 3, padding_mode="circular")),
        image(),
        4,
        {"0": (4, 0), "2": (0, 4)},
    ),
    "excluded layer": Case(pair(F.relu), image(), 0, exclude=("b.weight",)),
    "dynamic weights": Case(
        lambda: Net(
            lambda m, x: F.conv2d(F.relu(m.a(x)), m.b(x).mean((0, 2, 3)).view(2, 4, 1, 1)), a=conv(3, 4), b=conv(3, 8)
        ),
        image(),
        0,
    ),
    "parameter by matmul": Case(
        lambda: Net(lambda m, x: F.relu(m.a(x)) @ m.w, a=nn.Linear(4, 6), w=nn.Parameter(torch.randn(6, 3))), rows(), 0
    ),
    # Moves.
    "max and average pooling": Case(
        pair(lambda x: F.avg_pool2d(F.max_pool2d(F.relu(x), 2), 3, padding=1)), image(), 4, PAIR
    ),
    "pooling with indices": Case(pair(lambda x: F.max_pool2d(x, 2, return_indices=True)[0]), image(), 4, PAIR),
    "interpolation": Case(pair(lambda x: F.interpolate(F.relu(x), scale_factor=2, mode="bilinear")), image(), 4, PAIR),
    "flatten to linear": Case(
        lambda: Net(
            lambda m, x: m.b(torch.flatten(F.adaptive_avg_pool2d(F.relu(m.a(x)), 2), 1)),
            a=conv(3, 4),
            b=nn.Linear(16, 3),
        ),
        image(),
        4,
        {"a": (4, 0), "b": (0, 16)},
    ),
    "largest over space": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x).flatten(2).max(2)[0] + m.a2(x).amin((2, 3))),
            a=conv(3, 4),
            a2=conv(3, 4),
            b=nn.Linear(4, 3),
        ),
        image(),
        4,
        {"a": (4, 0), "a2": (4, 0), "b": (0, 4)},
    ),
    "average over channels": Case(
        lambda: Net(lambda m, x: m.b(m.a(x).mean(1, keepdim=True)), a=conv(3, 4), b=conv(1, 2)),
        image(),
        1,
        {"a": (4, 0), "b": (0, 1)},
    ),
    "pixel shuffle": Case(
        lambda: Net(lambda m, x: m.b(F.pixel_shuffle(F.relu(m.a(x)), 2)), a=conv(3, 8), b=conv(2, 2, 3)),
        image(),
        2,
        {"a": (8, 0), "b": (0, 2)},
    ),
    "space to depth by slices": Case(
        lambda: Net(
            lambda m, x: m.b(torch.cat([y := m.a(x)[..., ::2, ::2], m.a2(x)[..., 1::2, 1::2], y.flip(-1)], 1)),
            a=conv(3, 4),
            a2=conv(3, 4),
            b=conv(12, 2),
        ),
        image(),
        8,
        {"a": (4, 0), "a2": (4, 0), "b": (0, 12)},
    ),
    "zero padding of space and channels": Case(
        lambda: Net(lambda m, x: m.b(F.pad(m.a(x), (1, 1, 0, 0, 1, 2))), a=conv(3, 4), b=conv(7, 2)),
        image(),
        4,
        {"a": (4, 0), "b": (0, 4)},
    ),
    "padding with ones": Case(pair(lambda x: F.pad(x, (1, 1), value=1.0)), image(), 0),
    "reflection padding": Case(pair(lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect").roll(1, 2)), image(), 4, PAIR),
    "patches": Case(
        lambda: Net(lambda m, x: m.b(F.unfold(F.relu(m.a(x)), 2).transpose(1, 2)), a=conv(3, 4), b=nn.Linear(16, 3)),
        image(),
        4,
        {"a": (4, 0), "b": (0, 16)},
    ),
    "masked with zeros": Case(
        pair(lambda x: x.masked_fill(x.new_zeros(6, 6, dtype=torch.bool).fill_diagonal_(True), 0.0)), image(), 4, PAIR
    ),
    "masked with ones": Case(pair(lambda x: x.masked_fill(torch.eye(6) > 0, 1.0)), image(), 0),
    # Several producers and consumers.
    "residual stage": Case(
        Residual, image(), 8, {"stem": (4, 0), "a": (4, 4), "inner": (4, 4), "b": (4, 4), "head": (0, 4)}
    ),
    "sum with the input": Case(lambda: Net(lambda m, x: m.b(m.a(x) + x), a=conv(3, 3), b=conv(3, 2)), image(), 0),
    "sum of a list": Case(
        lambda: Net(lambda m, x: m.c(sum([m.a(x), m.b(x)])), a=conv(3, 4), b=conv(3, 4), c=conv(4, 2)),
        image(),
        4,
        {"a": (4, 0), "b": (4, 0), "c": (0, 4)},
    ),
    "maximum of two": Case(
        lambda: Net(lambda m, x: m.c(torch.maximum(m.a(x), m.b(x))), a=conv(3, 4), b=conv(3, 4), c=conv(4, 2)),
        image(),
        4,
        {"a": (4, 0), "b": (4, 0), "c": (0, 4)},
    ),
    "sum with a number": Case(pair(lambda x: x + 1.0), image(), 0),
    "sum over broadcast channels": Case(
        lambda: Net(lambda m, x: m.c(m.a(x) + m.b(x)), a=conv(3, 4), b=conv(3, 1), c=conv(4, 2)),
        image(),
        1,
        {"a": (4, 0), "b": (1, 0), "c": (0, 4)},
    ),
    "concatenation": Case(
        lambda: Net(
            lambda m, x: m.c(torch.cat([F.relu(m.a(x)), m.b(x), x], 1)), a=conv(3, 4), b=conv(3, 2), c=conv(9, 2)
        ),
        image(),
        6,
        {"a": (4, 0), "b": (2, 0), "c": (0, 6)},
    ),
    "branches": Case(
        lambda: Net(lambda m, x: m.b(y := F.relu(m.a(x))) + m.c(y), a=conv(3, 4), b=conv(4, 2), c=conv(4, 2)),
        image(),
        4,
        {"a": (4, 0), "b": (0, 4), "c": (0, 4)},
    ),
    "one branch that can not be scaled": Case(
        lambda: Net(lambda m, x: m.b(F.relu(y := m.a(x))) + y.tanh().mean(), a=conv(3, 4), b=conv(4, 2)), image(), 0
    ),
    "channel shuffle": Case(Shuffle, image(), 12, {"a": (8, 0), "b": (4, 4), "c": (0, 8)}),
    "squeeze and excite": Case(SqueezeExcite, image(), 6, {"a": (4, 0), "b": (0, 4), "down": (2, 4), "up": (0, 2)}),
    "quotient": Case(
        lambda: Net(lambda m, x: m.b(m.a(x) / (1 + x.abs().sum())), a=conv(3, 4), b=conv(4, 2)), image(), 4, PAIR
    ),
    "divisor": Case(lambda: Net(lambda m, x: m.b(x.sum() / m.a(x).abs()), a=conv(3, 4), b=conv(4, 2)), image(), 0),
    "number over it": Case(pair(lambda x: 2 / (x.abs() * 1)), image(), 0),
    "number over it by name": Case(pair(lambda x: torch.div(2, x.abs())), image(), 0),
    "number first": Case(pair(lambda x: torch.mul(2, torch.add(0, x))), image(), 4, PAIR),
    "product of two": Case(
        lambda: Net(lambda m, x: m.c(m.a(x) * m.b(x)), a=conv(3, 4), b=conv(3, 4), c=conv(4, 2)), image(), 0
    ),
    # Parameters.
    "added vector": Case(
        lambda: Net(
            lambda m, x: m.b(F.relu(m.a(x) + m.p)), a=nn.Linear(4, 6), b=nn.Linear(6, 3), p=nn.Parameter(torch.randn(6))
        ),
        rows(),
        6,
        {"a": (6, 0), "b": (0, 6)},
    ),
    "added positions": Case(
        lambda: Net(
            lambda m, x: m.b(F.relu(m.a(x) - m.p)),
            a=nn.Linear(4, 6),
            b=nn.Linear(6, 3),
            p=nn.Parameter(torch.randn(1, 5, 6)),
        ),
        rows(2, 5, 4),
        6,
        {"a": (6, 0), "b": (0, 6)},
    ),
    "added scalar": Case(
        lambda: Net(lambda m, x: m.b(F.relu(m.a(x) + m.p)), a=conv(3, 4), b=conv(4, 2), p=nn.Parameter(torch.randn(1))),
        image(),
        1,
        {"a": (4, 0), "b": (0, 4)},
    ),
    "layer scale": Case(
        lambda: Net(
            lambda m, x: m.b(m.a(x) * m.p), a=nn.Linear(4, 6), b=nn.Linear(6, 3), p=nn.Parameter(torch.randn(6))
        ),
        rows(),
        6,
        {"a": (6, 0), "b": (0, 6)},
    ),
    # Normalizations.
    "layer norm": Case(
        lambda: Net(lambda m, x: m.b(m.n(m.a(x))), a=nn.Linear(4, 6), n=nn.LayerNorm(6), b=nn.Linear(6, 3)),
        rows(),
        6,
        {"b": (0, 6)},
    ),
    "layer norm without gain": Case(
        lambda: Net(
            lambda m, x: m.b(m.n(m.a(x))),
            a=nn.Linear(4, 6),
            n=nn.LayerNorm(6, elementwise_affine=False),
            b=nn.Linear(6, 3),
        ),
        rows(),
        0,
    ),
    "layer norm over two axes": Case(
        lambda: Net(lambda m, x: m.b(m.n(x).flatten(1)), n=nn.LayerNorm((5, 4)), b=nn.Linear(20, 3)), rows(2, 5, 4), 0
    ),
    "layer norm used twice": Case(
        lambda: Net(
            lambda m, x: m.b(m.n(x)) + m.c(m.n(2 * x + 1)), n=nn.LayerNorm(4), b=nn.Linear(4, 3), c=nn.Linear(4, 3)
        ),
        rows(),
        0,
    ),
    "group norm": Case(
        lambda: Net(lambda m, x: m.b(F.relu(m.n(m.a(x)))), a=conv(3, 4), n=nn.GroupNorm(2, 4), b=conv(4, 2)),
        image(),
        4,
        {"b": (0, 4)},
    ),
    "rms norm": Case(lambda: nn.Sequential(nn.RMSNorm(4), nn.Linear(4, 3)), rows(), 4, {"1": (0, 4)}),
    "rms norm by hand": Case(lambda: nn.Sequential(RootMeanSquare(4), nn.Linear(4, 3)), rows(), 4, {"1": (0, 4)}),
    "swiglu": Case(SwiGLU, rows(2, 5, 4), 10, {"gate": (0, 4), "up": (6, 4), "down": (0, 6)}),
    # Attention.
    "attention by hand": Case(lambda: Attention(False), rows(2, 5, 8), 16, QKV),
    "fused attention": Case(lambda: Attention(True), rows(2, 5, 8), 16, QKV),
    "attention of one tensor to itself": Case(
        lambda: Net(
            lambda m, x: m.b(F.scaled_dot_product_attention(y := m.a(x), y, y)), a=nn.Linear(4, 6), b=nn.Linear(6, 3)
        ),
        rows(2, 5, 4),
        0,
    ),
    "attention to values of two producers": Case(
        lambda: Net(
            lambda m, x: m.b(F.scaled_dot_product_attention(x, torch.cat([x, x], 1), torch.cat([m.a(x), m.a2(x)], 1))),
            a=nn.Linear(4, 6),
            a2=nn.Linear(4, 6),
            b=nn.Linear(6, 3),
        ),
        rows(2, 5, 4),
        6,
        {"a": (6, 0), "a2": (6, 0), "b": (0, 6)},
    ),
    "grouped queries": Case(GroupedQueries, rows(2, 5, 8), 8, {"v": (8, 0), "out": (0, 16)}),
    "multi-head attention": Case(
        lambda: MultiHead(False), rows(2, 5, 8), 8, {"attention.linear": (8, 0), "attention.linear.1": (0, 8)}
    ),
    "multi-head attention with weights": Case(
        lambda: MultiHead(True), rows(2, 5, 8), 8, {"attention.linear": (8, 0), "attention.linear.1": (0, 8)}
    ),
    # What must be left alone.
    "tied": Case(tied, image(4), 0),
    "layer in a loop": Case(lambda: Net(in_loop, a=conv(4, 4), b=conv(4, 2), act=nn.ReLU()), image(4), 0),
    "returned": Case(Returned, image(), 0),
    "read by python": Case(
        lambda: Net(lambda m, x: m.b(y := m.a(x)) * (2 if float(y.sum()) > 0 else 1), a=conv(3, 4), b=conv(4, 2)),
        image(),
        0,
    ),
    "leaves torch": Case(pair(leaves_torch), image(), 0),
    "autograd function": Case(pair(Square.apply), image(), 0),
    "vmap": Case(pair(torch.vmap(torch.sin)), image(), 0),
    "script": Case(scripted, image(), 0),
    "loss inside": Case(
        lambda: Net(
            lambda m, x: (m.b(y := F.relu(m.a(x))), m.loss(y, y.detach() * 0)),
            a=conv(3, 4),
            b=conv(4, 2),
            loss=nn.MSELoss(),
        ),
        image(),
        0,
    ),
    "gru": Case(
        lambda: Net(lambda m, x: m.b(m.r(m.a(x))[0]), a=nn.Linear(4, 6), r=nn.GRU(6, 5), b=nn.Linear(5, 3)),
        rows(2, 5, 4),
        0,
    ),
    "lstm": Case(
        lambda: Net(lambda m, x: m.b(m.r(m.a(x))[1][0]), a=nn.Linear(4, 6), r=nn.LSTM(6, 5), b=nn.Linear(5, 3)),
        rows(2, 5, 4),
        0,
    ),
    "written through a view": Case(lambda: Views(lambda flat, x: flat.add_(1.0)), image(), 0),
    "relu through a view": Case(lambda: Views(lambda flat, x: flat.relu_()), image(), 4, PAIR),
    "copied into a view": Case(lambda: Views(lambda flat, x: flat[:, :3].copy_(x[:, 0, 0, :3])), image(), 0),
    "set by index": Case(lambda: Views(lambda flat, x: flat.__setitem__((0, 0), 1.0)), image(), 0),
    "set through data": Case(lambda: Views(lambda flat, x: setattr(flat, "data", flat.data * 0)), image(), 0),
    "written with out": Case(lambda: Views(lambda flat, x: torch.sin(flat, out=flat)), image(), 0),
    "written with two outs": Case(lambda: Views(write_largest), image(), 0),
    "product in place of something fixed": Case(
        lambda: Net(product_in_place, a=conv(3, 3), b=conv(3, 2), c=conv(3, 2)), image(), 0
    ),
    "dynamic bias": Case(
        lambda: Net(
            lambda m, x: F.linear(F.relu(m.a(x)), m.w, (y := m.c(x)).sum(0)) + m.d(y),
            a=nn.Linear(4, 6),
            w=nn.Parameter(torch.randn(3, 6)),
            c=nn.Linear(4, 3),
            d=nn.Linear(3, 3),
        ),
        rows(),
        6,
        {"a": (6, 0), "linear": (0, 6)},
    ),
    "buffer filled": Case(
        lambda: Net(lambda m, x: m.b(torch.zeros(2, 4, 6, 6).copy_(m.a(x))), a=conv(3, 4), b=conv(4, 2)), image(), 0
    ),
    "empty expert": Case(Experts, rows(), 0),
    "single layer": Case(lambda: nn.Sequential(nn.Linear(4, 3)), rows(), 0),
    "logarithm": Case(pair(lambda x: x.abs().log1p() * math.e), image(), 0),
}


def make(name: str, seed: int = 0) -> tuple[nn.Module, Any]:
    """A network in eval mode and its batch, both fixed by ``seed``."""
    torch.manual_seed(seed)
    model = CASES[name].make().eval()
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)) and module.bias is not None:
            nn.init.normal_(module.bias)
    return model, CASES[name].batch()

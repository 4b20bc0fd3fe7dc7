"""How long fake-quantize and observers take, as ratios to a ReLU of the same tensor in the same run.

    python benchmarks/fake_quantize.py [--json PATH]

One thread; the least of several repetitions, taken in turn so that a busy machine slows all alike.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_quantdebug import fake_quantize as module
from lightning_quantdebug.encoding import Encoding, encoding_from_range
from lightning_quantdebug.fake_quantize import fake_quantize
from lightning_quantdebug.observer import Observer
from lightning_quantdebug.target import Granularity, QuantSpec

ACTIVATIONS = {"conv (32, 96, 32, 32)": (32, 96, 32, 32), "tokens (32, 197, 384)": (32, 197, 384)}
WEIGHT = (512, 4608)


def least_seconds(candidates: Mapping[str, Callable[[], Any]], repetitions: int = 15) -> dict[str, float]:
    """Least wall time of each candidate."""
    best = dict.fromkeys(candidates, float("inf"))
    for _ in range(repetitions):
        for name, run in candidates.items():
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def ratios(candidates: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Time of each candidate over the time of the one called "relu", which is kept in milliseconds."""
    seconds = least_seconds(candidates)
    relu = seconds.pop("relu")
    return {"relu, ms": relu * 1e3} | {name: value / relu for name, value in seconds.items()}


def with_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Any]:
    """Forward and backward pass of ``function`` on a copy of ``x``."""
    leaf, gradient = x.clone().requires_grad_(), torch.ones_like(x)
    return lambda: torch.autograd.grad(function(leaf), leaf, gradient)


def in_blocks_of(size: int, x: Tensor, encoding: Encoding) -> Callable[[], Tensor]:
    """Fake-quantize with another block size."""

    def run() -> Tensor:
        usual, module.BLOCK_SIZE = module.BLOCK_SIZE, size
        try:
            return fake_quantize(x, encoding)
        finally:
            module.BLOCK_SIZE = usual

    return run


def torch_kernel(encoding: Encoding) -> Callable[[Tensor], Tensor]:
    """Torch's kernel for the same encoding."""
    scale, zero_point, spec = encoding.scale, encoding.zero_point.int(), encoding.spec
    if encoding.channel_axis is None:
        return lambda x: torch.fake_quantize_per_tensor_affine(x, scale, zero_point, spec.quant_min, spec.quant_max)
    axis = encoding.channel_axis
    return lambda x: torch.fake_quantize_per_channel_affine(x, scale, zero_point, axis, spec.quant_min, spec.quant_max)


def forward_and_backward(x: Tensor, encoding: Encoding) -> dict[str, dict[str, float]]:
    """Ours and torch's kernel, forward alone and with the backward pass."""
    kernel = torch_kernel(encoding)
    forward = {"relu": x.relu, "ours": lambda: fake_quantize(x, encoding), "torch's kernel": lambda: kernel(x)}
    backward = {
        "relu": with_gradient(torch.relu, x),
        "ours": with_gradient(lambda y: fake_quantize(y, encoding), x),
        "torch's kernel": with_gradient(kernel, x),
    }
    return {"forward": ratios(forward), "forward and backward": ratios(backward)}


def measure() -> dict[str, dict[str, float]]:
    """All tables by their name."""
    tables: dict[str, dict[str, float]] = {}
    ends = torch.tensor(-1.0), torch.tensor(6.0)
    for name, shape in ACTIVATIONS.items():
        x, encoding = torch.randn(shape), encoding_from_range(*ends, QuantSpec(8))
        tables |= {f"{name}, {key}": table for key, table in forward_and_backward(x, encoding).items()}
        blocks = {f"2^{power}": in_blocks_of(2**power, x, encoding) for power in range(14, 23)}
        tables[f"{name}, block size"] = ratios({"relu": x.relu} | blocks)
        half = x.bfloat16()
        tables[f"{name}, bfloat16"] = ratios(
            {"relu": half.relu, "ours": in_blocks_of(module.BLOCK_SIZE, half, encoding)}
        )
        observers = {f"{count} values a sample": Observer(count) for count in (256, 1024, 4096, None)}
        observing = {key: lambda o=observer, y=x: o.observe(y) for key, observer in observers.items()}
        tables[f"{name}, observer"] = ratios({"relu": x.relu, "extremes alone": lambda y=x: y.aminmax()} | observing)
    weight = torch.randn(WEIGHT)
    spec = QuantSpec(8, symmetric=True, granularity=Granularity.PER_CHANNEL)
    encoding = encoding_from_range(*weight.aminmax(dim=1), spec, 0)
    tables |= {f"weight {WEIGHT}, {key}": table for key, table in forward_and_backward(weight, encoding).items()}
    blocks = {f"2^{power}": in_blocks_of(2**power, weight, encoding) for power in range(14, 23)}
    tables[f"weight {WEIGHT}, block size"] = ratios({"relu": weight.relu} | blocks)
    few, per_tensor = torch.randn(4), encoding_from_range(*ends, QuantSpec(8))
    tables["4 values: the cost of a call"] = ratios({"relu": few.relu, "ours": lambda: fake_quantize(few, per_tensor)})
    return tables


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="also write the tables to this file")
    path = parser.parse_args().json
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tables = measure()
    for name, table in tables.items():
        print(name)
        for row, value in table.items():
            print(f"  {row:24} {value:8.3f}{'' if row.endswith('ms') else ' x relu'}")
    if path is not None:
        environment = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
        path.write_text(json.dumps({"environment": environment, "tables": tables}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

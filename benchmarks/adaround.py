"""What AdaRound is worth on real images, and what it costs beside AIMET's way of computing it.

    python benchmarks/adaround.py
    python benchmarks/adaround.py --data path/to/cifar10_small.npz --epochs 8

A MobileNet-like network is trained once, in memory. Ranges and rounding see 1024 training images; accuracy is on the
2,000 test images, weights at 4 and 3 bits and activations at 8. The second table takes both ways of one learning step,
on each layer of that network: ours on 256 sampled positions, and AIMET's (2.42, `_base/adaround`) as its source has it,
with 32 whole feature maps through the layer, autograd and Adam. What AIMET's default of 15,000 steps would take is that
time times 15,000: extrapolated, not run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from trained_networks import DATA, Images, MobileNet, accuracy, load_images, train

from lightning_quantdebug import Instrumentation, adaround, instrument
from lightning_quantdebug.instrument import batch_runs
from lightning_quantdebug.layers import Call, Layer
from lightning_quantdebug.learned_rounding import (
    GAMMA,
    ZETA,
    AdaRoundSettings,
    inverse_rectified_sigmoid,
    learn_rounding,
)

RESULTS = Path(__file__).parent / "results" / "adaround.json"
TARGETS = {
    "W4A8 per tensor": "w4a8_per_tensor",
    "W4A8 per channel": "w4a8",
    "W3A8 per tensor": "w3a8_per_tensor",
}
CALIBRATION, BATCH = 1024, 64
AIMET_STEPS, AIMET_IMAGES = 15_000, 32
TIMED_STEPS, TIMED_REPETITIONS = 100, 5


def rounded(net: MobileNet, images: Images, target: str) -> dict[str, Any]:
    """Accuracy with nearest and with learned rounding, and what learning took."""
    batches = list(images.x_train[:CALIBRATION].split(BATCH))
    with instrument(net, batches[0], target) as session:
        session.calibrate(batches)
        session.set_mode("quantize")
        nearest = accuracy(net, images.x_test, images.y_test)
        start = time.perf_counter()
        done = adaround.adaround(session, batch_runs(session, batches))
        seconds = time.perf_counter() - start
        learned = accuracy(net, images.x_test, images.y_test)
    return {"nearest": nearest, "AdaRound": learned, "seconds": seconds, "note": done.note}


@contextmanager
def timed_learning(seconds: dict[int, float]) -> Iterator[None]:
    """Note what a step of ours takes wherever the rounding of a layer is learned, by the layer's number."""
    settings = AdaRoundSettings(iterations=TIMED_STEPS)

    def timed(problem: Any, samples: Any, *_: Any) -> Tensor:
        found = least_seconds(lambda: learn_rounding(problem, samples, settings, lambda: False), 2)
        seconds[len(seconds)] = found / TIMED_STEPS
        return problem.nearest

    adaround.learn_rounding = timed
    try:
        yield
    finally:
        adaround.learn_rounding = learn_rounding


def least_seconds(run: Callable[[], Any], repetitions: int) -> float:
    """The least time of some repetitions."""
    best = float("inf")
    for _ in range(repetitions):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def inputs_of(session: Instrumentation, net: MobileNet, x: Tensor) -> dict[str, Call]:
    """The call of each layer on some images, everything quantized."""
    calls: dict[str, Call] = {}
    taps = {layer.key: lambda call: calls.__setitem__(call.name, call) for layer in session.layers}
    with session.tapped(taps), session.modes("quantize"), torch.no_grad():
        net(x)
    return calls


def aimet_step(layer: Layer, call: Call) -> Callable[[], None]:
    """One step of AIMET's optimizer: 32 images drawn from those kept, forward, backward, Adam."""
    x, weight, *others = call.args
    encoding = layer.quantizer.encoding
    assert encoding is not None
    shape = (-1, *[1] * (weight.ndim - 1)) if encoding.scale.ndim else ()
    scale = encoding.scale.reshape(shape)
    floor = (weight / scale).floor()
    alpha = inverse_rectified_sigmoid(weight / scale - floor).requires_grad_()
    adam = torch.optim.Adam([alpha], lr=1e-3)
    target = call.result.relu()

    def step() -> None:
        images = torch.randperm(len(x))[:AIMET_IMAGES]
        h = (alpha.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
        soft = (floor + h).clamp(encoding.spec.quant_min, encoding.spec.quant_max) * scale
        output = call.func(x[images], soft, *others, **call.kwargs).relu()
        loss = (output - target[images]).square().sum(1).mean() + 0.01 * (1 - (2 * h - 1).abs().pow(10.0)).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()

    return step


def cost(net: MobileNet, images: Images) -> dict[str, dict[str, float]]:
    """Milliseconds of one step for each layer, ours and AIMET's."""
    batches = list(images.x_train[:CALIBRATION].split(BATCH))
    ours: dict[int, float] = {}
    with instrument(net, batches[0], "w4a8_per_tensor") as session:
        session.calibrate(batches)
        with timed_learning(ours):
            adaround.adaround(session, batch_runs(session, batches))
        calls = inputs_of(session, net, images.x_train[: 2 * AIMET_IMAGES])
        table = {}
        for number, layer in enumerate(session.layers):
            theirs = least_seconds(aimet_step(layer, calls[layer.name]), TIMED_REPETITIONS)
            table[layer.name] = {"ours, ms": 1e3 * ours[number], "AIMET's, ms": 1e3 * theirs}
    return table


def totals(table: dict[str, dict[str, float]], seconds: float) -> dict[str, float]:
    """What the default numbers of steps take for all layers."""
    steps = AdaRoundSettings().iterations
    ours, theirs = (sum(row[name] for row in table.values()) / 1e3 for name in ("ours, ms", "AIMET's, ms"))
    return {
        "median ratio of a step": statistics.median(row["AIMET's, ms"] / row["ours, ms"] for row in table.values()),
        f"ours, {steps} steps on every layer, s": steps * ours,
        "ours, measured with the runs that collect samples, s": seconds,
        f"AIMET's default of {AIMET_STEPS} steps on every layer, extrapolated, s": AIMET_STEPS * theirs,
    }


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA, help="the CIFAR-10 subset")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of training")
    parser.add_argument("--json", type=Path, default=RESULTS, help="file for the numbers")
    options = parser.parse_args()
    images = load_images(options.data)
    torch.set_num_threads(1)
    net = train(images, options.epochs)
    reference = accuracy(net, images.x_test, images.y_test)
    print(f"FP32 {reference:.4f}")
    print(f"{'':18}{'nearest':>9}{'AdaRound':>10}{'seconds':>9}")
    table = {}
    for name, target in TARGETS.items():
        row = table[name] = rounded(net, images, target)
        print(f"{name:18}{row['nearest']:9.4f}{row['AdaRound']:10.4f}{row['seconds']:9.1f}", flush=True)
    steps = cost(net, images)
    print(f"\n{'one step':14}{'ours, ms':>10}{'AIMET, ms':>11}{'ratio':>8}")
    for name, row in steps.items():
        ours, theirs = row.values()
        print(f"{name:14}{ours:10.2f}{theirs:11.1f}{theirs / ours:8.0f}")
    total = totals(steps, table["W4A8 per tensor"]["seconds"])
    for name, value in total.items():
        print(f"{name}: {value:.0f}")
    environment = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    results = {"environment": environment, "FP32": reference, "accuracy": table, "one step": steps, "total": total}
    options.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""What the remedies of weights are worth on real images: accuracy and seconds, at 8, 4 and 3 bits.

    python benchmarks/remedies.py
    python benchmarks/remedies.py --data path/to/cifar10_small.npz --epochs 8

A MobileNet-like network is trained once, in memory. Ranges, equalization, bias correction and rounding see 512
training images; accuracy is on the 2,000 test images, with activations at 8 bits. The second table is the picture of
the DFQ paper (Nagel et al. 2019, table 1): a rescaling that changes nothing in FP32 ruins weights per tensor, and
equalization mends them.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from trained_networks import DATA, Images, MobileNet, accuracy, load_images, plant_rescaling, train

from lightning_quantdebug import Instrumentation, instrument
from lightning_quantdebug.adaround import adaround
from lightning_quantdebug.bias_correction import correct_bias
from lightning_quantdebug.equalization import equalize
from lightning_quantdebug.instrument import batch_runs
from lightning_quantdebug.layers import Runs

RESULTS = Path(__file__).parent / "results" / "remedies.json"
TARGETS = {
    "W8A8 per tensor": "w8a8_per_tensor",
    "W8A8 per channel": "w8a8",
    "W4A8 per tensor": "w4a8_per_tensor",
    "W4A8 per channel": "w4a8",
    "W3A8 per tensor": "w3a8_per_tensor",
    "W3A8 per channel": "w3a8",
}
REMEDIES: dict[str, tuple[Callable[[Instrumentation, Runs], Any], ...]] = {
    "nearest": (),
    "CLE": (equalize,),
    "CLE + bias correction": (equalize, correct_bias),
    "AdaRound": (adaround,),
    "CLE + AdaRound": (equalize, adaround),
}
CALIBRATION, BATCH = 512, 32


def measured(net: MobileNet, images: Images, target: str, remedies: dict[str, Any], kind: str | None) -> dict[str, Any]:
    """Accuracy and seconds after each chain of remedies, each from the same start.

    Args:
        net: The network; it is not changed.
        images: To calibrate and to judge.
        target: Preset name.
        remedies: Chains of remedies by name.
        kind: Which quantizers are on when it is judged; ``None`` for all.
    """
    batches = list(images.x_train[:CALIBRATION].split(BATCH))
    found = {}
    with instrument(net, batches[0], target) as session:
        session.calibrate(batches)
        runs, start = batch_runs(session, batches), session.state()
        for name, chain in remedies.items():
            started = time.perf_counter()
            for remedy in chain:
                remedy(session, runs)
                session.calibrate(batches)
            seconds = time.perf_counter() - started
            with session.modes("quantize", kind=kind):
                found[name] = {"accuracy": accuracy(net, images.x_test, images.y_test), "seconds": round(seconds, 1)}
            session.restore(start)
    return found


def planted(net: MobileNet, images: Images) -> dict[str, Any]:
    """The network with its channels rescaled, weights quantized at 8 bits per tensor."""
    sick = copy.deepcopy(net)
    plant_rescaling(sick)
    with torch.no_grad():
        exact, moved = (each(images.x_test[:64]) for each in (net, sick))
    chains = {"nearest": (), "CLE": (equalize,)}
    return {
        "relative change in FP32": float((moved - exact).norm() / exact.norm()),
        "FP32": accuracy(sick, images.x_test, images.y_test),
        "W8 per tensor": measured(sick, images, "w8a8_per_tensor", chains, "weight"),
        "W8 per channel": measured(sick, images, "w8a8", {"nearest": ()}, "weight"),
        "W8A8 per tensor": measured(sick, images, "w8a8_per_tensor", chains, None),
    }


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *rows])


def cell(item: dict[str, Any]) -> str:
    """Accuracy in percent, and seconds where a remedy took any."""
    percent = f"{100 * item['accuracy']:.2f}"
    return f"{percent} ({item['seconds']:.0f} s)" if item["seconds"] >= 0.5 else percent


def main() -> None:
    """Train, measure, print, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="the .npz with the images; default: %(default)s")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--json", type=Path, default=RESULTS, help="where figures are kept; default: %(default)s")
    arguments = parser.parse_args()
    if not arguments.data.is_file():
        print(f"Skipped: there are no images at {arguments.data}. Give the CIFAR-10 subset with --data.")
        return
    torch.set_num_threads(1)
    images = load_images(arguments.data)
    started = time.perf_counter()
    net = train(images, arguments.epochs)
    fp32 = accuracy(net, images.x_test, images.y_test)
    figures: dict[str, Any] = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "epochs": arguments.epochs,
        "training_seconds": round(time.perf_counter() - started, 1),
        "fp32": fp32,
        "targets": {name: measured(net, images, preset, REMEDIES, None) for name, preset in TARGETS.items()},
        "planted": planted(net, images),
    }
    arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(f"FP32: {100 * fp32:.2f} % of {len(images.y_test)} test images\n")
    rows = [[name, *(cell(item) for item in found.values())] for name, found in figures["targets"].items()]
    print(table(["", *REMEDIES], rows))
    sick = figures["planted"]
    print(f"\nRescaled by 10^±1.5 per channel, FP32: {100 * sick['FP32']:.2f} %\n")
    rows = [
        [name, *(cell(found[key]) if key in found else "-" for key in ("nearest", "CLE"))]
        for name, found in sick.items()
        if isinstance(found, dict)
    ]
    print(table(["", "nearest", "CLE"], rows))


if __name__ == "__main__":
    main()

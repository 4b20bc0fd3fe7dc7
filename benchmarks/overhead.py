"""What the quantizers cost: forward, training step, an idle callback, and memory, as ratios to FP32 in one run.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --json overhead.json --batch 32 --size 224 --rounds 9

Every figure is the median of paired ratios: FP32 and the measured form run in turn, so that what else the machine does
meets both. One thread, because that is what repeats best.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from networks import MobileNetV2, ResNet18, TransformerClassifier, images
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_quantdebug import Instrumentation, QuantDebug, instrument

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v2": MobileNetV2,
    "resnet18": ResNet18,
    "transformer_encoder": TransformerClassifier,
}


def batch_for(name: str, batch: int, size: int) -> Tensor:
    """A batch of images, or of 32 vectors for the transformer."""
    if name == "transformer_encoder":
        return torch.randn(batch, 32, 256, generator=torch.Generator().manual_seed(0))
    return images(batch, size)


def seconds(run: Callable[[], Any]) -> float:
    """Wall time of one call."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def paired(base: Callable[[], Any], others: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Any]:
    """Median, minimum and maximum over the rounds of each form's time divided by the base's time beside it."""
    ratios: dict[str, list[float]] = {name: [] for name in others}
    bases: list[float] = []
    for run in (base, *others.values()):
        run()
    for _ in range(rounds):
        for name, run in others.items():
            before, own, after = seconds(base), seconds(run), seconds(base)
            bases += [before, after]
            ratios[name].append(2 * own / (before + after))
    spread = {name: [statistics.median(values), min(values), max(values)] for name, values in ratios.items()}
    return {"fp32_seconds": statistics.median(bases), "ratios": spread}


def forward_costs(model: nn.Module, batch: Tensor, rounds: int) -> dict[str, Any]:
    """Forward in evaluation: bypassed, observing, weights only, activations only, and all quantized."""
    plain = type(model).forward.__get__(model)
    with torch.no_grad(), instrument(model, batch, "int8") as session:
        session.calibrate([batch])

        def in_mode(mode: str, kind: str | None = None) -> Callable[[], Any]:
            def run() -> Any:
                return model(batch)

            def switched() -> Any:
                session.set_mode("bypass")
                session.set_mode(mode, kind=kind)
                return run()

            return switched

        others = {
            "bypass": in_mode("bypass"),
            "observe": in_mode("observe"),
            "activations": in_mode("quantize", "activation"),
        }
        result = paired(lambda: plain(batch), others, rounds)
        result["quantizers"] = len(session.quantizers)
        for name, kind in (("weights", "weight"), ("quantize", None)):
            session.set_mode("bypass")
            session.set_mode("quantize", kind=kind)
            result["ratios"].update(paired(lambda: plain(batch), {name: lambda: model(batch)}, rounds)["ratios"])
    return result


def training_costs(model: nn.Module, batch: Tensor, rounds: int) -> dict[str, Any]:
    """Forward, backward and optimizer step: all quantized with straight-through gradients, over an FP32 training step.

    With batch normalizations that train (they compute the statistics of the batch, and the weight is folded, quantized
    and unfolded), and with batch normalizations that are folded with their running statistics.
    """
    plain = type(model).forward.__get__(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def step(forward: Callable[[Tensor], Tensor], folded: bool = False) -> None:
        model.train(not folded)
        optimizer.zero_grad()
        forward(batch).square().mean().backward()
        optimizer.step()

    with instrument(model, batch, "int8") as session:
        session.calibrate([batch])
        session.set_mode("quantize")
        forms = {"straight_through": lambda: step(model), "straight_through_folded": lambda: step(model, folded=True)}
        return paired(lambda: step(plain), forms, rounds)


class Small(pl.LightningModule):
    """A network whose epoch takes seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten()
        )
        self.head = nn.Linear(32 * 32 * 32, 10)
        self.seconds: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def on_train_epoch_start(self) -> None:
        self.started = time.perf_counter()

    def on_train_epoch_end(self) -> None:
        self.seconds.append(time.perf_counter() - self.started)


def loader(samples: int, batch: int) -> DataLoader[Any]:
    """Random images with labels."""
    return DataLoader(TensorDataset(torch.randn(samples, 3, 32, 32), torch.randint(0, 10, (samples,))), batch)


def idle_cost(rounds: int) -> dict[str, Any]:
    """An epoch of training with the callback attached but idle, over one without it."""

    def epochs(callbacks: list[Any], folder: str) -> list[float]:
        model = Small()
        trainer = pl.Trainer(
            max_epochs=3,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            accelerator="cpu",
        )
        trainer.fit(model, loader(1024, 32), loader(64, 32))
        return model.seconds[1:]

    with tempfile.TemporaryDirectory() as folder:
        idle = [QuantDebug(monitor="val_loss", when="never", watch_every_n_epochs=1000, verbose=False)]
        ratios = []
        for _ in range(rounds):
            without, with_it, again = epochs([], folder), epochs(idle, folder), epochs([], folder)
            ratios.append(2 * sum(with_it) / (sum(without) + sum(again)))
    return {"ratio": [statistics.median(ratios), min(ratios), max(ratios)]}


def peak_memory(what: str, name: str, batch: int, size: int) -> float:
    """Peak resident memory of one child process, in MiB."""
    command = [sys.executable, __file__, "--child", what, name, "--batch", str(batch), "--size", str(size)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def child(what: str, name: str, batch: int, size: int) -> None:
    """Do one thing and print the peak resident memory."""
    model, x = NETWORKS[name](), batch_for(name, batch, size)
    if what == "train":
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            model.train()(x).square().mean().backward()
            optimizer.step()
    elif what == "walk":
        session = Instrumentation(model.eval(), QuantDebug(monitor="x").settings.target)
        session.record(lambda: model.forward(x), x)
        session.place()
        with torch.no_grad():
            with session.observing():
                session.run(lambda: model.forward(x))
            session.set_mode("quantize")
            session.run(lambda: model.forward(x))
    print(peak_resident_mib())


def peak_resident_mib() -> float:
    """Peak resident memory of this process alone; ``ru_maxrss`` would count the parent's until the child's exec."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return float(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def memory_costs(name: str, batch: int, size: int) -> dict[str, Any]:
    """Peak memory of recording, observing and the quantized forward, over that of an FP32 training step.

    What a process needs before it runs the network is taken off both.
    """
    idle, train, walk = (peak_memory(what, name, batch, size) for what in ("idle", "train", "walk"))
    return {"train_mib": train - idle, "walk_mib": walk - idle, "ratio": (walk - idle) / (train - idle)}


def main() -> None:
    """Measure, print, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=160, help="edge of the images; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    if arguments.child:
        child(*arguments.child, arguments.batch, arguments.size)
        return
    figures: dict[str, Any] = {"batch": arguments.batch, "size": arguments.size, "torch": torch.__version__}
    for name in arguments.networks:
        batch = batch_for(name, arguments.batch, arguments.size)
        torch.backends.mha.set_fastpath_enabled(False)
        figures[name] = {
            "forward": forward_costs(NETWORKS[name]().eval(), batch, arguments.rounds),
            "training": training_costs(NETWORKS[name]().eval(), batch, arguments.rounds),
            "memory": memory_costs(name, arguments.batch, arguments.size),
        }
        print(name, json.dumps(figures[name], indent=1), flush=True)
    figures["idle_callback"] = idle_cost(max(3, arguments.rounds // 2))
    print("idle callback", figures["idle_callback"])
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Quantization-aware training: what a step costs over FP32, what score it reaches, and what its settings are worth.

    python benchmarks/qat.py
    python benchmarks/qat.py --parts step --size 224 --rounds 7
    python benchmarks/qat.py --parts score choices --data path/to/cifar10_small.npz

Three parts, merged into one JSON; a part that is not run keeps its figures.

- ``step``: forward, loss, backward and SGD step with everything quantized (W8A8, weights per channel), over an FP32
  step of the same network whose batch normalizations train: what the step cost the user before. Ratios are medians of
  pairs run in turn, on one thread. Peak memory is that of child processes, less what an idle one needs.
- ``score``: a MobileNet-like network is trained in FP32 on the CIFAR-10 subset, in memory; the callback's QAT starts
  from there, once from the repaired model and once from the plain quantized one. Training longer would raise the FP32
  score as well, so that FP32 trained on for as many epochs at the same learning rate stands beside.
- ``choices``: the settings of QAT, one changed at a time, on one target.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from overhead import NETWORKS, batch_for, paired, peak_resident_mib
from remedies import table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from trained_networks import DATA, Images, MobileNet, load_images, moved, train

from lightning_quantdebug import Instrumentation, QuantDebug, instrument
from lightning_quantdebug.report import StepName

RESULTS = Path(__file__).parent / "results" / "qat.json"
PARTS = ("step", "score", "choices")
FORMS = ("straight_through", "learned")

TARGETS = ("w4a4_per_tensor", "w3a4_per_tensor")
CHOICES_TARGET = "w4a4_per_tensor"
# The cheap ones, and none that changes the target: more bits would be another comparison.
REPAIR = ("cle", "bias_correction", "range_setting")
# What the FP32 network was trained with; QAT starts at a share of it. SGD stands for optimizers whose steps have units.
RATES = {"adamw": 4e-3, "sgd": 0.1}
FACTORS = (0.03, 0.1, 0.3, 1.0)
CHOICES: dict[str, dict[str, Any]] = {
    **{f"lr_factor {factor}": {"qat_lr_factor": factor} for factor in FACTORS},
    **{f"lr_factor {factor}, SGD": {"qat_lr_factor": factor, "optimizer": "sgd"} for factor in FACTORS},
    **{f"freeze_batchnorm {share}": {"qat_freeze_batchnorm": share} for share in (0.0, 0.5, 1.0)},
    "freeze_batchnorm 1.0, no repair": {"qat_freeze_batchnorm": 1.0, "remedies": ()},
    "learn_scales False": {"qat_learn_scales": False},
    "distillation 1": {"qat_distillation": 1.0},
}


# Speed.


def norms_of(model: nn.Module) -> list[nn.Module]:
    """The batch normalizations of a network."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def prepared(name: str, x: Tensor) -> nn.Module:
    """A network whose batch normalizations know the statistics of ``x``, so that values are of a usual size."""
    torch.manual_seed(0)
    model = NETWORKS[name]()
    for module in norms_of(model):
        module.momentum = None  # torch: a plain mean over all batches
    with torch.no_grad():
        model.train()(x)
    for module in norms_of(model):
        module.momentum = 0.1
    return model.eval()


@contextmanager
def quantized(model: nn.Module, x: Tensor, learned: bool) -> Iterator[list[nn.Parameter]]:
    """The network with all quantizers on, and what is trained of their scales."""
    with instrument(model, x, "int8") as session:
        session.calibrate([x])
        session.set_mode("quantize")
        yield ratios_of(session) if learned else []


def ratios_of(session: Instrumentation) -> list[nn.Parameter]:
    """Train the scale of every quantizer that has one of its own."""
    return [quantizer.learn().ratio for quantizer in session.quantizers.values() if quantizer.is_learnable]


def stepper(model: nn.Module, x: Tensor, y: Tensor, ratios: list[nn.Parameter] | None = None) -> Callable[[bool], None]:
    """One training step; its argument says whether batch normalizations are frozen."""
    groups: list[dict[str, Any]] = [{"params": list(model.parameters())}]
    if ratios:
        groups.append({"params": ratios, "weight_decay": 0.0})
    optimizer = torch.optim.SGD(groups, lr=1e-6, momentum=0.9)
    norms = norms_of(model)

    def step(frozen: bool) -> None:
        model.train()
        for module in norms:
            module.train(not frozen)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


def step_costs(name: str, batch: int, size: int, rounds: int) -> dict[str, Any]:
    """Each form of a step over an FP32 step with batch normalizations that train."""
    x, y = batch_for(name, batch, size), torch.arange(batch) % 10
    model = prepared(name, x)
    fp32, straight, learned = model, copy.deepcopy(model), copy.deepcopy(model)
    with quantized(straight, x, False) as none, quantized(learned, x, True) as ratios:
        steps = {"fp32": stepper(fp32, x, y), "straight_through": stepper(straight, x, y, none)}
        steps["learned"] = stepper(learned, x, y, ratios)
        others: dict[str, Callable[[], None]] = {
            f"{form}, norms train": (lambda f=form: steps[f](False)) for form in FORMS
        }
        if norms_of(model):
            others |= {f"{form}, norms frozen": (lambda f=form: steps[f](True)) for form in ("fp32", *FORMS)}
        found = paired(lambda: steps["fp32"](False), others, rounds)
        return {**found, "learned_scales": len(ratios)}


def step_memory(name: str, batch: int, size: int) -> dict[str, float]:
    """Peak memory of a step over that of an FP32 step, batch normalizations training; taken off: that of no step."""

    def peak(form: str) -> float:
        command = [sys.executable, __file__, "--child", form, name, "--batch", str(batch), "--size", str(size)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])

    idle, fp32 = peak("idle"), peak("fp32")
    return {"fp32_mib": fp32 - idle, **{form: (peak(form) - idle) / (fp32 - idle) for form in FORMS}}


def child(form: str, name: str, batch: int, size: int) -> None:
    """Two steps of one form, and the peak resident memory."""
    x, y = batch_for(name, batch, size), torch.arange(batch) % 10
    model = NETWORKS[name]()
    if form == "fp32":
        step = stepper(model, x, y)
        for _ in range(2):
            step(False)
    elif form in FORMS:
        # Recording and calibrating need less than training, and on a part of the batch nearly nothing.
        with quantized(model.eval(), x[:2], form == "learned") as ratios:
            step = stepper(model, x, y, ratios)
            for _ in range(2):
                step(False)
    print(peak_resident_mib())


def step_part(batch: int, size: int, rounds: int, names: list[str]) -> dict[str, Any]:
    """All networks."""
    torch.backends.mha.set_fastpath_enabled(False)
    figures: dict[str, Any] = {"batch": batch, "size": size, "rounds": rounds}
    rows = []
    for name in names:
        figures[name] = step_costs(name, batch, size, rounds)
        figures[name]["memory"] = step_memory(name, batch, size)
        for form, (median, low, high) in figures[name]["ratios"].items():
            memory = figures[name]["memory"].get(form.removesuffix(", norms train"))
            seen = "" if memory is None else f"{memory:.2f}"
            rows.append([name, form, f"{median:.2f}", f"{low:.2f} to {high:.2f}", seen])
            print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    print(f"\nTraining step over FP32, batch {batch}, images of {size} pixels\n")
    print(table(["network", "form", "time", "range", "peak memory"], rows))
    return figures


# Quality.


class Classifier(pl.LightningModule):
    """The network with training and validation as users write them."""

    def __init__(self, net: nn.Module, optimizer: str = "adamw", rate: float | None = None) -> None:
        super().__init__()
        self.net = net
        self.optimizer = optimizer
        self.rate = RATES[optimizer] if rate is None else rate

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self(moved(batch[0])), batch[1])

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        logits = self(batch[0])
        self.log("loss", F.cross_entropy(logits, batch[1]))
        self.log("accuracy", (logits.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.optimizer == "sgd":
            return torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.9, weight_decay=5e-4)
        return torch.optim.AdamW(self.parameters(), lr=self.rate, weight_decay=1e-2)


class Decaying(Classifier):
    """As QAT trains: from ``rate`` to 0 along half a cosine."""

    def configure_optimizers(self) -> Any:
        optimizer, total = super().configure_optimizers(), self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / total)) / 2)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Epochs(pl.Callback):
    """Notes the losses and accuracies of Lightning's own validations, the sanity check's aside."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.accuracies: list[float] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.losses.append(float(trainer.callback_metrics["loss"]))
            self.accuracies.append(float(trainer.callback_metrics["accuracy"]))


def fit(module: Classifier, images: Images, seed: int, epochs: int, callbacks: list[pl.Callback], folder: str) -> None:
    """One fit on the images; batches are drawn in an order that the seed fixes."""
    pl.seed_everything(seed, verbose=False)
    training = TensorDataset(images.x_train, images.y_train)
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        accelerator="cpu",
    )
    loaders = DataLoader(training, 64, shuffle=True), DataLoader(TensorDataset(images.x_test, images.y_test), 250)
    trainer.fit(module, *loaders)


def qat(
    net: nn.Module,
    images: Images,
    target: str,
    epochs: int,
    seed: int = 0,
    optimizer: str = "adamw",
    remedies: tuple[str, ...] = REPAIR,
    **settings: Any,
) -> dict[str, Any]:
    """QAT of a copy of a trained network: the scores before it, after each epoch, and of the weights that it kept."""
    started, seen = time.perf_counter(), Epochs()
    with tempfile.TemporaryDirectory() as folder:
        callback = QuantDebug(
            monitor="accuracy",
            mode="max",
            tolerance=0.0,
            target=target,
            remedies=remedies,
            analysis="estimate",
            qat_epochs=epochs,
            qat_early_stop=False,
            dirpath=folder,
            on_error="raise",
            verbose=False,
            **settings,
        )
        fit(Classifier(copy.deepcopy(net).train(), optimizer), images, seed, 0, [callback, seen], folder)
    report = callback.report
    assert report is not None
    weights, training = report.step(StepName.WEIGHTS), report.step(StepName.QAT)
    assert weights is not None
    assert training is not None
    if "scores" not in training.details:
        raise SystemExit(f"No QAT at {target}: {training.advice}")
    details = training.details
    return {
        "quantized": weights.details["both"]["score"],
        "repaired": details["start_score"],
        "kept_remedies": [remedy.title for remedy in report.remedies if remedy.kept],
        "epochs": details["scores"],
        "losses": seen.losses,
        "best_epoch": details["best_epoch"],
        "final": training.score,
        "learning_rate": details["learning_rate"],
        "learned_scales": details["learned_scales"],
        "notes": [*details["notes"], *([details["stopped"]] if details["stopped"] else [])],
        "qat_seconds": round(training.seconds, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }


def longer(net: nn.Module, images: Images, epochs: int, optimizer: str, factor: float, seed: int = 0) -> dict[str, Any]:
    """The same training without quantizers."""
    seen = Epochs()
    with tempfile.TemporaryDirectory() as folder:
        module = Decaying(copy.deepcopy(net).train(), optimizer, factor * RATES[optimizer])
        fit(module, images, seed, epochs, [seen], folder)
    return {"epochs": seen.accuracies, "losses": seen.losses}


def percent(value: float | None) -> str:
    """A share in percent."""
    return "-" if value is None else f"{100 * value:.2f}"


def mean(runs: list[dict[str, Any]], key: str) -> float:
    """The mean of a number over the seeds."""
    return sum(run[key] for run in runs) / len(runs)


def means(runs: list[dict[str, Any]], key: str) -> list[float]:
    """The mean of each number of a list over the seeds; a run that ended early counts where it has one."""
    longest = max(len(run[key]) for run in runs)
    columns = [[run[key][index] for run in runs if index < len(run[key])] for index in range(longest)]
    return [sum(column) / len(column) for column in columns]


def row(name: str, runs: list[dict[str, Any]]) -> list[str]:
    """Scores in percent, then the losses."""
    start = [percent(mean(runs, key)) if key in runs[0] else "-" for key in ("quantized", "repaired")]
    final = percent(mean(runs, "final")) if "final" in runs[0] else "-"
    scores = " ".join(map(percent, means(runs, "epochs")))
    return [name, *start, scores, final, " ".join(f"{loss:.3f}" for loss in means(runs, "losses"))]


_HEADER = ["", "quantized", "repaired", "by epoch", "kept", "test loss by epoch"]


def score_part(net: MobileNet, images: Images, epochs: int, seeds: int) -> dict[str, Any]:
    """Repair first against plain QAT, on each target."""
    factor = QuantDebug(monitor="accuracy").settings.qat_lr_factor
    controls = [longer(net, images, epochs, "adamw", factor, seed) for seed in range(seeds)]
    figures: dict[str, Any] = {"qat_epochs": epochs, "remedies": REPAIR, "fp32 trained on": controls}
    rows = [row("FP32 trained on", controls)]
    for target in TARGETS:
        figures[target] = {}
        for name, remedies in (("repair first", REPAIR), ("no repair", ())):
            runs = [qat(net, images, target, epochs, seed, remedies=remedies) for seed in range(seeds)]
            figures[target][name] = runs
            rows.append(row(f"{target}, {name}", runs))
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    print(f"\nAccuracy in percent, {epochs} QAT epochs, mean of {seeds} seeds\n")
    print(table(_HEADER, rows))
    return figures


def choices_part(net: MobileNet, images: Images, epochs: int, seeds: int, names: list[str]) -> dict[str, Any]:
    """One setting changed at a time."""
    figures: dict[str, Any] = {"target": CHOICES_TARGET, "qat_epochs": epochs, "rates": RATES, "fp32 trained on": {}}
    known: dict[str, list[dict[str, Any]]] = {}
    rows = []
    for name in names:
        settings = CHOICES[name]
        used = json.dumps({"qat_lr_factor": 0.1, "qat_freeze_batchnorm": 0.0, **settings}, sort_keys=True)
        if used not in known:
            known[used] = [qat(net, images, CHOICES_TARGET, epochs, seed, **settings) for seed in range(seeds)]
        figures[name] = known[used]
        rows.append(row(name, known[used]))
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    for factor in FACTORS:
        runs = [longer(net, images, epochs, "adamw", factor, seed) for seed in range(seeds)]
        figures["fp32 trained on"][f"lr_factor {factor}"] = runs
        rows.append(row(f"FP32 trained on, lr_factor {factor}", runs))
        print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    print(f"\nAccuracy in percent, {CHOICES_TARGET}, {epochs} QAT epochs, mean of {seeds} seeds\n")
    print(table(_HEADER, rows))
    return figures


def trained(images: Images, epochs: int) -> tuple[MobileNet, dict[str, Any]]:
    """The FP32 network, and how good it is on the test images."""
    started = time.perf_counter()
    net = train(images, epochs)
    with torch.no_grad():
        logits = torch.cat([net(part) for part in images.x_test.split(250)])
    figures = {
        "epochs": epochs,
        "seconds": round(time.perf_counter() - started, 1),
        "accuracy": float((logits.argmax(1) == images.y_test).float().mean()),
        "loss": float(F.cross_entropy(logits, images.y_test)),
    }
    print(
        f"\nFP32 after {epochs} epochs: {percent(figures['accuracy'])} %, test loss {figures['loss']:.3f}", flush=True
    )
    return net, figures


def keep(path: Path, figures: Mapping[str, Any]) -> None:
    """Write the parts that were run beside those that the file has."""
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**before, **figures}, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Measure, print, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--networks", nargs="+", choices=tuple(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--choices", nargs="+", choices=tuple(CHOICES), default=list(CHOICES))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--size", type=int, default=128, help="edge of the images of `step`; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=DATA, help="the .npz with the images; default: %(default)s")
    parser.add_argument("--epochs", type=int, default=10, help="of FP32; default: %(default)s")
    parser.add_argument("--qat-epochs", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=1, help="repetitions of each QAT; default: %(default)s")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where figures are kept; default: %(default)s")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.INFO)
    if arguments.child:
        child(*arguments.child, arguments.batch, arguments.size)
        return
    environment = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    if "step" in arguments.parts:
        figures = step_part(arguments.batch, arguments.size, arguments.rounds, arguments.networks)
        keep(arguments.json, {"environment": environment, "step": figures})
    if set(arguments.parts) <= {"step"}:
        return
    if not arguments.data.is_file():
        print(f"Skipped: there are no images at {arguments.data}. Give the CIFAR-10 subset with --data.")
        return
    images = load_images(arguments.data)
    net, fp32 = trained(images, arguments.epochs)
    keep(arguments.json, {"environment": environment, "fp32": fp32})
    if "score" in arguments.parts:
        keep(arguments.json, {"score": score_part(net, images, arguments.qat_epochs, arguments.seeds)})
    if "choices" in arguments.parts:
        found = choices_part(net, images, arguments.qat_epochs, arguments.seeds, arguments.choices)
        keep(arguments.json, {"choices": found})


if __name__ == "__main__":
    main()

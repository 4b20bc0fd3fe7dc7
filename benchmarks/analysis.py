"""What the per-quantizer analysis costs, in FP32 evaluations of one run, and how well the estimate ranks.

    python benchmarks/analysis.py --json benchmarks/results/analysis.json

Everything goes through a Lightning Trainer's validation, as in a walk. The naive table switches one quantizer on and
runs the validation in full; of large networks every few quantizers are measured and the rest is extrapolated, which the
output says. Times are wall times of one thread; FP32 is run before and after and the mean is taken.

Ranking quality is measured on a network trained on the CIFAR-10 subset (two minutes). If `aimet-torch` is installed,
its QuantAnalyzer is run beside on the same network and data; it is never needed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from networks import MobileNetV2, ResNet18, TransformerClassifier, images
from overhead import peak_resident_mib
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from trained_networks import load_images, train

from lightning_quantdebug import instrument
from lightning_quantdebug.analysis_store import AnalysisStore
from lightning_quantdebug.calibration import capture, set_ranges
from lightning_quantdebug.estimate import Estimator
from lightning_quantdebug.evaluation import Evaluator
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.output_meter import OutputMeter
from lightning_quantdebug.quantizer_analysis import estimated
from lightning_quantdebug.replay import Memo
from lightning_quantdebug.sensitivity import Bench, Sensitivities, Table
from lightning_quantdebug.settings import make_settings
from lightning_quantdebug.target import Mode

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v2": MobileNetV2,
    "resnet18": ResNet18,
    "transformer_encoder": TransformerClassifier,
}


class Judged(pl.LightningModule):
    """A classifier with a validation as users write it."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        logits = self.net(batch[0])
        loss = F.cross_entropy(logits, batch[1])
        self.log("loss", loss)
        self.log("acc", (logits.argmax(1) == batch[1]).float().mean())
        return loss


def in_validation(net: nn.Module, x: Tensor, y: Tensor, batch: int, action: Callable[[Any, Any], Any]) -> Any:
    """What ``action(trainer, module)`` returns at the end of a validation."""
    results: list[Any] = []

    class Act(pl.Callback):
        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            results.append(action(trainer, pl_module))

    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            callbacks=[Act()],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            accelerator="cpu",
        )
        trainer.validate(Judged(net), DataLoader(TensorDataset(x, y), batch), verbose=False)
    return results[0]


def benched(trainer: Any, module: Any, target: str, analysis: str) -> tuple[Bench, list[str]]:
    """A calibrated session with everything that the analysis works on."""
    settings = make_settings(monitor="acc", mode="max", target=target, calibration="val", analysis=analysis)
    evaluator = Evaluator(trainer, module, "acc")
    session = Instrumentation(module, settings.target)
    capture(session, evaluator, None, 1)
    set_ranges(session, evaluator, None, 4)
    bench = Bench(session, evaluator, settings, evaluator.run(), AnalysisStore(None, ""))
    return bench, [name for name, quantizer in session.quantizers.items() if quantizer.is_calibrated]


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Wall time of one call, and what it returned."""
    started = time.perf_counter()
    result = run()
    return time.perf_counter() - started, result


def costs(net: nn.Module, x: Tensor, y: Tensor, batch: int, every: int, target: str = "int8") -> dict[str, Any]:
    """FP32 evaluation, naive table, exact table, estimate and race, the latter ones in FP32 evaluations."""

    def action(trainer: Any, module: Any) -> dict[str, Any]:
        bench, names = benched(trainer, module, target, "exhaustive")
        evaluator, session = bench.evaluator, bench.session
        before, _ = seconds(evaluator.run)
        some = names[::every]

        def naive() -> None:
            for name in some:
                with session.modes(Mode.BYPASS):
                    session.quantizers[name].mode = Mode.QUANTIZE
                    evaluator.run_unchecked(session.around_step)

        of_naive, _ = seconds(naive)
        of_exact, _ = seconds(lambda: Sensitivities(bench, names).exhaust())
        of_estimate, (found, why_not) = seconds(lambda: estimated(bench))
        after, _ = seconds(evaluator.run)
        fp32 = (before + after) / 2
        count = len(names)
        estimate_samples = max((one.samples for one in found.values()), default=0)
        return {
            "quantizers": count,
            "samples": len(y),
            "batch": batch,
            "fp32_seconds": fp32,
            "naive_evaluations": of_naive / len(some) * count / fp32,
            "naive_measured_of_quantizers": len(some),
            "exact_evaluations": of_exact / fp32,
            "naive_over_exact": of_naive / len(some) * count / of_exact,
            "exact_evaluations_per_quantizer": of_exact / fp32 / count,
            "estimate_samples": estimate_samples,
            "estimate_of_128_over_fp32_of_1000": of_estimate * 128 / estimate_samples / (fp32 * 1000 / len(y)),
            "no_estimate": why_not,
        }

    result: dict[str, Any] = in_validation(net, x, y, batch, action)
    return result


def races(net: nn.Module, x: Tensor, y: Tensor, batch: int) -> dict[str, Any]:
    """Racing against the whole exact table where there are many batches and many quantizers."""

    def action(trainer: Any, module: Any) -> dict[str, Any]:
        bench, names = benched(trainer, module, "int8", "exhaustive")
        fp32, _ = seconds(bench.evaluator.run)
        of_exact, exact = seconds(lambda: Sensitivities(bench, names).exhaust())
        bench.store = AnalysisStore(None, "")
        of_race, raced = seconds(lambda: Sensitivities(bench, names).race())
        return {
            "quantizers": len(names),
            "samples": len(y),
            "fp32_seconds": fp32,
            "exact_evaluations": of_exact / fp32,
            "race_evaluations": of_race / fp32,
            "race_measured_in_full": sum(one.whole for one in raced.alone.values()),
            "exact_top_10_in_raced_top_10": len(set(list(exact.alone)[:10]) & set(list(raced.alone)[:10])),
        }

    result: dict[str, Any] = in_validation(net, x, y, batch, action)
    return result


def spearman(some: list[float], others: list[float]) -> float:
    """Rank correlation."""
    ranks = [np.argsort(np.argsort(values)) for values in (some, others)]
    return float(np.corrcoef(*ranks)[0, 1])


def ranking(net: nn.Module, x: Tensor, y: Tensor, target: str) -> dict[str, Any]:
    """How the estimate on 128 samples orders the quantizers against the exact table on all samples."""

    def action(trainer: Any, module: Any) -> dict[str, Any]:
        bench, names = benched(trainer, module, target, "exhaustive")
        exact: Table = Sensitivities(bench, names).exhaust()
        found, _ = estimated(bench)
        names = [name for name in names if exact.alone[name].damage > 0]
        noise = [(found[name].noise, 10 ** (-exact.alone[name].sqnr_db / 10)) for name in names]
        kl = [(found[name].kl or 0.0, exact.alone[name].kl or 0.0) for name in names]
        worst = sorted(names, key=lambda name: -(exact.alone[name].kl or 0.0))[:5]
        estimated_worst = sorted(names, key=lambda name: -(found[name].kl or 0.0))[:10]
        bench.store = AnalysisStore(None, "")
        raced = Sensitivities(bench, sorted(names, key=lambda name: -(found[name].kl or 0.0))).race()
        return {
            "quantizers": len(names),
            "samples": len(y),
            "score": bench.reference.score,
            "spearman_noise": spearman(*map(list, zip(*noise, strict=True))),
            "spearman_kl": spearman(*map(list, zip(*kl, strict=True))),
            "exact_top_5_in_estimated_top_10": len(set(worst) & set(estimated_worst)),
            "exact_top_10_in_raced_top_10": len(set(list(exact.alone)[:10]) & set(list(raced.alone)[:10])),
            "race_measured_in_full": sum(one.whole for one in raced.alone.values()),
            "guilty_without_permission": len(exact.guilty(0.01 * bench.reference.score)),
        }

    result: dict[str, Any] = in_validation(net, x, y, 50, action)
    return result


def batch_for(name: str, batch: int, size: int) -> Tensor:
    """A batch of images, or of vectors for the transformer."""
    if name == "transformer_encoder":
        return torch.randn(batch, 32, 256, generator=torch.Generator().manual_seed(0))
    return images(batch, size)


def child(what: str, name: str, batch: int, size: int) -> None:
    """Do one thing and print the peak resident memory."""
    model, x = NETWORKS[name](), batch_for(name, batch, size)
    if what == "train":
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for _ in range(2):
            optimizer.zero_grad()
            model.train()(x).square().mean().backward()
            optimizer.step()
    elif what in ("replay", "estimate"):
        with instrument(model.eval(), x, "int8") as session:
            with torch.no_grad():
                session.calibrate([x])
            session.set_mode("bypass")
            if what == "estimate":
                Estimator(session).observe(lambda: model(x))
            else:
                replay_all(session, model, x)
    print(peak_resident_mib())


@torch.no_grad()
def replay_all(session: Instrumentation, model: nn.Module, x: Tensor) -> None:
    """One batch of the exact table."""
    memo, meter = Memo(), OutputMeter(session)
    with session.memoized(memo, record=True):
        meter.reference(lambda: model(x))
    for name in list(session.quantizers)[::10]:
        with session.modes(Mode.BYPASS), session.memoized(memo):
            session.quantizers[name].mode = Mode.QUANTIZE
            meter.compare(lambda: model(x))


def memory(name: str, batch: int, size: int) -> dict[str, float]:
    """Peak memory of both ways over that of an FP32 training step, less what a process needs anyway."""

    def peak(what: str) -> float:
        command = [sys.executable, __file__, "--child", what, name, "--batch", str(batch), "--size", str(size)]
        return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])

    idle, training, replay, gradients = (peak(what) for what in ("idle", "train", "replay", "estimate"))
    return {
        "training_mib": training - idle,
        "exact_table": (replay - idle) / (training - idle),
        "estimate": (gradients - idle) / (training - idle),
    }


def aimet(net: nn.Module, x: Tensor, y: Tensor, batch: int) -> dict[str, Any] | str:
    """Seconds of AIMET's QuantAnalyzer on the same network and data, if it is there."""
    if importlib.util.find_spec("aimet_torch") is None:
        return "aimet-torch is not installed: skipped"
    from aimet_common.utils import CallbackFunc
    from aimet_torch.quant_analyzer import QuantAnalyzer

    loader = DataLoader(TensorDataset(x, y), batch)

    def evaluate(model: nn.Module, _: Any) -> float:
        with torch.no_grad():
            right = [(model(part).argmax(1) == labels).float().sum() for part, labels in loader]
        return float(sum(right)) / len(y)

    def forward(model: nn.Module, _: Any) -> None:
        evaluate(model, None)

    fp32, _ = seconds(lambda: evaluate(net, None))
    analyzer = QuantAnalyzer(net, x[:1], CallbackFunc(forward, None), CallbackFunc(evaluate, None))
    with tempfile.TemporaryDirectory() as folder:
        spent, _ = seconds(lambda: analyzer.analyze(results_dir=folder))
    return {"seconds": spent, "fp32_evaluations": spent / fp32}


def main() -> None:
    """Measure, print, and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--size", type=int, default=160, help="edge of the images; default: %(default)s")
    parser.add_argument("--every", type=int, default=8, help="naive: measure every so many quantizers")
    parser.add_argument("--networks", nargs="*", choices=tuple(NETWORKS), default=list(NETWORKS))
    parser.add_argument("--without-ranking", action="store_true", help="skip the trained network")
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
    torch.backends.mha.set_fastpath_enabled(False)
    figures: dict[str, Any] = {"size": arguments.size, "torch": torch.__version__}
    for name in arguments.networks:
        samples = arguments.batch * arguments.batches
        x, y = batch_for(name, samples, arguments.size), torch.randint(0, 10, (samples,))
        figures[name] = costs(NETWORKS[name]().eval(), x, y, arguments.batch, arguments.every)
        figures[name]["memory"] = memory(name, arguments.batch, arguments.size)
        print(name, json.dumps(figures[name], indent=1), flush=True)
    figures["mobilenet_v2 race"] = races(MobileNetV2().eval(), images(512, 96), torch.randint(0, 10, (512,)), 16)
    print("mobilenet_v2 race", json.dumps(figures["mobilenet_v2 race"], indent=1), flush=True)
    if not arguments.without_ranking:
        data = load_images()
        net = train(data)
        figures["cifar10 race"] = races(net, data.x_test, data.y_test, 25)
        figures["cifar10"] = costs(net, data.x_test[:1000], data.y_test[:1000], 50, 1)
        print("cifar10", json.dumps(figures["cifar10"], indent=1), flush=True)
        for target in ("int8", "int8_per_tensor", "w4a4", "w4a4_per_tensor"):
            figures[f"ranking {target}"] = ranking(net, data.x_test[:1000], data.y_test[:1000], target)
            print("ranking", target, json.dumps(figures[f"ranking {target}"], indent=1), flush=True)
        figures["aimet"] = aimet(net, data.x_test[:1000], data.y_test[:1000], 50)
        print("aimet", figures["aimet"])
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

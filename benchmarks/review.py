"""What a review costs: seconds for all pictures and pages of a walk, and how many entries TensorBoard gets.

    python benchmarks/review.py --json benchmarks/results/review.json

The walk is one on MobileNetV2 (random weights, 4 bits for weights and activations per tensor, so that tensors are to
blame and every picture is drawn). What is measured is writing alone, after the walk: AIMET's QuantAnalyzer writes
18,056 HTML files for the same network, in about 35 minutes.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from analysis import Judged
from networks import MobileNetV2, TransformerClassifier, images
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, TensorDataset

from lightning_quantdebug import QuantDebug
from lightning_quantdebug.report import Report
from lightning_quantdebug.report_pages import write_pages
from lightning_quantdebug.tensorboard import ReviewWriter

NETWORKS: dict[str, Callable[[], torch.nn.Module]] = {
    "mobilenet_v2": MobileNetV2,
    "transformer_encoder": TransformerClassifier,
}


def walk(net: torch.nn.Module, size: int, samples: int) -> tuple[Report, float]:
    """The report of a walk, and its seconds."""
    x = torch.randn(samples, 64, 256) if isinstance(net, TransformerClassifier) else images(samples, size)
    with torch.no_grad():
        y = net.eval()(x).argmax(1)
    loader = DataLoader(TensorDataset(x, y), batch_size=16)
    callback = QuantDebug(
        "acc", mode="max", target="w4a4_per_tensor", calibration="val", remedies=(), verbose=False, on_error="raise"
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            accelerator="cpu",
            logger=False,
            default_root_dir=folder,
            callbacks=[callback],
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        started = time.perf_counter()
        trainer.validate(Judged(net), loader, verbose=False)
        seconds = time.perf_counter() - started
    assert callback.report is not None
    return callback.report, seconds


def written(report: Report) -> dict[str, Any]:
    """Seconds, entries and bytes of what is written of a report."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        with ReviewWriter(None, folder) as writer:
            writer.write_report(report, step=0)
        tensorboard = time.perf_counter() - started
        started = time.perf_counter()
        pages = write_pages(report, folder)
        of_pages = time.perf_counter() - started
        accumulator = EventAccumulator(folder, size_guidance=dict.fromkeys(("images", "scalars", "tensors"), 0))
        accumulator.Reload()
        tags = accumulator.Tags()
        return {
            "tensorboard_seconds": round(tensorboard, 2),
            "pages_seconds": round(of_pages, 2),
            "pictures": len(tags["images"]),
            "tags": sum(len(tags[kind]) for kind in ("images", "scalars", "tensors", "histograms")),
            "event_megabytes": round(sum(f.stat().st_size for f in Path(folder).glob("events*")) / 1e6, 2),
            "report_json_kilobytes": round(len(json.dumps(report.to_dict())) / 1e3),
            "page_megabytes": round(Path(pages["report.html"]).stat().st_size / 1e6, 2),
        }


def main() -> None:
    """Walk, write, and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=96, help="height and width of the images; default: %(default)s")
    parser.add_argument("--samples", type=int, default=64, help="validation samples; default: %(default)s")
    parser.add_argument("--json", type=Path, help="where to write what was measured")
    arguments = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    found: dict[str, Any] = {"torch": torch.__version__, "size": arguments.size, "samples": arguments.samples}
    for name, make in NETWORKS.items():
        torch.manual_seed(0)
        report, seconds = walk(make(), arguments.size, arguments.samples)
        found[name] = {
            "quantizers": len(report.final.settings),
            "tensors_shown": len(report.visuals.tensors),
            "walk_seconds": round(seconds, 1),
            **written(report),
        }
        print(name, found[name], flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Make the pictures of the README: a network that does not survive 4 bits, as a review shows it.

    python examples/review_pictures.py --output docs/pictures

Any report can be drawn so: `python -m lightning_quantdebug report DIR --pictures`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import pytorch_lightning as pl
from quickstart import Classifier, digits
from torch.utils.data import DataLoader

from lightning_quantdebug import QuantDebug
from lightning_quantdebug.figure_style import png
from lightning_quantdebug.figures import overview
from lightning_quantdebug.report import Report
from lightning_quantdebug.tensor_figures import of_tensor
from lightning_quantdebug.visuals import TensorView

OVERVIEW = ("flow_chart", "waterfall")


def walked(epochs: int) -> Report:
    """The report of a walk on the quickstart's network at 3-bit weights and 4-bit activations, without any training."""
    pl.seed_everything(0, verbose=False)
    train, validation = digits()
    debug = QuantDebug(monitor="val_acc", mode="max", tolerance="1%", target="w3a4_per_tensor", qat_epochs=0)
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            default_root_dir=folder,
            callbacks=[debug],
            enable_checkpointing=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(channels=1), DataLoader(train, 32, shuffle=True), DataLoader(validation, 100))
    if debug.report is None:
        raise SystemExit("The walk has failed; see the warning above.")
    return debug.report


def gain(view: TensorView) -> float:
    """What a tensor has gained on the way, in dB."""
    first, last = view.states[0].sqnr_db, view.states[-1].sqnr_db
    return 0.0 if first is None or last is None else last - first


def main() -> None:
    """Walk, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/pictures"), help="default: %(default)s")
    parser.add_argument("--epochs", type=int, default=20, help="default: %(default)s")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    report = walked(arguments.epochs)
    figures = overview(report)
    drawn = {name: figures[name] for name in OVERVIEW}
    if report.visuals.tensors:
        drawn["tensor"] = of_tensor(max(report.visuals.tensors, key=gain))["channel_ranges"]
    for name, figure in drawn.items():
        path = arguments.output / f"{name}.png"
        path.write_bytes(png(figure))
        print(path)


if __name__ == "__main__":
    main()

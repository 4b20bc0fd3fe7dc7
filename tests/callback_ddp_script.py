"""Run by ``test_callback_ddp`` in each of two processes: fits with and without the callback, results in files."""

from __future__ import annotations

import json
import os
import sys
import warnings
from typing import Any

from lightning_quantdebug import QuantDebug
from lightning_quantdebug.analysis_store import AnalysisStore
from lightning_quantdebug.sensitivity import Bench, Sensitivities
from lightning_quantdebug.settings import make_settings
from lightning_quantdebug.target import Mode
from tests.analyses import captured
from tests.callback_runs import random_states, weights
from tests.torture import calling, lightning, loader, simple_class, trainer

warnings.filterwarnings("ignore")
STRATEGIES = {"spawn": "ddp_spawn"}
# Two bits lose so much that every remedy of both boxes is tried, and a group is too fine for so small a network.
REPAIRABLE = {"weights": {"bit_width": 2, "granularity": "per_tensor"}, "activations": {"bit_width": 2}}


class Module(simple_class()):  # type: ignore[misc] # the base is made at run time
    fails = False

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        if self.fails and self.global_rank == 1 and "validation_step" in vars(self):
            raise ZeroDivisionError("only here")
        return super().validation_step(batch, batch_idx)


def callbacks(root: str, kind: str) -> list[QuantDebug]:
    """What the run is to show."""
    settings: dict[str, Any] = {
        "monitor": "loss",
        "target": "w3a4_per_tensor",
        "dirpath": f"{root}/quantdebug",
        "qat_epochs": 0,
    }
    if kind == "plain":
        return []
    if kind in ("walk", "spawn"):
        return [QuantDebug(on_error="raise", watch_every_n_epochs=1, **settings)]
    if kind == "repair":
        return [QuantDebug(on_error="raise", verbose=False, **{**settings, "target": REPAIRABLE, "tolerance": 0.0})]
    if kind == "analysis":
        return [QuantDebug(on_error="raise", verbose=False, analysis="exhaustive", reverse_analysis=True, **settings)]
    if kind == "late":
        return [QuantDebug(on_error="raise", max_time={"milliseconds": 50}, **settings)]
    if kind == "unwritable":
        return [QuantDebug(**{**settings, "dirpath": "/dev/null/below"})]
    return [QuantDebug(on_error="warn", verbose=False, **settings)]


def table(running: Any, module: Any) -> dict[str, Any]:
    """Every quantizer alone, side by side and in a validation of its own."""
    settings = make_settings(monitor="loss", target="w3a4_per_tensor", calibration="val")
    session, evaluator, reference = captured(running, module, settings)
    names = [name for name, quantizer in session.quantizers.items() if quantizer.is_calibrated]
    found = Sensitivities(Bench(session, evaluator, settings, reference, AnalysisStore(None, "")), names).exhaust()
    scores = {}
    for name in names:
        with session.modes(Mode.BYPASS):
            session.quantizers[name].mode = Mode.QUANTIZE
            scores[name] = [found.alone[name].score, evaluator.run(session.around_step).score, found.alone[name].kl]
    return scores


def main(root: str, kind: str) -> None:
    """One fit; ``kind`` is also the name of its folder."""
    root = f"{root}/{kind}"
    os.makedirs(root, exist_ok=True)
    lightning().seed_everything(3)
    module = Module()
    module.fails = kind == "fails"
    given = callbacks(root, kind)
    alone: dict[str, Any] = {}
    others = (
        [calling(on_fit_end=lambda running, module: alone.update(table(running, module)))] if kind == "analysis" else []
    )
    running = trainer(
        root,
        callbacks=[*given, *others],
        strategy=STRATEGIES.get(kind, "ddp"),
        devices=2,
        max_epochs=2,
        num_sanity_val_steps=0,
    )
    results: dict[str, Any] = {"alone": alone}
    try:
        running.fit(module, loader(shuffle=True), loader(31, 1))
    except (ZeroDivisionError, ValueError) as error:
        results["error"] = f"{type(error).__name__}: {error}"
    results["weights"] = weights(module)
    results["random"] = random_states()
    if given and given[0].report is not None:
        results["report"] = given[0].report.to_dict()
    with open(f"{root}/rank{running.global_rank}.json", "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    for word in sys.argv[2].split(","):
        main(sys.argv[1], word)

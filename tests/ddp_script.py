"""Run by ``test_evaluation_ddp`` in each of two processes: passes in several hooks, results in files."""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
import warnings
from typing import Any

import torch

from lightning_quantdebug.errors import EvaluationError
from lightning_quantdebug.evaluation import Evaluation, Evaluator
from tests.torture import calling, lightning, loader, simple_class, trainer

warnings.filterwarnings("ignore")


class Module(simple_class()):  # type: ignore[misc] # the base is made at run time
    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().validation_step(batch, batch_idx)
        self.log("synced", loss, sync_dist=True)
        if self.global_rank == 1:
            self.log("only_one", loss)
        return loss


def main(root: str, with_passes: bool) -> None:
    results: dict[str, Any] = {}
    places = itertools.count()

    def note(name: str, evaluation: Evaluation) -> None:
        batches = [(batch.value, batch.weight) for batch in evaluation.batches or ()]
        results[name] = (evaluation.score, batches, evaluation.samples, sorted(evaluation.metrics.items()))

    def hook(running: Any, pl_module: Any) -> None:
        where = f"place{next(places)}"
        for monitor in ("loss", "synced", "accuracy", "only_one"):
            note(f"{where} {monitor}", Evaluator(running, pl_module, monitor).run())
        results[f"{where} logged"] = {name: value.item() for name, value in running.callback_metrics.items()}
        note(f"{where} train", Evaluator(running, pl_module, "loss").run(loader="train", limit=1))
        note(f"{where} given", Evaluator(running, pl_module, "loss").run(loader=loader(24, 9)))
        try:
            Evaluator(running, pl_module, "unheard").run()
        except EvaluationError as error:
            results[f"{where} error"] = str(error)

    lightning().seed_everything(3)
    hooks = {"on_train_epoch_end": hook, "on_fit_start": hook, "on_fit_end": hook} if with_passes else {}
    settings: dict[str, Any] = {"strategy": "ddp", "devices": 2, "max_epochs": 2, "num_sanity_val_steps": 0}
    module = Module()
    running = trainer(root, callbacks=[calling(**hooks)], **settings)
    running.fit(module, loader(shuffle=True), loader(31, 1))
    content = [value.numpy(force=True).tobytes() for value in module.state_dict().values()]
    results["weights"] = hashlib.sha256(b"".join(content)).hexdigest()
    results["random"] = hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest()
    with open(f"{root}/rank{running.global_rank}.json", "w") as file:
        json.dump(results, file)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "passes")

"""Run by ``test_qat_ddp`` in each of two processes: fits with QAT epochs, results in files."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.utils.data import Sampler

from tests.callback_runs import weights
from tests.qat_runs import debugger, fit, learner_class, loader, model_checkpoint, qat_step, tensors

warnings.filterwarnings("ignore")
PER_RANK = 16


class Plain(learner_class()):  # type: ignore[misc] # the base is made at run time
    """Without batch statistics, which would be those of one rank's part of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 3))


class Unused(Plain):
    """One rank's batches take a branch that the other's do not."""

    def __init__(self) -> None:
        super().__init__()
        self.even, self.odd = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Any) -> Any:
        logits = self.net(x)
        branch = self.odd if self.training and self.global_rank == 1 else self.even
        return logits + 0.1 * branch(logits) + 0.0 * (self.odd(logits) + self.even(logits))


class Shared(Sampler[int]):
    """Every second sample for each of two processes, never shuffled, as Lightning would do with training data."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[int]:
        return iter(range(dist.get_rank() if self.ranks > 1 else 0, self.count, self.ranks))

    def __len__(self) -> int:
        return self.count // self.ranks

    @property
    def ranks(self) -> int:
        return dist.get_world_size() if dist.is_initialized() else 1


def run(root: Path, kind: str, devices: int) -> dict[str, Any]:
    """One fit: what it came to on this rank."""
    module = {"norms": learner_class(), "unused": Unused}.get(kind, Plain)
    callback = debugger(dirpath=str(root / "quantdebug"), qat_epochs=3, qat_lr_factor=0.5, qat_early_stop=False)
    batch = PER_RANK * (2 // devices)
    data = (
        loader(batch_size=batch, sampler=Shared(192)),
        loader(512, 1, batch_size=batch, sampler=Shared(512)),
    )
    settings: dict[str, Any] = {"strategy": "ddp", "use_distributed_sampler": False} if devices > 1 else {}
    settings |= {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2, "max_epochs": 5} if kind == "clipped" else {}
    others = [model_checkpoint(root, monitor="train_loss")]
    path = root.parent / "plain" / "saved" / "epoch=3.ckpt"
    running = fit(
        root,
        callback,
        module,
        others=others,
        data=data,
        devices=devices,
        num_sanity_val_steps=0,
        ckpt_path=str(path) if kind == "resumed" else None,
        **settings,
    )
    step = qat_step(callback)
    return {
        "hash": weights(running.lightning_module),
        "values": [value for tensor in tensors(running.lightning_module) for value in tensor.flatten().tolist()],
        "scales": [setting.scale for setting in callback.report.final.settings.values()],
        "scores": step.details["scores"],
        "score": step.score,
        "start": [callback.report.baseline.score, step.details["start_score"]],
        "best": step.details["best_epoch"],
        "verdict": callback.report.verdict.value,
        "rank": running.global_rank,
    }


def main(root: str, kind: str, devices: int) -> None:
    """One fit; ``kind`` is also the name of its folder."""
    place = Path(root) / kind
    os.makedirs(place, exist_ok=True)
    results = run(place, kind, devices)
    (place / f"rank{results['rank']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    for word in sys.argv[2].split(","):
        main(sys.argv[1], word, int(sys.argv[3]))

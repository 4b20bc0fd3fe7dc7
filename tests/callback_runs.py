"""Fits with and without the callback, and all that a callback could have changed in them."""

from __future__ import annotations

import csv
import hashlib
import importlib
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_quantdebug import QuantDebug
from tests.torture import lightning, loader, torture_class, trainer


def debugger(**settings: Any) -> QuantDebug:
    """A silent callback that fails loudly."""
    return QuantDebug(
        **{"monitor": "accuracy", "mode": "max", "verbose": False, "on_error": "raise", "qat_epochs": 0, **settings}
    )


def fit(
    root: Path,
    first: Sequence[Any] = (),
    last: Sequence[Any] = (),
    namespace: str = "pytorch_lightning",
    ckpt_path: str | None = None,
    **settings: Any,
) -> Any:
    """The Trainer after a fit with everything that reacts to validation."""
    callbacks = importlib.import_module(f"{namespace}.callbacks")
    loggers = importlib.import_module(f"{namespace}.loggers")
    lightning(namespace).seed_everything(3, verbose=False)
    module = torture_class(namespace)()
    own = [
        callbacks.ModelCheckpoint(monitor="accuracy", mode="max", save_top_k=-1, filename="{epoch}", save_last=True),
        callbacks.EarlyStopping("loss", patience=5),
    ]
    running = trainer(
        root,
        namespace,
        **{
            "callbacks": [*first, *own, *last],
            "logger": loggers.CSVLogger(root, name="csv", version=0),
            "enable_checkpointing": True,
            "max_epochs": 3,
            **settings,
        },
    )
    running.fit(module, loader(shuffle=True), loader(31, 1), ckpt_path=ckpt_path)
    return running


def fingerprint(running: Any) -> dict[str, Any]:
    """Everything that must not depend on the callback, as plain values."""
    module = running.lightning_module
    return {
        "weights": weights(module),
        "modes": [part.training for part in module.modules()],
        "requires_grad": [parameter.requires_grad for parameter in module.parameters()],
        "grads": [None if p.grad is None else p.grad.tolist() for p in module.parameters()],
        "attributes": attributes(module),
        "names": [list(module.state_dict()), [name for name, _ in module.named_parameters()]],
        "random": random_states(),
        "metrics": {name: value.item() for name, value in running.callback_metrics.items()},
        "loops": [repr(running.fit_loop.state_dict()), repr(running.fit_loop.epoch_loop.val_loop.state_dict())],
        "early_stopping": running.early_stopping_callback.state_dict(),
        "best": [
            str(running.checkpoint_callback.best_model_score),
            Path(running.checkpoint_callback.best_model_path).name,
        ],
        "csv": csv_rows(running.logger),
        "checkpoints": checkpoints(running),
    }


def weights(module: nn.Module) -> str:
    """A hash of parameters and buffers, also of those that are not saved."""
    digest = hashlib.sha256()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        plain = tensor.double() if tensor.dtype is torch.bfloat16 else tensor
        digest.update(name.encode() + plain.numpy(force=True).tobytes())
    return digest.hexdigest()


def attributes(module: Any) -> list[Any]:
    """What the user's module has collected."""
    found = [module.epochs, module.total, module._private, sorted(module.kinds), list(module.recent), module.table]
    return [str(value) for value in (*found, vars(module.meter), module.losses, module.best.compute())]


def random_states() -> list[str]:
    """Hashes of the states of the three generators."""
    states = [torch.get_rng_state().numpy().tobytes(), repr(np.random.get_state()), repr(random.getstate())]
    return [hashlib.sha256(s if isinstance(s, bytes) else s.encode()).hexdigest() for s in states]


def csv_rows(logger: Any) -> list[dict[str, str]]:
    """The rows of metrics.csv without the callback's own columns, and without rows that hold nothing else."""
    with (Path(logger.log_dir) / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    kept = [{key: value for key, value in row.items() if value and "quantdebug" not in key} for row in rows]
    return [row for row in kept if set(row) - {"epoch", "step"}]


def checkpoints(running: Any) -> dict[str, list[str]]:
    """Hash of the weights and of the rest of each checkpoint."""
    found = {}
    for path in sorted(Path(running.checkpoint_callback.dirpath).glob("*.ckpt")):
        saved = torch.load(path, weights_only=True)
        content = [tensor_hash(tensor) for tensor in saved["state_dict"].values()]
        found[path.name] = [*saved["state_dict"], *content, repr(saved["loops"]), repr(saved["optimizer_states"])]
    return found


def tensor_hash(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.numpy(force=True).tobytes()).hexdigest()

"""Any network inside a LightningModule with data, and a walk on it inside a running Trainer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import jsonschema
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_quantdebug.diagnosis import Diagnosis
from lightning_quantdebug.evaluation import Evaluator
from lightning_quantdebug.model_loan import call_with
from lightning_quantdebug.report import Finding, Report, StepName, StepVerdict, Verdict
from lightning_quantdebug.settings import make_settings
from tests import zoo
from tests.torture import calling, trainer


class Judged(pl.LightningModule):
    """A network that is judged by how far its output is from a constant; batches are what its ``forward`` takes."""

    def __init__(self, net: nn.Module, batches: Sequence[Any], calibration: Sequence[Any] | None = None) -> None:
        super().__init__()
        self.net = net
        self.batches = list(batches)
        self.calibration = list(batches if calibration is None else calibration)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", self.score_of(call_with(self.net, batch)), batch_size=2)

    def score_of(self, output: Any) -> Tensor:
        return (getattr(output, "logits", output).float() - 0.3).square().mean()

    def val_dataloader(self) -> Any:
        return DataLoader(self.batches, batch_size=None)

    def train_dataloader(self) -> Any:
        return DataLoader(self.calibration, batch_size=None)


class Classifier(Judged):
    """A network that is judged by its accuracy; batches are pairs of inputs and classes."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.net(batch[0])
        self.log("acc", (logits.argmax(-1) == batch[1]).float().mean(), batch_size=len(batch[1]))
        self.log("loss", nn.functional.cross_entropy(logits, batch[1]), batch_size=len(batch[1]))


def in_validation(module: Any, action: Any, root: Any = ".", **settings: Any) -> Any:
    """What ``action(trainer)`` returns when it is called in ``on_validation_end`` of ``trainer.validate``."""
    results: list[Any] = []
    running = trainer(root, callbacks=[calling(on_validation_end=lambda t, _: results.append(action(t)))], **settings)
    running.validate(module, verbose=False)
    return results[0]


def walked(module: Any, monitor: str = "loss", trainer_settings: Any = None, **settings: Any) -> Diagnosis:
    """The diagnosis after a walk; its report follows the schema and the module is as it was."""
    made = make_settings(**{"monitor": monitor, "tolerance": "10%", "calibration": "val", **settings})
    given = settings.get("calibration") if made.calibration is None else None

    def action(running: Any) -> Diagnosis:
        evaluator = Evaluator(running, module, monitor, limit_batches=made.limit_batches)
        diagnosis = Diagnosis(evaluator, Evaluator(running, module, monitor), made, given)
        before = state_of(module)
        diagnosis.walk()
        assert state_of(module) == before
        return diagnosis

    diagnosis: Diagnosis = in_validation(module, action, **(trainer_settings or {}))
    assert_follows_schema(diagnosis.report)
    return diagnosis


def walk(module: Any, **settings: Any) -> Report:
    """The report of a walk; see :func:`walked`."""
    return walked(module, **settings).report


def walked_unrepaired(module: Any, monitor: str = "loss", trainer_settings: Any = None, **settings: Any) -> Diagnosis:
    """The diagnosis after a walk that tries no remedy, for tests of everything else."""
    return walked(module, monitor, trainer_settings, **{"remedies": (), **settings})


def walk_unrepaired(module: Any, **settings: Any) -> Report:
    """The report of :func:`walked_unrepaired`."""
    return walked_unrepaired(module, **settings).report


def broken(report: Report) -> Finding:
    """The finding of a walk that ``fp32_check`` has stopped, and nothing else."""
    assert report.verdict is Verdict.BROKEN_PIPELINE
    (step,) = report.steps
    assert (step.step, step.verdict) == (StepName.FP32_CHECK, StepVerdict.BROKEN)
    finding = report.findings[0]
    assert step.advice == finding.evidence
    return finding


def state_of(module: nn.Module) -> str:
    """A hash of all that a walk could leave behind in a module."""
    digest = hashlib.sha256()
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad} {tensor.grad}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    for name, part in module.named_modules():
        hooks = [len(getattr(part, kind)) for kind in vars(part) if kind.endswith("_hooks")]
        plain = {key: value for key, value in vars(part).items() if isinstance(value, (bool, int, float, str))}
        digest.update(f"{name} {sorted(vars(part))} {hooks} {sorted(plain.items())}".encode())
    return digest.hexdigest()


def assert_follows_schema(report: Report) -> None:
    schema = json.loads(files("lightning_quantdebug").joinpath("report_schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(json.loads(json.dumps(report.to_dict(), allow_nan=False)), schema)


def images(count: int = 2, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 3, 8, 8, generator=generator) for _ in range(count)]


def convnet(*more: nn.Module) -> nn.Module:
    """Convolution, batch normalization, ReLU; what is given; and a linear head."""
    torch.manual_seed(0)
    return zoo._trained_looking(nn.Sequential(*zoo.conv_bn(3, 4, 3), nn.ReLU(), *more, nn.Flatten(), nn.Linear(256, 3)))

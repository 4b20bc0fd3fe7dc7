"""Set-ups of the per-quantizer analysis: a network in its module inside a validation, its quantizers calibrated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torchmetrics
from torch import Tensor, nn

from lightning_quantdebug.analysis_store import AnalysisStore, analysis_key
from lightning_quantdebug.calibration import capture, set_ranges
from lightning_quantdebug.evaluation import Evaluation, Evaluator
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.model_loan import call_with
from lightning_quantdebug.sensitivity import Bench, Sensitivities
from lightning_quantdebug.settings import Settings, make_settings
from tests import zoo
from tests.walks import Judged, in_validation


class Everything(Judged):
    """Logs a mean, a metric whose value needs the whole epoch, and an aggregate of the epoch."""

    def __init__(self, net: nn.Module, batches: Sequence[Any]) -> None:
        super().__init__(net, batches)
        self.spearman = torchmetrics.SpearmanCorrCoef()
        self.scores: list[Tensor] = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        output = call_with(self.net, batch)
        values = getattr(output, "logits", output).float().flatten()
        self.scores.append((values - 0.3).square().mean())
        self.log("loss", self.scores[-1], batch_size=2)
        self.spearman(values, values.roll(1) + torch.linspace(0, 1, len(values), device=values.device))
        self.log("spearman", self.spearman)

    def on_validation_epoch_end(self) -> None:
        self.log("spread", torch.stack(self.scores).std())
        self.scores.clear()


def module_of(name: str, batches: int = 3) -> Everything:
    """A network of the zoo with some batches."""
    net, _ = zoo.make(name)
    torch.manual_seed(1)
    return Everything(net, [zoo.ZOO[name].batch() for _ in range(batches)])


def captured(running: Any, module: Any, settings: Settings) -> tuple[Instrumentation, Evaluator, Evaluation]:
    """A calibrated session, its evaluator, and FP32."""
    evaluator = Evaluator(running, module, settings.monitor, limit_batches=settings.limit_batches)
    session = Instrumentation(module, settings.target, module=settings.module, exclude=settings.exclude)
    capture(session, evaluator, None, batches=3)
    set_ranges(session, evaluator, None, settings.calibration_batches)
    return session, evaluator, evaluator.run()


def analysed(
    module: Any,
    action: Callable[[Sensitivities, Bench], Any],
    monitor: str = "loss",
    trainer_settings: Any = None,
    path: Any = None,
    bench_settings: Any = None,
    **settings: Any,
) -> Any:
    """What ``action`` makes of the analysis, inside a running validation."""
    made = make_settings(**{"monitor": monitor, "target": "w4a4", "calibration": "val", **settings})

    def inside(running: Any) -> Any:
        session, evaluator, reference = captured(running, module, made)
        store = AnalysisStore(path, analysis_key(session, made, reference))
        bench = Bench(session, evaluator, made, reference, store, **(bench_settings or {}))
        names = [name for name, quantizer in session.quantizers.items() if quantizer.is_calibrated]
        return action(Sensitivities(bench, names), bench)

    return in_validation(module, inside, **(trainer_settings or {}))

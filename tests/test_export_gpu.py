"""Models that live on an accelerator are exported for the CPU; recipes fit on both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_quantdebug import apply_recipe, instrument, save_recipe
from lightning_quantdebug.export_files import writers
from lightning_quantdebug.model_loan import call_with
from lightning_quantdebug.network import output_tensors
from lightning_quantdebug.report import Agreement
from tests import zoo
from tests.exporting import exporter_of, simulated

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def _on(batch: Any, device: str) -> Any:
    return {k: v.to(device) for k, v in batch.items()} if isinstance(batch, dict) else batch.to(device)


@pytest.mark.parametrize("name", ["mobilenet", "resnet", "transformer_encoder", "bert"])
def test_a_model_on_a_gpu(name: str, tmp_path: Path) -> None:
    model, batch = zoo.make(name)
    model, batch = model.cuda(), _on(batch, "cuda")
    with instrument(model, batch) as session:
        session.calibrate([batch])
        session.set_mode("quantize")
        accepted = simulated(session, batch)
        save_recipe(session, batch, tmp_path / "recipe")
        for write in writers(exporter_of(session, batch), tmp_path).values():
            assert write().agreement is Agreement.VERIFIED
    for device in ("cuda", "cpu"):
        with torch.no_grad():
            found = output_tensors(call_with(apply_recipe(model.to(device), tmp_path / "recipe"), _on(batch, device)))
        for one, other in zip(found, accepted, strict=True):
            assert torch.equal(one.cpu(), other.cpu()) or device == "cpu"

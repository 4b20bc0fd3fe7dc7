"""Every hostile model is handled rightly, or refused with a message that names what is wrong and the way out."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_quantdebug import ExportError, QuantDebug, apply_recipe, export_onnx, instrument, save_recipe
from lightning_quantdebug.analysis_store import hash_bytes
from lightning_quantdebug.model_loan import call_with
from lightning_quantdebug.network import output_tensors
from lightning_quantdebug.report import Cause, Verdict
from lightning_quantdebug.target import Kind
from tests.documented import Table
from tests.hostile import CASES, Case

NAMES = list(CASES)
HEAD = """# Hostile models

What was tried and what happened: written by `tests/test_hostile_models.py`, which runs a whole walk (int8) on each of
these networks, compares every output with FP32's while the quantizers are bypassed, counts the quantized weights by
hand, and the state of the module with that of one that never met the callback. The networks are in `tests/hostile.py`.
`broken_pipeline` is the right answer for batches without values. A file that is refused names the line of the
network that can not be in it.

| model | quantized weights | verdict | findings | recipe | `.pt2` |
| --- | --- | --- | --- | --- | --- |"""


class Judged(pl.LightningModule):
    """Scores a network against what it gives in FP32, with some noise."""

    def __init__(self, net: torch.nn.Module, batches: list[Any]) -> None:
        super().__init__()
        self.net = net
        with torch.no_grad():
            outputs = [output_tensors(call_with(self.net.eval(), batch)) for batch in batches]
        self.targets = [[out + 0.1 * out.std() * torch.randn_like(out) for out in outs] for outs in outputs]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        outputs = output_tensors(call_with(self.net, batch))
        losses = [
            F.mse_loss(out, target) / target.var() for out, target in zip(outputs, self.targets[batch_idx], strict=True)
        ]
        self.log("loss", sum(losses) / len(losses), batch_size=8)


def made(case: Case) -> tuple[torch.nn.Module, list[Any]]:
    torch.manual_seed(0)
    net = case.model().eval()
    batches = [case.batch() for _ in range(3)]
    with torch.no_grad():
        call_with(net, batches[0])  # lazy parts are there from now on
    return net, batches


def validated(root: Path, module: Judged, batches: list[Any], *callbacks: pl.Callback) -> None:
    torch.manual_seed(1)
    trainer = pl.Trainer(
        default_root_dir=root,
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.validate(module, DataLoader(batches, batch_size=None), verbose=False)


@pytest.fixture(scope="module")
def table() -> Iterator[Table]:
    table = Table("hostile_models.md", HEAD, NAMES)
    yield table
    table.finish()


@pytest.fixture
def _plain_attention() -> Iterator[None]:
    """The fused kernel of `nn.TransformerEncoderLayer` computes other bits than its layers do."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


@pytest.mark.usefixtures("_plain_attention")
@pytest.mark.parametrize("name", NAMES)
def test_alone(name: str) -> None:
    case = CASES[name]
    net, (batch, *_) = made(case)
    before = {key: copy.deepcopy(value) for key, value in net.state_dict().items() if isinstance(value, Tensor)}
    twin = copy.deepcopy(net) if case.copies else net
    with torch.no_grad(), instrument(net, batch, "int8") as q:
        assert all(torch.equal(value, net.state_dict()[key]) for key, value in before.items())
        q.calibrate([batch])
        fp32 = output_tensors(call_with(twin, batch))
        q.set_mode("bypass")
        bypassed = output_tensors(call_with(net, batch))
        q.set_mode("quantize")
        quantized = output_tensors(call_with(net, batch))
        weights = [name for name, quantizer in q.quantizers.items() if quantizer.kind is Kind.WEIGHT]
        unquantized = [f"{item.name} {item.reason}" for item in q.coverage.unquantized]
    assert len(weights) == case.weights
    for word in case.named:
        assert any(word in line for line in unquantized), unquantized
    torch.testing.assert_close(bypassed, fp32, rtol=0, atol=0, equal_nan=True)
    if case.finding != Cause.NON_FINITE.value:
        for exact, near in zip(fp32, quantized, strict=True):
            assert 0 < float((near - exact).norm() / exact.norm()) < case.noise


@pytest.mark.parametrize("name", NAMES)
def test_in_a_walk(name: str, table: Table, tmp_path: Path) -> None:
    case = CASES[name]
    net, batches = made(case)
    module = Judged(net, batches)
    twin = copy.deepcopy(module) if case.copies else None
    names, places = list(module.state_dict()), [tensor.data_ptr() for tensor in module.parameters()]
    callback = QuantDebug(
        monitor="loss", mode="min", target="int8", tolerance=0.1, verbose=False, export=["pt2"], on_error="raise"
    )
    validated(tmp_path, module, batches, callback)
    report = callback.report
    assert report is not None
    assert list(module.state_dict()) == names
    assert [tensor.data_ptr() for tensor in module.parameters()] == places
    if twin is not None:
        validated(tmp_path, twin, batches)
        both = zip(module.state_dict().items(), twin.state_dict().values(), strict=True)
        assert [key for (key, one), other in both if isinstance(one, Tensor) and not torch.equal(one, other)] == []
    causes = [finding.cause.value for finding in report.findings]
    assert case.finding in causes if case.finding else causes == []
    files = {export.name: export.agreement.value for export in report.final.exports}
    if case.finding == Cause.NON_FINITE.value:
        assert report.verdict is Verdict.BROKEN_PIPELINE
        assert files == {}
    else:
        assert report.verdict is Verdict.ACCEPTED
        assert files == {"recipe": "verified", "pt2": case.pt2}
        assert all(len(export.reason) > 20 for export in report.final.exports if export.agreement.value != "verified")
        # The recipe fits what the user has in hand after the walk.
        apply_recipe(module, tmp_path / "quantdebug" / "recipe") if case.copies else None
    said = ", ".join(dict.fromkeys(f"`{cause}`" for cause in causes)) or "nothing"
    written = [files.get(kind, "none").replace("not_written", "refused by name") for kind in ("recipe", "pt2")]
    table.add(name, str(case.weights), report.verdict.value, said, *written)


def test_buffers_that_forward_sizes_are_given_back_and_can_still_be_sized(tmp_path: Path) -> None:
    case = CASES["quantized by torch"]
    net, batch = case.model().eval(), case.batch()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with torch.no_grad(), instrument(net, batch, "int8") as q:
        q.calibrate([batch])
        save_recipe(q, batch, tmp_path / "recipe")
    assert {key: value.shape for key, value in net.state_dict().items()} == {k: v.shape for k, v in before.items()}
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    net(batch)  # its observer sizes its buffers, which memory that NumPy has seen would refuse
    assert net.body.weight_fake_quant.activation_post_process.min_val.shape == (8,)


def test_hashing_leaves_memory_as_it_is_and_tells_every_byte() -> None:
    tensor, other = torch.arange(2.0**21), torch.arange(2.0**21)
    digests = []
    for each in (tensor, other):
        digests.append(hashlib.sha256())
        hash_bytes(digests[-1], each)
    assert digests[0].digest() == digests[1].digest() == hashlib.sha256(other.numpy().data).digest()
    tensor[-1] += 1
    changed = hashlib.sha256()
    hash_bytes(changed, tensor)
    assert changed.digest() != digests[0].digest()
    tensor.resize_(2**22)


def test_what_torch_onnx_stumbles_over_is_named(tmp_path: Path) -> None:
    case = CASES["scaled dot product attention"]
    net, batch = case.model().eval(), case.batch()
    with torch.no_grad(), instrument(net, batch, "int8") as q:
        q.calibrate([batch])
        q.set_mode("quantize")
        save_recipe(q, batch, tmp_path / "recipe")
    with pytest.raises(ExportError, match=r"aten\.scaled_dot_product_attention.*only 4D query") as caught:
        export_onnx(apply_recipe(net, tmp_path / "recipe"), tmp_path / "model.onnx", batch)
    assert "\x1b" not in str(caught.value)

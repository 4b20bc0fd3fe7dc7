"""A remedy that claims to keep the FP32 function is held to it, and undone where it does not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_quantdebug.adjustment import Adjustment, Applied
from lightning_quantdebug.function_check import adjust_exactly
from lightning_quantdebug.instrument import batch_runs, instrument
from lightning_quantdebug.report import Cause
from tests.channel_networks import Net

torch.set_num_threads(1)

APPLIED = Applied(("0",), (("2", "why"),), "a note")


def capped(batches: list[Tensor], scale: float) -> tuple[Applied, bool]:
    """What is told of scaling the cap of a ReLU6, and whether it was kept."""
    model = nn.Sequential(nn.Identity(), nn.ReLU6(), nn.Linear(2, 2)).eval()
    with instrument(model, batches[0]) as session:
        session.calibrate(batches)
        key = next(operation.key for operation in session.topology if operation.op == "hardtanh")
        changes = {key: Adjustment(bounds_scale=torch.tensor([scale]))}
        applied = adjust_exactly(session, batch_runs(session, batches), changes, "the remedy", APPLIED)
        return applied, bool(session.adjustments)


def test_what_changes_nothing_is_kept() -> None:
    applied, kept = capped([torch.ones(4, 2)], 0.5)
    assert kept
    assert (applied.changed, applied.skipped, applied.findings) == (("0",), (("2", "why"),), ())
    assert applied.note == "a note; FP32 outputs changed by at most 0.0e+00"


@pytest.mark.parametrize("place", [0, 1])
def test_each_of_two_batches_counts(place: int) -> None:
    batches = [torch.ones(4, 2), torch.ones(4, 2)]
    batches[place] = torch.full((4, 2), 5.0)
    applied, kept = capped(batches, 0.5)
    assert not kept
    assert (applied.changed, applied.skipped) == ((), (("2", "why"),))
    assert [finding.cause for finding in applied.findings] == [Cause.CHANGED_FUNCTION]
    assert applied.note == applied.findings[0].evidence
    assert applied.note.startswith("the remedy changed the FP32 output '2' by ")


def test_more_batches_are_not_looked_at() -> None:
    assert capped([torch.ones(4, 2), torch.ones(4, 2), torch.full((4, 2), 5.0)], 0.5)[1]


def test_the_worst_of_several_outputs_counts() -> None:
    model = Net(lambda m, x: (m.a(x), m.b(x)), a=nn.Linear(2, 2), b=nn.Linear(2, 2)).eval()
    batch = torch.randn(4, 2)
    for name in ("a", "b"):
        with instrument(model, batch) as session:
            session.calibrate([batch])
            layer = next(layer for layer in session.layers if layer.name == name)
            changes = {layer.key: Adjustment(weight_scale=torch.tensor(1.001))}
            applied = adjust_exactly(session, batch_runs(session, [batch]), changes, "the remedy", APPLIED)
            assert f"the FP32 output {name!r}" in applied.note
            assert dict(session.adjustments) == {}

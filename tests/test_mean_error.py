"""Which batches tell of the mean error of a layer: data with NaN, layers that run on few samples, or otherwise."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_quantdebug.bias_correction import correct_bias
from lightning_quantdebug.instrument import instrument
from lightning_quantdebug.report import Cause
from tests.mean_errors import (
    W4,
    calibrate_on,
    corrections,
    empirical,
    images,
    off_grid,
    recorded_on,
    results,
    runs_of,
    three_layers,
)
from tests.zoo import Branching


def test_batches_with_nan_are_left_out_and_told_of() -> None:
    clean = images(6, 5, 7)
    spoilt = clean[1].clone()
    spoilt[2, 0, 1, 1] = math.nan
    found = []
    for batches in ([clean[0], spoilt, clean[2]], [clean[0], clean[2]]):
        with instrument(three_layers(), clean[0], "w4a8_per_tensor") as session:
            session.calibrate(clean)
            done = empirical(session, batches)
            found.append((done, corrections(session)))
    (with_nan, spoilt_corrections), (without, clean_corrections) = found
    for name in clean_corrections:
        np.testing.assert_array_equal(spoilt_corrections[name], clean_corrections[name])
    assert re.findall(r"[\d.]+%", with_nan.note) == re.findall(r"[\d.]+%", without.note) != []
    assert without.findings == ()
    assert [finding.cause for finding in with_nan.findings] == [Cause.NON_FINITE]
    assert with_nan.findings[0].evidence == (
        "1 of 3 calibration batches gave NaN or infinity at 0 and 2 more; bias correction left them out there."
    )
    assert with_nan.findings[0].quantizer == "0.weight"


def test_where_every_batch_is_nan_nothing_is_corrected() -> None:
    clean = images(6)
    with instrument(nn.Sequential(nn.Flatten(), nn.Linear(72, 3)), clean[0], W4) as session:
        session.calibrate(clean)
        done = empirical(session, [torch.full((2, 2, 6, 6), math.inf)])
        assert session.adjustments == {}
    assert done.changed == ()
    assert done.note == ""
    assert done.skipped == (("1", "every calibration batch that reached it gave NaN or infinity"),)
    assert "at 1; bias correction" in done.findings[0].evidence


def test_layers_that_are_not_reached_stay_as_they_are() -> None:
    torch.manual_seed(0)
    up, down = torch.rand(4, 8), -torch.rand(4, 8)
    session = recorded_on(Branching(), W4, up, down)
    calibrate_on(session, up, down)
    state = session.state()
    done = correct_bias(session, runs_of(session, up))
    assert ("b", "no calibration batch reached it") in done.skipped
    assert "a" in done.changed
    session.restore(state)
    calibrate_on(session, up)
    done = correct_bias(session, runs_of(session, up, down))
    assert ("b", "its weight has no range and stays in FP32") in done.skipped


class Deciding(nn.Module):
    """Goes round a second time if the first layer gives more, or less, than a threshold."""

    def __init__(self, sign: int) -> None:
        super().__init__()
        self.first, self.again, self.sign = nn.Linear(16, 16), nn.Linear(16, 16), sign
        self.first.weight.data = off_grid(self.first.weight)
        self.threshold = -math.inf

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        rounds = 1 + int(self.sign * float(x.detach().max()) > self.threshold)
        for _ in range(rounds):
            x = self.again(x)
        return x


@pytest.mark.parametrize("sign", [1, -1])
def test_a_layer_that_runs_otherwise_when_quantized_is_left_alone(sign: int) -> None:
    torch.manual_seed(0)
    model, x = Deciding(sign), torch.rand(9, 16)
    with instrument(model, x, W4) as session:
        session.calibrate([x])
        exact, rounded = (results(session, [x], quantized)["first"][0] for quantized in (False, True))
        # The correction of the first layer brings its mean back, not its maximum.
        ends = exact.max(), (rounded - (rounded - exact).mean(0)).max()
        model.threshold = sign * sum(ends) / 2
        done = empirical(session, [x])
    assert abs(ends[0] - ends[1]) > 1e-3
    assert done.changed == ("first",)
    assert {reason for _, reason in done.skipped} == {
        "the quantized network runs it on other data than the FP32 network"
    }


def test_the_note_compares_only_what_ran_alike() -> None:
    """Uncorrected, the second layer runs twice; in FP32 and corrected it runs once."""
    torch.manual_seed(0)
    model, x = Deciding(-1), torch.rand(9, 16)
    with instrument(model, x, W4) as session:
        session.calibrate([x])
        exact, rounded = (results(session, [x], quantized)["first"][0].max() for quantized in (False, True))
        assert exact - rounded > 0.2
        model.threshold = -(exact + rounded) / 2
        done = empirical(session, [x])
    assert set(done.changed) == {"first", "again", "again@1"}
    assert done.note.endswith("it fell in 1 of 1 layers.")


class Chosen(nn.Module):
    """A second layer that sees only some of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.every, self.some = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        return self.some(self.every(x)[chosen])


def test_nan_spoils_no_layer_that_does_not_see_it() -> None:
    torch.manual_seed(0)
    x, first = torch.rand(6, 4), torch.tensor([True, True, True, False, False, False])
    spoilt = torch.cat([x[:3], torch.full((3, 4), math.nan)])
    with instrument(Chosen(), (x, first), W4) as session:
        session.calibrate([(x, first)])
        done = empirical(session, [(spoilt, first)])
    assert done.changed == ("some",)
    assert done.skipped == (("every", "every calibration batch that reached it gave NaN or infinity"),)


def test_a_layer_without_samples_was_not_reached() -> None:
    torch.manual_seed(0)
    x, every, none = torch.rand(6, 4), torch.ones(6, dtype=torch.bool), torch.zeros(6, dtype=torch.bool)
    with instrument(Chosen(), (x, every), W4) as session:
        session.calibrate([(x, every)])
        state = session.state()
        done = empirical(session, [(x, none)])
        assert done.skipped == (("some", "no calibration batch reached it"),)
        assert done.findings == ()
        found = []
        for batches in ([(x, every), (x, none)], [(x, every)]):
            session.restore(state)
            empirical(session, batches)
            found.append(corrections(session)["some"])
        np.testing.assert_array_equal(found[0], found[1])

"""Cross-entropy range setting against brute force in float64, and the sample of logits against what it must not see."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from lightning_quantdebug.encoding import encoding_from_range
from lightning_quantdebug.errors import CalibrationError
from lightning_quantdebug.fake_quantize import fake_quantize
from lightning_quantdebug.output_cross_entropy import LogitRows, range_from_logits, softmax_cross_entropy
from lightning_quantdebug.range_setting import range_from_tensor
from lightning_quantdebug.target import QuantSpec, RangeSetting


def logits(name: str, rows: int = 200, classes: int = 7, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = 3 * torch.randn(rows, classes, generator=generator)
    if name == "wide":  # one class far below all others, wherever it is
        values[:, 0] -= 30 * torch.rand(rows, generator=generator)
    return values + 9 if name == "shifted" else values


class Twin:
    """The definition in numpy, float64: the grid, the softmax and the cross-entropy."""

    def __init__(self, values: torch.Tensor, spec: QuantSpec) -> None:
        self.values = values.double().numpy()
        self.spec = spec
        self.p = self.softmax(self.values)
        self.entropy = -(self.p * np.log(self.p)).sum(1).mean()

    @staticmethod
    def softmax(values: np.ndarray) -> np.ndarray:
        powers = np.exp(values - values.max(1, keepdims=True))
        return powers / powers.sum(1, keepdims=True)

    def on_grid(self, low: float, high: float) -> np.ndarray:
        low, high = min(low, 0.0), max(high, 0.0)
        levels = 2**self.spec.bit_width
        if self.spec.symmetric:
            scale, least, most = max(high / (levels / 2 - 1), low / (-levels / 2)), -levels / 2, levels / 2 - 1
        else:
            scale = (high - low) / (levels - 1)
            zero = np.clip(np.round(-low / scale), 0, levels - 1)
            least, most = -zero, levels - 1 - zero
        return np.clip(np.round(self.values / scale), least, most) * scale

    def divergence(self, low: float, high: float) -> float:
        q = self.softmax(self.on_grid(low, high))
        return float(-(self.p * np.log(q)).sum(1).mean() - self.entropy)

    def least_divergence(self) -> float:
        low, high = min(self.values.min(), 0.0), max(self.values.max(), 0.0)
        if self.spec.symmetric:
            end = max(high, -low) * 1.01
            return min(self.divergence(-end * share, end * share) for share in np.linspace(0.005, 1, 400))
        shares = np.linspace(0.03, 1, 33)
        return min(self.divergence(low * one, high * other) for one in shares for other in shares)


@pytest.mark.parametrize("name", ["gauss", "wide", "shifted"])
@pytest.mark.parametrize("bit_width", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_range_is_as_good_as_brute_force(name: str, bit_width: int, symmetric: bool) -> None:
    values, spec = logits(name), QuantSpec(bit_width, symmetric=symmetric)
    twin = Twin(values, spec)
    low, high = range_from_logits(values, spec)
    found = twin.divergence(low.item(), high.item())
    # The error of few samples is ragged, most of all at 8 bits, where it is 1e-4.
    assert found <= {2: 1.05, 3: 1.05, 4: 1.05, 8: 1.2}[bit_width] * twin.least_divergence()
    assert found <= twin.divergence(values.min().item(), values.max().item())


@pytest.mark.parametrize("symmetric", [False, True])
def test_logits_that_do_not_matter_are_clipped_as_no_squared_error_would(symmetric: bool) -> None:
    values, spec = logits("wide"), QuantSpec(4, symmetric=symmetric)
    twin = Twin(values, spec)
    ends = [end.item() for end in range_from_logits(values, spec)]
    least_squares = [
        end.item()
        for end in range_from_tensor(values, QuantSpec(4, symmetric=symmetric, range_setting=RangeSetting.MSE))
    ]
    assert twin.divergence(*ends) < 0.3 * twin.divergence(*least_squares)
    assert ends[0] > 0.6 * least_squares[0]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bit_width", [2, 3, 4])
def test_the_cross_entropy_is_that_of_the_twin_on_every_grid(bit_width: int, symmetric: bool) -> None:
    values, spec = logits("gauss", 20), QuantSpec(bit_width, symmetric=symmetric)
    twin = Twin(values, spec)
    for share in (0.2, 0.7, 1.0):
        low, high = share * values.min(), share * values.max()
        quantized = fake_quantize(values, encoding_from_range(low, high, spec))
        own = softmax_cross_entropy(values, quantized)
        assert own == pytest.approx(twin.divergence(low.item(), high.item()) + twin.entropy, rel=1e-4)


def test_the_cross_entropy_survives_logits_that_no_power_of_e_can_hold() -> None:
    values = torch.tensor([[1e4, 1e4, -1e4]])
    assert softmax_cross_entropy(values, values) == pytest.approx(np.log(2))


def test_no_row_of_logits_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"must have logits without NaN or infinity, got none\. Calibrate on"):
        range_from_logits(torch.empty(0, 3), QuantSpec(8))


# The sample of rows.


def kept(batches: list[torch.Tensor], **limits: int) -> torch.Tensor:
    rows = LogitRows(**limits)
    for batch in batches:
        rows.add(batch)
    assert rows.count == sum(len(batch) for batch in batches)
    return rows.logits


@pytest.mark.parametrize("limits", [{}, {"most_rows": 9}, {"most_values": 40}])
def test_the_sample_depends_neither_on_batch_size_nor_on_order(limits: dict[str, int]) -> None:
    values = logits("gauss", 32)
    shuffled = values[torch.randperm(32, generator=torch.Generator().manual_seed(1))]
    whole = kept([values], **limits)
    for batches in (values.split(8), values.split(1), values.split([1, 13, 5, 11, 2]), shuffled.split(5)):
        assert torch.equal(kept(list(batches), **limits), whole)
    assert len(whole) == {"": 32, "most_rows": 9, "most_values": 5}["".join(limits)]
    rows = {tuple(row) for row in values.tolist()}
    assert {tuple(row) for row in whole.tolist()} <= rows
    spec = QuantSpec(4)
    assert torch.equal(
        torch.stack(range_from_logits(whole, spec)),
        torch.stack(range_from_logits(kept([shuffled], **limits), spec)),
    )


def test_samples_merge_as_if_all_had_been_seen_in_one_place() -> None:
    values = logits("gauss", 40)
    parts = []
    for part in values.split(13):
        parts.append(LogitRows(most_rows=6))
        parts[-1].add(part)
    first = parts[0]
    first.merge(LogitRows(most_rows=6))
    for other in parts[1:]:
        first.merge(other)
    assert first.count == 40
    assert torch.equal(first.logits, kept([values], most_rows=6))


def test_a_sample_is_drawn_from_all_that_was_seen() -> None:
    values = torch.arange(4000.0)[:, None] + torch.tensor([0.0, 0.5])
    sample = kept([values], most_rows=200)[:, 0]
    # 200 of 4000 at random: the mean is 2000, give or take 1155 / sqrt(200) = 80.
    assert abs(sample.mean().item() - 2000) < 400
    assert len(sample.unique()) == 200


def test_rows_are_copies_and_one_is_kept_however_long() -> None:
    values = logits("gauss", 3, classes=50)
    rows = LogitRows(most_values=10)
    rows.add(values)
    assert len(rows.logits) == 1
    before = rows.logits.clone()
    values.zero_()
    rows.logits.zero_()
    assert torch.equal(rows.logits, before)


def test_rows_with_nan_or_infinity_are_left_out() -> None:
    values = logits("gauss", 5)
    values[1, 2], values[3, 0] = float("nan"), float("-inf")
    rows = LogitRows()
    rows.add(values)
    assert rows.count == 3
    assert {tuple(row) for row in rows.logits.tolist()} == {tuple(row) for row in values[[0, 2, 4]].tolist()}
    rows.add(torch.full((2, 7), float("nan")))
    assert rows.count == 3


def test_half_precision_is_taken_in() -> None:
    values = logits("gauss", 4).half()
    assert torch.equal(kept([values]).sort(0).values, values.float().sort(0).values)


@pytest.mark.parametrize(
    ("values", "got"),
    [
        (torch.ones(3), "float32 of shape (3,)"),
        (torch.ones(3, 4, 5), "float32 of shape (3, 4, 5)"),
        (torch.ones(3, 4, dtype=torch.long), "int64 of shape (3, 4)"),
        (torch.ones(3, 1), "float32 of shape (3, 1)"),
    ],
)
def test_what_is_no_logits_is_refused(values: torch.Tensor, got: str) -> None:
    message = re.escape(f"must be floating-point of shape (N, C) with two classes or more, got {got}.")
    with pytest.raises(CalibrationError, match=message):
        LogitRows().add(values)


def test_another_number_of_classes_is_refused() -> None:
    rows = LogitRows()
    rows.add(torch.ones(2, 3))
    with pytest.raises(CalibrationError, match="must have the same number of classes, got 4 after 3"):
        rows.add(torch.ones(2, 4))

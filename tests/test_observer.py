"""Observers against counting by hand; their independence of order, batches and processes."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_quantdebug.errors import CalibrationError, SettingsError
from lightning_quantdebug.observer import NUM_BINS, Observer

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
ROWS = st.lists(st.lists(st.floats(width=32), min_size=7, max_size=7), min_size=0, max_size=12)


def as_batch(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float32).view(-1, 7)


def observed(*batches: torch.Tensor, values_per_sample: int | None = None) -> Observer:
    observer = Observer(values_per_sample)
    for batch in batches:
        observer.observe(batch)
    return observer


def assert_same(first: Observer, second: Observer) -> None:
    ours, theirs = first.state_dict(), second.state_dict()
    assert torch.equal(ours.pop("counts"), theirs.pop("counts"))
    assert ours == theirs


@given(ROWS, ROWS, st.sampled_from([None, 1, 3]))
@settings(max_examples=300)
def test_merging_is_observing_all(first, second, values_per_sample):
    a, b = as_batch(first), as_batch(second)
    merged = observed(a, values_per_sample=values_per_sample)
    merged.merge(observed(b, values_per_sample=values_per_sample))
    assert_same(merged, observed(torch.cat([a, b]), values_per_sample=values_per_sample))


@given(ROWS, st.integers(1, 5), st.randoms(), st.sampled_from([None, 1, 3]))
@settings(max_examples=300)
def test_batch_size_and_order_do_not_matter(rows, batch_size, random, values_per_sample):
    whole = observed(as_batch(rows), values_per_sample=values_per_sample)
    random.shuffle(rows)
    batches = as_batch(rows).split(batch_size)
    assert_same(whole, observed(*batches, values_per_sample=values_per_sample))


@given(st.lists(FINITE, min_size=1, max_size=60))
@settings(max_examples=300)
def test_histogram_is_counting_by_hand(values):
    observer = observed(*torch.tensor(values).split(7))
    histogram = observer.histogram
    counts, width = histogram.counts, histogram.bin_width
    assert math.frexp(width)[0] == 0.5  # a power of two
    assert counts.numel() <= NUM_BINS
    exact = np.array(values, dtype=np.float64)
    expected = np.zeros(counts.numel(), dtype=np.int64)
    for value in exact:
        expected[math.floor(value / width) - round(histogram.range_min / width)] += 1
    assert counts.tolist() == expected.tolist()
    assert (observer.range_min, observer.range_max) == (exact.min(), exact.max())
    assert histogram.range_min <= exact.min() < histogram.range_min + width
    assert histogram.range_max - width <= exact.max() < histogram.range_max
    assert histogram.lower_edges[-1] == histogram.range_max - width


def test_histogram_is_as_fine_as_4096_bins_allow():
    for seed in range(50):
        x = torch.randn(1000, generator=torch.Generator().manual_seed(seed)) * 10 ** (seed / 5 - 5) + seed
        assert observed(x).histogram.counts.numel() > NUM_BINS // 2 - 1 or x.max() - x.min() < 1e-4 * seed


def test_growth_from_zeros_and_over_many_octaves_loses_nothing():
    observer = observed(torch.zeros(5), torch.tensor([1e-38]), torch.tensor([-3e38]), torch.tensor([7.0]))
    assert observer.histogram.counts.sum() == observer.count == 8
    assert observer.histogram.counts[-1] == 7
    assert observer.histogram.range_max == observer.histogram.bin_width


def test_non_finite_values_are_counted_and_ignored():
    x = torch.tensor([[1.0, float("nan")], [float("inf"), -2.0], [-float("inf"), 0.5]])
    observer = observed(x, torch.full((4,), float("nan")), values_per_sample=8)
    assert (observer.count, observer.non_finite) == (3, 7)
    assert (observer.range_min, observer.range_max) == (-2.0, 1.0)
    assert observer.histogram.counts.sum() == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_seen_exactly(dtype):
    x = torch.randn(4, 100).to(dtype)
    observer = observed(x)
    assert (observer.range_min, observer.range_max) == (x.min().item(), x.max().item())
    assert_same(observer, observed(x.double()))


def test_few_values_of_large_samples_are_drawn_but_extremes_are_exact():
    x = torch.randn(8, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    x[3, 2, 7, 5], x[1, 4, 9, 6] = 77.0, -55.0
    observer = observed(x, values_per_sample=1000)
    assert (observer.range_min, observer.range_max, observer.count) == (-55.0, 77.0, x.numel())
    drawn = int(observer.histogram.counts.sum())
    assert 900 * 8 <= drawn <= 1000 * 8
    edges = observer.histogram.lower_edges
    mean = float((edges * observer.histogram.counts).sum() / drawn)
    assert mean == pytest.approx(0.0, abs=0.05)


def test_drawn_values_visit_all_channels_and_columns_evenly():
    channel = torch.arange(64.0).view(1, 64, 1, 1).expand(1, 64, 32, 32).contiguous()
    column = torch.arange(32.0).expand(1, 64, 32, 32).contiguous()
    for x, groups in ((channel, 64), (column, 32)):
        for layout in (x, x.to(memory_format=torch.channels_last)):
            counts = observed(layout, values_per_sample=1024).histogram.counts
            filled = counts[counts > 0]
            assert filled.numel() == groups
            assert filled.min() >= 0.8 * filled.max()


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    ],
)
def test_any_strides_are_seen(change):
    x = torch.randn(4, 3, 8, 8)
    before = x.clone()
    assert_same(observed(change(x)), observed(x))
    assert torch.equal(x, before)


def test_empty_and_single_values():
    observer = observed(torch.empty(0, 3), torch.tensor(2.5))
    assert (observer.count, observer.range_min, observer.range_max) == (1, 2.5, 2.5)
    assert observer.histogram.counts.tolist() == [1]


def test_observed_under_inference_mode_and_merged_outside():
    with torch.inference_mode():
        observer = observed(torch.randn(3, 4))
    observer.observe(torch.randn(3, 4, requires_grad=True))
    observer.merge(observed(torch.randn(3, 4)))
    assert observer.count == 36


def test_state_dict_round_trip_and_independence():
    observer = observed(torch.randn(10, 10), torch.tensor([float("nan")]), values_per_sample=3)
    state = observer.state_dict()
    copy = Observer()
    copy.load_state_dict(state)
    assert_same(copy, observer)
    copy.observe(torch.randn(10, 10))
    assert torch.equal(state["counts"], observer.state_dict()["counts"])


@pytest.mark.parametrize("name", ["range_min", "range_max", "histogram"])
def test_an_observer_without_values_has_no_range(name):
    message = "must see finite values before its range is known, got none (and 2 that are NaN or infinite)"
    with pytest.raises(CalibrationError, match=re.escape(message)):
        getattr(observed(torch.tensor([float("nan"), float("inf")])), name)


def test_observers_that_draw_differently_are_not_merged():
    with pytest.raises(SettingsError, match=re.escape("same `values_per_sample` can be merged, got 4 and None")):
        Observer(4).merge(Observer(None))


def test_values_per_sample_must_be_positive():
    with pytest.raises(SettingsError, match="`values_per_sample` must be a positive integer or None, got 0"):
        Observer(0)

"""What was written is read back from the event files, as TensorBoard reads it."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from lightning_quantdebug.errors import ReportError
from lightning_quantdebug.observer import Histogram
from lightning_quantdebug.report import Report, Step, StepName, StepVerdict
from lightning_quantdebug.target import Kind
from lightning_quantdebug.tensorboard import ReviewWriter, condense
from tests.report_examples import full_report, hostile_report

NAMESPACES = [pytorch_lightning, lightning.pytorch]


class Rank(SimpleNamespace):
    """The little of a Trainer that the writer looks at."""

    def __init__(self, *loggers: object, is_global_zero: bool = True) -> None:
        super().__init__(loggers=list(loggers), is_global_zero=is_global_zero)


class Recorder:
    """A logger of another kind."""

    def __init__(self) -> None:
        self.rows: list[tuple[dict[str, float], int]] = []

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.rows.append((metrics, step))


def events(directory: Path | str) -> EventAccumulator:
    """Everything in the directory's event files."""
    accumulator = EventAccumulator(str(directory), size_guidance={"histograms": 0, "tensors": 0, "scalars": 0})
    accumulator.Reload()
    return accumulator


def text(accumulator: EventAccumulator, tag: str) -> str:
    """The page under a tag."""
    value = accumulator.Tensors(f"{tag}/text_summary")[-1].tensor_proto.string_val[0]
    return str(value.decode())


def test_a_report_is_written_as_scalars_and_pages(tmp_path: Path) -> None:
    with ReviewWriter(None, tmp_path) as writer:
        writer.write_report(full_report(), step=7)
        assert writer.log_dir == str(tmp_path)
    read = events(tmp_path)
    scalars = {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}
    assert scalars == {
        f"quantdebug/{word}/{step}": [(7, pytest.approx(value))]
        for step, *values in [
            ("fp32_check", 0.93, 0.0),
            ("activations", 0.87, 0.06),
            ("weights", 0.5, 0.43),
            ("fix_activations", 0.87, 0.06),
            ("fix_quantizers", 0.48, 0.45),
            ("quantize_model", 0.48, 0.45),
        ]
        for word, value in zip(("score", "loss"), values, strict=True)
    }
    assert text(read, "quantdebug/report").startswith("# Quantization: not accepted")
    assert "| `conv` | 8 | 31.5 | 0.25 | 0.03 [0.01, 0.05] | guilty | 0.4 |" in text(
        read, "quantdebug/table_of_quantizers"
    )
    ranges = text(read, "quantdebug/table_of_ranges")
    assert "| `conv` | 8 asymmetric | per tensor | [0, 6] | [0, 6] | 0.02353 | 0 |" in ranges
    assert "| `conv.weight` | 8 symmetric | per channel (16) | [-1, 0.5] | [-1, 0.99] | 0.0078 | 0 |" in ranges


def test_a_step_that_ran_twice_is_written_as_it_ran_last(tmp_path: Path) -> None:
    report = full_report().with_step(Step(StepName.WEIGHTS, StepVerdict.PASSED, 0.9, 0.03))
    with ReviewWriter(None, tmp_path) as writer:
        writer.write_report(report, step=0)
    assert [event.value for event in events(tmp_path).Scalars("quantdebug/score/weights")] == [pytest.approx(0.9)]


def test_hostile_names_are_shown_as_text_in_the_text_dashboard(tmp_path: Path) -> None:
    with ReviewWriter(None, tmp_path) as writer:
        writer.write_report(hostile_report(), step=0)
    read = events(tmp_path)
    for tag in ("quantdebug/report", "quantdebug/table_of_ranges", "quantdebug/table_of_quantizers"):
        html = markdown_to_safe_html(text(read, tag))
        assert "a|b`c`&lt;script&gt;alert(1)&lt;/script&gt; ## owned [31m *_[x](http://e.vil)!" in html
        assert not re.search(r"<(script|a|img|em)\b", html)
        assert "<table>" in html


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_the_users_own_logger_is_used_and_left_open(namespace: Any, tmp_path: Path) -> None:
    logger = namespace.loggers.TensorBoardLogger(tmp_path, name="run")
    csv = namespace.loggers.CSVLogger(tmp_path, name="csv")
    with ReviewWriter(Rank(csv, logger), tmp_path / "own") as writer:
        writer.write_watch("val_acc", 0.25, step=3)
        assert writer.log_dir == logger.log_dir
    logger.experiment.add_scalar("after", 1.0, 4)
    logger.finalize("success")
    read = events(logger.log_dir)
    assert [(event.step, event.value) for event in read.Scalars("quantdebug/watch/val_acc")] == [(3, 0.25)]
    assert [event.value for event in read.Scalars("after")] == [1.0]
    assert not (tmp_path / "own").exists()


def test_a_class_of_the_users_derived_from_lightnings_is_found(tmp_path: Path) -> None:
    class MyLogger(pytorch_lightning.loggers.TensorBoardLogger):
        pass

    logger = MyLogger(tmp_path)
    assert ReviewWriter(Rank(logger), tmp_path / "own").log_dir == logger.log_dir


def test_a_foreign_class_of_the_same_name_is_not_taken_for_lightnings(tmp_path: Path) -> None:
    foreign = type("TensorBoardLogger", (Recorder,), {"__module__": "somewhere.else"})()
    with ReviewWriter(Rank(foreign), tmp_path / "own") as writer:
        writer.write_watch("val_acc", 0.5, step=1)
    assert foreign.rows == [({"quantdebug/watch/val_acc": 0.5}, 1)]
    assert events(tmp_path / "own").Tags()["scalars"] == ["quantdebug/watch/val_acc"]


def test_the_first_tensorboard_logger_gets_the_pages_and_every_other_logger_the_scalars(tmp_path: Path) -> None:
    first, second = (pytorch_lightning.loggers.TensorBoardLogger(tmp_path, name=name) for name in ("a", "b"))
    other = Recorder()
    with ReviewWriter(Rank(other, first, second), tmp_path / "own") as writer:
        writer.write_report(Report(steps=(Step(StepName.WEIGHTS, StepVerdict.PASSED, 0.5, None),)), step=2)
    for logger in (first, second):
        logger.finalize("success")
    assert other.rows == [({"quantdebug/score/weights": 0.5}, 2)]
    assert events(first.log_dir).Tags()["scalars"] == ["quantdebug/score/weights"]
    assert events(second.log_dir).Tags()["scalars"] == ["quantdebug/score/weights"]
    assert events(first.log_dir).Tags()["tensors"] == ["quantdebug/report/text_summary"]
    assert events(second.log_dir).Tags()["tensors"] == []


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    other = Recorder()
    with ReviewWriter(Rank(other, is_global_zero=False), tmp_path / "own") as writer:
        writer.write_report(full_report(), step=0)
        writer.write_watch("val_acc", 0.5, step=0)
        writer.write_histograms({"conv": Histogram(torch.tensor([1]), 0.0, 1.0)}, Kind.WEIGHT, step=0)
    assert other.rows == []
    assert not (tmp_path / "own").exists()


def test_nothing_is_created_before_the_first_write(tmp_path: Path) -> None:
    ReviewWriter(None, tmp_path / "own").close()
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize("with_logger", [False, True])
def test_an_unwritable_directory_is_said_with_the_way_out(with_logger: bool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    blocked = tmp_path / "file" / "logs"
    trainer = Rank(pytorch_lightning.loggers.TensorBoardLogger(blocked)) if with_logger else None
    with pytest.raises(ReportError, match=r"Can not write TensorBoard events to '.*file/logs.*Give `dirpath`, or the"):
        ReviewWriter(trainer, blocked).write_watch("val_acc", 0.5, step=0)


@pytest.mark.parametrize(("kind", "folder"), [(Kind.WEIGHT, "weights"), (Kind.ACTIVATION, "activations")])
def test_a_histogram_is_read_back_with_every_count_in_its_place(kind: Kind, folder: str, tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=100_000)
    counts, _ = np.histogram(values, bins=4096, range=(-8.0, 8.0))
    histogram = Histogram(torch.from_numpy(counts), -8.0, 8.0)
    empty = Histogram(torch.zeros(4096, dtype=torch.int64), 0.0, 1.0)
    with ReviewWriter(None, tmp_path) as writer:
        writer.write_histograms({"layer1.0@1": histogram, "never": empty}, kind, step=5)
    read = events(tmp_path)
    assert read.Tags()["histograms"] == [f"quantdebug/{folder}/layer1.0@1"]
    (event,) = read.Histograms(f"quantdebug/{folder}/layer1.0@1")
    value = event.histogram_value
    assert event.step == 5
    assert value.num == 100_000
    assert 64 < len(value.bucket) <= 128
    assert len(value.bucket) == len(value.bucket_limit)
    edges = [value.min, *value.bucket_limit]
    assert value.bucket == np.histogram(values, bins=edges)[0].tolist()
    assert value.sum == pytest.approx(values.sum(), abs=16 / 4096 * 1000)
    assert value.sum_squares == pytest.approx((values**2).sum(), rel=0.01)


@pytest.mark.parametrize("bins", [1, 127, 128, 129, 1000, 4096])
@pytest.mark.parametrize("make", [torch.ones, lambda bins: torch.arange(bins) % 3], ids=["ones", "gaps"])
def test_condensing_loses_no_count(bins: int, make: Callable[[int], torch.Tensor]) -> None:
    counts = make(bins).long()
    raw = condense(Histogram(counts, -1.0, 3.0))
    if raw is None:
        assert counts.sum() == 0
        return
    limits = [raw["min"], *raw["bucket_limits"]]
    assert len(raw["bucket_counts"]) <= 128
    assert sum(raw["bucket_counts"]) == raw["num"] == int(counts.sum())
    assert limits == sorted(set(limits))
    assert limits[-1] == raw["max"]
    centres = -1.0 + 4.0 / bins * (np.arange(bins) + 0.5)
    assert raw["bucket_counts"] == np.histogram(centres, bins=limits, weights=counts.numpy())[0].tolist()


def test_empty_ends_are_left_out_so_that_an_outlier_range_does_not_squash_the_picture() -> None:
    counts = torch.zeros(4096, dtype=torch.int64)
    counts[2048:2056] = 5
    raw = condense(Histogram(counts, -8.0, 8.0))
    assert raw is not None
    assert (raw["min"], raw["max"]) == (0.0, 8 * 16 / 4096)
    assert raw["bucket_counts"] == [5.0] * 8


def test_a_constant_tensor_is_one_bucket(tmp_path: Path) -> None:
    counts = torch.zeros(4096, dtype=torch.int64)
    counts[0] = 9
    with ReviewWriter(None, tmp_path) as writer:
        writer.write_histograms({"q": Histogram(counts, 2.0, 2.0)}, Kind.WEIGHT, step=0)
    (event,) = events(tmp_path).Histograms("quantdebug/weights/q")
    assert (event.histogram_value.min, event.histogram_value.max, event.histogram_value.bucket) == (2.0, 2.0, [9.0])

"""What was written is read back from the event files, as TensorBoard reads it."""

import io
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from lightning_quantdebug import tensorboard
from lightning_quantdebug.errors import ReportError
from lightning_quantdebug.report import Report, Step, StepName, StepVerdict
from lightning_quantdebug.tensorboard import ReviewWriter
from tests.report_examples import full_report, hostile_report
from tests.visual_examples import image_report

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
    scalars = {
        tag: [(event.step, event.value) for event in read.Scalars(tag)]
        for tag in read.Tags()["scalars"]
        if re.match("quantdebug/(score|loss)/", tag)
    }
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
    assert events(first.log_dir).Tags()["scalars"] == ["quantdebug/score/weights", "quantdebug/walk/score"]
    assert events(second.log_dir).Tags()["scalars"] == ["quantdebug/score/weights"]
    assert events(first.log_dir).Tags()["tensors"] == ["quantdebug/report/text_summary"]
    assert events(second.log_dir).Tags()["images"] == []
    assert events(second.log_dir).Tags()["tensors"] == []


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    other = Recorder()
    with ReviewWriter(Rank(other, is_global_zero=False), tmp_path / "own") as writer:
        writer.write_report(full_report(), step=0)
        writer.write_watch("val_acc", 0.5, step=0)
        writer.write_training("val_acc", 0.5, step=0)
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


def test_pictures_are_read_back_and_grouped(tmp_path: Path) -> None:
    report = image_report()
    with ReviewWriter(None, tmp_path) as writer:
        writer.write_report(report, step=3)
    read = events(tmp_path)
    overview = [
        "flow_chart",
        "waterfall",
        "ranking_weights",
        "ranking_activations",
        "bits_over_depth",
        "class_shift",
        "flipped_samples",
    ]
    tensors = [
        f"quantdebug_tensors/{view.quantizer}/{name}"
        for view in report.visuals.tensors
        for name in ("channel_ranges", "histogram", "noise")
    ]
    expected = [*(f"quantdebug/pictures/{place}_{name}" for place, name in enumerate(overview, 1)), *tensors]
    assert sorted(read.Tags()["images"]) == sorted(expected)
    for tag in expected:
        (event,) = read.Images(tag)
        drawn = Image.open(io.BytesIO(event.encoded_image_string))
        assert event.step == 3
        assert drawn.size == (event.width, event.height)
        assert 600 < event.width < 1600
        # Something is drawn: not one colour from edge to edge.
        assert len(set(drawn.convert("L").resize((40, 30)).tobytes())) > 3


def test_histograms_of_guilty_tensors_stand_at_the_steps_of_the_walk(tmp_path: Path) -> None:
    report = image_report()
    with ReviewWriter(None, tmp_path) as writer:
        writer.write_report(report, step=3)
    read = events(tmp_path)
    assert len(read.Tags()["histograms"]) == 2 * len(report.visuals.tensors)
    for view in report.visuals.tensors:
        for word in ("fp32", "quantized"):
            found = read.Histograms(f"quantdebug_tensors/{view.quantizer}/{word}")
            assert [event.step for event in found] == [0, 3, 8]
            for event, state in zip(found, view.states, strict=True):
                value = event.histogram_value
                assert value.num == sum(getattr(state, word))
                assert value.bucket == list(getattr(state, word))
                np.testing.assert_allclose([value.min, *value.bucket_limit], state.edges)
                centres = (np.array(state.edges[1:]) + np.array(state.edges[:-1])) / 2
                assert value.sum == pytest.approx(float(centres @ np.array(getattr(state, word))), rel=1e-6, abs=1e-6)
                assert value.sum_squares == pytest.approx(float(centres**2 @ np.array(getattr(state, word))))


def test_the_walk_and_the_sensitivities_are_curves(tmp_path: Path) -> None:
    report = image_report()
    with ReviewWriter(None, tmp_path) as writer:
        writer.write_report(report, step=3)
    read = events(tmp_path)

    def curve(tag: str) -> dict[int, float]:
        return {event.step: event.value for event in read.Scalars(tag)}

    assert curve("quantdebug/walk/score") == pytest.approx(
        {0: 0.93, 1: 0.926, 2: 0.5, 3: 0.86, 4: 0.84, 7: 0.925, 8: 0.924}, rel=1e-6
    )
    # TensorBoard's charts of margins refuse curves of different steps: where there is no interval there is no loss.
    walk = image_report().with_step(Step(StepName.QAT, StepVerdict.PASSED, 0.9, 0.03))
    with ReviewWriter(None, tmp_path / "other") as writer:
        writer.write_report(walk, step=3)
    other = events(tmp_path / "other")
    losses = [{e.step: e.value for e in other.Scalars(f"quantdebug/walk/loss{end}")} for end in ("", "_low", "_high")]
    assert losses[0] == curve("quantdebug/walk/loss")
    assert losses[0].keys() == losses[1].keys() == losses[2].keys() == {0, 1, 2, 3, 4, 7, 8}
    assert (losses[1][2], losses[2][2]) == (pytest.approx(0.4), pytest.approx(0.46))
    depths = {name: depth for depth, name in enumerate(report.coverage.quantized)}
    for kind in ("weight", "activation"):
        rows = [row for row in report.sensitivity if row.kind == kind]
        assert curve(f"quantdebug/sensitivity/{kind}_sqnr_db") == pytest.approx(
            {depths[row.quantizer]: row.sqnr_db for row in rows}, rel=1e-5
        )
        assert curve(f"quantdebug/sensitivity/{kind}_loss") == pytest.approx(
            {depths[row.quantizer]: row.loss for row in rows}, rel=1e-5
        )


def hyperparameters(read: EventAccumulator) -> dict[str, Any]:
    """The row of a run in the HParams dashboard."""
    content = read.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    row = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in row.items()}


def test_a_row_of_hyperparameters_and_the_layout_are_in_a_run_beneath_the_users(tmp_path: Path) -> None:
    logger = pytorch_lightning.loggers.TensorBoardLogger(tmp_path, name="run")
    logger.log_hyperparams({"lr": 0.1})
    with ReviewWriter(Rank(logger), tmp_path / "own") as writer:
        writer.write_report(image_report(), step=0)
    logger.finalize("success")
    of_user, beneath = events(logger.log_dir), events(Path(logger.log_dir) / "quantdebug")
    assert hyperparameters(of_user) == {"lr": 0.1}
    row = hyperparameters(beneath)
    assert (row["Verdict"], row["Target"], row["Tolerance"]) == ("repaired", "int8_per_tensor", "1%")
    assert (row["settings.monitor"], row["settings.mode"], row["settings.qat_epochs"]) == ("val_acc", "max", 10.0)
    assert (row["bit_width.weight"], row["bit_width.activation"]) == (8.0, 8.0)
    assert row["granularity.weight"] == "per_tensor"
    assert "settings.max_time" not in row
    assert {tag: beneath.Scalars(tag)[0].value for tag in beneath.Tags()["scalars"]} == pytest.approx(
        {
            "outcome/fp32_score": 0.93,
            "outcome/quantized_score": 0.924,
            "outcome/loss": 0.006,
            "outcome/accepted": 1.0,
            "outcome/seconds": 65.25,
        },
        rel=1e-5,
    )
    assert "custom_scalars__config__" not in of_user.Tags()["tensors"]
    content = beneath.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    charts = layout_pb2.Layout.FromString(content).category[0].chart
    tags = [tag for kind in ("scalars", "images") for tag in of_user.Tags()[kind]]
    assert len(charts) == 4
    for chart in charts:
        series = [item for margin in chart.margin.series for item in (margin.value, margin.lower, margin.upper)]
        assert all(any(re.search(pattern, tag) for tag in tags) for pattern in chart.multiline.tag)
        assert set(series) <= set(tags)
        assert series or chart.multiline.tag


def test_tensors_whose_tags_would_be_the_same_have_different_ones(tmp_path: Path) -> None:
    (view, *_), report = image_report().visuals.tensors, image_report()
    alike = tuple(replace(view, quantizer=name) for name in ("a/b", "a_b", "c" * 500))
    with ReviewWriter(None, tmp_path, prefix="quantdebug/int8") as writer:
        writer.write_report(replace(report, visuals=replace(report.visuals, tensors=alike)), step=0)
    tags = {tag.rsplit("/", 1)[0] for tag in events(tmp_path).Tags()["histograms"]}
    assert {"quantdebug_tensors/int8/a_b", "quantdebug_tensors/int8/a_b_1"} < tags
    (long,) = [tag for tag in tags if "ccc" in tag]
    assert len(long) < 150


def test_pictures_and_text_reach_a_logger_that_has_a_place_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[tuple[Any, set[str], set[str]]] = []
    monkeypatch.setattr(
        tensorboard, "write_media", lambda logger, pictures, texts: given.append((logger, {*pictures}, {*texts}))
    )
    other = Recorder()
    with ReviewWriter(Rank(other), tmp_path / "own") as writer:
        writer.write_report(image_report(), step=2)
    ((logger, pictures, texts),) = given
    assert logger is other
    assert "quantdebug/pictures/1_flow_chart" in pictures
    assert texts == {"quantdebug/report", "quantdebug/table_of_quantizers", "quantdebug/table_of_ranges"}
    assert {tag for row, _ in other.rows for tag in row} >= {"quantdebug/score/weights", "quantdebug/loss/weights"}


@pytest.mark.parametrize(
    ("settings", "step", "expected"),
    [
        ({}, None, False),
        ({"watch_every_n_epochs": 2}, None, True),
        ({}, Step(StepName.QAT, StepVerdict.FAILED, details={"scores": [0.5]}), True),
        ({}, Step(StepName.QAT, StepVerdict.SKIPPED), False),
    ],
)
def test_a_chart_of_epochs_is_there_where_epochs_were_scored(
    settings: dict[str, Any], step: Step | None, expected: bool, tmp_path: Path
) -> None:
    report = image_report()
    report = replace(report, settings={**report.settings, **settings})
    with ReviewWriter(None, tmp_path) as writer:
        writer.write_report(report if step is None else report.with_step(step), step=0)
    content = events(tmp_path).Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    patterns = [tag for chart in layout_pb2.Layout.FromString(content).category[0].chart for tag in chart.multiline.tag]
    assert ("^quantdebug/(watch|qat)/" in patterns) is expected

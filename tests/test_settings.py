"""Settings are checked and turned into enums once; each refusal names the value and the way out."""

from datetime import timedelta

import pytest

from lightning_quantdebug.errors import QuantDebugError, SettingsError
from lightning_quantdebug.settings import (
    Analysis,
    CalibrationSource,
    Direction,
    OnError,
    Tolerance,
    When,
    make_settings,
    parse_duration,
)
from lightning_quantdebug.target import QuantTarget


def test_defaults_are_those_of_the_public_contract() -> None:
    settings = make_settings(monitor="val_loss")
    assert settings.direction is Direction.MIN
    assert settings.tolerance == Tolerance(0.01, relative=True)
    assert settings.target == QuantTarget.from_value("int8")
    assert (settings.when, settings.analysis, settings.on_error) == (When.FIT_END, Analysis.RACE, OnError.WARN)
    assert settings.calibration is CalibrationSource.TRAIN
    assert (settings.calibration_batches, settings.limit_batches, settings.qat_epochs) == (16, 1.0, 10)
    assert settings.watch_every_n_epochs is None
    assert settings.max_time is None
    assert settings.verbose is True


@pytest.mark.parametrize(
    ("direction", "score", "loss"),
    [(Direction.MAX, 0.7, 0.25), (Direction.MAX, 1.0, -0.05), (Direction.MIN, 0.7, -0.25), (Direction.MIN, 1.0, 0.05)],
)
def test_a_loss_is_positive_when_the_score_is_worse(direction: Direction, score: float, loss: float) -> None:
    assert direction.loss(0.95, score) == pytest.approx(loss)


@pytest.mark.parametrize(
    ("given", "tolerance", "text"),
    [
        ("1%", Tolerance(0.01, relative=True), "1%"),
        (" 0.5 % ", Tolerance(0.005, relative=True), "0.5%"),
        ("0.02", Tolerance(0.02), "0.02"),
        (0.02, Tolerance(0.02), "0.02"),
        (0, Tolerance(0.0), "0"),
        ("1e-3", Tolerance(0.001), "0.001"),
        (Tolerance(3.0), Tolerance(3.0), "3"),
    ],
)
def test_a_tolerance_is_read_and_written(given: float | str | Tolerance, tolerance: Tolerance, text: str) -> None:
    parsed = Tolerance.parse(given)
    assert parsed.relative is tolerance.relative
    assert parsed.value == pytest.approx(tolerance.value)
    assert str(parsed) == text


def test_a_relative_tolerance_is_a_share_of_the_size_of_the_score() -> None:
    assert Tolerance.parse("10%").permitted_loss(-2.0) == pytest.approx(0.2)
    assert Tolerance.parse(0.1).permitted_loss(-2.0) == 0.1


@pytest.mark.parametrize("value", [-0.1, "-1%", float("nan"), float("inf"), "1e999"])
def test_a_tolerance_that_is_negative_or_not_finite_is_refused(value: object) -> None:
    with pytest.raises(SettingsError, match=r"`tolerance` must be a finite number that is not negative, got"):
        make_settings(monitor="x", tolerance=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["one percent", "1%%", "", None, True, [1], "e", "1 2"])
def test_a_tolerance_that_can_not_be_read_is_refused(value: object) -> None:
    with pytest.raises(SettingsError, match=r"`tolerance` must be a number in the metric's units.*or a percentage"):
        make_settings(monitor="x", tolerance=value)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("00:00:30:05", 1805), ("1:02:00:00", 93600), ({"minutes": 30}, 1800), (timedelta(seconds=7), 7)],
)
def test_max_time_is_read_as_the_trainer_reads_it(value: object, seconds: int) -> None:
    assert parse_duration(value) == timedelta(seconds=seconds)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", ["30", "00:00:00:00", {"minute": 3}, 30, timedelta(0), timedelta(seconds=-1), {}])
def test_a_max_time_that_is_no_positive_duration_is_refused(value: object) -> None:
    with pytest.raises(SettingsError, match=r"`max_time` must be a positive duration: 'DD:HH:MM:SS'"):
        make_settings(monitor="x", max_time=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("monitor", ["", None, 3])
def test_a_monitor_must_be_a_name(monitor: object) -> None:
    with pytest.raises(SettingsError, match=r"`monitor` must be the name of a metric that validation logs, got"):
        make_settings(monitor=monitor)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "least"),
    [
        ("calibration_batches", 0, 1),
        ("calibration_batches", 2.0, 1),
        ("calibration_batches", None, 1),
        ("watch_every_n_epochs", 0, 1),
        ("watch_every_n_epochs", True, 1),
        ("qat_epochs", -1, 0),
    ],
)
def test_a_count_must_be_an_integer_that_is_large_enough(name: str, value: object, least: int) -> None:
    with pytest.raises(SettingsError, match=rf"`{name}` must be an integer of at least {least}, got {value!r}"):
        make_settings(monitor="x", **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [0, 0.0, 1.5, -1, True, "all", float("nan")])
def test_limit_batches_is_a_count_or_a_share(value: object) -> None:
    with pytest.raises(SettingsError, match=r"`limit_batches` must be a number of batches"):
        make_settings(monitor="x", limit_batches=value)


@pytest.mark.parametrize("value", [1, 20, 0.5, 1.0])
def test_limit_batches_takes_what_the_trainer_takes(value: float) -> None:
    assert make_settings(monitor="x", limit_batches=value).limit_batches == value


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_qat_lr_factor_must_be_positive(value: float) -> None:
    with pytest.raises(SettingsError, match=r"`qat_lr_factor` must be positive, got"):
        make_settings(monitor="x", qat_lr_factor=value)


def test_an_unknown_export_is_refused_with_the_known_ones() -> None:
    with pytest.raises(SettingsError, match=r"`export` may hold \['onnx', 'encodings', 'pt2'\], got \['tflite'\]"):
        make_settings(monitor="x", export=["onnx", "tflite"])


@pytest.mark.parametrize("name", ["exclude", "remedies", "export"])
@pytest.mark.parametrize("value", ["head", [1]])
def test_a_list_of_names_must_be_a_list_of_strings(name: str, value: object) -> None:
    with pytest.raises(SettingsError, match=rf"`{name}` must be a list of strings, got"):
        make_settings(monitor="x", **{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "value", "choices"),
    [
        ("mode", "maximum", r"\['min', 'max'\]"),
        ("when", "always", r"\['fit_end', 'fit_start', 'never'\]"),
        ("analysis", "quick", r"\['estimate', 'race', 'exhaustive'\]"),
        ("on_error", None, r"\['warn', 'raise'\]"),
        ("calibration", "test", r"\['train', 'val'\]"),
    ],
)
def test_a_wrong_choice_lists_the_right_ones(name: str, value: object, choices: str) -> None:
    with pytest.raises(SettingsError, match=rf"`{name}` must be one of {choices}, got {value!r}"):
        make_settings(monitor="x", **{name: value})  # type: ignore[arg-type]


def test_calibration_takes_any_loader_and_refuses_what_is_none() -> None:
    settings = make_settings(monitor="x", calibration=[1, 2])
    assert settings.calibration is None
    assert settings.to_dict()["calibration"] == "given loader"
    with pytest.raises(SettingsError, match=r"`calibration` must be 'train', 'val' or a DataLoader, got 3"):
        make_settings(monitor="x", calibration=3)


def test_settings_errors_can_be_caught_as_value_errors() -> None:
    assert issubclass(SettingsError, ValueError)
    assert issubclass(SettingsError, QuantDebugError)


def test_settings_become_plain_values_in_the_words_of_the_contract() -> None:
    settings = make_settings(
        monitor="val_acc", mode="max", tolerance="2%", target="w4a8", exclude=["head"], max_time={"minutes": 1}
    )
    plain = settings.to_dict()
    assert plain["mode"] == "max"
    assert plain["tolerance"] == "2%"
    assert plain["exclude"] == ["head"]
    assert plain["max_time"] == 60.0
    assert plain["target"]["weights"]["bit_width"] == 4
    assert plain["calibration"] == "train"
    assert "direction" not in plain
    again = make_settings(**{**plain, "max_time": {"seconds": 60}})
    assert again == settings

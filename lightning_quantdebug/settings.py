"""The settings of one walk, checked and turned into enums once, at the public boundary."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import timedelta
from enum import Enum
from typing import Any

from lightning_quantdebug.errors import SettingsError
from lightning_quantdebug.target import QuantTarget, parse_choice


class Direction(str, Enum):
    """Whether a small or a large score is good (``mode`` of ModelCheckpoint)."""

    MIN = "min"
    MAX = "max"

    def loss(self, reference: float, score: float) -> float:
        """Loss of score against ``reference``: positive is worse, whatever the direction."""
        return reference - score if self is Direction.MAX else score - reference


class When(str, Enum):
    """Where in ``trainer.fit`` the walk runs."""

    FIT_END = "fit_end"
    FIT_START = "fit_start"
    NEVER = "never"


class Analysis(str, Enum):
    """How much work the per-quantizer analysis may do."""

    ESTIMATE = "estimate"
    RACE = "race"
    EXHAUSTIVE = "exhaustive"


class OnError(str, Enum):
    """What a failure of the tool itself does to the user's run."""

    WARN = "warn"
    RAISE = "raise"


class CalibrationSource(str, Enum):
    """Which of the Trainer's loaders the ranges are set on."""

    TRAIN = "train"
    VAL = "val"


@dataclass(frozen=True)
class Tolerance:
    """The permitted loss of score: absolute in the metric's units, or a share of the FP32 score.

    Examples:
        >>> Tolerance.parse("1%").permitted_loss(0.9)
        0.009000000000000001
        >>> Tolerance.parse(0.02).permitted_loss(0.9)
        0.02
    """

    value: float
    relative: bool = False

    @classmethod
    def parse(cls, value: float | str | Tolerance) -> Tolerance:
        """Read ``0.01`` (absolute) or ``"1%"`` (of the FP32 score).

        Raises:
            SettingsError: If the value is negative, not finite or can not be read.
        """
        if isinstance(value, Tolerance):
            return value
        number, relative = _read_number(value)
        if not math.isfinite(number) or number < 0:
            raise SettingsError(f"`tolerance` must be a finite number that is not negative, got {value!r}.")
        return cls(number, relative)

    def permitted_loss(self, reference: float) -> float:
        """Largest loss that still passes, in the metric's units."""
        return self.value * abs(reference) if self.relative else self.value

    def __str__(self) -> str:
        """As the user would write it."""
        return f"{self.value * 100:g}%" if self.relative else f"{self.value:g}"


def _read_number(value: object) -> tuple[float, bool]:
    """The number in ``value`` and whether it is a percentage."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value), False
    match = re.fullmatch(r"\s*([-+0-9.eE]+)\s*(%?)\s*", value) if isinstance(value, str) else None
    try:
        if match is not None:
            return float(match[1]) / (100.0 if match[2] else 1.0), bool(match[2])
    except ValueError:
        pass
    raise SettingsError(
        "`tolerance` must be a number in the metric's units, such as 0.01, or a percentage such as '1%', "
        f"got {value!r}."
    )


def parse_duration(value: str | Mapping[str, int] | timedelta | None) -> timedelta | None:
    """Read ``max_time`` as Lightning's Trainer does: ``"DD:HH:MM:SS"``, a dict of timedelta's arguments, a timedelta.

    Raises:
        SettingsError: If the value has none of these forms or is not positive.
    """
    if value is None:
        return None
    duration = value if isinstance(value, timedelta) else _read_duration(value)
    if duration is None or duration <= timedelta(0):
        raise SettingsError(
            "`max_time` must be a positive duration: 'DD:HH:MM:SS', a dict such as {'minutes': 30}, or a timedelta, "
            f"got {value!r}."
        )
    return duration


def _read_duration(value: object) -> timedelta | None:
    """A timedelta from Lightning's string or dict form, ``None`` if it has neither."""
    match = re.fullmatch(r"\s*(\d+):(\d+):(\d+):(\d+)\s*", value) if isinstance(value, str) else None
    if match is not None:
        days, hours, minutes, seconds = (int(part) for part in match.groups())
        return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)
    try:
        return timedelta(**value) if isinstance(value, Mapping) else None
    except TypeError:
        return None


EXPORTS = ("onnx", "encodings", "pt2")
# In the order of the chart; a remedy's name is its module's or setting's.
REMEDIES = (
    "cle",
    "per_channel",
    "per_group",
    "bias_correction",
    "adaround",
    "range_setting",
    "high_bias_absorption",
    "activation_cle",
    "custom_range",
    "granularity",
    "bit_width",
)


@dataclass(frozen=True)
class Settings:
    """All settings of a walk; the fields are the arguments of :class:`lightning_quantdebug.QuantDebug`."""

    monitor: str
    direction: Direction = Direction.MIN
    tolerance: Tolerance = field(default_factory=lambda: Tolerance(0.01, relative=True))
    target: QuantTarget = field(default_factory=QuantTarget)
    when: When = When.FIT_END
    restore_best: bool = False
    module: str | None = None
    exclude: tuple[str, ...] = ()
    remedies: tuple[str, ...] | None = None
    analysis: Analysis = Analysis.RACE
    reverse_analysis: bool = False
    calibration: CalibrationSource | None = CalibrationSource.TRAIN
    calibration_batches: int = 16
    limit_batches: int | float = 1.0
    qat_epochs: int = 10
    qat_lr_factor: float = 0.1
    qat_learn_scales: bool = True
    qat_freeze_batchnorm: float = 0.0
    qat_early_stop: bool = True
    qat_distillation: float = 0.0
    watch_every_n_epochs: int | None = None
    max_time: timedelta | None = None
    export: tuple[str, ...] = ()
    on_error: OnError = OnError.WARN
    verbose: bool = True

    def __post_init__(self) -> None:
        """Check what can be checked without a Trainer."""
        if not isinstance(self.monitor, str) or not self.monitor:
            raise SettingsError(f"`monitor` must be the name of a metric that validation logs, got {self.monitor!r}.")
        for name in ("calibration_batches", "watch_every_n_epochs"):
            _check_count(name, getattr(self, name), least=1, optional=name == "watch_every_n_epochs")
        _check_count("qat_epochs", self.qat_epochs, least=0)
        _check_limit(self.limit_batches)
        for name in ("reverse_analysis", "qat_learn_scales", "qat_early_stop"):
            if not isinstance(getattr(self, name), bool):
                raise SettingsError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        _check_number("qat_lr_factor", self.qat_lr_factor, "positive", lambda value: 0 < value < math.inf)
        _check_number("qat_freeze_batchnorm", self.qat_freeze_batchnorm, "a share from 0 to 1", lambda v: 0 <= v <= 1)
        _check_number("qat_distillation", self.qat_distillation, "0 or a positive weight", lambda v: 0 <= v < math.inf)
        _check_names("export", self.export, EXPORTS)
        _check_names("remedies", self.remedies or (), REMEDIES)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for the report, in the words of the public contract."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        values["mode"] = values.pop("direction").value
        values["tolerance"] = str(self.tolerance)
        values["target"] = self.target.to_dict()
        values["calibration"] = self.calibration.value if self.calibration else "given loader"
        values["max_time"] = None if self.max_time is None else self.max_time.total_seconds()
        plain = {key: value.value if isinstance(value, Enum) else value for key, value in values.items()}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in plain.items()}


def _check_count(name: str, value: object, least: int, optional: bool = False) -> None:
    """Raise unless ``value`` is an integer of at least ``least`` (or ``None`` where that is allowed)."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SettingsError(f"`{name}` must be an integer of at least {least}, got {value!r}.")


def _check_number(name: str, value: object, expected: str, fits: Callable[[float], bool]) -> None:
    """Raise unless ``value`` is a number that fits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not fits(value):
        raise SettingsError(f"`{name}` must be {expected}, got {value!r}.")


def _check_names(name: str, values: Sequence[str], known: Sequence[str]) -> None:
    """Raise unless all ``values`` are known; the message lists those that are."""
    unknown = [value for value in values if value not in known]
    if unknown:
        raise SettingsError(f"`{name}` may hold {list(known)}, got {unknown}.")


def _check_limit(value: object) -> None:
    """Raise unless ``value`` is a limit in Lightning's sense: a share in (0, 1] or a count of at least 1."""
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    is_share = isinstance(value, float) and 0.0 < value <= 1.0
    if not (is_count or is_share):
        raise SettingsError(
            "`limit_batches` must be a number of batches (int, at least 1) or a share (float in (0, 1]), "
            f"got {value!r}."
        )


def make_settings(
    *,
    monitor: str,
    mode: str = "min",
    tolerance: float | str = "1%",
    target: str | Mapping[str, Any] | QuantTarget = "int8",
    when: str = "fit_end",
    exclude: Sequence[str] | str = (),
    remedies: Sequence[str] | None = None,
    analysis: str = "race",
    calibration: object = "train",
    max_time: str | Mapping[str, int] | timedelta | None = None,
    export: Sequence[str] | str = (),
    on_error: str = "warn",
    **rest: Any,
) -> Settings:
    """Turn the public arguments into :class:`Settings`.

    Raises:
        SettingsError: For every value that can not be used; the message says what could.
    """
    return Settings(
        monitor=monitor,
        direction=parse_choice(Direction, mode, "mode"),
        tolerance=Tolerance.parse(tolerance),
        target=QuantTarget.from_value(target),
        when=parse_choice(When, when, "when"),
        exclude=_names(exclude, "exclude"),
        remedies=None if remedies is None else _names(remedies, "remedies"),
        analysis=parse_choice(Analysis, analysis, "analysis"),
        calibration=_calibration_source(calibration),
        max_time=parse_duration(max_time),
        export=_names(export, "export"),
        on_error=parse_choice(OnError, on_error, "on_error"),
        **rest,
    )


def _names(value: Sequence[str] | str, name: str) -> tuple[str, ...]:
    """A tuple of strings; a bare string is a mistake that would be read letter by letter."""
    if isinstance(value, str) or not all(isinstance(item, str) for item in value):
        raise SettingsError(f"`{name}` must be a list of strings, got {value!r}.")
    return tuple(value)


def _calibration_source(value: object) -> CalibrationSource | None:
    """The named loader, or ``None`` for a loader given by the user."""
    if isinstance(value, (str, CalibrationSource)):
        return parse_choice(CalibrationSource, value, "calibration")
    if hasattr(value, "__iter__"):
        return None
    raise SettingsError(f"`calibration` must be 'train', 'val' or a DataLoader, got {value!r}.")

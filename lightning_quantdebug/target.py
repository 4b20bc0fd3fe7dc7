"""What the model is quantized *to*: bit-widths, granularity, grids and the presets of known engines.

Everything here is plain, immutable data, so that YAML can set it and a report can hold it. Which *tensors* get a
quantizer is the business of :mod:`lightning_quantdebug.placement`, which a target names by its ``placement`` field.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from typing import Any, TypeVar

from lightning_quantdebug.errors import SettingsError

E = TypeVar("E", bound=Enum)

ALLOWED_BIT_WIDTHS = (*range(2, 17), 32)


class Kind(str, Enum):
    """Which sort of tensor a quantizer holds."""

    WEIGHT = "weight"
    ACTIVATION = "activation"


class Mode(str, Enum):
    """What a quantizer does now."""

    BYPASS = "bypass"
    OBSERVE = "observe"
    QUANTIZE = "quantize"


class Granularity(str, Enum):
    """How many encodings one tensor has."""

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"
    PER_GROUP = "per_group"


class RangeSetting(str, Enum):
    """How observed values become a clipping range."""

    MIN_MAX = "min_max"
    MSE = "mse"


class Placement(str, Enum):
    """Name of a table of placement rules, one for each engine."""

    GENERIC = "generic"
    TENSORRT = "tensorrt"
    XNNPACK = "xnnpack"
    QNN = "qnn"


def parse_choice(enum: type[E], value: object, name: str) -> E:
    """Turn ``value`` into a member of ``enum``.

    Raises:
        SettingsError: If ``value`` is none of the members; the message lists them.
    """
    if isinstance(value, enum):
        return value
    choices = [member.value for member in enum]
    if isinstance(value, str) and value in choices:
        return enum(value)
    raise SettingsError(f"`{name}` must be one of {choices}, got {value!r}.")


@dataclass(frozen=True)
class QuantSpec:
    """The grid of one quantizer before its range is known.

    Args:
        bit_width: Bits of one value: 2 to 16, or 32 for the FP32 sanity check.
        symmetric: ``True``: ``zero_point`` is 0 and the grid is signed. ``False``: unsigned grid with a zero point.
        granularity: One encoding per tensor, per output channel, or per group of ``group_size`` inputs of a channel.
        group_size: Values that share an encoding along the input axis; only with ``per_group``.
        narrow_range: Leave out the lowest level of a signed grid (``[-127, 127]`` at 8 bits), as TFLite asks for
            weights.
        range_setting: How the range is chosen: ``min_max``, ``mse``, or ``None`` for the default of the bit-width
            (``min_max`` from 8 bits up, where clipping costs more than it saves, ``mse`` below).
    """

    bit_width: int = 8
    symmetric: bool = False
    granularity: Granularity = Granularity.PER_TENSOR
    group_size: int | None = None
    narrow_range: bool = False
    range_setting: RangeSetting | None = None

    def __post_init__(self) -> None:
        """Check every field and turn strings into enums."""
        width = self.bit_width
        if isinstance(width, bool) or not isinstance(width, int) or width not in ALLOWED_BIT_WIDTHS:
            raise SettingsError(f"`bit_width` must be an integer from 2 to 16, or 32, got {width!r}.")
        object.__setattr__(self, "granularity", parse_choice(Granularity, self.granularity, "granularity"))
        if self.range_setting is not None:
            object.__setattr__(self, "range_setting", parse_choice(RangeSetting, self.range_setting, "range_setting"))
        if (self.granularity is Granularity.PER_GROUP) != (self.group_size is not None):
            raise SettingsError(
                f"`group_size` must be given with granularity 'per_group' and only there, got {self.group_size!r} "
                f"with {self.granularity.value!r}."
            )
        if self.group_size is not None and (not isinstance(self.group_size, int) or self.group_size < 1):
            raise SettingsError(f"`group_size` must be a positive integer, got {self.group_size!r}.")
        if self.narrow_range and not self.symmetric:
            raise SettingsError("`narrow_range` needs `symmetric=True`: an unsigned grid has no level to leave out.")

    @property
    def quant_min(self) -> int:
        """Lowest integer of the grid."""
        if not self.symmetric:
            return 0
        return -(1 << (self.bit_width - 1)) + int(self.narrow_range)

    @property
    def quant_max(self) -> int:
        """Highest integer of the grid."""
        return (1 << (self.bit_width - int(self.symmetric))) - 1

    @property
    def effective_range_setting(self) -> RangeSetting:
        """The range setting in force: the given one, else the default of the bit-width."""
        if self.range_setting is not None:
            return self.range_setting
        return RangeSetting.MIN_MAX if self.bit_width >= 8 else RangeSetting.MSE


_INT8_WEIGHT = QuantSpec(8, symmetric=True, granularity=Granularity.PER_CHANNEL)
_INT8_ACTIVATION = QuantSpec(8)


@dataclass(frozen=True)
class QuantTarget:
    """The engine the model must survive on.

    Args:
        name: How reports call it.
        weights: Grid of weights (convolution, linear, recurrent, embedding).
        activations: Grid of activations.
        placement: Which table of placement rules says where quantizers go.
        quantizer: Import path (``"package.module.Class"``) of a custom quantizer class, or ``None`` for ours. See
            :class:`lightning_quantdebug.quantizer.CustomQuantizer`.
    """

    name: str = "int8"
    weights: QuantSpec = field(default_factory=lambda: _INT8_WEIGHT)
    activations: QuantSpec = field(default_factory=lambda: _INT8_ACTIVATION)
    placement: Placement = Placement.GENERIC
    quantizer: str | None = None

    def __post_init__(self) -> None:
        """Check the fields and turn strings into enums."""
        object.__setattr__(self, "placement", parse_choice(Placement, self.placement, "placement"))
        if self.activations.granularity is not Granularity.PER_TENSOR:
            raise SettingsError(
                f"Activations are quantized per tensor, got granularity {self.activations.granularity.value!r}: no "
                "integer kernel can sum channels of different scales."
            )

    def spec(self, kind: Kind) -> QuantSpec:
        """The grid of weights or of activations."""
        return self.weights if kind is Kind.WEIGHT else self.activations

    def with_bit_width(self, bit_width: int) -> QuantTarget:
        """The same target with every quantizer at ``bit_width``."""
        return replace(
            self,
            weights=replace(self.weights, bit_width=bit_width),
            activations=replace(self.activations, bit_width=bit_width),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as :meth:`from_value` accepts them."""

        def plain(value: object) -> Any:
            if isinstance(value, dict):
                return {key: plain(item) for key, item in value.items()}
            return value.value if isinstance(value, Enum) else value

        return {key: plain(value) for key, value in asdict(self).items()}

    @classmethod
    def from_value(cls, value: str | Mapping[str, Any] | QuantTarget) -> QuantTarget:
        """Build a target from a preset's name, a mapping of fields, or a target.

        A mapping starts from the preset it names under ``"preset"`` (default ``"int8"``) and changes the fields it
        gives; ``weights`` and ``activations`` are mappings of :class:`QuantSpec` fields.

        Raises:
            SettingsError: If the preset, a field or a value is unknown; the message lists the right ones.

        Examples:
            >>> QuantTarget.from_value("w4a8").weights.bit_width
            4
            >>> QuantTarget.from_value({"preset": "qnn", "activations": {"bit_width": 16}}).activations.bit_width
            16
        """
        if isinstance(value, QuantTarget):
            return value
        if isinstance(value, str):
            return _from_preset(value)
        if not isinstance(value, Mapping):
            raise SettingsError(f"`target` must be a preset's name, a mapping or a QuantTarget, got {value!r}.")
        changes = dict(value)
        base = _from_preset(str(changes.pop("preset", "int8")))
        _refuse_unknown(changes, {item.name for item in fields(cls)}, "target")
        for key in ("weights", "activations"):
            if key in changes:
                changes[key] = _changed_spec(getattr(base, key), changes[key], f"target.{key}")
        changes.setdefault("name", "custom" if changes else base.name)
        return replace(base, **changes)


def _changed_spec(base: QuantSpec, changes: object, name: str) -> QuantSpec:
    """``base`` with the fields that ``changes`` gives."""
    if isinstance(changes, QuantSpec):
        return changes
    if not isinstance(changes, Mapping):
        raise SettingsError(f"`{name}` must be a mapping of QuantSpec fields, got {changes!r}.")
    _refuse_unknown(changes, {item.name for item in fields(QuantSpec)}, name)
    return replace(base, **changes)


def _refuse_unknown(given: Mapping[str, Any], known: set[str], name: str) -> None:
    """Raise if ``given`` has a key that is not known."""
    unknown = sorted(set(given) - known)
    if unknown:
        raise SettingsError(f"`{name}` has no field {unknown}; the fields are {sorted(known)}.")


# Sources of the presets.
# TensorRT: developer guide, "Working with quantized types" (symmetric int8, weights per channel).
# TFLite/XNNPACK: "LiteRT 8-bit quantization specification" (weights [-127, 127], activations asymmetric int8).
# QNN/HTP: AIMET's HTP configuration (weights symmetric, activations asymmetric uint8).
PRESETS: Mapping[str, QuantTarget] = {
    "int8": QuantTarget("int8"),
    "int8_per_tensor": QuantTarget(
        "int8_per_tensor", weights=replace(_INT8_WEIGHT, granularity=Granularity.PER_TENSOR)
    ),
    "onnxruntime": QuantTarget("onnxruntime"),
    "tensorrt": QuantTarget(
        "tensorrt",
        weights=replace(_INT8_WEIGHT, narrow_range=True),
        activations=QuantSpec(8, symmetric=True),
        placement=Placement.TENSORRT,
    ),
    "xnnpack": QuantTarget("xnnpack", weights=replace(_INT8_WEIGHT, narrow_range=True), placement=Placement.XNNPACK),
    "qnn": QuantTarget(
        "qnn", weights=replace(_INT8_WEIGHT, granularity=Granularity.PER_TENSOR), placement=Placement.QNN
    ),
    "qnn_per_channel": QuantTarget("qnn_per_channel", placement=Placement.QNN),
}

_WIDTHS = re.compile(r"w(\d+)a(\d+)(_per_tensor)?")


def _from_preset(name: str) -> QuantTarget:
    """The preset called ``name``; ``w<bits>a<bits>`` (and ``..._per_tensor``) names any pair of bit-widths."""
    if name in PRESETS:
        return PRESETS[name]
    match = _WIDTHS.fullmatch(name)
    if match is None:
        raise SettingsError(
            f"`target` must be one of {sorted(PRESETS)} or like 'w4a8' or 'w4a8_per_tensor', got {name!r}."
        )
    weights = replace(_INT8_WEIGHT, bit_width=int(match[1]))
    if match[3]:
        weights = replace(weights, granularity=Granularity.PER_TENSOR)
    return QuantTarget(name, weights=weights, activations=QuantSpec(int(match[2])))

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
_USUAL_WIDTHS = (8, 16)


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
    """How many encodings one tensor has, from the coarsest to the finest."""

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"
    PER_GROUP = "per_group"


class RangeSetting(str, Enum):
    """How observed values become a clipping range.

    ``cross_entropy`` is for the network's last output and ``batchnorm`` for activations behind a batch normalization:
    neither can be told from what one quantizer observed, so only the remedy that tries range settings gives them.
    """

    MIN_MAX = "min_max"
    PERCENTILE = "percentile"
    MSE = "mse"
    CROSS_ENTROPY = "cross_entropy"
    BATCHNORM = "batchnorm"


OF_SINGLE_QUANTIZERS = (RangeSetting.CROSS_ENTROPY, RangeSetting.BATCHNORM)
"""Range settings that some activation quantizers can have, and no whole target."""


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
        range_setting: How the range is chosen: ``min_max``, ``percentile``, ``mse``, or ``None`` for the default of the
            bit-width (``min_max`` from 8 bits up, where clipping costs more than it saves, ``mse`` below). Remedies
            may give single activation quantizers ``cross_entropy`` or ``batchnorm``.
        percentile: With ``percentile``: the share in percent, above 50, of the values that lie below the upper end;
            as many lie above the lower end. On a symmetric grid, the share of the magnitudes below the end.
    """

    bit_width: int = 8
    symmetric: bool = False
    granularity: Granularity = Granularity.PER_TENSOR
    group_size: int | None = None
    narrow_range: bool = False
    range_setting: RangeSetting | None = None
    percentile: float = 99.99

    def __post_init__(self) -> None:
        """Check every field and turn strings into enums."""
        width = self.bit_width
        if isinstance(width, bool) or not isinstance(width, int) or width not in ALLOWED_BIT_WIDTHS:
            raise SettingsError(f"`bit_width` must be an integer from 2 to 16, or 32, got {width!r}.")
        object.__setattr__(self, "granularity", parse_choice(Granularity, self.granularity, "granularity"))
        if self.range_setting is not None:
            object.__setattr__(self, "range_setting", parse_choice(RangeSetting, self.range_setting, "range_setting"))
        share = self.percentile
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 50 < share <= 100:
            raise SettingsError(f"`percentile` must be a number above 50 and at most 100, got {share!r}.")
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
_PER_TENSOR_WEIGHT = replace(_INT8_WEIGHT, granularity=Granularity.PER_TENSOR)
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
        finest_granularity: The finest granularity of weights that the engine has kernels for, which bounds what
            remedies may try. ``None``: per channel with weights of 8 bits or more, per group below, as most engines
            have it. Presets that are called or known as per-tensor-only say ``per_tensor``; a target that merely has
            per-tensor weights, such as ``{"preset": "int8", "weights": {"granularity": "per_tensor"}}``, may be taken
            per channel.
        weight_bit_widths: Bit-widths that the engine has for weights, which single ones may be raised to. ``None``: 8
            and 16, which most engines have.
        activation_bit_widths: Likewise for activations.

    Raises:
        SettingsError: If the weights are finer than ``finest_granularity``, a granularity or range setting can not be
            had for weights or activations, or a bit-width is none.
    """

    name: str = "int8"
    weights: QuantSpec = field(default_factory=lambda: _INT8_WEIGHT)
    activations: QuantSpec = field(default_factory=lambda: _INT8_ACTIVATION)
    placement: Placement = Placement.GENERIC
    quantizer: str | None = None
    finest_granularity: Granularity | None = None
    weight_bit_widths: tuple[int, ...] | None = None
    activation_bit_widths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check the fields and turn strings into enums."""
        object.__setattr__(self, "placement", parse_choice(Placement, self.placement, "placement"))
        if self.finest_granularity is not None:
            finest = parse_choice(Granularity, self.finest_granularity, "finest_granularity")
            object.__setattr__(self, "finest_granularity", finest)
        for name in ("weight_bit_widths", "activation_bit_widths"):
            object.__setattr__(self, name, _checked_widths(name, getattr(self, name)))
        if self.activations.granularity is not Granularity.PER_TENSOR:
            raise SettingsError(
                f"Activations are quantized per tensor, got granularity {self.activations.granularity.value!r}: no "
                "integer kernel can sum channels of different scales."
            )
        for name, spec in (("weights", self.weights), ("activations", self.activations)):
            if spec.range_setting in OF_SINGLE_QUANTIZERS:
                choices = [choice.value for choice in RangeSetting if choice not in OF_SINGLE_QUANTIZERS]
                raise SettingsError(
                    f"`range_setting` of all {name} must be one of {choices}, got {spec.range_setting.value!r}, which "
                    "only some activations can have: the remedy 'range_setting' tries it there."
                )
        if not self.allows(self.weights.granularity):
            raise SettingsError(
                f"Weights must be no finer than `finest_granularity`, got {self.weights.granularity.value!r} with "
                f"{self.effective_finest_granularity.value!r}. If the engine has kernels for them, set "
                f"`finest_granularity` to {self.weights.granularity.value!r} too."
            )

    @property
    def effective_finest_granularity(self) -> Granularity:
        """The bound in force: the given one, else that of the bit-width, or the weights' own where that is finer."""
        if self.finest_granularity is not None:
            return self.finest_granularity
        usual = Granularity.PER_CHANNEL if self.weights.bit_width >= 8 else Granularity.PER_GROUP
        return max(usual, self.weights.granularity, key=_fineness)

    def allows(self, granularity: Granularity | str) -> bool:
        """Whether the engine has kernels for weights of ``granularity``.

        Raises:
            SettingsError: If ``granularity`` is none of the choices.

        Examples:
            >>> [QuantTarget.from_value(name).allows("per_channel") for name in ("int8", "qnn", "qnn_per_channel")]
            [True, False, True]
        """
        asked = parse_choice(Granularity, granularity, "granularity")
        return _fineness(asked) <= _fineness(self.effective_finest_granularity)

    def wider(self, kind: Kind, bit_width: int) -> tuple[int, ...]:
        """The bit-widths that a quantizer may be raised to, the narrowest first.

        Examples:
            >>> target = QuantTarget.from_value("w4a8")
            >>> target.wider(Kind.WEIGHT, 4), target.wider(Kind.ACTIVATION, 8), target.wider(Kind.WEIGHT, 16)
            ((8, 16), (16,), ())
        """
        given = self.weight_bit_widths if kind is Kind.WEIGHT else self.activation_bit_widths
        return tuple(sorted({width for width in (_USUAL_WIDTHS if given is None else given) if width > bit_width}))

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


def _checked_widths(name: str, widths: object) -> tuple[int, ...] | None:
    """Bit-widths as a tuple, or ``None``."""
    if widths is None:
        return None
    given = tuple(widths) if isinstance(widths, (list, tuple)) else (widths,)
    if not all(isinstance(width, int) and width in ALLOWED_BIT_WIDTHS and width < 32 for width in given):
        raise SettingsError(f"`{name}` must be a list of integers from 2 to 16, got {widths!r}.")
    return given


def _fineness(granularity: Granularity) -> int:
    """Place in the order from coarse to fine."""
    return list(Granularity).index(granularity)


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
# TensorRT: developer guide, "Working with quantized types" (symmetric int8, weights per channel; no 16-bit integers).
# TFLite/XNNPACK: "LiteRT 8-bit quantization specification" (weights [-127, 127], activations asymmetric int8); its
# 16x8 mode has activations of 16 bits and weights of 8.
# QNN/HTP: AIMET's HTP configuration (weights symmetric, activations asymmetric uint8).
PRESETS: Mapping[str, QuantTarget] = {
    "int8": QuantTarget("int8"),
    "int8_per_tensor": QuantTarget(
        "int8_per_tensor", weights=_PER_TENSOR_WEIGHT, finest_granularity=Granularity.PER_TENSOR
    ),
    "onnxruntime": QuantTarget("onnxruntime", finest_granularity=Granularity.PER_CHANNEL),
    "tensorrt": QuantTarget(
        "tensorrt",
        weights=replace(_INT8_WEIGHT, narrow_range=True),
        activations=QuantSpec(8, symmetric=True),
        placement=Placement.TENSORRT,
        finest_granularity=Granularity.PER_CHANNEL,
        weight_bit_widths=(8,),
        activation_bit_widths=(8,),
    ),
    "xnnpack": QuantTarget(
        "xnnpack",
        weights=replace(_INT8_WEIGHT, narrow_range=True),
        placement=Placement.XNNPACK,
        finest_granularity=Granularity.PER_CHANNEL,
        weight_bit_widths=(8,),
    ),
    "qnn": QuantTarget(
        "qnn", weights=_PER_TENSOR_WEIGHT, placement=Placement.QNN, finest_granularity=Granularity.PER_TENSOR
    ),
    "qnn_per_channel": QuantTarget(
        "qnn_per_channel", placement=Placement.QNN, finest_granularity=Granularity.PER_CHANNEL
    ),
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
    only_per_tensor = match[3] is not None
    weights = replace(_PER_TENSOR_WEIGHT if only_per_tensor else _INT8_WEIGHT, bit_width=int(match[1]))
    finest = Granularity.PER_TENSOR if only_per_tensor else None
    return QuantTarget(name, weights=weights, activations=QuantSpec(int(match[2])), finest_granularity=finest)

"""The plan of where quantizers sit: what placement decides and the runner carries out."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_quantdebug.interception import OpKey
from lightning_quantdebug.operations import Slot
from lightning_quantdebug.report import Unquantized
from lightning_quantdebug.target import Kind, QuantSpec


@dataclass(frozen=True)
class BatchNormFold:
    """The batch normalization that is folded into a weight: names of its tensors, ``None`` where it has none."""

    running_mean: str
    running_var: str
    weight: str | None
    bias: str | None
    eps: float
    channel_axis: int
    groups: int


@dataclass(frozen=True)
class Place:
    """Where a quantizer sits: on an operation's outputs, or on one of its arguments.

    Attributes:
        key: Identity of the operation.
        slot: The argument; ``None``: the outputs.
        outputs: Positions of the outputs that are quantized.
    """

    key: OpKey
    slot: Slot | None = None
    outputs: tuple[int, ...] = ()


@dataclass
class Site:
    """One quantizer before it exists."""

    name: str
    kind: Kind
    spec: QuantSpec
    channel_axis: int | None = None
    fixed_range: tuple[float, float] | None = None
    places: list[Place] = field(default_factory=list)


@dataclass
class Plan:
    """What :func:`place` decided.

    Attributes:
        sites: The quantizers in order of execution.
        folds: For an operation with a weight, the batch normalization that is folded into it.
        folded_into: For a folded batch normalization, the name of the weight's quantizer.
        unquantized: What has no quantizer, and why.
        known: Every operation that was recorded; another one at run time was not seen in calibration.
        criteria: Paths of modules that judge the network; what runs in them is none of ours.
        idle: What the user asked to exclude and was not found, in words.
    """

    sites: list[Site] = field(default_factory=list)
    folds: dict[OpKey, BatchNormFold] = field(default_factory=dict)
    folded_into: dict[OpKey, str] = field(default_factory=dict)
    unquantized: list[Unquantized] = field(default_factory=list)
    known: set[OpKey] = field(default_factory=set)
    criteria: set[str] = field(default_factory=set)
    idle: list[str] = field(default_factory=list)

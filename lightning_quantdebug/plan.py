"""The plan of where quantizers sit: what placement decides and the runner carries out."""

from __future__ import annotations

from dataclasses import dataclass, field

from lightning_quantdebug.interception import OpKey
from lightning_quantdebug.operations import Slot
from lightning_quantdebug.report import Unquantized
from lightning_quantdebug.target import Kind, QuantSpec


@dataclass(frozen=True)
class BatchNormFold:
    """The batch normalization that is folded into a weight: names of its tensors, ``None`` where it has none.

    Attributes:
        running_mean: Name of the running mean.
        running_var: Name of the running variance.
        weight: Name of gamma.
        bias: Name of beta.
        eps: Added to the variance.
        channel_axis: Axis of the weight's output channels.
        groups: Groups of a transposed convolution, or of the convolution behind a forward fold.
        forward: Whether the normalization stands ahead of the layer.
    """

    running_mean: str
    running_var: str
    weight: str | None
    bias: str | None
    eps: float
    channel_axis: int
    groups: int
    forward: bool = False


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
    """One quantizer before it exists.

    ``channel_axis`` is that of the encoding, ``axis`` that of the weight's output channels whatever its granularity.
    """

    name: str
    kind: Kind
    spec: QuantSpec
    channel_axis: int | None = None
    fixed_range: tuple[float, float] | None = None
    places: list[Place] = field(default_factory=list)
    axis: int | None = None


@dataclass
class Plan:
    """What :func:`place` decided.

    Attributes:
        sites: The quantizers in order of execution.
        folds: For an operation with a weight, the batch normalization that is folded into it.
        folded_into: For a folded batch normalization, the operation that has taken it in.
        unquantized: What has no quantizer, and why.
        known: Every operation that was recorded; another one at run time was not seen in calibration.
        criteria: Paths of modules that judge the network; what runs in them is none of ours.
        idle: What the user asked to exclude and was not found, in words.
        parameters: For a sum or product of data and a parameter, the argument that is the parameter.
    """

    sites: list[Site] = field(default_factory=list)
    folds: dict[OpKey, BatchNormFold] = field(default_factory=dict)
    folded_into: dict[OpKey, OpKey] = field(default_factory=dict)
    unquantized: list[Unquantized] = field(default_factory=list)
    known: set[OpKey] = field(default_factory=set)
    criteria: set[str] = field(default_factory=set)
    idle: list[str] = field(default_factory=list)
    parameters: dict[OpKey, Slot] = field(default_factory=dict)

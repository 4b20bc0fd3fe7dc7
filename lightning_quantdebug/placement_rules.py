"""Where each engine puts quantizers, as data: one table of rules per engine, no code.

A rule says what happens to the *output* of an operation. Chains say which operations an engine runs as one kernel, so
that only the last of them has a quantizer. Sources: ONNX Runtime, "Quantize ONNX models" (QDQ format, fused
activations); TensorRT developer guide, "Explicit quantization: Q/DQ placement recommendations"; LiteRT, "8-bit
quantization specification"; AIMET, HTP configuration and its supergroups.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum

from lightning_quantdebug.operations import Category
from lightning_quantdebug.target import Granularity, Placement


class Action(str, Enum):
    """What happens to the output of an operation."""

    QUANTIZE = "quantize"
    WHERE_CONSUMED = "quantize where an integer operation reads it"
    FIXED = "quantize with a fixed range"
    SHARE = "share one quantizer with its inputs"
    PASS_THROUGH = "pass-through"
    NONE = "none"


@dataclass(frozen=True)
class Rule:
    """An action and the reason that the coverage report gives for it."""

    action: Action
    reason: str = ""


@dataclass(frozen=True)
class Chain:
    """Operations that run as one kernel: a head, then each stage at most once, in order.

    Attributes:
        heads: Categories that may start the chain.
        stages: For each position behind the head, the operations (by name) that may stand there; any may be absent.
    """

    heads: frozenset[Category]
    stages: tuple[frozenset[str], ...]


@dataclass(frozen=True)
class Rules:
    """The placement table of one engine.

    Attributes:
        by_category: Rule for each category of operation.
        by_name: Rules for single operations; they go before the category's.
        fixed_ranges: Clipping range of operations whose output is bounded by definition.
        chains: What runs as one kernel; the first that fits is taken.
        integer: Categories that the engine computes in integers, alone or as heads of a chain: what they read must be
            on a grid.
        weights: Granularity of the weights of a category where it is not the target's; ``None``: they stay in FP32.
        inputs: Whether the network's inputs get a quantizer.
    """

    by_category: Mapping[Category, Rule]
    chains: tuple[Chain, ...]
    integer: frozenset[Category]
    by_name: Mapping[str, Rule] = field(default_factory=dict)
    fixed_ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    weights: Mapping[Category, Granularity | None] = field(default_factory=dict)
    inputs: bool = True

    def rule(self, op: str, category: Category) -> Rule:
        """The rule for an operation."""
        return self.by_name.get(op) or self.by_category[category]


_QUANTIZE = Rule(Action.QUANTIZE)
_FLOAT = Rule(Action.WHERE_CONSUMED, "computed in FP32 by this engine")
_PASS = Rule(Action.PASS_THROUGH, "moves or selects values: they stay on the grid they are on")
_BATCH_NORM = frozenset({"batch_norm"})
_LINEAR_ACTIVATIONS = frozenset(
    {
        "relu",
        "relu6",
        "hardtanh",
        "clamp",
        "clamp_min",
        "clamp_max",
        "clip",
        "leaky_relu",
        "prelu",
        "rrelu",
        "threshold",
    }
)
_TFLITE_ACTIVATIONS = frozenset({"relu", "relu6", "hardtanh", "clamp", "clamp_min", "clip"})
_WEIGHTED = frozenset({Category.CONVOLUTION, Category.LINEAR})
_SUMS = frozenset({Category.ADD, Category.MATMUL, Category.BATCH_NORM})
_ARITHMETIC = frozenset(
    {
        Category.CONVOLUTION,
        Category.LINEAR,
        Category.MATMUL,
        Category.RECURRENT,
        Category.ATTENTION,
        Category.ADD,
        Category.MULTIPLY,
        Category.BATCH_NORM,
        Category.NORM,
        Category.PIECEWISE_LINEAR,
        Category.NONLINEAR,
        Category.BOUNDED,
        Category.AVERAGE,
        Category.JOIN,
        Category.OTHER,
    }
)
_UNIT_RANGES = {
    "softmax": (0.0, 1.0),
    "softmin": (0.0, 1.0),
    "gumbel_softmax": (0.0, 1.0),
    "sigmoid": (0.0, 1.0),
    "hardsigmoid": (0.0, 1.0),
    "tanh": (-1.0, 1.0),
}

GENERIC = Rules(
    by_category={
        **dict.fromkeys(_ARITHMETIC, _QUANTIZE),
        Category.LOOKUP: Rule(Action.PASS_THROUGH, "reads rows of a weight: they are on the weight's grid"),
        Category.BOUNDED: Rule(Action.FIXED),
        Category.JOIN: Rule(Action.SHARE),
        Category.PASS_THROUGH: _PASS,
        Category.LOSS: Rule(Action.NONE, "a loss: it judges the network and is no part of it"),
        Category.RANDOM: Rule(Action.NONE, "random numbers"),
        Category.CREATION: Rule(Action.NONE, "a constant"),
        Category.NOT_ARITHMETIC: Rule(Action.NONE, "gives no real numbers to quantize"),
    },
    chains=(
        Chain(_WEIGHTED, (_BATCH_NORM, _LINEAR_ACTIVATIONS)),
        Chain(_SUMS, (_LINEAR_ACTIVATIONS,)),
    ),
    integer=_ARITHMETIC,
    fixed_ranges=_UNIT_RANGES,
)

# TensorRT quantizes what convolutions, linears and products read; everything else runs in floating point. A convolution
# takes the addition behind it into its own kernel, which reads the other branch as integers too.
TENSORRT = replace(
    GENERIC,
    by_category={
        **GENERIC.by_category,
        **dict.fromkeys(
            (_ARITHMETIC | {Category.LOOKUP}) - {Category.JOIN},
            Rule(Action.WHERE_CONSUMED, "TensorRT quantizes only what its integer kernels read"),
        ),
    },
    chains=(
        Chain(frozenset({Category.CONVOLUTION}), (_BATCH_NORM, frozenset({"add"}), _LINEAR_ACTIVATIONS)),
        Chain(frozenset({Category.LINEAR}), (_BATCH_NORM, _LINEAR_ACTIVATIONS)),
        Chain(_SUMS, (_LINEAR_ACTIVATIONS,)),
    ),
    integer=frozenset({Category.CONVOLUTION, Category.LINEAR, Category.MATMUL}),
    fixed_ranges={},
    weights={Category.RECURRENT: None, Category.LOOKUP: None},
)

# TFLite and XNNPACK: pooling keeps the grid, softmax, sigmoid and tanh have the grids of the specification, linear
# weights are per tensor, normalizations and GELU-like functions are computed in floating point.
XNNPACK = replace(
    GENERIC,
    by_category={
        **GENERIC.by_category,
        Category.NORM: _FLOAT,
        Category.NONLINEAR: _FLOAT,
        Category.ATTENTION: _FLOAT,
        Category.RECURRENT: _FLOAT,
        Category.OTHER: _FLOAT,
    },
    by_name={
        "avg_pool2d": Rule(Action.PASS_THROUGH, "average pooling keeps the grid of its input"),
        "adaptive_avg_pool2d": Rule(Action.PASS_THROUGH, "average pooling keeps the grid of its input"),
        "interpolate": Rule(Action.PASS_THROUGH, "resizing keeps the grid of its input"),
        "elu": _QUANTIZE,
        "hardswish": _QUANTIZE,
        "leaky_relu": _QUANTIZE,
        "prelu": _QUANTIZE,
    },
    chains=(
        Chain(_WEIGHTED, (_BATCH_NORM, _TFLITE_ACTIVATIONS)),
        Chain(_SUMS, (_TFLITE_ACTIVATIONS,)),
    ),
    integer=_ARITHMETIC - {Category.NORM, Category.NONLINEAR, Category.ATTENTION, Category.RECURRENT, Category.OTHER},
    fixed_ranges={**_UNIT_RANGES, "softmax": (0.0, 255 / 256), "sigmoid": (0.0, 255 / 256), "tanh": (-1.0, 127 / 128)},
    weights={
        Category.LINEAR: Granularity.PER_TENSOR,
        Category.LOOKUP: Granularity.PER_TENSOR,
        Category.RECURRENT: None,
    },
)

# QNN/HTP: every tensor is on a grid; hard-swish, PReLU and leaky ReLU run inside the convolution's kernel.
QNN = replace(
    GENERIC,
    chains=(
        Chain(_WEIGHTED, (_BATCH_NORM, _LINEAR_ACTIVATIONS | {"hardswish"})),
        Chain(_SUMS, (_LINEAR_ACTIVATIONS,)),
    ),
    weights={Category.LOOKUP: Granularity.PER_TENSOR, Category.RECURRENT: Granularity.PER_TENSOR},
)

RULES: Mapping[Placement, Rules] = {
    Placement.GENERIC: GENERIC,
    Placement.TENSORRT: TENSORRT,
    Placement.XNNPACK: XNNPACK,
    Placement.QNN: QNN,
}

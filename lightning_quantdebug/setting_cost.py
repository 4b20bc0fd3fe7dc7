"""What a mixed-precision setting costs: bytes of weights, bit-operations, and how many quantizers were raised.

Bit-operations of a layer are its multiplications times the bit-width of the weight times that of its input (van Baalen
et al. 2020, Bayesian Bits, section 4.1); of a product of two activations, times the bit-widths of both. What has no
quantizer counts with 32 bits, and so does what fused attention multiplies its values with, which nobody sees.
Everything is for one sample of the recorded shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.interception import OpKey
from lightning_quantdebug.layers import Layer
from lightning_quantdebug.operations import Category, Slot
from lightning_quantdebug.target import Granularity, Kind, QuantSpec
from lightning_quantdebug.topology import Operation, Value

_FLOAT_BITS = 32
_SCALE_BYTES = 4
# Operations that hand their input's numbers on, so that its quantizer is that of the result.
_HANDS_ON = (Category.PASS_THROUGH, Category.JOIN)


@dataclass(frozen=True)
class SettingCost:
    """The cost of one setting of all quantizers.

    Attributes:
        size_bytes: Of the weights with a quantizer, and of their scales.
        bit_operations: Of one sample.
        raised: Quantizers with more bits than the target has.
    """

    size_bytes: float
    bit_operations: float
    raised: int


@dataclass(frozen=True)
class _Product:
    """The multiplications of one operation and whose bits they take: names of quantizers, ``None`` without one."""

    multiplications: float
    factors: tuple[str | None, ...]


class CostModel:
    """Knows the multiplications of a network.

    Args:
        session: With quantizers placed.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_quantdebug.instrument import instrument
        >>> with instrument(nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(2, 8), "w4a8") as q:
        ...     q.calibrate([torch.randn(2, 8)])
        ...     CostModel(q).cost()
        SettingCost(size_bytes=32.0, bit_operations=1024.0, raised=0)
    """

    def __init__(self, session: Instrumentation) -> None:
        """Count the multiplications."""
        self._session = session
        self._sizes = {layer.quantizer.name: math.prod(layer.shape) for layer in session.layers}
        placed = {site.name: site.spec for site in session.plan.sites}
        self._placed_scales = {
            layer.quantizer.name: _scale_count(placed[layer.quantizer.name], layer) for layer in session.layers
        }
        self._products = _products(session)

    def cost(self, widths: Mapping[str, int] | None = None, as_placed: bool = False) -> SettingCost:
        """The cost of the session as it is, or with other bit-widths.

        Args:
            widths: Bit-widths of some quantizers by name, in place of those that they have.
            as_placed: Whether weights have the granularity that the target gave them, not the one they have now.
        """
        known = {name: quantizer.bit_width for name, quantizer in self._session.quantizers.items()} | dict(widths or {})
        size = 0.0
        for name, numel in self._sizes.items():
            encoding = self._session.quantizers[name].encoding
            scales = self._placed_scales[name] if encoding is None or as_placed else encoding.scale.numel()
            size += numel * known[name] / 8 + scales * _SCALE_BYTES
        operations = 0.0
        for product in self._products:
            bits = [_FLOAT_BITS if name is None else known[name] for name in product.factors]
            operations += product.multiplications * math.prod(bits)
        return SettingCost(size, operations, len(self.raised(known)))

    def raised(self, widths: Mapping[str, int]) -> list[str]:
        """The quantizers with more bits than the target has."""
        target, quantizers = self._session.target, self._session.quantizers
        return [name for name, width in widths.items() if width > target.spec(quantizers[name].kind).bit_width]


def _scale_count(spec: QuantSpec, layer: Layer) -> int:
    """How many scales a weight has on a grid."""
    if spec.granularity is Granularity.PER_TENSOR or layer.channel_axis is None:
        return 1
    channels = layer.shape[layer.channel_axis]
    return channels if spec.group_size is None else channels * layer.shape[1] // spec.group_size


def _products(session: Instrumentation) -> list[_Product]:
    """The multiplications of every operation of the first recorded run."""
    shared = session.topology.shared_keys()
    places = _Places(session, shared)
    outputs = session.topology.output_operations()
    samples = max((value.shape[0] for op in outputs for value in op.outputs if value.shape), default=1) or 1
    found = []
    for operation in session.topology.runs[0] if session.topology.runs else []:
        if operation.category is Category.RECURRENT:
            found += _recurrent(operation, places, samples)
            continue
        for count, factors in _multiplied(operation):
            names = tuple(None if one is None else places.of(operation, *one) for one in factors)
            found.append(_Product(count / samples, names))
    return found


def _recurrent(operation: Operation, places: _Places, samples: int) -> list[_Product]:
    """The multiplications of each weight of a recurrent layer, one for each step; the hidden state is in FP32."""
    (slot, data), *others = operation.inputs
    steps = math.prod(data.shape[:-1]) / samples
    weights = [(place, value) for place, value in others if value.from_parameter and len(value.shape) > 1]
    return [
        _Product(
            steps * math.prod(value.shape),
            (places.of(operation, place, value), places.of(operation, slot, data) if index % 2 == 0 else None),
        )
        for index, (place, value) in enumerate(weights)
    ]


class _Places:
    """Which quantizer a value or a weight has."""

    def __init__(self, session: Instrumentation, shared: Mapping[OpKey, OpKey]) -> None:
        self._shared = shared
        self._results: dict[OpKey, str] = {}
        self._arguments: dict[tuple[OpKey, Slot], str] = {}
        for site in session.plan.sites:
            for spot in site.places:
                if spot.slot is not None:
                    self._arguments[spot.key, spot.slot] = site.name
                elif site.kind is Kind.ACTIVATION:
                    self._results[spot.key] = site.name
        self._folds = session.plan.folded_into

    def of(self, operation: Operation, slot: Slot, value: Value) -> str | None:
        """Name of the quantizer that an operation's input has passed."""
        own = self._arguments.get((self._shared[operation.key], slot))
        if own is not None or value.producer is None:
            return own
        source: Operation | None = value.producer
        while source is not None:
            name = self._results.get(self._shared[source.key])
            if name is None and source.category is Category.LOOKUP:
                # What is looked up lies on the grid of the table.
                slots = [(self._shared[source.key], slot) for slot, _ in source.inputs]
                return next((self._arguments[one] for one in slots if one in self._arguments), None)
            if name is not None or not _hands_on(source):
                return name
            slot, before = source.data_inputs[0]
            own = self._arguments.get((self._shared[source.key], slot))
            if own is not None:
                return own
            source = before.producer
        return None


def _hands_on(operation: Operation) -> bool:
    """Whether an operation leaves numbers on the grid of its first data input: moves them, or scales them all alike."""
    scales = operation.category is Category.MULTIPLY and len(operation.data_inputs) == 1
    return bool(operation.data_inputs) and (operation.category in _HANDS_ON or scales)


_Operand = tuple[Slot, Value]
_Multiplied = tuple[float, tuple[_Operand | None, ...]]


def _multiplied(operation: Operation) -> list[_Multiplied]:
    """The matrix products of an operation: multiplications on the recorded batch, and what is multiplied.

    ``None`` stands for what is computed inside the operation.
    """
    floating = [(slot, value) for slot, value in operation.inputs if value.floating]
    equation = str(operation.arguments.get("args", ""))
    if operation.op == "einsum" and "," in equation:
        return [(_of_einsum(equation, [value.shape for _, value in floating]), tuple(floating[:2]))]
    matrices = [(slot, value) for slot, value in floating if len(value.shape) > 1]
    if operation.op in ("addmm", "addbmm", "baddbmm"):
        # The first argument is added.
        matrices = matrices[-2:]
    if len(matrices) < 2 or not operation.outputs:
        return []
    result = math.prod(operation.outputs[0].shape)
    one, other = (value.shape for _, value in matrices[:2])
    if operation.category is Category.ATTENTION and len(matrices) > 2:
        scores = math.prod(one[:-1]) * other[-2]
        values = matrices[2]
        return [(scores * one[-1], tuple(matrices[:2])), (scores * values[1].shape[-1], (None, values))]
    count = _multiplications(operation, result, one, other)
    return [(count, tuple(matrices[:2]))] if count else []


def _multiplications(operation: Operation, result: int, one: tuple[int, ...], other: tuple[int, ...]) -> float:
    """Multiplications of two matrices, or of an input and a weight; 0 for what does not multiply matrices."""
    if operation.category is Category.CONVOLUTION:
        if "transpose" in operation.op:
            return math.prod(one) * math.prod(other) / other[0]
        return result * math.prod(other) / other[0]
    if operation.op == "tensordot":
        # Of M, K and N indices alone in one, in both and alone in the other: MK times KN times MN is (MKN) squared.
        return math.sqrt(math.prod(one) * math.prod(other) * result)
    if operation.op == "addbmm":
        # The products of all pairs are added up.
        return math.prod(one) * other[-1]
    return float(result * one[-1]) if operation.category in (Category.LINEAR, Category.MATMUL) else 0.0


def _of_einsum(equation: str, shapes: Sequence[tuple[int, ...]]) -> float:
    """Multiplications of an Einstein sum: one for each value that all its indices together can take."""
    sizes: dict[str, int] = {}
    for term, shape in zip(equation.split("->")[0].replace(" ", "").split(","), shapes, strict=False):
        head, _, tail = term.partition("...")
        hidden = [f"...{number}" for number in range(len(shape) - len(head) - len(tail), 0, -1)]
        for name, size in zip([*head, *hidden, *tail], shape, strict=True):
            sizes[name] = max(size, sizes.get(name, 1))
    return float(math.prod(sizes.values()))

"""What pictures show of guilty tensors and of predictions: plain values, bounded in number, part of the report.

Pictures are drawn from these records alone, so that a report can be rendered again on another machine, years later,
without the model. Everything here is cut to a size that a person can look at; the totals say what was left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TensorState:
    """One tensor at one moment of the walk, in units of the tensor.

    Attributes:
        step: The step of the walk after which it was looked at (a value of ``StepName``); ``fp32_check`` is the tensor
            as the target quantizes it, before any remedy.
        bit_width: Bits of one value.
        granularity: ``per_tensor``, ``per_channel`` or ``per_group``.
        low: Least value of each shown channel, in FP32.
        high: Greatest value of each shown channel, in FP32.
        clip_low: Low end of the clipping range of each shown channel.
        clip_high: High end of the clipping range of each shown channel.
        channel_sqnr_db: SQNR of each shown channel, in dB; ``None`` where it is infinite or not known.
        sqnr_db: SQNR of the whole tensor, in dB.
        clipping: Mean squared error of the values beyond the clipping range.
        rounding: Mean squared error of all others, over all values.
        edges: Edges of the histogram's ``B`` equal bins, ``B + 1`` of them.
        fp32: Counts of the FP32 values, ``B`` of them.
        quantized: Counts of the quantized values, ``B`` of them.
        grid: The values of the grid within the edges, where they are few enough to be drawn; else empty.
        scale: Grid step, the largest of all channels.
        values: Values that were looked at.
    """

    step: str
    bit_width: int
    granularity: str
    low: tuple[float, ...]
    high: tuple[float, ...]
    clip_low: tuple[float, ...]
    clip_high: tuple[float, ...]
    channel_sqnr_db: tuple[float | None, ...]
    sqnr_db: float | None
    clipping: float
    rounding: float
    edges: tuple[float, ...]
    fp32: tuple[int, ...]
    quantized: tuple[int, ...]
    grid: tuple[float, ...]
    scale: float
    values: int


@dataclass(frozen=True)
class HeatMap:
    """Greatest magnitudes of a tensor by two of its axes, rows by columns.

    Attributes:
        rows: What a row is: ``token`` or ``embedding``.
        columns: What a column is: ``channel`` or ``dimension``.
        row_indices: Which rows are shown; the most extreme ones where there are too many, in their order.
        column_indices: Which columns are shown.
        values: Greatest magnitude in FP32, in units of the tensor, one tuple for each row.
        noise: Root mean squared error of quantizing, of the same shape.
        total_rows: Rows of the tensor.
        total_columns: Columns of the tensor.
    """

    rows: str
    columns: str
    row_indices: tuple[int, ...]
    column_indices: tuple[int, ...]
    values: tuple[tuple[float, ...], ...]
    noise: tuple[tuple[float, ...], ...]
    total_rows: int
    total_columns: int


@dataclass(frozen=True)
class TensorView:
    """One guilty tensor.

    Attributes:
        quantizer: Its name.
        kind: ``weight`` or ``activation``.
        why: Why it is shown: the cause that a finding names, or ``guilty`` or ``most damage`` of the analysis.
        channel_axis: What a channel is: ``output channel``, ``channel``, ``row`` or ``value`` (no channels).
        channels: Indices of the shown channels; the widest and narrowest where there are too many, in their order.
        total_channels: Channels of the tensor.
        states: The tensor at moments of the walk, in its order; the last one is as the walk left it.
        heat_map: By token and channel, or by embedding and dimension; ``None`` where the tensor has no such axes.
    """

    quantizer: str
    kind: str
    why: str
    channel_axis: str
    channels: tuple[int, ...]
    total_channels: int
    states: tuple[TensorState, ...]
    heat_map: HeatMap | None = None


@dataclass(frozen=True)
class Flip:
    """One sample whose predicted class quantization has changed.

    Attributes:
        sample: Its place in the validation data, in the order in which it was seen, on the first device.
        label: The true class, ``None`` where the batch holds none.
        fp32: The class that FP32 predicts.
        quantized: The class that the quantized model predicts.
        fp32_probability: Probability of FP32 for the class that it predicts.
        quantized_probability: Probability of the quantized model for the class that it predicts.
        picture: The sample as PNG in base64; empty where the input is no image.
    """

    sample: int
    label: int | None
    fp32: int
    quantized: int
    fp32_probability: float
    quantized_probability: float
    picture: str = ""


@dataclass(frozen=True)
class Predictions:
    """How quantization moves the predicted classes.

    Attributes:
        step: The step of the walk after which the quantized model was looked at, as in :class:`TensorState`.
        samples: Predictions that were compared.
        flipped: Those whose class has changed.
        fp32_correct: Predictions of FP32 that are right; ``None`` where the batches hold no labels.
        quantized_correct: Predictions of the quantized model that are right.
        lost: Right in FP32 and wrong quantized.
        won: Wrong in FP32 and right quantized.
        classes: Indices of the shown classes; those with most flips where there are too many, in their order.
        total_classes: Classes of the output.
        shift: How many samples of an FP32 class (row) are put into which class (column) by the quantized model, for the
            shown classes.
        flips: Some of the flipped samples, those that FP32 was surest of first.
    """

    step: str
    samples: int
    flipped: int
    fp32_correct: int | None
    quantized_correct: int | None
    lost: int | None
    won: int | None
    classes: tuple[int, ...]
    total_classes: int
    shift: tuple[tuple[int, ...], ...]
    flips: tuple[Flip, ...] = ()


@dataclass(frozen=True)
class Visuals:
    """All that pictures are drawn from, beyond the rest of the report.

    Attributes:
        tensors: The guilty tensors, the most important first.
        predictions: The classes at moments of the walk, in its order; empty where the output is no set of classes.
    """

    tensors: tuple[TensorView, ...] = ()
    predictions: tuple[Predictions, ...] = field(default=())

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Visuals:
        """Rebuild the records from their plain values, as ``report.json`` holds them.

        Raises:
            TypeError: If a field is missing or unknown.
        """
        return cls(
            tuple(_tensor_from(item) for item in values["tensors"]),
            tuple(_predictions_from(item) for item in values["predictions"]),
        )


def _tuples(value: Any) -> Any:
    """Lists as tuples, at every depth."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _record(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a record, with tuples for lists."""
    return {name: _tuples(value) for name, value in values.items()}


def _tensor_from(values: Mapping[str, Any]) -> TensorView:
    """One guilty tensor."""
    states = tuple(TensorState(**_record(item)) for item in values["states"])
    heat_map = values["heat_map"]
    return TensorView(
        **{
            **_record(values),
            "states": states,
            "heat_map": None if heat_map is None else HeatMap(**_record(heat_map)),
        }
    )


def _predictions_from(values: Mapping[str, Any]) -> Predictions:
    """The classes at one moment."""
    return Predictions(**{**_record(values), "flips": tuple(Flip(**item) for item in values["flips"])})

"""Looks at the guilty tensors at moments of the walk: ranges per channel, histograms, noise, tokens and embeddings.

A moment is a state of the session that the walk went through. The session is put into each of them, the tensors are
seen as the network computes them in FP32 there (folded and equalized, as far as remedies have gone), and put on the
grid as it was there. So before and after a repair are the same samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_quantdebug.activation_symptoms import channel_axis
from lightning_quantdebug.instrumentation import Instrumentation, SessionState
from lightning_quantdebug.layers import Layer, Runs
from lightning_quantdebug.noise import sqnr_db
from lightning_quantdebug.quantizer import Quantizer
from lightning_quantdebug.report import StepName
from lightning_quantdebug.target import Kind
from lightning_quantdebug.tensor_probes import samples_first, shown
from lightning_quantdebug.visuals import HeatMap, TensorState, TensorView
from lightning_quantdebug.weight_symptoms import MOST_BATCHES

MOST_CHANNELS = 48
"""Of a tensor: as many bars can be told apart in a picture of 400 pixels."""

MOST_ROWS, MOST_COLUMNS = 32, 64
"""Of a heat map, for the same reason."""

MOST_BINS = 64
"""Of a histogram; TensorBoard draws 30 of them."""

MOST_LEVELS = 64
"""Levels of a grid that can still be drawn as lines."""

MOST_VALUES = 1 << 18
"""Of one tensor at one moment: enough that one value in 10,000 shows in a histogram."""

_DIGITS = 5
# Significant digits of what a picture is drawn from: a pixel is worth three.


@dataclass(frozen=True, eq=False)
class Moment:
    """A state that the walk went through.

    Attributes:
        step: The step after which the session was in it.
        state: The session's state.
    """

    step: StepName
    state: SessionState


def tensor_views(
    session: Instrumentation,
    runs: Runs,
    names: Mapping[str, str],
    moments: Sequence[Moment],
    known: Sequence[TensorView] = (),
) -> tuple[TensorView, ...]:
    """Look at some tensors at some moments, in one run of the network for each moment and each of the first batches.

    Args:
        session: Calibrated, and left as it was.
        runs: Batches of validation.
        names: Names of the quantizers, each with why it is looked at.
        moments: The states to look at, in their order.
        known: What earlier moments have shown: new ones are added, on the same channels.

    Returns:
        One view for each quantizer that was reached, in the order of ``names``.

    Examples:
        >>> from torch import nn
        >>> from lightning_quantdebug.instrument import batch_runs, instrument
        >>> model, batch = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval(), torch.randn(64, 4)
        >>> with torch.no_grad(), instrument(model, batch, "w4a8_per_tensor") as q:
        ...     q.calibrate([batch])
        ...     moment = Moment(StepName.FP32_CHECK, q.state())
        ...     (view,) = tensor_views(q, batch_runs(q, [batch]), {"0.weight": "guilty"}, [moment])
        >>> view.channel_axis, view.total_channels, len(view.states[0].grid)
        ('output channel', 3, 16)
    """
    present = {name: why for name, why in names.items() if name in session.quantizers}
    axes = {name: channel_axis(session, name) for name in present if _is_activation(session, name)}
    looks = [{name: _Look() for name in present} for _ in moments]
    before = session.state()

    def visit(run: Callable[[], Any], index: int) -> None:
        try:
            for moment, seen in zip(moments, looks, strict=True):
                session.restore(moment.state)
                _take(session, run, seen, axes, index == 0)
        finally:
            session.restore(before)

    if present and moments:
        runs(visit, MOST_BATCHES)
    earlier = {view.quantizer: view for view in known}
    steps = [moment.step.value for moment in moments]
    views = [
        _view(session.quantizers[name], why, steps, [seen[name] for seen in looks], earlier.get(name))
        for name, why in present.items()
    ]
    return tuple(view for view in views if view is not None)


def _is_activation(session: Instrumentation, name: str) -> bool:
    """Whether a quantizer sits on an activation."""
    return session.quantizers[name].kind is Kind.ACTIVATION


# Seeing.


@dataclass
class _Look:
    """What was seen of one tensor at one moment: ranges of all values, and a sample of them by channel."""

    setting: tuple[int, str, float] | None = None
    axis: str = "value"
    low: Tensor = field(default_factory=lambda: torch.empty(0))
    high: Tensor = field(default_factory=lambda: torch.empty(0))
    ends: tuple[Tensor, Tensor] = field(default_factory=lambda: (torch.empty(0), torch.empty(0)))
    grid: tuple[float, ...] = ()
    exact: list[Tensor] = field(default_factory=list)
    quantized: list[Tensor] = field(default_factory=list)
    clipped: list[Tensor] = field(default_factory=list)
    map_of: tuple[str, str] | None = None
    peak: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    squares: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    count: Tensor = field(default_factory=lambda: torch.empty(0, 0))

    def take(self, x: Tensor, quantized: Tensor, quantizer: Quantizer, axis: int | None, most: int) -> None:
        """Take in one tensor, in FP32 and on the grid; one with another number of channels is left out."""
        x, quantized = (_finite(each) for each in (x, quantized))
        rows, on_grid = (_by_channel(each, axis) for each in (x, quantized))
        if rows.shape[1] == 0 or (self.low.numel() and self.low.numel() != rows.shape[0]):
            return
        low, high = rows.amin(1).cpu(), rows.amax(1).cpu()
        self.low = torch.minimum(self.low, low) if self.low.numel() else low
        self.high = torch.maximum(self.high, high) if self.high.numel() else high
        columns = _some_columns(rows, most)
        ends = self._ends_of(quantizer, rows.shape[0], axis)
        begin, end = (_spread(each.to(rows.device), rows.shape[1], columns) for each in ends)
        rows, on_grid = rows[:, columns], on_grid[:, columns]
        self.exact.append(rows.cpu())
        self.quantized.append(on_grid.cpu())
        self.clipped.append(((rows < begin) | (rows > end)).cpu())

    def _ends_of(self, quantizer: Quantizer, channels: int, axis: int | None) -> tuple[Tensor, Tensor]:
        """The ends of the grid of each channel, or of each group of it; what the picture shows of them is kept."""
        encoding = quantizer.encoding
        assert encoding is not None
        low, high = encoding.range_min.detach().float(), encoding.range_max.detach().float()
        if encoding.channel_axis != axis:
            low, high = low.amin(), high.amax()
        of_channel = (low.amin(1), high.amax(1)) if low.ndim == 2 else (low, high)
        self.ends = (of_channel[0].expand(channels).cpu(), of_channel[1].expand(channels).cpu())
        spec = quantizer.spec
        self.setting = (spec.bit_width, spec.granularity.value, float(encoding.scale.max()))
        if encoding.scale.ndim == 0 and encoding.num_levels <= MOST_LEVELS:
            steps = torch.arange(encoding.num_levels, dtype=torch.float64) + float(encoding.lowest_step)
            self.grid = _rounded(steps * float(encoding.scale))
        return low, high

    def take_map(self, x: Tensor, quantized: Tensor, names: tuple[str, str]) -> None:
        """Take in magnitudes and errors by two axes, shape ``(N, R, C)``; what is longer than before adds rows."""
        if self.map_of is not None and self.peak.shape[1] != x.shape[2]:
            return
        self.map_of = names
        peak, squares = x.abs().amax(0).float().cpu(), (quantized - x).double().square().sum(0).float().cpu()
        count = torch.full_like(peak, x.shape[0])
        longer = max(peak.shape[0], self.peak.shape[0])
        old = [_padded(each, longer, peak.shape[1]) for each in (self.peak, self.squares, self.count)]
        new = [_padded(each, longer, peak.shape[1]) for each in (peak, squares, count)]
        self.peak, self.squares, self.count = torch.maximum(old[0], new[0]), old[1] + new[1], old[2] + new[2]


def _finite(x: Tensor) -> Tensor:
    """The values in float32 at least, with 0 for what is no number."""
    values = x.detach()
    values = values.reshape(1) if values.ndim == 0 else values
    return values.to(torch.promote_types(values.dtype, torch.float32)).nan_to_num(0.0, 0.0, 0.0)


def _by_channel(x: Tensor, axis: int | None) -> Tensor:
    """Shape ``(C, K)``; of a tensor without channels ``(1, K)``."""
    if axis is None or x.ndim < 2:
        return x.reshape(1, -1)
    rows = x.movedim(axis, 0)
    return rows.reshape(rows.shape[0], -1)


def _some_columns(rows: Tensor, most: int) -> Tensor:
    """Indices of the columns that are kept, all or drawn with a fixed seed."""
    size, fits = rows.shape[1], max(1, most // rows.shape[0])
    if size <= fits:
        return torch.arange(size, device=rows.device)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, size, (fits,), generator=generator).sort().values.to(rows.device)


def _spread(end: Tensor, width: int, columns: Tensor) -> Tensor:
    """An end of the grid as it holds for each value of ``(C, width)``, for the chosen columns."""
    if end.ndim < 2:
        return end.reshape(-1, 1)
    return end.repeat_interleave(width // end.shape[1], 1)[:, columns]


def _padded(x: Tensor, rows: int, columns: int) -> Tensor:
    """A map with as many rows, those that it lacks being 0."""
    if x.numel() == 0:
        return torch.zeros(rows, columns)
    return torch.nn.functional.pad(x, (0, 0, 0, rows - x.shape[0]))


def _take(
    session: Instrumentation, run: Callable[[], Any], seen: Mapping[str, _Look], axes: Mapping[str, int], first: bool
) -> None:
    """Look at all tensors of one moment in one run; weights are the same for all batches."""
    views = {
        name: partial(_take_activation, seen[name], session.quantizers[name], axis, samples_first(session, name))
        for name, axis in axes.items()
        if session.quantizers[name].is_calibrated
    }
    with shown(session, views):
        run()
    if not first:
        return
    weights = session.effective_weights(run)
    for layer in session.layers:
        look = seen.get(layer.quantizer.name)
        if look is not None and not look.exact and layer.quantizer.is_calibrated:
            known = weights.get(layer.key)
            _take_weight(session, layer, look, None if known is None else known[0])


def _take_activation(look: _Look, quantizer: Quantizer, axis: int, turn: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Look at an activation in FP32 and as it is on the grid."""
    quantized = quantizer.quantized(x)
    look.axis = "channel" if x.ndim >= 2 else "value"
    look.take(x, quantized, quantizer, axis if x.ndim >= 2 else None, MOST_VALUES // MOST_BATCHES)
    if x.ndim == 3 and axis == -1:
        look.take_map(turn(_finite(x)), turn(_finite(quantized)), ("token", "channel"))


def _take_weight(session: Instrumentation, layer: Layer, look: _Look, weight: Tensor | None) -> None:
    """Look at a weight as the network has it in FP32 at this moment, and as it is on the grid."""
    weight = session.tensors.get(layer.quantizer.name) if weight is None else weight
    if weight is None:
        return
    adjustment = session.adjustments.get(layer.key)
    correction = None if adjustment is None else adjustment.weight_correction
    moved = weight if correction is None else weight + correction.to(weight.device, weight.dtype)
    quantized = layer.quantizer.quantized(moved)
    embeds = layer.op == "embedding"
    axis = 1 if embeds else layer.channel_axis
    look.axis = "dimension" if embeds else "value" if axis is None else "output channel"
    look.take(weight, quantized, layer.quantizer, axis, MOST_VALUES)
    if embeds and weight.ndim == 2:
        look.take_map(_finite(weight)[None], _finite(quantized)[None], ("embedding", "dimension"))


# Showing.


def _view(
    quantizer: Quantizer, why: str, steps: Sequence[str], looks: Sequence[_Look], known: TensorView | None
) -> TensorView | None:
    """What was seen of one tensor at all moments; ``None`` if it was never reached."""
    reached = [(step, look) for step, look in zip(steps, looks, strict=True) if look.exact]
    if not reached:
        return known
    first = reached[0][1]
    total = first.low.numel()
    if known is None:
        channels = _most_telling(first.high - first.low, MOST_CHANNELS)
        states = tuple(_state(step, look, channels) for step, look in reached)
        return TensorView(
            quantizer.name, quantizer.kind.value, why, first.axis, channels, total, states, _heat_map(first)
        )
    if known.total_channels != total:
        return known
    return replace(known, states=(*known.states, *(_state(step, look, known.channels) for step, look in reached)))


def _most_telling(width: Tensor, most: int) -> tuple[int, ...]:
    """Indices of the widest channels and of the narrowest, in their order; all where they are few."""
    if width.numel() <= most:
        return tuple(range(width.numel()))
    order = width.argsort(stable=True)
    return tuple(sorted(torch.cat([order[: most // 4], order[-(most - most // 4) :]]).tolist()))


def _state(step: str, look: _Look, channels: tuple[int, ...]) -> TensorState:
    """What a picture shows of one tensor at one moment."""
    assert look.setting is not None
    exact, quantized, clipped = (torch.cat(parts, 1) for parts in (look.exact, look.quantized, look.clipped))
    error = (quantized - exact).double().square()
    index = torch.tensor(channels)
    edges = _edges(exact, quantized)
    bit_width, granularity, scale = look.setting
    return TensorState(
        step=step,
        bit_width=bit_width,
        granularity=granularity,
        low=_rounded(look.low[index]),
        high=_rounded(look.high[index]),
        clip_low=_rounded(look.ends[0][index]),
        clip_high=_rounded(look.ends[1][index]),
        channel_sqnr_db=tuple(_decibels(sqnr_db(exact[i], quantized[i])) for i in channels),
        sqnr_db=_decibels(sqnr_db(exact, quantized)),
        clipping=float(error[clipped].sum()) / error.numel(),
        rounding=float(error[~clipped].sum()) / error.numel(),
        edges=_rounded(edges),
        fp32=_counts(exact, edges),
        quantized=_counts(quantized, edges),
        grid=look.grid,
        scale=scale,
        values=exact.numel(),
    )


def _edges(exact: Tensor, quantized: Tensor) -> Tensor:
    """Edges of equal bins over all values, in float64; of a constant tensor a bin around it."""
    low = float(min(exact.min(), quantized.min()))
    high = float(max(exact.max(), quantized.max()))
    if high <= low:
        low, high = low - max(abs(low), 1e-6) / 2, high + max(abs(high), 1e-6) / 2
    return torch.linspace(low, high, MOST_BINS + 1, dtype=torch.float64)


def _counts(values: Tensor, edges: Tensor) -> tuple[int, ...]:
    """How many values lie in each bin; the last one holds its right edge."""
    inner = edges[1:-1].contiguous()
    bins = torch.bucketize(values.double().flatten().contiguous(), inner, right=True)
    return tuple(torch.bincount(bins, minlength=len(edges) - 1).tolist())


def _heat_map(look: _Look) -> HeatMap | None:
    """The most extreme rows and columns, in their order."""
    if look.map_of is None or look.peak.numel() == 0:
        return None
    rows, columns = _greatest(look.peak.amax(1), MOST_ROWS), _greatest(look.peak.amax(0), MOST_COLUMNS)
    noise = (look.squares / look.count.clamp(min=1)).sqrt()
    return HeatMap(
        rows=look.map_of[0],
        columns=look.map_of[1],
        row_indices=tuple(rows.tolist()),
        column_indices=tuple(columns.tolist()),
        values=tuple(_rounded(row) for row in look.peak[rows][:, columns]),
        noise=tuple(_rounded(row) for row in noise[rows][:, columns]),
        total_rows=look.peak.shape[0],
        total_columns=look.peak.shape[1],
    )


def _greatest(values: Tensor, most: int) -> Tensor:
    """Indices of the greatest values, in their order."""
    return values.argsort(descending=True, stable=True)[:most].sort().values


def _rounded(values: Tensor) -> tuple[float, ...]:
    """As many digits as a picture can show."""
    return tuple(float(f"{value:.{_DIGITS}g}") for value in values.tolist())


def _decibels(value: float) -> float | None:
    """Decibels with two digits behind the point; ``None`` where they are infinite or unknown."""
    return round(value, 2) if abs(value) < float("inf") else None

"""What ails the activations: which quantizers spoil the output, and how much each possible cause costs, in dB.

How guilty a quantizer is can not be told from its tensor: an outlier that no later layer looks at makes the signal look
strong and the noise harmless. So each quantizer is switched on alone for one batch, and what counts is how far the
network's output moves. Of the guiltiest, the distribution is then looked at: a cause is worth what the rounding noise
would fall by without it, and halving the range that the grid has to cover is worth 6 dB, whatever the bit-width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from lightning_quantdebug.distribution import ChannelStatistics, clipping_and_rounding, range_ratios
from lightning_quantdebug.encoding import encoding_from_range
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.layers import Runs
from lightning_quantdebug.observer import Histogram, Observer
from lightning_quantdebug.operations import Category
from lightning_quantdebug.quantizer import Quantizer
from lightning_quantdebug.range_setting import range_from_observer
from lightning_quantdebug.target import Kind, Mode, RangeSetting
from lightning_quantdebug.topology import Operation
from lightning_quantdebug.weight_symptoms import MOST_BATCHES, decibels

BULK = 0.999
"""Share of the values that are the bulk: an outlier is one of the rarest in a thousand."""


@dataclass(frozen=True)
class ActivationSymptoms:
    """What was measured of one quantizer. Gains are in dB of its noise, 0 where nothing would be gained.

    Attributes:
        quantizer: Its name.
        bit_width: Its bits.
        damage: How far it alone moves the network's output, as :func:`damage` has it, in [0, 1].
        clipping_share: Share of the quantizer's noise that is due to clipping.
        range_gain: With the range of least squared error.
        bulk_gain: With a range for the bulk of the values, rounding noise alone.
        bulk: The range of the bulk.
        unused_gain: With a grid that ends where the values end.
        short_levels: Levels of the grid on the side of 0 with fewer of them, where values lie on both sides.
        short_share: Share of the values on that side.
        outlier_channels: The channels that carry the range, ``()`` where no few do.
        outlier_gain: Without those channels, rounding noise alone.
        uneven_gain: With the range of the median channel, rounding noise alone.
        kurtosis: Of the values of the median channel: 1.8 if uniform, 3 if normal, more with heavy tails; ``None``
            where there are no channels.
        channels: How many channels there are.
        dead: Channels that are 0 throughout.
        is_output: Whether the network returns it, so that no later layer can make up for anything.
        observed: Least and greatest value.
    """

    quantizer: str
    bit_width: int
    damage: float
    clipping_share: float = 0.0
    range_gain: float = 0.0
    bulk_gain: float = 0.0
    bulk: tuple[float, float] = (0.0, 0.0)
    unused_gain: float = 0.0
    short_levels: int = 0
    short_share: float = 0.0
    outlier_channels: tuple[int, ...] = ()
    outlier_gain: float = 0.0
    uneven_gain: float = 0.0
    kurtosis: float | None = None
    channels: int = 1
    dead: tuple[int, ...] = ()
    is_output: bool = False
    observed: tuple[float, float] = (0.0, 0.0)


def activation_symptoms(
    session: Instrumentation, runs: Runs, most: int, least_share: float = 0.25
) -> list[ActivationSymptoms]:
    """Find the quantizers of activations that move the output most, and measure what ails them.

    Runs the network once for each quantizer on the first batch, and once on each of the first few batches.

    Args:
        session: Calibrated. Modes, observers and encodings are as before afterwards.
        runs: The calibration batches.
        most: How many quantizers to look at.
        least_share: Those with a smaller share of the first one's damage are left out.

    Returns:
        The guiltiest first.
    """
    damages = damages_of(session, runs)
    ranked = sorted(damages, key=lambda name: -damages[name])[:most]
    guilty = [name for name in ranked if damages[name] >= max(least_share * damages[ranked[0]], 1e-30)]
    return symptoms_of(session, runs, {name: damages[name] for name in guilty})


def symptoms_of(session: Instrumentation, runs: Runs, damages: Mapping[str, float]) -> list[ActivationSymptoms]:
    """Measure what ails some quantizers of activations, in one run of each of the first few batches.

    Args:
        session: Calibrated, and left as it was.
        runs: The batches.
        damages: The damage of each quantizer, by its name.

    Returns:
        In the order of ``damages``.
    """
    axes = {name: channel_axis(session, name) for name in damages}
    statistics = _channel_statistics(session, runs, axes)
    returned = _returned(session)
    return [
        _symptoms(session.quantizers[name], moved, statistics.get(name), name in returned)
        for name, moved in damages.items()
    ]


def damage(exact: Tensor, quantized: Tensor) -> float:
    """How far an output moves, in units of what two samples of it differ by.

    The mean of ``min(|y' - y| / t, 1)`` with ``t`` the median difference of neighbours in the batch. What most outputs
    are like decides, neither one with a huge range nor a few spoilt ones. (SQNR would be decided by one output that is
    a hundred times greater than the others.)

    Args:
        exact: The output in FP32, shape ``(N, *)``.
        quantized: The same output with quantizers on.

    Returns:
        A share in [0, 1]; 1 where a value is no longer finite.

    Examples:
        >>> from torch import tensor
        >>> damage(tensor([[0.0, 1.0], [2.0, 3.0]]), tensor([[0.5, 1.5], [2.5, 9.0]]))
        0.4375
    """
    exact, quantized = exact.double(), quantized.double()
    error = (quantized - exact).abs()
    if not error.numel() or not bool(error.any()):
        return 0.0
    apart = (exact - exact.roll(1, 0)).abs() if exact.ndim and exact.shape[0] > 1 else exact.abs()
    unit = float(apart.median()) or float(apart.mean())
    if unit == 0.0 or not math.isfinite(unit):
        return 1.0
    return float((error / unit).nan_to_num(1.0, 1.0).clamp(max=1.0).mean())


def damages_of(session: Instrumentation, runs: Runs, names: Collection[str] | None = None) -> dict[str, float]:
    """The damage of quantizers of activations, each switched on alone for the first batch.

    Args:
        session: Calibrated, and left as it was.
        runs: The batches.
        names: Which; ``None``: all.
    """
    found: dict[str, float] = {}

    def visit(run: Callable[[], Any], index: int) -> None:
        with session.modes(Mode.BYPASS):
            exact = session.outputs(run)
            for quantizer in _calibrated(session):
                if names is not None and quantizer.name not in names:
                    continue
                quantizer.mode = Mode.QUANTIZE
                moved = session.outputs(run)
                quantizer.mode = Mode.BYPASS
                found[quantizer.name] = max((damage(y, moved[name]) for name, y in exact.items()), default=0.0)

    runs(visit, 1)
    return found


def _calibrated(session: Instrumentation) -> list[Quantizer]:
    """The quantizers of activations that have a range."""
    return [quantizer for quantizer in session.select(kind=Kind.ACTIVATION) if quantizer.is_calibrated]


class _Watch(Observer):
    """An observer that keeps the statistics of channels instead of a histogram.

    A quantizer that joined tensors share may meet several numbers of channels: each has its own statistics.
    """

    def __init__(self, axis: int) -> None:
        """Begin with nothing seen."""
        super().__init__()
        self.axis = axis
        self.statistics: dict[int, ChannelStatistics] = {}

    def observe(self, x: Tensor) -> None:
        """Take in one batch; a tensor without the axis has no channels."""
        if x.ndim >= 2:
            found = self.statistics.setdefault(x.shape[self.axis], ChannelStatistics(self.axis))
            found.observe(x)


@contextmanager
def _watching(session: Instrumentation, axes: Mapping[str, int]) -> Iterator[dict[str, _Watch]]:
    """The named quantizers observe channels, all others are bypassed, until the block ends."""
    watches = {name: _Watch(axis) for name, axis in axes.items()}
    before = {name: session.quantizers[name].observer for name in watches}
    with session.modes(Mode.BYPASS):
        try:
            for name, watch in watches.items():
                session.quantizers[name].observer = watch
                session.quantizers[name].mode = Mode.OBSERVE
            yield watches
        finally:
            for name, observer in before.items():
                session.quantizers[name].observer = observer


def _channel_statistics(session: Instrumentation, runs: Runs, axes: Mapping[str, int]) -> dict[str, ChannelStatistics]:
    """Statistics of the channels of some quantizers' tensors; of several numbers of channels, those of most values."""

    def visit(run: Callable[[], Any], index: int) -> None:
        run()

    with _watching(session, axes) as watches:
        runs(visit, MOST_BATCHES)
    return {
        name: max(watch.statistics.values(), key=lambda found: float(found.count.sum()))
        for name, watch in watches.items()
        if watch.statistics
    }


def channel_axis(session: Instrumentation, name: str) -> int:
    """Axis of the channels of what a quantizer sees: 1 behind or ahead of a convolution, else the last one."""
    places = [spot for site in session.plan.sites if site.name == name for spot in site.places]
    keys, shared = {spot.key for spot in places}, session.topology.shared_keys()
    pending = [operation for operation in session.topology if shared[operation.key] in keys]
    seen: set[int] = set()
    while pending:
        operation = pending.pop(0)
        if id(operation) in seen:
            continue
        seen.add(id(operation))
        if operation.category in (Category.CONVOLUTION, Category.BATCH_NORM):
            return 1
        if operation.category in (Category.LINEAR, Category.NORM, Category.LOOKUP, Category.RECURRENT):
            return -1
        pending += [value.producer for _, value in operation.data_inputs if value.producer is not None]
    return -1


def _returned(session: Instrumentation) -> set[str]:
    """Names of the quantizers on what the network returns and does not use itself."""
    shared = session.topology.shared_keys()
    last = {shared[op.key] for op in session.topology.output_operations() if not _is_read(op)}
    return {site.name for site in session.plan.sites for spot in site.places if spot.slot is None and spot.key in last}


def _is_read(operation: Operation) -> bool:
    """Whether an operation of the network reads a result."""
    return any(value.consumers for value in operation.outputs)


def _symptoms(
    quantizer: Quantizer, moved: float, statistics: ChannelStatistics | None, is_output: bool
) -> ActivationSymptoms:
    """What the histogram and the channels of one quantizer's tensor say."""
    encoding, observer = quantizer.encoding, quantizer.observer
    assert encoding is not None
    known = ActivationSymptoms(quantizer.name, quantizer.bit_width, moved, is_output=is_output)
    if observer.count == 0 or not bool(observer.histogram.counts.any()):
        return known
    histogram, low, high = observer.histogram, observer.range_min, observer.range_max
    clipping, rounding = clipping_and_rounding(histogram, encoding)
    best = encoding_from_range(
        *range_from_observer(observer, replace(quantizer.spec, range_setting=RangeSetting.MSE)), quantizer.spec
    )
    bulk = bulk_range(histogram, low, high)
    known = replace(
        known,
        clipping_share=clipping / (clipping + rounding) if clipping + rounding > 0 else 0.0,
        range_gain=decibels(clipping + rounding, sum(clipping_and_rounding(histogram, best))),
        bulk_gain=width_gain((low, high), bulk),
        bulk=bulk,
        unused_gain=width_gain((float(encoding.range_min), float(encoding.range_max)), (low, high)),
        observed=(low, high),
        **_short_side(histogram, quantizer),
    )
    return known if statistics is None else replace(known, **_of_channels(statistics))


def width_gain(whole: tuple[float, float], part: tuple[float, float]) -> float:
    """What rounding noise falls by, in dB, if the grid covers ``part`` instead of ``whole``; both are widened to 0.

    Examples:
        >>> round(width_gain((-1.0, 7.0), (0.5, 4.0)), 2)
        6.02
    """
    widths = [max(high, 0.0) - min(low, 0.0) for low, high in (whole, part)]
    return max(0.0, decibels(widths[0] ** 2, widths[1] ** 2)) if widths[1] > 0 else 0.0


def bulk_range(histogram: Histogram, low: float, high: float) -> tuple[float, float]:
    """The narrowest of the ranges with 0 that leave out as rare values at both ends as the bulk is to be.

    Args:
        histogram: Counts of the values.
        low: Least value.
        high: Greatest value.

    Returns:
        The range that all but one value in a thousand lie in, half of the others at each end.
    """
    below = histogram.counts.double().cumsum(0) / histogram.counts.sum()
    tail = (1.0 - BULK) / 2.0
    edges = histogram.lower_edges
    first = int((below > tail).double().argmax())
    last = int((below >= 1.0 - tail).double().argmax())
    return max(low, float(edges[first])), min(high, float(edges[last]) + histogram.bin_width)


def _short_side(histogram: Histogram, quantizer: Quantizer) -> dict[str, Any]:
    """Levels and share of the values on the side of 0 that has fewer levels."""
    encoding = quantizer.encoding
    assert encoding is not None
    below, above = -float(encoding.lowest_step), float(encoding.highest_step)
    negative = histogram.lower_edges + histogram.bin_width / 2 < 0
    share = float(histogram.counts[negative].sum() / histogram.counts.sum())
    levels, share = (below, share) if below < above else (above, 1.0 - share)
    return {"short_levels": int(levels), "short_share": share}


def _of_channels(statistics: ChannelStatistics) -> dict[str, Any]:
    """The few channels that carry the range, and the dead ones."""
    low, high = (ends.nan_to_num(0.0).tolist() for ends in (statistics.range_min, statistics.range_max))
    outliers, gain = outlier_channels(low, high)
    ratios = range_ratios(statistics.range_min.nan_to_num(0.0), statistics.range_max.nan_to_num(0.0), symmetric=False)
    alive = ratios[ratios.isfinite()]
    dead = [index for index, share in enumerate(statistics.zero_share.tolist()) if share == 1.0]
    return {
        "outlier_channels": outliers,
        "outlier_gain": gain,
        "uneven_gain": 20 * math.log10(float(alive.median())) if alive.numel() else 0.0,
        "kurtosis": _median(statistics.kurtosis),
        "channels": len(low),
        "dead": tuple(dead),
    }


def _median(values: Tensor) -> float | None:
    """The median of what is a number."""
    known = values[values.isfinite()]
    return float(known.median()) if known.numel() else None


def outlier_channels(low: Sequence[float], high: Sequence[float]) -> tuple[tuple[int, ...], float]:
    """The few channels without which the range is the most narrow, judged by what each of them brings.

    Args:
        low: Least value of each channel.
        high: Greatest value of each channel.

    Returns:
        Their indices, at most one in eight and at least one where there are two, and what the rounding noise of the
        others falls by without them, in dB. The cut is where the range falls most from one channel to the next.

    Examples:
        >>> names, gain = outlier_channels([0.0, -1.0, 0.0, 0.0], [1.0, 1.0, 63.0, 0.5])
        >>> names, round(gain, 1)
        ((2,), 30.1)
    """
    reach = [max(top, -bottom) for bottom, top in zip(low, high, strict=True)]
    order = sorted(range(len(reach)), key=lambda index: -reach[index])
    most = min(max(1, len(order) // 8), len(order) - 1)
    if most < 1 or reach[order[0]] == 0.0:
        return (), 0.0
    drops = [reach[order[k]] / max(reach[order[k + 1]], reach[order[0]] * 1e-9) for k in range(most)]
    count = drops.index(max(drops)) + 1
    rest = order[count:]
    whole = (min(low), max(high))
    part = (min(low[index] for index in rest), max(high[index] for index in rest))
    return tuple(sorted(order[:count])), width_gain(whole, part)

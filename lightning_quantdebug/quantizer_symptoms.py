"""What single activation quantizers meet in validation: values beyond the calibrated range, tokens, operands, ends.

Everything is streamed over a few batches in bounded memory: sums, and one number for each token position. The observers
keep what calibration saw, so that the two can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_quantdebug.activation_symptoms import outlier_channels
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.interception import OpKey
from lightning_quantdebug.layers import Call, Runs
from lightning_quantdebug.operations import Category, tensors_in
from lightning_quantdebug.quantizer import Quantizer
from lightning_quantdebug.target import Kind
from lightning_quantdebug.tensor_probes import samples_first, shown
from lightning_quantdebug.weight_symptoms import MOST_BATCHES, decibels

MOST_TOKENS = 4096
"""Positions of a sequence that are told apart; later ones count as the last."""

_JOINING = (Category.JOIN, Category.ADD)


@dataclass
class Seen:
    """What one quantizer met in validation.

    Attributes:
        count: Finite values.
        outside: Those beyond the clipping range by more than half a step.
        clipping: Sum of squared clipping errors.
        unseen_clipping: Of it, that of values beyond all that calibration observed.
        noise: Sum of squared errors, clipping and rounding.
        at_ends: Values within one step of an end of the range.
        low: Least value of each token position, where the tensor is ``(B, T, C)``.
        high: Greatest value of each token position.
        operands: Greatest magnitude of each operand of the sum or join that the quantizer sits on.
    """

    count: int = 0
    outside: int = 0
    clipping: float = 0.0
    unseen_clipping: float = 0.0
    noise: float = 0.0
    at_ends: int = 0
    low: Tensor = field(default_factory=lambda: torch.empty(0))
    high: Tensor = field(default_factory=lambda: torch.empty(0))
    operands: list[float] = field(default_factory=list)

    def take(self, x: Tensor, quantizer: Quantizer) -> None:
        """Take in one batch of the tensor."""
        encoding = quantizer.encoding
        assert encoding is not None
        values = x.detach().float()
        values = values[values.isfinite()].double()
        if values.numel() == 0:
            return
        scale, first, last = float(encoding.scale), float(encoding.range_min), float(encoding.range_max)
        inside = values.clamp(first, last)
        error = (values - inside).square()
        seen_low, seen_high = min(quantizer.observer.range_min, first), max(quantizer.observer.range_max, last)
        known = quantizer.observer.count > 0
        unseen = (values < seen_low) | (values > seen_high) if known else torch.zeros_like(values, dtype=torch.bool)
        self.count += values.numel()
        self.outside += int(((values - inside).abs() > scale / 2).sum())
        self.clipping += float(error.sum())
        self.unseen_clipping += float(error[unseen].sum())
        self.noise += float((quantizer.quantized(values.float()).double() - values).square().sum())
        self.at_ends += int(((values <= first + scale) | (values >= last - scale)).sum())
        if x.ndim == 3:
            self._take_tokens(x.detach().float().nan_to_num(0.0, 0.0, 0.0))

    def _take_tokens(self, x: Tensor) -> None:
        """The range of each token position."""
        low, high = x.amin((0, 2)).cpu(), x.amax((0, 2)).cpu()
        if len(low) > MOST_TOKENS:
            low = torch.cat([low[: MOST_TOKENS - 1], low[MOST_TOKENS - 1 :].min().reshape(1)])
            high = torch.cat([high[: MOST_TOKENS - 1], high[MOST_TOKENS - 1 :].max().reshape(1)])
        longer = max(len(low), len(self.low))
        grown = [torch.nn.functional.pad(each, (0, longer - len(each))) for each in (low, self.low, high, self.high)]
        self.low, self.high = torch.minimum(grown[0], grown[1]), torch.maximum(grown[2], grown[3])

    @property
    def outlier_tokens(self) -> tuple[tuple[int, ...], float]:
        """The few token positions that carry the range, and what the rounding noise of the others costs, in dB."""
        if len(self.low) < 2:
            return (), 0.0
        return outlier_channels(self.low.tolist(), self.high.tolist())

    @property
    def unseen_share(self) -> float:
        """Share of the noise that is clipping of values which calibration never saw."""
        return self.unseen_clipping / self.noise if self.noise > 0 else 0.0

    @property
    def unseen_gain(self) -> float:
        """What the noise would fall by without that clipping, in dB."""
        return decibels(self.noise, self.noise - self.unseen_clipping)

    @property
    def imbalance(self) -> float:
        """Greatest magnitude of one operand over that of the smallest; 1 where there is nothing to compare."""
        reach = [value for value in self.operands if value > 0]
        return max(reach) / min(reach) if len(reach) > 1 else 1.0

    @property
    def end_share(self) -> float:
        """Share of the values within one step of an end of the range."""
        return self.at_ends / self.count if self.count else 0.0

    def relative_rmse(self, scale: float) -> float:
        """Root mean square error over the scale: ``1 / sqrt(12)`` or 0.289 where there is nothing but rounding."""
        return math.sqrt(self.noise / self.count) / scale if self.count and scale > 0 else 0.0


def seen_in_validation(session: Instrumentation, runs: Runs, names: Mapping[str, Any] | list[str]) -> dict[str, Seen]:
    """What the named quantizers of activations meet in the first few batches.

    Args:
        session: Calibrated; nothing of it changes.
        runs: Batches of validation.
        names: Names of calibrated quantizers of activations.

    Returns:
        By name, in the order of ``names``.
    """
    found = {name: Seen() for name in names}
    keys = _joins_of(session, list(found))

    def tap_of(name: str) -> Callable[[Call], None]:
        def tap(call: Call) -> None:
            reach = [float(t.detach().abs().max()) for _, t in tensors_in(call.args, call.kwargs) if _is_real(t)]
            before = found[name].operands
            found[name].operands = [max(pair) for pair in zip(reach, before, strict=True)] if before else reach

        return tap

    turns = {name: samples_first(session, name) for name in found}
    views = {name: partial(_take, found[name], session.quantizers[name], turns[name]) for name in found}

    def visit(run: Callable[[], Any], index: int) -> None:
        with session.tapped({key: tap_of(name) for key, name in keys.items()}), shown(session, views):
            run()

    runs(visit, MOST_BATCHES)
    return found


def _take(seen: Seen, quantizer: Quantizer, turn: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Take in one batch of a tensor, samples first."""
    seen.take(turn(x) if x.ndim == 3 else x, quantizer)


def _is_real(tensor: Tensor) -> bool:
    """Whether an operand has values to look at."""
    return tensor.is_floating_point() and tensor.numel() > 1


def _joins_of(session: Instrumentation, names: list[str]) -> dict[OpKey, str]:
    """The sums and joins of data on whose results the named quantizers sit."""
    shared = session.topology.shared_keys()
    wanted = {
        shared[operation.key]: len(operation.data_inputs)
        for operation in session.topology
        if operation.category in _JOINING and len(operation.data_inputs) > 1
    }
    sites = [site for site in session.plan.sites if site.kind is Kind.ACTIVATION and site.name in names]
    return {spot.key: site.name for site in sites for spot in site.places if spot.slot is None and spot.key in wanted}

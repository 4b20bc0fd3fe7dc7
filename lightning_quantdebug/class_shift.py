"""How quantization moves the predicted classes: which samples flip, from which class to which, and what they look like.

Samples are compared with what FP32 predicts of them, so that no label is needed. Where a batch holds one, it is told
whether a flip has lost a right answer or won one.
"""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lightning_quantdebug.evaluation import Evaluation, Evaluator
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.network_outputs import Output, network_outputs
from lightning_quantdebug.operations import tensors_in
from lightning_quantdebug.rank_agreement import from_rank_zero
from lightning_quantdebug.target import Mode
from lightning_quantdebug.tensor_views import Moment
from lightning_quantdebug.visuals import Flip, Predictions

MOST_SAMPLES = 2048
"""Looked at: a class that one sample in a hundred leaves shows with 20 of them, and large sets are not run again."""

MOST_FLIPS = 12
"""Flipped samples that are shown."""

MOST_CLASSES = 20
"""Classes that can be told apart in a matrix of 400 pixels."""

MOST_PIXELS = 96
"""Sides of a picture of a sample."""

_LABEL_GAIN = 2.0
# A tensor of integers is taken for the labels if FP32 meets it at least twice as often as by chance. On a healthy
# classifier labels are met many times as often, and token ids or indices hardly more often than by chance.


def predictions(
    session: Instrumentation, evaluator: Evaluator, reference: Evaluation, moments: Sequence[Moment]
) -> tuple[Predictions, ...]:
    """Compare the classes that the quantized network predicts at some moments of the walk with those of FP32.

    One validation of :data:`MOST_SAMPLES` samples at the most, in which each batch is run in FP32 and at each moment.

    Args:
        session: Calibrated, and left as it was.
        evaluator: Runs the user's validation; all ranks must call this together.
        reference: FP32, for the number of batches and samples.
        moments: The states of the session, in their order.

    Returns:
        One record for each moment, of the samples of the first device; none where the output is no set of classes.
    """
    output = next((each for each in network_outputs(session) if each.class_axis is not None), None)
    if output is None or not moments:
        return ()
    watch = _Watch(session, output, moments)
    batches = max(1, reference.count)
    size = max(1.0, (reference.samples or batches) / batches)
    try:
        evaluator.run_unchecked(watch.around, limit=min(batches, math.ceil(MOST_SAMPLES / size)))
    finally:
        watch.release()
    return from_rank_zero(tuple(seen.record(moment.step.value) for moment, seen in watch.found()))


@dataclass
class _Seen:
    """What was counted at one moment. Flips are counted by pairs: a square of all words of a language would be too big.

    Attributes:
        stayed: Samples of each FP32 class that keep it.
        moved: Samples that were moved, by FP32 class and new class.
        right: Samples with a label that are right: in FP32, quantized, and in both.
        labelled: Whether the batches hold labels.
        flips: The flipped samples that FP32 is surest of.
    """

    stayed: Tensor
    moved: Counter[tuple[int, int]] = field(default_factory=Counter)
    right: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.long))
    labelled: bool = False
    flips: list[Flip] = field(default_factory=list)

    def count(self, exact: Tensor, quantized: Tensor) -> None:
        """Count the classes of one batch, shape ``(N,)``."""
        same = exact == quantized
        self.stayed += torch.bincount(exact[same], minlength=len(self.stayed))
        self.moved.update(zip(exact[~same].tolist(), quantized[~same].tolist(), strict=True))

    def record(self, step: str) -> Predictions:
        """What a picture shows."""
        classes = self._most_moved()
        fp32, quantized, both = self.right.tolist()
        known = self.labelled
        flipped = self.moved.total()
        return Predictions(
            step=step,
            samples=int(self.stayed.sum()) + flipped,
            flipped=flipped,
            fp32_correct=fp32 if known else None,
            quantized_correct=quantized if known else None,
            lost=fp32 - both if known else None,
            won=quantized - both if known else None,
            classes=classes,
            total_classes=len(self.stayed),
            shift=tuple(
                tuple(int(self.stayed[row]) if row == column else self.moved[row, column] for column in classes)
                for row in classes
            ),
            flips=tuple(self.flips),
        )

    def _most_moved(self) -> tuple[int, ...]:
        """All classes, or those that most flips leave or enter and then the most frequent ones, in their order."""
        if len(self.stayed) <= MOST_CLASSES:
            return tuple(range(len(self.stayed)))
        ends: Counter[int] = Counter()
        for pair, times in self.moved.items():
            ends.update(dict.fromkeys(pair, times))
        frequent = self.stayed.argsort(descending=True, stable=True)[:MOST_CLASSES].tolist()
        moved = [name for name, _ in ends.most_common(MOST_CLASSES)]
        return tuple(sorted(list(dict.fromkeys([*moved, *frequent]))[:MOST_CLASSES]))


@dataclass(frozen=True, eq=False)
class _Classes:
    """The classes of one run: predicted ones and their probabilities, flat."""

    predicted: Tensor
    probability: Tensor
    shape: torch.Size
    count: int


class _Watch:
    """Runs each batch in FP32 and at each moment, and counts."""

    def __init__(self, session: Instrumentation, output: Output, moments: Sequence[Moment]) -> None:
        """Nothing is counted yet."""
        self._session = session
        self._output = output
        self._moments = moments
        self._before = session.state()
        self._seen: list[_Seen] = []
        self._labels: int | None = None
        self._searched = False
        self._samples = 0

    def around(self, call: Callable[[], Any], batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        """Run one batch; what counts for the user's own metrics is FP32, which runs last."""
        found = []
        for moment in self._moments:
            self._session.restore(moment.state)
            found.append(self._classes(call, Mode.QUANTIZE)[1])
        self._session.restore(self._moments[0].state)
        result, exact = self._classes(call, Mode.BYPASS)
        self.release()
        if exact is not None:
            self._count(exact, found, batch)
        return result

    def release(self) -> None:
        """Give the session back."""
        self._session.restore(self._before)

    def found(self) -> Iterator[tuple[Moment, _Seen]]:
        """The moments that were counted; none if no batch gave classes."""
        return zip(self._moments, self._seen, strict=False)

    def _classes(self, call: Callable[[], Any], mode: Mode) -> tuple[Any, _Classes | None]:
        """Run a batch in one mode; the step's result, and the classes of the network's last output."""
        kept: list[Tensor] = []

        def keep(name: str, result: Any) -> None:
            if name == self._output.name:
                kept.extend(tensor for _, tensor in tensors_in((result,), {}) if tensor.is_floating_point())

        with self._session.modes(mode), self._session.traced(keep):
            result = self._session.run(call, step=True)
        axis = self._output.class_axis
        assert axis is not None
        if not kept or kept[-1].ndim <= axis:
            return result, None
        values = kept[-1].detach().float().cpu()
        chances = values if self._output.is_probability else values.softmax(axis)
        probability, predicted = chances.nan_to_num(0.0).max(axis)
        return result, _Classes(predicted.flatten(), probability.flatten(), predicted.shape, values.shape[axis])

    def _count(self, exact: _Classes, found: Sequence[_Classes | None], batch: Any) -> None:
        """Add one batch."""
        if not self._seen:
            self._seen = [_Seen(torch.zeros(exact.count, dtype=torch.long)) for _ in self._moments]
        label = self._label_of(batch, exact)
        for seen, quantized in zip(self._seen, found, strict=True):
            if quantized is None or quantized.shape != exact.shape or exact.count != len(seen.stayed):
                continue
            seen.count(exact.predicted, quantized.predicted)
            _count_right(seen, exact, quantized, label)
            if len(exact.shape) == 1:
                _keep_flips(seen, exact, quantized, label, batch, self._samples)
        self._samples += exact.shape[0] if exact.shape else 1

    def _label_of(self, batch: Any, exact: _Classes) -> Tensor | None:
        """The labels of a batch, flat; ``None`` where none were found in the first one."""
        candidates = [
            tensor.detach().cpu().flatten().long()
            for _, tensor in tensors_in((batch,), {})
            if not tensor.is_floating_point() and not tensor.is_complex() and tensor.shape == exact.shape
        ]
        if not self._searched:
            self._searched = True
            shares = [float((each == exact.predicted).double().mean()) for each in candidates]
            best = max(range(len(shares)), key=shares.__getitem__, default=None)
            if best is not None and shares[best] >= min(1.0, _LABEL_GAIN / exact.count):
                self._labels = best
        return candidates[self._labels] if self._labels is not None and self._labels < len(candidates) else None


def _count_right(seen: _Seen, exact: _Classes, quantized: _Classes, label: Tensor | None) -> None:
    """Count right answers; no prediction meets a label that is no class, such as that of padding."""
    if label is None:
        return
    before, after = (each.predicted == label for each in (exact, quantized))
    seen.right += torch.stack([before.sum(), after.sum(), (before & after).sum()])
    seen.labelled = True


def _keep_flips(
    seen: _Seen, exact: _Classes, quantized: _Classes, label: Tensor | None, batch: Any, offset: int
) -> None:
    """Keep the flipped samples that FP32 is surest of."""
    flipped = (exact.predicted != quantized.predicted).nonzero().flatten()
    surest = flipped[exact.probability[flipped].argsort(descending=True, stable=True)][:MOST_FLIPS].tolist()
    least = seen.flips[-1].fp32_probability if len(seen.flips) == MOST_FLIPS else -1.0
    new = [
        Flip(
            sample=offset + index,
            label=None if label is None else int(label[index]),
            fp32=int(exact.predicted[index]),
            quantized=int(quantized.predicted[index]),
            fp32_probability=round(float(exact.probability[index]), 6),
            quantized_probability=round(float(quantized.probability[index]), 6),
            picture=_picture(batch, index, exact.shape[0]),
        )
        for index in surest
        if float(exact.probability[index]) > least
    ]
    seen.flips = sorted([*seen.flips, *new], key=lambda flip: -flip.fp32_probability)[:MOST_FLIPS]


def _picture(batch: Any, index: int, samples: int) -> str:
    """One sample as PNG in base64, if the batch holds images of shape ``(N, 1 or 3 or 4, H, W)``; else empty."""
    for _, tensor in tensors_in((batch,), {}):
        if tensor.ndim == 4 and tensor.shape[0] == samples and tensor.shape[1] in (1, 3, 4) and min(tensor.shape) > 0:
            return _png(tensor[index, :3] if tensor.shape[1] > 1 else tensor[index])
    return ""


def _png(image: Tensor) -> str:
    """An image of shape ``(1 or 3, H, W)``, stretched over all grey levels, at most 96 pixels wide and high."""
    values = image.detach().float().cpu().nan_to_num(0.0, 0.0, 0.0)
    low, high = float(values.min()), float(values.max())
    levels = ((values - low) / max(high - low, torch.finfo(torch.float32).tiny) * 255).round().byte()
    drawn = Image.fromarray(levels[0].numpy() if len(levels) == 1 else levels.permute(1, 2, 0).contiguous().numpy())
    if max(drawn.size) > MOST_PIXELS:
        drawn.thumbnail((MOST_PIXELS, MOST_PIXELS))
    buffer = io.BytesIO()
    drawn.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")

"""Prove that an exported file computes what was accepted, or say where it parts from it.

Equality is too much to ask: another engine adds the products of a convolution in another order, a sum that lies between
two levels then rounds to the other one, and a deep network carries that on. How much of it is innocent is measured
beside: the simulation itself is run with changes of a part in a million, at its inputs and at the sums of its layers,
and what that does to its outputs is the *floor* that a file's differences are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_quantdebug.fake_quantize import fake_quantize
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.interception import OpKey
from lightning_quantdebug.layers import Call, Tap
from lightning_quantdebug.model_loan import lent
from lightning_quantdebug.network import Network, NetworkCall, output_tensors
from lightning_quantdebug.report import Comparison
from lightning_quantdebug.target import Kind, Mode

Run = Callable[[Sequence[Tensor]], list[Tensor]]
"""Runs an exported file: takes the tensors of one call and gives those that come out."""


NOISE = 1e-6
"""Relative change that stands for sums in another order: float32 has 24 bits, and sums of some hundred products lose a
few of them."""

DRAWS = 3
"""Times that the floor is drawn; the largest counts."""

FEW_FLIPS = 0.1
"""Root mean square, in steps, up to which differences of a single step pass where the floor shows none: one value in a
hundred that is off by one step. A wrong scale, bias or zero point moves most values."""

RELATIVE = 1e-4
"""Root mean square, in units of the output's own, up to which an output without a grid passes."""


def in_parts(run: Run, size: int | None) -> Run:
    """What runs a file that was made for ``size`` samples on any number of them; ``None``: it takes any.

    The last part is filled up with its last sample.
    """
    if size is None:
        return run

    def part_by_part(tensors: Sequence[Tensor]) -> list[Tensor]:
        count = len(tensors[0]) if tensors[0].ndim else 0
        if any(tensor.shape[:1] != (count,) for tensor in tensors):
            # Offsets, lengths and the like do not belong to samples: such a call is run as it is, or refused.
            return run(tensors)
        results = []
        for start in range(0, count, size):
            rows = torch.arange(start, start + size, device=tensors[0].device).clamp(max=count - 1)
            results.append([out[: count - start] for out in run([tensor[rows] for tensor in tensors])])
        return [torch.cat(pieces) for pieces in zip(*results, strict=True)]

    return part_by_part


@dataclass(frozen=True, eq=False)
class Simulation:
    """The simulation, without a Trainer's precision: what files are compared with.

    Args:
        session: Calibrated, with the quantizers on that the file has.
        network: What is called.
        calls: Batches.
        class_axis: Axis of the classes of the first output; ``None``: it has none.
    """

    session: Instrumentation
    network: Network
    calls: Sequence[NetworkCall]
    class_axis: int | None = None

    def outputs(self, noise: torch.Generator | None = None) -> list[list[Tensor]]:
        """What comes out for each batch; with changes of a part in a million if a generator is given."""
        with self._running(), self.session.tapped(self._taps(noise)):
            results = []
            for call in self.calls:
                given = call if noise is None else call.with_tensors([_changed(t, noise) for t in call.tensors])
                fresh = given.copied()
                output = self.network.run(self.session, fresh.args, fresh.kwargs)
                results.append([tensor.detach().cpu().clone() for tensor in output_tensors(output)])
            return results

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Eval mode, full precision, and everything given back."""
        device = self.calls[0].tensors[0].device.type
        with lent(self.network.root), full_precision(), torch.autocast(device, enabled=False):
            yield

    def _taps(self, noise: torch.Generator | None) -> dict[OpKey, Tap]:
        """What changes the sums of each layer."""
        if noise is None:
            return {}

        def tap(call: Call) -> Tensor | None:
            return _changed(call.result, noise) if isinstance(call.result, Tensor) else None

        return {layer.key: tap for layer in self.session.layers}

    def floor(self, reference: list[list[Tensor]], units: Sequence[float | None]) -> tuple[float, float]:
        """Largest and root mean square difference that changes of a part in a million make."""
        drawn = [
            difference(reference, self.outputs(torch.Generator().manual_seed(seed)), units) for seed in range(DRAWS)
        ]
        return max(largest for largest, _ in drawn), max(rms for _, rms in drawn)

    def units(self, reference: list[list[Tensor]]) -> list[float | None]:
        """For each output the step of the grid that its values are on, ``None`` where they are on none."""
        return [self._step([batch[index] for batch in reference]) for index in range(len(reference[0]))]

    def _step(self, values: Sequence[Tensor]) -> float | None:
        """The largest step of an activation quantizer that leaves these values as they are."""
        quantizers = [q for q in self.session.select(kind=Kind.ACTIVATION) if q.mode is Mode.QUANTIZE]
        encodings = [q.encoding.to("cpu") for q in quantizers if q.encoding is not None]
        fitting = [
            float(encoding.scale)
            for encoding in encodings
            if all(v.is_floating_point() and torch.equal(fake_quantize(v, encoding), v) for v in values)
        ]
        return max(fitting, default=None)


def compare(simulation: Simulation, run: Run, runtime: str, floor: tuple[float, float] | None = None) -> Comparison:
    """Run a file on the batches of a simulation and compare what comes out.

    Args:
        simulation: What was accepted.
        run: Runs the file.
        runtime: What the report calls it.
        floor: Largest and root mean square difference of :meth:`Simulation.floor`, if known.

    Returns:
        The comparison.
    """
    reference = simulation.outputs()
    units = simulation.units(reference)
    found = [run([tensor.detach().clone() for tensor in call.tensors]) for call in simulation.calls]
    largest, rms = difference(reference, found, units)
    floor_largest, floor_rms = simulation.floor(reference, units) if floor is None else floor
    equal = equal_predictions([b[0] for b in reference], [b[0] for b in found], simulation.class_axis)
    return Comparison(runtime, samples_in(reference), largest, rms, floor_largest, floor_rms, equal)


def samples_in(batches: Sequence[Sequence[Tensor]]) -> int:
    """The number of samples behind the first output of some batches."""
    return sum(len(batch[0]) if batch[0].ndim else 1 for batch in batches)


def difference(
    reference: list[list[Tensor]], found: list[list[Tensor]], units: Sequence[float | None]
) -> tuple[float, float]:
    """Largest and root mean square difference over batches and outputs, in units of each output.

    Args:
        reference: Tensors of each batch.
        found: The same of something else. A tensor of another shape or with NaN differs infinitely.
        units: Step of each output; ``None``: the root mean square of the reference is the unit.

    Examples:
        >>> difference([[torch.tensor([0.0, 1.0])]], [[torch.tensor([0.0, 1.5])]], [0.5])
        (1.0, 0.7071067811865476)
    """
    largest, squares, count = 0.0, 0.0, 0
    for index, step in enumerate(units):
        both = zip(reference, found, strict=True)
        pairs = [(one[index].double(), other[index].detach().cpu().double()) for one, other in both]
        if any(one.shape != other.shape for one, other in pairs):
            return float("inf"), float("inf")
        norm = sum(float(one.square().sum()) for one, _ in pairs) / max(sum(one.numel() for one, _ in pairs), 1)
        unit = step or norm**0.5 or 1.0
        for one, other in pairs:
            same = (one == other) | (one.isnan() & other.isnan())
            gap = ((one - other).abs() / unit).nan_to_num(nan=float("inf"), posinf=float("inf")).masked_fill(same, 0.0)
            largest = max(largest, float(gap.max()) if gap.numel() else 0.0)
            squares, count = squares + float(gap.square().sum()), count + gap.numel()
    return largest, (squares / max(count, 1)) ** 0.5


def equal_predictions(reference: Sequence[Tensor], found: Sequence[Tensor], class_axis: int | None) -> float:
    """Share of samples with the same class, or of equal values where there are no classes.

    Examples:
        >>> equal_predictions([torch.tensor([[0.1, 0.9], [0.8, 0.2]])], [torch.tensor([[0.6, 0.4], [0.7, 0.3]])], 1)
        0.5
    """
    equal = total = 0
    for one, other in zip(reference, found, strict=True):
        if one.shape != other.shape:
            return 0.0
        if class_axis is not None and one.ndim > class_axis and one.shape[class_axis] > 1:
            one, other = one.argmax(class_axis), other.argmax(class_axis)
        equal += int((one == other.to(one.device)).sum())
        total += one.numel()
    return equal / max(total, 1)


def is_within_floor(comparison: Comparison, on_grid: bool) -> bool:
    """Whether differences are no more than sums in another order explain.

    Args:
        comparison: What was found.
        on_grid: Whether differences are in steps of a grid.
    """
    if comparison.rms <= 2 * comparison.floor_rms or comparison.largest == 0.0:
        return True
    if not on_grid:
        return comparison.rms <= RELATIVE
    return comparison.largest <= 1.01 and comparison.rms <= FEW_FLIPS


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 arithmetic on accelerators, which else may round factors to 10 bits (TF32)."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = (matmul.allow_tf32, cudnn.allow_tf32)
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def _changed(tensor: Tensor, noise: torch.Generator) -> Tensor:
    """A tensor whose values have changed by a part in a million; integers stay."""
    if not tensor.is_floating_point():
        return tensor
    factors = torch.randn(tensor.shape, generator=noise).to(tensor.device, tensor.dtype)
    return tensor * (1 + NOISE * factors)

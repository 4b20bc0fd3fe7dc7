"""The first box of the flow chart: with every quantizer bypassed or at 32 bits the model must score as in FP32.

White paper section 3.6, step 1. Each check looks for one way in which a model or a quantization pipeline can be broken
and names the first operation where outputs part. The checks run in the order in which a fault would spoil the later
ones; the walk stops at the first that fails.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from lightning_quantdebug.errors import NonFiniteScoreError
from lightning_quantdebug.evaluation import AroundStep, Evaluation, Evaluator
from lightning_quantdebug.grid_check import grid_fault, noisy_activations
from lightning_quantdebug.instrument import Instrumentation
from lightning_quantdebug.operations import Category
from lightning_quantdebug.own_quantizers import IdentityCheck, OwnQuantizer, own_quantizers
from lightning_quantdebug.quantizer import Quantizer
from lightning_quantdebug.rank_agreement import gather
from lightning_quantdebug.report import Cause, Finding
from lightning_quantdebug.target import Kind, Mode, QuantSpec
from lightning_quantdebug.topology import Operation
from lightning_quantdebug.traces import OutputTrace, Parting, SizeTrace, module_outputs, tensors_of

# Relative error of one operation's output between FP32 and 32-bit quantizers, in the Euclidean norm. Measured on CPU on
# healthy networks (those of the tests, and MobileNetV2 and ResNet-18 with random weights and statistics): at most 6e-7
# in float32, where a 32-bit grid and the other order of sums of a folded batch normalization are all that differs.
# Faults are larger by far: a quantizer that computes in float16 is off by 2.1e-4, in bfloat16 by 1.7e-3.
FLOAT_NOISE = 1e-4
# Under bfloat16 autocast, where a folded weight rounds otherwise than the plain one: 6.5e-3 at most, 4e-3 in the
# median, and no growth with depth. float16 rounds three bits finer.
HALF_NOISE = 0.1
# On CUDA float32 products may be made in TF32 (cuDNN's default), which has float16's ten bits. Not measured: an eighth
# of bfloat16's noise with the same margin.
CUDA_NOISE = 1e-2
# What float noise alone does to a network that amplifies it (a difference of nearly equal numbers, say): a fault must
# be this many times larger.
ABOVE_AMPLIFIED_NOISE = 100.0
# Two runs of one batch with other random numbers: 0 on CPU for all of those networks; kernels that add in another order
# each time should stay near 1e-6 (not measured). Dropout that was left on differs by about 1.
DETERMINISM = 1e-4
# A score may move where 1e-7 flips a sample that lies on the border; losses of those networks moved by 8e-8 at most.
SCORE_NOISE = 1e-3


@dataclass(frozen=True)
class Reference:
    """The FP32 model's two evaluations.

    Attributes:
        evaluation: The score that everything is compared with.
        floor: How much the score differs between two runs with the same random numbers in the data and others in the
            model: 0 on a CPU for a deterministic model.
    """

    evaluation: Evaluation
    floor: float


class Fp32Check:
    """Runs the checks.

    Args:
        session: A captured and calibrated instrumentation, all in bypass.
        evaluator: Runs the user's validation.
        own: The quantizers that the model brings along, bypassed.
        advance: Called after each evaluation, for progress.
    """

    def __init__(
        self,
        session: Instrumentation,
        evaluator: Evaluator,
        own: list[OwnQuantizer],
        advance: Callable[[], None] = lambda: None,
    ) -> None:
        """Keep what is checked."""
        self.session = session
        self.evaluator = evaluator
        self.own = own
        self.advance = advance
        self._device_noise = 0.0
        self._float_noise = FLOAT_NOISE

    def run(self, reference: Reference) -> Finding | None:
        """The first fault, the same on every rank, or ``None``."""
        for check in self._checks(reference):
            found = next((finding for finding in gather(check()) if finding is not None), None)
            if found is not None:
                return found
        return None

    def _checks(self, reference: Reference) -> Iterator[Callable[[], Finding | None]]:
        """The checks in order."""
        yield self._training_mode
        yield self._determinism
        yield lambda: self._repeat(reference)
        yield self._own_quantizers
        yield self._bypassed_outputs
        yield lambda: self._bypassed_score(reference)
        yield self._grids
        yield self._at_32_bits
        yield lambda: self._score_at_32_bits(reference)

    def _one_batch(self, around: Callable[[Callable[[], Any]], Any], model_seed: int = 0) -> None:
        """Run one validation batch."""
        with suppress(NonFiniteScoreError):  # The outputs are compared, which tells more.
            self.evaluator.run(lambda call, *_: around(call), limit=1, model_seed=model_seed)
        self.advance()

    def _score(self) -> float:
        """The score with the quantizers as they are, NaN where it is no finite number."""
        try:
            score = self.evaluator.run(self.session.around_step).score
        except NonFiniteScoreError:
            score = math.nan
        self.advance()
        return score

    def _traced(self, trace: Callable[[str, Any], None]) -> Callable[[Callable[[], Any]], Any]:
        """Runs a step with the quantizers as they are and every operation traced."""

        def around(call: Callable[[], Any]) -> Any:
            with self.session.traced(trace):
                return self.session.run(call, step=True)

        return around

    def _training_mode(self) -> Finding | None:
        """Batch normalizations that use the batch's statistics although they have running ones."""
        for operation in self.session.topology:
            if operation.category is Category.BATCH_NORM and in_train_mode(operation):
                return _broken(
                    operation.name,
                    f"the batch normalization {operation.name} uses the statistics of the batch during validation: "
                    "it is in train mode, so that a sample's output depends on the samples beside it",
                )
        return None

    def _determinism(self) -> Finding | None:
        """Two runs of one batch with other random numbers in the model must agree."""
        trace = OutputTrace()
        self._one_batch(self._traced(trace.keep), model_seed=0)
        self._one_batch(self._traced(trace.compare), model_seed=1)
        worst = trace.worst()
        self._device_noise = worst.error if worst is not None else 0.0
        parting = trace.first_beyond(DETERMINISM)
        return None if parting is None else _nondeterministic(parting, "")

    def _repeat(self, reference: Reference) -> Finding | None:
        """Two full FP32 validations must agree; where they do not, the batch and the operation are looked for."""
        if reference.floor <= DETERMINISM * max(abs(reference.evaluation.score), 1e-12):
            return None
        trace = SizeTrace()
        for seed, take in ((0, trace.keep), (1, trace.compare)):
            self.evaluator.run(self._traced_batches(take), model_seed=seed)
        parting = trace.first_beyond(DETERMINISM)
        if parting is not None:
            name, _, batch = parting.name.partition(" on ")
            return _nondeterministic(Parting(name, parting.error), f" on {batch}")
        return Finding(
            Cause.NONDETERMINISTIC_MODEL,
            f"two FP32 validations differ by {reference.floor:.3g} in score although every operation agrees: look for "
            "randomness in the validation step, its hooks or its metric",
        )

    def _traced_batches(self, take: Callable[[str, Any], None]) -> AroundStep:
        """Runs each step with every operation traced under its name and batch."""

        def around(call: Callable[[], Any], batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
            where = f"batch {batch_idx}" + (f" of DataLoader {dataloader_idx}" if dataloader_idx else "")
            return self._traced(lambda name, output: take(f"{name} on {where}", output))(call)

        return around

    def _own_quantizers(self) -> Finding | None:
        """The user's own quantizers must be the identity when bypassed, and almost so at 32 bits."""
        if not self.own:
            return None
        for enabled, bit_width, bound in ((False, None, 0.0), (True, 32, FLOAT_NOISE)):
            wide = [quantizer for quantizer in self.own if quantizer.has_bit_width or not enabled]
            check = IdentityCheck(wide)
            with own_quantizers(wide, enabled, bit_width), check.watching():
                self._one_batch(lambda call: call())
            # All ranks must agree before the next pass, in which they wait for each other.
            parting = next((found for found in gather(check.first_beyond(bound)) if found is not None), None)
            if parting is not None:
                state = "at 32 bits" if enabled else "bypassed"
                return _broken(
                    parting.name,
                    f"the model's own quantizer {parting.name} changes its tensor by {parting.error:.2g} (relative) "
                    f"though it is {state}",
                )
        return None

    def _bypassed_outputs(self) -> Finding | None:
        """With quantizers present but bypassed, every module's output is bit-identical to FP32's."""
        trace, second = OutputTrace(), OutputTrace()

        def plain(call: Callable[[], Any]) -> Any:
            with module_outputs(self.session.root, trace.keep):
                return call()

        def bypassed(call: Callable[[], Any]) -> Any:
            with module_outputs(self.session.root, second.keep):
                return self.session.run(call, step=True)

        self._one_batch(plain)
        self._one_batch(bypassed)
        # Not while it runs: the comparison's own arithmetic would be taken for the network's.
        for name, output in second.kept:
            trace.compare(name, output)
        # Where the device gives other bits each time, no more can be asked of the bypassed network.
        parting = trace.first_beyond(10 * self._device_noise)
        if parting is None:
            return None
        return _broken(
            parting.name,
            f"with every quantizer bypassed the output of {parting.name} differs from FP32 by {parting.error:.2g} "
            "(relative)",
        )

    def _bypassed_score(self, reference: Reference) -> Finding | None:
        """With quantizers bypassed the score is FP32's, to the last bit on a deterministic device."""
        score = self._score()
        if abs(score - reference.evaluation.score) <= 10 * reference.floor:
            return None
        return _broken(
            None, f"with every quantizer bypassed the score is {score:.6g}, in FP32 {reference.evaluation.score:.6g}"
        )

    def _grids(self) -> Finding | None:
        """Each quantizer rounds to nearest and keeps zero; of those with the same grid the first speaks for all."""
        first_of_grid: dict[tuple[Kind, QuantSpec, int | None], Quantizer] = {}
        for quantizer in self.session.quantizers.values():
            first_of_grid.setdefault((quantizer.kind, quantizer.spec, quantizer.channel_axis), quantizer)
        for quantizer in first_of_grid.values():
            fault = grid_fault(quantizer)
            if fault is not None:
                return _broken(quantizer.name, f"the quantizer {quantizer.name} {fault}")
        return None

    def _at_32_bits(self) -> Finding | None:
        """With every quantizer at 32 bits each operation's output is FP32's but for float noise."""
        trace = OutputTrace(self._folded())
        self._one_batch(self._traced(trace.keep))
        with self.session.bit_width(32), self.session.modes(Mode.QUANTIZE):
            self._one_batch(self._traced(trace.compare))
        bound = self._float_noise = self._noise_of(trace)
        # All ranks must agree on whether there is another pass, in which they wait for each other.
        if not any(gather(trace.first_beyond(bound) is not None)):
            return None
        parting = trace.first_beyond(bound, self._amplified_noise(trace))
        if parting is None:
            return None
        return _broken(
            parting.name,
            f"with every quantizer at 32 bits the outputs first part at {parting.name}: relative error "
            f"{parting.error:.2g}, where float noise is below {bound:g}",
        )

    def _noise_of(self, trace: OutputTrace) -> float:
        """Bound of the float noise of one operation in the precision that the network runs in."""
        if trace.in_half_precision:
            return HALF_NOISE
        return CUDA_NOISE if any(p.is_cuda for p in self.session.root.parameters()) else FLOAT_NOISE

    def _folded(self) -> frozenset[str]:
        """Names of the operations whose outputs folding is meant to change: the first of the two that become one."""
        shared, plan = self.session.topology.shared_keys(), self.session.plan
        first = {key for key, fold in plan.folds.items() if not fold.forward}
        first |= {norm for norm, layer in plan.folded_into.items() if layer in plan.folds and plan.folds[layer].forward}
        names = [operation.name for operation in self.session.topology if shared[operation.key] in first]
        return frozenset((*names, *(name.split("@")[0] for name in names)))

    def _amplified_noise(self, kept: OutputTrace) -> list[float]:
        """Bound of the error of each operation's output if the activations have float noise and nothing else."""
        noisy = kept.again()
        with noisy_activations(self.session), self.session.modes(Mode.QUANTIZE, kind=Kind.ACTIVATION):
            self._one_batch(self._traced(noisy.compare))
        return [ABOVE_AMPLIFIED_NOISE * parting.error for parting in noisy.errors]

    def _score_at_32_bits(self, reference: Reference) -> Finding | None:
        """With every quantizer at 32 bits the score is FP32's but for float noise."""
        with self.session.bit_width(32), self.session.modes(Mode.QUANTIZE):
            score = self._score()
        fp32 = reference.evaluation.score
        one_sample = 1.5 / max(reference.evaluation.samples or 1, 1)
        noise = max(SCORE_NOISE * abs(fp32), one_sample if 0 <= fp32 <= 1 else 0.0) + reference.floor
        # In a coarser precision folding alone moves the score.
        if abs(score - fp32) <= noise * self._float_noise / FLOAT_NOISE:
            return None
        return _broken(None, f"with every quantizer at 32 bits the score is {score:.6g}, in FP32 {fp32:.6g}")


def in_train_mode(operation: Operation) -> bool:
    """Whether a batch normalization was called with running statistics and yet told to use the batch's."""
    is_function = hasattr(operation.key.func, "__code__")
    training = operation.arguments.get("training", operation.arguments.get("5", False))
    statistics = {("running_mean",), ("running_var",), *(((1,), (2,)) if is_function else ((3,), (4,)))}
    return bool(training) and any(slot in statistics for slot, _ in operation.inputs)


def _broken(name: str | None, evidence: str) -> Finding:
    """A broken pipeline."""
    return Finding(Cause.BROKEN_PIPELINE, evidence, name)


def _nondeterministic(parting: Parting, where: str) -> Finding:
    """A model that gives another output each time."""
    return Finding(
        Cause.NONDETERMINISTIC_MODEL,
        f"two runs of the same data first part at {parting.name}{where} (relative error {parting.error:.2g}): dropout "
        "left on, random numbers, or state outside the module that changes from call to call",
        parting.name,
    )


def first_non_finite(evaluator: Evaluator, around: AroundStep | None = None) -> Finding:
    """Where NaN, or else infinity, first comes out of a module, for a score that is no finite number.

    Args:
        evaluator: Runs the user's validation, whose score is not finite.
        around: What the step is run with; default: as it is.

    Returns:
        The finding; an infinity alone is blamed only where there is no NaN, because masks are made of infinities.
    """
    found: dict[str, str] = {}

    def take(name: str, output: Any) -> None:
        for tensor in tensors_of(output):
            for word, has in (("NaN", torch.isnan), ("infinity", torch.isinf)):
                if word not in found and bool(has(tensor).any()):
                    found[word] = name

    def watched(call: Callable[[], Any], *place: Any) -> Any:
        with module_outputs(evaluator.pl_module, take):
            return call() if around is None else around(call, *place)

    with suppress(NonFiniteScoreError):
        evaluator.run(watched)
    # Whichever came first stands first.
    names = next((rank for rank in gather(found) if rank), {})
    if not names:
        return Finding(
            Cause.NON_FINITE,
            "the score is no finite number although every module's output is: look at the validation step and the "
            "metric",
        )
    word = "NaN" if "NaN" in names else "infinity"
    before = next(iter(names))
    after = f", after {before} out of {names[before]}" if before != word and names[before] != names[word] else ""
    evidence = f"the score is no finite number; {word} first comes out of {names[word]}{after}"
    return Finding(Cause.NON_FINITE, evidence, names[word])

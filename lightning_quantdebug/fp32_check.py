"""The first box of the flow chart: with every quantizer bypassed or at 32 bits the model must score as in FP32.

White paper section 3.6, step 1. Each check looks for one way in which a model or a quantization pipeline can be broken
and names the first operation where outputs part. The checks run in the order in which a fault would spoil the later
ones; the walk stops at the first that fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from lightning_quantdebug.encoding import encoding_from_range
from lightning_quantdebug.evaluation import Evaluation, Evaluator
from lightning_quantdebug.instrument import Instrumentation
from lightning_quantdebug.operations import Category
from lightning_quantdebug.own_quantizers import IdentityCheck, OwnQuantizer, own_quantizers
from lightning_quantdebug.quantizer import Quantizer
from lightning_quantdebug.rank_agreement import gather
from lightning_quantdebug.report import Cause, Finding
from lightning_quantdebug.target import Granularity, Mode
from lightning_quantdebug.traces import OutputTrace, module_outputs

# Relative error of one operation's output between FP32 and 32-bit quantizers. A 32-bit grid with headroom is finer than
# float32 (about 1e-7) and folding a batch normalization reorders sums (about 1e-6 measured on MobileNetV2); any fault
# is larger than a thousand times that. In float16 and bfloat16 one rounding is already 4e-3 and folding moves several.
FLOAT_NOISE = 1e-3
HALF_NOISE = 0.1
# Two runs of one batch with other random numbers. Kernels that add in another order differ by 1e-6 or less; dropout
# that was left on differs by about 1.
DETERMINISM = 1e-4
# A score may move where 1e-7 flips a sample that lies on the border.
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
        self.evaluator.run(lambda call, *_: around(call), limit=1, model_seed=model_seed)
        self.advance()

    def _traced(self, trace: Callable[[str, Any], None]) -> Callable[[Callable[[], Any]], Any]:
        """Runs a step with the quantizers as they are and every operation traced."""

        def around(call: Callable[[], Any]) -> Any:
            with self.session.traced(trace):
                return self.session.run(call, step=True)

        return around

    def _training_mode(self) -> Finding | None:
        """Batch normalizations that use the batch's statistics in evaluation, and dropout that drops."""
        for operation in self.session.topology:
            training = operation.arguments.get("training", operation.arguments.get("5", False))
            if operation.category is Category.BATCH_NORM and training and len(_statistics(operation.inputs)) > 1:
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
        parting = trace.first_beyond(DETERMINISM)
        if parting is None:
            return None
        return Finding(
            Cause.NONDETERMINISTIC_MODEL,
            f"two runs of the same batch first part at {parting.name} (relative error {parting.error:.2g}): dropout "
            "left on, random numbers, or state that changes from call to call",
            parting.name,
        )

    def _repeat(self, reference: Reference) -> Finding | None:
        """Two full FP32 validations must agree."""
        if reference.floor <= DETERMINISM * max(abs(reference.evaluation.score), 1e-12):
            return None
        return Finding(
            Cause.NONDETERMINISTIC_MODEL,
            f"two FP32 validations differ by {reference.floor:.3g} in score although each operation of the first batch "
            "agrees: look for randomness in validation hooks, in the data, or on later batches",
        )

    def _own_quantizers(self) -> Finding | None:
        """The user's own quantizers must be the identity when bypassed, and almost so at 32 bits."""
        if not self.own:
            return None
        for enabled, bit_width, bound in ((False, None, 0.0), (True, 32, FLOAT_NOISE)):
            wide = [quantizer for quantizer in self.own if quantizer.has_bit_width or not enabled]
            check = IdentityCheck(wide)
            with own_quantizers(wide, enabled, bit_width), check.watching():
                self._one_batch(lambda call: call())
            parting = check.first_beyond(bound)
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
        trace = OutputTrace()

        def plain(call: Callable[[], Any]) -> Any:
            with module_outputs(self.session.root, trace.keep):
                return call()

        def bypassed(call: Callable[[], Any]) -> Any:
            with module_outputs(self.session.root, trace.compare):
                return self.session.run(call, step=True)

        self._one_batch(plain)
        self._one_batch(bypassed)
        parting = trace.first_beyond(0.0)
        if parting is None:
            return None
        return _broken(
            parting.name,
            f"with every quantizer bypassed the output of {parting.name} differs from FP32 by {parting.error:.2g} "
            "(relative)",
        )

    def _bypassed_score(self, reference: Reference) -> Finding | None:
        """With quantizers bypassed the score is FP32's, to the last bit on a deterministic device."""
        score = self.evaluator.run(self.session.around_step).score
        self.advance()
        if abs(score - reference.evaluation.score) <= reference.floor:
            return None
        return _broken(
            None, f"with every quantizer bypassed the score is {score:.6g}, in FP32 {reference.evaluation.score:.6g}"
        )

    def _grids(self) -> Finding | None:
        """Each quantizer, on its own grid, rounds to the nearest level and keeps zero."""
        for quantizer in self.session.quantizers.values():
            fault = grid_fault(quantizer)
            if fault is not None:
                return _broken(quantizer.name, f"the quantizer {quantizer.name} {fault}")
        return None

    def _at_32_bits(self) -> Finding | None:
        """With every quantizer at 32 bits each operation's output is FP32's but for float noise."""
        folded = {operation.name for operation in self.session.topology if operation.key in self.session.plan.folds}
        trace = OutputTrace(frozenset(folded))
        self._one_batch(self._traced(trace.keep))
        with self.session.bit_width(32), self.session.modes(Mode.QUANTIZE):
            self._one_batch(self._traced(trace.compare))
        bound = HALF_NOISE if trace.in_half_precision else FLOAT_NOISE
        parting = trace.first_beyond(bound)
        if parting is None:
            return None
        return _broken(
            parting.name,
            f"with every quantizer at 32 bits the outputs first part at {parting.name}: relative error "
            f"{parting.error:.2g}, where float noise is below {bound:g}",
        )

    def _score_at_32_bits(self, reference: Reference) -> Finding | None:
        """With every quantizer at 32 bits the score is FP32's but for float noise."""
        with self.session.bit_width(32), self.session.modes(Mode.QUANTIZE):
            score = self.evaluator.run(self.session.around_step).score
        self.advance()
        fp32 = reference.evaluation.score
        one_sample = 1.5 / max(reference.evaluation.samples or 1, 1)
        noise = max(SCORE_NOISE * abs(fp32), one_sample if 0 <= fp32 <= 1 else 0.0) + reference.floor
        if self._half_precision() or abs(score - fp32) <= noise:
            return None
        return _broken(None, f"with every quantizer at 32 bits the score is {score:.6g}, in FP32 {fp32:.6g}")

    def _half_precision(self) -> bool:
        """Whether the Trainer computes in float16 or bfloat16, where folding alone moves the score."""
        return "16" in str(self.evaluator.trainer.precision)


def _statistics(inputs: Any) -> list[str]:
    """Names of the running statistics among a batch normalization's inputs."""
    return [value.name for _, value in inputs if value.name.rsplit(".", 1)[-1] in ("running_mean", "running_var")]


def _broken(name: str | None, evidence: str) -> Finding:
    """A broken pipeline."""
    return Finding(Cause.BROKEN_PIPELINE, evidence, name)


def grid_fault(quantizer: Quantizer) -> str | None:
    """What is wrong with a quantizer's arithmetic, ``None`` if nothing.

    A ramp over the clipping range must come back within half a step (rounding to nearest), zero as zero, and values
    outside at the ends of the range. This is the definition of uniform quantization (white paper, equations 2.4 to
    2.7), so it holds for any correct quantizer class.

    Args:
        quantizer: A calibrated quantizer; it is checked at its own bit-width with a range of its own.
    """
    spec = replace(quantizer.spec, granularity=Granularity.PER_TENSOR, group_size=None)
    ends = (torch.tensor(-0.75), torch.tensor(1.25))
    probe = Quantizer(quantizer.name, quantizer.kind, spec, factory=quantizer.factory)
    probe.encoding = encoding_from_range(*ends, spec)
    probe.mode = Mode.QUANTIZE
    low, high, step = probe.encoding.range_min, probe.encoding.range_max, float(probe.encoding.scale)
    ramp = torch.linspace(float(low), float(high), 4001, dtype=torch.float64).float()
    result = probe(ramp.clone())
    steps = float((result - ramp).double().abs().max()) / step
    if not steps <= 0.5 + 1e-3 + 1e-6 / step:
        return f"is off by up to {steps:.3g} steps inside its range, where rounding to nearest is off by 0.5 at most"
    zero = float(probe(torch.zeros(1)))
    if zero != 0.0:
        return f"turns 0 into {zero:.3g}: zero must stay zero, as padding and ReLU rely on it"
    outside = probe(torch.stack([low - 10 * step, high + 10 * step]))
    if float((outside - torch.stack([low, high])).abs().max()) > step * 1e-3 + 1e-6:
        return f"does not clip to its range [{float(low):.3g}, {float(high):.3g}]: it gives {outside.tolist()}"
    return None

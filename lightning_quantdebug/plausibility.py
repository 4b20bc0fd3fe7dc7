"""Warnings about a walk whose score would mislead, and about packages that are missing."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Sequence

from lightning_quantdebug.evaluation import Evaluation
from lightning_quantdebug.instrument import Instrumentation
from lightning_quantdebug.operations import QUANTIZING, operation_name
from lightning_quantdebug.report import Cause, Finding, Report, Step
from lightning_quantdebug.settings import Direction, Settings
from lightning_quantdebug.statistics import samples_to_resolve

# The extra `onnx`. The encodings are written beside a float ONNX model.
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
_NEEDS_ONNX = ("onnx", "encodings")


def chance_warning(session: Instrumentation, settings: Settings, reference: Evaluation) -> list[str]:
    """A warning if the FP32 score is what guessing gives: the model was probably never trained, or not loaded.

    The number of classes ``C`` is taken from the width of the network's last output. Guessing has an accuracy of
    ``1 / C`` and a cross-entropy of ``ln C``; names of the metric tell which it is. Three standard errors of margin.
    """
    classes = output_width(session)
    score, samples = reference.score, reference.samples or 0
    if classes is None or not samples:
        return []
    by_guessing = 1 / max(classes, 2)
    margin = 3 * math.sqrt(by_guessing * (1 - by_guessing) / samples)
    is_rate = settings.direction is Direction.MAX and re.search(r"acc|auroc|auc|f1", settings.monitor, re.IGNORECASE)
    is_loss = settings.direction is Direction.MIN and re.search(
        r"loss|entropy|nll|ce\b", settings.monitor, re.IGNORECASE
    )
    if is_rate and 0 <= score <= by_guessing + margin:
        guess = f"1/{max(classes, 2)} by guessing"
    elif is_loss and classes > 1 and abs(score - math.log(classes)) <= 0.02 * math.log(classes):
        guess = f"ln({classes}) = {math.log(classes):.3g} by guessing"
    else:
        return []
    return [
        f"The FP32 score {settings.monitor} = {score:.4g} is about what guessing gives ({guess}): was the model "
        "trained, and were its weights loaded? What quantization costs an untrained model says nothing."
    ]


def missing_extras(settings: Settings) -> str | None:
    """Which packages the settings need that are not installed, and how to get them; ``None`` if all are there."""
    return missing_packages(settings.export)


def missing_packages(formats: Sequence[str]) -> str | None:
    """Which packages some formats need that are not installed, and how to get them; ``None`` if all are there."""
    needed = {name for name in formats if name in _NEEDS_ONNX}
    missing = [package for package in ONNX_PACKAGES if importlib.util.find_spec(package) is None]
    if not needed or not missing:
        return None
    return (
        f"`export={sorted(needed)}` needs {', '.join(missing)}, which can not be imported: "
        "pip install 'lightning-quantdebug[onnx]'."
    )


def direction_warning(settings: Settings, higher_is_better: bool | None) -> list[str]:
    """A warning if ``mode`` contradicts the direction that the torchmetric behind the monitor declares."""
    if higher_is_better is None or higher_is_better is (settings.direction is Direction.MAX):
        return []
    right = "max" if higher_is_better else "min"
    return [
        f"mode={settings.direction.value!r} contradicts the metric behind {settings.monitor!r}, whose "
        f"`higher_is_better` is {higher_is_better}: pass mode={right!r}, or losses count as gains."
    ]


def output_width(session: Instrumentation) -> int | None:
    """Width of the last output that carries a quantizer."""
    quantized = {spot.key for site in session.plan.sites for spot in site.places if spot.slot is None}
    shared = session.topology.shared_keys()
    run = session.topology.runs[0] if session.topology.runs else []
    last = next((operation for operation in reversed(run) if shared[operation.key] in quantized), None)
    shape = last.outputs[0].shape if last is not None and last.outputs else ()
    return shape[-1] if len(shape) == 2 else None


def not_simulated(session: Instrumentation, own_quantizers: Sequence[str]) -> list[Finding]:
    """Findings on what runs in FP32 although a quantized model would quantize it.

    Args:
        session: A captured instrumentation.
        own_quantizers: Paths of the model's own fake-quantize modules.
    """
    bypassed = f"the model's own quantizers are bypassed during the walk: {list(own_quantizers)}"
    return [
        *([Finding(Cause.NOT_QUANTIZED, bypassed)] if own_quantizers else []),
        *(
            Finding(Cause.NOT_QUANTIZED, f"the operations inside {path} can not be seen, so they run in FP32", path)
            for path in session.topology.opaque_modules
        ),
        *_already_quantized(session, own_quantizers),
    ]


def _already_quantized(session: Instrumentation, own_quantizers: Sequence[str]) -> list[Finding]:
    """A finding on operations that quantize by themselves and can not be bypassed."""
    found = [operation for operation in session.topology if operation_name(operation.key.func) in QUANTIZING]
    paths = [path for path in dict.fromkeys(o.key.path for o in found) if path not in own_quantizers]
    evidence = (
        f"the model quantizes by itself inside {paths[:5]}, in what is called FP32 here too: the FP32 score already "
        "pays for that, and its grid and ours add up"
    )
    return [Finding(Cause.ALREADY_QUANTIZED, evidence, paths[0])] if paths else []


def non_finite(session: Instrumentation) -> list[Finding]:
    """Findings on tensors of which calibration saw values that are no finite numbers."""
    return [
        Finding(
            Cause.NON_FINITE,
            f"calibration saw {quantizer.observer.non_finite} values that are NaN or infinite; ranges ignore them",
            quantizer.name,
        )
        for quantizer in session.quantizers.values()
        if quantizer.observer.non_finite
    ]


def too_few_samples(report: Report, step: Step, samples: int | None, settings: Settings) -> list[Finding]:
    """A finding if the validation set is too small to resolve the tolerance, with the size that would do.

    Args:
        report: With its baseline.
        step: The whole model's step.
        samples: Samples behind its score.
        settings: The settings of the walk.
    """
    reference = report.baseline
    if reference is None or step.interval is None or not samples:
        return []
    permitted = settings.tolerance.permitted_loss(reference.score)
    half_width = (step.interval[1] - step.interval[0]) / 2
    is_open = step.interval[0] <= permitted < step.interval[1]
    if not (permitted > 0 and half_width > permitted and is_open):
        return []
    needed = samples_to_resolve(samples, step.interval, permitted)
    evidence = (
        f"the loss is known to ±{half_width:.3g} with {samples} samples, the tolerance is {permitted:.3g}; about "
        f"{needed} samples would resolve it"
    )
    return [Finding(Cause.TOO_FEW_SAMPLES, evidence)]

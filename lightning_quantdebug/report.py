"""What a walk learned: frozen records that turn into JSON and back.

The report is the only memory of a walk. Records hold plain values (no tensors), so a report can be written at any
moment, read on another machine, and resumed from. The JSON is strict: a number that is not finite is written as
``null``.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from enum import Enum
from pathlib import Path
from typing import IO, Any

from lightning_quantdebug.errors import ReportError
from lightning_quantdebug.visuals import Visuals

SCHEMA_VERSION = 1


class _Advised(str, Enum):
    """A choice whose members carry the sentence that the user reads."""

    advice: str

    def __new__(cls, value: str, advice: str = "") -> _Advised:
        """Make a member from its value and its advice; looking a member up by its value needs no advice."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.advice = advice
        return member


class StepName(str, Enum):
    """The boxes of the flow chart, in its order."""

    FP32_CHECK = "fp32_check"
    ACTIVATIONS = "activations"
    WEIGHTS = "weights"
    FIX_WEIGHTS = "fix_weights"
    FIX_ACTIVATIONS = "fix_activations"
    PER_QUANTIZER = "per_quantizer"
    VISUALIZE = "visualize"
    FIX_QUANTIZERS = "fix_quantizers"
    QUANTIZE_MODEL = "quantize_model"
    QAT = "qat"


class StepVerdict(_Advised):
    """How one step ended."""

    PASSED = "passed", "The loss is within the tolerance: nothing to repair here."
    FAILED = "failed", "The loss exceeds the tolerance."
    NOISE = "noise", "The loss can not be told from zero with these samples."
    BROKEN = "broken", "The model or the pipeline is broken; no quantization result could be trusted."
    SKIPPED = "skipped", "An earlier step passed, so this step has nothing to do."
    NOT_RUN = "not_run", "This version does not run this step."


class Verdict(_Advised):
    """How the whole walk ended."""

    ACCEPTED = "accepted", "The model survives quantization as it is."
    REPAIRED = "repaired", "The model survives quantization after the remedies listed below."
    REPAIRED_BY_QAT = "repaired_by_qat", "The model survives quantization after quantization-aware training."
    NOT_ACCEPTED = "not_accepted", "The quantized model loses more score than the tolerance permits."
    BROKEN_PIPELINE = "broken_pipeline", "The FP32 sanity check failed: mend the model or the pipeline first."
    FAILED = "failed", "The walk itself failed; the training run and the model are unharmed."


class Cause(_Advised):
    """The closed list of causes, each with the remedy that it calls for."""

    BROKEN_PIPELINE = "broken_pipeline", "Mend the named operation; until then no result means anything."
    NONDETERMINISTIC_MODEL = "nondeterministic_model", "Make the named operation deterministic in eval mode."
    UNEVEN_CHANNEL_RANGES = "uneven_channel_ranges", "Equalize the layers (CLE) or quantize per channel."
    WEIGHT_OUTLIERS = "weight_outliers", "Clip the range (MSE), or raise this quantizer's bit-width."
    BIASED_ERROR = "biased_error", "Correct the bias of the layer."
    ACTIVATION_OUTLIERS = "activation_outliers", "Clip the range (percentile, MSE), or raise the bit-width."
    OUTLIER_CHANNEL = "outlier_channel", "Move the outlier into the weights (CLE), or keep this tensor at 16 bits."
    OUTLIER_TOKEN = "outlier_token", "Keep this tensor at 16 bits, or treat the named token apart."
    RANGE_UNSEEN = "range_unseen_in_calibration", "Calibrate on more, or more representative, batches."
    CLIPPING_DOMINATES = "clipping_dominates", "Widen the range."
    ROUNDING_DOMINATES = "rounding_dominates", "Narrow the range, use a finer granularity or more bits."
    UNBALANCED_JOIN = "unbalanced_concat_or_add", "Equalize the inputs of the join, or give it more bits."
    DEAD_CHANNELS = "dead_channels", "Prune the dead channels; their encodings carry nothing."
    CONSTANT_TENSOR = "constant_tensor", "Replace the tensor by a constant."
    NON_FINITE = "non_finite", "Find where NaN or infinity arises in FP32 and mend it."
    SATURATED_ACTIVATION = "saturated_activation", "Reduce the scale ahead of the saturating activation."
    SKEWED_TAIL = "skewed_activation_tail", "Use an asymmetric grid or a clipped range."
    NOT_QUANTIZED = "not_quantized", "Move the operation into a module, or accept that it stays in FP32."
    ALREADY_QUANTIZED = (
        "already_quantized",
        "Diagnose the float model, or give the module `enabled` and `bit_width`, so that it can be bypassed.",
    )
    TOO_FEW_SAMPLES = "too_few_samples", "Validate on more samples."
    CHANGED_FUNCTION = "changed_function", "Nothing to do: the remedy was undone, the other remedies are tried."
    NOT_EXPORTABLE = "not_exportable", "Change the named line, or run the recipe in Python."
    EXPORT_DIFFERS = "export_differs", "Compare on your device before you ship the file; the reason is in its evidence."
    TOO_FEW_BITS = "too_few_bits", "Raise the bit-width, use a finer granularity, or train with QAT."


@dataclass(frozen=True)
class Step:
    """One box of the flow chart that was walked through.

    Attributes:
        step: Which box.
        verdict: How it ended.
        score: The monitored score, in the metric's units; ``None`` where none was measured.
        loss: Loss of score against FP32, positive is worse.
        interval: Confidence interval of ``loss`` (95 %), or ``None`` where no per-batch values exist.
        advice: The sentence that the user reads.
        seconds: Wall time of the step.
        details: Further plain values, such as ``both`` and ``interaction`` of the ``weights`` step.
    """

    step: StepName
    verdict: StepVerdict
    score: float | None = None
    loss: float | None = None
    interval: tuple[float, float] | None = None
    advice: str = ""
    seconds: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Remedy:
    """One remedy that was tried.

    Attributes:
        remedy: Its name, one of ``settings.REMEDIES``.
        before: Score before it, with the quantizers on that its box of the chart is about.
        after: Score with it; ``None`` where none was measured, because it changed nothing or failed.
        kept: Whether it was kept; else everything is as before.
        reason: Why it was kept or undone.
        seconds: Wall time of applying and measuring it.
        step: The box of the chart that tried it.
        variant: Which of its variants, such as the method of ``range_setting``; empty where it has none.
        gain: Score gained, positive is better, with the batches that choose.
        interval: Confidence interval of ``gain`` (95 %).
        note: What it did, in numbers.
        skipped: What it left alone, and why.
        whole: Score with all quantizers on, once it was kept; ``None`` where it was not measured.
    """

    remedy: str
    before: float
    after: float | None
    kept: bool
    reason: str
    seconds: float
    step: str = StepName.FIX_WEIGHTS.value
    variant: str = ""
    gain: float | None = None
    interval: tuple[float, float] | None = None
    note: str = ""
    skipped: Mapping[str, str] = field(default_factory=dict)
    whole: float | None = None

    @property
    def title(self) -> str:
        """The remedy with its variant."""
        return f"{self.remedy} ({self.variant})" if self.variant else self.remedy


@dataclass(frozen=True)
class Sensitivity:
    """One quantizer alone at its target bit-width, the rest in FP32.

    Attributes:
        quantizer: Its name.
        kind: ``weight`` or ``activation``.
        bit_width: Its bits.
        score: The monitored score, on the samples that it was measured on; ``None`` where it was not.
        loss: Loss of score against FP32 on the same samples, positive is worse.
        interval: Confidence interval of ``loss`` (95 %), of this quantizer alone.
        sqnr_db: SQNR of the network's output, in dB.
        method: ``exact`` (all samples), ``race`` (stopped early: certainly not among the worst), or ``estimate``.
        kl: Mean Kullback-Leibler divergence of the output's classes from those of FP32, in nats; ``None`` where the
            output is no set of classes.
        samples: Samples behind all of this.
        task_loss: Estimated change of the task's loss, signed; ``None`` where it was not estimated.
        guilty: Whether the loss of score can be told from zero, considering how many quantizers were tested.
        loss_when_off: Loss of score with all quantizers on but this one; ``None`` where it was not measured.
        counterfactuals: SQNR of the quantized tensor itself, in dB: as it is (``now``) and as it would be.
    """

    quantizer: str
    kind: str
    bit_width: int
    score: float | None
    loss: float | None
    interval: tuple[float, float] | None
    sqnr_db: float | None
    method: str
    kl: float | None = None
    samples: int | None = None
    task_loss: float | None = None
    guilty: bool = False
    loss_when_off: float | None = None
    counterfactuals: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """A cause with its evidence, where it sits, and what to do."""

    cause: Cause
    evidence: str
    quantizer: str | None = None
    remedy: str | None = None
    advice: str = ""

    def __post_init__(self) -> None:
        """Let the cause speak where no other advice was given."""
        if not self.advice:
            object.__setattr__(self, "advice", self.cause.advice)


@dataclass(frozen=True)
class Unquantized:
    """A tensor or operation without a quantizer, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Coverage:
    """What is quantized, what is not, and why.

    Attributes:
        quantized: Names of the quantizers in order of execution.
        unquantized: Every operation, parameter and input without a quantizer, with the reason.
        unseen: Names of operations that ran in evaluation but not in calibration; they ran in FP32.
    """

    quantized: tuple[str, ...] = ()
    unquantized: tuple[Unquantized, ...] = ()
    unseen: tuple[str, ...] = ()


@dataclass(frozen=True)
class Baseline:
    """The FP32 score and the number of samples it was measured on."""

    score: float
    samples: int | None = None


@dataclass(frozen=True)
class QuantizerSetting:
    """The final setting of one quantizer, as far as plain numbers tell it.

    Attributes:
        name: Name of the quantizer.
        kind: ``weight`` or ``activation``.
        bit_width: Bits of one value.
        symmetric: Whether the grid is signed with ``zero_point`` 0.
        granularity: ``per_tensor``, ``per_channel`` or ``per_group``.
        range_min: Low end of the clipping range, in units of the tensor; the lowest of all channels.
        range_max: High end of the clipping range; the highest of all channels.
        scale: Grid step in units of the tensor; the largest of all channels.
        zero_point: Integer that stands for 0, or ``None`` where the channels differ.
        observed_min: Lowest finite value that calibration saw, or ``None`` where nothing was observed.
        observed_max: Highest finite value that calibration saw, or ``None`` where nothing was observed.
        channels: Number of encodings that the tensor has.
    """

    name: str
    kind: str
    bit_width: int
    symmetric: bool
    granularity: str
    range_min: float | None
    range_max: float | None
    scale: float | None
    zero_point: float | None
    observed_min: float | None = None
    observed_max: float | None = None
    channels: int = 1


class Agreement(_Advised):
    """How far an exported file was proven to do what the simulation does."""

    VERIFIED = "verified", "It computes what was accepted, as far as sums in another order allow."
    UNVERIFIED = "unverified", "Do not ship it before you know why it differs."
    NOT_WRITTEN = "not_written", "Nothing was written; the reason says what to change."


@dataclass(frozen=True)
class Comparison:
    """An exported file beside the simulation, on the same batches.

    Differences are in steps of the quantizer that the output comes from (in units of the output's root mean square
    where it comes from none).

    Attributes:
        runtime: What ran the file, such as ``onnxruntime, optimizations off``.
        samples: Number of samples that were compared.
        largest: Largest difference.
        rms: Root mean square of the differences.
        floor_largest: Largest difference that the simulation itself makes when its inputs change by a part in a
            million, which is what sums in another order do.
        floor_rms: Root mean square of those.
        equal_predictions: Share of samples with the same class, or of equal values where the output has no classes.
    """

    runtime: str
    samples: int
    largest: float
    rms: float
    floor_largest: float
    floor_rms: float
    equal_predictions: float


@dataclass(frozen=True)
class Export:
    """One exported format.

    Attributes:
        name: ``recipe``, ``onnx``, ``encodings`` or ``pt2``.
        agreement: Whether the file was proven to do what the simulation does.
        reason: Why it is unverified or was not written; of a verified file what a reader must know; else empty.
        files: Paths of what was written.
        comparisons: The file beside the simulation, for each way in which it was run.
        score: The user's metric with the file in the network's place, on the validation data; ``None``: not measured.
        simulated_score: The score of the simulation, which ``score`` is compared with.
        seconds: Time to write and verify it.
    """

    name: str
    agreement: Agreement
    reason: str = ""
    files: tuple[str, ...] = ()
    comparisons: tuple[Comparison, ...] = ()
    score: float | None = None
    simulated_score: float | None = None
    seconds: float = 0.0


@dataclass(frozen=True)
class Final:
    """What the walk leaves behind.

    Attributes:
        score: Score of the model at its final settings.
        loss: Loss of score against FP32, positive is worse.
        interval: Confidence interval of ``loss`` (95 %).
        settings: The final setting of each quantizer by its name, in order of execution.
        files: What was written: a file's role, such as ``report.md`` or ``tensorboard``, and its path.
        module_state: In words, in which state the user's module was given back.
        exports: What runs elsewhere, and how far each was proven to do what was simulated.
    """

    score: float | None = None
    loss: float | None = None
    interval: tuple[float, float] | None = None
    settings: Mapping[str, QuantizerSetting] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    module_state: str = "unchanged: the float weights as they were before the walk"
    exports: tuple[Export, ...] = ()


@dataclass(frozen=True)
class Report:
    """Everything a walk learned, in the order in which it learned it."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    baseline: Baseline | None = None
    steps: tuple[Step, ...] = ()
    remedies: tuple[Remedy, ...] = ()
    coverage: Coverage = field(default_factory=Coverage)
    sensitivity: tuple[Sensitivity, ...] = ()
    findings: tuple[Finding, ...] = ()
    verdict: Verdict | None = None
    final: Final = field(default_factory=Final)
    error: str | None = None
    visuals: Visuals = field(default_factory=Visuals)
    schema_version: int = SCHEMA_VERSION

    def step(self, name: StepName) -> Step | None:
        """The latest record of a step, or ``None`` if it was not walked through."""
        return next((step for step in reversed(self.steps) if step.step is name), None)

    def with_step(self, step: Step) -> Report:
        """The report with one more step."""
        return replace(self, steps=(*self.steps, step))

    def with_remedy(self, remedy: Remedy) -> Report:
        """The report with one more remedy that was tried."""
        return replace(self, remedies=(*self.remedies, remedy))

    def with_findings(self, *findings: Finding) -> Report:
        """The report with more findings."""
        return replace(self, findings=(*self.findings, *findings))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them; numbers that are not finite become ``None``."""
        plain = _plain(asdict(self))
        assert isinstance(plain, dict)
        return plain

    def to_json(self, path: str | Path) -> Path:
        """Write the report atomically: the file is whole or it is not there.

        Raises:
            ReportError: If the file can not be written.
        """
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        return write_atomically(path, text)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """Rebuild a report from :meth:`to_dict`.

        Raises:
            ReportError: If the schema version is another one, or a field is missing, unknown or of another shape.
        """
        version = values.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ReportError(f"The report has schema version {version!r}, this version reads {SCHEMA_VERSION}.")
        try:
            return _report_from(values)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ReportError(f"The report does not follow schema version {SCHEMA_VERSION}: {error}.") from error

    @classmethod
    def from_json(cls, path: str | Path) -> Report:
        """Read a report file.

        Raises:
            ReportError: If the file is not JSON or not a report.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ReportError(f"Can not read the report {str(path)!r}: {error}.") from error
        if not isinstance(values, dict):
            raise ReportError(f"The report {str(path)!r} must hold a JSON object, got {type(values).__name__}.")
        return cls.from_dict(values)


def write_atomically(path: str | Path, content: str | Callable[[IO[bytes]], object]) -> Path:
    """Write to a temporary file beside ``path`` and rename it into place.

    Args:
        path: Where the file shall be.
        content: The text, or what writes into the open file.

    Raises:
        ReportError: If the directory or the file can not be written.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            if isinstance(content, str):
                file.write(content.encode("utf-8"))
            else:
                content(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
        raise ReportError(f"Can not write {str(path)!r}: {error}. Give `dirpath` a writable directory.") from error
    return path


def _plain(value: object) -> Any:
    """Enums to their values, tuples to lists, numbers that are not finite to ``None``."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _report_from(values: Mapping[str, Any]) -> Report:
    """Build every record; wrong fields raise."""
    baseline = values["baseline"]
    coverage = values["coverage"]
    unknown = set(values) - {item.name for item in fields(Report)}
    if unknown:
        raise ValueError(f"unknown fields {sorted(unknown)}")
    return Report(
        settings=values["settings"],
        environment=values["environment"],
        baseline=None if baseline is None else Baseline(**baseline),
        steps=tuple(_step_from(item) for item in values["steps"]),
        remedies=tuple(Remedy(**_with_interval(item)) for item in values["remedies"]),
        coverage=Coverage(
            tuple(coverage["quantized"]),
            tuple(Unquantized(**item) for item in coverage["unquantized"]),
            tuple(coverage["unseen"]),
        ),
        sensitivity=tuple(Sensitivity(**_with_interval(item)) for item in values["sensitivity"]),
        findings=tuple(Finding(**{**item, "cause": Cause(item["cause"])}) for item in values["findings"]),
        verdict=None if values["verdict"] is None else Verdict(values["verdict"]),
        final=_final_from(values["final"]),
        error=values["error"],
        # Reports of before there were pictures have none.
        visuals=Visuals.from_dict(values["visuals"]) if "visuals" in values else Visuals(),
    )


def _step_from(values: Mapping[str, Any]) -> Step:
    """One step with its enums and its interval."""
    known = _with_interval(values)
    return Step(**{**known, "step": StepName(values["step"]), "verdict": StepVerdict(values["verdict"])})


def _final_from(values: Mapping[str, Any]) -> Final:
    """What is left behind, with a record for each quantizer."""
    settings = {name: QuantizerSetting(**item) for name, item in dict(values["settings"]).items()}
    # Reports of before there were exports have none.
    exports = tuple(_export_from(item) for item in values.get("exports", ()))
    return Final(**{**_with_interval(values), "settings": settings, "exports": exports})


def _export_from(values: Mapping[str, Any]) -> Export:
    """One exported format with its comparisons."""
    comparisons = tuple(Comparison(**item) for item in values["comparisons"])
    agreement = Agreement(values["agreement"])
    return Export(**{**values, "agreement": agreement, "files": tuple(values["files"]), "comparisons": comparisons})


def _with_interval(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with the interval as a tuple."""
    interval = values["interval"]
    return {**values, "interval": None if interval is None else (interval[0], interval[1])}

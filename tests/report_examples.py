"""Reports that several tests look at."""

from lightning_quantdebug.report import (
    Agreement,
    Baseline,
    Cause,
    Comparison,
    Coverage,
    Export,
    Final,
    Finding,
    QuantizerSetting,
    Remedy,
    Report,
    Sensitivity,
    Step,
    StepName,
    StepVerdict,
    Unquantized,
    Verdict,
)
from lightning_quantdebug.settings import make_settings

HOSTILE = "a|b`c`<script>alert(1)</script>\n## owned\x1b[31m\u202e*_[x](http://e.vil)!"


def full_report() -> Report:
    """A model that loses too much, with something in every field."""
    settings = (
        QuantizerSetting("conv.weight", "weight", 8, True, "per_channel", -1.0, 0.99, 0.0078, 0.0, -1.0, 0.5, 16),
        QuantizerSetting("conv", "activation", 8, False, "per_tensor", 0.0, 6.0, 0.0235294, 0.0, 0.0, 6.0),
        QuantizerSetting("head", "activation", 8, False, "per_tensor", -4.0, 8.0, 0.047, None, None, None),
    )
    not_run = (
        Step(name, StepVerdict.NOT_RUN, advice=StepVerdict.NOT_RUN.advice)
        for name in (StepName.FIX_WEIGHTS, StepName.PER_QUANTIZER)
    )
    both = {"both": {"score": 0.48, "loss": 0.45, "interval": [0.4, 0.5]}, "interaction": -0.04}
    draws = {"calibration_draws": {"spread": {}, "scores": [0.86, 0.88], "advice": "Ranges settle at 256 samples."}}
    held_out = {"held_out": {"loss": 0.44, "interval": [0.38, 0.5], "samples": 250, "verdict": "failed"}}
    costs = {"size_bytes": 1500.0, "bit_operations": 2.5e6, "raised": 1}
    measured = {
        "title": "conv: 16 bits",
        **costs,
        "score": 0.48,
        "loss": 0.45,
        "interval": [0.4, 0.5],
        "on_front": True,
    }
    repaired = {
        "changed": {"conv": "16 bits"},
        "cost": costs,
        "pareto": [measured, {**measured, "title": "as it is", "on_front": False}],
    }
    return Report(
        settings=make_settings(monitor="val_acc", mode="max", target="int8_per_tensor").to_dict(),
        environment={"torch": "2.13.0", "seed": 7},
        baseline=Baseline(0.93, 500),
        steps=(
            Step(StepName.FP32_CHECK, StepVerdict.PASSED, 0.93, 0.0, (0.0, 0.0), "FP32 twice: identical.", 1.5),
            Step(StepName.ACTIVATIONS, StepVerdict.FAILED, 0.87, 0.06, (0.04, 0.08), "", 1.25),
            Step(StepName.WEIGHTS, StepVerdict.FAILED, 0.5, 0.43, None, "", 2.0, both),
            *not_run,
            Step(StepName.FIX_ACTIVATIONS, StepVerdict.FAILED, 0.87, 0.06, (0.04, 0.08), "", 4.0, draws),
            Step(StepName.FIX_QUANTIZERS, StepVerdict.FAILED, 0.48, 0.45, (0.4, 0.5), "conv (16 bits).", 3.0, repaired),
            Step(StepName.QUANTIZE_MODEL, StepVerdict.FAILED, 0.48, 0.45, (0.4, 0.5), "", 2.5, held_out),
        ),
        remedies=(
            Remedy(
                "cle",
                0.5,
                0.9,
                True,
                "the score rose beyond noise",
                3.0,
                gain=0.38,
                interval=(0.3, 0.45),
                note="12 classes of channels",
                skipped={"head": "the step gets it"},
            ),
            Remedy(
                "range_setting",
                0.87,
                None,
                False,
                "has that range already",
                0.5,
                step="fix_activations",
                variant="min_max",
            ),
        ),
        coverage=Coverage(
            ("conv.weight", "conv", "head"),
            (
                *(Unquantized(f"reshape@{index}", "passes values on") for index in range(6)),
                Unquantized("conv.bias", "biases are int32 in the engine"),
            ),
            ("late",),
        ),
        sensitivity=(
            Sensitivity(
                "conv",
                "activation",
                8,
                0.9,
                0.03,
                (0.01, 0.05),
                31.5,
                "exact",
                kl=0.25,
                samples=500,
                task_loss=0.031,
                guilty=True,
                loss_when_off=0.4,
                counterfactuals={"now": 20.0, "mse": 26.0, "per_channel": 40.5, "bits_16": 68.0},
            ),
            Sensitivity("head", "activation", 8, 0.93, 0.0, (-0.01, 0.01), 51.0, "race", samples=64),
        ),
        findings=(
            Finding(Cause.WEIGHT_OUTLIERS, "The largest weight is 60 sigma from the mean.", "conv.weight"),
            Finding(
                Cause.TOO_FEW_SAMPLES, "500 samples resolve 2 %, the tolerance is 1 %.", advice="Use 2000 samples."
            ),
        ),
        verdict=Verdict.NOT_ACCEPTED,
        final=Final(
            0.48,
            0.45,
            (0.4, 0.5),
            {setting.name: setting for setting in settings},
            {"report.md": "runs/quantdebug/report.md", "tensorboard": "runs/my logs"},
        ),
    )


def _exports(reason: str) -> tuple[Export, ...]:
    """A file that was proven, and one that could not be written."""
    compared = Comparison("onnxruntime, as usual", 128, 2.0, 0.31, 3.0, 0.42, 0.9921875)
    plain = Comparison("onnxruntime, optimizations off", 128, 1.0, 0.30, 3.0, 0.42, 1.0)
    verified = Export("onnx", Agreement.VERIFIED, "", ("out/model.onnx",), (plain, compared), 0.4775, 0.48, 2.0)
    return verified, Export("pt2", Agreement.NOT_WRITTEN, reason)


def hostile_report() -> Report:
    """A report whose every text comes from an enemy."""
    point = {"title": HOSTILE, "raised": 1, "size_bytes": 1.0, "bit_operations": 1.0, "score": None, "loss": None}
    repaired = {"changed": {HOSTILE: HOSTILE}, "pareto": [{**point, "interval": None, "on_front": True}]}
    setting = QuantizerSetting(HOSTILE, "weight", 8, True, HOSTILE, -1.0, 1.0, 0.01, 0.0)
    return Report(
        settings={"monitor": HOSTILE, "tolerance": HOSTILE},
        baseline=Baseline(0.5),
        steps=(
            Step(StepName.WEIGHTS, StepVerdict.FAILED, float("nan"), None, (None, 1.0), HOSTILE),  # type: ignore[arg-type]
            Step(
                StepName.PER_QUANTIZER,
                StepVerdict.FAILED,
                advice=HOSTILE,
                details={"way": HOSTILE, "predicted": HOSTILE},
            ),
            Step(StepName.FIX_QUANTIZERS, StepVerdict.FAILED, advice=HOSTILE, details=repaired),
        ),
        sensitivity=(
            Sensitivity(HOSTILE, HOSTILE, 8, None, None, None, None, HOSTILE, counterfactuals={HOSTILE: 1.0}),
        ),
        remedies=(Remedy(HOSTILE, 0.1, 0.2, False, HOSTILE, 1.0),),
        coverage=Coverage((HOSTILE,), (Unquantized(HOSTILE, HOSTILE),), (HOSTILE,)),
        findings=(Finding(Cause.NON_FINITE, HOSTILE, HOSTILE, HOSTILE, HOSTILE),),
        verdict=Verdict.FAILED,
        final=Final(
            0.4, 0.1, None, {HOSTILE: setting}, {HOSTILE: HOSTILE, "tensorboard": HOSTILE}, HOSTILE, _exports(HOSTILE)
        ),
        error=HOSTILE,
    )

"""Reports with everything that pictures show, of a made-up network for images and one for sentences."""

import base64
import io
from dataclasses import replace

import numpy as np
from PIL import Image

from lightning_quantdebug.report import (
    Baseline,
    Cause,
    Coverage,
    Final,
    Finding,
    QuantizerSetting,
    Remedy,
    Report,
    Sensitivity,
    Step,
    StepName,
    StepVerdict,
    Verdict,
)
from lightning_quantdebug.settings import make_settings
from lightning_quantdebug.visuals import Flip, HeatMap, Predictions, TensorState, TensorView, Visuals
from tests.report_examples import HOSTILE


def picture(seed: int = 0, size: int = 8) -> str:
    """A small PNG in base64."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def tensor_state(step: str, channels: int = 24, bit_width: int = 8, spread: float = 8.0, seed: int = 0) -> TensorState:
    """A tensor with channels of uneven ranges."""
    random = np.random.default_rng(seed)
    reach = np.exp(random.uniform(0, np.log(spread), channels))
    values = (random.normal(size=(4000, channels)) * reach / 3).astype(float)
    low, high = values.min(0), values.max(0)
    scale = float(max(-values.min(), values.max()) / (2 ** (bit_width - 1) - 1))
    grid = scale * np.arange(-(2 ** (bit_width - 1)), 2 ** (bit_width - 1))
    on_grid = np.clip(np.round(values / scale), -(2 ** (bit_width - 1)), 2 ** (bit_width - 1) - 1) * scale
    edges = np.linspace(values.min(), values.max(), 65)
    noise = ((values - on_grid) ** 2).mean(0)
    return TensorState(
        step,
        bit_width,
        "per_tensor",
        tuple(low.tolist()),
        tuple(high.tolist()),
        (float(grid[0]),) * channels,
        (float(grid[-1]),) * channels,
        tuple((10 * np.log10((values**2).mean(0) / noise)).tolist()),
        float(10 * np.log10((values**2).mean() / noise.mean())),
        0.01 * float(noise.mean()),
        0.99 * float(noise.mean()),
        tuple(edges.tolist()),
        tuple(int(n) for n in np.histogram(values, edges)[0]),
        tuple(int(n) for n in np.histogram(on_grid, edges)[0]),
        tuple(grid.tolist()) if len(grid) <= 64 else (),
        scale,
        values.size,
    )


def heat_map(rows: int = 24, columns: int = 48) -> HeatMap:
    """One channel and one token stand out."""
    random = np.random.default_rng(1)
    values = np.abs(random.normal(size=(rows, columns)))
    values[:, 7] *= 12
    values[0] *= 20
    noise = np.full((rows, columns), 0.02)
    return HeatMap(
        "token",
        "channel",
        tuple(range(rows)),
        tuple(range(0, 2 * columns, 2)),
        tuple(map(tuple, values.tolist())),
        tuple(map(tuple, noise.tolist())),
        rows,
        2 * columns,
    )


def predictions(step: str, flipped: int = 14, classes: int = 10, pictures: bool = True) -> Predictions:
    """Some predictions move to another class."""
    random = np.random.default_rng(flipped)
    shift = np.diag(random.integers(20, 60, classes))
    flips = []
    for index in range(flipped):
        a, b = random.choice(classes, 2, replace=False)
        shift[a, b] += 1
        drawn = picture(index) if pictures else ""
        flips.append(Flip(17 * index, int(a if index % 4 else b), int(a), int(b), 0.9 - 0.02 * index, 0.6, drawn))
    flips = flips[:12]
    samples = int(shift.sum())
    lost = sum(bool(index % 4) for index in range(flipped))
    won = flipped - lost
    right = samples - 20
    table = tuple(tuple(int(n) for n in row) for row in shift)
    names = tuple(range(classes))
    return Predictions(
        step, samples, flipped, right, right - lost + won, lost, won, names, classes, table, tuple(flips)
    )


def _row(index: int, name: str, kind: str, guilty: bool) -> Sensitivity:
    """The analysis of one quantizer, the worse the earlier it comes."""
    loss = 0.12 / (1 + index)
    return Sensitivity(
        name,
        kind,
        8,
        0.93 - loss,
        loss,
        (loss - 0.02, loss + 0.02),
        12.0 + 1.5 * index,
        "exact" if index < 10 else "race",
        kl=0.5 / (1 + index) ** 2,
        samples=500,
        task_loss=loss * 1.1,
        guilty=guilty,
        counterfactuals={"now": 20.0, "mse": 26.0, "per_channel": 40.5, "bits_16": 68.0},
    )


def image_report(layers: int = 26) -> Report:
    """A depthwise-separable network that single repairs have saved, with everything in it."""
    paths = [f"features.{index}.conv.{index % 3}" for index in range(layers)]
    names = [name for path in paths for name in (f"{path}.weight", path)]
    settings = {
        name: QuantizerSetting(
            name,
            "weight" if name.endswith(".weight") else "activation",
            16 if index in (3, 8) else 8,
            name.endswith(".weight"),
            "per_tensor",
            -1.0,
            1.0,
            0.01,
            0.0,
            -1.0,
            1.0,
        )
        for index, name in enumerate(names)
    }
    order = [*names[3:9], *names[:3], *names[9:]]
    rows = [
        _row(index, name, "weight" if name.endswith(".weight") else "activation", index < 3)
        for index, name in enumerate(order)
    ]
    both = {"both": {"score": 0.48, "loss": 0.45, "interval": [0.4, 0.5], "verdict": "failed"}}
    remedies = (
        Remedy("cle", 0.5, 0.8, True, "the score rose beyond noise", 1.0, gain=0.3, interval=(0.25, 0.35), whole=0.74),
        Remedy("per_channel", 0.8, 0.8, False, "the score did not rise", 1.0, gain=0.0, interval=(-0.01, 0.01)),
        Remedy("bias_correction", 0.8, 0.86, True, "the score rose beyond noise", 1.0, whole=0.82),
        Remedy("range_setting", 0.82, 0.84, True, "the score rose", 1.0, "fix_activations", "mse", whole=0.84),
        Remedy("bit_width", 0.84, 0.9, True, "no harm", 1.0, "fix_quantizers", f"{order[0]}: 16"),
        Remedy("bit_width", 0.9, 0.925, True, "no harm", 1.0, "fix_quantizers", f"{order[1]}: 16"),
    )
    views = tuple(
        TensorView(
            name,
            "weight" if name.endswith(".weight") else "activation",
            "uneven_channel_ranges",
            "output channel" if name.endswith(".weight") else "channel",
            tuple(range(24)),
            24,
            (
                tensor_state("fp32_check", seed=index),
                tensor_state("fix_weights", spread=1.6, seed=index),
                tensor_state("quantize_model", spread=1.6, bit_width=4, seed=index),
            ),
        )
        for index, name in enumerate(order[:3])
    )
    passed, failed = StepVerdict.PASSED, StepVerdict.FAILED
    return Report(
        settings=make_settings(monitor="val_acc", mode="max", tolerance="1%", target="int8_per_tensor").to_dict(),
        environment={"torch": "2.13.0", "seed": 7},
        baseline=Baseline(0.93, 500),
        steps=(
            Step(StepName.FP32_CHECK, passed, 0.93, 0.0, (0.0, 0.0), "FP32 twice: identical.", 1.5),
            Step(StepName.ACTIVATIONS, passed, 0.926, 0.004, (-0.002, 0.008), "", 1.25),
            Step(StepName.WEIGHTS, failed, 0.5, 0.43, (0.4, 0.46), "", 2.0, both),
            Step(StepName.FIX_WEIGHTS, failed, 0.86, 0.07, (0.05, 0.09), "", 14.0),
            Step(StepName.FIX_ACTIVATIONS, failed, 0.84, 0.09, (0.06, 0.12), "", 4.0),
            Step(StepName.PER_QUANTIZER, failed, advice="Alone these cost score.", seconds=9.0),
            Step(StepName.VISUALIZE, passed, seconds=1.0),
            Step(StepName.FIX_QUANTIZERS, passed, 0.925, 0.005, (0.0, 0.01), "", 30.0),
            Step(StepName.QUANTIZE_MODEL, passed, 0.924, 0.006, (0.0, 0.012), "", 2.5),
            Step(StepName.QAT, StepVerdict.SKIPPED, advice="There is nothing to train."),
        ),
        remedies=remedies,
        coverage=Coverage(tuple(names)),
        sensitivity=tuple(rows),
        findings=(Finding(Cause.UNEVEN_CHANNEL_RANGES, "The widest channel is 90 times the median.", order[0]),),
        verdict=Verdict.REPAIRED,
        final=Final(0.924, 0.006, (0.0, 0.012), settings, {"report.md": "runs/quantdebug/report.md"}),
        visuals=Visuals(views, (predictions("fp32_check", 40), predictions("quantize_model", 14))),
    )


def sentence_report() -> Report:
    """A transformer that is not accepted, with an outlier token and no pictures of its inputs."""
    report = image_report()
    name = "model.encoder.layer.11.attention.output.LayerNorm.native_layer_norm"
    state = tensor_state("fp32_check", channels=48, spread=60.0)
    view = TensorView(name, "activation", "outlier_token", "channel", tuple(range(48)), 96, (state,), heat_map())
    row = _row(0, name, "activation", True)
    return replace(
        report,
        sensitivity=(row, *report.sensitivity[1:]),
        findings=(Finding(Cause.OUTLIER_TOKEN, "token 0 of 24 carries the range", name),),
        verdict=Verdict.NOT_ACCEPTED,
        visuals=Visuals((view,), (predictions("quantize_model", 6, classes=2, pictures=False),)),
    )


def hostile_visuals() -> Visuals:
    """Pictures of a tensor whose name comes from an enemy."""
    view = TensorView(
        HOSTILE, "activation", HOSTILE, HOSTILE, tuple(range(24)), 24, (tensor_state("fp32_check"),), heat_map()
    )
    return Visuals((view,), (predictions("quantize_model", 3),))

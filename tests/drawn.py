"""What a picture really shows: every text that is drawn with its rectangle, and reports that are hard to draw."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from matplotlib.backends.backend_agg import RendererAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from lightning_quantdebug.figure_style import house_style
from lightning_quantdebug.report import Baseline, Final, QuantizerSetting, Remedy, Report, Sensitivity, Verdict
from lightning_quantdebug.visuals import Predictions, TensorView, Visuals
from tests.visual_examples import heat_map, image_report, predictions, tensor_state


class _Listener(RendererAgg):
    """Keeps each text that is drawn."""

    def __init__(self, figure: Figure) -> None:
        super().__init__(*figure.bbox.size, figure.dpi)
        self.texts: list[Text] = []

    def draw_text(self, gc, x, y, s, prop, angle, ismath=False, mtext=None):
        if s.strip():
            assert not ismath, f"{s!r} is drawn as a formula"
            self.texts.append(mtext)
        return super().draw_text(gc, x, y, s, prop, angle, ismath, mtext)


def drawn_texts(figure: Figure) -> list[tuple[str, Bbox, Text]]:
    """Every text that reaches the paper, with its rectangle in pixels."""
    listener = _Listener(figure)
    with house_style():
        figure.draw(listener)
        found = {id(text): text for text in listener.texts}.values()
        return [(text.get_text(), text.get_window_extent(listener), text) for text in found]


def words(figure: Figure) -> list[str]:
    """Every text that reaches the paper."""
    return [text for text, _, _ in drawn_texts(figure)]


def flaws(figure: Figure) -> Iterator[str]:
    """Texts that leave the paper, are too small, or lie on each other; a pixel of leeway, of 1050."""
    paper = figure.bbox
    texts = drawn_texts(figure)
    for text, box, artist in texts:
        if box.x0 < -1 or box.y0 < -1 or box.x1 > paper.width + 1 or box.y1 > paper.height + 1:
            yield f"{text!r} leaves the paper: {box}"
        if artist.get_fontsize() < 8.2:
            yield f"{text!r} has {artist.get_fontsize()} points"
    for (one, first, _), (other, second, _) in itertools.combinations(texts, 2):
        across = min(first.x1, second.x1) - max(first.x0, second.x0)
        down = min(first.y1, second.y1) - max(first.y0, second.y0)
        if across > 1 and down > 1:
            yield f"{one!r} lies on {other!r}"


LONG = "module." * 40 + "attention.output.dense.weight"
MATH = "layer_$\\frac{1}{0}$_x^2"


def many_quantizers(count: int = 500) -> Report:
    """So many quantizers that single ones can hardly be told apart, some at other bits."""
    names = [f"backbone.stages.{index // 20}.blocks.{index % 20}.mlp.fc{index % 2}" for index in range(count // 2)]
    names = [name for path in names for name in (f"{path}.weight", path)]
    settings = {
        name: QuantizerSetting(
            name,
            "weight" if name.endswith("weight") else "activation",
            16 if index % 7 == 0 else 4 if index % 31 == 0 else 8,
            True,
            "per_tensor",
            -1.0,
            1.0,
            0.01,
            0.0,
        )
        for index, name in enumerate(names)
    }
    rows = [
        Sensitivity(name, settings[name].kind, 8, 0.9, 1e-5 * (count - index), None, 20.0 + index, "exact")
        for index, name in enumerate(names)
    ]
    base = image_report()
    return replace(base, sensitivity=tuple(rows), final=replace(base.final, settings=settings))


def long_names() -> Report:
    """Every name is longer than the picture is wide."""
    base = image_report()
    rename = {row.quantizer: f"{index}{LONG}" for index, row in enumerate(base.sensitivity)}
    settings = {rename[name]: setting for name, setting in base.final.settings.items()}
    return replace(
        base,
        settings={**base.settings, "monitor": "val_" + "W" * 200},
        sensitivity=tuple(replace(row, quantizer=rename[row.quantizer]) for row in base.sensitivity),
        remedies=tuple(replace(remedy, remedy=remedy.remedy * 9, step="fix_weights") for remedy in base.remedies),
        final=replace(base.final, settings=settings),
    )


def many_classes(classes: int = 1000, shown: int = 20) -> Report:
    """The matrix shows the classes that flip most."""
    indices = tuple(sorted(np.random.default_rng(0).choice(classes, shown, replace=False).tolist()))
    seen = tuple(
        replace(predictions(step, flipped, shown), classes=indices, total_classes=classes, samples=50_000)
        for step, flipped in (("fp32_check", 300), ("quantize_model", 120))
    )
    flips = tuple(replace(flip, label=999, fp32=50_256, quantized=50_255) for flip in seen[1].flips)
    return replace(image_report(), visuals=Visuals((), (seen[0], replace(seen[1], flips=flips))))


def lower_is_better(factor: float = 1.0) -> Report:
    """A loss as the score: 2.0 in FP32, 3.5 quantized, then cured step by step."""
    base = image_report()
    scores = [2.0 + factor * gain for gain in (1.5, 1.0, 0.6, 0.4, 0.2, 0.05)]
    remedies = tuple(
        replace(remedy, before=before, after=after, whole=after, kept=True)
        for remedy, before, after in zip(base.remedies, scores, [*scores[1:], 2.01], strict=True)
    )
    steps = tuple(
        replace(step, details={"both": {"score": scores[0], "loss": 1.5 * factor}})
        if step.step.value == "weights"
        else replace(step, score=2.0, loss=0.0)
        for step in base.steps
    )
    return replace(
        base,
        settings={**base.settings, "monitor": "val_loss", "mode": "min"},
        baseline=Baseline(2.0, 500),
        steps=steps,
        remedies=remedies,
        final=replace(base.final, score=2.02, loss=0.02),
    )


def many_remedies(count: int = 40) -> Report:
    """More bars than a picture has room for."""
    base = image_report()
    remedies = tuple(
        Remedy(
            ("granularity", "bit_width")[index % 2], 0.5, 0.5 + 0.01 * index, True, "", 1.0, "fix_quantizers", "x: 16"
        )
        for index in range(count)
    )
    return replace(base, remedies=remedies)


def estimated() -> Report:
    """No loss was measured: the quantizers are ranked by their SQNR."""
    base = image_report()
    rows = [replace(row, loss=None, interval=None, score=None, method="estimate") for row in base.sensitivity]
    rows[3] = replace(rows[3], sqnr_db=-4.5)
    rows[5] = replace(rows[5], sqnr_db=None)
    return replace(base, sensitivity=tuple(rows))


def not_a_number() -> Report:
    """Quantized the network returns NaN; the report was not written to JSON yet."""
    nan = float("nan")
    base = image_report()
    steps = tuple(
        replace(step, score=nan, loss=nan, interval=(nan, nan), details={"both": {"score": nan, "loss": nan}})
        if step.step.value == "weights"
        else step
        for step in base.steps
    )
    rows = tuple(replace(row, loss=nan, interval=(nan, nan), sqnr_db=nan) for row in base.sensitivity[:5])
    return replace(base, steps=steps, sensitivity=(*rows, *base.sensitivity[5:]))


def bare() -> Report:
    """As little as a report of one step has."""
    base = image_report()
    return Report(steps=base.steps[:1], verdict=Verdict.FAILED, final=Final())


def wide_channel(factor: float = 100.0) -> TensorView:
    """One of 48 channels is ``factor`` times as wide as the others, then equalized."""
    before, after = tensor_state("fp32_check", 48, spread=1.2), tensor_state("quantize_model", 48, spread=1.2, seed=3)
    wide = replace(
        before,
        low=(before.low[0] * factor, *before.low[1:]),
        high=(before.high[0] * factor, *before.high[1:]),
        clip_low=(before.low[0] * factor,) * 48,
        clip_high=(before.high[0] * factor,) * 48,
        sqnr_db=4.25,
    )
    per_channel = replace(after, granularity="per_channel", clip_low=after.low, clip_high=after.high)
    return TensorView(
        "features.1.conv.weight", "weight", "uneven_channel_ranges", "output channel", tuple(range(48)), 960,
        (wide, per_channel),
    )  # fmt: skip


def massive_activation() -> TensorView:
    """One token of 512 and one channel of 3072 carry the range, in a tensor of which a part is shown."""
    rows = (0, *range(100, 131))
    columns = tuple(sorted([*range(0, 1260, 20), 2531]))
    cells = np.abs(np.random.default_rng(0).normal(size=(32, 64)))
    cells[0, 63] = 2000.0
    cells[:, 20] *= 30
    noise = np.full((32, 64), 4.0)
    noise[0, 63] = 0.5
    cut = replace(
        heat_map(32, 64),
        row_indices=rows,
        column_indices=columns,
        values=tuple(map(tuple, cells.tolist())),
        noise=tuple(map(tuple, noise.tolist())),
        total_rows=512,
        total_columns=3072,
    )
    state = tensor_state("fp32_check", 48, spread=60.0)
    return TensorView(MATH, "activation", "outlier_token", "channel", tuple(range(48)), 3072, (state,), cut)


def clipped_tensor() -> TensorView:
    """A range much narrower than the values, then one much wider, in six looks."""
    state = tensor_state("fp32_check", 24)
    narrow = replace(state, clip_low=(-1.0,) * 24, clip_high=(1.5,) * 24, clipping=0.2, rounding=0.01, bit_width=4)
    wide = replace(state, step="quantize_model", clip_low=(-500.0,) * 24, clip_high=(800.0,) * 24, clipping=0.0)
    steps = ("fix_weights", "fix_activations", "fix_quantizers", "quantize_model", "qat")
    return TensorView(
        "x", "activation", "clipping_dominates", "channel", tuple(range(24)), 24,
        (narrow, *(replace(state, step=step) for step in steps), wide),
    )  # fmt: skip


HARD_REPORTS = {
    "many_quantizers": many_quantizers,
    "long_names": long_names,
    "many_classes": many_classes,
    "lower_is_better": lower_is_better,
    "perplexity": lambda: lower_is_better(4000.0),
    "many_remedies": many_remedies,
    "estimated": estimated,
    "not_a_number": not_a_number,
    "bare": bare,
}


def with_visuals(report: Report, *seen: Predictions) -> Report:
    """The report with these predictions."""
    return replace(report, visuals=replace(report.visuals, predictions=seen))

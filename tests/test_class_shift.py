"""Flipped classes, counted again by hand on the same batches; pictures are read back pixel by pixel."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lightning_quantdebug import class_shift as module
from lightning_quantdebug.class_shift import predictions
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.report import StepName
from lightning_quantdebug.settings import make_settings
from lightning_quantdebug.target import Mode
from lightning_quantdebug.tensor_views import Moment
from lightning_quantdebug.visuals import Predictions
from tests.analyses import captured
from tests.walks import Classifier, Judged, in_validation


def compared(
    user: Any, target: Any = "w3a3_per_tensor", change: Callable[[Instrumentation], None] = lambda q: None
) -> tuple[tuple[Predictions, ...], Any]:
    """The predictions as first quantized and after ``change``, and what FP32 and both predict, flat."""
    settings = make_settings(monitor="loss", target=target, calibration="val")

    def inside(running: Any) -> Any:
        session, evaluator, reference = captured(running, user, settings)
        moments = [Moment(StepName.FP32_CHECK, session.state())]
        change(session)
        moments.append(Moment(StepName.FIX_QUANTIZERS, session.state()))
        session.set_mode("observe")
        before = {name: q.encoding for name, q in session.quantizers.items()}
        found = predictions(session, evaluator, reference, moments)
        assert {name: q.encoding for name, q in session.quantizers.items()} == before
        assert all(q.mode is Mode.OBSERVE for q in session.quantizers.values())
        classes = [
            outputs(session, user, Mode.BYPASS, moments[0]),
            *(outputs(session, user, Mode.QUANTIZE, m) for m in moments),
        ]
        return found, classes

    result: tuple[tuple[Predictions, ...], Any] = in_validation(user, inside)
    return result


def outputs(session: Instrumentation, user: Any, mode: Mode, moment: Moment) -> np.ndarray:
    """The logits of all batches, shape ``(N, C)``."""
    session.restore(moment.state)
    with torch.no_grad(), session.modes(mode):
        parts = [session.run(lambda batch=batch: user.net(batch[0]), step=True) for batch in user.batches]
    return torch.cat(parts).double().numpy()


def network(classes: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, classes)
    ).eval()


def classifier(classes: int = 5, batches: int = 3, right: float = 0.8, channels: int = 1) -> Classifier:
    """Labels that FP32 meets with a share of ``right``."""
    net = network(classes)
    if channels > 1:
        net[0] = nn.Conv2d(channels, 8, 3).eval()
    generator = torch.Generator().manual_seed(1)
    made = []
    for _ in range(batches):
        x = torch.randn(40, channels, 6, 6, generator=generator)
        with torch.no_grad():
            label = net(x).argmax(-1)
        other = torch.randint(classes, (40,), generator=generator)
        made.append((x, torch.where(torch.rand(40, generator=generator) < right, label, other)))
    return Classifier(net, made)


def raise_bits(session: Instrumentation) -> None:
    for quantizer in session.quantizers.values():
        quantizer.set_bit_width(6)


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return np.asarray(e / e.sum(1, keepdims=True))


def test_flips_are_those_that_are_counted_by_hand() -> None:
    user = classifier()
    found, (exact, *quantized) = compared(user, change=raise_bits)
    label = torch.cat([y for _, y in user.batches]).numpy()
    assert [one.step for one in found] == ["fp32_check", "fix_quantizers"]
    assert found[0].flipped > found[1].flipped > 0
    for one, logits in zip(found, quantized, strict=True):
        a, b = exact.argmax(1), logits.argmax(1)
        shift = np.zeros((5, 5), int)
        np.add.at(shift, (a, b), 1)
        assert one.shift == tuple(map(tuple, shift.tolist()))
        assert (one.samples, one.flipped) == (120, int((a != b).sum()))
        assert (one.classes, one.total_classes) == (tuple(range(5)), 5)
        assert (one.fp32_correct, one.quantized_correct) == ((a == label).sum(), (b == label).sum())
        assert one.lost == ((a == label) & (b != label)).sum()
        assert one.won == ((a != label) & (b == label)).sum()


def test_the_flips_that_fp32_is_surest_of_are_shown_with_their_pictures() -> None:
    user = classifier()
    (found, _), (exact, logits, _) = compared(user)
    label = torch.cat([y for _, y in user.batches]).numpy()
    images = torch.cat([x for x, _ in user.batches]).numpy()
    a, b, p, q = exact.argmax(1), logits.argmax(1), softmax(exact).max(1), softmax(logits).max(1)
    order = sorted(np.flatnonzero(a != b), key=lambda index: -p[index])[: module.MOST_FLIPS]
    assert len(order) == module.MOST_FLIPS
    assert [flip.sample for flip in found.flips] == order
    for flip, index in zip(found.flips, order, strict=True):
        assert (flip.label, flip.fp32, flip.quantized) == (label[index], a[index], b[index])
        assert flip.fp32_probability == pytest.approx(p[index], abs=1e-4)
        assert flip.quantized_probability == pytest.approx(q[index], abs=1e-4)
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(flip.picture))), dtype=float)
        drawn = images[index, 0]
        np.testing.assert_allclose(pixels, (drawn - drawn.min()) / (drawn.max() - drawn.min()) * 255, atol=0.51)


def test_a_picture_in_colour_keeps_its_channels_and_a_large_one_its_shape() -> None:
    image = torch.zeros(3, 200, 100)
    image[0, :100] = 1.0
    image[2, 100:] = 0.5
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(module._png(image)))))
    assert pixels.shape == (module.MOST_PIXELS, module.MOST_PIXELS // 2, 3)
    assert pixels[10, 10].tolist() == [255, 0, 0]
    assert pixels[-10, 10].tolist() == [0, 0, 128]


def test_a_batch_of_other_things_has_no_pictures() -> None:
    assert module._picture((torch.randn(4, 7), torch.arange(4)), 0, 4) == ""
    assert module._picture(torch.randn(4, 5, 8, 8), 0, 4) == ""
    assert module._picture({"image": torch.randn(4, 1, 8, 8)}, 2, 4) != ""


def test_a_constant_picture_is_black() -> None:
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(module._png(torch.full((1, 4, 4), 3.0))))))
    assert pixels.max() == 0


class WithIds(Classifier):
    """Batches hold integers that are no labels ahead of the labels."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        logits = self.net(batch[0])
        self.log("acc", (logits.argmax(-1) == batch[2]).float().mean(), batch_size=len(batch[2]))
        self.log("loss", nn.functional.cross_entropy(logits, batch[2]), batch_size=len(batch[2]))


def test_integers_that_fp32_meets_by_chance_alone_are_no_labels() -> None:
    plain = classifier()
    ids = torch.arange(40) % 5
    user = WithIds(plain.net, [(x, ids, y) for x, y in plain.batches])
    (found, _), (exact, *_) = compared(user)
    label = torch.cat([y for _, y in plain.batches]).numpy()
    assert found.fp32_correct == (exact.argmax(1) == label).sum()
    (found, _), _ = compared(classifier(right=0.0))
    assert (found.fp32_correct, found.quantized_correct, found.lost, found.won) == (None,) * 4
    assert found.flips[0].label is None


def test_labels_that_are_no_class_do_not_count() -> None:
    plain = classifier()

    class Ignoring(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            logits = self.net(batch[0])
            loss = nn.functional.cross_entropy(logits, batch[1], ignore_index=-100)
            self.log("acc", (logits.argmax(-1) == batch[1]).float().mean(), batch_size=40)
            self.log("loss", loss, batch_size=40)

    batches = [(x, torch.where(torch.arange(40) < 10, -100, y)) for x, y in plain.batches]
    (found, _), (exact, *_) = compared(Ignoring(plain.net, batches))
    label = torch.cat([y for _, y in batches]).numpy()
    assert found.fp32_correct == (exact.argmax(1) == label).sum()
    assert found.samples == 120


def test_of_many_classes_those_with_most_flips_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_CLASSES", 4)
    (found, _), (exact, logits, _) = compared(classifier(classes=12))
    a, b = exact.argmax(1), logits.argmax(1)
    moved = np.bincount(a[a != b], minlength=12) + np.bincount(b[a != b], minlength=12)
    assert (len(found.classes), found.total_classes) == (4, 12)
    assert sorted(moved[list(found.classes)]) == sorted(np.sort(moved)[-4:])
    assert list(found.classes) == sorted(found.classes)
    for row, values in zip(found.classes, found.shift, strict=True):
        assert list(values) == [int(((a == row) & (b == column)).sum()) for column in found.classes]
    assert found.flipped == (a != b).sum()


def test_at_most_some_thousand_samples_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_SAMPLES", 70)
    (found, _), _ = compared(classifier())
    assert found.samples == 80


def test_a_network_without_classes_has_no_predictions() -> None:
    found, _ = in_validation_without_classes()
    assert found == ()


def in_validation_without_classes() -> Any:
    torch.manual_seed(0)
    user = Judged(nn.Sequential(nn.Linear(4, 3)), [torch.randn(8, 4)])
    settings = make_settings(monitor="loss", target="int8", calibration="val")

    def inside(running: Any) -> Any:
        session, evaluator, reference = captured(running, user, settings)
        return predictions(session, evaluator, reference, [Moment(StepName.FP32_CHECK, session.state())]), None

    return in_validation(user, inside)


class Segmentation(Judged):
    """Each pixel has a class."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]), batch_size=4)


def test_pixels_are_counted_and_none_is_shown_alone() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 1)).eval()
    batches: Sequence[Any] = [(x, net(x).argmax(1)) for x in torch.randn(3, 4, 1, 6, 6)]
    user = Segmentation(net, batches)
    (found, _), (exact, logits, _) = compared(user)
    a, b = exact.argmax(1), logits.argmax(1)
    assert (found.samples, found.flipped) == (a.size, (a != b).sum())
    assert found.fp32_correct == a.size
    assert found.quantized_correct == (a == b).sum()
    assert found.flips == ()


def test_probabilities_are_taken_as_they_are() -> None:
    plain = classifier()
    net = nn.Sequential(*plain.net, nn.Softmax(-1)).eval()

    class OfProbabilities(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            chances = self.net(batch[0])
            self.log("acc", (chances.argmax(-1) == batch[1]).float().mean(), batch_size=40)
            self.log("loss", -chances.gather(1, batch[1][:, None]).clamp(min=1e-6).log().mean(), batch_size=40)

    (found, _), (exact, logits, _) = compared(OfProbabilities(net, plain.batches))
    flips = np.flatnonzero(exact.argmax(1) != logits.argmax(1))
    best = max(exact[index].max() for index in flips)
    assert found.flips[0].fp32_probability == pytest.approx(best, abs=1e-4)

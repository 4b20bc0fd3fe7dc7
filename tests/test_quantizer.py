"""One quantizer: its modes, its range, its bit-widths, and a user's own class in its place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_quantdebug.encoding import Encoding
from lightning_quantdebug.errors import CaptureError, SettingsError
from lightning_quantdebug.fake_quantize import fake_quantize
from lightning_quantdebug.quantizer import Quantizer, load_custom_quantizer
from lightning_quantdebug.target import Granularity, Kind, Mode, QuantSpec

torch.set_num_threads(1)

WEIGHT = QuantSpec(8, symmetric=True, granularity=Granularity.PER_CHANNEL)


def activation(**settings: Any) -> Quantizer:
    return Quantizer("act", Kind.ACTIVATION, QuantSpec(8), **settings)


def test_bypass_gives_the_tensor_itself() -> None:
    x = torch.randn(5)
    quantizer = activation()
    assert quantizer(x) is x
    assert quantizer(x, overwrite=True) is x
    assert quantizer.observer.count == 0


def test_observing_gives_the_tensor_itself_and_counts() -> None:
    x = torch.tensor([-1.0, 3.0])
    quantizer = activation()
    quantizer.mode = Mode.OBSERVE
    assert quantizer(x) is x
    quantizer(2 * x)
    assert quantizer.observer.count == 4
    assert not quantizer.is_calibrated
    quantizer.set_range()
    assert quantizer.encoding is not None
    assert quantizer.encoding.range_max.item() == pytest.approx(6.0, abs=0.05)
    assert quantizer.encoding.range_min.item() == pytest.approx(-2.0, abs=0.05)


def test_quantizing_before_calibration_changes_nothing() -> None:
    x = torch.randn(5)
    quantizer = activation()
    quantizer.mode = Mode.QUANTIZE
    assert quantizer(x) is x
    quantizer.set_range()
    assert quantizer.encoding is None


def test_integers_pass() -> None:
    quantizer = activation(fixed_range=(0.0, 1.0))
    quantizer.set_range()
    quantizer.mode = Mode.QUANTIZE
    x = torch.tensor([5])
    assert quantizer(x) is x


def test_a_fixed_range_needs_no_data_and_no_data_changes_it() -> None:
    quantizer = activation(fixed_range=(0.0, 1.0))
    quantizer.observe(torch.tensor([7.0]))
    quantizer.set_range()
    assert quantizer.encoding is not None
    assert (quantizer.encoding.scale.item(), quantizer.encoding.zero_point.item()) == (pytest.approx(1 / 255), 0.0)
    quantizer.set_bit_width(4)
    assert quantizer.encoding.scale.item() == pytest.approx(1 / 15)
    quantizer.set_bit_width(32)
    assert quantizer.encoding.range_max.item() == pytest.approx(1.0)


def test_a_weight_counts_as_it_is_now() -> None:
    quantizer = Quantizer("w", Kind.WEIGHT, WEIGHT, 0)
    quantizer.observe(torch.tensor([[100.0], [1.0]]))
    quantizer.observe(torch.tensor([[1.27], [-1.28]]))
    quantizer.set_range()
    assert quantizer.encoding is not None
    assert quantizer.encoding.scale.tolist() == pytest.approx([0.01, 0.01])
    assert quantizer.observer.count == 2


def test_quantizing_is_the_fake_quantize_of_the_encoding_and_overwrites_on_request() -> None:
    x = torch.randn(100)
    quantizer = activation()
    quantizer.observe(x)
    quantizer.set_range()
    quantizer.mode = Mode.QUANTIZE
    assert quantizer.encoding is not None
    expected = fake_quantize(x, quantizer.encoding)
    assert torch.equal(quantizer(x), expected)
    assert not torch.equal(x, expected)
    assert torch.equal(quantizer(x, overwrite=True), expected)
    assert torch.equal(x, expected)


@pytest.mark.parametrize("kind", [Kind.ACTIVATION, Kind.WEIGHT])
def test_at_32_bits_nothing_is_lost_and_the_way_back_is_exact(kind: Kind) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 500)
    weight = kind is Kind.WEIGHT
    quantizer = Quantizer("q", kind, WEIGHT if weight else QuantSpec(8), 0 if weight else None)
    quantizer.mode = Mode.QUANTIZE
    quantizer.observe(x)
    quantizer.set_range()
    at_8 = quantizer(x)
    assert float((at_8 - x).norm() / x.norm()) > 1e-3
    quantizer.set_bit_width(32)
    assert float((quantizer(x) - x).norm() / x.norm()) < 1e-6
    if not weight:
        unseen = 3 * x
        assert float((quantizer(unseen) - unseen).norm() / unseen.norm()) < 1e-6, "32 bits clip data beyond calibration"
    quantizer.set_bit_width(8)
    assert torch.equal(quantizer(x), at_8)


def test_a_bit_width_before_calibration_holds_for_it() -> None:
    quantizer = activation()
    quantizer.set_bit_width(4)
    assert quantizer.encoding is None
    quantizer.observe(torch.linspace(0, 15, 1000))
    quantizer.set_range()
    assert quantizer.encoding is not None
    assert quantizer.encoding.num_levels == 16
    assert quantizer.bit_width == quantizer.spec.bit_width == 4


def test_every_change_is_a_new_version() -> None:
    quantizer = activation(fixed_range=(0.0, 1.0))
    versions = [quantizer.version]
    for change in (
        quantizer.set_range,
        lambda: quantizer.set_bit_width(4),
        lambda: setattr(quantizer, "encoding", None),
        quantizer.reset,
    ):
        change()
        versions.append(quantizer.version)
    assert len(set(versions)) == len(versions)


def test_reset_forgets() -> None:
    quantizer = activation()
    quantizer.observe(torch.randn(10))
    quantizer.set_range()
    quantizer.reset()
    assert not quantizer.is_calibrated
    assert quantizer.observer.count == 0
    quantizer.set_bit_width(4)
    assert not quantizer.is_calibrated


def test_its_text_names_it() -> None:
    assert repr(activation()) == "Quantizer('act', activation, 8 bits, bypass)"


# A user's own class.


class Own:
    """Returns what it is told to."""

    result: Any = None

    def __init__(self, spec: QuantSpec) -> None:
        self.spec = spec

    def __call__(self, x: Tensor, encoding: Encoding) -> Any:
        return x * self.spec.bit_width if self.result is None else self.result


NOT_CALLABLE = 3


def custom(result: Any = None) -> Quantizer:
    factory = type("Own", (Own,), {"result": result})
    quantizer = Quantizer("mine", Kind.ACTIVATION, QuantSpec(8), None, (0.0, 1.0), factory)
    quantizer.set_range()
    quantizer.mode = Mode.QUANTIZE
    return quantizer


def test_an_own_class_is_made_per_bit_width() -> None:
    quantizer = custom()
    assert torch.equal(quantizer(torch.ones(2)), torch.full((2,), 8.0))
    quantizer.set_bit_width(4)
    assert torch.equal(quantizer(torch.ones(2)), torch.full((2,), 4.0))


@pytest.mark.parametrize(
    ("result", "text"),
    [
        (torch.ones(3), r"must return a tensor of torch.float32 \(2,\), got torch.float32 \(3,\)"),
        (torch.ones(2, dtype=torch.float64), r"must return a tensor of torch.float32 \(2,\), got torch.float64 \(2,\)"),
        ("x", r"The custom quantizer of 'mine' must return a tensor of torch.float32 \(2,\), got str"),
    ],
)
def test_an_own_class_that_changes_the_tensor_is_refused(result: Any, text: str) -> None:
    with pytest.raises(CaptureError, match=text):
        custom(result)(torch.ones(2))


def test_loading_an_own_class() -> None:
    assert load_custom_quantizer(None) is None
    assert load_custom_quantizer("tests.test_quantizer.Own") is Own


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("Own", "`quantizer` must be an import path such as 'package.module.Class', got 'Own'"),
        ("tests.nowhere.Own", "names 'tests.nowhere.Own', which can not be imported: No module named 'tests.nowhere'"),
        ("tests.test_quantizer.Missing", "which can not be imported: module .* has no attribute 'Missing'"),
        ("tests.test_quantizer.NOT_CALLABLE", "must name a class or function, .* is a int"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(path: str, text: str) -> None:
    with pytest.raises(SettingsError, match=text):
        load_custom_quantizer(path)

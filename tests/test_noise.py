"""SQNR against its definition in float64."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from lightning_quantdebug.encoding import encoding_from_range
from lightning_quantdebug.errors import SettingsError
from lightning_quantdebug.fake_quantize import BLOCK_SIZE, fake_quantize
from lightning_quantdebug.noise import sqnr_db
from lightning_quantdebug.target import QuantSpec


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (7, 5), (2, BLOCK_SIZE + 3)])
def test_sqnr_is_its_definition(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(shape, generator=generator) * 3 + 1).to(dtype)
    noisy = (x.float() + torch.randn(shape, generator=generator) * 0.1).to(dtype)
    exact, other = x.double().numpy(), noisy.double().numpy()
    expected = 10 * np.log10(np.mean(exact**2) / np.mean((exact - other) ** 2))
    assert sqnr_db(x, noisy) == pytest.approx(expected, rel=1e-9)


def test_sqnr_of_uniform_noise_is_6_db_a_bit():
    x = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    ends = torch.tensor(-1.0), torch.tensor(1.0)
    for bit_width in (4, 8, 12):
        quantized = fake_quantize(x, encoding_from_range(*ends, QuantSpec(bit_width)))
        assert sqnr_db(x, quantized) == pytest.approx(6.02 * bit_width, abs=0.6)


def test_sums_do_not_overflow_half_precision():
    x = torch.full((1000,), 300.0, dtype=torch.float16)
    assert sqnr_db(x, x + 3) == pytest.approx(40.0, abs=1e-6)


def test_ends_of_the_scale():
    zero, one = torch.zeros(3), torch.ones(3)
    assert sqnr_db(one, one) == math.inf
    assert sqnr_db(zero, zero) == math.inf
    assert sqnr_db(zero, one) == -math.inf
    assert sqnr_db(torch.empty(0), torch.empty(0)) == math.inf
    assert math.isnan(sqnr_db(one, torch.tensor([1.0, float("nan"), 1.0])))
    assert math.isnan(sqnr_db(torch.tensor([float("inf"), 1.0, 1.0]), one))


def test_different_shapes_are_refused():
    with pytest.raises(SettingsError, match=re.escape("must have one shape, got (3,) and (3, 1)")):
        sqnr_db(torch.zeros(3), torch.zeros(3, 1))

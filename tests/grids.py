"""What tests of the engine ask of an instrumented network, and the grid of a quantizer in its plainest form."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lightning_quantdebug.instrument import Instrumentation


def quantized(q: Instrumentation, *batches: Any) -> None:
    """Calibrate and switch everything on."""
    q.calibrate(batches)
    q.set_mode("quantize")


def reasons(q: Instrumentation) -> dict[str, str]:
    return {item.name: item.reason for item in q.coverage.unquantized}


def grid(q: Instrumentation, name: str, x: Tensor) -> Tensor:
    """``x`` on the grid of a quantizer."""
    encoding = q.quantizers[name].encoding
    assert encoding is not None
    scale, zero = encoding.scale, encoding.zero_point
    if scale.ndim:
        shape = [1] * x.ndim
        shape[encoding.channel_axis or 0] = -1
        scale, zero = scale.reshape(shape), zero.reshape(shape)
    steps = (x / scale).round() + zero
    return (steps.clamp(encoding.spec.quant_min, encoding.spec.quant_max) - zero) * scale

"""The final setting of each quantizer, as plain numbers for the report."""

from __future__ import annotations

from lightning_quantdebug.quantizer import Quantizer
from lightning_quantdebug.report import QuantizerSetting


def setting_of(quantizer: Quantizer) -> QuantizerSetting:
    """Plain numbers of a quantizer's final setting."""
    encoding, spec = quantizer.encoding, quantizer.spec
    seen = quantizer.observer.count > 0
    zero_points = set() if encoding is None else set(encoding.zero_point.flatten().tolist())
    return QuantizerSetting(
        name=quantizer.name,
        kind=quantizer.kind.value,
        bit_width=spec.bit_width,
        symmetric=spec.symmetric,
        granularity=spec.granularity.value,
        range_min=None if encoding is None else float(encoding.range_min.min()),
        range_max=None if encoding is None else float(encoding.range_max.max()),
        scale=None if encoding is None else float(encoding.scale.max()),
        zero_point=zero_points.pop() if len(zero_points) == 1 else None,
        observed_min=quantizer.observer.range_min if seen else None,
        observed_max=quantizer.observer.range_max if seen else None,
        channels=1 if encoding is None else encoding.scale.numel(),
    )

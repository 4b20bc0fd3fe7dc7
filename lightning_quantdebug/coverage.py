"""What is not quantized, and why, as far as only running the network tells."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lightning_quantdebug.interception import clean_path
from lightning_quantdebug.quantizer import Quantizer
from lightning_quantdebug.report import Unquantized
from lightning_quantdebug.topology import Topology


def never_calibrated(quantizers: Mapping[str, Quantizer]) -> list[Unquantized]:
    """The quantizers that have no range although calibration has run."""
    if not any(quantizer.is_calibrated for quantizer in quantizers.values()):
        return []
    without = [quantizer for quantizer in quantizers.values() if not quantizer.is_calibrated]
    return [Unquantized(q.name, f"calibration {_why_no_range(q)}: it runs in FP32") for q in without]


def _why_no_range(quantizer: Quantizer) -> str:
    """What calibration did not give an uncalibrated quantizer."""
    return "saw nothing but NaN and infinity there" if quantizer.observer.non_finite else "never reached it"


def unused(topology: Topology, root: nn.Module, scope: str) -> list[Unquantized]:
    """The weights inside ``scope`` that no recorded batch used."""
    used = {value.name for operation in topology for _, value in operation.inputs}
    found = ((clean_path(name), parameter) for name, parameter in root.named_parameters())
    inside = f"{scope}." if scope else ""
    return [
        Unquantized(name, "no recorded batch used it: a branch that was not taken, or a layer that is not called")
        for name, parameter in found
        if parameter.ndim > 1 and name.startswith(inside) and name not in used
    ]

"""Find out whether a Lightning model survives quantization, what breaks it, and where."""

from lightning_quantdebug.callback import QuantDebug, diagnose
from lightning_quantdebug.instrument import Instrumentation, instrument
from lightning_quantdebug.quantizer import CustomQuantizer, Quantizer
from lightning_quantdebug.report import Report
from lightning_quantdebug.target import QuantSpec, QuantTarget

__version__ = "0.1.0"

__all__ = [
    "CustomQuantizer",
    "Instrumentation",
    "QuantDebug",
    "QuantSpec",
    "QuantTarget",
    "Quantizer",
    "Report",
    "diagnose",
    "instrument",
]

"""Find out whether a Lightning model survives quantization, what breaks it, and where."""

from lightning_quantdebug.callback import QuantDebug, diagnose
from lightning_quantdebug.errors import ExportError, QuantDebugError, RecipeError
from lightning_quantdebug.exports import export_encodings, export_onnx, export_pt2
from lightning_quantdebug.instrument import Instrumentation, instrument
from lightning_quantdebug.quantizer import CustomQuantizer, Quantizer
from lightning_quantdebug.recipe import QuantizedModel, apply_recipe, save_recipe
from lightning_quantdebug.report import Report
from lightning_quantdebug.target import QuantSpec, QuantTarget

__version__ = "0.1.0"

__all__ = [
    "CustomQuantizer",
    "ExportError",
    "Instrumentation",
    "QuantDebug",
    "QuantDebugError",
    "QuantSpec",
    "QuantTarget",
    "QuantizedModel",
    "Quantizer",
    "RecipeError",
    "Report",
    "apply_recipe",
    "diagnose",
    "export_encodings",
    "export_onnx",
    "export_pt2",
    "instrument",
    "save_recipe",
]

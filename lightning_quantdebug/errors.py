"""Errors that reach the user: each names the value, the expectation and the way out."""

from __future__ import annotations


class QuantDebugError(Exception):
    """Base of every error that this package raises on purpose."""


class SettingsError(QuantDebugError, ValueError):
    """A setting has a value that can not be used."""


class CaptureError(QuantDebugError, RuntimeError):
    """The network can not be captured, or nothing in it can be quantized."""


class CalibrationError(QuantDebugError, RuntimeError):
    """No range can be set from what was observed."""


class EstimateError(QuantDebugError, RuntimeError):
    """Gradients say nothing of the network: it forbids them, or nothing was looked at."""


class EvaluationError(QuantDebugError, RuntimeError):
    """The user's validation loop can not be run or does not give the monitored score."""


class LanesError(EvaluationError):
    """Several evaluations can not go side by side through one pass; one after the other they can."""


class TooManyLanesError(LanesError):
    """What the evaluations of one pass gather takes too much memory: fewer of them can go side by side."""


class NonFiniteScoreError(EvaluationError):
    """The monitored score is NaN or infinite."""


class NoTrainingDataError(EvaluationError):
    """There is no training DataLoader to set ranges on, as in ``trainer.validate`` with a validation loader alone."""


class ReportError(QuantDebugError, ValueError):
    """A report can not be read or written."""


class RecipeError(QuantDebugError, ValueError):
    """A recipe can not be read or written, or does not belong to the model that it is applied to."""


class ExportError(QuantDebugError, RuntimeError):
    """The quantized network can not be exported."""

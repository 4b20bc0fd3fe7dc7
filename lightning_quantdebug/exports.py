"""Export by hand, without a Trainer: ONNX, AIMET's encodings and ``.pt2``, each proven against the simulation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lightning_quantdebug.errors import ExportError
from lightning_quantdebug.export_files import Exporter, writers
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.model_loan import BorrowedForward
from lightning_quantdebug.network import NetworkCall
from lightning_quantdebug.recipe import QuantizedModel, call_of, network_of
from lightning_quantdebug.report import Export


def export_onnx(
    model: nn.Module | Instrumentation, path: str | Path, example_batch: Any, *, class_axis: int | None = None
) -> Export:
    """Write a quantized model as ONNX with ``QuantizeLinear`` and ``DequantizeLinear``, and run it in ONNX Runtime.

    Args:
        model: What :func:`~lightning_quantdebug.recipe.apply_recipe` returns, or a model inside ``with
            instrument(...)``.
        path: The file to write, such as ``"model.onnx"``.
        example_batch: What the network takes: a tensor, a tuple of arguments or a dict of keyword arguments. The number
            of samples may be another one later, where the network's code does not fix it.
        class_axis: Axis of the classes of the first output, to count equal predictions; ``None``: equal values.

    Returns:
        What was written and how it compares with the simulation; ``agreement`` is the last word.

    Raises:
        ExportError: If ``model`` has no quantizers, or the network can not be exported; the message says where.
        ReportError: If the file can not be written.

    Examples:
        >>> import tempfile, torch
        >>> from lightning_quantdebug import instrument
        >>> model, batch = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval(), torch.randn(16, 4)
        >>> with instrument(model, batch) as q, tempfile.TemporaryDirectory() as folder:
        ...     q.calibrate([batch])
        ...     q.set_mode("quantize")
        ...     export_onnx(q, f"{folder}/model.onnx", batch).agreement.value
        'verified'
    """
    return _exporter(model, example_batch, class_axis).write_onnx(Path(path))


def export_encodings(model: nn.Module | Instrumentation, directory: str | Path, example_batch: Any) -> Export:
    """Write a float ONNX file and AIMET's encodings (schemas 1.0.0 and 2.0.0) of its tensors, for QNN and SNPE.

    Args:
        model: See :func:`export_onnx`.
        directory: Where ``model_float.onnx``, ``model.encodings`` and ``model_2.0.0.encodings`` are written.
        example_batch: See :func:`export_onnx`.

    Returns:
        What was written; compared is the float file with the simulation whose activations stay in float.

    Raises:
        ExportError: See :func:`export_onnx`.
        ReportError: If a file can not be written.
    """
    return _exporter(model, example_batch, None).write_encodings(Path(directory))


def export_pt2(
    model: nn.Module | Instrumentation, path: str | Path, example_batch: Any, *, class_axis: int | None = None
) -> Export:
    """Write a quantized model as a ``.pt2`` file of ``torch.export``, load it and run it.

    Args:
        model: See :func:`export_onnx`.
        path: The file to write, such as ``"model.pt2"``.
        example_batch: See :func:`export_onnx`.
        class_axis: See :func:`export_onnx`.

    Returns:
        What was written and how it compares with the simulation.

    Raises:
        ExportError: See :func:`export_onnx`.
        ReportError: If the file can not be written.
    """
    return _exporter(model, example_batch, class_axis).write_pt2(Path(path))


def export_formats(
    model: QuantizedModel, directory: str | Path, call: NetworkCall, formats: Sequence[str]
) -> list[Export]:
    """Write a model with a recipe on it in several formats, as the command line does.

    Args:
        model: With its recipe.
        directory: Where to write.
        call: What the network takes.
        formats: ``onnx``, ``encodings``, ``pt2``.

    Raises:
        ExportError: If the network can not be exported.
        ReportError: If a file can not be written.
    """
    write = writers(Exporter(model.session(call), model.network, [call]), Path(directory))
    return [write[name]() for name in formats]


def _exporter(model: nn.Module | Instrumentation, example_batch: Any, class_axis: int | None) -> Exporter:
    """What exports a model, for one batch."""
    call = call_of(example_batch)
    if isinstance(model, QuantizedModel):
        return Exporter(model.session(call), model.network, [call], class_axis)
    session = model if isinstance(model, Instrumentation) else _session_of(model)
    if not any(quantizer.is_calibrated for quantizer in session.quantizers.values()):
        raise ExportError("No quantizer has a range yet: call `calibrate` and `set_mode('quantize')` before exporting.")
    return Exporter(session, network_of(session, call), [call], class_axis)


def _session_of(model: nn.Module) -> Instrumentation:
    """The session that has borrowed a module's ``forward``."""
    forward = getattr(model, "__dict__", {}).get("forward")
    owner = getattr(forward.run, "__self__", None) if isinstance(forward, BorrowedForward) else None
    if not isinstance(owner, Instrumentation):
        raise ExportError(
            f"{type(model).__name__} has no quantizers. Give what `apply_recipe(model, 'recipe')` returns, or export "
            "inside `with instrument(model, batch) as q:`."
        )
    return owner

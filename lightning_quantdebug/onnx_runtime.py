"""Run an exported file in ONNX Runtime: plainly, as the user would, and in the ways that explain a difference."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_quantdebug.errors import ExportError
from lightning_quantdebug.export_check import in_parts


class Way(str, Enum):
    """How ONNX Runtime is told to run a file; the value is what reports call it."""

    PLAIN = "onnxruntime, optimizations off"
    USUAL = "onnxruntime, as usual"
    PRECISE = "onnxruntime, without U8S8 saturation"


class OnnxFile:
    """An ONNX file, ready to run on the CPU.

    Args:
        model: Path of the file, or its bytes.
        way: How to run it.
        threads: Threads of one operation; 0: as many as the machine has.

    Raises:
        ExportError: If ONNX Runtime can not load it.
    """

    def __init__(self, model: str | Path | bytes, way: Way = Way.USUAL, threads: int = 0) -> None:
        """Load it."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = threads
        if way is Way.PLAIN:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        if way is Way.PRECISE:
            # Sums of two products of 8 bits each do not fit into 16 bits: CPUs without VNNI cut them off, unless
            # weights are made unsigned.
            options.add_session_config_entry("session.x64quantprecision", "1")
        try:
            content = model if isinstance(model, bytes) else str(model)
            self._session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
        # ONNX Runtime's own exceptions have no base but this one.
        except Exception as error:
            first = str(error).strip().splitlines()[0]
            raise ExportError(f"ONNX Runtime can not load the exported model: {first}") from error
        self._inputs = self._session.get_inputs()

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Run it: tensors in, tensors out, in the order of the file; a file with a fixed batch runs part by part."""
        return in_parts(self._run, _fixed_batch(self._inputs))(tensors)

    def _run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """One run."""
        feeds = {}
        for item, tensor in zip(self._inputs, tensors, strict=True):
            feeds[item.name] = np.ascontiguousarray(tensor.detach().cpu().numpy())
        # A tensor that the network does not read is no input of the file.
        return [torch.from_numpy(np.asarray(result)) for result in self._session.run(None, feeds)]

    @property
    def output_names(self) -> list[str]:
        """Names of what comes out."""
        return [item.name for item in self._session.get_outputs()]


def _fixed_batch(inputs: Sequence[Any]) -> int | None:
    """The batch that a file was made for, ``None`` if it takes any."""
    sizes = {item.shape[0] for item in inputs if item.shape}
    return next(iter(sizes)) if len(sizes) == 1 and isinstance(next(iter(sizes)), int) else None

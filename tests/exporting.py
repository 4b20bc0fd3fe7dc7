"""Quantized networks to export, and the ways in which files are run in tests."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from lightning_quantdebug import Instrumentation, instrument
from lightning_quantdebug.export_files import Exporter
from lightning_quantdebug.model_loan import call_with
from lightning_quantdebug.network import output_tensors
from lightning_quantdebug.recipe import call_of, network_of
from tests import zoo

EXPORTABLE = [name for name in zoo.ZOO if name != "branching"]

PER_GROUP = {"preset": "w4a8", "weights": {"bit_width": 4, "granularity": "per_group", "group_size": 4}}
TARGETS: dict[str, Any] = {
    name: name
    for name in ("int8", "int8_per_tensor", "w4a8", "w4a4", "w6a6", "w8a16", "w16a16", "tensorrt", "xnnpack", "qnn")
}


@contextmanager
def quantized(name: str, target: Any = "int8", seed: int = 0):
    """A session with the quantizers on, and its batch."""
    model, batch = zoo.make(name, seed)
    with instrument(model, batch, target) as session:
        session.calibrate([batch])
        session.set_mode("quantize")
        yield session, batch


def exporter_of(session: Instrumentation, batch: Any, class_axis: int | None = None) -> Exporter:
    """What exports a session."""
    call = call_of(batch)
    return Exporter(session, network_of(session, call), [call], class_axis)


def simulated(session: Instrumentation, batch: Any) -> list[Tensor]:
    """What the simulation gives."""
    with torch.no_grad():
        return [tensor.clone() for tensor in output_tensors(call_with(session.root, batch))]


def ran(content: bytes, tensors: list[Tensor], optimized: bool = False) -> list[np.ndarray]:
    """What ONNX Runtime gives, asked without any code of ours."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    feeds = {item.name: tensor.numpy() for item, tensor in zip(session.get_inputs(), tensors, strict=True)}
    return session.run(None, feeds)


def operations(content: bytes, tmp: Callable[[], str]) -> dict[str, int]:
    """The operations that ONNX Runtime runs after its own optimizations, counted."""
    from collections import Counter

    import onnx

    path = tmp()
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, path
    onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return dict(Counter(node.op_type for node in onnx.load(path).graph.node))

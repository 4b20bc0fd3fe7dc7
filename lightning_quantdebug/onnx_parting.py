"""Where an ONNX file and the simulation part first: the values of every quantizer, side by side."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from torch import Tensor

from lightning_quantdebug.export_check import Simulation
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.network import Network, NetworkCall
from lightning_quantdebug.onnx_export import OnnxNetwork, copy_of, to_proto
from lightning_quantdebug.onnx_graph import pairs
from lightning_quantdebug.onnx_operators import QUANTIZER
from lightning_quantdebug.onnx_runtime import OnnxFile, Way

# Values off by more than a step and a half are no ties; so are more than this share that are off by one.
_MOST_TIES = 0.01


def first_parting(network: OnnxNetwork, session: Instrumentation, called: Network, call: NetworkCall) -> str | None:
    """The first quantizer whose values differ by more than ties explain, in words; ``None`` if there is none.

    Args:
        network: The ONNX file.
        session: The simulation, with the quantizers on.
        called: What of its root is called.
        call: A batch.
    """
    simulated = _simulated(session, called, call)
    for name, values in _values(network.model, call).items():
        expected, encoding = simulated.get(name), session.quantizers[name].encoding
        if expected is None or encoding is None or expected.shape != values.shape:
            continue
        steps = (values - expected).abs() / float(encoding.scale)
        share = float((steps > 0.5).double().mean())
        if float(steps.max()) > 1.5 or share > _MOST_TIES:
            return (
                f"the first quantizer to differ is {name!r}, where {share:.1%} of the values are off, by up to "
                f"{float(steps.max()):.3g} steps"
            )
    return None


def _simulated(session: Instrumentation, called: Network, call: NetworkCall) -> dict[str, Tensor]:
    """The values of every operation that a quantizer is named after."""
    found: dict[str, Tensor] = {}

    def keep(name: str, result: Any) -> None:
        if isinstance(result, Tensor) and name in session.quantizers:
            found.setdefault(name, result.detach().cpu().clone())

    with session.traced(keep):
        Simulation(session, called, [call]).outputs()
    return found


def _values(model: ir.Model, call: NetworkCall) -> dict[str, Tensor]:
    """The values of every quantizer in the file, in order of execution."""
    probed = copy_of(model)
    names: dict[str, str] = {}
    for quantizes, dequantizes in pairs(probed.graph):
        name, value = quantizes.metadata_props.get(QUANTIZER, ""), dequantizes.outputs[0]
        if name and name not in names.values():
            names[str(value.name)] = name
            if value not in probed.graph.outputs:
                probed.graph.outputs.append(value)
    file = OnnxFile(to_proto(probed).SerializeToString(), Way.PLAIN)
    results = dict(zip(file.output_names, file(call.tensors), strict=True))
    return {name: results[value] for value, name in names.items()}

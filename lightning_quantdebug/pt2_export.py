"""The quantized network as a ``.pt2`` file: an ``ExportedProgram`` of plain torch operations.

Quantizers are ``div``, ``round``, ``clamp`` and ``mul``, in the order of the simulation, and weights are integers that
are dequantized. Nothing but torch is needed to load it. The operators of ``quantized_decomposed``, which converters
look for, are not used: they multiply by the reciprocal of a scale, which sends ties to the other level, and a file with
them can only be loaded where a package that torch is about to drop was imported.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.passes import move_to_device_pass

from lightning_quantdebug.export_check import Run, in_parts
from lightning_quantdebug.exported_network import ExportedNetwork, Traced, autocast_off, pruned, trace
from lightning_quantdebug.network import NetworkCall


def to_pt2(exported: ExportedNetwork, call: NetworkCall, others: Sequence[NetworkCall] = ()) -> Traced:
    """Trace a quantized network as plain torch operations, on the CPU and without its float weights.

    Args:
        exported: The network.
        call: A call of it, with two samples at least.
        others: Further calls, which show what varies besides the batch.

    Raises:
        ExportError: If the network can not be traced; the message names the line of its code.
    """
    traced = trace(exported, call, plain=True, others=others)
    program = pruned(traced.program, traced, call.tensors)
    return Traced(move_to_device_pass(program, "cpu"), traced.dynamic, traced.note)


def write_pt2(program: ExportedProgram) -> Callable[[IO[bytes]], object]:
    """What writes a program into an open file."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return lambda file: file.write(buffer.getbuffer())


def load_pt2(path: str | Path) -> Run:
    """What runs a file: takes tensors and gives tensors, in order; a file with a fixed batch runs part by part."""
    # The tensors of a program that is loaded in inference mode could not be written to, as some networks do.
    with torch.inference_mode(False):
        program = torch.export.load(str(path))
        module = program.module()

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad(), autocast_off():
            return list(module(*(tensor.cpu() for tensor in tensors)))

    return in_parts(run, _fixed_batch(program))


def _fixed_batch(program: ExportedProgram) -> int | None:
    """The number of samples that a program was made for, ``None`` if its sizes may vary."""
    users = program.graph_signature.user_inputs
    shapes = [node.meta["val"].shape for node in program.graph.nodes if node.name in users]
    if any(isinstance(size, torch.SymInt) for shape in shapes for size in shape):
        return None
    return int(shapes[0][0])

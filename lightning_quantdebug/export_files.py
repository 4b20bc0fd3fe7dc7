"""Write the quantized network in one format, read it back and prove that it computes what was accepted.

Each format is written whole or not at all, is loaded from where it was written, and runs the same batches as the
simulation. What can not be written or proven is said, and nothing else suffers from it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lightning_quantdebug.adjustment import Adjustment
from lightning_quantdebug.errors import ExportError
from lightning_quantdebug.export_check import Run, Simulation, compare, is_within_floor
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.interception import OpKey
from lightning_quantdebug.network import Network, NetworkCall
from lightning_quantdebug.report import Agreement, Comparison, Export, write_atomically
from lightning_quantdebug.target import Kind, Mode


@dataclass(eq=False)
class Exporter:
    """Writes one quantized network in several formats.

    Args:
        session: Calibrated, with the quantizers on that are exported.
        network: What of its root is called.
        calls: Calls of it: the first is traced, all are compared.
        class_axis: Axis of the classes of the first output; ``None``: it has none.
    """

    session: Instrumentation
    network: Network
    calls: Sequence[NetworkCall]
    class_axis: int | None = None

    @cached_property
    def _example(self) -> NetworkCall:
        """The call that is traced."""
        from lightning_quantdebug.exported_network import with_two_samples

        return with_two_samples(self.calls[0].copied())

    @cached_property
    def exported(self) -> Any:
        """The network, ready to be traced."""
        from lightning_quantdebug.exported_network import ExportedNetwork

        return ExportedNetwork(self.session, self.network, self._example)

    @cached_property
    def onnx(self) -> Any:
        """The network as ONNX, in memory."""
        from lightning_quantdebug.onnx_export import to_onnx

        return to_onnx(self.exported, self._example, self.calls[1:])

    @property
    def simulation(self) -> Simulation:
        """The simulation as it was accepted."""
        return Simulation(self.session, self.network, self.calls, self.class_axis)

    @cached_property
    def _yardstick(self) -> tuple[tuple[float, float], bool]:
        """What sums in another order do to the simulation, and whether everything that comes out lies on a grid."""
        reference = self.simulation.outputs()
        units = self.simulation.units(reference)
        return self.simulation.floor(reference, units), None not in units

    @property
    def _floor(self) -> tuple[float, float]:
        """What sums in another order do to the simulation."""
        return self._yardstick[0]

    # ONNX.

    def write_onnx(self, path: Path) -> Export:
        """Write ``model.onnx`` and run it in ONNX Runtime.

        Raises:
            ExportError: If the network can not be exported.
            ReportError: If the file can not be written.
        """
        from lightning_quantdebug.onnx_export import to_proto
        from lightning_quantdebug.onnx_runtime import OnnxFile, Way

        network = self.onnx
        content = to_proto(network.fused()).SerializeToString()
        write_atomically(path, lambda file: file.write(content))
        with self._integer_biases():
            found = [self._compared(OnnxFile(path, way), way.value) for way in (Way.PLAIN, Way.USUAL)]
            reason = network.traced.note
            good = [self._is_good(comparison) for comparison in found]
            if not all(good):
                precise = self._precise(path)
                reason = joined(self._why(good, precise), reason)
                found += [precise] if precise is not None else []
        return Export("onnx", agreement_of(all(good)), reason, (str(path),), tuple(found))

    def _precise(self, path: Path) -> Comparison | None:
        """The file without the saturation of some CPUs; ``None`` where ONNX Runtime can not run it so."""
        from lightning_quantdebug.onnx_runtime import OnnxFile, Way

        try:
            return self._compared(OnnxFile(path, Way.PRECISE), Way.PRECISE.value)
        except ExportError:
            return None

    def _why(self, good: Sequence[bool], precise: Comparison | None) -> str:
        """Why a file differs, from the ways in which it was run."""
        if not good[0]:
            return f"it differs from the simulation by itself: {self._parting()}"
        if precise is not None and self._is_good(precise):
            return (
                "U8S8 saturation: this CPU has no VNNI, and its kernels cut sums of two products off at 16 bits. The "
                "file is right; run it with the session option `session.x64quantprecision` = 1, or on another CPU"
            )
        if self.onnx.too_large:
            return (
                f"{', '.join(self.onnx.too_large[:3])} do not fit into int32, as the inputs of these layers hardly "
                "vary, and ONNX Runtime's optimizations cut them off; without optimizations the file is right"
            )
        return "ONNX Runtime's graph optimizations change what the file computes; without them it is right"

    def _parting(self) -> str:
        """The quantizer where file and simulation part first."""
        from lightning_quantdebug.onnx_parting import first_parting

        parting = first_parting(self.onnx, self.session, self.network, self.calls[0])
        return parting or "no single quantizer differs by more than rounding, the differences add up"

    @contextmanager
    def _integer_biases(self) -> Iterator[None]:
        """The simulation with biases on the int32 grid that the file has them on."""
        before = dict(self.session.adjustments)
        try:
            self.session.adjust(self._corrections())
            yield
        finally:
            self.session.set_adjustments(before)

    def _corrections(self) -> dict[OpKey, Adjustment]:
        """What int32 biases differ by, for each operation."""
        keys = self.session.keys_by_name
        found = {}
        for operation, bias in self.onnx.biases.items():
            difference = torch.from_numpy(bias.value - bias.before)
            if operation in keys:
                found[keys[operation]] = Adjustment(bias_correction=difference)
        return found

    # Encodings.

    def write_encodings(self, directory: Path) -> Export:
        """Write a float ONNX file and the encodings of its tensors, and run the former.

        Raises:
            ExportError: If the network can not be exported.
            ReportError: If a file can not be written.
        """
        from lightning_quantdebug.encodings_export import encodings_1_0_0, encodings_2_0_0, float_twin
        from lightning_quantdebug.onnx_export import to_proto
        from lightning_quantdebug.onnx_runtime import OnnxFile, Way

        encodings = {name: q.encoding for name, q in self.session.quantizers.items() if q.encoding is not None}
        twin = float_twin(self.onnx, encodings)
        model = directory / "model_float.onnx"
        content = to_proto(twin.model).SerializeToString()
        write_atomically(model, lambda file: file.write(content))
        files = [model]
        versions = {"model.encodings": encodings_1_0_0(twin), "model_2.0.0.encodings": encodings_2_0_0(twin)}
        for name, values in versions.items():
            files.append(write_atomically(directory / name, json.dumps(values, indent=1, allow_nan=False) + "\n"))
        with self._integer_biases(), self.session.modes(Mode.QUANTIZE, kind=Kind.WEIGHT):
            found = compare(self.simulation, OnnxFile(model, Way.PLAIN), f"{Way.PLAIN.value}, float activations")
        good = is_within_floor(found, on_grid=False)
        reason = "" if good else "the float model is not the simulation with float activations"
        return Export("encodings", agreement_of(good), reason, tuple(map(str, files)), (found,))

    # torch.export.

    def write_pt2(self, path: Path) -> Export:
        """Write ``model.pt2``, load it and run it.

        Raises:
            ExportError: If the network can not be exported.
            ReportError: If the file can not be written.
        """
        from lightning_quantdebug.pt2_export import load_pt2, to_pt2, write_pt2

        traced = to_pt2(self.exported, self._example, self.calls[1:])
        write_atomically(path, write_pt2(traced.program))
        found = self._compared(load_pt2(path), "torch.export")
        good = self._is_good(found)
        reason = joined("" if good else "it differs from the simulation", traced.note)
        return Export("pt2", agreement_of(good), reason, (str(path),), (found,))

    def _compared(self, run: Run, runtime: str) -> Comparison:
        """A file beside the simulation."""
        return compare(self.simulation, run, runtime, self._floor)

    def _is_good(self, comparison: Comparison) -> bool:
        """Whether a comparison proves agreement."""
        return is_within_floor(comparison, on_grid=self._yardstick[1])


def agreement_of(good: bool) -> Agreement:
    """What a comparison has shown of a file that was written."""
    return Agreement.VERIFIED if good else Agreement.UNVERIFIED


def joined(*reasons: str) -> str:
    """Reasons in one line, without those that say nothing."""
    return "; ".join(reason for reason in reasons if reason)


def run_of(export: Export) -> Run | None:
    """What runs an exported file as its user would, ``None`` for encodings, which no engine of ours takes."""
    if export.name == "onnx":
        from lightning_quantdebug.onnx_runtime import OnnxFile

        return OnnxFile(export.files[0])
    if export.name == "pt2":
        from lightning_quantdebug.pt2_export import load_pt2

        return load_pt2(export.files[0])
    return None


Writer = Callable[[], Export]


def writers(exporter: Exporter, directory: Path) -> Mapping[str, Writer]:
    """What writes each format below a directory."""
    return {
        "onnx": lambda: exporter.write_onnx(directory / "model.onnx"),
        "encodings": lambda: exporter.write_encodings(directory),
        "pt2": lambda: exporter.write_pt2(directory / "model.pt2"),
    }

"""A network as a module that torch can trace, with its quantizers as operators and its weights as integers.

``torch.export`` runs the network's own Python code once; our interception runs inside that, as it does in the
simulation, and puts operators where quantizers sit. Batch normalizations are folded, remedies applied and weights
rounded before, with real numbers, so that nothing of this is left to whoever reads the file.
"""

from __future__ import annotations

import io
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from lightning_quantdebug.adjustment import HAS_BIAS
from lightning_quantdebug.effective_weight import WeightPlace
from lightning_quantdebug.encoding import Encoding
from lightning_quantdebug.errors import ExportError
from lightning_quantdebug.export_operators import DEQUANTIZE, FAKE_QUANTIZE, dequantized, fake_quantized, integers_of
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.model_loan import lent
from lightning_quantdebug.network import Network, NetworkCall, named_outputs
from lightning_quantdebug.operations import argument, operation_name, put_argument, value_at, with_argument
from lightning_quantdebug.quantizer import Quantizer
from lightning_quantdebug.runner import OpPlan, Runner
from lightning_quantdebug.target import Kind, Mode

_PACKAGE, _TORCH = str(Path(__file__).parent), str(Path(torch.__file__).parent)
_STANDARD = str(Path(traceback.__file__).parent)
# What torch prints while it fails; the error that reaches the user says it in one sentence.
_LOGGERS = (
    *("torch.fx.experimental.symbolic_shapes", "torch.export", "torch._export", "torch.onnx", "onnxscript"),
    "torch.onnx._internal.exporter._registration",
)


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A weight as it is stored, and the bias of its operation.

    Attributes:
        name: Name of its quantizer.
        operation: Name of the operation that reads it.
        weight: What the operation computes with, in float.
        encoding: Its grid; ``None``: it stays in float.
        bias: The bias after folding, adjusting and correcting; ``None``: there is none, or the operation has several.
    """

    name: str
    operation: str
    weight: Tensor
    encoding: Encoding | None
    bias: Tensor | None


class _Emitter(Quantizer):
    """An activation quantizer that puts an operator into the trace."""

    emit: Callable[..., Tensor] | None = None

    @classmethod
    def of(cls, quantizer: Quantizer) -> _Emitter:
        """One with the encoding of another quantizer."""
        emitter = cls(quantizer.name, quantizer.kind, quantizer.spec, quantizer.channel_axis, None, quantizer.factory)
        emitter.encoding = quantizer.encoding
        emitter.mode = Mode.QUANTIZE if quantizer.mode is Mode.QUANTIZE and quantizer.is_calibrated else Mode.BYPASS
        return emitter

    def quantized(self, x: Tensor, overwrite: bool = False) -> Tensor:
        """The operator while a trace is made, else the numbers."""
        encoding = self.encoding
        if self.emit is None or self.kind is Kind.WEIGHT or encoding is None:
            return super().quantized(x)
        spec = encoding.spec
        scale, zero_point = float(encoding.scale), int(encoding.zero_point)
        return self.emit(x, scale, zero_point, spec.quant_min, spec.quant_max, self.name)


class _ExportRunner(Runner):
    """Runs a network once to find its weights, and once more with stored weights in their places."""

    def prepare(self) -> None:
        """Nothing is known yet."""
        self.stored: dict[int, StoredWeight] = {}
        self.read: Callable[[int], tuple[Tensor, Tensor | None]] | None = None
        self._current: tuple[OpPlan, str] | None = None

    def run_planned(
        self, planned: OpPlan, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Note which operation is at work."""
        self._current = (planned, operation_name(func))
        return super().run_planned(planned, func, args, kwargs)

    def _with_weight(
        self, spot: WeightPlace, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with the weight and the bias as they are stored."""
        assert self._current is not None
        planned, op = self._current
        if self.read is not None and id(spot) in self.stored:
            weight, bias = self.read(id(spot))
            args, kwargs = with_argument(args, kwargs, spot.slot, weight)
            return (args, kwargs) if bias is None else put_argument(args, kwargs, 2, "bias", bias)
        args, kwargs = super()._with_weight(spot, args, kwargs)
        weight = value_at(args, kwargs, spot.slot)
        bias = argument(args, kwargs, 2, "bias") if op in HAS_BIAS else None
        encoding = spot.quantizer.encoding if spot.quantizer.mode is Mode.QUANTIZE else None
        self.stored[id(spot)] = StoredWeight(spot.quantizer.name, planned.name, weight, encoding, bias)
        return args, kwargs


class ExportedNetwork(nn.Module):
    """A network with flat tensors in and out, which torch can trace.

    Args:
        session: The quantizers on it, in the modes that are exported.
        network: What is called.
        call: One call of it; the tensors are those that the trace is made with.

    Attributes:
        weights: Every weight that is stored, by the index under which the module holds it.
        biases: The operation of every bias that is stored, likewise.
        output_names: Names of the tensors that come out.

    Raises:
        ExportError: If the network can not be stored: weights of another type than float32, a quantizer class of the
            user's.
    """

    def __init__(self, session: Instrumentation, network: Network, call: NetworkCall) -> None:
        """Find the weights by running the network once."""
        super().__init__()
        _check(session, network)
        self.network_root = network.module
        self.__dict__["session"] = session
        self.__dict__["called"] = network
        self.__dict__["call"] = call
        self._emitters = {name: _Emitter.of(quantizer) for name, quantizer in session.quantizers.items()}
        self._runner = session.make_runner(_ExportRunner, self._emitters)
        self._runner.prepare()
        with self._borrowed():
            output = network.run(session, call.args, call.kwargs)
        self.output_names = _unique([name for name, _ in named_outputs(output)])
        self.weights: list[StoredWeight] = []
        self.biases: list[str] = []
        self._indices: dict[int, tuple[int, int | None]] = {}
        for key, stored in self._runner.stored.items():
            self._indices[key] = self._store(stored), self._store_bias(stored)

    @property
    def network(self) -> Network:
        """What is called; kept from torch, which would take a module that it holds for one of this module's own."""
        found: Network = self.__dict__["called"]
        return found

    def _store(self, stored: StoredWeight) -> int:
        """Hold a weight; one that is used twice in the same way is held once."""
        for index, other in enumerate(self.weights):
            is_same_shape = other.name == stored.name and other.weight.shape == stored.weight.shape
            if is_same_shape and torch.equal(other.weight, stored.weight):
                return index
        index, encoding = len(self.weights), stored.encoding
        self.weights.append(stored)
        if encoding is None:
            self.register_buffer(f"weight_{index}", stored.weight.detach().clone())
        else:
            integers = integers_of(stored.weight.detach(), encoding)
            zero_point = encoding.zero_point.to(torch.int32)
            self.register_buffer(f"weight_{index}", integers)
            self.register_buffer(f"scale_{index}", encoding.scale.clone())
            self.register_buffer(f"zero_point_{index}", zero_point.to(integers.dtype))
            arguments = (encoding.channel_axis or 0, encoding.spec.group_size or 0)
            again = dequantized(integers, encoding.scale, zero_point, *arguments)
            if not torch.equal(again, stored.weight):
                raise ExportError(f"The weight {stored.name!r} is not on the grid that its quantizer has.")
        return index

    def _store_bias(self, stored: StoredWeight) -> int | None:
        """Hold the bias of an operation, each its own: as int32 it depends on the scale of what goes in."""
        if stored.bias is None:
            return None
        self.biases.append(stored.operation)
        self.register_buffer(f"bias_{len(self.biases) - 1}", stored.bias.detach().clone())
        return len(self.biases) - 1

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call the network with the given tensors; its quantizers are operators."""
        call: NetworkCall = self.__dict__["call"].with_tensors(tensors)
        output = self.network.run(self.__dict__["session"], call.args, call.kwargs)
        return tuple(tensor for _, tensor in named_outputs(output))

    @contextmanager
    def _borrowed(self) -> Iterator[None]:
        """The network in eval mode with our runner around it; it is given back as it was."""
        session: Instrumentation = self.__dict__["session"]
        device = self.__dict__["call"].tensors[0].device.type
        with lent(self.network.root), session.watched_by(self._runner), torch.autocast(device, enabled=False):
            yield

    @contextmanager
    def tracing(self, plain: bool) -> Iterator[None]:
        """Quantizers put operators into the trace while the block runs.

        Args:
            plain: Whether these are plain torch operations, else those of
                :mod:`lightning_quantdebug.export_operators`.
        """
        emit: Callable[..., Tensor] = fake_quantized if plain else FAKE_QUANTIZE
        dequantize: Callable[..., Tensor] = dequantized if plain else DEQUANTIZE

        def read(key: int) -> tuple[Tensor, Tensor | None]:
            index, bias = self._indices[key]
            encoding = self.weights[index].encoding
            weight = getattr(self, f"weight_{index}")
            if encoding is not None:
                scale, zero_point = getattr(self, f"scale_{index}"), getattr(self, f"zero_point_{index}")
                arguments = (encoding.channel_axis or 0, encoding.spec.group_size or 0)
                weight = dequantize(weight, scale, zero_point, *arguments)
            return weight, None if bias is None else getattr(self, f"bias_{bias}")

        training = self.training
        try:
            self._runner.read = read
            for emitter in self._emitters.values():
                emitter.emit = emit
            self.training = False
            with self._borrowed(), quiet():
                yield
        finally:
            self._runner.read, self.training = None, training
            for emitter in self._emitters.values():
                emitter.emit = None


@dataclass(frozen=True, eq=False)
class Traced:
    """A traced network.

    Attributes:
        program: What ``torch.export`` made of it.
        dynamic: For each tensor that goes in, the axes whose size may vary.
        note: What the user must know of sizes that may not; ``""``: nothing.
    """

    program: ExportedProgram
    dynamic: tuple[tuple[int, ...], ...]
    note: str = ""


def trace(exported: ExportedNetwork, call: NetworkCall, *, plain: bool, others: Sequence[NetworkCall] = ()) -> Traced:
    """Trace a network with ``torch.export``.

    Args:
        exported: The network.
        call: A call of it, with two samples at least.
        plain: See :meth:`ExportedNetwork.tracing`.
        others: Further calls, which show what varies besides the batch.

    Raises:
        ExportError: If the network can not be traced; the message names the line of its code.
    """
    tensors = call.tensors
    axes = varying_axes(call, others)
    try:
        with exported.tracing(plain):
            try:
                program = _exported(exported, tensors, axes, Dim.DYNAMIC)
                return Traced(program, axes)
            except Exception as error:
                # Torch raises its own errors, those of its compiler and those of the user's code alike.
                if not _is_about_sizes(error):
                    raise
            program = _exported(exported, tensors, tuple(() for _ in axes), None)
    except Exception as error:
        raise ExportError(_explained(error)) from error
    shapes = [list(tensor.shape) for tensor in tensors]
    note = (
        f"the code of the network fixes the batch, so that the file takes tensors of exactly {shapes} (`len(x)` and "
        "`int(x.shape[0])` do that, `x.shape[0]` does not)"
    )
    return Traced(program, tuple(() for _ in axes), note)


def pruned(program: ExportedProgram, traced: Traced, tensors: Sequence[Tensor]) -> ExportedProgram:
    """The program without the float weights that nothing reads any more."""
    module = program.module(check_guards=False)
    assert isinstance(module, torch.fx.GraphModule)
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
    used = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name, _ in (*module.named_parameters(), *module.named_buffers()):
        if name not in used:
            owner, _, leaf = name.rpartition(".")
            delattr(module.get_submodule(owner), leaf)
    module.recompile()
    with torch.no_grad(), quiet():
        return _exported(module, tensors, traced.dynamic, Dim.DYNAMIC, wrapped=False)


def varying_axes(call: NetworkCall, others: Sequence[NetworkCall] = ()) -> tuple[tuple[int, ...], ...]:
    """For each tensor of a call the axes that vary: the batch, and those that differ between calls."""
    tensors = call.tensors
    batch = next((tensor.shape[0] for tensor in tensors if tensor.ndim), None)
    found = [{0} if tensor.ndim and tensor.shape[0] == batch else set() for tensor in tensors]
    for other in others:
        for axes, tensor, another in zip(found, tensors, other.tensors, strict=False):
            if tensor.ndim == another.ndim:
                axes |= {axis for axis in range(tensor.ndim) if tensor.shape[axis] != another.shape[axis]}
    return tuple(tuple(sorted(axes)) for axes in found)


def with_two_samples(call: NetworkCall) -> NetworkCall:
    """The call itself, or one with its only sample twice: torch takes a size of 1 for a constant."""
    axes = varying_axes(call)
    tensors = call.tensors
    if not any(axes) or all(tensor.shape[0] > 1 for tensor, ax in zip(tensors, axes, strict=True) if 0 in ax):
        return call
    return call.with_tensors(
        [torch.cat([tensor, tensor]) if 0 in ax else tensor for tensor, ax in zip(tensors, axes, strict=True)]
    )


def _exported(
    module: nn.Module, tensors: Sequence[Tensor], axes: tuple[tuple[int, ...], ...], kind: Any, wrapped: bool = True
) -> ExportedProgram:
    """One trace."""
    shapes = tuple(dict.fromkeys(ax, kind) or None for ax in axes)
    # Our module takes any number of tensors as one tuple, a traced one takes them one by one.
    dynamic_shapes = (shapes,) if wrapped else shapes
    return torch.export.export(module, tuple(tensors), dynamic_shapes=dynamic_shapes, strict=False)


def _check(session: Instrumentation, network: Network) -> None:
    """Raise for what no file can hold."""
    custom = session.target.quantizer
    if custom is not None:
        raise ExportError(
            f"The quantizers are of the class {custom!r}, whose arithmetic no file format knows: only the recipe holds "
            "it. Diagnose with the target's own quantizers (`quantizer=None`) to export."
        )
    tensors = (*network.module.named_parameters(), *network.module.named_buffers())
    other = [name for name, tensor in tensors if tensor.is_floating_point() and tensor.dtype != torch.float32]
    if other:
        dtype = dict(tensors)[other[0]].dtype
        raise ExportError(
            f"{other[0]!r} is {dtype}, only float32 networks are exported: integer engines dequantize to float32. Call "
            "`model.float()` and diagnose that, or train with a `-mixed` precision."
        )


def _unique(names: Sequence[str]) -> list[str]:
    """Names as they are, and those that come again with a number."""
    seen: dict[str, int] = {}
    result = []
    for name in names:
        count = seen[name] = seen.get(name, -1) + 1
        result.append(f"{name}_{count}" if count else name)
    return result


def _is_about_sizes(error: BaseException) -> bool:
    """Whether a trace failed because the network's code fixes a size that was to vary."""
    text = f"{type(error).__name__} {error}"
    return "Constraints violated" in text or "ConstraintViolation" in text or "specialized" in text


def _explained(error: BaseException) -> str:
    """Why a network can not be traced, with the line of the user's code."""
    line = _user_line(error)
    where = f"{line}: " if line else ""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if "data-dependent" in str(error) or "DataDependent" in type(error).__name__:
        return (
            f"{where}which way the network goes depends on the data, which a file with one graph can not hold. Use "
            "`torch.where`, or export the parts on both sides of it; recipe and simulation are not touched by this."
        )
    return f"{where}torch.export can not trace the network: {type(error).__name__}: {first}"


def _user_line(error: BaseException | None) -> str | None:
    """File, line and code of the innermost frame that is neither torch's nor ours."""
    for link in chained(error):
        frames = traceback.extract_tb(link.__traceback__)
        theirs = [frame for frame in frames if not frame.filename.startswith((_PACKAGE, _TORCH, _STANDARD, "<"))]
        inside = [frame for frame in theirs if _is_inside(frames, frame)]
        if inside:
            return f"{inside[-1].filename}:{inside[-1].lineno} ({(inside[-1].line or '').strip()})"
    return None


def chained(error: BaseException | None) -> Iterator[BaseException]:
    """An error, then those that it was raised from, back to the first."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _is_inside(frames: traceback.StackSummary, frame: traceback.FrameSummary) -> bool:
    """Whether a frame runs inside the network, and is not what asked for the export."""
    return any(other.filename == __file__ and other.name == "forward" for other in frames[: frames.index(frame)])


@contextmanager
def autocast_off() -> Iterator[None]:
    """No mixed precision while the block runs, on any device."""
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from printing graphs and warnings, and from a Trainer's mixed precision, while the block runs."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        # Graphs are printed by `print`.
        with autocast_off(), warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)

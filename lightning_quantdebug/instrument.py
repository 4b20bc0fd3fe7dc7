"""Put quantizers on any network, reversibly: record, place, calibrate, switch by name, give back.

:class:`Instrumentation` is the engine behind the callback; :func:`instrument` is the same engine for anyone who has a
module and a batch, without a Trainer. The network is run as it is and stays what it is: while it runs, its operations
are intercepted (:mod:`lightning_quantdebug.interception`); nothing of it is rewritten, wrapped or replaced.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from lightning_quantdebug.errors import CaptureError, SettingsError
from lightning_quantdebug.interception import OpKey, clean_path
from lightning_quantdebug.placement import place
from lightning_quantdebug.plan import Plan
from lightning_quantdebug.quantizer import Quantizer, load_custom_quantizer
from lightning_quantdebug.recorder import Recorder, plain_containers
from lightning_quantdebug.report import Coverage, Unquantized
from lightning_quantdebug.runner import Runner, Trace
from lightning_quantdebug.target import Kind, Mode, QuantTarget, parse_choice
from lightning_quantdebug.topology import Topology

# A run is recorded again while it finds in-place operations that must write; each round finds all that stand behind the
# previous ones, so that few rounds are needed. More than this many means that the network differs from run to run.
_MOST_ROUNDS = 8


class Instrumentation:
    """Quantizers on one network.

    Args:
        root: The network, or the LightningModule that holds it.
        target: What to quantize to.
        module: Path of the sub-module that is quantized; ``None``: everything that runs.
        exclude: Name patterns of quantizers that are left out.

    Raises:
        SettingsError: If ``module`` names no sub-module; the message lists those that exist.

    Attributes:
        topology: The recorded dataflow.
        quantizers: The quantizers by name, in order of execution; empty before :meth:`place`.
    """

    def __init__(
        self, root: nn.Module, target: QuantTarget, *, module: str | None = None, exclude: Iterable[str] = ()
    ) -> None:
        """Start without quantizers."""
        if module is not None and module not in dict(root.named_modules()):
            children = [name for name, _ in root.named_children()]
            raise SettingsError(
                f"`module` must name a sub-module of {type(root).__name__}, got {module!r}; it has {children}."
            )
        self.root = root
        self.target = target
        self.scope = module or ""
        self.exclude = tuple(exclude)
        self.topology = Topology()
        self.quantizers: dict[str, Quantizer] = {}
        self._factory = load_custom_quantizer(target.quantizer)
        self._plan = Plan()
        self._runner: Runner | None = None

    # Recording and placement.

    def record(self, call: Callable[[], Any], inputs: Any = None, step: bool = False) -> Any:
        """Run ``call`` once and add its dataflow to the topology.

        Args:
            call: Runs the network on one batch. It is called again for as long as in-place operations are found whose
                effect the network relies on.
            inputs: The batch, so that its tensors get their names.
            step: Whether ``call`` is a step around the root rather than the root's own ``forward``.

        Returns:
            What ``call`` returned last.

        Raises:
            CaptureError: If the network runs differently each time.
        """
        real = frozenset(self.topology.unsafe)
        named = _input_names(inputs)
        for _ in range(_MOST_ROUNDS):
            recorder = Recorder(self.root, self.scope, real, named)
            with torch.no_grad(), recorder.active(step):
                result = call()
            recorder.escaped(result)
            if recorder.run.unsafe <= real:
                self.topology.add(recorder.run)
                return result
            real = real | recorder.run.unsafe
        raise CaptureError(
            f"{type(self.root).__name__} runs other operations each time, so that it can not be recorded; make it "
            "deterministic in eval mode (dropout, random numbers, counters)."
        )

    def place(self) -> None:
        """Decide where quantizers sit and make them, in bypass.

        Raises:
            CaptureError: If nothing was found that can be quantized.
        """
        self._plan = place(self.topology, self.target, self.exclude)
        self.quantizers = {
            site.name: Quantizer(site.name, site.kind, site.spec, site.channel_axis, site.fixed_range, self._factory)
            for site in self._plan.sites
        }
        if not self.quantizers:
            reasons = "; ".join(f"{item.name}: {item.reason}" for item in self._plan.unquantized[:5]) or "nothing ran"
            raise CaptureError(
                f"Nothing in {type(self.root).__name__} can be quantized ({reasons}). Quantizable are convolutions, "
                "linear, recurrent and embedding layers and the arithmetic between them; check `module` and `exclude`."
            )
        shared = self.topology.shared_keys()
        names: dict[OpKey, str] = {}
        for operation in self.topology:
            key = shared[operation.key]
            names.setdefault(key, operation.name if key.call is not None else operation.name.split("@")[0])
        unsafe = {shared[key] for key in self.topology.unsafe if key in shared}
        self._runner = Runner(self.root, self._plan, self.quantizers, names, unsafe, self.scope)

    # Running.

    def run(self, call: Callable[[], Any], step: bool = False) -> Any:
        """Run ``call`` with the quantizers in their modes."""
        with self._placed().active(step):
            return call()

    def around_step(self, call: Callable[[], Any], batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        """Run one step of a Lightning loop with the quantizers in their modes."""
        return self.run(call, step=True)

    def record_step(self, call: Callable[[], Any], batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        """Record one step of a Lightning loop."""
        return self.record(call, batch, step=True)

    def _placed(self) -> Runner:
        """The runner, once quantizers were placed."""
        if self._runner is None:
            raise CaptureError("No quantizers yet: record a batch and call `place` first.")
        return self._runner

    @contextmanager
    def traced(self, trace: Trace) -> Iterator[None]:
        """Call ``trace`` with the name and result of every operation while the block runs."""
        runner = self._placed()
        runner.trace = trace
        try:
            yield
        finally:
            runner.trace = None

    @property
    def operation_names(self) -> list[str]:
        """Names of the recorded operations of the first run, in order of execution."""
        return [operation.name for operation in self.topology.runs[0]] if self.topology.runs else []

    # Modes.

    def select(self, pattern: str = "*", kind: Kind | str | None = None) -> list[Quantizer]:
        """The quantizers whose name fits ``pattern`` (``fnmatch``) and which are of ``kind``."""
        wanted = None if kind is None else parse_choice(Kind, kind, "kind")
        found = self.quantizers.values()
        return [q for q in found if fnmatchcase(q.name, pattern) and (wanted is None or q.kind is wanted)]

    def set_mode(self, mode: Mode | str, pattern: str = "*", kind: Kind | str | None = None) -> None:
        """Switch quantizers by name pattern and kind.

        Args:
            mode: ``"bypass"``, ``"observe"`` or ``"quantize"``.
            pattern: Name pattern (``fnmatch``).
            kind: ``"weight"``, ``"activation"``, or ``None`` for both.

        Raises:
            SettingsError: If the mode or kind is none of these, no quantizer fits, or one has no range yet.
        """
        chosen = parse_choice(Mode, mode, "mode")
        selected = self.select(pattern, kind)
        if not selected:
            raise SettingsError(
                f"No quantizer fits the pattern {pattern!r} (kind {kind}); there are {sorted(self.quantizers)}."
            )
        if chosen is Mode.QUANTIZE and not any(quantizer.is_calibrated for quantizer in selected):
            raise SettingsError(f"{selected[0].name!r} has no range yet: call `calibrate` before mode 'quantize'.")
        for quantizer in selected:
            quantizer.mode = chosen

    @contextmanager
    def modes(self, mode: Mode | str, pattern: str = "*", kind: Kind | str | None = None) -> Iterator[None]:
        """Only the named quantizers in ``mode``, all others bypassed, until the block ends."""
        before = {name: quantizer.mode for name, quantizer in self.quantizers.items()}
        try:
            for quantizer in self.quantizers.values():
                quantizer.mode = Mode.BYPASS
            self.set_mode(mode, pattern, kind)
            yield
        finally:
            for name, quantizer in self.quantizers.items():
                quantizer.mode = before[name]

    @contextmanager
    def bit_width(self, bit_width: int) -> Iterator[None]:
        """Every quantizer at ``bit_width`` until the block ends."""
        before = {name: (q.bit_width, q.encoding) for name, q in self.quantizers.items()}
        try:
            for quantizer in self.quantizers.values():
                quantizer.set_bit_width(bit_width)
            yield
        finally:
            for name, quantizer in self.quantizers.items():
                quantizer.set_bit_width(before[name][0])
                quantizer.encoding = before[name][1]

    @contextmanager
    def observing(self) -> Iterator[None]:
        """Forget all ranges, observe while the block runs, then set the ranges; modes are as before afterwards."""
        for quantizer in self.quantizers.values():
            quantizer.reset()
        self._placed().forget_weights()
        with self.modes(Mode.OBSERVE):
            yield
        for quantizer in self.quantizers.values():
            quantizer.set_range()

    # What is and what is not.

    @property
    def coverage(self) -> Coverage:
        """What is quantized, what is not and why, and which operations ran without having been recorded."""
        unseen = tuple(sorted(self._runner.unseen)) if self._runner is not None else ()
        never = [q for q in self.quantizers.values() if not q.is_calibrated] if self._calibrated else []
        left = [Unquantized(q.name, f"calibration {_why_no_range(q)}: it runs in FP32") for q in never]
        return Coverage(tuple(self.quantizers), (*self._plan.unquantized, *left, *self._unused()), unseen)

    def _unused(self) -> list[Unquantized]:
        """The weights that no recorded batch used."""
        used = {value.name for operation in self.topology for _, value in operation.inputs}
        found = ((clean_path(name), parameter) for name, parameter in self.root.named_parameters())
        inside = f"{self.scope}." if self.scope else ""
        return [
            Unquantized(name, "no recorded batch used it: a branch that was not taken, or a layer that is not called")
            for name, parameter in found
            if parameter.ndim > 1 and name.startswith(inside) and name not in used
        ]

    @property
    def _calibrated(self) -> bool:
        """Whether any quantizer has a range."""
        return any(quantizer.is_calibrated for quantizer in self.quantizers.values())

    @property
    def plan(self) -> Plan:
        """Where quantizers sit."""
        return self._plan

    # Without a Trainer.

    def calibrate(self, batches: Iterable[Any]) -> None:
        """Observe some batches in eval mode without gradients, then set every range.

        Args:
            batches: Each is what ``forward`` takes: a tensor, a tuple of arguments or a dict of keyword arguments.

        Raises:
            SettingsError: If there is no batch.
        """
        count = 0
        with eval_mode(self.root), _undisturbed(self.root), torch.no_grad(), self.observing():
            for batch in batches:
                call_with(self.root, batch)
                count += 1
            if not count:
                raise SettingsError("`batches` must give at least one batch to calibrate on, got none.")


def _why_no_range(quantizer: Quantizer) -> str:
    """What calibration did not give an uncalibrated quantizer."""
    return "saw nothing but NaN and infinity there" if quantizer.observer.non_finite else "never reached it"


def call_with(model: Callable[..., Any], batch: Any) -> Any:
    """Call a model with a batch: a tuple or list gives arguments, a dict keyword arguments, all else one argument."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)):
        return model(*batch)
    return model(batch)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode until the block ends; then each module has its own mode back."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Give back buffers and random numbers as they were: runs of ours count for nothing."""
    kept = [
        (module._buffers, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    random_state = torch.get_rng_state()
    on_gpu = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch leaves it untyped
    devices = torch.cuda.get_rng_state_all() if on_gpu else []
    try:
        yield
    finally:
        torch.set_rng_state(random_state)
        if devices:
            torch.cuda.set_rng_state_all(devices)
        for owner, name, buffer, values in kept:
            owner[name] = buffer
            if not buffer.is_inference() and not torch.equal(buffer, values):
                buffer.detach().copy_(values)


class _Forward:
    """The ``forward`` of an instrumented module: the original one, run with the quantizers.

    Copies and pickles of the module get its plain ``forward``, bound to the copy.
    """

    def __init__(self, original: Callable[..., Any], session: Instrumentation) -> None:
        functools.update_wrapper(self, original)
        self._original = original
        self._session = session

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the original with the quantizers in their modes."""
        return self._session.run(functools.partial(self._original, *args, **kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """The plain ``forward`` of the copy."""
        return copy.deepcopy(self._original, memo)

    def __reduce__(self) -> Any:
        """Pickle as the plain ``forward``, such that it can be read without this package."""
        return copy.copy, (self._original,)


@contextmanager
def _forward_replaced(model: nn.Module, session: Instrumentation) -> Iterator[None]:
    """``model(...)`` and ``model.forward(...)`` run with the quantizers until the block ends."""
    had_own = "forward" in model.__dict__
    original = model.forward
    model.__dict__["forward"] = _Forward(original, session)
    try:
        yield
    finally:
        if had_own:
            model.__dict__["forward"] = original
        else:
            del model.__dict__["forward"]


@contextmanager
def instrument(
    model: nn.Module,
    example_batch: Any,
    target: str | Mapping[str, Any] | QuantTarget = "int8",
    *,
    module: str | None = None,
    exclude: Sequence[str] = (),
) -> Iterator[Instrumentation]:
    """Put quantizers on a model until the block ends; the model is then as it was, whatever happened inside.

    Args:
        model: Any module. It is run as it is: control flow, functional calls and any output type are fine.
        example_batch: What ``forward`` takes: a tensor, a tuple of arguments or a dict of keyword arguments.
        target: Preset name, fields, or a :class:`QuantTarget`.
        module: Path of the sub-module to quantize; ``None``: all of it.
        exclude: Name patterns of quantizers that are left out.

    Yields:
        The instrumentation: ``quantizers``, ``coverage``, ``calibrate(batches)``, ``set_mode(mode, pattern, kind)``.

    Raises:
        CaptureError: If nothing in the model can be quantized.
        SettingsError: If the target or a pattern can not be used.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
        >>> batch = torch.randn(2, 1, 8, 8)
        >>> with instrument(model, batch) as q:
        ...     q.calibrate([batch])
        ...     q.set_mode("quantize")
        ...     print(sorted(q.quantizers), torch.equal(model(batch), model(batch)))
        ['0.weight', '1', 'input'] True
    """
    if "forward" in model.__dict__ and isinstance(model.__dict__["forward"], _Forward):
        raise CaptureError(
            f"{type(model).__name__} is instrumented already: leave the first `with instrument(...)` block."
        )
    session = Instrumentation(model, QuantTarget.from_value(target), module=module, exclude=exclude)
    with eval_mode(model), _undisturbed(model), torch.inference_mode(False):
        session.record(functools.partial(call_with, model.forward, example_batch), example_batch)
    session.place()
    if session.plan.idle:
        raise SettingsError(" ".join(session.plan.idle))
    with _forward_replaced(model, session):
        yield session


def _input_names(inputs: Any) -> dict[int, str]:
    """Names of a batch's tensors: ``input`` for the first floating-point one, then ``input.1``; dicts by key."""
    names: dict[int, str] = {}
    for path, tensor in _leaves(plain_containers(inputs), ""):
        if tensor.is_floating_point() or path:
            names.setdefault(id(tensor), path or "input")
    return names


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a batch with their names."""
    if isinstance(value, Tensor):
        yield path or "input", value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path or 'input'}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(item, path if index == 0 else f"{path or 'input'}.{index}")

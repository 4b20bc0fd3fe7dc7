"""Put quantizers on any network, reversibly: record, place, calibrate, switch by name, give back.

:class:`Instrumentation` is the engine behind the callback and behind ``instrument``. The network is run as it is and
stays what it is: while it runs, its operations are intercepted (:mod:`lightning_quantdebug.interception`); nothing of
it is rewritten, wrapped or replaced. What remedies change of it is kept here as well (:meth:`Instrumentation.adjust`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_quantdebug.adjustment import HAS_BIAS, Adjustment
from lightning_quantdebug.coverage import never_calibrated, unused
from lightning_quantdebug.errors import CaptureError, SettingsError
from lightning_quantdebug.interception import Interception, OpKey, clean_path
from lightning_quantdebug.layers import Call, Layer, Tap, find_layers
from lightning_quantdebug.model_loan import call_with, eval_mode, undisturbed
from lightning_quantdebug.operations import CATEGORY_OF, Category, argument, tensors_in, value_at
from lightning_quantdebug.placement import place
from lightning_quantdebug.plan import Plan
from lightning_quantdebug.quantizer import Quantizer, QuantizerState, load_custom_quantizer
from lightning_quantdebug.recorder import Recorder, input_names
from lightning_quantdebug.replay import Memo
from lightning_quantdebug.report import Coverage
from lightning_quantdebug.runner import Reached, Runner, Trace
from lightning_quantdebug.target import Kind, Mode, QuantTarget, parse_choice
from lightning_quantdebug.topology import Topology

# A run is recorded again while it finds in-place operations that must write; each round finds all that stand behind the
# previous ones, so that few rounds are needed. More than this many means that the network differs from run to run.
_MOST_ROUNDS = 8

R = TypeVar("R", bound=Runner)


@dataclass(frozen=True, eq=False)
class SessionState:
    """What remedies can change, at one moment."""

    adjustments: Mapping[OpKey, Adjustment]
    quantizers: Mapping[str, QuantizerState]


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
        self._adjustments: dict[OpKey, Adjustment] = {}
        self._runner: Runner | None = None
        self._watcher: Interception | None = None

    # Recording and placement.

    def record(
        self,
        call: Callable[[], Any],
        inputs: Any = None,
        step: bool = False,
        names: Mapping[int, str] | None = None,
    ) -> Any:
        """Run ``call`` once and add its dataflow to the topology.

        Args:
            call: Runs the network on one batch. It is called again for as long as in-place operations are found whose
                effect the network relies on.
            inputs: The batch, so that its tensors get their names.
            step: Whether ``call`` is a step around the root rather than the root's own ``forward``.
            names: Names of single tensors of the batch, by their ``id``, in place of those that the batch gives them.

        Returns:
            What ``call`` returned last.

        Raises:
            CaptureError: If the network runs differently each time.
        """
        real = frozenset(self.topology.unsafe)
        named = input_names(inputs) | dict(names or {})
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
        self._adjustments = {}
        self._arm()

    def _arm(self) -> None:
        """Make what runs the network with the quantizers where they sit."""
        self._runner = self.make_runner(Runner, self.quantizers)

    def make_runner(self, kind: type[R], quantizers: Mapping[str, Quantizer]) -> R:
        """A runner of this network of another kind, or with other quantizers of the same names."""
        shared = self.topology.shared_keys()
        names: dict[OpKey, str] = {}
        for operation in self.topology:
            key = shared[operation.key]
            names.setdefault(key, operation.name if key.call is not None else operation.name.split("@")[0])
        unsafe = {shared[key] for key in self.topology.unsafe if key in shared}
        runner = kind(self.root, self._plan, quantizers, names, unsafe, self.scope)
        runner.set_adjustments(self._adjustments)
        return runner

    # Running.

    def run(self, call: Callable[[], Any], step: bool = False) -> Any:
        """Run ``call`` with the quantizers in their modes."""
        with (self._watcher or self._placed()).active(step):
            return call()

    @contextmanager
    def watched_by(self, watcher: Interception) -> Iterator[None]:
        """Run the network as it is under another interception, without quantizers, while the block runs."""
        self._watcher = watcher
        try:
            yield
        finally:
            self._watcher = None

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

    @contextmanager
    def memoized(self, memo: Memo, record: bool = False) -> Iterator[None]:
        """Keep in ``memo`` what runs compute while the block runs, or compute only what differs from it."""
        runner = self._placed()
        runner.memo = memo
        try:
            with memo.active(record):
                yield
        finally:
            runner.memo = None

    @property
    def keys_by_name(self) -> dict[str, OpKey]:
        """The identity of each recorded operation by its name, which is the same in every process."""
        runner = self._placed()
        return {runner.planned(key).name: key for key in self.topology.shared_keys().values()}

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
    def _own_modes(self) -> Iterator[None]:
        """Give every quantizer its mode back at the end of the block."""
        before = {name: quantizer.mode for name, quantizer in self.quantizers.items()}
        try:
            yield
        finally:
            for name, quantizer in self.quantizers.items():
                quantizer.mode = before[name]

    @contextmanager
    def modes(self, mode: Mode | str, pattern: str = "*", kind: Kind | str | None = None) -> Iterator[None]:
        """Only the named quantizers in ``mode``, all others bypassed, until the block ends."""
        with self._own_modes():
            self._bypass_all()
            self.set_mode(mode, pattern, kind)
            yield

    def _bypass_all(self) -> None:
        """Bypass every quantizer."""
        for quantizer in self.quantizers.values():
            quantizer.mode = Mode.BYPASS

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

    # What remedies do.

    @property
    def layers(self) -> list[Layer]:
        """Every operation with a quantized weight, in order of execution."""
        return find_layers(self.topology, self._plan, self.quantizers)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of the network by the names that recording gives them, detached."""
        named = (*self.root.named_parameters(), *self.root.named_buffers())
        return {clean_path(name): tensor.detach() for name, tensor in named}

    @property
    def adjustments(self) -> Mapping[OpKey, Adjustment]:
        """What remedies have changed of each operation."""
        return self._adjustments

    def adjust(self, changes: Mapping[OpKey, Adjustment]) -> None:
        """Let operations run with other weights, biases or bounds; composed after the adjustments that are there.

        Raises:
            SettingsError: If an operation is unknown or has nothing that can be adjusted.
        """
        for key, change in changes.items():
            before = self._adjustments.get(key)
            self._adjustments[key] = change if before is None else before.then(change)
        self._placed().set_adjustments(self._adjustments)

    def set_adjustments(self, adjustments: Mapping[OpKey, Adjustment]) -> None:
        """Let operations run as ``adjustments`` say, and all others as they are.

        Raises:
            SettingsError: If an operation is unknown or has nothing that can be adjusted.
        """
        self._adjustments = dict(adjustments)
        self._placed().set_adjustments(self._adjustments)

    def share_quantizers(self, others: Mapping[str, Quantizer]) -> None:
        """Let quantizers of the same name be those of another instrumentation, so that both put values on one grid."""
        for name in self.quantizers.keys() & others.keys():
            self.quantizers[name] = others[name]
        self._arm()

    def state(self) -> SessionState:
        """Everything that remedies can change, to go back to."""
        return SessionState(dict(self._adjustments), {name: q.state() for name, q in self.quantizers.items()})

    def restore(self, state: SessionState) -> None:
        """Go back to a state bit for bit."""
        self.set_adjustments(state.adjustments)
        for name, quantizer in self.quantizers.items():
            quantizer.restore(state.quantizers[name])

    @contextmanager
    def tapped(self, taps: Mapping[OpKey, Tap]) -> Iterator[None]:
        """Show each run of some operations to their taps while the block runs."""
        planned = [(self._placed().planned(key), tap) for key, tap in taps.items()]
        before = [entry.tap for entry, _ in planned]
        try:
            for entry, tap in planned:
                entry.tap = tap
            yield
        finally:
            for (entry, _), tap_before in zip(planned, before, strict=True):
                entry.tap = tap_before

    @contextmanager
    def reference(self) -> Iterator[None]:
        """FP32 while the block runs, with batch normalizations folded, so that each layer's result is comparable."""
        weights = self._placed().weights
        before, weights.folds_always = weights.folds_always, True
        try:
            with self._own_modes():
                self._bypass_all()
                yield
        finally:
            weights.folds_always = before

    def run_until(self, call: Callable[[], Any], key: OpKey) -> bool:
        """Run ``call`` up to one operation and its tap.

        Returns:
            Whether the operation was reached; else ``call`` ran to its end.
        """
        planned = self._placed().planned(key)
        planned.stops = True
        try:
            call()
        except Reached:
            return True
        finally:
            planned.stops = False
        return False

    def effective_weights(self, run: Callable[[], Any]) -> dict[OpKey, tuple[Tensor, Tensor | None]]:
        """FP32 weight and bias of every layer that one run reaches, after folding and adjusting.

        Recurrent layers, which have several weights in one operation, are not among them.
        """
        found: dict[OpKey, tuple[Tensor, Tensor | None]] = {}

        def tap_of(layer: Layer) -> Tap:
            def tap(call: Call) -> None:
                bias = argument(call.args, call.kwargs, 2, "bias") if layer.op in HAS_BIAS else None
                weight = value_at(call.args, call.kwargs, layer.weight_slot)
                found[layer.key] = (weight.detach(), None if bias is None else bias.detach())

            return tap

        taps = {layer.key: tap_of(layer) for layer in self.layers if CATEGORY_OF[layer.op] is not Category.RECURRENT}
        with self.reference(), self.tapped(taps):
            run()
        return found

    def reset_weight_ranges(self, run: Callable[[], Any]) -> None:
        """Set the range of every weight that one run reaches anew, from its effective values; frozen ones stay."""
        weights = self.select(kind=Kind.WEIGHT)
        with self._own_modes():
            self._bypass_all()
            for quantizer in weights:
                quantizer.mode = Mode.OBSERVE
            self._placed().forget_weights()
            run()
        for quantizer in weights:
            quantizer.set_range()

    def outputs(self, run: Callable[[], Any]) -> dict[str, Tensor]:
        """What the network returns in one run, by the name of the operation."""
        runner, shared = self._placed(), self.topology.shared_keys()
        wanted = {runner.planned(shared[operation.key]).name for operation in self.topology.output_operations()}
        found: dict[str, Tensor] = {}

        def keep(name: str, result: Any) -> None:
            if name in wanted:
                tensors = [tensor for _, tensor in tensors_in((result,), {}) if tensor.is_floating_point()]
                named = {name if index == 0 else f"{name}.{index}": t for index, t in enumerate(tensors)}
                found.update({key: tensor.detach().clone() for key, tensor in named.items()})

        with self.traced(keep):
            run()
        return found

    # What is and what is not.

    @property
    def coverage(self) -> Coverage:
        """What is quantized, what is not and why, and which operations ran without having been recorded."""
        unseen = tuple(sorted(self._runner.unseen)) if self._runner is not None else ()
        left = [
            *self._plan.unquantized,
            *never_calibrated(self.quantizers),
            *unused(self.topology, self.root, self.scope),
        ]
        return Coverage(tuple(self.quantizers), tuple(left), unseen)

    @property
    def plan(self) -> Plan:
        """Where quantizers sit."""
        return self._plan

    @property
    def unseen(self) -> Mapping[str, int]:
        """How often operations ran that recording had not met, by their names."""
        return self._placed().unseen

    # Without a Trainer.

    def calibrate(self, batches: Iterable[Any]) -> None:
        """Observe some batches in eval mode without gradients, then set every range.

        Args:
            batches: Each is what ``forward`` takes: a tensor, a tuple of arguments or a dict of keyword arguments.

        Raises:
            SettingsError: If there is no batch.
        """
        count = 0
        with eval_mode(self.root), undisturbed(self.root), torch.no_grad(), self.observing():
            for batch in batches:
                call_with(self.root, batch)
                count += 1
            if not count:
                raise SettingsError("`batches` must give at least one batch to calibrate on, got none.")

"""Incremental re-execution: run a network again and compute only what a switched quantizer changes.

One run is recorded: every operation with the tensors that went in and what came out. When the network is run again, an
operation whose inputs are those very tensors, and whose own quantizers do what they did, gives back what it gave;
all others are computed. So only the operations behind a switched quantizer cost anything, and every number is, bit for
bit, that of a full run.

Nothing is assumed about the order of operations, so that data-dependent branches may turn another way. A tensor is
told by its identity and by its version, which torch counts up when anything is written into it or into a view of it: a
result that was overwritten is never handed out again but computed anew, and what was computed anew from the recorded
inputs counts as the recorded result. In-place operations run in their functional form, as when recording the topology;
where the network relies on what was written, they write. Operations that draw random numbers are run every time, so
that the generator goes on as in a full run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_quantdebug.operations import functional_call, in_place_target, operation_name, tensors_in
from lightning_quantdebug.quantizer import Quantizer
from lightning_quantdebug.target import Mode

if TYPE_CHECKING:
    from lightning_quantdebug.runner import OpPlan, Runner

# Results that need no copy: nobody can write into them. Others that are no tensors are computed every time.
_IMMUTABLE = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size, type(None))
# What lets the memory of a tensor out of torch, where nobody counts who writes into it.
_LETS_OUT = ("numpy", "array", "untyped_storage", "storage")


class _Ref(NamedTuple):
    """A tensor as it was: the object and its version."""

    tensor: Tensor
    version: int


@dataclass(slots=True)
class _Entry:
    """One recorded operation.

    Attributes:
        args: Positional arguments, with a :class:`_Ref` in place of each tensor.
        kwargs: Arguments by name, likewise.
        state: What its quantizers did, see :func:`_state_of`.
        result: What it returned.
        refs: The tensors of the result, as they were then.
        is_raw: Whether no output quantizer has touched the result.
        written: What the operation has written into, as it was afterwards.
        random_before: States of the generators ahead of an operation that has drawn from one.
    """

    args: Any
    kwargs: Any
    state: tuple[Any, ...]
    result: Any
    refs: list[_Ref]
    is_raw: bool
    written: _Ref | None = None
    random_before: list[Tensor] | None = None


class Memo:
    """What one run of a network has computed, for later runs on the same batch.

    ``with session.memoized(memo, record=True): run()`` records, ``with session.memoized(memo): run()`` runs again. Runs
    are without gradients. The memory is that of all results of one run; :meth:`clear` lets go of it.

    Attributes:
        computed: Operations that later runs have computed.
        reused: Operations that later runs have taken from the recorded one.
    """

    def __init__(self) -> None:
        """Nothing is recorded yet."""
        self.computed = 0
        self.reused = 0
        self._records = False
        self._entries: dict[Any, _Entry] = {}
        # By the tensor (held here, so that no other can take its identity), its version, and the property.
        self._getters: dict[tuple[int, int, str], tuple[_Ref, _Ref]] = {}
        self._exposed: set[int] = set()
        # Of this run: tensors that equal recorded ones, each with its own version when that was found out.
        self._equal: dict[int, tuple[_Ref, _Ref]] = {}

    def clear(self) -> None:
        """Forget the recorded run."""
        self._entries.clear()
        self._getters.clear()
        self._exposed.clear()
        self._equal.clear()

    @contextmanager
    def active(self, record: bool) -> Iterator[None]:
        """Record the run of the block anew, or run it with what was recorded."""
        if record:
            self.clear()
        self._records = record
        try:
            yield
        finally:
            self._records = False
            self._equal.clear()

    def run(
        self,
        runner: Runner,
        key: Any,
        planned: OpPlan,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Give back what an operation gave, or run it.

        Args:
            runner: Runs the network.
            key: Which run of which operation this is: path, call, what is called, site, occurrence.
            planned: What happens at it.
            args: Its positional arguments.
            kwargs: Its arguments by name.
        """
        func = key[2]
        if self._records:
            return self._recorded(runner, key, planned, args, kwargs)
        entry = self._entries.get(key)
        if entry is None or not (self._is_same(entry.args, args) and self._is_same(entry.kwargs, kwargs)):
            self.computed += 1
            return _computed(runner, planned, func, args, kwargs)
        state = _state_of(runner, planned)
        if state != entry.state:
            return self._switched(runner, entry, state, planned, func, args, kwargs)
        if entry.random_before is None and entry.written is None and self._is_intact(entry):
            self.reused += 1
            return entry.result
        self.computed += 1
        repeats = entry.random_before is None or _are_equal(entry.random_before, _random_states())
        result = _computed(runner, planned, func, args, kwargs)
        if repeats:
            self._note_equal(entry, result, in_place_target(func, args, kwargs))
        return result

    def getter(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A property of a tensor that may be another tensor, such as its transpose."""
        tensor = args[0] if args and isinstance(args[0], Tensor) else None
        if tensor is None or len(args) > 1:
            return func(*args, **kwargs)
        source = self._recorded_of(tensor)
        name = operation_name(func)
        if self._records or source is None:
            result = func(*args, **kwargs)
            if self._records and source is not None and isinstance(result, Tensor):
                self._getters[id(tensor), source.version, name] = (source, _ref(result))
            return result
        _, found = self._getters.get((id(source.tensor), source.version, name), (None, None))
        return found.tensor if found is not None and _is_intact(found) else func(*args, **kwargs)

    def _recorded(
        self,
        runner: Runner,
        key: Any,
        planned: OpPlan,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run an operation and keep what it gave."""
        func = key[2]
        kept_args, kept_kwargs = _kept(args), _kept(kwargs)
        state, random_before = _state_of(runner, planned), _random_states()
        result = _computed(runner, planned, func, args, kwargs)
        if operation_name(func) in _LETS_OUT:
            self._exposed |= {_memory_of(tensor) for _, tensor in tensors_in(args, kwargs)}
        refs = [_ref(tensor) for _, tensor in tensors_in((result,), {})]
        if refs or isinstance(result, _IMMUTABLE):
            target = in_place_target(func, args, kwargs) if _writes(planned, func, args, kwargs) else None
            drew = not _are_equal(random_before, _random_states())
            self._entries[key] = _Entry(
                kept_args,
                kept_kwargs,
                state,
                result,
                refs,
                is_raw=planned.output is None or planned.output.mode is Mode.BYPASS,
                written=None if target is None else _ref(target),
                random_before=random_before if drew else None,
            )
        return result

    def _switched(
        self,
        runner: Runner,
        entry: _Entry,
        state: tuple[Any, ...],
        planned: OpPlan,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run an operation on recorded inputs whose quantizers do something else now."""
        only_output = state[1:] == entry.state[1:] and entry.is_raw and planned.output is not None
        if only_output and entry.written is None and entry.random_before is None and self._is_intact(entry):
            self.reused += 1
            return runner.put_on_grid(planned, entry.result)
        self.computed += 1
        return _computed(runner, planned, func, args, kwargs)

    def _is_intact(self, entry: _Entry) -> bool:
        """Whether nobody has written into a recorded result, or could have."""
        exposed = self._exposed
        return all(_is_intact(ref) and not (exposed and _memory_of(ref.tensor) in exposed) for ref in entry.refs)

    def _note_equal(self, entry: _Entry, result: Any, target: Tensor | None) -> None:
        """Let what was computed anew from recorded inputs stand for what was recorded."""
        for (_, tensor), ref in zip(tensors_in((result,), {}), entry.refs, strict=True):
            self._equal[id(tensor)] = (_ref(tensor), ref)
        if entry.written is not None and target is not None:
            self._equal[id(target)] = (_ref(target), entry.written)

    def _recorded_of(self, tensor: Tensor) -> _Ref | None:
        """The recorded tensor that one stands for; itself, if it stands for no other."""
        found = self._equal.get(id(tensor))
        if found is None or found[0].tensor is not tensor:
            return _ref(tensor)
        return found[1] if found[0].version == _version(tensor) else None

    def _is_same(self, kept: Any, value: Any) -> bool:
        """Whether an argument is what it was when recording."""
        if isinstance(kept, _Ref):
            if not isinstance(value, Tensor):
                return False
            known = self._recorded_of(value)
            return known is not None and known.tensor is kept.tensor and known.version == kept.version
        if kept is value:
            return True
        if type(kept) is not type(value):
            return False
        if isinstance(kept, (tuple, list)):
            return len(kept) == len(value) and all(map(self._is_same, kept, value))
        if isinstance(kept, dict):
            return kept.keys() == value.keys() and all(self._is_same(kept[key], value[key]) for key in kept)
        if isinstance(kept, slice):
            parts = ("start", "stop", "step")
            return all(self._is_same(getattr(kept, part), getattr(value, part)) for part in parts)
        return isinstance(kept, _IMMUTABLE) and bool(kept == value)


def _version(tensor: Tensor) -> int:
    """How often a tensor was written into; of an inference tensor, which nobody can write into, 0."""
    return 0 if tensor.is_inference() else tensor._version


def _ref(tensor: Tensor) -> _Ref:
    """A tensor as it is now."""
    return _Ref(tensor, _version(tensor))


def _is_intact(ref: _Ref) -> bool:
    """Whether a tensor is as it was."""
    return _version(ref.tensor) == ref.version


def _memory_of(tensor: Tensor) -> int:
    """Where a tensor's memory begins."""
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


def _kept(value: Any) -> Any:
    """Arguments with a :class:`_Ref` in place of each tensor."""
    if isinstance(value, Tensor):
        return _ref(value)
    if type(value) in (tuple, list):
        return type(value)(map(_kept, value))
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_kept, value))
    if isinstance(value, dict):
        return {key: _kept(item) for key, item in value.items()}
    return value


def _random_states() -> list[Tensor]:
    """The state of every generator that operations draw from."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return [torch.get_rng_state(), *cuda]


def _are_equal(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether generators are in the same state."""
    return len(some) == len(others) and all(map(torch.equal, some, others))


def _state_of(runner: Runner, planned: OpPlan) -> tuple[Any, ...]:
    """What the quantizers and adjustments of an operation do now; that of its output comes first."""
    output = _doing(planned.output)
    if not planned.weights and not planned.inputs and planned.folds_into is None:
        return output, id(planned.adjustment)
    weights = runner.weights
    return (
        output,
        id(planned.adjustment),
        planned.folds_into is not None and weights.is_folded(planned.folds_into.weights[0]),
        *(_doing(quantizer) for _, quantizer in planned.inputs),
        *((_doing(spot.quantizer), weights.changes(spot), id(spot.adjustment)) for spot in planned.weights),
    )


def _doing(quantizer: Quantizer | None) -> tuple[Mode, int] | None:
    """Mode and encoding of a quantizer that does something."""
    return None if quantizer is None or quantizer.mode is Mode.BYPASS else (quantizer.mode, quantizer.version)


def _writes(planned: OpPlan, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an operation writes into its argument, because the network relies on that or there is no other form."""
    if in_place_target(func, args, kwargs) is None:
        return False
    return planned.unsafe or functional_call(func, args, kwargs) is None


def _computed(
    runner: Runner, planned: OpPlan, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run an operation with its quantizers, in its functional form where it has one."""
    target = in_place_target(func, args, kwargs)
    form = None if target is None or planned.unsafe else functional_call(func, args, kwargs)
    if target is None or form is None:
        return runner.run_planned(planned, func, args, kwargs)
    dtype = target.dtype

    def functional(*given: Any, **named: Any) -> Any:
        return form[0](*given, **named).to(dtype)

    functional.__name__ = getattr(form[0], "__name__", "functional")
    return runner.run_planned(planned, functional, form[1], form[2])

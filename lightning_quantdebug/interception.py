"""Watch a network run, operation by operation, without touching it.

While an :class:`Interception` is active every torch operation passes through ``__torch_function__``, and two *global*
forward hooks keep a stack of the modules that are running. Nothing is attached to the network: no hook, no attribute,
no wrapped module, so that copying, pickling and removing need no care. An operation is known by its :data:`OpKey`:
where it runs (module path and how many times that module was called before), what it is, the call site inside that
module, and how many times that site ran before. Data-dependent branches therefore never shift the keys of the
operations behind them, as a plain counter would.

Everything that relies on private parts of torch is in this module: the decomposition of
``F.multi_head_attention_forward`` and the recomputation of checkpointed blocks.
"""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

Site = tuple[int, ...]


class OpKey(NamedTuple):
    """Identity of an operation within one process.

    ``call`` and ``occurrence`` are ``None`` where all calls of a module, or all rounds of a loop, share one identity
    because their number depends on the data.
    """

    path: str
    call: int | None
    func: Callable[..., Any]
    site: Site
    occurrence: int | None


@dataclass(slots=True)
class Frame:
    """One running call of a module (or, at the bottom of the stack, the code that started it)."""

    path: str
    call: int
    module: nn.Module | None
    muted: bool
    plan: Any = None
    seen: dict[Any, int] = field(default_factory=dict)


_USER, _PLUMBING, _BOUNDARY, _OPAQUE = range(4)
_PACKAGE = str(Path(__file__).parent)
_FILES = {
    torch.overrides.__file__: _PLUMBING,
    F.__file__: _PLUMBING,
    torch._tensor.__file__: _PLUMBING,
    torch.functional.__file__: _PLUMBING,
    torch._jit_internal.__file__: _PLUMBING,
    torch._ops.__file__: _PLUMBING,
    nn.modules.module.__file__: _BOUNDARY,
    torch.utils.checkpoint.__file__: _BOUNDARY,
    torch.autograd.function.__file__: _OPAQUE,
}


def _never(*_: Any) -> bool:
    """Answer for ``has_torch_function`` inside the decomposed attention."""
    return False


def _decomposed_attention() -> Callable[..., Any]:
    """``F.multi_head_attention_forward`` without its own dispatch, so that its inner operations are seen."""
    original = F.multi_head_attention_forward
    names = [name for name in original.__globals__ if name.startswith("has_torch_function")]
    clone = types.FunctionType(
        original.__code__.replace(co_name="multi_head_attention"),
        {**original.__globals__, **dict.fromkeys(names, _never)},
        original.__name__,
        original.__defaults__,
        original.__closure__,
    )
    clone.__kwdefaults__ = original.__kwdefaults__
    return clone


_ATTENTION = _decomposed_attention()


def call_site(frame: FrameType | None) -> Site | None:
    """Where an operation was called, seen from the module that runs it.

    Args:
        frame: The Python frame that called the operation.

    Returns:
        Code and instruction of each frame up to the module's ``forward``, or ``None`` if the operation runs inside a
        ``torch.autograd.Function``, whose own backward would ignore whatever is inserted.
    """
    site: list[int] = []
    while frame is not None:
        code = frame.f_code
        kind = _FILES.get(code.co_filename)
        if kind is None:
            kind = _FILES[code.co_filename] = _BOUNDARY if code.co_filename.startswith(_PACKAGE) else _USER
        if kind == _OPAQUE:
            return None
        if kind == _BOUNDARY:
            break
        if kind == _USER or code is _ATTENTION.__code__:
            site += (id(code), frame.f_lasti)
        frame = frame.f_back
    return tuple(site)


def is_batched(value: Tensor) -> bool:
    """Whether a tensor belongs to a running ``torch.func`` transform and has no storage of its own."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(value) or functorch.is_gradtrackingtensor(value)


def _is_muted(module: nn.Module) -> bool:
    """Whether a module judges the network instead of being part of it: a metric or a loss."""
    if isinstance(module, nn.modules.loss._Loss):
        return True
    return any(base.__module__.startswith("torchmetrics") for base in type(module).__mro__)


class Interception(TorchFunctionMode):
    """Base of everything that watches a network: the stack of running modules and the identity of operations.

    Args:
        root: The module whose sub-modules give operations their paths.
        scope: Path of the sub-module to watch; ``""`` watches all of ``root``.
    """

    def __init__(self, root: nn.Module, scope: str = "") -> None:
        """Note where each module sits."""
        super().__init__()
        self.root = root
        self.scope = scope
        self._modules = {id(module): (module, clean_path(path)) for path, module in root.named_modules()}
        self.stack: list[Frame] = []
        self.calls: dict[str, int] = {}
        self.thread = 0

    def plan_for(self, path: str, call: int) -> Any:
        """What a frame carries along for its operations; nothing in the base class."""
        return None

    def module_left(self, frame: Frame, args: Any, output: Any) -> None:
        """Called when a module of the stack has returned normally."""

    def _enter_module(self, module: nn.Module, args: Any) -> None:
        """Global forward pre-hook: push the module."""
        if not self.stack or threading.get_ident() != self.thread:
            return
        parent = self.stack[-1]
        known = self._modules.get(id(module))
        if known is not None and known[0] is module:
            path = known[1]
        else:
            path = f"{parent.path}.{type(module).__name__.lower()}".lstrip(".")
        call = self.calls.get(path, 0)
        self.calls[path] = call + 1
        inside = not parent.muted or (path == self.scope and len(self.scope) > 0)
        self.stack.append(Frame(path, call, module, not inside or _is_muted(module), self.plan_for(path, call)))

    def _leave_module(self, module: nn.Module, args: Any, output: Any) -> None:
        """Global forward hook, also called after an exception: pop the module."""
        if len(self.stack) < 2 or threading.get_ident() != self.thread or self.stack[-1].module is not module:
            return
        frame = self.stack.pop()
        if output is not None and not frame.muted:
            self.module_left(frame, args, output)

    @contextmanager
    def active(self, step: bool = False) -> Iterator[None]:
        """Watch until the block ends; the stack, the hooks and torch's switches are then as before.

        Args:
            step: Whether the block is a step that calls the root or parts of it; else it is the root's ``forward``.
        """
        call, module = (-1, None) if step else (0, self.root)
        with self._watching(Frame("", call, module, muted=bool(self.scope), plan=self.plan_for("", call))):
            yield

    @contextmanager
    def _watching(self, bottom: Frame, calls: dict[str, int] | None = None) -> Iterator[None]:
        """Watch with a stack that starts at ``bottom``."""
        before = (self.stack, self.calls, self.thread)
        self.stack, self.calls, self.thread = [bottom], dict(calls or {}), threading.get_ident()
        try:
            with ExitStack() as stack:
                if not before[0]:
                    self._switch_on(stack)
                elif before[2] != self.thread:
                    # A backward pass inside the watched block runs on autograd's own thread: modes are per thread.
                    stack.enter_context(self)
                yield
        finally:
            self.stack, self.calls, self.thread = before

    def _switch_on(self, stack: ExitStack) -> None:
        """Enter everything that makes operations and modules come through here."""
        for hook in (
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ):
            stack.callback(hook.remove)
        stack.enter_context(exact_kernels())
        stack.enter_context(_checkpoints_seen(self))
        if has_compiled(self.root):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(self)

    def watched_again(self, function: Callable[..., Any], first_is_direct: bool) -> Callable[..., Any]:
        """``function`` such that later runs pass through here from the frame and with the counters of now.

        Args:
            function: A checkpointed block.
            first_is_direct: Whether the first run is the forward itself and not yet a recomputation.
        """
        frame, calls = self.stack[-1], dict(self.calls)
        seen = dict(frame.seen)
        direct = [first_is_direct]

        def run(*args: Any, **kwargs: Any) -> Any:
            if direct[0]:
                direct[0] = False
                return function(*args, **kwargs)
            bottom = Frame(frame.path, frame.call, frame.module, frame.muted, frame.plan, dict(seen))
            with self._watching(bottom, calls):
                return function(*args, **kwargs)

        return run

    def call_decomposed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run multi-head attention so that its inner operations pass through here one by one."""
        with self:
            return _ATTENTION(*args, **kwargs)

    def key_of(self, func: Callable[..., Any], frame: Frame, caller: FrameType | None) -> OpKey | None:
        """Identity of the operation that is about to run, ``None`` if it must not be touched."""
        site = call_site(caller)
        if site is None:
            return None
        occurrence = frame.seen.get((func, site), 0)
        frame.seen[(func, site)] = occurrence + 1
        return OpKey(frame.path, frame.call, func, site, occurrence)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Hand each operation that is neither muted nor opaque to :meth:`operation`."""
        frame = self.stack[-1]
        if frame.muted:
            return func(*args, **(kwargs or {}))
        if func is F.multi_head_attention_forward:
            return self.call_decomposed(args, kwargs or {})
        key = self.key_of(func, frame, sys._getframe(1))
        if key is None:
            self.out_of_reach(func, frame, "inside a torch.autograd.Function, whose own backward would ignore it")
            return func(*args, **(kwargs or {}))
        return self.operation(key, frame, args, kwargs or {})

    def out_of_reach(self, func: Callable[..., Any], frame: Frame, why: str) -> None:
        """Called for an operation that runs where nothing can be inserted."""

    def operation(self, key: OpKey, frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operation; subclasses do more than that."""
        return key.func(*args, **kwargs)


def clean_path(path: str) -> str:
    """A module path without the level that ``torch.compile`` puts in."""
    return ".".join(part for part in path.split(".") if part != "_orig_mod")


def has_compiled(root: nn.Module) -> bool:
    """Whether any part of a network was given to ``torch.compile``."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in root.modules()
    )


@contextmanager
def exact_kernels() -> Iterator[None]:
    """Keep ``nn.MultiheadAttention`` and ``nn.TransformerEncoderLayer`` off their fused fast path.

    The fast path hides the operations and differs from the plain one by about 1e-7, so a reference is measured without
    it too.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _checkpoints_seen(watcher: Interception) -> Iterator[None]:
    """Let the recomputation of checkpointed blocks, which backward starts, pass through ``watcher`` as well.

    Torch recomputes a checkpointed block outside every mode; without this its gradients would be those of another
    function. Both implementations receive the block as a function, which is replaced by one that watches itself.
    """
    module = torch.utils.checkpoint
    reentrant: Callable[..., Any] = module.CheckpointFunction.apply
    generator: Callable[..., Any] = module._checkpoint_without_reentrant_generator

    def apply(function: Callable[..., Any], *args: Any) -> Any:
        return reentrant(watcher.watched_again(function, first_is_direct=True), *args)

    def generate(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return generator(watcher.watched_again(function, first_is_direct=False), *args, **kwargs)

    module.CheckpointFunction.apply = apply  # type: ignore[method-assign]  # replaced for the block alone
    module._checkpoint_without_reentrant_generator = generate  # type: ignore[assignment]  # likewise
    try:
        yield
    finally:
        del module.CheckpointFunction.apply
        module._checkpoint_without_reentrant_generator = generator

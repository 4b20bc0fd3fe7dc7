"""Find the network in the user's validation step, and what it is called with.

What a LightningModule's step does besides calling its network, such as losses and metrics, can not be exported. The
network is ``forward`` where the step calls it, or the sub-module that is quantized, or the one module that the step
calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from lightning_quantdebug.errors import ExportError
from lightning_quantdebug.evaluation import Evaluator
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.interception import clean_path
from lightning_quantdebug.lightning_compat import kept
from lightning_quantdebug.network import Network, NetworkCall, output_tensors, tensors_of, with_output_tensors
from lightning_quantdebug.operations import Category, tensors_in
from lightning_quantdebug.recorder import input_names
from lightning_quantdebug.target import Kind, Mode

# Batches that exported files are compared on, each with everything that the network returns.
COMPARED_BATCHES = 4


@dataclass(frozen=True, eq=False)
class Found:
    """The network of a validation step.

    Attributes:
        network: What is called.
        calls: Calls of it on validation batches, with what it returned with the quantizers on.
        outside: Names of quantizers that sit outside it, in the step itself or in other modules.
        calls_per_step: How often one step calls it.
    """

    network: Network
    calls: list[NetworkCall]
    outside: tuple[str, ...]
    calls_per_step: int


def find_network(session: Instrumentation, evaluator: Evaluator) -> Found:
    """The network of a captured session, with some calls of it.

    Args:
        session: A captured session, whose quantizers are on while the network is called.
        evaluator: Runs the user's validation.

    Raises:
        ExportError: If the step calls no one network; the message says what it calls, and what to do.
    """
    path = _path_of(session, evaluator)
    seen = _Seen(session, Network(session.root, path))
    with session.modes(Mode.QUANTIZE):
        evaluator.run_unchecked(seen.around_step, limit=COMPARED_BATCHES)
    if not seen.calls:
        raise ExportError(f"Validation never calls the network {path!r}.")
    network = Network(session.root, path, seen.names)
    return Found(network, seen.calls, _outside(session, network), seen.most)


def _path_of(session: Instrumentation, evaluator: Evaluator) -> str:
    """Path of the network."""
    if session.scope:
        return session.scope
    called: list[str] = []
    with _noting_calls(session.root, called) as around:
        evaluator.run_unchecked(around, limit=1)
    if "" in called:
        return ""
    quantized = [spot.key.path for site in session.plan.sites for spot in site.places]
    holding = [name for name in dict.fromkeys(called) if any(_is_in(path, name) for path in quantized)]
    if len(holding) == 1:
        return holding[0]
    what = f"calls {holding}, each of which is quantized" if holding else "runs its layers itself"
    raise ExportError(
        f"`validation_step` of {type(session.root).__name__} {what}, so that no one network can be exported. Put what "
        "it computes into `forward` and call `self(...)` in the step, or name one sub-module with `module`."
    )


def _is_in(path: str, name: str) -> bool:
    """Whether a path is that of a module or of one inside it."""
    return path == name or path.startswith(f"{name}.")


@contextmanager
def _noting_calls(root: nn.Module, called: list[str]) -> Iterator[Callable[..., Any]]:
    """An ``around_step`` that notes which modules a step calls; ``""`` is the root's ``forward``."""
    names = {id(module): clean_path(name) for name, module in root.named_modules() if name}
    depth = 0

    def enter(module: nn.Module, args: Any) -> None:
        nonlocal depth
        if depth == 0 and id(module) in names:
            called.append(names[id(module)])
        depth += 1

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal depth
        depth -= 1

    def around(call: Callable[[], Any], batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        nonlocal depth
        depth = 0
        plain = root.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            called.append("")
            return plain(*args, **kwargs)

        hooks = (register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True))
        try:
            with kept(root, "forward"):
                root.forward = forward
                return call()
        finally:
            for hook in hooks:
                hook.remove()

    yield around


@dataclass(eq=False)
class _Seen:
    """Collects the calls of a network in validation steps."""

    session: Instrumentation
    network: Network
    calls: list[NetworkCall] = field(default_factory=list)
    names: tuple[str, ...] = ()
    most: int = 0

    def around_step(self, call: Callable[[], Any], batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        """Run a step with the quantizers on, and keep the first call of the network in it."""
        module = self.network.module
        plain = module.forward
        made: dict[int, tuple[str, Any]] = {}
        count = 0

        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count > 1:
                return plain(*args, **kwargs)
            if not self.calls:
                self.names = tuple(self._name(tensor, batch, made) for tensor in tensors_of((args, kwargs)))
            copied = NetworkCall(args, kwargs).copied()
            output = plain(*args, **kwargs)
            results = [tensor.detach().clone() for tensor in output_tensors(output)]
            self.calls.append(NetworkCall(copied.args, copied.kwargs, with_output_tensors(output, results)))
            return output

        def trace(name: str, result: Any) -> None:
            made.update({id(tensor): (name, tensor) for _, tensor in tensors_in((result,), {})})

        with kept(module, "forward"), self.session.traced(trace):
            module.forward = forward
            result = self.session.run(call, step=True)
        self.most = max(self.most, count)
        return result

    def _name(self, tensor: Tensor, batch: Any, made: dict[int, tuple[str, Any]]) -> str:
        """Name of the quantizer whose grid a tensor is on, ``""`` where it is on none that is known."""
        if id(tensor) in made:
            return _source(self.session, made[id(tensor)][0])
        return input_names(batch).get(id(tensor), "")


def _source(session: Instrumentation, name: str) -> str:
    """The quantizer behind an operation of the step: its own, or that of what it only moves."""
    operation = next((op for op in session.topology if op.name == name), None)
    while operation is not None:
        if operation.name in session.quantizers:
            return operation.name
        if operation.category is not Category.PASS_THROUGH or not operation.data_inputs:
            return ""
        value = operation.data_inputs[0][1]
        if value.producer is None:
            return value.name if value.name in session.quantizers else ""
        operation = value.producer
    return ""


def _outside(session: Instrumentation, network: Network) -> tuple[str, ...]:
    """Activation quantizers that the network does not reach, and that give it none of its inputs."""
    inside = {
        site.name
        for site in session.plan.sites
        for spot in site.places
        if (_is_in(spot.key.path, network.path) if network.path else spot.key.call != -1 or spot.key.path)
    }
    rest = [q.name for q in session.select(kind=Kind.ACTIVATION) if q.name not in inside]
    return tuple(name for name in rest if name not in network.inputs)

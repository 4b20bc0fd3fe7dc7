"""Looks at the tensors that quantizers of activations see in FP32, and tells samples from tokens.

Nothing of the model is hooked: a quantizer in mode observe hands its tensor to a probe in place of its observer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.operations import Category, Slot
from lightning_quantdebug.target import Mode
from lightning_quantdebug.topology import Operation


@contextmanager
def shown(session: Instrumentation, views: Mapping[str, Callable[[Tensor], object]]) -> Iterator[None]:
    """FP32 while the block runs, in which the named quantizers show their tensors.

    Args:
        session: Placed; modes and probes are as before afterwards.
        views: What looks at the tensor, by the quantizer's name.

    Examples:
        >>> import torch
        >>> from lightning_quantdebug.instrument import instrument
        >>> model, batch = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU()).eval(), torch.randn(2, 4)
        >>> with instrument(model, batch) as q, shown(q, {"1": lambda x: print(tuple(x.shape))}):
        ...     _ = model(batch)
        (2, 3)
    """

    def probe_of(view: Callable[[Tensor], object]) -> Callable[[Tensor], Tensor]:
        def probe(x: Tensor) -> Tensor:
            view(x)
            return x

        return probe

    quantizers = {name: session.quantizers[name] for name in views}
    with session.modes(Mode.BYPASS):
        try:
            for name, quantizer in quantizers.items():
                quantizer.probe, quantizer.mode = probe_of(views[name]), Mode.OBSERVE
            yield
        finally:
            for quantizer in quantizers.values():
                quantizer.probe = None


def samples_first(session: Instrumentation, name: str) -> Callable[[Tensor], Tensor]:
    """What brings the samples of a quantizer's ``(N, T, C)`` or ``(T, N, C)`` to the front.

    Attention computes with the tokens first. Which axis it is, is known from the recorded run: the first axis of what
    the network returns counts samples. Where tokens and samples were equally many, the tensor is taken as it is.

    Args:
        session: Placed.
        name: Name of a quantizer of an activation.
    """
    operations = {session.topology.shared_keys()[operation.key]: operation for operation in session.topology}
    places = [place for site in session.plan.sites if site.name == name for place in site.places]
    shapes = [shape for place in places for shape in _shapes_at(operations[place.key], place.slot)]
    samples = _recorded_samples(session)
    turned = any(len(shape) == 3 and shape[0] != samples and shape[1] == samples for shape in shapes)
    return (lambda x: x.transpose(0, 1)) if turned else (lambda x: x)


def _shapes_at(operation: Operation, slot: Slot | None) -> list[tuple[int, ...]]:
    """Shapes of the tensors at one place of a quantizer."""
    if slot is None:
        return [value.shape for value in operation.outputs]
    return [value.shape for at, value in operation.inputs if at == slot]


def _recorded_samples(session: Instrumentation) -> int | None:
    """The number of samples of the recorded batch."""
    counts = Counter(
        value.shape[0]
        for operation in session.topology.output_operations()
        for value in (
            operation.outputs
            if operation.category is not Category.LOSS
            else [value for _, value in operation.data_inputs]
        )
        if value.shape
    )
    return counts.most_common(1)[0][0] if counts else None

"""The state of an instrumentation as plain values and tensors, by name: what checkpoints can hold.

Operations are known by objects of this process while it runs (:class:`~lightning_quantdebug.interception.OpKey`) and by
their names everywhere else. Only types that ``torch.load(weights_only=True)`` reads are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from enum import Enum
from typing import Any

import torch

from lightning_quantdebug.adjustment import Adjustment
from lightning_quantdebug.encoding import Encoding
from lightning_quantdebug.errors import CaptureError
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.quantizer import Quantizer
from lightning_quantdebug.target import QuantSpec


def state_of(session: Instrumentation) -> dict[str, Any]:
    """What remedies and training have made of the quantizers and of the network's operations.

    Args:
        session: A captured instrumentation.

    Returns:
        ``quantizers`` by name and ``adjustments`` by the name of the operation.
    """
    adjustments = {
        name: {
            item.name: value.detach().clone()
            for item in fields(Adjustment)
            if (value := getattr(adjustment, item.name)) is not None
        }
        for name, adjustment in named_adjustments(session).items()
    }
    quantizers = {name: _state_of_quantizer(quantizer) for name, quantizer in session.quantizers.items()}
    return {"quantizers": quantizers, "adjustments": adjustments}


def load_state(session: Instrumentation, state: Mapping[str, Any], learn: bool = False) -> tuple[str, ...]:
    """Make a captured instrumentation of the same network what ``state`` was taken of.

    Args:
        session: A captured instrumentation, of the same target.
        state: What :func:`state_of` returned.
        learn: Whether scales that were being trained go on being trained; else they are what they were.

    Returns:
        Names of quantizers and operations of the state that this network does not have.

    Raises:
        CaptureError: If the network has none of them, so that it must be another network.
    """
    missing = [name for name in state["quantizers"] if name not in session.quantizers]
    if state["quantizers"] and not set(state["quantizers"]) & set(session.quantizers):
        raise CaptureError(
            f"The checkpoint holds quantizers of another network: {sorted(state['quantizers'])[:3]}, while this one "
            f"has {sorted(session.quantizers)[:3]}."
        )
    for name, values in state["quantizers"].items():
        if name in session.quantizers:
            _load_quantizer(session.quantizers[name], values, learn)
    missing += adjust_by_name(session, {name: Adjustment(**values) for name, values in state["adjustments"].items()})
    return tuple(missing)


def named_adjustments(session: Instrumentation) -> dict[str, Adjustment]:
    """What remedies have changed, by the names of the operations, which are the same in every process."""
    names = {key: name for name, key in session.keys_by_name.items()}
    return {names[key]: adjustment for key, adjustment in session.adjustments.items()}


def adjust_by_name(session: Instrumentation, adjustments: Mapping[str, Adjustment]) -> list[str]:
    """Let operations run as ``adjustments`` say, and all others as they are; returns the names that are unknown."""
    known = session.keys_by_name
    session.set_adjustments({known[name]: change for name, change in adjustments.items() if name in known})
    return [name for name in adjustments if name not in known]


def _state_of_quantizer(quantizer: Quantizer) -> dict[str, Any]:
    """One quantizer as plain values and tensors."""
    learned, encoding = quantizer.learned, quantizer.encoding
    if learned is not None:
        encoding = learned.start
    return {
        "spec": {
            key: value.value if isinstance(value, Enum) else value for key, value in asdict(quantizer.spec).items()
        },
        "channel_axis": quantizer.channel_axis,
        "frozen": quantizer.frozen,
        "scale": None if encoding is None else encoding.scale.clone(),
        "zero_point": None if encoding is None else encoding.zero_point.clone(),
        "ratio": None if learned is None else learned.ratio.detach().clone(),
        "count": None if learned is None else learned.count,
    }


@torch.inference_mode(False)
def _load_quantizer(quantizer: Quantizer, values: Mapping[str, Any], learn: bool) -> None:
    """Make one quantizer what its values say."""
    spec = QuantSpec(**values["spec"])
    if spec != quantizer.spec or values["channel_axis"] != quantizer.channel_axis:
        quantizer.respecify(spec, values["channel_axis"])
    quantizer.encoding = None
    if values["scale"] is None:
        return
    quantizer.encoding = Encoding(spec, values["scale"], values["zero_point"], values["channel_axis"])
    quantizer.frozen = values["frozen"]
    if values["ratio"] is None:
        return
    learned = quantizer.learn()
    learned.load(values["ratio"], values["count"])
    if not learn:
        quantizer.settle()

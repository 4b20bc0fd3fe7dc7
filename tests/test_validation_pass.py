from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lightning_quantdebug.validation_pass import kept_callbacks
from tests.torture import NAMESPACES, lightning


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_callbacks_that_take_part(namespace: str) -> None:
    callbacks = lightning(namespace).callbacks
    base = callbacks.Callback

    def named(name: str, module: str = "mine", parent: Any = base) -> Any:
        return type(name, (parent,), {"__module__": module})

    averaging = [callbacks.WeightAveraging(), named("EMACallback")(), named("ExponentialMovingAverage")()]
    users = [named("LogsMetric")()]
    never = [
        callbacks.EarlyStopping("loss"),
        named("MyCheckpoint", parent=callbacks.ModelCheckpoint)(),
        named("QuantDebug", "lightning_quantdebug.callback")(),
        named("MyQuantDebug", parent=named("QuantDebug", "lightning_quantdebug.callback"))(),
    ]
    running = SimpleNamespace(callbacks=[*averaging, *users, *never])
    assert kept_callbacks(running, with_users=False) == averaging
    assert kept_callbacks(running, with_users=True) == [*averaging, *users]

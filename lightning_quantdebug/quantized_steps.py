"""The user's own steps with the quantizers on, for as long as a Trainer runs with them.

Nothing of the LightningModule is rewritten: its ``training_step``, ``validation_step``, ``test_step`` and
``predict_step`` are covered by attributes of the instance while the Trainer runs, and uncovered afterwards. What the
model's classes and its ``state_dict`` hold never changes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

from lightning_quantdebug import lightning_compat as compat
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.module_state import StateSnapshot
from lightning_quantdebug.session_state import adjust_by_name, load_state, named_adjustments
from lightning_quantdebug.settings import Settings
from lightning_quantdebug.target import Kind, Mode

_STEPS = ("training_step", "validation_step", "test_step", "predict_step")

#: Runs one step: called with what runs the user's step, the step's name and its batch.
Around = Callable[[Callable[[], Any], str, Any], Any]


class CoveredSteps:
    """Covers the steps of a module.

    Args:
        trainer: The Trainer that runs it.
        pl_module: The LightningModule.
        around: What runs in place of each step.
    """

    def __init__(self, trainer: Any, pl_module: Any, around: Around) -> None:
        """Nothing is covered yet."""
        self._trainer = trainer
        self._module = pl_module
        self._around = around
        self._covered = ExitStack()

    def install(self) -> None:
        """Cover every step that the module has, until :meth:`remove`."""
        for name in _STEPS:
            if compat.is_overridden(self._trainer, name, self._module):
                self._covered.enter_context(compat.kept(self._module, name))
                setattr(self._module, name, self._cover(name, getattr(self._module, name)))

    def remove(self) -> None:
        """Give the module its own steps back."""
        self._covered.close()

    def _cover(self, name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        """One step, run by ``around``."""

        @functools.wraps(step)
        def covered(*args: Any, **kwargs: Any) -> Any:
            batch = args[0] if args else kwargs.get("batch")
            return self._around(lambda: step(*args, **kwargs), name, batch)

        return covered


class LoadedQuantizers:
    """Quantizers from a checkpoint, put on a model when its first batch shows where they belong.

    Args:
        trainer: The Trainer that evaluates.
        pl_module: The LightningModule.
        settings: Those that the quantizers were made with.
        state: What :func:`~lightning_quantdebug.session_state.state_of` returned.
    """

    def __init__(self, trainer: Any, pl_module: Any, settings: Settings, state: Mapping[str, Any]) -> None:
        """Nothing runs yet."""
        self._trainer = trainer
        self._module = pl_module
        self._settings = settings
        self._state = state
        self._session: Instrumentation | None = None

    def __call__(self, call: Callable[[], Any], name: str, batch: Any) -> Any:
        """Run one step with the quantizers on; the first is recorded before."""
        if self._session is None:
            self._session = self._captured(call, batch)
        return self._session.run(call, step=True)

    def _captured(self, call: Callable[[], Any], batch: Any) -> Instrumentation:
        """The quantizers where the network runs; what the recorded step logged and counted is undone."""
        settings, trainer = self._settings, self._trainer
        session = Instrumentation(self._module, settings.target, module=settings.module, exclude=settings.exclude)
        skip = compat.bare_module_attributes(trainer)
        snapshot = StateSnapshot(self._module, *compat.logged_values(trainer), skip=skip)
        try:
            session.record(call, batch, step=True)
        finally:
            snapshot.restore()
        session.place()
        missing = load_state(session, self._state)
        if missing:
            compat.rank_zero_warn(
                trainer,
                f"QuantDebug: the first batch did not reach {list(missing[:5])}; what they quantize runs in FP32.",
            )
        session.set_mode(Mode.QUANTIZE)
        return session


def training_session(evaluator: Any, pl_module: Any, settings: Settings, session: Instrumentation) -> Instrumentation:
    """The instrumentation that training steps run in.

    Operations of modules are known wherever the modules are called from. Those that a step does itself are known by
    their place in that step, so that where validation's step has such, the training step is recorded as well.

    Args:
        evaluator: Runs passes over the training batches.
        pl_module: The LightningModule.
        settings: The settings.
        session: The captured instrumentation of validation.

    Returns:
        ``session`` itself, or another that shares its quantizers by name.
    """
    own = [
        spot
        for site in session.plan.sites
        for spot in site.places
        if spot.key.path == "" and spot.key.call in (-1, None)
    ]
    if not own:
        return session
    training = Instrumentation(pl_module, settings.target, module=settings.module, exclude=settings.exclude)

    def record(call: Callable[[], Any], batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        training.record(lambda: pl_module.training_step(batch, batch_idx), batch, step=True)
        return call()

    evaluator.run_unchecked(record, loader="train", limit=1)
    training.place()
    training.share_quantizers(session.quantizers)
    adjust_by_name(training, named_adjustments(session))
    return training


def untrained(session: Instrumentation, training: Instrumentation) -> list[str]:
    """Activations that only validation quantizes, because the training step computes them elsewhere or not at all."""
    if training is session:
        return []
    return sorted(q.name for q in session.select(kind=Kind.ACTIVATION) if q.name not in training.quantizers)

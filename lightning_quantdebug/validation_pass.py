"""One pass of the user's validation loop inside a running Trainer, with everything given back at its end."""

from __future__ import annotations

import functools
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_quantdebug import lightning_compat as compat
from lightning_quantdebug.batch_scores import BatchRecorder
from lightning_quantdebug.errors import LanesError
from lightning_quantdebug.lanes import Lanes, Schedule
from lightning_quantdebug.lightning_compat import LoopData, ModuleLike, TrainerLike, kept, replaced
from lightning_quantdebug.loader_copies import seeded_generators
from lightning_quantdebug.module_state import StateSnapshot, preserved
from lightning_quantdebug.random_state import isolated_random_state, seed_all

AroundStep = Callable[[Callable[[], Any], Any, int, int], Any]

# Hooks in which a module may exchange its weights, for those of a moving average say.
_WEIGHT_HOOKS = ("on_validation_start", "on_validation_epoch_start", "on_validation_model_eval")
_AVERAGING = re.compile("EMA|WeightAverag|MovingAverage")


@dataclass(frozen=True)
class PassRequest:
    """What one pass is to do; see :meth:`lightning_quantdebug.evaluation.Evaluator.run`."""

    around_step: AroundStep | None
    seed: int
    model_seed: int
    keeps_user_callbacks: bool
    schedule: Schedule | None = None


@dataclass(frozen=True, eq=False)
class Outcome:
    """What one lane of a pass has logged, and who listened to it."""

    logged: dict[str, Tensor]
    recorder: BatchRecorder


@contextmanager
def neutral_torch() -> Iterator[None]:
    """Torch in the state in which FP32 and fake-quantized runs can be compared.

    Compiled modules run eagerly (hooks added after compilation would be ignored), attention does not take its fused
    fast path (which no interception sees, and whose results differ in the last bits), and tensors that are made are
    ordinary ones, so that calibration may use them with autograd.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with torch.compiler.set_stance("force_eager"), torch.inference_mode(False), torch.no_grad():
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)


def kept_callbacks(trainer: TrainerLike, with_users: bool) -> list[Any]:
    """Callbacks that take part in a pass: weight averaging always, the user's own if they log the monitored metric."""
    return [
        callback
        for callback in trainer.callbacks
        if averages_weights(callback) or (with_users and not compat.is_lightnings_own(callback) and not _ours(callback))
    ]


def averages_weights(callback: object) -> bool:
    """Whether a callback validates other weights than the module holds; without it the score would be another's."""
    return any(_AVERAGING.search(cls.__name__) for cls in type(callback).__mro__)


def _ours(callback: object) -> bool:
    """Whether this package defines the callback."""
    return any(cls.__module__.partition(".")[0] == __name__.partition(".")[0] for cls in type(callback).__mro__[:-1])


def run_pass(
    trainer: TrainerLike,
    pl_module: ModuleLike,
    data: LoopData,
    new_recorder: Callable[[], BatchRecorder],
    request: PassRequest,
) -> dict[str, Outcome]:
    """Run the user's loop over ``data``, and return what each lane has logged; without a schedule there is one lane.

    Raises:
        LanesError: If several lanes can not go through one pass.
    """
    callbacks = kept_callbacks(trainer, request.keeps_user_callbacks)
    if request.schedule is not None and _moves_weights(trainer, pl_module, callbacks):
        raise LanesError("weights are exchanged for validation, or its metric is logged by a callback")
    with borrowed(trainer, pl_module, callbacks) as loop, seeded_generators(data.loaders, request.seed):
        place = _Place(trainer.global_rank)
        if request.schedule is None:
            recorder = new_recorder()
            runner = _StepRunner(pl_module, loop, lambda: recorder, request, place)
            compat.listen(loop, recorder.on_log)
            compat.on_each_batch(loop, place.move, _one_lane(recorder))
        else:
            lanes = Lanes(loop, (pl_module,), request.schedule, new_recorder)
            runner = _StepRunner(pl_module, loop, lambda: lanes.recorder, request, place)
            compat.listen(loop, lanes.on_log)
            compat.on_each_batch(loop, place.move, lanes.batch)
            compat.on_each_end(loop, lanes.store, lanes.end)
        runner.install()
        seed_all(request.seed)
        logged = compat.run_loop(loop, data)
    if request.schedule is None:
        return {"": Outcome(logged, recorder)}
    return {lane: Outcome(metrics, lanes.recorders[lane]) for lane, metrics in lanes.metrics.items()}


def _one_lane(recorder: BatchRecorder) -> Callable[[Callable[[], None], Any], None]:
    """Run each batch once and let ``recorder`` hear its end."""

    def run(evaluate: Callable[[], None], batch: Any) -> None:
        evaluate()
        recorder.end_batch(batch)

    return run


def _moves_weights(trainer: TrainerLike, pl_module: ModuleLike, callbacks: list[Any]) -> bool:
    """Whether the weights may be others during validation."""
    return bool(callbacks) or any(compat.is_overridden(trainer, hook, pl_module) for hook in _WEIGHT_HOOKS)


@contextmanager
def borrowed(trainer: TrainerLike, pl_module: ModuleLike, callbacks: list[Any]) -> Iterator[Any]:
    """Put a fresh validation loop into the Trainer and give everything back afterwards, whatever happens."""
    holder, name = compat.validation_slot(trainer)
    original = getattr(holder, name)
    loop = compat.new_loop(original)
    finished = compat.outer_validation(trainer) == "finished"
    moves_weights = _moves_weights(trainer, pl_module, callbacks)
    skip = compat.bare_module_attributes(trainer)
    with ExitStack() as stack:
        enter = stack.enter_context
        scratch = enter(tempfile.TemporaryDirectory(prefix="quantdebug-"))
        enter(compat.parallel_flags_kept(trainer))
        enter(preserved(pl_module, *callbacks, skip=skip, parameters=moves_weights))
        enter(compat.module_on_device(trainer, pl_module))
        enter(kept(trainer, "should_stop"))
        enter(kept(trainer, "_last_val_time"))
        enter(replaced(trainer, "callbacks", callbacks))
        enter(replaced(trainer, "loggers", compat.silent_loggers(trainer, scratch)))
        enter(replaced(trainer, "profiler", compat.silent_profiler(trainer)))
        if finished:
            compat.settle_outer_validation(original, pl_module)
        enter(replaced(trainer.state, "stage", compat.stage(original, "validate")))
        enter(replaced(trainer, "_logger_connector", type(trainer._logger_connector)(trainer)))
        enter(replaced(holder, name, loop))
        yield loop


class _Place:
    """Which batch of which loader on which rank is at work."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.batch_idx = 0
        self.dataloader_idx = 0

    def move(self, batch_idx: int, dataloader_idx: int) -> None:
        """Go to a batch."""
        self.batch_idx, self.dataloader_idx = batch_idx, dataloader_idx


class _StepRunner:
    """Stands in for the user's ``validation_step`` during a pass."""

    def __init__(
        self,
        pl_module: ModuleLike,
        loop: Any,
        recorder: Callable[[], BatchRecorder],
        request: PassRequest,
        place: _Place,
    ) -> None:
        self._pl_module = pl_module
        self._loop = loop
        self._recorder = recorder
        self._request = request
        self._place = place
        self._step = pl_module.validation_step
        self._skip = compat.bare_module_attributes(loop.trainer)

    def install(self) -> None:
        """Be the module's ``validation_step`` until :func:`borrowed` gives the module its attributes back."""

        @functools.wraps(self._step)
        def validation_step(*args: Any, **kwargs: Any) -> Any:
            return self._run(args, kwargs)

        self._pl_module.validation_step = validation_step

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the step plainly or through ``around_step``."""
        around, place = self._request.around_step, self._place
        self._recorder().start_batch()
        if around is None:
            return self._call(args, kwargs)
        is_lane = self._request.schedule is not None
        logged = (self._loop._results, vars(self._loop.trainer._logger_connector))
        before = None if is_lane else StateSnapshot(self._pl_module, *logged, skip=self._skip)
        calls = 0

        def call() -> Any:
            nonlocal calls
            if calls:
                assert before is not None, "a lane runs its step once"
                before.restore()
                self._recorder().start_batch()
            calls += 1
            return self._call(args, kwargs)

        return around(call, args[0] if args else kwargs["batch"], place.batch_idx, place.dataloader_idx)

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the user's step with its own random numbers; the loaders' stream goes on as if it drew none."""
        place = self._place
        with isolated_random_state():
            seed_all(self._request.model_seed, place.batch_idx, place.dataloader_idx, place.rank)
            return self._step(*args, **kwargs)

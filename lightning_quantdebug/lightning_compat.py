"""Everything that depends on how Lightning is built: its two names, and the parts that it does not promise to keep.

Lightning is published twice, as ``pytorch_lightning`` and as ``lightning.pytorch``, with unrelated classes. A callback
must derive from the base of the Trainer that it is given to, and whoever has both installed may use either, so
:data:`CallbackBase` derives from both. Private classes are never imported by name but taken from the live Trainer
(``type(trainer.validate_loop)``), so that they are always those of the right namespace.

Running a validation out of turn needs attributes that start with an underscore. All of them are used here, and
:func:`check_lightning` says by name which one a Lightning release lacks, before anything was touched.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import operator
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from lightning_quantdebug.errors import EvaluationError

NAMESPACES = ("pytorch_lightning", "lightning.pytorch")

#: A Trainer, LightningModule or Callback of either namespace; no common type exists.
TrainerLike: TypeAlias = Any
ModuleLike: TypeAlias = Any
CallbackLike: TypeAlias = Any


def installed_namespaces() -> tuple[ModuleType, ...]:
    """The Lightning packages that can be imported, ``pytorch_lightning`` first."""
    roots = {name: name.partition(".")[0] for name in NAMESPACES}
    found = [name for name, root in roots.items() if importlib.util.find_spec(root) and importlib.util.find_spec(name)]
    return tuple(importlib.import_module(name) for name in found)


def _callback_base() -> type:
    """One class that each installed Trainer accepts as a callback."""
    bases = tuple(namespace.Callback for namespace in installed_namespaces())
    documentation = "Callback of every installed Lightning namespace."
    return type("CallbackBase", bases, {"__doc__": documentation, "__module__": __name__})


if TYPE_CHECKING:
    import pytorch_lightning

    CallbackBase = pytorch_lightning.Callback
else:
    CallbackBase = _callback_base()


def _is_lightning(cls: type) -> bool:
    """Whether Lightning itself, in either namespace, defines the class."""
    return any(cls.__module__ == name or cls.__module__.startswith(f"{name}.") for name in NAMESPACES)


def foreign_isinstance(value: object, name: str) -> bool:
    """Whether ``value`` is an instance of Lightning's class ``name``, from whichever namespace.

    Example:
        >>> from pytorch_lightning.callbacks import EarlyStopping
        >>> foreign_isinstance(EarlyStopping("loss"), "EarlyStopping")
        True
        >>> foreign_isinstance(object(), "EarlyStopping")
        False
    """
    return any(cls.__name__ == name and _is_lightning(cls) for cls in type(value).__mro__)


def is_lightnings_own(callback: CallbackLike) -> bool:
    """Whether a callback is, or derives from, one that Lightning ships (not merely from its base class)."""
    return any(_is_lightning(cls) and cls.__name__ != "Callback" for cls in type(callback).__mro__)


def namespace_of(trainer: TrainerLike) -> ModuleType:
    """The package, ``pytorch_lightning`` or ``lightning.pytorch``, whose Trainer this is.

    Raises:
        EvaluationError: If the object is no Trainer.
    """
    for cls in type(trainer).__mro__:
        for name in NAMESPACES:
            if cls.__name__ == "Trainer" and cls.__module__.startswith(f"{name}."):
                return importlib.import_module(name)
    raise EvaluationError(f"`trainer` must be a Trainer of {' or '.join(NAMESPACES)}, got {type(trainer).__name__}.")


def rank_zero_info(trainer: TrainerLike, message: str) -> None:
    """Log on the first process only, by the Trainer's own logger."""
    _member(trainer, "utilities.rank_zero", "rank_zero_info")(message)


def rank_zero_warn(trainer: TrainerLike, message: str) -> None:
    """Warn on the first process only, as the Trainer's own namespace does."""
    _member(trainer, "utilities.rank_zero", "rank_zero_warn")(message)


def misconfiguration_exception(trainer: TrainerLike) -> type[Exception]:
    """``MisconfigurationException`` of the Trainer's namespace."""
    exception: type[Exception] = _member(trainer, "utilities.exceptions", "MisconfigurationException")
    return exception


def is_overridden(trainer: TrainerLike, hook: str, pl_module: ModuleLike) -> bool:
    """Whether the user's module implements ``hook``."""
    return bool(_member(trainer, "utilities.model_helpers", "is_overridden")(hook, pl_module))


def bare_module_attributes(trainer: TrainerLike) -> frozenset[str]:
    """Names of the attributes that every LightningModule has: what is beyond them is the user's."""
    return frozenset(vars(namespace_of(trainer).LightningModule()))


def batch_size_of(trainer: TrainerLike, batch: Any) -> int | None:
    """Number of samples in a batch as Lightning finds it, ``None`` where it can not.

    The public ``extract_batch_size`` warns of ambiguous batches, also those whose size the user does give.
    """
    try:
        sizes = _member(trainer, "utilities.data", "_extract_batch_size")(batch)
        return next((size for size in sizes if size is not None), None)
    except RecursionError:
        return None


def silent_loggers(trainer: TrainerLike, directory: str) -> list[Any]:
    """Loggers that write nothing, one for each of the Trainer's, whose folders are ``directory``.

    The user's step may ask ``self.logger`` for its experiment (nothing happens) or for its folder (a scratch one, so
    that pictures of an extra pass never replace those of the run).
    """
    dummy: type = _member(trainer, "loggers.logger", "DummyLogger")
    folders = dict.fromkeys(("save_dir", "log_dir", "root_dir"), directory)
    return [type("SilentLogger", (dummy,), folders)() for _ in trainer.loggers]


def silent_profiler(trainer: TrainerLike) -> Any:
    """A profiler that records nothing: a pass inside a hook would start an action that is running already."""
    return _member(trainer, "profilers", "PassThroughProfiler")()


def scheduler_config(trainer: TrainerLike, scheduler: Any, interval: str) -> Any:
    """What the Trainer steps a scheduler by, each ``"step"`` or ``"epoch"``."""
    return _member(trainer, "utilities.types", "LRSchedulerConfig")(scheduler, interval=interval)


def live_progress(trainer: TrainerLike) -> Any:
    """The live display of the Trainer's RichProgressBar while it is open, else ``None``."""
    bar = trainer.progress_bar_callback
    progress = getattr(bar, "progress", None) if foreign_isinstance(bar, "RichProgressBar") else None
    return progress if progress is not None and progress.live.is_started else None


def _member(trainer: TrainerLike, module: str, name: str) -> Any:
    """One name of a submodule of the Trainer's namespace."""
    return getattr(importlib.import_module(f"{namespace_of(trainer).__name__}.{module}"), name)


_PRIVATE_ATTRIBUTES = (
    "_logger_connector._callback_metrics",
    "fit_loop._combined_loader",
    "fit_loop._data_source.is_defined",
    "fit_loop.epoch_loop.val_loop",
    "validate_loop._combined_loader",
    "validate_loop._data_fetcher",
    "validate_loop._data_source.is_defined",
    "validate_loop._evaluation_step",
    "validate_loop._last_val_dl_reload_epoch",
    "validate_loop._max_batches",
    "validate_loop._results._forked_name",
    "validate_loop._results.update_metrics",
    "validate_loop._stage",
    "validate_loop.batch_progress",
    "validate_loop._seen_batches_per_dataloader",
    "validate_loop._logged_outputs",
    "validate_loop._store_dataloader_outputs",
    "validate_loop._trainer_fn",
)
_LOOP_ARGUMENTS = ("trainer", "trainer_fn", "stage", "verbose", "inference_mode")


def check_lightning(trainer: TrainerLike) -> None:
    """Test that this Lightning release has the private parts that an extra validation pass needs.

    Raises:
        EvaluationError: If one is missing; the message names it and the release.
    """
    missing = [f"Trainer.{path}" for path in _PRIVATE_ATTRIBUTES if not _has(trainer, path)]
    if not missing:
        loop = type(trainer.validate_loop)
        accepted = inspect.signature(loop).parameters
        missing = [f"{loop.__name__}({name}=...)" for name in _LOOP_ARGUMENTS if name not in accepted]
    if missing:
        package = namespace_of(trainer)
        raise EvaluationError(
            f"{package.__name__} {package.__version__} lacks {', '.join(f'`{name}`' for name in missing)}, which "
            "lightning-quantdebug needs to validate out of turn. Install a tested release: "
            "`pytorch-lightning>=2.4,<2.8`."
        )


def _has(value: object, path: str) -> bool:
    """Whether a dotted attribute exists."""
    try:
        operator.attrgetter(path)(value)
    except AttributeError:
        return False
    return True


def validation_slot(trainer: TrainerLike) -> tuple[Any, str]:
    """The object and attribute in which the Trainer looks for the validation loop of what it is running.

    Raises:
        EvaluationError: If the Trainer is neither fitting nor validating.
    """
    slots = {"fit": (trainer.fit_loop.epoch_loop, "val_loop"), "validate": (trainer, "validate_loop")}
    running = trainer.state.fn
    if running not in slots:
        now = "nothing" if running is None else f"`trainer.{running.value}`"
        raise EvaluationError(
            f"A validation pass needs a Trainer inside `trainer.fit` or `trainer.validate`, but it runs {now}."
        )
    return slots[running]


def new_loop(like: Any) -> Any:
    """A fresh validation loop of the same class, without data, which prints nothing and allows autograd."""
    loop_class, fitting = type(like), type(like._trainer_fn)("fit")
    loop = loop_class(like.trainer, fitting, stage(like, "validate"), verbose=False, inference_mode=False)
    # `reload_dataloaders_every_n_epochs` compares this with the epoch; the loop must never ask for data by itself.
    loop._last_val_dl_reload_epoch = float("inf")
    return loop


@dataclass(frozen=True)
class LoopData:
    """What a validation loop runs over: Lightning's ``CombinedLoader`` and the number of batches of each part."""

    combined_loader: Any
    max_batches: tuple[int | float, ...]

    @property
    def loaders(self) -> list[Any]:
        """The single loaders, whatever collection they are in."""
        return list(self.combined_loader.flattened)


def data_of(loop: Any) -> LoopData | None:
    """The data that a validation loop was set up with, ``None`` before it was."""
    if loop._combined_loader is None:
        return None
    return LoopData(loop._combined_loader, tuple(loop._max_batches))


def set_up_data(like: Any, source: Any, stage_name: str) -> LoopData | None:
    """Ask ``source`` for its loaders and prepare them (samplers of the ranks, limits of a stage) off the record."""
    loop = new_loop(like)
    loop._data_source, loop._stage = source, stage(like, stage_name)
    loop.setup_data()
    return data_of(loop)


def new_source(like: Any, loader: Any) -> Any:
    """A data source that hands out one given loader."""
    return type(like._data_source)(loader, "train_dataloader")


def training_data(trainer: TrainerLike) -> LoopData | None:
    """The training loaders of a running fit, ``None`` where they were not set up yet."""
    combined = trainer.fit_loop._combined_loader
    if combined is None:
        return None
    return LoopData(combined, tuple(combined.limits or [trainer.fit_loop.max_batches] * len(combined.flattened)))


def combine(like: Any, loaders: Iterable[Any], sequential: bool = False) -> Any:
    """A ``CombinedLoader`` of its own over ``loaders``: one after another, or in the collection that ``like`` has."""
    loaders = list(loaders)
    if sequential:
        return type(like)(loaders, "sequential")
    combined = type(like)(like.iterables, like._mode)
    combined.flattened = loaders
    return combined


def stage(loop: Any, name: str) -> Any:
    """Member of Lightning's ``RunningStage`` (``"train"``, ``"validate"``)."""
    return type(loop._stage)(name)


def will_sanity_check(trainer: TrainerLike) -> bool:
    """Whether a fit that did not start its loop yet will validate a few batches first, on loaders that it keeps."""
    fresh = trainer.state.fn == "fit" and trainer.ckpt_path is None
    keeps = trainer.reload_dataloaders_every_n_epochs == 0
    return bool(fresh and keeps and trainer.enable_validation and trainer.num_sanity_val_steps > 0)


def takes_iterator(step: Callable[..., Any]) -> bool:
    """Whether a step fetches its batches itself (``validation_step(self, dataloader_iter)``)."""
    return "dataloader_iter" in inspect.signature(step).parameters


@contextmanager
def replaced(target: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for the body's duration."""
    before = getattr(target, name)
    setattr(target, name, value)
    try:
        yield
    finally:
        setattr(target, name, before)


@contextmanager
def kept(target: Any, name: str) -> Iterator[None]:
    """Give an attribute its value back after the body, or have it gone again if it was not there."""
    attributes = vars(target)
    was_there, before = name in attributes, attributes.get(name)
    try:
        yield
    finally:
        if was_there:
            setattr(target, name, before)
        else:
            attributes.pop(name, None)


@contextmanager
def parallel_flags_kept(trainer: TrainerLike) -> Iterator[None]:
    """Keep DDP's note of whether buffers must be synchronised: a forward without gradients clears it."""
    name = "require_forward_param_sync"
    with kept(trainer.model, name) if hasattr(trainer.model, name) else nullcontext():
        yield


@contextmanager
def module_on_device(trainer: TrainerLike, pl_module: ModuleLike) -> Iterator[None]:
    """Have the module where batches are sent: in ``on_fit_end`` Lightning has moved it to the CPU already."""
    device = trainer.strategy.root_device
    if device.type == "cpu" or any(parameter.device.type != "cpu" for parameter in pl_module.parameters()):
        yield
        return
    pl_module.to(device)
    try:
        yield
    finally:
        pl_module.cpu()


def is_sequential(combined: Any) -> bool:
    """Whether the loaders are run one after another, so that each has its ``dataloader_idx``."""
    return bool(combined._mode == "sequential")


def outer_validation(trainer: TrainerLike) -> str | None:
    """Where the Trainer's own validation stands: ``None`` (none runs), ``"iterating"`` or ``"finished"``.

    In ``on_validation_epoch_end`` of a callback it is not finished: the module did not consume yet what its steps
    collected, and weight averaging did not put the weights back.
    """
    if trainer.state.stage not in ("validate", "sanity_check"):
        return None
    return "finished" if trainer.lightning_module._current_fx_name == "on_validation_end" else "iterating"


def settle_outer_validation(loop: Any, pl_module: ModuleLike) -> None:
    """Do what remains of the Trainer's own validation, so that an extra pass starts from clean metrics.

    In ``on_validation_end`` of a callback the module's hook of that name did not run and Lightning did not reset the
    metrics. The caller has a snapshot of all that this changes and gives it back.
    """
    pl_module.on_validation_end()
    for result in loop._results.result_metrics:
        if not result.is_tensor:
            result.value.reset()


def logged_values(trainer: TrainerLike) -> tuple[Any, ...]:
    """What ``self.log`` has gathered in the loop that runs, as roots of a snapshot."""
    return (trainer._results, vars(trainer._logger_connector))


@dataclass(frozen=True)
class LoggedValue:
    """One call of ``self.log``: the names it is known by, the value or metric, and how it is averaged."""

    names: tuple[str, str]
    value: Any
    batch_size: int
    is_mean: bool


def listen(loop: Any, on_log: Callable[[LoggedValue], None]) -> None:
    """Call ``on_log`` after each ``self.log`` that reaches the loop's results."""
    results = loop._results
    update_metrics = results.update_metrics

    def update_and_tell(key: str, value: Any, batch_size: int) -> None:
        update_metrics(key, value, batch_size)
        result = results[key]
        names = results._forked_name(result, on_step=False)
        is_mean = result.is_tensor and result.meta.on_epoch and result.meta.is_mean_reduction
        on_log(LoggedValue(names, value, batch_size, is_mean))

    results.update_metrics = update_and_tell


def on_each_batch(
    loop: Any, before: Callable[[int, int], None], run: Callable[[Callable[[], None], Any], None]
) -> None:
    """Call ``before(batch_idx, dataloader_idx)`` and then ``run(evaluate, batch)`` for every batch of the loop.

    ``evaluate()`` is what the loop does with a batch: it transfers it and calls the hooks and the step.
    """
    evaluate = loop._evaluation_step

    def evaluate_and_tell(batch: Any, batch_idx: int, dataloader_idx: int, dataloader_iter: Any) -> None:
        before(batch_idx, dataloader_idx)
        run(lambda: evaluate(batch, batch_idx, dataloader_idx, dataloader_iter), batch)

    loop._evaluation_step = evaluate_and_tell


def on_each_end(
    loop: Any, of_loader: Callable[[Callable[[], None]], None], of_run: Callable[[Callable[[], Any]], Any]
) -> None:
    """Call ``of_loader(store)`` instead of each storing of a loader's outputs, ``of_run(end)`` at the loop's end."""
    store, end = loop._store_dataloader_outputs, loop.on_run_end
    loop._store_dataloader_outputs = lambda: of_loader(store)
    loop.on_run_end = lambda: of_run(end)


def batch_state(loop: Any) -> tuple[Any, ...]:
    """What one batch changes in a validation loop and in the log, as roots of a snapshot."""
    progress, results = loop.batch_progress, loop._results
    counts = (vars(progress.total), vars(progress.current), loop._seen_batches_per_dataloader)
    return (results, vars(results), vars(loop.trainer._logger_connector), loop._logged_outputs, *counts)


@contextmanager
def transferred_once(trainer: TrainerLike, received: Callable[[Any], None]) -> Iterator[None]:
    """A batch that is transferred several times in the block is the same tensors each time, told to ``received``."""
    strategy = trainer.strategy
    kept_batches: list[Any] = []
    transfer = strategy.batch_to_device

    def once(*args: Any, **kwargs: Any) -> Any:
        if not kept_batches:
            kept_batches.append(transfer(*args, **kwargs))
            received(kept_batches[0])
        return kept_batches[0]

    with kept(strategy, "batch_to_device"):
        strategy.batch_to_device = once
        yield


def run_loop(loop: Any, data: LoopData) -> dict[str, torch.Tensor]:
    """Run a fresh loop over ``data`` and return all that was logged, also with ``logger=False``."""
    loop._combined_loader, loop._max_batches = data.combined_loader, list(data.max_batches)
    try:
        loop.run()
        return dict(loop.trainer._logger_connector._callback_metrics)
    finally:
        # Not `loop.teardown`: it would move the user's metrics to the CPU.
        if loop._data_fetcher is not None:
            loop._data_fetcher.teardown()

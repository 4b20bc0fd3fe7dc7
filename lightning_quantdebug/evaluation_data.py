"""Which loaders a pass runs over: the Trainer's validation or training loaders, or one that the user gave."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader

from lightning_quantdebug import lightning_compat as compat
from lightning_quantdebug.errors import EvaluationError, NoTrainingDataError
from lightning_quantdebug.lightning_compat import LoopData, TrainerLike, replaced
from lightning_quantdebug.loader_copies import Batches, copy_loader, limited

_CALIBRATE_OTHERWISE = 'Pass `calibration="val"` or a DataLoader.'


class EvaluationData:
    """Finds loaders, prepares them as the Trainer would (samplers of the ranks, limits), and hands out copies.

    Args:
        trainer: A Trainer inside ``fit`` or ``validate``.
    """

    def __init__(self, trainer: TrainerLike) -> None:
        """Ask for nothing yet."""
        self._trainer = trainer
        self._prepared: dict[int, tuple[Any, LoopData]] = {}

    def get(self, loader: Any, limit: int | float) -> LoopData:
        """Copies of the loaders that ``loader`` stands for and the number of batches to run of each.

        Args:
            loader: ``None`` for validation, ``"train"``, or an iterable of batches.
            limit: Number or share of batches of each loader.

        Raises:
            EvaluationError: If there is no such loader, or nothing in it.
        """
        validation = self._validation()
        if loader is None:
            data, combined = validation, compat.combine(validation.combined_loader, _copies(validation))
        else:
            data = self._training() if isinstance(loader, str) else self._given(loader)
            data, combined = _like_validation(data, validation)
        batches = tuple(limited(count, limit) for count in data.max_batches)
        if sum(batches) == 0:
            name = "validation" if loader is None else "training" if isinstance(loader, str) else "given"
            hint = "" if loader is None else f" {_CALIBRATE_OTHERWISE}"
            raise EvaluationError(f"The {name} DataLoader has no batches, so there is nothing to run.{hint}")
        return LoopData(combined, batches)

    def _loop(self) -> Any:
        """The Trainer's own validation loop."""
        return getattr(*compat.validation_slot(self._trainer))

    def _validation(self) -> LoopData:
        """The validation loaders; before the Trainer set them up, they are set up without disturbing its order."""
        trainer, loop = self._trainer, self._loop()
        if compat.data_of(loop) is None and compat.will_sanity_check(trainer):
            # The sanity check asks for the loaders under an isolated random state, as this pass does: doing it now
            # in its place gives the same loaders and saves the user's `val_dataloader` a second call.
            loop.setup_data()
        found = compat.data_of(loop)
        if found is not None:
            return found
        # Here the fit itself will ask later, after the training loaders: it must find the random state of then.
        return self._prepare(loop._data_source, "validate", loop._data_source.instance)

    def _training(self) -> LoopData:
        """The training loader, which must be a single one."""
        trainer = self._trainer
        data = compat.training_data(trainer)
        if data is None:
            source = trainer.fit_loop._data_source
            if not source.is_defined():
                raise NoTrainingDataError(f"There is no training DataLoader to calibrate on. {_CALIBRATE_OTHERWISE}")
            try:
                data = self._prepare(source, "train", source.instance)
            except (AttributeError, TypeError, NotImplementedError) as error:
                # `trainer.validate` sets a datamodule up for validation only.
                raise NoTrainingDataError(
                    f"`train_dataloader` failed outside of a fit ({type(error).__name__}: {error}). "
                    f"{_CALIBRATE_OTHERWISE}"
                ) from error
        if isinstance(data.combined_loader.iterables, (dict, list, tuple)):
            raise EvaluationError(
                f"The training loaders are a {type(data.combined_loader.iterables).__name__}, whose batches "
                f"`validation_step` can not take. {_CALIBRATE_OTHERWISE}"
            )
        return data

    def _given(self, loader: Any) -> LoopData:
        """A loader of the user's, whole: the Trainer's limits are not meant for it."""
        source = compat.new_source(self._loop(), loader if isinstance(loader, DataLoader) else Batches(loader))
        with replaced(self._trainer, "limit_train_batches", 1.0):
            return self._prepare(source, "train", loader)

    def _prepare(self, source: Any, stage: str, key: Any) -> LoopData:
        """Loaders of a source, asked for once in the life of this object."""
        kept = self._prepared.get(id(key))
        if kept is None or kept[0] is not key:
            data = compat.set_up_data(self._loop(), source, stage)
            assert data is not None, "validation was checked to be enabled"
            self._prepared[id(key)] = kept = (key, data)
        return kept[1]


def _copies(data: LoopData) -> list[Any]:
    """A copy of each loader."""
    return [copy_loader(loader) for loader in data.loaders]


def _like_validation(data: LoopData, validation: LoopData) -> tuple[LoopData, Any]:
    """One loader, followed by as many empty ones as validation has more, so that the step gets its dataloader_idx."""
    like = validation.combined_loader
    more = len(validation.loaders) - 1 if compat.is_sequential(like) else 0
    padded = LoopData(data.combined_loader, (*data.max_batches, *[0] * more))
    return padded, compat.combine(like, [*_copies(data), *[range(0)] * more], sequential=True)

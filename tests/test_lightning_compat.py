from __future__ import annotations

import importlib
import logging
from typing import Any

import pytest
import pytorch_lightning

from lightning_quantdebug import lightning_compat as compat
from lightning_quantdebug.errors import EvaluationError
from tests.torture import NAMESPACES, calling, lightning, loader, simple_class, trainer

pytestmark = pytest.mark.filterwarnings("ignore")


def test_callback_base_derives_from_every_installed_namespace() -> None:
    assert compat.installed_namespaces() == tuple(map(lightning, NAMESPACES))
    assert issubclass(compat.CallbackBase, pytorch_lightning.Callback)
    assert issubclass(compat.CallbackBase, lightning("lightning.pytorch").Callback)


@pytest.mark.parametrize("missing", NAMESPACES)
def test_one_namespace_is_enough(missing: str, monkeypatch: Any) -> None:
    found = compat.importlib.util.find_spec
    root = missing.partition(".")[0]
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: None if name == root else found(name))
    (namespace,) = compat.installed_namespaces()
    assert namespace.__name__ != missing
    assert compat._callback_base().__bases__ == (namespace.Callback,)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_callback_base_works_in_each_trainer(tmp_path: Any, namespace: str) -> None:
    class Counts(compat.CallbackBase):
        calls = 0

        def on_train_batch_end(self, *args: Any) -> None:
            self.calls += 1

    for given in (callback := Counts()), [callback]:
        trainer(tmp_path, namespace, callbacks=given, max_steps=2).fit(simple_class(namespace)(), loader(), loader())
    assert callback.calls == 4


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_lightnings_classes_are_known_by_name_and_package(namespace: str) -> None:
    callbacks = lightning(f"{namespace}.callbacks")
    stopping = type("Patient", (callbacks.EarlyStopping,), {})("loss")
    assert compat.foreign_isinstance(stopping, "EarlyStopping")
    assert not compat.foreign_isinstance(stopping, "ModelCheckpoint")
    assert not compat.foreign_isinstance(type("EarlyStopping", (), {})(), "EarlyStopping")
    assert compat.is_lightnings_own(stopping)
    assert not compat.is_lightnings_own(type("Mine", (callbacks.Callback,), {})())


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_namespace_of_a_trainer(tmp_path: Any, namespace: str) -> None:
    running = trainer(tmp_path, namespace)
    assert compat.namespace_of(running) is lightning(namespace)
    assert compat.misconfiguration_exception(running).__module__ == f"{namespace}.utilities.exceptions" or issubclass(
        compat.misconfiguration_exception(running), Exception
    )
    with pytest.raises(
        EvaluationError, match=r"`trainer` must be a Trainer of pytorch_lightning or lightning.*got int"
    ):
        compat.namespace_of(3)


def test_messages_go_through_lightning(tmp_path: Any, caplog: Any) -> None:
    running = trainer(tmp_path)
    with caplog.at_level(logging.INFO):
        compat.rank_zero_info(running, "hello")
    assert "hello" in caplog.text
    with pytest.warns(UserWarning, match="careful"):
        compat.rank_zero_warn(running, "careful")


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_self_test_passes_here(tmp_path: Any, namespace: str) -> None:
    compat.check_lightning(trainer(tmp_path, namespace))


def test_self_test_names_release_and_attribute(tmp_path: Any, monkeypatch: Any) -> None:
    running = trainer(tmp_path)
    del running.validate_loop._max_batches
    version = pytorch_lightning.__version__
    with pytest.raises(
        EvaluationError, match=rf"pytorch_lightning {version} lacks `Trainer.validate_loop._max_batches`"
    ):
        compat.check_lightning(running)


def test_self_test_names_the_argument_of_the_loop(tmp_path: Any) -> None:
    running = trainer(tmp_path)
    loop = type(running.validate_loop)

    class _EvaluationLoop(loop):  # type: ignore[misc,valid-type] # the base is taken from the live object
        def __init__(self, trainer: Any, trainer_fn: Any, stage: Any, verbose: bool = True) -> None:
            super().__init__(trainer, trainer_fn, stage, verbose)

    like = running.validate_loop
    running.validate_loop = _EvaluationLoop(running, like._trainer_fn, like._stage)
    with pytest.raises(EvaluationError, match=r"lacks `_EvaluationLoop\(inference_mode=...\)`"):
        compat.check_lightning(running)


def test_silent_loggers_stand_in_for_each_logger(tmp_path: Any) -> None:
    loggers = [pytorch_lightning.loggers.CSVLogger(tmp_path, "a"), pytorch_lightning.loggers.CSVLogger(tmp_path, "b")]
    first, second = compat.silent_loggers(trainer(tmp_path, logger=loggers), "scratch")
    assert first.log_dir == second.save_dir == "scratch"
    second.experiment.add_image("tag", None)
    second.log_metrics({"a": 1.0}, step=0)
    assert not list(tmp_path.glob("**/metrics.csv"))


def test_batch_sizes(tmp_path: Any) -> None:
    running = trainer(tmp_path)
    (inputs, targets) = next(iter(loader()))
    assert compat.batch_size_of(running, {"name": "x", "nested": [inputs, targets]}) == 8
    assert compat.batch_size_of(running, object()) is None
    endless: list[Any] = []
    endless.append(endless)
    assert compat.batch_size_of(running, endless) is None


def test_kept_attributes_come_back_or_go_again() -> None:
    class Holder:
        pass

    holder = Holder()
    holder.old = 1  # type: ignore[attr-defined] # that is the point
    with compat.kept(holder, "old"), compat.kept(holder, "new"), compat.kept(holder, "never"):
        vars(holder).update(old=2, new=3)
    assert vars(holder) == {"old": 1}


def test_replaced_restores_after_an_error() -> None:
    class Holder:
        value = 1

    holder = Holder()

    def fail() -> None:
        with compat.replaced(holder, "value", 2):
            raise KeyError(holder.value)

    with pytest.raises(KeyError, match="2"):
        fail()
    assert holder.value == 1


@pytest.mark.parametrize(
    ("ckpt_path", "steps", "expected"), [(None, 2, True), ("some.ckpt", 2, False), (None, 0, False)]
)
def test_whether_a_fit_begins_with_a_sanity_check(tmp_path: Any, ckpt_path: Any, steps: int, expected: bool) -> None:
    answers: list[bool] = []

    class Asks(pytorch_lightning.Callback):
        def on_fit_start(self, running: Any, pl_module: Any) -> None:
            running.ckpt_path = ckpt_path
            answers.append(compat.will_sanity_check(running))
            running.ckpt_path = None

    running = trainer(tmp_path, callbacks=[Asks()], num_sanity_val_steps=steps, max_steps=1)
    running.fit(simple_class()(), loader(), loader())
    assert answers == [expected]


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_the_live_display_of_rich_is_found_while_it_is_open(tmp_path: Any, namespace: str) -> None:
    found: list[bool] = []
    bar = importlib.import_module(f"{namespace}.callbacks").RichProgressBar()
    look = calling(
        namespace, on_validation_end=lambda running, _: found.append(compat.live_progress(running) is not None)
    )
    running = trainer(tmp_path, namespace, callbacks=[look, bar], enable_progress_bar=True)
    running.validate(simple_class(namespace)(), loader(), verbose=False)
    assert found == [True]
    assert compat.live_progress(running) is None
    assert compat.live_progress(trainer(tmp_path, namespace)) is None

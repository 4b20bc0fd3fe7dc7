"""Each refusal says what is wrong and what to do, before or without harm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_quantdebug.errors import EvaluationError, SettingsError
from lightning_quantdebug.evaluation import Evaluator
from tests.torture import NAMESPACES, calling, lightning, loader, simple_class, trainer

pytestmark = pytest.mark.filterwarnings("ignore")


def refuses(match: str, monitor: str = "loss", error: type[Exception] = EvaluationError, **arguments: Any) -> Any:
    """A hook in which a pass is refused, while the fit goes on."""

    def hook(running: Any, pl_module: Any) -> None:
        with pytest.raises(error, match=match):
            Evaluator(running, pl_module, monitor).run(**arguments)
        running.refused = True

    return hook


def fit(
    tmp_path: Any, module: Any = None, train: Any = None, validation: Any = None, hooks: Any = None, **settings: Any
) -> Any:
    running = trainer(tmp_path, callbacks=[calling(**(hooks or {}))], max_epochs=1, **settings)
    running.fit(module or simple_class()(), train or loader(), validation or loader(30, 1))
    assert running.refused
    return running


@pytest.mark.parametrize(
    "hook",
    [
        "on_validation_start",
        "on_validation_epoch_start",
        "on_validation_batch_start",
        "on_validation_batch_end",
        "on_validation_epoch_end",
    ],
)
def test_no_pass_while_the_trainer_validates(tmp_path: Any, hook: str) -> None:
    match = "own validation is under way.*on_validation_end"
    fit(tmp_path, hooks={hook: refuses(match)})
    running = trainer(tmp_path, callbacks=[calling(**{hook: refuses(match)})])
    running.validate(simple_class()(), loader(30, 1), verbose=False)
    assert running.refused


def test_no_pass_outside_of_fit_and_validate(tmp_path: Any) -> None:
    class Module(simple_class()):  # type: ignore[misc] # the base is made at run time
        test_step = predict_step = lambda self, batch, batch_idx: None

    module, idle = Module(), trainer(tmp_path)
    with pytest.raises(EvaluationError, match=r"needs a Trainer inside `trainer.fit` or `trainer.validate`.*nothing"):
        Evaluator(idle, module, "loss").run()
    running = trainer(tmp_path, callbacks=[calling(on_test_end=refuses("but it runs `trainer.test`"))])
    running.test(module, loader(), verbose=False)
    assert running.refused


def test_missing_metric_lists_those_there_are(tmp_path: Any) -> None:
    fit(
        tmp_path,
        hooks={
            "on_train_epoch_end": refuses(
                r"monitor='acc'. is not available as a scalar.*any of the following: `accuracy`, `loss`, `mean_loss`",
                "acc",
            )
        },
    )


def test_nothing_logged_at_all(tmp_path: Any) -> None:
    class Module(simple_class()):  # type: ignore[misc] # the base is made at run time
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

        def on_validation_epoch_end(self) -> None:
            pass

    fit(tmp_path, Module(), hooks={"on_train_epoch_end": refuses("Validation logs no metric at all")})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_score_that_is_no_finite_number(tmp_path: Any, value: float) -> None:
    class Module(simple_class()):  # type: ignore[misc] # the base is made at run time
        def on_validation_epoch_end(self) -> None:
            self.log("strange", value)

    match = f"The score `strange` is {value}, where a finite number is needed"
    fit(tmp_path, Module(), hooks={"on_train_epoch_end": refuses(match, "strange")})


def test_metric_that_is_no_scalar(tmp_path: Any) -> None:
    import torchmetrics

    class Module(simple_class()):  # type: ignore[misc] # the base is made at run time
        def __init__(self) -> None:
            super().__init__()
            self.each = torchmetrics.classification.MulticlassAccuracy(3, average=None)

        def validation_step(self, batch: Any, batch_idx: int) -> Any:
            self.each.update(self(batch[0]), batch[1])
            self.log("each", self.each)
            return super().validation_step(batch, batch_idx)

    match = r"monitor='each'. is not available as a scalar"
    fit(tmp_path, Module(), hooks={"on_train_epoch_end": refuses(match, "each")})


def test_calibration_may_lack_the_metric(tmp_path: Any) -> None:
    scores: list[float] = []

    def hook(running: Any, pl_module: Any) -> None:
        scores.append(Evaluator(running, pl_module, "unheard").run(loader="train").score)

    trainer(tmp_path, callbacks=[calling(on_train_epoch_end=hook)]).fit(simple_class()(), loader(), loader(30, 1))
    assert torch.tensor(scores).isnan().all()


@pytest.mark.parametrize(
    ("collection", "name"), [(lambda: {"a": loader(), "b": loader()}, "dict"), (lambda: [loader(), loader()], "list")]
)
def test_structured_training_loaders(tmp_path: Any, collection: Any, name: str) -> None:
    class Module(simple_class()):  # type: ignore[misc] # the base is made at run time
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch["a"] if isinstance(batch, dict) else batch[0], batch_idx)

    refusal = refuses(f'training loaders are a {name}.*Pass `calibration="val"` or a DataLoader', loader="train")
    fit(tmp_path, Module(), collection(), hooks={"on_train_epoch_end": refusal})


def test_no_training_loader_in_validate(tmp_path: Any) -> None:
    refusal = refuses("There is no training DataLoader to calibrate on.*Pass `calibration", loader="train")
    running = trainer(tmp_path, callbacks=[calling(on_validation_end=refusal)])
    running.validate(simple_class()(), loader(30, 1), verbose=False)
    assert running.refused


def test_training_loader_that_was_never_set_up(tmp_path: Any) -> None:
    class Data(lightning().LightningDataModule):  # type: ignore[misc] # the base is chosen at run time
        def setup(self, stage: str) -> None:
            if stage == "fit":
                self.train = loader()

        def train_dataloader(self) -> Any:
            return self.train

        def val_dataloader(self) -> Any:
            return loader(30, 1)

    refusal = refuses("`train_dataloader` failed outside of a fit .AttributeError: .*'train'", loader="train")
    running = trainer(tmp_path, callbacks=[calling(on_validation_end=refusal)])
    running.validate(simple_class()(), Data(), verbose=False)
    assert running.refused


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"loader": "test"}, "`loader` must be None, 'train' or a DataLoader, got 'test'"),
        ({"loader": 3}, "`loader` must be None, 'train' or a DataLoader, got 3"),
        ({"loader": {}}, "`loader` must be None, 'train' or a DataLoader, got {}"),
        ({"limit": 0}, "`limit` must be a number of batches.*got 0"),
        ({"limit": 1.5}, "`limit` must be a number of batches.*got 1.5"),
        ({"limit": True}, "`limit` must be a number of batches.*got True"),
    ],
)
def test_arguments_of_run(tmp_path: Any, arguments: dict[str, Any], match: str) -> None:
    fit(tmp_path, hooks={"on_train_epoch_end": refuses(match, error=SettingsError, **arguments)})


def test_limit_of_batches_is_checked_when_made(tmp_path: Any) -> None:
    with pytest.raises(SettingsError, match=r"`limit_batches` must be a number of batches.*got 0.0"):
        Evaluator(trainer(tmp_path), simple_class()(), "loss", limit_batches=0.0)


def test_loader_without_batches(tmp_path: Any) -> None:
    fit(tmp_path, hooks={"on_train_epoch_end": refuses("The given DataLoader has no batches", loader=[])})


def checked(running: Any, module: Any) -> None:
    Evaluator(running, module, "loss").check()


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_check_accepts_an_ordinary_trainer(tmp_path: Any, namespace: str) -> None:
    calls: list[Any] = []

    def hook(running: Any, pl_module: Any) -> None:
        checked(running, pl_module)
        calls.append(running.state.fn)

    running = trainer(tmp_path, namespace, callbacks=[calling(namespace, setup=hook)], fast_dev_run=True)
    module = simple_class(namespace)()
    running.fit(module, loader(), loader())
    running.validate(module, loader(), verbose=False)
    assert calls == ["fit", "validate"]


def test_check_barebones(tmp_path: Any) -> None:
    running = lightning().Trainer(barebones=True, accelerator="cpu", max_epochs=1)
    with pytest.raises(EvaluationError, match=r"`Trainer\(barebones=True\)` logs no metrics. Remove"):
        checked(running, simple_class()())


def test_check_no_validation_step(tmp_path: Any) -> None:
    class Module(lightning().LightningModule):  # type: ignore[misc] # the base is chosen at run time
        pass

    with pytest.raises(
        EvaluationError, match="`Module` has no `validation_step`, which is what gives the score `loss`"
    ):
        checked(trainer(tmp_path), Module())


def test_check_step_that_fetches_its_batches(tmp_path: Any) -> None:
    class Module(lightning().LightningModule):  # type: ignore[misc] # the base is chosen at run time
        def validation_step(self, dataloader_iter: Any) -> None:
            pass

    with pytest.raises(EvaluationError, match=r"dataloader_iter.* is not supported: batches must be seen one by one"):
        checked(trainer(tmp_path), Module())


@pytest.mark.parametrize("limit", [0, 0.0])
def test_check_validation_turned_off(tmp_path: Any, limit: float) -> None:
    with pytest.raises(EvaluationError, match=r"`Trainer\(limit_val_batches=0\)` turns validation off"):
        checked(trainer(tmp_path, limit_val_batches=limit), simple_class()())


def test_check_no_validation_loader(tmp_path: Any) -> None:
    def hook(running: Any, pl_module: Any) -> None:
        with pytest.raises(EvaluationError, match=r"no validation DataLoader. Define `val_dataloader`"):
            checked(running, pl_module)
        running.refused = True

    running = trainer(tmp_path, callbacks=[calling(on_train_start=hook)])
    running.fit(simple_class()(), loader())
    assert running.refused


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("name", ["FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"])
def test_check_strategies_by_name(tmp_path: Any, namespace: str, name: str, monkeypatch: Any) -> None:
    running = trainer(tmp_path, namespace)
    refused = getattr(lightning(f"{namespace}.strategies"), name)
    stand_in = type("Mine", (refused,), {"__init__": lambda self: None, "precision_plugin": None})()
    monkeypatch.setattr(running._accelerator_connector, "strategy", stand_in)
    with pytest.raises(EvaluationError, match=rf"`Trainer\(strategy=...\)` uses {name}, which is not supported"):
        checked(running, simple_class(namespace)())


def test_check_precision_by_name(tmp_path: Any, monkeypatch: Any) -> None:
    running = trainer(tmp_path)
    refused = lightning("pytorch_lightning.plugins").BitsandbytesPrecision
    stand_in = type("Mine", (refused,), {"__init__": lambda self: None})()
    monkeypatch.setattr(running.strategy, "_precision_plugin", stand_in)
    with pytest.raises(EvaluationError, match=r"`Trainer\(precision=...\)` uses BitsandbytesPrecision"):
        checked(running, simple_class()())


def test_user_error_in_the_step_is_the_users(tmp_path: Any) -> None:
    class Module(simple_class()):  # type: ignore[misc] # the base is made at run time
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return nn.functional.cross_entropy(self(batch["x"]), batch["y"])

    class Pairs(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> Any:
            return dict(zip("xy", loader(8).dataset[index], strict=True))

    train = torch.utils.data.DataLoader(Pairs(), batch_size=4)
    fit(tmp_path, Module(), train, hooks={"on_train_epoch_end": refuses("0", error=KeyError, loader="train")})

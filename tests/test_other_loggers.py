"""Pictures and text reach the loggers that have a place for them, by calls that Lightning's own classes take."""

from __future__ import annotations

import inspect
import io
from pathlib import Path
from typing import Any

import lightning.pytorch
import numpy as np
import pytest
import pytorch_lightning
from PIL import Image

from lightning_quantdebug.other_loggers import is_logger, write_media

PICTURE = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
PICTURES, TEXTS = {"quantdebug/pictures/1_flow_chart": PICTURE}, {"quantdebug/report": "# Quantization"}


def made_of(base: type, **members: Any) -> Any:
    """An object of a class derived from one of Lightning's, made without the service behind it."""
    return object.__new__(type("Mine", (base,), members))


@pytest.mark.parametrize("package", [pytorch_lightning, lightning.pytorch])
def test_wandb_gets_media_panels_and_tables(package: Any) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []
    base = package.loggers.WandbLogger

    def method(name: str) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> None:
            bound = inspect.signature(getattr(base, name)).bind(self, *args, **kwargs)
            calls.append((name, {key: value for key, value in bound.arguments.items() if key != "self"}))

        return call

    write_media(made_of(base, log_image=method("log_image"), log_text=method("log_text")), PICTURES, TEXTS)
    (image, of_image), (text, of_text) = calls
    assert (image, of_image["key"]) == ("log_image", "quantdebug/pictures/1_flow_chart")
    (drawn,) = of_image["images"]
    assert drawn is PICTURE
    assert (text, of_text) == (
        "log_text",
        {"key": "quantdebug/report", "columns": ["markdown"], "data": [["# Quantization"]]},
    )


class Client:
    """The methods of ``mlflow.MlflowClient`` that are used, with their documented signatures."""

    def __init__(self) -> None:
        self.files: dict[str, Any] = {}

    def log_image(self, run_id: str, image: Any, artifact_file: str | None = None) -> None:
        assert artifact_file is not None
        self.files[artifact_file] = (run_id, image)

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        self.files[artifact_file] = (run_id, text)


@pytest.mark.parametrize("package", [pytorch_lightning, lightning.pytorch])
def test_mlflow_gets_artifacts(package: Any) -> None:
    client = Client()
    logger = made_of(package.loggers.MLFlowLogger, experiment=client, run_id="run")
    write_media(logger, PICTURES, TEXTS)
    assert set(client.files) == {"quantdebug/pictures/1_flow_chart.png", "quantdebug/report.md"}
    run, image = client.files["quantdebug/pictures/1_flow_chart.png"]
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    np.testing.assert_array_equal(np.asarray(Image.open(buffer)), PICTURE)
    assert (run, client.files["quantdebug/report.md"]) == ("run", ("run", "# Quantization"))


def test_a_logger_without_a_place_for_them_is_left_alone(tmp_path: Path) -> None:
    logger = pytorch_lightning.loggers.CSVLogger(tmp_path)
    write_media(logger, PICTURES, TEXTS)
    assert list(tmp_path.iterdir()) == []
    write_media(object(), PICTURES, TEXTS)


def test_a_class_is_known_by_its_name_and_its_package() -> None:
    foreign = type("WandbLogger", (), {"__module__": "somewhere.else"})()
    assert not is_logger(foreign, "WandbLogger")
    assert is_logger(made_of(pytorch_lightning.loggers.WandbLogger), "WandbLogger")
    write_media(foreign, PICTURES, TEXTS)

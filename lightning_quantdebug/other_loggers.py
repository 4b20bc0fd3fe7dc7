"""Pictures and text for loggers other than TensorBoard's, where they have a place for them.

Each logger's own methods are called, as Lightning documents them. A logger that is not known gets the scalars alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

_LIGHTNING_PACKAGES = ("pytorch_lightning", "lightning", "lightning_fabric")


def is_logger(logger: object, name: str) -> bool:
    """Whether a logger is of a class of Lightning's, or derived from it, in whichever namespace.

    Args:
        logger: Any member of ``trainer.loggers``.
        name: Name of the class, such as ``"TensorBoardLogger"``.

    Examples:
        >>> is_logger(object(), "TensorBoardLogger")
        False
    """
    return any(
        base.__name__ == name and base.__module__.split(".")[0] in _LIGHTNING_PACKAGES for base in type(logger).__mro__
    )


def write_media(logger: Any, pictures: Mapping[str, np.ndarray], texts: Mapping[str, str]) -> None:
    """Give a logger the pictures and the texts, if it has a place for them.

    Args:
        logger: A member of ``trainer.loggers``: those of W&B and MLflow are known.
        pictures: Pixels ``(H, W, 3)``, uint8, by their tags.
        texts: Markdown by its tag.

    Examples:
        >>> write_media(object(), {}, {"report": "# Quantization"})  # a logger without a place for it
    """
    if is_logger(logger, "WandbLogger"):
        _to_wandb(logger, pictures, texts)
    elif is_logger(logger, "MLFlowLogger"):
        _to_mlflow(logger, pictures, texts)


def _to_wandb(logger: Any, pictures: Mapping[str, np.ndarray], texts: Mapping[str, str]) -> None:
    """Pictures as media panels, texts as tables of one cell."""
    for tag, picture in pictures.items():
        logger.log_image(key=tag, images=[picture])
    for tag, text in texts.items():
        logger.log_text(key=tag, columns=["markdown"], data=[[text]])


def _to_mlflow(logger: Any, pictures: Mapping[str, np.ndarray], texts: Mapping[str, str]) -> None:
    """Both as artifacts of the run."""
    client, run = logger.experiment, logger.run_id
    for tag, picture in pictures.items():
        client.log_image(run, Image.fromarray(picture), artifact_file=f"{tag}.png")
    for tag, text in texts.items():
        client.log_text(run, text, f"{tag}.md")

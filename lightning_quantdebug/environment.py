"""What surrounds a walk: versions, device, seed."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch


def environment(root: torch.nn.Module, seed: int) -> dict[str, Any]:
    """Versions, device and seed of the walk."""
    packages = ("lightning-quantdebug", "torch", "pytorch-lightning", "lightning", "torchmetrics", "numpy")
    versions = {name: version for name in packages if (version := _version(name)) is not None}
    device = next((parameter.device for parameter in root.parameters()), torch.device("cpu"))
    return {
        "versions": versions,
        "python": platform.python_version(),
        "device": str(device),
        "seed": seed,
        "threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None

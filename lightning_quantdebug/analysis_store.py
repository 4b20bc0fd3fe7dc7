"""What the per-quantizer analysis has measured, on disk, so that a run that was killed goes on where it was.

The file belongs to one network, one setting of the quantizers, and one order of the data: a key is made of all of them,
and a file with another key is not used.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_quantdebug.adjustment import Adjustment
from lightning_quantdebug.evaluation import Evaluation
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.measurement import Measurement
from lightning_quantdebug.rank_agreement import from_rank_zero, is_rank_zero
from lightning_quantdebug.report import write_atomically
from lightning_quantdebug.settings import Settings

VERSION = 1
# Values that are hashed at once.
_PIECE = 2**20
# Settings that change what is measured; the others say how much of it, how long, or where it is written.
_MEASURED_BY = ("monitor", "mode", "target", "module", "exclude", "limit_batches")


def analysis_key(session: Instrumentation, settings: Settings, reference: Evaluation) -> str:
    """A hash of everything that the measured numbers depend on.

    Args:
        session: The network with its quantizers as they are analysed: weights, encodings, what remedies have changed.
        settings: The settings of the walk.
        reference: FP32, whose value on each batch stands for the data and its order.
    """
    digest = hashlib.sha256(f"{VERSION} {torch.__version__}".encode())
    plain = settings.to_dict()
    digest.update(json.dumps({name: plain[name] for name in _MEASURED_BY}, sort_keys=True).encode())
    for name, tensor in sorted(session.tensors.items()):
        _hash(digest, name, tensor)
    for name, quantizer in session.quantizers.items():
        digest.update(f"{name} {quantizer.spec}".encode())
        if quantizer.encoding is not None:
            _hash(digest, "scale", quantizer.encoding.scale)
            _hash(digest, "zero_point", quantizer.encoding.zero_point)
    names = {key: name for name, key in session.keys_by_name.items()}
    for key, adjustment in session.adjustments.items():
        digest.update(names[key].encode())
        _hash_adjustment(digest, adjustment)
    batches = [(batch.value, batch.weight) for batch in reference.batches or ()]
    digest.update(repr((reference.score, sorted(reference.metrics.items()), batches, reference.samples)).encode())
    return digest.hexdigest()


def _hash(digest: Any, name: str, tensor: Tensor) -> None:
    """Add a tensor: its name, form and bytes."""
    if is_lazy(tensor):
        return
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    hash_bytes(digest, tensor)


def hash_bytes(digest: Any, tensor: Tensor) -> None:
    """Add the bytes of a tensor, of which a small copy at a time is made.

    ``numpy()`` of the tensor itself would leave it with memory that can not be resized any more, as the observers of
    ``torch.ao`` do with their buffers.
    """
    flat = tensor.detach().contiguous().reshape(-1)
    for piece in torch.split(flat, _PIECE) if tensor.numel() else ():
        digest.update(piece.to("cpu", copy=True).view(torch.uint8).numpy().data)


def _hash_adjustment(digest: Any, adjustment: Adjustment) -> None:
    """Add what remedies have changed of one operation."""
    for item in fields(adjustment):
        value = getattr(adjustment, item.name)
        if isinstance(value, Tensor):
            _hash(digest, item.name, value)
        elif value is not None:
            digest.update(f"{item.name} {value}".encode())


class AnalysisStore:
    """Measurements by table and quantizer, written after each group of them.

    Args:
        path: The file; ``None``: nothing is written, and nothing is found.
        key: See :func:`analysis_key`.

    Examples:
        >>> AnalysisStore(None, "key").found("alone")
        {}
    """

    def __init__(self, path: Path | None, key: str) -> None:
        """Read what is there under this key; of several ranks the first one reads and writes for all."""
        self._path = path if is_rank_zero() else None
        self._key = key
        found = _read(self._path, key) if self._path is not None and self._path.exists() else {}
        self._tables: dict[str, dict[str, Measurement]] = from_rank_zero(found)

    def found(self, table: str) -> dict[str, Measurement]:
        """What was measured already, by the name of the quantizer."""
        return dict(self._tables.get(table, {}))

    def add(self, table: str, measurements: Mapping[str, Measurement]) -> None:
        """Keep measurements.

        Raises:
            ReportError: If the file can not be written.
        """
        self._tables.setdefault(table, {}).update(measurements)
        if self._path is None:
            return
        plain = {table: {name: asdict(one) for name, one in entries.items()} for table, entries in self._tables.items()}
        write_atomically(self._path, json.dumps({"version": VERSION, "key": self._key, "tables": plain}))


def _read(path: Path, key: str) -> dict[str, dict[str, Measurement]]:
    """The tables of a file with this key; a file of another run, version or format holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION or content["key"] != key:
            return {}
        return {
            table: {name: _measurement_of(values) for name, values in entries.items()}
            for table, entries in content["tables"].items()
        }
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _measurement_of(values: dict[str, Any]) -> Measurement:
    """One measurement from plain values."""
    interval = values["interval"]
    return Measurement(**{**values, "interval": None if interval is None else (interval[0], interval[1])})

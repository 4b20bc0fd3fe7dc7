"""What a reviewer sees in TensorBoard: scores and losses of the steps, the report, the ranges, and the histograms.

Everything goes to the user's own TensorBoardLogger where the Trainer has one, so that it stands beside their curves,
else to event files of our own. The Trainer's other loggers get the scalars. TensorBoard's Text dashboard removes HTML
and its Histogram dashboard draws 30 buckets at most, so text is Markdown and streamed histograms of thousands of bins
are condensed before they are written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from lightning_quantdebug.errors import ReportError
from lightning_quantdebug.observer import Histogram
from lightning_quantdebug.quantizer_tables import sensitivity_table
from lightning_quantdebug.report import QuantizerSetting, Report
from lightning_quantdebug.report_markdown import ranges_table, to_markdown
from lightning_quantdebug.target import Kind

# TensorBoard draws 30 buckets; four times as many keep its own re-binning smooth and an event at about 2 kB.
MAX_BUCKETS = 128

_LIGHTNING_PACKAGES = ("pytorch_lightning", "lightning", "lightning_fabric")
_FOLDERS = {Kind.WEIGHT: "weights", Kind.ACTIVATION: "activations"}


def is_tensorboard_logger(logger: object) -> bool:
    """Whether a logger is Lightning's TensorBoardLogger or derived from it, in whichever namespace.

    Args:
        logger: Any member of ``trainer.loggers``.

    Examples:
        >>> is_tensorboard_logger(object())
        False
    """
    return any(
        base.__name__ == "TensorBoardLogger" and base.__module__.split(".")[0] in _LIGHTNING_PACKAGES
        for base in type(logger).__mro__
    )


def condense(histogram: Histogram, max_buckets: int = MAX_BUCKETS) -> dict[str, Any] | None:
    """The arguments of ``SummaryWriter.add_histogram_raw`` for a streamed histogram.

    Empty bins at both ends are left out and neighbouring bins are added up; no count is lost or moved across the edge
    of a bucket.

    Args:
        histogram: Counts (``(bins,)``, int64) of equal bins between ``range_min`` and ``range_max``.
        max_buckets: Most buckets to keep.

    Returns:
        ``min``, ``max``, ``num``, ``sum``, ``sum_squares`` (both of the bins' centres), ``bucket_limits`` (right
        edges) and ``bucket_counts``; or ``None`` where nothing was counted.
    """
    counts = histogram.counts.detach().cpu().double()
    filled = counts.nonzero().flatten()
    if filled.numel() == 0:
        return None
    first, stop = int(filled[0]), int(filled[-1]) + 1
    width = (histogram.range_max - histogram.range_min) / counts.numel()
    edges = histogram.range_min + width * torch.arange(first, stop + 1, dtype=torch.float64)
    inside = counts[first:stop]
    centres = (edges[:-1] + edges[1:]) / 2
    merged = -(-inside.numel() // max_buckets)
    padded = torch.nn.functional.pad(inside, (0, -inside.numel() % merged))
    limits = [*edges[merged:-1:merged].tolist(), float(edges[-1])]
    return {
        "min": float(edges[0]),
        "max": float(edges[-1]),
        "num": int(inside.sum()),
        "sum": float((inside * centres).sum()),
        "sum_squares": float((inside * centres**2).sum()),
        "bucket_limits": limits,
        "bucket_counts": padded.reshape(-1, merged).sum(dim=1).tolist(),
    }


class ReviewWriter:
    """Writes a walk to TensorBoard and the scalars to the Trainer's other loggers, on rank zero.

    Nothing is created before the first write. The user's own writer is flushed and never closed.

    Args:
        trainer: The user's Trainer, or ``None``.
        dirpath: Where our own event files go if the Trainer has no TensorBoardLogger.
        prefix: First part of every tag.

    Raises:
        ReportError: On the first write, if the directory can not be written.

    Examples:
        >>> import tempfile
        >>> from lightning_quantdebug.report import Report
        >>> with tempfile.TemporaryDirectory() as folder, ReviewWriter(None, folder) as writer:
        ...     writer.write_report(Report(), step=0)
    """

    def __init__(self, trainer: Any, dirpath: str | Path, prefix: str = "quantdebug") -> None:
        """Find the loggers."""
        self.prefix = prefix
        self.rank_zero = trainer is None or bool(trainer.is_global_zero)
        loggers = [] if trainer is None else list(trainer.loggers)
        self._logger = next((logger for logger in loggers if is_tensorboard_logger(logger)), None)
        self._others = [logger for logger in loggers if logger is not self._logger]
        self._dirpath = Path(dirpath)
        self._own: SummaryWriter | None = None

    def __enter__(self) -> ReviewWriter:
        """Use it as a context manager."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close our own event file."""
        self.close()

    @property
    def log_dir(self) -> str:
        """Directory of the event files, for ``tensorboard --logdir``."""
        return str(self._dirpath if self._logger is None else self._logger.log_dir)

    def write_report(self, report: Report, step: int) -> None:
        """Write score and loss of each step, the report as a page, and the table of ranges.

        Args:
            report: The report; a step that ran twice is written as it ran last.
            step: Global step of the training run.
        """
        scalars: dict[str, float] = {}
        for item in report.steps:
            for word, value in (("score", item.score), ("loss", item.loss)):
                if value is not None:
                    scalars[f"{self.prefix}/{word}/{item.step.value}"] = value
        self._write_scalars(scalars, step)
        self._write_text(f"{self.prefix}/report", to_markdown(report), step)
        if report.sensitivity:
            self._write_text(f"{self.prefix}/table_of_quantizers", sensitivity_table(report.sensitivity), step)
        if report.final.settings:
            self.write_ranges(report.final.settings.values(), step)

    def write_watch(self, monitor: str, score: float, step: int) -> None:
        """Write what the score would be if the model were quantized now."""
        self._write_scalars({f"{self.prefix}/watch/{monitor}": score}, step)

    def write_training(self, monitor: str, score: float, step: int) -> None:
        """Write the quantized score after an epoch of QAT."""
        self._write_scalars({f"{self.prefix}/qat/{monitor}": score}, step)

    def write_ranges(self, settings: Iterable[QuantizerSetting], step: int) -> None:
        """Write the table of every quantizer's observed values, clipping range and grid."""
        self._write_text(f"{self.prefix}/table_of_ranges", ranges_table(settings), step)

    def write_histograms(self, histograms: Mapping[str, Histogram], kind: Kind, step: int) -> None:
        """Write the histogram of each quantizer's tensor.

        Args:
            histograms: Streamed histograms by the quantizer's name; one that counted nothing is left out.
            kind: Whether the tensors are weights or activations.
            step: Global step of the training run.
        """
        if not self.rank_zero:
            return
        writer = self._writer()
        for name, histogram in histograms.items():
            raw = condense(histogram)
            if raw is not None:
                writer.add_histogram_raw(f"{self.prefix}/{_FOLDERS[kind]}/{name}", global_step=step, **raw)
        writer.flush()

    def close(self) -> None:
        """Close our own event file; the user's stays open. Calling it again does nothing."""
        if self._own is not None:
            self._own.close()
            self._own = None

    def _write_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Scalars to TensorBoard and to every other logger."""
        if not self.rank_zero or not scalars:
            return
        writer = self._writer()
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, step)
        writer.flush()
        for logger in self._others:
            logger.log_metrics(dict(scalars), step=step)

    def _write_text(self, tag: str, text: str, step: int) -> None:
        """A page for the Text dashboard."""
        if self.rank_zero:
            writer = self._writer()
            writer.add_text(tag, text, step)
            writer.flush()

    def _writer(self) -> Any:
        """The user's writer, or our own, opened when it is first needed."""
        try:
            if self._logger is not None:
                return self._logger.experiment
            if self._own is None:
                self._own = SummaryWriter(str(self._dirpath))
        except OSError as error:
            raise ReportError(
                f"Can not write TensorBoard events to {self.log_dir!r}: {error}. Give `dirpath`, or the "
                "TensorBoardLogger's `save_dir`, a writable directory."
            ) from error
        return self._own

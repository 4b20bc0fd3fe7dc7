"""What a reviewer sees in TensorBoard: page, pictures, scalars and histograms of a walk, and a row of hyperparameters.

Everything goes to the user's own TensorBoardLogger where the Trainer has one, so that it stands beside their curves,
else to event files of our own. The row of hyperparameters and the layout of the custom scalars, of which a run can have
one each, go to a run of our own beneath theirs, so that none of theirs is replaced. The Trainer's other loggers get the
scalars, and pictures and text where they have a place for them (:mod:`~lightning_quantdebug.other_loggers`).

TensorBoard's Text dashboard removes HTML, its Histogram dashboard draws 30 buckets and its Image dashboard shows a
picture about 400 pixels wide. So text is Markdown, and what matters is drawn as a picture.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from lightning_quantdebug.errors import ReportError
from lightning_quantdebug.other_loggers import is_logger, write_media
from lightning_quantdebug.quantizer_tables import sensitivity_table
from lightning_quantdebug.report import Report, Step, StepName
from lightning_quantdebug.report_markdown import ranges_table, to_markdown, walked
from lightning_quantdebug.review_data import good
from lightning_quantdebug.short_names import short_names
from lightning_quantdebug.target import Kind
from lightning_quantdebug.visuals import TensorState, TensorView

PLACES = {name.value: place for place, name in enumerate(StepName)}
"""Place of each step in the flow chart: the horizontal axis of what is shown over the walk."""

MOST_OF_A_TAG = 120
"""Characters of a name in a tag: TensorBoard wraps a tag, and two lines of it are enough."""


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
        self._logger = next((logger for logger in loggers if is_logger(logger, "TensorBoardLogger")), None)
        self._others = [logger for logger in loggers if logger is not self._logger]
        self._dirpath = Path(dirpath)
        self._own: SummaryWriter | None = None
        self._beneath: SummaryWriter | None = None

    def __enter__(self) -> ReviewWriter:
        """Use it as a context manager."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close our own event files."""
        self.close()

    @property
    def log_dir(self) -> str:
        """Directory of the event files, for ``tensorboard --logdir``."""
        return str(self._dirpath if self._logger is None else self._logger.log_dir)

    def write_report(self, report: Report, step: int) -> None:
        """Write all that a review shows.

        Args:
            report: The report; a step that ran twice is written as it ran last.
            step: Global step of the training run.
        """
        if not self.rank_zero:
            return
        self._write_scalars(step_scalars(report, self.prefix), step)
        texts, tensors = self._texts(report), self._tags_of_tensors(report)
        for tag, text in texts.items():
            self._writer().add_text(tag, text, step)
        pictures = self._pictures(report, tensors)
        for tag, picture in pictures.items():
            self._writer().add_image(tag, picture, step, dataformats="HWC")
        self._write_walk(report)
        for view in report.visuals.tensors:
            self._write_histograms(view, tensors[view.quantizer])
        self._write_row(report)
        self._writer().flush()
        for logger in self._others:
            write_media(logger, pictures, texts)

    def write_watch(self, monitor: str, score: float, step: int) -> None:
        """Write what the score would be if the model were quantized now."""
        self._write_scalars({f"{self.prefix}/watch/{monitor}": score}, step)

    def write_training(self, monitor: str, score: float, step: int) -> None:
        """Write the quantized score after an epoch of QAT."""
        self._write_scalars({f"{self.prefix}/qat/{monitor}": score}, step)

    def close(self) -> None:
        """Close our own event files; the user's stays open. Calling it again does nothing."""
        for writer in (self._own, self._beneath):
            if writer is not None:
                writer.close()
        self._own = self._beneath = None

    # The parts.

    def _texts(self, report: Report) -> dict[str, str]:
        """The pages of the Text dashboard."""
        texts = {f"{self.prefix}/report": to_markdown(report)}
        if report.sensitivity:
            texts[f"{self.prefix}/table_of_quantizers"] = sensitivity_table(report.sensitivity)
        if report.final.settings:
            texts[f"{self.prefix}/table_of_ranges"] = ranges_table(report.final.settings.values())
        return texts

    def _pictures(self, report: Report, tensors: Mapping[str, str]) -> dict[str, np.ndarray]:
        """Every picture as ``(H, W, 3)`` uint8, the overview first."""
        # What draws takes longer to import than the rest of this package.
        from lightning_quantdebug import figures, tensor_figures
        from lightning_quantdebug.figure_style import pixels

        drawn = {
            f"{self.prefix}/pictures/{place}_{name}": pixels(figure)
            for place, (name, figure) in enumerate(figures.overview(report).items(), 1)
        }
        for view in report.visuals.tensors:
            for name, figure in tensor_figures.of_tensor(view).items():
                drawn[f"{tensors[view.quantizer]}/{name}"] = pixels(figure)
        return drawn

    def _tags_of_tensors(self, report: Report) -> dict[str, str]:
        """First parts of the tags of each tensor, in a group of their own; different tensors have different tags."""
        group, _, label = self.prefix.partition("/")
        first = "/".join(part for part in (f"{group}_tensors", label) if part)
        tags: dict[str, str] = {}
        for view in report.visuals.tensors:
            tag = f"{first}/{safe_tag(view.quantizer)}"
            tags[view.quantizer] = tag if tag not in tags.values() else f"{tag}_{len(tags)}"
        return tags

    def _write_walk(self, report: Report) -> None:
        """Scores over the steps of the walk, and what each quantizer costs over the depth of the network."""
        writer = self._writer()
        for item in walked(report):
            for word, number in walk_scalars(item).items():
                writer.add_scalar(f"{self.prefix}/walk/{word}", number, PLACES[item.step.value])
        depths = {name: depth for depth, name in enumerate(report.coverage.quantized)}
        for row in report.sensitivity:
            for word, value in (("sqnr_db", row.sqnr_db), ("loss", row.loss)):
                if value is not None and row.quantizer in depths:
                    writer.add_scalar(f"{self.prefix}/sensitivity/{row.kind}_{word}", value, depths[row.quantizer])

    def _write_histograms(self, view: TensorView, first: str) -> None:
        """The values of one tensor in FP32 and quantized, over the steps of the walk."""
        for state in view.states:
            for word, counts in (("fp32", state.fp32), ("quantized", state.quantized)):
                raw = raw_histogram(state, counts)
                self._writer().add_histogram_raw(f"{first}/{word}", global_step=PLACES[state.step], **raw)

    def _write_row(self, report: Report) -> None:
        """A row of hyperparameters and outcome, and the layout of the custom scalars, in a run beneath the user's."""
        if report.verdict is None:
            return
        writer = self._writer_beneath()
        outcome = outcome_of(report)
        for summary in hparams(settings_of(report), outcome):  # type: ignore[no-untyped-call] # torch has no types here
            writer._get_file_writer().add_summary(summary)
        for tag, value in outcome.items():
            writer.add_scalar(tag, value, 0)
        writer.add_custom_scalars(layout(report, self.prefix))
        writer.flush()

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

    # The files.

    def _writer(self) -> Any:
        """The user's writer, or our own, opened when it is first needed."""
        if self._logger is not None:
            return self._opened(lambda: self._logger.experiment)
        if self._own is None:
            self._own = self._opened(lambda: SummaryWriter(str(self._dirpath)))
        return self._own

    def _writer_beneath(self) -> Any:
        """The writer of a run beneath the user's; our own, where the user has none."""
        if self._logger is None:
            return self._writer()
        if self._beneath is None:
            self._beneath = self._opened(lambda: SummaryWriter(str(Path(self.log_dir, self.prefix))))
        return self._beneath

    def _opened(self, make: Any) -> Any:
        """What ``make`` opens."""
        try:
            return make()
        except OSError as error:
            raise ReportError(
                f"Can not write TensorBoard events to {self.log_dir!r}: {error}. Give `dirpath`, or the "
                "TensorBoardLogger's `save_dir`, a writable directory."
            ) from error


def safe_tag(name: str) -> str:
    """A name as one part of a tag: printable, without a slash, and not too long to be read.

    Examples:
        >>> safe_tag("blocks.0.add@1"), safe_tag("a/b")
        ('blocks.0.add@1', 'a_b')
    """
    return short_names([name], MOST_OF_A_TAG)[name].replace("/", "_")


def step_scalars(report: Report, prefix: str) -> dict[str, float]:
    """Score and loss of each step, the last one where it ran twice, and score of each exported file, by their tags."""
    steps = {
        f"{prefix}/{word}/{item.step.value}": value
        for item in report.steps
        for word, value in (("score", item.score), ("loss", item.loss))
        if value is not None
    }
    exports = report.final.exports
    return steps | {f"{prefix}/export/{item.name}": item.score for item in exports if item.score is not None}


def walk_scalars(step: Step) -> dict[str, float]:
    """Score, and the loss with its interval where it is known: a chart of margins must have all three everywhere."""
    values = {} if step.score is None else {"score": step.score}
    if step.loss is None or step.interval is None or None in step.interval:
        return values
    return {**values, "loss": step.loss, "loss_low": step.interval[0], "loss_high": step.interval[1]}


def raw_histogram(state: TensorState, counts: Iterable[int]) -> dict[str, Any]:
    """The arguments of ``SummaryWriter.add_histogram_raw`` for one histogram; sums are those of the bins' centres.

    Examples:
        >>> from types import SimpleNamespace
        >>> raw = raw_histogram(SimpleNamespace(edges=(0.0, 1.0, 2.0)), (3, 1))
        >>> raw["bucket_limits"], raw["bucket_counts"], raw["num"], raw["sum"]
        ([1.0, 2.0], [3, 1], 4, 3.0)
    """
    edges, values = np.asarray(state.edges, dtype=float), np.asarray(list(counts), dtype=float)
    centres = (edges[:-1] + edges[1:]) / 2
    return {
        "min": float(edges[0]),
        "max": float(edges[-1]),
        "num": int(values.sum()),
        "sum": float(values @ centres),
        "sum_squares": float(values @ centres**2),
        "bucket_limits": edges[1:].tolist(),
        "bucket_counts": values.astype(int).tolist(),
    }


def settings_of(report: Report) -> dict[str, str | float | bool]:
    """The settings and the verdict as hyperparameters, plain values alone.

    TensorBoard sorts their names and shows the first five until the user chooses others, capitals first.
    """
    target = report.settings.get("target")
    parts = target if isinstance(target, Mapping) else {"name": target}
    row = {
        "Target": parts.get("name"),
        "Tolerance": report.settings.get("tolerance"),
        "Verdict": None if report.verdict is None else report.verdict.value,
    }
    for kind in Kind:
        row |= {f"{name}.{kind.value}": value for name, value in _fields(parts, kind).items()}
    row |= {f"settings.{name}": value for name, value in report.settings.items() if name not in ("target", "tolerance")}
    return {
        name: value if isinstance(value, (bool, int, float)) else _as_text(value)
        for name, value in row.items()
        if value is not None
    }


def _fields(target: Mapping[str, Any], kind: Kind) -> Mapping[str, Any]:
    """The fields of a target's grid for weights or activations."""
    found = target.get(f"{kind.value}s")
    return found if isinstance(found, Mapping) else {}


def _as_text(value: object) -> str:
    """A list as its members, anything else as it prints."""
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def outcome_of(report: Report) -> dict[str, float]:
    """What a walk came to, as metrics of its row of hyperparameters."""
    values = {
        "fp32_score": None if report.baseline is None else report.baseline.score,
        "quantized_score": report.final.score,
        "loss": report.final.loss,
        "accepted": float(good(report.verdict)),
        "seconds": sum(item.seconds or 0.0 for item in report.steps),
    }
    return {f"outcome/{name}": float(value) for name, value in values.items() if value is not None}


def layout(report: Report, prefix: str) -> dict[str, dict[str, list[Any]]]:
    """The charts of the Custom Scalars dashboard that have data, as ``SummaryWriter.add_custom_scalars`` takes them.

    Args:
        report: The report; a chart of nothing would only puzzle.
        prefix: First part of the tags.
    """
    of = re.escape(prefix)
    charts: dict[str, list[Any]] = {
        "score over the walk (step: place in the flow chart)": ["Multiline", [f"^{of}/walk/score$"]]
    }
    if any("loss_low" in walk_scalars(step) for step in walked(report)):
        ends = [f"{prefix}/walk/{word}" for word in ("loss", "loss_low", "loss_high")]
        charts["loss over the walk, with its 95 % interval"] = ["Margin", ends]
    if any(row.sqnr_db is not None for row in report.sensitivity):
        title = "SQNR of the output in dB, each quantizer alone (step: depth)"
        charts[title] = ["Multiline", [f"^{of}/sensitivity/.*_sqnr_db$"]]
    if any(row.loss is not None for row in report.sensitivity):
        title = "loss of score, each quantizer alone (step: depth)"
        charts[title] = ["Multiline", [f"^{of}/sensitivity/.*_loss$"]]
    if _has_epochs(report):
        charts["quantized score of epochs"] = ["Multiline", [f"^{of}/(watch|qat)/"]]
    return {prefix: charts}


def _has_epochs(report: Report) -> bool:
    """Whether there are quantized scores of epochs."""
    qat = report.step(StepName.QAT)
    watches = report.settings.get("watch_every_n_epochs") is not None
    return watches or (qat is not None and bool(qat.details.get("scores")))

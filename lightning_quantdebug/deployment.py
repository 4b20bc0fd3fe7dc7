"""The last box: what was accepted, as files that run elsewhere, each proven to do what was simulated.

The recipe is always written. Everything here runs inside passes of the user's own validation, where the weights are the
ones that were judged (averaged ones too), on the first rank; the score of each file is measured by all ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from lightning_quantdebug.errors import EvaluationError, ExportError, RecipeError, ReportError
from lightning_quantdebug.evaluation import Evaluation, Evaluator
from lightning_quantdebug.export_check import Run, difference, samples_in
from lightning_quantdebug.export_files import Exporter, agreement_of, joined, run_of, writers
from lightning_quantdebug.instrumentation import Instrumentation
from lightning_quantdebug.lightning_compat import kept
from lightning_quantdebug.network import Network, NetworkCall, output_tensors, with_output_tensors
from lightning_quantdebug.network_outputs import network_outputs
from lightning_quantdebug.network_search import Found, find_network
from lightning_quantdebug.paired_loss import loss_interval
from lightning_quantdebug.rank_agreement import gather
from lightning_quantdebug.recipe import QuantizedModel, Recipe, origin_of
from lightning_quantdebug.report import (
    Agreement,
    Cause,
    Comparison,
    Export,
    Finding,
    Report,
    StepName,
    Verdict,
)
from lightning_quantdebug.settings import Settings
from lightning_quantdebug.target import Mode

# What goes wrong in one format is written down there, and the others are still written.
_REFUSALS = (ExportError, RecipeError, ReportError, OSError)


@dataclass(eq=False)
class Deployment:
    """Writes and proves what a walk or a training leaves.

    Args:
        session: As it was accepted.
        evaluator: Runs the user's validation in full.
        settings: The settings.
        directory: Where the report is written.
        accepted: The evaluation that accepted; ``None``: the score was no number.
        is_global_zero: Whether this is the first rank.
        describe: Called with the name of each format as it begins.
    """

    session: Instrumentation
    evaluator: Evaluator
    settings: Settings
    directory: Path
    accepted: Evaluation | None
    is_global_zero: bool
    describe: Callable[[str], None] = lambda step: None
    _exporter: Exporter | None = None

    def run(self, report: Report) -> Report:
        """The report with what was exported."""
        names = ["recipe", *self.settings.export]
        try:
            found = find_network(self.session, self.evaluator)
        except ExportError as error:
            exports = [Export(name, Agreement.NOT_WRITTEN, str(error)) for name in names]
            return self._with_exports(report, exports)
        exports = []
        for name in names:
            self.describe(f"export {name}")
            exports.append(self._export(name, found, report))
        return self._with_exports(report, exports)

    def _with_exports(self, report: Report, exports: Sequence[Export]) -> Report:
        """The report with exports, their files, and a finding for each that is not verified."""
        files = dict(report.final.files)
        # As of all files, it is the first rank that has written them.
        for export in exports if self.is_global_zero else ():
            files |= {Path(path).name: path for path in export.files}
        report = replace(report, final=replace(report.final, exports=tuple(exports), files=files))
        return report.with_findings(*_findings(exports))

    def _export(self, name: str, found: Found, report: Report) -> Export:
        """Write one format on the first rank, and measure its score on all."""
        started = time.monotonic()
        export = self._written(name, found, report)
        if self.settings.export and export.agreement is not Agreement.NOT_WRITTEN:
            export = self._scored(export, found)
        return replace(export, seconds=time.monotonic() - started)

    def _written(self, name: str, found: Found, report: Report) -> Export:
        """One format as written and compared by the first rank, inside a pass with the weights that were judged."""
        made: list[Export] = []

        def around(call: Callable[[], Any], batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
            # Before the step, which may write to buffers: the files must fit the checkpoint.
            if not made and self.is_global_zero:
                with self.session.modes(Mode.QUANTIZE):
                    made.append(self._made(name, found, report))
            return call()

        self.evaluator.run_unchecked(around, limit=1)
        first = gather(made[0] if made else None)[0]
        assert first is not None
        return first

    def _made(self, name: str, found: Found, report: Report) -> Export:
        """One format, or why there is none."""
        try:
            if name == "recipe":
                export = self._recipe(found, report)
            else:
                if self._exporter is None:
                    axes = (output.class_axis for output in network_outputs(self.session))
                    axis = next((axis for axis in axes if axis is not None), None)
                    self._exporter = Exporter(self.session, found.network, found.calls, axis)
                export = writers(self._exporter, self.directory / "export")[name]()
        except _REFUSALS as error:
            return Export(name, Agreement.NOT_WRITTEN, str(error))
        return replace(export, reason=joined(export.reason, *_notes(found)))

    def _recipe(self, found: Found, report: Report) -> Export:
        """Write the recipe, read it again, put it on the model and compare bit for bit."""
        origin = origin_of(
            self.session.root,
            monitor=self.settings.monitor,
            score=report.final.score,
            verdict=None if report.verdict is None else report.verdict.value,
        )
        path = self.directory / "recipe"
        Recipe.of(self.session, found.network, found.calls[0], origin).save(path)
        model = QuantizedModel(self.session.root, Recipe.load(path))
        with torch.no_grad():
            outputs = [output_tensors(model(*c.args, **c.kwargs)) for c in (call.copied() for call in found.calls)]
        reference = [[tensor.cpu() for tensor in call.results] for call in found.calls]
        largest, rms = difference(reference, outputs, [None] * len(reference[0]))
        good = largest == 0.0
        comparison = Comparison("apply_recipe", samples_in(reference), largest, rms, 0.0, 0.0, float(good))
        reason = "" if good else "rebuilt from the recipe, the model computes something else"
        return Export("recipe", agreement_of(good), reason, (str(path),), (comparison,))

    # The user's score.

    def _scored(self, export: Export, found: Found) -> Export:
        """The export with the score of the user's own validation, with the file in the network's place."""
        if export.name == "encodings" or self.accepted is None:
            return export
        if not all(gather(all(Path(path).exists() for path in export.files))):
            return _with_reason(export, "no score: not every machine sees the file")
        try:
            evaluation = self._evaluated(export, found)
        except (EvaluationError, ExportError) as error:
            return _unverified(export, f"no score: {error}")
        export = replace(export, score=evaluation.score, simulated_score=self.accepted.score)
        loss = self.settings.direction.loss(self.accepted.score, evaluation.score)
        if self._is_noise(loss, evaluation):
            return export
        return _unverified(export, f"with the file the score is worse by {loss:.4g} than the simulated one")

    def _evaluated(self, export: Export, found: Found) -> Evaluation:
        """One pass of validation with the file."""
        if export.name == "recipe":
            model: list[QuantizedModel] = []

            def run_recipe(call: NetworkCall) -> Any:
                # Inside the pass, where averaged weights are in the model, if those were judged.
                if not model:
                    model.append(QuantizedModel(self.session.root, Recipe.load(export.files[0])))
                return model[0](*call.args, **call.kwargs)

            return self.evaluator.run(_replacing(found.network, run_recipe))
        run = run_of(export)
        assert run is not None
        return self.evaluator.run(_replacing(found.network, _as_network(run, found.calls[0].output)))

    def _is_noise(self, loss: float, evaluation: Evaluation) -> bool:
        """Whether a loss against the simulation is nothing that could be told from none, or matters."""
        assert self.accepted is not None
        interval = loss_interval(self.accepted, evaluation, self.settings.direction)
        permitted = self.settings.tolerance.permitted_loss(self.accepted.score)
        # A tenth of what quantization as a whole may cost.
        return loss <= 0.1 * permitted or (interval is not None and interval[0] <= 0.0)


def is_deployable(report: Report) -> bool:
    """Whether a walk has left a model that can be given away: also one that loses too much, but no broken one."""
    if report.verdict in (None, Verdict.FAILED, Verdict.BROKEN_PIPELINE):
        return False
    whole = report.step(StepName.QUANTIZE_MODEL)
    return whole is not None and whole.score is not None


def _replacing(network: Network, run: Callable[[NetworkCall], Any]) -> Callable[..., Any]:
    """An ``around_step`` in which something else runs in the network's place."""

    def around(call: Callable[[], Any], batch: Any, batch_idx: int, dataloader_idx: int) -> Any:
        module = network.module
        with kept(module, "forward"):
            plain = module.forward

            def forward(*args: Any, **kwargs: Any) -> Any:
                # What runs in the network's place may be the network itself, with quantizers.
                module.forward = plain
                try:
                    return run(NetworkCall(args, kwargs))
                finally:
                    module.forward = forward

            module.forward = forward
            return call()

    return around


def _as_network(run: Run, like: Any) -> Callable[[NetworkCall], Any]:
    """What runs a file and returns what the network returns."""

    def call(given: NetworkCall) -> Any:
        device = given.tensors[0].device
        return with_output_tensors(like, [tensor.to(device) for tensor in run(given.tensors)])

    return call


def _notes(found: Found) -> list[str]:
    """What a reader must know of the network."""
    notes = []
    if found.outside:
        names = ", ".join(found.outside[:3])
        notes.append(f"{len(found.outside)} quantizers sit outside the network and are not in it ({names})")
    if found.calls_per_step > 1:
        notes.append(f"a step calls the network {found.calls_per_step} times; it has the quantizers of the first call")
    return notes


def _with_reason(export: Export, reason: str) -> Export:
    """The export with one more reason."""
    return replace(export, reason=joined(reason, export.reason))


def _unverified(export: Export, reason: str) -> Export:
    """The export as one that is not proven."""
    return replace(_with_reason(export, reason), agreement=Agreement.UNVERIFIED)


def _findings(exports: Sequence[Export]) -> list[Finding]:
    """What could not be exported or proven; one finding for all formats that failed alike."""
    found = []
    causes = {Agreement.NOT_WRITTEN: Cause.NOT_EXPORTABLE, Agreement.UNVERIFIED: Cause.EXPORT_DIFFERS}
    for agreement, cause in causes.items():
        reasons: dict[str, list[str]] = {}
        for export in exports:
            if export.agreement is agreement:
                reasons.setdefault(export.reason, []).append(export.name)
        found += [Finding(cause, f"{', '.join(names)}: {reason}") for reason, names in reasons.items()]
    return found

"""What the summary in the terminal says, as rows and sentences: the same for plain text and for Rich."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from lightning_quantdebug.export_lines import export_text
from lightning_quantdebug.report import Report, StepName, StepVerdict
from lightning_quantdebug.report_markdown import (
    headline,
    interaction,
    interval,
    next_steps,
    not_walked,
    number,
    outcome,
    walked,
)
from lightning_quantdebug.short_names import printable

MAX_FINDINGS = 5
"""Of the summary: it is to fit a screen."""

STEP_HEADER = ("step", "score", "loss", "95 % interval", "verdict", "seconds")
REMEDY_HEADER = ("remedy", "before", "after", "", "why")


def title(report: Report) -> tuple[str, str]:
    """The verdict in capital letters, and the scores behind it where they are known.

    Examples:
        >>> from lightning_quantdebug.report import Verdict
        >>> title(Report(verdict=Verdict.NOT_ACCEPTED))
        ('NOT ACCEPTED', '')
    """
    verdict, _, scores = headline(report).partition(":")
    return verdict.upper(), scores.strip()


def outcome_texts(report: Report) -> list[str]:
    """What the verdict means, and what stopped the walk.

    Examples:
        >>> outcome_texts(Report(error="Ctrl-C"))
        ['The walk has not come to its end.', 'The walk stopped with: Ctrl-C']
    """
    return [outcome(report), *([f"The walk stopped with: {report.error}"] if report.error else [])]


def step_rows(report: Report) -> list[tuple[str, ...]]:
    """The steps that were walked, a cell for each column of ``STEP_HEADER``.

    Examples:
        >>> from lightning_quantdebug.report import Step
        >>> step_rows(Report(steps=(Step(StepName.WEIGHTS, StepVerdict.PASSED, 0.5, seconds=2),)))
        [('weights', '0.5', '-', '-', 'passed', '2.0')]
    """
    return [
        (
            step.step.value,
            number(step.score),
            number(step.loss),
            interval(step.interval),
            step.verdict.value,
            f"{step.seconds or 0.0:.1f}",
        )
        for step in walked(report)
    ]


def step_texts(report: Report) -> list[str]:
    """What the table of the steps does not say: how losses add up, single quantizers, steps that did not run.

    Examples:
        >>> from lightning_quantdebug.report import Step
        >>> step_texts(Report(steps=(Step(StepName.QAT, StepVerdict.SKIPPED),)))
        ['skipped: qat']
    """
    both = interaction(report)
    of_quantizers = (report.step(StepName.PER_QUANTIZER), report.step(StepName.FIX_QUANTIZERS))
    single = [step for step in walked(report) if step in of_quantizers and step.advice]
    texts = [*([both] if both else []), *(f"{step.step.value}: {step.advice}" for step in single)]
    for verdict, text in ((StepVerdict.SKIPPED, "skipped"), (StepVerdict.NOT_RUN, "not run by this version")):
        names = not_walked(report, verdict)
        texts += [f"{text}: {', '.join(names)}"] if names else []
    return texts


def remedy_rows(report: Report) -> list[tuple[str, ...]]:
    """What was tried, a cell for each column of ``REMEDY_HEADER``.

    Examples:
        >>> from lightning_quantdebug.report import Remedy
        >>> remedy_rows(Report(remedies=(Remedy("cle", 0.5, 0.8, True, "it rose", 1.0),)))
        [('cle', '0.5', '0.8', 'kept', 'it rose')]
    """
    return [
        (
            printable(item.title),
            number(item.before),
            number(item.after),
            "kept" if item.kept else "undone",
            printable(item.reason),
        )
        for item in report.remedies
    ]


def finding_texts(report: Report) -> list[tuple[str, str, str]]:
    """The most important findings: cause and place, evidence, advice.

    Examples:
        >>> from lightning_quantdebug.report import Cause, Finding
        >>> finding_texts(Report(findings=(Finding(Cause.DEAD_CHANNELS, "2 of 8", "conv", advice="Prune."),)))
        [('dead_channels at conv', '2 of 8', 'Prune.')]
    """
    return [
        (
            finding.cause.value + (f" at {finding.quantizer}" if finding.quantizer else ""),
            finding.evidence,
            finding.advice,
        )
        for finding in report.findings[:MAX_FINDINGS]
    ]


def more_findings(report: Report) -> str:
    """How many findings the summary leaves out, in words; empty where it has them all.

    Examples:
        >>> more_findings(Report())
        ''
    """
    left = len(report.findings) - MAX_FINDINGS
    return f"and {left} more in the report" if left > 0 else ""


def next_texts(report: Report) -> list[str]:
    """What to do next, without what the findings have said already.

    Examples:
        >>> next_texts(Report())
        ['Run the walk again to its end.']
    """
    said = {finding.advice for finding in report.findings[:MAX_FINDINGS]}
    return [step for step in next_steps(report) if step not in said]


def export_texts(report: Report) -> list[str]:
    """What runs elsewhere, a sentence for each format.

    Examples:
        >>> export_texts(Report())
        []
    """
    return [printable(export_text(export)) for export in report.final.exports]


def file_rows(report: Report) -> list[tuple[str, str]]:
    """Role and path of each file, but for TensorBoard's directory, which :func:`tensorboard_command` is about.

    Examples:
        >>> from lightning_quantdebug.report import Final
        >>> file_rows(Report(final=Final(files={"report.md": "a/report.md", "tensorboard": "logs"})))
        [('report.md', 'a/report.md')]
    """
    files = report.final.files.items()
    return [(printable(role), printable(path)) for role, path in files if printable(role) != _TENSORBOARD]


def tensorboard_command(report: Report) -> str | None:
    """The command that opens TensorBoard, to be copied; ``None`` where nothing was written for it.

    Examples:
        >>> from lightning_quantdebug.report import Final
        >>> print(tensorboard_command(Report(final=Final(files={"tensorboard": "my logs"}))))
        tensorboard --logdir 'my logs'
    """
    logdir = report.final.files.get(_TENSORBOARD)
    return None if logdir is None else f"tensorboard --logdir {shlex.quote(printable(logdir))}"


_TENSORBOARD = "tensorboard"


def names_and_texts(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Rows of a name and a text as lines, the texts one below the other and never broken.

    Examples:
        >>> names_and_texts([("report.md", "a"), ("fp32.ckpt", "b")])
        ['report.md  a', 'fp32.ckpt  b']
    """
    width = max((len(name) for name, _ in rows), default=0)
    return [f"{name.ljust(width)}  {text}" for name, text in rows]

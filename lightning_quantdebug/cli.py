"""The command line: write the pages of a report anew, compare two runs, and export an accepted model later.

``python -m lightning_quantdebug report DIR`` and ``python -m lightning_quantdebug diff A B`` need neither the model nor
its data or a Trainer: all is in ``report.json``, which is only read. ``python -m lightning_quantdebug export DIR``
needs the model, which is made by a function of yours, and the recipe in ``DIR``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_quantdebug.console import print_summary
from lightning_quantdebug.diff_console import comparison_json, print_comparison
from lightning_quantdebug.errors import QuantDebugError, ReportError, SettingsError
from lightning_quantdebug.export_lines import export_lines
from lightning_quantdebug.report import Agreement, Report, StepName
from lightning_quantdebug.report_diff import compare
from lightning_quantdebug.report_pages import page_files, with_files, write_pages, write_pictures
from lightning_quantdebug.report_reading import misfits_told, read_report, report_path
from lightning_quantdebug.settings import EXPORTS
from lightning_quantdebug.short_names import printable
from lightning_quantdebug.terminal_text import write_plain

OK, REGRESSION, UNUSABLE = 0, 1, 2
"""Exit codes; argparse's own errors are 2 too."""

_LONGEST_MESSAGE = 600

_CODES_OF_REPORT = """\
exit codes:
  0  everything was written
  2  the report can not be read or drawn, a file can not be written, or the arguments are wrong
"""
_CODES_OF_DIFF = """\
B is a regression where its loss of score (against its own FP32) is greater than that of A beyond noise: where the
95 % interval of the difference of both losses, taken as independent, lies above 0 (Zou and Donner 2008). Where a run
knows no interval, a change counts from a tenth of the permitted loss on. An end of B in broken_pipeline or failed is
one whatever the losses, unless A ended so too.

exit codes:
  0  no regression beyond noise
  1  a regression beyond noise
  2  the runs can not be compared (another monitor or mode, no loss), a report can not be read, or the arguments are
     wrong
"""

_CODES_OF_EXPORT = """\
Compared are outputs for random inputs of the shapes and ranges that the recipe was made with.

exit codes:
  0  everything was written and does what the simulation does
  1  a file was written, but differs from the simulation by more than sums in another order explain
  2  the recipe does not belong to the model, the model can not be made or exported, a file can not be written, or the
     arguments are wrong
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What stands behind ``python -m lightning_quantdebug``; ``None``: what the process was given.

    Returns:
        The exit code.

    Raises:
        SystemExit: Of argparse, for ``--help`` and wrong arguments.

    Examples:
        >>> main(["diff", "nowhere", "nowhere", "--json"])  # doctest: +ELLIPSIS
        {"error": "There is no report at 'nowhere': ...", "exit_code": 2}
        2
    """
    given = _parser().parse_args(arguments)
    try:
        code = {"report": _report, "diff": _diff, "export": _export}[given.command](given)
        sys.stdout.flush()
    except QuantDebugError as error:
        code = _refuse(given, error)
    except BrokenPipeError:
        # Whoever reads has left, as `head` does; what Python flushes at its end must not fail once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = UNUSABLE
    return code


def _parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = argparse.ArgumentParser("python -m lightning_quantdebug", description="Reports of quantization debugging.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="{report,diff,export}")
    shape = argparse.RawDescriptionHelpFormatter
    report = commands.add_parser(
        "report",
        help="write report.md and report.html anew from report.json",
        description="Write report.md and report.html anew from report.json, and print the summary.",
        epilog=_CODES_OF_REPORT,
        formatter_class=shape,
    )
    report.add_argument("path", metavar="DIR", help="directory with a report.json, or the path of one")
    report.add_argument("--output", metavar="OUT", help="where to write; default: beside the report.json")
    report.add_argument("--pictures", action="store_true", help="write every picture as PNG too, to OUT/pictures")
    diff = commands.add_parser(
        "diff",
        help="compare two runs; fails if the second one is worse beyond noise",
        description="Compare two runs.",
        epilog=_CODES_OF_DIFF,
        formatter_class=shape,
    )
    diff.add_argument("a", metavar="A", help="the run to compare with: a directory with a report.json, or its path")
    diff.add_argument("b", metavar="B", help="the run that is judged")
    diff.add_argument("--json", action="store_true", help="print the comparison as JSON")
    diff.add_argument("--strict", action="store_true", help="count a verdict that became not_accepted as a regression")
    steps = [step.value for step in StepName]
    diff.add_argument("--step", metavar="NAME", choices=steps, help=f"step whose loss decides: {', '.join(steps)}")
    export = commands.add_parser(
        "export",
        help="write an accepted model as ONNX, encodings or .pt2",
        description="Put the recipe in DIR on a model and write it in other formats, compared with the simulation.",
        epilog=_CODES_OF_EXPORT,
        formatter_class=shape,
    )
    export.add_argument("path", metavar="DIR", help="what QuantDebug wrote: a directory with `recipe`, or the recipe")
    export.add_argument(
        "--model",
        required=True,
        metavar="MODULE:NAME",
        help="a function or class that makes the model from no arguments",
    )
    export.add_argument("--checkpoint", metavar="FILE", help="a checkpoint or state_dict with the model's weights")
    export.add_argument("--format", nargs="+", choices=EXPORTS, default=["onnx"], help="default: onnx")
    export.add_argument("--output", metavar="OUT", help="where to write; default: `export` beside the recipe")
    export.add_argument("--quantizer", metavar="MODULE.CLASS", help="your own quantizer class, if the recipe has one")
    return parser


def _export(given: argparse.Namespace) -> int:
    """Write an accepted model in other formats."""
    # Here alone, so that reports are compared without torch.
    from lightning_quantdebug.exports import export_formats
    from lightning_quantdebug.made_model import made_model
    from lightning_quantdebug.plausibility import missing_packages
    from lightning_quantdebug.recipe import apply_recipe

    recipe = Path(given.path)
    recipe = recipe if (recipe / "recipe.json").exists() else recipe / "recipe"
    missing = missing_packages(given.format)
    if missing is not None:
        raise SettingsError(missing)
    model = apply_recipe(made_model(given.model, given.checkpoint), recipe, quantizer=given.quantizer)
    directory = recipe.parent / "export" if given.output is None else Path(given.output)
    exports = export_formats(model, directory, model.recipe.example_call(), given.format)
    for export in exports:
        for line in export_lines(export):
            write_plain(printable(line))
    return OK if all(export.agreement is Agreement.VERIFIED for export in exports) else REGRESSION


def _report(given: argparse.Namespace) -> int:
    """Write the pages anew."""
    path = report_path(given.path)
    report = read_report(path)
    directory = path.parent if given.output is None else Path(given.output)
    _check_targets(path, directory)
    report = with_files(report, {"report.json": str(path), **page_files(directory)})
    with misfits_told(path):
        write_pages(report, directory)
        pictures = write_pictures(report, directory / "pictures") if given.pictures else []
        print_summary(report)
    if given.pictures:
        write_plain(f"pictures: {len(pictures)} in {printable(str(directory / 'pictures'))}")
    return OK


def _check_targets(path: Path, directory: Path) -> None:
    """Raise if a page would be written over the report that it is made of."""
    for target in page_files(directory).values():
        if os.path.realpath(target) == os.path.realpath(path):
            raise ReportError(f"{target!r} is the report itself: give another `--output`.")


def _diff(given: argparse.Namespace) -> int:
    """Compare two runs."""
    a, b = (_read(path) for path in (given.a, given.b))
    with misfits_told(f"{given.a}, {given.b}"):
        found = compare(a, b, step=None if given.step is None else StepName(given.step), strict=given.strict)
        if given.json:
            write_plain(comparison_json(found))
        else:
            print_comparison(found)
    return REGRESSION if found.regression else OK


def _read(path: str) -> Report:
    """The report of a run."""
    return read_report(report_path(path))


def _refuse(given: argparse.Namespace, error: QuantDebugError) -> int:
    """Say why nothing could be done."""
    text = printable(str(error))
    text = text if len(text) <= _LONGEST_MESSAGE else f"{text[:_LONGEST_MESSAGE]}..."
    if getattr(given, "json", False):
        write_plain(json.dumps({"error": text, "exit_code": UNUSABLE}))
    write_plain(f"quantdebug: {text}", sys.stderr)
    return UNUSABLE

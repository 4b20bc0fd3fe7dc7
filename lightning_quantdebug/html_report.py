"""The report as one page that needs no network: what TensorBoard shows, with charts to hover over and tables to sort.

The page is made by Jinja2 with everything escaped; charts are plain JSON (:mod:`~lightning_quantdebug.html_charts`)
that plotly.js draws when they come into view. plotly.js is part of the page, which therefore has about 5 MB; a report
without charts does without it. A content security policy lets the page load nothing, wherever it is opened.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lightning_quantdebug.export_lines import EXPORT_HEADER, export_rows
from lightning_quantdebug.html_charts import Chart, overview_charts, tensor_charts
from lightning_quantdebug.markdown_text import interval, number
from lightning_quantdebug.quantizer_tables import helps, judgement
from lightning_quantdebug.report import QuantizerSetting, Report, Sensitivity, Step, StepVerdict
from lightning_quantdebug.report_markdown import headline, interaction, names_by_reason, next_steps, outcome, reasons
from lightning_quantdebug.review_data import good, step_titles
from lightning_quantdebug.short_names import printable
from lightning_quantdebug.visuals import Flip, Predictions

_PNG = b"\x89PNG\r\n\x1a\n"
_MOST_SETTINGS = 400
# Characters of a setting or of a fact about the environment.


@dataclass(frozen=True)
class Cell:
    """One cell of a table that can be sorted.

    Attributes:
        text: What is shown.
        value: What is sorted by: a number, or ``None`` where there is none; of a text the text itself.
    """

    text: str
    value: float | str | None


def to_html(report: Report) -> str:
    """The whole report as one page of HTML.

    Args:
        report: A report at any moment of the walk.

    Returns:
        A document that holds everything it needs.

    Examples:
        >>> from lightning_quantdebug.report import Verdict
        >>> page = to_html(Report(verdict=Verdict.ACCEPTED))
        >>> "<h1>Quantization: accepted</h1>" in page, "Plotly" in page
        (True, False)
    """
    overview = {chart.name: chart for chart in overview_charts(report)}
    tensors = [(view, tensor_charts(view, place)) for place, view in enumerate(report.visuals.tensors)]
    charts = [*overview.values(), *(chart for _, found in tensors for chart in found)]
    title, _, scores = headline(report).partition(":")
    page: str = _template().render(
        report=report,
        title=title,
        scores=scores.strip(),
        outcome=outcome(report),
        good=good(report.verdict),
        why=reasons(report)[1:],
        next_steps=next_steps(report),
        interaction=interaction(report),
        flow_chart=_flow_chart(report),
        steps=[_step_row(step) for step in report.steps],
        overview=overview,
        shifts=[(one, overview.get(f"class_shift_{place}")) for place, one in enumerate(report.visuals.predictions)],
        flips=_flips(report.visuals.predictions),
        tensors=tensors,
        sensitivity=_sensitivity(report.sensitivity),
        exports=export_rows(report.final.exports),
        export_header=EXPORT_HEADER,
        ranges=_ranges(report.final.settings.values()),
        reasons_not=sorted(names_by_reason(report.coverage).items(), key=lambda item: -len(item[1])),
        facts={"Settings": _facts(report.settings), "Environment": _facts(report.environment)},
        drawn={chart.name: _drawn(chart) for chart in charts},
        plotly=_plotly() if charts else "",
    )
    return page


@lru_cache(maxsize=1)
def _template() -> Any:
    """The page's template."""
    environment = Environment(
        loader=PackageLoader("lightning_quantdebug", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "interval": interval, "plain": lambda text: printable(str(text))}
    environment.globals["step_title"] = lambda step: step_titles([step])[0]
    return environment.get_template("report.html.jinja")


@lru_cache(maxsize=1)
def _plotly() -> str:
    """The library that draws, as its package brings it; nothing in it may end the script that holds it."""
    code = (files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    return code.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _drawn(chart: Chart) -> dict[str, Any]:
    """What the page's script needs of a chart."""
    return {"data": chart.data, "layout": chart.layout}


def _flow_chart(report: Report) -> str:
    """The flow chart with the path taken, as PNG in base64."""
    # What draws takes longer to import than the rest of this package.
    from lightning_quantdebug.figure_style import png
    from lightning_quantdebug.flow_chart_figure import flow_chart

    figure = flow_chart(report)
    return "" if figure is None else base64.b64encode(png(figure)).decode("ascii")


def _step_row(step: Step) -> dict[str, Any]:
    """What the table of the walk shows of a step."""
    return {
        "name": step.step.value,
        "taken": step.verdict not in (StepVerdict.SKIPPED, StepVerdict.NOT_RUN),
        "verdict": step.verdict.value,
        "score": number(step.score),
        "loss": number(step.loss),
        "interval": interval(step.interval),
        "seconds": f"{step.seconds or 0.0:.1f}",
        "advice": step.advice or step.verdict.advice,
    }


def _sensitivity(rows: Sequence[Sensitivity]) -> list[list[Cell]]:
    """Every quantizer alone, a cell for each column of the page's table."""
    return [
        [
            Cell(str(place), place),
            Cell(row.quantizer, row.quantizer),
            Cell(row.kind, row.kind),
            _number_cell(row.bit_width),
            _number_cell(row.sqnr_db),
            _number_cell(row.kl),
            _number_cell(row.loss),
            Cell(interval(row.interval), None if row.interval is None else row.interval[0]),
            Cell(judgement(row), judgement(row)),
            _number_cell(row.task_loss),
            _number_cell(row.loss_when_off),
            Cell(helps(row.counterfactuals), helps(row.counterfactuals)),
            Cell(row.method, row.method),
            _number_cell(row.samples),
        ]
        for place, row in enumerate(rows, 1)
    ]


def _ranges(settings: Any) -> list[list[Cell]]:
    """The final range of every quantizer, a cell for each column of the page's table."""
    return [_range_row(setting) for setting in settings]


def _range_row(setting: QuantizerSetting) -> list[Cell]:
    """The cells of one quantizer."""
    symmetry = "symmetric" if setting.symmetric else "asymmetric"
    return [
        Cell(setting.name, setting.name),
        Cell(setting.kind, setting.kind),
        _number_cell(setting.bit_width),
        Cell(symmetry, symmetry),
        Cell(setting.granularity.replace("_", " "), setting.granularity),
        _number_cell(setting.observed_min),
        _number_cell(setting.observed_max),
        _number_cell(setting.range_min),
        _number_cell(setting.range_max),
        _number_cell(setting.scale),
        _number_cell(setting.zero_point),
    ]


def _number_cell(value: float | None) -> Cell:
    """A number, sorted by its value."""
    return Cell(number(value), None if value is None else float(value))


def _flips(predictions: Sequence[Predictions]) -> list[tuple[Flip, str]]:
    """The flipped samples of the last moment, each with its picture if that is a PNG."""
    return [(flip, _checked_png(flip.picture)) for flip in (predictions[-1].flips if predictions else ())]


def _checked_png(picture: str) -> str:
    """A PNG in base64 as it is, and nothing else."""
    try:
        return picture if base64.b64decode(picture, validate=True).startswith(_PNG) else ""
    except (binascii.Error, ValueError):
        return ""


def _facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Settings or facts as lines; what is nested gets a line for each leaf."""
    found: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found += [(f"{name}.{inner}", text) for inner, text in _facts(value)]
        else:
            found.append((str(name), printable(str(value))[:_MOST_SETTINGS]))
    return found

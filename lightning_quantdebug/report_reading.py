"""Read the report of another run, of which nothing is taken on trust.

:meth:`Report.from_json` builds the records; here each of their fields is held against its type, so that whoever shows
or compares reports later can rely on them. What the records leave open (settings, environment, details of steps) may
hold anything that JSON can, but no number that a float can not hold.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from lightning_quantdebug.errors import QuantDebugError, ReportError
from lightning_quantdebug.report import Report

_NAME = "report.json"
# What code that relies on a report meets where a field holds something else than it should.
_MISFITS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError)


def report_path(path: str | Path) -> Path:
    """The file of a report, given itself or by its directory.

    Args:
        path: A ``report.json``, whatever its name, or a directory that holds one.

    Raises:
        ReportError: If there is no such file.

    Examples:
        >>> report_path("nowhere")
        Traceback (most recent call last):
        lightning_quantdebug.errors.ReportError: There is no report at 'nowhere': give a report.json or its directory.
    """
    try:
        given = Path(path)
        found = given / _NAME if given.is_dir() else given
        if found.exists():
            return found
    except (OSError, ValueError) as error:
        raise ReportError(f"Can not read the report {str(path)!r}: {error}.") from error
    raise ReportError(f"There is no report at {str(found)!r}: give a {_NAME} or its directory.")


def read_report(path: str | Path) -> Report:
    """Read a report and check every field.

    Args:
        path: The file.

    Raises:
        ReportError: If the file can not be read, is no report of this version, or a field has another type than it
            should have; the message names the field.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     read_report(Report(error="Ctrl-C").to_json(Path(folder) / "report.json")).error
        'Ctrl-C'
    """
    with misfits_told(path):
        report = Report.from_json(path)
        _check(report, Report, "report")
    return report


@contextmanager
def misfits_told(path: str | Path) -> Iterator[None]:
    """Tell whoever gave a report that it holds something else than it should, where code meets that.

    Args:
        path: The file that the report is from.

    Raises:
        ReportError: Instead of the errors that wrong types, missing keys and endless nesting end in.

    Examples:
        >>> with misfits_told("report.json"):
        ...     {}["both"]
        Traceback (most recent call last):
        lightning_quantdebug.errors.ReportError: 'report.json' does not hold what a report holds: KeyError: 'both'.
    """
    try:
        yield
    except QuantDebugError:
        raise
    except _MISFITS as error:
        told = f"{type(error).__name__}: {error}"
        raise ReportError(f"{str(path)!r} does not hold what a report holds: {told}.") from error


def _check(value: Any, hint: Any, where: str) -> None:
    """Raise unless a value, and all within it, has the type that is wanted."""
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    # JSON has no number that is not finite: Report writes null for it, so that every float may be missing.
    if value is None and (hint is Any or type(None) in options or float in options):
        return
    (wanted, *_) = [option for option in options if option is not type(None)]
    if isinstance(wanted, type) and is_dataclass(wanted):
        _expect(isinstance(value, wanted), value, wanted, where)
        for name, inner in _hints(wanted).items():
            _check(getattr(value, name), inner, f"{where}.{name}")
    elif get_origin(wanted) in (tuple, Mapping):
        _check_many(value, wanted, where)
    else:
        _check_plain(value, where)
        _expect(wanted is Any or _is_a(value, wanted), value, wanted, where)


def _check_many(value: Any, wanted: Any, where: str) -> None:
    """Raise unless a tuple or a mapping holds what it should."""
    origin, inner = get_origin(wanted), get_args(wanted)
    if origin is tuple:
        _expect(isinstance(value, tuple), value, "list", where)
        for index, item in enumerate(value):
            _check(item, inner[0] if inner[-1] is ... else inner[index], f"{where}[{index}]")
        return
    _expect(isinstance(value, Mapping), value, "object", where)
    for key, item in value.items():
        _check(item, inner[1], f"{where}[{key!r:.80}]")


def _check_plain(value: Any, where: str) -> None:
    """Raise for a whole number that no float can hold: nothing could be reckoned with it."""
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        raise ReportError(f"`{where}` holds a number of more than 300 digits.")
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, Sequence) and not isinstance(value, str):
        for item in value:
            _check_plain(item, where)


def _is_a(value: Any, wanted: Any) -> bool:
    """Whether a value has a plain type; a whole number is a float too, but a truth value is no number."""
    if isinstance(value, bool) or wanted is bool:
        return isinstance(value, bool) and wanted is bool
    return isinstance(value, (int, float) if wanted is float else wanted)


def _expect(fits: bool, value: Any, wanted: Any, where: str) -> None:
    """Raise unless a value fits."""
    if not fits:
        name = wanted if isinstance(wanted, str) else _JSON_NAMES.get(wanted, wanted.__name__)
        raise ReportError(f"`{where}` of the report must be a JSON {name}, got {value!r:.80}.")


_JSON_NAMES = {str: "string", int: "whole number", float: "number", bool: "true or false"}


@cache
def _hints(record: type) -> dict[str, Any]:
    """The types of a record's fields."""
    hints = get_type_hints(record)
    return {item.name: hints[item.name] for item in fields(record)}

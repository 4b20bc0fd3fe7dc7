"""The table of quantizers of each network, checked by hand against the placement rules and kept as a file.

A change of a rule shows as a difference here; look at each line of it before you write the files anew with
``UPDATE_TABLES=1 pytest tests/test_placement_tables.py``.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_quantdebug import instrument
from lightning_quantdebug.instrument import Instrumentation
from tests import zoo

TABLES = Path(__file__).parent / "tables"
HARDWARE = ("tensorrt", "xnnpack", "qnn")
CASES = [("int8", name) for name in zoo.ZOO]
CASES += [(target, name) for target in HARDWARE for name in ("mobilenet", "resnet", "inception", "bert", "lstm")]


def table(session: Instrumentation) -> str:
    """Every quantizer with its grid and places, then everything without one and why."""
    lines = []
    for site in session.plan.sites:
        spec = site.spec
        grid = f"{spec.bit_width} bit {'symmetric' if spec.symmetric else 'asymmetric'} {spec.granularity.value}"
        axis = "" if site.channel_axis is None else f" axis {site.channel_axis}"
        fixed = "" if site.fixed_range is None else f" fixed {site.fixed_range}"
        places = f" x{len(site.places)}" if len(site.places) > 1 else ""
        lines.append(f"{site.kind.value:10} {site.name}: {grid}{axis}{fixed}{places}")
    lines += ["", *(f"{item.name}: {item.reason}" for item in session.coverage.unquantized)]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(("target", "name"), CASES)
def test_table_of_quantizers(target: str, name: str) -> None:
    model, batch = zoo.make(name)
    with instrument(model, batch, target) as session:
        got = table(session)
    path = TABLES / f"{target}_{name}.txt"
    if os.environ.get("UPDATE_TABLES"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(got, encoding="utf-8")
    assert got == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", list(zoo.ZOO))
def test_no_tensor_is_both_quantized_and_explained_away(name: str) -> None:
    model, batch = zoo.make(name)
    with instrument(model, batch) as session:
        quantized = set(session.coverage.quantized)
        explained = [item.name for item in session.coverage.unquantized]
    assert not quantized & set(explained)
    assert len(explained) == len(set(explained))


@pytest.mark.parametrize("name", list(zoo.ZOO))
def test_every_recorded_operation_is_quantized_or_explained(name: str) -> None:
    model, batch = zoo.make(name)
    with instrument(model, batch) as session:
        coverage = session.coverage
        listed = set(coverage.quantized) | {item.name for item in coverage.unquantized}
        real = [
            operation.name
            for operation in session.topology
            if not operation.constant and any(value.floating for value in operation.outputs)
        ]
    missing = [name for name in real if name not in listed]
    assert not missing

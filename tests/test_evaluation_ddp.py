"""Two processes agree on every score, also on metrics that the user does not synchronise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent


def run(root: Path, argument: str) -> list[dict[str, Any]]:
    """What each rank found; the time limit turns a deadlock into a failure."""
    root.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "tests.ddp_script", str(root), argument]
    subprocess.run(command, cwd=ROOT, env=environment, timeout=120, check=True, capture_output=True)
    return [json.loads((root / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("ddp") / "with", "passes")


def test_every_result_is_the_same_on_both_ranks(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    assert first.keys() == second.keys()
    for name in first:
        if "logged" not in name:
            assert first[name] == second[name], name
    assert len([name for name in first if name.endswith(" loss")]) == 4, "fit start, two epochs, fit end"


def test_score_of_an_unsynced_metric_is_the_mean_over_ranks(ranks: list[dict[str, Any]]) -> None:
    logged = [rank["place1 logged"]["loss"] for rank in ranks]
    assert logged[0] != logged[1]
    score, batches, samples, _ = ranks[0]["place1 loss"]
    assert score == sum(logged) / 2
    # 31 samples are padded to 16 for each of two ranks, in batches of 8.
    assert [weight for _, weight in batches] == [8.0] * 4
    assert samples == 32


def test_synced_metrics_are_those_that_lightning_logs(ranks: list[dict[str, Any]]) -> None:
    for name in ("synced", "accuracy"):
        assert {rank["place2 logged"][name] for rank in ranks} == {ranks[0][f"place2 {name}"][0]}


def test_metric_of_one_rank_counts_for_all(ranks: list[dict[str, Any]]) -> None:
    score, batches, _, metrics = ranks[0]["place1 only_one"]
    assert score == ranks[1]["place1 logged"]["only_one"]
    assert batches == []
    assert "only_one" in dict(metrics)


def test_loaders_are_divided_among_the_ranks(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["place1 given"][2] == 24
    assert ranks[0]["place1 train"][2] == 16
    values = [value for value, _ in ranks[0]["place1 train"][1]]
    assert values[0] != values[1]


def test_missing_metric_is_missed_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "`accuracy`, `loss`" in rank["place1 error"]
        assert "`only_one`" in rank["place1 error"]


def test_fit_is_not_changed(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    for with_passes, without in zip(ranks, run(tmp_path / "without", "plain"), strict=True):
        assert with_passes["weights"] == without["weights"]
        assert with_passes["random"] == without["random"]

"""QAT on two processes: one training, that of a single process on the same batches, and all ranks decide alike."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
KINDS = ("plain", "norms", "unused", "clipped", "resumed")
pytestmark = pytest.mark.filterwarnings("ignore")


def run(root: Path, kinds: str, devices: int) -> dict[str, list[dict[str, Any]]]:
    """What the ranks found in each fit; the time limit turns a deadlock into a failure."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    environment["QUANTDEBUG_ACCELERATOR"] = "cpu"
    command = [sys.executable, "-m", "tests.qat_ddp_script", str(root), kinds, str(devices)]
    result = subprocess.run(
        command, cwd=ROOT, env=environment, timeout=240, check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return {
        kind: [json.loads((root / kind / f"rank{rank}.json").read_text()) for rank in range(devices)]
        for kind in kinds.split(",")
    }


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return run(tmp_path_factory.mktemp("two"), ",".join(KINDS), 2)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    return run(tmp_path_factory.mktemp("one"), "plain,clipped", 1)


@pytest.mark.parametrize("kind", KINDS)
def test_both_ranks_end_with_the_same_model_and_verdict(two: Any, kind: str) -> None:
    first, second = ({key: value for key, value in rank.items() if key != "rank"} for rank in two[kind])
    assert first == second
    assert len(first["scores"]) == 3
    assert first["best"] > 0


@pytest.mark.parametrize("kind", ["plain", "clipped"])
def test_two_processes_train_as_one_on_the_same_batches(one: Any, two: Any, kind: str) -> None:
    alone, together = one[kind][0], two[kind][0]
    # Sums in another order flip single roundings, and every epoch adds to that: how much depends on the CPU.
    assert together["scores"] == pytest.approx(alone["scores"], rel=2e-3)
    assert together["scales"] == pytest.approx(alone["scales"], rel=1e-3)
    assert together["values"] == pytest.approx(alone["values"], rel=1e-3, abs=1e-4)
    assert together["verdict"] == alone["verdict"]


def test_a_resumed_fit_ends_like_an_uninterrupted_one(two: Any) -> None:
    assert two["resumed"][0]["hash"] == two["plain"][0]["hash"]
    assert two["resumed"][0]["scores"] == two["plain"][0]["scores"]

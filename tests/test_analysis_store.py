"""What was measured is found again under its key, and under no other."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_quantdebug.adjustment import Adjustment
from lightning_quantdebug.analysis_store import AnalysisStore, analysis_key
from lightning_quantdebug.batch_scores import BatchScore
from lightning_quantdebug.errors import ReportError
from lightning_quantdebug.evaluation import Evaluation
from lightning_quantdebug.instrument import instrument
from lightning_quantdebug.measurement import Measurement
from lightning_quantdebug.settings import make_settings
from tests import zoo

FOUND = Measurement(0.5, 0.1, (0.0, 0.2), None, math.inf, None, 0.25, math.inf, 64, True)


def test_what_was_added_is_found(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "analysis.json"
    store = AnalysisStore(path, "key")
    store.add("alone", {"a": FOUND})
    store.add("alone", {"b": replace(FOUND, interval=None, score=None)})
    store.add("off", {"a": replace(FOUND, samples=3)})
    again = AnalysisStore(path, "key")
    assert again.found("alone") == {"a": FOUND, "b": replace(FOUND, interval=None, score=None)}
    assert again.found("off") == {"a": replace(FOUND, samples=3)}
    assert again.found("never") == {}
    assert AnalysisStore(path, "other").found("alone") == {}
    assert [file.name for file in path.parent.iterdir()] == ["analysis.json"]


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", '{"version": 1}', '{"version": 1, "key": "key", "tables": {"alone": {"a": {"score": 1}}}}'],
)
def test_a_file_that_is_something_else_is_not_used(tmp_path: Path, content: str) -> None:
    path = tmp_path / "analysis.json"
    path.write_text(content)
    assert AnalysisStore(path, "key").found("alone") == {}


def test_a_file_of_another_version_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "analysis.json"
    AnalysisStore(path, "key").add("alone", {"a": FOUND})
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "version": 0}))
    assert AnalysisStore(path, "key").found("alone") == {}


def test_a_file_that_can_not_be_written_is_an_error_that_says_so() -> None:
    store = AnalysisStore(Path("/dev/null/below/analysis.json"), "key")
    with pytest.raises(ReportError, match="Can not write"):
        store.add("alone", {"a": FOUND})


def test_the_key_is_that_of_weights_encodings_remedies_settings_and_data() -> None:
    model, batch = zoo.make("resnet")
    evaluation = Evaluation(0.5, {"acc": 0.5}, (BatchScore(0.5, 2.0),), 2, 0.0, 1)
    settings = make_settings(monitor="acc")
    with instrument(model, batch) as q:
        q.calibrate([batch])

        def key(evaluation: Evaluation = evaluation, settings: Any = settings) -> str:
            return analysis_key(q, settings, evaluation)

        first, seen = key(), set()
        assert key() == first

        def differs(found: str) -> None:
            assert found != first
            assert found not in seen
            seen.add(found)

        differs(key(replace(evaluation, score=0.6)))
        differs(key(replace(evaluation, batches=(BatchScore(0.4, 2.0),))))
        differs(key(replace(evaluation, metrics={"acc": 0.5, "loss": 1.0})))
        differs(key(settings=make_settings(monitor="loss")))
        differs(key(settings=make_settings(monitor="acc", exclude=["fc*"])))
        assert key(settings=make_settings(monitor="acc", analysis="exhaustive", verbose=False)) == first
        state = q.state()
        quantizer = q.quantizers["fc"]
        quantizer.respecify(replace(quantizer.spec, bit_width=4), None)
        differs(key())
        q.restore(state)
        assert key() == first
        layer = q.layers[0]
        q.adjust({layer.key: Adjustment(bias_offset=torch.ones(8))})
        differs(key())
        q.restore(state)
        with torch.no_grad():
            model.fc.bias[0] += 1e-6
        differs(key())
        with torch.no_grad():
            model.bn1.running_mean[0] += 1e-6
        differs(key())

"""Walks of the tests write everything but pictures, which take longer than most walks; tests of pictures draw them."""

from __future__ import annotations

import pytest

from lightning_quantdebug.tensorboard import ReviewWriter

DRAWING = ("tests.test_tensorboard", "tests.test_callback")
"""Modules whose tests draw: the writer alone, and walks of the callback. Examples run in processes of their own."""


@pytest.fixture(autouse=True)
def without_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.module.__name__ not in DRAWING:
        monkeypatch.setattr(ReviewWriter, "_pictures", lambda *_: {})

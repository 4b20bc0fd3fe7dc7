"""A terminal gets colours and boxes, everything else plain text, and no text steers either."""

import io
import sys

import pytest
import rich
from rich.console import Console

from lightning_quantdebug import terminal_text
from lightning_quantdebug.terminal_text import aligned, colored, is_terminal, rich_table, terminal, wrapped, write_plain
from tests.terminals import Encoded, Terminal, shown

LINK = "[link=file:///etc]x[/link] [red]y[/red] :boom: \x1b]8;;http://e.vil\x1b\\z\x1b[2J"


@pytest.fixture(autouse=True)
def usual_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


def test_only_a_terminal_with_abilities_has_a_console(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(terminal(Terminal()), Console)
    assert terminal(io.StringIO()) is None
    assert terminal(Encoded()) is None
    assert terminal(object()) is None  # type: ignore[arg-type] # a stream without isatty
    for term in ("dumb", "unknown"):
        monkeypatch.setenv("TERM", term)
        assert terminal(Terminal()) is None


def test_a_pipe_stays_plain_where_colour_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert terminal(io.StringIO()) is None


def test_standard_output_is_the_console_that_live_displays_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert terminal() is None
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert terminal() is rich.get_console()


def test_a_notebook_has_a_console_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = Console(force_jupyter=True, file=io.StringIO())
    monkeypatch.setattr(terminal_text.rich, "get_console", lambda: notebook)
    assert terminal() is notebook


def test_a_stream_that_can_not_tell_is_no_terminal() -> None:
    assert not is_terminal(object())
    assert not is_terminal(io.StringIO())
    assert is_terminal(Terminal())


def test_characters_that_the_encoding_lacks_become_question_marks() -> None:
    stream = Encoded()
    write_plain("é ok", stream)
    assert stream.getvalue() == "? ok\n"
    wide = io.StringIO()
    write_plain("é ok", wide)
    assert wide.getvalue() == "é ok\n"


def test_lines_fit_and_rows_are_aligned() -> None:
    lines = wrapped("word " * 60, "* ", "  ")
    assert max(map(len, lines)) <= 100
    assert [line[:3] for line in lines[:2]] == ["* w", "  w"]
    assert aligned([("a", "b", "1"), ("aa", "bb", "22")], left=2) == ["a   b    1", "aa  bb  22"]


def test_words_have_their_style_and_other_texts_none() -> None:
    assert colored("failed", {"failed": "red"}).style == "red"
    assert colored("failed again", {"failed": "red"}).style == ""


def test_no_cell_and_no_header_is_obeyed() -> None:
    stream = Terminal()
    Console(file=stream, width=200).print(rich_table((LINK, "b"), [(LINK, "1")], {}), highlight=False)
    text = shown(stream.getvalue())
    assert "\x1b" not in text
    assert text.count("[link=file:///etc]x[/link] [red]y[/red] :boom:") == 2


def test_a_narrow_terminal_breaks_the_widest_column_and_loses_nothing() -> None:
    stream = io.StringIO()
    rows = [("a_very_long_name_of_a_quantizer", "0.1234567")]
    Console(file=stream, width=24).print(rich_table(("quantizer", "score"), rows, {}))
    lines = stream.getvalue().splitlines()
    assert max(map(len, lines)) <= 24
    assert "0.1234567" in stream.getvalue()
    assert "".join(line[:13].strip() for line in lines[2:]) == rows[0][0]


def test_numbers_stand_to_the_right_and_texts_to_the_left() -> None:
    stream = io.StringIO()
    Console(file=stream, width=60).print(
        rich_table(("a", "b", "why"), [("x", "1", "y"), ("xxx", "22", "yy")], {}, texts=(0, 2))
    )
    assert [line.rstrip() for line in stream.getvalue().splitlines()[2:]] == ["x     1  y", "xxx  22  yy"]

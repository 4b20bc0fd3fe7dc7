"""Streams that are terminals, and what they would show."""

import io
import re

ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
"""Colours and weights; every other escape sequence would steer the terminal."""


LINK = "[link=file:///etc]x[/link][red]y :boom:"
"""What Rich would obey as markup."""

STEERING = "\x1b]8;;http://e.vil\x1b\\z\x1b[2J\x07"
"""What a terminal would obey: a link, a cleared screen, a bell."""


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


class Encoded(Terminal):
    """A terminal that lacks most of Unicode."""

    encoding = "ascii"


def shown(text: str) -> str:
    """The text as it stands on the screen."""
    return ESCAPE.sub("", text)

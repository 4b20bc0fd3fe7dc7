"""Texts, numbers and tables as Markdown shows them: whatever comes from the user's model is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

MAX_TEXT = 400

_SAFE_CODE = re.compile(r"[\w.@/:\[\]=+-][\w.@/:\[\] ,=+-]*")
# Brackets suffice to disarm links and images; an underscore inside a word starts no emphasis.
_SPECIAL = re.compile(r"([\\`*\[\]#~|]|(?<![^\W_])_|_(?![^\W_]))")


def escape(text: str) -> str:
    r"""Text as Markdown shows it literally, on one line, also inside a table cell.

    Args:
        text: Anything, such as a layer's name.

    Returns:
        The text with control characters as spaces, Markdown's own characters escaped, ``<``, ``>`` and ``&`` as
        entities, cut after 400 characters.

    Examples:
        >>> print(escape("a|b <script>\n# c"))
        a\|b &lt;script&gt; \# c
    """
    flat = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    if len(flat) > MAX_TEXT:
        flat = flat[: MAX_TEXT - 3] + "..."
    entities = flat.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _SPECIAL.sub(r"\\\1", entities)


def code(name: str) -> str:
    r"""A name as a code span, or escaped text where a code span could not hold it.

    Examples:
        >>> print(code("layer1.0.conv.weight"), code("a`b"))
        `layer1.0.conv.weight` a\`b
    """
    return f"`{name}`" if len(name) <= MAX_TEXT and _SAFE_CODE.fullmatch(name) else escape(name)


def number(value: object, digits: int = 4) -> str:
    """A number with four significant digits; ``-`` where there is none.

    Examples:
        >>> number(0.123456), number(None), number(12), number(-0.0)
        ('0.1235', '-', '12', '0')
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "-"
    # A zero has no sign here: "-0" would only puzzle.
    return f"{value + 0.0:.{digits}g}" if isinstance(value, float) else f"{value:.{digits}g}"


def interval(value: Sequence[float | None] | None) -> str:
    """A 95 % interval as ``[low, high]``; ``-`` where there is none.

    Examples:
        >>> interval((0.01, 0.05)), interval(None)
        ('[0.01, 0.05]', '-')
    """
    return "-" if value is None or set(value) == {None} else f"[{number(value[0])}, {number(value[1])}]"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; the cells must be escaped already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)

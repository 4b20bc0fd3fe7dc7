"""Names of layers cut to the width of a label, without ambiguity among the names that stand together."""

from __future__ import annotations

from collections.abc import Sequence

ELLIPSIS = "…"


def printable(text: str) -> str:
    """The text on one line, without control characters or marks that turn the direction of writing.

    Examples:
        >>> printable("a" + chr(10) + "b" + chr(0x202E) + "c")
        'a b c'
    """
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def short_names(names: Sequence[str], width: int = 28) -> dict[str, str]:
    """A label of about ``width`` characters for each name; different names have different labels.

    The end of a path tells most (``…3.attention.query.weight``) and is kept whole as far as it goes. Where two labels
    would be the same, a number tells them apart.

    Args:
        names: Names of quantizers or other texts.
        width: Most characters of a label, but for the number that tells two apart.

    Returns:
        The label of each name.

    Examples:
        >>> short_names(["features.3.conv.0.weight", "head"], width=15)
        {'features.3.conv.0.weight': '…conv.0.weight', 'head': 'head'}
        >>> list(short_names(["a" * 20, "b" + "a" * 19], width=8).values())
        ['…aaaaaaa', '…aaaaaaa (2)']
    """
    labels: dict[str, str] = {}
    taken: dict[str, int] = {}
    for name in dict.fromkeys(names):
        label = _cut(printable(name), width)
        taken[label] = taken.get(label, 0) + 1
        labels[name] = label if taken[label] == 1 else f"{label} ({taken[label]})"
    return labels


def _cut(text: str, width: int) -> str:
    """The end of a text, from the beginning of a path's part on where one lies within it."""
    if len(text) <= width:
        return text
    tail = text[-(width - len(ELLIPSIS)) :]
    dot = tail.find(".")
    # A part that begins late would throw most of the label away: then the name is cut inside a part.
    begin = dot + 1 if 0 <= dot < width // 2 else 0
    return ELLIPSIS + tail[begin:]

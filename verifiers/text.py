"""Text as a reader sees it, and the name that was meant."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Iterable

_UNSEEN = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\uffa0\ufe00-\ufe0f\U000e0100-\U000e01ef]")
"""Fillers, joiners and variation selectors, which Unicode counts as letters and marks."""


def visible(text: str) -> str:
    """One encoding for each letter (NFKC), and none that is not seen."""
    if text.isascii():
        return text
    text = unicodedata.normalize("NFKC", _UNSEEN.sub("", text))
    return "".join(c for c in _UNSEEN.sub("", text) if unicodedata.category(c) != "Cf")


def blank(text: str) -> bool:
    """Whether a reader sees nothing."""
    return all(c.isspace() or not c.isprintable() or c == "\u2800" for c in visible(text))


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name most like `name`; empty where there is none."""
    return next(iter(difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.0)), "")

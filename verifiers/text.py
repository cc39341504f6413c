"""Text as a reader sees it."""

from __future__ import annotations

import unicodedata


def visible(text: str) -> str:
    """One encoding for each letter (NFKC), and none that has no width."""
    if text.isascii():
        return text
    return "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")

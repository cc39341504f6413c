"""The page: one HTML file that needs nothing else. Data go in as JSON, code and style by the hash the policy names."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "assets"
SCRIPTS = ("base.js", "charts.js", "experts.js", "groups.js", "pages.js", "main.js")


def embedded(data: Any) -> str:
    """JSON that no HTML parser can find a tag, an entity or an end in, whatever the texts in it hold. What is not
    finite is null: a browser refuses all of a page that holds a NaN."""
    data = json.loads(json.dumps(data), parse_constant=lambda _: None)
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda m: f"\\u{ord(m[0]):04x}", text)


def render(data: Any) -> str:
    """The whole page. Only the scripts and the style of this package run: nothing inline, nothing from elsewhere."""
    html, style, script = _parts()
    filled = {"POLICY": policy(live=bool(data["live"])), "STYLE": style, "SCRIPT": script, "DATA": embedded(data)}
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda m: filled[m[1]], html)


def policy(*, live: bool) -> str:
    """The content security policy. A file may ask nobody for anything, a live page its own server."""
    _, style, script = _parts()
    connect = "'self'" if live else "'none'"
    return (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; connect-src {connect}; "
        "img-src 'none'; base-uri 'none'; form-action 'none'"
    )


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@cache
def _parts() -> tuple[str, str, str]:
    """(template, style, script)"""
    html, style, *scripts = ((FOLDER / n).read_text(encoding="utf-8") for n in ("page.html", "style.css", *SCRIPTS))
    return html, style, '"use strict";\n' + "\n".join(scripts)

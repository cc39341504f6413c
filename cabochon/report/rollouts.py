"""Completions of a step, group by group, small enough for a page: tokens as text, what was decided, the evidence."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from cabochon.errors import UserError
from cabochon.report.files import Row, number_of, object_of
from cabochon.tokenizer import Tokenizer

HEAD, TAIL = 400, 200
"""tokens shown of a long completion: its beginning and its end"""
TEXT = 3000
"""characters of a prompt or a piece of evidence"""
ITEMS = 30
"""of a list in the evidence"""


def steps_of(place: Path) -> dict[int, Path]:
    """step -> its file"""
    try:
        names = [p for p in (place / "rollouts").iterdir() if re.fullmatch(r"step_\d+\.jsonl", p.name)]
    except OSError:
        return {}
    return dict(sorted((int(p.stem.removeprefix("step_")), p) for p in names))


def spread(steps: Sequence[int], most: int) -> list[int]:
    """The last, the first, then ever finer between: any beginning of it covers the run."""
    out: list[int] = []
    parts = 1
    while len(out) < min(most, len(steps)) and parts <= 2 * len(steps):
        for i in range(parts, -1, -1):
            step = steps[round(i * (len(steps) - 1) / parts)]
            if step not in out:
                out.append(step)
        parts *= 2
    return out[:most]


def groups_of(
    path: Path, tokenizer: Tokenizer | None, *, groups: int, completions: int, shown_as: str = ""
) -> dict[str, Any]:
    """`groups`: the most telling first, `of`: how many the step had, `odd`: of how many completions shown not all could
    be read. `shown_as`: the file's name in commands."""
    found: dict[str, list[tuple[int, Row]]] = {}
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if (row := object_of(line)) is not None:  # else a line that is being written, or was cut
                    found.setdefault(str(row.get("group")), []).append((number, row))
    except OSError:
        return {"groups": [], "of": 0, "odd": 0}
    chosen = _telling(list(found.values()), groups)
    shown = [_group(g, completions, tokenizer, shown_as or str(path)) for g in chosen]
    odd = sum(c["odd"] for g in shown for c in g["completions"])
    return {"groups": shown, "of": len(found), "odd": odd}


def _telling(groups: list[list[tuple[int, Row]]], most: int) -> list[list[tuple[int, Row]]]:
    """By domain in turn, and in each those whose rewards differ most."""
    by_domain: dict[str, list[tuple[float, int]]] = {}
    for i, group in enumerate(groups):
        rewards = _rewards(group)
        by_domain.setdefault(str(group[0][1].get("domain")), []).append((-pstdev(rewards) if rewards else 1.0, i))
    each = (enumerate(sorted(domain)) for domain in by_domain.values())
    ranked = sorted((rank, alike, i) for domain in each for rank, (alike, i) in domain)
    return [groups[i] for _, _, i in ranked[:most]]


def _group(group: list[tuple[int, Row]], most: int, tokenizer: Tokenizer | None, file: str) -> Row:
    first = group[0][1]
    rewards = _rewards(group)
    prompt = first.get("prompt")
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": "" if prompt is None else prompt}]
    return {
        "task": str(first.get("task")), "domain": str(first.get("domain")), "verifier": first.get("verifier"),
        "prompt": [{"role": str(m.get("role")), "content": clipped(str(m.get("content", "")))}
                   for m in messages if isinstance(m, Mapping)],
        "reward": fmean(rewards) if rewards else None, "of": len(group),
        "completions": [_completion(n, r, tokenizer, file) for n, r in group[:most]],
    }  # fmt: skip


def _rewards(group: list[tuple[int, Row]]) -> list[float]:
    """Those that a mean can be taken of."""
    return [x for _, r in group if (x := number_of(r.get("reward"))) is not None and abs(x) < 1e15]


def _completion(number: int, row: Row, tokenizer: Tokenizer | None, file: str) -> Row:
    """`odd`: its tokens cannot be read as such, and it is shown as text alone."""
    out: Row = {"line": number, "odd": False, **{k: limited(row.get(k)) for k in ("finish", "reward", "advantage")}}
    out["versions"] = row["versions"] if isinstance(row.get("versions"), list) else []
    out["components"] = limited(row.get("components") or {})
    out["verdict"] = limited(row.get("verdict"))
    out["evidence"] = limited(row.get("evidence") or {})
    if row.get("scores"):
        out["scores"] = limited(row["scores"])
    if "verifier" in row and "payload" in row:
        out["again"] = (
            f"sed -n {number}p {shlex.quote(file)} > completion.jsonl && cabochon verify completion.jsonl --column text"
        )
    try:
        told = _tokens(row, tokenizer) if tokenizer is not None and row.get("tokens") else {}
    except (TypeError, ValueError, LookupError, OverflowError, AttributeError):
        told, out["odd"] = {}, True
    return out | (told or {"text": clipped(str(row.get("text", "")))})


def _tokens(row: Row, tokenizer: Tokenizer) -> Row:
    """Token by token. Raises whatever a row raises that was not written by a run."""
    ids = row["tokens"]
    out: Row = {}
    keep = list(range(len(ids)))
    if len(ids) > HEAD + TAIL:
        keep = keep[:HEAD] + keep[-TAIL:]
        out["skipped"] = [HEAD, len(ids) - HEAD - TAIL]
    text = pieces(tokenizer, ids)
    out["pieces"] = [text[i] for i in keep]
    out["logprobs"] = [round(row["logprobs"][i], 2) for i in keep]
    out["mask"] = "".join("1" if row["mask"][i] == 1 else "0" for i in keep)
    if any(x is not None for x in row.get("entropy") or []):
        out["entropy"] = [x if x is None else round(x, 2) for x in (row["entropy"][i] for i in keep)]
    if any(x is not None for x in row.get("clipped") or []):
        out["clipped"] = "".join("-" if x is None else str(int(x)) for x in (row["clipped"][i] for i in keep))
    if "advantages" in row:
        out["advantages"] = [round(row["advantages"][i], 3) for i in keep]
    return out


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text of each token, special ones with it; together they are the whole text. Where a character takes several
    tokens, the last of them has it and the others are empty."""
    out: list[str] = []
    decode = cache(tokenizer.decode)  # short runs of tokens come again and again
    begin = done = 0  # tokens of context before the next piece; tokens whose text is told
    for end in range(1, len(ids) + 1):
        before, now = decode(tuple(ids[begin:done])), decode(tuple(ids[begin:end]))
        if (now.endswith("\ufffd") and end < len(ids) and end - done < 4) or len(now) < len(before):
            out.append("")
            continue
        out.append(now[len(before) :])
        begin, done = done, end
    return out


def tokenizer_of(place: Path, address: str | None) -> Tokenizer | None:
    """The one the run's completions were written with: kept by the run, or its model's; None where both are gone."""
    for folder in (place / "tokenizer", place / "final", Path(address) if address else None):
        if folder is not None and (folder / "tokenizer.json").is_file():
            try:
                return Tokenizer.from_dir(folder)
            except UserError:
                continue
    return None


def clipped(text: str, most: int = TEXT) -> str:
    return text if len(text) <= most else f"{text[:most]}… ({len(text) - most:,} characters more)"


def limited(value: Any, depth: int = 0) -> Any:
    """Plain data with long texts and lists cut, and said to be."""
    match value:
        case str():
            return clipped(value)
        case dict() if depth < 6:
            return {clipped(str(k), 200): limited(v, depth + 1) for k, v in list(value.items())[: 2 * ITEMS]}
        case list() if depth < 6:
            more = [f"… {len(value) - ITEMS:,} more"] if len(value) > ITEMS else []
            return [limited(v, depth + 1) for v in value[:ITEMS]] + more
        case bool() | int() | float() | None:
            return value
    return clipped(str(value), 200)

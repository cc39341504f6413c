"""The commands and blocks of the documentation, and the real command line that reads them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import typer

from cabochon import overrides
from cabochon.cli import app
from cabochon.cli_stages import load_recipe
from cabochon.pipeline import read as read_pipeline

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").glob("*.md") if p.name != "log.md")]
STAGES = ("sft", "rl", "rm", "distill", "run", "plan", "submit", "config")
"""commands whose words are recipes and settings"""


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of fenced blocks, and of blocks indented by four spaces after an empty line."""
    out, text = [], page.read_text(encoding="utf-8")
    out += [(m[1], m[2]) for m in re.finditer(r"^```(\w*)\n(.*?)^```", text, re.M | re.S)]
    rest = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    out += [("", re.sub("^    ", "", m[0], flags=re.M)) for m in re.finditer(r"(?<=\n\n)(?: {4}.*\n)+", rest)]
    return out


def commands(page: Path) -> list[list[str]]:
    """The words of every `cabochon` command in the page's blocks."""
    out = []
    for _, text in blocks(page):
        lines = text.replace("\\\n", " ").splitlines()
        for line, after in zip(lines, [*lines[1:], ""], strict=True):
            line = line.removeprefix("$ ").removeprefix(".venv/bin/")
            shows_an_error = after.startswith("cabochon: ")
            if line.startswith("cabochon ") and "..." not in line and not shows_an_error:
                words = shlex.split(line.partition(" > ")[0], comments=True)
                out.append(words[: words.index("&") if "&" in words else None])
    return out


def parsed(words: list[str]) -> None:
    """Read a command as the command line does, and its recipe with it; raises where that refuses."""
    if words[-1] in ("--help", "--version"):
        words = words[:-1]
    command, given = typer.main.get_command(app), words[1:]
    context = command.make_context("cabochon", list(given), resilient_parsing=not given)
    while hasattr(command, "resolve_command") and given:
        rest = [*context._protected_args, *context.args]
        name, command, given = command.resolve_command(context, rest)
        context = command.make_context(name, list(given), parent=context)
    parts = context.params.get("parts")
    known = words[1] in STAGES and parts and not words[2].endswith("=")
    if known and not any(p.endswith(".yaml") for p in overrides.split(parts)[0]):
        recipes, _ = overrides.split(parts)
        stage = [f"stage={words[1]}"] if context.info_name in ("train", "rl", "distill") else []
        (read_pipeline if overrides.peek(recipes, [], "stage") == "run" else load_recipe)([*parts, *stage])

"""What the documentation says to type: every command is parsed by the real command line, its recipe and keys resolved.
Links lead somewhere; blocks of JSON, YAML and Python can be read; getting-started is done from top to bottom."""

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from cabochon import overrides
from cabochon.cli import app
from cabochon.cli_stages import load_recipe
from cabochon.pipeline import read as read_pipeline

ROOT = Path(__file__).parents[1]
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


EVERY = [
    pytest.param(page, words, id=f"{page.stem}: {' '.join(words)[:70]}") for page in PAGES for words in commands(page)
]


def test_there_are_commands_to_test():
    assert len(EVERY) > 60


@pytest.mark.parametrize(("page", "words"), EVERY)
def test_a_command_is_one(page, words):
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


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_blocks_can_be_read():
    for page in PAGES:
        for language, text in blocks(page):
            match language:
                case "json":
                    json.loads(text)
                case "yaml":
                    list(yaml.safe_load_all(text))
                case "python":
                    ast.parse(text)


def test_every_page_is_linked_from_the_readme():
    said = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [p.name for p in PAGES[1:] if f"docs/{p.name}" not in said] == []


@pytest.mark.slow
def test_a_new_user_gets_to_a_reward_of_their_own(tmp_path):
    """Files and commands of getting-started, as they stand there; RL then says more words in capitals than SFT did."""
    found = blocks(ROOT / "docs" / "getting-started.md")
    for name, text in zip(("shout.py", "make_tasks.py"), (t for lang, t in found if lang == "python"), strict=True):
        (tmp_path / name).write_text(text)
    (script,) = (t for _, t in found if "make_tasks.py" in t and "cabochon" in t)
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    }
    done = subprocess.run(
        ["bash", "-ec", script], cwd=tmp_path, env=env, timeout=900, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "0 suspicious" in done.stdout
    (gain,) = re.findall(r"runs/rl/final .*?([+-][0-9.]+)% \[", done.stdout)[:1]
    assert float(gain) > 10
    assert (tmp_path / "report.html").stat().st_size > 100_000

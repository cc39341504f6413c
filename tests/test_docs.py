"""What the documentation says to type: every command is parsed by the real command line, its recipe and keys resolved.
Links lead somewhere; blocks of JSON, YAML and Python can be read; getting-started is done from top to bottom.
The commands of the other pages are run by tests/test_docs_run.py."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from docs import PAGES, ROOT, blocks, commands, parsed

EVERY = [
    pytest.param(page, words, id=f"{page.stem}: {' '.join(words)[:70]}") for page in PAGES for words in commands(page)
]


def test_there_are_commands_to_test():
    assert len(EVERY) > 60


@pytest.mark.parametrize(("page", "words"), EVERY)
def test_a_command_is_one(page, words):
    parsed(words)


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
    (gain,) = re.findall(r"runs/rl/final .*?([+-][0-9.]+) points \[", done.stdout)[:1]
    assert float(gain) > 10
    assert (tmp_path / "report.html").stat().st_size > 100_000

"""The whole demo, made small, while its processes are killed one after the other: it ends as if nothing had been."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cabochon.overrides import find_recipe

SMALL = [
    "tasks.puzzles=[{name: letter_counting, size: 300, seed: 1, config: {min_words: 1, max_words: 2}}, "
    "{name: spell_backward, size: 100, seed: 1}, {name: basic_arithmetic, size: 100, seed: 1}]",
    "tasks.programs=[{size: 60}]", "tasks.gives_up=0.2",
    "rl.tasks.shares={code: 1, spell_backward: 1, basic_arithmetic: 0.7, letter_counting: 0.5}",
    "sft.steps=60", "sft.optim.total_steps=60", "sft.run.save_every=10", "sft.step.batch_size=4",
    "rm.steps=6", "rm.run.save_every=2", "rm.step.batch_size=2", "rm.optim.total_steps=12",
    "judge.steps=8", "judge.optim.total_steps=20", "judge.run.save_every=2", "judge.step.batch_size=2",
    "rl.steps=8", "rl.run.save_every=2", "rl.rollout.prompts=4", "rl.rollout.group_size=4", "rl.rollout.refills=8",
    "rl.eval.tasks=8", "rl.eval.every=0", "rl.update.algorithm={kind: grpo}",
]  # fmt: skip
STAGES = ("tasks", "sft", "label", "rm", "verdicts", "judge", "rl", "eval", "unseen", "rm-eval", "judge-eval", "report")


def processes(root: int) -> list[int]:
    """The process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    out, front = [], [root]
    while front:
        pid = front.pop()
        out.append(pid)
        front += children.get(pid, [])
    return out


@pytest.mark.slow
@pytest.mark.bubblewrap
@pytest.mark.parametrize("seed", [0, 1])
def test_the_demo_survives_kills_of_any_of_its_processes(tmp_path, seed):
    """Ten kills each. Any process: the pipeline, a stage, a Ray worker or Ray's own, a verifier's worker, a sandbox."""
    draw, kills, starts = random.Random(seed), 0, 0
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    recipe = find_recipe("demo").read_text().replace('"1000"', '"30"').replace('"300"', '"12"')
    (tmp_path / "small.yaml").write_text(recipe)
    command = [sys.executable, "-P", "-m", "cabochon", "run", "small.yaml", "dir=runs/demo", *SMALL]
    deadline = time.monotonic() + 1500
    with (tmp_path / "log").open("ab") as log:
        while True:
            starts += 1
            run = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=log, stderr=subprocess.STDOUT)
            while kills < 10 and time.monotonic() < deadline:
                try:
                    run.wait(timeout=draw.uniform(1, 20))
                    break
                except subprocess.TimeoutExpired:
                    victim = draw.choice(processes(run.pid))
                    log.write(f"=== kill {kills}: {_name(victim)}\n".encode())
                    log.flush()
                    try:
                        os.kill(victim, signal.SIGKILL)
                        kills += 1
                    except ProcessLookupError:
                        continue
            try:
                code = run.wait(timeout=max(deadline - time.monotonic(), 1))
            except subprocess.TimeoutExpired:
                run.kill()
                pytest.fail("hung:\n" + (tmp_path / "log").read_text()[-4000:])
            if code == 0:
                break
            if code == 2 or starts == 20:
                pytest.fail("does not go on:\n" + (tmp_path / "log").read_text()[-4000:])
            time.sleep(3)  # what belonged to the killed one ends
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said, said[-6000:]
    place = tmp_path / "runs" / "demo"
    assert tuple(json.loads((place / "pipeline.json").read_text())) == STAGES
    for stage, steps in {"sft": 60, "rm": 6, "judge": 8, "rl": 8}.items():
        rows = [json.loads(line) for line in (place / stage / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, steps + 1)), stage
    seen = [_groups(place / "rl" / "rollouts" / f"step_{n:06}.jsonl") for n in range(1, 9)]
    groups = [group for step in seen for group in step]
    assert len(groups) == len(set(groups)), "no group is learnt from twice"
    parents = json.loads((place / "rl" / "manifest.json").read_text())["parents"]
    assert {p["address"]: p["manifest"]["steps"] for p in parents} == {
        "runs/demo/sft/final": 60, "runs/demo/judge/final": 8, "runs/demo/rm/final": 6,
    }  # fmt: skip
    assert (place / "report.html").stat().st_size > 100_000


def _groups(file: Path) -> set[int]:
    return {json.loads(line)["group"] for line in file.read_text().splitlines()}


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:120]
    except OSError:
        return str(pid)

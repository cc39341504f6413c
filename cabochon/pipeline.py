"""`cabochon run RECIPE`: stages in order, each a cabochon command of its own, what is done skipped.

    dir: runs/demo
    stages:
      sft: [sft, demo-sft, "run.dir={dir}/sft"]
      rl: [rl, demo-rl, "model.address={dir}/sft/final", "run.dir={dir}/rl"]

A stage is a process: its memory and its faults are its own, and its command can be copied to a shell. A stage that was
killed is simply started again, for every stage goes on where it stopped. `DIR/pipeline.json` has each stage's command
and time; a stage whose command differs from the one that was done is started again, and so are those after it. One that
learns refuses to go on with settings or inputs other than it began with, unless it is given `--resume-anyway`.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from cabochon import overrides
from cabochon.config import Frozen
from cabochon.console import duration
from cabochon.errors import UserError
from cabochon.files import write_whole

_PDEATHSIG = 1  # prctl(2)
RESUME = "--resume-anyway"


class PipelineConfig(Frozen):
    """The stages of a job, in order."""

    stage: Literal["run"] = "run"
    """which command the recipe is for"""
    dir: str = "runs/unnamed"
    """where all of it goes; `{dir}` in a command is this"""
    stages: dict[str, tuple[str, ...]] = Field(min_length=1)
    """name -> the words of a cabochon command"""

    @field_validator("stages")
    @classmethod
    def _check(cls, stages: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for name, words in stages.items():
            if not re.fullmatch(r"[a-z][a-z0-9_-]*", name) or name == "dir":
                raise ValueError(f"stage {name!r}: a name is lower-case letters, digits, - and _")
            if not words:
                raise ValueError(f"stage {name!r} has no command")
        return stages


def read(parts: Sequence[str]) -> PipelineConfig:
    """A recipe of stages and settings; `STAGE.key=value` is handed to that stage's command.

    Raises UserError for a setting of no stage.
    """
    recipes, settings = overrides.split(parts)
    own = [s for s in settings if s.split("=")[0] == "dir"]
    cfg = overrides.load(PipelineConfig, recipes, own)
    stages = {name: [word.replace("{dir}", cfg.dir) for word in words] for name, words in cfg.stages.items()}
    for setting in settings:
        if setting in own:
            continue
        name, dot, rest = setting.partition(".")
        if not dot or name not in stages:
            raise UserError(
                f"{setting}: expected dir=PLACE or STAGE.key=value, with one of the stages {', '.join(stages)}"
            )
        stages[name].append(rest)
    return PipelineConfig(dir=cfg.dir, stages={name: tuple(words) for name, words in stages.items()})


def run(cfg: PipelineConfig, resuming: Collection[str] = ()) -> None:
    """Run what is not done yet; `resuming`: stages to be given `--resume-anyway`. Raises SystemExit with a stage's own
    exit code where one fails, after saying how to go on; UserError where another process has the directory."""
    place = Path(cfg.dir)
    place.mkdir(parents=True, exist_ok=True)
    with (place / ".pipeline.lock").open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{place}: another process runs its stages; wait for it, or give another dir") from None
        done = _done(place)
        for number, (name, words) in enumerate(cfg.stages.items(), 1):
            title = f"[{number}/{len(cfg.stages)}] {name}"
            if done.get(name, {}).get("command") == list(words) and _there(words):
                print(f"{title}: done before, in {duration(done[name]['seconds'])}", flush=True)
                continue
            for later in list(cfg.stages)[number - 1 :]:  # what follows is made of this, also where this is killed
                done.pop(later, None)
            write_whole(place / "pipeline.json", json.dumps(done, indent=1) + "\n")
            print(f"{title}: cabochon {shlex.join(words)}", flush=True)
            begin = time.monotonic()
            if code := _command((*words, *([RESUME] if name in resuming else []))):
                print(f"{title}: stopped with exit code {code}; {_how_on(code, name in resuming)}", file=sys.stderr)
                raise SystemExit(code)
            done[name] = {"command": list(words), "seconds": time.monotonic() - begin}
            write_whole(place / "pipeline.json", json.dumps(done, indent=1) + "\n")
            print(f"{title}: done in {duration(done[name]['seconds'])}", flush=True)
    total = duration(sum(stage["seconds"] for stage in done.values()))
    print(f"{place}: all {len(cfg.stages)} stages are done, {total} in all", flush=True)


def _there(words: Sequence[str]) -> bool:
    """Is the run still where its command put it? Removing its directory is how a stage is begun anew."""
    return all(Path(word.removeprefix("run.dir=")).is_dir() for word in words if word.startswith("run.dir="))


def _how_on(code: int, resumes: bool) -> str:
    if code != 2 or resumes:  # 2: what the user gave
        return "the same command goes on from here"
    return (
        f"once that is mended, the same command goes on from here. With {RESUME} a stage that was begun goes on with "
        "other settings or inputs, from what it learnt with the old ones; to begin it anew, remove its directory"
    )


def _command(words: Sequence[str]) -> int:
    """The exit code of a cabochon command; it ends with this process, also where this one is killed."""
    libc, parent = ctypes.CDLL(None), os.getpid()

    def tie() -> None:
        if sys.platform.startswith("linux"):
            libc.prctl(_PDEATHSIG, signal.SIGTERM)
            if os.getppid() != parent:
                os._exit(1)

    child = subprocess.Popen([sys.executable, "-m", "cabochon", *words], preexec_fn=tie)
    # a terminal sends Ctrl-C to both: the child saves and leaves, and this one waits for it
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)
    terminate = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        code = child.wait()
    finally:
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, terminate)
    return 128 - code if code < 0 else code


def _done(place: Path) -> dict[str, Any]:
    file = place / "pipeline.json"
    if not file.exists():
        return {}
    try:
        stages: Mapping[str, Any] = json.loads(file.read_text())
        return {name: {"command": [*s["command"]], "seconds": float(s["seconds"])} for name, s in stages.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file}: not what this command writes; remove it to run every stage again") from None



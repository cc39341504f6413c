"""`cabochon submit`: a recipe as a job on a running Ray cluster, through its job server.

What is sent is a directory: this package, the resolved recipe, and the local files it names. What the job's machines
need beforehand is what cabochon depends on, and everything too large to send, on a disk they see or at `hf:` names.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import BaseModel

from cabochon import overrides, pipeline
from cabochon.cli_stages import load_recipe
from cabochon.errors import MachineError, UserError
from cabochon.pipeline import PipelineConfig

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ANSWER_SECONDS = 20.0
"""for the job server to answer one question"""
SEND_SECONDS = 300.0
"""for it to take what is sent"""
LOST_SECONDS = 60.0
"""without an answer, while a job is followed, before it is given up"""
LOOK_SECONDS = 2.0
MOST_BYTES = 200e6
"""of the local files; Ray refuses packages of 500 MiB"""
COMMANDS = {
    "distill": ("distill",), "rl": ("rl",), "rm": ("rm", "train"), "run": ("run",), "sft": ("sft",),
    "tasks": ("tasks", "make"),
}  # fmt: skip
"""stage -> the words of its command"""
WRITTEN = {"dir", "out"}
"""keys whose places are written, not read"""


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """What is sent and what is run there."""

    entrypoint: str
    stays: str
    """the run directory, where it would vanish with the job; empty where it is an absolute path"""


def pack(parts: list[str], into: Path) -> Parcel:
    """Fill the directory `into` and say what to run in it. Raises UserError for a recipe that is no stage, or files
    that are too large to send.
    """
    name = overrides.peek(*overrides.split(parts), "stage")
    if name not in COMMANDS:
        raise UserError(f"stage {name!r} is no job: expected a recipe of one of the stages {', '.join(COMMANDS)}")
    cfg: BaseModel = pipeline.read(parts) if name == "run" else load_recipe(parts)
    package = Path(__file__).resolve().parent
    # the rooms are links to folders beside the package: what is sent has them inside
    shutil.copytree(package, into / "cabochon", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    sent = Files(into / "files")
    plain = sent.gathered(cfg.model_dump(mode="json"))
    shipped = type(cfg).model_validate(plain)
    (into / "recipe.yaml").write_text(overrides.dump(shipped))
    words = ["python", "-m", "cabochon", *COMMANDS[name], "recipe.yaml"]
    place = cfg.dir if isinstance(cfg, PipelineConfig) else str(getattr(getattr(cfg, "run", None), "dir", "") or "")
    return Parcel(entrypoint=shlex.join(words), stays="" if os.path.isabs(place) else place)


class Files:
    """Copies what a recipe names on this machine's disk below `root`, and says what it is called there."""

    def __init__(self, root: Path):
        self.root, self.bytes = root, 0
        self.names: dict[Path, str] = {}

    def gathered(self, value: Any, key: str = "") -> Any:
        """The recipe's data with each local file or directory replaced by its place among what is sent."""
        match value:
            case dict():
                return {k: self.gathered(v, k) for k, v in value.items()}
            case list():
                return [self.gathered(v, key) for v in value]
            case str() if key not in WRITTEN:
                return self._sent(value)
        return value

    def _sent(self, text: str) -> str:
        key, equals, value = text.partition("=")
        if equals and re.fullmatch(r"[\w.]+", key):  # a setting among the words of a command
            return text if key.rpartition(".")[2] in WRITTEN else f"{key}={self._sent(value)}"
        if text.startswith("[") and text.endswith("]"):
            return f"[{', '.join(self._sent(item.strip()) for item in text[1:-1].split(','))}]"
        path = Path(text)
        # a word without a slash or a suffix is a name, whatever lies in this directory
        if not ("/" in text or path.suffix) or not path.exists():
            return text
        return self._copied(path.resolve())

    def _copied(self, path: Path) -> str:
        if path not in self.names:
            size = sum(p.stat().st_size for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())
            self.bytes += size
            if self.bytes > MOST_BYTES:
                raise UserError(
                    f"{path}: with it the recipe's files are {self.bytes / 1e6:.0f} MB, more than the "
                    f"{MOST_BYTES / 1e6:.0f} MB that are sent; put it on a disk the cluster sees, or use hf:owner/name"
                )
            name = f"{len(self.names)}/{path.name}"
            (self.root / name).parent.mkdir(parents=True)
            copy = shutil.copy if path.is_file() else shutil.copytree
            copy(path, self.root / name)
            self.names[path] = f"files/{name}"
        return self.names[path]


# -- the job server ----------------------------------------------------------------------------------------------------


def connect(address: str) -> JobSubmissionClient:
    """Raises UserError for what is no address, MachineError where no job server answers there in time."""
    if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).netloc:
        raise UserError(f"--address {address}: expected the job server's, such as http://head-node:8265")
    import requests

    try:
        reply = requests.get(f"{address.rstrip('/')}/api/version", timeout=ANSWER_SECONDS)
        if reply.status_code not in (401, 403):  # Ray's too, where the cluster wants a token: its client knows of those
            reply.raise_for_status()
            reply.json()["ray_version"]
    except (requests.RequestException, ValueError, KeyError) as error:
        why = "not Ray's job server" if not isinstance(error, requests.ConnectionError) else "nothing answers there"
        raise MachineError(f"--address {address}: {why}; expected one such as http://head-node:8265") from None
    if importlib.util.find_spec("aiohttp") is None:  # of which Ray's client says nothing that is of use
        raise UserError("Ray's job client is not installed: pip install 'cabochon[cluster]'")
    os.environ.pop("RAY_ADDRESS", None)  # would win over the address that was given
    os.environ.pop("RAY_API_SERVER_ADDRESS", None)
    from ray.dashboard.modules.job.sdk import JobSubmissionClient
    from ray.exceptions import AuthenticationError

    for name in ("", ".dashboard.modules.job.sdk", ".dashboard.modules.dashboard_sdk"):  # each sets a level of its own
        logging.getLogger(f"ray{name}").setLevel(logging.ERROR)

    class Client(JobSubmissionClient):  # Ray's asks without a deadline
        def _do_request(self, method: str, endpoint: str, **kwargs: Any) -> Any:
            kwargs.setdefault("timeout", SEND_SECONDS if method == "PUT" else ANSWER_SECONDS)
            return super()._do_request(method, endpoint, **kwargs)

    try:
        return Client(address)
    except AuthenticationError:
        raise MachineError(
            f"--address {address}: the cluster wants a token: set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to its file"
        ) from None
    except (RuntimeError, ConnectionError, requests.RequestException) as error:
        raise MachineError(f"--address {address}: {str(error).strip().splitlines()[0][:300]}") from None


def submit(client: JobSubmissionClient, parts: list[str], told: Callable[[str], None]) -> str:
    """Send a recipe; the job's id. Raises UserError as `pack` does, MachineError where the server refuses it."""
    import requests

    with tempfile.TemporaryDirectory(prefix="cabochon-submit-") as scratch:
        parcel = pack(parts, Path(scratch))
        env = {"working_dir": scratch, "env_vars": {"PYTHONUNBUFFERED": "1"}}
        try:
            job = client.submit_job(entrypoint=parcel.entrypoint, runtime_env=env)
        except (RuntimeError, requests.RequestException) as error:
            raise MachineError(f"the job server took no job: {str(error).strip().splitlines()[-1][:300]}") from None
    told(f"job {job}: {parcel.entrypoint}")
    if parcel.stays:
        told(
            f"its run directory {parcel.stays} is in the job's scratch space and goes with it; for one that stays, set "
            "an absolute path on a disk the cluster shares"
        )
    return job


def follow(client: JobSubmissionClient, job: str, write: Callable[[str], None]) -> int:
    """Write the job's log as it grows; its exit status when it has ended. Raises MachineError when the job server does
    not answer for LOST_SECONDS.
    """
    import requests

    shown, answered = 0, time.monotonic()
    while True:
        try:
            info = client.get_job_info(job)  # before the log: what it wrote last is in the log by then
            log = client.get_job_logs(job)
            answered = time.monotonic()
        except (RuntimeError, requests.RequestException) as error:
            if time.monotonic() - answered > LOST_SECONDS:
                raise MachineError(
                    f"job {job}: no answer for {LOST_SECONDS:g} s ({type(error).__name__}); it may well go on"
                ) from None
            time.sleep(LOOK_SECONDS)
            continue
        write(log[shown:])
        shown = len(log)
        if info.status.is_terminal():
            if info.status != "SUCCEEDED":
                why = (info.message or "").strip().partition("\n")[0][:300]
                print(f"job {job} {info.status.lower()}: {why}", file=sys.stderr)
            code = info.driver_exit_code
            return 0 if info.status == "SUCCEEDED" else code if code and code > 0 else 1
        time.sleep(LOOK_SECONDS)


def how_to(address: str, job: str) -> str:
    """What to do about a job that is no longer followed."""
    return (
        f"job {job} goes on. Its log: ray job logs {job} --follow --address {address}; "
        f"to stop it: ray job stop {job} --address {address}"
    )

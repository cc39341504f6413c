"""The Docker engine: connecting to it, and its failures as one line with the fix."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import docker
import docker.errors
import docker.utils
import requests

from cabochon.errors import UserError

FAILURES = (docker.errors.DockerException, requests.exceptions.RequestException, OSError)
"""What an engine that is gone looks like."""


def address(base_url: str | None) -> str:
    return base_url or os.environ.get("DOCKER_HOST") or "unix:///var/run/docker.sock"


def connect(base_url: str | None, timeout: int = 60) -> docker.APIClient:
    """A client that has spoken to its engine. Raises one of FAILURES."""
    environment = dict(os.environ)
    if base_url:
        environment["DOCKER_HOST"] = base_url
    settings = docker.utils.kwargs_from_env(environment=environment)
    return docker.APIClient(version="auto", timeout=timeout, num_pools=64, **settings)


@contextlib.contextmanager
def engine_errors(base_url: str | None, image: str = "") -> Iterator[None]:
    """Turns what an engine's absence, refusal or missing image raises into a UserError."""
    where = address(base_url)
    try:
        yield
    except docker.errors.ImageNotFound as e:
        raise UserError(f"docker image {image!r} is not on the engine at {where}: docker pull {image}, or build one "
                        "from this "
                        "machine with `cabochon sandbox image --from-host` and name it") from e  # fmt: skip
    except FAILURES as e:
        chain: list[BaseException] = [e]
        while (inner := chain[-1].__cause__ or chain[-1].__context__) is not None:
            chain.append(inner)
        text = str(e)
        if any(isinstance(c, PermissionError) for c in chain) or "Permission denied" in text:
            fix = "no permission on it: add yourself to its group (sudo usermod -aG docker $USER, then log in again)"
        elif any(isinstance(c, FileNotFoundError | ConnectionError) for c in chain) or "Connection" in text:
            fix = "nothing answers there: start the engine (sudo systemctl start docker) or set DOCKER_HOST"
        else:
            fix = f"it refused: {text.splitlines()[0][:300] if text else type(e).__name__}"
        raise UserError(f"docker engine at {where}: {fix}") from e

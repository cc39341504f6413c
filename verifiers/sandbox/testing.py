"""Real sandboxes for tests and benchmarks, or the reason why this machine has none."""

from __future__ import annotations

from cabochon.errors import UserError
from cabochon.verifiers.sandbox.base import Limits, SandboxError, python_program
from cabochon.verifiers.sandbox.bubblewrap import BubblewrapSandbox
from cabochon.verifiers.sandbox.docker import DockerSandbox
from cabochon.verifiers.sandbox.engine import FAILURES, connect, engine_errors
from cabochon.verifiers.sandbox.image import AGENT_LABEL, FROM_HOST, build
from cabochon.verifiers.sandbox.process import ProcessSandbox
from cabochon.verifiers.sandbox.rootfs import agent_key

AnySandbox = BubblewrapSandbox | DockerSandbox | ProcessSandbox


def host_image() -> str:
    """The image made from this machine, built where the engine has none or an older one. Raises UserError."""
    with engine_errors(None):
        api = connect(None)
        try:
            known = {tag: image["Labels"] for image in api.images() for tag in image.get("RepoTags") or ()}
        finally:
            api.close()
    if (known.get(FROM_HOST) or {}).get(AGENT_LABEL) != agent_key():
        build(FROM_HOST)
    return FROM_HOST


def sandbox(kind: str, limits: Limits | None = None, warm: int = 3) -> AnySandbox:
    """A sandbox of this kind that has run a program. Raises UserError where the machine has none."""
    if kind == "process":
        return ProcessSandbox(limits=limits)
    made: AnySandbox
    if kind == "docker":
        made = DockerSandbox(image=host_image(), limits=limits, warm=warm)
    elif kind == "bubblewrap":
        made = BubblewrapSandbox(limits=limits, warm=warm)
    else:
        raise ValueError(f"kind must be process, docker or bubblewrap, got {kind!r}")
    try:
        if made.run(python_program("print(6 * 7)"), Limits(wall_seconds=30.0)).stdout != b"42\n":
            raise UserError(f"the {kind} sandbox does not run a program")
    except (SandboxError, *FAILURES) as e:
        made.close()
        raise UserError(f"the {kind} sandbox: {e}") from e
    return made

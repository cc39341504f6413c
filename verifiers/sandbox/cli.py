"""`cabochon sandbox attack` and `cabochon sandbox image`."""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import TYPE_CHECKING, Annotated

import typer

from cabochon.errors import UserError

if TYPE_CHECKING:
    from cabochon.verifiers.sandbox.attacks import Finding, Inhabited


def attack_command(
    sandbox: Annotated[str, typer.Option(help="bubblewrap or docker")] = "bubblewrap",
    image: Annotated[str, typer.Option(help="the docker image; default: the one built from this machine")] = "",
    runtime: Annotated[str, typer.Option(help="the docker runtime; runsc is gVisor")] = "",
    group: Annotated[list[str] | None, typer.Option(help="only these groups: forging, escaping, spying, ...")] = None,
    every: Annotated[
        bool, typer.Option("--every", help="a line for every program, not only for those that won")
    ] = False,
) -> None:
    """Run the shipped attack suite against this machine's sandbox; exit code 1 where one program won.

    Example: cabochon sandbox attack --sandbox docker --group forging
    """
    from cabochon.verifiers.sandbox import attacks

    if sandbox != "docker" and (image or runtime):
        raise UserError(f"--{'image' if image else 'runtime'} is of --sandbox docker, got --sandbox {sandbox}")
    wanted = [a for a in attacks.suite() if not group or a.group in group]
    if not wanted:
        raise UserError(
            f"--group is one of {', '.join(sorted({a.group for a in attacks.suite()}))}, got {', '.join(group or [])}"
        )
    findings = []
    started = time.monotonic()
    backend = _backend(sandbox, image, runtime)
    try:
        for finding in attacks.run(backend, wanted):
            findings.append(finding)
            if every or finding.problem:
                print(line(finding), flush=True)
            elif sys.stderr.isatty():
                print(f"\r{len(findings)}/{len(wanted)}", end="", file=sys.stderr, flush=True)
    finally:
        backend.close()
    print(f"{sandbox}: {len(findings)} programs in {time.monotonic() - started:.0f} s")
    print(table(findings))
    raise typer.Exit(1 if any(f.problem for f in findings) else 0)


def line(finding: Finding) -> str:
    """One program on one line."""
    mark = "WON " if finding.problem else "held"
    verdict = finding.verdict
    name = f"{finding.attack.group:10} {finding.attack.name[:40]:40}"
    return f"{mark} {name} {verdict.status:11} {verdict.seconds:5.1f} s  {finding.problem}"


def table(findings: list[Finding]) -> str:
    """Programs by group: how many, how many held, and what their verdicts were."""
    rows = [f"{'group':12}{'programs':>9}{'held':>6}{'won':>5}  verdicts"]
    for group in dict.fromkeys(f.attack.group for f in findings):
        mine = [f for f in findings if f.attack.group == group]
        won = sum(bool(f.problem) for f in mine)
        counts = Counter(f.verdict.status for f in mine)
        said = ", ".join(f"{status} {n}" for status, n in counts.most_common())
        rows.append(f"{group:12}{len(mine):>9}{len(mine) - won:>6}{won:>5}  {said}")
    return "\n".join(rows)


def _backend(name: str, image: str, runtime: str) -> Inhabited:
    from cabochon.verifiers.sandbox import attacks

    if name == "bubblewrap":
        from cabochon.verifiers.sandbox.bubblewrap import BubblewrapSandbox

        return BubblewrapSandbox(limits=attacks.LIMITS, warm=3)
    if name == "docker":
        from cabochon.verifiers.sandbox.docker import DockerSandbox
        from cabochon.verifiers.sandbox.image import FROM_HOST

        return DockerSandbox(image=image or FROM_HOST, limits=attacks.LIMITS, warm=3, runtime=runtime)
    raise UserError(f"--sandbox is bubblewrap or docker, got {name!r}")


def image_command(
    from_host: Annotated[
        bool, typer.Option("--from-host", help="pack this machine's Python; no registry is asked")
    ] = False,
    name: Annotated[str, typer.Option(help="the image's name")] = "",
    package: Annotated[
        list[str] | None, typer.Option(help="an importable package to bring along; repeat for more")
    ] = None,
) -> None:
    """Build the image of the docker sandbox on this machine's engine.

    Example: cabochon sandbox image --from-host --package sympy --package mpmath
    """
    from cabochon.verifiers.sandbox import image

    if not from_host:
        raise UserError(
            f"say --from-host to build from this machine, or `docker pull {image.PUBLIC}` for the public image"
        )
    target = name or image.FROM_HOST
    identity = image.build(target, tuple(package or ()))
    print(f"{target} {identity.removeprefix('sha256:')[:12]} {image.root_size(tuple(package or ())) >> 20} MiB")

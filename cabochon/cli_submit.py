"""`cabochon submit`: a plain function with typer's annotations, registered by the roof."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cabochon.cli_stages import Parts


def submit(
    parts: Parts,
    address: Annotated[str, typer.Option(help="the job server of a running Ray cluster: http://head-node:8265")],
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="follow the log until the job ends")] = True,
) -> None:
    """Run a recipe on a Ray cluster: sends this package, the recipe and the local files it names; follows the log and
    ends with the job's exit code. Ctrl-C stops following, not the job.

    Example: cabochon submit demo-rl --address http://127.0.0.1:8265 run.dir=/shared/runs/rl
    """
    from cabochon import submit as jobs

    client = jobs.connect(address)
    job = jobs.submit(client, parts, told=lambda line: print(line, file=sys.stderr, flush=True))
    if not wait:
        print(job)
        print(jobs.how_to(address, job), file=sys.stderr)
        return

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    try:
        code = jobs.follow(client, job, write)
    except KeyboardInterrupt:
        print(f"\n{jobs.how_to(address, job)}", file=sys.stderr)
        raise typer.Exit(130) from None
    raise typer.Exit(code)

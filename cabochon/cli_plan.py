"""`cabochon plan`: a plain function with typer's annotations, registered by the roof."""

from __future__ import annotations

import sys
from functools import partial
from typing import Annotated

import typer

from cabochon.cli_stages import Parts
from cabochon.errors import UserError


def plan(
    parts: Parts,
    topology: Annotated[str, typer.Option(help="the slice: v5p:4x4x4, v5p:2x2x1, v6e:4x4, ...")],
    json: Annotated[bool, typer.Option("--json", help="one JSON object instead of lines")] = False,
    seconds: Annotated[float, typer.Option(min=1, help="for the compiler, at each try")] = 1200.0,
) -> None:
    """Compile a recipe's programs for a TPU slice that is not here: memory, collectives, operations, what does fit.

    Exit code 2 where it does not fit. Example: cabochon plan qwen3-30b-a3b-v5p --topology v5p:4x4x4
    """
    from cabochon import tpu_plan

    found = tpu_plan.plan(
        parts, tpu_plan.checked_topology(topology), partial(tpu_plan.compile_elsewhere, seconds=seconds),
        told=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    if json:
        import json as text

        print(text.dumps(found))
    else:
        print("\n".join(tpu_plan.as_lines(found)))
    if not found["fits"]:
        raise UserError(tpu_plan.refusal(found))

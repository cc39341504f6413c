"""`cabochon report`, `cabochon view`: plain functions with typer's annotations, registered by the roof."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cabochon.errors import UserError
from cabochon.files import write_whole

Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="directories of runs, or of a whole job")]


def report(
    runs: Runs,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="the file to write; else report.html in RUN")] = None,
) -> None:
    """Write runs as one HTML file that needs no network: verdict, curves, experts, completions, lineage.

    Example: cabochon report runs/demo -o demo.html
    """
    from cabochon.console import one_line
    from cabochon.report import build

    out = out or runs[0] / "report.html"
    text, verdicts = build.report(runs)
    write_whole(out, text)
    for line in (*verdicts, f"{out}   {len(text.encode()) / 1e6:.1f} MB"):
        print(one_line(line, 2000))


def view(
    runs: Runs,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free")] = 8765,
) -> None:
    """Show runs in a browser as they go on, from a server that this machine alone can reach.

    Example: cabochon view runs/demo/rl runs/other
    """
    try:
        from cabochon.report import view as server
    except ImportError as error:
        raise UserError(f"cabochon view needs {error.name}: pip install 'cabochon[serve]'") from None

    server.serve(runs, port)

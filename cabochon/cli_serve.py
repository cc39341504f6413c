"""`cabochon serve`."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer

from cabochon.errors import UserError

KEY_ENV = "CABOCHON_API_KEY"


def serve(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="a directory, a .gguf file, hf:owner/name or smollm2-135m-instruct")
    ],
    host: Annotated[str, typer.Option(help="address to listen on; 0.0.0.0 for every network")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 for any that is free")] = 8000,
    name: Annotated[str | None, typer.Option(help="what clients call the model  [default: MODEL]")] = None,
    slots: Annotated[int, typer.Option(min=1, help="samples drawn together")] = 8,
    queue: Annotated[int, typer.Option(min=0, help="samples that may wait; more are refused with 429")] = 64,
    length: Annotated[int, typer.Option(min=16, help="prompt and completion together, in tokens")] = 2048,
    max_tokens: Annotated[int, typer.Option(min=1, help="new tokens of one sample at most")] = 1024,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds for a request, waiting included")] = 600.0,
    grace: Annotated[float, typer.Option(min=1.0, help="seconds requests have left at Ctrl-C or SIGTERM")] = 30.0,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="of weights and cache")] = "float32",
    api_key_file: Annotated[
        Path | None, typer.Option(help=f"file with the key clients must send; else ${KEY_ENV}, else none")
    ] = None,
) -> None:
    """Serve a model over OpenAI's API: chat, completions, log-probs, streams; requests are drawn together.

    Example: cabochon serve smollm2-135m-instruct --port 8000
    """
    for package in ("fastapi", "uvicorn"):
        if find_spec(package) is None:
            raise UserError(f"serving needs {package}: pip install 'cabochon[serve]'")
    from cabochon.serve.server import ModelServer, ServerConfig, bound, is_loopback, open_sampler

    cfg = ServerConfig(
        host=host, port=port, slots=slots, queue=queue, length=length, max_tokens=max_tokens,
        timeout=timeout, grace=grace, dtype=dtype,
    )  # fmt: skip
    key = _key(api_key_file)
    if key is None and not is_loopback(host):
        print(f"anybody who reaches {host} can use this server: set {KEY_ENV} or --api-key-file", file=sys.stderr)
    sock = bound(cfg)  # said at once where it cannot be had: reading and compiling take a while
    print(f"{model}: reading and compiling", file=sys.stderr)
    server = ModelServer(open_sampler(model, cfg), name or model, cfg, key, sock)
    server.run(lambda: print(f"{server.name}: {server.address}", flush=True))


def _key(file: Path | None) -> str | None:
    """Raises UserError for a key that is empty or cannot be sent."""
    if file is None:
        key, source = os.environ.get(KEY_ENV), KEY_ENV
        if key is None:
            return None
    else:
        try:
            key, source = file.read_text(encoding="utf-8"), str(file)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--api-key-file {file}: cannot be read: {error}") from None
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"{source}: expected one line of printable ASCII without spaces")
    return key

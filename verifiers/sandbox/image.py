"""A docker image without a registry: this machine's own Python, packed as the one layer."""

from __future__ import annotations

import pathlib
import tarfile
import tempfile

from cabochon.verifiers.sandbox import rootfs
from cabochon.verifiers.sandbox.engine import connect, engine_errors

PUBLIC = "python:3.12-slim"
"""The default image, from a registry."""
FROM_HOST = "cabochon-sandbox:host"
AGENT_LABEL = "cabochon.agent"
"""Which version of our modules an image carries; with another one it works too, but starts slower."""


def build(name: str = FROM_HOST, packages: tuple[str, ...] = (), base_url: str | None = None) -> str:
    """Imports the cached root folder as image `name`; gives its id. Raises UserError where there is no engine."""
    repository, _, tag = name.partition(":")
    root = rootfs.cached(packages)
    with engine_errors(base_url), tempfile.TemporaryFile() as file:
        with tarfile.open(fileobj=file, mode="w") as tar:
            # the root's own agent folder is an empty mount point, and an archive may name a folder once only
            tar.add(root, arcname=".", filter=lambda info: None if info.name == "./agent" else _anonymous(info))
            tar.add(rootfs.agent(), arcname="./agent", filter=_anonymous)
        file.seek(0)
        api = connect(base_url, timeout=300)
        changes = ["ENV PATH=/usr/bin", f"LABEL {AGENT_LABEL}={rootfs.agent_key()}"]
        try:
            api.import_image_from_data(file, repository=repository, tag=tag or "latest", changes=changes)
            return str(api.inspect_image(name)["Id"])
        finally:
            api.close()


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = 0
    info.uname = info.gname = ""
    return info


def root_size(packages: tuple[str, ...] = ()) -> int:
    """Bytes of the root folder an image is made of."""
    root: pathlib.Path = rootfs.cached(packages)
    return sum(p.stat().st_size for p in root.rglob("*") if p.is_file() and not p.is_symlink())

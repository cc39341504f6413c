"""One table from the logical axes of parameters and activations to mesh axes; everything else follows from it.

Mesh axes: `data` copies the parameters, `fsdp` splits them and the batch, `expert` splits experts and the batch,
`tensor` splits heads, ffn columns and the vocabulary.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as Spec

from cabochon.config import AXES, MeshConfig

RULES: dict[str | None, str | None] = {
    "vocab": "tensor",
    "embed": "fsdp",
    "kv_heads": "tensor",
    "ffn": "tensor",
    "experts": "expert",
    "layers": None,
    None: None,
}
ROWS = ("data", "fsdp", "expert")
"""Mesh axes that split the rows of a batch."""


def make_mesh(cfg: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh of all devices, axes in the order of AXES. Raises UserError where sizes do not multiply up."""
    devices = jax.devices() if devices is None else devices
    shape = cfg.shape(len(devices))
    grid = np.array(devices).reshape([shape[axis] for axis in AXES])
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def row_shards(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return int(np.prod([mesh.shape[axis] for axis in ROWS]))


def spec_for(axes: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh) -> Spec:
    """Partition of one array. A dim that its mesh axis does not divide is replicated (3 kv heads on 2 devices, say)."""
    parts = []
    for name, size in zip(axes, shape, strict=True):
        axis = RULES[name]
        parts.append(axis if axis is not None and size % mesh.shape[axis] == 0 else None)
    return Spec(*parts)


def param_shardings(axes: Any, abstract: Any, mesh: Mesh) -> Any:
    """A tree of NamedSharding from the trees of logical axes and of shapes."""
    return jax.tree.map(
        lambda names, leaf: NamedSharding(mesh, spec_for(names, leaf.shape, mesh)),
        axes,
        abstract,
        is_leaf=lambda a: isinstance(a, tuple),
    )


def mesh_of(cfg: MeshConfig) -> Mesh | None:
    """All devices in the recipe's arrangement; None where there is one, which needs no placing."""
    mesh = make_mesh(cfg)
    return mesh if mesh.size > 1 else None


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, Spec())


def rows(mesh: Mesh) -> NamedSharding:
    """Of any array whose first dim is the rows of a batch."""
    return NamedSharding(mesh, Spec(ROWS))


def place(batch: Any, mesh: Mesh | None) -> Any:
    """A batch (any tree of arrays [B, ...]) with its rows spread over the mesh; as it is without one."""
    return batch if mesh is None else jax.device_put(batch, rows(mesh))


def keep_rows(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Tell the partitioner that x is split by rows alone: it then gathers weights, not activations."""
    return x if mesh is None or mesh.size == 1 else jax.lax.with_sharding_constraint(x, rows(mesh))

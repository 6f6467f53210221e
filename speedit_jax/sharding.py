"""The mesh and the one rule table from logical axis names to mesh axes.

Mesh axes:
  data    batch only; parameters are replicated over it
  fsdp    batch, and one axis of every large parameter (ZeRO-3)
  tensor  attention heads and the MLP's hidden width (Megatron: column-parallel in, row-parallel out)
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from speedit_jax.errors import UserError
from speedit_jax.storage import first_line

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
HEAD_AXIS = "tensor"

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": BATCH_AXES,
    "embed": "fsdp",
    "heads": HEAD_AXIS,
    "mlp": "tensor",
    "layers": None,
    None: None,
}


def make_mesh(sizes: dict[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `sizes` over all devices; one size may be -1 and takes what is left.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or there are none of the platform asked for.
    """
    try:
        devices = jax.devices() if devices is None else devices
    except (RuntimeError, AssertionError) as e:
        raise UserError(
            f"JAX_PLATFORMS={jax.config.jax_platforms}: {first_line(e)}; unset it to use this machine's devices"
        ) from e
    shape = [sizes[axis] for axis in AXES]
    shown = ", ".join(f"mesh.{axis}={n}" for axis, n in zip(AXES, shape, strict=True))
    if any(n == 0 or n < -1 for n in shape) or shape.count(-1) > 1:
        raise UserError(f"{shown}: sizes must be positive, except for at most one -1")
    known = math.prod(n for n in shape if n != -1)
    shape = [len(devices) // known if n == -1 else n for n in shape]
    if math.prod(shape) != len(devices):
        raise UserError(f"{shown} does not match {len(devices)} devices; set one size to -1 to use all of them")
    return jax.make_mesh(tuple(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def spec(names: Sequence[str | None]) -> P:
    """Logical axis names of one array -> its PartitionSpec.

    Raises:
      ValueError: two axes of the array want the same mesh axis; the message names both.
    """
    taken: dict[str, str | None] = {}
    for name in names:
        target = RULES[name]
        for axis in (target,) if isinstance(target, str) else target or ():
            if axis in taken:
                raise ValueError(f"logical axes {taken[axis]!r} and {name!r} of {tuple(names)} both map to {axis!r}")
            taken[axis] = name
    return P(*(RULES[name] for name in names))


def constrain(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
    """Pins an activation's sharding under the ambient mesh; without one, as where a network is called by hand, does nothing."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, spec(names))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis over data and fsdp."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def batch_devices(mesh: Mesh) -> int:
    """Over how many devices a batch is divided."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def param_shardings(mesh: Mesh, axes: Any, shapes: Any) -> Any:
    """Shardings like `axes`, a tree of logical names.

    Raises:
      UserError: a parameter's axis is not divisible by the mesh axis it maps to.
    """

    def one(path, names, shape):
        partition = spec(names)
        for size, target, name in zip(shape.shape, partition, names, strict=True):
            ways = mesh.shape[target] if isinstance(target, str) else 1
            if size % ways:
                raise UserError(
                    f"mesh.{target}={ways} does not divide the {size} {name} of parameter"
                    f" {jax.tree_util.keystr(path, simple=True, separator='/')}; choose a size that does"
                )
        return NamedSharding(mesh, partition)

    return jax.tree_util.tree_map_with_path(one, axes, shapes, is_leaf=lambda x: isinstance(x, tuple))


def local_rows(sharding: NamedSharding, batch: int) -> np.ndarray:
    """Rows of the global batch that this process's devices hold, in order: what it has to load."""
    rows = set()
    for (rows_slice,) in sharding.addressable_devices_indices_map((batch,)).values():
        rows.update(range(*rows_slice.indices(batch)))
    return np.array(sorted(rows))


def global_array(sharding: NamedSharding, batch: int, rows: np.ndarray, values: np.ndarray) -> jax.Array:
    """The global array [batch, ...] of which this process holds `values`, the rows numbered `rows`."""
    position = {row: i for i, row in enumerate(rows)}

    def shard(index):
        first, last, _ = index[0].indices(batch)
        return values[position[first] : position[first] + last - first]

    return jax.make_array_from_callback((batch, *values.shape[1:]), sharding, shard)


def from_host(sharding: NamedSharding, values: np.ndarray) -> jax.Array:
    """The global array of `values`, which every process holds whole."""
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def table(axes: Any, shapes: Any) -> str:
    """Every parameter's path, shape and PartitionSpec, one a line."""

    def line(path, names, shape):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return f"{name:<32} {tuple(shape.shape)!s:<24} {', '.join(map(str, spec(names)))}"

    lines = jax.tree_util.tree_map_with_path(line, axes, shapes, is_leaf=lambda x: isinstance(x, tuple))
    return "\n".join(jax.tree.leaves(lines))

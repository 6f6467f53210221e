"""The mesh and the one rule table from logical axis names to mesh axes.

Mesh axes:
  data    batch only; parameters are replicated over it
  fsdp    batch, and one axis of every large parameter (ZeRO-3)
  tensor  attention heads and the MLP's hidden width (Megatron: column-parallel in, row-parallel out)

Several slices of TPUs divide `data` among them, so that only what is summed over it, the gradient, crosses the network between
slices.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
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


def parse_mesh(words: Sequence[str]) -> dict[str, int]:
    """Of a flag, ["fsdp=4", "tensor=2"], sizes for `make_mesh`; `data` takes the rest unless it is given.

    Raises:
      UserError: a word is something else.
    """
    sizes = dict.fromkeys(AXES, 1) | {"data": -1}
    for word in words:
        axis, _, size = word.partition("=")
        if axis not in AXES or not size.removeprefix("-").isdecimal():
            raise UserError(f"--mesh={','.join(words)}: write sizes of {', '.join(AXES)}, as in fsdp=4,tensor=2")
        sizes[axis] = int(size)
    return sizes


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of `sizes` over all devices; one size may be -1 and takes what is left.

    Args:
      sizes: of each axis; and "slices", among how many slices `data` is divided. If left out, as many as there are.

    Raises:
      UserError: the sizes do not multiply to the number of devices, the slices are not those of the devices, or there are no
        devices of the platform asked for.
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
    known, rest = math.prod(n for n in shape if n != -1), -1 in shape
    shape = [len(devices) // known if n == -1 else n for n in shape]
    if math.prod(shape) != len(devices):
        way = "choose sizes whose product divides that" if rest else "set one size to -1 to use all of them"
        raise UserError(f"{shown} does not match {len(devices)} devices; {way}")
    types = (AxisType.Auto,) * len(AXES)
    if len({_slice(device) for device in devices}) == 1 and sizes.get("slices", 1) == 1:
        return jax.make_mesh(tuple(shape), AXES, axis_types=types, devices=devices)
    return Mesh(_over_slices(shape, sizes.get("slices"), devices), AXES, axis_types=types)


def _slice(device: jax.Device) -> int:
    return getattr(device, "slice_index", 0)


def _over_slices(shape: list[int], slices: int | None, devices: Sequence[jax.Device]) -> np.ndarray:
    """The devices of several slices as an array of `shape`, whose first axis is divided among the slices.

    Args:
      slices: how many there should be; None takes what is there.

    Raises:
      UserError: they are not as many, or do not divide the first axis.
    """
    there, tpu = len({_slice(device) for device in devices}), devices[0].platform == "tpu"
    slices = slices or (there if tpu else 1)
    if slices == 1 and not tpu:
        # JAX counts nodes of GPUs as slices too. The devices come node by node, so the last axes stay on a node if they fit.
        return mesh_utils.create_device_mesh(shape, devices)
    if slices != there:
        raise UserError(f"mesh.slices={slices}, but the {len(devices)} devices are of {there}; set mesh.slices={there}")
    if shape[0] % slices:
        raise UserError(f"mesh.data={shape[0]} is not a multiple of mesh.slices={slices}, but slices divide the batch")
    # As in jax.make_mesh, which refuses several slices: the axes of a v5e can be split.
    split = devices[0].device_kind in ("TPU v5 lite", "TPU v5e")
    of_one = [shape[0] // slices, *shape[1:]]
    return mesh_utils.create_hybrid_device_mesh(of_one, [slices, 1, 1], devices, allow_split_physical_axes=split)


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


def weight_bytes(params: Any) -> tuple[int, int]:
    """(bytes on one device, bytes of the whole) of a tree of arrays that are divided evenly."""
    leaves = jax.tree.leaves(params)
    shards = (math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)
    return sum(shards), sum(x.nbytes for x in leaves)


def table(axes: Any, shapes: Any) -> str:
    """Every parameter's path, shape and PartitionSpec, one a line."""

    def line(path, names, shape):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return f"{name:<32} {tuple(shape.shape)!s:<24} {', '.join(map(str, spec(names)))}"

    lines = jax.tree_util.tree_map_with_path(line, axes, shapes, is_leaf=lambda x: isinstance(x, tuple))
    return "\n".join(jax.tree.leaves(lines))

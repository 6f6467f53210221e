"""What import and export share: which names a backbone has, and how far the published network is ours."""

import ml_collections
import numpy as np
from jax.sharding import Mesh

from speedit_jax import sharding
from speedit_jax.errors import UserError
from speedit_jax.interop import dig, dit, pixart
from speedit_jax.interop.layout import COMPUTED, Table
from speedit_jax.models.build import parse_name
from speedit_jax.models.layers import sincos_position_table

# The published EMA also averages the position table, in float32, and so lets it drift; a learned table is far from this.
_POSITIONS_TOLERANCE = 0.01


def table(backbone: str, text: bool = False) -> Table:
    return pixart.TABLE if text else {"DiT": dit.TABLE, "DiG": dig.TABLE}[backbone]


def one_device() -> Mesh:
    """Whatever the run was sharded by."""
    devices = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1}).devices
    return sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, list(devices.flat[:1]))


def check_positions(given: np.ndarray, height: int, width: int, scale: float) -> float:
    """How far a position table [1, T, D] is from ours for a height x width grid, whose positions are divided by `scale`.

    Raises:
      UserError: further than averaging in float32 brings it.
    """
    error = float(np.abs(given[0] - sincos_position_table(height, width, given.shape[2], scale)).max())
    if not error <= _POSITIONS_TOLERANCE:
        raise UserError(f"{COMPUTED} is not the sine-cosine table of a {height} x {width} grid, but up to {error:.3g} off")
    return error


def dig_notes(config: ml_collections.ConfigDict, depth: int, image: tuple[int, int]) -> list[str]:
    """Where the published DiG's outputs are not ours."""
    backbone, directions = parse_name(config.model.name)[0], config.model.directions
    if backbone != "DiG" or (depth % directions == 0 and image[0] == image[1]):
        return []
    return [
        f"the published DiG leaves its tokens turned unless the image is square and the depth a multiple of {directions}: with"
        f" a depth of {depth} and {image[0]} x {image[1]} its outputs are not ours"
    ]

"""A DINOv2 around a data set: images to the features that REPA aligns with."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from speedit_jax import sharding, storage
from speedit_jax.errors import UserError
from speedit_jax.interop.directories import CONFIG
from speedit_jax.interop.transformers_files import weights_file
from speedit_jax.models.dinov2 import load_dinov2, resized

POSITIONS = ("repa", "transformers")
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's images, 0 to 1


class Dinov2Encoder:
    """Images [B, H, W, 1 or 3] in [-1, 1] to features [B, h, w, F], as REPA (arXiv 2410.06940) prepares and takes them.

    They are normalised by ImageNet's mean and standard deviation, then resampled (bicubic, without antialiasing) to a patch for
    each place of the grid; the features are the patches' states after the last norm.

    Args:
      where: a directory as transformers stores a DINOv2.
      grid: (h, w).
      mesh: its batch axes divide B.
      dtype: of the inputs of linear layers: "auto" (float32 on CPU, bfloat16 elsewhere), "float32" or "bfloat16".
      positions: of POSITIONS: how the table of positions is resampled to the grid, with antialiasing or without.

    Attributes:
      shape: (h, w, F).
      identity: JSON that says whose features these are.

    Raises:
      UserError: it cannot be read.
    """

    def __init__(self, where: str, grid: tuple[int, int], mesh: Mesh, dtype: str = "auto", positions: str = "repa"):
        given = storage.path(where)
        if not (given / CONFIG).is_file():
            raise UserError(f"{where} holds no {CONFIG}; give a directory with {CONFIG} and model.safetensors of a DINOv2")
        directory = storage.fetched(given)
        dtype = {"auto": "float32" if mesh.devices.flat[0].platform == "cpu" else "bfloat16"}.get(dtype, dtype)
        dinov2, params = load_dinov2(directory, jnp.bfloat16 if dtype == "bfloat16" else None, positions == "repa")
        self.shape = (*grid, dinov2.config.hidden_size)
        weights = storage.sha256(weights_file(directory))
        self.identity: dict[str, Any] = {"encoder": where, "weights": weights, "dtype": dtype, "positions": positions}
        self._rows = sharding.batch_sharding(mesh)
        self._params = jax.device_put(params, sharding.replicated(mesh))
        size = tuple(side * dinov2.config.patch_size for side in grid)

        def encode(params, images):
            colours = jnp.broadcast_to((images + 1) / 2, (*images.shape[:3], 3))
            normal = (colours - jnp.array(_MEAN)) / jnp.array(_STD)
            return dinov2.apply(params, resized(normal, size))

        self._encode = jax.jit(encode, in_shardings=(None, self._rows), out_shardings=self._rows)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """float32 [B, h, w, F]."""
        return np.asarray(self._encode(self._params, sharding.from_host(self._rows, images)), np.float32)

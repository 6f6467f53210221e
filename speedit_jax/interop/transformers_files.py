"""What the readers of transformers' directories share: the file of weights, and its tensors in the layouts of our modules.

Layouts: linear [out, in] -> [in, out], convolution [out, in, h, w] -> [h, w, in, out].
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from speedit_jax.errors import UserError
from speedit_jax.interop import layout

PARAMETERS = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
_AXES = {2: (1, 0), 4: (2, 3, 1, 0)}  # of PyTorch's kernel, in our order


def weights_file(directory: Path) -> Path:
    """The file of weights.

    Raises:
      UserError: there is none.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (directory / name).is_file():
            return directory / name
    raise UserError(f"{directory} holds no model.safetensors")


def arrange(state: Mapping[str, np.ndarray], like: Any, tensor_name: Callable[[tuple[str, ...]], str]) -> dict:
    """Tensors by name -> the tree `like`, float32.

    Args:
      tensor_name: our path -> transformers' name.

    Raises:
      UserError: a tensor is missing, extra or of another shape.
    """
    names = {path: tensor_name(tuple(key.key for key in path)) for path, _ in jax.tree_util.tree_leaves_with_path(like)}

    def axes(path, rank: int) -> tuple[int, ...]:
        return _AXES[rank] if path[-1].key == "kernel" else tuple(range(rank))

    wanted = {
        names[path]: tuple(leaf.shape[i] for i in np.argsort(axes(path, leaf.ndim)))
        for path, leaf in jax.tree_util.tree_leaves_with_path(like)
    }
    layout.check({name: np.shape(value) for name, value in state.items()}, wanted)

    def leaf(path, like):
        return np.ascontiguousarray(state[names[path]].transpose(axes(path, like.ndim)), np.float32)

    return jax.tree_util.tree_map_with_path(leaf, like)

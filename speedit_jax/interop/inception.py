"""Reads the weights of FID's Inception-v3: the PyTorch port's state_dict, as .pth, .safetensors or .npz.

Our modules bear the port's names: "Mixed_5b", "branch1x1", "bn", "mean" is Mixed_5b.branch1x1.bn.running_mean.
Layouts: convolutions OIHW -> HWIO, linear [out, in] -> [in, out].
"""

from typing import Any

import jax
import numpy as np

from speedit_jax import storage
from speedit_jax.errors import UserError
from speedit_jax.interop import layout, tensors

NAME = "pt_inception-2015-12-05-6726825d.pth"
URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{NAME}"
_PARAMETERS = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
# The bias of the logits, which no score uses, and what only training wants.
_UNUSED = ("fc.bias", ".num_batches_tracked")


def tensor_name(path: tuple[str, ...]) -> str:
    """Our path -> the port's name."""
    *modules, parameter = path
    return ".".join([*modules, _PARAMETERS[parameter]])


def torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Our shape -> the port's."""
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape[::-1]


def read_inception(where: str | None) -> dict[str, np.ndarray]:
    """The port's tensors by name, float32.

    Raises:
      UserError: there is no such file (the message says where to get it), or it cannot be read.
    """
    if not where:
        raise UserError(f"Inception weights are missing: download {URL} and give {NAME}; pixel features need no weights")
    path = storage.fetched(storage.path(where))
    if not path.is_file():
        raise UserError(f"{where}: no such file; download {URL}")
    try:
        return tensors.arrays(tensors.read(path))
    except UserError as e:
        raise UserError(f"{where}: {e}") from e


def arrange(state: dict[str, np.ndarray], like: Any, source: str) -> dict:
    """The port's tensors as our parameters, float32.

    Args:
      state: the port's name -> array.
      like: our parameter tree, arrays or shapes.
      source: where `state` comes from, for messages.

    Raises:
      UserError: tensors are missing, not expected or of another shape.
    """
    found = {name: value for name, value in state.items() if not name.endswith(_UNUSED)}
    leaves = jax.tree_util.tree_leaves_with_path(like)
    names = {path: tensor_name(tuple(key.key for key in path)) for path, _ in leaves}
    wanted = {names[path]: torch_shape(tuple(leaf.shape)) for path, leaf in leaves}
    try:
        layout.check({name: np.shape(value) for name, value in found.items()}, wanted)
    except UserError as e:
        raise UserError(f"{source} does not hold FID's Inception: {e}") from e

    def leaf(path, target):
        value = found[names[path]]
        value = value.transpose(2, 3, 1, 0) if target.ndim == 4 else value.T
        return np.ascontiguousarray(value, np.float32)

    return jax.tree_util.tree_map_with_path(leaf, like)

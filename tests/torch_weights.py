"""Where each tensor of the published PyTorch DiT's state_dict lives in our parameter tree."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

# Our module -> the PyTorch module; {} is the layer, which our scan over depth stacks along axis 0.
MODULES = {
    "patch": "x_embedder.proj",
    "timestep/hidden": "t_embedder.mlp.0",
    "timestep/out": "t_embedder.mlp.2",
    "label": "y_embedder.embedding_table",
    "blocks/adaLN": "blocks.{}.adaLN_modulation.1",
    "blocks/attention/qkv": "blocks.{}.attn.qkv",
    "blocks/attention/out": "blocks.{}.attn.proj",
    "blocks/mlp/up": "blocks.{}.mlp.fc1",
    "blocks/mlp/down": "blocks.{}.mlp.fc2",
    "final_adaLN": "final_layer.adaLN_modulation.1",
    "final": "final_layer.linear",
}
PARAMETERS = {"kernel": "weight", "bias": "bias", "table": "weight"}
COMPUTED = {"pos_embed"}  # stored by PyTorch, computed by us


def from_torch(state: Mapping[str, np.ndarray], like: Any) -> Any:
    """Arranges PyTorch tensors, or their gradients, as our parameters.

    Args:
      state: PyTorch name -> array.
      like: our parameter tree, arrays or shapes.

    Raises:
      ValueError: a tensor that no parameter takes.
    """
    unused = set(state) - COMPUTED

    def take(name, parameter, shape):
        unused.discard(name)
        value = state[name]
        if parameter == "kernel":
            # Linear [out, in] -> [in, out]; patch convolution [out, C, P, P] -> [P, P, C, out].
            value = value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)
        # Heads, the three of qkv and the chunks of adaLN are row-major in both: a reshape splits them.
        return value.reshape(shape)

    def leaf(path, target):
        *module, parameter = (key.key for key in path)
        name = f"{MODULES['/'.join(module)]}.{PARAMETERS[parameter]}"
        if module[0] != "blocks":
            return take(name, parameter, target.shape)
        depth, *shape = target.shape
        return np.stack([take(name.format(i), parameter, shape) for i in range(depth)])

    params = jax.tree_util.tree_map_with_path(leaf, like)
    if unused:
        raise ValueError(f"no parameter takes {sorted(unused)}")
    return params

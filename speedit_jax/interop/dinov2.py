"""Reads a DINOv2 as transformers stores it: config.json, model.safetensors.

Our modules' names are those of the file: "layernorm", "scale" is layernorm.weight.
"""

from pathlib import Path
from typing import Any

from speedit_jax.errors import UserError
from speedit_jax.interop import directories, tensors
from speedit_jax.interop.transformers_files import PARAMETERS, arrange, weights_file

_OF_TRAINING = "embeddings.mask_token"


def read_config(directory: Path) -> dict[str, Any]:
    """config.json.

    Raises:
      UserError: it is missing, or not that of a DINOv2.
    """
    config = directories.read_json(directory / directories.CONFIG)
    if config.get("model_type") != "dinov2":
        raise UserError(f"{directory} is a {config.get('model_type', 'model of another kind')}, not a dinov2 (without registers)")
    return config


def read_params(directory: Path, like: Any) -> dict:
    """The weights in the layout of `like`, our parameter tree, float32.

    Raises:
      UserError: unreadable, or tensors are missing or of another shape.
    """
    path = weights_file(directory)
    try:
        # Of a classifier the network is a part, with a prefix.
        state = {name.removeprefix("dinov2."): value for name, value in tensors.read(path).items()}
        state = {name: value for name, value in state.items() if name != _OF_TRAINING and not name.startswith("classifier.")}
        return arrange(tensors.arrays(state), like, tensor_name)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e


def tensor_name(path: tuple[str, ...]) -> str:
    """Our path -> transformers' name."""
    *modules, parameter = path
    return ".".join([*modules, PARAMETERS.get(parameter, parameter)])

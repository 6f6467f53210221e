"""Reads a CLIP as transformers stores it: config.json, preprocessor_config.json, model.safetensors.

Our modules' names are transformers': "text", "text_model.final_layer_norm", "scale" is text_model.final_layer_norm.weight.
"""

from pathlib import Path
from typing import Any

from speedit_jax.errors import UserError
from speedit_jax.interop import directories, tensors
from speedit_jax.interop.transformers_files import PARAMETERS, arrange, weights_file

_PROCESSOR = "preprocessor_config.json"
_NOT_FEATURES = ("logit_scale", "position_ids")  # a temperature of training, and a table of 0, 1, 2, ...


def read_config(directory: Path) -> dict[str, Any]:
    """config.json.

    Raises:
      UserError: it is missing, or not that of a CLIP with both towers.
    """
    config = directories.read_json(directory / directories.CONFIG)
    if config.get("model_type") != "clip":
        raise UserError(f"{directory} is a {config.get('model_type', 'model of another kind')}, not a clip with both towers")
    return config


def read_processor(directory: Path) -> dict[str, Any]:
    """preprocessor_config.json, {} where there is none; sizes are numbers, as older files have them.

    Raises:
      UserError: it cannot be read, or describes another processing than scaling the short side and cropping the centre.
    """
    path = directory / _PROCESSOR
    found = directories.read_json(path) if path.is_file() else {}
    for key in ("do_resize", "do_center_crop", "do_rescale", "do_normalize"):
        if not found.get(key, True):
            raise UserError(f"{path}: {key} is false; only CLIP's own preprocessing is known")
    size, crop = found.get("size", {}), found.get("crop_size", {})
    if isinstance(size, dict) and size and "shortest_edge" not in size:
        raise UserError(f"{path}: size is not the shortest_edge; only CLIP's own preprocessing is known")
    if isinstance(crop, dict) and len(set(crop.values())) > 1:
        raise UserError(f"{path}: crop_size is not a square")
    sizes = {
        "size": size.get("shortest_edge") if isinstance(size, dict) else size,
        "crop_size": crop.get("height") if isinstance(crop, dict) else crop,
    }
    return found | {key: value for key, value in sizes.items() if value is not None}


def read_params(directory: Path, like: Any) -> dict:
    """The weights in the layout of `like`, our parameter tree, float32.

    Raises:
      UserError: unreadable, or tensors are missing or of another shape.
    """
    path = weights_file(directory)
    try:
        state = {name: value for name, value in tensors.read(path).items() if not name.endswith(_NOT_FEATURES)}
        return arrange(tensors.arrays(state), like, tensor_name)
    except UserError as e:
        raise UserError(f"{path}: {e}") from e


def tensor_name(path: tuple[str, ...]) -> str:
    """Our path -> transformers' name."""
    _, *modules, parameter = path
    return ".".join([*modules, PARAMETERS.get(parameter, parameter)])

"""Reads a VAE as diffusers stores it: a directory of config.json and diffusion_pytorch_model.safetensors.

Our modules bear diffusers' names, with an underscore where it has the dot beside a number: "encoder", "down_blocks_0_resnets_1",
"conv1", "kernel" is encoder.down_blocks.0.resnets.1.conv1.weight.
Layouts: convolutions OIHW -> HWIO, linear [out, in] -> [in, out].
"""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from speedit_jax.errors import UserError

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
_PARAMETERS = {"kernel": "weight", "scale": "weight", "bias": "bias"}
# Attention's names in older files, the published sd-vae-ft among them -> today's.
_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(/[\w.-]+)*")
_TIMEOUT = 10.0  # seconds, for the hub's first answer
_SHOWN = 3  # names of tensors in one message


def find_vae(where: str) -> Path:
    """The directory that holds both files: `where` itself, or a copy from the Hugging Face hub.

    Args:
      where: a directory, or a name on the hub: "owner/repository" or "owner/repository/folder". Downloads go to the hub's cache.

    Raises:
      UserError: no such directory, a file is missing, or it cannot be downloaded.
    """
    path = Path(where).expanduser()
    if path.is_dir():
        if missing := [name for name in (CONFIG, WEIGHTS) if not (path / name).is_file()]:
            raise UserError(f"{where!r} has no {' and no '.join(missing)}; place both files of a diffusers VAE there")
        return path
    place = f"place {CONFIG} and {WEIGHTS} of a diffusers VAE in a directory and give its path"
    if not _HUB_NAME.fullmatch(where):
        raise UserError(f"no VAE directory {where!r}; {place}")
    try:
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    except ImportError:
        raise UserError(f"no VAE directory {where!r}; pip install huggingface_hub to download it, or {place}") from None
    owner, name, *folder = where.split("/")
    repository, folder = f"{owner}/{name}", "/".join(folder) or None

    def get(**options):
        return [hf_hub_download(repository, file, subfolder=folder, **options) for file in (CONFIG, WEIGHTS)]

    try:
        try:
            files = get(local_files_only=True)
        except FileNotFoundError:
            # Asked for once: where there is no network hf_hub_download goes on trying, with lines of its own, up to minutes.
            get_hf_file_metadata(hf_hub_url(repository, CONFIG, subfolder=folder), timeout=_TIMEOUT)
            files = get()
    except Exception as error:  # no network, no such name, no permission, no space: each has a class of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"no VAE directory {where!r}, and its download failed: {place} ({reason[:200]})") from error
    return Path(files[0]).parent


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as it is.

    Raises:
      UserError: not JSON, or not an object.
    """
    try:
        config = json.loads((directory / CONFIG).read_text())
    except ValueError as error:
        raise UserError(f"{directory / CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{directory / CONFIG} is not the config of a model: it holds no names")
    return config


def read_params(directory: Path, like: Any) -> dict:
    """The weights in the layout of `like`, float32.

    Args:
      like: our parameter tree, arrays or shapes.

    Raises:
      UserError: unreadable, or tensors that are missing, not expected or of another shape.
    """
    path = directory / WEIGHTS
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from error
    return arrange(state, like, str(path))


def tensor_name(path: tuple[str, ...]) -> str:
    """Our path -> diffusers' name."""
    *modules, parameter = path
    return ".".join([re.sub(r"_(?=\d)|(?<=\d)_", ".", module) for module in modules] + [_PARAMETERS[parameter]])


def arrange(state: dict[str, np.ndarray], like: Any, source: str) -> dict:
    """diffusers' tensors as our parameters, float32.

    Args:
      state: diffusers' name -> array.
      like: our parameter tree, arrays or shapes.
      source: where `state` comes from, for messages.

    Raises:
      UserError: tensors are missing, not expected or of another shape.
    """
    state = {_current_name(name): array for name, array in state.items()}
    expected, missing, misshapen = set(), [], []

    def leaf(path, target):
        name = tensor_name(tuple(key.key for key in path))
        expected.add(name)
        if name not in state:
            missing.append(name)
            return None
        value = state[name]
        if target.ndim == 2 and value.ndim == 4 and value.shape[2:] == (1, 1):
            value = value[:, :, 0, 0]  # attention, as the 1x1 convolutions of the oldest files
        axes = (3, 2, 0, 1) if target.ndim == 4 else range(target.ndim)[::-1]
        shape = tuple(target.shape[axis] for axis in axes)
        if value.shape != shape:
            misshapen.append(f"{name} {value.shape} instead of {shape}")
            return None
        return np.ascontiguousarray(value.transpose(np.argsort(axes)), np.float32)

    params = jax.tree_util.tree_map_with_path(leaf, like)
    faults = {"lacks": missing, "has the unknown": sorted(state.keys() - expected), "has the wrong shape of": misshapen}
    if any(faults.values()):
        text = "; ".join(f"{verb} {_listed(names)}" for verb, names in faults.items() if names)
        raise UserError(f"{source} is not the VAE of its {CONFIG}: it {text}; place the two files of one diffusers VAE there")
    return params


def _current_name(name: str) -> str:
    return re.sub(rf"(?<=attentions\.0\.)({'|'.join(_OLDER)})(?=\.)", lambda match: _OLDER[match[0]], name)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

"""Reads a VAE as diffusers stores it: a directory of config.json and diffusion_pytorch_model.safetensors, .bin or shards.

Our modules bear diffusers' names, with an underscore where it has the dot beside a number: "encoder", "down_blocks_0_resnets_1",
"conv1", "kernel" is encoder.down_blocks.0.resnets.1.conv1.weight.
Layouts: convolutions OIHW -> HWIO, linear [out, in] -> [in, out].
"""

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np

from speedit_jax import storage
from speedit_jax.errors import UserError
from speedit_jax.interop import directories, files, model_hub, tensors

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model.safetensors"
# What diffusers may call the weights, the most exact and safest first; an index names the files of a large model.
_NAMES = (
    WEIGHTS,
    f"{WEIGHTS}.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.safetensors.index.fp16.json",
    "diffusion_pytorch_model.fp16.bin",
    "diffusion_pytorch_model.bin.index.fp16.json",
)
_PICKLES = {".bin", ".pt", ".pth", ".ckpt"}
# Stable Diffusion's own code, before diffusers.
_ORIGINAL_NAMES = re.compile(r"first_stage_model\.|(encoder|decoder)\.(down|up|mid)\.")
_CONVERT = "AutoencoderKL.from_single_file(FILE).save_pretrained(DIRECTORY) of diffusers writes one"
_PARAMETERS = {"kernel": "weight", "scale": "weight", "bias": "bias"}
# Attention's names in older files, the published sd-vae-ft among them -> today's.
_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_SHOWN = 3  # names of tensors in one message


def find_vae(where: str) -> Path:
    """Where a VAE is: a directory, a file of weights beside its config.json, or a copy from the Hugging Face hub.

    Args:
      where: a directory, of a VAE or of a pipeline that has one in vae/; a file of weights; or a name on the hub:
        "owner/repository" or "owner/repository/folder", unless a file or directory here has that name. Downloads go to the hub's
        cache.

    Returns:
      A directory with a config.json and weights of one of diffusers' names, or the file.

    Raises:
      UserError: no such directory, a file is missing, or it cannot be downloaded.
    """
    path = storage.fetched(storage.path(where))
    if path.is_dir():
        if not (path / CONFIG).is_file() and (path / "vae").is_dir():
            return find_vae(str(path / "vae"))
        missing = [] if (path / CONFIG).is_file() else [CONFIG]
        missing += [] if _name_of_weights(path) else [WEIGHTS]
        if missing:
            raise UserError(f"{where!r} has no {' and no '.join(missing)}; place both files of a diffusers VAE there")
        return path
    if path.exists():
        if path.suffix in _PICKLES | {".safetensors"} and (path.parent / CONFIG).is_file():
            return path
        raise UserError(
            f"{where!r} is one file, but a VAE is a directory: the weights and a {CONFIG}, which holds the scaling_factor;"
            f" {_CONVERT}"
        )
    place = f"place {CONFIG} and {WEIGHTS} of a diffusers VAE in a directory and give its path"
    if not model_hub.IN_REPOSITORY.fullmatch(where):
        raise UserError(f"no VAE directory {where!r}; {place}")
    owner, name, *folder = where.split("/")
    of_hub = model_hub.Place(f"{owner}/{name}", path="/".join(folder))

    def choose(names):
        if not (needed := directories.weights_in(names, of_hub.path)):
            raise UserError(f"it has no weights there, as {WEIGHTS}")
        return of_hub.path, needed

    try:
        found, _ = model_hub.download(of_hub, choose, cached_first=True)
    except UserError as e:
        raise UserError(f"no VAE directory {where!r}, and its download failed: {place} ({e})") from e
    return find_vae(str(found))


def read_config(place: Path) -> dict[str, Any]:
    """config.json of what `find_vae` found, as it is.

    Raises:
      UserError: not JSON, or not an object.
    """
    path = _config_path(place)
    config = _read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a model config: it is not a JSON object")
    return config


def read_params(place: Path, like: Any) -> dict:
    """The weights of what `find_vae` found, in the layout of `like`, float32.

    Args:
      like: our parameter tree, arrays or shapes.

    Raises:
      UserError: unreadable, or tensors that are missing, not expected, of another shape or not finite.
    """
    paths = weights_files(place)
    return arrange(_read_tensors(paths), like, str(paths[0] if len(paths) == 1 else place))


def weights_files(place: Path) -> list[Path]:
    """The files that hold the weights of what `find_vae` found.

    Raises:
      UserError: an index that names files that are missing.
    """
    if not place.is_dir():
        return [place]
    path = place / (_name_of_weights(place) or WEIGHTS)
    if path.suffix != ".json":
        return [path]
    index = _read_json(path)
    names = sorted(set(index["weight_map"].values())) if isinstance(index, dict) and "weight_map" in index else []
    if not names:
        raise UserError(f"{path} is not an index of weights: it has no weight_map")
    if missing := [name for name in names if not (place / name).is_file()]:
        raise UserError(f"{place} has no {_listed(missing)}, which {path.name} names; place all files of the VAE there")
    return [place / name for name in names]


def checksum(place: Path) -> str:
    """SHA-256 of the file of weights; of several, of their checksums."""
    sums = [storage.sha256(path) for path in weights_files(place)]
    return sums[0] if len(sums) == 1 else hashlib.sha256("".join(sums).encode()).hexdigest()


def copy(place: Path, directory: Path) -> None:
    """Writes config.json and WEIGHTS to `directory`, whatever the names and the format of the original."""
    shutil.copyfile(_config_path(place), directory / CONFIG)
    paths = weights_files(place)
    if [path.suffix for path in paths] == [".safetensors"]:
        shutil.copyfile(paths[0], directory / WEIGHTS)
    else:
        files.write_safetensors(directory / WEIGHTS, _read_tensors(paths))


def _config_path(place: Path) -> Path:
    return (place if place.is_dir() else place.parent) / CONFIG


def _name_of_weights(directory: Path) -> str | None:
    return next((name for name in _NAMES if (directory / name).is_file()), None)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def _read_tensors(paths: list[Path]) -> dict[str, np.ndarray]:
    state = {}
    for path in paths:
        try:
            state |= tensors.arrays(tensors.read(path))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    return state


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
      UserError: tensors are missing, not expected, or of another shape.
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
        if any(_ORIGINAL_NAMES.match(name) for name in state):
            raise UserError(f"{source} has the names of the original Stable Diffusion code, not of a diffusers VAE; {_CONVERT}")
        raise UserError(f"{source} is not the VAE of its {CONFIG}: it {text}; place the two files of one diffusers VAE there")
    return params


def _current_name(name: str) -> str:
    return re.sub(rf"(?<=attentions\.0\.)({'|'.join(_OLDER)})(?=\.)", lambda match: _OLDER[match[0]], name)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

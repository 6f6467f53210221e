"""Directories of weights: one file of several possible names, or shards and the index that lists them."""

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from speedit_jax.errors import UserError
from speedit_jax.interop import tensors
from speedit_jax.storage import first_line

CONFIG = "config.json"
# In this order. Variants are called model.fp16.safetensors, of shards model.safetensors.index.fp16.json or, once, the other way.
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_SUFFIXES = (".safetensors", ".bin")
_STEM, _SUFFIX = "|".join(_STEMS), r"\.(safetensors|bin)"
_VARIANT = re.compile(
    rf"({_STEM})(\.(?P<file>\w+){_SUFFIX}|{_SUFFIX}\.index\.(?P<index>\w+)\.json|\.(?P<older>\w+){_SUFFIX}\.index\.json)"
)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
      UserError: it cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{path.name} cannot be read ({first_line(e)})") from e
    if not isinstance(content, dict):
        raise UserError(f"{path.name} holds no names and values")
    return content


def read(directory: Path) -> dict[Any, Any]:
    """What `tensors.read` finds in the weights of a directory.

    Raises:
      UserError: there are none, several variants, or shards are missing.
    """
    return read_file(directory / choose([path.name for path in directory.iterdir()]))


def read_file(path: Path) -> dict[Any, Any]:
    """As `tensors.read`, of a file or of the shards of an index."""
    return read_shards(path) if path.suffix == ".json" else tensors.read(path)


def read_shards(index: Path) -> dict[Any, Any]:
    """The tensors that an index of shards lists.

    Raises:
      UserError: it lists none, or a shard is missing, damaged, or lacks a tensor.
    """
    where = read_json(index).get("weight_map")
    if not isinstance(where, Mapping) or not where:
        raise UserError(f"{index.name} lists no weights")
    found: dict[Any, Any] = {}
    for name in sorted(set(where.values())):
        path = index.parent / Path(name).name
        if not path.is_file():
            raise UserError(f"{path.name}, a shard that {index.name} lists, is missing")
        try:
            found |= tensors.read(path)
        except UserError as e:
            raise UserError(f"{path.name}: {e}") from e
    if missing := [name for name in where if name not in found]:
        raise UserError(f"{where[missing[0]]} lacks {missing[0]}, which {index.name} lists there")
    return found


def choose(names: Collection[str]) -> str:
    """The file that holds the weights, or the index of its shards, among the names in a directory.

    Raises:
      UserError: there is none, or there are only variants, and several.
    """
    for usual in (f"{stem}{suffix}{index}" for stem in _STEMS for suffix in _SUFFIXES for index in ("", ".index.json")):
        if usual in names:
            return usual
    found: dict[str, str] = {}  # as fp16 or non_ema -> its file, .safetensors before .bin
    for name in sorted(names, key=lambda name: (".bin" in name, name)):
        if match := _VARIANT.fullmatch(name):
            found.setdefault(match["file"] or match["index"] or match["older"], name)
    if not found:
        raise UserError(f"it holds no {_STEMS[0]}{_SUFFIXES[0]}, nor weights under another of diffusers' names")
    if len(found) > 1:
        raise UserError(f"it holds {' and '.join(found.values())}; give one of these files")
    return next(iter(found.values()))


def shards(names: Iterable[str], index: str) -> list[str]:
    """The names of the shards that an index lists, as far as names tell; [] where `index` is no index."""
    match = _VARIANT.fullmatch(index) or re.fullmatch(rf"({_STEM}){_SUFFIX}\.index\.json", index)
    if not match or not index.endswith(".json"):
        return []
    named = match.groupdict()
    variant = named.get("index") or named.get("older")
    variant, number = rf"\.{variant}" if variant else "", r"-\d+-of-\d+"
    suffix = next(suffix for suffix in _SUFFIXES if suffix in index)
    shard = re.compile(rf"{match[1]}({variant}{number}|{number}{variant}){re.escape(suffix)}")
    return [name for name in names if shard.fullmatch(name)]


def weights_in(names: Sequence[str], folder: str) -> list[str]:
    """The weights in a folder of a repository under diffusers' names, as `read` takes them, and config.json; [] without weights.

    Args:
      names: of all files of the repository, with "/" between folders.

    Raises:
      UserError: there are several variants, and nothing else.
    """
    here = [name for name in inside(names, folder) if "/" not in name]
    if not any(re.fullmatch(rf"({_STEM}){_SUFFIX}(\.index\.json)?", name) or _VARIANT.fullmatch(name) for name in here):
        return []
    chosen = choose(here)
    return existing(names, folder, (chosen, *shards(here, chosen), CONFIG))


def inside(names: Sequence[str], folder: str) -> list[str]:
    """What is below a folder, by its name from there."""
    root = join(folder, "")
    return [name.removeprefix(root) for name in names if name.startswith(root)]


def existing(names: Sequence[str], folder: str, wanted: Sequence[str]) -> list[str]:
    """Those of some names in a folder that there are."""
    return [name for name in (join(folder, name) for name in wanted) if name in names]


def join(folder: str, name: str) -> str:
    """As paths are in a repository."""
    return f"{folder}/{name}" if folder else name

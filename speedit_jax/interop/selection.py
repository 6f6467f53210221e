"""Which files of a repository are needed to read the weights in it: by their names, before anything is downloaded."""

from collections.abc import Sequence
from pathlib import PurePosixPath

from speedit_jax.errors import UserError
from speedit_jax.interop import directories, pipeline
from speedit_jax.interop.directories import CONFIG

_ONE_FILE = (".safetensors", ".pt", ".pth", ".ckpt", ".bin", ".npz")  # of the published codes, under any name
_SHOWN = 4  # names in one message


def needed(names: Sequence[str], path: str = "") -> tuple[str, list[str]]:
    """What `weights.read` reads of a repository.

    Args:
      names: of all its files, with "/" between folders.
      path: a folder or a file in it; "" is all of it.

    Returns:
      (the folder or file to read, all files that this takes).

    Raises:
      UserError: there are no weights, or it is not clear which.
    """
    if path in names:
        folder, _, name = path.rpartition("/")
        beside = [*directories.shards(_inside(names, folder), name), CONFIG]
        return path, [path, *_existing(names, folder, beside)]
    inside = _inside(names, path)
    if not inside:
        raise UserError(f"there is no {path} in it; there are {_listed(names)}")
    if CONFIG not in inside and (transformer := weights_in(names, _join(path, "transformer"))):
        around = _existing(names, path, (pipeline.INDEX, pipeline.SCHEDULER))
        return path, [*transformer, *weights_in(names, _join(path, "vae")), *around]
    if found := weights_in(names, path):
        return path, found
    files = [name for name in inside if PurePosixPath(name).suffix in _ONE_FILE]
    if not files:
        raise UserError(f"there are no weights in it ({', '.join(_ONE_FILE)}); there are {_listed(names)}")
    if len(files) > 1:
        raise UserError(f"there are several files of weights in it: {_listed(files)}; add the name of one, as hf:OWNER/NAME/FILE")
    return _join(path, files[0]), [_join(path, files[0])]


def weights_in(names: Sequence[str], folder: str) -> list[str]:
    """The weights in a folder under diffusers' names, as `directories.read` takes them, and config.json; [] without weights.

    Raises:
      UserError: there are several variants, and nothing else.
    """
    inside = [name for name in _inside(names, folder) if "/" not in name]
    if not directories.holds_weights(inside):
        return []
    chosen = directories.choose(inside)
    return _existing(names, folder, (chosen, *directories.shards(inside, chosen), CONFIG))


def _inside(names: Sequence[str], folder: str) -> list[str]:
    root = _join(folder, "")
    return [name.removeprefix(root) for name in names if name.startswith(root)]


def _existing(names: Sequence[str], folder: str, wanted: Sequence[str]) -> list[str]:
    return [name for name in (_join(folder, name) for name in wanted) if name in names]


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(sorted(names)[:_SHOWN]) or 'no files'}{more}"

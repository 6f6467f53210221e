"""Which files of a repository are needed to read the weights in it: by their names, before anything is downloaded."""

from collections.abc import Sequence
from pathlib import PurePosixPath

from speedit_jax.errors import UserError
from speedit_jax.interop import pipeline
from speedit_jax.interop.directories import CONFIG, existing, inside, join, shards, weights_in

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
        beside = [*shards(inside(names, folder), name), CONFIG]
        return path, [path, *existing(names, folder, beside)]
    below = inside(names, path)
    if path and not below:
        raise UserError(f"there is no {path} in it; there are {_listed(names)}")
    if CONFIG not in below and (transformer := weights_in(names, join(path, "transformer"))):
        around = existing(names, path, (pipeline.INDEX, pipeline.SCHEDULER))
        return path, [*transformer, *weights_in(names, join(path, "vae")), *around]
    if found := weights_in(names, path):
        return path, found
    files = [name for name in below if PurePosixPath(name).suffix in _ONE_FILE]
    if not files:
        raise UserError(f"there are no weights in it ({', '.join(_ONE_FILE)}); there are {_listed(names)}")
    if len(files) > 1:
        raise UserError(f"there are several files of weights in it: {_listed(files)}; add the name of one, as hf:OWNER/NAME/FILE")
    return join(path, files[0]), [join(path, files[0])]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{', '.join(sorted(names)[:_SHOWN]) or 'no files'}{more}"

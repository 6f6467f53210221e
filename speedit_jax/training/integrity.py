"""Whether a checkpoint's files hold what was saved: a checksum of each, kept beside them in checksums.json.

zstd and OCDBT's values carry no checksums of their own, so without these a flipped bit can be read as other weights.
"""

import functools
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from speedit_jax import storage

NAME = "checksums.json"
META = "meta/metadata"  # the JSON that a checkpoint carries
COMMIT = "commit_success.txt"  # orbax's, written last to a checkpoint in an object store

_THREADS = 8  # files read at the same time
_NONE = np.iinfo(np.int32).max


def steps(workdir: Path) -> list[int]:
    """Of the finished checkpoints, newest first."""
    directories = [path for path in (workdir / "checkpoints").glob("*") if path.name.isdecimal()]
    if storage.is_remote(workdir):
        directories = [path for path in directories if (path / COMMIT).exists()]
    return sorted((int(path.name) for path in directories), reverse=True)


def seal(checkpoint: Path, items: Iterable[str]) -> None:
    """Writes down the checksums of all files of a checkpoint's items, before it gets its name."""
    paths = sorted(path for item in items for path in storage.files(checkpoint / item))
    names = [path.relative_to(checkpoint).as_posix() for path in paths]
    with ThreadPoolExecutor(_THREADS) as pool:
        storage.write_json(checkpoint / NAME, dict(zip(names, pool.map(storage.checksum, paths), strict=True)))


def read(checkpoint: Path) -> dict[str, str]:
    """{file: checksum}; empty where there are none: earlier versions saved without.

    Raises:
      ValueError: the file is damaged itself.
      UserError: this user may not read it.
    """
    try:
        checksums = json.loads((checkpoint / NAME).read_text())
    except FileNotFoundError:
        return {}
    except PermissionError as e:
        raise storage.forbidden(checkpoint / NAME, e) from e
    except (OSError, ValueError):
        checksums = None
    if not isinstance(checksums, dict) or META not in checksums:
        raise ValueError(f"{NAME} cannot be read")
    return checksums


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, in words; None where they are as saved, or were saved without checksums.

    All processes must call it: each reads a share of the files, and all get the same answer.

    Raises:
      UserError: this user may not read a file, which says nothing about what it holds.
    """
    try:
        checksums, unreadable = read(checkpoint), None
    except ValueError as e:
        checksums, unreadable = {}, str(e)
    names, me, count = sorted(checksums), jax.process_index(), jax.process_count()
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(functools.partial(_damage, checkpoint, checksums), names[me::count]))
    if count == 1:
        return unreadable or next(filter(None, found), None)
    mine = [me + i * count for i, problem in enumerate(found) if problem]
    first = -1 if unreadable else min(mine, default=_NONE)
    first = int(multihost_utils.process_allgather(np.int32(first)).min())
    if first == _NONE:
        return None
    problem = _damage(checkpoint, checksums, names[first]) if 0 <= first < len(names) else unreadable
    return problem or "some file is not the same on all hosts"


def damage_of_meta(checkpoint: Path) -> str | None:
    """The same of the JSON alone, by one process."""
    try:
        checksums = read(checkpoint)
    except ValueError as e:
        return str(e)
    return _damage(checkpoint, checksums, META) if checksums else None


def _damage(checkpoint: Path, checksums: dict[str, str], name: str) -> str | None:
    try:
        same = storage.checksum(checkpoint / name) == checksums[name]
    except FileNotFoundError:
        return f"{name} is missing"
    except PermissionError as e:
        raise storage.forbidden(checkpoint / name, e) from e
    except (OSError, ValueError) as e:
        return f"{name} cannot be read: {storage.first_line(e)}"
    return None if same else f"{name} does not hold what was saved"

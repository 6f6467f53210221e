"""Files: atomic, lasting writes, JSON, checksums, and the one line that an error has to say."""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from speedit_jax.errors import UserError


@contextlib.contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """Yields another name to write a file or directory to, and renames that to `path`: what has the name is whole.

    A kill or a power cut leaves PATH.partial behind, which the next writer replaces.

    Args:
      shared: several processes may write `path` at once. Each gets a name of its own, PATH.XXXXXXXX.partial, so that none spoils
        another's; what a kill leaves behind stays.
    """
    partial = unique_name(path) if shared else path.with_name(f"{path.name}.partial")
    _remove(partial)
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
        sync_names(path.parent)
    except Exception:
        _remove(partial)
        raise


def unique_name(path: Path) -> Path:
    """PATH.XXXXXXXX.partial, another one at each call."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")


def sync(path: Path) -> None:
    """Has a file or a whole directory written to the disk itself."""
    if path.is_dir():
        for inner in path.iterdir():
            sync(inner)
        sync_names(path)
    else:
        with path.open("rb") as file:
            os.fsync(file)


def sync_names(directory: Path) -> None:
    """Has a directory's names written to the disk itself, where the file system can: after a rename."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str, shared: bool = False) -> None:
    """Atomically; `shared` as in `replacing`."""
    with replacing(path, shared) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any, shared: bool = False) -> None:
    """Atomically, one key a line; numbers are finite, as JSON wants them."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n", shared)


def write_new(path: Path, write: Callable[[Path], None]) -> None:
    """Has `write` make a file or directory, atomically; makes its parent first.

    Raises:
      UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            write(partial)
    except (OSError, RuntimeError) as e:
        raise UserError(f"cannot write {path}: {first_line(e)}") from e


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(path: Path) -> str:
    """The XXH3 checksum of a file, 128 bits in hexadecimal: as fast as memory is read, against accidents, not against intent."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's text, or its class where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:limit]

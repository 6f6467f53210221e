"""Files, on disks and in object stores: atomic, lasting writes, JSON, checksums, and the one line that an error has to say.

A path on a disk is pathlib's, one in an object store is object_store.py's, with the same names and the methods that both kinds of
storage can offer; the functions here do the rest.
"""

import atexit
import contextlib
import functools
import glob
import hashlib
import json
import math
import os
import resource
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import xxhash

from speedit_jax import object_store
from speedit_jax.errors import UserError
from speedit_jax.object_store import is_remote, store

_FILES_OF_ITS_OWN = 64  # that a process has open besides shards: libraries, logs, sockets


def path(where: str | os.PathLike[str]) -> Path:
    """What a user named: a path on a disk, "~" expanded, or one in an object store, gs:// or s3://.

    Every path of a flag or of a config goes through here: pathlib would make gs:/bucket of gs://bucket.

    Raises:
      UserError: it starts with another scheme, names no bucket, or its package is not installed; or with "~" and no user's name.
    """
    text = os.fspath(where)
    if "://" in text:
        return object_store.open_path(text)
    try:
        return Path(text).expanduser() if text.startswith("~") else Path(text)  # pathlib takes ./~a for ~a
    except RuntimeError as e:
        name = text.partition("/")[0]
        raise UserError(f"{text}: there is no home directory {name}; write ~/ for your own, or ./{name} for a name") from e


@contextlib.contextmanager
def replacing(path: Path, shared: bool = False) -> Iterator[Path]:
    """Yields another name to write a file or directory to, and renames that to `path`: what has the name is whole.

    A kill or a power cut leaves PATH.partial behind, which the next writer replaces. For an object store the other name is on
    this machine, and the file is uploaded in the end; of a directory all files are, one after the other.

    Args:
      shared: several processes may write `path` at once. Each gets a name of its own, PATH.XXXXXXXX.partial, so that none spoils
        another's; what a kill leaves behind stays.
    """
    with another_name(path, shared) as partial:
        yield partial
        publish(partial, path)


@contextlib.contextmanager
def another_name(path: Path, shared: bool = False) -> Iterator[Path]:
    """As `replacing`, but only `publish` gives what is written its name; without it, it is removed."""
    if is_remote(path):
        with tempfile.TemporaryDirectory() as scratch:
            yield Path(scratch, path.name)
        return
    partial = unique_name(path) if shared else path.with_name(f"{path.name}.partial")
    remove(partial)
    try:
        yield partial
    except Exception:
        remove(partial)
        raise
    remove(partial)


def publish(partial: Path, path: Path) -> None:
    """Gives what was written under `another_name` its name, and has that last."""
    if is_remote(path):
        upload(partial, path)
        return
    sync(partial)
    os.replace(partial, path)
    sync_names(path.parent)


def unique_name(path: Path) -> Path:
    """PATH.XXXXXXXX.partial, another one at each call."""
    return path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.partial")


def sync(path: Path) -> None:
    """Has a file or a whole directory written to the disk itself; an object store has done so."""
    if is_remote(path):
        return
    if path.is_dir():
        for inner in path.iterdir():
            sync(inner)
        sync_names(path)
    else:
        with path.open("rb") as file:
            os.fsync(file)


def sync_names(directory: Path) -> None:
    """Has a directory's names written to the disk itself, where the file system can: after a rename."""
    if is_remote(directory):
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def resolved(path: Path) -> Path:
    """A path without links, "." and ".."."""
    return path if is_remote(path) else path.resolve()


def is_link(path: Path) -> bool:
    return not is_remote(path) and path.is_symlink()


def scan(directory: Path) -> contextlib.AbstractContextManager[Iterator[os.DirEntry]]:
    """As os.scandir."""
    if not is_remote(directory):
        return os.scandir(directory)
    return contextlib.nullcontext(object_store.scan(directory))


def absolute(path: Path) -> Path:
    """A path that the current directory does not change."""
    return path if is_remote(path) else path.absolute()


def make_directory(path: Path) -> None:
    """With its parents, unless it exists; nothing in an object store."""
    if not is_remote(path):
        path.mkdir(parents=True, exist_ok=True)


def remove(path: Path) -> None:
    """A file or a whole directory, if there is one."""
    if is_remote(path):
        with contextlib.suppress(FileNotFoundError):
            store(path).rm(glob.escape(os.fspath(path)), recursive=True)  # it takes "run[1]" for a pattern, which is of "run1"
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace(path: Path, target: Path) -> None:
    """Renames a file, over another if need be; an object is copied, which is atomic, and then removed."""
    if is_remote(path):
        store(path).cp_file(os.fspath(path), os.fspath(target))
        store(path).rm_file(os.fspath(path))
    else:
        os.replace(path, target)


def move_directory(path: Path, target: Path, first: str) -> None:
    """Renames a directory. In an object store all files are copied, `first` last, and then removed, `first` first."""
    if not is_remote(path):
        os.rename(path, target)
        sync_names(path.parent)
        return
    found = files(path)
    for file in sorted(found, key=lambda file: file == path / first):
        store(path).cp_file(os.fspath(file), os.fspath(target / file.relative_to(path)))
    for file in sorted(found, key=lambda file: file != path / first):
        store(path).rm_file(os.fspath(file))


def files(directory: Path) -> list[Path]:
    """All files below a directory, sorted."""
    if is_remote(directory):
        return object_store.files(directory)
    return sorted(path for path in directory.rglob("*") if path.is_file())


def size(path: Path) -> int:
    """Of a file, in bytes."""
    return path.stat().length if is_remote(path) else path.stat().st_size


def modified(path: Path) -> float:
    """When a file was written, in seconds."""
    return store(path).modified(os.fspath(path)).timestamp() if is_remote(path) else path.stat().st_mtime


def mark(path: Path) -> None:
    """Makes now the time at which a small file was written."""
    if is_remote(path):
        store(path).pipe_file(os.fspath(path), path.read_bytes())
    else:
        os.utime(path)


def create(path: Path, text: str) -> None:
    """Writes a small file; of several processes that do so at once, one succeeds.

    Raises:
      FileExistsError: to the others.
    """
    if is_remote(path):
        store(path).pipe_file(os.fspath(path), text.encode(), mode="create")
    else:
        with path.open("x") as file:
            file.write(text)


def upload(local: Path, path: Path) -> None:
    """A file of this machine, or every file of a directory, to an object store; each appears when it is whole."""
    for file in files(local) if local.is_dir() else [local]:
        store(path).put_file(os.fspath(file), os.fspath(path / file.relative_to(local)))


@functools.cache
def fetched(path: Path) -> Path:
    """A file or a directory on a disk: itself, or a copy of what is in an object store, as long as this process lives.

    For files that libraries open by name. What does not exist has a name that does not exist.
    """
    if not is_remote(path):
        return path
    scratch = tempfile.TemporaryDirectory()
    atexit.register(scratch.cleanup)
    local = Path(scratch.name, path.name)
    for file in [path] if path.is_file() else files(path):
        to = local / file.relative_to(path)
        to.parent.mkdir(parents=True, exist_ok=True)
        store(path).get_file(os.fspath(file), os.fspath(to))
    return local


def cached(path: Path, digest: str) -> Path:
    """A file on a disk: itself, or a copy of what is in an object store that later processes find, too.

    The copies are in $SPEEDIT_CACHE, by default ~/.cache/speedit_jax.

    Args:
      digest: the file's SHA-256, in hexadecimal.

    Raises:
      UserError: the file has another one.
    """
    if not is_remote(path):
        return path
    copy = Path(os.environ.get("SPEEDIT_CACHE", "~/.cache/speedit_jax")).expanduser() / f"{digest}{path.suffix}"
    if not copy.exists():
        copy.parent.mkdir(parents=True, exist_ok=True)
        with replacing(copy, shared=True) as partial:
            store(path).get_file(os.fspath(path), os.fspath(partial))
            if sha256(partial) != digest:
                raise UserError(f"{path} does not hold what was written; its SHA-256 is not {digest[:16]}...")
    return copy


def allow_open_files(count: int, of: str) -> None:
    """Has this process keep `count` more files open: readers of shards close none, and many systems start with 1,024.

    Args:
      of: what has so many files.

    Raises:
      UserError: the system does not let it.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if hard != unlimited and count + _FILES_OF_ITS_OWN > hard:
        raise UserError(
            f"{of} has {count:,} files, which stay open while it is read, but a process may open {hard:,} here: raise that limit"
            " (ulimit -n)"
        )
    if soft != unlimited:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft + count if hard == unlimited else min(soft + count, hard), hard))


class Mirror:
    """A directory on a disk for files that grow, which objects cannot: the place itself, or what `update` uploads to it.

    Attributes:
      directory: to write to.
    """

    def __init__(self, place: Path):
        self.directory, self._place = place, place
        self._uploaded: dict[Path, int] = {}
        self._time = -math.inf
        if is_remote(place):
            scratch = tempfile.TemporaryDirectory()
            atexit.register(scratch.cleanup)
            self.directory = Path(scratch.name)

    def update(self, every: float = 0.0) -> None:
        """Uploads the files that have grown, unless that was done in the last `every` seconds."""
        if self.directory == self._place or time.monotonic() < self._time + every:
            return
        self._time = time.monotonic()
        for file in files(self.directory):
            if self._uploaded.get(file) != (length := size(file)):
                upload(file, self._place / file.relative_to(self.directory))
                self._uploaded[file] = length


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
        make_directory(path.parent)
        with replacing(path) as partial:
            write(partial)
    except (OSError, RuntimeError) as e:
        raise UserError(f"cannot write {path}: {first_line(e)}") from e


def check_writable(path: Path) -> None:
    """Writes nothing of use and removes it again.

    Raises:
      UserError: now rather than when all is computed.
    """
    if not is_remote(path) and path.is_dir():
        raise UserError(f"cannot write to {path}: it is a directory; choose another file")
    try:
        make_directory(path.parent)
        if is_remote(path):
            probe = unique_name(path)
            store(path).pipe_file(os.fspath(probe), b"")
            store(path).rm_file(os.fspath(probe))
        else:
            tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as e:
        raise UserError(f"cannot write to {path}: {reason(e)}; choose another file") from e


def sha256(path: Path) -> str:
    """The checksum of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksum(path: Path) -> str:
    """The XXH3 checksum of a file, 128 bits in hexadecimal: as fast as memory is read, against accidents, not against intent."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an error's text, without the middle of a long one, or its class where it has none."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    # The cause is often at the end, after a long path.
    return line if len(line) <= limit else f"{line[: limit // 2 - 2]} ... {line[-limit // 2 + 3 :]}"


def reason(error: OSError) -> str:
    """What the system says of a failure, or an object store's client."""
    return error.strerror or first_line(error)


def forbidden(path: Path | str, error: PermissionError) -> UserError:
    """What is said where this user may not use a file, which may be whole."""
    return UserError(f"{path}: {reason(error)}; run as the user it belongs to, or get the right to use it")

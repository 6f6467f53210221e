"""One trainer at a time in a workdir: two would remove each other's checkpoints.

lock.json says who trains. A kill leaves it behind, and the next start takes it over when its owner is gone: on the same host by
asking for the process, of another host by watching whether the owner still marks the file, as it does every few seconds. In an
object store, which has no locks, of two that take over at once the second to write wins, and the first sees that in time.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from speedit_jax import storage
from speedit_jax.errors import UserError

NAME = "lock.json"
MARK_EVERY = 15.0  # seconds
WATCH = 90.0  # seconds; network file systems show changes of a file's time up to a minute late
_LOOK_EVERY = 1.0
_SETTLE = 2.0  # seconds, until another that has seen the same dead owner has written, too


@contextlib.contextmanager
def held(workdir: Path) -> Iterator[None]:
    """Holds the lock of `workdir`, which is made; of several processes of a run the first does.

    Raises:
      UserError: another process trains there, or the directory cannot be written to.
    """
    if jax.process_index():
        yield
        return
    path = workdir / NAME
    made = not workdir.exists()
    try:
        storage.make_directory(workdir)
        owner = _acquire(path)
    except OSError as e:
        raise UserError(f"cannot write to --workdir={workdir}: {storage.reason(e)}") from e
    done = threading.Event()
    threading.Thread(target=_mark, args=(path, owner, done), daemon=True).start()
    try:
        yield
    finally:
        done.set()
        with contextlib.suppress(OSError):  # where nothing can be written any more, the next start takes it over
            if _read(path) == owner:  # and nobody has taken it over
                path.unlink(missing_ok=True)
        if made and not storage.is_remote(workdir):
            with contextlib.suppress(OSError):  # it holds a run
                workdir.rmdir()


def _mark(path: Path, owner: dict[str, Any], done: threading.Event) -> None:
    while not done.wait(MARK_EVERY):
        with contextlib.suppress(Exception):  # an object store's client has many of its own
            if _read(path) == owner:
                storage.mark(path)


def _acquire(path: Path) -> dict[str, Any]:
    """Makes the lock this process's; returns what it says."""
    with _alone(path.parent):
        succeeds = path.exists()
        if succeeds:
            owner = _read(path)
            if _lives(owner, path):
                raise _taken(path, owner)
            path.unlink(missing_ok=True)
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}
        try:
            storage.create(path, json.dumps(mine))
        except FileExistsError:
            raise _taken(path, _read(path)) from None
        if succeeds and storage.is_remote(path):
            time.sleep(_SETTLE)
            if (owner := _read(path)) != mine:
                raise _taken(path, owner)
        return mine


def _taken(path: Path, owner: dict[str, Any]) -> UserError:
    return UserError(
        f"process {owner.get('pid')} on {owner.get('host')} trains in {path.parent}; wait for it, stop it, or name"
        f" another --workdir (if there is no such process, remove {path})"
    )


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Keeps others of this host from looking and taking over at the same time, where the file system can."""
    if storage.is_remote(directory):
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _read(path: Path) -> dict[str, Any]:
    """Empty where a kill left it half written."""
    with contextlib.suppress(OSError, ValueError):
        owner = json.loads(path.read_text())
        return owner if isinstance(owner, dict) else {}
    return {}


def _lives(owner: dict[str, Any], path: Path) -> bool:
    if not owner:
        return False
    if owner.get("host") == socket.gethostname():
        return _started(owner.get("pid")) == owner.get("started") is not None
    print(f"Looking if process {owner.get('pid')} on {owner.get('host')} still trains in {path.parent}", flush=True)
    seen, until = storage.modified(path), time.monotonic() + WATCH
    while time.monotonic() < until:
        time.sleep(_LOOK_EVERY)
        try:
            if storage.modified(path) != seen:
                return True
        except FileNotFoundError:  # it has ended meanwhile
            return False
    return False


def _started(pid: int) -> str | None:
    """When a process of this host started, in ticks since the host did; None where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return _known(pid)
    # A zombie has ended; its parent has not asked how.
    return None if fields[0] in "ZX" else fields[19]


def _known(pid: int) -> str | None:
    """Where there is no /proc, as on macOS: whether there is such a process."""
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except PermissionError:
        return "running"
    except (OSError, TypeError):
        return None
    return "running"

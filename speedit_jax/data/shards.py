"""A directory of ArrayRecord shards that several processes may write, and of which a kill loses at most one: latents, texts
and features.

00000-of-00013.array_record   the records
00000-of-00013.json           the shard's facts, its checksum among them, written last: without it the shard counts as missing
encoding.json                 what is being encoded, and how; written first
header.json                   describes the whole set; written when every shard is finished
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from jax.experimental import multihost_utils

from speedit_jax import storage
from speedit_jax.errors import UserError

HEADER, CLAIM = "header.json", "encoding.json"
_DOWNLOADS = 8  # shards at the same time: records are read in any order, far too often for an object store
_ONE_BY_ONE = "group_size:1,uncompressed"  # random access reads what it asked for; floats do not compress


def shard_name(index: int, total: int) -> str:
    return f"{index:05d}-of-{total:05d}.array_record"


def shard_paths(directory: Path, count: int, size: int) -> list[Path]:
    """Of `count` records, `size` in each shard."""
    total = -(-count // size)
    return [directory / shard_name(i, total) for i in range(total)]


class Writer:
    """An ArrayRecordWriter that says a failure, of a full disk as a rule, in one line."""

    def __init__(self, path: Path):
        self._path, self._writer = path, ArrayRecordWriter(str(path), _ONE_BY_ONE)

    def write(self, record: bytes) -> None:
        self._try(self._writer.write, record)

    def close(self) -> None:
        self._try(self._writer.close)

    def _try(self, do: Callable[..., None], *what: bytes) -> None:
        try:
            do(*what)
        except RuntimeError as e:
            # The place in the file comes after the first semicolon.
            raise UserError(
                f"cannot write to {self._path.parent} ({str(e).partition(';')[0]}); mend that and run the same command again:"
                " finished shards stay"
            ) from e


def remove_partial(directory: Path) -> None:
    """What killed processes left behind."""
    for path in directory.glob("*.partial"):
        path.unlink(missing_ok=True)


def write_shard(path: Path, write: Callable[[Path], tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    """Has `write` make a shard under a temporary name, then gives it its own.

    Args:
      write: path -> (how many records it wrote there, further facts).

    Returns:
      What the shard's JSON holds: records, sha256, and the further facts.
    """
    with storage.another_name(path, shared=True) as partial:
        count, further = write(partial)
        if finished := finished_shard(path):  # by another process, meanwhile
            return finished
        facts = {"records": count, "sha256": storage.sha256(partial)} | further
        storage.publish(partial, path)
    storage.write_json(path.with_suffix(".json"), facts, shared=True)
    return facts


def named(facts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entry "shards" of header.json: the shards' facts, each with its file's name."""
    return [{"name": shard_name(i, len(facts)), **shard} for i, shard in enumerate(facts)]


def checksum(header: dict[str, Any]) -> str:
    """Of all records, 16 hexadecimal digits."""
    return hashlib.sha256("".join(shard["sha256"] for shard in header["shards"]).encode()).hexdigest()[:16]


def check_same(directory: Path, old: dict[str, Any], new: dict[str, Any], of_data: set[str], changed: str) -> None:
    """Whether shards of two encodings may be mixed.

    Args:
      old, new: what the shards of either depend on, flat.
      of_data: the keys that say what the data are.
      changed: what an error says has happened where only those differ.

    Raises:
      UserError: they may not.
    """
    different = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if different and set(different) <= of_data:
        raise UserError(
            f"{changed} since {directory} was begun; name another --out, or remove that directory to encode all again"
        )
    if different:
        raise UserError(f"{directory} was encoded with other settings ({', '.join(different)}); choose another --out")


def finished_shard(path: Path) -> dict[str, Any] | None:
    """What `write_shard` returned for it; None where it was not finished."""
    facts = path.with_suffix(".json")
    return read_json(facts) if facts.exists() and path.exists() else None


def claim(out: Path, what: dict[str, Any], check_same: Callable[[dict[str, Any]], None]) -> None:
    """Makes `out` this encoding's; shards of other data or of another encoder must not be mixed in.

    Args:
      what: contents of encoding.json.
      check_same: raises a UserError for those of an encoding whose shards may not be mixed with these.

    Raises:
      UserError: it holds another encoding, or cannot be written.
    """
    path = out / CLAIM
    if jax.process_index() == 0 and not path.exists():
        _write_claim(path, what)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("--out is claimed")
    if not path.exists():
        raise UserError(
            f"--out={out} on process {jax.process_index()} is not the directory of process 0: all hosts must share one directory"
        )
    saved = read_json(path)
    check_same(saved)
    if jax.process_index() == 0 and saved != what:
        _write_claim(path, what)  # with today's places, scale and fingerprint


def _write_claim(path: Path, what: dict[str, Any]) -> None:
    try:
        storage.make_directory(path.parent)
        storage.write_json(path, what, shared=True)
    except OSError as e:
        raise UserError(f"cannot write to --out={path.parent}: {storage.reason(e)}") from e


def share(paths: list[Path]) -> list[int]:
    """Which shards this process is to write: its part of those that are missing, as process 0 sees them."""
    missing = np.array([finished_shard(path) is None for path in paths])
    if jax.process_count() > 1:
        missing = multihost_utils.broadcast_one_to_all(missing)
    if jax.process_index() == 0 and not missing.all():
        print(f"{len(paths) - missing.sum()} of {len(paths)} shards are already finished")
    return np.flatnonzero(missing)[jax.process_index() :: jax.process_count()].tolist()


def finished(paths: list[Path]) -> list[dict]:
    """What write_shard returned for each, once all are there.

    Other hosts' may come an hour later, so this waits for files and in no collective. Should a host die, jax ends this process.
    """
    found = []
    for path in paths:
        while (shard := finished_shard(path)) is None:
            time.sleep(1)
        found.append(shard)
    return found


def read_header(directory: Path, command: str) -> dict[str, Any]:
    """header.json.

    Args:
      command: that writes it.

    Raises:
      UserError: there is none, or it is damaged.
    """
    path = directory / HEADER
    if not path.exists():
        raise UserError(f"no {HEADER} in {directory}: run {command}; if it was interrupted, run it again")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"{path} is not JSON ({e}); remove it and encode again") from e


class Records:
    """An ArrayRecordDataSource that says in one line what cannot be read: the reader compares checksums.

    Args:
      records: of all shards.
      directory: where they are.
      command: that writes them.
    """

    def __init__(self, records: grain.sources.ArrayRecordDataSource, directory: Path, command: str):
        self._records, self._directory, self._command = records, directory, command

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[bytes]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> bytes:
        try:
            return self._records[index]
        except RuntimeError as e:
            raise UserError(
                f"cannot read record {index} of {self._directory} ({storage.first_line(e)}); --verify names its shard: remove"
                f" that and run {self._command} again"
            ) from e


def open_records(directory: Path, header: dict[str, Any], count: int, command: str) -> Records:
    """The records of all shards of a header, one after another.

    Args:
      count: how many there must be.

    Raises:
      UserError: shards are missing or damaged.
    """
    paths = [directory / shard["name"] for shard in header["shards"]]
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} is missing; run {command} again to write the missing shards")
    storage.allow_open_files(len(paths), str(directory))
    with ThreadPoolExecutor(_DOWNLOADS) as pool:
        paths = list(pool.map(storage.cached, paths, (shard["sha256"] for shard in header["shards"])))
    try:
        records = grain.sources.ArrayRecordDataSource([str(path) for path in paths])
        found = len(records)
    except Exception as e:
        # The reader's errors have no common class.
        raise UserError(f"cannot read the shards of {directory}: {storage.first_line(e)}; check them with --verify") from e
    if found != count:
        raise UserError(f"{directory} holds {found} records, but its header says {count}; check it with --verify")
    return Records(records, directory, command)


def damaged(directory: Path, header: dict[str, Any]) -> list[str]:
    """Names of shards that are missing, or whose checksum is not the header's."""
    paths = {directory / shard["name"]: shard["sha256"] for shard in header["shards"]}
    return [path.name for path, sha256 in paths.items() if not path.exists() or storage.sha256(path) != sha256]


def listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

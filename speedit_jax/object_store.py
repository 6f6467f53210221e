"""Object stores, gs:// and s3://: which client serves a path, and what a failure of that client means.

A path is etils.epath's, over fsspec, and has pathlib's names. In a store a file appears whole or not at all, when its upload
ends, and a directory is only a common beginning of names: it needs no making, and cannot be renamed.
"""

import functools
import importlib.util
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec

from speedit_jax.errors import UserError

# TensorFlow, where it is installed, would read gs:// by itself and knows no s3://: one way is enough.
os.environ.setdefault("EPATH_USE_TF", "false")
from etils import epath

_PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # scheme -> what fsspec needs for it
_EXTRAS = {"gs": "gcs", "s3": "s3"}
# The packages whose exceptions a failing client raises: its own, and those for credentials and the network.
_RAISERS = {"gcsfs": "gs", "google": "gs", "s3fs": "s3", "botocore": "s3", "aiobotocore": "s3", "aiohttp": ""}


def open_path(text: str) -> Path:
    """The path of gs://BUCKET/... or s3://BUCKET/...

    Raises:
      UserError: it starts with another scheme, names no bucket, would be a pattern, or its package is not installed.
    """
    scheme, _, rest = text.partition("://")
    if scheme not in _PACKAGES:
        raise UserError(f"{text}: unknown storage {scheme}://; give a path on a disk, gs://BUCKET/PATH or s3://BUCKET/PATH")
    if not rest.strip("/"):
        raise UserError(f"{text}: the bucket is missing; give {scheme}://BUCKET/PATH")
    if found := re.search(r"[*?[]", rest):
        raise UserError(f"{text}: libraries take it for a pattern, of run1 if it is run[1]; choose a path without {found[0]}")
    if importlib.util.find_spec(_PACKAGES[scheme]) is None:
        raise UserError(f"{text} needs the package {_PACKAGES[scheme]}: pip install -e '.[{_EXTRAS[scheme]}]'")
    file_system(scheme)
    return epath.Path(text)


def is_remote(path: Path) -> bool:
    """Whether a path is in an object store."""
    return os.fspath(path).partition("://")[0] in _PACKAGES


@functools.cache
def file_system(scheme: str) -> fsspec.AbstractFileSystem:
    """The client for "gs" or "s3"."""
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs as a traceback what it also raises
    # A listing that is kept for later would not show what tensorstore and other processes write.
    for name in {scheme, "gcs"} if scheme == "gs" else {scheme}:
        fsspec.config.conf.setdefault(name, {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem(scheme)


def store(path: Path) -> fsspec.AbstractFileSystem:
    """The client for a path."""
    return file_system(os.fspath(path).partition("://")[0])


def files(directory: Path) -> list[Path]:
    """All files below a directory, sorted."""
    scheme = os.fspath(directory).partition("://")[0]
    # An empty object whose name ends with "/" stands for a directory.
    found = (name for name in store(directory).find(os.fspath(directory)) if not name.endswith("/"))
    return sorted(epath.Path(f"{scheme}://{name}") for name in found)


class Entry:
    """As os.DirEntry."""

    def __init__(self, info: dict[str, Any]):
        self.name = info["name"].rstrip("/").rpartition("/")[2]
        self._kind = info["type"]

    def is_dir(self) -> bool:
        return self._kind == "directory"

    def is_file(self) -> bool:
        return self._kind == "file"


def scan(directory: Path) -> Iterator[Entry]:
    """What a directory holds. Not the empty object of its own name, as web consoles and mounts leave for a directory."""
    text = os.fspath(directory)
    own = text.partition("://")[2].strip("/")
    return (Entry(info) for info in store(directory).ls(text, detail=True) if info["name"].strip("/") != own)


def failure(error: BaseException) -> str | None:
    """One line for an exception of a store's client: no network, no credentials, no such bucket; None for any other exception."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    # Of a bucket that is not there gcsfs raises Python's own FileNotFoundError.
    modules = [type(error).__module__] + ([trace.tb_frame.f_globals.get("__name__", "")] if trace else [])
    packages = [package for package in (module.partition(".")[0] for module in modules) if package in _RAISERS]
    if not packages:
        return None
    scheme = _RAISERS[packages[0]]
    name = f"{scheme}://" if scheme else "the object store"
    text = " ".join(str(error).split())[:200] or type(error).__name__
    return f"{name} cannot be used ({text}); check the credentials, the name of the bucket and the network (docs/storage.md)"

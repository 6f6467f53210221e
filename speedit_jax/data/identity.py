"""Whether two folders hold the same images: by names and content, wherever they lie and whenever they were copied.

Times of change are no part of it: most ways of copying a data set, and each host of several with a copy of its own, change them.
"""

import hashlib
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from speedit_jax import storage
from speedit_jax.data.images import suffixes
from speedit_jax.data.names import printable
from speedit_jax.data.scan import progress
from speedit_jax.errors import UserError

_BLOCK = 4096  # bytes, what storage reads at least
# Where pixels are compressed, one that changes moves all that follows it: five blocks of a file see it. Others are read whole.
_COMPRESSED = {"JPEG", "MPO", "PNG", "WEBP", "AVIF", "JPEG2000", "GIF"}
_THREADS = 16  # for storage far away; on a local disc four are as fast
_FILES = 500  # a thread takes at a time


def fingerprints(root: Path, files: Sequence[str], labels: Sequence[int]) -> tuple[str, str]:
    """(of names, labels and content; of names and sizes alone, as it was before), 16 hexadecimal digits each.

    Opens each file once and reads at most 20 kB of it where its format is compressed.

    Raises:
      UserError: a file is gone.
    """
    named = [os.fsencode(name) for name in files]
    parts = [files[first : first + _FILES] for first in range(0, len(files), _FILES)]
    looks = []
    with ThreadPoolExecutor(_THREADS) as pool, progress("checksums", len(files)) as bar:
        for found in pool.map(lambda part: [_look(root / name) for name in part], parts):
            looks += found
            bar.update(len(found))
    digest = hashlib.sha256()
    for name, label, (size, content) in zip(named, labels, looks, strict=True):
        digest.update(b"%b\0%d\0%d\0%b" % (name, label, size, content))
    sizes = b"\n".join(b"%d" % size for size, _ in looks)
    return digest.hexdigest()[:16], hashlib.sha256(b"\n".join(named) + b"\0" + sizes).hexdigest()[:16]


def _open(path: Path) -> BinaryIO:
    # From an object store one request for all of a file is quicker than five for its parts.
    return io.BytesIO(path.read_bytes()) if storage.is_remote(path) else open(path, "rb", buffering=0)


def _look(path: Path) -> tuple[int, bytes]:
    """(size in bytes, checksum); of a file that cannot be read the checksum of nothing."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with _open(path) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            if suffixes().get(path.suffix.lower()) in _COMPRESSED and size > 5 * _BLOCK:
                for place in (0, size // 4, size // 2, size * 3 // 4, size - _BLOCK):
                    file.seek(place)
                    digest.update(file.read(_BLOCK))
            else:
                while block := file.read(2**20):
                    digest.update(block)
            return size, digest.digest()
    except FileNotFoundError as e:
        raise UserError(f"{printable(path)} is gone since the folder was listed; start again") from e
    except OSError:
        return storage.size(path), digest.digest()

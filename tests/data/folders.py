"""What tests of data sources share: their config, image files of one colour, and PNG files that Pillow does not write."""

import struct
import zlib
from collections.abc import Iterable
from pathlib import Path

import ml_collections
from PIL import Image

from speedit_jax.config import get_config
from speedit_jax.data.sources import open_source


def config(source, height=8, width=8, channels=3, **keys) -> ml_collections.ConfigDict:
    data = get_config().data
    data.update(source=source, height=height, width=width, channels=channels, **keys)
    return data


def write(path, size=(8, 8), colour=(255, 0, 51)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def open_folder(root, **keys):
    return open_source(config(f"folder:{root}", **keys))


def write_png(path: Path, rows: Iterable[bytes], width: int, height: int, *, bits: int, kind: int, clear: bytes = b"") -> None:
    """A PNG of filtered rows: each is a zero and then the samples. `kind` is PNG's colour type, `clear` its tRNS."""
    deflate = zlib.compressobj(1)
    content = b"".join(map(deflate.compress, rows)) + deflate.flush()

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    transparent = chunk(b"tRNS", clear) if clear else b""
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + transparent + chunk(b"IDAT", content) + chunk(b"IEND", b""))

"""Images in order, as uint8, for evaluation: from an npz, a directory, or a data source.

An npz is read as a stream: fifty thousand images of 256 pixels are 10 GB.
"""

import contextlib
import dataclasses
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import ml_collections
import numpy as np
from PIL import ImageOps

from speedit_jax import storage
from speedit_jax.data import loader
from speedit_jax.data.images import open_image
from speedit_jax.data.names import printable
from speedit_jax.data.pixels import WHITE
from speedit_jax.data.sources import Source, open_source
from speedit_jax.errors import UserError

ARRAY = "arr_0"  # ADM's name for the images
KINDS = "FILE.npz with arr_0, a directory of images, digits, synthetic, folder:PATH or tfds:NAME"
_ORIENTATION = 0x0112  # EXIF; from 5 on, height and width are swapped


class Images(Protocol):
    """Images of one size.

    Attributes:
      shape: (H, W, C), C being 1 or 3.
    """

    shape: tuple[int, int, int]

    def __len__(self) -> int: ...

    def batches(self, size: int, threads: int) -> Iterator[np.ndarray]:
        """uint8 [size, H, W, C] each, the last one smaller."""
        ...


@dataclasses.dataclass(frozen=True)
class NpzImages:
    """arr_0 of an npz, uint8 [n, H, W, C]."""

    path: Path
    shape: tuple[int, int, int]
    count: int

    def __len__(self) -> int:
        return self.count

    def batches(self, size: int, threads: int) -> Iterator[np.ndarray]:
        del threads
        with _reading(self.path), _array(self.path) as (file, _, _):
            for first in range(0, self.count, size):
                n = min(size, self.count - first)
                content = file.read(n * int(np.prod(self.shape)))
                yield np.frombuffer(content, np.uint8).reshape(n, *self.shape)


@dataclasses.dataclass(frozen=True)
class EvenlySpaced:
    """`count` of a source's records, evenly spaced: of a set that is sorted by class some of each."""

    source: Source
    count: int

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.source.image_shape

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.source[index * len(self.source) // self.count]


@dataclasses.dataclass(frozen=True)
class SourceImages:
    """All of a data source, in its order."""

    source: Source

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.source.image_shape

    def __len__(self) -> int:
        return len(self.source)

    def batches(self, size: int, threads: int) -> Iterator[np.ndarray]:
        for batch in loader.in_order(self.source, 0, len(self), size, threads):
            yield np.round((batch["image"] + 1) * 127.5).astype(np.uint8)


def some(images: NpzImages | SourceImages, count: int) -> NpzImages | SourceImages:
    """At most `count` of them: of an npz the first, of a source evenly spaced."""
    count = min(count, len(images))
    if isinstance(images, NpzImages):
        return dataclasses.replace(images, count=count)
    return SourceImages(EvenlySpaced(images.source, count))


def fingerprint(images: NpzImages | SourceImages) -> str:
    """Equal for equal images, as far as can be told without reading them all."""
    if isinstance(images, SourceImages):
        background = tuple(getattr(images.source, "background", WHITE))
        # Fingerprints do not know it: to training it is a setting. White is left out, as it was before this was here.
        return images.source.fingerprint + (f" over {background}" if background != WHITE else "")
    if storage.is_remote(images.path):
        return f"{images.path} {storage.size(images.path)} {storage.modified(images.path)}"
    stat = images.path.stat()
    return f"{images.path.absolute()} {stat.st_size} {stat.st_mtime_ns}"


def open_images(
    where: str, shape: tuple[int, int, int] | None = None, split: str = "train", background: str = "white"
) -> Images | None:
    """The images at `where`.

    Args:
      where: one of KINDS. Those of a directory are taken as they are; folder:PATH scales and crops them to `shape`.
      shape: what folder:, tfds: and synthetic are to have.
      split: of digits and tfds:, as data.split.
      background: the colour behind transparent parts, as data.background.

    Returns:
      None for an npz that has no images (but statistics, perhaps).

    Raises:
      UserError: there are none, they cannot be read, they have several sizes, or a split that there is not.
    """
    of_source = where.partition(":")[0] in ("digits", "synthetic", "folder", "tfds") and not where.endswith(".npz")
    if split != "train" and not of_source:
        raise UserError(f"{where} has no splits, and split={split} would be ignored; leave it out")
    if of_source:
        # The digits have a size of their own.
        if shape is None and where != "digits":
            raise UserError(f"{where}: the image size is missing; give --size=HEIGHT,WIDTH[,CHANNELS]")
        return SourceImages(_source(where, (8, 8, 1) if where == "digits" else shape, split, background))
    path = storage.path(where)
    if path.suffix == ".npz":
        return _open_npz(path)
    if not path.is_dir():
        raise UserError(f"no images {where!r}: give {KINDS}")
    # Of any size, for its list of files.
    listed = _source(f"folder:{path}", (1, 1, 3), "train", background)
    return SourceImages(dataclasses.replace(listed, image_shape=_common_shape([path / name for name in listed.files])))


def _source(where: str, shape: tuple[int, int, int], split: str, background: str) -> Source:
    keys = dict(zip(("height", "width", "channels"), shape, strict=True))
    other = {"split": split, "background": background, "classes": "", "max_broken": 0}
    synthetic = {"synthetic_size": 4096, "synthetic_classes": 10}
    return open_source(ml_collections.ConfigDict({"source": where} | keys | other | synthetic))


def _common_shape(files: list[Path]) -> tuple[int, int, int]:
    """(H, W, C) of image files, upright, read from their headers where those say so."""
    shapes = {}
    for path in files:
        try:
            with open_image(path) as image:
                # Whether the header's size is before the rotation or after depends on the format and on Pillow's version.
                rotated = image.getexif().get(_ORIENTATION, 1) >= 5
                width, height = (ImageOps.exif_transpose(image) if rotated else image).size
                grey = len(image.getbands()) == 1 and image.mode != "P"
        except Exception as e:
            # Pillow raises many kinds for many kinds of damage.
            raise UserError(f"cannot read the image {printable(path)}: {e}; repair it or remove it from the directory") from e
        shapes.setdefault((height, width, 1 if grey else 3), path)
        if len(shapes) > 1:
            (one, first), (other, second) = shapes.items()
            raise UserError(
                f"{printable(first)} is {'x'.join(map(str, one))} and {printable(second)} is {'x'.join(map(str, other))}:"
                f" all images must have the same size and channels; use folder:{printable(first.parent)} to scale and crop them"
            )
    return next(iter(shapes))


def _open_npz(path: Path) -> NpzImages | None:
    if not path.is_file():
        raise UserError(f"no file {path}")
    with _reading(path):
        with path.open("rb") as content, zipfile.ZipFile(content) as archive:
            if f"{ARRAY}.npy" not in archive.namelist():
                return None
        with _array(path) as (_, shape, dtype):
            pass
    if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or not all(shape):
        raise UserError(f"{path}: {ARRAY} is {dtype} {list(shape)}, not uint8 [n, H, W, 1 or 3]; write it as sample does")
    return NpzImages(path, shape[1:], shape[0])


@contextlib.contextmanager
def _array(path: Path):
    """(file that stands at the first number, shape, dtype)."""
    with path.open("rb") as content, zipfile.ZipFile(content) as archive, archive.open(f"{ARRAY}.npy") as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read_header(file)
        if fortran_order:
            raise ValueError(f"{ARRAY} is in Fortran order")
        yield file, shape, dtype


@contextlib.contextmanager
def _reading(path: Path):
    """Damage, of whatever kind, as a UserError."""
    try:
        yield
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise UserError(f"{path} cannot be read as an npz of images ({e}); create it again") from e

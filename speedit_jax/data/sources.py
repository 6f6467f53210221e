"""Data sources: random-access sequences of {"image": [H, W, C] float32 in [-1, 1], "label": int}.

`digits`       scikit-learn's 1,797 labelled 8x8 handwritten digits; the 80 % of a fixed stratified split
`folder:PATH`  images below PATH (data/folder.py): its sub-directories are the classes; without any, the set is unconditional
`tfds:NAME`    a set that TensorFlow Datasets prepared, NAME[/CONFIG][:VERSION] (data/tfds.py)
`latents:PATH` what speedit_jax.encode wrote: {"moments", "label"} (data/latents.py)
`synthetic`    coloured blobs drawn from the index: any shape, any number of classes, no files
`blobs`        coloured blobs with captions (data/blobs.py), no files

With data.text each record also has its captions, encoded (data/texts.py); with data.features what an image encoder made of the
image (data/features.py).
"""

import dataclasses
import hashlib
import sys
from typing import Any, Protocol

import ml_collections
import numpy as np
from tqdm import tqdm

from speedit_jax import storage
from speedit_jax.data.blobs import SPLITS as _BLOB_SPLITS
from speedit_jax.data.blobs import BlobSource
from speedit_jax.data.classes import choose, relabel
from speedit_jax.data.features import with_features
from speedit_jax.data.folder import FolderSource, open_folder
from speedit_jax.data.images import parse_background
from speedit_jax.data.latents import open_latents
from speedit_jax.data.names import printable
from speedit_jax.data.scan import count_by_suffix
from speedit_jax.data.texts import with_texts
from speedit_jax.data.tfds import open_tfds
from speedit_jax.errors import UserError

_DIGITS_SPLITS = ("train", "held_out")


class Source(Protocol):
    """What the loader needs of a data set.

    Attributes:
      image_shape: (H, W, C).
      class_names: empty when the set is unconditional.
      fingerprint: equal for equal data; a checkpoint refuses to resume on other data.
      older_fingerprints: what earlier versions called the same data.
      encoded_by: the identity of their autoencoder, if these are not images.
    """

    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    fingerprint: str
    older_fingerprints: tuple[str, ...]
    encoded_by: dict[str, Any] | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def load_digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """(images [n, 8, 8, 1] float32 in [-1, 1], labels [n]) of the "train" or the "held_out" part.

    The split is fixed and stratified: every fifth example of each class, in the data set's order, is held out.
    """
    from sklearn import datasets

    digits = datasets.load_digits()
    rank = np.zeros(len(digits.target), int)
    for label in range(10):
        rank[digits.target == label] = np.arange((digits.target == label).sum())
    chosen = (rank % 5 == 4) == (split == "held_out")
    images = (digits.images / 8.0 - 1.0).astype(np.float32)[..., None]
    return images[chosen], digits.target[chosen].astype(np.int32)


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images held in memory."""

    encoded_by = None
    older_fingerprints = ()
    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    fingerprint: str

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.images.shape[1:]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"image": self.images[index], "label": self.labels[index]}


@dataclasses.dataclass(frozen=True)
class SyntheticSource:
    """One blob an image; its class sets the angle of its place, the index the rest."""

    encoded_by = None
    older_fingerprints = ()
    size: int
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        return _digest(f"synthetic {self.size} {self.image_shape} {len(self.class_names)}".encode())

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        height, width, channels = self.image_shape
        rng = np.random.default_rng(index)
        label = int(rng.integers(max(1, len(self.class_names))))
        angle = 2 * np.pi * (label + rng.uniform(-0.2, 0.2)) / max(1, len(self.class_names))
        y, x = np.mgrid[:height, :width]
        y, x = (y + 0.5) / height - 0.5, (x + 0.5) / width - 0.5
        distance2 = (y - 0.3 * np.sin(angle)) ** 2 + (x - 0.3 * np.cos(angle)) ** 2
        blob = np.exp(-distance2 / (2 * rng.uniform(0.08, 0.16) ** 2))
        colour = rng.uniform(0.5, 1.0, channels)
        return {"image": (2 * blob[..., None] * colour - 1).astype(np.float32), "label": np.int32(label)}


def _digits(split: str, wanted: str) -> ArraySource:
    if split not in _DIGITS_SPLITS:
        raise UserError(f"data.split={split}: the digits have {' and '.join(_DIGITS_SPLITS)}")
    images, labels = load_digits(split)
    names = tuple(str(digit) for digit in range(10))
    chosen = choose(names, wanted)
    indices, labels = relabel(labels, chosen)
    images = images[indices]
    return ArraySource(images, labels, tuple(names[i] for i in chosen), _digest(images.tobytes(), labels.tobytes()))


def _blobs(size: int, shape: tuple[int, int, int], split: str) -> BlobSource:
    if split not in _BLOB_SPLITS:
        raise UserError(f"data.split={split}: the blobs have {' and '.join(_BLOB_SPLITS)}")
    if shape[2] != 3:
        raise UserError(f"data.channels={shape[2]}: the blobs have 3, red, green and blue")
    return BlobSource(size, shape, split)


def _say_left_out(source: FolderSource) -> None:
    if source.left_out:
        counted = count_by_suffix(source.left_out)
        tqdm.write(f"note: {printable(source.root)}: left out {counted}: not images that Pillow reads", file=sys.stderr)


def name_of(source: Source, index: int) -> str:
    """An image by its number and, where its source has one, by its name; of a number beyond the last image the number alone."""
    named = index < len(source) and hasattr(source, "name_of")
    return f"image {index}" + (f" ({source.name_of(index)})" if named else "")


def open_source(config: ml_collections.ConfigDict) -> Source:
    """The source of `config`, the config's `data` section, in which `background`, `text` and `features` may be missing.

    Says on stderr what a folder holds besides images.

    Raises:
      UserError: unknown or missing source, images of another shape than the config says, or captions or features of other images.
    """
    images = _open(config)
    source = with_texts(images, config.text) if config.get("text") else images
    return with_features(source, config.features, images, config.flip) if config.get("features") else source


def _open(config: ml_collections.ConfigDict) -> Source:
    shape = (config.height, config.width, config.channels)
    split, wanted = config.split, config.classes
    background = parse_background(config.get("background", "white"))
    kind, _, argument = config.source.partition(":")
    if bool(argument) != (kind in ("folder", "latents", "tfds")):
        kind = None  # an argument that is missing, or that would be ignored
    if split != "train" and kind in ("folder", "latents", "synthetic"):
        raise UserError(f"data.split={split}: only tfds:NAME, digits and blobs have splits")
    if wanted and kind in ("latents", "synthetic", "blobs"):
        raise UserError(f"data.classes={wanted} is not possible for {kind}; for latents, use speedit_jax.encode --classes")
    if kind == "digits":
        source = _digits(split, wanted)
    elif kind == "folder":
        source = open_folder(storage.path(argument), shape, config.max_broken, wanted, background)
        _say_left_out(source)
    elif kind == "tfds":
        source = open_tfds(argument, split, shape, wanted, background)
    elif kind == "latents":
        source = open_latents(storage.path(argument))
    elif kind == "synthetic":
        names = tuple(f"class {i}" for i in range(config.synthetic_classes))
        source = SyntheticSource(config.synthetic_size, shape, names)
    elif kind == "blobs":
        source = _blobs(config.synthetic_size, shape, split)
    else:
        raise UserError(
            f"unknown data.source {config.source!r}; choose digits, folder:PATH, tfds:NAME, latents:PATH, synthetic or blobs"
        )
    if source.image_shape != shape and not source.encoded_by:
        raise UserError(
            f"data.source={config.source} has images of shape {source.image_shape}, but data.height, data.width and"
            f" data.channels say {shape}"
        )
    return source

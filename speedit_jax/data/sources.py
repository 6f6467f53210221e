"""Data sources: random-access sequences of {"image": [H, W, C] float32 in [-1, 1], "label": int}.

`digits`       scikit-learn's 1,797 labelled 8x8 handwritten digits; the 80 % of a fixed stratified split
`folder:PATH`  images below PATH: its sub-directories are the classes; without any, the set is unconditional
`tfds:NAME`    a set that TensorFlow Datasets prepared, NAME[/CONFIG][:VERSION] (data/tfds.py)
`latents:PATH` what speedit_jax.encode wrote: {"moments", "label"} (data/latents.py)
`synthetic`    coloured blobs drawn from the index: any shape, any number of classes, no files
"""

import dataclasses
import hashlib
import sys
from pathlib import Path
from typing import Any, Protocol

import ml_collections
import numpy as np
from tqdm import tqdm

from speedit_jax.data.classes import choose, relabel
from speedit_jax.data.images import check_channels, read_image
from speedit_jax.data.latents import open_latents
from speedit_jax.data.tfds import open_tfds
from speedit_jax.errors import UserError

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".gif"}
_DIGITS_SPLITS = ("train", "held_out")


class Source(Protocol):
    """What the loader needs of a data set.

    Attributes:
      image_shape: (H, W, C).
      class_names: empty when the set is unconditional.
      fingerprint: equal for equal data; a checkpoint refuses to resume on other data.
      latents: of what autoencoder, if these are not images.
    """

    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    fingerprint: str
    latents: dict[str, Any] | None

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

    latents = None
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
class FolderSource:
    """Image files, decoded, cropped and scaled when asked for.

    A file that cannot be decoded is named, once, and the next one that can stands in for it, the same at every run; more than
    `max_broken` of them are an error.
    """

    latents = None
    root: Path
    files: tuple[str, ...]
    labels: tuple[int, ...]
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    fingerprint: str
    max_broken: int = 0
    broken: set[int] = dataclasses.field(default_factory=set, compare=False)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        for i in range(index, index + len(self)):
            try:
                return self._decode(i % len(self))
            except UserError as e:
                self._count(i % len(self), e)
        raise UserError(f"no image in {self.root} can be read")

    def _count(self, index: int, error: UserError) -> None:
        seen = index in self.broken
        self.broken.add(index)
        if len(self.broken) > self.max_broken:
            limit = f" ({len(self.broken)} such files, data.max_broken={self.max_broken})" if self.max_broken else ""
            raise UserError(f"{error}{limit}") from error
        if not seen:
            tqdm.write(f"warning: {error}; the next image stands in for it", file=sys.stderr)

    def _decode(self, index: int) -> dict[str, np.ndarray]:
        path = self.root / self.files[index]
        try:
            image = read_image(path, self.image_shape)
        except Exception as e:
            # Pillow raises many kinds for many kinds of damage; to the user they are one.
            raise UserError(f"cannot read the image {path}: {e}; mend it or take it out of the folder") from e
        return {"image": image, "label": np.int32(self.labels[index])}


def _images(directory: Path, recursive: bool) -> list[Path]:
    """Image files below a directory, sorted; hidden ones are thumbnails and macOS's ._ files."""
    found = []
    for path in directory.rglob("*") if recursive else directory.iterdir():
        hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
        if not hidden and path.suffix.lower() in _SUFFIXES and path.is_file():
            found.append(path)
    return sorted(found)


def _folder(root: Path, image_shape: tuple[int, int, int], max_broken: int, wanted: str) -> FolderSource:
    if not root.is_dir():
        raise UserError(f"data.source=folder:{root}: no such directory")
    check_channels(image_shape[2])
    # Hidden directories are tools' own, not classes.
    directories = tuple(sorted(d.name for d in root.iterdir() if d.is_dir() and not d.name.startswith(".")))
    loose = _images(root, recursive=False) if directories else []
    if loose:
        raise UserError(
            f"data.source=folder:{root}: {loose[0].name} and {len(loose) - 1} more images lie beside the class directories;"
            " move them into one"
        )
    classes = tuple(directories[number] for number in choose(directories, wanted))
    files, labels = [], []
    for label, name in enumerate(classes or (".",)):
        found = _images(root / name, recursive=True)
        if not found:
            raise UserError(f"data.source=folder:{root}: no images in {root / name} ({', '.join(sorted(_SUFFIXES))})")
        files += found
        labels += [label] * len(found)
    names = tuple(str(p.relative_to(root)) for p in files)
    sizes = [str(p.stat().st_size) for p in files]
    fingerprint = _digest("\n".join(names).encode(), "\n".join(sizes).encode())
    return FolderSource(root, names, tuple(labels), classes, image_shape, fingerprint, max_broken)


@dataclasses.dataclass(frozen=True)
class SyntheticSource:
    """One blob an image; its class sets the angle of its place, the index the rest."""

    latents = None
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


def open_source(config: ml_collections.ConfigDict) -> Source:
    """The source of `config`, the config's `data` section.

    Raises:
      UserError: unknown or missing source, or images of another shape than the config says.
    """
    shape = (config.height, config.width, config.channels)
    split, wanted = config.split, config.classes
    kind, _, argument = config.source.partition(":")
    if bool(argument) != (kind in ("folder", "latents", "tfds")):
        kind = None  # an argument that is missing, or that would be ignored
    if split != "train" and kind in ("folder", "latents", "synthetic"):
        raise UserError(f"data.split={split}: only tfds:NAME and the digits have splits")
    if wanted and kind in ("latents", "synthetic"):
        raise UserError(f"data.classes={wanted}: not of {kind}; for latents, give speedit_jax.encode --classes")
    if kind == "digits":
        source = _digits(split, wanted)
    elif kind == "folder":
        source = _folder(Path(argument).expanduser(), shape, config.max_broken, wanted)
    elif kind == "tfds":
        source = open_tfds(argument, split, shape, wanted)
    elif kind == "latents":
        source = open_latents(Path(argument).expanduser())
    elif kind == "synthetic":
        names = tuple(f"class {i}" for i in range(config.synthetic_classes))
        source = SyntheticSource(config.synthetic_size, shape, names)
    else:
        raise UserError(
            f"unknown data.source {config.source!r}; choose digits, folder:PATH, tfds:NAME, latents:PATH or synthetic"
        )
    if source.image_shape != shape and not source.latents:
        raise UserError(
            f"data.source={config.source} has images of shape {source.image_shape}, but data.height, data.width and"
            f" data.channels say {shape}"
        )
    return source

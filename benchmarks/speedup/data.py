"""The image sets of the comparison, in memory: what a model learns, and what is held out from it.

`fashion`  Fashion-MNIST, padded to 32x32: `apt-get install dataset-fashion-mnist`, or --fashion=DIR with the four .gz files
`emoji`    Google's emoji at 32x32 in colour, their categories as classes: `npm pack emoji-datasource-google`, --emoji=package.tgz
`digits`   scikit-learn's 8x8 digits: for the rehearsal
"""

import argparse
import dataclasses
import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from speedit_jax.data.sources import ArraySource, load_digits
from speedit_jax.errors import UserError

FASHION = Path("/usr/share/datasets/fashion-mnist")
_FASHION_CLASSES = ["T-shirt", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
_PIXELS = 32


ROOT = Path(__file__).resolve().parents[2]
RAW = ROOT / "docs" / "results" / "speedup"  # raw numbers, and the judges


def add_places(parser: argparse.ArgumentParser) -> None:
    """The flags that say where a comparison's checkpoints and images are."""
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "speedup", help="checkpoints")
    parser.add_argument("--fashion", type=Path, default=FASHION, help="directory of Fashion-MNIST's files")
    parser.add_argument("--emoji", type=Path, help="the .tgz of emoji-datasource-google")


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images [n, H, W, C] float32 in [-1, 1], in two parts."""

    name: str
    train: ArraySource
    held_out: ArraySource


def open_set(name: str, fashion: Path = FASHION, emoji: Path | None = None) -> ImageSet:
    """The image set `name`.

    Args:
      fashion: the directory of Fashion-MNIST's files.
      emoji: the npm package, a .tgz.

    Raises:
      UserError: the files are not there.
    """
    if name == "fashion":
        return _set(name, _FASHION_CLASSES, *(_fashion(fashion, part) for part in ("train", "t10k")))
    if name == "emoji":
        return _emoji(emoji)
    return _set(name, list("0123456789"), *(load_digits(part) for part in ("train", "held_out")))


def _set(name, classes, train, held_out) -> ImageSet:
    def source(images, labels):
        fingerprint = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()[:16]
        return ArraySource(images, labels.astype(np.int32), tuple(classes), fingerprint)

    return ImageSet(name, source(*train), source(*held_out))


def _scaled(images: np.ndarray) -> np.ndarray:
    return (images / np.float32(127.5) - 1).astype(np.float32)


def _fashion(directory: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    images = _idx(directory / f"{part}-images-idx3-ubyte.gz", header=16).reshape(-1, 28, 28, 1)
    margin = (_PIXELS - 28) // 2
    padded = np.pad(images, ((0, 0), (margin, margin), (margin, margin), (0, 0)))  # black, as their background
    return _scaled(padded), _idx(directory / f"{part}-labels-idx1-ubyte.gz", header=8)


def _idx(path: Path, header: int) -> np.ndarray:
    if not path.exists():
        raise UserError(f"{path} is missing: apt-get install dataset-fashion-mnist, or name its directory with --fashion")
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def _emoji(package: Path | None) -> ImageSet:
    """Every fifth emoji of a category, in the package's order, is held out; skin tones and the five components are left out."""
    if package is None or not package.is_file():
        raise UserError(f"--emoji={package}: no such file; npm pack emoji-datasource-google, and name the .tgz")
    with tarfile.open(package) as archive:
        records = json.loads(archive.extractfile("package/emoji.json").read())
        records = [r for r in records if r["has_img_google"] and r["category"] != "Component"]
        wanted = {f"package/img/google/64/{r['image']}" for r in records}
        files = {m.name: archive.extractfile(m).read() for m in archive if m.name in wanted}
    classes = sorted({r["category"] for r in records})
    parts, seen = {True: ([], []), False: ([], [])}, dict.fromkeys(classes, 0)
    for record in sorted(records, key=lambda r: r["image"]):
        picture = Image.open(io.BytesIO(files[f"package/img/google/64/{record['image']}"])).convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        small = Image.alpha_composite(white, picture).convert("RGB").resize((_PIXELS, _PIXELS), Image.Resampling.BOX)
        images, labels = parts[seen[record["category"]] % 5 == 4]
        seen[record["category"]] += 1
        images.append(np.asarray(small))
        labels.append(classes.index(record["category"]))
    train, held_out = ((_scaled(np.stack(images)), np.array(labels)) for images, labels in (parts[False], parts[True]))
    return _set("emoji", classes, train, held_out)

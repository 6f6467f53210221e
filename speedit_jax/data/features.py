"""What an image encoder makes of a data set, on disk: computed once, aligned with in every epoch (speedit_jax.features).

00000-of-00003.array_record   record i: float16 [h, w, F], the features of image i of the source on a grid; where those of mirror
                              images are stored, too, record 2 i is the image's and record 2 i + 1 its mirror image's
00000-of-00003.json           the shard's checksum
header.json                   describes the whole set; data/shards.py has the rest
"""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from speedit_jax import storage
from speedit_jax.data import shards
from speedit_jax.data.joined import JoinedSource, images_of
from speedit_jax.data.pixels import WHITE
from speedit_jax.errors import UserError

_NUMBERS = np.dtype("<f2")  # 2^-11 of a feature: an angle of a hundredth of a degree
_COMMAND = "speedit_jax.features"


def _all_finite(numbers: np.ndarray) -> bool:
    """Of float16, by their bits: infinity and NaN have a full exponent. np.isfinite takes longer than all else of a reading."""
    return (numbers.view("<u2") & 0x7FFF).max() < 0x7C00


def write_shard(path: Path, examples: Iterable[np.ndarray], name: Callable[[int], str]) -> dict[str, Any]:
    """Writes a shard of the features of images, [1 or 2, h, w, F] each, under a temporary name, then gives it its own.

    Args:
      name: index in the shard -> what an error calls that image.

    Returns:
      What the shard's JSON holds: images, records and sha256.

    Raises:
      UserError: numbers that are not finite, or not in float16; the shard is not written then.
    """

    def write(partial):
        writer, images, records = shards.Writer(partial), 0, 0
        try:
            for of_image in examples:
                with np.errstate(over="ignore"):  # said below, by name
                    stored = np.asarray(of_image, _NUMBERS)
                if not _all_finite(stored):
                    raise UserError(
                        f"{name(images)}: its features are not finite in float16; use another encoder or --dtype=float32"
                    )
                for one in stored:
                    writer.write(one.tobytes())
                images, records = images + 1, records + len(stored)
        finally:
            writer.close()
        return records, {"images": images}

    return shards.write_shard(path, write)


def belongs_to(source: Any) -> dict[str, Any]:
    """What is recorded of the images that features are of; latents have the features of the images that they were made of.

    Those are over white, as `encode` has them. White is left out: stores older than "background" are over white, too.
    """
    images = images_of(source)
    background = tuple(getattr(source, "background", WHITE))
    over = {"background": "#{:02x}{:02x}{:02x}".format(*background)} if background != WHITE else {}
    return {"count": len(source), "fingerprint": images["fingerprint"], "image_shape": list(images["shape"])} | over


def check_same(directory: Path, saved: dict[str, Any], what: dict[str, Any]) -> None:
    """Whether shards of the encoding `saved` and of the encoding `what` may be mixed; both are contents of encoding.json.

    Raises:
      UserError: they may not.
    """
    changed = f"images of {what['data']['source']} were added, removed or edited"
    shards.check_same(directory, _identity(saved), _identity(what), {"data.fingerprint", "data.count"}, changed)


def _identity(what: dict[str, Any]) -> dict[str, Any]:
    """What shards depend on; not where encoder and images lie."""
    flat = {key: value for key, value in what.items() if not isinstance(value, dict)}
    for part, name in (("features", "encoder"), ("data", "source")):
        flat |= {f"{part}.{key}": value for key, value in what.get(part, {}).items() if key != name}
    return flat


def write_header(directory: Path, what: dict[str, Any], facts: list[dict[str, Any]]) -> dict[str, Any]:
    """header.json: `what` and the shards' facts."""
    header = what | {"shards": shards.named(facts)}
    storage.write_json(directory / shards.HEADER, header, shared=True)
    return header


@dataclasses.dataclass(frozen=True)
class FeatureStore:
    """The features of a data set.

    Attributes:
      directory: where they are.
      header: all of header.json.
    """

    directory: Path
    header: dict[str, Any]
    records: Any

    @property
    def identity(self) -> dict[str, Any]:
        """Of the encoder: {"encoder": where it was, and what tells it from others}."""
        return self.header["features"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(h, w, F)."""
        return tuple(self.header["shape"])

    @property
    def mirrored(self) -> bool:
        """Whether it has the features of mirror images, too."""
        return self.header["mirrored"]

    @property
    def data(self) -> dict[str, Any]:
        """Of what images they are, as `belongs_to` has it; and the source's name."""
        return self.header["data"]

    @property
    def checksum(self) -> str:
        """Of all that is stored, 16 hexadecimal digits."""
        return shards.checksum(self.header)

    def read(self, index: int, mirrored: bool) -> np.ndarray:
        """The features of an image, or of its mirror image: float16 [h, w, F].

        Raises:
          UserError: they are not finite, as a damaged file may hold them.
        """
        record = self.records[(1 + self.mirrored) * index + mirrored]
        found = np.frombuffer(record, _NUMBERS).reshape(self.shape)
        if not _all_finite(found):
            raise UserError(
                f"the features of image {index} in {self.directory} are not finite; --verify names their shard: remove that and"
                f" run {_COMMAND} again"
            )
        return found


@dataclasses.dataclass(frozen=True)
class StoredFeatures:
    """What a record of a `FeaturedSource` holds as "features": not read before it is known whether the image is mirrored."""

    store: FeatureStore
    index: int

    def read(self, mirrored: bool) -> np.ndarray:
        return self.store.read(self.index, mirrored)


class FeaturedSource(JoinedSource):
    """A data source with the features of a store: its records have "features", a `StoredFeatures`, too."""

    @property
    def features(self) -> FeatureStore:
        return self._store

    def _beside(self, index: int) -> dict[str, Any]:
        return {"features": StoredFeatures(self.features, index)}


def with_features(source: Any, directory: str, images: Any, flip: bool) -> FeaturedSource:
    """The source with the features of the store in `directory`, which must be those of its records.

    Args:
      images: the source, without captions.
      flip: half of the images will be mirrored.

    Raises:
      UserError: there is no whole store, it is that of another data set, or it lacks mirror images.
    """
    store, wanted = open_features(storage.path(directory)), belongs_to(images)
    found = store.data
    if (found["count"], found["fingerprint"]) != (wanted["count"], wanted["fingerprint"]):
        raise UserError(
            f"data.features={directory} holds features of another data set ({found['source']}, {found['count']:,} images,"
            f" fingerprint {found['fingerprint']}) than data.source ({wanted['count']:,} images, fingerprint"
            f" {wanted['fingerprint']}); run {_COMMAND} on this one"
        )
    (height, width, _), (h, w, _) = wanted["image_shape"], found["image_shape"]
    if height * w != width * h:
        raise UserError(
            f"data.features={directory} holds features of images that were cropped to {h}x{w}, and these are {height}x{width};"
            f" run {_COMMAND} with --size={height},{width}"
        )
    over, behind = (of.get("background", "white") for of in (found, wanted))
    if over != behind:
        raise UserError(
            f"data.features={directory} holds features of images over {over}, and these are over {behind} (data.background); run"
            f" {_COMMAND} with --background={behind}"
        )
    if flip and not store.mirrored:
        raise UserError(
            f"data.flip=True, but data.features={directory} has no features of mirror images; set data.flip=False, or run"
            f" {_COMMAND} with --mirror"
        )
    return FeaturedSource(source, store)


def open_features(directory: Path) -> FeatureStore:
    """Raises a UserError where `directory` does not hold all that its header says."""
    header = _read_header(directory)
    count = header["data"]["count"] * (1 + header["mirrored"])
    return FeatureStore(directory, header, shards.open_records(directory, header, count, _COMMAND))


def _read_header(directory: Path) -> dict[str, Any]:
    header = shards.read_header(directory, _COMMAND)
    if "features" not in header:
        raise UserError(f"{directory} holds no features but something else; name a directory that {_COMMAND} wrote")
    return header


def verify(directory: Path) -> dict[str, Any]:
    """Reads every file and compares checksums; returns the header.

    Raises:
      UserError: names the files that differ.
    """
    header = _read_header(directory)
    if bad := shards.damaged(directory, header):
        raise UserError(f"{directory}: {shards.listed(bad)} missing or damaged; remove them and run {_COMMAND} again")
    return header

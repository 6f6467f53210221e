"""Latents on disk: a directory of ArrayRecord shards of VAE moments, encoded once and trained on many times.

00000-of-00013.array_record   per image its label, int32, and moments, float16 [2, h, w, 2C]: of the image and of its mirror
                              image, the posterior's mean and log variance along the channels
00000-of-00013.json           the shard's checksum and sums, and the numbers of images that another one stands in for
header.json                   describes the whole set; data/shards.py has the rest
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import grain
import numpy as np

from speedit_jax import storage
from speedit_jax.data import shards
from speedit_jax.errors import UserError

_LABEL = np.dtype("<i4")
_MOMENTS = np.dtype("<f2")  # 2^-11 of a latent: far less than the noise that is added to it
_COMMAND = "speedit_jax.encode"


def write_shard(
    path: Path,
    examples: Iterable[tuple[int, np.ndarray]],
    name: Callable[[int], str] = "record {}".format,
    broken: Callable[[], list[int]] = list,
) -> dict[str, Any]:
    """Writes a shard of (label, moments [2, h, w, 2C]) under a temporary name, then gives it its own.

    Args:
      name: index in the shard -> what an error calls that example.
      broken: asked when all are written: numbers in the whole set of images that could not be read, so the next one stands in.

    Returns:
      What the shard's JSON holds: records, sha256, per channel the sums of a latent and of its square, and broken, if any are.

    Raises:
      UserError: moments that are not finite, or not in float16; the shard is not written then.
    """

    def write(partial):
        count, first, second = _write_records(partial, examples, name)
        stood_in_for = {"broken": numbers} if (numbers := broken()) else {}
        return count, {"sum": list(first), "sum_of_squares": list(second)} | stood_in_for

    return shards.write_shard(path, write)


def _write_records(path: Path, examples, name) -> tuple[int, np.ndarray, np.ndarray]:
    """(records, sum of latents, sum of their squares); the sums are per channel."""
    writer = shards.Writer(path)
    count, first, second = 0, 0.0, 0.0
    try:
        for label, moments in examples:
            with np.errstate(over="ignore"):  # said below, by name
                stored = np.asarray(moments, _MOMENTS)
            if not np.isfinite(stored).all():
                raise UserError(f"{name(count)}: {_not_finite(moments)}")
            writer.write(np.asarray(label, _LABEL).tobytes() + stored.tobytes())
            mean, logvar = np.split(stored.astype(np.float64), 2, axis=-1)
            first = first + mean.mean(axis=(0, 1, 2))
            second = second + (mean**2 + np.exp(logvar)).mean(axis=(0, 1, 2))
            count += 1
    finally:
        writer.close()
    return count, first, second


def _not_finite(moments: np.ndarray) -> str:
    """Why moments cannot be stored, and what to do."""
    if np.isfinite(moments).all():
        largest, limit = np.abs(moments).max(), np.finfo(_MOMENTS).max
        return f"its latents reach {largest:.3g}, and float16 holds at most {limit:.0f}; check the VAE, or name another one"
    return "its latents are not finite; the VAE overflows or is damaged: try --dtype=float32, or another VAE"


def check_same(directory: Path, saved: dict[str, Any], what: dict[str, Any], older_fingerprints: tuple[str, ...]) -> None:
    """Whether shards of the encoding `saved` and of the encoding `what` may be mixed; both are contents of encoding.json.

    Args:
      older_fingerprints: what earlier versions called the images of `what`.

    Raises:
      UserError: they may not.
    """
    old, new = _identity(saved), _identity(what)
    if old.get("images.fingerprint") in older_fingerprints:
        old["images.fingerprint"] = new["images.fingerprint"]
    changed = f"images of {what['images']['source']} were added, removed or edited"
    shards.check_same(directory, old, new, {"images.fingerprint", "images.count"}, changed)


def _identity(what: dict[str, Any]) -> dict[str, Any]:
    """What shards depend on: neither where images and autoencoder lie, nor the scale, which is applied in training."""
    flat = {key: value for key, value in what.items() if not isinstance(value, dict)}
    for section, left_out in (("latents", ("vae", "config")), ("images", ("source",))):
        flat |= {f"{section}.{key}": value for key, value in what.get(section, {}).items() if key not in left_out}
    config = what.get("latents", {}).get("config", {})
    return flat | {"latents.config": {k: v for k, v in config.items() if k not in ("scaling_factor", "shift_factor")}}


def write_header(directory: Path, what: dict[str, Any], facts: list[dict[str, Any]]) -> dict[str, Any]:
    """header.json: `what`, the shards' facts, their count and per-channel statistics of the unscaled latents.

    Raises:
      UserError: names shards that hold numbers that are not finite.
    """
    named = shards.named(facts)
    _check_sums(directory, named)
    count = sum(shard["records"] for shard in named)
    mean = np.sum([shard["sum"] for shard in named], axis=0) / count
    square = np.sum([shard["sum_of_squares"] for shard in named], axis=0) / count
    header = what | {
        "count": count,
        "mean": list(mean),
        "std": list(np.sqrt(square - mean**2)),
        "shards": named,
    }
    storage.write_json(directory / shards.HEADER, header, shared=True)
    return header


def _check_sums(directory: Path, facts: list[dict[str, Any]]) -> None:
    """Raises a UserError for shards with numbers that are not finite, which earlier versions wrote."""
    bad = [shard["name"] for shard in facts if not np.isfinite([shard["sum"], shard["sum_of_squares"]]).all()]
    if bad:
        raise UserError(_remove_infinite(directory, bad))


def _remove_infinite(directory: Path, names: list[str]) -> str:
    return (
        f"{directory}: numbers that are not finite in {shards.listed(names)}; remove these files and run speedit_jax.encode"
        " again, which names the image"
    )


@dataclasses.dataclass(frozen=True)
class LatentSource:
    """The latents of a directory: {"moments": [2, h, w, 2C] float32 (image, mirror image), "label"}.

    Attributes:
      image_shape: (h, w, C), of a latent.
      encoded_by: the header's account of them: the VAE, its scale and shift.
      header: all of header.json.
    """

    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    fingerprint: str
    encoded_by: dict[str, Any]
    records: Any
    directory: Path
    header: dict[str, Any]

    @functools.cached_property
    def broken(self) -> frozenset[int]:
        """As FolderSource's: what is joined to these records is that of the image which stands in."""
        return frozenset(number for shard in self.header["shards"] for number in shard.get("broken", ()))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Raises a UserError for a record that is not finite, as a damaged file may hold it."""
        record = self.records[index]
        h, w, c = self.image_shape
        moments = _moments(record).reshape(2, h, w, 2 * c)
        if not np.isfinite(moments).all():
            raise UserError(
                f"record {index} of {self.directory} is not finite; --verify names its shard: remove that and run"
                " speedit_jax.encode again"
            )
        return {"moments": moments, "label": np.frombuffer(record, _LABEL, 1)[0]}


def _moments(record: bytes) -> np.ndarray:
    """float32, flat."""
    return np.frombuffer(record, _MOMENTS, offset=_LABEL.itemsize).astype(np.float32)


def open_latents(directory: Path) -> LatentSource:
    """Raises a UserError where `directory` does not hold all that its header says."""
    header = _read_header(directory)
    _check_sums(directory, header["shards"])
    records = shards.open_records(directory, header, header["count"], _COMMAND)
    fingerprint = shards.checksum(header)
    return LatentSource(
        tuple(header["shape"]), tuple(header["class_names"]), fingerprint, header["latents"], records, directory, header
    )


def _read_header(directory: Path) -> dict[str, Any]:
    header = shards.read_header(directory, _COMMAND)
    if "latents" not in header:
        raise UserError(f"{directory} holds no latents but something else; name a directory that {_COMMAND} wrote")
    return header


def verify(directory: Path) -> dict[str, Any]:
    """Reads every shard, compares checksums and checks that all numbers are finite; returns the header.

    Raises:
      UserError: names the shards that differ, or that hold numbers that are not finite.
    """
    header = _read_header(directory)
    bad = shards.damaged(directory, header)
    if bad:
        raise UserError(f"{directory}: {shards.listed(bad)} missing or damaged; remove them and run speedit_jax.encode again")
    paths = {shard["name"]: storage.cached(directory / shard["name"], shard["sha256"]) for shard in header["shards"]}
    found = {name: _first_infinite(path) for name, path in paths.items()}
    infinite = [f"{name} (record {index})" for name, index in found.items() if index is not None]
    if infinite:
        raise UserError(_remove_infinite(directory, infinite))
    return header


def _first_infinite(path: Path) -> int | None:
    records = grain.sources.ArrayRecordDataSource(str(path))
    return next((i for i in range(len(records)) if not np.isfinite(_moments(records[i])).all()), None)

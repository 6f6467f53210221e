"""Latents on disk: a directory of ArrayRecord shards of VAE moments, encoded once and trained on many times.

00000-of-00013.array_record   per image its label, int32, and moments, float16 [2, h, w, 2C]: of the image and of its mirror
                              image, the posterior's mean and log variance along the channels
00000-of-00013.json           the shard's checksum and sums, written last: without it the shard counts as missing
header.json                   describes the whole set; written when every shard is finished
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from speedit_jax import storage
from speedit_jax.errors import UserError

_LABEL = np.dtype("<i4")
_MOMENTS = np.dtype("<f2")  # 2^-11 of a latent: far less than the noise that is added to it
_ONE_BY_ONE = "group_size:1,uncompressed"  # random access reads what it asked for; floats do not compress
HEADER = "header.json"
_DOWNLOADS = 8  # shards at the same time: records are read in any order, far too often for an object store


def shard_name(index: int, total: int) -> str:
    return f"{index:05d}-of-{total:05d}.array_record"


def remove_partial(directory: Path) -> None:
    """What killed processes left behind."""
    for path in directory.glob("*.partial"):
        path.unlink(missing_ok=True)


def write_shard(
    path: Path, examples: Iterable[tuple[int, np.ndarray]], name: Callable[[int], str] = "record {}".format
) -> dict[str, Any]:
    """Writes a shard of (label, moments [2, h, w, 2C]) under a temporary name, then gives it its own.

    Args:
      name: index in the shard -> what an error calls that example.

    Returns:
      What the shard's JSON holds: records, sha256, and per channel the sums of a latent and of its square.

    Raises:
      UserError: moments that are not finite, or not in float16; the shard is not written then.
    """
    with storage.another_name(path, shared=True) as partial:
        count, first, second = _write_records(partial, examples, name)
        if finished := finished_shard(path):  # by another process, meanwhile
            return finished
        facts = {"records": count, "sha256": storage.sha256(partial), "sum": list(first), "sum_of_squares": list(second)}
        storage.publish(partial, path)
    storage.write_json(path.with_suffix(".json"), facts, shared=True)
    return facts


def _write_records(path: Path, examples, name) -> tuple[int, np.ndarray, np.ndarray]:
    """(records, sum of latents, sum of their squares); the sums are per channel."""
    writer = ArrayRecordWriter(str(path), _ONE_BY_ONE)
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


def finished_shard(path: Path) -> dict[str, Any] | None:
    """What `write_shard` returned for it; None where it was not finished."""
    facts = path.with_suffix(".json")
    return read_json(facts) if facts.exists() and path.exists() else None


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
    different = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    if different and set(different) <= {"images.fingerprint", "images.count"}:
        raise UserError(
            f"{what['images']['source']} has changed since {directory} was begun: images were added, removed or edited;"
            " name another --out, or remove that directory to encode all images again"
        )
    if different:
        raise UserError(f"{directory} was encoded with other settings ({', '.join(different)}); choose another --out")


def _identity(what: dict[str, Any]) -> dict[str, Any]:
    """What shards depend on: neither where images and autoencoder lie, nor the scale, which is applied in training."""
    flat = {key: value for key, value in what.items() if not isinstance(value, dict)}
    for section, left_out in (("latents", ("vae", "config")), ("images", ("source",))):
        flat |= {f"{section}.{key}": value for key, value in what.get(section, {}).items() if key not in left_out}
    config = what.get("latents", {}).get("config", {})
    return flat | {"latents.config": {k: v for k, v in config.items() if k not in ("scaling_factor", "shift_factor")}}


def write_header(directory: Path, what: dict[str, Any], shards: list[dict[str, Any]]) -> dict[str, Any]:
    """header.json: `what`, the shards' facts, their count and per-channel statistics of the unscaled latents.

    Raises:
      UserError: names shards that hold numbers that are not finite.
    """
    shards = [{"name": shard_name(i, len(shards)), **shard} for i, shard in enumerate(shards)]
    _check_sums(directory, shards)
    count = sum(shard["records"] for shard in shards)
    mean = np.sum([shard["sum"] for shard in shards], axis=0) / count
    square = np.sum([shard["sum_of_squares"] for shard in shards], axis=0) / count
    header = what | {
        "count": count,
        "mean": list(mean),
        "std": list(np.sqrt(square - mean**2)),
        "shards": shards,
    }
    storage.write_json(directory / HEADER, header, shared=True)
    return header


def _check_sums(directory: Path, shards: list[dict[str, Any]]) -> None:
    """Raises a UserError for shards with numbers that are not finite, which earlier versions wrote."""
    bad = [shard["name"] for shard in shards if not np.isfinite([shard["sum"], shard["sum_of_squares"]]).all()]
    if bad:
        raise UserError(_remove_infinite(directory, bad))


def _remove_infinite(directory: Path, names: list[str]) -> str:
    return (
        f"{directory}: numbers that are not finite in {_listed(names)}; remove these files and run speedit_jax.encode again,"
        " which names the image"
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


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
    header = read_header(directory)
    _check_sums(directory, header["shards"])
    paths = [directory / shard["name"] for shard in header["shards"]]
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} is missing; run speedit_jax.encode again to write the missing shards")
    if storage.is_remote(directory):
        with ThreadPoolExecutor(_DOWNLOADS) as pool:
            paths = list(pool.map(storage.cached, paths, (shard["sha256"] for shard in header["shards"])))
    try:
        records = grain.sources.ArrayRecordDataSource([str(path) for path in paths])
        found = len(records)
    except Exception as e:
        # The reader's errors have no common class.
        raise UserError(f"cannot read the shards of {directory}: {storage.first_line(e)}; check them with --verify") from e
    if found != header["count"]:
        raise UserError(f"{directory} holds {found} records, but its header says {header['count']}; check it with --verify")
    fingerprint = hashlib.sha256("".join(shard["sha256"] for shard in header["shards"]).encode()).hexdigest()[:16]
    return LatentSource(
        tuple(header["shape"]), tuple(header["class_names"]), fingerprint, header["latents"], records, directory, header
    )


def read_header(directory: Path) -> dict[str, Any]:
    path = directory / HEADER
    if not path.exists():
        raise UserError(f"no {HEADER} in {directory}: run speedit_jax.encode; if it was interrupted, run it again")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as e:
        raise UserError(f"{path} is not JSON ({e}); remove it and run speedit_jax.encode again") from e


def verify(directory: Path) -> dict[str, Any]:
    """Reads every shard, compares checksums and checks that all numbers are finite; returns the header.

    Raises:
      UserError: names the shards that differ, or that hold numbers that are not finite.
    """
    header = read_header(directory)
    bad, infinite = [], []
    for shard in header["shards"]:
        path = directory / shard["name"]
        if not path.exists() or storage.sha256(path) != shard["sha256"]:
            bad.append(path.name)
        elif (index := _first_infinite(storage.cached(path, shard["sha256"]))) is not None:
            infinite.append(f"{path.name} (record {index})")
    if bad:
        raise UserError(f"{directory}: {_listed(bad)} missing or damaged; remove them and run speedit_jax.encode again")
    if infinite:
        raise UserError(_remove_infinite(directory, infinite))
    return header


def _first_infinite(path: Path) -> int | None:
    records = grain.sources.ArrayRecordDataSource(str(path))
    return next((i for i in range(len(records)) if not np.isfinite(_moments(records[i])).all()), None)

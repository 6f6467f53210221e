"""Statistics of a reference set in ADM's npz: mu [2048], sigma [2048, 2048], mu_s [2023], sigma_s [2023, 2023].

mu_s and sigma_s, of the spatial features, may be missing, as in pytorch-fid's files. `features`, what the statistics are of, and
of the images `n`, how many, `shape`, (H, W, C), and `crop`, how they were made, are our additions; other programs pass over them.
"""

import dataclasses
import zipfile
import zlib
from pathlib import Path

import numpy as np

from speedit_jax.errors import UserError
from speedit_jax.metrics.frechet import Gaussian
from speedit_jax.storage import replacing

STATISTICS = {"pool": "", "spatial": "_s"}  # of which features -> what ends their names


@dataclasses.dataclass(frozen=True)
class Origin:
    """What images statistics are of; None is unknown.

    Attributes:
      count: how many.
      shape: (H, W, C).
      crop: how they were brought to this shape, one of CROPS.
    """

    count: int | None = None
    shape: tuple[int, int, int] | None = None
    crop: str | None = None


CROPS = ("none", "centre")  # taken as they were, or scaled and cropped as in training (data/images.py)


def write_statistics(path: Path, statistics: dict[str, Gaussian], features: str, origin: Origin) -> None:
    """Writes the statistics of "pool" and, where there are any, of "spatial" features.

    Args:
      features: name of what extracted them.
      origin: the images.
    """
    arrays = {"features": np.array(features)}
    for name, value in (("n", origin.count), ("shape", origin.shape), ("crop", origin.crop)):
        if value is not None:
            arrays[name] = np.array(value)
    for name, gaussian in statistics.items():
        arrays |= {f"mu{STATISTICS[name]}": gaussian.mean, f"sigma{STATISTICS[name]}": gaussian.covariance}
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)


def read_statistics(path: Path, features: str) -> tuple[dict[str, Gaussian], Origin]:
    """({"pool": ..., "spatial": ...} as far as the file has them, what it says of the images).

    Args:
      features: name of what must have extracted them; files that do not say so are ADM's or pytorch-fid's, of "inception".

    Raises:
      UserError: it cannot be read, or holds statistics of something else.
    """
    keys = [key + suffix for suffix in STATISTICS.values() for key in ("mu", "sigma")]
    try:
        with path.open("rb") as content, np.load(content) as file:
            arrays = {key: np.asarray(file[key], np.float64) for key in keys if key in file.files}
            made_with = str(file["features"]) if "features" in file.files else "inception"
            origin = Origin(
                count=int(file["n"]) if "n" in file.files else None,
                shape=tuple(map(int, file["shape"])) if "shape" in file.files else None,
                crop=str(file["crop"]) if "crop" in file.files else None,
            )
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise UserError(f"{path} cannot be read as an npz of statistics ({e}); write or download it again") from e
    statistics = {}
    for name, suffix in STATISTICS.items():
        if not {f"mu{suffix}", f"sigma{suffix}"} <= arrays.keys():
            continue
        mean, covariance = arrays[f"mu{suffix}"], arrays[f"sigma{suffix}"]
        fits = mean.ndim == 1 and covariance.shape == (len(mean), len(mean))
        if not fits or not np.isfinite(mean).all() or not np.isfinite(covariance).all():
            raise UserError(
                f"{path}: mu{suffix} and sigma{suffix} are not a finite mean [D] and covariance [D, D]; create the file again"
            )
        statistics[name] = Gaussian(mean, covariance)
    if statistics and made_with != features:
        raise UserError(f"{path} holds statistics of {made_with} features, not of {features}; give features={made_with}")
    return statistics, origin

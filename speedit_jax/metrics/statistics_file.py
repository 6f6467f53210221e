"""Statistics of a reference set in ADM's npz: mu [2048], sigma [2048, 2048], mu_s [2023], sigma_s [2023, 2023].

mu_s and sigma_s, of the spatial features, may be missing, as in pytorch-fid's files. `features`, what the statistics are of, and
`n`, of how many images, are our additions; other programs pass over them.
"""

import zipfile
import zlib
from pathlib import Path

import numpy as np

from speedit_jax.errors import UserError
from speedit_jax.metrics.frechet import Gaussian
from speedit_jax.storage import replacing

STATISTICS = {"pool": "", "spatial": "_s"}  # of which features -> what ends their names


def write_statistics(path: Path, statistics: dict[str, Gaussian], features: str, count: int) -> None:
    """Writes the statistics of "pool" and, where there are any, of "spatial" features.

    Args:
      features: name of what extracted them.
      count: of images.
    """
    arrays = {}
    for name, gaussian in statistics.items():
        arrays |= {f"mu{STATISTICS[name]}": gaussian.mean, f"sigma{STATISTICS[name]}": gaussian.covariance}
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez(file, **arrays, features=np.array(features), n=np.array(count))


def read_statistics(path: Path, features: str) -> tuple[dict[str, Gaussian], int | None]:
    """({"pool": ..., "spatial": ...} as far as the file has them, the number of images where it says so).

    Args:
      features: name of what must have extracted them; files that do not say so are ADM's or pytorch-fid's, of "inception".

    Raises:
      UserError: it cannot be read, or holds statistics of something else.
    """
    keys = [key + suffix for suffix in STATISTICS.values() for key in ("mu", "sigma")]
    try:
        with np.load(path) as file:
            arrays = {key: np.asarray(file[key], np.float64) for key in keys if key in file.files}
            made_with = str(file["features"]) if "features" in file.files else "inception"
            count = int(file["n"]) if "n" in file.files else None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise UserError(f"{path} cannot be read as an npz of statistics ({e}); write or download it again") from e
    statistics = {}
    for name, suffix in STATISTICS.items():
        if not {f"mu{suffix}", f"sigma{suffix}"} <= arrays.keys():
            continue
        mean, covariance = arrays[f"mu{suffix}"], arrays[f"sigma{suffix}"]
        fits = mean.ndim == 1 and covariance.shape == (len(mean), len(mean))
        if not fits or not np.isfinite(mean).all() or not np.isfinite(covariance).all():
            raise UserError(f"{path}: mu{suffix} and sigma{suffix} are no finite mean [D] and covariance [D, D]; make it again")
        statistics[name] = Gaussian(mean, covariance)
    if statistics and made_with != features:
        raise UserError(f"{path} holds statistics of {made_with} features, not of {features}; give features={made_with}")
    return statistics, count

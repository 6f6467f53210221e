"""Statistics on disk: ADM's format, and what can be wrong with it."""

import numpy as np
import pytest

from speedit_jax.errors import UserError
from speedit_jax.metrics.frechet import Gaussian
from speedit_jax.metrics.statistics_file import Origin, read_statistics, write_statistics


def gaussian(d):
    x = np.random.default_rng(d).standard_normal((40, d))
    return Gaussian(x.mean(axis=0), np.cov(x, rowvar=False))


def test_round_trip(tmp_path):
    path = tmp_path / "x.npz"
    written = {"pool": gaussian(6), "spatial": gaussian(4)}
    origin = Origin(40, (64, 32, 3), "centre")
    write_statistics(path, written, "inception", origin)
    assert [p.name for p in tmp_path.iterdir()] == ["x.npz"]
    with np.load(path) as file:  # as ADM's evaluator reads it
        np.testing.assert_array_equal(file["mu"], written["pool"].mean)
        np.testing.assert_array_equal(file["sigma_s"], written["spatial"].covariance)
    read, told = read_statistics(path, "inception")
    assert told == origin and read.keys() == written.keys()
    for name in written:
        np.testing.assert_array_equal(read[name].mean, written[name].mean)
        np.testing.assert_array_equal(read[name].covariance, written[name].covariance)


def test_files_of_other_programs(tmp_path):
    path, g = tmp_path / "x.npz", gaussian(5)
    np.savez(path, mu=g.mean.astype(np.float32), sigma=g.covariance)
    read, told = read_statistics(path, "inception")
    assert read.keys() == {"pool"} and told == Origin() and read["pool"].mean.dtype == np.float64
    np.savez(path, arr_0=np.zeros(3))
    assert read_statistics(path, "inception") == ({}, Origin())


@pytest.mark.parametrize(
    "arrays, words",
    [
        ({"mu": np.zeros(3), "sigma": np.zeros((3, 4))}, "mu and sigma"),
        ({"mu": np.zeros((3, 1)), "sigma": np.eye(3)}, "mu and sigma"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)}, "finite"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "mu_s": np.full(2, np.inf), "sigma_s": np.eye(2)}, "mu_s and sigma_s"),
        ({"mu": np.zeros(3), "sigma": np.eye(3), "features": np.array("pixels")}, "features=pixels"),
        ({"mu": np.array(["a"]), "sigma": np.eye(1)}, "cannot be read"),
    ],
)
def test_statistics_that_are_none(tmp_path, arrays, words):
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    with pytest.raises(UserError, match=words) as error:
        read_statistics(path, "inception")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_damage(tmp_path):
    path = tmp_path / "x.npz"
    write_statistics(path, {"pool": gaussian(30)}, "inception", Origin(40))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"version https://git-lfs", whole[:200] + b"xxxx" + whole[204:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="cannot be read as an npz"):
            read_statistics(path, "inception")

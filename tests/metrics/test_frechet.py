"""Statistics and the Fréchet distance against NumPy, closed forms, and torch-fidelity's and pytorch-fid's numbers."""

import functools
from pathlib import Path

import inception_weights
import numpy as np
import pytest

from speedit_jax.metrics.frechet import Gaussian, Moments, frechet_distance

FIXTURE = Path(__file__).parents[1] / "fixtures" / "evaluation.npz"


def batches(x, rng, sizes=(1, 7, 64)):
    """Shuffled, in batches of unlike sizes."""
    x = x[rng.permutation(len(x))]
    while len(x):
        n = rng.choice(sizes)
        yield x[:n]
        x = x[n:]


def numpys(x):
    return Gaussian(x.mean(axis=0, dtype=np.float64), np.cov(x, rowvar=False, dtype=np.float64))


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_streamed_moments_are_numpys(offset):
    # With a mean of 1e4 deviations, sums of squares that are not centred would lose eight digits.
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 17)) @ rng.standard_normal((17, 17)) + offset
    moments = functools.reduce(Moments.merge, map(Moments.of, batches(x, rng)))
    assert moments.count == 500
    np.testing.assert_allclose(moments.mean, x.mean(axis=0), rtol=1e-14, atol=1e-13)
    np.testing.assert_allclose(moments.gaussian().covariance, np.cov(x, rowvar=False), rtol=1e-11, atol=1e-11)


def test_hosts_merge_in_any_order():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((300, 9)) + 5
    hosts = [functools.reduce(Moments.merge, map(Moments.of, batches(part, rng))) for part in (x[:11], x[11:200], x[200:])]
    expected = np.cov(x, rowvar=False)
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0)):
        merged = functools.reduce(Moments.merge, [hosts[i] for i in order])
        np.testing.assert_allclose(merged.gaussian().covariance, expected, rtol=1e-12, atol=1e-13)


def test_float32_features_are_summed_in_float64():
    # In float32 the mean of a million numbers around 1000 would be off in the fourth digit.
    x = (1000 + np.random.default_rng(0).standard_normal((100_000, 1))).astype(np.float32)
    moments = functools.reduce(Moments.merge, map(Moments.of, np.split(x, 100)))
    np.testing.assert_allclose(moments.mean, x.mean(axis=0, dtype=np.float64), rtol=1e-14)
    np.testing.assert_allclose(moments.gaussian().covariance[0, 0], x.var(ddof=1, dtype=np.float64), rtol=1e-12)


def test_other_programs_numbers():
    with np.load(FIXTURE) as recorded:
        expected = [float(recorded[name]) for name in ("frechet_inception_distance", "pytorch_fid")]
    sets = [
        functools.reduce(Moments.merge, map(Moments.of, np.array_split(inception_weights.features(name), 7)))
        for name in ("generated", "reference")
    ]
    ours = frechet_distance(*(moments.gaussian() for moments in sets))
    assert ours > 1
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_covariances_that_commute():
    rng = np.random.default_rng(2)
    q, _ = np.linalg.qr(rng.standard_normal((12, 12)))
    a, b = rng.uniform(0.1, 3, (2, 12))
    mean = rng.standard_normal(12)
    distance = frechet_distance(Gaussian(mean, q * a @ q.T), Gaussian(np.zeros(12), q * b @ q.T))
    np.testing.assert_allclose(distance, (mean**2).sum() + ((a**0.5 - b**0.5) ** 2).sum(), rtol=1e-12)


@pytest.mark.parametrize("rank", [1, 5])
def test_degenerate_covariances(rank):
    """u u^T and v v^T: the root of the product has the trace |u.v|; a matrix square root of it is all rounding error."""
    rng = np.random.default_rng(3)
    q, _ = np.linalg.qr(rng.standard_normal((150, 2 * rank)))
    angles, a, b = rng.uniform(0.2, 1.2, rank), rng.uniform(1, 50, rank), rng.uniform(1, 50, rank)
    u = q[:, :rank]
    v = np.cos(angles) * u + np.sin(angles) * q[:, rank:]
    expected = (a + b - 2 * np.sqrt(a * b) * np.cos(angles)).sum()
    distance = frechet_distance(Gaussian(np.zeros(150), u * a @ u.T), Gaussian(np.zeros(150), v * b @ v.T))
    np.testing.assert_allclose(distance, expected, rtol=1e-10)


def test_low_rank_against_full_rank():
    """The root of C^(1/2) u u^T C^(1/2) has the trace (u^T C u)^(1/2)."""
    rng = np.random.default_rng(4)
    full = np.cov(rng.standard_normal((500, 120)), rowvar=False)
    u = rng.standard_normal(120)
    distance = frechet_distance(Gaussian(np.zeros(120), np.outer(u, u)), Gaussian(np.zeros(120), full))
    np.testing.assert_allclose(distance, u @ u + np.trace(full) - 2 * np.sqrt(u @ full @ u), rtol=1e-10)


def test_fewer_images_than_features():
    x = np.random.default_rng(5).standard_normal((20, 200))
    gaussian = numpys(x)
    assert frechet_distance(gaussian, gaussian) <= 1e-10
    moved = frechet_distance(gaussian, Gaussian(gaussian.mean + 2, gaussian.covariance))
    np.testing.assert_allclose(moved, 800, rtol=1e-10)


def test_no_variance_at_all():
    point = Gaussian(np.zeros(3), np.zeros((3, 3)))
    assert frechet_distance(point, point) == 0
    np.testing.assert_allclose(frechet_distance(point, Gaussian(np.ones(3), np.eye(3))), 6)


def test_symmetric():
    a, b = (numpys(inception_weights.features(name)) for name in ("generated", "reference"))
    np.testing.assert_allclose(frechet_distance(a, b), frechet_distance(b, a), rtol=1e-12)

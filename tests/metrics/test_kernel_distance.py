"""KID against its definition, sum by sum, and torch-fidelity's numbers."""

import itertools
from pathlib import Path

import inception_weights
import numpy as np

from speedit_jax.metrics.kernel_distance import kernel_distance, mmd2

FIXTURE = Path(__file__).parents[1] / "fixtures" / "evaluation.npz"


def pair():
    a, b = (inception_weights.features(name) for name in ("reference", "generated"))
    few = min(len(a), len(b))
    return a[:few], b[:few]


def test_one_full_subset_is_torch_fidelitys():
    a, b = pair()
    with np.load(FIXTURE) as recorded:
        expected = float(recorded["kernel_inception_distance_mean"])
    mean, std = kernel_distance(a, b, subsets=1, subset_size=len(a))
    np.testing.assert_allclose(mean, expected, rtol=1e-6)
    assert std == 0


def test_the_definition():
    x, y = (f[:6, :3] for f in pair())

    def k(u, v):
        return (u @ v / 3 + 1) ** 3

    within = sum(np.mean([k(u, v) for u, v in itertools.permutations(z, 2)]) for z in (x, y))
    across = np.mean([k(u, v) for u in x for v in y])
    np.testing.assert_allclose(mmd2(x, y), within - 2 * across, rtol=1e-12)


def test_without_bias():
    """Two samples of one distribution: zero on average, and so often below it."""
    rng = np.random.default_rng(0)
    draws = np.array([mmd2(*rng.standard_normal((2, 20, 5))) for _ in range(400)])
    assert abs(draws.mean()) < 4 * draws.std() / 20
    assert 0.2 < (draws < 0).mean() < 0.8


def test_subsets():
    a, b = pair()
    full, _ = kernel_distance(a, b, subsets=1, subset_size=len(a))
    mean, std = kernel_distance(a, b, subsets=60, subset_size=100, seed=1)
    # Averaged over all subsets it is the full one.
    assert std > 0 and abs(mean - full) < 4 * std / 60**0.5
    assert (mean, std) == kernel_distance(a, b, subsets=60, subset_size=100, seed=1)
    assert mean != kernel_distance(a, b, subsets=60, subset_size=100, seed=2)[0]


def test_sets_of_unlike_size():
    a, b = (inception_weights.features(name) for name in ("reference", "generated"))
    mean, std = kernel_distance(a, b, subsets=5, subset_size=len(b))
    assert mean > 0 and std > 0  # subsets of the larger set, all of the smaller one

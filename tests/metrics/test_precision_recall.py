"""Precision and recall against torch-fidelity's numbers, brute force and sets whose manifolds are known."""

from pathlib import Path

import inception_weights
import numpy as np
import pytest

from speedit_jax.metrics import precision_recall as module
from speedit_jax.metrics.precision_recall import precision_recall, squared_radii

FIXTURE = Path(__file__).parents[1] / "fixtures" / "evaluation.npz"


@pytest.mark.parametrize("block", [2048, 64, 1])
def test_torch_fidelitys_numbers_whatever_the_block(monkeypatch, block):
    reference, generated = (inception_weights.features(name) for name in ("reference", "generated"))
    if block == 1:
        reference, generated = reference[:40], generated[:30]
    whole = precision_recall(reference, generated, inception_weights.NEIGHBOURS)
    monkeypatch.setattr(module, "_BLOCK", block)
    ours = precision_recall(reference, generated, inception_weights.NEIGHBOURS)
    assert ours == whole
    if block > 1:
        with np.load(FIXTURE) as recorded:
            expected = [float(recorded[name]) for name in ("precision", "recall")]
        assert 0 < expected[1] < expected[0] < 1
        np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_radii():
    x = np.random.default_rng(0).standard_normal((50, 4))
    distances = np.sort(np.linalg.norm(x[:, None] - x, axis=-1), axis=1)
    for k in (1, 3, 49):
        np.testing.assert_allclose(squared_radii(x, k), distances[:, k] ** 2, rtol=1e-12)


def test_a_set_against_itself_and_against_another():
    x = np.random.default_rng(0).standard_normal((40, 3))
    assert precision_recall(x, x) == (1, 1)
    assert precision_recall(x, x + 100) == (0, 0)


def test_which_is_which():
    """One mode of two: all that is generated is real, half of what is real is generated."""
    rng = np.random.default_rng(0)
    modes = rng.standard_normal((2, 60, 2)) + np.array([[[0, 0]], [[100, 0]]])
    precision, recall = precision_recall(np.concatenate(modes), modes[0] + 1e-3)
    assert precision == 1 and recall == 0.5


def test_the_point_itself_is_no_neighbour_but_its_copy_is():
    x = np.array([[0.0], [0.0], [1.0], [3.0]])
    np.testing.assert_allclose(squared_radii(x, 1), [0, 0, 1, 4])

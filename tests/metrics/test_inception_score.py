"""The Inception Score against closed forms and torch-fidelity's numbers."""

from pathlib import Path

import inception_weights
import numpy as np
import pytest

from speedit_jax.metrics.inception_score import inception_score

FIXTURE = Path(__file__).parents[1] / "fixtures" / "evaluation.npz"


def test_torch_fidelitys_numbers():
    with np.load(FIXTURE) as recorded:
        expected = [float(recorded[f"inception_score_{name}"]) for name in ("mean", "std")]
    ours = inception_score(inception_weights.features("logits"), inception_weights.IS_SPLITS)
    assert expected[1] > 0.01  # splits of unlike scores
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e3, 1e6])
def test_sure_of_every_class_alike(scale):
    # Logits this large overflow an exponential, and underflow to classes of no probability.
    mean, std = inception_score(np.tile(scale * np.eye(7), (10, 1)), 5)
    np.testing.assert_allclose([mean, std], [7, 0], atol=1e-12)


def test_a_class_that_no_image_has():
    mean, _ = inception_score(1e4 * np.eye(5)[[0, 1, 2, 0, 1, 2]], 1)
    np.testing.assert_allclose(mean, 3, rtol=1e-12)


def test_all_alike_score_one():
    mean, std = inception_score(np.tile(np.arange(6.0), (20, 1)), 4)
    np.testing.assert_allclose([mean, std], [1, 0], atol=1e-12)


def test_no_image_is_left_out_of_unequal_splits():
    logits = 50 * np.eye(4)[[0, 1, 0, 1, 2, 3, 3]]
    # Splits of 3 and 4 images.
    expected = [np.exp(-sum(p * np.log(p) for p in ps)) for ps in ((2 / 3, 1 / 3), (1 / 4, 1 / 4, 2 / 4))]
    np.testing.assert_allclose(inception_score(logits, 2), [np.mean(expected), np.std(expected)], rtol=1e-12)

"""Features of pictures as REPA prepares them, against transformers' network on what PyTorch prepared (fixture)."""

import numpy as np
import pytest
import tiny
from errors import assert_one_line
from recorded import recorded, write_dinov2

from speedit_jax.encoders.dinov2 import Dinov2Encoder

RECORDED = recorded("dinov2")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return write_dinov2(tmp_path_factory.mktemp("dino"))


def test_features_of_pictures(directory):
    encoder = Dinov2Encoder(str(directory), (2, 5), tiny.make_mesh(tiny.ONE), positions="transformers")
    found = encoder(2 * RECORDED["pictures"].astype(np.float32) - 1)
    assert encoder.shape == found.shape[1:] == (2, 5, 12) and found.dtype == np.float32
    np.testing.assert_allclose(found, RECORDED["features/mlp/other"], atol=1e-5)


def test_devices_and_channels(directory):
    """A picture without colours is grey, and devices divide the batch."""
    one, many = (Dinov2Encoder(str(directory), (2, 2), tiny.make_mesh(of)) for of in (tiny.ONE, (2, 1, 1)))
    assert one.identity == many.identity
    grey = np.random.default_rng(0).uniform(-1, 1, (2, 7, 9, 1)).astype(np.float32)
    np.testing.assert_allclose(many(grey), one(np.repeat(grey, 3, axis=3)), atol=1e-5)


def test_what_is_no_dino(tmp_path):
    assert_one_line(lambda: Dinov2Encoder(str(tmp_path), (2, 2), tiny.make_mesh(tiny.ONE)), str(tmp_path), "config.json")

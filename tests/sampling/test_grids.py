"""Samples as pictures."""

import numpy as np
import pytest
from PIL import Image

from speedit_jax.sampling.images import image_grid, magnification, to_uint8, write_png


def test_images_are_enlarged_in_the_png(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1)).astype(np.uint8)
    write_png(tmp_path / "samples" / "a.png", image_grid(images, columns=2), magnification(8))
    picture = np.asarray(Image.open(tmp_path / "samples" / "a.png"))
    assert picture.shape == (8 * 6, 17 * 6)
    np.testing.assert_array_equal(picture[::6, : 8 * 6 : 6], images[0, ..., 0])
    np.testing.assert_array_equal(picture[5::6, 9 * 6 + 5 :: 6], images[1, ..., 0])
    assert [p.name for p in (tmp_path / "samples").iterdir()] == ["a.png"]


def test_to_uint8_rounds():
    floats = np.array([-7, -1, -0.9999, 0.0, 1 / 255, 0.9999, 1, 7])
    assert to_uint8(floats).tolist() == [0, 0, 0, 128, 128, 255, 255, 255]
    every = np.arange(256)
    np.testing.assert_array_equal(to_uint8((every / 127.5 - 1).astype(np.float32)), every)
    assert to_uint8(floats).dtype == np.uint8


@pytest.mark.parametrize(
    ("count", "columns", "layout"),
    [(1, None, (1, 1)), (4, None, (2, 2)), (5, None, (2, 3)), (7, None, (3, 3)), (6, 2, (3, 2)), (5, 10, (1, 10))],
)
@pytest.mark.parametrize(("height", "width", "gap"), [(8, 6, 1), (32, 96, 3)])
def test_image_grid(count, columns, layout, height, width, gap):
    images = np.random.default_rng(0).integers(1, 127, (count, height, width, 3)).astype(np.uint8)
    picture = image_grid(images, columns)
    rows, columns = layout
    assert picture.shape == (rows * (height + gap) - gap, columns * (width + gap) - gap, 3)
    filled = np.zeros(picture.shape, bool)
    for i in range(count):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        cell = np.s_[top : top + height, left : left + width]
        np.testing.assert_array_equal(picture[cell], images[i])
        filled[cell] = True
    assert (picture[~filled] == 127).all()


@pytest.mark.parametrize(("channels", "mode", "shown"), [(1, "L", 1), (2, "L", 1), (3, "RGB", 3), (4, "RGB", 3)])
def test_write_png_of_any_channels(tmp_path, channels, mode, shown):
    picture = np.random.default_rng(0).integers(0, 256, (5, 7, channels)).astype(np.uint8)
    write_png(tmp_path / "new" / "a.png", picture)
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.mode == mode
        np.testing.assert_array_equal(np.asarray(image).reshape(5, 7, shown), picture[..., :shown])


def test_magnification():
    assert [magnification(h) for h in (8, 32, 48, 256)] == [6, 1, 1, 1]

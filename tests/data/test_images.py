"""From image files to arrays of one shape: the centre crop. What kinds of files are read, test_sources.py says."""

import numpy as np
import pytest
from PIL import Image

from speedit_jax.data.images import centre_crop


def ramp(width, height):
    """Red grows with the column, green with the row, as fractions of the image."""
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray(np.round(255 * np.stack([x, y, 0 * x], axis=-1)).astype(np.uint8))


@pytest.mark.parametrize("width, height", [(8, 8), (64, 64), (100, 40), (40, 100), (5, 9), (129, 33)])
@pytest.mark.parametrize("to_width, to_height", [(8, 8), (16, 8), (6, 18)])
def test_centre_crop_keeps_the_centre_and_the_aspect(width, height, to_width, to_height):
    image = centre_crop(ramp(width, height), to_height, to_width)
    assert image.size == (to_width, to_height)
    pixels = np.asarray(image, np.float64) / 255
    # The scale at which the image just covers the crop. Halving and the crop's offset round to whole pixels of the result,
    # or of the original where that is the coarser: twice that is the most by which the centre can move.
    scale = max(to_width / width, to_height / height)
    for axis, (full, size) in enumerate(((width, to_width), (height, to_height))):
        pixel = max(1 / (scale * full), 1 / full)
        values = pixels[..., axis].mean(axis=axis)
        np.testing.assert_allclose(values.mean(), 0.5, atol=2 * pixel)
        middle = values[size // 4 : size - size // 4]
        slope = (middle[-1] - middle[0]) / (len(middle) - 1)
        np.testing.assert_allclose(slope, 1 / (scale * full), rtol=0.2)


def test_centre_crop_of_the_right_size_is_the_image():
    image = ramp(12, 8)
    np.testing.assert_array_equal(np.asarray(centre_crop(image, 8, 12)), np.asarray(image))


def test_centre_crop_averages_when_it_halves():
    checks = np.indices((16, 16)).sum(axis=0) % 2 * 200
    pixels = np.asarray(centre_crop(Image.fromarray(checks.astype(np.uint8)), 8, 8))
    np.testing.assert_array_equal(pixels, 100)

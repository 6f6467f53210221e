"""From image files to arrays of one shape: the centre crop. What kinds of files are read, test_sources.py says."""

import subprocess
import sys

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


def enlarged_then_cropped(image, height, width):
    """ADM's rule in its own order, center_crop_arr of its image_datasets.py for two sides."""
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    image = image.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(image.crop((left, top, left + width, top + height)), int)


def noise(width, height, contrast=255):
    return Image.fromarray(
        np.random.default_rng(0).integers(0, contrast + 1, (height, width, 3), np.uint8) + (255 - contrast) // 2
    )


@pytest.mark.parametrize("height, width", [(32, 32), (24, 40)])
def test_ordinary_shapes_keep_their_bits(height, width):
    rng = np.random.default_rng(0)
    for _ in range(200):
        across = int(rng.integers(5, 200))
        image = noise(across, max(1, int(across * np.exp(rng.uniform(-0.8, 0.8)))))
        np.testing.assert_array_equal(np.asarray(centre_crop(image, height, width)), enlarged_then_cropped(image, height, width))


@pytest.mark.parametrize("height, width", [(32, 32), (24, 40), (64, 16)])
@pytest.mark.parametrize("short, long", [(1, 700), (2, 800), (3, 999), (7, 300), (20, 1501), (40, 3000), (70, 4001)])
def test_slivers_are_the_same_picture(height, width, short, long):
    # Pillow rounds and clips between its two passes, whose order it chooses by the sizes: so without overshoot.
    for image in (noise(short, long, 150), noise(long, short, 150)):
        ours = np.asarray(centre_crop(image, height, width), int)
        assert ours.shape == (height, width, 3)
        np.testing.assert_allclose(ours, enlarged_then_cropped(image, height, width), atol=2)


@pytest.mark.parametrize("size", [(2, 60_000), (60_000, 2), (1, 60_000), (300, 60_000), (60_000, 255)])
def test_slivers_take_the_memory_of_the_result(size):
    """Of a process that first crops a square of as many pixels; enlarging all of 2 x 60000 would be 6 GB."""
    code = """
import resource, sys
from PIL import Image
from speedit_jax.data.images import centre_crop
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
width, height = map(int, sys.argv[1:])
sliver = Image.new("RGB", (width, height), (1, 2, 3))
side = int((width * height) ** 0.5)
assert centre_crop(Image.new("RGB", (side, side)), 256, 256).size == (256, 256)
before = peak()
assert centre_crop(sliver, 256, 256).getcolors() == [(65536, (1, 2, 3))]
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code, *map(str, size)], capture_output=True, text=True, check=True)
    # MiB. Twice the result is 0.5, and the allocator takes what it takes.
    assert float(done.stdout) < 8

import numpy as np
import pytest
from folders import config, write
from PIL import Image

from speedit_jax.data.sources import open_source


def test_grey_and_colour(tmp_path):
    write(tmp_path / "a.png", colour=(255, 0, 51))
    Image.new("L", (8, 8), 51).save(tmp_path / "b.png")
    Image.new("RGBA", (8, 8), (51, 51, 51, 255)).save(tmp_path / "c.png")
    colour = open_source(config(f"folder:{tmp_path}"))
    np.testing.assert_allclose([colour[i]["image"][3, 3] for i in range(3)], [[1, -1, -0.6], [-0.6] * 3, [-0.6] * 3], atol=1e-6)
    grey = open_source(config(f"folder:{tmp_path}", channels=1))
    luma = 2 * (0.299 * 255 + 0.114 * 51) / 255 - 1
    assert grey[0]["image"].shape == (8, 8, 1)
    # Pillow rounds to a grey value.
    np.testing.assert_allclose([grey[i]["image"][3, 3, 0] for i in range(3)], [luma, -0.6, -0.6], atol=1 / 127.5)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    grey = np.linspace(0, 65535, 8).round().astype(np.uint16)
    Image.fromarray(np.tile(grey, (8, 1))).save(tmp_path / "a.png")
    for channels in (1, 3):
        image = open_source(config(f"folder:{tmp_path}", channels=channels))[0]["image"]
        np.testing.assert_allclose(image, np.tile(np.linspace(-1, 1, 8)[:, None], (8, 1, channels)), atol=1 / 127.5)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_photographs_stand_upright(tmp_path, suffix):
    """Cameras store the sensor's rows, and in EXIF tag 274 how the camera was held; 6 is a quarter turn clockwise."""
    stored = Image.fromarray(np.repeat(np.repeat(np.array([[0, 255]], np.uint8), 8, axis=0), 4, axis=1))
    exif = Image.Exif()
    exif[274] = 6
    stored.save(tmp_path / f"a.{suffix}", exif=exif)
    image = open_source(config(f"folder:{tmp_path}", channels=1))[0]["image"][..., 0]
    # JPEG rounds, though its blocks of 8 x 8 meet the edge halfway.
    np.testing.assert_allclose(image, np.repeat([[-1.0], [1.0]], 4, axis=0) * np.ones(8), atol=0.1 if suffix == "jpg" else 0)

"""Images for evaluation: all kinds give the same uint8 pixels, and each mistake one line."""

import numpy as np
import pytest
from errors import assert_one_line
from PIL import Image

from speedit_jax import object_store
from speedit_jax.data.image_sets import fingerprint, open_images, some
from speedit_jax.data.sources import load_digits

SHAPE = (6, 10, 3)
PIXELS = np.random.default_rng(0).integers(0, 256, (11, *SHAPE), np.uint8)


def together(images, size=4):
    parts = list(images.batches(size, 2))
    assert [len(part) for part in parts[:-1]] == [size] * (len(parts) - 1)
    return np.concatenate(parts)


def write_folder(root, pixels):
    for i, image in enumerate(pixels):
        path = root / ("cat", "dog")[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.squeeze()).save(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_streamed(tmp_path, save):
    path = tmp_path / "x.npz"
    save(path, PIXELS, np.arange(11))
    images = open_images(str(path))
    assert len(images) == 11 and images.shape == SHAPE
    for size in (4, 11, 64):
        np.testing.assert_array_equal(together(images, size), PIXELS)


def test_some(tmp_path):
    np.savez(tmp_path / "x.npz", PIXELS)
    write_folder(tmp_path / "x", PIXELS)
    whole = {where: open_images(str(where)) for where in (tmp_path / "x.npz", tmp_path / "x")}
    first, spread = (together(some(images, 5)) for images in whole.values())
    np.testing.assert_array_equal(first, PIXELS[:5])
    np.testing.assert_array_equal(spread, np.concatenate([PIXELS[::2], PIXELS[1::2]])[[0, 2, 4, 6, 8]])
    for images in whole.values():
        np.testing.assert_array_equal(together(some(images, 12)), together(images))
    assert len({fingerprint(images) for images in whole.values()}) == 2


def test_a_directory_as_it_is(tmp_path):
    write_folder(tmp_path, PIXELS)
    images = open_images(str(tmp_path))
    assert len(images) == 11 and images.shape == SHAPE
    np.testing.assert_array_equal(together(images), np.concatenate([PIXELS[::2], PIXELS[1::2]]))


def test_a_grey_directory(tmp_path):
    write_folder(tmp_path, PIXELS[..., :1])
    images = open_images(str(tmp_path))
    assert images.shape == (6, 10, 1)
    np.testing.assert_array_equal(together(images)[:6], PIXELS[::2, ..., :1])


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
def test_a_directory_of_photographs_stands_upright(tmp_path, suffix):
    """EXIF's 6 is a quarter turn clockwise; Pillow gives the size of a TIFF after it, and of others before."""
    stored, exif = Image.fromarray(np.rot90(PIXELS[0])), Image.Exif()
    exif[274] = 6
    stored.save(tmp_path / f"a.{suffix}", exif=exif, lossless=True)
    (image,) = together(open_images(str(tmp_path)))
    np.testing.assert_array_equal(image, PIXELS[0])


def test_sources(tmp_path):
    digits = open_images("digits")
    expected, _ = load_digits("train")
    # Seventeen levels of grey, 0 to 16.
    np.testing.assert_array_equal(together(digits, 500), np.round((expected + 1) * 127.5))
    assert open_images("synthetic", (4, 5, 3)).shape == (4, 5, 3)
    write_folder(tmp_path, PIXELS.repeat(2, 1).repeat(2, 2))
    np.testing.assert_array_equal(together(open_images(f"folder:{tmp_path}", SHAPE))[:6], PIXELS[::2])
    assert_one_line(lambda: open_images(f"folder:{tmp_path}"), "--size")


def test_a_folder_in_an_object_store(tmp_path, monkeypatch):
    write_folder(tmp_path, PIXELS)
    monkeypatch.setattr(object_store, "open_path", {"gs://bucket/images": tmp_path}.__getitem__)
    assert len(open_images("folder:gs://bucket/images", SHAPE)) == 11


def test_an_npz_without_images(tmp_path):
    np.savez(tmp_path / "x.npz", mu=np.zeros(3))
    assert open_images(str(tmp_path / "x.npz")) is None


@pytest.mark.parametrize(
    "array", [PIXELS / 255, PIXELS[0], PIXELS[..., :2], PIXELS[:0], np.asfortranarray(PIXELS), np.array([{}])]
)
def test_arrays_that_are_no_images(tmp_path, array):
    np.savez(tmp_path / "x.npz", array)
    assert_one_line(lambda: open_images(str(tmp_path / "x.npz")), str(tmp_path / "x.npz"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_npz(tmp_path, save):
    path = tmp_path / "x.npz"
    save(path, PIXELS)
    whole = path.read_bytes()
    # Cut short, no zip at all, and a few bytes among the pixels turned over.
    middle = len(whole) // 2
    for content in (
        whole[:middle],
        b"hello",
        whole[:middle] + bytes(255 - b for b in whole[middle : middle + 9]) + whole[middle + 9 :],
    ):
        path.write_bytes(content)
        assert_one_line(lambda: together(open_images(str(path))), str(path), "cannot be read")


def test_mistakes(tmp_path):
    assert_one_line(lambda: open_images("nowhere"), "nowhere", "FILE.npz", "folder:PATH")
    assert_one_line(lambda: open_images(str(tmp_path / "x.npz")), "no file", "x.npz")
    assert_one_line(lambda: open_images(str(tmp_path)), "no images", str(tmp_path))
    write_folder(tmp_path, PIXELS)
    Image.fromarray(PIXELS[0, :5]).save(tmp_path / "dog" / "zz.png")
    assert_one_line(lambda: open_images(str(tmp_path)), "00.png", "6x10x3", "zz.png", "5x10x3", "folder:")
    (tmp_path / "dog" / "zz.png").write_bytes(b"none")
    assert_one_line(lambda: open_images(str(tmp_path)), "cannot read the image", "zz.png")


def test_splits():
    assert [len(open_images("digits", split=split)) for split in ("train", "held_out")] == [1442, 355]


@pytest.mark.parametrize("kind", ["", "folder:"])
def test_what_is_transparent_shows_the_background(tmp_path, kind):
    alpha = np.zeros((*SHAPE[:2], 1), np.uint8)
    alpha[:, 5:] = 255
    Image.fromarray(np.concatenate([PIXELS[0], alpha], axis=2)).save(tmp_path / "a.png")
    for background, level in (({}, 255), ({"background": "black"}, 0)):
        (image,) = together(open_images(f"{kind}{tmp_path}", SHAPE, **background))
        np.testing.assert_array_equal(image, np.where(alpha, PIXELS[0], level))

"""The fingerprint of a folder: it sees edits, and not where the folder lies or when it was copied."""

import hashlib
import os
import shutil

import numpy as np
import pytest
from folders import config, write
from PIL import Image

from speedit_jax.data.identity import fingerprints
from speedit_jax.data.sources import open_source
from speedit_jax.errors import UserError


def fingerprint(root):
    return open_source(config(f"folder:{root}")).fingerprint


def photograph(seed=0, size=200):
    """Smooth with noise, as a photograph; tens of kilobytes as PNG or JPEG."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (9, 9, 3), np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(small, int) + rng.integers(-9, 10, (size, size, 3)), 0, 255).astype(np.uint8)


def test_a_copy_is_the_same_data(tmp_path):
    for name in ("cat/a.png", "dog/b.jpg"):
        (tmp_path / "set" / name).parent.mkdir(parents=True)
        Image.fromarray(photograph()).save(tmp_path / "set" / name)
    first = fingerprint(tmp_path / "set")
    shutil.copytree(tmp_path / "set", tmp_path / "copy", copy_function=shutil.copyfile)
    for path in (tmp_path / "copy").rglob("*"):
        os.utime(path, (1, 1))
    assert fingerprint(tmp_path / "copy") == fingerprint(f"{tmp_path}/copy/") == first


@pytest.mark.parametrize(
    "suffix, options", [("bmp", {}), ("tif", {}), ("ppm", {}), ("tga", {}), ("png", {"compress_level": 0}), ("tiff", {})]
)
@pytest.mark.parametrize("place", [(0, 0), (99, 120), (130, 40), (199, 199)])
def test_an_edit_of_one_pixel_is_seen_though_the_size_stays(tmp_path, suffix, options, place):
    pixels = photograph()
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(path, **options)
    first, size = fingerprint(tmp_path), path.stat().st_size
    pixels[place] ^= 1
    Image.fromarray(pixels).save(path, **options)
    assert path.stat().st_size == size
    assert fingerprint(tmp_path) != first


@pytest.mark.parametrize("suffix, options", [("jpg", {"quality": 90}), ("png", {}), ("webp", {"quality": 80})])
def test_edits_of_compressed_images_of_the_same_size_are_seen(tmp_path, suffix, options):
    """Small edits of photographs, of which the few are looked at that keep the file's size."""
    pixels, path, seen = photograph(), tmp_path / f"a.{suffix}", {}
    rng = np.random.default_rng(1)
    for _ in range(150):
        edited = pixels.copy()
        y, x = rng.integers(0, 192, 2)
        edited[y : y + 4, x : x + 4, rng.integers(3)] ^= np.uint8(rng.integers(1, 16))
        Image.fromarray(edited).save(path, **options)
        seen.setdefault(path.stat().st_size, {}).setdefault(path.read_bytes(), fingerprint(tmp_path))
    pairs = [list(same.values()) for same in seen.values() if len(same) > 1]
    assert len(pairs) > 5
    for same in pairs:
        assert len(set(same)) == len(same)


def test_labels_belong_to_the_data(tmp_path):
    write(tmp_path / "a.png")
    assert fingerprints(tmp_path, ("a.png",), (0,))[0] != fingerprints(tmp_path, ("a.png",), (1,))[0]


def test_what_earlier_versions_called_the_same_data(tmp_path):
    """Names and sizes, in 16 digits of a SHA-256."""
    write(tmp_path / "cat" / "a.png")
    write(tmp_path / "dog" / "b.png", size=(9, 9))
    sizes = [str((tmp_path / name).stat().st_size) for name in ("cat/a.png", "dog/b.png")]
    text = "cat/a.png\ndog/b.png\0" + "\n".join(sizes)
    source = open_source(config(f"folder:{tmp_path}"))
    assert source.older_fingerprints == (hashlib.sha256(text.encode()).hexdigest()[:16],)
    assert source.fingerprint not in source.older_fingerprints
    for other in ("digits", "synthetic"):
        assert open_source(config(other, channels=1)).older_fingerprints == ()


def test_a_file_that_went_away(tmp_path):
    write(tmp_path / "a.png")
    source = open_source(config(f"folder:{tmp_path}"))
    (tmp_path / "a.png").unlink()
    with pytest.raises(UserError, match=r"a\.png is gone since the folder was listed"):
        _ = source.fingerprint

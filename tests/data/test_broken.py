"""Folders that hold damaged files: named, passed over up to a limit, and otherwise an error."""

import numpy as np
import pytest
from folders import config, write_png
from PIL import Image

from speedit_jax.data.sources import open_source
from speedit_jax.errors import UserError


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"text", lambda data: data[: len(data) // 2]])
def test_a_damaged_image_is_named(tmp_path, damage):
    path = tmp_path / "bad.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(path)
    path.write_bytes(damage(path.read_bytes()))
    source = open_source(config(f"folder:{tmp_path}"))
    with pytest.raises(UserError, match="cannot read the image") as error:
        source[0]
    assert str(path) in str(error.value)


def write_bomb(path, side=20_000):
    """A valid PNG of 50 kB that is 400 million pixels, one bit each."""
    row = bytes(1 + (side + 7) // 8)
    write_png(path, (row * 1000 for _ in range(side // 1000)), side, side, bits=1, kind=0)


def hostile_folder(root):
    """What people's folders hold besides good images: {file name: its colour where it can be read}."""
    root.mkdir()
    colours = {}

    def add(name, colour, **options):
        Image.new("RGB", (12, 8), colour).convert(options.pop("mode", "RGB")).save(root / name, **options)
        colours[name] = colour

    add("00_good.png", (255, 0, 0))
    add("02_cmyk.jpg", (0, 255, 0), mode="CMYK", quality=95)
    add("03_palette.png", (0, 0, 255), mode="P")
    Image.fromarray(np.full((8, 12), 65535, np.uint16)).save(root / "05_sixteen_bits.png")
    colours["05_sixteen_bits.png"] = (255, 255, 255)
    frames = [Image.new("RGB", (12, 8), c) for c in ((255, 255, 0), (0, 0, 0))]
    frames[0].save(root / "06_animated.gif", save_all=True, append_images=frames[1:])
    colours["06_animated.gif"] = (255, 255, 0)
    Image.new("RGBA", (12, 8), (0, 255, 255, 255)).save(root / "07_alpha.png")
    colours["07_alpha.png"] = (0, 255, 255)
    whole = (root / "02_cmyk.jpg").read_bytes()
    (root / "01_text.png").write_text("not an image")
    (root / "04_truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "08_empty.png").write_bytes(b"")
    write_bomb(root / "09_bomb.png")
    Image.new("RGB", (20_000, 8), (255, 0, 255)).save(root / "10_wide.png")
    colours["10_wide.png"] = (255, 0, 255)
    return colours


def test_a_hostile_folder(tmp_path, capsys):
    colours = hostile_folder(tmp_path / "images")
    source = open_source(config(f"folder:{tmp_path / 'images'}", max_broken=4))
    assert len(source) == 11
    means = [np.round((source[i]["image"].mean(axis=(0, 1)) + 1) * 127.5) for i in range(11)]
    readable = [i for i in range(11) if source.files[i] in colours]
    assert readable == [0, 2, 3, 5, 6, 7, 10]
    for i in readable:
        # JPEG's colours are a little off.
        np.testing.assert_allclose(means[i], colours[source.files[i]], atol=6)
    for broken, successor in ((1, 2), (4, 5), (8, 10), (9, 10)):
        np.testing.assert_array_equal(means[broken], means[successor])
    lines = capsys.readouterr().err.splitlines()
    for line, name in zip(lines, ("01_text.png", "04_truncated.jpg", "08_empty.png", "09_bomb.png"), strict=True):
        assert name in line
    assert "400000000 pixels" in lines[-1]
    source[1]
    assert capsys.readouterr().err == ""  # named once


def test_too_many_broken_files(tmp_path):
    hostile_folder(tmp_path / "images")
    source = open_source(config(f"folder:{tmp_path / 'images'}", max_broken=2))
    source[1], source[4]
    for _ in range(2):
        with pytest.raises(UserError, match=r"08_empty.png.*3 broken files, data.max_broken=2"):
            source[8]


def test_nothing_but_broken_files(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"no image in .* can be read"):
        open_source(config(f"folder:{tmp_path}", max_broken=3))[0]

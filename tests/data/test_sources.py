"""Data sources: splits, folders as users have them, classes, and errors that name the path."""

import re
import struct
import zlib

import ml_collections
import numpy as np
import pytest
from PIL import Image

from speedit_jax.config import get_config
from speedit_jax.data.sources import load_digits, open_source
from speedit_jax.errors import UserError


def config(source, height=8, width=8, channels=3, **keys) -> ml_collections.ConfigDict:
    data = get_config().data
    data.update(source=source, height=height, width=width, channels=channels, **keys)
    return data


def write(path, size=(8, 8), colour=(255, 0, 51)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_digits_split_is_stratified_disjoint_and_complete():
    (train, train_labels), (held_out, held_out_labels) = load_digits("train"), load_digits("held_out")
    assert train.shape[1:] == held_out.shape[1:] == (8, 8, 1)
    assert len(train) + len(held_out) == 1797
    counts, kept = np.bincount(train_labels) + np.bincount(held_out_labels), np.bincount(held_out_labels)
    np.testing.assert_array_equal(kept, counts // 5)
    # Together they are the data set, which has no image twice.
    assert len({image.tobytes() for image in [*train, *held_out]}) == 1797
    for images in (train, held_out):
        assert images.dtype == np.float32
        assert (images.min(), images.max()) == (-1, 1)
        # Sixteenths of the range: nothing was resampled.
        np.testing.assert_array_equal(images * 8, np.round(images * 8))


def test_digits_source_is_the_train_split():
    source = open_source(config("digits", channels=1))
    images, labels = load_digits("train")
    assert len(source) == len(images) == 1442
    assert source.class_names == tuple("0123456789")
    assert source.image_shape == (8, 8, 1)
    for i in (0, 700, 1441):
        np.testing.assert_array_equal(source[i]["image"], images[i])
        assert source[i]["label"] == labels[i]
    assert source.fingerprint == open_source(config("digits", channels=1)).fingerprint


def test_sub_directories_are_classes(tmp_path):
    write(tmp_path / "dog" / "a.png", colour=(0, 0, 0))
    write(tmp_path / "cat" / "b.png", colour=(255, 255, 255))
    write(tmp_path / "cat" / "deeper" / "c.PNG")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    source = open_source(config(f"folder:{tmp_path}"))
    assert source.class_names == ("cat", "dog")
    assert source.files == ("cat/b.png", "cat/deeper/c.PNG", "dog/a.png")
    records = [source[i] for i in range(len(source))]
    assert [int(r["label"]) for r in records] == [0, 0, 1]
    for record, pixel in zip(records, ([1, 1, 1], [1, -1, -0.6], [-1, -1, -1]), strict=True):
        assert record["image"].dtype == np.float32
        np.testing.assert_allclose(record["image"], np.broadcast_to(pixel, (8, 8, 3)), atol=1e-6)


def test_a_flat_folder_is_unconditional(tmp_path):
    write(tmp_path / "b.png")
    write(tmp_path / "a.jpg")
    source = open_source(config(f"folder:{tmp_path}"))
    assert source.class_names == ()
    assert source.files == ("a.jpg", "b.png")
    assert source[0]["label"] == 0


def test_hidden_directories_are_not_classes(tmp_path):
    write(tmp_path / "cat" / "a.png")
    write(tmp_path / ".thumbnails" / "a.png")
    assert open_source(config(f"folder:{tmp_path}")).class_names == ("cat",)


@pytest.mark.parametrize(
    "visible, hidden",
    [("a.png", ".thumbnails/a.png"), ("a.png", "._a.png"), ("cat/a.png", "cat/.thumbnails/a.png"), ("cat/a.png", "cat/._a.png")],
)
def test_hidden_files_are_not_images(tmp_path, visible, hidden):
    """Thumbnails of file managers, and the AppleDouble files that macOS leaves beside each image."""
    write(tmp_path / visible)
    write(tmp_path / hidden)
    assert open_source(config(f"folder:{tmp_path}")).files == (visible,)


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


def test_tilde_is_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "pictures" / "a.png")
    assert len(open_source(config("folder:~/pictures"))) == 1


def test_a_folder_gives_rectangular_images(tmp_path):
    write(tmp_path / "a.png", size=(50, 20))
    source = open_source(config(f"folder:{tmp_path}", height=8, width=12))
    assert source[0]["image"].shape == source.image_shape == (8, 12, 3)


def test_some_classes_of_a_folder(tmp_path):
    for name, colour in (("ant", 0), ("bee", 51), ("cow", 102), ("2", 153)):
        for i in range(2):
            write(tmp_path / name / f"{i}.png", colour=(colour,) * 3)
    everything = open_source(config(f"folder:{tmp_path}"))
    assert everything.class_names == ("2", "ant", "bee", "cow")
    for wanted, names, colours in (
        ("cow,ant", ("cow", "ant"), (102, 0)),
        ("ant, cow", ("ant", "cow"), (0, 102)),
        ("2,1", ("2", "ant"), (153, 0)),  # the class "2" is called by its name, number 1 by its number
        ("bee", ("bee",), (51,)),
    ):
        source = open_source(config(f"folder:{tmp_path}", classes=wanted))
        assert source.class_names == names
        records = [source[i] for i in range(len(source))]
        assert [int(r["label"]) for r in records] == [label for label in range(len(names)) for _ in range(2)]
        for record in records:
            np.testing.assert_allclose(record["image"], colours[record["label"]] / 127.5 - 1, atol=1e-6)
    fingerprints = {open_source(config(f"folder:{tmp_path}", classes=c)).fingerprint for c in ("", "ant,bee", "bee,ant")}
    assert len(fingerprints) == 3


def test_some_of_the_digits():
    source = open_source(config("digits", channels=1, classes="7,1"))
    images, labels = load_digits("train")
    chosen = np.isin(labels, (7, 1))
    assert source.class_names == ("7", "1")
    np.testing.assert_array_equal(source.images, images[chosen])
    np.testing.assert_array_equal(source.labels, np.where(labels[chosen] == 7, 0, 1))
    assert source.fingerprint != open_source(config("digits", channels=1)).fingerprint


def test_the_held_out_digits():
    source = open_source(config("digits", channels=1, split="held_out"))
    np.testing.assert_array_equal(source.images, load_digits("held_out")[0])


@pytest.mark.parametrize(
    "source, keys, message",
    [
        ("digits", {"classes": "1,ten"}, "no class 'ten'; there are 0..9: 0, 1, 2, 3, 4, ..."),
        ("digits", {"classes": "1,10"}, "no class '10'"),
        ("digits", {"classes": "1,"}, "no class ''"),
        ("digits", {"classes": "1,2,1"}, "'1' is there twice"),
        ("digits", {"split": "test"}, "data.split=test: the digits have train and held_out"),
        ("synthetic", {"split": "test"}, "data.split=test: only tfds:NAME and the digits"),
        ("synthetic", {"classes": "1"}, "data.classes=1: not of synthetic"),
        ("latents:x", {"classes": "1"}, "speedit_jax.encode --classes"),
    ],
)
def test_classes_and_splits_that_are_not_there(source, keys, message):
    with pytest.raises(UserError, match=re.escape(message)):
        open_source(config(source, channels=1, **keys))


def test_classes_of_a_flat_folder(tmp_path):
    write(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"data\.classes=a: these data have no classes"):
        open_source(config(f"folder:{tmp_path}", classes="a"))


def test_the_fingerprint_follows_the_files_and_not_the_directory(tmp_path):
    def fingerprint(*images):
        root = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, size in images:
            write(root / name, size)
        return open_source(config(f"folder:{root}")).fingerprint

    first = fingerprint(("a.bmp", (8, 8)), ("b.bmp", (8, 8)))
    assert first == fingerprint(("b.bmp", (8, 8)), ("a.bmp", (8, 8)))
    others = [
        fingerprint(("a.bmp", (8, 8)), ("b.bmp", (8, 9))),
        fingerprint(("a.bmp", (8, 8)), ("c.bmp", (8, 8))),
        fingerprint(("a.bmp", (8, 8))),
        fingerprint(("x/a.bmp", (8, 8)), ("x/b.bmp", (8, 8))),
        fingerprint(("x/a.bmp", (8, 8)), ("y/b.bmp", (8, 8))),
    ]
    assert len({first, *others}) == 6


@pytest.mark.parametrize(
    "files, place, message",
    [
        ([], "nowhere", "nowhere: no such directory"),
        (["a.png"], "a.png", "a.png: no such directory"),
        (["readme.txt"], "", "no images in "),
        (["cat/a.png", "dog/readme.txt"], "", "no images in .*dog"),
        (["cat/a.png", "stray.png"], "", "stray.png and 0 more images lie beside the class directories"),
    ],
)
def test_errors_of_folders_name_the_path(tmp_path, files, place, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=message) as error:
        open_source(config(f"folder:{tmp_path / place}"))
    assert f"data.source=folder:{tmp_path / place}" in str(error.value)


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
    deflate = zlib.compressobj(1)
    rows = b"".join(deflate.compress(row * 1000) for _ in range(side // 1000)) + deflate.flush()

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


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
        with pytest.raises(UserError, match=r"08_empty.png.*3 such files, data.max_broken=2"):
            source[8]


def test_nothing_but_broken_files(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"no image in .* can be read"):
        open_source(config(f"folder:{tmp_path}", max_broken=3))[0]


def test_channels_that_folders_do_not_have(tmp_path):
    write(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"data\.channels=4"):
        open_source(config(f"folder:{tmp_path}", channels=4))


@pytest.mark.parametrize("height, width, channels, classes", [(8, 8, 3, 10), (5, 9, 1, 2), (4, 4, 4, 0)])
def test_synthetic_images(height, width, channels, classes):
    keys = {"synthetic_size": 300, "synthetic_classes": classes}
    source = open_source(config("synthetic", height, width, channels, **keys))
    again = open_source(config("synthetic", height, width, channels, **keys))
    assert len(source) == 300
    assert len(source.class_names) == classes
    records = [source[i] for i in range(300)]
    for i in (0, 17, 299):
        np.testing.assert_array_equal(again[i]["image"], records[i]["image"])
        assert again[i]["label"] == records[i]["label"]
    images = np.stack([r["image"] for r in records])
    assert images.dtype == np.float32
    assert images.shape == (300, height, width, channels)
    assert np.abs(images).max() <= 1
    assert len(np.unique(images, axis=0)) == 300
    assert {int(r["label"]) for r in records} == set(range(max(1, classes)))
    assert source.fingerprint == again.fingerprint


def test_the_class_of_a_synthetic_image_is_its_place():
    source = open_source(config("synthetic", 16, 16, 3, synthetic_classes=4))
    y, x = np.mgrid[:16, :16] - 7.5
    for i in range(50):
        weight = source[i]["image"].sum(axis=-1) + 3
        angle = np.arctan2((weight * y).sum(), (weight * x).sum())
        assert round(angle / (np.pi / 2)) % 4 == source[i]["label"]


def test_synthetic_fingerprints_differ():
    keys = [{"synthetic_size": 10}, {"synthetic_size": 11}, {"synthetic_classes": 3}, {"height": 9}]
    assert len({open_source(config("synthetic", **k)).fingerprint for k in keys}) == 4


@pytest.mark.parametrize("key, shape", [("height", (16, 8, 1)), ("width", (8, 16, 1)), ("channels", (8, 8, 3))])
def test_digits_of_another_shape(key, shape):
    with pytest.raises(UserError, match=rf"data\.source=digits.*\(8, 8, 1\).*data\.{key}.*") as error:
        open_source(config("digits", *shape))
    assert str(shape) in str(error.value)


@pytest.mark.parametrize("source", ["imagenet", "", "tfds:"])
def test_unknown_source(source):
    with pytest.raises(UserError, match=f"data.source '{source}'.*digits, folder:PATH, tfds:NAME, latents:PATH or synthetic"):
        open_source(config(source))


@pytest.mark.parametrize("source", ["digits:held_out", "synthetic:10"])
def test_an_argument_that_would_be_ignored(source):
    with pytest.raises(UserError, match=source):
        open_source(config(source, channels=1))


def test_a_folder_without_a_path(tmp_path, monkeypatch):
    write(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="folder:"):
        open_source(config("folder:"))

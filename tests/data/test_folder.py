"""Folders as users have them: classes, kinds of files, names, and errors that name the path."""

import json
import os

import numpy as np
import pytest
from folders import config, open_folder, write
from PIL import Image

from speedit_jax.data.images import suffixes
from speedit_jax.data.sources import open_source
from speedit_jax.errors import UserError


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


def test_classes_of_a_flat_folder(tmp_path):
    write(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"data\.classes=a: this data set has no classes"):
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
        (["a.png"], "a.png", "a.png: a file; give the directory that holds the images"),
        (["readme.txt"], "", "no images in "),
        (["cat/a.png", "dog/readme.txt"], "", "no images in .*dog"),
        (["cat/a.png", "stray.png"], "", "stray.png and 0 more images lie next to the class folders"),
    ],
)
def test_errors_of_folders_name_the_path(tmp_path, files, place, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=message) as error:
        open_source(config(f"folder:{tmp_path / place}"))
    assert f"data.source=folder:{tmp_path / place}" in str(error.value)


def test_channels_that_folders_do_not_have(tmp_path):
    write(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"data\.channels=4"):
        open_source(config(f"folder:{tmp_path}", channels=4))


def test_whatever_the_installed_pillow_reads_is_taken(tmp_path):
    """Every suffix of every format that it can also write."""
    kinds = suffixes()
    written = {}
    for suffix, kind in kinds.items():
        if kind in Image.SAVE:
            path = tmp_path / f"{len(written):02d}{suffix.upper() if len(written) % 2 else suffix}"
            for mode in ("RGB", "L", "1"):
                try:
                    Image.new("RGB", (32, 32), (255, 255, 255)).convert(mode).save(path, format=kind)
                    written[path.name] = kind
                    break
                except (OSError, ValueError, KeyError):
                    path.unlink(missing_ok=True)
    assert {"JPEG", "PNG", "WEBP", "TIFF", "TGA", "GIF", "BMP", "PPM", "MPO"} <= set(written.values())
    source = open_folder(tmp_path)
    assert source.files == tuple(sorted(written)) and not source.left_out
    for i, name in enumerate(source.files):
        # Of JPEG and its like white is a little off.
        np.testing.assert_allclose(source[i]["image"], 1, atol=3 / 127.5, err_msg=name)


def test_what_is_no_picture_is_not_a_suffix():
    assert not {".eps", ".ps", ".pdf", ".mpg", ".h5", ".hdf", ".fits", ".grib", ".wmf", ".txt", ".json", ""} & suffixes().keys()


def test_the_content_says_what_a_file_is(tmp_path):
    """Also where the suffix does not: and an EPS, which would run Ghostscript, is none of the formats."""
    Image.new("RGB", (8, 8), (255, 0, 51)).save(tmp_path / "a.jpg", format="PNG")
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png", format="EPS")
    source = open_folder(tmp_path, max_broken=1)
    np.testing.assert_allclose(source[0]["image"][0, 0], [1, -1, -0.6], atol=1e-6)
    with pytest.raises(UserError, match=r"b\.png: it is not an image"):
        open_folder(tmp_path)[1]


def test_what_is_left_out_is_counted_in_one_line(tmp_path, capsys):
    write(tmp_path / "cat" / "a.png")
    for name in ("a.heic", "b.HEIC", "c.svg", "cat/notes.txt", "cat/without_suffix", "cat/d.heic"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "cat" / "itself.png").symlink_to(tmp_path / "cat" / "itself.png")
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "cat/._a.png", "cat/ehthumbs.db", "cat/Icon\r"):
        (tmp_path / name).write_bytes(b"")
    source = open_folder(tmp_path)
    assert source.files == ("cat/a.png",)
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path) in line
    assert "left out 3 .heic, 2 broken links, 1 .svg, 1 .txt, 1 without a suffix" in line


def test_nothing_is_said_of_system_files(tmp_path, capsys):
    write(tmp_path / "a.png")
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store", "._a.png"):
        (tmp_path / name).write_bytes(b"")
    open_folder(tmp_path)
    assert capsys.readouterr().err == ""


def test_names_of_any_bytes(tmp_path):
    root, names = os.fsencode(tmp_path), (b"caf\xe9", b"line\nbreak", "größe".encode(), b"two  words")
    for name in names:
        os.makedirs(root + b"/" + name)
        with open(root + b"/" + name + b"/\xff.png", "wb") as file:
            Image.new("RGB", (8, 8), (255, 0, 51)).save(file, format="PNG")
    source = open_folder(tmp_path)
    assert source.class_names == ("caf\\xe9", "größe", "line\\nbreak", "two  words")
    assert json.loads(json.dumps(source.class_names, ensure_ascii=False).encode()) == list(source.class_names)
    for i in range(4):
        np.testing.assert_allclose(source[i]["image"][0, 0], [1, -1, -0.6], atol=1e-6)
    assert len(source.fingerprint) == 16
    assert open_folder(tmp_path, classes="caf\\xe9").files == (os.fsdecode(b"caf\xe9/\xff.png"),)
    with open(root + b"/caf\xe9/\xff.png", "wb"):
        pass
    with pytest.raises(UserError) as error:
        open_folder(tmp_path)[0]
    assert "caf\\xe9/\\xff.png" in str(error.value).encode().decode()


def test_a_directory_that_cannot_be_listed(tmp_path):
    write(tmp_path / "cat" / "a.png")
    (tmp_path / "cat" / "closed").mkdir()
    (tmp_path / "cat" / "closed").chmod(0)
    if os.access(tmp_path / "cat" / "closed", os.R_OK):
        pytest.skip("root lists everything")
    with pytest.raises(UserError, match=r"cannot list the directory .*closed: Permission denied"):
        open_folder(tmp_path)

"""Directories that are no classes, labels that are no directories, links, and what is said of the classes."""

import json
import shutil

import numpy as np
import pytest
from errors import assert_one_line
from folders import config, open_folder, write

from speedit_jax.data.classes import describe
from speedit_jax.data.folder import check_apart
from speedit_jax.data.sources import open_source
from speedit_jax.errors import UserError


@pytest.mark.parametrize(
    "name", ["@eaDir", "__MACOSX", ".git", "lost+found", "$RECYCLE.BIN", ".ipynb_checkpoints", "System Volume Information"]
)
def test_system_directories_are_no_classes_and_hold_no_images(tmp_path, name):
    write(tmp_path / "cat" / "a.png")
    write(tmp_path / name / "b.png")
    write(tmp_path / "cat" / name / "a.png" / "thumb.jpg")
    source = open_folder(tmp_path)
    assert source.class_names == ("cat",) and source.files == ("cat/a.png",)


@pytest.mark.parametrize("images", [("a.png", "b.png"), ("cat/a.png", "dog/b.png")])
def test_what_is_written_into_a_folder_is_to_leave_it_as_it_was(tmp_path, images):
    """Places are allowed exactly where the folder, with a file there, opens as the same data."""
    root = tmp_path / "images"
    for name in images:
        write(root / name)
    source = open_folder(root)
    for place in ("new", "new/deep", "cat", "cat/new", ".hidden/new", ".", "../elsewhere", "../images of others"):
        made = tmp_path / "copy" / place.replace("/", "_") / "images"
        shutil.copytree(root, made)
        (made / place).mkdir(parents=True, exist_ok=True)
        (made / place / "0.array_record").touch()
        try:
            same = open_folder(made).fingerprint == source.fingerprint
        except UserError:
            same = False
        if same:
            check_apart(source, root / place, "out")
        else:
            assert_one_line(lambda: check_apart(source, root / place, "out"), f"--out={root / place} is in {root}", "elsewhere")  # noqa: B023


@pytest.mark.parametrize(
    "parts",
    [
        ("train", "val"),
        ("train", "validation", "labels"),
        ("train",),
        ("train2017", "val2017"),
        ("Test", "other", "Train_set"),
        ("trainA", "trainB"),
        ("images_test", "images_train"),
    ],
)
def test_parts_of_a_set_are_a_question(tmp_path, parts):
    for name in parts:
        write(tmp_path / name / "cat" / "a.png")
    with pytest.raises(UserError, match=r"are .* parts of a data set") as error:
        open_folder(tmp_path)
    named = next((name for name in sorted(parts) if "rain" in name), None)
    assert f"give folder:{tmp_path / named};" in str(error.value) and "data.classes=" in str(error.value)
    # Both ways out.
    assert open_folder(tmp_path / parts[0]).class_names == ("cat",)
    assert open_folder(tmp_path, classes=",".join(parts)).class_names == parts


@pytest.mark.parametrize("classes", [("bus", "car", "train"), ("testers", "trainers"), ("validator", "value"), ("test", "zebra")])
def test_classes_that_are_only_called_like_parts(tmp_path, classes):
    for name in classes:
        write(tmp_path / name / "a.png")
    assert open_folder(tmp_path).class_names == classes


def edm(root, labels):
    for i in range(6):
        write(root / f"{i // 3:05d}" / f"img{i:08d}.png", colour=(40 * i,) * 3)
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))


def test_dataset_json_holds_the_labels(tmp_path, capsys):
    numbers = [2, 0, 2, 0, 0, 2]
    edm(tmp_path, [[f"{i // 3:05d}/img{i:08d}.png", label] for i, label in enumerate(numbers)])
    source = open_folder(tmp_path)
    assert source.class_names == ("0", "1", "2")
    records = [source[i] for i in range(6)]
    assert [int(record["label"]) for record in records] == numbers
    np.testing.assert_allclose([record["image"][0, 0, 0] for record in records], 40 * np.arange(6) / 127.5 - 1, atol=1e-6)
    assert describe(source) == ["3 classes: 0 3, 1 0, 2 3", "labels are those of dataset.json"]
    assert capsys.readouterr().err == ""
    assert source.older_fingerprints == ()  # earlier versions took the directories
    some = open_folder(tmp_path, classes="2")
    assert some.class_names == ("2",) and some.labels == (0, 0, 0)
    np.testing.assert_allclose([some[i]["image"][0, 0, 0] for i in range(3)], np.array([0, 80, 200]) / 127.5 - 1, atol=1e-6)
    edm(tmp_path, [[f"{i // 3:05d}/img{i:08d}.png", 0] for i in range(6)])
    assert open_folder(tmp_path).fingerprint != source.fingerprint


@pytest.mark.parametrize("labels", [None, [], {}])
def test_dataset_json_without_labels_is_unconditional(tmp_path, labels):
    edm(tmp_path, labels)
    source = open_folder(tmp_path)
    assert source.class_names == () and len(source) == 6


def test_another_dataset_json_is_left_out(tmp_path):
    edm(tmp_path, [])
    (tmp_path / "dataset.json").write_text('{"name": "mine"}')
    source = open_folder(tmp_path)
    assert source.class_names == ("00000", "00001") and source.left_out == {".json": 1}


@pytest.mark.parametrize(
    "content, message",
    [
        ("{", "dataset.json cannot be read as JSON"),
        ("[]", None),
        ('{"labels": 3}', r"dataset.json: 3 is not \[FILE, NUMBER OF ITS CLASS\]"),
        ('{"labels": [["00000/img00000000.png", [0, 1]]]}', r"\[0, 1\]\] is not"),
        ('{"labels": [["00000/img00000000.png", -1]]}', "is not"),
        ('{"labels": [["00000/a.png", 0], ["00000/a.png", 0], ["00000\\\\a.png", 1]]}', r"00000\\a.png is in two classes"),
        ('{"labels": [["00000/img00000000.png", 0]]}', "no label for 00000/img00000001.png and 4 more"),
    ],
)
def test_a_dataset_json_that_does_not_fit(tmp_path, content, message):
    edm(tmp_path, [])
    (tmp_path / "dataset.json").write_text(content)
    if message is None:
        assert open_folder(tmp_path).class_names == ("00000", "00001")
        return
    with pytest.raises(UserError, match=message) as error:
        open_folder(tmp_path)
    assert "\n" not in str(error.value)


def test_linked_directories_are_followed(tmp_path):
    write(tmp_path / "elsewhere" / "deeper" / "1.png")
    write(tmp_path / "set" / "cat" / "0.png")
    write(tmp_path / "set" / "cat" / "own" / "2.png")
    (tmp_path / "set" / "cat" / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    source = open_folder(tmp_path / "set")
    assert source.files == ("cat/0.png", "cat/more/deeper/1.png", "cat/own/2.png", "dog/deeper/1.png")
    assert source.class_names == ("cat", "dog")


@pytest.mark.parametrize("target", [".", "..", "../..", "own", "../dog"])
def test_links_in_circles_end(tmp_path, target):
    write(tmp_path / "set" / "cat" / "own" / "0.png")
    write(tmp_path / "set" / "dog" / "1.png")
    (tmp_path / "set" / "cat" / "again").symlink_to(target, target_is_directory=True)
    (tmp_path / "set" / "dog" / "cat").symlink_to("../cat", target_is_directory=True)
    source = open_folder(tmp_path / "set")
    of_cat = [name for name in source.files if name.startswith("cat/")]
    assert of_cat[-1] == "cat/own/0.png" and of_cat[:-1] == (["cat/again/1.png"] if target == "../dog" else [])


def test_numbers_in_the_order_of_text_are_named(tmp_path):
    for name in range(12):
        write(tmp_path / "many" / str(name) / "a.png")
    for name in range(3, 6):
        write(tmp_path / "few" / str(name) / "a.png")
        write(tmp_path / "padded" / f"{7 * name:03d}" / "a.png")
    many = open_folder(tmp_path / "many")
    assert many.class_names[1:5] == ("1", "10", "11", "2")
    assert [line for line in many.notes if "11 before 2: label 4 is class 2" in line] == list(many.notes) != []
    assert open_folder(tmp_path / "many", classes="10,2").notes == ()  # in an order that was asked for
    assert open_folder(tmp_path / "few").notes == open_folder(tmp_path / "padded").notes == ()


@pytest.mark.parametrize("table", [None, "labels.csv", "metadata.jsonl"])
def test_without_classes_it_is_said_how_there_would_be(tmp_path, table):
    for name in ("cat.0.jpg", "dog.0.jpg"):
        write(tmp_path / name)
    if table:
        (tmp_path / table).write_text("dog.0.jpg,dog\n")
    source = open_folder(tmp_path)
    first, hint = describe(source)
    assert first == "no classes" and "sub-directory" in hint and "dataset.json" in hint and (table or "") in hint
    with pytest.raises(UserError, match=r"data\.classes=dog: this data set has no classes: .*sub-directory") as error:
        open_folder(tmp_path, classes="dog")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar"])
def test_an_archive_is_called_one(tmp_path, kind):
    write(tmp_path / "set" / "a.png")
    archive = shutil.make_archive(str(tmp_path / "archive"), kind, tmp_path / "set")
    with pytest.raises(UserError, match="an archive; unpack it"):
        open_folder(archive)


def test_counts_of_classes(tmp_path):
    for i in range(12):
        for j in range(1 + (i == 5)):
            write(tmp_path / f"c{i:02d}" / f"{j}.png")
    assert describe(open_folder(tmp_path)) == ["12 classes: c00, c01, c02, ..., c11; images: 1 (c00) to 2 (c05), median 1"]
    assert describe(open_folder(tmp_path, classes="c05,c01")) == ["2 classes: c05 2, c01 1"]
    assert describe(open_folder(tmp_path, classes="c01"))[0] == "1 class: c01 1"
    assert describe(open_source(config("digits", channels=1)))[0].startswith("10 classes: 0 143, 1 146, ")
    assert describe(open_source(config("synthetic"))) == ["10 classes: " + ", ".join(f"class {i}" for i in range(10))]

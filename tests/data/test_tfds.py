"""tfds:NAME: sets that tfds' own writer prepares here, of pictures in many sizes, read back through the data source."""

import io
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from tfds_sets import NAMES, TEST, TRAIN, Pictures, colour, prepare

from speedit_jax.config import get_config
from speedit_jax.data import loader
from speedit_jax.data.sources import open_source
from speedit_jax.data.tfds import prepare as prepare_one
from speedit_jax.errors import UserError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The directory that TFDS_DATA_DIR names."""
    root = tmp_path_factory.mktemp("tfds")
    prepare(root)
    return root


@pytest.fixture(autouse=True)
def data_dir(prepared, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared))


def config(source, height=8, width=8, channels=3, **keys):
    data = get_config().data
    data.update(source=source, height=height, width=width, channels=channels, **keys)
    return data


def by_number(source):
    """{number of the picture: its record}: tfds shuffles while it writes, the colour tells."""
    records = [source[i] for i in range(len(source))]
    found = {round((r["image"][..., 0].mean() + 1) * 12.75): r for r in records}
    assert len(found) == len(source)
    return found


def test_pictures_of_any_size_are_cropped_and_labelled():
    source = open_source(config("tfds:animals/wild:1.2.0", height=8, width=12))
    assert source.class_names == NAMES and source.image_shape == (8, 12, 3) and source.encoded_by is None
    records = by_number(source)
    assert records.keys() == set(TRAIN)
    for i, record in records.items():
        assert record["image"].shape == (8, 12, 3) and record["image"].dtype == np.float32
        assert record["label"] == i % 3 and record["label"].dtype == np.int32
        # JPEG's colours are a little off.
        np.testing.assert_allclose(record["image"], np.broadcast_to(colour(i), (8, 12, 3)) / 127.5 - 1, atol=6 / 127.5)


@pytest.mark.parametrize("bands", [3, 4])
def test_the_picture_is_that_of_a_folder(tmp_path, bands):
    """The same bytes through the two sources, transparent or not."""
    pixels = np.random.default_rng(0).integers(0, 256, (37, 50, bands), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")

    def examples(self):
        yield 0, {"photo": file.getvalue(), "year": 0}

    # tfds takes a name only once.
    one_picture = type(f"Of{bands}Bands", (Pictures,), {"_generate_examples": examples})
    one_picture(data_dir=tmp_path, file_format="array_record").download_and_prepare(file_format="array_record")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(file.getvalue())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(tmp_path))
        for channels in (1, 3):
            where = (f"tfds:of{bands}_bands", f"folder:{tmp_path / 'folder'}")
            one, other = (open_source(config(s, 8, 12, channels, background="blue"))[0] for s in where)
            np.testing.assert_array_equal(one["image"], other["image"])
            white = open_source(config(where[0], 8, 12, channels))[0]["image"]
            assert (white == one["image"]).all() == (bands == 3)


def test_splits():
    sizes = {"train": 14, "test": 6, "train+test": 20, "train[:50%]": 7, "train[3:5]": 2}
    opened = {split: open_source(config("tfds:animals/tame", split=split)) for split in sizes}
    assert {split: len(source) for split, source in opened.items()} == sizes
    assert len({source.fingerprint for source in opened.values()}) == len(sizes)
    assert by_number(opened["test"]).keys() == set(TEST)
    again = open_source(config("tfds:animals/tame:1.2.0", split="test"))
    assert again.fingerprint == opened["test"].fingerprint != open_source(config("tfds:animals/wild", split="test")).fingerprint


def test_some_classes():
    source = open_source(config("tfds:animals/tame", classes="2,cat"))
    assert source.class_names == ("a, b", "cat")
    assert {i: record["label"] for i, record in by_number(source).items()} == {i: int(i % 3 == 0) for i in TRAIN if i % 3 != 1}
    assert source.fingerprint != open_source(config("tfds:animals/tame")).fingerprint
    # Records without a label belong to no class.
    assert len(open_source(config("tfds:animals/wild", split="train+unlabelled", classes="0,1,2"))) == 14


def test_a_set_without_labels_is_unconditional():
    source = open_source(config("tfds:pictures", split="train[:3]"))
    assert source.class_names == () and len(source) == 3
    good = open_source(config("tfds:pictures"))
    labels = []
    for i in range(5):
        try:
            labels.append(good[i]["label"])
        except UserError as e:
            assert "cannot read the image of record" in str(e) and "pictures/1.0.0 train" in str(e)
    assert labels == [0] * 4


def test_through_the_loader():
    source = open_source(config("tfds:animals/tame", channels=1))
    keys = {"seed": 0, "batch_size": 7, "rows": np.arange(7), "first_step": 0, "num_steps": 2}
    loaded = [np.concatenate([b["label"] for b in loader.batches(source, threads=t, **keys)]) for t in (0, 4)]
    np.testing.assert_array_equal(*loaded)
    np.testing.assert_array_equal(np.bincount(loaded[0]), np.bincount([i % 3 for i in TRAIN]))


MISTAKES = {
    "not prepared": ("tfds:birds", {}, "set TFDS_DATA_DIR, or prepare it with python -m speedit_jax.prepare --name=birds"),
    "no such version": ("tfds:animals/tame:9.0.0", {}, "--name=animals/tame:9.0.0"),
    "no such config": ("tfds:animals/feral", {}, "--name=animals/feral"),
    "not a name": ("tfds:a b", {}, "data.source=tfds:a b"),
    "no such split": ("tfds:animals/tame", {"split": "validation"}, "data.split=validation: animals/tame has train, test"),
    "not a split": ("tfds:animals/tame", {"split": "train[:"}, "data.split=train[:"),
    "a split of less than nothing": ("tfds:animals/tame", {"split": "train[5:1]"}, "data.split=train[5:1]: "),
    "an empty split": ("tfds:animals/tame", {"split": "train[:0]"}, "data.split=train[:0]: "),
    "no image": ("tfds:numbers", {}, "cannot tell which feature is the image; it has label (ClassLabel), number (Tensor)"),
    "none of the class": (
        "tfds:animals/wild",
        {"split": "unlabelled", "classes": "cat"},
        "no images in data.split=unlabelled of cat",
    ),
    "no such class": ("tfds:animals/tame", {"classes": "cow"}, "data.classes=cow: no class 'cow'"),
    "no classes": ("tfds:pictures", {"classes": "cow"}, "data.classes=cow: this data set has no classes"),
    "channels": ("tfds:pictures", {"channels": 4}, "data.channels=4"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(case):
    source, keys, message = MISTAKES[case]
    with pytest.raises(UserError) as error:
        open_source(config(source, **keys))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_preparing(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    for _ in range(2):  # the second time it is there
        assert prepare_one("pictures", None) == {"train": 5}
    assert len(open_source(config("tfds:pictures"))) == 5


def test_mistakes_in_preparing(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    cases = {"birds": "tfds has no such data set", "by_hand": "[Mm]anual", "a b": "a b"}
    for name, word in cases.items():
        with pytest.raises(UserError, match=f"cannot prepare {name}: .*{word}") as error:
            prepare_one(name, str(tmp_path / "manual"))
        assert "\n" not in str(error.value)


def test_records_without_a_label():
    source = open_source(config("tfds:animals/wild", split="unlabelled"))
    with pytest.raises(UserError, match=r"record [01] of animals/wild/1.2.0 unlabelled has no label; choose another data.split"):
        source[0]


def test_a_set_in_another_format(prepared, tmp_path, monkeypatch):
    """Writing tfrecord wants TensorFlow; what counts is what the set says of itself."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    shutil.copytree(prepared / "pictures", tmp_path / "pictures")
    info = tmp_path / "pictures" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(
        UserError,
        match=r"prepared as tfrecord; remove .*pictures/1.0.0 and prepare it with python -m speedit_jax.prepare --name=pictures",
    ):
        open_source(config("tfds:pictures"))


def test_without_tfds(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match=r"data\.source=tfds:animals: .*tensorflow_datasets.*pip install tensorflow-datasets"):
        open_source(config("tfds:animals"))


def test_tensorflow_is_not_imported(prepared):
    """Nor tfds itself where another source is asked for."""
    code = """
import sys
from speedit_jax.config import get_config
from speedit_jax.data.sources import open_source
from speedit_jax.data.tfds import prepare as prepare_one
data = get_config().data
assert len(open_source(data)) and "tensorflow_datasets" not in sys.modules
data.update(source="tfds:animals/tame", height=8, width=8)
assert len(open_source(data)[0]["image"]) == 8
assert "tensorflow_datasets" in sys.modules and "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)

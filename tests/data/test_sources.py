"""Data sources without files: splits, classes, and errors that name the key."""

import re

import numpy as np
import pytest
from folders import config, write

from speedit_jax.data.sources import load_digits, open_source
from speedit_jax.errors import UserError


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
        ("digits", {"classes": "1,ten"}, "no class 'ten'; the classes are 0..9: 0, 1, 2, 3, 4, ..."),
        ("digits", {"classes": "1,10"}, "no class '10'"),
        ("digits", {"classes": "1,"}, "no class ''"),
        ("digits", {"classes": "1,2,1"}, "'1' is given twice"),
        ("digits", {"split": "test"}, "data.split=test: the digits have train and held_out"),
        ("synthetic", {"split": "test"}, "data.split=test: only tfds:NAME, digits and blobs"),
        ("synthetic", {"classes": "1"}, "data.classes=1 is not possible for synthetic"),
        ("latents:x", {"classes": "1"}, "speedit_jax.encode --classes"),
    ],
)
def test_classes_and_splits_that_are_not_there(source, keys, message):
    with pytest.raises(UserError, match=re.escape(message)):
        open_source(config(source, channels=1, **keys))


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
    with pytest.raises(
        UserError, match=f"data.source '{source}'.*digits, folder:PATH, tfds:NAME, latents:PATH, synthetic or blobs"
    ):
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

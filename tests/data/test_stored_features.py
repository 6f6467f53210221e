"""Stored features on disk and in batches: what is written is read, mirrored with the image, and other data are refused."""

import dataclasses
import json

import numpy as np
import pytest
from errors import assert_one_line
from folders import config, write
from test_latents import write as write_latents

from speedit_jax.data import features, loader, shards
from speedit_jax.data.sources import open_source

SHAPE, COUNT = (2, 3, 5), 12
IDENTITY = {"encoder": "mine", "weights": "w"}


def of_image(i, mirrored=False):
    """The integer 10 i everywhere; of the mirror image one more."""
    return np.full(SHAPE, 10 * i + mirrored, np.float32)


def write_store(directory, mirrored=True, **data):
    """Two shards."""
    directory.mkdir()
    data = {"source": "mine", "fingerprint": "blobs train 12", "count": COUNT, "image_shape": [16, 16, 3]} | data
    examples = [np.stack([of_image(i), of_image(i, True)][: 1 + mirrored]) for i in range(data["count"])]
    facts = [
        features.write_shard(directory / shards.shard_name(n, 2), part, "record {}".format)
        for n, part in enumerate((examples[:7], examples[7:]))
    ]
    return features.write_header(directory, {"shape": SHAPE, "mirrored": mirrored, "features": IDENTITY, "data": data}, facts)


@pytest.fixture
def store(tmp_path):
    write_store(tmp_path / "f")
    return tmp_path / "f"


def open_blobs(store, count=COUNT, **keys):
    return open_source(config("blobs", synthetic_size=count, features=str(store), **keys))


@pytest.mark.parametrize("mirrored", [False, True])
def test_what_is_written_is_read(tmp_path, mirrored):
    write_store(tmp_path / "f", mirrored)
    read = features.open_features(tmp_path / "f")
    assert (read.identity, read.shape, read.mirrored) == (IDENTITY, SHAPE, mirrored)
    for i in range(COUNT):
        for side in range(1 + mirrored):
            stored = read.read(i, bool(side))
            assert stored.dtype == np.float16
            np.testing.assert_array_equal(stored, of_image(i, side))


def batches(source, rows=6, first_step=0, num_steps=40, flip=False, threads=0):
    keys = {"seed": 3, "batch_size": 6, "rows": np.arange(6)[:rows], "first_step": first_step, "num_steps": num_steps}
    return list(loader.batches(source, threads=threads, flip=flip, **keys))


def test_a_batch_has_the_features_of_its_images_and_mirror_images(store):
    source, mirrored = open_blobs(store, flip=True), 0
    for batch in batches(source, flip=True):
        assert (batch["features"].shape, batch["features"].dtype) == ((6, *SHAPE), np.float16)
        for image, number in zip(batch["image"], batch["features"][:, 0, 0, 0], strict=True):
            i, flipped = divmod(int(number), 10)
            np.testing.assert_array_equal(image, source[i]["image"][:, :: -1 if flipped else 1])
            mirrored += flipped
    assert 80 < mirrored < 160  # of 240 coins; five standard deviations


def test_features_are_a_function_of_seed_and_step_and_leave_the_images_alone(store):
    source, plain = open_blobs(store), open_source(config("blobs", synthetic_size=COUNT))
    whole = batches(source)
    for ours, theirs in zip(whole, batches(plain), strict=True):
        np.testing.assert_array_equal(ours["image"], theirs["image"])
        assert not (ours["features"] % 10).any()  # no mirror images
    later = batches(source, rows=4, first_step=7, threads=3)
    for ours, theirs in zip(later, whole[7:], strict=True):
        np.testing.assert_array_equal(ours["features"], theirs["features"][:4])


def test_what_is_read_in_order_has_no_features(store):
    (batch,) = loader.in_order(open_blobs(store), 2, 7, 5, 0)
    assert sorted(batch) == ["image", "label"]


def test_the_image_that_stands_in_brings_its_own_features(tmp_path):
    for i in range(3):
        write(tmp_path / "images" / f"{i}.png", colour=(100 * i, 0, 0))
    (tmp_path / "images" / "1.png").write_bytes(b"no image")
    plain = open_source(config(f"folder:{tmp_path / 'images'}", max_broken=1))
    write_store(tmp_path / "f", fingerprint=plain.fingerprint, count=3)
    source = open_source(config(f"folder:{tmp_path / 'images'}", max_broken=1, features=str(tmp_path / "f")))
    for index, shown in ((0, 0), (1, 2), (2, 2)):
        record = source[index]
        assert record["image"][0, 0, 0] == pytest.approx(200 * shown / 255 - 1, abs=0.01)
        assert record["features"].read(False)[0, 0, 0] == 10 * shown


def test_latents_have_the_features_of_their_images(tmp_path):
    header = write_latents(tmp_path / "l")
    images = {"images": {"fingerprint": "theirs", "shape": [24, 16, 3]}}
    (tmp_path / "l" / "header.json").write_text(json.dumps(header | images))
    write_store(tmp_path / "f", fingerprint="theirs", count=10, image_shape=[48, 32, 3])  # the same crop
    keys = {"features": str(tmp_path / "f"), "flip": True}
    source = open_source(config(f"latents:{tmp_path / 'l'}", **keys))
    for batch in batches(source, flip=True):
        for moments, number in zip(batch["moments"], batch["features"][:, 0, 0, 0], strict=True):
            i, flipped = divmod(int(number), 10)
            np.testing.assert_array_equal(moments, source[i]["moments"][flipped])


def test_the_background_is_part_of_the_images(tmp_path):
    """Transparent parts show it, and the fingerprint, of the files, does not tell."""
    write(tmp_path / "images" / "0.png")
    folder, prints = f"folder:{tmp_path / 'images'}", {}
    for colour in ("white", "#ff0000"):
        source = open_source(config(folder, background=colour))
        prints[colour] = features.belongs_to(source)
        write_store(tmp_path / colour, **prints[colour])
        assert open_source(config(folder, background=colour, features=str(tmp_path / colour))).features.data["count"] == 1
    assert "background" not in prints["white"] and prints["#ff0000"]["background"] == "#ff0000"
    for theirs, ours in (("white", "#ff0000"), ("#ff0000", "white")):
        of_others = config(folder, background=ours, features=str(tmp_path / theirs))
        assert_one_line(lambda of=of_others: open_source(of), f"over {theirs}", f"over {ours}", f"--background={ours}")


def test_other_features_are_other_data(store, tmp_path):
    write_store(tmp_path / "same")
    write_store(tmp_path / "other", mirrored=False)
    plain, *prints = [open_source(config("blobs", synthetic_size=COUNT)).fingerprint] + [
        open_blobs(directory).fingerprint for directory in (store, tmp_path / "same", tmp_path / "other")
    ]
    assert prints[0] == prints[1] != prints[2] and all(of.startswith(plain) for of in prints)


def test_features_that_do_not_fit_are_refused(store, tmp_path):
    assert_one_line(lambda: open_blobs(store, count=13), "another data set", "12 images", "13 images", "speedit_jax.features")
    assert_one_line(lambda: open_blobs(store, split="held_out"), "another data set")
    assert_one_line(lambda: open_blobs(store, width=16), "cropped to 16x16", "8x16", "--size=8,16")
    assert_one_line(lambda: open_blobs(tmp_path), "no header.json")
    write_latents(tmp_path / "l")
    assert_one_line(lambda: open_blobs(tmp_path / "l"), "holds no features")
    write_store(tmp_path / "one", mirrored=False)
    assert_one_line(lambda: open_blobs(tmp_path / "one", flip=True), "data.flip=True", "--mirror")


def test_damage_is_named(store, tmp_path):
    assert features.verify(store)["data"]["count"] == COUNT
    read = features.open_features(store)
    damaged = list(read.records)
    damaged[10] = damaged[10][:-2] + np.float16(np.nan).tobytes()
    read = dataclasses.replace(read, records=damaged)
    assert_one_line(lambda: read.read(5, False), "image 5", str(store), "not finite", "--verify")
    assert read.read(5, True).any()
    path = store / shards.shard_name(1, 2)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert_one_line(lambda: features.verify(store), path.name, "speedit_jax.features again")
    path = tmp_path / "new" / shards.shard_name(0, 1)
    path.parent.mkdir()
    too_large = [of_image(0)[None], np.full((1, *SHAPE), 1e6)]
    assert_one_line(lambda: features.write_shard(path, too_large, "image {} of mine".format), "image 1 of mine", "float16")
    assert not list(path.parent.iterdir())

"""Encoded captions on disk and in batches: what is written is read, one caption a record is drawn, other data are refused."""

import dataclasses
import json

import numpy as np
import pytest
from errors import assert_one_line
from folders import config, write

from speedit_jax.data import loader, shards, texts
from speedit_jax.data.sources import open_source

WIDTH, COUNT = 5, 12
IDENTITY = {"encoder": "mine", "weights": "w", "vocabulary": "v", "config": {}, "length": 9, "pooled": False}


def captions(i):
    """Of record i: 1 to 3 of 1 to 9 tokens each; number k of it is the integer 10 i + k everywhere."""
    return [np.full((1 + (i + 4 * k) % 9, WIDTH), 10 * i + k, np.float32) for k in range(1 + i % 3)]


def write_store(directory, fingerprint="blobs train 12", count=COUNT, identity=IDENTITY):
    """Two shards, of which the last ends with the null caption, two tokens of -1."""
    directory.mkdir()
    records = [*map(captions, range(count)), [np.full((2, WIDTH), -1.0)]]
    facts = [
        texts.write_shard(directory / shards.shard_name(n, 2), part, "record {}".format)
        for n, part in enumerate((records[:7], records[7:]))
    ]
    what = {"width": WIDTH, "text": identity, "data": {"source": "mine", "fingerprint": fingerprint, "count": count}}
    return texts.write_header(directory, what, [[f"text {i} {k}" for k in range(1 + i % 3)] for i in range(count)], facts)


@pytest.fixture
def store(tmp_path):
    write_store(tmp_path / "t")
    return tmp_path / "t"


def open_blobs(store, count=COUNT, **keys):
    return open_source(config("blobs", synthetic_size=count, text=str(store), **keys))


def test_what_is_written_is_read(store):
    read = texts.open_texts(store)
    assert (read.identity, read.width, read.count, read.pooled) == (IDENTITY, WIDTH, COUNT, False)
    assert read.length == 16  # the longest caption has 9 tokens
    for i in range(COUNT):
        stored = read.encoded(i)
        assert [tokens.dtype for tokens in stored] == [np.float16] * (1 + i % 3)
        for tokens, expected in zip(stored, captions(i), strict=True):
            np.testing.assert_array_equal(tokens, expected)
        assert read.captions(i) == [f"text {i} {k}" for k in range(1 + i % 3)]
    tokens, length = read.null
    assert length == 2
    np.testing.assert_array_equal(tokens, np.full((2, WIDTH), -1.0))


def test_pooled_captions_have_length_one(tmp_path):
    write_store(tmp_path / "t", identity=IDENTITY | {"pooled": True})
    assert texts.open_texts(tmp_path / "t").length == 1


def batches(source, *, rows=6, first_step=0, num_steps=60, seed=3, threads=0):
    keys = {"seed": seed, "batch_size": 6, "rows": np.arange(6)[:rows], "first_step": first_step, "num_steps": num_steps}
    return list(loader.batches(source, threads=threads, **keys))


def test_a_batch_has_the_captions_of_its_images(store):
    source = open_blobs(store)
    for batch in batches(source):
        tokens, lengths = batch["text"]["tokens"], batch["text"]["length"]
        assert (tokens.shape, tokens.dtype, lengths.dtype) == ((6, 16, WIDTH), np.float16, np.int32)
        for image, row, length in zip(batch["image"], tokens, lengths, strict=True):
            i, k = divmod(int(row[0, 0]), 10)
            np.testing.assert_array_equal(image, source[i]["image"])
            np.testing.assert_array_equal(row[:length], captions(i)[k])
            assert length == len(captions(i)[k]) and not row[length:].any()


def test_every_caption_is_drawn_as_often(store):
    drawn = np.concatenate([batch["text"]["tokens"][:, 0, 0] for batch in batches(open_blobs(store), num_steps=600)])
    for i in range(COUNT):
        counts = [(drawn == 10 * i + k).sum() for k in range(1 + i % 3)]
        assert sum(counts) == 300  # epochs
        # Five standard deviations of 300 draws of one of two.
        np.testing.assert_allclose(counts, 300 / len(counts), atol=45)


def test_captions_are_a_function_of_seed_and_step(store):
    source = open_blobs(store)
    whole = np.stack([batch["text"]["tokens"] for batch in batches(source)])
    later = np.stack([batch["text"]["tokens"] for batch in batches(source, first_step=7, rows=4, threads=3)])
    np.testing.assert_array_equal(later, whole[7:, :4])
    assert (np.stack([batch["text"]["tokens"] for batch in batches(source, seed=4)]) != whole).any()


def test_captions_do_not_change_the_images(store):
    plain = open_source(config("blobs", synthetic_size=COUNT))
    for ours, theirs in zip(batches(open_blobs(store)), batches(plain), strict=True):
        np.testing.assert_array_equal(ours["image"], theirs["image"])
        np.testing.assert_array_equal(ours["label"], theirs["label"])


def test_mirroring_and_captions_are_independent(store):
    source = open_blobs(store)
    rows = {"rows": np.arange(6), "first_step": 0, "num_steps": 400}
    flipped = list(loader.batches(source, seed=0, batch_size=6, flip=True, threads=0, **rows))
    table = np.zeros((2, 2))
    for batch in flipped:
        for image, row in zip(batch["image"], batch["text"]["tokens"], strict=True):
            i, k = divmod(int(row[0, 0]), 10)
            if i % 3 == 1:  # of two captions
                table[int((image != source[i]["image"]).any()), k] += 1
    # 800 pairs of coins; each share has a standard deviation of 0.015.
    np.testing.assert_allclose(table / table.sum(), 0.25, atol=0.08)


def test_in_order_takes_the_first_caption(store):
    (batch,) = loader.in_order(open_blobs(store), 2, 7, 5, 0)
    np.testing.assert_array_equal(batch["text"]["tokens"][:, 0, 0], [20, 30, 40, 50, 60])


def test_the_image_that_stands_in_brings_its_own_caption(tmp_path):
    for i in range(3):
        write(tmp_path / "images" / f"{i}.png", colour=(100 * i, 0, 0))
    (tmp_path / "images" / "1.png").write_bytes(b"no image")
    plain = open_source(config(f"folder:{tmp_path / 'images'}", max_broken=1))
    write_store(tmp_path / "t", fingerprint=plain.fingerprint, count=3)
    source = open_source(config(f"folder:{tmp_path / 'images'}", max_broken=1, text=str(tmp_path / "t")))
    for index, shown in ((0, 0), (1, 2), (2, 2)):
        record = source[index]
        assert record["image"][0, 0, 0] == pytest.approx(200 * shown / 255 - 1, abs=0.01)
        assert record["texts"].tokens[0][0, 0] == 10 * shown


def test_a_file_that_can_be_read_again_keeps_its_stand_in(tmp_path):
    """As on a network file system that failed once: an image with the caption of the next would be learned from."""
    for i in range(3):
        write(tmp_path / "images" / f"{i}.png", colour=(100 * i, 0, 0))
    plain = open_source(config(f"folder:{tmp_path / 'images'}"))
    write_store(tmp_path / "t", fingerprint=plain.fingerprint, count=3)
    source = open_source(config(f"folder:{tmp_path / 'images'}", max_broken=1, text=str(tmp_path / "t")))
    path = tmp_path / "images" / "1.png"
    whole = path.read_bytes()
    for content in (b"no image", whole):
        path.write_bytes(content)
        record = source[1]
        assert record["image"][0, 0, 0] == pytest.approx(200 * 2 / 255 - 1, abs=0.01)
        assert record["texts"].tokens[0][0, 0] == 20


def test_latents_have_the_captions_of_their_images(tmp_path):
    from test_latents import write as write_latents

    header = write_latents(tmp_path / "l")
    (tmp_path / "l" / "header.json").write_text(json.dumps(header | {"images": {"fingerprint": "theirs"}}))
    write_store(tmp_path / "t", fingerprint="theirs", count=10)
    source = open_source(config(f"latents:{tmp_path / 'l'}", text=str(tmp_path / "t")))
    (batch,) = batches(source, num_steps=1)
    assert batch["moments"].shape[0] == 6 and batch["text"]["tokens"].shape == (6, 16, WIDTH)


def test_other_captions_are_other_data(store, tmp_path):
    write_store(tmp_path / "same")
    write_store(tmp_path / "other", identity=IDENTITY | {"pooled": True})
    (tmp_path / "other" / shards.shard_name(0, 2)).unlink()
    prints = [open_blobs(directory).fingerprint for directory in (store, tmp_path / "same")]
    assert prints[0] == prints[1] != open_source(config("blobs", synthetic_size=COUNT)).fingerprint
    assert_one_line(lambda: open_blobs(tmp_path / "other"), "is missing", "encode_text")


def test_captions_of_another_set_are_refused(store, tmp_path):
    assert_one_line(lambda: open_blobs(store, count=13), "another data set", "12 images", "13 images", "encode_text")
    assert_one_line(lambda: open_blobs(store, split="held_out"), "another data set")
    assert_one_line(lambda: open_blobs(tmp_path), "no header.json")
    from test_latents import write as write_latents

    write_latents(tmp_path / "l")
    assert_one_line(lambda: open_blobs(tmp_path / "l"), "holds no captions")


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [shards.shard_name(1, 2), texts.TEXTS])
def test_verify_finds_a_flipped_bit(store, name):
    assert texts.verify(store)["captions"] == sum(1 + i % 3 for i in range(COUNT))
    flip_a_bit(store / name)
    assert_one_line(lambda: texts.verify(store), name, "encode_text again")


def test_a_stored_number_that_is_not_finite_is_named(store):
    """As a damaged file may hold it."""
    read = texts.open_texts(store)
    damaged = list(read.records)
    damaged[5] = damaged[5][:-2] + np.float16(np.nan).tobytes()
    read = dataclasses.replace(read, records=damaged)
    assert_one_line(lambda: read.encoded(5), "record 5", str(store), "not finite", "--verify")
    assert len(read.encoded(4)) == 2


def test_numbers_that_are_too_large_are_named(tmp_path):
    path = tmp_path / shards.shard_name(0, 1)
    records = [captions(0), [np.full((1, WIDTH), 1e6)]]
    assert_one_line(lambda: texts.write_shard(path, records, "image {} of mine".format), "image 1 of mine", "float16")
    assert not list(tmp_path.iterdir())


def test_captions_are_not_written_among_latents(tmp_path):
    latents = {"shape": [4, 4, 4], "class_names": [], "latents": {"vae": "somewhere"}, "images": {"count": 3}}
    captions = {"width": WIDTH, "text": IDENTITY, "data": {"source": "blobs", "count": 3}}
    assert_one_line(lambda: texts.check_same(tmp_path, latents, captions), "encoded with other settings", "choose another --out")

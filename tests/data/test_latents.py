"""Latents on disk: what is written is read, what is missing or damaged is named, mirror images are chosen."""

import hashlib
import json

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from errors import assert_one_line

from speedit_jax.config import get_config
from speedit_jax.data import latents, loader, shards
from speedit_jax.data.sources import open_source
from speedit_jax.errors import UserError

SHAPE = (3, 2, 4)  # h, w, C
COUNT, SHARDS = 10, 3


def moments(i):
    rng = np.random.default_rng(i)
    return rng.normal(size=(2, *SHAPE[:2], 2 * SHAPE[2])).astype(np.float16)


def write(directory, count=COUNT):
    """Shards of 4, 4 and 2 records, of which number i has label i % 3."""
    directory.mkdir()
    facts = []
    for shard in range(SHARDS):
        examples = ((i % 3, moments(i)) for i in range(4 * shard, min(4 * shard + 4, count)))
        facts.append(latents.write_shard(directory / shards.shard_name(shard, SHARDS), examples))
    what = {"shape": list(SHAPE), "class_names": ["a", "b", "c"], "latents": {"vae": "somewhere"}}
    return latents.write_header(directory, what, facts)


@pytest.fixture
def written(tmp_path):
    write(tmp_path / "l")
    return tmp_path / "l"


def open_config(directory):
    data = get_config().data
    data.source = f"latents:{directory}"
    return open_source(data)


def test_what_is_written_is_read(written):
    source = open_config(written)
    assert (len(source), source.image_shape, source.class_names) == (COUNT, SHAPE, ("a", "b", "c"))
    assert source.encoded_by == {"vae": "somewhere"}
    for i in range(COUNT):
        record = source[i]
        assert record["label"] == i % 3 and record["label"].dtype == np.int32
        assert record["moments"].dtype == np.float32
        np.testing.assert_array_equal(record["moments"], moments(i))


def test_statistics_are_those_of_samples_of_the_posterior(tmp_path):
    header = write(tmp_path / "l")
    stored = np.stack([moments(i) for i in range(COUNT)]).astype(np.float64)
    mean, logvar = np.split(stored, 2, axis=-1)
    samples = mean + np.exp(logvar / 2) * np.random.default_rng(0).normal(size=(4000, *mean.shape))
    # 4,000 samples of 120 posteriors: the Monte-Carlo error of both is about 0.002.
    np.testing.assert_allclose(header["mean"], samples.mean(axis=tuple(range(5))), atol=0.01)
    np.testing.assert_allclose(header["std"], samples.std(axis=tuple(range(5))), atol=0.01)


def test_writing_again_gives_the_same_bytes(written, tmp_path):
    write(tmp_path / "again")
    for path in written.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
    assert len(list(written.iterdir())) == 2 * SHARDS + 1


def test_the_fingerprint_is_of_the_contents(written, tmp_path):
    write(tmp_path / "same")
    write(tmp_path / "other", count=COUNT - 1)
    fingerprints = [open_config(d).fingerprint for d in (written, tmp_path / "same", tmp_path / "other")]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def batches(source, flip):
    rows = np.arange(5)
    return list(loader.batches(source, seed=0, batch_size=5, rows=rows, first_step=0, num_steps=40, flip=flip, threads=0))


@pytest.mark.parametrize("flip", [False, True])
def test_the_loader_takes_the_image_or_its_mirror_image(written, flip):
    stored = np.stack([moments(i) for i in range(COUNT)]).astype(np.float32)
    mirrored = []
    for batch in batches(open_config(written), flip):
        assert batch["moments"].shape == (5, *SHAPE[:2], 2 * SHAPE[2])
        for label, chosen in zip(batch["label"], batch["moments"], strict=True):
            matches = np.argwhere((stored == chosen).all(axis=(2, 3, 4)))
            assert len(matches) == 1 and matches[0, 0] % 3 == label
            mirrored.append(matches[0, 1])
    # 200 coins: 5 standard deviations are 0.18.
    assert np.mean(mirrored) == pytest.approx(0.5, abs=0.18) if flip else not any(mirrored)


def test_a_part_in_order(written):
    source = open_config(written)
    found = list(loader.in_order(source, 2, 9, batch_size=3, threads=2))
    assert [len(batch["label"]) for batch in found] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate([b["moments"] for b in found]), [moments(i) for i in range(2, 9)])


def damage_bytes(directory):
    path = directory / shards.shard_name(1, SHARDS)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "no header": (lambda d: (d / "header.json").unlink(), "no header.json in"),
    "half a header": (lambda d: (d / "header.json").write_text("{"), "header.json is not JSON"),
    "no shard": (lambda d: (d / shards.shard_name(1, SHARDS)).unlink(), "00001-of-00003.array_record is missing"),
    "half a shard": (lambda d: (d / shards.shard_name(1, SHARDS)).write_bytes(b"x" * 70_000), "cannot read the shards"),
    "an old shard": (
        lambda d: (d / shards.shard_name(2, SHARDS)).write_bytes((d / shards.shard_name(1, SHARDS)).read_bytes()),
        "holds 12 records, but its header says 10",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_missing_or_damaged_is_named(written, case):
    harm, message = DAMAGE[case]
    harm(written)
    with pytest.raises(UserError, match=message):
        open_config(written)


def test_a_record_that_has_changed_is_named(written):
    path = written / shards.shard_name(1, SHARDS)
    path.write_bytes(path.read_bytes().replace(moments(5).tobytes(), moments(6).tobytes()))
    source = open_config(written)
    np.testing.assert_array_equal(source[4]["moments"], moments(4))
    assert_one_line(
        lambda: source[5], f"cannot read record 5 of {written}", "hash mismatch", "--verify", "speedit_jax.encode again"
    )


def test_a_directory_of_something_else(written):
    """Texts and features are stored in the same way."""
    header = json.loads((written / "header.json").read_text())
    (written / "header.json").write_text(json.dumps({key: value for key, value in header.items() if key != "latents"}))
    for read in (open_config, latents.verify):
        with pytest.raises(UserError, match=f"{written} holds no latents but something else"):
            read(written)


def test_verify(written):
    assert latents.verify(written) == json.loads((written / "header.json").read_text())
    damage_bytes(written)
    with pytest.raises(UserError, match=r"00001-of-00003\.array_record missing or damaged; remove"):
        latents.verify(written)


def test_a_shard_is_finished_when_its_facts_are_there(tmp_path):
    path = tmp_path / shards.shard_name(0, 1)

    def killed():
        yield 0, moments(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        latents.write_shard(path, killed())
    assert shards.finished_shard(path) is None and not path.exists()
    facts = latents.write_shard(path, [(0, moments(0))])
    assert shards.finished_shard(path) == facts and facts["records"] == 1


def harmed(value, where):
    """float32 moments of one example, one number of which is `value`."""
    values = moments(0).astype(np.float32)
    values[where] = value
    return values


MEAN, LOGVAR = (1, 2, 0, 3), (0, 0, 1, 6)  # of the mirror image and of the image


@pytest.mark.parametrize("where", [MEAN, LOGVAR])
@pytest.mark.parametrize(
    "value, words", [(np.nan, ["not finite", "--dtype"]), (np.inf, ["not finite"]), (-7e4, ["reach 7e+04", "at most 65504"])]
)
def test_what_float16_does_not_hold_is_not_written(tmp_path, value, words, where):
    path = tmp_path / shards.shard_name(0, 1)
    examples = [(0, moments(0)), (1, harmed(value, where)), (2, moments(2))]
    assert_one_line(lambda: latents.write_shard(path, examples, "image {} of mine".format), "image 1 of mine", *words)
    assert not any(tmp_path.iterdir())


def test_the_largest_float16_is_written(tmp_path):
    path = tmp_path / shards.shard_name(0, 1)
    facts = latents.write_shard(path, [(0, harmed(65504, MEAN))])
    assert np.isfinite(facts["sum"]).all() and np.isfinite(facts["sum_of_squares"]).all()


def store_infinity(directory, sum_too):
    """Record 5 of all has an infinity, in the stored numbers and perhaps in the sums: what earlier versions wrote."""
    path = directory / shards.shard_name(1, SHARDS)
    path.unlink()
    writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
    for i in range(4, 8):
        stored = moments(i) if i != 5 else harmed(np.inf, MEAN).astype(np.float16)
        writer.write(np.int32(i % 3).tobytes() + stored.tobytes())
    writer.close()
    header = json.loads((directory / "header.json").read_text())
    header["shards"][1]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    if sum_too:
        header["shards"][1]["sum"][3] = np.inf
    (directory / "header.json").write_text(json.dumps(header))


def test_a_stored_number_that_is_not_finite_is_named(written):
    store_infinity(written, sum_too=False)
    source = open_config(written)
    assert_one_line(lambda: source[5], "record 5", str(written), "--verify")
    assert np.isfinite(source[4]["moments"]).all()
    assert_one_line(lambda: latents.verify(written), "00001-of-00003.array_record (record 1)", "remove")


def test_sums_that_are_not_finite_are_refused_at_once(written):
    store_infinity(written, sum_too=True)
    words = ["00001-of-00003.array_record", "not finite", "remove"]
    assert_one_line(lambda: open_config(written), *words)
    header = json.loads((written / "header.json").read_text())
    before = (written / "header.json").read_bytes()
    assert_one_line(lambda: latents.write_header(written, {}, header["shards"]), *words)
    assert (written / "header.json").read_bytes() == before


ENCODING = {
    "shape": [3, 2, 4],
    "class_names": ["a", "b"],
    "latents": {"vae": "/there", "weights": "abc", "config": {"scaling_factor": 0.5, "shift_factor": 0.0, "latent_channels": 4}},
    "images": {"source": "folder:/there", "count": 10, "fingerprint": "new", "shard_size": 4, "dtype": "float32"},
}


def changed(path, value):
    """ENCODING with another value at "section.key"."""
    copied = place = json.loads(json.dumps(ENCODING))
    *sections, key = path.split(".")
    for section in sections:
        place = place[section]
    place[key] = value
    return copied


def check(saved, older=()):
    latents.check_same("out", saved, ENCODING, older)


@pytest.mark.parametrize(
    "path, value",
    [
        ("latents.vae", "/elsewhere"),
        ("images.source", "folder:/elsewhere"),
        ("latents.config.scaling_factor", 1.0),
        ("latents.config.shift_factor", 1.0),
    ],
)
def test_places_and_scale_do_not_make_another_encoding(path, value):
    check(changed(path, value))


@pytest.mark.parametrize(
    "path, value",
    [
        ("shape", [3, 2, 8]),
        ("class_names", ["b", "a"]),
        ("latents.weights", "abd"),
        ("latents.config.latent_channels", 8),
        ("images.shard_size", 5),
        ("images.dtype", "bfloat16"),
        ("images.tile", True),
    ],
)
def test_another_encoding_is_named(path, value):
    assert_one_line(lambda: check(changed(path, value)), "other settings", path.replace(".latent_channels", ""), "--out")
    assert_one_line(lambda: latents.check_same("out", ENCODING, changed(path, value), ()), "other settings")


@pytest.mark.parametrize("path, value", [("images.fingerprint", "old"), ("images.count", 9)])
def test_changed_images_are_called_that(path, value):
    assert_one_line(
        lambda: check(changed(path, value)), "images of folder:/there were added, removed or edited since out", "--out"
    )


def test_a_fingerprint_of_an_earlier_version_serves():
    check(changed("images.fingerprint", "old"), ("older", "old"))
    assert_one_line(lambda: check(changed("images.fingerprint", "old"), ("older",)), "added, removed or edited")
    assert_one_line(lambda: check(changed("images.fingerprint", "old") | {"shape": [1, 1, 4]}, ("old",)), "(shape)")

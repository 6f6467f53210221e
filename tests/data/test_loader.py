"""Batches as a pure function of (seed, step), whatever the hosts, the threads and the first step."""

import dataclasses
import hashlib
import itertools
import threading

import numpy as np
import pytest
from PIL import Image

from speedit_jax.config import get_config
from speedit_jax.data.loader import READ_AHEAD, batches, in_order
from speedit_jax.data.sources import open_source
from speedit_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Numbered:
    """Image i is [[i, -i]] and its label i."""

    size: int = 21
    image_shape: tuple = (1, 2, 1)
    class_names: tuple = ()
    fingerprint: str = ""
    encoded_by: None = None

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return {"image": np.array([[[i], [-i]]], np.float32), "label": np.int32(i)}


def load(source=None, *, seed=5, batch_size=8, rows=None, first_step=0, num_steps=7, **keys):
    """All batches, stacked: [steps, rows, ...]."""
    rows = np.arange(batch_size) if rows is None else rows
    keys |= {"seed": seed, "batch_size": batch_size, "rows": rows, "first_step": first_step, "num_steps": num_steps}
    loaded = list(batches(source or Numbered(), **keys))
    return {name: np.stack([batch[name] for batch in loaded]) for name in ("image", "label")}


def assert_equal(a, b):
    for name in ("image", "label"):
        np.testing.assert_array_equal(a[name], b[name])


# 21 records in batches of 8: the second epoch begins inside the third batch.


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_hosts_load_one_global_batch(hosts, interleaved, flip):
    rows = [np.arange(8)[host::hosts] if interleaved else np.split(np.arange(8), hosts)[host] for host in range(hosts)]
    whole = load(flip=flip)
    for mine in rows:
        assert_equal(load(rows=mine, flip=flip), {name: values[:, mine] for name, values in whole.items()})


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("first_step", [0, 1, 3, 6])
def test_starting_at_a_step_is_skipping_to_it(first_step, flip):
    whole = load(flip=flip)
    for rows in (np.arange(8), np.array([1, 4, 5])):
        resumed = load(first_step=first_step, rows=rows, flip=flip)
        assert_equal(resumed, {name: values[first_step:, rows] for name, values in whole.items()})


def test_no_steps_left_is_no_batches():
    loader = batches(Numbered(), seed=0, batch_size=8, rows=np.arange(8), first_step=7, num_steps=7)
    assert list(loader) == []


@pytest.mark.parametrize("batch_size, num_steps", [(8, 21), (21, 4), (50, 5)])
def test_every_record_once_an_epoch_in_an_order_of_its_own(batch_size, num_steps):
    labels = load(batch_size=batch_size, num_steps=num_steps)["label"].ravel()
    epochs = [tuple(labels[i : i + 21]) for i in range(0, len(labels) - 20, 21)]
    assert len(epochs) >= 4
    assert all(sorted(epoch) == list(range(21)) for epoch in epochs)
    assert len({tuple(range(21)), *epochs}) == len(epochs) + 1


def test_the_order_does_not_depend_on_the_batch_size():
    labels = load(batch_size=8, num_steps=6)["label"].ravel()
    np.testing.assert_array_equal(load(batch_size=16, num_steps=3)["label"].ravel(), labels)


@pytest.mark.parametrize("flip", [False, True])
def test_a_seed_is_a_stream(flip):
    assert_equal(load(flip=flip, seed=1), load(flip=flip, seed=1))
    assert (load(seed=1)["label"] != load(seed=2)["label"]).any()


@pytest.mark.parametrize("flip", [False, True])
def test_threads_do_not_reorder(flip):
    assert_equal(load(flip=flip, threads=1), load(flip=flip, threads=7))


def flipped(**keys):
    """Which images are mirrored, of the records whose mirror image differs."""
    loaded = load(Numbered(size=2000), batch_size=100, num_steps=20, flip=True, **keys)
    images, labels = loaded["image"].reshape(-1, 2), loaded["label"].ravel()
    mirrored = images[:, 0] < 0
    np.testing.assert_array_equal(np.where(mirrored, -1, 1) * labels, images[:, 0])
    np.testing.assert_array_equal(images[:, 0], -images[:, 1])
    return mirrored[labels > 0]


def test_half_of_the_images_are_mirrored():
    # 1,999 fair coins have a standard deviation of 0.0112; four of them.
    assert abs(flipped(seed=0).mean() - 0.5) < 0.045
    assert abs((flipped(seed=0) == flipped(seed=1)).mean() - 0.5) < 0.045


def test_mirroring_does_not_change_the_order():
    np.testing.assert_array_equal(load(flip=True)["label"], load(flip=False)["label"])


def test_an_image_is_mirrored_anew_in_each_epoch():
    loaded = load(Numbered(size=200), batch_size=200, num_steps=2, flip=True)
    by_label = np.take_along_axis(loaded["image"][:, :, 0, 0, 0], np.argsort(loaded["label"]), axis=1)
    changed = (by_label[0] != by_label[1]).mean()
    assert 0.3 < changed < 0.7  # 200 fair coins: more than five standard deviations of 0.035


@pytest.mark.parametrize("source, channels", [("digits", 1), ("synthetic", 3)])
def test_shapes_and_dtypes(source, channels):
    data = get_config().data
    data.update(source=source, height=8, width=8, channels=channels)
    loaded = batches(open_source(data), seed=0, batch_size=6, rows=np.array([1, 4, 5]), first_step=0, num_steps=3, flip=True)
    for batch in itertools.islice(loaded, 2):
        assert batch.keys() == {"image", "label"}
        assert batch["image"].shape == (3, 8, 8, channels)
        assert batch["image"].dtype == np.float32
        assert np.abs(batch["image"]).max() <= 1
        assert batch["label"].shape == (3,)
        assert batch["label"].dtype == np.int32


def test_a_damaged_image_is_named_through_the_threads(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"text")
    data = get_config().data
    data.update(source=f"folder:{tmp_path}", height=8, width=8)
    with pytest.raises(UserError, match="cannot read the image") as error:
        list(batches(open_source(data), seed=0, batch_size=2, rows=np.arange(2), first_step=0, num_steps=2))
    assert str(tmp_path / "bad.png") in str(error.value)


def digest(loaded):
    sha = hashlib.sha256()
    for batch in loaded:
        for name in sorted(batch):
            sha.update(f"{name} {batch[name].dtype} {batch[name].shape}".encode())
            sha.update(np.ascontiguousarray(batch[name]).tobytes())
    return sha.hexdigest()[:16]


# Of the digits, recorded before examples were read ahead one by one. A run that is continued must see what it would have seen.
RECORDED = {
    (False, (0, 1, 2, 3, 4, 5)): "8e5278ee23bc73c7",
    (False, (1, 4, 5)): "cf5f96b8a9592cb0",
    (True, (0, 1, 2, 3, 4, 5)): "6f5d22ba7fe76f9f",
    (True, (1, 4, 5)): "45eacef65b645352",
}


@pytest.mark.parametrize("threads", [0, 3])
def test_the_stream_is_the_recorded_one(threads):
    data = get_config().data
    data.update(source="digits", height=8, width=8, channels=1)
    source = open_source(data)
    for (flip, rows), expected in RECORDED.items():
        keys = {"seed": 7, "batch_size": 6, "first_step": 2, "num_steps": 30, "flip": flip, "threads": threads}
        assert digest(batches(source, rows=np.array(rows), **keys)) == expected
    assert digest(in_order(source, 3, 50, 8, threads)) == "096cfaeb704222ed"


class Watched(Numbered):
    """Calls `read` at each read, in the thread that reads."""

    def __init__(self, size, read):
        super().__init__(size)
        object.__setattr__(self, "read", read)

    def __getitem__(self, i):
        self.read()
        return super().__getitem__(i)


def shuffled(source, size, threads):
    return batches(source, seed=0, batch_size=size, rows=np.arange(size), first_step=0, num_steps=100, threads=threads)


def ordered(source, size, threads):
    return in_order(source, 0, len(source), size, threads)


LOADERS = [shuffled, ordered]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("threads", [0, 4])
def test_a_stated_number_of_examples_is_read_ahead(load, threads):
    most = 64 + READ_AHEAD * 64 if threads else 64
    reads, enough, too_many = itertools.count(1), threading.Event(), threading.Event()

    def read():
        number = next(reads)
        if number >= most:
            enough.set()
        if number > most:
            too_many.set()

    loaded = load(Watched(2000, read), 64, threads)
    next(loaded)
    assert enough.wait(60)
    assert not too_many.wait(0.3)  # a thread that reads on takes microseconds
    loaded.close()


@pytest.mark.parametrize("load", LOADERS)
def test_all_threads_read_for_one_batch(load):
    together = threading.Barrier(4, timeout=60)  # breaks, and so do the reads, unless four meet there
    assert len(next(load(Watched(4, together.wait), 4, threads=4))["label"]) == 4


@pytest.mark.parametrize("load", LOADERS)
def test_threads_end_with_the_loader(load):
    def alive():
        return {thread for thread in threading.enumerate() if thread.name.startswith("grain-prefetch")}

    before = alive()
    loaded = load(Numbered(2000), 8, threads=3)
    next(loaded)
    started = alive() - before
    assert started
    loaded.close()
    for thread in started:
        thread.join(60)
        assert not thread.is_alive()

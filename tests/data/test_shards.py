"""Sets of more files than a process may have open at first: their readers keep all open."""

import os
import resource

import numpy as np
import pytest
import tensorflow_datasets as tfds
from errors import assert_one_line
from folders import config
from tfds_sets import Animals

from speedit_jax import storage
from speedit_jax.data import shards, texts
from speedit_jax.data.sources import open_source
from speedit_jax.errors import UserError

FILES = 60


@pytest.fixture
def few_files():
    """This process may open some 30 more files, and raise that."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_all_shards_of_a_store_are_read(tmp_path, few_files):
    paths = shards.shard_paths(tmp_path, FILES, 1)
    facts = [texts.write_shard(path, [[np.full((1, 4), i, np.float32)]], str) for i, path in enumerate(paths)]
    texts.write_header(tmp_path, {"width": 4, "text": {"pooled": True}}, [["a"]] * (FILES - 1), facts)
    store = texts.open_texts(tmp_path)
    np.testing.assert_array_equal([store.encoded(i)[0][0, 0] for i in range(FILES)], np.arange(FILES))


def test_all_files_of_a_tfds_set_are_read(tmp_path, few_files, monkeypatch):
    class Many(Animals):
        BUILDER_CONFIGS = []  # noqa: RUF012

        def _split_generators(self, dl_manager):
            return {"train": ((i, {"image": self.picture, "label": 0, "mask": b"", "size": 0}) for i in range(FILES))}

    Many.picture = next(Animals._generate_examples(None, [0]))[1]["image"]
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    download = tfds.download.DownloadConfig(num_shards=FILES)
    Many(data_dir=tmp_path, file_format="array_record").download_and_prepare(download_config=download, file_format="array_record")
    source = open_source(config("tfds:many"))
    assert len(list(tmp_path.rglob("*array_record*-of-*"))) == len(source) == FILES
    assert all(source[i]["image"].shape == (8, 8, 3) for i in range(FILES))


def test_more_files_than_the_system_allows_are_one_line(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 4096))
    assert_one_line(lambda: storage.allow_open_files(4090, "data/x"), "data/x has 4,090 files", "open 4,096", "raise that limit")


def test_a_full_disk_is_one_line(tmp_path):
    (tmp_path / "a.array_record").symlink_to("/dev/full")
    writer = shards.Writer(tmp_path / "a.array_record")
    with pytest.raises(UserError) as written:
        for _ in range(9):  # some megabytes may wait in memory
            writer.write(bytes(2**22))
    with pytest.raises(UserError) as closed:
        writer.close()
    for error in (written, closed):
        assert str(error.value).startswith(f"cannot write to {tmp_path} (write() failed: No space left on device); mend that")

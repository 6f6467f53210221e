"""From captions to encoded ones, whatever interrupts it."""

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from commands import ONE_DEVICE, ROOT, TINY, assert_fails, assert_works, checksums
from PIL import Image

from speedit_jax.config import get_config
from speedit_jax.data.sources import open_source
from speedit_jax.data.texts import open_texts
from speedit_jax.encoders.text_encoder import TextEncoder
from speedit_jax.testing.hosts import hosts

IMAGES = 23  # and the null caption: five shards of 5, of which the last has 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    for i in range(IMAGES):
        Image.new("RGB", (8, 8), (10 * i, 0, 0)).save(root / f"{i:02d}.png")
        (root / f"{i:02d}.txt").write_text("".join(f"number {i} of the reds, line {k}\n" for k in range(1 + i % 3)))
    return root


def flags(folder, out):
    return [f"--data=folder:{folder}", "--encoder=words", f"--out={out}", "--batch_size=4", "--shard_size=5"]


@pytest.fixture(scope="module")
def encoded(run, folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoded") / "texts"
    result = run("encode_text", *flags(folder, out))
    assert_works(result)
    assert "45 captions of 23 images in 5 shards" in result.out and "up to 8 tokens of 64" in result.out
    return out


def contents(directory):
    return {path.rpartition("/")[2]: digest for path, digest in checksums(directory).items()}


def test_what_is_stored_is_the_encoders(encoded):
    store, encoder = open_texts(encoded), TextEncoder("words")
    encoder.check(store.identity)
    assert (store.count, store.length, store.null[1]) == (IMAGES, 8, 1)
    for i in range(IMAGES):
        expected = [f"number {i} of the reds, line {k}" for k in range(1 + i % 3)]
        assert store.captions(i) == expected
        tokens, lengths = encoder.encode(expected)
        for k, stored in enumerate(store.encoded(i)):
            np.testing.assert_array_equal(stored, tokens[k, : lengths[k]].astype(np.float16))


def test_pooled(run, folder, tmp_path):
    assert_works(run("encode_text", *flags(folder, tmp_path / "t"), "--pooled"))
    store = open_texts(tmp_path / "t")
    assert store.pooled and store.length == 1
    tokens, _ = TextEncoder("words", pooled=True).encode(store.captions(1))
    np.testing.assert_array_equal(np.stack(store.encoded(1)), tokens.astype(np.float16))


def test_again_does_nothing(run, encoded, folder):
    before = contents(encoded)
    result = run("encode_text", *flags(folder, encoded))
    assert_works(result)
    assert "5 of 5 shards are already finished" in result.out
    assert contents(encoded) == before
    result = run("encode_text", f"--out={encoded}", "--verify")
    assert_works(result)
    assert "45 captions in 5 shards; all checksums match" in result.out


def start(arguments, env):
    command = [sys.executable, "-m", "speedit_jax.encode_text", *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=ONE_DEVICE | env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


KILLED = """
import os, runpy, signal
replace, done = os.replace, []
def counted(source, target):
    if str(target).endswith(".array_record"):
        if len(done) == {finished}:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(target)
    replace(source, target)
os.replace = counted
runpy.run_module("speedit_jax.encode_text", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("finished", range(5))
def test_killed_at_every_shard_is_the_same_to_the_byte(run, encoded, folder, tmp_path, finished):
    """At the worst moment: a shard is written whole, and has not got its name."""
    killed = tmp_path / "killed.py"
    killed.write_text(KILLED.format(finished=finished))
    command = [sys.executable, killed, *flags(folder, tmp_path / "t")]
    done = subprocess.run(command, cwd=ROOT, env=ONE_DEVICE | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((tmp_path / "t").glob("*.array_record"))) == finished
    assert_fails(run("train", *TINY, f"--config.data.text={tmp_path / 't'}", f"--workdir={tmp_path / 'r'}"), "no header.json")
    assert_works(run("encode_text", *flags(folder, tmp_path / "t")))
    assert contents(tmp_path / "t") == contents(encoded)


def test_two_hosts_write_the_same(encoded, folder, tmp_path):
    for process in [start([*flags(folder, tmp_path / "t"), "--multihost"], env) for env in hosts(2)]:
        errors = process.communicate(timeout=600)[1]
        assert process.returncode == 0, errors
    assert contents(tmp_path / "t") == contents(encoded)


def test_other_captions_are_not_mixed_in(run, encoded, folder, tmp_path):
    images, before = tmp_path / "images", contents(encoded)
    shutil.copytree(folder, images)
    assert_works(run("encode_text", *flags(images, encoded)))  # the same, elsewhere
    assert json.loads((encoded / "header.json").read_text())["data"]["source"] == f"folder:{images}"
    assert_works(run("encode_text", *flags(folder, encoded)))
    assert contents(encoded) == before
    (images / "07.txt").write_text("number seven")
    assert_fails(run("encode_text", *flags(images, encoded)), "images or captions of", "have changed", "another --out")
    assert_fails(run("encode_text", *flags(folder, encoded), "--pooled"), "with other settings (text.pooled)")
    assert contents(encoded) == before


def trained_on(out):
    """The config of the command that is printed at the end, and its data."""
    (line,) = [line for line in out.splitlines() if line.startswith("Next: ")]
    keys = dict(re.findall(r"^--config\.([a-z_.]+)=(.*)$", "\n".join(shlex.split(line)), re.MULTILINE))
    config = get_config()
    config.update_from_flattened_dict({key: int(value) if value.isdecimal() else value for key, value in keys.items()})
    return config, open_source(config.data)


def test_the_next_command_trains_on_what_was_encoded(run, folder, tmp_path):
    config, source = trained_on(run("encode_text", *flags(folder, tmp_path / "t"), "--pooled").out)
    assert len(source) == IMAGES and config.model.text == "pooled"
    blobs = ["--data=blobs", "--synthetic_size=8", "--split=held_out", "--encoder=words", f"--out={tmp_path / 'b'}"]
    config, source = trained_on(run("encode_text", *blobs).out)
    assert len(source) == 8 and config.model.text == "cross"
    parts = tmp_path / "two parts"
    shutil.copytree(folder, parts / "one")
    shutil.copytree(folder, parts / "the other")
    _, source = trained_on(run("encode_text", *flags(parts, tmp_path / "p"), "--classes=the other").out)
    assert source.class_names == ("the other",)


MISTAKES = {
    "no out": (["--out="], ["--out is missing"]),
    "no data": (["--data="], ["--data is missing"]),
    "no encoder": (["--encoder="], ["--encoder is missing"]),
    "no such folder": (["--data=folder:/no/such"], ["/no/such"]),
    "no such encoder": (["--encoder=bertie"], ["bertie"]),
    "no such captions": (["--captions=/no/such.json"], ["/no/such.json"]),
    "no captions": (["--captions=.caption"], ["has a caption"]),
    "among the images": (["--out={folder}/texts"], ["--out=", "/texts is in", "elsewhere"]),
    "another kind of data": (["--data=digits"], ["only folder:PATH and blobs"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(run, folder, tmp_path, case):
    extra, words = MISTAKES[case]
    assert_fails(run("encode_text", *flags(folder, tmp_path / "t"), *(flag.format(folder=folder) for flag in extra)), *words)
    assert not any(tmp_path.iterdir()) and not (folder / "texts").exists()


def test_captions_that_are_too_long_are_counted(run, folder, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    shutil.copy(folder / "00.png", images)
    (images / "00.txt").write_text(" ".join(f"w{i}" for i in range(300)))
    result = run("encode_text", *flags(images, tmp_path / "t"))
    assert_works(result)
    (warning,) = [line for line in result.err.splitlines() if line.startswith("warning: ")]
    assert "1 captions are longer than the 256 tokens that words takes; the first one loses 'w255 w256" in warning


def test_training_reads_it(run, folder, encoded, tmp_path):
    size = ["--config.data.height=8", "--config.data.width=8", "--config.data.channels=3"]
    data = [f"--config.data.source=folder:{folder}", f"--config.data.text={encoded}", *size]
    assert_works(run("train", *TINY, *data, f"--workdir={tmp_path / 'run'}"))
    assert "+" in json.loads((tmp_path / "run" / "run.json").read_text())["data_fingerprint"]
    digits = run("train", *TINY, f"--config.data.text={encoded}", f"--workdir={tmp_path / 'other'}")
    assert_fails(digits, "captions of another data set", "speedit_jax.encode_text")

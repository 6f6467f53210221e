"""From images to stored features, whatever interrupts it, and to training with them."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import ONE_DEVICE, ROOT, TINY, assert_fails, assert_works, checksums
from PIL import Image
from recorded import write_dinov2

from speedit_jax.data.features import open_features

IMAGES = 13  # shards of 5, 5 and 3
REPA = ["--config.regularizer.align=0.5", "--config.regularizer.align_target=features", "--config.regularizer.align_depth=1"]
DATA = ["--config.data.height=8", "--config.data.width=8", "--config.data.channels=3", "--config.optim.schedule=constant"]


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    return write_dinov2(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(root / f"{i:02d}.png")
    return root


def flags(folder, out, *teacher):
    return [f"--data=folder:{folder}", "--size=8", f"--out={out}", "--batch_size=4", "--shard_size=5", "--mirror", *teacher]


@pytest.fixture(scope="module")
def of_dino(dino):
    return f"--dino={dino}", "--grid=4"


@pytest.fixture(scope="module")
def encoded(run, folder, of_dino, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoded") / "f"
    result = run("features", *flags(folder, out, *of_dino))
    assert_works(result)
    assert "features 4 x 4 x 12 of 13 images and mirror images in 3 shards" in result.out
    return out


def contents(directory):
    return {path.rpartition("/")[2]: digest for path, digest in checksums(directory).items()}


def test_again_does_nothing(run, encoded, folder, of_dino):
    before = contents(encoded)
    result = run("features", *flags(folder, encoded, *of_dino))
    assert_works(result)
    assert "3 of 3 shards are already finished" in result.out and contents(encoded) == before
    result = run("features", f"--out={encoded}", "--verify")
    assert_works(result)
    assert "features of 13 images in 3 shards; all checksums match" in result.out
    assert_fails(run("features", *flags(folder, encoded, of_dino[0], "--grid=2")), "with other settings (shape)")
    assert contents(encoded) == before


KILLED = """
import os, runpy, signal
replace, done = os.replace, []
def counted(source, target):
    if str(target).endswith(".array_record"):
        if len(done) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(target)
    replace(source, target)
os.replace = counted
runpy.run_module("speedit_jax.features", run_name="__main__", alter_sys=True)
"""


def test_killed_it_goes_on_to_the_same_bytes(run, encoded, folder, of_dino, tmp_path):
    """At the worst moment: a shard is written whole, and has not got its name."""
    killed = tmp_path / "killed.py"
    killed.write_text(KILLED)
    command = [sys.executable, killed, *flags(folder, tmp_path / "f", *of_dino)]
    done = subprocess.run(command, cwd=ROOT, env=ONE_DEVICE | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((tmp_path / "f").glob("*.array_record"))) == 1
    assert_works(run("features", *flags(folder, tmp_path / "f", *of_dino)))
    assert contents(tmp_path / "f") == contents(encoded)


def test_an_array_is_a_teacher(run, folder, tmp_path):
    array = np.random.default_rng(0).standard_normal((IMAGES, 2, 4, 4, 3)).astype(np.float32)
    np.save(tmp_path / "array.npy", array)
    teacher = f"--from_npy={tmp_path / 'array.npy'}"
    assert_works(run("features", *flags(folder, tmp_path / "f", teacher)))
    store = open_features(tmp_path / "f")
    for i in range(IMAGES):
        for side in (0, 1):
            np.testing.assert_array_equal(store.read(i, bool(side)), array[i, side].astype(np.float16))
    np.save(tmp_path / "array.npy", array[1:])
    assert_fails(run("features", *flags(folder, tmp_path / "g", teacher)), "features of 12 images", "has 13")
    np.save(tmp_path / "array.npy", array[:, 0])
    assert_fails(run("features", *flags(folder, tmp_path / "g", teacher)), "(13, 4, 4, 3)", "[n, 2, h, w, F]")
    np.savez(tmp_path / "array.npz", array)
    assert_fails(run("features", *flags(folder, tmp_path / "g", f"--from_npy={tmp_path / 'array.npz'}")), "array.npz is an npz")
    absent = Path("~/no such array.npy")
    assert_fails(run("features", *flags(folder, tmp_path / "g", f"--from_npy={absent}")), f"'{absent.expanduser()}'")
    assert not (tmp_path / "g").exists()


def train(run, folder, encoded, workdir, *keys):
    data = [*TINY, *DATA, *REPA, f"--config.data.source=folder:{folder}", f"--config.data.features={encoded}"]
    return run("train", *data, "--config.regularizer.align_head=conv", "--config.data.flip=True", f"--workdir={workdir}", *keys)


def last_metrics(workdir):
    line = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    return {name: value for name, value in line.items() if not name.startswith("time_")}


def test_training_aligns_with_them(run, encoded, folder, tmp_path):
    result = train(run, folder, encoded, tmp_path / "run", "--config.regularizer.align_until=4")
    assert_works(result)
    assert "alignment  of block 1 with features 4x4x12 of" in result.out and "until step 4" in result.out
    assert 0 < last_metrics(tmp_path / "run")["align"] < 2
    described = json.loads((tmp_path / "run" / "run.json").read_text())
    assert described["features"]["shape"] == [4, 4, 12] and described["data_fingerprint"].count("+") == 1
    # The features are held in the data's fingerprint.
    assert_fails(
        run("train", *TINY, *REPA, f"--config.data.features={encoded}", f"--workdir={tmp_path / 'r'}"), "of another data set"
    )


@pytest.mark.slow
def test_a_run_resumes_to_the_same(run, encoded, folder, tmp_path):
    """Stopped before the alignment's end, and taken up again."""
    keys = ["--config.regularizer.align_until=4"]
    assert_works(train(run, folder, encoded, tmp_path / "whole", *keys))
    for steps in (3, 6):
        assert_works(train(run, folder, encoded, tmp_path / "parts", *keys, f"--config.training.num_steps={steps}"))
    assert last_metrics(tmp_path / "parts") == last_metrics(tmp_path / "whole")


MISTAKES = {
    "no out": (["--out="], ["--out is missing"]),
    "no data": (["--data="], ["--data is missing"]),
    "no teacher": (["--dino="], ["--dino", "--from_npy"]),
    "two teachers": (["--from_npy=a.npy"], ["--dino", "--from_npy"]),
    "no such folder": (["--data=folder:/no/such"], ["/no/such"]),
    "no such network": (["--dino=/no/such"], ["/no/such holds no config.json"]),
    "no grid": (["--grid=x"], ["--grid=x: give ROWS,COLUMNS"]),
    "a grid that is missing": (["--grid="], ["--grid is missing"]),
    "no size": (["--size=8,8,8"], ["--size=8,8,8: give one number"]),
    "a grid for an array": (["--dino=", "--from_npy=a.npy", "--grid=4"], ["--grid: of --dino"]),
    "no array": (["--dino=", "--grid=", "--from_npy=/no/such.npy"], ["/no/such.npy cannot be read"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(run, folder, of_dino, tmp_path, case):
    extra, words = MISTAKES[case]
    assert_fails(run("features", *flags(folder, tmp_path / "f", *of_dino), *extra), *words)
    assert not any(tmp_path.iterdir())

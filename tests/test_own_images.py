"""Images of one's own, from files to samples: rectangles, some classes, tfds."""

import json

import numpy as np
import pytest
from commands import TINY, assert_fails, assert_works, run_alone
from PIL import Image
from tfds_sets import prepare

HEIGHT, WIDTH = 8, 12
RECTANGLE = [f"--config.data.height={HEIGHT}", f"--config.data.width={WIDTH}", "--config.data.channels=3"]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Directories a, b and c of pictures in different sizes."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(18):
        directory = root / "abc"[i % 3]
        directory.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (8 + 3 * i, 40 - i, 3), np.uint8)
        Image.fromarray(pixels).save(directory / f"{i}.png")
    return root


def draw(run, workdir, *flags):
    """What sample.py draws of a run: uint8 images and their labels."""
    assert_works(run("sample", f"--workdir={workdir}", "--num_images=4", f"--out={workdir / 'new'}", *flags))
    drawn = np.load(workdir / "new.npz")
    return drawn["arr_0"], drawn["arr_1"]


def test_two_classes_of_a_folder_in_rectangles(run, photographs, tmp_path):
    data = [f"--config.data.source=folder:{photographs}", "--config.data.classes=c,a", *RECTANGLE]
    workdir = tmp_path / "run"
    result = run("train", *TINY, *data, f"--workdir={workdir}")
    assert_works(result)
    assert "12 images (8, 12, 3)\n" in result.out and "2 classes: c 6, a 6" in result.out
    assert json.loads((workdir / "run.json").read_text())["class_names"] == ["c", "a"]
    images, labels = draw(run, workdir, "--class_labels=a,c")
    assert images.shape == (4, HEIGHT, WIDTH, 3) and images.std() > 0
    np.testing.assert_array_equal(labels, [1, 0, 1, 0])
    other = run("train", *TINY, *data, f"--workdir={workdir}", "--config.data.classes=a,c")
    assert_fails(other, "data.classes", "the data has changed")


def test_a_workdir_among_the_images_would_be_a_class(run, photographs):
    workdir = photographs / "runs" / "mine"
    result = run("train", *TINY, f"--config.data.source=folder:{photographs}", *RECTANGLE, f"--workdir={workdir}")
    assert_fails(result, f"--workdir={workdir} is in {photographs}", "elsewhere")
    assert not workdir.parent.exists()


@pytest.mark.slow
def test_tfds_in_rectangles(tmp_path):
    prepare(tmp_path)
    # No server here, whose environment is that of its start.
    data = ["--config.data.source=tfds:animals/tame", "--config.data.split=train+test", *RECTANGLE]
    result = run_alone("train", *TINY, *data, f"--workdir={tmp_path / 'run'}", TFDS_DATA_DIR=tmp_path)
    assert_works(result)
    assert "20 images (8, 12, 3)\n" in result.out and "3 classes: " in result.out

"""speedit_jax.check_data: what it finds in a folder where all is known, and its mistakes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from commands import ONE_DEVICE, assert_fails, assert_works, run_alone
from PIL import Image
from tfds_sets import prepare


def write(path, size=(8, 8), colour=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour,) * 3).save(path, **options)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "set"
    for i in range(5):
        write(root / "cat" / f"{i}.png", size=(10 + i, 20), colour=i)
    write(root / "dog" / "a.jpg", size=(40, 30))
    write(root / "dog" / "profile.png", size=(16, 16), icc_profile=b"junk")
    (root / "dog" / "copy.png").write_bytes((root / "cat" / "0.png").read_bytes())
    (root / "dog" / "notes.txt").write_text("x")
    return root


def test_a_good_folder(run, folder, tmp_path):
    done = run("check_data", f"--source=folder:{folder}", "--size=16", f"--out={tmp_path / 'report.json'}")
    assert_works(done)
    for line in (
        f"folder:{folder}: 8 images",
        "2 classes: cat 5, dog 3",
        "height: 16 to 30 pixels, median 20",
        "width: 10 to 40 pixels, median 12.5",
        "smaller than 16x16, to be enlarged: 6",
        "kinds: 7 PNG RGB, 1 JPEG RGB",
        "groups of files that are the same to the byte: 1",
        "  cat/0.png, dog/copy.png",
        "colour profiles that cannot be used and are ignored: 1",
        "all images can be read",
    ):
        assert line in done.out.splitlines()
    assert "  dog/profile.png: " in done.out and "left out 1 .txt" in done.err
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["class_counts"] == {"cat": 5, "dog": 3} and report["left_out"] == {".txt": 1}
    assert report["duplicates"] == [["cat/0.png", "dog/copy.png"]] and report["unreadable"] == []
    assert [one["image"] for one in report["broken_profiles"]] == ["dog/profile.png"]
    assert report["width"] == {"min": 10, "median": 12.5, "max": 40} and report["smaller"] == 6


def test_what_cannot_be_read_is_listed(run, folder, tmp_path):
    whole = (folder / "dog" / "a.jpg").read_bytes()
    (folder / "dog" / "half.jpg").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((8, 8), np.float32)).save(folder / "dog" / "float.tif")
    for i in range(30):
        (folder / "cat" / f"empty{i:02d}.png").write_bytes(b"")
    done = run("check_data", f"--source=folder:{folder}", f"--out={tmp_path / 'report.json'}", "--threads=2")
    assert done.code == 1 and "Traceback" not in done.err
    assert "images that cannot be read: 32" in done.out and "all images can be read" not in done.out
    assert done.out.count("  cat/empty") == 20 and "  and 12 more\n" in done.out
    unreadable = {one["image"]: one["error"] for one in json.loads((tmp_path / "report.json").read_text())["unreadable"]}
    assert len(unreadable) == 32 and "floats" in unreadable["dog/float.tif"] and "truncated" in unreadable["dog/half.jpg"].lower()
    assert "--out=FILE lists all" in run("check_data", f"--source=folder:{folder}").out


def test_every_file_that_training_refuses_is_found(run, folder):
    """And none else: the exit codes of the check agree with what training's first epoch would meet."""
    assert run("check_data", f"--source=folder:{folder}", "--classes=cat").code == 0
    (folder / "dog" / "a.jpg").write_bytes(b"x")
    assert run("check_data", f"--source=folder:{folder}", "--classes=cat").code == 0
    assert run("check_data", f"--source=folder:{folder}", "--classes=dog").code == 1


def test_a_failure_without_a_number_is_one_too(folder):
    """Object stores' clients raise OSError with a text alone."""
    code = f"""
import runpy, sys
from speedit_jax.data.folder import FolderSource
def encoded(self, index):
    raise FileNotFoundError(f"bucket/{{index}}")
FolderSource.encoded = encoded
sys.argv = ["check_data", "--source=folder:{folder}"]
runpy.run_module("speedit_jax.check_data", run_name="__main__", alter_sys=True)
"""
    done = subprocess.run([sys.executable, "-c", code], env=ONE_DEVICE, capture_output=True, text=True)
    assert done.returncode == 1 and "images that cannot be read: 8" in done.stdout and "cat/0.png: bucket/0" in done.stdout


def test_names_of_any_bytes_are_printed(tmp_path):
    os.makedirs(os.fsencode(tmp_path) + b"/caf\xe9/\xfe")
    with open(os.fsencode(tmp_path) + b"/caf\xe9/\xfe/\xff.png", "wb") as file:
        Image.new("RGB", (8, 8)).save(file, format="PNG")
    done = run_alone("check_data", f"--source=folder:{tmp_path}", PYTHONIOENCODING="ascii")
    assert_works(done)
    assert "1 class: caf\\xe9 1" in done.out
    done = run_alone("check_data", f"--source=folder:{tmp_path}/" + os.fsdecode(b"caf\xe9"))
    assert_works(done)
    assert "1 class: \\xfe 1" in done.out


def test_sets_that_are_made_here(run):
    done = run("check_data", "--source=digits", "--split=held_out")
    assert_works(done)
    assert "355 images" in done.out and "8x8x1: no files" in done.out
    assert_works(run("check_data", "--source=synthetic"))


def test_a_tfds_set(tmp_path):
    prepare(tmp_path)
    done = run_alone("check_data", "--source=tfds:animals/tame", TFDS_DATA_DIR=tmp_path)
    assert_works(done)
    assert "14 images" in done.out and "3 classes" in done.out and "7 PNG RGB, 7 JPEG RGB" in done.out
    done = run_alone("check_data", "--source=tfds:pictures", TFDS_DATA_DIR=tmp_path)
    assert done.code == 1 and "images that cannot be read: 1\n  record " in done.out


MISTAKES = {
    "no source": ([], ["--source is missing"]),
    "latents": (["--source=latents:x"], ["speedit_jax.encode --verify --out="]),
    "no such folder": (["--source=folder:nowhere"], ["folder:nowhere", "no such directory"]),
    "no such source": (["--source=imagenet"], ["imagenet", "folder:PATH"]),
    "size": (["--source=digits", "--size=a"], ["--size=a"]),
    "three sizes": (["--source=digits", "--size=1,2,3"], ["--size=1,2,3"]),
    "background": (["--source=digits", "--background=whiet"], ["whiet", "#rrggbb"]),
    "out": (["--source=digits", "--out=/proc/report.json"], ["/proc/report.json"]),
    "report of no files": (["--source=digits", "--out=/tmp/report.json"], ["--out=/tmp/report.json", "digits", "no files"]),
    "size of no files": (["--source=synthetic", "--size=8"], ["--size=8", "synthetic", "no files"]),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(run, case):
    flags, words = MISTAKES[case]
    assert_fails(run("check_data", *flags), *words)

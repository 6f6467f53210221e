"""Images on their way to disk: whatever a kill leaves, the same command ends in the same files."""

import hashlib
import io
import json
import os
import urllib.parse
import zipfile
from pathlib import Path

import ml_collections
import numpy as np
import pytest
from PIL import Image

from speedit_jax.data.sources import open_source
from speedit_jax.errors import UserError
from speedit_jax.sampling.writer import GRID, Output, checksum, folder_names

COUNT, BATCH, SHAPE = 11, 4, (5, 6, 3)
IMAGES = np.random.default_rng(0).integers(0, 256, (12, *SHAPE), np.uint8)
LABELS = (np.arange(COUNT) % 3).astype(np.int32)
SETTINGS = {"workdir": "run", "seed": 0, "num_steps": (1, 2), "guide": {"workdir": "other", "checkpoint_step": 3}}


def make(out: Path, folders=None, count: int = COUNT, **changes) -> Output:
    settings = SETTINGS | {"png_files": folders is not None, "num_images": count} | changes
    return Output(out, settings, LABELS[:count], BATCH, folders)


def drive(output: Output, overwrite: bool = False) -> list[int]:
    """What the command does; returns the batches that it drew."""
    finished = output.claim(overwrite)
    if finished is None:
        return []
    missing = np.flatnonzero(~finished).tolist()
    for i in missing:
        output.write(i, IMAGES[i * BATCH : (i + 1) * BATCH])
    output.finish(None)
    return missing


def contents(directory: Path) -> dict[str, str]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_outputs(tmp_path):
    assert drive(make(tmp_path / "x")) == [0, 1, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.npz", "x.png"]
    whole = io.BytesIO()
    np.savez(whole, IMAGES[:COUNT], LABELS)
    assert (tmp_path / "x.npz").read_bytes() == whole.getvalue()
    assert zipfile.ZipFile(tmp_path / "x.npz").testzip() is None
    assert json.loads((tmp_path / "x.json").read_text())["num_steps"] == [1, 2]
    grid = np.asarray(Image.open(tmp_path / "x.png"))
    np.testing.assert_array_equal(grid[: 9 * SHAPE[0] : 9, : 9 * SHAPE[1] : 9], IMAGES[0])  # 48 // 5 = 9 times enlarged
    assert drive(make(tmp_path / "x")) == []  # complete


def test_what_earlier_versions_did_not_tell_of_the_network_may_be_anything(tmp_path):
    network = {"image_shape": SHAPE, "model.heads": 2}
    drive(make(tmp_path / "x"))
    assert drive(make(tmp_path / "x", network=network)) == []
    drive(make(tmp_path / "y", network=network))
    assert drive(make(tmp_path / "y", network=network | {"model.younger": 1})) == []
    with pytest.raises(UserError, match=r"network\.model\.heads was 2, now 4"):
        make(tmp_path / "y", network=network | {"model.heads": 4}).claim(False)


def test_a_grid_shows_the_first_images_of_many(tmp_path):
    count = GRID + 30
    images = np.random.default_rng(1).integers(0, 256, (count, 2, 2, 1), np.uint8)
    output = Output(tmp_path / "x", {}, np.zeros(count, np.int32), 26)
    for i in range(output.batches):
        output.claim(False)
        output.write(i, images[i * 26 : (i + 1) * 26])
    output.finish(None)
    cell = 3 * 24  # pixels and gap, enlarged
    assert Image.open(tmp_path / "x.png").size == (10 * cell - 24, 10 * cell - 24)


def test_png_files_are_a_data_source(tmp_path):
    output = make(tmp_path / "x", ("cat", "dog", "an_owl"))
    drive(output)
    config = {"source": f"folder:{tmp_path / 'x'}", "height": 5, "width": 6, "channels": 3}
    rest = {"split": "train", "classes": "", "max_broken": 0, "synthetic_size": 1, "synthetic_classes": 0}
    source = open_source(ml_collections.ConfigDict(config | rest))
    assert source.class_names == ("an_owl", "cat", "dog") and len(source) == COUNT
    for i, name in enumerate(source.files):
        number = int(Path(name).stem)
        assert Path(name).parent.name == ("cat", "dog", "an_owl")[LABELS[number]]
        np.testing.assert_array_equal(np.round((source[i]["image"] + 1) * 127.5), IMAGES[number])


class Killed(BaseException):
    pass


def kill_at(monkeypatch, n: int) -> None:
    """No operation on directories works from the n-th on."""
    count = 0

    def dying(real):
        def operation(*args, **kwargs):
            nonlocal count
            count += 1
            if count >= n:
                raise Killed
            return real(*args, **kwargs)

        return operation

    for name in ("mkdir", "rename", "replace", "rmdir", "unlink"):
        monkeypatch.setattr(os, name, dying(getattr(os, name)))


@pytest.mark.parametrize("old", [False, True], ids=["into nothing", "over other images"])
@pytest.mark.parametrize("folders", [None, ("a", "b", "c")], ids=["npz", "PNG files"])
def test_killed_anywhere_is_the_same_to_the_byte(tmp_path, folders, old):
    drive(make(tmp_path / "reference" / "x", folders))
    expected = contents(tmp_path / "reference")
    n = 0
    while True:
        n += 1
        out = tmp_path / str(n) / "x"
        if old:
            drive(make(out, seed=5))
            before = contents(out.parent)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, n)
            try:
                drive(make(out, folders), overwrite=old)
                break
            except Killed:
                pass
        if old and out.with_suffix(".json").exists():
            # What a JSON stands beside is what it says: the old images until the new ones are there.
            whole = before if json.loads(out.with_suffix(".json").read_text())["seed"] == 5 else expected
            assert whole.items() <= contents(out.parent).items()
        finished = {int(path.stem) for path in out.with_suffix(".partial").glob("*.npy")}
        complete = out.with_suffix(".json").exists() and contents(out.parent).items() >= expected.items()
        again = drive(make(out, folders), overwrite=old)
        assert contents(out.parent) == expected and not out.with_suffix(".partial").exists()
        assert again == ([] if complete else [i for i in range(3) if i not in finished])
    assert n > 10 and complete


@pytest.mark.parametrize("few", [4, 6, 8, 10])
@pytest.mark.parametrize("finished", [True, False], ids=["finished", "begun"])
@pytest.mark.parametrize("folders", [None, ("a", "b", "c")], ids=["npz", "PNG files"])
def test_grown_and_killed_anywhere_is_the_same_to_the_byte(tmp_path, folders, finished, few):
    drive(make(tmp_path / "reference" / "x", folders))
    expected = contents(tmp_path / "reference")

    def begin(out):
        first = make(out, folders, few)
        if finished:
            assert drive(first) == list(range(first.batches))
        else:
            first.claim(False)
            for i in range(first.batches):
                first.write(i, IMAGES[i * BATCH : (i + 1) * BATCH])

    begin(tmp_path / "whole" / "x")
    assert drive(make(tmp_path / "whole" / "x", folders)) == list(range(few // BATCH, 3)), "whole batches are kept"
    assert contents(tmp_path / "whole") == expected
    n = 0
    while True:
        n += 1
        out = tmp_path / str(n) / "x"
        begin(out)
        before = contents(out.parent) if finished else {}
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, n)
            try:
                drive(make(out, folders))
                break
            except Killed:
                pass
        if finished and out.with_suffix(".json").exists():
            one = json.loads(out.with_suffix(".json").read_text())["num_images"] == few
            assert (before if one else expected).items() <= contents(out.parent).items()
        drive(make(out, folders))
        assert contents(out.parent) == expected and not out.with_suffix(".partial").exists()
    assert n > 5


@pytest.mark.parametrize("stage", ["begun", "complete"])
def test_fewer_are_refused(tmp_path, stage):
    whole, few = make(tmp_path / "x"), make(tmp_path / "x", count=6)
    whole.claim(False)
    whole.write(0, IMAGES[:BATCH])
    if stage == "complete":
        drive(whole)
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"of these settings, but 11 instead of 6: take the first 6, .*--overwrite"):
        few.claim(False)
    assert contents(tmp_path) == before


def test_damaged_images_are_not_taken_over(tmp_path):
    drive(make(tmp_path / "x", count=8))
    content = bytearray((tmp_path / "x.npz").read_bytes())
    content[300] ^= 1
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.npz cannot be read as 8 images of these settings"):
        make(tmp_path / "x").claim(False)
    assert (tmp_path / "x.npz").read_bytes() == content and not (tmp_path / "x.partial").exists()


def test_latents_replace_pictures_and_their_grid(tmp_path):
    drive(make(tmp_path / "x"))
    values = np.random.default_rng(1).standard_normal((COUNT, 2, 2, 4)).astype(np.float32)
    output = Output(tmp_path / "x", {"latents": None}, LABELS, COUNT, latents=True)
    output.claim(True)
    output.write(0, values)
    output.finish(None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.latents.png", "x.npz"]
    whole = io.BytesIO()
    np.savez(whole, latents=values, labels=LABELS)
    assert (tmp_path / "x.npz").read_bytes() == whole.getvalue()


def test_each_class_has_a_directory_of_its_own():
    names = ["a/b", "a_b", "a%2Fb", "a%b", ".hidden", "..", "a b", "\u00e9", "%"]
    folders = folder_names(names)
    assert len(set(folders)) == len(names) and folders[0] == "a%2Fb"
    assert [urllib.parse.unquote(folder) for folder in folders] == names
    assert not any("/" in folder or folder.startswith(".") for folder in folders)
    assert folder_names(["crane", "dog", "crane", "crane#0"]) == ("crane%230", "dog", "crane%232", "crane#0")


@pytest.mark.parametrize("stage", ["begun", "complete"])
def test_other_settings_are_refused(tmp_path, stage):
    ours, others = make(tmp_path / "x"), make(tmp_path / "x", seed=1)
    ours.claim(False)
    ours.write(0, IMAGES[:BATCH])
    if stage == "complete":
        drive(ours)
    before = contents(tmp_path)
    with pytest.raises(
        UserError, match=r"x\.(partial|npz) holds .* made with other settings \(seed was 0, now 1\); .*--overwrite"
    ):
        others.claim(False)
    assert contents(tmp_path) == before
    assert drive(others, overwrite=True) == [0, 1, 2]
    assert json.loads((tmp_path / "x.json").read_text())["seed"] == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.json", "x.npz", "x.png"]


def test_complete_images_stand_beside_the_beginning_of_others(tmp_path):
    """Of --overwrite, killed."""
    ours, others = make(tmp_path / "x"), make(tmp_path / "x", seed=1)
    drive(ours)
    others.claim(True)
    others.write(1, IMAGES[BATCH : 2 * BATCH])
    before = contents(tmp_path)
    assert drive(ours) == [] and contents(tmp_path) == before
    assert drive(others, overwrite=True) == [0, 2]


def test_the_run_may_have_moved(tmp_path):
    drive(make(tmp_path / "x"))
    assert drive(make(tmp_path / "x", workdir="elsewhere", guide={"workdir": "there", "checkpoint_step": 3})) == []


@pytest.mark.parametrize("name", ["x.npz", "x.png", "x.json", "x.partial/a.txt", "x/a.txt"])
def test_files_of_others_are_not_replaced(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(UserError, match=r"another --out"):
        make(tmp_path / "x", ("a", "b", "c")).claim(False)
    assert contents(tmp_path) == {name: hashlib.sha256(b"mine").hexdigest()}


def test_the_checksum_sees_every_number():
    tree = {"a": np.ones((2, 3), np.float32), "b": {"c": np.float32(2)}}
    assert checksum(tree) == checksum({"b": {"c": np.float32(2)}, "a": np.ones((2, 3), np.float32)})
    other = {"a": np.ones((2, 3), np.float32), "b": {"c": np.float32(2 + 2**-22)}}
    assert checksum(tree) != checksum(other)

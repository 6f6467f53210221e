"""Atomic writes."""

import hashlib
import json
import os
from pathlib import Path

import pytest

from speedit_jax import storage
from speedit_jax.errors import UserError


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("shared", [False, True])
def test_what_has_the_name_is_whole(tmp_path, shared):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with storage.replacing(path, shared) as partial:
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("make", [lambda p: p.write_text("half"), lambda p: p.mkdir()])
def test_a_failure_leaves_what_was_there(tmp_path, make):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ValueError, match="no"), storage.replacing(path) as partial:
        make(partial)
        raise ValueError("no")
    assert path.read_text() == "old" and names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("make", [lambda p: p.write_text("half"), lambda p: (p / "b").mkdir(parents=True)])
def test_what_a_kill_left_is_replaced(tmp_path, make):
    make(tmp_path / "a.txt.partial")
    storage.write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new" and names(tmp_path) == ["a.txt"]


def test_two_writers_of_one_file(tmp_path):
    path = tmp_path / "a.txt"
    with storage.replacing(path, shared=True) as one, storage.replacing(path, shared=True) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one" and names(tmp_path) == ["a.txt"]


def test_json_and_checksum(tmp_path):
    path = tmp_path / "a.json"
    storage.write_json(path, {"é": [1, None]})
    assert json.loads(path.read_text()) == {"é": [1, None]}
    assert storage.sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_new_file_gets_its_directory(tmp_path):
    storage.write_new(tmp_path / "a" / "b", lambda partial: partial.mkdir())
    assert (tmp_path / "a" / "b").is_dir()


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"^cannot write {tmp_path}/file/b: .*(Not a directory|File exists)"):
        storage.write_new(tmp_path / "file" / "b", lambda partial: partial.write_text(""))


def test_first_line():
    assert storage.first_line(ValueError("one\ntwo")) == "one"
    assert storage.first_line(ValueError()) == "ValueError"
    assert storage.first_line(ValueError("x" * 200)) == "x" * 200
    cut = storage.first_line(ValueError(f"cannot write {'x' * 300}: read-only"))
    assert len(cut) == 200
    assert cut.startswith("cannot write xx")
    assert cut.endswith("xx: read-only")


def test_what_gets_the_name_is_on_the_disk_before_and_the_name_after(tmp_path, monkeypatch):
    """The order of the system calls is what a power cut depends on."""
    done = []

    def name(descriptor):
        return os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor if isinstance(descriptor, int) else descriptor.fileno()}"))

    monkeypatch.chdir(tmp_path)
    replace = os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: done.append(name(descriptor)))
    monkeypatch.setattr(os, "replace", lambda *paths: done.append("rename") or replace(*paths))
    with storage.replacing(tmp_path / "a") as partial:
        partial.mkdir()
        (partial / "b").write_text("")
    storage.write_text(tmp_path / "c", "")
    assert done == ["a.partial/b", "a.partial", "rename", ".", "c.partial", "rename", "."]


def test_a_directory_is_no_file_to_write(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: it is a directory; choose another file"):
        storage.check_writable(tmp_path)
    storage.check_writable(tmp_path / "new" / "x.json")
    assert names(tmp_path) == ["new"] and not names(tmp_path / "new")


def test_a_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert storage.path("~/runs/x") == Path("/home/me/runs/x") and storage.path("./~runs/x") == Path("~runs/x")
    with pytest.raises(UserError, match=r"^~runs/x: there is no home directory ~runs; write ~/ for your own, or \./~runs"):
        storage.path("~runs/x")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("ftp://bucket/x", "ftp://bucket/x: unknown storage ftp://"),
        ("gs:///", "gs:///: the bucket is missing"),
        ("s3://bucket/run[1]", r"s3://bucket/run\[1\]: libraries take it for a pattern.* without \["),
        ("gs://bucket/a*/x", r"without \*"),
    ],
)
def test_what_is_no_path_in_an_object_store(path, message):
    with pytest.raises(UserError, match=message):
        storage.path(path)

"""Files in object stores that speak the protocols of Google Cloud Storage and of S3."""

import hashlib
import json

import object_stores
import pytest

from speedit_jax import object_store, storage
from speedit_jax.errors import UserError


@pytest.fixture(scope="module", params=["gcs", "s3"])
def bucket(request):
    with getattr(object_stores, request.param)() as url:
        object_store.file_system.cache_clear()
        yield url


@pytest.fixture
def place(bucket, request):
    return storage.path(f"{bucket}/{request.node.name.partition('[')[0]}")


def names(directory):
    return sorted(path.relative_to(directory).as_posix() for path in storage.files(directory))


def test_a_path_keeps_its_two_slashes(place):
    assert str(place / "a" / "b.txt").partition("://")[0] in ("gs", "s3")
    assert (place / "a" / "b.txt").parent == place / "a" and storage.absolute(place) == place


def test_a_file_is_whole_or_not_there(place):
    path = place / "a.json"
    assert not path.exists()
    storage.write_json(path, {"x": 1})
    with pytest.raises(ValueError, match="no"), storage.replacing(path) as partial:
        partial.write_text("half")
        raise ValueError("no")
    assert json.loads(path.read_text()) == {"x": 1} and names(place) == ["a.json"]


@pytest.mark.parametrize("name", ["run[1]", "run*", "run?", "run"])
def test_what_is_removed_is_no_pattern(bucket, name):
    place = storage.path(f"{bucket}/removed")
    for neighbour in ("run1", "run[1]", "run*", "run?", "run"):
        (place / neighbour / "sub").mkdir(parents=True)
        (place / neighbour / "sub" / "x").write_text("x")
    storage.remove(place / name)
    assert set(names(place)) == {f"{kept}/sub/x" for kept in {"run1", "run[1]", "run*", "run?", "run"} - {name}}


def test_what_is_moved_is_no_pattern(bucket):
    place = storage.path(f"{bucket}/moved")
    for directory in ("run1", "run[1]"):
        (place / directory / "sub").mkdir(parents=True)
        for name in ("x", "y"):
            (place / directory / "sub" / name).write_text(directory)
    storage.replace(place / "run[1]" / "sub" / "x", place / "run[1]" / "z")
    storage.move_directory(place / "run[1]", place / "run[2]", "z")
    assert names(place) == ["run1/sub/x", "run1/sub/y", "run[2]/sub/y", "run[2]/z"]
    assert {(place / "run[2]" / name).read_text() for name in ("sub/y", "z")} == {"run[1]"}


def test_what_paths_of_both_kinds_do(place, tmp_path):
    content = bytes(range(256)) * 40_000  # more than one part of an upload
    with storage.replacing(place / "d" / "big") as partial:
        partial.write_bytes(content)
    assert storage.size(place / "d" / "big") == len(content) and storage.modified(place / "d" / "big") > 1e9
    assert storage.sha256(place / "d" / "big") == hashlib.sha256(content).hexdigest()
    with (place / "d" / "big").open("rb") as file:
        file.seek(-3, 2)
        assert file.read() == content[-3:]
    with storage.replacing(place / "d2") as partial:
        (partial / "sub").mkdir(parents=True)
        (partial / "sub" / "x").write_text("x")
    assert names(place) == ["d/big", "d2/sub/x"]
    assert (storage.fetched(place / "d2") / "sub" / "x").read_text() == "x"
    storage.replace(place / "d" / "big", place / "big")
    storage.move_directory(place / "d2", place / "d3", "x")
    assert names(place) == ["big", "d3/sub/x"]
    with storage.scan(place) as entries:
        assert sorted((entry.name, entry.is_dir()) for entry in entries) == [("big", False), ("d3", True)]
    storage.remove(place / "d3")
    storage.remove(place / "d3")
    assert names(place) == ["big"]
    storage.check_writable(place / "out" / "x.json")
    assert names(place) == ["big"]


def test_an_object_that_stands_for_a_directory_is_not_in_it(place):
    for directory in (place, place / "a"):
        object_stores.make_directory(str(directory))
    storage.write_text(place / "a" / "1.txt", "x")
    for directory, inside in ((place, ["a"]), (place / "a", ["1.txt"])):
        with storage.scan(directory) as entries:
            assert [entry.name for entry in entries] == inside
    assert names(place) == ["a/1.txt"]
    assert (storage.fetched(place) / "a" / "1.txt").read_text() == "x"


def test_one_of_several_creates_a_file(place):
    storage.create(place / "lock.json", "mine")
    with pytest.raises(FileExistsError):
        storage.create(place / "lock.json", "theirs")
    assert (place / "lock.json").read_text() == "mine"
    storage.mark(place / "lock.json")
    assert (place / "lock.json").read_text() == "mine"


def test_what_grows_is_uploaded_as_it_grows(place):
    mirror = storage.Mirror(place)
    (mirror.directory / "metrics.jsonl").write_text("1\n")
    mirror.update()
    with (mirror.directory / "metrics.jsonl").open("a") as file:
        file.write("2\n")
    mirror.update(every=3600.0)
    assert (place / "metrics.jsonl").read_text() == "1\n"
    mirror.update()
    assert (place / "metrics.jsonl").read_text() == "1\n2\n" and names(place) == ["metrics.jsonl"]


def test_a_copy_of_a_file_stays_for_later_processes(place, tmp_path, monkeypatch):
    monkeypatch.setenv("SPEEDIT_CACHE", str(tmp_path))
    storage.write_text(place / "a.txt", "a")
    digest = hashlib.sha256(b"a").hexdigest()
    copy = storage.cached(place / "a.txt", digest)
    storage.remove(place / "a.txt")
    assert copy.read_text() == "a" and storage.cached(place / "a.txt", digest) == copy
    storage.write_text(place / "a.txt", "b")
    copy.unlink()
    with pytest.raises(UserError, match=r"a\.txt does not hold what was written"):
        storage.cached(place / "a.txt", digest)
    assert list(tmp_path.iterdir()) == []

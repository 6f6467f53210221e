"""Nothing wrong is accepted from damaged files, and a run goes on from the newest checkpoint that is whole."""

import json
import os
import shutil

import pytest

from benchmarks import faults
from speedit_jax import storage
from speedit_jax.errors import UserError
from speedit_jax.training import integrity, run, set_aside
from speedit_jax.training.checkpoint import Checkpoints, peek


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return faults.Subject(tmp_path_factory.mktemp("faults") / "run")


@pytest.fixture
def copy(subject, tmp_path):
    """A run of the checkpoints 1 and 2, to be damaged."""
    return shutil.copytree(subject.workdir, tmp_path / "run")


def data_file(workdir, step):
    """The largest file of arrays."""
    return max((workdir / "checkpoints" / str(step) / "state").rglob("d/*"), key=lambda path: path.stat().st_size)


def spoil(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def names(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def test_every_file_has_a_checksum(subject):
    files = {path.relative_to(subject.checkpoint).as_posix() for path in subject.checkpoint.rglob("*") if path.is_file()}
    # Orbax writes these afterwards; they hold times and nothing that is restored.
    after = {"_CHECKPOINT_METADATA", "commit_success.txt", integrity.NAME}
    assert integrity.read(subject.checkpoint).keys() == files - after
    assert integrity.damage(subject.checkpoint) is None and len(files) > 10


@pytest.mark.parametrize("how", faults.DAMAGE)
def test_nothing_wrong_is_accepted(subject, how):
    """Every file of a checkpoint in turn."""
    assert subject.restore() == "same"
    covered_files = {*integrity.read(subject.checkpoint), integrity.NAME}
    for paths in faults.kinds(subject.checkpoint).values():
        for path in paths:
            with subject.damaged(path, how):
                covered = path.relative_to(subject.checkpoint).as_posix() in covered_files
                expected = "refused" if covered and (path.name, how) != (integrity.NAME, "deleted") else "same"
                assert subject.restore() == expected, path
    assert subject.trial_of_run(how) == "mended"


def test_a_flipped_bit_was_accepted_without_checksums(subject):
    """The test above is one of something: of the arrays' bits some change a number, and nothing else tells."""
    outcomes = [subject.trial([data_file(subject.workdir, faults.NEWER)], "flipped bit") for _ in range(8)]
    assert {outcome for outcome, _ in outcomes} == {"refused"}
    assert "WRONG" in {outcome for _, outcome in outcomes}


def test_a_damaged_file_is_named(subject, copy):
    path = data_file(copy, 2)
    spoil(path)
    problem = rf"\({path.relative_to(copy / 'checkpoints' / '2')} does not hold what was saved\)"
    checkpoints = Checkpoints(copy)
    for read in (
        lambda: checkpoints.restore(2, subject.parts.shapes, subject.parts.shardings),
        lambda: checkpoints.restore_weights(2, "raw", subject.parts.shapes.params, subject.parts.shardings.params),
    ):
        with pytest.raises(UserError, match=rf"checkpoint {copy}/checkpoints/2 is damaged {problem}"):
            read()
    assert checkpoints.meta(2) == subject.meta, "its own file is whole"


def test_a_checkpoint_without_checksums_is_read_as_before(subject, copy):
    (copy / "checkpoints" / "2" / integrity.NAME).unlink()
    assert set_aside.set_aside_damaged(copy) == []
    assert Checkpoints(copy).restore(2, subject.parts.shapes, subject.parts.shardings).step is not None


def test_the_newest_whole_one_is_gone_on_from(copy):
    spoil(data_file(copy, 2))
    with pytest.raises(UserError, match="--strict"):
        set_aside.set_aside_damaged(copy, strict=True)
    assert names(copy) == ["1", "2"]
    (line,) = set_aside.set_aside_damaged(copy)
    assert line.startswith(f"checkpoint {copy}/checkpoints/2 is damaged (state/") and line.endswith("set aside as damaged-2")
    assert names(copy) == ["1", "damaged-2"]
    assert set_aside.set_aside_damaged(copy) == []
    checkpoints = Checkpoints(copy, create=True, keep_last=2)
    assert checkpoints.latest() == 1 and peek(copy)[0] == 1
    checkpoints.close()
    assert names(copy) == ["1", "damaged-2"], "orbax leaves it alone"


def test_the_same_step_can_be_set_aside_again(copy):
    shutil.copytree(copy / "checkpoints" / "2", copy / "checkpoints" / "damaged-2")
    spoil(data_file(copy, 2))
    set_aside.set_aside_damaged(copy)
    assert names(copy) == ["1", "damaged-2", "damaged-2-2"]


def test_older_ones_are_set_aside_where_their_json_is_damaged(copy):
    spoil(data_file(copy, 1))
    assert set_aside.set_aside_damaged(copy) == [], "a run that goes on does not read its arrays"
    spoil(copy / "checkpoints" / "1" / integrity.META)
    assert len(set_aside.set_aside_damaged(copy)) == 1
    assert names(copy) == ["2", "damaged-1"]


def test_nothing_is_set_aside_where_no_checkpoint_is_whole(copy):
    for step in (1, 2):
        spoil(data_file(copy, step))
    with pytest.raises(UserError, match=r"and no checkpoint in .* is whole; start again in another --workdir"):
        set_aside.set_aside_damaged(copy)
    assert names(copy) == ["1", "2"]


def test_a_kill_before_the_rename_changes_nothing_and_one_after_it_nothing_more(copy, monkeypatch):
    spoil(data_file(copy, 2))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(os, "rename", killed)
        set_aside.set_aside_damaged(copy)
    assert names(copy) == ["1", "2"]
    set_aside.set_aside_damaged(copy)
    assert names(copy) == ["1", "damaged-2"]


def test_a_checkpoint_is_not_there_before_its_checksums_are(subject, copy, monkeypatch):
    """Whatever happens to a save between its files and their checksums."""

    def fails(*_):
        raise OSError("no")

    state = Checkpoints(copy).restore(2, subject.parts.shapes, subject.parts.shardings)
    checkpoints = Checkpoints(copy, create=True, keep_last=3)
    with monkeypatch.context() as patched:
        patched.setattr(storage, "checksum", fails)
        checkpoints.save(3, state, subject.meta)
        with pytest.raises(UserError, match="could not write a checkpoint"):
            checkpoints.wait()
    assert peek(copy)[0] == 2 and names(copy) == ["1", "2"]


def test_a_damaged_run_json_without_checkpoints_is_named(subject, tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match=r"run\.json is damaged, and no checkpoint holds a copy"):
        run.claim(tmp_path, subject.meta)


def test_a_run_json_of_earlier_versions_is_read(subject, copy):
    (copy / "run.json").write_text(json.dumps(subject.meta))
    assert run.read_run(copy / "run.json") == subject.meta
    assert run.claim(copy, subject.meta, step=2) == (subject.meta, [])


def test_a_damaged_run_json_is_written_again(subject, copy):
    path = copy / "run.json"
    before = path.read_bytes()
    # A setting is another, and it is JSON still.
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1', 1))
    meta, lines = run.claim(copy, subject.meta, step=2)
    assert meta == subject.meta and lines == ["run.json was missing or damaged; it is written again from the newest checkpoint"]
    assert path.read_bytes() == before

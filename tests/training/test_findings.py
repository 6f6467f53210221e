"""What verify finds; tests/test_verify.py has the command."""

import shutil

import pytest

from speedit_jax import storage
from speedit_jax.training import integrity
from speedit_jax.training.findings import check_checkpoint


@pytest.mark.parametrize("look", [1, 2])
def test_a_checkpoint_that_is_removed_meanwhile(trained, tmp_path, monkeypatch, look):
    """By the run that goes on there, after verify has looked at it once or twice."""
    workdir, looks, read = shutil.copytree(trained, tmp_path / "run"), [], integrity.read

    def watched(checkpoint):
        checksums = read(checkpoint)
        looks.append(checkpoint)
        if len(looks) == look:
            checkpoint.rename(tmp_path / "removed")
        return checksums

    monkeypatch.setattr(integrity, "read", watched)
    found = check_checkpoint(workdir, "6")
    assert (found.part, found.state) == ("checkpoints/6", "removed")


def test_a_checkpoint_whose_files_are_being_removed(trained, tmp_path, monkeypatch):
    """In an object store, which removes them one by one: commit_success.txt first."""
    workdir, read = shutil.copytree(trained, tmp_path / "run"), integrity.read
    (workdir / "checkpoints" / "6" / integrity.COMMIT).touch()

    def watched(checkpoint):
        checksums = read(checkpoint)
        for name in (integrity.COMMIT, integrity.META):
            (checkpoint / name).unlink(missing_ok=True)
        return checksums

    assert check_checkpoint(workdir, "6").state == "whole"
    monkeypatch.setattr(storage, "is_remote", lambda path: True)
    monkeypatch.setattr(integrity, "read", watched)
    assert check_checkpoint(workdir, "6").state == "removed"

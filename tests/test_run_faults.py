"""Faults that a run meets while it trains: one line, the exit code that docs/training.md states, and what was saved stays.

benchmarks/fault_runs.py brings them about at random moments and compares the runs that go on.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from commands import ONE_DEVICE, ROOT, TINY, assert_works, checksums, own_lines
from PIL import Image

from speedit_jax.peers import LOST
from speedit_jax.training.checkpoint import peek

LONGER = ["--config.optim.schedule=constant", "--continue_with_changes", "--config.training.num_steps=9"]  # than TINY
LONG = ["--config.optim.schedule=constant", "--config.training.num_steps=1000000"]

PROCESSES: list[subprocess.Popen] = []  # of the trainers that the test has started


class Trainer:
    """A run without an end; the test makes one."""

    def __init__(self, workdir, *flags):
        self.log = workdir.with_name("log")
        argv = [sys.executable, "-m", "speedit_jax.train", *TINY, *LONG, f"--workdir={workdir}", *flags]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(argv, cwd=ROOT, env=ONE_DEVICE, stdout=log, stderr=subprocess.STDOUT)
        PROCESSES.append(self.process)
        while self.process.poll() is None and not peek(workdir):
            time.sleep(0.05)
        assert self.process.poll() is None, self.log.read_text()

    def end(self) -> tuple[int, list[str]]:
        """(exit code, what it said below the progress bar)."""
        try:
            code = self.process.wait(timeout=300)
        finally:
            self.process.kill()
            self.process.wait()
        said = own_lines(self.log.read_text())
        assert "Traceback" not in said and "never awaited" not in said
        return code, [line for line in re.split(r"[\r\n]", said.rpartition("step/s")[2]) if line.strip()]


@pytest.fixture(autouse=True)
def ended():
    """A test that fails leaves no run behind."""
    yield
    while PROCESSES:
        process = PROCESSES.pop()
        process.kill()
        process.wait()


@pytest.fixture
def digits(tmp_path):
    """A data set of 8x8 images of two classes."""
    rng = np.random.default_rng(0)
    for i in range(32):
        path = tmp_path / "digits" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(path)
    return tmp_path / "digits"


def test_a_workdir_that_turns_read_only(tmp_path):
    """Of the threads that wait for what cannot be written, none keeps the process."""
    workdir = tmp_path / "run"
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    trainer = Trainer(workdir)
    saved, _ = peek(workdir)
    # The run's open files keep the first name's rights; all that it opens from here on is below the second.
    subprocess.run(["mount", "--bind", workdir, workdir], check=True)
    try:
        # It cannot be while a file below the second name is being written.
        while subprocess.run(["mount", "-o", "remount,ro,bind", workdir], capture_output=True).returncode:
            time.sleep(0.02)
        code, said = trainer.end()
    finally:
        subprocess.run(["umount", "--lazy", workdir], check=True)
    assert code == 1 and said[-1].startswith("error: ") and str(workdir) in said[-1], said
    assert "Read-only file system" in said[-1], said
    assert peek(workdir)[0] >= saved


def without_rights(argv: list[str]) -> tuple[int, list[str]]:
    """(exit code, lines) of a command as a user whom the rights of files bind, which they do not bind root."""
    drop = [] if os.geteuid() else ["setpriv", "--bounding-set=-all", "--inh-caps=-all"]
    if drop and not shutil.which("setpriv"):
        pytest.skip("needs setpriv, of util-linux, or a user other than root")
    done = subprocess.run([*drop, sys.executable, *argv], cwd=ROOT, env=ONE_DEVICE, capture_output=True, text=True, timeout=300)
    return done.returncode, own_lines(done.stdout + done.stderr).splitlines()


def test_a_checkpoint_that_this_user_may_not_read_is_not_damaged(trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    before = sorted(path.name for path in (workdir / "checkpoints").iterdir())
    file = workdir / "checkpoints" / "6" / "state" / "_METADATA"
    file.chmod(0)
    code, said = without_rights(["-m", "speedit_jax.train", *TINY, *LONGER, f"--workdir={workdir}"])
    assert code == 1 and said[-1].startswith(f"error: {file}: Permission denied; "), said
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == before


def test_a_workdir_that_this_user_may_not_write(trained, tmp_path):
    workdir = shutil.copytree(trained, tmp_path / "run")
    for path in (*workdir.rglob("*"), workdir):
        path.chmod(path.stat().st_mode & 0o555)
        if not os.geteuid():
            os.chown(path, 65534, 65534)
    before = checksums(workdir)
    code, said = without_rights(["-m", "speedit_jax.train", *TINY, *LONGER, f"--workdir={workdir}"])
    assert (code, said) == (1, [f"error: cannot write to --workdir={workdir}: Permission denied"])
    assert checksums(workdir) == before


def test_a_data_source_that_never_answers(tmp_path, digits):
    trainer = Trainer(
        tmp_path / "run", f"--config.data.source=folder:{digits}", "--config.training.hang_after=20"
    )  # compiling takes less
    for path in list(digits.glob("*/*.png")):
        path.unlink()
        os.mkfifo(path)  # nobody writes to it
    code, said = trainer.end()
    assert code == LOST and peek(tmp_path / "run")
    assert any("in read_image" in line for line in said), "where it hangs"
    assert said[-1].startswith("error: nothing has happened for ") and "while waiting for data" in said[-1]


@pytest.mark.parametrize("every", [1, 3])
def test_data_that_vanish(tmp_path, digits, every):
    """With every step saved there is nothing to save any more."""
    trainer = Trainer(tmp_path / "run", f"--config.data.source=folder:{digits}", f"--config.checkpoint.every={every}")
    digits.rename(tmp_path / "away")
    code, said = trainer.end()
    saved = re.fullmatch(r"An error ends the run; step (\d+) is saved.", said[-2])
    assert code == 1 and saved and peek(tmp_path / "run")[0] == int(saved[1]), said
    assert said[-1].startswith(f"error: cannot read the image {digits}/") and "No such file or directory" in said[-1]


@pytest.mark.parametrize("every", [3, 6])
def test_the_grid_of_a_step_that_an_error_ended_is_drawn_at_the_next_start(run, tmp_path, every):
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "samples").touch()  # where a directory has to be
    train = ("train", *TINY, f"--workdir={workdir}", "--config.training.num_steps=6", f"--config.training.sample_every={every}")
    result = run(*train)
    assert result.code == 1 and f"An error ends the run; step {every} is saved." in result.out, result
    (workdir / "samples").unlink()
    assert_works(run(*train))
    assert sorted(path.name for path in (workdir / "samples").iterdir()) == [f"step_{n:07d}.png" for n in range(every, 7, every)]


def test_a_file_of_the_run_that_cannot_be_written_at_the_start(run, tmp_path):
    (tmp_path / "run" / "environment.json" / "of another").mkdir(parents=True)
    result = run("train", *TINY, f"--workdir={tmp_path / 'run'}")
    last = re.split(r"[\r\n]", result.err.strip())[-1]  # also below the progress bar
    assert result.code == 1 and last.startswith("error: ") and "environment.json" in last, result
    assert "Traceback" not in result.err


def test_reading_beside_training(run, tmp_path):
    """Each command sees a whole checkpoint, or is told that its own was removed meanwhile; training notices nothing."""
    workdir = tmp_path / "run"
    trainer = Trainer(workdir, "--config.checkpoint.every=40", "--config.checkpoint.keep_last=3")
    for i in range(3):
        result = run("sample", f"--workdir={workdir}", "--num_images=2", f"--out={tmp_path / str(i)}")
        if result.code:
            assert "was removed by the run that goes on there" in result.err, result
    verified = run("verify", f"--workdir={workdir}")
    assert "damaged" not in verified.out and "Traceback" not in verified.err, verified
    assert_works(run("report", f"--workdir={workdir}", f"--out={tmp_path / 'page.html'}"))
    assert trainer.process.poll() is None
    trainer.process.send_signal(signal.SIGTERM)
    code, said = trainer.end()
    assert code == 130 and "everything is saved" in said[-1], said
    assert "whole" in run("verify", f"--workdir={workdir}").out

"""Going on after an error, with other settings, and beside another start: the commands as a user meets them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from commands import ONE_DEVICE, ROOT, TINY, assert_fails, assert_works
from PIL import Image

from speedit_jax.data import loader
from speedit_jax.data.sources import open_source
from speedit_jax.training.checkpoint import Checkpoints, peek

CONSTANT = ["--config.optim.schedule=constant"]
WORD = "--continue_with_changes"
BATCH = 16  # of TINY


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """160 grey images of two classes: ten batches an epoch."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(160):
        path = folder / "ab"[number % 2] / f"{number:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), np.uint8)).save(path)
    return folder


def of(folder) -> str:
    return f"--config.data.source=folder:{folder}"


def steps(workdir: Path) -> list[str]:
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def weights(workdir: Path) -> dict[str, np.ndarray]:
    """Of the newest checkpoint: raw and averaged."""
    checkpoints = Checkpoints(workdir)
    state = checkpoints._manager.restore(checkpoints.latest())["state"]
    return {item: state[item] for item in ("params", "ema")}


def first_in_batch(folder: Path, number: int) -> Path:
    """A file that the training of TINY meets in batch `number` (from 0), and in none before."""
    source = open_source(tiny.make_config(data__source=f"folder:{folder}").data)
    options = {"seed": 0, "batch_size": BATCH, "rows": np.arange(BATCH), "first_step": 0, "num_steps": number + 1}
    wanted = list(loader.batches(source, **options))[number]["image"][0]
    (index,) = (i for i in range(len(source)) if np.array_equal(source[i]["image"], wanted))
    return folder / source.files[index]


def failed(result, *words):
    """One line on stderr besides the progress bar, exit code 1, no traceback."""
    assert result.code == 1, result
    said = result.out + result.err
    assert "Traceback" not in said and "Event loop" not in said and "Exception ignored" not in said, result
    errors = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and result.err.splitlines()[-1] == errors[0], result
    for word in words:
        assert word in errors[0], result


def test_a_truncated_file_loses_no_step_and_mended_data_go_on(run, images, tmp_path):
    folder, workdir = tmp_path / "images", tmp_path / "run"
    shutil.copytree(images, folder)
    broken = first_in_batch(folder, 4)
    whole = broken.read_bytes()
    broken.write_bytes(whole[:60])
    command = ["train", *TINY, *CONSTANT, of(folder), f"--workdir={workdir}", "--config.training.log_every=3"]
    result = run(*command)
    failed(result, f"cannot read the image {broken}", WORD)
    assert "step 4 is saved" in result.out
    assert steps(workdir) == ["3", "4"], "and nothing half written"
    assert [json.loads(line)["step"] for line in (workdir / "metrics.jsonl").read_text().splitlines()] == [3]
    assert_works(run("sample", f"--workdir={workdir}", "--num_images=2", f"--out={tmp_path / 'new'}"))

    # Again: nothing new is learned, and what is saved stays.
    failed(run(*command), f"cannot read the image {broken}")
    assert steps(workdir) == ["3", "4"]

    broken.write_bytes(whole)
    assert_fails(run(*command), "the data has changed", WORD, "from step 4", f"--config.init_from={workdir}")
    result = run(*command, WORD)
    assert_works(result)
    assert "changed from step 4 on: the data has changed" in result.out
    [change] = json.loads((workdir / "run.json").read_text())["changes"]
    assert list(change) == ["step", "data"] and change["step"] == 4
    assert Checkpoints(workdir).meta(6)["changes"] == [change]
    assert "complete" in run(*command).out, "a later start needs no word"

    assert_works(run("sample", f"--workdir={workdir}", "--num_images=2", f"--out={tmp_path / 'newer'}"))
    assert_works(run("report", f"--workdir={workdir}"))
    assert "changed at step 4" in (workdir / "report.html").read_text()


def test_files_that_may_be_broken_need_no_word(run, images, tmp_path):
    folder, workdir = tmp_path / "images", tmp_path / "run"
    shutil.copytree(images, folder)
    broken = first_in_batch(folder, 2)
    broken.write_bytes(broken.read_bytes()[:60])
    command = ["train", *TINY, of(folder), f"--workdir={workdir}"]
    failed(run(*command), f"cannot read the image {broken}")
    assert steps(workdir) == ["2"]
    result = run(*command, "--config.data.max_broken=1")
    assert result.code == 0 and "Resuming from the checkpoint of step 2" in result.out, result


def test_an_error_in_writing_saves_the_step(run, tmp_path):
    """A file is where the directory of grids should be."""
    tmp_path.joinpath("run").mkdir()
    (tmp_path / "run" / "samples").write_text("mine")
    result = run("train", *TINY, f"--workdir={tmp_path / 'run'}", "--config.training.sample_every=2")
    failed(result, f"{tmp_path}/run/samples", "run the same command again")
    assert steps(tmp_path / "run") == ["2"] and "step 2 is saved" in result.out


def test_what_changes_rounding_only(run, images, tmp_path):
    """After ten steps the data move, the batch is split and layers are computed again: as if nothing had happened."""
    here, moved = tmp_path / "here", tmp_path / "moved"
    shutil.copytree(images, here)
    command = ["train", *TINY, *CONSTANT, "--config.training.ema_decay=0.9"]
    assert_works(run(*command, of(here), f"--workdir={tmp_path / 'whole'}", "--config.training.num_steps=20"))
    assert_works(run(*command, of(here), f"--workdir={tmp_path / 'run'}", "--config.training.num_steps=10"))
    here.rename(moved)
    others = [of(f"{moved}/"), "--config.training.num_steps=20", "--config.training.accumulation=2", "--config.model.remat=lean"]
    result = run(*command, *others, f"--workdir={tmp_path / 'run'}")
    assert_works(result)
    assert "the same to rounding: model.remat was 'none', now 'lean'; training.accumulation was 1, now 2" in result.out
    assert "Resuming from the checkpoint of step 10" in result.out
    found, expected = weights(tmp_path / "run"), weights(tmp_path / "whole")
    for state in (*found.values(), *expected.values()):
        # Softmax does not see the bias of keys (layer, [q, k, v], ...): its gradient is rounding alone, which Adam makes large.
        state["blocks"]["attention"]["qkv"]["bias"] = state["blocks"]["attention"]["qkv"]["bias"][:, ::2]
    largest = jax.tree.map(lambda a, b: np.abs(a - b).max(), found, expected)
    # Weights are of the order of 1, steps of 2e-3; the sum of two halves rounds otherwise than the whole.
    assert max(jax.tree.leaves(largest)) < 1e-6, largest


def test_a_learning_rate_that_changes(run, tmp_path):
    command = ["train", *TINY, f"--workdir={tmp_path / 'run'}"]
    assert_works(run(*command, "--config.training.num_steps=4"))
    longer = ["--config.training.num_steps=8", "--config.optim.learning_rate=1e-3", "--config.optim.weight_decay=0.1"]
    assert_fails(run(*command, *longer), "training.num_steps was 4, now 8", WORD)
    result = run(*command, *longer, WORD)
    assert_works(result)
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # Half way through the cosine of the new settings: warmed up for 2 of 8 steps; `learning_rate` is that of the step itself.
    rate = 1e-3 * (1 + np.cos(np.pi * (5 - 2) / 6)) / 2
    assert records[-2]["step"] == 6 and records[-2]["learning_rate"] == pytest.approx(rate, rel=1e-5)


def test_a_state_that_does_not_fit_changes_nothing(run, tmp_path):
    workdir = tmp_path / "run"
    command = ["train", *TINY, *CONSTANT, f"--workdir={workdir}"]
    assert_works(run(*command))
    before = (workdir / "run.json").read_bytes()
    others = ["--config.training.num_steps=9", "--config.timesteps.strategy=loss_second_moment", WORD]
    assert_fails(run(*command, *others), "now 'loss_second_moment'", "its state does not fit these", "--config.init_from")
    assert_fails(run(*command, "--config.optim.clip_norm=0.0", WORD), "optim.clip_norm was 1.0, now 0.0", "--config.init_from")
    assert (workdir / "run.json").read_bytes() == before and not (workdir / "lock.json").exists()


def test_a_run_older_than_the_decay_mask_goes_on_as_it_was(run, tmp_path):
    """Both runs decay all parameters; one has lost the key, as runs before it had none, and is told no mask."""
    decay = [*CONSTANT, "--config.optim.weight_decay=0.1"]
    for name in ("old", "new"):
        flags = [*TINY, *decay, "--config.optim.decay_mask=all", f"--workdir={tmp_path / name}"]
        assert_works(run("train", *flags))
    for path in (tmp_path / "old" / "run.json", *(tmp_path / "old" / "checkpoints").glob("*/meta/metadata")):
        meta = json.loads(path.read_text())
        del meta["config"]["optim"]["decay_mask"]
        meta.pop("checksum", None)
        path.write_text(json.dumps(meta))
    for path in (tmp_path / "old" / "checkpoints").glob("*/checksums.json"):
        path.unlink()  # neither had those
    longer = "--config.training.num_steps=9"
    result = run("train", *TINY, *decay, f"--workdir={tmp_path / 'old'}", longer)
    assert_works(result)
    assert "decay      0.1, all parameters" in result.out and "Resuming from the checkpoint of step 6" in result.out
    assert_works(run("train", *TINY, *decay, "--config.optim.decay_mask=all", f"--workdir={tmp_path / 'new'}", longer))
    tiny.assert_same(weights(tmp_path / "old"), weights(tmp_path / "new"))


def test_gradients_that_are_not_finite(run, tmp_path):
    """A learning rate that throws the weights to infinity; a lower one goes on from before, as the message says."""
    workdir = tmp_path / "run"
    command = ["train", *TINY, *CONSTANT, f"--workdir={workdir}", "--config.checkpoint.every=100"]
    limit = ["--config.training.max_skipped_in_a_row=3", "--config.training.log_every=1", "--config.training.num_steps=40"]
    assert_works(run(*command))
    result = run(*command, *limit, "--config.optim.learning_rate=1e30", WORD)
    failed(result, "gradients were not finite", "though the batches were", "lower optim.learning_rate", WORD)
    assert "warning: 1 step was skipped because the gradient was not finite" in result.out + result.err
    assert "skipped=" in result.err and "is saved" in result.out
    first = int(re.search(r"remove the checkpoints from step (\d+) on", result.err)[1])
    for step in steps(workdir):
        if int(step) >= first:
            shutil.rmtree(workdir / "checkpoints" / step)
    assert_works(run(*command, "--config.training.num_steps=12", "--config.optim.learning_rate=1e-3", WORD))
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 12 and records[-1]["skipped"] == 0


def test_two_starts_in_one_workdir(run, tmp_path):
    """The second is refused while the first trains, reading is not; after kill -9 the next start goes on at once."""
    workdir = tmp_path / "run"
    flags = [*TINY, *CONSTANT, f"--workdir={workdir}"]
    argv = [sys.executable, "-m", "speedit_jax.train", *flags, "--config.training.num_steps=100000"]
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(argv, cwd=ROOT, env=ONE_DEVICE, stdout=log, stderr=subprocess.STDOUT)
    try:
        while first.poll() is None and not peek(workdir):
            time.sleep(0.05)
        assert first.poll() is None, (tmp_path / "log").read_text()
        os.kill(first.pid, signal.SIGSTOP)  # so that the checkpoints stay while they are read
        result = run("train", *flags)
        assert_fails(result, f"process {first.pid}", str(workdir), "--workdir")
        assert_works(run("sample", f"--workdir={workdir}", "--num_images=2", f"--out={tmp_path / 'new'}"))
        assert_works(run("report", f"--workdir={workdir}", f"--out={tmp_path / 'page.html'}"))
        saved, _ = peek(workdir)
    finally:
        first.kill()
        first.wait()
    assert (workdir / "lock.json").exists()
    result = run("train", *flags, f"--config.training.num_steps={saved + 3}")
    assert_works(result)
    assert "Resuming from the checkpoint of step" in result.out and not (workdir / "lock.json").exists()

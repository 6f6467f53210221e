"""train as a user meets it: one readable line for every mistake, and what a run leaves."""

import json
import os
import shutil

import numpy as np
import pytest
from commands import EIGHT_DEVICES, TINY, assert_fails, assert_works, checksums

BAD_TRAIN_FLAGS = {
    "typo in a key": (["--config.model.widht=16"], ["widht", 'Did you mean "width"']),
    "not a number": (["--config.training.num_steps=abc"], ["config.training.num_steps", "abc"]),
    "not an integer": (["--config.training.batch_size=1.5"], ["config.training.batch_size", "1.5"]),
    "not a boolean": (["--config.data.flip=maybe"], ["config.data.flip", "maybe"]),
    "no value": (["--config.training.batch_size"], ["config.training.batch_size"]),
    "a section for a value": (["--config.model=3"], ["config.model"]),
    "a key below a value": (["--config.model.name.x=1"], ["--config.KEY", "below a value"]),
    "argument that is no flag": (["extra"], ["extra"]),
    "unknown strategy": (["--config.timesteps.strategy=foo"], ["timesteps.strategy", "foo", "speed_cvpr25"]),
    "unknown model": (["--config.model.name=DiT-Q/2"], ["model.name", "DiT-Q/2", "XL"]),
    "unknown schedule": (["--config.diffusion.schedule=foo"], ["diffusion.schedule", "foo", "linear"]),
    "unknown prediction": (["--config.diffusion.prediction=eps"], ["diffusion.prediction", "eps", "epsilon, x0, v"]),
    "unknown loss": (["--config.diffusion.loss=l2"], ["diffusion.loss", "l2", "rescaled_kl"]),
    "bound of a flow": (["--config.diffusion.loss=kl", "--config.diffusion.path=gvp"], ["diffusion.loss=kl", "gvp", "use mse"]),
    "steps that are none": (["--config.sampling.num_steps=fast", "--config.training.sample_every=3"], ["fast", "ddim50"]),
    "dual of losses": (["--config.timesteps.strategy=clts", "--config.timesteps.dual=true"], ["timesteps.dual", "clts"]),
    "unknown learning rate": (["--config.optim.schedule=foo"], ["optim.schedule", "foo", "cosine"]),
    "unknown sampler": (["--config.sampling.sampler=foo", "--config.training.sample_every=3"], ["sampler", "foo", "ddim"]),
    "unknown best": (["--config.evaluation.best=foo", "--config.evaluation.every=3"], ["evaluation.best=foo", "fid"]),
    "unknown source": (["--config.data.source=foo"], ["data.source", "foo", "digits"]),
    "folder that is not there": (["--config.data.source=folder:/no/such"], ["data.source", "/no/such"]),
    "workdir that orbax does not read": (["--workdir=/dev/null/run[1]"], ["--workdir", "a path with [ could not be read back"]),
    "workdir that cannot be": (["--workdir=/dev/null/run"], ["--workdir", "/dev/null/run"]),
}


@pytest.mark.parametrize("case", BAD_TRAIN_FLAGS)
def test_a_mistake_in_training_is_one_line_and_writes_nothing(run, tmp_path, case):
    flags, words = BAD_TRAIN_FLAGS[case]
    assert_fails(run("train", *TINY, f"--workdir={tmp_path / 'run'}", *flags), *words)
    assert not any(tmp_path.iterdir())


BAD_NUMBERS = {
    "seed": -1,
    "data.threads": -1,
    "data.height": 0,
    "optim.learning_rate": -1.0,
    "optim.b1": 2.0,
    "optim.warmup_steps": -1,
    "training.num_steps": 0,
    "training.sample_every": -1,
    "training.max_skipped_in_a_row": 0,
    "checkpoint.keep_every": -1,
    "sampling.grid_images": 0,
    "evaluation.num_images": 1,
}


@pytest.mark.parametrize("name", BAD_NUMBERS)
def test_a_number_out_of_range_is_one_line_and_writes_nothing(run, tmp_path, name):
    flags = ["--config.training.sample_every=3", f"--config.{name}={BAD_NUMBERS[name]}"]
    assert_fails(run("train", *TINY, f"--workdir={tmp_path / 'run'}", *flags), f"{name}={BAD_NUMBERS[name]}")
    assert not any(tmp_path.iterdir())


def test_an_empty_synthetic_set(run, tmp_path):
    flags = ["--config=configs/base.py", f"--workdir={tmp_path / 'run'}"]
    assert_fails(run("train", *flags, "--config.data.synthetic_size=0"), "data.synthetic_size=0")
    assert not any(tmp_path.iterdir())


def test_one_of_several_processes_without_the_others(run, tmp_path):
    flags = [*TINY, f"--workdir={tmp_path / 'run'}", "--multihost"]
    assert_fails(run("train", *flags), "--multihost", "JAX_COORDINATOR_ADDRESS")


def test_a_dry_run_says_what_it_would_take_and_writes_nothing(run, tmp_path):
    result = run("train", *TINY, f"--workdir={tmp_path / 'run'}", "--dry_run", xla_flags=EIGHT_DEVICES)
    assert_works(result)
    for words in ("attention/qkv/kernel", "temporaries", "MiB a device", "all-reduce", "GFLOP"):
        assert words in result.out
    assert not any(tmp_path.iterdir())


def test_a_profile_of_some_steps(run, tmp_path):
    flags = [*TINY, f"--workdir={tmp_path}", "--config.training.profile_at=2", "--config.training.profile_steps=2"]
    assert_works(run("train", *flags))
    assert [path.stat().st_size > 10_000 for path in tmp_path.glob("tensorboard/plugins/profile/*/*.xplane.pb")] == [True]
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 <= last["time_waiting_for_data"] <= last["time_per_step"] and last["time_paused"] > 0


BAD_MESHES = {
    "batch that does not divide": (["--config.training.batch_size=63"], ["training.batch_size=63", "8 devices"]),
    "mesh that does not fit": (["--config.mesh.data=3"], ["mesh.data=3", "8 devices"]),
    "two axes that take the rest": (["--config.mesh.fsdp=-1"], ["mesh.fsdp=-1"]),
    "heads that do not divide": (["--config.mesh.tensor=4"], ["mesh.tensor=4", "2 heads"]),
}


@pytest.mark.parametrize("case", BAD_MESHES)
def test_a_mistake_about_eight_devices_is_one_line(run, tmp_path, case):
    flags, words = BAD_MESHES[case]
    assert_fails(run("train", *TINY, f"--workdir={tmp_path / 'run'}", *flags, xla_flags=EIGHT_DEVICES), *words)
    assert not any(tmp_path.iterdir())


def test_the_name_of_the_model_after_a_colon(run, tmp_path):
    workdir = tmp_path / "run"
    config = ["--config=configs/digits.py:DiG-tiny/2", *TINY[1:], "--config.model.remat=lean"]
    result = run("train", *config, f"--workdir={workdir}")
    assert_works(result)
    assert "DiG-tiny/2" in result.out and "remat lean" in result.out and "xla mixer" in result.out
    assert "at 16 tokens DiT is at least as fast" in result.out
    assert_works(run("sample", f"--workdir={workdir}", "--num_images=4", f"--out={tmp_path / 'new'}"))
    assert np.load(tmp_path / "new.npz")["arr_0"].shape == (4, 8, 8, 1)
    # The other backbone would be another run.
    assert_fails(run("train", *TINY, f"--workdir={workdir}"), "model.name was 'DiG-tiny/2', now 'DiT-tiny/2'")


def test_another_run_is_not_overwritten(run, trained, tmp_path):
    before = checksums(trained)
    for flags, words in (
        (["--config.seed=5"], ["seed was 0, now 5"]),
        (["--config.training.num_steps=9"], ["training.num_steps was 6, now 9"]),
        (["--config.data.source=synthetic"], ["data.source", "the data has changed"]),
    ):
        assert_fails(run("train", *TINY, *flags, f"--workdir={trained}"), "other settings", *words)
    assert checksums(trained) == before
    (tmp_path / "metrics.jsonl").write_text("mine")
    assert_fails(run("train", *TINY, f"--workdir={tmp_path}"), str(tmp_path), "metrics.jsonl", "run.json")
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_finished_run_says_so_and_changes_nothing(run, trained):
    before = checksums(trained)
    result = run("train", *TINY, f"--workdir={trained}")
    assert_works(result)
    assert "complete" in result.out and "step 6 of 6" in result.out
    assert checksums(trained) == before


def test_a_finished_run_makes_up_for_its_pages(run, trained, tmp_path):
    """As after a kill between the last save and the end, in a run that was interrupted before."""
    workdir = tmp_path / "run"
    shutil.copytree(trained, workdir)
    (workdir / "curves.png").unlink()
    (workdir / "report.html").write_text("an earlier end's")
    os.utime(workdir / "report.html", (0, 0))
    assert_works(run("train", *TINY, f"--workdir={workdir}"))
    assert (workdir / "curves.png").is_file() and "complete</span>" in (workdir / "report.html").read_text()
    before = checksums(workdir)
    assert_works(run("train", *TINY, f"--workdir={workdir}"))
    assert checksums(workdir) == before


def test_a_run_leaves_a_page_of_itself(run, trained, tmp_path):
    result = run("report", f"--workdir={trained}", f"--out={tmp_path / 'new' / 'x.html'}")
    assert_works(result)
    assert f"{tmp_path}/new/x.html" in result.out
    pages = [path.read_text() for path in (trained / "report.html", tmp_path / "new" / "x.html")]
    first, second = (page[: page.index("<footer>")] for page in pages)  # which says when it was made
    assert first == second
    for words in ("complete</span>", "step 6 of 6", "data:image/png", "host memory, peak", "model.width=16", "<svg "):
        assert words in first
    [record] = json.loads((trained / "environment.json").read_text())
    assert (record["first_step"], record["last_step"], record["devices"]) == (0, 6, 1) and record["host_peak_bytes"] > 2**26
    assert_fails(run("report", f"--workdir={trained}", "--out=/dev/null/x"), "/dev/null/x")
    assert_fails(run("report", f"--workdir={tmp_path}"), str(tmp_path), "not a training run")

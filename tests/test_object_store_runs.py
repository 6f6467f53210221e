"""Runs whose every file is in an object store, as a user meets them: killed, resumed, sampled, verified, trained on latents."""

import json
import os
import signal
import threading
import time

import commands
import numpy as np
import object_stores
import pytest
from commands import TINY, assert_fails, assert_works
from PIL import Image

from speedit_jax import object_store, storage
from speedit_jax.testing.vae_weights import write_vae
from speedit_jax.training import integrity, lock

pytestmark = pytest.mark.slow  # minutes: python -m pytest -m slow tests/test_object_store_runs.py

TRAIN = [
    *TINY,
    "--config.training.num_steps=24",
    "--config.training.sample_every=12",
    "--config.sampling.grid_images=4",
    "--config.evaluation.every=12",
    "--config.evaluation.metrics=pr",
    "--config.evaluation.best=recall",
    "--config.evaluation.num_images=16",
]


@pytest.fixture(scope="module", params=["gcs", "s3"])
def bucket(request):
    with getattr(object_stores, request.param)() as url:
        object_store.file_system.cache_clear()
        yield url


@pytest.fixture(scope="module")
def run(bucket, tmp_path_factory):
    cache = {"SPEEDIT_CACHE": str(tmp_path_factory.mktemp("cache"))}
    with commands.server(os.environ | {"JAX_PLATFORMS": "cpu"} | cache) as run:
        yield run


def kill_after_a_save(workdir):
    """kill -9 of the process that trains in `workdir`, when the first checkpoint is there."""
    while not integrity.steps(workdir):
        time.sleep(0.02)
    os.kill(json.loads((workdir / lock.NAME).read_text())["pid"], signal.SIGKILL)


@pytest.fixture(scope="module")
def killed(run, bucket):
    """(the workdir of a run that was killed and resumed, what the second command said)."""
    workdir = storage.path(f"{bucket}/run")
    killer = threading.Thread(target=kill_after_a_save, args=(workdir,), daemon=True)
    killer.start()
    first = run("train", *TRAIN, f"--workdir={workdir}")
    killer.join()
    assert first.code == -signal.SIGKILL, first
    second = run("train", *TRAIN, f"--workdir={workdir}")
    assert_works(second)
    return workdir, second.out


def logged(workdir):
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if not name.startswith("time_")} for record in records]


def test_killed_and_resumed_it_ends_as_a_run_on_a_disk(run, killed, tmp_path):
    workdir, said = killed
    assert "Resuming from the checkpoint of step" in said
    local = tmp_path / "run"
    assert_works(run("train", *TRAIN, f"--workdir={local}"))
    assert logged(workdir) == logged(local)
    assert integrity.steps(workdir) == integrity.steps(local)
    image = "samples/step_0000024.png"
    assert (workdir / image).read_bytes() == (local / image).read_bytes()
    for place in (workdir, local):
        assert_works(run("sample", f"--workdir={place}", "--num_images=6", "--batch_size=6", f"--out={place / 'drawn'}"))
    remote = storage.fetched(workdir)
    with np.load(remote / "drawn.npz") as ours, np.load(local / "drawn.npz") as theirs:
        assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_dropped_and_unfinished_checkpoints_leave_no_files(killed):
    workdir, _ = killed
    there = {path.relative_to(workdir / "checkpoints").parts[0] for path in storage.files(workdir / "checkpoints")}
    assert there == set(map(str, integrity.steps(workdir))) and "24" in there
    assert not (workdir / lock.NAME).exists()


def test_verify_sees_a_damaged_file(run, killed):
    workdir, _ = killed
    result = run("verify", f"--workdir={workdir}")
    assert_works(result)
    assert "damaged" not in result.out
    oldest = min(integrity.steps(workdir))
    array = max(storage.files(workdir / "checkpoints" / str(oldest) / "state"), key=storage.size)
    object_store.store(array).pipe_file(str(array), b"x")
    result = run("verify", f"--workdir={workdir}")
    assert result.code == 1 and "damaged" in result.out + result.err


def test_latents_are_written_to_a_store_and_trained_on(run, bucket, tmp_path):
    images = storage.path(f"{bucket}/images")
    rng = np.random.default_rng(0)
    with storage.replacing(images) as local:
        for i in range(8):
            (local / "cat").mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(local / "cat" / f"{i}.png")
    vae, out = write_vae(tmp_path, "small"), f"{bucket}/latents"
    flags = [f"--source=folder:{images}", f"--vae={vae}", "--size=16,16", "--batch_size=4", "--shard_size=4"]
    assert_works(run("encode", *flags, f"--out={out}"))
    assert_works(run("encode", f"--out={out}", "--verify"))
    names = [path.name for path in storage.files(storage.path(out))]
    assert len(names) == 6 and not any("partial" in name for name in names)
    small = [*TINY, "--config.training.num_steps=4", "--config.training.batch_size=4", "--config.sampling.clip=False"]
    data = [f"--config.data.source=latents:{out}", "--config.evaluation.every=0"]
    result = run("train", *small, *data, f"--workdir={bucket}/on_latents")
    assert_works(result)


def test_what_the_store_refuses_is_one_line(run, bucket):
    scheme = bucket.partition("://")[0]
    assert_fails(run("train", *TRAIN, f"--workdir={scheme}://no-such-bucket/run"), "no-such-bucket")
    assert_fails(run("sample", f"--workdir={scheme}://no-such-bucket/run"), "no-such-bucket")

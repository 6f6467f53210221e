"""The launch scripts: what they would run, and their mistakes; gcloud and sbatch are not here."""

import shlex
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"
TRAIN = ["--config=configs/imagenet.py:DiG-XL/2", "--workdir=runs/with space"]
SCRIPTS = {"tpu_pod.sh": ["--tpu=pod", "--zone=z"], "slurm.sh": ["--nodes=2", "--gpus=8"]}


def launch(script, *flags):
    return subprocess.run(["bash", LAUNCH / script, *flags], capture_output=True, text=True)


def remote(command):
    """The shell command that a dry run's line would have another machine run."""
    (quoted,) = [word.split("=", 1)[1] for word in shlex.split(command) if word.startswith(("--command=", "--wrap="))]
    return shlex.split(quoted)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help(script):
    result = launch(script, "--help")
    assert result.returncode == 0 and f"launch/{script}" in result.stdout and "--dry_run" in result.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_reach_the_trainer_whole(script):
    result = launch(script, *SCRIPTS[script], "--dry_run", "--", *TRAIN)
    assert result.returncode == 0, result
    words = remote(result.stdout)
    assert words[words.index("speedit_jax.train") :] == ["speedit_jax.train", "--multihost", *TRAIN]


def test_slurm_runs_a_process_a_gpu_and_asks_to_stop_in_time():
    words = shlex.split(launch("slurm.sh", *SCRIPTS["slurm.sh"], "--time=1:00:00", "--dry_run", "--", *TRAIN).stdout)
    assert words[0] == "sbatch"
    assert {"--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8", "--requeue", "--signal=TERM@120", "--time=1:00:00"} <= set(
        words
    )


def test_setup_installs_on_every_worker():
    result = launch("tpu_pod.sh", *SCRIPTS["tpu_pod.sh"], "--setup", "--dry_run")
    archive, copy, install = result.stdout.splitlines()
    assert "archive" in archive and "scp" in copy and "--worker=all" in copy
    assert ".[tpu]" in remote(install)


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("tpu_pod.sh", ["--zone=z", "--", "--config=c"], "--tpu is missing"),
        ("tpu_pod.sh", ["--tpu=pod", "--zone=z"], "nothing to do"),
        ("tpu_pod.sh", ["--tpu=pod", "--config=c"], "unknown argument --config=c"),
        ("slurm.sh", ["--nodes=two", "--gpus=8", "--", "--config=c"], "--nodes=two"),
        ("slurm.sh", ["--nodes=2", "--gpus=8"], "missing after --"),
    ],
)
def test_mistakes_are_one_line(script, flags, words):
    result = launch(script, *flags)
    assert result.returncode == 1 and result.stdout == ""
    assert words in result.stderr and len(result.stderr.splitlines()) == 1

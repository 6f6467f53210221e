"""Two processes on this machine train as one does, and one goes on from where two stopped."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import COMPILATION
from PIL import Image
from tiny import TINY

from benchmarks import faults
from speedit_jax import peers
from speedit_jax.testing.hosts import hosts
from speedit_jax.training import integrity
from speedit_jax.training.checkpoint import Checkpoints

ROOT = Path(__file__).parents[2]
STEPS = 4

# fsdp reaches over both processes, so that each holds but half of the parameters.
CONFIG = TINY | {
    "training.num_steps": STEPS,
    "training.log_every": 1,
    "checkpoint.every": 2,
    "mesh.fsdp": 4,
    "mesh.tensor": 2,
    "sampling.num_steps": 2,
    "sampling.grid_images": 4,
}
# Of the last step, by all processes; one compilation serves both.
DRAWN = {
    "training.sample_every": STEPS,
    "evaluation.every": STEPS,
    "evaluation.features": "pixels",
    "evaluation.num_images": 12,
    "evaluation.batch_size": 4,
}


def start(workdir: Path, devices: int, *arguments: str, **variables: str) -> subprocess.Popen:
    flags = f"{COMPILATION} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | variables
    overrides = [f"--config.{key}={value}" for key, value in CONFIG.items()]
    return subprocess.Popen(
        [sys.executable, "-m", "speedit_jax.train", "--config=configs/base.py", f"--workdir={workdir}", *overrides, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(processes: list[subprocess.Popen]) -> list[str]:
    try:
        outputs = [process.communicate(timeout=1200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-3000:]
    return outputs


def metrics(workdir: Path) -> dict[str, list[float]]:
    """{name: its values by step}, but for those of the clock."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    # A quarter of the schedule that a batch has no timestep in is left out.
    return {name: [r.get(name, -1) for r in records] for name in set().union(*records) if not name.startswith("time_")}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(directory of two processes, of one process, of two and then one, the outputs of the three commands)."""
    root = tmp_path_factory.mktemp("multihost")
    two, one, resumed = root / "two", root / "one", root / "resumed"
    drawn = [f"--config.{name}={value}" for name, value in DRAWN.items()]
    processes = [start(two, 4, "--multihost", *drawn, **host) for host in hosts(2)]
    outputs = finish(processes)[:1]

    shutil.copytree(two, resumed)
    shutil.rmtree(resumed / "checkpoints" / str(STEPS))
    outputs += finish([start(one, 8, *drawn), start(resumed, 8)])
    return two, one, resumed, outputs


def test_two_processes_train_as_one(runs):
    two, one, _, outputs = runs
    assert "8 cpu, 2 processes: data 1 x fsdp 4 x tensor 2" in outputs[0]
    assert "8 cpu, 1 processes: data 1 x fsdp 4 x tensor 2" in outputs[1]
    expected = metrics(one)
    assert expected["step"] == [1, 2, 3, 4]
    assert metrics(two).keys() == expected.keys()
    for name, values in metrics(two).items():
        # Evaluations are of uint8 pixels, which fall to either side.
        np.testing.assert_allclose(values, expected[name], rtol=1e-2 if name == "eval_fid" else 1e-5, err_msg=name)
    assert expected["eval_fid"][:-1] == [-1] * (STEPS - 1) and expected["eval_fid"][-1] > 0
    assert f"Step {STEPS}: fid" in outputs[0] and Checkpoints(two).choose("best") == STEPS


def test_grids_are_drawn_by_both(runs):
    two, one, _, _ = runs
    pictures = [np.asarray(Image.open(run / "samples" / f"step_{STEPS:07d}.png"), int) for run in (two, one)]
    # The floats differ by rounding, so a pixel on the edge between two greys may fall to the other.
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
    assert np.ptp(pictures[0]) > 50


def test_one_process_goes_on_where_two_stopped(runs):
    two, _, resumed, outputs = runs
    assert "Resuming from the checkpoint of step 2." in outputs[2]
    expected = metrics(two)
    for name, values in metrics(resumed).items():
        assert values[:2] == expected[name][:2]
        np.testing.assert_allclose(values, expected[name], rtol=1e-5, err_msg=name)
    assert sorted(p.name for p in (resumed / "checkpoints").iterdir()) == ["2", "4"]


@contextlib.contextmanager
def running(code: str, count: int) -> Iterator[list[subprocess.Popen]]:
    """Processes of one job that run Python code."""
    command = [sys.executable, "-c", code, "--multihost"]
    envs = [os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | host for host in hosts(count)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=ROOT, env=env, **pipes) for env in envs]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_crash_ends_its_process_at_once():
    """The other one would be waited for."""
    code = "import jax, time; from speedit_jax import cli; cli.run(lambda: 1 / 0 if jax.process_index() else time.sleep(200))"
    with running(code, 2) as processes:
        _, said = processes[1].communicate(timeout=100)
        assert processes[1].returncode == 1 and "ZeroDivisionError" in said and processes[0].poll() is None


def strike(sent: signal.Signals, stricken: int, seconds: list[dict[str, float]]) -> list[str]:
    """What the other processes said last. All exchange numbers all the time.

    `seconds` are of each process, in speedit_jax.peers: shorter than in use, or so that one notices before the others.
    """
    code = f"""if True:
        import itertools, jax, numpy as np
        from jax.experimental import multihost_utils
        from speedit_jax import cli, peers
        def main():
            vars(peers).update({seconds}[jax.process_index()])
            for i in itertools.count():
                multihost_utils.process_allgather(np.array(i))
                print(i, flush=True)
        cli.run(main)
        """
    with running(code, len(seconds)) as processes:
        while not processes[0].stdout.readline().startswith("5"):
            assert processes[0].poll() is None
        processes[stricken].send_signal(sent)
        others = [process for number, process in enumerate(processes) if number != stricken]
        said = [process.communicate(timeout=100)[1] for process in others]
        assert all(process.returncode == peers.LOST == 75 for process in others)
        assert "Traceback" not in "".join(said)
        return [text.splitlines()[-1] for text in said]


@pytest.mark.parametrize("stricken", [0, 1])
@pytest.mark.parametrize("struck", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_process_is_named(stricken, struck):
    (last,) = strike(struck, stricken, [{"SILENCE": 6}] * 2)
    assert last.startswith(f"error: process {stricken} of 2 on ")
    assert last.endswith("is lost; start the same command again on all hosts: it goes on")


@pytest.mark.parametrize(
    ("struck", "stricken", "seconds"),
    [
        # With process 0 goes the service by which the others watch each other.
        pytest.param(signal.SIGKILL, 2, [{"_SUSPICION": 5}, {"_SUSPICION": 8}, {}], id="0 notices first"),
        pytest.param(signal.SIGSTOP, 2, [{"SILENCE": 14}, {"SILENCE": 100}, {}], id="0 notices much earlier"),
    ],
)
def test_all_of_several_processes_name_the_lost_one(struck, stricken, seconds):
    for last in strike(struck, stricken, seconds):
        assert last.startswith(f"error: process {stricken} of 3 on ")


def test_an_abort_that_comes_before_the_loss_is_seen():
    """As Gloo's does where process 0 is killed and its other sockets still take connections."""
    code = """if True:
        import os, jax, time
        from speedit_jax import cli
        def main():
            if jax.process_index():
                print("aborts", flush=True)
                os.abort()
            time.sleep(100)
        cli.run(main)
        """
    with running(code, 2) as processes:
        assert processes[1].stdout.readline() == "aborts\n"
        time.sleep(0.5)
        processes[0].kill()
        _, said = processes[1].communicate(timeout=100)
        assert processes[1].returncode == peers.LOST and said.splitlines()[-1].startswith("error: process 0 of 2 on ")


def test_a_stopped_process_0_makes_nobody_else_silent():
    """What is heard of the others comes by way of it, and is as old as their last beat before its end."""
    watch, now = object.__new__(peers.Watch), time.monotonic()
    watch._me, watch._answered, watch._heard = 2, now - 39, {0: now - 39, 1: now - 41}
    assert watch.lost(40) is None and watch.lost(38) == 0
    watch._answered = now
    assert watch.lost(40) == 1


def test_processes_share_the_search_for_damage_and_agree(tmp_path):
    subject = faults.Subject(tmp_path / "run")
    names = sorted(integrity.read(subject.checkpoint))
    # The processes look at every other file each: either may be the one that finds it.
    for name in names[2:4]:
        with subject.damaged(subject.checkpoint / name, "cut"):
            code = f"""if True:
                import pathlib
                from speedit_jax import cli
                from speedit_jax.training import set_aside
                cli.run(lambda: print("said", set_aside.set_aside_damaged(pathlib.Path({str(subject.workdir)!r}))))
                """
            envs = [os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | host for host in hosts(2)]
            command = [sys.executable, "-c", code, "--multihost"]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
            outputs = finish([subprocess.Popen(command, cwd=ROOT, env=env, **pipes) for env in envs])
            for output in outputs:
                (line,) = [line for line in output.splitlines() if line.startswith("said")]
                assert f"is damaged ({name} does not hold what was saved)" in line
            aside = subject.checkpoint.with_name("damaged-2")
            aside.rename(subject.checkpoint)

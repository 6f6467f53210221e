"""Does a SLURM job that is interrupted and put into the queue again end in the same bits as one that was left alone?

  python -m benchmarks.slurm --out=docs/results/slurm.json

Starts a SLURM of its own on this machine (munged, slurmctld and slurmd must be installed, and this must run as root), submits
launch/slurm.sbatch with two processes that train one small model, and interrupts them:
  time      SIGUSR1 to the batch script, as SLURM sends it before a job's time is over
  lost      SIGKILL to one of the two processes
  preempted a job of a partition with a higher priority takes the node
Each time the job must come back by itself, resume and end; everything it wrote is then compared with an uninterrupted job of two
processes, except for checkpoints that only one of them kept: a stop saves one more step. Two more jobs must not come back: one
with a mistake in its flags, one ended by scancel. Exits with 1 if anything is not so.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
from absl import logging

from benchmarks.kill_resume import ROOT, differences, evidence, train_command
from speedit_jax import __version__, storage

OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE")
TIMEOUT = 2400  # seconds for one job, on a machine that is busy with other things
CONFIG = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmdPort={slurmd}
AuthType=auth/munge
AuthInfo=socket={place}/munge.socket,cred_expire=5
SlurmUser=root
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
MinJobAge=86400
SchedulerParameters=sched_interval=2,bf_interval=5
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=120
PartitionName=high Nodes=ALL PriorityTier=2 PreemptMode=OFF
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def cluster(place: Path) -> Iterator[dict[str, str]]:
    """A SLURM of one node on this machine; gives the environment in which its commands find it."""
    for program in ("munged", "slurmctld", "slurmd", "sbatch"):
        if not shutil.which(program):
            sys.exit(f"error: {program} is missing: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge")
    for name in ("state", "spool"):
        (place / name).mkdir(parents=True)
    place.chmod(0o755)
    (place / "key").write_bytes(os.urandom(128))
    (place / "key").chmod(0o600)
    config = CONFIG.format(host=socket.gethostname().partition(".")[0], place=place, port=free_port(), slurmd=free_port())
    (place / "slurm.conf").write_text(config)
    env = os.environ | {"SLURM_CONF": str(place / "slurm.conf"), "PYTHON": sys.executable, "JAX_PLATFORMS": "cpu"}
    files = [f"--{name}={place}/{file}" for name, file in (("key-file", "key"), ("socket", "munge.socket"))]
    files += [f"--{name}-file={place}/munge.{name}" for name in ("pid", "log", "seed")]
    daemons = (["munged", "--foreground", "--force", *files], ["slurmctld", "-D"], ["slurmd", "-D", "-N", "localhost"])
    with contextlib.ExitStack() as stack:
        for command in daemons:
            output = stack.enter_context((place / f"{command[0]}.out").open("w"))
            process = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT)
            stack.callback(process.wait)
            stack.callback(process.terminate)
            time.sleep(1)
        until = time.monotonic() + 60
        while "idle" not in (said := slurm(env, "sinfo", "--noheader", "--format=%t", check=False)):
            if time.monotonic() > until:
                logs = "\n".join((place / f"{name[0]}.out").read_text()[-500:] for name in daemons)
                sys.exit(f"error: SLURM does not start here: {said}\n{logs}")
            time.sleep(0.5)
        yield env


def slurm(env: dict[str, str], *command: str, check: bool = True) -> str:
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=ROOT)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout + ("" if check else done.stderr)


class Job:
    """A run in the queue, seen from outside."""

    def __init__(self, env: dict[str, str], workdir: Path, steps: int, *flags: str):
        self.env, self.workdir, self.log = env, workdir, workdir.with_suffix(".log")
        _, _, _, *training = train_command(steps)
        # Interruptions are in the steps here, so pictures and evaluations are few.
        seldom = {f"--config.{name}": steps // 2 for name in ("evaluation.every", "training.sample_every")}
        training = [flag for flag in training if flag.partition("=")[0] not in seldom]
        training += [f"{name}={every}" for name, every in seldom.items()]
        command = ["launch/slurm.sbatch", "--nodes=1", "--processes=2", "--time=60", "--partition=low", f"--output={self.log}"]
        command += ["--", *training, "--config.mesh.fsdp=2", f"--workdir={workdir}", *flags]
        self.number = re.search(r"\d+", slurm(env, *command))[0]

    def field(self, name: str) -> str:
        said = slurm(self.env, "scontrol", "show", "job", "--oneliner", self.number)
        return re.search(rf"\b{name}=(\S*)", said)[1]

    def step(self) -> int:
        path = self.workdir / "metrics.jsonl"
        lines = path.read_text().split("\n")[:-1] if path.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        until = time.monotonic() + TIMEOUT
        while not condition():
            if time.monotonic() > until:
                said = self.log.read_text()[-2000:] if self.log.exists() else "it said nothing"
                sys.exit(f"error: waited {TIMEOUT} s for {what}; the job is {self.field('JobState')}: {said}")
            time.sleep(0.2)

    def processes(self) -> list[int]:
        """The process ids of its training processes."""
        found = []
        for place in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                words = (place / "cmdline").read_bytes().split(b"\0") if place.name.isdecimal() else []
                if words[:1] == [sys.executable.encode()] and f"--workdir={self.workdir}".encode() in words:
                    found.append(int(place.name))
        return found

    def is_over(self) -> bool:
        return self.field("JobState") in OVER

    def ended(self) -> str:
        """Waits for its end; returns its state and exit code."""
        self.wait(self.is_over, "the end of the job")
        return f"{self.field('JobState')} {self.field('ExitCode')}"


def out_of_time(job: Job) -> None:
    slurm(job.env, "scancel", "--batch", "--signal=USR1", job.number)


def lose_one(job: Job) -> None:
    os.kill(max(job.processes()), signal.SIGKILL)


def preempt(job: Job) -> None:
    command = ["sbatch", "--partition=high", "--ntasks=2", "--wrap=sleep 5", "--output=/dev/null"]
    slurm(job.env, *command)


INTERRUPTIONS = {"time": out_of_time, "lost": lose_one, "preempted": preempt}


def interrupted(job: Job, steps: int) -> list[dict]:
    """Interrupts a job in every way, one after the other; what happened."""
    found = []
    for i, (name, interrupt) in enumerate(INTERRUPTIONS.items(), 1):
        job.wait(lambda i=i: job.field("Restarts") == str(i - 1) and len(job.processes()) == 2, "the processes")
        began = job.step()
        job.wait(lambda i=i, began=began: job.step() > max(began, steps * i // 4), "steps")
        at, since = job.step(), time.monotonic()
        interrupt(job)
        job.wait(lambda i=i: job.field("Restarts") == str(i) or job.is_over(), "the job to be requeued")
        if job.is_over():
            sys.exit(f"error: the job ended before {name!r} interrupted it, as {job.field('JobState')}; give more --steps")
        requeued = time.monotonic() - since
        job.wait(lambda: job.field("JobState") == "RUNNING", "the job to run again")
        again = time.monotonic() - since
        found.append({"interruption": name, "at_step": at, "requeued_after_s": round(requeued), "runs_after_s": round(again)})
        print(found[-1], flush=True)
    return found


def in_both(one: dict[str, object], other: dict[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """What is said of checkpoints that both runs kept, and of all else: a run that was asked to stop saves one more step."""

    def step(name: str) -> str | None:
        of = re.match(r"(?:checkpoint|evaluation) (\d+)", name)
        return of and of[1]

    kept = [{step(name) for name in found} for found in (one, other)]
    return tuple({name: value for name, value in found.items() if step(name) in kept[0] & kept[1]} for found in (one, other))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=800, help="of the run")
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    args = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as scratch, cluster(Path(scratch) / "slurm") as env:
        scratch, expected = Path(scratch), {}
        whole = Job(env, scratch / "whole", args.steps)
        expected["uninterrupted"] = whole.ended()
        print(f"uninterrupted: {expected['uninterrupted']}", flush=True)
        job = Job(env, scratch / "interrupted", args.steps)
        happened = interrupted(job, args.steps)
        expected["interrupted"] = job.ended()
        print(f"interrupted: {expected['interrupted']}", flush=True)
        found, reference = in_both(evidence(job.workdir), evidence(whole.workdir))
        different = differences(found, reference)
        resumed = re.findall(r"Resuming from the checkpoint of step (\d+)", job.log.read_text())
        mistaken = Job(env, scratch / "mistaken", args.steps, "--config.mesh.fsdp=3")
        expected["mistake"], restarts = mistaken.ended(), {"mistake": mistaken.field("Restarts")}
        print(f"mistake: {expected['mistake']}, {mistaken.log.read_text().strip().splitlines()[-1]}", flush=True)
        cancelled = Job(env, scratch / "cancelled", args.steps)
        cancelled.wait(lambda: cancelled.step() > 0, "steps")
        slurm(env, "scancel", cancelled.number)
        expected["scancel"], restarts["scancel"] = cancelled.ended(), cancelled.field("Restarts")
        time.sleep(10)  # in which it could come back
        states = {name: value.split()[0] for name, value in expected.items()}
        right = {"uninterrupted": "COMPLETED", "interrupted": "COMPLETED", "mistake": "FAILED", "scancel": "CANCELLED"}
        good = not different and states == right and set(restarts.values()) == {"0"} and len(resumed) == len(INTERRUPTIONS)
        good = good and cancelled.field("JobState") == "CANCELLED" and f"evaluation {args.steps}" in reference
        version = slurm(env, "sinfo", "--version").strip()
    print(
        f"{len(reference)} arrays, log lines and images compared, {len(different)} differ; resumed at steps {', '.join(resumed)}"
    )
    if args.out:
        record = {
            "steps": args.steps,
            "versions": {"speedit_jax": __version__, "jax": jax.__version__, "python": sys.version.split()[0], "slurm": version},
            "interruptions": happened,
            "resumed_from": [int(step) for step in resumed],
            "compared": len(reference),
            "different": different,
            "ends": expected,
            "restarts_that_must_not_be": restarts,
        }
        storage.write_text(args.out, json.dumps(record, indent=1) + "\n")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()

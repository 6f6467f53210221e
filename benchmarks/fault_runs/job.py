"""Runs of a tiny model on real digits, in processes of their own, and where they happen."""

import contextlib
import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.kill_resume import ROOT, evidence
from speedit_jax.testing.hosts import hosts

STEPS, LOG_EVERY, IMAGES = 120, 5, 200
TIMEOUT = 1800
OVERRIDES = {
    "data.height": 8,
    "data.width": 8,
    "data.channels": 1,
    "model.width": 32,
    "model.depth": 2,
    "model.heads": 2,
    "model.scan_unroll": 1,
    "optim.warmup_steps": 10,
    "training.num_steps": STEPS,
    "training.batch_size": 16,
    "training.log_every": LOG_EVERY,
    "training.sample_every": 40,
    "checkpoint.every": 20,
    "sampling.num_steps": 2,
    "sampling.grid_images": 16,
}


def write_digits(directory: Path) -> None:
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i in range(IMAGES):
        path = directory / str(digits.target[i]) / f"{i:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((15 * digits.images[i]).astype(np.uint8)).save(path)


def prepare(root: Path) -> None:
    if (root / "digits").is_dir():
        return
    for package in ("speedit_jax", "configs"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    here = Path(__file__).parent
    shutil.copy(here / "sitecustomize.py", root)
    if compiler := shutil.which("cc"):  # without one, trials of several processes only take longer
        subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", root / "epoll.so", here / "epoll.c", "-ldl"], check=True)
    write_digits(root / "digits")


def without_fault(root: Path, processes: int) -> dict[str, object]:
    """The evidence of a run that is left alone."""
    directory = root / f"reference_{processes}"
    if (directory / "run" / "report.html").exists():
        return evidence(directory / "run")
    place = Place(root, directory)
    codes, lines, _ = Job(place, processes).end(range(processes))
    if any(codes):
        sys.exit(f"error: the run without a fault failed: {lines}")
    return evidence(place.workdir)


class Job:
    """The processes of one start of a run, seen from outside."""

    def __init__(self, place: "Place", count: int, *flags: str, wrap: tuple[str, ...] = (), env: dict[str, str] | None = None):
        self.workdir = place.workdir
        self.log = place.directory / f"start_{len(list(place.directory.glob('start_*.log')))}.log"
        overrides = {"data.source": f"folder:{place.data}"} | OVERRIDES
        command = [*wrap, sys.executable, "-m", "speedit_jax.train", "--config=configs/digits.py", f"--workdir={place.workdir}"]
        command += [f"--config.{name}={value}" for name, value in overrides.items()] + list(flags)
        command += ["--multihost"] if count > 1 else []
        common = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(place.root / "xla"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(place.root),  # a copy of the code, which may be edited meanwhile
        }
        if count > 1 and (calm := place.root / "epoll.so").exists():
            common["LD_PRELOAD"] = str(calm)
        self.processes = []
        for number, host in enumerate(hosts(count) if count > 1 else [{}]):
            log = self.log if number == 0 else self.log.with_suffix(f".{number}.log")
            with log.open("w") as file:
                environment = common | host | (env or {})
                pipes = {"stdout": file, "stderr": subprocess.STDOUT}
                self.processes.append(subprocess.Popen(command, cwd=place.root, env=environment, **pipes))

    def step(self) -> int | None:
        """The last step that this start logged; None before the first."""
        found = re.findall(r"\| (\d+)/\d+ \[", self.log.read_text())
        return int(found[-1]) if found else None

    def running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def reach(self, rng: np.random.Generator) -> int | None:
        """Waits until a random moment; returns the step that was logged then."""
        # Every tenth is before the first step, when all processes are there and compile.
        step = int(rng.integers(-STEPS // 9, STEPS))
        while self.running() and not (
            "Compiling, then" in self.log.read_text() if step < 0 else (now := self.step()) is not None and now >= step
        ):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.5 if step < 0 else 0.1))
        return self.step()

    def end(self, among: list[int]) -> tuple[list[int], list[str], float]:
        """(exit codes, the last line of each, seconds) of the processes whose numbers are given."""
        since = time.time()
        for number in among:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.processes[number].wait(max(0.1, since + TIMEOUT - time.time()))
        seconds = time.time() - since
        for process in self.processes:
            process.kill()  # those that were struck, and what did not end
            process.wait()
        logs = [self.log if number == 0 else self.log.with_suffix(f".{number}.log") for number in among]
        lines = [[line for line in re.split(r"[\r\n]", log.read_text()) if line.strip()] for log in logs]
        return [self.processes[number].returncode for number in among], [said[-1] if said else "" for said in lines], seconds


@dataclasses.dataclass
class Place:
    """Where a trial happens. `root` is shared by all: the code, what XLA has compiled."""

    root: Path
    directory: Path

    def __post_init__(self):
        self.data, self.workdir = self.directory / "data", self.directory / "run"
        shutil.rmtree(self.directory, ignore_errors=True)  # of a start of this script that was ended
        self.directory.mkdir(parents=True)
        shutil.copytree(self.root / "digits", self.data)

"""Does a run that meets a fault end with its line, in its time, and go on to the same bits?

  python -m benchmarks.fault_runs --trials=100 --budget_s=3600 --out=docs/results/fault_runs.json

Trains a tiny model on real digits, as PNG files, once without a fault with 1, 2 and 4 processes. Then, in each trial, starts the
same command in a fresh directory, brings about a fault at a random moment (of the compilation or of any step), waits for the end,
mends the fault, runs the same command again to the end and compares all checkpoints, metrics (but times) and images with the
run without a fault, to the bit. `--help` lists the kinds of fault. What is counted:
  line       the run ended with the exit code and the line that docs/training.md states
  in time    and not later than it states
  identical  the run that went on ended in the same bits
  over       the run was complete before it met the fault
  WRONG      anything else
The trials that --out has already are not made again, so the command can be stopped at any time. Needs root on Linux: some kinds
mount a small disk. The moment of each trial depends on --seed only, and on what else the machine does. Exits with 1 if anything
is wrong.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from absl import logging
from PIL import Image

from benchmarks.kill_resume import INTERRUPTED, ROOT, differences, evidence
from speedit_jax import __version__, storage
from speedit_jax.peers import LOST
from speedit_jax.testing.hosts import hosts

STEPS, LOG_EVERY, IMAGES = 120, 5, 200
HANG_AFTER = 20  # seconds, in the trials of a hang
TIMEOUT = 600
# Seconds to the end that docs/training.md states; there is no such time for what a run meets only at its next save or epoch.
LOST_IN = 45
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
        self.directory.mkdir(parents=True)
        shutil.copytree(self.root / "digits", self.data)


@dataclasses.dataclass(frozen=True)
class End:
    """How a stricken run has to end.

    Attributes:
      code, line: of each process that is to end by itself; the line is a regular expression.
      among: their numbers; None is all.
      within: seconds from the fault.
    """

    code: int
    line: str
    among: list[int] | None = None
    within: float | None = None


# A fault: brings itself about in a running job, yields how the job has to end, and is mended afterwards.
Fault = Callable[[Place, Job, np.random.Generator], contextlib.AbstractContextManager[End]]


def struck(sent: signal.Signals) -> Fault:
    @contextlib.contextmanager
    def fault(place: Place, job: Job, rng: np.random.Generator) -> Iterator[End]:
        victim, count = int(rng.integers(len(job.processes))), len(job.processes)
        job.processes[victim].send_signal(sent)
        others = [number for number in range(count) if number != victim]
        yield End(LOST, f"^error: process {victim} of {count} on .* is lost; start the same command again", others, LOST_IN)

    return fault


@contextlib.contextmanager
def asked(place: Place, job: Job, rng: np.random.Generator) -> Iterator[End]:
    """SIGTERM, as schedulers send it: to all."""
    for process in job.processes:
        process.send_signal(signal.SIGTERM)
    yield End(INTERRUPTED, "", within=30)


@contextlib.contextmanager
def full_disk(place: Place, job: Job, rng: np.random.Generator) -> Iterator[End]:
    """Another process fills the disk."""
    fill = place.workdir.parent / "fill"
    subprocess.run(["dd", "if=/dev/zero", f"of={fill}", "bs=4k"], capture_output=True)
    yield End(1, "^error: .*[Nn]o space left on")
    fill.unlink()


@contextlib.contextmanager
def read_only(place: Place, job: Job, rng: np.random.Generator) -> Iterator[End]:
    subprocess.run(["mount", "--bind", place.workdir, place.workdir], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", place.workdir], check=True)
    yield End(1, "^error: .*Read-only file system")
    subprocess.run(["umount", "--lazy", place.workdir], check=True)


@contextlib.contextmanager
def second_start(place: Place, job: Job, rng: np.random.Generator) -> Iterator[End]:
    """The first goes on, and this one is refused."""
    (code,), (line,), _ = Job(place, 1).end([0])
    complete = job.step() == STEPS
    refused = code == 1 and f"process {job.processes[0].pid} on " in line and " trains in " in line
    yield End(0, "^Next .*sample" if refused or complete else f"never: the second start said {code}: {line}")


def damaged(damage: Callable[[Path], None], line: str, **how) -> Fault:
    @contextlib.contextmanager
    def fault(place: Place, job: Job, rng: np.random.Generator) -> Iterator[End]:
        path = sorted(place.data.glob("*/*.png"))[int(rng.integers(IMAGES))]
        content = path.read_bytes()
        damage(path)
        yield End(line=line, **how)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        path.write_bytes(content)

    return fault


def unreadable(path: Path) -> None:
    path.unlink()
    path.mkdir()  # root reads every file, whatever its mode


def silent(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)  # nobody writes to it, and open() waits


@contextlib.contextmanager
def vanished(place: Place, job: Job, rng: np.random.Generator) -> Iterator[End]:
    away = place.data.with_name("away")
    place.data.rename(away)
    yield End(1, "^error: .*No such file or directory")
    away.rename(place.data)


@contextlib.contextmanager
def clock_back(place: Place, job: Job, rng: np.random.Generator) -> Iterator[End]:
    """By up to a day; time.monotonic is left alone, as it is when a clock is set."""
    (place.directory / "clock").write_text(f"-{rng.integers(1, 86400)}")
    yield End(0, "^Next .*sample")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of fault, and what the run that meets it is like."""

    fault: Fault
    processes: int = 1
    flags: tuple[str, ...] = ()
    small_disk: bool = False
    fake_clock: bool = False

    def start(self, place: Place) -> Job:
        if not self.fake_clock:
            return Job(place, self.processes, *self.flags)
        clock = place.directory / "clock"
        clock.write_text("+0")
        env = {"FAKETIME_TIMESTAMP_FILE": str(clock), "FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1"}
        (library,) = Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1")
        return Job(place, self.processes, env=env | {"LD_PRELOAD": str(library)})


KINDS = {
    "kill -9 of one of 2 processes": Kind(struck(signal.SIGKILL), 2),
    "kill -9 of one of 4 processes": Kind(struck(signal.SIGKILL), 4),
    "SIGSTOP of one of 2 processes": Kind(struck(signal.SIGSTOP), 2),
    "SIGSTOP of one of 4 processes": Kind(struck(signal.SIGSTOP), 4),
    "SIGTERM, 1 process": Kind(asked),
    "SIGTERM, 2 processes": Kind(asked, 2),
    "SIGTERM, 4 processes": Kind(asked, 4),
    "full disk": Kind(full_disk, small_disk=True),
    "read-only workdir": Kind(read_only),
    "second start in the workdir": Kind(second_start),
    "unreadable data file": Kind(damaged(unreadable, "^error: cannot read the image .*/data/.*png: ", code=1)),
    "data directory gone": Kind(vanished),
    "clock set back": Kind(clock_back, fake_clock=True),
    "data source hangs": Kind(
        # The next epoch meets it.
        damaged(silent, "^error: nothing has happened for .*waiting for data.*hang_after", code=LOST),
        flags=(f"--config.training.hang_after={HANG_AFTER}",),
    ),
}


@contextlib.contextmanager
def disk(place: Place, small: bool) -> Iterator[None]:
    """Puts the workdir on a file system of 6 MiB."""
    if not small:
        yield
        return
    small_disk = place.directory / "disk"
    small_disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", small_disk], check=True)
    place.workdir = small_disk / "run"
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", small_disk], check=True)


def trial(kind: Kind, place: Place, rng: np.random.Generator, reference: dict[str, object]) -> dict:
    """{"step", "seconds", "over", "line", "in time", "identical", "problems"}."""
    with disk(place, kind.small_disk):
        job = kind.start(place)
        step = job.reach(rng)
        over = not job.running()
        with kind.fault(place, job, rng) as end:
            codes, lines, seconds = job.end(range(len(job.processes)) if end.among is None else end.among)
        over = over or (end.code != 0 and not any(codes))
        right = all(code == end.code and re.search(end.line, line) for code, line in zip(codes, lines, strict=True))
        problems = [] if over or right else [f"exit codes {codes}, lines {lines}"]
        late = not over and end.within is not None and seconds > end.within
        problems += [f"ended after {seconds:.0f} s"] if late else []
        again, said, _ = Job(place, kind.processes).end(range(kind.processes))
        if any(again):
            differ = [f"started again: exit codes {again}, lines {said}"]
        else:
            differ = differences(reference, evidence(place.workdir))[:5]
    return {
        "step": step,
        "seconds": round(seconds, 1),
        "over": over,
        "line": not over and right,
        "in time": None if over or end.within is None else not late,
        "identical": not differ,
        "problems": problems + differ,
    }


def summary(rows: list[dict]) -> list[dict]:
    """A row of counts of each kind."""
    counted = []
    for kind in KINDS:
        made = [row for row in rows if row["kind"] == kind]
        met = [row for row in made if not row["over"]]
        timed = [row for row in met if row["in time"] is not None]
        seconds = [row["seconds"] for row in timed]
        counted.append(
            {
                "kind": kind,
                "trials": len(made),
                "over": len(made) - len(met),
                "line": sum(row["line"] for row in met),
                "in time": sum(row["in time"] for row in timed) if timed else None,
                "identical": sum(row["identical"] for row in made),
                "WRONG": sum(bool(row["problems"]) for row in made),
                "seconds": {"median": statistics.median(seconds), "longest": max(seconds)} if seconds else None,
            }
        )
    return [row for row in counted if row["trials"]]


def write(out: Path, rows: list[dict], args: argparse.Namespace) -> None:
    record = {
        "seed": args.seed,
        "steps": STEPS,
        "versions": {"speedit_jax": __version__, "jax": jax.__version__, "python": sys.version.split()[0]},
        "counts": summary(rows),
        "trials": rows,
    }
    storage.write_text(out, json.dumps(record, indent=1) + "\n")


def prepare(root: Path) -> None:
    for package in ("speedit_jax", "configs"):
        shutil.copytree(ROOT / package, root / package, ignore=shutil.ignore_patterns("__pycache__"))
    write_digits(root / "digits")


def without_fault(root: Path, processes: int) -> dict[str, object]:
    """The evidence of a run that is left alone."""
    place = Place(root, root / f"reference_{processes}")
    codes, lines, _ = Job(place, processes).end(range(processes))
    if any(codes):
        sys.exit(f"error: the run without a fault failed: {lines}")
    return evidence(place.workdir)


def main():
    described = f"{__doc__}\nkinds: {', '.join(KINDS)}"
    parser = argparse.ArgumentParser(description=described, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100, help="of each kind")
    parser.add_argument("--kinds", default="", help="only kinds that this regular expression matches")
    parser.add_argument("--budget_s", type=float, default=float("inf"), help="start no trial after so many seconds")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--keep", action="store_true", help="leave the files of trials that went wrong, and print where")
    parser.add_argument("--out", required=True, help="JSON of the results, to which trials are added")
    args = parser.parse_args()
    logging.set_verbosity(logging.ERROR)  # orbax warns of every checkpoint that it only reads
    jax.config.update("jax_platforms", "cpu")
    since, out, references = time.time(), Path(args.out), {}
    rows = json.loads(out.read_text())["trials"] if out.exists() else []
    made = {(row["kind"], row["number"]) for row in rows}
    root = Path(tempfile.mkdtemp())
    prepare(root)
    for number in range(args.trials):
        for index, (name, kind) in enumerate(KINDS.items()):
            if (name, number) in made or not re.search(args.kinds, name) or time.time() - since > args.budget_s:
                continue
            if kind.processes not in references:
                references[kind.processes] = without_fault(root, kind.processes)
            place = Place(root, root / f"trial_{index}_{number}")
            row = trial(kind, place, np.random.default_rng([args.seed, index, number]), references[kind.processes])
            rows.append({"kind": name, "number": number} | row)
            write(out, rows, args)
            result = f"WRONG: {row['problems']}" if row["problems"] else "over" if row["over"] else "identical"
            print(f"{name:<32}{number:>3}  step {row['step'] or 0:<4} {row['seconds']:>6.1f} s  {result}", flush=True)
            if args.keep and row["problems"]:
                print(f"  {place.directory}", flush=True)
            else:
                shutil.rmtree(place.directory)
    counts = collections.Counter("WRONG" if row["problems"] else "right" for row in rows)
    print(f"{len(rows)} trials, {counts['WRONG']} wrong")
    if not args.keep:
        shutil.rmtree(root)
    sys.exit(1 if counts["WRONG"] else 0)


if __name__ == "__main__":
    main()

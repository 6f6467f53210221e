"""The kinds of fault: how each comes about, how the run has to end, and how the fault is mended."""

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from benchmarks.fault_runs.job import IMAGES, STEPS, Job, Place
from benchmarks.kill_resume import INTERRUPTED
from speedit_jax.peers import LOST

HANG_AFTER = 20  # seconds, in the trials of a hang
# Seconds to the end that docs/training.md states; there is no such time for what a run meets only at its next save or epoch.
LOST_IN = 50
GRACE = 120


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
    yield End(INTERRUPTED, "", within=GRACE)


@contextlib.contextmanager
def full_disk(place: Place, job: Job, rng: np.random.Generator) -> Iterator[End]:
    """Another process fills the disk."""
    fill = place.workdir.parent / "fill"
    subprocess.run(["dd", "if=/dev/zero", f"of={fill}", "bs=4k"], capture_output=True)
    yield End(1, "^error: .*[Nn]o space left on")
    fill.unlink()


@contextlib.contextmanager
def read_only(place: Place, job: Job, rng: np.random.Generator) -> Iterator[End]:
    remount = ["mount", "-o", "remount,ro,bind", place.workdir]
    subprocess.run(["mount", "--bind", place.workdir, place.workdir], check=True)
    while subprocess.run(remount, capture_output=True).returncode:  # busy: the run is writing a file there
        subprocess.run(["umount", "--lazy", place.workdir], check=True)
        subprocess.run(["mount", "--bind", place.workdir, place.workdir], check=True)
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

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
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import logging

from benchmarks.fault_runs.job import STEPS, Job, Place, prepare, without_fault
from benchmarks.fault_runs.kinds import KINDS, Kind
from benchmarks.kill_resume import differences, evidence
from speedit_jax import __version__, storage


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


def unlike(reference: dict[str, object], found: dict[str, object]) -> list[str]:
    """`differences`, but of checkpoints that only one has kept: after SIGTERM at step 101 the last two are of 101 and 120."""

    def step(name: str) -> int | None:
        match = re.match(r"(?:checkpoint|evaluation) (\d+)", name)
        return match and int(match[1])

    one_sided = (set(map(step, reference)) ^ set(map(step, found))) - {STEPS}
    return [name for name in differences(reference, found) if step(name) not in one_sided]


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
            differ = unlike(reference, evidence(place.workdir))[:5]
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


def table(counts: list[dict]) -> str:
    """The counts in Markdown, for docs/results/faults.md."""
    lines = [
        "| fault | trials | over before | its line | in time | identical | wrong | seconds to the end |",
        f"|{'---|' * 8}",
    ]
    for row in counts:
        met, seconds = row["trials"] - row["over"], row["seconds"]
        timed = "" if row["in time"] is None else f"{row['in time']} of {met}"
        spent = f"{seconds['median']:.0f}, at most {seconds['longest']:.0f}" if seconds else ""
        lines.append(
            f"| {row['kind']} | {row['trials']} | {row['over']} | {row['line']} of {met} | {timed} | {row['identical']} of"
            f" {row['trials']} | {row['WRONG']} | {spent} |"
        )
    return "\n".join(lines)


def write(out: Path, rows: list[dict], args: argparse.Namespace) -> None:
    record = {
        "seed": args.seed,
        "steps": STEPS,
        "versions": {"speedit_jax": __version__, "jax": jax.__version__, "python": sys.version.split()[0]},
        "counts": summary(rows),
        "trials": rows,
    }
    storage.write_text(out, json.dumps(record, indent=1) + "\n")


def main():
    described = f"{__doc__}\nkinds: {', '.join(KINDS)}"
    parser = argparse.ArgumentParser(description=described, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100, help="of each kind")
    parser.add_argument("--kinds", default="", help="only kinds that this regular expression matches")
    parser.add_argument("--budget_s", type=float, default=float("inf"), help="start no trial after so many seconds")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--scratch", help="directory that stays: runs without a fault, and what trials that went wrong left")
    parser.add_argument("--out", required=True, help="JSON of the results, to which trials are added")
    args = parser.parse_args()
    logging.set_verbosity(logging.ERROR)  # orbax warns of every checkpoint that it only reads
    jax.config.update("jax_platforms", "cpu")
    since, out, references = time.time(), Path(args.out), {}
    rows = json.loads(out.read_text())["trials"] if out.exists() else []
    made = {(row["kind"], row["number"]) for row in rows}
    root = Path(args.scratch or tempfile.mkdtemp()).absolute()
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
            if not (args.scratch and row["problems"]):
                shutil.rmtree(place.directory)
    counts = collections.Counter("WRONG" if row["problems"] else "right" for row in rows)
    print(table(summary(rows)))
    print(f"{len(rows)} trials, {counts['WRONG']} wrong")
    if not args.scratch:
        shutil.rmtree(root)
    sys.exit(1 if counts["WRONG"] else 0)


if __name__ == "__main__":
    main()

"""Does a run that is killed and started again end in the same bits as one that was left alone?

  python -m benchmarks.kill_resume --kills=20 --steps=200 --seed=0 --out=docs/results/kill_resume.json
  python -m benchmarks.kill_resume --kills=5 --set model.depth=3 tokens.method=route tokens.start=1 tokens.tail=1

Trains a small digits model once without interruption. Then, for each experiment, starts the same command in a fresh
directory, strikes it at a random moment, runs the same command again to the end, and compares with the uninterrupted
run: which checkpoints are kept and which is the best, every array of every one, every logged number but the times,
evaluations included, every sample image's bytes, and that nothing half-written is left. The experiments:
  kill       SIGKILL, aimed in turn at the start, compilation, training steps, saves and sampling
  kill x 5   five SIGKILLs in a row, each of the resumed run, before it may finish
  SIGINT     Ctrl-C (and SIGTERM, in turn), after which the run must save and exit with 130
The process is frozen (SIGSTOP) before it is struck, so that the phase in the table is the one that was hit. All run from
a copy of the code, which may be edited meanwhile. Exits with 1 if anything differs.
"""

import argparse
import concurrent.futures
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from absl import logging

from speedit_jax import __version__
from speedit_jax.data.sources import open_source
from speedit_jax.training.assembly import assemble
from speedit_jax.training.checkpoint import Checkpoints, arrays
from speedit_jax.training.run import Run as OpenRun
from speedit_jax.training.run import open_run
from speedit_jax.training.state import TrainState

ROOT = Path(__file__).resolve().parents[1]
SAVE_EVERY, SAMPLE_EVERY, LOG_EVERY, EVALUATE_EVERY = 20, 40, 5, 10
# Saves and grids are where a kill can do most harm: most of the kills aim there.
AIMS = ("stepping", "saving", "sampling", "saving", "compiling", "sampling", "stepping", "saving", "sampling", "starting")
INTERRUPTED = 130
TIMEOUT = 1200  # seconds, for a machine that is busy with other things


def train_command(steps: int, changes: Sequence[str] = ()) -> list[str]:
    """A run whose steps take milliseconds, with all that a checkpoint must carry: EMA, cosine, flips, dropped labels.

    Args:
      changes: KEY=VALUE of the config, over these.
    """
    overrides = {
        "data.flip": True,
        "model.width": 32,
        "model.depth": 2,
        "model.heads": 2,
        "model.scan_unroll": 1,
        "optim.warmup_steps": 10,
        "training.num_steps": steps,
        "training.batch_size": 32,
        "training.log_every": LOG_EVERY,
        "training.sample_every": SAMPLE_EVERY,
        "checkpoint.every": SAVE_EVERY,
        "sampling.num_steps": 10,
        "evaluation.every": EVALUATE_EVERY,
        "evaluation.num_images": 80,
        "evaluation.metrics": "fid,pr",
        "evaluation.best": "recall",  # noise surrounds all digits: an early step is the best, and has to outlive later ones
    }
    flags = [*(f"--config.{name}={value}" for name, value in overrides.items()), *(f"--config.{change}" for change in changes)]
    return [sys.executable, "-m", "speedit_jax.train", "--config=configs/digits.py", *flags]


@dataclasses.dataclass(frozen=True)
class Strike:
    """A signal and its moment.

    Attributes:
      aim: the phase to hit: one of AIMS.
      step: not before this step.
      delay: seconds between seeing that phase and the signal.
      sent: SIGKILL, or SIGINT and SIGTERM, which ask the run to save.
    """

    aim: str
    step: int
    delay: float
    sent: signal.Signals = signal.SIGKILL


class Run:
    """A training process, seen from outside: by its output and by the files it writes."""

    def __init__(self, workdir: Path, attempt: int, steps: int, env: dict[str, str] | None, changes: Sequence[str] = ()):
        self.workdir, self.steps = workdir, steps
        self.log = workdir.with_name(f"{workdir.name}.{attempt}.log")
        self._started, self._first_step = time.time(), None
        command = [*train_command(steps, changes), f"--workdir={workdir}"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=workdir.parent, env=env, stdout=log, stderr=subprocess.STDOUT)

    def _fresh(self, path: Path) -> bool:
        """Whether this process, not one before it, wrote the file."""
        try:
            return path.stat().st_mtime >= self._started
        except FileNotFoundError:
            return False

    def step(self) -> int | None:
        """The last step logged, by this process or before the checkpoint it started from; None before the loop."""
        path = self.workdir / "metrics.jsonl"
        if not self._fresh(path):
            return None
        lines = path.read_text().split("\n")[:-1]  # without a line that is being written
        step = json.loads(lines[-1])["step"] if lines else 0
        if self._first_step is None:
            self._first_step = step
        return step

    def phase(self) -> str:
        step = self.step()
        if any(self._fresh(path) for path in self.workdir.glob("checkpoints/*.*")):
            return "saving"  # a directory that does not have its final name, a number, yet
        if step == self._first_step:
            return "compiling" if "devices " in self.log.read_text() else "starting"
        if step % SAMPLE_EVERY == 0 and not self._fresh(self.workdir / "samples" / f"step_{step:07d}.png"):
            return "sampling"
        return "finishing" if step == self.steps else "stepping"

    def _reached(self, strike: Strike) -> bool:
        if strike.aim == "starting":
            return True
        step = self.step()
        if strike.aim == "compiling":
            # Before the loop the run does not listen to requests: it has nothing to save.
            return self.phase() != "starting" if strike.sent == signal.SIGKILL else step is not None
        if step is None or step < strike.step:
            return False
        return self.phase() == strike.aim or step >= self.steps - LOG_EVERY  # the last chance

    def strike(self, strike: Strike) -> dict:
        """Waits for the moment and sends the signal. Returns what was hit; "finished" if the run was over by then."""
        while self.process.poll() is None and not self._reached(strike):
            time.sleep(0.001)
        time.sleep(strike.delay)
        self.process.send_signal(signal.SIGSTOP)
        if self.process.returncode is None:
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        hit = {"signal": strike.sent.name, "aim": strike.aim, "phase": self.phase(), "step": self.step()}
        if self.process.poll() is not None:
            hit["phase"] = "finished"
        self.process.send_signal(strike.sent)
        self.process.send_signal(signal.SIGCONT)
        return hit

    def end(self, expected: int) -> list[str]:
        """Waits for the end; returns what was wrong with it."""
        try:
            code = self.process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return [f"{self.log.name}: still running after {TIMEOUT} s"]
        if code == expected:
            return []
        return [f"{self.log.name}: exit code {code}, not {expected}: {self.log.read_text().strip()[-300:]}"]


def evidence(workdir: Path) -> dict[str, object]:
    """All of a finished run that must not depend on interruptions, by name."""
    found = {}
    checkpoints = Checkpoints(workdir)
    steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())
    for step in steps:
        run = open_run(workdir, step)
        for name, array in arrays(restore(run)).items():
            found[f"checkpoint {step}: {name}"] = (array.dtype.str, array.shape, array.tobytes())
        found[f"evaluation {step}"] = json.dumps(run.meta.get("evaluation"))
        run.checkpoints.close()
    best = checkpoints.best()
    found["best"] = best and best[0]
    checkpoints.close()
    for i, line in enumerate((workdir / "metrics.jsonl").read_text().splitlines()):
        record = {name: value for name, value in json.loads(line).items() if not name.startswith("time_")}
        found[f"metrics.jsonl line {i + 1}"] = json.dumps(record)
    for path in sorted((workdir / "samples").iterdir()):
        found[f"samples/{path.name}"] = path.read_bytes()
    leftovers = [path for pattern in ("*.partial*", "*tmp*") for path in workdir.rglob(pattern)]
    return found | {f"leftover {path.relative_to(workdir)}": True for path in leftovers}


def restore(run: OpenRun) -> TrainState:
    """The whole state of a checkpoint, not only the weights."""
    parts = assemble(run.config, open_source(run.config.data), run.mesh)
    return run.checkpoints.restore(run.step, parts.shapes, parts.shardings)


def differences(one: dict[str, object], other: dict[str, object]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def uninterrupted(
    workdir: Path, steps: int, env: dict[str, str] | None = None, changes: Sequence[str] = ()
) -> tuple[dict[str, object], dict[str, float]]:
    """(evidence, how many seconds the start and the compilation take) of a run that is left alone."""
    for package in ("speedit_jax", "configs"):
        shutil.copytree(ROOT / package, workdir.parent / package, ignore=shutil.ignore_patterns("__pycache__"))
    run = Run(workdir, 0, steps, env, changes)
    seconds, since = {}, time.time()
    for phase in ("starting", "compiling"):
        while run.process.poll() is None and run.phase() == phase:
            time.sleep(0.05)
        seconds[phase], since = time.time() - since, time.time()
    problems = run.end(0)
    if problems:
        sys.exit(f"error: the uninterrupted run failed: {problems[0]}")
    return evidence(workdir), seconds


def interrupted(
    workdir: Path, strikes: list[Strike], steps: int, env: dict[str, str] | None, changes: Sequence[str] = ()
) -> dict:
    """Starts the run once for each strike and once more to finish it. Returns {"hits", "problems"}."""
    hits, problems = [], []
    for attempt, strike in enumerate(strikes):
        run = Run(workdir, attempt, steps, env, changes)
        hit = run.strike(strike)
        asked = 0 if hit["phase"] == "finished" else -strike.sent if strike.sent == signal.SIGKILL else INTERRUPTED
        problems += run.end(asked)
        hits.append(hit)
    problems += Run(workdir, len(strikes), steps, env, changes).end(0)
    return {"hits": hits, "problems": problems}


def study(
    experiments: dict[str, list[Strike]],
    reference: dict[str, object],
    scratch: Path,
    steps: int,
    jobs: int = 2,
    env: dict[str, str] | None = None,
    changes: Sequence[str] = (),
) -> Iterator[dict]:
    """Runs the experiments, `jobs` at a time, next to the uninterrupted run; yields {"name", "hits", "problems"} of each."""
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        names = {
            pool.submit(interrupted, scratch / name.replace(" ", "-"), strikes, steps, env, changes): name
            for name, strikes in experiments.items()
        }
        for future in concurrent.futures.as_completed(names):
            name, row = names[future], future.result()
            row["problems"] = row["problems"] or differences(reference, evidence(scratch / name.replace(" ", "-")))
            yield {"name": name} | row


def plan(rng: np.random.Generator, kills: int, steps: int, seconds: dict[str, float]) -> dict[str, list[Strike]]:
    """The experiments, by name."""

    def strike(aim, first=1, last=steps - 2 * SAVE_EVERY, sent=signal.SIGKILL):
        # A save or a grid takes some 50 ms; so does the way from one to the next.
        return Strike(aim, int(rng.integers(first, last)), rng.uniform(0, seconds.get(aim, 0.05)), sent)

    experiments = {f"kill {i + 1}": [strike(AIMS[i % len(AIMS)])] for i in range(kills)}
    fifths = np.linspace(1, steps - SAVE_EVERY, 6).astype(int)
    experiments["kill x 5"] = [strike(str(rng.choice(AIMS)), *fifths[i : i + 2]) for i in range(5)]
    experiments["SIGINT"] = [Strike("compiling", 0, rng.uniform(0, 1), signal.SIGINT)]
    experiments["SIGINT 2"] = [strike("stepping", sent=signal.SIGINT)]
    experiments["SIGTERM"] = [strike("stepping", sent=signal.SIGTERM)]
    return experiments


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="experiments of one SIGKILL each")
    parser.add_argument("--steps", type=int, default=200, help="of the run; at least 100")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--jobs", type=int, default=2, help="experiments at a time")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the config, as after --config.")
    parser.add_argument("--out", help="where to write the results as JSON")
    args = parser.parse_args()
    if args.steps < 100:
        parser.error("--steps must be at least 100, to have several saves and grids to hit")
    logging.set_verbosity(logging.ERROR)  # orbax warns of every checkpoint that it only reads
    jax.config.update("jax_platforms", "cpu")  # of this process, which only compares: the accelerator is the runs'
    since, rows = time.time(), []
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        reference, seconds = uninterrupted(scratch / "uninterrupted", args.steps, changes=args.set)
        print(f"{len(reference)} arrays, log lines and images to compare\n")
        print(f"{'experiment':<12}{'signal':<10}{'phase hit':<12}{'logged step':<13}result", flush=True)
        experiments = plan(np.random.default_rng(args.seed), args.kills, args.steps, seconds)
        for row in study(experiments, reference, scratch, args.steps, args.jobs, changes=args.set):
            rows.append(row)
            for i, hit in enumerate(row["hits"]):
                last = i == len(row["hits"]) - 1
                result = "" if not last else "identical" if not row["problems"] else f"DIFFERENT: {row['problems'][0]}"
                step = "-" if hit["step"] is None else hit["step"]
                print(f"{row['name'] if i == 0 else '':<12}{hit['signal']:<10}{hit['phase']:<12}{step:<13}{result}", flush=True)
    failed = [row["name"] for row in rows if row["problems"]]
    print(f"\n{len(rows) - len(failed)} of {len(rows)} identical in {(time.time() - since) / 60:.1f} minutes")
    if args.out:
        record = {
            "kills": args.kills,
            "steps": args.steps,
            "seed": args.seed,
            **({"set": args.set} if args.set else {}),
            "minutes": round((time.time() - since) / 60, 1),
            "versions": {"speedit_jax": __version__, "jax": jax.__version__, "python": sys.version.split()[0]},
            "compared": len(reference),
            "identical": len(rows) - len(failed),
            "experiments": sorted(rows, key=lambda row: list(experiments).index(row["name"])),
        }
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

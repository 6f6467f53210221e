"""Does a run in an object store that is killed again and again end in the same bits as one on a disk that was left alone?

  python -m benchmarks.kill_object_store --place=gs://BUCKET/PATH --kills=10 --steps=100 --seed=0 --out=docs/results/kill_gcs.json

Trains the model of benchmarks/kill_resume.py once on a disk without interruption. Then starts the same command with its
--workdir in a new directory of --place, kills it with SIGKILL at a random moment, most often after its first step, starts it
again, and so on; in the end it may finish. What XLA compiles is kept, so that most of the time goes to steps and saves. Compares
what kill_resume does: every array of every checkpoint, every logged number but the times, and the bytes of every image. Last it
checks that no unfinished checkpoint has left files there. Exits with 1 if anything differs. docs/storage.md says how to start a
server that speaks the store's protocol on this machine.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import jax
import numpy as np
from absl import logging

from benchmarks import kill_resume
from speedit_jax import __version__, storage
from speedit_jax.training import integrity

STEPPING = re.compile(r"\| [1-9]\d*/\d+ \[")  # a bar that has moved, or that begins where an earlier start left it


class Run:
    """A training process of which only the output is on this machine."""

    def __init__(self, workdir: str, log: Path, steps: int):
        self.log = log
        with log.open("w") as out:
            command = [*kill_resume.train_command(steps), f"--workdir={workdir}"]
            cache = {"JAX_COMPILATION_CACHE_DIR": str(log.parent / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
            environment = os.environ | cache
            self.process = subprocess.Popen(command, cwd=log.parent, env=environment, stdout=out, stderr=subprocess.STDOUT)

    def in_loop(self) -> bool:
        return STEPPING.search(self.log.read_text()) is not None

    def kill(self, after_start: bool, delay: float) -> dict | None:
        """Sends SIGKILL `delay` seconds after the start, or at the first step, if that is earlier; or `delay` seconds after the
        first step. None if the run has ended."""
        until = time.time() + delay if after_start else float("inf")
        while not self.in_loop() and self.process.poll() is None and time.time() < until:
            time.sleep(0.01)
        time.sleep(0 if after_start else delay)
        if self.process.poll() is not None:
            return None
        in_loop = self.in_loop()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        resumed = re.search(r"Resuming from the checkpoint of step (\d+)", self.log.read_text())
        return {"resumed_from": int(resumed[1]) if resumed else 0, "in_loop": in_loop, "seconds": round(delay, 2)}

    def end(self) -> None:
        if code := self.process.wait(kill_resume.TIMEOUT):
            sys.exit(f"error: the run ended with {code}: {self.log.read_text().strip()[-300:]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--place", required=True, help="gs://BUCKET/PATH or s3://BUCKET/PATH, to which a new directory is added")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=100, help="of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", help="where to write the results as JSON")
    args = parser.parse_args()
    logging.set_verbosity(logging.ERROR)
    jax.config.update("jax_platforms", "cpu")
    rng, since, kills = np.random.default_rng(args.seed), time.time(), []
    place = storage.path(args.place) / f"kill_{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        for package in ("speedit_jax", "configs"):  # a copy of the code, which may be edited meanwhile
            shutil.copytree(kill_resume.ROOT / package, scratch / package, ignore=shutil.ignore_patterns("__pycache__"))
        left_alone = Run(str(scratch / "run"), scratch / "run.log", args.steps)
        began = time.time()
        while not left_alone.in_loop() and left_alone.process.poll() is None:
            time.sleep(0.01)
        start, loop = time.time() - began, time.time()
        left_alone.end()
        loop = time.time() - loop
        reference = kill_resume.evidence(scratch / "run")
        print(
            f"{len(reference)} arrays, log lines and images; {start:.0f} s to the first step, {loop:.0f} s from there", flush=True
        )
        for i in range(args.kills):
            # One in five before the first step; the others may not finish the run before the kills are over.
            early = i % 5 == 2
            delay = rng.uniform(0, start if early else 3 * loop / args.kills)
            hit = Run(str(place), scratch / f"{i}.log", args.steps).kill(early, delay)
            if hit is None:
                print("the run has finished")
                break
            kills.append(hit)
            print(f"kill {i + 1}: {hit}", flush=True)
        last = Run(str(place), scratch / "last.log", args.steps)
        last.end()
        problems = kill_resume.differences(reference, kill_resume.evidence(storage.fetched(place)))
        files = storage.files(place)
        saved = [file.relative_to(place / "checkpoints") for file in files if file.is_relative_to(place / "checkpoints")]
        finished = {str(step) for step in integrity.steps(place)}
        problems += [f"leftover {name}" for name in saved if name.parts[0] not in finished]
    print(f"{len(kills)} kills; {'identical' if not problems else f'DIFFERENT: {problems[:3]}'}; {len(files)} files in {place}")
    if args.out:
        record = {
            "store": args.place.partition("://")[0],
            "kills": kills,
            "steps": args.steps,
            "seed": args.seed,
            "minutes": round((time.time() - since) / 60, 1),
            "versions": {"speedit_jax": __version__, "jax": jax.__version__, "python": sys.version.split()[0]},
            "compared": len(reference),
            "problems": problems,
        }
        storage.write_json(Path(args.out), record)
    storage.remove(place)
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()

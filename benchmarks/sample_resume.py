"""Are images that were drawn with interruptions those drawn without, and those of one device those of eight?

  python -m benchmarks.sample_resume --images=10000 --kills=3 --seed=0 --out=docs/results/sample_resume.json

Trains a small digits model (or takes that of --workdir) and draws images of it on 8 CPU devices without interruption. Then
starts the same command with another --out, kills it (SIGKILL) at random moments, each time starting it again, and compares:
npz, PNG and JSON to the byte; that batches finished before a kill were not written again; that nothing else is left. Last,
draws the same images on one device: the labels must be equal, and pixels may differ by 1 level of 255 in 0.1 % of them.
Exits with 1 if anything is otherwise.
"""

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from speedit_jax import __version__

ROOT = Path(__file__).resolve().parents[1]
MOST_LEVELS, LARGEST_SHARE = 1, 1e-3
TRAIN = {
    "model.width": 32,
    "model.depth": 2,
    "model.heads": 2,
    "model.scan_unroll": 1,
    "optim.warmup_steps": 10,
    "training.num_steps": 300,
    "training.batch_size": 64,
    "training.sample_every": 0,
}


def train(workdir: Path) -> None:
    flags = [f"--config.{name}={value}" for name, value in TRAIN.items()]
    command = [sys.executable, "-m", "speedit_jax.train", "--config=configs/digits.py", f"--workdir={workdir}", *flags]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, check=True, stdout=subprocess.DEVNULL)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A sample command, without where it writes."""

    workdir: Path
    images: int
    batch: int
    steps: int

    @property
    def batches(self) -> int:
        return -(-self.images // self.batch)

    def start(self, out: Path, devices: int, *flags: str, **env: str) -> subprocess.Popen:
        """A process with so many CPU devices; its output goes to OUT.log."""
        command = [sys.executable, "-m", "speedit_jax.sample", f"--workdir={self.workdir}", f"--out={out}"]
        command += [f"--num_images={self.images}", f"--batch_size={self.batch}", f"--num_steps={self.steps}", *flags]
        xla = f"--xla_force_host_platform_device_count={devices}"
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla} | env
        with out.with_suffix(".log").open("a") as log:
            return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)

    def finish(self, out: Path, devices: int) -> None:
        """Raises SystemExit with the last words of a command that fails."""
        if self.start(out, devices).wait():
            sys.exit(f"error: sampling failed: {out.with_suffix('.log').read_text()[-500:]}")


def finished(out: Path) -> dict[str, int]:
    """{batch's file: when it was written}."""
    return {path.name: path.stat().st_mtime_ns for path in out.with_suffix(".partial").glob("*.npy")}


def kill(process: subprocess.Popen, out: Path, batches: int, delay: float) -> dict[str, int]:
    """SIGKILL, `delay` seconds after so many batches are finished; what is finished then, empty if all was over."""
    while process.poll() is None and len(finished(out)) < batches:
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.wait()
    return finished(out)


def interrupted(drawing: Drawing, out: Path, devices: int, strikes: list[tuple[int, float]]) -> tuple[list[int], list[str]]:
    """Draws with kills, all but the last start: (batches finished at each kill, what was wrong)."""
    hits, problems, before = [], [], {}
    for batches, delay in strikes:
        after = kill(drawing.start(out, devices), out, batches, delay)
        hits.append(len(after))
        if len(after) <= len(before):
            problems.append(f"over before the kill at {batches} batches")
        problems += [f"{name} was written again" for name in before if after.get(name) != before[name]]
        before = after
    return hits, problems


def differences(one: Path, other: Path) -> list[str]:
    """Which outputs are not the same bytes, and what lies beside those of `other` that should not."""
    ends = (".json", ".npz", ".png")
    found = [end for end in ends if one.with_suffix(end).read_bytes() != other.with_suffix(end).read_bytes()]
    expected = {other.with_suffix(end).name for end in (*ends, ".log")}
    return found + sorted({path.name for path in other.parent.glob(f"{other.name}*")} - expected)


def compare(one: Path, other: Path) -> dict:
    """Labels and pixels of two npz files."""
    with np.load(one.with_suffix(".npz")) as a, np.load(other.with_suffix(".npz")) as b:
        levels = np.abs(a["arr_0"].astype(int) - b["arr_0"])
        return {
            "labels_equal": bool(np.array_equal(a["arr_1"], b["arr_1"])),
            "most_levels": int(levels.max()),
            "share_of_pixels": float((levels > 0).mean()),
        }


def within(found: dict) -> bool:
    return found["labels_equal"] and found["most_levels"] <= MOST_LEVELS and found["share_of_pixels"] <= LARGEST_SHARE


def plan(rng: np.random.Generator, kills: int, batches: int) -> list[tuple[int, float]]:
    """(after how many batches, seconds later) of each kill, one in each part of the drawing."""
    parts = np.linspace(0, 0.9 * batches, kills + 1).astype(int)
    return [(int(rng.integers(first, last)) + 1, rng.uniform(0, 0.05)) for first, last in itertools.pairwise(parts)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="of the sampler")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--workdir", help="of a run to draw from; default: a small one is trained")
    parser.add_argument("--out", help="where to write the results as JSON")
    args = parser.parse_args()
    since = time.time()
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        workdir = Path(args.workdir).absolute() if args.workdir else scratch / "run"
        if not args.workdir:
            train(workdir)
        drawing = Drawing(workdir, args.images, args.batch, args.steps)
        eight, killed, one = (scratch / name for name in ("eight", "killed", "one"))
        drawing.finish(eight, 8)
        strikes = plan(np.random.default_rng(args.seed), args.kills, drawing.batches)
        hits, problems = interrupted(drawing, killed, 8, strikes)
        drawing.finish(killed, 8)
        problems += differences(eight, killed)
        drawing.finish(one, 1)
        across = compare(eight, one)
    minutes = round((time.time() - since) / 60, 1)
    print(
        f"{args.images} images in {drawing.batches} batches on 8 devices; killed after {', '.join(map(str, hits))} batches:",
        end=" ",
    )
    print(f"DIFFERENT: {'; '.join(problems[:3])}" if problems else "identical to the byte")
    print(
        f"one device: labels {'equal' if across['labels_equal'] else 'DIFFERENT'}, at most {across['most_levels']} level apart",
        end=" ",
    )
    print(
        f"in {across['share_of_pixels']:.2e} of pixels: {'within' if within(across) else 'OUTSIDE'} the rule; {minutes} minutes"
    )
    if args.out:
        record = {
            "images": args.images,
            "batch": args.batch,
            "sampling_steps": args.steps,
            "devices": 8,
            "seed": args.seed,
            "batches": drawing.batches,
            "batches_finished_at_kills": hits,
            "problems": problems,
            "one_device": across,
            "minutes": minutes,
            "versions": {"speedit_jax": __version__, "jax": jax.__version__, "python": sys.version.split()[0]},
        }
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(1 if problems or not within(across) else 0)


if __name__ == "__main__":
    main()

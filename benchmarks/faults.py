"""Is anything wrong ever accepted when files of a checkpoint are damaged?

  python -m benchmarks.faults --trials=100 --out=docs/results/faults.json

Saves two checkpoints of a tiny run with random numbers, and for every kind of file in the newer one and every kind of damage
(one flipped bit, a cut, a deletion, a page of zeros) restores it again and again, each time with new damage at a random place.
What was restored is compared with what was saved, to the bit:
  refused   one line named the damage, and the run would go on from the older checkpoint
  same      the numbers are those that were saved: the damage is in a place that does not matter
  WRONG     other numbers, or no clear line
Each trial is done with checksums and without, as earlier versions saved. Also measures what the checksums cost, of a state of
--megabytes. Exits with 1 if anything is wrong with checksums.
"""

import argparse
import collections
import contextlib
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from absl import logging

from speedit_jax import __version__, sharding, storage
from speedit_jax.config import get_config
from speedit_jax.data.sources import open_source
from speedit_jax.errors import UserError
from speedit_jax.training import integrity, run, set_aside
from speedit_jax.training.assembly import Assembly, assemble
from speedit_jax.training.checkpoint import Checkpoints, arrays

PAGE = 4096
OLDER, NEWER = 1, 2
RUN = "run.json"
TINY = {
    "data.height": 8,
    "data.width": 8,
    "data.synthetic_size": 64,
    "model.name": "DiT-tiny/2",
    "model.width": 32,
    "model.depth": 2,
    "model.heads": 4,
    "training.num_steps": 10,
}


def flip(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    changed[rng.integers(len(content))] ^= 1 << rng.integers(8)
    return bytes(changed)


def cut(content: bytes, rng: np.random.Generator) -> bytes:
    return content[: rng.integers(len(content))]


def zero(content: bytes, rng: np.random.Generator) -> bytes:
    start = PAGE * rng.integers(-(-len(content) // PAGE))
    return (content[:start] + bytes(len(content[start : start + PAGE])) + content[start + PAGE :])[: len(content)]


def delete(content: bytes, rng: np.random.Generator) -> None:
    del content, rng


DAMAGE = {"flipped bit": flip, "cut": cut, "zeroed page": zero, "deleted": delete}


def kinds(checkpoint: Path) -> dict[str, list[Path]]:
    """All files of a checkpoint, by what they are."""
    found = collections.defaultdict(list)
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file():
            name = "arrays (OCDBT data)" if path.parent.name == "d" else path.relative_to(checkpoint).as_posix()
            name = "manifest.ocdbt" if path.name == "manifest.ocdbt" else name
            found["commit_success.txt" if path.name == "commit_success.txt" else name].append(path)
    return dict(found)


class Subject:
    """A run of two checkpoints, to be damaged and mended."""

    def __init__(self, workdir: Path, seed: int = 0):
        config = get_config()
        config.update_from_flattened_dict(TINY)
        source = open_source(config.data)
        self.workdir, self.rng = workdir, np.random.default_rng(seed)
        mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
        self.parts: Assembly = assemble(config, source, mesh)
        self.meta = run.describe(config, source, self.parts.model.image_shape, None)
        run.claim(workdir, self.meta)
        checkpoints = Checkpoints(workdir, create=True, keep_last=2)
        for step in (OLDER, NEWER):
            draw = np.random.default_rng(step)
            state = jax.tree.map(lambda s, draw=draw: (100 * draw.normal(size=s.shape)).astype(s.dtype), self.parts.shapes)
            state = jax.device_put(state, self.parts.shardings)
            checkpoints.save(step, state, self.meta)
            self.saved = arrays(state)
        checkpoints.close()
        self.checkpoint = workdir / "checkpoints" / str(NEWER)

    def restore(self) -> str:
        """What becomes of reading the newer checkpoint as it is now."""
        try:
            checkpoints = Checkpoints(self.workdir)
            same_meta = checkpoints.meta(NEWER) == self.meta
            found = arrays(checkpoints.restore(NEWER, self.parts.shapes, self.parts.shardings))
        except UserError as e:
            return "refused" if "\n" not in str(e) else "WRONG"
        except Exception:  # a traceback is no clear line
            return "WRONG"
        same = all(found[name].tobytes() == array.tobytes() for name, array in self.saved.items())
        return "same" if same and same_meta and found.keys() == self.saved.keys() else "WRONG"

    def goes_on(self) -> str:
        """What becomes of a run that starts now, which has to see the older checkpoint; the newer one is put back."""
        try:
            lines = set_aside.set_aside_damaged(self.workdir)
        except UserError:
            return "WRONG"
        aside = self.checkpoint.with_name(f"{set_aside.PREFIX}{NEWER}")
        right = integrity.steps(self.workdir) == [OLDER] and len(lines) == 1 and aside.is_dir()
        if aside.is_dir():
            aside.rename(self.checkpoint)
        return "refused" if right else "WRONG"

    @contextlib.contextmanager
    def damaged(self, path: Path, how: str) -> Iterator[None]:
        """One file is damaged meanwhile."""
        content = changed = path.read_bytes()
        while changed == content:
            changed = DAMAGE[how](content, self.rng)
        try:
            path.unlink() if changed is None else path.write_bytes(changed)
            yield
        finally:
            path.write_bytes(content)

    def trial(self, paths: list[Path], how: str) -> tuple[str, str | None]:
        """(outcome with checksums, without them); the latter is None for the checksums' own file."""
        path = paths[self.rng.integers(len(paths))]
        without, sums = None, self.checkpoint / integrity.NAME
        with self.damaged(path, how):
            outcome = self.restore()
            if outcome == "refused":
                outcome = self.goes_on()
            if path != sums:
                kept = sums.read_bytes()
                sums.unlink()
                without = self.restore()
                sums.write_bytes(kept)
        return outcome, without

    def trial_of_run(self, how: str) -> str:
        """run.json is what it was after the next start, whatever was done to it."""
        path = self.workdir / RUN
        before = path.read_bytes()
        with self.damaged(path, how):
            try:
                run.claim(self.workdir, self.meta, step=NEWER)
            except Exception:
                return "WRONG"
            return "mended" if path.read_bytes() == before else "WRONG"


def study(subject: Subject, trials: int) -> list[dict]:
    """A row {"file", "damage", "with": counts, "without": counts} of each kind of file and damage."""
    rows = []
    for name, paths in kinds(subject.checkpoint).items():
        for how in DAMAGE:
            outcomes = [subject.trial(paths, how) for _ in range(trials)]
            columns = [collections.Counter(filter(None, column)) for column in zip(*outcomes, strict=True)]
            rows.append({"file": name, "damage": how, "with": dict(columns[0]), "without": dict(columns[1])})
            print(f"{name:<32}{how:<14}{spelled(columns[0]):<28}{spelled(columns[1])}", flush=True)
    for how in DAMAGE:
        counts = collections.Counter(subject.trial_of_run(how) for _ in range(trials))
        rows.append({"file": RUN, "damage": how, "with": dict(counts), "without": {}})
        print(f"{RUN:<32}{how:<14}{spelled(counts)}", flush=True)
    return rows


def spelled(counts: dict[str, int]) -> str:
    return ", ".join(f"{counts[name]} {name}" for name in ("refused", "mended", "same", "WRONG") if counts.get(name)) or "-"


def cost(scratch: Path, megabytes: int, repeats: int = 5) -> dict[str, float]:
    """Seconds of a save without checksums, of the checksums, of a restore of all arrays, and of verifying: medians."""
    rng = np.random.default_rng(0)
    count = -(-megabytes // 16)
    params = {f"{i:03d}": jax.device_put(rng.normal(size=(1024, 4096)).astype(np.float32)) for i in range(count)}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    shardings = jax.tree.map(lambda x: x.sharding, params)
    checkpoints = Checkpoints(scratch, create=True)
    seconds = collections.defaultdict(list)

    def timed(name, call, *args):
        since = time.perf_counter()
        call(*args)
        seconds[name].append(time.perf_counter() - since)

    def save(step):
        checkpoints.save_weights(step, params, {}, {})
        checkpoints.wait()

    for step in range(repeats):
        timed("save", save, step)
        directory = scratch / "checkpoints" / str(step)
        timed("checksums", integrity.seal, directory, ("state", "meta"))
        timed("verify", integrity.damage, directory)
        timed("restore", lambda step=step: checkpoints.restore_weights(step, "raw", shapes, shardings))
    checkpoints.close()
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    medians["save"] -= medians["checksums"]  # both are in it
    medians["restore"] -= medians["verify"]
    return {"megabytes": 16 * count * 1.048576} | {name: round(value, 3) for name, value in medians.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100, help="of each kind of file and damage")
    parser.add_argument("--seed", type=int, default=0, help="of the places")
    parser.add_argument("--megabytes", type=int, default=512, help="of the state whose save is timed")
    parser.add_argument("--out", help="where to write the results as JSON")
    args = parser.parse_args()
    logging.set_verbosity(logging.FATAL)  # orbax warns of every checkpoint that it only reads
    jax.config.update("jax_platforms", "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        print(f"{'file':<32}{'damage':<14}{'with checksums':<28}without", flush=True)
        rows = study(Subject(Path(scratch) / "run", args.seed), args.trials)
        shutil.rmtree(Path(scratch) / "run")
        seconds = cost(Path(scratch) / "cost", args.megabytes)
    wrong = sum(row["with"].get("WRONG", 0) for row in rows)
    accepted = sum(row["without"].get("WRONG", 0) for row in rows)
    print(f"\n{args.trials * len(rows)} trials: {wrong} wrong with checksums, {accepted} without")
    told = ", ".join(f"{name} {seconds[name]} s" for name in ("save", "checksums", "restore", "verify"))
    print(f"{seconds['megabytes']:.0f} MB: {told}; checksums {seconds['checksums'] / seconds['save']:.1%} of a save")
    if args.out:
        record = {
            "trials": args.trials,
            "seed": args.seed,
            "versions": {"speedit_jax": __version__, "jax": jax.__version__, "python": sys.version.split()[0]},
            "wrong": wrong,
            "cost": seconds,
            "rows": rows,
        }
        storage.write_text(Path(args.out), json.dumps(record, indent=1) + "\n")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()

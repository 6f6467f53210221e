"""Does a run that goes on with another number of devices keep its state and its data, and do several processes train as one?

  python -m benchmarks.elastic --out=docs/results/elastic.json

Trains a tiny model on real digits for 10 steps each with 4, 2, 8 and 1 CPU devices, on meshes of different axes; each start
resumes the one before. Every start notes checksums of the arrays that it restores, of those that it saves, and of every batch
that it trains on. Then the same 40 steps with one device, without a stop. What is compared:
  restored   each array of the state, after it is restored, with the same array when it was saved: to the bit
  batches    each batch with that of the run without a stop: to the bit
  losses     each logged loss with that of the run without a stop: to rounding
Last, 10 steps with 4 devices that belong to 1, 2 and 4 processes, on one mesh: their losses are compared with those of the one
process. Exits with 1 if anything differs, or a loss by more than a millionth of its value (several processes) or ten millionths
(other meshes, which add up in another order, 40 steps long).
"""

import argparse
import hashlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.kill_resume import ROOT, train_command
from speedit_jax import __version__, storage
from speedit_jax.testing.hosts import hosts

STEPS = 10  # of each start
# Devices, and their mesh.
STARTS = ((4, {"fsdp": 2}), (2, {"fsdp": 2}), (8, {"fsdp": 2, "tensor": 2}), (1, {}))
PROCESSES = (1, 2, 4)
SAME, ROUNDED = 1e-6, 1e-5  # relative, of losses; float32 rounds at 6e-8
TIMEOUT = 1800
RECORD = "SPEEDIT_RECORD"


def digests(tree: Any) -> dict[str, str]:
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    values = {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf) for path, leaf in paths}
    return {
        name: hashlib.sha256(f"{value.dtype}{value.shape}".encode() + value.tobytes()).hexdigest()
        for name, value in values.items()
    }


def train_and_note(out: Path) -> None:
    """The `train` of this command line; writes to `out` what it restored, took and saved."""
    from speedit_jax.training import batches
    from speedit_jax.training.checkpoint import Checkpoints

    noted = {"restored": {}, "batches": {}, "saved": {}}
    save, restore, load = Checkpoints.save, Checkpoints.restore, batches.batches

    def saving(self, step, state, meta):
        noted["saved"] = digests(state)
        out.write_text(json.dumps(noted))
        return save(self, step, state, meta)

    def restoring(self, *args, **kwargs):
        state = restore(self, *args, **kwargs)
        noted["restored"] = digests(state)
        return state

    def loading(parts, source, first_step, num_steps):
        for step, batch in enumerate(load(parts, source, first_step, num_steps), first_step):
            noted["batches"][step] = digests(batch)
            yield batch

    Checkpoints.save, Checkpoints.restore, batches.batches = saving, restoring, loading
    runpy.run_module("speedit_jax.train", run_name="__main__", alter_sys=True)


def train(workdir: Path, steps: int, devices: int, mesh: dict[str, int], processes: int = 1, record: Path | None = None) -> None:
    """Trains up to step `steps` with `devices` of each process."""
    settings = {
        "optim.schedule": "constant",
        "optim.warmup_steps": 5,
        "evaluation.every": 0,
        "training.sample_every": 0,
        "training.log_every": 1,
    }
    settings |= {f"mesh.{axis}": size for axis, size in mesh.items()}
    command = [*train_command(steps), f"--workdir={workdir}", *(f"--config.{name}={value}" for name, value in settings.items())]
    if record:
        command[2] = "benchmarks.elastic"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    environment |= {RECORD: str(record)} if record else {}
    command += ["--multihost"] if processes > 1 else []
    logs = [workdir.with_suffix(f".{number}.log") for number in range(processes)]
    running = []
    for host, log in zip(hosts(processes) if processes > 1 else [{}], logs, strict=True):
        with log.open("w") as out:
            running.append(subprocess.Popen(command, cwd=ROOT, env=environment | host, stdout=out, stderr=subprocess.STDOUT))
    for process, log in zip(running, logs, strict=True):
        if process.wait(TIMEOUT):
            sys.exit(f"error: a run failed: {log.read_text()[-2000:]}")


def losses(workdir: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())}


def farthest(ours: dict[int, float], theirs: dict[int, float]) -> float:
    """The largest relative difference."""
    assert ours.keys() == theirs.keys()
    return max(abs(ours[step] / theirs[step] - 1) for step in ours)


def differing(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def resized(scratch: Path) -> dict:
    """A run on 4, 2, 8 and 1 devices, against one that was left alone on one device."""
    workdir, rows, batches, before = scratch / "resized", [], {}, {}
    for number, (devices, mesh) in enumerate(STARTS, 1):
        train(workdir, number * STEPS, devices, mesh, record=scratch / "record.json")
        noted = json.loads((scratch / "record.json").read_text())
        rows.append(
            {
                "devices": devices,
                "mesh": mesh,
                "to_step": number * STEPS,
                "restored": len(noted["restored"]),
                "different": differing(before, noted["restored"]),
            }
        )
        before, batches = noted["saved"], batches | noted["batches"]
        print(rows[-1], flush=True)
    train(scratch / "whole", len(STARTS) * STEPS, 1, {}, record=scratch / "record.json")
    whole = json.loads((scratch / "record.json").read_text())["batches"]
    return {
        "starts": rows,
        "batches": {"compared": len(whole), "different": differing(batches, whole)},
        "largest_relative_difference_of_a_loss": farthest(losses(workdir), losses(scratch / "whole")),
    }


def several(scratch: Path) -> list[dict]:
    """The losses of 4 devices of several processes against those of one process."""
    rows = []
    for processes in PROCESSES:
        train(scratch / f"of_{processes}", STEPS, 4 // processes, {"fsdp": 2}, processes)
        difference = farthest(losses(scratch / f"of_{processes}"), losses(scratch / "of_1"))
        rows.append({"processes": processes, "largest_relative_difference_of_a_loss": difference})
        print(rows[-1], flush=True)
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="where to write the results as JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        found = resized(Path(scratch)) | {"processes": several(Path(scratch))}
    name = "largest_relative_difference_of_a_loss"
    print(f"{found['batches']['compared']} batches, {len(found['batches']['different'])} differ; losses to {found[name]:.1e}")
    if args.out:
        versions = {"speedit_jax": __version__, "jax": jax.__version__, "python": sys.version.split()[0]}
        storage.write_text(args.out, json.dumps({"versions": versions} | found, indent=1) + "\n")
    same = not found["batches"]["different"] and not any(row["different"] for row in found["starts"])
    near = found[name] <= ROUNDED and all(row[name] <= SAME for row in found["processes"])
    sys.exit(0 if same and near else 1)


if __name__ == "__main__":
    if RECORD in os.environ:
        train_and_note(Path(os.environ[RECORD]))
    else:
        main()

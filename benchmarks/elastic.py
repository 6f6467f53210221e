"""Does a run go on with other hosts and other devices as it would have gone on with its own?

  python -m benchmarks.elastic --out=docs/results/elastic.json

Trains a tiny model on real digits in stages, each with other processes or devices than the one before, and compares with one
process and one device that train in one go:
  restored  arrays of the last checkpoint of the stage: the same bytes on 1, 2, 4 and 8 devices
  loss      the largest relative difference of a loss of the stage; another order of the data would change its first digits
  params    the largest difference of a parameter at the end, relative to the largest of its array
Exits with 1 if a restored array differs, or a loss by more than 1e-4.
"""

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"  # before jax is imported

import jax
import numpy as np
from absl import logging

from benchmarks.fault_runs.job import Job, Place, prepare
from speedit_jax import __version__, sharding, storage
from speedit_jax.data.sources import open_source
from speedit_jax.training.assembly import assemble
from speedit_jax.training.checkpoint import arrays
from speedit_jax.training.run import open_run

EACH = 12  # steps of a stage
# Of each stage: processes, devices of each, mesh.fsdp.
CHAINS = {
    "4, 2, 8, then 1 device": [(1, 4, 2), (1, 2, 2), (1, 8, 4), (1, 1, 1)],
    "4 hosts, then 2": [(4, 1, 4), (2, 1, 2)],
}


def start(place: Place, stage: int, processes: int, devices: int, fsdp: int) -> None:
    """Trains to the end of a stage (from 1)."""
    flags = (
        "--config.optim.schedule=constant",
        f"--config.training.num_steps={EACH * stage}",
        "--config.training.log_every=1",
        f"--config.mesh.fsdp={fsdp}",
        "--config.training.sample_every=0",
        "--config.checkpoint.keep_last=10",
        f"--config.checkpoint.every={EACH}",
    )
    env = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    codes, lines, _ = Job(place, processes, *flags, env=env).end(range(processes))
    if any(codes):
        sys.exit(f"error: stage {stage}: {lines}")


def restored(workdir: Path, step: int, devices: int) -> dict[str, np.ndarray]:
    mesh = sharding.make_mesh({"data": 1, "fsdp": devices, "tensor": 1}, jax.devices()[:devices])
    run = open_run(workdir, step, mesh)
    config = run.config.copy_and_resolve_references()
    parts = assemble(config, open_source(config.data), mesh)
    state = run.checkpoints.restore(step, parts.shapes, parts.shardings)
    run.checkpoints.close()
    return arrays(state)


def losses(workdir: Path) -> np.ndarray:
    """Of every step."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, len(records) + 1))
    return np.array([record["loss"] for record in records])


def measure(place: Place, stages: list[tuple[int, int, int]], alone: np.ndarray) -> list[dict]:
    """A row of each stage."""
    rows = []
    for number, (processes, devices, fsdp) in enumerate(stages, 1):
        start(place, number, processes, devices, fsdp)
        one = restored(place.workdir, EACH * number, 1)
        others = [restored(place.workdir, EACH * number, count) for count in (2, 4, 8)]
        equal = all(one[name].tobytes() == other[name].tobytes() for other in others for name in one)
        found = losses(place.workdir)
        relative = np.abs(found - alone[: len(found)]) / alone[: len(found)]
        row = {"processes": processes, "devices": processes * devices, "fsdp": fsdp, "restored": equal}
        row |= {"first loss": relative[EACH * (number - 1)], "loss": relative[EACH * (number - 1) :].max()}
        same = "to the bit" if equal else "DIFFERENT"
        where = f"{processes} processes, {row['devices']} devices, fsdp {fsdp}"
        print(f"{where}: restored {same}, first loss {row['first loss']:.1e}, largest {row['loss']:.1e}", flush=True)
        rows.append(row)
    return rows


def params(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> float:
    names = [name for name in one if name.startswith("params/")]
    return max(float(np.abs(one[name] - other[name]).max() / np.abs(one[name]).max()) for name in names)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", help="where to write the results as JSON")
    args = parser.parse_args()
    logging.set_verbosity(logging.FATAL)  # orbax warns of every checkpoint that it only reads
    jax.config.update("jax_platforms", "cpu")
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        prepare(root)
        reference = Place(root, root / "reference")
        longest = max(map(len, CHAINS.values()))
        start(reference, longest, 1, 1, 1)
        alone = losses(reference.workdir)
        for name, stages in CHAINS.items():
            place = Place(root, root / name.replace(" ", "-"))
            rows = measure(place, stages, alone)
            end = params(restored(reference.workdir, EACH * len(stages), 1), restored(place.workdir, EACH * len(stages), 1))
            found[name] = {"stages": rows, "params": end}
            print(f"{name}: parameters at the end differ by {end:.1e}", flush=True)
            if args.out:
                versions = {"speedit_jax": __version__, "jax": jax.__version__, "python": sys.version.split()[0]}
                record = {"steps of a stage": EACH, "versions": versions, "chains": found}
                storage.write_text(Path(args.out), json.dumps(record, indent=1) + "\n")
    rows = [row for chain in found.values() for row in chain["stages"]]
    sys.exit(0 if all(row["restored"] and row["loss"] < 1e-4 for row in rows) else 1)


if __name__ == "__main__":
    main()

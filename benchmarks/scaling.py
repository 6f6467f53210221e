"""Memory, FLOPs and collectives of DiT-XL/2 and DiG-XL/2 on machines that are not here, from compilations for them.

  python -m benchmarks.scaling --out=docs/results/scaling.json

First the arithmetic, which needs no compiler: FLOPs of a step, bytes of the state, and the images a device from which on
computing takes longer than exchanging weights and gradients. Then it compiles the training step of each row twice, for two batch
sizes, by `python -m speedit_jax.aot`, and estimates the largest batch from the two: memory is a constant and a part that grows
with the batch. Results are written after each compilation, and a second start goes on with what is missing. Compilations take
up to two minutes each on idle cores; --arithmetic leaves them out.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

from configs.imagenet import get_config
from speedit_jax import sharding, storage
from speedit_jax.training import topologies
from speedit_jax.training.assembly import make_model

# Machine -> (devices, mesh). Where the state of 16 bytes a parameter leaves most of a device free, only the batch is divided.
MACHINES = {
    "v5e:16x16": (256, {"fsdp": 16}),
    "h100x8": (8, {}),
    "v5p:4x4x4": (64, {}),
    "v6e:16x16": (256, {"fsdp": 16}),
    "tpu7x:4x4x4": (128, {}),
}
MEMORY = {"v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite", "tpu7x": "TPU7x"}
# Of one device: peak FLOP/s in bfloat16; bytes/s that it receives from both neighbours on one axis of a TPU's torus, or through
# a GPU's links. From the vendors' pages, rounded; a tpu7x chip is two devices, which share its links.
SPEEDS = {
    "v5e:16x16": (197e12, 100e9),
    "h100x8": (989e12, 450e9),
    "v5p:4x4x4": (459e12, 200e9),
    "v6e:16x16": (918e12, 200e9),
    "tpu7x:4x4x4": (1153e12, 200e9),
}
MODELS = ("DiT-XL/2", "DiG-XL/2")
# Pixels -> (remat, images a device of the two compilations).
SIZES = {256: ("lean", (8, 16)), 1024: ("lean", (1, 2)), 2048: ("full", (1, 2))}


def arithmetic() -> list[dict]:
    """For each model, size and machine: what a step takes, if all that it exchanges were the bfloat16 weights and gradients."""
    found = []
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    for pixels, (remat, _) in SIZES.items():
        for name in MODELS:
            model = make_model(get_config(name), mesh, (pixels // 8, pixels // 8, 4), 1000)
            params = sum(math.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))
            flops = (4 if remat == "full" else 3) * model.forward_flops
            for machine, (_, axes) in MACHINES.items():
                fsdp, (peak, bandwidth) = axes.get("fsdp", 1), SPEEDS[machine]
                # A ring moves an all-reduced array twice. fsdp gathers weights in both passes and scatters gradients.
                moved = 2 * params * (2 if fsdp == 1 else 3 + 2 / fsdp)
                row = {"model": name, "pixels": pixels, "machine": machine, "fsdp": fsdp, "parameters": params}
                row |= {"tflop_per_image": round(flops / 1e12, 3), "state_gib_per_device": round(16 * params / fsdp / 2**30, 2)}
                row |= {"exchanged_gib": round(moved / 2**30, 2), "ms_per_image_at_peak": round(1e3 * flops / peak, 2)}
                found.append(row | {"images_per_device_to_hide_it": round(moved / bandwidth / (flops / peak), 2)})
    return found


def rows() -> list[dict]:
    return [
        {"model": model, "pixels": pixels, "machine": machine, "images": images}
        for pixels, (_, batches) in SIZES.items()
        for machine in MACHINES
        for model in MODELS
        for images in batches
    ]


def compile_one(row: dict) -> dict:
    """What aot says of one row."""
    devices, mesh = MACHINES[row["machine"]]
    latent = row["pixels"] // 8
    command = [sys.executable, "-m", "speedit_jax.aot", f"--config=configs/imagenet.py:{row['model']}"]
    command += [f"--topology={row['machine']}", f"--image_shape={latent},{latent},4", "--num_classes=1000"]
    command += [f"--config.mesh.{axis}={n}" for axis, n in mesh.items()]
    command += [f"--config.training.batch_size={devices * row['images']}", f"--config.model.remat={SIZES[row['pixels']][0]}"]
    with tempfile.TemporaryDirectory() as scratch:
        out, since = Path(scratch) / "out.json", time.perf_counter()
        done = subprocess.run([*command, f"--out={out}"], capture_output=True, text=True)
        if not out.exists():
            said = done.stderr.strip().splitlines()
            fatal = [line for line in said if "Check failed" in line]  # libtpu's own, above a stack trace
            return {"error": (fatal or said[-1:])[0], "seconds": round(time.perf_counter() - since)}
        record = json.loads(out.read_text())
    kept = ("mesh", "fits", "error", "bytes_per_device", "collectives", "model_flops_per_device", "compile_seconds", "jax")
    return {name: record[name] for name in kept if name in record}


def memory(machine: str) -> int:
    """Bytes that a program may take of one device."""
    kind = machine.partition(":")[0]
    if kind in MEMORY:
        return topologies.TPU_MEMORY[MEMORY[kind]]
    return int(topologies.GPU_MEMORY_FRACTION * topologies.GPUS[kind.partition("x")[0]]["memory"])


def largest(records: list[dict], machine: str) -> int | None:
    """Images a device that fit, by a line through the two compilations; None unless both fit."""
    if len(records) != 2 or not all(record.get("bytes_per_device") for record in records):
        return None
    (one, two), (first, second) = [r["images"] for r in records], [r["bytes_per_device"]["total"] for r in records]
    slope = (second - first) / (two - one)
    return int(one + (memory(machine) - first) // slope)


def summary(found: list[dict]) -> list[dict]:
    """One entry for each model, size and machine of which anything is known."""
    table = {}
    for record in found:
        table.setdefault((record["model"], record["pixels"], record["machine"]), []).append(record)
    return [
        {"model": model, "pixels": pixels, "machine": machine, "largest_images_per_device": largest(records, machine)}
        for (model, pixels, machine), records in table.items()
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, type=Path, help="where the results are, and are written, as JSON")
    parser.add_argument("--machine", action="append", choices=list(MACHINES), help="only this one; may be repeated")
    parser.add_argument("--pixels", action="append", type=int, choices=list(SIZES), help="only this size; may be repeated")
    parser.add_argument("--arithmetic", action="store_true", help="compile nothing")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # of this process: the compilers are those of others
    numbers = arithmetic()
    for row in numbers:
        print(*row.values())

    def write():
        known = {"largest": summary(found), "arithmetic": numbers, "compilations": found}
        storage.write_text(args.out, json.dumps(known, indent=1) + "\n")

    found = json.loads(args.out.read_text())["compilations"] if args.out.exists() else []
    there = [{name: record[name] for name in rows()[0]} for record in found]
    wanted = [row for row in rows() if row["machine"] in (args.machine or MACHINES) and row["pixels"] in (args.pixels or SIZES)]
    missing = [row for row in wanted if row not in there]
    write()
    for row in missing if not args.arithmetic else ():
        record = row | compile_one(row)
        found.append(record)
        write()
        size = record.get("bytes_per_device", {}).get("total", 0) / 2**30
        print(
            *row.values(), f"{size:.2f} GiB" if size else record.get("error", "")[:150], record.get("compile_seconds"), flush=True
        )


if __name__ == "__main__":
    main()
